"""The transformer block in JAX; parameters are ref's `BlockParams`, a pytree; see
ref/blocks/transformer.py.
"""

from functools import partial

import jax

from accel.blocks.attention import attention_dense, join_heads, split_heads
from accel.blocks.mlp import linear, mlp
from accel.blocks.norms import layer_norm
from ref.blocks.transformer import BlockParams, init_block

__all__ = ["BlockParams", "init_block", "qkv", "self_attention", "transformer_block"]


def qkv(x, params, *, num_heads):
    """q, k, v of x [..., L, C]: three arrays [..., H, L, D]."""
    p = params
    maps = ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
    return tuple(split_heads(linear(x, w, b), num_heads) for w, b in maps)


def self_attention(x, params, *, num_heads, attention=attention_dense, **options):
    """attention(q, k, v) of x [..., L, C], joined and mapped by w_o, b_o. options: mask, causal, ... of
    attention.
    """
    heads = attention(*qkv(x, params, num_heads=num_heads), **options)
    return linear(join_heads(heads), params.w_o, params.b_o)


def transformer_block(
    x,
    params,
    *,
    num_heads,
    norm="pre",
    causal=False,
    mask=None,
    eps=1e-5,
    activation="gelu",
    attention=attention_dense,
    remat=False,
):
    """One block, pre-norm or post-norm: x [..., L, C] -> [..., L, C].

    remat: whether a backward pass computes norms and activations again from their inputs, which it keeps
    anyway; else all their steps are kept, more than everything else in the block.
    """
    p = params
    again = partial(jax.checkpoint, prevent_cse=False) if remat else lambda f: f
    ln1 = again(lambda h: layer_norm(h, p.ln1_scale, p.ln1_bias, eps=eps))
    ln2 = again(lambda h: layer_norm(h, p.ln2_scale, p.ln2_bias, eps=eps))
    attend = lambda h: self_attention(
        h, p, num_heads=num_heads, attention=attention, mask=mask, causal=causal
    )
    feed = lambda h: mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, activation=activation, remat=remat)
    if norm == "pre":
        x = x + attend(ln1(x))
        return x + feed(ln2(x))
    if norm == "post":
        x = ln1(x + attend(x))
        return ln2(x + feed(x))
    raise ValueError(f'norm must be "pre" or "post", got {norm!r}')
