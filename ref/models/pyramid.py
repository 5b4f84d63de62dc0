"""The pyramid that EfficientViT and SHViT share: an overlapping stem of stride 16, three stages, a mean.

Source: Liu et al. 2023 (arXiv 2305.07027), section 3.2; Yun and Ro 2024 (arXiv 2401.16456); what
stands between the stages is in the code released with either. Maps are [B, H, W, C]; what a stage is made of
is the technique's own.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ref.blocks.conv import (
    BN,
    ConvBN,
    FFNParams,
    PatchMergingParams,
    batch_norm,
    conv2d,
    conv_bn,
    conv_ffn,
    fold_all,
    fold_conv_bn,
    init_bn,
    init_conv_bn,
    patch_merging,
)
from ref.blocks.mlp import linear, relu
from ref.dims import dims, float64

STRIDE = 16  # of the stem: four convolutions of stride 2


class DownParams(NamedTuple):
    """Between two stages: depthwise and FFN (both residual), patch merging, depthwise and FFN again."""

    dw0: ConvBN
    ffn0: FFNParams
    merge: PatchMergingParams
    dw1: ConvBN
    ffn1: FFNParams


class ResidualConv(NamedTuple):
    """A depthwise convolution w [C, 1, k, k], b [C] that holds the identity: `fold_residual_depthwise`."""

    w: np.ndarray
    b: np.ndarray


class HeadParams(NamedTuple):
    """Batch norm of C channels (None: folded into the map), then w [C, K] and b [K]."""

    bn: BN | None
    w: np.ndarray
    b: np.ndarray


def pyramid_forward(img, params, block, *, features=False):
    """Logits [B, K] of img [B, H, W, 3], or with features the three maps, at strides 16, 32 and 64.

    block: a function (x, block_params, stage number) -> x. params: stem, stages, head, and head_dist, the
    head trained by distillation, averaged with the other (or None).
    Raises: ValueError for an image smaller than 16 pixels.
    """
    n = dims(img=(img, "B H W 3"))
    if min(n["H"], n["W"]) < STRIDE:
        raise ValueError(f"img must have at least {STRIDE} pixels a side, got {n['H']} x {n['W']}")
    x, maps = stem(img, params.stem), []
    for i, stage in enumerate(params.stages):
        if stage.down is not None:
            x = downsample(x, stage.down)
        for p in stage.blocks:
            x = block(x, p, i)
        maps.append(x)
    if features:
        return tuple(maps)
    logits = classify(x, params.head)
    return logits if params.head_dist is None else (logits + classify(x, params.head_dist)) / 2


def stem(img, convs):
    """Four 3x3 convolutions of stride 2, ReLU between: [B, H, W, 3] -> [B, H/16, W/16, C], rounded up."""
    x = float64(img)
    for i, p in enumerate(convs):
        x = conv_bn(x if i == 0 else relu(x), p, stride=2, padding=1)
    return x


def residual_depthwise(x, p):
    """x + conv_bn(x): depthwise, size kept. p: ConvBN, Conv, or ResidualConv, which holds the identity."""
    options = {"padding": p.w.shape[-1] // 2, "groups": x.shape[-1]}
    if isinstance(p, ResidualConv):
        return conv2d(x, p.w, p.b, **options)
    return x + conv_bn(x, p, **options)


def residual_ffn(x, p):
    """x + ffn(x)."""
    return x + conv_ffn(x, p)


def downsample(x, p):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C']; no residual around the merging itself."""
    x = residual_ffn(residual_depthwise(x, p.dw0), p.ffn0)
    x = patch_merging(x, p.merge)
    return residual_ffn(residual_depthwise(x, p.dw1), p.ffn1)


def classify(x, p):
    """Mean over the map, batch norm, linear map: [B, H, W, C] -> [B, K]."""
    pooled = x.mean(axis=(1, 2))
    return linear(pooled if p.bn is None else batch_norm(pooled, p.bn), p.w, p.b)


def fold_pyramid(params, *, eps=1e-5):
    """The same network with every batch norm folded into the convolution before it, or the head after it.

    A residual depthwise convolution (a field whose name starts with dw) also takes in the identity.
    """
    if not isinstance(params, tuple) or isinstance(params, ConvBN):
        return fold_all(params, eps=eps)
    if isinstance(params, HeadParams):
        return fold_head(params, eps=eps)
    if not hasattr(params, "_fields"):
        return tuple(fold_pyramid(p, eps=eps) for p in params)
    absorbs = lambda name, p: name.startswith("dw") and isinstance(p, ConvBN)
    fold = lambda name, p: (
        fold_residual_depthwise(p, eps=eps) if absorbs(name, p) else fold_pyramid(p, eps=eps)
    )
    return type(params)(*map(fold, params._fields, params))


def fold_residual_depthwise(p: ConvBN, *, eps=1e-5):
    """ResidualConv(w, b) with x + conv_bn(x) = w * x + b: one is added in the middle of every kernel.

    Raises: ValueError unless p is depthwise with an odd kernel.
    """
    k = p.w.shape[-1]
    if p.w.shape[1:] != (1, k, k) or k % 2 == 0:
        raise ValueError(f"w must be depthwise [C, 1, k, k] with odd k, got {list(p.w.shape)}")
    w, b = fold_conv_bn(p, eps=eps)
    w[:, :, k // 2, k // 2] += 1
    return ResidualConv(w, b)


def fold_head(p, *, eps=1e-5):
    """w' = gain w, b' = b + (beta - mean gain) w with gain = gamma / sqrt(var + eps)."""
    if p.bn is None:
        return p
    bn = BN(*float64(*p.bn))
    gain = bn.gamma / np.sqrt(bn.var + eps)
    return HeadParams(None, gain[:, None] * p.w, p.b + (bn.beta - bn.mean * gain) @ p.w)


def se_width(channels):
    """Hidden width of the squeeze-and-excite: a quarter of 4 C, rounded to a multiple of 8."""
    return max(8, int(channels + 4) // 8 * 8)


def init_stem(rng, width):
    """Widths C/8, C/4, C/2, C. Raises: ValueError unless 8 divides C."""
    if width % 8:
        raise ValueError(f"dims[0] must be a multiple of 8 for the stem, got {width}")
    widths = (3, width // 8, width // 4, width // 2, width)
    return tuple(init_conv_bn(rng, a, b, 3) for a, b in pairwise(widths))


def init_depthwise(rng, C):
    """3x3 depthwise with gamma 0: the residual layer starts as the identity."""
    return init_conv_bn(rng, C, C, 3, groups=C, gamma=0.0)


def init_ffn(rng, C):
    """C -> 2 C -> C, the second with gamma 0."""
    return FFNParams(init_conv_bn(rng, C, 2 * C), init_conv_bn(rng, 2 * C, C, gamma=0.0))


def init_down(rng, C, C_out):
    """DownParams from C to C_out channels."""
    wide, R = 4 * C, se_width(C)
    w = lambda out, fan: rng.uniform(-1, 1, (out, fan, 1, 1)) / np.sqrt(fan)
    merge = PatchMergingParams(
        init_conv_bn(rng, C, wide), init_conv_bn(rng, wide, wide, 3, groups=wide),
        w(R, wide), np.zeros(R), w(wide, R), np.zeros(wide), init_conv_bn(rng, wide, C_out),
    )  # fmt: skip
    return DownParams(
        init_depthwise(rng, C), init_ffn(rng, C), merge, init_depthwise(rng, C_out), init_ffn(rng, C_out)
    )


def init_head(rng, C, classes):
    """HeadParams with normal weights of standard deviation 0.02 and zero bias."""
    return HeadParams(init_bn(C), 0.02 * rng.standard_normal((C, classes)), np.zeros(classes))


def num_parameters(params):
    """Trained numbers in a tree: everything but the running statistics of batch norm."""
    if isinstance(params, BN):
        return params.gamma.size + params.beta.size
    if isinstance(params, tuple | list):
        return sum(num_parameters(p) for p in params)
    return 0 if params is None else params.size


def stage_sides(image, stages=3):
    """Side of the map in every stage, for a square image: 14, 7, 4 at 224 pixels."""
    sides, side = [], image
    for halvings in (4, *[1] * (stages - 1)):
        for _ in range(halvings):
            side = -(-side // 2)
        sides.append(side)
    return sides


def random_params(rng, params):
    """The tree with every batch norm and zero bias drawn, as after training: no layer is the identity."""
    if isinstance(params, BN):
        C = params.gamma.shape
        mean, beta = 0.2 * rng.standard_normal(C), 0.2 * rng.standard_normal(C)
        return BN(rng.uniform(0.5, 1.5, C), beta, mean, rng.uniform(0.5, 1.5, C))
    if isinstance(params, tuple):
        made = [random_params(rng, p) for p in params]
        return type(params)(*made) if hasattr(params, "_fields") else tuple(made)
    if params is not None and not params.any():
        return 0.2 * rng.standard_normal(params.shape)
    return params
