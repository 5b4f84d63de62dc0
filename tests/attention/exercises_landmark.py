"""The exercises of the chapter on landmark attention: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:weights]
import numpy as np


def weights(s, l):
    """Weights [S] of the last query: s [S] are its scores, and every position
    l, 2 l + 1, 3 l + 2, ... is a landmark that closes a block of l tokens. The
    query itself is no landmark. As it stands a block's tokens share alike.
    """
    own = len(s) // (l + 1) * (l + 1)  # where the query's own block begins
    tokens = s[:own].reshape(-1, l + 1)[:, :-1]
    marks = s[:own].reshape(-1, l + 1)[:, -1]
    p = np.exp(np.concatenate([marks, s[own:]]) - s.max())
    p /= p.sum()
    w = np.zeros((len(marks), l + 1))
    w[:, :-1] = p[: len(marks), None] * np.ones_like(tokens) / l
    return np.concatenate([w.ravel(), p[len(marks) :]])
    # --8<-- [end:weights]


# --8<-- [start:solve_weights]
def solve_weights(s, l):
    own = len(s) // (l + 1) * (l + 1)
    tokens = s[:own].reshape(-1, l + 1)[:, :-1]
    marks = s[:own].reshape(-1, l + 1)[:, -1]
    p = np.exp(np.concatenate([marks, s[own:]]) - s.max())
    p /= p.sum()
    f = np.exp(tokens - tokens.max(axis=1, keepdims=True))  # each block has its own softmax
    f /= f.sum(axis=1, keepdims=True)
    w = np.zeros((len(marks), l + 1))
    w[:, :-1] = p[: len(marks), None] * f
    return np.concatenate([w.ravel(), p[len(marks) :]])
    # --8<-- [end:solve_weights]


def check_weights(weights):
    """The grouped softmax of the library."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.landmark import grouped_softmax

    @given(st.lists(st.integers(-3, 3), min_size=2, max_size=11), st.integers(1, 3))
    def two_levels(scores, l):
        if len(scores) % (l + 1) == 0:
            scores = [*scores, 0]  # the query would be a landmark
        s = np.array(scores, float)
        flags = np.arange(len(s)) % (l + 1) == l
        got, want = weights(s, l), grouped_softmax(s[None, None], flags)[0, 0]
        assert np.shape(got) == s.shape, f"{len(s)} positions have weights of shape {np.shape(got)}"
        # a dozen exponentials of numbers up to 6, a few roundings each
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"blocks of {l} and scores {scores}: the weights are {np.round(want, 3)}, not {np.round(got, 3)}"
        )

    two_levels()


# --8<-- [start:reads]
def reads(context, l, k, row):
    """Bytes that a query reads of `context` stored positions (whole blocks of l
    tokens and a landmark) when it fetches k blocks; row: bytes of a key or of a
    value over all heads. As it stands it reads more of a landmark than it needs.
    """
    blocks = context // (l + 1)
    landmarks = 2 * blocks * row
    fetched = 2 * min(k, blocks) * (l + 1) * row
    return landmarks + fetched
    # --8<-- [end:reads]


# --8<-- [start:solve_reads]
def solve_reads(context, l, k, row):
    blocks = context // (l + 1)
    landmarks = blocks * row  # keys alone: nobody reads a landmark's value
    fetched = 2 * min(k, blocks) * (l + 1) * row
    return landmarks + fetched
    # --8<-- [end:solve_reads]


def check_reads(reads):
    """The closed form of the library, which the counters of a store confirm."""
    from ref.attention.landmark import retrieval_cost

    for context, l, k in ((2040, 50, 4), (102, 50, 4), (32640, 50, 2), (9, 2, 1)):
        c = retrieval_cost(context, block_size=l, top_k=k, head_dim=8, num_heads=2)
        want, got = c["bytes_landmarks"] + c["bytes_blocks"], reads(context, l, k, 32)
        assert got == want, f"{context:,} positions, {l = }, {k = }: {want:,} bytes, not {got:,}"


# --8<-- [start:select]
import numpy as np


def select(w, k):
    """The k blocks whose landmarks weigh most, w [n], as the attention wants
    them: positions are dealt out in this order. As it stands the heaviest block
    comes first, whenever it was read.
    """
    return np.argsort(-w, kind="stable")[:k]
    # --8<-- [end:select]


# --8<-- [start:solve_select]
def solve_select(w, k):
    return np.sort(np.argsort(-w, kind="stable")[:k])  # ascending in time
    # --8<-- [end:solve_select]


def check_select(select):
    """As the library selects; of equal weights the earlier block."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.landmark import select_blocks

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 4))
    def heaviest_in_the_order_of_time(w, k):
        want = select_blocks(np.array(w, float)[None, None, None], top_k=k)[0, 0, 0]
        got = select(np.array(w, float), k)
        assert np.array_equal(got, want), f"of weights {w} take blocks {want}, not {got}"

    heaviest_in_the_order_of_time()
