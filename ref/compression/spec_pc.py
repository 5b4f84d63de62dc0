"""SpecPC: give the big model only the prompt tokens that a small one attends to.

Source: Galim, Ewer et al. 2026 (arXiv 2506.08373) and the code released with it. The draft reads the whole
prompt once; the target then reads the chosen tokens at new, consecutive positions. Of equal scores the lowest
index ranks first: pooling makes plateaus, and the released code leaves their order open.
"""

from dataclasses import dataclass

import numpy as np

from ref.blocks.attention import attention_dense
from ref.blocks.importance import pool_scores, top_indices, window_attention
from ref.blocks.losses import negative_log_likelihood
from ref.dims import dims, float64
from ref.example import Example
from ref.models.llama import LlamaWeights, forward, forward_with, generate, llama_costs

REDUCTIONS = ("max", "mean")


@dataclass(frozen=True)
class SpecPCConfig:
    """Options of `spec_pc_compress`; neighbors None means kernel; lookahead is 1 for prefill alone."""

    capacity: int = 1024
    window: int = 64
    pool: str | None = "max"
    kernel: int = 64
    neighbors: int | None = None
    reduction: str = "max"
    lookahead: int = 1
    start_layer: int = 8
    weighted_query: bool = True


def token_importance(window_attn, decode_attn=None, *, start_layer=8, reduction="max", weighted_query=True):
    """[S]: the attention every prompt token gets, over layers from start_layer on, heads and queries.

    Args: window_attn [layers, H, w, S], probabilities of the last w prompt queries, see `window_attention`.
      decode_attn [steps, layers, H, S + steps] of generated tokens, or None; columns from S on are not read.
      reduction: "max", or "mean", which is a sum (the ranking is the same). weighted_query: a weight from 0
        for the oldest query of the window to 1 for the last; a single query is not weighted.
    Raises: ValueError naming the argument at fault.
    """
    n = dims(window_attn=(window_attn, "layers H w S"))
    if not 0 <= start_layer < n["layers"]:
        raise ValueError(f"start_layer must be in 0..{n['layers'] - 1}, got {start_layer}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "max" or "mean", got {reduction!r}')
    reduce = np.max if reduction == "max" else np.sum
    A = float64(window_attn)[start_layer:]
    if weighted_query and n["w"] > 1:
        A = A * np.linspace(0, 1, n["w"])[:, None]
    scores = reduce(A, axis=(0, 1, 2))
    if decode_attn is None:
        return scores
    steps = dims(decode_attn=(decode_attn, f"steps {n['layers']} {n['H']} columns"))
    if steps["columns"] < n["S"]:
        raise ValueError(f"decode_attn must have at least S={n['S']} columns, got {steps['columns']}")
    later = reduce(float64(decode_attn)[:, start_layer:, :, : n["S"]], axis=(1, 2))  # [steps, S]
    return reduce(np.concatenate([scores[None], later]), axis=0)


def select_prompt_tokens(
    importance, *, capacity, window=64, pool="max", kernel=64, neighbors=None, always_keep=None
):
    """Indices of the min(capacity, S) tokens to keep, ascending, int32.

    In order of priority: always_keep, the last `window` tokens, then the best smoothed scores, each with its
    neighbours, nearest first (0, -1, +1, -2, ...; one more on the right if their number is even).
    Args: importance [S] >= 0, finite. neighbors: how many around a chosen token, itself included; None is
      kernel, 0 and 1 the token alone. always_keep: int indices, or None.
    Raises: ValueError naming the argument at fault.
    """
    S = dims(importance=(importance, "S"))["S"]
    importance = float64(importance)
    neighbors = kernel if neighbors is None else neighbors
    always = np.zeros(0, int) if always_keep is None else np.asarray(always_keep)
    _check_select(importance, capacity, window, neighbors, always)
    if capacity >= S:
        return np.arange(S, dtype=np.int32)
    best = top_indices(pool_scores(importance, pool=pool, kernel=kernel), capacity)
    around = _offsets(neighbors)
    expanded = np.clip(best[:, None] + around, 0, S - 1).ravel()
    order = np.concatenate([always, np.arange(S - window, S), expanded])
    _, first = np.unique(order, return_index=True)
    return np.sort(order[np.sort(first)[:capacity]]).astype(np.int32)


def spec_pc_compress(draft: LlamaWeights, tokens, config=SpecPCConfig(), *, always_keep=None):
    """(tokens that are kept, their indices) of the prompt, by the attention of the draft model.

    Raises: ValueError for a lookahead below 1 and as `token_importance` and `select_prompt_tokens`.
    """
    tokens, c = np.asarray(tokens), config
    if c.lookahead < 1:
        raise ValueError(f"lookahead must be at least 1 (prefill alone), got {c.lookahead}")
    S = len(tokens)
    if c.capacity >= S:
        return tokens, np.arange(S, dtype=np.int32)
    prompt, steps = [], []
    logits, cache = forward_with(draft, tokens, _watch(c.window, prompt))
    for t in range(c.lookahead - 1):
        rows = []
        token = np.argmax(logits[-1], keepdims=True)
        logits, cache = forward_with(draft, token, _watch(1, rows), cache=cache, position=S + t)
        steps.append(np.stack(rows)[:, :, 0, :S])
    scores = token_importance(
        np.stack(prompt), np.stack(steps) if steps else None,
        start_layer=c.start_layer, reduction=c.reduction, weighted_query=c.weighted_query,
    )  # fmt: skip
    indices = select_prompt_tokens(
        scores, capacity=c.capacity, window=c.window, pool=c.pool, kernel=c.kernel, neighbors=c.neighbors,
        always_keep=always_keep,
    )  # fmt: skip
    return tokens[indices], indices


def spec_pc_generate(target: LlamaWeights, draft: LlamaWeights, tokens, *, max_new, config=SpecPCConfig()):
    """(new tokens, indices): the target's greedy continuation of the compressed prompt."""
    short, indices = spec_pc_compress(draft, tokens, config)
    return generate(target, short, max_new_tokens=max_new, stop=()), indices


def last_tokens(length, *, capacity):
    """Baseline: the last min(capacity, length) indices."""
    return np.arange(max(length - capacity, 0), length, dtype=np.int32)


def random_tokens(rng, length, *, capacity):
    """Baseline: min(capacity, length) indices drawn by a NumPy Generator, ascending."""
    return np.sort(rng.permutation(length)[:capacity]).astype(np.int32)


def first_last_tokens(length, *, capacity):
    """Baseline: half of the capacity from the start, the rest from the end."""
    if capacity >= length:
        return np.arange(length, dtype=np.int32)
    head = capacity // 2
    return np.concatenate([np.arange(head), np.arange(length - capacity + head, length)]).astype(np.int32)


def perplexity_tokens(nll, *, capacity):
    """Baseline: the tokens [S] that the draft found hardest, by negative log-likelihood, ascending."""
    dims(nll=(nll, "S"))
    return np.sort(top_indices(nll, capacity))


def token_nll(model: LlamaWeights, tokens):
    """-log p of each token [S] after those before it; the first, which nothing precedes, counts as 0."""
    logits, _ = forward(model, tokens)
    return np.concatenate([[0.0], negative_log_likelihood(logits[:-1], np.asarray(tokens)[1:])])


def ttft_flops(length, capacity, *, draft, target):
    """(with compression, without): FLOPs to the first token, for two LlamaConfigs.

    With it: the draft on all, the target on min(capacity, length) tokens.
    """
    flops = lambda config, n: llama_costs(config, context=0, n_in=n)["flops"]
    return flops(draft, length) + flops(target, min(capacity, length)), flops(target, length)


def break_even_length(capacity, *, draft, target):
    """The least prompt length at which compression to `capacity` tokens saves FLOPs before the first token.

    Raises: ValueError if it never does within the contexts of both models.
    """
    saves = lambda n: np.less(*ttft_flops(n, capacity, draft=draft, target=target))
    low, high = capacity, min(draft.context, target.context)
    if high <= low or not saves(high):
        raise ValueError(f"compression to {capacity} tokens saves nothing up to a length of {high}")
    while high - low > 1:  # what is saved grows with the length
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle, high)
    return high


def _offsets(neighbors):
    """0, -1, +1, -2, +2, ...: `neighbors` of them, (neighbors - 1) // 2 on the left."""
    left = (max(neighbors, 1) - 1) // 2
    around = np.arange(-left, max(neighbors, 1) - left)
    return around[np.argsort(np.abs(around), kind="stable")]


def _watch(window, seen):
    """An attention for `forward_with` that notes what the last `window` queries look at, block by block."""

    def attend(l, q, k, v):
        # earlier queries are not looked at
        front = np.zeros((len(q), k.shape[-2] - q.shape[-2], q.shape[-1]))
        seen.append(window_attention(np.concatenate([front, q], axis=-2), k, window=window))
        return attention_dense(q, k, v, causal=True)

    return attend


def _check_select(importance, capacity, window, neighbors, always):
    S = len(importance)
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance must be finite and not negative: zeros are padded beyond its ends")
    if not 0 <= window <= S:
        raise ValueError(f"window must be in 0..{S}, got {window}")
    if neighbors < 0:
        raise ValueError(f"neighbors must not be negative, got {neighbors}")
    if always.ndim != 1 or (always.size and not (0 <= always.min() and always.max() < S)):
        raise ValueError(f"always_keep must be indices in 0..{S - 1}, got {always}")
    if capacity < 1 or (capacity < S and window + len(always) > capacity):
        raise ValueError(
            f"capacity must hold the window of {window} and {len(always)} tokens of always_keep, got "
            f"{capacity}"
        )


def example(seed=0):
    """Heads of SmolLM2 on 96 tokens of Hamlet, taken as two layers of a draft."""
    from ref.data import attention_inputs

    q, k, _ = attention_inputs()
    rng = np.random.default_rng(seed)
    q = q + 0.1 * rng.standard_normal(q.shape)
    layers = np.stack([q[:6], q[3:]]), np.stack([k[:2], k[1:]])
    attn = window_attention(*layers, window=16)
    scores = token_importance(attn, start_layer=1)
    return [
        Example("window_attention", layers, {"window": 16}, (0, 1)),
        Example("token_importance", (attn,), {"start_layer": 0, "reduction": "mean"}, (0,)),
        Example("select_prompt_tokens", (scores,), {"capacity": 32, "window": 8, "kernel": 5}),
    ]
