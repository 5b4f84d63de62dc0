"""Laws of attention pruning on ref alone: NumPy and Hypothesis."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.attention.attention_pruning import (
    PatternObserver,
    attention_probs,
    pruned_attention,
    pruned_attention_bwd,
    pruned_self_attention,
    pruned_self_attention_vjp,
    pruning_bounds,
    pruning_mask,
    pruning_report,
    pruning_threshold,
    random_keep_mask,
    running_average,
    to_block_mask,
)
from ref.attention.block_sparse_flash import block_sparse_attention
from ref.blocks.attention import attention_dense
from ref.blocks.masks import causal_mask
from ref.blocks.transformer import QKVParams
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
rules = st.sampled_from(("zero", "official"))
gains = st.sampled_from((1.0, 30.0, 1e-3))  # ordinary, saturated, nearly flat softmax
fractions = st.sampled_from((0.0, 0.3, 0.5, 0.9, 0.99))


def pattern(seed, L=2, H=2, N=6, M=6, *, causal=False, padded=0):
    """Average attention of a few random examples [L, H, N, M], the last `padded` positions never seen."""
    rng = np.random.default_rng(seed)
    s = rng.standard_normal((4, L, H, N, M)) * 2
    e = np.exp(s) * (causal_mask(N, M) if causal else 1.0)
    if padded:
        e[..., N - padded :, :], e[..., M - padded :] = 0, 0
    return (e / np.maximum(e.sum(-1, keepdims=True), 1e-30)).mean(axis=0)


def rounding(q, k, v):
    """Scores of D products off by 2 D eps |q||k|, exp passes it on; sums of m terms of |v|."""
    scores = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    return EPS * (4 * (q.shape[-1] + 2) * scores + 2 * k.shape[-2] + 8) * max(1.0, np.abs(v).max())


def definition(q, k, v, scale, kept):
    """One head, row by row with exact sums, sharing no line with ref."""
    o = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        cols = [j for j in range(len(k)) if kept[i, j]]
        s = [scale * math.fsum(q[i] * k[j]) for j in cols]
        e = [math.exp(x - max(s)) for x in s]
        for w, j in zip(e, cols, strict=True):
            o[i] += w / math.fsum(e) * v[j]
    return o


@given(
    seeds, st.integers(1, 6), st.integers(1, 6), gains, st.booleans(), st.sampled_from(("zero", "official"))
)
def law_attention_pruning_equals_the_definition(seed, n, m, gain, causal, empty_rows):
    rng = np.random.default_rng(seed)
    m = n if causal else m
    q, k, v = (gain * rng.standard_normal((2, 2, s, 3)) for s in (n, m, m))
    keep, mask = rng.random((2, n, m)) < 0.4, rng.random((2, 1, 1, m)) < 0.8
    o, p = pruned_attention(
        q, k, v, keep, mask=mask, causal=causal, empty_rows=empty_rows, return_probs=True, scale=0.5
    )
    for b, h in np.ndindex(2, 2):
        seen = np.broadcast_to(mask[b, 0], (n, m)) & (causal_mask(n, m) if causal else True)
        kept = seen & keep[h]
        if empty_rows == "official":  # a row without a kept key sees all that it would have seen
            kept = np.array([kept[i] if kept[i].any() else seen[i] for i in range(n)])
        want = definition(q[b, h], k[b, h], v[b, h], 0.5, kept)
        np.testing.assert_allclose(o[b, h], want, rtol=0, atol=rounding(q, k, v))
        assert not p[b, h][~kept].any()
        np.testing.assert_allclose(p[b, h].sum(-1), kept.any(-1), rtol=0, atol=(m + 4) * EPS)


@given(seeds, st.booleans())
def law_attention_pruning_with_nothing_pruned_is_dense(seed, causal):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 2, 4, 5, 3))
    k, v = k[:, :2], v[:, :2]  # two query heads a key head
    want = attention_dense(q, k, v, causal=causal)
    got = pruned_attention(q, k, v, np.ones((5, 5), bool), causal=causal)
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(q, k, v))
    probs = attention_probs(q, k, causal=causal)
    np.testing.assert_allclose(probs @ np.repeat(v, 2, axis=1), want, rtol=0, atol=rounding(q, k, v))


@given(seeds, st.booleans(), rules)
def law_attention_pruning_gradients_are_central_differences(seed, causal, empty_rows):
    """Error h^2 f''' + eps f / h; with h = 1e-5 and entries of order 1 both stay under 1e-8 of the sum."""
    rng = np.random.default_rng(seed)
    args, h = [rng.standard_normal((2, heads, 5, 3)) for heads in (4, 2, 2)], 1e-5
    keep, do = rng.random((4, 5, 5)) < 0.4, rng.standard_normal((2, 4, 5, 3))
    options = {"causal": causal, "empty_rows": empty_rows, "scale": 0.7}
    grads = pruned_attention_bwd(do, *args, keep, **options)
    for n, g in enumerate(grads):
        d = rng.standard_normal(g.shape)
        moved = lambda t, n=n, d=d: [x + t * d if i == n else x for i, x in enumerate(args)]
        at = lambda t, moved=moved: np.sum(do * pruned_attention(*moved(t), keep, **options))
        size = (1 + np.abs(do).sum()) * max(np.abs(args[2]).max(), 1) * max(1, np.abs(d).max()) ** 3
        np.testing.assert_allclose(np.sum(g * d), (at(h) - at(-h)) / (2 * h), rtol=0, atol=1e-8 * size)


@given(seeds)
def law_attention_pruning_layer_gradients_are_central_differences(seed):
    rng = np.random.default_rng(seed)
    x, do = rng.standard_normal((2, 4, 6)), rng.standard_normal((2, 4, 6))
    params = QKVParams(*(rng.standard_normal(s) / 2 for s in ((6, 6), 6) * 3))
    keep = rng.random((3, 4, 4)) < 0.5
    dx, dparams = pruned_self_attention_vjp(x, params, keep, do, num_heads=3, causal=True)
    f = lambda x, params: np.sum(do * pruned_self_attention(x, params, keep, num_heads=3, causal=True))
    directions = [rng.standard_normal(a.shape) for a in (x, *params)]
    moved = lambda t: [a + t * d for a, d in zip((x, *params), directions, strict=True)]
    at = lambda t: f(moved(t)[0], QKVParams(*moved(t)[1:]))
    got = sum(np.sum(g * d) for g, d in zip((dx, *dparams), directions, strict=True))
    slope, change = slope_of(at)
    # the coarser step's change measures h^2 f'''; rounding is eps f / h
    atol = 2 * change + 1e-9 * (1 + np.abs(do).sum())
    np.testing.assert_allclose(got, slope, rtol=0, atol=atol)


@given(seeds)
def law_attention_pruning_pruned_cells_have_no_gradient_and_may_hold_nan(seed):
    """A key that no row keeps, and a query that keeps no key: bit for bit without influence."""
    q, k, v, do = np.random.default_rng(seed).standard_normal((4, 1, 2, 5, 3))
    keep = np.ones((2, 5, 5), bool)
    keep[:, :, 3], keep[:, 1] = False, False
    want = pruned_attention(q, k, v, keep), *pruned_attention_bwd(do, q, k, v, keep)
    q2, k2, v2 = q.copy(), k.copy(), v.copy()
    q2[:, :, 1], k2[:, :, 3], v2[:, :, 3] = np.nan, np.nan, np.nan
    got = pruned_attention(q2, k2, v2, keep), *pruned_attention_bwd(do, q2, k2, v2, keep)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not want[0][:, :, 1].any()
    assert not want[1][:, :, 1].any()
    assert not want[2][:, :, 3].any()
    assert not want[3][:, :, 3].any()


def law_attention_pruning_huge_scores_stay_finite():
    q, k, v = 1e3 * np.random.default_rng(0).standard_normal((3, 1, 1, 6, 4))
    keep = np.tri(6, k=-1, dtype=bool)
    assert np.isfinite(pruned_attention(q, k, v, keep)).all()
    assert all(np.isfinite(g).all() for g in pruned_attention_bwd(v, q, k, v, keep, empty_rows="official"))


@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=4))
def law_attention_pruning_average_does_not_depend_on_batches(seed, sizes):
    """Any split, also into empty batches, and any order: the mean over examples."""
    rng = np.random.default_rng(seed)
    probs = rng.random((sum(sizes), 2, 3, 4))
    avg, count, at = np.zeros((2, 5, 4)), np.zeros((2, 5, 4), np.int64), 0
    for b in sizes:
        avg, count = running_average(avg, count, probs[at : at + b])
        at += b
    want = probs.sum(axis=0) / max(1, len(probs))
    atol = EPS * (4 * len(probs) + 4)  # sums of numbers under 1
    np.testing.assert_allclose(avg[:, :3], want, rtol=0, atol=atol)
    assert not avg[:, 3:].any()
    assert (count[:, :3] == len(probs)).all()
    assert not count[:, 3:].any()
    mixed = probs[rng.permutation(len(probs))]
    once = running_average(np.zeros((2, 3, 4)), np.zeros((2, 3, 4), np.int64), mixed)[0]
    np.testing.assert_allclose(once, want, rtol=0, atol=atol)


@given(seeds)
def law_attention_pruning_observer_counts_what_examples_have(seed):
    """Ragged examples: a cell's mean is over those that reach it, whatever stands in the padding."""
    rng = np.random.default_rng(seed)
    lengths, probs = rng.integers(1, 6, 6), rng.random((6, 2, 5, 5))
    for b, n in enumerate(lengths):
        probs[b, :, n:], probs[b, :, :, n:] = np.nan, np.nan
    seen = PatternObserver(3, 2, 7, 7)
    for cut in (slice(2), slice(2, 6)):
        seen = seen.update(1, probs[cut], lengths=lengths[cut])
    avg = seen.average()
    assert avg.shape == (3, 2, 7, 7)
    assert not avg[[0, 2]].any()
    for i, j in np.ndindex(7, 7):
        have = [b for b in range(6) if max(i, j) < lengths[b]]
        want = sum(probs[b, :, i, j] for b in have) / len(have) if have else np.zeros(2)
        np.testing.assert_allclose(avg[1, :, i, j], want, rtol=0, atol=32 * EPS)
        assert (seen.count[1, :, i, j] == len(have)).all()


@given(seeds)
def law_attention_pruning_rows_of_the_average_sum_to_one(seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 3, 2, 5, 4))
    seen = PatternObserver(1, 2, 5, 5).update(0, attention_probs(q, k, causal=True))
    np.testing.assert_allclose(seen.average().sum(axis=-1), 1, rtol=0, atol=16 * EPS)
    full = seen.update(0, attention_probs(q, k, causal=True), lengths=np.full(3, 5))
    np.testing.assert_allclose(full.average(), seen.average(), rtol=0, atol=16 * EPS)


@given(seeds, fractions, st.integers(0, 2), st.booleans())
def law_attention_pruning_threshold_is_the_nearest_rank(seed, fraction, padded, causal):
    avg = pattern(seed, padded=padded, causal=causal)
    n = 6 - padded
    assert pruning_bounds(avg, mode="exact") == (n, n)
    assert pruning_bounds(avg) == ((n, n) if padded else (5, 5))  # the last row is lost without padding
    cells = np.sort(avg[0, :, :n, :n], axis=None)
    tau = pruning_threshold(avg, fraction, bounds="exact")
    assert tau.shape == (2,)
    assert tau[0] == cells[round(fraction * (len(cells) - 1))]
    visible = causal_mask(6, 6)
    some = pruning_threshold(avg, fraction, bounds="exact", count_masked=False, visible=visible)[0]
    counted = np.sort(avg[0, :, :n, :n][:, visible[:n, :n]], axis=None)
    assert some == counted[round(fraction * (len(counted) - 1))]
    by_head = pruning_threshold(avg, fraction, bounds="exact", per="head")
    each = [
        [pruning_threshold(avg[l : l + 1, h : h + 1], fraction, bounds="exact")[0] for h in (0, 1)]
        for l in (0, 1)
    ]
    np.testing.assert_array_equal(by_head, each)
    both = np.sort(avg[:, :, :n, :n], axis=None)
    everywhere = pruning_threshold(avg, fraction, bounds="exact", per="global")
    assert everywhere == both[round(fraction * (len(both) - 1))]


@given(seeds, fractions, fractions, st.sampled_from(("layer", "head", "global")), st.booleans())
def law_attention_pruning_masks_are_nested(seed, a, b, per, keep_max):
    """A larger fraction keeps less; the count is that of the rank; keep_max leaves no row empty."""
    avg, visible = pattern(seed, causal=True), causal_mask(6, 6)
    options = {
        "bounds": "exact",
        "count_masked": False,
        "visible": visible,
        "per": per,
        "empty_rows": "keep_max" if keep_max else "zero",
    }
    less, more = (pruning_mask(avg, f, **options) for f in (max(a, b), min(a, b)))
    assert not (less & ~more).any()
    assert not (less & ~visible).any()
    if keep_max:
        assert less.any(axis=-1).all()
        top = np.argmax(avg, axis=-1)
        assert np.take_along_axis(less, top[..., None], axis=-1).all()
    else:
        heads = {"layer": 2, "head": 1, "global": 4}[per]
        pruned = (~less & visible).sum(axis={"layer": (1, 2, 3), "head": (2, 3), "global": None}[per])
        rank = round(max(a, b) * (21 * heads - 1))
        # distinct averages, but for the first query's: it sees one key, and all heads give it 1
        assert (pruned == (rank + 1 if rank < 20 * heads else 21 * heads)).all()


@given(seeds)
def law_attention_pruning_counting_the_future_prunes_little_else(seed):
    """p = 0.4 of a causal map is the future and one cell more, by the released rule; of what is seen, 13."""
    avg, visible = pattern(seed, L=1, causal=True), causal_mask(6, 6)
    keep = pruning_mask(avg, 0.4, empty_rows="official")  # box 5 x 5, 20 zeros among 50 cells, rank 20
    assert not keep[..., ~visible].any()
    assert (~keep & visible)[..., :5, :5].sum() == 1
    options = {"count_masked": False, "visible": visible, "empty_rows": "official"}
    assert (~pruning_mask(avg, 0.4, **options) & visible)[..., :5, :5].sum() == 13  # rank 12 of 30


@given(seeds)
def law_attention_pruning_fraction_zero_prunes_the_smallest_cells_alone(seed):
    avg = pattern(seed, L=1)
    keep = pruning_mask(avg, 0.0, bounds="exact", empty_rows="zero")
    np.testing.assert_array_equal(~keep, avg == avg.min())
    avg[0, :, 0] = 0.0
    keep = pruning_mask(avg, 0.0, bounds="exact", empty_rows="zero")
    np.testing.assert_array_equal(~keep, avg == 0)  # ties at the threshold go together
    rescued = pruning_mask(avg, 0.0, bounds="exact")
    assert rescued[0, :, 0].tolist() == [[True] + [False] * 5] * 2


@given(seeds)
def law_attention_pruning_recovers_the_support_of_a_fixed_pattern(seed):
    """Attention on two diagonals alone, whatever its values: the mask is those diagonals."""
    rng = np.random.default_rng(seed)
    i, j = np.ogrid[:8, :8]
    support = (i == j) | (i == j + 2)
    probs = np.where(support, rng.uniform(0.5, 1, (10, 2, 8, 8)), 0)
    avg = PatternObserver(1, 2, 8, 8).update(0, probs / probs.sum(-1, keepdims=True)).average()
    for fraction in (0.1, 0.5, 0.75):  # 14 of 64 cells are used
        np.testing.assert_array_equal(pruning_mask(avg, fraction, bounds="exact")[0], [support] * 2)
    profile = pruning_report(np.array([[support]]))["diagonal_profile"]
    np.testing.assert_array_equal(np.flatnonzero(profile), [7 - 2, 7])
    assert (profile[[5, 7]] == 1).all()


@given(seeds, fractions)
def law_attention_pruning_heads_commute(seed, fraction):
    avg = pattern(seed, H=3)
    order = np.random.default_rng(seed).permutation(3)
    got = pruning_mask(avg[:, order], fraction, bounds="exact")
    np.testing.assert_array_equal(got, pruning_mask(avg, fraction, bounds="exact")[:, order])


@given(seeds, st.integers(1, 4), st.integers(1, 4), fractions)
def law_attention_pruning_tiles_hold_the_mask(seed, block_q, block_k, fraction):
    """Rule "any" visits the tiles of kept cells and no other; rule "mean" prunes its share of tiles."""
    rng = np.random.default_rng(seed)
    avg = pattern(seed, L=1, N=7, M=9)[0]
    keep = pruning_mask(avg[None], fraction, bounds="exact")[0]
    tiles = to_block_mask(keep, None, block_q=block_q, block_k=block_k)
    cut = lambda x, t, r: x[t * r : (t + 1) * r]
    for h, a, b in np.ndindex(tiles.shape):
        assert tiles[h, a, b] == cut(cut(keep[h], a, block_q).T, b, block_k).any()
    q, k, v = (rng.standard_normal((2, n, 3)) for n in (7, 9, 9))
    got = block_sparse_attention(q, k, v, tiles, block_q=block_q, block_k=block_k, mask=keep)
    np.testing.assert_allclose(got, pruned_attention(q, k, v, keep), rtol=0, atol=rounding(q, k, v))
    visited = to_block_mask(None, avg, block_q=block_q, block_k=block_k, rule="mean", fraction=fraction)
    assert (~visited).sum() == math.floor(fraction * visited.size + 0.5)
    mean = np.array([[[cut(cut(avg[h], a, block_q).T, b, block_k).mean() for b in range(tiles.shape[2])]
                      for a in range(tiles.shape[1])] for h in range(2)])  # fmt: skip
    assert mean[visited].min(initial=1) >= mean[~visited].max(initial=0) - 8 * EPS


@given(seeds, fractions)
def law_attention_pruning_random_masks_keep_their_ratio(seed, fraction):
    uniforms, visible = np.random.default_rng(seed).random((2, 3, 6, 6)), causal_mask(6, 6)
    keep = random_keep_mask(uniforms, fraction, visible=visible)
    assert keep.sum() == 126 - math.floor(fraction * 126 + 0.5)
    assert not keep[..., ~visible].any()
    assert uniforms[keep].min() >= uniforms[~keep & visible].max(initial=0)
    assert (~random_keep_mask(uniforms, fraction)).sum() == math.floor(fraction * 216 + 0.5)
    report = pruning_report(keep)
    assert abs(report["density"] - keep.mean()) <= EPS
    np.testing.assert_allclose(report["per_head"].mean(axis=1), report["per_layer"], rtol=4 * EPS)
    np.testing.assert_allclose(report["per_layer"].mean(), keep.mean(), rtol=4 * EPS)
