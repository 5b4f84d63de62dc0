"""Activations stored in few bits, in JAX: ref/blocks/stored.py with float32 integers as there.

What is restored is at least float32. Nothing here has a gradient of its own: the layers of `accel.mesa` carry
custom rules.
"""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.quantize import update_range
from accel.blocks.softmax import wide
from ref.blocks.quantize import check_finite
from ref.blocks.stored import (
    Saved,
    check_groups,
    check_levels,
    check_quantize,
    check_update_time,
    stored_dtype,
)
from ref.dims import dims

__all__ = [
    "Saved",
    "dequantize_groups",
    "inverse_step",
    "moving_range",
    "overflow_fraction",
    "pack_groups",
    "quantize_groups",
    "restore",
    "store",
    "unpack_groups",
]


@partial(jax.jit, static_argnames=("groups", "group_axis"))
def pack_groups(x, *, groups, group_axis=-1):
    """One row a group: [..., C] -> [G, M]; channels (-1) or heads (-3) in contiguous groups."""
    size = check_groups(x, groups, group_axis)
    if group_axis == -1:
        split = jnp.reshape(x, (*x.shape[:-1], groups, size // groups))
        return jnp.moveaxis(split, -2, 0).reshape(groups, -1)
    return jnp.moveaxis(jnp.asarray(x), -3, 0).reshape(groups, -1)


def unpack_groups(x_grouped, shape, *, group_axis=-1):
    """The inverse of `pack_groups`: [G, M] -> shape."""
    shape = tuple(shape)
    groups = dims(x_grouped=(x_grouped, "G M"))["G"]
    if group_axis == -1:
        return jnp.moveaxis(jnp.reshape(x_grouped, (groups, *shape[:-1], -1)), 0, -2).reshape(shape)
    return jnp.moveaxis(jnp.reshape(x_grouped, (shape[-3], *shape[:-3], *shape[-2:])), 0, -3)


def quantize_groups(x, alpha, beta, *, group_axis=-1, levels=256, uniform=None):
    """min(rint(max((x - beta) (levels - 1) / alpha + u - 1/2, 0)), levels - 1), uint8 or uint16."""
    check_quantize(x, alpha, beta, group_axis, levels, uniform)
    return _quantize(x, alpha, beta, uniform, group_axis=group_axis, levels=levels)


@partial(jax.jit, static_argnames=("group_axis", "levels"))
def dequantize_groups(q, alpha, beta, *, group_axis=-1, levels=256):
    """q alpha / (levels - 1) + beta, in alpha's dtype, at least float32."""
    check_levels(levels)
    check_groups(q, len(alpha), group_axis)
    alpha = jnp.asarray(alpha)
    dtype = wide(alpha.dtype)
    step, least = alpha.astype(dtype) / (levels - 1), jnp.asarray(beta).astype(dtype)
    return jnp.asarray(q).astype(dtype) * _spread(step, q, group_axis) + _spread(least, q, group_axis)


@partial(jax.jit, static_argnames="group_axis")
def overflow_fraction(x, alpha, beta, *, group_axis=-1):
    """Share of the entries of x outside [beta, beta + alpha], which are clipped."""
    check_groups(x, len(alpha), group_axis)
    x, alpha, beta = map(jnp.asarray, (x, alpha, beta))
    above = x.astype(alpha.dtype) - _spread(beta, x, group_axis)
    return jnp.mean((above < 0) | (above > _spread(alpha, x, group_axis)), dtype=wide(alpha.dtype))


def store(x, state, groups, group_axis=-1, levels=256, momentum=0.9, update="before", uniform=None):
    """(Saved, state): x in few bits, and the running range of its groups one batch later.

    update: "before" moves the range first, a pass over x before the one that rounds; "after" rounds with the
    range that the earlier batches left, so that one pass does both.
    """
    alpha, beta, moved = moving_range(x, state, groups, group_axis, momentum, update)
    return Saved(_quantize(x, alpha, beta, uniform, group_axis=group_axis, levels=levels), alpha, beta), moved


def moving_range(x, state, groups, group_axis=-1, momentum=0.9, update="before"):
    """(alpha, beta, state): the range to store x with, and the running one a batch later."""
    check_update_time(update)
    check_finite("x", x)
    packed = pack_groups(x, groups=groups, group_axis=group_axis)
    moved = update_range(state, packed, momentum=momentum, axis=0)
    lo, hi = moved.lo, moved.hi
    if update == "after":
        first = state.step == 0
        lo, hi = (
            jnp.where(first, new, old.astype(new.dtype)) for new, old in ((lo, state.lo), (hi, state.hi))
        )
    return hi - lo, lo, moved


def restore(saved, dtype, *, group_axis=-1, levels=256):
    """The activation as the backward pass sees it, in that dtype; an exact one is kept as it is."""
    if not isinstance(saved, Saved):
        return saved.astype(dtype)
    q, alpha, beta = saved
    return dequantize_groups(q, alpha, beta, group_axis=group_axis, levels=levels).astype(dtype)


def inverse_step(alpha, levels):
    """(levels - 1) / alpha, 0 where alpha is 0."""
    flat = alpha == 0
    return jnp.where(flat, 0, (levels - 1) / jnp.where(flat, 1, jnp.abs(alpha)))


@partial(jax.jit, static_argnames=("group_axis", "levels"))
def _quantize(x, alpha, beta, uniform, group_axis, levels):
    x, alpha, beta = (jnp.asarray(a).astype(jnp.float32) for a in (x, alpha, beta))
    u = 0.5 if uniform is None else jnp.asarray(uniform).astype(jnp.float32)
    flat, scale = alpha == 0, inverse_step(alpha, levels)
    v = (x - _spread(beta, x, group_axis)) * _spread(scale, x, group_axis) + u - 0.5
    q = jnp.minimum(jnp.rint(jnp.maximum(v, 0)), levels - 1)
    return jnp.where(_spread(flat, x, group_axis), 0, q).astype(stored_dtype(levels))


def _spread(v, x, group_axis):
    """v [G] along the grouped axis of x, each value for its whole group, in x's rank."""
    wide_ = jnp.repeat(v, x.shape[group_axis] // len(v))
    return wide_.reshape((1,) * (x.ndim + group_axis) + wide_.shape + (1,) * (-1 - group_axis))
