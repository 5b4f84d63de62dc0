"""Distillation: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.models.gpt import init_gpt
from tests.compression import laws_distillation
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_distillation))


@golden("distillation")
def test_distillation_golden_ref(case):
    run(case, ref.distillation)


D = ref.distillation
Z, Y, H = np.ones((3, 4)), np.array([0, 1, 3]), np.ones((2, 3, 4))
A = np.ones((2, 2, 3, 3))
ACTS = lambda layers, states: D.Activations(np.ones((layers, 2, 2, 3, 3)), np.ones((states, 2, 3, 4)))
NONE = np.zeros((2, 3), bool)
QKV = (np.ones((2, 2, 3, 4)),) * 3
BAD = {
    "temperature": (lambda: D.soft_kl(Z, Z, temperature=0), "temperature must be positive"),
    "temperature_nan": (lambda: D.soft_kl(Z, Z, temperature=np.nan), "temperature must be positive"),
    "reduction": (lambda: D.soft_kl(Z, Z, reduction="sum"), "reduction must be one of"),
    "empty": (lambda: D.soft_kl(Z[:0], Z[:0]), "must not be empty"),
    "classes": (lambda: D.soft_kl(Z, Z[:, :3]), r"teacher_logits\.shape\[1\] = 3"),
    "alpha": (lambda: D.kd_loss(Z, Z, Y, alpha=1.5), r"alpha must be in \[0, 1\]"),
    "label": (lambda: D.kd_loss(Z, Z, Y + 1), r"labels must be in 0\.\.3"),
    "label_float": (lambda: D.kd_loss(Z, Z, Y + 0.0), "labels must be integers"),
    "hard": (lambda: D.hard_distillation_loss(Z, Z, Z[:2], Y), "teacher_logits"),
    "width": (lambda: D.hidden_mse(H, H[..., :3]), r"teacher\.shape\[2\] = 3"),
    "proj": (lambda: D.hidden_mse(H, H, np.ones((5, 4))), r"proj\.shape\[0\] = 5"),
    "mask": (lambda: D.hidden_mse(H, H, mask=np.ones((2, 3))), "mask must be boolean"),
    "no_token": (lambda: D.hidden_mse(H, H, mask=NONE), "at least one valid token"),
    "heads": (lambda: D.attention_mse(A, A[:, :1]), r"teacher\.shape\[1\] = 1"),
    "layers": (lambda: D.layer_map(5, 2), "student_layers must divide"),
    "more": (lambda: D.layer_map(2, 4, kind="last"), "student_layers must divide"),
    "kind": (lambda: D.layer_map(4, 2, kind="first"), "kind must be"),
    "states": (
        lambda: D.tinybert_loss(ACTS(2, 2), ACTS(4, 5), np.eye(4)),
        r"student_acts\.hidden must hold 3",
    ),
    "relations": (lambda: D.minilm_loss(QKV, (QKV[0][:, :1],) * 3), "qkv_s has heads"),
    "no_relation": (lambda: D.minilm_loss(*[(x[0][:0],) * 3 for x in (QKV, QKV)]), "at least one valid"),
    "no_state": (lambda: D.patient_loss(H[:0], H[:0]), "student_cls must not be empty"),
    "cosine": (lambda: D.cosine_loss(H, H[..., :2]), "axis d"),
    "keep": (
        lambda: D.init_student_from_teacher(
            init_gpt(np.random.default_rng(0), vocab=3, context=2, dim=4, depth=2), (1, 0)
        ),
        "rising indices",
    ),
    "batches": (lambda: D.distill(lambda p, b, s: (p, 0), 0, [1], schedule=(("a", 2),)), "batches ended"),
    "encoder": (lambda: D.encoder_cost(1, 10, 4, 3, tokens=1), "heads must divide"),
}

test_distillation_rejects_bad_input = rejects(BAD)
