"""Affine quantisation x ~ scale (q - zero), fake quantisation for training, and running ranges.

Source: the survey arXiv 2307.07982 for the scheme; PyTorch's observers for the conventions; Esser et al. 2020
(LSQ) for the learned step. Rounding is to nearest, ties to even. axis: None = one scale or range for the
whole tensor; k = every index of axis k has its own.
"""

from typing import NamedTuple

import numpy as np

from ref.dims import float64

CONVENTIONS = ("narrow", "full", "torch")
KINDS = ("ema", "minmax")
EPS = 2.0**-23  # the least scale: an interval of zero width still has a step


def grid(bits, *, signed, narrow=False):
    """(qmin, qmax) of `bits` bits: [-2^(b-1), 2^(b-1) - 1], narrow without the lowest; unsigned [0, 2^b - 1].

    Raises: ValueError for fewer than 2 bits.
    """
    _check_bits(bits)
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1


def affine_params(lo, hi, *, bits=8, signed=False, eps=EPS):
    """(scale, zero) of the grid that covers [lo, hi] and holds 0 exactly.

    scale = max((hi - lo) / (qmax - qmin), eps), zero = clip(qmin - rint(lo / scale), qmin, qmax), after
    lo = min(lo, 0) and hi = max(hi, 0).
    Args: lo, hi [...], lo <= hi. Returns: scale [...] float64, zero [...] int32.
    Raises: ValueError for fewer than 2 bits, a range upside down or one that is not finite.
    """
    qmin, qmax = grid(bits, signed=signed)
    check_range(lo, hi)
    lo, hi = np.minimum(float64(lo), 0), np.maximum(float64(hi), 0)
    scale = np.maximum((hi - lo) / (qmax - qmin), eps)
    return scale, np.clip(qmin - np.rint(lo / scale), qmin, qmax).astype(np.int32)


def symmetric_params(absmax, *, bits=8, signed=True, convention="narrow", eps=EPS):
    """scale of the grid around 0 that covers [-absmax, absmax]; the zero point is 0.

    convention: what absmax is divided by: "narrow" 2^(b-1) - 1, "full" 2^(b-1), "torch" (2^b - 1) / 2.
      signed=False: the data is not negative, and the divisor 2^b - 1.
    Raises: ValueError for fewer than 2 bits, an unknown convention, an absmax below 0 or not finite.
    """
    divisor = symmetric_divisor(bits, signed, convention)
    check_range(0.0, absmax, "absmax")
    return np.maximum(float64(absmax) / divisor, eps)


def quantize(x, scale, zero, *, qmin, qmax, axis=None):
    """clip(rint(x / scale) + zero, qmin, qmax), in the smallest integer dtype that holds the grid.

    Args: x, finite, not empty; scale > 0 and integer zero: [], or [n] with n the size of `axis`.
    Raises: ValueError naming the argument at fault.
    """
    q = _levels(x, scale, zero, qmin, qmax, axis)
    return np.clip(q, qmin, qmax).astype(integer_dtype(qmin, qmax))


def dequantize(q, scale, zero, *, axis=None):
    """scale (q - zero): q integers, scale and zero [] or [n] -> float64."""
    check_scale(q, scale, zero, axis)
    return along(float64(scale), q, axis) * (float64(q) - along(float64(zero), q, axis))


def fake_quantize(x, scale, zero, *, qmin, qmax, axis=None):
    """dequantize(quantize(x)): what x becomes, as a float; its gradient is passed straight through."""
    q = np.clip(_levels(x, scale, zero, qmin, qmax, axis), qmin, qmax)
    return along(float64(scale), q, axis) * (q - along(float64(zero), q, axis))


def fake_quantize_vjp(x, scale, zero, grad_out, *, qmin, qmax, axis=None):
    """grad_x = grad_out where rint(x / scale) + zero lies on the grid, 0 where it was clipped."""
    q = _levels(x, scale, zero, qmin, qmax, axis)
    return np.where((qmin <= q) & (q <= qmax), float64(grad_out), 0.0)


def lsq_quantize(x, scale, *, qmin, qmax, grad_factor=None):
    """scale clip(rint(x / scale), qmin, qmax), where the scale is learned; grad_factor acts on its gradient.

    Args: x, not empty; scale [] > 0. Source: Esser et al. 2020, equations 1 and 2.
    """
    v = _levels(x, scale, 0, qmin, qmax, None)
    return float64(scale) * np.clip(v, qmin, qmax)


def lsq_quantize_vjp(x, scale, grad_out, *, qmin, qmax, grad_factor=None):
    """(grad_x, grad_scale): straight through on the grid, and the learned step's own gradient.

    grad_scale = f sum grad_out (rint(v) - v on the grid, else the end of it that was hit), v = x / scale,
    f = grad_factor, None = 1 / sqrt(x.size qmax). Source: Esser et al. 2020, equations 3 to 5.
    """
    r = _levels(x, scale, 0, qmin, qmax, None)
    x, scale, g = float64(x, scale, grad_out)
    inside = (qmin <= r) & (r <= qmax)
    factor = lsq_factor(x.size, qmax) if grad_factor is None else grad_factor
    slope = np.where(inside, r - x / scale, np.clip(r, qmin, qmax))
    return np.where(inside, g, 0.0), factor * np.sum(g * slope)


class RangeState(NamedTuple):
    """A running range: lo and hi, [] or [n]; step [], how many batches it has seen."""

    lo: np.ndarray
    hi: np.ndarray
    step: np.ndarray


def init_range(shape=()):
    """The state before the first batch: zeros of that shape, step 0."""
    return RangeState(np.zeros(shape), np.zeros(shape), np.zeros((), np.int32))


def update_range(state: RangeState, x, *, kind="ema", momentum=0.99, percentile=None, axis=None):
    """The range after one more batch: "ema" momentum old + (1 - momentum) new, "minmax" the union.

    At step 0 the batch's own range is taken. percentile=p takes the p-th and (100 - p)-th percentile of the
    batch instead of its maximum and minimum.
    Raises: ValueError for an unknown kind, momentum outside [0, 1], percentile outside [50, 100], an empty or
    non-finite x, or an axis that does not exist or does not fit the state.
    """
    check_update(state, x, kind, momentum, percentile, axis)
    rows = _rows(float64(x), axis)
    if percentile is None:
        lo, hi = rows.min(axis=-1), rows.max(axis=-1)
    else:
        lo, hi = np.percentile(rows, 100 - percentile, axis=-1), np.percentile(rows, percentile, axis=-1)
    if kind == "ema":
        moved = [momentum * old + (1 - momentum) * new for old, new in ((state.lo, lo), (state.hi, hi))]
    else:
        moved = [np.minimum(state.lo, lo), np.maximum(state.hi, hi)]
    first = state.step == 0
    return RangeState(np.where(first, lo, moved[0]), np.where(first, hi, moved[1]), state.step + 1)


def symmetric_divisor(bits, signed, convention):
    """What absmax is divided by. Raises: ValueError as `symmetric_params`."""
    _check_bits(bits)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if not signed:
        return 2**bits - 1
    half = 2 ** (bits - 1)
    return {"narrow": half - 1, "full": half, "torch": half - 0.5}[convention]


def lsq_factor(size, qmax):
    """1 / sqrt(size qmax): keeps the step's updates in proportion to those of the weights."""
    if qmax < 1:
        raise ValueError(f"grad_factor=None needs qmax >= 1, got {qmax}")
    return (size * qmax) ** -0.5


def integer_dtype(qmin, qmax):
    """The smallest NumPy integer dtype that holds qmin..qmax. Raises: ValueError unless qmin < qmax."""
    if qmin >= qmax:
        raise ValueError(f"qmin must be below qmax, got {qmin=}, {qmax=}")
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32):
        if np.iinfo(dtype).min <= qmin and qmax <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"the grid {qmin}..{qmax} does not fit 32 bits")


def along(v, x, axis):
    """v ([] or [n]) shaped so that it stands along `axis` of x."""
    if axis is None or v.ndim == 0:
        return v.reshape((1,) * x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    return v.reshape(shape)


def check_quantize(x, scale, zero, qmin, qmax, axis):
    """Raise ValueError for a bad call of `quantize` and its kin; values are checked where they are known."""
    integer_dtype(qmin, qmax)
    if x.size == 0:
        raise ValueError(f"x must not be empty, got shape {list(x.shape)}")
    check_finite("x", x)
    check_scale(x, scale, zero, axis)


def check_scale(x, scale, zero, axis):
    """Raise ValueError unless scale and zero are [] or [n] along an existing axis, and scale is positive."""
    allowed = [()]
    if axis is not None:
        check_axis(x, axis)
        allowed.append((x.shape[axis],))
    for name, v in (("scale", scale), ("zero", zero)):
        if np.shape(v) not in allowed:
            raise ValueError(f"{name} must have shape {' or '.join(str(list(s)) for s in allowed)} with "
                             f"axis={axis}, got {list(np.shape(v))}")  # fmt: skip
    if known(scale) and not np.all(np.asarray(scale) > 0):
        raise ValueError(f"scale must be positive, got a least of {np.min(scale)}")


def check_update(state, x, kind, momentum, percentile, axis):
    """Raise ValueError for a bad call of `update_range`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if percentile is not None and not 50 <= percentile <= 100:
        raise ValueError(f"percentile must be in [50, 100], got {percentile}")
    if x.size == 0:
        raise ValueError(f"x must not be empty, got shape {list(x.shape)}")
    if axis is not None:
        check_axis(x, axis)
    want = () if axis is None else (x.shape[axis],)
    for name, v in (("state.lo", state.lo), ("state.hi", state.hi), ("state.step", state.step)):
        shape = () if name == "state.step" else want
        if np.shape(v) != shape:
            raise ValueError(f"{name} must have shape {list(shape)} with {axis=}, got {list(np.shape(v))}")
    check_finite("x", x)


def check_range(lo, hi, name="hi"):
    """Raise ValueError unless lo <= hi, both finite, where the values are known."""
    if known(lo) and known(hi):
        if not (np.all(np.isfinite(lo)) and np.all(np.isfinite(hi))):
            raise ValueError(f"lo and {name} must be finite")
        if np.any(np.asarray(lo) > np.asarray(hi)):
            raise ValueError(f"{name} must not be below {'lo' if name == 'hi' else 0}, got {hi}")


def check_finite(name, x):
    """Raise ValueError if x is known and holds a NaN or an infinity."""
    if known(x) and not np.all(np.isfinite(np.asarray(x, np.float64))):
        raise ValueError(f"{name} must be finite, it holds a NaN or an infinity")


def check_axis(x, axis):
    """Raise ValueError unless x has that axis."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis must be in {-x.ndim}..{x.ndim - 1} for x of shape {list(x.shape)}, got {axis}"
        )


def known(x):
    """Whether the values of x can be looked at: NumPy and Python numbers, not traced arrays."""
    return isinstance(x, int | float | list | tuple | np.ndarray | np.generic)


def _levels(x, scale, zero, qmin, qmax, axis):
    """rint(x / scale) + zero, before the clip, float64."""
    check_quantize(x, scale, zero, qmin, qmax, axis)
    x = float64(x)
    return np.rint(x / along(float64(scale), x, axis)) + along(float64(zero), x, axis)


def _rows(x, axis):
    """x as [all], or [n, rest] with `axis` first."""
    return x.reshape(-1) if axis is None else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def _check_bits(bits):
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
