"""The masked classifier: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.language import laws_masked_multidomain
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_masked_multidomain))

M = ref.masked_multidomain


@golden("masked_multidomain")
def test_masked_multidomain_golden_ref(case):
    run(case, M)


@graded("masked_multidomain")
def test_masked_multidomain_golden_gradients_ref(case):
    run_backward(case, M)


PARAMS, IDS, MASK = laws_masked_multidomain.network(0)
Z, P, Y, S = np.ones((3, 5)), np.array([0, 1, 1]), np.array([1, 2, 4]), {"sizes": (2, 3)}
SPEC = M.ProblemSpec(("a", "b"), (2, 3))
NET = {"num_heads": 2}
HIDDEN = MASK & (np.arange(4) > 0)
BAD = {
    "problem": (lambda: M.predict(Z, P + 1, **S), r"problem must be in 0\.\.1"),
    "problem_float": (lambda: M.predict(Z, P + 0.0, **S), "problem must be integers"),
    "size": (lambda: M.predict(Z, P, sizes=(5, 0)), "sizes must be counts of at least 1"),
    "sizes": (lambda: M.predict(Z, P, sizes=()), "sizes must be counts"),
    "width": (lambda: M.masked_softmax(Z, P, sizes=(2, 4)), r"z\.shape\[1\] = 5, but must be 6"),
    "rows": (lambda: M.masked_logits(Z, P[:2], **S), r"problem\.shape\[0\] = 2"),
    "nan": (lambda: M.masked_logits(Z * np.nan, P, **S), "z must hold neither NaN"),
    "inf": (lambda: M.predict(Z * np.inf, P, **S), r"nor \+inf"),
    "nan_full": (lambda: M.full_loss(Z * np.nan, Y), "z must hold neither NaN"),
    "label": (lambda: M.masked_loss(Z, Y, 1 - P, **S), "y must be global classes of their problems"),
    "label_full": (lambda: M.full_loss(Z, Y + 4), r"labels must be in 0\.\.4"),
    "label_float": (lambda: M.masked_loss(Z, Y + 0.5, P, **S), "y must be global classes"),
    "empty": (lambda: M.full_loss(Z[:0], Y[:0]), "at least one that is scored"),
    "alpha": (lambda: M.mixed_loss(Z, Y, P, alpha=1.5, **S), r"alpha must be in \[0, 1\]"),
    "alpha_nan": (lambda: M.mixed_loss_backward(Z, Y, P, alpha=np.nan, **S), r"alpha must be in \[0, 1\]"),
    "threshold": (lambda: M.reject(P, np.ones(3), threshold=-1), r"threshold must be in \[0, 1\]"),
    "mask": (lambda: M.bert_classifier_forward(IDS, MASK + 0, PARAMS, **NET), "mask must be boolean"),
    "first": (lambda: M.bert_classifier_forward(IDS, HIDDEN, PARAMS, **NET), "must show the first token"),
    "no_token": (lambda: M.bert_classifier_forward(IDS[:, :0], MASK[:, :0], PARAMS, **NET), "first token"),
    "ids": (lambda: M.bert_classifier_forward(IDS + 9, MASK, PARAMS, **NET), r"ids must be in 0\.\.8"),
    "heads": (lambda: M.bert_classifier_forward(IDS, MASK, PARAMS, num_heads=4), "num_heads must divide"),
    "head": (
        lambda: M.bert_classifier_forward(IDS, MASK, PARAMS._replace(w_cls=np.ones((5, 5))), **NET),
        r"w_cls\.shape\[0\] = 5",
    ),
    "names": (lambda: M.ProblemSpec(("a", "a"), (1, 2)), "names must be 2, one a size"),
    "spec_size": (lambda: SPEC.add("c", 0), "sizes must be counts"),
    "local": (lambda: SPEC.to_global(np.array([0]), np.array([2])), r"local must be a class .* got \[2\]"),
    "global": (lambda: SPEC.to_local(np.array([5])), r"global_class must be in 0\.\.4"),
    "batch": (lambda: M.draw_batch(np.random.default_rng(0), P, batch=0), "batch >= 1"),
    "balance": (
        lambda: M.draw_batch(np.random.default_rng(0), P, batch=1, balance="class"),
        "balance must be",
    ),
    "data": (
        lambda: M.evaluate(PARAMS, M.Requests(IDS[:0], MASK, Y, P), SPEC, **NET),
        "at least one request",
    ),
    "curve": (lambda: M.risk_coverage(np.ones(0), np.ones(0, bool)), "at least one request"),
    "curve_nan": (lambda: M.risk_coverage(np.full(2, np.nan), np.ones(2, bool)), "must not hold NaN"),
    "mode": (lambda: M.server_memory(M.BertConfig(), SPEC, mode="both"), "mode must be one of single"),
    "length": (lambda: M.server_memory(M.BertConfig(), SPEC, length=513), r"length in 1\.\.512"),
}

test_masked_multidomain_rejects_bad_input = rejects(BAD)
