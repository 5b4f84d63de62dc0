"""Block-sparse FlashAttention in Pallas for Hopper GPUs: the kernels of flash, on lists of visible tiles.

Blocks are refined to the kernels' tiles. The lists name for every tile of queries (or of keys, for dk and dv)
what it meets, tiles that causal order or the end of the keys cuts in front, so that only those are masked.
Of a mask that is known the rows of tiles are dealt to the blocks beforehand, so that all have as much to do.
"""

import heapq

import numpy as np

from accel.kernels import flash_hopper, flash_hopper_backward
from accel.kernels.flash_hopper import ROWS, Tiles, cores_of
from accel.kernels.flash_hopper_lists import listing
from ref.attention.block_sparse_flash import tiles_in_sight

__all__ = ["backward", "forward", "orders"]

STEP = 64  # queries or keys that pass at a time in the backward pass
ALONE = 1.5  # what a row of tiles costs beside its tiles, in tiles


def orders(visited, batches, heads, kv_heads, sizes, hi, block_q, block_k):
    """(of queries, of keys): which block computes which tiles, for `forward` and for `backward`, of so many
    batches of heads and key heads and sizes (L, S); () for a mask that is not known.
    """
    if not isinstance(visited, np.ndarray):
        return ()
    cut = Cut(visited, block_q, block_k, *sizes, hi)
    rows, columns = _tall(block_q), _tall(block_k)
    return cut.dealt(rows, _wide(block_k), batches, heads), cut.dealt(STEP, columns, batches, kv_heads, True)


def forward(q, k, v, visited, order=None, *, scale, hi, block_q, block_k, interpret=False):
    """(o, lse) as the other kernels of the technique: q [B, H, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv],
    visited bool [H or 1, tiles of queries, tiles of keys]; blocks in multiples of 64, D and Dv up to 128.

    order: of queries, see `orders`; interpret is for other kernels.
    """
    high, keys = _tall(block_q), _wide(block_k)
    lists = Cut(visited, block_q, block_k, q.shape[2], k.shape[2], hi).lists(high, keys)
    tiles = Tiles(high // ROWS, keys, 256 // keys, turns=high > ROWS, late=hi is None)
    return flash_hopper.attend(q, k, v, lists=lists, order=order, scale=scale, hi=hi, tiles=tiles)


def backward(
    do, q, k, v, lse, delta, visited, by_query=None, by_key=None, *, scale, hi, block_q, block_k,
    interpret=False,
):  # fmt: skip
    """(dq, dk, dv), operands as in `forward`, lse and delta [B, H, L] as in flash's kernels; by_query and
    by_key are the `orders`.
    """
    cut = Cut(visited, block_q, block_k, q.shape[2], k.shape[2], hi)
    rows, columns = _tall(block_q), _tall(block_k)
    return flash_hopper_backward.attend_backward(
        do, q, k, v, lse, delta, cut.lists(STEP, columns, by_key=True), cut.lists(rows, STEP),
        orders=(by_key, by_query), scale=scale, hi=hi, key_sizes=(columns // ROWS, STEP, 4),
        query_sizes=(rows // ROWS, STEP, 4),
    )  # fmt: skip


def _tall(block):
    """Rows of a kernel's block: two groups of 64 where the mask's blocks hold them."""
    return 2 * ROWS if block % (2 * ROWS) == 0 else ROWS


def _wide(block):
    """Keys of a tile in the forward pass."""
    return 128 if block % 128 == 0 else 64


class Cut:
    """A mask of block_q x block_k on L queries and S keys, for tiles that divide the blocks."""

    def __init__(self, visited, block_q, block_k, L, S, hi):
        self.visited, self.blocks, self.sizes, self.causal = (
            visited,
            (block_q, block_k),
            (L, S),
            hi is not None,
        )

    def tiles(self, rows, keys, by_key=False):
        """(seen, whole), bool [1, H or 1, tiles of queries, tiles of keys], or with by_key turned: which
        tiles of rows x keys are visited, and which of them nothing cuts.
        """
        fine = self.visited
        for axis, size, block, n in zip((1, 2), (rows, keys), self.blocks, self.sizes, strict=True):
            fine = fine.repeat(block // size, axis=axis)
            fine = fine[:, : -(-n // size)] if axis == 1 else fine[..., : -(-n // size)]
        reach, whole = tiles_in_sight(rows, keys, *self.sizes, self.causal)
        seen, whole = (fine & reach[None])[None], whole[None, None]
        if by_key:
            seen, whole = seen.swapaxes(2, 3), whole.swapaxes(2, 3)
        return seen, whole

    def lists(self, rows, keys, by_key=False):
        """int32 [1, H or 1, tiles, 2 + n]: how many tiles of rows x keys are seen, how many of them are cut,
        and where they begin, the cut ones first; for every tile of queries, or of keys.
        """
        seen, whole = self.tiles(rows, keys, by_key)
        step = rows if by_key else keys
        return listing(seen, whole, step * np.arange(seen.shape[-1], dtype=np.int32)[None, None, None])

    def dealt(self, rows, keys, batches, heads, by_key=False):
        """The order of these tiles, see `Tasks.dealt`, for so many batches and heads, or key heads, of each;
        None where all tiles meet as many.

        A head's tiles, those that meet most first, go to whichever block is free first: heads stay side by
        side, as they share what they load.
        """
        counts = self.tiles(rows, keys, by_key)[0][0].sum(-1)  # [H or 1, tiles]
        if by_key:  # the kernel counts tiles of keys from the last
            counts = counts.reshape(min(heads, len(counts)), -1, counts.shape[1]).sum(1)[:, ::-1]
        if (counts == counts[0, 0]).all():
            return None
        counts = np.broadcast_to(counts + ALONE, (heads, counts.shape[1]))
        items = np.argsort(-counts, axis=1, kind="stable") + counts.shape[1] * np.arange(heads)[:, None]
        cost, blocks = counts.reshape(-1), min(cores_of(), batches * counts.size)
        load, own = [(0.0, i) for i in range(blocks)], [[] for _ in range(blocks)]
        for batch in range(batches):
            for item in items.reshape(-1):
                least, i = load[0]
                heapq.heapreplace(load, (least + cost[item], i))
                own[i].append(batch * counts.size + item)
        turns = max(map(len, own))
        return np.array([x + [-1] * (turns - len(x)) for x in own], np.int32).T
