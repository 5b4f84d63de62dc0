"""Where a GPT lies in PIM-GPT's banks: weights, keys and values, by how much they fit, and the commands of a
layer.

The mapping is the paper's contribution: outputs and tokens dealt over all banks, values a row a feature, so
that almost every column finds its row open. All lists are of the fullest channel.
"""

from dataclasses import dataclass

import numpy as np

from hw.errors import DoesNotFit
from hw.pim_schedule import Command, _orders, _Rows, check_shape, tile_columns
from ref.blocks.dram import GptShape, head_tiles

VALUE_BYTES = 2


# Where things lie.


@dataclass(frozen=True)
class Mapping:
    """Weights of y = W x: (channel, bank) of every output [m, 2]; rows and columns of the fullest bank, tiles
    of inputs; multiplications done over lanes passed.
    """

    bank_of: np.ndarray
    rows: int
    columns: int
    tiles: int
    utilisation: float


@dataclass(frozen=True)
class KvMapping:
    """A layer's cache: (channel, bank) of every token's key [n, 2], channel of every head's values [heads];
    rows reserved in the fullest bank for keys and for values; bytes of data.
    """

    token_bank: np.ndarray
    head_channel: np.ndarray
    k_rows: int
    v_rows: int
    data_bytes: int


def map_vmm(m, k, target) -> Mapping:
    """Outputs round-robin over channels, then banks; runs packed back to back, a new row for every tile."""
    m, k = check_shape(m, k)
    check_machine(target)
    bank_of, runs = _deal(m, target), -(-m // (target.channels * target.banks))
    tiles = tile_columns(k, target)
    columns = runs * sum(tiles)
    rows = sum(-(-runs * c // target.row_columns) for c in tiles)
    lanes = target.channels * target.banks * columns * target.lanes
    return Mapping(bank_of, rows, columns, len(tiles), m * k / lanes)


def map_kv(n_ctx, d_model, heads, target) -> KvMapping:
    """Room for n_ctx tokens: tokens' keys over all banks, heads' values over channels, a row a feature."""
    shape = GptShape(1, d_model, heads)
    check_machine(target)
    if n_ctx < 1:
        raise ValueError(f"n_ctx must be at least 1, got {n_ctx}")
    c, each = -(-shape.head_dim // target.lanes), -(-n_ctx // (target.channels * target.banks))
    k_rows = sum(-(-each * g * c // target.row_columns) for g in head_tiles(heads, shape.head_dim, target))
    v_rows = -(-heads // target.channels) * -(-shape.head_dim // target.banks) * -(-n_ctx // target.tile)
    channel = np.arange(heads) % target.channels
    return KvMapping(_deal(n_ctx, target), channel, k_rows, v_rows, 2 * d_model * n_ctx * VALUE_BYTES)


def check_capacity(shape: GptShape, n_ctx, target) -> int:
    """Bytes that are free beside all weights, 12 L D^2 and V D for the logits of a vocabulary, and the cache
    of n_ctx tokens, 2 L D n_ctx numbers.

    Raises: DoesNotFit with the shortfall; ValueError for a context below 1.
    """
    if n_ctx < 1:
        raise ValueError(f"n_ctx must be at least 1, got {n_ctx}")
    there = target.channels * target.banks * target.capacity["bank"]
    cache = 2 * shape.layers * shape.d_model * n_ctx * VALUE_BYTES
    weights, head = shape.weights * VALUE_BYTES, shape.head_weights * VALUE_BYTES
    needed = weights + head + cache
    if needed > there:
        most = (there - weights - head) // (cache // n_ctx)
        words = (f"a context of {most}",) if most > 0 else ()
        raise DoesNotFit(
            target.name, "banks", needed, there,
            [("weights", (12, shape.layers, shape.d_model, shape.d_model), weights),
             ("cache", (2, shape.layers, shape.d_model, n_ctx), cache),
             *([("head", (shape.vocab, shape.d_model), head)] if head else [])],
            (*words, f"channels={2 * target.channels}"),
        )  # fmt: skip
    return there - needed


def check_machine(target):
    """Raise ValueError unless the target works as PIM-GPT does."""
    if target.order != "tile_outer" or not target.pack_rows or target.t_mode or target.t_turn:
        raise ValueError(
            f'target must have order="tile_outer", pack_rows=True and no mode changes, as pim_gpt(); '
            f"{target.name} has not"
        )
    if target.asic is None:
        raise ValueError(f"target {target.name} has nothing beside its banks: give it asic=Asic(...)")


def _deal(n, target):
    i = np.arange(n)
    return np.stack([i % target.channels, i // target.channels % target.banks], axis=1)


# Commands of the cache.


def score_commands(n, heads, d, target):
    """q K^T of n tokens: for each tile of whole heads a broadcast, then a run and a drain a token, head."""
    c, tokens = -(-d // target.lanes), -(-n // (target.channels * target.banks))
    rows = _Rows(target)
    for g in head_tiles(heads, d, target):
        yield Command("WR_GB", columns=g * c)
        rows.fill()
        for r in range(tokens * g):
            yield from rows.take(c)
            yield Command("DRAIN", row=rows.row, columns=1)
            if r == tokens * g - 1 or rows.used == target.open_columns:
                yield from rows.close()


def value_commands(n, heads, d, target, *, layout="feature"):
    """P V of the heads of the fullest channel.

    layout: "feature" has a row a feature, whose columns are tokens; "token" a row a token, so that each row
    opened serves one column for each feature of a bank, and the one result register is drained every time.
    """
    if layout not in ("feature", "token"):
        raise ValueError(f'layout must be "feature" or "token", got {layout!r}')
    features, row = -(-d // target.banks), 0
    for _ in range(-(-heads // target.channels)):
        for first in range(0, n, target.tile):
            tokens = min(target.tile, n - first)
            cols = -(-tokens // target.lanes)
            yield Command("WR_GB", columns=cols)
            rows, uses, span = (features, 1, cols) if layout == "feature" else (tokens, features, 1)
            for _ in range(rows):
                yield Command("ACT", row=row)
                for _ in range(uses):
                    yield Command("MAC", row=row, columns=span)
                    yield Command("DRAIN", row=row, columns=1)
                yield Command("PRE", row=row)
                row += 1


def write_k_commands(heads, d, target):
    """The new key, into one bank: as many rows as its columns fill."""
    c, row = -(-d // target.lanes), 0
    for g in head_tiles(heads, d, target):
        for first in range(0, g * c, target.row_columns):
            yield Command("ACT", row=row)
            yield Command("WR", row=row, columns=min(target.row_columns, g * c - first))
            yield Command("PRE", row=row)
            row += 1


def write_v_commands(heads, d, target):
    """The new value: for each head of the fullest channel and each of a bank's features a column a bank."""
    for row in range(-(-heads // target.channels) * -(-d // target.banks)):
        yield Command("ACT", row=row)
        yield Command("WR", row=row, columns=target.banks)
        yield Command("PRE", row=row)


def token_commands(shape: GptShape, n, target) -> dict:
    """{operation of a layer, "head": its commands on the fullest channel} when the new token is the n-th."""
    of = (shape.heads, shape.head_dim, target)
    found = {name: list(_orders(m, k, target)) for name, (m, k) in shape.products.items()}
    if shape.vocab:
        found["head"] = list(_orders(shape.vocab, shape.d_model, target))
    found |= {"score": list(score_commands(n, *of)), "value": list(value_commands(n, *of))}
    return found | {"write_k": list(write_k_commands(*of)), "write_v": list(write_v_commands(*of))}
