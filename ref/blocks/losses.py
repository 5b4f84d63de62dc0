"""Cross-entropy of class labels, with its gradient."""

import numpy as np

from ref.blocks.softmax import logsumexp
from ref.dims import dims, float64


def negative_log_likelihood(logits, labels):
    """logsumexp(logits) - logits[label] >= 0, in nats: logits [..., V], labels int [...] -> [...].

    Raises: ValueError for labels that are not integers in 0..V-1.
    """
    n = dims(logits=(logits, "... V"), labels=(labels, "..."))
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or (labels.size and not (0 <= labels.min() and labels.max() < n["V"])):
        raise ValueError(f"labels must be integers in 0..{n['V'] - 1}")
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
