"""Attention pruning: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.transformer import QKVParams
from tests.attention import laws_attention_pruning
from tests.attention.house import to_golden, to_house
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_attention_pruning))
BUILD = {"params": lambda raw: QKVParams(**to_house(raw))}


@golden("attention_pruning")
def test_attention_pruning_golden_ref(case):
    run(case, ref.attention_pruning, build=BUILD)


@graded("attention_pruning", only=("pruned_self_attention",))
def test_attention_pruning_golden_layer_gradients(case):
    """The stored gradients of x and the maps against the hand-written backward pass."""
    run_backward(case, ref.attention_pruning, build=BUILD, outs={"params": to_golden})


M = ref.attention_pruning
Q, AVG, KEEP = np.ones((1, 2, 4, 3)), np.full((1, 2, 4, 4), 0.25), np.ones((4, 4), bool)
X, MAPS = np.ones((1, 4, 6)), QKVParams(*(np.ones(s) for s in ((6, 6), 6) * 3))
attend = lambda keep=KEEP, k=Q, **o: M.pruned_attention(Q, k, k, keep, **o)
tau = lambda avg=AVG, fraction=0.5, **o: M.pruning_threshold(avg, fraction, **o)
SEEN = M.PatternObserver(1, 2, 4, 4)
UPDATE = (np.zeros((2, 4, 4)), np.zeros((2, 4, 4), int))
BAD = {
    "square": (lambda: attend(KEEP[:, :3], Q[:, :, :3], causal=True), "causal needs as many keys as queries"),
    "probs_square": (lambda: M.attention_probs(Q, Q[:, :, :3], causal=True), "4 queries and 3 keys"),
    "heads": (lambda: M.attention_probs(Q[0, 0], Q[0, 0]), r"q must have shape \[\.\.\., H, n, D\]"),
    "mask": (lambda: attend(mask=KEEP.astype(int)), "mask must be boolean"),
    "keep": (lambda: attend(KEEP.astype(float)), "keep_mask must be boolean"),
    "keep_shape": (lambda: attend(KEEP[:, :3]), r"keep_mask of shape \[4, 3\] does not broadcast"),
    "empty_rows": (lambda: attend(empty_rows="keep_max"), 'empty_rows must be "official" or "zero"'),
    "keys": (lambda: M.pruned_attention(Q, Q, Q[:, :, :3], KEEP), r"v\.shape\[2\] = 3"),
    "no_heads": (
        lambda: M.pruned_attention_bwd(Q, Q, Q[0, 0], Q, KEEP),
        r"k must have shape \[\.\.\., Hkv, S, D\]",
    ),
    "cotangent": (lambda: M.pruned_attention_bwd(Q[:, :, :3], Q, Q, Q, KEEP), "axis n is 3 in do"),
    "corner": (lambda: M.running_average(*UPDATE, np.ones((1, 2, 5, 4))), "covers 5 x 4 positions"),
    "count": (
        lambda: M.running_average(UPDATE[0], UPDATE[1][:1], np.ones((1, 2, 4, 4))),
        r"count\.shape\[0\]",
    ),
    "average_heads": (lambda: M.running_average(*UPDATE, np.ones((1, 3, 4, 4))), r"probs\.shape\[1\] = 3"),
    "observer": (lambda: M.PatternObserver(1, 2, 0, 4), "must be at least 1"),
    "layer": (lambda: SEEN.update(1, np.ones((1, 2, 4, 4))), r"layer must be in 0\.\.0"),
    "lengths": (
        lambda: SEEN.update(0, np.ones((1, 2, 4, 4)), lengths=np.ones(2, int)),
        r"lengths\.shape\[0\]",
    ),
    "mode": (lambda: M.pruning_bounds(AVG, mode="tight"), "mode must be one of official, exact"),
    "avg_shape": (lambda: M.pruning_bounds(AVG[0]), r"avg must have shape \[L, H, N, M\]"),
    "negative": (lambda: tau(-AVG), "without a negative number or NaN"),
    "nan": (lambda: tau(AVG * np.nan), "without a negative number or NaN"),
    "fraction": (lambda: tau(fraction=1.0), r"fraction must be in \[0, 1\)"),
    "fraction_low": (lambda: tau(fraction=-0.1), r"fraction must be in \[0, 1\)"),
    "per": (lambda: tau(per="model"), "per must be one of"),
    "bounds": (lambda: tau(bounds="tight"), "mode must be one of"),
    "visible": (lambda: tau(count_masked=False), "count_masked=False needs visible"),
    "visible_shape": (lambda: tau(visible=KEEP[:3]), r"visible must be bool \[4, 4\]"),
    "box": (lambda: tau(AVG[:, :, :1, :1]), 'no cell to rank in its "official" bounds 0 x 0'),
    "rule": (lambda: M.pruning_mask(AVG, 0.5, empty_rows="mean"), "empty_rows must be one of"),
    "tiles": (lambda: M.to_block_mask(KEEP[None], None, block_q=0, block_k=1), "must be at least 1"),
    "tile_rule": (
        lambda: M.to_block_mask(KEEP[None], None, block_q=1, block_k=1, rule="all"),
        "rule must be one of any, mean",
    ),
    "tile_avg": (
        lambda: M.to_block_mask(KEEP[None], None, block_q=1, block_k=1, rule="mean", fraction=0.5),
        'rule="mean" needs avg',
    ),
    "tile_fraction": (
        lambda: M.to_block_mask(None, AVG[0], block_q=1, block_k=1, rule="mean"),
        'with rule="mean", got None',
    ),
    "random": (lambda: M.random_keep_mask(AVG, 1.0), r"fraction must be in \[0, 1\)"),
    "random_visible": (lambda: M.random_keep_mask(AVG, 0.5, visible=KEEP[:3]), "visible must be bool"),
    "report": (lambda: M.pruning_report(KEEP), r"keep_mask must have shape \[L, H, N, M\]"),
    "num_heads": (lambda: M.pruned_self_attention(X, MAPS, KEEP, num_heads=4), "num_heads"),
}

test_attention_pruning_rejects_bad_input = rejects(BAD)
