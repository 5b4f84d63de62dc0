"""Architecture search: sub-networks as slices of shared weights, scores without training, a latency model.

Sources: Wang et al. 2020 (HAT) and Chen et al. 2021 (AutoFormer) for elastic weights; Abdelfattah et al. 2021
for zero-cost scores, Mellor et al. 2021 for activation codes; surveyed in arXiv 2307.07982. The search itself
is in ref/blocks/evolution.py. A gene is (E, depth, F_1..F_n, H_1..H_n): width, layers, and for each layer the
hidden width and the number of heads.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ref.blocks.evolution import (
    SearchSpace,
    canonical,
    crossover,
    evolve,
    mutate,
    pareto_front,
    random_gene,
    random_search,
)
from ref.blocks.losses import cross_entropy
from ref.blocks.norms import layer_norm
from ref.blocks.softmax import softmax
from ref.blocks.transformer import transformer_block
from ref.checks import one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.metrics import kendall_tau, spearman
from ref.models.gpt import GPTParams, gpt_embed, gpt_head, init_gpt

__all__ = [
    "LatencyModel", "MlpParams", "SearchSpace", "canonical", "crossover", "evolve", "example",
    "extract_subnet", "gene_cost", "kendall_tau", "mutate", "pareto_front", "random_gene",
    "random_search", "saliency_maps", "spearman", "super_layer_norm", "super_linear",
    "super_linear_vjp", "super_transformer", "zero_cost_score",
]  # fmt: skip

SCORES = ("grad_norm", "snip", "grasp", "synflow", "jacob_cov", "naswot")
JITTER = 1e-5  # keeps the logarithm of a vanishing eigenvalue finite


class MlpParams(NamedTuple):
    """Linear, ReLU, ..., Linear: w, a tuple of [out, in], and b, a tuple of [out]."""

    w: tuple[np.ndarray, ...]
    b: tuple[np.ndarray, ...]


def super_linear(x, w, b, *, out_features):
    """x W[:o, :i]^T + b[:o]: the front slice of a shared weight; i is the width of x.

    Args: x [..., i], w [out, in], b [out] or None, i <= in, out_features <= out.
    Raises: ValueError for a slice beyond the weight.
    """
    _check_slice(x, w, b, out_features)
    y = float64(x) @ float64(w)[:out_features, : x.shape[-1]].T
    return y if b is None else y + b[:out_features]


def super_linear_vjp(x, w, b, grad_out):
    """(grad_x, grad_w, grad_b) for grad_out [..., o]: full size, zero outside the slice (no b: None)."""
    o, i = grad_out.shape[-1], x.shape[-1]
    _check_slice(x, w, b, o)
    g, grad_w, grad_b = float64(grad_out), np.zeros(w.shape), None if b is None else np.zeros(b.shape)
    rows = g.reshape(-1, o)
    grad_w[:o, :i] = rows.T @ float64(x).reshape(-1, i)
    if b is not None:
        grad_b[:o] = rows.sum(axis=0)
    return g @ float64(w)[:o, :i], grad_w, grad_b


def super_layer_norm(x, gain, bias, *, active=None, eps=1e-5):
    """Layer norm of the first `active` channels (None: all of x) with statistics over them; the rest is 0.

    Args: x [..., C], gain, bias [at least active]. Raises: ValueError for active outside 1..C.
    """
    active = x.shape[-1] if active is None else active
    if not 1 <= active <= min(x.shape[-1], gain.shape[0], bias.shape[0]):
        raise ValueError(f"active must be in 1..{min(x.shape[-1], len(gain), len(bias))}, got {active}")
    y = np.zeros(x.shape)
    y[..., :active] = layer_norm(x[..., :active], gain[:active], bias[:active], eps=eps)
    return y


def extract_subnet(params: GPTParams, gene, *, head_dim=64) -> GPTParams:
    """The gene's own small network: front slices of every weight, the first heads, the first layers.

    Raises: ValueError for a gene larger than the shared weights.
    """
    E, F, H = _split(gene, params, head_dim)

    def block(p, f, h):
        a = h * head_dim
        return p._replace(
            ln1_scale=p.ln1_scale[:E], ln1_bias=p.ln1_bias[:E],
            ln2_scale=p.ln2_scale[:E], ln2_bias=p.ln2_bias[:E],
            w_q=p.w_q[:E, :a], b_q=p.b_q[:a], w_k=p.w_k[:E, :a], b_k=p.b_k[:a],
            w_v=p.w_v[:E, :a], b_v=p.b_v[:a], w_o=p.w_o[:a, :E], b_o=p.b_o[:E],
            w_fc1=p.w_fc1[:E, :f], b_fc1=p.b_fc1[:f], w_fc2=p.w_fc2[:f, :E], b_fc2=p.b_fc2[:E],
        )  # fmt: skip

    return GPTParams(
        params.wte[:, :E],
        params.wpe[:, :E],
        tuple(block(p, f, h) for p, f, h in zip(params.blocks, F, H, strict=False)),
        params.lnf_scale[:E],
        params.lnf_bias[:E],
    )


def super_transformer(params: GPTParams, gene, tokens, *, head_dim=64):
    """Logits [..., T, V] of the gene's slice of a shared causal language model. tokens int [..., T]."""
    small, (_, _, H) = extract_subnet(params, gene, head_dim=head_dim), _split(gene, params, head_dim)
    x = gpt_embed(tokens, small)
    for block, heads in zip(small.blocks, H, strict=True):
        x = transformer_block(x, block, num_heads=heads, causal=True, activation="gelu_tanh")
    return gpt_head(x, small)


def zero_cost_score(params: MlpParams, x, labels, *, kind="grad_norm"):
    """A number that should rank untrained networks like their trained losses; x [B, in], labels [B].

    With g = dL/dW of the mean cross-entropy and sums over weight matrices:
      "grad_norm" sum ||g||; "snip" sum |W g|; "grasp" -sum W (H g), H the Hessian; "synflow" sum |W dR/dW|
      of R = sum of outputs with all parameters positive and an input of ones; "jacob_cov" -sum (log(v + k) +
      1 / (v + k)) over the eigenvalues v of the correlations between the inputs' gradients; "naswot"
      log |det K|, K = number of ReLUs on which two inputs agree.
    Raises: ValueError for another kind, labels out of range, an empty batch, or "naswot" without a ReLU.
    """
    _check_batch(params, x, labels, kind, SCORES)
    if kind == "naswot" and len(params.w) < 2:
        raise ValueError('kind="naswot" counts ReLUs, but params has no hidden layer')
    if kind in ("snip", "synflow"):
        return sum(m.sum() for m in saliency_maps(params, x, labels, kind=kind))
    if kind == "grad_norm":
        return sum(np.linalg.norm(g) for g in _gradients(params, x, labels))
    if kind == "grasp":
        g = _gradients(params, x, labels)
        return -sum(
            (w * h).sum() for w, h in zip(params.w, _hessian_product(params, x, labels, g), strict=True)
        )
    if kind == "jacob_cov":
        rows = _backward(params, _forward(params, x), np.ones((len(x), params.w[-1].shape[0])))[1]
        if (np.ptp(rows, axis=1) == 0).any():
            return -np.inf  # a constant row has no correlation
        v = np.linalg.eigvalsh(np.atleast_2d(np.corrcoef(rows))) + JITTER
        return -(np.log(v) + 1 / v).sum()
    codes = np.concatenate([a > 0 for a in _forward(params, x)[1:-1]], axis=1)
    same = (codes[:, None] == codes).sum(axis=-1)
    return np.linalg.slogdet(same.astype(np.float64))[1]


def saliency_maps(params: MlpParams, x, labels, *, kind="snip"):
    """|W dL/dW| ("snip") or |W dR/dW| ("synflow"), one map a weight matrix, in order."""
    _check_batch(params, x, labels, kind, ("snip", "synflow"))
    if kind == "synflow":
        params = MlpParams(tuple(map(np.abs, params.w)), tuple(map(np.abs, params.b)))
        a = _forward(params, np.ones((1, x.shape[1])))
        g = _backward(params, a, np.ones_like(a[-1]))[0]
    else:
        g = _gradients(params, x, labels)
    return tuple(np.abs(w * d) for w, d in zip(params.w, g, strict=True))


@dataclass(frozen=True)
class LatencyModel:
    """Least squares on a gene's entries and their products; r2 is the fit on the genes it was made from."""

    mean: np.ndarray
    size: np.ndarray
    weights: np.ndarray
    r2: float

    @classmethod
    def fit(cls, genes, latencies):
        """The model of genes [n, positions] and latencies [n], n >= 2."""
        genes = float64(genes)
        latencies = float64(latencies)
        if dims(genes=(genes, "n p"), latencies=(latencies, "n"))["n"] < 2:
            raise ValueError(f"genes must hold at least two, got {len(genes)}")
        mean, size = genes.mean(axis=0), np.maximum(genes.std(axis=0), 1e-12)
        features = cls._features((genes - mean) / size)
        weights = np.linalg.lstsq(features, latencies, rcond=None)[0]
        left = ((features @ weights - latencies) ** 2).sum()
        spread = ((latencies - latencies.mean()) ** 2).sum()
        return cls(mean, size, weights, float(1 - left / spread) if spread > 0 else 1.0)

    def predict(self, genes):
        """Latencies [n] of genes [n, positions]."""
        return self._features((float64(genes) - self.mean) / self.size) @ self.weights

    @staticmethod
    def _features(z):
        i, j = np.triu_indices(z.shape[1])
        return np.concatenate([np.ones((len(z), 1)), z, z[:, i] * z[:, j]], axis=1)


def gene_cost(gene, *, tokens, vocab, head_dim=64):
    """(parameters, MACs) of the gene's network on `tokens` tokens, with as many positions and a tied head."""
    E, n = gene[0], gene[1]
    layers = (len(gene) - 2) // 2
    params, macs = (vocab + tokens + 2) * E, tokens * vocab * E
    for F, H in zip(gene[2 : 2 + n], gene[2 + layers : 2 + layers + n], strict=True):
        a = H * head_dim
        matrices = 4 * E * a + 2 * E * F
        params += matrices + 3 * a + E + F + E + 4 * E
        macs += tokens * matrices + 2 * tokens**2 * a
    return params, macs


def _forward(params, x):
    """Activations before each layer and the logits."""
    a = [float64(x)]
    for n, (w, b) in enumerate(zip(params.w, params.b, strict=True)):
        z = a[-1] @ float64(w).T + b
        a.append(z if n == len(params.w) - 1 else np.maximum(z, 0))
    return a


def _backward(params, a, delta):
    """(gradients of the weights, of the input rows) for the cotangent delta of the logits."""
    grads = []
    for n in reversed(range(len(params.w))):
        grads.append(delta.T @ a[n])
        delta = delta @ params.w[n]
        if n:
            delta = delta * (a[n] > 0)
    return tuple(grads[::-1]), delta


def _gradients(params, x, labels):
    a = _forward(params, x)
    return _backward(params, a, cross_entropy(a[-1], labels)[1])[0]


def _hessian_product(params, x, labels, v):
    """H v over the weight matrices: the derivative along v through both passes (Pearlmutter 1994)."""
    a, moved = _forward(params, x), [np.zeros_like(float64(x))]
    for n, (w, d) in enumerate(zip(params.w, v, strict=True)):
        z = moved[-1] @ w.T + a[n] @ d.T
        moved.append(z if n == len(params.w) - 1 else z * (a[n + 1] > 0))
    p = softmax(a[-1])
    delta = cross_entropy(a[-1], labels)[1]
    delta_moved = p * (moved[-1] - (p * moved[-1]).sum(axis=1, keepdims=True)) / len(p)
    out = []
    for n in reversed(range(len(params.w))):
        out.append(delta_moved.T @ a[n] + delta.T @ moved[n])
        on = 1.0 if n == 0 else a[n] > 0
        delta_moved, delta = (delta_moved @ params.w[n] + delta @ v[n]) * on, (delta @ params.w[n]) * on
    return tuple(out[::-1])


def _split(gene, params, head_dim):
    """(E, F of the layers that are there, H of those), checked against the shared weights."""
    n = len(params.blocks)
    if len(gene) != 2 + 2 * n:
        raise ValueError(f"gene must have 2 + 2 x {n} entries for {n} shared layers, got {len(gene)}")
    E, depth = gene[:2]
    F, H = gene[2 : 2 + depth], gene[2 + n : 2 + n + depth]
    width, hidden = params.wte.shape[1], params.blocks[0].w_fc1.shape[1]
    heads = params.blocks[0].w_q.shape[1] // head_dim
    for name, values, most in (("E", (E,), width), ("depth", (depth,), n), ("F", F, hidden), ("H", H, heads)):
        if not all(1 <= value <= most for value in values):
            raise ValueError(f"gene: {name} must be in 1..{most}, got {', '.join(map(str, values))}")
    return E, F, H


def _check_slice(x, w, b, out_features):
    dims(w=(w, "out in"), **({} if b is None else {"b": (b, "out")}))
    if not 1 <= x.shape[-1] <= w.shape[1]:
        raise ValueError(f"x must have 1..{w.shape[1]} channels, the width of w, got {x.shape[-1]}")
    if not 1 <= out_features <= w.shape[0]:
        raise ValueError(f"out_features must be in 1..{w.shape[0]}, got {out_features}")


def _check_batch(params, x, labels, kind, kinds):
    one_of("kind", kind, kinds)
    size = dims(x=(x, "B in"), labels=(labels, "B"), w=(params.w[0], "hidden in"))
    labels, classes = np.asarray(labels), params.w[-1].shape[0]
    if size["B"] == 0 or labels.dtype.kind not in "iu" or not (0 <= labels.min() and labels.max() < classes):
        raise ValueError(f"labels must be integers in 0..{classes - 1}, at least one, got {labels}")


def example(seed=0):
    """A network of two hidden layers on digits; slices of a small shared language model."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images, labels = digits()
    x, y = images[:6].reshape(6, -1) / 16 + 0.01 * rng.standard_normal((6, 64)), labels[:6].astype(np.int32)
    sizes = (64, 12, 10, 10)
    w = tuple(rng.standard_normal((o, i)) / np.sqrt(i / 2) for i, o in pairwise(sizes))
    params = MlpParams(w, tuple(0.1 * rng.standard_normal(len(m)) for m in w))
    shared = init_gpt(rng, vocab=11, context=8, dim=16, depth=2, hidden=24, std=0.2)
    gene, tokens = (12, 2, 24, 16, 3, 2), rng.integers(0, 11, (2, 7)).astype(np.int32)
    gain, bias = rng.uniform(0.5, 1.5, 64), rng.standard_normal(64)
    return [
        Example("super_linear", (x[:, :40], w[0], params.b[0]), {"out_features": 9}, (0, 1, 2)),
        Example("super_linear_vjp", (x[:, :40], w[0], params.b[0], rng.standard_normal((6, 9)))),
        Example("super_layer_norm", (x, gain, bias), {"active": 40}, (0, 1, 2)),
        Example("super_transformer", (shared, gene, tokens), {"head_dim": 4}, (0,)),
        *(Example("zero_cost_score", (params, x, y), {"kind": kind}) for kind in SCORES),
        Example("saliency_maps", (params, x, y), {"kind": "snip"}),
    ]
