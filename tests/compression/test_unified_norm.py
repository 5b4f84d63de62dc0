"""Unified Normalization: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_unified_norm
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_unified_norm))


@golden("unified_norm")
def test_unified_norm_golden_ref(case):
    run(case, ref.unified_norm)


U = ref.unified_norm
X, W, B, S = np.ones((2, 3, 4)), np.ones(4), np.zeros(4), U.init_un(4)
PAIR = U.un_train_forward(X, W, B, S)
VAR = np.ones(4)
BAD = {
    "channels": (lambda: U.un_train_forward(X, W, B, U.init_un(5)), r"running_var\.shape\[0\] = 5"),
    "weight": (lambda: U.un_train_forward(X, np.ones(3), B, S), r"weight\.shape\[0\] = 3"),
    "window": (lambda: U.init_un(4, window=0), "window and window_backward must be at least 1"),
    "back": (lambda: U.init_un(4, window_backward=0), "must be at least 1"),
    "padded": (lambda: U.un_train_forward(X, W, B, S, mask=np.zeros((2, 3), bool)), "at least one token"),
    "empty": (lambda: U.un_train_forward(X[:0], W, B, S), "at least one token"),
    "mask": (lambda: U.un_train_forward(X, W, B, S, mask=np.ones((2, 3))), "mask must be boolean"),
    "mask_shape": (lambda: U.un_train_forward(X, W, B, S, mask=np.ones((2, 4), bool)), r"mask\.shape\[1\]"),
    "momentum": (lambda: U.un_train_forward(X, W, B, S, momentum=1.0), r"momentum must be in \(0, 1\)"),
    "step": (lambda: U.un_train_backward(X, PAIR[1], S), "cache is of step 1, but state of step 0"),
    "cotangent": (lambda: U.un_train_backward(X[:1], PAIR[1], PAIR[2]), "B is 1 in grad_y"),
    "steps": (lambda: U.un_train_steps(X[None][:0], X[None][:0], W, B, S), "at least one step"),
    "inference": (lambda: U.un_inference(X, W, B, np.ones(3)), r"running_var\.shape\[0\] = 3"),
    "next": (lambda: U.fuse_un_into_next_linear(W, B, VAR, np.ones((3, 2)), B), r"w\.shape\[0\] = 3"),
    "previous": (lambda: U.fuse_un_into_previous_linear(W, B, VAR, np.ones((4, 3)), B), r"w\.shape\[1\] = 3"),
    "negative": (lambda: U.amgm_gap(-np.ones((2, 2))), "no negative number or NaN"),
    "kind": (lambda: U.norm_cost(1, 1, kind="batch"), "kind must be"),
}

test_unified_norm_rejects_bad_input = rejects(BAD)


def test_unified_norm_dead_channel_stays_finite():
    """A channel of zeros has second moment 0 and a geometric mean of 0; eps keeps the division finite."""
    x = X.copy()
    x[..., 0] = 0
    steps = U.un_train_steps(np.stack([x] * 6), np.stack([x] * 6), W, B, S, warmup=0)
    assert all(np.isfinite(a).all() for a in (*steps[:4], *steps[4]))
    assert not steps[0][..., 0].any()
