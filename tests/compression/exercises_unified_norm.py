"""The exercises of the chapter on Unified Normalization: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:smooth]
import numpy as np


def smooth(window):
    """The statistic of each channel from the last M steps, window [M, C] > 0: a spike
    of x by a factor s in one step may change it by s^(2/M) only. As it stands the
    steps are averaged.
    """
    return window.mean(axis=0)
    # --8<-- [end:smooth]


# --8<-- [start:solve_smooth]
def solve_smooth(window):
    return np.exp(np.log(window).mean(axis=0))
    # --8<-- [end:solve_smooth]


def check_smooth(smooth):
    """Equal steps stay what they are, a spike is damped."""
    v = np.array([0.5, 2.0])
    for M in (2, 4):
        window = np.tile(v, (M, 1))
        assert np.allclose(smooth(window), v, rtol=1e-12), "equal steps must give their value"
        for s in (5.0, 50.0):
            spiked = window.copy()
            spiked[0] *= s**2
            got, want = smooth(spiked) / v, s ** (2 / M)
            assert np.allclose(got, want, rtol=1e-12), (
                f"{M = }, a spike of {s:g}: it grows {np.max(got):.1f} times, allowed is {want:.1f}"
            )


# --8<-- [start:fold]
def fold(weight, bias, running_var, w, b, eps=1e-5):
    """(w', b') of the linear map x w' + b' that gives what the norm before x w + b
    would: weight, bias, running_var [C], w [C, F], b [F]. As it stands the norm's bias
    is lost.
    """
    import numpy as np

    return (weight / np.sqrt(running_var + eps))[:, None] * w, b
    # --8<-- [end:fold]


# --8<-- [start:solve_fold]
def solve_fold(weight, bias, running_var, w, b, eps=1e-5):
    return (weight / np.sqrt(running_var + eps))[:, None] * w, b + bias @ w
    # --8<-- [end:solve_fold]


def check_fold(fold):
    """Norm, then map, against the folded map."""
    from ref.compression.unified_norm import un_inference

    rng = np.random.default_rng(0)
    weight, bias, x = rng.standard_normal((3, 4))
    var, w, b = rng.uniform(0.1, 3, 4), rng.standard_normal((4, 3)), rng.standard_normal(3)
    want = un_inference(x, weight, bias, var) @ w + b
    new_w, new_b = fold(weight, bias, var, w, b)
    assert np.shape(new_w) == (4, 3), f"the matrix has shape {np.shape(new_w)}, not (4, 3)"
    off = np.abs(x @ new_w + new_b - want).max()
    assert off < 1e-12, f"the folded map is off by {off:.3f}"
    zero = np.abs(0 * x @ new_w + new_b - (bias @ w + b)).max()
    assert zero < 1e-12, f"at x = 0 it is off by {zero:.3f}"


# --8<-- [start:gradient]
def gradient(x, g, eps=1e-5):
    """Gradient of sum(g * y) with respect to x [T, C], where y = x / sqrt(m + eps) and m
    is the mean of x^2 over the T tokens of a channel. As it stands m is a constant.
    """
    import numpy as np

    return g / np.sqrt((x**2).mean(axis=0) + eps)
    # --8<-- [end:gradient]


# --8<-- [start:solve_gradient]
def solve_gradient(x, g, eps=1e-5):
    std = np.sqrt((x**2).mean(axis=0) + eps)
    z = x / std
    return (g - (g * z).mean(axis=0) * z) / std
    # --8<-- [end:solve_gradient]


def check_gradient(gradient):
    """The slope, by central differences."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 5, 3))
    loss = lambda x: (g * x / np.sqrt((x**2).mean(axis=0) + 1e-5)).sum()
    got = np.asarray(gradient(x, g))
    assert got.shape == x.shape, f"the gradient has shape {got.shape}, not {x.shape}"
    for i, j in ((0, 0), (3, 1), (4, 2)):
        step = np.zeros_like(x)
        step[i, j] = 1e-5
        slope = (loss(x + step) - loss(x - step)) / 2e-5
        # differences of numbers of about 10 over 2e-5
        assert abs(got[i, j] - slope) < 1e-8, f"at token {i}, channel {j}: {slope:.5f}, not {got[i, j]:.5f}"
