"""Number formats: against their definitions bit by bit, accel against ref, and the errors of rounding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import accel.blocks.formats as accel_formats
from ref.blocks.formats import BLOCKS, dequantize, quantize, round_bf16, row_bytes

seeds = st.integers(0, 2**32 - 1)
ENCODED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def half(raw, i):
    return float(np.frombuffer(bytes(raw[i : i + 2]), "<f2")[0])


def nibble(raw, start, j):
    return raw[start + j % 16] >> 4 if j >= 16 else raw[start + j] & 15


def six_bits(b, j):
    """Scale and minimum j of Q4_K and Q5_K from their twelve bytes."""
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return b[j + 4] & 15 | b[j - 4] >> 6 << 4, b[j + 4] >> 4 | b[j] >> 6 << 4


def weight(raw, kind, j):
    """Weight j of one block in exact arithmetic, from Python integers."""
    raw = [int(b) for b in raw]
    word = lambda i: int.from_bytes(bytes(raw[i : i + 4]), "little")
    signed = lambda b: b - 256 if b > 127 else b
    if kind == "Q4_0":
        return (nibble(raw, 2, j) - 8) * half(raw, 0)
    if kind == "Q4_1":
        return nibble(raw, 4, j) * half(raw, 0) + half(raw, 2)
    if kind == "Q5_0":
        return (nibble(raw, 6, j) + 16 * (word(2) >> j & 1) - 16) * half(raw, 0)
    if kind == "Q5_1":
        return (nibble(raw, 8, j) + 16 * (word(4) >> j & 1)) * half(raw, 0) + half(raw, 2)
    if kind == "Q8_0":
        return signed(raw[2 + j]) * half(raw, 0)
    h, g, lane = j // 128, j // 32 % 4, j % 32
    if kind == "Q2_K":
        s = raw[j // 16]
        return half(raw, 80) * (s & 15) * (raw[16 + 32 * h + lane] >> 2 * g & 3) - half(raw, 82) * (s >> 4)
    if kind == "Q3_K":
        q = (raw[32 + 32 * h + lane] >> 2 * g & 3) - (0 if raw[lane] >> (4 * h + g) & 1 else 4)
        s, b = j // 16, raw[96:108]
        low = b[s] & 15 if s < 8 else b[s - 8] >> 4
        return half(raw, 108) * ((low | (b[8 + s % 4] >> 2 * (s // 4) & 3) << 4) - 32) * q
    if kind in ("Q4_K", "Q5_K"):
        s = j // 32
        sc, mn = six_bits(raw[4:16], s)
        start = 16 if kind == "Q4_K" else 48
        byte = raw[start + 32 * (s // 2) + lane]
        q = byte >> 4 if s % 2 else byte & 15
        q += 16 * (raw[16 + lane] >> s & 1) if kind == "Q5_K" else 0
        return half(raw, 0) * sc * q - half(raw, 2) * mn
    q = raw[64 * h + 32 * (g % 2) + lane] >> 4 * (g // 2) & 15 | (raw[128 + 32 * h + lane] >> 2 * g & 3) << 4
    return half(raw, 208) * signed(raw[192 + j // 16]) * (q - 32)


@pytest.mark.parametrize("kind", [k for k in BLOCKS if k.startswith("Q")])
def test_formats_decode_as_defined(kind):
    """Each product is exact, each sum rounds once: so the float32 of the exact value, bit for bit."""
    n, size = BLOCKS[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2, size), dtype=np.uint8)
    if kind in ("Q2_K", "Q3_K", "Q6_K"):
        at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}[kind]
    else:
        at = (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    for i in at:
        raw[..., i + 1] = raw[..., i + 1] & 0xBF  # keep the scales finite
    got = dequantize(raw.reshape(3, -1), kind=kind)
    want = [[np.float32(weight(b, kind, j)) for b in row for j in range(n)] for row in raw]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(accel_formats.dequantize(raw.reshape(3, -1), kind=kind), got)


@given(seeds, st.sampled_from(ENCODED), st.sampled_from((1e-6, 1e-3, 1.0, 300.0)))
def test_formats_round_trip_is_a_projection(seed, kind, scale):
    """Quantising what was dequantised changes nothing but, for 4 and 5 bits, the rounding of d once more."""
    w = scale * np.random.default_rng(seed).standard_normal((2, 96))
    once = dequantize(quantize(w, kind=kind), kind=kind)
    raw = quantize(once, kind=kind)
    twice = dequantize(raw, kind=kind)
    if kind in ("F32", "F16", "BF16"):
        np.testing.assert_array_equal(once, twice)
        return
    # One ulp of the float16 d, normal or not, times the largest code, and one of the minimum.
    d = np.abs(half_values(raw, kind))
    ulp = np.maximum(d * 2.0**-10, 2.0**-24).repeat(32, axis=-1)
    least = np.maximum(np.abs(once) * 2.0**-10, 2.0**-24) if kind.endswith("_1") else 0
    assert (np.abs(once - twice) <= ulp * 127 + least).all()


def half_values(raw, kind):
    """The scale of each block."""
    blocks = raw.reshape(*raw.shape[:-1], -1, BLOCKS[kind][1])
    return np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float64)[..., 0]


@given(seeds, st.sampled_from((0.01, 1.0, 100.0)))
def test_formats_errors_are_within_their_steps(seed, scale):
    """Half a step, the rounding of d times the largest code, for Q4_0 the one-sided range, the minimum's own
    rounding.
    """
    w = (scale * np.random.default_rng(seed).standard_normal((2, 96))).astype(np.float32)
    for kind, steps in (("Q8_0", 0.57), ("Q4_1", 0.51), ("Q4_0", 1.01), ("Q5_0", 1.02), ("Q5_1", 0.52)):
        raw = quantize(w, kind=kind)
        d = np.abs(half_values(raw, kind)).repeat(32, axis=-1)
        least = np.repeat(w.reshape(2, 3, 32).min(-1), 32, axis=-1)
        extra = np.abs(least) * 2.0**-11 if kind.endswith("_1") else 0
        assert (np.abs(dequantize(raw, kind=kind) - w) <= steps * d + extra).all(), kind


def test_formats_blocks_of_equal_weights():
    """Zeros stay zeros, a constant survives, and of equal magnitudes the first sets the sign of d."""
    for kind in ENCODED:
        np.testing.assert_array_equal(dequantize(quantize(np.zeros(32), kind=kind), kind=kind), 0)
    np.testing.assert_array_equal(dequantize(quantize(np.full(32, 0.75), kind="Q4_1"), kind="Q4_1"), 0.75)
    w = np.where(np.arange(32) % 2, 1.0, -1.0)
    assert half_values(quantize(w, kind="Q4_0")[None], "Q4_0").item() == 0.125
    assert half_values(quantize(-w, kind="Q4_0")[None], "Q4_0").item() == -0.125


@given(st.one_of(st.floats(width=32), st.floats(), st.integers(0, 2**16 - 1)))
def test_formats_bf16_is_the_nearest(x):
    """No bfloat16 number lies nearer, and of two equally near the even one is taken."""
    import ml_dtypes

    if isinstance(x, int):  # a number of the format, or the middle between two
        x = float((np.uint32(x) << 16 | 0x8000 * (x & 1)).astype(np.uint32).view(np.float32))
    if np.isnan(x):
        assert np.isnan(round_bf16(x))
        return
    got = float(round_bf16(np.float64(x)))
    bits = np.uint16(np.array(got, np.float64).astype(ml_dtypes.bfloat16).view(np.uint16))
    if not np.isfinite(got):
        assert abs(x) >= 2.0**127 * (2 - 2.0**-8)
        return
    assert float(np.array(bits).view(ml_dtypes.bfloat16)) == got
    for step in (-1, 1):
        if 0 <= (int(bits) & 0x7FFF) + step < 0x7F80:
            other = float(np.array(np.uint16(int(bits) + step)).view(ml_dtypes.bfloat16))
            assert abs(x - got) <= abs(x - other)
            if abs(x - got) == abs(x - other):
                assert int(bits) % 2 == 0


def test_formats_bf16_keeps_the_width_given():
    assert round_bf16(np.float32([1.003])).dtype == np.float32
    assert round_bf16([1.003]).dtype == np.float64
    raw = quantize(np.float32([1.003, -2.5]), kind="BF16")
    np.testing.assert_array_equal(dequantize(raw, kind="BF16"), round_bf16(np.float32([1.003, -2.5])))


def test_formats_reject_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"unknown kind 'Q4_2'; there are F32, F16"):
        dequantize(np.zeros(18, np.uint8), kind="Q4_2")
    with pytest.raises(ValueError, match="cannot quantise to 'Q6_K'"):
        quantize(np.zeros(256), kind="Q6_K")
    with pytest.raises(ValueError, match="multiple of Q4_1's block of 20, got uint8"):
        dequantize(np.zeros(21, np.uint8), kind="Q4_1")
    with pytest.raises(ValueError, match="raw must be uint8"):
        dequantize(np.zeros(20), kind="Q4_1")
    with pytest.raises(ValueError, match="row of 33 weights"):
        row_bytes(33, "Q8_0")
    with pytest.raises(ValueError, match="must be finite"):
        quantize(np.full(32, np.inf), kind="Q8_0")
