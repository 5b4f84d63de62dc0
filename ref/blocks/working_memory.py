"""A shared workspace: a few slots that tokens compete to write, and a sum of outer products.

Source: Goyal et al. 2022 (arXiv 2103.01197), as in the code released with it (slots, competition, gates); Le
et al. 2020 (arXiv 2002.03519) for the outer-product attention. Logits are not scaled unless asked, and
weights beyond the topk are cut after the softmax without renormalising, as in that code.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.mlp import linear, linear_vjp, relu, sigmoid
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.optim import tree_map
from ref.blocks.softmax import softmax, softmax_vjp
from ref.checks import check_num_heads, one_of
from ref.dims import dims, float64

GATES = ("unit", "memory")


class WriteParams(NamedTuple):
    """N slots of width D that read tokens of width Din; reading alone uses w_in to b_v.

    w_in [Din, D]; maps w_q, w_k, w_v, w_mlp [D, D] (w_mlp [2, D, D], b_mlp [2, D] with tie_mlp=False); two
    norms [D]; gates: v_gate [D], w_gate [D, 2G], and w_slot [N, D, 2G] of each slot, G = D ("unit") or 1
    ("memory"), first the columns of the input gate; input_bias and forget_bias [].
    """

    w_in: np.ndarray
    b_in: np.ndarray
    w_q: np.ndarray
    b_q: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    w_mlp: np.ndarray | None = None
    b_mlp: np.ndarray | None = None
    ln1_scale: np.ndarray | None = None
    ln1_bias: np.ndarray | None = None
    ln2_scale: np.ndarray | None = None
    ln2_bias: np.ndarray | None = None
    v_gate: np.ndarray | None = None
    w_gate: np.ndarray | None = None
    b_gate: np.ndarray | None = None
    w_slot: np.ndarray | None = None
    b_slot: np.ndarray | None = None
    input_bias: np.ndarray | float = 0.0
    forget_bias: np.ndarray | float = 1.0


def competitive_write(x, wm, params: WriteParams, *, heads, topk, scale=False, gate="unit", tie_mlp=True):
    """The slots after tokens x [B, T, Din] have competed to write to wm [B, N, D]: [B, N, D].

    Each slot and head attends to the tokens and keeps its topk largest weights (None: all). With h the slots
    that have read, normed and passed through an MLP: W' = I tanh(h) + F W, gates I and F from the
    tokens' mean and from each slot. scale: logits over sqrt(D / heads). tie_mlp: the MLP's layers are one.
    Raises: ValueError naming the argument at fault.
    """
    s = _write(x, wm, params, heads, topk, scale, gate, tie_mlp)
    return s["I"] * np.tanh(s["h"]) + s["F"] * float64(wm)


def write_weights(x, wm, params: WriteParams, *, heads, topk, scale=False):
    """[B, H, N, T]: what each slot takes from each token; at most topk of a row are not 0."""
    _check(x, wm, params, heads, topk)
    a, keep = _competition(linear(x, params.w_in, params.b_in), wm, params, heads, topk, scale)[:2]
    return a * keep


def competitive_write_backward(x, wm, params: WriteParams, dout, *, heads, topk, scale=False, gate="unit",
                               tie_mlp=True):  # fmt: skip
    """(dx, dwm, WriteParams of gradients) of `competitive_write`; who won is taken as constant."""
    s, p, g = _write(x, wm, params, heads, topk, scale, gate, tie_mlp), params, {}
    x, wm, dout = float64(x, wm, dout)
    th, G = np.tanh(s["h"]), s["I"].shape[-1]
    sums = lambda t: t if G == wm.shape[-1] else t.sum(axis=-1, keepdims=True)
    dI, dF = sums(dout * th) * s["I"] * (1 - s["I"]), sums(dout * wm) * s["F"] * (1 - s["F"])
    g["input_bias"], g["forget_bias"] = dI.sum(), dF.sum()
    dgate, dwm, tw = np.concatenate([dI, dF], axis=-1), dout * s["F"], np.tanh(wm)
    g["w_slot"], g["b_slot"] = np.einsum("bnd,bne->nde", tw, dgate), dgate.sum(axis=0)
    dwm = dwm + np.einsum("bne,nde->bnd", dgate, p.w_slot) * (1 - tw**2)
    dmean, g["w_gate"], g["b_gate"] = linear_vjp(s["mean"], p.w_gate, dgate.sum(axis=1))
    dpre = (dmean / x.shape[1])[:, None] * (p.v_gate * s["xp"] > 0)
    dxp, g["v_gate"] = dpre * p.v_gate, (dpre * s["xp"]).sum(axis=(0, 1))
    ds, g["ln2_scale"], g["ln2_bias"] = layer_norm_vjp(s["sum2"], p.ln2_scale, dout * s["I"] * (1 - th**2))
    dm, grads = ds, []
    for i in (1, 0):
        w = p.w_mlp if tie_mlp else p.w_mlp[i]
        dm, *layer = linear_vjp(s["m"][i], w, dm * (s["m"][i + 1] > 0))
        grads.insert(0, layer)
    join = np.add if tie_mlp else lambda a, b: np.stack([a, b])
    g["w_mlp"], g["b_mlp"] = (join(a, b) for a, b in zip(*grads, strict=True))
    d, g["ln1_scale"], g["ln1_bias"] = layer_norm_vjp(s["sum1"], p.ln1_scale, ds + dm)
    a, keep, q, k, v, factor = s["competition"]
    do = split_heads(d, heads)
    dlogits = factor * softmax_vjp(a, do @ v.swapaxes(-1, -2) * keep)
    dk, dv = dlogits.swapaxes(-1, -2) @ q, (a * keep).swapaxes(-1, -2) @ do
    more, g["w_q"], g["b_q"] = linear_vjp(wm, p.w_q, join_heads(dlogits @ k))
    for name, t in (("k", dk), ("v", dv)):
        part, g[f"w_{name}"], g[f"b_{name}"] = linear_vjp(s["xp"], getattr(p, f"w_{name}"), join_heads(t))
        dxp = dxp + part
    dx, g["w_in"], g["b_in"] = linear_vjp(x, p.w_in, dxp)
    return dx, dwm + d + more, WriteParams(**g)


def read_working_memory(x, wm, params: WriteParams, *, heads, scale=False):
    """What tokens x [B, T, Din] find in the slots wm [B, N, D], by the maps of the writing: [B, T, D]."""
    _check(x, wm, params, heads)
    return attend(linear(x, params.w_in, params.b_in), wm, params, heads=heads, scale=scale)


def read_working_memory_backward(x, wm, params: WriteParams, du, *, heads, scale=False):
    """(dx, dwm, WriteParams of gradients) of `read_working_memory`; 0 for what it does not read."""
    _check(x, wm, params, heads)
    xp = linear(x, params.w_in, params.b_in)
    dxp, dwm, grads = attend_vjp(xp, wm, params, du, heads=heads, scale=scale)
    dx, dw, db = linear_vjp(float64(x), params.w_in, dxp)
    return dx, dwm, grads._replace(w_in=dw, b_in=db)


def attend(queries, states, params: WriteParams, *, heads, scale=False):
    """Attention of queries [B, T, D] over states [B, N, D] with the maps of params, no output map."""
    q, k, v, factor = _heads(queries, states, params, heads, scale)
    return join_heads(softmax(factor * q @ k.swapaxes(-1, -2)) @ v)


def attend_vjp(queries, states, params: WriteParams, du, *, heads, scale=False):
    """(dqueries, dstates, WriteParams of gradients) of `attend`; 0 for what it does not read."""
    q, k, v, factor = _heads(queries, states, params, heads, scale)
    a, do = softmax(factor * q @ k.swapaxes(-1, -2)), split_heads(float64(du), heads)
    dlogits = factor * softmax_vjp(a, do @ v.swapaxes(-1, -2))
    grads = tree_map(lambda t: np.zeros(np.shape(t)), params)._asdict()
    back = (("q", queries, dlogits @ k), ("k", states, dlogits.swapaxes(-1, -2) @ q),
            ("v", states, a.swapaxes(-1, -2) @ do))  # fmt: skip
    d = {}
    for name, of, t in back:
        d[name], grads[f"w_{name}"], grads[f"b_{name}"] = linear_vjp(
            float64(of), getattr(params, f"w_{name}"), join_heads(t)
        )
    return d["q"], d["k"] + d["v"], WriteParams(**grads)


def gate_size(gate, width):
    """Columns of one gate of a slot: its width ("unit"), or 1 ("memory")."""
    one_of("gate", gate, GATES)
    return width if gate == "unit" else 1


def outer_product_attention(q, k, v):
    """sum_m tanh(q_s * k_m) v_m^T: q [B, S, D], k and v [B, N, D] -> a matrix a query, [B, S, D, D]."""
    _check_outer(q, k, v)
    t = np.tanh(float64(q)[:, :, None] * float64(k)[:, None])  # [B, S, N, D]
    return t.swapaxes(-1, -2) @ float64(v)[:, None]


def outer_product_attention_backward(q, k, v, dout):
    """(dq, dk, dv) of `outer_product_attention` for dout [B, S, D, D]."""
    _check_outer(q, k, v)
    q, k, v, dout = float64(q, k, v, dout)
    t = np.tanh(q[:, :, None] * k[:, None])
    dz = (1 - t**2) * (v[:, None] @ dout.swapaxes(-1, -2))  # [B, S, N, D]: rows C v_m
    return (dz * k[:, None]).sum(axis=2), (dz * q[:, :, None]).sum(axis=1), (t @ dout).sum(axis=1)


def _write(x, wm, p, heads, topk, scale, gate, tie_mlp):
    """Everything that writing computes, by name."""
    n = _check(x, wm, p, heads, topk)
    G = gate_size(gate, n["D"])
    if lacking := [name for name, t in zip(p._fields, p, strict=True) if t is None]:
        raise ValueError(f"params lacks {', '.join(lacking)}, which writing needs")
    dims(w_gate=(p.w_gate, f"D {2 * G}"), w_slot=(p.w_slot, f"{n['N']} D {2 * G}"))
    if np.ndim(p.w_mlp) != (2 if tie_mlp else 3):
        raise ValueError(
            f"w_mlp must have {2 if tie_mlp else 3} axes with {tie_mlp=}, got {np.ndim(p.w_mlp)}"
        )
    x, wm = float64(x, wm)
    xp = linear(x, p.w_in, p.b_in)
    competition = a, keep, _, _, v, _ = _competition(xp, wm, p, heads, topk, scale)
    sum1 = wm + join_heads((a * keep) @ v)
    m = [layer_norm(sum1, p.ln1_scale, p.ln1_bias)]
    for i in range(2):
        m.append(relu(linear(m[-1], *((p.w_mlp, p.b_mlp) if tie_mlp else (p.w_mlp[i], p.b_mlp[i])))))
    sum2, mean = m[0] + m[2], relu(p.v_gate * xp).mean(axis=1)
    g = (
        linear(mean, p.w_gate, p.b_gate)[:, None]
        + np.einsum("bnd,nde->bne", np.tanh(wm), p.w_slot)
        + p.b_slot
    )
    return {
        "xp": xp, "competition": competition, "sum1": sum1, "m": m, "sum2": sum2, "mean": mean,
        "h": layer_norm(sum2, p.ln2_scale, p.ln2_bias),
        "I": sigmoid(g[..., :G] + p.input_bias), "F": sigmoid(g[..., G:] + p.forget_bias),
    }  # fmt: skip


def _competition(xp, wm, p, heads, topk, scale):
    """(softmax weights [B, H, N, T], bool of the kept, q, k, v, factor); of equals the first wins."""
    q, k, v, factor = _heads(wm, xp, p, heads, scale)
    a = softmax(factor * q @ k.swapaxes(-1, -2))
    keep = np.ones(a.shape, bool)
    if topk is not None:
        keep = np.zeros(a.shape, bool)
        np.put_along_axis(keep, np.argsort(-a, axis=-1, kind="stable")[..., :topk], True, axis=-1)
    return a, keep, q, k, v, factor


def _heads(queries, states, p, heads, scale):
    q = split_heads(linear(queries, p.w_q, p.b_q), heads)
    k, v = (split_heads(linear(states, w, b), heads) for w, b in ((p.w_k, p.b_k), (p.w_v, p.b_v)))
    return q, k, v, 1 / np.sqrt(q.shape[-1]) if scale else 1.0


def _check(x, wm, p, heads, topk=None):
    n = dims(x=(x, "B T Din"), wm=(wm, "B N D"), w_in=(p.w_in, "Din D"), w_q=(p.w_q, "D D"))
    check_num_heads(n["D"], heads, name="heads")
    if n["N"] < 1 or n["T"] < 1:
        raise ValueError(f"need at least one slot in wm and one token in x, got {n['N']} and {n['T']}")
    if topk is not None and not 1 <= topk <= n["T"]:
        raise ValueError(f"topk must be in 1..T={n['T']}, or None for all, got {topk}")
    return n


def _check_outer(q, k, v):
    dims(q=(q, "B S D"), k=(k, "B N D"), v=(v, "B N D"))
