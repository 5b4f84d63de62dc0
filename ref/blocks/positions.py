"""Positions that are not learned."""

import numpy as np


def sinusoidal_positions(length, dim, *, base=10000.0):
    """[length, dim]: sin(t base^(-2i / dim)) in column 2 i, the cosine of the same angle in column 2 i + 1.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5. An odd dim leaves the last cosine out.
    Raises: ValueError for a negative length or dim < 1.
    """
    if length < 0 or dim < 1:
        raise ValueError(f"need length >= 0 and dim >= 1, got {length=}, {dim=}")
    angles = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)[:, :dim]
