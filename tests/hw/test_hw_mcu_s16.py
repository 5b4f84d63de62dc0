"""int16 activations of the microcontroller (hw_mcu) and its attention by tiles: vectors, ends, bad inputs.

Their laws stand in laws_hw_mcu.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from ref.blocks import int16_ops as ops
from ref.blocks.attention_tiles import attention_tile_bytes, tiled_attention
from ref.blocks.integer import quantize_multiplier
from tests.golden_runner import Case, run
from tests.laws import rejects

X, W, B = np.zeros((2, 3), int), np.zeros((4, 3), int), np.zeros(4, int)
ADD = {f"{name}_{part}": v for name in ("input1", "input2", "output")
       for part, v in (("multiplier", 2**30), ("shift", 0))}  # fmt: skip
TILE = {"scores": None, "softmax": None, "values": None}


def vectors():
    """Every case of this project's own file."""
    with np.load(Path(__file__).parent.parent / "golden" / "hw_mcu_int16.npz", allow_pickle=False) as z:
        for key in (k for k in z.files if k.endswith("/meta")):
            name = key.removesuffix("/meta")
            arrays = {k[len(name) + 1 :]: z[k] for k in z.files if k.startswith(f"{name}/")}
            case = Case(name, json.loads(z[key].item()), arrays)
            yield pytest.param(case, id=f"hw_mcu-{name}-{case.meta['fn']}")


@pytest.mark.parametrize("case", list(vectors()))
def test_hw_mcu_s16_equals_cmsis_nn(case):
    run(case, ops)


def test_hw_mcu_s16_sums_beyond_32_bits_are_exact():
    """1,000 products at the ends make 4.2e9; a bias takes all of it back but 5."""
    x, w = np.full((2, 1000), 2**15 - 1), np.full((1, 1000), 127)
    x[1] = -(2**15)
    total = (2**15 - 1) * 127 * 1000
    assert total > 2**31
    m, e = (int(v) for v in quantize_multiplier(1.0))
    got = ops.matmul_s16(x[:1], w, np.array([5 - total]), m, e)
    assert got.tolist() == [[5]]
    m, e = (int(v) for v in quantize_multiplier(2.0**-14))
    assert ops.matmul_s16(x, w, None, m, e).tolist() == [[2**15 - 1], [-(2**15)]]
    assert ops.matmul_s16(x, w, None, m, e, act_min=-7, act_max=9).tolist() == [[9], [-7]]
    assert ops.matmul_s16(x[:0], w, None, m, e).shape == (0, 1)
    assert ops.matmul_s16(x[:, :0], w[:, :0], np.array([9]), m, 0).tolist() == [[5], [5]]  # half up


def test_hw_mcu_s16_multipliers_of_16_bits():
    q31 = np.array([0, 2**15 - 1, 2**15, 2**30, 0x7FFF0000 - 1, 0x7FFF0000, 2**31 - 1])
    assert ops.reduce_multiplier(q31).tolist() == [0, 0, 1, 2**14, 2**15 - 1, 2**15 - 1, 2**15 - 1]
    assert ops.requantize_s64(-3, 2**30, 0) == -1  # -1.5: ties up
    assert ops.requantize_s64(3, 2**30, 0) == 2


test_hw_mcu_s16_bad_input_is_named = rejects({
    "axis": (lambda: ops.matmul_s16(X, W[:, :2], B, 2**30, 0), "axis K"),
    "x": (lambda: ops.matmul_s16(X + 2**15, W, B, 2**30, 0), "x must hold 16-bit"),
    "floats": (lambda: ops.matmul_s16(X * 1.0, W, B, 2**30, 0), "x must hold 16-bit"),
    "w": (lambda: ops.matmul_s16(X, W + 128, B, 2**30, 0), "w must hold 8-bit"),
    "b": (lambda: ops.matmul_s16(X, W, B + 2**47, 2**30, 0), "b must hold 48-bit"),
    "bias": (lambda: ops.matmul_s16(X, W, B + 2**47 - 1, 2**30, 0), "K=3 .* beyond 2\\^47"),
    "length": (lambda: ops.batch_matmul_s16(np.zeros((1, 2**17), int), np.zeros((1, 2**17), int),
                                            multiplier=2**30, shift=0), "K=131072"),
    "multiplier": (lambda: ops.matmul_s16(X, W, B, -1, 0), "multiplier must hold integers in 0"),
    "q32": (lambda: ops.matmul_s16(X, W, B, 2**31, 0), "multiplier must hold integers in 0"),
    "shift": (lambda: ops.matmul_s16(X, W, B, 2**30, 8), "shift must be in -31..7"),
    "result": (lambda: ops.matmul_s16(X, W, B + 2**31, 2**30, 0), "twice the result"),
    "clamp": (lambda: ops.fully_connected_s16(X, W, B, multiplier=2**30, shift=0, act_min=5, act_max=4),
              "act_min"),
    "beyond": (lambda: ops.mul_s16(X, X, 2**30, 0, act_max=2**15), "act_max"),
    "shapes": (lambda: ops.add_s16(X, W, **ADD), "x2 has shape"),
    "pair": (lambda: ops.mul_s16(X, X - 40_000, 2**30, 0), "x2 must hold 16-bit"),
    "no query": (lambda: attention_tile_bytes(4, 5, 0), "1 <= queries <= seq"),
    "queries": (lambda: attention_tile_bytes(4, 5, 6), "1 <= queries <= seq"),
    "head": (lambda: attention_tile_bytes(0, 5, 1), "head_dim >= 1"),
    "tile": (lambda: tiled_attention(X, X, X, queries=3, **TILE), "queries=3"),
    "keys": (lambda: tiled_attention(X, W, W, queries=1, **TILE), "axis S"),
})  # fmt: skip
