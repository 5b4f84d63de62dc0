"""The pictures of dashed curves: what they hold, and that the answer can be read from them."""

import numpy as np
import pytest

from ref.tasks.paths import DASH, MARK, path_finder


def connected(picture):
    """Whether one mark can be reached from the other by steps of at most three pixels, gaps included."""
    where = np.argwhere(picture)
    marks = [i for i, p in enumerate(where) if picture[tuple(p)] == MARK]
    near = np.abs(where[:, None] - where).max(-1) <= 2
    reach = np.arange(len(where)) == marks[0]
    for _ in where:
        reach = near[reach].any(0)
    return bool(reach[marks[1]])


def test_paths_answers_follow_from_the_pictures():
    tokens, labels = path_finder(0, 40, side=32, length=14)
    assert tokens.shape == (40, 1024)
    assert tokens.dtype == labels.dtype == np.int32
    assert 10 < labels.sum() < 30
    assert ((tokens == MARK).sum(1) == 2).all()
    dashes = (tokens == DASH).sum(1)
    assert (dashes >= 20).all()
    np.testing.assert_array_equal([connected(t.reshape(32, 32)) for t in tokens], labels == 1)
    again, _ = path_finder(0, 40, side=32, length=14)
    np.testing.assert_array_equal(again, tokens)
    # the number of dashes does not tell the answer
    assert abs(dashes[labels == 1].mean() - dashes[labels == 0].mean()) < 2


def test_paths_reject_bad_sizes():
    for options in ({"num_curves": 1}, {"length": 5}):
        with pytest.raises(ValueError, match="need batch >= 1"):
            path_finder(0, 2, **options)
    with pytest.raises(ValueError, match="find no room in side=11"):
        path_finder(0, 2, side=11)
    with pytest.raises(ValueError, match="batch=0"):
        path_finder(0, 0)
