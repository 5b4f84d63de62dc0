"""Edge-MoE's linear layer over queues of experts, a grouped matrix product, in Pallas for GPUs (Triton).

Rows stand by expert, each expert's cut into tiles of block_t; whose a tile is, and whether it has a row, is
read in the kernel, so that queues of any length run in one compiled program. Weights are neither gathered nor
copied: a program reads its expert's where they lie.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call

STATIC = ("turned", "block_t", "block_n", "block_k", "interpret")
UNIT = 16  # rows and columns of the smallest product on tensor cores


def _dot(a, b, contract):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # float32 is not TF32 here
    return lax.dot_general(a, b, (contract, ((), ())), precision=precise, preferred_element_type=jnp.float32)


def _linear_kernel(expert_ref, real_ref, x_ref, w_ref, *rest, turned, block_n, block_k):
    """expert_ref, real_ref [T]; x_ref [block_t, K'] of this tile, w_ref [E, N', K'] ([E, K', N'] if turned),
    then b_ref [E, N'] if there is a bias, y_ref [block_t, block_n].
    """
    *bias, y_ref = rest
    t, columns = pl.program_id(0), pl.ds(pl.program_id(1) * block_n, block_n)
    e = expert_ref[t]

    def step(i, acc):
        at = pl.ds(i * block_k, block_k)
        if turned:
            return acc + _dot(x_ref[:, at], w_ref[e, at, columns].astype(x_ref.dtype), ((1,), (0,)))
        return acc + _dot(x_ref[:, at], w_ref[e, columns, at].astype(x_ref.dtype), ((1,), (1,)))

    @pl.when(real_ref[t] > 0)
    def _():
        steps = x_ref.shape[1] // block_k
        acc = lax.fori_loop(0, steps, step, jnp.zeros(y_ref.shape, jnp.float32))
        for b_ref in bias:
            acc = acc + b_ref[e, columns].astype(jnp.float32)[None, :]
        y_ref[...] = acc.astype(y_ref.dtype)

    @pl.when(real_ref[t] <= 0)
    def _():  # nobody reads it, but it must not be NaN
        y_ref[...] = jnp.zeros_like(y_ref)


def _outer_kernel(first_ref, end_ref, dy_ref, x_ref, dw_ref, *, block_t):
    """Tiles first..end of an expert: dy_ref [R, block_n], x_ref [R, block_k], dw_ref [block_n, block_k]."""
    e = pl.program_id(0)

    def step(t, acc):
        at = pl.ds(t * block_t, block_t)
        return acc + _dot(dy_ref[at, :], x_ref[at, :], ((0,), (0,)))

    acc = lax.fori_loop(first_ref[e], end_ref[e], step, jnp.zeros(dw_ref.shape, jnp.float32))
    dw_ref[...] = acc.astype(dw_ref.dtype)


@partial(jax.jit, static_argnames=STATIC)
def grouped_linear(
    x, w, b, expert, real, *, turned=False, block_t=32, block_n=64, block_k=64, interpret=False
):
    """x_t w_e^T + b_e of every tile t of block_t rows, e its expert: [R, N] in x's dtype, sums in float32.

    Args: x [R, K]; w [E, N, K], or turned [E, K, N]; b [E, N] or None; expert, real int32 [R / block_t]:
      whose a tile is, and its number of rows that count (if none, they become 0). Blocks are powers of two,
      at least 16; block_n and block_k are halved until they divide N and K, padded to 16 if need be.
    """
    check_blocks(block_t, block_n, block_k)
    size = w.shape[2 if turned else 1]
    x, w = _padded(x, 1), _padded(w, 1, 2)
    (R, K), N = x.shape, w.shape[2 if turned else 1]
    n, k = _dividing(N, block_n), _dividing(K, block_k)
    whole = lambda a: pl.BlockSpec(a.shape, lambda t, j: (0,) * a.ndim)
    bias = [] if b is None else [_padded(b, 1)]
    tile = pl.BlockSpec((block_t, K), lambda t, j: (t, 0))
    y = pallas_call(
        partial(_linear_kernel, turned=turned, block_n=n, block_k=k),
        out_shape=jax.ShapeDtypeStruct((R, N), x.dtype),
        grid=(R // block_t, N // n),
        in_specs=[whole(expert), whole(real), tile, whole(w), *map(whole, bias)],
        out_specs=pl.BlockSpec((block_t, n), lambda t, j: (t, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="edge_moe_grouped_linear",
    )(expert, real, x, w, *bias)
    return y[:, :size]


@partial(jax.jit, static_argnames=("block_t", "block_n", "block_k", "interpret"))
def grouped_outer(dy, x, expert, first, end, *, block_t=32, block_n=64, block_k=64, interpret=False):
    """sum over an expert's tiles of dy_t^T x_t: [E, N, K] float32, 0 for an expert without a tile.

    Args: dy [R, N], x [R, K], rows that do not count 0 in dy; first, end int32 [E]: each expert's tiles.
      expert is not read (TPUs need it). Blocks as in `grouped_linear`.
    """
    check_blocks(block_t, block_n, block_k)
    sizes, E = (dy.shape[1], x.shape[1]), len(first)
    dy, x = _padded(dy, 1), _padded(x, 1)
    (R, N), K = dy.shape, x.shape[1]
    n, k = _dividing(N, block_n), _dividing(K, block_k)
    whole = pl.BlockSpec((E,), lambda e, i, j: (0,))
    dw = pallas_call(
        partial(_outer_kernel, block_t=block_t),
        out_shape=jax.ShapeDtypeStruct((E, N, K), jnp.float32),
        grid=(E, N // n, K // k),
        in_specs=[
            whole,
            whole,
            pl.BlockSpec((R, n), lambda e, i, j: (0, i)),
            pl.BlockSpec((R, k), lambda e, i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, n, k), lambda e, i, j: (e, i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="edge_moe_grouped_outer",
    )(first, end, dy, x)
    return dw[:, : sizes[0], : sizes[1]]


def check_blocks(*blocks):
    """Raise ValueError unless block_t, block_n and block_k are powers of two, at least 16."""
    for name, size in zip(("block_t", "block_n", "block_k"), blocks, strict=True):
        if size < UNIT or size & (size - 1):
            raise ValueError(f"{name} must be a power of two, at least {UNIT}, got {size}")


def _padded(a, *axes):
    return jnp.pad(a, [(0, -n % UNIT if i in axes else 0) for i, n in enumerate(a.shape)])


def _dividing(size, block):
    while size % block:
        block //= 2
    return block
