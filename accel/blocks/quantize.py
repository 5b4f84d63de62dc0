"""Affine quantisation in JAX: the functions of ref/blocks/quantize.py, in at least float32.

Rounding has no useful derivative: `fake_quantize` and `lsq_quantize` carry the straight-through gradients of
their `_vjp` functions as custom rules.
"""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.shapes import alike
from accel.blocks.softmax import wide
from ref.blocks.quantize import (
    CONVENTIONS,
    EPS,
    KINDS,
    RangeState,
    along,
    check_quantize,
    check_range,
    check_scale,
    check_update,
    grid,
    integer_dtype,
    lsq_factor,
    symmetric_divisor,
)

__all__ = [
    "CONVENTIONS",
    "EPS",
    "KINDS",
    "RangeState",
    "affine_params",
    "dequantize",
    "fake_quantize",
    "fake_quantize_vjp",
    "grid",
    "init_range",
    "integer_dtype",
    "lsq_quantize",
    "lsq_quantize_vjp",
    "quantize",
    "symmetric_params",
    "update_range",
]


def affine_params(lo, hi, *, bits=8, signed=False, eps=EPS):
    """(scale, zero) of the grid that covers [lo, hi] and holds 0 exactly; scale at least float32."""
    qmin, qmax = grid(bits, signed=signed)
    check_range(lo, hi)
    lo, hi = jnp.minimum(_wide(lo), 0), jnp.maximum(_wide(hi), 0)
    scale = jnp.maximum((hi - lo) / (qmax - qmin), eps)
    return scale, jnp.clip(qmin - jnp.rint(lo / scale), qmin, qmax).astype(jnp.int32)


def symmetric_params(absmax, *, bits=8, signed=True, convention="narrow", eps=EPS):
    """scale of the grid around 0 that covers [-absmax, absmax]; the zero point is 0."""
    divisor = symmetric_divisor(bits, signed, convention)
    check_range(0.0, absmax, "absmax")
    return jnp.maximum(_wide(absmax) / divisor, eps)


def quantize(x, scale, zero, *, qmin, qmax, axis=None):
    """clip(rint(x / scale) + zero, qmin, qmax), in the smallest integer dtype that holds the grid."""
    check_quantize(x, scale, zero, qmin, qmax, axis)
    return jnp.clip(_levels(x, scale, zero, axis), qmin, qmax).astype(integer_dtype(qmin, qmax))


def dequantize(q, scale, zero, *, axis=None):
    """scale (q - zero): q integers, scale and zero [] or [n] -> the scale's dtype, at least float32."""
    check_scale(q, scale, zero, axis)
    q, scale = jnp.asarray(q), _wide(scale)
    return _scaled(q.astype(scale.dtype), scale, zero, axis)


def fake_quantize(x, scale, zero, *, qmin, qmax, axis=None):
    """dequantize(quantize(x)) in x's dtype; the gradient is passed straight through on the grid."""
    check_quantize(x, scale, zero, qmin, qmax, axis)
    arrays = tuple(map(jnp.asarray, (x, scale, zero)))
    return _fake(*alike(arrays, arrays), qmin, qmax, axis)


def fake_quantize_vjp(x, scale, zero, grad_out, *, qmin, qmax, axis=None):
    """grad_x = grad_out where rint(x / scale) + zero lies on the grid, 0 where it was clipped."""
    check_quantize(x, scale, zero, qmin, qmax, axis)
    return _fake_bwd(qmin, qmax, axis, (x, scale, zero), jnp.asarray(grad_out))[0]


def lsq_quantize(x, scale, *, qmin, qmax, grad_factor=None):
    """scale clip(rint(x / scale), qmin, qmax) in x's dtype, the scale learned."""
    check_quantize(x, scale, 0, qmin, qmax, None)
    arrays = jnp.asarray(x), jnp.asarray(scale)
    return _lsq(*alike(arrays, arrays), qmin, qmax, grad_factor)


def lsq_quantize_vjp(x, scale, grad_out, *, qmin, qmax, grad_factor=None):
    """(grad_x, grad_scale): straight through on the grid, and the learned step's own gradient."""
    check_quantize(x, scale, 0, qmin, qmax, None)
    return _lsq_bwd(qmin, qmax, grad_factor, (jnp.asarray(x), jnp.asarray(scale)), jnp.asarray(grad_out))


def init_range(shape=()):
    """The state before the first batch: zeros of that shape, step 0."""
    return RangeState(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((), jnp.int32))


def update_range(state: RangeState, x, *, kind="ema", momentum=0.99, percentile=None, axis=None):
    """The range after one more batch, in the dtype of state.lo; at step 0 the batch's own range."""
    check_update(state, x, kind, momentum, percentile, axis)
    x, old = jnp.asarray(x), [_wide(state.lo), _wide(state.hi)]
    rows = x.reshape(-1) if axis is None else jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    rows = rows.astype(wide(x.dtype))
    if percentile is None:
        new = [rows.min(axis=-1), rows.max(axis=-1)]
    else:
        new = [jnp.percentile(rows, p, axis=-1) for p in (100.0 - percentile, float(percentile))]
    new = [v.astype(o.dtype) for v, o in zip(new, old, strict=True)]
    if kind == "ema":
        moved = [momentum * o + (1 - momentum) * v for o, v in zip(old, new, strict=True)]
    else:
        moved = [jnp.minimum(old[0], new[0]), jnp.maximum(old[1], new[1])]
    first = jnp.asarray(state.step) == 0
    lo, hi = (jnp.where(first, v, m) for v, m in zip(new, moved, strict=True))
    return RangeState(lo, hi, jnp.asarray(state.step) + 1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _fake(x, scale, zero, qmin, qmax, axis):
    q = jnp.clip(_levels(x, scale, zero, axis), qmin, qmax)
    return _scaled(q, _wide(scale), zero, axis).astype(x.dtype)


def _fake_fwd(x, scale, zero, qmin, qmax, axis):
    return _fake(x, scale, zero, qmin, qmax, axis), (x, scale, zero)


def _fake_bwd(qmin, qmax, axis, saved, g):
    q = _levels(*saved, axis)
    return jnp.where((qmin <= q) & (q <= qmax), g, jnp.zeros((), g.dtype)), None, None


_fake.defvjp(_fake_fwd, _fake_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _lsq(x, scale, qmin, qmax, grad_factor):
    s = _wide(scale)
    return (_lift(s, x) * jnp.clip(_levels(x, s, 0, None), qmin, qmax).astype(s.dtype)).astype(x.dtype)


def _lsq_fwd(x, scale, qmin, qmax, grad_factor):
    return _lsq(x, scale, qmin, qmax, grad_factor), (x, scale)


def _lsq_bwd(qmin, qmax, grad_factor, saved, g):
    x, scale = saved
    r = _levels(x, scale, 0, None)
    inside = (qmin <= r) & (r <= qmax)
    factor = lsq_factor(x.size, qmax) if grad_factor is None else grad_factor
    v = x.astype(r.dtype) / _lift(_wide(scale).astype(r.dtype), x)
    slope = jnp.where(inside, r - v, jnp.clip(r, qmin, qmax))
    grad_scale = factor * jnp.sum(g.astype(r.dtype) * slope)
    return jnp.where(inside, g, jnp.zeros((), g.dtype)), grad_scale.astype(scale.dtype)


_lsq.defvjp(_lsq_fwd, _lsq_bwd)


def _levels(x, scale, zero, axis):
    """rint(x / scale) + zero, before the clip, in the wider of the two dtypes."""
    x, scale, zero = _wide(x), _wide(scale), jnp.asarray(zero)
    dtype = _wider(x.dtype, scale.dtype)
    x, scale, zero = x.astype(dtype), scale.astype(dtype), zero.astype(dtype)
    return jnp.rint(x / along(scale, x, axis)) + along(zero, x, axis)


def _scaled(q, scale, zero, axis):
    dtype = _wider(q.dtype, scale.dtype)
    q, scale, zero = q.astype(dtype), scale.astype(dtype), jnp.asarray(zero).astype(dtype)
    return along(scale, q, axis) * (q - along(zero, q, axis))


def _wider(a, b):
    return a if wide(a) == jnp.float64 else b


def _wide(x):
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.zeros(()).dtype)


def _lift(v, x):
    return v.reshape((1,) * x.ndim)
