"""The exercises of the chapter on SHViT: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:one_norm]
import numpy as np


def one_norm(x, eps=1e-5):
    """A map x [H, W, P] less its mean, over its standard deviation, one of each for all
    pixels and channels. As it stands every pixel is normalised by itself.
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    # --8<-- [end:one_norm]


# --8<-- [start:solve_one_norm]
def solve_one_norm(x, eps=1e-5):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + eps)
    # --8<-- [end:solve_one_norm]


def check_one_norm(one_norm):
    """The library's group norm of one group."""
    from ref.vision.shvit import group_norm_1

    rng = np.random.default_rng(0)
    for shape in ((2, 3, 4), (1, 5, 2)):
        x = rng.standard_normal(shape) * 3 + 1
        got, want = np.asarray(one_norm(x)), group_norm_1(x[None], np.ones(shape[2]), np.zeros(shape[2]))[0]
        assert got.shape == shape, f"the result has shape {got.shape}, not {shape}"
        off = np.abs(got - want).max()
        assert off < 1e-12, f"a map of {shape}: off by {off:.3f}"


# --8<-- [start:absorb]
def absorb(w):
    """A kernel that gives x + w * x for depthwise kernels w [C, k, k], k odd. As it stands
    the identity is lost.
    """
    return w
    # --8<-- [end:absorb]


# --8<-- [start:solve_absorb]
def solve_absorb(w):
    new = w.copy()
    new[:, w.shape[1] // 2, w.shape[2] // 2] += 1
    return new
    # --8<-- [end:solve_absorb]


def check_absorb(absorb):
    """Both convolved, zeros outside."""
    from ref.blocks.conv import conv2d

    rng = np.random.default_rng(0)
    for k in (1, 3, 5):
        w, x = rng.standard_normal((2, k, k)), rng.standard_normal((1, 4, 5, 2))
        dw = lambda w, x=x, k=k: conv2d(x, np.asarray(w)[:, None], padding=k // 2, groups=2)
        off = np.abs(dw(absorb(w.copy())) - (x + dw(w))).max()
        assert off < 1e-12, f"a kernel of {k} x {k}: off by {off:.3f}"


# --8<-- [start:numbers]
def numbers(channels, attending, key_dim):
    """(one head on some channels, all heads on all): numbers of query, key, value and
    output that attention reads and writes for a token. As it stands the one head
    attends with all channels.
    """
    return 2 * key_dim + 2 * channels, 4 * channels
    # --8<-- [end:numbers]


# --8<-- [start:solve_numbers]
def solve_numbers(channels, attending, key_dim):
    return 2 * key_dim + 2 * attending, 4 * channels
    # --8<-- [end:solve_numbers]


def check_numbers(numbers):
    """The sizes of the released models: of q, k, v and the output, 16 + 16 + P + P."""
    from ref.vision.shvit import VARIANTS, shvit_config

    for name in VARIANTS:
        cfg = shvit_config(name)
        for C, P, k in list(zip(cfg.dims, cfg.pdims, cfg.qk_dims, strict=True))[1:]:
            got, want = tuple(numbers(C, P, k)), (k + k + P + P, C + C + C + C)
            assert got == want, f"{name.upper()}, {C} channels, {P} attending: {want}, not {got}"
