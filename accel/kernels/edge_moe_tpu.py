"""Edge-MoE's linear layer over queues of experts, a grouped matrix product, in Pallas for TPUs.

Rows stand by expert, each expert's cut into tiles of block_t. Whose a tile is goes to the scalar memory
before the kernel starts, and the index maps read it there: consecutive tiles of one expert keep its weights
in vector memory, which is the paper's order, every expert's weights loaded once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call

LANES, ROWS = 128, 16
STATIC = ("turned", "block_t", "block_n", "block_k", "interpret")


def _dot(a, b, contract):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precise, preferred_element_type=jnp.float32)


def _linear_kernel(expert_ref, real_ref, x_ref, w_ref, *rest, turned):
    """x_ref [block_t, block_k], w_ref [block_n, block_k] ([block_k, block_n] if turned), then b_ref
    [1, block_n] if there is a bias; y_ref, acc_ref [block_t, block_n].
    """
    *bias, y_ref, acc_ref = rest
    t, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(real_ref[t] > 0)
    def _():
        acc_ref[...] += _dot(
            x_ref[...], w_ref[...].astype(x_ref.dtype), ((1,), (0,)) if turned else ((1,), (1,))
        )

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        acc = acc_ref[...]
        for b_ref in bias:
            acc = acc + b_ref[...].astype(jnp.float32)
        y_ref[...] = acc.astype(y_ref.dtype)


def _outer_kernel(expert_ref, dy_ref, x_ref, dw_ref):
    """dy_ref [block_t, block_n], x_ref [block_t, block_k], dw_ref [block_n, block_k] of the tile's expert."""
    t = pl.program_id(2)

    @pl.when((t == 0) | (expert_ref[t] != expert_ref[jnp.maximum(t - 1, 0)]))
    def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)

    dw_ref[...] += _dot(dy_ref[...], x_ref[...], ((0,), (0,)))


@partial(jax.jit, static_argnames=STATIC)
def grouped_linear(
    x, w, b, expert, real, *, turned=False, block_t=32, block_n=256, block_k=512, interpret=False
):
    """x_t w_e^T + b_e of every tile t of block_t rows, e its expert: [R, N] in x's dtype, sums in float32.

    Args: x [R, K]; w [E, N, K], or turned [E, K, N]; b [E, N] or None; expert, real int32 [R / block_t]:
      whose a tile is, and its number of rows that count (if none, they become b_e). block_t a multiple of 16,
      block_n and block_k of 128; an axis of at most a block is one, others are padded to theirs.
    """
    check_blocks(block_t, block_n, block_k)
    N = w.shape[2 if turned else 1]
    n, k = min(block_n, N), min(block_k, x.shape[1])
    x = _padded(x, {1: k})
    w = _padded(w, {1: k, 2: n} if turned else {1: n, 2: k})
    bias = [] if b is None else [_padded(b, {1: n})[:, None]]
    (R, K), wide = x.shape, w.shape[2 if turned else 1]
    weights = (
        pl.BlockSpec((None, k, n), lambda j, t, i, expert, real: (expert[t], i, j))
        if turned
        else pl.BlockSpec((None, n, k), lambda j, t, i, expert, real: (expert[t], j, i))
    )
    of_expert = pl.BlockSpec((None, 1, n), lambda j, t, i, expert, real: (expert[t], 0, j))
    y = pallas_call(
        partial(_linear_kernel, turned=turned),
        out_shape=jax.ShapeDtypeStruct((R, wide), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(wide // n, R // block_t, K // k),
            in_specs=[
                pl.BlockSpec((block_t, k), lambda j, t, i, *_: (t, i)),
                weights,
                *[of_expert] * len(bias),
            ],
            out_specs=pl.BlockSpec((block_t, n), lambda j, t, i, *_: (t, j)),
            scratch_shapes=[pltpu.VMEM((block_t, n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="edge_moe_grouped_linear",
    )(expert, real, x, w, *bias)
    return y[:, :N]


@partial(jax.jit, static_argnames=("block_t", "block_n", "block_k", "interpret"))
def grouped_outer(dy, x, expert, first, end, *, block_t=32, block_n=256, block_k=512, interpret=False):
    """sum over an expert's tiles of dy_t^T x_t: [E, N, K] float32, 0 for an expert without a tile.

    Args: dy [R, N], x [R, K], rows that do not count 0 in dy; expert int32 [R / block_t], ascending; first,
      end int32 [E]: each expert's tiles. Blocks as in `grouped_linear`.
    """
    check_blocks(block_t, block_n, block_k)
    N, K, E = dy.shape[1], x.shape[1], len(first)
    n, k = min(block_n, N), min(block_k, K)
    dy, x = _padded(dy, {1: n}), _padded(x, {1: k})
    (R, high), wide = dy.shape, x.shape[1]
    dw = pallas_call(
        _outer_kernel,
        out_shape=jax.ShapeDtypeStruct((E, high, wide), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(high // n, wide // k, R // block_t),
            in_specs=[
                pl.BlockSpec((block_t, n), lambda i, j, t, expert: (t, i)),
                pl.BlockSpec((block_t, k), lambda i, j, t, expert: (t, j)),
            ],
            out_specs=pl.BlockSpec((None, n, k), lambda i, j, t, expert: (expert[t], i, j)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="edge_moe_grouped_outer",
    )(expert, dy, x)
    # what no tile wrote holds anything
    return jnp.where((end > first)[:, None, None], dw, 0.0)[:, :N, :K]


def check_blocks(block_t, block_n, block_k):
    """Raise ValueError unless block_t is a multiple of 16, block_n and block_k of 128."""
    for name, size, unit in (
        ("block_t", block_t, ROWS),
        ("block_n", block_n, LANES),
        ("block_k", block_k, LANES),
    ):
        if size < unit or size % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, got {size}")


def _padded(a, blocks):
    return jnp.pad(a, [(0, -n % blocks.get(i, 1)) for i, n in enumerate(a.shape)])
