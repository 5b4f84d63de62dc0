"""Sort-of-CLEVR and triangles: answers by brute force, and pictures that hold what they should."""

import numpy as np
import pytest

from ref.tasks.shapes import COLORS, answer_of, sort_of_clevr, triangles

WORLD = sort_of_clevr(0, 8)


def objects(image):
    """{colour: (centre, is a circle)} read off the picture; None where one object hides another."""
    found = {}
    for i, color in enumerate(COLORS):
        y, x = np.nonzero(np.isclose(image, np.array(color) / 255).all(axis=-1))
        assert len(x), "every object is seen"
        if len(x) not in (81, 121):  # pixels of a circle and of a square
            return None
        found[i] = (np.array([(x.min() + x.max()) / 2, (y.min() + y.max()) / 2]), len(x) == 81)
    return found


def angle(a, b, c):
    """Degrees at a."""
    u, v = b - a, c - a
    return np.degrees(np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1)))


def by_hand(seen, question):
    kind, subtype = question[12:15].argmax(), question[15:].argmax()
    first = question[:6].argmax()
    (at, circle), others = seen[first], [seen[i] for i in seen if i != first]
    name = lambda round_: 3 if round_ else 2
    if kind == 0:
        return [name(circle), 0 if at[0] < 37.5 else 1, 0 if at[1] < 37.5 else 1][subtype]
    if kind == 1:
        by_distance = sorted(others, key=lambda o: np.linalg.norm(o[0] - at))
        return [name(by_distance[0][1]), name(by_distance[-1][1]), 4 + sum(o[1] == circle for o in others)][
            subtype
        ]
    second = question[6:12].argmax()
    to, others = seen[second][0], [seen[i][0] for i in seen if i not in (first, second)]
    if subtype == 0:
        return 4 + sum(all(min(at[k], to[k]) <= c[k] <= max(at[k], to[k]) for k in (0, 1)) for c in others)
    if subtype == 1:
        unit = (to - at) / np.linalg.norm(to - at)
        return 0 if any(np.linalg.norm((c - at) - ((c - at) @ unit) * unit) <= 12 for c in others) else 1
    widest = [max(angle(at, to, c), angle(to, c, at), angle(c, at, to)) for c in others]
    return 4 + sum(90 - 1e-9 <= w < 180 - 1e-6 for w in widest)


def test_shapes_answers_follow_from_the_picture():
    hidden = 0
    for image, questions, answers, kinds in zip(
        *(WORLD[k] for k in ("image", "question", "answer", "kind")), strict=True
    ):
        seen = objects(image)
        if seen is None:
            hidden += 1
            continue
        centers = [c for c, _ in seen.values()]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(centers) for b in centers[:i]]
        assert min(gaps) > 10
        for question, answer, kind in zip(questions, answers, kinds, strict=True):
            assert question[12:15].argmax() == kind
            assert question.sum() == (4 if kind == 2 else 3)
            assert by_hand(seen, question) == answer
    assert hidden < 4


def test_shapes_kinds_and_answers_all_occur():
    counts = np.bincount(sort_of_clevr(1, 30)["answer"].ravel(), minlength=10)
    print("answers:", counts)
    assert (counts[:9] > 0).all()
    again = sort_of_clevr(0, 8)
    assert all(np.array_equal(again[k], WORLD[k]) for k in WORLD)
    centers = np.array([[10, 10], [30, 10], [50, 10], [10, 40], [30, 40], [50, 40]])
    assert answer_of(centers, np.zeros(6, bool), 2, 2, 0, 1) == 4 + 3  # four, but one is on their line


def test_shapes_triangles_are_labelled_by_their_sides():
    images, labels = triangles(0, 40, dots=1, spread=0)
    assert 5 < labels.sum() < 35
    for image, label in zip(images, labels, strict=True):
        y, x, _ = np.nonzero(image)
        at = np.stack([x, y], axis=1).astype(float)
        assert len(at) == 3
        sides = sorted(np.linalg.norm(at - np.roll(at, 1, axis=0), axis=1))
        # corners are rounded to pixels, which moves a side of 12 or more by at most sqrt(2)
        assert sides[2] - sides[0] <= 2 * np.sqrt(2) if label else sides[2] >= 1.3 * sides[0] - 4


def test_shapes_reject_bad_input():
    with pytest.raises(ValueError, match="questions >= 1"):
        sort_of_clevr(0, 1, questions=0)
    with pytest.raises(ValueError, match="dots >= 1"):
        triangles(0, 1, dots=0)
    assert sort_of_clevr(0, 0)["image"].shape == (0, 75, 75, 3)


def test_shapes_give_up_where_there_is_no_place(monkeypatch):
    monkeypatch.setattr("ref.tasks.shapes.TRIES", 3)
    with pytest.raises(RuntimeError, match="no place for six objects in 3 tries"):
        sort_of_clevr(0, 1)
    with pytest.raises(RuntimeError, match="no triangle in 3 tries"):
        triangles(0, 40)
