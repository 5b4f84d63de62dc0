"""GTrXL's network: parameters, its memory, how both start, and how many numbers there are.

Source: Parisotto et al. 2020 (arXiv 1910.06764).
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.relative import RelativeParams, init_relative
from ref.checks import one_of

GATES = ("gru", "output", "highway", "sigtanh", "input", None)
MAPS = {"gru": ("w_r", "u_r", "w_z", "u_z", "w_g", "u_g"), "sigtanh": ("w", "u")}  # other kinds have w alone


class GateParams(NamedTuple):
    """Maps [D, D] without bias, rows times matrix, and b [D]; a kind of gate has the fields it needs.

    "gru": w_r, u_r, w_z, u_z, w_g, u_g, b. Others: w, with b but for "input", with u for "sigtanh".
    """

    w_r: np.ndarray | None = None
    u_r: np.ndarray | None = None
    w_z: np.ndarray | None = None
    u_z: np.ndarray | None = None
    w_g: np.ndarray | None = None
    u_g: np.ndarray | None = None
    b: np.ndarray | None = None
    w: np.ndarray | None = None
    u: np.ndarray | None = None


class GTrXLBlockParams(NamedTuple):
    """attn; layer norms [D]; the MLP w_1 [D, F], w_2 [F, D]; a gate after each, None for plain sums."""

    attn: RelativeParams
    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    w_1: np.ndarray
    b_1: np.ndarray
    w_2: np.ndarray
    b_2: np.ndarray
    gate_attn: GateParams | None = None
    gate_mlp: GateParams | None = None


class GTrXLParams(NamedTuple):
    """Embedding relu(x w_embed + b_embed), or none; u, v_bias [H, dh], of all layers; the blocks."""

    w_embed: np.ndarray | None
    b_embed: np.ndarray | None
    u: np.ndarray
    v_bias: np.ndarray
    blocks: tuple[GTrXLBlockParams, ...]


class GTrXLMemory(NamedTuple):
    """slots [B, L, M, D], the last M inputs of every layer; valid bool [B, M], True = may be attended to."""

    slots: np.ndarray
    valid: np.ndarray


def init_gate(key, width, *, kind="gru", bias=2.0):
    """GateParams with maps of variance 1 / width and every b = bias; None for kind None."""
    one_of("gate", kind, GATES)
    if kind is None:
        return None
    rng = np.random.default_rng(key)
    square = lambda: rng.standard_normal((width, width)) / np.sqrt(width)
    b = None if kind == "input" else np.full(width, float(bias))
    return GateParams(b=b, **{name: square() for name in MAPS.get(kind, ("w",))})


def init_gtrxl(key, *, inputs, width, layers, heads, head_dim, gate="gru", hidden=None, bias=None):
    """GTrXLParams: weights of variance 1 / rows, u = v_bias = 0, gates' bias 2 ("gru") or 1 unless given.

    inputs: width of x, or None for no embedding. hidden: of the MLP, `width` if None.
    """
    one_of("gate", gate, GATES)
    if min(width, layers, heads, head_dim) < 1 or width % 2:
        given = f"{width=}, {layers=}, {heads=}, {head_dim=}"
        raise ValueError(f"width must be even, layers, heads and head_dim at least 1, got {given}")
    rng, F = np.random.default_rng(key), hidden or width
    bias = (2.0 if gate == "gru" else 1.0) if bias is None else bias
    w = lambda a, b: rng.standard_normal((a, b)) / np.sqrt(a)
    one, zero = np.ones(width), np.zeros(width)

    def block():
        attn = init_relative(rng, width, heads, head_dim, std=1 / np.sqrt(width))
        gates = (init_gate(rng, width, kind=gate, bias=bias) for _ in range(2))
        return GTrXLBlockParams(
            attn, one, zero, one, zero, w(width, F), np.zeros(F), w(F, width), zero, *gates
        )

    embed = (None, None) if inputs is None else (w(inputs, width), zero)
    flat = np.zeros((heads, head_dim))
    return GTrXLParams(*embed, flat, flat, tuple(block() for _ in range(layers)))


def init_memory(batch, *, layers, length, width, mask_empty=True):
    """GTrXLMemory of zeros. mask_empty: slots never written are not attended to; else they act as keys."""
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    return GTrXLMemory(np.zeros((batch, layers, length, width)), np.full((batch, length), not mask_empty))


def gate_params(width, kind):
    """Numbers in a gate: 6 D^2 + D for "gru"; D^2, 2 D^2 for "sigtanh", and D of b but for "input"."""
    one_of("gate", kind, GATES)
    if kind is None:
        return 0
    return len(MAPS.get(kind, ("w",))) * width**2 + (0 if kind == "input" else width)


def gtrxl_params(width, *, layers, heads, head_dim, hidden, gate):
    """Numbers in all layers, without biases in attention and without the embedding."""
    attention = 5 * width * heads * head_dim
    mlp = 2 * width * hidden + hidden + width
    return layers * (attention + mlp + 4 * width + 2 * gate_params(width, gate)) + 2 * heads * head_dim
