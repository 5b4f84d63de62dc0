"""Grokking: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.optim import adam_init
from ref.blocks.transformer import BlockParams
from ref.models.gpt import GPTParams
from tests.golden_runner import golden, graded, run, run_backward
from tests.language import laws_grokking
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_grokking))

G = ref.grokking


def parameters(raw):
    """GPTParams of a golden tree; the lens cases leave out what the lens does not read."""
    blocks = tuple(BlockParams(*(b.get(f) for f in BlockParams._fields)) for b in raw.get("blocks", ()))
    return GPTParams(raw["wte"], raw.get("wpe"), blocks, raw["lnf_scale"], raw["lnf_bias"])


@golden("grokking")
def test_grokking_golden_ref(case):
    run(case, G, build={"params": parameters})


@graded("grokking")
def test_grokking_golden_gradients_ref(case):
    run_backward(case, G, build={"params": parameters})


P, IDS, LABELS = laws_grokking.network(0)
DATA = G.composition_data(np.random.default_rng(0), entities=6, relations=3, out_degree=2, ratio=1, holdout=0)
WORLD = {"entities": 6, "attributes": 2, "values": 3}
RNG = np.random.default_rng(0)
HEADS = {"num_heads": 2}
STEP = {"lr": 0.1, "weight_decay": 0.1, "decay_mask": G.matrix_mask(P)}
HIDDEN = np.ones((3, 1, 4, 6))
GRAPH = {"entities": 6, "relations": 3, "out_degree": 2}
BAD = {
    "degree": (
        lambda: G.composition_data(RNG, entities=6, relations=3, ratio=1),
        r"out_degree must be in 1\.\.",
    ),
    "ratio": (lambda: G.composition_data(RNG, **GRAPH, ratio=9), "the pool holds"),
    "negative": (lambda: G.composition_data(RNG, **GRAPH, ratio=-1), "ratio=-1 asks for"),
    "ood": (
        lambda: G.composition_data(RNG, **GRAPH, ratio=1, ood_fraction=2),
        r"ood_fraction must be in \[0, 1\]",
    ),
    "holdout": (lambda: G.comparison_data(RNG, **WORLD, ratio=1, holdout=-1), "holdout must be in"),
    "pool": (lambda: G.comparison_data(RNG, **WORLD, ratio=99), "the pool holds"),
    "share": (lambda: G.complex_comparison_data(RNG, **WORLD, share=2), "share must be in"),
    "few": (lambda: G.complex_comparison_data(RNG, **WORLD), "per_label=50 questions of each label"),
    "swap": (lambda: G.corrupt_composition(RNG, DATA, DATA.train.ids, position=3), "position must be 0"),
    "alone": (
        lambda: G.corrupt_composition(
            RNG,
            G.composition_data(RNG, entities=1, relations=1, out_degree=1, ood_fraction=0, ratio=0),
            np.array([[0, 1, 1]]),
            position=0,
        ),
        r"ids\[0\] = \[0, 1, 1\]: no token at position 0 changes the answer",
    ),
    "swap_pair": (lambda: G.corrupt_comparison(RNG, DATA, DATA.train.ids, position=1), "position must be 0"),
    "ids": (lambda: G.gpt2_forward(IDS + 9, P, **HEADS), r"ids must be in 0\.\.8"),
    "long": (lambda: G.gpt2_forward(np.zeros((1, 6), int), P, **HEADS), "exceeds the context of 5"),
    "rank": (lambda: G.gpt2_forward(IDS[0], P, **HEADS), r"ids must have shape \[B, T\]"),
    "loops": (lambda: G.gpt2_forward(IDS, P, loops=0, **HEADS), "loops must be at least 1"),
    "heads": (lambda: G.gpt2_forward(IDS, P, num_heads=4), "num_heads must divide the width 6"),
    "labels": (lambda: G.gpt2_loss(IDS, LABELS[:, :3], P, **HEADS), r"labels\.shape\[1\] = 3"),
    "label": (lambda: G.gpt2_loss(IDS, LABELS + 9, P, **HEADS), r"labels must be in 0\.\.8"),
    "unscored": (lambda: G.gpt2_loss(IDS, LABELS * 0 - 100, P, **HEADS), "at least one that is scored"),
    "single": (lambda: G.gpt2_loss(IDS[:, :1], LABELS[:, 3:], P, **HEADS), "at least one that is scored"),
    "lr": (lambda: G.adamw_step(P, P, adam_init(P), **{**STEP, "lr": -1}), "lr and weight_decay must not"),
    "decay": (
        lambda: G.adamw_step(P, P, adam_init(P), **{**STEP, "weight_decay": np.nan}),
        "must not be neg",
    ),
    "clip": (lambda: G.adamw_step(P, P, adam_init(P), **STEP, clip=0), "limit must be positive"),
    "hidden": (lambda: G.lens_logits(HIDDEN[0], P), "hidden must have shape"),
    "width": (lambda: G.lens_logits(HIDDEN[..., :5], P), r"wte\.shape\[1\] = 6, but axis d is 5"),
    "nan": (lambda: G.token_rank(np.full((1, 3), np.nan), np.zeros(1, int)), "must not hold NaN"),
    "target": (lambda: G.token_rank(np.ones((1, 3)), np.array([3])), r"targets must be in 0\.\.2"),
    "targets": (lambda: G.logit_lens(HIDDEN, P, np.zeros(2, int)), r"targets\.shape\[0\] = 2"),
    "position": (lambda: G.causal_trace(IDS, IDS, P, position=4, **HEADS), r"position must be in 0\.\.3"),
    "corrupt": (lambda: G.causal_trace(IDS, IDS[:, :3], P, position=0, **HEADS), r"corrupt_ids\.shape\[1\]"),
    "none": (lambda: G.trace_strength(np.ones((2, 0, 3)), np.zeros(0, int)), "at least one row"),
    "slice": (
        lambda: G.slice_accuracy(P, DATA, "test", **HEADS),
        "unknown slice 'test', there are id_atomic",
    ),
    "steps": (lambda: G.train(G.GrokConfig(), DATA, steps=0, seed=0, eval_every=1), "steps and eval_every"),
}

test_grokking_rejects_bad_input = rejects(BAD)
