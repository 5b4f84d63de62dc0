"""Lean Attention in Pallas for GPUs (Triton): one launch of equal runs of key tiles, partial states out.

A worker walks its segments of the line of tiles and leaves each one's state of the running softmax in that
segment's slot. Scores, statistics and sums are float32 in registers; exponentials are taken to base 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.softmax import shift

LOG2E = 1.4426950408889634


def _kernel(
    run_ref, out_ref, lo_ref, hi_ref, end_ref, q_ref, k_ref, v_ref, m_ref, l_ref, acc_ref, *, scale, block_n
):
    """run_ref [G + 1]: worker g does segments run[g]..run[g + 1]; out_ref, lo_ref, hi_ref, end_ref [n]: their
    outputs, tiles and keys that may be seen; q_ref [O, R, D], k_ref [O, S', D], v_ref [O, S', Dv] -> m_ref,
    l_ref [n, R] (m to base 2), acc_ref [n, R, Dv].
    """
    g = pl.program_id(0)

    def segment(i, none):
        at, end = out_ref[i], end_ref[i]
        q = q_ref[at, :, :]

        def tile(j, carry):
            m, l, acc = carry
            keys = pl.ds(j * block_n, block_n)
            s = _dot(q, k_ref[at, keys, :].T) * (scale * LOG2E)
            col = j * block_n + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(col < end, s, -jnp.inf)
            row = j * block_n + lax.broadcasted_iota(jnp.int32, (block_n, 1), 0)
            v = v_ref[at, keys, :]
            v = jnp.where(row < end, v, jnp.zeros((), v.dtype))  # 0 * NaN in padding would be NaN
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
        m, l, acc = lax.fori_loop(lo_ref[i], hi_ref[i], tile, init)
        m_ref[i, :], l_ref[i, :], acc_ref[i, :, :] = m, l, acc
        return none

    lax.fori_loop(run_ref[g], run_ref[g + 1], segment, jnp.int32(0))


def _dot(a, b):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # float32 is not TF32 here
    return lax.dot(a, b, precision=precise, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames=("scale", "block_n", "interpret"))
def partial_states(run, output, lo, hi, end, q, k, v, *, scale, block_n, interpret=False):
    """(m, l [n, R], acc [n, R, Dv]) of n segments, m in natural units; an empty segment is the identity.

    Args: run int32 [G + 1], output, lo, hi, end int32 [n]; q [O, R, D], k [O, S, D], v [O, S, Dv], bfloat16,
      float16 or float32. block_n: a power of two, at least 16.
    """
    up = lambda n: max(16, pl.next_power_of_2(n))
    (R, D), (S, Dv) = q.shape[1:], v.shape[1:]
    q = _pad(q, up(R) - R, up(D) - D)
    k, v = _pad(k, -S % block_n, up(D) - D), _pad(v, -S % block_n, up(Dv) - Dv)
    n = len(output)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    m, l, acc = pl.pallas_call(
        partial(_kernel, scale=scale, block_n=block_n),
        out_shape=[shape(n, up(R)), shape(n, up(R)), shape(n, up(R), up(Dv))],
        grid=(len(run) - 1,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="lean_segments",
    )(run, output, lo, hi, end, q, k, v)
    return m[:, :R] / LOG2E, l[:, :R], acc[:, :R, :Dv]


def _pad(x, rows, columns):
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns))) if rows or columns else x
