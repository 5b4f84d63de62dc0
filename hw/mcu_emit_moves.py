"""The calls of C that move values: copies, views, padding, slices found at run time, and whole numbers."""

from functools import partial
from math import prod

import numpy as np

from hw import numerics
from hw.mcu_layout import broadcast_layout, merged, strides
from hw.program import is_float, itemsize

_VIEWS = "transpose rev slice broadcast_in_dim reshape copy squeeze expand_dims tile"
MOVES = frozenset((*_VIEWS.split(), "reduce_precision", "gather"))
# Operations of whole numbers and flags, written out: {0}, {1}, {2} are the operands.
_WHOLE = {
    **{p: f"{{0}} {c} {{1}}" for p, c in (("add", "+"), ("sub", "-"), ("mul", "*"), ("lt", "<"), ("le", "<="),
                                          ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!="), ("and", "&"),
                                          ("or", "|"), ("xor", "^"))},
    "max": "{0} > {1} ? {0} : {1}", "min": "{0} < {1} ? {0} : {1}", "neg": "-{0}", "copy": "{0}",
    "select_n": "{0} ? {2} : {1}", "convert_element_type": "{0}", "abs": "{0} < 0 ? -{0} : {0}",
    "clamp": "{1} < {0} ? {0} : {1} > {2} ? {2} : {1}",
}  # fmt: skip


class Moves:
    """Movement: of the walk in `hw.mcu_emit`."""

    def copy(self, x, y, n):
        """n codes from x to y."""
        if self.policy.bits == 16:
            x, y, n = f"(const int8_t *)({x})", f"(int8_t *)({y})", 2 * n
        self.line("copy_s8", x, y, n)

    def _join(self, unit, where, shapes, out):
        axis = unit.op.attrs["dimension"]
        outer, whole = prod(shapes[out][:axis]), prod(shapes[out][axis:])
        offset = 0
        for i in unit.op.inputs:
            size = prod(shapes[i][axis:])
            if i in self.units.static:
                x = self.constant(self.policy.codes(out, self.fixed(i)), self.ctype)
            else:
                x = where[i]
            same = i in self.units.static or self.policy.grid(i) == self.policy.grid(out)

            def line(dx="", dy="", *_, x=x, i=i, size=size, offset=offset, same=same):
                y = f"{where[out]} + {offset}{dy}"
                if same:
                    self.copy(x + dx, y, size)
                else:
                    self._rescale(x + dx, y, size, *self.policy.grid(i), *self.policy.grid(out))

            self._looped([(outer, size, whole)] if outer > 1 else [], line)
            offset += size

    def _moved(self, op, shapes, out, fill=-1.0):
        """For every entry of the result the place in operand 0 that it comes from, or fill."""
        i = op.inputs[0]
        index = np.arange(prod(shapes[i]), dtype=np.float64).reshape(shapes[i])
        others = [self.fixed(j) if j in self.units.static else None for j in op.inputs[1:]]
        if op.prim == "pad":
            others = [np.float64(fill)]
        if any(v is None for v in others):
            self.refuse(op, "emit_c moves to and from places that are known before it runs")
        made = numerics.compute(op, [index, *others], [_Shape(shapes[out])])[0]
        if not np.isfinite(made).all():
            self.refuse(op, "emit_c takes nothing from beyond an array")
        return np.asarray(made).astype(int)

    def _view(self, made):
        """(base, sizes, steps) of up to four axes that an array of places follows, or None."""
        if not made.size:
            return 0, []
        base = int(made.ravel()[0])
        dims = []
        for d, size in enumerate(made.shape):
            if size > 1:
                step = int(np.take(made, 1, d).ravel()[0] - np.take(made, 0, d).ravel()[0])
                dims.append((size, step))
        dims = merged(dims)
        again = np.full((), base)
        for size, step in dims:
            again = again[..., None] + step * np.arange(size)
        if len(dims) > 4 or not np.array_equal(again.ravel(), made.ravel()):
            return None
        return base, dims

    def _same_scale(self, op, i, out):
        if is_float(self.tensors[i].dtype) and self.policy.grid(i) != self.policy.grid(out):
            self.refuse(op, "emit_c moves values of one scale")

    def _move(self, op, where, shapes, out):
        """A movement as a view of its operand, or piece by piece from places in flash."""
        i = op.inputs[0]
        self._same_scale(op, i, out)
        made = self._moved(op, shapes, out)
        kind = "" if is_float(self.tensors[i].dtype) else "_s8"
        if kind and (size := itemsize(self.tensors[i].dtype)) > 1:
            made = made[..., None] * size + np.arange(size)  # whole numbers, byte by byte
        view = self._view(made)
        if view is None:
            flat = made.ravel()
            cut = np.flatnonzero(np.diff(flat) != 1) + 1
            length = int(np.gcd.reduce([*cut, flat.size])) if flat.size else 1
            at = self._numbers(flat[::length])
            self.line(f"take{kind}", where[i], where[out], at, flat.size // length, length)
            return
        base, dims = view
        if not dims or (len(dims) == 1 and dims[0][1] == 1):
            copy = partial(self.line, "copy_s8") if kind else self.copy
            copy(f"{where[i]} + {base}", where[out], made.size)
        else:
            self.line(f"move{kind}", where[i], where[out], *self._four(dims), base)

    def _four(self, dims):
        """Names of sizes and steps of exactly four axes."""
        dims = [(1, 0)] * (4 - len(dims)) + list(dims)
        return [self._numbers(v) for v in zip(*dims, strict=True)]

    def _pad(self, unit, where, shapes, out):
        op, i = unit.op, unit.op.inputs[0]
        self._same_scale(op, i, out)
        if op.inputs[1] not in self.units.static:
            self.refuse(op, "emit_c pads with what is known before it runs")
        made = self._moved(op, shapes, out)
        inside = np.flatnonzero(made.ravel() >= 0)
        if inside.size != prod(shapes[i]):
            self.refuse(op, "emit_c pads by nothing negative")
        code = int(self.policy.codes(out, self.fixed(op.inputs[1])))
        self.line("fill", where[out], prod(shapes[out]), code)
        places = np.zeros(prod(shapes[i]), int)
        places[made.ravel()[inside]] = inside
        view = self._view(places.reshape(shapes[i]))
        if view is None:
            self.refuse(op, "emit_c pads up to four axes")
        self.line("place", where[i], where[out], *self._four(view[1]), view[0])

    def _base(self, op, starts, outer, inner, where):
        """C of the first place of a slice that is found when it runs: starts clamped as JAX does."""
        terms = []
        for i, whole, part, step in zip(starts, outer, inner, strides(outer), strict=True):
            if whole == part:
                continue
            if i in self.units.static:
                terms.append(str(min(max(int(np.ravel(self.fixed(i))[0]), 0), whole - part) * step))
            else:
                self.begins = True
                terms.append(f"t_begin(*({where[i]}), {whole - part}) * {step}")
        return " + ".join(terms) or "0"

    def _cut(self, unit, where, shapes, out):
        op, i = unit.op, unit.op.inputs[0]
        if i in self.units.static:
            self.refuse(op, "emit_c cuts what lies in the arena")
        self._same_scale(op, i, out)
        base = self._base(op, op.inputs[1:], shapes[i], shapes[out], where)
        dims = merged((n, s) for n, s in zip(shapes[out], strides(shapes[i]), strict=True))
        if len(dims) > 4:
            self.refuse(op, "emit_c cuts up to four axes")
        if not dims or (len(dims) == 1 and dims[0][1] == 1):
            self.copy(f"{where[i]} + {base}", where[out], prod(shapes[out]))
        else:
            self.line("move", where[i], where[out], *self._four(dims), base)

    def _update(self, unit, where, shapes, out):
        op = unit.op
        x, new, *starts = op.inputs
        if x in self.units.static:
            codes = self.policy.codes(out, self.fixed(x))
            self.copy(self.constant(codes, self.ctype), where[out], codes.size)
        elif where[x] != where[out]:
            self.copy(where[x], where[out], prod(shapes[out]))
        source = where.get(new) or self.constant(self.policy.codes(out, self.fixed(new)), self.ctype)
        base = self._base(op, starts, shapes[out], shapes[new], where)
        inner = strides(shapes[new])
        dims = merged((n, s, i) for n, s, i in zip(shapes[new], strides(shapes[out]), inner, strict=True))
        if new in self.units.static or self.policy.grid(new) == self.policy.grid(out):
            dims = merged((n, s) for n, s, _ in dims)
            if len(dims) > 4:
                self.refuse(op, "emit_c puts in up to four axes")
            self.line("place", source, where[out], *self._four(dims), base)
            return
        size = dims.pop()[0] if dims and dims[-1][1] == 1 else 1
        grids = (*self.policy.grid(new), *self.policy.grid(out))
        to = f"{where[out]} + {base}"
        self._looped(dims, lambda y="", x="", *_: self._rescale(source + x, to + y, size, *grids))

    def _whole(self, op, where, shapes, out):
        """Integers and flags: a loop written out; what only moves, by the kernels of int8."""
        if op.prim in MOVES or op.prim in ("reduce_or", "reduce_and"):
            by_bytes = {i: f"(int8_t *)({w})" for i, w in where.items()}
            if op.prim in MOVES:
                self._move(op, by_bytes, shapes, out)
            else:
                self._reduce(op, by_bytes, shapes, out)
            return
        if op.prim not in _WHOLE:
            self.refuse(op, f"emit_c has no C for {op.prim!r} of whole numbers")
        parts, n = [], prod(shapes[out])
        loops, inner, steps = broadcast_layout([shapes[i] for i in op.inputs], shapes[out])
        for i, step in zip(op.inputs, steps, strict=True):
            if i in self.units.static:
                x = np.asarray(self.fixed(i))
                if x.size == 1:
                    parts.append(str(int(x.ravel()[0])))
                    continue
                at = self.constant(x.astype(np.int64), "int32_t")
            else:
                at = f"({where[i]})"
            parts.append(f"{at}[i]" if step else f"{at}[0]")
        if loops or inner != n:
            self.refuse(op, "emit_c broadcasts no whole numbers")
        made = _WHOLE[op.prim].format(*parts)
        self.text.append(f"for (int32_t i = 0; i < {n}; i++) ({where[out]})[i] = {made};")


class _Shape:
    dtype = "float64"

    def __init__(self, shape):
        self.shape = shape
