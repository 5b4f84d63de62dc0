"""Fixed point numbers as high-level synthesis defines them: raw integers with a binary point, bit exact.

A number of the format <W, I> is raw 2^-(W-I), raw a two's complement integer of W bits. Narrowing drops low
bits by one of four rules, then deals with values that do not fit by one of three. Source: the ap_fixed
semantics of AMD Vitis HLS (user guide UG1399), which Edge-MoE's design uses with its defaults.
"""

from dataclasses import dataclass

import numpy as np

from ref.checks import one_of

QUANT = ("TRN", "RND", "RND_CONV", "TRN_ZERO")
OVERFLOW = ("WRAP", "SAT", "CHECK")


@dataclass(frozen=True)
class Fixed:
    """The format <width, integer>: bits in all, bits before the point (the sign's included; may be negative).

    quant: what dropped low bits do: TRN floors, RND adds half a step and floors, RND_CONV goes to the nearest
      and from halves to even, TRN_ZERO goes toward zero. overflow: WRAP keeps the low bits, SAT goes to the
      nearest end, CHECK raises OverflowError.
    """

    width: int
    integer: int
    quant: str = "TRN"
    overflow: str = "WRAP"
    signed: bool = True

    def __post_init__(self):
        for name in ("width", "integer"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if not 1 <= self.width <= 62:
            raise ValueError(f"width must be in 1..62, got {self.width}")
        one_of("quant", self.quant, QUANT)
        one_of("overflow", self.overflow, OVERFLOW)

    @property
    def frac(self) -> int:
        """Bits after the point."""
        return self.width - self.integer

    @property
    def step(self) -> float:
        """The distance of neighbours."""
        return 2.0**-self.frac

    @property
    def least(self) -> int:
        """The smallest raw integer."""
        return -(1 << self.width - 1) if self.signed else 0

    @property
    def most(self) -> int:
        """The largest raw integer."""
        return (1 << self.width - self.signed) - 1

    def quantise(self, x) -> np.ndarray:
        """Raw integers, int64, of real numbers: infinities are the ends of the range, or raise if it checks.

        Raises: ValueError for NaN; OverflowError.
        """
        x = np.asarray(x, np.float64)
        if np.isnan(x).any():
            raise ValueError("NaN has no fixed point number")
        wide = np.ldexp(x, self.frac)  # exact: a power of two
        raw = _ROUND[self.quant](np.where(np.isfinite(wide), wide, 0.0))
        big = np.abs(raw) >= 2.0**62
        if self.overflow == "WRAP":  # low bits of what float64 holds exactly
            raw = np.where(big, np.fmod(raw, 2.0**self.width), raw)
        raw = np.where(np.isinf(wide), np.copysign(2.0**62, wide), np.clip(raw, -(2.0**62), 2.0**62))
        out = raw.astype(np.int64)
        if self.overflow != "CHECK":
            out = np.where(np.isinf(wide), np.where(wide < 0, self.least, self.most), out)
        return self.fit(out)

    def value(self, raw) -> np.ndarray:
        """The numbers, float64 (exact to 53 bits), that raw integers stand for."""
        return np.ldexp(np.asarray(raw, np.float64), -self.frac)

    def fit(self, raw) -> np.ndarray:
        """Raw integers brought into the range of the format. Raises: OverflowError if it checks."""
        raw = np.asarray(raw, np.int64)
        if self.overflow == "SAT":
            return np.clip(raw, self.least, self.most)
        if self.overflow == "CHECK":
            over = (raw < self.least) | (raw > self.most)
            if over.any():
                worst = raw[over][np.abs(raw[over].astype(np.float64)).argmax()]
                raise OverflowError(
                    f"{int(over.sum())} values do not fit <{self.width}, {self.integer}>, "
                    f"the worst is {self.value(worst):g}"
                )
            return raw
        low = raw & ((1 << self.width) - 1)
        return np.where(low > self.most, low - (1 << self.width), low) if self.signed else low


_ROUND = {
    "TRN": np.floor,
    "RND": lambda x: np.floor(x) + (x - np.floor(x) >= 0.5),
    "RND_CONV": np.rint,
    "TRN_ZERO": np.trunc,
}


def fixed_cast(raw, *, frac, to: Fixed) -> np.ndarray:
    """Raw integers with `frac` bits after the point as raw integers of the format `to`, int64."""
    raw = np.asarray(raw)
    if raw.dtype.kind not in "iu":
        raise ValueError(f"raw must be integers, got {raw.dtype}")
    raw = raw.astype(np.int64)
    drop = frac - to.frac
    if drop <= 0:
        if -drop > 62:
            raise ValueError(f"frac={frac} is {-drop} bits short of {to.frac}, more than an int64 holds")
        if to.overflow != "WRAP":  # what leaves int64 on the way up must not wrap there
            room = 1 << 62 + drop
            raw = np.clip(raw, -room, room)
        return to.fit(raw << -drop)
    drop = min(drop, 63)
    floor = raw >> drop
    rest = (raw & ((1 << drop) - 1)).astype(np.uint64)
    half = np.uint64(1 << drop - 1)
    up = {
        "TRN": np.zeros(raw.shape, bool),
        "RND": rest >= half,
        "RND_CONV": (rest > half) | ((rest == half) & (floor & 1 == 1)),
        "TRN_ZERO": (raw < 0) & (rest > 0),
    }[to.quant]
    return to.fit(floor + up)


def fixed_matmul(x_raw, w_raw, *, fx: Fixed, fw: Fixed, facc: Fixed, bias_raw=None, per_product_cast=True):
    """x w^T (+ bias) on raw integers: x [..., M, K] of fx, w [N, K] of fw -> [..., M, N] of facc, int64.

    bias_raw [N], of facc. per_product_cast: every product is cast to facc and the sums are fitted into it;
      otherwise products and sums are exact and the result is cast once.
    Sums that wrap do not depend on their order; saturated ones do and are taken in the order of K.
    Raises: ValueError if an exact product or sum could leave 63 bits.
    """
    x, w = np.asarray(x_raw, np.int64), np.asarray(w_raw, np.int64)
    if x.ndim < 2 or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x_raw must be [..., M, K] and w_raw [N, K], got {x.shape} and {w.shape}")
    bits, K = fx.width + fw.width, x.shape[-1]
    held = 63 + (fx.signed or fw.signed)  # a signed number of W bits is at most 2^(W-1) in size
    if (bits > held) if per_product_cast else (bits + max(K - 1, 0).bit_length() > 63):
        raise ValueError(f"products of {fx.width} and {fw.width} bits over K={K} do not fit 63 bits")
    frac = fx.frac + fw.frac
    bias = 0 if bias_raw is None else np.asarray(bias_raw, np.int64)
    if not per_product_cast:
        exact = np.matmul(x, w.T)
        return facc.fit(fixed_cast(exact, frac=frac, to=facc) + bias)
    acc = np.broadcast_to(np.asarray(bias), (*x.shape[:-1], len(w))).astype(np.int64)
    for k in range(K):
        acc = facc.fit(acc + fixed_cast(x[..., k, None] * w[:, k], frac=frac, to=facc))
    return acc
