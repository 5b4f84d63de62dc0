"""PMI: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.optim import tree_leaves
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.memory import laws_pmi

globals().update(law_tests(laws_pmi))
P = ref.pmi


@golden("pmi")
def test_pmi_golden_ref(case):
    run(case, P)


@graded("pmi")
def test_pmi_golden_gradients_ref(case):
    run_backward(case, P)


_, X, WM, LTM, ALL = laws_pmi.case(0)
W, C, R = ALL.write, ALL.consolidate, ALL.read._replace(write=ALL.write)
NET = P.init_pmi_transformer(0, vocab=7, positions=6, width=4, classes=3, heads=2, slots=3, segments=2)
CNN = P.init_pmi_cnn(0, channels=1, stages=(2, 2), width=4, classes=3, heads=2, slots=2, segments=2)
IDS = np.zeros((2, 5), int)
write = lambda x=X, wm=WM, p=W, **o: P.competitive_write(x, wm, p, **{"heads": 2, "topk": 2, **o})
BAD = {
    "topk_high": (lambda: write(topk=6), r"topk must be in 1\.\.T=5"),
    "topk_low": (lambda: write(topk=0), r"topk must be in 1\.\.T=5"),
    "heads": (lambda: write(heads=3), "heads must divide the width 4"),
    "gate": (lambda: write(gate="slot"), "gate must be one of"),
    "gate_size": (lambda: write(gate="memory"), r"w_gate\.shape\[1\] = 8, but must be 2"),
    "untied": (lambda: write(tie_mlp=False), "w_mlp must have 3 axes"),
    "slots": (lambda: write(wm=WM[:, :0]), "at least one slot"),
    "no_token": (lambda: write(x=X[:, :0], topk=None), "one token in x"),
    "rank": (lambda: write(x=X[0]), r"x must have shape \[B, T, Din\]"),
    "width": (lambda: write(wm=WM[..., :2]), "but axis D is 2"),
    "slot_weights": (lambda: write(p=W._replace(w_slot=W.w_slot[:2])), "w_slot"),
    "outer": (lambda: P.outer_product_attention(WM, WM, WM[..., :2]), r"v\.shape\[2\] = 2"),
    "segments": (lambda: P.consolidate(WM, LTM[:, :1], C), r"mix\.shape\[0\] = 2, but axis S is 1"),
    "long_shape": (lambda: P.consolidate(WM, LTM[..., :2], C), "ltm"),
    "readout": (lambda: P.read_memory(X, WM, LTM[:, :1], R, heads=2), "w_l must have S D = 4 columns"),
    "nothing": (
        lambda: P.read_memory(X, WM, LTM, R, heads=2, use_wm=False, use_ltm=False),
        "must not both be False",
    ),
    "layers": (lambda: P.pmi_transformer(IDS, NET, heads=2, topk=2, layers=0), "layers must be at least 1"),
    "ids": (lambda: P.pmi_transformer(IDS + 7, NET, heads=2, topk=2, layers=1), r"ids in 0\.\.6"),
    "long": (
        lambda: P.pmi_transformer(np.zeros((1, 7), int), NET, heads=2, topk=2, layers=1),
        "at most 6 long",
    ),
    "vectors": (
        lambda: P.pmi_transformer(np.ones((1, 5, 6)), NET, heads=2, topk=2, layers=1),
        "but must be 7",
    ),
    "reading_alone": (lambda: write(p=P.WriteParams(*W[:8])), "params lacks w_mlp, b_mlp"),
    "init_gate": (lambda: P.init_pmi(0, 3, 4, heads=2, slots=2, gate="slot"), "gate must be one of"),
    "count_gate": (lambda: P.pmi_params(3, 4, slots=2, segments=2, gate="slot"), "gate must be one of"),
    "channels": (
        lambda: P.pmi_cnn(np.ones((1, 8, 8, 2)), CNN, heads=2, topk=1),
        r"images\.shape\[3\] = 2, but must be 1",
    ),
    "memories": (
        lambda: P.pmi_cnn(np.ones((1, 8, 8, 1)), CNN._replace(pmi=()), heads=2, topk=1),
        "pmi must hold 1 to 2 memories",
    ),
    "init": (lambda: P.init_memory(1, 0, 4), "slots, width, segments must be >= 1"),
    "init_heads": (lambda: P.init_pmi(0, 3, 4, heads=3, slots=2), "multiple of heads"),
}

test_pmi_rejects_bad_input = rejects(BAD)


def test_pmi_edges():
    """An empty batch, maps for reading alone, one token, equal tokens, and NaN.

    Of equal tokens the first ones win; NaN stays in its example.
    """
    assert write(x=X[:0], wm=WM[:0]).shape == (0, 3, 4)
    none = P.pmi_layer(X[:0], WM[:0], LTM[:0], ALL, heads=2, topk=2)
    back = P.pmi_layer_backward(X[:0], WM[:0], LTM[:0], ALL, *none, heads=2, topk=2)
    assert [t.shape for t in none] == [t.shape for t in back[:3]]
    assert not any(g.any() for g in tree_leaves(back[3]))
    images = np.zeros((0, 8, 8, 1))
    assert P.pmi_cnn(images, CNN, heads=2, topk=1).shape == (0, 3)
    assert P.pmi_cnn_backward(images, CNN, np.zeros((0, 3)), heads=2, topk=1)[0].shape == images.shape
    few = P.WriteParams(*W[:8])
    np.testing.assert_array_equal(
        P.read_working_memory(X, WM, few, heads=2), P.read_working_memory(X, WM, W, heads=2)
    )
    assert write(x=X[:, :1], topk=1).shape == WM.shape
    assert P.pmi_transformer(IDS[:0], NET, heads=2, topk=2, layers=1).shape == (0, 3)
    same = P.write_weights(np.ones((1, 4, 3)), WM[:1], W, heads=2, topk=2)
    assert (same[..., :2] == 0.25).all()
    assert not same[..., 2:].any()
    bad = X.copy()
    bad[0, 0] = np.nan
    out = write(x=bad)
    assert np.isnan(out[0]).any()
    np.testing.assert_array_equal(out[1], write()[1])
