"""Six ways to get attention wrong, and five checks: shown in docs/start/agreement.md, run by its test."""

import numpy as np

from ref.blocks.softmax import SoftmaxState, finalize, merge

EPS = np.finfo(np.float64).eps


def scores(q, k, causal):
    s = q @ k.T / np.sqrt(q.shape[1])
    return np.where(np.tri(*s.shape, dtype=bool), s, -np.inf) if causal else s


def right(q, k, v, causal=False):
    """softmax(q k^T / sqrt(D)) v."""
    p = np.exp((s := scores(q, k, causal)) - s.max(axis=1, keepdims=True))
    return p @ v / p.sum(axis=1, keepdims=True)


# --8<-- [start:mutants]
def without_scale(q, k, v, causal=False):
    return right(q * np.sqrt(q.shape[1]), k, v, causal)


def sees_one_key_too_many(q, k, v, causal=False):
    s = q @ k.T / np.sqrt(q.shape[1])
    s = np.where(np.tri(*s.shape, 1, dtype=bool), s, -np.inf) if causal else s
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p @ v / p.sum(axis=1, keepdims=True)


def subtracts_no_maximum(q, k, v, causal=False):
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.exp(scores(q, k, causal))
        return p @ v / p.sum(axis=1, keepdims=True)


def masks_after_the_softmax(q, k, v, causal=False):
    p = np.exp((s := scores(q, k, False)) - s.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    return (np.tril(p) if causal else p) @ v


def forgets_to_rescale(q, k, v, causal=False, block=3):
    state = SoftmaxState(np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros((len(q), v.shape[1])))
    for j in range(0, len(k), block):
        s = scores(q, k, causal)[:, j : j + block]
        m = np.maximum(state.m, s.max(axis=1))
        p = np.exp(s - m[:, None])
        state = SoftmaxState(m, state.l + p.sum(1), state.acc + p @ v[j : j + block])  # no exp(m_old - m)
    return finalize(state)[0]


def drops_the_ragged_end(q, k, v, causal=False, block=3):
    whole = len(k) // block * block
    states = []
    for j in range(0, whole, block):
        s = scores(q, k, causal)[:, j : j + block]
        m = np.where(np.isneginf(s.max(axis=1)), 0.0, s.max(axis=1))
        p = np.exp(s - m[:, None])
        states.append(SoftmaxState(s.max(axis=1), p.sum(1), p @ v[j : j + block]))
    while len(states) > 1:
        states[:2] = [merge(*states[:2])]
    return finalize(states[0])[0]
    # --8<-- [end:mutants]


ALL = (
    without_scale,
    sees_one_key_too_many,
    subtracts_no_maximum,
    masks_after_the_softmax,
    forgets_to_rescale,
    drops_the_ragged_end,
)


def draw(rng, L=7, D=4):
    return rng.standard_normal((3, L, D))


def close(x, y):
    """Sums of seven terms of size at most some ten: a hundred roundings."""
    return bool(np.all(np.isfinite(x)) and np.abs(x - y).max() <= 1000 * EPS * (1 + np.abs(y).max()))


# --8<-- [start:checks]
def equals_the_definition(f, rng):
    q, k, v = draw(rng)
    p = np.array([[np.exp(qi @ kj / 2) for kj in k] for qi in q])  # D = 4
    return close(f(q, k, v), (p / p.sum(1, keepdims=True)) @ v)


def is_an_average(f, rng):
    q, k, v = draw(rng)
    return close(f(q, k, np.ones_like(v), True), np.ones_like(v))


def ignores_the_order_of_keys(f, rng):
    (q, k, v), at = draw(rng), rng.permutation(7)
    return close(f(q, k[at], v[at]), f(q, k, v))


def ignores_what_comes_later(f, rng):
    q, k, v = draw(rng)
    other_k, other_v = k.copy(), v.copy()
    other_k[4:], other_v[4:] = rng.standard_normal((2, 3, 4))
    return close(f(q, other_k, other_v, True)[:4], f(q, k, v, True)[:4])


def survives_large_scores(f, rng):
    q, k, v = draw(rng)
    return bool(np.all(np.isfinite(f(1e3 * q, k, v))))
    # --8<-- [end:checks]


CHECKS = (
    equals_the_definition,
    is_an_average,
    ignores_the_order_of_keys,
    ignores_what_comes_later,
    survives_large_scores,
)


def caught(f, check, draws=20):
    """Whether some draw makes the check fail."""
    rng = np.random.default_rng(0)
    return any(not check(f, rng) for _ in range(draws))
