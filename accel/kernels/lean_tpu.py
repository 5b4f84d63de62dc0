"""Lean Attention in Pallas for TPUs: a program a segment of the line of key tiles, partial states out.

The grid is (segments, most tiles of one); a segment's place comes from prefetched scalars. Beyond its last
tile a program's index is held there, so that nothing more is fetched, and nothing is computed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call
from accel.blocks.softmax import shift

LANES, ROWS = 128, 8


def _kernel(
    out_ref, lo_ref, hi_ref, end_ref, q_ref, k_ref, v_ref, m_ref, l_ref, acc_ref, m, l, acc, *, scale, block_n
):
    """q_ref [R, D], k_ref [block_n, D], v_ref [block_n, Dv] of one tile -> m_ref, l_ref [R, LANES], acc_ref
    [R, Dv]; m, l, acc: the state of the segment so far, in vector memory.
    """
    i, j = pl.program_id(0), pl.program_id(1)
    at = lo_ref[i] + j

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full(m.shape, -jnp.inf, jnp.float32)
        l[...] = jnp.zeros(l.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(at < hi_ref[i])
    def _():
        s = _dot(q_ref[...], k_ref[...], ((1,), (1,))) * scale
        col = at * block_n + lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s = jnp.where(col < end_ref[i], s, -jnp.inf)
        row = at * block_n + lax.broadcasted_iota(jnp.int32, (block_n, 1), 0)
        v = v_ref[...]
        v = jnp.where(row < end_ref[i], v, jnp.zeros((), v.dtype))  # 0 * NaN in padding would be NaN
        m_new = jnp.maximum(m[...], jnp.max(s, axis=1, keepdims=True))
        top = shift(m_new)
        p, fix = jnp.exp(s - top[:, :1]), jnp.exp(m[...] - top)
        l[...] = fix * l[...] + jnp.sum(p, axis=1, keepdims=True)
        acc[...] = fix[:, :1] * acc[...] + _dot(p.astype(v.dtype), v, ((1,), (0,)))
        m[...] = m_new

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        m_ref[...], l_ref[...], acc_ref[...] = m[...], l[...], acc[...]


def _dot(a, b, contract):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precise, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames=("most", "scale", "block_n", "interpret"))
def partial_states(output, lo, hi, end, q, k, v, *, most, scale, block_n, interpret=False):
    """(m, l [n, R], acc [n, R, Dv]) of n segments; an empty one is the identity.

    Args: output, lo, hi, end int32 [n]; q [O, R, D], k [O, S, D], v [O, S, Dv], bfloat16 or float32; most:
      tiles of the longest segment. block_n: a multiple of 8 (of 128 on a device).
    """
    (R, D), (S, Dv), n = q.shape[1:], v.shape[1:], len(output)
    rows = R + -R % ROWS
    q = jnp.pad(q, ((0, 0), (0, rows - R), (0, 0)))
    last = -(-S // block_n) - 1  # of a cache off the tile it is read in part; the rest is masked
    tile = lambda i, j, out, lo, hi, end: (
        out[i],
        jnp.clip(lo[i] + j, 0, jnp.clip(hi[i] - 1, 0, last)),  # held at the segment's last tile
        0,
    )
    whole = lambda i, j, out, lo, hi, end: (out[i], 0, 0)
    state = lambda i, j, *_: (i, 0, 0)
    shape = lambda width: jax.ShapeDtypeStruct((n, rows, width), jnp.float32)
    m, l, acc = pallas_call(
        partial(_kernel, scale=scale, block_n=block_n),
        out_shape=[shape(LANES), shape(LANES), shape(Dv)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(n, most),
            in_specs=[
                pl.BlockSpec((None, rows, D), whole),
                pl.BlockSpec((None, block_n, D), tile),
                pl.BlockSpec((None, block_n, Dv), tile),
            ],
            out_specs=[pl.BlockSpec((None, rows, width), state) for width in (LANES, LANES, Dv)],
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, Dv)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="lean_segments",
    )(output, lo, hi, end, q, k, v)
    return m[:, :R, 0], l[:, :R, 0], acc[:, :R]
