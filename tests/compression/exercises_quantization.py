"""The exercises of the chapter on quantization: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:affine]
import numpy as np


def affine(lo, hi, bits):
    """Scale and integer zero point of an unsigned grid 0 .. 2^bits - 1 that covers
    [lo, hi] and holds 0 exactly. As it stands a range that does not contain 0 is
    taken as it is.
    """
    scale = (hi - lo) / (2**bits - 1)
    return scale, int(np.rint(-lo / scale))
    # --8<-- [end:affine]


# --8<-- [start:solve_affine]
def solve_affine(lo, hi, bits):
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (2**bits - 1)
    return scale, int(np.rint(-lo / scale))
    # --8<-- [end:solve_affine]


def check_affine(affine):
    """0 comes back as 0, and everything in the range is within one step and a half."""
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.integers(-40, 40), st.integers(1, 40), st.sampled_from((2, 4, 8)))
    def zero_is_exact_and_the_range_is_covered(lo, width, bits):
        hi = lo + width
        scale, zero = affine(float(lo), float(hi), bits)
        assert zero == int(zero), f"the zero point {zero} is no integer"
        assert 0 <= zero <= 2**bits - 1, f"the zero point {zero} of [{lo}, {hi}] is outside of the grid"
        for x in (lo, hi, (lo + hi) / 2):
            q = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
            # half a step of rounding; at the ends of the range the rounded zero point costs one more
            assert abs(scale * (q - zero) - x) <= 1.5 * scale * (1 + 1e-9), (
                f"{x} becomes {scale * (q - zero)}"
            )

    zero_is_exact_and_the_range_is_covered()


# --8<-- [start:product]
def product(x_q, w_q, x_zero):
    """What sum_k (x_q - x_zero) w_q is, from the plain integer product: x_q [K],
    w_q [N, K]. As it stands the zero point is forgotten.
    """
    return w_q @ x_q
    # --8<-- [end:product]


# --8<-- [start:solve_product]
def solve_product(x_q, w_q, x_zero):
    return w_q @ x_q - x_zero * w_q.sum(axis=1)  # the sum is known before x is
    # --8<-- [end:solve_product]


def check_product(product):
    """The integer product of the chapter, for any zero point."""
    rng = np.random.default_rng(0)
    for zero in (0, 3, -128):
        x, w = rng.integers(-128, 128, 6), rng.integers(-127, 128, (4, 6))
        want = [sum(int(b) * (int(a) - zero) for a, b in zip(x, row, strict=True)) for row in w]
        got = product(x, w, zero)
        assert np.array_equal(got, want), f"with zero point {zero} the sums are {want}, not {np.asarray(got)}"


# --8<-- [start:unlucky]
def unlucky():
    """A matrix [[a, b], [c, d]] on which one scale for all four numbers has a
    smaller squared error at 3 bits than a scale for each row.
    """
    return [[1.0, 0.5], [0.1, 0.05]]
    # --8<-- [end:unlucky]


# --8<-- [start:solve_unlucky]
def solve_unlucky():
    return [[1.0, 0.0], [2 / 3, 1 / 3]]  # thirds: on the grid of the first scale, off the second row's own
    # --8<-- [end:solve_unlucky]


def check_unlucky(unlucky):
    """One scale must beat two; levels are -3 .. 3."""
    x = np.array(unlucky(), float)
    assert x.shape == (2, 2), f"the matrix has shape {x.shape}, not (2, 2)"
    assert np.isfinite(x).all(), "every entry must be finite"
    assert np.abs(x).max(axis=1).min() > 0, "every row needs a number that is not 0"

    def error(scale):
        return float(((x - scale * np.clip(np.rint(x / scale), -3, 3)) ** 2).sum())

    one, two = error(np.abs(x).max() / 3), error(np.abs(x).max(axis=1, keepdims=True) / 3)
    assert two > one + 1e-12, f"a scale a row has the error {two:.4f}, one scale for all {one:.4f}"
