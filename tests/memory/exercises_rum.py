"""The exercises of the chapter on the rotational unit of memory: a stub, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:turn]
import numpy as np


def turn(a, b, v):
    """Turn v in the plane of a and b by the angle from a to b; what is
    orthogonal to both stays. a and b are not parallel. As it stands v only
    gains what a lacks to be b.
    """
    return v + (b / np.linalg.norm(b) - a / np.linalg.norm(a)) * np.linalg.norm(v)
    # --8<-- [end:turn]


# --8<-- [start:solve_turn]
def solve_turn(a, b, v):
    u = a / np.linalg.norm(a)
    w = b - (u @ b) * u
    c, s = u @ b / np.linalg.norm(b), np.linalg.norm(w) / np.linalg.norm(b)
    w = w / np.linalg.norm(w)
    x, y = u @ v, w @ v  # v in the plane's own axes
    return v + (c * x - s * y - x) * u + (s * x + c * y - y) * w
    # --8<-- [end:solve_turn]


def check_turn(turn):
    """Lengths stay, a turns onto b, turning back undoes it, and what is orthogonal to the plane does not
    move.
    """
    rng = np.random.default_rng(0)
    for n in (2, 3, 7):
        a, b, v = rng.standard_normal((3, n))
        unit = lambda x: x / np.linalg.norm(x)
        near = lambda x, y: np.abs(np.asarray(x) - y).max() < 1e-12  # a few roundings of numbers near 1
        assert near(turn(a, b, unit(a)), unit(b)), f"in {n} dimensions, a is not turned onto b"
        assert near(np.linalg.norm(turn(a, b, v)), np.linalg.norm(v)), (
            f"in {n} dimensions, v changes its length"
        )
        assert near(turn(b, a, turn(a, b, v)), v), f"in {n} dimensions, turning back does not give v again"
        if n > 2:
            plane = np.linalg.qr(np.stack([a, b], 1))[0]
            rest = v - plane @ (plane.T @ v)
            assert near(turn(a, b, rest), rest), f"in {n} dimensions, what is orthogonal to a and b moves"


# --8<-- [start:gru_width]
def gru_width(inputs, width):
    """The width of the largest GRU that has no more parameters than a RUM of
    this width. A GRU of width N has 3 (N_x + N) N + 3 N. As it stands it takes
    the same width.
    """
    return width
    # --8<-- [end:gru_width]


# --8<-- [start:solve_gru_width]
def solve_gru_width(inputs, width):
    budget = 2 * (inputs + width) * width + inputs * width + 3 * width
    n = 0
    while 3 * (inputs + n + 1) * (n + 1) + 3 * (n + 1) <= budget:
        n += 1
    return n
    # --8<-- [end:solve_gru_width]


def check_gru_width(gru_width):
    """One more would be too many, by the library's counts."""
    from ref.memory.rum import rum_params
    from ref.models.rnn import gru_params

    for inputs, width in ((10, 100), (1, 7), (64, 250)):
        n, budget = gru_width(inputs, width), rum_params(inputs, width)
        small, large = gru_params(inputs, n), gru_params(inputs, n + 1)
        assert small <= budget, (
            f"{inputs = }, {width = }: {budget:,} parameters, a GRU of width {n} has {small:,}"
        )
        assert large > budget, (
            f"{inputs = }, {width = }: {budget:,} parameters would pay for a GRU of width {n + 1}"
        )
