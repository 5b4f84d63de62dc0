"""Cross-entropy: the definition, what is not scored, and its gradient; macro-F1 by hand."""

import numpy as np
import pytest

from ref.blocks.losses import cross_entropy, macro_f1, negative_log_likelihood

RNG = np.random.default_rng(0)
Z, Y = 3 * RNG.standard_normal((2, 4, 5)), RNG.integers(0, 5, (2, 4))
EPS = np.finfo(np.float64).eps


def test_losses_likelihood_is_the_definition_and_bears_huge_logits():
    got = negative_log_likelihood(Z, Y)
    for i in np.ndindex(2, 4):
        want = -np.log(np.exp(Z[i][Y[i]]) / np.exp(Z[i]).sum())
        np.testing.assert_allclose(got[i], want, rtol=0, atol=32 * EPS * np.abs(Z).max())
    assert negative_log_likelihood(np.array([1e300, 0.0]), np.array(0)) == 0
    assert negative_log_likelihood(np.array([1e300, 0.0]), np.array(1)) == 1e300
    assert negative_log_likelihood(np.zeros((0, 5)), np.zeros(0, int)).shape == (0,)


def test_losses_cross_entropy_is_the_mean_over_what_is_scored():
    labels = Y.copy()
    labels[0, :3] = -100
    loss, grad = cross_entropy(Z, labels, ignore=-100)
    np.testing.assert_allclose(loss, negative_log_likelihood(Z, Y)[labels >= 0].mean(), rtol=4 * EPS)
    assert not grad[0, :3].any()
    d, h = RNG.standard_normal(Z.shape), 1e-5
    slope = (
        cross_entropy(Z + h * d, labels, ignore=-100)[0] - cross_entropy(Z - h * d, labels, ignore=-100)[0]
    )
    # third derivatives of the loss are at most 1: the quotient is off by h^2 |d|^3, and by eps / h
    np.testing.assert_allclose((grad * d).sum(), slope / (2 * h), rtol=0, atol=1e-9)
    wild = Z.copy()
    wild[0, :3] = np.nan
    np.testing.assert_array_equal(cross_entropy(wild, labels, ignore=-100)[1], grad)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full_like(Y, 5), r"labels must be in 0\.\.4"),
        (Y + 0.0, "labels must be integers"),
        (np.full_like(Y, -100), "at least one that is scored"),
        (Y[:1], r"labels\.shape"),
    ],
    ids=["range", "float", "none", "shape"],
)
def test_losses_reject_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(Z, labels, ignore=-100)


def test_losses_macro_f1_by_hand():
    y, p = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    # hits 1, 1, 0 of 2 + 2, 1 + 2 and 1 + 1; a fourth class never occurs
    np.testing.assert_allclose(macro_f1(y, p, num_classes=4), (2 / 4 + 2 / 3 + 0 + 0) / 4, rtol=1e-15)
    assert macro_f1(y, y, num_classes=3) == 1


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        (np.zeros(0, int), np.zeros(0, int), "at least one class"),
        (np.array([0, 2]), np.array([0, 1]), r"y must be in 0\.\.1"),
        (np.array([0, 1]), np.array([0.0, 1]), "p must be integers"),
    ],
    ids=["empty", "range", "float"],
)
def test_losses_reject_bad_classes(y, p, message):
    with pytest.raises(ValueError, match=message):
        macro_f1(y, p, num_classes=2)
