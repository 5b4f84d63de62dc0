"""PiToMe's energy in one Pallas kernel for TPUs: normalise, compare, score and average by tiles.

All T tokens are in vector memory (577 x 128 float32 are 0.3 MB); the T x T similarities are never written
out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call


def _kernel(rows_ref, all_ref, energy_ref, *, block, tokens, margin, alpha, paper_form):
    """rows_ref [block, D] of this program, all_ref [T', D], energy_ref [block, 1]; T' is T padded to
    block.
    """
    rows = _unit(rows_ref[...])

    def step(j, total):
        columns = _unit(all_ref[pl.ds(pl.multiple_of(j * block, block), block), :])
        s = jax.lax.dot_general(
            rows,
            columns,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        u = s - margin
        below = alpha * (jnp.exp(u) - 1.0)
        f = jnp.where(u >= 0, s, below) if paper_form else jnp.where(u > 0, u, below)
        at = j * block + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        return total + jnp.sum(jnp.where(at < tokens, f, 0.0), axis=1, keepdims=True)  # padding never votes

    steps = all_ref.shape[0] // block
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((block, 1), jnp.float32))
    energy_ref[...] = total / tokens


def _unit(x):
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)  # so that no square overflows
    x = x / jnp.where(largest == 0, 1.0, largest)
    square = jnp.sum(x * x, axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square == 0, 1.0, square))


@partial(jax.jit, static_argnames=("margin", "alpha", "paper_form", "block", "interpret"))
def energy(metric, *, margin, alpha, paper_form, block=128, interpret=False):
    """Energies [T] of metric [T, D], float32. block: tokens a tile, a multiple of 8."""
    T, D = metric.shape
    if block < 8 or block % 8:
        raise ValueError(f"block must be a multiple of 8, at least 8, got {block}")
    metric = jnp.pad(metric, ((0, -T % block), (0, -D % 128)))
    padded, width = metric.shape
    kernel = partial(_kernel, block=block, tokens=T, margin=margin, alpha=alpha, paper_form=paper_form)
    return pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((padded, 1), jnp.float32),
        grid=(padded // block,),
        in_specs=[
            pl.BlockSpec((block, width), lambda i: (i, 0)),
            pl.BlockSpec((padded, width), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((block, 1), lambda i: (i, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="pitome_energy",
    )(metric, metric)[:T, 0]
