"""Layer norm and RMS norm, with their gradients."""

import numpy as np

from ref.dims import float64


def layer_norm(x, weight, bias, *, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x [..., C], weight and bias [C]."""
    x = float64(x)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def layer_norm_vjp(x, weight, dy, *, eps=1e-5):
    """(dx, dweight, dbias) of `layer_norm` for the cotangent dy [..., C]."""
    x, dy = float64(x, dy)
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    xh, g = centred * rstd, dy * weight
    dx = rstd * (g - g.mean(axis=-1, keepdims=True) - xh * (g * xh).mean(axis=-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return dx, (dy * xh).sum(axis=rows), dy.sum(axis=rows)


def rms_norm(x, weight, *, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x [..., C], weight [C]."""
    x = float64(x)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rms_norm_vjp(x, weight, dy, *, eps=1e-5):
    """(dx, dweight) of `rms_norm` for the cotangent dy [..., C]."""
    x, dy = float64(x, dy)
    r = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    g = dy * weight
    dx = r * g - x * r**3 * (g * x).mean(axis=-1, keepdims=True)
    return dx, (dy * x * r).sum(axis=tuple(range(x.ndim - 1)))
