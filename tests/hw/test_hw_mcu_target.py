"""The microcontroller target over whole programs: int8 arithmetic, prices, the memory plan, run for real."""

import itertools
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
from hw.mcu_arena import SWITCHES
from hw.mcu_calibrate import SOFTMAX
from hw.mcu_int8 import Int8Policy, add_multipliers
from hw.targets import preset
from ref.blocks import int8_ops as ops
from ref.blocks.arena import overlaps
from ref.blocks.integer import quantize_multiplier
from tests.claims import hw_mcu as claims
from tests.claims import record

OFF = dict.fromkeys(SWITCHES, False)


def norm(x, g, b):
    m = x.mean(-1, keepdims=True)
    return (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-6) * g[None] + b[None]


def vit(img, w, *, p=4, heads=2):
    """A small vision transformer: patches, one block, mean over tokens."""
    n, E = img.shape[0] // p, w["b"].shape[0]
    x = (
        img.reshape(n, p, n, p, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, p * p * 3) @ w["patch"]
        + w["b"][None]
    )
    x = x + w["pos"]
    y = norm(x, w["g"], w["b"])
    q, k, v = ((y @ w[c]).reshape(n * n, heads, E // heads).transpose(1, 0, 2) for c in "qkv")
    s = jax.nn.softmax(jnp.einsum("hid,hjd->hij", q, k) * 0.4)
    x = x + (s @ v).transpose(1, 0, 2).reshape(n * n, E) @ w["o"] + w["b"][None]
    x = x + jax.nn.gelu(norm(x, w["g"], w["b"]) @ w["up"] + w["bu"][None], approximate=False) @ w["down"]
    return x.mean(0) @ w["head"]


def vit_args(seed=0, side=16, E=12):
    r = np.random.default_rng(seed)
    g = lambda *s: (r.standard_normal(s) / np.sqrt(s[0])).astype(np.float32)
    n = (side // 4) ** 2
    w = {"patch": g(48, E), "b": g(E), "pos": 3 * g(n, E), "g": 1 + g(E) / 8, "o": g(E, E), "up": g(E, 4 * E),
         "bu": g(4 * E), "down": g(4 * E, E), "head": g(E, 10)}  # fmt: skip
    return r.random((side, side, 3)).astype(np.float32), w | {c: g(E, E) for c in "qkv"}


@cache
def traced_vit():
    args = vit_args()
    return hw.trace(vit, *args, weights=("w",)), args


def rnn(x, w):
    step = lambda h, t: (jnp.tanh(h @ w + t), h)
    return jax.lax.scan(step, jnp.zeros(x.shape[1]), x)


def choosing(x, n):
    x = jax.lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v @ v.T @ v, x)
    swap = lambda s: (s[1], s[0] + s[1], s[2] + 1)
    return jax.lax.while_loop(lambda s: s[2] < n, swap, (x, x[::-1] * 0.5, 0))[:2]


@cache
def loops():
    r = np.random.default_rng(3)
    x, w = (r.standard_normal(s).astype(np.float32) / 2 for s in ((6, 8), (8, 8)))
    return [(hw.trace(rnn, x, w, weights=("w",)), (x, w)), (hw.trace(choosing, x, 3), (x, 3))]


def equal(a, b):
    pair = lambda v: v if isinstance(v, tuple) else (v,)
    return all(np.array_equal(x, y) for x, y in zip(pair(a), pair(b), strict=True))


# Arithmetic


def test_hw_mcu_executes_a_layer_as_the_library_does():
    """y = gelu(x W + b): codes, multipliers and table written out here, equal bit for bit."""
    r = np.random.default_rng(1)
    x, w, b = (r.standard_normal(s).astype(np.float32) for s in ((7, 65), (65, 9), (9,)))
    program = hw.trace(lambda x, w, b: jnp.tanh(x @ w + b[None]), x, w, b, weights=("w", "b"))
    target = hw.stm32f746()
    got, report = hw.execute(program, (x, w, b), target)
    assert any("own arguments" in note for note in report.warnings)
    plan = hw.calibrate(program, [(x, w, b)])
    unit = next(u for u in Int8Policy(program, plan).units.of.values() if u.kind == "product")
    (sx, zx), (sh, zh) = plan.scales[program.body.inputs[0]], plan.scales[unit.out]
    so, zo = plan.scales[program.body.outputs[0]]
    assert sx == pytest.approx((max(x.max(), 0) - min(x.min(), 0)) / 255)
    qx = np.clip(np.rint(x / np.float64(sx)) + zx, -128, 127).astype(int)
    sw = np.abs(w.astype(np.float64)).max(0) / 127
    qw = np.rint(w / sw).astype(int).T
    m, shift = quantize_multiplier(sx * sw / sh)
    bias = np.rint(b / (sx * sw)).astype(int)
    h = ops.matmul_s8(qx, qw, bias, m, shift, input_offset=-zx, output_offset=zh)
    y = ops.lut_s8(h, ops.make_lut_s8(np.tanh, sh, zh, so, zo))
    np.testing.assert_array_equal(got, so * (y.astype(np.float64) - zo))
    again, report = hw.execute(program, (x, w, b), replace(target, plan=plan))
    np.testing.assert_array_equal(again, got)
    assert not any("own arguments" in note for note in report.warnings)
    assert report.quality["snr_db"] > 25


def test_hw_mcu_finds_the_library_kernels_of_a_transformer():
    program, args = traced_vit()
    target = hw.stm32f746()
    kinds = [u.kind for u in target._units(program).of.values()]
    assert (kinds.count("softmax"), kinds.count("layer_norm")) == (1, 2)
    assert kinds.count("product") == 10
    plan = hw.calibrate(program, [args, vit_args(1)])
    assert not plan.rejected
    assert SOFTMAX in plan.scales.values()
    report = hw.execute(program, args, replace(target, plan=plan))[1]
    assert report.quality["snr_db"] > 18
    assert "events float results" not in report.quality
    small = hw.calibrate(program, [args], weight_bits=4)
    matrices = sum(w.size for k, w in args[1].items() if w.ndim == 2 and k != "pos")
    assert target.flash_bytes(program, 8) - target.flash_bytes(program, 4) == matrices // 2
    coarse = hw.execute(program, args, replace(target, plan=small))[1]
    assert 3 < coarse.quality["snr_db"] < report.quality["snr_db"]
    assert equal(hw.calibrate(program, [args], observer="ema").scales, hw.calibrate(program, [args]).scales)


def test_hw_mcu_linear_layer_keeps_30_db_and_zero():
    r = np.random.default_rng(5)
    for k in (64, 200):
        x, w = r.standard_normal((16, k)).astype(np.float32), r.standard_normal((k, 24)).astype(np.float32)
        x[0] = 0
        program = hw.trace(lambda x, w: x @ w, x, w, weights=("w",))
        out, report = hw.execute(program, (x, w), hw.stm32f427())
        assert report.quality["snr_db"] >= 30
        assert (out[0] == 0).all()


def test_hw_mcu_ops_of_two_tensors_are_the_library_forms():
    r = np.random.default_rng(2)
    a, b = (r.uniform(0.5, 2, (5, 6)).astype(np.float32) for _ in range(2))
    program = hw.trace(lambda a, b: (a + b, a - b, a * b, a / b), a, b)
    got, _ = hw.execute(program, (a, b), hw.stm32h743())
    plan = hw.calibrate(program, [(a, b)])
    (sa, za), (sb, zb) = (plan.scales[i] for i in program.body.inputs)
    q = lambda x, s, z: np.clip(np.rint(x / np.float64(s)) + z, -128, 127).astype(int)
    qa, qb = q(a, sa, za), q(b, sb, zb)
    grids = [plan.scales[o] for o in program.body.outputs]
    wants = []
    for sign, (s, z) in zip((1, -1), grids, strict=False):
        m1, e1, m2, e2, mo, eo = ops.add_params_s8(sa, sign * sb, s)
        assert (m1, e1, m2, e2, mo, eo) == add_multipliers(sa, sign * sb, s)
        wants.append(ops.add_s8(qa, qb, input1_offset=-za, input1_multiplier=m1, input1_shift=e1,
                                input2_offset=-zb, input2_multiplier=m2, input2_shift=e2, output_offset=z,
                                output_multiplier=mo, output_shift=eo))  # fmt: skip
    offsets = {"input1_offset": -za, "input2_offset": -zb}
    for fn, (s, z), real in ((ops.mul_s8, grids[2], sa * sb), (ops.divide_s8, grids[3], sa / sb / 2**16)):
        m, e = (int(v) for v in quantize_multiplier(real / s))
        wants.append(fn(qa, qb, m, e, **offsets, output_offset=z))
    for y, want, (s, z) in zip(got, wants, grids, strict=True):
        np.testing.assert_array_equal(y, s * (want.astype(np.float64) - z))


def conv(x, w, b, stride, padding):
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x[None], w, (stride, stride), padding, dimension_numbers=dims)
    return y + b[None, None, None]


def test_hw_mcu_convolutions_are_the_library_form_and_patches_are_streamed():
    r = np.random.default_rng(6)
    x, w, b = (r.standard_normal(s).astype(np.float32) for s in ((9, 8, 3), (3, 3, 3, 5), (5,)))
    same = lambda x, w, b: conv(x, w, b, 2, "SAME")
    program = hw.trace(same, x, w, b, weights=("w", "b"))
    got, report = hw.execute(program, (x, w, b), hw.stm32f746())
    plan = hw.calibrate(program, [(x, w, b)])
    (sx, zx), (so, zo) = plan.scales[program.body.inputs[0]], plan.scales[program.body.outputs[0]]
    sw = np.abs(w.astype(np.float64)).max((0, 1, 2)) / 127
    qx = np.clip(np.rint(x / np.float64(sx)) + zx, -128, 127).astype(int)
    qw = np.rint(w / sw).astype(int).transpose(3, 0, 1, 2)
    m, shift = quantize_multiplier(sx * sw / so)
    bias = np.rint(b / (sx * sw)).astype(int)
    want = ops.conv_s8(qx, qw, bias, m, shift, stride=2, input_offset=-zx, output_offset=zo)
    np.testing.assert_array_equal(got[0], so * (want.astype(np.float64) - zo))
    assert [c.prim for c in report.by_op if c.seconds] == ["conv_general_dilated"]

    patches = lambda x, w, b: jnp.tanh(conv(x, w, b, 4, "VALID")).reshape(4, 5)
    x, w = (r.standard_normal(s).astype(np.float32) for s in ((8, 8, 3), (4, 4, 3, 5)))
    program = hw.trace(patches, x, w, b, weights=("w", "b"))
    target = hw.stm32f746(integrate=False).prepared(program, (x, w, b))
    plan, whole = target.memory(program), hw.stm32f746(**OFF).memory(program)
    assert [g.rows for g in plan.segments if g.streamed is not None] == [2]
    assert plan.total < whole.total
    want, _ = hw.run_program(program, (x, w, b), policy=target.formats)
    assert equal(target.run_arena(program, (x, w, b))[0], want)


def test_hw_mcu_masks_and_floats_without_integers():
    """The fill of a mask gets no weight, whatever it is; a power of two tensors is float and says so."""
    x = np.random.default_rng(4).standard_normal((6, 6)).astype(np.float32)
    for fill in (-1e30, -np.inf):
        causal = lambda x, fill=fill: jax.nn.softmax(jnp.where(jnp.tri(6, dtype=bool), x, fill))
        y, report = hw.execute(hw.trace(causal, x), (x,), hw.stm32f746())
        assert (np.triu(y, 1) == 0).all()
        assert report.quality["worst_abs"] < 0.02
    p = hw.trace(lambda a, b: a**b, np.abs(x), x)
    _, report = hw.execute(p, (np.abs(x), x), hw.esp32c3())
    assert report.quality["events float results"] == 36
    assert any("no int8 form" in w and "in software" in w for w in report.warnings)
    assert any("counts of cortex_m3" in w for w in report.warnings)


# Prices


def test_hw_mcu_prices_follow_the_counts():
    x, w = np.zeros((20, 64), np.float32), np.zeros((64, 32), np.float32)
    program = hw.trace(lambda x, w: x @ w, x, w, weights=("w",))
    target = hw.stm32f746(overwrite=False, integrate=False)
    r = hw.estimate(program, target)
    n = hw.instructions("matmul_s8", {"m": 20, "k": 64, "n": 32}, "cortex_m7")
    assert r.cycles == pytest.approx(n)
    assert r.macs == 20 * 64 * 32
    assert r.bytes_by_level == {"sram": 20 * 64 + 20 * 32, "flash": 32 * (64 + 12)}
    assert r.regions["flash"] == (64 * 32 + 12 * 32, 2**20)
    assert r.energy_j == pytest.approx(n * 1.5e-9 + 32 * 76 * 0.2e-9)
    assert hw.estimate(program, replace(target, mhz=108.0)).seconds == pytest.approx(2 * r.seconds)
    slow = replace(target, flash_bytes_s=1e4)
    assert hw.estimate(program, slow).seconds == pytest.approx(32 * 76 / 1e4)
    assert hw.estimate(program, slow).bound_by == "flash"
    assert r.seconds_range == pytest.approx((r.seconds, r.seconds + 32 * 76 / 200e6))
    assert hw.estimate(program, hw.stm32f427(overwrite=False)).cycles == pytest.approx(
        1.15 * hw.instructions("matmul_s8", {"m": 20, "k": 64, "n": 32}, "cortex_m4")
    )
    times = [
        hw.estimate(program, replace(target, profile=p)).seconds
        for p in ("tinyengine", "cmsis_nn", "tflm_ref")
    ]
    assert times == sorted(times)
    assert times[0] == pytest.approx(2 * r.macs / 216e6)
    outer = (("dtcm", 0.5, 4.0), ("external", 64, 0.5))
    far = hw.estimate(program, replace(target, regions=outer, reserve_kb=0))
    assert far.seconds > r.seconds
    assert far.regions["external"][0] > 0


def test_hw_mcu_softmax_is_charged_by_its_data():
    """Entries too far below the maximum cost a twentieth: an execution knows how many there are."""
    x = np.linspace(-300, 300, 640).astype(np.float32).reshape(10, 64)[:, ::-1].copy()
    x[:, 1:] -= 200
    program = hw.trace(jax.nn.softmax, x)
    target = hw.stm32f746()
    ready = target.prepared(program, (x,))
    hw.run_program(program, (x,), policy=ready.formats)
    near, total = next(iter(ready.formats.near.values()))
    assert 0 < near < total
    ran = hw.execute(program, (x,), target)[1].seconds
    assert ran < hw.estimate(program, target).seconds


def test_hw_mcu_running_by_rows_costs_time_and_saves_memory():
    program, _ = traced_vit()
    plain, saved = (hw.estimate(program, hw.stm32f746(**s)) for s in (OFF, {}))
    assert saved.peak_memory < plain.peak_memory
    assert saved.seconds > plain.seconds
    assert saved.macs == plain.macs


# Memory


def plans():
    for switches in itertools.product((False, True), repeat=3):
        yield dict(zip(SWITCHES[:3], switches, strict=True)) | {"reorder": False}


def test_hw_mcu_plans_are_sound_and_switches_only_help():
    """Every subset of the reductions: sound, above its bound, the bound never rises with one more."""
    program, _ = traced_vit()
    found = {}
    for given in plans():
        plan = hw.stm32f746(**given).memory(program)
        assert not overlaps(plan.arena)
        assert plan.total >= plan.bound
        found[tuple(given.values())[:3]] = plan
    worst = found[False, False, False].total
    for a, b in itertools.product(found, repeat=2):
        if all(x <= y for x, y in zip(a, b, strict=True)):
            assert found[b].bound <= found[a].bound
        assert found[a].total <= worst
    naive = hw.stm32f746(**OFF)
    best = hw.stm32f746().memory(program)
    assert best.total < 0.6 * worst
    assert any(g.streamed is not None for g in best.segments)
    assert best.total <= naive.memory(program).total
    assert replace(naive, strategy="greedy_by_breadth").memory(program).total >= naive.memory(program).bound


@pytest.mark.parametrize(
    "given", [*plans(), {}], ids=lambda g: "hw_mcu-" + ("".join(map(str, map(int, g.values()))) or "all")
)
def test_hw_mcu_poisoned_arena_gives_the_same_codes(given):
    """Inside one block of bytes of exactly the plan's size; one byte less raises."""
    program, args = traced_vit()
    target = hw.stm32f746(**given).prepared(program, args)
    want, _ = hw.run_program(program, args, policy=target.formats)
    plan = target.memory(program)
    got, run = target.run_arena(program, args)
    np.testing.assert_array_equal(got, want)
    assert -(-run.touched[""] // 16) * 16 == plan.total
    assert run.steps == len(plan.segments)
    with pytest.raises(MemoryError, match="beyond the arena"):
        target.run_arena(program, args, sizes={"": run.touched[""] - 1})


def test_hw_mcu_poisoned_arena_over_two_memories():
    """Small buffers in the fast memory, the rest outside: the same codes, and slower by what lies outside."""
    program, args = traced_vit()
    outer = (("dtcm", 0.5, 4.0), ("external", 64, 0.5))
    target = hw.stm32f746(regions=outer, reserve_kb=0, **OFF).prepared(program, args)
    want, _ = hw.run_program(program, args, policy=target.formats)
    got, run = target.run_arena(program, args)
    np.testing.assert_array_equal(got, want)
    assert 0 < run.touched["dtcm"] <= 512
    assert run.touched["external"] > 0
    held = target.place(program).regions
    assert held["dtcm"][0] + held["external"][0] == target.memory(program).total


def test_hw_mcu_attention_runs_a_query_at_a_time():
    """q k^T reads the keys as they lie; scores and probabilities are one row long; the result lies on q."""
    attend = lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    r = np.random.default_rng(8)
    args = tuple(r.standard_normal((2, 9, 16)).astype(np.float32) for _ in range(3))
    program = hw.trace(attend, *args)
    target = hw.stm32f746(profile="emitted").prepared(program, args)
    plan = target.memory(program)
    assert [(g.rows, len(g.inner), len(g.taken)) for g in plan.segments] == [(18, 2, 1)]
    assert plan.total == 3 * 288 + 32
    want, _ = hw.run_program(program, args, policy=target.formats)
    assert equal(target.run_arena(program, args)[0], want)


@pytest.mark.parametrize("bits", [8, 16])
def test_hw_mcu_relative_positions_run_a_query_at_a_time(bits):
    """A product with vectors of every pair of places is written in the order of the queries: scores and
    probabilities of all pairs never exist, and the arena is that of attention without them, a row aside.
    """
    near = lambda q, k, v, r: jax.nn.softmax(q @ k.swapaxes(1, 2) + jnp.einsum("hid,ijd->hij", q, r)) @ v
    r = np.random.default_rng(8)
    q, k, v = (r.standard_normal((2, 9, 16)).astype(np.float32) for _ in range(3))
    args = q, k, v, r.standard_normal((9, 9, 16)).astype(np.float32)
    program = hw.trace(near, *args, weights=("r",))
    target = hw.stm32f746(profile="emitted", activation_bits=bits).prepared(program, args)
    plan = target.memory(program)
    assert [(g.rows, len(g.taken)) for g in plan.segments] == [(18, 1)]
    assert plan.total <= (3 * 288 + 48) * bits // 8
    want, _ = hw.run_program(program, args, policy=target.formats)
    assert equal(target.run_arena(program, args)[0], want)
    plain = replace(target, **OFF)
    assert plain.memory(program).total > plan.total
    assert equal(plain.run_arena(program, args)[0], want)


def test_hw_mcu_tables_count_as_large_as_they_are_folded():
    """Of a table of 5 rows that is spread over all pairs of 12 places each pair's row is kept; weights of a
    loop's trips once each, what nothing reads not at all; the refusal names what would be less.
    """
    at = np.arange(144).reshape(12, 12) % 5
    spread = lambda x, t: jnp.einsum("id,ijd->ij", x, t[at])
    x, t = np.ones((12, 8), np.float32), np.ones((5, 8), np.float32)
    program = hw.trace(spread, x, t, weights=("t",))
    target = hw.stm32f746()
    assert target.flash_bytes(program) == 144 * 8 + 12 * 144
    with pytest.raises(hw.DoesNotFit, match="folded weights") as e:
        hw.estimate(program, replace(target, flash_kb=1))
    assert any("made as they are read (1,112 B less)" in s for s in e.value.suggestions)
    layers = lambda x, w: jax.lax.scan(lambda h, m: (jnp.tanh(h @ m), None), x, w)[0]
    program = hw.trace(layers, x[:, :8], np.ones((3, 8, 8), np.float32), weights=("w",))
    assert target.flash_bytes(program) == 3 * (64 + 12 * 8) + 256
    twice = hw.trace(lambda x, w: jnp.tanh(x @ w.T) @ w.T, x, np.ones((8, 8), np.float32), weights=("w",))
    assert target.flash_bytes(twice) == 64 + 2 * 12 * 8 + 256
    unread = hw.trace(lambda x, w: x @ w[:, :2], x[:, :8], np.ones((8, 8), np.float32), weights=("w",))
    assert target.flash_bytes(unread) == 8 * 2 + 12 * 2


def test_hw_mcu_poison_shows_a_wrong_plan():
    """Two live buffers in one place, or one that dies early, change the result: the check is not blind."""
    program, args = traced_vit()
    target = hw.stm32f746(**OFF).prepared(program, args)
    plan = target.memory(program)
    want, _ = target.run_arena(program, args)
    from hw.mcu_run import run_arena

    arena, seen = plan.arena, []
    for n, (i, size, first, last) in enumerate(arena.buffers):
        if last - first >= 2 and size > 16:
            early = (*arena.buffers[:n], (i, size, first, first), *arena.buffers[n + 1 :])
            wrong = replace(plan, arena=replace(arena, buffers=early))
            seen.append(not equal(run_arena(wrong, args, target.formats)[0], want))
    assert seen
    assert all(seen)


def test_hw_mcu_poisoned_arena_of_loops_and_branches():
    for program, args in loops():
        for given in ({}, OFF, {"strategy": "greedy_by_breadth"}):
            target = hw.stm32f746(**given).prepared(program, args)
            want, _ = hw.run_program(program, args, policy=target.formats)
            got, _ = target.run_arena(program, args)
            assert equal(got, want)
            assert not overlaps(target.memory(program).arena)


def test_hw_mcu_plan_equals_the_optimum_on_small_graphs():
    """Up to twelve buffers: no placement is smaller, and a better order of ops is found and kept."""
    graphs = (
        lambda x: jnp.concatenate([jnp.tanh(x @ x.T), jnp.exp(x) @ x.T]),
        lambda x: (jnp.tanh(x).sum(0) + x[1:3].sum(0), x[::-1] @ x.T),
        lambda x: jnp.tanh(x @ x.T @ x) * x,
    )
    for fn in graphs:
        program = hw.trace(fn, ("float32", (6, 40)))
        for given in ({}, OFF):
            target = hw.stm32f746(**given, reserve_kb=0)
            plan, best = target.memory(program), replace(target, strategy="exact").memory(program)
            assert len(plan.arena.buffers) <= 12
            assert plan.bound <= best.total == plan.total
    wide = hw.trace(lambda x: (jnp.exp(x) @ jnp.exp(x).T)[0] + jnp.sin(x)[:, 0], ("float32", (20, 200)))
    with_order, without = (hw.stm32f746(**(OFF | {"reorder": r})).memory(wide) for r in (True, False))
    assert with_order.total <= without.total


def test_hw_mcu_says_what_does_not_fit_and_what_would():
    program, args = traced_vit()
    plain = hw.stm32f746(**OFF)
    need, saved = plain.memory(program).total, hw.stm32f746().memory(program).total
    small = replace(plain, regions=(("sram", (saved + 64) / 1024),), reserve_kb=0)
    with pytest.raises(hw.DoesNotFit) as e:
        hw.estimate(program, small)
    assert (e.value.needed, e.value.available) == (need, saved + 64)
    assert e.value.shortfall == need - saved - 64
    assert e.value.live_tensors[0][2] >= e.value.live_tensors[-1][2]
    assert "peak at" in e.value.region
    hint = e.value.suggestions[0]
    assert "integrate=True" in hint
    assert "to spare" in hint
    named = {s for s in SWITCHES if f"{s}=True" in hint}
    hw.estimate(program, replace(small, **dict.fromkeys(named, True)))
    with pytest.raises(hw.DoesNotFit) as e:
        hw.execute(program, args, replace(small, regions=(("sram", 1),), integrate=True))
    assert any("a part with" in s for s in e.value.suggestions)
    for dtcm, axi in ((0.5, 0.75), (0.25, 1)):  # of two memories, what the larger would need is exact
        tight = lambda room, dtcm=dtcm: replace(
            plain, regions=(("dtcm", dtcm, 4.0), ("axi", room / 1024, 4.0)), reserve_kb=0
        )
        with pytest.raises(hw.DoesNotFit, match="axi beside dtcm") as e:
            hw.estimate(program, tight(axi * 1024))
        assert e.value.available == axi * 1024
        assert e.value.shortfall > 0
        hw.estimate(program, tight(e.value.needed))
        with pytest.raises(hw.DoesNotFit) as again:
            hw.estimate(program, tight(e.value.needed - plain.align))
        assert (again.value.needed, again.value.shortfall) == (e.value.needed, plain.align)
    with pytest.raises(hw.DoesNotFit) as e:
        hw.estimate(program, hw.stm32f746(flash_kb=2))
    assert e.value.region == "flash"
    assert e.value.needed == plain.flash_bytes(program)
    assert any("weight_bits=4" in s or "KB of flash" in s for s in e.value.suggestions)


def test_hw_mcu_tries_no_memories_that_are_too_small_together(monkeypatch):
    """A refusal of what nothing has room for plans for none of the parts' many memories."""
    from hw import mcu

    planned = []
    made = mcu.plan_memory
    monkeypatch.setattr(mcu, "plan_memory", lambda p, t: planned.append(len(t.regions)) or made(p, t))
    program = hw.trace(lambda x: jnp.tanh(x @ x) @ x, ("float32", (4000, 4000)))
    with pytest.raises(hw.DoesNotFit, match="or a smaller input"):
        hw.estimate(program, hw.stm32h743())
    assert planned
    assert max(planned) == 1


def test_hw_mcu_refuses_no_memories_that_fewer_choices_would_fit(monkeypatch):
    """A plan of all switches that has no room leaves the plans of fewer their turn."""
    from hw import mcu_arena

    program, _ = traced_vit()
    target = replace(hw.stm32f746(), regions=(("dtcm", 1, 4.0), ("axi", 8, 4.0)), reserve_kb=0)
    made = mcu_arena._plan

    def no_room(program, units, target, switches, regions):
        if switches["integrate"]:
            raise MemoryError("no room")
        return made(program, units, target, switches, regions)

    monkeypatch.setattr(mcu_arena, "_plan", no_room)
    plan = mcu_arena.plan_memory(program, target)
    assert not overlaps(plan.arena)
    assert set(plan.arena.region.values()) == {"dtcm", "axi"}


def test_hw_mcu_gated_layers_run_a_token_at_a_time():
    """Halves of a row are cut from it, so a hidden layer and its gate are one row long: 9 x 8 tokens, 48 and
    twice 24 of them, and a row of the result aside; the same codes in the poisoned arena.
    """
    r = np.random.default_rng(5)
    x, up, down = (r.standard_normal(s).astype(np.float32) for s in ((9, 8), (8, 48), (24, 8)))
    half = lambda h: jax.nn.silu(h[:, :24]) * h[:, 24:]
    program = hw.trace(lambda x, up, down: x + half(x @ up) @ down, x, up, down, weights=("up", "down"))
    target = hw.stm32f746(profile="emitted").prepared(program, (x, up, down))
    plan = target.memory(program)
    assert plan.total <= 80 + 48 + 2 * 24 + 2 * 16
    want, _ = hw.run_program(program, (x, up, down), policy=target.formats)
    assert equal(target.run_arena(program, (x, up, down))[0], want)


def test_hw_mcu_exercise_of_the_chapter_on_tokens():
    mlp = lambda x, a, b: x + jax.nn.gelu(x @ a, approximate=False) @ b
    shapes = [("float32", s) for s in ((225, 192), (192, 768), (768, 192))]
    program = hw.trace(mlp, *shapes, weights=("a", "b"))
    beside = lambda **f: hw.stm32f746(profile="emitted", **f).memory(program).total - 225 * 192
    assert beside() == 1536
    assert beside(integrate=False) == 225 * (768 + 192)


def test_hw_mcu_plan_is_drawn():
    program, _ = traced_vit()
    svg = hw.stm32f746().memory(program).plot()
    assert svg.startswith("<svg")
    assert "scratch" in svg
    assert "softmax" in hw.stm32f746(**OFF).memory(program).plot()


# Everything


def test_hw_mcu_takes_every_technique():
    """Its first example runs in int8, and again in a poisoned arena, or is refused by name.

    `tests.claims.hw_mcu` does the same for all examples; its results are checked for freshness.
    """
    from tests.test_layers_hw import HAS_ACCEL, traced

    for slug in HAS_ACCEL:
        e, args, program, _ = traced(slug, 0)
        row = claims.run_example(f"{slug}.{e.fn}", program, args, hw.stm32h743())
        assert row["same"] or "stm32h743" in row["refused"], row


def test_hw_mcu_stored_claims_are_fresh():
    assert record.is_fresh("hw_mcu")
    results = record.load("hw_mcu")["results"]
    for rows in (results["examples"], results["wide"]):
        assert all(r["same"] or r["refused"] for r in rows)
        assert sum(bool(r["same"]) for r in rows) > 50
    gain = [w["snr_db"] - r["snr_db"] for r, w in zip(results["examples"], results["wide"], strict=True)
            if r["snr_db"] and w["snr_db"]]  # fmt: skip
    assert np.median(gain) > 24  # half of what 8 bits more can give


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"core": "cortex_a53"}, "core must be"),
        ({"profile": "fast"}, "profile must be"),
        ({"strategy": "tetris"}, "strategy must be"),
        ({"regions": ()}, "regions must be"),
        ({"regions": (("a", 1), ("a", 2))}, "different names"),
        ({"regions": (("a", 0),), "reserve_kb": 0}, "positive kb"),
        ({"reserve_kb": 320}, "reserve_kb must be"),
        ({"mhz": 0}, "mhz must be positive"),
        ({"align": 0}, "align must be positive"),
        ({"plan": {}}, "plan must be a QuantPlan"),
    ],
    ids=lambda v: f"hw_mcu-{next(iter(v))}" if isinstance(v, dict) else "",
)
def test_hw_mcu_bad_fields_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        hw.stm32f746(**fields)


def test_hw_mcu_bad_arguments_are_named():
    program, args = traced_vit()
    plan = hw.calibrate(program, [args])
    other = hw.trace(lambda x: x + 1, ("float32", (3,)))
    nan = (np.full_like(args[0], np.nan), args[1])
    for bad, words in (
        (lambda: hw.calibrate(program, []), "at least one run"),
        (lambda: hw.calibrate(program, [args], observer="mse"), "observer must be"),
        (lambda: hw.calibrate(program, [args], weight_bits=3), "weight_bits must be"),
        (lambda: hw.calibrate(program, [nan]), "holds NaN"),
        (lambda: hw.execute(other, (np.ones(3, np.float32),), hw.stm32f746(plan=plan)), "another program"),
        (lambda: hw.execute(program, args, hw.stm32f746(plan=replace(plan, scales={}))), "no range for"),
        (lambda: replace(plan, scales={0: (0.0, 0)}), "scale of tensor 0"),
        (lambda: preset("stm32f746", profil="x"), "did you mean profile"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    big = hw.trace(lambda x, w: x @ w, ("float32", (1, 70_000)), ("float32", (70_000, 1)), weights=("w",))
    with pytest.raises(ValueError, match="K=70000"):
        hw.execute(big, (np.ones((1, 70_000)), np.ones((70_000, 1))), hw.stm32f746())
    import accel

    q = np.zeros((1, 1, 8, 8), np.float32)
    call = lambda q: accel.flash.flash_attention(q, q, q, impl="tpu", interpret=True)
    with pytest.raises(hw.UnsupportedPrimitive, match="stm32f746 runs no Pallas kernel"):
        hw.estimate(hw.trace(call, q), hw.stm32f746())
