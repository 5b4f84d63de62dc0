"""Tiles of attention that fit a GPU's shared memory, for the kernels in Triton.

What a block holds there was read from what Triton's compiler refused on an H200: tests/blocks/test_tiles.py.
"""

import jax
import jax.numpy as jnp

from accel.blocks.backend import platform

LEAST = 16  # rows and columns of the smallest product on tensor cores
HOPPER = 227 * 1024  # bytes of shared memory a block
SPARE = 1024  # bytes, for reductions over rows


def shared_memory():
    """Bytes of shared memory that a block of JAX's GPU may have; of a Hopper where there is no GPU."""
    device = jax.devices("gpu")[0] if platform() == "gpu" else None
    return getattr(device, "shared_memory_per_block_optin", HOPPER)


def attention_bytes(tile_q, tile_k, D, Dv, dtype, *, backward=False):
    """Bytes that a block holds: the operands of its products, twice where loads run ahead, and in float32,
    whose products are not on tensor cores, the probabilities.
    """
    D, Dv = (max(LEAST, 1 << (n - 1).bit_length()) for n in (D, Dv))
    rows, columns, both = tile_q * (D + Dv if backward else D), tile_k * (D + Dv), tile_q * tile_k
    size = jnp.dtype(dtype).itemsize
    if size == 4:
        return size * (rows + columns + both)
    ahead = max(rows, columns) if backward else columns
    return size * (rows + columns + ahead + (2 * both if backward else 0))


def attention_tiles(tile_q, tile_k, D, Dv, dtype, *, backward=False):
    """(tile_q, tile_k), powers of two, halved until they fit, the longer one first, then keys."""
    room = shared_memory() - SPARE
    while (
        max(tile_q, tile_k) > LEAST
        and attention_bytes(tile_q, tile_k, D, Dv, dtype, backward=backward) > room
    ):
        tile_q, tile_k = (tile_q, tile_k // 2) if tile_k >= tile_q else (tile_q // 2, tile_k)
    return tile_q, tile_k


def too_wide(q, v):
    """Why no tiles of q [..., D] and v [..., Dv] fit, or None."""
    D, Dv, dtype = q.shape[-1], v.shape[-1], jnp.result_type(q)
    room = shared_memory() - SPARE
    if attention_bytes(LEAST, LEAST, D, Dv, dtype, backward=True) <= room:
        return None
    return f'has no tiles that fit {room:,} bytes for D={D} and Dv={Dv} in {dtype}; use impl="xla"'
