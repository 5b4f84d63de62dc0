"""EfficientViT: heads that each read their own slice of the channels, in a cascade; one attention a sandwich.

Source: Liu et al. 2023 (arXiv 2305.07027), equations 1 to 3, and the code released with it, which
decides where the paper is short: the position bias, the windows, ReLU before the projection. Maps are
[B, H, W, C]; batch norm uses its stored statistics. Stem, downsampling and head: ref/models/pyramid.py.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.conv import (
    BN,
    Conv,
    ConvBN,
    FFNParams,
    PatchMergingParams,
    conv_bn,
    conv_bn_vjp,
    fold_conv_bn,
    patch_merging,
    squeeze_excite,
)
from ref.blocks.maps import from_windows, map_rows, to_windows
from ref.blocks.mlp import relu
from ref.blocks.softmax import softmax, softmax_vjp
from ref.dims import dims, float64
from ref.example import Example
from ref.models.efficientvit import (
    VARIANTS,
    CGAParams,
    EfficientViTBlockParams,
    EfficientViTConfig,
    EfficientViTParams,
    StageParams,
    check_kernels,
    efficientvit_config,
    efficientvit_cost,
    init_block,
    init_efficientvit,
)
from ref.models.pyramid import (
    DownParams,
    HeadParams,
    fold_pyramid,
    num_parameters,
    pyramid_forward,
    random_params,
    residual_depthwise,
    residual_ffn,
)
from ref.models.pyramid_cost import OpCost, transformer_block_cost

__all__ = [
    "BN", "VARIANTS", "CGAParams", "Conv", "ConvBN", "DownParams", "EfficientViTBlockParams",
    "EfficientViTConfig", "EfficientViTParams", "FFNParams", "HeadParams", "OpCost", "PatchMergingParams",
    "StageParams", "attention_bias_index", "cascaded_group_attention", "cascaded_group_attention_backward",
    "conv_bn", "efficientvit_block", "efficientvit_config", "efficientvit_cost", "efficientvit_forward",
    "example", "fold_conv_bn", "fold_efficientvit", "group_attention_maps", "independent_group_attention",
    "init_efficientvit", "num_parameters", "patch_merging", "squeeze_excite", "transformer_block_cost",
    "window_attention",
]  # fmt: skip


def attention_bias_index(height, width=None):
    """(index int32 [N, N], offsets): which bias two pixels of a height x width map share, N = height width.

    The id of (|dy|, |dx|) is |dy| width + |dx|: the order in which they are first met, row by row.
    Raises: ValueError for a side below 1.
    """
    width = height if width is None else width
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} x {width}")
    row, col = np.divmod(np.arange(height * width), width)
    index = np.abs(row[:, None] - row) * width + np.abs(col[:, None] - col)
    return index.astype(np.int32), height * width


def cascaded_group_attention(x, params: CGAParams, *, key_dim, kernels):
    """Every head attends within its slice of the channels plus the last head's output (eq. 2 and 3).

    Args: x [B, H, W, C]; C must be a multiple of the heads h; the bias must be made for H x W.
      key_dim: channels k of queries and keys. kernels: of the depthwise convolution on each head's queries;
      the first h are used.
    Returns: [B, H, W, C]. Raises: ValueError naming what does not fit.
    """
    heads = _run_heads(x, params, key_dim, kernels, cascade=True)
    return conv_bn(relu(np.concatenate([head.o for head in heads], axis=-1)), params.proj)


def independent_group_attention(x, params: CGAParams, *, key_dim, kernels):
    """The same without the cascade: every head sees its own slice only. The baseline of the ablation."""
    heads = _run_heads(x, params, key_dim, kernels, cascade=False)
    return conv_bn(relu(np.concatenate([head.o for head in heads], axis=-1)), params.proj)


def group_attention_maps(x, params: CGAParams, *, key_dim, kernels, cascade=True):
    """The attention [B, h, N, N] of every head, rows summing to 1."""
    return np.stack([head.p for head in _run_heads(x, params, key_dim, kernels, cascade)], axis=1)


def cascaded_group_attention_backward(dy, x, params: CGAParams, *, key_dim, kernels):
    """(dx, dparams) for dy [B, H, W, C]; gradients of running statistics are zero.

    A head's output is used twice, by the projection and by the next head, so the heads are walked from the
    last to the first, carrying what comes back through the input of the one after.
    """
    dims(dy=(dy, "B H W C"), x=(x, "B H W C"))
    heads = _run_heads(x, params, key_dim, kernels, cascade=True)
    joined = np.concatenate([head.o for head in heads], axis=-1)
    d, dproj = conv_bn_vjp(relu(joined), params.proj, float64(dy))
    d, carry, dx = np.split(d * (joined > 0), len(heads), axis=-1), 0.0, []
    dqkv, ddw, dbias = [], [], np.zeros_like(params.bias, dtype=np.float64)
    index, _ = attention_bias_index(*x.shape[1:3])
    for i in reversed(range(len(heads))):
        head, do = heads[i], map_rows(d[i] + carry)
        dlogits = softmax_vjp(head.p, do @ head.v.mT)
        np.add.at(dbias[i], index, dlogits.sum(axis=0))
        dk, dv = dlogits.mT @ head.q * key_dim**-0.5, head.p.mT @ do
        dq = (dlogits @ head.k * key_dim**-0.5).reshape(*x.shape[:3], key_dim)
        dq, g = conv_bn_vjp(head.z[..., :key_dim], params.dw[i], dq, padding=kernels[i] // 2, groups=key_dim)
        ddw.insert(0, g)
        dz = np.concatenate([map_rows(dq), dk, dv], axis=-1).reshape(head.z.shape)
        carry, g = conv_bn_vjp(head.f, params.qkv[i], dz)
        dqkv.insert(0, g)
        dx.insert(0, carry)
    return np.concatenate(dx, axis=-1), CGAParams(tuple(dqkv), tuple(ddw), dproj, dbias)


def window_attention(x, params: CGAParams, *, key_dim, kernels, window=7):
    """Cascaded attention on the whole map [B, R, R, C] if R <= window, else on each window x window tile.

    Tiles that stick out are filled with zeros on the right and below, and these take part in the softmax, as
    in the released code. Raises: ValueError for a map that is not square.
    """
    n = dims(x=(x, "B H W C"))
    R, options = n["H"], {"key_dim": key_dim, "kernels": kernels}
    if n["W"] != R or window < 1:
        raise ValueError(f"x must be a square map and window at least 1, got {R} x {n['W']}, {window=}")
    if R <= window:
        return cascaded_group_attention(x, params, **options)
    side = -(-R // window) * window
    x = to_windows(np.pad(float64(x), ((0, 0), (0, side - R), (0, side - R), (0, 0))), window)
    y = cascaded_group_attention(x.reshape(-1, window, window, n["C"]), params, **options)
    return from_windows(y.reshape(x.shape), side, side)[:, :R, :R]


def efficientvit_block(x, params: EfficientViTBlockParams, *, key_dim, kernels, window=7):
    """The sandwich (eq. 1), every layer residual: [B, R, R, C] -> [B, R, R, C]."""
    x = residual_ffn(residual_depthwise(float64(x), params.dw0), params.ffn0)
    x = x + window_attention(x, params.mixer, key_dim=key_dim, kernels=kernels, window=window)
    return residual_ffn(residual_depthwise(x, params.dw1), params.ffn1)


def efficientvit_forward(img, params: EfficientViTParams, cfg: EfficientViTConfig, *, features=False):
    """Logits [B, K] of img [B, H, H, 3], or with features the three maps, at strides 16, 32 and 64.

    Raises: ValueError for an image smaller than 16 pixels, not square, or of another size than the biases.
    """
    block = lambda x, p, i: efficientvit_block(
        x, p, key_dim=cfg.key_dims[i], kernels=cfg.kernels, window=cfg.windows[i]
    )
    return pyramid_forward(img, params, block, features=features)


def fold_efficientvit(params):
    """The same network with batch norm folded away: for inference, fewer operations."""
    return fold_pyramid(params)


class _Head(NamedTuple):
    """One head: input f and projection z as maps; q, k, v, attention p in rows; output o as a map."""

    f: np.ndarray
    z: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    p: np.ndarray
    o: np.ndarray


def _run_heads(x, params, key_dim, kernels, cascade):
    n = dims(x=(x, "B H W C"), bias=(params.bias, "h offsets"))
    h = len(params.qkv)
    check_kernels(n["C"], h, kernels)
    index, offsets = attention_bias_index(n["H"], n["W"])
    if params.bias.shape != (h, offsets):
        raise ValueError(
            f"bias must be [{h}, {offsets}] for a map of {n['H']} x {n['W']}, got {list(params.bias.shape)}"
        )
    width = n["C"] // h
    heads, chunks = [], [float64(x)[..., i * width : (i + 1) * width] for i in range(h)]
    for i, chunk in enumerate(chunks):
        dims(qkv=(params.qkv[i].w, f"{2 * key_dim + width} {width} 1 1"))
        dims(dw=(params.dw[i].w, f"{key_dim} 1 {kernels[i]} {kernels[i]}"))
        f = heads[-1].o + chunk if cascade and i else chunk
        z = conv_bn(f, params.qkv[i])
        q = conv_bn(z[..., :key_dim], params.dw[i], padding=kernels[i] // 2, groups=key_dim)
        q, k, v = map_rows(q), map_rows(z[..., key_dim : 2 * key_dim]), map_rows(z[..., 2 * key_dim :])
        p = softmax(q @ k.mT * key_dim**-0.5 + params.bias[i][index])
        heads.append(_Head(f, z, q, k, v, p, (p @ v).reshape(f.shape)))
    return heads


def example(seed=0):
    """Two handwritten digits at 32 pixels through a small network; its first map through one attention."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][seed : seed + 2] / 16
    img = np.repeat(np.kron(images, np.ones((4, 4)))[..., None], 3, axis=-1)
    cfg = EfficientViTConfig((16, 24, 24), (1, 1, 1), (2, 2, 3), (5, 3, 3), (4, 4, 4), num_classes=10)
    net = random_params(rng, init_efficientvit(rng, cfg, image=32))
    x = rng.standard_normal((2, 4, 4, 24))
    block = random_params(rng, init_block(rng, cfg, 2, 24, 4))
    tile = random_params(rng, init_block(rng, cfg, 2, 24, 3)).mixer
    options, down = {"key_dim": 4, "kernels": (5, 3, 3)}, net.stages[1].down.merge
    se = down.se_w1, down.se_b1, down.se_w2, down.se_b2
    return [
        Example("conv_bn", (img, net.stem[0]), {"stride": 2, "padding": 1}, (0, 1)),
        Example("cascaded_group_attention", (x, block.mixer), options, (0, 1)),
        Example("independent_group_attention", (x, block.mixer), options, (0, 1)),
        Example("group_attention_maps", (x, block.mixer), options, (0, 1)),
        Example("cascaded_group_attention_backward", (x[::-1], x, block.mixer), options),
        Example("window_attention", (x, tile), {**options, "window": 3}, (0, 1)),
        Example("squeeze_excite", (rng.standard_normal((2, 2, 2, 64)), *se), {}, (0, 1, 2, 3, 4)),
        Example("patch_merging", (rng.standard_normal((2, 3, 3, 16)), down), {}, (0, 1)),
        Example("efficientvit_block", (x, block), options, (0, 1)),
        Example("efficientvit_forward", (img, net, cfg), {}, (0, 1)),
    ]
