"""int16 activations of the microcontroller (hw_mcu), operators and target, and its attention by tiles:
vectors, ends, whole programs, bad inputs. Their laws stand in laws_hw_mcu.py.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
from hw import mcu_int8
from hw.mcu_arena import SWITCHES
from hw.mcu_calibrate import SOFTMAX16
from hw.mcu_int8 import add_multipliers
from hw.targets import preset
from ref.blocks import int16_ops as ops
from ref.blocks.attention_tiles import attention_tile_bytes, tiled_attention
from ref.blocks.integer import quantize_multiplier
from tests.claims import hw_mcu_emit as claims
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
    "quotient": (lambda: ops.divide_s16(X, X, 2**30, 1), "shift must not be positive"),
    "table": (lambda: ops.lut_s16(X, np.zeros(512, np.int16)), "table must be int16"),
    "range": (lambda: ops.make_lut_s16(np.tanh, 1.0, 1.0), "low < high"),
    "columns": (lambda: ops.softmax_s16(X[:, :0], multiplier=2**30, shift=0), "1..65536 columns"),
    "beta": (lambda: ops.softmax_params_s16(input_scale=0.1, beta=-1.0), "positive and finite"),
    "far": (lambda: ops.softmax_params_s16(input_scale=2.6), "below 2.5"),
    "gain": (lambda: ops.norm_params_s16([np.inf], [0.0], 1.0), "must be finite"),
    "channels": (lambda: ops.layernorm_s16(X[:, :0], W[0, :0], W[0, :0], multiplier=1, shift=0), "channels"),
    "no query": (lambda: attention_tile_bytes(4, 5, 0), "1 <= queries <= seq"),
    "queries": (lambda: attention_tile_bytes(4, 5, 6), "1 <= queries <= seq"),
    "head": (lambda: attention_tile_bytes(0, 5, 1), "head_dim >= 1"),
    "tile": (lambda: tiled_attention(X, X, X, queries=3, **TILE), "queries=3"),
    "keys": (lambda: tiled_attention(X, W, W, queries=1, **TILE), "axis S"),
})  # fmt: skip


# The target


def snapped(w):
    """Matrices whose entries are whole multiples of their channel's scale: int8 weights lose nothing."""
    if w.ndim < 2:
        return w
    scale = np.abs(w).max(axis=tuple(range(w.ndim - 1)), keepdims=True) / 127
    return (np.rint(w / scale) * scale).astype(np.float32)


@cache
def network(name):
    fn, make = claims.NETWORKS[name]
    x, w = make(np.random.default_rng(3))
    args = x, {k: snapped(v) for k, v in w.items()}
    return hw.trace(fn, *args, weights=("w",)), args


def test_hw_mcu_s16_executes_a_layer_as_the_operators_do():
    """y = tanh(x W + b): codes, multipliers, table written out here, equal bit for bit."""
    r = np.random.default_rng(1)
    x, w, b = (r.standard_normal(s).astype(np.float32) for s in ((7, 65), (65, 9), (9,)))
    program = hw.trace(lambda x, w, b: jnp.tanh(x @ w + b[None]), x, w, b, weights=("w", "b"))
    plan = hw.calibrate(program, [(x, w, b)], activation_bits=16)
    got, report = hw.execute(program, (x, w, b), hw.stm32f746(activation_bits=16, plan=plan))
    assert all(zero == 0 for _, zero in plan.scales.values())
    sx, so = (plan.scales[i][0] for i in (program.body.inputs[0], program.body.outputs[0]))
    assert sx == pytest.approx(np.abs(x).max() / (2**15 - 1))
    sh = next(plan.scales[op.outputs[0]][0] for op in program.ops if op.prim == "add")
    sw = np.abs(w.astype(np.float64)).max(0) / 127
    qx, qw = np.rint(x / np.float64(sx)).astype(int), np.rint(w / sw).astype(int).T
    m, shift = quantize_multiplier(sx * sw / sh)
    h = ops.matmul_s16(qx, qw, np.rint(b / (sx * sw)).astype(int), m, shift)
    at = sh * np.arange(-(2**15), 2**15 + 1, 64.0)
    table = ops.table_s16(np.tanh(at[::2]) / so, np.tanh(at[1::2]) / so)
    np.testing.assert_array_equal(got, so * ops.lut_s16(h, table).astype(np.float64))
    assert "events float results" not in report.quality


def test_hw_mcu_s16_ops_of_two_tensors_are_the_library_forms():
    r = np.random.default_rng(2)
    a, b = (r.uniform(0.5, 2, (5, 6)).astype(np.float32) for _ in range(2))
    program = hw.trace(lambda a, b: (a + b, a - b, a * b, a / b, jnp.maximum(a, b)), a, b)
    target = hw.stm32h743(activation_bits=16)
    got, _ = hw.execute(program, (a, b), target)
    scales = hw.calibrate(program, [(a, b)], activation_bits=16).scales
    sa, sb = (scales[i][0] for i in program.body.inputs)
    qa, qb = (np.rint(x / np.float64(s)).astype(int) for x, s in ((a, sa), (b, sb)))
    grids = [scales[o][0] for o in program.body.outputs]
    wants = [
        ops.add_s16(qa, qb, **dict(zip(mcu_int8.ADD, add_multipliers(sa, sign * sb, s, 15), strict=True)))
        for sign, s in zip((1, -1), grids, strict=False)
    ]
    for fn, s, real in ((ops.mul_s16, grids[2], sa * sb), (ops.divide_s16, grids[3], sa / sb / 2**16)):
        wants.append(fn(qa, qb, *(int(v) for v in quantize_multiplier(real / s))))
    own = [ops.rescale_s16(q, *(int(v) for v in quantize_multiplier(s / grids[4]))) for q, s in
           ((qa, sa), (qb, sb))]  # fmt: skip
    wants.append(np.maximum(*own))
    for y, want, s in zip(got, wants, grids, strict=True):
        np.testing.assert_array_equal(y, s * want.astype(np.float64))


@pytest.mark.parametrize("name", ["mlp", "vit", "cnn"])
def test_hw_mcu_s16_loses_little_where_weights_are_exact(name):
    """8 bits more of activations are 48 dB; half of that is left after softmaxes and tables of 2^-15."""
    program, args = network(name)
    narrow, wide = (hw.execute(program, args, hw.stm32h743(activation_bits=b))[1] for b in (8, 16))
    assert wide.quality["snr_db"] > max(narrow.quality["snr_db"] + 24, 60)
    assert "events float results" not in wide.quality


@pytest.mark.parametrize("given", [{}, dict.fromkeys(SWITCHES, False), {"integrate": False}],
                         ids=["hw_mcu-all", "hw_mcu-none", "hw_mcu-blocks"])  # fmt: skip
@pytest.mark.parametrize("name", ["vit", "layers"])
def test_hw_mcu_s16_poisoned_arena_gives_the_same_codes(name, given):
    """Two bytes an activation: with nothing saved, buffers of exactly twice the size."""
    program, args = network(name)
    target = hw.stm32f746(activation_bits=16, profile="emitted", **given).prepared(program, args)
    want, _ = hw.run_program(program, args, policy=target.formats)
    plan = target.memory(program)
    got, run = target.run_arena(program, args)
    np.testing.assert_array_equal(got, want)
    assert -(-run.touched[""] // 16) * 16 == plan.total
    assert SOFTMAX16 in target.plan.scales.values() or name != "vit"
    if given and not any(given.values()) and name == "vit":
        narrow = replace(target, activation_bits=8, plan=None, align=1).memory(program)
        assert replace(target, plan=None, align=1).memory(program).bound == 2 * narrow.bound


def test_hw_mcu_s16_computes_steps_in_float_and_says_so():
    """A line cannot be a step, a pole, or a flag: such results are counted, priced as float, and right."""
    x = np.linspace(-3, 3, 40).astype(np.float32).reshape(4, 10)
    program = hw.trace(lambda x: (jnp.sign(x), jnp.where(x > 1, x, 0.0), jnp.tanh(x)), x)
    target = hw.stm32f746(activation_bits=16)
    (sign, kept, smooth), report = hw.execute(program, (x,), target)
    np.testing.assert_array_equal(sign, np.sign(x))
    np.testing.assert_allclose(kept, np.where(x > 1, x, 0), atol=3 / 2**15)
    np.testing.assert_allclose(smooth, np.tanh(x), atol=3 * 2.0**-15)
    assert report.quality["events float results"] == 80
    assert sum("no int16 form" in w for w in report.warnings) == 2
    assert report.seconds > hw.estimate(program, target).seconds


def test_hw_mcu_s16_prices_the_projects_own_kernels():
    x, w = np.zeros((20, 64), np.float32), np.zeros((64, 32), np.float32)
    program = hw.trace(lambda x, w: x @ w, x, w, weights=("w",))
    target = hw.stm32f746(activation_bits=16, integrate=False, overwrite=False)
    r = hw.estimate(program, target)
    n = hw.instructions("matmul_s16", {"m": 20, "k": 64, "n": 32}, "cortex_m7")
    assert n == hw.instructions("matmul_s16", {"m": 20, "k": 64, "n": 32}, "cortex_m7", profile="emitted")
    assert r.cycles == pytest.approx(n)
    assert r.bytes_by_level["sram"] == 2 * (20 * 64 + 20 * 32)
    assert r.regions["flash"][0] == 64 * 32 + 16 * 32
    assert r.peak_memory == 2 * (20 * 64 + 20 * 32)


test_hw_mcu_s16_bad_fields_are_named = rejects({
    "bits": (lambda: hw.stm32f746(activation_bits=12), "activation_bits must be 8 or 16"),
    "named": (lambda: preset("stm32f746", activation_bit=16), "did you mean activation_bits"),
    "plan": (lambda: hw.stm32f746(plan=hw.calibrate(*_doubling(), activation_bits=16)),
             "plan has activation_bits=16, the target 8"),
    "observed": (lambda: hw.calibrate(*_doubling(), activation_bits=4), "activation_bits must be 8 or 16"),
    "zero": (lambda: hw.QuantPlan({0: (1.0, 3)}, activation_bits=16), "must be 0 with 16 bits"),
    "kept": (lambda: hw.QuantPlan({}, activation_bits=7), "activation_bits must be"),
    "long": (lambda: hw.execute(*_long(), hw.stm32h743(activation_bits=16)), "K=140000"),
    "hot": (lambda: hw.execute(hw.trace(jax.nn.softmax, X * 1e5 + 1.0), (X * 1e5 + [[0, 1e5, 2e5]],),
                               hw.stm32f746(activation_bits=16)), "below 2.5"),
})  # fmt: skip


def _doubling():
    x = np.ones((2, 3), np.float32)
    return hw.trace(lambda x: x * 2, x), [(x,)]


def _long():
    args = np.ones((1, 140_000), np.float32), np.ones((140_000, 1), np.float32)
    return hw.trace(lambda a, b: a @ b, *args), args
