"""The long-text hack: laws on ref, golden vectors, bad inputs, and a trained tokenizer (-m model)."""

import numpy as np
import pytest

import ref
from ref.fetch import cached
from ref.models.text_classifier import TextConfig, train_texts
from tests.golden_runner import golden, run
from tests.language import laws_long_text_hack, laws_masked_multidomain
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_long_text_hack))

L = ref.long_text_hack


@golden("long_text_hack")
def test_long_text_hack_golden_ref(case):
    run(case, L)


@pytest.mark.model
def test_long_text_hack_stop_words_save_pieces_of_trained_tokenizers():
    """Docstrings in the pieces of SmolLM2 and MiniLM: a twelfth of them or more are stop words."""
    from ref.models.minilm import load_tokenizer

    corpus = L.docstring_corpus(families=("scipy.stats", "numpy"), limit=25)
    stop = L.english_stopwords()
    assert len(stop) == 318
    assert "not" in stop
    word_piece = load_tokenizer(cached("minilm") / "tokenizer.json")
    encoders = {
        "smollm2": L.Encoder(ref.smollm2.encode, 49152),
        "minilm": L.Encoder(lambda x: word_piece(x)[1:-1], 30522, unknown=100),
    }
    rows = L.compare_tokenizers(encoders, [t[:600] for t in corpus.texts])
    assert all(r.fertility >= 1 for r in rows)
    fit = [r for r in rows if r.unknown < 0.01]
    assert [r.name for r in rows if r.recommended] == [min(fit, key=lambda r: r.fertility).name]
    pieces = lambda text: len(ref.smollm2.encode(text))
    thinned = [L.thin(t, stopwords=stop) for t in corpus.texts]
    raw, cut = sum(map(pieces, map(L.thin, corpus.texts))), sum(map(pieces, thinned))
    assert cut < 0.92 * raw
    reach = lambda kept: [
        L.coverage(t, k, ref.smollm2.encode, 128)["coverage"] for t, k in zip(corpus.texts, kept, strict=True)
    ]
    assert np.mean(reach(thinned)) > np.mean(reach(map(L.thin, corpus.texts)))


PARAMS, IDS, MASK = laws_masked_multidomain.network(0)
ONE = {"ladders": {"x": "ab"}, "start": {"x": 0}, "order": ("x",)}
BAD = {
    "counts": (lambda: L.thin("a", min_count=2), "needs counts if it is positive"),
    "min_count": (lambda: L.thin("a", min_count=-1, counts={}), "min_count must not be negative"),
    "length": (lambda: L.truncate([1], length=2, cls_id=0, sep_id=0), "length must be at least 3"),
    "mode": (lambda: L.truncate([1], length=3, mode="tail", cls_id=0, sep_id=0), "mode must be one of head"),
    "room": (lambda: L.coverage("a", "a", list, 2), "length must be at least 3"),
    "words": (lambda: L.fertility(list, ["..."]), "texts must hold at least one word"),
    "f1": (lambda: L.macro_f1(np.array([3]), np.array([0]), num_classes=3), r"y must be in 0\.\.2"),
    "ladder": (lambda: L.dynamic_hpo(len, **{**ONE, "ladders": {"x": ""}}), r"ladders\['x'\] is empty"),
    "rung": (
        lambda: L.dynamic_hpo(len, **{**ONE, "start": {"x": 2}}),
        r"start must be a rung in 0\.\.1 of 'x'",
    ),
    "missing": (lambda: L.dynamic_hpo(len, **{**ONE, "start": {}}), "start must be a rung"),
    "order": (
        lambda: L.dynamic_hpo(len, **{**ONE, "order": ("y",)}),
        "order names 'y', but there are ladders",
    ),
    "extra": (lambda: L.dynamic_hpo(len, **{**ONE, "start": {"x": 0, "z": 1}}), "start names 'z'"),
    "no_order": (lambda: L.dynamic_hpo(len, **{**ONE, "order": ()}), "order must name a ladder"),
    "rounds": (lambda: L.dynamic_hpo(len, **ONE, rounds=0), "rounds be at least 1"),
    "gain": (lambda: L.dynamic_hpo(len, **ONE, min_gain=-1), "min_gain and budget not negative"),
    "budget": (lambda: L.dynamic_hpo(len, **ONE, budget=-1), "min_gain and budget not negative"),
    "table": (lambda: L.dynamic_hpo(np.ones(3), **ONE), r"objective must have one score .* shape \(2,\)"),
    "share": (lambda: L.held_out(["a"], share=2), r"share must be in \[0, 1\]"),
    "few": (lambda: train_texts(["a"], [0], TextConfig()), "texts beside the 1 held out"),
    "labels": (lambda: train_texts(["a", "b"], [0], TextConfig()), "need a label a text"),
    "cost": (lambda: L.encoder_cost(n=0, layers=1, dim=1, heads=1), "must be at least 1"),
    "mask": (lambda: L.encoder_classifier(IDS, MASK + 0, PARAMS, num_heads=2), "mask must be boolean"),
}

test_long_text_hack_rejects_bad_input = rejects(BAD)


def test_long_text_hack_rejects_foreign_files(tmp_path):
    journal = tmp_path / "trials"
    L.dynamic_hpo(np.ones(2), **ONE, journal=journal)
    with pytest.raises(ValueError, match="journal is of another search"):
        L.dynamic_hpo(np.ones(2), ladders={"y": "ab"}, start={"y": 0}, order=("y",), journal=journal)
    with pytest.raises(ValueError, match="holds no file of the Brown corpus"):
        L.brown_corpus(tmp_path)
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns text and label or category"):
        L.review_corpus(tmp_path / "r.csv")
