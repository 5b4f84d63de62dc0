"""One step of the rotational unit with its memory, on values that a kernel holds: rows [1, n], matrix [n, n].

Products are sums along an axis, which both Triton and Mosaic take for a single vector, and which round as
float32. n may be padded: `there` [1, n] says which entries are real; padded ones are and stay 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Step(NamedTuple):
    """What is fixed: eta (None: lengths are free), the activation, the gate, and the two thresholds."""

    eta: float | None
    activation: Callable
    update_gate: bool
    eps: float
    band: float


def column(row):
    """[1, n] -> [n, 1] by a masked sum."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def row(column):
    """[n, 1] -> [1, n] by a masked sum."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def rum_step(options, r, e, g, h, assoc, w_r, w_u, there):
    """(h', A') of one step, see ref. r, g: what x adds to the target and to the gate; w_r, w_u: h's part."""
    standing = column(h)
    r = jnp.where(there, r + jnp.sum(standing * w_r, axis=0, keepdims=True), 0.0)
    u, w, c, s = plane(e, r, there, options.eps, options.band)
    x, y = (c - 1) * u - s * w, (c - 1) * w + s * u
    assoc = assoc + _times(assoc, u) * x + _times(assoc, w) * y
    new = options.activation(e + row(_times(assoc, h)))
    if options.update_gate:
        gate = jax.nn.sigmoid(g + jnp.sum(standing * w_u, axis=0, keepdims=True))
        new = gate * h + (1 - gate) * new
    new = jnp.where(there, new, 0.0)
    return new if options.eta is None else options.eta * new / jnp.maximum(_norm(new), options.eps), assoc


def plane(a, b, there, eps, band):
    """(u, w [1, n], cosine, sine [1, 1]) of R(a, b); degenerate planes as in ref."""
    length_a, length_b = _norm(a), _norm(b)
    none = (length_a <= eps) | (length_b <= eps)
    u = jnp.where(length_a <= eps, a / eps, a / jnp.where(length_a <= eps, 1.0, length_a))
    to = b / jnp.where(length_b <= eps, 1.0, length_b)
    c = jnp.sum(u * to, axis=1, keepdims=True)
    across = to - c * u
    s = _norm(across)
    flat = none | (s <= band)
    at = jax.lax.broadcasted_iota(jnp.int32, u.shape, 1)
    size = jnp.where(there, jnp.abs(u), jnp.inf)
    least = jnp.min(size, axis=1, keepdims=True)
    first = jnp.min(jnp.where(size == least, at, u.shape[1]), axis=1, keepdims=True)
    axis = jnp.where(at == first, 1.0, 0.0)
    axis = axis - jnp.sum(axis * u, axis=1, keepdims=True) * u
    w = jnp.where(flat, axis / _norm(axis), across / jnp.where(flat, 1.0, s))
    turned = jnp.where(~none & (c < 0), -1.0, 1.0)
    return u, w, jnp.where(flat, turned, c), jnp.where(flat, 0.0, s)


def _times(matrix, row):
    """matrix v [n, 1] for the row v^T [1, n]."""
    return jnp.sum(matrix * row, axis=1, keepdims=True)


def _norm(row):
    return jnp.sqrt(jnp.sum(row * row, axis=1, keepdims=True))


def _diagonal(n):
    at = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (n, n), axis)
    return at(0) == at(1)
