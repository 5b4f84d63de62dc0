"""VVMA: laws on ref, golden vectors where there are some, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_vvma
from tests.golden_runner import folder, golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_vvma))

if (folder() / "vvma.npz").exists():  # no runnable third-party code is known; a file of the usual form runs

    @golden("vvma")
    def test_vvma_golden_ref(case):
        run(case, ref.vvma)


V = ref.vvma
M, W = np.ones((4, 4)), np.ones((2, 3, 4))
X = np.ones((2, 12))
ATTENTION = V.VvmaAttentionParams(M, np.ones((4, 2, 2, 4)), np.ones((4, 8)))
LSTM = V.VvmaLSTMParams(M, np.ones((4, 2, 2, 4)), np.ones((4, 2, 2, 4)), np.ones((4, 8)))
BAD = {
    "square": (lambda: V.vvma_linear(X, np.ones((4, 3)), W), r"m\.shape\[1\] = 3, but axis k is 4"),
    "tile": (lambda: V.vvma_linear(X, M, np.ones((2, 3, 5))), r"v\.shape\[2\] = 5, but axis k is 4"),
    "inputs": (lambda: V.vvma_linear(np.ones((2, 8)), M, W), r"in_features must be in 9\.\.12"),
    "outputs": (lambda: V.vvma_linear(X, M, W, out_features=4), r"out_features must be in 5\.\.8"),
    "dense": (lambda: V.vvma_dense(M, W, in_features=13), r"in_features must be in 9\.\.12"),
    "bias": (lambda: V.vvma_linear(X, M, W, np.ones(7)), r"bias\.shape\[0\] = 7, but must be 8"),
    "order": (lambda: V.vvma_linear(X, M, W, order="last"), "order must be one of fused, per_tile"),
    "cotangent": (lambda: V.vvma_linear_vjp(X, M, W, np.ones((2, 9))), r"out_features must be in 5\.\.8"),
    "batch": (lambda: V.vvma_linear_vjp(X, M, W, np.ones((3, 8))), r"grad_out\.shape"),
    "k": (lambda: V.project_to_vvma(np.ones((2, 2)), k=0), "k must be at least 1"),
    "k_init": (lambda: V.init_vvma(np.random.default_rng(0), 3, 3, k=0), "k must be at least 1"),
    "cost": (lambda: V.vvma_cost(4, 4, k=2, batch=0), "batch must be at least 1"),
    "load": (lambda: V.vvma_cost(4, 4, k=2, load_cycles=-1), "load_cycles must not be negative"),
    "heads": (lambda: V.vvma_attention(np.ones((3, 8)), ATTENTION, num_heads=3), "num_heads must divide"),
    "cell": (lambda: V.vvma_lstm_cell(np.ones(9), (np.ones(8), np.ones(8)), LSTM), r"in_features must be"),
}

test_vvma_rejects_bad_input = rejects(BAD)


def test_vvma_nan_stays_in_its_token():
    """A NaN input poisons its own output row and no other."""
    x = X.copy()
    x[0, 3] = np.nan
    y = V.vvma_linear(x, M, W)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
