"""The exercises of the chapter on WTA-CRS: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:estimate]
import numpy as np


def estimate(x, y, p, winners, draws):
    """x y from few of its pairs: x [n, M], y [M, m], p [M]; winners are indices taken for
    certain, draws come from the others with chances in proportion to p. As it
    stands every draw is divided by its whole chance, as if there were no winners.
    """
    sure = x[:, winners] @ y[winners]
    return sure + (x[:, draws] / p[draws]) @ y[draws] / len(draws)
    # --8<-- [end:estimate]


# --8<-- [start:solve_estimate]
def solve_estimate(x, y, p, winners, draws):
    tail = 1 - p[winners].sum()
    sure = x[:, winners] @ y[winners]
    return sure + tail * (x[:, draws] / p[draws]) @ y[draws] / len(draws)
    # --8<-- [end:solve_estimate]


def check_estimate(estimate):
    """The mean over all possible draws is the product."""
    rng = np.random.default_rng(0)
    for c in (0, 1, 3):
        x, y, p = rng.standard_normal((2, 6)), rng.standard_normal((6, 3)), rng.dirichlet(np.ones(6))
        order = np.argsort(-p)
        winners, others = order[:c], order[c:]
        q = p[others] / p[others].sum()
        mean = sum(q[i] * estimate(x, y, p, winners, others[i : i + 1]) for i in range(6 - c))
        assert np.shape(mean) == (2, 3), f"the estimate has shape {np.shape(mean)}, not (2, 3)"
        off = np.abs(mean - x @ y).max()
        assert off < 1e-12, f"with {c} winners the mean of all draws is off by {off:.3f}"


# --8<-- [start:winners]
def winners(p, k):
    """How many of k < M rows are taken for certain: the c in 0 .. k-1 with the least
    (1 - P_c) / (k - c), P_c the sum of the c largest p. As it stands half of them.
    """
    return k // 2
    # --8<-- [end:winners]


# --8<-- [start:solve_winners]
def solve_winners(p, k):
    top = sorted(p, reverse=True)
    factor = [(1 - sum(top[:c])) / (k - c) for c in range(k)]
    return factor.index(min(factor))
    # --8<-- [end:solve_winners]


def check_winners(winners):
    """The library's count, for flat and for steep chances."""
    from ref.training.wta_crs import winner_count

    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 3.0):
        for k in (3, 6):
            p = np.exp(spread * rng.standard_normal(20))
            p /= p.sum()
            got, want = winners(p.copy(), k), winner_count(p, k=k)
            assert got == want, f"{k = }, largest chance {p.max():.2f}: {want} winners, not {got}"


# --8<-- [start:chances]
def chances(x, y):
    """The chances [M] with which drawing pairs x[:, i] y[i] has the least variance. As
    it stands all are equal.
    """
    M = len(y)
    return [1 / M] * M
    # --8<-- [end:chances]


# --8<-- [start:solve_chances]
def solve_chances(x, y):
    n = (x**2).sum(axis=0) ** 0.5 * (y**2).sum(axis=1) ** 0.5
    return n / n.sum()
    # --8<-- [end:solve_chances]


def check_chances(chances):
    """No other chances have a smaller variance."""
    from ref.training.wta_crs import estimator_variance

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 8)) * np.exp(rng.standard_normal(8)), rng.standard_normal((8, 4))
    p = np.asarray(chances(x, y), float)
    assert p.shape == (8,), f"the chances have shape {p.shape}, not (8,)"
    assert abs(p.sum() - 1) < 1e-9, f"the chances sum to {p.sum():.3f}"
    assert (p > 0).all(), "a pair that is never drawn makes a bias"
    mine = estimator_variance(x, y, p, k=4, c=0)
    for _ in range(200):
        other = p * np.exp(0.3 * rng.standard_normal(8))
        other = estimator_variance(x, y, other / other.sum(), k=4, c=0)
        assert other >= mine * (1 - 1e-9), f"other chances have the variance {other:.3f}, these {mine:.3f}"
