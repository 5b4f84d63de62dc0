"""A query transformer: learned queries look at an image's tokens and come back as a short sequence.

Source: Li et al. 2023 (BLIP-2, arXiv 2301.12597), the Q-Former without its text branch, here with
cross-attention in every block and without dropout.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, join_heads, split_heads
from ref.blocks.mlp import linear, linear_vjp, mlp, mlp_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import self_attention, self_attention_vjp
from ref.dims import dims, float64


class MappingBlock(NamedTuple):
    """Self-attention w_q .. b_o, cross-attention w_cq .. b_co, an MLP, and a norm after each.

    w_ck and w_cv are [d_v, d_m]; a bias may be None.
    """

    w_q: np.ndarray
    b_q: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray
    w_cq: np.ndarray
    b_cq: np.ndarray
    w_ck: np.ndarray
    b_ck: np.ndarray
    w_cv: np.ndarray
    b_cv: np.ndarray
    w_co: np.ndarray
    b_co: np.ndarray
    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    ln3_scale: np.ndarray
    ln3_bias: np.ndarray
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray


class MappingParams(NamedTuple):
    """Learned queries [n_q, d_m], their norm, the blocks, and a last map [d_m, d] or None."""

    queries: np.ndarray
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    blocks: tuple[MappingBlock, ...]
    w_out: np.ndarray | None = None
    b_out: np.ndarray | None = None


def mapping_network(visual, params: MappingParams, *, num_heads, eps=1e-12):
    """Queries that have looked at an image: visual [..., n_v, d_v] -> [..., n_q, d_m], or d with w_out.

    x = LN(queries); each block x = LN(x + self(x)), LN(x + cross(x, visual)), LN(x + MLP(x)), exact GELU.
    """
    hidden = _queries(visual, params, num_heads, eps)
    for p in params.blocks:
        hidden.append(_mapping_block(hidden[-1], float64(visual), p, num_heads, eps)[-1])
    return hidden[-1] if params.w_out is None else linear(hidden[-1], params.w_out, params.b_out)


def mapping_network_backward(visual, params: MappingParams, dprefix, *, num_heads, eps=1e-12):
    """(dvisual, MappingParams of gradients) of `mapping_network` for its cotangent."""
    visual, hidden = float64(visual), _queries(visual, params, num_heads, eps)
    for p in params.blocks:
        hidden.append(_mapping_block(hidden[-1], visual, p, num_heads, eps)[-1])
    dx, dw, db = float64(dprefix), None, None
    if params.w_out is not None:
        dx, dw, db = linear_vjp(hidden[-1], params.w_out, dx, bias=params.b_out is not None)
    dvisual, blocks = np.zeros_like(visual), []
    for x, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dx, dv, grads = _mapping_block_vjp(x, visual, p, dx, num_heads, eps)
        dvisual += dv
        blocks.append(grads)
    dx = dx.reshape(-1, *params.queries.shape).sum(axis=0)
    dq, dscale, dbias = layer_norm_vjp(params.queries, params.ln_scale, dx, eps=eps)
    return dvisual, MappingParams(dq, dscale, dbias, tuple(blocks[::-1]), dw, db)


def init_mapping(rng, *, queries, dim, visual_dim, depth, out=None, hidden=None, std=0.02) -> MappingParams:
    """Normal weights and queries (std), zero biases, unit norms. out: width of a last map, or None."""
    w = lambda *shape: std * rng.standard_normal(shape)
    one, zero, d, v, f = np.ones(dim), np.zeros(dim), dim, visual_dim, hidden or 4 * dim
    block = lambda: MappingBlock(
        w(d, d), zero, w(d, d), zero, w(d, d), zero, w(d, d), zero, w(d, d), zero, w(v, d), zero, w(v, d),
        zero, w(d, d), zero, one, zero, one, zero, one, zero, w(d, f), np.zeros(f), w(f, d), zero,
    )  # fmt: skip
    last = (None, None) if out is None else (w(d, out), np.zeros(out))
    return MappingParams(w(queries, d), one, zero, tuple(block() for _ in range(depth)), *last)


def _queries(visual, params, num_heads, eps):
    """[LN(queries), broadcast to the images]: the list of states that the blocks add to."""
    n_q, d = params.queries.shape
    n = dims(visual=(visual, "... n_v d_v"))
    if params.blocks:
        dims(visual=(visual, "... n_v d_v"), w_ck=(params.blocks[0].w_ck, "d_v d_m"))
    if num_heads < 1 or d % num_heads or n["n_v"] < 1:
        raise ValueError(
            f"num_heads must divide d_m={d}, and visual hold a token, got {num_heads} and {n['n_v']}"
        )
    x = layer_norm(params.queries, params.ln_scale, params.ln_bias, eps=eps)
    return [np.broadcast_to(x, (*n["..."], n_q, d))]


def _mapping_block(x, visual, p, num_heads, eps):
    """(sum before norm 1, x1, q, k, v, sum before norm 2, x2, sum before norm 3, output)."""
    s1 = x + self_attention(x, p, num_heads=num_heads)
    x1 = layer_norm(s1, p.ln1_scale, p.ln1_bias, eps=eps)
    maps = (x1, p.w_cq, p.b_cq), (visual, p.w_ck, p.b_ck), (visual, p.w_cv, p.b_cv)
    q, k, v = (split_heads(linear(*m), num_heads) for m in maps)
    s2 = x1 + linear(join_heads(attention_dense(q, k, v)), p.w_co, p.b_co)
    x2 = layer_norm(s2, p.ln2_scale, p.ln2_bias, eps=eps)
    s3 = x2 + mlp(x2, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
    return s1, x1, q, k, v, s2, x2, s3, layer_norm(s3, p.ln3_scale, p.ln3_bias, eps=eps)


def _mapping_block_vjp(x, visual, p, dy, num_heads, eps):
    """(dx, dvisual, MappingBlock of gradients)."""
    s1, x1, q, k, v, s2, x2, s3, _ = _mapping_block(x, visual, p, num_heads, eps)
    g = {}
    d3, g["ln3_scale"], g["ln3_bias"] = layer_norm_vjp(s3, p.ln3_scale, dy, eps=eps)
    d, g["w_fc1"], g["b_fc1"], g["w_fc2"], g["b_fc2"] = mlp_vjp(x2, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, d3)
    d2, g["ln2_scale"], g["ln2_bias"] = layer_norm_vjp(s2, p.ln2_scale, d3 + d, eps=eps)
    d, g["w_co"], g["b_co"] = linear_vjp(
        join_heads(attention_dense(q, k, v)), p.w_co, d2, bias=p.b_co is not None
    )
    dq, dk, dv = (join_heads(t) for t in attention_dense_vjp(q, k, v, split_heads(d, num_heads)))
    d, g["w_cq"], g["b_cq"] = linear_vjp(x1, p.w_cq, dq, bias=p.b_cq is not None)
    dvisual, g["w_ck"], g["b_ck"] = linear_vjp(visual, p.w_ck, dk, bias=p.b_ck is not None)
    more, g["w_cv"], g["b_cv"] = linear_vjp(visual, p.w_cv, dv, bias=p.b_cv is not None)
    d1, g["ln1_scale"], g["ln1_bias"] = layer_norm_vjp(s1, p.ln1_scale, d2 + d, eps=eps)
    d, attention = self_attention_vjp(x, p, d1, num_heads=num_heads)
    return d1 + d, dvisual + more, MappingBlock(**g, **attention)
