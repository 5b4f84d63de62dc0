"""What a classifier is trained and judged by: cross-entropy with its gradient, and macro-F1."""

import numpy as np

from ref.blocks.softmax import logsumexp
from ref.checks import check_ids
from ref.dims import dims, float64


def negative_log_likelihood(logits, labels):
    """logsumexp(logits) - logits[label] >= 0, in nats: logits [..., V], labels int [...] -> [...].

    Raises: ValueError for labels that are not integers in 0..V-1.
    """
    n = dims(logits=(logits, "... V"), labels=(labels, "..."))
    labels = check_ids("labels", labels, n["V"])
    logits = float64(logits)
    own = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return logsumexp(logits) - own


def cross_entropy(logits, labels, *, ignore=None):
    """(mean of -log softmax(logits)[label], its gradient): logits [..., V], labels int [...].

    ignore: the label of what is not scored; its gradient is 0, whatever its logits.
    Raises: ValueError if nothing is scored, or as `negative_log_likelihood`.
    """
    dims(logits=(logits, "... V"), labels=(labels, "..."))
    labels = np.asarray(labels)
    scored = np.ones(labels.shape, bool) if ignore is None else labels != ignore
    if not scored.any():
        raise ValueError("labels must hold at least one that is scored")
    rows, picked = float64(logits)[scored], labels[scored]
    nll = negative_log_likelihood(rows, picked)
    grad = np.zeros_like(float64(logits))
    p = np.exp(rows - logsumexp(rows)[:, None])
    p[np.arange(len(picked)), picked] -= 1
    grad[scored] = p / len(picked)
    return nll.mean(), grad


def macro_f1(y, p, *, num_classes):
    """Mean over classes of 2 P R / (P + R) = 2 hits / (true + predicted); 0 for a class that never occurs.

    Args: y, p int [n]: true and predicted classes in 0..num_classes-1, n >= 1.
    Raises: ValueError for an empty list or another class.
    """
    y, p = np.asarray(y), np.asarray(p)
    if dims(y=(y, "n"), p=(p, "n"))["n"] < 1:
        raise ValueError("y must hold at least one class")
    for name, x in (("y", y), ("p", p)):
        check_ids(name, x, num_classes)
    count = lambda x: np.bincount(x, minlength=num_classes)
    hits, total = count(y[y == p]), count(y) + count(p)
    return float(np.mean(2 * hits / np.where(total == 0, 1, total)))
