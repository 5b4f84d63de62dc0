"""Conditioning: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.memory import laws_pavlovian

globals().update(law_tests(laws_pavlovian))


@golden("pavlovian")
def test_pavlovian_golden_ref(case):
    run(case, ref.pavlovian)


@graded("pavlovian")
def test_pavlovian_golden_gradients(case):
    run_backward(case, ref.pavlovian)


P = ref.pavlovian
K, V, B = np.ones((5, 3)), np.ones((5, 2)), np.ones(5)
BAD = {
    "rule": (lambda: P.condition(K, K, V, rule="kohonen"), "rule must be one of"),
    "beta": (lambda: P.condition(K, K, V, beta=B[:4]), r"beta\.shape"),
    "decay": (lambda: P.condition(K, K, V, log_decay=B), "log_decay must not be above 0"),
    "decay_nan": (lambda: P.condition(K, K, V, log_decay=B * np.nan), "log_decay must not be above 0"),
    "decay_shape": (lambda: P.condition(K, K, V, log_decay=-V), r"log_decay\.shape\[1\] = 2"),
    "decay_rule": (lambda: P.condition(K, K, V, rule="oja", log_decay=-B), "log_decay belongs to rules"),
    "normalize": (lambda: P.condition(-K, K, V, normalize=True), "positive feature map"),
    "normalize_nan": (lambda: P.condition(K * np.nan, K, V, normalize=True), "positive feature map"),
    "normalize_rule": (lambda: P.condition(K, K, V, rule="delta", normalize=True), 'belongs to rule "hebb"'),
    "key_sum": (lambda: P.condition(K, K, V, key_sum=np.ones(3)), "key_sum belongs to normalize=True"),
    "state": (lambda: P.condition(K, K, V, state=np.ones((2, 3))), r"state\.shape\[0\] = 2"),
    "chunk": (lambda: P.condition(K, K, V, chunk=0), "chunk must be at least 1"),
    "values": (lambda: P.condition(K, K, V[:4]), r"v\.shape\[0\] = 4"),
    "vjp_rule": (lambda: P.condition_vjp(K, K, V, V, rule="oja"), "to have a backward pass"),
    "cotangent": (lambda: P.condition_vjp(K, K, V, K), r"cotangent\.shape\[1\] = 3"),
    "protocol": (
        lambda: P.conditioning_protocol("fear", beta=0.1, trials=3, rule="delta"),
        "name must be one of",
    ),
    "trials": (
        lambda: P.conditioning_protocol("blocking", beta=0.1, trials=0, rule="delta"),
        "trials must be",
    ),
    "pairs": (lambda: P.retrieval_fidelity(K, V[:4]), r"values\.shape\[0\] = 4"),
    "no_pairs": (lambda: P.retrieval_fidelity(K[:0], V[:0]), "at least one pair"),
    "load": (lambda: P.predicted_cosine(0, 4), "n >= 1"),
    "width": (lambda: P.predicted_bit_error(1, 0), "dk >= 1"),
    "p": (lambda: P.reliability(1.5, depth=1, width=1, heads=1), "0 <= p <= 1"),
    "depth": (lambda: P.reliability(0.5, depth=0, width=1, heads=1), "depth >= 1"),
    "heads": (lambda: P.reliability(0.5, depth=1, width=1, heads=0), "heads >= 1"),
    "vote": (lambda: P.reliability(0.5, depth=1, width=1, heads=1, vote="all"), 'vote "any" or "majority"'),
    "target": (lambda: P.heads_needed(0.5, depth=1, width=1, target=1.0), "0 < target < 1"),
    "hopeless": (lambda: P.heads_needed(1.0, depth=1, width=1, target=0.5), "p < 1"),
}

test_pavlovian_rejects_bad_input = rejects(BAD)
