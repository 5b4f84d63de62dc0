"""SHViT: one attention head on some of the channels; the others pass by and are mixed in afterwards.

Source: Yun and Ro 2024 (arXiv 2401.16456), single-head self-attention, and the code released with it, which
decides where the paper is short: one batch norm a convolution, ReLU before the projection. Maps are
[B, H, W, C]; batch norm uses its stored statistics. Stem, downsampling and head: ref/models/pyramid.py.
"""

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
from ref.blocks.maps import map_rows
from ref.blocks.mlp import relu
from ref.blocks.softmax import softmax, softmax_vjp
from ref.checks import at_least_one
from ref.dims import dims, float64
from ref.example import Example
from ref.models.pyramid import (
    DownParams,
    HeadParams,
    fold_pyramid,
    fold_residual_depthwise,
    num_parameters,
    pyramid_forward,
    random_params,
    residual_depthwise,
    residual_ffn,
)
from ref.models.pyramid_cost import OpCost
from ref.models.shvit import (
    KINDS,
    VARIANTS,
    SHSAParams,
    SHViTBlockParams,
    SHViTConfig,
    SHViTParams,
    StageParams,
    check_pdim,
    init_shvit,
    shvit_config,
    shvit_cost,
    stem_cost,
)

__all__ = [
    "BN", "VARIANTS", "Conv", "ConvBN", "DownParams", "FFNParams", "HeadParams", "OpCost",
    "PatchMergingParams", "SHSAParams", "SHViTBlockParams", "SHViTConfig", "SHViTParams", "StageParams",
    "conv_bn", "example", "fold_conv_bn", "fold_residual_depthwise", "fold_shvit", "group_norm_1",
    "group_norm_1_vjp", "head_redundancy", "init_shvit", "num_parameters", "patch_merging", "shvit_block",
    "shvit_config", "shvit_cost", "shvit_forward", "single_head_attention",
    "single_head_attention_backward", "squeeze_excite", "stem_cost",
]  # fmt: skip


def group_norm_1(x, gamma, beta, *, eps=1e-5):
    """gamma (x - mean) / sqrt(var + eps) + beta, one mean and variance for all of a sample [H, W, P].

    Args: x [B, H, W, P], gamma and beta [P]. The variance is the biased one.
    """
    dims(x=(x, "B H W P"), gamma=(gamma, "P"), beta=(beta, "P"))
    return gamma * _standardise(x, eps)[0] + beta


def group_norm_1_vjp(x, gamma, dy, *, eps=1e-5):
    """(dx, dgamma, dbeta) of `group_norm_1` for dy [B, H, W, P]."""
    dims(x=(x, "B H W P"), gamma=(gamma, "P"), dy=(dy, "B H W P"))
    (xh, rstd), dy = _standardise(x, eps), float64(dy)
    g = dy * gamma
    mean = lambda v: v.mean(axis=(1, 2, 3), keepdims=True)
    return rstd * (g - mean(g) - xh * mean(g * xh)), (dy * xh).sum(axis=(0, 1, 2)), dy.sum(axis=(0, 1, 2))


def single_head_attention(x, params: SHSAParams, *, pdim, qk_dim=16, eps=1e-5, full=False):
    """proj(relu([attention of the first P channels, the others untouched])).

    Args: x [B, H, W, C], any H and W. pdim: P, 1 <= P < C (P = C only with full: plain attention of one
      head). qk_dim: channels of queries and keys. eps: of the group norm.
    Returns: [B, H, W, C]. Raises: ValueError naming what does not fit.
    """
    *_, o = _attend(x, params, pdim, qk_dim, eps, full)
    return conv_bn(relu(np.concatenate([o, float64(x)[..., pdim:]], axis=-1)), params.proj)


def single_head_attention_backward(dy, x, params: SHSAParams, *, pdim, qk_dim=16, eps=1e-5, full=False):
    """(dx, dparams) for dy [B, H, W, C]; gradients of running statistics are zero."""
    dims(dy=(dy, "B H W C"), x=(x, "B H W C"))
    h, q, k, v, p, o = _attend(x, params, pdim, qk_dim, eps, full)
    joined = np.concatenate([o, float64(x)[..., pdim:]], axis=-1)
    d, dproj = conv_bn_vjp(relu(joined), params.proj, float64(dy))
    d = d * (joined > 0)
    do = d[..., :pdim].reshape(v.shape)
    dlogits = softmax_vjp(p, do @ v.mT) * qk_dim**-0.5
    dz = np.concatenate([dlogits @ k, dlogits.mT @ q, p.mT @ do], axis=-1)
    dh, dqkv = conv_bn_vjp(h, params.qkv, dz.reshape(*x.shape[:3], dz.shape[-1]))
    dx1, dgamma, dbeta = group_norm_1_vjp(x[..., :pdim], params.ln_w, dh, eps=eps)
    return np.concatenate([dx1, d[..., pdim:]], axis=-1), SHSAParams(dgamma, dbeta, dqkv, dproj)


def shvit_block(x, params: SHViTBlockParams, *, kind, pdim=None, qk_dim=16):
    """Depthwise convolution, attention (kind "s" only), feed-forward, each residual: [B, H, W, C] -> same.

    Raises: ValueError for another kind, or a mixer that does not go with it.
    """
    if kind not in KINDS:
        raise ValueError(f'kind must be "i" or "s", got {kind!r}')
    if (params.mixer is None) != (kind == "i"):
        raise ValueError(f'params.mixer must be None for kind "i" and SHSAParams for "s", got {kind!r}')
    x = residual_depthwise(float64(x), params.dw)
    if kind == "s":
        x = x + single_head_attention(x, params.mixer, pdim=pdim, qk_dim=qk_dim)
    return residual_ffn(x, params.ffn)


def shvit_forward(img, params: SHViTParams, cfg: SHViTConfig, *, features=False):
    """Logits [B, K] of img [B, H, W, 3], or with features the three maps, at strides 16, 32 and 64.

    Raises: ValueError for an image smaller than 16 pixels a side.
    """
    block = lambda x, p, i: shvit_block(x, p, kind=cfg.kinds[i], pdim=cfg.pdims[i], qk_dim=cfg.qk_dims[i])
    return pyramid_forward(img, params, block, features=features)


def fold_shvit(params):
    """The same network with batch norm folded away, and the identity into its depthwise convolutions."""
    return fold_pyramid(params)


def head_redundancy(attn):
    """[layers]: the cosine similarity of two heads' maps, averaged over all pairs of heads and the batch.

    Args: attn: a list of [B, H, N, N], one a layer, H >= 2 (it may differ). 1: the heads agree; maps with no
      key in common give 0. Raises: ValueError for a layer of one head.
    """
    similarity = []
    for maps in attn:
        n = dims(attn=(maps, "B H N N"))
        if n["H"] < 2:
            raise ValueError(f"attn must have at least two heads a layer, got {n['H']}")
        flat = float64(maps).reshape(n["B"], n["H"], -1)
        unit = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
        pairs = (unit @ unit.mT)[:, *np.triu_indices(n["H"], 1)]
        similarity.append(pairs.mean())
    return np.array(similarity)


def _attend(x, params, pdim, qk_dim, eps, full):
    """Normalised input [B, H, W, P]; q, k, v and attention in rows; output as a map."""
    C = dims(x=(x, "B H W C"))["C"]
    check_pdim(pdim, C, full)
    at_least_one(qk_dim=qk_dim)
    dims(qkv=(params.qkv.w, f"{2 * qk_dim + pdim} {pdim} 1 1"), proj=(params.proj.w, f"{C} {C} 1 1"))
    h = group_norm_1(x[..., :pdim], params.ln_w, params.ln_b, eps=eps)
    z = map_rows(conv_bn(h, params.qkv))
    q, k, v = z[..., :qk_dim], z[..., qk_dim : 2 * qk_dim], z[..., 2 * qk_dim :]
    p = softmax(q @ k.mT * qk_dim**-0.5)
    return h, q, k, v, p, (p @ v).reshape(h.shape)


def _standardise(x, eps):
    x = float64(x)
    centred = x - x.mean(axis=(1, 2, 3), keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(axis=(1, 2, 3), keepdims=True) + eps)
    return centred * rstd, rstd


def example(seed=0):
    """Two handwritten digits at 32 pixels through a small network; hidden maps through one attention."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][seed : seed + 2] / 16
    img = np.repeat(np.kron(images, np.ones((4, 4)))[..., None], 3, axis=-1)
    cfg = SHViTConfig((16, 24, 24), (4, 5, 7), (1, 1, 1), qk_dims=(4, 4, 4), num_classes=10)
    net = random_params(rng, init_shvit(rng, cfg))
    x, block = rng.standard_normal((2, 3, 5, 24)), net.stages[1].blocks[0]
    options = {"pdim": 5, "qk_dim": 4}
    return [
        Example("group_norm_1", (x, rng.uniform(0.5, 1.5, 24), rng.standard_normal(24)), {}, (0, 1, 2)),
        Example("single_head_attention", (x, block.mixer), options, (0, 1)),
        Example("single_head_attention_backward", (x[::-1], x, block.mixer), options),
        Example("shvit_block", (x, block), {"kind": "s", **options}, (0, 1)),
        Example("shvit_block", (x[..., :16], net.stages[0].blocks[0]), {"kind": "i"}, (0, 1)),
        Example("patch_merging", (x, net.stages[2].down.merge), {}, (0, 1)),
        Example("shvit_forward", (img, net, cfg), {}, (0, 1)),
    ]
