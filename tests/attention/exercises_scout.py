"""The exercises of the chapter on SCOUT: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:pairs]
def pairs(n, s):
    """Pairs of query and key that n tokens see, each its earlier checkpoints and
    itself. As it stands it is the approximation of the text, n * n / (2 s).
    """
    return n * n // (2 * s)
    # --8<-- [end:pairs]


# --8<-- [start:solve_pairs]
def solve_pairs(n, s):
    segments, rest = divmod(n, s)
    earlier = s * segments * (segments - 1) // 2  # tokens of segment f see f checkpoints
    return n + earlier + rest * segments
    # --8<-- [end:solve_pairs]


def check_pairs(pairs):
    """The pairs of the mask, counted."""
    for n, s in ((1, 1), (7, 1), (8, 3), (9, 3), (5, 9), (40, 6)):
        want = sum(1 + sum(j % s == s - 1 for j in range(t)) for t in range(n))
        got = pairs(n, s)
        assert got == want, f"{n} tokens in segments of {s} see {want} pairs, not {got}"


# --8<-- [start:attend]
import numpy as np


def attend(q, k, v, s):
    """Outputs [L, D] of tokens that see the checkpoints before them and
    themselves: the scores of checkpoints and the own score stand side by side
    under one softmax. As it stands some tokens see themselves twice.
    """
    L, D = q.shape
    K, V, t = k[s - 1 :: s], v[s - 1 :: s], np.arange(L)
    past = np.where((np.arange(len(K)) + 1) * s - 1 <= t[:, None], q @ K.T / np.sqrt(D), -np.inf)
    own = np.sum(q * k, axis=1, keepdims=True) / np.sqrt(D)
    both = np.concatenate([past, own], axis=1)
    p = np.exp(both - both.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p[:, :-1] @ V + p[:, -1:] * v
    # --8<-- [end:attend]


# --8<-- [start:solve_attend]
def solve_attend(q, k, v, s):
    L, D = q.shape
    K, V, t = k[s - 1 :: s], v[s - 1 :: s], np.arange(L)
    before = (np.arange(len(K)) + 1) * s - 1 < t[:, None]  # strictly: the own key has its own column
    past = np.where(before, q @ K.T / np.sqrt(D), -np.inf)
    own = np.sum(q * k, axis=1, keepdims=True) / np.sqrt(D)
    both = np.concatenate([past, own], axis=1)
    p = np.exp(both - both.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p[:, :-1] @ V + p[:, -1:] * v
    # --8<-- [end:solve_attend]


def check_attend(attend):
    """Every token agrees with the library."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.scout import checkpoint_attention

    @given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 4))
    def tokens_are_the_library_s(seed, length, s):
        q, k, v = np.random.default_rng(seed).standard_normal((3, length, 2))
        want = checkpoint_attention(q[None], k[None], v[None], segment=s)[0]
        got = attend(q, k, v, s)
        wrong = [t for t in range(length) if not np.allclose(got[t], want[t], rtol=0, atol=1e-12)]
        # at most seven terms of size 1 to 4, a few roundings each
        assert not wrong, f"with segments of {s}, tokens {wrong} of {length} differ from the library"

    tokens_are_the_library_s()


# --8<-- [start:keep]
def keep(cache, t, key, s):
    """The list of checkpoints' keys after token t (counted from 0) was read,
    whose key is given. As it stands the first token of a segment is kept.
    """
    return [*cache, key] if t % s == 0 else cache
    # --8<-- [end:keep]


# --8<-- [start:solve_keep]
def solve_keep(cache, t, key, s):
    return [*cache, key] if (t + 1) % s == 0 else cache
    # --8<-- [end:solve_keep]


def check_keep(keep):
    """Token by token, the list holds the last token of every finished segment."""
    for s in (1, 2, 5):
        cache = []
        for t in range(12):
            cache = keep(cache, t, t, s)
            want = list(range(s - 1, t + 1, s))
            assert list(cache) == want, f"segments of {s}: after token {t} keep {want}, not {list(cache)}"
