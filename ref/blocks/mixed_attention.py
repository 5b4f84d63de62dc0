"""Attention to mixtures of tokens: projected keys, sorted blocks, and weights without queries and keys.

Source: Wang et al. 2020 (arXiv 2006.04768), Linformer; Tay et al. 2020 (arXiv 2002.11296), Sinkhorn;
Tay et al. 2020 (arXiv 2005.00743), Synthesizer (factorised random). mask: bool [..., S], True = real.
"""

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp
from ref.blocks.padding import zero_padding
from ref.blocks.softmax import logsumexp, softmax, weigh
from ref.dims import dims, float64


def linformer_attention(q, k, v, e_k, e_v, *, scale=None, mask=None):
    """softmax(scale q (e_k^T k)^T) e_v^T v: q [..., L, D], k, v [..., S, D], e_k, e_v [S, n] -> [..., L, D].

    Padded keys add nothing to the n mixtures. scale: None is 1 / sqrt(D).
    """
    dims(k=(k, "... S D"), v=(v, "... S Dv"), e_k=(e_k, "S n"), e_v=(e_v, "S n"))
    k, v = zero_padding(mask, k, v)
    return attention_dense(float64(q), float64(e_k).T @ k, float64(e_v).T @ v, scale=scale)


def linformer_attention_vjp(q, k, v, e_k, e_v, do, *, scale=None, mask=None):
    """(dq, dk, dv, de_k, de_v) of `linformer_attention` for do [..., L, D]."""
    k, v = zero_padding(mask, k, v)
    dq, dk, dv = attention_dense_vjp(q, float64(e_k).T @ k, float64(e_v).T @ v, do, scale=scale)
    over = tuple(range(k.ndim - 2))
    de_k, de_v = ((x @ np.swapaxes(d, -1, -2)).sum(axis=over) for x, d in ((k, dk), (v, dv)))
    return dq, *zero_padding(mask, e_k @ dk, e_v @ dv), de_k, de_v


def sinkhorn(logits, *, iterations):
    """exp of the logits [..., n, n] after `iterations` rounds of making rows, then columns, sum to 1.

    A row or column that is all -inf stays 0.
    """
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    s = float64(logits)
    for axis in (-1, -2) * iterations:
        total = np.expand_dims(logsumexp(s, axis=axis), axis)
        s = s - np.where(np.isneginf(total), 0.0, total)
    return np.exp(s)


def sinkhorn_attention(q, k, v, *, block, iterations, scale=None, mask=None):
    """Every block of queries sees its own keys and a mixture of all blocks of keys, mixed by `sinkhorn`.

    The logits of block i against j are the scaled product of their mean query and mean key. q, k, v
    [..., T, D], T a multiple of block. Blocks without a real token are not mixed; token t of a mixture is
    seen if token t of any block is real.
    """
    n = dims(q=(q, "... T D"), k=(k, "... T D"), v=(v, "... T Dv"))
    if block < 1 or n["T"] % block:
        raise ValueError(f"block must divide the {n['T']} tokens (pad and mask them), got {block}")
    seen = np.ones(k.shape[:-1], bool) if mask is None else np.broadcast_to(mask, k.shape[:-1])
    blocks = lambda x: x.reshape(*x.shape[:-2], n["T"] // block, block, x.shape[-1])
    scale = 1 / np.sqrt(n["D"]) if scale is None else scale
    real = blocks(seen[..., None])  # [..., nb, block, 1]
    qb, kb, vb = map(blocks, zero_padding(seen, q, k, v))
    mean = lambda x: x.sum(axis=-2) / np.maximum(real.sum(axis=-2), 1)
    some = real.any(axis=-2)  # [..., nb, 1]
    logits = scale * mean(qb) @ np.swapaxes(mean(kb), -1, -2)
    mix = sinkhorn(np.where(some & np.swapaxes(some, -1, -2), logits, -np.inf), iterations=iterations)
    flat = lambda x: x.reshape(*x.shape[:-2], block * x.shape[-1])
    sort = lambda x: (mix @ flat(x)).reshape(x.shape)
    both = lambda own, other: np.concatenate([own, other], axis=-2)
    anywhere = np.broadcast_to(real.any(axis=-3, keepdims=True), real.shape)
    see = np.swapaxes(both(real, anywhere), -1, -2)  # [..., nb, 1, 2 block]
    s = scale * blocks(float64(q)) @ np.swapaxes(both(kb, sort(kb)), -1, -2)
    o = softmax(np.where(see, s, -np.inf)) @ both(vb, sort(vb))
    return o.reshape(v.shape)


def synthesizer_attention(v, r1, r2, *, mask=None):
    """softmax(r1 r2) v, the same weights for every text: v [..., H, T, D], r1 [H, T, n], r2 [H, n, T]."""
    dims(v=(v, "... H T D"), r1=(r1, "H T n"))
    dims(r1=(r1, "H T n"), r2=(r2, "H n T"))
    logits = float64(r1) @ float64(r2)
    if mask is not None:
        logits = np.where(np.asarray(mask)[..., None, :], logits, -np.inf)
    return weigh(softmax(logits), float64(v))
