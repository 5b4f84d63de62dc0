"""The exercises of the chapter on MemMamba: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:insert]
def insert(slots, score, t):
    """The pool after token t with this score was taken for a note: a list of
    (score, token), None where a slot is free; a free slot is taken first. If
    none is, the lowest score gives way to a strictly higher one (of equals the
    first). As it stands the oldest note gives way.
    """
    slots = list(slots)
    if None in slots:
        at = slots.index(None)
    else:
        at = min(range(len(slots)), key=lambda i: slots[i][1])
    slots[at] = score, t
    return slots
    # --8<-- [end:insert]


# --8<-- [start:solve_insert]
def solve_insert(slots, score, t):
    slots = list(slots)
    if None in slots:
        at = slots.index(None)
    else:
        at = min(range(len(slots)), key=lambda i: slots[i][0])
        if score <= slots[at][0]:
            return slots
    slots[at] = score, t
    return slots
    # --8<-- [end:solve_insert]


def check_insert(insert):
    """Token by token, the library's pool under its policy "priority"."""
    import numpy as np
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.memory.memmamba import NoteParams, note_pool

    one = np.ones((1, 1))
    p = NoteParams(one, np.zeros(1), np.ones(1), np.zeros(()), one, one, one, one)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 3))
    def as_the_library_notes(marks, capacity):
        pool = note_pool(np.array(marks, float)[:, None], p, capacity=capacity)[1]
        slots = [None] * capacity
        for t, mark in enumerate(marks):
            slots = insert(slots, mark, t)
        got, want = [-1 if s is None else s[1] for s in slots], pool.age.tolist()
        assert got == want, f"scores {marks}, {capacity} slots: the pool holds tokens {want}, not {got}"

    as_the_library_notes()


# --8<-- [start:response]
import numpy as np


def response(delta, a, s, t):
    """How much the state at token t moves with the input of token s <= t, for
    one channel with decay a < 0, B = 1 and steps delta. As it stands the token's
    own step counts among the decays.
    """
    return np.exp(a * np.sum(delta[s : t + 1])) * delta[s]
    # --8<-- [end:response]


# --8<-- [start:solve_response]
def solve_response(delta, a, s, t):
    return np.exp(a * np.sum(delta[s + 1 : t + 1])) * delta[s]
    # --8<-- [end:solve_response]


def check_response(response):
    """The selective scan of the library, fed with a single one."""
    from ref.memory.memmamba import selective_scan

    delta, ones = np.array([0.5, 1.0, 0.1, 2.0, 0.3]), np.ones((5, 1))
    for a in (-0.1, -1.0):
        for s in range(5):
            u = (np.arange(5) == s).astype(float)[:, None]
            y = selective_scan(u, delta[:, None], np.array([[a]]), ones, ones, delta_softplus=False)[:, 0]
            for t in range(s, 5):
                got = response(delta, a, s, t)
                # one exponential, and up to four multiplied in the scan
                assert abs(got - y[t]) < 1e-13, (
                    f"a = {a}: token {s} moves the state at {t} by {y[t]:.4f}, not {got:.4f}"
                )


# --8<-- [start:remembered]
import numpy as np


def remembered(a, delta, k):
    """Share of a white input k steps ago that a state of one number lets one
    recover, with decay exp(a delta) a step. As it stands all lags together
    would hold more than one input.
    """
    decay = np.exp(a * delta)
    return decay ** (2 * k)
    # --8<-- [end:remembered]


# --8<-- [start:solve_remembered]
def solve_remembered(a, delta, k):
    decay = np.exp(a * delta)
    return decay ** (2 * k) * (1 - decay**2)  # c_k^2 over the variance of the state
    # --8<-- [end:solve_remembered]


def check_remembered(remembered):
    """The library's measure; summed over all lags it is one."""
    from ref.memory.memmamba import memory_information

    for a, delta in ((-0.02, 1.0), (-1.0, 0.5), (-0.3, 2.0)):
        lags = np.array([0, 1, 5])
        want = memory_information(delta, np.array([a]), np.ones(1), lags=lags)[0]
        for k, w in zip(lags, want, strict=True):
            got = remembered(a, delta, k)
            # a division by 1 - decay^2, which is above 0.03
            assert abs(got - w) < 1e-12, f"decay {np.exp(a * delta):.3f}, lag {k}: {w:.4f}, not {got:.4f}"
