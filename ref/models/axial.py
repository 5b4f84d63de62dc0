"""The axial transformer of images: sizes, parameters and how they start.

Source: Ho et al. 2019 (arXiv 1912.12180) and the released code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks import transformer
from ref.blocks.initial import truncated_normal
from ref.blocks.transformer import BlockParams
from ref.checks import check_num_heads

EMBED_SCALE = 5.0  # deviation of the embeddings, times sqrt(D)
NEAR_ZERO = 1e-10  # scale of what ends a residual branch, and of the logits
TRUNCATED_STD = 0.87962566103423978  # deviation of a standard normal cut at two


class ExteriorParams(NamedTuple):
    """w_conv [D, 2 C, 3, 3], b_conv [D] (None for video), pos_h [H, D], pos_w [W, D], blocks."""

    w_conv: np.ndarray | None
    b_conv: np.ndarray | None
    pos_h: np.ndarray
    pos_w: np.ndarray
    blocks: tuple[BlockParams, ...]


class AxialParams(NamedTuple):
    """embs [K, D], pos_h [H, D], pos_w [W, D], blocks, last norm [D], w_head [D, K], b_head [K], exterior."""

    embs: np.ndarray
    pos_h: np.ndarray
    pos_w: np.ndarray
    outer: tuple[BlockParams, ...]
    inner: tuple[BlockParams, ...]
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    w_head: np.ndarray
    b_head: np.ndarray
    exterior: ExteriorParams | None = None


@dataclass(frozen=True)
class AxialConfig:
    """Images [height, width] (channels > 1: [height, width, channels]) of values 0..num_embs - 1.

    num_outer blocks alternate row and column, num_exterior as well (video: row, column, time).
    """

    height: int
    width: int
    channels: int
    num_embs: int
    emb_dim: int
    num_heads: int
    hdim_factor: int = 1
    num_exterior: int = 0
    num_outer: int = 2
    num_inner: int = 1

    def __post_init__(self):
        """Refuse what cannot be built."""
        check_num_heads(self.emb_dim, self.num_heads)
        if self.num_outer % 2 or (self.channels > 1 and self.num_exterior % 2):
            raise ValueError(
                f"num_outer and num_exterior must be even (row and column in turn), got {self.num_outer} and "
                f"{self.num_exterior}"
            )


def init_axial(rng, config: AxialConfig) -> AxialParams:
    """Drawn by a NumPy Generator as released: every block starts as the identity, every pixel at log2 K bits.

    Weights are truncated normal with variance 1 / fan in, those that end a branch 1e-10 of it, biases 0.
    """
    c, D, hidden = config, config.emb_dim, config.emb_dim * config.hdim_factor
    weight = lambda *shape, fan_in, scale=1.0: (
        truncated_normal(rng, shape) * np.sqrt(scale / fan_in) / TRUNCATED_STD
    )
    table = lambda rows: EMBED_SCALE / np.sqrt(D) * rng.standard_normal((rows, D))

    def block():
        maps = {n: weight(D, D, fan_in=D) for n in ("w_q", "w_k", "w_v")}
        return transformer.init_block(rng, D, hidden)._replace(
            **maps,
            w_o=weight(D, D, fan_in=D, scale=NEAR_ZERO),
            w_fc1=weight(D, hidden, fan_in=D),
            w_fc2=weight(hidden, D, fan_in=hidden, scale=NEAR_ZERO),
        )

    exterior = None
    if c.channels > 1 or c.num_exterior:
        conv = None, None
        if c.channels > 1:
            conv = weight(D, 2 * c.channels, 3, 3, fan_in=18 * c.channels), np.zeros(D)
        blocks = tuple(block() for _ in range(c.num_exterior))
        exterior = ExteriorParams(*conv, table(c.height), table(c.width), blocks)
    return AxialParams(
        embs=table(c.num_embs),
        pos_h=table(c.height),
        pos_w=table(c.width),
        outer=tuple(block() for _ in range(c.num_outer)),
        inner=tuple(block() for _ in range(c.num_inner)),
        ln_scale=np.ones(D),
        ln_bias=np.zeros(D),
        w_head=weight(D, c.num_embs, fan_in=D, scale=NEAR_ZERO),
        b_head=np.zeros(c.num_embs),
        exterior=exterior,
    )
