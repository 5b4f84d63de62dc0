"""From a NumPy function to an op program, without JAX: `sketch` is `trace` for what NumPy code can say.

The function runs once on stand-ins that have a shape and a dtype and no values; NumPy's own protocols hand
them what is done (`__array_ufunc__`, `__array_function__`). Functions of JAX go to `trace`.
"""

import inspect
from math import prod

import numpy as np

from hw.errors import NotTraceable, UnsupportedPrimitive
from hw.passes import finish, prune
from hw.primitives import rule
from hw.program import Block, Op, Program, Tensor
from ref.blocks.formats import round_bf16

FLOATS = ("float64", "float32", "float16", "bfloat16")

_UFUNCS = {
    np.add: "add", np.subtract: "sub", np.multiply: "mul", np.true_divide: "div", np.negative: "neg",
    np.maximum: "max", np.minimum: "min", np.absolute: "abs", np.sign: "sign", np.exp: "exp", np.log: "log",
    np.expm1: "expm1", np.log1p: "log1p", np.tanh: "tanh", np.sqrt: "sqrt", np.sin: "sin", np.cos: "cos",
    np.floor: "floor", np.ceil: "ceil",
}  # fmt: skip

_FOLDS = ("transpose", "reshape", "squeeze")  # of weights: done once, before the program runs


def sketch(fn, *args, weights=()) -> Program:
    """The op program of fn(*args), a function of NumPy arrays.

    Args: fn: arithmetic, products, reductions and movements of float arrays of one dtype; what it may call is
      what `UnsupportedPrimitive` lists when it calls another. args: (dtype, shape) specs, or arrays whose
      shapes and dtypes are taken. weights: names (or positions) of arguments that are parameters, there
      before the program runs.
    Returns: the program, equal in price to what `trace` makes of the same function of `jax.numpy`.
    Raises: UnsupportedPrimitive, NotTraceable for a function that needs values; ValueError for axes that do
      not fit, mixed dtypes, a name in weights that is no argument; TypeError for a result that is no array.
    """
    names = [p for p in inspect.signature(fn).parameters][: len(args)]
    names += [f"arg{i}" for i in range(len(names), len(args))]
    unknown = [w for w in weights if w not in names and not (isinstance(w, int) and 0 <= w < len(args))]
    if unknown:
        raise ValueError(f"weights names {unknown[0]!r}, but the arguments are {', '.join(names) or 'none'}")
    tape = _Tape()
    given = []
    for i, (name, arg) in enumerate(zip(names, args, strict=True)):
        role = "weight" if name in weights or i in weights else "input"
        given.append(tape.tensor(*_spec(name, arg), role, name))
    results = fn(*given)
    several = isinstance(results, tuple | list)
    outs = tuple(results) if several else (results,)
    for out in outs:
        if not isinstance(out, _Array):
            what = type(out).__name__
            raise TypeError(f"the function must return an array or several made of its arguments, got {what}")
    block = Block(tuple(a.id for a in given), tuple(tape.ops), tuple(a.id for a in outs))
    block = prune(block)
    labels = tuple(f"result[{i}]" for i in range(len(outs))) if several else ("result",)
    tensors = finish(tape.tensors, block)
    return Program(getattr(fn, "__name__", "program"), tensors, block, tuple(names), labels, tuple(names))


def _spec(name, arg):
    """(shape, dtype) of an argument. Raises: ValueError."""
    if hasattr(arg, "shape") and hasattr(arg, "dtype"):
        shape, dtype = arg.shape, str(arg.dtype)
    else:
        try:
            dtype, shape = arg
            shape = tuple(int(n) for n in shape)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be an array or (dtype, shape), got {arg!r}") from None
    if dtype not in FLOATS or min(shape, default=1) < 1:
        allowed = f"{', '.join(FLOATS)}, with axes of at least 1"
        raise ValueError(f"{name} must be of {allowed}, got {dtype} {list(shape)}")
    return tuple(shape), dtype


class _Tape:
    """Tensors and ops in the order in which they are made."""

    def __init__(self):
        self.tensors, self.ops, self.consts = {}, [], {}

    def tensor(self, shape, dtype, role="activation", name="", data=None):
        i = len(self.tensors)
        self.tensors[i] = Tensor(i, tuple(shape), dtype, role, name, data=data)
        return _Array(self, i)

    def const(self, value, dtype):
        """A constant of the program; equal ones are one."""
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            raise TypeError(f"a constant must be of numbers, got {value.dtype}")
        if value.dtype.kind == "b":
            dtype, data = "bool", value.tobytes()
        elif dtype == "bfloat16":  # the upper halves of float32; NumPy alone has no such type
            data = (round_bf16(value).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            data = value.astype(dtype).tobytes()
        key = value.shape, dtype, data
        if key not in self.consts:
            self.consts[key] = self.tensor(value.shape, dtype, "const", data=data)
        return self.consts[key]

    def op(self, prim, inputs, shape, dtype=None, /, **attrs):
        """Note an op; returns its result."""
        first = self.tensors[inputs[0].id]
        folded = prim in _FOLDS and first.role in ("weight", "const") and first.size > 1
        out = self.tensor(shape, dtype or inputs[0].dtype, "weight" if folded else "activation")
        ins = [(a.shape, a.dtype) for a in inputs]
        kind, dims = rule(prim, ins, [(out.shape, out.dtype)], attrs)
        ids, attrs = tuple(a.id for a in inputs), attrs | {"folded": True} if folded else attrs
        self.ops.append(Op(len(self.ops), kind, prim, ids, (out.id,), dims, attrs=attrs))
        return out


def _refuse(name):
    known = sorted({f.__name__ for f in (*_UFUNCS, *_FUNCTIONS, np.matmul, np.power, np.square)})
    return UnsupportedPrimitive(name, why=f"sketch knows {', '.join(known)}; JAX functions go to hw.trace")


class _Array(np.lib.mixins.NDArrayOperatorsMixin):
    """A stand-in for an array: shape and dtype without values."""

    def __init__(self, tape, id):
        self.tape, self.id = tape, id

    shape = property(lambda self: self.tape.tensors[self.id].shape)
    dtype = property(lambda self: self.tape.tensors[self.id].dtype)
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: prod(self.shape))
    T = property(lambda self: self.transpose())

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        return f"array {list(self.shape)} {self.dtype}"

    def __iter__(self):
        return (self[i] for i in range(self.shape[0]))

    def _needs_values(self, *_, **__):
        raise NotTraceable(f"the function needs the values of {self!r}, and a program has shapes alone")

    __array__ = __bool__ = __float__ = __int__ = __index__ = item = _needs_values

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if options or method != "__call__":
            raise _refuse(f"{ufunc.__name__}{'' if method == '__call__' else '.' + method} with options")
        if ufunc is np.matmul:
            return _matmul(*(self._lift(x) for x in inputs))
        if ufunc is np.square or (ufunc is np.power and isinstance(inputs[1], int)):
            y = 2 if ufunc is np.square else inputs[1]
            return self.tape.op("integer_pow", [inputs[0]], inputs[0].shape, y=y)
        if ufunc not in _UFUNCS:
            raise _refuse(ufunc.__name__)
        return _elementwise(_UFUNCS[ufunc], [self._lift(x) for x in inputs])

    def __array_function__(self, func, types, args, kwargs):
        if func not in _FUNCTIONS:
            raise _refuse(func.__name__)
        return _FUNCTIONS[func](*args, **kwargs)

    def _lift(self, x):
        return x if isinstance(x, _Array) else self.tape.const(x, self.dtype)

    def _reduce(self, prim, axis, keepdims):
        axes = range(self.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        axes = tuple(sorted(_axis(a, self.ndim) for a in axes))
        out = self.tape.op(prim, [self], [n for i, n in enumerate(self.shape) if i not in axes], axes=axes)
        if not keepdims:
            return out
        return _broadcast(out, [1 if i in axes else n for i, n in enumerate(self.shape)],
                          [i for i in range(self.ndim) if i not in axes])  # fmt: skip

    def sum(self, axis=None, keepdims=False):
        return self._reduce("reduce_sum", axis, keepdims)

    def max(self, axis=None, keepdims=False):
        return self._reduce("reduce_max", axis, keepdims)

    def min(self, axis=None, keepdims=False):
        return self._reduce("reduce_min", axis, keepdims)

    def mean(self, axis=None, keepdims=False):
        total = self.sum(axis, keepdims)
        return total / float(self.size // total.size)

    def reshape(self, *shape):
        shape = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
        if shape.count(-1) == 1:
            shape[shape.index(-1)] = self.size // max(-prod(shape), 1)
        if prod(shape) != self.size:
            raise ValueError(f"{self!r} cannot be reshaped to {shape}")
        return self.tape.op("reshape", [self], shape, new_sizes=tuple(shape), dimensions=None)

    def transpose(self, *axes):
        axes = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        axes = tuple(_axis(a, self.ndim) for a in axes or range(self.ndim)[::-1])
        if sorted(axes) != list(range(self.ndim)):
            raise ValueError(f"the axes of {self!r} cannot be put in the order {list(axes)}")
        return self.tape.op("transpose", [self], [self.shape[a] for a in axes], permutation=axes)

    def swapaxes(self, a, b):
        axes = list(range(self.ndim))
        a, b = _axis(a, self.ndim), _axis(b, self.ndim)
        axes[a], axes[b] = axes[b], axes[a]
        return self.transpose(axes)

    def __getitem__(self, key):
        """Slices without a step, single positions and None."""
        key = key if isinstance(key, tuple) else (key,)
        if Ellipsis in key:
            at = key.index(Ellipsis)
            rest = self.ndim - sum(k is not None for k in key) + 1
            key = (*key[:at], *[slice(None)] * rest, *key[at + 1 :])
        key = (*key, *[slice(None)] * (self.ndim - sum(k is not None for k in key)))
        start, limit = [], []
        for k in (k for k in key if k is not None):
            n = self.shape[len(start)] if len(start) < self.ndim else 0
            if isinstance(k, int) and -n <= k < n:
                lo, hi = k % n, k % n + 1
            elif isinstance(k, slice) and k.step in (None, 1):
                lo, hi, _ = k.indices(n)
            else:
                raise IndexError(f"{self!r} takes slices, positions and None, got {k!r} on axis {len(start)}")
            start.append(lo)
            limit.append(max(lo, hi))
        out, shape = self, tuple(h - l for l, h in zip(start, limit, strict=True))
        if shape != self.shape:
            out = self.tape.op("slice", [self], shape, start_indices=tuple(start),
                               limit_indices=tuple(limit), strides=None)  # fmt: skip
        single = tuple(i for i, k in enumerate(k for k in key if k is not None) if isinstance(k, int))
        if single:
            shape = tuple(n for i, n in enumerate(shape) if i not in single)
            out = self.tape.op("squeeze", [out], shape, dimensions=single)
        kept = [k for k in key if not isinstance(k, int)]
        if None in kept:
            axes = [i for i, k in enumerate(kept) if k is not None]
            full = [1] * len(kept)
            for axis, n in zip(axes, shape, strict=True):
                full[axis] = n
            out = _broadcast(out, full, axes)
        return out


def _axis(a, ndim):
    if not -ndim <= a < ndim:
        raise ValueError(f"axis {a} is none of the {ndim} there are")
    return a % ndim


def _broadcast(x, shape, axes):
    return x.tape.op("broadcast_in_dim", [x], shape, shape=tuple(shape), broadcast_dimensions=tuple(axes))


def _same_dtype(arrays):
    found = list(dict.fromkeys(a.dtype for a in arrays if a.dtype != "bool"))
    if len(found) > 1:
        raise ValueError(f"arrays of one program have one dtype, got {' and '.join(found)}")


def _elementwise(prim, inputs):
    """One op over operands of equal rank: axes in front are added as JAX adds them; scalars stay scalars."""
    _same_dtype(inputs)
    shape = _common([a.shape for a in inputs])
    tape = inputs[0].tape
    rank = lambda a: a if a.ndim in (0, len(shape)) else _broadcast(
        a, (1,) * (len(shape) - a.ndim) + a.shape, range(len(shape) - a.ndim, len(shape))
    )  # fmt: skip
    dtype = next(a.dtype for a in inputs if a.dtype != "bool")
    return tape.op(prim, [rank(a) for a in inputs], shape, dtype)


def _common(shapes):
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(f"shapes {' and '.join(str(list(s)) for s in shapes)} do not fit together") from None


def _matmul(a, b):
    _same_dtype((a, b))
    if not a.ndim or not b.ndim:
        raise ValueError(f"a product needs axes, got {a!r} and {b!r}")
    k = max(b.ndim - 2, 0)  # the axis of b that is summed
    if a.shape[-1] != b.shape[k]:
        raise ValueError(f"{a!r} and {b!r} do not multiply: {a.shape[-1]} against {b.shape[k]}")
    lead = b.shape[:-2]
    if lead and a.shape[:-2] != lead:
        raise ValueError(f"{a!r} and {b!r} do not multiply: leading axes are equal or the second's none")
    many = tuple(range(len(lead)))
    shape = (*a.shape[:-1], *(b.shape[-1:] if b.ndim > 1 else ()))
    numbers = (((a.ndim - 1,), (k,)), (many, many))
    return a.tape.op("dot_general", [a, b], shape, dimension_numbers=numbers, precision=None,
                     preferred_element_type=a.dtype)  # fmt: skip


def _where(condition, x, y):
    """x where a mask of constants holds, else y."""
    array = next(a for a in (x, y, condition) if isinstance(a, _Array))
    if isinstance(condition, _Array):
        raise _refuse("where of a condition that is no constant")
    x, y, mask = array._lift(x), array._lift(y), array.tape.const(np.asarray(condition, bool), "bool")
    shape = _common([mask.shape, x.shape, y.shape])
    full = lambda a: a if a.shape == shape else _broadcast(a, shape, range(len(shape) - a.ndim, len(shape)))
    _same_dtype((x, y))
    return array.tape.op("select_n", [full(mask), full(y), full(x)], shape, array.dtype)


def _concatenate(arrays, axis=0):
    array = next(a for a in arrays if isinstance(a, _Array))
    arrays = [array._lift(a) for a in arrays]
    _same_dtype(arrays)
    axis = _axis(axis, array.ndim)
    rest = [(*a.shape[:axis], *a.shape[axis + 1 :]) for a in arrays]
    if len(set(rest)) > 1:
        raise ValueError(f"{' and '.join(map(repr, arrays))} do not join along axis {axis}")
    shape = list(array.shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    return array.tape.op("concatenate", arrays, shape, dimension=axis)


def _expand_dims(x, axis):
    axis = _axis(axis, x.ndim + 1)
    return x[(*[slice(None)] * axis, None)]


_FUNCTIONS = {
    np.sum: _Array.sum, np.max: _Array.max, np.min: _Array.min, np.mean: _Array.mean, np.where: _where,
    np.reshape: _Array.reshape, np.transpose: _Array.transpose, np.swapaxes: _Array.swapaxes,
    np.concatenate: _concatenate, np.expand_dims: _expand_dims,
}  # fmt: skip
