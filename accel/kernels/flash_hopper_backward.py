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

from accel.kernels.flash_hopper import LOG2E, ROWS, Tasks, cores_of, pad, room, transposed, up

WIDEST = 128  # two sums of 64 x 128 in float32 fill the registers


@dataclass(frozen=True)
class Sizes:
    """What is static: G query heads a key head, L queries, S keys, the bound hi, and how the work is cut."""

    H: int
    G: int
    L: int
    S: int
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


@partial(jax.jit, static_argnames=("scale", "hi", "rows_first", "cores", "key_sizes", "query_sizes"))
def attend_backward(
    do, q, k, v, lse, delta, *, scale, hi=None, rows_first=False, cores=None, key_sizes=None, query_sizes=None
):
    """(dq, dk, dv) like q, k, v for the cotangent do of o, operands as in `flash_hopper.attend`.

    Args: lse [B, H, L] float32, inf for rows that saw nothing; delta [B, H, L] float32, rowsum(do * o) less
        the cotangent of lse.
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
    sizes = partial(Sizes, H, H // Hkv, L, S, hi, scale, rows_first)
    cores = cores or cores_of()
    operands = do, q, k, v, lse, delta
    fit = lambda n: (_groups(n, max(q.shape[3], v.shape[3])), 64, 4)
    dk, dv = _run_keys(sizes(*(key_sizes or fit(S))), cores, *operands)
    dq = _run_queries(sizes(*(query_sizes or fit(L))), cores, *operands)
    trim = lambda x, n, d: lax.slice_in_dim(lax.slice_in_dim(x, 0, n, axis=rows), 0, d, axis=3)
    return trim(dq, L, D), trim(dk, S, D), trim(dv, S, Dv)


def _groups(n, wide):
    """Warpgroups that compute: three where their registers suffice and no more than a seventh is padding."""
    return 3 if wide <= 64 and up(n, 3 * ROWS) <= 1.15 * up(n, 2 * ROWS) else 2


def _call(kernel, name, operands, outputs, scratch, groups, blocks):
    return plgpu.kernel(
        kernel,
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
    )(*operands)


def _signal(n, arrivals=1):
    return plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)


def _roles(groups, compute, load):
    """The first groups compute, the last one loads."""
    group = lax.axis_index("group")

    @pl.when(group < groups)
    def _():
        plgpu.set_max_registers({2: 240, 3: 160}[groups], action="increase")
        compute(group)

    @pl.when(group == groups)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        load()


def _row(ref, layout):
    """A vector in shared memory, spread as a layout wants it."""
    index = inspect.signature(plgpu.load).parameters.get("idx")  # JAX 0.10 asks for one
    index = ((),) if index is not None and index.default is index.empty else ()
    return plgpu.load(ref, *index, layout=layout)


def _zeros(shape, layout=None):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout or plgpu.Layout.WGMMA)


def _run_keys(z, cores, do, q, k, v, lse, delta):
    """(dk, dv): blocks of keys stay, queries pass."""
    high = ROWS * z.groups
    B, Hkv = k.shape[0], z.H // z.G
    tasks = Tasks.make(B * Hkv, -(-z.S // high), z.hi is not None, cores)
    D, Dv, dtype = q.shape[3], v.shape[3], q.dtype
    count = -(-z.L // z.step)  # tiles of queries a head

    def span(t):
        """The first key of a block and the first tile of queries that sees one of its keys."""
        first = (tasks.tall - 1 - t) * high
        start = (
            jnp.int32(0)
            if z.hi is None
            else jnp.clip(lax.div(jnp.maximum(first - z.hi, 0), jnp.int32(z.step)), 0, count)
        )
        return first, start

    def kernel(do_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dk_ref, dv_ref, *scratch):
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
                            x = jnp.where(row - col <= query + z.hi - first, x, -jnp.inf)
                        p = jnp.exp2(x)
                        plgpu.wgmma(dv_ref, p.astype(dtype), do_room.at[s_at])
                        y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp, wait_n=1))
                        ds = p * (y - across(_row(delta_room.at[s_at], by_column)))
                        plgpu.wgmma(dk_ref, ds.astype(dtype), q_room.at[s_at])

                    pl.run_scoped(issue, scores, scores)

                dk, dv = pl.run_state(products)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
                plgpu.barrier_arrive(free.at[s_at])
                return dk, dv

            def task(loaded, again, head, t):
                first, start = span(t)
                first = first + group * ROWS
                b, h = lax.div(head, jnp.int32(Hkv)), lax.rem(head, jnp.int32(Hkv))
                plgpu.barrier_wait(held.at[group])
                if z.hi is None:
                    own = clear = start
                else:
                    own = jnp.clip(lax.div(jnp.maximum(first - z.hi, 0), jnp.int32(z.step)), start, count)
                    clear = lax.div(
                        jnp.maximum(first + (ROWS - 1) - z.hi, 0) + (z.step - 1), jnp.int32(z.step)
                    )
                    clear = jnp.clip(clear, own, count)

                def over(g, carry):
                    base = loaded + g * (count - start) - start

                    @pl.loop(start, own)
                    def _(i):
                        at = slot(base + i)
                        plgpu.barrier_wait(seen_q.at[at])
                        plgpu.barrier_wait(seen_do.at[at])
                        plgpu.barrier_arrive(free.at[at])

                    move = lambda masked: lambda i, c: step(base + i, i * z.step, first, *c, masked)
                    if z.hi is not None:
                        carry = lax.fori_loop(own, clear, move(True), carry)
                    return lax.fori_loop(clear, jnp.int32(count), move(False), carry)

                dk, dv = lax.fori_loop(
                    jnp.int32(0), jnp.int32(z.G), over, (_zeros((ROWS, D)), _zeros((ROWS, Dv)))
                )
                key[...] = (dk * z.scale).astype(dtype)
                value[...] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(key, z.cut(dk_ref, b, h, first, ROWS))
                plgpu.copy_smem_to_gmem(value, z.cut(dv_ref, b, h, first, ROWS))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(let_go.at[group])
                return loaded + z.G * (count - start)

            tasks.each(lax.axis_index("block"), task)
            plgpu.wait_smem_to_gmem(0)

        def load():
            def task(loaded, again, head, t):
                first, start = span(t)
                b, h = lax.div(head, jnp.int32(Hkv)), lax.rem(head, jnp.int32(Hkv))
                for g in range(z.groups):

                    @pl.when(again)
                    def _(g=g):
                        plgpu.barrier_wait(let_go.at[g])

                    for x, to in ((k_ref, k_room), (v_ref, v_room)):
                        plgpu.copy_gmem_to_smem(z.cut(x, b, h, first + g * ROWS, ROWS), to.at[g], held.at[g])

                def over(g, _):
                    @pl.loop(start, jnp.int32(count))
                    def _(i):
                        at = loaded + g * (count - start) + i - start
                        to = slot(at)

                        @pl.when(at >= z.stages)
                        def _():
                            plgpu.barrier_wait(free.at[to])

                        head = h * z.G + g
                        tile = pl.ds(i * z.step, z.step)
                        plgpu.copy_gmem_to_smem(
                            z.cut(q_ref, b, head, i * z.step, z.step), q_room.at[to], seen_q.at[to]
                        )
                        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, tile], lse_room.at[to], seen_q.at[to])
                        plgpu.copy_gmem_to_smem(
                            z.cut(do_ref, b, head, i * z.step, z.step), do_room.at[to], seen_do.at[to]
                        )
                        plgpu.copy_gmem_to_smem(
                            delta_ref.at[b, head, tile], delta_room.at[to], seen_do.at[to]
                        )

                lax.fori_loop(jnp.int32(0), jnp.int32(z.G), over, None)
                return loaded + z.G * (count - start)

            tasks.each(lax.axis_index("block"), task)

        _roles(z.groups, compute, load)

    row = plgpu.SMEM((z.stages, z.step), jnp.float32)
    scratch = (
        room(z.stages, z.step, D, dtype), room(z.stages, z.step, Dv, dtype), row, row,
        room(z.groups, ROWS, D, dtype), room(z.groups, ROWS, Dv, dtype),
        _signal(z.stages, 2), _signal(z.stages, 2), _signal(z.stages, z.groups),
        _signal(z.groups, 2), _signal(z.groups),
    )  # fmt: skip
    return _call(kernel, "flash_dkv", (do, q, k, v, lse, delta), (k, v), scratch, z.groups, tasks.blocks)


def _run_queries(z, cores, do, q, k, v, lse, delta):
    """dq: blocks of queries stay, keys pass, from the last to the first."""
    high = ROWS * z.groups
    B = q.shape[0]
    tasks = Tasks.make(B * z.H, -(-z.L // high), z.hi is not None, cores)
    D, Dv, dtype = q.shape[3], v.shape[3], q.dtype
    count = -(-z.S // z.step)
    until = lambda end: lax.div(jnp.maximum(end, 0) + (z.step - 1), jnp.int32(z.step))

    def span(t):
        """The first query of a block and the key tiles that its queries see, at least one."""
        first = t * high
        return first, jnp.int32(count) if z.hi is None else jnp.clip(until(first + high + z.hi), 1, count)

    def kernel(do_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dq_ref, *scratch):
        k_room, v_room, q_room, do_room, lse_room, delta_room, ks, vs, k_free, v_free, held, let_go = scratch
        slot = lambda at: lax.rem(at, jnp.int32(z.stages))
        by_row, whole = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
        wide = lambda x, n: lax.broadcast_in_dim(x, (ROWS, n), [0])
        scores = plgpu.ACC((ROWS, z.step), jnp.float32)
        unit = z.scale * LOG2E

        def compute(group):
            query, cotangent = q_room.at[group], do_room.at[group]

            def task(loaded, again, head, t):
                first, n = span(t)
                first = first + group * ROWS
                b, h = lax.div(head, jnp.int32(z.H)), lax.rem(head, jnp.int32(z.H))
                plgpu.barrier_wait(held.at[group])
                lse, delta = _row(lse_room.at[group], by_row), _row(delta_room.at[group], by_row)
                own = n if z.hi is None else jnp.clip(until(first + ROWS + z.hi), 1, n)

                def hide(x, j):
                    last = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row)
                    last = (
                        last * 0 + (z.S - 1) if z.hi is None else jnp.minimum(last + (first + z.hi), z.S - 1)
                    )
                    cols = plgpu.broadcasted_iota(jnp.int32, (ROWS, z.step), 1, layout=whole)
                    return jnp.where(cols <= wide(last - j * z.step, z.step), x, -jnp.inf)

                def both(x, acc, ds, masked):
                    """dq of tile x - 1, ds of tile x."""
                    at, last = slot(loaded + x), slot(loaded + x - 1)
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
                            p = jnp.exp2(hide(y, n - 1 - x) if masked else y)
                            y = lax.optimization_barrier(plgpu.wgmma_accumulator_load(dp, wait_n=1))
                            plgpu.barrier_arrive(v_free.at[at])
                            return p * (y - wide(delta, z.step))

                        ds_ref[...] = pl.run_scoped(issue, scores, scores)

                    acc, new = pl.run_state(products)((plgpu.ACC.init(acc), _zeros((ROWS, z.step))))
                    plgpu.barrier_arrive(k_free.at[last])
                    return acc, new.astype(dtype)

                @pl.loop(jnp.int32(0), n - own)
                def _(x):
                    at = slot(loaded + x)
                    plgpu.barrier_wait(ks.at[at])
                    plgpu.barrier_arrive(k_free.at[at])
                    plgpu.barrier_wait(vs.at[at])
                    plgpu.barrier_arrive(v_free.at[at])

                edge = z.hi is not None or z.S % z.step != 0
                at = slot(loaded + n - own)
                plgpu.barrier_wait(ks.at[at])
                plgpu.barrier_wait(vs.at[at])

                def begin(s, dp):
                    plgpu.wgmma(s, query, transposed(k_room.at[at]))
                    plgpu.wgmma(dp, cotangent, transposed(v_room.at[at]))
                    return s[...], dp[...]

                s, dp = pl.run_scoped(begin, scores, scores)
                plgpu.barrier_arrive(v_free.at[at])
                y = s * unit - wide(lse, z.step)
                p = jnp.exp2(hide(y, own - 1) if edge else y)
                carry = _zeros((ROWS, D)), (p * (dp - wide(delta, z.step))).astype(dtype)
                start = n - own + 1
                if z.hi is not None:
                    full = lax.div(jnp.clip(first + z.hi + 1, 0, z.S), jnp.int32(z.step))
                    stop = jnp.clip(n - full, start, n)
                    carry = lax.fori_loop(start, stop, lambda x, c: both(x, *c, True), carry)
                    start = stop
                acc, ds = lax.fori_loop(start, n, lambda x, c: both(x, *c, False), carry)
                at = slot(loaded + n - 1)
                end = lambda acc_ref: plgpu.wgmma(acc_ref, ds, k_room.at[at])
                acc = pl.run_state(end)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(k_free.at[at])
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
                first, n = span(t)
                b, h = lax.div(head, jnp.int32(z.H)), lax.rem(head, jnp.int32(z.H))
                key_head = lax.div(h, jnp.int32(z.G))
                for g in range(z.groups):

                    @pl.when(again)
                    def _(g=g):
                        plgpu.barrier_wait(let_go.at[g])

                    at = first + g * ROWS
                    plgpu.copy_gmem_to_smem(z.cut(q_ref, b, h, at, ROWS), q_room.at[g], held.at[g])
                    plgpu.copy_gmem_to_smem(z.cut(do_ref, b, h, at, ROWS), do_room.at[g], held.at[g])
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, h, pl.ds(at, ROWS)], lse_room.at[g], held.at[g])
                    plgpu.copy_gmem_to_smem(delta_ref.at[b, h, pl.ds(at, ROWS)], delta_room.at[g], held.at[g])

                @pl.loop(jnp.int32(0), n)
                def _(x):
                    to = slot(loaded + x)
                    for ref, to_room, full, free in (
                        (k_ref, k_room, ks, k_free),
                        (v_ref, v_room, vs, v_free),
                    ):

                        @pl.when(loaded + x >= z.stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[to])

                        plgpu.copy_gmem_to_smem(
                            z.cut(ref, b, key_head, (n - 1 - x) * z.step, z.step), to_room.at[to], full.at[to]
                        )

                return loaded + n

            tasks.each(lax.axis_index("block"), task)

        _roles(z.groups, compute, load)

    row = plgpu.SMEM((z.groups, ROWS), jnp.float32)
    scratch = (
        room(z.stages, z.step, D, dtype), room(z.stages, z.step, Dv, dtype),
        room(z.groups, ROWS, D, dtype), room(z.groups, ROWS, Dv, dtype), row, row,
        _signal(z.stages), _signal(z.stages), _signal(z.stages, z.groups), _signal(z.stages, z.groups),
        _signal(z.groups, 4), _signal(z.groups),
    )  # fmt: skip
    return _call(kernel, "flash_dq", (do, q, k, v, lse, delta), (q,), scratch, z.groups, tasks.blocks)[0]
