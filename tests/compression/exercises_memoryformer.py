"""The exercises of the chapter on MemoryFormer: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:addresses]
import numpy as np


def addresses(x, tau):
    """Address of every chunk of tau features, x [T, d] -> [T, d / tau]: bits are 1 where
    a feature is >= 0, the first feature being the most significant. As it stands it
    is the least significant.
    """
    bits = (x.reshape(len(x), -1, tau) >= 0).astype(int)
    return (bits * 2 ** np.arange(tau)).sum(axis=-1)
    # --8<-- [end:addresses]


# --8<-- [start:solve_addresses]
def solve_addresses(x, tau):
    bits = (x.reshape(len(x), -1, tau) >= 0).astype(int)
    return (bits * 2 ** np.arange(tau - 1, -1, -1)).sum(axis=-1)
    # --8<-- [end:solve_addresses]


def check_addresses(addresses):
    """The library's addresses; a zero counts as positive."""
    from ref.compression.memoryformer import hash_chunks

    rng = np.random.default_rng(0)
    for tau in (1, 2, 4):
        x = rng.standard_normal((5, 8))
        x[0, 0] = 0.0
        got, want = np.asarray(addresses(x, tau)), hash_chunks(x, tau=tau)[0]
        assert got.shape == want.shape, f"{tau = }: the addresses have shape {got.shape}, not {want.shape}"
        wrong = np.argwhere(got != want)
        assert not len(wrong), (
            f"{tau = }: chunk {x.reshape(5, -1, tau)[tuple(wrong[0])].round(1)} is at "
            f"{want[tuple(wrong[0])]}, not {got[tuple(wrong[0])]}"
        )


# --8<-- [start:sure]
def sure(z):
    """The largest entry of the softmax of <z, c> over all sign vectors c, for one
    chunk z [tau], without 2^tau terms. As it stands it is that of z / 2.
    """
    import numpy as np

    return np.prod(1 / (1 + np.exp(-np.abs(z))))
    # --8<-- [end:sure]


# --8<-- [start:solve_sure]
def solve_sure(z):
    return np.prod(1 / (1 + np.exp(-2 * np.abs(z))))
    # --8<-- [end:solve_sure]


def check_sure(sure):
    """All corners, one by one."""
    from ref.compression.memoryformer import corners

    rng = np.random.default_rng(0)
    for tau in (1, 2, 5):
        z = rng.standard_normal(tau)
        p = np.exp(corners(tau) @ z)
        want = p.max() / p.sum()
        got = sure(z)
        # 2^5 exponentials of numbers up to about 5, and their sum
        assert abs(got - want) < 1e-12, f"z = {z.round(2)}: the best corner has {want:.4f}, not {got:.4f}"


# --8<-- [start:even]
def even(tau):
    """(n, m): with n tokens a memory layer reads as many bytes as the dense layer,
    with m, if no two share a row, its whole tables.
    """
    return 2**tau // tau, 2**tau
    # --8<-- [end:even]


# --8<-- [start:solve_even]
def solve_even(tau):
    return tau, 2**tau
    # --8<-- [end:solve_even]


def check_even(even):
    """By the library's count of a layer of 128 to 128."""
    from ref.compression.memoryformer import dense_complexity, memory_complexity

    for tau in (2, 4, 8):
        n, m = even(tau)
        cost = memory_complexity(128, 128, tau=tau, tokens=n)
        dense = dense_complexity(128, 128, tokens=n)
        assert cost.bytes_read == dense.bytes_read, (
            f"{tau = }, {n} tokens read {cost.bytes_read:,} bytes, of the matrix {dense.bytes_read:,}"
        )
        whole, less = (memory_complexity(128, 128, tau=tau, tokens=k).bytes_read for k in (m, m - 1))
        assert whole == cost.table_bytes > less, f"{tau = }: {m} tokens do not just read all rows"
