"""FlashAttention's backward pass in Pallas for Hopper GPUs (Mosaic GPU), in two kernels, for heads up to 128.

One kernel holds 64 keys a warpgroup and takes the queries past them for dk and dv, summed over the query
heads of a group; the other holds 64 queries a warpgroup and takes the keys past them for dq. Probabilities
are computed anew in both: 7 matrix products for the 5 of one kernel, which would have to add dq up
atomically; here the same call gives the same bits. Loading, lists of tiles and order are the forward pass's.
Tiles of a bias come with what passes; for its gradient the second kernel also writes dS out.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels.flash_hopper import (
    LOG2E,
    ROWS,
    SPACE,
    SPARE,
    Band,
    Tasks,
    begins,
    bias_at,
    bounds_at,
    cleaned,
    cores_of,
    evens_out,
    laid,
    listed,
    load_mask,
    load_tile,
    narrow,
    of_seen_rows,
    pad,
    pick,
    room,
    rooms_for,
    shown,
    split,
    spread,
    transposed,
    up,
    veil,
    with_refs,
    words_of,
)
from accel.kernels.flash_hopper_lists import Hidden, Seen

WIDEST = 128  # two sums of 64 x 128 in float32 fill the registers


@dataclass(frozen=True)
class Sizes:
    """What is static: G query heads a key head, L queries, S keys, the bounds, and how the work is cut."""

    H: int
    G: int
    L: int
    S: int
    lo: int | None
    hi: int | None
    scale: float
    rows_first: bool
    causal: bool  # the later a tile of queries, the more keys it meets
    groups: int = 2
    step: int = 64  # queries or keys that pass at a time
    stages: int = 4
    ahead: bool = False  # what the next tile holds loads, and the results of the last leave, beside this one
    batches: int | None = None  # of which all run side by side, as they share a bias

    @property
    def spots(self):
        """Tiles that are held at a time."""
        return self.groups * (2 if self.ahead else 1)

    def spot(self, group, turn):
        """Where what a group holds lies in its turn."""
        return group + lax.rem(turn, jnp.int32(2)) * self.groups if self.ahead else group

    def settle(self, let_go, group, turn, first=True):
        """Once in a turn, with `ahead`: wait until the last results have left, and let their room go."""
        if self.ahead:

            @pl.when((turn > 0) & first)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(let_go.at[self.spot(group, turn + 1)])

    def leave(self, let_go, spot):
        """The room of results that are under way: let it go, with `ahead` later on."""
        if not self.ahead:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(let_go.at[spot])

    def cut(self, ref, b, h, first, size):
        """Rows of a head of an operand in device memory."""
        at = pl.ds(first, size)
        return ref.at[b, at, h] if self.rows_first else ref.at[b, h, at]


STATIC = ("scale", "lo", "hi", "rows_first", "itself", "cores", "key_sizes", "query_sizes", "learnt")


@partial(jax.jit, static_argnames=STATIC)
def attend_backward(
    do,
    q,
    k,
    v,
    lse,
    delta,
    by_key=None,
    by_query=None,
    *,
    orders=(None, None),
    start=None,
    end=None,
    mask=None,
    bias=None,
    scale,
    lo=None,
    hi=None,
    rows_first=False,
    itself=False,
    learnt=False,
    cores=None,
    key_sizes=None,
    query_sizes=None,
):
    """(dq, dk, dv) like q, k, v for the cotangent do of o, operands as in `flash_hopper.attend`.

    Args: lse [B, H, L] float32, inf for rows that saw nothing; delta [B, H, L] float32, rowsum(do * o) less
        the cotangent of lse; do, and delta, of rows that saw nothing may hold NaN.
      by_key, by_query: lists of what each tile of keys, and of queries, of the two kernels meets, in place of
        start, end and mask, which make their own: see `attend`.
      orders: which block computes which tiles of these, see `Tasks.dealt`; tiles of keys from the last.
      learnt: a fourth result, of bias; dS is written out for it, B H L S numbers in q's dtype.
      key_sizes, query_sizes: (groups, step, stages, ahead) of the two kernels; None is what suits.
    """
    rows, heads = (1, 2) if rows_first else (2, 1)
    L, S, D, Dv = q.shape[rows], k.shape[rows], q.shape[3], v.shape[3]
    H, Hkv = q.shape[heads], k.shape[heads]
    seen = Seen.make(L, S, H // Hkv, lo, hi, start, end, mask, itself)
    if seen.told:
        alive = seen.alive(lse) if bias is None else lse < jnp.inf  # -inf hides rows as well
        (delta,) = of_seen_rows(lse, delta)
    q, k = (pad(x, rows, up(D, 32)) for x in (q, k))
    do, v = (pad(x, rows, up(Dv, 32)) for x in (do, v))
    tall = up(L, 6 * ROWS)  # whole tiles of two or three groups
    lse, delta = (
        jnp.pad(x, [(0, 0), (0, 0), (0, tall - L)], constant_values=fill)
        for x, fill in ((lse * LOG2E, jnp.inf), (delta, 0))
    )
    causal = hi is not None and lo is None
    if seen.told:  # its bounds hold these
        lo = hi = None
    sizes = partial(Sizes, H, H // Hkv, L, S, lo, hi, scale, rows_first, causal)
    cores = cores or cores_of()
    operands = do, q, k, v, lse, delta
    wide, near = max(q.shape[3], v.shape[3]), narrow(lo, hi)  # None by now where something else hides keys
    by_key_sizes = _groups(S, wide), 64, 4, near and wide <= 64
    by_query_sizes = _groups(L, wide), 64, 3 if near and wide > 64 else 4, near
    if bias is not None:  # its tiles take the room of a stage
        fit = lambda sizes, more: (*sizes[:2], _stages(sizes[0], wide, mask is not None, more))
        by_key_sizes, by_query_sizes = fit(by_key_sizes, False), fit(by_query_sizes, learnt)
        sizes = partial(sizes, batches=q.shape[0] if bias.shape[0] == 1 else None)
    key_sizes, query_sizes = sizes(*(key_sizes or by_key_sizes)), sizes(*(query_sizes or by_query_sizes))
    by_key, by_query = (Hidden(x, order=y) for x, y in zip((by_key, by_query), orders, strict=True))
    if seen.told:
        ordered, copies, dirty, stay = evens_out(wide, start), (), None, ()
        if not itself:
            copies, dirty = cleaned((k, v), seen.keys(), ROWS, rows, key_sizes.groups)
            stay = dirty.astype(jnp.int32), *copies
        by_query = seen.by_query(query_sizes.groups * ROWS, ROWS, copies, dirty, ordered)
        copies, dirty = cleaned((q, do), alive, ROWS, rows) if seen.uneven else ((), None)
        by_key = seen.by_key(ROWS, key_sizes.groups * ROWS, copies, dirty, stay, ordered)
    if bias is not None:
        by_key, by_query = (
            x._replace(bias=laid(bias, n))
            for x, n in ((by_key, key_sizes.groups * ROWS), (by_query, query_sizes.step))
        )
    dk, dv = _run_keys(key_sizes, cores, by_key, *operands)
    dq, *ds = _run_queries(query_sizes, cores, by_query, learnt, *operands)
    trim = lambda x, n, d: lax.slice_in_dim(lax.slice_in_dim(x, 0, n, axis=rows), 0, d, axis=3)
    more = (seen.of_bias(ds[0][:, :, :L, :S], bias),) if learnt else ()
    return trim(dq, L, D), trim(dk, S, D), trim(dv, S, Dv), *more


def _groups(n, wide):
    """Warpgroups that compute: three where their registers suffice and no more than a seventh is padding."""
    return 3 if wide <= 64 and up(n, 3 * ROWS) <= 1.15 * up(n, 2 * ROWS) else 2


def _stages(groups, wide, masked, learnt):
    """How many stages fit beside a bias, of 64 rows a tile."""
    each = 2 * ROWS * wide + groups * ROWS * (ROWS + 8 * masked)
    return min(4, (SPACE - groups * ROWS * (2 * wide + ROWS * learnt)) // each)


def _call(kernel, name, hidden, operands, outputs, scratch, groups, blocks, ahead):
    given, spare = jax.tree.leaves(hidden), ahead or hidden.bias is not None

    def told(*refs):
        mine, refs = with_refs(hidden, refs)
        kernel(mine, *refs)

    return plgpu.kernel(
        told,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, **(SPARE if spare else {})
        ),
    )(*given, *operands)


def _signal(n, arrivals=1):
    return plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)


def _roles(groups, compute, load):
    """The first groups compute, the last one loads."""
    group = lax.axis_index("group")

    @pl.when(group < groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers({2: 240, 3: 160}[groups], action="increase")
        compute(group)

    @pl.when(group == groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers(24, action="decrease")
        load()


def _zeros(shape, layout=None):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout or plgpu.Layout.WGMMA)


def begin_with(bias, scale, less=0.0):
    """What scores begin with, so that once scaled they have the bias in them."""
    return plgpu.ACC.init(bias.astype(jnp.float32) * (1 / scale) - less)


def _run_keys(z, cores, hidden, do, q, k, v, lse, delta):
    """(dk, dv): blocks of keys stay, queries pass."""
    high = ROWS * z.groups
    B, Hkv = k.shape[0], z.H // z.G
    place = partial(split, H=Hkv, batches=z.batches if hidden.order is None else None)
    tasks = Tasks.make(B * Hkv, -(-z.S // high), z.causal, cores, hidden.order, narrow(z.lo, z.hi))
    hidden = hidden._replace(order=tasks.dealt(hidden.order))
    D, Dv, dtype = q.shape[3], v.shape[3], q.dtype
    count = -(-z.L // z.step)  # tiles of queries a head
    tiles = lambda n: lax.div(jnp.maximum(n, 0), jnp.int32(z.step))  # that end by query n

    def meets(first, keys):
        """The tiles start <= i < stop of queries that see one of the keys from `first` on."""
        start, stop = jnp.int32(0), jnp.int32(count)
        if z.hi is not None:
            start = jnp.clip(tiles(first - z.hi), 0, count)
        if z.lo is not None:
            stop = jnp.clip(tiles(first + keys - z.lo + z.step - 1), start, count)
        return start, stop

    def kernel(hidden, do_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dk_ref, dv_ref, *scratch):
        q_room, do_room, lse_room, delta_room, k_room, v_room, hides, beside, *signals = scratch
        seen_q, seen_do, free, held, let_go = signals
        bounds_room, mask_room = hides
        veiled = hidden.bounds is not None or hidden.mask is not None
        slot = lambda at: lax.rem(at, jnp.int32(z.stages))
        by_column = plgpu.Layout.WGMMA.reduce(0)
        across_keys = plgpu.Layout.WGMMA_TRANSPOSED
        across = lambda x: lax.broadcast_in_dim(x, (ROWS, z.step), [1])
        scores = plgpu.ACC((ROWS, z.step), jnp.float32)
        unit = z.scale * LOG2E
        # Scores that begin with -lse leave it no registers of its own, of which heads of 128 with something
        # to hide have too few; where registers suffice it takes longer.
        cut = veiled or z.lo is not None or z.hi is not None
        lse_first = hidden.bias is not None or (max(D, Dv) > 64 and cut and abs(z.scale) > 2.0**-30)

        def compute(group):
            def veil(x, s_at, first, words):
                """Scores of the keys from `first` and a tile of queries, -inf where hidden."""
                seen = None
                if hidden.bounds is not None:
                    row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
                    start, end = (spread(bounds_room.at[s_at, i], by_column) - first for i in (0, 1))
                    seen = (row >= across(start)) & (row < across(end))
                if hidden.mask is not None:
                    some = shown(words, z.step)
                    seen = some if seen is None else seen & some
                return jnp.where(seen, x, -jnp.inf)

            def step(mine, at, query, first, dk, dv, masked):
                s_at, (key, value) = slot(at), mine
                plgpu.barrier_wait(seen_q.at[s_at])
                plgpu.barrier_wait(seen_do.at[s_at])
                lse, words, begun = spread(lse_room.at[s_at], by_column), None, ()
                if lse_first:
                    less = across(lse * (1 / unit))
                    if hidden.bias is None:
                        begun = (plgpu.ACC.init(-less),)
                    else:
                        bias = spread(transposed(beside.at[s_at * z.groups + group]), across_keys)
                        bias = plgpu.layout_cast(bias, plgpu.Layout.WGMMA)
                        begun = (begin_with(bias, z.scale, less),)
                if masked and hidden.mask is not None:
                    words = words_of(mask_room.at[s_at, pl.ds(group * ROWS, ROWS)], query, z.step)

                def products(refs):
                    dk_ref, dv_ref, *begins_with = refs

                    def issue(*refs):
                        s, dp = refs
                        plgpu.wgmma(s, key, transposed(q_room.at[s_at]))
                        plgpu.wgmma(dp, value, transposed(do_room.at[s_at]))
                        x = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s, wait_n=1))
                        x = x * unit if begun else x * unit - across(lse)
                        if masked and veiled:
                            x = veil(x, s_at, first, words)
                        elif masked:
                            iota = lambda axis: plgpu.broadcasted_iota(
                                jnp.int32, (ROWS, z.step), axis, layout=plgpu.Layout.WGMMA
                            )
                            ahead = iota(0) - iota(1) + (first - query)
                            if z.lo is not None and z.hi is not None:  # one comparison for both
                                x = jnp.where((ahead - z.lo).astype(jnp.uint32) <= z.hi - z.lo, x, -jnp.inf)
                            elif z.hi is not None:
                                x = jnp.where(ahead <= z.hi, x, -jnp.inf)
                            elif z.lo is not None:
                                x = jnp.where(ahead >= z.lo, x, -jnp.inf)
                        p = jnp.exp2(x)
                        plgpu.wgmma(dv_ref, p.astype(dtype), do_room.at[s_at])
                        y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp, wait_n=1))
                        ds = p * (y - across(spread(delta_room.at[s_at], by_column)))
                        plgpu.wgmma(dk_ref, ds.astype(dtype), q_room.at[s_at])

                    pl.run_scoped(partial(issue, *begins_with), *[scores] * (2 - len(begun)))

                dk, dv, *_ = pl.run_state(products)((plgpu.ACC.init(dk), plgpu.ACC.init(dv), *begun))
                plgpu.barrier_arrive(free.at[s_at])
                return dk, dv

            def banded(kv, turn, loaded, first):
                """over(g, (at, dk, dv)): the queries of head g of the group past the keys of a block."""
                start, stop = meets(first, high)
                mine = first + group * ROWS
                own, end = meets(mine, ROWS)
                clear, back = own, end  # tiles between these are not cut
                if z.hi is not None:
                    clear = jnp.clip(tiles(mine + (ROWS - 1) - z.hi + z.step - 1), own, end)
                if z.lo is not None:
                    back = jnp.clip(tiles(mine - z.lo + 1), clear, end)

                def over(g, carry):
                    at, *sums = carry

                    def skip(i):
                        to = slot(at + i - start)
                        plgpu.barrier_wait(seen_q.at[to])
                        plgpu.barrier_wait(seen_do.at[to])
                        plgpu.barrier_arrive(free.at[to])

                    move = lambda masked: lambda i, c: step(kv, at + i - start, i * z.step, mine, *c, masked)
                    pl.loop(start, own)(skip)
                    sums = tuple(sums)
                    if z.hi is not None:
                        sums = lax.fori_loop(own, clear, move(True), sums)
                    z.settle(let_go, group, turn, g == 0)
                    sums = lax.fori_loop(clear, back, move(False), sums)
                    if z.lo is not None:
                        sums = lax.fori_loop(back, end, move(True), sums)
                        pl.loop(end, stop)(skip)
                    return at + stop - start, *sums

                return over

            def by_list(kv, turn, first, b, h, tile):
                """As `banded`, the queries that the lists name."""
                mine = first + group * ROWS

                def over(g, carry):
                    at, *sums = carry
                    entry = hidden.lists.at[pick(hidden.lists, b, h * z.G + g, tile)]
                    n, cut = entry[0], entry[1]
                    masked = lambda x, c: step(kv, at + x, begins(entry[2 + x]), mine, *c, True)
                    clear = lambda x, c: step(kv, at + x, 0, mine, *c, False)
                    sums = lax.fori_loop(jnp.int32(0), cut, masked, tuple(sums))
                    z.settle(let_go, group, turn, g == 0)
                    return at + n, *lax.fori_loop(cut, n, clear, sums)

                return over

            def task(loaded, turn, head, t):
                tile, spot = tasks.tall - 1 - t, z.spot(group, turn)
                first = tile * high
                b, h = place(head)
                key, value = k_room.at[spot], v_room.at[spot]
                plgpu.barrier_wait(held.at[spot])
                if hidden.lists is None:
                    over = banded((key, value), turn, loaded, first)
                else:
                    over = by_list((key, value), turn, first, b, h, tile)
                zeros = loaded, _zeros((ROWS, D)), _zeros((ROWS, Dv))
                loaded, dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(z.G), over, zeros)
                first = first + group * ROWS
                key[...] = (dk * z.scale).astype(dtype)
                value[...] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(key, z.cut(dk_ref, b, h, first, ROWS))
                plgpu.copy_smem_to_gmem(value, z.cut(dv_ref, b, h, first, ROWS))
                z.leave(let_go, spot)
                return loaded

            tasks.each(lax.axis_index("block"), task, hidden.order)
            plgpu.wait_smem_to_gmem(0)

        def load():
            def task(loaded, turn, head, t):
                tile = tasks.tall - 1 - t
                first = tile * high
                b, h = place(head)
                for g in range(z.groups):
                    spot = z.spot(g, turn)

                    @pl.when(turn > (1 if z.ahead else 0))
                    def _(spot=spot):
                        plgpu.barrier_wait(let_go.at[spot])

                    own = lambda ref, at=first + g * ROWS: z.cut(ref, b, h, at, ROWS)
                    other = [None, None]
                    if hidden.stay:
                        dirty, *copies = hidden.stay
                        mine = jnp.minimum(tile * z.groups + g, dirty.shape[2] - 1)  # there may be no more
                        other = [(x, dirty[*pick(dirty, b, h), mine] != 0) for x in copies]
                    load_tile(own, k_ref, other[0], k_room.at[spot], held.at[spot])
                    load_tile(own, v_ref, other[1], v_room.at[spot], held.at[spot])

                def over(g, at):
                    head = h * z.G + g
                    if hidden.lists is None:
                        start, stop = meets(first, high)
                        n, query = stop - start, lambda x: (start + x) * z.step
                    else:
                        entry = hidden.lists.at[pick(hidden.lists, b, head, tile)]
                        n, query = entry[0], lambda x: entry[2 + x]

                    @pl.loop(jnp.int32(0), n)
                    def _(x):
                        to = slot(at + x)

                        @pl.when(at + x >= z.stages)
                        def _():
                            plgpu.barrier_wait(free.at[to])

                        i = query(x)
                        spare = [(copy, i < 0) for copy in hidden.spare] or [None, None]
                        i = i if hidden.lists is None else begins(i)
                        rows = pl.ds(i, z.step)
                        cut = lambda ref: z.cut(ref, b, head, i, z.step)
                        load_tile(cut, q_ref, spare[0], q_room.at[to], seen_q.at[to])
                        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], lse_room.at[to], seen_q.at[to])
                        if hidden.bounds is not None:
                            own = bounds_at(hidden.bounds, b, head, i, z.step)
                            plgpu.copy_gmem_to_smem(own, bounds_room.at[to], seen_q.at[to])
                        if hidden.mask is not None:
                            part = hidden.mask, mask_room.at[to], seen_q.at[to]
                            load_mask(*part, b, head, first, i, x < entry[1])
                        for group in range(z.groups if hidden.bias is not None else 0):
                            own = bias_at(hidden.bias, b, head, i, z.step, first, high, group)
                            plgpu.copy_gmem_to_smem(own, beside.at[to * z.groups + group], seen_q.at[to])
                        load_tile(cut, do_ref, spare[1], do_room.at[to], seen_do.at[to])
                        plgpu.copy_gmem_to_smem(
                            delta_ref.at[b, head, rows], delta_room.at[to], seen_do.at[to]
                        )

                    return at + n

                return lax.fori_loop(jnp.int32(0), jnp.int32(z.G), over, loaded)

            tasks.each(lax.axis_index("block"), task, hidden.order)

        _roles(z.groups, compute, load)

    row = plgpu.SMEM((z.stages, z.step), jnp.float32)
    scratch = (
        room(z.stages, z.step, D, dtype), room(z.stages, z.step, Dv, dtype), row, row,
        room(z.spots, ROWS, D, dtype), room(z.spots, ROWS, Dv, dtype),
        rooms_for(hidden, (z.stages, z.step), (z.stages, high)),
        None if hidden.bias is None else room(z.stages * z.groups, z.step, ROWS, dtype),
        _signal(z.stages, 2 + _more(hidden, z.groups) + (hidden.bounds is not None)), _signal(z.stages, 2),
        _signal(z.stages, z.groups), _signal(z.spots, 2), _signal(z.spots),
    )  # fmt: skip
    operands = do, q, k, v, lse, delta
    return _call(kernel, "flash_dkv", hidden, operands, (k, v), scratch, z.groups, tasks.blocks, z.ahead)


def _more(hidden, groups):
    """How many copies come with the queries or keys that pass, of a mask and of a bias."""
    return (hidden.mask is not None) + groups * (hidden.bias is not None)


def _run_queries(z, cores, hidden, learnt, do, q, k, v, lse, delta):
    """[dq], or learnt, [dq, dS [B, H, L, S], unwritten where no tile is met]: blocks of queries stay, keys
    pass, from the last to the first.
    """
    high = ROWS * z.groups
    B = q.shape[0]
    tasks = Tasks.make(B * z.H, -(-z.L // high), z.causal, cores, hidden.order, narrow(z.lo, z.hi))
    hidden = hidden._replace(order=tasks.dealt(hidden.order))
    D, Dv, dtype = q.shape[3], v.shape[3], q.dtype
    band = Band(z.S, z.lo, z.hi, z.step)
    place = partial(split, H=z.H, batches=z.batches if hidden.order is None else None)

    def kernel(hidden, do_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dq_ref, *scratch):
        ds_ref, *scratch = scratch if learnt else (None, *scratch)
        k_room, v_room, q_room, do_room, lse_room, delta_room, hides, beside, ds_room, *signals = scratch
        ks, vs, k_free, v_free, held, let_go = signals
        lists, (bounds_room, mask_room) = hidden.lists, hides
        veiled = hidden.bounds is not None or hidden.mask is not None
        slot = lambda at: lax.rem(at, jnp.int32(z.stages))
        by_row, whole = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
        wide = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])
        scores = plgpu.ACC((ROWS, z.step), jnp.float32)
        unit = z.scale * LOG2E
        apart = hidden.lists is None and band.apart(tasks.tall * high)
        banded = band.edge or z.lo is not None or hidden.lists is not None  # the first tile may be cut

        def compute(group):
            def own_words(at, key):
                if hidden.mask is None:
                    return None
                rows = pl.ds(0 if mask_room.shape[1] == ROWS else group * ROWS, ROWS)
                return words_of(mask_room.at[at, rows], key, z.step)

            def task(loaded, turn, head, t):
                first, spot = t * high, z.spot(group, turn)
                query, cotangent = q_room.at[spot], do_room.at[spot]
                bounds = None if hidden.bounds is None else bounds_room.at[spot]
                b, h = place(head)
                if lists is None:
                    begin, end = band.of_block(first, high)
                    own_begin, own_end = band.ends(first + group * ROWS, ROWS)
                    before, after, n = end - own_end, own_begin - begin, end - begin
                    see = band.sight(first + group * ROWS, own_begin, own_end)
                else:
                    see = listed(lists, b, h, t)
                    before, after, n = jnp.int32(0), jnp.int32(0), see.n
                first = first + group * ROWS
                plgpu.barrier_wait(held.at[spot])
                lse, delta = spread(lse_room.at[spot], by_row), spread(delta_room.at[spot], by_row)

                def own_bias(at):
                    if hidden.bias is None:
                        return ()
                    return (begin_with(spread(beside.at[at * z.groups + group], whole), z.scale),)

                def put_out(ds, x):
                    """dS of tile x, for the gradient of a bias."""
                    if learnt:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        mine = ds_room.at[group]
                        mine[...] = ds
                        plgpu.commit_smem()
                        to = ds_ref.at[b, h, pl.ds(first, ROWS), pl.ds(see.key(x), z.step)]
                        plgpu.copy_smem_to_gmem(mine, to)
                    return ds

                def hide(y, x, words, front):
                    if veiled:
                        return veil(y, see.key(x), bounds, words, whole)
                    ends = {"back": not front, "front": front} if apart else {}
                    return band.hide(y, first, see.key(x), whole, see.none, **ends)

                def both(x, acc, ds, masked=False, front=True):
                    """dq of tile x - 1, ds of tile x, which may be cut in front or after the clear ones."""
                    at, last = slot(loaded + before + x), slot(loaded + before + x - 1)
                    plgpu.barrier_wait(ks.at[at])
                    plgpu.barrier_wait(vs.at[at])
                    words = own_words(at, see.key(x)) if masked else None
                    begun = own_bias(at)

                    def products(refs):
                        acc_ref, ds_ref, *begins_with = refs

                        def issue(*refs):
                            s, dp = refs
                            plgpu.wgmma(s, query, transposed(k_room.at[at]))
                            plgpu.wgmma(dp, cotangent, transposed(v_room.at[at]))
                            plgpu.wgmma(acc_ref, ds, k_room.at[last])
                            y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s, wait_n=2))
                            y = y * unit - wide(lse, z.step)
                            p = jnp.exp2(hide(y, x, words, front) if masked else y)
                            y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp, wait_n=1))
                            plgpu.barrier_arrive(v_free.at[at])
                            return p * (y - wide(delta, z.step))

                        ds_ref[...] = pl.run_scoped(
                            partial(issue, *begins_with), *[scores] * (2 - len(begun))
                        )

                    blank = _zeros((ROWS, z.step))
                    acc, new, *_ = pl.run_state(products)((plgpu.ACC.init(acc), blank, *begun))
                    plgpu.barrier_arrive(k_free.at[last])
                    return acc, put_out(new.astype(dtype), x)

                def skip(x):
                    at = slot(loaded + x)
                    plgpu.barrier_wait(ks.at[at])
                    plgpu.barrier_arrive(k_free.at[at])
                    plgpu.barrier_wait(vs.at[at])
                    plgpu.barrier_arrive(v_free.at[at])

                pl.loop(jnp.int32(0), before)(skip)
                at = slot(loaded + before)
                plgpu.barrier_wait(ks.at[at])
                plgpu.barrier_wait(vs.at[at])
                words = own_words(at, see.key(jnp.int32(0))) if banded else None
                begun = own_bias(at)

                def products(s, dp):
                    plgpu.wgmma(s, query, transposed(k_room.at[at]))
                    plgpu.wgmma(dp, cotangent, transposed(v_room.at[at]))
                    return None if begun else (s[...], dp[...])

                if begun:
                    blank = plgpu.ACC.init(_zeros((ROWS, z.step)))
                    s, dp = pl.run_state(lambda refs: products(*refs))((*begun, blank))
                else:
                    s, dp = pl.run_scoped(products, scores, scores)
                plgpu.barrier_arrive(v_free.at[at])
                y = s * unit - wide(lse, z.step)
                p = jnp.exp2(hide(y, jnp.int32(0), words, True) if banded else y)
                carry = _zeros((ROWS, D)), (p * (dp - wide(delta, z.step))).astype(dtype)
                put_out(carry[1], jnp.int32(0))
                start = jnp.int32(1)
                z.settle(let_go, group, turn)
                if z.hi is not None or lists is not None:
                    carry = lax.fori_loop(start, see.hidden, lambda x, c: both(x, *c, True), carry)
                    start = jnp.maximum(see.hidden, 1)
                stop = see.n if z.lo is None else jnp.maximum(see.clear, start)
                carry = lax.fori_loop(start, stop, lambda x, c: both(x, *c), carry)
                if z.lo is not None:
                    carry = lax.fori_loop(stop, see.n, lambda x, c: both(x, *c, True, False), carry)
                acc, ds = carry
                at = slot(loaded + before + see.n - 1)
                final = lambda acc_ref: plgpu.wgmma(acc_ref, ds, k_room.at[at])
                acc = pl.run_state(final)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(k_free.at[at])
                if z.lo is not None:
                    pl.loop(n - after, n)(skip)
                if veiled:  # queries of rows that see nothing may hold NaN
                    acc = jnp.where(wide(lse, D) < jnp.inf, acc, 0.0)
                query[...] = (acc * z.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query, z.cut(dq_ref, b, h, first, ROWS))
                z.leave(let_go, spot)
                return loaded + n

            tasks.each(lax.axis_index("block"), task, hidden.order)
            plgpu.wait_smem_to_gmem(0)

        def load():
            def task(loaded, turn, head, t):
                first = t * high
                b, h = place(head)
                key_head = lax.div(h, jnp.int32(z.G))
                if lists is None:
                    see = band.sight(first, *band.of_block(first, high))
                else:
                    see = listed(lists, b, h, t)
                for g in range(z.groups):
                    at, spot = first + g * ROWS, z.spot(g, turn)

                    @pl.when(turn > (1 if z.ahead else 0))
                    def _(spot=spot):
                        plgpu.barrier_wait(let_go.at[spot])

                    rows = pl.ds(at, ROWS)
                    to = lambda source, room, spot=spot: plgpu.copy_gmem_to_smem(
                        source, room.at[spot], held.at[spot]
                    )
                    to(z.cut(q_ref, b, h, at, ROWS), q_room)
                    to(z.cut(do_ref, b, h, at, ROWS), do_room)
                    to(lse_ref.at[b, h, rows], lse_room)
                    to(delta_ref.at[b, h, rows], delta_room)
                    if hidden.bounds is not None:
                        to(bounds_at(hidden.bounds, b, h, at, ROWS), bounds_room)

                @pl.loop(jnp.int32(0), see.n)
                def _(x):
                    to, key = slot(loaded + x), see.key(x)
                    spare = [(copy, see.spare(x)) for copy in hidden.spare] or [None, None]
                    for ref, other, to_room, full, free in (
                        (k_ref, spare[0], k_room, ks, k_free),
                        (v_ref, spare[1], v_room, vs, v_free),
                    ):

                        @pl.when(loaded + x >= z.stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[to])

                        cut = lambda ref: z.cut(ref, b, key_head, key, z.step)
                        load_tile(cut, ref, other, to_room.at[to], full.at[to])
                    if hidden.mask is not None:
                        load_mask(hidden.mask, mask_room.at[to], ks.at[to], b, h, first, key, x < see.hidden)
                    for g in range(z.groups if hidden.bias is not None else 0):
                        own = bias_at(hidden.bias, b, h, first + g * ROWS, ROWS, key, z.step)
                        plgpu.copy_gmem_to_smem(own, beside.at[to * z.groups + g], ks.at[to])

                return loaded + see.n

            tasks.each(lax.axis_index("block"), task, hidden.order)

        _roles(z.groups, compute, load)

    tall = None if hidden.mask is None else min(high, hidden.mask.shape[2])
    row = plgpu.SMEM((z.spots, ROWS), jnp.float32)
    scratch = (
        room(z.stages, z.step, D, dtype), room(z.stages, z.step, Dv, dtype),
        room(z.spots, ROWS, D, dtype), room(z.spots, ROWS, Dv, dtype), row, row,
        rooms_for(hidden, (z.spots, ROWS), (z.stages, tall)),
        None if hidden.bias is None else room(z.stages * z.groups, ROWS, z.step, dtype),
        room(z.groups, ROWS, z.step, dtype) if learnt else None,
        _signal(z.stages, 1 + _more(hidden, z.groups)), _signal(z.stages),
        _signal(z.stages, z.groups), _signal(z.stages, z.groups),
        _signal(z.spots, 4 + (hidden.bounds is not None)), _signal(z.spots),
    )  # fmt: skip
    operands = do, q, k, v, lse, delta
    slopes = jax.ShapeDtypeStruct((B, z.H, up(z.L, 8), up(z.S, z.step)), dtype)
    results = (q, slopes) if learnt else (q,)
    return _call(kernel, "flash_dq", hidden, operands, results, scratch, z.groups, tasks.blocks, z.ahead)
