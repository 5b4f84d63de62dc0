"""WTA-CRS: a weight gradient from k of M stored rows, the heaviest kept for certain, the rest sampled.

Source: Liu et al. 2023 (arXiv 2305.15265) and, for the budget and the winner count, the code released with
it. A product X Y is the sum of its M column-row pairs X[:, i] Y[i, :]; here X = grad_Z^T and Y = H, the input
of a linear layer. Forward and grad_H stay exact. Where we differ from the released code: p sums to exactly 1,
the tail is never dropped, and the first epoch uses the unbiased formula too.
"""

from dataclasses import dataclass, replace

import numpy as np

from ref.blocks.formats import round_bf16
from ref.checks import check_ids, one_of
from ref.dims import dims, float64
from ref.example import Example

METHODS = ("wta", "crs", "topk", "uniform")
CERTAIN = 1e-12  # a tail this light is not sampled: everything that counts is a winner
SUM_TOL = 1e-4  # p may come in float32, or with another author's epsilon in its denominator


def row_probabilities(x, grad_norm=None, *, eps=1e-8):
    """p_i = (n_i + eps) / sum_j (n_j + eps), n_i = ||x_i|| grad_norm_i: the draw of least variance.

    Args: x [M, in]; grad_norm [M] >= 0: norms of the rows of grad_Z, or what is known of them (None: ones).
      eps once a row, so that p is positive and sums to 1. Returns: [M].
    Raises: ValueError if M is 0, eps <= 0 or a value is negative or not finite.
    """
    rows = dims(x=(x, "M in"))["M"]
    if rows < 1 or eps <= 0:
        raise ValueError(f"need at least one row in x and eps > 0, got {rows} rows and {eps=}")
    n = np.linalg.norm(float64(x), axis=-1)
    if grad_norm is not None:
        dims(x=(x, "M in"), grad_norm=(grad_norm, "M"))
        n = n * float64(grad_norm)
    if not (np.isfinite(n).all() and (n >= 0).all()):
        raise ValueError("x must be finite, and grad_norm finite and not negative")
    return (n + eps) / (n + eps).sum()


def row_budget(rows, *, ratio=0.3, minimal_k=10):
    """k = min(max(int(ratio rows), minimal_k), rows): how many of the rows are stored."""
    if rows < 1 or minimal_k < 1 or not 0 < ratio <= 1:
        raise ValueError(
            f"need rows >= 1, minimal_k >= 1 and 0 < ratio <= 1, got {rows=}, {minimal_k=}, {ratio=}"
        )
    return min(max(int(ratio * rows), minimal_k), rows)


def winner_count(p, *, k):
    """c, how many of the k rows are taken for certain: the least (1 - P_c) / (k - c) over c = 0..k-1.

    P_c is the sum of the c largest p. If some c <= k has P_c >= 1 - 1e-12, the smallest such: nothing is left
    to sample. At a tie with c = 0 the winners win.
    Args: p [M] >= 0, summing to 1. Raises: ValueError for another p, or k outside 1..M.
    """
    p = _check_p(p)
    if not 1 <= k <= len(p):
        raise ValueError(f"k must be in 1..{len(p)}, got {k}")
    mass = np.cumsum(np.sort(p)[::-1])[:k]  # P_1 .. P_k
    certain = mass >= 1 - CERTAIN
    if certain.any():
        return int(np.argmax(certain)) + 1
    if k == 1:
        return 0
    score = (1 - mass[:-1]) / (k - np.arange(1, k))
    best = int(np.argmin(score))
    return 0 if 1 / k < score[best] else best + 1


def winner_mask(p, *, c):
    """bool [M], True for the c largest p; of equals the first in order."""
    return _rank(_check_c(p, c)) < c


def wta_indices(p, uniform, *, c):
    """idx [k]: the c winners in falling p, then k - c draws with replacement, q_j = p_j / tail.

    Args: p [M]; uniform [k] in [0, 1): drawn noise, of which the first c entries are not used. A draw is the
      first index whose cumulated q exceeds its number.
    Raises: ValueError for c > k, another p, or uniform outside [0, 1).
    """
    p = _check_c(p, c)
    k = dims(uniform=(uniform, "k"))["k"]
    uniform = float64(uniform)
    if not ((uniform >= 0) & (uniform < 1)).all():
        raise ValueError("uniform must be in [0, 1)")
    if not max(c, 1) <= k <= len(p):
        raise ValueError(f"uniform must hold k numbers, {max(c, 1)} <= k <= {len(p)}, got {k}")
    rank = _rank(p)
    tail = np.where(rank < c, 0.0, p)
    if not tail.any():  # all the mass is with the winners: any other row will do, its scale is 0
        tail = (rank >= c).astype(np.float64)
    total = np.cumsum(tail)
    last = np.flatnonzero(tail)[-1] if tail.any() else 0
    draws = np.minimum(np.searchsorted(total, uniform[c:] * total[-1], side="right"), last)
    return np.concatenate([np.argsort(rank)[:c], draws]).astype(np.int32)


def wta_sample(rng, p, *, k):
    """(idx [k], c) with the noise drawn by a NumPy Generator."""
    c = winner_count(p, k=k)
    return wta_indices(p, rng.random(k), c=c), c


def wta_scale(p, idx, *, c):
    """[k]: 1 for the first c rows, (1 - P_C) / (p_j (k - c)) for the draws: unbiased for any p."""
    p, idx = _check_c(p, c), np.asarray(idx)
    k = dims(idx=(idx, "k"))["k"]
    tail = 1 - p[idx[:c]].sum()
    if k == c or tail <= CERTAIN:
        return (np.arange(k) < c).astype(np.float64)
    drawn = p[idx]
    return np.where(np.arange(k) < c, 1.0, tail / (np.where(drawn > 0, drawn, 1.0) * (k - c)))


def wta_rows(h, p, idx, *, c):
    """h_saved [k, in] = h[idx] * scale: all that is stored of the input h [M, in], with idx."""
    dims(h=(h, "M in"), p=(p, "M"))
    return float64(h)[idx] * wta_scale(p, idx, c=c)[:, None]


def wta_weight_grad(grad_z, h_saved, idx):
    """grad_z[idx]^T h_saved [out, in], the estimate of grad_Z^T H. grad_z [M, out], h_saved [k, in]."""
    dims(grad_z=(grad_z, "M out"), h_saved=(h_saved, "k in"), idx=(idx, "k"))
    return float64(grad_z)[idx].T @ float64(h_saved)


def approx_matmul(x, y, uniform, *, k, method="wta"):
    """x y from k of its M column-row pairs: x [n, M], y [M, m], uniform [k] -> [n, m].

    method: "wta"; "crs" (no winners), "uniform" (p = 1 / M): unbiased; "topk" (the k heaviest, no
    scale): biased.
    """
    M = dims(x=(x, "n M"), y=(y, "M m"), uniform=(uniform, str(k)))["M"]
    one_of("method", method, METHODS)
    x, y = float64(x, y)
    p = np.full(M, 1 / M) if method == "uniform" else row_probabilities(y, np.linalg.norm(x, axis=0))
    wins = winner_count(p, k=k)  # also checks k
    c = {"wta": wins, "topk": k}.get(method, 0)
    idx = wta_indices(p, uniform, c=c)
    return wta_weight_grad(x.T, wta_rows(y, p, idx, c=c), idx)


def wta_linear(h, w, b, grad_norm, uniform, *, ratio=0.3, minimal_k=10):
    """h w^T + b, exact; what is special is its backward pass, `wta_linear_vjp`.

    Args: h [..., in], w [out, in], b [out] or None; grad_norm [...]: for every token the norm of its row of
      grad_Z when it was last seen (ones at first); uniform [k], k = row_budget(M), M the number of tokens.
    """
    _check_linear(h, w, b, grad_norm, uniform, ratio, minimal_k)
    z = float64(h) @ float64(w).T
    return z if b is None else z + b


def wta_linear_vjp(h, w, b, grad_norm, uniform, grad_z, *, ratio=0.3, minimal_k=10):
    """(grad_h, grad_w, grad_b, norms) for the cotangent grad_z [..., out]; only grad_w is an estimate.

    norms [...] = ||grad_z|| of every token, to be stored and handed in as grad_norm at the next visit.
    """
    k = _check_linear(h, w, b, grad_norm, uniform, ratio, minimal_k)
    dims(h=(h, "... in"), grad_z=(grad_z, "... out"), w=(w, "out in"))
    rows, grads = float64(h).reshape(-1, h.shape[-1]), float64(grad_z).reshape(-1, w.shape[0])
    p = row_probabilities(rows, float64(grad_norm).reshape(-1))
    c = winner_count(p, k=k)
    idx = wta_indices(p, uniform, c=c)
    grad_w = wta_weight_grad(grads, wta_rows(rows, p, idx, c=c), idx)
    grad_b = None if b is None else grads.sum(axis=0)
    return float64(grad_z) @ float64(w), grad_w, grad_b, np.linalg.norm(float64(grad_z), axis=-1)


def estimator_variance(x, y, p, *, k, c):
    """E ||estimate - x y||_F^2 of k pairs, the c largest p certain: c = 0 is plain CRS.

    ((1 - P_C) sum_T ||X_j||^2 ||Y_j||^2 / p_j - ||X_T Y_T||_F^2) / (k - c) over the tail T; 0 if c = k = M.
    Args: x [n, M], y [M, m], p [M] > 0 on the tail. Raises: ValueError for c = k < M, which is biased.
    """
    M = dims(x=(x, "n M"), y=(y, "M m"), p=(p, "M"))["M"]
    tail = ~winner_mask(p, c=c)
    if c >= k and tail.any():
        raise ValueError(f"k={k} must exceed c={c}: without a draw the estimate is biased, not random")
    if not tail.any():
        return 0.0
    x, y, p = float64(x)[:, tail], float64(y)[tail], float64(p)
    heavy = (x**2).sum(axis=0) * (y**2).sum(axis=1)
    mass = 1.0 if tail.sum() == M else 1 - p[~tail].sum()
    return float((mass * (heavy / p[tail]).sum() - ((x @ y) ** 2).sum()) / (k - c))


@dataclass(frozen=True)
class GradNormCache:
    """Norms of grad_Z by sample and token, in bfloat16: norms [num_samples, seq_len], ones at first."""

    num_samples: int
    seq_len: int
    norms: np.ndarray | None = None

    def __post_init__(self):
        """Ones before the first visit: the draw then follows the rows of H alone."""
        if self.norms is None:
            object.__setattr__(self, "norms", np.ones((self.num_samples, self.seq_len), np.float32))
        dims(norms=(self.norms, f"{self.num_samples} {self.seq_len}"))

    def lookup(self, ids):
        """[B, seq_len] of the samples ids [B]; shuffled batches need their ids."""
        return self.norms[self._check(ids)].astype(np.float64)

    def update(self, ids, norms):
        """The cache with the rows of ids replaced by norms [B, seq_len], rounded to bfloat16."""
        ids = self._check(ids)
        dims(norms=(norms, f"{len(ids)} {self.seq_len}"))
        new = self.norms.copy()
        new[ids] = round_bf16(np.asarray(norms, np.float32))
        return replace(self, norms=new)

    def _check(self, ids):
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers [B], got shape {list(ids.shape)} of {ids.dtype}")
        return check_ids("ids", ids, self.num_samples)


def stored_bytes(rows, width, *, k, itemsize=4):
    """Bytes kept of an input [rows, width]: k rows and, unless k = rows, their int32 indices."""
    if not 1 <= k <= rows:
        raise ValueError(f"k must be in 1..{rows}, got {k}")
    return k * width * itemsize + (4 * k if k < rows else 0)


def block_activation_bytes(config, *, batch, ratio, itemsize=4):
    """{op: bytes saved for the backward pass} of a transformer block with RMS norm and ReLU, as T5's.

    Args: config: a record with tokens, dim, hidden and num_heads; ratio 1 is the exact layer. What feeds
      several operations is counted once, at the first. Where the hidden layer is stored by rows only, ReLU
      keeps a bit for every number of it.
    """
    rows, c = batch * config.tokens, config
    k = rows if ratio == 1 else row_budget(rows, ratio=ratio)
    full, linear = rows * c.dim * itemsize, stored_bytes(rows, c.dim, k=k, itemsize=itemsize)
    return {
        "norm1": full,
        "qkv": linear,
        "scores": 2 * full,  # q and k
        "softmax": batch * c.num_heads * c.tokens**2 * itemsize,
        "values": full,
        "out": linear,
        "norm2": full,
        "fc1": linear,
        "relu": 0 if k == rows else -(-rows * c.hidden // 8),
        "fc2": stored_bytes(rows, c.hidden, k=k, itemsize=itemsize),
    }


def _check_p(p):
    dims(p=(p, "M"))
    p = float64(p)
    if not (p >= 0).all():  # also NaN
        raise ValueError("p must hold probabilities, without a negative number or NaN")
    if abs(p.sum() - 1) > SUM_TOL:
        raise ValueError(f"p must sum to 1, got {p.sum()}")
    return p


def _check_c(p, c):
    p = _check_p(p)
    if not 0 <= c <= len(p):
        raise ValueError(f"c must be in 0..{len(p)}, got {c}")
    return p


def _rank(p):
    """Place of every entry in falling order, the first of equals first."""
    return np.argsort(np.argsort(-p, kind="stable"))


def _check_linear(h, w, b, grad_norm, uniform, ratio, minimal_k):
    """Check a call of the layer, return its budget k."""
    dims(h=(h, "... in"), w=(w, "out in"), grad_norm=(grad_norm, "..."))
    if b is not None:
        dims(w=(w, "out in"), b=(b, "out"))
    k = row_budget(int(np.prod(h.shape[:-1])), ratio=ratio, minimal_k=minimal_k)
    dims(uniform=(uniform, str(k)))
    return k


def example(seed=0):
    """A linear map of 32 channels of SmolLM2's hidden states, 12 tokens of which 5 are stored."""
    from ref.data import hidden_states

    rng = np.random.default_rng(seed)
    h = hidden_states()[1:13, :32]
    w, b, grad_z = rng.standard_normal((8, 32)) / 8, rng.standard_normal(8), rng.standard_normal((12, 8))
    norms, uniform = np.linalg.norm(grad_z, axis=-1), rng.random(5)
    p = row_probabilities(h, norms)
    c = winner_count(p, k=5)
    idx = wta_indices(p, uniform, c=c)
    saved = wta_rows(h, p, idx, c=c)
    layer = {"ratio": 5 / 12, "minimal_k": 1}
    return [
        Example("row_probabilities", (h, norms), {}, (0, 1)),
        Example("winner_count", (p,), {"k": 5}),
        Example("winner_mask", (p,), {"c": c}),
        Example("wta_indices", (p, uniform), {"c": c}),
        Example("wta_scale", (p, idx), {"c": c}),
        Example("wta_rows", (h, p, idx), {"c": c}, (0,)),
        Example("wta_weight_grad", (grad_z, saved, idx), {}, (0, 1)),
        Example("approx_matmul", (grad_z.T, h, uniform), {"k": 5}),
        Example("wta_linear", (h, w, b, norms, uniform), layer, (0, 2)),
        Example("wta_linear_vjp", (h, w, b, norms, uniform, grad_z), layer),
        Example("estimator_variance", (grad_z.T, h, p), {"k": 5, "c": c}, (0, 1)),
    ]
