"""Softmax and its mergeable state in JAX; see ref/blocks/softmax.py for the definitions."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ref.dims import dims


class SoftmaxState(NamedTuple):
    """State of a softmax-weighted sum over some keys: m, l [...], acc [..., Dv]; (-inf, 0, 0) for no keys."""

    m: jax.Array
    l: jax.Array
    acc: jax.Array


def softmax(logits, *, axis=-1):
    """exp(logits) / sum(exp(logits)) along `axis`, in at least float32; an all -inf slice gives zeros."""
    x = logits.astype(wide(logits.dtype))
    p = jnp.exp(x - shift(jax.lax.stop_gradient(x.max(axis=axis, keepdims=True))))
    total = p.sum(axis=axis, keepdims=True)
    return (p / jnp.where(total == 0, 1, total)).astype(logits.dtype)


def logsumexp(logits, *, axis=-1):
    """log(sum(exp(logits))) along `axis`; -inf where every logit is -inf."""
    x = logits.astype(wide(logits.dtype))
    m = shift(jax.lax.stop_gradient(x.max(axis=axis, keepdims=True)))
    total = jnp.exp(x - m).sum(axis=axis, keepdims=True)
    lse = jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    return lse.squeeze(axis).astype(logits.dtype)


def softmax_state(logits, v):
    """The state of one tile of keys: logits [..., L, S] (-inf = invisible), v [..., S, Dv]."""
    m = logits.max(axis=-1, initial=-jnp.inf)
    p = jnp.exp(logits - shift(m)[..., None])
    return SoftmaxState(m, p.sum(axis=-1), weigh(p, v))


def weigh(p, v):
    """P v; a value that no row gives weight does not count, NaN or not. p [..., L, S], v [..., S, Dv]."""
    seen = jnp.any(p != 0, axis=-2)[..., None]
    v = jnp.where(seen, v, jnp.zeros((), v.dtype))
    return jnp.matmul(p.astype(v.dtype), v, preferred_element_type=wide(v.dtype))


@partial(jax.jit, inline=True)
def merge(a, b):
    """State of the union of two disjoint sets of keys; the associative, commutative merge of ref."""
    m = jnp.maximum(a.m, b.m)
    fa, fb = jnp.exp(a.m - shift(m)), jnp.exp(b.m - shift(m))
    return SoftmaxState(m, fa * a.l + fb * b.l, fa[..., None] * a.acc + fb[..., None] * b.acc)


@partial(jax.jit, inline=True)
def finalize(state):
    """(o, lse) = (acc / l, m + log l); a row that saw no key gives o = 0 and lse = -inf."""
    seen = state.l > 0
    l = jnp.where(seen, state.l, 1)
    return state.acc / l[..., None], jnp.where(seen, shift(state.m) + jnp.log(l), -jnp.inf)


@partial(jax.jit, static_argnames="start")
def online_softmax(logits, *, start=0):
    """Softmax in one pass over the keys from `start` on, wrapping: -> (p [..., S], m [...], l [...])."""
    S = dims(logits=(logits, "... S"))["S"]
    if not 0 <= start < S:
        raise ValueError(f"start must be in [0, S), got start={start} with S={S}")
    x = logits.astype(wide(logits.dtype))

    def step(carry, s):
        m, l = carry
        m_new = jnp.maximum(m, s)
        return (m_new, l * jnp.exp(m - shift(m_new)) + jnp.exp(s - shift(m_new))), None

    init = jnp.full_like(x[..., 0], -jnp.inf), jnp.zeros_like(x[..., 0])
    (m, l), _ = jax.lax.scan(step, init, jnp.moveaxis(jnp.roll(x, -start, axis=-1), -1, 0))
    p = jnp.exp(x - shift(m)[..., None]) / jnp.where(l == 0, 1, l)[..., None]
    return p.astype(logits.dtype), m.astype(logits.dtype), l.astype(logits.dtype)


def shift(m):
    """The maximum as a shift of exponents: 0 in place of -inf, since -inf - (-inf) would be NaN."""
    return jnp.where(jnp.isneginf(m), jnp.zeros((), m.dtype), m)


def wide(dtype):
    """The dtype to accumulate in: float64 for float64, float32 for everything narrower."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32  # promote_types refuses this pair when strict
