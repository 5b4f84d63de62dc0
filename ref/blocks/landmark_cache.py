"""Blocks of keys and values that are reached through their landmarks: a cache, and a store in slow memory.

Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.2.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ref.checks import at_least_one
from ref.dims import dims


class LandmarkCache(NamedTuple):
    """Keys (before rotary) and values of complete blocks, oldest first, and of the block under way.

    block_k, block_v [B, H, cache_blocks, l + 1, D], of which the first num_blocks count; tail_k, tail_v
    [B, H, l, D], of which num_tail count; total_blocks: how many blocks were ever completed. l = block_size.
    """

    block_k: np.ndarray
    block_v: np.ndarray
    tail_k: np.ndarray
    tail_v: np.ndarray
    num_blocks: np.ndarray
    num_tail: np.ndarray
    total_blocks: np.ndarray


def init_landmark_cache(batch, heads, head_dim, *, block_size, cache_blocks):
    """An empty LandmarkCache. Raises: ValueError unless block_size and cache_blocks are at least 1."""
    at_least_one(block_size=block_size, cache_blocks=cache_blocks)
    blocks = np.zeros((batch, heads, cache_blocks, block_size + 1, head_dim))
    tail, none = np.zeros((batch, heads, block_size, head_dim)), np.zeros((), np.int32)
    return LandmarkCache(blocks, blocks, tail, tail, none, none, none)


def take_blocks(x, chosen):
    """x [B, H, n, l + 1, D], chosen int [B, H, T, k] -> [B, H, T, k (l + 1), D], block after block."""
    b, h = np.ogrid[: x.shape[0], : x.shape[1]]
    out = x[b[..., None, None], h[..., None, None], chosen]
    return out.reshape(*chosen.shape[:-1], -1, x.shape[-1])


def append_chunk(cache, k, v, size, cache_blocks):
    """The cache after the keys and values of the tail and the chunk, [B, H, u + T, D]."""
    done, n = k.shape[2] // size, int(cache.num_blocks)
    kept = min(n + done, cache_blocks)

    def blocks(old, x):
        new = x[:, :, : done * size].reshape(*x.shape[:2], done, size, x.shape[-1])
        out = np.zeros_like(old)
        out[:, :, :kept] = np.concatenate([old[:, :, :n], new], axis=2)[:, :, n + done - kept :]
        return out

    def tail(x):
        rest = x[:, :, done * size :]
        return np.pad(rest, ((0, 0), (0, 0), (0, size - 1 - rest.shape[2]), (0, 0)))

    count = lambda x: np.array(x, np.int32)
    return LandmarkCache(
        blocks(cache.block_k, k), blocks(cache.block_v, v), tail(k), tail(v),
        count(kept), count(k.shape[2] - done * size), count(cache.total_blocks + done),
    )  # fmt: skip


class LandmarkStore:
    """Blocks in slow memory, [H, capacity, 2 (key, value), l + 1, D]; landmarks [H, n, D] in fast memory.

    data: an array, or the path of a .npy file that holds one and is mapped, not read. A head's block is one
    contiguous read. num_blocks, reads and bytes_read count.
    """

    def __init__(self, data):
        if isinstance(data, str | Path):
            data = np.load(data, mmap_mode="r+")
        dims(data=(data, "H capacity 2 size D"))
        self.data, self.num_blocks, self.reads, self.bytes_read = data, 0, 0, 0
        self.landmarks = np.zeros((data.shape[0], 0, data.shape[-1]), data.dtype)

    def put(self, k, v):
        """Append one complete block, k, v [H, l + 1, D]. Raises: ValueError if the store is full."""
        H, capacity, _, size, D = self.data.shape
        dims(k=(k, f"{H} {size} {D}"), v=(v, f"{H} {size} {D}"))
        if self.num_blocks == capacity:
            raise ValueError(f"the store is full: its capacity is {capacity} blocks")
        self.data[:, self.num_blocks, 0], self.data[:, self.num_blocks, 1] = k, v
        mark = np.asarray(k)[:, None, -1].astype(self.data.dtype)
        self.landmarks = np.concatenate([self.landmarks, mark], axis=1)
        self.num_blocks += 1

    def fetch(self, indices):
        """k, v [H, n, l + 1, D] of the blocks indices int [H, n], each head its own."""
        indices = np.asarray(indices)
        n = dims(indices=(indices, f"{self.data.shape[0]} n"))["n"]
        if n and not (0 <= indices.min() and indices.max() < self.num_blocks):
            raise ValueError(f"indices must be in 0..{self.num_blocks - 1}, got {indices.tolist()}")
        out = self.data[np.arange(len(indices))[:, None], indices]
        self.reads, self.bytes_read = self.reads + indices.size, self.bytes_read + out.nbytes
        return out[:, :, 0], out[:, :, 1]
