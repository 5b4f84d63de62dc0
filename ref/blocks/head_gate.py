"""A gate for every head of attention, read from the attention's input: five kinds.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 4.2, and the code released with it.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.mlp import relu, sigmoid
from ref.checks import one_of
from ref.dims import dims, float64

KINDS = ("linear", "mlp", "all_heads", "per_head", "unconditional")


class GateParams(NamedTuple):
    """A gate by its kind. linear, per_head: w [H, d], b [H]; mlp: w [H, n, d], b [H, n], w_out [H, n],
    b_out [H]; all_heads: w [H, H d], b [H]; unconditional: b [H] alone.
    """

    w: np.ndarray | None
    b: np.ndarray
    w_out: np.ndarray | None = None
    b_out: np.ndarray | None = None


def init_gate(rng, heads, head_dim, *, kind="linear", pi_init=0.25, hidden=None, std=None) -> GateParams:
    """A gate that starts near pi_init: the last bias is log(pi_init / (1 - pi_init)), other biases 0.

    Args: rng: a NumPy Generator. hidden: units of "mlp", None is max(1, head_dim // 4). std: None draws
      weights uniform within 1 / sqrt(inputs); to fine-tune a trained model take 0.01 and multiply the gated
      output by 1 / pi_init. "unconditional" starts at 0, a gate of 1/2.
    """
    one_of("kind", kind, KINDS)
    if not 0 < pi_init < 1:
        raise ValueError(f"pi_init must be in (0, 1), got {pi_init}")

    def draw(*shape):
        limit = shape[-1] ** -0.5
        return rng.uniform(-limit, limit, shape) if std is None else std * rng.standard_normal(shape)

    start = np.full(heads, np.log(pi_init / (1 - pi_init)))
    if kind == "unconditional":
        return GateParams(None, np.zeros(heads))
    if kind == "mlp":
        n = hidden or max(1, head_dim // 4)
        return GateParams(draw(heads, n, head_dim), np.zeros((heads, n)), draw(heads, n), start)
    return GateParams(draw(heads, heads * head_dim if kind == "all_heads" else head_dim), start)


def attention_gate(x_heads, params: GateParams, *, kind="linear"):
    """sigmoid(G_h(x_h)): one number a head and token, from the attention's input, not from q.

    Args: x_heads [B, H, N, d], the input cut into heads. kind: "linear", "mlp" (ReLU), "all_heads" (a linear
      map of the whole input), "per_head" (the mean of the linear logits over tokens), "unconditional".
    Returns: [B, H, N, 1]; [B, H, 1, 1] for "per_head", [1, H, 1, 1] for "unconditional".
    Source: section 4.2.
    """
    _check_gate(x_heads, params, kind)
    return sigmoid(_gate_logits(float64(x_heads), params, kind))


def _gate_logits(x, g, kind):
    bias = g.b[:, None, None] if kind != "mlp" else g.b_out[:, None, None]
    if kind == "unconditional":
        return float64(bias)[None]
    if kind == "mlp":
        return _mlp_hidden(x, g) @ g.w_out[..., None] + bias
    if kind == "all_heads":
        return np.swapaxes(join_heads(x) @ g.w.T, -1, -2)[..., None] + bias
    logits = x @ g.w[..., None] + bias
    return logits.mean(axis=2, keepdims=True) if kind == "per_head" else logits


def _mlp_hidden(x, g):
    return relu(x @ np.swapaxes(g.w, -1, -2) + g.b[:, None])


def attention_gate_vjp(x_heads, params: GateParams, grad_gate, *, kind="linear"):
    """(grad of x_heads, GateParams of gradients) for the cotangent of the gate, in the gate's shape."""
    gate = attention_gate(x_heads, params, kind=kind)
    x, g = float64(x_heads), params
    dims(grad_gate=(grad_gate, " ".join(map(str, gate.shape))))
    d = float64(grad_gate) * gate * (1 - gate)  # of the logits
    db = d.sum(axis=(0, 2, 3))
    if kind == "unconditional":
        return np.zeros_like(x), GateParams(None, db)
    if kind == "mlp":
        a = _mlp_hidden(x, g)
        da = np.where(a > 0, d * g.w_out[:, None], 0.0)
        dw = (np.swapaxes(da, -1, -2) @ x).sum(axis=0)
        return da @ g.w, GateParams(dw, da.sum(axis=(0, 2)), (d * a).sum(axis=(0, 2)), db)
    if kind == "all_heads":
        rows = np.swapaxes(d[..., 0], -1, -2)  # [B, N, H]
        dw = (np.swapaxes(rows, -1, -2) @ join_heads(x)).sum(axis=0)
        return split_heads(rows @ g.w, x.shape[1]), GateParams(dw, db)
    if kind == "per_head":
        d = np.broadcast_to(d / x.shape[2], (*x.shape[:3], 1))
    return d * g.w[:, None], GateParams((d * x).sum(axis=(0, 2)), db)


def gate_macs(tokens, heads, head_dim, *, kind="linear", hidden=None):
    """Multiply-accumulates of the gate's logits, a bias counted as one: tokens times its parameters.

    linear, per_head: T H (d + 1); all_heads: T H (H d + 1); mlp: T H (n (d + 2) + 1); unconditional: 0.
    """
    one_of("kind", kind, KINDS)
    if min(tokens, heads, head_dim) < 1:
        raise ValueError(f"tokens, heads and head_dim must be at least 1, got {tokens}, {heads}, {head_dim}")
    n = hidden or max(1, head_dim // 4)
    per_head = {"mlp": n * (head_dim + 2) + 1, "all_heads": heads * head_dim + 1, "unconditional": 0}
    return tokens * heads * per_head.get(kind, head_dim + 1)


def _check_gate(x_heads, g, kind):
    one_of("kind", kind, KINDS)
    n = dims(x_heads=(x_heads, "B H N d"))
    H, d = n["H"], n["d"]
    if kind == "mlp":
        if g.w_out is None or g.b_out is None:
            raise ValueError('kind="mlp" needs w_out and b_out')
        dims(w=(g.w, f"{H} n {d}"), b=(g.b, f"{H} n"), w_out=(g.w_out, f"{H} n"), b_out=(g.b_out, f"{H}"))
        return
    dims(b=(g.b, f"{H}"))
    if kind != "unconditional":
        if g.w is None:
            raise ValueError(f'kind="{kind}" needs w')
        dims(w=(g.w, f"{H} {H * d if kind == 'all_heads' else d}"))
