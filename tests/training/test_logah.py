"""LoGAH: laws on ref, golden vectors, bad inputs."""

from dataclasses import replace

import numpy as np

import ref
from ref.blocks.optim import tree_leaves
from ref.blocks.transformer import BlockParams
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.training import laws_logah

globals().update(law_tests(laws_logah))
L = ref.logah


def encoder(raw):
    """Stored blocks may lack biases."""
    block = lambda b: BlockParams(*(b.get(name) for name in BlockParams._fields))
    return L.GraphormerParams(**{**raw, "blocks": tuple(block(b) for b in raw.get("blocks", ()))})


def build(case):
    return {"params": encoder} if case.meta["fn"] in ("graphormer", "edge_bias") else None


@golden("logah")
def test_logah_golden_ref(case):
    run(case, L, build=build(case))


@graded("logah")
def test_logah_golden_gradients_ref(case):
    run_backward(case, L, build=build(case))


RNG = np.random.default_rng(0)
CONFIG = L.GHNConfig(rank=3, dim=8, layers=1, heads=2, num_classes=10, K=48)
GHN, VIT = L.init_ghn(RNG, CONFIG), L.TargetConfig("vit", 8, 1, 2)
GRAPH = L.transformer_graph(VIT)
X, E, M = np.ones((1, 3, 8)), np.eye(3, k=1, dtype=int)[None], np.ones((1, 3), bool)
Z, D = np.ones((2, 8)), GHN.decoder
CYCLE = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
BAD = {
    "cycle": (lambda: L.virtual_edges(CYCLE), "adj has a cycle"),
    "self": (lambda: L.virtual_edges(np.eye(3, dtype=int)), "adj has a cycle"),
    "square": (lambda: L.virtual_edges(np.ones((2, 3))), r"adj\.shape\[1\] = 3"),
    "cutoff": (lambda: L.virtual_edges(E[0], cutoff=0), r"cutoff must be in 1\.\.254"),
    "far": (lambda: L.edge_bias(255 * E, GHN.encoder), r"edges must be distances in 0\.\.254"),
    "heads": (lambda: L.graphormer(X, E, M, GHN.encoder, num_heads=3), "num_heads must divide the width 8"),
    "mask": (lambda: L.graphormer(X, E, M[:, :2], GHN.encoder, num_heads=2), r"node_mask\.shape\[1\] = 2"),
    "rank": (lambda: L.low_rank_decode(Z, D, shape=(3, 3), rank=4), "rank must be that of params, 3"),
    "rows": (lambda: L.low_rank_decode(Z, D, shape=(49, 3), rank=3), "more than K=48"),
    "kernel_rows": (lambda: L.low_rank_decode(Z, D, shape=(3, 20, 1, 3), rank=3), "needs 60 rows"),
    "axes": (lambda: L.low_rank_decode(Z, D, shape=(3, 3, 3), rank=3), "shape must be"),
    "width": (lambda: L.low_rank_decode(Z[:, :6], D, shape=(3,), rank=3), r"w1\.shape\[0\] = 8"),
    "tile": (lambda: L.tile_params(np.ones((3, 3)), shape=(3, 3, 1)), "cannot be made of w"),
    "tile_kernel": (lambda: L.tile_params(np.ones((3, 3, 2, 2)), shape=(3, 3, 3, 2)), "larger kernel"),
    "kind": (lambda: L.normalize_params(Z, kind="scale"), 'kind must be "weight" or "bias"'),
    "norm": (lambda: L.normalize_params(Z, norm="xavier"), "norm must be one of"),
    "shape": (lambda: L.shape_indices([()]), "1 to 4 axes"),
    "tables": (lambda: L.shape_features(X[0], np.zeros((3, 4), int), L.ShapeParams(Z, Z)), "tables of d/4=8"),
    "dim": (lambda: L.init_ghn(RNG, L.GHNConfig(dim=10, heads=2)), "multiple of 4"),
    "dim_heads": (lambda: L.init_ghn(RNG, L.GHNConfig(dim=12, heads=8)), "heads=8"),
    "target": (lambda: L.transformer_graph(L.TargetConfig("mlp", 8, 1, 2)), "kind must be"),
    "target_heads": (
        lambda: L.transformer_graph(L.TargetConfig("vit", 8, 1, 3)),
        "num_heads must divide dim",
    ),
    "target_depth": (lambda: L.transformer_graph(L.TargetConfig("gpt", 8, -1, 2)), "depth be 0 or more"),
    "patch": (
        lambda: L.transformer_graph(L.TargetConfig("vit", 8, 1, 2, image_size=9)),
        "patch must divide image_size=9",
    ),
    "no_data": (
        lambda: L.train_ghn(GHN, [VIT], (X[:0], X[:0]), steps=1, seed=0, config=CONFIG),
        "at least one example",
    ),
    "op": (
        lambda: L.predict_parameters(replace(GRAPH, op=GRAPH.op + 15), GHN, CONFIG),
        r"operations 0\.\.14",
    ),
    "pool": (lambda: L.train_ghn(GHN, [], (X, X), steps=1, seed=0, config=CONFIG), "a pool"),
}

test_logah_rejects_bad_input = rejects(BAD)


def test_logah_edges():
    """A graph of one node or without blocks, one fully masked, and an empty batch: as the formula says."""
    assert L.virtual_edges(np.zeros((1, 1), int)).tolist() == [[0]]
    bare = L.transformer_graph(replace(VIT, depth=0))
    np.testing.assert_array_equal(bare.edges == 1, np.eye(len(bare.op), k=1, dtype=bool))
    padded = L.graphormer(X, E, ~M, GHN.encoder, num_heads=2)
    # all start at 0 and attend alike; the rows of a product may round apart
    np.testing.assert_allclose(padded[0, 0], padded[0, 2], rtol=0, atol=1e-14)
    assert L.graphormer(X[:0], E[:0], M[:0], GHN.encoder, num_heads=2).shape == (0, 3, 8)
    assert L.low_rank_decode(Z[:0], D, shape=(3, 2), rank=3).shape == (0, 3, 2)
    asked_for_nothing = L.predict_parameters_backward(GRAPH, GHN, CONFIG, {})
    assert not any(g.any() for g in tree_leaves(asked_for_nothing))
    assert np.isnan(L.low_rank_decode(Z * np.nan, D, shape=(2,), rank=3)).all()
