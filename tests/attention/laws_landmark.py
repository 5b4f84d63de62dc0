"""Laws of landmark attention on ref alone: NumPy and Hypothesis."""

import math
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.attention.landmark import (
    LandmarkParams,
    LandmarkStore,
    grouped_softmax,
    init_landmark_cache,
    insert_landmarks,
    landmark_attention,
    landmark_attention_bwd,
    landmark_decode,
    landmark_mask,
    landmark_stream,
    retrieval_cost,
    select_blocks,
)
from ref.blocks.attention import attention_dense
from ref.blocks.rope import rope, rope_angles
from ref.blocks.softmax import softmax

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
gains = st.sampled_from((1.0, 40.0, 1e-3))  # ordinary, saturated, nearly flat softmax


def regular(n, block_size, batch=1):
    return np.broadcast_to(np.arange(n) % (block_size + 1) == block_size, (batch, n))


def definition(s, flags, causal=True):
    """Weights of one head, row by row with exact sums, sharing no line with ref; -inf = invisible."""
    L, S = s.shape
    before = [sum(flags[:j]) for j in range(S)]
    w = np.zeros((L, S))

    def shares(row, members):
        top = max((row[j] for j in members), default=-math.inf)
        if top == -math.inf:
            return dict.fromkeys(members, 0.0)
        e = {j: math.exp(row[j] - top) for j in members}
        total = math.fsum(e.values())
        return {j: x / total for j, x in e.items()}

    for i in range(L):
        at = S - L + i
        past = range(at + 1 if causal else S)
        own = [j for j in past if before[j] == before[at] and not flags[j]]
        marks = [j for j in past if flags[j] and before[j] != before[at]]
        p = shares(s[i], own + marks)
        for j in own:
            w[i, j] = p[j]
        for m in marks:
            inside = shares(s[i], [j for j in past if before[j] == before[m] and not flags[j]])
            for j, x in inside.items():
                w[i, j] = p[m] * x
    return w


def rounding(s):
    """Two softmaxes of S terms: each share is off by its exponent's rounding, 2 |s| eps, and (S + 4) eps."""
    return 2 * EPS * (2 * np.abs(s[np.isfinite(s)]).max(initial=0) + s.shape[-1] + 4)


@given(seeds, st.integers(1, 10), gains, st.sampled_from((0.0, 0.2, 0.5, 1.0)))
def law_landmark_equals_the_definition(seed, S, gain, share):
    """Any places of landmarks, also two in a row or none; L < S; some scores already invisible."""
    rng = np.random.default_rng(seed)
    L = rng.integers(1, S + 1)
    s, flags = gain * rng.standard_normal((2, 2, L, S)), rng.random((2, S)) < share
    s[rng.random(s.shape) < 0.1] = -np.inf
    w = grouped_softmax(s, flags)
    both = grouped_softmax(s, flags, causal=False)
    for b, h in np.ndindex(2, 2):
        np.testing.assert_allclose(w[b, h], definition(s[b, h], flags[b]), rtol=0, atol=rounding(s))
        want = definition(s[b, h], flags[b], causal=False)
        np.testing.assert_allclose(both[b, h], want, rtol=0, atol=rounding(s))
    assert (w >= 0).all()
    assert not w[np.broadcast_to(flags[:, None, None], w.shape)].any()
    assert not np.triu(w, S - L + 1).any()


@given(seeds, st.integers(1, 5), st.integers(1, 12), gains)
def law_landmark_rows_sum_to_one_on_regular_blocks(seed, block_size, N, gain):
    s = gain * np.random.default_rng(seed).standard_normal((1, 2, N, N))
    w = grouped_softmax(s, regular(N, block_size))
    np.testing.assert_allclose(w.sum(axis=-1), 1, rtol=0, atol=4 * (N + 4) * EPS)


@given(seeds)
def law_landmark_empty_groups_give_zero(seed):
    """A first position that is a landmark sees nothing; a block that is only its landmark loses its mass."""
    s = np.random.default_rng(seed).standard_normal((1, 1, 5, 5))
    w = grouped_softmax(s, np.array([[True, False, True, True, False]]))[0, 0]
    assert not w[0].any()
    e = np.exp(s[0, 0, 4])
    np.testing.assert_allclose(w[4, 1], e[2] / e[[0, 2, 3, 4]].sum(), rtol=32 * EPS)
    np.testing.assert_allclose(w[4, 4], e[4] / e[[0, 2, 3, 4]].sum(), rtol=32 * EPS)
    assert w[4, [0, 2, 3]].tolist() == [0, 0, 0]
    q = np.random.default_rng(seed).standard_normal((1, 1, 5, 3))
    for g in landmark_attention_bwd(q, q, q, q, np.ones((1, 5), bool)):
        assert not g.any()


@given(seeds, st.integers(1, 9), gains)
def law_landmark_without_landmarks_is_causal_attention(seed, N, gain):
    q, k, v = gain * np.random.default_rng(seed).standard_normal((3, 1, 2, N, 4))
    want = attention_dense(q, k, v, causal=True)
    scores = q @ np.swapaxes(k, -1, -2)
    atol = 2 * max(1, np.abs(v).max()) * (rounding(scores) + 8 * EPS * np.abs(scores).max())
    for block_size in (None, N):  # one block that covers all
        got = landmark_attention(q, k, v, np.zeros((1, N), bool), block_size=block_size)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@given(seeds, st.floats(-30, 30))
def law_landmark_weights_factor(seed, shift):
    """Block c gets its landmark's share; inside c only c's scores count, and only up to a constant."""
    rng = np.random.default_rng(seed)
    s, flags, c = rng.standard_normal((1, 1, 10, 10)), regular(10, 3), slice(4, 7)
    w = grouped_softmax(s, flags)[0, 0, 9]
    e = np.exp(s[0, 0, 9])
    group = np.array([3, 7, 8, 9])
    np.testing.assert_allclose(w[c].sum(), e[7] / e[group].sum(), rtol=64 * EPS)
    np.testing.assert_allclose(w[c] / w[c].sum(), e[c] / e[c].sum(), rtol=64 * EPS)
    moved = s.copy()
    moved[..., c] += shift
    atol = 4 * EPS * (np.abs(moved).max() + 8)
    np.testing.assert_allclose(grouped_softmax(moved, flags)[0, 0, 9], w, rtol=0, atol=atol)
    louder = s.copy()
    louder[..., 7] += shift
    got = grouped_softmax(louder, flags)[0, 0, 9]
    share = e[7] * np.exp(shift) / (e[group].sum() - e[7] + e[7] * np.exp(shift))
    np.testing.assert_allclose(got[c], share * e[c] / e[c].sum(), rtol=0, atol=atol)


@given(seeds, st.integers(1, 13), st.integers(1, 5), gains)
def law_landmark_tiles_change_nothing(seed, N, block_size, gain):
    """Forward and backward, with two query heads a key head; landmark values may be NaN."""
    rng = np.random.default_rng(seed)
    q, do = rng.standard_normal((2, 2, 4, N, 3))
    q = gain * q
    k, v = rng.standard_normal((2, 2, 2, N, 3))
    flags = regular(N, block_size, 2)
    v = np.where(flags[:, None, :, None], np.nan, v)
    size = (
        np.nanmax(np.abs(v), initial=1)
        * (1 + np.abs(do).max())
        * (1 + np.abs(q).max())
        * (3 + np.abs(k).max())
    )
    # scores of 3 products, weights off by their rounding, sums over N keys or queries of 4 heads
    atol = 64 * N * EPS * size * (1 + np.abs(q @ np.swapaxes(np.repeat(k, 2, 1), -1, -2)).max())
    o, w = landmark_attention(q, k, v, flags, return_weights=True)
    np.testing.assert_allclose(
        landmark_attention(q, k, v, flags, block_size=block_size), o, rtol=0, atol=atol
    )
    np.testing.assert_allclose(
        landmark_attention(q, k, v, flags, block_size=block_size, return_weights=True)[1], w, rtol=0, atol=0
    )
    dense = landmark_attention_bwd(do, q, k, v, flags)
    tiled = landmark_attention_bwd(do, q, k, v, flags, block_size=block_size)
    for a, b in zip(dense, tiled, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=atol)
    assert not dense[2][:, :, flags[0]].any()


@given(seeds, st.booleans())
def law_landmark_gradients_are_central_differences(seed, is_regular):
    """Error h^2 f''' + eps f / h; with h = 1e-5 and entries of order 1 both stay under 1e-8 of the sum."""
    rng = np.random.default_rng(seed)
    N, args = 9, list(rng.standard_normal((3, 1, 2, 9, 3)))
    flags = regular(N, 2) if is_regular else rng.random((1, N)) < 0.3
    do, h = rng.standard_normal((1, 2, N, 3)), 1e-5
    grads = landmark_attention_bwd(do, *args, flags, scale=0.7, block_size=2 if is_regular else None)
    for n, g in enumerate(grads):
        d = rng.standard_normal(g.shape)
        at = lambda t, n=n, d=d: np.sum(
            do
            * landmark_attention(*[x + t * d if i == n else x for i, x in enumerate(args)], flags, scale=0.7)
        )
        size = (1 + np.abs(do).sum()) * max(np.abs(args[2]).max(), 1) * max(1, np.abs(d).max()) ** 3
        np.testing.assert_allclose(np.sum(g * d), (at(h) - at(-h)) / (2 * h), rtol=0, atol=1e-8 * size)


def law_landmark_huge_scores_stay_finite():
    q, k, v = 1e3 * np.random.default_rng(0).standard_normal((3, 1, 1, 9, 4))
    for block_size in (None, 2):
        assert np.isfinite(landmark_attention(q, k, v, regular(9, 2), block_size=block_size)).all()
        assert all(
            np.isfinite(g).all()
            for g in landmark_attention_bwd(v, q, k, v, regular(9, 2), block_size=block_size)
        )


@given(seeds, st.integers(1, 4), st.integers(0, 9))
def law_landmark_tokens_keep_their_order(seed, block_size, N):
    ids = np.random.default_rng(seed).integers(0, 50, (2, N))
    out = insert_landmarks(ids, block_size=block_size, landmark_id=99)
    marks = landmark_mask(out, 99)
    np.testing.assert_array_equal(out[~marks].reshape(2, N), ids)
    np.testing.assert_array_equal(marks, regular(N + N // block_size, block_size, 2))


@given(seeds, st.integers(1, 5), st.sampled_from(("per_token_and_head", "max_over_heads", "max_over_tokens")))
def law_landmark_selection_takes_the_heaviest_in_order(seed, top_k, selection):
    w = softmax(np.random.default_rng(seed).integers(0, 4, (2, 3, 4, 5)).astype(float))  # ties
    got = select_blocks(w, top_k=top_k, selection=selection)
    assert got.shape == (2, 3, 4, top_k)
    for b, h, t in np.ndindex(2, 3, 4):
        row = {"max_over_heads": w[b, :, t].max(0), "max_over_tokens": w[b, h].max(0)}.get(
            selection, w[b, h, t]
        )
        want = sorted(sorted(range(5), key=lambda c, row=row: (-row[c], c))[:top_k])
        assert got[b, h, t].tolist() == want


def stream(q, k, v, chunks, block_size, **options):
    """The outputs of `landmark_decode` on consecutive chunks, and the last cache."""
    options = {"top_k": 99, "cache_blocks": 6, "rope_base": None, "block_size": block_size, **options}
    B, H, N, D = q.shape
    cache = init_landmark_cache(B, H, D, block_size=block_size, cache_blocks=options["cache_blocks"])
    out, at, flags = [], 0, regular(N, block_size, B)
    for n in chunks:
        cut = slice(at, at := at + n)
        o, cache = landmark_decode(q[:, :, cut], k[:, :, cut], v[:, :, cut], flags[:, cut], cache, **options)
        out.append(o)
    return np.concatenate(out, axis=2), cache


@given(seeds, st.sampled_from(((14,), (1,) * 14, (5, 9), (3, 4, 7))))
def law_landmark_stream_equals_attention_when_all_is_retrieved(seed, chunks):
    """Without rotary any cut into chunks gives the same."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, 2, 2, 14, 4))
    got, cache = stream(q, k, v, chunks, 3)
    # 14 weights, each off by the rounding of two softmaxes of scores under 30
    np.testing.assert_allclose(got, landmark_attention(q, k, v, regular(14, 3, 2)), rtol=0, atol=1e-12)
    assert (int(cache.num_blocks), int(cache.num_tail), int(cache.total_blocks)) == (3, 2, 3)
    np.testing.assert_array_equal(cache.block_k[:, :, :3].reshape(2, 2, 12, 4), k[:, :, :12])
    np.testing.assert_array_equal(cache.tail_v[:, :, :2], v[:, :, 12:])


@given(seeds)
def law_landmark_first_chunk_is_rotary_attention(seed):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 2, 9, 4))
    got, _ = stream(q, k, v, (9,), 2, rope_base=100.0)
    turn = lambda x: rope(x, rope_angles(np.arange(9), 4, base=100.0))
    want = landmark_attention(turn(q), turn(k), v, regular(9, 2))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)  # as above


@given(seeds, st.integers(1, 3), st.sampled_from(("per_token_and_head", "max_over_heads", "max_over_tokens")))
def law_landmark_unselected_blocks_are_invisible(seed, top_k, selection):
    """k of 4 blocks: the full form with the others' landmarks at -inf; what is not chosen may be NaN."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 2, 18, 4))
    options = {"top_k": top_k, "cache_blocks": 5, "rope_base": None, "block_size": 3, "selection": selection}
    _, cache = stream(q[:, :, :16], k[:, :, :16], v[:, :, :16], (16,), 3, cache_blocks=5)
    call = (q[:, :, 16:], k[:, :, 16:], v[:, :, 16:], np.zeros((1, 2), bool))
    got, _ = landmark_decode(*call, cache, **options)
    scores = q[:, :, 16:] @ np.swapaxes(k, -1, -2) / 2
    chosen = select_blocks(softmax(scores[..., 3:16:4]), top_k=top_k, selection=selection)
    hidden = np.ones((*scores.shape[:-1], 4), bool)
    np.put_along_axis(hidden, chosen, False, axis=-1)
    scores[..., 3:16:4][hidden] = -np.inf
    want = grouped_softmax(scores, regular(18, 3)) @ v
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    spoilt = cache.block_k.copy(), cache.block_v.copy()
    for h in range(2):
        for c in set(range(4)) - set(chosen[0, h].ravel().tolist()):
            spoilt[0][0, h, c, :-1] = spoilt[1][0, h, c] = np.nan  # the landmark's key alone is needed
    again, _ = landmark_decode(*call, cache._replace(block_k=spoilt[0], block_v=spoilt[1]), **options)
    np.testing.assert_array_equal(again, got)


@given(seeds, st.sampled_from(((24,), (4,) * 6, (10, 14), (1,) * 24)))
def law_landmark_eviction_keeps_the_newest_in_time_order(seed, chunks):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 1, 24, 2))
    _, cache = stream(q, k, v, chunks, 3, cache_blocks=4, top_k=2)
    np.testing.assert_array_equal(cache.block_k.reshape(16, 2), k[0, 0, 8:])
    np.testing.assert_array_equal(cache.block_v.reshape(16, 2), v[0, 0, 8:])
    assert (int(cache.num_blocks), int(cache.total_blocks)) == (4, 6)


@given(seeds)
def law_landmark_positions_are_clipped(seed):
    """However long the stream, a query meets the last blocks and a far one at the same positions.

    Ten filler blocks that nobody retrieves change nothing: their keys point away from every query.
    """
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 1, 1, 20, 4))
    q[..., 2] = k[:, :, 3:16:4, 2] = 8  # landmarks point along the queries in a pair that hardly turns ...
    away = np.zeros((1, 1, 40, 4))
    away[..., 2] = -8  # ... those of the fillers against; the other pair turns by one radian a position
    options = {"block_size": 3, "top_k": 2, "cache_blocks": 20, "rope_base": 1e20}
    long = [np.concatenate([x[:, :, :4], away, x[:, :, 4:]], axis=2) for x in (q, k, v)]
    short = stream(q, k, v, (16, 4), **options)[0][:, :, 16:]
    np.testing.assert_allclose(stream(*long, (56, 4), **options)[0][:, :, 56:], short, rtol=0, atol=1e-12)


def by_hand(q, k, v, chunks, size, top_k, capacity, selection, base):
    """The stream position by position, from the rules of section 3.2, one query and one key at a time."""
    H, _, D = q.shape
    turned = lambda x, at: rope(x[None], rope_angles([at], D, base=base))[0]
    out, at = np.zeros_like(q), 0
    for T in chunks:
        total, u = divmod(at, size)
        first = max(0, total - capacity)  # the oldest block that is still stored
        n = total - first
        start = min(total, top_k + 1) * size + u
        place = [max(0, t - (n - top_k) + 1) for t in range(n)]  # a block's place for its landmark's position
        share = np.zeros((H, T, n))
        for h, t in np.ndindex(H, T):
            query = turned(q[h, at + t], start + t)
            marks = [turned(k[h, (first + c + 1) * size - 1], place[c] * size + size - 1) for c in range(n)]
            e = [math.exp(query @ x / math.sqrt(D)) for x in marks]
            share[h, t] = [x / math.fsum(e) for x in e]
        for h, t in np.ndindex(H, T):
            w = {"max_over_heads": share[:, t].max(0), "max_over_tokens": share[h].max(0, initial=0)}
            w = w.get(selection, share[h, t])
            chosen = sorted(sorted(range(n), key=lambda c, w=w: (-w[c], c))[:top_k])
            keys, values = [], []
            for m, c in enumerate(chosen):
                for r in range(size):
                    j = (first + c) * size + r
                    keys.append(turned(k[h, j], m * size + (size if place[c] else 0) + r))
                    values.append(v[h, j])
            for j in range(at - u, at + t + 1):
                keys.append(turned(k[h, j], start + j - at))
                values.append(v[h, j])
            s = np.array(keys) @ turned(q[h, at + t], start + t) / math.sqrt(D)
            out[h, at + t] = definition(s[None], regular(len(s), size - 1)[0])[0] @ np.array(values)
        at += T
    return out


@settings(max_examples=6)
@given(seeds, st.integers(1, 4), st.sampled_from(("per_token_and_head", "max_over_heads", "max_over_tokens")))
def law_landmark_stream_equals_the_definition(seed, top_k, selection):
    """Rotary positions, retrieval and eviction together; weights off by the rounding of scores under 30."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 1, 2, 23, 4))
    chunks, l, capacity = ((7, 2, 9, 5), (1, 11, 11))[rng.integers(2)], rng.integers(1, 4), rng.integers(1, 6)
    options = {"top_k": top_k, "cache_blocks": capacity, "rope_base": 50.0, "selection": selection}
    got, _ = stream(q, k, v, chunks, l, **options)
    want = by_hand(q[0], k[0], v[0], chunks, l + 1, top_k, capacity, selection, 50.0)
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)


@settings(max_examples=5)
@given(seeds)
def law_landmark_layer_is_decode_between_two_maps(seed):
    rng = np.random.default_rng(seed)
    x, params = rng.standard_normal((2, 9, 6)), LandmarkParams(*rng.standard_normal((4, 6, 6)))
    q, k, v = (np.swapaxes((x @ w).reshape(2, 9, 3, 2), 1, 2) for w in params[:3])
    heads, _ = stream(q, k, v, (4, 5), 2, top_k=1, rope_base=50.0)
    got = landmark_stream(
        x, params, regular(9, 2, 2), num_heads=3, chunk_lengths=(4, 5), block_size=2, top_k=1, cache_blocks=6,
        rope_base=50.0,
    )  # fmt: skip
    np.testing.assert_array_equal(got, np.swapaxes(heads, 1, 2).reshape(2, 9, 6) @ params.w_o)


@given(seeds, st.integers(1, 3))
def law_landmark_store_reads_what_the_cost_says(seed, top_k):
    """A mapped file of blocks: the chosen ones come back, and the counters equal `retrieval_cost`."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, 2, 5, 4, 3)).astype(np.float32)  # [H, blocks, l + 1, D]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.npy"
        np.save(path, np.full((2, 5, 2, 4, 3), np.nan, np.float32))
        store = LandmarkStore(path)
        for c in range(4):
            store.put(k[:, c], v[:, c])
        np.testing.assert_array_equal(store.landmarks, k[:, :4, -1])
        indices = np.sort(rng.permuted(np.tile(np.arange(4), (2, 1)), axis=1)[:, :top_k], axis=1)
        got = store.fetch(indices)
        for x, y in zip(got, (k, v), strict=True):
            np.testing.assert_array_equal(x, np.stack([y[h, indices[h]] for h in range(2)]))
        cost = retrieval_cost(16, block_size=3, top_k=top_k, head_dim=3, num_heads=2, bytes_per_element=4)
        assert (store.bytes_read, store.reads) == (cost["bytes_blocks"], 2 * top_k)
        assert store.landmarks.nbytes == cost["bytes_landmarks"]
        assert cost["bytes_full"] == 2 * store.data[:, :4, 0].nbytes
        assert abs(cost["ratio"] - (1 / 8 + top_k * 4 / 16)) <= 4 * EPS
        del store
