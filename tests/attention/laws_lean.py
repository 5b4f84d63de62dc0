"""Laws of Lean Attention on ref alone: NumPy and Hypothesis."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.attention.lean import (
    SoftmaxState,
    combine_partials,
    decode_makespan,
    finalize,
    flash_decoding_attention,
    lean_attention,
    merge,
    num_splits_heuristic,
    stream_k_schedule,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
batches = st.lists(st.integers(1, 40), min_size=1, max_size=4)
workers = st.integers(1, 200)


def qkv(seed, B, H, Hkv, S, D=4, Dv=3, L=None, gain=1.0):
    rng = np.random.default_rng(seed)
    q = gain * rng.standard_normal((B, H, D) if L is None else (B, H, L, D))
    return q, gain * rng.standard_normal((B, Hkv, S, D)), rng.standard_normal((B, Hkv, S, Dv))


def dense(q, k, v, lengths):
    """One softmax a row, by the definition: (o, lse)."""
    B, H = q.shape[:2]
    rows = q.reshape(B, H, -1, q.shape[-1])
    o, lse = np.empty((*rows.shape[:-1], v.shape[-1])), np.empty(rows.shape[:-1])
    for b in range(B):
        for h in range(H):
            g, n = h * k.shape[1] // H, lengths[b]
            s = rows[b, h] @ k[b, g, :n].T / np.sqrt(q.shape[-1])
            m = s.max(axis=-1, keepdims=True)
            p = np.exp(s - m)
            o[b, h] = p @ v[b, g, :n] / p.sum(axis=-1, keepdims=True)
            lse[b, h] = np.log(p.sum(axis=-1)) + m[:, 0]
    return o.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])


@given(
    seeds, batches, st.integers(1, 45), workers, st.sampled_from(((1, 1), (4, 2), (3, 3))),
    st.sampled_from((None, 1, 3)), st.sampled_from((1.0, 30.0)), st.sampled_from(("paper", "all")),
)  # fmt: skip
def law_lean_equals_the_definition_for_every_schedule(seed, lengths, block, W, heads, L, gain, grid):
    q, k, v = qkv(seed, len(lengths), *heads, 40, L=L, gain=gain)
    want, want_lse = dense(q, k, v, lengths)
    options = {"lengths": np.array(lengths), "block_n": block, "num_workers": W, "return_lse": True}
    # a score of size s carries eps s D, which exp passes on to weights of |v|; merging adds a few eps a tile
    scores = np.abs(want_lse).max() + 1
    atol = 64 * EPS * scores * np.abs(v).max()
    for o, lse in (
        lean_attention(q, k, v, grid=grid, **options),
        flash_decoding_attention(q, k, v, **options),
        flash_decoding_attention(q, k, v, num_splits=3, **options),
    ):
        np.testing.assert_allclose(o, want, rtol=0, atol=atol)
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=64 * EPS * scores)


@given(batches, st.integers(1, 6), st.integers(1, 12), workers, st.sampled_from(("paper", "all")))
def law_lean_schedule_does_every_tile_once_in_equal_runs(lengths, heads, block, W, grid):
    plan = stream_k_schedule(np.array(lengths), heads, block_n=block, num_workers=W, grid=grid)
    tiles = [-(-n // block) for n in lengths]
    T = heads * sum(tiles)
    assert plan.tiles_per_head == sum(tiles)
    assert plan.count.sum() == T
    assert plan.count.max() - plan.count.min() <= 1
    assert plan.count.max() == plan.max_tiles
    assert (plan.count == plan.max_tiles).sum() == plan.high_load
    assert plan.even == (plan.count.min() == plan.count.max() and T % plan.num_programs == 0)
    assert plan.num_programs <= max(W, (T + 1) // 2)
    seen = np.zeros((heads * len(lengths), max(tiles)), int)
    for worker, output, lo, hi, host, finishing in plan.segments:
        assert lo < hi <= tiles[output % len(lengths)]
        seen[output, lo:hi] += 1
        assert host == (lo == 0)
        assert finishing == (hi == tiles[output % len(lengths)])
        assert 0 <= worker < plan.num_programs
    for output, row in enumerate(seen):
        n = tiles[output % len(lengths)]
        assert (row[:n] == 1).all()
        assert not row[n:].any()
        mine = plan.segments[plan.segments[:, 1] == output]
        assert mine[:, 4].sum() == 1  # one host
        assert len(mine) <= plan.max_splits
        assert (np.diff(mine[:, 0]) == 1).all()  # helped by the next workers, in order
    guests = plan.segments[plan.segments[:, 4] == 0]
    assert len(set(guests[:, 0].tolist())) == len(guests)  # one scratch slot a worker is enough
    assert len(guests) <= plan.num_programs - 1


def states(seed, n, gain=3.0):
    rng = np.random.default_rng(seed)
    make = lambda: SoftmaxState(
        gain * rng.standard_normal(2), rng.uniform(0.5, 4, 2), rng.standard_normal((2, 3))
    )
    return [make() for _ in range(n)]


@given(seeds)
def law_lean_partial_states_merge_in_any_order(seed):
    a, b, c = states(seed, 3)
    none = SoftmaxState(np.full(2, -np.inf), np.zeros(2), np.zeros((2, 3)))
    for x, y in (
        (merge(merge(a, b), c), merge(a, merge(b, c))),
        (merge(a, b), merge(b, a)),
        (merge(a, none), a),
        (merge(none, none), none),
    ):
        for u, w in zip(x, y, strict=True):
            np.testing.assert_allclose(u, w, rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 6), st.sampled_from((0, -1)))
def law_lean_combining_results_is_merging_states(seed, n, axis):
    parts = states(seed, n)
    whole = parts[0]
    for p in parts[1:]:
        whole = merge(whole, p)
    o, lse = (np.stack(x) for x in zip(*map(finalize, parts), strict=True))
    if axis == -1:
        o, lse = np.moveaxis(o, 0, -2), np.moveaxis(lse, 0, -1)
    got, want = combine_partials(o, lse, axis=axis), finalize(whole)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def law_lean_combining_ignores_parts_that_saw_nothing():
    o, lse = np.array([[1.0, 2.0], [np.nan, np.nan]]), np.array([0.5, -np.inf])
    got = combine_partials(o, lse)
    np.testing.assert_allclose(got[0], [1, 2])
    np.testing.assert_allclose(got[1], 0.5)
    empty = combine_partials(o[:1] * 0, np.array([-np.inf]))
    np.testing.assert_array_equal(empty[0], 0)
    assert empty[1] == -np.inf


@given(seeds, batches, workers)
def law_lean_padding_and_order_of_requests_do_not_matter(seed, lengths, W):
    B = len(lengths)
    q, k, v = qkv(seed, B, 4, 2, 40)
    options = {"block_n": 8, "num_workers": W}
    want = lean_attention(q, k, v, lengths=np.array(lengths), **options)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = np.nan, np.inf
    np.testing.assert_array_equal(lean_attention(q, k, v, lengths=np.array(lengths), **options), want)
    p = np.random.default_rng(seed).permutation(B)
    again = lean_attention(q[p], k[p], v[p], lengths=np.array(lengths)[p], **options)
    np.testing.assert_allclose(again, want[p], rtol=0, atol=1e-12)


@given(seeds, workers)
def law_lean_single_keys_and_packed_rows(seed, W):
    q, k, v = qkv(seed, 2, 4, 2, 9, L=3)
    o = lean_attention(q, k, v, lengths=np.array([1, 1]), num_workers=W)
    np.testing.assert_allclose(o, np.repeat(v[:, :, :1], 2, axis=1).repeat(3, axis=2), rtol=4 * EPS)
    packed = lean_attention(q, k, v, block_n=4, num_workers=W)
    for i in range(3):
        alone = lean_attention(q[:, :, i], k, v, block_n=4, num_workers=W)
        np.testing.assert_allclose(packed[:, :, i], alone, rtol=0, atol=1e-12)


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 60), st.integers(1, 140), st.integers(1, 9))
def law_lean_is_never_slower_than_a_fixed_split(heads, batch, tiles, W, splits):
    """Equal lengths, no costs: lean = ceil(T / G) <= every fixed split; the heuristic never loses."""
    run = lambda method, **o: decode_makespan(
        [8 * tiles] * batch, heads, block_n=8, num_workers=W, method=method, **o
    )
    lean, fa2, split = run("lean"), run("fa2"), run("flash_decoding")
    T = heads * batch * tiles
    assert lean["makespan"] == -(-T // min(W, T))
    assert lean["makespan"] <= run("flash_decoding", num_splits=splits)["makespan"]
    assert lean["makespan"] <= split["makespan"] <= fa2["makespan"]
    if tiles % splits == 0:
        assert run("flash_decoding", num_splits=splits)["makespan"] <= fa2["makespan"]
    for x in (lean, fa2, split):
        assert 0 < x["occupancy"] <= 1
    if T >= 100 * W:
        assert lean["occupancy"] >= 0.99
    if T > W:
        assert lean["occupancy"] >= T / (T + W - 1) - 1e-12
    slow = run("lean", merge_cost=0.5, launch_cost=2.0)
    assert lean["makespan"] + 2 <= slow["makespan"] <= lean["makespan"] + 2 + 0.5 * lean["num_splits"]


def law_lean_check_values():
    """Pure tile counts, and the whole grid of the chapter: no sub-grid is chosen."""
    one = lambda method, **o: decode_makespan([65536], 56, block_n=256, num_workers=132, method=method, **o)
    assert one("fa2")["makespan"] == 256
    assert (one("flash_decoding")["makespan"], one("flash_decoding")["num_splits"]) == (128, 2)
    assert one("lean")["makespan"] == 109
    alone = decode_makespan([9, 2], 3, block_n=2, num_workers=1)  # one worker: the plain online softmax
    assert (alone["makespan"], alone["partial_states"], alone["occupancy"]) == (18, 0, 1)
    unlucky = decode_makespan([3 * 8], 108, block_n=8, num_workers=108, method="flash_decoding", num_splits=2)
    assert unlucky["makespan"] == 4  # two waves of two tiles, more than the three of one worker an output
    means = {}
    for W in (108, 132):
        ratios = {"all": [], "paper": []}
        for B, H, e in product((1, 2, 4, 8), (8, 16, 32, 48, 56, 64), range(10)):
            run = lambda method, B=B, H=H, e=e, W=W, **o: decode_makespan(
                [1024 << e] * B, H, block_n=256, num_workers=W, method=method, **o
            )["makespan"]
            rivals = np.array([run("fa2"), run("flash_decoding")])
            lean = run("lean")
            ratios["all"].append(rivals / lean)  # grids differ only where tiles are few
            few = B * H * 4 * 2**e <= W
            ratios["paper"].append(rivals / (run("lean", grid="paper") if few else lean))
        for grid, found in ratios.items():
            r = np.array(found)
            means[W, grid] = [*np.exp(np.log(r).mean(axis=0)).round(3), *r.max(axis=0).round(3), r.min()]
    assert means[108, "all"] == [1.954, 1.22, 13.474, 1.928, 1.0]
    assert means[132, "all"] == [1.995, 1.062, 16.384, 1.375, 1.0]
    assert means[108, "paper"][:2] == [1.931, 1.206]
    assert means[132, "paper"][:2] == [1.938, 1.032]
    assert means[108, "paper"][4] == means[132, "paper"][4] == 0.5


@given(st.integers(1, 200), st.integers(1, 140), st.integers(1, 60), st.integers(1, 128))
def law_lean_heuristic_takes_the_fewest_good_parts(outputs, W, tiles, most):
    S = num_splits_heuristic(outputs, W, tiles, most)
    if outputs >= 0.8 * W:
        assert S == 1
        return
    parts = [-(-tiles // s) for s in range(1, min(W, tiles, most) + 1)]
    able = [s for s in range(1, len(parts) + 1) if s == 1 or parts[s - 1] != parts[s - 2]]
    good = lambda s: (outputs * s / W) / -(-outputs * s // W)
    best = max(map(good, able))
    assert S in able
    assert good(S) >= 0.85 * best
    assert all(good(s) < 0.85 * best for s in able if s < S)


def law_lean_exercises_have_the_solutions_of_the_chapter():
    """What the folded solutions print."""
    plan = lambda m, s=None: decode_makespan([24], 108, block_n=8, num_workers=108, method=m, num_splits=s)
    assert [plan("fa2")["makespan"], plan("flash_decoding", 2)["makespan"], plan("lean")["makespan"]] == [
        3,
        4,
        3,
    ]
    o, lse = np.array([[1.0], [0.0]]), np.array([5.0, np.log(1000)])
    want = np.exp(5) / (np.exp(5) + 1000)
    np.testing.assert_allclose(combine_partials(o, lse)[0], want, rtol=1e-12)
    s = stream_k_schedule(np.array([40]), 3, block_n=1, num_workers=9)
    assert np.bincount(s.segments[:, 1]).max() <= s.max_splits
    o, lse = combine_partials(np.array([[4.0], [10.0]]), np.array([0.0, np.log(2)]))
    np.testing.assert_allclose((o[0], lse), (8, np.log(3)), rtol=1e-12)
