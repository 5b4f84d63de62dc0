"""The exercises of the chapter on SpecKV: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:importance]
import numpy as np


def importance(A, kv_heads):
    """Largest attention that each key gets, for each key head: [kv_heads, keys], from
    A [heads, window, keys]; consecutive query heads share a key head. As it stands
    all heads decide for all.
    """
    return np.repeat(A.max(axis=(0, 1))[None], kv_heads, axis=0)
    # --8<-- [end:importance]


# --8<-- [start:solve_importance]
def solve_importance(A, kv_heads):
    return A.reshape(kv_heads, -1, A.shape[-1]).max(axis=1)
    # --8<-- [end:solve_importance]


def check_importance(importance):
    """The library's importance before pooling."""
    from ref.blocks.importance import window_attention
    from ref.compression.spec_kv import kv_importance

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((6, 12, 4)), rng.standard_normal((3, 12, 4))
    want = kv_importance(q, k, window=4, pool=None)
    got = np.asarray(importance(window_attention(q, k, window=4)[..., :-4], 3))
    assert got.shape == want.shape, f"the result has shape {got.shape}, not {want.shape}"
    for h in range(3):
        off = np.abs(got[h] - want[h]).max()
        assert off < 1e-12, f"key head {h} belongs to query heads {2 * h} and {2 * h + 1}: off by {off:.3f}"


# --8<-- [start:kept]
def kept(scores, prompt_len, window, capacity):
    """Positions of the prompt that stay in the cache of one key head, in any order,
    from the scores of the first prompt_len - 1 - window of them. As it stands the
    prompt's last token is kept too, and one of the best is given up for it.
    """
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: capacity - window - 1]
    return [*best, *range(prompt_len - 1 - window, prompt_len)]
    # --8<-- [end:kept]


# --8<-- [start:solve_kept]
def solve_kept(scores, prompt_len, window, capacity):
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: capacity - window]
    return [*best, *range(prompt_len - 1 - window, prompt_len - 1)]  # the last token is fed again
    # --8<-- [end:solve_kept]


def check_kept(kept):
    """The library's selection; the prompt's last token is the first step of decoding."""
    from ref.compression.spec_kv import kv_importance, spec_kv_select

    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 24, 4)) for _ in range(3))
    for ahead, window, capacity in ((4, 3, 8), (0, 5, 7), (2, 1, 2)):
        S = 20
        cut = [x[:, : S + ahead] for x in (q, k, v)]
        scores = kv_importance(*cut[:2], window=window + ahead + 1)[0]
        choice = spec_kv_select(*cut, prompt_len=S, lookahead=ahead, window=window, capacity=capacity)
        want = sorted(choice.positions[0].tolist())
        got = sorted(int(i) for i in kept(scores, S, window, capacity))
        assert got == want, f"{ahead = }, {window = }, {capacity = }: kept are {want}, not {got}"


# --8<-- [start:tokens_that_fit]
def tokens_that_fit(budget_bytes, layers, kv_heads, head_dim, itemsize):
    """How many tokens a cache of keys and values may hold in the budget. As it
    stands one layer's keys are counted.
    """
    return budget_bytes // (kv_heads * head_dim * itemsize)
    # --8<-- [end:tokens_that_fit]


# --8<-- [start:solve_tokens_that_fit]
def solve_tokens_that_fit(budget_bytes, layers, kv_heads, head_dim, itemsize):
    return budget_bytes // (2 * layers * kv_heads * head_dim * itemsize)
    # --8<-- [end:solve_tokens_that_fit]


def check_tokens_that_fit(tokens_that_fit):
    """They fit, and one more does not."""
    from ref.compression.spec_kv import kv_cache_bytes

    for budget, layers, heads, dim, size in (
        (2**30, 32, 8, 128, 2),
        (512 * 1024, 30, 3, 64, 2),
        (999, 1, 1, 4, 1),
    ):
        n = tokens_that_fit(budget, layers, heads, dim, size)
        shape = {"layers": layers, "kv_heads": heads, "head_dim": dim, "itemsize": size}
        took, more = kv_cache_bytes(n, **shape), kv_cache_bytes(n + 1, **shape)
        assert took <= budget < more, f"{n:,} tokens take {took:,} bytes of {budget:,}, one more {more:,}"
