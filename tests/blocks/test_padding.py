"""Padding masks: read with their shape and dtype, applied without a trace of what they hide."""

import numpy as np
import pytest

from ref.blocks.padding import token_rows, zero_padding


def test_padding_rows_are_read_or_filled():
    mask = np.array([[True, False, True]])
    assert token_rows("token_mask", mask, (1, 3)) is mask
    assert token_rows("token_mask", None, (2, 3)).all()
    assert not token_rows("global_mask", None, (2, 3), default=False).any()


def test_padding_is_zero_whatever_it_held():
    x = np.array([[1.0, 2], [np.nan, np.inf], [3, 4]], np.float32)
    y, z = zero_padding(np.array([True, False, True]), x, np.arange(3)[:, None])
    assert y.tolist() == [[1, 2], [0, 0], [3, 4]]
    assert z.tolist() == [[0], [0], [2]]
    assert y.dtype == z.dtype == np.float64
    np.testing.assert_array_equal(zero_padding(None, x)[0], x)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((1, 3), bool), r"token_mask must be bool \[2, 3\], got \[1, 3\] of bool"),
        (np.ones((2, 3)), r"token_mask must be bool \[2, 3\], got \[2, 3\] of float64"),
    ],
)
def test_padding_refuses_another_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        token_rows("token_mask", mask, (2, 3))
