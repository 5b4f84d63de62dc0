"""Activations stored in few bits: grouped, scaled by a running range, rounded, and restored.

Source: Pan et al. 2021 (arXiv 2111.11124), section 3.2 and equations 1 to 7; the repository (ziplab/Mesa)
where the paper is silent. There a value above the running range wraps modulo 256; here it is clipped. The
integers are computed in float32, since the number format is the subject; what is restored is float64.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.quantize import check_finite, known, update_range
from ref.dims import dims, float64

UPDATES = ("before", "after")


class Saved(NamedTuple):
    """An activation as it is kept: q uint8 (uint16 above 256 levels); range alpha and minimum beta [G]."""

    q: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray


def pack_groups(x, *, groups, group_axis=-1):
    """One row a group: [..., C] -> [G, M].

    group_axis: -1 splits the channels into G contiguous groups; -3 the heads of [..., H, L, D], where
    neighbouring heads share a group if G < H. Raises: ValueError unless G divides that axis.
    """
    size = check_groups(x, groups, group_axis)
    if group_axis == -1:
        split = x.reshape(*x.shape[:-1], groups, size // groups)
        return np.moveaxis(split, -2, 0).reshape(groups, -1)
    return np.moveaxis(x, -3, 0).reshape(groups, -1)


def unpack_groups(x_grouped, shape, *, group_axis=-1):
    """The inverse of `pack_groups`: [G, M] -> shape."""
    shape = tuple(shape)
    groups = dims(x_grouped=(x_grouped, "G M"))["G"]
    if group_axis == -1:
        x = x_grouped.reshape(groups, *shape[:-1], -1)
        return np.moveaxis(x, 0, -2).reshape(shape)
    return np.moveaxis(x_grouped.reshape(shape[-3], *shape[:-3], *shape[-2:]), 0, -3)


def quantize_groups(x, alpha, beta, *, group_axis=-1, levels=256, uniform=None):
    """min(rint(max((x - beta) (levels - 1) / alpha + u - 1/2, 0)), levels - 1) (equations 2 and 4).

    Args: x, finite; alpha >= 0 and beta [G]: range and minimum of each group. uniform: u, drawn from [0, 1),
        in the shape of x: stochastic rounding; None = 1/2, to nearest.
    Returns: uint8, or uint16 above 256 levels, in the layout of x; zeros where alpha is 0.
    Raises: ValueError naming the argument at fault.
    """
    check_quantize(x, alpha, beta, group_axis, levels, uniform)
    x, alpha, beta = (np.asanyarray(a, np.float32) for a in (x, alpha, beta))
    u = np.float32(0.5) if uniform is None else np.asanyarray(uniform, np.float32)
    flat = alpha == 0
    scale = np.where(
        flat, np.float32(0), np.float32(levels - 1) / np.where(flat, np.float32(1), np.abs(alpha))
    )
    v = (x - spread(beta, x, group_axis)) * spread(scale, x, group_axis) + u - np.float32(0.5)
    q = np.minimum(np.rint(np.maximum(v, 0)), levels - 1)
    return np.where(spread(flat, x, group_axis), 0, q).astype(stored_dtype(levels))


def dequantize_groups(q, alpha, beta, *, group_axis=-1, levels=256):
    """q alpha / (levels - 1) + beta: integers in the layout of x -> float64."""
    check_levels(levels)
    check_groups(q, len(alpha), group_axis)
    alpha, beta = float64(alpha, beta)
    return float64(q) * spread(alpha / (levels - 1), q, group_axis) + spread(beta, q, group_axis)


def overflow_fraction(x, alpha, beta, *, group_axis=-1):
    """Share of the entries of x outside [beta, beta + alpha]: these are clipped."""
    check_groups(x, len(alpha), group_axis)
    x, alpha, beta = float64(x, alpha, beta)
    above = x - spread(beta, x, group_axis)
    return np.mean((above < 0) | (above > spread(alpha, x, group_axis)))


def store(x, state, groups, group_axis=-1, levels=256, momentum=0.9, update="before", uniform=None):
    """(Saved, state): x in few bits, and the running range of its groups one batch later.

    update: "before": the range moves first, so that this batch is a tenth of it; "after": the range that the
      earlier batches left is used, so that x is read once. The first batch is all of its own range in both.
    Raises: ValueError naming the argument at fault.
    """
    check_update_time(update)
    check_finite("x", x)
    moved = update_range(
        state, pack_groups(x, groups=groups, group_axis=group_axis), momentum=momentum, axis=0
    )
    lo, hi = moved.lo, moved.hi
    if update == "after":
        lo, hi = (np.where(state.step == 0, new, old) for new, old in ((lo, state.lo), (hi, state.hi)))
    alpha, beta = hi - lo, lo
    q = quantize_groups(x, alpha, beta, group_axis=group_axis, levels=levels, uniform=uniform)
    return Saved(q, alpha, beta), moved


def restore(saved, *, group_axis=-1, levels=256):
    """The activation as the backward pass sees it, float64; an array that was kept exact is itself."""
    if not hasattr(saved, "q"):
        return saved
    return dequantize_groups(saved.q, saved.alpha, saved.beta, group_axis=group_axis, levels=levels)


def stored_dtype(levels):
    """uint8 up to 256 levels, uint16 above."""
    check_levels(levels)
    return np.dtype(np.uint8 if levels <= 256 else np.uint16)


def spread(v, x, group_axis):
    """v [G] along the grouped axis of x, each value for its whole group, ready to broadcast."""
    wide = np.repeat(v, x.shape[group_axis] // len(v))
    return wide.reshape(wide.shape + (1,) * (-1 - group_axis))


def check_levels(levels):
    """Raise ValueError unless 2 <= levels <= 65536."""
    if not 2 <= levels <= 65536:
        raise ValueError(f"levels must be in 2..65536, got {levels}")


def check_update_time(update):
    """Raise ValueError unless update is "before" or "after"."""
    if update not in UPDATES:
        raise ValueError(f'update must be "before" or "after", got {update!r}')


def check_groups(x, groups, group_axis):
    """Raise ValueError unless the groups divide an axis that may be grouped; the size of that axis."""
    if group_axis not in (-1, -3):
        raise ValueError(f"group_axis must be -1 (channels) or -3 (heads), got {group_axis}")
    if x.ndim < -group_axis:
        raise ValueError(f"group_axis={group_axis} needs {-group_axis} axes, got shape {list(x.shape)}")
    if groups < 1 or x.shape[group_axis] % groups:
        raise ValueError(f"groups must divide axis {group_axis} of size {x.shape[group_axis]}, got {groups}")
    return x.shape[group_axis]


def check_quantize(x, alpha, beta, group_axis, levels, uniform):
    """Raise ValueError for a bad call of `quantize_groups`; values are checked where they are known."""
    dims(alpha=(alpha, "G"), beta=(beta, "G"))
    check_levels(levels)
    check_groups(x, len(alpha), group_axis)
    check_finite("x", x)
    if uniform is not None:
        if tuple(uniform.shape) != tuple(x.shape):
            raise ValueError(f"uniform must have the shape {list(x.shape)} of x, got {list(uniform.shape)}")
        if known(uniform) and not (np.all(uniform >= 0) and np.all(uniform < 1)):
            raise ValueError("uniform must lie in [0, 1)")
