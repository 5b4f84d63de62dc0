"""Running a memory plan: the program inside one block of bytes, dead bytes poisoned, every byte counted.

Codes are read from the arena and written to it and nowhere else. What no live buffer holds is 0x55 at every
step, so a read of dead bytes gives other results than `hw.mcu_int8` does; a write beyond the arena raises.
Weights and constants are in flash, a streamed image comes piece by piece from outside.
"""

import copy
from dataclasses import dataclass, field, replace

import numpy as np

from hw import numerics
from hw.interpret import Trace, _arguments
from hw.mcu_arena import MemoryPlan, Segment
from hw.mcu_flow import by_rows, matrix_of_row, piece
from hw.mcu_int8 import Int8Policy
from hw.program import is_float, numpy_dtype

POISON = 0x55


@dataclass
class ArenaRun:
    """touched: the highest byte written of each region, plus one. steps: how many steps ran."""

    touched: dict = field(default_factory=dict)
    steps: int = 0


def run_arena(plan: MemoryPlan, args, policy: Int8Policy, *, sizes=None):
    """(outputs, ArenaRun) of the program of the plan, as `run_program` gives them.

    Args: policy: the int8 arithmetic, of the same program. sizes: {region: bytes} of the arena, by default
        what the plan needs.
    Raises: MemoryError for a write beyond the arena.
    """
    return _Machine(plan, policy, sizes).run(args)


class _Machine:
    def __init__(self, plan, policy, sizes):
        self.plan, self.flow, self.policy = plan, plan.flow, policy
        self.units, self.tensors = plan.flow.units, plan.flow.tensors
        need = sizes or plan.arena.totals or {"": plan.total}
        self.memory = {r: np.full(n, POISON, np.uint8) for r, n in need.items()}
        self.seen, self.trace, self.static = ArenaRun(dict.fromkeys(need, 0)), Trace(), {}
        self.slice, self.camera = {}, {}
        self.segment = {g.first: (n, g) for n, g in enumerate(plan.segments)}
        self.dying = {}
        for i, size, first, last in plan.arena.buffers:
            place = plan.arena.region.get(i, ""), plan.arena.offsets[i], size
            self.dying.setdefault(last, []).append((first, place))
        self.scratch = {
            n: (plan.arena.region.get(f"scratch {n}", ""), plan.arena.offsets[f"scratch {n}"])
            for n, g in enumerate(plan.segments)
            if g.scratch
        }

    def run(self, args):
        program = self.plan.program
        for i, v in zip(program.body.inputs, _arguments(program, args), strict=True):
            v = self.policy.enter(self.tensors[i], v, self.trace)
            if not self.flow.held(i):
                self.static[i] = v
            elif any(g.streamed == i for g in self.plan.segments):
                self.camera[i] = self._bytes(i, v)
            else:
                self.store(i, v)
        self.block(program.body, 0)
        out = [self.value(o) for o in program.body.outputs]
        return (out[0] if program.output_names == ("result",) else tuple(out)), self.seen

    # Bytes

    def _bytes(self, i, value):
        t = self.tensors[i]
        if is_float(t.dtype):
            return self._coded(i, value)
        x = np.ascontiguousarray(np.asarray(value).astype(numpy_dtype(t.dtype)))
        return x.reshape(-1).view(np.uint8)

    def _coded(self, i, value):
        return self.policy.codes(i, value).astype(self.policy.name).reshape(-1).view(np.uint8)

    def _values(self, i, raw, shape):
        t = self.tensors[i]
        if is_float(t.dtype):
            return self.policy.reals(i, raw.view(self.policy.name)).reshape(shape)
        return raw.copy().view(numpy_dtype(t.dtype)).reshape(shape)

    def place(self, i):
        """(region, offset) of a tensor: its buffer's, and where in it a loop's slice lies."""
        extra = 0
        while i in self.flow.alias:
            extra += self.slice.get(i, 0)
            i = self.flow.alias[i]
        region, offset = self.plan.where(i)
        return region, offset + extra

    def write(self, region, at, raw):
        memory = self.memory[region]
        if at < 0 or at + len(raw) > len(memory):
            raise MemoryError(
                f"a write of {len(raw):,} B at {at:,} ends beyond the arena of {len(memory):,} B"
            )
        memory[at : at + len(raw)] = raw
        self.seen.touched[region] = max(self.seen.touched[region], at + len(raw))

    def store(self, i, value):
        self.write(*self.place(i), self._bytes(i, value))

    def value(self, i):
        """A tensor as the machine reads it now."""
        if not self.flow.held(i):
            return self.fixed(i)
        region, at = self.place(i)
        t = self.tensors[i]
        return self._values(i, self.memory[region][at : at + self.flow.size(i)].copy(), t.shape)

    def fixed(self, i):
        """A weight, a constant, or what was folded from them."""
        if i not in self.static:
            self.static[i] = self.policy.enter(self.tensors[i], self.tensors[i].array)
        return self.static[i]

    def done(self, n, since=-1):
        """Poison what is dead after segment n: of a loop's trip, what was made since its beginning."""
        for first, (region, at, size) in self.dying.get(n, ()):
            if first > since:
                self.memory[region][at : at + size] = POISON
        self.seen.steps += 1

    # Steps

    def block(self, block, step):
        """Run a block whose first step is `step`; returns the step after its last."""
        until = step
        for op in block.ops:
            if op.blocks:
                step = until = self.structured(op)
                continue
            unit = self.units.unit(op)
            if unit.kind == "view":
                if not self.flow.held(op.outputs[0]):
                    self.fold(op)
                continue
            if unit.kind == "free":
                if all(o in self.units.static for o in op.outputs):
                    self.fold(op)
                continue
            if step >= until:  # the first step of a segment runs when its last is reached: weights are folded
                n, g = self.segment[step]
                until = g.last + 1
            step += 1
            if step == until:
                self.leaf(n, g)
        return step

    def fold(self, op):
        ins = [self.tensors[i] for i in op.inputs]
        args = [self.policy._given(self.fixed(i), t) for i, t in zip(op.inputs, ins, strict=True)]
        from hw.mcu_int8 import _wide

        results = numerics.compute(op, args, _wide([self.tensors[o] for o in op.outputs]))
        self.static.update(zip(op.outputs, results, strict=True))

    def fill(self, n, g):
        """Scratch is written all over before it is used: it may lie on nothing that lives."""
        if g.scratch:
            self.write(*self.scratch[n], np.full(g.scratch, 0xAA, np.uint8))

    def leaf(self, n, g: Segment):
        self.fill(n, g)
        if g.rows == 1 and not g.inner:
            step = self.flow.steps[g.first]
            self.unit(step, self.policy, {i: self.value(i) for i in step.reads}, self.store)
        else:
            self.rows(n, g)
        self.done(n)

    def unit(self, step, policy, values, store, part=None):
        """One unit: operands from the arena and from flash, results handed to `store`."""
        op = step.unit.op
        needed = {*self.units.reads(step.unit), *op.inputs}
        needed |= {i for x in step.unit.chain for i in x.inputs}
        fixed = {i: self.fixed(i) for i in needed if i in self.units.static and self._known(i)}
        policy.env = {**fixed, **(part or {}), **values}
        results = policy.run(step.unit, self.trace)
        policy.env = {}
        for o, r in zip(self.units.writes(step.unit), results, strict=True):
            if self.flow.held(o):
                store(o, r)

    def _known(self, i):
        return i in self.static or self.tensors[i].data is not None

    def rows(self, n, g):
        """A segment piece by piece: rows of operands and results, what is between them in the scratch."""
        flow, rows = self.flow, g.rows
        steps = flow.steps[g.first : g.last + 1]
        kinds = {m: by_rows(self.units, s.unit, rows) for m, s in enumerate(steps)}
        shape = lambda i: piece(self.tensors[i].shape, rows)
        tensors, policies = dict(self.tensors), []
        for m, s in enumerate(steps):
            cut = {i for i, kind in kinds[m].items() if kind == "row"} | set(s.writes)
            own = {i: replace(self.tensors[i], shape=shape(i)) for i in cut}
            policy = copy.copy(self.policy)
            policy.program, policy.whole = replace(self.plan.program, tensors={**tensors, **own}), self.static
            policies.append(policy)
        base = self.scratch.get(n, ("", 0))

        def at(i, r):
            b = flow.buffer(i)
            size = flow.size(i) // rows
            if b in g.inner:
                return base[0], base[1] + g.inner[b], size
            region, offset = self.place(i)
            return region, offset + r * size, size

        for r in range(rows):
            if g.streamed is not None:
                size = flow.size(g.streamed) // rows
                self.write(*at(g.streamed, r)[:2], self.camera[g.streamed][r * size : (r + 1) * size])
            for m, s in enumerate(steps):
                values = {}
                for i, kind in kinds[m].items():
                    if kind == "row":
                        region, offset, size = at(i, r)
                        values[i] = self._values(
                            i, self.memory[region][offset : offset + size].copy(), shape(i)
                        )
                    else:
                        values[i] = self._matching(s.unit, i, self.value(i), r, rows)

                def store(o, x, r=r):
                    raw = self._bytes(o, x)
                    if ("row", o) in g.inner:  # aside first, then over the operand
                        self.write(base[0], base[1] + g.inner["row", o], raw)
                    self.write(*at(o, r)[:2], raw)

                self.unit(s, policies[m], values, store, self._parts(s, r, rows))

    def _matching(self, unit, i, x, r, rows):
        """All of an operand, or of a product's right one the matrix of the batch that row r is in."""
        if unit.kind != "product" or i != unit.op.inputs[1]:
            return x
        (_, _), (lb, _) = unit.op.attrs["dimension_numbers"]
        many = int(np.prod(x.shape[: len(lb)], dtype=int))
        if not lb or many == 1:
            return x
        own = x.reshape(many, *x.shape[len(lb) :])[r * many // rows]
        return own.reshape(*([1] * len(lb)), *x.shape[len(lb) :])

    def _parts(self, step, r, rows):
        """Rows of weights that are as large as the result: a position's embedding, a bias for every row."""
        unit, found = step.unit, {}
        if unit.kind in ("lut", "softmax", "layer_norm") or not step.writes:
            return found
        whole = self.tensors[step.writes[0]]
        if unit.perm:
            w = next(i for i in unit.op.inputs[:2] if i in self.units.static)
            cut = matrix_of_row(self.units, unit, rows)
            where = {axis: r // d % s for axis, (d, s) in cut.items()}
            x = np.asarray(self.fixed(w))
            return {w: x[tuple(slice(where[d], where[d] + 1) if d in where else slice(None)
                               for d in range(x.ndim))]}  # fmt: skip
        wanted = (unit.bias,) if unit.kind == "product" else unit.op.inputs
        for i in wanted:
            if i is not None and i in self.units.static and self.tensors[i].size == whole.size > 1:
                flat = np.asarray(self.fixed(i)).reshape(rows, -1)[r]
                found[i] = flat.reshape(piece(whole.shape, rows))
        return found

    # Loops and branches

    def structured(self, op):
        start = self.flow.at[op.id, "enter"]
        n, _ = self.segment[start]
        d = op.dims
        if op.kind == "branch":
            chosen = int(np.clip(int(np.asarray(self.value(op.inputs[0]))), 0, len(d.branches) - 1))
            self.done(n)
            b = d.branches[chosen]
            for x, y in zip(op.inputs[1:], b.inputs, strict=True):
                if not self.flow.held(y):
                    self.static[y] = self.fixed(x)
            self._body(op, chosen, b)
            self._copy(op, chosen, list(zip(b.outputs, op.outputs, strict=True)))
            return self._left(op)
        rest = op.inputs[d.cond_consts :]
        for x, o in zip(rest[d.consts :], op.outputs[: d.carries], strict=False):
            self.store(o, self.value(x))
        self.done(n)
        for x, y in zip(rest[: d.consts], d.body.inputs, strict=False):
            if not self.flow.held(y):
                self.static[y] = self.fixed(x)
        if d.cond is not None:
            for x, y in zip(op.inputs[: d.cond_consts], d.cond.inputs, strict=False):
                if not self.flow.held(y):
                    self.static[y] = self.fixed(x)
            while True:
                self._body(op, 0, d.cond)
                again = bool(np.asarray(self.value(d.cond.outputs[0])))
                self._copy(op, 0, [])
                if not again:
                    break
                self._body(op, 1, d.body)
                self._copy(op, 1, list(zip(d.body.outputs, op.outputs, strict=True)))
            return self._left(op)
        stacked = list(zip(rest[d.consts + d.carries :], d.body.inputs[d.consts + d.carries :], strict=True))
        for s in reversed(range(d.trips)) if d.reverse else range(d.trips):
            for x, y in stacked:
                if self.flow.held(y):
                    self.slice[y] = s * self.flow.size(y)
                else:
                    self.static[y] = np.asarray(self.fixed(x))[s]
            self._body(op, 0, d.body)
            pairs = list(zip(d.body.outputs, op.outputs, strict=True))
            self._copy(op, 0, pairs[: d.carries], [(x, o, s) for x, o in pairs[d.carries :]])
        return self._left(op)

    def _body(self, op, number, block):
        first = self.flow.at[op.id, "enter" if number == 0 else number - 1] + 1
        self.block(block, first)

    def _copy(self, op, number, pairs, stacked=()):
        """What a body hands over: new carries over the old ones, slices into their arrays."""
        given = [(o, self.value(x)) for x, o in pairs]
        self.fill(*self.segment[self.flow.at[op.id, number]])
        rows = [(o, s, self._bytes_as(x, o)) for x, o, s in stacked]
        for o, v in given:
            self.store(o, v)
        for o, s, raw in rows:
            region, at = self.place(o)
            self.write(region, at + s * len(raw), raw)
        enter, _ = self.segment[self.flow.at[op.id, "enter"]]
        self.done(self.segment[self.flow.at[op.id, number]][0], enter)

    def _left(self, op):
        """The step after a loop or a branch, whose operands may be dead by now."""
        last = self.flow.at[op.id, len(op.blocks) - 1]
        self.done(self.segment[last][0])
        return last + 1

    def _bytes_as(self, x, o):
        """A body's result in the bytes of the array that it becomes a slice of."""
        value = self.value(x)
        t = self.tensors[o]
        if is_float(t.dtype):
            return self._coded(o, value)
        return np.ascontiguousarray(np.asarray(value).astype(numpy_dtype(t.dtype))).reshape(-1).view(np.uint8)
