"""Rotary position embedding: pairs of channels turn by an angle proportional to the position.

Source: Su et al. 2021 (RoFormer), section 3.4. Two layouts are in use and must not be mixed: adjacent pairs
(2i, 2i+1), as in the paper and in GGUF files of the llama family, and halves (i, i + D/2), as in most other
code.
"""

import numpy as np

from ref.dims import dims, float64


def rope_angles(positions, head_dim, *, base=10000.0):
    """positions [T] -> angles [T, D/2]: position * base^(-2i/D). Raises: ValueError if D is odd."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    return np.asarray(positions, np.float64)[..., None] * base ** (-np.arange(0, head_dim, 2) / head_dim)


def rope(x, angles, *, pairs="adjacent"):
    """Turn each pair (a, b) of x to (a cos - b sin, a sin + b cos). x [..., T, D], angles [T, D/2].

    pairs: "adjacent" takes channels (2i, 2i+1), "halves" takes (i, i + D/2).
    Raises: ValueError if pairs is neither, or the shapes disagree.
    """
    dims(angles=(angles, f"{x.shape[-2]} {x.shape[-1] // 2}"))
    a, b = _pair(float64(x), pairs)
    c, s = np.cos(angles), np.sin(angles)
    return _join(a * c - b * s, a * s + b * c, pairs)


def _pair(x, pairs):
    if pairs == "adjacent":
        return x[..., 0::2], x[..., 1::2]
    if pairs == "halves":
        return np.split(x, 2, axis=-1)
    raise ValueError(f'pairs must be "adjacent" or "halves", got {pairs!r}')


def _join(a, b, pairs):
    if pairs == "halves":
        return np.concatenate([a, b], axis=-1)
    return np.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)
