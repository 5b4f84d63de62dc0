"""The exercises of the chapter on VVMA: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:forward]
import numpy as np


def forward(x, m, v):
    """y = W x with tiles W_ij = m diag(v_ij): x [J k], m [k, k], v [I, J, k] -> [I k],
    with one product with m for each tile of outputs. As it stands the columns of m
    are scaled after the product, which scales its rows.
    """
    tiles = x.reshape(v.shape[1], -1)
    return (v * (tiles @ m.T)).sum(axis=1).ravel()
    # --8<-- [end:forward]


# --8<-- [start:solve_forward]
def solve_forward(x, m, v):
    u = (v * x.reshape(v.shape[1], -1)).sum(axis=1)  # [I, k]: scaled inputs, added up
    return (u @ m.T).ravel()
    # --8<-- [end:solve_forward]


def check_forward(forward):
    """The dense matrix of the library."""
    from ref.compression.vvma import vvma_dense

    rng = np.random.default_rng(0)
    for I, J, k in ((1, 1, 3), (2, 3, 4), (3, 2, 2)):
        x, m, v = rng.standard_normal(J * k), rng.standard_normal((k, k)), rng.standard_normal((I, J, k))
        want, got = vvma_dense(m, v) @ x, np.asarray(forward(x, m, v))
        assert got.shape == want.shape, f"{I} x {J} tiles of {k}: the result has shape {got.shape}"
        off = np.abs(got - want).max()
        assert off < 1e-12, f"{I} x {J} tiles of {k}: off by {off:.3f}"


# --8<-- [start:best_tiles]
def best_tiles(n):
    """(a, b): the tile size, not rounded, with the fewest parameters of an n x n map,
    n^2 / k + k^2, and the one with the fewest multiply-adds, n^2 / k + n k.
    """
    return n / 2, n / 2
    # --8<-- [end:best_tiles]


# --8<-- [start:solve_best_tiles]
def solve_best_tiles(n):
    return (n * n / 2) ** (1 / 3), n**0.5  # derivatives -n^2 / k^2 + 2 k and -n^2 / k^2 + n
    # --8<-- [end:solve_best_tiles]


def check_best_tiles(best_tiles):
    """One percent larger or smaller is never better."""
    for n in (64, 1024):
        costs = (lambda k, n=n: n * n / k + k * k), (lambda k, n=n: n * n / k + n * k)
        for name, k, cost in zip(("parameters", "multiply-adds"), best_tiles(n), costs, strict=True):
            for other in (0.99 * k, 1.01 * k):
                better = cost(other) >= cost(k)
                assert better, f"{n = }: k = {other:.2f} has fewer {name} than k = {k:.2f}"


# --8<-- [start:between]
def between():
    """A 4 x 4 matrix that tiles of 1 and of 4 represent, and tiles of 2 do not."""
    import numpy as np

    return np.eye(4)
    # --8<-- [end:between]


# --8<-- [start:solve_between]
def solve_between():
    return np.diag([1.0, 1, 0, 0]) + np.diag([1.0, 1, 1], k=1)  # column 0 of its tiles: (1, 0) and (0, 0),
    # column 1: (1, 1), (0, 0), and of the next tiles (0, 1): two directions, no single column of M
    # --8<-- [end:solve_between]


def check_between(between):
    """What is left after the best approximation."""
    from ref.compression.vvma import project_to_vvma

    w = np.asarray(between(), float)
    assert w.shape == (4, 4), f"the matrix has shape {w.shape}, not (4, 4)"
    assert np.isfinite(w).all(), "every entry must be finite"
    left = {k: project_to_vvma(w, k=k)[2] for k in (1, 2, 4)}
    assert max(left[1], left[4]) < 1e-20 * max(1.0, (w**2).sum()), f"left over are {left}"
    assert left[2] > 1e-6 * (w**2).sum(), (
        "tiles of 2 represent this matrix as well: each of their columns is one direction"
    )
