"""The exercises of the chapter on FlashAttention: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:merge]
import numpy as np


def merge(a, b):
    """The state of two disjoint sets of keys from theirs: tuples (m, l, o), o a
    vector; the exponentials in l and o are taken relative to the maximum m. As
    it stands it is right only where a holds the largest score.
    """
    m = max(a[0], b[0])
    factor = np.exp(b[0] - m)
    return m, a[1] + factor * b[1], a[2] + factor * b[2]
    # --8<-- [end:merge]


# --8<-- [start:solve_merge]
def solve_merge(a, b):
    m = max(a[0], b[0])
    if np.isneginf(m):  # two empty sets
        return m, a[1] + b[1], a[2] + b[2]
    of_a, of_b = np.exp(a[0] - m), np.exp(b[0] - m)
    return m, of_a * a[1] + of_b * b[1], of_a * a[2] + of_b * b[2]
    # --8<-- [end:solve_merge]


def check_merge(merge):
    """Two halves of the keys, merged, give the softmax over all of them."""
    from hypothesis import given
    from hypothesis import strategies as st

    def state(s, v):
        m = s.max(initial=-np.inf)
        p = np.exp(s - m)
        return m, p.sum(), p @ v

    @given(st.lists(st.integers(-9, 9), min_size=1, max_size=6), st.integers(0, 6))
    def halves_make_the_whole(scores, cut):
        s = np.array(scores, float)
        v = np.arange(2.0 * len(s)).reshape(-1, 2)
        cut = min(cut, len(s))
        m, l, o = merge(state(s[:cut], v[:cut]), state(s[cut:], v[cut:]))
        want = np.exp(s - s.max()) @ v / np.exp(s - s.max()).sum()
        assert m == s.max(), f"the maximum of {scores} is {s.max():g}, not {m}"
        # six terms of values up to 11, rounded a few times each
        assert np.allclose(o / l, want, rtol=0, atol=1e-12), f"the output is {o / l}, softmax gives {want}"

    halves_make_the_whole()


# --8<-- [start:traffic]
def traffic(N, d, M):
    """Elements that tiled attention moves (equation 4), with N queries and keys
    of size d and M on-chip elements.

    It counts one pass over Q, O, m and l, as if all keys fitted one tile.
    """
    return 3 * N * d + 4 * N + 2 * N * d + N * d + 2 * N
    # --8<-- [end:traffic]


# --8<-- [start:solve_traffic]
def solve_traffic(N, d, M):
    block_k = -(-M // (4 * d))
    tiles = -(-N // block_k)
    return tiles * (3 * N * d + 4 * N) + 3 * N * d + 2 * N
    # --8<-- [end:solve_traffic]


def check_traffic(traffic):
    """The closed form of the library, which counting arrays confirm."""
    from ref.attention.flash import hbm_accesses

    for N, d, M in ((1024, 64, 65536), (1024, 64, 16384), (1024, 64, 4096), (512, 32, 1000)):
        want = hbm_accesses(N, N, d, sram_elements=M, algorithm="flash")["total"]
        got = traffic(N, d, M)
        assert got == want, f"{N = }, {d = }, {M = } moves {want:,} elements, not {got:,}"
