"""Laws of WTA-CRS on ref alone: NumPy and Hypothesis."""

from itertools import product
from types import SimpleNamespace

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ref.training.wta_crs import (
    GradNormCache,
    approx_matmul,
    block_activation_bytes,
    estimator_variance,
    row_budget,
    row_probabilities,
    stored_bytes,
    winner_count,
    winner_mask,
    wta_indices,
    wta_linear,
    wta_linear_vjp,
    wta_rows,
    wta_sample,
    wta_scale,
    wta_weight_grad,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
spreads = st.sampled_from((0.0, 1.0, 3.0))  # equal, uneven and concentrated rows


def pairs(seed, M, spread):
    """x [3, M] and y [M, 4] whose rows differ in size by exp(spread * normal)."""
    rng = np.random.default_rng(seed)
    size = np.exp(spread * rng.standard_normal(M))
    return rng.standard_normal((3, M)), size[:, None] * rng.standard_normal((M, 4))


def estimate(x, y, p, idx, c):
    return wta_weight_grad(x.T, wta_rows(y, p, np.array(idx), c=c), np.array(idx))


def enumerated(x, y, p, k, c):
    """(mean, variance) of the estimate over every possible run of k - c draws, each with its probability."""
    M, top = len(p), list(np.argsort(-p, kind="stable")[:c])
    rest = [j for j in range(M) if j not in top]
    q = p / p[rest].sum()
    mean, square = 0.0, 0.0
    for draws in product(rest, repeat=k - c):
        chance = np.prod(q[list(draws)])
        g = estimate(x, y, p, top + list(draws), c)
        mean, square = mean + chance * g, square + chance * ((g - x @ y) ** 2).sum()
    return mean, square


@given(seeds, spreads, st.sampled_from(((4, 3, 0), (4, 3, 1), (5, 3, 2), (5, 2, 1), (6, 2, 0))))
def law_wta_crs_is_unbiased_with_the_stated_variance(seed, spread, sizes):
    """Exact, by enumeration, also with probabilities that know nothing of x (stale norms)."""
    M, k, c = sizes
    x, y = pairs(seed, M, spread)
    for p in (row_probabilities(y, np.linalg.norm(x, axis=0)), row_probabilities(y)):
        mean, variance = enumerated(x, y, p, k, c)
        scale = max(1.0, (np.abs(x) @ np.abs(y)).max())
        # M^k terms, each of size |x||y| / p weighted by p
        np.testing.assert_allclose(mean, x @ y, rtol=0, atol=M**k * 8 * EPS * scale)
        power = ((x**2).sum(axis=0) * (y**2).sum(axis=1) / p).sum()
        closed = estimator_variance(x, y, p, k=k, c=c)
        np.testing.assert_allclose(closed, variance, rtol=1e-10, atol=256 * EPS * power)


@given(seeds, spreads, st.integers(2, 6))
def law_wta_crs_variance_is_below_crs(seed, spread, k):
    """Var(wta) <= (1 - P_C) k / (k - c) Var(crs) for any p and any c; equal at c = 0."""
    x, y = pairs(seed, 8, spread)
    p = np.random.default_rng(seed + 1).dirichlet(np.ones(8)) + 1e-6
    p /= p.sum()
    crs = estimator_variance(x, y, p, k=k, c=0)
    power = ((x**2).sum(axis=0) * (y**2).sum(axis=1) / p).sum()
    for c in range(k):
        mass = np.sort(p)[::-1][:c].sum()
        bound = (1 - mass) * k / (k - c) * crs
        assert estimator_variance(x, y, p, k=k, c=c) <= bound * (1 + 1e-9) + 64 * EPS * power


@given(seeds)
def law_wta_crs_many_draws_average_to_the_product(seed):
    """400 draws: every entry within 5 standard errors of the product."""
    x, y = pairs(seed, 12, 1.0)
    p, rng = row_probabilities(y, np.linalg.norm(x, axis=0)), np.random.default_rng(seed)
    c = winner_count(p, k=4)
    runs = np.stack([estimate(x, y, p, wta_indices(p, rng.random(4), c=c), c) for _ in range(400)])
    error = np.abs(runs.mean(axis=0) - x @ y)
    # an entry of 12 is off by 5 errors of its mean in about one run of 100,000
    assert (error <= 5 * runs.std(axis=0) / np.sqrt(400) + 1e-9).all()


@given(seeds, st.integers(1, 12), spreads)
@example(seed=0, k=12, spread=0.0)
def law_wta_crs_winner_count_is_the_least_factor(seed, k, spread):
    p = np.exp(spread * np.random.default_rng(seed).standard_normal(12))
    p /= p.sum()
    c, mass = winner_count(p, k=k), np.cumsum(np.sort(p)[::-1])
    if (mass[:k] >= 1 - 1e-12).any():
        assert mass[c - 1] >= 1 - 1e-12
        assert c == 1 or mass[c - 2] < 1 - 1e-12
        return
    factors = [(1 - (mass[i - 1] if i else 0.0)) / (k - i) for i in range(k)]
    assert c < k
    assert factors[c] <= min(factors) * (1 + 1e-12)
    mask = winner_mask(p, c=c)
    assert mask.sum() == c
    assert p[mask].min(initial=np.inf) >= p[~mask].max(initial=0)


@given(seeds, spreads, st.integers(1, 9))
def law_wta_crs_winners_are_certain_and_never_drawn(seed, spread, k):
    _, y = pairs(seed, 9, spread)
    p = row_probabilities(y)
    idx, c = wta_sample(np.random.default_rng(seed), p, k=k)
    assert idx.dtype == np.int32
    assert len(idx) == k
    np.testing.assert_array_equal(np.sort(idx[:c]), np.flatnonzero(winner_mask(p, c=c)))
    assert (np.diff(p[idx[:c]]) <= 0).all()
    assert not set(idx[:c]) & set(idx[c:])
    np.testing.assert_array_equal(wta_scale(p, idx, c=c)[:c], 1.0)


@given(seeds)
def law_wta_crs_inverse_cdf_draws_in_proportion(seed):
    """A fine grid of uniforms hits every row of the tail in proportion to its q, to one cell of the grid."""
    p = np.random.default_rng(seed).dirichlet(np.ones(6))
    c, n = 2, 4000
    rank = np.argsort(-p)
    hits = np.array([wta_indices(p, np.full(3, (i + 0.5) / n), c=c)[c] for i in range(0, n, 20)])
    q = np.where(winner_mask(p, c=c), 0, p)
    q /= q.sum()
    share = np.bincount(hits, minlength=6) / len(hits)
    assert np.abs(share - q).max() <= 2 * 20 / n
    assert not share[rank[:c]].any()
    for end in (0.0, np.nextafter(1.0, 0.0)):
        assert q[wta_indices(p, np.full(4, end), c=c)[c:]].min() > 0


@given(seeds, spreads)
def law_wta_crs_special_cases_are_exact(seed, spread):
    x, y = pairs(seed, 7, spread)
    u = np.random.default_rng(seed).random(7)
    atol = 64 * EPS * (np.abs(x) @ np.abs(y)).max()
    np.testing.assert_allclose(approx_matmul(x, y, u, k=7), x @ y, rtol=0, atol=atol)  # k = M
    np.testing.assert_allclose(approx_matmul(x, y, u, k=7, method="topk"), x @ y, rtol=0, atol=atol)
    one = np.zeros(7)
    one[3] = 1.0  # one row has all the mass: it is taken, the draw beside it weighs nothing
    assert winner_count(one, k=2) == 1
    np.testing.assert_allclose(
        estimate(x, y, one, wta_indices(one, u[:2], c=1), 1), np.outer(x[:, 3], y[3]), rtol=0, atol=atol
    )
    p = np.random.default_rng(seed).dirichlet(np.ones(7)) + 1e-3
    p /= p.sum()
    a = np.random.default_rng(seed + 1).standard_normal(4)
    assert estimator_variance(x, y, p, k=7, c=7) == 0  # nothing is drawn
    same = p[:, None] * a  # every pair is p_i times the same matrix: no variance
    ones = np.ones((3, 7))
    power = (3 * (same**2).sum(axis=1) / p).sum()
    assert abs(estimator_variance(ones, same, p, k=3, c=1)) <= 64 * EPS * power


@given(seeds)
def law_wta_crs_topk_is_biased_and_uniform_is_not(seed):
    """The mean over all draws of "uniform" is the product; "topk" has no draws and misses the tail."""
    x, y = pairs(seed, 5, 1.0)
    runs = [approx_matmul(x, y, np.array([(i + 0.5) / 5]), k=1, method="uniform") for i in range(5)]
    atol = 256 * EPS * (np.abs(x) @ np.abs(y)).max()
    np.testing.assert_allclose(np.mean(runs, axis=0), x @ y, rtol=0, atol=atol)
    top = winner_mask(row_probabilities(y, np.linalg.norm(x, axis=0)), c=2)
    got = approx_matmul(x, y, np.zeros(2), k=2, method="topk")
    np.testing.assert_allclose(got, x[:, top] @ y[top], rtol=0, atol=atol)


@given(seeds, st.booleans())
def law_wta_crs_layer_is_exact_but_for_the_weight_gradient(seed, bias):
    rng = np.random.default_rng(seed)
    h, w, g = rng.standard_normal((2, 6, 5)), rng.standard_normal((3, 5)), rng.standard_normal((2, 6, 3))
    b = rng.standard_normal(3) if bias else None
    norms, options = np.ones((2, 6)), {"ratio": 0.5, "minimal_k": 2}
    u = rng.random(row_budget(12, **options))
    z = wta_linear(h, w, b, norms, u, **options)
    np.testing.assert_array_equal(z, h @ w.T + (b if bias else 0))
    dh, dw, db, new = wta_linear_vjp(h, w, b, norms, u, g, **options)
    np.testing.assert_array_equal(dh, g @ w)
    assert (db is None) == (not bias)
    if bias:
        np.testing.assert_allclose(db, g.sum(axis=(0, 1)), rtol=0, atol=16 * EPS * np.abs(g).sum())
    np.testing.assert_allclose(new, np.sqrt((g**2).sum(axis=-1)), rtol=4 * EPS)
    rows, p = h.reshape(-1, 5), row_probabilities(h.reshape(-1, 5), np.ones(12))
    c = winner_count(p, k=6)
    idx = wta_indices(p, u, c=c)
    want = sum(
        s * np.outer(g.reshape(-1, 3)[i], rows[i]) for i, s in zip(idx, wta_scale(p, idx, c=c), strict=True)
    )
    np.testing.assert_allclose(dw, want, rtol=0, atol=64 * EPS * np.abs(want).max(initial=1))
    # all rows stored: the exact gradient, by the definition
    exact = wta_linear_vjp(h, w, b, norms, rng.random(12), g, ratio=1.0)[1]
    want = np.einsum("bto,bti->oi", g, h)
    np.testing.assert_allclose(exact, want, rtol=0, atol=64 * EPS * np.abs(want).max(initial=1))


@given(seeds)
def law_wta_crs_probabilities_ignore_the_scale_of_rows(seed):
    _, y = pairs(seed, 8, 1.0)
    p = row_probabilities(y)
    assert abs(p.sum() - 1) <= 8 * EPS
    # with S the sum of the norms, eps a row moves p by at most (1 + M p) eps / S
    atol = 9e-8 / np.linalg.norm(y, axis=1).sum() + 8 * EPS
    np.testing.assert_allclose(row_probabilities(10 * y), p, rtol=0, atol=atol)
    np.testing.assert_array_equal(row_probabilities(0 * y), np.full(8, 1 / 8))


def law_wta_crs_cache_keeps_norms_by_sample():
    cache = GradNormCache(4, 3)
    np.testing.assert_array_equal(cache.lookup(np.array([2, 0])), np.ones((2, 3)))
    new = cache.update(np.array([2, 0]), np.array([[1.0, 2, 3], [1 + 2**-9, 5, 6]]))
    np.testing.assert_array_equal(new.lookup(np.array([0, 2])), [[1, 5, 6], [1, 2, 3]])  # bfloat16
    np.testing.assert_array_equal(new.lookup(np.array([1])), np.ones((1, 3)))
    np.testing.assert_array_equal(cache.norms, np.ones((4, 3)))  # the old one is untouched


@given(st.integers(1, 400), st.sampled_from((0.1, 0.3, 1.0)))
def law_wta_crs_bytes_are_those_of_the_arrays(rows, ratio):
    k = row_budget(rows, ratio=ratio)
    assert min(10, rows) <= k <= rows
    saved, idx = np.zeros((k, 16), np.float32), np.zeros(k, np.int32)
    assert stored_bytes(rows, 16, k=k) == saved.nbytes + (idx.nbytes if k < rows else 0)
    t5 = SimpleNamespace(tokens=rows, dim=16, hidden=64, num_heads=2)
    exact, sampled = (block_activation_bytes(t5, batch=2, ratio=r) for r in (1, ratio))
    assert set(exact) == set(sampled)
    linear = {"qkv", "out", "fc1", "fc2"}
    assert all(exact[op] == sampled[op] for op in exact if op not in linear | {"relu"})
    # x, three linear inputs, q, k, v and the second norm's input; the map; the hidden layer
    assert sum(exact.values()) == 4 * (2 * rows * 16 * 8 + 2 * 2 * rows**2 + 2 * rows * 64)
