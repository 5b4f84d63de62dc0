"""Subsampled attention: laws on ref, bad inputs; golden vectors if there are any (no code was released)."""

import numpy as np

import ref
from ref.models.gpt import init_gpt
from tests.attention import laws_subsampled
from tests.golden_runner import folder, golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_subsampled))

S = ref.subsampled
if (folder() / "subsampled.npz").exists():

    @golden("subsampled")
    def test_subsampled_golden_ref(case):
        build = {"config": lambda options: S.SSAConfig(**options)}
        run(case, S, build=build)


Q, U = np.ones((2, 3, 6, 4)), np.linspace(0, 1, 6)
IDS, PARAMS = np.zeros((1, 5), int), init_gpt(np.random.default_rng(0), vocab=3, context=4, dim=4, depth=2)
attend = lambda **o: S.ssa_attention(Q, Q, Q, **o)
PERM = {"perm": np.arange(6), "block": 2}
SOME = {"source_index": np.arange(2)}
cost = lambda **o: S.ssa_cost(**{"n": 8, "dim": 4, "num_heads": 2, "reduction": 2, **o})
RNG = np.random.default_rng(0)
BAD = {
    "k_low": (lambda: S.sample_sources(U, 0), r"k must be in 1\.\.6"),
    "k_high": (lambda: S.sample_sources(U, 7), r"k must be in 1\.\.6"),
    "sigma": (lambda: S.local_permutation(U, sigma=-1), "sigma must not be negative"),
    "sigma_nan": (lambda: S.local_permutation(U, sigma=np.nan), "sigma must not be negative"),
    "sigma_2d": (
        lambda: S.local_permutation_2d(np.zeros((2, 2, 3)), height=2, width=3, sigma=(1, -1)),
        "sigma must not be negative",
    ),
    "noise_2d": (
        lambda: S.local_permutation_2d(np.zeros((2, 2, 3)), height=3, width=2, sigma=1),
        r"noise\.shape\[1\] = 2, but must be 3",
    ),
    "both": (lambda: attend(**SOME, **PERM), "exactly one of source_index and perm"),
    "none": (lambda: attend(), "exactly one of source_index and perm"),
    "window": (lambda: attend(**SOME, block=2), "block goes with perm"),
    "no_block": (lambda: attend(perm=np.arange(6)), "block must be at least 1"),
    "block": (lambda: attend(perm=np.arange(6), block=0), "block must be at least 1, got 0"),
    "left": (lambda: attend(**PERM, left=-1), "left and right must not be negative"),
    "right": (lambda: attend(**PERM, right=-1), "left and right must not be negative"),
    "twice": (lambda: attend(source_index=np.array([1, 1])), "source_index must hold distinct positions"),
    "range": (lambda: attend(source_index=np.array([6])), r"distinct positions in 0\.\.5"),
    "negative": (lambda: attend(source_index=np.array([-1])), r"distinct positions in 0\.\.5"),
    "float": (lambda: attend(source_index=np.array([1.0])), "source_index must be int"),
    "batch": (lambda: attend(source_index=np.zeros((3, 1), int)), r"must be int \[n\] or \[2, n\]"),
    "perm": (lambda: attend(perm=np.array([0, 1, 2, 3, 4, 4]), block=2), "perm must hold distinct positions"),
    "short": (lambda: attend(perm=np.arange(5), block=2), r"permutation of 0\.\.5, got 5 entries"),
    "heads": (lambda: S.ssa_attention(Q, Q[:, :2], Q, **SOME), r"k\.shape\[1\] = 2"),
    "mask": (lambda: attend(**SOME, mask=np.ones((6, 6))), "mask must be boolean"),
    "mask_shape": (lambda: attend(**SOME, mask=np.ones((6, 5), bool)), "mask of shape .* does not broadcast"),
    "cotangent": (lambda: S.ssa_attention_bwd(Q[:, :, :5], Q, Q, Q, **SOME), "axis L is 5 in do"),
    "visible": (lambda: S.ssa_visible(np.array([0, 0]), block=1), "perm must be a permutation"),
    "visible_block": (lambda: S.ssa_visible(np.arange(2), block=0), "block must be at least 1"),
    "reduction": (lambda: S.SSASchedule(0.5), "need reduction >= 1"),
    "finetune": (lambda: S.SSASchedule(finetune_fraction=1.5), "finetune_fraction <= 1"),
    "schedule": (lambda: S.SSASchedule(sigma=1.0), "sigma and block go together"),
    "layers": (
        lambda: S.ssa_transformer(PARAMS, IDS[:, 1:], config=S.SSAConfig(2), sources=(None,)),
        "one draw for each of 2 layers, got 1",
    ),
    "samples": (
        lambda: S.ssa_ensemble(
            RNG, PARAMS, IDS[:, 1:], config=S.SSAConfig(2), schedule=S.SSASchedule(), samples=0
        ),
        "samples must be at least 1",
    ),
    "average": (lambda: S.self_ensemble(np.ones((2, 3)), average="mean"), 'average must be "prob"'),
    "runs": (lambda: S.self_ensemble(np.ones((0, 3))), "with R >= 1"),
    "kind": (lambda: cost(kind="2d"), "kind must be one of unbiased, local"),
    "cost": (lambda: cost(num_heads=3), "num_heads dividing dim"),
    "cost_reduction": (lambda: cost(reduction=0.5), "reduction >= 1"),
}

test_subsampled_rejects_bad_input = rejects(BAD)
