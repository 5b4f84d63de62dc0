"""Arithmetic of an FPGA design: fixed point everywhere, bit for bit what the multipliers and adders give.

Numbers are raw integers of their formats, carried in float64, which holds them exactly. A product is exact
and cast; a sum of products casts every product into the accumulator's format first, as Edge-MoE's units do,
or only the sum. A quotient is the exact one, cast. What has no integer rule (exp, erf, sqrt, ...) is
float64's value, cast: a table or a series in hardware, whose last bits are the designer's.
"""

from dataclasses import dataclass, field

import numpy as np

from hw import numerics
from hw.formats import Fixed, Format, FormatPolicy, _label
from hw.program import Tensor, is_float
from ref.blocks.fixed import fixed_cast, fixed_matmul

ACTIVATIONS = Fixed(32, 10)
WEIGHTS = Fixed(16, 2)
BIASES = Fixed(16, 5)
_EXACT = frozenset("mul square integer_pow div dot_general ragged_dot_general conv_general_dilated".split())


def edge_moe_weights(tensor: Tensor) -> Fixed:
    """<16, 2> for matrices, <16, 5> for biases and gains (vectors), as Edge-MoE stores them."""
    return WEIGHTS if sum(n > 1 for n in tensor.shape) > 1 else BIASES


@dataclass(frozen=True)
class FormatPlan(FormatPolicy):
    """Formats of an FPGA design, Edge-MoE's unless told: weights <16, 2>, biases <16, 5>, all else <32, 10>.

    activations, weights: a Fixed, or a function of the tensor that gives one. per_product_cast: every product
    of a sum is cast to the result's format before it is added; otherwise sums are exact and cast once.
    A constant of one element is a number of its op's result's format; one out of range (the -1e30 of a mask)
    is the end of the range, where values wrap half of it, so that the difference of two does not wrap. Events
    of the `Trace`: "wrapped", "saturated", "nan", and "immediates lost": constants below the format's step.
    """

    activations: Format = ACTIVATIONS
    weights: Format = edge_moe_weights
    name: str = ""
    by_tensor: dict[int, Format] = field(default_factory=dict)
    per_product_cast: bool = True

    def __post_init__(self):
        for name in ("activations", "weights"):
            f = getattr(self, name)
            if isinstance(f, Format) and not isinstance(f, Fixed):
                raise ValueError(f"{name} must be Fixed or a function of a tensor, got {f.name}")
        if not self.name:
            object.__setattr__(self, "name", _label(self.weights, self.activations))

    def compute(self, op, args, ins, outs, trace):
        """The op in integers where it has a rule there, else in float64, cast."""
        args = self._immediates(args, ins, outs, trace)
        if op.prim in _EXACT:
            got = self._integers(op, args, ins, outs)
            if got is not None:
                return [got]
        return super().compute(op, args, ins, outs, trace)

    def _immediates(self, args, ins, outs, trace):
        """Constants of one element as numbers of the result's format (of the other operand's, in a
        comparison).
        """
        formats = [f for t in (*outs, *ins) if isinstance(f := self.format(t), Fixed)]
        if not formats:
            return args
        out = []
        for x, t in zip(args, ins, strict=True):
            if t.role == "const" and t.size == 1 and is_float(t.dtype):
                f = formats[0]
                x = np.asarray(x, np.float64)
                lo, hi = f.least * f.step, f.most * f.step
                part = 0.5 if f.overflow == "WRAP" else 1.0  # a difference of two such must not wrap
                x = np.where(x < lo, part * lo, np.where(x > hi, part * hi, x))
                kept = f.dequantise(f.quantise(np.where(np.isnan(x), 0.0, x)))
                if trace is not None and (lost := int(((kept == 0) & (x != 0)).sum())):
                    trace.events["immediates lost"] = trace.events.get("immediates lost", 0) + lost
                x = np.where(np.isnan(x), x, kept)
            out.append(x)
        return out

    def _integers(self, op, args, ins, outs):
        to = self.format(outs[0])
        # an immediate has the result's format by now
        formats = [self.format(t) or (to if is_float(t.dtype) else None) for t in ins]
        if not isinstance(to, Fixed) or not all(isinstance(f, Fixed) for f in formats[:2]):
            return None
        if any(np.isnan(np.asarray(x, np.float64)).any() for x in args[:2]):
            return None
        raws = [f.quantise(x) for f, x in zip(formats[:2], args[:2], strict=True)]
        if op.prim == "dot_general":
            a, b = numerics.dot_operands(op, raws)
            rows = [self._matmul(x, w, *formats[:2], to) for x, w in zip(a, b, strict=True)]
            raw = np.reshape(rows, outs[0].shape)
        elif op.prim == "ragged_dot_general":
            raw = self._ragged(op, raws, args[2], formats, to, outs[0])
        elif op.prim == "conv_general_dilated":
            raw = self._conv(op.attrs, raws, formats, to, outs[0])
        elif op.prim in ("mul", "square"):
            raw = _product(raws[0], raws[-1] if op.prim == "mul" else raws[0], formats[0], formats[-1], to)
        elif op.prim == "integer_pow":
            raw = _power(raws[0], formats[0], op.attrs["y"], to)
        else:
            if (raws[1] == 0).any():
                return None  # infinities become the ends of the range
            raw = _quotient(*raws, *formats[:2], to)
        return None if raw is None else to.dequantise(raw)

    def _matmul(self, x, w, fx, fw, to):
        """x [M, K] w [K, N] -> [M, N]."""
        if not self.per_product_cast:
            return fx.dot(x, w, fw, to)
        if not x.size or not w.size:
            return np.zeros((x.shape[0], w.shape[1]), np.int64)
        rule = to.rule
        if rule.overflow != "WRAP":  # the order of the sum counts
            return fixed_matmul(x, w.T, fx=fx.rule, fw=fw.rule, facc=rule)
        _check_bits(fx, fw)
        acc = np.zeros((x.shape[0], w.shape[1]), np.int64)
        step = max(1, (1 << 20) // max(acc.size, 1))  # sums that wrap do not depend on their order
        for k in range(0, x.shape[1], step):
            products = x[:, k : k + step, None] * w[None, k : k + step]
            acc = rule.fit(acc + fixed_cast(products, frac=fx.rule.frac + fw.rule.frac, to=rule).sum(1))
        return acc

    def _ragged(self, op, raws, sizes, formats, to, out):
        (lc, rc), (lb, _) = op.attrs["dimension_numbers"]
        group = op.attrs["rhs_group_dimensions"]
        if lb or len(lc) != 1 or raws[0].ndim != 2:
            return None
        ragged = op.attrs["lhs_ragged_dimensions"][0]
        a, ends = np.moveaxis(raws[0], ragged, 0), np.cumsum(np.asarray(sizes))
        raw = np.zeros(out.shape, np.int64)
        for g, end in enumerate(ends):
            rows = slice(int(end) - int(np.asarray(sizes)[g]), int(end))
            if group:
                w = np.moveaxis(raws[1], [group[0], rc[0]], [0, 1])[g]
                raw[rows] = self._matmul(a[rows], w, *formats[:2], to)
            else:
                w = np.moveaxis(raws[1], rc[0], 0)[rows]
                raw[g] = self._matmul(a[rows].T, w, *formats[:2], to)
        return raw

    def _conv(self, attrs, raws, formats, to, out):
        """Taps gathered into rows (im2col), then the sum of products; batch groups: float64, cast once."""
        if attrs["batch_group_count"] != 1:
            return None
        x, w = raws[0].transpose(attrs["lhs_spec"]), raws[1].transpose(attrs["rhs_spec"])
        space = range(x.ndim - 2)
        spread = [(x.shape[d + 2] - 1) * attrs["lhs_dilation"][d] + 1 if x.shape[d + 2] else 0 for d in space]
        wide = np.zeros((*x.shape[:2], *spread), np.int64)
        wide[(slice(None), slice(None), *(slice(None, None, h) for h in attrs["lhs_dilation"]))] = x
        pads = attrs["padding"]
        wide = np.pad(wide, [(0, 0), (0, 0), *((max(lo, 0), max(hi, 0)) for lo, hi in pads)])
        cut = [slice(-lo if lo < 0 else 0, hi if hi < 0 else None) for lo, hi in pads]
        wide = wide[(slice(None), slice(None), *cut)]
        places = [out.shape[i] for i in attrs["out_spec"][2:]]
        at = [
            np.arange(places[d])[:, None] * attrs["window_strides"][d]
            + np.arange(w.shape[d + 2]) * attrs["rhs_dilation"][d]
            for d in space
        ]  # [place, tap] of each axis
        grid = np.ix_(*(a.ravel() for a in at))
        taps = wide[(slice(None), slice(None), *grid)]
        taps = taps.reshape(*x.shape[:2], *(n for a in at for n in a.shape))
        order = [0, *(2 + 2 * d for d in space), 1, *(3 + 2 * d for d in space)]
        taps = taps.transpose(order)  # [batch, places, channels, taps]
        groups, rows = attrs["feature_group_count"], x.shape[0] * int(np.prod(places))
        taps = taps.reshape(rows, groups, -1)
        w = w.reshape(groups, w.shape[0] // groups, -1)
        parts = [self._matmul(taps[:, g], w[g].T, *formats[:2], to) for g in range(groups)]
        result = np.concatenate(parts, axis=1).reshape(x.shape[0], *places, -1)
        return np.moveaxis(result, -1, 1).transpose(np.argsort(attrs["out_spec"]))


EDGE_MOE = FormatPlan()


def _check_bits(fa, fb):
    """Raise ValueError unless every product fits 63 bits and a sign."""
    if fa.width + fb.width > 63 + (fa.signed or fb.signed):
        raise ValueError(f"products of {fa.name} and {fb.name} do not fit 64 bits")


def _product(a, b, fa, fb, to):
    _check_bits(fa, fb)
    return fixed_cast(a * b, frac=fa.rule.frac + fb.rule.frac, to=to.rule)


def _power(a, f, y, to):
    """a^y by |y| - 1 multipliers in a row, then a division for a negative y."""
    acc, form = a, f
    for _ in range(abs(y) - 1):
        acc, form = _product(acc, a, form, f, to), to
    if y >= 0:
        return fixed_cast(acc, frac=form.rule.frac, to=to.rule) if y else np.full_like(a, to.quantise(1.0))
    return None if (acc == 0).any() else _quotient(to.quantise(np.ones(a.shape)), acc, to, form, to)


def _quotient(a, b, fa, fb, to):
    """a / b exactly, cast: two more bits and whether anything is left decide every way of rounding."""
    up = to.rule.frac + 2 - fa.rule.frac + fb.rule.frac
    if fa.width + max(up, 0) > 63:
        return None
    if up >= 0:
        top, below = a << up, b
    else:
        if fb.width - up > 63:
            return None
        top, below = a, b << -up
    whole, rest = np.divmod(top, below)
    return fixed_cast(whole | (rest != 0), frac=to.rule.frac + 2, to=to.rule)
