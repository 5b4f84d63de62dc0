"""EfficientViT: laws on ref, golden vectors, bad inputs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

import ref
from ref.vision.efficientvit import EfficientViTConfig
from tests.golden_runner import backward, call_args, compare_gradients, golden, run
from tests.laws import law_tests, rejects
from tests.vision import laws_efficientvit
from tests.vision.pyramid import config_of, released

globals().update(law_tests(laws_efficientvit))
E = ref.efficientvit


@golden("efficientvit")
def test_efficientvit_golden_ref(case):
    as_released = {**vars(E), "efficientvit_forward": released(E.efficientvit_forward)}
    run(case, SimpleNamespace(**as_released), build={"cfg": config_of(EfficientViTConfig)})


@golden("efficientvit", only=("cascaded_group_attention",))
def test_efficientvit_golden_gradients_ref(case):
    """The stored gradients, by ref's own backward pass; case 2 stores one that its own outputs contradict.

    PyTorch's batch norm in inference form returns wrong gradients for a single image whose map and cotangent
    lie differently in memory. A stored gradient of x that is not ours must not be the slope either.
    """
    args, grads = call_args(case, E.cascaded_group_attention), backward(case, E)
    x, dx, dy = args.pop("x"), grads["x"], case[case.meta["cotangents"][0]]
    key = case.meta["grads"]["x"]
    want, (rtol, atol) = case[key], case.meta["tol"][key]
    wrong = len(x) == 1 and not np.allclose(dx, want, rtol=rtol, atol=atol)
    compare_gradients(case, grads, but=("x",) if wrong else ())
    if wrong:
        along = (want - dx) / np.linalg.norm(want - dx)
        value = lambda h: np.sum(dy * E.cascaded_group_attention(x + h * along, **args))
        slope = (value(1e-6) - value(-1e-6)) / 2e-6
        # rounding of 256 terms near 1 over the step; along this direction they differ by their distance
        assert abs(np.sum(dx * along) - slope) < 1e-6 < 0.1 < abs(np.sum(want * along) - slope)


X, PARAMS = laws_efficientvit.attention(np.random.default_rng(0), 2, 4, (3, 3))
SMALL, OPTIONS = laws_efficientvit.SMALL, laws_efficientvit.OPTIONS
NET = E.init_efficientvit(np.random.default_rng(0), SMALL, image=32)
attend = lambda x=X, p=PARAMS, **o: E.cascaded_group_attention(x, p, **{**OPTIONS, **o})
BAD = {
    "heads": (lambda: attend(X[..., :7]), "heads must divide the width 7, got 2"),
    "few_kernels": (lambda: attend(kernels=(5,)), "kernels must be odd, one for each of 2 heads"),
    "even_kernel": (lambda: attend(kernels=(4, 3)), "kernels must be odd"),
    "other_kernel": (lambda: attend(kernels=(3, 3)), r"dw\.shape\[2\] = 5, but must be 3"),
    "key_dim": (lambda: attend(key_dim=5), r"qkv\.shape\[0\] = 12, but must be 14"),
    "resolution": (lambda: attend(X[:, :2]), r"bias must be \[2, 6\] for a map of 2 x 3"),
    "map": (lambda: attend(X[0]), "x must have shape"),
    "gradient": (
        lambda: E.cascaded_group_attention_backward(X[:1], X, PARAMS, **OPTIONS),
        r"x\.shape\[0\] = 2, but axis B is 1",
    ),
    "square": (lambda: E.window_attention(X[:, :2], PARAMS, **OPTIONS), "x must be a square map"),
    "window": (lambda: E.window_attention(X, PARAMS, window=0, **OPTIONS), "window at least 1"),
    "image_size": (
        lambda: E.efficientvit_forward(np.ones((1, 48, 48, 3)), NET, SMALL),
        r"bias must be \[2, 9\] for a map of 3 x 3",
    ),
    "image_small": (
        lambda: E.efficientvit_forward(np.ones((1, 15, 16, 3)), NET, SMALL),
        "at least 16 pixels",
    ),
    "image_grey": (lambda: E.efficientvit_forward(np.ones((1, 32, 32, 1)), NET, SMALL), "must be 3"),
    "side": (lambda: E.attention_bias_index(0), "height and width must be at least 1"),
    "name": (lambda: E.efficientvit_config("m6"), "name must be one of m0, m1, m2, m3, m4, m5"),
    "config_heads": (lambda: replace(SMALL, heads=(3, 2, 3)), "heads must divide the width 16, got 3"),
    "config_kernels": (lambda: replace(SMALL, kernels=(3, 3)), "one for each of 3 heads"),
    "config_stages": (lambda: replace(SMALL, depths=(1, 2)), "depths must hold three positive numbers"),
    "stem": (
        lambda: E.init_efficientvit(np.random.default_rng(0), replace(SMALL, dims=(12, 24, 24)), image=32),
        r"dims\[0\] must be a multiple of 8",
    ),
    "folded": (
        lambda: E.conv_bn(np.ones((1, 32, 32, 3)), E.fold_efficientvit(NET).stem[0], train=True),
        "p is folded",
    ),
}

test_efficientvit_rejects_bad_input = rejects(BAD)
