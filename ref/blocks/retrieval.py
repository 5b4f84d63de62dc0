"""Finding documents by their terms: BM25, and the overlap of two texts in pairs of terms.

Source: Robertson and Zaragoza 2009 for BM25, with the floor for common terms of the package rank-bm25; Lin
2004 for ROUGE. A document is a list of hashable terms.
"""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ref.checks import at_least_one


class BM25Index(NamedTuple):
    """counts: a Counter a document; lengths [N]; idf {term: weight}."""

    counts: tuple[Counter, ...]
    lengths: np.ndarray
    idf: dict


def bm25_fit(corpus, *, epsilon=0.25) -> BM25Index:
    """Count terms: idf_t = ln(N - n_t + 0.5) - ln(n_t + 0.5), n_t of the N documents hold t.

    A term of more than half of the documents would count against them: it gets epsilon times the mean idf of
    the vocabulary instead. Raises: ValueError for a corpus without any term.
    """
    counts = tuple(Counter(_terms(doc)) for doc in corpus)
    if not any(counts):
        raise ValueError("corpus must hold at least one term")
    n = Counter(t for c in counts for t in c)
    idf = {t: np.log(len(counts) - k + 0.5) - np.log(k + 0.5) for t, k in n.items()}
    floor = epsilon * sum(idf.values()) / len(idf)
    idf = {t: floor if w < 0 else w for t, w in idf.items()}
    return BM25Index(counts, np.array([c.total() for c in counts], float), idf)


def bm25_scores(index: BM25Index, query, *, k1=1.5, b=0.75):
    """[N]: sum over the query's terms of idf f (k1 + 1) / (f + k1 (1 - b + b |D| / mean length)).

    A term asked twice counts twice; one that no document holds counts nothing.
    """
    norm = k1 * (1 - b + b * index.lengths / index.lengths.mean())
    scores = np.zeros(len(index.counts))
    for t in _terms(query):
        f = np.array([c[t] for c in index.counts], float)
        scores += index.idf.get(t, 0.0) * np.divide(f * (k1 + 1), f + norm, out=np.zeros_like(f), where=f > 0)
    return scores


def bm25(corpus, query, *, k1=1.5, b=0.75, epsilon=0.25):
    """`bm25_scores` of a corpus that is asked once."""
    return bm25_scores(bm25_fit(corpus, epsilon=epsilon), query, k1=k1, b=b)


def rouge2(hypotheses, reference):
    """[n, 2], precision and recall of each hypothesis against the reference, by unique pairs of neighbours.

    Texts of fewer than two terms share no pair: 0.
    """
    pairs = lambda text: set(pairwise(text))
    want, out = pairs(_terms(reference)), np.zeros((len(hypotheses), 2))
    for n, hypothesis in enumerate(hypotheses):
        said = pairs(_terms(hypothesis))
        out[n] = [len(said & want) / len(x) if x else 0.0 for x in (said, want)]
    return out


def mrr(ranked, relevant):
    """Mean over queries of 1 / rank of the first relevant id, 0 if there is none: lists, best first."""
    first = lambda ids, good: next((1 / (n + 1) for n, i in enumerate(ids) if i in good), 0.0)
    return _mean(ranked, relevant, first)


def map_at(ranked, relevant, *, k):
    """Mean over queries of the sum of i / r_i over relevant ranks r_i <= k, divided by all the relevant."""
    at_least_one(k=k)

    def average(ids, good):
        ranks = [n + 1 for n, i in enumerate(ids[:k]) if i in good]
        return sum((i + 1) / r for i, r in enumerate(ranks)) / len(good) if good else 0.0

    return _mean(ranked, relevant, average)


def hit_at(ranked, relevant, *, k):
    """Share of the queries with a relevant id among the first k."""
    at_least_one(k=k)
    return _mean(ranked, relevant, lambda ids, good: float(bool(good & set(ids[:k]))))


def _terms(text):
    """A list of terms; arrays of ids become Python integers, so that they equal those of lists."""
    return text.tolist() if isinstance(text, np.ndarray) else list(text)


def _mean(ranked, relevant, score):
    if not len(ranked) or len(ranked) != len(relevant):
        raise ValueError(f"ranked and relevant need one list a query, got {len(ranked)} and {len(relevant)}")
    pairs = zip(ranked, relevant, strict=True)
    return float(np.mean([score(_terms(ids), set(_terms(good))) for ids, good in pairs]))
