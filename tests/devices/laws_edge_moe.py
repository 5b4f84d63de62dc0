"""Laws of Edge-MoE on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ref.blocks.fixed_ops import S
from ref.blocks.mlp import gelu, mlp
from ref.blocks.norms import layer_norm
from ref.blocks.optim import tree_leaves, tree_map
from ref.devices.edge_moe import (
    BIAS,
    FM,
    WEIGHT,
    M3ViTConfig,
    MoEParams,
    build_expert_queues,
    edge_moe_cycles,
    gelu_delta,
    gelu_fixed,
    gelu_table,
    init_m3vit,
    layer_norm_fixed,
    linear_fixed,
    load_trace,
    m3vit_formats,
    m3vit_forward,
    m3vit_forward_fixed,
    m3vit_macs,
    m3vit_to_fixed,
    moe_ffn,
    moe_fixed,
    moe_gate,
    moe_gate_backward,
    moe_traffic,
    online_softmax,
    reordered_attention,
    reordered_attention_fixed,
    unified_linear,
)

EPS = np.finfo(np.float64).eps
FEW = settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)
EVEN = [17] * 2 + [16] * 14
SMALL = M3ViTConfig(height=8, width=12, patch=4, dim=16, depth=2, num_heads=2, hidden=32, num_experts=4,
                    expert_hidden=16)  # fmt: skip


def experts(rng, E=5, D=16, F=8):
    w1, w2 = rng.standard_normal((E, F, D)) / 4, rng.standard_normal((E, D, F)) / 3
    return w1, rng.standard_normal((E, F)) / 9, w2, rng.standard_normal((E, D)) / 9


# Attention and softmax


@FEW
@given(seeds, st.integers(2, 12), st.data(), st.sampled_from((0.1, 1.0, 30.0)))
def law_edge_moe_attention_in_another_order_is_attention(seed, n, data, gain):
    lanes = data.draw(st.integers(1, n - 1))
    q, k, v = np.random.default_rng(seed).standard_normal((3, 2, n, 8))
    logits = gain * q @ k.swapaxes(-1, -2)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = p / p.sum(-1, keepdims=True) @ v
    got = reordered_attention(q, k, v, scale=gain, lanes=lanes)
    # an error of eps |logit| in an exponent scales a probability by as much
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS * n * (1 + np.abs(logits).max()) * 4)


@FEW
@given(seeds, st.integers(1, 12), st.data())
def law_edge_moe_one_pass_equals_two(seed, n, data):
    logits = 5 * np.random.default_rng(seed).standard_normal((3, n))
    p, m, l = online_softmax(logits, start=data.draw(st.integers(0, n - 1)))
    np.testing.assert_array_equal(m, logits.max(-1))
    np.testing.assert_allclose(l, np.exp(logits - m[:, None]).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)


@given(st.integers(2, 140), st.data())
def law_edge_moe_one_key_and_at_most_one_query_a_step(n, data):
    lanes = data.draw(st.integers(1, min(n - 1, 32)))
    ours, naive = load_trace(n, lanes), load_trace(n, lanes, order="naive")
    assert (ours.keys == 1).all()
    assert ours.queries.max() == 1
    assert ours.queries.sum() == naive.queries.sum() == n
    assert naive.queries.max() == lanes
    assert 0 <= len(ours.keys) - len(naive.keys) < lanes


def law_edge_moe_keys_of_the_paper():
    """129 tokens, 4 lanes: 4,257 key loads instead of 16,641."""
    assert len(load_trace(129, 4).keys) == 4257
    assert len(load_trace(129, 1).keys) == 16_641


# GELU


@given(st.floats(-8, 8), st.sampled_from((1 / 8, 1 / 32, 1 / 64)))
def law_edge_moe_table_is_near(x, step):
    """Interpolation errs by step^2 / 8 times the curvature, below 0.8; past 5.5 by delta(5.5) < 1e-6."""
    assert abs(gelu_delta(np.array(x), step=step) - gelu(np.array(x))) <= step**2 / 8 * 0.8 + 1e-6
    assert abs(gelu_delta(np.array(x)) - gelu_delta(np.array(-x)) - x) <= 8 * EPS


def law_edge_moe_table_of_the_hardware():
    """177 entries, an error of at most 1e-4, and the odd part exact in integers."""
    table = gelu_table()
    assert table.shape == (177,)
    assert table.min() >= 0
    assert table.max() / S < 0.17 + 1e-3
    x = np.arange(-8 * S, 8 * S, 4999)
    y = gelu_fixed(x)
    assert np.abs(y / S - gelu(x / S)).max() <= 1e-4
    np.testing.assert_array_equal(y - gelu_fixed(-x), x)
    ends = np.array([FM.least, FM.most, 0, int(5.5 * S), int(5.5 * S) - 1, -int(5.5 * S)])
    np.testing.assert_array_equal(gelu_fixed(ends)[:4], [0, FM.most, 0, int(5.5 * S)])
    assert np.abs(gelu_fixed(ends)[4:] - np.maximum(ends[4:], 0)).max() <= 4


# The gate


@FEW
@given(seeds, st.integers(1, 6), st.data(), st.sampled_from((1e-3, 1.0, 300.0)))
def law_edge_moe_gate_keeps_the_largest(seed, E, data, gain):
    k = data.draw(st.integers(1, E))
    rng = np.random.default_rng(seed)
    x, w = gain * rng.standard_normal((2, 7, 4)), rng.standard_normal((E, 4))
    g = moe_gate(x, w, top_k=k)
    assert (np.diff(g.scores, axis=-1) <= 0).all()
    assert (g.scores.sum(-1) <= 1 + 4 * EPS).all()
    assert g.aux_loss == 0
    np.testing.assert_allclose(g.scores, -np.sort(-g.probs, axis=-1)[..., :k], rtol=0, atol=0)
    assert np.array_equal(np.take_along_axis(g.probs, g.indices, -1), g.scores)


def law_edge_moe_equal_logits_choose_the_lower_expert():
    g = moe_gate(np.zeros((2, 3)), np.ones((4, 3)), top_k=2)
    np.testing.assert_array_equal(g.indices, [[0, 1], [0, 1]])
    assert moe_gate(np.zeros((0, 3)), np.ones((4, 3))).indices.shape == (0, 2)


def law_edge_moe_even_work_costs_nothing():
    """Five tokens that are each other's rotations."""
    w = np.eye(5)
    x = np.stack([np.roll([3.0, 1.0, 0.5, 0.2, 0.1], i) for i in range(5)])
    assert abs(moe_gate(x, w, top_k=2, train=True).aux_loss) < 1e-15
    assert moe_gate(np.ones((5, 5)), w, top_k=2, train=True).aux_loss > 1


@settings(max_examples=6)
@given(seeds, st.booleans(), st.booleans(), st.sampled_from((1, 2, 4)))
def law_edge_moe_gate_gradient_is_the_slope(seed, train, as_released, k):
    rng = np.random.default_rng(seed)
    x, w, noise = rng.standard_normal((6, 3)), rng.standard_normal((4, 3)), rng.standard_normal((6, 4))
    options = {"top_k": k, "train": train, "noise": noise if train else None, "as_released": as_released}
    dscores, daux = rng.standard_normal((6, k)), 0.7
    dx, dw = moe_gate_backward(dscores, daux, x, w, **options)
    ux, uw = rng.standard_normal(x.shape), rng.standard_normal(w.shape)
    chosen = moe_gate(x, w, **options).indices

    def at(h):
        g = moe_gate(x + h * ux, w + h * uw, **options)
        return None if (g.indices != chosen).any() else (dscores * g.scores).sum() + daux * g.aux_loss

    slopes = []
    for h in (1e-4, 5e-5):
        assume(at(h) is not None and at(-h) is not None)  # the choice stays within the step
        slopes.append((at(h) - at(-h)) / (2 * h))
    best, error = (4 * slopes[1] - slopes[0]) / 3, abs(slopes[1] - slopes[0])
    got = (dx * ux).sum() + (dw * uw).sum()
    assume(error < 1e-3 * (1 + abs(best)))  # and so do the comparisons with the thresholds
    assert abs(got - best) <= error + 1e-8 * (1 + abs(best))


# Queues and experts


@FEW
@given(seeds, st.integers(1, 9), st.integers(1, 5), st.data())
def law_edge_moe_orders_agree_and_tokens_move_freely(seed, n, E, data):
    k = data.draw(st.integers(1, E))
    rng = np.random.default_rng(seed)
    w = experts(rng, E)
    x = rng.standard_normal((n, 16))
    indices = np.argsort(rng.random((n, E)), axis=-1)[:, :k]
    scores = rng.random((n, k))
    want = moe_ffn(x, indices, scores, *w, order="token")
    np.testing.assert_allclose(moe_ffn(x, indices, scores, *w), want, rtol=1e-12, atol=1e-13)
    move = rng.permutation(n)
    np.testing.assert_allclose(
        moe_ffn(x[move], indices[move], scores[move], *w), want[move], rtol=1e-12, atol=1e-13
    )
    queue, held, lengths, active = build_expert_queues(indices, scores, num_experts=E)
    assert lengths.sum() == n * k
    assert set(active) == set(indices.ravel())
    assert (np.bincount(queue[queue >= 0], minlength=n) == k).all()
    assert ((queue >= 0).sum(1) == lengths).all()
    assert held[queue < 0].sum() == 0
    cfg = M3ViTConfig(num_experts=E, dim=16, expert_hidden=8)
    by_expert, by_token = (moe_traffic(indices, cfg, order=o) for o in ("expert", "token"))
    assert by_expert == len(active) * 2 * 16 * 8 * 2 <= by_token


def law_edge_moe_all_tokens_at_one_expert():
    """The case that would hang the released queue: every token chooses the same expert."""
    rng = np.random.default_rng(0)
    w, x = experts(rng), rng.standard_normal((7, 16))
    y = moe_ffn(x, np.full((7, 1), 3), np.ones((7, 1)), *w)
    np.testing.assert_allclose(y, mlp(x, w[0][3].T, w[1][3], w[2][3].T, w[3][3]), rtol=1e-12, atol=1e-13)


def law_edge_moe_traffic_of_the_paper():
    """129 tokens, two experts each of 16: at most 4.7 MB a layer against 76 MB."""
    cfg = M3ViTConfig()
    worst = np.stack([np.arange(129) % 16, (np.arange(129) + 8) % 16], axis=1)
    assert moe_traffic(worst, cfg, order="expert") == 16 * 294_912
    assert moe_traffic(worst, cfg, order="token") == 258 * 294_912


@FEW
@given(seeds)
def law_edge_moe_one_unit_has_four_flags(seed):
    rng = np.random.default_rng(seed)
    x, w, b = rng.standard_normal((6, 4)), rng.standard_normal((3, 4)), rng.standard_normal(3)
    plain = x @ w.T + b
    np.testing.assert_allclose(unified_linear(x, w, b), plain, rtol=1e-13, atol=1e-13)
    rows, s, into = np.array([4, -1, 0, 4]), rng.random(4), rng.standard_normal((6, 3))
    picked = unified_linear(x, w, b, gelu=True, queue=rows, scores=s)
    kept = rows[rows >= 0]
    want = np.where(rows[:, None] < 0, 0.0, gelu(plain[rows]) * s[:, None])
    np.testing.assert_allclose(picked, want, rtol=1e-13, atol=1e-13)
    total = unified_linear(x, w, b, queue=rows, scores=s, accumulate_into=into)
    want = into.copy()
    np.add.at(want, kept, (plain[rows] * s[:, None])[rows >= 0])
    np.testing.assert_allclose(total, want, rtol=1e-13, atol=1e-13)


# The network


def law_edge_moe_an_expert_that_is_not_chosen_changes_nothing():
    """Gates of two tasks with disjoint experts: the weights of one task's leave the other alone."""
    rng = np.random.default_rng(1)
    p = init_m3vit(rng, SMALL, std=0.3)
    img = rng.random((8, 12, 3))
    m = p.moe[1]
    w_gate = np.zeros_like(m.w_gate)
    first = m3vit_forward(img, p, task=0, cfg=SMALL)
    assert first.shape == (7, 16)
    assert np.abs(first - m3vit_forward(img, p, task=1, cfg=SMALL)).max() > 1e-3
    p = p._replace(moe=(None, m._replace(w_gate=w_gate)))  # equal logits: experts 0 and 1
    before = m3vit_forward(img, p, task=0, cfg=SMALL)
    w1 = m.w1.copy()
    w1[2:] += rng.standard_normal(w1[2:].shape)
    after = m3vit_forward(img, p._replace(moe=(None, p.moe[1]._replace(w1=w1))), task=0, cfg=SMALL)
    np.testing.assert_array_equal(before, after)
    w1[1] += rng.standard_normal(w1[1].shape)
    assert np.abs(m3vit_forward(img, p._replace(moe=(None, p.moe[1]._replace(w1=w1))), task=0, cfg=SMALL)
                  - before).max() > 1e-3  # fmt: skip


def law_edge_moe_products_and_cycles_of_the_network():
    """0.78 G multiply-accumulates; MLPs of expert layers do an eighth of running all 16."""
    cfg = M3ViTConfig()
    macs, dense = m3vit_macs(cfg), m3vit_macs(cfg, experts=16)
    assert cfg.tokens == 129
    assert 0.78e9 < sum(macs.values()) < 0.79e9
    assert macs["experts"] * 8 == dense["experts"]
    cycles = edge_moe_cycles(cfg, EVEN)
    assert cycles["layer 0"] == cycles["layer 1"] == 4 * 18_576 + 2 * 102_168 + 148_608
    assert cycles["patches"] == 128 * 48 * 12
    one = [258 if e == 3 else 0 for e in range(16)]
    assert edge_moe_cycles(cfg, one) == cycles  # products limit either way


# Fixed point against real numbers


@FEW
@given(seeds, st.sampled_from((1, 3, 4)))
def law_edge_moe_fixed_attention_is_near(seed, lanes):
    """Unit-scale data: within 1e-5 where each of some 20 floors loses up to 2^-22."""
    q, k, v = (FM.quantise(x) for x in np.random.default_rng(seed).standard_normal((3, 2, 9, 16)))
    out, m, recip = reordered_attention_fixed(q, k, v, scale=0.25, lanes=lanes)
    want = reordered_attention(*(FM.value(x) for x in (q, k, v)), scale=0.25, lanes=lanes)
    assert np.abs(FM.value(out) - want).max() < 1e-5
    assert (m < S * 16).all()
    assert ((0 < recip) & (recip <= S)).all()


@FEW
@given(seeds)
def law_edge_moe_fixed_norm_and_layers_are_near(seed):
    rng = np.random.default_rng(seed)
    x = FM.quantise(rng.standard_normal((5, 16)))
    gain, bias = BIAS.quantise(1 + rng.standard_normal(16) / 8), BIAS.quantise(rng.standard_normal(16) / 8)
    got = FM.value(layer_norm_fixed(x, gain, bias))
    want = layer_norm(FM.value(x), BIAS.value(gain), BIAS.value(bias), eps=1e-6)
    # 2 floors for each of 16 squares, 2^-17 of a variance, halved by the root: a share of y, which is below 4
    assert (np.abs(got - want).max(1) < 2e-5 * np.maximum(1, 1 / FM.value(x).var(1))).all()
    w = WEIGHT.quantise(rng.standard_normal((8, 16)) / 4)
    exact = FM.value(x) @ WEIGHT.value(w).T + BIAS.value(bias[:8])
    low = exact - FM.value(linear_fixed(x, w, bias[:8]))
    assert (low > -16 * EPS * 8).all()
    assert (low < 16 * 2.0**-22).all()


@FEW
@given(seeds)
def law_edge_moe_fixed_experts_are_near(seed):
    rng = np.random.default_rng(seed)
    w1, b1, w2, b2 = experts(rng)
    w_gate = rng.standard_normal((5, 16)) / 4
    forms = (WEIGHT, WEIGHT, BIAS, WEIGHT, BIAS)
    raw = MoEParams(*(f.quantise(a) for f, a in zip(forms, (w_gate, w1, b1, w2, b2), strict=True)))
    real = [f.value(a) for f, a in zip(forms, raw, strict=True)]
    x = FM.quantise(rng.standard_normal((7, 16)))
    y, queue, held, lengths = moe_fixed(x, raw)
    g = moe_gate(FM.value(x), real[0])
    logits = FM.value(x) @ real[0].T
    top = -np.sort(-logits, axis=-1)
    assert held.max() <= S
    assert (queue >= 0).sum() == lengths.sum() == 14
    assume((top[:, 1] - top[:, 2]).min() > 1e-4)  # no choice so close that floors may decide it
    want = moe_ffn(FM.value(x), g.indices, g.scores, *real[1:])
    # a table within 1e-4, through weights near 1, of experts whose scores sum to less than 1
    assert np.abs(FM.value(y) - want).max() < 2e-4


@settings(max_examples=4)
@given(seeds, st.sampled_from((0, 1)), st.sampled_from((1, 3, 4)))
def law_edge_moe_fixed_network_is_near(seed, task, lanes):
    """All integers, patches to tokens, against the same weights in real numbers."""
    rng = np.random.default_rng(seed)
    stored = m3vit_to_fixed(init_m3vit(rng, SMALL, std=0.1))
    formats = m3vit_formats(stored)
    for f, a in zip(tree_leaves(formats), tree_leaves(stored), strict=True):
        assert f.least <= a.min() <= a.max() <= f.most
    real = tree_map(lambda f, a: f.value(a), formats, stored)
    img = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    _, lengths = m3vit_forward_fixed(img, stored, task=task, cfg=SMALL, lanes=lanes)
    assert lengths.shape == (1, 4)
    assert lengths.sum() == 7 * 2
    alone = real._replace(moe=(None, None))  # an MLP in both layers: no choice that a floor could turn
    raw, none = m3vit_forward_fixed(img, stored._replace(moe=(None, None)), task=task, cfg=SMALL, lanes=lanes)
    assert none.shape == (0, 4)
    want = m3vit_forward(img / 256, alone, task=task, cfg=SMALL)
    # each of two layers: the table's 1e-4 through 32 weights of at most 0.5, and norms that stretch by 1 / sd
    widest = max(np.abs(p.w_fc2).sum(0).max() for p in real.vit.blocks)
    assert np.abs(FM.value(raw) - want).max() < 2 * (1e-4 * widest + 2e-4)


def law_edge_moe_weights_out_of_range_raise():
    """Stored weights lie in [-2, 2), those of patches in [-1/2, 1/2): nothing wraps unseen."""
    p = init_m3vit(np.random.default_rng(0), SMALL)
    far = p.vit.blocks[0]._replace(w_q=p.vit.blocks[0].w_q + 2.0)
    for vit in (
        p.vit._replace(w_patch=p.vit.w_patch + 0.5),
        p.vit._replace(blocks=(far, *p.vit.blocks[1:])),
    ):
        message = ""
        try:
            m3vit_to_fixed(p._replace(vit=vit))
        except OverflowError as e:
            message = str(e)
        assert "do not fit" in message


def law_edge_moe_fixed_norm_of_equal_numbers_is_its_bias():
    """No variance: counted as one step, and nothing divides by zero."""
    x = np.full((1, 16), 3 * S)
    y = layer_norm_fixed(x, np.full(16, 2048), np.full(16, 512))
    np.testing.assert_array_equal(y, np.full((1, 16), 512 << 11))
