"""Cycles of one op on a stream or systolic design, and how often its operands come from memory."""

from dataclasses import dataclass, field
from math import ceil, log2, prod

from hw.boards import DEPTH
from hw.errors import UnsupportedPrimitive
from hw.fabric import SORT_DEPTH
from hw.fusion import INDEXING
from hw.program import ConvDims, ElementwiseDims
from hw.systolic import dram_words, systolic_cycles
from ref.blocks.stream import attention_steps, linear_cycles

SCATTERS = ("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max")


@dataclass
class Part:
    """What one op keeps busy: cycles by unit, beats by port, bytes of memory and of the array's buffers."""

    cycles: dict = field(default_factory=dict)
    beats: dict = field(default_factory=dict)
    depth: int = 0
    dram: float = 0.0
    sram: float = 0.0
    macs: int = 0
    flops: int = 0
    warnings: tuple = ()


def dense(target, op, p, stored, weights):
    """Cycles of a product; how often each operand crosses the border ({tensor: times})."""
    d = op.dims
    if isinstance(d, ConvDims):
        b, m = d.groups, d.batch * prod(d.out_spatial)
        n, k = d.out_channels // d.groups, d.in_channels // d.groups * prod(d.kernel)
    else:
        b, m, n, k = d.b, d.m, d.n, d.k
    if min(b, m, n, k) < 1:
        return dict.fromkeys(op.inputs, 1)
    x, w = op.inputs[:2]
    held = [i in weights for i in (x, w)]
    if held[0] and not held[1]:  # w x is (x^T w^T)^T
        x, w, m, n = w, x, n, m
    if target.backend == "systolic":
        c = systolic_cycles(
            m, n, k, rows=target.rows, cols=target.cols, dataflow=target.dataflow, drain=target.drain
        )
        width = stored.tensors[w].nbytes / max(stored.tensors[w].size, 1)
        words = int(target.sram_kb * 1024 / max(width, target.act_bits / 8))
        a, bb, o = dram_words(
            m, n, k, rows=target.rows, cols=target.cols, dataflow=target.dataflow, sram_words=words
        )
        p.cycles = {"array": b * c.cycles}
        p.sram = b * ((c.a_reads + c.out_writes) * target.act_bits / 8 + c.b_reads * width)
        return {x: a / (m * k), w: bb / (n * k), op.outputs[0]: o / (m * n)}
    p.depth = DEPTH.numbers["mul"] + 2 * ceil(log2(max(target.linear_in, 2)))
    if any(held) or isinstance(d, ConvDims) or getattr(d, "groups", 1) > 1:
        c = linear_cycles(m, k, n, linear_in=target.linear_in, linear_out=target.linear_out)
        p.cycles = {"linear": b * c.compute}
        parts = ceil(stored.tensors[w].nbytes / (target.weight_kb * 1024))
        return {x: max(parts, 1), w: 1}
    forms = [
        (key_steps(rows, keys, target.attn_parallel) * ceil(width / target.lanes), flip)
        for rows, cols, flip in ((m, n, False), (n, m, True))
        for keys, width in ((cols, k), (k, cols))  # scores: k numbers of a key; values: cols of them
    ]
    steps, flip = min(forms)
    p.cycles = {"attention": b * steps}
    if all(stored.tensors[i].role == "input" for i in (x, w)) and b == 1:
        p.warnings = (
            f"{op.label}: both operands are inputs, so it runs where queries meet keys; name the weights "
            "in trace(..., weights=...) to use the linear unit",
        )
    stays, moves = (w, x) if flip else (x, w)
    size = stored.tensors[moves].nbytes / b
    blocks = ceil((n if flip else m) / target.attn_parallel)
    return {stays: 1, moves: 1 if size <= target.tile_kb * 1024 else blocks}


def other(target, op, p, stored):
    """Cycles and depth of an op that is no product."""
    d, depth = op.dims, DEPTH.numbers
    size = max((stored.tensors[i].size for i in op.inputs), default=0)
    if op.attrs.get("folded"):
        return
    if isinstance(d, ElementwiseDims):
        p.cycles = {"lanes": ceil(d.n / target.lanes) if d.ops else 0}
        p.depth = depth.get(d.cls, depth["mul"]) if d.ops and d.n else 0
    elif op.kind == "reduce":
        p.cycles = {"lanes": ceil(d.rows * d.length / target.lanes)}
        p.depth = depth["add"] * (1 + ceil(log2(max(target.lanes, 2))))
    elif op.kind == "cumulative":  # a carried sum: as many rows side by side as there are lanes
        interval = depth["transcendental"] if d.cls == "transcendental" else 1
        p.cycles, p.depth = {"lanes": ceil(d.rows / target.lanes) * d.length * interval}, depth["add"]
    elif op.kind == "sort":
        deep = min(op.attrs.get("k", d.length), d.length)
        passes = 1 + ceil(log2(max(deep / SORT_DEPTH, 1)))  # runs of the network's depth, then merged
        p.cycles, p.depth = {"sorter": d.rows * d.length * passes}, SORT_DEPTH
    elif op.kind == "random":
        p.cycles, p.depth = {"lanes": d.ops / 110}, depth["transcendental"]  # a pair of words a cycle
    elif op.prim == "transpose":
        fits = stored.tensors[op.outputs[0]].nbytes <= target.tile_kb * 1024
        p.cycles = {} if fits else {"lanes": size}
    elif op.kind == "scatter":
        p.cycles, p.depth = {"lanes": ceil(max(d.ops, d.written) / target.lanes)}, depth["add"]
    elif op.kind == "move" and op.prim not in INDEXING:
        p.cycles = {"lanes": ceil(d.written / target.lanes)}
    elif op.kind not in ("move", "gather"):
        why = f"{target.name} has no rule for the kind {op.kind}"
        raise UnsupportedPrimitive(op.prim, (), op.scope, op.source, why)


def burst(op, tensors):
    """Numbers that a gather or scatter moves in one piece."""
    if op.prim == "gather":
        return max(prod(op.attrs["slice_sizes"]), 1)
    shape = tensors[op.inputs[2]].shape
    return max(prod(shape[i] for i in op.attrs["update_window_dims"]), 1)


def key_steps(rows, keys, parallel):
    """Key loads with as many lanes as help: no more than there are keys to be late by."""
    return min(attention_steps(rows, keys, parallel=p) for p in range(1, parallel + 1))
