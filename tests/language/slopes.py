"""A gradient tree against a central difference, along one drawn direction of the whole tree."""

import numpy as np

from ref.blocks.optim import tree_leaves, tree_map


def check_slope(f, tree, grads, seed=0, h=1e-4):
    """<grads, direction> equals the slope of f, whose own error is what halving the step changes.

    One Richardson step makes the truncation of order h^4; sums of magnitudes near 1 cancel to eps / h.
    """
    rng = np.random.default_rng(seed)
    d = tree_map(lambda x: rng.standard_normal(np.shape(x)), tree)
    at = lambda s: f(tree_map(lambda x, d: x + s * d, tree, d))
    slope = lambda s: (at(s) - at(-s)) / (2 * s)
    fine, coarse = slope(h), slope(2 * h)
    best = fine + (fine - coarse) / 3
    got = sum(np.sum(g * x) for g, x in zip(tree_leaves(grads), tree_leaves(d), strict=True))
    room = abs(fine - coarse) / 3 + 64 * np.finfo(np.float64).eps / h * max(1.0, abs(at(0.0)))
    np.testing.assert_allclose(got, best, rtol=0, atol=room)
