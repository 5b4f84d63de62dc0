"""Dense attention in JAX, the baseline, and what all attention shares: checks and grouped heads."""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.masks import visible
from accel.blocks.shapes import lift
from accel.blocks.softmax import finalize, logsumexp, shift, softmax_state, weigh, wide
from ref.blocks.attention import check_attention

__all__ = [
    "attention_dense",
    "check_attention",
    "group",
    "join_heads",
    "rows_first",
    "split_heads",
    "ungroup",
]


@partial(jax.jit, static_argnames=("causal", "scale", "dropout_p", "return_lse"))
def _dense(q, k, v, mask, key_lengths, dropout_mask, *, causal, scale, dropout_p, return_lse):
    L, D = q.shape[-2:]
    S, kv_heads = k.shape[-2], k.shape[-3] if k.ndim > 2 else 1
    lead = q.shape[:-2]
    qg = group(q, kv_heads)  # [..., Hkv, H/Hkv, L, D]; k and v get an axis instead of being repeated
    kg, vg = (jnp.expand_dims(x, -3) if x.ndim > 2 else x[None, None] for x in (k, v))
    regroup = lambda x: None if x is None else group(broadcast_lead(x, q.ndim), kv_heads)
    lengths = None if key_lengths is None else jnp.broadcast_to(key_lengths, lead)[..., None, None]
    lengths = None if lengths is None else group(lengths, kv_heads)[..., 0, 0]
    seen = visible(
        jnp.arange(L),
        jnp.arange(S),
        num_queries=L,
        num_keys=S,
        mask=regroup(mask),
        key_lengths=lengths,
        causal=causal,
    )
    scale = D**-0.5 if scale is None else scale
    s = scale * jnp.matmul(qg, kg.swapaxes(-1, -2), preferred_element_type=wide(q.dtype))
    s = jnp.where(lift(seen, s.ndim), s, -jnp.inf)
    if dropout_mask is None:
        o, lse = finalize(softmax_state(s, vg))
    else:
        lse = logsumexp(s)
        p = jnp.exp(s - shift(lse)[..., None]) * regroup(dropout_mask).astype(s.dtype) / (1 - dropout_p)
        o = weigh(p, vg)
    o, lse = ungroup(o, q.ndim).astype(q.dtype), lse.reshape((*lead, L))
    return (o, lse) if return_lse else o


def attention_dense(
    q,
    k,
    v,
    *,
    mask=None,
    key_lengths=None,
    causal=False,
    scale=None,
    dropout_mask=None,
    dropout_p=0.0,
    return_lse=False,
):
    """softmax(scale q k^T over the visible keys) v with the scores materialised; as ref, o in q's dtype.

    Scores, probabilities' sums and lse are float32 (float64 for float64 input).
    """
    check_attention(q, k, v, mask, key_lengths, dropout_mask, dropout_p)
    return _dense(
        q,
        k,
        v,
        mask,
        key_lengths,
        dropout_mask,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )


def group(x, kv_heads):
    """[..., H, L, D] -> [..., Hkv, H/Hkv, L, D]; without heads [L, D] -> [1, 1, L, D]. H = 1 broadcasts."""
    if x.ndim == 2:
        return x[None, None]
    if x.shape[-3] == 1:
        return jnp.expand_dims(x, -3)
    return x.reshape(*x.shape[:-3], kv_heads, -1, *x.shape[-2:])


def ungroup(x, ndim):
    """The inverse of `group` for an array whose original had `ndim` axes."""
    if ndim == 2:
        return x[0, 0]
    return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])


def broadcast_lead(x, ndim):
    """A mask [..., L, S] with as many axes as q: missing leading axes are 1, ready for `group`."""
    return lift(x, ndim) if ndim > 2 else x


def split_heads(x, num_heads):
    """[..., L, H*D] -> [..., H, L, D]."""
    return x.reshape(*x.shape[:-1], num_heads, -1).swapaxes(-2, -3)


def join_heads(x):
    """[..., H, L, D] -> [..., L, H*D]."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


def rows_first(attend):
    """An attention of [B, H, L, D], as blocks call it, from an `attend` of [B, L, H, D].

    attend: with the arguments of `jax.nn.dot_product_attention`, ours or another. Compiled, its turning of
    the heads and that of `split_heads` cancel: a kernel for such rows gets the projections without a copy.
    Causal order is for as many queries as keys (JAX aligns them at the top, `flash_attention` at the bottom).
    """
    swap = lambda x: jnp.moveaxis(x, -3, -2)

    def attention(q, k, v, *, mask=None, causal=False):
        return swap(attend(swap(q), swap(k), swap(v), mask=mask, is_causal=causal))

    return attention
