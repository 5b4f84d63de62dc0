"""Laws of block-sparse FlashAttention on ref alone: NumPy and Hypothesis, so that they run in the browser."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.attention.block_sparse_flash import (
    block_mask_from_scores,
    block_sparse_attention,
    block_sparse_attention_bwd,
    butterfly_block_mask,
    causal_block_mask,
    density,
    expand_block_mask,
    from_block_layout,
    hbm_accesses_block_sparse,
    local_block_mask,
    random_block_mask,
    strided_block_mask,
    to_block_layout,
)
from ref.attention.flash import flash_attention, flash_attention_bwd, hbm_accesses
from ref.blocks.softmax import SoftmaxState, finalize, merge
from ref.counting import Tally, count

EPS = np.finfo(np.float64).eps


@st.composite
def calls(draw, max_len=13, heads=True):
    """(q, k, v, options): any small shape and tiles, shared masks and one a head, empty rows among them."""
    L, S = draw(st.integers(1, max_len)), draw(st.integers(1, max_len))
    kv_heads, group = draw(st.sampled_from(((1, 1), (1, 3), (2, 2)))) if heads else (1, 1)
    H = kv_heads * group
    block_q, block_k = draw(st.sampled_from((1, 3, 4, 20))), draw(st.sampled_from((1, 2, 5, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gain = draw(st.sampled_from((1.0, 30.0, 1e-3)))  # ordinary, saturated, nearly flat softmax
    q = gain * rng.standard_normal((H, L, 4))
    k, v = gain * rng.standard_normal((kv_heads, S, 4)), rng.standard_normal((kv_heads, S, 3))
    tiles = -(-L // block_q), -(-S // block_k)
    tiles = (H, *tiles) if draw(st.booleans()) else tiles
    options = {"block_q": block_q, "block_k": block_k, "causal": draw(st.booleans())}
    options["block_mask"] = rng.random(tiles) < draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    if draw(st.booleans()):
        options["mask"] = rng.random((H, L, S)) < 0.7
    return q, k, v, options


def seen_by(L, S, block_mask, block_q, block_k, causal=False, mask=None, **_):
    """The visible set, element by element: bool [1 or H, L, S]."""
    out = np.zeros((block_mask.shape[0] if block_mask.ndim == 3 else 1, L, S), bool)
    for h in range(len(out)):
        tiles = block_mask[h] if block_mask.ndim == 3 else block_mask
        for i in range(L):
            for j in range(S):
                out[h, i, j] = tiles[i // block_q, j // block_k] and (not causal or j <= i + S - L)
    return out if mask is None else out & mask


def definition(q, k, v, seen):
    """Dense attention on the expanded mask, with repeated heads: (o, lse, P); sharing no line with ref."""
    k, v = (np.concatenate([x[h : h + 1].repeat(len(q) // len(k), 0) for h in range(len(k))]) for x in (k, v))
    s = np.where(seen, np.einsum("hid,hjd->hij", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    top = np.where(np.isfinite(s.max(-1)), s.max(-1), 0.0)[..., None]
    e = np.exp(s - top)
    total = e.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top[..., 0]
    p = e / np.where(total == 0, 1, total)[..., None]
    return np.einsum("hij,hjd->hid", p, v), lse, p


def rounding(q, k, v, eps=EPS):
    """A score is off by D eps scale |q||k|, twice that in a difference of two, and exp passes it on to
    weights of |v|; the sums over S keys and the rescaling add (S + 4) eps |v|. Both sides are off by that.
    """
    D, S = q.shape[-1], k.shape[-2]
    scores = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / np.sqrt(D)
    return 2 * eps * (2 * (D + 2) * scores + S + 4) * max(1.0, np.abs(v).max())


@given(calls())
def law_block_sparse_flash_equals_dense_attention_on_the_expanded_mask(call):
    q, k, v, options = call
    o, lse = block_sparse_attention(q, k, v, return_lse=True, **options)
    want_o, want_lse, _ = definition(q, k, v, seen_by(q.shape[1], k.shape[1], **options))
    np.testing.assert_allclose(o, want_o, rtol=0, atol=rounding(q, k, v))
    np.testing.assert_allclose(lse, want_lse, rtol=8 * EPS, atol=rounding(q, k, v))


@given(calls())
def law_block_sparse_flash_gradients_equal_the_dense_ones(call):
    """dS = P (dP - rowsum(P dP)) on the whole matrix; keys and queries of no visible tile get exactly 0."""
    q, k, v, options = call
    seen = np.broadcast_to(seen_by(q.shape[1], k.shape[1], **options), (len(q), q.shape[1], k.shape[1]))
    do = np.random.default_rng(1).standard_normal((*q.shape[:-1], v.shape[-1]))
    o, lse, p = definition(q, k, v, seen)
    got = block_sparse_attention_bwd(do, q, k, v, o, lse, **options)
    group = len(q) // len(k)
    wide_k, wide_v = k.repeat(group, 0), v.repeat(group, 0)
    dp = np.einsum("hid,hjd->hij", do, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    add = lambda x: x.reshape(len(k), group, *x.shape[1:]).sum(1)
    want = (
        np.einsum("hij,hjd->hid", ds, wide_k),
        add(np.einsum("hij,hid->hjd", ds, q)),
        add(np.einsum("hij,hid->hjd", p, do)),
    )
    # P is off by `rounding`; dP adds Dv products of do and v; sums have at most S or group L terms
    terms = max(k.shape[1], group * q.shape[1])
    most = terms * max(1, np.abs(do).max() * 3) * max(1, np.abs(q).max(), np.abs(k).max())
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=4 * most * rounding(q, k, v))
    unseen = ~seen.reshape(len(k), -1, k.shape[1]).any(1)
    assert not got[1][unseen].any()
    assert not got[2][unseen].any()
    assert not got[0][~seen.any(-1)].any()


@given(calls())
def law_block_sparse_flash_with_a_mask_of_ones_is_flash_bit_for_bit(call):
    q, k, v, options = call
    options = {**options, "block_mask": np.ones(options["block_mask"].shape[-2:], bool)}
    o, lse = block_sparse_attention(q, k, v, return_lse=True, **options)
    del options["block_mask"]
    want = flash_attention(q, k, v, order="q_outer", return_lse=True, **options)
    np.testing.assert_array_equal(o, want[0])
    np.testing.assert_array_equal(lse, want[1])
    tiles = np.ones((-(-q.shape[1] // options["block_q"]), -(-k.shape[1] // options["block_k"])), bool)
    got = block_sparse_attention_bwd(o, q, k, v, o, lse, tiles, **options)
    for g, w in zip(got, flash_attention_bwd(o, q, k, v, o, lse, **options), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=64 * EPS * max(1, np.abs(w).max()))


@given(calls(), st.sampled_from((np.nan, np.inf, 1e300)))
def law_block_sparse_flash_never_touches_what_no_tile_shows(call, poison):
    """NaN and infinities in keys of no visible tile, and in queries that see nothing, change no bit."""
    q, k, v, options = call
    seen = seen_by(q.shape[1], k.shape[1], **{**options, "mask": None, "causal": False})
    seen = np.broadcast_to(seen, (len(q), *seen.shape[1:]))
    bad_q, bad_k, bad_v = q.copy(), k.copy(), v.copy()
    unseen = ~seen.reshape(len(k), -1, k.shape[1]).any(1)
    bad_k[unseen], bad_v[unseen], bad_q[~seen.any(-1)] = poison, poison, poison
    want = block_sparse_attention(q, k, v, return_lse=True, **options)
    got = block_sparse_attention(bad_q, bad_k, bad_v, return_lse=True, **options)
    grads = (
        block_sparse_attention_bwd(np.ones_like(got[0]), *x, *want, **options)
        for x in ((bad_q, bad_k, bad_v), (q, k, v))
    )
    for g, w in zip((*got, *next(grads)), (*want, *next(grads)), strict=True):
        np.testing.assert_array_equal(g, w)


@given(calls(heads=False))
def law_block_sparse_flash_states_of_disjoint_masks_merge(call):
    q, k, v, options = call
    whole = options.pop("block_mask")
    some = np.random.default_rng(2).random(whole.shape) < 0.5

    def state(m):
        o, lse = block_sparse_attention(q, k, v, m, return_lse=True, **options)
        return SoftmaxState(lse, np.where(np.isneginf(lse), 0.0, 1.0), o)

    got = finalize(merge(state(whole & some), state(whole & ~some)))
    want = block_sparse_attention(q, k, v, whole, return_lse=True, **options)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2 * rounding(q, k, v))
    np.testing.assert_allclose(got[1], want[1], rtol=8 * EPS, atol=2 * rounding(q, k, v))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def law_block_sparse_flash_permuted_query_blocks_permute_the_output(seed, blocks):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((blocks * 3, 4)), *rng.standard_normal((2, 8, 4))
    tiles = rng.random((blocks, 2)) < 0.6
    order = rng.permutation(blocks)
    rows = (3 * order[:, None] + np.arange(3)).ravel()
    o = block_sparse_attention(q, k, v, tiles, block_q=3, block_k=4)
    got = block_sparse_attention(q[rows], k, v, tiles[order], block_q=3, block_k=4)
    np.testing.assert_array_equal(got, o[rows])


@given(calls(), st.integers(0, 100))
def law_block_sparse_flash_gradients_are_central_differences(call, seed):
    """(f(x + h d) - f(x - h d)) / 2h with h = 1e-5: error h^2 f''' + eps f / h, under 1e-9 of f."""
    q, k, v, options = call
    gain = max(np.abs(q).max(), np.abs(k).max(), 1.0)
    q, k = q / gain, k / gain  # third derivatives of order 1
    rng = np.random.default_rng(seed)
    do = rng.standard_normal((*q.shape[:-1], v.shape[-1]))
    o, lse = block_sparse_attention(q, k, v, return_lse=True, **options)
    grads = block_sparse_attention_bwd(do, q, k, v, o, lse, **options)
    d = [rng.standard_normal(g.shape) for g in grads]
    f = lambda h: np.sum(
        do * block_sparse_attention(*(x + h * y for x, y in zip((q, k, v), d, strict=True)), **options)
    )
    slope = sum(np.sum(g * y) for g, y in zip(grads, d, strict=True))
    size = 1 + np.abs(do).sum() * np.abs(v).max() * max(np.abs(y).max() for y in d) ** 3
    np.testing.assert_allclose(slope, (f(1e-5) - f(-1e-5)) / 2e-5, rtol=0, atol=1e-8 * size)


@given(calls())
def law_block_sparse_flash_lists_hold_the_mask(call):
    """Mask -> lists -> mask drops only tiles above the causal diagonal; `full` is what no element cuts."""
    q, k, _, options = call
    L, S, tiles = q.shape[1], k.shape[1], options["block_mask"]
    sizes = {"block_q": options["block_q"], "block_k": options["block_k"]}
    layout = to_block_layout(tiles, num_queries=L, num_keys=S, **sizes)
    np.testing.assert_array_equal(from_block_layout(layout), tiles)
    layout = to_block_layout(tiles, num_queries=L, num_keys=S, causal=options["causal"], **sizes)
    seen = seen_by(L, S, tiles, causal=options["causal"], **sizes)
    cut = np.pad(seen, ((0, 0), (0, -L % sizes["block_q"]), (0, -S % sizes["block_k"])))
    cut = cut.reshape(len(seen), tiles.shape[-2], sizes["block_q"], tiles.shape[-1], sizes["block_k"])
    np.testing.assert_array_equal(from_block_layout(layout), cut.any((2, 4)).reshape(tiles.shape))
    np.testing.assert_array_equal(layout.full, cut.all((2, 4)).reshape(tiles.shape))
    back = np.zeros(tiles.shape, bool)
    for *lead, j in np.ndindex(layout.q_num.shape):  # the column lists hold the same tiles
        n, at = layout.q_num[(*lead, j)], layout.q_idx[(*lead, j)]
        assert (np.diff(at[:n]) > 0).all()
        assert (at[n:] == (at[n - 1] if n else 0)).all()
        for i in at[:n]:
            back[(*lead, i, j)] = True
    np.testing.assert_array_equal(back, from_block_layout(layout))


def law_block_sparse_flash_butterfly_reaches_every_block_in_log_hops():
    """Symmetric, with its diagonal; rows of 1 + log2(nb); any block is reached in log2(nb) hops."""
    want = {8: 0.5, 16: 0.3125, 64: 0.109375, 256: 0.03515625}
    for nb in (1, 2, 6, 8, 13, 16, 64, 256):
        m = butterfly_block_mask(nb)
        assert (m == m.T).all()
        assert m.diagonal().all()
        hops = int(np.ceil(np.log2(nb)))
        if nb in want:
            assert (m.sum(1) == 1 + hops).all()
            assert density(m) == want[nb] == (1 + hops) / nb
            before = np.linalg.matrix_power(m.astype(float), hops - 1)
            assert not before[0, nb - 1]
        if nb <= 64 and nb == 2**hops:
            assert (np.linalg.matrix_power(m.astype(float), max(hops, 1)) > 0).all()
        assert (butterfly_block_mask(nb, max_stride=1) <= m).all()
    wide = butterfly_block_mask(16, max_stride=4, num_global=2)
    assert (wide[2:, 2:].sum(1) <= 4).all()
    assert wide[:2].all()
    assert wide[:, :2].all()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32 - 1))
def law_block_sparse_flash_builders_are_what_they_say(n, m, step, share, seed):
    i = np.arange(n)
    for a in range(n):
        np.testing.assert_array_equal(local_block_mask(n, step)[a], abs(a - i) <= step)
        np.testing.assert_array_equal(strided_block_mask(n, step)[a], (a - i) % step == 0)
    causal = causal_block_mask(n, m)
    np.testing.assert_array_equal(causal, np.arange(m) <= i[:, None] + m - n)
    uniforms = np.random.default_rng(seed).random((n, m)).round(1)  # with ties
    drawn = random_block_mask(uniforms, share)
    assert drawn.sum() == np.floor(share * n * m + 0.5)
    if 0 < drawn.sum() < n * m:
        last, first = uniforms[drawn].max(), uniforms[~drawn].min()
        assert last <= first
        tied = drawn.ravel()[uniforms.ravel() == last]
        assert (np.diff(tied.astype(int)) <= 0).all()  # among equals the first ones
    keep = min(step, m)
    best = block_mask_from_scores(uniforms, keep)
    assert (best.sum(1) == keep).all()
    for row, kept in zip(uniforms, best, strict=True):
        assert kept.all() or row[kept].min() >= row[~kept].max()


def law_block_sparse_flash_counts_the_visited_tiles_only():
    """Multiply-accumulates 2 d block_q block_k a visited tile; backward 7 products of one tile (2 recomputed
    for dq); reads and writes of this order too."""
    rng = np.random.default_rng(0)
    N, d, b = 48, 8, 8
    q, k, v, do = rng.standard_normal((4, N, d))
    tiles = butterfly_block_mask(6) & causal_block_mask(6, 6)
    nnz = int(tiles.sum())
    tally = Tally()
    o, lse = block_sparse_attention(*count(tally, q, k, v), tiles, block_q=b, block_k=b, return_lse=True)
    assert tally.macs == 2 * d * b * b * nnz
    assert tally.largest <= max(b * b, b * d)
    tally = Tally()
    empty = tiles.copy()
    empty[2] = False
    block_sparse_attention(*count(tally, q, k, v), empty, block_q=b, block_k=b, causal=True)
    assert tally.reads == 5 * b * d + 2 * b * d * empty.sum()  # a row of tiles reads q once, k and v a tile
    o, lse = np.asarray(o), np.asarray(lse)
    tally = Tally()
    block_sparse_attention_bwd(
        *count(tally, do, q, k, v, o, lse), np.ones_like(tiles), block_q=b, block_k=b, causal=True
    )
    reached = np.tri(6, dtype=bool).sum()
    assert tally.macs == 7 * d * b * b * reached


def paper_forward(q, k, v, tiles, block):
    """Algorithm 5: key tiles outside; o, l and m in main memory; only visible tiles."""
    o, l, m = np.zeros_like(q), np.zeros_like(q, shape=len(q)), np.full_like(q, -np.inf, shape=len(q))
    for j, i in np.argwhere(tiles.T):
        cols, rows = (slice(at * block, min((at + 1) * block, len(q))) for at in (j, i))
        if i == np.flatnonzero(tiles[:, j])[0]:
            kj, vj = k[cols], v[cols]
        s = q[rows] @ kj.T / np.sqrt(q.shape[-1])
        m_old, l_old = m[rows], l[rows]
        m_new = np.maximum(m_old, s.max(-1))
        p, fix = np.exp(s - m_new[:, None]), np.exp(m_old - m_new)
        l_new = fix * l_old + p.sum(-1)
        o[rows] = ((l_old * fix)[:, None] * o[rows] + p @ vj) / l_new[:, None]
        l[rows], m[rows] = l_new, m_new
    return o


def paper_backward(do, q, k, v, o, m, l, tiles, block):
    """Algorithm 4 with the same skip: dK and dV of a key tile stay on the chip, dQ travels."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = 1 / np.sqrt(q.shape[-1])
    for j in np.flatnonzero(tiles.any(0)):
        cols = slice(j * block, min((j + 1) * block, len(q)))
        kj, vj = k[cols], v[cols]
        dkj, dvj = np.zeros(kj.shape), np.zeros(vj.shape)
        for i in np.flatnonzero(tiles[:, j]):
            rows = slice(i * block, min((i + 1) * block, len(q)))
            qi, doi = q[rows], do[rows]
            p = np.exp(scale * qi @ kj.T - m[rows][:, None]) / l[rows][:, None]
            ds = scale * p * (doi @ vj.T - np.sum(doi * o[rows], axis=-1)[:, None])
            dvj, dkj = dvj + p.T @ doi, dkj + ds.T @ qi
            dq[rows] = dq[rows] + ds @ kj
        dk[cols], dv[cols] = dkj, dvj
    return dq, dk, dv


def law_block_sparse_flash_counted_traffic_equals_the_formulas():
    """The paper's loops on counting arrays, ragged and with an empty column; all ones is flash's formula."""
    rng = np.random.default_rng(0)
    d, b = 8, 8
    for N in (64, 61):
        q, k, v, do, o = rng.standard_normal((5, N, d))
        m, l = np.zeros(N), np.ones(N)
        nb = -(-N // b)
        for tiles in (np.ones((nb, nb), bool), butterfly_block_mask(nb), rng.random((nb, nb)) < 0.3):
            tiles = tiles & (np.arange(nb) != 1) if not tiles.all() else tiles
            for fn, arrays, backward in (
                (paper_forward, (q, k, v), False),
                (paper_backward, (do, q, k, v, o, m, l), True),
            ):
                tally = Tally()
                fn(*count(tally, *arrays), tiles, b)
                want = hbm_accesses_block_sparse(tiles, N, N, d, block_q=b, block_k=b, backward=backward)
                assert (tally.reads, tally.writes) == (want["reads"], want["writes"])
                if tiles.all() and N == 64:
                    dense = hbm_accesses(
                        N, N, d, sram_elements=4 * d * b, algorithm="flash", backward=backward
                    )
                    assert want == dense
        want = block_sparse_attention(q, k, v, np.eye(nb, dtype=bool), block_q=b, block_k=b)
        np.testing.assert_allclose(paper_forward(q, k, v, np.eye(nb, dtype=bool), b), want, atol=1e-13)


def law_block_sparse_flash_traffic_is_linear_in_the_density():
    """s Tc (3 N d + 4 N) + 2 N d + init at fixed N; the butterfly grows as N log N."""
    N, d, b = 512, 16, 32
    nb = N // b
    uniforms = np.random.default_rng(0).random((nb, nb))
    points = []
    for s in (1.0, 0.5, 0.25, 0.125):
        tiles = random_block_mask(uniforms, s) | np.eye(nb, dtype=bool)
        total = hbm_accesses_block_sparse(tiles, N, N, d, block_q=b, block_k=b)["total"]
        points.append((density(tiles), total))
        assert total == density(tiles) * nb * (3 * N * d + 4 * N) + 2 * N * d + N * d + 2 * N
    (s0, t0), (s1, t1) = points[0], points[-1]
    for s, t in points:
        np.testing.assert_allclose(t, t0 + (s - s0) * (t1 - t0) / (s1 - s0), rtol=1e-9)
    per_token = [
        hbm_accesses_block_sparse(
            butterfly_block_mask(n // 256), n, n, 64, block_q=256, block_k=256, include_init=False
        )["total"]
        / n
        for n in (1024, 4096, 16384, 65536)
    ]
    steps = np.diff(per_token)  # N log N: every doubling of N adds the same to a token
    np.testing.assert_allclose(steps, steps[0], rtol=1e-12)
    pair = np.stack([butterfly_block_mask(nb)] * 2)
    one, two = (hbm_accesses_block_sparse(m, N, N, d, block_q=b, block_k=b)["total"] for m in (pair[0], pair))
    assert two == 2 * one


def law_block_sparse_flash_one_query_and_empty_batches():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((2, 1, 4)), *rng.standard_normal((2, 1, 9, 4))
    got = block_sparse_attention(q, k, v, np.array([[False, True, True]]), block_q=4, block_k=4, causal=True)
    want = flash_attention(q, k[:, 4:], v[:, 4:])
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(q, k, v))
    none = block_sparse_attention(
        np.ones((0, 2, 5, 4)), np.ones((0, 2, 3, 4)), np.ones((0, 2, 3, 4)), np.ones((2, 1), bool), block_q=3,
        block_k=3,
    )  # fmt: skip
    assert none.shape == (0, 2, 5, 4)
    huge = 1e3 * rng.standard_normal((1, 12, 4))
    assert np.isfinite(
        block_sparse_attention(huge, huge, huge, np.eye(3, dtype=bool), block_q=4, block_k=4)
    ).all()
    whole = expand_block_mask(np.eye(3, dtype=bool), block_q=2, block_k=3, num_queries=5, num_keys=8)
    np.testing.assert_array_equal(whole, np.arange(8) // 3 == (np.arange(5) // 2)[:, None])
