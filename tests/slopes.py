"""Hand-written gradients against central differences along one direction. NumPy alone: laws use it."""

import numpy as np

from ref.blocks.optim import tree_leaves, tree_map

EPS = np.finfo(np.float64).eps


def slope_of(f, h=1e-5):
    """(slope of f at 0, by how much doubling the step moves it: three times its truncation)."""
    near, far = ((f(s) - f(-s)) / (2 * s) for s in (h, 2 * h))
    return near, abs(near - far)


def kinked_slope(f, h=1e-5, ulps=100):
    """(slope of f at 0, bound on its error), where a ReLU may turn within the step.

    Doubling h bounds truncation; ulps eps |f| / h is rounding, of sums whose terms are larger than f; where a
    ReLU turns within h, the slopes to either side differ by twice the error.
    """
    at = {s: f(s * h) for s in (-2, -1, 0, 1, 2)}
    near, far = (at[1] - at[-1]) / (2 * h), (at[2] - at[-2]) / (4 * h)
    turn = abs(at[1] - 2 * at[0] + at[-1]) / h
    return near, 2 * abs(near - far) + turn + ulps * EPS * (1 + abs(at[0])) / h


def along(a, b):
    """<a, b> over all arrays of two equal trees."""
    return sum(np.sum(x * y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def drawn_like(tree, rng):
    """A tree of normal numbers like the given one."""
    return tree_map(lambda x: rng.standard_normal(np.shape(x)), tree)


def moved(tree, direction, h):
    """tree + h direction."""
    return tree_map(lambda x, d: x + h * d, tree, direction)


def agrees(gradient, f, at, rng=None, *, direction=None, h=1e-5):
    """<gradient, direction> is the slope of f at an array, within its change under doubling the step."""
    direction = rng.standard_normal(at.shape) if direction is None else direction
    slope, change = slope_of(lambda s: f(at + s * direction), h)
    size = abs(f(at)) + np.abs(gradient * direction).sum()
    # rounding of f over the step; the step's own error is quartered when it is halved
    atol = 2 * change + 256 * EPS * size / h
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=0, atol=atol)


def check_slope(f, tree, grads, seed=0, h=1e-4):
    """<grads, direction> is the slope of a smooth f, whose own error is what halving the step changes.

    One Richardson step makes the truncation of order h^4; sums of magnitudes near 1 cancel to eps / h.
    """
    d = drawn_like(tree, np.random.default_rng(seed))
    at = lambda s: f(moved(tree, d, s))
    fine, coarse = ((at(s) - at(-s)) / (2 * s) for s in (h, 2 * h))
    room = abs(fine - coarse) / 3 + 64 * EPS / h * max(1.0, abs(at(0.0)))
    np.testing.assert_allclose(along(grads, d), fine + (fine - coarse) / 3, rtol=0, atol=room)


def check_kinked_slope(f, tree, grads, rng, h=1e-6, ulps=100):
    """<grads, direction> is the slope of f at the tree, within the error of `kinked_slope`."""
    d = drawn_like(tree, rng)
    slope, atol = kinked_slope(lambda s: f(moved(tree, d, s)), h, ulps)
    np.testing.assert_allclose(along(grads, d), slope, rtol=0, atol=atol)
