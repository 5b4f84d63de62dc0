"""The exercises of the chapter on Mesa: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:round_fairly]
import numpy as np


def round_fairly(x, uniform):
    """Whole numbers next to x that are x on average when `uniform`, of x's
    shape, is drawn from [0, 1). As it stands it ignores what was drawn, and
    small numbers vanish.
    """
    return np.rint(x)
    # --8<-- [end:round_fairly]


# --8<-- [start:solve_round_fairly]
def solve_round_fairly(x, uniform):
    return np.floor(x + uniform)
    # --8<-- [end:solve_round_fairly]


def check_round_fairly(round_fairly):
    """Over 64 evenly spaced draws the mean of every multiple of 1/64 is exact, above and below zero."""
    x = np.arange(-128, 129) / 64
    draws = np.stack([round_fairly(x, np.full(x.shape, (k + 0.5) / 64)) for k in range(64)])
    assert (draws == np.rint(draws)).all(), "the results are not whole numbers"
    far = np.abs(draws - x).max()
    assert far < 1, f"a result is {far:g} from its number; the whole numbers next to it are less than 1 away"
    mean = draws.mean(axis=0)
    worst = np.abs(mean - x).argmax()
    assert mean[worst] == x[worst], f"{x[worst]:g} becomes {mean[worst]:g} on average"


# --8<-- [start:batches_of_lag]
def batches_of_lag(growth, momentum=0.9, share=0.99):
    """Batches until a running range has grown to `share` of a range that jumped
    from 1 to `growth`, when every batch moves it by 1 - momentum of what is
    missing. As it stands it jumps along.
    """
    return 1
    # --8<-- [end:batches_of_lag]


# --8<-- [start:solve_batches_of_lag]
def solve_batches_of_lag(growth, momentum=0.9, share=0.99):
    reached, n = 1.0, 0
    while reached < share * growth:
        reached, n = reached + (1 - momentum) * (growth - reached), n + 1
    return n
    # --8<-- [end:solve_batches_of_lag]


def check_batches_of_lag(batches_of_lag):
    """The library's running range, batch by batch."""
    from ref.training.mesa import init_range, update_range

    for growth, momentum in ((2.0, 0.9), (10.0, 0.9), (10.0, 0.99)):
        state, want = update_range(init_range((1,)), np.array([[0.0, 1.0]]), momentum=momentum, axis=0), 0
        while state.hi[0] < 0.99 * growth:
            state, want = update_range(state, np.array([[0.0, growth]]), momentum=momentum, axis=0), want + 1
        got = batches_of_lag(growth, momentum)
        assert got == want, f"{growth = :g}, {momentum = }: {want} batches, not {got}"
