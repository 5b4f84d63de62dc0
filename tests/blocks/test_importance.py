"""The shared ranking of keys: windows of attention, pooling, falling order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.importance import pool_scores, top_indices, window_attention

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.sampled_from(((1, 1, 1, 1), (4, 2, 7, 3), (3, 3, 5, 5))))
def test_importance_window_is_the_end_of_causal_attention(seed, size):
    H, Hkv, S, w = size
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, H, S, 6)), rng.standard_normal((2, Hkv, S, 6))
    A = window_attention(q, k, window=w)
    assert A.shape == (2, H, w, S)
    for h in range(H):
        for i in range(S - w, S):
            e = np.exp([q[1, h, i] @ k[1, h * Hkv // H, j] / np.sqrt(6) for j in range(i + 1)])
            np.testing.assert_allclose(A[1, h, i - S, : i + 1], e / e.sum(), rtol=1e-12)
            assert not A[1, h, i - S, i + 1 :].any()
    np.testing.assert_allclose(A.sum(axis=-1), 1, rtol=0, atol=S * EPS)


@given(seeds, st.integers(1, 8), st.sampled_from(("max", "mean")))
def test_importance_pooling_is_the_loop(seed, kernel, pool):
    x = np.random.default_rng(seed).random((2, 9))
    left, right = (kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2
    got = pool_scores(x, pool=pool, kernel=kernel)
    for i in range(9):
        near = x[0, max(i - left, 0) : i + right + 1]
        want = near.max() if pool == "max" else near.sum() / kernel  # zeros beyond the ends are counted
        np.testing.assert_allclose(got[0, i], want, rtol=kernel * EPS)
    if pool == "max":
        assert (got >= x).all()
    np.testing.assert_array_equal(pool_scores(x, pool=pool, kernel=1), x)
    np.testing.assert_array_equal(pool_scores(x, pool=None, kernel=kernel), x)


def test_importance_ranks_equal_scores_by_index():
    np.testing.assert_array_equal(top_indices(np.array([1.0, 3, 3, 0, 1]), 4), [1, 2, 0, 4])
    assert top_indices(np.zeros((2, 0)), 3).shape == (2, 0)


def test_importance_rejects_bad_input():
    q = np.ones((4, 5, 6))
    for call, message in (
        (lambda: window_attention(q, q[:3], window=2), "not a multiple of the Hkv=3"),
        (lambda: window_attention(q, q, window=6), r"window must be in 1\.\.5"),
        (lambda: window_attention(q, q, window=0), r"window must be in 1\.\.5"),
        (lambda: window_attention(q, q[:, :4], window=2), "axis S"),
        (lambda: pool_scores(q, pool="sum", kernel=1), "pool must be"),
        (lambda: pool_scores(q, pool="max", kernel=0), "kernel must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
