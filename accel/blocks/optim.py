"""Gradient descent, RMSprop and Adam in JAX: the functions of ref/blocks/optim.py on any pytree of arrays.

Everything is traced, `lr` and the step too, so that a schedule compiles once.
"""

import jax
import jax.numpy as jnp

from ref.blocks.optim import AdamState

__all__ = [
    "AdamState",
    "adam",
    "adam_init",
    "clip_by_norm",
    "global_norm",
    "rmsprop",
    "rmsprop_init",
    "sgd",
    "sgd_init",
    "tree_leaves",
    "tree_map",
]

tree_map = jax.tree.map
tree_leaves = jax.tree.leaves


def global_norm(tree):
    """Square root of the sum of squares over all arrays."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in tree_leaves(tree)))


def clip_by_norm(grads, limit):
    """The gradients scaled so that their global norm is at most `limit`, a number."""
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    norm = global_norm(grads)
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return tree_map(lambda g: g * scale.astype(g.dtype), grads)


def sgd_init(params):
    """The velocity before the first step: zeros."""
    return tree_map(jnp.zeros_like, params)


def sgd(params, grads, state, *, lr, momentum=0.0):
    """v = momentum v + g; p - lr v. state: the velocity."""
    state = tree_map(lambda v, g: momentum * v + g, state, grads)
    return tree_map(lambda p, v: p - lr * v, params, state), state


def rmsprop_init(params):
    """The running mean square before the first step: zeros."""
    return tree_map(jnp.zeros_like, params)


def rmsprop(params, grads, state, *, lr, decay=0.9, eps=1e-8):
    """v = decay v + (1 - decay) g^2; p - lr g / (sqrt(v) + eps). state: v."""
    state = tree_map(lambda v, g: decay * v + (1 - decay) * g * g, state, grads)
    return tree_map(lambda p, g, v: p - lr * g / (jnp.sqrt(v) + eps), params, grads, state), state


def adam_init(params):
    """No steps, zero means."""
    zeros = lambda: tree_map(jnp.zeros_like, params)
    return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())


def adam(params, grads, state, *, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p), mhat and vhat the means freed of their start."""
    step = state.step + 1
    m = tree_map(lambda m, g: b1 * m + (1 - b1) * g, state.m, grads)
    v = tree_map(lambda v, g: b2 * v + (1 - b2) * g * g, state.v, grads)

    def move(p, m, v):
        n = step.astype(p.dtype)
        mhat, vhat = m / (1 - b1**n), v / (1 - b2**n)
        return p - lr * (mhat / (jnp.sqrt(vhat) + eps) + weight_decay * p)

    return tree_map(move, params, m, v), AdamState(step, m, v)
