"""The small world of captions: every caption names its digit in its user's words."""

import numpy as np
import pytest

from ref.tasks.captions import DIGITS, MOODS, digit_captions


def test_captions_name_the_digit_in_the_words_of_the_user():
    labels = np.arange(30) % 10
    world = digit_captions(0, labels, users=4)
    assert len(world.documents) == 4
    for u, text, n in zip(world.users, world.captions, labels, strict=True):
        words = text.split()
        assert DIGITS[n] in words
        assert MOODS[u] in words
        assert words[-1] == "."
        assert MOODS[u] in world.documents[u]
    again = digit_captions(0, labels, users=4)
    assert again.captions == world.captions


def test_captions_reject_bad_input():
    with pytest.raises(ValueError, match=r"users must be in 1\.\.10"):
        digit_captions(0, [1], users=11)
    with pytest.raises(ValueError, match="labels must be digits"):
        digit_captions(0, [10])
