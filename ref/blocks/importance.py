"""How much attention each key gets, smoothed and ranked: what the methods that drop tokens go by."""

import numpy as np

from ref.blocks.attention import repeat_heads
from ref.blocks.masks import causal_mask
from ref.blocks.softmax import softmax
from ref.checks import at_least_one
from ref.dims import dims, float64

POOLS = ("max", "mean", None)


def window_attention(q, k, *, window, scale=None):
    """Causal attention probabilities of the last `window` queries: [..., H, window, S].

    Args: q [..., H, S, D], k [..., Hkv, S, D], H a multiple of Hkv. scale None is 1 / sqrt(D).
    Raises: ValueError naming the argument at fault.
    """
    n = dims(q=(q, "... H S D"), k=(k, "... Hkv S D"))
    if n["Hkv"] == 0 or n["H"] % n["Hkv"]:
        raise ValueError(f"q has H={n['H']} heads, not a multiple of the Hkv={n['Hkv']} heads of k")
    if not 1 <= window <= n["S"]:
        raise ValueError(f"window must be in 1..{n['S']}, got {window}")
    q, k = float64(q[..., -window:, :]), repeat_heads(float64(k), n["H"])
    scores = (1 / np.sqrt(n["D"]) if scale is None else scale) * q @ np.swapaxes(k, -1, -2)
    return softmax(np.where(causal_mask(window, n["S"]), scores, -np.inf))


def pool_scores(scores, *, pool, kernel):
    """The maximum or mean over `kernel` neighbours, (kernel - 1) // 2 of them to the left.

    scores [..., S] >= 0. Beyond the ends stand zeros, which the mean counts. pool None returns the scores.
    Raises: ValueError for another pool or a kernel below 1.
    """
    if pool not in POOLS:
        raise ValueError(f'pool must be "max", "mean" or None, got {pool!r}')
    at_least_one(kernel=kernel)
    scores = float64(scores)
    if pool is None:
        return scores
    left = (kernel - 1) // 2
    padded = np.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(left, kernel - 1 - left)])
    around = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1)
    return around.max(axis=-1) if pool == "max" else around.sum(axis=-1) / kernel


def without_smallest(x, count):
    """bool, the shape of x: False for its `count` smallest entries, of equals the first in flat order."""
    keep = np.ones(x.size, bool)
    keep[np.argsort(x, axis=None, kind="stable")[:count]] = False
    return keep.reshape(x.shape)


def top_indices(scores, count):
    """The indices of the `count` largest along the last axis, falling; of equals the lowest first. int32."""
    return np.argsort(-float64(scores), axis=-1, kind="stable")[..., :count].astype(np.int32)
