"""Five blocks drawn small: FNet, ALBERT, long-short range attention, MobileViT, the separable MLP.

Source: A Survey of Techniques for Optimizing Transformer Inference, 2023 (arXiv 2307.07982), which names
them; Lee-Thorp et al. 2022 (FNet, arXiv 2105.03824), Lan et al. 2020 (ALBERT, arXiv 1909.11942), Wu et al.
2020 (Lite Transformer, arXiv 2004.11886). The last two and the short-range convolution are in
ref/models/mobilevit.py, ref/blocks/separable.py and ref/blocks/light_conv.py. Weights are [in, out].
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.conv import BN, ConvBN
from ref.blocks.light_conv import light_conv, light_conv_vjp
from ref.blocks.mlp import linear, linear_vjp, mlp, mlp_vjp, sigmoid
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.optim import tree_map
from ref.blocks.separable import (
    SeparableParams,
    hard_swish,
    init_separable_mlp,
    separable_mlp,
    separable_mlp_vjp,
)
from ref.blocks.transformer import (
    BlockParams,
    SelfAttentionParams,
    init_block,
    self_attention,
    self_attention_vjp,
    transformer_block,
    transformer_block_vjp,
)
from ref.checks import check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.block_cost import Cost, block_cost, even_width
from ref.models.mobilevit import MobileViTParams, init_mobilevit, mobilevit_block, mobilevit_block_vjp

__all__ = [
    "BN", "KERNELS", "AlbertParams", "BlockParams", "ConvBN", "Cost", "FNetParams", "LsraParams",
    "MobileViTParams", "SelfAttentionParams", "SeparableParams", "albert_encoder", "albert_encoder_vjp",
    "block_cost", "example", "fnet_block", "fnet_block_vjp", "fourier_mix", "hard_swish", "init_albert",
    "init_fnet", "init_lsra", "init_mobilevit", "init_separable_mlp", "light_conv", "light_conv_vjp",
    "lsra_block", "lsra_block_vjp", "lsra_branches", "lsra_kernel", "mobilevit_block",
    "mobilevit_block_vjp", "separable_mlp", "separable_mlp_vjp",
]  # fmt: skip

KERNELS = (3, 7, 15, 31)  # of the short-range branch, growing with depth (as recalled; our choice)


class FNetParams(NamedTuple):
    """A transformer block without attention: norms [D], MLP [D, F] and [F, D]."""

    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray


class AlbertParams(NamedTuple):
    """w_in [E, D], b_in [D] from the narrow embedding; groups of layers that share their weights."""

    w_in: np.ndarray
    b_in: np.ndarray
    groups: tuple[BlockParams, ...]


class LsraParams(NamedTuple):
    """Both branches of width D/2 = h, and an MLP of width D.

    w_g [h, 2 h] (value, then gate); kernel [c, k], or [h, c, k] to make one from every token; w_z [h, h].
    """

    attention: SelfAttentionParams
    w_g: np.ndarray
    b_g: np.ndarray
    kernel: np.ndarray
    w_z: np.ndarray
    b_z: np.ndarray
    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray


def fourier_mix(x):
    """Re FFT over tokens and channels, without scaling: x [..., L, D] -> the same.

    Linear and its own transpose, hence its own backward pass. No mask exists: padding is mixed in.
    """
    n = dims(x=(x, "... L D"))
    if n["L"] < 1 or n["D"] < 1:
        raise ValueError(f"x must have at least one token and one channel, got {list(x.shape)}")
    return np.fft.fft2(float64(x)).real


def fnet_block(x, params: FNetParams, *, eps=1e-12):
    """h = LN(x + fourier_mix(x)), y = LN(h + MLP(h)), tanh GELU: x [..., L, D] -> the same."""
    p = params
    h = layer_norm(x + fourier_mix(x), p.ln1_scale, p.ln1_bias, eps=eps)
    return _feed(h, p, eps, "gelu_tanh")


def fnet_block_vjp(x, params: FNetParams, dy, *, eps=1e-12):
    """(dx, dparams: FNetParams) of `fnet_block` for dy [..., L, D]."""
    p = params
    mixed = x + fourier_mix(x)
    h = layer_norm(mixed, p.ln1_scale, p.ln1_bias, eps=eps)
    dh, grads = _feed_vjp(h, p, float64(dy), eps, "gelu_tanh")
    d, *norm = layer_norm_vjp(mixed, p.ln1_scale, dh, eps=eps)
    return d + fourier_mix(d), FNetParams(*norm, **grads)


def albert_encoder(x, params: AlbertParams, *, num_heads, num_layers, eps=1e-12, mask=None):
    """num_layers post-norm layers from few weights: x [..., L, E] -> [..., L, D].

    Layer i uses group i * groups // num_layers. mask: bool, True = visible, broadcastable to [..., H, L, L].
    Raises: ValueError for fewer layers than groups, or heads that do not divide D.
    """
    return _albert_states(x, params, num_heads, num_layers, eps, mask)[-1]


def albert_encoder_vjp(x, params: AlbertParams, dy, *, num_heads, num_layers, eps=1e-12, mask=None):
    """(dx, dparams: AlbertParams); the gradient of a shared weight is the sum over its uses."""
    states = _albert_states(x, params, num_heads, num_layers, eps, mask)
    options = {**_post_norm(num_heads, eps), "mask": mask}
    grads, d = [None] * len(params.groups), float64(dy)
    for i in reversed(range(num_layers)):
        g = i * len(grads) // num_layers
        d, own = transformer_block_vjp(states[i], params.groups[g], d, **options)
        grads[g] = own if grads[g] is None else tree_map(np.add, grads[g], own)
    dx, dw, db = linear_vjp(float64(x), params.w_in, d)
    return dx, AlbertParams(dw, db, tuple(grads))


def lsra_branches(x, params: LsraParams, *, num_heads, causal=False, mask=None):
    """[attention on the first half of the channels, convolution on the second]: [..., L, D] -> the same."""
    far, near = _halves(x, params, num_heads)
    far = self_attention(far, params.attention, num_heads=num_heads, causal=causal, mask=mask)
    u, _, _ = _gated(near, params)
    return np.concatenate([far, linear(_convolve(u, params, causal), params.w_z, params.b_z)], axis=-1)


def lsra_block(x, params: LsraParams, *, num_heads, causal=False, mask=None):
    """h = LN(x + branches(x)), y = LN(h + MLP(h)) with ReLU and an MLP as wide as x: [..., L, D] -> same.

    mask: bool, True = visible, for the attention; the convolution does not know of padding.
    Raises: ValueError for odd D, or heads that do not divide D / 2.
    """
    p = params
    mixed = x + lsra_branches(x, p, num_heads=num_heads, causal=causal, mask=mask)
    return _feed(layer_norm(mixed, p.ln1_scale, p.ln1_bias), p, 1e-5, "relu")


def lsra_block_vjp(x, params: LsraParams, dy, *, num_heads, causal=False, mask=None):
    """(dx, dparams: LsraParams) of `lsra_block` for dy [..., L, D]."""
    p, options = params, {"num_heads": num_heads, "causal": causal, "mask": mask}
    mixed = x + lsra_branches(x, p, **options)
    dh, grads = _feed_vjp(layer_norm(mixed, p.ln1_scale, p.ln1_bias), p, float64(dy), 1e-5, "relu")
    d, grads["ln1_scale"], grads["ln1_bias"] = layer_norm_vjp(mixed, p.ln1_scale, dh)
    (far, near), half = _halves(x, p, num_heads), x.shape[-1] // 2
    dfar, dattention = self_attention_vjp(far, p.attention, d[..., :half], **options)
    u, value, gate = _gated(near, p)
    dz, grads["w_z"], grads["b_z"] = linear_vjp(_convolve(u, p, causal), p.w_z, d[..., half:])
    du, dkernel = light_conv_vjp(u, _token_kernel(u, p), dz, causal=causal)
    if p.kernel.ndim == 3:
        flat = dkernel.reshape(*u.shape[:-1], -1)
        through, dkernel, _ = linear_vjp(u, p.kernel.reshape(half, -1), flat, bias=False)
        du, dkernel = du + through, dkernel.reshape(p.kernel.shape)
    du = np.concatenate([du * gate, du * value * gate * (1 - gate)], axis=-1)
    dnear, grads["w_g"], grads["b_g"] = linear_vjp(near, p.w_g, du)
    dparams = LsraParams(attention=SelfAttentionParams(**dattention), kernel=dkernel, **grads)
    return d + np.concatenate([dfar, dnear], axis=-1), dparams


def lsra_kernel(layer, depth):
    """Taps of the short-range branch in layer 0..depth-1: 3, 7, 15, 31, a quarter of the depth each."""
    if not 0 <= layer < depth:
        raise ValueError(f"layer must be in 0..{depth - 1}, got {layer}")
    return KERNELS[layer * len(KERNELS) // depth]


def init_fnet(rng, dim, hidden, *, std=0.02):
    """FNetParams drawn by a NumPy Generator: normal weights, zero biases, unit norms."""
    block = init_block(rng, dim, hidden, std=std)
    return FNetParams(**{name: getattr(block, name) for name in FNetParams._fields})


def init_albert(rng, embed, dim, hidden, *, groups=1, std=0.02):
    """AlbertParams with an embedding of width `embed`."""
    blocks = tuple(init_block(rng, dim, hidden, std=std) for _ in range(groups))
    return AlbertParams(std * rng.standard_normal((embed, dim)), np.zeros(dim), blocks)


def init_lsra(rng, dim, *, heads, kernel=3, dynamic=False, std=0.02):
    """LsraParams of width dim; heads: of the convolution. The kernels start as plain means."""
    half = even_width(dim) // 2
    block, narrow = init_block(rng, dim, dim, std=std), init_block(rng, half, half, std=std)
    return LsraParams(
        attention=SelfAttentionParams(
            **{name: getattr(narrow, name) for name in SelfAttentionParams._fields}
        ),
        w_g=std * rng.standard_normal((half, dim)),
        b_g=np.zeros(dim),
        kernel=np.zeros((half, heads, kernel) if dynamic else (heads, kernel)),
        w_z=std * rng.standard_normal((half, half)),
        b_z=np.zeros(half),
        **{name: getattr(block, name) for name in FNetParams._fields},
    )


def _feed(h, p, eps, activation):
    out = mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, activation=activation)
    return layer_norm(h + out, p.ln2_scale, p.ln2_bias, eps=eps)


def _feed_vjp(h, p, dy, eps, activation):
    """(dh, gradients by name) of `_feed`."""
    weights = p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2
    d, *norm = layer_norm_vjp(h + mlp(h, *weights, activation=activation), p.ln2_scale, dy, eps=eps)
    dh, *maps = mlp_vjp(h, *weights, d, activation=activation)
    names = ("w_fc1", "b_fc1", "w_fc2", "b_fc2", "ln2_scale", "ln2_bias")
    return d + dh, dict(zip(names, (*maps, *norm), strict=True))


def _post_norm(num_heads, eps):
    return {"num_heads": num_heads, "norm": "post", "eps": eps, "activation": "gelu_tanh"}


def _albert_states(x, params, num_heads, num_layers, eps, mask):
    """The input of every layer, and the output of the last."""
    D = dims(x=(x, "... L E"), w_in=(params.w_in, "E D"), b_in=(params.b_in, "D"))["D"]
    if not 1 <= len(params.groups) <= num_layers:
        raise ValueError(f"num_layers must be at least the {len(params.groups)} groups, got {num_layers}")
    check_num_heads(D, num_heads)
    states = [linear(x, params.w_in, params.b_in)]
    for i in range(num_layers):
        group = params.groups[i * len(params.groups) // num_layers]
        states.append(transformer_block(states[-1], group, mask=mask, **_post_norm(num_heads, eps)))
    return states


def _halves(x, params, num_heads):
    D = even_width(dims(x=(x, "... L D"))["D"])
    check_num_heads(D // 2, num_heads)
    dims(w_g=(params.w_g, f"{D // 2} {D}"), w_z=(params.w_z, f"{D // 2} {D // 2}"))
    return float64(x)[..., : D // 2], float64(x)[..., D // 2 :]


def _gated(near, p):
    """(value * gate, value, gate) of the short-range branch: a gated linear unit."""
    value, logits = np.split(linear(near, p.w_g, p.b_g), 2, axis=-1)
    gate = sigmoid(logits)
    return value * gate, value, gate


def _token_kernel(u, p):
    """kernel [c, k] as it is, or one [c, k] from every token."""
    if p.kernel.ndim == 2:
        return p.kernel
    return linear(u, p.kernel.reshape(u.shape[-1], -1)).reshape(*u.shape[:-1], *p.kernel.shape[1:])


def _convolve(u, p, causal):
    return light_conv(u, _token_kernel(u, p), causal=causal)


def example(seed=0):
    """Hidden states of SmolLM2 through the blocks for tokens, digits through those for maps."""
    from ref.data import digits, hidden_states

    rng = np.random.default_rng(seed)
    x = hidden_states()[1:9, :12].reshape(2, 4, 12)
    x = x / x.std()
    image = digits()[0][seed : seed + 2, :4, :4, None] / 16 + 0.1 * rng.standard_normal((2, 4, 4, 6))
    albert, lsra = init_albert(rng, 12, 8, 16, std=0.3), init_lsra(rng, 12, heads=2, std=0.3)
    lsra = lsra._replace(kernel=rng.standard_normal((2, 3)))
    dynamic = lsra._replace(kernel=rng.standard_normal((6, 2, 3)) / 2)
    separable = init_separable_mlp(rng, 6, ratio=2, squeeze=True)
    return [
        Example("fourier_mix", (x,), {}, (0,)),
        Example("fnet_block", (x, init_fnet(rng, 12, 20, std=0.3)), {}, (0, 1)),
        Example("albert_encoder", (x, albert), {"num_heads": 2, "num_layers": 3}, (0, 1)),
        Example("light_conv", (x, rng.standard_normal((3, 3))), {}, (0, 1)),
        Example("light_conv", (x, rng.standard_normal((2, 4, 3, 2))), {"causal": True}, (0, 1)),
        Example("lsra_block", (x, lsra), {"num_heads": 2, "causal": True}, (0, 1)),
        Example("lsra_block", (x, dynamic), {"num_heads": 3}, (0, 1)),
        Example("mobilevit_block", (image, init_mobilevit(rng, 6, 8, std=0.3)), {"num_heads": 2}, (0, 1)),
        Example("separable_mlp", (image, separable), {"squeeze": True}, (0, 1)),
        Example("hard_swish", (5 * x,), {}, (0,)),
    ]
