"""The gate of a mixture of experts: softmax over all experts, the largest few kept, and a loss that balances.

Source: M3ViT (arXiv 2210.14793) and its released NoisyGate_VMoE, after Shazeer et al. 2017 and V-MoE.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import erf
from ref.blocks.softmax import softmax, softmax_vjp
from ref.dims import dims, float64

TINY = 1e-10  # under the squared mean of a coefficient of variation


class GateOut(NamedTuple):
    """indices [..., k] int32 and scores [..., k] of the experts chosen, probs [..., E], aux_loss (scalar)."""

    indices: np.ndarray
    scores: np.ndarray
    probs: np.ndarray
    aux_loss: np.ndarray


def moe_gate(x, w_gate, *, top_k=2, noise=None, noise_std=1.0, train=False, as_released=False) -> GateOut:
    """The top_k largest of softmax(x w_gate^T), not normalised again; of equal logits the lower index first.

    Args: x [..., D], w_gate [E, D]. noise [..., E]: standard normal, added noise_std / E times (train only).
      train: compute aux_loss = cv^2(importance) + cv^2(load), cv^2 the squared coefficient of variation over
        experts of the scores that each gets, and of the probability that it is among the top_k (without
        noise, or with top_k = E, of the tokens that chose it). 0 in evaluation. The caller weighs it (0.01).
      as_released: thresholds of that probability are softmax values although they are compared with logits,
        as in the released code.
    Raises: ValueError naming the argument: shapes, top_k not in 1..E, noise without train, NaN.
    """
    s = _forward(x, w_gate, top_k, noise, noise_std, train, as_released)
    return GateOut(s["order"][..., :top_k].astype(np.int32), s["scores"], s["p"], s["loss"])


def moe_gate_backward(
    dscores, daux, x, w_gate, *, top_k=2, noise=None, noise_std=1.0, train=False, as_released=False
):
    """(dx, dw_gate) of `moe_gate` for cotangents of scores [..., k] and aux_loss.

    Gradients pass through the scores and the thresholds, not through the choice of experts.
    """
    s = _forward(x, w_gate, top_k, noise, noise_std, train, as_released)
    x, w, E = *float64(x, w_gate), len(w_gate)
    dims(scores=(s["scores"], f"... {top_k}"), dscores=(dscores, f"... {top_k}"))
    chosen = s["order"][..., :top_k]
    kept = float64(dscores)
    dp, dnoisy, dclean = np.zeros_like(s["p"]), np.zeros_like(s["p"]), np.zeros_like(s["p"])
    if train:
        kept = kept + daux * _cv_squared_grad(s["importance"])[chosen]
    np.put_along_axis(dp, chosen, kept, axis=-1)
    if train and s["std"]:
        dprob = daux * _cv_squared_grad(s["load"])
        dz = dprob * np.exp(-(s["z"] ** 2) / 2) / np.sqrt(2 * np.pi) / s["std"]
        dclean += dz
        target = dp if as_released else dnoisy
        for rank, part in ((top_k, s["inside"]), (top_k - 1, ~s["inside"])):
            at = s["order"][..., rank, None]
            moved = np.take_along_axis(target, at, -1) - (dz * part).sum(-1, keepdims=True)
            np.put_along_axis(target, at, moved, axis=-1)
    dclean += dnoisy + softmax_vjp(s["p"], dp)
    rows = dclean.reshape(-1, E)
    return dclean @ w, rows.T @ x.reshape(-1, x.shape[-1])


def build_expert_queues(indices, scores, *, num_experts):
    """Tokens by expert, in the order of the tokens.

    Args: indices [N, k] int, distinct in a row, scores [N, k].
    Returns: queue [E, N] int32, -1 where empty; queue_scores [E, N], 0 there; lengths [E] int32; active: the
      experts with a token, ascending, int32.
    Raises: ValueError naming the argument.
    """
    n = dims(indices=(indices, "N k"), scores=(scores, "N k"))
    indices, scores = np.asarray(indices), np.asarray(scores)
    check_choice(indices, num_experts)
    queue = np.full((num_experts, n["N"]), -1, np.int32)
    held = np.zeros((num_experts, n["N"]), scores.dtype)
    lengths = np.zeros(num_experts, np.int32)
    for token in range(n["N"]):
        for e, s in zip(indices[token], scores[token], strict=True):
            queue[e, lengths[e]], held[e, lengths[e]] = token, s
            lengths[e] += 1
    return queue, held, lengths, np.flatnonzero(lengths).astype(np.int32)


def check_choice(indices, num_experts):
    """Raise ValueError unless indices [N, k] are distinct integers in a row, in 0..num_experts - 1."""
    if indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    if indices.size and not 0 <= indices.min() <= indices.max() < num_experts:
        raise ValueError(f"indices must be in 0..{num_experts - 1}, got {indices.min()} to {indices.max()}")
    if (np.diff(np.sort(indices, axis=-1), axis=-1) == 0).any():
        raise ValueError("indices of a token must differ from each other")


def check_gate(x, w_gate, top_k, noise, noise_std, train):
    """E, the experts. Raises: ValueError naming the argument of `moe_gate` at fault."""
    E = dims(x=(x, "... D"), w_gate=(w_gate, "E D"))["E"]
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k must be in 1..{E}, the experts, got {top_k}")
    if noise is not None and not train:
        raise ValueError("noise is for training: pass train=True or no noise")
    if noise_std < 0:
        raise ValueError(f"noise_std must not be negative, got {noise_std}")
    if noise is not None:
        dims(x=(x, "... D"), noise=(noise, f"... {E}"))
    return E


def _forward(x, w_gate, k, noise, noise_std, train, as_released):
    E, given = check_gate(x, w_gate, k, noise, noise_std, train), noise is not None
    x, w = float64(x, w_gate)
    clean = x @ w.T
    if np.isnan(clean).any():
        raise ValueError("x and w_gate must be finite, a logit is NaN")
    std = noise_std / E if given else 0.0
    noisy = clean + std * float64(noise) if given else clean
    p = softmax(noisy)
    order = np.argsort(-noisy, axis=-1, kind="stable")
    chosen = order[..., :k]
    s = {
        "p": p,
        "order": order,
        "scores": np.take_along_axis(p, chosen, -1),
        "std": 0.0,
        "loss": np.zeros(()),
    }
    if not train:
        return s
    gates = np.zeros_like(p)
    np.put_along_axis(gates, chosen, s["scores"], axis=-1)
    gates = gates.reshape(-1, E)
    s["importance"], s["load"] = gates.sum(0), (gates > 0).sum(0).astype(float)
    if k < E and std > 0:
        values = p if as_released else noisy
        t_in = np.take_along_axis(values, order[..., k, None], -1)
        t_out = np.take_along_axis(values, order[..., k - 1, None], -1)
        s["std"], s["inside"] = std, noisy > t_in
        s["z"] = (clean - np.where(s["inside"], t_in, t_out)) / std
        s["load"] = (0.5 * (1 + erf(s["z"] / np.sqrt(2)))).reshape(-1, E).sum(0)
    s["loss"] = np.asarray(_cv_squared(s["importance"]) + _cv_squared(s["load"]))
    return s


def _cv_squared(v):
    return 0.0 if len(v) == 1 else v.var(ddof=1) / (v.mean() ** 2 + TINY)


def _cv_squared_grad(v):
    E = len(v)
    if E == 1:
        return np.zeros(1)
    mean, below = v.mean(), v.mean() ** 2 + TINY
    return 2 * (v - mean) / (E - 1) / below - v.var(ddof=1) * 2 * mean / E / below**2
