"""K-means by Lloyd's iteration.

Source: Lloyd 1982; starts drawn as in Arthur and Vassilvitskii 2007 (k-means++). An empty cluster takes over
the point that is farthest from its centre, as scikit-learn's does.
"""

import numpy as np

from ref.dims import dims, float64


def kmeans(x, *, k, init=None, iters=100, tol=0.0, seed=0):
    """(centers [k, d], labels int [n], inertia): points x [n, d] in k groups, each around its mean.

    Args: init [k, d]: the first centres; None draws them by k-means++ with `seed`. iters: the most rounds.
      tol: stop when the centres move, in squares summed, at most tol times the mean variance of a coordinate.
    Returns: labels of the nearest of the returned centres (equal distances: the first), inertia the sum of
      squared distances to them. It ends when no label changes.
    Raises: ValueError for k outside 1..n, points that are not finite, or another shape of init.
    """
    n = dims(x=(x, "n d"))["n"]
    x = float64(x)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the number of points, got {k}")
    if not np.isfinite(x).all() or iters < 1:
        raise ValueError(f"x must be finite and iters at least 1, got {iters=}")
    if init is not None:
        dims(x=(x, "n d"), init=(init, f"{k} d"))
    centers = _spread(x, k, seed) if init is None else float64(init)
    labels, limit = None, tol * x.var(axis=0).mean()
    for _ in range(iters):
        before, (labels, gaps) = labels, _nearest(x, centers)
        moved = _means(x, labels, gaps, centers)
        shift, centers = ((moved - centers) ** 2).sum(), moved
        if before is not None and (labels == before).all():
            break
        if shift <= limit:
            break
    labels, gaps = _nearest(x, centers)
    return centers, labels, gaps.sum()


def _nearest(x, centers):
    """(label, squared distance) of every point."""
    d = ((x[:, None] - centers) ** 2).sum(axis=-1)
    labels = d.argmin(axis=1)
    return labels, d[np.arange(len(x)), labels]


def _means(x, labels, gaps, centers):
    """The mean of every cluster; the points farthest from their centres fill the empty ones."""
    k = len(centers)
    empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
    labels = labels.copy()
    labels[np.argsort(-gaps, kind="stable")[: len(empty)]] = empty
    count, total = np.bincount(labels, minlength=k), np.zeros_like(centers)
    np.add.at(total, labels, x)
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], centers)


def _spread(x, k, seed):
    """k points of x: the first at random, each next with a chance in proportion to its squared distance."""
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(x)))]
    while len(chosen) < k:
        gaps = _nearest(x, x[chosen])[1]
        left = np.setdiff1d(np.arange(len(x)), chosen)
        p = gaps / gaps.sum() if gaps.any() else np.isin(np.arange(len(x)), left) / len(left)
        chosen.append(int(rng.choice(len(x), p=p)))
    return x[chosen]
