"""PiToMe's energy in one Pallas kernel for GPUs (Triton): normalise, compare, score and average by tiles.

The T x T similarities stay in registers; what reaches memory is one number a token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call
from accel.blocks.tiles import shared_memory

HELD = 3  # tiles of float32 in shared memory: the rows, and columns of two steps


def _kernel(rows_ref, all_ref, energy_ref, *, block, tokens, margin, alpha, paper_form):
    """rows_ref [block, D] of this program, all_ref [T', D], energy_ref [block]; T' is T padded to block."""
    rows = _unit(rows_ref[...])

    def step(j, total):
        columns = _unit(all_ref[pl.ds(j * block, block), :])
        s = jax.lax.dot_general(
            rows, columns, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        )  # [block, block], in float32 and not TF32: the energies decide an order
        u = s - margin
        below = alpha * (jnp.exp(u) - 1)
        f = jnp.where(u >= 0, s, below) if paper_form else jnp.where(u > 0, u, below)
        at = j * block + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        return total + jnp.sum(jnp.where(at < tokens, f, 0.0), axis=1)  # padding never votes

    total = jax.lax.fori_loop(0, all_ref.shape[0] // block, step, jnp.zeros((block,), jnp.float32))
    energy_ref[...] = total / tokens


def _unit(x):
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)  # so that no square overflows
    x = x / jnp.where(largest == 0, 1.0, largest)
    square = jnp.sum(x * x, axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square == 0, 1.0, square))


@partial(jax.jit, static_argnames=("margin", "alpha", "paper_form", "block", "interpret"))
def energy(metric, *, margin, alpha, paper_form, block=32, interpret=False):
    """Energies [T] of metric [T, D], float32. block: tokens a tile, a power of two, at least 16; fewer where
    that many do not fit.
    """
    T, D = metric.shape
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two, at least 16, got {block}")
    width = max(16, pl.next_power_of_2(D))
    most = shared_memory() // (HELD * width * 4)
    if most < 16:
        raise NotImplementedError(f'impl="triton" has no tiles that fit metrics of D={D}; use impl="xla"')
    block = min(block, 1 << (most.bit_length() - 1))
    metric = jnp.pad(metric, ((0, -T % block), (0, width - D)))
    padded = metric.shape[0]
    kernel = partial(_kernel, block=block, tokens=T, margin=margin, alpha=alpha, paper_form=paper_form)
    return pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((padded,), jnp.float32),
        grid=(padded // block,),
        in_specs=[
            pl.BlockSpec((block, width), lambda i: (i, 0)),
            pl.BlockSpec((padded, width), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((block,), lambda i: (i,)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="pitome_energy",
    )(metric, metric)[:T]
