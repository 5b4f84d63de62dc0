"""Scores of captions against references: BLEU, ROUGE-L, CIDEr-D and METEOR without stems or synonyms.

Source: Papineni et al. 2002, Lin 2004, Vedantam et al. 2015, Banerjee and Lavie 2005; constants and choices
of the package pycocoevalcap (BLEU, ROUGE-L, CIDEr-D) and of nltk (METEOR). refs: a list of references for
every caption; hyps: the captions. Tokens are split at spaces.
"""

from collections import Counter

import numpy as np

from ref.checks import at_least_one

TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0 / 0


def bleu(refs, hyps, *, n=4):
    """[n]: BLEU-1 to BLEU-n of the corpus.

    The geometric mean of clipped n-gram precisions times exp(1 - r / c) if the captions (c tokens) are
    shorter than the references closest in length (r tokens; of two the shorter).
    Raises: ValueError if refs and hyps cannot be paired, or n < 1.
    """
    pairs = _pairs(refs, hyps, n)
    right, guessed = np.zeros(n), np.zeros(n)
    c = r = 0
    for hyp, group in pairs:
        c += len(hyp)
        r += min((abs(len(ref) - len(hyp)), len(ref)) for ref in group)[1]
        for k in range(n):
            most = Counter()
            for ref in group:
                most |= _ngrams(ref, k + 1)
            right[k] += sum((_ngrams(hyp, k + 1) & most).values())
            guessed[k] += max(len(hyp) - k, 0)
    score = np.cumprod((right + TINY) / (guessed + SMALL)) ** (1 / np.arange(1, n + 1))
    ratio = (c + TINY) / (r + SMALL)
    return score * (np.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def rouge_l(refs, hyps, *, beta=1.2):
    """Mean over captions of (1 + beta^2) P R / (R + beta^2 P); 0 for one that shares nothing.

    P and R: how much of caption and reference the longest common subsequence is, best over the references.
    """
    scores = []
    for hyp, group in _pairs(refs, hyps):
        common = [_longest_common(hyp, ref) for ref in group]
        p = max(common) / max(len(hyp), 1)
        r = max(l / max(len(ref), 1) for l, ref in zip(common, group, strict=True))
        scores.append((1 + beta**2) * p * r / (r + beta**2 * p) if p and r else 0.0)
    return float(np.mean(scores))


def cider(refs, hyps, *, n=4, sigma=6.0):
    """(mean, each [N]): CIDEr-D, ten times the mean over 1..n-grams of a clipped tf-idf cosine.

    idf from the references of this very set, ln(N / documents that hold it): with few captions most n-grams
    weigh next to nothing. A difference in length d (counted in pairs of words) costs exp(-d^2 / (2 sigma^2)).
    """
    pairs = _pairs(refs, hyps, n)
    held = Counter(g for _, group in pairs for g in set().union(*(_all_ngrams(ref, n) for ref in group)))

    def vectors(words):
        tf = _all_ngrams(words, n)
        found = [{} for _ in range(n)]
        for gram, count in tf.items():
            found[len(gram) - 1][gram] = count * (np.log(len(pairs)) - np.log(max(held[gram], 1)))
        norms = [np.sqrt(sum(w * w for w in v.values())) for v in found]
        return found, norms, sum(c for gram, c in tf.items() if len(gram) == 2)

    each = []
    for hyp, group in pairs:
        (h, h_norm, h_len), total = vectors(hyp), np.zeros(n)
        for ref in group:
            r, r_norm, r_len = vectors(ref)
            for k in range(n):
                dot = sum(min(w, r[k].get(g, 0.0)) * r[k].get(g, 0.0) for g, w in h[k].items())
                cosine = dot / (h_norm[k] * r_norm[k]) if h_norm[k] and r_norm[k] else dot
                total[k] += cosine * np.exp(-((h_len - r_len) ** 2) / (2 * sigma**2))
        each.append(10 * total.mean() / len(group))
    return float(np.mean(each)), np.array(each)


def meteor(refs, hyps, *, alpha=0.9, beta=3.0, gamma=0.5):
    """[N]: F (1 - gamma (chunks / m)^beta), F = P R / (alpha P + (1 - alpha) R), best over the references.

    From its last word to its first, each word of the caption takes the last equal word of the reference that
    is free: m matches, in chunks of neighbours on both sides. 0 without a match.
    """
    return np.array(
        [max(_meteor(hyp, ref, alpha, beta, gamma) for ref in group) for hyp, group in _pairs(refs, hyps)]
    )


def _meteor(hyp, ref, alpha, beta, gamma):
    free, matched = list(range(len(ref))), {}
    for i in reversed(range(len(hyp))):
        for j in reversed(free):
            if ref[j] == hyp[i]:
                matched[i] = j
                free.remove(j)
                break
    if not matched:
        return 0.0
    p, r = len(matched) / len(hyp), len(matched) / len(ref)
    chunks = sum(matched.get(i - 1, -2) != j - 1 for i, j in matched.items())
    return p * r / (alpha * p + (1 - alpha) * r) * (1 - gamma * (chunks / len(matched)) ** beta)


def _pairs(refs, hyps, n=1):
    """[(words of a caption, [words of its references])]."""
    at_least_one(n=n)
    if len(refs) != len(hyps) or not hyps:
        raise ValueError(f"refs and hyps must pair at least one caption, got {len(refs)} and {len(hyps)}")
    if any(isinstance(group, str) or not group for group in refs):
        raise ValueError("refs must hold a list of at least one reference for every caption")
    return [(h.split(), [ref.split() for ref in group]) for h, group in zip(hyps, refs, strict=True)]


def _ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _all_ngrams(words, n):
    return sum((_ngrams(words, k) for k in range(1, n + 1)), Counter())


def _longest_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        last = row
        row = [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(last[j + 1], row[j]))
    return row[-1]
