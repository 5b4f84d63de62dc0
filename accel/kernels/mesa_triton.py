"""Mesa's two memory-bound steps in Pallas for GPUs (Triton): GELU that also stores its input in few bits, and
layer norm's backward pass straight from the integers.

A program owns a strip of rows and walks the channels in chunks, so that every array is read from memory once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call


def rint(v):
    """To the nearest integer, ties to even, of v >= 0: the compiler has floor alone."""
    r = jnp.floor(v + 0.5)
    above = r - v
    odd = r - 2 * jnp.floor(r / 2)
    return jnp.where((above > 0.5) | ((above == 0.5) & (odd == 1)), r - 1, r)


def erf(x):
    """Within 1.5e-7: Abramowitz and Stegun 1964, formula 7.1.26. The compiler has no erf."""
    t = 1 / (1 + 0.3275911 * jnp.abs(x))
    p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    value = 1 - p * t * jnp.exp(-x * x)
    return jnp.where(x < 0, -value, value)


def _gelu_kernel(x_ref, least_ref, scale_ref, *rest, levels):
    """x_ref [block, c]; least_ref, scale_ref [1, c]; u_ref [block, c] if there is noise -> y_ref, q_ref."""
    *noise, y_ref, q_ref = rest
    x = x_ref[...].astype(jnp.float32)
    y_ref[...] = (0.5 * x * (1 + erf(x * 2**-0.5))).astype(y_ref.dtype)
    v = (x - least_ref[...]) * scale_ref[...]
    v = v + noise[0][...] - 0.5 if noise else v + 0.5 - 0.5  # as ref: the noise, then the half
    q_ref[...] = jnp.minimum(rint(jnp.maximum(v, 0.0)), levels - 1).astype(jnp.int32).astype(q_ref.dtype)


@partial(jax.jit, static_argnames=("levels", "dtype", "block", "interpret"))
def gelu_quantize(x, least, scale, uniform=None, *, levels, dtype, block=32, interpret=False):
    """(gelu(x), integers): x [T, C], least and scale [C] float32 (scale 0 = a constant group), noise [T, C].

    block: rows a program, a power of two.
    """
    check_block(block)
    T, C = x.shape
    c = chunk(C)
    tall, broad = -T % block, -C % c
    pad = lambda a: jnp.pad(a, ((0, tall if a.shape[0] == T else 0), (0, broad)))
    row = lambda a: jnp.pad(a.astype(jnp.float32), (0, broad))[None]
    inputs = [pad(x), row(least), row(scale)]
    tile, line = pl.BlockSpec((block, c), lambda i, j: (i, j)), pl.BlockSpec((1, c), lambda i, j: (0, j))
    specs = [tile, line, line]
    if uniform is not None:
        inputs.append(pad(uniform.astype(jnp.float32)))
        specs.append(tile)
    shape = (T + tall, C + broad)
    y, q = pallas_call(
        partial(_gelu_kernel, levels=levels),
        out_shape=(jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(shape, dtype)),
        grid=(shape[0] // block, shape[1] // c),
        in_specs=specs,
        out_specs=(tile, tile),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="mesa_gelu_quantize",
    )(*inputs)
    return y[:T, :C], q[:T, :C]


def _norm_kernel(
    g_ref, q_ref, step_ref, least_ref, mean_ref, rstd_ref, weight_ref, dx_ref, dw_ref, db_ref, *, c, C
):
    """g_ref, q_ref [block, C']; step_ref, least_ref, weight_ref [1, C']; mean_ref, rstd_ref [block, 1] ->
    dx_ref [block, C'], dw_ref, db_ref [1, C']: this strip's share. Padded channels have weight 0.
    """
    mean, rstd = mean_ref[...], rstd_ref[...]
    chunks = range(0, g_ref.shape[1], c)

    def piece(j):
        at = (slice(None), pl.ds(j, c))
        g = g_ref[at].astype(jnp.float32)
        x = q_ref[at].astype(jnp.int32).astype(jnp.float32) * step_ref[at] + least_ref[at]
        return at, g, g * weight_ref[at], (x - mean) * rstd

    one = two = jnp.zeros((g_ref.shape[0], 1), jnp.float32)
    for j in chunks:
        at, g, gw, xh = piece(j)
        one, two = one + gw.sum(axis=1, keepdims=True), two + (gw * xh).sum(axis=1, keepdims=True)
        dw_ref[at], db_ref[at] = (g * xh).sum(axis=0, keepdims=True), g.sum(axis=0, keepdims=True)
    for j in chunks:
        at, _, gw, xh = piece(j)
        dx_ref[at] = (rstd * (gw - one / C - xh * (two / C))).astype(dx_ref.dtype)


@partial(jax.jit, static_argnames=("block", "interpret"))
def norm_backward(g, q, step, least, mean, rstd, weight, *, block=16, interpret=False):
    """(dx [T, C] in g's dtype, dweight [C], dbias [C] float32) of g [T, C] and integers q [T, C].

    Args: step, least [C]: range / (levels - 1) and minimum of each channel; mean, rstd [T, 1]; weight [C]: in
      float32. block: rows a program, a power of two.
    """
    check_block(block)
    T, C = g.shape
    c = chunk(C)
    tall, broad = -T % block, -C % c
    pad = lambda a: jnp.pad(a, ((0, tall), (0, broad if a.shape[1] == C else 0)))
    stat = lambda a: jnp.pad(a.astype(jnp.float32), ((0, tall), (0, 0)))
    row = lambda a: jnp.pad(a.astype(jnp.float32), (0, broad))[None]
    wide = C + broad
    strip, line = pl.BlockSpec((block, wide), lambda i: (i, 0)), pl.BlockSpec((1, wide), lambda i: (0, 0))
    column, share = pl.BlockSpec((block, 1), lambda i: (i, 0)), pl.BlockSpec((1, wide), lambda i: (i, 0))
    n = (T + tall) // block
    part = jax.ShapeDtypeStruct((n, wide), jnp.float32)
    dx, dw, db = pallas_call(
        partial(_norm_kernel, c=c, C=C),
        out_shape=(jax.ShapeDtypeStruct((T + tall, wide), g.dtype), part, part),
        grid=(n,),
        in_specs=[strip, strip, line, line, column, column, line],
        out_specs=(strip, share, share),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="mesa_norm_backward",
    )(pad(g), pad(q), row(step), row(least), stat(mean), stat(rstd), row(weight))
    return dx[:T, :C], dw[:, :C].sum(axis=0), db[:, :C].sum(axis=0)


def chunk(channels):
    """Channels a step: the largest power of two in 16..128 that divides them, or 16 and padding."""
    return next((c for c in (128, 64, 32) if channels % c == 0), 16)


def check_block(block):
    """Raise ValueError unless block is a power of two, at least 16."""
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two, at least 16, got {block}")
