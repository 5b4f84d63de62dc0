"""A pool of notes: tokens that deserve one are put into a fixed number of slots, and attention reads them.

Source: MemMamba 2025 (arXiv 2510.03279), which leaves the form of the scorer, its threshold and the priority
open: here the scorer is a small MLP with a sigmoid, and the priority is its score. A history is a `NotePool`
with an axis of chunks before the slots, n + 1 long: what each chunk of tokens sees, and the end.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear_vjp, mlp, mlp_vjp, sigmoid
from ref.blocks.softmax import softmax, softmax_vjp
from ref.checks import one_of
from ref.dims import dims, float64

POLICIES = ("fifo", "priority")
BEFORE = slice(None, -1)  # what the chunks see of a history: all but its end


class NoteParams(NamedTuple):
    """Scorer w1 [C, m], b1 [m], w2 [m], b2 []; w_summary [C, Ds]; w_q [C, Ds], w_k [Ds, Ds], w_v [Ds, C]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    w_summary: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray


class NotePool(NamedTuple):
    """K slots: summaries [..., K, Ds], priority [..., K], age [..., K]; a free slot holds 0, -inf and -1.

    age is the index of the token in the slot, priority its score.
    """

    summaries: np.ndarray
    priority: np.ndarray
    age: np.ndarray


class CrossParams(NamedTuple):
    """One map w_source [layers, Ds, Ds] for each layer that is read, and the attention w_q, w_k, w_v."""

    w_source: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray


def note_scores(x, params: NoteParams):
    """sigmoid(relu(x w1 + b1) . w2 + b2): how much a token deserves a note. x [..., T, C] -> [..., T]."""
    check_notes(x, params)
    return sigmoid(_scorer(float64(x), params))[..., 0]


def note_pool(x, params: NoteParams, *, capacity=50, threshold=0.5, policy="priority", chunk=1, pool0=None):
    """(context [..., T, C], pool): what each token reads of the pool as it was before its chunk, and the end.

    A token with a score above threshold enters, in the free slot of lowest index; where none is free, "fifo"
    overwrites the oldest and "priority" the lowest score, if the new one is strictly higher.
    Args: x [..., T, C]. chunk: tokens that read the same pool; 1 is the exact recurrence. pool0: NotePool to
      go on from; token indices go on from the largest age in it. A score of NaN is never accepted.
    Raises: ValueError naming the argument at fault.
    """
    check_notes(x, params, capacity, policy, chunk, pool0)
    x = float64(x)
    history = note_history(x, params, capacity, threshold, policy, chunk, pool0)
    return read_notes(x, history, params, chunk), pool_at(history, -1)


def cross_layer_attention(x, pools, params: CrossParams):
    """The same attention over the pools of lower layers, each mapped by its own w_source; x [..., T, C].

    pools: list of `NotePool` with the leading axes of x; 0 where all of them are empty.
    """
    check_cross(x, pools, params)
    keys = np.concatenate([p.summaries @ w for p, w in zip(pools, params.w_source, strict=True)], axis=-2)
    return _read(float64(x), keys, np.concatenate([p.age >= 0 for p in pools], axis=-1), params)


def note_history(x, p, capacity, threshold, policy, chunk, pool0=None):
    """The pool before each chunk and at the end, stacked: NotePool with [..., n + 1, K]."""
    scores, summaries = note_scores(x, p), x @ p.w_summary
    lead, T = x.shape[:-2], x.shape[-2]
    pool, seen = empty_pool(lead, capacity, p.w_summary.shape[1]) if pool0 is None else pool0, []
    first = pool.age.max(axis=-1) + 1
    for t in range(T):
        if t % chunk == 0:
            seen.append(pool)
        pool = insert_note(pool, scores[..., t], summaries[..., t, :], first + t, threshold, policy)
    seen.append(pool)
    summaries, priority, age = zip(*seen, strict=True)
    return NotePool(np.stack(summaries, axis=-3), np.stack(priority, axis=-2), np.stack(age, axis=-2))


def read_pool(x, pool, p):
    """What x [..., T, C] reads of one pool, [..., T, C]."""
    return _read(x, pool.summaries, pool.age >= 0, p)


def read_notes(x, history, p, chunk):
    """What each token of x [..., T, C] reads of its chunk's pool, [..., T, C]."""
    return _join(read_pool(_split(x, chunk), pool_at(history, BEFORE), p), x.shape)


def read_notes_vjp(u, p, history, chunk, dcontext, dpool):
    """(du, dparams) of the notes: every slot of every chunk hands its gradient to the token it holds."""
    seen = pool_at(history, BEFORE)
    du, dkeys, grads = _read_vjp(_split(u, chunk), seen.summaries, seen.age >= 0, p, _split(dcontext, chunk))
    dpool = dpool.copy()
    dpool[..., :-1, :, :] += dkeys
    (*lead, n, K, ds), T = dpool.shape, u.shape[-2]
    held = np.arange(T)[:, None] == history.age.reshape(*lead, 1, n * K)  # [..., T, n K]
    dsummary = held @ dpool.reshape(*lead, n * K, ds)
    summary, scores = u @ p.w_summary, note_scores(u, p)
    dscore = np.sum(dsummary * summary, axis=-1)  # straight-through
    dlogit = (dscore * scores * (1 - scores))[..., None]
    dnote, grads["w_summary"], _ = linear_vjp(u, p.w_summary, dsummary, bias=False)
    dscorer, grads["w1"], grads["b1"], dw2, db2 = mlp_vjp(u, p.w1, p.b1, p.w2[:, None], p.b2, dlogit,
                                                         activation="relu")  # fmt: skip
    return _join(du, u.shape) + dnote + dscorer, NoteParams(**grads, w2=dw2[:, 0], b2=db2[0])


def read_layers(x, histories, p, chunk):
    """`cross_layer_attention` of each chunk of x [..., T, C] over what it may see of the layers below."""
    pools = [pool_at(history, BEFORE) for history in histories]
    return _join(cross_layer_attention(_split(x, chunk), pools, p), x.shape)


def read_layers_vjp(u, histories, p, chunk, dcontext):
    """(du, cotangents of each history's summaries, dparams) of `read_layers`."""
    pools = [pool_at(history, BEFORE) for history in histories]
    mapped = [pool.summaries @ w for pool, w in zip(pools, p.w_source, strict=True)]
    occupied = np.concatenate([pool.age >= 0 for pool in pools], axis=-1)
    du, dkeys, grads = _read_vjp(
        _split(u, chunk), np.concatenate(mapped, axis=-2), occupied, p, _split(dcontext, chunk)
    )
    ends = np.cumsum([m.shape[-2] for m in mapped])[:-1]
    back = [
        linear_vjp(pool.summaries, w, d, bias=False)
        for pool, w, d in zip(pools, p.w_source, np.split(dkeys, ends, axis=-2), strict=True)
    ]
    grads["w_source"] = np.stack([b[1] for b in back])
    dsummaries = [np.zeros_like(history.summaries) for history in histories]
    for dsummary, b in zip(dsummaries, back, strict=True):
        dsummary[..., BEFORE, :, :] = b[0]
    return _join(du, u.shape), dsummaries, CrossParams(**grads)


def pool_at(history, index):
    """One entry of the axis of chunks, or a slice of it."""
    summaries, priority, age = history
    return NotePool(summaries[..., index, :, :], priority[..., index, :], age[..., index, :])


def insert_note(pool, score, summary, index, threshold, policy):
    """One token of each sequence. Free slots have the lowest age and priority, so they go first."""
    order = pool.age if policy == "fifo" else pool.priority
    slot = np.arange(order.shape[-1]) == order.argmin(axis=-1)[..., None]  # the first of equals
    accepted = score > threshold
    if policy == "priority":
        accepted = accepted & (score > order.min(axis=-1))
    at = slot & accepted[..., None]
    return NotePool(
        np.where(at[..., None], summary[..., None, :], pool.summaries),
        np.where(at, score[..., None], pool.priority),
        np.where(at, np.asarray(index)[..., None], pool.age).astype(np.int32),
    )


def _read(x, keys, occupied, p):
    """softmax((x w_q)(keys w_k)^T / sqrt(Ds)) keys w_v over the occupied slots; 0 where there is none."""
    return _weights(x, keys, occupied, p) @ keys @ p.w_v


def _weights(x, keys, occupied, p):
    logits = x @ p.w_q @ p.w_k.T @ np.swapaxes(keys, -1, -2) / np.sqrt(keys.shape[-1])
    return softmax(np.where(occupied[..., None, :], logits, -np.inf))


def _read_vjp(x, keys, occupied, p, dy):
    """(dx, dkeys, gradients of w_q, w_k, w_v by name)."""
    weights, q = _weights(x, keys, occupied, p), x @ p.w_q
    dread, dw_v, _ = linear_vjp(weights @ keys, p.w_v, dy, bias=False)
    dlogits = softmax_vjp(weights, dread @ np.swapaxes(keys, -1, -2)) / np.sqrt(keys.shape[-1])
    back = np.swapaxes(dlogits, -1, -2)
    dkeys = np.swapaxes(weights, -1, -2) @ dread + back @ (q @ p.w_k.T)
    dq, dw_k, _ = linear_vjp(q, p.w_k.T, dlogits @ keys, bias=False)
    dx, dw_q, _ = linear_vjp(x, p.w_q, dq, bias=False)
    return dx, dkeys, {"w_q": dw_q, "w_k": dw_k.T, "w_v": dw_v}


def _scorer(x, p):
    return mlp(x, p.w1, p.b1, p.w2[:, None], p.b2, activation="relu")


def empty_pool(lead, capacity, ds):
    """A NotePool of free slots: leading axes, slots, width of a summary."""
    shape = (*lead, capacity)
    return NotePool(np.zeros((*shape, ds)), np.full(shape, -np.inf), np.full(shape, -1, np.int32))


def _split(x, chunk):
    """[..., T, C] -> [..., n, chunk, C], zeros behind the last row."""
    T, n = x.shape[-2], -(-x.shape[-2] // chunk)
    x = np.concatenate([x, np.zeros((*x.shape[:-2], n * chunk - T, x.shape[-1]))], axis=-2)
    return x.reshape(*x.shape[:-2], n, chunk, x.shape[-1])


def _join(x, shape):
    """The reverse of `_split`: [..., n, chunk, C] -> [..., T, C]."""
    return x.reshape(*shape[:-2], x.shape[-3] * x.shape[-2], x.shape[-1])[..., : shape[-2], :]


def check_notes(x, p, capacity=1, policy="fifo", chunk=1, pool0=None):
    """Raise ValueError unless x [..., T, C] and the parameters, options and pool fit."""
    n = dims(x=(x, "... T C"), w1=(p.w1, "C m"), b1=(p.b1, "m"), w2=(p.w2, "m"), w_q=(p.w_q, "C Ds"),
             w_summary=(p.w_summary, "C Ds"), w_v=(p.w_v, "Ds C"))  # fmt: skip
    dims(w_k=(p.w_k, f"{n['Ds']} {n['Ds']}"))
    if n["Ds"] < 1 or capacity < 1 or chunk < 1:
        raise ValueError(
            f"summaries, capacity and chunk must be at least 1, got Ds={n['Ds']}, {capacity=}, {chunk=}"
        )
    one_of("policy", policy, POLICIES)
    if pool0 is not None:
        dims(x=(x, "... T C"), summaries=(pool0.summaries, f"... {capacity} {n['Ds']}"),
             priority=(pool0.priority, f"... {capacity}"), age=(pool0.age, f"... {capacity}"))  # fmt: skip


def check_cross(x, pools, p):
    """Raise ValueError unless x [..., T, C], the pools and the maps of their layers fit."""
    n = dims(
        x=(x, "... T C"), w_source=(p.w_source, "layers Ds Dt"), w_q=(p.w_q, "C Ds"), w_v=(p.w_v, "Ds C")
    )
    dims(w_k=(p.w_k, f"{n['Ds']} {n['Ds']}"), w_source=(p.w_source, f"{len(pools)} {n['Ds']} {n['Ds']}"))
    for i, pool in enumerate(pools):
        dims(
            x=(x, "... T C"),
            **{f"pools_{i}": (pool.summaries, f"... K {n['Ds']}"), "age": (pool.age, "... K")},
        )
