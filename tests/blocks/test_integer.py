"""Integer arithmetic: multipliers, requantising against other people's integers, roots, packing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.integer import integer_sqrt, pack_bits, quantize_multiplier, requantize, unpack_bits
from tests.golden_runner import golden, run

seeds = st.integers(0, 2**32 - 1)


@golden("hw_mcu_int8", only={"requantize"})
def test_integer_golden_requantize(case):
    from ref.blocks import integer

    run(case, integer)


@given(st.floats(2.0**-30, 2.0**30))
def test_integer_multiplier_is_the_nearest(real):
    m, e = quantize_multiplier(real)
    assert 2**30 <= m < 2**31
    assert abs(int(m) * 2.0 ** (int(e) - 31) / real - 1) <= 2.0**-31
    assert quantize_multiplier(0.0) == (0, 0)


def test_integer_multiplier_rounds_ties_away_from_zero():
    for half in (2**30 + 0.5, 2**30 + 1.5, 2**31 - 1.5):
        assert quantize_multiplier(half / 2**31) == (int(half + 0.5), 0)
    below = np.nextafter(2**30 + 0.5, 0)
    assert quantize_multiplier([below / 2**31, (2**31 - 0.5) / 2**31])[0].tolist() == [2**30, 2**30]
    assert quantize_multiplier((2**31 - 0.5) / 2**31) == (2**30, 1)


@given(seeds)
def test_integer_requantize_is_within_one_of_the_real_product(seed):
    rng = np.random.default_rng(seed)
    acc = rng.integers(-(2**31), 2**31, 100_000)
    m, e = quantize_multiplier(2.0 ** rng.uniform(-20, 0))
    want = acc * (int(m) * 2.0 ** (int(e) - 31))
    for rounding in ("double", "single"):
        got = requantize(acc, m, e, rounding=rounding)
        assert got.dtype == np.int32
        assert np.abs(got - np.rint(want)).max() <= 1
    exact = requantize(acc, m, e, rounding="single")
    assert (np.abs(exact - want) <= 0.5 + 1e-6).all()


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_integer_root_is_the_floor(values):
    n = np.array([*values, 0, 1, 2, 3, 4, 2**62])
    r = integer_sqrt(n)
    for root, value in zip(r.tolist(), n.tolist(), strict=True):
        assert root * root <= value < (root + 1) ** 2


@given(seeds, st.sampled_from((2, 4)), st.booleans(), st.integers(0, 9))
def test_integer_packing_round_trips(seed, bits, signed, size):
    low = -(2 ** (bits - 1)) if signed else 0
    q = np.random.default_rng(seed).integers(low, low + 2**bits, size)
    packed = pack_bits(q, bits=bits)
    assert packed.dtype == np.uint8
    assert len(packed) == -(-size * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits=bits, size=size, signed=signed), q)


def test_integer_first_entry_lies_in_the_lowest_bits():
    assert pack_bits(np.array([1, 15]), bits=4).tolist() == [0xF1]
    assert pack_bits(np.array([3, 0, 1, 2]), bits=2).tolist() == [0b10_01_00_11]


def test_integer_rejects_bad_input():
    for call, message in (
        (lambda: quantize_multiplier(-1.0), "real must be finite"),
        (lambda: quantize_multiplier(2.0**40), "between 2"),
        (lambda: requantize(np.ones(2), 1, 0), "acc must hold 32-bit integers"),
        (lambda: requantize(np.array([2**40]), 1, 0), "acc must hold 32-bit integers"),
        (lambda: requantize(np.array([2**30]), 2**30, 2), "must stay within 32 bits"),
        (lambda: requantize(np.array([1]), 2**30, 0, rounding="up"), "rounding must be"),
        (lambda: integer_sqrt(np.array([-1])), "must not be negative"),
        (lambda: pack_bits(np.array([16]), bits=4), "must fit 4 bits"),
        (lambda: pack_bits(np.array([-8, 8]), bits=4), "must fit 4 bits"),
        (lambda: pack_bits(np.array([1]), bits=3), "bits must be 2 or 4"),
        (lambda: unpack_bits(np.zeros(2, np.uint8), bits=4, size=2), "packed must hold 1 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
