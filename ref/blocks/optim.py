"""Gradient descent, RMSprop and Adam as pure functions on trees: (params, grads, state) -> (params, state).

Source: Tieleman and Hinton 2012 (RMSprop), Kingma and Ba 2015, Algorithm 1 (Adam), Loshchilov and Hutter 2019
(decoupled weight decay), Pascanu et al. 2013 (clipping by the norm).
A tree is an array, None, or a tuple, NamedTuple, list or dictionary of trees.
"""

from typing import Any, NamedTuple

import numpy as np


class AdamState(NamedTuple):
    """Steps taken, and the running means m of the gradient and v of its square."""

    step: int
    m: Any
    v: Any


def tree_map(fn, tree, *rest):
    """fn on every array of equal trees; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {k: tree_map(fn, x, *(r[k] for r in rest)) for k, x in tree.items()}
    if isinstance(tree, tuple | list):
        made = [tree_map(fn, *xs) for xs in zip(tree, *rest, strict=True)]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    return fn(tree, *rest)


def tree_leaves(tree):
    """The arrays of a tree, in order."""
    found = []
    tree_map(lambda x: found.append(x), tree)
    return found


def global_norm(tree):
    """Square root of the sum of squares over all arrays."""
    return np.sqrt(sum(np.sum(np.square(x)) for x in tree_leaves(tree)))


def clip_by_norm(grads, limit):
    """The gradients scaled so that their global norm is at most `limit`."""
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    scale = min(1.0, limit / max(global_norm(grads), 1e-30))
    return tree_map(lambda g: g * scale, grads)


def sgd_init(params):
    """The velocity before the first step: zeros."""
    return tree_map(np.zeros_like, params)


def sgd(params, grads, state, *, lr, momentum=0.0):
    """v = momentum v + g; p - lr v. state: the velocity."""
    state = tree_map(lambda v, g: momentum * v + g, state, grads)
    return tree_map(lambda p, v: p - lr * v, params, state), state


def rmsprop_init(params):
    """The running mean square before the first step: zeros."""
    return tree_map(np.zeros_like, params)


def rmsprop(params, grads, state, *, lr, decay=0.9, eps=1e-8):
    """v = decay v + (1 - decay) g^2; p - lr g / (sqrt(v) + eps). state: v."""
    state = tree_map(lambda v, g: decay * v + (1 - decay) * g * g, state, grads)
    return tree_map(lambda p, g, v: p - lr * g / (np.sqrt(v) + eps), params, grads, state), state


def adam_init(params):
    """No steps, zero means."""
    return AdamState(0, tree_map(np.zeros_like, params), tree_map(np.zeros_like, params))


def adam(params, grads, state, *, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p), mhat and vhat the means freed of their start."""
    step = state.step + 1
    m = tree_map(lambda m, g: b1 * m + (1 - b1) * g, state.m, grads)
    v = tree_map(lambda v, g: b2 * v + (1 - b2) * g * g, state.v, grads)
    free1, free2 = 1 - b1**step, 1 - b2**step
    move = lambda p, m, v: p - lr * (m / free1 / (np.sqrt(v / free2) + eps) + weight_decay * p)
    return tree_map(move, params, m, v), AdamState(step, m, v)
