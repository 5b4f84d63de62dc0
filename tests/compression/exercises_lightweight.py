"""The exercises of the chapter on lightweight blocks: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:mix]
import numpy as np


def mix(x):
    """The real part of the Fourier transform over both axes of x [L, D], in real
    numbers. As it stands the sines are missing.
    """
    L, D = x.shape
    angle = lambda n: 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
    return np.cos(angle(L)) @ x @ np.cos(angle(D))
    # --8<-- [end:mix]


# --8<-- [start:solve_mix]
def solve_mix(x):
    L, D = x.shape
    angle = lambda n: 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
    return np.cos(angle(L)) @ x @ np.cos(angle(D)) - np.sin(angle(L)) @ x @ np.sin(angle(D))
    # --8<-- [end:solve_mix]


def check_mix(mix):
    """The library's transform."""
    from ref.compression.lightweight import fourier_mix

    rng = np.random.default_rng(0)
    for L, D in ((1, 4), (3, 3), (5, 8)):
        x = rng.standard_normal((L, D))
        got = np.asarray(mix(x))
        assert got.shape == x.shape, f"the result has shape {got.shape}, not {x.shape}"
        off = np.abs(got - fourier_mix(x)).max()
        # 40 products of numbers near 1
        assert off < 1e-10, f"{L} tokens of {D} channels: off by {off:.3f}"


# --8<-- [start:short]
def short(u, w):
    """Averages of neighbours: u [L], w [k], k odd; the weights are a softmax of w, and
    what lies outside counts as 0. As it stands the weights are w itself.
    """
    import numpy as np

    k, L = len(w), len(u)
    padded = np.pad(u, k // 2)
    return np.array([padded[t : t + k] @ w for t in range(L)])
    # --8<-- [end:short]


# --8<-- [start:solve_short]
def solve_short(u, w):
    k, L = len(w), len(u)
    p = np.exp(w - w.max())
    p /= p.sum()
    padded = np.pad(u, k // 2)
    return np.array([padded[t : t + k] @ p for t in range(L)])
    # --8<-- [end:solve_short]


def check_short(short):
    """The library's convolution; a constant stays itself away from the ends."""
    from ref.compression.lightweight import light_conv

    rng = np.random.default_rng(0)
    for k in (1, 3, 5):
        u, w = rng.standard_normal(7), rng.standard_normal(k)
        got, want = np.asarray(short(u, w)), light_conv(u[:, None], w[None])[:, 0]
        assert got.shape == want.shape, f"the result has shape {got.shape}, not {want.shape}"
        one = short(np.ones(7), w)[3]
        assert abs(one - 1) < 1e-12, f"a kernel of {k}: a constant 1 becomes {one:.3f}"
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"a kernel of {k}: off by {np.abs(got - want).max():.3f}"
        )


# --8<-- [start:share]
def share(channels):
    """Multiply-adds of a depthwise 3 x 3 convolution followed by a map of all channels
    to as many, over those of a full 3 x 3 convolution. As it stands the map is free.
    """
    return 1 / channels
    # --8<-- [end:share]


# --8<-- [start:solve_share]
def solve_share(channels):
    return 1 / channels + 1 / 9
    # --8<-- [end:solve_share]


def check_share(share):
    """Counted at one pixel."""
    for c in (1, 16, 256):
        want = (9 * c + c * c) / (9 * c * c)
        got = share(c)
        assert abs(got - want) < 1e-12, (
            f"{c} channels: {9 * c + c * c:,} of {9 * c * c:,}, {want:.4f}, not {got:.4f}"
        )
