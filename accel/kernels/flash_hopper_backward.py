"""FlashAttention's backward pass in Pallas for Hopper GPUs (Mosaic GPU), in two kernels, for heads up to 128.

One kernel holds 64 keys a warpgroup and takes the queries past them for dk and dv, summed over the query
heads of a group; the other holds 64 queries a warpgroup and takes the keys past them for dq. Probabilities
are computed anew in both: 7 matrix products for the 5 of one kernel, which would have to add dq up
atomically; here the same call gives the same bits. Loading, lists of tiles and order are the forward pass's.
"""

import inspect
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels.flash_hopper import LOG2E, ROWS, Band, Tasks, cores_of, listed, pad, room, transposed, up

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
    groups: int = 2
    step: int = 64  # queries or keys that pass at a time
    stages: int = 4

    def cut(self, ref, b, h, first, size):
        """Rows of a head of an operand in device memory."""
        at = pl.ds(first, size)
        return ref.at[b, at, h] if self.rows_first else ref.at[b, h, at]


STATIC = ("scale", "lo", "hi", "rows_first", "cores", "key_sizes", "query_sizes")


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
    scale,
    lo=None,
    hi=None,
    rows_first=False,
    cores=None,
    key_sizes=None,
    query_sizes=None,
):
    """(dq, dk, dv) like q, k, v for the cotangent do of o, operands as in `flash_hopper.attend`.

    Args: lse [B, H, L] float32, inf for rows that saw nothing; delta [B, H, L] float32, rowsum(do * o) less
        the cotangent of lse.
      by_key, by_query: lists of what each tile of keys, and of queries, of the two kernels meets, or None for
        all: see `attend`.
      key_sizes, query_sizes: (groups, step, stages) of the two kernels; None is what suits.
    """
    rows, heads = (1, 2) if rows_first else (2, 1)
    L, S, D, Dv = q.shape[rows], k.shape[rows], q.shape[3], v.shape[3]
    q, k = (pad(x, rows, up(D, 32)) for x in (q, k))
    do, v = (pad(x, rows, up(Dv, 32)) for x in (do, v))
    tall = up(L, 6 * ROWS)  # whole tiles of two or three groups
    lse, delta = (
        jnp.pad(x, [(0, 0), (0, 0), (0, tall - L)], constant_values=fill)
        for x, fill in ((lse * LOG2E, jnp.inf), (delta, 0))
    )
    H, Hkv = q.shape[heads], k.shape[heads]
    sizes = partial(Sizes, H, H // Hkv, L, S, lo, hi, scale, rows_first)
    cores = cores or cores_of()
    operands = do, q, k, v, lse, delta
    fit = lambda n: (_groups(n, max(q.shape[3], v.shape[3])), 64, 4)
    dk, dv = _run_keys(sizes(*(key_sizes or fit(S))), cores, by_key, *operands)
    dq = _run_queries(sizes(*(query_sizes or fit(L))), cores, by_query, *operands)
    trim = lambda x, n, d: lax.slice_in_dim(lax.slice_in_dim(x, 0, n, axis=rows), 0, d, axis=3)
    return trim(dq, L, D), trim(dk, S, D), trim(dv, S, Dv)


def _groups(n, wide):
    """Warpgroups that compute: three where their registers suffice and no more than a seventh is padding."""
    return 3 if wide <= 64 and up(n, 3 * ROWS) <= 1.15 * up(n, 2 * ROWS) else 2


def _call(kernel, name, lists, operands, outputs, scratch, groups, blocks):
    given = () if lists is None else (lists,)

    def with_lists(*refs):
        kernel(*refs) if given else kernel(None, *refs)

    return plgpu.kernel(
        with_lists,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
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


def _row(ref, layout):
    """A vector in shared memory, spread as a layout wants it."""
    index = inspect.signature(plgpu.load).parameters.get("idx")  # JAX 0.10 asks for one
    index = ((),) if index is not None and index.default is index.empty else ()
    return plgpu.load(ref, *index, layout=layout)


def _zeros(shape, layout=None):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout or plgpu.Layout.WGMMA)


def _run_keys(z, cores, lists, do, q, k, v, lse, delta):
    """(dk, dv): blocks of keys stay, queries pass."""
    high = ROWS * z.groups
    B, Hkv = k.shape[0], z.H // z.G
    tasks = Tasks.make(B * Hkv, -(-z.S // high), z.hi is not None and z.lo is None, cores)
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

    def kernel(lists_ref, do_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dk_ref, dv_ref, *scratch):
        q_room, do_room, lse_room, delta_room, k_room, v_room, seen_q, seen_do, free, held, let_go = scratch
        slot = lambda at: lax.rem(at, jnp.int32(z.stages))
        by_column = plgpu.Layout.WGMMA.reduce(0)
        across = lambda x: lax.broadcast_in_dim(x, (ROWS, z.step), [1])
        scores = plgpu.ACC((ROWS, z.step), jnp.float32)
        unit = z.scale * LOG2E

        def compute(group):
            key, value = k_room.at[group], v_room.at[group]

            def step(at, query, first, dk, dv, masked):
                s_at = slot(at)
                plgpu.barrier_wait(seen_q.at[s_at])
                plgpu.barrier_wait(seen_do.at[s_at])
                lse = _row(lse_room.at[s_at], by_column)

                def products(refs):
                    dk_ref, dv_ref = refs

                    def issue(s, dp):
                        plgpu.wgmma(s, key, transposed(q_room.at[s_at]))
                        plgpu.wgmma(dp, value, transposed(do_room.at[s_at]))
                        x = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s, wait_n=1))
                        x = x * unit - across(lse)
                        if masked:
                            row = plgpu.broadcasted_iota(
                                jnp.int32, (ROWS, z.step), 0, layout=plgpu.Layout.WGMMA
                            )
                            col = plgpu.broadcasted_iota(
                                jnp.int32, (ROWS, z.step), 1, layout=plgpu.Layout.WGMMA
                            )
                            if z.hi is not None:
                                x = jnp.where(row - col <= query + z.hi - first, x, -jnp.inf)
                            if z.lo is not None:
                                x = jnp.where(row - col >= query + z.lo - first, x, -jnp.inf)
                        p = jnp.exp2(x)
                        plgpu.wgmma(dv_ref, p.astype(dtype), do_room.at[s_at])
                        y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp, wait_n=1))
                        ds = p * (y - across(_row(delta_room.at[s_at], by_column)))
                        plgpu.wgmma(dk_ref, ds.astype(dtype), q_room.at[s_at])

                    pl.run_scoped(issue, scores, scores)

                dk, dv = pl.run_state(products)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
                plgpu.barrier_arrive(free.at[s_at])
                return dk, dv

            def banded(loaded, first):
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

                    move = lambda masked: lambda i, c: step(at + i - start, i * z.step, mine, *c, masked)
                    pl.loop(start, own)(skip)
                    sums = tuple(sums)
                    if z.hi is not None:
                        sums = lax.fori_loop(own, clear, move(True), sums)
                    sums = lax.fori_loop(clear, back, move(False), sums)
                    if z.lo is not None:
                        sums = lax.fori_loop(back, end, move(True), sums)
                        pl.loop(end, stop)(skip)
                    return at + stop - start, *sums

                return over

            def by_list(first, h, tile):
                """As `banded`, the queries that the lists name."""
                mine = first + group * ROWS

                def over(g, carry):
                    at, *sums = carry
                    entry = lists_ref.at[h * z.G + g if lists.shape[0] > 1 else 0, tile]
                    n, cut = entry[0], entry[1]
                    masked = lambda x, c: step(at + x, entry[2 + x] * z.step, mine, *c, True)
                    clear = lambda x, c: step(at + x, 0, mine, *c, False)
                    sums = lax.fori_loop(jnp.int32(0), cut, masked, tuple(sums))
                    return at + n, *lax.fori_loop(cut, n, clear, sums)

                return over

            def task(loaded, again, head, t):
                tile = tasks.tall - 1 - t
                first = tile * high
                b, h = lax.div(head, jnp.int32(Hkv)), lax.rem(head, jnp.int32(Hkv))
                plgpu.barrier_wait(held.at[group])
                over = banded(loaded, first) if lists is None else by_list(first, h, tile)
                zeros = loaded, _zeros((ROWS, D)), _zeros((ROWS, Dv))
                loaded, dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(z.G), over, zeros)
                first = first + group * ROWS
                key[...] = (dk * z.scale).astype(dtype)
                value[...] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(key, z.cut(dk_ref, b, h, first, ROWS))
                plgpu.copy_smem_to_gmem(value, z.cut(dv_ref, b, h, first, ROWS))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(let_go.at[group])
                return loaded

            tasks.each(lax.axis_index("block"), task)
            plgpu.wait_smem_to_gmem(0)

        def load():
            def task(loaded, again, head, t):
                tile = tasks.tall - 1 - t
                first = tile * high
                b, h = lax.div(head, jnp.int32(Hkv)), lax.rem(head, jnp.int32(Hkv))
                for g in range(z.groups):

                    @pl.when(again)
                    def _(g=g):
                        plgpu.barrier_wait(let_go.at[g])

                    for x, to in ((k_ref, k_room), (v_ref, v_room)):
                        plgpu.copy_gmem_to_smem(z.cut(x, b, h, first + g * ROWS, ROWS), to.at[g], held.at[g])

                def over(g, at):
                    head = h * z.G + g
                    if lists is None:
                        start, stop = meets(first, high)
                        n, query = stop - start, lambda x: start + x
                    else:
                        entry = lists_ref.at[head if lists.shape[0] > 1 else 0, tile]
                        n, query = entry[0], lambda x: entry[2 + x]

                    @pl.loop(jnp.int32(0), n)
                    def _(x):
                        to = slot(at + x)

                        @pl.when(at + x >= z.stages)
                        def _():
                            plgpu.barrier_wait(free.at[to])

                        i = query(x) * z.step
                        rows = pl.ds(i, z.step)
                        plgpu.copy_gmem_to_smem(
                            z.cut(q_ref, b, head, i, z.step), q_room.at[to], seen_q.at[to]
                        )
                        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], lse_room.at[to], seen_q.at[to])
                        plgpu.copy_gmem_to_smem(
                            z.cut(do_ref, b, head, i, z.step), do_room.at[to], seen_do.at[to]
                        )
                        plgpu.copy_gmem_to_smem(
                            delta_ref.at[b, head, rows], delta_room.at[to], seen_do.at[to]
                        )

                    return at + n

                return lax.fori_loop(jnp.int32(0), jnp.int32(z.G), over, loaded)

            tasks.each(lax.axis_index("block"), task)

        _roles(z.groups, compute, load)

    row = plgpu.SMEM((z.stages, z.step), jnp.float32)
    scratch = (
        room(z.stages, z.step, D, dtype), room(z.stages, z.step, Dv, dtype), row, row,
        room(z.groups, ROWS, D, dtype), room(z.groups, ROWS, Dv, dtype),
        _signal(z.stages, 2), _signal(z.stages, 2), _signal(z.stages, z.groups),
        _signal(z.groups, 2), _signal(z.groups),
    )  # fmt: skip
    operands = do, q, k, v, lse, delta
    return _call(kernel, "flash_dkv", lists, operands, (k, v), scratch, z.groups, tasks.blocks)


def _run_queries(z, cores, lists, do, q, k, v, lse, delta):
    """dq: blocks of queries stay, keys pass, from the last to the first."""
    high = ROWS * z.groups
    B = q.shape[0]
    tasks = Tasks.make(B * z.H, -(-z.L // high), z.hi is not None and z.lo is None, cores)
    D, Dv, dtype = q.shape[3], v.shape[3], q.dtype
    band = Band(z.S, z.lo, z.hi, z.step)

    def kernel(lists_ref, do_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dq_ref, *scratch):
        k_room, v_room, q_room, do_room, lse_room, delta_room, ks, vs, k_free, v_free, held, let_go = scratch
        slot = lambda at: lax.rem(at, jnp.int32(z.stages))
        by_row, whole = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
        wide = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])
        scores = plgpu.ACC((ROWS, z.step), jnp.float32)
        unit = z.scale * LOG2E
        banded = band.edge or z.lo is not None or lists is not None  # the first tile may be cut

        def compute(group):
            query, cotangent = q_room.at[group], do_room.at[group]

            def task(loaded, again, head, t):
                first = t * high
                b, h = lax.div(head, jnp.int32(z.H)), lax.rem(head, jnp.int32(z.H))
                if lists is None:
                    begin, end = band.of_block(first, high)
                    own_begin, own_end = band.ends(first + group * ROWS, ROWS)
                    before, after, n = end - own_end, own_begin - begin, end - begin
                    see = band.sight(first + group * ROWS, own_begin, own_end)
                else:
                    see = listed(lists_ref, h, t)
                    before, after, n = jnp.int32(0), jnp.int32(0), see.n
                first = first + group * ROWS
                plgpu.barrier_wait(held.at[group])
                lse, delta = _row(lse_room.at[group], by_row), _row(delta_room.at[group], by_row)
                hide = lambda y, x: band.hide(y, first, see.key(x), whole, see.none)

                def both(x, acc, ds, masked):
                    """dq of tile x - 1, ds of tile x."""
                    at, last = slot(loaded + before + x), slot(loaded + before + x - 1)
                    plgpu.barrier_wait(ks.at[at])
                    plgpu.barrier_wait(vs.at[at])

                    def products(refs):
                        acc_ref, ds_ref = refs

                        def issue(s, dp):
                            plgpu.wgmma(s, query, transposed(k_room.at[at]))
                            plgpu.wgmma(dp, cotangent, transposed(v_room.at[at]))
                            plgpu.wgmma(acc_ref, ds, k_room.at[last])
                            y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s, wait_n=2))
                            y = y * unit - wide(lse, z.step)
                            p = jnp.exp2(hide(y, x) if masked else y)
                            y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp, wait_n=1))
                            plgpu.barrier_arrive(v_free.at[at])
                            return p * (y - wide(delta, z.step))

                        ds_ref[...] = pl.run_scoped(issue, scores, scores)

                    acc, new = pl.run_state(products)((plgpu.ACC.init(acc), _zeros((ROWS, z.step))))
                    plgpu.barrier_arrive(k_free.at[last])
                    return acc, new.astype(dtype)

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

                def products(s, dp):
                    plgpu.wgmma(s, query, transposed(k_room.at[at]))
                    plgpu.wgmma(dp, cotangent, transposed(v_room.at[at]))
                    return s[...], dp[...]

                s, dp = pl.run_scoped(products, scores, scores)
                plgpu.barrier_arrive(v_free.at[at])
                y = s * unit - wide(lse, z.step)
                p = jnp.exp2(hide(y, jnp.int32(0)) if banded else y)
                carry = _zeros((ROWS, D)), (p * (dp - wide(delta, z.step))).astype(dtype)
                start = jnp.int32(1)
                if z.hi is not None or lists is not None:
                    carry = lax.fori_loop(start, see.hidden, lambda x, c: both(x, *c, True), carry)
                    start = jnp.maximum(see.hidden, 1)
                stop = see.n if z.lo is None else jnp.maximum(see.clear, start)
                carry = lax.fori_loop(start, stop, lambda x, c: both(x, *c, False), carry)
                if z.lo is not None:
                    carry = lax.fori_loop(stop, see.n, lambda x, c: both(x, *c, True), carry)
                acc, ds = carry
                at = slot(loaded + before + see.n - 1)
                final = lambda acc_ref: plgpu.wgmma(acc_ref, ds, k_room.at[at])
                acc = pl.run_state(final)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(k_free.at[at])
                if z.lo is not None:
                    pl.loop(n - after, n)(skip)
                query[...] = (acc * z.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query, z.cut(dq_ref, b, h, first, ROWS))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(let_go.at[group])
                return loaded + n

            tasks.each(lax.axis_index("block"), task)
            plgpu.wait_smem_to_gmem(0)

        def load():
            def task(loaded, again, head, t):
                first = t * high
                b, h = lax.div(head, jnp.int32(z.H)), lax.rem(head, jnp.int32(z.H))
                key_head = lax.div(h, jnp.int32(z.G))
                if lists is None:
                    see = band.sight(first, *band.of_block(first, high))
                else:
                    see = listed(lists_ref, h, t)
                for g in range(z.groups):

                    @pl.when(again)
                    def _(g=g):
                        plgpu.barrier_wait(let_go.at[g])

                    at = first + g * ROWS
                    plgpu.copy_gmem_to_smem(z.cut(q_ref, b, h, at, ROWS), q_room.at[g], held.at[g])
                    plgpu.copy_gmem_to_smem(z.cut(do_ref, b, h, at, ROWS), do_room.at[g], held.at[g])
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, h, pl.ds(at, ROWS)], lse_room.at[g], held.at[g])
                    plgpu.copy_gmem_to_smem(delta_ref.at[b, h, pl.ds(at, ROWS)], delta_room.at[g], held.at[g])

                @pl.loop(jnp.int32(0), see.n)
                def _(x):
                    to, key = slot(loaded + x), see.key(x) * z.step
                    for ref, to_room, full, free in (
                        (k_ref, k_room, ks, k_free),
                        (v_ref, v_room, vs, v_free),
                    ):

                        @pl.when(loaded + x >= z.stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[to])

                        plgpu.copy_gmem_to_smem(
                            z.cut(ref, b, key_head, key, z.step), to_room.at[to], full.at[to]
                        )

                return loaded + see.n

            tasks.each(lax.axis_index("block"), task)

        _roles(z.groups, compute, load)

    row = plgpu.SMEM((z.groups, ROWS), jnp.float32)
    scratch = (
        room(z.stages, z.step, D, dtype), room(z.stages, z.step, Dv, dtype),
        room(z.groups, ROWS, D, dtype), room(z.groups, ROWS, Dv, dtype), row, row,
        _signal(z.stages), _signal(z.stages), _signal(z.stages, z.groups), _signal(z.stages, z.groups),
        _signal(z.groups, 4), _signal(z.groups),
    )  # fmt: skip
    operands = do, q, k, v, lse, delta
    return _call(kernel, "flash_dq", lists, operands, (q,), scratch, z.groups, tasks.blocks)[0]
