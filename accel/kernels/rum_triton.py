"""The rotational unit's scan with memory in one Pallas kernel for GPUs (Triton): a sequence a program.

The memory A [N, N] and the state stay in registers for all steps; a step reads its rows of r, e and g and the
two recurrent matrices, which a multiprocessor's cache keeps, and writes one row of hidden states.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call
from accel.kernels.rum_step import rum_step


def _kernel(r, e, g, h0, assoc0, w_r, w_u, hidden, assoc, *, step, steps, size):
    """One sequence: r, e, g, hidden [T, n]; h0 [1, n]; assoc0, assoc, w_r, w_u [n, n]."""
    there = jax.lax.broadcasted_iota(jnp.int32, (1, h0.shape[1]), 1) < size

    def body(t, state):
        now = pl.ds(t, 1)
        h, memory = rum_step(step, r[now, :], e[now, :], g[now, :], *state, w_r[...], w_u[...], there)
        hidden[now, :] = h
        return h, memory

    assoc[...] = jax.lax.fori_loop(0, steps, body, (h0[...], assoc0[...]))[1]


@partial(jax.jit, static_argnames=("step", "interpret"))
def scan(r, e, g, h, assoc, w_r, w_u, *, step, interpret=False):
    """(hidden [B, T, N], A [B, N, N]) of r, e, g [B, T, N], h [B, N], assoc [B, N, N], w_r, w_u [N, N]."""
    B, T, N = r.shape
    n = max(16, pl.next_power_of_2(N))
    wide = lambda x, axes: jnp.pad(x, [(0, n - N if a in axes else 0) for a in range(x.ndim)])
    whole = lambda rows: pl.BlockSpec((None, rows, n), lambda b: (b, 0, 0))
    shared = pl.BlockSpec((n, n), lambda b: (0, 0))
    shape = lambda rows: jax.ShapeDtypeStruct((B, rows, n), jnp.float32)
    hidden, assoc = pallas_call(
        partial(_kernel, step=step, steps=T, size=N),
        out_shape=(shape(T), shape(n)),
        grid=(B,),
        in_specs=[whole(T)] * 3 + [whole(1), whole(n), shared, shared],
        out_specs=(whole(T), whole(n)),
        compiler_params=plgpu.CompilerParams(num_warps=4 if n <= 64 else 8, num_stages=1),
        interpret=interpret,
        name="rum_scan",
    )(
        *(wide(x, (2,)) for x in (r, e, g, h[:, None])),
        wide(assoc, (1, 2)),
        wide(w_r, (0, 1)),
        wide(w_u, (0, 1)),
    )
    return hidden[:, :, :N], assoc[:, :N, :N]
