"""Exact attention by tiles: the running softmax of FlashAttention, forward and backward.

Source: Dao et al. 2022 (arXiv 2205.14135): Algorithm 1 (forward), Algorithm 4 (backward), section 3.1
(merging), Theorem 2 (memory traffic). The loop over query tiles outside is FlashAttention-2's (Dao 2023).
Where the paper lets a generator draw dropout tile by tile, we take the drawn mask, so that tiling cannot
change it.
"""

import numpy as np

from ref.blocks.attention import attention_dense, broadcasts, prepare, sum_groups
from ref.blocks.masks import visible
from ref.blocks.softmax import SoftmaxState, finalize, merge, online_softmax, weigh
from ref.dims import dims
from ref.example import Example

__all__ = [
    "SoftmaxState",
    "attention_dense",
    "block_sizes",
    "example",
    "finalize",
    "flash_attention",
    "flash_attention_bwd",
    "hbm_accesses",
    "merge",
    "online_softmax",
]


def flash_attention(
    q,
    k,
    v,
    *,
    mask=None,
    key_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    causal=False,
    scale=None,
    block_q=128,
    block_k=128,
    dropout_mask=None,
    dropout_p=0.0,
    order="q_outer",
    return_lse=False,
):
    """softmax(scale q k^T over the visible keys) v, never holding more than one tile of scores.

    Args: q [..., H, L, D], k [..., Hkv, S, D], v [..., Hkv, S, Dv], H a multiple of Hkv (query head h uses
        key head h // (H / Hkv)); without heads [L, D], [S, D], [S, Dv].
      mask: bool, True = visible, broadcastable to [..., H, L, S].
      key_lengths: int, broadcastable to [..., H], 0 <= n <= S: keys from n on are invisible.
      q_segment_ids, kv_segment_ids: int, broadcastable to [..., L] and [..., S] without heads, neither
        decreasing: texts laid end to end, of which a query sees the keys with its own id.
      causal: key j is visible to query i if j <= i + (n - L), n the number of keys (bottom-right alignment).
      scale: factor of the scores; None is 1 / sqrt(D).
      block_q, block_k: queries and keys a tile; they change the rounding, never the result.
      dropout_mask: bool [..., H, L, S], True = keep; probabilities kept are divided by 1 - dropout_p.
      order: "q_outer" (FlashAttention-2) or "k_outer", the paper's loop, which holds o, l and m in memory.
    Returns: o [..., H, L, Dv] float64, and with return_lse (o, lse [..., H, L]): log-sum-exp of the scaled
      visible scores, natural log, before dropout. A query that sees no key gives o = 0 and lse = -inf.
    Raises: ValueError naming the argument at fault.
    """
    check_blocks(block_q, block_k)
    mask = within_segments(q, k, mask, q_segment_ids, kv_segment_ids)
    q, k, v, opt = prepare(q, k, v, mask, key_lengths, scale, dropout_mask, dropout_p)
    if order == "q_outer":
        o, lse = _forward_q_outer(q, k, v, opt, causal, block_q, block_k)
        return (o, lse) if return_lse else o
    if order == "k_outer":
        o, l, m = _forward_k_outer(q, k, v, opt, causal, block_q, block_k)
        return (o, finalize(SoftmaxState(m, l, o))[1]) if return_lse else o
    raise ValueError(f'order must be "q_outer" or "k_outer", got {order!r}')


def within_segments(q, k, mask, q_segment_ids, kv_segment_ids):
    """mask, bool [..., H or 1, L, S], without pairs of different segments; as it is without ids."""
    check_segments(q, k, q_segment_ids, kv_segment_ids)
    if q_segment_ids is None:
        return mask
    same = np.asarray(q_segment_ids)[..., :, None] == np.asarray(kv_segment_ids)[..., None, :]
    same = same[..., None, :, :] if q.ndim > 2 else same
    return same if mask is None else same & mask


def _forward_q_outer(q, k, v, opt, causal, block_q, block_k):
    """Each query tile meets all key tiles; its state stays on the chip and is divided once, at the end."""
    L, S = q.shape[-2], k.shape[-2]
    o = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    lse = np.empty_like(q, shape=q.shape[:-1])
    for rows in _tiles(L, block_q):
        qi = q[..., rows, :]
        state = _empty_state(qi, v.shape[-1])
        for cols in _tiles(S, block_k):
            s = _scores(qi, k[..., cols, :], rows, cols, L, S, opt, causal)
            state = merge(state, _tile_state(s, v[..., cols, :], opt.keep(rows, cols)))
        o[..., rows, :], lse[..., rows] = finalize(state)
    return o, lse


def _forward_k_outer(q, k, v, opt, causal, block_q, block_k):
    """Algorithm 1: each key tile meets all query tiles; o, l and m are read and written every time."""
    L, S = q.shape[-2], k.shape[-2]
    o = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    l = np.zeros_like(q, shape=q.shape[:-1])
    m = np.full_like(q, -np.inf, shape=q.shape[:-1])
    for cols in _tiles(S, block_k):
        kj, vj = k[..., cols, :], v[..., cols, :]
        for rows in _tiles(L, block_q):
            s = _scores(q[..., rows, :], kj, rows, cols, L, S, opt, causal)
            l_old = l[..., rows]
            # The paper keeps o normalised: multiply by the old denominator, merge, divide by the new one
            # (line 12).
            old = SoftmaxState(m[..., rows], l_old, l_old[..., None] * o[..., rows, :])
            new = merge(old, _tile_state(s, vj, opt.keep(rows, cols)))
            o[..., rows, :], _ = finalize(new)
            m[..., rows], l[..., rows] = new.m, new.l
    return o, l, m


def flash_attention_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    *,
    mask=None,
    key_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    causal=False,
    scale=None,
    block_q=128,
    block_k=128,
    dropout_mask=None,
    dropout_p=0.0,
):
    """(dq, dk, dv) for the cotangent `do` of o, with the probabilities recomputed tile by tile from lse.

    Args: do [..., H, L, Dv]; o, lse as `flash_attention` returned them; the rest as there.
    Returns: dq, dk, dv in the shapes of q, k, v; dk and dv are summed over the query heads that share a key
    head.
    Raises: ValueError naming the argument at fault.
    Source: Algorithm 4, in the deterministic form with two passes: one over key tiles for dk and dv, one over
    query tiles for dq.
    """
    check_blocks(block_q, block_k)
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    mask = within_segments(q, k, mask, q_segment_ids, kv_segment_ids)
    q, k, v, opt = prepare(q, k, v, mask, key_lengths, scale, dropout_mask, dropout_p)
    dims(do=(do, "... L Dv"), o=(o, "... L Dv"), q=(q, "... L D"), v=(v, "... S Dv"), lse=(lse, "... L"))
    L, S = q.shape[-2], k.shape[-2]
    delta = np.sum(do * o, axis=-1)  # D_i = sum_c do_ic o_ic = sum_j P_ij dP_ij (equation 4)

    def tile(rows, cols):
        """P and dS of one tile, recomputed."""
        s = _scores(q[..., rows, :], k[..., cols, :], rows, cols, L, S, opt, causal)
        seen = ~np.isneginf(s)  # a row that sees nothing has lse = -inf, and every P = 0
        p = np.exp(np.where(seen, s - np.where(seen, lse[..., rows, None], 0.0), -np.inf))
        dp = do[..., rows, :] @ _finite_where(seen, v[..., cols, :]).swapaxes(-1, -2) * opt.keep(rows, cols)
        return p, np.where(seen, p * (dp - delta[..., rows, None]), 0.0)

    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for cols in _tiles(S, block_k):
        for rows in _tiles(L, block_q):
            p, ds = tile(rows, cols)
            dv[..., cols, :] += weigh((p * opt.keep(rows, cols)).swapaxes(-1, -2), do[..., rows, :])
            dk[..., cols, :] += opt.scale * weigh(ds.swapaxes(-1, -2), q[..., rows, :])
    for rows in _tiles(L, block_q):
        for cols in _tiles(S, block_k):
            _, ds = tile(rows, cols)
            dq[..., rows, :] += opt.scale * weigh(ds, k[..., cols, :])
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)


def block_sizes(sram_elements, d):
    """(B_r, B_c) of Algorithm 1, line 1: B_c = ceil(M / 4d) keys and B_r = min(B_c, d) queries fit M.

    Raises: ValueError if sram_elements < 4 d, where not even one key and one query fit.
    """
    if d < 1 or sram_elements < 4 * d:
        raise ValueError(f"sram_elements must be at least 4 d, got sram_elements={sram_elements} with d={d}")
    block_k = -(-sram_elements // (4 * d))
    return min(block_k, d), block_k


def hbm_accesses(nq, nk, d, *, sram_elements=None, algorithm="standard", backward=False, include_init=True):
    """Elements read from and written to main memory by one head: {"reads", "writes", "total"}.

    Args: nq, nk: queries and keys; d: head size of q, k and v. sram_elements: M, on-chip memory in
        elements (unused by "standard").
      algorithm: "standard" writes the scores and the probabilities; "flash" is Algorithm 1 (Algorithm 4
        backward); "flash2" loops over query tiles outside, forward only.
      include_init: count the first writes of o, l and m (forward) or dq, dk and dv (backward).
    Raises: ValueError for an unknown algorithm, backward with "flash2", or too little sram_elements.
    Source: proof of Theorem 2. With nq = nk = N the totals are 4 N^2 + 4 N d (standard, forward),
    7 N^2 + 8 N d (backward), T_c (3 N d + 4 N) + 2 N d + init (flash), T_c (5 N d + 2 N) + 4 N d + init
    (backward).
    """
    if min(nq, nk, d) < 1:
        raise ValueError(f"nq, nk and d must be at least 1, got {nq=}, {nk=}, {d=}")
    if algorithm == "standard":
        if backward:  # dV = P^T dO; dP = dO V^T; dS from P and dP; dQ = dS K; dK = dS^T Q
            reads = 5 * nq * nk + 3 * nq * d + 2 * nk * d
            writes = 2 * nq * nk + nq * d + 2 * nk * d
        else:  # S = Q K^T; P = softmax(S); O = P V
            reads = 2 * nq * nk + nq * d + 2 * nk * d
            writes = 2 * nq * nk + nq * d
        return _accesses(reads, writes)
    if algorithm not in ("flash", "flash2"):
        raise ValueError(f'algorithm must be "standard", "flash" or "flash2", got {algorithm!r}')
    if sram_elements is None:
        raise ValueError(f'algorithm="{algorithm}" needs sram_elements')
    block_q, block_k = block_sizes(sram_elements, d)
    t_k, t_q = -(-nk // block_k), -(-nq // block_q)
    if algorithm == "flash2":
        if backward:
            raise ValueError('algorithm="flash2" counts the forward pass only; backward=True needs "flash"')
        return _accesses(nq * d + 2 * t_q * nk * d, nq * d + nq)
    if (
        backward
    ):  # a key tile: read q, o, do, dq, l, m of every query; write dq. K, V read and dK, dV written once.
        init = (nq + 2 * nk) * d if include_init else 0
        return _accesses(t_k * (4 * nq * d + 2 * nq) + 2 * nk * d, t_k * nq * d + 2 * nk * d + init)
    init = nq * d + 2 * nq if include_init else 0
    return _accesses(t_k * (2 * nq * d + 2 * nq) + 2 * nk * d, t_k * (nq * d + 2 * nq) + init)


def _accesses(reads, writes):
    return {"reads": reads, "writes": writes, "total": reads + writes}


def _tiles(n, block):
    return [slice(i, min(i + block, n)) for i in range(0, n, block)]


def _scores(qi, kj, rows, cols, L, S, opt, causal):
    """One tile of scaled scores, -inf where the key is invisible."""
    span = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
    seen = visible(*span, num_queries=L, num_keys=S, causal=causal, **opt.visibility)
    return np.where(seen, opt.scale * qi @ np.swapaxes(kj, -1, -2), -np.inf)


def _tile_state(s, v, keep):
    """The state of one tile. Dropout acts on what is added to acc, never on m and l."""
    m = s.max(axis=-1)
    p = np.exp(s - np.where(np.isneginf(m), 0.0, m)[..., None])
    return SoftmaxState(m, p.sum(axis=-1), weigh(p * keep, v))


def _empty_state(qi, Dv):
    rows = qi.shape[:-1]
    return SoftmaxState(np.full(rows, -np.inf), np.zeros(rows), np.zeros((*rows, Dv)))


def _finite_where(seen, v):
    """v with the keys that no row of the tile sees set to 0, so that padding cannot leak through 0 * NaN."""
    return np.where(np.any(seen, axis=-2)[..., None], v, 0.0)


def check_segments(q, k, q_segment_ids, kv_segment_ids):
    """Raise ValueError unless both are None, or integers that fit q [.., L, D] and k and do not decrease."""
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    if q_segment_ids is None:
        return
    for name, ids, x in (("q_segment_ids", q_segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        ids, shape = ids if hasattr(ids, "dtype") else np.asarray(ids), (*q.shape[:-3], x.shape[-2])
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got dtype {ids.dtype}")
        if ids.ndim < 1 or ids.shape[-1] != shape[-1] or not broadcasts(ids.shape, shape):
            raise ValueError(f"{name} of shape {list(ids.shape)} does not broadcast to {list(shape)}")
        if isinstance(ids, np.ndarray) and (np.diff(ids) < 0).any():  # traced values cannot be looked at
            raise ValueError(f"{name} must not decrease: a segment is one run of tokens; use mask for others")


def check_blocks(block_q, block_k):
    """Raise ValueError for a tile that holds nothing."""
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q=}, {block_k=}")


def example(seed=0):
    """Queries, keys and values of SmolLM2 on a line of Shakespeare: 9 query heads on 3 key heads, causal."""
    from ref.data import attention_inputs

    q, k, v = (x[:, :48] for x in attention_inputs())
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    do = np.random.default_rng(seed).standard_normal(o.shape)
    logits = q[:3, :8] @ np.swapaxes(k[:3], -1, -2) / np.sqrt(q.shape[-1])
    halves = [SoftmaxState(np.max(s, -1), np.exp(s - s.max(-1, keepdims=True)).sum(-1), weigh(np.exp(s -
    s.max(-1, keepdims=True)), x))
              for s, x in ((logits[..., :24], v[:, :24]), (logits[..., 24:], v[:, 24:]))]  # fmt: skip
    tiles = {"block_q": 16, "block_k": 16}
    return [
        Example("flash_attention", (q, k, v), {"causal": True, **tiles, "return_lse": True}, (0, 1, 2)),
        Example("flash_attention_bwd", (do, q, k, v, o, lse), {"causal": True, **tiles}),
        Example("attention_dense", (q, k, v), {"causal": True}, (0, 1, 2)),
        Example("merge", tuple(halves)),
        Example("finalize", (merge(*halves),)),
        Example("online_softmax", (logits,), {"start": 3}, (0,)),
    ]
