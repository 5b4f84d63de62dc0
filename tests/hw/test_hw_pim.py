"""DRAM-PIM: other people's simulators, prices and values of traced programs, capacity, bad inputs."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import hw
import ref
from hw import pim
from hw.targets import preset
from ref.blocks.formats import round_bf16
from ref.blocks.lanes import dot_bf16_tree, mac_fp16, vmm_bf16
from tests.claims import hw_pim as claims
from tests.claims import record
from tests.golden_runner import folder
from tests.hw import laws_hw_pim
from tests.laws import law_tests

globals().update(law_tests(laws_hw_pim))
FILES = ("hw_pim_aim", "hw_pim_hbm")
everywhere = pytest.mark.parametrize("name", sorted(pim.PRESETS), ids=lambda n: n)


def stored(name):
    return json.loads((folder() / f"{name}.json").read_text())["cases"]


def call(case):
    """The case's function with its target: a preset with the fields that are set."""
    args = dict(case["args"])
    target = dict(args.pop("target"))
    made = getattr(hw, target.pop("preset"))(**target)
    return getattr(hw, case["fn"])(**args, target=made, **case["kwargs"])


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{n}-{i}") for n in FILES for i, c in enumerate(stored(n))]
)
def test_hw_pim_golden(case):
    got = call(case)
    for key, want in case["outs"].items():
        tol = case["tol"][key]
        rtol, atol = (0, 0) if tol == "exact" else tol
        np.testing.assert_allclose(getattr(got, key), want, rtol=rtol, atol=atol, err_msg=key)


def test_hw_pim_golden_mean_error():
    """Over all stored kernels of HBM-PIM the cycles are within 8 % on average."""
    errors = [abs(call(c).pim / c["outs"]["pim"] - 1) for c in stored("hw_pim_hbm")]
    assert np.mean(errors) <= 0.08


def test_hw_pim_peak_and_bandwidth_of_the_devices():
    """1.024 TFLOP/s a chip of two channels; 16 times the pins inside; AttAcc 16, and 9 by its power."""
    aim = hw.gddr6_aim(channels=2)
    assert aim.peak_flops == pytest.approx(1.024e12)
    assert aim.bank_rate / aim.pin_rate == pytest.approx(16)
    assert hw.gddr6_aim(channels=1).pin_rate == pytest.approx(32e9)
    assert hw.pim_gpt().peak_flops == pytest.approx(4.096e12)
    attacc = hw.hbm3_attacc()
    assert attacc.bank_rate / attacc.pin_rate == pytest.approx(16)
    assert attacc.pin_rate == pytest.approx(670.4e9, rel=1e-3)
    limited = replace(attacc, power_limited=True)
    assert limited.bank_rate / limited.pin_rate == pytest.approx(9)
    assert hw.hbm2_pim().pin_rate == pytest.approx(64 * 16e9)


def test_hw_pim_speed_over_the_pins_is_below_the_ratio_of_bandwidths():
    """Broadcasts are half the cycles of wave_outer; tile_outer sends each slice once."""
    machine = hw.gddr6_aim(channels=32, refresh=False)
    stream = hw.kernel_cycles("gemv", 4096, 4096, machine).stream
    speed = {o: stream / hw.matvec_cycles(4096, 4096, replace(machine, order=o)) for o in pim.ORDERS[:2]}
    assert speed["wave_outer"] == pytest.approx(5.02, abs=0.01)
    assert speed["wave_outer"] < speed["tile_outer"] < 16
    assert hw.crossover_batch(4096, 4096, machine) > speed["wave_outer"]  # rows stay open for the next vector
    hbm = hw.kernel_cycles("gemv", 4096, 4096, hw.hbm2_pim())
    assert 2.5 < hbm.stream / hbm.pim < 3


# Traced programs


SCORES = lambda q, k: jnp.einsum("id,jd->ij", q, k)  # keys as stored, no transpose


def mlp(x, a, b):
    return jax.nn.gelu(x @ a) @ b


@cache
def program(fn, *shapes, weights=(1, 2), dtype="float32"):
    return hw.trace(fn, *((dtype, s) for s in shapes), weights=weights)


def decode():
    return program(mlp, (1, 4096), (4096, 4096), (4096, 4096))


@everywhere
def test_hw_pim_decoding_reads_the_weights_where_they_lie(name):
    """One row: the banks take both products; the weights never cross the pins; time obeys both bandwidths."""
    target = pim.PRESETS[name]()
    r = hw.estimate(decode(), target)
    weights = 2 * 2 * 4096 * 4096
    assert r.bound_by == "banks"
    assert r.bytes_by_level["banks"] >= weights
    assert r.bytes_by_level["pins"] < weights
    assert r.seconds >= r.bytes_by_level["banks"] / target.bank_rate
    assert r.seconds >= (r.bytes_by_level["pins"] - 2 * target.row_bytes) / target.pin_rate / 16
    expected = 2 * hw.matvec_timeline(4096, 4096, target).cycles
    products = sum(c.busy_s.get("banks", 0) for c in r.by_op)
    assert products == pytest.approx(expected * target.tick_s)
    assert r.energy_j > weights / 32 * target.energy.mac_pj * 1e-12
    outside = hw.estimate(decode(), replace(target, placement="host"))
    assert outside.bytes_by_level.get("banks", 0) == 0
    assert outside.bytes_by_level["pins"] >= weights
    assert outside.seconds >= r.seconds


def test_hw_pim_prefill_goes_outside_and_other_operands_are_written_first():
    target = hw.gddr6_aim()
    many = hw.estimate(program(mlp, (2048, 1024), (1024, 4096), (4096, 1024)), target)
    assert "banks" not in many.bytes_by_level
    asked = {b: hw.estimate(program(mlp, (b, 1024), (1024, 4096), (4096, 1024)), target) for b in (1, 2, 4)}
    assert asked[1].seconds < asked[2].seconds < asked[4].seconds
    alone = replace(target, asic=None)
    both = program(SCORES, (64, 64), (512, 64), weights=())
    r = hw.estimate(both, alone)
    assert r.bytes_by_level["pins"] >= min(64, 512) * 64 * 2
    inside = hw.estimate(program(SCORES, (64, 64), (512, 64), weights=(1,)), alone)
    assert inside.seconds < r.seconds
    assert hw.crossover_batch(4096, 1024, target) > 1


def test_hw_pim_loops_slices_and_updates_of_weights_stay_in_the_banks():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    p = hw.trace(layers, ("float32", (1, 512)), ("float32", (6, 512, 512)), weights=("w",))
    target = hw.pim_gpt()
    r = hw.estimate(p, target)
    one = hw.matvec_timeline(512, 512, target).cycles * target.tick_s
    assert sum(c.busy_s.get("banks", 0) for c in r.by_op) == pytest.approx(6 * one)

    def attend(q, cache, k):
        cache = jax.lax.dynamic_update_slice(cache, k, (3, 0))
        return cache @ q

    shapes = [("float32", (64,)), ("float32", (4096, 64)), ("float32", (1, 64))]
    kept = hw.estimate(hw.trace(attend, *shapes, weights=("cache",)), target)
    sent = hw.estimate(hw.trace(attend, *shapes), target)
    assert kept.bytes_by_level["pins"] < sent.bytes_by_level["pins"]


def test_hw_pim_views_of_stored_data_are_addresses_until_the_host_reads_them():
    """A slice of the cache is free for a product; what is computed outside pays for its bytes, once."""
    target = hw.gddr6_aim()
    cache, q = ("float32", (4, 4096, 1024)), ("float32", (1024,))
    inside = hw.estimate(hw.trace(lambda c, q: c[2] @ q, cache, q, weights=("c",)), target)
    line = hw.matvec_timeline(4096, 1024, target)
    assert inside.bytes_by_level["pins"] == (line.broadcast + line.drain) * 32 * target.channels
    outside = hw.estimate(hw.trace(lambda c: jnp.exp(c[2]), cache, weights=("c",)), target)
    assert outside.bytes_by_level["pins"] == 2 * 2 * 4096 * 1024
    put = hw.trace(
        lambda c, k: jax.lax.dynamic_update_slice(c, k, (1, 5, 0)), cache, ("float32", (1, 3, 1024)),
        weights=("c",),
    )  # fmt: skip
    assert hw.estimate(put, target).bytes_by_level["pins"] == 2 * 3 * 1024


def test_hw_pim_stored_prices_are_fresh():
    assert record.is_fresh("hw_pim")
    rows = record.load("hw_pim")["results"]["rows"]
    assert set(rows) == {*(f"decode, context {n}" for n in claims.CONTEXTS), "prefill of 512"}
    for by_target in rows.values():
        assert set(by_target) == set(claims.TARGETS)
        assert all(x["us"] > 0 and x["priced_s"] < 2 for x in by_target.values())


def test_hw_pim_gather_opens_a_row_an_index():
    table = lambda n: hw.trace(lambda w, i: w[i], ("float32", (5000, 64)), ("int32", (n,)), weights=("w",))
    target = hw.gddr6_aim()
    few, many = (hw.estimate(table(n), target) for n in (8, 8192))
    assert few.bytes_by_level["pins"] < many.bytes_by_level["pins"]
    (op,) = (c for c in many.by_op if c.kind == "gather")
    assert op.bytes_by_level["pins"] == 8192 * 128  # 64 values of two bytes, four columns
    both = hw.trace(lambda a, b: a + b, *[("float32", (1 << 20,))] * 2, weights=("a", "b"))
    inside = hw.estimate(both, hw.hbm2_pim())
    assert inside.bytes_by_level == {"banks": 3 * 2 * (1 << 20)}
    seconds = hw.kernel_cycles("add", 1 << 20, 1 << 20, hw.hbm2_pim()).pim * 1e-9
    assert inside.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["gddr6_aim", "hbm2_pim", "pim_gpt"])
def test_hw_pim_execute_computes_in_the_units_formats(name):
    """Products bit for bit the units'; the difference from float32 is reported and bounded by the formats."""
    target = pim.PRESETS[name]()
    rng = np.random.default_rng(0)
    x, w = (
        rng.standard_normal((3, 1100)).astype(np.float32),
        rng.standard_normal((1100, 5)).astype(np.float32),
    )
    p = hw.trace(lambda x, w: x @ w, x, w, weights=("w",))
    out, report = hw.execute(p, (x, w), target)
    if name == "hbm2_pim":
        want = mac_fp16(x, w).astype(np.float16)
    elif name == "gddr6_aim":
        want = dot_bf16_tree(x, w)
    else:
        want = vmm_bf16(x, w, tile=1024)
    np.testing.assert_array_equal(out, want.astype(np.float64))
    assert report.macs == 3 * 1100 * 5
    bits = 2.0**-11 if name == "hbm2_pim" else 2.0**-8
    # Operands round, each lane's or tile's sums round: worst case, all roundings the same way.
    steps = 2 + (1100 / 16 + 3 if name == "hbm2_pim" else 3)
    assert report.quality["worst_abs"] <= steps * bits * float((np.abs(x) @ np.abs(w)).max())
    assert report.quality["snr_db"] > 35


def test_hw_pim_execute_convolution_is_a_product_of_patches():
    """Strides, padding, groups and holes: patches times kernels in the tree's order."""
    rng = np.random.default_rng(1)
    x, w = (
        rng.standard_normal((2, 4, 7, 6)).astype(np.float32),
        rng.standard_normal((6, 2, 3, 3)).astype(np.float32),
    )
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 1), ((2, 0), (0, 3)), rhs_dilation=(2, 1), feature_group_count=2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )  # fmt: skip
    p = hw.trace(conv, x, w, weights=("w",))
    out, report = hw.execute(p, (x, w), hw.gddr6_aim())
    exact, _ = hw.run_program(p, (round_bf16(x), round_bf16(w)))
    size, _ = hw.run_program(p, (np.abs(x), np.abs(w)))
    assert (np.abs(out - exact) <= 20 * 2.0**-23 * size + 2.0**-8 * np.abs(exact)).all()
    assert report.macs == hw.count(p).macs
    for c, at in ((0, (0, 0, 2, 4)), (1, (1, 5, 0, 3))):
        n, o, i, j = at
        patch = np.zeros((2, 3, 3), np.float32)
        g = o // 3
        for a, b in np.ndindex(3, 3):
            r, s = i * 2 + a * 2 - 2, j + b
            if 0 <= r < 7 and 0 <= s < 6:
                patch[:, a, b] = x[n, 2 * g : 2 * g + 2, r, s]
        assert dot_bf16_tree(patch.ravel(), w[o].reshape(-1, 1))[0] == out[at], c


def test_hw_pim_table_is_a_field():
    x = np.linspace(-3, 3, 64, dtype=np.float32)
    p = hw.trace(jnp.tanh, x)
    (plain, _), (table, _) = (hw.execute(p, (x,), hw.gddr6_aim(activation=a)) for a in ("host", "table"))
    assert 0 < np.abs(plain - table).max() <= 2.0**-7


def test_hw_pim_rounding_is_that_of_ml_dtypes():
    """Subnormal numbers, ties, infinity by overflow, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate(
        [bits.view(np.float32), np.float32([0, -0.0, np.inf, np.nan, 3.4e38, 1e-40, 257, 259])]
    )
    with np.errstate(invalid="ignore", over="ignore"):
        want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(round_bf16(x), want)


# Capacity


@everywhere
def test_hw_pim_what_does_not_fit_says_by_how_much(name):
    """The bank's shortfall is exact: one row more makes it fit, the remedy named does too."""
    base = pim.PRESETS[name]()
    rows = 2 * hw.weights_rows(4096, 4096, base)
    with pytest.raises(hw.DoesNotFit) as e:
        hw.estimate(decode(), replace(base, rows=max(rows - 1, 1)))
    short = e.value
    assert short.region == "bank"
    assert short.shortfall == short.needed - max(rows - 1, 1) * base.row_bytes
    assert short.live_tensors[0][2] > 0
    enough = -(-short.needed // base.row_bytes)
    assert hw.estimate(decode(), replace(base, rows=enough)).regions["bank"][0] == short.needed
    with pytest.raises(hw.DoesNotFit):
        hw.estimate(
            decode(), replace(base, rows=enough, reserved_bytes=enough * base.row_bytes - short.needed + 1)
        )
    remedy = next((s for s in short.suggestions if s.startswith("channels=")), None)
    if remedy:
        more = replace(base, rows=max(rows - 1, 1), channels=int(remedy.split("=")[1]))
        assert hw.estimate(decode(), more).seconds > 0
    else:
        assert any("machines" in s for s in short.suggestions)


def test_hw_pim_single_channel():
    target = hw.gddr6_aim(placement="single_channel", rows=512)
    with pytest.raises(hw.DoesNotFit, match="channel needs") as e:
        hw.estimate(decode(), target)
    assert e.value.needed == 2 * 4096 * 4096
    assert 'placement="auto"' in e.value.suggestions
    small = program(mlp, (1, 64), (64, 64), (64, 64))
    alone = hw.estimate(small, hw.gddr6_aim(placement="single_channel"))
    one = hw.matvec_timeline(64, 64, hw.gddr6_aim(channels=1)).cycles * 0.5e-9
    assert sum(c.busy_s.get("banks", 0) for c in alone.by_op) == pytest.approx(2 * one)


@everywhere
def test_hw_pim_single_channel_needs_the_rows_of_one(name):
    """Rows as one channel lays them out, not an even share of the bytes; the remedy named helps."""
    p = program(lambda x, w: x @ w, (1, 16), (16, 4096), weights=(1,))
    base = pim.PRESETS[name]()
    one = replace(base, channels=1)
    rows = hw.weights_rows(4096, 16, one)
    needed = hw.estimate(p, replace(one, rows=4 * rows)).regions["bank"][0]
    assert needed >= rows * base.row_bytes
    enough = -(-needed // base.row_bytes)
    for machine in (one, replace(base, placement="single_channel")):
        assert hw.estimate(p, replace(machine, rows=enough)).regions["bank"][0] == needed
        with pytest.raises(hw.DoesNotFit) as e:
            hw.estimate(p, replace(machine, rows=enough - 1))
        assert (e.value.region, e.value.needed) == ("bank", needed)
    assert e.value.suggestions[0] == 'placement="auto"'
    assert hw.estimate(p, replace(base, rows=enough - 1)).seconds > 0
    few = replace(base, rows=enough - 1, placement="single_channel", channels=1)
    with pytest.raises(hw.DoesNotFit) as e:
        hw.estimate(p, few)
    auto, more = e.value.suggestions[0].split(", channels=")
    assert hw.estimate(p, replace(few, placement=auto.split('"')[1], channels=int(more))).seconds > 0


@everywhere
def test_hw_pim_single_channel_takes_weights_on_either_side(name):
    """W x costs what x W does: the stored operand stays where it is, the other one is broadcast."""
    target = pim.PRESETS[name](placement="single_channel")
    right = hw.estimate(program(lambda x, w: x @ w, (1, 1024), (1024, 4096), weights=(1,)), target)
    left = hw.estimate(program(lambda w, x: w @ x, (4096, 1024), (1024, 1), weights=(0,)), target)
    alone = hw.matvec_timeline(4096, 1024, replace(target, channels=1)).cycles * target.tick_s
    assert left.seconds == right.seconds == pytest.approx(alone)
    assert left.bytes_by_level == right.bytes_by_level
    whole = hw.trace(lambda a, b: a @ b, ("int32", (2, 16)), ("int32", (16, 4)))
    assert "banks" not in hw.estimate(whole, target).bytes_by_level  # the units have no integers


# Bad inputs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"t_rp": -1}, "t_rp must not be negative"),
        ({"t_rp": 0}, "t_rp must be positive"),
        ({"t_ccd": 1.5}, "t_ccd must be an integer"),
        ({"t_ras": 30}, "t_ras must be at least t_act_read"),
        ({"t_ras": 3000}, "t_ras must not exceed the time of a full row"),
        ({"t_refi": 200}, "t_refi must exceed t_rfc"),
        ({"channels": 0}, "channels must be positive"),
        ({"units": 5}, "units must divide"),
        ({"lanes": 8}, "lanes must be 16"),
        ({"lanes": 12, "allow_mismatch": True}, "power of two"),
        ({"column_bytes": 48}, "column_bytes must divide"),
        ({"order": "random"}, "order must be one of"),
        ({"placement": "both"}, "placement must be one of"),
        ({"fmt": "int8"}, "fmt must be one of"),
        ({"acc": "f16"}, "acc must be one of"),
        ({"row_interleave": 65}, "row_interleave must be in"),
        ({"double_buffer_gb": True}, "double_buffer_gb needs"),
        ({"power_limited": True, "pack_rows": True}, "power_limited needs"),
        ({"reserved_bytes": -1}, "reserved_bytes must be in"),
    ],
)
def test_hw_pim_bad_field_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        hw.gddr6_aim(**fields)


def test_hw_pim_bad_arguments_are_named():
    t = hw.gddr6_aim()
    for bad, words in (
        (lambda: hw.matvec_timeline(4, 0, t), "k must be an integer of at least 1"),
        (lambda: hw.matvec_cycles(0, 4, t), "m must be an integer of at least 1"),
        (lambda: hw.matvec_cycles(4, 2.5, t), "k must be an integer"),
        (lambda: hw.matvec_cycles(4, 4, replace(t, row_interleave=2)), "no closed form"),
        (lambda: hw.kernel_cycles("softmax", 4, 4, t), "op must be"),
        (lambda: hw.kernel_cycles("add", 4, 5, t), "must be equal"),
        (lambda: hw.batch_cycles(4, 4, t, 0), "batch must be"),
        (lambda: dot_bf16_tree(np.ones(3), np.ones((4, 2))), "x must have shape"),
        (lambda: dot_bf16_tree(np.ones(0), np.ones((0, 2))), "K >= 1"),
        (lambda: dot_bf16_tree(np.ones(4), np.ones((4, 2)), lanes=3), "power of two"),
        (lambda: dot_bf16_tree(np.ones(4), np.ones((4, 2)), acc="f8"), "acc must be"),
        (lambda: vmm_bf16(np.ones(4), np.ones((4, 2)), tile=0), "tile must be"),
        (lambda: mac_fp16(np.ones(4), np.ones((4, 2)), lanes=0), "lanes must be"),
        (lambda: preset("gddr6_aim", t_rpp=3), "did you mean t_rp"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    wide = hw.Program.from_json(decode().to_json().replace("float32", "float64"))
    with pytest.raises(hw.UnsupportedPrimitive, match="no unit for float64"):
        hw.estimate(wide, t)
    whole = hw.trace(lambda a, b: a @ b, ("int32", (2, 16)), ("int32", (16, 4)))
    assert hw.estimate(whole, t).bytes_by_level.get("banks", 0) == 0
    with pytest.raises(hw.UnsupportedPrimitive, match="no unit for int32"):
        hw.estimate(whole, hw.gddr6_aim(asic=None))
    with pytest.raises(hw.UnsupportedPrimitive, match="nothing beside its banks"):
        hw.estimate(hw.trace(jnp.exp, ("float32", (4,))), hw.gddr6_aim(asic=None))


def test_hw_pim_prices_fast():
    """Thirty layers of a small language model's decode step as one loop: well under two seconds."""
    import time

    def step(x, weights):
        def layer(x, w):
            q = x @ w[0]
            return x + jax.nn.silu(q) @ w[1], None

        return jax.lax.scan(layer, x, weights)[0]

    shapes = ("float32", (1, 576)), [("float32", (30, 576, 1536)), ("float32", (30, 1536, 576))]
    p = hw.trace(lambda x, a, b: step(x, (a, b)), shapes[0], *shapes[1], weights=("a", "b"))
    start = time.perf_counter()
    r = hw.estimate(p, hw.pim_gpt())
    assert time.perf_counter() - start < 2
    assert r.macs == 30 * 2 * 576 * 1536


def test_hw_pim_takes_every_example():
    """Each accel example is priced on every machine and run on one, or refused by a documented error."""
    from tests.test_layers_hw import HAS_ACCEL, replace_trips, traced

    machines, refused = [make() for make in pim.PRESETS.values()], []
    for slug in HAS_ACCEL:
        for i in range(len(getattr(ref, slug).example())):
            e, args, p, _ = traced(slug, i)
            try:
                macs = hw.count(p).macs
            except hw.UnknownTripCount:
                p = replace_trips(p, args)
                macs = hw.count(p).macs
            for t in machines:
                try:
                    r = hw.estimate(p, t)
                except (hw.UnsupportedPrimitive, hw.DoesNotFit) as why:
                    refused.append((t.name, str(why)))
                    continue
                assert r.macs <= macs
                assert not p.ops or (r.seconds > 0 and r.energy_j > 0), (slug, e.fn, t.name)
                assert 0 <= r.peak_memory <= sum(x.nbytes for x in p.tensors.values())
            try:
                outputs, _ = hw.execute(p, args, machines[0])
            except (hw.UnsupportedPrimitive, hw.DoesNotFit) as why:
                refused.append((machines[0].name, str(why)))
                continue
            assert len(outputs if isinstance(outputs, tuple) else (outputs,)) == len(p.output_names)
    assert all(name in why or "it is priced, not run" in why for name, why in refused), refused
