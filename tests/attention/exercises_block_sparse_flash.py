"""The exercises of the chapter on block-sparse FlashAttention: a stub, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:butterfly]
import numpy as np


def butterfly(n):
    """The mask of n blocks, a power of two, in which a block sees itself and
    those whose number differs from its own in one binary digit: bool [n, n]. As
    it stands every block sees itself alone.
    """
    return np.eye(n, dtype=bool)
    # --8<-- [end:butterfly]


# --8<-- [start:solve_butterfly]
def solve_butterfly(n):
    differ = np.arange(n)[:, None] ^ np.arange(n)  # the digits that differ, as a number
    return differ & (differ - 1) == 0  # no digit or a single one
    # --8<-- [end:solve_butterfly]


def check_butterfly(butterfly):
    """Blocks that differ in at most one digit, counted digit by digit."""
    for n in (1, 2, 4, 8, 16, 64):
        got = np.asarray(butterfly(n))
        assert got.shape == (n, n), f"{n} blocks need a mask [{n}, {n}], not {list(got.shape)}"
        for i in range(n):
            for j in range(n):
                digits = bin(i ^ j).count("1")
                assert bool(got[i, j]) == (digits < 2), (
                    f"of {n} blocks, {i} and {j} differ in {digits} digits"
                )
