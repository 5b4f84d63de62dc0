"""Checks of arguments that many functions share, each with one wording."""

import numpy as np


def one_of(name, value, allowed):
    """Raise ValueError unless the value is one of those allowed, a tuple or the keys of a dict."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def at_least_one(**sizes):
    """Raise ValueError unless every size, given by its name, is at least 1."""
    for name, n in sizes.items():
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")


def check_share(name, x):
    """Raise ValueError unless x is in [0, 1]; NaN is not."""
    if not 0 <= x <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {x}")


def check_num_heads(width, num_heads, *, name="num_heads"):
    """Raise ValueError unless the width splits into that many heads."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{name} must divide the width {width}, got {num_heads}")


def check_ids(name, ids, count):
    """The ids as an array. Raises: ValueError unless they are integers in 0..count-1."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers in 0..{count - 1}, got {ids.dtype}")
    if ids.size and not (0 <= ids.min() and ids.max() < count):
        raise ValueError(f"{name} must be in 0..{count - 1}, got {ids.min()}..{ids.max()}")
    return ids


def check_integers(name, x, bits):
    """An int64 copy. Raises: ValueError unless x holds signed integers of `bits` bits, in whatever type."""
    x = np.asarray(x)
    half = 2 ** (bits - 1)
    if x.dtype.kind not in "iu" or (x.size and not (-half <= x.min() and x.max() < half)):
        raise ValueError(f"{name} must hold {bits}-bit integers")
    return x.astype(np.int64)
