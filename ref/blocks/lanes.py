"""Products as the units beside DRAM banks compute them: 16 lanes, an adder tree or none, narrow registers.

A column of a bank holds 16 weights. A bfloat16 unit (GDDR6-AiM, PIM-GPT) multiplies it with 16 inputs, adds
the products in a tree of float32 adders and the sum to a float32 accumulator. A float16 unit (HBM-PIM) has no
tree: lane j of a register gathers the inputs j, j + 16, ... in float16, and the host adds the lanes.
Sources: GDDR6-AiM (ISSCC 2022, Hot Chips 34); HBM-PIM (ISCA 2021); PIM-GPT (arXiv 2310.09385). Order of the
lanes in the tree, and the host's order: our choice, neighbours first and lane 0 first.
"""

import numpy as np

from ref.blocks.formats import round_bf16
from ref.dims import dims


def _operands(x, w):
    x, w = np.asarray(x), np.asarray(w)
    check_inputs(x, dims(w=(w, "K M"))["K"])
    return x, w


def check_inputs(x, K):
    """Raise ValueError unless x has K >= 1 inputs on its last axis."""
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"x must have shape [..., {K}], as K of w, got {list(x.shape)}")
    if K < 1:
        raise ValueError("x and w must have K >= 1, got K = 0")


def check_units(x, K, lanes, tile, acc):
    """Raise ValueError naming what `vmm_bf16` cannot compute; for accel, which sees shapes alone."""
    check_inputs(x, K)
    _check_tree(lanes, acc)
    _check_tile(tile)


def _check_tree(lanes, acc):
    if lanes < 1 or lanes & (lanes - 1):
        raise ValueError(f"lanes must be a power of two, got {lanes}")
    if acc not in ("f32", "bf16"):
        raise ValueError(f'acc must be "f32" or "bf16", got {acc!r}')


def _check_tile(tile):
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")


def _tree(p):
    """Sums over axis -2, a power of two, neighbours first, in the dtype of p."""
    while p.shape[-2] > 1:
        p = p[..., 0::2, :] + p[..., 1::2, :]
    return p[..., 0, :]


def dot_bf16_tree(x, w, *, lanes=16, acc="f32"):
    """x w by columns of `lanes` products, each summed in a float32 tree, then added to one accumulator.

    Args: x [..., K], w [K, M], rounded to bfloat16 first; K >= 1. lanes: a power of two; the last column is
      filled up with zeros.
      acc: "f32", rounded to bfloat16 once, when the register is read; "bf16", rounded after every column.
    Returns: float32 [..., M], bfloat16 numbers.
    Raises: ValueError naming the argument.
    """
    x, w = _operands(x, w)
    _check_tree(lanes, acc)
    x, w = (round_bf16(np.asarray(a, np.float32)) for a in (x, w))
    total = np.zeros((*x.shape[:-1], w.shape[1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, w.shape[0], lanes):
            xs, ws = x[..., first : first + lanes], w[first : first + lanes]
            if (short := lanes - ws.shape[0]) > 0:
                xs = np.pad(xs, [(0, 0)] * (x.ndim - 1) + [(0, short)])
                ws = np.pad(ws, ((0, short), (0, 0)))
            total = total + _tree(xs[..., None] * ws)
            total = round_bf16(total) if acc == "bf16" else total
    return round_bf16(total)


def vmm_bf16(x, w, *, lanes=16, tile=1024, acc="f32"):
    """x w cut into tiles of `tile` inputs: each tile's register is read in bfloat16 and added in bfloat16.

    Args: as `dot_bf16_tree`. tile: inputs that the global buffer of a channel holds, >= 1.
    Returns: float32 [..., M], bfloat16 numbers.
    """
    x, w = _operands(x, w)
    _check_tile(tile)
    parts = [
        dot_bf16_tree(x[..., i : i + tile], w[i : i + tile], lanes=lanes, acc=acc)
        for i in range(0, w.shape[0], tile)
    ]
    total = parts[0]
    with np.errstate(over="ignore", invalid="ignore"):
        for p in parts[1:]:
            total = round_bf16(total + p)
    return total


def mac_fp16(x, w, *, lanes=16):
    """x w with a float16 multiply, then a float16 add, lane by lane; the lanes are added in float32.

    Args: x [..., K], w [K, M], rounded to float16 first; K >= 1.
    Returns: float32 [..., M]. Beyond 65,504 a lane is infinite.
    Raises: ValueError naming the argument.
    """
    x, w = _operands(x, w)
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    with np.errstate(over="ignore", invalid="ignore"):
        x, w = x.astype(np.float16), w.astype(np.float16)
        held = np.zeros((*x.shape[:-1], lanes, w.shape[1]), np.float16)
        for first in range(0, w.shape[0], lanes):
            ws = w[first : first + lanes]
            n = ws.shape[0]
            held[..., :n, :] += x[..., first : first + n, None] * ws
        total = held[..., 0, :].astype(np.float32)
        for j in range(1, lanes):
            total = total + held[..., j, :].astype(np.float32)
    return total
