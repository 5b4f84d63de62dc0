"""WTA-CRS: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects
from tests.training import laws_wta_crs

globals().update(law_tests(laws_wta_crs))


@golden("wta_crs")
def test_wta_crs_golden_ref(case):
    run(case, ref.wta_crs)


T = ref.wta_crs
P = np.full(4, 0.25)
H, W, B, G = np.ones((4, 3)), np.ones((2, 3)), np.ones(2), np.ones((4, 2))
BAD = {
    "empty": (lambda: T.row_probabilities(np.ones((0, 3))), "at least one row"),
    "eps": (lambda: T.row_probabilities(H, eps=0), "eps > 0"),
    "norms": (lambda: T.row_probabilities(H, -np.ones(4)), "not negative"),
    "nan_rows": (lambda: T.row_probabilities(H * np.nan), "x must be finite"),
    "norms_shape": (lambda: T.row_probabilities(H, np.ones(3)), r"grad_norm\.shape\[0\] = 3"),
    "ratio": (lambda: T.row_budget(4, ratio=0), "0 < ratio <= 1"),
    "k_low": (lambda: T.winner_count(P, k=0), r"k must be in 1\.\.4"),
    "k_high": (lambda: T.winner_count(P, k=5), r"k must be in 1\.\.4"),
    "negative_p": (lambda: T.winner_count(np.array([1.5, -0.5]), k=1), "without a negative"),
    "nan_p": (lambda: T.winner_count(P * np.nan, k=1), "without a negative number or NaN"),
    "sum": (lambda: T.winner_count(P / 2, k=1), "p must sum to 1"),
    "c": (lambda: T.winner_mask(P, c=5), r"c must be in 0\.\.4"),
    "uniform": (lambda: T.wta_indices(P, np.array([0.5, 1.0]), c=0), r"uniform must be in \[0, 1\)"),
    "uniform_nan": (lambda: T.wta_indices(P, np.array([np.nan]), c=0), r"uniform must be in \[0, 1\)"),
    "few": (lambda: T.wta_indices(P, np.array([0.5]), c=2), "uniform must hold k numbers"),
    "many": (lambda: T.wta_indices(P, np.full(5, 0.5), c=2), "uniform must hold k numbers"),
    "noise": (lambda: T.approx_matmul(G.T, H, np.zeros(3), k=2), r"uniform\.shape\[0\] = 3, but must be 2"),
    "method": (lambda: T.approx_matmul(G.T, H, np.zeros(2), k=2, method="best"), "method must be one of"),
    "inner": (lambda: T.approx_matmul(G, H, np.zeros(2), k=2), r"y\.shape\[0\] = 4, but axis M is 2"),
    "layer_noise": (lambda: T.wta_linear(H, W, B, np.ones(4), np.zeros(2)), "but must be 4"),
    "layer_norms": (lambda: T.wta_linear(H, W, B, np.ones(3), np.zeros(4)), "grad_norm"),
    "bias": (lambda: T.wta_linear(H, W, np.ones(3), np.ones(4), np.zeros(4)), r"b\.shape\[0\] = 3"),
    "no_draw": (lambda: T.estimator_variance(G.T, H, P, k=2, c=2), "must exceed c=2"),
    "cache_shape": (lambda: T.GradNormCache(2, 3, np.ones((2, 2))), r"norms\.shape\[1\] = 2, but must be 3"),
    "cache_ids": (lambda: T.GradNormCache(2, 3).lookup(np.array([2])), r"ids must be in 0\.\.1"),
    "cache_float": (lambda: T.GradNormCache(2, 3).lookup(np.array([1.0])), "ids must be integers"),
    "cache_rows": (lambda: T.GradNormCache(2, 3).update(np.array([1]), np.ones((1, 2))), "must be 3"),
    "stored": (lambda: T.stored_bytes(4, 3, k=5), r"k must be in 1\.\.4"),
}

test_wta_crs_rejects_bad_input = rejects(BAD)
