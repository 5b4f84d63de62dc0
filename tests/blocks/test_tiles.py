"""Tiles that fit a GPU's shared memory, against what Triton's compiler asked for on an H200."""

import jax
import jax.numpy as jnp
import pytest

from accel.blocks import backend, tiles
from accel.blocks.tiles import LEAST, attention_bytes, attention_tiles, shared_memory, too_wide

F, B = jnp.float32, jnp.bfloat16
# (dtype, width, tile, backward): bytes asked for, of which up to 512 hold a number a row
ASKED = {
    (F, 128, 128, False): 262_144,
    (F, 256, 128, False): 459_264,
    (F, 512, 128, False): 852_480,
    (F, 512, 64, False): 409_856,
    (B, 256, 128, False): 327_680,
    (B, 512, 128, False): 655_360,
    (B, 512, 64, False): 327_680,
    (F, 256, 64, True): 278_528,
    (F, 512, 32, True): 266_240,
    (F, 1024, 16, True): 263_168,
}


@pytest.mark.parametrize("case", ASKED, ids=lambda c: f"{c[0].__name__}_{c[1]}_{c[2]}")
def test_tiles_count_the_bytes_that_a_block_asks_for(case):
    dtype, width, tile, backward = case
    counted = attention_bytes(tile, tile, width, width, dtype, backward=backward)
    assert ASKED[case] - 512 <= counted <= ASKED[case]


@pytest.mark.parametrize(
    ("dtype", "width", "backward", "want"),
    [
        (F, 64, False, (128, 128)),
        (F, 128, False, (128, 64)),
        (F, 512, False, (32, 32)),
        (F, 512, True, (32, 16)),
        (B, 128, False, (128, 128)),
        (B, 256, False, (128, 64)),
        (B, 512, True, (32, 32)),
    ],
)
def test_tiles_are_halved_until_they_fit(dtype, width, backward, want):
    most = 64 if backward else 128
    assert attention_tiles(most, most, width, width, dtype, backward=backward) == want
    assert attention_bytes(*want, width, width, dtype, backward=backward) < shared_memory()
    assert attention_tiles(16, 64, 16, 16, dtype) == (16, 64)


def test_tiles_of_a_smaller_gpu_are_smaller(monkeypatch):
    monkeypatch.setattr(tiles, "shared_memory", lambda: 99 * 1024)
    assert attention_tiles(128, 128, 128, 128, B) == (128, 64)
    assert attention_tiles(128, 128, 64, 64, B) == (128, 128)


def test_tiles_say_which_heads_are_too_wide():
    heads = lambda dtype, D: jax.ShapeDtypeStruct((2, 8, D), dtype)
    for dtype, most in ((F, 512), (B, 1024), (jnp.float16, 1024)):
        assert too_wide(heads(dtype, most), heads(dtype, most)) is None
        assert f"D={most + 1} and Dv={2 * most}" in too_wide(heads(dtype, most + 1), heads(dtype, 2 * most))
    assert attention_tiles(128, 128, 4096, 64, F) == (LEAST, LEAST)


@pytest.mark.gpu
def test_tiles_ask_the_gpu():
    assert backend.platform() == "gpu"
    assert 48 * 1024 <= shared_memory() <= 256 * 1024
