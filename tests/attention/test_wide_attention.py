"""Wide attention: laws on ref, golden vectors, bad inputs."""

import numpy as np
import pytest

import ref
from ref.blocks.transformer import AttentionParams
from tests.attention import laws_wide_attention
from tests.attention.house import to_golden, to_house
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_wide_attention))


BUILD = {"params": lambda tree: AttentionParams(**to_house(tree)), "extras": lambda tree: tree}


def outputs(case, result):
    """Gradients of parameters under the stored names."""
    return (result[0], to_golden(result[1])) if case.meta["fn"] == "multi_head_attention_bwd" else result


@golden("wide_attention")
def test_wide_attention_golden_ref(case):
    run(case, ref.wide_attention, build=BUILD, outs=outputs)


W = ref.wide_attention
X, Q, REAL = np.ones((2, 6, 4)), np.ones((2, 3, 6, 2)), np.ones((2, 6), bool)
P = AttentionParams(np.ones((4, 6)), np.ones((4, 6)), np.ones((4, 6)), np.ones((6, 4)))
CONFIG = W.WideConfig(1, 2, 4, 2, 8, vocab=9, max_length=5)
MODEL = W.init_encoder(np.random.default_rng(0), CONFIG)
mha = lambda **o: W.multi_head_attention(X, P, **{"heads": 3, "head_dim": 2, **o})
attend = lambda kind, extras=None, **options: W.attend(Q, Q, Q, kind=kind, extras=extras, options=options)
mask = lambda kind, **o: W.attention_mask(kind, 6, **o)
BAD = {
    "kind": (lambda: attend("reformer"), "kind must be one of dense, local"),
    "option": (lambda: attend("local", window=2), r"options \('block', 'neighbors'\), got \['window'\]"),
    "extras": (lambda: attend("linformer", {"e_k": np.ones((6, 2))}), "must hold e_k, e_v; it lacks e_v"),
    "projection": (
        lambda: attend("linformer", {"e_k": np.ones((5, 2)), "e_v": np.ones((6, 2))}),
        r"e_k\.shape\[0\] = 5",
    ),
    "features": (lambda: attend("performer", {"proj": np.ones((5, 3))}), r"proj\.shape\[1\] = 3"),
    "kernel": (
        lambda: attend("performer", {"proj": np.ones((5, 2))}, kernel="cos"),
        'kernel must be "softmax"',
    ),
    "blocks": (lambda: attend("sinkhorn", block=4, iterations=1), "block must divide the 6 tokens"),
    "rounds": (lambda: attend("sinkhorn", block=3, iterations=-1), "iterations must not be negative"),
    "weights": (
        lambda: attend("synthesizer", {"r1": np.ones((2, 6, 1)), "r2": np.ones((2, 1, 6))}),
        "axis H",
    ),
    "table": (lambda: attend("synthesizer", {"r1": np.ones((3, 6, 1)), "r2": np.ones((3, 1, 5))}), "axis T"),
    "no_mask": (lambda: mask("linear"), "to have a mask, got 'linear'"),
    "no_block": (lambda: mask("local"), "needs block >= 1, got None"),
    "window": (lambda: mask("longformer", window=0), "needs window >= 1, got 0"),
    "odd": (lambda: mask("longformer", window=3), "window must be even"),
    "stride": (lambda: mask("sparse", block=2), "needs stride >= 1, got None"),
    "ragged": (lambda: mask("bigbird", block=4), "block must divide the 6 tokens"),
    "key_mask": (lambda: mha(mask=REAL[0]), r"mask must be bool \[2, 6\]"),
    "mask_dtype": (lambda: mha(mask=np.ones((2, 6))), r"mask must be bool \[2, 6\]"),
    "heads": (lambda: mha(heads=2), r"w_q\.shape\[1\] = 6, but must be 4"),
    "head_dim": (lambda: mha(head_dim=0), "heads and head_dim must be at least 1"),
    "width": (lambda: W.multi_head_attention(X[..., :3], P, heads=3, head_dim=2), "axis d is 3 in x"),
    "return": (lambda: mha(kind="linear", return_weights=True), "return_weights must be False"),
    "cotangent": (
        lambda: W.multi_head_attention_bwd(X[..., :3], X, P, heads=3, head_dim=2),
        "axis d is 3 in do",
    ),
    "ratios": (lambda: W.aspect_ratios(0), "total_heads must be at least 1"),
    "long": (lambda: W.encoder(MODEL, np.ones((1, 6), int), config=CONFIG), "more than max_length=5"),
    "token": (
        lambda: W.encoder(MODEL, np.full((1, 5), 9), config=CONFIG),
        r"tokens must be in 0\.\.8, got 9",
    ),
    "depth": (lambda: W.listops(np.random.default_rng(0), 1, max_length=9, max_depth=1), "max_depth >= 2"),
    "length": (
        lambda: W.listops(np.random.default_rng(0), 1, max_length=99, min_length=50, max_depth=2, max_args=3),
        "min_length must be at most 5",
    ),
}

test_wide_attention_rejects_bad_input = rejects(BAD)


@pytest.mark.parametrize("kind", ["performer", "sinkhorn", "synthesizer"])
def test_wide_attention_says_what_has_no_backward_pass(kind):
    rng = np.random.default_rng(0)
    extras = {"proj": np.ones((4, 2)), "r1": rng.random((3, 6, 2)), "r2": rng.random((3, 2, 6))}
    options = {"block": 3, "iterations": 1} if kind == "sinkhorn" else None
    with pytest.raises(NotImplementedError, match=f"kind '{kind}' has no hand-written backward pass"):
        W.multi_head_attention_bwd(X, X, P, heads=3, head_dim=2, kind=kind, extras=extras, options=options)
