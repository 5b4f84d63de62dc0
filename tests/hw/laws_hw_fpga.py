"""Laws of the FPGA target's closed forms, schedules, arithmetic and resources: NumPy and Hypothesis alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hw.boards import bram18, lutram, product_dsp, uram
from hw.errors import DoesNotFit
from hw.fabric import FUNCTION_UNIT, available, check_fit, fits, multipliers, resources
from hw.fpga import PRESETS, zcu102
from hw.stream import simulate_attention, simulate_experts, simulate_pipeline
from hw.systolic import DATAFLOWS, dram_words, simulate_systolic, systolic_cycles
from ref.blocks.fixed import Fixed, fixed_cast, fixed_matmul
from ref.blocks.stream import (
    attention_cycles,
    attention_steps,
    linear_cycles,
    moe_cycles,
    pipeline_cycles,
)

sizes = st.integers(1, 11)
arrays = st.integers(1, 5)
flows = st.sampled_from(DATAFLOWS)
FEW = settings(max_examples=25)
FM, WEIGHT = Fixed(32, 10), Fixed(16, 2)


# The array


@FEW
@given(sizes, sizes, sizes, arrays, arrays, flows, st.integers(0, 2**32 - 1))
def law_hw_fpga_array_cycle_by_cycle_equals_the_closed_form(m, n, k, rows, cols, flow, seed):
    """Values, cycles and words read, with every register simulated."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
    out, cycles, a_reads, b_reads = simulate_systolic(a, b, rows=rows, cols=cols, dataflow=flow)
    want = systolic_cycles(m, n, k, rows=rows, cols=cols, dataflow=flow)
    np.testing.assert_array_equal(out, a @ b)
    assert (cycles, a_reads, b_reads) == (want.cycles, want.a_reads, want.b_reads)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), arrays, flows)
def law_hw_fpga_array_is_never_more_than_full(m, n, k, rows, cols, flow):
    c = systolic_cycles(m, n, k, rows=rows, cols=cols, dataflow=flow)
    assert 0 < c.utilisation < c.mapping_efficiency + 1e-12 <= 1 + 1e-12
    assert c.a_reads >= m * k
    assert c.b_reads >= n * k
    assert c.out_writes >= m * n
    later = systolic_cycles(m, n, k, rows=rows, cols=cols, dataflow=flow, drain=True).cycles
    assert later - c.cycles == (c.folds * rows if flow == "os" else 0)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(1, 40_000), flows)
def law_hw_fpga_smaller_memories_move_more(m, n, k, words, flow):
    """Between everything once and what the array reads; a larger memory never moves more."""
    at = lambda w: sum(dram_words(m, n, k, rows=16, cols=16, dataflow=flow, sram_words=w))
    assert m * k + n * k + m * n == at(None) <= at(2 * words) <= at(words)


# The stream


@given(st.integers(1, 60), st.data())
def law_hw_fpga_reordered_attention_loads_one_key_a_step(n, data):
    p = data.draw(st.integers(1, min(n, 12)))
    t = simulate_attention(n, parallel=p)
    assert t.steps == attention_steps(n, n, parallel=p)
    pairs = [pair[1:] for step in t.pairs for pair in step]
    assert len(pairs) == len(set(pairs)) == n * n
    assert sorted(q for q in t.queries if q >= 0) == list(range(n))
    assert all(k == key for key, step in zip(t.keys, t.pairs, strict=True) for _, _, k in step)
    assert attention_cycles(n, 24, parallel=p) == 3 * t.steps


@given(st.sampled_from((1, 2, 4, 8, 16)), st.integers(0, 2000), st.integers(1, 512))
def law_hw_fpga_twice_the_queries_nearly_halve_the_cycles(p, more, d):
    """For 16 P tokens or more the ratio is in (1.8, 2]."""
    n = 16 * p + more
    assert 1.8 < attention_cycles(n, d, parallel=p) / attention_cycles(n, d, parallel=2 * p) <= 2


def law_hw_fpga_few_tokens_spoil_the_ratio():
    """The fill shows: 5 tokens, 4 and 8 resident queries."""
    assert attention_steps(5, 5, parallel=4) / attention_steps(5, 5, parallel=8) < 1.5


@given(st.integers(1, 20), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(2, 4))
def law_hw_fpga_pipeline_of_events_equals_the_closed_form(items, stages, buffers):
    finish, starts = simulate_pipeline([stages] * items, buffers=buffers)
    assert finish == pipeline_cycles(items, stages)
    assert all(b[0] >= a[0] for a, b in pairwise(starts))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=16), st.integers(1, 64), st.integers(1, 64))
def law_hw_fpga_experts_load_once_each(lengths, n_in, hidden):
    """The schedule lies between the closed form and no overlap, and no token adds a load."""
    cost = moe_cycles(lengths, n_in, hidden)
    layers = [
        c for t in lengths if t for a, b in ((n_in, hidden), (hidden, n_in)) for c in [linear_cycles(t, a, b)]
    ]
    loads, products = sum(c.weights for c in layers), sum(c.compute for c in layers)
    assert cost == max(loads, products)
    assert cost <= simulate_experts(lengths, n_in, hidden) <= loads + products
    more = [t + 1 if t else 0 for t in lengths]
    assert moe_cycles(more, n_in, hidden) <= max(loads, products + sum(c.compute for c in layers))


@given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 400), st.integers(1, 32), st.integers(1, 32))
def law_hw_fpga_linear_unit_is_monotone(tokens, n_in, n_out, i, o):
    at = lambda t, a, b, i, o: linear_cycles(t, a, b, linear_in=i, linear_out=o).compute
    base = at(tokens, n_in, n_out, i, o)
    assert tokens * n_in * n_out <= base * i * o
    assert base <= min(at(tokens + 1, n_in, n_out, i, o), at(tokens, n_in + 1, n_out, i, o))
    assert base <= at(tokens, n_in, n_out + 1, i, o)
    assert base >= max(at(tokens, n_in, n_out, i + 1, o), at(tokens, n_in, n_out, i, o + 1))


def law_hw_fpga_cycles_of_the_vision_transformer():
    """Edge-MoE's network: N = 129, D = 192, hidden 768, 16 experts of 384 and two of them a token."""
    dense = linear_cycles(129, 192, 192)
    assert (dense.compute, dense.weights, dense.read) == (18_576, 2304, 3096)
    assert attention_cycles(129, 192) == 102_168
    assert attention_steps(129, 129) == 4257
    mlp = linear_cycles(129, 192, 768).compute + linear_cycles(129, 768, 192).compute
    assert mlp == 148_608
    even = [17] * 2 + [16] * 14
    assert moe_cycles(even, 192, 384) == 148_608
    assert moe_cycles([1] * 16, 192, 384) == 147_456


# The arithmetic


@FEW
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def law_hw_fpga_casting_each_product_is_low_by_less_than_a_step_each(k, seed):
    """0 <= exact - fixed < K 2^-22, where nothing wraps."""
    rng = np.random.default_rng(seed)
    x, w = FM.quantise(rng.standard_normal((3, k))), WEIGHT.quantise(rng.standard_normal((2, k)) / 2)
    got = fixed_matmul(x, w, fx=FM, fw=WEIGHT, facc=FM)
    low = (x @ w.T) - (got << WEIGHT.frac)  # in steps of 2^-36
    assert (low >= 0).all()
    assert (low < k << WEIGHT.frac).all()


def law_hw_fpga_mean_bias_is_half_a_step_a_product():
    """K / 2 steps of 2^-22 for long sums: 768 products lose 9.2e-5 on average."""
    rng = np.random.default_rng(0)
    k = 768
    x, w = FM.quantise(rng.standard_normal((64, k))), WEIGHT.quantise(rng.standard_normal((8, k)) / 8)
    got = fixed_matmul(x, w, fx=FM, fw=WEIGHT, facc=FM)
    low = ((x @ w.T) - (got << WEIGHT.frac)).mean() * 2.0**-36
    # the mean of 512 sums of 768 uniform numbers: within 5 standard errors of a half each
    assert abs(low / (k / 2 * 2.0**-22) - 1) < 5 / np.sqrt(3 * 512 * k) + 2.0**-13


@FEW
@given(st.integers(0, 2**32 - 1))
def law_hw_fpga_wrapping_sums_have_no_order(seed):
    rng = np.random.default_rng(seed)
    small = Fixed(12, 4)
    x, w = rng.integers(-2048, 2048, (2, 9)), rng.integers(-2048, 2048, (3, 9))
    order = rng.permutation(9)
    sums = lambda acc, o: fixed_matmul(x[:, o], w[:, o], fx=small, fw=small, facc=acc)
    np.testing.assert_array_equal(sums(small, np.arange(9)), sums(small, order))


def law_hw_fpga_saturating_sums_have_one():
    sat = Fixed(8, 8, overflow="SAT")
    one = Fixed(8, 8)
    total = lambda x: fixed_matmul([x], [[1, 1, 1]], fx=one, fw=one, facc=sat).item()
    assert total([100, 100, -100]) == 27
    assert total([100, -100, 100]) == 100


# The fabric


def law_hw_fpga_multipliers_of_the_table():
    for a, b, blocks in (
        (8, 8, 0.5),
        (9, 8, 1),
        (27, 18, 1),
        (18, 27, 1),
        (32, 16, 2),
        (32, 32, 4),
        (28, 18, 2),
    ):
        assert product_dsp(a, b) == product_dsp(b, a) == blocks, (a, b)
    assert product_dsp(25, 18, (25, 18)) == 1
    assert product_dsp(27, 18, (25, 18)) == 2


def law_hw_fpga_memories_by_shape():
    for words, width, halves in (
        (512, 36, 1), (513, 36, 2), (1024, 18, 1), (16384, 1, 1), (4096, 5, 2), (2048, 9, 1), (512, 72, 2),
        (28, 36, 0), (29, 36, 1),
    ):  # fmt: skip
        assert bram18(words, width) == halves, (words, width)
    assert lutram(28, 36) == 36
    assert lutram(29, 36) == 0
    assert uram(4096, 72) == 1
    assert uram(4097, 73) == 4


@given(st.sampled_from(sorted(PRESETS)), st.sampled_from(("stream", "systolic")), st.data())
def law_hw_fpga_resources_grow_with_every_size(name, backend, data):
    target = PRESETS[name](backend=backend)
    field = data.draw(st.sampled_from(target.sizes))
    more = replace(target, **{field: getattr(target, field) + data.draw(st.integers(1, 40))})
    a, b = resources(target), resources(more)
    assert a.dsp <= b.dsp
    assert a.ff <= b.ff
    bits = lambda r: r.bram36 * 36 + r.uram * 288
    if field.endswith("_kb"):  # more banks of a memory of one size may pad less
        assert bits(a) <= bits(b)
    for r in available(target):
        assert getattr(a, r) == sum(getattr(u, r) for u in a.by_unit.values())


def law_hw_fpga_one_unit_less_fits():
    """The remedy is the largest size that fits, and the shortfall is exact."""
    for backend, field, size in (
        ("stream", "linear_in", 120), ("stream", "linear_out", 120), ("stream", "attn_parallel", 60),
        ("stream", "weight_kb", 1600), ("systolic", "rows", 120), ("systolic", "cols", 120),
        ("systolic", "sram_kb", 1000),
    ):  # fmt: skip
        big = zcu102(backend=backend, **{field: size})
        why = refusal(big)
        assert why.shortfall == getattr(resources(big), why.region) - available(big)[why.region] > 0
        told = next(s for s in why.suggestions if s.startswith(field + "="))
        size = int(told.split("=")[1])
        assert fits(replace(big, **{field: size}))
        assert not fits(replace(big, **{field: size + 1}))


def refusal(target):
    """The DoesNotFit of a design that is too large."""
    try:
        check_fit(target)
    except DoesNotFit as why:
        return why
    raise AssertionError(f"{target.name} fits after all")


def law_hw_fpga_a_table_saves_logic():
    """GELU by an exponential and a division in every lane takes ten times the look-up tables."""
    table = resources(zcu102()).by_unit["GELU"]
    naive = 8 * (2 * FUNCTION_UNIT + multipliers(3, 32, 32, (27, 18)))
    assert 10 * table.lut < naive.lut
    assert table.dsp < naive.dsp


def law_hw_fpga_parts_of_the_tables():
    held = {n: (t.dsp, t.bram36, t.uram, t.lut, t.ff) for n, t in ((n, f()) for n, f in PRESETS.items())}
    assert held["zcu102"] == (2520, 912, 0, 274_080, 548_160)
    assert held["u250"] == (12_288, 2688, 1280, 1_728_000, 3_456_000)
    assert held["u280"] == (9024, 2016, 960, 1_304_000, 2_607_000)
    assert held["pynq_z2"] == (220, 140, 0, 53_200, 106_400)
    for f in PRESETS.values():
        for backend in ("stream", "systolic"):
            check_fit(f(backend=backend))


def law_hw_fpga_casts_up_and_down_agree():
    x = np.array([-(2**31), -1, 0, 1, 2**31 - 1])
    up = fixed_cast(x, frac=22, to=Fixed(46, 10))
    np.testing.assert_array_equal(fixed_cast(up, frac=36, to=FM), x)
