"""`dot_product_attention` with the arguments, layout and results of `jax.nn.dot_product_attention`.

The layout is JAX's, [B, T, N, H]; extra memory grows with T + S and not with T S, but for the gradient of a
bias. Two differences from JAX, both where JAX's answer is of no use: padding may hold NaN or infinities
without harm, and a query that may see no key gives zeros with zero gradients and a residual of -inf (JAX
averages over keys it must not see).
"""

import math
from functools import partial
from numbers import Real

import jax
import jax.numpy as jnp

from accel.attention.flash import (
    How,
    kernel,
    kernel_obstacle,
    kernels,
    no_hopper,
    on_hopper,
    on_hopper_biased,
)
from accel.blocks.backend import choose_impl
from accel.blocks.shapes import alike
from accel.blocks.softmax import wide
from accel.blocks.tiled_attention import Plan, tiled_attention
from accel.blocks.tiles import too_wide
from ref.blocks.attention import check_width
from ref.dims import dims

IMPLEMENTATIONS = (None, "auto", "xla", "triton", "tpu", "hopper", "cudnn")


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
):
    """softmax(scale Q K^T + bias over the visible keys) V for each head; a drop-in for `jax.nn`'s.

    Args: query [B, T, N, H] (or [T, N, H], as all of them), key, value [B, S, K, H], N a multiple of K, of
        one floating dtype.
      bias: added to the scaled logits; mask: bool, True = takes part; both broadcastable to [B, N, T, S]. A
        bias of -inf hides a key. "hopper" takes a bias in query's dtype, what is beyond 2^127 scale as
        infinite, and for its gradient, if that is asked for, memory for B N T S numbers of that dtype.
      scale: number or scalar array; None is 1 / sqrt(H).
      is_causal: query i sees keys j <= i (aligned top-left, as JAX; `flash_attention` aligns bottom-right).
      query_seq_lengths, key_value_seq_lengths: int32 [B]: queries and keys from there on are padding.
      local_window_size: (left, right), or a number for both: query i sees keys i - left .. i + right.
      implementation: None is the best for the device and the call; "xla" is plain JAX, the only one with
        forward mode and second derivatives; "triton" and "tpu" are kernels, without bias; so is "hopper",
        for half precision, but with a bias; "cudnn" is JAX's own, called as it is.
      return_residual: also return the log-sum-exp of the logits, [B, T, N], without a gradient, as JAX.
    Returns: [B, T, N, H] in query's dtype, or (that, residual in key's dtype). Sums are float32 (float64).
    Raises: ValueError naming the argument; NotImplementedError for an implementation that cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=scale, is_causal=is_causal, implementation="cudnn",
            query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size, return_residual=return_residual,
        )  # fmt: skip
    shape = jnp.shape(query)
    query, key, value = (_four_axes(n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    bias, mask = (None if x is None else _four_axes(n, x) for n, x in (("bias", bias), ("mask", mask)))
    query_seq_lengths, key_value_seq_lengths = (
        None if x is None else jnp.asarray(x) for x in (query_seq_lengths, key_value_seq_lengths)
    )
    _check(query, key, value, bias, mask)
    _check_lengths("query_seq_lengths", query_seq_lengths, query)
    _check_lengths("key_value_seq_lengths", key_value_seq_lengths, query)
    fixed = scale is None or isinstance(scale, Real)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    obstacle = None if fixed else 'needs a scale that is a number; use implementation="xla"'
    obstacle = obstacle or kernel_obstacle(query, key, value)
    unbiased = obstacle if bias is None else 'has no bias; use implementation="xla"'
    hidden = mask, query_seq_lengths, key_value_seq_lengths
    pairs = None if all(x is None for x in hidden) else math.prod(query.shape[:-1]) * key.shape[1]
    impl = choose_impl(
        implementation or "auto",
        arrays=(query, key, value),
        name="implementation",
        auto=kernels(query.shape[1], pairs),
        obstacles={
            "hopper": obstacle or no_hopper((query, key, value)) or _no_bias(query, bias, scale),
            "triton": unbiased or too_wide(query, value),
            "tpu": unbiased,
        },
    )
    o, residual = _attention(
        query,
        key,
        value,
        bias,
        mask,
        query_seq_lengths,
        key_value_seq_lengths,
        None if fixed else jnp.asarray(scale),
        scale=float(scale) if fixed else 1.0,
        is_causal=bool(is_causal),
        window=_window(local_window_size),
        impl=impl,
    )
    return (o.reshape(shape), residual.reshape(shape[:-1])) if return_residual else o.reshape(shape)


@partial(jax.jit, static_argnames=("scale", "is_causal", "window", "impl"))
@partial(jax.named_call, name="dot_product_attention")
def _attention(q, k, v, bias, mask, q_lengths, kv_lengths, factor, *, scale, is_causal, window, impl):
    lo, hi = (None, None) if window is None else (-window[0], window[1])
    if is_causal:
        hi = 0 if hi is None else min(hi, 0)
    end = None if kv_lengths is None else kv_lengths.astype(jnp.int32)[:, None, None]
    if q_lengths is not None:
        real = (
            jnp.arange(q.shape[1], dtype=jnp.int32)[None, None] < q_lengths.astype(jnp.int32)[:, None, None]
        )
        end = jnp.where(real, jnp.int32(k.shape[1]) if end is None else end, 0)
    if impl == "hopper" and q.size and k.size:
        S = k.shape[1]
        first = min(max(lo or 0, 0), S - 1)
        seen = slice(
            first, None if hi is None else max(q.shape[1] + hi, first + 1)
        )  # others may hold anything
        lo, hi = (None if x is None else x - first for x in (lo, hi))
        k, v = k[:, seen], v[:, seen]
        if end is not None:
            end = end - first
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:3], S))[..., seen]
        plan = Plan(scale, lo, hi, 128, 128, 0.0)
        hidden = {n: x for n, x in (("end", end), ("mask", mask)) if x is not None}
        if bias is None:
            o, lse = on_hopper(plan, How(rows_first=True), *alike((q, k, v), q, k, v, hidden), hidden)
        else:
            bias = bias[..., seen] if bias.shape[3] > 1 else bias
            arrays = alike((q, k, v, bias), q, k, v, bias, hidden)
            o, lse = on_hopper_biased(plan, How(rows_first=True), *arrays, hidden)
        return o, jax.lax.stop_gradient(jnp.moveaxis(lse, 1, 2)).astype(q.dtype)
    queries, keys, values = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    if factor is not None:
        queries = queries.astype(wide(q.dtype)) * factor.astype(wide(q.dtype))
    o, lse = tiled_attention(
        queries,
        keys,
        values,
        scale=scale,
        bias=bias,
        mask=mask,
        row_end=end,
        lo=lo,
        hi=hi,
        kernel=kernel(impl, False),
        **({} if impl == "xla" else {"block_q": 128, "block_k": 128}),
    )
    residual = jax.lax.stop_gradient(jnp.moveaxis(lse, 1, 2))
    return jnp.moveaxis(o, 1, 2).astype(q.dtype), residual.astype(q.dtype)


def _four_axes(name, x):
    """x with axes of 1 in front, as JAX."""
    x = jnp.asarray(x)
    if x.ndim > 4:
        raise ValueError(f"{name} must have at most 4 axes, got shape {list(x.shape)}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _check(query, key, value, bias, mask):
    n = dims(query=(query, "B T N H"), key=(key, "B S K H"), value=(value, "B S K H"))
    check_width(n["H"], n["H"])
    if n["K"] == 0 or n["N"] % n["K"]:
        raise ValueError(
            f"query has N={n['N']} heads, not a multiple of the K={n['K']} heads of key and value"
        )
    if not (query.dtype == key.dtype == value.dtype and jnp.issubdtype(query.dtype, jnp.floating)):
        given = ", ".join(str(x.dtype) for x in (query, key, value))
        raise ValueError(f"query, key and value must have one floating dtype, got {given}")
    if mask is not None and mask.dtype != bool:
        raise ValueError(
            f"mask must be boolean (True = takes part), got dtype {mask.dtype}; or pass it as bias"
        )
    full = (n["B"], n["N"], n["T"], n["S"])
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
            raise ValueError(f"{name} of shape {list(x.shape)} does not broadcast to {list(full)}")


def _check_lengths(name, lengths, query):
    if lengths is None:
        return
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got dtype {lengths.dtype}")
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"{name} must have shape [{query.shape[0]}], got {list(lengths.shape)}")


def _window(size):
    """(left, right) or None."""
    if size is None:
        return None
    left, right = (size, size) if isinstance(size, int) else size
    return int(left), int(right)


def _no_bias(query, bias, scale):
    """Why the kernel for Hopper cannot take the bias, or None."""
    if bias is None:
        return None
    if bias.dtype != query.dtype:
        return f'takes a bias of {query.dtype} as query, not {bias.dtype}; use implementation="xla"'
    if abs(scale) < 2.0**-30:  # scores begin with bias / scale
        return f'takes no bias with a scale of {scale}; use implementation="xla"'
    return None if query.shape[3] <= 128 else 'takes no bias for heads over 128; use implementation="xla"'
