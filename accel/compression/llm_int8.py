"""LLM.int8() in JAX: one int8 product with int32 sums, and the outlier columns in float beside it.

Which columns hold outliers is known only when x is: under jit their number is not. Without `max_outliers` the
float product runs over all columns, with those that hold none masked out: exact, and no cheaper than float.
With it at most that many columns are gathered, and the masked product is the fallback when more qualify; the
kernels for Hopper always do so, with the fallback on the device. For a few tokens they do the float product
of those tiles of 128 columns that hold an outlier, while they have their weights at hand.
Scales are float32 as in ref, which makes the integers of both layers equal.
"""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.backend import choose_impl, hopper_obstacle
from accel.blocks.quantize import affine_params, quantize, symmetric_params
from accel.blocks.shapes import alike
from accel.blocks.softmax import wide
from ref.compression.llm_int8 import (
    LEVELS,
    SMALLEST,
    Int8Linear,
    OutlierStats,
    check_int8,
    check_ladder,
    check_layer,
    check_rows,
    check_scales,
    check_terms,
    convert_linear,
    example,
    int8_linear_bytes,
    int8_share,
    outlier_feature_stats,
)
from ref.dims import dims

__all__ = [
    "Int8Linear",
    "OutlierStats",
    "convert_linear",
    "dequantize_matmul",
    "example",
    "int8_linear_bytes",
    "int8_matmul",
    "int8_share",
    "llm_int8_linear",
    "llm_int8_linear_vjp",
    "outlier_feature_stats",
    "quantization_ladder",
    "quantize_rowwise",
]

ROWS = (((1,), (1,)), ((), ()))  # contract the last axes of [T, K] and [N, K]
STRIP = 32  # outlier columns that "hopper" gathers where max_outliers is None
EXACT = jax.lax.Precision.HIGHEST  # outliers are the largest numbers there are: no TF32 for them


def quantize_rowwise(x, *, threshold=0.0):
    """(x_q int8 [..., K], absmax float32 [...], outlier_mask bool [K]); as ref, bit for bit."""
    check_rows(x, threshold)
    return _rowwise(jnp.asarray(x), float(threshold))


def int8_matmul(x_q, w_q):
    """x_q w_q^T with int32 sums: x_q int8 [..., K], w_q int8 [N, K] -> int32 [..., N]."""
    check_int8(x_q, w_q)
    return _product(jnp.asarray(x_q), jnp.asarray(w_q))


def dequantize_matmul(acc, x_absmax, w_absmax, *, bias=None):
    """acc x_absmax w_absmax / 127^2 + bias, in the scales' dtype, at least float32."""
    check_scales(acc, x_absmax, w_absmax, bias)
    return _dequantize(*map(jnp.asarray, (acc, x_absmax, w_absmax)), bias)


def llm_int8_linear(
    x,
    layer: Int8Linear,
    *,
    threshold=6.0,
    max_outliers=None,
    impl="auto",
    interpret=False,
    block_t=None,
    block_n=None,
    block_k=None,
):
    """x W^T + b in int8 but for the outlier columns, in x's dtype; float parts in at least float32.

    max_outliers: None multiplies all columns, masked, in float; a number gathers that many columns, and falls
      back to the masked product when more hold an outlier (no column is ever dropped). "hopper" gathers
      always, 32 columns for None, 64 at most; up to 64 tokens it needs no bound, and gathers nothing.
    impl: "xla"; "triton" and "tpu" fuse scales, bias and outlier columns into the int8 product's last step,
      by tiles of block_t x block_n, block_k terms at a time; so does "hopper", for half precision without
      float_weight, by tiles of its own; "auto" is "hopper" on a GPU that can run the call, else "xla".
    Gradients: as `llm_int8_linear_vjp`; with float_weight its gradient is grad_y^T x, and what is quantised
      is not updated by it.
    """
    check_terms(check_layer(x, layer, max_outliers)["K"])
    check_rows(x, threshold)
    tiles = (block_t, block_n, block_k)
    impl = choose_impl(
        impl,
        arrays=(x, layer),
        interpret=interpret,
        auto=("hopper",),
        obstacles={"hopper": _no_hopper(x, layer, interpret, tiles)},
    )
    if impl == "xla" and any(tiles):
        raise ValueError(f'tile sizes are for impl="triton" and "tpu", got {tiles} with impl="xla"')
    x, layer = jax.tree.map(jnp.asarray, (x, layer))
    x, layer = alike((x, layer), x, layer)
    return _linear(x, layer, float(threshold), max_outliers, impl, interpret, tiles)


@jax.jit
def llm_int8_linear_vjp(layer: Int8Linear, grad_y):
    """(grad_x [..., K], grad_bias [N]) in grad_y's dtype: grad_y What and the sum over tokens."""
    n = dims(grad_y=(grad_y, "... N"), w_q=(layer.w_q, "N K"))
    g = grad_y.astype(wide(grad_y.dtype))
    grad_x = jnp.matmul(g, _float_weight(layer, g.dtype))
    return grad_x.astype(grad_y.dtype), g.reshape(-1, n["N"]).sum(axis=0).astype(grad_y.dtype)


def _no_hopper(x, layer, interpret, tiles):
    """Why the kernels for Hopper cannot run the call, or None."""
    if interpret:
        return 'has no interpreter; use impl="triton"'
    if jnp.result_type(x) not in (jnp.bfloat16, jnp.float16):
        return f'takes bfloat16 or float16, not {jnp.result_type(x)}; use impl="triton"'
    if layer.float_weight is not None:
        return 'multiplies outliers by the int8 weights, not by float_weight; use impl="triton"'
    if any(tiles):
        return f"chooses its own tiles, got {tiles}"
    N, K = layer.w_q.shape
    if max(x.size, N * K, x.size // K * N) >= 2**31:
        return (
            'counts elements in 32 bits, and takes fewer than 2^31 of x, weights and results; use impl="xla"'
        )
    return hopper_obstacle((x, layer))


def quantization_ladder(x, w, *, scheme, decompose=False, threshold=6.0):
    """x w^T through one rung: "absmax", "zeropoint", "row" or "vector"; in x's dtype, at least float32."""
    check_ladder(x, w, scheme, threshold)
    return _ladder(jnp.asarray(x), jnp.asarray(w), scheme, bool(decompose), float(threshold))


@partial(jax.jit, static_argnums=1)
def _rowwise(x, threshold):
    x = x.astype(jnp.float32)
    mask = jnp.zeros(x.shape[-1], bool)
    if threshold > 0:
        outlier = jnp.abs(x) >= threshold
        mask = outlier.any(axis=tuple(range(x.ndim - 1)))
        x = jnp.where(outlier, 0, x)
    absmax = jnp.abs(x).max(axis=-1)
    ok = absmax >= SMALLEST
    factor = jnp.where(ok, LEVELS / jnp.where(ok, absmax, 1), 0)
    q = jnp.rint(x * factor[..., None])
    return jnp.where(mask.reshape((1,) * (x.ndim - 1) + (-1,)), 0, q).astype(jnp.int8), absmax, mask


@jax.jit
def _product(x_q, w_q):
    contract = (((x_q.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_q, w_q, contract, preferred_element_type=jnp.int32)


@jax.jit
def _dequantize(acc, x_absmax, w_absmax, bias):
    dtype = wide(x_absmax.dtype)
    row = lambda v: v.astype(dtype).reshape((1,) * (acc.ndim - 1) + (-1,))
    y = acc.astype(dtype) * (x_absmax.astype(dtype)[..., None] * row(w_absmax)) / LEVELS**2
    return y if bias is None else y + row(jnp.asarray(bias))


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _linear(x, layer, threshold, max_outliers, impl, interpret, tiles):
    K, N, dtype = x.shape[-1], layer.w_q.shape[0], wide(x.dtype)
    rows = x.reshape(-1, K)
    if impl == "hopper":
        return alike(_hopper(rows, layer, threshold, max_outliers), x).reshape(*x.shape[:-1], N)
    x_q, absmax, mask = _rowwise(rows, threshold)
    strip, dense, too_many = _outliers(rows.astype(dtype), layer, threshold, mask, max_outliers)
    if impl == "xla":
        y = _dequantize(_product(x_q, layer.w_q), absmax.astype(dtype), layer.w_absmax, layer.bias)
        gathered = lambda: jax.lax.dot_general(*strip, ROWS, precision=EXACT)
    else:
        if impl == "triton":
            from accel.kernels.llm_int8_triton import int8_product
        else:
            from accel.kernels.llm_int8_tpu import int8_product
        sizes = dict(zip(("block_t", "block_n", "block_k"), tiles, strict=True))
        options = {name: size for name, size in sizes.items() if size is not None}
        y = int8_product(
            x_q, layer.w_q, absmax, layer.w_absmax, layer.bias, strip, interpret=interpret, **options
        ).astype(dtype)
        gathered = lambda: alike(jnp.zeros((rows.shape[0], N), dtype), y)  # the kernel has added them
    if dense is not None:
        y = y + (dense() if strip is None else jax.lax.cond(too_many, dense, gathered))
    return y.astype(x.dtype).reshape(*x.shape[:-1], N)


def _hopper(rows, layer, threshold, max_outliers, interpret=False):
    """The layer on rows [T, K] of half precision by the kernels for Hopper: few, two kernels; many, more."""
    from accel.kernels import llm_int8_few_hopper as kernel_of_few
    from accel.kernels import llm_int8_hopper as kernel
    from accel.kernels import llm_int8_outliers_triton as outliers

    options = {"interpret": interpret}
    T, dtype = len(rows), rows.dtype
    if T <= kernel_of_few.FEW:
        x_q, absmax, marked = outliers.quantize_few(
            rows, threshold=threshold or float("inf"), unit=kernel.DEEP, **options
        )
        return kernel_of_few.few_product(
            x_q, absmax, layer.w_q, layer.w_absmax, layer.bias, marked, T=T, dtype=dtype
        )
    x_q, absmax, marks = outliers.quantize_rows(
        rows, threshold=threshold or float("inf"), unit=kernel.DEEP, **options
    )
    weights = layer.w_q, layer.w_absmax, layer.bias
    if threshold in (0, float("inf")):
        return kernel.int8_product(x_q, absmax, *weights, dtype=dtype)
    R = min(rows.shape[1], STRIP if max_outliers is None else min(max_outliers, 2 * STRIP))
    x_q, x_o, w_o, more = outliers.gather(rows, layer.w_q, x_q, marks, R=R, **options)
    y = kernel.int8_product(x_q, absmax, *weights, (x_o, w_o), dtype=dtype)
    return outliers.overrule(y, more, marks, rows, x_q, absmax, *weights, **options)


def _linear_fwd(x, layer, *static):
    return _linear(x, layer, *static), (layer, None if layer.float_weight is None else x)


def _linear_bwd(threshold, max_outliers, impl, interpret, tiles, saved, grad_y):
    layer, x = saved
    grad_x, grad_bias = llm_int8_linear_vjp(layer, grad_y)
    grads = Int8Linear(None, None)
    if layer.bias is not None:
        grads = grads._replace(bias=grad_bias.astype(layer.bias.dtype))
    if layer.float_weight is not None:
        g, rows = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_w = jax.lax.dot_general(g, rows, (((0,), (0,)), ((), ())), preferred_element_type=wide(x.dtype))
        grads = grads._replace(float_weight=grad_w.astype(layer.float_weight.dtype))
    return grad_x, grads


_linear.__wrapped__.defvjp(_linear_fwd, _linear_bwd)


def _outliers(rows, layer, threshold, mask, max_outliers):
    """(strip, dense, too_many): the gathered columns x_o [T, R], w_o [N, R], or None; a function that gives
    the masked float product [T, N], or None where nothing can be an outlier; whether R columns are too few.
    """
    if threshold == 0 or threshold == float("inf"):
        return None, None, None
    K, dtype = rows.shape[-1], rows.dtype
    kept = jnp.where(mask[None], rows, 0)
    dense = lambda: jax.lax.dot_general(kept, _float_weight(layer, dtype), ROWS, precision=EXACT)
    if max_outliers is None or max_outliers >= K:
        return None, dense, None
    _, at = jax.lax.top_k(jnp.abs(rows).max(axis=0), max_outliers)
    too_many = mask.sum() > max_outliers
    columns = Int8Linear(
        layer.w_q[:, at],
        layer.w_absmax,
        None,
        None if layer.float_weight is None else layer.float_weight[:, at],
    )
    return (jnp.where(too_many, 0, kept[:, at]), _float_weight(columns, dtype)), dense, too_many


def _float_weight(layer, dtype):
    if layer.float_weight is not None:
        return layer.float_weight.astype(dtype)
    return layer.w_q.astype(dtype) * layer.w_absmax.astype(dtype)[:, None] / LEVELS


@partial(jax.jit, static_argnums=(2, 3, 4))
def _ladder(x, w, scheme, decompose, threshold):
    K, dtype = x.shape[-1], wide(x.dtype)
    rows, w = x.reshape(-1, K).astype(dtype), w.astype(dtype)
    mask = jnp.zeros(K, bool)
    kept = rows
    if decompose and threshold > 0:
        outlier = jnp.abs(rows) >= threshold
        mask, kept = outlier.any(axis=0), jnp.where(outlier, 0, rows)
    if scheme == "zeropoint":
        y = _zeropoint_product(kept, w, mask)
    else:
        x_axis, w_axis = {"absmax": (None, None), "row": (0, None), "vector": (0, 0)}[scheme]
        x_q, s_x = _symmetric(kept, x_axis)
        w_q, s_w = _symmetric(w, w_axis)
        acc = _product(jnp.where(mask[None], 0, x_q).astype(jnp.int8), w_q)
        y = acc.astype(dtype) * s_x * s_w.reshape(1, -1)
    if decompose and threshold > 0:
        y = y + jax.lax.dot_general(jnp.where(mask[None], rows, 0), w, ROWS, precision=EXACT)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _symmetric(x, axis):
    absmax = jnp.abs(x).max(axis=None if axis is None else 1)
    scale = symmetric_params(absmax)
    q = quantize(x, scale, jnp.zeros_like(absmax), qmin=-LEVELS, qmax=LEVELS, axis=axis)
    return q, scale.reshape(-1, 1)


def _zeropoint_product(x, w, mask):
    """sum (x_q - z_x)(w_q - z_w) by the int8 product and three corrections, all modulo 2^32."""
    s_x, z_x = affine_params(x.min(), x.max(), signed=True)
    s_w, z_w = affine_params(w.min(), w.max(), signed=True)
    x_q = quantize(x, s_x, z_x, qmin=-128, qmax=127)
    w_q = quantize(w, s_w, z_w, qmin=-128, qmax=127)
    x_q = jnp.where(mask[None], z_x.astype(jnp.int8), x_q)  # the zero point stands for 0
    total = lambda q: q.astype(jnp.int32).sum(axis=1)
    acc = _product(x_q, w_q) - z_x * total(w_q)[None, :] - z_w * total(x_q)[:, None]
    return (acc + z_x * z_w * x.shape[1]).astype(x.dtype) * (s_x * s_w)
