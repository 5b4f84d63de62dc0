"""Which keys a query may see, in JAX. True = visible."""

import jax.numpy as jnp

from accel.blocks.shapes import lift


def causal_mask(num_queries, num_keys):
    """[L, S], True where key j <= query i + S - L: the last query sees every key (bottom-right alignment)."""
    return jnp.arange(num_keys)[None] <= jnp.arange(num_queries)[:, None] + (num_keys - num_queries)


def window_mask(num_queries, num_keys, *, left, right):
    """[L, S], True where -left <= j - (i + S - L) <= right, aligned bottom-right as `causal_mask`."""
    offset = jnp.arange(num_keys)[None] - (jnp.arange(num_queries)[:, None] + (num_keys - num_queries))
    return (-left <= offset) & (offset <= right)


def length_mask(lengths, num_keys):
    """[..., 1, S], True for the first `lengths` keys: int lengths [...]."""
    lengths = jnp.asarray(lengths)[..., None, None]
    return lift(jnp.arange(num_keys), lengths.ndim) < lengths


def visible(rows, cols, *, num_queries, num_keys, mask=None, key_lengths=None, causal=False):
    """What queries `rows` may see of keys `cols`, index arrays: bool [..., len(rows), len(cols)]."""
    n = jnp.asarray(num_keys if key_lengths is None else key_lengths)[..., None, None]
    i, j = lift(rows[:, None], n.ndim), lift(cols, n.ndim)
    seen = j < n
    if causal:
        seen = seen & (j <= i + (n - num_queries))
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], num_queries, num_keys))
        mask = mask[..., rows[:, None], cols[None, :]]
        ndim = max(mask.ndim, seen.ndim)
        seen = lift(seen, ndim) & lift(mask, ndim)
    return jnp.broadcast_to(seen, (*seen.shape[:-2], len(rows), len(cols)))
