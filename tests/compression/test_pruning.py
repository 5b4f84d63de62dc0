"""Pruning: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.transformer import init_block
from tests.compression import laws_pruning
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_pruning))


@golden("pruning")
def test_pruning_golden_ref(case):
    run(case, ref.pruning)


W = np.ones((4, 8))
BLOCK = init_block(np.random.default_rng(0), 8, 12)
P = ref.pruning
BAD = {
    "sparsity": (lambda: P.magnitude_mask(W, sparsity=1.1), r"sparsity must be in \[0, 1\]"),
    "axis": (lambda: P.structured_mask(W, sparsity=0.5, axis=2), r"axis must be in -2\.\.1"),
    "group": (lambda: P.nm_mask(np.ones((4, 6))), "not a multiple of m=4"),
    "n_over_m": (lambda: P.nm_mask(W, n=5), "1 <= n <= m"),
    "pack": (lambda: P.nm_pack(W, np.ones((4, 8), bool)), "keep exactly n=2"),
    "packed_width": (
        lambda: P.nm_matmul(W, np.ones((3, 2)), np.ones((3, 2), int), in_features=8),
        "expected",
    ),
    "no_batch": (lambda: P.head_importance(*np.ones((2, 0, 2, 3, 4))), "at least one example"),
    "no_head": (lambda: P.prune_heads(BLOCK, [False, False]), "at least one head"),
    "head_count": (lambda: P.prune_heads(BLOCK, [True] * 3), "no multiple"),
    "neurons": (lambda: P.prune_ffn(BLOCK, [True] * 3), r"keep must have shape \[12\]"),
    "both": (lambda: P.movement_mask(W, keep=0.5, threshold=0.5), "exactly one of keep and threshold"),
    "neither": (lambda: P.movement_mask(W), "exactly one of keep and threshold"),
    "schedule": (lambda: P.cubic_sparsity(0, start=5, end=5, final=1.0), "end must come after start"),
    "count": (lambda: P.obs_prune_row(np.ones(3), np.eye(3), count=4), r"count must be in 0\.\.3"),
    "block": (
        lambda: P.bsr_matmul(W, np.ones((1, 2, 2)), np.array([9]), np.array([0]), shape=(4, 8)),
        "must lie inside",
    ),
    "kind": (lambda: P.sparse_bytes((4, 8), kind="zip", sparsity=0.5, itemsize=2), "kind must be"),
}

test_pruning_rejects_bad_input = rejects(BAD)
