"""Relative attention of Transformer-XL: keys from a memory and the sequence, scores that know the distance.

Source: Dai et al. 2019 (arXiv 1901.02860), section 3.3 and appendix B, with biases on the projections as an
option. Positions are the sinusoids of Vaswani et al. 2017, all sines before all cosines.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.softmax import softmax, softmax_vjp, weigh
from ref.dims import dims, float64


class RelativeParams(NamedTuple):
    """w_q, w_k, w_v, w_r [D, H dh] (queries, keys, values, positions), w_o [H dh, D]; biases or None."""

    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_r: np.ndarray
    w_o: np.ndarray
    b_q: np.ndarray | None = None
    b_k: np.ndarray | None = None
    b_v: np.ndarray | None = None
    b_r: np.ndarray | None = None
    b_o: np.ndarray | None = None


class RelativeGrads(NamedTuple):
    """Gradients of `relative_attention` by argument; query is None where it was None."""

    x: np.ndarray
    memory: np.ndarray
    params: RelativeParams
    u: np.ndarray
    v_bias: np.ndarray
    query: np.ndarray | None


def relative_attention(x, memory, params: RelativeParams, *, heads, u, v_bias, query=None, mask=None):
    """softmax_j(((q_i + u).k_j + (q_i + v_bias).r_{i-j}) / sqrt(dh)) v_j, joined and mapped by w_o.

    Args: x [B, T, D]; memory [B, M, D], the M steps before, M may be 0: keys and values are those of
        [memory; x]. r_p is the position p = i - j >= 0 in steps, mapped by w_r.
      u, v_bias [H, dh]. query [B, T, D]: what the queries are made of; x if None.
      mask: bool [B or 1, T, M + T], True = may be seen, on top of causality; a step that sees nothing gets
      b_o.
    Returns: [B, T, D] float64. Raises: ValueError naming the argument at fault.
    """
    check_relative(x, memory, params, heads, u, v_bias, query, mask)
    source = np.concatenate([float64(memory), float64(x)], axis=1)
    q, k, v, r = _project(source, float64(x if query is None else query), params, heads)
    p = _weights(q, k, r, u, v_bias, mask)
    return linear(join_heads(weigh(p, v)), params.w_o, params.b_o)


def relative_attention_vjp(x, memory, params: RelativeParams, dy, *, heads, u, v_bias, query=None, mask=None):
    """RelativeGrads of `relative_attention` for the cotangent dy [B, T, D], the weights recomputed."""
    check_relative(x, memory, params, heads, u, v_bias, query, mask)
    p_, M, asked = params, memory.shape[1], float64(x if query is None else query)
    source, dy = np.concatenate([float64(memory), float64(x)], axis=1), float64(dy)
    q, k, v, r = _project(source, asked, p_, heads)
    p = _weights(q, k, r, u, v_bias, mask)
    do, dw_o, db_o = linear_vjp(join_heads(p @ v), p_.w_o, dy, bias=p_.b_o is not None)
    do = split_heads(do, heads)
    ds = softmax_vjp(p, do @ v.mT) / np.sqrt(q.shape[-1])
    dshift = unshift(ds)
    dq_content, dq_position = ds @ k, dshift @ r
    dk = ds.mT @ (q + u[:, None])
    dr = (dshift.mT @ (q + v_bias[:, None])).sum(axis=0)
    parts = (
        (asked, p_.w_q, p_.b_q, join_heads(dq_content + dq_position)),
        (source, p_.w_k, p_.b_k, join_heads(dk)),
        (source, p_.w_v, p_.b_v, join_heads(p.mT @ do)),
        (descending_sinusoids(source.shape[1], source.shape[2]), p_.w_r, p_.b_r, join_heads(dr)),
    )
    (dasked, dw_q, db_q), (d1, dw_k, db_k), (d2, dw_v, db_v), (_, dw_r, db_r) = (
        linear_vjp(z, w, d, bias=b is not None) for z, w, b, d in parts
    )
    dsource = d1 + d2
    dx = dsource[:, M:] + dasked if query is None else dsource[:, M:]
    grads = RelativeParams(dw_q, dw_k, dw_v, dw_r, dw_o, db_q, db_k, db_v, db_r, db_o)
    du, dv_bias = dq_content.sum(axis=(0, 2)), dq_position.sum(axis=(0, 2))
    return RelativeGrads(dx, dsource[:, :M], grads, du, dv_bias, None if query is None else dasked)


def relative_shift(scores):
    """Columns by position -> columns by key: scores [..., T, M + T], positions M + T - 1 .. 0 -> shifted.

    shifted[i, j] is the score of position M + i - j. Columns j > M + i hold what is left over: mask them.
    """
    n = dims(scores=(scores, "... T L"))
    _check_columns(n)
    lead, T, L = n["..."], n["T"], n["L"]
    padded = np.concatenate([np.zeros((*lead, T, 1)), scores], axis=-1)
    return padded.reshape(*lead, L + 1, T)[..., 1:, :].reshape(*lead, T, L)


def unshift(dshifted):
    """The transpose of `relative_shift`: its backward pass."""
    n = dims(dshifted=(dshifted, "... T L"))
    _check_columns(n)
    lead, T, L = n["..."], n["T"], n["L"]
    padded = np.concatenate([np.zeros((*lead, 1, T)), dshifted.reshape(*lead, L, T)], axis=-2)
    return padded.reshape(*lead, T, L + 1)[..., 1:]


def descending_sinusoids(length, width):
    """[sin(p f), cos(p f)], f_m = 10000^(-2 m / width), for p = length - 1 .. 0: [length, width].

    Raises: ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"x must have an even width, for pairs of sine and cosine, got {width}")
    p = np.arange(length - 1, -1, -1)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(p), np.cos(p)], axis=-1)


def init_relative(rng, width, heads, head_dim, *, std=0.02):
    """RelativeParams without biases, normal weights of standard deviation `std`."""
    into, out = (width, heads * head_dim), (heads * head_dim, width)
    return RelativeParams(*(std * rng.standard_normal(s) for s in (into, into, into, into, out)))


def check_relative(x, memory, params, heads, u, v_bias, query, mask):
    """Raise ValueError for a bad call of relative attention."""
    n = dims(x=(x, "B T D"), memory=(memory, "B M D"), u=(u, "H dh"), v_bias=(v_bias, "H dh"))
    if n["H"] != heads:
        raise ValueError(f"u must have heads={heads} rows, got {n['H']}")
    if n["D"] % 2:
        raise ValueError(f"x must have an even width, for pairs of sine and cosine, got {n['D']}")
    wide = heads * n["dh"]
    for name in ("w_q", "w_k", "w_v", "w_r"):
        dims(**{f"params.{name}": (getattr(params, name), f"{n['D']} {wide}")})
    dims(**{"params.w_o": (params.w_o, f"{wide} {n['D']}")})
    if query is not None:
        dims(x=(x, "B T D"), query=(query, "B T D"))
    if mask is not None:
        if mask.dtype != bool:
            raise ValueError(f"mask must be boolean, True = may be seen, got {mask.dtype}")
        dims(mask=(mask, f"rows {n['T']} {n['M'] + n['T']}"))
        if mask.shape[0] not in (1, n["B"]):
            raise ValueError(f"mask.shape[0] must be 1 or B={n['B']}, got {mask.shape[0]}")


def _check_columns(n):
    if n["L"] < n["T"]:
        raise ValueError(f"scores must have at least T={n['T']} columns, M + T of them, got {n['L']}")


def _project(source, asked, params, heads):
    """q [B, H, T, dh]; k, v [B, H, M+T, dh]; r [H, M+T, dh] of the descending positions."""
    p = params
    positions = descending_sinusoids(source.shape[1], source.shape[2])
    maps = ((asked, p.w_q, p.b_q), (source, p.w_k, p.b_k), (source, p.w_v, p.b_v), (positions, p.w_r, p.b_r))
    return tuple(split_heads(linear(z, w, b), heads) for z, w, b in maps)


def _weights(q, k, r, u, v_bias, mask):
    """Attention weights [B, H, T, M+T]."""
    T, L = q.shape[-2], k.shape[-2]
    content = (q + u[:, None]) @ np.swapaxes(k, -1, -2)
    position = relative_shift((q + v_bias[:, None]) @ np.swapaxes(r, -1, -2))
    seen = np.arange(L) <= np.arange(L - T, L)[:, None]
    seen = seen if mask is None else seen & mask[:, None]
    return softmax(np.where(seen, (content + position) / np.sqrt(q.shape[-1]), -np.inf))
