"""Stochastically subsampled self-attention: each layer and step sees a random part of the sources alone.

Source: Hussain et al. 2023 (arXiv 2306.01705), the Information Pathways Hypothesis; no code was released.
Two forms: "unbiased" keeps k sources drawn without replacement, "local" shuffles the sources a little and
attends within windows of the shuffled sequence. The softmax is over what was drawn; nothing is rescaled.
Ours, where paper and page are silent: one draw a layer and step for all heads and, unless it is given by
example, for the batch; include_self; the order of two-dimensional windows; ties by index.
"""

from dataclasses import dataclass

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, check_mask
from ref.blocks.losses import cross_entropy
from ref.blocks.softmax import softmax, softmax_vjp, weigh
from ref.blocks.transformer import transformer_block, transformer_block_vjp
from ref.checks import at_least_one, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.gpt import GPTParams, gpt_embed, gpt_embed_vjp, gpt_head, gpt_head_vjp

KINDS = ("unbiased", "local")


def sample_sources(uniforms, k):
    """The positions of the k smallest of uniforms [n], ascending: k of n without replacement, int [k]."""
    n = dims(uniforms=(uniforms, "n"))["n"]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}")
    return np.sort(np.argsort(uniforms, kind="stable")[:k])


def local_permutation(noise, *, sigma):
    """The order of i + sigma noise_i: int [n], slot -> source; sigma in tokens, 0 is the identity.

    Args: noise [n], standard normal. Raises: ValueError for sigma < 0.
    """
    n = dims(noise=(noise, "n"))["n"]
    _check_sigma(sigma)
    return np.argsort(np.arange(n) + sigma * float64(noise), kind="stable")


def local_permutation_2d(noise, *, height, width, sigma):
    """The same on a grid: int [height width], slot -> source, both row-major.

    The perturbed rows are ranked and cut into `height` rows of slots; within each the perturbed columns are.
    Args: noise [2, height, width]; sigma in cells, one number or (rows, columns).
    """
    dims(noise=(noise, f"2 {height} {width}"))
    sy, sx = np.broadcast_to(sigma, 2)
    _check_sigma(min(sy, sx))
    y, x = np.mgrid[:height, :width] + np.array([sy, sx])[:, None, None] * float64(noise)
    rows = np.sort(np.argsort(y.ravel(), kind="stable").reshape(height, width), axis=1)
    order = np.argsort(x.ravel()[rows], axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1).ravel()


def ssa_attention(q, k, v, *, source_index=None, perm=None, block=None, left=0, right=0,
                  causal=False, include_self=False, mask=None, scale=None):  # fmt: skip
    """softmax(scale q k^T over the drawn sources) v; q is whole, k and v count where they are drawn.

    Args: q, k, v [B, H, L, D]. Exactly one of
      source_index: int [n] or [B, n], distinct: the sources of every query;
      perm: int [L] or [B, L], slot -> source: queries of block t (of `block` positions) see the sources in
        the slots of blocks t - left .. t + right.
      causal: a source later than the query, by its original position, is invisible.
      include_self: position i is a source of query i, once, whatever was drawn.
      mask: bool, True = visible, broadcastable to [B, H, L, L], by original positions; it also rules over
        include_self. scale: None is 1 / sqrt(D).
    Returns: [B, H, L, D]; a query without a visible source gives 0.
    Raises: ValueError naming the argument at fault.
    """
    tiles, opt = _prepare(q, k, v, source_index, perm, block, left, right, causal, include_self, mask, scale)
    q, k, v = float64(q, k, v)
    o = np.empty_like(q, shape=v.shape)
    for rows, sources in tiles:
        _, vt, p = _tile(q, k, v, rows, sources, opt)
        o[..., rows, :] = weigh(p[..., :-1], vt) + _product(p[..., -1:], v[..., rows, :])
    return o


def ssa_attention_bwd(do, q, k, v, *, source_index=None, perm=None, block=None, left=0, right=0,
                      causal=False, include_self=False, mask=None, scale=None):  # fmt: skip
    """(dq, dk, dv) of `ssa_attention` for do [B, H, L, D]: gathers become sums into the drawn sources.

    Sources that were not drawn get exactly 0.
    """
    tiles, opt = _prepare(q, k, v, source_index, perm, block, left, right, causal, include_self, mask, scale)
    dims(do=(do, "B H L D"), q=(q, "B H L D"))
    do, q, k, v = float64(do, q, k, v)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, sources in tiles:
        kt, vt, p = _tile(q, k, v, rows, sources, opt)
        qi, ki, vi, doi = (x[..., rows, :] for x in (q, k, v, do))
        self_dp = np.sum(doi * vi, axis=-1, keepdims=True)
        dp = np.concatenate([doi @ np.swapaxes(vt, -1, -2), self_dp], axis=-1)
        ds = opt["scale"] * softmax_vjp(p, np.where(p > 0, dp, 0.0))
        dq[..., rows, :] = weigh(ds[..., :-1], kt) + _product(ds[..., -1:], ki)
        dk[..., rows, :] += _product(ds[..., -1:], qi)
        dv[..., rows, :] += _product(p[..., -1:], doi)
        for b, at in enumerate(sources):  # distinct within a tile
            dk[b][:, at] += weigh(np.swapaxes(ds[b, ..., :-1], -1, -2), qi[b])
            dv[b][:, at] += weigh(np.swapaxes(p[b, ..., :-1], -1, -2), doi[b])
    return dq, dk, dv


def _tile(q, k, v, rows, sources, opt):
    """Keys, values and probabilities of some queries and sources int [B, m]; the last column is the self."""
    at, i = sources[:, None, :, None], np.arange(rows.start, rows.stop)
    kt, vt = np.take_along_axis(k, at, axis=2), np.take_along_axis(v, at, axis=2)
    seen = sources[:, None, None, :] <= (i[:, None] if opt["causal"] else k.shape[2])
    own = np.full((1, 1, len(i)), opt["include_self"])
    if opt["mask"] is not None:
        seen = seen & np.take_along_axis(opt["mask"][..., rows, :], sources[:, None, None, :], axis=3)
        own = own & opt["mask"][..., i, i]
    own = own & ~(seen & (sources[:, None, None, :] == i[:, None])).any(axis=-1)  # once, not twice
    s = np.where(seen, opt["scale"] * q[..., rows, :] @ np.swapaxes(kt, -1, -2), -np.inf)
    self_s = opt["scale"] * np.sum(q[..., rows, :] * k[..., rows, :], axis=-1)
    p = softmax(np.concatenate([s, np.where(own, self_s, -np.inf)[..., None]], axis=-1))
    return kt, vt, p


def _product(w, x):
    """w x with 0 * anything = 0: what has no weight may hold NaN."""
    return np.where(w == 0, 0.0, w * x)


def _prepare(q, k, v, source_index, perm, block, left, right, causal, include_self, mask, scale):
    """Check a call -> (list of (rows, sources int [B, m]), options of a tile)."""
    n = dims(q=(q, "B H L D"), k=(k, "B H L D"), v=(v, "B H L D"))
    B, L = n["B"], n["L"]
    if (source_index is None) == (perm is None):
        raise ValueError("exactly one of source_index and perm must be given")
    if mask is not None:
        check_mask("mask", mask, (B, n["H"], L, L))
        mask = np.broadcast_to(mask, (B, n["H"], L, L))
    if perm is None:
        if block is not None:
            raise ValueError("block goes with perm, source_index has none")
        tiles = [(slice(0, L), _indices("source_index", source_index, B, L))]
    else:
        _check_window(block, left, right)
        perm = _indices("perm", perm, B, L)
        if perm.shape[1] != L:
            raise ValueError(f"perm must be a permutation of 0..{L - 1}, got {perm.shape[1]} entries")
        tiles = [
            (slice(i, min(i + block, L)), perm[:, max(0, i - left * block) : i + (right + 1) * block])
            for i in range(0, L, block)
        ]
    scale = n["D"] ** -0.5 if scale is None else scale
    return tiles, {"causal": causal, "include_self": include_self, "mask": mask, "scale": scale}


def _indices(name, index, B, L):
    """int [B, n] of distinct positions in 0..L-1, from [n] or [B, n]."""
    index = np.asarray(index)
    if index.ndim not in (1, 2) or index.dtype.kind not in "iu" or index.shape[:-1] not in ((), (B,)):
        raise ValueError(f"{name} must be int [n] or [{B}, n], got {index.dtype} {list(index.shape)}")
    index = np.broadcast_to(index, (B, index.shape[-1]))
    if index.size and (index.min() < 0 or index.max() >= L or (np.diff(np.sort(index), axis=-1) == 0).any()):
        raise ValueError(f"{name} must hold distinct positions in 0..{L - 1}")
    return index


def ssa_visible(perm, *, block, left=0, right=0, causal=False, include_self=False):
    """bool [n, n]: which sources j each query i sees under perm int [n], as in `ssa_attention`."""
    n = dims(perm=(perm, "n"))["n"]
    _check_window(block, left, right)
    if not np.array_equal(np.sort(perm), np.arange(n)):
        raise ValueError(f"perm must be a permutation of 0..{n - 1}")
    slot = np.argsort(perm)
    apart = slot // block - np.arange(n)[:, None] // block
    seen = (-left <= apart) & (apart <= right)
    if causal:
        seen = seen & np.tri(n, dtype=bool)
    return seen | np.eye(n, dtype=bool) if include_self else seen


def edge_probability(noise, *, sigma, block, left=0, right=0):
    """[n, n]: how often query i sees source j over the draws noise [R, n]; without causality."""
    n = dims(noise=(noise, "R n"))
    total = np.zeros((n["n"], n["n"]))
    for row in noise:
        total += ssa_visible(local_permutation(row, sigma=sigma), block=block, left=left, right=right)
    return total / n["R"]


@dataclass(frozen=True)
class SSASchedule:
    """Sampling for most of the steps, then dense fine-tuning; sigma and block None is the unbiased form."""

    reduction: float = 4
    sigma: float | None = None
    block: int | None = None
    finetune_fraction: float = 0.1

    def __post_init__(self):
        """Raise ValueError for options that do not go together."""
        if self.reduction < 1 or not 0 <= self.finetune_fraction <= 1:
            raise ValueError(
                f"need reduction >= 1 and 0 <= finetune_fraction <= 1, got {self.reduction}, "
                f"{self.finetune_fraction}"
            )
        if (self.sigma is None) != (self.block is None):
            raise ValueError(f"sigma and block go together, got {self.sigma} and {self.block}")

    def dense_from(self, total_steps):
        """The first step of the dense fine-tuning."""
        return total_steps - round(self.finetune_fraction * total_steps)

    def sources(self, rng, step, total_steps, *, n, depth):
        """One fresh draw a layer, a tuple of int arrays; None once the model is fine-tuned dense."""
        if step >= self.dense_from(total_steps):
            return None
        if self.block is None:
            k = -(-n // self.reduction)
            return tuple(sample_sources(rng.random(n), int(k)) for _ in range(depth))
        return tuple(local_permutation(rng.standard_normal(n), sigma=self.sigma) for _ in range(depth))


@dataclass(frozen=True)
class SSAConfig:
    """Heads, and windows of the local form (block None: sources are indices); a query always sees itself."""

    num_heads: int
    block: int | None = None
    left: int = 1
    right: int = 0


def ssa_transformer(params: GPTParams, ids, *, config: SSAConfig, sources):
    """Logits [B, T, V] of a causal GPT on ids int [B, T], each layer with its own draw.

    sources: a source_index, a perm (if config.block is given) or None (dense) a layer; None: all dense.
    """
    return gpt_head(_hidden(params, ids, config, sources)[-1], params)


def ssa_transformer_loss(params: GPTParams, ids, *, config: SSAConfig, sources):
    """Mean negative log-likelihood of ids[:, 1:] given what stands before, in nats; ids int [B, T + 1]."""
    return cross_entropy(ssa_transformer(params, ids[:, :-1], config=config, sources=sources), ids[:, 1:])[0]


def ssa_transformer_loss_vjp(params: GPTParams, ids, *, config: SSAConfig, sources):
    """GPTParams of gradients of `ssa_transformer_loss`, for the same draws."""
    x, labels = ids[:, :-1], ids[:, 1:]
    hidden = _hidden(params, x, config, sources)
    dlogits = cross_entropy(gpt_head(hidden[-1], params), labels)[1]
    dx, dwte, dscale, dbias = gpt_head_vjp(hidden[-1], params, dlogits)
    grads = []
    for h, p, drawn in zip(hidden[-2::-1], params.blocks[::-1], _layers(params, sources)[::-1], strict=True):
        dx, g = transformer_block_vjp(h, p, dx, **_options(config, drawn, True))
        grads.append(g)
    dlookup, dwpe = gpt_embed_vjp(x, params, dx)
    return GPTParams(dwte + dlookup, dwpe, tuple(grads[::-1]), dscale, dbias)


def _hidden(params, ids, config, sources):
    """Hidden states before each block and after the last."""
    hidden = [gpt_embed(ids, params)]
    for p, drawn in zip(params.blocks, _layers(params, sources), strict=True):
        hidden.append(transformer_block(hidden[-1], p, **_options(config, drawn)))
    return hidden


def _layers(params, sources):
    depth = len(params.blocks)
    if sources is not None and len(sources) != depth:
        raise ValueError(f"sources must hold one draw for each of {depth} layers, got {len(sources)}")
    return (None,) * depth if sources is None else tuple(sources)


def _options(config, drawn, backward=False):
    """Options of one block: its attention, and for the backward pass that of its attention."""
    forward, back = attention_dense, attention_dense_vjp
    if drawn is not None:
        window = {"source_index": drawn}
        if config.block is not None:
            window = {"perm": drawn, "block": config.block, "left": config.left, "right": config.right}
        forward = lambda q, k, v, **o: ssa_attention(q, k, v, include_self=True, **window, **o)
        back = lambda q, k, v, do, **o: ssa_attention_bwd(do, q, k, v, include_self=True, **window, **o)
    block = {"num_heads": config.num_heads, "causal": True, "activation": "gelu_tanh", "attention": forward}
    return {**block, "attention_vjp": back} if backward else block


def self_ensemble(logits, *, average="prob"):
    """Probabilities [..., V] of R sampled forward passes, logits [R, ..., V], R >= 1.

    average: "prob" is the mean of the softmaxes; "logit" the softmax of the mean logits, which is another
    distribution and has no bound by Jensen's inequality.
    """
    dims(logits=(logits, "... V"))
    if logits.ndim < 2 or len(logits) < 1:
        raise ValueError(f"logits must be [R, ..., V] with R >= 1, got {list(logits.shape)}")
    if average not in ("prob", "logit"):
        raise ValueError(f'average must be "prob" or "logit", got {average!r}')
    logits = float64(logits)
    return softmax(logits).mean(axis=0) if average == "prob" else softmax(logits.mean(axis=0))


def ssa_ensemble(rng, params, ids, *, config, schedule, samples):
    """self_ensemble of `samples` passes with fresh draws: ids int [B, T] -> probabilities [B, T, V]."""
    at_least_one(samples=samples)
    draw = lambda: schedule.sources(rng, 0, 1, n=ids.shape[-1], depth=len(params.blocks))
    runs = [ssa_transformer(params, ids, config=config, sources=draw()) for _ in range(samples)]
    return self_ensemble(np.stack(runs))


def ssa_cost(n, dim, *, num_heads, reduction, kind="unbiased"):
    """Of one layer and sequence: {"macs", "projection_macs", "score_elements", "bytes"}.

    With k = ceil(n / reduction) sources a query: macs 2 n k dim of the two attention products, and those of
    the maps to q, k and v, which "unbiased" applies to k rows for keys and values, "local" to all n;
    num_heads n k scores; float32 bytes of the probabilities and of the gathered keys and values, k rows, or
    n in permuted order.
    """
    one_of("kind", kind, KINDS)
    if min(n, dim, num_heads) < 1 or reduction < 1 or dim % num_heads:
        raise ValueError(f"need n, dim, num_heads, reduction >= 1, num_heads dividing dim, got {n}, {dim}, "
                         f"{num_heads}, {reduction}")  # fmt: skip
    k = int(-(-n // reduction))
    rows, scores = (k if kind == "unbiased" else n), num_heads * n * k
    return {
        "macs": 2 * n * k * dim,
        "projection_macs": (n + 2 * rows) * dim * dim,
        "score_elements": scores,
        "bytes": 4 * (scores + 2 * rows * dim),
    }


def _check_sigma(sigma):
    if not sigma >= 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")


def _check_window(block, left, right):
    if block is None or block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if min(left, right) < 0:
        raise ValueError(f"left and right must not be negative, got {left} and {right}")


def example(seed=0):
    """SmolLM2 on a line of Shakespeare with a quarter of the sources, and a small model of its letters."""
    from ref.data import attention_inputs, text
    from ref.models.gpt import init_gpt

    rng = np.random.default_rng(seed)
    q, k, v = (x[None, :3, :40] for x in attention_inputs())
    some = {"source_index": sample_sources(rng.random(40), 10), "causal": True, "include_self": True}
    perm = local_permutation(rng.standard_normal(40), sigma=4.0)
    local = {"perm": perm, "block": 8, "left": 1, "right": 1}
    letters = np.array([ord(c) for c in text()[:66]])
    ids = np.unique(letters, return_inverse=True)[1].reshape(2, 33)
    params = init_gpt(rng, vocab=int(ids.max()) + 1, context=32, dim=16, depth=2, std=0.2)
    drawn = SSASchedule(4).sources(rng, 0, 10, n=32, depth=2)
    model = {"config": SSAConfig(2), "sources": drawn}
    run = lambda sources: ssa_transformer(params, ids[:, :-1], config=SSAConfig(2), sources=sources)
    logits = np.stack([run(drawn), run(None)])
    return [
        Example("ssa_attention", (q, k, v), some, (0, 1, 2)),
        Example("ssa_attention", (q, k, v), local, (0, 1, 2)),
        Example("ssa_attention_bwd", (q, q, k, v), some),
        Example("ssa_transformer", (params, ids[:, :-1]), model, (0,)),
        Example("ssa_transformer_loss", (params, ids), model, (0,)),
        Example("ssa_transformer_loss_vjp", (params, ids), model),
        Example("self_ensemble", (logits,), {}, (0,)),
    ]
