"""What a classifier is trained and judged by: cross-entropy with its gradient, of logits and of a linear head
by chunks of rows, and macro-F1.
"""

import numpy as np

from ref.blocks.softmax import logsumexp
from ref.checks import at_least_one, check_ids
from ref.dims import dims, float64

LOGITS = 1 << 27  # held at a time by a linear head, if nothing else is said: half a gigabyte in float32


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
    scored = _is_scored(labels, ignore)
    rows, picked = float64(logits)[scored], np.asarray(labels)[scored]
    nll = negative_log_likelihood(rows, picked)
    grad = np.zeros_like(float64(logits))
    p = np.exp(rows - logsumexp(rows)[:, None])
    p[np.arange(len(picked)), picked] -= 1
    grad[scored] = p / len(picked)
    return nll.mean(), grad


def linear_cross_entropy(x, w, labels, *, ignore=None, chunk=None):
    """Mean of -log softmax(x w^T)[label], nats, never holding more than `chunk` rows of logits.

    Args: x [..., d], w [V, d], labels int [...]. ignore: the label of what is not scored, whatever its x.
      chunk: rows at a time, None for as many as have 2^27 logits; it changes the rounding, never the result.
    Raises: ValueError if nothing is scored, for another label outside 0..V-1, or chunk < 1.
    """
    x, w, labels, _ = _rows(x, w, labels, ignore)
    total = 0.0
    for part in _parts(x, w, chunk):
        total += negative_log_likelihood(x[part] @ w.T, labels[part]).sum()
    return total / len(x)


def linear_cross_entropy_vjp(x, w, labels, dloss=1.0, *, ignore=None, chunk=None):
    """(dx, dw) of `linear_cross_entropy`, float64; dx is 0 where nothing is scored."""
    dx, dw = np.zeros(np.shape(x)), np.zeros(np.shape(w))
    x, w, labels, scored = _rows(x, w, labels, ignore)
    rows = np.zeros_like(x)
    for part in _parts(x, w, chunk):
        _, dlogits = cross_entropy(x[part] @ w.T, labels[part])  # of a mean over the chunk
        dlogits *= dloss * len(dlogits) / len(x)
        rows[part] = dlogits @ w
        dw += dlogits.T @ x[part]
    dx[scored] = rows
    return dx, dw


def rows_at_a_time(V, chunk):
    """chunk, or if that is None as many rows of V logits as are held by default. ValueError if chunk < 1."""
    if chunk is None:
        return max(1, LOGITS // max(V, 1))
    at_least_one(chunk=chunk)
    return chunk


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


def _is_scored(labels, ignore):
    """bool [...]; ValueError if nothing is."""
    scored = np.ones(np.shape(labels), bool) if ignore is None else np.asarray(labels) != ignore
    if not scored.any():
        raise ValueError("labels must hold at least one that is scored")
    return scored


def _rows(x, w, labels, ignore):
    """(rows of x, w, their labels, bool [...]) of what is scored."""
    dims(x=(x, "... d"), w=(w, "V d"), labels=(labels, "..."))
    scored = _is_scored(labels, ignore)
    return float64(x)[scored], float64(w), check_ids("labels", np.asarray(labels)[scored], len(w)), scored


def _parts(x, w, chunk):
    step = rows_at_a_time(len(w), chunk)
    return [slice(i, i + step) for i in range(0, len(x), step)]
