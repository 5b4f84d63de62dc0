"""The FPGA target: stored cross-checks, arithmetic bit for bit, prices, refusals, designs searched."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
import ref
from hw.fabric import available, resources
from hw.fixed_plan import EDGE_MOE, FormatPlan
from hw.formats import Fixed
from hw.fpga import PRESETS, initiation_intervals, search
from hw.targets import preset
from ref.blocks import fixed_ops
from ref.blocks.fixed import fixed_cast, fixed_matmul
from tests.claims import hw_fpga as claims
from tests.claims import record
from tests.golden_runner import folder
from tests.hw import laws_hw_fpga
from tests.laws import law_tests
from tests.test_layers import cases
from tests.test_layers_hw import replace_trips, traced

globals().update(law_tests(laws_hw_fpga))

f32 = lambda *shape: ("float32", shape)
FM, WEIGHT, BIAS = Fixed(32, 10), Fixed(16, 2), Fixed(16, 5)
DESIGNS = {
    "zcu102": hw.zcu102(),
    "zcu102 systolic": hw.zcu102(name="zcu102 systolic", backend="systolic"),
    "pynq_z2": hw.pynq_z2(),
}
everywhere = pytest.mark.parametrize("name", sorted(DESIGNS))


@pytest.fixture(scope="module", autouse=True)
def as_readers_write():
    """JAX's own promotion rules."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# Golden vectors


def golden_cases():
    found = json.loads((folder() / "hw_systolic.json").read_text())["cases"]
    for i, case in enumerate(found):
        yield pytest.param(case, id=f"hw_systolic-{i}-{case['kwargs'].get('dataflow', 'os')}")


@pytest.mark.parametrize("case", list(golden_cases()))
def test_hw_fpga_golden_systolic(case):
    got = getattr(hw, case["fn"])(**case["args"], **case["kwargs"])
    for key, want in case["outs"].items():
        tol = case["tol"][key]
        if tol == "exact":
            assert getattr(got, key) == want, key
        else:
            np.testing.assert_allclose(getattr(got, key), want, rtol=tol[0], atol=tol[1], err_msg=key)


# Every example of the catalogue


@cases
def test_hw_fpga_prices_and_executes_every_example(slug, i):
    """Seconds, joules and bytes on every design; outputs in fixed point, what wrapped on the way told."""
    e, dynamic, program, _ = traced(slug, i)
    outputs, report = hw.execute(program, dynamic, DESIGNS["zcu102"])
    assert report.seconds > 0
    assert report.energy_j > 0
    assert report.seconds_range[0] <= report.seconds <= report.seconds_range[1]
    step = FM.step
    for x in jax.tree.leaves(outputs):
        x = np.asarray(x)
        if x.dtype.kind == "f":
            np.testing.assert_array_equal(x / step, np.rint(x / step))  # numbers of the format
    if not {"events wrapped", "events nan"} & set(report.quality):
        assert report.quality["snr_db"] > 0
    if any(op.kind == "loop" and op.dims.trips is None for op in hw.program.walk(program.body)):
        program = replace_trips(program, dynamic)
    for target in DESIGNS.values():
        r = hw.estimate(program, target)
        assert r.macs >= report.macs, e.fn  # of branches the dearest is charged
        assert 0 < r.peak_memory <= sum(t.nbytes for t in program.tensors.values())


# Arithmetic


def run(fn, *args, weights=(), plan=EDGE_MOE):
    return hw.run_program(hw.trace(fn, *args, weights=weights), args, policy=plan)[0]


@cache
def arrays():
    rng = np.random.default_rng(0)
    return (5 * rng.standard_normal((5, 7))).astype(np.float32), rng.standard_normal((6, 7)).astype(
        np.float32
    )


@pytest.mark.parametrize("per_product_cast", [True, False])
@pytest.mark.parametrize("overflow", ["WRAP", "SAT"])
def test_hw_fpga_product_is_fixed_matmul_bit_for_bit(per_product_cast, overflow):
    (x, w), b = arrays(), np.arange(6, dtype=np.float32) / 7
    wide = Fixed(32, 10, overflow=overflow)
    plan = FormatPlan(activations=wide, per_product_cast=per_product_cast)
    got = run(lambda x, w, b: x @ w.T + b, x, w, b, weights=("w", "b"), plan=plan)
    raw = fixed_matmul(
        wide.quantise(x), WEIGHT.quantise(w), fx=wide.rule, fw=WEIGHT.rule, facc=wide.rule,
        per_product_cast=per_product_cast,
    )  # fmt: skip
    raw = wide.rule.fit(raw + fixed_cast(BIAS.quantise(b), frac=11, to=wide.rule))
    np.testing.assert_array_equal(wide.quantise(got), raw)


def test_hw_fpga_sums_that_wrap_still_end_right():
    """300 + 300 - 300 leaves the range on the way and comes back."""
    x, w = np.full((1, 3), 300, np.float32), np.array([[1, 1, -1]], np.float32)
    assert run(lambda x, w: x @ w.T, x, w, weights=("w",)).item() == 300
    sat = FormatPlan(activations=Fixed(32, 10, overflow="SAT"))
    assert run(lambda x, w: x @ w.T, x, w, weights=("w",), plan=sat).item() == FM.most * FM.step - 300


@pytest.mark.parametrize("quant", ["TRN", "RND", "RND_CONV", "TRN_ZERO"])
def test_hw_fpga_products_and_quotients_are_exact_integers(quant):
    """Every rounding of a 64 bit product or of a quotient, which float64 would get wrong."""
    rng = np.random.default_rng(1)
    form = Fixed(32, 10, quant)
    a, b = (form.dequantise(rng.integers(-(2**31), 2**31, 200)) for _ in range(2))
    b = np.where(b == 0, 1.0, b)
    plan = FormatPlan(activations=form)
    with jax.enable_x64(True):
        programs = [hw.trace(fn, a, b) for fn in (lambda a, b: a * b, lambda a, b: a / b)]
    product, quotient = (hw.run_program(p, (a, b), policy=plan)[0] for p in programs)
    ra, rb = form.quantise(a), form.quantise(b)
    np.testing.assert_array_equal(form.quantise(product), fixed_cast(ra * rb, frac=44, to=form.rule))
    rounding = {
        "TRN": lambda p, q: p // q,
        "RND": lambda p, q: (2 * p + q) // (2 * q),
        "RND_CONV": lambda p, q: (p // q) + (2 * (p % q) > q or (2 * (p % q) == q and (p // q) % 2)),
        "TRN_ZERO": lambda p, q: p // q if p >= 0 else -(-p // q),
    }[quant]
    pairs = [(int(x) << 22, int(y)) for x, y in zip(ra, rb, strict=True)]
    want = [rounding(*((p, q) if q > 0 else (-p, -q))) for p, q in pairs]
    np.testing.assert_array_equal(form.quantise(quotient), form.rule.fit(np.array(want)))


CONVOLUTIONS = {
    "strided": {"window_strides": (2, 1), "padding": ((1, 2), (-1, 0)), "rhs_dilation": (1, 2)},
    "transposed": {"window_strides": (1, 1), "padding": ((2, 2), (1, 1)), "lhs_dilation": (2, 1)},
    "grouped": {
        "window_strides": (1, 1), "padding": "VALID", "feature_group_count": 2,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_hw_fpga_convolution_casts_each_product(kind):
    """Low by less than a step a product against exact sums, and equal to float64 where the sums are exact."""
    rng = np.random.default_rng(2)
    shapes = ((2, 6, 7, 4), (3, 3, 2, 6)) if kind == "grouped" else ((2, 4, 6, 7), (6, 4, 3, 3))
    x, w = (FM.round(rng.standard_normal(shapes[0])), WEIGHT.round(rng.standard_normal(shapes[1]) / 8))
    x, w = x.astype(np.float32).astype(np.float64), w.astype(np.float32)
    x = np.round(x * 256) / 256
    fn = lambda x, w: jax.lax.conv_general_dilated(x, w, **CONVOLUTIONS[kind])
    x = x.astype(np.float32)
    program = hw.trace(fn, x, w, weights=("w",))
    exact = np.asarray(fn(*(jnp.asarray(a) for a in (x, w))), np.float64)
    exact = hw.run_program(program, (x, w), policy=FormatPlan(per_product_cast=False))[0]
    cast = hw.run_program(program, (x, w), policy=FormatPlan())[0]
    low = (exact - cast) / FM.step  # the products have 8 + 14 bits: nothing to drop
    np.testing.assert_array_equal(low, 0)
    fine = FormatPlan(activations=Fixed(24, 10), per_product_cast=True)
    coarse = hw.run_program(program, (x, w), policy=fine)[0]
    assert ((exact - coarse) >= 0).all()
    assert ((exact - coarse) < 36 * 2.0**-14).all()
    want = np.asarray(fn(x, w), np.float64)
    np.testing.assert_allclose(exact, want, rtol=0, atol=36 * 2.0**-23 * 4)  # sums of float32


def test_hw_fpga_wide_formats_equal_float_within_the_bound():
    """A product of K terms is low by less than K steps; exp of a number e too low is e exp(x) too low."""
    x, w = (a / 8 for a in arrays())
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    got = run(lambda x, w: x @ w.T, x, w)
    assert (np.abs(got - exact) < (7 + 7 * 3) * FM.step).all()  # 7 casts, and the inputs' own, |x|, |w| < 3
    flags = run(lambda x: jax.nn.softmax(jnp.where(x > 0, x, -1e30)), x)
    want = np.exp(np.where(x > 0, x, -np.inf).astype(np.float64))
    np.testing.assert_allclose(flags, want / want.sum(1, keepdims=True), rtol=0, atol=12 * FM.step)


def test_hw_fpga_infinite_constants_do_not_wrap():
    """A mask's -1e30 is half the range's end: less the row's maximum it is still far below."""
    x = np.array([[3.0, -2.0, 500.0]], np.float32)
    program = hw.trace(lambda x: jnp.where(x < 100, x, -1e30) - x.min(), x)
    got, seen = hw.run_program(program, (x,), policy=FormatPlan())
    np.testing.assert_array_equal(got, [[5.0, 0.0, -254.0]])
    assert "wrapped" not in seen.events
    _, seen = hw.run_program(hw.trace(lambda x: x * 1e-9, x), (x,), policy=FormatPlan())
    assert seen.events["immediates lost"] == 1


# Prices

BLOCK = {
    "wq": (192, 192),
    "wk": (192, 192),
    "wv": (192, 192),
    "wo": (192, 192),
    "w1": (192, 768),
    "w2": (768, 192),
}


def block(x, p):
    """A transformer block of Edge-MoE's sizes, three heads."""
    q, k, v = ((x @ p[n]).reshape(129, 3, 64).transpose(1, 0, 2) for n in ("wq", "wk", "wv"))
    s = jax.nn.softmax(q @ k.transpose(0, 2, 1) / 8)
    x = x + (s @ v).transpose(1, 0, 2).reshape(129, 192) @ p["wo"]
    return x + jax.nn.gelu(x @ p["w1"]) @ p["w2"]


@cache
def block_program():
    return hw.trace(block, f32(129, 192), {n: f32(*s) for n, s in BLOCK.items()}, weights=("p",))


def test_hw_fpga_block_costs_what_the_loops_say():
    """Products of a block: four of 18,576 cycles, the MLP's 148,608 and two of 102,168."""
    r = hw.estimate(block_program(), hw.zcu102())
    cycles = {k: u * r.cycles for k, u in r.utilisation.items()}
    assert cycles["linear"] == pytest.approx(4 * 18_576 + 148_608)
    assert cycles["attention"] == pytest.approx(2 * 102_168)
    assert r.cycles >= cycles["linear"] + cycles["attention"]
    weights = sum(-(-a * 16 // 256) * b for a, b in BLOCK.values())
    assert cycles["weights"] == pytest.approx(weights)
    assert r.bound_by == "linear"


@everywhere
def test_hw_fpga_serial_is_the_sum_of_its_ops(name):
    serial = hw.estimate(block_program(), replace(DESIGNS[name], overlap=False))
    assert sum(c.seconds for c in serial.by_op) == pytest.approx(serial.seconds)
    busy = sum(c.busy_s.get("serial", 0.0) + c.overhead_s for c in serial.by_op)
    assert busy == pytest.approx(serial.seconds)
    side_by_side = hw.estimate(block_program(), DESIGNS[name])
    assert side_by_side.seconds < serial.seconds
    assert side_by_side.seconds_range[1] <= serial.seconds * (1 + 1e-9)


@everywhere
def test_hw_fpga_more_of_everything_is_never_slower(name):
    """Parallelism, ports, clock and memory; a deeper adder tree may add its depth."""
    base = DESIGNS[name]
    r = hw.estimate(block_program(), base)
    spare = 8 * len(r.by_op) / base.clock_hz
    fields = ("axi_ports", "mhz", "dram_gbps") + (
        ("linear_in", "linear_out", "attn_parallel") if base.backend == "stream" else ("sram_kb",)
    )
    huge = {"dsp": 10**6, "bram36": 10**6, "lut": 10**8, "ff": 10**8}
    for f in fields:
        more = hw.estimate(block_program(), replace(base, **{f: 2 * getattr(base, f)}, **huge))
        assert more.seconds <= r.seconds * (1 + 1e-9) + spare, f
        assert more.macs == r.macs


def test_hw_fpga_loads_of_a_loop():
    """A weight that every trip uses and that fits is loaded once; one that does not, every trip."""

    def steps(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 10)[0]

    p = hw.trace(steps, f32(1, 64), f32(64, 64), weights=("w",))
    once = lambda **kw: (
        hw.estimate(p, hw.zcu102(**kw)).utilisation["weights"] * hw.estimate(p, hw.zcu102(**kw)).cycles
    )
    assert once() == pytest.approx(64 * 4)
    assert once(weight_kb=4) == pytest.approx(10 * 64 * 4)
    (interval,) = initiation_intervals(p, hw.zcu102()).values()
    assert interval == pytest.approx(hw.estimate(p, hw.zcu102()).cycles / 10)
    assert interval > 16  # the products alone: a recurrence waits for its latency


def test_hw_fpga_bits_move_bytes():
    moved = lambda **kw: hw.estimate(block_program(), hw.zcu102(**kw)).bytes_by_level["dram"]
    narrow = FormatPlan(activations=Fixed(16, 6), weights=Fixed(8, 1))
    assert moved() == pytest.approx(2 * moved(formats=narrow), rel=0.01)
    resident = moved(resident_weights=True)
    assert moved() - resident == 2 * sum(a * b for a, b in BLOCK.values())


def test_hw_fpga_untold_weights_are_told_about():
    p = hw.trace(lambda x, w: x @ w, f32(64, 64), f32(64, 64))
    assert any("weights" in w for w in hw.estimate(p, hw.zcu102()).warnings)
    assert hw.estimate(p, hw.zcu102()).bound_by == "attention"


def test_hw_fpga_systolic_peak_and_fold():
    """A 64 x 64 array of int8 at half a multiplier each fits: 1.64 TOP/s."""
    small = FormatPlan(activations=Fixed(8, 3), weights=Fixed(8, 1))
    t = hw.zcu102(backend="systolic", rows=64, cols=64, mhz=200.0, formats=small, sram_kb=32)
    assert 2 * t.peak_macs * t.clock_hz == pytest.approx(1.64e12, rel=1e-2)
    p = hw.trace(lambda x, w: x @ w, f32(256, 64), f32(64, 256), weights=("w",))
    r = hw.estimate(p, t)
    want = hw.systolic_cycles(256, 256, 64, rows=64, cols=64).cycles
    assert r.utilisation["array"] * r.cycles == pytest.approx(want)
    assert 2 * r.macs / r.seconds < 1.64e12


def test_hw_fpga_search_finds_the_best_that_fits():
    best, table = search(block_program(), hw.zcu102())
    assert all(row["dsp"] <= 2520 for row in table)
    assert min(row["seconds"] for row in table) == hw.estimate(block_program(), best).seconds
    assert hw.estimate(block_program(), best).seconds <= hw.estimate(block_program(), hw.zcu102()).seconds
    assert sum(row["best"] for row in table) == 1


def test_hw_fpga_exercises_of_the_chapter():
    """What fits a small part, and where each dataflow wins."""
    room = hw.pynq_z2().bram36 * 4608
    assert [room - 880_000 * bits // 8 for bits in (8, 4)] == [-234_880, 205_120]
    at = lambda m, n, k, f: hw.systolic_cycles(m, n, k, rows=16, cols=16, dataflow=f).cycles
    assert (at(16, 16, 64, "os"), at(16, 16, 64, "ws")) == (94, 248)
    assert at(4096, 16, 16, "ws") < at(4096, 16, 16, "os")


# Refusals


def test_hw_fpga_does_not_fit_says_by_how_much():
    big = hw.zcu102(linear_in=64, linear_out=32)
    with pytest.raises(hw.DoesNotFit, match="dsp needs 4,632 and has 2,520, 2,112 short") as e:
        hw.estimate(block_program(), big)
    assert e.value.shortfall == resources(big).dsp - available(big)["dsp"]
    assert any(s.startswith("linear_out=") for s in e.value.suggestions)
    with pytest.raises(hw.DoesNotFit, match="dram needs") as e:
        hw.estimate(block_program(), hw.zcu102(dram_gb=1e-4))
    assert e.value.available == 100_000
    with pytest.raises(hw.DoesNotFit, match=r"on-chip memory needs .* weights of 9 bits") as e:
        hw.estimate(
            hw.trace(lambda x, w: x @ w, f32(1, 1024), f32(1024, 2304), weights=("w",)),
            hw.zcu102(resident_weights=True),
        )
    assert e.value.shortfall == e.value.needed - e.value.available


def test_hw_fpga_bad_input_is_named():
    for bad, words in (
        ({"backend": "fast"}, "backend must be one of"),
        ({"dataflow": "rs"}, "dataflow must be one of"),
        ({"mhz": 0.0}, "mhz must be positive"),
        ({"linear_in": 0}, "linear_in must be positive"),
        ({"shell_fraction": 1.0}, "shell_fraction must be in"),
        ({"formats": hw.BF16}, "formats must be a FormatPlan or Fixed"),
        ({"axi_bits": 16}, "axi_bits must hold"),
        ({"static_w": -1.0}, "static_w must not be negative"),
    ):
        with pytest.raises(ValueError, match=words):
            hw.zcu102(**bad)
    for bad, words in (
        (lambda: hw.systolic_cycles(0, 1, 1, rows=1, cols=1), "m must be positive"),
        (lambda: hw.systolic_cycles(1, 1, 1, rows=1, cols=1, dataflow="rs"), "dataflow must be one of"),
        (lambda: hw.linear_cycles(1, 1, 0), "n_out must be positive"),
        (lambda: hw.linear_cycles(-1, 1, 1), "tokens must not be negative"),
        (lambda: hw.attention_cycles(4, 8, parallel=0), "parallel must be positive"),
        (lambda: hw.pipeline_cycles(1, []), "need items >= 0"),
        (lambda: hw.simulate_attention(3, parallel=4), "parallel must be in 1..3"),
        (lambda: hw.simulate_pipeline([[1]], buffers=0), "need buffers >= 1"),
        (lambda: Fixed(0, 0), "width must be in"),
        (lambda: FormatPlan(activations=hw.BF16), "activations must be Fixed"),
        (
            lambda: run(lambda x: x * x, np.ones(2, np.float32), plan=FormatPlan(Fixed(40, 10))),
            "do not fit 64 bits",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    psum = hw.trace(lambda x: jax.nn.softmax(x), f32(4, 4))
    assert hw.estimate(psum, hw.zcu102()).seconds > 0


def test_hw_fpga_presets_by_name(tmp_path):
    assert set(PRESETS) == {"zcu102", "u250", "u280", "pynq_z2"}
    assert preset("zcu102", mhz=100.0) == hw.zcu102(mhz=100.0)
    board = tmp_path / "mine.toml"
    board.write_text('base = "u280"\nlinear_in = 16\ndsp_ports = [27, 24]\n')
    assert preset(str(board)).dsp_ports == (27, 24)
    assert ref.blocks.stream.linear_cycles is hw.linear_cycles


# Emitted hardware


@pytest.mark.tools
@pytest.mark.parametrize(
    ("m", "n", "k", "rows", "cols", "drain"), [(5, 7, 3, 2, 3, False), (4, 3, 9, 4, 4, True)]
)
def test_hw_fpga_emitted_array_runs_in_as_many_cycles(m, n, k, rows, cols, drain):
    rng = np.random.default_rng(3)
    a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
    got, cycles = claims.simulate(a, b, claims.array(rows, cols, drain=drain))
    np.testing.assert_array_equal(got, a @ b)
    assert cycles == hw.systolic_cycles(m, n, k, rows=rows, cols=cols, drain=drain).cycles
    form = Fixed(8, 8)
    sums = FormatPlan(activations=form, weights=form, per_product_cast=False)
    program = hw.trace(lambda a, b: a @ b, a.astype(np.float32), b.astype(np.float32), weights=("b",))
    (out,) = program.body.outputs
    wide = replace(sums, by_tensor={out: Fixed(24, 24)})
    executed, _ = hw.run_program(program, (a.astype(np.float32), b.astype(np.float32)), policy=wide)
    np.testing.assert_array_equal(got, executed)


@pytest.mark.tools
@pytest.mark.parametrize(("n", "d", "lanes"), [(9, 16, 4), (5, 8, 1)])
def test_hw_fpga_emitted_attention_is_bit_for_bit(n, d, lanes):
    """Result, maximum and reciprocal sum; cycles of both passes; one key a step and each query once."""
    q, k, v = (fixed_ops.FM.quantise(x) for x in np.random.default_rng(n).standard_normal((3, n, d)))
    out, m, recip, cycles, keys, queries = claims.simulate_attention(q, k, v, hw.zcu102(attn_parallel=lanes))
    want = fixed_ops.reordered_attention_fixed(q[None], k[None], v[None], scale=d**-0.5, lanes=lanes)
    for got, x in zip((out, m, recip), want, strict=True):
        np.testing.assert_array_equal(got, x[0])
    assert cycles == 2 * hw.attention_cycles(n, d, parallel=lanes)
    assert (keys, queries) == (hw.attention_steps(n, n, parallel=lanes), n)


@pytest.mark.tools
@pytest.mark.parametrize("flags", ["", "gelu", "gelu, queue, score"])
def test_hw_fpga_emitted_linear_unit_is_bit_for_bit(flags):
    x, w, b, options, want = claims.layer(np.random.default_rng(4), 5, 6, 7, flags)
    got, cycles = claims.simulate_linear(x, w, b, hw.zcu102(linear_in=4, linear_out=2), **options)
    np.testing.assert_array_equal(got, want)
    rows = len(options.get("queue", x))
    assert cycles == hw.linear_cycles(rows, 6, 7, linear_in=4, linear_out=2).compute


def test_hw_fpga_emits_only_what_it_can():
    narrow = FormatPlan(activations=Fixed(16, 6), weights=Fixed(8, 1))
    alike = lambda f: hw.zcu102(formats=FormatPlan(weights=f))  # 16 bits each, another binary point
    for emit, words in (
        (
            lambda: hw.emit_systolic_verilog(claims.array(2, 2, dataflow="ws"), 2, 2, 2),
            'only the dataflow "os"',
        ),
        (lambda: hw.emit_attention_verilog(hw.zcu102(), 4, 8), r"attn_parallel must be in 1\.\.3"),
        (lambda: hw.emit_attention_verilog(hw.zcu102(), 9, 12), "d must be a multiple of 8"),
        (lambda: hw.emit_attention_verilog(hw.zcu102(formats=narrow), 9, 8), "only fixed<32,10>"),
        (lambda: hw.emit_linear_verilog(hw.zcu102(formats=narrow), 9, 8, 8), "only fixed<32,10>"),
        (lambda: hw.emit_linear_verilog(alike(Fixed(16, 5)), 9, 8, 8), r"got fixed<16,5> weights"),
        (lambda: hw.emit_linear_verilog(alike(Fixed(16, 2)), 9, 8, 8), r"got fixed<16,2> biases"),
        (lambda: hw.emit_linear_verilog(hw.zcu102(), 0, 8, 8), "tokens and rows must be positive"),
        (lambda: hw.emit_linear_verilog(hw.zcu102(), 1, 0, 8), "n_in must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            emit()


@pytest.mark.tools
def test_hw_fpga_open_synthesis_counts_as_stored():
    """Multipliers and memories that yosys finds; tables and flip-flops move with its version."""
    name = "array 4 x 4, int8"
    text, top, _ = claims.models()[name]
    found = claims.summary(claims.synthesise(text, top))
    stored = {row["what"]: row["yosys"] for row in record.load("hw_fpga")["results"]["resources"]}[name]
    assert (found["dsp"], found["memory"]) == (stored["dsp"], stored["memory"])


def test_hw_fpga_stored_results_are_fresh():
    """Every run equal in values and cycles; the models are those of this checkout; multipliers as told."""
    assert record.is_fresh("hw_fpga")
    r = record.load("hw_fpga")["results"]
    assert all(row["equal"] and row["cycles_run"] == row["cycles_model"] for row in r["runs"])
    assert {row["what"]: row["model"] for row in r["resources"]} == {
        name: {k: getattr(unit, k) for k in ("dsp", "lut", "ff")}
        for name, (_, _, unit) in claims.models().items()
    }
    for row in r["resources"]:  # two int8 products to a block are a hand's work
        pair = 2 if "int8" in row["what"] else 1
        assert 0.85 <= pair * row["model"]["dsp"] / row["yosys"]["dsp"] <= 1.15, row["what"]
