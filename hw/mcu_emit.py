"""A planned int8 network as C for a bare core: one arena, constants in flash, calls of the project's kernels.

`emit_c` walks the steps of the memory plan as `hw.mcu_run` does and writes a call where that runs a unit, so
the C does in the same bytes, in the same order, what the executor does. Straight programs of these units:
tables, softmax, layer norm, products, sums, differences, products and quotients of two tensors, sums and
maxima over an axis, concatenation, and whatever only moves. Everything else is refused by name.
"""

from math import prod

import numpy as np

from hw import numerics
from hw.errors import UnsupportedPrimitive
from hw.mcu_c import source
from hw.mcu_calibrate import SOFTMAX, row
from hw.mcu_flow import by_rows, nbytes, piece
from hw.mcu_int8 import Int8Policy, add_multipliers, multiplier
from hw.mcu_run import _Machine
from hw.program import Program, is_float
from ref.blocks import int8_ops

OWN = r"""
void t_product_kn_s8(const int8_t *x, const int8_t *w, int8_t *y, int32_t M, int32_t K, int32_t N, int32_t xz,
                     int32_t wz, int32_t mul, int32_t sh, int32_t out) {
  /* as t_product_s8 with the right operand as it is stored, [K, N] */
  for (int32_t m = 0; m < M; m++)
    for (int32_t n = 0; n < N; n++) {
      const int8_t *p = x + m * K, *q = w + n;
      int32_t acc = 0;
      for (int32_t k = 0; k < K; k++, q += N) acc += (p[k] - xz) * (*q - wz);
      y[m * N + n] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
    }
}
void t_sum_down_s8(const int8_t *x, int8_t *y, int32_t n, int32_t rows, int32_t in, int32_t mul, int32_t sh,
                   int32_t out) {
  for (int32_t i = 0; i < n; i++) {
    int32_t acc = 0;
    for (int32_t r = 0; r < rows; r++) acc += x[r * n + i] + in;
    y[i] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
  }
}
"""
_WEIGHT = ("int8_t", "int32_t", "int32_t")
_MOVES = frozenset(
    "transpose rev slice broadcast_in_dim reshape copy squeeze expand_dims reduce_precision".split()
)


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
    policy = Int8Policy(program, target.plan)
    plan = target.memory(program)
    if len(target.regions) > 1:
        raise ValueError("emit_c puts the arena into one region")
    return _Emitter(plan, policy, args).files()


class _Emitter(_Machine):
    """The executor of a plan, writing calls."""

    def __init__(self, plan, policy, args):
        super().__init__(plan, policy, None)
        self.args, self.text, self.data, self.used, self.seen_names = args, [], [], set(), {}

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
        kernels = source(self.used) + OWN
        protos = "".join(t[: t.index(") {")] + ");\n" for t in _functions(kernels))
        body = "".join(f"  {line}\n" for line in self.text)
        net = (
            f'#include "net.h"\n{protos}int8_t arena[ARENA_BYTES] __attribute__((aligned(16)));\n'
            + "".join(self.data)
            + f"void net(const int8_t *camera) {{\n  (void)camera;\n{body}}}\n"
        )
        return {"net.h": head, "net.c": net, "kernels.c": kernels}

    def _placed(self, i):
        return self.flow.held(i) and self.flow.buffer(i) in self.plan.owner

    def _offset(self, i):
        return self.place(i)[1]

    def refuse(self, op, why):
        shape = self.tensors[op.outputs[0]].shape if op.outputs else ()
        raise UnsupportedPrimitive(op.prim, shape, op.scope, op.source, why)

    def structured(self, op):
        self.refuse(op, "emit_c writes straight programs: no loops or branches")

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

    # The walk of the executor, in C

    def leaf(self, n, g):
        if g.rows == 1 and not g.inner:
            step = self.flow.steps[g.first]
            where = {i: f"arena + {self.place(i)[1]}" for i in (*step.reads, *step.writes)}
            shapes = {i: self.tensors[i].shape for i in where}
            self.call(step, where, shapes, 1)
            return
        flow, rows = self.flow, g.rows
        steps = flow.steps[g.first : g.last + 1]
        base = self.scratch.get(n, ("", 0))[1]
        kinds = [by_rows(self.units, s.unit, rows) for s in steps]
        self.text.append(f"for (int32_t r = 0; r < {rows}; r++) {{")

        def at(i):
            b, size = flow.buffer(i), flow.size(i) // rows
            if b in g.inner:
                return f"arena + {base + g.inner[b]}"
            return f"arena + {self.place(i)[1]} + r * {size}"

        if g.streamed is not None:
            size = flow.size(g.streamed) // rows
            self.used.add("copy_s8")
            self.text.append(f"  t_copy_s8(camera + r * {size}, {at(g.streamed)}, {size});")
        for s, kind in zip(steps, kinds, strict=True):
            where, shapes = {}, {}
            for i in (*s.reads, *s.writes):
                if kind.get(i, "row") == "row":
                    where[i], shapes[i] = at(i), piece(self.tensors[i].shape, rows)
                else:
                    where[i], shapes[i] = self._matched(s.unit, i, rows)
            out = s.writes[0]
            aside = ("row", out) in g.inner
            final = where[out]
            if aside:
                where[out] = f"arena + {base + g.inner['row', out]}"
            self.call(s, where, shapes, rows)
            if aside:
                self.used.add("copy_s8")
                self.text.append(f"  t_copy_s8({where[out]}, {final}, {flow.size(out) // rows});")
        self.text.append("}")

    def _matched(self, unit, i, rows):
        """A whole operand; of a product's right one, the matrix of the batch of row r."""
        shape, here = self.tensors[i].shape, f"arena + {self.place(i)[1]}"
        if unit.kind == "product" and i == unit.op.inputs[1]:
            batch = len(unit.op.attrs["dimension_numbers"][1][0])
            many = prod(shape[:batch])
            if many > 1:
                size = prod(shape[batch:])
                return f"{here} + r / {rows // many} * {size}", (*[1] * batch, *shape[batch:])
        return here, shape

    def line(self, kernel, *args):
        if kernel not in ("product_kn_s8", "sum_down_s8"):
            self.used.add(kernel)
        self.text.append(f"t_{kernel}({', '.join(str(a) for a in args)});")

    def call(self, step, where, shapes, rows):
        """The kernels of one unit on operands at `where`, of these shapes."""
        unit, op, p = step.unit, step.unit.op, self.policy
        for i in (*step.reads, *step.writes):
            if not is_float(self.tensors[i].dtype):
                self.refuse(op, f"emit_c has int8 values only, not {self.tensors[i].dtype}")
        needed = {*self.units.reads(unit), *op.inputs, *(i for x in unit.chain for i in x.inputs)}
        p.env = {i: self.fixed(i) for i in needed if i in self.units.static and self._known(i)}
        out = step.writes[0]
        n = prod(shapes[out])
        last = shapes[out][-1] if shapes[out] else 1
        name = unit.kind if unit.kind in ("lut", "softmax", "layer_norm", "product") else op.prim
        if unit.kind == "lut":
            self.line("lut_s8", where[unit.source], self.constant(p.table(unit), "int8_t"), where[out], n)
        elif unit.kind == "softmax":
            m, shift, least = int8_ops.softmax_params_s8(input_scale=p.grid(unit.source)[0])
            self.line("softmax_s8", where[unit.source], where[out], n // last, last, m, shift, least)
            if p.grid(out) != SOFTMAX:
                self._rescale(where[out], where[out], n, *SOFTMAX, *p.grid(out))
        elif unit.kind == "layer_norm" and unit.center:
            scale, zero = p.grid(out)
            gamma, beta = row(p.env, unit.gamma, last, 1.0), row(p.env, unit.beta, last, 0.0)
            g, b, m, shift = int8_ops.norm_params_s8(gamma, beta, scale)
            g, b = self.constant(g, "int16_t"), self.constant(b, "int32_t")
            offset = -p.grid(unit.source)[1]
            self.line(
                "layernorm_s8", where[unit.source], g, b, where[out], n // last, last, offset, m, shift, zero
            )
        elif unit.kind == "product":
            self._product(unit, where, shapes, out)
        elif op.prim in ("add", "add_any", "sub", "mul", "div"):
            self._two(op, where, out, n, rows)
        elif op.prim in ("reduce_sum", "reduce_max"):
            self._reduce(op, where, shapes, out)
        elif op.prim == "concatenate":
            self._join(op, where, shapes, out)
        elif op.prim in _MOVES:
            self._move(op, where, shapes, out)
        else:
            self.refuse(op, f"emit_c has no C for {name!r}")

    def _rescale(self, x, y, n, scale, zero, out_scale, out_zero):
        m, shift = (int(v) for v in multiplier(scale / out_scale))
        self.line("rescale_s8", x, y, n, -zero, m, shift, out_zero)

    def _product(self, unit, where, shapes, out):
        op, p = unit.op, self.policy
        a, b = op.inputs[:2]
        (lc, rc), (lb, rb) = op.attrs["dimension_numbers"]
        rank, right = len(shapes.get(a, self.tensors[a].shape)), len(self.tensors[b].shape)
        free = [i for i in range(rank) if i not in (*lb, *lc)]
        if a in self.units.static or [*lb, *free, *lc] != list(range(rank)):
            self.refuse(op, "emit_c needs the left operand of a product as rows, the sum along its last axes")
        m, k = prod(shapes[a][i] for i in free), prod(shapes[a][i] for i in lc)
        batch = prod(shapes[a][i] for i in lb)
        (sx, zx), (so, zo) = p.grid(a), p.grid(out)
        if b in self.units.static:
            if lb:
                self.refuse(op, "emit_c has no weights for each batch")
            w = np.asarray(self.fixed(b), np.float64)
            w = w.transpose([i for i in range(right) if i not in rc] + list(rc)).reshape(-1, k)
            codes, scale = p.factor(b, w.T[None], (2,))
            codes, scale = codes[0].T.astype(np.int64), np.broadcast_to(scale.ravel(), (len(w),))
            real = sx * scale
            mul, shift = multiplier(real / so)
            bias = 0
            if unit.bias is not None:
                flat = np.asarray(p.env[unit.bias], np.float64)
                flat = np.broadcast_to(flat, self.tensors[out].shape).reshape(-1, len(w))[-1]
                bias = self.constant(
                    np.clip(np.rint(flat / real), -(2**30), 2**30).astype(np.int64), "int32_t"
                )
            if ((np.abs(codes).sum(1) * 255.0) * 2.0 ** np.maximum(shift, 0) >= 2**31).any():
                self.refuse(op, "a multiplier above 1 could leave 32 bits")
            w, mul, shift = (self.constant(v, t) for v, t in zip((codes, mul, shift), _WEIGHT, strict=True))
            self.line(
                "matmul_s8", where[a], w, bias, mul, shift, where[out], m, k, len(scale), -zx, zo, -128, 127
            )
            return
        wide = [i for i in range(right) if i not in (*rb, *rc)]
        order = [*rb, *wide, *rc]
        turned = [*rb, *rc, *wide]
        if order != list(range(right)) and turned != list(range(right)):
            self.refuse(op, "emit_c needs the right operand of a product as rows or as columns")
        kernel = "product_s8" if order == list(range(right)) else "product_kn_s8"
        sw, zw = p.grid(b)
        n = prod(shapes[b][i] for i in wide)
        mul, shift = (int(v) for v in multiplier(sx * sw / so))
        if k * 255.0**2 * 2.0 ** max(shift, 0) >= 2**31:
            self.refuse(op, "a multiplier above 1 could leave 32 bits")
        if batch > 1:
            self.text.append(f"for (int32_t h = 0; h < {batch}; h++)")
        step = lambda size: f" + h * {size}" if batch > 1 else ""
        x, w, y = where[a] + step(m * k), where[b] + step(n * k), where[out] + step(m * n)
        self.line(kernel, x, w, y, m, k, n, zx, zw, mul, shift, zo)

    def _two(self, op, where, out, n, rows):
        p = self.policy
        so, zo = p.grid(out)
        parts = []
        for i in op.inputs:
            if i in self.units.static:
                whole = np.broadcast_to(np.asarray(self.fixed(i), np.float64), self.tensors[out].shape)
                codes, scale, zero = p.operand(i, whole, out)
                at = self.constant(codes, "int8_t") + (f" + r * {n}" if rows > 1 else "")
                parts.append((at, scale, zero))
            elif self.tensors[i].shape != self.tensors[out].shape:
                self.refuse(op, "emit_c broadcasts nothing inside an operation")
            else:
                parts.append((where[i], *p.grid(i)))
        (a, sa, za), (b, sb, zb) = parts
        if op.prim == "mul":
            m, s = (int(v) for v in multiplier(sa * sb / so))
            self.line("mul_s8", a, b, where[out], n, -za, -zb, m, s, zo)
        elif op.prim == "div":
            m, s = (int(v) for v in multiplier(sa / (2**16 * sb * so)))
            self.line("divide_s8", a, b, where[out], n, za, zb, m, s, zo)
        else:
            m1, s1, m2, s2, mo, eo = add_multipliers(sa, -sb if op.prim == "sub" else sb, so)
            self.line("add_s8", a, b, where[out], n, -za, m1, s1, -zb, m2, s2, 20, zo, mo, eo, -128, 127)

    def _reduce(self, op, where, shapes, out):
        i, p = op.inputs[0], self.policy
        axes, rank = sorted(op.attrs["axes"]), len(shapes[i])
        first, length = prod(shapes[i][: axes[0]]), prod(shapes[i][a] for a in axes)
        rest = prod(shapes[i][axes[-1] + 1 :])
        if axes != list(range(axes[0], axes[-1] + 1)):
            self.refuse(op, "emit_c reduces neighbouring axes only")
        (scale, zero), (so, zo) = p.grid(i), p.grid(out)
        m, shift = (int(v) for v in multiplier(scale / so))
        if axes[-1] == rank - 1:
            if op.prim == "reduce_max":
                self.line("reduce_max_s8", where[i], where[out], first, length)
            else:
                self.line("reduce_sum_s8", where[i], where[out], first, length, -zero, m, shift, zo)
        elif op.prim == "reduce_sum" and first == 1:
            self.line("sum_down_s8", where[i], where[out], rest, length, -zero, m, shift, zo)
        else:
            self.refuse(op, "emit_c reduces the first or the last axes")

    def _join(self, op, where, shapes, out):
        axis = op.attrs["dimension"]
        outer, whole = prod(shapes[out][:axis]), prod(shapes[out][axis:])
        offset = 0
        for i in op.inputs:
            shape = shapes[i] if i in shapes else self.tensors[i].shape
            size = prod(shape[axis:])
            if i in self.units.static:
                x = self.constant(self.policy.codes(out, self.fixed(i)), "int8_t")
            else:
                x = where[i]
            self.text.append(f"for (int32_t h = 0; h < {outer}; h++)")
            y = f"{where[out]} + {offset} + h * {whole}"
            if i in self.units.static or self.policy.grid(i) == self.policy.grid(out):
                self.line("copy_s8", f"{x} + h * {size}", y, size)
            else:
                self._rescale(f"{x} + h * {size}", y, size, *self.policy.grid(i), *self.policy.grid(out))
            offset += size

    def _move(self, op, where, shapes, out):
        """A movement as a view of up to four axes: its strides are read off an array of indices."""
        i = op.inputs[0]
        if self.policy.grid(i) != self.policy.grid(out):
            self.refuse(op, "emit_c moves values of one scale")
        index = np.arange(prod(shapes[i])).reshape(shapes[i])
        made = np.asarray(numerics.compute(op, [index.astype(np.float64)], [_Shape(shapes[out])])[0]).astype(
            int
        )
        flat, dims = made, []
        base = int(made.ravel()[0]) if made.size else 0
        for d, size in enumerate(made.shape):
            if size > 1:
                step = int(np.take(flat, 1, d).ravel()[0] - np.take(flat, 0, d).ravel()[0])
                if dims and dims[-1][1] == step * size:
                    dims[-1] = dims[-1][0] * size, step
                else:
                    dims.append((size, step))
        again = np.full((), base)
        for size, step in dims:
            again = again[..., None] + step * np.arange(size)
        if len(dims) > 4 or not np.array_equal(again.ravel(), made.ravel()):
            self.refuse(op, "emit_c moves views of up to four axes")
        if not dims or (len(dims) == 1 and dims[0][1] == 1):
            self.line("copy_s8", f"{where[i]} + {base}", where[out], made.size)
            return
        dims = [(1, 0)] * (4 - len(dims)) + dims
        size, step = (self.constant(np.array(v), "int32_t") for v in zip(*dims, strict=True))
        self.line("move_s8", where[i], where[out], size, step, base)


class _Shape:
    dtype = "float64"

    def __init__(self, shape):
        self.shape = shape


def _functions(text):
    """The public functions of a C text."""
    parts = text.split("\nvoid ")[1:]
    return ["void " + p for p in parts if ") {" in p]


def stored_bytes(files) -> int:
    """Bytes of the constants of an emitted network, as the compiler lays them out."""
    sizes = {"int8_t": 1, "int16_t": 2, "int32_t": 4}
    total = 0
    for line in files["net.c"].splitlines():
        if line.startswith("static const"):
            ctype, name = line.split()[2:4]
            total += sizes[ctype] * int(name[name.index("[") + 1 : name.index("]")])
    return total


__all__ = ["emit_c", "nbytes", "stored_bytes"]
