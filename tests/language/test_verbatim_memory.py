"""Verbatim memory: laws on ref, golden vectors, bad inputs, and the trained model (-m model)."""

import numpy as np
import pytest

import ref
from tests.golden_runner import golden, run
from tests.language import laws_verbatim_memory
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_verbatim_memory))

V = ref.verbatim_memory


@golden("verbatim_memory")
def test_verbatim_memory_golden_ref(case):
    run(case, V)


@pytest.mark.model
def test_verbatim_memory_trained_model_remembers_a_list():
    """SmolLM2 on one list of five nouns, read again and, for contrast, followed by another one."""
    weights = ref.smollm2.load_smollm2()
    surprisal = lambda ids: V.token_surprisal(ref.smollm2.forward(weights, ids)[0][None], ids[None])[0]
    ratio = {}
    for condition in ("repeat", "novel"):
        made = V.build_stimuli(V.noun_pools()[:2], condition=condition, list_length=5, delay=V.delay_text(26))
        lists = V.list_surprisal(surprisal, made[0], ref.smollm2, context=8192)
        ratio[condition] = V.repeat_surprisal(*(x[None] for x in lists))[0][0]
    assert ratio["repeat"] < 50 < ratio["novel"]


POOLS = [["a", "b", "c"], ["d", "e", "f"]]
MADE = {"list_length": 2, "delay": ""}
TINY, TOKENIZER = ref.smollm2.tiny_smollm2()
ONE = V.build_stimuli([["rain", "snow"]], condition="repeat", prefix="", prompt="a:", **MADE)[0]
FLAT = np.ones((2, 3))
QUANTISED = TINY._replace(blocks=TINY.blocks._replace(w_q=b""))
BAD = {
    "condition": (lambda: V.build_stimuli(POOLS, condition="new", **MADE), "condition must be one of repeat"),
    "length": (
        lambda: V.build_stimuli(POOLS, condition="repeat", list_length=4, delay=""),
        r"list_length must be in 1\.\.3",
    ),
    "one": (
        lambda: V.build_stimuli(POOLS, condition="permute", list_length=1, delay=""),
        r"in 2\.\.3 to permute",
    ),
    "none": (lambda: V.build_stimuli([], condition="repeat", **MADE), r"list_length must be in 1\.\.0"),
    "twice": (
        lambda: V.build_stimuli([["a", "a"]], condition="repeat", **MADE),
        r"pools\[0\] holds a noun twice",
    ),
    "shared": (lambda: V.build_stimuli([POOLS[0]] * 2, condition="novel", **MADE), "pools must be disjoint"),
    "alone": (
        lambda: V.build_stimuli(POOLS[:1], condition="novel", **MADE),
        "leave no sequence of another group",
    ),
    "method": (lambda: V.novel_pairing([0, 1], method="best"), "method must be one of official"),
    "half": (lambda: V.novel_pairing([0, 0, 1], method="distinct"), "at most half of the 3 sequences, got 2"),
    "list1": (lambda: V.code_tokens(["A"], ["."], [], [" b"]), "list1 must hold at least one word"),
    "list2": (lambda: V.code_tokens(["A"], [" b"], [], []), "list2 must hold at least one word"),
    "codes": (lambda: V.merge_subwords(np.ones(2), np.ones(3), np.ones(2)), r"trial_codes\.shape\[0\] = 3"),
    "tokens": (
        lambda: V.token_surprisal(np.ones((1, 2, 3)), np.array([[0, 3]])),
        r"labels must be in 0\.\.2",
    ),
    "no_token": (
        lambda: V.token_surprisal(np.ones((1, 0, 3)), np.zeros((1, 0), int)),
        "at least one token a row",
    ),
    "shape": (lambda: V.token_surprisal(np.ones((1, 2, 3)), np.array([[0]])), r"tokens\.shape\[1\] = 1"),
    "short": (lambda: V.repeat_surprisal(FLAT[:, :1], FLAT[:, :1]), "at least 2 nouns with drop_first=True"),
    "by_heart": (lambda: V.repeat_surprisal(0 * FLAT, FLAT), "first must not have surprisal 0"),
    "nan": (lambda: V.repeat_surprisal(FLAT, FLAT * np.nan), "first and second must be finite"),
    "nouns": (lambda: V.repeat_surprisal(FLAT, FLAT[:, :2]), r"second\.shape\[1\] = 2"),
    "median": (lambda: V.median_ci([]), "need numbers in x"),
    "median_nan": (lambda: V.median_ci(np.array([np.nan])), "need numbers in x"),
    "level": (lambda: V.median_ci(np.ones(2), level=1.0), "0 < level < 1"),
    "context": (lambda: V.list_surprisal(len, ONE, TOKENIZER, context=3), "more than the context of 3"),
    "before": (lambda: V.time_course([(np.ones(3), [0, 3, 3])]), "before must be at most 1"),
    "uneven": (
        lambda: V.time_course([(np.ones(2), [0, 3]), (np.ones(3), [0, 3, 3])], before=1),
        "one length",
    ),
    "quantised": (lambda: V.shuffle_qk(QUANTISED, 0), "params must hold w_q and w_k as arrays"),
    "cache": (
        lambda: V.cache_bytes_for_delay(-1, layers=1, kv_heads=1, head_dim=1),
        "delay must not be negative",
    ),
    "kind": (lambda: V.noun_pools("odd"), "kind must be"),
    "delay": (lambda: V.delay_text(10**6), "tokens must be at most"),
    "language": (lambda: V.synthetic_language(0, 1, nouns=10), "nouns must be a multiple of 10 from 200 on"),
    "probability": (
        lambda: V.synthetic_language(0, 1, repeat_probability=2),
        r"repeat_probability in \[0, 1\]",
    ),
    "names": (lambda: V.synthetic_language(0, 1, nouns=10_000), r"count must be in 1\.\.4900"),
}

test_verbatim_memory_rejects_bad_input = rejects(BAD)
