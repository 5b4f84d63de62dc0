"""Mesa's two memory-bound steps in Pallas for TPUs: GELU that also stores its input in few bits, and layer
norm's backward pass straight from the integers. A program owns a strip of rows, all channels at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call


def _gelu_kernel(x_ref, least_ref, scale_ref, *rest, levels):
    """x_ref [block, C']; least_ref, scale_ref [1, C']; u_ref [block, C'] if there is noise -> y, q."""
    *noise, y_ref, q_ref = rest
    x = x_ref[...].astype(jnp.float32)
    y_ref[...] = (0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))).astype(y_ref.dtype)
    v = (x - least_ref[...]) * scale_ref[...]
    v = v + noise[0][...] - 0.5 if noise else v + 0.5 - 0.5  # as ref: the noise, then the half
    q_ref[...] = jnp.minimum(jnp.rint(jnp.maximum(v, 0.0)), levels - 1).astype(jnp.int32).astype(q_ref.dtype)


@partial(jax.jit, static_argnames=("levels", "dtype", "block", "interpret"))
def gelu_quantize(x, least, scale, uniform=None, *, levels, dtype, block=128, interpret=False):
    """(gelu(x), integers): x [T, C], least and scale [C] float32 (scale 0 = a constant group), noise [T, C].

    block: rows a program, a multiple of 32 (a tile of bytes).
    """
    check_block(block)
    T, C = x.shape
    tall, broad = -T % block, -C % 128
    pad = lambda a: jnp.pad(a, ((0, tall), (0, broad)))
    row = lambda a: jnp.pad(a.astype(jnp.float32), (0, broad))[None]
    inputs = [pad(x), row(least), row(scale)]
    shape = (T + tall, C + broad)
    strip, line = (
        pl.BlockSpec((block, shape[1]), lambda i: (i, 0)),
        pl.BlockSpec((1, shape[1]), lambda i: (0, 0)),
    )
    specs = [strip, line, line]
    if uniform is not None:
        inputs.append(pad(uniform.astype(jnp.float32)))
        specs.append(strip)
    y, q = pallas_call(
        partial(_gelu_kernel, levels=levels),
        out_shape=(jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(shape, dtype)),
        grid=(shape[0] // block,),
        in_specs=specs,
        out_specs=(strip, strip),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="mesa_gelu_quantize",
    )(*inputs)
    return y[:T, :C], q[:T, :C]


def _norm_kernel(
    g_ref, q_ref, step_ref, least_ref, mean_ref, rstd_ref, weight_ref, dx_ref, dw_ref, db_ref, *, C
):
    """g_ref, q_ref [block, C']; step_ref, least_ref, weight_ref [1, C']; mean_ref, rstd_ref [block, 1] ->
    dx_ref [block, C']; dw_ref, db_ref [1, C'], added up over the strips. Padded channels have weight 0.
    """

    @pl.when(pl.program_id(0) == 0)
    def _():
        dw_ref[...], db_ref[...] = jnp.zeros_like(dw_ref), jnp.zeros_like(db_ref)

    mean, rstd = mean_ref[...], rstd_ref[...]
    g = g_ref[...].astype(jnp.float32)
    x = q_ref[...].astype(jnp.int32).astype(jnp.float32) * step_ref[...] + least_ref[...]
    gw, xh = g * weight_ref[...], (x - mean) * rstd
    one, two = gw.sum(axis=1, keepdims=True) / C, (gw * xh).sum(axis=1, keepdims=True) / C
    dx_ref[...] = (rstd * (gw - one - xh * two)).astype(dx_ref.dtype)
    dw_ref[...] += (g * xh).sum(axis=0, keepdims=True)
    db_ref[...] += g.sum(axis=0, keepdims=True)


@partial(jax.jit, static_argnames=("block", "interpret"))
def norm_backward(g, q, step, least, mean, rstd, weight, *, block=128, interpret=False):
    """(dx [T, C] in g's dtype, dweight [C], dbias [C] float32) of g [T, C] and integers q [T, C].

    Args: step, least [C]: range / (levels - 1) and minimum of each channel; mean, rstd [T, 1]; weight [C]: in
      float32. block: rows a program, a multiple of 32.
    """
    check_block(block)
    T, C = g.shape
    tall, broad = -T % block, -C % 128
    pad = lambda a: jnp.pad(a, ((0, tall), (0, broad)))
    stat = lambda a: jnp.pad(a.astype(jnp.float32), ((0, tall), (0, 0)))
    row = lambda a: jnp.pad(a.astype(jnp.float32), (0, broad))[None]
    wide = C + broad
    strip, line = pl.BlockSpec((block, wide), lambda i: (i, 0)), pl.BlockSpec((1, wide), lambda i: (0, 0))
    column = pl.BlockSpec((block, 1), lambda i: (i, 0))
    part = jax.ShapeDtypeStruct((1, wide), jnp.float32)
    dx, dw, db = pallas_call(
        partial(_norm_kernel, C=C),
        out_shape=(jax.ShapeDtypeStruct((T + tall, wide), g.dtype), part, part),
        grid=((T + tall) // block,),
        in_specs=[strip, strip, line, line, column, column, line],
        out_specs=(strip, line, line),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="mesa_norm_backward",
    )(pad(g), pad(q), row(step), row(least), stat(mean), stat(rstd), row(weight))
    return dx[:T, :C], dw[0, :C], db[0, :C]


def check_block(block):
    """Raise ValueError unless block is a multiple of 32."""
    if block < 32 or block % 32:
        raise ValueError(f"block must be a multiple of 32, got {block}")
