"""How well two lists of numbers agree, and how often the nearest neighbours are of the right kind."""

import numpy as np

from ref.dims import dims, float64


def pearson(a, b):
    """Correlation of a and b, [n] each, n >= 2. Raises: ValueError if either is constant."""
    a, b = float64(a, b)
    if dims(a=(a, "n"), b=(b, "n"))["n"] < 2:
        raise ValueError(f"a and b need two numbers or more, got {len(a)}")
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    if size == 0:
        raise ValueError("a and b must not be constant: their correlation is not defined")
    return float(a @ b / size)


def spearman(a, b):
    """Correlation of the ranks of a and b, [n] each; equal numbers share their mean rank."""
    return pearson(ranks(a), ranks(b))


def ranks(x):
    """Rank of every number of x [n], from 0; equal ones get the mean of their places."""
    x = float64(x)
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[which]


def recall_at(vectors, labels, k):
    """Share of the rows whose k nearest other rows, by cosine, hold one of the same label.

    Args: vectors [n, d], labels [n] ints; rows whose label no other row has are not asked. 1 <= k < n.
    """
    n = dims(vectors=(vectors, "n d"), labels=(labels, "n"))["n"]
    if not 1 <= k < n:
        raise ValueError(f"k must be in 1..{n - 1}, got {k}")
    v = float64(vectors)
    v = v / np.sqrt((v * v).sum(axis=-1, keepdims=True))
    s = v @ v.T
    np.fill_diagonal(s, -np.inf)
    nearest = np.argsort(-s, axis=-1, kind="stable")[:, :k]
    labels = np.asarray(labels)
    asked = np.bincount(labels)[labels] > 1
    if not asked.any():
        raise ValueError("labels must hold one label twice or more")
    return float((labels[nearest] == labels[:, None]).any(axis=1)[asked].mean())


def kendall_tau(a, b):
    """Pairs of a and b, [n] each, in the same order less those in opposite, over what ties leave (tau-b)."""
    a, b = float64(a, b)
    if dims(a=(a, "n"), b=(b, "n"))["n"] < 2:
        raise ValueError(f"a and b need two numbers or more, got {len(a)}")
    i, j = np.triu_indices(len(a), 1)
    s, t = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    size = np.sqrt((s * s).sum() * (t * t).sum())
    if size == 0:
        raise ValueError("a and b must not be constant: their order is not defined")
    return float((s * t).sum() / size)
