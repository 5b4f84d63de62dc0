"""Mesa in JAX: every layer carries a custom rule whose residuals are the integers of ref's `Saved`.

Outputs are exact; differentiating them uses what was saved. The new range states and the saved arrays are
returned beside the output and carry no gradient. Ranges and integers are float32 arithmetic as in ref.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.attention import join_heads, split_heads
from accel.blocks.backend import choose_impl
from accel.blocks.mlp import gelu, linear
from accel.blocks.norms import layer_norm
from accel.blocks.quantize import init_range, update_range
from accel.blocks.shapes import alike
from accel.blocks.softmax import softmax, wide
from accel.blocks.stored import (
    dequantize_groups,
    inverse_step,
    moving_range,
    overflow_fraction,
    pack_groups,
    quantize_groups,
    restore,
    store,
    unpack_groups,
)
from ref.blocks.quantize import check_finite
from ref.blocks.stored import check_groups, check_levels, check_quantize, check_update_time, stored_dtype
from ref.dims import dims
from ref.training.mesa import (
    BlockParams,
    BlockStates,
    MesaConfig,
    MesaPolicy,
    RangeState,
    Saved,
    SavedBlock,
    SavedLinear,
    SavedMatmul,
    SavedNorm,
    activation_bytes,
    axis_of,
    block_groups,
    example,
    is_compressed,
    largest_batch,
    largest_width,
    saved_shapes,
)

__all__ = [
    "BlockParams",
    "BlockStates",
    "MesaConfig",
    "MesaPolicy",
    "RangeState",
    "Saved",
    "SavedBlock",
    "SavedLinear",
    "SavedMatmul",
    "SavedNorm",
    "activation_bytes",
    "dequantize_groups",
    "draw_noise",
    "example",
    "init_range",
    "init_states",
    "largest_batch",
    "largest_width",
    "mesa_block",
    "mesa_block_backward",
    "mesa_gelu",
    "mesa_gelu_backward",
    "mesa_layer_norm",
    "mesa_layer_norm_backward",
    "mesa_linear",
    "mesa_linear_backward",
    "mesa_matmul",
    "mesa_matmul_backward",
    "mesa_softmax",
    "mesa_softmax_backward",
    "overflow_fraction",
    "pack_groups",
    "quantize_groups",
    "unpack_groups",
    "update_range",
]

DEFAULT = MesaPolicy()
jax.tree_util.register_static(MesaPolicy)  # options, not arrays: part of what is compiled


_compiled = partial(jax.jit, static_argnames=("group_axis", "levels"))


class _Options(NamedTuple):
    """Static options of one saved tensor."""

    groups: int
    group_axis: int
    levels: int
    momentum: float
    update: str


def mesa_linear(
    x,
    w,
    b,
    state: RangeState,
    *,
    groups,
    group_axis=-1,
    levels=256,
    momentum=0.9,
    update="before",
    uniform=None,
):
    """(x w + b, SavedLinear, state): x [..., C], w [C, F], b [F] or None."""
    dims(x=(x, "... C"), w=(w, "C F"))
    opt = _options(x, groups, group_axis, levels, momentum, update, uniform)
    return _linear(*_arrays(x, w, b, state, uniform), opt)


@_compiled
def mesa_linear_backward(grad_y, saved: SavedLinear, *, group_axis=-1, levels=256):
    """(grad_y w^T, x^T grad_y of the restored x, sum of grad_y over the tokens)."""
    grad_y, w = jnp.asarray(grad_y), jnp.asarray(saved.w)
    x = restore(saved.x, group_axis=group_axis, levels=levels, dtype=grad_y.dtype)
    return (jnp.matmul(grad_y, w.astype(grad_y.dtype).T), *_weight_gradients(x, grad_y, w.dtype))


def mesa_matmul(
    a,
    b,
    state_a: RangeState,
    state_b: RangeState,
    *,
    groups,
    group_axis=-3,
    levels=256,
    momentum=0.9,
    update="before",
    uniform=None,
):
    """(a b, SavedMatmul, state_a, state_b): a [..., L, D], b [..., D, S]. uniform: a pair, or None."""
    dims(a=(a, "... L D"), b=(b, "... D S"))
    u_a, u_b = (None, None) if uniform is None else uniform
    _options(b, groups, group_axis, levels, momentum, update, u_b)
    opt = _options(a, groups, group_axis, levels, momentum, update, u_a)
    return _matmul(*_arrays(a, b, state_a, state_b, (u_a, u_b)), opt)


@_compiled
def mesa_matmul_backward(grad_y, saved: SavedMatmul, *, group_axis=-3, levels=256):
    """(grad_y b^T, a^T grad_y) of the restored a and b."""
    grad_y = jnp.asarray(grad_y)
    a, b = (restore(s, group_axis=group_axis, levels=levels, dtype=grad_y.dtype) for s in (saved.a, saved.b))
    return jnp.matmul(grad_y, _swap(b)), jnp.matmul(_swap(a), grad_y)


def mesa_softmax(
    x, state: RangeState, *, groups, group_axis=-1, levels=256, momentum=0.9, update="before", uniform=None
):
    """(softmax(x) over the last axis, Saved of it, state)."""
    opt = _options(x, groups, group_axis, levels, momentum, update, uniform)
    return _softmax(*_arrays(x, state, uniform), opt)


@_compiled
def mesa_softmax_backward(grad_y, saved: Saved, *, group_axis=-1, levels=256):
    """y (grad_y - sum(grad_y y)) of the restored output y."""
    grad_y = jnp.asarray(grad_y)
    return _softmax_vjp(
        restore(saved, group_axis=group_axis, levels=levels, dtype=wide(grad_y.dtype)), grad_y
    )


def mesa_gelu(
    x,
    state: RangeState,
    *,
    groups,
    group_axis=-1,
    levels=256,
    momentum=0.9,
    update="before",
    uniform=None,
    impl="auto",
    interpret=False,
):
    """(x Phi(x), Saved of x, state).

    impl: "triton" (whose erf is within 1.5e-7) and "tpu" write output and integers in one pass over x;
      "auto" is "xla", which is bit for bit the plain layer and whose compiler fuses the two as well.
    """
    opt = _options(x, groups, group_axis, levels, momentum, update, uniform)
    return _gelu(*_arrays(x, state, uniform), opt, _kernel_or_xla(impl, interpret, opt), interpret)


@_compiled
def mesa_gelu_backward(grad_y, saved: Saved, *, group_axis=-1, levels=256):
    """grad_y times the derivative of GELU at the restored input."""
    grad_y = jnp.asarray(grad_y)
    slope = _gelu_grad(restore(saved, group_axis=group_axis, levels=levels, dtype=wide(grad_y.dtype)))
    return (grad_y.astype(slope.dtype) * slope).astype(grad_y.dtype)


def mesa_layer_norm(
    x,
    weight,
    bias,
    state: RangeState,
    *,
    groups,
    eps=1e-5,
    group_axis=-1,
    levels=256,
    momentum=0.9,
    update="before",
    uniform=None,
):
    """(layer norm of x [..., C], SavedNorm, state): the input is rounded, mean and 1 / deviation are not."""
    dims(x=(x, "... C"), weight=(weight, "C"), bias=(bias, "C"))
    opt = _options(x, groups, group_axis, levels, momentum, update, uniform)
    return _norm(*_arrays(x, weight, bias, state, uniform), opt, eps)


@partial(jax.jit, static_argnames=("group_axis", "levels", "impl", "interpret"))
def mesa_layer_norm_backward(
    grad_y, saved: SavedNorm, *, group_axis=-1, levels=256, impl="auto", interpret=False
):
    """(grad_x, grad_weight, grad_bias) at x^ = (restored x - mean) rstd.

    impl: "triton" and "tpu" read the integers and grad_y once; "auto" is "xla".
    """
    grad_y, weight = jnp.asarray(grad_y), jnp.asarray(saved.weight)
    dtype = wide(grad_y.dtype)
    opt = _Options(0, group_axis, levels, 0.0, "")
    if (chosen := _kernel_or_xla(impl, interpret, opt)) != "xla":
        grad_x, *each = _norm_backward_kernel(grad_y, saved, levels, chosen, interpret)
        return (grad_x, *(v.astype(weight.dtype) for v in each))
    mean, rstd, g = (jnp.asarray(v).astype(dtype) for v in (saved.mean, saved.rstd, grad_y))
    xh = (restore(saved.x, dtype, group_axis=group_axis, levels=levels) - mean) * rstd
    gw = g * weight.astype(dtype).reshape((1,) * (g.ndim - 1) + (-1,))
    grad_x = rstd * (gw - gw.mean(axis=-1, keepdims=True) - xh * (gw * xh).mean(axis=-1, keepdims=True))
    rows = tuple(range(g.ndim - 1))
    each = (g * xh).sum(axis=rows), g.sum(axis=rows)
    return (grad_x.astype(grad_y.dtype), *(v.astype(weight.dtype) for v in each))


def mesa_block(
    x,
    params: BlockParams,
    states: BlockStates,
    *,
    num_heads,
    policy: MesaPolicy = DEFAULT,
    uniform: BlockStates | None = None,
    eps=1e-5,
):
    """(y in x's dtype, SavedBlock, states) of a pre-norm block; its gradients are `mesa_block_backward`."""
    block_groups(x, params, num_heads, policy)
    check_finite("x", x)
    return _block(*_arrays(x, params, states, uniform), num_heads, policy, eps)


@partial(jax.jit, static_argnames=("num_heads", "policy"))
def mesa_block_backward(grad_y, saved: SavedBlock, *, num_heads, policy: MesaPolicy = DEFAULT):
    """(grad_x, gradients as BlockParams) from what the block kept, for grad_y [..., L, C]."""
    grad_y, saved = _arrays(grad_y, saved)
    p, dtype, levels = saved.params, grad_y.dtype, policy.levels
    restored = lambda name, as_=dtype: restore(
        getattr(saved, name), as_, group_axis=axis_of(name), levels=levels
    )

    def back_linear(name, w, b, grad):
        grad_w, grad_b = _weight_gradients(restored(name), grad, w.dtype)
        return jnp.matmul(grad, w.astype(dtype).T), grad_w, None if b is None else grad_b

    grad_g, w_fc2, b_fc2 = back_linear("g", p.w_fc2, p.b_fc2, grad_y)
    slope = _gelu_grad(restored("u", wide(dtype)))
    grad_u = (grad_g.astype(slope.dtype) * slope).astype(dtype)
    grad_h2, w_fc1, b_fc1 = back_linear("h2", p.w_fc1, p.b_fc1, grad_u)
    grad, s2, b2 = mesa_layer_norm_backward(grad_h2, saved.x2, levels=levels)
    grad_x2 = grad_y + grad
    grad_o, w_o, b_o = back_linear("o", p.w_o, p.b_o, grad_x2)
    grad_o = split_heads(grad_o, num_heads)
    q, k, v, attention = (restored(name) for name in ("q", "k", "v", "p"))
    grad_s = _softmax_vjp(attention, jnp.matmul(grad_o, _swap(v))) * q.shape[-1] ** -0.5
    products = ("q", grad_s, k), ("k", _swap(grad_s), q), ("v", _swap(attention), grad_o)
    grad_h1, grads = jnp.zeros_like(grad_y), {}
    for n, left, right in products:
        part = jnp.matmul(left, right)
        w, b = getattr(p, f"w_{n}"), getattr(p, f"b_{n}")
        back, grads[f"w_{n}"], grads[f"b_{n}"] = back_linear("h1", w, b, join_heads(part))
        grad_h1 = grad_h1 + back
    grad, s1, b1 = mesa_layer_norm_backward(grad_h1, saved.x1, levels=levels)
    return grad_x2 + grad, BlockParams(
        ln1_scale=s1, ln1_bias=b1, **grads, w_o=w_o, b_o=b_o, ln2_scale=s2, ln2_bias=b2, w_fc1=w_fc1,
        b_fc1=b_fc1, w_fc2=w_fc2, b_fc2=b_fc2,
    )  # fmt: skip


def init_states(num_heads, *, policy=DEFAULT):
    """BlockStates before the first step: G ranges for each tensor."""
    groups = policy.groups or num_heads
    return BlockStates(*[init_range((groups,)) for _ in BlockStates._fields])


def draw_noise(key, shape, params, *, num_heads):
    """BlockStates of uniform noise in [0, 1), float32, for x of that shape [..., L, C]; key: a PRNG key."""
    shapes = saved_shapes(shape, params, num_heads)
    keys = jax.random.split(key, len(shapes))
    return BlockStates(*[jax.random.uniform(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True)])


@partial(jax.jit, static_argnums=(5,))
@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _linear(x, w, b, state, uniform, opt):
    saved, state = store(x, state, *opt, uniform)
    return linear(x, w, b), SavedLinear(saved, w), state


def _linear_fwd(x, w, b, state, uniform, opt):
    out = _linear(x, w, b, state, uniform, opt)
    return out, (out[1], b)


def _linear_bwd(opt, kept, grads):
    saved, b = kept
    grad_x, grad_w, grad_b = mesa_linear_backward(
        grads[0], saved, group_axis=opt.group_axis, levels=opt.levels
    )
    return grad_x, grad_w, None if b is None else grad_b.astype(b.dtype), None, None


_linear.__wrapped__.defvjp(_linear_fwd, _linear_bwd)


@partial(jax.jit, static_argnums=(5,))
@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _matmul(a, b, state_a, state_b, uniform, opt):
    saved_a, state_a = store(a, state_a, *opt, uniform[0])
    saved_b, state_b = store(b, state_b, *opt, uniform[1])
    return jnp.matmul(a, b.astype(a.dtype)), SavedMatmul(saved_a, saved_b), state_a, state_b


def _matmul_fwd(a, b, state_a, state_b, uniform, opt):
    out = _matmul(a, b, state_a, state_b, uniform, opt)
    return out, out[1]


def _matmul_bwd(opt, saved, grads):
    back = mesa_matmul_backward(grads[0], saved, group_axis=opt.group_axis, levels=opt.levels)
    return (*back, None, None, None)


_matmul.__wrapped__.defvjp(_matmul_fwd, _matmul_bwd)


@partial(jax.jit, static_argnums=(3,))
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(x, state, uniform, opt):
    y = softmax(x)
    saved, state = store(y, state, *opt, uniform)
    return y, saved, state


def _softmax_fwd(x, state, uniform, opt):
    out = _softmax(x, state, uniform, opt)
    return out, out[1]


def _softmax_bwd(opt, saved, grads):
    back = mesa_softmax_backward(grads[0], saved, group_axis=opt.group_axis, levels=opt.levels)
    return back, None, None


_softmax.__wrapped__.defvjp(_softmax_fwd, _softmax_bwd)


@partial(jax.jit, static_argnums=(3, 4, 5))
@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _gelu(x, state, uniform, opt, impl, interpret):
    if impl == "xla":
        saved, state = store(x, state, *opt, uniform)
        return gelu(x), saved, state
    alpha, beta, state = moving_range(x, state, opt.groups, opt.group_axis, opt.momentum, opt.update)
    channels = lambda v: jnp.repeat(v.astype(jnp.float32), x.shape[-1] // opt.groups)
    rows = lambda v: None if v is None else v.reshape(-1, x.shape[-1])
    y, q = _kernels(impl).gelu_quantize(
        rows(x), channels(beta), channels(inverse_step(alpha, opt.levels)), rows(uniform), levels=opt.levels,
        dtype=stored_dtype(opt.levels), interpret=interpret,
    )  # fmt: skip
    return y.reshape(x.shape), Saved(q.reshape(x.shape), alpha, beta), state


def _gelu_fwd(x, state, uniform, opt, impl, interpret):
    out = _gelu(x, state, uniform, opt, impl, interpret)
    return out, out[1]


def _gelu_bwd(opt, impl, interpret, saved, grads):
    back = mesa_gelu_backward(grads[0], saved, group_axis=opt.group_axis, levels=opt.levels)
    return back, None, None


_gelu.__wrapped__.defvjp(_gelu_fwd, _gelu_bwd)


@partial(jax.jit, static_argnums=(5, 6))
@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _norm(x, weight, bias, state, uniform, opt, eps):
    saved, state = store(x, state, *opt, uniform)
    y = layer_norm(x, weight, bias, eps=eps)
    return y, SavedNorm(saved, *_statistics(x, eps), weight), state


def _norm_fwd(x, weight, bias, state, uniform, opt, eps):
    out = _norm(x, weight, bias, state, uniform, opt, eps)
    return out, out[1]


def _norm_bwd(opt, eps, saved, grads):
    back = mesa_layer_norm_backward(grads[0], saved, group_axis=opt.group_axis, levels=opt.levels)
    return (*back, None, None)


_norm.__wrapped__.defvjp(_norm_fwd, _norm_bwd)


@partial(jax.jit, static_argnums=(4, 5, 6))
@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _block(x, params, states, uniform, num_heads, policy, eps):
    groups, kept, moved, p = policy.groups or num_heads, {}, {}, params

    def keep(name, value):
        kept[name], moved[name] = value, getattr(states, name)
        if is_compressed(name, policy):
            opt = _Options(groups, axis_of(name), policy.levels, policy.momentum, policy.update)
            u = None if uniform is None else getattr(uniform, name)
            kept[name], moved[name] = store(value, moved[name], *opt, u)

    def norm(name, value, scale, bias):
        keep(name, value)
        kept[name] = SavedNorm(kept[name], *_statistics(value, eps), scale)
        return layer_norm(value, scale, bias, eps=eps)

    h1 = norm("x1", x, p.ln1_scale, p.ln1_bias)
    heads = lambda w, b: split_heads(linear(h1, w, b), num_heads)
    q, k, v = heads(p.w_q, p.b_q), heads(p.w_k, p.b_k), heads(p.w_v, p.b_v)
    scores = jnp.matmul(q, _swap(k), preferred_element_type=wide(q.dtype)) * q.shape[-1] ** -0.5
    attention = softmax(scores).astype(q.dtype)
    o = join_heads(jnp.matmul(attention, v))
    x2 = x + linear(o, p.w_o, p.b_o)
    h2 = norm("x2", x2, p.ln2_scale, p.ln2_bias)
    u = linear(h2, p.w_fc1, p.b_fc1)
    g = gelu(u)
    rest = {"h1": h1, "q": q, "k": k, "p": attention, "v": v, "o": o, "h2": h2, "u": u, "g": g}
    for name, value in rest.items():
        keep(name, value)
    return x2 + linear(g, p.w_fc2, p.b_fc2), SavedBlock(**kept, params=params), BlockStates(**moved)


def _block_fwd(x, params, states, uniform, num_heads, policy, eps):
    out = _block(x, params, states, uniform, num_heads, policy, eps)
    return out, out[1]


def _block_bwd(num_heads, policy, eps, saved, grads):
    back = mesa_block_backward(grads[0], saved, num_heads=num_heads, policy=policy)
    return (*back, None, None)


_block.__wrapped__.defvjp(_block_fwd, _block_bwd)


def _statistics(x, eps):
    """Mean and 1 / deviation of the last axis, [..., 1] float32."""
    y = x.astype(wide(x.dtype))
    mean = y.mean(axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(y - mean).mean(axis=-1, keepdims=True) + eps)
    return mean.astype(jnp.float32), rstd.astype(jnp.float32)


def _weight_gradients(x, grad_y, dtype):
    """(x^T grad_y, sum of grad_y) over all tokens, summed in at least float32."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    acc = wide(grad_y.dtype)
    grad_w = jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())), preferred_element_type=acc)
    return grad_w.astype(dtype), grads.astype(acc).sum(axis=0).astype(dtype)


def _softmax_vjp(p, dp):
    y, g = p.astype(wide(dp.dtype)), dp.astype(wide(dp.dtype))
    return (y * (g - jnp.sum(g * y, axis=-1, keepdims=True))).astype(dp.dtype)


def _gelu_grad(x):
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5)) + x * jnp.exp(-0.5 * x * x) * (2 * np.pi) ** -0.5


def _swap(x):
    return jnp.swapaxes(x, -1, -2)


def _options(x, groups, group_axis, levels, momentum, update, uniform):
    """The static options, checked against x."""
    check_levels(levels)
    check_groups(x, groups, group_axis)
    check_finite("x", x)
    check_update_time(update)
    if uniform is not None:
        row = np.zeros(groups)
        check_quantize(x, row, row, group_axis, levels, uniform)
    return _Options(groups, group_axis, levels, float(momentum), update)


def _arrays(*trees):
    """The trees as JAX arrays, as different on each device as one is: gradients of weights are summed."""
    arrays = jax.tree.map(jnp.asarray, trees)
    return alike(arrays, arrays)


def _norm_backward_kernel(grad_y, saved, levels, impl, interpret):
    (q, alpha, beta), C = saved.x, grad_y.shape[-1]
    channels = lambda v: jnp.repeat(v.astype(jnp.float32), C // len(v))
    rows = lambda v: v.reshape(-1, v.shape[-1])
    dx, *each = _kernels(impl).norm_backward(
        rows(grad_y), rows(q), channels(alpha / (levels - 1)), channels(beta), rows(saved.mean),
        rows(saved.rstd), saved.weight, interpret=interpret,
    )  # fmt: skip
    return dx.reshape(grad_y.shape), *each


def _kernel_or_xla(impl, interpret, opt):
    """The implementation of a fused step. No kernel is the default: none was measured to pay."""
    narrow = None if opt.levels <= 256 else "stores at most 256 levels"
    heads = None if opt.group_axis == -1 else "groups channels (group_axis=-1) only"
    obstacles = {
        "hopper": "does not exist: nothing here feeds tensor cores",
        "triton": heads,
        "tpu": heads or narrow,
    }
    return choose_impl(impl, interpret=interpret, obstacles=obstacles)


def _kernels(impl):
    if impl == "triton":
        from accel.kernels import mesa_triton

        return mesa_triton
    from accel.kernels import mesa_tpu

    return mesa_tpu
