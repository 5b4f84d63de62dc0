"""Draws of initial weights by a NumPy Generator."""

import numpy as np


def truncated_normal(rng, shape):
    """Standard normal numbers of the given shape; those beyond two deviations are drawn again."""
    w = rng.standard_normal(shape)
    while (far := np.abs(w) > 2).any():
        w[far] = rng.standard_normal(far.sum())
    return w
