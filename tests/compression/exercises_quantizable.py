"""The exercises of the chapter on quantizable transformers: stubs for the reader, what their solutions must
do, solutions.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:enough]
import numpy as np


def enough(T, gamma):
    """The least gap between the logit of a sink and T - 1 equal others at which
    clipped softmax (zeta = 1) makes all others exactly 0. As it stands the others
    are forgotten in the denominator.
    """
    r = -gamma / (1 - gamma)
    return np.log(1 / r)
    # --8<-- [end:enough]


# --8<-- [start:solve_enough]
def solve_enough(T, gamma):
    r = -gamma / (1 - gamma)
    return np.log(1 / r - (T - 1))
    # --8<-- [end:solve_enough]


def check_enough(enough):
    """A hair more closes the head, a hair less does not."""
    from ref.compression.quantizable import clipped_softmax

    for T, alpha in ((8, 0.5), (16, 0.25), (5, 0.9)):
        gap = float(enough(T, -alpha / T))
        for more in (1e-6, -1e-6):
            others = clipped_softmax(np.r_[gap + more, np.zeros(T - 1)], gamma=-alpha / T)[1:]
            closed = not others.any()
            assert closed == (more > 0), (
                f"{T = }, {alpha = }: at a gap of {gap + more:.4f} the others have {others.max():.1e} each"
            )


# --8<-- [start:backward]
def backward(p, g, gamma):
    """Gradient with respect to the logits of clip((1 - gamma) p + gamma, 0, 1), p their
    softmax [T], g the gradient of the result. As it stands nothing was clipped.
    """
    g = (1 - gamma) * g
    return p * (g - (p * g).sum())
    # --8<-- [end:backward]


# --8<-- [start:solve_backward]
def solve_backward(p, g, gamma):
    stretched = (1 - gamma) * p + gamma
    g = (1 - gamma) * g * ((stretched >= 0) & (stretched <= 1))
    return p * (g - (p * g).sum())
    # --8<-- [end:solve_backward]


def check_backward(backward):
    """The library's gradient; a row that is clipped everywhere has none."""
    from ref.blocks.softmax import softmax
    from ref.compression.quantizable import clipped_softmax_vjp

    rng = np.random.default_rng(0)
    for gamma in (-0.05, -0.2, -0.5):
        s, g = 2 * rng.standard_normal((2, 6))
        got, want = backward(softmax(s), g, gamma), clipped_softmax_vjp(s, g, gamma=gamma, zeta=1.0)
        assert np.shape(got) == (6,), f"the gradient has shape {np.shape(got)}, not (6,)"
        off = np.abs(got - want).max()
        assert off < 1e-12, f"{gamma = }: off by {off:.3f}"


# --8<-- [start:lone]
def lone(n):
    """Kurtosis of n numbers of which one is large and all others are 0: the mean of
    (x - mean)^4 over the squared variance, the variance with n - 1 below. As it
    stands it is that of normal numbers.
    """
    return 3.0
    # --8<-- [end:lone]


# --8<-- [start:solve_lone]
def solve_lone(n):
    # for a lone 1 the mean is 1 / n and the variance 1 / n; the fourth moment is that of two kinds of numbers
    return n * ((1 - 1 / n) ** 4 + (n - 1) / n**4)
    # --8<-- [end:solve_lone]


def check_lone(lone):
    """The library's metric, whatever the size of the large number."""
    from ref.compression.quantizable import outlier_metrics

    for n in (4, 50, 1000):
        x = np.zeros((1, n))
        x[0, 0] = 1e4
        want, got = outlier_metrics(x).kurtosis[0], lone(n)
        # the metric adds 1e-6 to the denominator, of at least 1e10
        assert abs(got - want) < 1e-9 * want, f"one of {n} numbers: the kurtosis is {want:.2f}, not {got:.2f}"
