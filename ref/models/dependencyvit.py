"""DependencyViT's network: sizes, parameters, how they start, and how many tokens are left where.

Source: Ding et al. 2023 (arXiv 2304.03282).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.models.vit import ViTParams


class DependencyAttentionParams(NamedTuple):
    """Maps of width C, H heads: w_q, w_k, w_v, w_o [C, C], b_o [C]; w_select [C, H]; the controller's MLP.

    w_gate1 [C, C/2], w_gate2 [C/2, 1]; biases b_q, b_k, b_v [C], b_gate1 [C/2], b_gate2 [1] may be None.
    """

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray
    w_select: np.ndarray
    w_gate1: np.ndarray
    w_gate2: np.ndarray
    b_gate1: np.ndarray | None = None
    b_gate2: np.ndarray | None = None
    b_q: np.ndarray | None = None
    b_k: np.ndarray | None = None
    b_v: np.ndarray | None = None


class DependencyBlockParams(NamedTuple):
    """One pre-norm block: norms [C], attention, MLP [C, F], [F, C]; ls1, ls2 [C]: layer scales, or None."""

    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    attn: DependencyAttentionParams
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray
    ls1: np.ndarray | None = None
    ls2: np.ndarray | None = None


class DependencyAux(NamedTuple):
    """A layer each: messages [B, n] and masks [B, n, n] of the n tokens it sees; kept [B, n'], the places in
    the image of those that go on.
    """

    messages: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    kept: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class DependencyViTConfig:
    """Sizes and options; prune_layers count from 1, () prunes nothing. gate_after_norm: where M_L acts."""

    image_size: int = 224
    patch: int = 16
    dim: int = 192
    depth: int = 12
    num_heads: int = 12
    classes: int = 1000
    temperature: float = 0.1
    prune_layers: tuple[int, ...] = ()
    prune_ratio: float = 0.16
    score: str = "message"
    gate_after_norm: bool = True


def init_dependencyvit(rng, cfg: DependencyViTConfig, *, init_logit=4.0, std=0.02) -> ViTParams:
    """Normal weights (std), zero biases; the controller starts at sigmoid(init_logit), near 1.

    From sigmoid(0) = 1/2 the product over twelve layers would start at 1/4096. rng: NumPy Generator.
    """
    if cfg.image_size % cfg.patch or cfg.dim % (2 * cfg.num_heads):
        raise ValueError(f"need patch | image_size and 2 num_heads | dim, got {cfg}")
    C, H, n = cfg.dim, cfg.num_heads, (cfg.image_size // cfg.patch) ** 2
    w = lambda *shape: std * rng.standard_normal(shape)
    one, zero = np.ones(C), np.zeros(C)

    def block():
        attn = DependencyAttentionParams(
            w(C, C), w(C, C), w(C, C), w(C, C), zero, w(C, H), w(C, C // 2), w(C // 2, 1),
            b_gate2=np.full(1, init_logit),
        )  # fmt: skip
        return DependencyBlockParams(
            one, zero, attn, one, zero, w(C, 4 * C), np.zeros(4 * C), w(4 * C, C), zero
        )

    return ViTParams(
        w_patch=w(cfg.patch, cfg.patch, 3, C), b_patch=zero, cls_token=None, pos_embed=w(n, C),
        blocks=tuple(block() for _ in range(cfg.depth)), norm_scale=one, norm_bias=zero,
        w_head=w(C, cfg.classes), b_head=np.zeros(cfg.classes),
    )  # fmt: skip


def dependencyvit_token_schedule(n_tokens, *, layers=(2, 5, 8, 11), ratio=0.16):
    """Tokens left after each pruning layer: the k-th takes `ratio` of the first count, rounded down.

    Raises: ValueError unless 0 <= ratio and ratio * len(layers) < 1.
    """
    if not (ratio >= 0 and ratio * len(layers) < 1):
        raise ValueError(f"ratio must be at least 0 and below 1 / {len(layers)} layers, got {ratio}")
    counts = [n_tokens]
    for k in range(1, len(layers) + 1):
        counts.append(int(counts[-1] * ((1 - k * ratio) / (1 - (k - 1) * ratio))))
    return counts[1:]


def dependencyvit_macs(n_tokens, dim, depth, heads, *, schedule=None):
    """Multiply-accumulates of the blocks for one image: 12 n C^2 + 2 n^2 C a layer, and the two gates.

    schedule: {layer, from 1: tokens that go on}; the layer's MLP already runs on those.
    """
    n, total, gates = n_tokens, 0, dim * heads + dim * (dim // 2) + dim // 2
    for l in range(1, depth + 1):
        total += n * (4 * dim**2 + gates) + 2 * n**2 * dim
        n = (schedule or {}).get(l, n)
        total += 8 * n * dim**2
    return total
