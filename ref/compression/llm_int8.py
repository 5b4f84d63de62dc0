"""Vector-wise int8 products with the outlier columns apart: LLM.int8().

Source: Dettmers et al. 2022 (arXiv 2208.07339): section 2.1 (absmax and zeropoint quantisation), equations 7
and 8 (vector-wise and mixed-precision products), section 4 (what an outlier feature is). Where the paper is
silent we do what its library (bitsandbytes) does, and say so. The integers and their scales are computed in
float32, since the number format is the subject; what follows the integer product is float64.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.quantize import affine_params, check_finite, known, quantize, symmetric_params
from ref.dims import dims, float64
from ref.example import Example

__all__ = [
    "Int8Linear",
    "OutlierStats",
    "convert_linear",
    "dequantize_matmul",
    "example",
    "int8_linear_bytes",
    "int8_matmul",
    "int8_share",
    "llm_int8_linear",
    "llm_int8_linear_vjp",
    "outlier_feature_stats",
    "quantization_ladder",
    "quantize_rowwise",
]

LEVELS = 127  # the grid is -127..127; -128 never occurs
MAX_K = (2**31 - 1) // LEVELS**2  # 133,144: more terms could overflow the int32 sum
SCHEMES = ("absmax", "zeropoint", "row", "vector")
# A row whose maximum is smaller than this has 127 / maximum beyond float32: it counts as a row of zeros.
SMALLEST = np.float32(LEVELS / np.finfo(np.float32).max)


class Int8Linear(NamedTuple):
    """A linear layer y = x W^T + b in int8: w_q [N, K] int8, w_absmax [N] float32, the largest |W| of a row.

    bias [N] or None. float_weight [N, K] or None: the original weights, which then multiply the outlier
    columns; without them the dequantised ones, w_q w_absmax / 127, do.
    """

    w_q: np.ndarray
    w_absmax: np.ndarray
    bias: np.ndarray | None = None
    float_weight: np.ndarray | None = None


class OutlierStats(NamedTuple):
    """Outlier features of a network: dims, the sorted dimensions that are; shares [d] of every dimension."""

    dims: np.ndarray
    layer_share: np.ndarray
    token_share: np.ndarray


def quantize_rowwise(x, *, threshold=0.0):
    """Every row on its own scale, the outlier columns taken out: x ~ x_q absmax / 127.

    Args: x [..., K], finite. threshold: |x| >= threshold is an outlier, and the column that holds one
        anywhere (all leading axes count as tokens) is an outlier column; 0 = none.
    Returns: x_q int8 [..., K], 0 in the outlier columns; absmax float32 [...], over the elements of the row
      that are not outliers (those of an outlier column that are not count: the library's choice);
      outlier_mask bool [K].
    Raises: ValueError if x is not finite or threshold negative.
    """
    n = check_rows(x, threshold)
    x = np.asanyarray(x, np.float32)
    mask = np.zeros(n["K"], bool)
    if threshold > 0:
        outlier = np.abs(x) >= np.float32(threshold)
        mask = outlier.any(axis=tuple(range(x.ndim - 1)))
        x = np.where(outlier, np.float32(0), x)
    absmax = np.abs(x).max(axis=-1)
    q = np.rint(x * _levels_over(absmax)[..., None])  # x (127 / absmax), in this order: the other flips ties
    return np.where(mask, 0, q).astype(np.int8), absmax, mask


def int8_matmul(x_q, w_q):
    """x_q w_q^T, exact: x_q int8 [..., K], w_q int8 [N, K] -> int32 [..., N].

    Raises: ValueError for another dtype, or K > 133,144, where an int32 sum could overflow.
    """
    check_int8(x_q, w_q)
    return (float64(x_q) @ float64(w_q).T).astype(np.int32)  # sums below 2^31 are exact in float64


def dequantize_matmul(acc, x_absmax, w_absmax, *, bias=None):
    """acc x_absmax w_absmax / 127^2 + bias: acc [..., N], x_absmax [...], w_absmax [N] -> [..., N] float64.

    The library multiplies by 6.200124e-05 where 1 / 127^2 is 6.200012e-05; we use the exact value.
    """
    check_scales(acc, x_absmax, w_absmax, bias)
    x_absmax, w_absmax = float64(x_absmax, w_absmax)
    y = float64(acc) * (x_absmax[..., None] * w_absmax) / LEVELS**2
    return y if bias is None else y + float64(bias)


def convert_linear(w, bias=None, *, keep_float=False):
    """Int8Linear of a float layer: w [N, K], bias [N] or None. keep_float keeps w as float_weight."""
    n = dims(w=(w, "N K"))
    if bias is not None:
        dims(w=(w, "N K"), bias=(bias, "N"))
    check_finite("w", w)
    check_terms(n["K"])
    w_q, w_absmax, _ = quantize_rowwise(w)
    return Int8Linear(w_q, w_absmax, bias, w if keep_float else None)


def llm_int8_linear(x, layer: Int8Linear, *, threshold=6.0, max_outliers=None):
    """x W^T + b in int8, but for the columns of x that hold an outlier, which are multiplied in float.

    Args: x [..., K], finite, any float dtype. threshold: what is an outlier; 0 or infinity: nothing is.
      max_outliers: how many columns accel gathers at most; ref gathers what there is.
    Returns: [..., N] in x's dtype.
    Raises: ValueError naming the argument at fault.
    """
    check_layer(x, layer, max_outliers)
    x_q, x_absmax, mask = quantize_rowwise(x, threshold=threshold)
    y = dequantize_matmul(int8_matmul(x_q, layer.w_q), x_absmax, layer.w_absmax, bias=layer.bias)
    if mask.any():
        columns = np.flatnonzero(mask)
        y = y + float64(x)[..., columns] @ _float_weight(layer)[:, columns].T
    return y.astype(np.asarray(x).dtype)


def llm_int8_linear_vjp(layer: Int8Linear, grad_y):
    """(grad_x, grad_bias): grad_y What and the sum over tokens, the rounding of x passed straight through.

    Args: grad_y [..., N]. Returns: grad_x [..., K], grad_bias [N], float64. What is float_weight if the layer
      has it, else the dequantised weights, over all K columns. With float weights to be trained their
      gradient is grad_y^T x; the library also has a form of it in int8, which is left out.
    """
    n = dims(grad_y=(grad_y, "... N"), w_q=(layer.w_q, "N K"))
    grad_y = float64(grad_y)
    return grad_y @ _float_weight(layer), grad_y.reshape(-1, n["N"]).sum(axis=0)


def quantization_ladder(x, w, *, scheme, decompose=False, threshold=6.0):
    """x w^T through one rung of the ladder: x [..., K], w [N, K] -> [..., N] float64.

    scheme: "absmax" one scale for x and one for w; "zeropoint" the same with an offset each (the grid is not
      wasted on a side that is empty); "row" a scale a row of x, one for w; "vector" a scale a row of x and
      a row of w.
    decompose: outlier columns of x, by `threshold`, are multiplied in float by the float weights.
    Raises: ValueError for an unknown scheme, or as `quantize_rowwise`.
    """
    n = check_ladder(x, w, scheme, threshold)
    rows, w = float64(x).reshape(-1, n["K"]), float64(w)
    mask = np.zeros(n["K"], bool)
    kept = rows
    if decompose and threshold > 0:
        outlier = np.abs(rows) >= threshold
        mask, kept = outlier.any(axis=0), np.where(outlier, 0.0, rows)
    if scheme == "zeropoint":
        y = _zeropoint_product(kept, w, mask)
    else:
        x_axis, w_axis = {"absmax": (None, None), "row": (0, None), "vector": (0, 0)}[scheme]
        x_q, s_x = _symmetric(kept, x_axis)
        w_q, s_w = _symmetric(w, w_axis)
        y = float64(int8_matmul(np.where(mask, 0, x_q).astype(np.int8), w_q)) * s_x * s_w.reshape(1, -1)
    y = y + np.where(mask, rows, 0.0) @ w.T
    return y.reshape(*n["..."], n["N"])


def outlier_feature_stats(hidden, *, magnitude=6.0, layer_fraction=0.25, token_fraction=0.06):
    """Which dimensions are outlier features: |value| >= magnitude in enough layers and enough positions.

    Args: hidden [layers, T, d]: hidden states of one text.
    Returns: OutlierStats: layer_share[i], the share of layers where dimension i reaches the magnitude
      anywhere; token_share[i], the share of all positions of all layers where it does; dims, where both
      are at least the given fractions. Source: the paper's section 4.
    """
    dims(hidden=(hidden, "layers T d"))
    large = np.abs(float64(hidden)) >= magnitude
    layer_share, token_share = large.any(axis=1).mean(axis=0), large.mean(axis=(0, 1))
    chosen = (layer_share >= layer_fraction) & (token_share >= token_fraction)
    return OutlierStats(np.flatnonzero(chosen), layer_share, token_share)


def int8_linear_bytes(n, k, *, bias=True, float_columns=0):
    """Bytes of a layer: n k int8, 4 n for the scales, 2 n for a 16-bit bias, 2 n a column kept in 16 bits."""
    return n * k + 4 * n + 2 * n * int(bias) + 2 * n * float_columns


def int8_share(outliers, k):
    """Share of the multiply-adds that stay in int8: 1 - outliers / k."""
    if not 0 <= outliers <= k:
        raise ValueError(f"outliers must be in 0..k, got {outliers} with k={k}")
    return 1 - outliers / k


def check_rows(x, threshold):
    """Raise ValueError for a bad call of `quantize_rowwise`; the axes."""
    n = dims(x=(x, "... K"))
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if x.size == 0:
        raise ValueError(f"x must not be empty, got shape {list(x.shape)}")
    check_finite("x", x)
    return n


def check_terms(k, most=MAX_K):
    """Raise ValueError if a sum of k products could overflow int32."""
    if k > most:
        raise ValueError(f"K = {k} products of int8 may overflow int32; at most {most} are safe")


def check_int8(x_q, w_q):
    """Raise ValueError for a bad call of `int8_matmul`; the axes."""
    n = dims(x_q=(x_q, "... K"), w_q=(w_q, "N K"))
    for name, q in (("x_q", x_q), ("w_q", w_q)):
        if q.dtype != np.int8:
            raise ValueError(f"{name} must be int8, got dtype {q.dtype}")
    check_terms(n["K"])
    return n


def check_scales(acc, x_absmax, w_absmax, bias):
    """Raise ValueError unless the scales fit the integers."""
    dims(acc=(acc, "... N"), w_absmax=(w_absmax, "N"), x_absmax=(x_absmax, "..."))
    if bias is not None:
        dims(acc=(acc, "... N"), bias=(bias, "N"))


def check_layer(x, layer, max_outliers):
    """Raise ValueError unless the layer is whole and fits x; the axes."""
    n = dims(x=(x, "... K"), w_q=(layer.w_q, "N K"), w_absmax=(layer.w_absmax, "N"))
    if layer.bias is not None:
        dims(w_q=(layer.w_q, "N K"), bias=(layer.bias, "N"))
    if layer.float_weight is not None:
        dims(w_q=(layer.w_q, "N K"), float_weight=(layer.float_weight, "N K"))
    if layer.w_q.dtype != np.int8:
        raise ValueError(f"layer.w_q must be int8, got dtype {layer.w_q.dtype}")
    if max_outliers is not None and max_outliers < 1:
        raise ValueError(f"max_outliers must be None or at least 1, got {max_outliers}")
    return n


def check_ladder(x, w, scheme, threshold):
    """Raise ValueError for a bad call of `quantization_ladder`; the axes."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    check_rows(x, threshold)
    if known(w):
        check_finite("w", w)
    n = dims(x=(x, "... K"), w=(w, "N K"))
    # with offsets the factors reach 255
    check_terms(n["K"], (2**31 - 1) // 255**2 if scheme == "zeropoint" else MAX_K)
    return n


def _levels_over(absmax):
    """127 / absmax in float32, 0 for a row of zeros."""
    ok = absmax >= SMALLEST
    return np.where(ok, np.float32(LEVELS) / np.where(ok, absmax, np.float32(1)), np.float32(0))


def _float_weight(layer):
    """The weights that multiply the outlier columns, float64 [N, K]."""
    if layer.float_weight is not None:
        return float64(layer.float_weight)
    return float64(layer.w_q) * float64(layer.w_absmax)[:, None] / LEVELS


def _symmetric(x, axis):
    """(int8, scale) of x [T, K] on the narrow grid; scale [1, 1], or [T, 1] with a scale a row."""
    absmax = np.abs(x).max(axis=None if axis is None else 1)
    scale = symmetric_params(absmax)
    return quantize(x, scale, 0 * absmax, qmin=-LEVELS, qmax=LEVELS, axis=axis), np.reshape(scale, (-1, 1))


def _zeropoint_product(x, w, mask):
    """s_x s_w sum (x_q - z_x)(w_q - z_w), one scale and offset each; masked columns are left out."""
    parts = []
    for a in (x, w):
        scale, zero = affine_params(a.min(), a.max(), signed=True)
        parts.append((float64(quantize(a, scale, zero, qmin=-128, qmax=127)) - zero, scale))
    (x_q, s_x), (w_q, s_w) = parts
    return s_x * s_w * (np.where(mask, 0.0, x_q) @ w_q.T)


def example(seed=0):
    """Hidden states of SmolLM2 with unit root mean square, as its layers see them, against drawn weights."""
    from ref.data import hidden_states

    x = hidden_states("early")[seed : seed + 16]
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True))
    rng = np.random.default_rng(seed)
    w, bias = rng.standard_normal((24, x.shape[-1])) / 24, rng.standard_normal(24)
    layer = convert_linear(w, bias)
    x_q, x_absmax, _ = quantize_rowwise(x, threshold=6.0)
    # No diff_args where x is rounded: the true derivative of a step is 0, what is passed through is 1.
    return [
        Example("quantize_rowwise", (x,), {"threshold": 6.0}),
        Example("int8_matmul", (x_q, layer.w_q)),
        Example("dequantize_matmul", (int8_matmul(x_q, layer.w_q), x_absmax, layer.w_absmax), {}, (1, 2)),
        Example("llm_int8_linear", (x, layer), {"threshold": 6.0}),
        Example("llm_int8_linear", (x, layer), {"threshold": 6.0, "max_outliers": 16}),
        Example("llm_int8_linear_vjp", (layer, rng.standard_normal((16, 24))), {}, (1,)),
        Example("quantization_ladder", (x, w), {"scheme": "zeropoint", "decompose": True}),
    ]
