"""The pre-norm transformer block in JAX; parameters are ref's `BlockParams`, a pytree."""

from accel.blocks.attention import attention_dense, join_heads, split_heads
from accel.blocks.mlp import affine, gelu, mlp
from accel.blocks.norms import layer_norm
from ref.blocks.transformer import BlockParams, init_block

__all__ = ["BlockParams", "init_block", "qkv", "transformer_block"]


def qkv(x, params, *, num_heads):
    """q, k, v of the normalised input: x [..., L, C] -> three arrays [..., H, L, D]."""
    p = params
    pairs = ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
    return tuple(split_heads(affine(x, w, b), num_heads) for w, b in pairs)


def transformer_block(
    x, params, *, num_heads, causal=False, mask=None, eps=1e-5, activation=gelu, attention=attention_dense
):
    """x + attention(norm(x)), then x + mlp(norm(x)). x [..., L, C] -> [..., L, C]."""
    q, k, v = qkv(layer_norm(x, params.ln1_scale, params.ln1_bias, eps=eps), params, num_heads=num_heads)
    x = x + affine(join_heads(attention(q, k, v, mask=mask, causal=causal)), params.w_o, params.b_o)
    h = layer_norm(x, params.ln2_scale, params.ln2_bias, eps=eps)
    return x + mlp(h, params.w_fc1, params.b_fc1, params.w_fc2, params.b_fc2, activation=activation)
