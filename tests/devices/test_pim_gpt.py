"""PIM-GPT: laws on ref, accel against ref, the simulator against its closed form, the machine, bad inputs."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
import hw
import ref
from hw import pim_decode as decode
from tests.claims import pim_gpt as claims
from tests.claims import record
from tests.devices import laws_pim_gpt
from tests.hw_record import Cost, size
from tests.laws import law_tests

globals().update(law_tests(laws_pim_gpt))

M = ref.pim_gpt
A = accel.pim_gpt
LANES = "lane by lane through a tree of adders: no product of matrices to count"


def decode_macs(params, token, cache):
    """12 D^2 a layer and two products with the whole reservation; the head."""
    V, D = params.wte.shape
    L, H, S, d = cache.k.shape
    return L * (12 * D * D + 2 * H * S * d) + V * D


f32 = lambda *shape: ("float32", shape)
point = lambda x, **_: 2 * size(x)
HW = {
    "vmm_bf16": Cost(
        macs=lambda x, w: len(x) * w.size,
        bytes=lambda x, w: size(x, w) + 4 * len(x) * w.shape[1],
        ref=LANES,
        bound={"raspberry_pi5": "dram"},
        large=(f32(1, 1024), f32(1024, 4096)),
    ),
    "softmax_asic": Cost(macs=lambda x: 0, bytes=point),
    "layernorm_asic": Cost(macs=lambda *_: 0, bytes=lambda x, g, b: size(x, g, b, x)),
    "gelu_asic": Cost(macs=lambda x: 0, bytes=point),
    "exp_taylor": Cost(macs=lambda x: 0, bytes=point),
    "reciprocal_newton": Cost(macs=lambda x: 0, bytes=point),
    "rsqrt_newton": Cost(macs=lambda x: 0, bytes=point),
    "pim_gpt_decode": Cost(
        macs=decode_macs,
        bytes=lambda p, token, cache: (
            size(*jax.tree.leaves((p, token, cache))) + 4 * len(p.wte) + size(*jax.tree.leaves(cache))
        ),
        ref=LANES,
    ),
}


# accel


@pytest.mark.parametrize(
    "options",
    [{}, {"acc": "bf16"}, {"tile": 64}, {"tile": 100, "lanes": 8, "acc": "bf16"}],
    ids=["whole", "narrow", "tiles", "narrow_tiles"],
)
def test_pim_gpt_accel_product_is_refs(options):
    """Sums that are exact in float32 are the same numbers in any order; others differ in a rare rounding."""
    rng = np.random.default_rng(3)
    grid = lambda *shape: rng.integers(-31, 32, shape).astype(np.float32) / 16
    x, w = grid(3, 150), grid(150, 20)  # 150 products of 2^-8 times less than 2^10: 18 bits
    np.testing.assert_array_equal(A.vmm_bf16(x, w, **options), M.vmm_bf16(x, w, **options))
    x, w = rng.standard_normal((3, 150)), rng.standard_normal((150, 20))
    got, want = A.vmm_bf16(jnp.asarray(x), jnp.asarray(w), **options), M.vmm_bf16(x, w, **options)
    # a rounding that goes the other way moves a partial sum by an ulp, 2^-7 of at most the sum of sizes
    assert (np.abs(got - want) <= 2.0**-7 * np.abs(x) @ np.abs(w)).all()
    assert (np.asarray(got) != want).mean() < 0.05


def test_pim_gpt_accel_vectors_of_odd_length():
    """An odd number waits for a level of the tree, in both registers; what is masked counts for nothing."""
    x = 3 * np.random.default_rng(6).standard_normal((2, 7)).astype(np.float32)
    for acc in ("f32", "bf16"):
        got = A.layernorm_asic(x, x[0], x[1], acc=acc)
        np.testing.assert_array_equal(got, M.layernorm_asic(x, x[0], x[1], acc=acc))
        masked = np.where(np.arange(7) < 5, x, -np.inf)
        got = A.softmax_asic(masked, acc=acc)
        np.testing.assert_array_equal(got, M.softmax_asic(masked, acc=acc))
        np.testing.assert_array_equal(got[:, :5], M.softmax_asic(x[:, :5], acc=acc))


def test_pim_gpt_accel_decodes_like_ref():
    """Three tokens, both registers, a tuple of blocks or one stacked: the same numbers."""
    params, _, _ = M.example(4)[-1].args
    several = tuple(type(params.blocks)(*(a[i] for a in params.blocks)) for i in range(2))
    cache = M.init_cache(params._replace(blocks=several), 4, num_heads=2)
    for form, acc in ((params, "f32"), (params._replace(blocks=several[:1]), "bf16")):
        start = cache if form is params else M.init_cache(form, 4, num_heads=2)
        theirs = start
        single, ours = jax.tree.map(lambda a: jnp.asarray(a), (form, start))
        for token in (5, 0, 23):
            want, theirs = M.pim_gpt_decode(form, token, theirs, acc=acc)
            got, ours = A.pim_gpt_decode(single, token, ours, acc=acc)
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(ours.k, theirs.k)
        np.testing.assert_array_equal(ours.v, theirs.v)
        assert int(ours.length) == theirs.length == 3


def test_pim_gpt_accel_says_nan_where_it_cannot_look():
    """No room, and a token outside the vocabulary, known only when it runs."""
    params, token, cache = jax.tree.map(jnp.asarray, M.example()[-1].args)
    for t, n in ((token, 4), (token + 100, 2)):
        logits, _ = A.pim_gpt_decode(params, t, cache._replace(length=jnp.asarray(n, jnp.int32)))
        assert np.isnan(logits).all()


# The machine


def test_pim_gpt_products_run_in_the_banks_bit_for_bit():
    """The traced product, executed on the machine, is ref's to the last bit; its price is the schedule's."""
    rng = np.random.default_rng(5)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, 3000), (3000, 140)))
    p = hw.trace(lambda x, w: A.vmm_bf16(x, w), x, w, weights=("w",))
    target = hw.pim.pim_gpt(refresh=False)
    out, report = hw.execute(p, (x, w), target)
    np.testing.assert_array_equal(np.asarray(out), M.vmm_bf16(x, w))
    banks = sum(c.busy_s.get("banks", 0) for c in report.by_op)
    assert round(banks / target.tick_s) == M.vmm_ticks(140, 3000).total


def test_pim_gpt_step_is_priced_in_the_banks():
    """A traced step, blocks in a tuple or stacked: what is stored stays; its time is the simulator's."""
    rng, shape = np.random.default_rng(7), hw.GptShape(2, 256, 4, context=128)
    p = M.init_gpt(rng, vocab=16, context=128, dim=256, depth=2)
    stacked = p._replace(blocks=type(p.blocks[0])(*(np.stack(a) for a in zip(*p.blocks, strict=True))))
    target, one = hw.pim_gpt(), lambda a: np.asarray(a, np.float32) if np.ndim(a) else a
    want = hw.simulate_token(shape, 127, target).ns * 1e-9
    for form in (p, stacked):
        cache = jax.tree.map(one, M.init_cache(p, 128, num_heads=4))
        args = jax.tree.map(one, form), np.int32(3), cache
        step = lambda params, token, cache: A.pim_gpt_decode(params, token, cache)
        r = hw.estimate(hw.trace(step, *args, weights=("params", "cache")), target)
        assert 0.9 < sum(c.macs for c in r.by_op if c.busy_s.get("banks")) / r.macs <= 1
        assert 0.75 * want < r.seconds < 1.25 * want  # q, k, v apart, the chip op by op, and a head of 16


@given(laws_pim_gpt.sizes, laws_pim_gpt.sizes, st.sampled_from((1, 8)))
def test_pim_gpt_closed_form_is_the_replay(m, k, channels):
    t = hw.pim.pim_gpt(channels=channels, refresh=False)
    line, form = hw.matvec_timeline(m, k, t), M.vmm_ticks(m, k, t.timing)
    assert (line.cycles, line.mac, line.activate) == (form.total, form.columns, form.rows)
    assert (line.broadcast, line.drain) == (form.broadcast, form.drain)


SHAPES = (hw.GptShape(1, 320, 5), hw.GptShape(2, 96, 2), hw.GptShape(1, 1536, 16), hw.GptShape(1, 40, 1))


@settings(max_examples=25)
@given(st.sampled_from(SHAPES), st.integers(1, 1024), st.sampled_from((2, 8)))
def test_pim_gpt_cache_commands_take_their_closed_form(shape, n, channels):
    """Every list of a layer, at its ticks, breaks no constraint and takes what the formula says."""
    t = hw.pim.pim_gpt(channels=channels, refresh=False)
    want = M.kv_ticks(n, shape.d_model, shape.heads, t.timing)
    for name, commands in decode.token_commands(shape, n, t).items():
        channel = hw.pim_schedule.Channel(t)
        timed = [c for order in commands for c in channel.issue(order)]
        assert not hw.check_commands(timed, t)
        if name in want._fields:
            assert channel.end == getattr(want, name)


@pytest.mark.parametrize("name", list(M.GPTS))
def test_pim_gpt_simulator_is_the_closed_form(name):
    """Every model at three positions, to the tick: banks alone; parts, operations and energies add up."""
    shape, t = M.GPTS[name](), hw.pim.pim_gpt(refresh=False)
    for position in (0, 511, 1023):
        r = hw.simulate_token(shape, position, t)
        assert sum(r.by_op[k] for k in decode.BANKS) == M.token_ticks(shape, position + 1, t.timing)
        assert sum(r.by_op.values()) == sum(r.by_part.values()) == r.ticks
        assert sum(r.energy.values()) == pytest.approx(r.energy_j)
        assert r.by_part["refresh"] == 0
        assert 0 < r.bank_util < 1
    ends = [end for *_, end in r.timeline]
    assert max(ends) == r.ticks
    assert len(r.timeline) == 17 * shape.layers
    assert f"{r.ticks:,}" in r.table()


@pytest.mark.parametrize("tick_ps", [1000.0, 500.0], ids=["ns", "half_ns"])
def test_pim_gpt_trace_is_in_microseconds(tick_ps):
    """Every event at its tick, a tick of a nanosecond a thousandth of a microsecond."""
    r = hw.simulate_token(hw.GptShape(2, 96, 2), 5, hw.pim.pim_gpt(refresh=False, tick_ps=tick_ps))
    events = json.loads(r.perfetto())
    assert len(events) == len(r.timeline)
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(r.ns / 1e3)
    for e, (op, _, _, start, end) in zip(events, r.timeline, strict=True):
        assert (e["ph"], e["name"]) == ("X", op)
        assert (e["ts"], e["dur"]) == pytest.approx((start * tick_ps / 1e6, (end - start) * tick_ps / 1e6))


@pytest.mark.parametrize("d_model", [96, 1088], ids=["a_tile", "two_tiles"])
def test_pim_gpt_logits_are_a_product_more(d_model):
    """A vocabulary adds a norm and a product after the last layer, V D weights, and moves nothing else."""
    bare, t = hw.GptShape(2, d_model, 2), hw.pim.pim_gpt(refresh=False)
    shape = replace(bare, vocab=5000)
    assert (bare.head_weights, shape.head_weights, shape.weights) == (0, 5000 * d_model, bare.weights)
    head = M.vmm_ticks(5000, d_model)
    assert M.token_ticks(shape, 12) == M.token_ticks(bare, 12) + head.total
    without, r = (hw.simulate_token(s, 11, t) for s in (bare, shape))
    assert {k: r.by_op[k] for k in without.by_op} == without.by_op
    assert set(r.by_op) - set(without.by_op) == {"norm", "head", "head sums"}
    assert (r.by_op["head"], r.by_op["norm"]) == (head.total, without.by_op["ln1"] // 2)
    assert (r.by_op["head sums"] > 0) == (d_model > 1024)
    assert sum(r.by_op[k] for k in {*decode.BANKS, "head"}) == M.token_ticks(shape, 12)
    assert sum(r.by_op.values()) == sum(r.by_part.values()) == r.ticks == max(e for *_, e in r.timeline)
    columns = {k: r.by_part[k] - without.by_part[k] for k in ("broadcast", "columns", "drains", "writes")}
    assert columns == dict(broadcast=head.broadcast, columns=head.mac, drains=head.drain, writes=0)
    assert r.row_misses == without.row_misses + head.rows
    assert r.pin_bytes - without.pin_bytes == 8 * 32 * (head.broadcast + head.drain)
    assert all(r.energy[k] > without.energy[k] for k in ("activate", "multiply", "pins", "asic"))
    assert r.bank_util * r.ticks * 2048 == pytest.approx(
        without.bank_util * without.ticks * 2048 + shape.head_weights
    )


def test_pim_gpt_logits_take_room():
    """The matrix of the logits by the byte, in the banks; the logits themselves in the scratchpad."""
    bare, t = M.gpt2_xl(), hw.pim.pim_gpt()
    shape = replace(bare, vocab=50257)
    assert hw.check_capacity(bare, 1024, t) - hw.check_capacity(shape, 1024, t) == 2 * 50257 * 1600
    with pytest.raises(hw.DoesNotFit) as e:
        hw.check_capacity(shape, 4381, t)
    assert e.value.shortfall == 2 * 50257 * 1600 - 4096
    most = int(e.value.suggestions[0].removeprefix("a context of "))
    assert 0 <= hw.check_capacity(shape, most, t) < 4 * 48 * 1600
    with pytest.raises(hw.DoesNotFit, match="sram"):
        hw.simulate_token(hw.GptShape(1, 96, 2, vocab=64 * 1024), 0, t)


def test_pim_gpt_prices_of_an_append_in_the_chapter():
    """What `estimate` charges for a new key or value, and what the simulator does, stand in the chapter."""
    p, t = claims.program(M.gpt2_small(), 512), hw.pim.pim_gpt()
    writes = [c for c in hw.estimate(p, t).by_op if c.prim == "dynamic_update_slice" and c.busy_s]
    ticks = sorted(round(sum(c.busy_s.values()) / c.trips / t.tick_s) for c in writes)
    k = M.kv_ticks(512, 768, 12)
    text = " ".join((record.ROOT / "docs" / "devices" / "pim_gpt.md").read_text().split())
    assert ticks == [45, 45]
    assert f"45 ticks a layer each for GPT2-small, where the simulator takes {k[2]} and {k[3]}" in text
    r = record.load("pim_gpt")["results"]["models"]["gpt2_small"]
    apart, more = r["pim_gpt"]["us"] - r["pim_gpt_program"]["us"], 12 * (k.write_k + k.write_v - 90) / 1e3
    assert f"{more:.1f} of the {apart:.1f} µs" in text


@pytest.mark.parametrize("timing", [{}, {"t_refi": 700, "t_rfc": 90}, {"t_refi": 130, "t_rfc": 100}])
def test_pim_gpt_lookup_is_the_full_replay(timing):
    """Refreshes and all: operations looked up end at the tick at which every single command does."""
    t, shape = hw.pim.pim_gpt(**timing), hw.GptShape(3, 320, 5, vocab=1500, context=300)
    quick = decode._Run(shape, t)
    slow = decode._Run(shape, t, decode.ReplayedBanks(t, {}))
    for n in (1, 128, 129, 300):
        own = decode._profiles(shape, n, t)
        commands = decode.token_commands(shape, n, t)
        slow.banks.commands = {id(p): commands[name] for name, p in own.items()}
        assert quick.token(n, own) == slow.token(n, own)
    assert quick.banks.refreshes == slow.banks.refreshes > 0
    assert quick.report().by_part["refresh"] > 0


def test_pim_gpt_long_run_pays_for_refresh():
    """tRFC of every tREFI of the time in which the banks work, but for what falls on the chip's turns."""
    shape = M.gpt2_medium()
    on, off = (hw.simulate_generation(shape, 3, 5, hw.pim.pim_gpt(refresh=r)) for r in (True, False))
    assert off.ticks < on.ticks <= 1.001 * M.long_run(off.ticks)
    assert len(on.token_ticks) == 8
    assert sum(on.token_ticks) == on.ticks
    assert on.energy["refresh"] > off.energy["refresh"] == 0
    one = hw.simulate_token(shape, 0, hw.pim.pim_gpt(refresh=False))
    assert off.token_ticks[0] == one.ticks


def test_pim_gpt_simulates_a_thousand_tokens_fast():
    import time

    start = time.perf_counter()
    r = hw.simulate_generation(M.gpt2_xl(), 24, 1000, hw.pim.pim_gpt())
    assert time.perf_counter() - start < 20
    assert len(r.token_ticks) == 1024


@given(laws_pim_gpt.sizes, laws_pim_gpt.sizes)
def test_pim_gpt_mapping_is_even(m, k):
    """Two banks' loads differ by a run at most; the fullest one's rows and columns are the closed form's."""
    t = hw.pim.pim_gpt()
    got, form = hw.map_vmm(m, k, t), M.vmm_ticks(m, k)
    loads = np.zeros((8, 16), int)
    np.add.at(loads, tuple(got.bank_of.T), 1)
    assert loads.max() - loads.min() <= 1
    assert tuple(got.bank_of[min(m - 1, 9)]) == (min(m - 1, 9) % 8, min(m - 1, 9) // 8)
    assert (got.rows, got.columns, got.tiles) == (form.rows, form.columns, -(-k // 1024))
    assert got.utilisation == m * k / (128 * form.columns * 16) <= 1


def test_pim_gpt_cache_is_mapped_by_tokens_and_by_heads():
    got = hw.map_kv(1024, 1600, 25, hw.pim.pim_gpt())
    assert got.token_bank.shape == (1024, 2)
    assert np.bincount(got.head_channel).tolist() == [4] + [3] * 7
    assert (got.k_rows, got.v_rows) == (8 + 5, 16)  # 8 tokens a bank of 64 and of 36 columns; 4 heads of 4
    assert got.data_bytes == 2 * 1600 * 1024 * 2


def test_pim_gpt_capacity_by_the_byte():
    """GPT2-XL: 4,381 tokens fit four gibibytes, one more does not."""
    shape, t = M.gpt2_xl(), hw.pim.pim_gpt()
    assert hw.check_capacity(shape, 1024, t) == 4 * 2**30 - 2 * shape.weights - 4 * 48 * 1600 * 1024
    assert hw.check_capacity(shape, 4381, t) == 4096
    with pytest.raises(hw.DoesNotFit) as e:
        hw.check_capacity(shape, 4382, t)
    assert e.value.shortfall == 303_104
    assert "a context of 4381" in e.value.suggestions
    with pytest.raises(hw.DoesNotFit, match="sram"):
        hw.simulate_token(hw.GptShape(1, 2048, 256), 0, t)


def test_pim_gpt_idle_energy_is_background():
    """With commands for free, what is left is power of rows, open or closed, times time, and the chip's."""
    free = dict.fromkeys(("act_pj", "mac_pj", "read_pj", "write_pj", "pin_pj_per_bit", "refresh_pj"), 0.0)
    t = hw.pim.pim_gpt()
    flat = replace(t, energy=replace(t.energy, **free, open_mw=100.0, closed_mw=100.0))
    r = hw.simulate_token(M.gpt2_small(), 100, flat)
    assert r.energy_j - r.energy["asic"] == pytest.approx(8 * 0.1 * r.ticks * 1e-9)
    assert r.energy["asic"] == pytest.approx(0.30459 * r.asic_busy * 1e-9)


def test_pim_gpt_values_by_feature_keep_rows_open():
    """A row a token: fewer hits and several times the time."""
    for n, shape in ((128, M.gpt2_small()), (1024, M.gpt2_xl())):
        found = hw.pim_decode.value_layouts(n, shape.d_model, shape.heads, hw.pim.pim_gpt())
        (ticks, hits, misses), (naive, naive_hits, naive_misses) = found["feature"], found["token"]
        assert naive_hits / naive_misses < hits / misses
        assert naive > 5 * ticks


def test_pim_gpt_chip_matters_less_in_larger_models():
    t = hw.pim.pim_gpt()
    small, large = (hw.simulate_token(m(), 511, t).asic_share for m in (M.gpt2_small, M.gpt3_xl))
    assert 0 < large < small / 2


def test_pim_gpt_sensitivity_is_monotone():
    """A slower chip and slower pins cost more; wider lanes gain, less than they are wider."""
    shape, t = M.gpt2_medium(), hw.pim.pim_gpt(refresh=False)
    for name, values in (("asic.ghz", (1.0, 0.5, 0.1)), ("t_burst", (1, 2, 4, 8))):
        ticks = [row["ticks"] for row in hw.sweep(shape, name, values, t)]
        assert ticks == sorted(ticks)
        assert ticks[-1] > ticks[0]
    lanes = [row["ticks"] for row in hw.sweep(shape, "lanes", (16, 32, 64), t)]
    assert 1 < lanes[0] / lanes[1] < 2
    assert 1 < lanes[0] / lanes[2] < 4
    full = [M.tile_ticks(1, 64 // w, 0, t.timing._replace(row_columns=64 // w)) for w in (1, 4)]
    assert full[0].row_overhead + full[0].mac == 93
    two = hw.sweep(shape, "double_buffer_gb", (False, True), t)
    assert two[1]["ticks"] < two[0]["ticks"]


# Bad inputs


PARAMS, TOKEN, CACHE = M.example()[-1].args
X, T = np.ones((2, 3)), hw.pim.pim_gpt()
WIDE = M.PimCache(np.zeros((2, 3, 6, 4)), np.zeros((2, 3, 4, 6)), np.int32(0))
SHORT = M.PimCache(CACHE.k[:1], CACHE.v[:1], CACHE.length)
BAD = {
    "heads": (lambda m: m.pim_gpt_decode(PARAMS, TOKEN, WIDE), "not the width 8 of wte"),
    "layers": (lambda m: m.pim_gpt_decode(PARAMS, TOKEN, SHORT), "cache has 1 layers"),
    "values": (lambda m: m.pim_gpt_decode(PARAMS, TOKEN, CACHE._replace(v=CACHE.k[..., :3])), "v.shape"),
    "room": (lambda m: m.pim_gpt_decode(PARAMS, TOKEN, CACHE._replace(length=np.int32(4))), "no room"),
    "token": (lambda m: m.pim_gpt_decode(PARAMS, 24, CACHE), r"token must be in 0\.\.23"),
    "weights": (lambda m: m.pim_gpt_decode(PARAMS._replace(wte=np.ones((24, 8), int)), TOKEN, CACHE),
                "wte must be real weights, kept in bfloat16"),
    "acc": (lambda m: m.pim_gpt_decode(PARAMS, TOKEN, CACHE, acc="f8"), "acc must be"),
    "lanes": (lambda m: m.vmm_bf16(X, np.ones((3, 2)), lanes=3), "power of two"),
    "tile": (lambda m: m.vmm_bf16(X, np.ones((3, 2)), tile=0), "tile must be at least 1"),
    "inputs": (lambda m: m.vmm_bf16(X, np.ones((4, 2))), "x must have shape"),
    "none": (lambda m: m.vmm_bf16(np.ones((2, 0)), np.ones((0, 2))), "K >= 1"),
    "softmax": (lambda m: m.softmax_asic(np.ones((2, 0))), "last axis of at least 1"),
    "softmax_acc": (lambda m: m.softmax_asic(X, acc="f16"), "acc must be"),
    "complex": (lambda m: m.gelu_asic(X + 1j), "x must be real numbers"),
    "eps": (lambda m: m.layernorm_asic(X, X[0], X[0], eps=0.0), "eps must be positive"),
    "gain": (lambda m: m.layernorm_asic(X, X[0, :2], X[0]), "g"),
    "order": (lambda m: m.exp_taylor(X, order=7), r"order must be in 1\.\.6"),
    "steps": (lambda m: m.rsqrt_newton(X, steps=-1), "steps must not be negative"),
    "inverse_steps": (lambda m: m.reciprocal_newton(X, steps=-1), "steps must not be negative"),
    "num_heads": (lambda m: m.init_cache(PARAMS, 4, num_heads=3), "num_heads must divide"),
    "reserved": (lambda m: m.init_cache(PARAMS, 0, num_heads=2), "reserved must be at least 1"),
    "work": (lambda m: m.asic_work("tanh", 4), "kind must be one of"),
    "ticks": (lambda m: m.vmm_ticks(0, 4), "m must be an integer of at least 1"),
    "ticks_k": (lambda m: m.vmm_ticks(4, 2.5), "k must be an integer"),
    "timing": (lambda m: m.vmm_ticks(4, 4, m.DramTiming(t_rp=0)), "t_rp must be an integer of at least 1"),
    "kv": (lambda m: m.kv_ticks(0, 64, 2), "n must be at least 1"),
    "kv_heads": (lambda m: m.kv_ticks(1, 64, 3), "heads must divide d_model"),
    "kv_wide": (lambda m: m.kv_ticks(1, 4096, 1), "exceeds the buffer"),
    "shape": (lambda m: m.GptShape(2, 64, 3), "heads must divide d_model"),
    "shape_layers": (lambda m: m.GptShape(0, 64, 2), "layers must be at least 1"),
    "shape_vocab": (lambda m: m.GptShape(2, 64, 2, vocab=0), "vocab must be at least 1 or None"),
    "refresh": (lambda m: m.long_run(4, t_rfc=5, t_refi=5), "t_rfc must be in"),
    "cycles": (lambda m: m.asic_cycles("add", 4, adders=0), "adders and multipliers"),
}  # fmt: skip
MACHINE = {
    "position": (lambda: hw.simulate_token(M.gpt2_small(), 1024, T), r"position must be in 0\.\.1023"),
    "generation": (lambda: hw.simulate_generation(M.gpt2_small(), 1000, 25, T), r"must be in 1\.\.1024"),
    "prompt": (lambda: hw.simulate_generation(M.gpt2_small(), -1, 25, T), "n_prompt must not be negative"),
    "order": (lambda: hw.map_vmm(4, 4, hw.gddr6_aim()), "tile_outer"),
    "chip": (lambda: hw.map_vmm(4, 4, hw.pim.pim_gpt(asic=None)), "nothing beside its banks"),
    "map": (lambda: hw.map_vmm(0, 4, T), "m must be an integer"),
    "map_kv": (lambda: hw.map_kv(0, 64, 2, T), "n_ctx must be at least 1"),
    "capacity": (lambda: hw.check_capacity(M.gpt2_small(), 0, T), "n_ctx must be at least 1"),
    "lanes": (lambda: hw.pim.pim_gpt(lanes=8), "lanes must be 16"),
    "layout": (lambda: list(decode.value_commands(4, 2, 8, T, layout="row")), "layout must be"),
}


@pytest.mark.parametrize("layer", [M, A], ids=["ref", "accel"])
@pytest.mark.parametrize("name", list(BAD))
def test_pim_gpt_refuses(name, layer):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call(layer)


@pytest.mark.parametrize("name", list(MACHINE))
def test_pim_gpt_machine_refuses(name):
    call, words = MACHINE[name]
    with pytest.raises(ValueError, match=words):
        call()


# Claims


def test_pim_gpt_claims_are_fresh_and_have_their_shape():
    """Stored results are of this code; with an overhead on each operator the smallest model gains most."""
    assert record.is_fresh("pim_gpt")
    assert record.is_fresh("pim_gpt_model")
    exact, half, units = (row["kl"] for row in record.load("pim_gpt_model")["results"]["rows"])
    assert exact == 0 < units < 2 * half < 0.05  # the trees cost no more than bfloat16 does
    rows = record.load("pim_gpt")["results"]["models"]
    for other in ("t4", "xeon_6154"):
        eager = [
            rows[m][f"{other}_eager"]["us"] / rows[m]["pim_gpt"]["us"] for m in ("gpt2_small", "gpt2_xl")
        ]
        assert eager[0] > eager[1] > 1
        assert all(r[f"{other}_ideal"]["us"] <= r[f"{other}_eager"]["us"] for r in rows.values())


def test_pim_gpt_claims_stand_in_the_chapter(monkeypatch, capsys):
    """The table of claims, as the chapter computes it, has the ranges of the stored results."""
    monkeypatch.chdir(record.ROOT)
    text = (record.ROOT / "docs" / "devices" / "pim_gpt.md").read_text().split("## Claims")[1]
    exec(re.search(r'```python exec="on"\n(.*?)```', text, re.S)[1], {})
    text = capsys.readouterr().out
    r = record.load("pim_gpt")["results"]

    def span(other, kind, what):
        ratios = [row[f"{other}_{kind}"][what] / row["pim_gpt"][what] for row in r["models"].values()]
        return f"{min(ratios):.0f} to {max(ratios):.0f}x"

    for other, what in (("t4", "us"), ("xeon_6154", "us"), ("t4", "mj"), ("xeon_6154", "mj")):
        ideal, eager = (span(other, kind, what) for kind in ("ideal", "eager"))
        assert f"{ideal} over memory alone, {eager} with 30 µs an operator" in text
    slow = [r["sweeps"][m]["asic.ghz"] for m in ("gpt2_small", "gpt2_xl")]
    small, large = (rows[-1]["us"] / rows[0]["us"] - 1 for rows in slow)
    assert re.search(rf"{small:.0%}.*{large:.0%}".replace("%", " ?%"), text)
    pins = [r["sweeps"][m]["t_burst"] for m in ("gpt2_xl", "gpt2_small")]
    low, high = (rows[-1]["us"] / rows[0]["us"] for rows in pins)
    assert re.search(rf"{low:.1f} to {high:.1f} ?(x|times)", text)


def test_pim_gpt_claims_run():
    """The smallest model, one layer."""
    row = claims.model(hw.GptShape(1, 128, 2, context=64), 31)
    assert row["t4_eager"]["us"] > row["t4_ideal"]["us"] > 0
    assert row["pim_gpt"]["ticks"] > 0
