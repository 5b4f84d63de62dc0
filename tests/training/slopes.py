"""A gradient tree against a central difference along a drawn direction, where a ReLU may turn on the way."""

import numpy as np

from ref.blocks.optim import tree_leaves, tree_map

EPS = np.finfo(np.float64).eps


def check_slope(fn, tree, grads, rng, h=1e-6):
    """<grads, direction> equals the central difference of fn at tree, within what that may be off by.

    Doubling h shows the truncation; sums of magnitudes up to a hundred times fn's cancel to eps / h; where a
    ReLU turns within h, the slopes to either side differ by twice the error.
    """
    step = tree_map(lambda x: rng.standard_normal(np.shape(x)), tree)
    at = {n: fn(tree_map(lambda x, d, n=n: x + n * h * d, tree, step)) for n in (-2, -1, 0, 1, 2)}
    near, far = (at[1] - at[-1]) / (2 * h), (at[2] - at[-2]) / (4 * h)
    turn = abs(at[1] - 2 * at[0] + at[-1]) / h
    got = sum(np.sum(g * d) for g, d in zip(tree_leaves(grads), tree_leaves(step), strict=True))
    atol = 2 * abs(near - far) + turn + 100 * EPS * (1 + abs(at[0])) / h
    np.testing.assert_allclose(got, near, rtol=0, atol=atol)
