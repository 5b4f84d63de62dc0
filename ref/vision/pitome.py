"""Token merging that keeps the spectrum: PiToMe's energy, its matching, and vision transformers that merge.

Source: Tran et al. 2024 (arXiv 2405.16148): equation 4 (energy), section 3.2 (the merging step), section 3.3
(the spectrum). Plans, merging, proportional attention and the ToMe baseline are in ref/blocks/merging.py.
"""

import math
from dataclasses import dataclass

import numpy as np

from ref.blocks.attention import attention_dense, join_heads
from ref.blocks.merging import (
    MODES,
    MergePlan,
    bipartite_soft_matching,
    descending,
    identity_plan,
    merge_tokens,
    merge_tokens_vjp,
    plan_of,
    proportional_attention,
    random_plan,
    row_lengths,
    tome_schedule,
    unit_rows,
    unmerge_tokens,
)
from ref.blocks.mlp import linear, mlp
from ref.blocks.norms import layer_norm
from ref.blocks.quantize import check_finite
from ref.blocks.transformer import BlockParams, qkv
from ref.dims import dims, float64
from ref.example import Example
from ref.models.vit import ViTParams, embed_patches, head, init_vit

__all__ = [
    "METHODS",
    "MODES",
    "MergeConfig",
    "MergePlan",
    "bipartite_soft_matching",
    "energy_score",
    "energy_score_vjp",
    "example",
    "margin_schedule",
    "merge_flops",
    "merge_tokens",
    "merge_tokens_vjp",
    "merged_block",
    "pitome_matching",
    "pitome_text_matching",
    "pitome_token_schedule",
    "proportional_attention",
    "random_plan",
    "spectral_distance",
    "tome_schedule",
    "unmerge_tokens",
    "vit_forward_merged",
]

METHODS = ("pitome", "tome", "random", "none")


@dataclass(frozen=True)
class MergeConfig:
    """What `vit_forward_merged` needs beside the weights.

    m0: margin of the first layer (0.9 in the paper; 0.75 in the released DeiT and MAE code). bsm_layers: the
    layers that split all tokens instead of the 2r most redundant ones. prop_attn: add log size to the logits.
    """

    num_heads: int
    m0: float = 0.9
    alpha: float = 1.0
    bsm_layers: tuple[int, ...] = ()
    paper_form: bool = False
    prop_attn: bool = True
    global_pool: bool = False
    eps: float = 1e-6


def energy_score(metric, *, margin, alpha=1.0, paper_form=False):
    """E_i = mean over j of f(cos(metric_i, metric_j)): high where a token has many alike, j = i included.

    f(c) = c - margin above the margin, alpha (exp(c - margin) - 1) at or below it.

    Args: metric [..., T, D]: every token given is scored. alpha > 0: how far below 0 strangers pull.
      paper_form: equation 4 as printed, f(c) = c from the margin on, which jumps there by `margin`.
    Returns: [..., T] float64, in [-alpha (1 - e^(-1 - margin)), 1 - margin] unless paper_form.
    """
    dims(metric=(metric, "... T D"))
    check_energy(margin, alpha)
    check_finite("metric", metric)
    return _energy(_similarity(metric), margin, alpha, paper_form)


def energy_score_vjp(metric, d_energy, *, margin, alpha=1.0, paper_form=False):
    """The gradient of `energy_score` for metric [..., T, D], from the cotangent d_energy [..., T]."""
    x, d_energy = float64(metric, d_energy)
    norm = row_lengths(x)
    unit = x / norm
    u = unit @ np.swapaxes(unit, -1, -2) - margin
    slope = np.where(u >= 0 if paper_form else u > 0, 1.0, alpha * np.exp(u))
    ds = slope * d_energy[..., None] / x.shape[-2]
    d_unit = (ds + np.swapaxes(ds, -1, -2)) @ unit
    return (d_unit - unit * np.sum(unit * d_unit, axis=-1, keepdims=True)) / norm


def pitome_matching(metric, *, ratio, margin, alpha=1.0, class_token=False, bsm=False, paper_form=False):
    """Merge r = floor(T - T ratio) of the T tokens, taken from the 2r of highest energy.

    The 2r are dealt in turn, in order of energy, into a and b; each a goes to its most similar b. Ties go to
    the lower index.

    Args: metric [..., N, D], T = N - class_token. ratio: share of tokens kept. class_token: token 0 takes no
      part. bsm: deal out all tokens instead, and merge the r most similar pairs (half of the released
      layers).
    Returns: MergePlan; output order [class token, protected tokens by energy (bsm: a's that stay), b].
    Raises: ValueError if ratio is outside (0, 1] or 2r > T.
    """
    N, r = _removed(metric, ratio, class_token)
    check_energy(margin, alpha)
    if r == 0:
        return identity_plan(metric)
    patches = metric[..., int(class_token) :, :]
    s = _similarity(patches)
    order = descending(_energy(s, margin, alpha, paper_form))
    if bsm:
        a, b = order[..., 0::2], order[..., 1::2]
        scores = _pairs(s, a, b)
        ranked = descending(scores.max(axis=-1))
        target = np.take_along_axis(scores.argmax(axis=-1), ranked, axis=-1)[..., :r]
        a = np.take_along_axis(a, ranked, axis=-1)
        kept, a = a[..., r:], a[..., :r]
    else:
        a, b, kept = order[..., 0 : 2 * r : 2], order[..., 1 : 2 * r : 2], order[..., 2 * r :]
        target = _pairs(s, a, b).argmax(axis=-1)
    return plan_of(N, kept, b, a, target, class_token)


def pitome_text_matching(metric, *, ratio, margin, class_token=False):
    """PiToMe for text: Gaussian energy of width 1 - margin; a is the first r by energy, b the next r.

    Arguments and result as `pitome_matching`. Raises: ValueError also if margin >= 1.
    """
    check_width(margin)
    N, r = _removed(metric, ratio, class_token)
    if r == 0:
        return identity_plan(metric)
    s = _similarity(metric[..., int(class_token) :, :])
    sigma = 1 - margin
    energy = np.exp(-(((1 - s) / sigma) ** 2) / 2).mean(axis=-1) / (sigma * np.sqrt(2 * np.pi))
    order = descending(energy)
    a, b, kept = order[..., :r], order[..., r : 2 * r], order[..., 2 * r :]
    return plan_of(N, kept, b, a, _pairs(s, a, b).argmax(axis=-1), class_token)


def merged_block(
    x,
    params: BlockParams,
    *,
    num_heads,
    size=None,
    method="pitome",
    r=None,
    ratio=None,
    margin=None,
    alpha=1.0,
    bsm=False,
    paper_form=False,
    prop_attn=True,
    class_token=True,
    distill_token=False,
    seed_groups=None,
    eps=1e-6,
):
    """A pre-norm block that merges tokens between attention and MLP, by their keys averaged over heads.

    Args: x [..., N, C]; params: BlockParams; size [..., N], None = ones. method: "pitome" (ratio, margin),
      "tome" (r), "random" (seed_groups [..., N], with r or ratio for the number of slots) or "none".
    Returns: (x' [..., n_out, C], size' [..., n_out]). Raises: ValueError for an option missing or unknown.
    """
    n = dims(x=(x, "... N C"))
    check_method(
        method, r=r, ratio=ratio, margin=margin, seed_groups=seed_groups, distill_token=distill_token
    )
    size = np.ones((*n["..."], n["N"])) if size is None else size
    q, k, v = qkv(layer_norm(x, params.ln1_scale, params.ln1_bias, eps=eps), params, num_heads=num_heads)
    o = proportional_attention(q, k, v, size) if prop_attn else attention_dense(q, k, v)
    x = float64(x) + linear(join_heads(o), params.w_o, params.b_o)
    metric = k.mean(axis=-3)
    if method == "pitome":
        plan = pitome_matching(
            metric, ratio=ratio, margin=margin, alpha=alpha, class_token=class_token, bsm=bsm,
            paper_form=paper_form,
        )  # fmt: skip
    elif method == "tome":
        plan = bipartite_soft_matching(metric, r=r, class_token=class_token, distill_token=distill_token)
    elif method == "random":
        removed = r if ratio is None else removed_tokens(n["N"] - class_token, ratio)
        plan = MergePlan(seed_groups, n["N"] - removed)
    if method != "none":
        x, size = merge_tokens(x, *plan, size=size)
    h = layer_norm(x, params.ln2_scale, params.ln2_bias, eps=eps)
    return x + mlp(h, params.w_fc1, params.b_fc1, params.w_fc2, params.b_fc2), size


def vit_forward_merged(
    img, params: ViTParams, cfg: MergeConfig, *, method="pitome", ratio=1.0, r=0, seed_groups=None
):
    """Logits [..., K] of images [..., H, W, 3], merging in every block; features [..., d] without a head.

    Args: cfg: MergeConfig. method: "pitome" keeps `ratio` of the tokens in each layer, with the margin of
      `margin_schedule`; "tome" removes `r` a layer, an int or a list (`tome_schedule`); "random" follows
      seed_groups, one group [..., N] a layer, of r or ratio; "none" is the plain network.
    """
    x = embed_patches(img, params)
    has_class, size = params.cls_token is not None, None
    for layer, options in enumerate(layer_options(len(params.blocks), cfg, method, ratio, r, seed_groups)):
        x, size = merged_block(
            x, params.blocks[layer], size=size, num_heads=cfg.num_heads, method=method, alpha=cfg.alpha,
            paper_form=cfg.paper_form, prop_attn=cfg.prop_attn, class_token=has_class, eps=cfg.eps, **options,
        )  # fmt: skip
    if cfg.global_pool or not has_class:  # the mean over original patches: every token weighs its size
        weight = size[..., int(has_class) :, None]
        pooled = (x[..., int(has_class) :, :] * weight).sum(axis=-2) / weight.sum(axis=-2)
    else:
        pooled = x[..., 0, :]
    return head(pooled, params, eps=cfg.eps)


def layer_options(depth, cfg, method, ratio, r, seed_groups):
    """Options of `merged_block` for each layer: the margin, ToMe's r, or the drawn group."""
    if method == "pitome":
        margins = margin_schedule(depth, m0=cfg.m0)
        return [{"ratio": ratio, "margin": m, "bsm": i in cfg.bsm_layers} for i, m in enumerate(margins)]
    if method == "tome":
        return [{"r": n} for n in tome_schedule(depth, r=r)]
    if method == "random":
        if seed_groups is None or len(seed_groups) != depth:
            raise ValueError(f'method "random" needs seed_groups, one group for each of the {depth} layers')
        groups = [getattr(g, "group", g) for g in seed_groups]
        counts = [{"ratio": ratio}] * depth if r == 0 else [{"r": n} for n in tome_schedule(depth, r=r)]
        return [{"seed_groups": g, **c} for g, c in zip(groups, counts, strict=True)]
    if method == "none":
        return [{}] * depth
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def check_method(method, *, r, ratio, margin, seed_groups, distill_token):
    """Raise ValueError unless the method is known and has the options it needs."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "pitome" and (ratio is None or margin is None or distill_token):
        raise ValueError('method "pitome" needs ratio and margin, and knows no distill_token')
    if method == "tome" and r is None:
        raise ValueError('method "tome" needs r, the number of tokens to remove')
    if method == "random" and (seed_groups is None or (r is None) == (ratio is None)):
        raise ValueError('method "random" needs seed_groups, and either r or ratio')


def check_energy(margin, alpha):
    """Raise ValueError unless margin is finite and alpha positive."""
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")


def check_width(margin):
    """Raise ValueError unless the width 1 - margin of the Gaussian energy is positive."""
    if not -math.inf < margin < 1:
        raise ValueError(f"margin must be below 1 (the width is 1 - margin), got {margin}")


def removed_tokens(tokens, ratio):
    """floor(tokens - tokens ratio), in float64 as the released code: what a layer removes of its T tokens.

    Raises: ValueError if ratio is outside (0, 1] or would remove more than half.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], the share of tokens kept, got {ratio}")
    r = math.floor(tokens - tokens * ratio)
    if 2 * r > tokens:
        raise ValueError(f"ratio={ratio} removes {r} of {tokens} tokens; at most half can be merged")
    return r


def pitome_token_schedule(n, depth, *, ratio, class_token=True):
    """Patch tokens left after each layer: T <- T - floor(T - T ratio), from T = n - class_token.

    n counts all tokens of the first layer, the class token among them if there is one.
    """
    tokens, left = n - class_token, []
    for _ in range(depth):
        tokens -= removed_tokens(tokens, ratio)
        left.append(tokens)
    return left


def margin_schedule(depth, *, m0=0.9):
    """The margin of each layer: m0 (1 - layer / depth)."""
    return [m0 - m0 * layer / depth for layer in range(depth)]


def spectral_distance(W, group):
    """|| eig(L) - eig(L_lifted) ||_1 for the graph W and its merged form, both as normalised Laplacians.

    Args: W [N, N] symmetric, non-negative, with its diagonal; group [N] ints. The merged graph has the mean
      of W over I x J between slots I and J, and is lifted back by giving every pair the weight of its slots.
    """
    n = dims(W=(W, "N N"), group=(group, "N"))["N"]
    W = float64(W)
    if (W < 0).any():
        raise ValueError(f"W must not be negative, got a smallest entry of {W.min()}")
    member = (np.asarray(group) == np.arange(np.max(group) + 1)[:, None]).astype(np.float64)
    mean = member / np.maximum(member.sum(axis=1, keepdims=True), 1)
    lifted = member.T @ (mean @ W @ mean.T) @ member

    def spectrum(w):
        degree = w.sum(axis=1)
        scale = 1 / np.sqrt(np.where(degree > 0, degree, 1))
        return np.linalg.eigvalsh(np.eye(n) - scale[:, None] * w * scale)

    return float(np.abs(spectrum(W) - spectrum(lifted)).sum())


def merge_flops(depth, n, dim, *, ratio, class_token=True):
    """Multiply-accumulates of `depth` blocks, 12 N dim^2 + 2 N^2 dim each, N the tokens that enter it.

    n: tokens of the first layer, class token included. The count of the released code: the matching, the
    embedding and the head are left out, and the MLP is charged for the tokens before the merge.
    """
    left = [n - class_token, *pitome_token_schedule(n, depth, ratio=ratio, class_token=class_token)]
    tokens = [t + class_token for t in left[:depth]]
    return sum(12 * t * dim**2 + 2 * t**2 * dim for t in tokens)


def _similarity(metric):
    unit = unit_rows(metric)
    return unit @ np.swapaxes(unit, -1, -2)


def _energy(s, margin, alpha, paper_form):
    """Mean over the last axis of the margin function of the similarities s [..., T, T]."""
    u = s - margin
    below = alpha * (np.exp(u) - 1)
    return (np.where(u >= 0, s, below) if paper_form else np.where(u > 0, u, below)).mean(axis=-1)


def _pairs(s, a, b):
    """s[a, b]: rows and columns of the similarities, [..., len(a), len(b)]."""
    return np.take_along_axis(np.take_along_axis(s, a[..., None], axis=-2), b[..., None, :], axis=-1)


def _removed(metric, ratio, class_token):
    check_finite("metric", metric)
    N = dims(metric=(metric, "... N D"))["N"]
    return N, removed_tokens(N - class_token, ratio)


def example(seed=0):
    """A vision transformer of one block, and the keys of that block as the metric."""
    rng = np.random.default_rng(seed)
    images = rng.random((2, 8, 8, 3))
    params = init_vit(rng, image_size=8, patch=2, dim=24, depth=1, num_classes=10, std=0.2)
    x, block = embed_patches(images, params), params.blocks[0]
    q, k, v = qkv(layer_norm(x, block.ln1_scale, block.ln1_bias, eps=1e-6), block, num_heads=3)
    metric, margin = k.mean(axis=-3), 0.5
    plan = pitome_matching(metric, ratio=0.75, margin=margin, class_token=True)
    merged, size = merge_tokens(x, *plan)
    kept = {"ratio": 0.75, "margin": margin}
    return [
        Example("bipartite_soft_matching", (metric,), {"r": 4, "class_token": True}),
        Example("energy_score", (metric,), {"margin": margin}, (0,)),
        Example("pitome_matching", (metric,), {**kept, "class_token": True}),
        Example("pitome_text_matching", (metric,), {**kept, "class_token": True}),
        Example("merge_tokens", (x, plan.group), {"n_out": plan.n_out}, (0,)),
        Example("unmerge_tokens", (merged, plan.group), {}, (0,)),
        Example("proportional_attention", (q[..., : plan.n_out, :], k[..., : plan.n_out, :],
                v[..., : plan.n_out, :], size), {}, (0, 1, 2)),
        Example("merged_block", (x, block), {"num_heads": 3, **kept}, (0, 1)),
        Example("vit_forward_merged", (images, params, MergeConfig(num_heads=3)), {"ratio": 0.75}, (0, 1)),
    ]  # fmt: skip
