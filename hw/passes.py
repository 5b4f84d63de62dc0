"""Passes over a traced block: dead code away, trip counts found, executions counted.

Trip counts come from values that are known without running: constants and what scalars compute from them. In
a kernel the grid indices are known too, as vectors over all grid steps, so that a branch or a loop bound that
depends on them is counted exactly without walking the grid in Python.
"""

from dataclasses import replace
from math import prod

import numpy as np

from hw.interpret import call_block, evaluate
from hw.primitives import DMA, REFERENCE
from hw.program import Block, Branch, Loop

SMALL = 64  # elements of a value that is worth knowing
LARGEST = 1 << 24  # grid steps over which a scalar of a kernel body is worked out
SIMULATED = 100_000  # trips of a loop of scalars that may be run to count them

_EFFECTS = REFERENCE | DMA


def prune(block: Block, wanted=None) -> Block:
    """The block without ops that reach no wanted output; inputs stay, outputs become the wanted ones."""
    outputs = block.outputs if wanted is None else tuple(wanted)
    live, kept = set(outputs), []
    for op in reversed(block.ops):
        if op.prim in _EFFECTS or not live.isdisjoint(op.outputs) or _writes(op):
            op = _prune_op(op, live)
            live.update(op.inputs)
            kept.append(op)
    return Block(block.inputs, tuple(reversed(kept)), outputs)


def _writes(op):
    return op.kind != "kernel" and any(
        inner.prim in _EFFECTS or _writes(inner) for b in op.blocks for inner in b.ops
    )


def used_inputs(block: Block) -> set[int]:
    """Inputs of a block that its ops or outputs use."""
    used = set(block.outputs)
    for op in block.ops:
        used.update(op.inputs)
    return used & set(block.inputs)


def _prune_op(op, live):
    if op.kind == "loop":
        return _prune_loop(op, live)
    if op.kind == "branch":
        keep = [n for n, o in enumerate(op.outputs) if o in live]
        branches = [prune(b, [b.outputs[n] for n in keep]) for b in op.dims.branches]
        used = [used_inputs(b) for b in branches]
        args = [
            n
            for n in range(len(op.inputs) - 1)
            if any(b.inputs[n] in u for b, u in zip(branches, used, strict=True))
        ]
        branches = tuple(replace(b, inputs=tuple(b.inputs[n] for n in args)) for b in branches)
        return replace(
            op,
            inputs=(op.inputs[0], *(op.inputs[1 + n] for n in args)),
            outputs=tuple(op.outputs[n] for n in keep),
            dims=Branch(branches),
        )
    if op.kind == "shard":
        return replace(op, dims=replace(op.dims, body=prune(op.dims.body)))
    return op


def _prune_loop(op, live):
    """Keep the carries that a wanted output, the condition or a kept carry needs."""
    d = op.dims
    c, n = d.consts, d.carries
    body_in, body_out = d.body.inputs, d.body.outputs
    cond = prune(d.cond) if d.cond else None
    keep = {i for i in range(n) if op.outputs[i] in live}
    if cond:
        keep |= {i for i in range(n) if cond.inputs[d.cond_consts + i] in used_inputs(cond)}
    ys = [i for i in range(n, len(body_out)) if op.outputs[i] in live]
    while True:
        body = prune(d.body, [body_out[i] for i in (*sorted(keep), *ys)])
        used = used_inputs(body)
        more = {i for i in range(n) if body_in[c + i] in used} - keep
        if not more:
            break
        keep |= more
    keep = sorted(keep)
    consts = [i for i in range(c) if body_in[i] in used]
    xs = [i for i in range(d.xs) if body_in[c + n + i] in used]
    cc = [i for i in range(d.cond_consts) if cond.inputs[i] in used_inputs(cond)] if cond else []
    base = d.cond_consts
    inputs = (
        *(op.inputs[i] for i in cc),
        *(op.inputs[base + i] for i in consts),
        *(op.inputs[base + c + i] for i in keep),
        *(op.inputs[base + c + n + i] for i in xs),
    )
    body = replace(
        body,
        inputs=(
            *(body_in[i] for i in consts),
            *(body_in[c + i] for i in keep),
            *(body_in[c + n + i] for i in xs),
        ),
    )
    if cond:
        cond = replace(
            cond, inputs=(*(cond.inputs[i] for i in cc), *(cond.inputs[d.cond_consts + i] for i in keep))
        )
    dims = replace(
        d, body=body, cond=cond, consts=len(consts), carries=len(keep), xs=len(xs), cond_consts=len(cc)
    )
    return replace(op, inputs=inputs, outputs=tuple(op.outputs[i] for i in (*keep, *ys)), dims=dims)


def resolve(tensors, block: Block, known, weight, *, grid=None, trip_counts=None, scalars=None) -> Block:
    """The block with `trips` on every op and trip counts of while loops, as far as they are known.

    Args: known: {tensor id: value}, extended on the way. weight: executions of the block: a number, in a
      kernel an array that broadcasts to `grid`, or None if not known. trip_counts: {loop name: trips}, given.
      scalars: {id of a kernel's reference: the prefetched array it holds}.
    """
    known = dict(known)
    for i, t in tensors.items():
        if t.role == "const" and t.size <= SMALL and i not in known:
            known[i] = t.array
    return _Resolver(tensors, grid, trip_counts or {}, scalars or {}).block(block, known, weight)


class _Resolver:
    def __init__(self, tensors, grid, trip_counts, scalars):
        self.tensors, self.grid, self.given = tensors, grid, trip_counts
        self.scalars = dict(scalars)

    def total(self, weight):
        """Executions over all grid steps."""
        if weight is None:
            return None
        if self.grid is None:
            return weight
        weight = np.asarray(weight)
        return int(weight.sum()) * (prod(self.grid) // max(weight.size, 1))

    def block(self, block, known, weight):
        ops = tuple(self.op(op, known, weight) for op in block.ops)
        return replace(block, ops=ops)

    def op(self, op, known, weight):
        trips = self.total(weight)
        if op.kind == "loop":
            return self.loop(op, known, weight)
        if op.kind == "branch":
            return self.branch(op, known, weight)
        if op.kind == "shard":
            inside = self.block(op.dims.body, known, weight)
            return replace(op, trips=trips, dims=replace(op.dims, body=inside))
        if op.kind != "kernel":
            self.learn(op, known)
        return replace(op, trips=trips)

    def learn(self, op, known):
        """Compute an op whose operands are all known, if it is small (in a kernel: scalar)."""
        if op.prim == "program_id" and self.grid is not None:
            axis, n = op.attrs["axis"], len(self.grid)
            line = np.arange(self.grid[axis], dtype=np.int32)
            known[op.outputs[0]] = line.reshape([-1 if d == axis else 1 for d in range(n)])
        elif op.prim == "num_programs" and self.grid is not None:
            known[op.outputs[0]] = np.int32(self.grid[op.attrs["axis"]])
        elif op.prim == "get" and op.inputs[0] in self.scalars and all(i in known for i in op.inputs[1:]):
            value = self.prefetched(op, known)
            if value is not None:
                known[op.outputs[0]] = value
        elif all(i in known for i in op.inputs) and all(self.tensors[o].size <= SMALL for o in op.outputs):
            shapes = [self.tensors[i].shape for i in (*op.inputs, *op.outputs)]
            if self.grid is not None and (op.kind != "elementwise" or any(shapes)):
                return
            if op.kind in ("random", "collective", "gather", "scatter") or op.prim in REFERENCE | DMA:
                return
            sizes = np.broadcast_shapes(*(np.shape(known[i]) for i in op.inputs)) if self.grid else ()
            if prod(sizes) > LARGEST:
                return
            with np.errstate(all="ignore"):
                values = evaluate(op, [known[i] for i in op.inputs], self.tensors)
            known.update(zip(op.outputs, values, strict=True))

    def prefetched(self, op, known):
        """A scalar of a prefetched array, at every grid step."""
        index = op.attrs["index"]
        if index is None or any(part[0] != "at" for part in index):
            return None
        at = [known[op.inputs[i[1]]] if isinstance(i, tuple) else i for _, i in index]
        array = self.scalars[op.inputs[0]]
        return array[tuple(np.clip(i, 0, n - 1) for i, n in zip(at, array.shape, strict=True))]

    def branch(self, op, known, weight):
        pred = known.get(op.inputs[0])
        resolved = pred is not None and weight is not None
        branches = []
        for n, b in enumerate(op.dims.branches):
            passed = list(zip(b.inputs, op.inputs[1:], strict=True))
            inside = known | {i: known[o] for i, o in passed if o in known}
            self.scalars |= {i: self.scalars[o] for i, o in passed if o in self.scalars}
            w = weight
            if resolved:
                chosen = np.clip(np.asarray(pred, np.int64), 0, len(op.dims.branches) - 1)
                w = weight * (chosen == n)
                w = w if self.grid is not None else int(w)
            branches.append(self.block(b, inside, w))
        attrs = op.attrs | ({"resolved": True} if resolved and self.grid is not None else {})
        return replace(op, trips=self.total(weight), dims=Branch(tuple(branches)), attrs=attrs)

    def loop(self, op, known, weight):
        d = op.dims
        base, c, n = d.cond_consts, d.consts, d.carries
        outer = op.inputs[base:]
        inside = {d.body.inputs[i]: known[outer[i]] for i in range(c) if outer[i] in known}
        self.scalars |= {
            d.body.inputs[i]: self.scalars[outer[i]] for i in range(c) if outer[i] in self.scalars
        }
        for i in range(n):  # carries that never change
            if d.body.outputs[i] == d.body.inputs[c + i] and outer[c + i] in known:
                inside[d.body.inputs[c + i]] = known[outer[c + i]]
        trips = d.trips
        if d.cond is not None:
            trips = self.given[d.name] if d.name in self.given else self.while_trips(op, known)
        inner = None if trips is None or weight is None else weight * trips
        body = self.block(d.body, known | inside, inner)
        cond = d.cond
        if cond is not None:
            cond = self.block(cond, known, None if inner is None else inner + weight)
        if trips is not None and self.grid is not None:
            whole, runs = self.total(inner), self.total(weight)
            trips = None if whole is None else whole / runs if runs else 0
            trips = int(trips) if trips is not None and trips == int(trips) else trips
        elif trips is not None:
            trips = int(trips)
        return replace(op, trips=self.total(weight), dims=replace(d, trips=trips, body=body, cond=cond))

    def while_trips(self, op, known):
        """Trips of `carry <op> bound` with a constant step; else by running the scalars of the condition."""
        found = self.counted(op, known)
        if found is None and self.grid is None:
            found = self.simulated(op, known)
        return found

    def counted(self, op, known):
        d = op.dims
        base, c = d.cond_consts, d.consts
        cond = d.cond
        test = next((x for x in cond.ops if cond.outputs[0] in x.outputs), None)
        if test is None or test.prim not in ("lt", "le", "gt", "ge", "ne"):
            return None
        invariant = {i for i in range(d.carries) if d.body.outputs[i] == d.body.inputs[c + i]}
        place = {t: i for i, t in enumerate(cond.inputs)}

        def value(t):
            """A number that the condition compares with: constant, or handed in and never changed."""
            if t in place:
                i = place[t]
                if i >= base and i - base not in invariant:
                    return None
                return known.get(op.inputs[i] if i < base else op.inputs[c + i])
            return known.get(t)

        a, b = test.inputs
        for carried, bound, prim in ((a, b, test.prim), (b, a, _MIRROR[test.prim])):
            limit = value(bound)
            i = place.get(carried, -1) - base
            if limit is None or i < 0 or i in invariant or self.tensors[carried].shape:
                continue
            start = known.get(op.inputs[base + c + i])
            step = self.step(d, i, known, op)
            if start is None or step is None:
                continue
            return _trips(prim, np.asarray(start, np.float64), np.asarray(limit, np.float64), step)
        return None

    def step(self, d, i, known, op):
        """The constant that carry i grows by each trip."""
        out, source = d.body.outputs[i], d.body.inputs[d.consts + i]
        made = next((x for x in d.body.ops if out in x.outputs), None)
        if made is None or made.prim not in ("add", "sub"):
            return None
        inner = {d.body.inputs[j]: known.get(op.inputs[d.cond_consts + j]) for j in range(d.consts)}
        number = lambda t: inner[t] if t in inner else known.get(t)
        a, b = made.inputs
        if a == source and (s := number(b)) is not None and np.ndim(s) == 0:
            return float(s) if made.prim == "add" else -float(s)
        if b == source and made.prim == "add" and (s := number(a)) is not None and np.ndim(s) == 0:
            return float(s)
        return None

    def simulated(self, op, known):
        """Run only what the condition depends on, if all of it is small and known at the start."""
        small = _condition_only(op)
        d = small.dims
        args = [known.get(i) for i in small.inputs]
        if any(a is None for a in args) or any(
            x.blocks or any(self.tensors[o].size > SMALL for o in x.outputs) for b in d.blocks for x in b.ops
        ):
            return None
        cc, consts, carry = (
            args[: d.cond_consts],
            args[d.cond_consts : d.cond_consts + d.consts],
            args[d.cond_consts + d.consts :],
        )
        for n in range(SIMULATED):
            if not call_block(self.tensors, d.cond, [*cc, *carry])[0]:
                return n
            carry = call_block(self.tensors, d.body, [*consts, *carry])
        return None


_MIRROR = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "ne": "ne"}


def _condition_only(op):
    """A while loop without the carries that its condition does not need."""
    return _prune_loop(op, set())


def _trips(prim, start, limit, step):
    """First n >= 0 for which start + n step no longer satisfies the comparison; None if there is none."""
    if prim in ("gt", "ge"):
        start, limit, step = -start, -limit, -step
    gap = limit - start
    if prim == "ne":
        n = gap / step if step else np.full_like(gap, -1.0)
        if np.any((n < 0) | (n != np.floor(n))):
            return None
    else:
        if step <= 0:
            return None if np.any(gap >= 0 if prim in ("le", "ge") else gap > 0) else np.zeros_like(gap)
        n = np.ceil(gap / step) if prim in ("lt", "gt") else np.floor(gap / step) + 1
        n = np.maximum(n, 0)
    n = n.astype(np.int64)
    return int(n) if n.ndim == 0 else n


def finish(tensors, body: Block):
    """Producers, consumers and roles of tensors as the ops say; tensors that nobody names are dropped."""
    producer, consumers, alias, named = {}, {}, {}, set(body.inputs) | set(body.outputs)

    def visit(block):
        named.update(block.inputs, block.outputs)
        for op in block.ops:
            named.update(op.inputs, op.outputs)
            for o in op.outputs:
                producer[o] = op.id
            for i in dict.fromkeys(op.inputs):
                consumers.setdefault(i, []).append(op.id)
            for inner in op.blocks:
                visit(inner)
            for o in getattr(op.dims, "operands", ()):
                if o.index_map is not None:
                    visit(o.index_map)
            if isinstance(op.dims, Loop):
                d = op.dims
                outer = op.inputs[d.cond_consts :]
                steady = [*range(d.consts), *range(d.consts + d.carries, len(d.body.inputs))]
                alias.update({d.body.inputs[i]: outer[i] for i in steady})
            elif isinstance(op.dims, Branch):
                for b in op.dims.branches:
                    alias.update(zip(b.inputs, op.inputs[1:], strict=True))

    visit(body)
    out = {}
    outputs = set(body.outputs)
    for i, t in tensors.items():
        if i not in named:
            continue
        role = t.role
        if role == "activation" and i in outputs:
            role = "output"
        source = i
        while source in alias:
            source = alias[source]
        if source != i and tensors[source].role == "weight":
            role = "weight"
        out[i] = replace(t, role=role, producer=producer.get(i), consumers=tuple(consumers.get(i, ())))
    return out
