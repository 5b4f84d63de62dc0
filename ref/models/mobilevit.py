"""The MobileViT block: convolutions look near, attention far, between the same pixel of every patch.

Source: Mehta and Rastegari 2022 (arXiv 2110.02178), section 3.1. Maps are [B, H, W, C], convolutions OIHW.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.conv import ConvBN, conv_bn, conv_bn_vjp, init_conv_bn
from ref.blocks.mlp import linear, linear_vjp, silu, silu_grad
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import BlockParams, init_block, transformer_block, transformer_block_vjp
from ref.checks import check_num_heads
from ref.dims import dims, float64


class MobileViTParams(NamedTuple):
    """local 3x3 C -> C, w_in [C, d], blocks of width d, norm [d], proj 1x1 d -> C, fuse 3x3 2 C -> C."""

    local: ConvBN
    w_in: np.ndarray
    blocks: tuple[BlockParams, ...]
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    proj: ConvBN
    fuse: ConvBN


def mobilevit_block(x, params: MobileViTParams, *, patch=2, num_heads, eps=1e-5):
    """silu(fuse([x, silu(proj(far))])): [B, H, W, C] -> the same.

    far: silu(local(x)) w_in, through transformer blocks on the sequences of `unfold_patches`. The 3x3 kernel
    reaches all of a patch, attention all patches: each pixel sees every other. eps is that of all norms.
    Raises: ValueError unless patch divides H and W (others resize the map).
    """
    return silu(_forward(x, params, patch, num_heads, eps)["y"])


def mobilevit_block_vjp(x, params: MobileViTParams, dy, *, patch=2, num_heads, eps=1e-5):
    """(dx, dparams) of `mobilevit_block`; gradients of running statistics are zero."""
    p, C = params, x.shape[-1]
    f = _forward(x, p, patch, num_heads, eps)
    block = {"num_heads": num_heads, "eps": eps, "activation": "silu"}
    conv = lambda *args: conv_bn_vjp(*args, padding=args[1].w.shape[-1] // 2, eps=eps)
    djoined, dfuse = conv(f["joined"], p.fuse, float64(dy) * silu_grad(f["y"]))
    dfar, dproj = conv(f["far"], p.proj, djoined[..., C:] * silu_grad(f["g"]))
    dt, dscale, dbias = layer_norm_vjp(f["tokens"][-1], p.ln_scale, unfold_patches(dfar, patch), eps=eps)
    dblocks = []
    for t, b in zip(f["tokens"][-2::-1], p.blocks[::-1], strict=True):
        dt, db = transformer_block_vjp(t, b, dt, **block)
        dblocks.insert(0, db)
    da, dw_in, _ = linear_vjp(silu(f["a"]), p.w_in, fold_patches(dt, x.shape[1:3], patch), bias=False)
    dx, dlocal = conv(float64(x), p.local, da * silu_grad(f["a"]))
    dparams = MobileViTParams(dlocal, dw_in, tuple(dblocks), dscale, dbias, dproj, dfuse)
    return dx + djoined[..., :C], dparams


def unfold_patches(x, patch):
    """[B, H, W, d] -> [B, patch^2, T, d]: a sequence for every place in a patch, patches row by row."""
    n = dims(x=(x, "B H W d"))
    B, H, W, d = (n[a] for a in "BHWd")
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"x of {H} x {W} pixels cannot be cut into patches of {patch}")
    x = x.reshape(B, H // patch, patch, W // patch, patch, d).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, patch**2, H * W // patch**2, d)


def fold_patches(tokens, sides, patch):
    """The inverse of `unfold_patches`: [B, patch^2, T, d] -> [B, H, W, d], sides = (H, W)."""
    B, d = tokens.shape[0], tokens.shape[-1]
    H, W = sides
    x = tokens.reshape(B, patch, patch, H // patch, W // patch, d).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B, H, W, d)


def init_mobilevit(rng, channels, dim, *, hidden=None, depth=2, std=0.02):
    """MobileViTParams drawn by a NumPy Generator; hidden: of the MLPs, 2 dim if None."""
    return MobileViTParams(
        local=init_conv_bn(rng, channels, channels, 3),
        w_in=rng.uniform(-1, 1, (channels, dim)) / np.sqrt(channels),
        blocks=tuple(init_block(rng, dim, hidden or 2 * dim, std=std) for _ in range(depth)),
        ln_scale=np.ones(dim),
        ln_bias=np.zeros(dim),
        proj=init_conv_bn(rng, dim, channels),
        fuse=init_conv_bn(rng, 2 * channels, channels, 3),
    )


def _forward(x, p, patch, num_heads, eps):
    """Every intermediate that the backward pass needs, by name."""
    conv = lambda x, c: conv_bn(x, c, padding=c.w.shape[-1] // 2, eps=eps)
    check_num_heads(p.w_in.shape[1], num_heads)
    a = conv(x, p.local)
    tokens = [unfold_patches(linear(silu(a), p.w_in), patch)]
    for b in p.blocks:
        tokens.append(transformer_block(tokens[-1], b, num_heads=num_heads, eps=eps, activation="silu"))
    far = fold_patches(layer_norm(tokens[-1], p.ln_scale, p.ln_bias, eps=eps), x.shape[1:3], patch)
    g = conv(far, p.proj)
    joined = np.concatenate([float64(x), silu(g)], axis=-1)
    return {"a": a, "tokens": tokens, "far": far, "g": g, "joined": joined, "y": conv(joined, p.fuse)}
