"""Operators with int16 activations, bit for bit: int8 weights, int64 sums, integers in, integers out.

Activations are symmetric (zero point 0, one scale per tensor), weights symmetric with one scale per output
channel, the bias int64 with scale s_x s_w. Source: the C code of CMSIS-NN (arXiv 1801.06601), which follows
the 16x8 convention of TFLite. Beside a sum of 48 bits a multiplier has 16 bits only, so that their product
fits int64; sums and products of single codes fit int32 and keep the multiplier of 32 bits. Functions are
straight lines between 513 points of a table, and softmax has two such tables. Layer norm and division are not
in CMSIS-NN: these forms are ours.
"""

import numpy as np

from ref.blocks.integer import integer_sqrt, quantize_multiplier, requantize
from ref.checks import check_integers
from ref.dims import dims

ACT_MIN, ACT_MAX = -(2**15), 2**15 - 1
SUM_BITS = 48
POINTS = 513  # of a table: every 128th code, and one beyond the last
_NORM_BITS = 14  # fraction bits of a normalised value in layernorm_s16
_EXP_RANGE = 10.0  # softmax_s16 tells exponents apart down to here


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


def rescale_s16(x, multiplier, shift):
    """The same numbers with another scale: clamp(requantize(x)) -> int16."""
    return _clamp(requantize(check_integers("x", x, 16), multiplier, shift), ACT_MIN, ACT_MAX)


def divide_s16(x1, x2, multiplier, shift):
    """x1 / x2 elementwise: the quotient of codes to 16 fraction bits, to nearest, requantised -> int16.

    multiplier, shift: of scale1 / (2^16 scale2 output scale). A quotient beyond 2^31 - 1, and x / 0, is
    2^31 - 1 with its sign; 0 / 0 is 0. Raises: ValueError unless both have one shape and shift <= 0.
    """
    x1, x2 = _pair(x1, x2)
    if int(shift) > 0:
        raise ValueError(f"shift must not be positive, got {shift}")
    p, q = np.abs(x1) << 16, np.abs(x2)
    size = np.where(q == 0, np.where(p == 0, 0, 2**31 - 1), (p + q // 2) // np.maximum(q, 1))
    signed = np.where((x1 < 0) == (x2 < 0), 1, -1) * np.minimum(size, 2**31 - 1)
    return _clamp(requantize(signed, multiplier, shift), ACT_MIN, ACT_MAX)


def make_lut_s16(fn, low, high, out_scale=2.0**-15):
    """The table of a real function over low..high: int16 [513], `table_s16` of its values in float32.

    Raises: ValueError unless low < high and out_scale is positive.
    """
    if not (np.isfinite([low, high, out_scale]).all() and low < high and out_scale > 0):
        raise ValueError(f"need low < high and a positive out_scale, got {low}, {high}, {out_scale}")
    low, step = np.float32(low), (np.float32(high) - np.float32(low)) / np.float32(POINTS - 1)
    at = low + step * np.arange(POINTS, dtype=np.float32)
    with np.errstate(all="ignore"):
        y, middle = (np.asarray(fn(v), np.float32) / np.float32(out_scale) for v in (at, at + step / 2))
    return table_s16(y, middle[:-1])


def table_s16(points, middles):
    """int16 [513] from values at the points and between them, in codes: each point is moved by half of the
    error that the straight line makes in the middle behind it, as TFLite does, in float32. What is not finite
    takes the nearest end; NaN is code 0's.
    """
    tame = lambda v: np.clip(np.where(np.isnan(v), 0, v), -1e9, 1e9).astype(np.float32)
    y, middles = tame(points), tame(middles)
    away = lambda v: np.trunc(v + np.copysign(0.5, v).astype(np.float64)).astype(np.float32)
    whole = away(y)
    error = away((y[1:] + whole[:-1]) / np.float32(2)) - away(middles)
    whole[:-1] -= away(error / np.float32(2))
    return np.clip(whole, ACT_MIN, ACT_MAX).astype(np.int16)


def lut_s16(x, table):
    """The straight line between table[x // 128 + 256] and the next point, to nearest, clamped -> int16."""
    return _clamp(_line(check_integers("x", x, 16), table), ACT_MIN, ACT_MAX)


def softmax_params_s16(*, input_scale, beta=1.0):
    """(multiplier, shift) of `softmax_s16`: what brings differences of codes to steps of 10 / 65535.

    Raises: ValueError unless input_scale beta is positive, finite and at most 2.5: a difference must stay
      within 32 bits.
    """
    real = float(input_scale) * float(beta) / (_EXP_RANGE / 65535)
    if not (np.isfinite(real) and real > 0 and input_scale > 0):
        raise ValueError(f"input_scale and beta must be positive and finite, got {input_scale}, {beta}")
    if real >= 2.0**14:
        raise ValueError(f"input_scale * beta must be below 2.5, got {input_scale * beta:g}")
    multiplier, shift = quantize_multiplier(max(real, 2.0**-31))
    return int(multiplier), int(shift)


def softmax_tables_s16():
    """(exp over -10..0, 1 / (1 + x) over 0..1), int16 [513] with scale 2^-15 each."""
    return make_lut_s16(np.exp, -_EXP_RANGE, 0.0), make_lut_s16(lambda x: 1 / (1 + x), 0.0, 1.0)


def softmax_s16(x, *, multiplier, shift):
    """Softmax of the rows of x [R, C] int16, with scale 2^-15 -> [R, C] int16.

    exp of differences to the row's maximum and the reciprocal of their sum, both by `softmax_tables_s16`;
    clamped to 0..32767, as TFLite does: where one entry holds everything, CMSIS-NN's 32,769 would wrap.
    Raises: ValueError for a row without entries or with more than 65,536.
    """
    dims(x=(x, "R C"))
    x = check_integers("x", x, 16)
    if not 1 <= x.shape[1] <= 2**16:
        raise ValueError(f"x must have 1..65536 columns, got {x.shape[1]}")
    exp, reciprocal = softmax_tables_s16()
    far = requantize(x - x.max(axis=1, keepdims=True), multiplier, shift).astype(np.int64)
    e = _line(np.maximum(far + ACT_MAX, ACT_MIN), exp)
    total = e.sum(axis=1, keepdims=True)
    bits = np.frexp(total.astype(np.float64))[1]  # of an int32, 32 - bits lead with 0
    part = ((total << (31 - bits)) + 2**13 >> 14) - 98304  # 1..2 becomes the whole range of int16
    inverse = _line(np.minimum(part, ACT_MAX), reciprocal)
    return _clamp((((e * inverse) >> (bits - 2)) + 1) >> 1, 0, ACT_MAX)


def layernorm_s16(x, gamma, beta, *, multiplier, shift, center=True):
    """gamma (x - mean) / std + beta over the last axis of x [..., C] -> int16, in integers throughout.

    n = (C x - sum x) 2^18 / floor(sqrt((C sum x^2 - (sum x)^2) 2^8)) is the normalised value with 14 fraction
    bits (division to nearest); y = requantize(round(n gamma / 2^15) + beta).
    Args: x int16; gamma [C] int16 in Q15, beta [C] int32 with 14 fraction bits, both in units of one scale g;
      multiplier, shift: of g / (2^14 output scale). A row of equal entries gives beta; there is no epsilon.
      center=False: RMS norm, the mean taken as 0.
    """
    dims(x=(x, "... C"), gamma=(gamma, "C"), beta=(beta, "C"))
    x, gamma = check_integers("x", x, 16), check_integers("gamma", gamma, 16)
    beta, C = check_integers("beta", beta, 32), x.shape[-1]
    if not 1 <= C <= 4096:
        raise ValueError(f"x must have 1..4096 channels, got {C}")
    total = x.sum(axis=-1, keepdims=True) * int(center)
    squares = (x * x).sum(axis=-1, keepdims=True)
    root = np.maximum(integer_sqrt((C * squares - total * total) << 8), 1)
    wide = (C * x - total) << (_NORM_BITS + 4)
    n = np.sign(wide) * ((np.abs(wide) + root // 2) // root)
    whole = n * gamma
    acc = (whole >> 15) + ((whole & 32767) > 16383 + (whole < 0)) + beta
    return _clamp(requantize(acc, multiplier, shift), ACT_MIN, ACT_MAX)


def norm_params_s16(gamma, beta, out_scale):
    """(gamma Q15 int16, beta int32, multiplier, shift) for `layernorm_s16` from real gamma, beta [C]."""
    gamma, beta = np.asarray(gamma, np.float64), np.asarray(beta, np.float64)
    if not (np.isfinite(gamma).all() and np.isfinite(beta).all()):
        raise ValueError("gamma and beta must be finite")
    g = max(np.abs(gamma).max(initial=0.0), 2.0**-20)
    q = np.clip(np.rint(gamma / g * 2**15), ACT_MIN, ACT_MAX).astype(np.int16)
    offset = np.clip(np.rint(beta / g * 2**_NORM_BITS), -(2**30), 2**30).astype(np.int32)
    return (q, offset, *(int(v) for v in quantize_multiplier(g / (2**_NORM_BITS * out_scale))))


def _line(x, table):
    """Straight lines between the points of a table, to nearest, ties up: int64."""
    table = np.asarray(table)
    if table.shape != (POINTS,) or table.dtype != np.int16:
        raise ValueError(f"table must be int16 [{POINTS}], got {table.dtype} {list(table.shape)}")
    table, at = table.astype(np.int64), (x >> 7) + 256
    return table[at] + (((table[at + 1] - table[at]) * (x & 127) + 64) >> 7)


def _sums(x, y, largest, bias=0):
    """x y^T, exact. Raises: ValueError where a sum of products up to `largest` could leave 48 bits."""
    check_sum(x.shape[-1], largest, bias)
    return (x.astype(np.float64) @ np.swapaxes(y, -1, -2).astype(np.float64)).astype(np.int64)  # below 2^53


def check_sum(k, largest, bias=0):
    """Raise ValueError where a sum of k products up to `largest` and a bias could leave 48 bits."""
    bound = k * largest + bias
    if bound >= 2 ** (SUM_BITS - 1):
        raise ValueError(f"a sum over K={k} with |b| <= {bias} may reach {bound:,}, beyond 2^47")


def _pair(x1, x2):
    x1, x2 = check_integers("x1", x1, 16), check_integers("x2", x2, 16)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 has shape {list(x2.shape)}, but x1 has {list(x1.shape)}")
    return x1, x2


def _clamp(y, act_min, act_max):
    if not ACT_MIN <= act_min <= act_max <= ACT_MAX:
        raise ValueError(f"need -32768 <= act_min <= act_max <= 32767, got {act_min}, {act_max}")
    return np.clip(y, act_min, act_max).astype(np.int16)
