"""Laws of SpecPC on ref alone: NumPy and Hypothesis."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.compression.spec_pc import (
    SpecPCConfig,
    break_even_length,
    first_last_tokens,
    last_tokens,
    perplexity_tokens,
    random_tokens,
    select_prompt_tokens,
    spec_pc_compress,
    spec_pc_generate,
    token_importance,
    token_nll,
    ttft_flops,
    window_attention,
)
from ref.language.smollm2 import SmolLM2Config, tiny_smollm2
from ref.models.llama import decode_step, generate, prefill

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
S = 30


def scores(seed, distinct=True):
    rng = np.random.default_rng(seed)
    return rng.permutation(S) + 1.0 if distinct else rng.integers(0, 4, S).astype(float)


def by_the_list(importance, capacity, window, pool, kernel, neighbors):
    """The rule step by step, with Python lists."""
    S = len(importance)
    left = (kernel - 1) // 2
    padded = [0.0] * left + list(importance) + [0.0] * (kernel - 1 - left)
    runs = [padded[i : i + kernel] for i in range(S)]
    smooth = {"max": [max(r) for r in runs], "mean": [sum(r) / kernel for r in runs], None: list(importance)}[
        pool
    ]
    ranked = sorted(range(S), key=lambda i: (-smooth[i], i))[:capacity]
    n = max(neighbors, 1)
    offsets = sorted(range(-((n - 1) // 2), n - (n - 1) // 2), key=lambda o: (abs(o), o))
    chosen = list(range(S - window, S))
    for i in ranked:
        for o in offsets:
            j = min(max(i + o, 0), S - 1)
            if j not in chosen:
                chosen.append(j)
    return sorted(chosen[:capacity])


@given(
    seeds, st.booleans(), st.integers(1, S + 3), st.integers(0, 8), st.sampled_from(("max", "mean", None)),
    st.integers(1, 6), st.integers(0, 6),
)  # fmt: skip
def law_spec_pc_selection_follows_the_list(seed, distinct, capacity, window, pool, kernel, neighbors):
    importance, capacity = scores(seed, distinct), max(capacity, window)
    options = {"capacity": capacity, "window": window, "pool": pool, "kernel": kernel}
    got = select_prompt_tokens(importance, neighbors=neighbors, **options)
    assert len(got) == min(capacity, S)
    assert (np.diff(got) > 0).all()
    assert set(range(S - window, S)) <= set(got.tolist())
    if pool != "mean":  # sums of floats in another order could break ties otherwise
        assert got.tolist() == by_the_list(importance, min(capacity, S), window, pool, kernel, neighbors)
    same = select_prompt_tokens(importance, neighbors=None, **options)
    np.testing.assert_array_equal(same, select_prompt_tokens(importance, neighbors=kernel, **options))


@given(seeds, st.integers(4, 25), st.sampled_from((0, 1)))
def law_spec_pc_alone_it_is_the_window_and_the_best(seed, capacity, neighbors):
    importance, window = scores(seed), 4
    got = select_prompt_tokens(importance, capacity=capacity, window=window, pool=None, neighbors=neighbors)
    others = sorted(range(S - window), key=lambda i: -importance[i])
    best = [i for i in sorted(range(S), key=lambda i: -importance[i])[:capacity] if i < S - window]
    assert got.tolist() == sorted([*best[: capacity - window], *range(S - window, S)])
    assert set(best[: capacity - window]) <= set(others[:capacity])
    lucky = int(got[0])
    importance[lucky] += 100  # raising a chosen token's score never removes it
    again = select_prompt_tokens(importance, capacity=capacity, window=window, pool=None, neighbors=neighbors)
    if lucky < S - window:
        assert lucky in again


@given(seeds, st.integers(5, 20))
def law_spec_pc_always_keep_comes_first(seed, capacity):
    keep = np.array([0, 7])
    got = select_prompt_tokens(scores(seed), capacity=capacity, window=3, kernel=3, always_keep=keep)
    assert {0, 7, S - 3, S - 2, S - 1} <= set(got.tolist())
    assert len(got) == capacity
    flat = select_prompt_tokens(np.ones(S), capacity=capacity, window=3, pool=None, neighbors=0)
    assert flat.tolist() == [*range(capacity - 3), S - 3, S - 2, S - 1]  # ties: lowest index first


@given(seeds, st.sampled_from(("max", "mean")), st.booleans(), st.integers(0, 2), st.sampled_from((0, 2)))
def law_spec_pc_importance_is_the_loop(seed, reduction, weighted, start, steps):
    rng = np.random.default_rng(seed)
    A, later = rng.random((3, 2, 4, 9)), rng.random((2, 3, 2, 11))[:steps]
    decode = later if steps else None
    options = {"start_layer": start, "reduction": reduction, "weighted_query": weighted}
    got = token_importance(A, decode, **options)
    for j in range(9):
        terms = [
            A[l, h, i, j] * (i / 3 if weighted else 1)
            for l in range(start, 3)
            for h in range(2)
            for i in range(4)
        ]
        for t in range(steps):
            row = [later[t, l, h, j] for l in range(start, 3) for h in range(2)]
            terms.append(max(row) if reduction == "max" else sum(row))
        want = max(terms) if reduction == "max" else sum(terms)
        np.testing.assert_allclose(got[j], want, rtol=32 * EPS)
    if weighted:  # the oldest query weighs nothing
        B = A.copy()
        B[:, :, 0] = rng.random((3, 2, 9))
        np.testing.assert_array_equal(token_importance(B, decode, **options), got)
    if reduction == "max":  # heads and layers may be repeated
        twice = np.concatenate([A, A], axis=1)
        np.testing.assert_array_equal(token_importance(twice, **options), token_importance(A, **options))
    one = token_importance(A[:, :, :1], **options)
    np.testing.assert_array_equal(one, token_importance(A[:, :, :1], **{**options, "weighted_query": False}))


def law_spec_pc_finds_a_needle_that_only_late_queries_in_deep_layers_see():
    """Defaults recover every needle; scoring shallow layers, or all queries alike, misses some."""
    rng = np.random.default_rng(0)
    layers, w, needles = 12, 8, np.array([20, 57, 90])
    A = 1e-3 * rng.random((layers, 2, w, 120))
    A[8:, :, -2:, needles] = 0.05
    A[:8, :, :, 100:106] = 0.5  # shallow layers look elsewhere
    A[8:, :, 0, 30:40] = 0.5  # so does the oldest query
    select = lambda **o: set(
        select_prompt_tokens(token_importance(A, **o), capacity=35, window=8, kernel=5).tolist()
    )
    assert set(needles.tolist()) <= select()
    assert not set(needles.tolist()) <= select(start_layer=0)
    assert not set(needles.tolist()) <= select(weighted_query=False)


def law_spec_pc_compressed_prompt_goes_to_the_target():
    weights, _ = tiny_smollm2(2)
    tokens = np.random.default_rng(0).integers(0, 250, 40)
    config = SpecPCConfig(capacity=16, window=6, kernel=5, start_layer=1, lookahead=3)
    short, indices = spec_pc_compress(weights, tokens, config)
    np.testing.assert_array_equal(short, tokens[indices])
    assert len(indices) == 16
    assert set(range(34, 40)) <= set(indices.tolist())
    new, again = spec_pc_generate(weights, weights, tokens, max_new=4, config=config)
    np.testing.assert_array_equal(again, indices)
    np.testing.assert_array_equal(new, generate(weights, short, max_new_tokens=4, stop=()))
    all_of_it = replace(config, capacity=40)
    np.testing.assert_array_equal(
        spec_pc_generate(weights, weights, tokens, max_new=4, config=all_of_it)[0],
        generate(weights, tokens, max_new_tokens=4, stop=()),
    )
    kept = spec_pc_compress(weights, tokens, config, always_keep=np.array([0]))[1]
    assert kept[0] == 0


def law_spec_pc_likelihoods_are_those_of_single_steps():
    weights, _ = tiny_smollm2(3)
    tokens = np.array([5, 9, 200, 7, 7])
    nll = token_nll(weights, tokens)
    logits, cache = prefill(weights, tokens[:1])
    assert nll[0] == 0
    for t in range(1, 5):
        want = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[t]]
        np.testing.assert_allclose(nll[t], want, rtol=1e-9, atol=1e-9)
        logits, cache = decode_step(weights, tokens[t], cache, t)


@given(seeds, st.integers(1, 20))
def law_spec_pc_baselines(seed, capacity):
    rng, n = np.random.default_rng(seed), min(capacity, 12)
    nll = rng.random(12)
    kept = [
        last_tokens(12, capacity=capacity),
        random_tokens(rng, 12, capacity=capacity),
        first_last_tokens(12, capacity=capacity),
        perplexity_tokens(nll, capacity=capacity),
    ]
    for indices in kept:
        assert len(indices) == n
        assert len(set(indices.tolist())) == n
        assert (np.diff(indices) > 0).all()
    assert kept[0].tolist() == list(range(12 - n, 12))
    assert nll[kept[3]].min() >= np.delete(nll, kept[3]).max(initial=0)
    if capacity < 12:
        assert kept[2].tolist() == [*range(capacity // 2), *range(12 - capacity + capacity // 2, 12)]


def law_spec_pc_first_token_pays_off_beyond_the_break_even_length():
    target = SmolLM2Config(context=2**17)
    draft = replace(target, depth=8)
    n = break_even_length(1024, draft=draft, target=target)
    assert 1024 < n < 2**17
    before, after = (ttft_flops(m, 1024, draft=draft, target=target) for m in (n - 1, n))
    assert before[0] >= before[1]
    assert after[0] < after[1]


@given(seeds)
def law_spec_pc_window_rows_are_distributions(seed):
    rng = np.random.default_rng(seed)
    A = window_attention(rng.standard_normal((2, 4, 9, 5)), rng.standard_normal((2, 2, 9, 5)), window=4)
    np.testing.assert_allclose(A.sum(axis=-1), 1, rtol=0, atol=16 * EPS)
    for i in range(4):
        assert not A[:, :, i, 9 - 4 + i + 1 :].any()
