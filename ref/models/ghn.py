"""LoGAH's hypernetwork: sizes, parameters, how they start, their number.

Source: Zhou et al. 2024 (arXiv 2405.16287) and the code released with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.initial import truncated_normal
from ref.blocks.transformer import BlockParams
from ref.models.graphormer import GraphormerParams
from ref.models.networks import OPS, shape_vocabulary


class ShapeParams(NamedTuple):
    """Tables of sizes: channel [n + 1, d/4], spatial [m + 1, d/4]; the last row is for no parameters."""

    channel: np.ndarray
    spatial: np.ndarray


class LowRankParams(NamedTuple):
    """d -> 4d -> 8d -> 2 r^2, then r -> K: w1, b1, w2, b2, w3, b3, w_k [r, K], b_k [K]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    w3: np.ndarray
    b3: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray


class VectorParams(NamedTuple):
    """The decoder of norms and biases, d -> 2d -> d, and of the classifier's bias, w_class [d/2, classes]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    w_class: np.ndarray
    b_class: np.ndarray


class GHNParams(NamedTuple):
    """op [15, d], one row a kind of operation; vectors None: norms and biases come from the decoder too."""

    op: np.ndarray
    shape: ShapeParams
    encoder: GraphormerParams
    decoder: LowRankParams
    vectors: VectorParams | None = None


@dataclass(frozen=True)
class GHNConfig:
    """Sizes of the hypernetwork: rank r, width d, layers, heads; K rows of each factor at most."""

    rank: int = 32
    dim: int = 64
    layers: int = 3
    heads: int = 8
    num_classes: int = 100
    K: int = 2048 * 16
    max_spatial: int = 16
    llm: bool = False
    vectors: bool = True
    final_norm: bool = False
    norm: str = "fan_in"


VARIANTS = {
    "tiny": GHNConfig(),
    "small": GHNConfig(90, 128, 5, 16),
    "base": GHNConfig(128, 256, 5, 16),
    "large": GHNConfig(256, 256, 12, 16),
}


def init_ghn(rng, config: GHNConfig) -> GHNParams:
    """Tables normal with std d^-0.5, cut at two; edges sinusoids; other weights uniform in +-1/sqrt(fan_in).

    The last layer of the vector decoder is five times smaller, without bias.
    Raises: ValueError if d is not a multiple of 4 and of the heads.
    """
    c, d, r = config, config.dim, config.rank
    if d % 4 or d % c.heads:
        raise ValueError(f"dim must be a multiple of 4 and of heads={c.heads}, got {d}")
    w = lambda i, o: rng.uniform(-1, 1, (i, o)) / np.sqrt(i)
    b = lambda i, o: rng.uniform(-1, 1, o) / np.sqrt(i)
    table = lambda rows, width=d: truncated_normal(rng, (rows, width)) / np.sqrt(d)
    zero, one = np.zeros(d), np.ones(d)
    block = lambda: BlockParams(
        one, zero, w(d, d), None, w(d, d), None, w(d, d), None, w(d, d), b(d, d), one, zero, w(d, 4 * d),
        b(d, 4 * d), w(4 * d, d), b(4 * d, d),
    )  # fmt: skip
    channels, spatial = shape_vocabulary(num_classes=c.num_classes, max_spatial=c.max_spatial, llm=c.llm)
    angle = np.arange(257)[:, None] / 10000 ** (np.arange(0, d, 2) / d)
    edges = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(257, d)
    edges[0] = 0
    encoder = GraphormerParams(
        table(101), table(101), table(1001), edges, w(2 * d, d), b(2 * d, d), w(d, c.heads), b(d, c.heads),
        tuple(block() for _ in range(c.layers)), *((one, zero) if c.final_norm else (None, None)),
    )  # fmt: skip
    sizes = ((d, 4 * d), (4 * d, 8 * d), (8 * d, 2 * r * r), (r, c.K))
    decoder = LowRankParams(*(x for i, o in sizes for x in (w(i, o), b(i, o))))
    half = d // 2
    vectors = VectorParams(w(d, 2 * d), b(d, 2 * d), w(2 * d, d) / 5, zero, w(half, c.num_classes),
                           b(half, c.num_classes)) if c.vectors else None  # fmt: skip
    shape = ShapeParams(table(len(channels) + 1, d // 4), table(len(spatial) + 1, d // 4))
    return GHNParams(table(len(OPS)), shape, encoder, decoder, vectors)


def count_parameters(config: GHNConfig):
    """{part: numbers} of the hypernetwork, the decoder's unused r x r layer included."""
    c, d, r = config, config.dim, config.rank
    channels, spatial = shape_vocabulary(num_classes=c.num_classes, max_spatial=c.max_spatial, llm=c.llm)
    return {
        "tables": (len(OPS) + 101 + 101 + 1001 + 257) * d + (len(channels) + len(spatial) + 2) * d // 4,
        "edge bias": 2 * d * d + d + d * c.heads + c.heads,
        "encoder": c.layers * (12 * d * d + 10 * d) + 2 * d * c.final_norm,
        "decoder": 36 * d * d + 12 * d + 2 * r * r * (8 * d + 1) + r * r + r + (r + 1) * c.K,
        "vectors": (4 * d * d + 3 * d + (d // 2 + 1) * c.num_classes) * c.vectors,
    }


def full_decoder_count(hid, width):
    """Numbers of a decoder d -> 4d -> 8d -> width^2 that writes a whole matrix at once, as GHN-3's."""
    return 36 * hid**2 + 12 * hid + (8 * hid + 1) * width**2
