"""SpecKV: drop cached keys by the attention they get from a draft model's guess of the answer.

Source: Galim, Ewer et al. 2026 (arXiv 2506.08373) and the code released with it; SnapKV (Li et al. 2024),
streaming attention (Xiao et al. 2023) and H2O (Zhang et al. 2023) as baselines. Keys come rotated by their
true positions and are never rotated again. Of equal importances the lowest index ranks first: pooling makes
plateaus, and the released code leaves their order open.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense
from ref.blocks.importance import POOLS, pool_scores, top_indices, window_attention
from ref.dims import dims, float64
from ref.example import Example
from ref.models.llama import LlamaWeights, continue_text, decode_step, forward_with, generate

REDUCTIONS = ("max", "mean")


class KeptCache(NamedTuple):
    """What is left of a cache: k, v [..., Hkv, C, D] and true positions int [..., Hkv, C], in any order."""

    k: np.ndarray
    v: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class SpecKVConfig:
    """Options of `spec_kv_generate`; lookahead None drafts as many tokens as are asked for.

    Prefill is sparse beyond sparse_window + sparse_columns tokens: a band of that width and, for each key
    head, the columns of that many keys. capacity None drops nothing.
    """

    window: int = 32
    capacity: int | None = 256
    reduction: str = "max"
    pool: str | None = "max"
    kernel: int = 7
    lookahead: int | None = None
    sparse_window: int = 2048
    sparse_columns: int = 2048


def kv_importance(q, k, *, window, reduction="max", pool="max", kernel=7, scale=None):
    """Attention that each key before the window gets from the last `window` queries: [..., Hkv, L - window].

    The softmax runs over all L keys; its window columns are then cut off without renormalising. Reduced over
    the queries and the query heads of a key head, then pooled along the keys.
    Args: q [..., H, L, D], k [..., Hkv, L, D] after rotation; window in 1..L-1, with the look-ahead where
      there is one; kernel odd.
    Raises: ValueError naming the argument at fault.
    """
    _check_options(window, q.shape[-2], reduction, pool, kernel)
    kv_heads = k.shape[-3]
    A = window_attention(q, k, window=window, scale=scale)[..., :-window]  # [..., H, W, L - W]
    rows = A.shape[-3] // kv_heads * window
    A = A.reshape(*A.shape[:-3], kv_heads, rows, A.shape[-1])  # [..., Hkv, g W, L - W]
    scores = A.max(axis=-2) if reduction == "max" else A.mean(axis=-2)
    return pool_scores(scores, pool=pool, kernel=kernel)


def compress_kv(q, k, v, *, window, capacity, reduction="max", pool="max", kernel=7):
    """(k_c, v_c [..., Hkv, C, D], indices [..., Hkv, C - window]): the most important pairs, then the window.

    C = min(capacity, L). indices fall in importance; the window's own pairs follow in their order.
    Raises: ValueError for capacity <= window and as `kv_importance`.
    """
    if capacity <= window:
        raise ValueError(f"capacity must exceed the window of {window}, got {capacity}")
    dims(k=(k, "... Hkv L D"), v=(v, "... Hkv L Dv"))
    L = k.shape[-2]
    scores = kv_importance(q, k, window=window, reduction=reduction, pool=pool, kernel=kernel)
    indices = top_indices(scores, min(capacity, L) - window)
    positions = _with_tail(indices, L - window, L)
    return _take(k, positions), _take(v, positions), indices


def spec_kv_select(
    q, k, v, *, prompt_len, lookahead, window=32, capacity=256, reduction="max", pool="max", kernel=7
):
    """KeptCache of `capacity` pairs chosen by the prompt's last queries and those of the drafted tokens.

    The last `window` tokens before the prompt's last are always kept. The prompt's last token and the draft
    are not: the last token is fed again as the first step of decoding. A prompt of at most `capacity` tokens
    keeps all its pairs but the last.
    Args: q [..., H, L, D], k, v [..., Hkv, L, D] over prompt and draft, L >= prompt_len + lookahead.
    Raises: ValueError naming the argument at fault.
    """
    end = prompt_len + lookahead
    if not (1 <= prompt_len and 0 <= lookahead and end <= k.shape[-2]):
        raise ValueError(
            f"prompt_len >= 1 and lookahead >= 0 must fit the {k.shape[-2]} tokens, got {prompt_len} and "
            f"{lookahead}"
        )
    if prompt_len <= capacity:
        _check_options(1, 2, reduction, pool, kernel)
        return _keep(k, v, _every(k, prompt_len - 1))
    if capacity <= window:
        raise ValueError(f"capacity must exceed the window of {window}, got {capacity}")
    q, k, v = (x[..., :end, :] for x in (q, k, v))
    options = {"reduction": reduction, "pool": pool, "kernel": kernel}
    more = lookahead + 1  # the window of the released driver: w tokens, the last of the prompt, the draft
    _, _, indices = compress_kv(q, k, v, window=window + more, capacity=capacity + more, **options)
    return _keep(k, v, _with_tail(indices, prompt_len - 1 - window, prompt_len - 1))


def snap_kv_select(q, k, v, *, window=32, capacity=256, reduction="mean", pool="mean", kernel=5):
    """KeptCache by the attention of the prompt's last `window` tokens alone (SnapKV)."""
    L = k.shape[-2]
    if capacity >= L:
        _check_options(1, 2, reduction, pool, kernel)
        return _keep(k, v, _every(k, L))
    options = {"reduction": reduction, "pool": pool, "kernel": kernel}
    k_c, v_c, indices = compress_kv(q, k, v, window=window, capacity=capacity, **options)
    return KeptCache(k_c, v_c, _with_tail(indices, L - window, L))


def streaming_select(k, v, *, sinks=4, capacity):
    """KeptCache of the first `sinks` pairs and the most recent ones (streaming attention)."""
    L = k.shape[-2]
    if not 0 <= sinks <= capacity or capacity < 1:
        raise ValueError(f"need 0 <= sinks <= capacity and capacity >= 1, got {sinks=}, {capacity=}")
    if capacity >= L:
        return _keep(k, v, _every(k, L))
    chosen = np.concatenate([np.arange(sinks), np.arange(L - capacity + sinks, L)])
    return _keep(k, v, np.broadcast_to(chosen, (*k.shape[:-2], capacity)).astype(np.int32))


def h2o_select(q, k, v, *, window, capacity):
    """KeptCache of the keys with most attention from all queries so far, and the last `window` (H2O)."""
    L = k.shape[-2]
    if not 1 <= window < capacity:
        raise ValueError(f"capacity must exceed the window, and that be at least 1, got {capacity}, {window}")
    if capacity >= L:
        return _keep(k, v, _every(k, L))
    A = window_attention(q, k, window=L).sum(axis=-2)  # [..., H, L]
    groups = A.shape[-2] // k.shape[-3]
    scores = A.reshape(*A.shape[:-2], k.shape[-3], groups, L).sum(axis=-2)[..., :-window]
    return _keep(k, v, _with_tail(top_indices(scores, capacity - window), L - window, L))


def attend_kept(q_new, cache: KeptCache):
    """Attention of new queries [..., H, T, D] on a kept cache, every pair of which is visible."""
    return attention_dense(q_new, cache.k, cache.v)


def vertical_band_mask(indices, *, length, band):
    """bool [..., L, L], True = may be seen: causal, and in `indices` [..., n] or less than `band` back."""
    if length < 1 or band < 1:
        raise ValueError(f"length and band must be at least 1, got {length} and {band}")
    indices = np.asarray(indices)
    if indices.size and not (0 <= indices.min() and indices.max() < length):
        raise ValueError(f"indices must be in 0..{length - 1}, got {indices.min()}..{indices.max()}")
    column = (indices[..., :, None] == np.arange(length)).any(axis=-2)  # [..., L]
    back = np.arange(length)[:, None] - np.arange(length)
    return (back >= 0) & ((back < band) | column[..., None, :])


def draft_generate(model: LlamaWeights, tokens, *, max_new):
    """The model's greedy continuation of `tokens`, exactly max_new tokens: a rough answer."""
    return generate(model, tokens, max_new_tokens=max_new, stop=())


def spec_kv_generate(target: LlamaWeights, draft: LlamaWeights, tokens, *, max_new, config=SpecKVConfig()):
    """(new tokens, KeptCache [n, Hkv, C, D]): draft, prefill with the draft behind, drop, decode greedily.

    New tokens keep their true positions. Raises: ValueError as `forward` and `spec_kv_select`.
    """
    tokens, c = np.asarray(tokens), config
    S, ahead = len(tokens), max_new if c.lookahead is None else c.lookahead
    guess = draft_generate(draft, tokens, max_new=ahead)
    options = {"reduction": c.reduction, "pool": c.pool, "kernel": c.kernel}
    kept = []

    def attend(l, q, k, v):
        capacity = S if c.capacity is None else c.capacity
        kept.append(spec_kv_select(
            q, k, v, prompt_len=S, lookahead=ahead, window=c.window, capacity=capacity, **options
        ))  # fmt: skip
        L = S + ahead
        if L <= c.sparse_window + c.sparse_columns:
            return attention_dense(q, k, v, causal=True)
        scores = kv_importance(q, k, window=c.window + ahead + 1, **options)
        # [Hkv, L, L]
        columns = vertical_band_mask(top_indices(scores, c.sparse_columns), length=L, band=c.sparse_window)
        return attention_dense(q, k, v, mask=np.repeat(columns, len(q) // len(k), axis=0))

    forward_with(target, np.concatenate([tokens, guess]), attend)
    cache = KeptCache(*map(np.stack, zip(*kept, strict=True)))
    # The cache is shorter than the text: a table of angles that starts later keeps the true positions.
    length = cache.k.shape[-2]
    late = target._replace(angles=target.angles[S - 1 - length :])
    arrays = np.stack([cache.k, cache.v], axis=1)
    step = lambda token, cache, position: decode_step(late, token, cache, position)
    logits, arrays = step(tokens[-1], arrays, length)
    greedy = {"temperature": 0.0}
    new = continue_text(logits, arrays, step, length + 1, len(late.angles), max_new, greedy, 0, (), None)
    return new, cache


def kv_cache_bytes(tokens, *, layers, kv_heads, head_dim, itemsize=2):
    """Bytes of keys and values of `tokens` tokens."""
    return 2 * tokens * layers * kv_heads * head_dim * itemsize


def select_cost(length, *, window, q_heads, head_dim):
    """Multiply-accumulates of the importance in one layer: `window` queries a head against all keys."""
    return window * length * q_heads * head_dim


def _every(k, count):
    """Positions 0..count-1 for every key head."""
    return np.broadcast_to(np.arange(count, dtype=np.int32), (*k.shape[:-2], count))


def _with_tail(indices, start, stop):
    """The indices and, behind them, start..stop-1: int32 [..., n + stop - start]."""
    tail = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (*indices.shape[:-1], stop - start))
    return np.concatenate([indices, tail], axis=-1)


def _take(x, positions):
    return np.take_along_axis(float64(x), positions[..., None], axis=-2)


def _keep(k, v, positions):
    return KeptCache(_take(k, positions), _take(v, positions), positions)


def _check_options(window, length, reduction, pool, kernel):
    if not 1 <= window < length:
        raise ValueError(f"window must be in 1..{length - 1} for {length} tokens, got {window}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "max" or "mean", got {reduction!r}')
    if pool not in POOLS:
        raise ValueError(f'pool must be "max", "mean" or None, got {pool!r}')
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, got {kernel}")


def example(seed=0):
    """Heads of SmolLM2 on 96 tokens of Hamlet, the last eight taken for the draft's answer."""
    from ref.data import attention_inputs

    q, k, v = attention_inputs()
    rng = np.random.default_rng(seed)
    new = q[:, -2:] + 0.1 * rng.standard_normal((9, 2, 64))
    kept = snap_kv_select(q, k, v, window=8, capacity=32)
    options = {"window": 8, "capacity": 32}
    return [
        Example("kv_importance", (q, k), {"window": 9}),
        Example("compress_kv", (q, k, v), options),
        Example("spec_kv_select", (q, k, v), {"prompt_len": 88, "lookahead": 8, **options}),
        Example("snap_kv_select", (q, k, v), options),
        Example("streaming_select", (k, v), {"capacity": 32}),
        Example("h2o_select", (q, k, v), options),
        Example("attend_kept", (new, kept), {}, (0,)),
        Example("vertical_band_mask", (kept.positions[:, :6],), {"length": 96, "band": 8}),
    ]
