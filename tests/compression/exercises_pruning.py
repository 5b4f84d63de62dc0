"""The exercises of the chapter on pruning: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:two_of_four]
import numpy as np


def two_of_four(w):
    """Mask, True = kept, of the two largest |w| of every four consecutive inputs;
    w is [out, in]. As it stands it groups consecutive outputs.
    """
    groups = np.abs(w).T.reshape(-1, 4)
    rank = groups.argsort(axis=1).argsort(axis=1)
    return (rank >= 2).reshape(w.T.shape).T
    # --8<-- [end:two_of_four]


# --8<-- [start:solve_two_of_four]
def solve_two_of_four(w):
    groups = np.abs(w).reshape(-1, 4)
    rank = groups.argsort(axis=1).argsort(axis=1)
    return (rank >= 2).reshape(w.shape)
    # --8<-- [end:solve_two_of_four]


def check_two_of_four(two_of_four):
    """The mask of the library on drawn weights; rows are [out, in]."""
    from ref.compression.pruning import nm_mask

    for shape in ((4, 4), (4, 8), (8, 12)):
        w = np.random.default_rng(sum(shape)).standard_normal(shape)
        got = np.asarray(two_of_four(w))
        assert got.shape == shape, f"the mask has shape {got.shape}, not {shape}"
        kept = got.reshape(-1, 4).sum(axis=1)
        assert (kept == 2).all(), f"groups of four inputs keep {sorted(set(kept.tolist()))}, not 2 each"
        assert (got == nm_mask(w)).all(), "a smaller weight was kept instead of a larger one"


# --8<-- [start:remove]
def remove(w, h_inv, i):
    """The row w [n] without its weight i, the others corrected so that the error
    (v - w) H (v - w) of the result v is least; h_inv is the inverse of H. As it
    stands the others stay.
    """
    v = w.copy()
    v[i] = 0.0
    return v
    # --8<-- [end:remove]


# --8<-- [start:solve_remove]
def solve_remove(w, h_inv, i):
    v = w - w[i] / h_inv[i, i] * h_inv[:, i]
    v[i] = 0.0  # it is, up to rounding
    return v
    # --8<-- [end:solve_remove]


def check_remove(remove):
    """The error is that of equation (6), the least there is."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((12, 4)), rng.standard_normal(4)
    h = x.T @ x
    h_inv = np.linalg.inv(h)
    for i in range(4):
        v = remove(w.copy(), h_inv, i)
        assert v[i] == 0, f"weight {i} is {v[i]}, not 0"
        error, least = (v - w) @ h @ (v - w) / 2, w[i] ** 2 / (2 * h_inv[i, i])
        # the inverse of a well-conditioned 4 x 4 matrix and a few products
        assert error <= least * (1 + 1e-9), (
            f"without weight {i} the error is {error:.3f}, possible is {least:.3f}"
        )


# --8<-- [start:break_even]
def break_even(itemsize):
    """(csr, bitmap): the largest share of kept weights at which each form is no
    larger than the dense matrix. Values take itemsize bytes, a csr index four, a
    bitmap one bit an entry; row starts are not counted.
    """
    return 0.5, 0.5
    # --8<-- [end:break_even]


# --8<-- [start:solve_break_even]
def solve_break_even(itemsize):
    return itemsize / (itemsize + 4), 1 - 1 / (8 * itemsize)
    # --8<-- [end:solve_break_even]


def check_break_even(break_even):
    """At that share both forms take what the dense matrix takes, by the library's count."""
    from ref.compression.pruning import sparse_bytes

    shape = (64, 4800)
    for itemsize in (1, 2, 4):
        dense = sparse_bytes(shape, kind="dense", sparsity=0, itemsize=itemsize)
        for kind, kept in zip(("csr", "bitmap"), break_even(itemsize), strict=True):
            size = sparse_bytes(shape, kind=kind, sparsity=1 - kept, itemsize=itemsize)
            size -= 4 * 65 if kind == "csr" else 0
            # one entry of rounding, of at most eight bytes
            off = f"{itemsize} bytes a value, {kind}: {kept:.1%} kept take {size:,}, dense {dense:,} bytes"
            assert abs(size - dense) <= 8, off
