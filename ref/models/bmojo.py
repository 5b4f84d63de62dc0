"""B'MOJO's layer: parameters, the cache of a decoder, and how both start.

Source: B'MOJO 2024 (arXiv 2407.06324).
"""

from typing import NamedTuple

import numpy as np

from ref.models.mamba import MambaCache, MambaParams, init_mamba, init_mamba_cache


class BmojoParams(NamedTuple):
    """w_q [H, C, D], w_k, w_v [Hkv, C, D], w_o [H, D, C]; w_pred [C, C]; the mixer that makes fading tokens.

    w_q_fading, w_k_fading, w_v_fading: None where the fading path uses the same maps (tied). q_norm, k_norm
    [D]: gains of an RMS norm of queries and keys, or None.
    """

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    w_pred: np.ndarray
    mixer: MambaParams | None
    w_q_fading: np.ndarray | None = None
    w_k_fading: np.ndarray | None = None
    w_v_fading: np.ndarray | None = None
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None


class BmojoCache(NamedTuple):
    """What a step needs of the past, for sequences of leading axes `...` that have read `steps` tokens.

    k, v [..., Hkv, <= w, D] and scores [..., <= w] of the window; k_fading, v_fading [..., Hkv, <= 2w, D],
    of which the last w are not yet visible; the store: k_store, v_store [..., Hkv, K, D], score [..., K] and
    index [..., K] (-inf and -1 while free); the mixer's state and its last output y [..., C].
    """

    mixer: MambaCache
    y: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    k_fading: np.ndarray
    v_fading: np.ndarray
    k_store: np.ndarray
    v_store: np.ndarray
    score: np.ndarray
    index: np.ndarray
    steps: int


def init_bmojo(key, width, *, heads, kv_heads, state=16, tied=True) -> BmojoParams:
    """BmojoParams: normal maps within fan_in^-1/2, a predictor that predicts nothing, Mamba as a mixer.

    key: NumPy Generator or seed.
    """
    if width < 1 or heads < 1 or kv_heads < 1 or width % heads or heads % kv_heads:
        raise ValueError(
            f"heads must divide the width and kv_heads the heads, got {width=}, {heads=}, {kv_heads=}"
        )
    rng, D = np.random.default_rng(key), width // heads
    draw = lambda *shape: rng.standard_normal(shape) / np.sqrt(width)
    own = () if tied else (draw(heads, width, D), draw(kv_heads, width, D), draw(kv_heads, width, D))
    return BmojoParams(
        draw(heads, width, D), draw(kv_heads, width, D), draw(kv_heads, width, D), draw(heads, D, width),
        np.zeros((width, width)), init_mamba(rng, width, state=state), *own,
    )  # fmt: skip


def init_bmojo_cache(params, *, capacity=0, lead=()):
    """The cache before the first token."""
    (kv_heads, C, D), zeros = params.w_k.shape, lambda *shape: np.zeros((*lead, *shape))
    empty, store = zeros(kv_heads, 0, D), zeros(kv_heads, capacity, D)
    free = np.full((*lead, capacity), -np.inf), np.full((*lead, capacity), -1, np.int32)
    mixer = init_mamba_cache(params.mixer, lead)
    return BmojoCache(mixer, zeros(C), empty, empty, zeros(0), empty, empty, store, store, *free, 0)
