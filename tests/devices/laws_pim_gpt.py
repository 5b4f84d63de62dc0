"""Laws of PIM-GPT on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.blocks.asic import (
    ASIC_STEPS,
    Unit,
    asic_cycles,
    asic_work,
    gelu_steps,
    layernorm_steps,
    softmax_steps,
)
from ref.blocks.formats import round_bf16
from ref.devices.pim_gpt import (
    GPTS,
    DramTiming,
    GptShape,
    PimCache,
    exp_taylor,
    gelu_asic,
    init_cache,
    init_gpt,
    kv_ticks,
    layernorm_asic,
    long_run,
    pim_gpt_decode,
    reciprocal_newton,
    rsqrt_newton,
    softmax_asic,
    tile_ticks,
    token_ticks,
    vmm_bf16,
    vmm_ticks,
)
from ref.models.gpt import gpt_blocks, gpt_embed, gpt_forward

FEW = settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)
SIZES = (1, 2, 15, 16, 17, 64, 127, 128, 129, 768, 1008, 1023, 1024, 1025, 1040, 1600, 2048, 3072, 3073)
sizes = st.one_of(st.sampled_from(SIZES), st.integers(1, 4000))
HALF_ULP = 2.0**-8  # of a bfloat16 number, relative: eight bits


def narrow(x):
    """bfloat16 by bits: half of the last place added, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# Products


@FEW
@given(seeds, st.integers(1, 70), st.sampled_from((1, 7, 16, 40, 1024)), st.sampled_from((2, 8, 16)),
       st.sampled_from(("f32", "bf16")))  # fmt: skip
def law_pim_gpt_product_is_the_fold_of_the_adders(seed, k, tile, lanes, acc):
    """Scalar by scalar: sixteen products, pairs of neighbours, one accumulator, a sum of tiles."""
    rng = np.random.default_rng(seed)
    x, w = (narrow(rng.standard_normal(s)) for s in (k, (k, 2)))
    for m in range(2):
        total = None
        for start in range(0, k, tile):
            register = np.float32(0)
            for column in range(start, min(start + tile, k), lanes):
                at = range(column, min(column + lanes, start + tile, k))
                level = [x[i] * w[i, m] for i in at]
                level += [np.float32(0)] * (lanes - len(level))
                while len(level) > 1:
                    level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
                register = register + level[0]
                register = narrow(register)[()] if acc == "bf16" else register
            drained = narrow(register)[()]
            total = drained if total is None else narrow(total + drained)[()]
        assert vmm_bf16(x, w, lanes=lanes, tile=tile, acc=acc)[m] == total


@FEW
@given(seeds, st.sampled_from((1, 100, 1024, 2500)))
def law_pim_gpt_product_errs_by_its_roundings(seed, k):
    """float32 sums, a rounding of every drained partial sum and of every sum of them."""
    rng = np.random.default_rng(seed)
    x, w = (narrow(rng.standard_normal(s)).astype(np.float64) for s in (k, (k, 5)))
    parts = np.array([x[i : i + 1024] @ w[i : i + 1024] for i in range(0, k, 1024)])
    running = np.cumsum(parts, axis=0)[1:]
    bound = (k + 4) * 2.0**-24 * (np.abs(x) @ np.abs(w))
    bound += 2.0**-8 * (np.abs(parts).sum(0) + np.abs(running).sum(0))
    assert (np.abs(vmm_bf16(x, w) - x @ w) <= bound).all()


def law_pim_gpt_product_has_no_relative_bound():
    """1 + 2^-12 - 1 in tiles of one: the small one is lost."""
    x, w = np.ones(3), np.array([[1.0], [2.0**-12], [-1.0]])
    assert vmm_bf16(x, w, tile=1) == 0
    assert vmm_bf16(x, w, tile=3) == 2.0**-12


def law_pim_gpt_product_ignores_zeros_at_the_end():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(40), rng.standard_normal((40, 3))
    longer = np.pad(x, (0, 24)), np.pad(w, ((0, 24), (0, 0)))
    np.testing.assert_array_equal(vmm_bf16(x, w), vmm_bf16(*longer))


# The chip


def law_pim_gpt_functions_are_within_a_bfloat16_ulp():
    for fn, exact, x in (
        (exp_taylor, np.exp, np.linspace(-20, 0, 4001)),
        (reciprocal_newton, lambda x: 1 / x, np.geomspace(1e-6, 1e6, 4001)),
        (rsqrt_newton, lambda x: 1 / np.sqrt(x), np.geomspace(1e-6, 1e6, 4001)),
    ):
        x = x.astype(np.float32)
        want = exact(x.astype(np.float64))
        got = round_bf16(fn(x))
        ulp = 2.0 ** (np.floor(np.log2(want)) - 7)
        assert (np.abs(got - want) <= ulp).all()
        # the functions themselves are far better: float32 registers
        assert np.abs(fn(x) / want - 1).max() < 2e-6


def law_pim_gpt_functions_at_the_ends():
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(exp_taylor([-inf, -200, 0, 200, inf, nan]), [0, 0, 1, inf, inf, nan])
    np.testing.assert_array_equal(
        reciprocal_newton([0, -0.0, inf, -inf, nan, 1e-40]), [inf, -inf, 0, 0, nan, inf]
    )
    np.testing.assert_array_equal(rsqrt_newton([0, -1, inf, nan, 1e-40]), [inf, nan, 0, nan, inf])
    assert np.abs(exp_taylor(88.5) / np.exp(88.5) - 1) < 1e-5
    assert softmax_asic(np.array([3.0])) == 1
    np.testing.assert_array_equal(softmax_asic(np.array([-inf, 2.0])), [0, 1])
    assert np.isnan(softmax_asic(np.full(3, -inf))).all()
    assert softmax_asic(np.zeros((0, 4))).shape == (0, 4)
    np.testing.assert_array_equal(softmax_asic(np.array([1e30, 1e30])), [0.5, 0.5])


def law_pim_gpt_fewer_terms_and_steps_are_worse():
    x = np.linspace(-2, 0, 301)
    errors = [np.abs(exp_taylor(x, order=n) / np.exp(x) - 1).max() for n in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]
    x = np.geomspace(0.5, 8, 301)
    for fn, want in ((reciprocal_newton, 1 / x), (rsqrt_newton, 1 / np.sqrt(x))):
        errors = [np.abs(fn(x, steps=n) / want - 1).max() for n in range(4)]
        assert errors[0] > errors[1] > errors[2] >= errors[3]


@FEW
@given(seeds, st.integers(1, 300), st.sampled_from((0.1, 3.0, 300.0)))
def law_pim_gpt_softmax_sums_to_one(seed, n, gain):
    """Sum, reciprocal and product are each rounded once, 2^-8: three of them are below 2^-6."""
    x = narrow(gain * np.random.default_rng(seed).standard_normal((2, n)))
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    want = e / e.sum(-1, keepdims=True)
    got = softmax_asic(x)
    assert (np.abs(got.sum(-1, dtype=np.float64) - 1) <= 2.0**-6).all()
    # an exponential stands above and, in the sum, below: five roundings, then float32; no subnormals
    assert (np.abs(got - want) <= want * (5 * HALF_ULP + 1e-4) + 2.0**-125).all()


@FEW
@given(seeds, st.integers(2, 200))
def law_pim_gpt_layernorm_is_near(seed, n):
    """Mean, variance, root and result each rounded: the mean's rounding moves all numbers alike."""
    rng = np.random.default_rng(seed)
    x, g, b = (narrow(rng.standard_normal(s)).astype(np.float64) for s in ((2, n), n, n))
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    want = (x - mean) / np.sqrt(var + 1e-5) * g + b
    got = layernorm_asic(x, g, b)
    moved = HALF_ULP * np.abs(mean)  # of the mean; it also adds its square to the variance
    share = 2 * HALF_ULP + moved**2 / (var + 1e-5) + 1e-5
    slack = np.abs(g) / np.sqrt(var + 1e-5) * (moved + share * np.abs(x - mean) * 1.1)
    assert (np.abs(got - want) <= slack + HALF_ULP * (np.abs(want) + slack) + 1e-6).all()


@given(st.floats(-30, 30, width=32))
def law_pim_gpt_gelu_is_near(x):
    """Half an ulp, and float32's errors of 1 - 1 / (...) times x."""
    x = float(narrow(x)[()])
    want = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    got = gelu_asic(np.array([x]))[0]
    assert abs(got - want) <= HALF_ULP * abs(want) + 8 * 2.0**-23 * abs(x) + 1e-38


def law_pim_gpt_narrow_registers_are_near_too():
    """bfloat16 after every operation: a sum of n numbers loses up to log2 n + 1 roundings, exp some more."""
    rng = np.random.default_rng(0)
    x = narrow(rng.standard_normal((3, 40)))
    one, zero = np.ones(40), np.zeros(40)
    assert np.abs(softmax_asic(x, acc="bf16") - softmax_asic(x)).max() < 0.05
    assert np.abs(layernorm_asic(x, one, zero, acc="bf16") - layernorm_asic(x, one, zero)).max() < 0.1
    assert np.abs(gelu_asic(x, acc="bf16") - gelu_asic(x)).max() < 0.1


@FEW
@given(st.integers(2, 60), st.integers(1, 4))
def law_pim_gpt_work_is_what_the_unit_counts(n, rows):
    x = np.random.default_rng(n).standard_normal((rows, n)).astype(np.float32)
    for kind, run in (
        ("softmax", lambda u: softmax_steps(u, x)),
        ("layernorm", lambda u: layernorm_steps(u, x, x[0], x[0], 1e-5)),
        ("gelu", lambda u: gelu_steps(u, x)),
        ("add", lambda u: u.add(x, x)),
        ("mul", lambda u: u.mul(x, x)),
    ):
        u = Unit()
        run(u)
        assert (u.adds, u.muls) == asic_work(kind, n, rows=rows)
        one = asic_cycles(kind, n, rows=rows, adders=1, multipliers=1)
        assert one == sum(asic_work(kind, n, rows=rows))
        assert asic_cycles(kind, n, rows=rows) <= asic_cycles(kind, n + 1, rows=rows + 1)
    assert set(ASIC_STEPS) == {"softmax", "layernorm", "gelu", "add", "mul"}


# The network


@settings(max_examples=5)
@given(seeds)
def law_pim_gpt_decode_is_the_model(seed):
    """Token by token against the whole text in float64. Roundings: of an embedding, two a layer of the sum,
    four of the last norm and one of the product, each half an ulp of what it rounds; branches are small here.
    """
    rng = np.random.default_rng(seed)
    p = init_gpt(rng, vocab=11, context=8, dim=16, depth=2, std=0.05)
    ids = rng.integers(0, 11, 5)
    cache, got = init_cache(p, 6, num_heads=2), []
    for token in ids:
        logits, cache = pim_gpt_decode(p, token, cache)
        got.append(logits)
    want = gpt_forward(ids, p, num_heads=2)
    hidden = gpt_blocks(gpt_embed(ids, p), p, num_heads=2)
    assert cache.length == 5
    reach = np.abs(p.wte).sum(-1) * 3  # a normed number is seldom beyond 3
    # a rounding of the residual is a share of its largest number, which the norm divides by its spread
    spread = (np.abs(hidden[-1]).max(-1) / hidden[-1].std(-1))[:, None]
    assert (np.abs(np.array(got) - want) <= (4 + 2 * 2 + 6) * HALF_ULP * spread * reach).all()


def law_pim_gpt_decode_sees_no_reservation():
    """What is reserved, and what lies there, changes nothing; stacked blocks are the same blocks."""
    rng = np.random.default_rng(1)
    p = init_gpt(rng, vocab=11, context=8, dim=16, depth=2, std=0.2)
    for acc in ("f32", "bf16"):
        small, large = init_cache(p, 3, num_heads=2), init_cache(p, 7, num_heads=2)
        large = PimCache(large.k + 5, large.v - 3, large.length)
        stacked = p._replace(blocks=type(p.blocks[0])(*(np.stack(a) for a in zip(*p.blocks, strict=True))))
        for token in (3, 3, 10):
            a, small = pim_gpt_decode(p, token, small, acc=acc)
            b, large = pim_gpt_decode(stacked, token, large, acc=acc)
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(small.k, large.k[:, :, :3])
    np.testing.assert_array_equal(round_bf16(small.v), small.v)


# Ticks


def law_pim_gpt_ticks_by_hand():
    """One output of one input: 1 broadcast, 12 to the column, 1, 1 drain, 5 and 12 to close, 8 for tRAS."""
    counted = {(1, 1): 40, (128, 1024): 158, (2304, 768): 1336, (768, 3072): 1884, (129, 17): 41}
    assert {mk: vmm_ticks(*mk).total for mk in counted} == counted
    assert vmm_ticks(1, 1) == (1, 29, 1, 1, 8, 40, 1, 1)
    assert tile_ticks(1, 64, 64, DramTiming()).total == 64 + 29 + 64 + 1


@given(sizes, sizes)
def law_pim_gpt_reads_every_weight_once(m, k):
    t = vmm_ticks(m, k)
    assert sum(t[:5]) == t.total
    lanes = t.columns * 16 * 128
    assert lanes >= m * k
    assert (lanes == m * k) == (k % 16 == 0 and m % 128 == 0)
    assert vmm_ticks(m, 1025).broadcast == 65  # a tile of one number: a whole column


@given(sizes, sizes, st.integers(1, 1100))
def law_pim_gpt_ticks_are_monotone(m, k, n):
    total = vmm_ticks(m, k).total
    shape = GptShape(2, 64 * 6, 6)
    for slower in (DramTiming(t_rcd=14), DramTiming(t_rp=20), DramTiming(t_rtp=9), DramTiming(t_burst=2)):
        assert vmm_ticks(m, k, slower).total >= total
        assert token_ticks(shape, n, slower) >= token_ticks(shape, n)
    assert vmm_ticks(m + 1, k).total >= total
    assert vmm_ticks(m, k + 1).total >= total
    assert vmm_ticks(m, k, DramTiming(channels=16)).total <= total
    assert token_ticks(shape, n + 1) >= token_ticks(shape, n)
    by_lanes = [vmm_ticks(m, k, DramTiming(lanes=w)).total for w in (1, 2, 4, 8, 16)]
    assert by_lanes == sorted(by_lanes, reverse=True)


def law_pim_gpt_ticks_of_the_models():
    """Microseconds of a token at context 512: weights, cache, both with refresh; weights in units of 2^20."""
    table = {
        "gpt2_small": (81, 65.4, 17.2, 88.6), "gpt2_medium": (288, 227.3, 37.8, 284.1),
        "gpt2_large": (675, 531.0, 80.7, 655.3), "gpt3_large": (648, 504.6, 56.3, 601.0),
        "gpt2_xl": (1406, 1119.0, 140.5, 1349.4), "gpt3_xl": (1152, 887.8, 72.6, 1029.0),
    }  # fmt: skip
    for name, (count, weights, cache, both) in table.items():
        s = GPTS[name]()
        vmm = s.layers * sum(vmm_ticks(m, k).total for m, k in s.products.values())
        kv = s.layers * sum(kv_ticks(512, s.d_model, s.heads))
        assert s.weights == 12 * s.layers * s.d_model**2
        assert s.weights // 2**20 == count
        assert (round(vmm / 1e3, 1), round(kv / 1e3, 1)) == (weights, cache)
        assert round(long_run(token_ticks(s, 512)) / 1e3, 1) == both
        assert vmm + kv == token_ticks(s, 512)


def law_pim_gpt_rows_stay_open():
    """98.4 % of the columns of every model's weights find their row open."""
    for make in GPTS.values():
        parts = [vmm_ticks(m, k) for m, k in make().products.values()]
        columns, rows = sum(p.columns for p in parts), sum(p.rows for p in parts)
        assert 0.9835 < 1 - rows / columns < 0.9845
