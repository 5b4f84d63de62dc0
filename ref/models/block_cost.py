"""Parameters and multiply-accumulates of a transformer block and of five lighter ones."""

from typing import NamedTuple

import numpy as np

from ref.blocks.separable import squeeze_width
from ref.checks import one_of


class Cost(NamedTuple):
    """Parameters of a block, and its multiply-accumulates on one input."""

    params: int
    macs: int


def block_cost(kind, *, shape, **sizes):
    """Cost(params, macs) of one block on one input, biases and norms included.

    kind, shape and sizes: "standard" [N, D]: hidden. "mobilevit" [H, W, C]: dim, hidden, depth, patch=2.
      "albert" [N, D]: hidden, embed, layers, groups=1, vocab=0. "fnet" [N, D]: hidden, transform="matrix"
      (two real products) or "fft" (5 N D log2(N D) operations, two a multiply-add). "lsra" [N, D]: heads,
      kernel. "separable_mlp" [H, W, d]: ratio, kernel=3, squeeze=False.
    Raises: ValueError for another kind; TypeError for sizes that are not its own.
    """
    one_of("kind", kind, COSTS)
    return Cost(*COSTS[kind](*shape, **sizes))


def _standard_cost(N, D, *, hidden):
    return 4 * D**2 + 2 * D * hidden + 9 * D + hidden, N * (4 * D**2 + 2 * D * hidden) + 2 * N**2 * D


def _mobilevit_cost(H, W, C, *, dim, hidden, depth, patch=2):
    N, own = H * W, 27 * C**2 + 2 * C * dim
    layer, per_token = _standard_cost(1, dim, hidden=hidden)
    attention = 2 * N * (N // patch**2) * dim
    macs = N * (own + depth * (per_token - 2 * dim)) + depth * attention
    return own + 6 * C + 2 * dim + depth * layer, macs


def _albert_cost(N, D, *, hidden, embed, layers, groups=1, vocab=0):
    params, macs = _standard_cost(N, D, hidden=hidden)
    return vocab * embed + embed * D + D + groups * params, N * embed * D + layers * macs


def _fnet_cost(N, D, *, hidden, transform="matrix"):
    mixing = {"matrix": 2 * N * D * (N + D), "fft": round(2.5 * N * D * np.log2(N * D))}
    if transform not in mixing:
        raise ValueError(f'transform must be "matrix" or "fft", got {transform!r}')
    return 2 * D * hidden + 5 * D + hidden, 2 * N * D * hidden + mixing[transform]


def _lsra_cost(N, D, *, heads, kernel):
    half = even_width(D) // 2
    maps = 4 * half**2 + half * D + half**2 + 2 * D**2  # attention, gate, output, MLP
    biases = 4 * half + D + half + 2 * D
    return maps + biases + heads * kernel + 4 * D, N * (maps + kernel * half) + 2 * N**2 * half


def _separable_cost(H, W, d, *, ratio, kernel=3, squeeze=False):
    wide = ratio * d
    maps, narrow = 2 * wide * d + kernel**2 * wide, squeeze_width(wide) if squeeze else 0
    gate = 2 * wide * narrow
    return maps + 4 * wide + 2 * d + gate + (narrow + wide) * squeeze, H * W * maps + gate


COSTS = {
    "standard": _standard_cost,
    "mobilevit": _mobilevit_cost,
    "albert": _albert_cost,
    "fnet": _fnet_cost,
    "lsra": _lsra_cost,
    "separable_mlp": _separable_cost,
}


def even_width(D):
    """D. Raises: ValueError unless it can be cut in halves."""
    if D % 2:
        raise ValueError(f"the width must be even to be cut in halves, got D={D}")
    return D
