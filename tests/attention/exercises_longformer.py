"""The exercises of the chapter on Longformer: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:visible]
def visible(n, window):
    """Pairs of query and key that n tokens see of each other through a window
    of window / 2 on each side. As it stands no text has an end.
    """
    return n * (window + 1)
    # --8<-- [end:visible]


# --8<-- [start:solve_visible]
def solve_visible(n, window):
    half = min(window // 2, n - 1)  # a window wider than the text sees the text
    return n * (2 * half + 1) - half * (half + 1)
    # --8<-- [end:solve_visible]


def check_visible(visible):
    """The mask of the library, counted."""
    from ref.attention.longformer import longformer_mask

    for n, window in ((1, 2), (4, 2), (9, 4), (24, 6), (24, 46), (24, 60), (512, 128)):
        want = int(longformer_mask(n, window=window).sum())
        got = visible(n, window)
        assert got == want, f"{n} tokens with window {window} see {want:,} pairs, not {got:,}"


# --8<-- [start:attend]
import numpy as np


def attend(q, k, v, near, is_global):
    """Outputs [L, D] of local queries: q, k, v [L, D], near bool [L, L] (inside
    the window), is_global bool [L]. The scores of window and global keys stand
    side by side under one softmax. As it stands some key counts twice.
    """
    L, D = q.shape
    s = q @ k.T / np.sqrt(D)
    cols = np.flatnonzero(is_global)
    both = np.concatenate([np.where(near, s, -np.inf), s[:, cols]], axis=1)
    p = np.exp(both - both.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p[:, :L] @ v + p[:, L:] @ v[cols]
    # --8<-- [end:attend]


# --8<-- [start:solve_attend]
def solve_attend(q, k, v, near, is_global):
    L, D = q.shape
    s = q @ k.T / np.sqrt(D)
    cols = np.flatnonzero(is_global)
    window = np.where(near & ~is_global, s, -np.inf)  # a global key counts in its own column
    both = np.concatenate([window, s[:, cols]], axis=1)
    p = np.exp(both - both.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p[:, :L] @ v + p[:, L:] @ v[cols]
    # --8<-- [end:solve_attend]


def check_attend(attend):
    """Local rows agree with the library, wherever global tokens stand."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.longformer import longformer_mask, sliding_window_attention

    @given(st.integers(0, 99), st.lists(st.integers(0, 6), max_size=2, unique=True))
    def local_rows_are_the_library_s(seed, globals_):
        q, k, v = np.random.default_rng(seed).standard_normal((3, 7, 2))
        g = np.isin(np.arange(7), globals_)
        got = attend(q, k, v, longformer_mask(7, window=2), g)
        want = sliding_window_attention(q[None], k[None], v[None], window=2, global_mask=g)[0]
        wrong = [i for i in range(7) if not g[i] and not np.allclose(got[i], want[i], rtol=0, atol=1e-12)]
        # seven terms of size 1 to 4 and their exponentials, a few roundings each
        assert not wrong, f"with global tokens {sorted(globals_)} rows {wrong} differ from the library"

    local_rows_are_the_library_s()


# --8<-- [start:diagonals]
import numpy as np


def diagonals(s):
    """[w, w + 1] from the product s [w, w] of a chunk with itself: column t of
    row i shall hold s[i, i + t], as far as that exists. No loop is needed: pad
    the product with zeros and reshape. As it stands the wrong side is padded.
    """
    w = len(s)
    return np.pad(s, ((0, 0), (0, 1))).reshape(w, w + 1)
    # --8<-- [end:diagonals]


# --8<-- [start:solve_diagonals]
def solve_diagonals(s):
    w = len(s)
    return np.pad(s, ((0, 1), (0, 0))).reshape(w, w + 1)
    # --8<-- [end:solve_diagonals]


def check_diagonals(diagonals):
    """Numbers that tell their place stand where they should."""
    for w in (2, 3, 6):
        s = np.arange(1.0, w * w + 1).reshape(w, w)
        out = diagonals(s)
        assert np.shape(out) == (w, w + 1), f"a product of {w} tokens gives shape {np.shape(out)}"
        for i in range(w):
            for t in range(w - i):
                want = s[i, i + t]
                assert out[i, t] == want, (
                    f"w = {w}: row {i}, column {t} holds {out[i, t]:g}, but s[{i}, {i + t}] is {want:g}"
                )
