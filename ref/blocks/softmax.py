"""Softmax, and the state that lets it be taken piece by piece.

The state of a set of keys is (m, l, acc): the largest logit, the sum of exp(logit - m), and the same sum
weighted by the values. States of disjoint sets merge, in any order and any bracketing, to the state of their
union; attention is `finalize` of the merge. Source: Milakov and Gimelshein 2018 (the running pair m, l); Dao
et al. 2022, section 3.1.
"""

from typing import NamedTuple

import numpy as np

from ref.dims import dims, float64


class SoftmaxState(NamedTuple):
    """State of a softmax-weighted sum over some keys: m, l [...], acc [..., Dv]; (-inf, 0, 0) for no keys."""

    m: np.ndarray
    l: np.ndarray
    acc: np.ndarray


def softmax(logits, *, axis=-1):
    """exp(logits) / sum(exp(logits)) along `axis`; a slice that is all -inf gives zeros.

    Args: logits, real, any shape.
    Returns: the same shape, float64.
    """
    logits = float64(logits)
    p = np.exp(logits - _shift(logits.max(axis=axis, keepdims=True)))
    total = p.sum(axis=axis, keepdims=True)
    return p / np.where(total == 0, 1.0, total)


def softmax_vjp(p, dp, *, axis=-1):
    """p * (dp - sum(dp * p)): the gradient for the logits, from the probabilities and their cotangent."""
    return p * (dp - np.sum(dp * p, axis=axis, keepdims=True))


def logsumexp(logits, *, axis=-1):
    """log(sum(exp(logits))) along `axis`, in natural log; -inf where every logit is -inf."""
    logits = float64(logits)
    m = logits.max(axis=axis, keepdims=True)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the answer for an empty slice
        return (np.log(np.exp(logits - _shift(m)).sum(axis=axis, keepdims=True)) + _shift(m)).squeeze(axis)


def log_softmax(logits):
    """logits - logsumexp(logits) over the last axis, float64."""
    logits = float64(logits)
    return logits - logsumexp(logits)[..., None]


def softmax_state(logits, v):
    """The state of one tile of keys: logits [..., L, S] (-inf = invisible), v [..., S, Dv].

    Where the probability is 0 the value does not count, not even a NaN or an infinity in padding.
    """
    m = logits.max(axis=-1, initial=-np.inf)
    p = np.exp(logits - _shift(m)[..., None])
    return SoftmaxState(m, p.sum(axis=-1), weigh(p, v))


def weigh(p, v):
    """P v with 0 * anything = 0: p [..., L, S], v [..., S, Dv] -> [..., L, Dv].

    A value that is not finite is dropped where no row gives it weight, and kept (NaN comes out) where one
    does.
    """
    unseen = ~np.any(p != 0, axis=-2)[..., None]  # [..., S, 1]: keys without weight in any row of this tile
    return p @ np.where(unseen, 0.0, v)


def merge(a, b):
    """State of the union of two disjoint sets of keys: (M, l e^(m-M) + l' e^(m'-M), O e^(m-M) + O' e^(m'-M)).

    Args: a, b: SoftmaxState, m and l [...], acc [..., Dv]. M is the larger of the two maxima.
    Associative, commutative, with identity (-inf, 0, 0). Source: Dao et al. 2022, section 3.1.
    """
    m = np.maximum(a.m, b.m)
    fa, fb = np.exp(a.m - _shift(m)), np.exp(b.m - _shift(m))
    return SoftmaxState(m, fa * a.l + fb * b.l, fa[..., None] * a.acc + fb[..., None] * b.acc)


def finalize(state):
    """(o, lse) = (acc / l, m + log l); a row that saw no key gives o = 0 and lse = -inf.

    Args: state: SoftmaxState. Returns: o [..., Dv], lse [...] in natural log.
    """
    seen = state.l > 0
    l = np.where(seen, state.l, 1.0)
    return state.acc / l[..., None], np.where(seen, _shift(state.m) + np.log(l), -np.inf)


def online_softmax(logits, *, start=0):
    """Softmax in one pass over the keys: maximum and sum of exponentials are kept up to date together.

    Args: logits [..., S], S >= 1. start: index of the key that comes first; the keys wrap around.
    Returns: (p [..., S], m [...], l [...]): probabilities, largest logit, sum of exp(logits - m).
    Raises: ValueError unless 0 <= start < S.
    Source: Milakov and Gimelshein 2018, Algorithm 3; the rotated start is Edge-MoE's (2023).
    """
    S = dims(logits=(logits, "... S"))["S"]
    if not 0 <= start < S:
        raise ValueError(f"start must be in [0, S), got start={start} with S={S}")
    logits = float64(logits)
    m = np.full_like(logits, -np.inf, shape=logits.shape[:-1])
    l = np.zeros_like(logits, shape=logits.shape[:-1])
    for j in np.roll(np.arange(S), -start):
        m_new = np.maximum(m, logits[..., j])
        l = l * np.exp(m - _shift(m_new)) + np.exp(logits[..., j] - _shift(m_new))
        m = m_new
    p = np.exp(logits - _shift(m)[..., None])
    return p / np.where(l == 0, 1.0, l)[..., None], m, l


def _shift(m):
    """The maximum as a shift of exponents: 0 in place of -inf, since -inf - (-inf) would be NaN."""
    return np.where(np.isneginf(m), 0.0, m)
