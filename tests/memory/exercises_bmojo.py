"""The exercises of the chapter on B'MOJO: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:join]
import numpy as np


def join(o_c, m_c, o_f, m_f):
    """The output of one softmax over two sets of keys, from the outputs o [D] of
    each alone and the log-sum-exp m of its scores; m_f may be -inf (no fading
    keys). As it stands both have the same say.
    """
    return (o_c + o_f) / 2
    # --8<-- [end:join]


# --8<-- [start:solve_join]
def solve_join(o_c, m_c, o_f, m_f):
    top = max(m_c, m_f)  # the window is never empty, so this is finite
    c, f = np.exp(m_c - top), np.exp(m_f - top)
    return (c * o_c + f * o_f) / (c + f)
    # --8<-- [end:solve_join]


def check_join(join):
    """Two sets of any size, also empty or with large scores, are one softmax."""
    from hypothesis import given
    from hypothesis import strategies as st

    scores = lambda least: st.lists(st.integers(-5, 5), min_size=least, max_size=4)

    @given(scores(1), scores(0), st.sampled_from((0.0, 900.0)))
    def one_softmax(near, far, shift):
        a, b, v = np.array(near) + shift, np.array(far) + shift, np.arange(16.0).reshape(8, 2)
        alone = lambda s, v: (np.exp(s - s.max()) @ v / np.exp(s - s.max()).sum()) if len(s) else np.zeros(2)
        lse = lambda s: s.max() + np.log(np.exp(s - s.max()).sum()) if len(s) else -np.inf
        both = np.concatenate([a, b])
        want = alone(both, np.concatenate([v[: len(a)], v[4 : 4 + len(b)]]))
        with np.errstate(all="ignore"):
            got = join(alone(a, v[: len(a)]), lse(a), alone(b, v[4 : 4 + len(b)]), lse(b))
        # values below 16; an lse near 900 is off by 1e-13, and its exponential by as much of itself
        assert np.allclose(got, want, rtol=0, atol=1e-11), (
            f"scores {a} and {b}: one softmax gives {np.round(want, 4)}, not {np.round(got, 4)}"
        )

    one_softmax()


# --8<-- [start:held]
def held(scores, w, K):
    """For every query i the tokens in the store, ascending: the K best (all
    scores differ) of those that have left its window of w tokens, i itself
    included. As it stands the store overlaps the window.
    """
    best = lambda tokens: sorted(sorted(tokens, key=lambda j: -scores[j])[:K])
    return [best(range(i + 1)) for i in range(len(scores))]
    # --8<-- [end:held]


# --8<-- [start:solve_held]
def solve_held(scores, w, K):
    best = lambda tokens: sorted(sorted(tokens, key=lambda j: -scores[j])[:K])
    return [best(range(i - w + 1)) for i in range(len(scores))]  # i - w is the newest outside
    # --8<-- [end:solve_held]


def check_held(held):
    """As the library's store, token by token."""
    import numpy as np

    from ref.memory.bmojo import eidetic_members

    for seed, w, K in ((0, 1, 2), (1, 3, 2), (2, 4, 3), (3, 9, 2)):
        scores = np.random.default_rng(seed).permutation(8).astype(float)
        members = eidetic_members(scores, window=w, capacity=K)
        for i, (got, row) in enumerate(zip(held(list(scores), w, K), members, strict=True)):
            want = row[row >= 0].tolist()
            assert list(got) == want, (
                f"scores {scores.astype(int)}, window {w}, {K} slots: query {i} finds {want}, not {got}"
            )


# --8<-- [start:surprise]
import numpy as np


def surprise(x, y, W):
    """How badly the state foresaw every token: |x_t - prediction|^2 over |x_t|^2
    + 1e-6, for x, y [T, C]; y_t has read the tokens up to t, and a prediction is
    a state times W. As it stands the state has seen what it predicts.
    """
    e = x - y @ W
    return np.sum(e**2, axis=1) / (np.sum(x**2, axis=1) + 1e-6)
    # --8<-- [end:surprise]


# --8<-- [start:solve_surprise]
def solve_surprise(x, y, W):
    before = np.concatenate([np.zeros_like(y[:1]), y[:-1]])
    e = x - before @ W
    return np.sum(e**2, axis=1) / (np.sum(x**2, axis=1) + 1e-6)
    # --8<-- [end:solve_surprise]


def check_surprise(surprise):
    """The library's scores."""
    from ref.memory.bmojo import innovation_scores

    rng = np.random.default_rng(0)
    for T in (1, 2, 5):
        x, y, W = rng.standard_normal((T, 3)), rng.standard_normal((T, 3)), rng.standard_normal((3, 3))
        got, want = surprise(x, y, W), innovation_scores(x, y, W)
        # sums of three squares of size 1 to 30
        assert np.allclose(got, want, rtol=1e-12, atol=0), (
            f"{T} tokens: surprises {np.round(want, 3)}, not {np.round(got, 3)}"
        )
