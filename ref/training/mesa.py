"""Exact forward pass, 8-bit copies of the activations for the backward pass: Mesa.

Source: Pan et al. 2021 (arXiv 2111.11124): section 3.1 (what each layer keeps) and the repository
(ziplab/Mesa). How an activation becomes integers and comes back (section 3.2, equations 1 to 7) is in
ref/blocks/stored.py; what a network keeps in all, and what fits a budget, in ref/models/vit_memory.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.mlp import gelu, gelu_grad, linear
from ref.blocks.norms import layer_norm
from ref.blocks.quantize import RangeState, check_finite, init_range, update_range
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.stored import (
    Saved,
    check_levels,
    check_update_time,
    dequantize_groups,
    overflow_fraction,
    pack_groups,
    quantize_groups,
    restore,
    store,
    unpack_groups,
)
from ref.blocks.transformer import BlockParams, init_block
from ref.dims import dims, float64
from ref.example import Example
from ref.models.vit_memory import MesaConfig, activation_bytes, largest_batch, largest_width

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

LAYERS = ("linear", "matmul", "softmax", "gelu", "layer_norm")


class SavedNorm(NamedTuple):
    """What layer norm keeps: its input; mean and rstd [..., 1] float32, exact; weight [C], the live one."""

    x: Saved
    mean: np.ndarray
    rstd: np.ndarray
    weight: np.ndarray


class SavedLinear(NamedTuple):
    """What a linear map keeps: its input; w [in, out] is the live parameter, not a copy."""

    x: Saved
    w: np.ndarray


class SavedMatmul(NamedTuple):
    """What a product of two activations keeps: both."""

    a: Saved
    b: Saved


class BlockStates(NamedTuple):
    """A running range for each of the eleven tensors that a block keeps, in the order of the forward pass.

    x1, x2: inputs of the norms; h1: of q, k and v (one tensor, kept once); q, k, p, v: of the two products,
    p also being what softmax keeps; o, h2, g: of the maps w_o, fc1, fc2; u: of GELU.
    """

    x1: RangeState
    h1: RangeState
    q: RangeState
    k: RangeState
    p: RangeState
    v: RangeState
    o: RangeState
    x2: RangeState
    h2: RangeState
    u: RangeState
    g: RangeState


class SavedBlock(NamedTuple):
    """What a block keeps; a float array in place of a `Saved` where the policy leaves a layer exact."""

    x1: SavedNorm
    h1: Saved
    q: Saved
    k: Saved
    p: Saved
    v: Saved
    o: Saved
    x2: SavedNorm
    h2: Saved
    u: Saved
    g: Saved
    params: BlockParams


@dataclass(frozen=True)
class MesaPolicy:
    """What is compressed, and how. groups: ranges a tensor, None = one a head, 1 = one a layer.

    levels, momentum, update: as `store`.
    layers: any of "linear", "matmul", "softmax", "gelu", "layer_norm"; what serves two layers (the attention
    map) is compressed if one of them is.
    """

    layers: tuple[str, ...] = LAYERS
    groups: int | None = None
    levels: int = 256
    momentum: float = 0.9
    update: str = "before"

    def __post_init__(self):
        if unknown := set(self.layers) - set(LAYERS):
            raise ValueError(f"layers must be among {', '.join(LAYERS)}, got {sorted(unknown)}")
        check_levels(self.levels)
        check_update_time(self.update)


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
    saved, state = store(x, state, groups, group_axis, levels, momentum, update, uniform)
    return linear(x, w, b), SavedLinear(saved, w), state


def mesa_linear_backward(grad_y, saved: SavedLinear, *, group_axis=-1, levels=256):
    """(grad_y w^T, x^T grad_y of the restored x, sum of grad_y over the tokens)."""
    dims(grad_y=(grad_y, "... F"), w=(saved.w, "C F"))
    grad_y = float64(grad_y)
    x = restore(saved.x, group_axis=group_axis, levels=levels)
    return (grad_y @ float64(saved.w).T, *_weight_gradients(x, grad_y))


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
    saved_a, state_a = store(a, state_a, groups, group_axis, levels, momentum, update, u_a)
    saved_b, state_b = store(b, state_b, groups, group_axis, levels, momentum, update, u_b)
    return float64(a) @ float64(b), SavedMatmul(saved_a, saved_b), state_a, state_b


def mesa_matmul_backward(grad_y, saved: SavedMatmul, *, group_axis=-3, levels=256):
    """(grad_y b^T, a^T grad_y) of the restored a and b."""
    a, b = (restore(s, group_axis=group_axis, levels=levels) for s in (saved.a, saved.b))
    grad_y = float64(grad_y)
    return grad_y @ np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2) @ grad_y


def mesa_softmax(
    x, state: RangeState, *, groups, group_axis=-1, levels=256, momentum=0.9, update="before", uniform=None
):
    """(softmax(x) over the last axis, Saved of it, state). The repository keeps x too; it is not needed."""
    y = softmax(x)
    saved, state = store(y, state, groups, group_axis, levels, momentum, update, uniform)
    return y, saved, state


def mesa_softmax_backward(grad_y, saved: Saved, *, group_axis=-1, levels=256):
    """y (grad_y - sum(grad_y y)) of the restored output y."""
    return softmax_vjp(restore(saved, group_axis=group_axis, levels=levels), float64(grad_y))


def mesa_gelu(
    x, state: RangeState, *, groups, group_axis=-1, levels=256, momentum=0.9, update="before", uniform=None
):
    """(x Phi(x), Saved of x, state)."""
    saved, state = store(x, state, groups, group_axis, levels, momentum, update, uniform)
    return gelu(x), saved, state


def mesa_gelu_backward(grad_y, saved: Saved, *, group_axis=-1, levels=256):
    """grad_y times the derivative of GELU at the restored input."""
    return float64(grad_y) * gelu_grad(restore(saved, group_axis=group_axis, levels=levels))


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
    saved, state = store(x, state, groups, group_axis, levels, momentum, update, uniform)
    return layer_norm(x, weight, bias, eps=eps), SavedNorm(saved, *_statistics(x, eps), weight), state


def mesa_layer_norm_backward(grad_y, saved: SavedNorm, *, group_axis=-1, levels=256):
    """(grad_x, grad_weight, grad_bias) at x^ = (restored x - mean) rstd."""
    grad_y, mean, rstd = float64(grad_y, saved.mean, saved.rstd)
    xh = (restore(saved.x, group_axis=group_axis, levels=levels) - mean) * rstd
    g = grad_y * saved.weight
    grad_x = rstd * (g - g.mean(axis=-1, keepdims=True) - xh * (g * xh).mean(axis=-1, keepdims=True))
    rows = tuple(range(g.ndim - 1))
    return grad_x, (grad_y * xh).sum(axis=rows), grad_y.sum(axis=rows)


def mesa_block(
    x,
    params: BlockParams,
    states: BlockStates,
    *,
    num_heads,
    policy: MesaPolicy = MesaPolicy(),
    uniform: BlockStates | None = None,
    eps=1e-5,
):
    """(y, SavedBlock, states) of a pre-norm block, x [..., L, C]; y is exact whatever the policy.

    states: as `init_states` or the last call returned them. uniform: noise for each of the eleven tensors,
    as `draw_noise` draws it, or None for rounding to nearest.
    Raises: ValueError naming the argument at fault.
    """
    groups = block_groups(x, params, num_heads, policy)
    check_finite("x", x)
    kept, moved, p = {}, {}, params

    def keep(name, value):
        if not is_compressed(name, policy):
            kept[name], moved[name] = value, getattr(states, name)
            return
        u = None if uniform is None else getattr(uniform, name)
        how = (groups, axis_of(name), policy.levels, policy.momentum, policy.update, u)
        kept[name], moved[name] = store(value, getattr(states, name), *how)

    def norm(name, value, scale, bias):
        keep(name, value)
        kept[name] = SavedNorm(kept[name], *_statistics(value, eps), scale)
        return layer_norm(value, scale, bias, eps=eps)

    x = float64(x)
    h1 = norm("x1", x, p.ln1_scale, p.ln1_bias)
    heads = lambda w, b: split_heads(linear(h1, w, b), num_heads)
    q, k, v = heads(p.w_q, p.b_q), heads(p.w_k, p.b_k), heads(p.w_v, p.b_v)
    attention = softmax(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]))
    o = join_heads(attention @ v)
    x2 = x + linear(o, p.w_o, p.b_o)
    h2 = norm("x2", x2, p.ln2_scale, p.ln2_bias)
    u = linear(h2, p.w_fc1, p.b_fc1)
    g = gelu(u)
    rest = {"h1": h1, "q": q, "k": k, "p": attention, "v": v, "o": o, "h2": h2, "u": u, "g": g}
    for name, value in rest.items():
        keep(name, value)
    return x2 + linear(g, p.w_fc2, p.b_fc2), SavedBlock(**kept, params=params), BlockStates(**moved)


def mesa_block_backward(grad_y, saved: SavedBlock, *, num_heads, policy: MesaPolicy = MesaPolicy()):
    """(grad_x, gradients as BlockParams) from what the block kept, for grad_y [..., L, C]."""
    p, levels = saved.params, policy.levels
    restored = lambda name: restore(getattr(saved, name), group_axis=axis_of(name), levels=levels)

    def back_linear(name, w, b, grad):
        grad_w, grad_b = _weight_gradients(restored(name), grad)
        return grad @ float64(w).T, grad_w, None if b is None else grad_b

    grad_y = float64(grad_y)
    grad_g, w_fc2, b_fc2 = back_linear("g", p.w_fc2, p.b_fc2, grad_y)
    grad_h2, w_fc1, b_fc1 = back_linear("h2", p.w_fc1, p.b_fc1, grad_g * gelu_grad(restored("u")))
    grad, s2, b2 = mesa_layer_norm_backward(grad_h2, saved.x2, levels=levels)
    grad_x2 = grad_y + grad
    grad_o, w_o, b_o = back_linear("o", p.w_o, p.b_o, grad_x2)
    grad_o = split_heads(grad_o, num_heads)
    q, k, v, attention = (restored(name) for name in ("q", "k", "v", "p"))
    swap = lambda a: np.swapaxes(a, -1, -2)
    grad_s = softmax_vjp(attention, grad_o @ swap(v)) / np.sqrt(q.shape[-1])
    parts = {"q": grad_s @ k, "k": swap(grad_s) @ q, "v": swap(attention) @ grad_o}
    grad_h1, grads = 0.0, {}
    for n, part in parts.items():
        w, b = getattr(p, f"w_{n}"), getattr(p, f"b_{n}")
        back, grads[f"w_{n}"], grads[f"b_{n}"] = back_linear("h1", w, b, join_heads(part))
        grad_h1 = grad_h1 + back
    grad, s1, b1 = mesa_layer_norm_backward(grad_h1, saved.x1, levels=levels)
    return grad_x2 + grad, BlockParams(
        ln1_scale=s1, ln1_bias=b1, **grads, w_o=w_o, b_o=b_o, ln2_scale=s2, ln2_bias=b2, w_fc1=w_fc1,
        b_fc1=b_fc1, w_fc2=w_fc2, b_fc2=b_fc2,
    )  # fmt: skip


def init_states(num_heads, *, policy=MesaPolicy()):
    """BlockStates before the first step: G ranges for each tensor."""
    one = init_range((policy.groups or num_heads,))
    return BlockStates(*[one] * len(BlockStates._fields))


def draw_noise(rng, shape, params, *, num_heads):
    """BlockStates of uniform noise in [0, 1) for x of that shape [..., L, C]; rng: NumPy Generator."""
    return BlockStates(*[rng.random(s) for s in saved_shapes(shape, params, num_heads)])


def axis_of(name):
    """Heads for what attention keeps, channels for the rest."""
    return -3 if name in ("q", "k", "p", "v") else -1


def is_compressed(name, policy):
    """Whether the tensor of that name is kept in few bits under the policy."""
    needs = {
        "x1": {"layer_norm"}, "x2": {"layer_norm"}, "q": {"matmul"}, "k": {"matmul"}, "v": {"matmul"},
        "p": {"matmul", "softmax"}, "u": {"gelu"},
    }  # fmt: skip
    return bool(needs.get(name, {"linear"}) & set(policy.layers))


def saved_shapes(shape, params, num_heads):
    """Shapes of the eleven tensors of a block for x of that shape, in the order of BlockStates."""
    lead, L, C, F = shape[:-2], shape[-2], shape[-1], params.w_fc1.shape[-1]
    heads, attention = (*lead, num_heads, L, C // num_heads), (*lead, num_heads, L, L)
    plain, wide = (*lead, L, C), (*lead, L, F)
    return plain, plain, heads, heads, attention, heads, plain, plain, plain, wide, wide


def block_groups(x, params, num_heads, policy):
    """The number of groups of a block. Raises: ValueError if width, heads and groups do not fit."""
    n = dims(x=(x, "... L C"), w_q=(params.w_q, "C C"), w_fc1=(params.w_fc1, "C F"))
    if n["C"] % num_heads:
        raise ValueError(f"num_heads must divide the width {n['C']}, got {num_heads}")
    groups = policy.groups or num_heads
    for what, size in (("heads", num_heads), ("width", n["C"]), ("MLP width", n["F"])):
        if size % groups:
            raise ValueError(f"groups must divide the {what} {size}, got {groups}")
    return groups


def _statistics(x, eps):
    """Mean and 1 / deviation of the last axis, [..., 1] float32."""
    x = float64(x)
    mean = x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + eps)
    return mean.astype(np.float32), rstd.astype(np.float32)


def _weight_gradients(x, grad_y):
    """(x^T grad_y, sum of grad_y) over all tokens."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    return rows.T @ grads, grads.sum(axis=0)


def example(seed=0):
    """Four digits as 4 x 4 patches of 2 x 2 pixels, embedded by a drawn map, in one block of width 12."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][4 * seed : 4 * seed + 4] / 16.0
    patches = images.reshape(4, 4, 2, 4, 2).swapaxes(2, 3).reshape(4, 16, 4)
    x = patches @ rng.normal(0, 0.7, (4, 12))
    params = init_block(rng, 12, 24, std=0.3)
    states = init_states(3)
    state, one = init_range((3,)), {"groups": 3}
    scores = rng.standard_normal((4, 3, 16, 16))
    heads = split_heads(x, 3)
    keys = np.swapaxes(heads, -1, -2)
    grad = rng.standard_normal(x.shape)
    _, lin, _ = mesa_linear(x, params.w_q, params.b_q, state, **one)
    _, pair, _, _ = mesa_matmul(heads, keys, state, state, **one)
    _, soft, _ = mesa_softmax(scores, state, group_axis=-3, **one)
    _, bent, _ = mesa_gelu(x, state, **one)
    _, norm, _ = mesa_layer_norm(x, params.ln1_scale, params.ln1_bias, state, **one)
    _, kept, _ = mesa_block(x, params, states, num_heads=3)
    # No diff_args forward: the gradients are those of the rounded activations, as their own tests say.
    return [
        Example("pack_groups", (x,), one, (0,)),
        Example("update_range", (state, pack_groups(x, groups=3)), {"momentum": 0.9, "axis": 0}),
        Example("quantize_groups", (x, bent.alpha, bent.beta)),
        Example("dequantize_groups", (bent.q, bent.alpha, bent.beta), {}, (1, 2)),
        Example("mesa_linear", (x, params.w_q, params.b_q, state), one),
        Example("mesa_linear_backward", (grad, lin), {}, (0,)),
        Example("mesa_matmul", (heads, keys, state, state), one),
        Example("mesa_matmul_backward", (scores, pair), {}, (0,)),
        Example("mesa_softmax", (scores, state), {**one, "group_axis": -3}),
        Example("mesa_softmax_backward", (scores, soft), {"group_axis": -3}, (0,)),
        Example("mesa_gelu", (x, state), one),
        Example("mesa_gelu_backward", (grad, bent), {}, (0,)),
        Example("mesa_layer_norm", (x, params.ln1_scale, params.ln1_bias, state), one),
        Example("mesa_layer_norm_backward", (grad, norm), {}, (0,)),
        Example("mesa_block", (x, params, states), {"num_heads": 3}),
        Example("mesa_block_backward", (grad, kept), {"num_heads": 3}, (0,)),
    ]
