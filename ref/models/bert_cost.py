"""Sizes of a BERT encoder, and how many parameters they make."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BertConfig:
    """Sizes of an encoder; the defaults are BERT-base, uncased."""

    vocab: int = 30522
    positions: int = 512
    types: int = 2
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072


def encoder_parameters(config: BertConfig):
    """Parameters of the encoder with its pooler: 109,482,240 for BERT-base."""
    c, d = config, config.dim
    block = 4 * (d * d + d) + 2 * d * c.hidden + c.hidden + d + 4 * d
    return (c.vocab + c.positions + c.types) * d + 2 * d + c.depth * block + d * d + d
