"""Int8 execution of any program on a microcontroller: every unit in integers, by the plan of `calibrate`.

Values are int8 codes, carried between ops as the real numbers they stand for (float64 holds them exactly).
Every unit of `hw.mcu_units` takes codes and gives codes by the operators of `ref.blocks.int8_ops`: sums in
int32, requantised with two roundings as CMSIS-NN does. What has no integer form (a power of two tensors, a
remainder) is computed in float32 and rounded, and the events of the `Trace` say how many such results there
were: "float results".
"""

from dataclasses import dataclass, field

import numpy as np

from hw import numerics
from hw.mcu_calibrate import FILL, SOFTMAX, QuantPlan, grid_of, row
from hw.mcu_units import INTO, SAME, Unit, Units
from hw.program import Program, is_float, numpy_dtype
from ref.blocks import int8_ops
from ref.blocks.integer import quantize_multiplier, requantize
from ref.blocks.quantize import EPS, symmetric_params

_SUMS = frozenset("reduce_sum cumsum reduce_window_sum".split())
_PRODUCTS = frozenset("product ragged_dot_general conv_general_dilated".split())
_COMMON = SAME | INTO | frozenset("select_n max min clamp concatenate stack sort top_k while".split())
_FREE_OF_SCALE = frozenset("eq ne lt le gt ge eq_to le_to lt_to argmax argmin is_finite iota empty".split())
_ADDS = ("add", "add_any", "sub")
ADD = ("input1_multiplier", "input1_shift", "input2_multiplier", "input2_shift", "output_multiplier",
       "output_shift")  # fmt: skip


def _any(x):
    """The one number that a uniform array holds."""
    x = np.asarray(x)
    return x.reshape(-1)[0] if x.size else np.zeros((), x.dtype)


@dataclass(frozen=True)
class _Wide:
    shape: tuple
    dtype: str = "float64"


def _wide(outs):
    return [_Wide(o.shape, "float64" if is_float(o.dtype) else o.dtype) for o in outs]


def multiplier(real):
    """(multiplier, shift) of `quantize_multiplier`; beyond its range the nearest that it has."""
    real = np.asarray(real, np.float64)
    real = np.where(np.abs(real) < 2.0**-31, 0.0, np.clip(real, 0.0, 2.0**30))
    return quantize_multiplier(real)


def rescaler(real, bits=8):
    """(multiplier, shift) that bring codes onto another scale, within what int32 holds of them."""
    m, s = (int(v) for v in multiplier(real))
    most = {8: 20, 16: 15}[bits]
    return (m, s) if s <= most else (2**31 - 1, most)


@dataclass
class Int8Policy:
    """The arithmetic of `execute` on a microcontroller: a policy of one program with its `QuantPlan`.

    near: {op of a softmax: (entries worked on, entries)}, what its instructions depend on.
    """

    program: Program
    plan: QuantPlan
    units: Units = None
    near: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    whole: dict = field(default_factory=dict)  # of weights that are handed over in parts

    name = "int8"
    bits, low, high = 8, -128, 127
    widest = 2**31  # sums of products stay below
    span = 255  # the largest code less a zero point
    left_shift = 20  # bits to spare in sums of two tensors

    def __post_init__(self):
        self.plan.check(self.program)
        if self.plan.activation_bits != self.bits:
            raise ValueError(f"plan has activations of {self.plan.activation_bits} bits, not {self.bits}")
        if self.units is None:
            self.units = Units(self.program, self.plan.rejected, act_bytes=self.bits // 8)

    # Formats

    def dtype(self, tensor) -> str:
        """int8 (or int16) for floats: activations, and int8 weights in flash."""
        return self.name if is_float(tensor.dtype) else tensor.dtype

    def carrier(self, dtype):
        """float64 for floats."""
        return np.dtype(np.float64) if is_float(dtype) else numpy_dtype(dtype)

    def grid(self, i) -> tuple[float, int]:
        """(scale, zero point) of a float tensor. Raises: ValueError for one that calibration never saw."""
        if i not in self.plan.scales:
            t = self.program.tensors[i]
            raise ValueError(
                f"plan has no range for {t.name or f'tensor {i}'} {list(t.shape)}: "
                "calibrate on batches that reach it"
            )
        return self.plan.scales[i]

    def codes(self, i, x, trace=None):
        """int64 codes of real values of tensor i; NaN has the code of 0."""
        scale, zero = self.grid(i)
        with np.errstate(over="ignore", invalid="ignore"):
            q = np.asarray(x, np.float64) / scale + zero
        nan = np.isnan(q)
        if trace is not None:
            beyond = (q < self.low - 0.5) | (q > self.high + 0.5)
            for what, n in (("nan", nan), ("saturated", beyond)):
                if n := int(np.count_nonzero(n)):
                    trace.events[what] = trace.events.get(what, 0) + n
        return np.clip(np.rint(np.where(nan, zero, q)), self.low, self.high).astype(np.int64)

    def reals(self, i, codes):
        """scale (code - zero point)."""
        scale, zero = self.grid(i)
        return scale * (np.asarray(codes, np.float64) - zero)

    def enter(self, tensor, value, trace=None):
        """An input in codes; weights wait for the op that reads them."""
        if not is_float(tensor.dtype):
            return value
        value = np.asarray(value).astype(np.float64)
        if not self.units.dynamic(tensor.id):
            return value
        return self.reals(tensor.id, self.codes(tensor.id, value, trace))

    # Units

    def compute(self, op, args, ins, outs, trace):
        """What runs at an op, if anything does."""
        unit = self.units.unit(op)
        args = [self._coded(i, a) for i, a in zip(op.inputs, args, strict=True)]
        self.env.update(zip(op.inputs, args, strict=True))
        if unit.kind == "free":
            if all(i in self.units.static for i in op.outputs):
                return numerics.compute(op, [self._given(a, t) for a, t in zip(args, ins, strict=True)],
                                        _wide(outs))  # fmt: skip
            return [np.zeros(o.shape, self.carrier(o.dtype)) for o in outs]  # a unit behind computes it
        return self.run(unit, trace)

    def run(self, unit: Unit, trace):
        """Results of a unit, from the values in `env`."""
        own = {"lut": self._lut, "softmax": self._softmax, "layer_norm": self._norm}
        if unit.kind in own:
            return [own[unit.kind](unit, trace)]
        op = unit.op
        args = [self.env[i] for i in op.inputs]
        ins = [self.program.tensors[i] for i in op.inputs]
        outs = [self.program.tensors[o] for o in self.units.writes(unit)]
        floats = [is_float(t.dtype) for t in ins]
        if not any(floats) and not any(is_float(o.dtype) for o in outs):
            return numerics.compute(op, args, outs)
        if op.prim in _FREE_OF_SCALE:
            return self._kept(op, args, ins, outs, trace)
        if unit.kind in _PRODUCTS and all(floats[:2]):
            return [self._product(unit, args, outs[0])]
        out = unit.out if unit.out >= 0 else op.outputs[0]
        if op.prim in _SUMS:
            return [self._linear(op, args, out)]
        if op.prim in (*_ADDS, "mul", "div") and all(floats):
            return [self._binary(op, args, out)]
        if unit.kind == "view" or op.prim in _COMMON:
            return self._common(op, args, ins, outs, trace)
        if op.prim == "convert_element_type" and not floats[0]:
            whole = np.clip(np.asarray(args[0], np.float64), -(2**31) + 1, 2**31 - 1).astype(np.int64)
            return [self._finish(whole, 1.0, out)]
        return self._float(op, args, ins, outs, trace)

    def _coded(self, i, x):
        """A value as its codes have it: a loop may start with a constant that was none yet."""
        if not self.units.dynamic(i) or i not in self.plan.scales:
            return x
        return self.reals(i, self.codes(i, x))

    def _given(self, a, t):
        return np.asarray(a, np.float64) if is_float(t.dtype) else a

    def _finish(self, acc, real, out):
        """requantize(acc) + zero point of out, clamped: the reals of out for acc in units of `real`."""
        scale, zero = self.grid(out)
        m, shift = multiplier(real / scale)
        room = (2**31 - 1) >> np.maximum(shift, 0).astype(np.int64)
        y = requantize(np.clip(acc, -room, room), m, shift).astype(np.int64) + zero
        return self.reals(out, np.clip(y, self.low, self.high))

    _finish_product = _finish

    def _check_sum(self, k, weights):
        """Raise ValueError where a sum of k products could leave its integers."""
        int8_ops._check_sum(k * (1 if weights else 2), None)

    def table(self, unit):
        """What the chain makes of each of the 256 codes, from the least up: codes, or whole numbers."""
        out = self.program.tensors[unit.out]
        scale, zero = self.grid(unit.source)
        values = {unit.source: scale * (np.arange(-128, 128.0) - zero)}
        for op in unit.chain:
            read = lambda i: values[i] if i in values else _any(self.env[i])
            args = [self._given(read(i), self.program.tensors[i]) for i in op.inputs]
            outs = [_Wide((256,), o.dtype) for o in _wide([self.program.tensors[o] for o in op.outputs])]
            made = numerics.compute(op, args, outs)
            values.update((o, np.broadcast_to(v, (256,))) for o, v in zip(op.outputs, made, strict=True))
        found = values[unit.out]
        if not is_float(out.dtype):
            return numerics.cast(found, out.dtype)
        return self.codes(unit.out, found).astype(np.int8)

    def _lut(self, unit, trace):
        table, codes = self.table(unit), self.codes(unit.source, self.env[unit.source])
        if not is_float(self.program.tensors[unit.out].dtype):
            return table[codes + 128]
        return self.reals(unit.out, int8_ops.lut_s8(codes, table))

    def _softmax(self, unit, trace):
        x = self.env[unit.source]
        scale, _ = self.grid(unit.source)
        m, shift, least = int8_ops.softmax_params_s8(input_scale=scale)
        rows = self.codes(unit.source, x).reshape(-1, np.shape(x)[-1])
        y = int8_ops.softmax_s8(rows, multiplier=m, shift=shift, diff_min=least)
        done, total = self.near.get(unit.op.id, (0, 0))
        worked = int((rows - rows.max(1, keepdims=True) >= least).sum()) if rows.size else 0
        self.near[unit.op.id] = done + worked, total + rows.size
        if self.grid(unit.out) != SOFTMAX:
            return self._finish(y.astype(np.int64) + 128, 1 / 256, unit.out).reshape(np.shape(x))
        return self.reals(unit.out, y).reshape(np.shape(x))

    def _norm(self, unit, trace):
        x = self.env[unit.source]
        _, zero = self.grid(unit.source)
        scale, out_zero = self.grid(unit.out)
        n = np.shape(x)[-1]
        gamma, beta = row(self.env, unit.gamma, n, 1.0), row(self.env, unit.beta, n, 0.0)
        g, b, m, shift = int8_ops.norm_params_s8(gamma, beta, scale)
        y = int8_ops.layernorm_s8(
            self.codes(unit.source, x), g, b, input_offset=-zero, multiplier=m, shift=shift,
            output_offset=out_zero, center=unit.center,
        )  # fmt: skip
        return self.reals(unit.out, y)

    def _product(self, unit, args, out):
        """int32 sums of products of codes, the bias among them, requantised by output channel."""
        op, bias = unit.op, unit.bias
        if unit.kind == "product":
            a, b = numerics.dot_operands(op, args)
            left, right = (i in self.units.static for i in op.inputs[:2])
            qa, sa = self.factor(op.inputs[0], a, (0, 1) if left else None)  # scale a row of a static left
            qb, sb = self.factor(op.inputs[1], b, (0, 2) if right else None)
            self._check_sum(a.shape[2], left or right)
            acc = np.rint(np.matmul(qa, qb)).astype(np.int64)
            real = np.broadcast_to(sa * sb, acc.shape)
        else:
            qa, sa = self.factor(op.inputs[0], args[0], None)
            static = op.inputs[1] in self.units.static and unit.kind == "conv_general_dilated"
            axis = (op.attrs["rhs_spec"][0],) if static else None
            qb, sb = self.factor(op.inputs[1], args[1], axis)
            rest = args[2:]
            acc = np.rint(numerics.compute(op, [qa, qb, *rest], [_Wide(out.shape)])[0]).astype(np.int64)
            real = sa * sb
            if static:
                shape = [1] * acc.ndim
                shape[op.attrs["out_spec"][1]] = -1
                real = (sa * np.ravel(sb)).reshape(shape)
        if unit.perm:  # the result as it is written, before and after its axes change places
            plain = [out.shape[unit.perm.index(d)] for d in range(len(unit.perm))]
            acc, real = (
                np.broadcast_to(v, acc.shape).reshape(plain).transpose(unit.perm) for v in (acc, real)
            )
        acc = acc.reshape(out.shape)
        real = np.broadcast_to(np.reshape(real, out.shape) if np.size(real) == acc.size else real, acc.shape)
        if bias is not None:
            whole = np.rint(np.asarray(self.env[bias], np.float64) / real)
            half = self.widest // 2
            acc = acc + np.clip(np.broadcast_to(whole, acc.shape), -half, half).astype(np.int64)
        if np.abs(acc).max(initial=0) >= self.widest:
            raise ValueError(f"a sum of {op.label} reaches {self.widest:,}: {np.abs(acc).max():,}")
        return self._finish_product(acc, real, out.id)

    def factor(self, i, x, axes):
        """(codes less the zero point as float64, scale): activations by their grid, weights symmetric, with a
        scale for every index of `axes`, or one.
        """
        x = np.asarray(x, np.float64)
        if i not in self.units.static:
            scale, zero = self.grid(i)
            return np.clip(np.rint(x / scale) + zero, self.low, self.high) - zero, scale
        if not np.isfinite(x).all():
            raise ValueError(f"weight {self.program.tensors[i].name or i} must be finite")
        rest = tuple(d for d in range(x.ndim) if d not in (axes or ()))
        top = np.abs(x).max(axis=rest, keepdims=True, initial=0.0)
        scale = symmetric_params(top, bits=self.plan.weight_bits, eps=EPS)
        half = 2 ** (self.plan.weight_bits - 1) - 1
        return np.clip(np.rint(x / scale), -half, half), scale

    def _linear(self, op, args, out):
        """Sums of codes less their zero points, in int32, requantised once."""
        i = op.inputs[0]
        if i in self.units.static:
            return self.reals(out, self.codes(out, numerics.compute(op, args, [_Wide(np.shape(args[0]))])[0]))
        scale, zero = self.grid(i)
        shape = self.program.tensors[out].shape
        whole = self.codes(i, args[0]) - zero
        acc = np.rint(numerics.compute(op, [whole.astype(np.float64)], [_Wide(shape)])[0])
        if np.abs(acc).max(initial=0) >= 2**31:
            raise ValueError(f"a sum of {op.label} leaves int32")
        return self._finish(acc.astype(np.int64), scale, out)

    def operand(self, i, x, out):
        """(codes, scale, zero point) of an operand of an elementwise op; a static one on a grid of its own,
        where a fill is what pushes any result to the end of its range.
        """
        if i not in self.units.static:
            return self.codes(i, x), *self.grid(i)
        x = np.asarray(x, np.float64)
        far = (self.high - self.low) * self.grid(out)[0]
        plain = lambda v: np.where(np.abs(v) >= FILL, np.sign(v) * far, np.where(np.isnan(v), 0.0, v))
        x, span = plain(x), plain(np.asarray(self.whole.get(i, x), np.float64))
        scale, zero = grid_of(span.min(initial=0.0), span.max(initial=0.0), self.bits)
        return np.clip(np.rint(x / scale) + zero, self.low, self.high).astype(np.int64), scale, zero

    def _binary(self, op, args, out):
        shape = self.program.tensors[out].shape
        parts = [
            self.operand(i, np.broadcast_to(a, shape), out) for i, a in zip(op.inputs, args, strict=True)
        ]
        return self.reals(out, self._pair(op.prim, *parts, *self.grid(out)))

    def pair_params(self, prim, sa, sb, so):
        """(multiplier, shift) of a product or quotient of two tensors, six numbers of a sum or difference."""
        if prim == "mul":
            return tuple(int(v) for v in multiplier(sa * sb / so))
        if prim == "div":
            return tuple(int(v) for v in multiplier(sa / (2**16 * sb * so)))
        return add_multipliers(sa, -sb if prim == "sub" else sb, so, self.left_shift)

    def _pair(self, prim, first, second, so, zo):
        """Codes of an operation of two tensors of (codes, scale, zero point) each."""
        (a, sa, za), (b, sb, zb) = first, second
        params = self.pair_params(prim, sa, sb, so)
        offsets = {"input1_offset": -za, "input2_offset": -zb, "output_offset": zo}
        if prim in ("mul", "div"):
            return (int8_ops.mul_s8 if prim == "mul" else int8_ops.divide_s8)(a, b, *params, **offsets)
        return int8_ops.add_s8(a, b, **dict(zip(ADD, params, strict=True)), **offsets)

    def product_params(self, real):
        """(multiplier, shift) that bring sums of products to their result, as the kernels take them."""
        return multiplier(real)

    def fits(self, largest, mul, shift):
        """Do sums up to `largest` stay within the kernels' 32 bits on the way to their result."""
        return (largest * 2.0 ** np.maximum(shift, 0) < 2**31).all()

    def _common(self, op, args, ins, outs, trace):
        """Movement and choice: every float operand on the result's grid first, by `rescale_s8`."""
        target = next((o.id for o in outs if is_float(o.dtype)), None)
        if target is None:
            return self._kept(op, args, ins, outs, trace)
        so, zo = self.grid(target)
        given = []
        for i, a, t in zip(op.inputs, args, ins, strict=True):
            if is_float(t.dtype) and i in self.units.static:
                a = self.reals(target, self.codes(target, a))
            elif is_float(t.dtype) and self.grid(i) != (so, zo):
                scale, zero = self.grid(i)
                m, s = rescaler(scale / so, self.bits)
                a = self.reals(target, self._rescaled(self.codes(i, a), m, s, zero, zo))
            given.append(a)
        return self._kept(op, given, ins, outs, trace)

    def _rescaled(self, codes, m, s, zero, out_zero):
        return int8_ops.rescale_s8(codes, m, s, input_offset=-zero, output_offset=out_zero)

    def _kept(self, op, args, ins, outs, trace):
        """An op that makes no new numbers: its results are codes as they are."""
        args = [self._given(a, t) for a, t in zip(args, ins, strict=True)]
        results = numerics.compute(op, args, _wide(outs))
        return [
            self.reals(o.id, self.codes(o.id, r)) if is_float(o.dtype) else r
            for o, r in zip(outs, results, strict=True)
        ]

    def _float(self, op, args, ins, outs, trace):
        """No integer form: computed in the program's float type, rounded into codes, and counted."""
        n = sum(o.size for o in outs)
        if trace is not None:
            trace.events["float results"] = trace.events.get("float results", 0) + n
        args = [np.asarray(a).astype(numpy_dtype(t.dtype)) for a, t in zip(args, ins, strict=True)]
        results = numerics.compute(op, args, outs)
        return [
            self.reals(o.id, self.codes(o.id, r, trace)) if is_float(o.dtype) else r
            for o, r in zip(outs, results, strict=True)
        ]


def add_multipliers(scale1, scale2, out_scale, left_shift=20):
    """`add_params_s8`, with multipliers that are too small or too large at the ends of their range."""
    twice = 2 * max(scale1, abs(scale2))
    (m1, s1), (m2, s2) = multiplier(scale1 / twice), multiplier(abs(scale2) / twice)
    mo, so = multiplier(twice / (2.0**left_shift * out_scale))
    return int(m1), int(s1), int(np.sign(scale2) * m2), int(s2), int(mo), int(so)
