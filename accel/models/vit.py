"""The vision transformer in JAX, in the dtype of the images; parameters are ref's `ViTParams`, a pytree."""

import jax.numpy as jnp

from accel.blocks.attention import attention_dense
from accel.blocks.mlp import linear
from accel.blocks.norms import layer_norm
from accel.blocks.shapes import lift
from accel.blocks.transformer import transformer_block
from ref.dims import dims
from ref.models.vit import ViTParams, init_vit, patchify

__all__ = [
    "ViTParams",
    "classify",
    "embed_patches",
    "head",
    "init_vit",
    "patchify",
    "vit_forward",
    "vit_tokens",
]


def embed_patches(images, params):
    """[class token, patches w_patch + b_patch] + positions: [..., H, W, C] -> [..., 1 + n, d]."""
    patch, _, channels, d = params.w_patch.shape
    dims(images=(images, f"... H W {channels}"))
    x = linear(patchify(images, patch), params.w_patch.reshape(-1, d), params.b_patch)
    if params.cls_token is not None:
        first = jnp.broadcast_to(lift(params.cls_token.astype(x.dtype), x.ndim), (*x.shape[:-2], 1, d))
        x = jnp.concatenate([first, x], axis=-2)
    dims(pos_embed=(params.pos_embed, f"{x.shape[-2]} {d}"))
    return x + lift(params.pos_embed.astype(x.dtype), x.ndim)


def classify(x, params, *, global_pool=False, eps=1e-6):
    """Tokens [..., L, d] of the last block -> logits [..., K], or features [..., d] without w_head."""
    has_class = params.cls_token is not None
    pooled = x[..., 0, :] if has_class and not global_pool else x[..., int(has_class) :, :].mean(axis=-2)
    return head(pooled, params, eps=eps)


def head(pooled, params, *, eps=1e-6):
    """norm(pooled) w_head + b_head: [..., d] -> [..., K]; the normalised vector without w_head."""
    y = layer_norm(pooled, params.norm_scale, params.norm_bias, eps=eps)
    return y if params.w_head is None else linear(y, params.w_head, params.b_head)


def vit_tokens(images, params: ViTParams, *, num_heads, eps=1e-6, attention=attention_dense):
    """Tokens after the last block, before the final norm: [..., H, W, C] -> [..., 1 + n, d]."""
    x = embed_patches(images, params)
    for block in params.blocks:
        x = transformer_block(x, block, num_heads=num_heads, eps=eps, attention=attention)
    return x


def vit_forward(
    images, params: ViTParams, *, num_heads, global_pool=False, eps=1e-6, attention=attention_dense
):
    """Logits [..., K] of images [..., H, W, C]; features [..., d] if the parameters have no head."""
    x = vit_tokens(images, params, num_heads=num_heads, eps=eps, attention=attention)
    return classify(x, params, global_pool=global_pool, eps=eps)
