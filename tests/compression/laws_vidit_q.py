"""Laws of ViDiT-Q on ref alone: NumPy and Hypothesis."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.compression.vidit_q import (
    DiTConfig,
    LayerSensitivity,
    allocate_bits,
    apply_params,
    calibrate,
    calibrate_act_max,
    calibrate_act_params,
    channel_mask,
    channel_scale,
    codes,
    ddim_sample,
    dit_forward,
    dynamic_channel_scale,
    fake_quant,
    hadamard_matrix,
    hadamard_transform,
    init_dit,
    int_matmul,
    published_plan,
    qdit_project,
    quant_params,
    quantizable,
    quantizable_names,
    quantize_dit,
    quantized_linear,
    rotation_for,
    sensitivity,
    timestep_range,
    update_act_max,
    vidit_q_bytes,
)

EPS32 = np.finfo(np.float32).eps
seeds = st.integers(0, 2**32 - 1)
bits_ = st.sampled_from((2, 4, 6, 8))
groups = st.sampled_from(("tensor", "token"))
RANGES = ((0, 500), (501, 1000))
CFG = DiTConfig(side=4, dim=8, depth=2, classes=3)


def tokens(seed, *, outlier=1.0, dtype=np.float64):
    """x [2, 5, 16], one channel larger by a factor, and w [6, 16]."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((2, 5, 16)), rng.standard_normal((6, 16))
    x[..., 3] *= outlier
    return x.astype(dtype), w.astype(dtype)


@given(seeds, bits_, groups, st.booleans())
def law_vidit_q_error_is_half_a_step_and_zero_is_exact(seed, bits, granularity, symmetric):
    x, _ = tokens(seed)
    x[0, 0, 0] = 0
    p = quant_params(x, bits=bits, granularity=granularity, symmetric=symmetric)
    y = fake_quant(x, bits=bits, granularity=granularity, symmetric=symmetric)
    assert (np.abs(x - y) <= p.delta / 2 * (1 + 1e-12) + 1e-12).all()  # nothing in [lo, hi] is clipped
    assert y[0, 0, 0] == 0
    np.testing.assert_allclose(apply_params(y, p), y, rtol=0, atol=1e-12)  # once is enough
    assert codes(x, p).min() >= p.qmin
    assert codes(x, p).max() <= p.qmax


@given(seeds, bits_, st.booleans())
def law_vidit_q_groups_are_rows_by_hand(seed, bits, symmetric):
    x, w = tokens(seed)
    p = quant_params(x, bits=bits, granularity="token", symmetric=symmetric)
    rows = quant_params(w, bits=bits, granularity="channel", symmetric=symmetric)
    assert p.delta.shape == (2, 5, 1)
    assert rows.delta.shape == (6, 1)
    for row, delta, zero in [
        (x[b, t], p.delta[b, t, 0], p.zero[b, t, 0]) for b in range(2) for t in range(5)
    ]:
        lo, hi = min(row.min(), 0), max(row.max(), 0)
        step = max(-lo, hi) / (2 ** (bits - 1) - 1) if symmetric else (hi - lo) / (2**bits - 1)
        np.testing.assert_allclose(delta, step, rtol=1e-12)
        assert zero == (0 if symmetric else np.rint(-lo / delta))
    pooled = quant_params(x, bits=bits, granularity="token", symmetric=symmetric, pool_batch=True)
    assert pooled.delta.shape == (1, 5, 1)
    np.testing.assert_array_equal(
        pooled.delta[0], quant_params(np.concatenate([x[:1], x[1:]], axis=2), bits=bits, granularity="token",
                                      symmetric=symmetric).delta[0],
    )  # fmt: skip
    alone = fake_quant(x[:1], bits=bits, granularity="token")
    np.testing.assert_array_equal(fake_quant(x, bits=bits, granularity="token")[:1], alone)


@given(seeds, bits_, bits_)
def law_vidit_q_integer_sums_are_the_product_of_what_they_stand_for(seed, a_bits, w_bits):
    x, w = tokens(seed, dtype=np.float32)
    px, pw = (
        quant_params(x, bits=a_bits, granularity="token"),
        quant_params(w, bits=w_bits, granularity="channel"),
    )
    qx, qw = codes(x, px).astype(np.int32), codes(w, pw).astype(np.int32)
    bias = np.arange(6, dtype=np.float32)
    want = apply_params(x, px).astype(np.float64) @ apply_params(w, pw).astype(np.float64).T + bias
    size = np.abs(apply_params(x, px)) @ np.abs(apply_params(w, pw)).T + np.abs(bias)
    got = int_matmul(qx, px, qw, pw, bias=bias)
    assert got.dtype == np.float32
    # the sums are exact; steps, their product, bias and result are rounded: six times half an ulp
    assert (np.abs(got - want) <= 6 * EPS32 * size).all()
    layer = quantized_linear(x, w, bias, w_bits=w_bits, a_bits=a_bits)
    assert layer.dtype == np.float32
    assert (np.abs(got - layer) <= (16 + 6) * EPS32 * size).all()


@given(seeds, st.floats(0, 1))
def law_vidit_q_balance_and_rotation_keep_the_product(seed, alpha):
    x, w = tokens(seed, outlier=30.0)
    act_max = calibrate_act_max(x[None])
    s, mask = channel_scale(act_max, w, alpha=alpha), channel_mask(act_max, w, alpha=1 - alpha)
    np.testing.assert_allclose(mask, 1 / s, rtol=1e-12)
    signs, size = rotation_for(16, seed)[1], np.abs(x) @ np.abs(w).T
    pairs = ((x / s, w * s), (x * mask, w / mask),
             (hadamard_transform(x, signs=signs), hadamard_transform(w, signs=signs)))  # fmt: skip
    for a, b in pairs:
        # rotation sums 16 terms before the product does, of at most 4 |x| |w|: some 40 roundings
        assert (np.abs(a @ b.T - x @ w.T) <= 1e-12 * np.maximum(size.max(), 1)).all()
    ones = channel_scale(act_max, w, alpha=1.0)
    assert (np.abs(x).max(axis=1).mean(axis=0) / ones <= 1 + 1e-12).all()
    np.testing.assert_allclose(channel_scale(act_max, w, alpha=0.0), 1 / np.abs(w).max(axis=0), rtol=1e-12)
    dynamic = dynamic_channel_scale(x[:1], w, alpha=alpha)
    np.testing.assert_allclose(dynamic, channel_scale(np.abs(x[0]).max(axis=0), w, alpha=alpha), rtol=1e-12)
    wide = {"w_bits": 16, "a_bits": 16}
    for options in (
        {},
        {"scale": s},
        {"mask": mask},
        {"scale": s, "signs": signs},
        {"mask": mask, "signs": signs},
    ):
        y = quantized_linear(x, w, None, **wide, **options)
        assert (np.abs(y - x @ w.T) <= 1e-3 * size.max()).all()  # the card's bound for 16 bits


@given(seeds, st.sampled_from((1, 4, 12, 20, 28, 36, 48)))
def law_vidit_q_rotations_are_orthogonal_and_spread_outliers(seed, n):
    h = hadamard_matrix(n)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))
    rng = np.random.default_rng(seed)
    block, signs = rotation_for(2 * n, seed)
    assert (2 * n) % block == 0
    assert rotation_for(1152, 0)[0] == 1152
    assert rotation_for(70, 0)[0] == 2
    x = rng.standard_normal((3, 2 * n))
    y = hadamard_transform(x, signs=signs, block=n)
    for part in (slice(0, n), slice(n, 2 * n)):
        lengths = np.linalg.norm(x[:, part], axis=1), np.linalg.norm(y[:, part], axis=1)
        np.testing.assert_allclose(*lengths, rtol=1e-12)
    one = np.zeros(n)
    one[seed % n] = 7
    np.testing.assert_allclose(np.abs(hadamard_transform(one)), 7 / np.sqrt(n), rtol=1e-12)


@given(seeds)
def law_vidit_q_rotation_lowers_kurtosis(seed):
    x, _ = tokens(seed, outlier=30.0)
    kurtosis = lambda t: ((t - t.mean()) ** 4).mean() / t.var() ** 2
    assert kurtosis(hadamard_transform(x, signs=rotation_for(16, seed)[1])) < 0.7 * kurtosis(x)


def law_vidit_q_finer_grids_and_more_bits_err_less():
    """Means over 200 layers: a scale a token beats one for all, more bits beat fewer, balance beats none."""
    rng = np.random.default_rng(0)
    errors = {}
    for _ in range(200):
        x, w = (
            rng.standard_normal((1, 8, 16)) * np.exp(rng.standard_normal((1, 8, 1))),
            rng.standard_normal((6, 16)),
        )
        x[..., 3] *= 20
        act_max = calibrate_act_max(x[None])
        signs = rotation_for(16, 1)[1]
        cases = {f"W{b}A{b}": {"w_bits": b, "a_bits": b} for b in (4, 6, 8)}
        cases["one grid"] = {"w_bits": 8, "a_bits": 8, "act_params": quant_params(x, bits=8)}
        cases["scaled"] = {"w_bits": 8, "a_bits": 4, "scale": channel_scale(act_max, w, alpha=0.5)}
        cases["rotated"] = {"w_bits": 8, "a_bits": 4, "signs": signs}
        cases["naive"] = {"w_bits": 8, "a_bits": 4}
        for name, options in cases.items():
            errors.setdefault(name, []).append(
                ((quantized_linear(x, w, None, **options) - x @ w.T) ** 2).mean()
            )
    mean = {name: np.mean(e) for name, e in errors.items()}
    assert mean["W4A4"] > mean["W6A6"] > mean["W8A8"]
    assert mean["one grid"] > mean["W8A8"]
    assert mean["naive"] > mean["scaled"]
    assert mean["naive"] > mean["rotated"]
    same = np.tile(rng.permutation(16).astype(float), (1, 5, 1))  # tokens with the same ends share one grid
    np.testing.assert_array_equal(fake_quant(same, bits=4, granularity="token"), fake_quant(same, bits=4))


@given(seeds)
def law_vidit_q_calibration_is_the_running_mean(seed):
    rng = np.random.default_rng(seed)
    batches = rng.standard_normal((3, 2, 4, 5))
    batches[..., 2] = 0
    want = None
    for x in batches:
        new = np.array([np.mean([max(abs(x[b, :, c])) for b in range(2)]) for c in range(5)])
        want = new if want is None else 0.95 * want + 0.05 * new
    want[2] = 1e-5
    np.testing.assert_allclose(calibrate_act_max(batches), want, rtol=1e-12)
    np.testing.assert_allclose(
        update_act_max(None, batches[0]), np.abs(batches[0]).max(1).mean(0), rtol=1e-12
    )
    lo, hi = batches[0].min(), batches[0].max()
    for x in batches[1:]:
        lo, hi = 0.95 * lo + 0.05 * x.min(), 0.95 * hi + 0.05 * x.max()
    p = calibrate_act_params(batches, bits=8)
    np.testing.assert_allclose(p.delta, (hi - lo) / 255, rtol=1e-12)


def law_vidit_q_steps_find_their_range():
    assert [timestep_range(t, RANGES) for t in (0, 500, 501, 1000)] == [0, 0, 1, 1]
    assert timestep_range(3, RANGES[::-1]) == 1  # the order in which they are listed counts
    assert timestep_range(500.5, RANGES) == 0  # a solver's steps need not be whole


def rows_of(seed, n=5):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        worse = np.sort(rng.random(3))[::-1]
        bits = dict(zip((4, 6, 8), worse.tolist(), strict=True))
        found.append(LayerSensitivity("ab"[i % 2], f"l{i}", int(rng.integers(1, 6)), bits))
    return tuple(found)


@given(seeds, st.floats(4, 8))
def law_vidit_q_bits_stay_in_the_budget_of_every_group(seed, budget):
    table = rows_of(seed)
    scaled = tuple(
        r._replace(degradation={b: 1000 * v for b, v in r.degradation.items()}) if r.group == "a" else r
        for r in table
    )
    total = lambda plan, rows: sum(r.degradation[plan[r.layer]] for r in rows)
    for exact in (False, True):
        plan = allocate_bits(table, budget_bits=budget, exact=exact)
        assert plan == allocate_bits(scaled, budget_bits=budget, exact=exact)  # groups are judged apart
        more = allocate_bits(table, budget_bits=budget + 0.5, exact=exact)
        for group in "ab":
            rows = [r for r in table if r.group == group]
            size = sum(r.size for r in rows)
            assert sum(r.size * plan[r.layer] for r in rows) <= budget * size * (1 + 1e-9)
            assert total(more, rows) <= total(plan, rows) + 1e-12
            best = min(
                sum(r.degradation[b] for r, b in zip(rows, c, strict=True))
                for c in product((4, 6, 8), repeat=len(rows))
                if sum(r.size * b for r, b in zip(rows, c, strict=True)) <= budget * size * (1 + 1e-12)
            )
            if exact:
                np.testing.assert_allclose(total(plan, rows), best, rtol=1e-12)
            else:
                assert total(plan, rows) >= best - 1e-12
                assert all(more[r.layer] >= plan[r.layer] for r in rows)
    assert set(allocate_bits(table, budget_bits=8).values()) == {8}
    assert set(allocate_bits(table, budget_bits=4).values()) == {4}


@given(seeds)
def law_vidit_q_a_network_is_quantised_by_range(seed):
    """16 bits change next to nothing; weights and scales of a range are those that its samples gave."""
    rng = np.random.default_rng(seed)
    net = init_dit(rng, CFG, std=0.3, zero=False)
    images, labels = rng.standard_normal((2, 4, 4, 1)), np.array([0, 3])
    run = lambda sample, project: dit_forward(*sample, labels, net, CFG, project=project)
    state = calibrate(run, [(t, (images, t)) for t in (10, 490, 800)], ranges=RANGES, alpha=0.3)
    fine = {n: (16, 16) for n in quantizable(net)}
    exact = dit_forward(images, 800, labels, net, CFG)
    for calib in (None, state):
        q = quantize_dit(net, calib, fine, ranges=RANGES)
        got = dit_forward(images, 800, labels, net, CFG, project=qdit_project(q, 800))
        # 16 bits: a step of 1.5e-5 of the range; some ten layers of 32 terms each
        assert np.abs(got - exact).max() <= 1e-2 * np.abs(exact).max()
    name = "blocks.1.mlp.fc1"
    seen = []
    run((images, 800), lambda n, x, w, b: (seen.append(x) if n == name else None, x @ w + b)[1])
    s = channel_scale(np.abs(seen[0]).max(axis=1).mean(axis=0), net.blocks[1].w_fc1.T, alpha=0.3)
    np.testing.assert_allclose(q.weights[1][name][1], s, rtol=1e-12)
    assert not np.array_equal(q.weights[0][name][1], q.weights[1][name][1])
    plans = ({name: (4, 8)}, {})
    q = quantize_dit(net, None, plans, ranges=RANGES)
    np.testing.assert_array_equal(
        dit_forward(images, 800, labels, net, CFG, project=qdit_project(q, 800)),
        dit_forward(images, 800, labels, net, CFG, project=lambda n, x, w, b: x @ w + b),
    )
    assert np.abs(dit_forward(images, 10, labels, net, CFG, project=qdit_project(q, 10))
                  - dit_forward(images, 10, labels, net, CFG)).max() > 0  # fmt: skip


def law_vidit_q_metrics_are_asked_of_their_own_groups():
    """Each layer alone is quantised, sampled from, and judged by its group's metric; more bits hurt less."""
    rng = np.random.default_rng(0)
    net, noise, labels = (
        init_dit(rng, CFG, std=0.3, zero=False),
        rng.standard_normal((2, 4, 4, 1)),
        np.array([1, 2]),
    )

    def sample(plan):
        q = quantize_dit(net, None, {n: (b, 8) for n, b in plan.items()})
        model = lambda x, t, _: dit_forward(x, t, labels, net, CFG, project=qdit_project(q, t))
        return ddim_sample(model, noise, steps=2)

    groups = {"attention": ["blocks.0.attn.q", "blocks.1.attn.o"], "mlp": ["blocks.0.mlp.fc1"]}
    error = lambda out, exact: ((out - exact) ** 2).mean()
    metrics = {"attention": error, "mlp": lambda out, exact: 100 * error(out, exact)}
    table = sensitivity(sample, quantizable(net), groups, metrics, bits=(4, 8))
    assert [(r.group, r.layer, r.size) for r in table] == [
        ("attention", "blocks.0.attn.q", 64), ("attention", "blocks.1.attn.o", 64),
        ("mlp", "blocks.0.mlp.fc1", 256),
    ]  # fmt: skip
    assert all(r.degradation[4] > r.degradation[8] > 0 for r in table)
    assert set(allocate_bits(table, budget_bits=8, candidates=(4, 8)).values()) == {8}


def law_vidit_q_published_plan_and_bytes():
    """The plan of 20 steps, and bytes against the arrays of a network."""
    cfg = DiTConfig(side=4, dim=8, depth=2, classes=3, text_dim=5, frames=3)
    assert all(w == 8 for w, _ in published_plan(cfg, 15).values())
    late = published_plan(cfg, 4, temporal_block=1)
    eight = {n for n, (w, _) in late.items() if w == 8}
    assert eight == {n for n in quantizable_names(cfg) if ".mlp." in n or n.startswith("blocks.1.temporal")}
    assert published_plan(cfg, 14)["blocks.1.temporal.q"] == (4, 8)
    net = init_dit(np.random.default_rng(0), cfg)
    assert quantizable_names(cfg) == list(quantizable(net))
    flat = vidit_q_bytes(cfg, {})
    leaves = sum(x.size for x in (*_arrays(net),))
    assert sum(flat.values()) == 2 * leaves
    small = vidit_q_bytes(cfg, {n: (4, 8) for n in quantizable(net)})
    assert small["weights"] == sum(w.size for w in quantizable(net).values()) // 2
    assert small["grids"] == sum(4 * w.shape[1] for w in quantizable(net).values())
    assert small["other layers"] == flat["other layers"]


def _arrays(tree):
    if isinstance(tree, tuple):
        for t in tree:
            yield from _arrays(t)
    elif tree is not None:
        yield tree
