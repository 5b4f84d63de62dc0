"""Laws of subsampled attention on ref alone: NumPy and Hypothesis."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.attention.subsampled import (
    SSAConfig,
    SSASchedule,
    edge_probability,
    local_permutation,
    local_permutation_2d,
    sample_sources,
    self_ensemble,
    ssa_attention,
    ssa_attention_bwd,
    ssa_cost,
    ssa_ensemble,
    ssa_transformer,
    ssa_transformer_loss,
    ssa_transformer_loss_vjp,
    ssa_visible,
)
from ref.blocks.attention import attention_dense, attention_dense_vjp
from ref.blocks.losses import negative_log_likelihood
from ref.blocks.optim import adam, adam_init
from ref.counting import Tally, count
from ref.data import text
from ref.metrics import spearman
from ref.models.gpt import gpt_forward, init_gpt
from tests.slopes import along, drawn_like, moved, slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
flags = st.booleans()


def qkv(seed, L=9, B=2, H=2, D=3):
    return np.random.default_rng(seed).standard_normal((3, B, H, L, D))


def rounding(q, k, v):
    """Scores of D products off by 2 D eps |q||k|, exp passes it on; sums of L terms of |v|."""
    size = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    terms = 8 * (q.shape[-1] + 2) * size + 4 * k.shape[-2] + 8
    return EPS * terms * (1 + np.abs(v).max()) * (1 + np.abs(q).max())


@st.composite
def draws(draw):
    """(seed, options of ssa_attention, what they show by the definition, bool [2, 1, 9, 9])."""
    seed, L = draw(seeds), 9
    rng = np.random.default_rng(seed)
    options = {"causal": draw(flags), "include_self": draw(flags)}
    by_example = draw(flags)
    if draw(flags):
        k = draw(st.integers(1, L))
        index = np.stack([sample_sources(rng.random(L), k) for _ in range(2)])
        seen = np.stack([np.isin(np.arange(L), row)[None].repeat(L, 0) for row in index])
        options["source_index"] = index if by_example else index[0]
    else:
        sides = st.integers(0, 2)
        window = {"block": draw(st.integers(1, 10)), "left": draw(sides), "right": draw(sides)}
        perm = np.stack([local_permutation(rng.standard_normal(L), sigma=3.0) for _ in range(2)])
        b, seen = window["block"], np.zeros((2, L, L), bool)
        for e, i, s in np.ndindex(2, L, L):  # slot s holds source perm[s]
            seen[e, i, perm[e, s]] = -window["left"] <= s // b - i // b <= window["right"]
        options |= {"perm": perm if by_example else perm[0], **window}
    if not by_example:
        seen = seen[[0, 0]]
    if options["causal"]:
        seen = seen & np.tri(L, dtype=bool)
    if options["include_self"]:
        seen = seen | np.eye(L, dtype=bool)
    return seed, options, seen[:, None]


@given(draws(), flags)
def law_subsampled_is_dense_attention_under_its_mask(drawn, masked):
    """Values and gradients; a draw by example or shared; also under the caller's mask."""
    seed, options, seen = drawn
    q, k, v = qkv(seed)
    do = np.random.default_rng(seed + 1).standard_normal(q.shape)
    if masked:
        options["mask"] = np.random.default_rng(seed + 2).random((2, 1, 9, 9)) < 0.7
        seen = seen & options["mask"]
    atol = rounding(q, k, v) * (1 + np.abs(do).max())
    want = attention_dense(q, k, v, mask=seen, scale=0.8)
    np.testing.assert_allclose(ssa_attention(q, k, v, scale=0.8, **options), want, rtol=0, atol=atol)
    grads = ssa_attention_bwd(do, q, k, v, scale=0.8, **options)
    for got, want in zip(grads, attention_dense_vjp(q, k, v, do, mask=seen, scale=0.8), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * atol)  # three products in a row
    if "perm" in options and options["perm"].ndim == 1 and not masked:
        flat = {n: o for n, o in options.items() if n != "perm"}
        np.testing.assert_array_equal(ssa_visible(options["perm"], **flat), seen[0, 0])


@given(draws())
def law_subsampled_gradients_are_central_differences(drawn):
    """Error h^2 f''' + eps f / h; with h = 1e-5 and entries of order 1 both stay under 1e-8 of the sum."""
    seed, options, _ = drawn
    args, rng, h = list(qkv(seed)), np.random.default_rng(seed + 1), 1e-5
    do = rng.standard_normal(args[0].shape)
    for n, g in enumerate(ssa_attention_bwd(do, *args, **options)):
        d = rng.standard_normal(g.shape)
        moved = lambda t, n=n, d=d: [x + t * d if i == n else x for i, x in enumerate(args)]
        at = lambda t, moved=moved: np.sum(do * ssa_attention(*moved(t), **options))
        size = (1 + np.abs(do).sum()) * max(np.abs(args[2]).max(), 1) * max(1, np.abs(d).max()) ** 3
        np.testing.assert_allclose(np.sum(g * d), (at(h) - at(-h)) / (2 * h), rtol=0, atol=1e-8 * size)


@given(draws())
def law_subsampled_undrawn_sources_may_hold_nan(drawn):
    """A source that no query sees has no influence, and exactly zero gradient."""
    seed, options, seen = drawn
    q, k, v = qkv(seed)
    unseen = np.broadcast_to(~seen.any(axis=-2)[:, 0, None, :, None], k.shape)
    bad = q, np.where(unseen, np.nan, k), np.where(unseen, np.nan, v)
    want = ssa_attention(q, k, v, **options), *ssa_attention_bwd(q, q, k, v, **options)
    got = ssa_attention(*bad, **options), *ssa_attention_bwd(q, *bad, **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not want[2][unseen].any()
    assert not want[3][unseen].any()


@given(seeds, st.integers(1, 10), flags)
def law_subsampled_with_every_source_is_dense(seed, block, causal):
    q, k, v = qkv(seed)
    perm = np.random.default_rng(seed).permutation(9)
    want = attention_dense(q, k, v, causal=causal)
    for options in (
        {"source_index": np.arange(9)},
        {"source_index": perm},  # the order of the sources is irrelevant
        {"perm": perm, "block": block, "left": 9, "right": 9},
    ):
        got = ssa_attention(q, k, v, causal=causal, **options)
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(q, k, v))


@given(seeds, st.integers(1, 4))
def law_subsampled_without_noise_is_local(seed, block):
    """sigma = 0 is the identity: attention within blocks, the last of which may be shorter."""
    perm = local_permutation(np.random.default_rng(seed).standard_normal(9), sigma=0.0)
    np.testing.assert_array_equal(perm, np.arange(9))
    q, k, v = qkv(seed)
    got = ssa_attention(q, k, v, perm=perm, block=block)
    for i in range(0, 9, block):
        cut = slice(i, i + block)
        want = attention_dense(q[:, :, cut], k[:, :, cut], v[:, :, cut])
        np.testing.assert_allclose(got[:, :, cut], want, rtol=0, atol=rounding(q, k, v))


@given(draws())
def law_subsampled_causal_rows_ignore_the_future(drawn):
    seed, options, _ = drawn
    options |= {"causal": True}
    q, k, v = qkv(seed)
    want = ssa_attention(q, k, v, **options)
    k2, v2 = k.copy(), v.copy()
    k2[:, :, 5:], v2[:, :, 5:] = 3.0, -3.0
    np.testing.assert_array_equal(ssa_attention(q, k2, v2, **options)[:, :, :5], want[:, :, :5])
    do = np.where(np.arange(9)[:, None] < 5, q, 0.0)
    _, dk, dv = ssa_attention_bwd(do, q, k, v, **options)
    assert not dk[:, :, 5:].any()
    assert not dv[:, :, 5:].any()
    alone = ssa_attention(q, k, v, source_index=np.array([8]), causal=True)
    assert not alone[:, :, :8].any()  # nobody but the last query sees the last source
    alone = ssa_attention(q, k, v, source_index=np.array([8]), causal=True, include_self=True)
    np.testing.assert_array_equal(alone[:, :, :8], v[:, :, :8])


def law_subsampled_huge_scores_stay_finite():
    q, k, v = 1e3 * qkv(0)
    perm = np.arange(9)[::-1]
    local = {"perm": perm, "block": 2, "left": 1, "include_self": True}
    for options in ({"source_index": np.array([2, 5])}, local):
        assert np.isfinite(ssa_attention(q, k, v, **options)).all()
        assert all(np.isfinite(g).all() for g in ssa_attention_bwd(v, q, k, v, **options))


@given(seeds, st.integers(1, 12), st.floats(0, 100))
def law_subsampled_draws_are_permutations(seed, n, sigma):
    rng = np.random.default_rng(seed)
    assert sorted(local_permutation(rng.standard_normal(n), sigma=sigma)) == list(range(n))
    grid = local_permutation_2d(rng.standard_normal((2, 3, n)), height=3, width=n, sigma=(sigma, 1.0))
    assert sorted(grid) == list(range(3 * n))
    k = int(rng.integers(1, n + 1))
    u = rng.random(n)
    some = sample_sources(u, k)
    assert len(some) == k
    assert (np.diff(some) > 0).all()
    assert u[some].max() <= np.delete(u, some).min(initial=1)


@given(seeds)
def law_subsampled_grid_shuffles_each_axis(seed):
    """No noise is the identity; noise along the columns alone keeps every row, and the other way round."""
    noise = np.random.default_rng(seed).standard_normal((2, 4, 5))
    draw = lambda *sigma: local_permutation_2d(noise, height=4, width=5, sigma=sigma).reshape(4, 5)
    np.testing.assert_array_equal(draw(0, 0), np.arange(20).reshape(4, 5))
    np.testing.assert_array_equal(draw(0, 9) // 5, np.arange(4)[:, None].repeat(5, 1))
    assert (np.diff(draw(9, 0) % 5, axis=1) >= 0).all()  # within a row of slots, columns stay in order


def law_subsampled_products_are_counted():
    """Unbiased: 2 n k D a head, as ssa_cost says; local: 2 block^2 D for every pair of blocks that meets."""
    q, k, v = qkv(0, L=12, B=1, H=2, D=4)

    def macs(**options):
        tally = Tally()
        ssa_attention(*count(tally, q, k, v), **options)
        return tally.macs

    cost = ssa_cost(12, 8, num_heads=2, reduction=4)
    assert macs(source_index=np.array([1, 5, 7])) == cost["macs"] == 2 * 2 * 12 * 3 * 4
    pairs = 2 + 3 + 3 + 2  # four blocks, a neighbour on either side
    assert macs(perm=np.arange(12), block=3, left=1, right=1) == 2 * 2 * pairs * 3 * 3 * 4
    assert cost["score_elements"] == 2 * 12 * 3
    assert cost["bytes"] == np.zeros((2, 12, 3), np.float32).nbytes + 2 * np.zeros((3, 8), np.float32).nbytes
    assert cost["projection_macs"] == (12 + 3 + 3) * 64
    local = ssa_cost(12, 8, num_heads=2, reduction=4, kind="local")
    assert local["macs"] == cost["macs"]
    assert local["projection_macs"] == 3 * 12 * 64
    assert local["bytes"] - cost["bytes"] == 4 * 2 * 9 * 8


def law_subsampled_every_source_is_as_likely():
    """2,000 draws of 3 among 8: every share within 4 standard errors of 3/8."""
    rng = np.random.default_rng(0)
    hits = np.bincount(np.concatenate([sample_sources(rng.random(8), 3) for _ in range(2000)]), minlength=8)
    assert (np.abs(hits / 2000 - 3 / 8) <= 4 * np.sqrt(3 / 8 * 5 / 8 / 2000)).all()


def law_subsampled_local_edges_fade_with_distance():
    """2,000 draws: rarer with distance, none impossible; mirrored alike, to 4 standard errors."""
    noise = np.random.default_rng(0).standard_normal((2000, 24))
    p = edge_probability(noise, sigma=6.0, block=4, left=1, right=1)
    i, j = np.mgrid[:24, :24]
    by_distance = [p[np.abs(i - j) == d].mean() for d in range(24)]
    assert spearman(np.array(by_distance), np.arange(24.0)) < -0.9
    mirrored = p[::-1, ::-1]
    both = (p + mirrored) / 2
    assert (np.abs(p - mirrored) <= 4 * np.sqrt(2 * both * (1 - both) / 2000) + 1e-12).all()
    assert (edge_probability(noise, sigma=50.0, block=4, left=1, right=1) > 0).all()


@given(seeds, st.integers(1, 6))
def law_subsampled_variance_is_that_of_drawing_without_replacement(seed, k):
    """Flat scores, every subset of 6: the mean over subsets is dense, the variance S^2 / k (1 - k / 6)."""
    v = np.random.default_rng(seed).standard_normal((1, 1, 6, 2))
    zero = np.zeros_like(v)
    run = lambda s: ssa_attention(zero, zero, v, source_index=np.array(s))[0, 0, 0]
    runs = np.stack([run(s) for s in combinations(range(6), k)])
    atol = 64 * EPS * np.abs(v).max()  # sums of 20 means of 6
    np.testing.assert_allclose(runs.mean(axis=0), v[0, 0].mean(axis=0), rtol=0, atol=atol)
    want = v[0, 0].var(axis=0, ddof=1) / k * (1 - k / 6)
    np.testing.assert_allclose(runs.var(axis=0), want, rtol=0, atol=64 * EPS * (v**2).max())


def law_subsampled_is_biased_and_less_so_with_more_sources():
    """A ratio of sums: over every subset of 8, the mean misses dense attention by an amount that shrinks."""
    q, k, v = qkv(0, L=8, B=1, H=1)
    dense = attention_dense(q, k, v)
    bias = []
    for n in range(1, 9):
        runs = [ssa_attention(q, k, v, source_index=np.array(s)) for s in combinations(range(8), n)]
        bias.append(np.linalg.norm(np.mean(runs, axis=0) - dense))
    assert (np.diff(bias) < 0).all()
    assert bias[0] > 0.1  # one source: its value, whatever the scores
    assert bias[-1] <= 64 * rounding(q, k, v)


def letters(batch, T, seed=0):
    """ids [batch, T + 1] of Hamlet and the size of its alphabet."""
    ids = np.unique(list(text()), return_inverse=True)[1]
    starts = np.random.default_rng(seed).integers(0, len(ids) - T - 1, batch)
    return np.stack([ids[s : s + T + 1] for s in starts]), int(ids.max()) + 1


@settings(max_examples=3)
@given(seeds, st.sampled_from((None, 4)))
def law_subsampled_model_gradients_are_central_differences(seed, block):
    rng = np.random.default_rng(seed)
    ids, params = rng.integers(0, 7, (2, 11)), init_gpt(rng, vocab=7, context=10, dim=6, depth=2, std=0.4)
    config = SSAConfig(2, block=block)
    schedule = SSASchedule(3) if block is None else SSASchedule(1, sigma=2.0, block=block)
    drawn = schedule.sources(rng, 0, 1, n=10, depth=2)[0]
    call = {"config": config, "sources": (drawn, None)}  # one layer dense
    grads = ssa_transformer_loss_vjp(params, ids, **call)
    d = drawn_like(params, rng)
    slope, change = slope_of(lambda h: ssa_transformer_loss(moved(params, d, h), ids, **call))
    # the coarser step's change measures h^2 f'''; rounding is eps f / h
    np.testing.assert_allclose(along(grads, d), slope, rtol=0, atol=2 * change + 1e-9)
    dense = ssa_transformer(params, ids[:, :-1], config=config, sources=None)
    np.testing.assert_array_equal(dense, gpt_forward(ids[:, :-1], params, num_heads=2))


def law_subsampled_schedule_ends_dense():
    rng, schedule = np.random.default_rng(0), SSASchedule(reduction=4, finetune_fraction=0.1)
    assert schedule.dense_from(50) == 45
    assert schedule.sources(rng, 45, 50, n=10, depth=2) is None
    first, second = schedule.sources(rng, 44, 50, n=10, depth=2)
    assert len(first) == len(second) == 3  # ceil(10 / 4)
    draws = {tuple(s) for _ in range(9) for s in schedule.sources(rng, 0, 50, n=10, depth=2)}
    assert len(draws) > 9  # fresh for every layer and step
    local = SSASchedule(sigma=2.0, block=4).sources(rng, 0, 50, n=10, depth=2)
    assert all(sorted(p) == list(range(10)) for p in local)
    assert SSASchedule(finetune_fraction=0).dense_from(50) == 50


def law_subsampled_ensemble_averages_out_the_draws():
    """Variance of the averaged probabilities falls like 1 / R: slope of the logarithms -1 within 0.2."""
    q, k, v = qkv(0, L=12, B=1, H=1, D=4)
    rng = np.random.default_rng(0)
    one = lambda: ssa_attention(q, k, v, source_index=sample_sources(rng.random(12), 4))[0, 0, 0]
    logits = np.stack([2 * one() for _ in range(1024)])
    sizes = [1, 2, 4, 8, 16]
    runs = [[self_ensemble(part).tolist() for part in np.split(logits, 1024 // R)] for R in sizes]
    variance = [np.var(r, axis=0).sum() for r in runs]
    assert abs(np.polyfit(np.log(sizes), np.log(variance), 1)[0] + 1) < 0.2
    np.testing.assert_array_equal(self_ensemble(logits[:1]), self_ensemble(logits[:1], average="logit"))


def law_subsampled_model_learns_and_its_ensemble_obeys_jensen():
    """Letters of Hamlet, a quarter of the sources, one seed: the loss falls below that of equal chances.

    -log of the mean probability is at most the mean of the -logs, for every letter.
    """
    ids, V = letters(8, 24)
    rng, schedule, config = np.random.default_rng(0), SSASchedule(4), SSAConfig(2)
    params = init_gpt(rng, vocab=V, context=24, dim=16, depth=2, hidden=32, std=0.1)
    state, losses = adam_init(params), []
    for step in range(40):
        call = {"config": config, "sources": schedule.sources(rng, step, 40, n=24, depth=2)}
        losses.append(ssa_transformer_loss(params, ids, **call))
        params, state = adam(params, ssa_transformer_loss_vjp(params, ids, **call), state, lr=0.01)
    assert np.mean(losses[-5:]) < np.log(V) - 0.5
    x, labels, rng = ids[:, :-1], ids[:, 1:], np.random.default_rng(1)
    averaged = ssa_ensemble(rng, params, x, config=config, schedule=schedule, samples=4)
    rng = np.random.default_rng(1)  # the same draws, one by one
    draw = lambda: schedule.sources(rng, 0, 1, n=24, depth=2)
    runs = np.stack([ssa_transformer(params, x, config=config, sources=draw()) for _ in range(4)])
    np.testing.assert_array_equal(averaged, self_ensemble(runs))
    each = np.mean([negative_log_likelihood(r, labels) for r in runs], axis=0)
    nll = -np.log(np.take_along_axis(averaged, labels[..., None], axis=-1)[..., 0])
    assert (nll <= each + 64 * EPS * (1 + each)).all()
    assert nll.mean() < each.mean()
