"""Longformer: laws on ref, golden vectors, bad inputs."""

from dataclasses import replace

import numpy as np

import ref
from ref.attention.longformer import LongformerParams
from ref.blocks.transformer import QKVParams
from ref.models.bert import init_bert
from ref.models.heads import LinearHead
from tests.attention import laws_longformer
from tests.attention.house import to_golden, to_house
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_longformer))


def params(tree):
    """The stored twelve arrays as `LongformerParams`; qg, kg, vg, the maps of global rows, may be absent."""
    wide = {f"{n[0]}_{n[-1]}": x for n, x in tree.items() if n[1] == "g" and x is not None}
    local = {n: x for n, x in tree.items() if n[1] != "g"}
    return LongformerParams(*(QKVParams(**to_house(t)) for t in (local, wide or local)))


def outputs(case, result):
    """Gradients of parameters under the stored names."""
    if case.meta["fn"] != "longformer_attention_bwd":
        return result
    dx, dparams = result
    wide = {f"{n[0]}g{n[1:]}": g for n, g in to_golden(dparams.wide).items()}
    return dx, {**to_golden(dparams.local), **wide}


@golden("longformer")
def test_longformer_golden_ref(case):
    run(case, ref.longformer, build={"params": params}, outs=outputs)


F = ref.longformer
Q, X = np.ones((2, 2, 6, 3)), np.ones((2, 6, 4))
MAPS = QKVParams(*(np.ones(s) for s in ((4, 4), 4) * 3))
P = LongformerParams(MAPS, MAPS)
BERT = init_bert(np.random.default_rng(0), vocab=5, context=8, dim=4, depth=1, types=1)
MODEL, CONFIG = F.extend_to_longformer(BERT, F.LongformerConfig(2), new_len=8, window=2)
swa = lambda **o: F.sliding_window_attention(Q, Q, Q, **{"window": 2, **o})
layer = lambda **o: F.longformer_attention(X, P, **{"num_heads": 2, "window": 2, **o})
BAD = {
    "odd": (lambda: swa(window=3), "window must be even"),
    "zero": (lambda: swa(window=0), "at least 2"),
    "dilation": (lambda: swa(dilation=0), "dilation must be at least 1"),
    "causal": (lambda: swa(causal=True, global_mask=np.ones((2, 6), bool)), "global_mask must be None"),
    "method": (lambda: swa(method="fast"), "method must be one of band, chunks, dense"),
    "chunks_dilation": (lambda: swa(method="chunks", dilation=2), "needs dilation=1 and causal=False"),
    "chunks_causal": (lambda: swa(method="chunks", causal=True), "needs dilation=1 and causal=False"),
    "global_shape": (lambda: swa(global_mask=np.ones((2, 5), bool)), r"global_mask must be bool \[2, 6\]"),
    "token_dtype": (lambda: swa(token_mask=np.ones((2, 6))), r"token_mask must be bool \[2, 6\]"),
    "keys": (lambda: F.sliding_window_attention(Q, Q[:, :, :5], Q, window=2), r"k\.shape\[2\] = 5"),
    "cotangent": (lambda: F.sliding_window_attention_bwd(Q[..., :2], Q, Q, Q, window=2), "axis D is 2 in do"),
    "mask_window": (lambda: F.longformer_mask(4, window=1), "window must be even"),
    "mask_shape": (lambda: F.longformer_mask(4, window=2, global_mask=np.ones(3, bool)), "but must be 4"),
    "layer_window": (lambda: layer(window=5), "window must be even"),
    "layer_heads": (lambda: layer(num_heads=3), "num_heads must divide the width 4"),
    "layer_mask": (lambda: layer(token_mask=np.ones(6, bool)), r"token_mask must be bool \[2, 6\]"),
    "layer_width": (lambda: F.longformer_attention(X[..., :3], P, num_heads=2, window=2), "axis C is 3 in x"),
    "positions": (lambda: F.extend_positions(np.ones((6, 2)), new_len=3), "new_len >= 4"),
    "reserved": (lambda: F.extend_positions(np.ones((6, 2)), new_len=9, num_reserved=6), "num_reserved < 6"),
    "ids": (lambda: F.longformer_encoder(MODEL, np.full((1, 3), 5), config=CONFIG), r"ids must be in 0\.\.4"),
    "long": (
        lambda: F.longformer_encoder(MODEL, np.zeros((1, 9), int), config=CONFIG),
        r"positions must be in 0\.\.9, got 2\.\.10",
    ),
    "windows": (
        lambda: F.longformer_encoder(MODEL, np.zeros((1, 3), int), config=replace(CONFIG, window=(2, 4))),
        "one for each of 1 blocks",
    ),
    "encoder_mask": (
        lambda: F.longformer_encoder(
            MODEL, np.zeros((1, 3), int), config=CONFIG, token_mask=np.ones((1, 2), bool)
        ),
        r"token_mask must be bool \[1, 3\]",
    ),
    "labels": (
        lambda: F.mlm_loss(np.ones((3, 4)), np.array([0, 4, -100])),
        r"labels must be in 0\.\.3",
    ),
    "span": (
        lambda: F.span_logits(LinearHead(np.ones((4, 3)), np.ones(3)), X),
        r"w\.shape\[1\] = 3, but must be 2",
    ),
    "gold": (lambda: F.span_metrics(np.array([[0, 1]]), np.array([[1, 0]])), "gold must not end before"),
    "no_span": (lambda: F.span_metrics(np.zeros((0, 2)), np.zeros((0, 2))), "at least one span"),
    "tags": (lambda: F.entity_f1([["X"]], [["O"]]), "tags must be"),
    "rows": (lambda: F.entity_f1([["O"]], [["O", "O"]]), "rows of the same lengths"),
    "field": (lambda: F.receptive_field([3], [1]), "window must be even"),
    "cost": (lambda: F.longformer_cost(8, 2, 9, 4, num_heads=2), "0 <= num_global <= n"),
    "cost_heads": (lambda: F.longformer_cost(8, 2, 0, 4, num_heads=3), "dim a multiple of num_heads"),
}

test_longformer_rejects_bad_input = rejects(BAD)
