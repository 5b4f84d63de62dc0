"""The exercises of the chapter on ATLAS: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:step]
def step(M, phi, v, gamma, eta, alpha):
    """The memory [dv, D] after a step on a window of c pairs: phi [c, D], v
    [c, dv], their weights gamma [c], the newest last (equations 3 to 5 without
    momentum). As it stands only the newest pair counts.
    """
    error = M @ phi[-1] - v[-1]
    return alpha * M - eta * error[:, None] * phi[-1]
    # --8<-- [end:step]


# --8<-- [start:solve_step]
def solve_step(M, phi, v, gamma, eta, alpha):
    error = phi @ M.T - v  # [c, dv], all at the same memory
    return alpha * M - eta * (gamma[:, None] * error).T @ phi
    # --8<-- [end:solve_step]


def check_step(step):
    """The library's step on the same window."""
    import numpy as np

    from ref.memory.atlas import omega_scan

    rng = np.random.default_rng(0)
    for c in (1, 2, 5):
        M, phi, v = rng.standard_normal((2, 3)), rng.standard_normal((c, 3)), rng.standard_normal((c, 2))
        gamma, last = rng.random(c), np.arange(c) == c - 1
        gates = {"eta": 0.3 * last, "alpha": np.where(last, 0.9, 1.0), "gamma": gamma}
        want = omega_scan(phi, phi, v, **gates, window=c, memory0=M, return_state=True)[1]
        got = step(M, phi, v, gamma, 0.3, 0.9)
        # sums of five products of size 1 to 10
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"a window of {c}: the first row of the memory is {want[0].round(3)}, not {got[0].round(3)}"
        )


# --8<-- [start:features]
import numpy as np


def features(x):
    """phi(x) of x [d], so that phi(x) . phi(y) = 1 + x . y + (x . y)^2 / 2: the
    constant, x, and all products x_i x_j with i <= j. As it stands the products
    do not have the right weights.
    """
    i, j = np.triu_indices(len(x))
    return np.concatenate([[1.0], x, x[i] * x[j]])
    # --8<-- [end:features]


# --8<-- [start:solve_features]
def solve_features(x):
    i, j = np.triu_indices(len(x))
    weight = np.where(i == j, 0.5, 1.0)  # (x . y)^2 holds x_i x_j y_i y_j once for i = j, else twice
    return np.concatenate([[1.0], x, np.sqrt(weight) * x[i] * x[j]])
    # --8<-- [end:solve_features]


def check_features(features):
    """The inner product is the kernel, and no feature is superfluous."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.memory.atlas import feature_count

    numbers = st.lists(st.integers(-3, 3), min_size=2, max_size=2)

    @given(numbers, numbers)
    def the_kernel(x, y):
        x, y = np.array(x, float), np.array(y, float)
        a, b = features(x), features(y)
        assert len(a) == feature_count(2, 2), f"two numbers have {feature_count(2, 2)} features, not {len(a)}"
        want, got = 1 + x @ y + (x @ y) ** 2 / 2, a @ b
        # six terms of at most 81
        assert abs(got - want) < 1e-11, f"x = {x}, y = {y}: the kernel is {want:g}, not {got:g}"

    the_kernel()


# --8<-- [start:polynomial]
def polynomial(sigma):
    """What the iteration makes of a singular value sigma of the scaled matrix,
    in five steps a sigma + b sigma^3 + c sigma^5. As it stands it takes one.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    return a * sigma + b * sigma**3 + c * sigma**5
    # --8<-- [end:polynomial]


# --8<-- [start:solve_polynomial]
def solve_polynomial(sigma):
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma
    # --8<-- [end:solve_polynomial]


def check_polynomial(polynomial):
    """The singular values of the library's iteration on a diagonal matrix."""
    import numpy as np

    from ref.memory.atlas import newton_schulz

    for s in (1e-4, 1e-3, 0.01, 0.2, 0.6):
        pair = np.array([s, np.sqrt(1 - s * s)])
        want = newton_schulz(np.diag(pair))[0, 0]
        got = polynomial(s)
        # five steps whose slope is at most 3.4445 each magnify a rounding by 485
        assert abs(got - want) < 1e-12, f"{s:g} of the norm becomes {want:.4f}, not {got:.4f}"
