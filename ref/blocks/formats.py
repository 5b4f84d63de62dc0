"""Number formats: bfloat16, and the block formats of GGUF files, bit for bit.

A block holds 32 weights (super-blocks 256) as small integers, and one scale for them all as float16; some
formats add a minimum. Bytes are little endian, blocks run along the last axis. Everything here is computed in
float32, since the format is the subject. Source: the layouts of ggml, as the files of that family hold them.
"""

import numpy as np

# kind -> (weights a block, bytes a block)
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


def round_bf16(x):
    """The nearest bfloat16 number, ties to even, in the dtype of x (float64 unless it is float32).

    8 significant bits, exponents of float32; what rounds to 2^128 or beyond is infinite.
    """
    x = np.asarray(x)
    x = x if x.dtype == np.float32 else x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        _, e = np.frexp(x.astype(np.float64))  # |x| in [2^(e-1), 2^e)
        step = np.ldexp(1.0, np.maximum(e, -125) - 8)  # subnormal numbers share the step 2^-133
        y = np.where(np.isfinite(x), np.rint(x / step) * step, x)
        return np.where(np.abs(y) >= 2.0**128, np.copysign(np.inf, x), y).astype(x.dtype)


def block_of(kind):
    """(weights, bytes) of a block. Raises: ValueError naming the kinds there are."""
    if kind not in BLOCKS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(BLOCKS)}")
    return BLOCKS[kind]


def row_bytes(n, kind):
    """Bytes of a row of n weights. Raises: ValueError unless n is a multiple of the block."""
    weights, size = block_of(kind)
    if n % weights:
        raise ValueError(f"a row of {n} weights is not a multiple of {kind}'s block of {weights}")
    return n // weights * size


def dequantize(raw, *, kind):
    """The weights that the bytes stand for: uint8 [..., bytes] -> float32 [..., n].

    Raises: ValueError for an unknown kind, another dtype, or a row that is not a whole number of blocks.
    """
    weights, size = block_of(kind)
    raw = np.asarray(raw)
    check_raw(raw, kind)
    blocks = raw.reshape(*raw.shape[:-1], raw.shape[-1] // size, size)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or NaN: so are its weights
        values = _DECODE[kind](blocks)
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // size * weights)


def check_raw(raw, kind):
    """Raise ValueError unless raw is uint8 [..., bytes] with whole blocks of the kind."""
    _, size = block_of(kind)
    if raw.dtype != np.uint8 or not raw.ndim or raw.shape[-1] % size:
        raise ValueError(
            f"raw must be uint8 [..., bytes] with bytes a multiple of {kind}'s block of {size}, got "
            f"{raw.dtype} {list(raw.shape)}"
        )


def quantize(w, *, kind):
    """The bytes nearest to the weights, as ggml chooses them: float32 [..., n] -> uint8 [..., bytes].

    Kinds F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Codes are chosen with the float32 scale, before its
    rounding to float16; a block of zeros has scale 0 and the codes of 0.
    Raises: ValueError for another kind, weights that are not finite, or a row that is not whole blocks.
    """
    if kind not in _ENCODE:
        raise ValueError(f"cannot quantise to {kind!r}; there are {', '.join(_ENCODE)}")
    w = np.asarray(w, np.float32)
    if not w.ndim:
        raise ValueError("w must have at least one axis")
    size = row_bytes(w.shape[-1], kind)
    if not np.isfinite(w).all():
        raise ValueError("w must be finite")
    blocks = w.reshape(*w.shape[:-1], w.shape[-1] // BLOCKS[kind][0], BLOCKS[kind][0])
    return np.ascontiguousarray(_ENCODE[kind](blocks)).reshape(*w.shape[:-1], size)


# Decoders: blocks uint8 [..., blocks, bytes] -> float32 [..., blocks, weights].


def _q4_0(b):
    """(q - 8) d."""
    return _f16(b[..., :2]) * (_nibbles(b[..., 2:]) - np.float32(8))


def _q4_1(b):
    """q d + m."""
    return _f16(b[..., :2]) * _nibbles(b[..., 4:]) + _f16(b[..., 2:4])


def _q5_0(b):
    """(q - 16) d, the fifth bits in a 32-bit word."""
    return _f16(b[..., :2]) * (_nibbles(b[..., 6:]) + 16 * _bits(b[..., 2:6]) - np.float32(16))


def _q5_1(b):
    """q d + m, the fifth bits in a 32-bit word."""
    return _f16(b[..., :2]) * (_nibbles(b[..., 8:]) + 16 * _bits(b[..., 4:8])) + _f16(b[..., 2:4])


def _q8_0(b):
    """q d with q a signed byte."""
    return _f16(b[..., :2]) * np.ascontiguousarray(b[..., 2:]).view(np.int8).astype(np.float32)


def _q2_k(b):
    """d sc q - dmin mn: 16 sub-blocks of 16, scale and minimum in the two halves of a byte."""
    scale = _f16(b[..., 80:82]) * (b[..., :16] & 15).astype(np.float32)
    least = _f16(b[..., 82:84]) * (b[..., :16] >> 4).astype(np.float32)
    return _spread(scale, 16) * _crumbs(b[..., 16:80]) - _spread(least, 16)


def _q3_k(b):
    """d sc q: two low bits as Q2_K, minus 4 where the mask bit is 0, with 16 six-bit scales minus 32."""
    mask = (b[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit 4h + g, lane l
    q = _crumbs(b[..., 32:96]) - 4 * (1 - _flat(mask, 2))
    low = np.concatenate([b[..., 96:104] & 15, b[..., 96:104] >> 4], axis=-1)
    high = (
        b[..., None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    ) & 3  # byte 8 + j%4, bits 2(j//4)
    scale = (low | _flat(high, 2).astype(np.uint8) << 4).astype(np.float32) - np.float32(32)
    return _spread(_f16(b[..., 108:110]) * scale, 16) * q


def _q4_k(b):
    """d sc q - dmin mn: 8 sub-blocks of 32 with six-bit scales and minima."""
    scale, least = _scales_and_minima(b)
    return scale * _nibble_chunks(b[..., 16:144]) - least


def _q5_k(b):
    """As Q4_K with fifth bits: bit s of byte l belongs to lane l of sub-block s."""
    scale, least = _scales_and_minima(b)
    fifth = (b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return scale * (_nibble_chunks(b[..., 48:176]) + 16 * _flat(fifth, 2)) - least


def _q6_k(b):
    """d sc (q - 32): low nibbles, two high bits, 16 signed scales."""
    ql = b[..., :128].reshape(*b.shape[:-1], 2, 1, 64)
    low = ((ql >> np.array([0, 4], np.uint8)[:, None]) & 15).reshape(
        *b.shape[:-1], 256
    )  # half, nibble, 2 x 32
    qh = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32)
    high = ((qh >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(*b.shape[:-1], 256)
    scale = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    q = (low | high << 4).astype(np.float32) - np.float32(32)
    return _spread(_f16(b[..., 208:210]) * scale, 16) * q


def _scales_and_minima(b):
    """d sc and dmin mn of Q4_K and Q5_K, spread over the weights; two six-bit numbers share twelve bytes."""
    s = b[..., 4:16]
    first, second, rest = s[..., :4], s[..., 4:8], s[..., 8:]
    sc = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=-1)
    mn = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=-1)
    d, dmin = _f16(b[..., :2]), _f16(b[..., 2:4])
    return _spread(d * sc.astype(np.float32), 32), _spread(dmin * mn.astype(np.float32), 32)


def _f16(b):
    """Two bytes -> float32 [..., 1]."""
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(b):
    """Sixteen bytes -> 32 codes: all low halves, then all high halves."""
    return np.concatenate([b & 15, b >> 4], axis=-1).astype(np.float32)


def _nibble_chunks(b):
    """Chunks of 32 bytes -> 64 codes each: low halves, then high halves."""
    return _nibbles(b.reshape(*b.shape[:-1], -1, 32)).reshape(*b.shape[:-1], -1)


def _crumbs(b):
    """64 bytes -> 256 two-bit codes: bits 2g of byte 32 h + l are code 128 h + 32 g + l."""
    c = b.reshape(*b.shape[:-1], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return _flat(c & 3, 3)


def _bits(b):
    """Four bytes -> 32 bits, lowest first."""
    return np.unpackbits(b, axis=-1, bitorder="little").astype(np.float32)


def _spread(x, n):
    """One number a sub-block -> one a weight."""
    return np.repeat(x, n, axis=-1)


def _flat(x, axes):
    """Join the last axes; float32."""
    return x.reshape(*x.shape[:-axes], -1).astype(np.float32)


def _bf16_values(b):
    return (np.ascontiguousarray(b).view("<u2").astype(np.uint32) << 16).view(np.float32)


_DECODE = {
    "F32": lambda b: np.ascontiguousarray(b).view("<f4").astype(np.float32),
    "F16": _f16,
    "BF16": _bf16_values,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

# Encoders: float32 [..., blocks, weights] -> uint8 [..., blocks, bytes].


def _symmetric(w, bits):
    """Codes 0 .. 2^bits - 1 around the middle; the largest |x| gets code 0: d = x / -2^(bits-1)."""
    half = 1 << (bits - 1)
    first = np.argmax(np.abs(w), axis=-1, keepdims=True)  # of equals the first: it keeps the sign
    d = np.take_along_axis(w, first, axis=-1) / np.float32(-half)
    q = np.trunc(w * _inverse(d) + np.float32(half + 0.5))
    return d, np.clip(q, 0, 2 * half - 1).astype(np.uint8)


def _affine(w, bits):
    """Codes 0 .. 2^bits - 1 from the least weight m up, d = (max - min) / (2^bits - 1)."""
    top = (1 << bits) - 1
    m = w.min(axis=-1, keepdims=True)
    d = (w.max(axis=-1, keepdims=True) - m) / np.float32(top)
    q = np.trunc((w - m) * _inverse(d) + np.float32(0.5))
    return d, m, np.clip(q, 0, top).astype(np.uint8)


def _encode_q4_0(w):
    d, q = _symmetric(w, 4)
    return np.concatenate([_half(d), _pack(q)], axis=-1)


def _encode_q4_1(w):
    d, m, q = _affine(w, 4)
    return np.concatenate([_half(d), _half(m), _pack(q)], axis=-1)


def _encode_q5_0(w):
    d, q = _symmetric(w, 5)
    return np.concatenate([_half(d), _fifths(q), _pack(q & 15)], axis=-1)


def _encode_q5_1(w):
    d, m, q = _affine(w, 5)
    return np.concatenate([_half(d), _half(m), _fifths(q), _pack(q & 15)], axis=-1)


def _encode_q8_0(w):
    d = np.abs(w).max(axis=-1, keepdims=True) / np.float32(127)
    x = w * _inverse(d)
    size = np.floor(np.abs(x))  # round half away from zero, with a comparison that cannot round
    q = np.copysign(size + (np.abs(x) - size >= 0.5), x).astype(np.int8)
    return np.concatenate([_half(d), q.view(np.uint8)], axis=-1)


def _encode_bf16(w):
    return (round_bf16(w).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def _inverse(d):
    """1 / d in float32, and 0 for 0: a block of zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    # A scale under 2^-128 has no finite float32 inverse; its block is 0 in float16 anyway.
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(x):
    """float32 [..., 1] -> its float16 as two bytes; beyond 65504 it is infinite."""
    with np.errstate(over="ignore"):
        return x.astype("<f2").view(np.uint8)


def _pack(q):
    """32 codes -> 16 bytes: code j in the low half, code j + 16 in the high half of byte j."""
    return q[..., :16] | q[..., 16:] << 4


def _fifths(q):
    """The fifth bits of 32 codes -> four bytes, lowest first."""
    return np.packbits(q >> 4, axis=-1, bitorder="little")


_ENCODE = {
    "F32": lambda w: w.astype("<f4").view(np.uint8),
    "F16": _half,
    "BF16": _encode_bf16,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q8_0": _encode_q8_0,
}
