"""Execution with int16 activations: int8 weights, int64 sums, by the operators of `ref.blocks.int16_ops`.

Activations are symmetric. A chain of elementwise ops is straight lines between 513 points of a table where no
code is further from the function than `CLOSE`; a step, a pole and what gives no float are computed in float
and counted as such. Movement, choice and reductions are those of int8 on wider codes.
"""

from dataclasses import dataclass, field

import numpy as np

from hw import numerics
from hw.mcu_calibrate import SOFTMAX16, row
from hw.mcu_int8 import ADD, Int8Policy, _any, _Wide, _wide, multiplier
from hw.program import is_float, numpy_dtype
from ref.blocks import int16_ops

CLOSE = 64  # codes: a thousandth of the range
END = 256  # and as many within so many of its ends, where a line cuts the corner of a clamp


@dataclass
class Int16Policy(Int8Policy):
    """straight: {op of a table: whether its lines are close enough}; float where they are not."""

    straight: dict = field(default_factory=dict)

    name = "int16"
    bits, low, high = 16, -(2**15), 2**15 - 1
    widest = 2**47
    span, left_shift = 2**15, 15

    def _finish_product(self, acc, real, out):
        """Sums of 48 bits by multipliers of 16, on the grid of out; beyond 32 bits, their ends."""
        m, shift = product_multiplier(np.broadcast_to(real / self.grid(out)[0], acc.shape))
        room = ((2**31 - 2) << (14 - shift)) // np.maximum(int16_ops.reduce_multiplier(m).astype(np.int64), 1)
        room = np.minimum(room, 2**47 - 1)
        y = int16_ops.requantize_s64(np.clip(acc, -room, room), m, shift)
        return self.reals(out, np.clip(y, self.low, self.high))

    def _check_sum(self, k, weights):
        int16_ops.check_sum(k, 2**22 if weights else 2**30)

    # Tables

    def values_of(self, unit, x, wide):
        """What the chain of a table makes of values x of its source, in float64 or in the program's types."""
        t, values = self.program.tensors, {unit.source: x}
        for op in unit.chain:
            read = lambda i: values[i] if i in values else _any(self.env[i])
            if wide:
                args = [self._given(read(i), t[i]) for i in op.inputs]
                outs = [_Wide(np.shape(x), o.dtype) for o in _wide([t[o] for o in op.outputs])]
            else:
                args = [np.asarray(read(i)).astype(numpy_dtype(t[i].dtype)) for i in op.inputs]
                outs = [_Wide(np.shape(x), t[o].dtype) for o in op.outputs]
            made = numerics.compute(op, args, outs)
            values.update((o, np.broadcast_to(v, np.shape(x))) for o, v in zip(op.outputs, made, strict=True))
        return values[unit.out]

    def table(self, unit):
        """int16 [513], or None where its lines stray from the chain: a step, a pole, whole numbers."""
        if not is_float(self.program.tensors[unit.out].dtype):
            return None
        scale, _ = self.grid(unit.source)
        at = scale * np.arange(self.low, 2**15 + 1, 64.0)
        made = self.values_of(unit, at, wide=True) / self.grid(unit.out)[0]
        table = int16_ops.table_s16(made[::2], made[1::2])
        codes = np.arange(self.low, self.high + 1)
        want = self.codes(unit.out, self.values_of(unit, scale * codes, wide=True))
        room = np.where(np.abs(want) > self.high - END, END, CLOSE)
        return table if (np.abs(int16_ops.lut_s16(codes, table) - want) <= room).all() else None

    def _lut(self, unit, trace):
        table = self.table(unit)
        self.straight[unit.op.id] = table is not None
        x, out = self.env[unit.source], self.program.tensors[unit.out]
        if table is not None:
            return self.reals(unit.out, int16_ops.lut_s16(self.codes(unit.source, x), table))
        if trace is not None:
            trace.events["float results"] = trace.events.get("float results", 0) + out.size
        y = self.values_of(unit, np.asarray(x), wide=False)
        return self.reals(unit.out, self.codes(unit.out, y, trace)) if is_float(out.dtype) else y

    def _softmax(self, unit, trace):
        x = self.env[unit.source]
        m, shift = int16_ops.softmax_params_s16(input_scale=self.grid(unit.source)[0])
        rows = self.codes(unit.source, x).reshape(-1, np.shape(x)[-1])
        y = int16_ops.softmax_s16(rows, multiplier=m, shift=shift)
        if self.grid(unit.out) != SOFTMAX16:
            return self._finish(y.astype(np.int64), SOFTMAX16[0], unit.out).reshape(np.shape(x))
        return self.reals(unit.out, y).reshape(np.shape(x))

    def _norm(self, unit, trace):
        x, n = self.env[unit.source], np.shape(self.env[unit.source])[-1]
        gamma, beta = row(self.env, unit.gamma, n, 1.0), row(self.env, unit.beta, n, 0.0)
        g, b, m, shift = int16_ops.norm_params_s16(gamma, beta, self.grid(unit.out)[0])
        y = int16_ops.layernorm_s16(
            self.codes(unit.source, x), g, b, multiplier=m, shift=shift, center=unit.center
        )
        return self.reals(unit.out, y)

    def pair_params(self, prim, sa, sb, so):
        """As with 8 bits; a quotient's shift is at most 0."""
        return quotient_multiplier(sa / (sb * so)) if prim == "div" else super().pair_params(prim, sa, sb, so)

    def _pair(self, prim, first, second, so, zo):
        (a, sa, _), (b, sb, _) = first, second
        params = self.pair_params(prim, sa, sb, so)
        if prim in ("mul", "div"):
            return (int16_ops.mul_s16 if prim == "mul" else int16_ops.divide_s16)(a, b, *params)
        return int16_ops.add_s16(a, b, **dict(zip(ADD, params, strict=True)))

    def product_params(self, real):
        """(multiplier of 16 bits, shift) of sums of products."""
        m, shift = product_multiplier(real)
        return int16_ops.reduce_multiplier(m), shift

    def fits(self, largest, mul, shift):
        """Do sums up to `largest` stay within 48 bits, and their results within 31."""
        result = largest * mul.astype(np.float64) * 2.0 ** (shift - 14)
        return bool((np.asarray(largest) < 2**47).all() and (result < 2**31 - 1).all())

    def _rescaled(self, codes, m, s, zero, out_zero):
        return int16_ops.rescale_s16(codes, m, s)


def product_multiplier(real):
    """(multiplier, shift) for `requantize_s64`; above 2^7 the largest that it has."""
    m, shift = (np.asarray(v, np.int64) for v in multiplier(real))
    return np.where(shift > 7, 2**31 - 1, m), np.minimum(shift, 7)


def quotient_multiplier(real):
    """(multiplier, shift) for `divide_s16` of the ratio of scales; above 2^16 the largest that it has."""
    m, shift = (int(v) for v in multiplier(real / 2**16))
    return (m, shift) if shift <= 0 else (2**31 - 1, 0)
