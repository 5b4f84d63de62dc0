"""The encoder of Long Range Arena with any kind of attention: sizes, parameters, and what a text costs.

Source: Tay et al. 2020 (arXiv 2011.04006); Brown et al. 2022 (arXiv 2210.00640).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ref.blocks.attention_kinds import MASKED, attention_mask
from ref.blocks.linear_attention import orthogonal_features
from ref.blocks.masks import bigbird_rand_blocks
from ref.blocks.transformer import BlockParams, init_block

# what init_encoder draws for a kind, with its default size
INIT_ONLY = {
    "bigbird": {"num_rand": 3},
    "linformer": {"rank": 32},
    "performer": {"features": 256},
    "synthesizer": {"rank": 32},
}


@dataclass(frozen=True)
class WideConfig:
    """An encoder of `layers` blocks with `heads` heads of head_dim each, whatever dim is.

    options: those of the kind (see `attend`), and for what `init_encoder` draws: bigbird num_rand (3),
    linformer and synthesizer rank (32), performer features (256). pair: two texts and one answer.
    """

    layers: int
    heads: int
    dim: int
    head_dim: int
    mlp_dim: int
    vocab: int = 256
    max_length: int = 1024
    num_classes: int = 2
    kind: str = "dense"
    options: dict | None = field(default=None, hash=False)
    pair: bool = False


class EncoderParams(NamedTuple):
    """word [V, d], cls [d], blocks, extras (a dict a block), final norm [d], head [d or 4 d, f], [f, n]."""

    word: np.ndarray
    cls: np.ndarray
    blocks: tuple[BlockParams, ...]
    extras: tuple[dict, ...]
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    w_hidden: np.ndarray
    b_hidden: np.ndarray
    w_out: np.ndarray
    b_out: np.ndarray


def init_encoder(rng, config: WideConfig) -> EncoderParams:
    """Drawn by a NumPy Generator: normal weights of deviation fan_in^-1/2, embeddings dim^-1/2, biases 0."""
    c = config
    normal = lambda *shape: rng.standard_normal(shape) / np.sqrt(shape[0])
    inner = c.heads * c.head_dim
    blocks = tuple(
        init_block(rng, c.dim, c.mlp_dim)._replace(
            w_q=normal(c.dim, inner), w_k=normal(c.dim, inner), w_v=normal(c.dim, inner),
            w_o=normal(inner, c.dim), b_q=None, b_k=None, b_v=None, b_o=None,
            w_fc1=normal(c.dim, c.mlp_dim), w_fc2=normal(c.mlp_dim, c.dim),
        )
        for _ in range(c.layers)
    )  # fmt: skip
    width = 4 * c.dim if c.pair else c.dim
    return EncoderParams(
        word=rng.standard_normal((c.vocab, c.dim)) / np.sqrt(c.dim),
        cls=rng.standard_normal(c.dim) / np.sqrt(c.dim),
        blocks=blocks,
        extras=tuple(_init_extras(rng, c) for _ in range(c.layers)),
        ln_scale=np.ones(c.dim),
        ln_bias=np.zeros(c.dim),
        w_hidden=normal(width, c.mlp_dim),
        b_hidden=np.zeros(c.mlp_dim),
        w_out=normal(c.mlp_dim, c.num_classes),
        b_out=np.zeros(c.num_classes),
    )


def count_params(config, *, weights_only=True):
    """Numbers in the maps of attention and MLP of all layers: L (4 d H D + 2 d f).

    Without weights_only every learned number: also embeddings, class token, norms, biases, head, and the
    learned extras of linformer and synthesizer.
    """
    c = config
    weights = c.layers * (4 * c.dim * c.heads * c.head_dim + 2 * c.dim * c.mlp_dim)
    if weights_only:
        return weights
    learned = {"linformer": 2, "synthesizer": 2 * c.heads}.get(c.kind, 0)
    extras = learned and learned * padded_length(c, c.max_length) * _init_options(c)["rank"]
    width = 4 * c.dim if c.pair else c.dim
    head = (width + 1) * c.mlp_dim + (c.mlp_dim + 1) * c.num_classes
    small = 4 * c.dim + c.mlp_dim + c.dim  # two norms, two biases of the MLP
    return weights + c.layers * (small + extras) + (c.vocab + 1) * c.dim + 2 * c.dim + head


def count_flops(config, length):
    """FLOPs of one text of `length` tokens through the layers: 2 a multiply-accumulate of maps and scores.

    Kinds with a mask count the pairs that are seen (bigbird: with num_rand random blocks a row); the class
    token and padding to blocks are included, embeddings, norms, softmax and head are not.
    """
    attention, feed = _layer_macs(config, length)
    return 2 * config.layers * (attention + feed)


def activation_numbers(config, length):
    """Numbers that a dense encoder keeps for the backward pass of one text: all layers' activations.

    A layer keeps x, both norms' outputs and the sum between them (4 T d), q, k, v and the heads' output
    (4 T H D), the weights (H T^2) and the hidden layer before and after its GELU (2 T f).
    """
    c, T = config, padded_length(config, length)
    inner = c.heads * c.head_dim
    return c.layers * (4 * T * c.dim + 4 * T * inner + c.heads * T**2 + 2 * T * c.mlp_dim)


@dataclass(frozen=True)
class Machine:
    """flops_per_s, bytes_per_s: of multiply-adds and of main memory; sync_s: between dependent parts."""

    flops_per_s: float
    bytes_per_s: float
    sync_s: float


def latency_model(config, length, machine: Machine, *, itemsize=4):
    """Seconds of one text: max(compute, weight bytes / bandwidth) + sync for attention and MLP of each layer.

    A model, not a measurement: activations are taken to stay on the chip.
    """
    c = config
    weights = (4 * c.dim * c.heads * c.head_dim, 2 * c.dim * c.mlp_dim)
    part = lambda macs, w: max(2 * macs / machine.flops_per_s, itemsize * w / machine.bytes_per_s)
    layer = sum(
        part(macs, w) + machine.sync_s for macs, w in zip(_layer_macs(c, length), weights, strict=True)
    )
    return c.layers * layer


def _init_options(c):
    return {**INIT_ONLY.get(c.kind, {}), **(c.options or {})}


def padded_length(c, length):
    """Tokens read for a text: one more for the class, whole blocks for sinkhorn and bigbird.

    bigbird always reads max_length, since its random blocks are drawn once.
    """
    length = c.max_length if c.kind == "bigbird" else length
    block = (c.options or {}).get("block", 1) if c.kind in ("bigbird", "sinkhorn") else 1
    return -(-(length + 1) // block) * block


def _init_extras(rng, c):
    """The arrays that one layer's kind needs, for texts up to max_length."""
    o, T = _init_options(c), padded_length(c, c.max_length)
    if c.kind == "linformer":
        return {name: rng.standard_normal((T, o["rank"])) / np.sqrt(T) for name in ("e_k", "e_v")}
    if c.kind == "performer":
        return {"proj": orthogonal_features(rng, o["features"], c.head_dim)}
    if c.kind == "synthesizer":
        shapes = {"r1": (c.heads, T, o["rank"]), "r2": (c.heads, o["rank"], T)}
        return {name: rng.standard_normal(shape) / np.sqrt(o["rank"]) for name, shape in shapes.items()}
    nb = T // o["block"] if c.kind == "bigbird" else 0
    if nb > 5:  # fewer blocks leave none to draw
        uniforms = rng.random((c.heads, nb - 2, nb))
        return {"rand_blocks": bigbird_rand_blocks(uniforms, num_rand=min(o["num_rand"], nb - 5))}
    return {}


def _layer_macs(c, length):
    """(attention, MLP) multiply-accumulates of one layer."""
    T, D, o = padded_length(c, length), c.head_dim, _init_options(c)
    maps = 4 * T * c.dim * c.heads * D
    if c.kind in MASKED:
        pattern = attention_mask(c.kind, T, **{n: x for n, x in o.items() if n != "num_rand"})
        pairs = int(pattern.sum())
        if c.kind == "bigbird":
            nb = T // o["block"]
            pairs += max(nb - 2, 0) * min(o["num_rand"], max(nb - 5, 0)) * o["block"] ** 2
        head = 2 * pairs * D
    elif c.kind == "dense":
        head = 2 * T * T * D
    elif c.kind == "linformer":
        head = 4 * T * o["rank"] * D
    elif c.kind == "linear":
        head = 2 * T * D * D + T * D
    elif c.kind == "performer":
        head = 4 * T * o["features"] * D + T * o["features"]
    elif c.kind == "sinkhorn":
        nb = T // o["block"]
        head = nb * nb * D + 2 * nb * T * D + 4 * T * o["block"] * D
    else:
        head = T * T * (o["rank"] + D)
    return maps + c.heads * head, 2 * T * c.dim * c.mlp_dim
