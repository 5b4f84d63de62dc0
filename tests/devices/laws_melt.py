"""Laws of MELT's harness, energies and cost models on ref alone: NumPy and Hypothesis."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.devices.melt import (
    BenchConfig,
    Device,
    LlamaBackend,
    ModelledPower,
    ReplayedPower,
    Sampling,
    ThermalDevice,
    break_even_tokens,
    dequantize,
    energy,
    model_bytes,
    multiple_choice_accuracy,
    offload,
    op_costs,
    perplexity,
    pick,
    quantize,
    quantize_model,
    quantized_matvec,
    roofline,
    run_benchmark,
    steadiness,
    summarize,
    sustained,
)
from ref.models.llama import LlamaConfig, Rows, forward, init_llama, llama_costs

EPS, EPS16 = np.finfo(np.float64).eps, 2.0**-11
seeds = st.integers(0, 2**32 - 1)
TINY = LlamaConfig(vocab=40, dim=64, depth=2, heads=2, kv_heads=1, head_dim=32, hidden=96, context=64)
WEIGHTS = init_llama(np.random.default_rng(0), TINY)
PHONE = Device(
    bytes_per_s=40e9, flops_per_s=1e12, launch_s=1e-6, dram_j_per_byte=60e-12, mac_j=1e-12, static_w=1.0
)
# As published: sizes of two families of networks.
LLAMA_2_7B = LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, 4096)
MISTRAL_7B = LlamaConfig(32000, 4096, 32, 32, 8, 128, 14336, 32768)
TINYLLAMA = LlamaConfig(32000, 2048, 22, 32, 4, 64, 5632, 2048)


@given(seeds, st.integers(2, 12), st.floats(0.1, 10))
def law_melt_energy_is_the_right_end_sum(seed, n, gain):
    rng = np.random.default_rng(seed)
    t = 1.7e9 + np.cumsum(rng.random(n))  # as telephones count seconds
    current, voltage = rng.random(n), 3 + rng.random(n)
    mwh, mah = energy(t, current, voltage)
    want = sum(current[k] * voltage[k] * (t[k] - t[k - 1]) for k in range(1, n)) / 3600
    np.testing.assert_allclose(mwh, want, rtol=4 * n * EPS)
    cut = int(rng.integers(0, n))  # the sample at the cut belongs to both halves
    halves = [energy(t[s], current[s], voltage[s]) for s in (slice(0, cut + 1), slice(cut, n))]
    np.testing.assert_allclose(np.sum(halves, axis=0), [mwh, mah], rtol=8 * n * EPS, atol=1e-300)
    np.testing.assert_allclose(energy(t, gain * current, voltage), [gain * mwh, gain * mah], rtol=8 * n * EPS)
    flat = energy(t, np.full(n, 200.0), np.full(n, 4.0))
    np.testing.assert_allclose(flat, np.array([800, 200]) * (t[-1] - t[0]) / 3600, rtol=4 * n * EPS)


def law_melt_energy_fills_voltages_backwards_and_drops_the_rest():
    nan = np.nan
    t, current = np.array([0.0, 1, 3, 6, 10]), np.array([9.0, 1, 2, nan, 5])
    voltage = np.array([4.0, nan, 3, 3, nan])  # the second becomes 3; rows 3 and 4 still miss something
    mwh, mah = energy(t, current, voltage)
    np.testing.assert_allclose([3600 * mwh, 3600 * mah], [1 * 3 * 1 + 2 * 3 * 2, 1 * 1 + 2 * 2], rtol=8 * EPS)
    assert energy(t[:1], current[:1], voltage[:1]) == (0.0, 0.0)


class Clock:
    """A clock that a fake backend moves on."""

    def __init__(self):
        self.t = 100.0

    def __call__(self):
        return self.t


class FakeBackend:
    """Reads a token in 1/8 s, makes one in 1/2 s, and always says the token after the one it read last."""

    def __init__(self, clock, vocab=10):
        self.clock, self.vocab, self.seen, self.calls = clock, vocab, [], []

    def load(self):
        self.clock.t += 3

    def reset(self):
        self.seen, self.calls = [], [*self.calls, "reset"]

    def prefill(self, ids):
        self.clock.t += len(ids) / 8
        return self._read(ids)

    def decode(self, id):
        self.clock.t += 0.5
        return self._read([id])

    def nbytes(self):
        return {"model": 7, "cache": len(self.seen), "scratch": 1}

    def _read(self, ids):
        self.seen, self.calls = [*self.seen, *ids], [*self.calls, tuple(ids)]
        return np.eye(self.vocab)[(ids[-1] + 1) % self.vocab]


GREEDY = BenchConfig("fake", "F32", context=32, max_gen_len=8, repetitions=2, stop=(9,),
                     sampling=Sampling(temperature=0, repeat_penalty=1.0))  # fmt: skip


def law_melt_harness_counts_every_token_and_second():
    """Two turns: [5] -> 6 7 8 9, then [1, 2, 3] behind the 9 that no step had read -> 4 5 6 7 8 9."""
    clock = Clock()
    backend = FakeBackend(clock)
    report = run_benchmark(backend, [[[5], [1, 2, 3]]], GREEDY, clock=clock, power=ModelledPower(2.0))
    first, second = report.prompts[:2]
    assert first.tokens == (6, 7, 8, 9)
    assert (first.n_in, first.n_ctx, first.n_out, first.ended) == (1, 0, 3, "stop")
    assert (first.t_prefill, first.t_decode, first.steps) == (0.125, 1.5, (0.5, 0.5, 0.5))
    assert first.start == 103.0  # behind the load
    assert second.tokens == (4, 5, 6, 7, 8, 9)
    assert (second.n_in, second.n_ctx, second.n_out) == (4, 4, 5)
    assert second.prefill_tps == 8
    assert second.n_out / second.decode_tps == second.t_decode == 2.5
    np.testing.assert_allclose(second.mwh, 2.0 * 3.0 / 3.6, rtol=8 * EPS)  # 4 tokens read, 5 made
    assert report.loads[0].seconds == 3
    assert report.loads[0].nbytes == {"model": 7, "cache": 0, "scratch": 1}
    assert [p.tokens for p in report.prompts[2:]] == [first.tokens, second.tokens]
    assert report.resets == 0
    rows = {r["metric"]: r for r in summarize(report)}
    assert rows["load"]["mean"] == rows["load"]["p95"] == 3
    assert rows["prefill"]["mean"] == 8
    assert rows["decode"]["mean"] == 2
    assert rows["decode"]["std"] == 0
    assert rows["token time, 95 %"]["mean"] == 0.5
    np.testing.assert_allclose(rows["energy"]["mean"], 2 * (1.625 + 3) / 3.6 / 8, rtol=8 * EPS)
    blind = summarize(run_benchmark(FakeBackend(clock), [[[5]]], GREEDY, clock=clock))
    assert next(r for r in blind if r["metric"] == "energy")["mean"] is None
    assert run_benchmark(FakeBackend(clock), [[[5]]], GREEDY, clock=clock).power == "not measured"


def law_melt_harness_reads_prompts_in_batches():
    clock = Clock()
    backend = FakeBackend(clock)
    run_benchmark(backend, [[[1, 2, 3, 4, 8]]], replace(GREEDY, prompt_batch=2, repetitions=1), clock=clock)
    assert backend.calls == [
        "reset",
        (1, 2),
        (3, 4),
        (8,),
    ]  # the reply is 9: it stops at once, without a step


def law_melt_harness_empties_a_full_context():
    clock = Clock()
    config = replace(GREEDY, context=6, repetitions=1, max_gen_len=3, stop=())
    report = run_benchmark(FakeBackend(clock), [[[1, 2, 3], [4, 5], [6, 7]]], config, clock=clock)
    a, b, c = report.prompts
    assert (a.ended, a.n_out, a.reset) == ("length", 2, False)  # 3 read, 2 made: 5 in the context
    assert (b.n_ctx, b.n_in, b.reset) == (0, 2, True)  # 1 + 2 more do not fit
    assert (c.n_ctx, c.n_in, c.reset) == (0, 2, True)
    assert report.resets == 2
    long = run_benchmark(FakeBackend(clock), [[[1, 2, 3, 4]]], replace(config, max_gen_len=9), clock=clock)
    assert (long.prompts[0].ended, long.prompts[0].n_out) == ("context", 2)


def law_melt_harness_takes_text_and_stops_at_a_string():
    clock = Clock()
    backend = FakeBackend(clock)
    backend.encode, backend.text = lambda s: [int(ch) for ch in s], lambda ids: "".join(map(str, ids))
    report = run_benchmark(backend, [["12"]], replace(GREEDY, stop=(), stop_strings=("45",)), clock=clock)
    assert report.prompts[0].tokens == (3, 4, 5)
    samples = ReplayedPower([100.0, 103.3, 104.0], [0.0, 3600.0, 3600.0], [1.0, 1.0, 1.0])
    spent = run_benchmark(backend, [["12"]], replace(GREEDY, repetitions=1), power=samples, clock=clock)
    assert spent.prompts[0].mwh is None  # nobody looked in that time
    assert summarize(spent)[5]["mean"] is None


def law_melt_harness_draws_the_same_tokens_from_a_seed():
    config = BenchConfig("tiny", "F32", context=64, max_gen_len=6, repetitions=2, stop=())
    run = lambda **changes: run_benchmark(
        LlamaBackend(lambda: WEIGHTS), [[[1, 2], [3]]], replace(config, **changes)
    )
    tokens = lambda report: [p.tokens for p in report.prompts]
    drawn = tokens(run())
    assert drawn[:2] == drawn[2:] == tokens(run(repetitions=1))
    assert drawn != tokens(run(seed=1))
    greedy = Sampling(temperature=0)
    assert tokens(run(sampling=greedy)) == tokens(run(sampling=greedy, seed=1))
    report = run(sampling=Sampling(temperature=0, repeat_penalty=1.0), repetitions=1)
    text = np.array([1, 2, *report.prompts[0].tokens, 3, *report.prompts[1].tokens])
    logits = forward(WEIGHTS, text[:-1])[0]  # greedy tokens are the largest logits of the whole text at once
    np.testing.assert_array_equal(text[2:8], np.argmax(logits[1:7], axis=-1))
    np.testing.assert_array_equal(text[9:], np.argmax(logits[8:], axis=-1))
    sizes = report.loads[0].nbytes
    assert sizes["model"] > 8 * (40 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96))
    assert report.loads[0].peak_rss is None or report.loads[0].peak_rss > sizes["model"]


def law_melt_penalty_weighs_recent_tokens_down():
    logits, s = np.array([2.0, 1.9, -1.0]), Sampling(temperature=0, repeat_penalty=1.5, penalty_window=2)
    assert pick(logits, 0.0, [], s) == 0
    assert pick(logits, 0.0, [0], s) == 1
    assert pick(logits, 0.0, [0, 2, 2], s) == 0  # 0 is out of the window of two
    assert pick(np.array([-2.0, -1.5, -9]), 0.0, [1], s) == 0  # below zero it is made more negative
    assert pick(logits, 0.0, [0], replace(s, penalty_window=0)) == 0


@given(seeds, st.sampled_from(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")), st.sampled_from((0.0, 3.0)))
def law_melt_quantisation_stays_within_its_bounds(seed, kind, offset):
    """d and m in float16 are off by half an ulp, 2^-11 of themselves; a code by half a step."""
    w = np.float32(np.random.default_rng(seed).standard_normal((4, 64)) + offset)
    raw = quantize(w, kind=kind)
    back = dequantize(raw, kind=kind)
    blocks, error = w.reshape(4, 2, 32).astype(np.float64), np.abs(back - w).reshape(4, 2, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    m = blocks.min(axis=-1, keepdims=True)
    span = blocks.max(axis=-1, keepdims=True) - m
    bound = {  # Q4_0 and Q5_0 have no code for +8 and +16: one side is cut by up to a step
        "Q8_0": 0.57 * largest / 127, "Q4_0": 1.01 * largest / 8, "Q5_0": 1.01 * largest / 16,
        "Q4_1": 0.51 * span / 15 + np.abs(m) * EPS16, "Q5_1": 0.52 * span / 31 + np.abs(m) * EPS16,
    }[kind]  # fmt: skip
    assert (error <= bound + 1e-6 * largest).all()  # and a few roundings of float32
    again = dequantize(quantize(back, kind=kind), kind=kind)  # a second trip changes d by an ulp at most
    np.testing.assert_allclose(again, back, rtol=0, atol=2 * EPS16 * np.abs(back).max())


@given(seeds, st.sampled_from(("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")))
def law_melt_product_equals_that_of_the_decoded_matrix(seed, kind):
    rng = np.random.default_rng(seed)
    w, x = np.float32(rng.standard_normal((5, 96))), rng.standard_normal((2, 96))
    raw = quantize(w, kind=kind)
    y = quantized_matvec(raw, x, kind=kind)
    want = x @ dequantize(raw, kind=kind).astype(np.float64).T
    np.testing.assert_allclose(y, want, rtol=0, atol=96 * EPS * (np.abs(x) @ np.abs(w).T).max() * 1.1)
    np.testing.assert_allclose(
        quantized_matvec(raw, x[0], kind=kind), y[0], rtol=0, atol=96 * EPS * np.abs(y).max() * 8
    )


def law_melt_product_knows_the_super_blocks():
    rng = np.random.default_rng(0)
    for kind, size in (("Q2_K", 84), ("Q3_K", 110), ("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210)):
        raw = rng.integers(0, 60, (3, 2 * size), dtype=np.uint8)  # no byte of 60 makes a scale infinite
        x = rng.standard_normal(512)
        w = dequantize(raw, kind=kind).astype(np.float64)
        np.testing.assert_allclose(quantized_matvec(raw, x, kind=kind), w @ x, rtol=0,
                                   atol=512 * EPS * (np.abs(w) @ np.abs(x)).max())  # fmt: skip
    assert quantized_matvec(np.zeros((0, 34), np.uint8), np.ones(32), kind="Q8_0").shape == (0,)


def law_melt_fewer_bits_tell_less():
    """A drawn network: logits drift further with every format; the perplexity of its own text follows."""
    ids = np.random.default_rng(1).integers(0, 40, 20)
    exact, _ = forward(WEIGHTS, ids)
    drift = []
    for kind in ("F16", "Q8_0", "Q5_1", "Q4_0"):
        network = quantize_model(WEIGHTS, kind=kind)
        assert all(isinstance(w, Rows) for w in (network.embed, network.blocks.w_q, network.blocks.w_down))
        drift.append(np.abs(forward(network, ids)[0] - exact).mean())
        matrices = sum(w.raw.nbytes for w in network.blocks if isinstance(w, Rows))
        assert matrices + network.embed.raw.nbytes + 4 * 64 * 5 == model_bytes(TINY, kind)
    assert drift == sorted(drift)
    twice = quantize_model(quantize_model(WEIGHTS, kind="F16"), kind="F16")
    np.testing.assert_array_equal(
        forward(twice, ids)[0], forward(quantize_model(WEIGHTS, kind="F16"), ids)[0]
    )


def law_melt_perplexity_is_the_mean_surprise():
    ids = np.random.default_rng(2).integers(0, 40, 11)
    nll = []
    for start in (0, 4, 8):  # windows of 4, 4 and 3 tokens; the first of each is given
        part = ids[start : start + 4]
        logits = forward(WEIGHTS, part)[0][:-1]
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        nll += list(-np.log((p / p.sum(axis=-1, keepdims=True))[np.arange(len(part) - 1), part[1:]]))
    np.testing.assert_allclose(perplexity(WEIGHTS, ids, window=4), np.exp(np.mean(nll)), rtol=1e-10)
    blank = WEIGHTS._replace(embed=0 * WEIGHTS.embed)  # all logits 0: every token is one of 40
    np.testing.assert_allclose(perplexity(blank, ids, window=64), 40, rtol=1e-12)


def law_melt_choices_are_scored_by_their_likelihood():
    prompt = np.array([3, 1, 4])
    best = int(np.argmax(forward(WEIGHTS, prompt)[0][-1]))
    other = (best + 1) % 40
    items = [(prompt, [[other], [best]], 1), (prompt, [[best], [other]], 1)]
    assert multiple_choice_accuracy(WEIGHTS, items) == 0.5
    blank = WEIGHTS._replace(embed=0 * WEIGHTS.embed)  # each token costs ln 40: short options win, or nobody
    items = [(prompt, [[1, 2], [5]], 1)]
    assert multiple_choice_accuracy(blank, items) == 1
    assert multiple_choice_accuracy(blank, items, normalize=True) == 0  # equal by token: the first counts


@given(st.integers(0, 30), st.integers(1, 20), st.sampled_from(("F32", "Q8_0", "Q4_1")))
def law_melt_operations_add_up_to_the_call(context, n_in, kind):
    ops = op_costs(TINY, kind, context=context, n_in=n_in)
    whole = llama_costs(TINY, context=context, n_in=n_in, kind=kind)
    assert sum(o.macs for o in ops.values()) == whole["macs"]
    assert sum(o.weight_bytes + o.cache_bytes for o in ops.values()) == whole["bytes"]
    c = TINY  # activations, written out once more: what each operation reads and writes, in float32
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    maps = 2 * (c.dim + q) + 2 * (c.dim + kv) + 3 * (c.dim + c.hidden)
    block = maps + 4 * c.dim + 2 * (q + kv) + 2 * q + 3 * c.hidden + 6 * c.dim
    want = 4 * (n_in * (c.depth * block + 3 * c.dim) + c.dim + c.vocab)
    assert sum(o.activation_bytes for o in ops.values()) == want
    step = roofline(c, PHONE, kind, context=context, n_in=n_in, n_out=2)
    assert step.prefill_bytes == sum(o.bytes for o in ops.values())
    assert step.prefill_macs == whole["macs"]


@given(st.integers(0, 40), st.sampled_from((0.5, 2.0, 10.0)))
def law_melt_roofline_moves_the_right_way(context, factor):
    options = {"context": context, "n_in": 4, "n_out": 8}
    base = roofline(TINY, PHONE, "Q4_0", **options)
    for name in ("bytes_per_s", "flops_per_s"):
        other = roofline(TINY, replace(PHONE, **{name: factor * getattr(PHONE, name)}), "Q4_0", **options)
        better = (other.prefill_s <= base.prefill_s) == (factor >= 1) or other.prefill_s == base.prefill_s
        assert better
        assert ((other.decode_s <= base.decode_s) | (factor < 1)).all()
    later = roofline(TINY, PHONE, "Q4_0", **{**options, "context": context + 5})
    assert (later.decode_s >= base.decode_s).all()
    np.testing.assert_allclose(np.diff(base.decode_s, 2), 0, atol=16 * EPS * base.decode_s.max())  # linear
    np.testing.assert_allclose(base.decode_tps, 8 / base.decode_s.sum(), rtol=8 * EPS)
    watts = PHONE.dram_j_per_byte * base.decode_bytes + PHONE.mac_j * base.decode_macs + base.decode_s
    np.testing.assert_allclose(base.decode_j, watts, rtol=8 * EPS)


def law_melt_prompts_are_compute_bound_and_steps_memory_bound():
    """A prompt is bound by products from n = F bits / (16 BW) on, roughly; a step never here."""
    device = replace(PHONE, launch_s=0.0)
    n = device.flops_per_s * 4.5 / (16 * device.bytes_per_s)  # about 7
    call = lambda n_in: roofline(LLAMA_2_7B, device, "Q4_0", context=0, n_in=n_in, n_out=1)
    by_products = lambda c: 2 * c.prefill_macs / device.flops_per_s
    assert call(int(0.7 * n)).prefill_s > by_products(call(int(0.7 * n)))
    assert call(int(1.5 * n)).prefill_s == by_products(call(int(1.5 * n)))
    step = call(64)
    assert step.decode_s[0] == step.decode_bytes[0] / device.bytes_per_s
    assert step.prefill_tps > 2 * step.decode_tps


def law_melt_sizes_are_those_of_the_published_files():
    """To the two decimals of GB in the benchmark's results: half precision (TinyLlama: single), and q4_0."""
    for config, kind, whole, four_bits in (
        (LLAMA_2_7B, "F16", 13.48, 3.83), (MISTRAL_7B, "F16", 14.48, 4.11), (TINYLLAMA, "F32", 4.40, 0.64),
    ):  # fmt: skip
        assert abs(model_bytes(config, kind, tied=False) / 1e9 - whole) < 0.005
        # files of this kind keep the head in Q6_K
        assert abs(model_bytes(config, "Q4_0", head_kind="Q6_K", tied=False) / 1e9 - four_bits) < 0.0055


@given(st.floats(0.5, 12.0), st.floats(2.0, 12.0), st.booleans())
def law_melt_heat_stays_between_the_air_and_its_end(watts, r, falls):
    device = ThermalDevice(r_k_per_w=r, c_j_per_k=10.0, step_s=1.0)
    power = (lambda f: watts * f) if falls else (lambda f: watts)
    trace = sustained(device, power, 600)
    assert (trace.temperature >= device.ambient_c - 1e-9).all()
    assert (trace.temperature <= device.ambient_c + watts * r * (1 + 1e-12)).all()
    assert (trace.frequency >= device.floor).all()
    assert ((trace.frequency == 1) | (trace.temperature > device.limit_c)).all()
    np.testing.assert_array_equal(trace.power, [power(f) for f in trace.frequency])
    # constant power: the exact exponential, Euler's error is below step / (2 R C e) of the rise
    if not falls:
        want = device.ambient_c + watts * r * (1 - np.exp(-trace.t / (r * 10.0)))
        assert np.abs(trace.temperature - want).max() <= 2 * watts * r / (2 * r * 10.0 * np.e)


def law_melt_running_on_slows_down():
    device = ThermalDevice(r_k_per_w=6.0, c_j_per_k=20.0)
    trace = sustained(device, lambda f: 6.0 * f, 1800)
    found = steadiness(trace.t, 10 * trace.frequency)
    assert found["first"] > 9.9
    assert found["ratio"] < 0.9
    assert 0 < found["drops_at"] < 1800
    # at rest P R f = T - ambient and f = 1 - gamma (T - limit)
    f = (1 + 0.05 * 20) / (1 + 0.05 * 36)
    np.testing.assert_allclose(found["last"], 10 * f, rtol=1e-3)
    cool = sustained(device, lambda f: 1.0 * f, 1800)
    assert steadiness(cool.t, 10 * cool.frequency) == {
        "first": 10.0,
        "last": 10.0,
        "ratio": 1.0,
        "drops_at": None,
    }


@given(st.floats(0.01, 5.0), st.floats(0.1, 5.0), st.floats(5.0, 200.0))
def law_melt_far_away_pays_from_some_length_on(j_per_token, net_s, edge_tps):
    n = break_even_tokens(j_per_token, net_s=net_s, edge_tps=edge_tps, radio_w=1.2)
    away = lambda n: offload(n, net_s=net_s, edge_tps=edge_tps, radio_w=1.2)[1]
    if np.isinf(n):
        assert away(10**9) >= 10**9 * j_per_token * (1 - 1e-9)
    else:
        np.testing.assert_allclose(away(n), n * j_per_token, rtol=1e-9)
        assert away(2 * n) < 2 * n * j_per_token
