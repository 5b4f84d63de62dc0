"""The rotational unit's scan with memory in one Pallas kernel for TPUs.

The grid walks a sequence in runs of steps; the memory A [N, N] and the state stay in vector memory from run
to run, while the next run's rows of r, e and g are fetched.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call
from accel.kernels.rum_step import rum_step

RUN = 64  # steps


def _kernel(r, e, g, h0, assoc0, w_r, w_u, hidden, assoc, h_now, memory, *, step, steps, size):
    """One run of one sequence: r, e, g, hidden [RUN, n]; h0 [1, n]; assoc0, assoc, w_r, w_u [n, n]; scratch
    h_now [1, n], memory [n, n].
    """
    at = pl.program_id(1)

    @pl.when(at == 0)
    def _():
        h_now[...] = h0[...]
        memory[...] = assoc0[...]

    there = jax.lax.broadcasted_iota(jnp.int32, h_now.shape, 1) < size

    def body(t, _):
        now = pl.ds(t, 1)
        h_now[...], memory[...] = rum_step(
            step, r[now, :], e[now, :], g[now, :], h_now[...], memory[...], w_r[...], w_u[...], there
        )
        hidden[now, :] = h_now[...]
        return 0

    jax.lax.fori_loop(0, jnp.minimum(RUN, steps - at * RUN), body, 0)

    @pl.when(at == pl.num_programs(1) - 1)
    def _():
        assoc[...] = memory[...]


@partial(jax.jit, static_argnames=("step", "interpret"))
def scan(r, e, g, h, assoc, w_r, w_u, *, step, interpret=False):
    """(hidden [B, T, N], A [B, N, N]) of r, e, g [B, T, N], h [B, N], assoc [B, N, N], w_r, w_u [N, N]."""
    B, T, N = r.shape
    n, long = N + -N % 128, T + -T % RUN
    wide = lambda x, *pad: jnp.pad(x, [(0, p) for p in pad])
    rows = pl.BlockSpec((None, RUN, n), lambda b, i: (b, i, 0))
    mine = lambda k: pl.BlockSpec((None, k, n), lambda b, i: (b, 0, 0))
    shared = pl.BlockSpec((n, n), lambda b, i: (0, 0))
    shape = lambda k: jax.ShapeDtypeStruct((B, k, n), jnp.float32)
    hidden, assoc = pallas_call(
        partial(_kernel, step=step, steps=T, size=N),
        out_shape=(shape(long), shape(n)),
        grid=(B, long // RUN),
        in_specs=[rows] * 3 + [mine(1), mine(n), shared, shared],
        out_specs=(rows, mine(n)),
        scratch_shapes=[pltpu.VMEM((1, n), jnp.float32), pltpu.VMEM((n, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="rum_scan",
    )(
        *(wide(x, 0, long - T, n - N) for x in (r, e, g)),
        wide(h[:, None], 0, 0, n - N),
        wide(assoc, 0, n - N, n - N),
        *(wide(w, n - N, n - N) for w in (w_r, w_u)),
    )
    return hidden[:, :T, :N], assoc[:, :N, :N]
