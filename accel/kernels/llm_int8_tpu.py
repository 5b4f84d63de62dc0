"""The int8 product of LLM.int8() in one Pallas kernel for TPUs, scales and outlier columns fused.

The grid walks the terms innermost; int32 sums stay in vector memory until the last step applies scales, bias
and the product of the gathered float columns.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call

ROWS = (((1,), (1,)), ((), ()))


def _kernel(x_ref, w_ref, x_scale_ref, w_scale_ref, bias_ref, *rest):
    """x_ref [block_t, block_k], w_ref [block_n, block_k] int8; scales [block_t, 1], [1, block_n] hold
    absmax / 127; then, if there are outliers, x_o [block_t, R'], w_o [block_n, R']; y_ref, acc_ref
    [block_t, block_n].
    """
    *strip, y_ref, acc_ref = rest
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += jax.lax.dot_general(x_ref[...], w_ref[...], ROWS, preferred_element_type=jnp.int32)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        y = acc_ref[...].astype(jnp.float32) * (x_scale_ref[...] * w_scale_ref[...]) + bias_ref[...]
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
    block_t=128,
    block_n=128,
    block_k=256,
    interpret=False,
):
    """x_q w_q^T x_absmax w_absmax / 127^2 + bias + x_o w_o^T, float32 [T, N].

    Args: x_q [T, K], w_q [N, K] int8; strip: (x_o [T, R], w_o [N, R]) or None. block_t a multiple of 32 (an
      int8 tile), block_n and block_k of 128.
    """
    for name, size, unit in (("block_t", block_t, 32), ("block_n", block_n, 128), ("block_k", block_k, 128)):
        if size < unit or size % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, got {size}")
    (T, K), N = x_q.shape, w_q.shape[0]
    tall, broad, deep = -T % block_t, -N % block_n, -K % block_k
    pad = lambda a, *by: jnp.pad(a, [(0, n) for n in by])
    bias = jnp.zeros(N, jnp.float32) if bias is None else bias.astype(jnp.float32)
    scale = lambda a, by: pad(a.astype(jnp.float32) / 127, by)
    inputs = [
        pad(x_q, tall, deep), pad(w_q, broad, deep), scale(x_absmax, tall)[:, None],
        scale(w_absmax, broad)[None, :], pad(bias, broad)[None, :],
    ]  # fmt: skip
    specs = [
        pl.BlockSpec((block_t, block_k), lambda i, j, k: (i, k)),
        pl.BlockSpec((block_n, block_k), lambda i, j, k: (j, k)),
        pl.BlockSpec((block_t, 1), lambda i, j, k: (i, 0)),
        pl.BlockSpec((1, block_n), lambda i, j, k: (0, j)),
        pl.BlockSpec((1, block_n), lambda i, j, k: (0, j)),
    ]
    if strip is not None:
        more = -strip[0].shape[1] % 128
        inputs += [
            pad(strip[0].astype(jnp.float32), tall, more),
            pad(strip[1].astype(jnp.float32), broad, more),
        ]
        R = inputs[-1].shape[1]
        specs += [
            pl.BlockSpec((block_t, R), lambda i, j, k: (i, 0)),
            pl.BlockSpec((block_n, R), lambda i, j, k: (j, 0)),
        ]
    tiles = (block_t, block_n)
    return pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((T + tall, N + broad), jnp.float32),
        grid=((T + tall) // block_t, (N + broad) // block_n, (K + deep) // block_k),
        in_specs=specs,
        out_specs=pl.BlockSpec(tiles, lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM(tiles, jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="llm_int8_product",
    )(*inputs)[:T, :N]
