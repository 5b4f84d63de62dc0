"""Concept-centric transformer: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.memory import laws_concept_centric

globals().update(law_tests(laws_concept_centric))

S = ref.concept_centric


@golden("concept_centric")
def test_concept_centric_golden_ref(case):
    run(case, S)


@graded("concept_centric", always=("concept_slot_attention", "concept_bo_qsa"))
def test_concept_centric_golden_gradients_ref(case):
    """The stored gradients, by ref's own backward passes; attention of slots has no way back."""
    run_backward(case, S)


X, START, P = laws_concept_centric.slot_inputs(0)
TOKENS, CONCEPTS, CROSS = laws_concept_centric.cross_inputs(0)
CLS, PATCHES, HEAD = laws_concept_centric.head(0, "sa")
FIXED = S.init_cct(0, 6, concepts=3, spatial_concepts=0, classes=4, variant="ct")
A, T, LOGITS, Y = np.full((2, 4, 3), 1 / 3), np.ones((2, 4, 3)), np.zeros((2, 5)), np.array([0, 4])
RUN = lambda params=HEAD, **o: S.cct_classify(CLS, PATCHES, params, **{"heads": 3, **o})
BAD = {
    "iterations": (
        lambda: S.concept_slot_attention(X, START, P, iterations=0),
        "iterations must be at least 1",
    ),
    "isa": (lambda: S.concept_isa(X, START, P, iterations=-1), "iterations must be at least 0, got -1"),
    "qsa": (lambda: S.concept_bo_qsa(X, START, P, iterations=0), "iterations must be at least 1"),
    "isa_back": (
        lambda: S.concept_isa_vjp(X, START, P, START, iterations=-1),
        "iterations must be at least 0",
    ),
    "no_tokens": (lambda: S.concept_slot_attention(X[:, :0], START, P), "x must hold at least one token"),
    "no_start": (lambda: S.concept_slot_attention(X, START, P._replace(mu=None)), "params must hold mu"),
    "noise": (lambda: S.concept_slot_attention(X, START[..., :3], P), r"mu\.shape\[2\] = 4, but axis d is 3"),
    "batch": (lambda: S.concept_isa(X, START[:1], P), r"slots0\.shape\[0\] = 1"),
    "features": (lambda: S.concept_isa(X[..., :5], START, P), r"w_k\.shape\[0\] = 6, but axis F is 5"),
    "heads": (
        lambda: S.concept_cross_attention(TOKENS, CONCEPTS, CROSS, heads=4),
        "heads must divide the width 6",
    ),
    "no_heads": (lambda: S.concept_contributions(TOKENS, CONCEPTS, CROSS, heads=0), "heads must divide"),
    "width": (
        lambda: S.concept_cross_attention(TOKENS, CONCEPTS[..., :4], CROSS, heads=2),
        r"concepts\.shape\[2\] = 4, but axis d is 6",
    ),
    "target": (lambda: S.explanation_loss(A, T[:, :3]), r"target\.shape\[1\] = 3"),
    "zero_row": (lambda: S.explanation_loss(A, 0 * T), "target must have a positive sum"),
    "zero_back": (lambda: S.explanation_loss_vjp(A, 0 * T), "target must have a positive sum"),
    "lambda_e": (lambda: S.cct_loss(LOGITS, Y, A, T, lambda_e=-1), "lambda_e must not be negative, got -1"),
    "lambda_s": (lambda: S.cct_loss(LOGITS, Y, A, T, lambda_s=np.nan), "lambda_s must not be negative"),
    "labels": (lambda: S.cct_loss(LOGITS, Y + 1, A, T), r"labels must be in 0\.\.4"),
    "lonely": (lambda: S.cct_loss(LOGITS, Y, A, T, spatial_target=T), "spatial_target needs spatial_attn"),
    "no_attention": (lambda: S.cct_loss(LOGITS, Y, None, T), "concept_target needs concept_attn"),
    "variant": (lambda: RUN(variant="mean"), "variant must be one of sa, isa, qsa, ct, got 'mean'"),
    "inputs": (lambda: RUN(slot_inputs="all"), 'slot_inputs must be "patches" or "cls"'),
    "no_slots": (lambda: RUN(FIXED), "params.concepts must have slots for variant 'sa'"),
    "no_vectors": (lambda: RUN(variant="ct"), "params.concepts must have start"),
    "spatial": (lambda: RUN(slot_spatial=True), "params.spatial must have slots"),
    "nothing": (lambda: RUN(S.CctParams(None, None)), "params must hold at least one stream"),
    "patches": (lambda: S.cct_classify(PATCHES, PATCHES, HEAD, heads=3), r"features_cls\.shape\[1\] = 5"),
    "init": (lambda: S.init_cct(0, 6, concepts=0, spatial_concepts=0, classes=4), "concepts must be counts"),
    "params": (lambda: S.cct_params(6, concepts=3, classes=4, variant="x"), "variant must be one of"),
    "one_class": (
        lambda: S.concept_consistency(A[0], np.zeros(4, int), A[0]),
        "a class twice, and two classes",
    ),
    "no_pair": (lambda: S.concept_consistency(A[0], np.arange(4), A[0]), "a class twice, and two classes"),
    "images": (lambda: S.shapes_concepts(0, 0), "n_images must be at least 1"),
    "shape": (lambda: ref.tasks.concepts.shape_mask("star", (4, 4), 2), "shape must be one of disc"),
    "patch": (lambda: ref.tasks.concepts.patch_targets(np.ones((1, 4, 4, 2)), 3), "patch must divide"),
}

test_concept_centric_rejects_bad_input = rejects(BAD)


def test_concept_centric_edges():
    """Huge logits leave slots without tokens, an empty batch, one concept, one patch."""
    loud = P._replace(w_q=1e6 * P.w_q)
    for module in (S.concept_slot_attention, S.concept_isa, S.concept_bo_qsa):
        slots, attn = module(X, START, loud)
        assert np.isfinite(slots).all()
        np.testing.assert_allclose(attn.max(axis=-1), 1, rtol=1e-9)
        assert module(X[:0], START[:0], P)[0].shape == (0, 3, 4)
    logits, attn = S.concept_cross_attention(TOKENS, CONCEPTS[:, :1], CROSS, heads=2)
    np.testing.assert_array_equal(attn, 1)
    assert np.ptp(logits, axis=1).max() < 1e-14  # whoever asks hears the same
    assert RUN(slot_inputs="cls")["logits"].shape == (2, 4)
