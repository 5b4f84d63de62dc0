"""What the convolution-and-attention pyramids cost at inference, batch norm folded, operation by operation.

Every operation reads its inputs and weights from memory and writes its result, once. Slices of channels and
flattened maps are views and cost nothing; windows, splitting into heads and concatenation are copies.
"""

from typing import NamedTuple

import numpy as np

from ref.models.pyramid import se_width, stage_sides


class OpCost(NamedTuple):
    """One operation: multiply-accumulates, bytes in and out, and the numbers it makes without multiplying."""

    op: str
    macs: int
    bytes_read: int
    bytes_written: int
    elementwise: int


def transformer_block_cost(dim, heads, tokens, *, batch, hidden=None, itemsize=4):
    """[OpCost] of a pre-norm transformer block (DeiT's), to compare: heads are split and joined by copies."""
    B, N, C, F = batch, tokens, dim, hidden or 4 * dim
    rows, maps = (B, 1, N, C), B * heads * N * N
    product = lambda op, macs, read, written: OpCost(op, macs, itemsize * read, itemsize * written, 0)
    point = lambda op, numbers, reads=1: elementwise_cost(op, numbers, reads=reads, itemsize=itemsize)
    line = lambda op, a, b: product(op, B * N * a * b, B * N * a + a * b + b, B * N * b)
    return [
        point("ln1", int(np.prod(rows))), line("qkv", C, 3 * C), point("split", 3 * B * N * C),
        product("scores", B * N * N * C, 2 * B * N * C, maps), point("softmax", maps),
        product("values", B * N * N * C, maps + B * N * C, B * N * C), point("join", B * N * C),
        line("proj", C, C), point("add1", B * N * C, 2),
        point("ln2", B * N * C), line("fc1", C, F), point("gelu", B * N * F), line("fc2", F, C),
        point("add2", B * N * C, 2),
    ]  # fmt: skip


def conv_cost(op, shape, c_out, *, kernel=1, stride=1, groups=1, itemsize=4):
    """OpCost of a convolution on a map of shape (B, side, side, C) with "same" padding, its bias included."""
    B, side, _, c_in = shape
    out, weights = B * (-(-side // stride)) ** 2 * c_out, c_out * (c_in // groups) * kernel**2
    read = B * side**2 * c_in + weights + c_out
    return OpCost(op, out * (c_in // groups) * kernel**2, itemsize * read, itemsize * out, 0)


def elementwise_cost(op, numbers, *, reads=1, itemsize=4):
    """OpCost of something that makes `numbers` from `reads` times as many without multiplying matrices."""
    return OpCost(op, 0, itemsize * int(reads * numbers), itemsize * numbers, numbers)


def residual_cost(name, shape, itemsize):
    """A residual depthwise 3x3 (name dw...) or FFN (ffn...) on a map (B, side, side, C)."""
    C, size = shape[-1], int(np.prod(shape))
    add = elementwise_cost(f"{name}.add", size, reads=2, itemsize=itemsize)
    if name.rpartition(".")[-1].startswith("dw"):
        return [conv_cost(name, shape, C, kernel=3, groups=C, itemsize=itemsize), add]
    return [
        conv_cost(f"{name}.pw1", shape, 2 * C, itemsize=itemsize),
        elementwise_cost(f"{name}.relu", 2 * size, itemsize=itemsize),
        conv_cost(f"{name}.pw2", (*shape[:-1], 2 * C), C, itemsize=itemsize),
        add,
    ]


def down_cost(name, shape, c_out, itemsize):
    """Rows of `downsample` from a map (B, side, side, C) to c_out channels."""
    B, side, _, C = shape
    half, wide, R = -(-side // 2), 4 * C, se_width(C)
    full, small = B * side**2 * wide, B * half**2 * wide
    conv = lambda op, *a, **o: conv_cost(f"{name}.{op}", *a, **o, itemsize=itemsize)
    point = lambda op, *a, **o: elementwise_cost(f"{name}.{op}", *a, **o, itemsize=itemsize)
    rows = [*residual_cost(f"{name}.dw0", shape, itemsize), *residual_cost(f"{name}.ffn0", shape, itemsize)]
    rows += [
        conv("conv1", shape, wide), point("relu1", full),
        conv("conv2", (B, side, side, wide), wide, kernel=3, stride=2, groups=wide), point("relu2", small),
        point("se.mean", B * wide, reads=half**2), conv("se.w1", (B, 1, 1, wide), R),
        point("se.relu", B * R), conv("se.w2", (B, 1, 1, R), wide), point("se.sigmoid", B * wide),
        point("se.scale", small, reads=1 + 1 / half**2),
        conv("conv3", (B, half, half, wide), c_out),
    ]  # fmt: skip
    out = (B, half, half, c_out)
    return rows + residual_cost(f"{name}.dw1", out, itemsize) + residual_cost(f"{name}.ffn1", out, itemsize)


def pyramid_cost(cfg, block_cost, *, batch, image, itemsize):
    """Rows of the whole network; block_cost(name, stage, shape) gives those of one block."""
    shape, rows = (batch, image, image, 3), []
    for i, width in enumerate((cfg.dims[0] // 8, cfg.dims[0] // 4, cfg.dims[0] // 2, cfg.dims[0])):
        rows.append(conv_cost(f"stem.{i}", shape, width, kernel=3, stride=2, itemsize=itemsize))
        side = -(-shape[1] // 2)
        shape = (batch, side, side, width)
        if i < 3:
            rows.append(elementwise_cost(f"stem.relu{i}", batch * side**2 * width, itemsize=itemsize))
    for i, (side, C) in enumerate(zip(stage_sides(image), cfg.dims, strict=True)):
        if i:
            rows += down_cost(f"stage{i}.down", shape, C, itemsize)
        shape = (batch, side, side, C)
        for j in range(cfg.depths[i]):
            rows += block_cost(f"stage{i}.block{j}", i, shape)
    C, K = shape[-1], cfg.num_classes
    rows.append(elementwise_cost("head.mean", batch * C, reads=shape[1] ** 2, itemsize=itemsize))
    rows.append(conv_cost("head.linear", (batch, 1, 1, C), K, itemsize=itemsize))
    return rows
