"""The table of primitives: of what kind each is, and how much it computes and touches. No JAX here.

A primitive that is not in the table has no price and is refused. `rule(prim, ins, outs, attrs)` gives
(kind, dims) from the shapes and dtypes of operands and results and the cleaned parameters.
"""

from math import prod

import numpy as np

from hw.program import (
    CollectiveDims,
    ConvDims,
    ElementwiseDims,
    MatmulDims,
    MoveDims,
    ReduceDims,
    is_float,
)

ONE_OP = frozenset(
    "add sub mul max min neg abs sign floor ceil round clamp select_n and or not xor eq ne lt le gt ge eq_to "
    "le_to lt_to shift_left shift_right_logical shift_right_arithmetic convert_element_type is_finite copy "
    "square nextafter add_any reduce_precision population_count".split()
)
DIVISION = frozenset("div rem reciprocal".split())
TRANSCENDENTAL = frozenset(
    "exp exp2 log log2 log1p expm1 tanh logistic erf erfc erf_inv sin cos tan sqrt rsqrt cbrt pow".split()
)
REDUCE = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split())
ARG_REDUCE = frozenset(("argmax", "argmin"))
CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
WINDOW = frozenset(
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add".split()
)
# Values pass through unchanged; each is executed as a copy of its operand.
IDENTITY = frozenset(
    "optimization_barrier device_put copy_p name sharding_constraint reshard layout_constraint pvary "
    "pbroadcast random_clone multiple_of max_contiguous stop_gradient".split()
)
MOVE = IDENTITY | frozenset(
    "reshape squeeze expand_dims broadcast_in_dim tile stack unstack bitcast_convert_type transpose rev "
    "concatenate pad slice dynamic_slice dynamic_update_slice iota split random_wrap random_unwrap empty "
    "zeros_like".split()
)
GATHER = frozenset(("gather",))
SCATTER = {"scatter": 0, "scatter-add": 1, "scatter-mul": 1, "scatter-min": 1, "scatter-max": 1}
RANDOM = frozenset(
    "threefry2x32 random_bits random_seed random_split random_fold_in rng_bit_generator".split()
)
COLLECTIVE = frozenset(
    "psum psum_invariant psum2 pmax pmin ppermute all_gather all_gather_invariant all_to_all "
    "reduce_scatter".split()
)
INDEX_ONLY = frozenset(("program_id", "num_programs", "axis_index"))
# What a kernel body does to its references.
REFERENCE = frozenset("get swap addupdate masked_load masked_swap".split())
DMA = frozenset("dma_start dma_wait semaphore_signal semaphore_wait semaphore_read".split())
THREEFRY_OPS = 110  # integer operations for two 32-bit words: 20 rounds and the key schedule

KNOWN = (
    ONE_OP
    | DIVISION
    | TRANSCENDENTAL
    | REDUCE
    | ARG_REDUCE
    | CUMULATIVE
    | WINDOW
    | MOVE
    | GATHER
    | set(SCATTER)
    | RANDOM
    | COLLECTIVE
    | INDEX_ONLY
    | REFERENCE
    | DMA
    | {
        "integer_pow",
        "sort",
        "top_k",
        "dot_general",
        "ragged_dot_general",
        "conv_general_dilated",
    }
)


def rule(prim, ins, outs, attrs):
    """(kind, dims) of a primitive; ins, outs: [(shape, dtype)]. None for one that is not in the table."""
    if prim not in KNOWN:
        return None
    size = prod(outs[0][0]) if outs else 0
    taken = prod(ins[0][0]) if ins else 0
    cls = "add" if any(is_float(d) for _, d in [*ins[-1:], *outs[:1], *ins[:1]]) else "index"
    if prim in TRANSCENDENTAL:
        return "elementwise", ElementwiseDims(size, 1, "transcendental")
    if prim in DIVISION:
        return "elementwise", ElementwiseDims(size, 1, "div" if cls == "add" else cls)
    if prim == "integer_pow":
        y = abs(attrs["y"])
        return "elementwise", ElementwiseDims(size, max(y - 1, 0).bit_length(), cls)
    if prim in ONE_OP:
        return "elementwise", ElementwiseDims(size, 1, cls)
    if prim in INDEX_ONLY:
        return "elementwise", ElementwiseDims(size, 0, "index")
    if prim in ("dot_general", "ragged_dot_general"):
        return "matmul", (_dot if prim == "dot_general" else _ragged)(ins, attrs)
    if prim == "conv_general_dilated":
        return "conv", _conv(ins, outs, attrs)
    if prim in REDUCE or prim in ARG_REDUCE:
        length = taken // size if size else 0
        return "reduce", ReduceDims(size, length, max(taken - size, 0), cls)
    if prim in CUMULATIVE:
        length = ins[0][0][attrs["axis"]]
        rows = taken // length if length else 0
        if prim == "cumlogsumexp":
            return "cumulative", ReduceDims(rows, length, rows * max(length - 1, 0), "transcendental")
        return "cumulative", ReduceDims(rows, length, rows * max(length - 1, 0), cls)
    if prim == "sort":
        length = ins[0][0][attrs["dimension"]]
        rows = taken // length if length else 0
        return "sort", ReduceDims(rows, length, _n_log_n(taken, length), _class(ins[0]))
    if prim == "top_k":
        length = ins[0][0][attrs["axis"]]
        rows = taken // length if length else 0
        return "sort", ReduceDims(rows, length, _n_log_n(taken, min(length, 2 * attrs["k"])), _class(ins[0]))
    if prim in WINDOW:
        window = prod(attrs["window_dimensions"])
        return "reduce", ReduceDims(
            size, window, max(size, taken) * window if "scatter" in prim else size * window, cls
        )
    if prim in GATHER:
        return "gather", MoveDims(size, size)
    if prim in SCATTER:
        updates = prod(ins[2][0])
        return "scatter", MoveDims(updates * SCATTER[prim], updates, updates * SCATTER[prim], _class(ins[0]))
    if prim == "dynamic_update_slice":
        return "move", MoveDims(0, prod(ins[1][0]))
    if prim in ("iota", "empty", "zeros_like"):
        return "move", MoveDims(0, size)
    if prim in MOVE:
        total = sum(prod(s) for s, _ in outs)
        return "move", MoveDims(min(total, taken) if prim not in ("tile",) else taken, total)
    if prim in RANDOM:
        words = 2 * prod(ins[0][0]) if prim in ("random_seed", "random_fold_in") else None
        if words is None:
            words = sum(prod(s) * (2 if d.startswith("key") else max(1, _bits(d) // 32)) for s, d in outs)
            words = words // len(outs) if prim == "threefry2x32" else words
            words = 2 * words if prim == "threefry2x32" else words
        return "random", ReduceDims(size, 1, THREEFRY_OPS * -(-words // 2), "index")
    if prim in COLLECTIVE:
        return "collective", CollectiveDims(taken, attrs["devices"], attrs["axes"])
    if prim in REFERENCE:
        moved = size if outs else prod(ins[1][0])
        return "move", MoveDims(moved, moved, moved if prim == "addupdate" else 0)
    return "move", MoveDims(0, 0)  # DMA: bytes are in attrs, the wait moves nothing


def _bits(dtype):
    return 8 * np.dtype(dtype).itemsize


def _class(tensor):
    return "add" if is_float(tensor[1]) else "index"


def _n_log_n(n, length):
    return n * max(length - 1, 0).bit_length()


def _dot(ins, attrs):
    (lc, rc), (lb, rb) = attrs["dimension_numbers"]
    (ls, _), (rs, _) = ins[:2]
    b = prod(ls[i] for i in lb)
    k = prod(ls[i] for i in lc)
    m = prod(n for i, n in enumerate(ls) if i not in (*lc, *lb))
    n = prod(n for i, n in enumerate(rs) if i not in (*rc, *rb))
    return MatmulDims(b, m, n, k)


def _ragged(ins, attrs):
    """Rows of the left operand in groups, each with its own matrix: macs = rows K N whatever the groups."""
    (lc, rc), (lb, rb) = attrs["dimension_numbers"]
    (ls, _), (rs, _) = ins[:2]
    group = attrs["rhs_group_dimensions"]
    b = prod(ls[i] for i in lb)
    k = prod(ls[i] for i in lc)
    m = prod(n for i, n in enumerate(ls) if i not in (*lc, *lb))
    n = prod(n for i, n in enumerate(rs) if i not in (*rc, *rb, *group))
    return MatmulDims(b, m, n, k, groups=prod(rs[i] for i in group))


def _conv(ins, outs, attrs):
    """Taps that meet real input: not padding, not the holes of a dilated input."""
    lhs, rhs, out = attrs["lhs_spec"], attrs["rhs_spec"], attrs["out_spec"]
    (ls, _), (rs, _) = ins[:2]
    (os, _) = outs[0]
    pairs = 1
    for d in range(len(ls) - 2):
        size, kernel, places = ls[lhs[d + 2]], rs[rhs[d + 2]], os[out[d + 2]]
        at = (
            np.arange(places)[:, None] * attrs["window_strides"][d]
            + np.arange(kernel)[None] * attrs["rhs_dilation"][d]
            - attrs["padding"][d][0]
        )
        hole = attrs["lhs_dilation"][d]
        pairs *= int(((at >= 0) & (at % hole == 0) & (at // hole < size)).sum())
    batch, features = os[out[0]], os[out[1]]
    return ConvDims(
        batch=batch,
        in_channels=ls[lhs[1]],
        out_channels=features,
        in_spatial=tuple(ls[i] for i in lhs[2:]),
        out_spatial=tuple(os[i] for i in out[2:]),
        kernel=tuple(rs[i] for i in rhs[2:]),
        groups=attrs["feature_group_count"] * attrs["batch_group_count"],
        macs=batch * features * rs[rhs[1]] * pairs,
    )
