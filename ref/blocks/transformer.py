"""The pre-norm transformer block in the house form: q, k, v apart, weights [in, out], used as x @ W + b."""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.mlp import gelu, mlp
from ref.blocks.norms import layer_norm


class BlockParams(NamedTuple):
    """One block of width C, hidden width F: norms and biases [C], maps [C, C], MLP [C, F] and [F, C]."""

    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    w_q: np.ndarray
    b_q: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray


def init_block(rng, dim, hidden, *, std=0.02):
    """BlockParams drawn by a NumPy Generator: normal weights (std), zero biases, unit norms."""
    w = lambda *shape: std * rng.standard_normal(shape)
    one, zero = np.ones(dim), np.zeros(dim)
    return BlockParams(
        ln1_scale=one, ln1_bias=zero,
        w_q=w(dim, dim), b_q=zero, w_k=w(dim, dim), b_k=zero, w_v=w(dim, dim), b_v=zero, w_o=w(dim, dim),
        b_o=zero, ln2_scale=one, ln2_bias=zero,
        w_fc1=w(dim, hidden), b_fc1=np.zeros(hidden), w_fc2=w(hidden, dim), b_fc2=zero,
    )  # fmt: skip


def qkv(x, params, *, num_heads):
    """q, k, v of the normalised input: x [..., L, C] -> three arrays [..., H, L, D]."""
    p = params
    return tuple(
        split_heads(x @ w + b, num_heads) for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
    )


def transformer_block(
    x, params, *, num_heads, causal=False, mask=None, eps=1e-5, activation=gelu, attention=attention_dense
):
    """x + attention(norm(x)), then x + mlp(norm(x)). x [..., L, C] -> [..., L, C].

    attention: a function (q, k, v, *, mask, causal) of heads [..., H, L, D]; the dense one unless given.
    """
    q, k, v = qkv(layer_norm(x, params.ln1_scale, params.ln1_bias, eps=eps), params, num_heads=num_heads)
    x = x + join_heads(attention(q, k, v, mask=mask, causal=causal)) @ params.w_o + params.b_o
    h = layer_norm(x, params.ln2_scale, params.ln2_bias, eps=eps)
    return x + mlp(h, params.w_fc1, params.b_fc1, params.w_fc2, params.b_fc2, activation=activation)
