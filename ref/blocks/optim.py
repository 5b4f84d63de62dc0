"""Gradient descent, RMSprop and Adam as pure functions on trees: (params, grads, state) -> (params, state).

Source: Tieleman and Hinton 2012 (RMSprop), Kingma and Ba 2015, Algorithm 1 (Adam), Loshchilov and Hutter 2019
(decoupled weight decay), Pascanu et al. 2013 (clipping by the norm).
A tree is an array, None, or a tuple, NamedTuple, list or dictionary of trees. Computed in float64.
"""

from typing import Any, NamedTuple

import numpy as np

from ref.dims import float64


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
    return np.sqrt(sum(np.sum(np.square(float64(x))) for x in tree_leaves(tree)))


def clip_by_norm(grads, limit):
    """The gradients scaled so that their global norm is at most `limit`."""
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    scale = min(1.0, limit / max(global_norm(grads), 1e-30))
    return tree_map(lambda g: float64(g) * scale, grads)


def sgd_init(params):
    """The velocity before the first step: zeros."""
    return tree_map(np.zeros_like, params)


def sgd(params, grads, state, *, lr, momentum=0.0):
    """v = momentum v + g; p - lr v. state: the velocity."""
    state = tree_map(lambda v, g: momentum * float64(v) + g, state, grads)
    return tree_map(lambda p, v: p - lr * v, params, state), state


def rmsprop_init(params):
    """The running mean square before the first step: zeros."""
    return tree_map(np.zeros_like, params)


def rmsprop(params, grads, state, *, lr, decay=0.9, eps=1e-8):
    """v = decay v + (1 - decay) g^2; p - lr g / (sqrt(v) + eps). state: v."""
    state = tree_map(lambda v, g: decay * float64(v) + (1 - decay) * float64(g) ** 2, state, grads)
    return tree_map(lambda p, g, v: p - lr * g / (np.sqrt(v) + eps), params, grads, state), state


def adam_init(params):
    """No steps, zero means."""
    return AdamState(0, tree_map(np.zeros_like, params), tree_map(np.zeros_like, params))


def adam(params, grads, state, *, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p), mhat and vhat the means freed of their start."""
    step = state.step + 1
    m = tree_map(lambda m, g: b1 * float64(m) + (1 - b1) * float64(g), state.m, grads)
    v = tree_map(lambda v, g: b2 * float64(v) + (1 - b2) * float64(g) ** 2, state.v, grads)
    free1, free2 = 1 - b1**step, 1 - b2**step
    move = lambda p, m, v: p - lr * (m / free1 / (np.sqrt(v / free2) + eps) + weight_decay * float64(p))
    return tree_map(move, params, m, v), AdamState(step, m, v)


def matrix_mask(params):
    """The tree with True at matrices, embeddings included, and False at biases and norms: what is decayed."""
    return tree_map(lambda p: np.ndim(p) > 1, params)


def adamw_step(
    params,
    grads,
    state: AdamState,
    *,
    lr,
    weight_decay,
    decay_mask,
    clip=1.0,
    betas=(0.9, 0.999),
    adam_eps=1e-8,
):
    """(params, state, grad_norm): gradients cut to the norm `clip`, Adam, and p -= lr weight_decay p.

    decay_mask: tree of bool, which arrays decay. grad_norm is taken before the cut. state:
    `adam_init(params)`.
    Raises: ValueError unless clip > 0 and lr, weight_decay >= 0.
    """
    if not (lr >= 0 and weight_decay >= 0):
        raise ValueError(f"lr and weight_decay must not be negative, got {lr=}, {weight_decay=}")
    norm, cut = global_norm(grads), clip_by_norm(grads, clip)
    moved, state = adam(params, cut, state, lr=lr, b1=betas[0], b2=betas[1], eps=adam_eps)
    decay = lambda new, old, decays: new - lr * weight_decay * float64(old) if decays else new
    return tree_map(decay, moved, params, decay_mask), state, norm


def warmup_linear(step, *, steps, warmup=0.1):
    """The factor of the learning rate at `step` of `steps`: up from 0 over a share `warmup`, then down to 0.

    Step 0 has rate 0, unless warmup rounds to no step; the last step has 1 / (steps - warm).
    Raises: ValueError unless 0 <= step < steps and 0 <= warmup < 1.
    """
    if not (0 <= step < steps and 0 <= warmup < 1):
        raise ValueError(f"need 0 <= step < steps and 0 <= warmup < 1, got {step=}, {steps=}, {warmup=}")
    warm = round(warmup * steps)
    return step / warm if step < warm else (steps - step) / (steps - warm)


def cosine_decay(step, *, steps):
    """The factor of the learning rate at `step` of `steps`: half a cosine, from 1 at step 0 towards 0."""
    if not 0 <= step < steps:
        raise ValueError(f"need 0 <= step < steps, got {step=}, {steps=}")
    return 0.5 * (1 + np.cos(np.pi * step / steps))
