"""Slots: vectors that compete for the tokens of an input, each for its share, and are updated by a GRU.

Source: Locatello et al. 2020 (slot attention), Chang et al. 2022 (implicit gradient, ISA), Jia et al. 2023
(learned queries, BO-QSA); in the form of Hong et al. 2024 (arXiv 2305.15775), without an MLP after the GRU.
Weights [in, out]. The backward passes take the stop-gradients as part of the definition.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.optim import tree_map
from ref.blocks.softmax import softmax, softmax_vjp
from ref.dims import dims, float64
from ref.models.rnn import gru_reset_after_cell, gru_reset_after_cell_vjp


class SlotParams(NamedTuple):
    """Slots of width d over features of width F: norms [F] and [d], w_q [d, d], w_k, w_v [F, d], a GRU.

    w_ih, w_hh [d, 3d], b_ih, b_hh [3d]: columns r, z, n. mu, log_sigma [1, 1, d]: the first slots'
    distribution, None where the first slots are given. ISA does not read ln_slot.
    """

    ln_in_scale: np.ndarray
    ln_in_bias: np.ndarray
    ln_slot_scale: np.ndarray
    ln_slot_bias: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_ih: np.ndarray
    w_hh: np.ndarray
    b_ih: np.ndarray
    b_hh: np.ndarray
    mu: np.ndarray | None = None
    log_sigma: np.ndarray | None = None


def concept_slot_attention(x, noise, params: SlotParams, *, iterations=1, eps=1e-8):
    """(slots [B, C, d], attn [B, T, C]): slot attention from mu + exp(log_sigma) noise.

    Each step: attn = softmax over slots of k q^T / sqrt(d); u = the mean of v under attn + eps, over tokens;
    slots = GRU(u, slots). attn is the last step's, before it is divided by its sum over tokens.
    Args: x [B, T, F], T >= 1; noise [B, C, d], standard normal (zeros: start at the mean).
    Raises: ValueError for iterations < 1, no tokens or shapes that disagree.
    """
    slots = _first_slots(x, noise, params)
    steps, _, _, attn = _run(x, slots, params, _count(iterations, 1), eps, "sa")
    return steps[-1], attn


def concept_slot_attention_vjp(x, noise, params: SlotParams, dslots, *, iterations=1, eps=1e-8):
    """(dx, dnoise, dparams) of `concept_slot_attention` for dslots [B, C, d], through every step."""
    start = _first_slots(x, noise, params)
    dx, dstart, grads = _back(x, start, params, dslots, _count(iterations, 1), 0, eps, "sa")
    sigma = np.exp(float64(params.log_sigma))
    return (
        dx,
        dstart * sigma,
        grads._replace(
            mu=dstart.sum(axis=(0, 1), keepdims=True),
            log_sigma=(dstart * sigma * noise).sum(axis=(0, 1), keepdims=True),
        ),
    )


def concept_isa(x, slots0, params: SlotParams, *, iterations=3, eps=1e-8):
    """(slots, attn) as above from slots0 [B, C, d]: `iterations` steps, then one more, the one that learns.

    Slots are not normalised before w_q, and eps joins the sum over tokens only.
    Raises: ValueError for iterations < 0, no tokens or shapes that disagree.
    """
    steps, _, _, attn = _run(x, slots0, params, _count(iterations, 0) + 1, eps, "isa")
    return steps[-1], attn


def concept_isa_vjp(x, slots0, params: SlotParams, dslots, *, iterations=3, eps=1e-8):
    """(dx, dslots0, dparams): the gradient of the last step from constant slots, so dslots0 = 0."""
    n = _count(iterations, 0)
    dx, dstart, grads = _back(x, slots0, params, dslots, n + 1, n, eps, "isa")
    return dx, np.zeros_like(dstart), grads


def concept_bo_qsa(x, slots0, params: SlotParams, *, iterations=2, eps=1e-8):
    """(slots, attn) as above from learned queries slots0 [B, C, d], eps in the sum over tokens only.

    Before the last step slots = stop(slots) + slots0 - stop(slots0): the same value, another gradient.
    Raises: ValueError for iterations < 1, no tokens or shapes that disagree.
    """
    steps, _, _, attn = _run(x, slots0, params, _count(iterations, 1), eps, "qsa")
    return steps[-1], attn


def concept_bo_qsa_vjp(x, slots0, params: SlotParams, dslots, *, iterations=2, eps=1e-8):
    """(dx, dslots0, dparams): the gradient of the last step, its slots' handed straight to slots0."""
    n = _count(iterations, 1)
    return _back(x, slots0, params, dslots, n, n - 1, eps, "qsa")


def init_slots(rng, features, width, *, learned_start=True) -> SlotParams:
    """Maps uniform in +-1/sqrt(inputs), the GRU in +-1/sqrt(width); learned_start: with mu and log_sigma."""
    u = lambda n, *shape: rng.uniform(-1, 1, shape) / np.sqrt(n)
    d, F = width, features
    start = (np.sqrt(3) * u(d, 1, 1, d), np.sqrt(3) * u(d, 1, 1, d)) if learned_start else (None, None)
    return SlotParams(
        np.ones(F), np.zeros(F), np.ones(d), np.zeros(d), u(d, d, d), u(F, F, d), u(F, F, d),
        u(d, d, 3 * d), u(d, d, 3 * d), u(d, 3 * d), u(d, 3 * d), *start,
    )  # fmt: skip


def slot_macs(tokens, concepts, width, *, iterations=1):
    """Multiply-accumulates of `concept_slot_attention` for one input of the slots' width.

    2 T d^2 for keys and values, and a step C d^2 (queries) + 2 T C d (attention) + 6 C d^2 (GRU).
    """
    T, C, d = tokens, concepts, width
    return 2 * T * d**2 + iterations * (7 * C * d**2 + 2 * T * C * d)


def _first_slots(x, noise, params):
    if params.mu is None or params.log_sigma is None:
        raise ValueError("params must hold mu and log_sigma: slot attention draws its first slots")
    dims(x=(x, "B T F"), noise=(noise, "B C d"), mu=(params.mu, "1 1 d"))
    return params.mu + np.exp(float64(params.log_sigma)) * noise


def _count(iterations, least):
    if iterations < least:
        raise ValueError(f"iterations must be at least {least}, got {iterations}")
    return iterations


def _run(x, slots, p, steps, eps, kind):
    """(slots before and after each step, k, v, attention of the last step)."""
    n = dims(
        x=(x, "B T F"), slots0=(slots, "B C d"), w_q=(p.w_q, "d d"), w_k=(p.w_k, "F d"), w_v=(p.w_v, "F d")
    )
    if n["T"] < 1:
        raise ValueError("x must hold at least one token")
    y = layer_norm(x, p.ln_in_scale, p.ln_in_bias)
    k, v = linear(y, p.w_k) * n["d"] ** -0.5, linear(y, p.w_v)
    found, attn = [float64(slots)], None
    for _ in range(steps):
        *_, attn, _, u = _attend(found[-1], k, v, p, eps, kind)
        found.append(gru_reset_after_cell(u, found[-1], p.w_ih, p.w_hh, p.b_ih, p.b_hh))
    return found, k, v, attn


def _attend(slots, k, v, p, eps, kind):
    """(what w_q reads, q, attn [B, T, C], attn over its sum over tokens, u [B, C, d])."""
    s = slots if kind == "isa" else layer_norm(slots, p.ln_slot_scale, p.ln_slot_bias)
    q = linear(s, p.w_q)
    attn = softmax(k @ np.swapaxes(q, -1, -2))
    if kind == "sa":
        share = (attn + eps) / (attn + eps).sum(axis=-2, keepdims=True)
    else:
        share = attn / (attn.sum(axis=-2, keepdims=True) + eps)
    return s, q, attn, share, np.swapaxes(share, -1, -2) @ v


def _back(x, start, p, dslots, steps, first, eps, kind):
    """(dx, dslots before step `first`, SlotParams) through the steps first .. steps - 1."""
    found, k, v, _ = _run(x, start, p, steps, eps, kind)
    d, dk, dv = float64(dslots), 0.0, 0.0
    total = tree_map(np.zeros_like, p)
    for slots in found[first:-1][::-1]:
        d, dk_step, dv_step, grads = _step_vjp(slots, k, v, p, d, eps, kind)
        dk, dv = dk + dk_step, dv + dv_step
        total = total._replace(**{name: getattr(total, name) + g for name, g in grads.items()})
    y = layer_norm(x, p.ln_in_scale, p.ln_in_bias)
    from_k, dw_k, _ = linear_vjp(y, p.w_k, dk * p.w_q.shape[0] ** -0.5)
    from_v, dw_v, _ = linear_vjp(y, p.w_v, dv)
    dx, dscale, dbias = layer_norm_vjp(x, p.ln_in_scale, from_k + from_v)
    return dx, d, total._replace(w_k=dw_k, w_v=dw_v, ln_in_scale=dscale, ln_in_bias=dbias)


def _step_vjp(slots, k, v, p, dslots, eps, kind):
    """(dslots before the step, dk, dv, gradients by name) of one step."""
    s, q, attn, share, u = _attend(slots, k, v, p, eps, kind)
    du, dbefore, *gru = gru_reset_after_cell_vjp(u, slots, p.w_ih, p.w_hh, p.b_ih, p.b_hh, dslots)
    dshare = v @ np.swapaxes(du, -1, -2)  # [B, T, C]
    plus = eps if kind == "sa" else 0.0
    sums = (attn + plus).sum(axis=-2, keepdims=True) + (eps - plus)
    dattn = (dshare - (dshare * share).sum(axis=-2, keepdims=True)) / sums
    dlogits = softmax_vjp(attn, dattn)
    ds, dw_q, _ = linear_vjp(s, p.w_q, np.swapaxes(dlogits, -1, -2) @ k)
    grads = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), gru, strict=True)) | {"w_q": dw_q}
    if kind != "isa":
        ds, grads["ln_slot_scale"], grads["ln_slot_bias"] = layer_norm_vjp(slots, p.ln_slot_scale, ds)
    return dbefore + ds, dlogits @ q, share @ du, grads
