"""Rules of ONNX operators: (graph, operand ids, attributes) -> the id of the result, or a list of ids.

An operand that is left out is None. The semantics are those of opset 13 to 20; where an older one differs
(softmax over flattened axes) the node is refused.
"""

from math import ceil, floor, prod, sqrt

import numpy as np

# Elementwise, with NumPy's broadcasting


def spread(g, i, shape):
    """The tensor broadcast to a shape."""
    own = g.shape(i)
    if own == tuple(shape):
        return i
    axes = tuple(range(len(shape) - len(own), len(shape)))
    return g.emit("broadcast_in_dim", [i], shape, shape=tuple(shape), broadcast_dimensions=axes)


def elementwise(g, prim, *args, dtype=None, **attrs):
    """One primitive over operands that broadcast."""
    shape = np.broadcast_shapes(*(g.shape(a) for a in args))
    return g.emit(prim, [spread(g, a, shape) for a in args], shape, dtype or g.dtype(args[0]), **attrs)


def number(g, value, like):
    """A constant of the dtype of a tensor."""
    return g.constant(np.array(value, g.dtype(like)))


def _plain(prim, dtype=None):
    return lambda g, args, attrs: elementwise(g, prim, *args, dtype=dtype)


def _folded(prim):
    """Max and Min take any number of operands."""

    def apply(g, args, attrs):
        total = args[0]
        for a in args[1:]:
            total = elementwise(g, prim, total, a)
        return total

    return apply


def _pow(g, args, attrs):
    x, y = args
    exponent = g.known[y].item() if y in g.known and g.known[y].size == 1 else None
    if exponent == 0.5:
        return elementwise(g, "sqrt", x)
    if exponent is not None and exponent == int(exponent) and abs(exponent) <= 16:
        shape = np.broadcast_shapes(g.shape(x), g.shape(y))
        return g.emit("integer_pow", [spread(g, x, shape)], shape, y=int(exponent))
    return elementwise(g, "pow", x, cast(g, y, g.dtype(x)))


def cast(g, i, dtype):
    """The tensor in another dtype."""
    if g.dtype(i) == dtype:
        return i
    return g.emit("convert_element_type", [i], g.shape(i), dtype, new_dtype=dtype)


def _cast(g, args, attrs):
    from onnx.helper import tensor_dtype_to_np_dtype

    return cast(g, args[0], str(np.dtype(tensor_dtype_to_np_dtype(attrs["to"]))))


def _clip(g, args, attrs):
    x = args[0]
    low = args[1] if len(args) > 1 else None
    high = args[2] if len(args) > 2 else None
    x = x if low is None else elementwise(g, "max", x, low)
    return x if high is None else elementwise(g, "min", x, high)


def _relu(g, args, attrs):
    return elementwise(g, "max", args[0], number(g, 0, args[0]))


def _leaky_relu(g, args, attrs):
    (x,) = args
    below = elementwise(g, "mul", x, number(g, attrs.get("alpha", 0.01), x))
    positive = elementwise(g, "ge", x, number(g, 0, x), dtype="bool")
    return g.emit("select_n", [positive, below, x], g.shape(x), g.dtype(x))


def _hard_sigmoid(g, args, attrs):
    (x,) = args
    y = elementwise(g, "mul", x, number(g, attrs.get("alpha", 0.2), x))
    y = elementwise(g, "add", y, number(g, attrs.get("beta", 0.5), x))
    return elementwise(g, "min", elementwise(g, "max", y, number(g, 0, x)), number(g, 1, x))


def _hard_swish(g, args, attrs):
    return elementwise(g, "mul", args[0], _hard_sigmoid(g, args, {"alpha": 1 / 6, "beta": 0.5}))


def _softplus(g, args, attrs):
    return elementwise(g, "log1p", elementwise(g, "exp", args[0]))


def _gelu(g, args, attrs):
    (x,) = args
    times = lambda a, c: elementwise(g, "mul", a, number(g, c, x))
    if attrs.get("approximate", "none") == "tanh":
        cube = times(g.emit("integer_pow", [x], g.shape(x), y=3), 0.044715)
        inner = elementwise(g, "tanh", times(elementwise(g, "add", x, cube), sqrt(2 / np.pi)))
    else:
        inner = elementwise(g, "erf", times(x, sqrt(0.5)))
    return times(elementwise(g, "mul", x, elementwise(g, "add", inner, number(g, 1, x))), 0.5)


def _where(g, args, attrs):
    test, yes, no = args
    shape = np.broadcast_shapes(*(g.shape(a) for a in args))
    operands = [spread(g, a, shape) for a in (test, no, yes)]
    return g.emit("select_n", operands, shape, g.dtype(yes))


def _is_nan(g, args, attrs):
    return g.emit("ne", [args[0], args[0]], g.shape(args[0]), "bool")


# Reductions and what is made of them


def _axis(axis, ndim):
    return int(axis) + ndim if axis < 0 else int(axis)


def reduce(g, prim, x, axes, keep=True):
    """A reduction over axes, which stay with length 1 if `keep`."""
    shape = g.shape(x)
    left = tuple(n for d, n in enumerate(shape) if d not in axes)
    y = g.emit(prim, [x], left, axes=tuple(axes))
    kept = tuple(1 if d in axes else n for d, n in enumerate(shape))
    return reshape(g, y, kept) if keep else y


def mean(g, x, axes, keep=True):
    """The mean over axes."""
    total = reduce(g, "reduce_sum", x, axes, keep)
    count = prod(g.shape(x)[d] for d in axes)
    return elementwise(g, "div", total, number(g, count, x))


def _reduction(apply):
    def node(g, args, attrs):
        x, ndim = args[0], len(g.shape(args[0]))
        axes = attrs.get("axes")
        if axes is None and len(args) > 1 and args[1] is not None:
            axes = g.value(args[1], "its axes").tolist()
        if not axes:
            if attrs.get("noop_with_empty_axes", 0):
                return x
            axes = range(ndim)
        axes = tuple(sorted(_axis(a, ndim) for a in axes))
        return apply(g, x, axes, bool(attrs.get("keepdims", 1)))

    return node


def _arg(prim):
    def node(g, args, attrs):
        x, ndim = args[0], len(g.shape(args[0]))
        if attrs.get("select_last_index", 0):
            raise g.refuse("the last of equal values")
        axis = _axis(attrs.get("axis", 0), ndim)
        shape = g.shape(x)
        y = g.emit(prim, [x], shape[:axis] + shape[axis + 1 :], "int64", axes=(axis,), index_dtype="int64")
        kept = tuple(1 if d == axis else n for d, n in enumerate(shape))
        return reshape(g, y, kept) if attrs.get("keepdims", 1) else y

    return node


def _softmax(g, args, attrs):
    (x,) = args
    ndim = len(g.shape(x))
    axis = _axis(attrs.get("axis", -1 if g.opset >= 13 else 1), ndim)
    if g.opset < 13 and axis != ndim - 1:
        raise g.refuse("a softmax over flattened axes, of opset 12 and before")
    e = elementwise(g, "exp", elementwise(g, "sub", x, reduce(g, "reduce_max", x, (axis,))))
    return elementwise(g, "div", e, reduce(g, "reduce_sum", e, (axis,)))


def _layer_norm(g, args, attrs):
    x, scale = args[:2]
    ndim = len(g.shape(x))
    axes = tuple(range(_axis(attrs.get("axis", -1), ndim), ndim))
    centre = elementwise(g, "sub", x, mean(g, x, axes))
    variance = mean(g, g.emit("square", [centre], g.shape(centre)), axes)
    inverse = elementwise(
        g, "rsqrt", elementwise(g, "add", variance, number(g, attrs.get("epsilon", 1e-5), x))
    )
    y = elementwise(g, "mul", elementwise(g, "mul", centre, inverse), scale)
    return elementwise(g, "add", y, args[2]) if len(args) > 2 and args[2] is not None else y


def _batch_norm(g, args, attrs):
    x, scale, bias, average, variance = args
    if attrs.get("training_mode", 0):
        raise g.refuse("batch normalisation in training")
    at = lambda i: reshape(g, i, (1, -1, *[1] * (len(g.shape(x)) - 2)))
    epsilon = number(g, attrs.get("epsilon", 1e-5), x)
    factor = elementwise(g, "mul", scale, elementwise(g, "rsqrt", elementwise(g, "add", variance, epsilon)))
    y = elementwise(g, "mul", elementwise(g, "sub", x, at(average)), at(factor))
    return elementwise(g, "add", y, at(bias))


# Products


def matmul(g, a, b, dtype=None):
    """NumPy's matmul: leading axes broadcast, vectors are one row or column."""
    if len(g.shape(a)) == 1:
        y = matmul(g, reshape(g, a, (1, -1)), b, dtype)
        return reshape(g, y, (*g.shape(y)[:-2], g.shape(y)[-1]))
    if len(g.shape(b)) == 1:
        y = matmul(g, a, reshape(g, b, (-1, 1)), dtype)
        return reshape(g, y, g.shape(y)[:-1])
    if len(g.shape(b)) == 2:
        shape, dims = (*g.shape(a)[:-1], g.shape(b)[1]), (((len(g.shape(a)) - 1,), (0,)), ((), ()))
    else:
        lead = np.broadcast_shapes(g.shape(a)[:-2], g.shape(b)[:-2])
        a, b = (spread(g, i, (*lead, *g.shape(i)[-2:])) for i in (a, b))
        batch, n = tuple(range(len(lead))), len(lead)
        shape, dims = (*lead, g.shape(a)[-2], g.shape(b)[-1]), (((n + 1,), (n,)), (batch, batch))
    result = dtype or g.dtype(a)
    return g.emit("dot_general", [a, b], shape, result, dimension_numbers=dims, preferred_element_type=result)


def _gemm(g, args, attrs):
    a, b = args[:2]
    a = transpose(g, a, (1, 0)) if attrs.get("transA", 0) else a
    b = transpose(g, b, (1, 0)) if attrs.get("transB", 0) else b
    y = matmul(g, a, b)
    scaled = lambda i, c: i if c == 1 else elementwise(g, "mul", i, number(g, c, y))
    y = scaled(y, attrs.get("alpha", 1.0))
    if len(args) < 3 or args[2] is None:
        return y
    return elementwise(g, "add", y, scaled(args[2], attrs.get("beta", 1.0)))


def _matmul_integer(g, args, attrs):
    shifted = []
    for n in (0, 1):
        x = cast(g, args[n], "int32")
        zero = args[n + 2] if len(args) > n + 2 else None
        if zero is not None:
            zero = cast(g, zero, "int32")
            zero = (
                reshape(g, zero, (-1, 1))
                if n == 0 and len(g.shape(zero)) == 1 and g.shape(zero)[0] > 1
                else zero
            )
            x = elementwise(g, "sub", x, zero)
        shifted.append(x)
    return matmul(g, *shifted, dtype="int32")


def _windows(g, attrs, x, kernel):
    """(strides, dilations, padding) of a sliding window over the spatial axes of x [N, C, ...]."""
    space = g.shape(x)[2:]
    strides = attrs.get("strides", [1] * len(space))
    dilations = attrs.get("dilations", [1] * len(space))
    auto = attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        padding = []
        for n, k, s, d in zip(space, kernel, strides, dilations, strict=True):
            total = max((ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small, large = total // 2, total - total // 2
            padding.append((small, large) if auto == "SAME_UPPER" else (large, small))
    else:
        pads = attrs.get("pads", [0] * 2 * len(space)) if auto == "NOTSET" else [0] * 2 * len(space)
        padding = list(zip(pads[: len(space)], pads[len(space) :], strict=True))
    return tuple(strides), tuple(dilations), tuple((int(a), int(b)) for a, b in padding)


def _places(n, k, stride, dilation, pad, round_up=False):
    """Windows along an axis."""
    span = (n + sum(pad) - (k - 1) * dilation - 1) / stride
    return (ceil if round_up else floor)(span) + 1


def convolve(g, x, w, *, strides, dilations, padding, groups=1, holes=None):
    """A convolution of x [N, C, ...] with w [O, C / groups, ...]; holes: dilation of x."""
    ndim = len(g.shape(x))
    holes = holes or (1,) * (ndim - 2)
    spread_out = [(n - 1) * h + 1 for n, h in zip(g.shape(x)[2:], holes, strict=True)]
    kernel = g.shape(w)[2:]
    space = map(_places, spread_out, kernel, strides, dilations, padding)
    order = tuple(range(ndim))
    return g.emit(
        "conv_general_dilated", [x, w], (g.shape(x)[0], g.shape(w)[0], *space),
        lhs_spec=order, rhs_spec=order, out_spec=order, window_strides=tuple(strides), padding=tuple(padding),
        lhs_dilation=tuple(holes), rhs_dilation=tuple(dilations), feature_group_count=groups,
        batch_group_count=1,
    )  # fmt: skip


def _with_bias(g, y, args):
    if len(args) < 3 or args[2] is None:
        return y
    return elementwise(g, "add", y, reshape(g, args[2], (1, -1, *[1] * (len(g.shape(y)) - 2))))


def _conv(g, args, attrs):
    x, w = args[:2]
    strides, dilations, padding = _windows(g, attrs, x, g.shape(w)[2:])
    options = {"strides": strides, "dilations": dilations, "padding": padding}
    return _with_bias(g, convolve(g, x, w, groups=attrs.get("group", 1), **options), args)


def _conv_transpose(g, args, attrs):
    """Zeros between the inputs, and the kernel turned around."""
    x, w = args[:2]
    if attrs.get("group", 1) != 1:
        raise g.refuse("a transposed convolution in groups")
    if "output_shape" in attrs or attrs.get("auto_pad", "NOTSET") != "NOTSET":
        raise g.refuse("a transposed convolution whose padding follows from its output")
    kernel = g.shape(w)[2:]
    strides, dilations, padding = _windows(g, attrs, x, kernel)
    more = attrs.get("output_padding", [0] * len(kernel))
    outer = [
        (d * (k - 1) - lo, d * (k - 1) - hi + extra)
        for k, d, (lo, hi), extra in zip(kernel, dilations, padding, more, strict=True)
    ]
    axes = tuple(range(2, len(kernel) + 2))
    turned = g.emit("rev", [w], g.shape(w), dimensions=axes)
    turned = transpose(g, turned, (1, 0, *axes))
    ones = (1,) * len(kernel)
    y = convolve(g, x, turned, strides=ones, dilations=dilations, padding=outer, holes=strides)
    return _with_bias(g, y, args)


def _pool(prim):
    def node(g, args, attrs):
        x, kernel = args[0], attrs["kernel_shape"]
        strides, dilations, padding = _windows(g, attrs, x, kernel)
        up = bool(attrs.get("ceil_mode", 0))
        if up or (
            prim == "reduce_window_sum" and any(map(sum, padding)) and not attrs.get("count_include_pad", 0)
        ):
            raise g.refuse("windows that hang over the edge")
        space = map(_places, g.shape(x)[2:], kernel, strides, dilations, padding)
        whole = lambda inner, one: (one, one, *inner)
        y = g.emit(
            prim, [x], (*g.shape(x)[:2], *space), window_dimensions=whole(kernel, 1),
            window_strides=whole(strides, 1), padding=whole(padding, (0, 0)),
            base_dilation=(1,) * len(g.shape(x)), window_dilation=whole(dilations, 1),
        )  # fmt: skip
        return y if prim == "reduce_window_max" else elementwise(g, "div", y, number(g, prod(kernel), y))

    return node


def _global_pool(g, args, attrs):
    return mean(g, args[0], tuple(range(2, len(g.shape(args[0])))))


# Movement


def reshape(g, i, shape):
    """The tensor with another shape, one length of which may be -1."""
    size = prod(g.shape(i))
    rest = prod(n for n in shape if n != -1)
    shape = tuple(size // rest if n == -1 else int(n) for n in shape)
    return i if g.shape(i) == shape else g.emit("reshape", [i], shape, new_sizes=shape, dimensions=None)


def transpose(g, i, order):
    """The tensor with its axes in another order."""
    shape = tuple(g.shape(i)[d] for d in order)
    return g.emit("transpose", [i], shape, permutation=tuple(order))


def _transpose(g, args, attrs):
    return transpose(g, args[0], attrs.get("perm", range(len(g.shape(args[0])))[::-1]))


def _reshape(g, args, attrs):
    own, wanted = g.shape(args[0]), g.value(args[1], "the new shape").tolist()
    if not attrs.get("allowzero", 0):
        wanted = [own[d] if n == 0 else n for d, n in enumerate(wanted)]
    return reshape(g, args[0], wanted)


def _flatten(g, args, attrs):
    shape = g.shape(args[0])
    axis = _axis(attrs.get("axis", 1), len(shape))
    return reshape(g, args[0], (prod(shape[:axis]), prod(shape[axis:])))


def _axes(g, args, attrs):
    if "axes" in attrs:
        return list(attrs["axes"])
    return g.value(args[1], "its axes").tolist() if len(args) > 1 and args[1] is not None else None


def _squeeze(g, args, attrs):
    shape, axes = g.shape(args[0]), _axes(g, args, attrs)
    gone = (
        {d for d, n in enumerate(shape) if n == 1} if axes is None else {_axis(a, len(shape)) for a in axes}
    )
    return reshape(g, args[0], [n for d, n in enumerate(shape) if d not in gone])


def _unsqueeze(g, args, attrs):
    axes = _axes(g, args, attrs)
    ndim = len(g.shape(args[0])) + len(axes)
    new, old = {_axis(a, ndim) for a in axes}, iter(g.shape(args[0]))
    return reshape(g, args[0], [1 if d in new else next(old) for d in range(ndim)])


def _concat(g, args, attrs):
    axis = _axis(attrs["axis"], len(g.shape(args[0])))
    shape = list(g.shape(args[0]))
    shape[axis] = sum(g.shape(a)[axis] for a in args)
    return g.emit("concatenate", args, shape, dimension=axis)


def cut(g, i, start, stop, stride):
    """A slice with positive strides, one (start, stop, stride) an axis."""
    shape = [max(-(-(b - a) // s), 0) for a, b, s in zip(start, stop, stride, strict=True)]
    if tuple(shape) == g.shape(i):
        return i
    return g.emit(
        "slice", [i], shape, start_indices=tuple(start), limit_indices=tuple(stop), strides=tuple(stride)
    )


def _slice(g, args, attrs):
    x = args[0]
    shape = g.shape(x)
    given = [g.value(a, "a slice").tolist() if a is not None else None for a in args[1:]] + [None] * 2
    starts, stops, axes, steps = given[:4]
    axes = range(len(starts)) if axes is None else [_axis(a, len(shape)) for a in axes]
    start, stop, stride, turned = [0] * len(shape), list(shape), [1] * len(shape), []
    for a, lo, hi, s in zip(axes, starts, stops, steps or [1] * len(starts), strict=True):
        taken = range(shape[a])[
            slice(lo, hi if abs(hi) < 1 << 31 else (None if (hi > 0) == (s > 0) else hi), s)
        ]
        if len(taken) == 0:
            start[a], stop[a] = 0, 0
        elif s > 0:
            start[a], stop[a], stride[a] = taken[0], taken[-1] + 1, s
        else:
            start[a], stop[a], stride[a] = taken[-1], taken[0] + 1, -s
            turned.append(a)
    y = cut(g, x, start, stop, stride)
    return g.emit("rev", [y], g.shape(y), dimensions=tuple(turned)) if turned else y


def _split(g, args, attrs):
    x = args[0]
    shape = g.shape(x)
    axis = _axis(attrs.get("axis", 0), len(shape))
    if "split" in attrs:
        sizes = list(attrs["split"])
    elif len(args) > 1 and args[1] is not None:
        sizes = g.value(args[1], "the parts").tolist()
    elif parts := attrs.get("num_outputs"):
        each = -(-shape[axis] // parts)
        sizes = [min(each, shape[axis] - each * p) for p in range(parts)]
    else:
        raise g.refuse("a split without the number of its parts")
    found, at = [], 0
    for n in sizes:
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = at, at + n
        found.append(cut(g, x, start, stop, [1] * len(shape)))
        at += n
    return found


def _pad(g, args, attrs):
    x = args[0]
    if attrs.get("mode", "constant") != "constant":
        raise g.refuse(f"padding by {attrs['mode']}")
    ndim = len(g.shape(x))
    pads = attrs.get("pads") or g.value(args[1], "the padding").tolist()
    axes = (
        [_axis(a, ndim) for a in g.value(args[3], "its axes")]
        if len(args) > 3 and args[3] is not None
        else range(ndim)
    )
    config = [(0, 0, 0)] * ndim
    for n, a in enumerate(axes):
        config[a] = (int(pads[n]), int(pads[n + len(pads) // 2]), 0)
    value = args[2] if len(args) > 2 and args[2] is not None else number(g, attrs.get("value", 0), x)
    shape = [n + lo + hi for n, (lo, hi, _) in zip(g.shape(x), config, strict=True)]
    return g.emit("pad", [x, reshape(g, value, ())], shape, padding_config=tuple(config))


def _expand(g, args, attrs):
    wanted = tuple(g.value(args[1], "the new shape").tolist())
    return spread(g, args[0], np.broadcast_shapes(g.shape(args[0]), wanted))


def _tile(g, args, attrs):
    reps = tuple(g.value(args[1], "the repeats").tolist())
    return g.emit("tile", [args[0]], [n * r for n, r in zip(g.shape(args[0]), reps, strict=True)], reps=reps)


def _gather(g, args, attrs):
    """Rows by index, counted from the end where negative."""
    x, at = args
    shape, axis = g.shape(x), _axis(attrs.get("axis", 0), len(g.shape(x)))
    length = number(g, shape[axis], at)
    low = elementwise(g, "lt", at, number(g, 0, at), dtype="bool")
    at = g.emit("select_n", [low, at, elementwise(g, "add", at, length)], g.shape(at), g.dtype(at))
    where, inner = g.shape(at), len(g.shape(at))
    out = (*shape[:axis], *where, *shape[axis + 1 :])
    offsets = tuple(d for d in range(len(out)) if not axis <= d < axis + inner)
    return g.emit(
        "gather", [x, reshape(g, at, (*where, 1))], out, g.dtype(x), offset_dims=offsets,
        collapsed_slice_dims=(axis,), start_index_map=(axis,), operand_batching_dims=(),
        start_indices_batching_dims=(), slice_sizes=tuple(1 if d == axis else n for d, n in enumerate(shape)),
        mode="CLIP", fill_value=None,
    )  # fmt: skip


def _gather_nd(g, args, attrs):
    x, at = args
    if attrs.get("batch_dims", 0):
        raise g.refuse("GatherND with batch axes")
    shape, where, deep = g.shape(x), g.shape(at)[:-1], g.shape(at)[-1]
    out = (*where, *shape[deep:])
    mapped = tuple(range(deep))
    return g.emit(
        "gather", [x, at], out, g.dtype(x), offset_dims=tuple(range(len(where), len(out))),
        collapsed_slice_dims=mapped, start_index_map=mapped, operand_batching_dims=(),
        start_indices_batching_dims=(), slice_sizes=(*(1 for _ in mapped), *shape[deep:]), mode="CLIP",
        fill_value=None,
    )  # fmt: skip


# Resizing, as a product with a matrix of weights along each axis that changes


def _resize(g, args, attrs):
    x = args[0]
    shape = g.shape(x)
    if len(args) > 3 and args[3] is not None:
        sizes = g.value(args[3], "the new size").tolist()
        scales = [b / a for a, b in zip(shape, sizes, strict=True)]
    else:
        scales = g.value(args[2], "the scales").tolist()
        sizes = [floor(n * s) for n, s in zip(shape, scales, strict=True)]
    for axis, (n, m) in enumerate(zip(shape, sizes, strict=True)):
        if n == m:
            continue
        matrix = g.constant(interpolation(n, m, scales[axis], attrs, g).astype(g.dtype(x)))
        order = [*range(axis), len(shape) - 1, *range(axis, len(shape) - 1)]
        kept = [k for d, k in enumerate(g.shape(x)) if d != axis]
        dims = (((axis,), (1,)), ((), ()))
        y = g.emit(
            "dot_general", [x, matrix], (*kept, m), dimension_numbers=dims, preferred_element_type=g.dtype(x)
        )
        x = transpose(g, y, order)
    return x


def interpolation(n, m, scale, attrs, g):
    """The matrix [m, n] of one axis: nearest, linear or cubic, samples beyond the edge are the edge's."""
    rule, mode = attrs.get("coordinate_transformation_mode", "half_pixel"), attrs.get("mode", "nearest")
    i = np.arange(m)
    if rule == "half_pixel" or (rule == "pytorch_half_pixel" and m > 1):
        at = (i + 0.5) / scale - 0.5
    elif rule == "align_corners":
        at = i * (n - 1) / (m - 1) if m > 1 else np.zeros(1)
    elif rule == "asymmetric":
        at = i / scale
    elif rule == "pytorch_half_pixel":
        at = np.zeros(1)
    else:
        raise g.refuse(f"coordinates by {rule}")
    if attrs.get("antialias", 0) or attrs.get("exclude_outside", 0):
        raise g.refuse("antialiasing, or weights that leave out what is outside")
    if mode == "nearest":
        how = attrs.get("nearest_mode", "round_prefer_floor")
        rounded = {
            "floor": np.floor,
            "ceil": np.ceil,
            "round_prefer_floor": lambda x: np.ceil(x - 0.5),
            "round_prefer_ceil": lambda x: np.floor(x + 0.5),
        }[how](at)
        taps = [(rounded, np.ones(m))]
    elif mode == "linear":
        low = np.floor(at)
        taps = [(low, 1 - (at - low)), (low + 1, at - low)]
    elif mode == "cubic":
        low, a = np.floor(at), attrs.get("cubic_coeff_a", -0.75)
        near = lambda d: (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = lambda d: a * (d**3 - 5 * d**2 + 8 * d - 4)
        f = at - low
        taps = [(low - 1, far(1 + f)), (low, near(f)), (low + 1, near(1 - f)), (low + 2, far(2 - f))]
    else:
        raise g.refuse(f"resizing by {mode}")
    matrix = np.zeros((m, n))
    for place, weight in taps:
        np.add.at(matrix, (i, np.clip(place, 0, n - 1).astype(int)), weight)
    return matrix


# Constants and shapes


def _constant(g, args, attrs):
    from onnx.numpy_helper import to_array

    if "value" in attrs:
        return g.constant(to_array(attrs["value"]))
    (name, value), *_ = attrs.items()
    return g.constant(np.array(value, {"float": np.float32, "int": np.int64}[name.split("_")[1].rstrip("s")]))


def _constant_of_shape(g, args, attrs):
    from onnx.numpy_helper import to_array

    shape = tuple(g.value(args[0], "the shape").tolist())
    value = to_array(attrs["value"])[0] if "value" in attrs else np.float32(0)
    return spread(g, g.constant(np.array(value)), shape)


def _shape(g, args, attrs):
    shape = g.shape(args[0])
    return g.constant(np.array(shape[slice(attrs.get("start", 0), attrs.get("end"))], np.int64))


def _range(g, args, attrs):
    start, stop, step = (g.value(a, "a range").item() for a in args)
    return g.constant(np.arange(start, stop, step, dtype=g.dtype(args[0])))


def _same(g, args, attrs):
    return args[0]


# Numbers on a grid


def _along(g, i, x, attrs):
    """A scale or zero point, along its axis of x."""
    if prod(g.shape(i)) == 1:
        return reshape(g, i, ())
    ndim = len(g.shape(x))
    axis = _axis(attrs.get("axis", 1), ndim)
    return reshape(g, i, [-1 if d == axis else 1 for d in range(ndim)])


def _dequantize(g, args, attrs):
    x, scale = args[:2]
    wide = cast(g, x, "int32")
    if len(args) > 2 and args[2] is not None:
        wide = elementwise(g, "sub", wide, cast(g, _along(g, args[2], x, attrs), "int32"))
    return elementwise(g, "mul", cast(g, wide, g.dtype(scale)), _along(g, scale, x, attrs))


def _quantize(g, args, attrs):
    x, scale = args[:2]
    zero = args[2] if len(args) > 2 else None
    dtype = "uint8" if zero is None else g.dtype(zero)
    y = elementwise(g, "div", x, _along(g, scale, x, attrs))
    y = g.emit("round", [y], g.shape(y), rounding_method=1)
    if zero is not None:
        y = elementwise(g, "add", y, cast(g, _along(g, zero, x, attrs), g.dtype(x)))
    limits = np.iinfo(dtype)
    y = elementwise(g, "min", elementwise(g, "max", y, number(g, limits.min, x)), number(g, limits.max, x))
    return cast(g, y, dtype)


def _dynamic_quantize(g, args, attrs):
    """uint8 by the range of the tensor, which always holds 0."""
    (x,) = args
    axes = tuple(range(len(g.shape(x))))
    zero = number(g, 0, x)
    low = elementwise(g, "min", reduce(g, "reduce_min", x, axes, keep=False), zero)
    high = elementwise(g, "max", reduce(g, "reduce_max", x, axes, keep=False), zero)
    scale = elementwise(g, "div", elementwise(g, "sub", high, low), number(g, 255, x))
    at = elementwise(g, "div", elementwise(g, "sub", zero, low), scale)
    at = cast(g, g.emit("round", [at], (), rounding_method=1), "uint8")
    return [_quantize(g, [x, scale, at], {}), scale, at]


_SAME_DTYPE = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Neg": "neg", "Abs": "abs", "Exp": "exp",
    "Log": "log", "Sqrt": "sqrt", "Erf": "erf", "Tanh": "tanh", "Sigmoid": "logistic", "Sign": "sign",
    "Floor": "floor", "Ceil": "ceil", "Sin": "sin", "Cos": "cos", "Not": "not", "And": "and", "Or": "or",
    "Xor": "xor", "BitwiseAnd": "and", "BitwiseOr": "or", "BitwiseNot": "not",
}  # fmt: skip
_COMPARING = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge"}
NODES = {
    **{name: _plain(prim) for name, prim in _SAME_DTYPE.items()},
    **{name: _plain(prim, "bool") for name, prim in _COMPARING.items()},
    "Max": _folded("max"),
    "Min": _folded("min"),
    "Sum": _folded("add"),
    "Pow": _pow,
    "Reciprocal": lambda g, args, attrs: elementwise(g, "div", number(g, 1, args[0]), args[0]),
    "Round": lambda g, args, attrs: g.emit("round", args, g.shape(args[0]), rounding_method=1),
    "Cast": _cast,
    "Clip": _clip,
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Softplus": _softplus,
    "Gelu": _gelu,
    "Where": _where,
    "IsNaN": _is_nan,
    "ReduceSum": _reduction(lambda g, x, axes, keep: reduce(g, "reduce_sum", x, axes, keep)),
    "ReduceMax": _reduction(lambda g, x, axes, keep: reduce(g, "reduce_max", x, axes, keep)),
    "ReduceMin": _reduction(lambda g, x, axes, keep: reduce(g, "reduce_min", x, axes, keep)),
    "ReduceMean": _reduction(mean),
    "ArgMax": _arg("argmax"),
    "ArgMin": _arg("argmin"),
    "Softmax": _softmax,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "MatMul": lambda g, args, attrs: matmul(g, *args),
    "Gemm": _gemm,
    "MatMulInteger": _matmul_integer,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool("reduce_window_max"),
    "AveragePool": _pool("reduce_window_sum"),
    "GlobalAveragePool": _global_pool,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Resize": _resize,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Range": _range,
    "Identity": _same,
    "Dropout": _same,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
}
