"""Lean Attention in Pallas for Hopper GPUs (Mosaic GPU): equal runs of key tiles, one block a core.

In a block one warpgroup only loads (TMA): keys and values go through a ring with room for 128 KB or more, and
it goes on to the next segment of the run without waiting for the sums of this one. The other warpgroups take
the tiles in turn and multiply (wgmma): query heads of one key head are the first of 64 rows, the rest of
which hold what is left in memory and never leave. Each group keeps a running softmax of its own, to base 2,
in float32, and writes it to a slot of its own at the end of a segment; the merge is lean_triton.py's. Nothing
is atomic: the same call gives the same bits.
"""

import inspect
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels.flash_hopper import LOG2E, LOWEST, ROWS, cores_of, room, transposed, up
from accel.kernels.lean_triton import merged_slots

__all__ = ["Parts", "Runs", "Tiles", "attend", "cores_of", "own_block", "partial_states"]

MEMORY = 226 * 1024  # bytes of shared memory for tiles
UNROLL = 32  # requests whose lengths a block reads at once


@dataclass(frozen=True)
class Runs:
    """Equal runs of the line of tiles, head by head, one a block, like ref's `stream_k_schedule`.

    What block g has of output o (on the line) goes to slot g + o. `batch` requests of `heads` key heads, all
    of them `full` keys long, if that is known: then nothing needs to be read before the first tile.
    """

    batch: int
    heads: int
    blocks: int
    full: int | None = None

    @property
    def slots(self):
        """How many states of a segment there are at most."""
        return self.blocks + self.batch * self.heads - 1

    def cuts(self, total):
        """(most tiles of a block, how many blocks have so many; the others have one less)."""
        most = lax.div(total + (self.blocks - 1), jnp.int32(self.blocks))
        return most, total - (most - 1) * self.blocks

    def begin(self, g, total):
        """The first tile of block g on the line."""
        most, high = self.cuts(total)
        return jnp.where(g <= high, g * most, high * most + (g - high) * (most - 1))

    def block(self, tile, total):
        """The block that has a tile of the line."""
        most, high = self.cuts(total)
        later = high + lax.div(tile - high * most, jnp.maximum(most - 1, 1))
        return jnp.where(tile < high * most, lax.div(tile, most), later)

    def slots_of(self, at, tiles):
        """The slots start <= s < stop of output `at` in memory; tiles int32 [batch or more], 0 from there."""
        b, h = lax.div(at, jnp.int32(self.heads)), lax.rem(at, jnp.int32(self.heads))
        item = lax.broadcasted_iota(jnp.int32, tiles.shape, 0)
        one = jnp.sum(tiles)
        first = h * one + jnp.sum(jnp.where(item < b, tiles, 0))
        last = first + jnp.sum(jnp.where(item == b, tiles, 0)) - 1
        on_line, total = h * self.batch + b, one * self.heads
        return self.block(first, total) + on_line, self.block(last, total) + on_line + 1

    def each(self, lengths, size, body):
        """body(turn, loaded, slot, output in memory, lo, hi, keys) -> loaded for the segments of a block."""
        g, batch = lax.axis_index("block"), jnp.int32(self.batch)
        tiles = lambda keys: lax.div(keys + (size - 1), jnp.int32(size))
        length = lambda b: lengths[b] if self.full is None else jnp.int32(self.full)
        if self.full is not None:
            one = self.batch * tiles(length(0))
            request = lambda tile: (lax.div(tile, tiles(length(0))), lax.rem(tile, tiles(length(0))))
        else:
            one, request = _search(self.batch, lambda b: tiles(length(b)))
        begin, end = self.begin(g, one * self.heads), self.begin(g + 1, one * self.heads)
        find = lambda tile: (lax.div(tile, one), *request(lax.rem(tile, one)))
        (h, b, lo), (h_last, b_last, _) = find(begin), find(end - 1)

        def segment(turn, carry):
            left, loaded, h, b, lo = carry
            keys = length(b)
            hi = jnp.minimum(tiles(keys), lo + left)
            loaded = body(turn, loaded, g + h * batch + b, b * self.heads + h, lo, hi, keys)
            wrap = b + 1 == batch
            h, b = jnp.where(wrap, h + 1, h), jnp.where(wrap, 0, b + 1)
            return left - (hi - lo), loaded, h, b, jnp.int32(0)

        turns = jnp.where(begin < end, (h_last - h) * batch + b_last - b + 1, 0)
        lax.fori_loop(jnp.int32(0), turns, segment, (end - begin, jnp.int32(0), h, b, lo))


@dataclass(frozen=True)
class Parts:
    """A fixed split of every output's tiles into `splits` parts, one a block and a slot."""

    batch: int
    heads: int
    splits: int
    full: int | None = None

    @property
    def blocks(self):
        """As many as parts."""
        return self.batch * self.heads * self.splits

    @property
    def slots(self):
        """As in `Runs`."""
        return self.blocks

    def slots_of(self, at, tiles):
        """As in `Runs`."""
        return at * self.splits, (at + 1) * self.splits

    def each(self, lengths, size, body):
        """As `Runs.each`."""
        g, splits = lax.axis_index("block"), jnp.int32(self.splits)
        at, part = lax.div(g, splits), lax.rem(g, splits)
        keys = lengths[lax.div(at, jnp.int32(self.heads))] if self.full is None else jnp.int32(self.full)
        tiles = lax.div(keys + (size - 1), jnp.int32(size))
        some = lax.div(tiles + (splits - 1), splits)
        lo, hi = (jnp.minimum(x * some, tiles) for x in (part, part + 1))
        body(jnp.int32(0), jnp.int32(0), g, at, lo, hi, keys)


def _search(batch, tiles):
    """(tiles of all requests, tile -> (its request, the tile inside that one)) for tiles(b) of request b."""
    if batch <= UNROLL:
        read = [tiles(b) for b in range(batch)]  # all on their way at once
        over = lambda f, init: reduce(f, read, init)
    else:
        over = lambda f, init: lax.fori_loop(0, batch, lambda b, carry: f(carry, tiles(b)), init)

    def request(tile):
        def past(carry, t):
            b, before, upto = carry
            upto = upto + t
            return b + jnp.where(upto <= tile, 1, 0), jnp.where(upto <= tile, upto, before), upto

        b, before, _ = over(past, (jnp.int32(0),) * 3)
        return b, tile - before

    return over(lambda n, t: n + t, jnp.int32(0)), request


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: `keys` a tile, `stages` of key and value tiles, `groups` that compute."""

    keys: int
    stages: int
    groups: int
    queries: int = 2  # groups of query heads in memory at once

    @staticmethod
    def fit(R, D, Dv, block_n, *, keys=None, groups=2, queries=2):
        """What was fastest on an H200; as deep a ring as there is room for, every tile of it one group's."""
        keys = keys or (128 if block_n % 128 == 0 and D + Dv <= 256 else 64)
        rest = MEMORY - ((queries - 1) * up(R, 8) + ROWS) * D * 2
        stages = rest // (keys * (D + Dv) * 2)
        return Tiles(keys, stages - stages % groups, groups, queries)


def own_block(keys, cores):
    """Keys in a tile of the line that suits so many in all."""
    return 128 if keys >= 2 * 128 * cores else 64


def attend(lengths, q, k, v, *, plan, scale, block_n, tiles=None):
    """(o [O, R, Dv] in q's dtype, lse [O, R] float32): `partial_states`, merged."""
    tiles = tiles or Tiles.fit(q.shape[1], q.shape[2], v.shape[2], block_n)
    lengths = lengths if plan.full is None else None
    states = partial_states(lengths, q, k, v, plan=plan, scale=scale, block_n=block_n, tiles=tiles)
    return merged_slots(lengths, *states, plan=plan, block_n=block_n, dtype=q.dtype, each=tiles.groups)


@partial(jax.jit, static_argnames=("plan", "scale", "block_n", "tiles"))
def partial_states(lengths, q, k, v, *, plan, scale, block_n, tiles=None):
    """(m, l [n, R], acc [n, R, Dv]) of `groups` states a slot of the plan, one after the other, m to base 2.

    Args: lengths int32 [B], keys that may be seen, or None if the plan knows; q [O, R, D], k [O, S, D],
      v [O, S, Dv], O = B Hkv, bfloat16 or float16, S a multiple of 8, D and Dv of 64, up to 256, R up to 64.
      plan: `Runs` or `Parts` of tiles of block_n keys, a multiple of a tile's.
    """
    if scale <= 0:  # then the largest product is not the largest score
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    (R, D), Dv, n = q.shape[1:], v.shape[2], plan.slots
    tiles = tiles or Tiles.fit(R, D, Dv, block_n)
    high = up(R, 8)
    rows = (tiles.queries - 1) * high + ROWS
    signal = lambda n, arrivals=1: plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)
    pieces = D // 64 * (high // 8)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tiled = room(1, rows, D, q.dtype)
    by_eight = plgpu.SMEM((1, rows // 8, D // 64, 8, 64), q.dtype, transforms=(plgpu.SwizzleTransform(128),))
    given = () if lengths is None else (lengths,)

    def kernel(*refs):
        lengths, refs = (refs[0], refs[1:]) if given else (None, refs)
        _kernel(lengths, *refs, plan=plan, tiles=tiles, factor=scale * LOG2E, block_n=block_n)

    return plgpu.kernel(
        kernel,
        out_type=[shape(n * tiles.groups, R), shape(n * tiles.groups, R), shape(n * tiles.groups, R, Dv)],
        scratch_types=(
            plgpu.RefUnion(tiled, by_eight),  # written eight rows at a time, or fewer; read as one tile
            room(tiles.stages, tiles.keys, D, q.dtype),
            room(tiles.stages, tiles.keys, Dv, q.dtype),
            (signal(tiles.queries, pieces), signal(tiles.queries, tiles.groups)),
            (signal(tiles.stages), signal(tiles.stages)),
            (signal(tiles.stages), signal(tiles.stages)),
        ),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=tiles.groups + 1,
        thread_name="group",
        kernel_name="lean_segments",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*given, q, k, v)


def _kernel(lengths, q, k, v, m, l, acc, q_rooms, k_room, v_room, qs, ks, vs, **options):
    """Rooms are shared memory; qs, ks, vs are its (full, free) barriers."""
    tiles = options["tiles"]
    group = lax.axis_index("group")
    tiled, by_eight = q_rooms

    @pl.when(group < tiles.groups)
    def _():
        plgpu.set_max_registers({1: 240, 2: 232}[tiles.groups], action="increase")
        rooms = tiled.at[0], k_room, v_room
        _compute(group, lengths, m, l, acc, rooms, qs, ks, vs, **options)

    @pl.when(group == tiles.groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _load(lengths, q, k, v, (by_eight.at[0], k_room, v_room), qs, ks, vs, **options)


def _each(lengths, plan, block_n, keys, body):
    """body(turn, loaded, slot, output, begin, end, seen) for the segments of a block, in tiles of the ring.

    loaded: tiles that have gone through the ring so far; begin, end: the segment's tiles of its output, of
    which `seen` keys may be seen.
    """
    each = block_n // keys

    def segment(turn, loaded, slot, output, lo, hi, seen):
        begin = lo * each
        end = jnp.maximum(jnp.minimum(hi * each, lax.div(seen + (keys - 1), jnp.int32(keys))), begin)
        body(turn, loaded, slot, output, begin, end, seen)
        return loaded + end - begin

    plan.each(lengths, block_n, segment)


def _load(lengths, q, k, v, rooms, qs, ks, vs, *, plan, tiles, factor, block_n):
    """The loading warpgroup: fills what the others have set free."""
    by_eight, k_room, v_room = rooms
    stages, keys, (R, D) = jnp.int32(tiles.stages), tiles.keys, q.shape[1:]
    eights = up(R, 8) // 8

    def put(x, ring, signals, at, output, j):
        full, free = signals
        slot = lax.rem(at, stages)

        @pl.when(at >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        plgpu.copy_gmem_to_smem(x.at[output, pl.ds(j * keys, keys)], ring.at[slot], full.at[slot])

    def queries(turn, output):
        slot = lax.rem(turn, jnp.int32(tiles.queries))

        @pl.when(turn >= tiles.queries)
        def _():
            plgpu.barrier_wait(qs[1].at[slot])

        for row in range(0, R, 8):
            some = min(8, R - row)
            for c in range(D // 64):
                plgpu.copy_gmem_to_smem(
                    q.at[output, pl.ds(row, some), pl.ds(64 * c, 64)],
                    by_eight.at[slot * eights + row // 8, c, pl.ds(0, some)],
                    qs[0].at[slot],
                )

    def segment(turn, loaded, i, output, begin, end, seen):
        @pl.when(begin < end)
        def _():
            put(k, k_room, ks, loaded, output, begin)

        queries(turn, output)

        @pl.when(begin < end)
        def _():
            put(v, v_room, vs, loaded, output, begin)

        @pl.loop(begin + 1, end)
        def _(j):
            put(k, k_room, ks, loaded + j - begin, output, j)
            put(v, v_room, vs, loaded + j - begin, output, j)

    _each(lengths, plan, block_n, keys, segment)


def _compute(group, lengths, m_out, l_out, acc_out, rooms, qs, ks, vs, *, plan, tiles, factor, block_n):
    """A computing warpgroup: every tile of the ring, or every other one."""
    q_room, k_room, v_room = rooms
    R, Dv, keys, dtype = acc_out.shape[1], v_room.shape[2], tiles.keys, v_room.dtype
    whole = plgpu.Layout.WGMMA
    by_row, groups = whole.reduce(1), jnp.int32(tiles.groups)
    wide = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])
    fill = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)

    def tile(at, j, queries, seen, carry, cut):
        """The state with tile j of the output, in the ring at `at`; cut: not all of its keys may be seen."""
        acc, m, l = carry
        slot = lax.rem(at, jnp.int32(tiles.stages))
        plgpu.barrier_wait(ks[0].at[slot])

        def scores(s):
            plgpu.wgmma(s, queries, transposed(k_room.at[slot]))
            return s[...]

        s = pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32))
        plgpu.barrier_arrive(ks[1].at[slot])
        if cut:
            col = plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=whole)
            s = jnp.where(col < seen - j * keys, s, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=1) * factor)
        fix, p = jnp.exp2(m - m_new), jnp.exp2(s * factor - wide(m_new, keys))
        part = p[:, :8]  # the sum over lanes waits for the end
        for i in range(8, keys, 8):
            part = part + p[:, i : i + 8]
        p = p.astype(dtype)
        plgpu.barrier_wait(vs[0].at[slot])
        if cut:  # what lies beyond may be NaN, which no weight of 0 removes
            values = _load_tile(v_room.at[slot], whole)
            row = plgpu.broadcasted_iota(jnp.int32, (keys, Dv), 0, layout=whole)
            v_room.at[slot][...] = jnp.where(row < seen - j * keys, values, jnp.zeros_like(values))
            plgpu.commit_smem()
        product = lambda acc: plgpu.wgmma(acc, p, v_room.at[slot])
        acc = pl.run_state(product)(plgpu.ACC.init(acc * wide(fix, Dv)))
        plgpu.barrier_arrive(vs[1].at[slot])
        return acc, m_new, wide(fix, 8) * l + part

    def segment(turn, loaded, i, output, begin, end, seen):
        slot = lax.rem(turn, jnp.int32(tiles.queries))
        plgpu.barrier_wait(qs[0].at[slot])
        queries = q_room.at[pl.ds(slot * up(R, 8), ROWS)]
        uncut = jnp.clip(lax.div(seen, jnp.int32(keys)), begin, end)
        first = lax.rem(group + groups - lax.rem(loaded, groups), groups)  # of its tiles in this segment
        mine = lambda n: lax.div(jnp.maximum(n - first + groups - 1, 0), groups)
        step = lambda x, carry, cut: tile(
            loaded + first + x * groups, begin + first + x * groups, queries, seen, carry, cut
        )
        init = fill((ROWS, Dv), 0.0, whole), fill((ROWS,), LOWEST, by_row), fill((ROWS, 8), 0.0, whole)
        some = mine(uncut - begin)
        carry = lax.fori_loop(jnp.int32(0), some, lambda x, c: step(x, c, False), init)
        acc, m, l = lax.fori_loop(some, mine(end - begin), lambda x, c: step(x, c, True), carry)
        plgpu.barrier_arrive(qs[1].at[slot])
        to = i * groups + group
        _store_rows(R, whole, acc, acc_out.at[to])
        _store_rows(R, by_row, m, m_out.at[to])
        _store_rows(R, by_row, l.sum(axis=1), l_out.at[to])

    _each(lengths, plan, block_n, keys, segment)


def _store_rows(R, layout, x, ref):
    """The first R rows of x to device memory."""

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(ctx, x, ref):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref

        rows = arith.constant(ir.IndexType.get(), R)

        def put(value, at):
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, at[0], rows)):
                memref.store(value, ref, list(at))

        x.foreach(put)

    store(x, ref)


def _load_tile(ref, layout):
    index = inspect.signature(plgpu.load).parameters.get("idx")  # JAX 0.10 asks for one
    index = ((),) if index is not None and index.default is index.empty else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)
