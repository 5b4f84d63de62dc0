"""The exercises of the chapter on ViDiT-Q: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:steps]
import numpy as np


def steps(x, bits):
    """(delta, zero), both [B, N, 1]: a grid of 2^bits levels for every token of every
    input, x [B, N, C]. As it stands tokens of the same place share one over the
    batch, and 0 may fall between two levels.
    """
    lo, hi = x.min(axis=(0, 2), keepdims=True), x.max(axis=(0, 2), keepdims=True)
    delta = (hi - lo) / (2**bits - 1)
    return delta + 0 * x[..., :1], np.rint(-lo / delta) + 0 * x[..., :1]
    # --8<-- [end:steps]


# --8<-- [start:solve_steps]
def solve_steps(x, bits):
    lo = np.minimum(x.min(axis=2, keepdims=True), 0)
    hi = np.maximum(x.max(axis=2, keepdims=True), 0)
    delta = (hi - lo) / (2**bits - 1)
    return delta, np.rint(-lo / delta)
    # --8<-- [end:solve_steps]


def check_steps(steps):
    """The library's grids; another input in the batch changes nothing."""
    from ref.compression.vidit_q import quant_params

    x = np.random.default_rng(0).standard_normal((3, 4, 6)) * np.array([1, 5, 0.1])[:, None, None]
    x[2] += 1.0  # all positive: 0 lies outside of its range
    for bits in (4, 8):
        want = quant_params(x, bits=bits, granularity="token")
        for name, got, right in zip(("delta", "zero"), steps(x, bits), (want.delta, want.zero), strict=True):
            assert np.shape(got) == (3, 4, 1), f"{name} has shape {np.shape(got)}, not (3, 4, 1)"
            for b in range(3):
                off = np.abs(got[b] - right[b]).max()
                assert off < 1e-9, f"{bits} bits, input {b}: {name} is off by {off:.3g}"


# --8<-- [start:rotate]
def rotate(x, signs):
    """(x * signs) H / sqrt(n) for x [..., n], n a power of two, H Sylvester's Hadamard
    matrix, in n log2 n additions. As it stands sums and differences of neighbours
    are taken once.
    """
    import numpy as np

    y = (x * signs).reshape(*x.shape[:-1], -1, 2)
    y = np.stack([y[..., 0] + y[..., 1], y[..., 0] - y[..., 1]], axis=-1)
    return y.reshape(x.shape) / np.sqrt(2)
    # --8<-- [end:rotate]


# --8<-- [start:solve_rotate]
def solve_rotate(x, signs):
    y, n, half = x * signs, x.shape[-1], 1
    while half < n:
        pairs = y.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return y / np.sqrt(n)
    # --8<-- [end:solve_rotate]


def check_rotate(rotate):
    """The library's rotation: one large channel is spread over all."""
    from ref.compression.vidit_q import hadamard_transform

    rng = np.random.default_rng(0)
    for n in (2, 8, 16):
        signs = rng.choice([-1.0, 1.0], n)
        one = np.zeros((1, n))
        one[0, 1] = 8.0
        got = np.asarray(rotate(one, signs))
        spread = np.abs(got).max()
        assert abs(spread - 8 / np.sqrt(n)) < 1e-12, (
            f"an 8 among {n} channels becomes {spread:.3f}, not {8 / np.sqrt(n):.3f}"
        )
        x = rng.standard_normal((2, 3, n))
        want = hadamard_transform(x, signs=signs)
        assert np.allclose(rotate(x, signs), want, rtol=0, atol=1e-12), f"{n} channels: not the same rotation"


# --8<-- [start:balance]
def balance(act_max, w_max):
    """The factor of each channel, so that x / s and W s have the same largest entry
    in it. As it stands the activations give everything to the weights.
    """
    return act_max
    # --8<-- [end:balance]


# --8<-- [start:solve_balance]
def solve_balance(act_max, w_max):
    return np.sqrt(act_max / w_max)  # alpha = 1/2 in equation (4)
    # --8<-- [end:solve_balance]


def check_balance(balance):
    """Both sides meet, for any sizes."""
    act, w = np.array([90.0, 1.0, 0.02]), np.array([0.1, 0.3, 0.2])
    s = np.asarray(balance(act, w))
    assert s.shape == act.shape, f"the factors have shape {s.shape}, not {act.shape}"
    for c in range(3):
        x, y = act[c] / s[c], w[c] * s[c]
        assert abs(x - y) < 1e-9 * y, f"channel {c}: activations reach {x:.3f}, weights {y:.3f}"
