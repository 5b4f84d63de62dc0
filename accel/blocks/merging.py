"""Merging tokens in JAX, with static shapes; see ref/blocks/merging.py for the definitions.

Plans are integers, constant under differentiation; gradients flow through the merge.
"""

import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.shapes import lift
from accel.blocks.softmax import softmax, wide
from ref.blocks.merging import MODES, MergePlan, expand_axes, random_plan, tome_schedule
from ref.blocks.quantize import check_finite
from ref.dims import dims

__all__ = [
    "MODES",
    "MergePlan",
    "best",
    "bipartite_soft_matching",
    "check_size",
    "descending",
    "identity_plan",
    "merge_tokens",
    "plan_of",
    "products",
    "proportional_attention",
    "random_plan",
    "take_rows",
    "tome_schedule",
    "unit_rows",
    "unmerge_tokens",
]


def merge_tokens(x, group, n_out, *, size=None, mode="wavg"):
    """One token a slot, -> (x' [..., n_out, C] in x's dtype, size' [..., n_out] in at least float32).

    n_out is static. Sums are taken in at least float32. A slot outside 0..n_out - 1 is dropped.
    """
    dims(x=(x, "... N C"), group=(group, "... N"))
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    size = check_size(size, x, group.shape)
    dims(size=(size, "... N"), group=(group, "... N"))
    return _merge(x, group, size, operator.index(n_out), mode)


@jax.jit
def unmerge_tokens(y, group):
    """Give every input token the value of its slot: y [..., n_out, C], group [..., N] -> [..., N, C]."""
    dims(y=(y, "... M C"), group=(group, "... N"))
    return take_rows(y, group)


def proportional_attention(q, k, v, size, *, scale=None):
    """softmax(scale q k^T + log size) v, in q's dtype; logits and their softmax in at least float32."""
    return _proportional(q, k, v, check_size(size, q, k.shape[-2:-1]), scale)


def bipartite_soft_matching(metric, *, r, class_token=False, distill_token=False):
    """ToMe: tokens at even places may merge into tokens at odd places; the r most similar pairs do."""
    N = dims(metric=(metric, "... N D"))["N"]
    check_finite("metric", metric)
    if r < 0:
        raise ValueError(f"r must be at least 0, got {r}")
    r = min(r, (N - class_token - distill_token) // 2)
    if r <= 0:
        return identity_plan(metric)
    group = _tome_group(jax.lax.stop_gradient(metric), r, bool(class_token), bool(distill_token))
    return MergePlan(group, N - r)


def identity_plan(metric):
    """The plan that merges nothing, for metric [..., N, D]."""
    N = metric.shape[-2]
    every = lift(jnp.arange(N, dtype=jnp.int32), metric.ndim - 1)
    return MergePlan(jnp.broadcast_to(every, metric.shape[:-1]), N)


def plan_of(N, kept, b, a, target, class_token):
    """The group of every token, for the output [class token, kept, b], where a[i] joins b[target[i]]."""
    first, n_kept, lead = int(class_token), kept.shape[-1], kept.shape[:-1]
    row = lambda n, start: jnp.broadcast_to(
        lift(jnp.arange(start, start + n, dtype=jnp.int32), len(lead) + 1), (*lead, n)
    )
    tokens = jnp.concatenate([kept, b, a], axis=-1) + first
    slots = jnp.concatenate([row(n_kept + b.shape[-1], first), target + first + n_kept], axis=-1)
    group = jnp.zeros((*lead, N), jnp.int32)
    return jnp.put_along_axis(group, tokens, slots, axis=-1, inplace=False)


def unit_rows(metric):
    """Rows of length 1, scaled by their largest entry first so that no square overflows; zeros stay zeros."""
    x = metric.astype(wide(metric.dtype))
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis=-1, keepdims=True, initial=0))
    x = x / jnp.where(largest == 0, 1, largest)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square == 0, 1, square))


def products(a, b):
    """a b^T at full float32 precision: what is compared decides an order, so TF32 will not do."""
    return jnp.matmul(a, b.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)


def descending(values):
    """Indices by falling value; equal values by rising index."""
    return jnp.argsort(-values, axis=-1, stable=True).astype(jnp.int32)


def best(scores):
    """The index of the largest score of every row, the first of equals, int32."""
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def take_rows(x, index):
    """x[index] along the tokens: x [..., N, C], index [..., M] -> [..., M, C]."""
    return jnp.take_along_axis(x, index[..., None], axis=-2)


def check_size(size, like, shape):
    """Sizes in like's accumulator dtype, at least float32; ones [*shape] for None.

    Raises: ValueError for a size <= 0, where the values are known.
    """
    dtype = wide(jax.dtypes.canonicalize_dtype(like.dtype))  # float64 counts as float32 unless JAX has x64 on
    if size is None:
        return jnp.ones(shape, dtype)
    if isinstance(size, np.ndarray) and not (size > 0).all():
        raise ValueError(f"size must be positive, got a smallest of {size.min()}")
    return jnp.asarray(size).astype(dtype)


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


@partial(jax.jit, static_argnums=4)
def _proportional(q, k, v, size, scale):
    n = dims(q=(q, "... L D"), k=(k, "... S D"), v=(v, "... S Dv"))
    size = jnp.expand_dims(size, expand_axes(size.shape, q.shape, n["S"]))
    scale = n["D"] ** -0.5 if scale is None else scale
    s = scale * jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide(q.dtype))
    p = softmax(s + jnp.log(size)).astype(v.dtype)
    return jnp.matmul(p, v, preferred_element_type=wide(v.dtype)).astype(q.dtype)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _tome_group(metric, r, class_token, distill_token):
    N = metric.shape[-2]
    unit = unit_rows(metric)
    scores = products(unit[..., 0::2, :], unit[..., 1::2, :])
    if class_token:
        scores = scores.at[..., 0, :].set(-jnp.inf)
    if distill_token:
        scores = scores.at[..., :, 0].set(-jnp.inf)
    ranked = descending(scores.max(axis=-1))
    target = jnp.take_along_axis(best(scores), ranked, axis=-1)[..., :r]
    moved, kept = ranked[..., :r], ranked[..., r:]
    if class_token:
        kept = jnp.sort(kept, axis=-1)
    b = jnp.broadcast_to(
        lift(jnp.arange(N // 2, dtype=jnp.int32), metric.ndim - 1), (*metric.shape[:-2], N // 2)
    )
    group = plan_of(N, 2 * kept, 2 * b + 1, 2 * moved, target, False)
    if not distill_token:
        return group
    n_kept = kept.shape[-1]  # the first b moves up to place 1, the a's behind it move down
    place = np.r_[0, np.arange(2, n_kept + 1), 1, np.arange(n_kept + 1, N - r)].astype(np.int32)
    return jnp.asarray(place)[group]
