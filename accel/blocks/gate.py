"""The gate of a mixture of experts in JAX; see ref/blocks/gate.py. Logits are float32 at full precision: they
decide an order.
"""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.shapes import alike, lift
from accel.blocks.softmax import softmax, wide
from ref.blocks.gate import TINY, GateOut, check_gate
from ref.blocks.quantize import check_finite
from ref.dims import dims

__all__ = ["GateOut", "moe_gate", "moe_gate_backward"]


def moe_gate(x, w_gate, *, top_k=2, noise=None, noise_std=1.0, train=False, as_released=False) -> GateOut:
    """The top_k largest of softmax(x w_gate^T); scores and probabilities in x's dtype, aux_loss wider."""
    E = check_gate(x, w_gate, top_k, noise, noise_std, train)
    check_finite("x", x)
    check_finite("w_gate", w_gate)
    std = noise_std / E if noise is not None else 0.0
    return _gate(x, w_gate, noise, k=top_k, std=float(std), train=bool(train), as_released=bool(as_released))


@partial(jax.jit, static_argnames=("k", "std", "train", "as_released"))
def _gate(x, w_gate, noise, *, k, std, train, as_released):
    E, dtype = len(w_gate), wide(x.dtype)
    clean = jnp.matmul(x.astype(dtype), w_gate.astype(dtype).T, precision="highest")
    noisy = clean if noise is None else clean + std * jnp.asarray(noise, dtype)
    p = softmax(noisy)
    order = jnp.argsort(-jax.lax.stop_gradient(noisy), axis=-1, stable=True).astype(jnp.int32)
    chosen = order[..., :k]
    scores = jnp.take_along_axis(p, chosen, axis=-1)
    loss = jnp.zeros((), dtype)
    if train:
        every = lift(jnp.arange(E, dtype=jnp.int32), chosen.ndim + 1)
        hit = chosen[..., None] == every  # [..., k, E]
        gates = jnp.where(hit, scores[..., None], jnp.zeros((), dtype)).sum(-2).reshape(-1, E)
        load = (gates > 0).astype(dtype).sum(0)
        if k < E and std > 0:
            values = p if as_released else noisy
            at = lambda rank: jnp.take_along_axis(values, order[..., rank, None], axis=-1)
            t = jnp.where(noisy > at(k), at(k), at(k - 1))
            load = jax.scipy.stats.norm.cdf((clean - t) / std).reshape(-1, E).sum(0)
        loss = _cv_squared(gates.sum(0)) + _cv_squared(load)
    return GateOut(chosen, scores.astype(x.dtype), p.astype(x.dtype), loss)


def moe_gate_backward(
    dscores, daux, x, w_gate, *, top_k=2, noise=None, noise_std=1.0, train=False, as_released=False
):
    """(dx, dw_gate) of `moe_gate` for cotangents of scores [..., k] and aux_loss, by JAX."""

    def kept(x, w_gate):
        g = moe_gate(
            x, w_gate, top_k=top_k, noise=noise, noise_std=noise_std, train=train, as_released=as_released
        )
        return g.scores, g.aux_loss

    (scores, loss), back = jax.vjp(kept, x, w_gate)
    dims(scores=(scores, f"... {top_k}"), dscores=(dscores, f"... {top_k}"))
    return back(alike((dscores.astype(scores.dtype), jnp.asarray(daux, loss.dtype)), scores, loss))


def _cv_squared(v):
    return jnp.zeros((), v.dtype) if len(v) == 1 else v.var(ddof=1) / (jnp.square(v.mean()) + TINY)
