"""A planned int8 network as C for a bare core: one arena, constants in flash, calls of the project's kernels.

`emit_c` walks the steps of the memory plan as `hw.mcu_run` does and writes a call where that runs a unit, so
the C does in the same bytes, in the same order, what the executor does. Loops become loops, or their bodies
one after another where every trip has weights of its own, branches become branches; the calls are
`hw.mcu_emit_units`'. What has no C is refused by name.
"""

import numpy as np

from hw.errors import UnsupportedPrimitive
from hw.mcu_c16 import source
from hw.mcu_emit_units import Calls
from hw.mcu_flow import by_rows, piece_shapes
from hw.mcu_int8 import Int8Policy
from hw.mcu_int16 import Int16Policy
from hw.mcu_run import _Machine
from hw.program import Program, is_float

CTYPES = {"bool": "uint8_t", **{f"{u}int{n}": f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32)}}

BEGIN = "static int32_t t_begin(int32_t i, int32_t most) { return i < 0 ? 0 : i > most ? most : i; }\n"


def emit_c(program: Program, target, args=()) -> dict[str, str]:
    """{file name: text} of the network: net.c with the arena and all constants, kernels.c, net.h.

    Args: target: an `Mcu` with a plan. args: the arguments of the program, of which only the weights are
        used; none are needed if all weights are constants.
    net.h declares `arena`, ARENA_BYTES, `void net(const int8_t *camera)` and, for every input and result, its
    offset in the arena: IN_0, OUT_0, ...; an input that is read a row of patches at a time comes from
    `camera` instead. Raises: UnsupportedPrimitive for a unit without C, ValueError without a plan.
    """
    if target.plan is None:
        raise ValueError("emit_c needs a target with a plan: calibrate(program, batches)")
    policy = (Int16Policy if target.activation_bits == 16 else Int8Policy)(program, target.plan)
    plan = target.memory(program)
    if len(target.regions) > 1:
        raise ValueError("emit_c puts the arena into one region")
    return _Emitter(plan, policy, args).files()


class _Emitter(Calls, _Machine):
    """The executor of a plan, writing calls."""

    def __init__(self, plan, policy, args):
        super().__init__(plan, policy, None)
        self.args, self.text, self.data, self.used, self.seen_names = args, [], [], set(), {}
        self.loops, self.begins, self.ctype = 0, False, f"{policy.name}_t"

    def files(self):
        program = self.plan.program
        if self.args:
            from hw.interpret import _arguments

            for i, v in zip(program.body.inputs, _arguments(program, tuple(self.args)), strict=True):
                if not self.flow.held(i):
                    self.static[i] = self.policy.enter(self.tensors[i], v)
        for i in program.body.inputs:
            if not self.flow.held(i) and i not in self.static:
                raise ValueError(f"emit_c needs args: {self.tensors[i].name} is a weight without values")
        self.block(program.body, 0)
        places = [(f"IN_{n}", self._offset(i)) for n, i in enumerate(program.body.inputs) if self._placed(i)]
        places += [
            (f"OUT_{n}", self._offset(o)) for n, o in enumerate(program.body.outputs) if self._placed(o)
        ]
        total = max(self.plan.total, 1)
        head = "#include <stdint.h>\n" + "".join(f"#define {k} {v}\n" for k, v in places)
        head += f"#define ARENA_BYTES {total}\nextern int8_t arena[ARENA_BYTES];\n"
        head += "void net(const int8_t *camera);\n"
        kernels = source(self.used)
        protos = "".join(t[: t.index(") {")] + ");\n" for t in _functions(kernels))
        body = "".join(f"  {line}\n" for line in self.text)
        net = (
            f'#include "net.h"\n{protos}int8_t arena[ARENA_BYTES] __attribute__((aligned(16)));\n'
            + BEGIN * self.begins
            + "".join(self.data)
            + f"void net(const int8_t *camera) {{\n  (void)camera;\n{body}}}\n"
        )
        return {"net.h": head, "net.c": net, "kernels.c": kernels}

    def _placed(self, i):
        return self.flow.held(i) and self.flow.buffer(i) in self.plan.owner

    def _offset(self, i):
        return self.plan.where(i)[1]

    def refuse(self, op, why):
        shape = self.tensors[op.outputs[0]].shape if op.outputs else ()
        raise UnsupportedPrimitive(op.prim, shape, op.scope, op.source, why)

    def constant(self, x, ctype):
        """The name of an array in flash."""
        x = np.ascontiguousarray(x).ravel()
        key = ctype, x.tobytes()
        if key not in self.seen_names:
            name = self.seen_names[key] = f"c{len(self.seen_names)}"
            self.data.append(
                f"static const {ctype} {name}[{max(x.size, 1)}] = {{{','.join(map(str, x.tolist()))}}};\n"
            )
        return self.seen_names[key]

    def pointer(self, i, at):
        """A tensor's values at so many bytes from the arena's beginning."""
        dtype = self.tensors[i].dtype
        ctype = self.ctype if is_float(dtype) else CTYPES[dtype]
        return f"arena + {at}" if ctype == "int8_t" else f"({ctype} *)(arena + {at})"

    def at(self, i):
        """Where a tensor begins: in a loop its slice of this trip."""
        extra = ""
        while i in self.flow.alias:
            extra += self.slice.get(i, "")
            i = self.flow.alias[i]
        return f"{self._offset(i)}{extra}"

    # The walk of the executor, in C

    def leaf(self, n, g):
        if g.rows == 1 and not g.inner:
            step = self.flow.steps[g.first]
            ids = (*step.reads, *step.writes)
            where = {i: self.pointer(i, self.at(i)) for i in ids}
            self.call(step, where, {i: self.tensors[i].shape for i in ids}, 1)
            return
        flow, rows = self.flow, g.rows
        steps = flow.steps[g.first : g.last + 1]
        base = self.scratch.get(n, ("", 0))[1]
        kinds = [by_rows(self.units, s.unit, rows) for s in steps]
        self.text.append(f"for (int32_t r = 0; r < {rows}; r++) {{")

        def at(i):
            b, size = flow.buffer(i), flow.size(i) // rows
            return str(base + g.inner[b]) if b in g.inner else f"{self.at(i)} + r * {size}"

        if g.streamed is not None:
            size = flow.size(g.streamed) // rows
            self.line("copy_s8", f"camera + r * {size}", f"arena + {at(g.streamed)}", size)
        for s, kind in zip(steps, kinds, strict=True):
            shapes = piece_shapes(self.units, s.unit, rows)
            where = {}
            for i in (*s.reads, *s.writes):
                row = kind.get(i, "row") == "row"
                where[i] = self.pointer(i, at(i) if row else self._matched(s.unit, i, rows))
            out = s.writes[0]
            aside = ("row", out) in g.inner
            final = at(out)
            if aside:
                where[out] = self.pointer(out, base + g.inner["row", out])
            self.call(s, where, shapes, rows)
            if aside:
                place = f"arena + {base + g.inner['row', out]}"
                self.line("copy_s8", place, f"arena + {final}", flow.size(out) // rows)
        self.text.append("}")

    def _matched(self, unit, i, rows):
        """Where a whole operand begins; of a product's right one, the matrix of the batch of row r."""
        here = self.at(i)
        if unit.kind == "product" and i == unit.op.inputs[1]:
            batch = len(unit.op.attrs["dimension_numbers"][1][0])
            many = int(np.prod(self.tensors[i].shape[:batch], dtype=int))
            if many > 1:
                return f"{here} + r / {rows // many} * {self.flow.size(i) // many}"
        return here

    # Loops and branches

    def structured(self, op):
        if op.kind == "branch":
            return self._branch(op)
        d, fixed = op.dims, self._fix
        rest = op.inputs[d.cond_consts :]
        for x, o in zip(rest[d.consts :], op.outputs[: d.carries], strict=False):
            self._copy_in(op, x, o)
        for x, y in zip(rest[: d.consts], d.body.inputs, strict=False):
            fixed(x, y)
        self.loops += 1
        if d.cond is not None:
            for x, y in zip(op.inputs[: d.cond_consts], d.cond.inputs, strict=False):
                fixed(x, y)
            self.text.append("for (;;) {")
            self._body(op, 0, d.cond)
            again = d.cond.outputs[0]
            if not self.flow.held(again):
                self.refuse(op, "emit_c has no loop without an end")
            self.text.append(f"if (!*({self.pointer(again, self.at(again))})) break;")
            self._body(op, 1, d.body)
            self._hand_over(op, 1, list(zip(d.body.outputs, op.outputs, strict=True)))
            self.text.append("}")
            return self.flow.at[op.id, len(op.blocks) - 1] + 1
        stacked = list(zip(rest[d.consts + d.carries :], d.body.inputs[d.consts + d.carries :], strict=True))
        own = any(not self.flow.held(y) for _, y in stacked)
        if own:  # every trip has weights of its own: one body after another
            for s in reversed(range(d.trips)) if d.reverse else range(d.trips):
                self._trip(op, stacked, s)
        elif d.trips:
            var = f"s{self.loops}"
            self.text.append(f"for (int32_t {var} = 0; {var} < {d.trips}; {var}++) {{")
            self._trip(op, stacked, f"({d.trips - 1} - {var})" if d.reverse else var)
            self.text.append("}")
        return self.flow.at[op.id, len(op.blocks) - 1] + 1

    def _branch(self, op):
        which, last = op.inputs[0], len(op.dims.branches) - 1
        if not self.flow.held(which):
            self.refuse(op, "emit_c branches by what is found when it runs")
        chosen = f"*({self.pointer(which, self.at(which))})"
        for n, b in enumerate(op.dims.branches):
            edge = "<=" if n == 0 else "=="
            ask = f"if ({chosen} {edge} {n}) " if n < last else ""
            self.text.append(f"{'else ' if n else ''}{ask}{{")
            for x, y in zip(op.inputs[1:], b.inputs, strict=True):
                self._fix(x, y)
            self._body(op, n, b)
            self._hand_over(op, n, list(zip(b.outputs, op.outputs, strict=True)))
            self.text.append("}")
        return self.flow.at[op.id, last] + 1

    def _fix(self, x, y):
        if not self.flow.held(y):
            self.static[y] = self.fixed(x)

    def _trip(self, op, stacked, s):
        d = op.dims
        for x, y in stacked:
            if self.flow.held(y):
                self.slice[y] = f" + {s} * {self.flow.size(y)}"
            else:
                self.static[y] = np.asarray(self.fixed(x))[s]
        self._body(op, 0, d.body)
        pairs = list(zip(d.body.outputs, op.outputs, strict=True))
        self._hand_over(op, 0, pairs[: d.carries], pairs[d.carries :], s)

    def _copy_in(self, op, x, o):
        """A loop's first carried value; a constant as the codes of the value it becomes."""
        size, to = self.flow.size(o), self.at(o)
        if self.flow.held(x):
            if self.at(x) != to:
                self.line("copy_s8", f"arena + {self.at(x)}", f"arena + {to}", size)
            return
        raw = self._bytes(o, self.fixed(x)).view(np.int8)
        if raw.size and (raw == raw[0]).all():  # byte by byte, whatever the type
            self.line("fill_s8", f"arena + {to}", size, raw[0])
        else:
            self.line("copy_s8", self.constant(raw, "int8_t"), f"arena + {to}", size)

    def _hand_over(self, op, number, pairs, stacked=(), s=0):
        """New carries over the old ones, by way of the scratch where they are old ones themselves."""
        own, late = set(op.outputs), []
        n, _ = self.segment[self.flow.at[op.id, number]]
        aside = self.scratch.get(n, ("", 0))[1]
        for x, o in pairs:
            size = self.flow.size(o)
            if not self.flow.held(x):
                late.append((x, o, None))
            elif self.flow.buffer(x) in own and self.flow.buffer(x) != self.flow.buffer(o):
                self.line("copy_s8", f"arena + {self.at(x)}", f"arena + {aside}", size)
                late.append((x, o, aside))
                aside += size
            elif self.at(x) != self.at(o):
                late.append((x, o, self.at(x)))
        for x, o in stacked:
            to = f"arena + {self.at(o)} + {s} * {self.flow.size(x)}"
            if self.flow.held(x):
                self.line("copy_s8", f"arena + {self.at(x)}", to, self.flow.size(x))
            else:
                raw = self._bytes_as(x, o).view(np.int8)
                self.line("copy_s8", self.constant(raw, "int8_t"), to, raw.size)
        for x, o, at in late:
            if at is None:
                self._copy_in(op, x, o)
            else:
                self.line("copy_s8", f"arena + {at}", f"arena + {self.at(o)}", self.flow.size(o))

    def line(self, kernel, *args):
        """A call; a kernel without its type is that of the activations."""
        if not kernel.endswith("_s8"):
            kernel = f"{kernel}_s{self.policy.bits}"
        self.used.add(kernel)
        self.text.append(f"t_{kernel}({', '.join(str(a) for a in args)});")


def _functions(text):
    """The public functions of a C text."""
    parts = text.split("\nvoid ")[1:]
    return ["void " + p for p in parts if ") {" in p]


def stored_bytes(files) -> int:
    """Bytes of the constants of an emitted network, as the compiler lays them out."""
    sizes = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "int32_t": 4, "int64_t": 8}
    total = 0
    for line in files["net.c"].splitlines():
        if line.startswith("static const"):
            ctype, name = line.split()[2:4]
            total += sizes[ctype] * int(name[name.index("[") + 1 : name.index("]")])
    return total


__all__ = ["emit_c", "stored_bytes"]
