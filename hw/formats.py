"""Number formats and policies: which arithmetic a target computes in, and what becomes of a program's values.

Under a `FormatPolicy` every float tensor has a format, and a value is a number of that format, carried in
float64. An op takes such numbers, computes exactly (products and sums of codes in integers where float64
would round) and rounds its result once, into its own tensor's format. Integers and flags stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hw import numerics
from hw.interpret import FloatPolicy, run_program
from hw.program import Program, Tensor, is_float, numpy_dtype
from ref.blocks import fixed
from ref.blocks.formats import round_bf16


class Format:
    """A number format. Codes are its stored numbers: integers, or floats where a format is one.

    quantise(x) -> codes; dequantise(codes) -> float64; dot, add, mul: exact on codes, rounded once into
    `out`; unary: a function by its values, or by a table of all codes.
    """

    name: str
    dtype: str  # of the storage, for bytes

    def quantise(self, x):
        """Codes of the nearest numbers, by the format's rule."""
        raise NotImplementedError

    def dequantise(self, codes):
        """The numbers, float64."""
        raise NotImplementedError

    def round(self, x, trace=None):
        """The numbers of the format that x becomes; `trace` counts what saturates or wraps."""
        return self.dequantise(self.quantise(x))

    def dot(self, a, b, other, out):
        """Codes of out for a [..., M, K] of this format times b [..., K, N] of the other."""
        return out.quantise(self.exact_dot(a, b, other))

    def exact_dot(self, a, b, other):
        """The product in exact arithmetic, as nearly as float64 holds it."""
        return np.matmul(self.dequantise(a), other.dequantise(b))

    def add(self, a, b, other, out):
        """Codes of out for a + b."""
        return out.quantise(self.dequantise(a) + other.dequantise(b))

    def mul(self, a, b, other, out):
        """Codes of out for a b."""
        return out.quantise(self.dequantise(a) * other.dequantise(b))

    def unary(self, fn, a, out, *, table=None):
        """Codes of out for fn(a); table: codes of out for all codes of this format, from the least up."""
        if table is not None:
            return np.asarray(table)[np.asarray(a, np.int64) - self.least]
        return out.quantise(fn(self.dequantise(a)))

    def table(self, fn, out):
        """The table that `unary` takes. Raises: ValueError above 16 bits."""
        if getattr(self, "bits", 64) > 16:
            raise ValueError(f"a table of {self.name} would have 2^{getattr(self, 'bits', 64)} entries")
        codes = np.arange(self.least, self.most + 1)
        return out.quantise(fn(self.dequantise(codes)))


@dataclass(frozen=True)
class Float(Format):
    """binary32, or float64, float16, bfloat16: its codes are its numbers; dot accumulates in float32."""

    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in ("float64", "float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {self.dtype!r}")

    @property
    def name(self):
        """Its dtype."""
        return self.dtype

    def quantise(self, x):
        """The nearest number, ties to even."""
        x = np.asarray(x, np.float64)
        if self.dtype == "bfloat16":
            return round_bf16(x)
        with np.errstate(over="ignore"):
            return x.astype(self.dtype).astype(np.float64)

    def dequantise(self, codes):
        """Itself."""
        return np.asarray(codes, np.float64)

    def exact_dot(self, a, b, other):
        """Products of narrow floats are exact in float32, sums are float32's (float64's for float64)."""
        if "float64" in (self.dtype, getattr(other, "dtype", "")):
            return np.matmul(a, other.dequantise(b))
        return np.matmul(a.astype(np.float32), other.dequantise(b).astype(np.float32)).astype(np.float64)


BF16 = Float("bfloat16")
FP16 = Float("float16")


@dataclass(frozen=True)
class Fixed(Format):
    """<width, integer> fixed point (ref.blocks.fixed): exact products and sums, one cast."""

    width: int
    integer: int
    quant: str = "TRN"
    overflow: str = "WRAP"
    signed: bool = True

    def __post_init__(self):
        fixed.Fixed(self.width, self.integer, self.quant, self.overflow, self.signed)  # checks the fields

    @property
    def rule(self) -> fixed.Fixed:
        """The definition in ref."""
        return fixed.Fixed(self.width, self.integer, self.quant, self.overflow, self.signed)

    @property
    def name(self):
        """fixed<width,integer>."""
        return f"{'' if self.signed else 'u'}fixed<{self.width},{self.integer}>"

    @property
    def bits(self):
        """The width."""
        return self.width

    @property
    def dtype(self):
        """The smallest integer type that holds it."""
        size = next(n for n in (4, 8, 16, 32, 64) if self.width <= n)
        return f"{'' if self.signed else 'u'}int{size}"

    @property
    def least(self):
        """The smallest code."""
        return self.rule.least

    @property
    def most(self):
        """The largest code."""
        return self.rule.most

    @property
    def step(self):
        """The distance of neighbours."""
        return self.rule.step

    def quantise(self, x):
        """Raw integers; NaN is a ValueError."""
        return self.rule.quantise(x)

    def dequantise(self, codes):
        """raw 2^-(width - integer)."""
        return self.rule.value(codes)

    def round(self, x, trace=None):
        """As `Format.round`, counting the values out of range."""
        x = np.asarray(x, np.float64)
        if trace is not None:
            over = int(((x < self.least * self.step) | (x >= (self.most + 1) * self.step)).sum())
            if over:
                kind = {"WRAP": "wrapped", "SAT": "saturated"}.get(self.overflow, "overflowed")
                trace.events[kind] = trace.events.get(kind, 0) + over
        return self.dequantise(self.quantise(x))

    def exact_dot(self, a, b, other):
        """Integer products and sums, exact to 63 bits."""
        if not isinstance(other, Fixed):
            return super().exact_dot(a, b, other)
        return np.ldexp(_exact(a, b, self.width + other.width), -(self.rule.frac + other.rule.frac))

    def dot(self, a, b, other, out):
        """Exact integers, cast once."""
        if isinstance(other, Fixed) and isinstance(out, Fixed):
            if self.width + other.width + max(np.shape(a)[-1] - 1, 0).bit_length() <= 63:
                raw = np.matmul(np.asarray(a, np.int64), np.asarray(b, np.int64))
                return fixed.fixed_cast(raw, frac=self.rule.frac + other.rule.frac, to=out.rule)
        return super().dot(a, b, other, out)


@dataclass(frozen=True)
class Int8Affine(Format):
    """real = scale (code - zero_point), codes in -128..127 (or `bits` wide); int32 accumulators."""

    scale: float
    zero_point: int = 0
    bits: int = 8

    def __post_init__(self):
        if not (self.scale > 0 and np.isfinite(self.scale)):
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        if not self.least <= self.zero_point <= self.most:
            raise ValueError(f"zero_point must be in {self.least}..{self.most}, got {self.zero_point}")

    @classmethod
    def of_range(cls, lo, hi, *, bits=8, symmetric=False):
        """The format whose codes span [lo, hi] and 0, or [-m, m] with zero point 0."""
        if not (np.isfinite(lo) and np.isfinite(hi) and lo <= hi):
            raise ValueError(f"a range needs finite lo <= hi, got {lo}, {hi}")
        lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
        if symmetric or lo == hi:
            return cls(max(-lo, hi, 1e-30) / ((1 << bits - 1) - 1), 0, bits)
        scale, half = (hi - lo) / ((1 << bits) - 1), 1 << bits - 1
        return cls(scale, int(np.clip(np.rint(-lo / scale) - half, -half, half - 1)), bits)

    @property
    def name(self):
        """int8, or as many bits as it has."""
        return f"int{self.bits}"

    @property
    def dtype(self):
        """The integer type that holds it."""
        return f"int{next(n for n in (4, 8, 16) if self.bits <= n)}"

    @property
    def least(self):
        """The smallest code."""
        return -(1 << self.bits - 1)

    @property
    def most(self):
        """The largest code."""
        return (1 << self.bits - 1) - 1

    @property
    def step(self):
        """The distance of neighbours."""
        return self.scale

    def quantise(self, x):
        """The nearest code, halves to even, clamped; NaN is a ValueError."""
        x = np.asarray(x, np.float64)
        if np.isnan(x).any():
            raise ValueError("NaN has no int8 code")
        return np.clip(np.rint(x / self.scale) + self.zero_point, self.least, self.most).astype(np.int64)

    def dequantise(self, codes):
        """scale (code - zero_point)."""
        return self.scale * (np.asarray(codes, np.float64) - self.zero_point)

    def round(self, x, trace=None):
        """As `Format.round`, counting the values out of range."""
        if trace is not None:
            code = np.asarray(x, np.float64) / self.scale + self.zero_point
            over = int(((code < self.least - 0.5) | (code > self.most + 0.5)).sum())
            if over:
                trace.events["saturated"] = trace.events.get("saturated", 0) + over
        return self.dequantise(self.quantise(x))

    def exact_dot(self, a, b, other):
        """sum (a - z_a)(b - z_b) in int32, times both scales. Raises: OverflowError beyond int32."""
        if not isinstance(other, Int8Affine):
            return super().exact_dot(a, b, other)
        a, b = np.asarray(a) - self.zero_point, np.asarray(b) - other.zero_point
        acc = _exact(a, b, self.bits + other.bits + 2)
        if np.abs(acc).max(initial=0) >= 2.0**31:
            raise OverflowError(f"a sum over {np.shape(a)[-1]} products leaves the int32 accumulator")
        return acc * (self.scale * other.scale)


def _exact(a, b, bits):
    """The product of integer matrices as float64: exact sums, rounded once if beyond 53 bits."""
    k = max(np.shape(a)[-1] - 1, 0).bit_length()
    if bits + k <= 53:
        return np.matmul(np.asarray(a, np.float64), np.asarray(b, np.float64))
    if bits + k <= 63:
        return np.matmul(np.asarray(a, np.int64), np.asarray(b, np.int64)).astype(np.float64)
    return np.matmul(np.asarray(a, object), np.asarray(b, object)).astype(np.float64)


@dataclass(frozen=True)
class FormatPolicy:
    """A format for every float tensor: of weights and constants, and of everything else.

    weights, activations: a Format, or a function of the tensor that gives one (weights None: as activations).
    by_tensor: formats of single tensors, by id. A constant of one element is an immediate of its op and keeps
    its value. An infinity of a mask becomes the end of the range of a format that has none. Code 0 stands for
    NaN where there is none, and the events of the `Trace` say how often.
    """

    activations: Format | Callable
    weights: Format | Callable | None = None
    name: str = ""
    by_tensor: dict[int, Format] = field(default_factory=dict)

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, "name", _label(self.weights, self.activations))

    def format(self, tensor: Tensor) -> Format | None:
        """The format of a tensor; None for integers, flags and immediates."""
        if not is_float(tensor.dtype) or (tensor.role == "const" and tensor.size == 1):
            return None
        if tensor.id in self.by_tensor:
            return self.by_tensor[tensor.id]
        stored = tensor.role in ("weight", "const") and self.weights is not None
        chosen = self.weights if stored else self.activations
        return chosen if isinstance(chosen, Format) else chosen(tensor)

    def dtype(self, tensor: Tensor) -> str:
        """The dtype that stores a tensor."""
        f = self.format(tensor)
        return tensor.dtype if f is None else f.dtype

    def carrier(self, dtype: str) -> np.dtype:
        """The NumPy type that carries a value: float64 for floats."""
        return np.dtype(np.float64) if is_float(dtype) else numpy_dtype(dtype)

    def enter(self, tensor, value, trace=None):
        """An input or a constant in its format."""
        if not is_float(tensor.dtype):
            return value
        value = np.asarray(value).astype(np.float64)
        f = self.format(tensor)
        return value if f is None else _round(f, value, trace)

    def compute(self, op, args, ins, outs, trace):
        """Exact on the operands, rounded into the formats of the results."""
        wide = [_Wide(o.shape, "float64" if is_float(o.dtype) else o.dtype) for o in outs]
        results = self._dot(args, ins, outs, op) if op.prim == "dot_general" else None
        if op.prim == "bitcast_convert_type":  # of the bits that the program means, not of the carrier's
            args = [np.asarray(a).astype(numpy_dtype(t.dtype)) for a, t in zip(args, ins, strict=True)]
            results = [
                np.asarray(r).astype(w.dtype)
                for r, w in zip(numerics.compute(op, args, outs), wide, strict=True)
            ]
        if results is None:
            results = numerics.compute(op, args, wide)
        formats = [self.format(o) for o in outs]
        return [r if f is None else _round(f, r, trace) for f, r in zip(formats, results, strict=True)]

    def _dot(self, args, ins, outs, op):
        """A product in the accumulator of its operands' formats; None where one of them has no format."""
        fa, fb = (self.format(t) for t in ins[:2])
        if fa is None or fb is None or not is_float(outs[0].dtype):
            return None
        a, b = numerics.dot_operands(op, args)
        a, b, out = fa.quantise(a), fb.quantise(b), self.format(outs[0])
        if isinstance(fa, Fixed) and isinstance(fb, Fixed) and isinstance(out, Fixed):
            product = out.dequantise(fa.dot(a, b, fb, out))
        else:
            product = fa.exact_dot(a, b, fb)
        return [product.reshape(outs[0].shape)]


@dataclass(frozen=True)
class _Wide:
    shape: tuple
    dtype: str


def _round(f, x, trace):
    nan = np.isnan(x)
    if nan.any() and not isinstance(f, Float):
        if trace is not None:
            trace.events["nan"] = trace.events.get("nan", 0) + int(nan.sum())
        return f.round(np.where(nan, 0.0, x), trace)
    return f.round(x, trace)


def _label(weights, activations):
    name = lambda f: getattr(f, "name", getattr(f, "__name__", "custom"))
    if weights is None or name(weights) == name(activations):
        return name(activations)
    return f"{name(weights)} weights, {name(activations)} activations"


class _Watch(FloatPolicy):
    """Float arithmetic that notes the finite range of every float value."""

    def __init__(self):
        self.ranges = {}

    def enter(self, tensor, value, trace=None):
        self.note(tensor, value)
        return value

    def compute(self, op, args, ins, outs, trace):
        results = super().compute(op, args, ins, outs, trace)
        for t, r in zip(outs, results, strict=True):
            self.note(t, r)
        return results

    def note(self, tensor, value):
        if is_float(tensor.dtype):
            value = np.asarray(value).astype(np.float64)
            value = value[np.isfinite(value)]
            lo, hi = self.ranges.get(tensor.id, (np.inf, -np.inf))
            self.ranges[tensor.id] = min(lo, value.min(initial=np.inf)), max(hi, value.max(initial=-np.inf))


def calibrate(program: Program, *inputs) -> dict[int, tuple[float, float]]:
    """{tensor id: (least, largest) finite value} over runs in float; each of inputs: arguments of one run."""
    if not inputs:
        raise ValueError("calibrate needs the arguments of at least one run")
    watch = _Watch()
    for args in inputs:
        run_program(program, args, policy=watch)
    return {i: r for i, r in watch.ranges.items() if r[0] <= r[1]}


def int8_policy(program: Program, *inputs, bits=8) -> FormatPolicy:
    """Affine activations and symmetric weights of `bits` bits, one scale a tensor, from calibration runs.

    A float that no run has seen stays float32.
    """
    by_tensor = {}
    for i, (lo, hi) in calibrate(program, *inputs).items():
        t = program.tensors[i]
        if not (t.role == "const" and t.size == 1):
            symmetric = t.role in ("weight", "const")
            by_tensor[i] = Int8Affine.of_range(lo, hi, bits=bits, symmetric=symmetric)
    return FormatPolicy(activations=Float(), name=f"int{bits}", by_tensor=by_tensor)


def as_policy(x):
    """A policy from a policy, a format or None (as the program is written)."""
    if x is None or hasattr(x, "compute"):
        return x
    if isinstance(x, Format):
        return FormatPolicy(activations=x)
    raise ValueError(f"a format must be a Format, a policy or None, got {type(x).__name__}")
