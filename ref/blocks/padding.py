"""Texts of unequal lengths: which tokens are real, and how padding is kept from counting."""

import numpy as np

from ref.dims import float64


def token_rows(name, mask, shape, *, default=True):
    """The mask as bool [..., L] of that shape; None is `default` everywhere.

    Raises: ValueError, by `name`, for another shape or dtype.
    """
    if mask is None:
        return np.full(shape, default)
    mask = np.asarray(mask)
    if mask.shape != tuple(shape) or mask.dtype != bool:
        raise ValueError(f"{name} must be bool {list(shape)}, got {list(mask.shape)} of {mask.dtype}")
    return mask


def zero_padding(mask, *arrays):
    """The arrays [..., L, n] in float64, 0 (not NaN) where mask bool [..., L] is False; None keeps all."""
    if mask is None:
        return tuple(float64(x) for x in arrays)
    return tuple(np.where(np.asarray(mask)[..., None], float64(x), 0.0) for x in arrays)
