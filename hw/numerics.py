"""Every primitive in NumPy: what a leaf op computes, in the arithmetic of its dtypes.

float32 is computed in float32 (functions beyond + - * / in float64, rounded once), narrower floats in float32
and rounded, integers with wrap-around, as JAX does on a CPU.
"""

import math
from itertools import product

import numpy as np

from hw.program import is_float, numpy_dtype

_erf = np.frompyfunc(math.erf, 1, 1)
_erfc = np.frompyfunc(math.erfc, 1, 1)


def compute(op, args, outs):
    """Results of a leaf op for NumPy operands; outs: its result tensors (shape, dtype)."""
    prim = op.prim
    if prim in _ELEMENTWISE:
        return [_elementwise(_ELEMENTWISE[prim], args, outs[0].dtype)]
    if prim in _WIDE:
        return [_transcendental(_WIDE[prim], args, outs[0].dtype)]
    if prim == "dot_general":
        return [_dot_general(op, args, outs)]
    fn = _RULES.get(prim)
    if fn is None:
        raise NotImplementedError(f"running {prim!r} is not implemented")
    results = fn(args, op.attrs, outs)
    return list(results) if isinstance(results, tuple | list) else [results]


def _narrow(dtype):
    return is_float(str(dtype)) and numpy_dtype(str(dtype)).itemsize < 4


def _widen(x):
    x = np.asarray(x)
    return x.astype(np.float32) if _narrow(x.dtype) else x


def cast(x, dtype):
    """The array as the named dtype, with JAX's rules: saturating float to integer, NaN to 0, wrap-around."""
    x = np.asarray(x)
    to = numpy_dtype(dtype)
    if x.dtype == to:
        return x
    if to == np.bool_:
        return x != 0
    if is_float(str(x.dtype)) and not is_float(dtype):
        if dtype.startswith(("int", "uint")) and to.itemsize >= 1 and to.kind in "iu":
            info = np.iinfo(to)
            wide = _widen(x).astype(np.float64)
            safe = np.where(np.isnan(wide), 0.0, np.trunc(wide))
            top = safe >= float(info.max)
            low = safe <= float(info.min)
            out = np.where(top | low, 0.0, safe).astype(to)
            out = np.where(top, np.array(info.max, to), out)
            return np.where(low, np.array(info.min, to), out)
        return _widen(x).astype(to)
    if _narrow(x.dtype) and not _narrow(dtype):
        return x.astype(np.float32).astype(to)
    with np.errstate(all="ignore"):
        return x.astype(to)


def _elementwise(fn, args, dtype):
    with np.errstate(all="ignore"):
        return cast(fn(*(_widen(a) for a in args)), dtype)


def _transcendental(fn, args, dtype):
    with np.errstate(all="ignore"):
        wide = [np.asarray(_widen(a), np.float64) for a in args]
        return cast(np.asarray(fn(*wide), np.float64), dtype)


def _div(a, b):
    if a.dtype.kind == "f":
        return a / b
    b, a = np.broadcast_arrays(b, a)
    zero = b == 0
    safe = np.where(zero, np.ones((), b.dtype), b)
    q = (a - np.fmod(a, safe)) // safe  # exact, hence truncation
    return np.where(zero, np.array(-1).astype(a.dtype), q)


def _rem(a, b):
    if a.dtype.kind == "f":
        return np.fmod(a, b)
    b, a = np.broadcast_arrays(b, a)
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, np.ones((), b.dtype), b)))


def _shift(fn):
    def apply(a, n):
        bits = 8 * a.dtype.itemsize
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        count = n.astype(unsigned)
        return fn(a, np.minimum(count, bits - 1).astype(unsigned), count >= bits, unsigned)

    return apply


def _left(a, n, over, unsigned):
    return np.where(over, 0, a.view(unsigned) << n).astype(unsigned).view(a.dtype)


def _right_logical(a, n, over, unsigned):
    return np.where(over, 0, a.view(unsigned) >> n).astype(unsigned).view(a.dtype)


def _right_arithmetic(a, n, over, unsigned):
    return a >> n.astype(a.dtype)  # a count beyond the width behaves like width - 1


def _bits(fn, logical):
    return lambda *a: logical(*a) if a[0].dtype == np.bool_ else fn(*a)


def _clamp(lo, x, hi):
    return np.minimum(np.maximum(x, lo), hi)


def _select(which, *cases):
    which = np.asarray(which)
    if which.dtype == np.bool_:
        return np.where(which, cases[1], cases[0]) if len(cases) == 2 else cases[0]
    out = cases[0]
    for n, case in enumerate(cases[1:], start=1):
        out = np.where(which == n, case, out)
    return np.broadcast_to(out, np.broadcast_shapes(which.shape, np.shape(out)))


def _population(x):
    unsigned = x.view(f"u{x.dtype.itemsize}")
    return np.bitwise_count(unsigned)


def _sign(x):
    return np.sign(x)


def _erf_inv(y):
    """By Newton on erf from Giles' single precision start, in float64."""
    w = -np.log((1 - y) * (1 + y))
    small = w < 5
    a = np.where(small, w - 2.5, np.sqrt(np.maximum(w, 5)) - 3)
    p = np.polyval(
        [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
         -0.00417768164, 0.246640727, 1.50140941], a)  # fmt: skip
    q = np.polyval(
        [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
         0.00943887047, 1.00167406, 2.83297682], a)  # fmt: skip
    x = np.where(small, p, q) * y
    for _ in range(2):
        err = np.asarray(_erf(x), np.float64) - y
        step = err / (2 / math.sqrt(math.pi) * np.exp(-x * x))
        x = np.where(np.isfinite(step), x - step, x)
    return np.where(np.abs(y) == 1, np.copysign(np.inf, y), np.where(np.abs(y) > 1, np.nan, x))


_compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_compare |= {"ge": np.greater_equal, "eq_to": np.equal, "le_to": np.less_equal, "lt_to": np.less}
_ELEMENTWISE = {
    **_compare,
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": lambda x: -x if x.dtype.kind != "u" else (0 - x).astype(x.dtype),
    "abs": np.abs,
    "sign": _sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "clamp": _clamp,
    "not": _bits(np.bitwise_not, np.logical_not),
    "and": _bits(np.bitwise_and, np.logical_and),
    "or": _bits(np.bitwise_or, np.logical_or),
    "xor": _bits(np.bitwise_xor, np.logical_xor),
    "shift_left": _shift(_left),
    "shift_right_logical": _shift(_right_logical),
    "shift_right_arithmetic": _shift(_right_arithmetic),
    "is_finite": np.isfinite,
    "square": lambda x: x * x,
    "div": _div,
    "rem": _rem,
    "reciprocal": lambda x: np.ones((), x.dtype) / x,
    "population_count": _population,
}
_WIDE = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "erf": lambda x: np.asarray(_erf(x), np.float64),
    "erfc": lambda x: np.asarray(_erfc(x), np.float64),
    "erf_inv": _erf_inv,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "pow": np.power,
}


# Rules with parameters: (operands, attrs, result tensors) -> result or tuple of results.


def _convert(args, attrs, outs):
    return cast(args[0], outs[0].dtype)


def _identity(args, attrs, outs):
    return tuple(args)


def _select_n(args, attrs, outs):
    return _select(*args).astype(numpy_dtype(outs[0].dtype))


def _round(args, attrs, outs):
    x = _widen(args[0])
    if attrs.get("rounding_method", 0) == 1:
        out = np.rint(x)
    else:
        with np.errstate(invalid="ignore"):
            half = np.abs(x - np.trunc(x)) >= 0.5
            out = np.trunc(x) + np.where(half, np.sign(x), 0).astype(x.dtype)
    return cast(out, outs[0].dtype)


def _integer_pow(args, attrs, outs):
    x, y = _widen(args[0]), attrs["y"]
    with np.errstate(all="ignore"):
        acc, base, n = None, x, abs(y)
        while n:
            if n & 1:
                acc = base if acc is None else acc * base
            n >>= 1
            if n:
                base = base * base
        acc = np.ones_like(x) if acc is None else acc
        return cast(np.ones((), x.dtype) / acc if y < 0 else acc, outs[0].dtype)


def _nextafter(args, attrs, outs):
    return np.nextafter(*args)


def _reduce_precision(args, attrs, outs):
    x = _widen(args[0])
    mantissa, exponent = attrs["mantissa_bits"], attrs["exponent_bits"]
    with np.errstate(all="ignore"):
        m, e = np.frexp(x.astype(np.float64))
        out = np.ldexp(np.rint(np.ldexp(m, mantissa + 1)), e - mantissa - 1)
        bias = 2 ** (exponent - 1) - 1
        biggest = (2 - 2.0**-mantissa) * 2.0**bias
        out = np.where(np.abs(out) > biggest, np.copysign(np.inf, out), out)
        out = np.where(np.abs(out) < 2.0 ** (1 - bias), np.copysign(0.0, out), out)
        return cast(np.where(np.isfinite(x), out, x), outs[0].dtype)


def _reduction(fn):
    def apply(args, attrs, outs):
        x = _widen(args[0])
        axes = tuple(attrs["axes"])
        with np.errstate(all="ignore"):
            return cast(fn(x, axes), outs[0].dtype)

    return apply


def _extreme(fn, identity):
    def reduce(x, axes):
        if x.dtype == np.bool_:
            return (np.any if fn is np.max else np.all)(x, axis=axes)
        low = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
        high = np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).max
        return fn(x, axis=axes, initial=low if identity == "low" else high)

    return reduce


def _arg(fn):
    def apply(args, attrs, outs):
        return fn(_widen(args[0]), axis=attrs["axes"][0]).astype(numpy_dtype(outs[0].dtype))

    return apply


def _cumulative(fn, args, attrs, outs):
    x, axis = _widen(args[0]), attrs["axis"]
    flip = (lambda a: np.flip(a, axis)) if attrs.get("reverse") else (lambda a: a)
    with np.errstate(all="ignore"):
        return cast(flip(fn(flip(x), axis)), outs[0].dtype)


def _accumulate(ufunc):
    return lambda x, axis: ufunc.accumulate(x, axis=axis) if x.size else x


def _cumlogsumexp(x, axis):
    wide = x.astype(np.float64)
    return np.logaddexp.accumulate(wide, axis=axis) if x.size else x


def _sort(args, attrs, outs):
    axis, keys = attrs["dimension"], attrs.get("num_keys", 1)
    canonical = [_widen(a) for a in args[:keys]]
    canonical = [k + np.zeros((), k.dtype) if k.dtype.kind == "f" else k for k in canonical]  # -0 equals 0
    order = np.lexsort(canonical[::-1], axis=axis) if args[0].size else np.zeros(args[0].shape, np.int64)
    return tuple(np.take_along_axis(np.asarray(a), order, axis=axis) for a in args)


def _top_k(args, attrs, outs):
    x, axis, k = np.asarray(args[0]), attrs["axis"], attrs["k"]
    key = _widen(x)
    if key.dtype.kind == "f":
        key = -key.astype(np.float64)
        key = np.where(np.isnan(key), -np.inf, key)
    else:
        key = -key.astype(np.int64)
    order = np.argsort(key, axis=axis, kind="stable")
    order = np.take(order, np.arange(k), axis=axis)
    return np.take_along_axis(x, order, axis=axis), order.astype(np.int32)


def _matmul(a, b, dtype):
    """a [B, M, K] @ b [B, K, N] in the accumulator of the result's dtype."""
    if dtype.startswith("float64"):
        return a.astype(np.float64) @ b.astype(np.float64)
    if is_float(dtype):
        return cast(a.astype(np.float32) @ b.astype(np.float32), dtype)
    if max(a.dtype.itemsize, b.dtype.itemsize) <= 2 and a.shape[-1] < 1 << 20:
        exact = np.rint(a.astype(np.float64) @ b.astype(np.float64))  # below 2^53: exact, and fast
        return exact.astype(np.int64).astype(numpy_dtype(dtype))
    wide = np.uint64 if dtype.startswith("u") else np.int64
    return (a.astype(wide) @ b.astype(wide)).astype(numpy_dtype(dtype))


def dot_operands(op, args):
    """Operands of a dot_general as a [B, M, K], b [B, K, N]."""
    (lc, rc), (lb, rb) = op.attrs["dimension_numbers"]
    a, b = np.asarray(args[0]), np.asarray(args[1])
    lf = [i for i in range(a.ndim) if i not in (*lc, *lb)]
    rf = [i for i in range(b.ndim) if i not in (*rc, *rb)]
    size = lambda x, axes: math.prod(x.shape[i] for i in axes)
    batch, m, k, n = size(a, lb), size(a, lf), size(a, lc), size(b, rf)
    return a.transpose([*lb, *lf, *lc]).reshape(batch, m, k), b.transpose([*rb, *rc, *rf]).reshape(
        batch, k, n
    )


def _dot_general(op, args, outs):
    with np.errstate(all="ignore"):
        return _matmul(*dot_operands(op, args), outs[0].dtype).reshape(outs[0].shape)


def _ragged_dot(args, attrs, outs):
    (lc, rc), (lb, _) = attrs["dimension_numbers"]
    lhs, rhs, sizes = (np.asarray(a) for a in args[:3])
    ragged = attrs["lhs_ragged_dimensions"][0]
    if lb or sizes.ndim != 1 or len(lc) != 1 or lhs.ndim != 2:
        raise NotImplementedError("ragged products of two axes and one contraction only")
    ends = np.cumsum(sizes)
    out = np.zeros(outs[0].shape, numpy_dtype(outs[0].dtype))
    group = attrs["rhs_group_dimensions"]
    a = np.moveaxis(lhs, ragged, 0)
    if not group:  # the contraction is ragged: one product for each group
        b = np.moveaxis(rhs, rc[0], 0)
        for g, end in enumerate(ends):
            rows = slice(end - sizes[g], end)
            out[g] = _matmul(a[rows].T[None], b[rows][None], outs[0].dtype)[0]
        return out
    w = np.moveaxis(rhs, [group[0], rc[0]], [0, 1])
    for g, end in enumerate(ends):
        rows = slice(end - sizes[g], end)
        out[rows] = _matmul(a[rows][None], w[g][None], outs[0].dtype)[0]
    return out


def _conv(args, attrs, outs):
    lhs, rhs, out_spec = attrs["lhs_spec"], attrs["rhs_spec"], attrs["out_spec"]
    dtype = outs[0].dtype
    wide = np.float64 if dtype == "float64" else np.float32 if is_float(dtype) else np.int64
    x = np.asarray(args[0]).transpose(lhs).astype(wide)  # [N, C, spatial]
    w = np.asarray(args[1]).transpose(rhs).astype(wide)  # [O, C / groups, kernel]
    dims = x.ndim - 2
    places = [outs[0].shape[i] for i in out_spec[2:]]
    for d in range(dims):
        x = _dilate(x, d + 2, attrs["lhs_dilation"][d], attrs["padding"][d])
    fg, bg = attrs["feature_group_count"], attrs["batch_group_count"]
    n = x.shape[0] // bg
    features = w.shape[0]
    out = np.zeros((n, features, *places), wide)
    for tap in product(*(range(k) for k in w.shape[2:])):
        cut = [slice(None), slice(None)]
        for d, t in enumerate(tap):
            start, stride = t * attrs["rhs_dilation"][d], attrs["window_strides"][d]
            cut.append(slice(start, start + (places[d] - 1) * stride + 1 if places[d] else start, stride))
        part = x[tuple(cut)]
        kernel = w[(slice(None), slice(None), *tap)]
        if bg > 1:
            p = part.reshape(bg, n, part.shape[1], -1)
            k = kernel.reshape(bg, features // bg, -1)
            r = np.einsum("gncs,goc->ngos", p, k)
        else:
            p = part.reshape(n, fg, part.shape[1] // fg, -1)
            k = kernel.reshape(fg, features // fg, -1)
            r = np.matmul(k[None], p)
        out += r.reshape(out.shape)
    back = np.argsort(out_spec)
    return cast(out.transpose(back), dtype)


def _dilate(x, axis, holes, padding, value=0):
    """The axis with holes - 1 zeros between entries, padded (negative padding cuts)."""
    size = x.shape[axis]
    full = (size - 1) * holes + 1 if size else 0
    shape = list(x.shape)
    shape[axis] = full
    out = np.full(shape, value, x.dtype)
    at = [slice(None)] * x.ndim
    at[axis] = slice(0, full, holes)
    out[tuple(at)] = x
    lo, hi = padding
    pads = [(0, 0)] * x.ndim
    pads[axis] = (max(lo, 0), max(hi, 0))
    out = np.pad(out, pads, constant_values=value)
    at = [slice(None)] * x.ndim
    at[axis] = slice(max(-lo, 0), out.shape[axis] - max(-hi, 0))
    return out[tuple(at)]


def _window(args, attrs, outs, fn, identity):
    x = _widen(args[0])
    start = _widen(args[1]) if len(args) > 1 else identity(x.dtype)
    for d in range(x.ndim):
        x = _dilate(x, d, attrs["base_dilation"][d], attrs["padding"][d], start)
    shape = outs[0].shape
    out = np.full(shape, start, x.dtype)
    with np.errstate(all="ignore"):
        for tap in product(*(range(n) for n in attrs["window_dimensions"])):
            out = fn(out, x[_taps(tap, attrs, shape)])
    return cast(out, outs[0].dtype)


def _taps(tap, attrs, shape):
    dilation = attrs.get("window_dilation") or (1,) * len(shape)
    cut = []
    for d, t in enumerate(tap):
        start, stride = t * dilation[d], attrs["window_strides"][d]
        cut.append(slice(start, start + (shape[d] - 1) * stride + 1 if shape[d] else start, stride))
    return tuple(cut)


def _low(dtype):
    """The least value of a dtype."""
    limit = {"f": -np.inf, "b": False}.get(dtype.kind)
    return np.array(np.iinfo(dtype).min if limit is None else limit, dtype)


def _high(dtype):
    """The largest value of a dtype."""
    limit = {"f": np.inf, "b": True}.get(dtype.kind)
    return np.array(np.iinfo(dtype).max if limit is None else limit, dtype)


_COMBINE = {
    "add": (np.add, lambda d: np.zeros((), d)),
    "mul": (np.multiply, lambda d: np.ones((), d)),
    "max": (np.maximum, _low),
    "min": (np.minimum, _high),
    "and": (np.bitwise_and, _high),
    "or": (np.bitwise_or, _low),
}


def _reduce_window(args, attrs, outs):
    return _window(args, attrs, outs, *_COMBINE[attrs["combine"]])


def _select_and_scatter_add(args, attrs, outs):
    """Each source value is added where its window of the operand is extreme, the first of equals."""
    source, x = _widen(args[0]), _widen(args[1])
    worst = _low(x.dtype) if attrs["select"] in ("ge", "gt") else _high(x.dtype)
    pads = [(lo, hi) for lo, hi in attrs["padding"]]
    padded = np.pad(x, pads, constant_values=worst)
    real = np.pad(np.ones(x.shape, bool), pads)
    out = np.zeros(padded.shape, source.dtype)
    best, place = np.full(source.shape, worst), np.full(source.shape, -1)
    taps = list(product(*(range(n) for n in attrs["window_dimensions"])))
    better = np.greater if attrs["select"] in ("ge", "gt") else np.less
    for n, tap in enumerate(taps):
        cut = _taps(tap, attrs, source.shape)
        wins = real[cut] & ((place < 0) | better(padded[cut], best))
        best, place = np.where(wins, padded[cut], best), np.where(wins, n, place)
    for n, tap in enumerate(taps):
        out[_taps(tap, attrs, source.shape)] += np.where(place == n, source, 0)
    inner = tuple(slice(lo, lo + n) for (lo, _), n in zip(pads, x.shape, strict=True))
    return cast(out[inner], outs[0].dtype)


# Movement


def _reshape(args, attrs, outs):
    return np.asarray(args[0]).reshape(outs[0].shape)


def _broadcast_in_dim(args, attrs, outs):
    shape = [1] * len(outs[0].shape)
    x = np.asarray(args[0])
    for n, d in zip(x.shape, attrs["broadcast_dimensions"], strict=True):
        shape[d] = n
    return np.broadcast_to(x.reshape(shape), outs[0].shape)


def _pad(args, attrs, outs):
    x, value = np.asarray(args[0]), args[1]
    for d, (lo, hi, holes) in enumerate(attrs["padding_config"]):
        x = _dilate(x, d, holes + 1, (lo, hi), value)
    return x


def _slice(args, attrs, outs):
    strides = attrs["strides"] or (1,) * len(attrs["start_indices"])
    cut = zip(attrs["start_indices"], attrs["limit_indices"], strides, strict=True)
    return np.asarray(args[0])[tuple(slice(*c) for c in cut)]


def _starts(x, sizes, starts):
    return [int(np.clip(int(s), 0, n - size)) for s, n, size in zip(starts, x.shape, sizes, strict=True)]


def _dynamic_slice(args, attrs, outs):
    x, sizes = np.asarray(args[0]), outs[0].shape
    return x[tuple(slice(s, s + n) for s, n in zip(_starts(x, sizes, args[1:]), sizes, strict=True))]


def _dynamic_update_slice(args, attrs, outs):
    x, update = np.array(args[0]), np.asarray(args[1])
    at = _starts(x, update.shape, args[2:])
    x[tuple(slice(s, s + n) for s, n in zip(at, update.shape, strict=True))] = update
    return x


def _iota(args, attrs, outs):
    shape, d = outs[0].shape, attrs["dimension"]
    line = np.arange(shape[d]).reshape([-1 if i == d else 1 for i in range(len(shape))])
    return np.broadcast_to(cast(line, outs[0].dtype), shape)


def _zeros(args, attrs, outs):
    return np.zeros(outs[0].shape, numpy_dtype(outs[0].dtype))


def _split(args, attrs, outs):
    return tuple(np.split(np.asarray(args[0]), np.cumsum(attrs["sizes"])[:-1], axis=attrs["axis"]))


def _unstack(args, attrs, outs):
    x = np.moveaxis(np.asarray(args[0]), attrs.get("axis", 0), 0)
    return tuple(x)


def _bitcast(args, attrs, outs):
    x, to = np.ascontiguousarray(args[0]), numpy_dtype(outs[0].dtype)
    if x.dtype.itemsize == to.itemsize:
        return x.view(to).reshape(outs[0].shape)
    return x.reshape(-1).view(to).reshape(outs[0].shape)


def _wrap(args, attrs, outs):
    words = np.asarray(args[0]).astype(np.uint64)
    return (words[..., 0] << np.uint64(32)) | words[..., 1]


def _key_words(keys):
    keys = np.asarray(keys, np.uint64)
    return (keys >> np.uint64(32)).astype(np.uint32), (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _unwrap(args, attrs, outs):
    return np.stack(_key_words(args[0]), axis=-1)


def _places(shape, start, sizes_of, update_axes, batch_axes, attrs, operand):
    """Index arrays, one for each operand axis, over an array of `shape` (a gather's result or the updates).

    Returns: (indices, in bounds [shape]): the window of each place lies inside the operand.
    """
    batch_shape = tuple(shape[d] for d in batch_axes)
    spread = lambda a: np.asarray(a).reshape([shape[d] if d in batch_axes else 1 for d in range(len(shape))])
    base, ok = {}, np.ones((), bool)
    for n, d in enumerate(attrs["index_map"]):
        s = np.broadcast_to(start[..., n].astype(np.int64), batch_shape)
        room = operand.shape[d] - sizes_of[d]
        ok = ok & spread((s >= 0) & (s <= room))
        if attrs["clip"]:
            s = np.clip(s, 0, room)
        base[d] = spread(s)
    for d, b in zip(attrs["operand_batching_dims"], attrs["batching_axes"], strict=True):
        base[d] = spread(
            np.broadcast_to(
                np.arange(batch_shape[b]).reshape([-1 if i == b else 1 for i in range(len(batch_shape))]),
                batch_shape,
            )
        )
    window = iter(update_axes)
    index = []
    for d in range(operand.ndim):
        at = base.get(d, np.zeros((), np.int64))
        if d not in attrs["dropped"]:
            axis = next(window)
            line = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
            at = at + line
        index.append(np.broadcast_to(at, shape))
    return index, np.broadcast_to(ok, shape)


def _gather(args, attrs, outs):
    x, start = np.asarray(args[0]), np.asarray(args[1])
    shape = outs[0].shape
    offsets = attrs["offset_dims"]
    batch = [d for d in range(len(shape)) if d not in offsets]
    given = {
        "index_map": attrs["start_index_map"],
        "operand_batching_dims": attrs.get("operand_batching_dims", ()),
        "batching_axes": attrs.get("start_indices_batching_dims", ()),
        "dropped": (*attrs["collapsed_slice_dims"], *attrs.get("operand_batching_dims", ())),
        "clip": True,
    }
    index, ok = _places(shape, start, attrs["slice_sizes"], offsets, batch, given, x)
    out = x[tuple(index)] if x.size else np.zeros(shape, x.dtype)
    if attrs["mode"].startswith("FILL"):
        fill = attrs.get("fill_value")
        if fill is None:
            kind = outs[0].dtype
            fill = (
                np.nan
                if is_float(kind)
                else np.iinfo(x.dtype).min
                if x.dtype.kind == "i"
                else np.iinfo(x.dtype).max
                if x.dtype.kind == "u"
                else True
            )
        out = np.where(ok, out, np.array(fill).astype(x.dtype))
    return out


def _scatter(args, attrs, outs, update):
    x, start, updates = np.array(args[0]), np.asarray(args[1]), np.asarray(args[2])
    windows = attrs["update_window_dims"]
    batching = attrs.get("operand_batching_dims", ())
    dropped = (*attrs["inserted_window_dims"], *batching)
    batch = [d for d in range(updates.ndim) if d not in windows]
    sizes, axes = {}, iter(windows)
    for d in range(x.ndim):
        sizes[d] = 1 if d in dropped else updates.shape[next(axes)]
    given = {
        "index_map": attrs["scatter_dims_to_operand_dims"],
        "operand_batching_dims": batching,
        "batching_axes": attrs.get("scatter_indices_batching_dims", ()),
        "dropped": dropped,
        "clip": attrs["mode"].startswith("CLIP"),
    }
    index, ok = _places(updates.shape, start, sizes, windows, batch, given, x)
    ok = np.ones(updates.shape, bool) if given["clip"] else ok
    at = tuple(i[ok] for i in index)
    narrow = _narrow(x.dtype)
    target = x.astype(np.float32) if narrow else x
    values = _widen(updates)[ok]
    if not x.ndim:
        for v in values:
            target = update(target, v)
        return cast(np.asarray(target), outs[0].dtype)
    with np.errstate(all="ignore"):
        if update is None:
            target[at] = values
        else:
            update.at(target, at, values)
    return cast(target, outs[0].dtype)


# Random numbers: threefry, as jax.random does with partitionable keys


def threefry(k1, k2, x1, x2):
    """Two words of threefry-2x32 for key words k1, k2 and counter words x1, x2 (uint32, broadcast)."""
    k1, k2, x1, x2 = np.broadcast_arrays(*(np.asarray(a, np.uint32) for a in (k1, k2, x1, x2)))
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    ks = (k1, k2, k1 ^ k2 ^ np.uint32(0x1BD11BDA))
    with np.errstate(over="ignore"):
        x1, x2 = x1 + ks[0], x2 + ks[1]
        for i in range(5):
            for r in rotations[i % 2]:
                x1 = x1 + x2
                x2 = x1 ^ ((x2 << np.uint32(r)) | (x2 >> np.uint32(32 - r)))
            x1 = x1 + ks[(i + 1) % 3]
            x2 = x2 + ks[(i + 2) % 3] + np.uint32(i + 1)
    return x1, x2


def _threefry(args, attrs, outs):
    return tuple(x.reshape(o.shape) for x, o in zip(threefry(*args), outs, strict=True))


def _counters(shape):
    n = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    return _key_words(n)


def _seed_words(seed):
    seed = np.asarray(seed)
    wide = seed.dtype.itemsize == 8
    words = seed.astype(np.uint64) if wide else seed.view(f"u{seed.dtype.itemsize}").astype(np.uint64)
    return _key_words(words)


def _join_words(hi, lo):
    return (hi.astype(np.uint64) << np.uint64(32)) | lo.astype(np.uint64)


def _random_seed(args, attrs, outs):
    return _join_words(*_seed_words(args[0]))


def _random_split(args, attrs, outs):
    k1, k2 = _key_words(args[0])
    shape = tuple(attrs["shape"])
    expand = lambda k: k.reshape(k.shape + (1,) * len(shape))
    return _join_words(*threefry(expand(k1), expand(k2), *_counters(shape)))


def _random_fold_in(args, attrs, outs):
    k1, k2 = _key_words(args[0])
    s1, s2 = _seed_words(np.asarray(args[1]).astype(np.uint32))
    return _join_words(*threefry(k1, k2, s1, s2))


def _random_bits(args, attrs, outs):
    k1, k2 = _key_words(args[0])
    shape, width = tuple(attrs["shape"]), attrs["bit_width"]
    expand = lambda k: k.reshape(k.shape + (1,) * len(shape))
    hi, lo = threefry(expand(k1), expand(k2), *_counters(shape))
    if width == 64:
        return _join_words(hi, lo)
    return (hi ^ lo).astype(f"u{width // 8}")


_RULES = {
    "convert_element_type": _convert,
    "copy": _identity,
    "select_n": _select_n,
    "round": _round,
    "integer_pow": _integer_pow,
    "nextafter": _nextafter,
    "reduce_precision": _reduce_precision,
    "reduce_sum": _reduction(lambda x, a: np.sum(x, axis=a, dtype=x.dtype)),
    "reduce_prod": _reduction(lambda x, a: np.prod(x, axis=a, dtype=x.dtype)),
    "reduce_max": _reduction(_extreme(np.max, "low")),
    "reduce_min": _reduction(_extreme(np.min, "high")),
    "reduce_and": _reduction(lambda x, a: np.bitwise_and.reduce(x, axis=a)),
    "reduce_or": _reduction(lambda x, a: np.bitwise_or.reduce(x, axis=a)),
    "reduce_xor": _reduction(lambda x, a: np.bitwise_xor.reduce(x, axis=a)),
    "argmax": _arg(np.argmax),
    "argmin": _arg(np.argmin),
    "cumsum": lambda *a: _cumulative(lambda x, ax: np.cumsum(x, axis=ax, dtype=x.dtype), *a),
    "cumprod": lambda *a: _cumulative(lambda x, ax: np.cumprod(x, axis=ax, dtype=x.dtype), *a),
    "cummax": lambda *a: _cumulative(_accumulate(np.maximum), *a),
    "cummin": lambda *a: _cumulative(_accumulate(np.minimum), *a),
    "cumlogsumexp": lambda *a: _cumulative(_cumlogsumexp, *a),
    "sort": _sort,
    "top_k": _top_k,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "reduce_window": _reduce_window,
    "reduce_window_sum": lambda *a: _window(*a, *_COMBINE["add"]),
    "reduce_window_max": lambda *a: _window(*a, *_COMBINE["max"]),
    "reduce_window_min": lambda *a: _window(*a, *_COMBINE["min"]),
    "select_and_scatter_add": _select_and_scatter_add,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "tile": lambda a, p, o: np.tile(a[0], p["reps"]),
    "stack": lambda a, p, o: np.stack(a, axis=p.get("axis", 0)),
    "unstack": _unstack,
    "bitcast_convert_type": _bitcast,
    "transpose": lambda a, p, o: np.transpose(a[0], p["permutation"]),
    "rev": lambda a, p, o: np.flip(a[0], p["dimensions"]),
    "concatenate": lambda a, p, o: np.concatenate(a, axis=p["dimension"]),
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "iota": _iota,
    "empty": _zeros,
    "zeros_like": _zeros,
    "split": _split,
    "gather": _gather,
    "scatter": lambda *a: _scatter(*a, None),
    "scatter-add": lambda *a: _scatter(*a, np.add),
    "scatter-mul": lambda *a: _scatter(*a, np.multiply),
    "scatter-min": lambda *a: _scatter(*a, np.minimum),
    "scatter-max": lambda *a: _scatter(*a, np.maximum),
    "random_wrap": _wrap,
    "random_unwrap": _unwrap,
    "threefry2x32": _threefry,
    "random_seed": _random_seed,
    "random_split": _random_split,
    "random_fold_in": _random_fold_in,
    "random_bits": _random_bits,
}


def _install_identities():
    from hw.primitives import IDENTITY

    for name in IDENTITY:
        _RULES[name] = _identity


_install_identities()
