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


# --8<-- [start:moved]
def moved(mask, block, d):
    """Elements that a forward pass moves under the block mask bool [n, n], of blocks
    of `block` tokens, with heads of size d. As it stands it takes the share of
    visited tiles of all that FlashAttention moves.
    """
    n = len(mask)
    N, share = n * block, mask.mean()
    return share * (n * (3 * N * d + 4 * N) + 3 * N * d + 2 * N)
    # --8<-- [end:moved]


# --8<-- [start:solve_moved]
def solve_moved(mask, block, d):
    n = len(mask)
    N, visited = n * block, int(mask.sum())
    keys = block * int(mask.any(axis=0).sum())  # of columns that some block of queries visits
    tiles = visited * block * (3 * d + 4)  # q, o, l, m in; o, l, m out
    return tiles + 2 * keys * d + N * d + 2 * N
    # --8<-- [end:solve_moved]


def check_moved(moved):
    """The counts of the library, which counting arrays confirm."""
    from ref.attention.block_sparse_flash import butterfly_block_mask, hbm_accesses_block_sparse

    last = np.zeros((4, 4), bool)
    last[:, 3] = True  # three columns that nobody visits
    cases = {
        "of ones": np.ones((4, 4), bool),
        "of the butterfly": butterfly_block_mask(8),
        "of one column": last,
    }
    for name, mask in cases.items():
        for block, d in ((16, 8), (32, 64)):
            n = len(mask) * block
            want = hbm_accesses_block_sparse(mask, n, n, d, block_q=block, block_k=block)["total"]
            got = moved(mask, block, d)
            assert got == want, f"the mask {name}, {block = }, {d = }: {want:,} elements move, not {got:,.0f}"
