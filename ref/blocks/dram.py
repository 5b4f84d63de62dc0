"""Ticks of products in DRAM banks, and of a GPT's decode step made of them: PIM-GPT's mapping.

Source: PIM-GPT (arXiv 2310.09385); the schedule's details are ours and stand in the chapter. All times are
whole ticks of the machine's clock; refresh is left out, `long_run` puts it back.

Outputs are dealt over channels, then banks, so that the fullest bank has r = ceil(M / (channels banks)) runs
of inputs. Inputs are cut in tiles of what the broadcast buffer holds. For each tile: one broadcast; runs of c
columns back to back through the rows, a drain at each run's end; a tile starts a new row.
"""

from dataclasses import dataclass
from typing import NamedTuple


class DramTiming(NamedTuple):
    """Sizes of a machine and times in ticks: ACT to column, PRE, ACT to PRE, column to column, last column
    to PRE, last write to PRE, a column over the pins.
    """

    channels: int = 8
    banks: int = 16
    lanes: int = 16
    row_columns: int = 64
    tile: int = 1024
    t_rcd: int = 12
    t_rp: int = 12
    t_ras: int = 27
    t_ccd: int = 1
    t_rtp: int = 6
    t_wr: int = 12
    t_burst: int = 1

    def checked(self):
        """Itself. Raises: ValueError naming a field that is not a positive integer."""
        for name, value in zip(self._fields, self, strict=True):
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        return self


class VmmTicks(NamedTuple):
    """Parts of a product's time: broadcasts, opening and closing rows, columns, drains, waiting for tRAS;
    their sum; rows opened and columns read in the fullest bank.
    """

    broadcast: int
    row_overhead: int
    mac: int
    drain: int
    pad: int
    total: int
    rows: int
    columns: int


class KvTicks(NamedTuple):
    """Ticks of a layer's attention at one position: q K^T, P V, and writing the new key and value."""

    score: int
    value: int
    write_k: int
    write_v: int


@dataclass(frozen=True)
class GptShape:
    """Sizes of a GPT; its MLP is four times as wide. vocab: rows of the matrix that makes the logits,
    which is the embedding too; None leaves it out, as the paper does.
    """

    layers: int
    d_model: int
    heads: int
    vocab: int | None = None
    context: int = 1024

    def __post_init__(self):
        for name in ("layers", "d_model", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.heads:
            raise ValueError(f"heads must divide d_model = {self.d_model}, got {self.heads}")
        if self.vocab is not None and self.vocab < 1:
            raise ValueError(f"vocab must be at least 1 or None, got {self.vocab}")

    @property
    def head_dim(self):
        """Features of a head."""
        return self.d_model // self.heads

    @property
    def weights(self):
        """Weights of all layers, 12 L D^2; the paper's count."""
        return 12 * self.layers * self.d_model**2

    @property
    def head_weights(self):
        """Weights of the matrix that makes the logits, vocab D; 0 where it is left out."""
        return (self.vocab or 0) * self.d_model

    @property
    def products(self):
        """{name: (outputs, inputs)} of a layer's products with weights; q, k and v are one."""
        d = self.d_model
        return {"qkv": (3 * d, d), "proj": (d, d), "fc1": (4 * d, d), "fc2": (d, 4 * d)}


def gpt2_small():
    """12 layers of 768."""
    return GptShape(12, 768, 12)


def gpt2_medium():
    """24 layers of 1024."""
    return GptShape(24, 1024, 16)


def gpt2_large():
    """36 layers of 1280."""
    return GptShape(36, 1280, 20)


def gpt2_xl():
    """48 layers of 1600."""
    return GptShape(48, 1600, 25)


def gpt3_small():
    """12 layers of 768, as `gpt2_small`."""
    return GptShape(12, 768, 12)


def gpt3_medium():
    """24 layers of 1024, as `gpt2_medium`."""
    return GptShape(24, 1024, 16)


def gpt3_large():
    """24 layers of 1536."""
    return GptShape(24, 1536, 16)


def gpt3_xl():
    """24 layers of 2048; GPT-3's table has 24 heads of 128, which is not 2048: 16 of 128 here."""
    return GptShape(24, 2048, 16)


GPTS = {
    f.__name__: f
    for f in (
        gpt2_small, gpt2_medium, gpt2_large, gpt2_xl, gpt3_small, gpt3_medium, gpt3_large, gpt3_xl,
    )
}  # fmt: skip


def tile_ticks(runs, c, b, timing) -> VmmTicks:
    """One tile: b columns of broadcast, then `runs` runs of c columns each in every bank."""
    t, width = timing, timing.row_columns
    rows = -(-runs * c // width)
    z = runs * c - width * (rows - 1)  # columns and run ends in the last row
    e = runs - width * (rows - 1) // c
    close = t.t_rtp - t.t_ccd
    pad = max(0, t.t_ras - (t.t_rcd + z * t.t_ccd + e * t.t_burst + close))
    parts = b * t.t_burst, rows * (t.t_rcd + t.t_rp + close), runs * c * t.t_ccd, runs * t.t_burst, pad
    return VmmTicks(*parts, sum(parts), rows, runs * c)


def vmm_ticks(m, k, timing=DramTiming()) -> VmmTicks:  # noqa: B008
    """y = W x with m outputs and k inputs; all terms are integers.

    Raises: ValueError naming m, k or a field of timing that is not at least 1.
    """
    t = timing.checked()
    for name, n in (("m", m), ("k", k)):
        if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    runs = -(-m // (t.channels * t.banks))
    full, rest = divmod(k, t.tile)
    kinds = [(full, t.tile)] + ([(1, rest)] if rest else [])
    total = [0] * len(VmmTicks._fields)
    for times, inputs in kinds:
        c = -(-inputs // t.lanes)
        total = [a + times * p for a, p in zip(total, tile_ticks(runs, c, c, t), strict=True)]
    return VmmTicks(*total)


def head_tiles(heads, d, timing) -> list[int]:
    """Heads in each tile of a token's key: as many whole heads as the buffer holds."""
    fit = max(1, timing.tile // d)
    return [min(fit, heads - i) for i in range(0, heads, fit)]


def kv_ticks(n, d_model, heads, timing=DramTiming()) -> KvTicks:  # noqa: B008
    """A layer's attention when the new token is the n-th, n >= 1; d_model = heads times the head's size.

    Keys: a token's run of whole heads, tokens dealt over all banks, the accumulator drained once a head.
    The new key opens as many rows as its columns fill: one that crosses a row's end is charged no more.
    Values: a row a feature and tile of tokens; heads dealt over channels, a head's features over its banks.
    Raises: ValueError naming the argument; a head larger than the buffer is refused.
    """
    t = timing.checked()
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if heads < 1 or d_model % heads:
        raise ValueError(f"heads must divide d_model = {d_model}, got {heads}")
    d = d_model // heads
    if d > t.tile:
        raise ValueError(f"a head of {d} features exceeds the buffer's {t.tile}")
    c, tokens = -(-d // t.lanes), -(-n // (t.channels * t.banks))
    at_least = lambda ticks: max(t.t_ras, ticks) + t.t_rp
    score = write_k = 0
    for g in head_tiles(heads, d, t):
        score += tile_ticks(tokens * g, c, g * c, t).total
        whole, part = divmod(g * c, t.row_columns)
        write_k += whole * at_least(t.t_rcd + t.row_columns * t.t_ccd + t.t_wr)
        write_k += at_least(t.t_rcd + part * t.t_ccd + t.t_wr) if part else 0
    served, features = -(-heads // t.channels), -(-d // t.banks)
    value = 0
    full, rest = divmod(n, t.tile)
    for times, inputs in ((full, t.tile), (1, rest)):
        if inputs:
            cols = -(-inputs // t.lanes)
            row = at_least(t.t_rcd + cols * t.t_ccd + t.t_burst + t.t_rtp - t.t_ccd)
            value += times * served * (cols * t.t_burst + features * row)
    write_v = served * features * at_least(t.t_rcd + t.banks * t.t_ccd + t.t_wr)
    return KvTicks(score, value, write_k, write_v)


def token_ticks(shape, n, timing=DramTiming()) -> int:  # noqa: B008
    """Ticks in the banks of one decode step, the n-th token: all layers, and the logits of a vocabulary."""
    weights = sum(vmm_ticks(m, k, timing).total for m, k in shape.products.values())
    layers = shape.layers * (weights + sum(kv_ticks(n, shape.d_model, shape.heads, timing)))
    return layers + (vmm_ticks(shape.vocab, shape.d_model, timing).total if shape.vocab else 0)


def long_run(ticks, *, t_rfc=455, t_refi=6825):
    """Ticks of a long run with its refreshes: t_rfc of every t_refi is lost."""
    if not 0 <= t_rfc < t_refi:
        raise ValueError(f"t_rfc must be in 0..t_refi - 1, got {t_rfc} of {t_refi}")
    return ticks / (1 - t_rfc / t_refi)
