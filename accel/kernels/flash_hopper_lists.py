"""What the kernels for Hopper are told about hidden keys: lists of tiles, bounds of rows, and a mask.

A row sees the keys start <= j < end, and of these those of a boolean mask. From that follow, in plain JAX,
for every tile of queries (or of keys) the tiles that it meets, those that something cuts in front: only these
are masked, and tiles that nobody sees are not visited. Without a mask they are runs of tiles, known by their
ends, and the largest array has an entry for every pair of tiles. Axes of length 1 are shared.
"""

from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Hidden", "Seen", "listing", "packed", "spans"]

SHARED = 64  # rows of a table or a mask that all rows share: what a group of the kernels takes


class Hidden(NamedTuple):
    """Operands of a kernel, None where not needed.

    lists: int32 [B or 1, H or 1, tiles or 1, 2 + n], see `listing`.
    bounds: int32 [B or 1, H or 1, 2, L or SHARED], start and end of every row.
    mask: `packed` of [B or 1, H or 1, L or SHARED, S], in kernels that hold keys of [.., S, L or 128].
    spare: like the arrays that pass, with zeros for what nothing sees, or what sees nothing, in the tiles
      where that is; only these are written there, and the lists name their beginning x as -1 - x.
    stay: (int32 [B or 1, Hkv or 1, S / 64], whether 64 keys are to be taken from them; arrays like the keys
      and values that are held, likewise), or nothing.
    order: int32 [B tiles], see `by_cost`.
    bias: what is added to the scaled scores, see `flash_hopper.laid`.
    """

    lists: jax.Array | None = None
    bounds: jax.Array | None = None
    mask: jax.Array | None = None
    spare: tuple[jax.Array, ...] = ()
    stay: tuple[jax.Array, ...] = ()
    order: jax.Array | None = None
    bias: jax.Array | None = None


@dataclass(frozen=True)
class Seen:
    """Which of S keys L rows see: start <= j < end, int32 [B or 1, H or 1, L or 1], and mask, bool [B or 1, H
    or 1, L or 1, S]; None: no such bound. G query heads share a key head.

    A start that is no constant, and end with it, never decrease from row to row, as with texts end to end.
    Other ends may: of the rows that see something, if these skip tiles, the tiles between are met in vain.
    itself: every row sees at least the key of its own number, and every key has such a row.
    """

    L: int
    S: int
    G: int
    start: jax.Array | None = None
    end: jax.Array | None = None
    mask: jax.Array | None = None
    told: bool = False  # by more than static bounds
    itself: bool = False

    @staticmethod
    def make(L, S, G, lo=None, hi=None, start=None, end=None, mask=None, itself=False):
        """As above, and i + lo <= j <= i + hi."""
        told = any(x is not None for x in (start, end, mask))
        i = np.arange(L, dtype=np.int32)[None, None]
        first = None if lo is None or lo <= 1 - L else np.clip(i + lo, 0, S).astype(np.int32)
        if start is None:
            start = first
        else:
            start = jnp.maximum(start, 0 if first is None else first).astype(jnp.int32)
        last = None if hi is None or hi >= S - 1 else np.clip(i + hi + 1, 0, S).astype(np.int32)
        if end is None:
            end = last
        else:
            end = jnp.minimum(end, S if last is None else last).astype(jnp.int32)
        return Seen(L, S, G, start, end, mask, told, itself)

    @property
    def uneven(self):
        """Whether some row of a head may see nothing where others see something."""
        return not self.itself and (self.mask is not None or max(x.shape[2] for x in self.rows) > 1)

    @property
    def _unbroken(self):
        """Whether the ranges of the rows that see something leave no gap between them."""
        fixed = self.start is None or isinstance(self.start, np.ndarray)  # one key further from row to row
        return self.itself or fixed or max(x.shape[2] for x in self.rows) == 1

    def alive(self, lse):
        """bool [B or 1, H or 1, L]: the rows that see something; by lse [B, H, L], where a mask tells."""
        if self.mask is not None:
            return lse < jnp.inf
        start, end = self.rows
        return jnp.broadcast_to(start < end, (*start.shape[:2], self.L))

    @property
    def rows(self):
        """(start, end) of every row, alike in shape."""
        start = np.zeros((1, 1, 1), np.int32) if self.start is None else self.start
        end = np.full((1, 1, 1), self.S, np.int32) if self.end is None else self.end
        xp = jnp if isinstance(end, jax.Array) or isinstance(start, jax.Array) else np
        return xp.broadcast_arrays(start, end)

    def reach(self, size):
        """(first, last, least, most), int32 [B or 1, H or 1, tiles or 1], of every tile of `size` rows: all
        keys that a row sees are among first <= j < last, and every row sees all least <= j < most.
        """
        start, end = self.rows
        xp, some = np if isinstance(end, np.ndarray) else jnp, start < end
        if start.shape[2] > 1:
            long = [(0, 0), (0, 0), (0, -self.L % size)]
            cut = lambda x, fill: xp.pad(x, long, constant_values=fill).reshape(*x.shape[:2], -1, size)
        else:
            cut = lambda x, fill: x[..., None]
        first, last = cut(xp.where(some, start, self.S), self.S).min(3), cut(xp.where(some, end, 0), 0).max(3)
        return first, last, cut(start, 0).max(3), cut(end, self.S).min(3)

    def tiles(self, size, keys):
        """(seen, whole), bool [B or 1, H or 1, tiles or 1, tiles of keys]: which tiles of `size` queries and
        `keys` keys may hold a key that a row sees, and of which every row sees every key.
        """
        first, last, least, most = (x[..., None] for x in self.reach(size))
        at = np.arange(0, self.S, keys, dtype=np.int32)[None, None, None]
        seen, whole = (first < at + keys) & (last > at), (least <= at) & (most >= at + keys)
        if self.mask is None:
            return seen, whole
        bits, n = packed(self.mask), at.shape[3]
        bits = jnp.pad(bits, [(0, 0), (0, 0), (0, 0), (0, keys // 8)])[..., : n * keys // 8]
        tall = size if bits.shape[2] > 1 else 1
        cut = lambda fill: _rows_of(bits, tall, fill).reshape(*bits.shape[:2], -1, tall, n, keys // 8)
        return seen & (cut(0) > 0).any((3, 5)), whole & (cut(255) == 255).all((3, 5))

    def by_query(self, size, keys, spare=(), dirty=None, ordered=True):
        """The Hidden of a kernel that holds `size` queries while tiles of `keys` keys pass; `spare` for those
        that are `dirty`, bool [B or 1, Hkv or 1, tiles]; ordered: with the order by cost.
        """
        at = np.arange(0, self.S, keys, dtype=np.int32)[None, None, None]
        if dirty is not None:
            each = self.G if dirty.shape[1] > 1 else 1
            at = jnp.where(jnp.repeat(dirty, each, axis=1)[:, :, None], -1 - at, at)
        if self.mask is None:
            first, last, least, most = self.reach(size)
            run = first // keys, -(-last // keys), -(-least // keys), most // keys
            lists = running(*run, at, None if self._unbroken else self._met_tiles(keys))
        else:
            lists = listing(*self.tiles(size, keys), at)
        order = by_cost(lists, -(-self.L // size)) if ordered else None
        return Hidden(lists, self._bounds(), self._padded(), spare, order=order)

    def by_key(self, size, keys, spare=(), dirty=None, stay=(), ordered=True):
        """The Hidden of a kernel that holds `keys` keys while tiles of `size` queries pass; `spare` for those
        that are `dirty`, bool [B or 1, H or 1, tiles]; ordered: with the order by cost, which it has anyway
        where batches differ.
        """
        at = np.arange(0, self.L, size, dtype=np.int32)[None, None, None]
        tall, tiles = at.shape[3], self.tiles(size, keys)
        seen, whole = (jnp.broadcast_to(x, (*x.shape[:2], tall, x.shape[3])) for x in tiles)
        if dirty is not None:
            at = jnp.where(dirty[:, :, None], -1 - at, at)
        if self.mask is None:
            number, some = np.arange(tall, dtype=np.int32)[None, None, :, None], None
            ends = lambda x: (jnp.where(x, number, tall).min(2), jnp.where(x, number + 1, 0).max(2))
            (begin, end), (clear, stop) = ends(seen), ends(whole)
            stop = jnp.where(whole.sum(2) == stop - clear, stop, clear)  # none is whole if they are no run
            if not self._unbroken:
                first, last = self.reach(size)[:2]
                end, some = jnp.where(self._met_tiles(keys), end, begin), first < last
            lists = running(begin, end, clear, stop, at, some)
        else:
            lists = listing(seen.swapaxes(2, 3), whole.swapaxes(2, 3), at)
        back = lists[:, :, ::-1]  # the kernel counts its tiles from the last
        order = by_cost(back, lists.shape[2]) if ordered or len(lists) > 1 else None
        return Hidden(lists, self._bounds(), self._padded(turned=True), spare, stay, order)

    def of_bias(self, ds, bias):
        """The gradient of a bias [B or 1, H or 1, L or 1, S or 1] of dS [B, H, L, S], which may hold anything
        for what is not seen.
        """
        start, end = (x[..., None] for x in self.rows)
        j = np.arange(self.S, dtype=np.int32)[None, None, None]
        seen = (j >= start) & (j < end)
        ds = jnp.where(seen if self.mask is None else seen & self.mask, ds, 0)
        axes = tuple(a for a in range(4) if bias.shape[a] == 1)
        return ds.sum(axes, keepdims=True, dtype=jnp.float32).astype(bias.dtype)

    def _bounds(self):
        if self.start is None and self.end is None:
            return None
        both = jnp.stack(self.rows, axis=2)
        if both.shape[3] == 1:
            return jnp.broadcast_to(both, (*both.shape[:3], SHARED))
        return jnp.pad(both, [(0, 0), (0, 0), (0, 0), (0, -self.L % 4)])

    def _padded(self, turned=False):
        if self.mask is None:
            return None
        x = self.mask
        if x.shape[2] == 1:
            x = jnp.broadcast_to(x, (*x.shape[:2], 128 if turned else SHARED, self.S))
        return packed(x.swapaxes(2, 3) if turned else x)

    def keys(self):
        """bool [B or 1, Hkv or 1, S]: the keys that some row of a key head's query heads sees."""
        seen = self._met()
        B, H = seen.shape[:2]
        return seen.reshape(B, -1, self.G if H > 1 else 1, self.S).any(2)

    def _met(self):
        """bool [B or 1, H or 1, S]: the keys that some row sees."""
        if self.start is None and self.end is None:
            return unpacked(lax.reduce(packed(self.mask), np.uint8(0), lax.bitwise_or, (2,)))[..., : self.S]
        j = np.arange(self.S, dtype=np.int32)[None, None]
        if self.mask is not None:
            start, end = (x[..., None] for x in self.rows)
            return ((j[None] >= start) & (j[None] < end) & self.mask).any(2)
        if self._unbroken:
            first, last = self.reach(self.L)[:2]
            return (j >= first) & (j < last)
        start, end = self.rows
        row = searched(end, j, "right")  # the first to end behind the key: later ones begin no earlier
        return (row < self.L) & (jnp.take_along_axis(start, jnp.minimum(row, self.L - 1), 2) <= j)

    def _met_tiles(self, keys):
        """bool [B or 1, H or 1, tiles]: of so many keys, those of which some row sees one."""
        met = jnp.pad(self._met(), [(0, 0), (0, 0), (0, -self.S % keys)])
        return met.reshape(*met.shape[:2], -1, keys).any(3)


def by_cost(lists, tall):
    """int32 [B tall]: b tall + t for the tiles t of all batches b, those that meet most others first; of one
    batch where all have one list. None where all tiles have one, and any order does as well.
    """
    B, _, tiles, _ = lists.shape
    if B == tiles == 1:
        return None
    cost = jnp.broadcast_to(lists[..., 0].sum(1), (B, tall)).reshape(-1)
    number = np.arange(len(cost), dtype=np.int32)
    ahead = (cost[None] > cost[:, None]) | ((cost[None] == cost[:, None]) & (number[None] < number[:, None]))
    rank = ahead.sum(-1, dtype=jnp.int32)
    return jnp.where(rank[None] == number[:, None], number[None], 0).sum(-1, dtype=jnp.int32)


def searched(values, than, side):
    """int32 [.., n]: of how many of values [.., m], which do not decrease, value < than [.., n] holds; with
    side="right", value <= than.
    """
    # Unrolled: on an H200 XLA makes three to five small kernels of it (docs/notes/gpu.md).
    search = partial(jnp.searchsorted, side=side, method="scan_unrolled")
    return jnp.vectorize(search, signature="(m),(n)->(n)")(values, than).astype(jnp.int32)


def spans(ids, others):
    """(start, end), int32 [.., n]: others [.., m], which do not decrease, equal ids [.., n], integers, from
    start on and below end. One search for both: of what is below a number is what is at most one less.
    """
    found = searched(others, jnp.concatenate([ids - 1, ids], axis=-1), "right")
    start, end = jnp.split(found, 2, axis=-1)
    return jnp.where(ids == jnp.iinfo(ids.dtype).min, 0, start), end  # where one less is no number


def packed(mask):
    """bool [.., R, C] -> uint8 [.., R, C / 8], C in whole 128s; bit i of byte 8 t + c: column 64 t + 8 i + c,
    so that a thread of a warpgroup finds the columns it holds in as few bytes as possible.
    """
    x = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 128)]).astype(jnp.uint8)
    x = x.reshape(*x.shape[:-1], -1, 8, 8)
    return reduce(or_, (x[..., i, :] << np.uint8(i) for i in range(8))).reshape(*x.shape[:-3], -1)


def unpacked(bits):
    """The inverse of `packed`: bool [.., 8 n] of uint8 [.., n]."""
    x = bits.reshape(*bits.shape[:-1], -1, 8)
    return jnp.stack([x & np.uint8(1 << i) for i in range(8)], axis=-2).reshape(*bits.shape[:-1], -1) > 0


def _rows_of(x, tall, fill):
    """[B, H, L, ..] in tiles of so many rows, those beyond the last filled."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % tall), (0, 0)], constant_values=np.uint8(fill))


def listing(seen, whole, at):
    """int32 [.., tiles, 2 + n]: for every tile how many of n others it sees, how many of these are cut, and
    where they begin, the cut ones first; where the first begins if it sees none, as kernels look there then.
    seen, whole: bool [.., tiles, n]; at: int32, broadcastable to these.
    """
    xp = np if all(isinstance(x, np.ndarray) for x in (seen, whole, at)) else jnp
    seen, whole, at = xp.broadcast_arrays(seen, whole, at)
    order = xp.argsort(xp.where(seen, xp.where(whole, 1, 0), 2), axis=-1, stable=True)
    found, count = xp.take_along_axis(at, order, axis=-1), lambda x: x.sum(-1, keepdims=True)
    return jnp.asarray(xp.concatenate([count(seen), count(seen & ~whole), found], axis=-1), jnp.int32)


def running(begin, end, whole, stop, at, some=None):
    """As `listing`, where a tile sees the others begin <= x < end, and all of whole <= x < stop among these,
    int32 [.., tiles]; but for others that are not in `some`, bool [.., n]. at: int32 [.., 1, n].
    """
    n, first, stop = at.shape[-1], at[..., :1], jnp.maximum(whole, stop)
    if some is not None:  # all by the place among these
        before = jnp.cumsum(some, -1, dtype=jnp.int32)
        place = np.arange(n, dtype=np.int32).reshape(*[1] * (some.ndim - 1), n)
        at = jnp.take_along_axis(at, searched(before, place, "right")[..., None, :], -1, mode="clip")
        before = jnp.pad(before, [(0, 0)] * (some.ndim - 1) + [(1, 0)])
        begin, end, whole, stop = (jnp.take_along_axis(before, x, -1) for x in (begin, end, whole, stop))
    count, clear = jnp.maximum(end - begin, 0), stop - whole
    begin, whole, count, clear = (x[..., None] for x in (begin, whole, count, clear))
    cut = count - clear
    entry = np.arange(-2, n, dtype=np.int32).reshape(*[1] * (at.ndim - 1), n + 2)
    x = begin + entry
    x = jnp.where(entry < cut, jnp.where((clear > 0) & (x >= whole), x + clear, x), whole + entry - cut)
    found = jnp.where(count > 0, jnp.take_along_axis(at, x, -1, mode="clip"), first)
    return jnp.where(entry < 0, jnp.where(entry == -2, count, cut), found)
