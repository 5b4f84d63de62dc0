"""The generated tasks: their layout, that they can be solved, that the stories' answers follow from them."""

import numpy as np
import pytest

from ref.tasks.sequences import (
    PEOPLE,
    PLACES,
    STORY_KINDS,
    STORY_WORDS,
    copying_baseline,
    copying_task,
    mqar_task,
    passkey_task,
    recall_task,
    selective_copy_task,
    story_task,
)


def test_sequences_copying_asks_for_the_symbols_after_the_delay():
    tokens, targets, weight = copying_task(0, 7, 12, n_symbols=5)
    assert tokens.shape == targets.shape == weight.shape == (7, 22)
    symbols = tokens[:, :5]
    assert symbols.min() >= 1
    assert symbols.max() <= 8
    assert (tokens[:, 5:16] == 0).all()
    assert (tokens[:, 16] == 9).all()
    assert (tokens[:, 17:] == 0).all()
    np.testing.assert_array_equal(targets, np.pad(symbols, ((0, 0), (17, 0))))
    assert (weight == 1).all()
    assert copying_baseline(500) == pytest.approx(10 * np.log(8) / 520)
    np.testing.assert_array_equal(copying_task(0, 7, 12, n_symbols=5)[0], tokens)


def test_sequences_recall_scores_the_digit_of_the_key():
    tokens, targets, weight = recall_task(np.random.default_rng(1), 50, 8)
    assert tokens.shape == (50, 11)
    for row, target in zip(tokens, targets[:, -1], strict=True):
        assert sorted(row[0:8:2]) == [1, 2, 3, 4]
        assert (row[8:10] == 0).all()
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert pairs[row[-1]] == 5 + target
    assert set(targets[:, -1]) == set(range(10))
    assert (weight[:, -1] == 1).all()
    assert weight.sum() == 50


def test_sequences_mqar_asks_for_every_key_once():
    tokens, targets, weight = mqar_task(0, 20, 24, 5, 16)
    for row, target, w in zip(tokens, targets, weight, strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5
        assert all(1 <= k < 8 <= v < 16 for k, v in pairs.items())
        asked = np.flatnonzero(row[10:]) + 10
        assert sorted(row[asked]) == sorted(pairs)
        np.testing.assert_array_equal(target[asked], [pairs[k] for k in row[asked]])
        np.testing.assert_array_equal(np.flatnonzero(w), asked)
    assert targets.sum() == targets[weight > 0].sum()


def test_sequences_selective_copy_keeps_the_order():
    tokens, targets, weight = selective_copy_task(1, 20, 12, 4)
    for row, target in zip(tokens, targets, strict=True):
        np.testing.assert_array_equal(row[:11][row[:11] > 0], target[12:])
        assert row[11] == 9
        assert not row[12:].any()
    assert not targets[:, :12].any()
    assert weight.sum() == 80
    assert (weight[:, 12:] == 1).all()


def test_sequences_passkey_is_hidden_once():
    tokens, targets, weight = passkey_task(2, 50, 12, n_digits=3)
    places = set()
    for row, target in zip(tokens, targets, strict=True):
        (at,) = np.flatnonzero(row == 11)
        np.testing.assert_array_equal(row[at + 1 : at + 4], target[12:])
        assert (np.delete(row[:11], range(at, at + 4)) >= 13).all()
        assert row[11] == 12
        assert not row[12:].any()
        places.add(at)
    assert places == set(range(8))
    assert weight.sum() == 150
    assert (weight[:, 12:] == 1).all()
    assert passkey_task(0, 1, 7)[0].shape == (1, 12)


def answer(words):
    """The answer, by reading the story sentence by sentence."""
    place, has, been = {}, {p: set() for p in PEOPLE}, {}
    while words[1] in ("went", "took", "dropped"):
        (who, deed, what), words = words[:3], words[3:]
        if deed == "went":
            assert place.get(who) != what
            place[who] = what
            for thing in has[who]:
                been[thing].append(what)
        elif deed == "took":
            assert not any(what in h for h in has.values())
            assert been.setdefault(what, [place[who]])[-1] == place[who]
            has[who].add(what)
        else:
            has[who].remove(what)
    match words:
        case ["where", "is", who, "?"] if who in PEOPLE:
            return place[who]
        case ["where", "is", thing, "?"]:
            return been[thing][-1]
        case ["where", "was", thing, "before", where, "?"]:
            assert been[thing][-1] == where
            return been[thing][-2]
        case ["is", who, "in", where, "?"]:
            return "yes" if place[who] == where else "no"
        case ["how", "many", "has", who, "?"]:
            return str(len(has[who]))


@pytest.mark.parametrize("kind", STORY_KINDS)
def test_sequences_story_answers_follow_from_the_facts(kind):
    for n_facts in (STORY_KINDS[kind], 8):
        tokens, answers = story_task(3, 40, kind=kind, n_facts=n_facts)
        said = [answer([STORY_WORDS[i] for i in row]) for row in tokens]
        assert said == [STORY_WORDS[i] for i in answers]
    assert len(set(said)) >= 2
    assert kind in ("yes_no", "counting") or set(said) <= set(PLACES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: copying_task(0, 2, 0), "at least 1"),
        (lambda: recall_task(0, 2, 7), "length must be even"),
        (lambda: mqar_task(0, 2, 11, 4, 16), "length >= 3 n_pairs"),
        (lambda: mqar_task(0, 2, 12, 4, 8), "vocab >= 2 n_pairs"),
        (lambda: selective_copy_task(0, 2, 4, 4), "length > n_symbols"),
        (lambda: passkey_task(0, 2, 6), "length >= n_digits"),
        (lambda: story_task(0, 2, kind="four", n_facts=5), "kind must be one of one_fact"),
        (lambda: story_task(0, 2, kind="three_facts", n_facts=2), "three_facts needs n_facts >= 3"),
    ],
    ids=["delay", "odd", "short", "vocab", "full", "hidden", "kind", "facts"],
)
def test_sequences_reject_bad_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
