"""Quantizable transformers: clipped softmax and gated attention let a head do nothing at finite logits.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 4, and the code released with it (gates, ranges,
kurtosis). A head that leaves the residual alone must attend to nothing that counts. Softmax has no exact
zero, so training keeps pushing logits apart, and the activations that do the pushing become outliers. Ours:
masks say what may be seen (True); biases and the scales of norms stay in floating point when a block is
quantised.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import broadcasts, join_heads, split_heads
from ref.blocks.head_gate import GateParams, attention_gate, attention_gate_vjp, gate_macs, init_gate
from ref.blocks.mlp import gelu, linear
from ref.blocks.norms import layer_norm
from ref.blocks.quantize import (
    RangeState,
    affine_params,
    fake_quantize,
    grid,
    init_range,
    quantize,
    symmetric_params,
    update_range,
)
from ref.blocks.softmax import softmax, softmax_vjp, weigh
from ref.blocks.transformer import BlockParams, QKVParams, init_block, qkv, qkv_vjp
from ref.checks import check_num_heads
from ref.dims import dims, float64
from ref.example import Example

__all__ = [
    "GateParams", "GatedAttentionParams", "OutlierFreeBlock", "OutlierMetrics", "RangeState", "affine_params",
    "attention_gate", "attention_gate_vjp", "block_forward", "calibrate_ranges", "clipped_softmax",
    "clipped_softmax_vjp", "example", "fake_quantize", "gamma_from_alpha", "gate_macs",
    "gated_self_attention", "gated_self_attention_vjp", "init_gate", "init_range", "outlier_free_attention",
    "outlier_free_attention_vjp", "outlier_metrics", "quantize", "symmetric_params", "update_range",
    "w8a8_forward",
]  # fmt: skip

SCALE_EPS = 1e-8  # the least step of a quantiser in the released code


def gamma_from_alpha(alpha, seq_len):
    """-alpha / seq_len: entries below about alpha times the uniform share become 0. seq_len is training's."""
    if alpha < 0 or seq_len < 1:
        raise ValueError(f"need alpha >= 0 and seq_len >= 1, got {alpha} and {seq_len}")
    return -alpha / seq_len


def clipped_softmax(scores, *, gamma=-0.03, zeta=1.0, mask=None, axis=-1):
    """clip((zeta - gamma) softmax(scores) + gamma, 0, 1): exactly 0 where p <= -gamma / (zeta - gamma).

    Args: scores, any shape; gamma <= 0, zeta >= 1; mask: bool, True = may be seen, broadcastable to scores.
    Returns: the shape of scores; rows need not sum to 1 and are not renormalised; one that sees nothing is 0.
    Raises: ValueError naming the argument at fault. Source: section 4.1.
    """
    _check_clip(gamma, zeta)
    return np.clip((zeta - gamma) * softmax(_visible(scores, mask), axis=axis) + gamma, 0.0, 1.0)


def clipped_softmax_vjp(scores, grad_out, *, gamma, zeta, mask=None, axis=-1):
    """grad_scores = p (g - sum p g), g = (zeta - gamma) grad_out where nothing was clipped, else 0.

    What lies on the boundary counts as not clipped.
    """
    _check_clip(gamma, zeta)
    p = softmax(_visible(scores, mask), axis=axis)
    stretched = (zeta - gamma) * p + gamma
    inside = (stretched >= 0) & (stretched <= 1) & (p > 0)
    return softmax_vjp(p, np.where(inside, (zeta - gamma) * float64(grad_out), 0.0), axis=axis)


def outlier_free_attention(q, k, v, *, gate=None, gamma=None, zeta=1.0, mask=None, scale=None):
    """gate * (P v), P = clipped_softmax(scale q k^T), or softmax if gamma is None.

    Args: q [..., H, L, D], k [..., H, S, D], v [..., H, S, Dv]; gate broadcastable to [..., H, L, 1]; mask:
      bool, True = may be seen, broadcastable to [..., H, L, S]. scale: None is 1 / sqrt(D).
    Returns: (context [..., H, L, Dv], probs [..., H, L, S]).
    """
    s, gate = _scores(q, k, v, gate, scale)
    p = _probs(s, gamma, zeta, mask)
    return gate * weigh(p, float64(v)), p


def outlier_free_attention_vjp(
    q, k, v, grad_context, *, gate=None, gamma=None, zeta=1.0, mask=None, scale=None
):
    """(dq, dk, dv, dgate) for the cotangent of the context; dgate has the gate's shape, None without one."""
    s, g = _scores(q, k, v, gate, scale)
    dims(grad_context=(grad_context, "... L Dv"), q=(q, "... L D"), v=(v, "... S Dv"))
    q, k, v, grad = float64(q, k, v, grad_context)
    p, dgate = _probs(s, gamma, zeta, mask), None
    if gate is not None:
        dgate = _sum_to(np.sum(grad * weigh(p, v), axis=-1, keepdims=True), np.shape(gate))
    dp = g * grad @ np.swapaxes(v, -1, -2)
    dp = dp if mask is None else np.where(mask, dp, 0.0)
    if gamma is None:
        ds = softmax_vjp(p, dp)
    else:
        ds = clipped_softmax_vjp(s, dp, gamma=gamma, zeta=zeta, mask=mask)
    ds = ds * (q.shape[-1] ** -0.5 if scale is None else scale)
    return weigh(ds, k), weigh(ds.mT, q), weigh(p.mT, g * grad), dgate


def _scores(q, k, v, gate, scale):
    """(scaled scores [..., L, S], the gate or 1), checked."""
    n = dims(q=(q, "... H L D"), k=(k, "... H S D"), v=(v, "... H S Dv"))
    if gate is not None:
        want = (*n["..."], n["H"], n["L"], 1)
        if not broadcasts(np.shape(gate), want):
            raise ValueError(f"gate must be broadcastable to {list(want)}, got {list(np.shape(gate))}")
    q, k = float64(q, k)
    s = (n["D"] ** -0.5 if scale is None else scale) * q @ np.swapaxes(k, -1, -2)
    return s, 1.0 if gate is None else float64(gate)


def _probs(s, gamma, zeta, mask):
    if gamma is None:
        return softmax(_visible(s, mask))
    return clipped_softmax(s, gamma=gamma, zeta=zeta, mask=mask)


def _sum_to(x, shape):
    """The transpose of broadcasting to x.shape."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 != x.shape[i]), keepdims=True)


class GatedAttentionParams(NamedTuple):
    """Maps to q, k, v, [C, C], used as x @ W, their biases [C] or None, and the gate."""

    w_q: np.ndarray
    b_q: np.ndarray | None
    w_k: np.ndarray
    b_k: np.ndarray | None
    w_v: np.ndarray
    b_v: np.ndarray | None
    gate: GateParams


def gated_self_attention(
    x, params: GatedAttentionParams, *, num_heads, kind="linear", gamma=None, zeta=1.0, mask=None
):
    """(context [B, N, C], probs [B, H, N, N], gate) of x [B, N, C], before the output projection.

    The gate reads x itself, cut into heads; options as `outlier_free_attention` and `attention_gate`.
    """
    _check_heads(x, params.w_q, num_heads)
    x = float64(x)
    gate = attention_gate(split_heads(x, num_heads), params.gate, kind=kind)
    heads = qkv(x, params, num_heads=num_heads)
    o, p = outlier_free_attention(*heads, gate=gate, gamma=gamma, zeta=zeta, mask=mask)
    return join_heads(o), p, gate


def gated_self_attention_vjp(x, params: GatedAttentionParams, grad_context, *, num_heads,
                             kind="linear", gamma=None, zeta=1.0, mask=None):  # fmt: skip
    """(dx, GatedAttentionParams of gradients) for the cotangent of the context, [B, N, C]."""
    _check_heads(x, params.w_q, num_heads)
    x, x_heads = float64(x), split_heads(float64(x), num_heads)
    gate = attention_gate(x_heads, params.gate, kind=kind)
    heads, options = qkv(x, params, num_heads=num_heads), {"gamma": gamma, "zeta": zeta, "mask": mask}
    grad = split_heads(float64(grad_context), num_heads)
    *dqkv, dgate = outlier_free_attention_vjp(*heads, grad, gate=gate, **options)
    dx, dmaps = qkv_vjp(x, params, dqkv)
    dx_heads, dgate_params = attention_gate_vjp(x_heads, params.gate, dgate, kind=kind)
    return dx + join_heads(dx_heads), GatedAttentionParams(*dmaps, dgate_params)


class OutlierMetrics(NamedTuple):
    """One number a sample, [S]: the largest magnitude, and the kurtosis."""

    inf_norm: np.ndarray
    kurtosis: np.ndarray


def outlier_metrics(acts):
    """max |x| and mean (x - mean)^4 / (std^4 + 1e-6) of every sample acts [S, ...], std with n - 1.

    Raises: ValueError unless a sample holds at least two numbers. Averaging over samples is the caller's.
    """
    if np.ndim(acts) < 2 or np.prod(np.shape(acts)[1:]) < 2:
        raise ValueError(f"acts must be [S, ...], two numbers a sample or more, got {list(np.shape(acts))}")
    x = float64(acts).reshape(len(acts), np.prod(np.shape(acts)[1:]))
    apart = x - x.mean(axis=1, keepdims=True)
    std = np.sqrt((apart**2).sum(axis=1) / (x.shape[1] - 1))
    return OutlierMetrics(np.abs(x).max(axis=1), (apart**4).mean(axis=1) / (std**4 + 1e-6))


class OutlierFreeBlock(NamedTuple):
    """A pre-norm transformer block, and a gate or None."""

    block: BlockParams
    gate: GateParams | None = None


def block_forward(params: OutlierFreeBlock, x, *, num_heads, kind="linear", gamma=None, zeta=1.0):
    """The block in floating point: x [B, N, C] -> [B, N, C]; gamma None is plain softmax."""
    same = lambda name, value: value
    return _block(params, x, num_heads, kind, gamma, zeta, lambda w: w, same)


def calibrate_ranges(params: OutlierFreeBlock, batches, *, num_heads, kind="linear", gamma=None,
                     zeta=1.0, momentum=0.9, percentile=None):  # fmt: skip
    """{name: RangeState} of every activation of the block, running over batches of x [B, N, C].

    percentile: 99.999, say, takes the batch's percentiles instead of its extremes.
    """
    ranges = {}

    def observe(name, value):
        state = ranges.get(name, init_range())
        ranges[name] = update_range(state, value, kind="ema", momentum=momentum, percentile=percentile)
        return value

    for x in batches:
        _block(params, x, num_heads, kind, gamma, zeta, lambda w: w, observe)
    if not ranges:
        raise ValueError("batches must hold at least one batch")
    return ranges


def w8a8_forward(
    params: OutlierFreeBlock, x, ranges, *, num_heads, bits=8, kind="linear", gamma=None, zeta=1.0
):
    """The block with all weights and activations on a grid: per tensor, static, as `ranges` says.

    Weights are symmetric between extremes, activations affine; values are fake-quantised, so that they are
    those of integer arithmetic. Raises: ValueError if a range is missing or bits < 2.
    """

    def site(name, value):
        if name not in ranges:
            raise ValueError(f"ranges must hold {name!r}; it holds {', '.join(ranges)}")
        scale, zero = affine_params(ranges[name].lo, ranges[name].hi, bits=bits, eps=SCALE_EPS)
        return fake_quantize(value, scale, zero, qmin=0, qmax=2**bits - 1)

    def weight(w):
        signed = bool(np.min(w) < 0)
        scale = symmetric_params(np.abs(w).max(), bits=bits, signed=signed, eps=SCALE_EPS)
        qmin, qmax = grid(bits, signed=signed)
        return fake_quantize(w, scale, np.zeros((), np.int32), qmin=qmin, qmax=qmax)

    return _block(params, x, num_heads, kind, gamma, zeta, weight, site)


def _block(params, x, num_heads, kind, gamma, zeta, weight, site):
    """The block; `weight` sees every weight and `site` every activation on its way, by name."""
    b, gate = params.block, params.gate
    _check_heads(x, b.w_q, num_heads)
    x = site("input", float64(x))
    h = site("norm1", layer_norm(x, b.ln1_scale, b.ln1_bias))
    maps = QKVParams(weight(b.w_q), b.b_q, weight(b.w_k), b.b_k, weight(b.w_v), b.b_v)
    q, k, v = (site(n, y) for n, y in zip("qkv", qkv(h, maps, num_heads=num_heads), strict=True))
    s = site("scores", q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]))
    context = site("context", site("probs", _probs(s, gamma, zeta, None)) @ v)
    if gate is not None:
        g = gate._replace(**{n: weight(w) for n in ("w", "w_out") if (w := getattr(gate, n)) is not None})
        g = site("gate", attention_gate(split_heads(h, num_heads), g, kind=kind))
        context = site("gated", g * context)
    x = site("sum1", x + site("attention", linear(join_heads(context), weight(b.w_o), b.b_o)))
    h = site("norm2", layer_norm(x, b.ln2_scale, b.ln2_bias))
    h = site("active", gelu(site("hidden", linear(h, weight(b.w_fc1), b.b_fc1))))
    return site("sum2", x + site("mlp", linear(h, weight(b.w_fc2), b.b_fc2)))


def _visible(scores, mask):
    """The scores, -inf where the mask hides them."""
    if mask is None:
        return float64(scores)
    if mask.dtype != bool or not broadcasts(mask.shape, scores.shape):
        what = f"{list(scores.shape)}, got {mask.dtype} {list(mask.shape)}"
        raise ValueError(f"mask must be boolean (True = may be seen), broadcastable to {what}")
    return np.where(mask, float64(scores), -np.inf)


def _check_clip(gamma, zeta):
    if not (gamma <= 0 and zeta >= 1):
        raise ValueError(f"need gamma <= 0 and zeta >= 1, got {gamma=} and {zeta=}")


def _check_heads(x, w, num_heads):
    width = dims(x=(x, "B N C"), w_q=(w, "C C"))["C"]
    check_num_heads(width, num_heads)


def example(seed=0):
    """Hidden states of SmolLM2 through gated, clipped attention, and a small block of them in eight bits."""
    from ref.data import hidden_states

    rng = np.random.default_rng(seed)
    x = hidden_states()[1:13, :32].reshape(1, 12, 32)
    x = x / np.abs(x).max() * 4
    gate = init_gate(rng, 2, 16)
    params = GatedAttentionParams(*(rng.standard_normal(s) / 6 for s in ((32, 32), 32) * 3), gate)
    q, k, v = qkv(x, params, num_heads=2)
    heads, clip = split_heads(x, 2), {"gamma": gamma_from_alpha(2, 12), "zeta": 1.0}
    g = attention_gate(heads, gate)
    scores = q @ np.swapaxes(k, -1, -2) / 4
    block = OutlierFreeBlock(init_block(rng, 32, 48, std=0.2), gate)
    layer = {"num_heads": 2, **clip}
    ranges = calibrate_ranges(block, [x], **layer)
    return [
        Example("clipped_softmax", (scores,), clip),
        Example("clipped_softmax_vjp", (scores, scores), clip),
        Example("attention_gate", (heads, gate), {}, (0, 1)),
        Example("attention_gate_vjp", (heads, gate, g), {}),
        Example("outlier_free_attention", (q, k, v), {}, (0, 1, 2)),
        Example("outlier_free_attention_vjp", (q, k, v, v), clip),
        Example("gated_self_attention", (x, params), {"num_heads": 2}, (0, 1)),
        Example("gated_self_attention_vjp", (x, params, x), layer),
        Example("outlier_metrics", (x[0],), {}, (0,)),
        Example("block_forward", (block, x), {"num_heads": 2}, (0, 1)),
        Example("w8a8_forward", (block, x, ranges), layer),
    ]
