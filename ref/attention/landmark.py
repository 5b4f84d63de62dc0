"""Landmark attention: an earlier block is reached through its landmark, whose key sums it up for retrieval.

Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), sections 3.1 (grouped softmax) and 3.2 (retrieval,
positions), and the code released with it for the cache. A landmark closes its block: the block of position j
is the number of landmarks strictly before j. Ours: among equal scores the earlier block is retrieved.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, prepare, split_heads, sum_groups
from ref.blocks.landmark_cache import (
    LandmarkCache,
    LandmarkStore,
    append_chunk,
    init_landmark_cache,
    take_blocks,
)
from ref.blocks.masks import causal_mask
from ref.blocks.rope import rope, rope_angles
from ref.blocks.softmax import SoftmaxState, finalize, merge, softmax, softmax_state, softmax_vjp, weigh
from ref.checks import at_least_one, check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example

__all__ = [
    "LandmarkCache", "LandmarkParams", "LandmarkStore", "example", "grouped_softmax", "init_landmark_cache",
    "insert_landmarks", "landmark_attention", "landmark_attention_bwd", "landmark_decode", "landmark_mask",
    "landmark_stream", "retrieval_cost", "select_blocks",
]  # fmt: skip

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


def insert_landmarks(ids, *, block_size, landmark_id):
    """ids int [..., N] with landmark_id after every complete block -> [..., N + N // block_size].

    Raises: ValueError for block_size < 1, or ids that hold landmark_id already.
    """
    ids = np.asarray(ids)
    at_least_one(block_size=block_size)
    if (ids == landmark_id).any():
        raise ValueError(f"ids must not hold landmark_id={landmark_id} already")
    whole = ids.shape[-1] // block_size * block_size
    blocks = ids[..., :whole].reshape(*ids.shape[:-1], -1, block_size)
    mark = np.full((*blocks.shape[:-1], 1), landmark_id, ids.dtype)
    closed = np.concatenate([blocks, mark], axis=-1).reshape(*ids.shape[:-1], -1)
    return np.concatenate([closed, ids[..., whole:]], axis=-1)


def landmark_mask(ids, landmark_id):
    """bool, the shape of ids: True at a landmark."""
    return np.asarray(ids) == landmark_id


def grouped_softmax(scores, is_landmark, *, causal=True):
    """Attention weights in two levels: (landmark among own block and landmarks) x (token within its block).

    Query i of block b_i weighs the tokens of its own block and the landmarks of the others by one softmax p,
    and the tokens of each other block c by a softmax f of their own: w_ij = p_ij in the own block,
    p_i,landmark(c) f_ij in block c, 0 at landmarks. The landmark of the own block is invisible.
    Args: scores [..., H, L, S], scaled, -inf = invisible; the queries are the last L of the S positions.
      is_landmark: bool [..., S], one row for all heads.
    Returns: [..., H, L, S]; a row sums to 1, less the mass of landmarks whose block shows no token; a query
      that sees neither a token of its own block nor a landmark has weights 0.
    Raises: ValueError naming the argument at fault. Source: section 3.1.
    """
    p, own, blocks = _groups(scores, is_landmark, causal)
    w = np.where(own, p, 0.0)
    for landmark, f in blocks:
        w = w + f * _at(landmark, p)
    return w


def landmark_attention(q, k, v, is_landmark, *, scale=None, block_size=None, return_weights=False):
    """grouped_softmax(scale q k^T) v, causal; the values of landmarks are never read.

    Args: q [..., H, N, D], k, v [..., Hkv, N, D], H a multiple of Hkv; is_landmark bool [..., N].
      scale: None is 1 / sqrt(D). block_size: tokens a block, without its landmark, of landmarks that stand
      regularly: the tiled form, which holds one tile of scores at a time.
    Returns: o [..., H, N, D], and with return_weights (o, weights [..., H, N, N]).
    Raises: ValueError naming the argument at fault.
    """
    q, k, v, scale = _prepare(q, k, v, is_landmark, scale, block_size)
    if block_size is None or return_weights:
        w = grouped_softmax(scale * q @ np.swapaxes(k, -1, -2), is_landmark)
    o = weigh(w, v) if block_size is None else _tiled(q, k, v, scale, block_size)[0]
    return (o, w) if return_weights else o


def landmark_attention_bwd(do, q, k, v, is_landmark, *, scale=None, block_size=None):
    """(dq, dk, dv) of `landmark_attention` for the cotangent do [..., H, N, D]; the rest as there.

    The weight of a landmark stands for its block: dp_landmark(c) = sum_j f_j dw_j over the tokens of c. Then
    ds = p (dp - sum p dp) for group 0, and ds_j = w_j (dw_j - dp_landmark(c)) within block c.
    """
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    q, k, v, scale = _prepare(q, k, v, is_landmark, scale, block_size)
    dims(do=(do, "... H N D"), q=(q, "... H N D"))
    do = float64(do)
    v = np.where(np.asarray(is_landmark)[..., None, :, None], 0.0, v)
    if block_size is not None:
        dq, dk, dv = _tiled_bwd(do, q, k, v, scale, block_size)
    else:
        p, own, blocks = _groups(scale * q @ np.swapaxes(k, -1, -2), is_landmark, True)
        dw = do @ np.swapaxes(v, -1, -2)
        w, dp, ds = np.where(own, p, 0.0), np.where(own, dw, 0.0), 0.0
        for landmark, f in blocks:
            w = w + f * _at(landmark, p)
            dp = dp + np.where(landmark, np.sum(f * dw, axis=-1, keepdims=True), 0.0)
            ds = ds + _at(landmark, p) * softmax_vjp(f, dw)
        ds = scale * (ds + softmax_vjp(p, dp))
        dq, dk, dv = ds @ k, np.swapaxes(ds, -1, -2) @ q, np.swapaxes(w, -1, -2) @ do
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)


def _groups(scores, is_landmark, causal):
    """(p of group 0, own set, [(landmark of block c, f within block c)]), broadcastable to [..., H, L, S]."""
    n = dims(scores=(scores, "... H L S"), is_landmark=(is_landmark, "... S"))
    _check_flags(is_landmark)
    if n["S"] < 1 or n["L"] > n["S"]:
        raise ValueError(f"scores must be [..., L, S] with 1 <= S and L <= S, got {list(scores.shape)}")
    flags = np.asarray(is_landmark)
    block = np.cumsum(flags, axis=-1) - flags  # [..., S]
    same = (block[..., n["S"] - n["L"] :, None] == block[..., None, :])[..., None, :, :]
    landmark = flags[..., None, None, :]
    s = np.where(causal_mask(n["L"], n["S"]) if causal else True, float64(scores), -np.inf)
    own = same & ~landmark
    p = softmax(np.where(own | (landmark & ~same), s, -np.inf))
    blocks = []
    for c in range(block.max(initial=0) + 1):
        inside = (block == c)[..., None, None, :]
        blocks.append((inside & landmark, softmax(np.where(inside & ~landmark & ~same, s, -np.inf))))
    return p, own, blocks


def _at(landmark, p):
    """[..., L, 1]: the weight of one block's landmark, 0 where the block has none."""
    return np.sum(np.where(landmark, p, 0.0), axis=-1, keepdims=True)


def _tiles(q, k, v, scale, block_size):
    """Every block of queries: its rows, scores within the block (-inf where invisible), earlier blocks."""
    N, size = q.shape[-2], block_size + 1
    tiles = [slice(i, min(i + size, N)) for i in range(0, N, size)]
    for i, rows in enumerate(tiles):
        n = rows.stop - rows.start
        seen = np.tri(n, dtype=bool) & (np.arange(n) < block_size)
        s = np.where(seen, scale * q[..., rows, :] @ np.swapaxes(k[..., rows, :], -1, -2), -np.inf)
        yield rows, s, tiles[:i]


def _tiled(q, k, v, scale, block_size):
    """(o, lse of group 0). An earlier block is one key: its landmark's score, and f v as its value."""
    o, lse = np.empty_like(v, shape=q.shape), np.empty_like(q, shape=q.shape[:-1])
    for rows, own, earlier in _tiles(q, k, v, scale, block_size):
        state = softmax_state(own, v[..., rows, :])
        for cols in earlier:
            s = scale * q[..., rows, :] @ np.swapaxes(k[..., cols, :], -1, -2)
            average = weigh(softmax(s[..., :-1]), v[..., cols, :][..., :-1, :])
            state = merge(state, SoftmaxState(s[..., -1], np.ones_like(s[..., -1]), average))
        o[..., rows, :], lse[..., rows] = finalize(state)
    return o, lse


def _tiled_bwd(do, q, k, v, scale, block_size):
    """The backward pass on the same tiles, p recomputed from lse; sum p dp = sum_c do_c o_c, as in flash."""
    o, lse = _tiled(q, k, v, scale, block_size)
    delta = np.sum(do * o, axis=-1, keepdims=True)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)

    def add(rows, cols, w, ds):
        dq[..., rows, :] += scale * ds @ k[..., cols, :]
        dk[..., cols, :] += scale * np.swapaxes(ds, -1, -2) @ q[..., rows, :]
        dv[..., cols, :] += np.swapaxes(w, -1, -2) @ do[..., rows, :]

    for rows, own, earlier in _tiles(q, k, v, scale, block_size):
        doi, total = do[..., rows, :], lse[..., rows, None]
        p = np.exp(own - total)
        add(rows, rows, p, p * (doi @ np.swapaxes(v[..., rows, :], -1, -2) - delta[..., rows, :]))
        for cols in earlier:
            s = scale * q[..., rows, :] @ np.swapaxes(k[..., cols, :], -1, -2)
            mark = np.exp(s[..., -1:] - total)
            f = softmax(s[..., :-1])
            dw = doi @ np.swapaxes(v[..., cols, :][..., :-1, :], -1, -2)
            dmark = np.sum(f * dw, axis=-1, keepdims=True)
            ds = np.concatenate([mark * f * (dw - dmark), mark * (dmark - delta[..., rows, :])], axis=-1)
            add(rows, cols, np.concatenate([mark * f, np.zeros_like(mark)], axis=-1), ds)
    return dq, dk, dv


def select_blocks(landmark_weights, *, top_k, selection="per_token_and_head"):
    """The min(top_k, n) blocks of largest weight, ascending in time: int [B, H, T, min(top_k, n)].

    Args: landmark_weights [B, H, T, n], n >= 1. selection: "per_token_and_head" lets every query and head
      choose; "max_over_heads" and "max_over_tokens" choose by the largest weight among heads or queries.
    Raises: ValueError for top_k < 1, another selection, n = 0.
    """
    n = dims(landmark_weights=(landmark_weights, "B H T n"))["n"]
    _check_retrieval(top_k, selection)
    if n < 1:
        raise ValueError("landmark_weights must hold at least one block")
    w = float64(landmark_weights)
    if selection != "per_token_and_head":
        axis = 1 if selection == "max_over_heads" else 2
        w = np.broadcast_to(w.max(axis=axis, keepdims=True, initial=0.0), w.shape)
    return np.sort(np.argsort(-w, axis=-1, kind="stable")[..., : min(top_k, n)], axis=-1)


def landmark_decode(q, k, v, is_landmark, cache: LandmarkCache, *, block_size, top_k, cache_blocks,
                    selection="per_token_and_head", rope_base=10000.0):  # fmt: skip
    """One chunk of a stream attends to top_k retrieved blocks, the block under way, and itself -> (o, cache).

    Positions are clipped: the chunk starts at min(total_blocks, top_k + 1) (l + 1) + num_tail; the last top_k
    blocks keep their distance to it, all older ones are squeezed to the front.
    Args: q, k, v [B, H, T, D] before rotary, T >= 1; is_landmark bool [B, T], True where a block of
      block_size + 1 ends. cache_blocks: capacity of the cache; the oldest blocks are evicted.
      rope_base: None leaves rotary embedding out.
    Returns: o [B, H, T, D]; the cache with the chunk appended.
    Raises: ValueError naming the argument at fault: a cache of other sizes, irregular landmarks, an odd D.
    """
    size, n, u = block_size + 1, int(cache.num_blocks), int(cache.num_tail)
    axes = _check_decode(q, k, v, is_landmark, cache, block_size, top_k, cache_blocks, selection)
    q, k, v = float64(q, k, v)
    D, T = axes["D"], axes["T"]
    turn = lambda x, at: x if rope_base is None else rope(x, rope_angles(at, D, base=rope_base))
    start = min(int(cache.total_blocks), top_k + 1) * size + u
    tail_k = np.concatenate([cache.tail_k[:, :, :u], k], axis=2)
    tail_v = np.concatenate([cache.tail_v[:, :, :u], v], axis=2)
    qr = turn(q, start + np.arange(T)) / np.sqrt(D)
    scores = qr @ np.swapaxes(turn(tail_k, start - u + np.arange(u + T)), -1, -2)
    values = np.broadcast_to(tail_v[:, :, None], (*scores.shape, D))
    if n:
        blocks = np.maximum(0, np.arange(n) - (n - top_k) + 1)  # 1..top_k for the last ones, else 0
        marks = turn(cache.block_k[:, :, :n, -1], blocks * size + block_size)
        chosen = select_blocks(softmax(qr @ np.swapaxes(marks, -1, -2)), top_k=top_k, selection=selection)
        kb, vb = (take_blocks(x[:, :, :n], chosen) for x in (cache.block_k, cache.block_v))
        slot = np.arange(kb.shape[-2])
        near = np.repeat(blocks[chosen] > 0, size, axis=-1)[..., None]
        kb = np.where(near, turn(kb, slot + size), turn(kb, slot))
        scores = np.concatenate([(kb @ qr[..., None])[..., 0], scores], axis=-1)
        values = np.concatenate([vb, values], axis=-2)
    flags = np.arange(scores.shape[-1]) % size == block_size  # retrieved blocks are whole, the tail follows
    w = grouped_softmax(scores, np.broadcast_to(flags, (axes["B"], len(flags))))
    o = weigh(w[..., None, :], values)[..., 0, :]
    return o, append_chunk(cache, tail_k, tail_v, size, cache_blocks)


class LandmarkParams(NamedTuple):
    """Maps of one attention layer without biases, [C, C], used as x @ W."""

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray


def landmark_stream(x, params: LandmarkParams, is_landmark, *, num_heads, chunk_lengths,
                    block_size, top_k, cache_blocks, selection="per_token_and_head",
                    rope_base=10000.0):  # fmt: skip
    """x [B, N, C] through one layer, chunk by chunk from an empty cache -> [B, N, C].

    chunk_lengths: positions a chunk, landmarks included, N in all; the rest as `landmark_decode`.
    Raises: ValueError naming the argument at fault.
    """
    n = dims(x=(x, "B N C"), is_landmark=(is_landmark, "B N"), **{w: (getattr(params, w), "C C") for w in
             LandmarkParams._fields})  # fmt: skip
    check_num_heads(n["C"], num_heads)
    if min(chunk_lengths, default=0) < 1 or sum(chunk_lengths) != n["N"]:
        raise ValueError(f"chunk_lengths must be positive and sum to N={n['N']}, got {tuple(chunk_lengths)}")
    q, k, v = (split_heads(float64(x) @ w, num_heads) for w in params[:3])
    options = {"block_size": block_size, "cache_blocks": cache_blocks}
    cache = init_landmark_cache(n["B"], num_heads, n["C"] // num_heads, **options)
    out, at = [], 0
    for length in chunk_lengths:
        cut = slice(at, at := at + length)
        o, cache = landmark_decode(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], np.asarray(is_landmark)[:, cut], cache,
            top_k=top_k, selection=selection, rope_base=rope_base, **options,
        )  # fmt: skip
        out.append(join_heads(o))
    return np.concatenate(out, axis=1) @ params.w_o


def retrieval_cost(context, *, block_size, top_k, head_dim, num_heads, bytes_per_element=2):
    """Bytes that one query of a layer reads: {"bytes_full", "bytes_landmarks", "bytes_blocks", "ratio"}.

    context: positions stored, landmarks included; n = context // (l + 1) blocks. Full attention reads every
    key and value; retrieval n landmark keys, and keys and values of min(top_k, n) blocks in every head. On
    whole blocks the ratio is 1 / (2 (l + 1)) + k (l + 1) / context.
    """
    at_least_one(block_size=block_size)
    _check_retrieval(top_k, SELECTIONS[0])
    if min(context, head_dim, num_heads, bytes_per_element) < 1:
        raise ValueError("context, head_dim, num_heads and bytes_per_element must be at least 1")
    row, n = head_dim * num_heads * bytes_per_element, context // (block_size + 1)
    full, marks, blocks = 2 * context * row, n * row, 2 * min(top_k, n) * (block_size + 1) * row
    ratio = (marks + blocks) / full
    return {"bytes_full": full, "bytes_landmarks": marks, "bytes_blocks": blocks, "ratio": ratio}


def _prepare(q, k, v, is_landmark, scale, block_size):
    """Check a call of the attention, repeat grouped heads -> (q, k, v, scale), float64."""
    kv = {"k": (k, "... Hkv N D"), "v": (v, "... Hkv N D")}
    n = dims(q=(q, "... H N D"), **kv, is_landmark=(is_landmark, "... N"))
    _check_flags(is_landmark)
    if n["N"] < 1:
        raise ValueError("q must hold at least one position")
    if block_size is not None:
        at_least_one(block_size=block_size)
        _check_regular(is_landmark, block_size)
    q, k, v, options = prepare(q, k, v, scale=scale)
    return q, k, v, options.scale


def _check_flags(is_landmark):
    if np.asarray(is_landmark).dtype != bool:
        raise ValueError(f"is_landmark must be boolean, got dtype {np.asarray(is_landmark).dtype}")


def _check_regular(is_landmark, block_size, start=0):
    n = is_landmark.shape[-1]
    if (np.asarray(is_landmark) != ((start + np.arange(n)) % (block_size + 1) == block_size)).any():
        raise ValueError(f"is_landmark must close a block after every {block_size} tokens (block_size)")


def _check_retrieval(top_k, selection):
    at_least_one(top_k=top_k)
    one_of("selection", selection, SELECTIONS)


def _check_decode(q, k, v, is_landmark, cache, block_size, top_k, cache_blocks, selection):
    at_least_one(block_size=block_size)
    _check_retrieval(top_k, selection)
    _check_flags(is_landmark)
    n = dims(
        q=(q, "B H T D"), k=(k, "B H T D"), v=(v, "B H T D"), is_landmark=(is_landmark, "B T"),
        **{f"cache.{x}": (getattr(cache, x), f"B H {cache_blocks} {block_size + 1} D")
           for x in ("block_k", "block_v")},
        **{f"cache.{x}": (getattr(cache, x), f"B H {block_size} D") for x in ("tail_k", "tail_v")},
    )  # fmt: skip
    if n["T"] < 1:
        raise ValueError("q must hold at least one position")
    _check_regular(is_landmark, block_size, int(cache.num_tail))
    return n


def example(seed=0):
    """SmolLM2 on a line of Shakespeare, every eighth position a landmark; its hidden states streamed."""
    from ref.data import attention_inputs, hidden_states

    rng = np.random.default_rng(seed)
    q, k, v = (x[None, :, :45] for x in attention_inputs())
    marks = (np.arange(45) % 8 == 7)[None]
    scores = q[:, :3] @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    options = {"block_size": 7, "top_k": 2, "cache_blocks": 8}
    cache = init_landmark_cache(1, 3, 64, block_size=7, cache_blocks=8)
    first, last = (tuple(x[:, :3, cut] for x in (q, k, v)) for cut in (slice(36), slice(36, 45)))
    cache = landmark_decode(*first, marks[:, :36], cache, **options)[1]
    params = LandmarkParams(*(rng.standard_normal((4, 32, 32)) / np.sqrt(32)))
    return [
        Example("grouped_softmax", (scores, marks), {}, (0,)),
        Example("landmark_attention", (q, k, v, marks), {"block_size": 7}, (0, 1, 2)),
        Example("landmark_attention_bwd", (q, q, k, v, marks), {"block_size": 7}),
        Example("select_blocks", (softmax(scores[..., 7::8]),), {"top_k": 2}),
        Example("landmark_decode", (*last, marks[:, 36:], cache), options),
        Example(
            "landmark_stream",
            (hidden_states()[None, 1:41, :32], params, marks[:, :40]),
            {"num_heads": 2, "chunk_lengths": (12, 12, 16), **options},
        ),
    ]
