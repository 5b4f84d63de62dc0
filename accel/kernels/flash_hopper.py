"""FlashAttention in Pallas for Hopper GPUs (Mosaic GPU): the forward pass.

Each core runs one block for the whole call and takes query tiles from a fixed list. In a block one
warpgroup only loads (TMA, a ring of key and value tiles); the others compute, 64 queries each. A group issues
the scores of the next key tile and the values of this one together (wgmma, asynchronous) and takes the
exponentials of the former, to base 2, while the latter run. Key tiles go from the last to the first, so that
those on the edge of what is visible, the only ones masked, come first (and last, in a window); or in the
order of a list, if lengths or a mask hide keys (flash_hopper_lists.py): of a tile that these cut, the rows'
bounds and the mask's tile come with the queries and the keys. Each group has its own ring of tiles of a bias,
which its scores begin with. Causal calls take query tiles in pairs, a long one and a short one, so that all
pairs cost the same; where everything is visible, two blocks side by side load keys and values together (a
cluster). Sums are float32; nothing is atomic: the same call gives the same bits.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels import flash_triton
from accel.kernels.flash_hopper_lists import SHARED, Hidden, Seen

__all__ = ["attend", "attend_backward"]

LOG2E = 1.4426950408889634
LOWEST = -(2.0**127)  # where a running maximum starts: finite, so that a row that sees nothing makes no NaN
ROWS = 64  # queries a warpgroup: the height of a wgmma
CORES = 132  # of an H100 or H200 SXM
WHOLE = (lambda: None), (lambda s, words: s)  # of a tile that nothing cuts: what to read, and to hide
SPARE = {"reduction_scratch_bytes": 0}  # shared memory for sums across warps, which these kernels do not take
SPACE = (227 * 1024 - 2560) // 2  # half-precision numbers that shared memory holds beside rows and barriers
ROUND = 6  # items of work that a block has at least, where a call has that many for every core


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: `groups` of 64 queries a block, `keys` a tile, `stages` of key and value tiles."""

    groups: int
    keys: int
    stages: int
    overlap: bool = True  # scores of the next tile beside the values of this one
    turns: bool = True  # the groups issue their products in turn
    late: bool = True  # wait for the values only once the exponentials are taken
    own_o: bool = True  # results leave through shared memory of their own, not through that of the queries
    ahead: bool = False  # the queries of the next tile load while this one is computed
    share: int = 1  # blocks of a cluster, which hold tiles of one head and load keys and values together
    aside: int = 1  # tiles of a bias that a group holds, where there is one

    @staticmethod
    def fit(D, Dv, L, causal, narrow=False):
        """What was fastest on an H200, within 227 KB of shared memory and 64 K registers.

        narrow: a window of few tiles.
        """
        wide = max(D, Dv)
        groups, keys, stages = (3, 128, 3) if wide <= 64 else (2, 128, 2) if wide <= 128 else (2, 64, 2)
        if groups == 3 and up(L, 3 * ROWS) > 1.15 * up(L, 2 * ROWS):
            groups = 2
        groups = min(groups, -(-L // ROWS))
        if narrow and groups == 3:
            return Tiles(groups, 64, 4, late=False, ahead=True)
        turns, late, own_o = groups > 1 and wide <= 192, not causal and wide <= 192, wide <= 192
        return Tiles(groups, keys, stages, turns=turns, late=late, own_o=own_o)

    def shared(self):
        """These in clusters of two, whose groups then issue their products when they like."""
        return replace(self, share=2, turns=False)

    def beside(self, D, Dv, masked):
        """The same with as many tiles of a bias as fit, at most one for each stage."""
        rows = self.groups * ROWS
        used = rows * D * (2 if self.ahead else 1) + self.stages * self.keys * (D + Dv)
        used += rows * Dv * self.own_o + self.stages * rows * 8 * masked  # half-precision numbers
        count = (SPACE - used) // (rows * self.keys)
        if count < 1 and self.own_o:
            return replace(self, own_o=False).beside(D, Dv, masked)
        return replace(self, aside=max(1, min(self.stages, count)))

    def spot(self, group, turn):
        """Where the queries of a group lie in its turn."""
        return group + lax.rem(turn, jnp.int32(2)) * self.groups if self.ahead else group

    @property
    def block(self):
        """Which block this is."""
        block = lax.axis_index("block")
        return block if self.share == 1 else block * self.share + lax.axis_index("half")

    @property
    def together(self):
        """Options of a copy that the blocks of a cluster make, each its part for all."""
        return {} if self.share == 1 else {"collective_axes": "half"}


def up(n, size):
    """n, rounded up to a multiple of size."""
    return n + -n % size


def attend_backward(
    do, q, k, v, lse, delta, *, start=None, end=None, mask=None, bias=None, scale, lo=None, hi=None,
    rows_first=False, itself=False, learnt=False,
):  # fmt: skip
    """(dq, dk, dv) like q, k, v, operands as in `attend`; lse, delta [B, H, L] as in `flash_triton.backward`.

    Heads wider than 128 and a few queries are Triton's, which is faster there; it takes no bias.
    learnt: a fourth result, like bias.
    """
    from accel.kernels import flash_hopper_backward

    few = q.shape[1 if rows_first else 2] <= 16 and bias is None
    if not few and max(q.shape[3], v.shape[3]) <= flash_hopper_backward.WIDEST:
        return flash_hopper_backward.attend_backward(
            do, q, k, v, lse, delta, start=start, end=end, mask=mask, bias=bias, scale=scale, lo=lo, hi=hi,
            rows_first=rows_first, itself=itself, learnt=learnt,
        )  # fmt: skip
    if bias is not None:
        raise NotImplementedError(f"no gradients with a bias for heads of {q.shape[3]}, {v.shape[3]}")
    turned = (lambda x: jnp.moveaxis(x, 1, 2)) if rows_first else (lambda x: x)
    do, q, k, v = (turned(x) for x in (do, q, k, v))
    (B, H, L), (Hkv, S) = q.shape[:3], k.shape[1:3]
    seen = Seen.make(L, S, H // Hkv, lo, hi, start, end, mask)
    if seen.told:
        q, do, delta, k, v = *of_seen_rows(lse, q, do, delta), *of_seen_keys(seen, k, v)
    group = lambda x: x.reshape(B * Hkv, H // Hkv, *x.shape[2:])
    flat = lambda x: x.reshape(B * Hkv, *x.shape[2:])
    if start is not None:
        later = np.arange(S, dtype=np.int32)[None, None, None] >= start[..., None]
        mask = later if mask is None else later & mask
    if end is not None:
        end = group(jnp.broadcast_to(end, (B, H, L)))
    if mask is not None:
        b, h, rows = mask.shape[:3]
        own = (B, Hkv if h == 1 else H) if b * h > 1 else (1, 1)
        mask = jnp.broadcast_to(mask, (*own, rows, S)).astype(jnp.int8)
        mask = mask.reshape(-1, 1, rows, S) if h == 1 else group(mask)
    grads = flash_triton.backward(
        group(do), group(q), flat(k), flat(v), group(lse), group(delta), end, mask, scale=scale, lo=lo, hi=hi
    )
    return tuple(turned(g.reshape(x.shape)) for g, x in zip(grads, (q, k, v), strict=True))


@partial(jax.jit, static_argnames=("scale", "lo", "hi", "rows_first", "itself", "tiles", "cores"))
def attend(
    q, k, v, *, start=None, end=None, mask=None, bias=None, lists=None, order=None, scale, lo=None, hi=None,
    rows_first=False, itself=False, tiles=None, cores=None,
):  # fmt: skip
    """softmax(scale q k^T + bias) v -> (o [B, H, L, Dv] in q's dtype, lse [B, H, L] float32).

    Args: q [B, H, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], bfloat16 or float16, D and Dv up to 256;
        query head h uses key head h // (H / Hkv). rows_first: q [B, L, H, D] and k, v, o likewise.
      lo, hi: query i sees keys i + lo <= j <= i + hi; None: no such bound. A row that sees no key: o = 0,
        lse = -inf.
      start, end: int32 [B or 1, H or 1, L or 1]: a row sees keys from start on and below end; mask: bool [B
        or 1, H or 1, L or 1, S]. With a start neither goes back from row to row. Keys that no row of any
        query head of their key head sees may hold NaN.
      itself: query i sees key i at least, of as many, and so nothing has to be kept from NaN; the texts of a
        batch end to end, say.
      bias: [B or 1, H or 1, L or 1, S or 1] in q's dtype, for scales that are no nearer to 0 than 2^-30; -inf
        hides a key, but none that holds NaN.
      lists: int32 [B or 1, H or 1, tiles of queries, 2 + tiles of keys] in place of these, which make their
        own: for each tile of queries how many tiles of keys it sees, how many of these lo, hi or S cut,
        and where they begin, those first.
      order: which block computes which of these tiles, see `Tasks.dealt`.
      tiles, cores: None is what suits the call and the device.
    """
    if scale <= 0:  # then the largest product is not the largest score
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    rows, heads = (1, 2) if rows_first else (2, 1)
    L, S, Dv = q.shape[rows], k.shape[rows], v.shape[3]
    seen = Seen.make(L, S, q.shape[heads] // k.shape[heads], lo, hi, start, end, mask, itself)
    D, wide = (up(x.shape[3], 32) for x in (q, v))
    if max(D, wide) > 192:
        D = wide = 256  # the results leave through the room of the queries
    q, k, v = (pad(x, rows, d) for x, d in ((q, D), (k, D), (v, wide)))
    short = narrow(lo, hi) and not seen.told
    given, tiles = tiles, tiles or Tiles.fit(D, wide, L, hi is not None, short)
    B, H, size = q.shape[0], q.shape[heads], ROWS * tiles.groups
    hidden, causal = Hidden(lists, order=order), hi is not None and lo is None
    if seen.told:
        copies, dirty = ((), None) if itself else cleaned((v,), seen.keys(), tiles.keys, rows)
        hidden = seen.by_query(size, tiles.keys, copies, dirty, evens_out(max(D, wide), start))
        lo = hi = None  # the bounds hold these
    tasks = Tasks.make(B * H, -(-L // size), causal, cores or cores_of(), hidden.order, short)
    plain = lo is None and hi is None and not jax.tree.leaves(hidden)
    if given is None and plain and 64 < max(D, wide) <= 128 and tasks.side_by_side:
        tiles = tiles.shared()
    batches = None
    if bias is not None:
        tiles, hidden = tiles.beside(D, wide, mask is not None), hidden._replace(bias=laid(bias, tiles.keys))
        batches = B if bias.shape[0] == 1 and hidden.order is None else None
    hidden = hidden._replace(order=tasks.dealt(hidden.order))
    plan = _Plan(H, H // k.shape[heads], S, lo, hi, size, tiles.keys, rows_first, tasks, batches)
    o, lse = _run(plan, tiles, scale * LOG2E, hidden, q, k, v)
    o = lax.slice_in_dim(o, 0, L, axis=rows)
    return o[..., :Dv], lse[:, :, :L]


def of_seen_keys(seen, *arrays, rows=2):
    """The arrays, [B, Hkv, S, D] or with rows=1 [B, S, Hkv, D], with zeros for keys that nothing sees."""
    keep = seen.keys()[..., None]
    return tuple(jnp.where(jnp.moveaxis(keep, 2, rows), x, 0) for x in arrays)


def of_seen_rows(lse, *arrays, rows=2):
    """The arrays, [B, H, L] or with D as above, with zeros for rows that see nothing: lse [B, H, L] = inf."""
    some = lse < jnp.inf
    keep = jnp.moveaxis(some[..., None], 2, rows)
    return tuple(jnp.where(some if x.ndim == 3 else keep, x, 0) for x in arrays)


def cleaned(arrays, keep, size, rows, block=1):
    """(copies, dirty): the arrays with zeros in rows where keep is False, in those tiles of `size` rows that
    dirty, bool [B or 1, H or 1, tiles], names: that hold such rows and belong to the first, or to a block
    of so many tiles with a row to keep. The rest of the copies is not written.

    arrays [B, H, N, D] or with rows=1 [B, N, H, D]; keep bool [B or 1, H or 1, N].
    """
    B, heads, (b, h, n) = arrays[0].shape[0], arrays[0].shape[3 - rows], keep.shape
    tiles, per = up(-(-n // size), block), size // ROWS
    fill = lambda value: jnp.pad(keep, [(0, 0), (0, 0), (0, tiles * size - n)], constant_values=value)
    some = jnp.repeat(fill(False).reshape(b, h, -1, block * size).any(-1), block, axis=2)
    some = some | (np.arange(tiles) == 0)[None, None]  # where rows that see nothing look
    dirty = some & ~fill(True).reshape(b, h, tiles, size).all(-1)
    count = len(arrays)

    def kernel(*refs):
        sources, (keep_ref, dirty_ref), (*targets, rooms, keep_room, full) = (
            refs[:count], refs[count : count + 2], refs[count + 2 :]
        )  # fmt: skip
        batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        own, at = pick(keep_ref, batch, head), pl.ds(tile * ROWS, ROWS)
        part = lambda ref: ref.at[batch, at, head] if rows == 1 else ref.at[batch, head, at]

        @pl.when(dirty_ref[*own, lax.div(tile, jnp.int32(per))] != 0)
        def _():
            for source, room in zip(sources, rooms, strict=True):
                plgpu.copy_gmem_to_smem(part(source), room, full)
            plgpu.copy_gmem_to_smem(keep_ref.at[*own, at], keep_room, full)
            plgpu.barrier_wait(full)
            kept = spread(keep_room, plgpu.Layout.WGMMA.reduce(1)) != 0
            for room, target in zip(rooms, targets, strict=True):
                value = spread(room, plgpu.Layout.WGMMA)
                wide = lax.broadcast_in_dim(kept, value.shape, [0])
                room[...] = jnp.where(wide, value, jnp.zeros((), value.dtype))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(room, part(target))
            plgpu.wait_smem_to_gmem(0)

    copies = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        scratch_types=(
            tuple(room(0, ROWS, x.shape[3], x.dtype) for x in arrays),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.Barrier(num_barriers=1, num_arrivals=count + 1),
        ),
        grid=(B, heads, tiles * per),
        grid_names=("batch", "head", "tile"),
        kernel_name="flash_clean",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*arrays, fill(False).astype(jnp.int32), dirty.astype(jnp.int32))
    return tuple(copies), dirty[..., : -(-n // size)]


def evens_out(wide, start):
    """Whether the tiles of a call with lists go by cost. Heads that share keys then no longer run side by
    side, which at widths above 64 costs more than it evens out, unless rows begin at keys of their own.
    """
    return wide <= 64 or start is not None


def narrow(lo, hi):
    """Whether a window is of so few tiles that it counts how one row of tiles follows the last."""
    return lo is not None and hi is not None and hi - lo < 2048


def pad(x, rows, d):
    """x with d columns, and rows in eights, as TMA takes them."""
    short = {rows: -x.shape[rows] % 8, 3: d - x.shape[3]}
    return jnp.pad(x, [(0, short.get(a, 0)) for a in range(4)]) if any(short.values()) else x


def cores_of():
    """Multiprocessors of the device that runs the call; of an H100 where JAX sees none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else CORES


@dataclass(frozen=True)
class Tasks:
    """Which block takes which tile, and when: `tall` tiles a head; causal ones cost the more, the later."""

    heads: int
    tall: int
    causal: bool
    pairs: bool
    blocks: int
    turns: int

    @staticmethod
    def make(heads, tall, causal, cores, order=None, short=False):
        """short: tiles of queries meet but a few of keys each."""
        if order is not None and order.ndim == 2:  # as it was dealt
            return Tasks(heads, tall, False, False, order.shape[1], order.shape[0])
        causal = causal and order is None
        couples = heads * (-(-tall // 2))  # equal costs, unless they leave blocks without work in the end
        pairs = causal and couples >= 0.95 * up(couples, cores)
        items = couples if pairs else heads * tall
        # Long lists come in several rounds of blocks, at no cost: what another kernel takes of a core for a
        # while, as the one that sends keys between devices does, then delays a round and not the call.
        least = ROUND * (2 if short else 1)
        blocks = min(cores * max(1, items // (least * cores)), items)
        return Tasks(heads, tall, causal, pairs, blocks, -(-items // blocks) * (2 if pairs else 1))

    @property
    def side_by_side(self):
        """Whether blocks 2i and 2i + 1 always have tiles 2j and 2j + 1 of one head."""
        return not self.causal and self.blocks % 2 == self.tall % 2 == 0

    def at(self, block, turn, order=None):
        """What a block does in its turn: (whether anything, head of all, tile); order: see `dealt`."""
        if order is not None:
            item, tall = order[turn, block], jnp.int32(self.tall)
            return item >= 0, lax.div(item, tall), lax.rem(item, tall)
        per_head = jnp.int32(-(-self.tall // 2) if self.pairs else self.tall)
        items = self.heads * per_head
        if self.pairs:  # tile p from the end, then tile p from the start; heads one after the other
            item, half = block + lax.div(turn, jnp.int32(2)) * self.blocks, lax.rem(turn, jnp.int32(2))
            head, p = lax.div(item, per_head), lax.rem(item, per_head)
            t = jnp.where(half == 0, self.tall - 1 - p, p)
            return (item < items) & ((half == 0) | (2 * p != self.tall - 1)), head, t
        if not self.causal:
            item = block + turn * self.blocks
            return item < items, lax.div(item, per_head), lax.rem(item, per_head)
        # longest first, the order of the blocks turned round every time
        back = lax.rem(turn, jnp.int32(2)) == 1
        item = turn * self.blocks + jnp.where(back, self.blocks - 1 - block, block)
        heads = jnp.int32(self.heads)
        return item < items, lax.rem(item, heads), self.tall - 1 - lax.div(item, heads)

    def dealt(self, order):
        """int32 [turns, blocks]: head of all x tall + tile of what a block does in its turns, below 0 for
        nothing. Of an `order` by cost, see `by_cost`, every turn goes through the blocks, up and down.
        """
        if order is None or order.ndim == 2:
            return order
        heads = self.heads * self.tall // order.shape[0]  # that share an entry
        b, t = order // self.tall, order % self.tall
        own = b[:, None] * heads + np.arange(heads, dtype=np.int32)[None]
        items = (own * self.tall + t[:, None]).reshape(-1)
        rest = self.turns * self.blocks - items.shape[0]
        rounds = jnp.pad(items, (0, rest), constant_values=-1).reshape(self.turns, self.blocks)
        return jnp.where(np.arange(self.turns)[:, None] % 2 == 1, rounds[:, ::-1], rounds)

    def each(self, block, body, order=None):
        """body(loaded, turn, head, tile) -> loaded for the tiles of a block.

        loaded: what has gone through the ring so far; turn: how many tiles the block had before, nearly.
        """

        def turn(i, loaded):
            some, head, tile = self.at(block, i, order)
            return lax.cond(some, lambda n: body(n, i, head, tile), lambda n: n, loaded)

        return lax.fori_loop(jnp.int32(0), jnp.int32(self.turns), turn, jnp.int32(0))


class Sight(NamedTuple):
    """Which key tiles some queries see, from the last to the first: `key(x)` for 0 <= x < n.

    `key` gives a tile's first key. The first `hidden` tiles and all from `clear` on may be cut by a bound;
    none: everything is hidden; spare: whether the tile is to be taken from the spare array.
    """

    n: jax.Array
    hidden: jax.Array
    clear: jax.Array
    key: Callable
    none: jax.Array | None = None
    spare: Callable | None = None


@dataclass(frozen=True)
class Band:
    """Query i sees keys i + lo <= j <= i + hi of S, by tiles of so many keys; None: no such bound."""

    S: int
    lo: int | None
    hi: int | None
    keys: int

    @property
    def edge(self):
        """Whether the last tile of keys that queries see may be cut."""
        return self.hi is not None or self.S % self.keys != 0

    def ends(self, first, rows):
        """The key tiles begin <= j < end that queries first .. first + rows - 1 see, at least one."""
        end = jnp.int32(-(-self.S // self.keys))
        if self.hi is not None:
            end = jnp.clip(self.tiles_until(first + rows + self.hi), 1, end)
        begin = jnp.int32(0)
        if self.lo is not None:
            begin = jnp.minimum(lax.div(jnp.maximum(first + self.lo, 0), jnp.int32(self.keys)), end - 1)
        return begin, end

    def of_block(self, first, rows):
        """The tiles that some group of 64 of the rows sees."""
        return self.ends(first, ROWS)[0], self.ends(first, rows)[1]

    def sight(self, first, begin, end):
        """The Sight of queries first .. first + 63 on the tiles begin <= j < end."""
        clear = end - begin
        hidden = jnp.int32(1 if self.edge or self.lo is not None else 0)
        if self.lo is not None:
            whole = self.tiles_until(first + (ROWS - 1) + self.lo)  # tiles from there on are not cut by lo
            clear = jnp.clip(end - whole, 0, clear)
        if self.hi is not None:
            whole = lax.div(jnp.clip(first + self.hi + 1, 0, self.S), jnp.int32(self.keys))
            hidden = jnp.clip(end - whole, hidden, end - begin)
        return Sight(end - begin, hidden, jnp.maximum(clear, hidden), lambda x: (end - 1 - x) * self.keys)

    def tiles_until(self, end):
        """Key tiles that begin before key `end`."""
        return lax.div(jnp.maximum(end, 0) + (self.keys - 1), jnp.int32(self.keys))

    def apart(self, rows):
        """Whether of so many queries none sees a tile that hi or the end of the keys cuts, and lo as well."""
        if self.lo is None or self.hi is None:
            return False
        last = (self.S - 1) // self.keys * self.keys  # where the last tile begins
        return self.hi - self.lo >= self.keys + ROWS - 3 and rows - 1 + self.lo <= last

    def hide(self, s, first, at, layout, none=None, *, front=True, back=True):
        """The scores of 64 queries from `first` and the tile of keys from `at`, -inf where invisible.

        front, back: whether hi, or the end of the keys, and lo may cut the tile.
        """
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
        wide = lambda x: lax.broadcast_in_dim(x, (ROWS, self.keys), [0])
        col = plgpu.broadcasted_iota(jnp.int32, (ROWS, self.keys), 1, layout=layout)
        last = row * 0 + (self.S - 1)
        if self.hi is not None:
            last = jnp.minimum(row + (first + self.hi), last)
        if none is not None:
            last = last - jnp.where(none, jnp.int32(2**30), jnp.int32(0))
        if front:
            s = jnp.where(col <= wide(last - at), s, -jnp.inf)
        if back and self.lo is not None:
            s = jnp.where(col >= wide(row + (first + self.lo) - at), s, -jnp.inf)
        return s


def split(head, H, batches=None):
    """(batch, head) of the number of a head of all: batch by batch of H heads, or `batches` of each head."""
    if batches is None:
        return lax.div(head, jnp.int32(H)), lax.rem(head, jnp.int32(H))
    return lax.rem(head, jnp.int32(batches)), lax.div(head, jnp.int32(batches))


def laid(bias, keys):
    """A bias [B or 1, H or 1, L or 1, S or 1] as kernels with tiles of `keys` keys load it: rows in eights,
    columns in 64s; SHARED rows where all rows are alike, one tile of columns where all columns are.
    """
    b, h, rows, columns = bias.shape
    rows, columns = (SHARED if rows == 1 else rows), (keys if columns == 1 else columns)
    bias = jnp.broadcast_to(bias, (b, h, rows, columns))
    return jnp.pad(bias, [(0, 0), (0, 0), (0, -rows % 8), (0, max(up(columns, 64), keys) - columns)])


def bias_at(bias, b, h, first, rows, at, keys, group=None):
    """Some rows of a tile of `keys` keys of a bias in device memory; given a group, of its 64 keys."""
    first = first if bias.shape[2] != SHARED else 0
    at = at if bias.shape[3] > keys else 0
    if group is not None:
        at, keys = at + group * ROWS, ROWS
    return bias.at[*pick(bias, b, h), pl.ds(first, rows), pl.ds(at, keys)]


def pick(x, *at):
    """x[at], 0 on axes of length 1."""
    return tuple(i if n > 1 else jnp.int32(0) for i, n in zip(at, x.shape, strict=False))


def listed(lists, *at):
    """The Sight that `lists` give a tile of queries (batch, head, tile): see `attend`."""
    at = pick(lists, *at)
    n, cut, entry = lists[*at, 0], lists[*at, 1], lambda x: lists[*at, 2 + x]
    some, one = jnp.maximum(n, 1), jnp.where(n == 0, 1, cut)
    return Sight(some, jnp.maximum(one, 1), some, lambda x: begins(entry(x)), n == 0, lambda x: entry(x) < 0)


def begins(entry):
    """Where the tile of a list's entry begins: that of a spare one is negative."""
    return jnp.maximum(entry, -1 - entry)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a call: H query heads, G for a key head, a band of tiles, tiles of so many rows."""

    H: int
    G: int
    S: int
    lo: int | None
    hi: int | None
    rows: int
    keys: int
    rows_first: bool
    tasks: Tasks
    batches: int | None = None  # of which all run side by side, as they share a bias

    @property
    def band(self):
        return Band(self.S, self.lo, self.hi, self.keys)

    def place(self, head, t):
        """(batch, head, first query) of a tile of queries."""
        return *split(head, self.H, self.batches), t * self.rows

    def cut(self, ref, b, h, first, size):
        """Rows of a head of an operand in device memory."""
        at = pl.ds(first, size)
        return ref.at[b, at, h] if self.rows_first else ref.at[b, h, at]


def room(n, size, d, dtype):
    """Shared memory for n tiles of size x d, 0: for one, in the order that TMA writes and wgmma reads."""
    span = 128 if d % 64 == 0 else 64
    layout = plgpu.TilingTransform((8, span // 2)), plgpu.SwizzleTransform(span)
    return plgpu.SMEM((n, size, d) if n else (size, d), dtype, transforms=layout)


def rooms_for(hidden, bounds, mask):
    """Shared memory for the bounds and the mask of so many times (n, rows)."""
    return (
        None if hidden.bounds is None else plgpu.SMEM((bounds[0], 2, bounds[1]), jnp.int32),
        None if hidden.mask is None else plgpu.SMEM((*mask, 128 // 8), jnp.uint8),
    )


def with_refs(hidden, refs):
    """(hidden with references in place of its arrays, the other references)."""
    leaves, tree = jax.tree.flatten(hidden)
    return tree.unflatten(refs[: len(leaves)]), refs[len(leaves) :]


def bounds_at(bounds, b, h, first, rows):
    """Both bounds of some rows, in device memory."""
    b, h = pick(bounds, b, h)
    return bounds.at[b, h, :, pl.ds(first if bounds.shape[3] != SHARED else 0, rows)]


def spread(ref, layout):
    """A vector in shared memory as a layout wants it, or a matrix."""
    index = inspect.signature(plgpu.load).parameters.get("idx")  # JAX 0.10 asks for one
    index = ((),) if index is not None and index.default is index.empty else ()
    return plgpu.load(ref, *index, layout=layout)


def veil(s, at, bounds, words, layout):
    """The scores of 64 rows and the keys from `at`, -inf where bounds [2, 64] or a mask's words hide them."""
    seen = None
    if bounds is not None:
        start, end = (spread(bounds.at[i], layout.reduce(1)) - at for i in (0, 1))
        wide = lambda x: lax.broadcast_in_dim(x, s.shape, [0])
        col = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
        seen = (col >= wide(start)) & (col < wide(end))
    if words is not None:
        some = shown(words, s.shape[1])
        seen = some if seen is None else seen & some
    return jnp.where(seen, s, -jnp.inf)


def words_of(mask, at, n):
    """int32 [64, n / 8]: the bytes of the n columns from `at` on of 64 rows of a mask, of which shared memory
    holds 128; to be read before scores are waited for.
    """
    if n < 128:
        mask = mask.at[:, pl.ds(lax.rem(lax.div(at, jnp.int32(n)), jnp.int32(128 // n)) * (n // 8), n // 8)]
    return spread(mask, plgpu.Layout.WGMMA).astype(jnp.int32)


def shown(words, n):
    """bool [64, n]: which of the columns of `words` the mask shows."""
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((ROWS, n), jnp.int32, layout=layout)
    )
    def bits(_, bytes_):
        """Every register of the result is one of the bytes' with one bit left."""
        part = lambda i: bytes_[:, i // 8 * 8 : i // 8 * 8 + 8] & (1 << i % 8)
        registers = np.concatenate([part(i).registers for i in range(n // 8)], axis=1)
        return type(bytes_)(_registers=registers, _layout=bytes_.layout, _is_signed=True)

    return bits(words) != 0


def load_tile(cut, x, spare, room, full, **shared):
    """cut(x) into shared memory, or cut of `spare`, (another array, whether to take it), if given."""
    copy = lambda x: plgpu.copy_gmem_to_smem(cut(x), room, full, **shared)
    if spare is None:
        return copy(x)
    other, take = spare
    pl.when(take)(lambda: copy(other))
    return pl.when(jnp.logical_not(take))(lambda: copy(x))


def load_mask(mask, room, full, b, h, first, at, cut):
    """128 columns of a mask's bits into shared memory if something cuts the tile from column `at` on; an
    arrival in their place if not.
    """
    b, h = pick(mask, b, h)
    rows = pl.ds(first if mask.shape[2] != SHARED else 0, room.shape[0])

    @pl.when(cut)
    def _():
        column = lax.div(at, jnp.int32(128)) * (128 // 8) if mask.shape[3] > 128 // 8 else 0
        plgpu.copy_gmem_to_smem(mask.at[b, h, rows, pl.ds(column, 128 // 8)], room, full)

    @pl.when(jnp.logical_not(cut))
    def _():
        plgpu.barrier_arrive(full)


def _run(plan, tiles, factor, hidden, q, k, v):
    """The kernel on padded operands: (o, lse), padded."""
    groups, stages, D, Dv = tiles.groups, tiles.stages, q.shape[3], v.shape[3]

    spots = groups * (2 if tiles.ahead else 1)
    ring = lambda d: room(stages, tiles.keys, d, q.dtype)
    signal = lambda n, arrivals=1: plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)
    free, cluster = signal(stages, groups), {}
    if tiles.share > 1:  # a slot is free once the groups of all blocks have read what was loaded for all
        free = plgpu.ClusterBarrier(collective_axes=("half",), num_barriers=stages, num_arrivals=groups)
        cluster = {"cluster": (tiles.share,), "cluster_names": ("half",)}
    given = jax.tree.leaves(hidden)
    tall = None if hidden.mask is None else min(groups * ROWS, hidden.mask.shape[2])

    def beside():
        slots = groups * tiles.aside
        return room(slots, ROWS, tiles.keys, q.dtype), signal(slots), signal(slots)

    def kernel(*refs):
        told, refs = with_refs(hidden, refs)
        _kernel(*refs, hidden=told, plan=plan, tiles=tiles, factor=factor)

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], Dv), q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], plan.H, plan.tasks.tall * plan.rows), jnp.float32),
        ],
        scratch_types=(
            room(spots, ROWS, D, q.dtype),
            ring(D),
            ring(Dv),
            room(groups, ROWS, Dv, q.dtype) if tiles.own_o else None,
            plgpu.SMEM((groups, ROWS), jnp.float32),
            rooms_for(hidden, (spots, ROWS), (stages, tall)),
            (signal(spots, 1 + (hidden.bounds is not None)), signal(spots)),
            (signal(stages, 1 + (hidden.mask is not None)), free),
            (signal(stages), free),
            signal(groups),
            None if hidden.bias is None else beside(),
        ),
        grid=(plan.tasks.blocks // tiles.share,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name="flash_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            **(SPARE if tiles.ahead or hidden.bias is not None else {}),
        ),
        **cluster,
    )(*given, q, k, v)


def _kernel(
    q, k, v, o, lse, q_room, k_room, v_room, o_room, lse_room, hides, qs, ks, vs, turn, bs, **options
):  # fmt: skip
    """Rooms are shared memory, hides that of bounds and mask; qs, ks, vs are its (full, free) barriers;
    turn[g]: group g may issue. A tile's bounds come with its queries, a mask with the keys. bs: room and
    barriers for a bias, of which every group has its own ring, or None.
    """
    tiles = options["tiles"]
    group = lax.axis_index("group")

    @pl.when(group < tiles.groups)
    def _():
        if tiles.groups > 1:
            plgpu.set_max_registers({2: 240, 3: 160}[tiles.groups], action="increase")
        rooms = q_room, k_room, v_room, q_room if o_room is None else o_room, lse_room
        _compute(group, o, lse, *rooms, hides, qs, ks, vs, turn, bs, **options)

    @pl.when(group == tiles.groups)
    def _():
        if tiles.groups > 1:
            plgpu.set_max_registers(24, action="decrease")
        _load(q, k, v, q_room, k_room, v_room, hides, qs, ks, vs, bs, **options)


def _load(q, k, v, q_room, k_room, v_room, hides, qs, ks, vs, bs, *, hidden, plan, tiles, factor):
    """The loading warpgroup: fills what the others have set free."""
    stages, (bounds_room, mask_room) = jnp.int32(tiles.stages), hides

    def put(x, ring, signals, loaded, b, h, at, spare=None):
        full, free = signals
        slot = lax.rem(loaded, stages)

        @pl.when(loaded >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        cut = lambda x: plan.cut(x, b, h, at, plan.keys)
        load_tile(cut, x, spare, ring.at[slot], full.at[slot], **tiles.together)

    def tile(loaded, turn, head, t):
        b, h, first = plan.place(head, t)
        if hidden.lists is None:
            see = plan.band.sight(first, *plan.band.of_block(first, plan.rows))
        else:
            see = listed(hidden.lists, b, h, t)
        n, key_head, newest = see.n, lax.div(h, jnp.int32(plan.G)), see.key(jnp.int32(0))

        def value(x, at):
            spare = (hidden.spare[0], see.spare(x)) if hidden.spare else None
            put(v, v_room, vs, loaded + x, b, key_head, at, spare)

        def key(x, at):
            put(k, k_room, ks, loaded + x, b, key_head, at)
            if hidden.mask is not None:
                slot = lax.rem(loaded + x, stages)
                load_mask(hidden.mask, mask_room.at[slot], ks[0].at[slot], b, h, first, at, x < see.hidden)

        def side(x, at):
            for g in range(tiles.groups if bs else 0):
                beside, full, free = bs
                slot = g * tiles.aside + lax.rem(loaded + x, jnp.int32(tiles.aside))

                @pl.when(loaded + x >= tiles.aside)
                def _(slot=slot, free=free):
                    plgpu.barrier_wait(free.at[slot])

                own = bias_at(hidden.bias, b, h, first + g * ROWS, ROWS, at, plan.keys)
                plgpu.copy_gmem_to_smem(own, beside.at[slot], full.at[slot])

        key(jnp.int32(0), newest)
        for g in range(tiles.groups):
            spot = tiles.spot(g, turn)

            @pl.when(turn > (1 if tiles.ahead else 0))
            def _(spot=spot):
                plgpu.barrier_wait(qs[1].at[spot])

            own = plan.cut(q, b, h, first + g * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(own, q_room.at[spot], qs[0].at[spot])
            if hidden.bounds is not None:
                own = bounds_at(hidden.bounds, b, h, first + g * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(own, bounds_room.at[spot], qs[0].at[spot])
        side(jnp.int32(0), newest)
        value(jnp.int32(0), newest)

        @pl.loop(jnp.int32(1), n)
        def _(x):
            at = see.key(x)
            key(x, at)
            side(x, at)
            value(x, at)

        return loaded + n

    loaded = plan.tasks.each(tiles.block, tile, hidden.order)
    if tiles.share > 1:  # a block must not end before its neighbour has set its slots free

        @pl.loop(jnp.maximum(loaded - stages, 0), loaded)
        def _(x):
            for _, free in (ks, vs):
                plgpu.barrier_wait(free.at[lax.rem(x, stages)])


def _compute(
    group, o, lse, q_room, k_room, v_room, o_room, lse_room, hides, qs, ks, vs, turn, bs, *, hidden, plan,
    tiles, factor,
):  # fmt: skip
    """A computing warpgroup: 64 rows of every query tile of its block."""
    keys, Dv, dtype = tiles.keys, v_room.shape[2], v_room.dtype
    by_row, whole = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    o_tile, lse_tile = o_room.at[group], lse_room.at[group]
    slot = lambda loaded: lax.rem(loaded, jnp.int32(tiles.stages))
    wide = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])
    fill = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
    scores = plgpu.ACC((ROWS, keys), jnp.float32)
    lists = hidden.lists
    banded = plan.band.edge or plan.lo is not None or lists is not None  # the first tile may be cut
    veiled = hidden.bounds is not None or hidden.mask is not None
    apart = lists is None and plan.band.apart(plan.tasks.tall * plan.rows)

    def wait_turn():
        if tiles.turns:
            plgpu.barrier_wait(turn.at[group])

    def pass_turn():
        if tiles.turns:
            plgpu.barrier_arrive(turn.at[lax.rem(group + 1, jnp.int32(tiles.groups))])

    if tiles.turns:
        pl.when(group == tiles.groups - 1)(pass_turn)

    def softmax(s, m, l):
        """(m, l) with the scores s taken in, their p, and what sums so far are to be multiplied by."""
        m_new = jnp.maximum(m, s.max(axis=1) * factor)
        fix, p = jnp.exp2(m - m_new), jnp.exp2(s * factor - wide(m_new, keys))
        part = p[:, :8]  # the sum over lanes waits for the end
        for i in range(8, keys, 8):
            part = part + p[:, i : i + 8]
        return m_new, wide(fix, 8) * l + part, p, fix

    def own_words(at, key):
        if hidden.mask is None:
            return None
        rows = pl.ds(0 if hides[1].shape[1] == ROWS else group * ROWS, ROWS)
        return words_of(hides[1].at[slot(at), rows], key, keys)

    def own_bias(at, read=True):
        """What the scores of tile `at` begin with."""
        beside, full, free = bs
        spot = group * tiles.aside + lax.rem(at, jnp.int32(tiles.aside))
        plgpu.barrier_wait(full.at[spot])
        bias = spread(beside.at[spot], whole) if read else None
        plgpu.barrier_arrive(free.at[spot])
        return plgpu.ACC.init(bias.astype(jnp.float32) * (LOG2E / factor)) if read else None

    def first_scores(q, at, cut=WHOLE):
        plgpu.barrier_wait(ks[0].at[slot(at)])
        read, hide = cut
        words, begun = read(), own_bias(at) if bs else None
        wait_turn()

        def product(s):
            plgpu.wgmma(s, q, transposed(k_room.at[slot(at)]))
            pass_turn()
            return s[...] if begun is None else None

        s = pl.run_scoped(product, scores) if begun is None else pl.run_state(product)(begun)
        plgpu.barrier_arrive(ks[1].at[slot(at)])
        return hide(s, words)

    def values(at, acc, p):
        plgpu.barrier_wait(vs[0].at[slot(at)])
        wait_turn()

        def product(acc):
            plgpu.wgmma(acc, p, v_room.at[slot(at)])
            pass_turn()

        acc = pl.run_state(product)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(vs[1].at[slot(at)])
        return acc

    def both(q, at, acc, m, l, p, cut):
        """values of tile at - 1 and scores of tile `at`, and the softmax of these."""
        plgpu.barrier_wait(ks[0].at[slot(at)])
        read, hide = cut
        words, begun = read(), (own_bias(at),) if bs else ()
        plgpu.barrier_wait(vs[0].at[slot(at - 1)])
        wait_turn()

        def products(refs):
            acc_ref, *found = refs
            begins_with, found = found[: len(begun)], found[len(begun) :]

            def issue(s):
                plgpu.wgmma(s, q, transposed(k_room.at[slot(at)]))
                plgpu.wgmma(acc_ref, p, v_room.at[slot(at - 1)])
                pass_turn()
                return plgpu.wgmma_accumulator_load(s, wait_n=1)

            s = issue(*begins_with) if begun else pl.run_scoped(issue, scores)
            plgpu.barrier_arrive(ks[1].at[slot(at)])
            new = softmax(hide(lax.optimization_barrier(s), words), m, l)
            new = lax.optimization_barrier(new) if tiles.late else new
            for ref, x in zip(found, new, strict=True):
                ref[...] = x

        blank = fill((ROWS, keys), 0.0, whole), fill((ROWS,), 1.0, by_row)
        acc, *_, m, l, new, fix = pl.run_state(products)((plgpu.ACC.init(acc), *begun, m, l, *blank))
        plgpu.barrier_arrive(vs[1].at[slot(at - 1)])
        # p must not be narrowed earlier: the products still read the registers of the last one
        return acc * wide(fix, Dv), m, l, new.astype(dtype)

    def tile(loaded, turn, head, t):
        b, h, first = plan.place(head, t)
        spot = tiles.spot(group, turn)
        q, bounds = q_room.at[spot], None if hidden.bounds is None else hides[0].at[spot]
        if lists is None:
            begin, end = plan.band.of_block(first, plan.rows)
            own_begin, own_end = plan.band.ends(first + group * ROWS, ROWS)
            before, after, n = end - own_end, own_begin - begin, end - begin
            see = plan.band.sight(first + group * ROWS, own_begin, own_end)
        else:
            see = listed(lists, b, h, t)
            before, after, n = jnp.int32(0), jnp.int32(0), see.n
        first = first + group * ROWS
        plgpu.barrier_wait(qs[0].at[spot])
        m, l = fill((ROWS,), LOWEST, by_row), fill((ROWS, 8), 0.0, whole)
        acc = fill((ROWS, Dv), 0.0, whole)

        def skip(x):  # a tile that only other groups see
            for full, free in (ks, vs):
                plgpu.barrier_wait(full.at[slot(loaded + x)])
                plgpu.barrier_arrive(free.at[slot(loaded + x)])
            if bs:
                own_bias(loaded + x, read=False)
            wait_turn()
            pass_turn()

        pl.loop(jnp.int32(0), before)(skip)

        def masked_at(x, front=True):
            """What `both` and `first_scores` take where tile x may be cut: in front, or after clear ones."""
            if not veiled:
                ends = {"back": not front, "front": front} if apart else {}
                hide = lambda s, _: plan.band.hide(s, first, see.key(x), whole, see.none, **ends)
                return WHOLE[0], hide
            read = lambda: own_words(loaded + before + x, see.key(x))
            return read, lambda s, words: veil(s, see.key(x), bounds, words, whole)

        def step(x, carry, cut=WHOLE):
            if tiles.overlap:
                return both(q, loaded + before + x, *carry, cut)
            acc, m, l, _ = carry
            m, l, p, fix = softmax(first_scores(q, loaded + before + x, cut), m, l)
            return values(loaded + before + x, acc * wide(fix, Dv), p.astype(dtype)), m, l, carry[3]

        zero = jnp.int32(0)
        s = first_scores(q, loaded + before, masked_at(zero) if banded else WHOLE)
        m, l, p, _ = softmax(s, m, l)
        p = p.astype(dtype)
        if not tiles.overlap:
            acc, p = values(loaded + before, acc, p), zero
        start, carry = jnp.int32(1), (acc, m, l, p)
        if plan.hi is not None or lists is not None:
            carry = lax.fori_loop(start, see.hidden, lambda x, c: step(x, c, masked_at(x)), carry)
            start = jnp.maximum(see.hidden, 1)
        stop = see.n if plan.lo is None else jnp.maximum(see.clear, start)
        carry = lax.fori_loop(start, stop, step, carry)
        if plan.lo is not None:
            carry = lax.fori_loop(stop, see.n, lambda x, c: step(x, c, masked_at(x, False)), carry)
        acc, m, l, p = carry
        if tiles.own_o:
            plgpu.barrier_arrive(qs[1].at[spot])
        if tiles.overlap:
            acc = values(loaded + before + see.n - 1, acc, p)
        if plan.lo is not None:
            pl.loop(n - after, n)(skip)

        l = l.sum(axis=1)
        some = l > 0
        l = jnp.where(some, l, 1.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_tile[...] = (acc * wide(1.0 / l, Dv)).astype(dtype)
        lse_tile[...] = jnp.where(some, m / LOG2E + jnp.log(l), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile, plan.cut(o, b, h, first, ROWS))
        plgpu.copy_smem_to_gmem(lse_tile, lse.at[b, h, pl.ds(first, ROWS)])
        if not tiles.own_o:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(qs[1].at[spot])
        return loaded + n

    plan.tasks.each(tiles.block, tile, hidden.order)
    plgpu.wait_smem_to_gmem(0)


def transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
