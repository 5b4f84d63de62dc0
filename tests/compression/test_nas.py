"""Architecture search: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_nas
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_nas))


@golden("nas")
def test_nas_golden_ref(case):
    run(case, ref.nas)


N = ref.nas
W, B, X = np.ones((4, 3)), np.ones(4), np.ones((2, 3))
P, Y = N.MlpParams((W, np.ones((2, 4))), (B, np.ones(2))), np.array([0, 1])
SHARED = laws_nas.shared(0)
SLICE = lambda gene: N.super_transformer(SHARED, gene, np.zeros((1, 3), int), head_dim=4)
BAD = {
    "wide": (lambda: N.super_linear(np.ones((2, 4)), W, B, out_features=2), r"x must have 1\.\.3 channels"),
    "outputs": (lambda: N.super_linear(X, W, B, out_features=5), r"out_features must be in 1\.\.4"),
    "cotangent": (lambda: N.super_linear_vjp(X, W, B, np.ones((2, 5))), r"out_features must be in 1\.\.4"),
    "bias": (lambda: N.super_linear(X, W, B[:3], out_features=2), r"b\.shape\[0\] = 3"),
    "active": (lambda: N.super_layer_norm(X, B, B, active=4), r"active must be in 1\.\.3"),
    "gene_length": (lambda: SLICE((12, 2, 24, 24, 3)), "gene must have 2"),
    "gene_width": (lambda: SLICE((13, 2, 24, 24, 3, 3)), r"E must be in 1\.\.12"),
    "gene_depth": (lambda: SLICE((12, 3, 24, 24, 3, 3)), r"depth must be in 1\.\.2"),
    "gene_hidden": (lambda: SLICE((12, 2, 24, 25, 3, 3)), r"F must be in 1\.\.24"),
    "gene_heads": (lambda: SLICE((12, 2, 24, 24, 4, 3)), r"H must be in 1\.\.3"),
    "kind": (lambda: N.zero_cost_score(P, X, Y, kind="fisher"), "kind must be one of grad_norm"),
    "codes": (
        lambda: N.zero_cost_score(N.MlpParams((W,), (B,)), X, Y, kind="naswot"),
        "no hidden layer",
    ),
    "map_kind": (lambda: N.saliency_maps(P, X, Y, kind="grasp"), "kind must be one of snip, synflow"),
    "labels": (lambda: N.zero_cost_score(P, X, Y + 1), r"labels must be integers in 0\.\.1"),
    "empty": (lambda: N.zero_cost_score(P, X[:0], Y[:0]), "at least one"),
    "latency": (lambda: N.LatencyModel.fit(np.ones((1, 2)), np.ones(1)), "at least two"),
    "tau": (lambda: N.kendall_tau(np.ones(3), np.arange(3)), "must not be constant"),
}

test_nas_rejects_bad_input = rejects(BAD)


def test_nas_dead_input_has_no_covariance_score():
    """A network whose first layer never fires: constant rows of gradients, -inf instead of NaN."""
    dead = N.MlpParams((np.zeros((4, 3)), np.ones((2, 4))), (-B, np.ones(2)))
    assert N.zero_cost_score(dead, X, Y, kind="jacob_cov") == -np.inf
