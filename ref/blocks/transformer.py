"""The transformer block in the house form: q, k, v apart, weights [in, out], used as x @ W + b.

A bias may be None.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, join_heads, split_heads
from ref.blocks.mlp import linear, linear_vjp, mlp, mlp_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.dims import float64


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


class QKVParams(NamedTuple):
    """The maps to queries, keys and values alone: weights [C, H D], biases [H D] or None."""

    w_q: np.ndarray
    b_q: np.ndarray | None
    w_k: np.ndarray
    b_k: np.ndarray | None
    w_v: np.ndarray
    b_v: np.ndarray | None


class AttentionParams(NamedTuple):
    """Maps [C, H D] to queries, keys and values without a bias, and back: w_o [H D, C], b_o [C] or None."""

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray | None = None


class SelfAttentionParams(NamedTuple):
    """Maps [in, C] to queries, keys and values, and w_o [C, C], each with a bias [C]."""

    w_q: np.ndarray
    b_q: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray


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


def block_parameters(dim, hidden):
    """Numbers in a block: q, k, v, output and the MLP with their biases, two norms; 12 d^2 + 13 d for 4 d."""
    return 4 * (dim * dim + dim) + 2 * dim * hidden + hidden + dim + 4 * dim


def qkv(x, params, *, num_heads):
    """q, k, v of x [..., L, C]: three arrays [..., H, L, D]."""
    p = params
    maps = ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
    return tuple(split_heads(linear(x, w, b), num_heads) for w, b in maps)


def qkv_vjp(x, params, dqkv):
    """(dx, QKVParams) of `qkv` for dqkv, three cotangents [..., H, L, D]."""
    p = params
    maps = ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
    dx, grads = np.zeros_like(x), []
    for (w, b), d in zip(maps, dqkv, strict=True):
        part, dw, db = linear_vjp(x, w, join_heads(d), bias=b is not None)
        dx = dx + part
        grads += [dw, db]
    return dx, QKVParams(*grads)


def self_attention(x, params, *, num_heads, attention=attention_dense, **options):
    """attention(q, k, v) of x [..., L, C], joined and mapped by w_o, b_o; options: those of attention."""
    heads = attention(*qkv(x, params, num_heads=num_heads), **options)
    return linear(join_heads(heads), params.w_o, params.b_o)


def transformer_block(x, params, *, num_heads, norm="pre", causal=False, mask=None, eps=1e-5,
                      activation="gelu", attention=attention_dense):  # fmt: skip
    """One block: x [..., L, C] -> [..., L, C].

    norm: "pre" is x + attention(ln1(x)), then x + mlp(ln2(x)) (GPT-2, ViT); "post" is ln1(x + attention(x)),
      then ln2(x + mlp(x)) (the original transformer, BERT).
    mask: bool, True = visible, broadcastable to [..., H, L, L].
    attention: a function of q, k, v, mask and causal.
    Raises: ValueError for an unknown norm or activation.
    """
    ln1, ln2 = _norms(params, eps)
    attend = lambda h: self_attention(
        h, params, num_heads=num_heads, attention=attention, mask=mask, causal=causal
    )
    feed = lambda h: mlp(h, params.w_fc1, params.b_fc1, params.w_fc2, params.b_fc2, activation=activation)
    x = float64(x)
    if norm == "pre":
        x = x + attend(ln1(x))
        return x + feed(ln2(x))
    if norm == "post":
        x = ln1(x + attend(x))
        return ln2(x + feed(x))
    raise ValueError(f'norm must be "pre" or "post", got {norm!r}')


def self_attention_vjp(
    x, params, dy, *, num_heads, attention=attention_dense, attention_vjp=attention_dense_vjp, **options
):
    """(dx, gradients of w_q .. b_o by name) of `self_attention`; attention_vjp takes (q, k, v, do)."""
    q, k, v = qkv(x, params, num_heads=num_heads)
    o = join_heads(attention(q, k, v, **options))
    do, dw_o, db_o = linear_vjp(o, params.w_o, dy, bias=params.b_o is not None)
    dqkv = attention_vjp(q, k, v, split_heads(do, num_heads), **options)
    dx, maps = qkv_vjp(x, params, dqkv)
    grads = {"w_o": dw_o, "b_o": db_o, **maps._asdict()}
    return dx, grads


def transformer_block_vjp(x, params, dy, *, num_heads, norm="pre", causal=False, mask=None,
                          eps=1e-5, activation="gelu", attention=attention_dense,
                          attention_vjp=attention_dense_vjp):  # fmt: skip
    """(dx, dparams: BlockParams) of `transformer_block` for dy [..., L, C], by the attention's vjp."""
    ln1, ln2 = _norms(params, eps)
    options = {"num_heads": num_heads, "mask": mask, "causal": causal, "attention": attention}
    weights = params.w_fc1, params.b_fc1, params.w_fc2, params.b_fc2
    x, dy = float64(x, dy)

    def back_mlp(h, d):
        dh, *grads = mlp_vjp(h, *weights, d, activation=activation)
        return dh, dict(zip(("w_fc1", "b_fc1", "w_fc2", "b_fc2"), grads, strict=True))

    if norm == "pre":
        h1 = ln1(x)
        mid = x + self_attention(h1, params, **options)
        d, g_mlp = back_mlp(ln2(mid), dy)
        d, s2, b2 = layer_norm_vjp(mid, params.ln2_scale, d, eps=eps)
        dmid = dy + d
        d, g_attn = self_attention_vjp(h1, params, dmid, attention_vjp=attention_vjp, **options)
        d, s1, b1 = layer_norm_vjp(x, params.ln1_scale, d, eps=eps)
        dx = dmid + d
    elif norm == "post":
        sum1 = x + self_attention(x, params, **options)
        mid = ln1(sum1)
        sum2 = mid + mlp(mid, *weights, activation=activation)
        d2, s2, b2 = layer_norm_vjp(sum2, params.ln2_scale, dy, eps=eps)
        d, g_mlp = back_mlp(mid, d2)
        d1, s1, b1 = layer_norm_vjp(sum1, params.ln1_scale, d2 + d, eps=eps)
        d, g_attn = self_attention_vjp(x, params, d1, attention_vjp=attention_vjp, **options)
        dx = d1 + d
    else:
        raise ValueError(f'norm must be "pre" or "post", got {norm!r}')
    return dx, BlockParams(ln1_scale=s1, ln1_bias=b1, ln2_scale=s2, ln2_bias=b2, **g_attn, **g_mlp)


def _norms(params, eps):
    first = lambda x: layer_norm(x, params.ln1_scale, params.ln1_bias, eps=eps)
    second = lambda x: layer_norm(x, params.ln2_scale, params.ln2_bias, eps=eps)
    return first, second
