"""Which words are a user's own: tf-idf over the users' documents."""

import re
from collections import Counter

import numpy as np

from ref.dims import dims


def user_tfidf(docs, *, smooth=True, norm="l2"):
    """(weights [U, W], vocab): tf-idf of the users' documents, one string each; vocab sorted.

    Tokens: two or more word characters, lower case. tf counts; idf = ln((1 + U) / (1 + df)) + 1, or with
    smooth=False ln(U / df) + 1. norm "l2": rows of length 1; None: as they are.
    Raises: ValueError for no document, or another norm.
    """
    if norm not in ("l2", None):
        raise ValueError(f'norm must be "l2" or None, got {norm!r}')
    if not docs:
        raise ValueError("docs must hold at least one document")
    counts = [Counter(re.findall(r"\b\w\w+\b", doc.lower())) for doc in docs]
    vocab = sorted(set().union(*counts))
    tf = np.array([[c[w] for w in vocab] for c in counts], float).reshape(len(docs), len(vocab))
    df = (tf > 0).sum(axis=0)
    weights = tf * (np.log((smooth + len(docs)) / (smooth + df)) + 1)
    length = np.linalg.norm(weights, axis=1, keepdims=True)
    return (weights / np.where(length > 0, length, 1.0) if norm == "l2" else weights), vocab


def user_words(weights, vocab, k):
    """The k words of highest weight of every user, ties by the alphabet; words of weight 0 never."""
    dims(weights=(weights, f"U {len(vocab)}"))
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    best = lambda row: sorted((w for w in range(len(vocab)) if row[w] > 0), key=lambda w: (-row[w], vocab[w]))
    return [[vocab[w] for w in best(row)[:k]] for row in weights]
