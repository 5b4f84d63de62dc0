"""A tensor of any size made into a parameter of a given shape: cut, repeated, scaled.

Source: GHN-2 and GHN-3 (Knyazev et al. 2021, 2023), whose hypernetworks write small blocks and tile them; the
scales are those of He et al. 2015.
"""

import numpy as np

from ref.blocks.mlp import sigmoid
from ref.checks import one_of
from ref.dims import float64

NORMS = ("fan_in", "gpt2", "std")


def tile_params(w, *, shape):
    """w cut, and repeated along its first and second axis, to the shape; kernels are cut around the centre.

    Tables [1, n, c] have no kernel: all three axes are cut at the end, and repeated. w may have kernel axes
    that the shape lacks, and a matrix may become a kernel of 1 x 1. Raises: ValueError for axes that cannot
    be made.
    """
    return float64(w)[_tile_index(w, shape)].reshape(shape)


def tile_params_backward(w, dtiled, *, shape):
    """The gradient of w of `tile_params` for dtiled [*shape]: copies add up."""
    dw, index = np.zeros_like(float64(w)), _tile_index(w, shape)
    np.add.at(dw, index, float64(dtiled).reshape(np.broadcast_shapes(*(i.shape for i in index))))
    return dw


def normalize_params(w, *, kind="weight", norm="fan_in", layers=None, initializer_range=0.02):
    """The scale that a tensor of random numbers of variance 1 needs as a parameter; w has its own shape.

    Matrices and kernels: w sqrt(beta / fan_in), fan_in = w[0].size; beta 2, but 1 for kernels with one input
    channel or k_h < k_w; tables of positions [1, n, c >= 11] stay as they are. A vector: kind "weight" 2
    sigmoid(w / 2) in (0, 2), "bias" tanh(w / 5) in (-1, 1).
    norm: "gpt2" divides by sqrt(2 layers) too where layers is given (projections into the residual stream);
    "std" makes the deviation of every tensor but a vector initializer_range.
    Raises: ValueError for another kind or norm.
    """
    w, factor = float64(w), _factor(w, kind, norm, layers)
    if w.ndim > 1:
        return w / (_std(w) + 1e-7) * initializer_range if norm == "std" else w * factor
    return 2 * sigmoid(w / 2) if kind == "weight" else np.tanh(0.2 * w)


def normalize_params_backward(w, dy, *, kind="weight", norm="fan_in", layers=None, initializer_range=0.02):
    """The gradient of w of `normalize_params` for dy of its shape."""
    w, dy, factor = float64(w), float64(dy), _factor(w, kind, norm, layers)
    if norm == "std" and w.ndim > 1:
        s, n = _std(w), max(w.size - 1, 1)
        ds = (w - w.mean()) / (n * s) if s > 0 else 0 * w
        return initializer_range / (s + 1e-7) * (dy - (dy * w).sum() / (s + 1e-7) * ds)
    if w.ndim > 1:
        return dy * factor
    y = normalize_params(w, kind=kind)
    return dy * y * (2 - y) / 4 if kind == "weight" else dy * 0.2 * (1 - y**2)


def group_size(n, *, max_shape):
    """Channels that the released code asks the decoder for, so that nodes share a call; cut after.

    min(n, max), a third more if divisible by 3, and max from max / 2 on: 384 asks for 512.
    """
    n = min(n, max_shape)
    n = 4 * n // 3 if n % 3 == 0 else n
    return max_shape if n >= max_shape / 2 else n


def _tile_index(w, shape):
    """For each axis of w, the entries that the tiled tensor reads, ready to index with."""
    shape = tuple(shape)
    target = shape[:2] if np.ndim(w) == 2 and shape[2:] == (1, 1) else shape
    if not 1 <= len(target) <= np.ndim(w) or min(shape) < 1:
        raise ValueError(f"shape {list(shape)} cannot be made of w with shape {list(np.shape(w))}")
    target, index = (*target, *(1,) * (np.ndim(w) - len(target))), []
    for axis, (have, want) in enumerate(zip(np.shape(w), target, strict=True)):
        if axis < 2 or np.ndim(w) == 3:
            index.append(np.arange(want) % min(want, have))
        elif want > have:
            raise ValueError(f"shape {list(shape)} has a larger kernel than w with shape {list(np.shape(w))}")
        else:
            index.append(np.arange(have // 2 - want // 2, have // 2 + (want + 1) // 2))
    return np.ix_(*index)


def _factor(w, kind, norm, layers):
    if kind not in ("weight", "bias"):
        raise ValueError(f'kind must be "weight" or "bias", got {kind!r}')
    one_of("norm", norm, NORMS)
    shape = np.shape(w)
    if len(shape) < 2 or (len(shape) > 2 and shape[0] == 1 and shape[2] >= 11):
        return 1.0
    single = len(shape) > 2 and (shape[1] == 1 or (len(shape) > 3 and shape[2] < shape[3]))
    residual = 2 * layers if norm == "gpt2" and layers else 1
    return np.sqrt((1 if single else 2) / np.prod(shape[1:]) / residual)


def _std(w):
    return w.std(ddof=1) if w.size > 1 else 0.0
