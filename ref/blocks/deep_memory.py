"""A network of two layers as memory, trained by gradient descent while the text is read.

Source: Behrouz et al. 2024 (Titans, arXiv 2501.00663), stored by chunks as its open version does
(lucidrains/titans-pytorch, MIT). The optional residual path and norm of that version are left out.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.linalg import newton_schulz
from ref.blocks.mlp import gelu, gelu_grad
from ref.checks import at_least_one
from ref.dims import dims, float64


class DeepMemory(NamedTuple):
    """The weights of M(z) = gelu(z w_in) w_out: w_in [..., dk, hidden], w_out [..., hidden, dv]."""

    w_in: np.ndarray
    w_out: np.ndarray


def deep_memory_update(k, v, weights0: DeepMemory, *, lr, decay, momentum, chunk=1, muon=False, loss="l2",
                       momentum0: DeepMemory | None = None):  # fmt: skip
    """Train a deep memory on k -> v, a step a chunk: S = momentum S - g, W = (1 - decay) W + S.

    g is the gradient of sum_t lr_t loss_t over the chunk, at the weights before it.
    Args: k [B, T, dk], v [B, T, dv]; weights0 [B, dk, hidden], [B, hidden, dv]; lr [B, T]; decay, momentum
        [B, T / chunk] in [0, 1]. muon: W = (1 - decay) W + newton_schulz(S), for each matrix by itself.
      loss: "l2", half the squared error; "mse", its mean over the features without the half.
    Returns: (weights, momenta), DeepMemory each, with a chunk axis after the batch: [B, T / chunk, ..].
    Raises: ValueError naming the argument at fault; chunk must divide T.
    """
    options = {"lr": lr, "decay": decay, "momentum": momentum, "chunk": chunk, "muon": muon, "loss": loss}
    return _train_deep(k, v, weights0, window=1, momentum0=momentum0, **options)


def deep_memory_scan(q, k, v, weights0: DeepMemory, *, lr, decay, momentum, chunk=1, window=1, muon=False,
                     loss="l2", read="after"):  # fmt: skip
    """(y [B, T, dv], weights): `deep_memory_update`, read by the queries [B, T, dk] of every chunk.

    window: each token's loss is summed over the last `window` tokens, those of the chunk before included, at
      the present weights. read: the chunk's weights "after" its step (a query then sees its whole chunk:
      causal with chunk = 1 only) or "before" it (causal). Otherwise as `deep_memory_update`.
    """
    check_read(read)
    dims(q=(q, "B T dk"), k=(k, "B T dk"))
    options = {"lr": lr, "decay": decay, "momentum": momentum, "chunk": chunk, "muon": muon, "loss": loss}
    weights, _ = _train_deep(k, v, weights0, window=window, momentum0=None, **options)
    if read == "before":
        shift = lambda w0, w: np.concatenate([float64(w0)[:, None], w[:, :-1]], axis=1)
        w_in, w_out = (shift(w0, w) for w0, w in zip(weights0, weights, strict=True))
    else:
        w_in, w_out = weights
    B, T, dk = q.shape
    y = gelu(float64(q).reshape(B, T // chunk, chunk, dk) @ w_in) @ w_out
    return y.reshape(B, T, -1), weights


def _train_deep(k, v, weights0, *, lr, decay, momentum, chunk, window, muon, loss, momentum0):
    """See `deep_memory_update`; a token counts for every step of the chunk whose window holds it."""
    check_deep(k, v, weights0, lr, decay, momentum, chunk, window, loss, momentum0)
    k, v, lr, decay, momentum = float64(k, v, lr, decay, momentum)
    W = DeepMemory(*float64(*weights0))
    S = DeepMemory(*(np.zeros_like(w) for w in W) if momentum0 is None else float64(*momentum0))
    weights, momenta = [], []
    for j, stop in enumerate(range(chunk, k.shape[1] + 1, chunk)):
        i = np.arange(max(0, stop - chunk - window + 1), stop)
        lag = np.arange(stop - chunk, stop)[:, None] - i
        weight = lr[:, stop - chunk : stop] @ ((lag >= 0) & (lag < window))
        g = _deep_gradient(k[:, i], v[:, i], weight, W, loss)
        keep, carry = 1 - decay[:, j, None, None], momentum[:, j, None, None]
        S = DeepMemory(*(carry * s - d for s, d in zip(S, g, strict=True)))
        W = DeepMemory(*(keep * w + (newton_schulz(s) if muon else s) for w, s in zip(W, S, strict=True)))
        weights.append(W)
        momenta.append(S)
    stack = lambda steps: DeepMemory(*(np.stack(w, axis=1) for w in zip(*steps, strict=True)))
    return stack(weights), stack(momenta)


def _deep_gradient(k, v, weight, W, loss):
    """Gradient of sum_i weight_i loss_i for W: two products for each matrix."""
    a = k @ W.w_in
    h = gelu(a)
    d = weight[..., None] * (h @ W.w_out - v) * (1.0 if loss == "l2" else 2 / v.shape[-1])
    return DeepMemory(k.mT @ (d @ W.w_out.mT * gelu_grad(a)), h.mT @ d)


def check_deep(k, v, weights0, lr, decay, momentum, chunk, window, loss, momentum0):
    """Raise ValueError for a bad call of a deep memory."""
    n = dims(k=(k, "B T dk"), v=(v, "B T dv"), lr=(lr, "B T"))
    if chunk < 1 or n["T"] % chunk:
        raise ValueError(f"chunk must divide the length T={n['T']}, got {chunk}")
    at_least_one(window=window)
    if loss not in ("l2", "mse"):
        raise ValueError(f'loss must be "l2" or "mse", got {loss!r}')
    for name, g in (("decay", decay), ("momentum", momentum)):
        dims(k=(k, "B T dk"), **{name: (g, f"B {n['T'] // chunk}")})
        check_gate(name, g)
    for name, w in (("weights0", weights0), ("momentum0", momentum0)):
        if w is not None:
            dims(k=(k, "B T dk"), v=(v, "B T dv"), **{f"{name}.w_in": (w.w_in, "B dk hidden")},
                 **{f"{name}.w_out": (w.w_out, "B hidden dv")})  # fmt: skip


def check_read(read):
    """Raise ValueError unless read is "after" or "before"."""
    if read not in ("after", "before"):
        raise ValueError(f'read must be "after" or "before", got {read!r}')


def check_gate(name, gate):
    """Gates are in [0, 1], NaN is not; traced values cannot be looked at."""
    if isinstance(gate, np.ndarray) and not ((gate >= 0) & (gate <= 1)).all():
        raise ValueError(f"{name} must be in [0, 1]")
