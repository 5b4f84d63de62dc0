"""The int8 product of LLM.int8() in one Pallas kernel for GPUs (Triton), scales and outlier columns fused.

int32 sums stay in registers; scales, bias and the product of the gathered float columns are applied before
the one write of the float32 result.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call

ROWS = (((1,), (1,)), ((), ()))


def _kernel(x_ref, w_ref, x_scale_ref, w_scale_ref, bias_ref, *rest, block_k):
    """x_ref [block_t, K'], w_ref [block_n, K'] int8; scales [block_t], [block_n] hold absmax / 127; then, if
    there are outliers, x_o [block_t, R'] and w_o [block_n, R']; y_ref [block_t, block_n].
    """
    *strip, y_ref = rest

    def step(j, acc):
        at = pl.ds(j * block_k, block_k)
        return acc + jax.lax.dot_general(x_ref[:, at], w_ref[:, at], ROWS, preferred_element_type=jnp.int32)

    acc = jax.lax.fori_loop(0, x_ref.shape[1] // block_k, step, jnp.zeros(y_ref.shape, jnp.int32))
    y = acc.astype(jnp.float32) * (x_scale_ref[...][:, None] * w_scale_ref[...][None, :])
    y = y + bias_ref[...][None, :]
    if strip:
        x_o, w_o = strip
        y = y + jax.lax.dot_general(
            x_o[...],
            w_o[...],
            ROWS,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    y_ref[...] = y


@partial(jax.jit, static_argnames=("block_t", "block_n", "block_k", "interpret"))
def int8_product(
    x_q,
    w_q,
    x_absmax,
    w_absmax,
    bias=None,
    strip=None,
    *,
    block_t=64,
    block_n=64,
    block_k=128,
    interpret=False,
):
    """x_q w_q^T x_absmax w_absmax / 127^2 + bias + x_o w_o^T, float32 [T, N].

    Args: x_q [T, K], w_q [N, K] int8; strip: (x_o [T, R], w_o [N, R]) or None. Tiles are powers of two:
      block_t and block_n at least 16, block_k at least 32 (an int8 step of the tensor cores).
    """
    for name, size, least in (("block_t", block_t, 16), ("block_n", block_n, 16), ("block_k", block_k, 32)):
        if size < least or size & (size - 1):
            raise ValueError(f"{name} must be a power of two, at least {least}, got {size}")
    (T, K), N = x_q.shape, w_q.shape[0]
    tall, broad = -T % block_t, -N % block_n
    pad = lambda a, *by: jnp.pad(a, [(0, n) for n in by])
    bias = jnp.zeros(N, jnp.float32) if bias is None else bias.astype(jnp.float32)
    scale = lambda a, by: pad(a.astype(jnp.float32) / 127, by)
    inputs = [
        pad(x_q, tall, -K % block_k), pad(w_q, broad, -K % block_k), scale(x_absmax, tall),
        scale(w_absmax, broad), pad(bias, broad),
    ]  # fmt: skip
    width = inputs[0].shape[1]
    specs = [
        pl.BlockSpec((block_t, width), lambda i, j: (i, 0)),
        pl.BlockSpec((block_n, width), lambda i, j: (j, 0)),
        pl.BlockSpec((block_t,), lambda i, j: (i,)),
        pl.BlockSpec((block_n,), lambda i, j: (j,)),
        pl.BlockSpec((block_n,), lambda i, j: (j,)),
    ]
    if strip is not None:
        R = strip[0].shape[1]
        more = max(16, pl.next_power_of_2(R)) - R
        inputs += [
            pad(strip[0].astype(jnp.float32), tall, more),
            pad(strip[1].astype(jnp.float32), broad, more),
        ]
        specs += [
            pl.BlockSpec((block_t, R + more), lambda i, j: (i, 0)),
            pl.BlockSpec((block_n, R + more), lambda i, j: (j, 0)),
        ]
    return pallas_call(
        partial(_kernel, block_k=block_k),
        out_shape=jax.ShapeDtypeStruct((T + tall, N + broad), jnp.float32),
        grid=((T + tall) // block_t, (N + broad) // block_n),
        in_specs=specs,
        out_specs=pl.BlockSpec((block_t, block_n), lambda i, j: (i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="llm_int8_product",
    )(*inputs)[:T, :N]
