"""The block formats of GGUF files in JAX: the bytes to float32, bit for bit as in ref/blocks/formats.py.

Every product here is exact in float32 (a float16 scale and a small integer), so that a fused multiply-add
cannot change a bit.
"""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.shapes import lift
from ref.blocks.formats import block_of, check_raw, quantize, round_bf16, row_bytes

__all__ = ["block_of", "dequantize", "quantize", "round_bf16", "row_bytes"]


@partial(jax.jit, static_argnames="kind")
def dequantize(raw, *, kind):
    """The weights that the bytes stand for: uint8 [..., bytes] -> float32 [..., n]."""
    weights, size = block_of(kind)
    check_raw(raw, kind)
    blocks = raw.reshape(*raw.shape[:-1], -1, size)
    return _DECODE[kind](blocks).reshape(*raw.shape[:-1], raw.shape[-1] // size * weights)


def _q4_0(b):
    return _f16(b[..., :2]) * (_nibbles(b[..., 2:]) - 8)


def _q4_1(b):
    return _f16(b[..., :2]) * _nibbles(b[..., 4:]) + _f16(b[..., 2:4])


def _q5_0(b):
    return _f16(b[..., :2]) * (_nibbles(b[..., 6:]) + 16 * _bits(b[..., 2:6]) - 16)


def _q5_1(b):
    return _f16(b[..., :2]) * (_nibbles(b[..., 8:]) + 16 * _bits(b[..., 4:8])) + _f16(b[..., 2:4])


def _q8_0(b):
    return _f16(b[..., :2]) * _signed(b[..., 2:])


def _q2_k(b):
    scale = _f16(b[..., 80:82]) * _float(b[..., :16] & 15)
    least = _f16(b[..., 82:84]) * _float(b[..., :16] >> 4)
    return _spread(scale, 16) * _crumbs(b[..., 16:80]) - _spread(least, 16)


def _q3_k(b):
    q = _crumbs(b[..., 32:96]) - 4 * (1 - _flat(_shifted(b[..., :32], range(8)) & 1, 2))
    low = jnp.concatenate([b[..., 96:104] & 15, b[..., 96:104] >> 4], axis=-1)
    high = _flat(_shifted(b[..., 104:108], (0, 2, 4, 6)) & 3, 2)
    return _spread(_f16(b[..., 108:110]) * (_float(low) + 16 * high - 32), 16) * q


def _q4_k(b):
    scale, least = _scales_and_minima(b)
    return scale * _nibble_chunks(b[..., 16:144]) - least


def _q5_k(b):
    scale, least = _scales_and_minima(b)
    fifth = _flat(_shifted(b[..., 16:48], range(8)) & 1, 2)
    return scale * (_nibble_chunks(b[..., 48:176]) + 16 * fifth) - least


def _q6_k(b):
    low = _flat(_shifted(b[..., :128].reshape(*b.shape[:-1], 2, 64), (0, 4)) & 15, 3)
    high = _flat(_shifted(b[..., 128:192].reshape(*b.shape[:-1], 2, 32), (0, 2, 4, 6)) & 3, 3)
    scale = _f16(b[..., 208:210]) * _signed(b[..., 192:208])
    return _spread(scale, 16) * (low + 16 * high - 32)


def _scales_and_minima(b):
    s = b[..., 4:16]
    first, second, rest = s[..., :4], s[..., 4:8], s[..., 8:]
    sc = jnp.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=-1)
    mn = jnp.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=-1)
    d, dmin = _f16(b[..., :2]), _f16(b[..., 2:4])
    return _spread(d * _float(sc), 32), _spread(dmin * _float(mn), 32)


def _f16(b):
    """Pairs of bytes [..., 2n] -> float32 [..., n]."""
    pairs = b.reshape(*b.shape[:-1], -1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32)


def _words(b, width, dtype):
    return jax.lax.bitcast_convert_type(b.reshape(*b.shape[:-1], -1, width), dtype).astype(jnp.float32)


def _float(b):
    return b.astype(jnp.float32)


def _signed(b):
    return _float(jax.lax.bitcast_convert_type(b, jnp.int8))


def _nibbles(b):
    return _float(jnp.concatenate([b & 15, b >> 4], axis=-1))


def _nibble_chunks(b):
    return _nibbles(b.reshape(*b.shape[:-1], -1, 32)).reshape(*b.shape[:-1], -1)


def _crumbs(b):
    return _flat(_shifted(b.reshape(*b.shape[:-1], 2, 32), (0, 2, 4, 6)) & 3, 3)


def _bits(b):
    return _flat(jnp.swapaxes(_shifted(b, range(8)), -1, -2) & 1, 2)


def _shifted(b, by):
    """[..., n] -> [..., len(by), n], each byte moved down by each number."""
    down = jnp.array(list(by), jnp.uint8)[:, None]
    return b[..., None, :] >> lift(down, b.ndim + 1)


def _spread(x, n):
    return jnp.repeat(x, n, axis=-1)


def _flat(x, axes):
    return _float(x).reshape(*x.shape[:-axes], -1)


_DECODE = {
    "F32": lambda b: _words(b, 4, jnp.float32),
    "F16": _f16,
    "BF16": lambda b: _words(b, 2, jnp.bfloat16),
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
