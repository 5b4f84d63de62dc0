"""Laws of SpecKV on ref alone: NumPy and Hypothesis."""

from itertools import combinations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense
from ref.compression.spec_kv import (
    SpecKVConfig,
    attend_kept,
    compress_kv,
    draft_generate,
    h2o_select,
    kv_cache_bytes,
    kv_importance,
    select_cost,
    snap_kv_select,
    spec_kv_generate,
    spec_kv_select,
    streaming_select,
    vertical_band_mask,
)
from ref.language.smollm2 import tiny_smollm2
from ref.models.llama import generate

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
pools = st.sampled_from(("max", "mean", None))
reductions = st.sampled_from(("max", "mean"))
L, D = 20, 4


def heads(seed, H=4, Hkv=2, length=L, batch=()):
    rng = np.random.default_rng(seed)
    shape = lambda h: (*batch, h, length, D)
    return rng.standard_normal(shape(H)), rng.standard_normal(shape(Hkv)), rng.standard_normal(shape(Hkv))


def probabilities(q, k):
    """Causal attention by the definition, key heads repeated: [H, L, L]."""
    k = np.repeat(k, len(q) // len(k), axis=0)
    s = np.where(np.tri(q.shape[1], dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(D), -np.inf)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@given(seeds, reductions, pools, st.sampled_from((1, 3, 7)), st.integers(1, 8))
def law_spec_kv_importance_is_the_reduced_attention(seed, reduction, pool, kernel, window):
    q, k, _ = heads(seed)
    got = kv_importance(q, k, window=window, reduction=reduction, pool=pool, kernel=kernel)
    A = probabilities(q, k)[:, -window:, :-window].reshape(2, 2 * window, L - window)
    want = A.max(axis=1) if reduction == "max" else A.sum(axis=1) / (2 * window)
    if pool:
        side = np.pad(want, ((0, 0), (kernel // 2, kernel // 2)))
        runs = np.stack([side[:, i : i + L - window] for i in range(kernel)])
        want = runs.max(axis=0) if pool == "max" else runs.sum(axis=0) / kernel
    # softmax of scores of size ~10 and sums of at most 7 x 16 terms
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * EPS)
    if pool == "max":
        assert (got >= kv_importance(q, k, window=window, reduction=reduction, pool=None) - EPS).all()


@given(seeds, reductions, pools, st.integers(1, 5), st.integers(6, 30))
def law_spec_kv_compress_keeps_the_best_and_the_window(seed, reduction, pool, window, capacity):
    q, k, v = heads(seed)
    options = {"window": window, "reduction": reduction, "pool": pool}
    k_c, v_c, idx = compress_kv(q, k, v, capacity=capacity, **options)
    kept = min(capacity, L)
    assert k_c.shape == v_c.shape == (2, kept, D)
    scores = kv_importance(q, k, **options)
    for h in range(2):
        assert len(set(idx[h])) == kept - window
        assert idx[h].max(initial=0) < L - window
        rest = np.delete(scores[h], idx[h])
        assert scores[h][idx[h]].min(initial=np.inf) >= rest.max(initial=0)
        assert (np.diff(scores[h][idx[h]]) <= 0).all()
        np.testing.assert_array_equal(k_c[h], np.concatenate([k[h][idx[h]], k[h][L - window :]]))
        np.testing.assert_array_equal(v_c[h], np.concatenate([v[h][idx[h]], v[h][L - window :]]))
    again = snap_kv_select(
        q, k, v, window=window, capacity=capacity, reduction=reduction, pool=pool, kernel=7
    )
    if capacity < L:
        np.testing.assert_array_equal(again.positions[:, : kept - window], idx)
        np.testing.assert_array_equal(again.k, k_c)
    # everything kept: the output is that of the full cache
    new = np.random.default_rng(seed).standard_normal((4, 1, D))
    full = attend_kept(new, snap_kv_select(q, k, v, window=window, capacity=L))
    np.testing.assert_allclose(full, attention_dense(new, k, v), rtol=0, atol=64 * EPS * np.abs(v).max())


@given(seeds, st.integers(0, 6), st.integers(1, 3), st.integers(4, 30))
@example(0, 0, 1, 13)  # as many as the prompt has before its last
def law_spec_kv_select_keeps_prompt_positions_only(seed, ahead, window, capacity):
    S = L - 6
    q, k, v = heads(seed)
    kept = spec_kv_select(q, k, v, prompt_len=S, lookahead=ahead, window=window, capacity=capacity)
    C = min(capacity, S - 1)
    assert kept.positions.shape == (2, C)
    for h in range(2):
        assert len(set(kept.positions[h])) == C
        assert kept.positions[h].max() < S - 1
        if capacity < S:
            np.testing.assert_array_equal(kept.positions[h, -window:], np.arange(S - 1 - window, S - 1))
        np.testing.assert_array_equal(kept.k[h], k[h][kept.positions[h]])
        np.testing.assert_array_equal(kept.v[h], v[h][kept.positions[h]])
    # tokens behind the look-ahead are not read
    q2, k2, v2 = (np.concatenate([x[:, : S + ahead], 0 * x[:, S + ahead :]], axis=1) for x in (q, k, v))
    again = spec_kv_select(q2, k2, v2, prompt_len=S, lookahead=ahead, window=window, capacity=capacity)
    np.testing.assert_array_equal(again.positions, kept.positions)
    if ahead == 0 and capacity < S - 1:  # else all are kept, and in order where nothing had to go
        options = {"reduction": "max", "pool": "max", "kernel": 7}
        one = snap_kv_select(
            *(x[:, :S] for x in (q, k, v)), window=window + 1, capacity=capacity + 1, **options
        )
        np.testing.assert_array_equal(one.positions[:, : C - window], kept.positions[:, : C - window])


@given(seeds, st.integers(2, 5))
def law_spec_kv_oracle_keeps_the_most_attention(seed, count):
    """Mean reduction, no pooling: of all sets of that size the chosen one receives the most attention."""
    q, k, v = heads(seed, H=2, Hkv=1, length=10)
    _, _, idx = compress_kv(q, k, v, window=3, capacity=3 + count, reduction="mean", pool=None)
    mass = probabilities(q, k)[:, -3:, :7].sum(axis=(0, 1))
    best = max(mass[list(c)].sum() for c in combinations(range(7), count))
    assert mass[idx[0]].sum() >= best - 64 * EPS


@given(seeds, pools)
def law_spec_kv_kept_mass_grows_with_capacity_and_bounds_the_error(seed, pool):
    """Full minus kept output is at most 2 * dropped mass * max |v| a query."""
    q, k, v = heads(seed)
    new = np.random.default_rng(seed + 1).standard_normal((4, 1, D))
    s = new @ np.repeat(k, 2, axis=0).swapaxes(1, 2) / np.sqrt(D)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    full, last = attention_dense(new, k, v), 0.0
    for capacity in (6, 10, 15, 20):
        kept = snap_kv_select(q, k, v, window=4, capacity=capacity, pool=pool)
        where = np.repeat(kept.positions, 2, axis=0)
        mass = np.take_along_axis(p[:, 0], where, axis=-1).sum(axis=-1)
        bound = 2 * (1 - mass) * np.linalg.norm(v, axis=-1).max()
        error = np.linalg.norm(attend_kept(new, kept) - full, axis=-1)[:, 0]
        assert (error <= bound + 64 * EPS * np.abs(v).max()).all()
        assert (mass >= last - 8 * EPS).all()
        last = mass


@given(seeds, reductions, pools)
def law_spec_kv_query_heads_of_a_group_are_equal_and_rows_independent(seed, reduction, pool):
    q, k, _ = heads(seed, batch=(3,))
    options = {"window": 4, "reduction": reduction, "pool": pool}
    both = kv_importance(q, k, **options)
    swapped = kv_importance(q[:, [1, 0, 3, 2]], k, **options)
    np.testing.assert_allclose(swapped, both, rtol=0, atol=16 * EPS)
    np.testing.assert_array_equal(kv_importance(q[1], k[1], **options), both[1])
    q[:, :, :8] = 7.0  # queries before the window do not matter
    np.testing.assert_array_equal(kv_importance(q, k, **options), both)


@given(seeds, st.integers(1, 25))
def law_spec_kv_baselines_keep_what_they_say(seed, capacity):
    q, k, v = heads(seed)
    sinks = min(4, capacity)
    kept = streaming_select(k, v, sinks=sinks, capacity=capacity)
    recent = L - capacity + sinks
    want = range(L) if capacity >= L else [*range(sinks), *range(recent, L)]
    assert list(kept.positions[0]) == list(want)
    if capacity >= 4:
        heavy = h2o_select(q, k, v, window=3, capacity=capacity)
        got = probabilities(q, k).reshape(2, 2, L, L).sum(axis=(1, 2))[:, : L - 3]
        C = min(capacity, L)
        assert heavy.positions.shape == (2, C)
        if capacity < L:
            assert list(heavy.positions[0, -3:]) == [L - 3, L - 2, L - 1]
            chosen = heavy.positions[0, :-3]
            assert got[0][chosen].min() >= np.delete(got[0], chosen).max(initial=0) - 64 * EPS


@given(seeds, st.integers(1, 12), st.integers(0, 5))
def law_spec_kv_mask_is_a_band_and_columns(seed, band, count):
    idx = np.random.default_rng(seed).permutation(10)[:count]
    mask = vertical_band_mask(idx, length=10, band=band)
    for i in range(10):
        for j in range(10):
            assert mask[i, j] == (j <= i and (i - j < band or j in idx))


def law_spec_kv_generation_with_room_for_all_is_plain_generation():
    weights, _ = tiny_smollm2(1)
    tokens = np.random.default_rng(0).integers(0, 250, 24)
    plain = generate(weights, tokens, max_new_tokens=6, stop=())
    np.testing.assert_array_equal(draft_generate(weights, tokens, max_new=6), plain)
    for capacity in (None, 24, 100):
        config = SpecKVConfig(window=4, capacity=capacity)
        new, cache = spec_kv_generate(weights, weights, tokens, max_new=6, config=config)
        np.testing.assert_array_equal(new, plain)
        assert cache.positions.shape == (2, 1, 23)
    config = SpecKVConfig(window=4, capacity=12, sparse_window=6, sparse_columns=6, lookahead=3)
    new, cache = spec_kv_generate(weights, weights, tokens, max_new=6, config=config)
    assert len(new) == 6
    assert cache.k.shape == (2, 1, 12, 16)
    # a band as wide as the text is no restriction
    wide = SpecKVConfig(window=4, capacity=None, sparse_window=27, sparse_columns=0, lookahead=3)
    assert list(spec_kv_generate(weights, weights, tokens, max_new=6, config=wide)[0]) == list(plain)


def law_spec_kv_costs():
    k = np.zeros((2, 30, 3, 100, 64), np.float16)
    assert kv_cache_bytes(100, layers=30, kv_heads=3, head_dim=64) == k.nbytes
    assert select_cost(100, window=8, q_heads=9, head_dim=64) == 8 * 100 * 9 * 64
