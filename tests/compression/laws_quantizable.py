"""Laws of clipped softmax and gated attention on ref alone: NumPy and Hypothesis."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense, split_heads
from ref.blocks.optim import tree_leaves, tree_map
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.transformer import init_block, transformer_block
from ref.compression.quantizable import (
    GatedAttentionParams,
    GateParams,
    OutlierFreeBlock,
    affine_params,
    attention_gate,
    attention_gate_vjp,
    block_forward,
    calibrate_ranges,
    clipped_softmax,
    clipped_softmax_vjp,
    fake_quantize,
    gamma_from_alpha,
    gate_macs,
    gated_self_attention,
    gated_self_attention_vjp,
    init_gate,
    outlier_free_attention,
    outlier_free_attention_vjp,
    outlier_metrics,
    quantize,
    w8a8_forward,
)
from ref.counting import Tally, count
from tests.slopes import along, drawn_like, moved, slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
gains = st.sampled_from((1.0, 30.0, 1e-3))  # ordinary, saturated, nearly flat rows
clips = st.sampled_from(((-0.03, 1.0), (-0.1, 1.1), (0.0, 1.2), (0.0, 1.0), (-1.0, 1.0)))
kinds = st.sampled_from(("linear", "mlp", "all_heads", "per_head", "unconditional"))


def rows(seed, gain, shape=(3, 7)):
    return gain * np.random.default_rng(seed).standard_normal(shape)


def definition(row, gamma, zeta, seen):
    """Clipped softmax of one row with exact sums, sharing no line with ref."""
    top = max((s for s, m in zip(row, seen, strict=True) if m), default=0.0)
    e = [math.exp(s - top) if m else 0.0 for s, m in zip(row, seen, strict=True)]
    total = math.fsum(e) or 1.0
    return np.array([min(1.0, max(0.0, (zeta - gamma) * x / total + gamma)) for x in e])


@given(seeds, gains, clips, st.booleans())
def law_quantizable_clipped_softmax_is_the_definition(seed, gain, clip, masked):
    """Any axis; a row that sees nothing is 0. p is off by its exponent's rounding and that of T terms."""
    s, (gamma, zeta) = rows(seed, gain), clip
    mask = np.random.default_rng(seed + 1).random(s.shape) < 0.6 if masked else None
    atol = EPS * (2 * np.abs(s).max() + 16) * (zeta - gamma)
    got = clipped_softmax(s, gamma=gamma, zeta=zeta, mask=mask)
    seen = np.ones(s.shape, bool) if mask is None else mask
    want = np.stack([definition(*r) for r in zip(s, [gamma] * 3, [zeta] * 3, seen, strict=True)])
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    assert not got[~seen].any()
    assert ((got >= 0) & (got <= 1)).all()
    turned = clipped_softmax(s.T, gamma=gamma, zeta=zeta, mask=None if mask is None else mask.T, axis=0)
    np.testing.assert_allclose(turned.T, got, rtol=0, atol=atol)  # sums in another order
    if clip == (0.0, 1.0):
        np.testing.assert_allclose(got, softmax(np.where(seen, s, -np.inf)), rtol=0, atol=0)


@given(seeds, gains, clips)
def law_quantizable_zeros_and_ones_are_exact_beyond_the_thresholds(seed, gain, clip):
    s, (gamma, zeta) = rows(seed, gain), clip
    got, p, slack = clipped_softmax(s, gamma=gamma, zeta=zeta), softmax(s), 8 * EPS
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    assert (got[p < low - slack] == 0).all()
    assert (got[p > low + slack] > 0).all()
    assert (got[p > high + slack] == 1).all()
    assert (got[p < high - slack] < 1).all()


@given(seeds, gains, clips)
def law_quantizable_row_sums(seed, gain, clip):
    """zeta - gamma + gamma T where nothing is clipped; zeros raise it, ones lower it; <= 1 if zeta = 1."""
    s, (gamma, zeta) = rows(seed, gain), clip
    got, stretched = clipped_softmax(s, gamma=gamma, zeta=zeta), (zeta - gamma) * softmax(s) + gamma
    want, slack = zeta - gamma + 7 * gamma, 64 * EPS
    for row, raw in zip(got, stretched, strict=True):
        below, above = (raw < 0).any(), (raw > 1).any()
        if not above:
            assert row.sum() >= want - slack
        if not below:
            assert row.sum() <= want + slack
        if zeta == 1:
            assert row.sum() <= 1 + slack


@given(seeds, clips, st.floats(-100, 100))
def law_quantizable_shift_and_order_do_not_matter(seed, clip, shift):
    s, (gamma, zeta) = rows(seed, 1.0), clip
    got = clipped_softmax(s, gamma=gamma, zeta=zeta)
    atol = 4 * EPS * (abs(shift) + 32)  # s + shift is rounded
    np.testing.assert_allclose(clipped_softmax(s + shift, gamma=gamma, zeta=zeta), got, rtol=0, atol=atol)
    order = np.random.default_rng(seed).permutation(7)
    moved = clipped_softmax(s[:, order], gamma=gamma, zeta=zeta)
    np.testing.assert_allclose(moved, got[:, order], rtol=0, atol=atol)


@given(seeds, clips, st.booleans())
def law_quantizable_clipped_gradient_is_a_central_difference(seed, clip, masked):
    """At rows that stay 1e-4 away from the clip's corners; h = 1e-6, so the error is near 1e-9."""
    s, (gamma, zeta) = rows(seed, 1.0), clip
    rng = np.random.default_rng(seed + 1)
    mask = rng.random(s.shape) < 0.7 if masked else None
    g, d, h = rng.standard_normal(s.shape), rng.standard_normal(s.shape), 1e-6
    raw = (zeta - gamma) * softmax(s if mask is None else np.where(mask, s, -np.inf)) + gamma
    far = (np.minimum(np.abs(raw), np.abs(raw - 1)) > 1e-4) | (raw == gamma)
    g = np.where(far.all(axis=1, keepdims=True), g, 0.0)
    at = lambda t: np.sum(g * clipped_softmax(s + t * d, gamma=gamma, zeta=zeta, mask=mask))
    got = np.sum(d * clipped_softmax_vjp(s, g, gamma=gamma, zeta=zeta, mask=mask))
    np.testing.assert_allclose(got, (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-7)


@given(seeds)
def law_quantizable_a_row_clipped_everywhere_has_no_gradient(seed):
    s = rows(seed, 1e-3)
    for gamma in (-0.5, gamma_from_alpha(7 / 6 + 0.05, 7)):  # alpha >= T / (T - 1) zeroes a uniform row
        assert not clipped_softmax(s, gamma=gamma).any()
        assert not clipped_softmax_vjp(s, s, gamma=gamma, zeta=1.0).any()
    peak = np.eye(7) * 50
    assert (clipped_softmax(peak, gamma=-0.1, zeta=1.1) == np.eye(7)).all()
    assert not clipped_softmax_vjp(peak, peak, gamma=-0.1, zeta=1.1).any()


def law_quantizable_huge_scores_stay_finite():
    s = rows(0, 1e4)
    assert np.isfinite(clipped_softmax(s)).all()
    assert np.isfinite(clipped_softmax_vjp(s, s, gamma=-0.03, zeta=1.0)).all()
    gate = GateParams(1e4 * np.ones((2, 3)), np.zeros(2))
    assert np.isfinite(attention_gate(rows(1, 1e4, (1, 2, 4, 3)), gate)).all()


def gate_by_hand(x, g, kind):
    """The gate number by number; x [B, H, N, d]."""
    B, H, N, _ = x.shape
    logit = np.zeros((B, H, N))
    for b, h, n in np.ndindex(B, H, N):
        if kind == "mlp":
            a = [max(0.0, math.fsum(g.w[h, u] * x[b, h, n]) + g.b[h, u]) for u in range(g.w.shape[1])]
            logit[b, h, n] = math.fsum(g.w_out[h] * a) + g.b_out[h]
        elif kind == "all_heads":
            logit[b, h, n] = math.fsum(g.w[h] * x[b, :, n].ravel()) + g.b[h]
        elif kind == "unconditional":
            logit[b, h, n] = g.b[h]
        else:
            logit[b, h, n] = math.fsum(g.w[h] * x[b, h, n]) + g.b[h]
    if kind == "per_head":
        logit = np.broadcast_to(logit.mean(axis=2, keepdims=True), logit.shape)
    return (1 / (1 + np.exp(-logit)))[..., None]


def random_gate(rng, kind, H=2, d=3):
    """A gate whose biases are not at their start."""
    return tree_map(lambda p: p + rng.standard_normal(p.shape), init_gate(rng, H, d, kind=kind, hidden=2))


@given(seeds, kinds)
def law_quantizable_gate_is_the_definition(seed, kind):
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((2, 2, 4, 3)), random_gate(rng, kind)
    got = attention_gate(x, g, kind=kind)
    assert got.shape == {"per_head": (2, 2, 1, 1), "unconditional": (1, 2, 1, 1)}.get(kind, (2, 2, 4, 1))
    # the slope of a sigmoid is at most 1/4; sums of up to 12 terms of size 10
    full = np.broadcast_to(got, (2, 2, 4, 1))
    np.testing.assert_allclose(full, gate_by_hand(x, g, kind), rtol=0, atol=256 * EPS)
    assert ((got > 0) & (got < 1)).all()


def slope(f, tree, rng):
    """(direction, slope of f along it, its own error measured by doubling the step)."""
    d = drawn_like(tree, rng)
    fine, change = slope_of(lambda h: f(moved(tree, d, h)))
    return d, fine, 2 * change + 1e-9


@given(seeds, kinds)
def law_quantizable_gate_gradient_is_a_central_difference(seed, kind):
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((2, 2, 4, 3)), random_gate(rng, kind)
    do = rng.standard_normal(attention_gate(x, g, kind=kind).shape)
    dx, dg = attention_gate_vjp(x, g, do, kind=kind)
    d, want, atol = slope(lambda t: np.sum(do * attention_gate(t[0], t[1], kind=kind)), (x, g), rng)
    np.testing.assert_allclose(along((dx, dg), d), want, rtol=0, atol=atol)


@given(seeds, st.sampled_from((None, -0.05)), st.booleans(), st.booleans())
def law_quantizable_attention_is_probabilities_times_gate(seed, gamma, gated, masked):
    """Values by the definition, gradients by central differences; what no query sees may hold NaN."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 2, 2, 5, 3))
    gate = rng.random((2, 1, 1)) if gated else None  # one number a head, broadcast
    mask = np.ones((2, 1, 1, 5), bool) & (np.arange(5) < 4) if masked else None
    options = {"gamma": gamma, "mask": mask, "scale": 0.6}
    o, p = outlier_free_attention(q, k, v, gate=gate, **options)
    for b, h, i in np.ndindex(2, 2, 5):
        seen = np.ones(5, bool) if mask is None else mask[b, 0, 0]
        row = definition(0.6 * k[b, h] @ q[b, h, i], gamma or 0.0, 1.0, seen)
        np.testing.assert_allclose(p[b, h, i], row, rtol=0, atol=256 * EPS)
        want = (gate[h, 0, 0] if gated else 1.0) * row @ v[b, h]
        np.testing.assert_allclose(o[b, h, i], want, rtol=0, atol=2048 * EPS)
    do = rng.standard_normal(o.shape)
    grads = outlier_free_attention_vjp(q, k, v, do, gate=gate, **options)
    plain = outlier_free_attention(q, k, v, **{**options, "gamma": None})[1]
    if gamma is None or np.abs((1 - gamma) * plain[plain > 0] + gamma).min() > 1e-4:  # off the clip's corners
        args = (q, k, v) if gate is None else (q, k, v, gate)
        f = lambda t: np.sum(do * outlier_free_attention(*t[:3], gate=t[3] if gated else None, **options)[0])
        d, want, atol = slope(f, args, rng)
        np.testing.assert_allclose(along(grads[: len(args)], d), want, rtol=0, atol=atol)
    if masked:
        k2, v2 = k.copy(), v.copy()
        k2[:, :, 4], v2[:, :, 4] = np.nan, np.nan
        again = outlier_free_attention(q, k2, v2, gate=gate, **options)[0]
        np.testing.assert_array_equal(again, o)
        for a, b in zip(outlier_free_attention_vjp(q, k2, v2, do, gate=gate, **options), grads, strict=True):
            assert a is b is None or (a == b).all()


@given(seeds)
def law_quantizable_gates_open_close_and_shrink(seed):
    """Logits of +-inf are plain attention and nothing; no gate lengthens a head's output."""
    rng = np.random.default_rng(seed)
    q, k, v, x = rng.standard_normal((4, 2, 2, 5, 3))
    plain, _ = outlier_free_attention(q, k, v)
    np.testing.assert_allclose(plain, attention_dense(q, k, v), rtol=0, atol=512 * EPS)
    at = lambda b: attention_gate(x, GateParams(None, np.full(2, b)), kind="unconditional")
    for logit, factor in ((np.inf, 1.0), (-np.inf, 0.0), (0.0, 0.5)):
        np.testing.assert_array_equal(outlier_free_attention(q, k, v, gate=at(logit))[0], factor * plain)
    gate = attention_gate(x, random_gate(rng, "linear"))
    gated, _ = outlier_free_attention(q, k, v, gate=gate)
    assert (np.linalg.norm(gated, axis=-1) <= np.linalg.norm(plain, axis=-1)).all()


@settings(max_examples=6)
@given(seeds, kinds, st.sampled_from((None, -0.02)))
def law_quantizable_layer_gradients_are_central_differences(seed, kind, gamma):
    rng = np.random.default_rng(seed)
    maps = [rng.standard_normal(s) / 2 for s in ((6, 6), 6) * 3]
    x, params = rng.standard_normal((2, 4, 6)), GatedAttentionParams(*maps, random_gate(rng, kind))
    options = {"num_heads": 2, "kind": kind, "gamma": gamma, "mask": np.tri(4, dtype=bool)}
    do = rng.standard_normal((2, 4, 6))
    _, probs, _ = gated_self_attention(x, params, **{**options, "gamma": None})
    if gamma is not None and np.abs((1 - gamma) * probs[probs > 0] + gamma).min() < 1e-4:
        return  # too near a corner of the clip
    dx, dparams = gated_self_attention_vjp(x, params, do, **options)
    f = lambda t: np.sum(do * gated_self_attention(t[0], t[1], **options)[0])
    d, want, atol = slope(f, (x, params), rng)
    np.testing.assert_allclose(along((dx, dparams), d), want, rtol=0, atol=atol)


@given(kinds, st.floats(0.01, 0.99))
def law_quantizable_gates_start_at_pi(kind, pi):
    g = init_gate(np.random.default_rng(0), 3, 8, kind=kind, pi_init=pi)
    start = attention_gate(np.zeros((1, 3, 2, 8)), g, kind=kind)
    np.testing.assert_allclose(start, 0.5 if kind == "unconditional" else pi, rtol=16 * EPS)
    small = init_gate(np.random.default_rng(0), 3, 8, kind=kind, pi_init=pi, std=0.01)
    for p in (small.w, small.w_out):
        assert p is None or np.abs(p).max() < 0.06


@given(kinds)
def law_quantizable_gate_macs_are_its_parameters(kind):
    """One multiply-accumulate a parameter and token; products counted, biases one each."""
    H, d, N = 3, 8, 5
    g = init_gate(np.random.default_rng(0), H, d, kind=kind)
    sizes = sum(p.size for p in tree_leaves(g))
    assert gate_macs(N, H, d, kind=kind) == (0 if kind == "unconditional" else N * sizes)
    tally = Tally()
    attention_gate(count(tally, np.ones((1, H, N, d))), g, kind=kind)
    biases = {"unconditional": 0, "mlp": H * (d // 4) + H}.get(kind, H)
    assert tally.macs == gate_macs(N, H, d, kind=kind) - N * biases


@given(seeds, st.floats(-50, 50), st.floats(0.1, 50))
def law_quantizable_kurtosis(seed, shift, scale):
    """By its definition; blind to shift and scale; a balanced pair of values has ((n - 1) / n)^2."""
    x = np.random.default_rng(seed).standard_normal((3, 4, 5))
    m = outlier_metrics(x)
    assert [n.shape for n in outlier_metrics(x[:0])] == [(0,), (0,)]
    for s in range(3):
        flat = x[s].ravel()
        want = np.mean((flat - flat.mean()) ** 4) / (flat.std(ddof=1) ** 4 + 1e-6)
        np.testing.assert_allclose(m.kurtosis[s], want, rtol=64 * EPS)
        assert m.inf_norm[s] == max(abs(v) for v in flat)
    other = outlier_metrics(scale * x + shift)
    # std^4 is at least 1e-2 here, times scale^4 >= 1e-4: 1e-6 beside it weighs up to 1e-6 / (scale^4 std^4)
    std4 = x.reshape(3, -1).std(axis=1, ddof=1) ** 4
    rtol = 1e-6 / (std4 * min(1.0, scale**4)) + 1e-11 * (1 + abs(shift) / scale)
    assert (np.abs(other.kurtosis - m.kurtosis) <= rtol * m.kurtosis).all()
    pair = outlier_metrics(np.array([[3.0, -3.0] * 5])).kurtosis[0]
    np.testing.assert_allclose(pair, 0.81, rtol=1e-6)
    spike = outlier_metrics(100 * np.eye(1, 20)).kurtosis[0]  # n numbers, all but one 0
    np.testing.assert_allclose(spike, 20 * ((19 / 20) ** 4 + 19 / 20**4), rtol=1e-6)


@given(seeds, st.sampled_from((2, 4, 8)))
def law_quantizable_quantiser(seed, bits):
    """Idempotent, zero exact, monotone, and within half a step inside the range."""
    x = np.sort(3 * np.random.default_rng(seed).standard_normal(40))
    scale, zero = affine_params(x[0], x[-1], bits=bits, eps=1e-8)
    options = {"qmin": 0, "qmax": 2**bits - 1}
    once = fake_quantize(x, scale, zero, **options)
    # the zero point is rounded too: the ends of the range may be half a step outside the grid
    assert (np.abs(once - x) <= scale * (1 + 1e-9)).all()
    inner = (x >= scale * (0.0 - zero)) & (x <= scale * (2**bits - 1.0 - zero))
    assert (np.abs(once - x)[inner] <= scale / 2 * (1 + 1e-9)).all()
    np.testing.assert_array_equal(quantize(once, scale, zero, **options), quantize(x, scale, zero, **options))
    assert (np.diff(once) >= 0).all()
    assert fake_quantize(np.zeros(1), scale, zero, **options)[0] == 0


def small_block(seed, kind=None):
    rng = np.random.default_rng(seed)
    gate = None if kind is None else init_gate(rng, 2, 4, kind=kind)
    return OutlierFreeBlock(init_block(rng, 8, 12, std=0.3), gate), rng.standard_normal((3, 2, 5, 8))


@given(seeds)
def law_quantizable_block_is_the_transformer_block(seed):
    params, (x, *_) = small_block(seed)
    got = block_forward(params, x, num_heads=2)
    np.testing.assert_allclose(got, transformer_block(x, params.block, num_heads=2), rtol=0, atol=1e-12)
    clip = {"gamma": -0.1, "zeta": 1.1}
    attend = lambda q, k, v, mask, causal: outlier_free_attention(q, k, v, **clip)[0]
    want = transformer_block(x, params.block, num_heads=2, attention=attend)
    np.testing.assert_allclose(block_forward(params, x, num_heads=2, **clip), want, rtol=0, atol=1e-12)
    params, (x, *_) = small_block(seed, "linear")
    gated = lambda q, k, v, mask, causal: outlier_free_attention(q, k, v, gate=gate)[0]
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)  # the norm's output
    gate = attention_gate(split_heads(h, 2), params.gate)
    want = transformer_block(x, params.block, num_heads=2, attention=gated)
    np.testing.assert_allclose(block_forward(params, x, num_heads=2), want, rtol=0, atol=1e-12)


@settings(max_examples=5)
@given(seeds, st.sampled_from((None, "linear", "mlp")))
def law_quantizable_more_bits_less_error(seed, kind):
    """Every two bits quarter the steps: from 4 to 8 to 16 bits the error falls by far more than 4."""
    params, batches = small_block(seed, kind)
    options = {"num_heads": 2, "kind": kind or "linear", "gamma": -0.05}
    ranges = calibrate_ranges(params, [batches[0]], **options)
    x, error = batches[0], []
    for bits in (4, 8, 16):
        y = w8a8_forward(params, x, ranges, bits=bits, **options)
        error.append(np.abs(y - block_forward(params, x, **options)).max())
    assert error[1] < error[0] / 4
    assert error[2] < error[1] / 64
    assert len(ranges) == (15 if kind is None else 17)  # every activation, and the gate and what it scales
    steps = {r.step.item() for r in calibrate_ranges(params, batches, **options).values()}
    assert steps == {3}
    lo, hi = batches.min(axis=(1, 2, 3)), batches.max(axis=(1, 2, 3))
    r = calibrate_ranges(params, batches, **options)["input"]
    ema = lambda e: 0.9 * (0.9 * e[0] + 0.1 * e[1]) + 0.1 * e[2]
    np.testing.assert_allclose([r.lo, r.hi], [ema(lo), ema(hi)], rtol=8 * EPS)


def law_quantizable_one_outlier_spoils_eight_bits():
    """One channel 200 times as large at the input of the same block: the others lose most of their digits."""
    params, (x, *_) = small_block(0)
    planted = x.copy()
    planted[..., 0] *= 200
    errors = []
    for batch in (x, planted):
        ranges = calibrate_ranges(params, [batch], num_heads=2)
        y, exact = w8a8_forward(params, batch, ranges, num_heads=2), block_forward(params, batch, num_heads=2)
        errors.append(np.abs(y - exact)[..., 1:].mean())
    assert errors[1] > 20 * errors[0]
    assert outlier_metrics(planted).kurtosis.min() > 2 * outlier_metrics(x).kurtosis.max()


def law_quantizable_clipping_and_gates_stop_the_growth_of_logits():
    """A head that should give 0, with a sink whose value is 0 and seven others: 2,000 steps of descent.

    Vanilla: the gap of the sink's logit grows for ever, like log(steps) / 2. Clipped: it stops at
    log(1 / r - (T - 1)), r = -gamma / (zeta - gamma), where the output is 0. Gated: the gate closes instead.
    """
    T, gamma = 8, gamma_from_alpha(0.5, 8)
    values = np.r_[0.0, np.ones(T - 1)]

    def train(kind):
        gap, logit, gaps = 0.0, 0.0, []
        for _ in range(2000):
            s = np.r_[gap, np.zeros(T - 1)]
            p = clipped_softmax(s, gamma=gamma) if kind == "clipped" else softmax(s)
            gate = 1 / (1 + np.exp(-logit)) if kind == "gated" else 1.0
            o = gate * (p @ values)  # the loss is o^2 / 2
            dp = gate * o * values
            if kind == "clipped":
                gap -= clipped_softmax_vjp(s, dp, gamma=gamma, zeta=1.0)[0]
            else:
                gap -= softmax_vjp(p, dp)[0]
            if kind == "gated":
                logit -= o * (p @ values) * gate * (1 - gate)
            gaps.append(gap)
        return np.array(gaps), o

    (vanilla, _), (clipped, nothing), (gated, _) = map(train, ("vanilla", "clipped", "gated"))
    r = -gamma / (1 - gamma)
    limit = np.log(1 / r - (T - 1))
    assert abs(clipped[-1] - limit) < 1e-6
    assert clipped[-1] == clipped[1000]
    assert nothing < 1e-9
    np.testing.assert_allclose(vanilla[1999] - vanilla[999], np.log(2) / 2, rtol=0.1)
    assert gated[-1] < 1 < clipped[-1] < vanilla[-1]
    s = np.r_[limit + 1e-9, np.zeros(T - 1)]
    assert (clipped_softmax(s, gamma=gamma)[1:] == 0).all()
