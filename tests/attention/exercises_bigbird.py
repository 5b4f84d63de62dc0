"""The exercises of the chapter on BigBird: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:blocks]
def blocks(nb, r):
    """Blocks that one head sees, of nb * nb: window, both ends, r random ones a
    row. As it stands all rows are alike.
    """
    return nb * (5 + r)
    # --8<-- [end:blocks]


# --8<-- [start:solve_blocks]
def solve_blocks(nb, r):
    if nb < 3:
        return nb * nb
    full, middle = 2 * nb, (nb - 2) * (5 + r)
    return full + middle - 2  # in rows 1 and nb - 2 the window meets an end
    # --8<-- [end:solve_blocks]


def check_blocks(blocks):
    """The mask of the library, counted."""
    import numpy as np

    from ref.attention.bigbird import bigbird_block_mask, bigbird_rand_blocks

    for nb, r in ((1, 0), (2, 0), (3, 0), (4, 0), (9, 0), (9, 2), (64, 3)):
        u = np.random.default_rng(nb).random((1, max(nb - 2, 0), nb))
        rand = bigbird_rand_blocks(u, num_rand=r) if nb > 2 else None
        want = int(np.sum(bigbird_block_mask(nb, rand)))
        got = blocks(nb, r)
        assert got == want, f"{nb} blocks with {r} random ones a row: a head sees {want:,}, not {got:,}"


# --8<-- [start:legal]
import numpy as np


def legal(uniforms, r):
    """Draw r blocks for every middle row: those with the smallest of the drawn
    numbers, in ascending order. uniforms [nb - 2, nb], row i - 1 is block i.
    As it stands it draws from all blocks, also those that are seen already.
    """
    order = np.argsort(uniforms, axis=-1)
    return np.sort(order[:, :r], axis=-1)
    # --8<-- [end:legal]


# --8<-- [start:solve_legal]
def solve_legal(uniforms, r):
    nb = uniforms.shape[1]
    i, j = np.arange(1, nb - 1)[:, None], np.arange(nb)
    seen = (np.abs(i - j) <= 1) | (j == 0) | (j == nb - 1)
    order = np.argsort(np.where(seen, np.inf, uniforms), axis=-1)
    return np.sort(order[:, :r], axis=-1)
    # --8<-- [end:solve_legal]


def check_legal(legal):
    """The library's draw from the same numbers."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.attention.bigbird import bigbird_rand_blocks

    @given(st.integers(0, 999), st.integers(8, 14), st.integers(1, 3))
    def as_the_library_draws(seed, nb, r):
        u = np.random.default_rng(seed).random((nb - 2, nb))
        got, want = legal(u, r), bigbird_rand_blocks(u[None], num_rand=r)[0]
        assert np.shape(got) == want.shape, f"the table has shape {np.shape(got)}, not {want.shape}"
        for i, (a, b) in enumerate(zip(got.tolist(), want.tolist(), strict=True), start=1):
            assert a == b, f"of {nb} blocks, row {i} draws {b} and not {a}"

    as_the_library_draws()


# --8<-- [start:scatter]
import numpy as np


def scatter(rows, table, nb):
    """The gradient [nb, D] of all keys from those of the gathered ones, rows
    [M, n, D]; table int [M, n] says which block each was taken from (blocks of
    one token). As it stands something gets lost.
    """
    out = np.zeros((nb, rows.shape[-1]))
    out[table] += rows
    return out
    # --8<-- [end:scatter]


# --8<-- [start:solve_scatter]
def solve_scatter(rows, table, nb):
    out = np.zeros((nb, rows.shape[-1]))
    np.add.at(out, table, rows)  # adds every time, also where a block occurs again
    return out
    # --8<-- [end:solve_scatter]


def check_scatter(scatter):
    """What was gathered n times is added n times."""
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4))
    def every_visit_counts(table):
        table = np.array(table)
        rows = 1.0 + np.arange(table.size)[:, None].reshape(*table.shape, 1)
        want = np.zeros((4, 1))
        for m, n in np.ndindex(*table.shape):
            want[table[m, n]] += rows[m, n]
        got = scatter(rows, table, 4)
        assert np.array_equal(got, want), (
            f"from table {table.tolist()} block by block {got[:, 0]} comes back, {want[:, 0]} was sent"
        )

    every_visit_counts()
