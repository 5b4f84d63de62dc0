"""ATLAS's layer: parameters, what it carries on, and how both start.

Source: Behrouz et al. 2025 (arXiv 2505.23735).
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.monomials import feature_count
from ref.checks import check_num_heads

GATES_START = (0.98, 0.018, 0.88, 0.5)  # alpha, eta, theta, gamma: those of an open version, not the paper's
CONV = 4  # taps of the short convolution


class AtlasParams(NamedTuple):
    """w_q, w_k, w_v, w_out_gate, w_o [d, d]; conv_q, conv_k, conv_v [4, d], newest tap last; norm [d / H];
    w_gates [d, 4H] and b_gates [4H]: alpha of all heads, then eta, theta, gamma.
    """

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    conv_q: np.ndarray
    conv_k: np.ndarray
    conv_v: np.ndarray
    w_gates: np.ndarray
    b_gates: np.ndarray
    w_out_gate: np.ndarray
    norm: np.ndarray
    w_o: np.ndarray


class AtlasState(NamedTuple):
    """What a layer carries on: its memory, the tokens still in the window, the convolutions' inputs.

    memory and momentum [B, H, dv, D]; k, v [B, H, window-1, d / H] and gamma [B, H, window-1] of the last
    tokens (gamma 0 where there was none); conv, three times [B, 3, d].
    """

    memory: np.ndarray
    momentum: np.ndarray
    k: np.ndarray
    v: np.ndarray
    gamma: np.ndarray
    conv: tuple[np.ndarray, np.ndarray, np.ndarray]


def init_atlas(key, width, *, heads):
    """AtlasParams: normal weights of variance 1 / width, convolutions that pass the newest token on.

    The gates start near 0.98 (alpha), 0.018 (eta), 0.88 (theta), 0.5 (gamma). key: NumPy Generator or seed.
    """
    check_num_heads(width, heads, name="heads")
    rng = np.random.default_rng(key)
    square = lambda: rng.standard_normal((width, width)) / np.sqrt(width)
    newest = np.repeat(np.eye(CONV)[:, -1:], width, axis=1)
    start = np.repeat(GATES_START, heads)
    return AtlasParams(
        square(), square(), square(), newest, newest, newest,
        0.1 * rng.standard_normal((width, 4 * heads)) / np.sqrt(width), np.log(start / (1 - start)), square(),
        np.ones(width // heads), square(),
    )  # fmt: skip


def init_state(params, batch, *, heads, window, degree):
    """The AtlasState before the first token: zeros."""
    d, lead = params.w_q.shape[0], (batch, heads)
    D = feature_count(d // heads, degree)
    rows = np.zeros((*lead, max(window, 1) - 1, d // heads))
    memory, conv = np.zeros((*lead, d // heads, D)), np.zeros((batch, CONV - 1, d))
    return AtlasState(memory, memory, rows, rows, rows[..., 0], (conv, conv, conv))


def atlas_state_bytes(dk, dv, *, degree, window, dtype_bytes=4):
    """Bytes of one head's state, whatever the length of the text.

    Memory and momentum 2 dv D, window - 1 tokens of dk + dv + 1 numbers, three inputs of each convolution.
    """
    numbers = 2 * dv * feature_count(dk, degree) + (window - 1) * (dk + dv + 1) + (CONV - 1) * (2 * dk + dv)
    return dtype_bytes * numbers
