"""A store of tokens that were surprising: their scores, who is held when, and the archive of those who left.

Source: B'MOJO 2024 (arXiv 2407.06324) for the idea; no code of it is public, and the predictor, the score and
the rules of the store are ours.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.importance import top_indices
from ref.checks import at_least_one, one_of
from ref.dims import dims, float64

SELECT = ("topk", "threshold")


class Archive(NamedTuple):
    """What left the store of one sequence: index [N], k, v [Hkv, N, D], in the order of leaving."""

    index: np.ndarray
    k: np.ndarray
    v: np.ndarray


def innovation_scores(x, y, w_pred, *, eps=1e-6):
    """|x_t - y_{t-1} w_pred|^2 / (|x_t|^2 + eps): how badly the fading state foresaw a token (our choice).

    Args: x, y [..., T, C], w_pred [C, C]; y_{-1} = 0. Returns: [..., T].
    """
    e = _innovation(x, y, w_pred)
    return np.sum(e**2, axis=-1) / (np.sum(float64(x) ** 2, axis=-1) + eps)


def innovation_loss(x, y, w_pred, *, weight=0.1):
    """(weight mean_t |e_t|^2, its gradients for y and w_pred): trains the predictor; x is a fixed target."""
    e = _innovation(x, y, w_pred)
    de = 2 * weight * e / max(e[..., 0].size, 1)
    dy = np.zeros_like(e)
    dy[..., :-1, :] = -de[..., 1:, :] @ np.swapaxes(float64(w_pred), -1, -2)
    C = e.shape[-1]
    dw = -float64(y)[..., :-1, :].reshape(-1, C).T @ de[..., 1:, :].reshape(-1, C)
    return weight * np.sum(e**2) / max(e[..., 0].size, 1), dy, dw


def eidetic_members(scores, *, window, capacity, select="topk", threshold=None):
    """int32 [..., T, K], ascending and padded with -1: which tokens the store holds when query i looks.

    Token i - window has just left the window and is the candidate, taken before query i attends.
    "topk": the K best so far; of equal scores the smaller index goes. "threshold": enters if its score is
    above; the oldest leaves a full store. A score of NaN never enters.
    Args: scores [..., T].
    """
    T = dims(scores=(scores, "... T"))["T"]
    check_store(window, capacity, select, threshold)
    scores = float64(scores)
    members = np.full((*scores.shape, capacity), -1, np.int32)
    for at in np.ndindex(scores.shape[:-1]):
        n, store = scores[at], []
        for i in range(window, T):
            j = i - window
            if capacity and (not np.isnan(n[j]) if select == "topk" else n[j] > threshold):
                store.append(j)
            if len(store) > capacity:
                store.remove(min(store, key=lambda j: (n[j], j)) if select == "topk" else store[0])
            members[(*at, i)][: len(store)] = store
    return members


def evicted_tokens(members, *, window):
    """int32 [..., T]: the token that left the store, or was refused, as query i looked; -1 if none."""
    dims(members=(members, "... T K"))
    gone = np.full(members.shape[:-1], -1, np.int32)
    for at in np.ndindex(members.shape[:-2]):
        before = set()
        for i in range(window, members.shape[-2]):
            now = set(members[at][i][members[at][i] >= 0].tolist())
            left = (before | {i - window}) - now
            gone[(*at, i)] = left.pop() if left else -1
            before = now
    return gone


def store_insert(store, k, v, score, index, select, threshold):
    """The candidate of every sequence into its slot: free ones have the lowest score and index."""
    k_store, v_store, scores, held = store
    if scores.shape[-1] == 0:
        return store
    if select == "topk":
        slot = np.lexsort((held, scores), axis=-1)[..., 0]
        enters = score >= np.take_along_axis(scores, slot[..., None], axis=-1)[..., 0]
    else:
        slot, enters = held.argmin(axis=-1), score > threshold
    at = (np.arange(scores.shape[-1]) == slot[..., None]) & enters[..., None]
    heads = at[..., None, :, None]
    return (
        np.where(heads, k[..., None, :], k_store),
        np.where(heads, v[..., None, :], v_store),
        np.where(at, score[..., None], scores),
        np.where(at, index, held).astype(np.int32),
    )


def archive_add(archive, index, k, v):
    """The archive with one more token: index, k, v [Hkv, D]; archive None is an empty one."""
    index, k, v = np.array([index]), float64(k)[:, None, :], float64(v)[:, None, :]
    if archive is None:
        return Archive(index, k, v)
    dims(archive_k=(archive.k, "Hkv N D"), k=(k, "Hkv 1 D"), v=(v, "Hkv 1 D"))
    join = lambda a, b: np.concatenate([a, b], axis=-2)
    return Archive(np.concatenate([archive.index, index]), join(archive.k, k), join(archive.v, v))


def archive_lookup(archive, query, *, n_r):
    """(k, v [Hkv, n_r, D], mask [H, 1, n_r]): for each key head the n_r keys that suit a query [H, D] best.

    A group of query heads asks as one, by its largest product; equal ones in the order of the archive. The
    result goes into `bmojo_attention` as extra_k, extra_v, extra_mask, a few steps later than the query.
    """
    n = dims(k=(archive.k, "Hkv N D"), v=(archive.v, "Hkv N Dv"), query=(query, "H D"))
    if n["H"] % n["Hkv"] or n_r < 1:
        raise ValueError(f"need H={n['H']} a multiple of Hkv={n['Hkv']} and n_r >= 1, got n_r={n_r}")
    groups = float64(query).reshape(n["Hkv"], -1, n["D"])
    suits = (groups @ np.swapaxes(float64(archive.k), -1, -2)).max(axis=-2)  # [Hkv, N]
    best = np.stack([top_indices(row, min(n_r, n["N"])) for row in suits])[..., None]
    pad = lambda a: np.pad(np.take_along_axis(a, best, axis=-2), ((0, 0), (0, n_r - best.shape[-2]), (0, 0)))
    mask = np.broadcast_to(np.arange(n_r) < best.shape[-2], (n["H"], 1, n_r))
    return pad(float64(archive.k)), pad(float64(archive.v)), mask


def _innovation(x, y, w_pred):
    """e_t = x_t - y_{t-1} w_pred: of y_t itself the token would be no surprise."""
    dims(x=(x, "... T C"), y=(y, "... T C"), w_pred=(w_pred, "C C"))
    e = np.array(float64(x))
    e[..., 1:, :] -= float64(y)[..., :-1, :] @ float64(w_pred)
    return e


def check_store(window, capacity, select="topk", threshold=None):
    """Raise ValueError for a store that cannot be."""
    at_least_one(window=window)
    if capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    one_of("select", select, SELECT)
    if select == "threshold" and threshold is None:
        raise ValueError('select="threshold" needs a threshold')
