"""FlashAttention in Pallas for Hopper GPUs (Mosaic GPU): the forward pass.

Each core runs one block for the whole call and takes query tiles from a fixed list. In a block one
warpgroup only loads (TMA, a ring of key and value tiles); the others compute, 64 queries each. A group issues
the scores of the next key tile and the values of this one together (wgmma, asynchronous) and takes the
exponentials of the former, to base 2, while the latter run. Key tiles go from the last to the first, so that
those on the edge of what is visible, the only ones masked, come first (and last, in a window); or in the
order of a list. Causal calls take query tiles in pairs, a long one and a short one, so that all pairs cost
the same. Sums are float32; nothing is atomic: the same call gives the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels import flash_triton

__all__ = ["attend", "attend_backward", "backward", "forward"]

LOG2E = 1.4426950408889634
LOWEST = -(2.0**127)  # where a running maximum starts: finite, so that a row that sees nothing makes no NaN
ROWS = 64  # queries a warpgroup: the height of a wgmma
CORES = 132  # of an H100 or H200 SXM


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

    @staticmethod
    def fit(D, Dv, L, causal):
        """What was fastest on an H200, within 227 KB of shared memory and 64 K registers."""
        wide = max(D, Dv)
        groups, keys, stages = (3, 128, 3) if wide <= 64 else (2, 128, 2) if wide <= 128 else (2, 64, 2)
        if groups == 3 and up(L, 3 * ROWS) > 1.15 * up(L, 2 * ROWS):
            groups = 2
        groups = min(groups, -(-L // ROWS))
        return Tiles(
            groups, keys, stages, turns=groups > 1, late=not causal and wide <= 192, own_o=wide <= 192
        )


def up(n, size):
    """n, rounded up to a multiple of size."""
    return n + -n % size


def forward(
    q, k, v, end=None, mask=None, *, scale, lo=None, hi=None, block_q=128, block_k=128, interpret=False
):
    """(o, lse) as the other kernels of the technique: q [B, G, L, D], k [B, S, D], v [B, S, Dv].

    end, mask and interpret are for other kernels: left out here. Tiles are the kernel's own.
    """
    return attend(q, k[:, None], v[:, None], scale=scale, lo=lo, hi=hi)


def backward(
    do, q, k, v, lse, delta, end=None, mask=None, *, scale, lo=None, hi=None, block_q=128, block_k=128,
    interpret=False,
):  # fmt: skip
    """(dq, dk, dv) as the other kernels of the technique; what `forward` leaves out is left out here."""
    dq, dk, dv = attend_backward(do, q, k[:, None], v[:, None], lse, delta, scale=scale, lo=lo, hi=hi)
    return dq, dk[:, 0], dv[:, 0]


def attend_backward(do, q, k, v, lse, delta, *, scale, lo=None, hi=None, rows_first=False):
    """(dq, dk, dv) like q, k, v, operands as in `attend`; lse, delta [B, H, L] as in `flash_triton.backward`.

    Heads wider than 128 and a few queries are Triton's, which is faster there.
    """
    from accel.kernels import flash_hopper_backward

    few = q.shape[1 if rows_first else 2] <= 16
    if not few and max(q.shape[3], v.shape[3]) <= flash_hopper_backward.WIDEST:
        options = {"scale": scale, "lo": lo, "hi": hi, "rows_first": rows_first}
        return flash_hopper_backward.attend_backward(do, q, k, v, lse, delta, **options)
    turned = (lambda x: jnp.moveaxis(x, 1, 2)) if rows_first else (lambda x: x)
    B, (H, Hkv) = q.shape[0], (x.shape[2 if rows_first else 1] for x in (q, k))
    group = lambda x: x.reshape(B * Hkv, H // Hkv, *x.shape[2:])
    flat = lambda x: x.reshape(B * Hkv, *x.shape[2:])
    do, q, k, v = (turned(x) for x in (do, q, k, v))
    grads = flash_triton.backward(
        group(do), group(q), flat(k), flat(v), group(lse), group(delta), scale=scale, lo=lo, hi=hi
    )
    return tuple(turned(g.reshape(x.shape)) for g, x in zip(grads, (q, k, v), strict=True))


@partial(jax.jit, static_argnames=("scale", "lo", "hi", "rows_first", "tiles", "cores"))
def attend(q, k, v, lists=None, *, scale, lo=None, hi=None, rows_first=False, tiles=None, cores=None):
    """softmax(scale q k^T) v -> (o [B, H, L, Dv] in q's dtype, lse [B, H, L] float32).

    Args: q [B, H, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], bfloat16 or float16, D and Dv up to 256;
        query head h uses key head h // (H / Hkv). rows_first: q [B, L, H, D] and k, v, o likewise.
      lo, hi: query i sees keys i + lo <= j <= i + hi; None: no such bound. A row that sees no key: o = 0,
        lse = -inf.
      lists: int32 [1 or H, tiles of queries, 2 + tiles of keys], or None for all: for each tile of queries
        how many tiles of keys it sees, how many of these something cuts, and which they are, those first.
      tiles, cores: None is what suits the call and the device.
    """
    if scale <= 0:  # then the largest product is not the largest score
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    rows, heads = (1, 2) if rows_first else (2, 1)
    L, S, Dv = q.shape[rows], k.shape[rows], v.shape[3]
    D, wide = (up(x.shape[3], 32) for x in (q, v))
    if max(D, wide) > 192:
        D = wide = 256  # the results leave through the room of the queries
    q, k, v = (pad(x, rows, d) for x, d in ((q, D), (k, D), (v, wide)))
    tiles = tiles or Tiles.fit(D, wide, L, hi is not None)
    B, H, size = q.shape[0], q.shape[heads], ROWS * tiles.groups
    tasks = Tasks.make(B * H, -(-L // size), hi is not None and lo is None, cores or cores_of())
    plan = _Plan(H, H // k.shape[heads], S, lo, hi, size, tiles.keys, rows_first, tasks)
    o, lse = _run(plan, tiles, scale * LOG2E, lists, q, k, v)
    o = lax.slice_in_dim(o, 0, L, axis=rows)
    return o[..., :Dv], lse[:, :, :L]


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
    def make(heads, tall, causal, cores):
        couples = heads * (-(-tall // 2))  # equal costs, unless they leave blocks without work in the end
        pairs = causal and couples >= 0.95 * up(couples, cores)
        items = couples if pairs else heads * tall
        blocks = min(cores, items)
        return Tasks(heads, tall, causal, pairs, blocks, -(-items // blocks) * (2 if pairs else 1))

    def at(self, block, turn):
        """What a block does in its turn: (whether anything, head of all, tile)."""
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

    def each(self, block, body):
        """body(loaded, again, head, tile) -> loaded for the tiles of a block.

        loaded: what has gone through the ring so far; again: the block had a tile before.
        """

        def turn(i, loaded):
            some, head, tile = self.at(block, i)
            return lax.cond(some, lambda n: body(n, i > 0, head, tile), lambda n: n, loaded)

        lax.fori_loop(jnp.int32(0), jnp.int32(self.turns), turn, jnp.int32(0))


class Sight(NamedTuple):
    """Which key tiles some queries see, from the last to the first: `key(x)` for 0 <= x < n.

    The first `hidden` of them and all from `clear` on may be cut by a bound; none: everything is hidden.
    """

    n: jax.Array
    hidden: jax.Array
    clear: jax.Array
    key: Callable
    none: jax.Array | None = None


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
        return Sight(end - begin, hidden, jnp.maximum(clear, hidden), lambda x: end - 1 - x)

    def tiles_until(self, end):
        """Key tiles that begin before key `end`."""
        return lax.div(jnp.maximum(end, 0) + (self.keys - 1), jnp.int32(self.keys))

    def hide(self, s, first, j, layout, none=None):
        """The scores of 64 queries from `first` and key tile j, -inf where invisible."""
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
        wide = lambda x: lax.broadcast_in_dim(x, (ROWS, self.keys), [0])
        col = plgpu.broadcasted_iota(jnp.int32, (ROWS, self.keys), 1, layout=layout)
        last = row * 0 + (self.S - 1)
        if self.hi is not None:
            last = jnp.minimum(row + (first + self.hi), last)
        if none is not None:
            last = last - jnp.where(none, jnp.int32(2**30), jnp.int32(0))
        seen = col <= wide(last - j * self.keys)
        if self.lo is not None:
            seen = seen & (col >= wide(row + (first + self.lo) - j * self.keys))
        return jnp.where(seen, s, -jnp.inf)


def listed(lists, head, tile):
    """The Sight that `lists` give a tile of queries: see `attend`."""
    at = head if lists.shape[0] > 1 else jnp.int32(0)
    n, cut = lists[at, tile, 0], lists[at, tile, 1]
    some, one = jnp.maximum(n, 1), jnp.where(n == 0, 1, cut)
    return Sight(some, jnp.maximum(one, 1), some, lambda x: lists[at, tile, 2 + x], n == 0)


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

    @property
    def band(self):
        return Band(self.S, self.lo, self.hi, self.keys)

    def place(self, head, t):
        """(batch, head, first query) of a tile of queries."""
        return lax.div(head, jnp.int32(self.H)), lax.rem(head, jnp.int32(self.H)), t * self.rows

    def cut(self, ref, b, h, first, size):
        """Rows of a head of an operand in device memory."""
        at = pl.ds(first, size)
        return ref.at[b, at, h] if self.rows_first else ref.at[b, h, at]


def room(n, size, d, dtype):
    """Shared memory for n tiles of size x d, in the order that TMA writes and wgmma reads."""
    span = 128 if d % 64 == 0 else 64
    layout = plgpu.TilingTransform((8, span // 2)), plgpu.SwizzleTransform(span)
    return plgpu.SMEM((n, size, d), dtype, transforms=layout)


def _run(plan, tiles, factor, lists, q, k, v):
    """The kernel on padded operands: (o, lse), padded."""
    groups, stages, D, Dv = tiles.groups, tiles.stages, q.shape[3], v.shape[3]

    ring = lambda d: room(stages, tiles.keys, d, q.dtype)
    signal = lambda n, arrivals=1: plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)
    given = () if lists is None else (lists,)

    def kernel(*refs):
        lists, refs = (refs[0], refs[1:]) if given else (None, refs)
        _kernel(*refs, lists=lists, plan=plan, tiles=tiles, factor=factor)

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], Dv), q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], plan.H, plan.tasks.tall * plan.rows), jnp.float32),
        ],
        scratch_types=(
            room(groups, ROWS, D, q.dtype),
            ring(D),
            ring(Dv),
            room(groups, ROWS, Dv, q.dtype) if tiles.own_o else None,
            plgpu.SMEM((groups, ROWS), jnp.float32),
            (signal(groups), signal(groups)),
            (signal(stages), signal(stages, groups)),
            (signal(stages), signal(stages, groups)),
            signal(groups),
        ),
        grid=(plan.tasks.blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name="flash_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*given, q, k, v)


def _kernel(q, k, v, o, lse, q_room, k_room, v_room, o_room, lse_room, qs, ks, vs, turn, **options):
    """Rooms are shared memory; qs, ks, vs are its (full, free) barriers; turn[g]: group g may issue."""
    tiles = options["tiles"]
    group = lax.axis_index("group")

    @pl.when(group < tiles.groups)
    def _():
        if tiles.groups > 1:
            plgpu.set_max_registers({2: 240, 3: 160}[tiles.groups], action="increase")
        rooms = q_room, k_room, v_room, q_room if o_room is None else o_room, lse_room
        _compute(group, o, lse, *rooms, qs, ks, vs, turn, **options)

    @pl.when(group == tiles.groups)
    def _():
        if tiles.groups > 1:
            plgpu.set_max_registers(24, action="decrease")
        _load(q, k, v, q_room, k_room, v_room, qs, ks, vs, **options)


def _load(q, k, v, q_room, k_room, v_room, qs, ks, vs, *, lists, plan, tiles, factor):
    """The loading warpgroup: fills what the others have set free."""
    stages = jnp.int32(tiles.stages)

    def put(x, ring, signals, loaded, b, h, j):
        full, free = signals
        slot = lax.rem(loaded, stages)

        @pl.when(loaded >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        plgpu.copy_gmem_to_smem(plan.cut(x, b, h, j * plan.keys, plan.keys), ring.at[slot], full.at[slot])

    def tile(loaded, again, head, t):
        b, h, first = plan.place(head, t)
        if lists is None:
            see = plan.band.sight(first, *plan.band.of_block(first, plan.rows))
        else:
            see = listed(lists, h, t)
        n, key_head, newest = see.n, lax.div(h, jnp.int32(plan.G)), see.key(jnp.int32(0))
        key = lambda x, j: put(k, k_room, ks, loaded + x, b, key_head, j)
        value = lambda x, j: put(v, v_room, vs, loaded + x, b, key_head, j)
        key(jnp.int32(0), newest)
        for g in range(tiles.groups):

            @pl.when(again)
            def _(g=g):
                plgpu.barrier_wait(qs[1].at[g])

            plgpu.copy_gmem_to_smem(plan.cut(q, b, h, first + g * ROWS, ROWS), q_room.at[g], qs[0].at[g])
        value(jnp.int32(0), newest)

        @pl.loop(jnp.int32(1), n)
        def _(x):
            j = see.key(x)
            key(x, j)
            value(x, j)

        return loaded + n

    plan.tasks.each(lax.axis_index("block"), tile)


def _compute(
    group, o, lse, q_room, k_room, v_room, o_room, lse_room, qs, ks, vs, turn, *, lists, plan, tiles, factor
):
    """A computing warpgroup: 64 rows of every query tile of its block."""
    keys, Dv, dtype = tiles.keys, v_room.shape[2], v_room.dtype
    by_row, whole = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    q, o_tile, lse_tile = q_room.at[group], o_room.at[group], lse_room.at[group]
    slot = lambda loaded: lax.rem(loaded, jnp.int32(tiles.stages))
    wide = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])
    fill = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
    scores = plgpu.ACC((ROWS, keys), jnp.float32)
    banded = plan.band.edge or plan.lo is not None or lists is not None  # the first tile may be cut

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

    def first_scores(at):
        plgpu.barrier_wait(ks[0].at[slot(at)])
        wait_turn()

        def product(s):
            plgpu.wgmma(s, q, transposed(k_room.at[slot(at)]))
            pass_turn()
            return s[...]

        s = pl.run_scoped(product, scores)
        plgpu.barrier_arrive(ks[1].at[slot(at)])
        return s

    def values(at, acc, p):
        plgpu.barrier_wait(vs[0].at[slot(at)])
        wait_turn()

        def product(acc):
            plgpu.wgmma(acc, p, v_room.at[slot(at)])
            pass_turn()

        acc = pl.run_state(product)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(vs[1].at[slot(at)])
        return acc

    def both(at, acc, m, l, p, hide):
        """values of tile at - 1 and scores of tile `at`, and the softmax of these."""
        plgpu.barrier_wait(ks[0].at[slot(at)])
        plgpu.barrier_wait(vs[0].at[slot(at - 1)])
        wait_turn()

        def products(refs):
            acc_ref, *found = refs

            def issue(s):
                plgpu.wgmma(s, q, transposed(k_room.at[slot(at)]))
                plgpu.wgmma(acc_ref, p, v_room.at[slot(at - 1)])
                pass_turn()
                return plgpu.wgmma_accumulator_load(s, wait_n=1)

            s = pl.run_scoped(issue, scores)
            plgpu.barrier_arrive(ks[1].at[slot(at)])
            new = softmax(hide(lax.optimization_barrier(s)), m, l)
            new = lax.optimization_barrier(new) if tiles.late else new
            for ref, x in zip(found, new, strict=True):
                ref[...] = x

        blank = fill((ROWS, keys), 0.0, whole), fill((ROWS,), 1.0, by_row)
        acc, m, l, new, fix = pl.run_state(products)((plgpu.ACC.init(acc), m, l, *blank))
        plgpu.barrier_arrive(vs[1].at[slot(at - 1)])
        # p must not be narrowed earlier: the products still read the registers of the last one
        return acc * wide(fix, Dv), m, l, new.astype(dtype)

    def tile(loaded, again, head, t):
        b, h, first = plan.place(head, t)
        if lists is None:
            begin, end = plan.band.of_block(first, plan.rows)
            own_begin, own_end = plan.band.ends(first + group * ROWS, ROWS)
            before, after, n = end - own_end, own_begin - begin, end - begin
            see = plan.band.sight(first + group * ROWS, own_begin, own_end)
        else:
            see = listed(lists, h, t)
            before, after, n = jnp.int32(0), jnp.int32(0), see.n
        first = first + group * ROWS
        plgpu.barrier_wait(qs[0].at[group])
        m, l = fill((ROWS,), LOWEST, by_row), fill((ROWS, 8), 0.0, whole)
        acc = fill((ROWS, Dv), 0.0, whole)

        def skip(x):  # a tile that only other groups see
            for full, free in (ks, vs):
                plgpu.barrier_wait(full.at[slot(loaded + x)])
                plgpu.barrier_arrive(free.at[slot(loaded + x)])
            wait_turn()
            pass_turn()

        pl.loop(jnp.int32(0), before)(skip)
        hide = lambda s, x: plan.band.hide(s, first, see.key(x), whole, see.none)

        def step(x, carry, masked):
            hidden = (lambda s: hide(s, x)) if masked else (lambda s: s)
            if tiles.overlap:
                return both(loaded + before + x, *carry, hidden)
            acc, m, l, _ = carry
            m, l, p, fix = softmax(hidden(first_scores(loaded + before + x)), m, l)
            return values(loaded + before + x, acc * wide(fix, Dv), p.astype(dtype)), m, l, carry[3]

        zero = jnp.int32(0)
        s = first_scores(loaded + before)
        m, l, p, _ = softmax(hide(s, zero) if banded else s, m, l)
        p = p.astype(dtype)
        if not tiles.overlap:
            acc, p = values(loaded + before, acc, p), zero
        start, carry = jnp.int32(1), (acc, m, l, p)
        if plan.hi is not None or lists is not None:
            carry = lax.fori_loop(start, see.hidden, lambda x, c: step(x, c, True), carry)
            start = jnp.maximum(see.hidden, 1)
        stop = see.n if plan.lo is None else jnp.maximum(see.clear, start)
        carry = lax.fori_loop(start, stop, lambda x, c: step(x, c, False), carry)
        if plan.lo is not None:
            carry = lax.fori_loop(stop, see.n, lambda x, c: step(x, c, True), carry)
        acc, m, l, p = carry
        if tiles.own_o:
            plgpu.barrier_arrive(qs[1].at[group])
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
            plgpu.barrier_arrive(qs[1].at[group])
        return loaded + n

    plan.tasks.each(lax.axis_index("block"), tile)
    plgpu.wait_smem_to_gmem(0)


def transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
