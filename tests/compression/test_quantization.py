"""Quantisation: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_quantization
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_quantization))


@golden("quantization")
def test_quantization_golden_ref(case):
    run(case, ref.quantization)


Q = ref.quantization
X, I = np.ones((2, 3)), np.ones((2, 3), np.int8)
ONE = np.array([2**30], np.int32)
LINEAR = {"x_zero": 0, "multiplier": ONE, "shift": 0 * ONE, "out_zero": 0}
BAD = {
    "bits": (lambda: Q.affine_params(0.0, 1.0, bits=1), "bits must be at least 2"),
    "grid": (lambda: Q.quantize(X, np.ones(()), np.zeros((), int), qmin=3, qmax=3), "qmin must be below"),
    "scale": (
        lambda: Q.quantize(X, np.zeros(()), np.zeros((), int), qmin=0, qmax=3),
        "scale must be positive",
    ),
    "nan": (lambda: Q.quantize(X * np.nan, np.ones(()), np.zeros((), int), qmin=0, qmax=3), "must be finite"),
    "axis": (lambda: Q.quantize(X, np.ones(2), np.zeros(2, int), qmin=0, qmax=3, axis=2), "axis must be in"),
    "empty": (lambda: Q.mse_range(X[:0]), "x must not be empty"),
    "nan_range": (lambda: Q.kl_range(X * np.nan), "x must be finite"),
    "bins": (lambda: Q.kl_range(X, bits=8, bins=100), "bins must be at least 128"),
    "floats": (lambda: Q.integer_linear(X, I, None, **LINEAR), "must hold integers"),
    "inner": (lambda: Q.integer_linear(I, I[:, :2], None, **LINEAR), r"w_q\.shape\[1\] = 2"),
    "long": (
        lambda: Q.integer_linear(
            np.ones((1, 70_000), np.int8), np.ones((1, 70_000), np.int8), None, **LINEAR
        ),
        "K must be below 66",
    ),
    "ternary": (lambda: Q.ternarize(X[:0]), "w must not be empty"),
    "binary": (lambda: Q.binarize(X * np.inf), "w must be finite"),
    "positive": (lambda: Q.i_exp(X), "must not be positive"),
    "positive_int": (lambda: Q.i_exp_int(I, 1e-3), "must not be positive"),
    "int_float": (lambda: Q.i_gelu_int(X, 1e-3), "q must hold integers"),
    "coarse": (lambda: Q.i_gelu_int(I, 0.5), "scale must be in"),
    "norm": (lambda: Q.i_layer_norm(X, np.ones(2), np.ones(3)), r"weight\.shape\[0\] = 2"),
    "budget": (
        lambda: Q.hessian_bit_plan(np.ones(1), np.array([80]), np.ones((1, 3)), budget_bytes=19),
        "is below the 20 bytes of 2 bits",
    ),
    "plan": (
        lambda: Q.hessian_bit_plan(np.ones(2), np.ones(2), np.ones((2, 2)), budget_bytes=9),
        "must be 3",
    ),
    "group": (lambda: Q.quantized_bytes((4, 10), bits=4, group=4), "group must divide"),
}

test_quantization_rejects_bad_input = rejects(BAD)
