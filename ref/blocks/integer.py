"""Integer arithmetic of int8 networks: fixed-point multipliers, requantising, square roots, packed bits.

Source: the rounding of gemmlowp and CMSIS-NN for `requantize`; Newton's method for `integer_sqrt`.
"""

import numpy as np

ROUNDINGS = ("double", "single")


def quantize_multiplier(real):
    """(multiplier, shift) int32: real = multiplier 2^(shift - 31), 2^30 <= multiplier < 2^31; 0 -> (0, 0).

    To nearest, ties away from zero.
    Args: real >= 0, finite, any shape. Raises: ValueError for another, or one outside 2^-31..2^31.
    """
    real = np.asarray(real, np.float64)
    if not (np.isfinite(real).all() and (real >= 0).all()):
        raise ValueError("real must be finite and not negative")
    m, e = np.frexp(real)  # m in [1/2, 1)
    q = np.floor(m * 2**31 + 0.5)
    over = q == 2**31
    q, e = np.where(over, q / 2, q), np.where(real > 0, e + over, 0)
    if (np.abs(e) > 31).any():
        raise ValueError("real must lie between 2^-31 and 2^31, or be 0")
    return q.astype(np.int32), e.astype(np.int32)


def requantize(acc, multiplier, shift, *, rounding="double"):
    """acc multiplier 2^(shift - 31) as an integer, elementwise; no zero point, no clamp. int32 in and out.

    rounding: "double" rounds twice, as gemmlowp does: the doubling high multiply to nearest, ties up, then
      the right shift to nearest, ties away from zero. "single" rounds the whole once, ties up.
    Raises: ValueError for another rounding, floats, values beyond int32, or a left shift that leaves it.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f'rounding must be "double" or "single", got {rounding!r}')
    for name, x in (("acc", acc), ("multiplier", multiplier), ("shift", shift)):
        x = np.asarray(x)
        if x.dtype.kind not in "iu" or (x.size and not (-(2**31) <= x.min() and x.max() < 2**31)):
            raise ValueError(f"{name} must hold 32-bit integers")
    acc, m, shift = (np.asarray(x, np.int64) for x in (acc, multiplier, shift))
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    if rounding == "single":
        places = 31 - shift
        return ((acc * m + (np.int64(1) << (places - 1))) >> places).astype(np.int32)
    shifted = acc << left
    if shifted.size and not (-(2**31) <= shifted.min() and shifted.max() < 2**31):
        raise ValueError("acc << shift must stay within 32 bits")
    x = shifted * m
    nudge = np.where(x >= 0, 1 << 30, 1 - (1 << 30))
    high = np.minimum(_truncate(x + nudge, 31), 2**31 - 1)
    mask = (np.int64(1) << right) - 1
    return ((high >> right) + ((high & mask) > (mask >> 1) + (high < 0))).astype(np.int32)


def integer_sqrt(n):
    """The floor of the square root of int64 n >= 0, by Newton's method on integers."""
    n = np.asarray(n, np.int64)
    if n.size and n.min() < 0:
        raise ValueError(f"n must not be negative, got {n.min()}")
    x = np.int64(1) << ((np.frexp(n.astype(np.float64))[1] + 1) // 2)  # not below the root
    while True:
        better = (x + n // np.maximum(x, 1)) >> 1
        if (better >= x).all():
            return np.where(n == 0, 0, x)
        x = np.minimum(x, better)


def pack_bits(q, *, bits):
    """uint8: integers of 2 or 4 bits, unsigned or signed, packed flat, the first in the lowest bits."""
    _check_packing(bits)
    q = np.asarray(q)
    if q.size and not (-(2 ** (bits - 1)) <= q.min() and q.max() < 2**bits and q.max() - q.min() < 2**bits):
        raise ValueError(f"q must fit {bits} bits, signed or unsigned, got {q.min()}..{q.max()}")
    per = 8 // bits
    flat = np.concatenate([q.ravel(), np.zeros(-q.size % per, q.dtype)]).astype(np.int64) & (2**bits - 1)
    return (flat.reshape(-1, per) << bits * np.arange(per)).sum(axis=1).astype(np.uint8)


def unpack_bits(packed, *, bits, size, signed=False):
    """The first `size` integers of `pack_bits`, int8."""
    _check_packing(bits)
    per = 8 // bits
    if len(packed) != -(-size // per):
        raise ValueError(f"packed must hold {-(-size // per)} bytes for {size} integers of {bits} bits, "
                         f"got {len(packed)}")  # fmt: skip
    q = (np.asarray(packed, np.int64)[:, None] >> bits * np.arange(per)) & (2**bits - 1)
    if signed:
        q = np.where(q >= 2 ** (bits - 1), q - 2**bits, q)
    return q.ravel()[:size].astype(np.int8)


def _truncate(x, places):
    """x / 2^places towards zero."""
    return np.sign(x) * (np.abs(x) >> places)


def _check_packing(bits):
    if bits not in (2, 4):
        raise ValueError(f"bits must be 2 or 4, got {bits}")
