"""MTM: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.optim import adam_init
from ref.tasks.quotes import quote_corpus
from tests.golden_runner import golden, graded, run, run_backward
from tests.language import laws_mtm
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_mtm))

M = ref.mtm


@golden("mtm")
def test_mtm_golden_ref(case):
    run(case, M)


@graded("mtm")
def test_mtm_golden_gradients_ref(case):
    run_backward(case, M)


RNG = np.random.default_rng(0)
HEADS, LIMITS = laws_mtm.HEADS, laws_mtm.LIMITS
ROT, MATCH = M.init_rot(RNG, **laws_mtm.SIZES), M.init_match(RNG, depth=1, **laws_mtm.SIZES)
PAIRS = M.encode_pairs([[1, 2]], [[3]], **LIMITS)
IDS, MASK, TYPES = PAIRS
Q, S, K = np.ones(4), np.ones((3, 4)), np.ones((2, 4))
CHOSEN = M.select_key_sentences(Q, S, K)
TEXTS = [[1], [2], [3]]
ROWS = np.ones((2, 4)), np.array([0, 1]), np.ones(2), np.ones(2, bool)
RANKER = M.Reranker(MATCH, K, np.ones((12, 4)), 2, max_len=9, claim_max=3)
BAD = {
    "corpus": (lambda: M.bm25_fit([[], []]), "corpus must hold at least one term"),
    "claim": (lambda: M.encode_pairs([[1], []], [[1], [1]]), r"claims\[1\] is empty"),
    "room": (lambda: M.encode_pairs([[1]], [[1]], max_len=10, claim_max=8), r"at least claim_max \+ 3"),
    "pairs": (lambda: M.encode_pairs([[1]], []), "claims and sentences must be as many"),
    "mask": (lambda: M.rot_forward(IDS, MASK + 0, TYPES, ROT, **HEADS), "mask must be boolean"),
    "shown": (lambda: M.rot_forward(IDS, ~MASK, TYPES, ROT, **HEADS), "every first token shown"),
    "types": (lambda: M.rot_forward(IDS, MASK, TYPES + 1, ROT, **HEADS), r"types must be in 0\.\.1"),
    "ids": (lambda: M.rot_forward(IDS + 9, MASK, TYPES, ROT, **HEADS), r"ids must be in 0\.\.11"),
    "heads": (lambda: M.rot_forward(*PAIRS, ROT, num_heads=3), "num_heads must divide the width 4"),
    "target": (lambda: M.rot_loss(*PAIRS, np.ones((1, 3)), ROT, **HEADS), r"target\.shape\[1\] = 3"),
    "no_pair": (
        lambda: M.rot_loss(*(x[:0] for x in PAIRS), np.ones((0, 2)), ROT, **HEADS),
        "at least one pair",
    ),
    "anchor": (lambda: M.rot_loss(*PAIRS, np.ones((1, 2)), ROT, regularize=1.0, **HEADS), "anchor must be"),
    "regularize": (
        lambda: M.rot_loss(*PAIRS, np.ones((1, 2)), ROT, regularize=-1.0, **HEADS),
        "regularize must not be",
    ),
    "text": (lambda: M.sentence_vector([], S), "at least one token"),
    "clusters": (lambda: M.kmeans(S, k=4), r"k must be in 1\.\.3"),
    "no_cluster": (lambda: M.kmeans(S, k=0), r"k must be in 1\.\.3"),
    "init": (lambda: M.kmeans(S, k=2, init=S), r"init\.shape\[0\] = 3, but must be 2"),
    "points": (lambda: M.kmeans(S * np.nan, k=2), "x must be finite"),
    "quantiles": (lambda: M.pattern_bank(S, S, k=1, quantiles=(0.5, 0.25)), "quantiles must rise"),
    "bank": (lambda: M.pattern_bank(S, S + np.eye(3, 4), k=2), r"k must be in 1\.\.0"),
    "no_sentence": (lambda: M.select_key_sentences(Q, S[:0], K), "need a sentence in s"),
    "no_pattern": (lambda: M.select_key_sentences(Q, S, K[:0]), "a pattern in memory"),
    "top": (lambda: M.select_key_sentences(Q, S, K, top=0), "top >= 1"),
    "lambda": (lambda: M.select_key_sentences(Q, S, K, lambda_p=-0.1), "must not be negative"),
    "width": (lambda: M.select_key_sentences(Q[:3], S, K), r"s\.shape\[1\] = 4, but axis d is 3"),
    "nan": (lambda: M.select_key_sentences(Q * np.nan, S, K), "must be finite"),
    "article": (
        lambda: M.match_score([1], TEXTS[:2], CHOSEN, K, MATCH, **HEADS, **LIMITS),
        "must be the 3 sentences",
    ),
    "weights": (
        lambda: M.match_score([1], TEXTS, CHOSEN, K, MATCH, top=2, **HEADS, **LIMITS),
        r"min\(top, 3\) weights",
    ),
    "memory": (
        lambda: M.match_score([1], TEXTS, CHOSEN, K[:, :3], MATCH, **HEADS, **LIMITS),
        r"memory\.shape\[1\] = 3, but axis d is 4",
    ),
    "probability": (lambda: M.prediction_weight(np.array([1.5]), np.array([1])), "p must be probabilities"),
    "weight": (
        lambda: M.update_memory(K, ROWS[0], ROWS[1], -ROWS[2], ROWS[3]),
        "weight must not be negative",
    ),
    "pattern": (lambda: M.update_memory(K, ROWS[0], ROWS[1] + 1, *ROWS[2:]), r"pattern must be in 0\.\.1"),
    "rows": (lambda: M.update_memory(K, ROWS[0][:1], *ROWS[1:]), r"pattern\.shape\[0\] = 2"),
    "queries": (lambda: M.mrr([], []), "one list a query"),
    "lists": (lambda: M.hit_at([[1]], [[1], [2]], k=1), "one list a query, got 1 and 2"),
    "k": (lambda: M.map_at([[1]], [[1]], k=0), "k must be at least 1"),
    "k_hit": (lambda: M.hit_at([[1]], [[1]], k=0), "k must be at least 1"),
    "empty": (lambda: RANKER.select([1], []), "at least one sentence"),
    "no_claim": (lambda: RANKER.score([], [[1]]), "at least one token"),
    "epoch": (
        lambda: M.train_epoch(RANKER, [[1]], [[[1]]], [0, 1], adam_init(MATCH), rng=RNG),
        "need a label a pair, got 1, 1 and 2",
    ),
    "no_pairs": (lambda: M.train_epoch(RANKER, [], [], [], adam_init(MATCH), rng=RNG), "need a label a pair"),
    "cost": (lambda: M.selection_cost(0, dim=1, patterns=1, top=1, articles=1), "must be at least 1"),
    "quotes": (lambda: quote_corpus(RNG, [["a"]] * 5, claims=1), "1 articles of 6 sentences asked"),
}

test_mtm_rejects_bad_input = rejects(BAD)
