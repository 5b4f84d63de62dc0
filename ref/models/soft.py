"""The pyramid around SOFT's attention: parameters, sizes and initial values.

Source: Lu et al. 2024 (arXiv 2207.03341) and the code released with it.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ref.blocks.conv import BN, ConvBN
from ref.blocks.transformer import BlockParams, init_block


class SoftParams(NamedTuple):
    """One layer of width C, heads of d channels, ratio r, local kernel c.

    w_q, w_v, w_out [C, C] and biases [C]; w_landmark [d, d, r, r], ln_w and ln_b [d]: shared by all heads;
    w_local [heads, 1, c, c]: one filter a head. With ratio 1 w_landmark, ln_w and ln_b are not read.
    """

    w_q: np.ndarray
    b_q: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    w_landmark: np.ndarray | None
    ln_w: np.ndarray | None
    ln_b: np.ndarray | None
    w_local: np.ndarray
    w_out: np.ndarray
    b_out: np.ndarray


@dataclass(frozen=True)
class SoftConfig:
    """Sizes of the network: three stages of SOFT and one of softmax attention, each half as wide and high."""

    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (1, 2, 3, 2)
    head_dim: int = 32
    ratios: tuple[int, ...] = (8, 4, 2)
    conv_sizes: tuple[int, ...] = (9, 5, 3)
    stem: int = 32
    image_size: int = 224
    classes: int = 1000
    normalize: bool = False
    iters: int = 20


VARIANTS = {
    "tiny": SoftConfig(),
    "small": SoftConfig(depths=(1, 3, 20, 4)),
    "medium": SoftConfig(dims=(64, 128, 288, 512), depths=(1, 3, 29, 5)),
    "large": SoftConfig(depths=(1, 3, 40, 5)),
    "huge": SoftConfig(dims=(64, 128, 352, 512), depths=(1, 5, 49, 5)),
}


class SoftBlock(NamedTuple):
    """One softmax-free block: its attention, two layer norms [C], an MLP of hidden width 4 C."""

    attn: SoftParams
    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray


class SoftNet(NamedTuple):
    """The network: embed, per stage, the convolutions that lead into it; pos, per stage [1, side, side, C].

    blocks: SoftBlock in stages 1 to 3, BlockParams in stage 4, before which cls_token + cls_pos [C] is put.
    """

    embed: tuple[tuple[ConvBN, ...], ...]
    pos: tuple[np.ndarray, ...]
    blocks: tuple[tuple[SoftBlock | BlockParams, ...], ...]
    cls_token: np.ndarray
    cls_pos: np.ndarray
    norm_scale: np.ndarray
    norm_bias: np.ndarray
    w_head: np.ndarray
    b_head: np.ndarray


def init_soft(rng, cfg: SoftConfig, *, std=0.02) -> SoftNet:
    """Normal weights (std), zero biases, unit norms. rng: NumPy Generator."""
    one, zero = np.ones, np.zeros
    w = lambda *shape: std * rng.standard_normal(shape)
    conv = lambda i, o: ConvBN(w(o, i, 3, 3), BN(one(o), zero(o), zero(o), one(o)))

    def block(C, d, r, c):
        attn = SoftParams(
            w(C, C), zero(C), w(C, C), zero(C), w(d, d, r, r), one(d), zero(d), w(C // d, 1, c, c), w(C, C),
            zero(C),
        )  # fmt: skip
        return SoftBlock(
            attn, one(C), zero(C), one(C), zero(C), w(C, 4 * C), zero(4 * C), w(4 * C, C), zero(C)
        )

    widths, sides = cfg.dims, [cfg.image_size // 2 ** (i + 2) for i in range(4)]
    stem = conv(3, cfg.stem), conv(cfg.stem, cfg.stem), conv(cfg.stem, widths[0])
    soft = zip(widths[:3], cfg.ratios, cfg.conv_sizes, cfg.depths[:3], strict=True)
    return SoftNet(
        embed=(stem, *((conv(i, o),) for i, o in pairwise(widths))),
        pos=tuple(w(1, n, n, C) for n, C in zip(sides, widths, strict=True)),
        blocks=(
            *(tuple(block(C, cfg.head_dim, r, c) for _ in range(n)) for C, r, c, n in soft),
            tuple(init_block(rng, widths[3], 4 * widths[3], std=std) for _ in range(cfg.depths[3])),
        ),
        cls_token=w(widths[3]), cls_pos=w(widths[3]), norm_scale=one(widths[3]), norm_bias=zero(widths[3]),
        w_head=w(widths[3], cfg.classes), b_head=zero(cfg.classes),
    )  # fmt: skip
