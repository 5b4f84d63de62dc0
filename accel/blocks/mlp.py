"""Pointwise functions and the two feed-forward layers of transformers, in JAX."""

import jax
import jax.numpy as jnp
from jax.nn import relu, sigmoid, silu, softplus

from accel.blocks.shapes import lift
from ref.blocks.mlp import activation_pair

__all__ = ["gelu", "linear", "mlp", "relu", "sigmoid", "silu", "softplus", "swiglu"]


def gelu(x, *, approximate=False):
    """x Phi(x), the exact form unless approximate (tanh)."""
    return jax.nn.gelu(x, approximate=approximate)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate=True), "relu": relu, "silu": silu}


def linear(x, w, b=None):
    """x w + b in x's dtype: x [..., C], w [C, F], b [F] or None."""
    y = jnp.matmul(x, w.astype(x.dtype))
    return y if b is None else y + lift(b.astype(x.dtype), y.ndim)


def mlp(x, w_fc1, b_fc1, w_fc2, b_fc2, *, activation="gelu", remat=False):
    """activation(x w_fc1 + b_fc1) w_fc2 + b_fc2. x [..., C], w_fc1 [C, F], w_fc2 [F, C].

    remat: whether a backward pass takes the activation's derivative from its argument, computing it again.
    """
    activation_pair(activation)  # ref's check of the name
    act = ACTIVATIONS[activation]
    act = jax.checkpoint(act, prevent_cse=False) if remat else act
    return linear(act(linear(x, w_fc1, b_fc1)), w_fc2, b_fc2)


def swiglu(x, w_gate, w_up, w_down):
    """(silu(x w_gate) * (x w_up)) w_down. x [..., C], w_gate and w_up [C, F], w_down [F, C]."""
    w = lambda m: m.astype(x.dtype)
    return jnp.matmul(silu(jnp.matmul(x, w(w_gate))) * jnp.matmul(x, w(w_up)), w(w_down))
