"""Ranks are never promoted silently: `lift` says it."""


def lift(x, ndim):
    """x with axes of size 1 in front, so that it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
