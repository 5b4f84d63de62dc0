"""Operators of int8 networks on microcontrollers, bit for bit: integers in, integers out.

real = scale (code - zero point). Weights are symmetric, one scale per output channel; activations affine, one
scale per tensor; sums are int32, and `requantize` brings them back to int8. `input_offset` is minus the zero
point of the input and is added to its codes. Source: the C code of CMSIS-NN (arXiv 1801.06601), which follows
the int8 convention of TFLite and the fixed-point routines of gemmlowp. Layer norm is not in CMSIS-NN: this
form is ours.
"""

import numpy as np

from ref.blocks.integer import integer_sqrt, quantize_multiplier, requantize
from ref.checks import check_integers
from ref.dims import dims

ACT_MIN, ACT_MAX = -128, 127
_Q31_MAX = 2**31 - 1
# exp(-2^(i-2)) in Q31, i = 0..6: factors for the bits of the integer part of gemmlowp's exponential.
_EXP_FACTORS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
_NORM_BITS = 10  # fraction bits of a normalised value in layernorm_s8


def fully_connected_s8(
    x, w, b, *, input_offset, output_offset, multiplier, shift, act_min=-128, act_max=127, rounding="double"
):
    """y = clamp(requantize((x + input_offset) w^T + b) + output_offset), one multiplier for all outputs.

    Args: x [B, K] int8, w [N, K] int8, b [N] int32 or None; multiplier, shift: of `quantize_multiplier`.
    Returns: [B, N] int8. Raises: ValueError if an axis disagrees, codes are not integers in range, or
      K 127 255 + |b| reaches 2^31, so that a sum could leave int32.
    """
    return matmul_s8(x, w, b, multiplier, shift, input_offset=input_offset, output_offset=output_offset,
                     act_min=act_min, act_max=act_max, rounding=rounding)  # fmt: skip


def matmul_s8(
    x, w, b, multiplier, shift, *, input_offset, output_offset, act_min=-128, act_max=127, rounding="double"
):
    """The same with a multiplier and a shift for every output channel: x [M, K], w [N, K] -> [M, N] int8.

    multiplier, shift: [N] int32, or one for all.
    """
    dims(x=(x, "M K"), w=(w, "N K"), **({} if b is None else {"b": (b, "N")}))
    x, w = _codes("x", x), _codes("w", w)
    _check_offsets(input_offset=input_offset, output_offset=output_offset)
    acc = _accumulate(x + int(input_offset), w, b)
    return _finish(acc, multiplier, shift, output_offset, act_min, act_max, rounding)


def softmax_params_s8(*, input_scale, beta=1.0):
    """(multiplier, shift, diff_min) of `softmax_s8`: input_scale beta in 5 integer and 26 fraction bits.

    Raises: ValueError unless input_scale and beta are positive and finite and the shift is at least 0.
    """
    real = float(input_scale) * float(beta)
    if not (np.isfinite(real) and real > 0 and input_scale > 0):
        raise ValueError(f"input_scale and beta must be positive and finite, got {input_scale}, {beta}")
    multiplier, shift = (int(v) for v in quantize_multiplier(min(real * 2.0**26, 2.0**31 - 1)))
    if shift < 0:
        raise ValueError(f"input_scale * beta must be at least 2^-27, got {real:g}")
    return multiplier, shift, -int(31 * 2**26 // 2**shift)


def softmax_s8(x, *, multiplier, shift, diff_min):
    """Softmax of the rows of x [R, C] int8, with scale 1/256 and zero point -128 -> [R, C] int8.

    exp of differences to the row's maximum in Q5.26, their sum in Q12.19, one reciprocal by Newton's method.
    Entries further than diff_min below the maximum count as 0.
    Raises: ValueError for a row without entries or bad parameters.
    """
    dims(x=(x, "R C"))
    x = _codes("x", x)
    if not x.shape[1]:
        raise ValueError("x must have at least one column")
    if not (0 <= int(shift) <= 31 and 0 < int(multiplier) <= _Q31_MAX):
        raise ValueError(f"multiplier and shift must be in 1..2^31-1 and 0..31, got {multiplier}, {shift}")
    diff = x - x.max(axis=1, keepdims=True)
    near = diff >= int(diff_min)
    wide = np.where(near, diff, 0) << int(shift)
    if (wide < -(2**31)).any():
        raise ValueError(f"diff_min={diff_min} lets x << shift leave 32 bits")
    e = _exp_of_negative(_high_mul(wide, int(multiplier)))
    total = np.where(near, _rounding_shift(e, 12), 0).sum(axis=1, keepdims=True)
    if (total >= 2**31).any():
        raise ValueError(f"rows of {x.shape[1]} entries overflow the sum in Q12.19")
    headroom = 31 - (np.frexp(total.astype(np.float64))[1] - 1)  # leading zeros of an int32
    scale = _reciprocal((total << headroom) - 2**31)
    y = _rounding_shift(_high_mul(scale, e), 35 - headroom) - 128
    return np.where(near, np.clip(y, -128, 127), -128).astype(np.int8)


def add_s8(
    x1, x2, *, input1_offset, input1_multiplier, input1_shift, input2_offset, input2_multiplier, input2_shift,
    left_shift=20, output_offset, output_multiplier, output_shift, act_min=-128, act_max=127,
):  # fmt: skip
    """x1 + x2 elementwise, each brought to a common scale with `left_shift` bits to spare -> int8.

    Raises: ValueError unless x1 and x2 have one shape.
    """
    x1, x2 = _codes("x1", x1), _codes("x2", x2)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 has shape {list(x2.shape)}, but x1 has {list(x1.shape)}")
    one = requantize((x1 + int(input1_offset)) << left_shift, input1_multiplier, input1_shift)
    two = requantize((x2 + int(input2_offset)) << left_shift, input2_multiplier, input2_shift)
    total = one.astype(np.int64) + two
    return _finish(total, output_multiplier, output_shift, output_offset, act_min, act_max, "double")


def add_params_s8(scale1, scale2, out_scale, *, left_shift=20):
    """(m1, s1, m2, s2, m_out, s_out) for `add_s8`: both inputs at twice the larger scale, as TFLite does.

    scale2 < 0 gives the difference x1 - x2.
    """
    twice = 2 * max(scale1, abs(scale2))
    parts = []
    for s in (scale1, abs(scale2)):
        m, e = quantize_multiplier(s / twice)
        parts += [int(m) if s is scale1 or scale2 > 0 else -int(m), int(e)]
    m, e = quantize_multiplier(twice / (2.0**left_shift * out_scale))
    return (*parts, int(m), int(e))


def mul_s8(
    x1, x2, multiplier, shift, *, input1_offset, input2_offset, output_offset, act_min=-128, act_max=127
):
    """x1 x2 elementwise: requantize((x1 + input1_offset) (x2 + input2_offset)) + output_offset -> int8."""
    x1, x2 = _codes("x1", x1), _codes("x2", x2)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 has shape {list(x2.shape)}, but x1 has {list(x1.shape)}")
    product = (x1 + int(input1_offset)) * (x2 + int(input2_offset))
    return _finish(product, multiplier, shift, output_offset, act_min, act_max, "double")


def divide_s8(x1, x2, multiplier, shift, *, input1_offset, input2_offset, output_offset):
    """x1 / x2 elementwise: the quotient of codes to 16 fraction bits, to nearest, requantised -> int8.

    multiplier, shift: of scale1 / (2^16 scale2 output scale). x / 0 is 2^26 with the sign of x, 0 / 0 is 0.
    Not in CMSIS-NN: this form is ours.
    """
    x1, x2 = _codes("x1", x1), _codes("x2", x2)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 has shape {list(x2.shape)}, but x1 has {list(x1.shape)}")
    p, q = (x1 + int(input1_offset)) << 16, x2 + int(input2_offset)
    size = np.where(
        q == 0, np.where(p == 0, 0, 1 << 26), np.abs(_divide(np.abs(p), np.maximum(np.abs(q), 1)))
    )
    signed = np.where((p < 0) == (q < 0), size, -size)
    return _finish(signed, multiplier, shift, output_offset, ACT_MIN, ACT_MAX, "double")


def rescale_s8(x, multiplier, shift, *, input_offset, output_offset, act_min=-128, act_max=127):
    """The same numbers with another scale and zero point -> int8."""
    acc = _codes("x", x) + int(input_offset)
    return _finish(acc, multiplier, shift, output_offset, act_min, act_max, "double")


def layernorm_s8(x, gamma, beta, *, input_offset, multiplier, shift, output_offset, center=True):
    """gamma (x - mean) / std + beta over the last axis of x [..., C] -> int8, in integers throughout.

    n = (C x' - sum x') 2^18 / floor(sqrt((C sum x'^2 - (sum x')^2) 2^16)) is the normalised value with 10
    fraction bits (division to nearest); y = requantize(round(n gamma / 2^15) + beta) + output_offset.
    Args: x int8; gamma [C] int16 in Q15, beta [C] int32 with 10 fraction bits, both in units of one scale g;
      multiplier, shift: of g / (2^10 output scale). A row of equal entries gives beta; there is no epsilon.
      center=False: RMS norm, the mean taken as 0.
    """
    dims(x=(x, "... C"), gamma=(gamma, "C"), beta=(beta, "C"))
    x = _codes("x", x) + int(input_offset)
    gamma, beta = check_integers("gamma", gamma, 16), check_integers("beta", beta, 32)
    C = x.shape[-1]
    if not 1 <= C <= 4096:
        raise ValueError(f"x must have 1..4096 channels, got {C}")
    total = x.sum(axis=-1, keepdims=True) * int(center)
    squares = (x * x).sum(axis=-1, keepdims=True)
    root = np.maximum(integer_sqrt((C * squares - total * total) << 16), 1)
    n = _divide((C * x - total) << (_NORM_BITS + 8), root)
    acc = _rounding_shift(n * gamma, 15) + beta
    return _finish(acc, multiplier, shift, output_offset, ACT_MIN, ACT_MAX, "double")


def norm_params_s8(gamma, beta, out_scale):
    """(gamma Q15 int16, beta int32, multiplier, shift) for `layernorm_s8` from real gamma, beta [C]."""
    gamma, beta = np.asarray(gamma, np.float64), np.asarray(beta, np.float64)
    if not (np.isfinite(gamma).all() and np.isfinite(beta).all()):
        raise ValueError("gamma and beta must be finite")
    g = max(np.abs(gamma).max(initial=0.0), 2.0**-20)
    q = np.clip(np.rint(gamma / g * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    offset = np.clip(np.rint(beta / g * 2**_NORM_BITS), -(2**30), 2**30).astype(np.int32)
    return (q, offset, *(int(v) for v in quantize_multiplier(g / (2**_NORM_BITS * out_scale))))


def lut_s8(x, table):
    """table[x + 128]: any function of one int8 value as 256 bytes."""
    table = np.asarray(table)
    if table.shape != (256,) or table.dtype != np.int8:
        raise ValueError(f"table must be int8 [256], got {table.dtype} {list(table.shape)}")
    return table[_codes("x", x) + 128]


def make_lut_s8(fn, in_scale, in_zero, out_scale, out_zero):
    """The table of a real function: int8 [256]. What is not finite takes the nearest end; NaN is code 0's."""
    if not (np.isfinite(in_scale) and np.isfinite(out_scale) and in_scale > 0 and out_scale > 0):
        raise ValueError(f"in_scale and out_scale must be positive and finite, got {in_scale}, {out_scale}")
    with np.errstate(all="ignore"):
        y = np.asarray(fn(in_scale * (np.arange(-128, 128.0) - in_zero)), np.float64) / out_scale
    y = np.where(np.isnan(y), 0.0, y)
    return np.clip(np.rint(np.clip(y, -1e9, 1e9)) + out_zero, ACT_MIN, ACT_MAX).astype(np.int8)


def conv_s8(
    x, w, b, multiplier, shift, *, stride=1, padding="SAME", input_offset, output_offset, act_min=-128,
    act_max=127,
):  # fmt: skip
    """Convolution = patches, then `matmul_s8`: x [H, W, C], w [Co, kh, kw, C], b [Co] -> [H', W', Co] int8.

    padding "SAME" or "VALID"; a padded place holds -input_offset, the code of 0.
    """
    dims(x=(x, "H W C"), w=(w, "Co kh kw C"))
    w = np.asarray(w)
    patches = _patches(_codes("x", x), w.shape[1:3], stride, padding, -int(input_offset))
    y = matmul_s8(
        patches.reshape(-1, w[0].size), w.reshape(len(w), -1), b, multiplier, shift,
        input_offset=input_offset, output_offset=output_offset, act_min=act_min, act_max=act_max,
    )  # fmt: skip
    return y.reshape(*patches.shape[:2], len(w))


def depthwise_conv_s8(
    x, w, b, multiplier, shift, *, stride=1, padding="SAME", input_offset, output_offset, act_min=-128,
    act_max=127,
):  # fmt: skip
    """Each channel with its own filter: x [H, W, C], w [kh, kw, C], b [C] -> [H', W', C] int8."""
    dims(x=(x, "H W C"), w=(w, "kh kw C"), **({} if b is None else {"b": (b, "C")}))
    w = _codes("w", w)
    patches = _patches(_codes("x", x), w.shape[:2], stride, padding, -int(input_offset)) + int(input_offset)
    _check_sum(w.shape[0] * w.shape[1], b)
    acc = (patches * w).sum(axis=(2, 3)) + (0 if b is None else np.asarray(b, np.int64))
    return _finish(acc, multiplier, shift, output_offset, act_min, act_max, "double")


# Integer arithmetic


def _accumulate(x, w, b):
    """x w^T + b, exact. Raises: ValueError where a sum could leave int32."""
    _check_sum(x.shape[-1], b)
    acc = np.rint(x.astype(np.float64) @ w.astype(np.float64).T).astype(np.int64)  # exact below 2^53
    return acc + (0 if b is None else np.asarray(b, np.int64))


def _check_sum(k, b):
    bias = 0 if b is None else int(np.abs(np.asarray(b, np.int64)).max(initial=0))
    bound = k * 127 * 255 + bias
    if bound >= 2**31:
        raise ValueError(f"a sum over K={k} with |b| <= {bias} may reach {bound:,}, beyond int32 (2^31)")


def _finish(acc, multiplier, shift, output_offset, act_min, act_max, rounding):
    if not ACT_MIN <= act_min <= act_max <= ACT_MAX:
        raise ValueError(f"need -128 <= act_min <= act_max <= 127, got {act_min}, {act_max}")
    y = requantize(acc, multiplier, shift, rounding=rounding).astype(np.int64) + int(output_offset)
    return np.clip(y, act_min, act_max).astype(np.int8)


def _codes(name, x):
    """int64 copies of int8 codes; wider integers are accepted if they hold int8 values."""
    return check_integers(name, x, 8)


def _check_offsets(**offsets):
    for name, v in offsets.items():
        if not -128 <= int(v) <= 128:
            raise ValueError(f"{name} must be in -128..128, got {v}")


def _high_mul(a, b):
    """gemmlowp's saturating doubling high multiply: 2 a b / 2^32 to nearest."""
    return requantize(a, b, 0).astype(np.int64)


def _rounding_shift(x, places):
    """x / 2^places to nearest, halves away from zero; places may be an array."""
    places = np.asarray(places, np.int64)
    mask = (np.int64(1) << places) - 1
    x = np.asarray(x, np.int64)
    return (x >> places) + ((x & mask) > (mask >> 1) + (x < 0))


def _saturating_shift(x, places):
    return np.clip(np.asarray(x, np.int64) << places, -(2**31), _Q31_MAX)


def _exp_of_negative(a):
    """exp(a) in Q31 for a <= 0 in Q5.26: a polynomial on (-1/4, 0], then a factor for every bit above."""
    quarter = (a & (2**24 - 1)) - 2**24
    rest = quarter - a
    x = (quarter << 5) + 2**28
    x2 = _high_mul(x, x)
    x4 = _rounding_shift(_high_mul(x2, x2), 2)
    tail = _rounding_shift(_high_mul(x4 + _high_mul(x2, x), 715827883) + x2, 1)
    y = 1895147668 + _high_mul(1895147668, x + tail)
    for i, factor in enumerate(_EXP_FACTORS):
        y = np.where(rest & (1 << (24 + i)), _high_mul(y, factor), y)
    return np.where(a == 0, _Q31_MAX, y)


def _reciprocal(a):
    """1 / (1 + a) in Q31 for a in [0, 1) in Q31: three steps of Newton's method."""
    total = a + _Q31_MAX
    half = np.where(total >= 0, (total + 1) // 2, -((1 - total) // 2))
    x = 1515870810 + _high_mul(half, -1010580540)
    for _ in range(3):
        x = x + _saturating_shift(_high_mul(x, 2**29 - _high_mul(half, x)), 2)
    return _saturating_shift(x, 1)


def _divide(a, b):
    """a / b to nearest, halves away from zero, for b > 0."""
    return np.sign(a) * ((np.abs(a) + b // 2) // b)


def _patches(x, kernel, stride, padding, blank):
    """[H', W', kh, kw, C]: the patch under every output place."""
    if padding not in ("SAME", "VALID") or stride < 1:
        raise ValueError(
            f'padding must be "SAME" or "VALID" and stride at least 1, got {padding!r}, {stride}'
        )
    pads = []
    for n, k in zip(x.shape[:2], kernel, strict=True):
        total = max((-(-n // stride) - 1) * stride + k - n, 0) if padding == "SAME" else 0
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, (*pads, (0, 0)), constant_values=blank)
    if any(n < k for n, k in zip(x.shape[:2], kernel, strict=True)):
        raise ValueError(f"w of {kernel[0]} x {kernel[1]} does not fit x of {x.shape[0]} x {x.shape[1]}")
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(0, 1))[::stride, ::stride]
    return np.moveaxis(windows, 2, -1)
