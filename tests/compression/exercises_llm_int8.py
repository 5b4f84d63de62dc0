"""The exercises of the chapter on LLM.int8(): a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:round_rows]
import numpy as np


def round_rows(x):
    """x [rows, columns] as int8 integers and a scale for each row, [rows, 1],
    so that x is near integers * scale. As it stands one scale serves all rows.
    """
    scale = np.full((len(x), 1), np.abs(x).max() / 127)
    return np.rint(x / scale).astype(np.int8), scale
    # --8<-- [end:round_rows]


# --8<-- [start:solve_round_rows]
def solve_round_rows(x):
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0) / 127  # a row of zeros keeps them, at any scale
    return np.rint(x / scale).astype(np.int8), scale
    # --8<-- [end:solve_round_rows]


def check_round_rows(round_rows):
    """Every row is within half of its own smallest possible step."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 64)) * np.array([[1.0], [1e-3], [60.0], [0.0]])
    q, scale = round_rows(rows)
    assert q.dtype == np.int8, f"the integers are {q.dtype}, not int8"
    assert np.shape(scale) == (4, 1), f"the scales have shape {np.shape(scale)}, not (4, 1)"
    for i, name in enumerate(("of ones", "of thousandths", "of outliers", "of zeros")):
        error = np.abs(rows[i] - q[i] * float(scale[i, 0])).max()
        allowed = np.abs(rows[i]).max() / 254
        # the half step, and a rounding of the quotient
        assert error <= allowed * (1 + 1e-9), (
            f"the row {name} is off by {error:.2g}, half its step is {allowed:.2g}"
        )


# --8<-- [start:exact_share]
def exact_share(width, outliers):
    """Share of a block's multiply-adds that stay in float: q, k, v and the
    first matrix of the MLP (4 times as wide) read `outliers` float features;
    the map after attention and the second matrix read none. As it stands every
    matrix reads them.
    """
    return outliers / width
    # --8<-- [end:exact_share]


# --8<-- [start:solve_exact_share]
def solve_exact_share(width, outliers):
    reads_norm, all_maps = 3 * width**2 + 4 * width**2, 12 * width**2
    return reads_norm * outliers / width / all_maps
    # --8<-- [end:solve_exact_share]


def check_exact_share(exact_share):
    """Seven of the twelve width x width parts of a block read the outliers."""
    for width, outliers in ((5120, 6), (768, 1), (4096, 7)):
        got, want = exact_share(width, outliers), outliers / width * 7 / 12
        assert abs(got - want) < 1e-12, f"{width = }, {outliers = }: {want:.5%} stay in float, not {got:.5%}"
