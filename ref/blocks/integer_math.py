"""exp, erf, GELU, softmax and layer norm by polynomials: in floats, and in integers alone.

Source: Kim et al. 2021 (I-BERT).
"""

import numpy as np

from ref.blocks.integer import integer_sqrt
from ref.dims import dims, float64

EXP = (0.3585, 1.353, 0.344)  # a (p + b)^2 + c, exp on (-ln 2, 0]
ERF = (-0.2888, -1.769, 1.0)  # a (min(x, -b) + b)^2 + c, erf on x >= 0
SHIFT = 30  # exp is kept with so many bits before it is divided by 2^z
NORM_BITS = 14  # bits of the weights and of the normalised values of the integer layer norm


def i_exp(x):
    """exp(x) for x <= 0: 2^-z (0.3585 (p + 1.353)^2 + 0.344), x = -z ln 2 + p. Error below 2.2e-3."""
    x = float64(x)
    if not (x <= 0).all():
        raise ValueError("x must not be positive or NaN: subtract the maximum first")
    x = np.maximum(x, -2000.0)  # from -745 down exp is 0 in float64
    z = np.floor(-x / np.log(2))
    a, b, c = EXP
    return np.ldexp(a * (x + z * np.log(2) + b) ** 2 + c, -z.astype(int))


def i_erf(x):
    """sign(x) (-0.2888 (min(|x|, 1.769) - 1.769)^2 + 1), a polynomial for erf."""
    a, b, c = ERF
    x = float64(x)
    return np.sign(x) * (a * (np.minimum(np.abs(x), -b) + b) ** 2 + c)


def i_gelu(x):
    """x (1 + i_erf(x / sqrt 2)) / 2; error below 0.0185."""
    x = float64(x)
    return x * (1 + i_erf(x / np.sqrt(2))) / 2


def i_softmax(scores):
    """Softmax over the last axis with `i_exp` for exp: it sums to 1; a row of -inf alone gives 0."""
    scores = float64(scores)
    top = scores.max(axis=-1, keepdims=True)
    e = i_exp(scores - np.where(top == -np.inf, 0.0, top))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total > 0, total, 1.0)


def i_layer_norm(x, weight, bias, *, eps=1e-5):
    """Layer norm whose root is four Newton steps from a power of two. x [..., C], weight, bias [C]."""
    dims(x=(x, "... C"), weight=(weight, "C"), bias=(bias, "C"))
    x = float64(x)
    centred = x - x.mean(axis=-1, keepdims=True)
    var = (centred**2).mean(axis=-1, keepdims=True) + eps
    root = np.exp2(np.ceil(np.log2(var) / 2))
    for _ in range(4):  # from within a factor 2: relative error 0.25, 0.025, 3e-4, 5e-8
        root = (root + var / root) / 2
    return centred / root * weight + bias


def i_exp_int(q, scale):
    """(q, scale) of exp(scale q) for integers q <= 0, in integers alone (Kim et al. 2021)."""
    q = _integers(q, scale)
    if q.size and q.max() > 0:
        raise ValueError("q must not be positive: subtract the maximum first")
    ln2 = int(np.log(2) / scale)
    z = -q // ln2
    value, unit = _polynomial(q + z * ln2, scale, EXP)
    return value << (SHIFT - np.minimum(z, SHIFT)), unit / 2**SHIFT


def i_gelu_int(q, scale):
    """(q, scale) of GELU of scale q, in integers alone."""
    q = _integers(q, scale)
    inner = scale / np.sqrt(2)
    clipped = np.minimum(np.abs(q), int(-ERF[1] / inner))
    value, unit = _polynomial(clipped, inner, ERF)
    return q * (np.sign(q) * value + int(1 / unit)), scale * unit / 2


def i_softmax_int(q, scale):
    """(q, 2^-15) of softmax over the last axis of scale q, in integers alone."""
    q = _integers(q, scale)
    e, _ = i_exp_int(q - q.max(axis=-1, keepdims=True), scale)
    e = e >> 15  # 2^47 in a sum of any length that fits memory
    return (e << 15) // e.sum(axis=-1, keepdims=True), 2.0**-15


def i_layer_norm_int(q, scale, weight, bias):
    """(q, scale) of layer norm over the last axis of scale q, its root by `integer_sqrt`.

    The input's scale cancels. weight and bias [C] are rounded to the output's grid.
    """
    q = _integers(q, scale)
    dims(q=(q, "... C"), weight=(weight, "C"), bias=(bias, "C"))
    centred = q - np.rint(q.mean(axis=-1, keepdims=True)).astype(np.int64)
    root = integer_sqrt((centred**2).sum(axis=-1, keepdims=True) * 2**16 // q.shape[-1])  # 2^8 deviations
    norm = (centred << (NORM_BITS + 8)) // np.maximum(root, 1)
    fixed = lambda v, places: np.rint(np.ldexp(float64(v), places)).astype(np.int64)
    return norm * fixed(weight, NORM_BITS) + fixed(bias, 2 * NORM_BITS), 2.0 ** (-2 * NORM_BITS)


def _polynomial(q, scale, coefficients):
    """(q, scale) of a (scale q + b)^2 + c, in integers."""
    a, b, c = coefficients
    unit = a * scale**2
    return (q + int(np.floor(b / scale))) ** 2 + int(np.floor(c / unit)), unit


def _integers(q, scale):
    q = np.asarray(q)
    if q.dtype.kind not in "iu":
        raise ValueError(f"q must hold integers, got {q.dtype}")
    if not 1e-4 <= scale <= 0.1:
        raise ValueError(f"scale must be in [1e-4, 0.1], for the polynomials to have room, got {scale}")
    return q.astype(np.int64)
