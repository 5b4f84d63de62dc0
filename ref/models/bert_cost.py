"""Sizes of a BERT encoder, how many parameters they make, and the products of a forward pass."""

from dataclasses import dataclass

from ref.blocks.transformer import block_parameters


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
    """Parameters of the encoder with its token types and pooler: 109,482,240 for BERT-base."""
    c, d = config, config.dim
    tables = (c.vocab + c.positions + c.types) * d + 2 * d  # and their norm
    return tables + c.depth * block_parameters(d, c.hidden) + d * d + d


def encoder_macs(tokens, *, depth, dim, hidden):
    """Multiply-accumulates of the blocks over a text: depth (n (4 d^2 + 2 d hidden) + 2 n^2 d), 2 FLOPs each.

    Embeddings, norms, biases, softmax and GELU are not counted.
    """
    return depth * (tokens * (4 * dim**2 + 2 * dim * hidden) + 2 * tokens**2 * dim)
