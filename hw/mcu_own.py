"""What a unit costs by the project's own kernels: the calls that `hw.mcu_emit` writes, with their sizes."""

from math import prod

from hw.mcu_flow import piece_shapes
from hw.mcu_layout import (
    NoLayout,
    broadcast_layout,
    conv_layout,
    product_layout,
    window_layout,
)
from hw.program import is_float

_BINARY = {"add": "add_s8", "add_any": "add_s8", "sub": "add_s8", "mul": "mul_s8", "div": "divide_s8",
           "max": "extreme_s8", "min": "extreme_s8"}  # fmt: skip


def own_calls(unit, units, rows):
    """[(times, kernel, dims)] of one execution in `rows` pieces, or None where the library's way of counting
    holds as well: a table, a softmax, a norm, what has no C of its own.
    """
    op, t = unit.op, units.tensors
    if unit.kind in ("free", "view", "lut", "softmax", "layer_norm") or not op.outputs:
        return None
    out = unit.out if unit.out >= 0 else op.outputs[0]
    if not is_float(t[out].dtype):
        return None
    shapes = piece_shapes(units, unit, rows)
    times = lambda calls: [(rows * n, kernel, dims) for n, kernel, dims in calls]
    try:
        return times(_calls(unit, units, op, out, shapes)) or None
    except NoLayout:
        return None


def _calls(unit, units, op, out, shapes):
    t = units.tensors
    static = [i in units.static for i in op.inputs]
    size, prim = prod(shapes[out]), op.prim
    if unit.kind == "product":
        lay = product_layout(op, *(shapes[i] for i in op.inputs[:2]), *static[:2], unit.perm)
        return [(lay.times, f"{lay.kernel}_s8", {"m": lay.m, "k": lay.k, "n": lay.n})]
    if op.kind == "conv":
        lay = conv_layout(op, *(shapes[i] for i in op.inputs[:2]), shapes[out])
        return [(lay.batch[0], f"{lay.kernel}_s8", lay.dims)]
    if prim in _BINARY or prim == "select_n":
        own = [(1,) if t[i].size == 1 else shapes[out] if i in units.static else shapes[i] for i in op.inputs]
        loops, n, _ = broadcast_layout(own, shapes[out])
        return [(prod(s for s, *_ in loops), _BINARY.get(prim, "select_s8"), {"n": n})]
    if prim in ("reduce_sum", "reduce_max", "reduce_min"):
        return _reduce(op, shapes[op.inputs[0]])
    if prim.startswith("reduce_window"):
        lay = window_layout(op, shapes[op.inputs[0]], shapes[out])
        kind = op.attrs.get("combine") or prim.removeprefix("reduce_window_")
        name = "window_sum_s8" if kind in ("add", "sum") else "window_max_s8"
        return [(lay.outer, name, lay.dims)]
    if prim == "concatenate":
        axis = op.attrs["dimension"]
        outer = prod(shapes[out][:axis])
        same = lambda i: i in units.static or units.root(i) == units.root(out)
        sizes = [(prod(t[i].shape[axis:]), "copy_s8" if same(i) else "rescale_s8") for i in op.inputs]
        return [(outer, kernel, {"n": n}) for n, kernel in sizes]
    if prim == "pad":
        shape = shapes[op.inputs[0]]
        last = shape[-1] if shape else 1
        rows = prod(shape) // last if last else 0
        return [(1, "fill_s8", {"n": size}), (1, "place_s8", {"rows": rows, "cols": last})]
    return []


def _reduce(op, shape):
    axes = sorted(op.attrs["axes"])
    real = [d for d in axes if shape[d] > 1] or axes[:1]
    length = prod(shape[d] for d in axes)
    first, rest = prod(shape[: real[0]]), prod(shape[real[-1] + 1 :])
    add = op.prim == "reduce_sum"
    if rest == 1:
        return [(1, "reduce_sum_s8" if add else "reduce_max_s8", {"rows": first, "cols": length})]
    if add:
        return [(first, "sum_down_s8", {"rows": rest, "cols": length})]
    return [(first, "window_max_s8", {"n": rest, "rows": rest * length, "taps": rest * length})]
