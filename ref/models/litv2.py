"""LITv2: parameters, sizes and initial values of the pyramid around HiLo attention.

Source: Pan et al. 2022 (arXiv 2205.13213) and the code released with it; the merging between stages is that
of Pan et al. 2021 (arXiv 2105.14217).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.conv import BN, init_bn
from ref.checks import check_share, one_of


class HiLoParams(NamedTuple):
    """One layer of width C, Cl channels in Lo-Fi and Ch = C - Cl in Hi-Fi; None where a group is empty.

    w_q [C, Cl], w_kv [C, 2 Cl] (keys of all heads, then values), w_lproj [Cl, Cl]: Lo-Fi. w_qkv [C, 3 Ch]
    (queries, keys, values), w_hproj [Ch, Ch]: Hi-Fi. b_q, b_kv, b_qkv may be None.
    """

    w_q: np.ndarray | None
    b_q: np.ndarray | None
    w_kv: np.ndarray | None
    b_kv: np.ndarray | None
    w_lproj: np.ndarray | None
    b_lproj: np.ndarray | None
    w_qkv: np.ndarray | None
    b_qkv: np.ndarray | None
    w_hproj: np.ndarray | None
    b_hproj: np.ndarray | None


class DWMlpParams(NamedTuple):
    """w_fc1 [C, F], depthwise w_dw [F, 1, 3, 3], w_fc2 [F, C], and their biases."""

    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_dw: np.ndarray
    b_dw: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray


class LITv2Block(NamedTuple):
    """One block: attn is None, and so are ln1_scale and ln1_bias, in the stages without attention."""

    ln1_scale: np.ndarray | None
    ln1_bias: np.ndarray | None
    attn: HiLoParams | None
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    mlp: DWMlpParams


class MergeParams(NamedTuple):
    """Deformable merging of 2 x 2 tokens: w_offset [8, C, 2, 2], b_offset [8], w [2 C, C, 2, 2], b [2 C]."""

    w_offset: np.ndarray
    b_offset: np.ndarray
    w: np.ndarray
    b: np.ndarray
    bn: BN


class LITv2Params(NamedTuple):
    """w_patch [E, 3, 4, 4] and a layer norm; four stages of blocks, three merges between; norm and head."""

    w_patch: np.ndarray
    b_patch: np.ndarray
    patch_scale: np.ndarray
    patch_bias: np.ndarray
    blocks: tuple[tuple[LITv2Block, ...], ...]
    merges: tuple[MergeParams, ...]
    norm_scale: np.ndarray
    norm_bias: np.ndarray
    w_head: np.ndarray
    b_head: np.ndarray


@dataclass(frozen=True)
class LITv2Config:
    """Sizes. Widths double from stage to stage; windows: 0 is a stage without attention, 1 full attention."""

    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    windows: tuple[int, ...] = (0, 0, 2, 1)
    alpha: float = 0.9
    mlp_ratio: int = 4
    classes: int = 1000


VARIANTS = {
    "s": LITv2Config(),
    "m": LITv2Config(depths=(2, 2, 18, 2)),
    "b": LITv2Config(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def litv2_config(name) -> LITv2Config:
    """The published sizes "s", "m" and "b". Raises: ValueError for another name."""
    one_of("name", name, VARIANTS)
    return VARIANTS[name]


def split_heads_hilo(num_heads, alpha):
    """(heads of Hi-Fi, heads of Lo-Fi): int(num_heads * alpha) of Lo-Fi, cut towards zero.

    Raises: ValueError for alpha outside [0, 1].
    """
    check_share("alpha", alpha)
    low = int(num_heads * alpha)
    return num_heads - low, low


def init_hilo(rng, dim, *, num_heads, window=2, alpha=0.5, qkv_bias=True, std=0.02) -> HiLoParams:
    """Normal weights (std), zero biases. rng: NumPy Generator."""
    h, l = (0, num_heads) if window == 1 else split_heads_hilo(num_heads, alpha)
    ch, cl = (n * dim // num_heads for n in (h, l))

    def maps(*shapes):
        if not shapes[-1][-1]:
            return (None,) * (2 * len(shapes))
        biased = [qkv_bias] * (len(shapes) - 1) + [True]
        pairs = [
            (std * rng.standard_normal(s), np.zeros(s[-1]) if b else None)
            for s, b in zip(shapes, biased, strict=True)
        ]
        return sum(pairs, ())

    return HiLoParams(*maps((dim, cl), (dim, 2 * cl), (cl, cl)), *maps((dim, 3 * ch), (ch, ch)))


def init_litv2(rng, cfg: LITv2Config, *, std=0.02) -> LITv2Params:
    """Normal weights (depthwise: variance 2 / 9), zero biases and offsets, unit norms."""
    one, zero = np.ones, np.zeros
    w = lambda *shape: std * rng.standard_normal(shape)

    def block(C, heads, window):
        F = cfg.mlp_ratio * C
        has = window > 0
        attn = init_hilo(rng, C, num_heads=heads, window=window, alpha=cfg.alpha, std=std) if has else None
        dw = np.sqrt(2 / 9) * rng.standard_normal((F, 1, 3, 3))
        mlp = DWMlpParams(w(C, F), zero(F), dw, zero(F), w(F, C), zero(C))
        return LITv2Block(one(C) if has else None, zero(C) if has else None, attn, one(C), zero(C), mlp)

    widths = [cfg.dim * 2**i for i in range(4)]
    stages = zip(widths, cfg.depths, cfg.num_heads, cfg.windows, strict=True)
    merge = lambda C: MergeParams(zero((8, C, 2, 2)), zero(8), w(2 * C, C, 2, 2), zero(2 * C), init_bn(2 * C))
    return LITv2Params(
        w_patch=w(cfg.dim, 3, 4, 4), b_patch=zero(cfg.dim),
        patch_scale=one(cfg.dim), patch_bias=zero(cfg.dim),
        blocks=tuple(tuple(block(C, heads, s) for _ in range(n)) for C, n, heads, s in stages),
        merges=tuple(merge(C) for C in widths[:3]),
        norm_scale=one(widths[3]), norm_bias=zero(widths[3]),
        w_head=w(widths[3], cfg.classes), b_head=zero(cfg.classes),
    )  # fmt: skip
