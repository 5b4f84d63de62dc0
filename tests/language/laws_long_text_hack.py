"""Laws of the long-text hack on ref alone: NumPy and Hypothesis."""

import re
import tempfile
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.data import text
from ref.language.long_text_hack import (
    Encoder,
    HackConfig,
    TextConfig,
    brown_corpus,
    classify_texts,
    compare_tokenizers,
    coverage,
    docstring_corpus,
    dynamic_hpo,
    encoder_cost,
    fertility,
    held_out,
    is_word,
    macro_f1,
    review_corpus,
    split_tokens,
    thin,
    train_text_classifier,
    truncate,
    word_counts,
    word_encoder,
)
from ref.models.text_classifier import BagParams, bag_classifier, bag_classifier_backward, train_texts
from tests.slopes import check_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
# Words with capitals, apostrophes, hyphens, digits and another script, marks, and whatever Hypothesis finds.
pieces = st.sampled_from(
    ["the", "The", "THE", "not", "don't", "well-known", "x_1", "3", "ağ", "...", "!", "-", "'", "a"]
)
texts = st.one_of(
    st.lists(pieces, max_size=30).map(" ".join),
    st.text(max_size=40),
    st.lists(pieces, max_size=9).map("".join),
)
STOP = {"the", "A", "not"}
HACKS = {
    "stop": {"stopwords": STOP},
    "rare": {"min_count": 2},
    "recurring": {"drop_recurring": True},
    "marks": {"drop_punctuation": True},
}


@given(texts)
def law_long_text_hack_tokens_are_words_and_single_marks(x):
    tokens = split_tokens(x)
    assert "".join(tokens) == re.sub(r"\s", "", x)
    for t in tokens:
        assert is_word(t) == bool(re.fullmatch(r"\w+(['’\-]\w+)*", t))
        assert is_word(t) or len(t) == 1
    assert thin(x) == " ".join(tokens)
    assert split_tokens(thin(x)) == tokens
    assert word_counts([x, x]) == {
        k: 2 * n for k, n in Counter(t.casefold() for t in tokens if is_word(t)).items()
    }


@given(texts, texts, st.sets(st.sampled_from(sorted(HACKS))))
def law_long_text_hack_thins_by_the_rules_one_after_another(x, other, chosen):
    counts = word_counts([x[: len(x) // 2], other])
    kept, seen = split_tokens(x), set()
    if "stop" in chosen:
        kept = [t for t in kept if t.casefold() not in {w.casefold() for w in STOP}]
    if "rare" in chosen:
        kept = [t for t in kept if not is_word(t) or counts[t.casefold()] >= 2]
    if "recurring" in chosen:
        first = []
        for t in kept:
            if not is_word(t) or t.casefold() not in seen:
                first.append(t)
            seen.add(t.casefold())
        kept = first
    if "marks" in chosen:
        kept = [t for t in kept if is_word(t)]
    options = {k: v for name in chosen for k, v in HACKS[name].items()}
    thinned = thin(x, counts=counts, **options)
    assert thinned == " ".join(kept)
    assert thin(thinned, counts=counts, **options) == thinned
    rest = iter(split_tokens(x))
    assert all(t in rest for t in kept)  # in the text's own order
    for order in list(permutations(sorted(chosen)))[:4]:  # one hack after another, in any order
        step = x
        for name in order:
            step = thin(step, counts=counts, **HACKS[name])
        assert step == (thinned if chosen else x)


@given(st.lists(st.integers(10, 99), max_size=30), st.integers(3, 20), st.sampled_from(("head", "head_tail")))
def law_long_text_hack_cuts_keep_the_front_and_by_choice_the_end(ids, length, mode):
    got = truncate(ids, length=length, mode=mode, cls_id=1, sep_id=2).tolist()
    room = length - 2
    assert len(got) == min(len(ids), room) + 2
    assert (got[0], got[-1]) == (1, 2)
    inner = got[1:-1]
    if len(ids) <= room:
        assert inner == ids
    else:
        front = room if mode == "head" else 3 * room // 4
        assert inner == ids[:front] + ids[len(ids) - room + front :]


@given(texts, st.integers(3, 20))
def law_long_text_hack_coverage_grows_with_room_and_with_thinning(x, length):
    encode = split_tokens  # a piece a token
    words = [t for t in split_tokens(x) if is_word(t)]
    before = {"coverage": 0.0, "type_coverage": 0.0, "pieces": 0}
    for room in (length, length + 1, length + 7):
        raw = coverage(x, thin(x), encode, room, stopwords=STOP)
        fits = sum(map(is_word, split_tokens(x)[: room - 2]))
        assert raw["coverage"] == (fits / len(words) if words and len(split_tokens(x)) > room - 2 else 1)
        assert all(raw[k] >= before[k] for k in raw)
        before = raw
        for options in (HACKS["stop"], HACKS["recurring"], HACKS["marks"]):
            thinned = thin(x, **options)
            assert len(encode(thinned)) <= len(encode(x))
            got = coverage(x, thinned, encode, room, stopwords=STOP)
            types = {t.casefold() for t in words} - {w.casefold() for w in STOP}
            shown = {t.casefold() for t in split_tokens(thinned)[: room - 2]} & types
            assert got["type_coverage"] == (len(shown) / len(types) if types else 1)
            assert got["coverage"] >= raw["coverage"]  # the same room reaches at least as far


def law_long_text_hack_coverage_counts_the_place_in_the_whole_text():
    x = "the cat sat on the mat , the end"
    letters = lambda s: [c for t in s.split() for c in t]  # a piece a letter
    thinned = thin(x, stopwords={"the", "on"})
    assert thinned == "cat sat mat , end"
    got = coverage(x, thinned, letters, 2 + 9, stopwords={"the", "on"})
    assert got == {"pieces": 9, "coverage": 6 / 8, "type_coverage": 3 / 4}  # mat is the sixth of eight words
    assert coverage(x, thinned, letters, 2 + 8)["coverage"] == 3 / 8  # mat does not fit any more
    assert coverage(x, thinned, letters, 2 + 10)["coverage"] == 6 / 8  # a comma, after six words
    assert coverage(x, thinned, letters, 2 + 13)["coverage"] == 1


def law_long_text_hack_fertility_shows_what_is_unknown():
    spell = Encoder(lambda x: [ord(c) for c in x if not c.isspace()], 256)
    lazy = Encoder(lambda x: [0] * len(x.split()), 1, unknown=0)
    words = word_encoder(word_counts(["one two , two"]) + Counter({",": 1}), size=3)
    sample = ["one two", "two , one"]
    assert fertility(spell, sample) == (13 / 4, 0, 0)
    assert fertility(spell.encode, sample) == (13 / 4, 0, 0)
    assert fertility(lazy, sample) == (5 / 4, 0, 1)
    assert fertility(words, ["one three"]) == (1, 0, 0.5)
    assert fertility(spell, ["a" * 511, "b"])[1] == 0.5
    rows = compare_tokenizers(
        {"spell": spell, "lazy": lazy, "words": words, "more": words._replace(vocab=99)}, sample
    )
    assert [r.name for r in rows if r.recommended] == ["words"]
    assert not any(r.recommended for r in compare_tokenizers({"lazy": lazy}, sample))


def hill(rungs, peak):
    """A score that falls with every step away from the peak, differently in each direction."""
    return -sum((n + 1) * abs(r - p) for n, (r, p) in enumerate(zip(rungs, peak, strict=True)))


@given(seeds, st.integers(0, 9))
@settings(max_examples=8)
def law_long_text_hack_search_climbs_and_goes_on_where_it_stopped(seed, budget):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 3)
    names, ladders = ("lr", "batch", "layers"), {}
    for name, size in zip(names, sizes, strict=True):
        ladders[name] = tuple(10.0 * np.arange(size))
    peak, start = [int(rng.integers(n)) for n in sizes], [int(rng.integers(n)) for n in sizes]
    table = np.array([hill(r, peak) for r in np.ndindex(*sizes)]).reshape(sizes)
    seen = []

    def objective(values):
        rungs = [int(values[n] / 10) for n in names]
        seen.append(tuple(rungs))
        return table[tuple(rungs)]

    options = {"ladders": ladders, "start": dict(zip(names, start, strict=True)), "order": names}
    best, score, trials = dynamic_hpo(objective, **options)
    assert [best[n] for n in names] == peak  # it falls on both sides of the peak along every ladder
    assert score == 0
    assert len(set(seen)) == len(seen) == len(trials)
    assert trials[:, :3].astype(int).tolist() == [list(s) for s in seen]
    np.testing.assert_array_equal(trials[:, 3], [table[s] for s in seen])
    again = dynamic_hpo(table, **options)
    assert again[:2] == (best, score)
    np.testing.assert_array_equal(again[2], trials)
    np.testing.assert_array_equal(dynamic_hpo(objective, **options)[2], trials)
    with tempfile.TemporaryDirectory() as folder:
        journal, parts, last = Path(folder) / "trials", [], -np.inf
        for n in range(99):
            got = dynamic_hpo(table, **options, journal=journal, budget=max(budget, 1))
            assert got[1] >= last
            parts, last = [*parts, got[2]], got[1]
            if not len(got[2]):
                break
            if n == 0:  # stopped while a line was being written
                journal.write_text(journal.read_text() + '{"rungs"')
        np.testing.assert_array_equal(np.concatenate(parts), trials)
        assert got[:2] == (best, score)


def law_long_text_hack_search_takes_steps_by_the_rules():
    flat = np.array([0.0, 1.0, 1.5, 9.0])
    options = {"ladders": {"x": "abcd"}, "order": ("x",)}
    best, score, trials = dynamic_hpo(flat, **options, start={"x": 0}, min_gain=0.5)
    assert (best, score) == ({"x": 1}, 1.0)  # half a point is not more than half a point
    # upwards 1 then 2; the second round knows 2 already and looks down only where up never moved
    assert trials.tolist() == [[0, 0], [1, 1], [2, 1.5]]
    down = dynamic_hpo(np.array([3.0, 2.0, 1.0, 0.0]), **options, start={"x": 2}, rounds=1)
    assert down[0] == {"x": 0}
    assert down[2][:, 0].tolist() == [2, 3, 1, 0]
    broken = dynamic_hpo(np.array([1.0, np.nan, 5.0, 0.0]), **options, start={"x": 0})
    assert broken[:2] == ({"x": 0}, 1.0)
    assert broken[2].tolist() == [[0, 1], [1, -np.inf]]
    lost = dynamic_hpo(lambda v: float("nan"), **options, start={"x": 0})
    assert lost[1] == -np.inf
    none = dynamic_hpo(flat, **options, start={"x": 0}, budget=0)
    assert none[1] == -np.inf
    assert none[2].shape == (0, 2)
    two = {"ladders": {"x": "ab", "y": "ab"}, "order": ("y",), "start": {"x": 1, "y": 0}}
    best, score, _ = dynamic_hpo(lambda v: float(v == {"x": "b", "y": "b"}), **two)
    assert (best, score) == ({"x": 1, "y": 1}, 1.0)  # what is not in the order stays at its start


@given(seeds)
@settings(max_examples=4)
def law_long_text_hack_bag_gradients_are_the_slopes(seed):
    rng = np.random.default_rng(seed)
    params = BagParams(rng.standard_normal((7, 4)), rng.standard_normal((4, 3)), rng.standard_normal(3))
    ids, mask = rng.integers(0, 7, (2, 5)), np.arange(5) < np.array([[5], [2]])
    d = rng.standard_normal((2, 3))
    check_slope(
        lambda p: (d * bag_classifier(ids, mask, p)).sum(),
        params,
        bag_classifier_backward(ids, mask, params, d),
        seed,
    )
    padded = np.where(mask, ids, 0)
    np.testing.assert_array_equal(bag_classifier(padded, mask, params), bag_classifier(ids, mask, params))


def law_long_text_hack_trains_on_what_is_left():
    """Passages of Hamlet against the same spelled backwards: a bag of thinned words tells them apart."""
    words = text().split()
    half = [" ".join(words[30 * n : 30 * n + 30]) for n in range(60)]
    both, labels = [*half, *(t[::-1] for t in half)], np.repeat([0, 1], 60)
    config = HackConfig(
        hacks=(("drop_punctuation", True), ("min_count", 2)), length=24, vocab=200, dim=8, depth=0, epochs=12,
        lr=0.1, validation=0.25,
    )  # fmt: skip
    model, history = train_text_classifier(both, labels, config)
    assert history.loss[-1] < history.loss[0]
    assert history.val_f1[history.best] == max(history.val_f1) > 0.9
    assert len(history.val_f1) - 1 - history.best <= config.patience
    guess = classify_texts(model, both)
    assert macro_f1(labels, guess, num_classes=2) > 0.9
    assert sum(model.counts.values()) < sum(word_counts(both).values())  # the held-out texts are not counted
    assert classify_texts(model, []).shape == (0,)
    small = TextConfig(length=8, vocab=50, dim=8, depth=1, num_heads=2, epochs=1, batch=8, validation=0.5)
    encoder, brief = train_texts(both[:20], labels[:20], small)
    assert len(brief.loss) == 2
    assert classify_texts(encoder, both[:3]).shape == (3,)


@given(st.integers(1, 2000), st.integers(1, 512))
def law_long_text_hack_square_of_the_length_takes_over_at_six_widths(n, dim):
    cost = encoder_cost(n=n, layers=2, dim=dim, heads=4, batch=3)
    linear, square = 3 * 2 * 24 * n * dim**2, 3 * 2 * 4 * n**2 * dim
    assert cost.flops == linear + square
    assert (square > linear) == (n > 6 * dim)
    assert cost.activation_bytes == 3 * 2 * (34 * n * dim + 5 * 4 * n * n)


def law_long_text_hack_quarter_of_the_length_saves_more_than_four():
    long, short = (encoder_cost(n=n, layers=12, dim=768, heads=12).flops for n in (512, 128))
    assert round(long / short, 2) == 4.32
    for dim in (1, 64, 768, 4096):
        a, b = (encoder_cost(n=n, layers=1, dim=dim, heads=1) for n in (512, 128))
        assert 4 < a.flops / b.flops < 16
        assert 4 < a.activation_bytes / b.activation_bytes < 16


def law_long_text_hack_docstrings_lose_a_twelfth_to_stop_words():
    """What the hacks leave of docstrings of NumPy, in words: arithmetic, with no ordering of accuracies."""
    corpus = docstring_corpus(families=("numpy", "numpy.random", "numpy.ma", "not_a_package"), limit=40)
    assert set(corpus.labels) == {"numpy", "numpy.random", "numpy.ma"}
    assert len(corpus.texts) == len(corpus.names) == len(set(corpus.names)) <= 120
    assert len({t[:100] for t in corpus.texts}) == len(corpus.texts)
    for t, label in zip(corpus.texts, corpus.labels, strict=True):
        assert not {w.lower() for w in re.findall(r"\w+", t)} & set(label.split("."))
    stop = set(
        "the of a to is in and be for it if are by with an this that as or from on which not can".split()
    )
    raw = [coverage(t, thin(t), split_tokens, 128) for t in corpus.texts[:30]]
    cut = [
        coverage(t, thin(t, stopwords=stop, drop_punctuation=True), split_tokens, 128)
        for t in corpus.texts[:30]
    ]
    assert all(b["coverage"] > a["coverage"] for a, b in zip(raw, cut, strict=True))
    kept = sum(len(split_tokens(thin(t, stopwords=stop))) for t in corpus.texts)
    assert kept < 0.92 * sum(len(split_tokens(t)) for t in corpus.texts)
    test = held_out(corpus.names)
    assert test.tolist() == [held_out([n])[0] for n in corpus.names]
    # a fair draw of 1,000 names is off by five standard errors once in a million
    share = held_out([f"name{n}" for n in range(1000)]).mean()
    assert abs(share - 0.2) < 5 * np.sqrt(0.16 / 1000)


def law_long_text_hack_reads_reviews_and_the_brown_corpus():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "r.csv").write_text(
            'text,label,source\n"good, fine",1,imdb\nbad,0,rt\n"good, fine",1,imdb\n', "utf-8"
        )
        corpus = review_corpus(folder / "r.csv")
        assert sorted(zip(corpus.texts, corpus.labels, strict=True)) == [("bad", "0"), ("good, fine", "1")]
        assert review_corpus(folder / "r.csv", source="imdb").texts == ["good, fine"]
        assert len(review_corpus(folder / "r.csv", limit=1).texts) == 1
        (folder / "ca01").write_text("The/at jury/nn\n\n./. said/vbd", "utf-8")
        (folder / "cr09").write_text("ha/uh 1/2/cd", "utf-8")
        (folder / "README").write_text("no/nn", "utf-8")
        brown = brown_corpus(folder)
        assert brown.texts == ["The jury . said", "ha 1/2"]
        assert brown.labels == ["press: reportage", "humor"]
        assert brown_corpus(folder, limit=1).names == ["ca01"]
