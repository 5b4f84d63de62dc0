"""Exact attention over the visible tiles of a block mask: FlashAttention that skips the others.

Source: Dao et al. 2022 (arXiv 2205.14135), section 3.3 and Algorithm 5 (appendix D.1); the butterfly pattern
of Pixelated Butterfly (arXiv 2112.00029). Only the loop over tiles differs from ref/attention/flash.py: with
a mask of ones both give the same bits. Softmax is over the visible keys only; nothing is scaled by the
density. The tile lists (full and partial tiles apart) are ours; the paper reads the mask itself.
"""

from typing import NamedTuple

import numpy as np

from ref.attention.flash import check_blocks
from ref.blocks.attention import check_attention, prepare, sum_groups
from ref.blocks.masks import visible
from ref.blocks.softmax import SoftmaxState, finalize, merge, softmax_state, weigh
from ref.dims import dims
from ref.example import Example

__all__ = [
    "BlockLayout",
    "block_mask_from_scores",
    "block_sparse_attention",
    "block_sparse_attention_bwd",
    "butterfly_block_mask",
    "causal_block_mask",
    "density",
    "example",
    "expand_block_mask",
    "from_block_layout",
    "hbm_accesses_block_sparse",
    "local_block_mask",
    "random_block_mask",
    "strided_block_mask",
    "to_block_layout",
]


def block_sparse_attention(
    q, k, v, block_mask, *, block_q, block_k, causal=False, mask=None, scale=None, return_lse=False
):
    """softmax(scale q k^T over the keys of visible tiles) v; a tile that is not visible is never touched.

    Args: q [..., H, L, D], k [..., Hkv, S, D], v [..., Hkv, S, Dv], H a multiple of Hkv (query head h uses
        key head h // (H / Hkv)); without heads [L, D], [S, D], [S, Dv].
      block_mask: bool [Tr, Tc], or [H, Tr, Tc] for a mask a head, Tr = ceil(L / block_q) and Tc =
        ceil(S / block_k); True: the tile of queries i block_q.. and keys j block_k.. is visited.
      causal: key j is visible to query i if j <= i + (S - L) as well (bottom-right alignment).
      mask: bool, True = visible as well, broadcastable to [..., H, L, S]. scale: None is 1 / sqrt(D).
    Returns: o [..., H, L, Dv] float64, and with return_lse (o, lse [..., H, L]), log-sum-exp of the visible
      scaled scores, natural log. A query that sees no key gives o = 0 and lse = -inf.
    Raises: ValueError naming the argument at fault.
    """
    check_block_sparse(q, k, v, block_mask, block_q=block_q, block_k=block_k, mask=mask)
    q, k, v, opt = prepare(q, k, v, mask, None, scale)
    tile = _Tiles(q, k, block_q, block_k, causal, mask, opt.scale)
    o = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))
    lse = np.full_like(q, -np.inf, shape=q.shape[:-1])
    for head, visited in tile.heads(block_mask):
        for i, rows in enumerate(tile.rows):
            if not visited[i].any():
                continue
            qi = q[(..., *head, rows, slice(None))]
            state = _empty_state(qi, v.shape[-1])
            for j in np.flatnonzero(visited[i]):  # all that Algorithm 5 changes
                cols = tile.cols[j]
                s, _ = tile.scores(qi, k[(..., *head, cols, slice(None))], head, rows, cols)
                state = merge(state, softmax_state(s, v[(..., *head, cols, slice(None))]))
            o[(..., *head, rows, slice(None))], lse[(..., *head, rows)] = finalize(state)
    return (o, lse) if return_lse else o


def block_sparse_attention_bwd(
    do, q, k, v, o, lse, block_mask, *, block_q, block_k, causal=False, mask=None, scale=None
):
    """(dq, dk, dv) for the cotangent `do` of o, probabilities recomputed from lse on visible tiles alone.

    Args: do [..., H, L, Dv]; o, lse as `block_sparse_attention` returned them; the rest as there.
    Returns: dq, dk, dv in the shapes of q, k, v; exactly 0 for queries and keys of no visible tile.
    Raises: ValueError naming the argument at fault.
    Source: Algorithm 4 with the same skip, in two passes: over key tiles for dk and dv, query tiles for dq.
    """
    check_block_sparse(q, k, v, block_mask, block_q=block_q, block_k=block_k, mask=mask)
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    q, k, v, opt = prepare(q, k, v, mask, None, scale)
    dims(do=(do, "... L Dv"), o=(o, "... L Dv"), q=(q, "... L D"), v=(v, "... S Dv"), lse=(lse, "... L"))
    tile = _Tiles(q, k, block_q, block_k, causal, mask, opt.scale)

    def recompute(head, rows, cols):
        """P and dS of one tile, with what of q, k and do it multiplies."""
        of_rows, of_cols = (..., *head, rows, slice(None)), (..., *head, cols, slice(None))
        qi, kj, doi = q[of_rows], k[of_cols], do[of_rows]
        s, seen = tile.scores(qi, kj, head, rows, cols)
        lse_i = lse[(..., *head, rows)]
        p = np.exp(s - np.where(np.isneginf(lse_i), 0.0, lse_i)[..., None])
        delta = np.sum(doi * o[of_rows], axis=-1)  # D_i = sum_c do_ic o_ic (equation 4)
        vj = np.where(np.any(seen, axis=-2)[..., None], v[of_cols], 0.0)
        ds = np.where(seen, p * (doi @ vj.swapaxes(-1, -2) - delta[..., None]), 0.0)
        return p, ds, qi, kj, doi

    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head, visited in tile.heads(block_mask):
        for j, cols in enumerate(tile.cols):
            at = (..., *head, cols, slice(None))
            for i in np.flatnonzero(visited[:, j]):
                p, ds, qi, _, doi = recompute(head, tile.rows[i], cols)
                dv[at] += weigh(p.swapaxes(-1, -2), doi)
                dk[at] += weigh(opt.scale * ds.swapaxes(-1, -2), qi)
        for i, rows in enumerate(tile.rows):
            for j in np.flatnonzero(visited[i]):
                _, ds, _, kj, _ = recompute(head, rows, tile.cols[j])
                dq[(..., *head, rows, slice(None))] += weigh(opt.scale * ds, kj)
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)


class _Tiles:
    """The grid of tiles of one call: their slices, which of them are visited, and their scores."""

    def __init__(self, q, k, block_q, block_k, causal, mask, scale):
        self.L, self.S = q.shape[-2], k.shape[-2]
        self.rows, self.cols = _slices(self.L, block_q), _slices(self.S, block_k)
        self.reach, _ = tiles_in_sight(block_q, block_k, self.L, self.S, causal)
        self.causal, self.mask, self.scale = causal, mask, scale

    def heads(self, block_mask):
        """(index of the head, its visited tiles); a shared mask serves all heads at once, index ()."""
        visited = np.asarray(block_mask) & self.reach
        return [((), visited)] if visited.ndim == 2 else [((h,), m) for h, m in enumerate(visited)]

    def scores(self, qi, kj, head, rows, cols):
        """(scaled scores, -inf where invisible; which are visible) of one tile."""
        mask = self.mask
        if head and mask is not None and mask.ndim > 2:
            mask = mask[..., min(head[0], mask.shape[-3] - 1), :, :]
        span = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
        seen = visible(*span, num_queries=self.L, num_keys=self.S, mask=mask, causal=self.causal)
        return np.where(seen, self.scale * qi @ np.swapaxes(kj, -1, -2), -np.inf), seen


def _slices(n, block):
    return [slice(i, min(i + block, n)) for i in range(0, n, block)]


def tiles_in_sight(block_q, block_k, num_queries, num_keys, causal):
    """(reach, whole), bool [Tr, Tc]: tiles of which causal order shows something, and all of a whole tile."""
    top, left = np.arange(0, num_queries, block_q)[:, None], np.arange(0, num_keys, block_k)
    whole = (top + block_q <= num_queries) & (left + block_k <= num_keys)
    if not causal:
        return np.ones(whole.shape, bool), whole
    ahead = num_keys - num_queries
    reach = left <= np.minimum(top + block_q, num_queries) - 1 + ahead
    return reach, whole & (left + block_k - 1 <= top + ahead)


def _empty_state(qi, Dv):
    rows = qi.shape[:-1]
    return SoftmaxState(np.full(rows, -np.inf), np.zeros(rows), np.zeros((*rows, Dv)))


def check_block_sparse(q, k, v, block_mask, *, block_q, block_k, mask=None):
    """Raise ValueError for a bad call; return the axes. Reads shapes and dtypes only."""
    check_blocks(block_q, block_k)
    n = check_attention(q, k, v, mask)
    check_block_mask(block_mask, block_q=block_q, block_k=block_k, num_queries=n["L"], num_keys=n["S"])
    if len(block_mask.shape) > 3 or (len(block_mask.shape) == 3 and q.ndim == 2):
        raise ValueError(f"block_mask must be [Tr, Tc] or [H, Tr, Tc], got {list(block_mask.shape)}")
    if len(block_mask.shape) == 3 and block_mask.shape[0] != n["H"]:
        raise ValueError(f"block_mask.shape[0] = {block_mask.shape[0]}, but q has H={n['H']} heads")
    return n


def check_block_mask(block_mask, *, block_q, block_k, num_queries, num_keys):
    """Raise ValueError unless block_mask is boolean with a flag for every tile."""
    check_blocks(block_q, block_k)
    _boolean(block_mask)
    want = -(-num_queries // block_q), -(-num_keys // block_k)
    if tuple(block_mask.shape[-2:]) != want:
        raise ValueError(
            f"block_mask must end in [{want[0]}, {want[1]}] tiles for {num_queries} queries by {block_q} and "
            f"{num_keys} keys by {block_k}, got {list(block_mask.shape)}"
        )


def _boolean(block_mask):
    shape, kind = np.shape(block_mask), str(getattr(block_mask, "dtype", "none"))
    if kind != "bool" or len(shape) < 2:
        what = f"dtype {kind}, shape {list(shape)}"
        raise ValueError(f"block_mask must be boolean, [..., Tr, Tc] (True = visited), got {what}")


def butterfly_block_mask(num_blocks, *, max_stride=None, num_global=0):
    """bool [nb, nb]: i = j, or i and j differ in one bit of value at most max_stride (None: any).

    Partners beyond the last block are dropped where nb is no power of two. num_global: rows and columns,
    from the first, that are dense.
    Source: Pixelated Butterfly, flat block butterfly: the union of the factors of a butterfly matrix.
    """
    _at_least(1, num_blocks=num_blocks)
    if max_stride is not None:
        _at_least(1, max_stride=max_stride)
    if not 0 <= num_global <= num_blocks:
        raise ValueError(f"num_global must be in 0..{num_blocks}, got {num_global}")
    i = np.arange(num_blocks)
    bits = i[:, None] ^ i
    mask = (bits & (bits - 1) == 0) & (bits <= (num_blocks if max_stride is None else max_stride))
    mask[:num_global] = mask[:, :num_global] = True
    return mask


def local_block_mask(num_blocks, width):
    """bool [nb, nb]: |i - j| <= width, width at least 1."""
    _at_least(1, num_blocks=num_blocks, width=width)
    i = np.arange(num_blocks)
    return np.abs(i[:, None] - i) <= width


def strided_block_mask(num_blocks, stride):
    """bool [nb, nb]: i - j is a multiple of stride, stride at least 1."""
    _at_least(1, num_blocks=num_blocks, stride=stride)
    i = np.arange(num_blocks)
    return (i[:, None] - i) % stride == 0


def causal_block_mask(num_q_blocks, num_k_blocks):
    """bool [Tr, Tc]: j <= i + (Tc - Tr), the last row of tiles sees all (bottom-right alignment)."""
    _at_least(1, num_q_blocks=num_q_blocks, num_k_blocks=num_k_blocks)
    return np.tri(num_q_blocks, num_k_blocks, num_k_blocks - num_q_blocks, dtype=bool)


def random_block_mask(uniforms, density):
    """bool [Tr, Tc]: the floor(density Tr Tc + 1/2) tiles with the smallest numbers, ties by index.

    Args: uniforms [Tr, Tc], drawn by the caller. density in [0, 1].
    """
    n = dims(uniforms=(uniforms, "Tr Tc"))
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    count = int(np.floor(density * n["Tr"] * n["Tc"] + 0.5))
    mask = np.zeros(n["Tr"] * n["Tc"], bool)
    mask[np.argsort(np.ravel(uniforms), kind="stable")[:count]] = True
    return mask.reshape(n["Tr"], n["Tc"])


def block_mask_from_scores(scores, keep):
    """bool [..., Tr, Tc]: the `keep` largest tile scores of every row, ties by index; 1 <= keep <= Tc."""
    tiles = dims(scores=(scores, "... Tr Tc"))["Tc"]
    if not 1 <= keep <= tiles:
        raise ValueError(f"keep must be in 1..{tiles}, got {keep}")
    best = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")[..., :keep]
    mask = np.zeros(np.shape(scores), bool)
    np.put_along_axis(mask, best, True, axis=-1)
    return mask


def expand_block_mask(block_mask, *, block_q, block_k, num_queries, num_keys):
    """bool [..., L, S]: the mask of elements, block_mask[..., i // block_q, j // block_k]."""
    check_block_mask(block_mask, block_q=block_q, block_k=block_k, num_queries=num_queries, num_keys=num_keys)
    wide = np.repeat(np.repeat(block_mask, block_q, axis=-2), block_k, axis=-1)
    return wide[..., :num_queries, :num_keys]


class BlockLayout(NamedTuple):
    """A block mask as lists, for loops and index maps.

    kv_num int32 [..., Tr], kv_idx int32 [..., Tr, max]: the key tiles of every row of tiles, ascending, the
    list filled up with its last entry (0 if it has none); q_num [..., Tc], q_idx [..., Tc, max]: the query
    tiles of every column, for dk and dv. full bool [..., Tr, Tc]: visited tiles that need no element mask,
    neither cut by the causal diagonal nor by the end of the queries or keys.
    """

    kv_num: np.ndarray
    kv_idx: np.ndarray
    q_num: np.ndarray
    q_idx: np.ndarray
    full: np.ndarray


def to_block_layout(block_mask, *, block_q, block_k, num_queries, num_keys, causal=False):
    """The lists of a mask, bool [..., Tr, Tc]; with causal, tiles that no query may see are dropped."""
    check_block_mask(block_mask, block_q=block_q, block_k=block_k, num_queries=num_queries, num_keys=num_keys)
    reach, whole = tiles_in_sight(block_q, block_k, num_queries, num_keys, causal)
    visited = np.asarray(block_mask) & reach
    return BlockLayout(*_lists(visited), *_lists(np.swapaxes(visited, -1, -2)), visited & whole)


def _lists(visited):
    """(how many of the last axis are set, int32 [...]; which, int32 [..., max])."""
    num = visited.sum(axis=-1, dtype=np.int32)
    order = np.argsort(~visited, axis=-1, kind="stable")[..., : num.max(initial=0)]
    slot = np.minimum(np.arange(order.shape[-1]), np.maximum(num, 1)[..., None] - 1)
    idx = np.take_along_axis(order, slot, axis=-1)
    return num, np.where(num[..., None] > 0, idx, 0).astype(np.int32)


def from_block_layout(layout):
    """The mask of a layout, bool [..., Tr, Tc]."""
    mask = np.zeros(layout.full.shape, bool)
    some = np.arange(layout.kv_idx.shape[-1]) < layout.kv_num[..., None]
    at = np.nonzero(some)
    mask[(*at[:-1], layout.kv_idx[at])] = True
    return mask


def density(block_mask):
    """The share of tiles that are visited; tiles cut by an edge count as whole ones."""
    _boolean(block_mask)
    return float(np.mean(block_mask)) if np.size(block_mask) else 0.0


def hbm_accesses_block_sparse(block_mask, nq, nk, d, *, block_q, block_k, backward=False, include_init=True):
    """Elements read from and written to main memory in the paper's order: {"reads", "writes", "total"}.

    A visited tile reads q, o, l, m of its queries and writes o, l, m (backward: reads q, o, do, dq, l, m,
    writes dq); a column of tiles with at least one visited reads its keys and values once (backward: writes
    dk and dv once). With a mask of ones this is `hbm_accesses` of flash; on whole tiles
    s Tc (3 N d + 4 N) + 2 N d + init, s the density (backward s Tc (5 N d + 2 N) + 4 N d + init).

    Args: block_mask bool [..., Tr, Tc], summed over leading masks; nq, nk, d: queries, keys, head size.
      include_init: count the first writes of o, l and m (backward: dq, dk, dv).
    Source: Proposition 4, counted out.
    """
    if min(nq, nk, d) < 1:
        raise ValueError(f"nq, nk and d must be at least 1, got {nq=}, {nk=}, {d=}")
    check_block_mask(block_mask, block_q=block_q, block_k=block_k, num_queries=nq, num_keys=nk)
    sizes = lambda n, block: np.array([s.stop - s.start for s in _slices(n, block)])
    block_mask = np.asarray(block_mask).reshape(-1, *block_mask.shape[-2:])
    queries = int((block_mask.sum(axis=-1) * sizes(nq, block_q)).sum())  # over visited tiles
    keys = int((block_mask.any(axis=-2) * sizes(nk, block_k)).sum())  # over columns with a visited tile
    if backward:
        reads, writes = queries * (4 * d + 2) + 2 * keys * d, queries * d + 2 * keys * d
        init = (nq + 2 * nk) * d
    else:
        reads, writes = queries * (2 * d + 2) + 2 * keys * d, queries * (d + 2)
        init = nq * d + 2 * nq
    writes += init * len(block_mask) * bool(include_init)
    return {"reads": reads, "writes": writes, "total": reads + writes}


def _at_least(least, **values):
    for name, n in values.items():
        if n < least:
            raise ValueError(f"{name} must be at least {least}, got {n}")


def example(seed=0):
    """SmolLM2 on a line of Shakespeare, 9 query heads on 3: causal, butterfly tiles of 8 and a global one."""
    from ref.data import attention_inputs

    q, k, v = (x[:, :45] for x in attention_inputs())
    options = {
        "block_mask": butterfly_block_mask(6, num_global=1),
        "block_q": 8,
        "block_k": 8,
        "causal": True,
    }
    return [Example("block_sparse_attention", (q, k, v), {**options, "return_lse": True}, (0, 1, 2))]
