"""Token merging in JAX: PiToMe and ToMe with static shapes; see ref/vision/pitome.py for the definitions.

How many tokens a layer loses follows from (N, ratio) on the host, so every layer is one compiled function.
Similarities are taken in float32 at full precision (float64 for float64 input): they decide an order. Plans
are
integers, constant under differentiation; gradients flow through the merge.
"""

import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.attention import attention_dense, join_heads
from accel.blocks.mlp import linear, mlp
from accel.blocks.norms import layer_norm
from accel.blocks.shapes import lift
from accel.blocks.softmax import softmax, wide
from accel.blocks.transformer import qkv
from accel.models.vit import embed_patches, head
from ref.blocks.transformer import BlockParams
from ref.dims import dims
from ref.models.vit import ViTParams
from ref.vision.pitome import (
    METHODS,
    MODES,
    MergeConfig,
    MergePlan,
    check_method,
    example,
    expand_axes,
    layer_options,
    margin_schedule,
    merge_flops,
    pitome_token_schedule,
    random_plan,
    removed_tokens,
    spectral_distance,
    tome_schedule,
)

__all__ = [
    "METHODS",
    "MODES",
    "MergeConfig",
    "MergePlan",
    "bipartite_soft_matching",
    "energy_score",
    "example",
    "margin_schedule",
    "merge_flops",
    "merge_tokens",
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
    _check_alpha(alpha)
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
    """Merge r = floor(T - T ratio) of the T tokens, taken from the 2r of highest energy; as ref, static
    n_out.
    """
    N, r = _removed(metric, ratio, class_token)
    _check_alpha(alpha)
    if r == 0:
        return _identity(metric)
    impl = _choose(impl, interpret)
    options = (float(margin), float(alpha), paper_form, bool(bsm), bool(class_token), impl, interpret)
    group = _pitome_group(jax.lax.stop_gradient(metric), r, *options)
    return MergePlan(group, N - r)


def pitome_text_matching(metric, *, ratio, margin, class_token=False):
    """PiToMe for text: Gaussian energy of width 1 - margin; a is the first r by energy, b the next r."""
    if margin >= 1:
        raise ValueError(f"margin must be below 1 (the width is 1 - margin), got {margin}")
    N, r = _removed(metric, ratio, class_token)
    if r == 0:
        return _identity(metric)
    group = _text_group(jax.lax.stop_gradient(metric), r, float(margin), bool(class_token))
    return MergePlan(group, N - r)


def bipartite_soft_matching(metric, *, r, class_token=False, distill_token=False):
    """ToMe: tokens at even places may merge into tokens at odd places; the r most similar pairs do."""
    N = dims(metric=(metric, "... N D"))["N"]
    if r < 0:
        raise ValueError(f"r must be at least 0, got {r}")
    r = min(r, (N - class_token - distill_token) // 2)
    if r <= 0:
        return _identity(metric)
    group = _tome_group(jax.lax.stop_gradient(metric), r, bool(class_token), bool(distill_token))
    return MergePlan(group, N - r)


def merge_tokens(x, group, n_out, *, size=None, mode="wavg"):
    """One token a slot, -> (x' [..., n_out, C] in x's dtype, size' [..., n_out] in at least float32).

    n_out is static. Sums are taken in at least float32. A slot outside 0..n_out - 1 is dropped.
    """
    dims(x=(x, "... N C"), group=(group, "... N"))
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    size = jnp.ones(group.shape, _wide(x.dtype)) if size is None else _sizes(size, x.dtype)
    dims(size=(size, "... N"), group=(group, "... N"))
    return _merge(x, group, size, operator.index(n_out), mode)


@jax.jit
def unmerge_tokens(y, group):
    """Give every input token the value of its slot: y [..., n_out, C], group [..., N] -> [..., N, C]."""
    dims(y=(y, "... M C"), group=(group, "... N"))
    return _rows(y, group)


def proportional_attention(q, k, v, size, *, scale=None):
    """softmax(scale q k^T + log size) v, in q's dtype; logits and their softmax in at least float32."""
    return _proportional(q, k, v, _sizes(size, q.dtype), scale)


@partial(jax.jit, static_argnums=4)
def _proportional(q, k, v, size, scale):
    n = dims(q=(q, "... L D"), k=(k, "... S D"), v=(v, "... S Dv"))
    size = jnp.expand_dims(size, expand_axes(size.shape, q.shape, n["S"]))
    scale = n["D"] ** -0.5 if scale is None else scale
    s = scale * jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide(q.dtype))
    p = softmax(s + jnp.log(size)).astype(v.dtype)
    return jnp.matmul(p, v, preferred_element_type=wide(v.dtype)).astype(q.dtype)


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
    """A pre-norm block that merges tokens between attention and MLP; -> (x' in x's dtype, size' in
    float32).
    """
    check_method(
        method, r=r, ratio=ratio, margin=margin, seed_groups=seed_groups, distill_token=distill_token
    )
    n = dims(x=(x, "... N C"))
    size = jnp.ones((*n["..."], n["N"]), _wide(x.dtype)) if size is None else _sizes(size, x.dtype)
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
    """The implementation of the energy that runs. At T <= 577 tokens the similarities fit a cache: auto is
    xla.
    """
    if impl not in ("auto", "xla", "hopper", "triton", "tpu"):
        raise ValueError(f'impl must be "auto", "xla", "hopper", "triton" or "tpu", got {impl!r}')
    if impl == "hopper":
        raise NotImplementedError(
            'no impl="hopper": tiles of 64 x 64 do not feed its tensor cores; use "triton"'
        )
    if impl == "triton" and not interpret and jax.default_backend() != "gpu":
        raise NotImplementedError(f'impl="triton" needs a GPU, and JAX runs on {jax.default_backend()}')
    if impl == "tpu" and not interpret and jax.default_backend() != "tpu":
        raise NotImplementedError(f'impl="tpu" needs a TPU, and JAX runs on {jax.default_backend()}')
    return "xla" if impl == "auto" else impl


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
        order = _descending(_energy_of(s, margin, alpha, paper_form))
        pairs = lambda a, b: _pairs(s, a, b)
    else:  # only the pairs that may merge are compared again
        order = _descending(_energy(patches, margin, alpha, paper_form, impl, interpret))
        unit = _unit(patches)
        pairs = lambda a, b: _products(_rows(unit, a), _rows(unit, b))
    if bsm:
        a, b = order[..., 0::2], order[..., 1::2]
        scores = pairs(a, b)
        ranked = _descending(scores.max(axis=-1))
        target = jnp.take_along_axis(_argmax(scores), ranked, axis=-1)[..., :r]
        a = jnp.take_along_axis(a, ranked, axis=-1)
        kept, a = a[..., r:], a[..., :r]
    else:
        a, b, kept = order[..., 0 : 2 * r : 2], order[..., 1 : 2 * r : 2], order[..., 2 * r :]
        target = _argmax(pairs(a, b))
    return _slots(metric.shape[-2], kept, b, a, target, class_token)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _text_group(metric, r, margin, class_token):
    s = _similarity(metric[..., int(class_token) :, :])
    sigma = 1 - margin
    energy = jnp.exp(-jnp.square((1 - s) / sigma) / 2).mean(axis=-1) / (sigma * (2 * np.pi) ** 0.5)
    order = _descending(energy)
    a, b, kept = order[..., :r], order[..., r : 2 * r], order[..., 2 * r :]
    return _slots(metric.shape[-2], kept, b, a, _argmax(_pairs(s, a, b)), class_token)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _tome_group(metric, r, class_token, distill_token):
    N = metric.shape[-2]
    unit = _unit(metric)
    scores = _products(unit[..., 0::2, :], unit[..., 1::2, :])
    if class_token:
        scores = scores.at[..., 0, :].set(-jnp.inf)
    if distill_token:
        scores = scores.at[..., :, 0].set(-jnp.inf)
    ranked = _descending(scores.max(axis=-1))
    target = jnp.take_along_axis(_argmax(scores), ranked, axis=-1)[..., :r]
    moved, kept = ranked[..., :r], ranked[..., r:]
    if class_token:
        kept = jnp.sort(kept, axis=-1)
    b = jnp.broadcast_to(
        lift(jnp.arange(N // 2, dtype=jnp.int32), metric.ndim - 1), (*metric.shape[:-2], N // 2)
    )
    group = _slots(N, 2 * kept, 2 * b + 1, 2 * moved, target, False)
    if not distill_token:
        return group
    n_kept = kept.shape[-1]  # the first b moves up to place 1, the a's behind it move down
    place = np.r_[0, np.arange(2, n_kept + 1), 1, np.arange(n_kept + 1, N - r)].astype(np.int32)
    return jnp.asarray(place)[group]


@partial(jax.jit, static_argnums=(3, 4))
def _merge(x, group, size, n_out, mode):
    lead, N, C = x.shape[:-2], x.shape[-2], x.shape[-1]
    flat = x.astype(size.dtype).reshape(-1, N, C), group.reshape(-1, N), size.reshape(-1, N)

    def one(x, g, s):
        total = jax.ops.segment_sum(s, g, n_out)
        if mode == "max":
            return jax.ops.segment_max(x, g, n_out), total
        if mode == "prune":  # the largest token, the first of equals
            largest = s == jax.ops.segment_max(s, g, n_out)[g]
            index = jnp.arange(N, dtype=jnp.int32)
            first = jax.ops.segment_min(jnp.where(largest, index, N), g, n_out)
            return x[first], s[first]
        y = jax.ops.segment_sum(x * s[:, None] if mode == "wavg" else x, g, n_out)
        if mode == "wavg":
            return y / total[:, None], total
        if mode == "mean":
            return y / jax.ops.segment_sum(jnp.ones_like(s), g, n_out)[:, None], total
        return y, total

    y, total = jax.vmap(one)(*flat)
    return y.astype(x.dtype).reshape(*lead, n_out, C), total.reshape(*lead, n_out)


def _unit(metric):
    x = metric.astype(wide(metric.dtype))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square == 0, 1, square))


def _products(a, b):
    """a b^T at full float32 precision: what is compared decides an order, so TF32 will not do."""
    return jnp.matmul(a, b.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _similarity(metric):
    unit = _unit(metric)
    return _products(unit, unit)


def _descending(values):
    """Indices by falling value; equal values by rising index."""
    return jnp.argsort(-values, axis=-1, stable=True).astype(jnp.int32)


def _argmax(scores):
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _pairs(s, a, b):
    """s[a, b]: rows and columns of the similarities, [..., len(a), len(b)]."""
    return jnp.take_along_axis(jnp.take_along_axis(s, a[..., None], axis=-2), b[..., None, :], axis=-1)


def _rows(x, index):
    return jnp.take_along_axis(x, index[..., None], axis=-2)


def _slots(N, kept, b, a, target, class_token):
    """The group of every token, for the output [class token, kept, b], where a[i] joins b[target[i]]."""
    first, n_kept, lead = int(class_token), kept.shape[-1], kept.shape[:-1]
    row = lambda n, start: jnp.broadcast_to(
        lift(jnp.arange(start, start + n, dtype=jnp.int32), len(lead) + 1), (*lead, n)
    )
    tokens = jnp.concatenate([kept, b, a], axis=-1) + first
    slots = jnp.concatenate([row(n_kept + b.shape[-1], first), target + first + n_kept], axis=-1)
    group = jnp.zeros((*lead, N), jnp.int32)
    return jnp.put_along_axis(group, tokens, slots, axis=-1, inplace=False)


def _removed(metric, ratio, class_token):
    N = dims(metric=(metric, "... N D"))["N"]
    return N, removed_tokens(N - class_token, ratio)


def _identity(metric):
    N = metric.shape[-2]
    every = lift(jnp.arange(N, dtype=jnp.int32), metric.ndim - 1)
    return MergePlan(jnp.broadcast_to(every, metric.shape[:-1]), N)


def _sizes(size, dtype):
    """Sizes in at least float32; values can be checked only where they are concrete."""
    if isinstance(size, np.ndarray) and (size <= 0).any():
        raise ValueError(f"size must be positive, got a smallest of {size.min()}")
    return jnp.asarray(size).astype(_wide(dtype))


def _wide(dtype):
    """The accumulator's dtype, for NumPy input too: float64 counts as float32 unless JAX has x64 on."""
    return wide(jax.dtypes.canonicalize_dtype(dtype))


def _check_alpha(alpha):
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
