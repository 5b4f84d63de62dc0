"""Pointwise functions and the two feed-forward layers of transformers, in JAX."""

import jax
import jax.numpy as jnp
from jax.nn import sigmoid, silu, softplus

from accel.blocks.shapes import lift

__all__ = ["affine", "gelu", "mlp", "sigmoid", "silu", "softplus", "swiglu"]


def gelu(x, *, approximate=False):
    """x Phi(x), the exact form unless approximate (tanh)."""
    return jax.nn.gelu(x, approximate=approximate)


def affine(x, w, b):
    """x w + b in x's dtype, accumulated in at least float32: x [..., C], w [C, F], b [F]."""
    y = jnp.matmul(x, w.astype(x.dtype))
    return y + lift(b.astype(x.dtype), y.ndim)


def mlp(x, w_fc1, b_fc1, w_fc2, b_fc2, *, activation=gelu):
    """activation(x w_fc1 + b_fc1) w_fc2 + b_fc2. x [..., C], w_fc1 [C, F], w_fc2 [F, C]."""
    return affine(activation(affine(x, w_fc1, b_fc1)), w_fc2, b_fc2)


def swiglu(x, w_gate, w_up, w_down):
    """(silu(x w_gate) * (x w_up)) w_down. x [..., C], w_gate and w_up [C, F], w_down [F, C]."""
    w = lambda m: m.astype(x.dtype)
    return jnp.matmul(silu(jnp.matmul(x, w(w_gate))) * jnp.matmul(x, w(w_up)), w(w_down))
