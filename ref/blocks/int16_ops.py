"""Operators with int16 activations, bit for bit: int8 weights, int64 sums, integers in, integers out.

Activations are symmetric (zero point 0, one scale per tensor), weights symmetric with one scale per output
channel, the bias int64 with scale s_x s_w. Source: the C code of CMSIS-NN (arXiv 1801.06601), which follows
the 16x8 convention of TFLite. Beside a sum of 48 bits a multiplier has 16 bits only, so that their product
fits int64; sums and products of single codes fit int32 and keep the multiplier of 32 bits. Left out: softmax
and layer norm, where the convention interpolates tables that are made in float.
"""

import numpy as np

from ref.blocks.integer import requantize
from ref.checks import check_integers
from ref.dims import dims

ACT_MIN, ACT_MAX = -(2**15), 2**15 - 1
SUM_BITS = 48


def reduce_multiplier(multiplier):
    """A Q31 multiplier in Q15, to nearest, ties up, at most 2^15 - 1: int32. Its relative error is <= 2^-15.

    Raises: ValueError unless multiplier holds integers in 0..2^31-1.
    """
    m = np.asarray(multiplier)
    if m.dtype.kind not in "iu" or (m.size and not (0 <= m.min() and m.max() < 2**31)):
        raise ValueError("multiplier must hold integers in 0..2^31-1")
    return np.minimum((m.astype(np.int64) + 2**15) >> 16, 2**15 - 1).astype(np.int32)


def requantize_s64(acc, multiplier, shift):
    """acc multiplier 2^(shift - 31) to nearest, ties up, by `reduce_multiplier`; no clamp. int32.

    Args: acc int64 in -2^47..2^47-1; multiplier, shift: of `quantize_multiplier`, shift in -31..7.
    Raises: ValueError for another, or where twice the result leaves int32: C keeps one bit to round with.
    """
    acc, shift = check_integers("acc", acc, SUM_BITS), check_integers("shift", shift, 32)
    if shift.size and not (-31 <= shift.min() and shift.max() <= 7):
        raise ValueError(f"shift must be in -31..7, got {shift.min()}..{shift.max()}")
    twice = (acc * reduce_multiplier(multiplier)) >> (14 - shift)
    if twice.size and not (-(2**31) <= twice.min() and twice.max() < 2**31 - 1):
        raise ValueError("twice the result must stay within 32 bits")
    return ((twice + 1) >> 1).astype(np.int32)


def fully_connected_s16(x, w, b, *, multiplier, shift, act_min=ACT_MIN, act_max=ACT_MAX):
    """y = clamp(requantize_s64(x w^T + b)), one multiplier for all outputs.

    Args: x [B, K] int16, w [N, K] int8 (int4 codes are int8 codes), b [N] int64 or None.
    Returns: [B, N] int16. Raises: ValueError if an axis disagrees, codes are not integers in range, or
      2^22 K + |b| reaches 2^47.
    """
    return matmul_s16(x, w, b, multiplier, shift, act_min=act_min, act_max=act_max)


def matmul_s16(x, w, b, multiplier, shift, *, act_min=ACT_MIN, act_max=ACT_MAX):
    """The same with a multiplier and a shift for every output channel: x [M, K], w [N, K] -> [M, N] int16.

    multiplier, shift: [N] int32, or one for all.
    """
    dims(x=(x, "M K"), w=(w, "N K"), **({} if b is None else {"b": (b, "N")}))
    b = np.zeros(1, np.int64) if b is None else check_integers("b", b, SUM_BITS)
    largest_bias = int(np.abs(b).max(initial=0))
    acc = _sums(check_integers("x", x, 16), check_integers("w", w, 8), 2**22, largest_bias) + b
    return _clamp(requantize_s64(acc, multiplier, shift), act_min, act_max)


def batch_matmul_s16(x, y, *, multiplier, shift, act_min=ACT_MIN, act_max=ACT_MAX):
    """x y^T of activations, as attention has them: x [..., M, K], y [..., N, K] int16 -> [..., M, N] int16.

    Raises: ValueError as above, where 2^30 K reaches 2^47.
    """
    dims(x=(x, "... M K"), y=(y, "... N K"))
    acc = _sums(check_integers("x", x, 16), check_integers("y", y, 16), 2**30)
    return _clamp(requantize_s64(acc, multiplier, shift), act_min, act_max)


def add_s16(
    x1, x2, *, input1_multiplier, input1_shift, input2_multiplier, input2_shift, left_shift=15,
    output_multiplier, output_shift, act_min=ACT_MIN, act_max=ACT_MAX,
):  # fmt: skip
    """x1 + x2 elementwise, each brought to a common scale: as `add_s8` with 15 bits to spare -> int16.

    The options are those of `add_params_s8(..., left_shift=15)`. Raises: ValueError unless x1 and x2 have one
    shape.
    """
    x1, x2 = _pair(x1, x2)
    one = requantize(x1 << left_shift, input1_multiplier, input1_shift).astype(np.int64)
    two = requantize(x2 << left_shift, input2_multiplier, input2_shift)
    return _clamp(requantize(one + two, output_multiplier, output_shift), act_min, act_max)


def mul_s16(x1, x2, multiplier, shift, *, act_min=ACT_MIN, act_max=ACT_MAX):
    """x1 x2 elementwise: clamp(requantize(x1 x2)) -> int16."""
    x1, x2 = _pair(x1, x2)
    return _clamp(requantize(x1 * x2, multiplier, shift), act_min, act_max)


def _sums(x, y, largest, bias=0):
    """x y^T, exact. Raises: ValueError where a sum of products up to `largest` could leave 48 bits."""
    bound = x.shape[-1] * largest + bias
    if bound >= 2 ** (SUM_BITS - 1):
        raise ValueError(f"a sum over K={x.shape[-1]} with |b| <= {bias} may reach {bound:,}, beyond 2^47")
    return (x.astype(np.float64) @ np.swapaxes(y, -1, -2).astype(np.float64)).astype(np.int64)  # below 2^53


def _pair(x1, x2):
    x1, x2 = check_integers("x1", x1, 16), check_integers("x2", x2, 16)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 has shape {list(x2.shape)}, but x1 has {list(x1.shape)}")
    return x1, x2


def _clamp(y, act_min, act_max):
    if not ACT_MIN <= act_min <= act_max <= ACT_MAX:
        raise ValueError(f"need -32768 <= act_min <= act_max <= 32767, got {act_min}, {act_max}")
    return np.clip(y, act_min, act_max).astype(np.int16)
