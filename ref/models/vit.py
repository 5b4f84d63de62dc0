"""The vision transformer: patches, a class token, pre-norm blocks, a linear head.

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), equations 1 to 4. Images are [..., H, W, C].
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense
from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import BlockParams, init_block, transformer_block, transformer_block_vjp
from ref.dims import dims, float64


class ViTParams(NamedTuple):
    """A vision transformer of width d on n patches of p x p pixels.

    w_patch [p, p, C, d], or [t, p, p, C, d] for clips; b_patch [d]; cls_token [d], or None for a network
    without one; pos_embed [1 + n, d] ([n, d] without class token); blocks, one BlockParams each; norm_scale
    and norm_bias [d]; w_head [d, K] and b_head [K], or None for a backbone that returns features.
    """

    w_patch: np.ndarray
    b_patch: np.ndarray
    cls_token: np.ndarray | None
    pos_embed: np.ndarray
    blocks: tuple[BlockParams, ...]
    norm_scale: np.ndarray
    norm_bias: np.ndarray
    w_head: np.ndarray | None = None
    b_head: np.ndarray | None = None


def init_vit(rng, *, image_size, patch, dim, depth, num_classes=None, channels=3, hidden=None,
             class_token=True, std=0.02):  # fmt: skip
    """ViTParams with normal weights of standard deviation `std`, zero biases and unit norms.

    rng: NumPy Generator. image_size: pixels a side, a multiple of patch. hidden: width of the MLP, 4 dim if
    None. num_classes: None leaves the head out. Raises: ValueError if the patches do not tile the image.
    """
    if image_size % patch:
        raise ValueError(f"image_size must be a multiple of patch, got {image_size=} with {patch=}")
    w = lambda *shape: std * rng.standard_normal(shape)
    n = (image_size // patch) ** 2
    return ViTParams(
        w_patch=w(patch, patch, channels, dim),
        b_patch=np.zeros(dim),
        cls_token=w(dim) if class_token else None,
        pos_embed=w(n + class_token, dim),
        blocks=tuple(init_block(rng, dim, hidden or 4 * dim, std=std) for _ in range(depth)),
        norm_scale=np.ones(dim),
        norm_bias=np.zeros(dim),
        w_head=None if num_classes is None else w(dim, num_classes),
        b_head=None if num_classes is None else np.zeros(num_classes),
    )


def patchify(images, patch):
    """Cut images [..., H, W, C] into patches [..., n, patch * patch * C], row by row.

    Raises: ValueError unless H and W are multiples of patch.
    """
    n = dims(images=(images, "... H W C"))
    if n["H"] % patch or n["W"] % patch:
        raise ValueError(f"images of {n['H']} x {n['W']} pixels cannot be cut into patches of {patch}")
    lead, rows, cols = n["..."], n["H"] // patch, n["W"] // patch
    tiles = images.reshape(*lead, rows, patch, cols, patch, n["C"]).swapaxes(-4, -3)
    return tiles.reshape(*lead, rows * cols, patch * patch * n["C"])


def embed_patches(images, params):
    """[class token, patches w_patch + b_patch] + positions: [..., H, W, C] -> [..., 1 + n, d] (eq. 1).

    With w_patch [t, p, p, C, d] clips [..., T, H, W, C] are cut into tubelets of t frames, frame by frame.
    """
    if params.w_patch.ndim == 5:
        images, params = clip_as_image(images, params)
    patch, _, channels, d = params.w_patch.shape
    dims(images=(images, f"... H W {channels}"))
    x = linear(patchify(float64(images), patch), params.w_patch.reshape(-1, d), params.b_patch)
    if params.cls_token is not None:
        first = np.broadcast_to(params.cls_token, (*x.shape[:-2], 1, d))
        x = np.concatenate([first, x], axis=-2)
    dims(pos_embed=(params.pos_embed, f"{x.shape[-2]} {d}"))
    return x + params.pos_embed


def clip_as_image(clips, params):
    """Clips [..., T, H, W, C] as images [..., H T / t, W, t C], tubelets one below another; and params.

    A tubelet's frames become channels: w_patch [t, p, p, C, d] becomes [p, p, t C, d].

    Raises: ValueError unless T is a multiple of t.
    """
    n = dims(clips=(clips, "... T H W C"))
    t, p, _, C, d = params.w_patch.shape
    if n["T"] % t:
        raise ValueError(f"clips have {n['T']} frames, not a multiple of the tubelet's {t}")
    cut = clips.reshape(*n["..."], n["T"] // t, t, *clips.shape[-3:])
    tall = np.moveaxis(cut, -4, -2).reshape(*n["..."], -1, n["W"], t * n["C"])
    return tall, params._replace(w_patch=params.w_patch.transpose(1, 2, 0, 3, 4).reshape(p, p, t * C, d))


def embed_patches_vjp(images, params, dx):
    """(dimages, gradients of w_patch, b_patch, cls_token and pos_embed by name) of `embed_patches`."""
    if params.w_patch.ndim == 5:
        return _clip_vjp(images, params, dx)
    p, _, C, d = params.w_patch.shape
    first = int(params.cls_token is not None)
    rows, lead = patchify(float64(images), p), tuple(range(dx.ndim - 2))
    drows, dw, db = linear_vjp(rows, params.w_patch.reshape(-1, d), dx[..., first:, :])
    *outer, H, W, _ = images.shape
    dimages = drows.reshape(*outer, H // p, W // p, p, p, C).swapaxes(-4, -3).reshape(images.shape)
    return dimages, {
        "w_patch": dw.reshape(params.w_patch.shape),
        "b_patch": db,
        "cls_token": dx[..., 0, :].sum(axis=lead) if first else None,
        "pos_embed": dx.sum(axis=lead),
    }


def classify(x, params, *, global_pool=False, eps=1e-6):
    """Tokens [..., L, d] of the last block -> logits [..., K], or features [..., d] without w_head.

    What is normalised is the class token, or the mean of the other tokens with global_pool (or without a
    class token).
    """
    return head(pool(x, params, global_pool=global_pool), params, eps=eps)


def pool(x, params, *, global_pool=False):
    """The class token of x [..., L, d], or the mean of the others: [..., d]."""
    first = int(params.cls_token is not None)
    return x[..., 0, :] if first and not global_pool else x[..., first:, :].mean(axis=-2)


def pool_vjp(x, params, dpooled, *, global_pool=False):
    """The cotangent [..., L, d] of `pool` for dpooled [..., d]."""
    first = int(params.cls_token is not None)
    dx = np.zeros_like(float64(x))
    if first and not global_pool:
        dx[..., 0, :] = dpooled
    else:
        dx[..., first:, :] = dpooled[..., None, :] / (x.shape[-2] - first)
    return dx


def head(pooled, params, *, eps=1e-6):
    """norm(pooled) w_head + b_head: [..., d] -> [..., K]; the normalised vector without w_head."""
    y = layer_norm(pooled, params.norm_scale, params.norm_bias, eps=eps)
    return y if params.w_head is None else linear(y, params.w_head, params.b_head)


def head_vjp(pooled, params, dy, *, eps=1e-6):
    """(dpooled, gradients of norm_scale, norm_bias, w_head and b_head by name) of `head`."""
    dw = db = None
    if params.w_head is not None:
        y = layer_norm(pooled, params.norm_scale, params.norm_bias, eps=eps)
        dy, dw, db = linear_vjp(y, params.w_head, dy, bias=params.b_head is not None)
    dpooled, dscale, dbias = layer_norm_vjp(pooled, params.norm_scale, dy, eps=eps)
    return dpooled, {"norm_scale": dscale, "norm_bias": dbias, "w_head": dw, "b_head": db}


def vit_tokens(images, params: ViTParams, *, num_heads, eps=1e-6, attention=attention_dense):
    """Tokens after the last block, before the final norm: [..., H, W, C] -> [..., 1 + n, d]."""
    x = embed_patches(images, params)
    for block in params.blocks:
        x = transformer_block(x, block, num_heads=num_heads, eps=eps, attention=attention)
    return x


def vit_forward(
    images, params: ViTParams, *, num_heads, global_pool=False, eps=1e-6, attention=attention_dense
):
    """Logits [..., K] of images [..., H, W, C]; features [..., d] if the parameters have no head.

    attention: a function (q, k, v, *, mask, causal) of heads, the dense one unless given.
    """
    x = vit_tokens(images, params, num_heads=num_heads, eps=eps, attention=attention)
    return classify(x, params, global_pool=global_pool, eps=eps)


def vit_forward_vjp(images, params: ViTParams, dlogits, *, num_heads, global_pool=False, eps=1e-6):
    """(dimages, ViTParams of gradients) of `vit_forward` with dense attention for dlogits [..., K]."""
    hidden, blocks = [embed_patches(images, params)], []
    for p in params.blocks:
        hidden.append(transformer_block(hidden[-1], p, num_heads=num_heads, eps=eps))
    pooled = pool(hidden[-1], params, global_pool=global_pool)
    dpooled, last = head_vjp(pooled, params, float64(dlogits), eps=eps)
    dx = pool_vjp(hidden[-1], params, dpooled, global_pool=global_pool)
    for x, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dx, grads = transformer_block_vjp(x, p, dx, num_heads=num_heads, eps=eps)
        blocks.append(grads)
    dimages, first = embed_patches_vjp(images, params, dx)
    return dimages, ViTParams(**first, **last, blocks=tuple(blocks[::-1]))


def _clip_vjp(clips, params, dx):
    t, p, _, C, d = params.w_patch.shape
    dtall, grads = embed_patches_vjp(*clip_as_image(clips, params), dx)
    *lead, T, H, W, _ = clips.shape
    dclips = np.moveaxis(dtall.reshape(*lead, T // t, H, W, t, C), -2, -4).reshape(clips.shape)
    dw = grads["w_patch"].reshape(p, p, t, C, d).transpose(2, 0, 1, 3, 4)
    return dclips, {**grads, "w_patch": dw}
