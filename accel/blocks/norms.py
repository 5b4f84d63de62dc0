"""Layer norm and RMS norm in JAX: statistics in at least float32, result in x's dtype."""

import jax.numpy as jnp
from jax import lax

from accel.blocks.shapes import lift
from accel.blocks.softmax import wide


def layer_norm(x, weight, bias, *, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x [..., C], weight and bias [C]."""
    y = x.astype(wide(x.dtype))
    centred = y - y.mean(axis=-1, keepdims=True)
    y = centred * lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return (y * _row(weight, y) + _row(bias, y)).astype(x.dtype)


def rms_norm(x, weight, *, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x [..., C], weight [C]."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
    return (y * _row(weight, y)).astype(x.dtype)


def _row(w, x):
    """A vector [C] in x's dtype and rank."""
    return lift(w.astype(x.dtype), x.ndim)
