"""The roofline targets: closed forms, prices of traced programs, presets, bad inputs."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import hw
from hw.gpu import attention_io
from hw.program import Program
from hw.targets import preset
from tests.claims import hw_gpu as claims
from tests.claims import record
from tests.hw import laws_hw_gpu
from tests.laws import law_tests

globals().update(law_tests(laws_hw_gpu))


def matmul(a, b):
    return a @ b


def attention(q, k, v):
    s = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    p = jnp.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def mlp(x, a, b):
    return jax.nn.gelu(x @ a) @ b


@cache
def program(fn, *shapes, dtype="float32"):
    return hw.trace(fn, *((dtype, s) for s in shapes))


PROGRAMS = {
    "product": lambda: program(matmul, (300, 200), (200, 500)),
    "matrix-vector": lambda: program(matmul, (1, 2048), (2048, 2048)),
    "mlp": lambda: program(mlp, (197, 384), (384, 1536), (1536, 384)),
    "attention": lambda: program(attention, (4, 256, 64), (4, 256, 64), (4, 256, 64)),
    "sum": lambda: program(lambda x: jnp.exp(x).sum(-1), (512, 1024)),
}
DEVICES = laws_hw_gpu.DEVICES
everywhere = pytest.mark.parametrize("name", sorted(DEVICES), ids=lambda n: n)


@everywhere
def test_hw_gpu_roof_is_never_beaten(name):
    """Operations a second under the peak and bytes a second under every level's bandwidth, ideal or not."""
    for device in (DEVICES[name], replace(DEVICES[name], ideal=True)):
        for make in PROGRAMS.values():
            r = hw.estimate(make(), device)
            is_gpu = hasattr(device, "peak_tflops")
            peak = device.peak_tflops["float32"] * 1e12 if is_gpu else device.ops_rate()
            assert 2 * r.macs / r.seconds <= peak * (1 + 1e-9)
            assert r.energy_j > 0
            for op in r.by_op:
                for level, moved in op.bytes_by_level.items():
                    if is_gpu:
                        rate = {"hbm": device.hbm_gbps * 1e9, "l2": device.l2_rate}[level]
                    else:
                        rate = max(device.level_rate(level), device.dram_gbps * 1e9)
                    assert moved / op.trips <= rate * r.seconds * (1 + 1e-9)


@everywhere
def test_hw_gpu_ideal_is_no_slower_and_fusing_moves_no_more(name):
    device = DEVICES[name]
    memory = lambda r: sum(r.bytes_by_level.values())
    for label, make in PROGRAMS.items():
        default = hw.estimate(make(), device)
        assert hw.estimate(make(), replace(device, ideal=True)).seconds <= default.seconds, label
        unfused = hw.estimate(make(), replace(device, fuse=False))
        assert memory(default) <= memory(unfused), label
        assert unfused.macs == default.macs


@everywhere
def test_hw_gpu_decoding_is_bound_by_memory(name):
    """One row times a matrix that no cache holds: half an operation a byte in float32."""
    r = hw.estimate(program(matmul, (1, 16384), (16384, 16384)), DEVICES[name])
    assert r.bound_by in ("hbm", "dram", "l3")


def test_hw_gpu_faster_parts_never_slow_a_program():
    for make in PROGRAMS.values():
        for device, fields in (
            (hw.h200(), ("hbm_gbps", "l2_gbps", "vector_tflops", "sfu_tops")),
            (hw.xeon_6154(), ("dram_gbps",)),
        ):
            base = hw.estimate(make(), device).seconds
            for f in fields:
                faster = replace(device, **{f: 2 * getattr(device, f)})
                assert hw.estimate(make(), faster).seconds <= base * (1 + 1e-12), f


def test_hw_gpu_time_is_continuous_at_the_ridge():
    """A per mille more bandwidth changes the time by at most a per mille, also where the limit changes."""
    p = program(matmul, (2048, 2048), (2048, 2048), dtype="bfloat16")
    seconds = [hw.estimate(p, hw.h200(hbm_gbps=float(g))).seconds for g in np.geomspace(50, 5000, 400)]
    bounds = {hw.estimate(p, hw.h200(hbm_gbps=g)).bound_by for g in (50.0, 5000.0)}
    assert len(bounds) == 2
    step = 100 ** (1 / 399)
    assert all(b <= a <= b * step * (1 + 1e-9) for a, b in pairwise(seconds))


def test_hw_gpu_fused_attention_is_one_launch_and_moves_its_operands_once():
    p, size = PROGRAMS["attention"](), 4 * 256 * 64 * 4
    r = hw.estimate(p, hw.h200())
    assert r.bytes_by_level["hbm"] == 4 * size
    assert hw.estimate(p, hw.h200(launch_us=1002.0)).seconds == pytest.approx(r.seconds + 1e-3)
    assert 4 * size <= r.peak_memory < 4 * size + 64  # and a scalar constant
    apart = hw.estimate(p, hw.h200(fuse=False))
    assert apart.peak_memory >= 4 * size + 4 * 256 * 256 * 4
    assert apart.bytes_by_level["hbm"] >= 4 * size + 4 * (4 * 256 * 256 * 4)


def test_hw_gpu_loops_multiply():
    one = program(lambda x, w: jnp.tanh(x @ w), (64, 64), (64, 64))
    ten = program(
        lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 10)[0], (64, 64), (64, 64)
    )
    for device in (hw.h200(), hw.xeon_6154()):
        assert hw.estimate(ten, device).seconds == pytest.approx(10 * hw.estimate(one, device).seconds)


@pytest.mark.parametrize("rows", [128, 4096])
def test_hw_gpu_a_loop_over_slices_visits_the_whole_array(rows):
    """A row fits in the nearest cache, but the rows that pass by come from where the array is."""
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.float32)
    take = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    add = lambda c, row: (c + row.sum(), None)
    by_slices = lambda x: jax.lax.scan(add, jnp.float32(0), x)[0]
    by_index = lambda x: jax.lax.fori_loop(0, rows, lambda i, c: c + take(x, i).sum(), jnp.float32(0))
    nested = lambda x: jax.lax.scan(lambda c, b: (c + by_slices(b), None), jnp.float32(0), x)[0]
    device = preset("xeon_6154")
    size = rows * 4096 * 4
    home = device.level_of(size, threads=1)
    assert home != "l1"
    for fn, arg in (
        (by_slices, x),
        (by_index, x),
        (nested, jax.ShapeDtypeStruct((2, rows // 2, 4096), jnp.float32)),
    ):
        moved = hw.estimate(hw.trace(fn, arg), device).bytes_by_level[home]
        assert size <= moved <= size * (1 + 2**-8)  # and the sums and indices of each row


def test_hw_gpu_systolic_array_pads():
    device = hw.tpu_v6e(hbm_gbps=1e9, l2_gbps=0.0, watts=1e6)
    seconds = lambda n: hw.estimate(program(matmul, (64, n), (n, n), dtype="bfloat16"), device).seconds
    assert seconds(1025) == pytest.approx(seconds(1280))
    assert seconds(1024) < seconds(1025)


def test_hw_gpu_kernel_traffic_is_the_grids():
    """A Pallas product: a TPU moves what the grid walk says; a GPU shares a wave's fetches through L2."""
    body = lambda x, w, o: o.__setitem__(..., x[...] @ w[...])

    def tiled(x, w):
        return pl.pallas_call(
            body,
            grid=(4, 3),
            in_specs=[
                pl.BlockSpec((32, 64), lambda i, j: (i, 0)),
                pl.BlockSpec((64, 32), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((32, 32), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((128, 96), x.dtype),
        )(x, w)

    p = program(tiled, (128, 64), (64, 96))
    blocks = [
        hw.GridOperand(lambda i, j: (i, 0), (32, 64), (128, 64), 4),
        hw.GridOperand(lambda i, j: (0, j), (64, 32), (64, 96), 4),
        hw.GridOperand(lambda i, j: (i, j), (32, 32), (128, 96), 4, output=True),
    ]
    moved = sum(hw.grid_traffic((4, 3), blocks).bytes)
    assert hw.estimate(p, hw.tpu_v5e()).bytes_by_level["hbm"] == moved
    once = (128 * 64 + 64 * 96 + 128 * 96) * 4
    assert hw.estimate(p, hw.h200()).bytes_by_level == {"hbm": once, "l2": moved}
    assert hw.estimate(p, hw.h200()).macs == 128 * 64 * 96


def test_hw_gpu_power_and_memory_are_limits():
    p = program(matmul, (2048, 2048), (2048, 2048), dtype="bfloat16")
    r = hw.estimate(p, hw.h200(watts=150.0))
    assert r.bound_by == "power"
    assert "held back by its 150 W" in r.warnings[0]
    assert r.energy_j <= 150 * r.seconds * (1 + 1e-9)
    with pytest.raises(hw.DoesNotFit) as e:
        hw.estimate(p, hw.h200(hbm_gb=0.02))
    assert e.value.shortfall == 3 * 2048 * 2048 * 2 - 20_000_000
    with pytest.raises(hw.DoesNotFit, match="fewer bits"):
        hw.decode_tokens_per_s(7e9, 16, 0, 0, hw.iphone14pro())


def test_hw_gpu_cpu_overhead_is_a_field():
    p = PROGRAMS["mlp"]()
    eager = hw.xeon_6154(op_overhead_us=30.0, fuse=False)
    extra = hw.estimate(p, eager).seconds - hw.estimate(p, replace(eager, op_overhead_us=0.0)).seconds
    assert extra >= 30e-6 * 2
    assert hw.estimate(p, hw.xeon_6154(threads=1)).seconds > hw.estimate(p, hw.xeon_6154()).seconds


def test_hw_gpu_points_of_a_roofline_lie_under_the_roof():
    device = hw.h200(ideal=True)
    points = hw.roofline_points(hw.estimate(PROGRAMS["mlp"](), device))
    assert [name for *_, name in points if "dot_general" in name]
    assert all(0 < speed <= device.peak_tflops["float32"] * 1e12 for _, speed, _ in points)


def test_hw_gpu_bad_input_is_named():
    io = lambda **kw: attention_io(64, 16, **{"sram_bytes": 4096, "dtype_bytes": 2, **kw})
    for kw, words in (
        ({"sram_bytes": 511, "algorithm": "flash"}, "need at least 512 bytes"),
        ({"algorithm": "fast"}, "algorithm must be one of"),
        ({"density": 0.5}, "density must be"),
        ({"heads": 0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            io(**kw)
    for bad, words in (
        (lambda: hw.xeon_6154(threads=19), "threads must be in 1..18"),
        (lambda: hw.h200(hbm_gbps=-1.0), "hbm_gbps must be positive"),
        (lambda: hw.h200(compute_eff=1.5), "compute_eff must be in"),
        (lambda: hw.a100(gb=60), "no Gpu preset"),
        (lambda: hw.gemm_waves(0, 1, 1, hw.h200()), "at least 1"),
        (lambda: hw.gemm_waves(1, 1, 1, hw.h200(), method="magic"), "method must be one of"),
        (lambda: hw.decode_tokens_per_s(0, 4, 0, 0, hw.h200()), "params"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    with pytest.raises(hw.UnsupportedPrimitive, match="no rate for float64"):
        hw.estimate(
            Program.from_json(PROGRAMS["product"]().to_json().replace("float32", "float64")), hw.tpu_v5e()
        )


def test_hw_gpu_names_of_presets(tmp_path):
    assert preset("h200", hbm_gbps=1.0) == hw.h200(hbm_gbps=1.0)
    with pytest.raises(LookupError, match="did you mean h200"):
        preset("h20")
    with pytest.raises(ValueError, match="did you mean hbm_gb"):
        preset("h200", hbm_gbs=1)
    board = tmp_path / "board.toml"
    board.write_text('base = "xeon_6154"\nclusters = [[4, 3.0, 32, 64]]\n')
    assert preset(str(board)).cores == 4
    assert preset(str(board)).name == "board"


def test_hw_gpu_this_computer_and_one_cheap_measurement():
    """Fields are filled; estimate and measurement of one kernel stand side by side, without a bound."""
    device = hw.Cpu.from_cpuinfo(dram_gbps=20.0)
    assert device.cores >= 1
    assert min(device.clusters[0]) > 0
    assert min(device.caches_kb[:2]) > 0
    rows, empty = claims.compare(device, budget=0.02, only=("square",))
    assert empty > 0
    assert rows[0]["estimated_s"] > 0
    assert rows[0]["measured_s"] > 0


def test_hw_gpu_stored_results_are_fresh():
    assert record.is_fresh("hw_gpu")
    r = record.load("hw_gpu")
    assert {"date", "device", "versions", "sha256", "results"} <= set(r)
    assert set(r["results"]["by_class"]) == {k["class"] for k in r["results"]["rows"]}
    assert claims.summary(r["results"]["rows"])["median_abs_error"] == r["results"]["median_abs_error"]
    assert len(r["results"]["llama_7b"]) == len(claims.PUBLISHED)
