"""The exercises of the chapter on EfficientViT: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:cascade]
import numpy as np


def cascade(x, heads):
    """Outputs of all heads side by side: x [N, C] is cut into one slice a head, and each
    head, a function [N, C / h] -> [N, C / h], sees its slice plus what the head before
    made. As it stands the heads do not hear of each other.
    """
    slices = np.split(x, len(heads), axis=1)
    return np.concatenate([heads[i](slices[i]) for i in range(len(heads))], axis=1)
    # --8<-- [end:cascade]


# --8<-- [start:solve_cascade]
def solve_cascade(x, heads):
    out, last = [], 0.0
    for head, s in zip(heads, np.split(x, len(heads), axis=1), strict=True):
        last = head(s + last)
        out.append(last)
    return np.concatenate(out, axis=1)
    # --8<-- [end:solve_cascade]


def check_cascade(cascade):
    """With heads that double, slice i holds sums of powers of two; later slices reach no earlier head."""
    x = np.arange(12.0).reshape(2, 6)
    twice = [lambda s: 2 * s] * 3
    a, b, c = np.split(x, 3, axis=1)
    want = np.concatenate([2 * a, 2 * b + 4 * a, 2 * c + 4 * b + 8 * a], axis=1)
    got = np.asarray(cascade(x.copy(), twice))
    assert got.shape == (2, 6), f"the result has shape {got.shape}, not (2, 6)"
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        assert np.allclose(got[:, part], want[:, part]), (
            f"with heads that double, head {i} makes {want[0, part]} of the first row, not {got[0, part]}"
        )


# --8<-- [start:fold]
def fold(w, gamma, beta, mean, var, eps=1e-5):
    """(w', b') of the one linear map that equals w x [out, in] followed by batch norm with
    stored statistics. As it stands the mean is forgotten.
    """
    import numpy as np

    gain = gamma / np.sqrt(var + eps)
    return w * gain[:, None], beta
    # --8<-- [end:fold]


# --8<-- [start:solve_fold]
def solve_fold(w, gamma, beta, mean, var, eps=1e-5):
    gain = gamma / np.sqrt(var + eps)
    return w * gain[:, None], beta - mean * gain
    # --8<-- [end:solve_fold]


def check_fold(fold):
    """Map and norm one after the other, on drawn vectors."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((3, 4)), rng.standard_normal(4)
    gamma, beta, mean = rng.standard_normal((3, 3))
    var = rng.uniform(0.5, 2, 3)
    new, b = fold(w, gamma, beta, mean, var)
    for name, z in (("0", 0 * x), ("a drawn vector", x)):
        want = gamma * (w @ z - mean) / np.sqrt(var + 1e-5) + beta
        off = np.abs(new @ z + b - want).max()
        assert off < 1e-12, f"for x = {name} the folded map is off by {off:.3f}"


# --8<-- [start:share]
def share(channels, heads, key_dim):
    """Multiply-adds a pixel of the maps to queries, keys and values, over those of plain
    attention, 3 C^2: each head maps C / h channels to 2 k + C / h. As it stands each
    head reads all channels.
    """
    C = channels
    return heads * C * (2 * key_dim + C / heads) / (3 * C * C)
    # --8<-- [end:share]


# --8<-- [start:solve_share]
def solve_share(channels, heads, key_dim):
    C = channels
    return C * (2 * key_dim + C / heads) / (3 * C * C)  # h heads of C / h input channels
    # --8<-- [end:solve_share]


def check_share(share):
    """Counted head by head."""
    for C, h, k in ((128, 4, 16), (384, 4, 16), (192, 3, 16)):
        want = sum((C // h) * (2 * k + C // h) for _ in range(h)) / (3 * C * C)
        got = share(C, h, k)
        assert abs(got - want) < 1e-12, (
            f"{C} channels, {h} heads: {want:.3f} of plain attention, not {got:.3f}"
        )
