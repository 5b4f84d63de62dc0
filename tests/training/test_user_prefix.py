"""User-aware prefix-tuning: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.transformer import BlockParams
from ref.models.gpt import GPTParams
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.training import laws_user_prefix

globals().update(law_tests(laws_user_prefix))
U = ref.user_prefix


def network(cls, block):
    """A stored tree as a network of these blocks; they may lack biases, or hold None."""
    blocks = lambda raw: tuple(block(*(b.get(n) for n in block._fields)) for b in raw["blocks"])
    return lambda raw: cls(**{**raw, "blocks": blocks(raw)})


def build(case):
    params = (
        (U.FusionParams, BlockParams) if case.meta["fn"] == "fusion" else (U.MappingParams, U.MappingBlock)
    )
    return {"params": network(*params), "lm_params": network(GPTParams, BlockParams)}


@golden("user_prefix")
def test_user_prefix_golden_ref(case):
    one = lambda case, result: (result,)  # a list of captions is one output
    run(case, U, build=build(case), outs=one if case.meta["fn"] == "generate_caption" else None)


@graded("user_prefix")
def test_user_prefix_golden_gradients_ref(case):
    run_backward(case, U, build=build(case))


RNG, MAP, FUSE, LM = laws_user_prefix.world(0)
X, W, PREFIX = np.ones((1, 4, 5)), np.ones((1, 2, 8)), np.ones((1, 2, 8))
IDS, MASK = np.zeros((1, 3), int), np.ones((1, 3), bool)
MODEL = U.CaptionModel(MAP, FUSE, LM, {"ann": (W[0], np.zeros(2, bool))}, (2, 2, 2))
TEXT = ["a b c d"]
loss = lambda p=PREFIX, ids=IDS, mask=MASK: U.prefix_lm_loss(p, ids, mask, LM, num_heads=2)
BAD = {
    "visual": (
        lambda: U.mapping_network(X[..., :4], MAP, num_heads=2),
        r"w_ck\.shape\[0\] = 5, but axis d_v is 4",
    ),
    "map_heads": (lambda: U.mapping_network(X, MAP, num_heads=3), "num_heads must divide d_m=8"),
    "no_token": (lambda: U.mapping_network(X[:, :0], MAP, num_heads=2), "visual hold a token"),
    "user": (lambda: U.fusion(PREFIX, W[..., :6], FUSE, num_heads=2), r"user\.shape\[2\] = 6"),
    "user_mask": (
        lambda: U.fusion(PREFIX, W, FUSE, num_heads=2, user_mask=MASK),
        r"user_mask\.shape\[1\] = 3",
    ),
    "fusion_heads": (lambda: U.fusion(PREFIX, W, FUSE, num_heads=5), "num_heads must divide the width 8"),
    "caption": (lambda: loss(mask=~MASK), "mask must hold at least one caption token"),
    "vocab": (lambda: loss(ids=IDS + 6), r"tokens must be in 0\.\.5"),
    "width": (lambda: loss(p=PREFIX[..., :6]), r"wte\.shape\[1\] = 8, but axis d is 6"),
    "positions": (lambda: loss(p=np.ones((1, 12, 8))), "15 positions, more than the 14"),
    "no_prefix": (lambda: loss(p=PREFIX[:, :0]), "prefix must hold at least one position"),
    "mask": (lambda: loss(mask=MASK[:, :2]), r"mask\.shape\[1\] = 2"),
    "beam": (lambda: U.beam_search(None, PREFIX, beam=0, max_len=2), "beam and max_len must be at least 1"),
    "length": (lambda: U.generate_caption(PREFIX[0], LM, num_heads=2, max_len=14), "exceed the 14 positions"),
    "stranger": (lambda: U.personalized_caption(X[0], "bob", MODEL), "'bob' is none of the 1 users"),
    "wordless": (lambda: U.personalized_caption(X[0], "ann", MODEL, require_user=True), "'ann' has no word"),
    "nan": (lambda: U.personalized_caption(X[0] * np.nan, "ann", MODEL), "image_tokens must be finite"),
    "constants": (
        lambda: U.fusion(PREFIX, W, FUSE._replace(constants=PREFIX[0, :0]), num_heads=2),
        r"params\.constants must hold at least one",
    ),
    "nan_prefix": (
        lambda: U.generate_caption(PREFIX[0] * np.nan, LM, num_heads=2, max_len=2),
        "prefix must be finite",
    ),
    "no_candidate": (
        lambda: U.beam_search(lambda _, t: np.full((1, 3), np.nan), None, beam=2, max_len=2),
        "at least one logit that is finite",
    ),
    "no_ids": (lambda: U.user_context(["a"], lambda w: [], LM.wte, 2), "encode give every word an id"),
    "words_k": (lambda: U.user_context(["a"], lambda w: [1], LM.wte, -1), "k must not be negative"),
    "other_user": (
        lambda: U.train_captioner(MODEL, (X, ["bob"], IDS, MASK), steps=1, seed=0),
        r"users must be among the model's 1, got \['bob'\]",
    ),
    "docs": (lambda: U.user_tfidf([]), "at least one document"),
    "norm": (lambda: U.user_tfidf(["a"], norm="l1"), 'norm must be "l2" or None'),
    "words": (lambda: U.user_words(np.ones((1, 3)), ["a", "b"], 1), r"weights\.shape\[1\] = 3"),
    "k": (lambda: U.user_words(np.ones((1, 2)), ["a", "b"], -1), "k must not be negative"),
    "pairs": (lambda: U.bleu([TEXT], []), "must pair at least one caption"),
    "refs": (lambda: U.cider(["a b"], ["a b"]), "refs must hold a list"),
    "n": (lambda: U.bleu([TEXT], TEXT, n=0), "n must be at least 1"),
    "steps": (lambda: U.train_captioner(MODEL, (X, ["ann"], IDS, MASK), steps=0, seed=0), "need steps"),
}

test_user_prefix_rejects_bad_input = rejects(BAD)


def test_user_prefix_edges():
    """An empty batch, documents without a word, a caption without a token."""
    assert U.mapping_network(X[:0], MAP, num_heads=2).shape == (0, 3, 8)
    assert U.fusion(PREFIX[:0], W[:0], FUSE, num_heads=2).shape == (0, 2, 8)
    weights, vocab = U.user_tfidf(["a b", "see the sea"])
    assert not weights[0].any()
    assert U.user_words(weights, vocab, 5)[0] == []
    assert U.rouge_l([TEXT], [""]) == 0
    assert U.meteor([TEXT], [""]).tolist() == [0]
    assert np.isnan(U.mapping_network(X * np.nan, MAP, num_heads=2)).all()
