"""The exercises of the chapter on subsampled attention: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:attend]
import numpy as np


def attend(q, k, v, sources):
    """Attention [L, D] of all queries to the drawn sources, an array of distinct
    positions. As it stands this is dropout on the attention: it computes all
    scores, leaves out what was not drawn and scales the rest up.
    """
    s = q @ k.T / np.sqrt(q.shape[1])
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p[:, sources] @ v[sources] * len(k) / len(sources)
    # --8<-- [end:attend]


# --8<-- [start:solve_attend]
def solve_attend(q, k, v, sources):
    s = q @ k[sources].T / np.sqrt(q.shape[1])  # the others need no key and no value
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p @ v[sources]
    # --8<-- [end:solve_attend]


def check_attend(attend):
    """The library's attention, whatever stands in the sources that were not drawn."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.subsampled import ssa_attention

    @given(st.integers(0, 99), st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    def drawn_sources_alone(seed, sources):
        q, k, v = np.random.default_rng(seed).standard_normal((3, 6, 2))
        sources = np.array(sorted(sources))
        want = ssa_attention(*(x[None, None] for x in (q, k, v)), source_index=sources)[0, 0]
        got = attend(q, k, v, sources)
        # six terms of size 1 to 4 and their exponentials, a few roundings each
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"with sources {sources} row 0 is {np.round(got[0], 3)}, not {np.round(want[0], 3)}"
        )
        k, v = (np.where(np.isin(np.arange(6), sources)[:, None], x, np.nan) for x in (k, v))
        assert np.isfinite(attend(q, k, v, sources)).all(), f"sources other than {sources} are read"

    drawn_sources_alone()


# --8<-- [start:visible]
import numpy as np


def visible(perm, block, left, right):
    """bool [n, n]: does query i see source j, if slot s holds source perm[s] and
    queries of block t see the slots of blocks t - left .. t + right? As it
    stands it takes a source's number for its slot.
    """
    slot = perm
    apart = slot // block - np.arange(len(perm))[:, None] // block
    return (-left <= apart) & (apart <= right)
    # --8<-- [end:visible]


# --8<-- [start:solve_visible]
def solve_visible(perm, block, left, right):
    slot = np.argsort(perm)  # the inverse: in which slot a source is
    apart = slot // block - np.arange(len(perm))[:, None] // block
    return (-left <= apart) & (apart <= right)
    # --8<-- [end:solve_visible]


def check_visible(visible):
    """The library's mask."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.subsampled import ssa_visible

    @given(st.permutations(range(6)), st.integers(1, 3), st.integers(0, 1), st.integers(0, 1))
    def as_the_library_sees(perm, block, left, right):
        want = ssa_visible(np.array(perm), block=block, left=left, right=right)
        got = visible(np.array(perm), block, left, right)
        for i in range(6):
            a, b = np.flatnonzero(got[i]).tolist(), np.flatnonzero(want[i]).tolist()
            assert a == b, f"slots hold {perm}, blocks of {block}: query {i} sees {b}, not {a}"

    as_the_library_sees()


# --8<-- [start:ensemble]
import numpy as np


def ensemble(logits):
    """Probabilities [V] from R sampled forward passes, logits [R, V]. As it
    stands the passes are averaged before the softmax.
    """
    z = logits.mean(axis=0)
    p = np.exp(z - z.max())
    return p / p.sum()
    # --8<-- [end:ensemble]


# --8<-- [start:solve_ensemble]
def solve_ensemble(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p.mean(axis=0)
    # --8<-- [end:solve_ensemble]


def check_ensemble(ensemble):
    """A mean of distributions, so that no answer loses against the members' average."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.subsampled import self_ensemble

    rows = st.lists(st.integers(-6, 6), min_size=3, max_size=3)

    @given(st.lists(rows, min_size=1, max_size=4))
    def a_mean_of_distributions(logits):
        x = np.array(logits, float)
        got, want = ensemble(x), self_ensemble(x)
        # exponentials of at most 12 and sums of four, a few roundings each
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"passes with logits {logits} give {np.round(want, 3)}, not {np.round(got, 3)}"
        )

    a_mean_of_distributions()
