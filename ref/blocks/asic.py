"""Functions of a small vector unit that can only add and multiply, on bfloat16 numbers.

PIM-GPT (arXiv 2310.09385) keeps such a unit beside its DRAM for everything that is no product with a matrix.
exp is a Taylor polynomial after range reduction, 1/x and 1/sqrt(x) are Newton steps from a seed made of bits.
The orders and the seeds are our choice, such that every error is below one bfloat16 ulp. Vectors are read and
written as bfloat16; registers are float32, or bfloat16 with acc="bf16". The unit has no subnormal numbers.
"""

import numpy as np

from ref.blocks.formats import round_bf16
from ref.dims import dims

LOG2_E, LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
TAYLOR = (1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720)  # exp(r), lowest order first
SEED = 0x5F3759DF  # of 1/sqrt: bits of x halved and taken from this
GELU_CUBE, GELU_SCALE = np.float32(0.044715), np.float32(2 * np.sqrt(2 / np.pi))
# (additions, multiplications) for each number, and for each vector beside; a comparison, an exponent changed
# and a seed count as additions. exp has 9 and 8, a reciprocal 5 and 7, an inverse root 4 and 10.
ASIC_STEPS = {
    "softmax": ((12, 9), (4, 7)),
    "layernorm": ((4, 3), (3, 12)),
    "gelu": ((17, 20), (0, 0)),
    "add": ((1, 0), (0, 0)),
    "mul": ((0, 1), (0, 0)),
}
LEAST = 2.0**-126  # what is smaller counts as zero


class Unit:
    """Adders and multipliers whose results are float32, or rounded to bfloat16; they count their work."""

    def __init__(self, acc="f32"):
        check_acc(acc)
        self.narrow, self.adds, self.muls = acc == "bf16", 0, 0

    def kept(self, x):
        """x as a register holds it."""
        return round_bf16(x) if self.narrow else np.asarray(x, np.float32)

    def add(self, a, b):
        """a + b."""
        with np.errstate(over="ignore", invalid="ignore"):
            y = self.kept(np.float32(a) + np.float32(b))
        self.adds += y.size
        return y

    def mul(self, a, b):
        """a b."""
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            y = self.kept(np.float32(a) * np.float32(b))
        self.muls += y.size
        return y

    def maximum(self, x):
        """The largest of the last axis, kept as an axis; an adder compares."""
        self.adds += x.size
        return x.max(axis=-1, keepdims=True)

    def total(self, x):
        """Sum of the last axis, kept as an axis: a tree, neighbours first, an odd one waits for a level."""
        while (n := x.shape[-1]) > 1:
            pairs = self.add(x[..., 0 : n - n % 2 : 2], x[..., 1::2])
            x = np.concatenate([pairs, x[..., n - n % 2 :]], axis=-1)
        return x

    def exp(self, x, order=6):
        """x = n ln 2 + r, a polynomial in r, n added to the exponent."""
        with np.errstate(invalid="ignore"):
            n = np.floor(self.add(self.mul(np.clip(x, -150, 150), LOG2_E), 0.5))
        n = np.where(np.isnan(n), np.float32(0), n)
        r = self.add(np.clip(x, -150, 150), -self.mul(n, LN_2))
        y = np.broadcast_to(np.float32(TAYLOR[order]), r.shape)
        for c in TAYLOR[order - 1 :: -1]:
            y = self.add(self.mul(y, r), c)
        self.adds += y.size
        half = np.floor(n / 2)  # 2^n alone may not be a number
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            y = self.kept(y * np.exp2(half) * np.exp2(n - half))
        return np.where(np.abs(y) < LEAST, np.float32(0), y).astype(np.float32)

    def reciprocal(self, x, steps=3):
        """x = m 2^e with m in [1/2, 1): y <- y (2 - m y) from 48/17 - 32/17 m, then the exponent."""
        bits = np.asarray(x, np.float32).view(np.int32)
        m = ((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)
        y = self.add(self.mul(m, -32 / 17), 48 / 17)
        for _ in range(steps):
            y = self.mul(y, self.add(2.0, -self.mul(m, y)))
        self.adds += y.size
        e = ((bits >> 23) & 255) - 126
        half = e // 2
        with np.errstate(over="ignore", under="ignore"):
            y = np.ldexp(np.ldexp(y, -half), half - e)
        y = np.where(y < LEAST, np.float32(0), y)
        size = np.abs(x)
        y = np.where(size < LEAST, np.inf, np.where(size == np.inf, 0.0, y))
        return np.where(np.isnan(x), np.nan, np.copysign(y, x)).astype(np.float32)

    def rsqrt(self, x, steps=3):
        """y <- y (3/2 - x y^2 / 2), from half of the bits of x taken from `SEED`."""
        x = np.asarray(x, np.float32)
        y = self.kept((SEED - (x.view(np.int32) >> 1)).astype(np.int32).view(np.float32))
        self.adds += y.size
        low = self.mul(x, 0.5)
        for _ in range(steps):
            y = self.mul(y, self.add(1.5, -self.mul(self.mul(low, y), y)))
        y = np.where(x == np.inf, 0.0, np.where(np.abs(x) < LEAST, np.inf, y))
        return np.where((x <= -LEAST) | np.isnan(x), np.nan, y).astype(np.float32)


def exp_taylor(x, *, order=6):
    """exp(x) by a Taylor polynomial of ln 2 / 2 at most, in float32. x [...], any number.

    order: 1..6, of the polynomial. Returns: float32 [...]; below 2^-126 zero, NaN where x is.
    """
    check_order(order)
    return Unit().exp(_real("x", x), order)


def reciprocal_newton(x, *, steps=3):
    """1 / x by `steps` >= 0 Newton steps, in float32. x [...]: 0 and subnormals give an infinity."""
    check_steps(steps)
    return Unit().reciprocal(_real("x", x), steps)


def rsqrt_newton(x, *, steps=3):
    """1 / sqrt(x) by `steps` >= 0 Newton steps, in float32. x [...]: 0 gives infinity, below it NaN."""
    check_steps(steps)
    return Unit().rsqrt(_real("x", x), steps)


def softmax_asic(x, *, acc="f32"):
    """exp(x - max x) / sum over the last axis. x [..., n], rounded to bfloat16 first; n >= 1.

    Exponentials, sum, reciprocal and result are each written as bfloat16. -inf gives 0; a row of nothing else
    is NaN: the unit does not look. Returns: float32 [..., n], bfloat16 numbers.
    """
    return softmax_steps(Unit(acc), _vector("x", x))


def layernorm_asic(x, g, b, *, eps=1e-5, acc="f32"):
    """(x - mean) / sqrt(variance + eps) g + b over the last axis. x [..., n], g and b [n], all bfloat16.

    Mean, variance, inverse root and result are each written as bfloat16. Returns: float32 [..., n].
    """
    dims(x=(x, "... n"), g=(g, "n"), b=(b, "n"))
    check_eps(eps)
    return layernorm_steps(Unit(acc), _vector("x", x), _vector("g", g), _vector("b", b), eps)


def gelu_asic(x, *, acc="f32"):
    """x / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3): GELU by its tanh form. x [...], bfloat16.

    Returns: float32 [...], bfloat16 numbers.
    """
    return gelu_steps(Unit(acc), round_bf16(_real("x", x)))


def softmax_steps(u, x):
    """`softmax_asic` on a unit."""
    e = round_bf16(u.exp(u.add(x, -u.maximum(x))))
    inverse = round_bf16(u.reciprocal(round_bf16(u.total(e))))
    return round_bf16(u.mul(e, inverse))


def layernorm_steps(u, x, g, b, eps):
    """`layernorm_asic` on a unit."""
    mean = round_bf16(u.mul(u.total(x), 1 / x.shape[-1]))
    centred = u.add(x, -mean)
    variance = round_bf16(u.mul(u.total(u.mul(centred, centred)), 1 / x.shape[-1]))
    root = round_bf16(u.rsqrt(u.add(variance, eps)))
    return round_bf16(u.add(u.mul(u.mul(centred, root), g), b))


def gelu_steps(u, x):
    """`gelu_asic` on a unit: tanh(u) = 1 - 2 / (exp(2 u) + 1), so that half of 1 + tanh is 1 - 1 / (...)."""
    cube = u.add(u.mul(u.mul(x, x), GELU_CUBE), 1.0)
    e = u.exp(u.mul(u.mul(x, GELU_SCALE), cube))
    return round_bf16(u.mul(x, u.add(1.0, -u.reciprocal(u.add(e, 1.0)))))


def asic_work(kind, n, *, rows=1):
    """(additions, multiplications) of rows vectors of n numbers; kind: a key of `ASIC_STEPS`."""
    each, whole = _steps_of(kind)
    return tuple(rows * (n * e + w) for e, w in zip(each, whole, strict=True))


def asic_cycles(kind, n, *, rows=1, adders=256, multipliers=128):
    """Cycles of the same: every step of `ASIC_STEPS` takes its numbers through the lanes that it uses."""
    each, whole = _steps_of(kind)
    lanes = adders, multipliers
    if min(lanes) < 1:
        raise ValueError(f"adders and multipliers must be at least 1, got {adders} and {multipliers}")
    return sum(e * -(-n * rows // m) + w * -(-rows // m) for e, w, m in zip(each, whole, lanes, strict=True))


def _steps_of(kind):
    if kind not in ASIC_STEPS:
        raise ValueError(f"kind must be one of {', '.join(ASIC_STEPS)}, got {kind!r}")
    return ASIC_STEPS[kind]


def check_acc(acc):
    """Raise ValueError unless acc is a kind of register."""
    if acc not in ("f32", "bf16"):
        raise ValueError(f'acc must be "f32" or "bf16", got {acc!r}')


def check_order(order):
    """Raise ValueError unless there is a polynomial of that order."""
    if not 1 <= order <= 6:
        raise ValueError(f"order must be in 1..6, got {order}")


def check_steps(steps):
    """Raise ValueError for a negative number of Newton steps."""
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")


def check_eps(eps):
    """Raise ValueError unless eps is positive."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def check_real(name, x):
    """Raise ValueError unless x holds real numbers."""
    if x.dtype.kind not in "fiu" and x.dtype.name != "bfloat16":
        raise ValueError(f"{name} must be real numbers, got {x.dtype}")


def check_last(name, x):
    """Raise ValueError unless x holds real numbers on a last axis of at least 1."""
    check_real(name, x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name} must have a last axis of at least 1, got shape {list(x.shape)}")


def _real(name, x):
    x = np.asarray(x)
    check_real(name, x)
    return x.astype(np.float32)


def _vector(name, x):
    x = np.asarray(x)
    check_last(name, x)
    return round_bf16(x.astype(np.float32))
