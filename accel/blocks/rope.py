"""Rotary position embedding in JAX; see ref/blocks/rope.py for the two layouts."""

import jax.numpy as jnp

from accel.blocks.shapes import lift
from accel.blocks.softmax import wide
from ref.dims import dims


def rope_angles(positions, head_dim, *, base=10000.0):
    """positions [T] -> angles [T, D/2]: position * base^(-2i/D), float32 (float64 under x64)."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    inverse = base ** (-jnp.arange(0, head_dim, 2, dtype=float) / head_dim)
    positions = jnp.asarray(positions).astype(inverse.dtype)[..., None]
    return positions * lift(inverse, positions.ndim)


def rope(x, angles, *, pairs="adjacent"):
    """Turn each pair (a, b) of x to (a cos - b sin, a sin + b cos). x [..., T, D], angles [T, D/2]."""
    dims(angles=(angles, f"{x.shape[-2]} {x.shape[-1] // 2}"))
    if pairs not in ("adjacent", "halves"):
        raise ValueError(f'pairs must be "adjacent" or "halves", got {pairs!r}')
    y = x.astype(wide(x.dtype))
    a, b = (y[..., 0::2], y[..., 1::2]) if pairs == "adjacent" else jnp.split(y, 2, axis=-1)
    c, s = (lift(f(angles).astype(y.dtype), a.ndim) for f in (jnp.cos, jnp.sin))
    a, b = a * c - b * s, a * s + b * c
    out = jnp.concatenate([a, b], -1) if pairs == "halves" else jnp.stack([a, b], -1).reshape(x.shape)
    return out.astype(x.dtype)
