"""The exercises of the chapter on FPGAs: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:array_cycles]
def array_cycles(M, N, K, R, C):
    """Cycles of an [M, K] by [K, N] product on an array of R x C cells in which the
    results stay. It divides the products by the cells.
    """
    return -(-M * N * K // (R * C))
    # --8<-- [end:array_cycles]


# --8<-- [start:solve_array_cycles]
def solve_array_cycles(M, N, K, R, C):
    folds = -(-M // R) * -(-N // C)
    return folds * (K + (R - 1) + (C - 1))
    # --8<-- [end:solve_array_cycles]


def check_array_cycles(array_cycles):
    """The array simulated register by register."""
    from hw.systolic import simulate_systolic

    for M, N, K, R, C in (
        (2, 2, 3, 2, 2),
        (1, 1, 5, 1, 1),
        (5, 3, 4, 2, 3),
        (4, 9, 2, 4, 4),
        (3, 3, 16, 4, 2),
    ):
        a, b = np.arange(M * K).reshape(M, K), np.arange(K * N).reshape(K, N)
        values, want, *_ = simulate_systolic(a, b, rows=R, cols=C, dataflow="os")
        assert (values == a @ b).all()
        got = array_cycles(M, N, K, R, C)
        assert got == want, f"[{M}, {K}] by [{K}, {N}] on {R} x {C} cells: {want} cycles, not {got}"


# --8<-- [start:fixed_dot]
import numpy as np


def fixed_dot(x, w, shift, width):
    """x . w of raw integers [K] as the unit has it: each product is cut to the
    accumulator by dropping `shift` bits, and sums keep `width` bits, signed. It
    adds exactly and drops the bits at the end.
    """
    return int(np.sum(x * w) >> shift)
    # --8<-- [end:fixed_dot]


# --8<-- [start:solve_fixed_dot]
def solve_fixed_dot(x, w, shift, width):
    total = int(np.sum((x * w) >> shift)) % 2**width  # wrapping sums may be wrapped once
    return total - 2**width if total >= 2 ** (width - 1) else total
    # --8<-- [end:solve_fixed_dot]


def check_fixed_dot(fixed_dot):
    """Bit for bit the library's, which other people's fixed-point arithmetic confirms."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.blocks.fixed import Fixed, fixed_matmul

    acc = Fixed(12, 6)
    fx, fw = Fixed(12, 6), Fixed(10, 5)
    pairs = st.lists(st.tuples(st.integers(-2048, 2047), st.integers(-512, 511)), min_size=1, max_size=6)

    @given(pairs)
    def bits(pairs):
        x, w = np.array(pairs, np.int64).T
        want = int(fixed_matmul(x[None], w[None], fx=fx, fw=fw, facc=acc)[0, 0])
        got = fixed_dot(x, w, fw.frac, acc.width)
        assert got == want, f"{x.tolist()} times {w.tolist()}, 5 bits dropped, 12 kept: {want}, not {got}"

    bits()
