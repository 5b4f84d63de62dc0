"""PMI's memory layer and the two networks around it: parameters, how they start, their number.

Source: Zeng et al. 2023 (arXiv 2310.09297).
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.transformer import BlockParams, init_block
from ref.blocks.working_memory import WriteParams, gate_size


class ConsolidateParams(NamedTuple):
    """mix [S, N], slots to segments; a_q, a_k, a_v [D, D]; a1 [], the rate; a norm [D] of every row."""

    mix: np.ndarray
    a_q: np.ndarray
    a_k: np.ndarray
    a_v: np.ndarray
    a1: np.ndarray
    ln_scale: np.ndarray
    ln_bias: np.ndarray


class ReadParams(NamedTuple):
    """write: the maps of reading (None in PmiParams: those of its own writing); w_o [D, Din].

    w_l [N, S D], the readout of long-term memory, and a2 [], its share.
    """

    write: WriteParams | None
    w_l: np.ndarray
    a2: np.ndarray
    w_o: np.ndarray


class PmiParams(NamedTuple):
    """One layer's parameters; reading shares the maps of writing where read.write is None."""

    write: WriteParams
    consolidate: ConsolidateParams
    read: ReadParams


class PmiTransformerParams(NamedTuple):
    """One block and one memory for all layers.

    embed [V, D] (rows for ids, a map for vectors of width V), positions [T, D], w_head [D, K], b_head [K].
    """

    embed: np.ndarray
    positions: np.ndarray
    block: BlockParams
    pmi: PmiParams
    w_head: np.ndarray
    b_head: np.ndarray


class PmiCnnParams(NamedTuple):
    """Convolutions (w [out, in, 3, 3], b) of stride 2, a norm (scale, bias) of each, the last memories.

    w_head [C, K], b_head [K].
    """

    convs: tuple
    norms: tuple
    pmi: tuple[PmiParams, ...]
    w_head: np.ndarray
    b_head: np.ndarray


def init_memory(batch, slots, width, *, segments=5, init_std=0.0, key=0):
    """(wm [batch, slots, width], ltm [batch, segments, width, width]): rows and matrices of the identity.

    init_std: normal noise on the slots, of which those beyond the width start at 0. key: its seed.
    """
    if min(batch, slots, width, segments) < 1 or init_std < 0:
        given = f"{batch}, {slots}, {width}, {segments}, {init_std}"
        raise ValueError(f"batch, slots, width, segments must be >= 1, init_std >= 0, got {given}")
    wm = np.broadcast_to(np.eye(slots, width), (batch, slots, width))
    wm = wm + init_std * np.random.default_rng(key).standard_normal(wm.shape)
    return wm, np.broadcast_to(np.eye(width), (batch, segments, width, width)).copy()


def init_pmi(key, inputs, width, *, heads, slots, segments=5, gate="unit", std=None) -> PmiParams:
    """Weights normal with deviation std (None: 1 / sqrt(width)), forget bias 1, rate 0.1, share 0.5."""
    if min(heads, inputs, width, slots, segments) < 1 or width % heads:
        raise ValueError(
            "width must be a multiple of heads, all sizes at least 1, got "
            f"{width=}, {heads=}, {inputs=}, {slots=}, {segments=}"
        )
    rng, G, D = np.random.default_rng(key), gate_size(gate, width), width
    w = lambda *shape: (std or 1 / np.sqrt(width)) * rng.standard_normal(shape)
    one, zero = np.ones(D), np.zeros(D)
    write = WriteParams(
        w(inputs, D), zero, w(D, D), zero, w(D, D), zero, w(D, D), zero, w(D, D), zero, one, zero, one, zero,
        one, w(D, 2 * G), np.zeros(2 * G), w(slots, D, 2 * G), np.zeros((slots, 2 * G)), np.zeros(()),
        np.ones(()),
    )  # fmt: skip
    long = ConsolidateParams(w(segments, slots), w(D, D), w(D, D), w(D, D), np.array(0.1), one, zero)
    return PmiParams(write, long, ReadParams(None, w(slots, segments * D), np.array(0.5), w(D, inputs)))


def init_pmi_transformer(
    key, *, vocab, positions, width, classes, heads, slots, segments=5
) -> PmiTransformerParams:
    """Weights normal (embeddings 1 / sqrt(vocab), positions and head 0.1), MLP ratio 4."""
    rng = np.random.default_rng(key)
    return PmiTransformerParams(
        rng.standard_normal((vocab, width)) / np.sqrt(vocab), 0.1 * rng.standard_normal((positions, width)),
        init_block(rng, width, 4 * width, std=1 / np.sqrt(width)),
        init_pmi(rng, width, width, heads=heads, slots=slots, segments=segments),
        0.1 * rng.standard_normal((width, classes)), np.zeros(classes),
    )  # fmt: skip


def init_pmi_cnn(key, *, channels, stages, width, classes, heads, slots, segments=5) -> PmiCnnParams:
    """stages: channels after each convolution; the last two get a memory of the given width."""
    rng = np.random.default_rng(key)
    convs, c = [], channels
    for out in stages:
        convs.append((rng.standard_normal((out, c, 3, 3)) * np.sqrt(2 / (9 * c)), np.zeros(out)))
        c = out
    memories = tuple(
        init_pmi(rng, s, width, heads=heads, slots=slots, segments=segments) for s in stages[-2:]
    )
    norms = tuple((np.ones(s), np.zeros(s)) for s in stages)
    return PmiCnnParams(
        tuple(convs), norms, memories, 0.1 * rng.standard_normal((c, classes)), np.zeros(classes)
    )


def pmi_params(inputs, width, *, slots, segments, gate="unit"):
    """Numbers in the PmiParams of one layer (shared by all layers)."""
    D, G = width, gate_size(gate, width)
    write = inputs * D + D + 4 * (D * D + D) + 5 * D + D * 2 * G + 2 * G + slots * (D * 2 * G + 2 * G) + 2
    return write + segments * slots + 3 * D * D + 1 + 2 * D + slots * segments * D + 1 + D * inputs
