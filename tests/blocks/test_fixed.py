"""Fixed point numbers: against exact rationals, and against the vectors of an independent implementation."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ref.blocks.fixed as fixed
from ref.blocks.fixed import OVERFLOW, QUANT, Fixed, fixed_cast, fixed_matmul
from tests.golden_runner import golden, run

formats = st.builds(
    Fixed, st.integers(1, 40), st.integers(-4, 20), st.sampled_from(QUANT), st.sampled_from(("WRAP", "SAT")),
    st.booleans(),
)  # fmt: skip
FIELDS = {"fx", "fw", "facc", "to"}


@golden("hw_fpga_fixed")
def test_fixed_golden_ref(case):
    build = {name: lambda raw: Fixed(**raw) for name in FIELDS if name in case.meta["kwargs"]}
    run(case, fixed, build=build)


def rounded(x, quant):
    """The integer that the rule gives a rational."""
    low = floor(x)
    if quant == "TRN":
        return low
    if quant == "TRN_ZERO":
        return low if x >= 0 else ceil(x)
    if quant == "RND":
        return floor(x + Fraction(1, 2))
    if x - low == Fraction(1, 2):
        return low + (low % 2)
    return floor(x + Fraction(1, 2))


def fitted(n, f):
    """The integer in range that the rule gives an integer."""
    if f.overflow == "SAT":
        return min(max(n, f.least), f.most)
    return (n - f.least) % (1 << f.width) + f.least


@given(formats, st.integers(-(2**45), 2**45), st.integers(-10, 50))
def test_fixed_cast_is_the_rule_on_rationals(f, raw, frac):
    exact = Fraction(raw) * Fraction(2) ** -frac
    want = fitted(rounded(exact * Fraction(2) ** f.frac, f.quant), f)
    assert fixed_cast(np.int64(raw), frac=frac, to=f) == want


@given(formats, st.floats(-1e6, 1e6))
def test_fixed_quantise_is_the_rule_on_rationals(f, x):
    want = fitted(rounded(Fraction(x) * Fraction(2) ** f.frac, f.quant), f)
    raw = f.quantise(x)
    assert raw == want
    assert f.value(raw) == float(Fraction(want) * Fraction(2) ** -f.frac)
    assert f.quantise(f.value(raw)) == raw  # a projection


@given(st.integers(0, 2**32 - 1))
def test_fixed_sums_that_wrap_have_no_order(seed):
    """Products cast one by one and added with wrap-around: any order of K; saturated sums depend on it."""
    rng = np.random.default_rng(seed)
    fx, fw, facc = Fixed(16, 4), Fixed(12, 2), Fixed(18, 3)
    x, w = rng.integers(fx.least, fx.most, (3, 9)), rng.integers(fw.least, fw.most, (4, 9))
    p = rng.permutation(9)
    call = lambda x, w, f: fixed_matmul(x, w, fx=fx, fw=fw, facc=f)
    np.testing.assert_array_equal(call(x, w, facc), call(x[:, p], w[:, p], facc))
    sat = Fixed(8, 8, overflow="SAT")
    up = np.array([[100, 100, -100]]), np.array([[1, 1, 1]])
    one = Fixed(8, 8)
    run = lambda order: fixed_matmul(up[0][:, order], up[1][:, order], fx=one, fw=one, facc=sat)[0, 0]
    assert (run([0, 1, 2]), run([0, 2, 1])) == (27, 100)
    wide, bias = Fixed(40, 12), [1, 2, 3, 4]
    exact = fixed_matmul(x, w, fx=fx, fw=fw, facc=wide, bias_raw=bias, per_product_cast=False)
    np.testing.assert_array_equal(exact, x @ w.T * 2 ** (28 - 22) + [1, 2, 3, 4])


def test_fixed_ends_and_bad_input():
    f = Fixed(8, 4, "RND", "SAT")
    np.testing.assert_array_equal(
        f.value(f.quantise([-np.inf, np.inf, 1e30, -1e30])), [-8, 7.9375, 7.9375, -8]
    )
    with pytest.raises(OverflowError, match="do not fit <8, 4>, the worst is 9"):
        Fixed(8, 4, overflow="CHECK").quantise([1.0, 9.0, -8.5])
    for bad, words in (
        (lambda: Fixed(0, 0), "width"),
        (lambda: Fixed(8, 4, "UP"), "quant"),
        (lambda: Fixed(8, 4, overflow="LOSE"), "overflow"),
        (lambda: f.quantise(np.nan), "NaN"),
        (lambda: fixed_cast([0.5], frac=1, to=f), "raw must be integers"),
        (lambda: fixed_cast([1], frac=-70, to=f), "more than an int64 holds"),
        (lambda: fixed_matmul([1], [[1]], fx=f, fw=f, facc=f), "x_raw must be"),
        (lambda: Fixed(8, 2.5), "integer must be an integer"),
        (lambda: fixed_matmul([[1]], [[1]], fx=Fixed(40, 4), fw=Fixed(40, 4), facc=f), "63 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    assert set(OVERFLOW) == {"WRAP", "SAT", "CHECK"}
