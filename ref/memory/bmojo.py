"""B'MOJO: one softmax over a window, a fading memory behind it, and a store of tokens that were surprising.

Source: B'MOJO 2024 (arXiv 2407.06324); the fading variant follows the authors' later code
(awslabs/hybrid-model-factory). No code of the eidetic store is public: the predictor, the score and the
rules of the store are ours. Weights hold one matrix [in, out] a head: w_q [H, C, D], w_o [H, D, C].
"""

from functools import reduce
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import check_attention, repeat_heads, sum_groups
from ref.blocks.eidetic import (
    Archive,
    archive_add,
    archive_lookup,
    check_store,
    eidetic_members,
    evicted_tokens,
    innovation_loss,
    innovation_scores,
    store_insert,
)
from ref.blocks.masks import window_mask
from ref.blocks.norms import rms_norm, rms_norm_vjp
from ref.blocks.rope import rope, rope_angles
from ref.blocks.softmax import finalize, merge, softmax_state
from ref.checks import at_least_one
from ref.dims import dims, float64
from ref.example import Example
from ref.models.bmojo import BmojoCache, BmojoParams, init_bmojo, init_bmojo_cache
from ref.models.mamba import mamba_block, mamba_block_vjp, mamba_step
from ref.tasks.sequences import mqar_task, selective_copy_task

__all__ = [
    "Archive", "BmojoCache", "BmojoParams", "archive_add", "archive_lookup", "bmojo_attention",
    "bmojo_attention_vjp", "bmojo_cache_bytes", "bmojo_fading_attention", "bmojo_fading_attention_vjp",
    "bmojo_keys", "bmojo_layer", "bmojo_layer_vjp", "bmojo_step", "eidetic_members", "evicted_tokens",
    "example", "init_bmojo", "init_bmojo_cache", "innovation_loss", "innovation_scores", "mqar_task",
    "selective_copy_task",
]  # fmt: skip


def bmojo_fading_attention(q, k, v, q_fading, k_fading, v_fading, *, window, scale=None, return_lse=False):
    """One softmax of query i over the keys j in [i-w+1, i] and the fading keys j in [i-2w+1, i-w].

    Args: q, q_fading [..., H, T, D]; k, v, k_fading, v_fading [..., Hkv, T, D], full length, not shifted.
      scale: None is D^-1/2.
    Returns: o [..., H, T, D] float64, and with return_lse (o, lse [..., H, T]) of both paths together.
    Raises: ValueError naming the argument at fault.
    """
    streams, scale, _ = _streams(q, k, v, k_fading, v_fading, None, window, q_fading, scale)
    o, lse = _joint(streams, scale)
    return (o, lse) if return_lse else o


def bmojo_fading_attention_vjp(q, k, v, q_fading, k_fading, v_fading, do, *, window, scale=None):
    """Gradients of the six arrays, q and q_fading apart, for do [..., H, T, D]."""
    g = bmojo_attention_vjp(
        q, k, v, k_fading, v_fading, None, do, window=window, q_fading=q_fading, scale=scale
    )
    return g["q"], g["k"], g["v"], g["q_fading"], g["k_fading"], g["v_fading"]


def bmojo_attention(q, k, v, k_fading, v_fading, members, *, window, q_fading=None, scale=None, extra_k=None,
                    extra_v=None, extra_mask=None, fading="window", stride=1, count=None):  # fmt: skip
    """One softmax over the window, the fading keys, the tokens in the store, and extra keys.

    Args: as `bmojo_fading_attention`; q_fading None is q; k_fading = v_fading = None: no fading path.
      members: int [..., T, K], what is in the store when query i looks (-1 is nothing), or None: no store.
      extra_k, extra_v [..., Hkv, M, D], extra_mask: True = may be seen, broadcastable to [..., H, T, M].
      fading: "window", or "strided": fading keys i-w, i-w-stride, ..., `count` of them (None: all).
    Every query sees itself. Raises: ValueError naming the argument at fault.
    """
    streams, scale, _ = _streams(q, k, v, k_fading, v_fading, members, window, q_fading, scale, extra_k,
                                 extra_v, extra_mask, fading, stride, count)  # fmt: skip
    return _joint(streams, scale)[0]


def bmojo_attention_vjp(q, k, v, k_fading, v_fading, members, do, *, window, q_fading=None, scale=None,
                        extra_k=None, extra_v=None, extra_mask=None, fading="window", stride=1,
                        count=None):  # fmt: skip
    """{argument: gradient} of `bmojo_attention` for do [..., H, T, D]; without q_fading q has both parts.

    All paths share P = exp(s - lse) with the lse of the union, and dS = P (dO V^T - sum(dO O)).
    """
    streams, scale, kv_heads = _streams(q, k, v, k_fading, v_fading, members, window, q_fading, scale,
                                        extra_k, extra_v, extra_mask, fading, stride, count)  # fmt: skip
    o, lse = _joint(streams, scale)
    dims(q=(q, "... T D"), do=(do, "... T Dv"))
    do, grads = float64(do), {}
    total = np.sum(do * o, axis=-1, keepdims=True)
    for (query, key, value), (q_i, k_i, v_i, mask) in streams.items():
        p = np.exp(_logits(q_i, k_i, mask, scale) - lse[..., None])
        ds = scale * p * (do @ np.swapaxes(v_i, -1, -2) - total)
        grads[query] = grads.get(query, 0.0) + ds @ k_i
        grads[key] = sum_groups(np.swapaxes(ds, -1, -2) @ q_i, kv_heads)
        grads[value] = sum_groups(np.swapaxes(p, -1, -2) @ do, kv_heads)
    return grads


def bmojo_layer(x, params: BmojoParams, *, window, capacity=0, select="topk", threshold=None, mixer=None,
                tied=True, rope_base=None):  # fmt: skip
    """The layer over x [..., T, C] -> [..., T, C]: fading tokens y = mixer(x), their attention, and w_o.

    mixer: a causal map of x in place of params.mixer. tied: y goes through w_k, w_v and meets the queries of
      x; else through maps of its own. rope_base: rotary positions of both paths, None for none.
    Raises: ValueError naming the argument at fault.
    """
    check_layer(x, params, window, capacity, select, threshold, tied)
    x = float64(x)
    y = mamba_block(x, params.mixer) if mixer is None else float64(mixer(x))
    heads, members, _ = _layer_parts(x, y, params, window, capacity, select, threshold, tied, rope_base)
    o = bmojo_attention(**heads, members=members, window=window)
    return np.sum(o @ params.w_o, axis=-3)


def bmojo_layer_vjp(x, params: BmojoParams, dy, *, window, capacity=0, select="topk", threshold=None,
                    tied=True, rope_base=None, predict=0.0):  # fmt: skip
    """(dx, dparams) of `bmojo_layer` with Mamba for dy [..., T, C]; plus the loss of the predictor.

    Which tokens are stored carries no gradient; their keys and values do. predict: weight of
    `innovation_loss`, the only teacher of w_pred.
    """
    check_layer(x, params, window, capacity, select, threshold, tied)
    dims(x=(x, "... T C"), dy=(dy, "... T C"))
    p, x, dout = params, float64(x), float64(dy)
    y = mamba_block(x, p.mixer)
    heads, members, projections = _layer_parts(x, y, p, window, capacity, select, threshold, tied, rope_base)
    o = bmojo_attention(**heads, members=members, window=window)
    do = dout[..., None, :, :] @ np.swapaxes(p.w_o, -1, -2)
    grads = bmojo_attention_vjp(**heads, members=members, window=window, do=do)
    weights = {name: np.zeros_like(w) for name, w in p._asdict().items() if isinstance(w, np.ndarray)}
    weights["w_o"] = _per_head(o, dout[..., None, :, :])
    d = {"x": np.zeros_like(x), "y": np.zeros_like(x)}
    for name, projection in projections.items():
        source, dsource, dw, dgain = _project_vjp(grads[name], projection, p, rope_base)
        d[source] = d[source] + dsource
        weights[projection.weight] += dw
        if dgain is not None:
            weights[projection.norm] += dgain
    _, dpredict, dw_pred = innovation_loss(x, y, p.w_pred, weight=predict)
    weights["w_pred"] = dw_pred
    dx, dmixer = mamba_block_vjp(x, p.mixer, d["y"] + dpredict)
    return d["x"] + dx, BmojoParams(**{n: weights.get(n) for n in BmojoParams._fields} | {"mixer": dmixer})


def bmojo_step(x_t, cache: BmojoCache, params: BmojoParams, *, window, capacity=0, select="topk",
               threshold=None, rope_base=None):  # fmt: skip
    """(y_t [..., C], cache) for one token x_t [..., C]: 2 window + capacity keys are read, at any length.

    The fading path has its own maps if params.w_k_fading is there (untied).
    """
    check_layer(x_t[..., None, :], params, window, capacity, select, threshold, params.w_k_fading is None)
    if cache.index.shape[-1] != capacity:
        raise ValueError(f"capacity is {capacity}, but the cache has a store of {cache.index.shape[-1]}")
    p, c, x = params, cache, float64(x_t)
    y, mixer = mamba_step(x, c.mixer, p.mixer)
    predicted = np.stack([c.y, y], axis=-2)
    score = innovation_scores(np.stack([x, x], axis=-2), predicted, p.w_pred)[..., 1]
    q, k, v, q_f, k_f, v_f = (
        _project(pr, p, rope_base, start=c.steps)
        for pr in _projections(x[..., None, :], y[..., None, :], p, p.w_k_fading is None).values()
    )
    join = lambda old, new, axis=-2: np.concatenate([old, new], axis=axis)
    k, v, scores = join(c.k, k), join(c.v, v), join(c.scores, score[..., None], -1)
    store = (*float64(c.k_store, c.v_store, c.score), c.index)
    if k.shape[-2] > window:  # token steps - window leaves and is the candidate
        store = store_insert(
            store, k[..., 0, :], v[..., 0, :], scores[..., 0], c.steps - window, select, threshold
        )
        k, v, scores = k[..., 1:, :], v[..., 1:, :], scores[..., 1:]
    k_f, v_f = join(c.k_fading, k_f)[..., -2 * window :, :], join(c.v_fading, v_f)[..., -2 * window :, :]
    old = slice(None, max(k_f.shape[-2] - window, 0))
    held = np.repeat((store[3] >= 0)[..., None, :], p.w_q.shape[0], axis=-2)[..., None, :]  # [..., H, 1, K]
    rep = lambda a: repeat_heads(a, p.w_q.shape[0])
    streams = {
        "window": (q, rep(k), rep(v), True),
        "fading": (q_f, rep(k_f[..., old, :]), rep(v_f[..., old, :]), True),
        "store": (q, rep(store[0]), rep(store[1]), held),
    }
    o, _ = _joint(streams, q.shape[-1] ** -0.5)
    y_t = np.sum(o @ p.w_o, axis=-3)[..., 0, :]
    return y_t, BmojoCache(mixer, y, k, v, scores, k_f, v_f, *store, c.steps + 1)


def bmojo_keys(t, *, window, capacity):
    """How many keys query t reads: min(t+1, w) of the window, up to w fading ones, up to K of the store."""
    check_store(window, capacity)
    left = max(t - window + 1, 0)
    return min(t + 1, window) + min(left, window) + min(left, capacity)


def bmojo_cache_bytes(*, window, capacity, kv_heads, head_dim, dtype_bytes=2, pending=False):
    """2 (2w + K) Hkv D numbers that a late query reads; pending adds the w fading keys not yet visible."""
    check_store(window, capacity)
    return 2 * ((2 + bool(pending)) * window + capacity) * kv_heads * head_dim * dtype_bytes


class _Projection(NamedTuple):
    """What makes one of the six inputs of the attention: array, its name, map, gain."""

    source: np.ndarray
    name: str
    weight: str
    norm: str | None


def _projections(x, y, p, tied):
    own = "" if tied else "_fading"
    return {
        "q": _Projection(x, "x", "w_q", "q_norm"),
        "k": _Projection(x, "x", "w_k", "k_norm"),
        "v": _Projection(x, "x", "w_v", None),
        "q_fading": _Projection(x, "x", f"w_q{own}", "q_norm"),
        "k_fading": _Projection(y, "y", f"w_k{own}", "k_norm"),
        "v_fading": _Projection(y, "y", f"w_v{own}", None),
    }


def _layer_parts(x, y, p, window, capacity, select, threshold, tied, rope_base):
    """(arrays of the attention by name, members, projections by name)."""
    projections, members = _projections(x, y, p, tied), None
    if capacity:
        scores = innovation_scores(x, y, p.w_pred)
        members = eidetic_members(
            scores, window=window, capacity=capacity, select=select, threshold=threshold
        )
    if tied:
        del projections["q_fading"]  # the queries of x serve both paths
    return {n: _project(pr, p, rope_base) for n, pr in projections.items()}, members, projections


def _project(projection, p, rope_base, start=0):
    """[..., H, T, D]: mapped, normed and turned, queries and keys; mapped alone, values."""
    h = projection.source[..., None, :, :] @ getattr(p, projection.weight)
    if projection.norm is None:
        return h
    if (gain := getattr(p, projection.norm)) is not None:
        h = rms_norm(h, gain)
    return h if rope_base is None else rope(h, _angles(h, rope_base, start), pairs="halves")


def _project_vjp(d, projection, p, rope_base):
    """(name of the source, its gradient, that of the map, that of the gain or None)."""
    w, dgain = getattr(p, projection.weight), None
    if projection.norm is not None:
        if rope_base is not None:
            d = rope(d, -_angles(d, rope_base, 0), pairs="halves")
        if (gain := getattr(p, projection.norm)) is not None:
            d, dgain = rms_norm_vjp(projection.source[..., None, :, :] @ w, gain, d)
    dsource = np.sum(d @ np.swapaxes(w, -1, -2), axis=-3)
    return projection.name, dsource, _per_head(projection.source[..., None, :, :], d), dgain


def _per_head(a, b):
    """[H, C, D]: a^T b a head, a [..., H or 1, T, C], b [..., H or 1, T, D], summed over leading axes."""
    products = np.swapaxes(a, -1, -2) @ b
    return products.reshape(-1, *products.shape[-3:]).sum(axis=0)


def _angles(h, rope_base, start):
    return rope_angles(start + np.arange(h.shape[-2]), h.shape[-1], base=rope_base)


def _joint(streams, scale):
    """(o, lse): the states of all paths, merged under one maximum."""
    states = [softmax_state(_logits(q, k, mask, scale), v) for q, k, v, mask in streams.values()]
    return finalize(reduce(merge, states))


def _logits(q, k, mask, scale):
    return np.where(mask, scale * q @ np.swapaxes(k, -1, -2), -np.inf)


def _streams(q, k, v, k_fading, v_fading, members, window, q_fading=None, scale=None, extra_k=None,
             extra_v=None, extra_mask=None, fading="window", stride=1, count=None):  # fmt: skip
    """({names of query, key, value: (q, k, v, mask)}, scale, Hkv): the paths, keys repeated to the heads."""
    n = check_bmojo(q, k, v, k_fading, v_fading, members, window, q_fading, extra_k, extra_v, extra_mask)
    T, H = n["T"], n["H"]
    ready = lambda *arrays: [repeat_heads(a, H) for a in float64(*arrays)]
    seen = window_mask(T, T, left=window - 1, right=0)
    if members is not None:
        held = np.any(members[..., None] == np.arange(T), axis=-2)  # [..., T, T]
        seen = seen | held[..., None, :, :]
    streams = {("q", "k", "v"): (*ready(q, k, v), seen)}
    if k_fading is not None:
        name, q_f = ("q", q) if q_fading is None else ("q_fading", q_fading)
        mask = fading_mask(T, window=window, fading=fading, stride=stride, count=count)
        streams[name, "k_fading", "v_fading"] = (*ready(q_f, k_fading, v_fading), mask)
    if extra_k is not None:
        mask = True if extra_mask is None else extra_mask
        streams["q", "extra_k", "extra_v"] = (*ready(q, extra_k, extra_v), mask)
    return streams, n["D"] ** -0.5 if scale is None else scale, n["Hkv"]


def fading_mask(T, *, window, fading="window", stride=1, count=None):
    """bool [T, T]: the fading keys of each query, j in [i-2w+1, i-w], or i-w, i-w-stride, ..."""
    if fading == "window":
        return window_mask(T, T, left=2 * window - 1, right=-window)
    if fading != "strided":
        raise ValueError(f'fading must be "window" or "strided", got {fading!r}')
    if stride < 1 or (count is not None and count < 0):
        raise ValueError(f"stride must be at least 1 and count not negative, got {stride=}, {count=}")
    back = np.arange(T)[:, None] - window - np.arange(T)
    return (back >= 0) & (back % stride == 0) & (back < (T if count is None else count) * stride)


def check_bmojo(q, k, v, k_fading, v_fading, members, window, q_fading, extra_k, extra_v, extra_mask):
    """Raise ValueError for a bad call of the attention; return the axes."""
    at_least_one(window=window)
    dims(q=(q, "... H T D"))
    n = check_attention(q, k, v)
    dims(q=(q, "... H T D"), k=(k, "... Hkv T D"))
    if (k_fading is None) != (v_fading is None) or (k_fading is None and q_fading is not None):
        raise ValueError("k_fading and v_fading must come together, and q_fading with them")
    if k_fading is not None:
        dims(k=(k, "... Hkv T D"), k_fading=(k_fading, "... Hkv T D"))
        dims(v=(v, "... Hkv T D"), v_fading=(v_fading, "... Hkv T D"))
    if q_fading is not None:
        dims(q=(q, "... H T D"), q_fading=(q_fading, "... H T D"))
    if members is not None:
        if members.dtype.kind not in "iu":
            raise ValueError(f"members must be integers, got dtype {members.dtype}")
        dims(q=(q[..., 0, :, :], "... T D"), members=(members, "... T K"))
    if (extra_k is None) != (extra_v is None) or (extra_k is None and extra_mask is not None):
        raise ValueError("extra_k and extra_v must come together, and extra_mask with them")
    if extra_k is not None:
        check_attention(q, extra_k, extra_v, mask=extra_mask)
        dims(v=(v[..., 0, :, :], "... T Dv"), extra_v=(extra_v[..., 0, :, :], "... M Dv"))
    return {**n, "T": n["L"]}


def check_layer(x, p, window, capacity, select, threshold, tied):
    """Raise ValueError for a bad call of the layer."""
    check_store(window, capacity, select, threshold)
    n = dims(x=(x, "... T C"), w_q=(p.w_q, "H C D"), w_k=(p.w_k, "Hkv C D"), w_v=(p.w_v, "Hkv C D"),
             w_o=(p.w_o, "H D C"), w_pred=(p.w_pred, "C C"))  # fmt: skip
    if n["H"] % n["Hkv"]:
        raise ValueError(f"w_q has H={n['H']} heads, not a multiple of the Hkv={n['Hkv']} heads of w_k")
    own = (p.w_q_fading, p.w_k_fading, p.w_v_fading)
    if not tied and any(w is None for w in own):
        raise ValueError("tied=False needs params.w_q_fading, w_k_fading and w_v_fading")
    for name, w, like in zip("qkv", own, (p.w_q, p.w_k, p.w_v), strict=True):
        if w is not None and not tied:
            dims(**{f"w_{name}_fading": (w, " ".join(map(str, like.shape)))})


def example(seed=0):
    """Four query heads on two key heads of SmolLM2, twelve tokens, a window of three; a small layer."""
    from ref.data import attention_inputs, hidden_states

    rng, at = np.random.default_rng(seed), slice(8 * seed, 8 * seed + 12)
    q, k, v = (a[:n, at, :16] for a, n in zip(attention_inputs(), (4, 2, 2), strict=True))
    x = hidden_states()[1:13, :8] / 4
    params = init_bmojo(rng, 8, heads=4, kv_heads=2, state=4)
    y = mamba_block(x, params.mixer)
    scores = innovation_scores(x, y, params.w_pred)
    members = eidetic_members(scores, window=3, capacity=2)
    fading = [a + 0.1 * rng.standard_normal(a.shape) for a in (q, k, v)]
    cache = init_bmojo_cache(params, capacity=2)
    options = {"window": 3, "capacity": 2}
    return [
        Example("bmojo_fading_attention", (q, k, v, *fading), {"window": 3}, (0, 1, 2, 3, 4, 5)),
        Example("innovation_scores", (x, y, params.w_pred), {}, (0, 1, 2)),
        Example("eidetic_members", (scores,), options),
        Example("bmojo_attention", (q, k, v, *fading[1:], members), {"window": 3}, (0, 1, 2, 3, 4)),
        Example("bmojo_layer", (x, params), options, (0,)),
        Example("bmojo_step", (x[0], cache, params), options),
    ]
