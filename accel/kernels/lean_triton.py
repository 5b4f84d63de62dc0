"""Lean Attention in Pallas for GPUs (Triton): a launch of equal runs of key tiles, and a small one to merge.

A worker walks its segments of the line of tiles and leaves each one's state of the running softmax in that
segment's slot; then a program for every row of an output merges the states of its segments. Scores,
statistics and sums are float32 in registers; exponentials are taken to base 2. Keys beyond a length are never
read.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call
from accel.blocks.softmax import shift

LOG2E = 1.4426950408889634
LEAST = 16  # sides of a product of matrices
STEP_BYTES = 32 * 1024  # keys and values a worker takes at once: three such steps are in flight
PARTS = 32  # states merged at once


def _kernel(
    run_ref,
    at_ref,
    lo_ref,
    hi_ref,
    end_ref,
    q_ref,
    k_ref,
    v_ref,
    m_ref,
    l_ref,
    acc_ref,
    *,
    scale,
    block_n,
    step,
):
    """run_ref [G + 1]: worker g does segments run[g]..run[g + 1]; at_ref, lo_ref, hi_ref, end_ref [n]: their
    outputs, tiles and keys that may be seen; q_ref [O, R, D], k_ref [O, S, D], v_ref [O, S, Dv] -> m_ref,
    l_ref [n, R] (m to base 2), acc_ref [n, R, Dv]. A tile of block_n keys is taken in steps of `step`.
    """
    g = pl.program_id(0)

    def segment(i, none):
        at, end = at_ref[i], end_ref[i]
        q = q_ref[at, :, :]

        def some(j, carry):
            m, l, acc = carry
            keys = pl.ds(j * step, step)
            seen = (j * step + lax.broadcasted_iota(jnp.int32, (step, 1), 0)) < end
            load = lambda ref: plgpu.load(
                ref.at[at, keys, :], mask=jnp.broadcast_to(seen, (step, ref.shape[2])), other=0.0
            )
            s = _dot(q, load(k_ref).T) * (scale * LOG2E)
            col = j * step + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(col < end, s, -jnp.inf)
            v = load(v_ref)
            m_new = jnp.maximum(m, jnp.max(s, axis=1))
            top = shift(m_new)
            p, fix = jnp.exp2(s - top[:, None]), jnp.exp2(m - top)
            return m_new, fix * l + jnp.sum(p, axis=1), fix[:, None] * acc + _dot(p.astype(v.dtype), v)

        R, Dv = acc_ref.shape[1:]
        init = (
            jnp.full((R,), -jnp.inf, jnp.float32),
            jnp.zeros((R,), jnp.float32),
            jnp.zeros((R, Dv), jnp.float32),
        )
        each = block_n // step
        stop = jnp.minimum(hi_ref[i] * each, (end + step - 1) // step)
        m, l, acc = lax.fori_loop(lo_ref[i] * each, stop, some, init)
        m_ref[i, :], l_ref[i, :], acc_ref[i, :, :] = m, l, acc
        return none

    lax.fori_loop(run_ref[g], run_ref[g + 1], segment, jnp.int32(0))


def _merge_kernel(first_ref, at_ref, m_ref, l_ref, acc_ref, o_ref, lse_ref):
    """Row r of output w: the states first[w]..first[w + 1] of m_ref, l_ref [n, R], acc_ref [n, R, Dv], merged
    and divided, at o_ref [O, R, Dv], lse_ref [O, R].
    """
    w, r = pl.program_id(0), pl.program_id(1)
    _merge(first_ref[w], first_ref[w + 1], at_ref[w], r, m_ref, l_ref, acc_ref, o_ref, lse_ref, PARTS)


def _merge_slots_kernel(*refs, plan, block_n, each, parts):
    """The same for output `at` in memory, whose slots a plan of lean_hopper.py knows, `each` states a slot
    and `parts` at a time.
    """
    at, r = pl.program_id(0), pl.program_id(1)
    item = lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(plan.batch),), 0)
    if plan.full is None:
        lengths_ref, *refs = refs
        lengths = plgpu.load(lengths_ref.at[jnp.minimum(item, plan.batch - 1)])
    else:
        lengths = jnp.full(item.shape, plan.full, jnp.int32)
    tiles = jnp.where(item < plan.batch, (lengths + (block_n - 1)) // block_n, 0)
    start, stop = plan.slots_of(at, tiles)
    _merge(start * each, stop * each, at, r, *refs, parts)


def _merge(start, stop, at, r, m_ref, l_ref, acc_ref, o_ref, lse_ref, parts):
    """Row r of output `at`: the states start..stop, `parts` at a time."""

    def some(j, carry):
        m, l, acc = carry
        i = pl.ds(start + j * parts, parts)
        mine = start + j * parts + lax.broadcasted_iota(jnp.int32, (parts,), 0) < stop
        wide = jnp.broadcast_to(mine[:, None], (parts, acc_ref.shape[2]))
        sums = plgpu.load(acc_ref.at[i, r, :], mask=wide, other=0.0)  # all on their way at once
        part, each_l = (plgpu.load(ref.at[i, r], mask=mine, other=0.0) for ref in (m_ref, l_ref))
        part = jnp.where(mine, part, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(part))
        top = shift(m_new)
        fix, old = jnp.exp2(part - top), jnp.exp2(m - top)
        l = old * l + jnp.sum(fix * each_l)
        return m_new, l, old * acc + jnp.sum(fix[:, None] * sums, axis=0)

    init = jnp.float32(-jnp.inf), jnp.float32(0), jnp.zeros(acc_ref.shape[2], jnp.float32)
    m, l, acc = lax.fori_loop(0, (stop - start + parts - 1) // parts, some, init)
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    o_ref[at, r, :] = (acc / l).astype(o_ref.dtype)
    lse_ref[at, r] = jnp.where(seen, (shift(m) + jnp.log2(l)) / LOG2E, -jnp.inf)


def _dot(a, b):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # float32 is not TF32 here
    return lax.dot(a, b, precision=precise, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames=("scale", "block_n", "interpret"))
def partial_states(run, at, lo, hi, end, q, k, v, *, scale, block_n, interpret=False):
    """(m, l [n, R'], acc [n, R', Dv']) of n segments, m to base 2; an empty segment is the identity.

    Args: run int32 [G + 1], at, lo, hi, end int32 [n]; q [O, R, D], k [O, S, D], v [O, S, Dv], bfloat16,
      float16 or float32. block_n: a power of two, at least 16. R', D', Dv': the next power of two from 16.
    """
    up = lambda n: max(LEAST, pl.next_power_of_2(n))
    (R, D), Dv, n = q.shape[1:], v.shape[2], len(at)
    q = _pad(q, up(R) - R, up(D) - D)
    k, v = _pad(k, 0, up(D) - D), _pad(v, 0, up(Dv) - Dv)
    fits = STEP_BYTES // ((up(D) + up(Dv)) * k.dtype.itemsize)
    step = max(LEAST, min(block_n, 128, 1 << (fits.bit_length() - 1)))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return pallas_call(
        partial(_kernel, scale=scale, block_n=block_n, step=step),
        out_shape=[shape(n, up(R)), shape(n, up(R)), shape(n, up(R), up(Dv))],
        grid=(len(run) - 1,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="lean_segments",
    )(run, at, lo, hi, end, q, k, v)


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def merged(first, at, m, l, acc, *, dtype, interpret=False):
    """(o [O, R, Dv] in dtype, lse [O, R] natural): output w, put at at[w], of states first[w]..first[w + 1].

    Args: first int32 [O + 1], at int32 [O]; m (to base 2), l [n, R], acc [n, R, Dv] float32.
    """
    return _launch(_merge_kernel, len(at), first, at, m, l, acc, dtype=dtype, interpret=interpret)


@partial(jax.jit, static_argnames=("plan", "block_n", "dtype", "each", "parts", "interpret"))
def merged_slots(lengths, m, l, acc, *, plan, block_n, dtype, each=1, parts=None, interpret=False):
    """(o [O, R, Dv] in dtype, lse [O, R] natural) of the states that the kernel for Hopper leaves.

    Args: lengths int32 [B], or None if the plan knows; m (to base 2), l [n, R], acc [n, R, Dv] float32,
      `each` of them a slot of the plan, of tiles of block_n keys; parts: states merged at a time.
    """
    outputs = plan.batch * plan.heads
    if parts is None:  # what there is, if outputs are equally long
        parts = min(64, max(16, pl.next_power_of_2((-(-plan.slots // outputs)) * each)))
    kernel = partial(_merge_slots_kernel, plan=plan, block_n=block_n, each=each, parts=parts)
    known = () if lengths is None else (lengths,)
    return _launch(kernel, outputs, *known, m, l, acc, dtype=dtype, interpret=interpret)


def _launch(kernel, outputs, *args, dtype, interpret):
    """(o [O, R, Dv] in dtype, lse [O, R]) of a program for every row of every output; args end with acc."""
    R, Dv = args[-1].shape[1:]
    shape = lambda dtype, *s: jax.ShapeDtypeStruct((outputs, R, *s), dtype)
    return pallas_call(
        kernel,
        out_shape=[shape(dtype, Dv), shape(jnp.float32)],
        grid=(outputs, R),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="lean_merge",
    )(*args)


def _pad(x, rows, columns):
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns))) if rows or columns else x
