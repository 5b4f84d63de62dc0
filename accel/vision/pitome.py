"""PiToMe in JAX, with static shapes; see ref/vision/pitome.py for the definitions.

How many tokens a layer loses follows from (N, ratio) on the host, so every layer is one compiled function.
Similarities are taken in float32 at full precision (float64 for float64 input): they decide an order.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.attention import attention_dense, join_heads
from accel.blocks.backend import choose_impl
from accel.blocks.merging import (
    MODES,
    MergePlan,
    best,
    bipartite_soft_matching,
    check_size,
    descending,
    identity_plan,
    merge_tokens,
    plan_of,
    products,
    proportional_attention,
    random_plan,
    take_rows,
    tome_schedule,
    unit_rows,
    unmerge_tokens,
)
from accel.blocks.mlp import linear, mlp
from accel.blocks.norms import layer_norm
from accel.blocks.softmax import wide
from accel.blocks.transformer import qkv
from accel.models.vit import embed_patches, head
from ref.blocks.quantize import check_finite
from ref.blocks.transformer import BlockParams
from ref.dims import dims
from ref.models.vit import ViTParams
from ref.vision.pitome import (
    METHODS,
    MergeConfig,
    check_energy,
    check_method,
    check_width,
    energy_score_vjp,
    example,
    layer_options,
    margin_schedule,
    merge_flops,
    merge_tokens_vjp,
    pitome_token_schedule,
    removed_tokens,
    spectral_distance,
)

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

jax.tree_util.register_static(MergeConfig)  # options, not arrays: part of what is compiled


def energy_score(metric, *, margin, alpha=1.0, paper_form=False, impl="auto", interpret=False, block_t=None):
    """E_i = mean over j of f(cos(metric_i, metric_j)), [..., T, D] -> [..., T] in metric's dtype.

    impl: "xla" writes the similarities; "triton" and "tpu" are kernels that do not, in tiles of
    block_t tokens; "auto" is "xla".
    """
    dims(metric=(metric, "... T D"))
    check_energy(margin, alpha)
    check_finite("metric", metric)
    energy = _energy(
        metric, float(margin), float(alpha), paper_form, _choose(impl, interpret), interpret, block_t
    )
    return energy.astype(metric.dtype)


def pitome_matching(
    metric,
    *,
    ratio,
    margin,
    alpha=1.0,
    class_token=False,
    bsm=False,
    paper_form=False,
    impl="auto",
    interpret=False,
):
    """Merge r = floor(T - T ratio) of the T tokens, of the 2r of highest energy; as ref, n_out is static."""
    N, r = _removed(metric, ratio, class_token)
    check_energy(margin, alpha)
    check_finite("metric", metric)
    if r == 0:
        return identity_plan(metric)
    impl = _choose(impl, interpret)
    options = (float(margin), float(alpha), paper_form, bool(bsm), bool(class_token), impl, interpret)
    group = _pitome_group(jax.lax.stop_gradient(metric), r, *options)
    return MergePlan(group, N - r)


def pitome_text_matching(metric, *, ratio, margin, class_token=False):
    """PiToMe for text: Gaussian energy of width 1 - margin; a is the first r by energy, b the next r."""
    check_width(margin)
    check_finite("metric", metric)
    N, r = _removed(metric, ratio, class_token)
    if r == 0:
        return identity_plan(metric)
    group = _text_group(jax.lax.stop_gradient(metric), r, float(margin), bool(class_token))
    return MergePlan(group, N - r)


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
    impl="auto",
    interpret=False,
):
    """A pre-norm block that merges between attention and MLP; -> (x' in x's dtype, size' in float32)."""
    check_method(
        method, r=r, ratio=ratio, margin=margin, seed_groups=seed_groups, distill_token=distill_token
    )
    n = dims(x=(x, "... N C"))
    size = check_size(size, x, (*n["..."], n["N"]))
    static = (
        num_heads,
        method,
        r,
        ratio,
        margin,
        alpha,
        bsm,
        paper_form,
        prop_attn,
        class_token,
        distill_token,
    )
    return _block(x, params, size, seed_groups, *static, eps, impl, interpret)


@partial(jax.jit, static_argnums=range(4, 18))
def _block(
    x, params, size, seed_groups, num_heads, method, r, ratio, margin, alpha, bsm, paper_form, prop_attn,
    class_token, distill_token, eps, impl, interpret,
):  # fmt: skip
    q, k, v = qkv(layer_norm(x, params.ln1_scale, params.ln1_bias, eps=eps), params, num_heads=num_heads)
    o = proportional_attention(q, k, v, size) if prop_attn else attention_dense(q, k, v)
    x = x + linear(join_heads(o), params.w_o, params.b_o)
    metric = k.astype(wide(k.dtype)).mean(axis=-3)
    if method == "pitome":
        plan = pitome_matching(
            metric, ratio=ratio, margin=margin, alpha=alpha, class_token=class_token, bsm=bsm,
            paper_form=paper_form, impl=impl, interpret=interpret,
        )  # fmt: skip
    elif method == "tome":
        plan = bipartite_soft_matching(metric, r=r, class_token=class_token, distill_token=distill_token)
    elif method == "random":
        removed = r if ratio is None else removed_tokens(x.shape[-2] - class_token, ratio)
        plan = MergePlan(seed_groups, x.shape[-2] - removed)
    if method != "none":
        x, size = merge_tokens(x, *plan, size=size)
    h = layer_norm(x, params.ln2_scale, params.ln2_bias, eps=eps)
    return x + mlp(h, params.w_fc1, params.b_fc1, params.w_fc2, params.b_fc2), size


def vit_forward_merged(
    img,
    params: ViTParams,
    cfg: MergeConfig,
    *,
    method="pitome",
    ratio=1.0,
    r=0,
    seed_groups=None,
    impl="auto",
    interpret=False,
):
    """Logits [..., K] of images [..., H, W, 3], merging in every block; features [..., d] without a head."""
    groups = None if seed_groups is None else [getattr(g, "group", g) for g in seed_groups]
    r = tuple(r) if isinstance(r, list) else r
    return _forward(img, params, groups, cfg, method, ratio, r, impl, interpret)


@partial(jax.jit, static_argnums=range(3, 9))
def _forward(img, params, groups, cfg, method, ratio, r, impl, interpret):
    x = embed_patches(img, params)
    has_class, size = params.cls_token is not None, None
    for layer, options in enumerate(layer_options(len(params.blocks), cfg, method, ratio, r, groups)):
        x, size = merged_block(
            x, params.blocks[layer], size=size, num_heads=cfg.num_heads, method=method, alpha=cfg.alpha,
            paper_form=cfg.paper_form, prop_attn=cfg.prop_attn, class_token=has_class, eps=cfg.eps, impl=impl,
            interpret=interpret, **options,
        )  # fmt: skip
    if cfg.global_pool or not has_class:  # the mean over original patches: every token weighs its size
        weight = size[..., int(has_class) :, None]
        total = (x[..., int(has_class) :, :].astype(weight.dtype) * weight).sum(axis=-2)
        pooled = (total / weight.sum(axis=-2)).astype(x.dtype)
    else:
        pooled = x[..., 0, :]
    return head(pooled, params, eps=cfg.eps)


def _choose(impl, interpret):
    """The implementation of the energy: auto is xla, since similarities of T <= 577 tokens fit a cache."""
    why = 'does not exist: tiles of 64 x 64 do not feed its tensor cores; use "triton"'
    return choose_impl(impl, interpret=interpret, obstacles={"hopper": why})


def _energy(metric, margin, alpha, paper_form, impl, interpret, block_t=None):
    if impl == "xla":
        return _energy_of(_similarity(metric), margin, alpha, paper_form)
    return _energy_kernel(metric, margin, alpha, paper_form, impl, interpret, block_t)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _energy_of(s, margin, alpha, paper_form):
    u = s - margin
    below = alpha * (jnp.exp(u) - 1)
    return (jnp.where(u >= 0, s, below) if paper_form else jnp.where(u > 0, u, below)).mean(axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5, 6))
def _energy_kernel(metric, margin, alpha, paper_form, impl, interpret, block_t):
    if impl == "triton":
        from accel.kernels.pitome_triton import energy
    else:
        from accel.kernels.pitome_tpu import energy
    lead, (T, D) = metric.shape[:-2], metric.shape[-2:]
    options = {} if block_t is None else {"block": block_t}
    one = partial(energy, margin=margin, alpha=alpha, paper_form=paper_form, interpret=interpret, **options)
    return jax.vmap(one)(metric.reshape(-1, T, D).astype(jnp.float32)).reshape(*lead, T)


def _energy_fwd(metric, *static):
    return _energy_kernel(metric, *static), metric


def _energy_bwd(margin, alpha, paper_form, impl, interpret, block_t, metric, cotangent):
    """The backward pass recomputes the similarities in XLA."""
    _, pull = jax.vjp(lambda m: _energy(m, margin, alpha, paper_form, "xla", False), metric)
    return pull(cotangent.astype(wide(metric.dtype)))


_energy_kernel.defvjp(_energy_fwd, _energy_bwd)


@partial(jax.jit, static_argnums=range(1, 9))
def _pitome_group(metric, r, margin, alpha, paper_form, bsm, class_token, impl, interpret):
    patches = metric[..., int(class_token) :, :]
    if impl == "xla":
        s = _similarity(patches)
        order = descending(_energy_of(s, margin, alpha, paper_form))
        pairs = lambda a, b: _pairs(s, a, b)
    else:  # only the pairs that may merge are compared again
        order = descending(_energy(patches, margin, alpha, paper_form, impl, interpret))
        unit = unit_rows(patches)
        pairs = lambda a, b: products(take_rows(unit, a), take_rows(unit, b))
    if bsm:
        a, b = order[..., 0::2], order[..., 1::2]
        scores = pairs(a, b)
        ranked = descending(scores.max(axis=-1))
        target = jnp.take_along_axis(best(scores), ranked, axis=-1)[..., :r]
        a = jnp.take_along_axis(a, ranked, axis=-1)
        kept, a = a[..., r:], a[..., :r]
    else:
        a, b, kept = order[..., 0 : 2 * r : 2], order[..., 1 : 2 * r : 2], order[..., 2 * r :]
        target = best(pairs(a, b))
    return plan_of(metric.shape[-2], kept, b, a, target, class_token)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _text_group(metric, r, margin, class_token):
    s = _similarity(metric[..., int(class_token) :, :])
    sigma = 1 - margin
    energy = jnp.exp(-jnp.square((1 - s) / sigma) / 2).mean(axis=-1) / (sigma * (2 * np.pi) ** 0.5)
    order = descending(energy)
    a, b, kept = order[..., :r], order[..., r : 2 * r], order[..., 2 * r :]
    return plan_of(metric.shape[-2], kept, b, a, best(_pairs(s, a, b)), class_token)


@jax.jit
def _similarity(metric):
    unit = unit_rows(metric)
    return products(unit, unit)


def _pairs(s, a, b):
    """s[a, b]: rows and columns of the similarities, [..., len(a), len(b)]."""
    return jnp.take_along_axis(jnp.take_along_axis(s, a[..., None], axis=-2), b[..., None, :], axis=-1)


def _removed(metric, ratio, class_token):
    N = dims(metric=(metric, "... N D"))["N"]
    return N, removed_tokens(N - class_token, ratio)
