"""The exercises of the chapter on SOFT: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:bell]
import numpy as np


def bell(a, b):
    """exp(-|a_i - b_j|^2 / 2) for a [N, d], b [M, d], by one product a b^T. As it stands
    the lengths of the vectors are left out.
    """
    return np.exp(a @ b.T)
    # --8<-- [end:bell]


# --8<-- [start:solve_bell]
def solve_bell(a, b):
    distance = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.exp(-np.maximum(distance, 0) / 2)  # rounding may leave less than 0
    # --8<-- [end:solve_bell]


def check_bell(bell):
    """The library's kernel: at most 1, and the same after a shift of all."""
    from ref.vision.softmax_free import gaussian_kernel

    rng = np.random.default_rng(0)
    for shift in (0.0, 100.0):
        a, b = rng.standard_normal((5, 3)) + shift, rng.standard_normal((4, 3)) + shift
        got, want = np.asarray(bell(a, b)), gaussian_kernel(a, b)
        assert got.shape == want.shape, f"the kernel has shape {got.shape}, not {want.shape}"
        off = np.abs(got - want).max()
        # distances of numbers near 100: eps 100^2 times a few
        assert off < 1e-10, f"vectors near {shift:g}: off by {off:.3g}"


# --8<-- [start:inverse]
def inverse(P, steps):
    """Newton's iteration for the inverse of a symmetric P [m, m] with positive
    eigenvalues, from V = alpha P, alpha = 1.8 / (largest row sum of |P|)^2, by products
    alone. As it stands one step is taken.
    """
    import numpy as np

    V = 1.8 / np.abs(P).sum(axis=1).max() ** 2 * P
    return 2 * V - V @ P @ V
    # --8<-- [end:inverse]


# --8<-- [start:solve_inverse]
def solve_inverse(P, steps):
    V = 1.8 / np.abs(P).sum(axis=1).max() ** 2 * P
    for _ in range(steps):
        V = 2 * V - V @ P @ V
    return V
    # --8<-- [end:solve_inverse]


def check_inverse(inverse):
    """The closed form (3) after any number of steps; the inverse after many."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    P = q * np.array([2.0, 1.0, 0.7, 0.4, 0.2]) @ q.T
    alpha = 1.8 / np.abs(P).sum(axis=1).max() ** 2
    for steps in (1, 3, 20):
        left = np.eye(5) - np.linalg.matrix_power(np.eye(5) - alpha * P @ P, 2**steps)
        want, got = np.linalg.inv(P) @ left, np.asarray(inverse(P.copy(), steps))
        assert got.shape == (5, 5), f"the result has shape {got.shape}, not (5, 5)"
        off = np.abs(got - want).max()
        assert off < 1e-9, f"after {steps} steps it is off by {off:.3g}"


# --8<-- [start:pays_from]
def pays_from(m, d, steps):
    """The least number of tokens N at which 3 N m d + 2 m^2 d + 2 steps m^3 products
    are fewer than softmax attention's 2 N^2 d. As it stands the inverse is free.
    """
    return 3 * m // 2 + 1
    # --8<-- [end:pays_from]


# --8<-- [start:solve_pays_from]
def solve_pays_from(m, d, steps):
    N = 1
    while 3 * N * m * d + 2 * m * m * d + 2 * steps * m**3 >= 2 * N * N * d:
        N += 1
    return N
    # --8<-- [end:solve_pays_from]


def check_pays_from(pays_from):
    """By the library's count: fewer there, not one token before."""
    from ref.vision.softmax_free import soft_cost

    for m, d, steps in ((49, 32, 20), (16, 64, 6)):
        N = pays_from(m, d, steps)
        fewer = lambda n, m=m, d=d, s=steps: soft_cost(n, m, d, heads=1, iters=s).macs < 2 * n * n * d
        assert fewer(N), f"{m} landmarks of {d}, {steps} steps: at {N} tokens it does not pay yet"
        assert not fewer(N - 1), f"{m} landmarks of {d}, {steps} steps: {N - 1} tokens would do"
