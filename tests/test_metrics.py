"""Correlations and recall, against their definitions written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.metrics import pearson, ranks, recall_at, spearman

numbers = st.lists(st.integers(-4, 4), min_size=2, max_size=9)


@given(numbers)
def test_metrics_ranks_are_mean_places(x):
    want = [np.mean([i for i, v in enumerate(sorted(x)) if v == a]) for a in x]
    np.testing.assert_allclose(ranks(x), want, rtol=0, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(3, 20))
def test_metrics_correlations_are_their_definition(seed, n):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, n))
    np.testing.assert_allclose(pearson(a, b), np.corrcoef(a, b)[0, 1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(pearson(a, -3 * a + 2), -1, rtol=1e-12)
    np.testing.assert_allclose(spearman(a, np.exp(a)), 1, rtol=1e-12)  # order is all that counts


def test_metrics_recall_by_hand():
    v = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.2, 1], [1, 0.5], [-1, -1]])
    labels = np.array([0, 0, 1, 1, 1, 7])
    # nearest: 0 -> 1, 1 -> 0, 2 -> 3, 3 -> 2, 4 -> 1 (wrong); the last has no fellow and is not asked
    assert recall_at(v, labels, 1) == 0.8
    assert recall_at(v, labels, 3) == 1.0


def test_metrics_reject_bad_input():
    for call, words in (
        (lambda: pearson([1, 1], [1, 2]), "must not be constant"),
        (lambda: pearson([1], [1]), "two numbers or more"),
        (lambda: pearson(np.ones(2), np.ones(3)), "axis n is 2 in a"),
        (lambda: recall_at(np.ones((3, 2)), np.zeros(3, int), 3), r"k must be in 1\.\.2"),
        (lambda: recall_at(np.ones((3, 2)), np.arange(3), 1), "one label twice"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
