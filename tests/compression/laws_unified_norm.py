"""Laws of Unified Normalization on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.mlp import linear
from ref.compression.unified_norm import (
    UNState,
    amgm_gap,
    fuse_un_into_next_linear,
    fuse_un_into_previous_linear,
    init_un,
    norm_cost,
    un_inference,
    un_train_backward,
    un_train_forward,
    un_train_step,
    un_train_steps,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
C = 5


def draw(seed, steps=None):
    """x, grad_y [(T,) 2, 4, C], weight, bias [C]."""
    rng = np.random.default_rng(seed)
    shape = (2, 4, C) if steps is None else (steps, 2, 4, C)
    return *rng.standard_normal((2, *shape)), rng.uniform(0.5, 2, C), rng.standard_normal(C)


@given(seeds, st.booleans())
def law_unified_norm_warm_up_has_unit_second_moment(seed, masked):
    x, _, _, _ = draw(seed)
    mask = np.random.default_rng(seed).random((2, 4)) < 0.6 if masked else np.ones((2, 4), bool)
    mask[0, 0] = True
    y, _, state = un_train_forward(x, np.ones(C), np.zeros(C), init_un(C), mask=mask)
    x2 = sum(x[b, n] ** 2 for b in range(2) for n in range(4) if mask[b, n]) / mask.sum()
    # z^2 averages to x2 / (x2 + eps)
    np.testing.assert_allclose((y[mask] ** 2).mean(axis=0), x2 / (x2 + 1e-5), rtol=64 * EPS)
    np.testing.assert_allclose(state.running_var, 0.9 + 0.1 * x2, rtol=16 * EPS)
    np.testing.assert_allclose(state.buffer_x2[1], x2, rtol=16 * EPS)  # the first step goes to slot 1
    assert (int(state.iters), int(state.skip_count)) == (1, 0)
    padded = np.where(mask[..., None], x, 7.0)  # what padding holds moves no statistic
    again = un_train_forward(padded, np.ones(C), np.zeros(C), init_un(C), mask=mask)[2]
    for a, b in zip(again, state, strict=True):
        np.testing.assert_array_equal(a, b)


@given(seeds)
def law_unified_norm_order_of_the_batch_changes_nothing(seed):
    x, g, w, b = draw(seed)
    p = np.random.default_rng(seed).permutation(8)
    mix = lambda a: a.reshape(8, C)[p].reshape(2, 4, C)
    one, two = (un_train_step(f(x), f(g), w, b, init_un(C)) for f in (lambda a: a, mix))
    for a, c in zip((mix(one[0]), mix(one[1]), *one[4]), (two[0], two[1], *two[4]), strict=True):
        np.testing.assert_allclose(a, c, rtol=0, atol=256 * EPS)


@given(seeds)
def law_unified_norm_inference_is_affine_and_folds_into_both_neighbours(seed):
    rng = np.random.default_rng(seed)
    x, w, b = rng.standard_normal((3, C)), rng.standard_normal(C), rng.standard_normal(C)
    var, m, c = rng.uniform(0.1, 3, C), rng.standard_normal((C, 4)), rng.standard_normal(4)
    y = un_inference(x, w, b, var)
    want = np.array([[w[j] * r[j] / (var[j] + 1e-5) ** 0.5 + b[j] for j in range(C)] for r in x])
    np.testing.assert_allclose(y, want, rtol=0, atol=16 * EPS * np.abs(want).max())
    bound = 64 * EPS * (np.abs(y) @ np.abs(m)).max()
    after = linear(x, *fuse_un_into_next_linear(w, b, var, m, c))
    np.testing.assert_allclose(after, y @ m + c, rtol=0, atol=bound + 1e-14)
    p, d = rng.standard_normal((4, C)), rng.standard_normal(C)
    h = rng.standard_normal((3, 4))
    before = linear(h, *fuse_un_into_previous_linear(w, b, var, p, d))
    want = un_inference(h @ p + d, w, b, var)
    np.testing.assert_allclose(before, want, rtol=0, atol=64 * EPS * max(1, np.abs(want).max()) * 8)


@given(seeds, st.integers(2, 6), st.sampled_from((0.0, 1.0, 4.0)))
def law_unified_norm_gap_of_means_lies_between_variances(seed, M, spread):
    """s2 <= am - gm <= (M - 1) s2, equal at M = 2."""
    window = np.exp(spread * np.random.default_rng(seed).standard_normal((M, C)))
    am, gm, s2 = amgm_gap(window)
    slack = 64 * EPS * am
    assert (s2 <= am - gm + slack).all()
    assert (am - gm <= (M - 1) * s2 + slack).all()
    if M == 2:
        np.testing.assert_allclose(am - gm, s2, rtol=0, atol=slack.max())
    one = amgm_gap(window[:1])
    np.testing.assert_allclose(one[0], one[1], rtol=8 * EPS)
    assert not one[2].any()
    assert not amgm_gap(np.zeros((3, C)))[1].any()


def settled(v, M, running=None):
    """A state whose window and running second moment are all v [C], far beyond the warm-up."""
    rows = np.tile(v, (M, 1))
    run = v if running is None else running
    return UNState(run.copy(), 0 * v, rows, 0 * rows, np.asarray(2000, np.int32), np.zeros((), np.int32))


@given(seeds, st.floats(2, 60), st.sampled_from((2, 3, 4)))
def law_unified_norm_a_spike_moves_the_means_as_stated(seed, s, M):
    """x -> s x once in M equal steps: geometric mean times s^(2/M), arithmetic times (M - 1 + s^2) / M."""
    v = np.random.default_rng(seed).uniform(0.5, 2, C)
    window = np.tile(v, (M, 1))
    window[0] *= s**2
    am, gm, _ = amgm_gap(window)
    np.testing.assert_allclose(gm, v * s ** (2 / M), rtol=64 * EPS)
    np.testing.assert_allclose(am, v * (M - 1 + s**2) / M, rtol=16 * EPS)


@given(seeds, st.floats(5, 60))
def law_unified_norm_filter_keeps_an_outlier_out_of_the_window(seed, s):
    """After a spike: with the filter no later step is off, without it M - 1 are; running_var as stated."""
    M, options = 4, {"warmup": 10, "eps": 0.0}
    x, _, w, b = draw(seed)
    x = x / np.sqrt((x**2).mean(axis=(0, 1)))  # second moment 1 in every channel
    # roots 0.98, 1.02, ...: every normal step then makes the window steadier than what was recorded before
    rows = np.tile([[0.98**2], [1.02**2]], (M // 2, C))
    state = settled(np.ones(C), M)._replace(buffer_x2=rows)
    for filtered in (True, False):
        now, off = state, 0
        for scale in (s, *[1.0] * (M - 1)):
            y, _, now = un_train_forward(scale * x, w, b, now, outlier_filtration=filtered, **options)
            if scale == 1:
                std = np.abs((y - b) / w / x)  # 1 / sqrt(var)
                off += int((np.abs(std**-2 - 1) > 0.1).any())
        assert off == (0 if filtered else M - 1)
        assert int(now.skip_count) == int(filtered)
    one = un_train_forward(s * x, w, b, state, outlier_filtration=True, **options)[2]
    np.testing.assert_allclose(one.running_var, 1 + 0.1 * (s**2 - 1), rtol=1e-9)
    np.testing.assert_array_equal(one.buffer_x2[2001 % M], state.running_var)
    frozen = {**options, "outlier_filtration": True, "skip_freezes_running": True}
    same = un_train_forward(s * x, w, b, state, **frozen)
    np.testing.assert_array_equal(same[2].running_var, state.running_var)
    np.testing.assert_array_equal(same[1].r, 1.0)
    assert bool(same[1].skip)


@given(seeds)
def law_unified_norm_filter_fires_between_its_two_bounds(seed):
    """Never while every channel's new window has population variance <= recorded; surely above M of it."""
    rng, M = np.random.default_rng(seed), 4
    state = settled(np.ones(C), M)._replace(buffer_x2=rng.uniform(0.5, 2, (M, C)))
    x = rng.standard_normal((2, 4, C)) * np.exp(rng.standard_normal())
    recorded = np.sqrt(state.buffer_x2).var(ddof=1)
    window = state.buffer_x2.copy()
    window[2001 % M] = (x**2).mean(axis=(0, 1))
    s2 = np.sqrt(window).var(axis=0, ddof=1)
    new = un_train_forward(x, np.ones(C), np.zeros(C), state, warmup=10, outlier_filtration=True)[2]
    fired = int(new.skip_count)
    if (s2 * (M - 1) / M <= recorded * (1 - 1e-12)).all():
        assert fired == 0
    if (s2 > M * recorded * (1 + 1e-12)).any():
        assert fired == 1


@given(seeds)
def law_unified_norm_first_gradient_is_exact_where_nothing_is_smoothed(seed):
    """exact_gradient against central differences of weight x / sqrt(mean x^2 + eps) + bias."""
    x, g, w, b = draw(seed)
    loss = lambda x, w, b: (g * (w * x / np.sqrt((x**2).mean(axis=(0, 1)) + 1e-5) + b)).sum()
    got = un_train_step(x, g, w, b, init_un(C), exact_gradient=True)[1:4]
    rng = np.random.default_rng(seed + 1)
    for n, grad in enumerate(got):
        args, d = [x, w, b], rng.standard_normal(grad.shape)
        at = lambda h, n=n, d=d, args=args: loss(*[a + h * d if i == n else a for i, a in enumerate(args)])
        h = 1e-4
        slopes = [(at(s) - at(-s)) / (2 * s) for s in (h, 2 * h)]
        slope = slopes[0] + (slopes[0] - slopes[1]) / 3  # Richardson
        # rounding: eps |loss| / h; truncation of order h^4
        np.testing.assert_allclose((grad * d).sum(), slope, rtol=1e-7, atol=1e-9)
    approximate = un_train_step(x, g, w, b, init_un(C))[1]
    assert np.abs(approximate - got[0]).max() > 0  # at the first step ema_gz is a tenth of gz


@given(seeds, st.integers(1, 9))
def law_unified_norm_equal_steps_relax_exponentially(seed, T):
    x, g, w, b = draw(seed)
    states = un_train_steps(np.stack([x] * T), np.stack([g] * T), w, b, init_un(C), warmup=0)[-1]
    v = (x**2).mean(axis=(0, 1))
    want = v + 0.9 ** np.arange(1, T + 1)[:, None] * (1 - v)
    np.testing.assert_allclose(states.running_var, want, rtol=64 * EPS)
    np.testing.assert_array_equal(states.iters, np.arange(1, T + 1))


@given(seeds, st.sampled_from((-6, 5)))
def law_unified_norm_is_equivariant_to_scale(seed, power):
    """x s, running_var s^2, windows s^2, eps -> 0: the same y and r."""
    s = 2.0**power  # exact in binary, but log and exp round
    x, _, w, b = draw(seed)
    v = np.random.default_rng(seed).uniform(0.5, 2, C)
    for filtered in (False, True):
        options = {"warmup": 10, "eps": 0.0, "outlier_filtration": filtered}
        y, cache, _ = un_train_forward(x, w, b, settled(v, 3), **options)
        scaled, other, _ = un_train_forward(s * x, w, b, settled(s**2 * v, 3), **options)
        np.testing.assert_allclose(scaled, y, rtol=0, atol=1e-12 * np.abs(y).max())
        np.testing.assert_allclose(other.r, cache.r, rtol=1e-12)


@given(seeds)
def law_unified_norm_correction_enters_gradients_and_on_request_the_output(seed):
    x, g, w, b = draw(seed)
    state = settled(np.full(C, 4.0), 2, running=np.full(C, 2.0))
    y, cache, new = un_train_forward(x, w, b, state, warmup=10)
    z = un_train_forward(x, w, b, state, warmup=10, scale_forward_by_r=True)[0]
    np.testing.assert_allclose(z - b, cache.r * (y - b), rtol=0, atol=64 * EPS * np.abs(z).max())
    assert (np.abs(cache.r - 1) > 1e-3).any()
    assert ((0.2 <= cache.r) & (cache.r <= 5)).all()
    _, grad_weight, _, _ = un_train_backward(g, cache, new)
    np.testing.assert_allclose(grad_weight, (g * cache.r * (y - b) / w).sum(axis=(0, 1)), rtol=0, atol=1e-12)


def law_unified_norm_cost_is_gone_once_fused():
    assert norm_cost(10, 8) == (640, 640)
    assert norm_cost(10, 8, kind="un") == (640, 160)
    assert norm_cost(10, 8, kind="un_fused", itemsize=2) == (0, 0)
