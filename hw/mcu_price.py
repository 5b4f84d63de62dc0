"""What a unit of a program costs on a microcontroller: kernel calls, instructions, bytes from flash."""

from dataclasses import dataclass, field
from math import prod

from hw.count import op_counts
from hw.kernel_counts import PER_MAC, instructions
from hw.mcu_own import own_calls
from hw.mcu_parts import BORROWED, FPU, SCALAR
from hw.primitives import RANDOM, SCATTER
from hw.program import is_float

_MOVES = frozenset("transpose rev slice dynamic_slice gather broadcast_in_dim tile split unstack".split())
_CONTIGUOUS = frozenset("copy concatenate stack pad convert_element_type dynamic_update_slice".split())
_COMPARES = frozenset("eq ne lt le gt ge eq_to le_to lt_to".split())


@dataclass
class Work:
    """calls: (times, kernel, dims). extra: instructions beside them. flash: bytes read of weights and tables.
    soft: results computed in float. macs, flops: as `count` has them.
    """

    calls: list = field(default_factory=list)
    extra: float = 0.0
    flash: float = 0.0
    soft: int = 0
    macs: int = 0
    flops: int = 0
    note: str = ""

    def cycles(self, core, profile, cpi, near=1.0) -> float:
        """Cycles of all calls; near: share of a softmax's entries that it works on."""
        own, total = BORROWED.get(core, core), self.extra * cpi
        for times, kernel, dims in self.calls:
            n = instructions(kernel, dims, own, profile=profile)
            if kernel == "softmax_s8" and near < 1:
                rows, cols = dims["rows"], dims["cols"]
                far = [[0] + [-1] * (cols - 1)] if cols else [[]]
                one = {"x": far, "diff_min": 0}
                least = instructions(kernel, {"rows": 1, "cols": cols}, own, profile=profile, inputs=one)
                n = n - (1 - near) * max(n - rows * least, 0)
            known = profile in PER_MAC and "k" in dims  # published as cycles
            total += times * n * (1.0 if known else cpi)
        return total


def work(unit, units, core, weight_bits=8, rows=1, aside=False, streamed=0, own=False, straight=True) -> Work:
    """What one execution of a unit does. rows: pieces that it is run in, one row (or some) each; aside: a row
    is written beside its place and copied; streamed: bytes that come from the camera piece by piece; own: by
    the project's own kernels, where `hw.mcu_emit` has calls for it; straight: a table of 16 bits whose lines
    are close enough.
    """
    if unit.kind == "lut" and not straight:
        return _float(unit, units, core)
    w = _whole(unit, units, core, weight_bits, rows)
    calls = own_calls(unit, units, rows) if own else None
    if calls is not None:
        w.calls, w.extra, w.note = calls, 0.0, ""
    elif rows > 1:
        w.calls = [c if "k" in c[2] else _cut(*c, rows) for c in w.calls]
    if rows > 1:
        if aside:
            w.calls.append((rows, "copy_s8", {"n": units.tensors[unit.out].size // rows}))
        if streamed:
            w.calls.append((rows, "copy_s8", {"n": streamed // rows // units.act_bytes}))
    if units.act_bytes == 2:
        w.calls = [_wide(*c) for c in w.calls]
    return w


def _wide(times, kernel, dims):
    """A call for 16 bits: copies are of bytes, a fully connected layer is a product."""
    if kernel == "copy_s8":
        return times, kernel, {"n": 2 * dims["n"]}
    name = {"fully_connected_s8": "matmul_s8"}.get(kernel, kernel)
    return times, name.replace("_s8", "_s16"), dims


def _float(unit, units, core):
    """A chain computed in float, op by op."""
    t, w = units.tensors, Work(soft=units.tensors[unit.out].size)
    for op in unit.chain:
        c = op_counts(units.program, op)
        kind = "function" if c.transcendentals or op.prim in ("rem", "pow", "atan2") else "op"
        w.extra += t[unit.out].size * SCALAR.numbers[f"{'' if core in FPU else 'soft_'}float_{kind}"]
        w.flops += c.flops
    w.extra += t[unit.out].size * SCALAR.numbers["to_float_and_back"]
    return w


def _cut(times, kernel, dims, rows):
    """A call in so many pieces."""
    first = "n" if "n" in dims else "rows"
    if dims[first] % rows:
        return times, kernel, dims
    return times * rows, kernel, dims | {first: dims[first] // rows}


def _whole(unit, units, core, weight_bits, rows):
    program, op = units.program, unit.op
    t, c = program.tensors, op_counts(program, op)
    out = t[unit.out] if unit.out >= 0 else (t[op.outputs[0]] if op.outputs else None)
    w = Work(macs=c.macs, flops=c.flops)
    if unit.kind in ("free", "view") or out is None:
        static = all(i in units.static for i in op.outputs)
        held = op.kind in ("matmul", "conv")  # a bias behind it runs the product
        return Work(flops=0 if static or held else c.flops)
    n, last = out.size, out.shape[-1] if out.shape else 1
    add = lambda kernel, times=1, **dims: w.calls.append((times, kernel, dims))
    if unit.kind == "lut":
        w.flash = 256 if is_float(out.dtype) else 256 * max(out.nbytes // max(n, 1), 1)
        w.flash = 1026 if units.act_bytes == 2 else w.flash
        add("lut_s8", n=n)
    elif unit.kind == "softmax":
        add("softmax_s8", rows=n // last if last else 0, cols=last)
    elif unit.kind == "layer_norm":
        w.flash = 6 * last
        add("layernorm_s8", rows=n // last if last else 0, cols=last)
    elif not any(is_float(t[i].dtype) for i in (*op.inputs, *op.outputs)):
        _integers(w, op, t, out, core)
    elif unit.kind == "product" or op.kind == "matmul":
        _product(w, unit, units, weight_bits, rows, add)
    elif op.kind == "conv":
        d = op.dims
        places, taps = d.batch * prod(d.out_spatial), prod(d.kernel) * d.in_channels // d.groups
        add("copy_s8", d.groups, n=places * taps)
        add("matmul_s8", d.groups, m=places, k=taps, n=d.out_channels // d.groups)
        w.flash = _weights(d.out_channels, taps, weight_bits)
        w.note = "convolutions are priced as patches copied, then a product"
    elif op.prim in ("add", "sub", "add_any"):
        add("add_s8", n=n)
    elif op.prim in ("mul", "div"):
        add("mul_s8" if op.prim == "mul" else "divide_s8", n=n)
    elif op.prim in ("reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin"):
        length = op.dims.length
        kernel = "reduce_sum_s8" if op.prim == "reduce_sum" else "reduce_max_s8"
        if op.attrs.get("axes", (0,))[-1:] != (len(t[op.inputs[0]].shape) - 1,):
            w.extra = 2.0 * n * length  # strides of its own along another axis
        add(kernel, rows=op.dims.rows, cols=length)
    elif op.prim in ("cumsum", "cummax", "cummin") or op.prim.startswith("reduce_window"):
        add("rescale_s8", n=n)
        w.extra = SCALAR.numbers["integer_op"] * op.dims.ops
    elif op.kind == "sort":
        w.extra = SCALAR.numbers["sort_compare"] * max(op.dims.ops, 1)
    elif op.prim in _COMPARES or op.prim in ("max", "min", "select_n", "clamp"):
        scaled = sum(units.dynamic(i) and units.root(i) != units.root(unit.out) for i in op.inputs)
        if scaled:
            add("rescale_s8", scaled, n=n)
        w.extra = SCALAR.numbers["integer_op"] * n
    elif op.prim in SCATTER:
        w.extra = SCALAR.numbers["integer_op"] * 2 * max(op.dims.written, 1)
    elif op.prim in _MOVES:
        written = getattr(op.dims, "written", n)
        add("move_s8", rows=written // last if last else 0, cols=last)
    elif op.prim in _CONTIGUOUS or op.prim in ("sort", "iota", "empty"):
        written = getattr(op.dims, "written", n)
        other = [i for i in op.inputs if units.dynamic(i) and units.root(i) != units.root(unit.out)]
        if other or (op.prim == "convert_element_type" and not is_float(t[op.inputs[0]].dtype)):
            add("rescale_s8", n=sum(t[i].size for i in other) or n)
        else:
            add("copy_s8", n=written)
    else:
        w.soft = sum(t[o].size for o in op.outputs)
        size = max(w.soft, t[op.inputs[0]].size if op.inputs else 0)
        kind = "function" if c.transcendentals or op.prim in ("rem", "pow", "atan2") else "op"
        soft = "" if core in FPU else "soft_"
        w.extra = size * (SCALAR.numbers[f"{soft}float_{kind}"] + SCALAR.numbers["to_float_and_back"])
    return w


def _integers(w, op, t, out, core):
    """Ops on integers and flags, as plain loops; products of int8 by their kernel."""
    number = SCALAR.numbers
    if op.kind == "matmul" and all(t[i].dtype in ("int8", "uint8") for i in op.inputs[:2]):
        d = op.dims
        w.calls.append((d.b, "product_s8", {"m": d.m, "k": d.k, "n": d.n}))
    elif op.prim in RANDOM:
        w.extra = number["random_word"] / 2 * max(out.size, 1)
    elif op.kind == "sort":
        w.extra = number["sort_compare"] * max(op.dims.ops, 1)
    elif op.kind in ("move", "gather", "scatter"):
        w.extra = number["integer_op"] * max(getattr(op.dims, "written", out.size), 0)
    else:
        done = max(w.macs, getattr(op.dims, "ops", 0) or 0, out.size)
        w.extra = number["integer_op"] * done


def _weights(channels, k, bits):
    """Bytes in flash of a weight: codes, a multiplier, a shift and a bias for every channel."""
    return channels * (k * bits / 8 + 12)


def _product(w, unit, units, bits, rows, add):
    d, op = unit.op.dims, unit.op
    b, m, n = d.b, d.m, d.n
    left, right = (i in units.static for i in op.inputs[:2])
    if left and not right:  # the weights stand on the left: the product is made turned
        m, n = n, m
    kernel = "matmul_s8" if left or right else "product_s8"
    if rows > 1:  # one piece at a time, each reading the weights again
        piece = b * m // rows
        if piece <= m:
            b, m = rows, piece
    if kernel == "matmul_s8" and m == 1:
        kernel = "fully_connected_s8"
    add(kernel, b, m=m, k=d.k, n=n)
    if left or right:
        again = b if rows > 1 and d.b == 1 else 1
        groups = d.b * d.groups if d.b > 1 or d.groups > 1 else 1
        groups = max(groups, rows) if d.b > 1 else groups  # a matrix a row
        w.flash = again * groups * _weights(n, d.k, bits)
