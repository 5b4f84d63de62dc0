"""The exercises of the chapter on PiToMe: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:attend]
import numpy as np


def attend(q, k, v, size):
    """Attention of q [L, D] to merged tokens k [S, D], v [S, Dv], where token j
    stands for size[j] equal ones: [L, Dv]. As it stands a merged token counts
    once.
    """
    s = q @ k.T / np.sqrt(q.shape[1])
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v
    # --8<-- [end:attend]


# --8<-- [start:solve_attend]
def solve_attend(q, k, v, size):
    s = q @ k.T / np.sqrt(q.shape[1]) + np.log(size)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v
    # --8<-- [end:solve_attend]


def check_attend(attend):
    """The same as attention to every copy."""
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99))
    def as_if_no_token_were_merged(sizes, seed):
        rng, size = np.random.default_rng(seed), np.array(sizes)
        q, k, v = (rng.standard_normal((n, 3)) for n in (2, len(size), len(size)))
        s = q @ np.repeat(k, size, axis=0).T / np.sqrt(3)
        want = np.exp(s) @ np.repeat(v, size, axis=0) / np.exp(s).sum(1, keepdims=True)
        got = attend(q, k, v, size)
        # at most 16 terms near 1, rounded a few times each
        assert np.allclose(got, want, rtol=0, atol=1e-13), (
            f"off by {np.abs(got - want).max():.2g} from attention to every copy"
        )

    as_if_no_token_were_merged()
