"""The opening chapters: their exercises' solutions are right, and what they list is what there is."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.docs import solutions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import opening  # noqa: E402


def test_opening_notation_offset():
    assert solutions.visible_keys(100, 3) == [101, 102, 103]


@pytest.mark.parametrize(
    ("shape", "no"),
    [((4,), True), ((7, 5), True), ((7, 4), False), ((0, 7, 4), False), ((2, 3, 7, 4), False)],
)
def test_opening_notation_refused(shape, no):
    assert solutions.refused(shape) == no


def test_opening_notation_layout():
    x = np.arange(120.0).reshape(2, 5, 3, 4)
    y = solutions.from_jax_layout(x)
    assert y.shape == (2, 3, 5, 4)
    assert y[1, 2, 4, 3] == x[1, 4, 2, 3]


@pytest.mark.parametrize("letter", opening.LETTERS)
def test_opening_letters_are_in_use(letter):
    """Every letter of the notation page is bound by some file of ref."""
    assert opening.axis_letters()[letter] > 0
