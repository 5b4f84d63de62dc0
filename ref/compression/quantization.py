"""Quantisation: numbers on a grid of few bits, calibrated afterwards or learned in training.

Sources: the survey arXiv 2307.07982; PyTorch's observers for conventions; Esser et al. 2020 (LSQ); Kim et al.
2021 (I-BERT) for integer-only functions; Li and Liu 2016 (ternary), Rastegari et al. 2016 (binary), Zadeh et
al. 2020 (GOBO), Shen et al. 2020 (Q-BERT, Hessian scores). The quantisers themselves are shared:
ref/blocks/quantize.py and ref/blocks/integer.py.
"""

import numpy as np

from ref.blocks.integer import integer_sqrt, pack_bits, quantize_multiplier, requantize, unpack_bits
from ref.blocks.integer_math import (
    i_erf,
    i_exp,
    i_exp_int,
    i_gelu,
    i_gelu_int,
    i_layer_norm,
    i_layer_norm_int,
    i_softmax,
    i_softmax_int,
)
from ref.blocks.quantize import (
    RangeState,
    affine_params,
    check_finite,
    dequantize,
    fake_quantize,
    fake_quantize_vjp,
    grid,
    init_range,
    lsq_quantize,
    lsq_quantize_vjp,
    quantize,
    symmetric_params,
    update_range,
)
from ref.dims import dims, float64
from ref.example import Example

__all__ = [
    "RangeState", "affine_params", "binarize", "codebook", "dequantize", "example", "fake_quantize",
    "fake_quantize_vjp", "few_bits_vjp", "grid", "hessian_bit_plan", "hessian_top_eigenvalue",
    "i_erf", "i_exp", "i_exp_int", "i_gelu", "i_gelu_int", "i_layer_norm", "i_layer_norm_int",
    "i_softmax", "i_softmax_int", "init_range", "integer_linear", "integer_sqrt", "kl_range",
    "lsq_quantize", "lsq_quantize_vjp", "mse_range", "pack_bits", "quantize", "quantize_multiplier",
    "quantized_bytes", "quantized_linear", "requantize", "symmetric_params", "ternarize",
    "unpack_bits", "update_range",
]  # fmt: skip


def mse_range(x, *, bits=8, symmetric=True, candidates=100):
    """(lo, hi): of `candidates` ranges, shrunk in equal steps, the one with least squared error."""
    _check_tensor(x)
    x = float64(x)
    lo, hi = (-np.abs(x).max(), np.abs(x).max()) if symmetric else (min(x.min(), 0.0), max(x.max(), 0.0))
    best = (np.inf, lo, hi)
    for f in np.arange(candidates, 0, -1) / candidates:
        error = ((x - _on_grid(x, f * lo, f * hi, bits, symmetric)) ** 2).sum()
        if error < best[0]:
            best = (error, f * lo, f * hi)
    return float(best[1]), float(best[2])


def kl_range(x, *, bits=8, bins=2048):
    """(-t, t): the clip whose quantised histogram of |x| is nearest in KL to the clipped one.

    The tail is put into the last bin that is kept; thresholds below 2^(bits - 1) bins are not tried.
    """
    _check_tensor(x)
    levels, top = 2 ** (bits - 1), np.abs(float64(x)).max()
    if bins < levels:
        raise ValueError(f"bins must be at least {levels} for {bits} bits, got {bins}")
    counts, edges = np.histogram(np.abs(x), bins=bins, range=(0, top or 1.0))
    best = (np.inf, top)
    for n in range(levels, bins + 1):
        p = counts[:n].astype(np.float64)
        group = np.arange(n) * levels // n  # bins of one level share their mass
        used = p > 0
        mass, size = np.bincount(group, p), np.bincount(group, used)
        q = np.where(used, mass[group] / np.maximum(size[group], 1), 0.0)
        p[-1] += counts[n:].sum()
        p, q = p / p.sum(), q / max(q.sum(), 1e-300)
        on = p > 0
        kl = (p[on] * np.log(p[on] / np.maximum(q[on], 1e-12))).sum()
        if kl < best[0]:
            best = (kl, edges[n])
    return float(-best[1]), float(best[1])


def quantized_linear(x, w_q, w_scale, bias=None, *, x_scale, x_zero):
    """x on its int8 grid times w_q in integers, scaled back: x [..., K], w_q [N, K] int8 -> [..., N] float64.

    Args: w_scale [] or [N], of symmetric weights; x_scale, x_zero []: x_q = rint(x / x_scale) + x_zero in
      -128..127. The zero point costs one correction an output, known beforehand.
    """
    x_q = quantize(x, np.asarray(x_scale), np.asarray(x_zero), qmin=-128, qmax=127)
    y = float64(x_scale) * float64(w_scale) * _integer_product(x_q, w_q, x_zero)
    return y if bias is None else y + bias


def integer_linear(x_q, w_q, bias_q, *, x_zero, multiplier, shift, out_zero, qmin=-128, qmax=127):
    """clip(requantize(sum (x_q - x_zero) w_q + bias_q) + out_zero), all integers: int8 [..., N].

    Args: x_q [..., K], w_q [N, K] int8, bias_q [N] int32 or None (scale s_x s_w); multiplier, shift [] or
      [N]: s_x s_w / s_y, see `quantize_multiplier`.
    Raises: ValueError for arrays that are not integers, or K so long that int32 could overflow.
    """
    acc = _integer_product(x_q, w_q, x_zero)
    acc = acc if bias_q is None else acc + bias_q
    return np.clip(requantize(acc, multiplier, shift) + out_zero, qmin, qmax).astype(np.int8)


def ternarize(w):
    """(w_hat, alpha, delta): alpha sign(w) where |w| > delta = 0.7 mean |w|, else 0; alpha their mean."""
    _check_tensor(w, "w")
    w = float64(w)
    delta = 0.7 * np.abs(w).mean()
    big = np.abs(w) > delta
    alpha = np.abs(w)[big].mean() if big.any() else 0.0
    return alpha * np.sign(w) * big, float(alpha), float(delta)


def binarize(w):
    """(w_hat, alpha): alpha sign(w) with alpha = mean |w| and sign(0) = 1."""
    _check_tensor(w, "w")
    w = float64(w)
    alpha = np.abs(w).mean()
    return np.where(w >= 0, alpha, -alpha), float(alpha)


def few_bits_vjp(w, grad_out):
    """The straight-through gradient of `ternarize` and `binarize`: grad_out where |w| <= 1, else 0."""
    return np.where(np.abs(w) <= 1, float64(grad_out), 0.0)


def codebook(w, *, bits=3, outliers=4.0, iterations=25):
    """(w_hat, centroids [2^bits], indices, outlier mask): k-means on the bulk, outliers kept as they are.

    An outlier is more than `outliers` standard deviations from the mean (GOBO's bulk is nearly normal).
    Centroids start at equal shares of the sorted bulk.
    """
    _check_tensor(w, "w")
    w = float64(w)
    far = np.abs(w - w.mean()) > outliers * w.std()
    bulk = np.sort(w[~far])
    parts = np.array_split(bulk, 2**bits)
    centroids = np.array([p.mean() if len(p) else bulk[-1] for p in parts])
    for _ in range(iterations):
        place = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, bulk)
        count = np.bincount(place, minlength=2**bits)
        centroids = np.where(count, np.bincount(place, bulk, 2**bits) / np.maximum(count, 1), centroids)
        centroids = np.sort(centroids)
    indices = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, w).astype(np.uint8)
    return np.where(far, w, centroids[indices]), centroids, indices, far


def hessian_top_eigenvalue(hvp, size, *, iterations=100, seed=0):
    """The eigenvalue of largest size of a symmetric operator hvp(v) -> H v on [size], by power iteration."""
    v = np.random.default_rng(seed).standard_normal(size)
    for _ in range(iterations):
        v = v / np.linalg.norm(v)
        moved = float64(hvp(v))
        value = float(v @ moved)
        if not np.linalg.norm(moved) > 0:
            return 0.0
        v = moved
    return value


def hessian_bit_plan(scores, sizes, errors, *, budget_bytes, candidates=(2, 4, 8)):
    """Bits of each layer [layers]: from the fewest up, the step that buys most score * error a byte first.

    Args: scores [layers], a layer's sensitivity (Q-BERT: mean + standard deviation of its top eigenvalue);
      sizes [layers], weights; errors [layers, candidates], ||W - W^||^2 at each of the rising candidates.
    Raises: ValueError if even the fewest bits exceed the budget.
    """
    n = dims(scores=(scores, "layers"), sizes=(sizes, "layers"), errors=(errors, f"layers {len(candidates)}"))
    at, sizes = np.zeros(n["layers"], int), np.asarray(sizes)
    spent = lambda: sum(-(-int(s) * candidates[i] // 8) for s, i in zip(sizes, at, strict=True))
    if spent() > budget_bytes:
        raise ValueError(f"budget_bytes={budget_bytes} is below the {spent()} bytes of {candidates[0]} bits")
    while True:
        steps = []
        for l, i in enumerate(at):
            if i + 1 < len(candidates):
                more = -(-int(sizes[l]) * candidates[i + 1] // 8) - -(-int(sizes[l]) * candidates[i] // 8)
                if spent() + more <= budget_bytes:
                    steps.append((scores[l] * (errors[l][i] - errors[l][i + 1]) / max(more, 1), -l))
        if not steps:
            return np.array([candidates[i] for i in at])
        at[-max(steps)[1]] += 1


def quantized_bytes(shape, *, bits, group=None, scale_bytes=4, zero_bytes=0):
    """Bytes of a weight [out, in]: packed bits, and a scale (and zero) for it or for each group of inputs."""
    rows, cols = shape
    if group is not None and (group < 1 or cols % group):
        raise ValueError(f"group must divide the {cols} inputs, got {group}")
    groups = 1 if group is None else rows * cols // group
    return -(-rows * cols * bits // 8) + groups * (scale_bytes + zero_bytes)


def _on_grid(x, lo, hi, bits, symmetric):
    if symmetric:
        scale, zero = symmetric_params(max(hi, -lo), bits=bits), np.zeros((), np.int32)
        qmin, qmax = grid(bits, signed=True, narrow=True)
    else:
        (scale, zero), (qmin, qmax) = affine_params(lo, hi, bits=bits), grid(bits, signed=False)
    return fake_quantize(x, scale, zero, qmin=qmin, qmax=qmax)


def _integer_product(x_q, w_q, x_zero):
    """sum_k (x_q - x_zero) w_q, int64, checked to fit int32."""
    K = dims(x_q=(x_q, "... K"), w_q=(w_q, "N K"))["K"]
    if np.asarray(x_q).dtype.kind not in "iu" or np.asarray(w_q).dtype.kind not in "iu":
        raise ValueError("x_q and w_q must hold integers")
    if K * 255 * 127 >= 2**31:
        raise ValueError(f"K must be below {2**31 // (255 * 127) + 1}, or int32 could overflow; got {K}")
    x, w = np.asarray(x_q, np.int64), np.asarray(w_q, np.int64)
    return x @ w.T - np.int64(x_zero) * w.sum(axis=1)


def _check_tensor(x, name="x"):
    if np.size(x) == 0:
        raise ValueError(f"{name} must not be empty")
    check_finite(name, np.asarray(x))


def example(seed=0):
    """A weight of 12 x 32 and hidden states of SmolLM2 as its input."""
    from ref.data import hidden_states

    rng = np.random.default_rng(seed)
    h = hidden_states()[1:7, :32]
    x, w = h / np.abs(h).max(), rng.standard_normal((12, 32))
    scale, zero = affine_params(x.min(), x.max(), signed=True)
    w_scale = symmetric_params(np.abs(w).max(axis=1))
    full = {"qmin": -128, "qmax": 127}
    x_q = quantize(x, scale, zero, **full)
    w_q = quantize(w, w_scale, np.zeros(12, np.int32), qmin=-127, qmax=127, axis=0)
    multiplier, shift = quantize_multiplier(scale * w_scale / 0.05)
    bias, bias_q = rng.standard_normal(12), rng.integers(-900, 900, 12).astype(np.int32)
    g, step = rng.standard_normal(x.shape), np.array(0.02)
    q = np.rint(x / 1e-3).astype(np.int32)
    return [
        Example("affine_params", (x.min(axis=1), x.max(axis=1)), {"signed": True}),
        Example("symmetric_params", (np.abs(w).max(axis=1),)),
        Example("quantize", (x, scale, zero), full),
        Example("dequantize", (x_q, scale, zero)),
        Example("fake_quantize", (x, scale, zero), full),
        Example("fake_quantize_vjp", (x, scale, zero, g), full),
        Example("lsq_quantize", (x, step), {"qmin": -8, "qmax": 7}),
        Example("lsq_quantize_vjp", (x, step, g), {"qmin": -8, "qmax": 7}),
        Example("update_range", (init_range((6,)), x), {"axis": 0}),
        Example("quantized_linear", (x, w_q, w_scale, bias), {"x_scale": scale, "x_zero": zero}),
        Example("integer_linear", (x_q, w_q, bias_q), {
            "x_zero": zero, "multiplier": multiplier, "shift": shift, "out_zero": 3,
        }),
        Example("ternarize", (w,)),
        Example("binarize", (w,)),
        Example("i_exp", (-np.abs(8 * x),), {}, (0,)),
        Example("i_gelu", (4 * x,), {}, (0,)),
        Example("i_softmax", (4 * x,), {}, (0,)),
        Example("i_layer_norm", (x, w[0], w[1]), {}, (0, 1, 2)),
        Example("i_exp_int", (-np.abs(q),), {"scale": 1e-3}),
        Example("i_gelu_int", (q,), {"scale": 1e-3}),
        Example("i_softmax_int", (q,), {"scale": 1e-3}),
        Example("i_layer_norm_int", (q, 1e-3, w[0], w[1])),
    ]  # fmt: skip
