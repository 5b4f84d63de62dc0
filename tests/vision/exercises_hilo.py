"""The exercises of the chapter on HiLo: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:means]
import numpy as np


def means(x, s):
    """Mean of every s x s window of a map x [H, W, C]: [H / s, W / s, C]. As it stands
    one pixel of each window stands for all.
    """
    return x[::s, ::s]
    # --8<-- [end:means]


# --8<-- [start:solve_means]
def solve_means(x, s):
    H, W, C = x.shape
    return x.reshape(H // s, s, W // s, s, C).mean(axis=(1, 3))
    # --8<-- [end:solve_means]


def check_means(means):
    """The library's pooling."""
    from ref.vision.hilo import avg_pool_tokens

    rng = np.random.default_rng(0)
    for H, W, s in ((4, 6, 2), (6, 3, 3), (5, 4, 1)):
        x = rng.standard_normal((H, W, 2))
        got, want = np.asarray(means(x, s)), avg_pool_tokens(x[None], s)[0]
        assert got.shape == want.shape, f"{H} x {W} in windows of {s}: the shape is {got.shape}"
        off = np.abs(got - want).max()
        assert off < 1e-12, f"{H} x {W} in windows of {s}: off by {off:.3f}"


# --8<-- [start:near]
def near(q, k, v, s):
    """Attention of one head among the s x s tokens of each window: q, k, v [H, W, d] ->
    [H, W, d]. As it stands every token sees the whole map.
    """
    import numpy as np

    H, W, d = q.shape
    flat = [x.reshape(H * W, d) for x in (q, k, v)]
    p = np.exp(flat[0] @ flat[1].T / np.sqrt(d))
    return (p / p.sum(axis=1, keepdims=True) @ flat[2]).reshape(H, W, d)
    # --8<-- [end:near]


# --8<-- [start:solve_near]
def solve_near(q, k, v, s):
    H, W, d = q.shape
    out = np.zeros((H, W, d))
    for i in range(0, H, s):
        for j in range(0, W, s):
            a, b, c = (x[i : i + s, j : j + s].reshape(-1, d) for x in (q, k, v))
            p = np.exp(a @ b.T / np.sqrt(d))
            out[i : i + s, j : j + s] = (p / p.sum(axis=1, keepdims=True) @ c).reshape(s, s, d)
    return out
    # --8<-- [end:solve_near]


def check_near(near):
    """The library's Hi-Fi attention with maps that change nothing."""
    from ref.vision.hilo import hifi_attention

    rng, d = np.random.default_rng(0), 3
    x = rng.standard_normal((4, 6, 3 * d))
    parts = np.split(x, 3, axis=-1)
    # columns [q, k, v] of a map from 3 d channels to 3 d: the identity
    want = hifi_attention(x[None], np.eye(3 * d), None, np.eye(d), None, num_heads=1, window=2)[0]
    got = np.asarray(near(*parts, 2))
    assert got.shape == want.shape, f"the result has shape {got.shape}, not {want.shape}"
    far = parts[1].copy()
    far[0, 0] += 5.0
    moved = np.abs(np.asarray(near(parts[0], far, parts[2], 2)) - got)[2:].max()
    assert moved == 0, "a key of the first window changes outputs of the windows below"
    off = np.abs(got - want).max()
    assert off < 1e-12, f"off by {off:.3f}"


# --8<-- [start:best_window]
def best_window(tokens):
    """The window s, a real number, at which s^2 + tokens / s^2 is least: what Hi-Fi and
    Lo-Fi attention cost a token and channel.
    """
    return tokens**0.5
    # --8<-- [end:best_window]


# --8<-- [start:solve_best_window]
def solve_best_window(tokens):
    return tokens**0.25  # s^2 and tokens / s^2 are equal there
    # --8<-- [end:solve_best_window]


def check_best_window(best_window):
    """One percent larger or smaller is never better."""
    for tokens in (196, 3136, 10_000):
        s = best_window(tokens)
        cost = lambda s, n=tokens: s**2 + n / s**2
        for other in (0.99 * s, 1.01 * s):
            assert cost(other) >= cost(s), f"{tokens:,} tokens: s = {other:.2f} costs less than s = {s:.2f}"
