"""The exercises of the chapter on AdaptFormer: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:branch]
import numpy as np


def branch(x, w_down, b_down, w_up, b_up, s):
    """The branch's output for tokens x [N, d], times the factor s. As it stands the
    upper bias is not scaled.
    """
    return s * np.maximum(x @ w_down + b_down, 0) @ w_up + b_up
    # --8<-- [end:branch]


# --8<-- [start:solve_branch]
def solve_branch(x, w_down, b_down, w_up, b_up, s):
    return s * (np.maximum(x @ w_down + b_down, 0) @ w_up + b_up)
    # --8<-- [end:solve_branch]


def check_branch(branch):
    """The library's branch; with s = 0 nothing is added."""
    from ref.training.adaptformer import AdapterParams, adapter

    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6))
    p = [rng.standard_normal(s) for s in ((6, 2), (2,), (2, 6), (6,))]
    for s in (0.1, 1.0, 0.0):
        got, want = np.asarray(branch(x, *p, s)), adapter(x, AdapterParams(*p), scale=s)
        assert got.shape == want.shape, f"the output has shape {got.shape}, not {want.shape}"
        off = np.abs(got - want).max()
        assert off < 1e-12, f"{s = }: off by {off:.3f}"


# --8<-- [start:gradients]
def gradients(x, w_down, b_down, w_up, g, s):
    """(grad_w_down, grad_w_up) for the gradient g [N, d] of the branch's output, tokens
    x [N, d]. As it stands the ReLU lets everything through.
    """
    import numpy as np

    h = np.maximum(x @ w_down + b_down, 0)
    return s * x.T @ (g @ w_up.T), s * h.T @ g
    # --8<-- [end:gradients]


# --8<-- [start:solve_gradients]
def solve_gradients(x, w_down, b_down, w_up, g, s):
    u = x @ w_down + b_down
    return s * x.T @ ((g @ w_up.T) * (u > 0)), s * np.maximum(u, 0).T @ g
    # --8<-- [end:solve_gradients]


def check_gradients(gradients):
    """The library's gradients; at the start w_up is 0 and only the upper half moves."""
    from ref.training.adaptformer import AdapterParams, adapter_backward

    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((2, 7, 6))
    w_down, b_down = rng.standard_normal((6, 3)), rng.standard_normal(3)
    for w_up in (rng.standard_normal((3, 6)), np.zeros((3, 6))):
        _, want = adapter_backward(x, AdapterParams(w_down, b_down, w_up, np.zeros(6)), g, scale=0.1)
        got = gradients(x, w_down, b_down, w_up, g, 0.1)
        for name, a, b in zip(("w_down", "w_up"), got, (want.w_down, want.w_up), strict=True):
            off = np.abs(np.asarray(a) - b).max()
            assert off < 1e-12, f"the gradient of {name} is off by {off:.3f}"


# --8<-- [start:trained]
def trained(width, depth, bottleneck, classes):
    """Numbers that train: branches with their biases in all blocks, and a classifier
    with its bias. As it stands there are no biases.
    """
    return depth * 2 * width * bottleneck + width * classes
    # --8<-- [end:trained]


# --8<-- [start:solve_trained]
def solve_trained(width, depth, bottleneck, classes):
    return depth * (2 * width * bottleneck + bottleneck + width) + (width + 1) * classes
    # --8<-- [end:solve_trained]


def check_trained(trained):
    """The library's count for ViT-B."""
    from ref.training.adaptformer import ViTSize, count_trainable

    for r, classes in ((64, 100), (1, 10), (256, 1000)):
        want = count_trainable(ViTSize(), "adapter", bottleneck=r, num_classes=classes)
        got = trained(768, 12, r, classes)
        assert got == want, f"a bottleneck of {r} and {classes} classes: {want:,} numbers, not {got:,}"
