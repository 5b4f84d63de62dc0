"""How operands of products, convolutions and windows lie in the arena: what calls of C need and prices count.

A layout is read off an op and the shapes of its operands, which of a step that runs by rows are those of one
piece. `hw.mcu_emit_units` writes calls from it, `hw.mcu_price` counts the same calls.
"""

from dataclasses import dataclass
from math import prod


class NoLayout(ValueError):
    """An op that no kernel takes as its operands lie; the text says why."""


def strides(shape):
    """Elements from one entry to the next along every axis, last axis fastest."""
    return [prod(shape[d + 1 :]) for d in range(len(shape))]


def merged(axes):
    """[(size, step)] with neighbours that are one axis in memory as one; axes of size 1 left out."""
    out = []
    for size, *steps in axes:
        if size == 1:
            continue
        if out and all(before == step * size for before, step in zip(out[-1][1:], steps, strict=True)):
            out[-1] = (out[-1][0] * size, *steps)
        else:
            out.append((size, *steps))
    return out


@dataclass(frozen=True)
class ProductLayout:
    """kernel: its name without the type. m, k, n: of one call; loops: [(size, steps of x, of w, of y)] around
    it; step: of x along m and k, of w along n and k, of y along m and n.

    turned: the static operand stands on the left, so the right one plays x. weights: axes of the static
    operand in the order loops, n, k.
    """

    kernel: str
    m: int
    k: int
    n: int
    loops: tuple
    step: tuple
    turned: bool
    weights: tuple

    @property
    def times(self) -> int:
        """Calls."""
        return prod(size for size, *_ in self.loops)


def product_layout(op, a_shape, b_shape, left_static, right_static, perm=()) -> ProductLayout:
    """The layout of a `dot_general` whose operands have these shapes, its result's axes written in the order
    `perm`. Raises: NoLayout.
    """
    (lc, rc), (lb, rb) = op.attrs["dimension_numbers"]
    a_free = [d for d in range(len(a_shape)) if d not in (*lb, *lc)]
    b_free = [d for d in range(len(b_shape)) if d not in (*rb, *rc)]
    shape = [a_shape[d] for d in (*lb, *a_free)] + [b_shape[d] for d in b_free]
    y = strides(shape)
    if perm:
        turned = strides([shape[d] for d in perm])
        y = [turned[perm.index(d)] for d in range(len(shape))]
    y_batch, y_a, y_b = y[: len(lb)], y[len(lb) : len(lb) + len(a_free)], y[len(lb) + len(a_free) :]
    turned = left_static and not right_static
    x_shape, x_batch, x_free, x_sum, y_x = a_shape, lb, a_free, lc, y_a
    w_shape, w_batch, w_free, w_sum, y_w = b_shape, rb, b_free, rc, y_b
    if turned:
        x_shape, x_batch, x_free, x_sum, y_x = b_shape, rb, b_free, rc, y_b
        w_shape, w_batch, w_free, w_sum, y_w = a_shape, lb, a_free, lc, y_a
    held = left_static or right_static
    xs, sizes = strides(x_shape), lambda shape, axes: [shape[d] for d in axes]
    if held:  # weights are stored as the kernel wants them: loops, then n, then k
        order = (*w_batch, *w_free, *w_sum)
        ws = dict(zip(order, strides(sizes(w_shape, order)), strict=True))
    else:
        ws = dict(enumerate(strides(w_shape)))
    inner = merged((x_shape[d], xs[d], ws[e]) for d, e in zip(x_sum, w_sum, strict=True))
    if len(inner) > 1:
        raise NoLayout("emit_c sums along axes that lie next to each other in both operands")
    k, x_k, w_k = inner[0] if inner else (1, 1, 1)
    rows = merged((x_shape[d], xs[d], s) for d, s in zip(x_free, y_x, strict=True))
    cols = merged((w_shape[d], ws[d], s) for d, s in zip(w_free, y_w, strict=True))
    loops = [
        (x_shape[d], xs[d], ws[e], s)
        for d, e, s in zip(x_batch, w_batch, y_batch, strict=True)
        if x_shape[d] > 1
    ]
    m, x_m, y_m = rows.pop() if rows else (1, k, prod(sizes(w_shape, w_free)))
    n, w_n, y_n = cols.pop() if cols else (1, k, 1)
    loops += [(size, step, 0, out) for size, step, out in rows]
    loops += [(size, 0, step, out) for size, step, out in cols]
    loops = [(a[0], *a[1:]) for a in merged(loops)]
    plain = x_k == 1 and (m == 1 or x_m == k) and (n == 1 or y_n == 1) and (m == 1 or y_m == n)
    if held:
        kernel = "matmul" if plain else "matmul_any"
        step = (x_m, x_k, y_m, y_n)
    else:
        kernel = "product" if plain and w_k == 1 and (n == 1 or w_n == k) else "product_any"
        step = (x_m, x_k, w_n, w_k, y_m, y_n)
    return ProductLayout(kernel, m, k, n, tuple(loops), step, turned, (*w_batch, *w_free, *w_sum))


@dataclass(frozen=True)
class ConvLayout:
    """kernel: "conv" or "group_conv"; d: the numbers that its C takes; batch: maps, with the steps of x and y
    from one to the next; places, channels, rows, taps, inner: the sizes of `kernel_counts` for one map.
    """

    kernel: str
    d: tuple
    batch: tuple
    places: int
    channels: int
    rows: int
    taps: int
    inner: int

    @property
    def dims(self) -> dict:
        """Sizes of one call for `instructions`."""
        return {"m": self.places, "n": self.channels, "rows": self.rows, "taps": self.taps, "k": self.inner}


def conv_layout(op, x_shape, w_shape, y_shape) -> ConvLayout:
    """The layout of a convolution over one or two axes. Raises: NoLayout."""
    a = op.attrs
    lhs, rhs, out = a["lhs_spec"], a["rhs_spec"], a["out_spec"]
    if len(lhs) > 4:
        raise NoLayout("emit_c convolves over one or two axes")
    if a["batch_group_count"] != 1 or any(v != 1 for v in a["lhs_dilation"]):
        raise NoLayout("emit_c has no transposed or batch-grouped convolution")
    pad = lambda v, one: (one,) * (2 - len(v)) + tuple(v)
    xs, ys = strides(x_shape), strides(y_shape)
    H, W = pad([x_shape[d] for d in lhs[2:]], 1)
    Ho, Wo = pad([y_shape[d] for d in out[2:]], 1)
    kh, kw = pad([w_shape[d] for d in rhs[2:]], 1)
    sy, sx = pad(a["window_strides"], 1)
    top, left = pad([lo for lo, _ in a["padding"]], 0)
    dy, dx = pad(a["rhs_dilation"], 1)
    C, N, G = w_shape[rhs[1]], y_shape[out[1]], a["feature_group_count"]
    x_row, x_col = pad([xs[d] for d in lhs[2:]], 0)
    y_row, y_col = pad([ys[d] for d in out[2:]], 0)
    batch = (x_shape[lhs[0]], xs[lhs[0]], ys[out[0]])
    plain = (x_col, xs[lhs[1]], y_col, ys[out[1]]) == (C, 1, N, 1) and (H == 1 or x_row == W * C)
    plain = plain and (Ho == 1 or y_row == Wo * N) and G == dy == dx == 1
    d = (H, W, C, Ho, Wo, N, kh, kw, sy, sx, top, left)
    if not plain:
        d += (dy, dx, N // G, x_row, x_col, xs[lhs[1]], y_row, y_col, ys[out[1]])
    rows, cols = _meet(Ho, sy, top, dy, kh, H), _meet(Wo, sx, left, dx, kw, W)
    return ConvLayout("conv" if plain else "group_conv", d, batch, Ho * Wo, N, rows * Wo, rows * cols, C)


def _meet(places, stride, before, dilation, taps, size):
    """Taps that fall on the map, over all places of one axis."""
    return sum(0 <= i * stride - before + t * dilation < size for i in range(places) for t in range(taps))


@dataclass(frozen=True)
class WindowLayout:
    """d: the numbers that the C of a window takes; outer: maps; n, rows, taps: of one map."""

    d: tuple
    outer: int
    n: int
    rows: int
    taps: int

    @property
    def dims(self) -> dict:
        """Sizes of one call for `instructions`."""
        return {"n": self.n, "rows": self.rows, "taps": self.taps}


def window_layout(op, x_shape, y_shape) -> WindowLayout:
    """A window over one or two axes. Raises: NoLayout."""
    a, rank = op.attrs, len(x_shape)
    window, stride, padding = a["window_dimensions"], a["window_strides"], a["padding"]
    dilation = a.get("window_dilation") or (1,) * rank
    if any(v != 1 for v in a.get("base_dilation") or ()):
        raise NoLayout("emit_c has no windows over dilated maps")
    used = [d for d in range(rank) if window[d] > 1 or stride[d] > 1 or any(padding[d])]
    if len(used) > 2:
        raise NoLayout("emit_c has windows over one or two axes")
    if not used:
        used = [rank - 1]
    first, last = used[0], used[-1]
    if last - first > 1 and prod(x_shape[first + 1 : last]) > 1:
        raise NoLayout("emit_c has windows over neighbouring axes")
    if first == last:  # one axis
        A, B = (1, x_shape[last])
        Ao, Bo, ka, kb, sa, sb, pa, pb, da, db = (1, y_shape[last], 1, window[last], 1, stride[last], 0,
                                                  padding[last][0], 1, dilation[last])  # fmt: skip
    else:
        A, B, Ao, Bo = x_shape[first], x_shape[last], y_shape[first], y_shape[last]
        (ka, kb), (sa, sb) = ((v[first], v[last]) for v in (window, stride))
        (pa, pb), (da, db) = (padding[first][0], padding[last][0]), (dilation[first], dilation[last])
    C, outer = prod(x_shape[last + 1 :]), prod(x_shape[:first])
    rows, cols = _meet(Ao, sa, pa, da, ka, A), _meet(Bo, sb, pb, db, kb, B)
    d = (A, B, C, Ao, Bo, ka, kb, sa, sb, pa, pb, da, db)
    return WindowLayout(d, outer, Ao * Bo * C, rows * Bo * C, rows * cols * C)


def broadcast_layout(shapes, out):
    """(loops [(size, step of each operand and of the result)], n of one call, step of each inside) of an
    elementwise op whose operands broadcast to `out`.
    """
    axes = []
    for d, size in enumerate(out):
        own = []
        for shape in shapes:
            at = d - (len(out) - len(shape))
            own.append(strides(shape)[at] if at >= 0 and shape[at] == size and size > 1 else 0)
        axes.append((size, *own, strides(out)[d]))
    axes = merged(axes)
    size, *steps = axes.pop() if axes else (1, *([1] * len(shapes)), 1)
    return tuple(axes), size, tuple(steps[:-1])
