"""Grokking: a GPT-2 trained far beyond its training accuracy, and the instruments that look inside it.

Source: Wang, Yue, Su and Sun 2024 (arXiv 2405.15071): sections 3 to 5 and their appendices, with details of
the code released with it. The facts are ref/tasks/knowledge.py, the network is ref/models/gpt.py. Here are
sharing of weights across depth, the loss on answers, AdamW on everything but norms and biases, the logit lens
and causal tracing. Left out: dropout (the released code has 0.1) and half precision.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.losses import cross_entropy
from ref.blocks.optim import AdamState, adam_init, adamw_step, global_norm, matrix_mask, tree_map
from ref.checks import at_least_one, check_ids, check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.gpt import (
    GPTParams,
    gpt_blocks,
    gpt_blocks_vjp,
    gpt_embed,
    gpt_embed_vjp,
    gpt_head,
    gpt_head_vjp,
    init_gpt,
)
from ref.tasks.knowledge import (
    IGNORE,
    GrokData,
    Questions,
    comparison_data,
    complex_comparison_data,
    composition_data,
    corrupt_comparison,
    corrupt_composition,
)

__all__ = [
    "AdamState", "GPTParams", "GrokConfig", "GrokData", "History", "Questions", "adamw_step",
    "causal_trace", "comparison_data", "complex_comparison_data", "composition_data", "corrupt_comparison",
    "corrupt_composition", "example", "gpt2_forward", "gpt2_forward_backward", "gpt2_loss",
    "gpt2_loss_backward", "grokking_gap", "init_grokking", "lens_logits", "logit_lens", "matrix_mask",
    "slice_accuracy", "token_rank", "trace_strength", "train", "train_steps",
]  # fmt: skip


@dataclass(frozen=True)
class GrokConfig:
    """Sizes and options of `train`; the defaults are the paper's, 8 layers of width 768."""

    dim: int = 768
    depth: int = 8
    num_heads: int = 12
    loops: int = 1
    batch: int = 512
    lr: float = 1e-4
    warmup_steps: int = 2000
    weight_decay: float = 0.1
    clip: float = 1.0


class History(NamedTuple):
    """step, loss, weight_norm [n]; acc {slice: [n]}; params: the last ones."""

    step: np.ndarray
    loss: np.ndarray
    acc: dict
    weight_norm: np.ndarray
    params: GPTParams


def gpt2_forward(ids, params: GPTParams, *, num_heads, loops=1, return_hidden=False, eps=1e-5):
    """Logits [B, T, V] of ids [B, T]; the stack of blocks is run `loops` times with the same weights.

    Positions are added once, before the first block; the final norm is taken once. With return_hidden:
    (logits, hidden [L + 1, B, T, d]); hidden[l] enters block l, hidden[L] leaves the last, before the final
    norm, and L counts every pass.
    Raises: ValueError for ids outside the vocabulary, too long a text, loops < 1 or heads that do not fit.
    """
    hidden = _hidden(ids, params, num_heads, loops, eps)
    logits = gpt_head(hidden[-1], params, eps=eps)
    return (logits, np.stack(hidden)) if return_hidden else logits


def gpt2_forward_backward(ids, params: GPTParams, dlogits, dhidden=None, *, num_heads, loops=1, eps=1e-5):
    """GPTParams of gradients for dlogits [B, T, V] and, if hidden was returned, dhidden [L + 1, B, T, d].

    A block that is run several times gets the sum over its runs; wte what comes from lookup and head.
    """
    hidden = _hidden(ids, params, num_heads, loops, eps)
    blocks = params.blocks * loops
    extra = np.zeros(len(hidden)) if dhidden is None else float64(dhidden)
    dx, dwte, dscale, dbias = gpt_head_vjp(hidden[-1], params, dlogits, eps=eps)
    dx, grads = dx + extra[-1], [None] * len(params.blocks)
    for l in reversed(range(len(blocks))):
        one = params._replace(blocks=blocks[l : l + 1])
        dx, (g,) = gpt_blocks_vjp(hidden[l : l + 2], one, dx, num_heads=num_heads, eps=eps)
        dx, n = dx + extra[l], l % len(params.blocks)
        grads[n] = g if grads[n] is None else tree_map(np.add, grads[n], g)
    dlookup, dwpe = gpt_embed_vjp(ids, params, dx)
    return GPTParams(dwte + dlookup, dwpe, tuple(grads), dscale, dbias)


def gpt2_loss(ids, labels, params: GPTParams, *, num_heads, loops=1, eps=1e-5):
    """Mean of -log p(labels[t] | ids before t) over labels that are not -100. ids, labels [B, T].

    Raises: ValueError if nothing is scored (the first label never is), and as `gpt2_forward`.
    """
    return _loss(ids, labels, params, num_heads, loops, eps)[0]


def gpt2_loss_backward(ids, labels, params: GPTParams, dloss=1.0, *, num_heads, loops=1, eps=1e-5):
    """GPTParams of gradients of `gpt2_loss`, times dloss."""
    dlogits = dloss * _loss(ids, labels, params, num_heads, loops, eps)[1]
    return gpt2_forward_backward(ids, params, dlogits, num_heads=num_heads, loops=loops, eps=eps)


def train_steps(
    ids, labels, params: GPTParams, *, num_heads, steps, lr=1e-4, warmup_steps=2000, weight_decay=0.1,
    clip=1.0, betas=(0.9, 0.999), adam_eps=1e-8,
):  # fmt: skip
    """(params, losses [steps], grad_norms [steps]) of training on all rows at every step.

    Step s has the rate lr min(1, s / warmup_steps): the first moves nothing. Losses are those before each
    step, norms those before clipping.
    """
    state, mask, losses, norms = adam_init(params), matrix_mask(params), [], []
    for s in range(steps):
        loss, dlogits = _loss(ids, labels, params, num_heads, 1, 1e-5)
        grads = gpt2_forward_backward(ids, params, dlogits, num_heads=num_heads)
        params, state, norm = adamw_step(
            params, grads, state, lr=_warm(lr, s, warmup_steps), weight_decay=weight_decay, decay_mask=mask,
            clip=clip, betas=betas, adam_eps=adam_eps,
        )  # fmt: skip
        losses.append(loss)
        norms.append(norm)
    return params, np.array(losses), np.array(norms)


def lens_logits(hidden, params: GPTParams, *, eps=1e-5):
    """LN_f(h_l) E^T, what each state would say if it were the last: [L + 1, B, T, d] -> [L + 1, B, T, V]."""
    dims(hidden=(hidden, "layers B T d"), wte=(params.wte, "V d"))
    return gpt_head(hidden, params, eps=eps)


def token_rank(logits, targets):
    """How many tokens come before the target [...] in logits [..., V]: larger, or equal with a lower id. int.

    Raises: ValueError for NaN in logits or a target outside the vocabulary.
    """
    V = dims(logits=(logits, "... V"), targets=(targets, "..."))["V"]
    logits, targets = float64(logits), check_ids("targets", targets, V)
    if np.isnan(logits).any():
        raise ValueError("logits must not hold NaN: it has no rank")
    own = np.take_along_axis(logits, targets[..., None], axis=-1)
    before = (logits > own) | ((logits == own) & (np.arange(V) < targets[..., None]))
    return before.sum(axis=-1)


def logit_lens(hidden, params: GPTParams, targets, *, eps=1e-5):
    """Rank of targets [B] in the lens logits of hidden [L + 1, B, T, d] -> int [L + 1, B, T]; 0 is best.

    The mean of 1 / (rank + 1) over B is the paper's mean reciprocal rank.
    """
    dims(hidden=(hidden, "layers B T d"), targets=(targets, "B"))
    logits = lens_logits(hidden, params, eps=eps)
    return token_rank(logits, np.broadcast_to(np.asarray(targets)[:, None], logits.shape[:-1]))


def causal_trace(clean_ids, corrupt_ids, params: GPTParams, *, position, num_heads, eps=1e-5):
    """Logits [L + 1, B, V] at the last position: row l has hidden[l] at `position` from the corrupt run.

    The blocks from l on are rerun with it. Args: clean_ids, corrupt_ids [B, T]; of the corrupt ones only
    those up to `position` count. Raises: ValueError for a position outside 0..T-1.
    """
    T = dims(clean_ids=(clean_ids, "B T"), corrupt_ids=(corrupt_ids, "B T"))["T"]
    if not 0 <= position < T:
        raise ValueError(f"position must be in 0..{T - 1}, got {position}")
    clean, corrupt = (_hidden(ids, params, num_heads, 1, eps) for ids in (clean_ids, corrupt_ids))
    rows = []
    for l, (x, other) in enumerate(zip(clean, corrupt, strict=True)):
        patched = x.copy()
        patched[:, position] = other[:, position]
        rest = params._replace(blocks=params.blocks[l:])
        rows.append(gpt_blocks(patched, rest, num_heads=num_heads, eps=eps)[-1][:, -1])
    return gpt_head(np.stack(rows), params, eps=eps)


def trace_strength(logits, targets):
    """Share of the B rows whose target is no longer first: logits [L + 1, B, V], targets [B] -> [L + 1]."""
    n = dims(logits=(logits, "layers B V"), targets=(targets, "B"))
    if n["B"] < 1:
        raise ValueError("targets must hold at least one row: a share of none is not defined")
    ranks = token_rank(logits, np.broadcast_to(targets, np.shape(logits)[:2]))
    return (ranks > 0).mean(axis=1)


def init_grokking(rng, *, vocab, context, dim, depth):
    """GPTParams: N(0, 0.02), what writes into the residual stream N(0, 0.02 / sqrt(2 depth)), biases 0."""
    params, small = init_gpt(rng, vocab=vocab, context=context, dim=dim, depth=depth), np.sqrt(2 * depth)
    blocks = tuple(b._replace(w_o=b.w_o / small, w_fc2=b.w_fc2 / small) for b in params.blocks)
    return params._replace(blocks=blocks)


def slice_accuracy(params: GPTParams, data: GrokData, name, *, num_heads, loops=1):
    """Share of a slice's questions that greedy decoding answers, up to and with the end of the answer.

    Read off one pass over prompt and answer: greedy decoding writes the answer if and only if every token of
    it is the largest logit after those before it. NaN for an empty slice. Raises: ValueError for an unknown
    slice.
    """
    if name not in data.tests:
        raise ValueError(f"unknown slice {name!r}, there are {', '.join(data.tests)}")
    ids, labels = data.tests[name]
    if not len(ids):
        return float("nan")
    best = np.argmax(gpt2_forward(ids, params, num_heads=num_heads, loops=loops)[:, :-1], axis=-1)
    return float(((best == labels[:, 1:]) | (labels[:, 1:] == IGNORE)).all(axis=1).mean())


def train(config: GrokConfig, data: GrokData, *, steps, seed, eval_every) -> History:
    """Train on shuffled batches, and look at every slice after every eval_every steps and at the end."""
    c, rng = config, np.random.default_rng(seed)
    if steps < 1 or eval_every < 1:
        raise ValueError(f"steps and eval_every must be at least 1, got {steps} and {eval_every}")
    n, T = data.train.ids.shape
    params = init_grokking(rng, vocab=len(data.vocab), context=T, dim=c.dim, depth=c.depth)
    state, mask, order, seen = adam_init(params), matrix_mask(params), rng.permutation(n), []
    for s in range(steps):
        if len(order) < min(c.batch, n):
            order = rng.permutation(n)
        rows, order = order[: c.batch], order[c.batch :]
        ids, labels = data.train.ids[rows], data.train.labels[rows]
        loss, dlogits = _loss(ids, labels, params, c.num_heads, c.loops, 1e-5)
        grads = gpt2_forward_backward(ids, params, dlogits, num_heads=c.num_heads, loops=c.loops)
        params, state, _ = adamw_step(
            params, grads, state, lr=_warm(c.lr, s, c.warmup_steps), weight_decay=c.weight_decay,
            decay_mask=mask, clip=c.clip,
        )  # fmt: skip
        if (s + 1) % eval_every == 0 or s + 1 == steps:
            look = lambda name, p=params: slice_accuracy(p, data, name, num_heads=c.num_heads, loops=c.loops)
            seen.append((s + 1, loss, [look(name) for name in data.tests], global_norm(params)))
    step, loss, acc, norm = (np.array(x) for x in zip(*seen, strict=True))
    return History(step, loss, dict(zip(data.tests, acc.T, strict=True)), norm, params)


def grokking_gap(history: History, *, threshold=0.99):
    """(first step with "train_inferred" at the threshold, first with "test_id"); None where it never is."""
    first = lambda acc: next((int(s) for s, a in zip(history.step, acc, strict=True) if a >= threshold), None)
    return first(history.acc["train_inferred"]), first(history.acc["test_id"])


def _hidden(ids, params, num_heads, loops, eps):
    """hidden[l] for l = 0..L, the whole depth unrolled."""
    dims(ids=(ids, "B T"))
    at_least_one(loops=loops)
    check_num_heads(params.wte.shape[1], num_heads)
    unrolled = params._replace(blocks=tuple(params.blocks) * loops)
    return gpt_blocks(gpt_embed(ids, params), unrolled, num_heads=num_heads, eps=eps)


def _loss(ids, labels, params, num_heads, loops, eps):
    """(loss, its gradient for the logits [B, T, V])."""
    dims(ids=(ids, "B T"), labels=(labels, "B T"))
    logits = gpt2_forward(ids, params, num_heads=num_heads, loops=loops, eps=eps)
    loss, d = cross_entropy(logits[:, :-1], np.asarray(labels)[:, 1:], ignore=IGNORE)
    return loss, np.concatenate([d, np.zeros_like(logits[:, -1:])], axis=1)


def _warm(lr, step, warmup_steps):
    """lr min(1, step / warmup_steps)."""
    return lr * min(1.0, step / warmup_steps) if warmup_steps else lr


def example(seed=0):
    """A two-block network on questions about a small drawn world."""
    rng = np.random.default_rng(seed)
    data = composition_data(rng, entities=12, relations=4, out_degree=3, ratio=1.0, holdout=0.1)
    params = init_grokking(rng, vocab=len(data.vocab), context=5, dim=16, depth=2)
    params = tree_map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    ids, labels = data.train.ids[-6:], data.train.labels[-6:]
    other = corrupt_composition(rng, data, ids, position=1)
    targets, heads = ids[:, 3], {"num_heads": 2}
    logits, hidden = gpt2_forward(ids, params, return_hidden=True, **heads)
    traced = causal_trace(ids[:, :3], other, params, position=1, **heads)
    grads = gpt2_loss_backward(ids, labels, params, **heads)
    step = {"lr": 1e-3, "weight_decay": 0.1, "decay_mask": matrix_mask(params)}
    return [
        Example("gpt2_forward", (ids, params), {**heads, "loops": 2}, (1,)),
        Example("gpt2_loss", (ids, labels, params), heads, (2,)),
        Example("adamw_step", (params, grads, adam_init(params)), step),
        Example("train_steps", (ids, labels, params), {**heads, "steps": 2, "warmup_steps": 1}),
        Example("lens_logits", (hidden, params), {}, (0, 1)),
        Example("token_rank", (logits[:, 2], targets)),
        Example("logit_lens", (hidden, params, targets)),
        Example("causal_trace", (ids[:, :3], other, params), {"position": 1, **heads}, (2,)),
        Example("trace_strength", (traced, targets)),
    ]
