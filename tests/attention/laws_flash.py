"""Laws of FlashAttention on ref alone: NumPy and Hypothesis, so that they also run in the reader's
browser.
"""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.attention.flash import (
    SoftmaxState,
    attention_dense,
    block_sizes,
    finalize,
    flash_attention,
    flash_attention_bwd,
    hbm_accesses,
    merge,
    online_softmax,
)
from ref.blocks.softmax import softmax_state
from ref.counting import Tally, count

EPS = np.finfo(np.float64).eps


def definition(q, k, v, scale, seen):
    """Attention written out row by row with exact sums (math.fsum), sharing no line with ref."""
    o, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if seen[i, j]]
        if not keys:
            continue
        s = [scale * math.fsum(q[i] * k[j]) for j in keys]
        top = max(s)
        e = [math.exp(x - top) for x in s]
        lse[i] = top + math.log(math.fsum(e))
        o[i] = [
            math.fsum(w * v[j, c] for w, j in zip(e, keys, strict=True)) / math.fsum(e)
            for c in range(v.shape[1])
        ]
    return o, lse


def rounding(q, k, v, scale, eps=EPS):
    """A score is off by at most D eps scale |q||k|, twice that in a difference of two, and exp passes it on
    to
    weights of |v|; the sums over S keys and the rescaling add (S + 4) eps |v|."""
    D, S = q.shape[-1], k.shape[-2]
    scores = scale * np.linalg.norm(q, axis=-1).max(initial=0) * np.linalg.norm(k, axis=-1).max(initial=0)
    return eps * (2 * (D + 2) * scores + S + 4) * max(1.0, np.abs(v).max(initial=0))


@st.composite
def calls(draw, max_len=12):
    """(q, k, v, options) of one head: any small shape, three regimes of softmax, causal or not, masks,
    lengths.
    """
    L, S = draw(st.integers(1, max_len)), draw(st.integers(1, max_len))
    D, Dv = draw(st.sampled_from((1, 4, 7))), draw(st.sampled_from((1, 4, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gain = draw(st.sampled_from((1.0, 30.0, 1e-3)))  # ordinary, saturated, nearly flat softmax
    q, k, v = (gain * rng.standard_normal(s) for s in ((L, D), (S, D), (S, Dv)))
    options = {"causal": draw(st.booleans()), "scale": draw(st.sampled_from((None, 0.7)))}
    if draw(st.booleans()):
        options["mask"] = rng.random((L, S)) < 0.7
    if draw(st.booleans()):
        options["key_lengths"] = np.array(draw(st.integers(0, S)))
    return q, k, v, options


def seen_by(L, S, mask=None, key_lengths=None, causal=False, **_):
    """The visible set, element by element."""
    n = S if key_lengths is None else int(key_lengths)
    return np.array(
        [
            [j < n and (mask is None or mask[i, j]) and (not causal or j <= i + n - L) for j in range(S)]
            for i in range(L)
        ],
        bool,
    ).reshape(L, S)


blocks = st.sampled_from((1, 2, 3, 5, 8, 64))


@given(calls(), blocks, blocks, st.sampled_from(("q_outer", "k_outer")))
def law_flash_equals_the_definition(call, block_q, block_k, order):
    q, k, v, options = call
    scale = options["scale"] or 1 / np.sqrt(q.shape[-1])
    o, lse = flash_attention(
        q, k, v, block_q=block_q, block_k=block_k, order=order, return_lse=True, **options
    )
    want_o, want_lse = definition(q, k, v, scale, seen_by(len(q), len(k), **options))
    bound = rounding(q, k, v, scale)
    np.testing.assert_allclose(o, want_o, rtol=0, atol=bound)
    np.testing.assert_allclose(lse, want_lse, rtol=EPS * 8, atol=bound)


@given(calls())
def law_flash_dense_equals_the_definition(call):
    q, k, v, options = call
    scale = options["scale"] or 1 / np.sqrt(q.shape[-1])
    o, lse = attention_dense(q, k, v, return_lse=True, **options)
    want_o, want_lse = definition(q, k, v, scale, seen_by(len(q), len(k), **options))
    np.testing.assert_allclose(o, want_o, rtol=0, atol=rounding(q, k, v, scale))
    np.testing.assert_allclose(lse, want_lse, rtol=EPS * 8, atol=rounding(q, k, v, scale))


@st.composite
def states(draw, n):
    """n states of key sets with 2 rows and 3 value channels, the empty set among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gain = draw(st.sampled_from((1.0, 1e3)))
    out = []
    for _ in range(n):
        S = draw(st.integers(0, 4))
        s = gain * rng.standard_normal((2, S))
        out.append(softmax_state(s, rng.standard_normal((S, 3))))
    return out


def close(a, b):
    """Equal up to a few roundings of each term; acc may cancel, so it is measured against l (|v| is about 1
    to 5).
    """
    np.testing.assert_array_equal(a.m, b.m)
    np.testing.assert_allclose(a.l, b.l, rtol=8 * EPS, atol=0)
    np.testing.assert_allclose(a.acc, b.acc, rtol=8 * EPS, atol=64 * EPS * max(1.0, np.max(a.l)))


@given(states(3))
def law_flash_merge_is_a_commutative_monoid(parts):
    a, b, c = parts
    empty = SoftmaxState(np.full(2, -np.inf), np.zeros(2), np.zeros((2, 3)))
    close(merge(merge(a, b), c), merge(a, merge(b, c)))
    close(merge(a, b), merge(b, a))
    for x, y in zip(merge(a, empty), a, strict=True):
        np.testing.assert_array_equal(x, y)


@given(calls(), st.randoms(use_true_random=False))
def law_flash_key_tiles_may_come_in_any_order(call, random):
    """Split the keys anywhere, visit the pieces in any order, merge: the whole."""
    q, k, v, options = call
    scale = options["scale"] or 1 / np.sqrt(q.shape[-1])
    seen = seen_by(len(q), len(k), **options)
    pieces = np.array_split(np.arange(len(k)), random.randint(1, len(k)))
    random.shuffle(pieces)
    state = SoftmaxState(np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros((len(q), v.shape[1])))
    for cols in pieces:
        s = np.where(seen[:, cols], scale * q @ k[cols].T, -np.inf)
        state = merge(state, softmax_state(s, v[cols]))
    o, lse = finalize(state)
    want_o, want_lse = flash_attention(q, k, v, return_lse=True, block_k=3, **options)
    np.testing.assert_allclose(o, want_o, rtol=0, atol=rounding(q, k, v, scale))
    np.testing.assert_allclose(lse, want_lse, rtol=EPS * 8, atol=rounding(q, k, v, scale))


@given(calls(), st.booleans())
def law_flash_lengths_are_truncation(call, causal):
    """key_lengths = n is the same as cutting k and v to n keys, whatever lies beyond: even NaN."""
    q, k, v, _ = call
    n = max(1, len(k) // 2)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[n:], bad_v[n:] = np.nan, np.inf
    cut = flash_attention(q, k[:n], v[:n], causal=causal, block_k=2)
    got = flash_attention(q, bad_k, bad_v, causal=causal, block_k=2, key_lengths=np.array(n))
    # the last tile is wider by masked keys, so BLAS may sum in another order
    np.testing.assert_allclose(got, cut, rtol=0, atol=2 * rounding(q, k, v, 1 / np.sqrt(q.shape[-1])))


@given(calls())
def law_flash_rows_without_a_key_are_zero(call):
    q, k, v, _ = call
    o, lse = flash_attention(q, k, v, mask=np.zeros((len(q), len(k)), bool), return_lse=True)
    assert not o.any()
    assert np.isneginf(lse).all()
    grads = flash_attention_bwd(np.ones_like(o), q, k, v, o, lse, mask=np.zeros((len(q), len(k)), bool))
    assert all(not g.any() for g in grads)


@given(calls())
def law_flash_a_query_without_a_key_may_hold_nan(call):
    """What no key meets reaches neither the output nor a gradient, bit for bit."""
    q, k, v, _ = call
    mask = np.ones((len(q), len(k)), bool)
    mask[0] = False
    blind = q.copy()
    blind[0] = np.nan
    o, lse = flash_attention(q, k, v, mask=mask, return_lse=True)
    for got, want in zip(
        (
            *flash_attention(blind, k, v, mask=mask, return_lse=True),
            *flash_attention_bwd(o, blind, k, v, o, lse, mask=mask),
        ),
        (o, lse, *flash_attention_bwd(o, q, k, v, o, lse, mask=mask)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@given(calls(), st.floats(-50, 50))
def law_flash_a_constant_on_all_scores_shifts_lse_only(call, shift):
    """One more channel, 1 in q and `shift` in k, adds the same constant to every score."""
    q, k, v, options = call
    options = {**options, "scale": 1.0}
    widened = np.c_[q, np.ones(len(q))], np.c_[k, np.full(len(k), shift)]
    o, lse = flash_attention(q, k, v, return_lse=True, **options)
    got_o, got_lse = flash_attention(*widened, v, return_lse=True, **options)
    bound = rounding(*widened, v, 1.0)
    np.testing.assert_allclose(got_o, o, rtol=0, atol=2 * bound)
    np.testing.assert_allclose(got_lse, lse + shift, rtol=EPS * 8, atol=2 * bound)


@given(calls(), st.randoms(use_true_random=False))
def law_flash_permuted_keys_change_nothing(call, random):
    q, k, v, _ = call
    order = list(range(len(k)))
    random.shuffle(order)
    got = flash_attention(q, k[order], v[order], block_k=2)
    want = flash_attention(q, k, v, block_k=2)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * rounding(q, k, v, 1 / np.sqrt(q.shape[-1])))


@given(calls())
def law_flash_output_is_a_weighted_mean_of_seen_values(call):
    """Componentwise between the smallest and the largest visible value; equal values come back unchanged."""
    q, k, v, options = call
    seen = seen_by(len(q), len(k), **options)
    o = flash_attention(q, k, v, **options)
    slack = EPS * (len(k) + 4) * np.abs(v).max()  # S terms in numerator and denominator
    for i in np.flatnonzero(seen.any(axis=1)):
        assert (o[i] >= v[seen[i]].min(axis=0) - slack).all()
        assert (o[i] <= v[seen[i]].max(axis=0) + slack).all()


@given(calls())
def law_flash_causal_rows_ignore_later_keys(call):
    q, k, v, _ = call
    n = min(len(q), len(k))
    q, k, v = q[:n], k[:n], v[:n]
    for i in range(n):
        k2, v2 = k.copy(), v.copy()
        k2[i + 1 :], v2[i + 1 :] = 7.0, -7.0
        a = flash_attention(q[: i + 1], k2, v2, causal=True, block_k=1, key_lengths=np.array(i + 1))
        b = flash_attention(q, k, v, causal=True, block_k=1)[: i + 1]
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * rounding(q, k, v, 1 / np.sqrt(q.shape[-1])))


def law_flash_huge_logits_stay_finite():
    """Scores near 1e4 overflow a plain exponential; the running maximum keeps every exponent at or below
    0.
    """
    rng = np.random.default_rng(0)
    q, k, v = (
        100 * rng.standard_normal((8, 16)),
        100 * rng.standard_normal((24, 16)),
        rng.standard_normal((24, 4)),
    )
    s = q @ k.T
    with np.errstate(over="ignore", invalid="ignore"):
        naive = (np.exp(s) / np.exp(s).sum(-1, keepdims=True)) @ v
    assert not np.isfinite(naive).all()
    assert np.isfinite(flash_attention(q, k, v, scale=1.0, block_k=5)).all()


@given(calls(max_len=6), st.booleans(), blocks)
def law_flash_gradients_are_central_differences(call, dropout, block):
    """<grad, d> against (f(x + h d) - f(x - h d)) / 2h with h = 1e-5: error h^2 f''' + eps f / h, both under
    1e-7.
    """
    q, k, v, options = call
    gain = max(np.abs(q).max(), np.abs(k).max(), 1.0)
    q, k = q / gain, k / gain  # third derivatives of order 1
    rng = np.random.default_rng(1)
    if dropout:
        options = {**options, "dropout_p": 0.3, "dropout_mask": rng.random((len(q), len(k))) < 0.7}
    do = rng.standard_normal((len(q), v.shape[1]))
    o, lse = flash_attention(q, k, v, return_lse=True, **options)
    grads = flash_attention_bwd(do, q, k, v, o, lse, block_q=block, block_k=block, **options)
    for at, g in enumerate(grads):
        d = rng.standard_normal(g.shape)
        f = lambda h, at=at, d=d: np.sum(
            do
            * flash_attention(
                *[x + h * d * (i == at) if i == at else x for i, x in enumerate((q, k, v))], **options
            )
        )
        h = 1e-5
        size = 1 + np.abs(do).sum() * np.abs(v).max() * max(1.0, np.abs(d).max()) ** 3
        np.testing.assert_allclose(np.sum(g * d), (f(h) - f(-h)) / (2 * h), rtol=0, atol=1e-8 * size)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3))
def law_flash_grouped_heads_are_repeated_heads(seed, kv_heads, group):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, kv_heads * group, 5, 4))
    k, v = rng.standard_normal((2, 2, kv_heads, 7, 4))
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, block_k=3)
    for h in range(kv_heads * group):
        want = flash_attention(q[:, h], k[:, h // group], v[:, h // group], causal=True, block_k=3)
        np.testing.assert_array_equal(o[:, h], want)
    do = rng.standard_normal(o.shape)
    dk = flash_attention_bwd(do, q, k, v, o, lse, causal=True)[1]
    each = [
        flash_attention_bwd(
            do[:, h], q[:, h], k[:, h // group], v[:, h // group], o[:, h], lse[:, h], causal=True
        )[1]
        for h in range(kv_heads * group)
    ]
    want = np.stack(each, 1).reshape(2, kv_heads, group, 7, 4).sum(2)
    np.testing.assert_allclose(dk, want, rtol=0, atol=64 * EPS * np.abs(want).max())


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.data())
def law_flash_one_pass_softmax_equals_two_passes(seed, S, data):
    logits = np.random.default_rng(seed).standard_normal((3, S)) * 20
    p, m, l = online_softmax(logits, start=data.draw(st.integers(0, S - 1)))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(p, e / e.sum(-1, keepdims=True), rtol=4 * S * EPS, atol=0)
    np.testing.assert_array_equal(m, logits.max(-1))
    np.testing.assert_allclose(l, e.sum(-1), rtol=4 * S * EPS)


def standard_forward(q, k, v):
    """The three kernels of plain attention, each reading from and writing to main memory."""
    s = np.empty_like(q, shape=(len(q), len(k)))
    p = np.empty_like(s)
    o = np.empty_like(q, shape=(len(q), v.shape[1]))
    s[:] = q[:] @ k[:].T
    x = np.exp(s[:])
    p[:] = x / np.sum(x, axis=-1, keepdims=True)
    o[:] = p[:] @ v[:]
    return o


def paper_backward(do, q, k, v, o, m, l, block_q, block_k):
    """Algorithm 4's loop: dK and dV of a key tile stay on the chip, dQ travels."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for j in range(0, len(k), block_k):
        kj, vj = k[j : j + block_k], v[j : j + block_k]
        dkj, dvj = np.zeros(kj.shape), np.zeros(vj.shape)
        for i in range(0, len(q), block_q):
            rows = slice(i, i + block_q)
            qi, doi = q[rows], do[rows]
            p = np.exp(qi @ kj.T - m[rows][:, None]) / l[rows][:, None]
            delta = np.sum(doi * o[rows], axis=-1)
            ds = p * (doi @ vj.T - delta[:, None])
            dvj = dvj + p.T @ doi
            dkj = dkj + ds.T @ qi
            dq[rows] = dq[rows] + ds @ kj
        dk[j : j + block_k], dv[j : j + block_k] = dkj, dvj
    return dq, dk, dv


def law_flash_counted_traffic_equals_the_formulas():
    """Every closed form of hbm_accesses against what a counting array measures, reads and writes apart."""
    N, d, M = 64, 8, 256  # B_c = 8, B_r = 8
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, N, d)) / np.sqrt(d)
    block_q, block_k = block_sizes(M, d)

    def measured(fn, *arrays):
        tally = Tally()
        fn(*[count(tally, x) for x in arrays])
        return {"reads": tally.reads, "writes": tally.writes, "total": tally.total}

    flash = lambda order: (
        lambda *x: flash_attention(*x, scale=1.0, block_q=block_q, block_k=block_k, order=order)
    )
    assert measured(standard_forward, q, k, v) == hbm_accesses(N, N, d)
    assert measured(flash("k_outer"), q, k, v) == hbm_accesses(N, N, d, sram_elements=M, algorithm="flash")
    assert measured(flash("q_outer"), q, k, v) == hbm_accesses(N, N, d, sram_elements=M, algorithm="flash2")
    o, lse = flash_attention(q, k, v, scale=1.0, return_lse=True)
    backward = lambda *x: paper_backward(*x, block_q, block_k)
    want = hbm_accesses(N, N, d, sram_elements=M, algorithm="flash", backward=True)
    assert measured(backward, do, q, k, v, o, lse, np.ones(N)) == want
    got = backward(do, q, k, v, o, lse, np.ones(N))  # m = lse with l = 1 gives the same P
    for a, b in zip(got, flash_attention_bwd(do, q, k, v, o, lse, scale=1.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=N * EPS * 8 * np.abs(b).max())  # sums of N terms, twice


def law_flash_traffic_of_the_worked_example():
    """N = 1024, d = 64: the totals of the chapter's table, and the case where tiling loses."""
    N, d = 1024, 64
    total = lambda **kw: hbm_accesses(N, N, d, **kw)["total"]
    assert (total(), total(backward=True)) == (4_456_448, 7_864_320)
    table = {4096: (13_043_712, 21_561_344), 16384: (3_409_920, 5_734_400), 65536: (1_001_472, 1_777_664)}
    for M, (forward, backward) in table.items():
        assert total(sram_elements=M, algorithm="flash") == forward
        assert total(sram_elements=M, algorithm="flash", backward=True) == backward


def law_flash_traffic_falls_as_one_over_sram():
    """log traffic against log M, powers of two from 4d to N d: slope -1 within 0.05 (Theorem 2)."""
    N, d = 1024, 64
    M = 4 * d * 2 ** np.arange(9)
    assert M[-1] == N * d
    totals = [hbm_accesses(N, N, d, sram_elements=int(m), algorithm="flash")["total"] for m in M]
    slope = np.polyfit(np.log(M), np.log(totals), 1)[0]
    assert abs(slope + 1) < 0.05
    # the T_c term alone is exactly proportional to N^2 / M
    term = lambda n, m: (
        hbm_accesses(n, n, d, sram_elements=m, algorithm="flash", include_init=False)["total"] - 2 * n * d
    )
    assert term(2 * N, 16384) == 4 * term(N, 16384)
    assert term(N, 8192) == 2 * term(N, 16384)


@given(st.integers(1, 9), st.integers(1, 9))
def law_flash_never_holds_more_than_a_tile(block_q, block_k):
    """Per head, no array on the chip exceeds max(B_r B_c, B_r d, B_c d)."""
    L, S, D, Dv = 13, 17, 5, 3
    rng = np.random.default_rng(0)
    tally = Tally()
    q, k, v = count(
        tally, rng.standard_normal((L, D)), rng.standard_normal((S, D)), rng.standard_normal((S, Dv))
    )
    flash_attention(q, k, v, block_q=block_q, block_k=block_k)
    assert tally.largest <= max(block_q * block_k, block_q * D, block_k * D)
    assert tally.macs == L * S * (D + Dv)


# The chapter's exercises.


# --8<-- [start:forgetful]
def forgetful_merge(a, b):
    """Equation (2) without the factor for the state that came first."""
    m = np.maximum(a.m, b.m)
    fb = np.exp(b.m - m)
    return SoftmaxState(m, a.l + fb * b.l, a.acc + fb[..., None] * b.acc)


def forgetful_errors():
    """Error of the output when the largest score is in the tile that comes (first, last)."""
    s, v = np.array([[3.0, 1.0, 2.0, 0.5]]), np.arange(4.0)[:, None]
    want = (np.exp(s) @ v / np.exp(s).sum())[0, 0]
    tiles = [softmax_state(s[:, c], v[c]) for c in (slice(0, 2), slice(2, 4))]
    return [abs(finalize(forgetful_merge(*pair))[0][0, 0] - want) for pair in (tiles, tiles[::-1])]
    # --8<-- [end:forgetful]


def law_flash_exercise_the_factor_matters_when_the_maximum_grows():
    first, last = forgetful_errors()
    assert first < 8 * EPS
    assert last > 0.1


# --8<-- [start:crossover]
def crossover(N=1024, d=64):
    """The least on-chip memory, in steps of one key (4 d elements), at which tiles move no more elements."""
    whole = hbm_accesses(N, N, d)["total"]
    tiles = lambda M: hbm_accesses(N, N, d, sram_elements=M, algorithm="flash")["total"]
    return next(M for M in range(4 * d, N * d, 4 * d) if tiles(M) <= whole)
    # --8<-- [end:crossover]


def law_flash_exercise_tiles_lose_below_twelve_thousand_elements():
    assert crossover() == 49 * 4 * 64 == 12_544


# --8<-- [start:delta]
def two_sides_of_delta(seed=0, L=5, S=7, D=4, drop=0.3):
    """rowsum(dO o O) and rowsum(P o dP), with dropout: Z holds 1 / (1 - drop) where kept, else 0."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, D)) for n in (L, S, S))
    do, keep = rng.standard_normal((L, D)), rng.random((L, S)) >= drop
    o, lse = flash_attention(q, k, v, dropout_mask=keep, dropout_p=drop, return_lse=True)
    p, z = np.exp(q @ k.T / np.sqrt(D) - lse[:, None]), keep / (1 - drop)
    return (do * o).sum(-1), (p * (do @ v.T * z)).sum(-1)
    # --8<-- [end:delta]


@given(st.integers(0, 2**32 - 1))
def law_flash_exercise_delta_has_two_sides(seed):
    """Sums of 28 products of size at most some 30, in two orders."""
    left, right = two_sides_of_delta(seed)
    np.testing.assert_allclose(left, right, rtol=0, atol=64 * EPS * (1 + np.abs(left).max()) * 30)


# --8<-- [start:visited]
def visited(n, block):
    """The share of n x n scores in the square tiles that a causal kernel visits; block divides n."""
    T = n // block
    return sum(i + 1 for i in range(T)) / T**2
    # --8<-- [end:visited]


def law_flash_exercise_causal_tiles_visit_little_more_than_half():
    for n, block in ((1024, 128), (8192, 128), (4096, 512)):
        assert visited(n, block) == (1 + block / n) / 2
