"""Laws of Longformer on ref alone: NumPy and Hypothesis."""

import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.attention.longformer import (
    LongformerConfig,
    LongformerParams,
    entity_f1,
    extend_positions,
    extend_to_longformer,
    longformer_attention,
    longformer_attention_bwd,
    longformer_cost,
    longformer_encoder,
    longformer_mask,
    mlm_loss,
    receptive_field,
    sliding_window_attention,
    sliding_window_attention_bwd,
    span_metrics,
)
from ref.blocks.attention import attention_dense, split_heads
from ref.blocks.transformer import QKVParams
from ref.counting import Tally, count
from ref.models.bert import bert_encode, init_bert
from ref.models.heads import LinearHead, MLMHead, mlm_logits, span_logits
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def sees(i, j, window, dilation, causal, is_global):
    steps, rest = divmod(j - i, dilation)
    near = rest == 0 and abs(steps) <= window // 2 and (steps <= 0 or not causal)
    return near or is_global[i] or is_global[j]


def definition(local, wide, window, dilation, causal, is_global, real, scale):
    """One head, row by row: local rows by (q, k, v), global rows by the other three, exact sums."""
    L, D = local[2].shape
    o = np.zeros((L, D))
    for i in range(L):
        if not real[i]:
            continue
        q, k, v = wide if is_global[i] else local
        keys = [j for j in range(L) if real[j] and sees(i, j, window, dilation, causal, is_global)]
        s = [scale * math.fsum(q[i] * k[j]) for j in keys]
        e = [math.exp(x - max(s)) for x in s]
        o[i] = [math.fsum(w * v[j, c] for w, j in zip(e, keys, strict=True)) / math.fsum(e) for c in range(D)]
    return o


def rounding(q, k, v, scale):
    """Scores are off by D eps scale |q||k|, exp passes on twice that; sums add L eps |v|."""
    L, D = q.shape[-2:]
    scores = scale * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    return EPS * (2 * (D + 2) * scores + 2 * L + 8) * max(1.0, np.abs(v).max())


@st.composite
def calls(draw, globals_=True):
    """(q, k, v [2, 2, L, D], options): any length, window, dilation, masks, three regimes of softmax."""
    L, D = draw(st.integers(1, 17)), draw(st.sampled_from((1, 3, 4)))
    rng = np.random.default_rng(draw(seeds))
    q, k, v = draw(st.sampled_from((1.0, 30.0, 1e-3))) * rng.standard_normal((3, 2, 2, L, D))
    options = {
        "window": draw(st.sampled_from((2, 4, 6, 40))),
        "dilation": draw(st.sampled_from((1, 1, 2, 3))),
    }
    if draw(st.booleans()):
        options["token_mask"] = rng.random((2, L)) < 0.8
    if globals_ and draw(st.booleans()):
        options["global_mask"] = rng.random((2, L)) < 0.3
    else:
        options["causal"] = draw(st.booleans())
    return q, k, v, options


def masks(q, options):
    """(global, real) [2, L], padded tokens never global."""
    real = options.get("token_mask", np.ones((2, q.shape[-2]), bool))
    return options.get("global_mask", np.zeros_like(real)) & real, real


@given(calls())
def law_longformer_every_method_equals_the_definition(call):
    q, k, v, options = call
    scale = 1 / np.sqrt(q.shape[-1])
    is_global, real = masks(q, options)
    shape = options["window"], options["dilation"], options.get("causal", False)
    want = np.array(
        [
            [
                definition(*[(q[b, h], k[b, h], v[b, h])] * 2, *shape, is_global[b], real[b], scale)
                for h in (0, 1)
            ]
            for b in (0, 1)
        ]
    )
    chunks = options["dilation"] == 1 and not options.get("causal", False)
    for method in ("band", "dense", "chunks")[: 2 + chunks]:
        got = sliding_window_attention(q, k, v, method=method, **options)
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(q, k, v, scale), err_msg=method)


def law_longformer_an_empty_batch_gives_an_empty_result():
    empty = np.zeros((0, 2, 5, 3))
    for method in ("band", "dense", "chunks"):
        assert sliding_window_attention(empty, empty, empty, window=2, method=method).shape == empty.shape
    for g in sliding_window_attention_bwd(empty, empty, empty, empty, window=2):
        assert g.shape == empty.shape


@given(calls(), st.floats(0.1, 2))
def law_longformer_padding_is_never_seen(call, scale):
    """NaN in padded tokens changes no bit, forward or backward; their rows and gradients are 0."""
    q, k, v, options = call
    real = masks(q, options)[1][:, None, :, None]
    bad = [np.where(real, x, np.nan) for x in (q, k, v)]
    do = np.ones_like(q)
    for fn, args, dirty in (
        (sliding_window_attention, (), ()),
        (sliding_window_attention_bwd, (do,), (np.where(real, do, np.nan),)),
    ):
        want, got = fn(*args, q, k, v, scale=scale, **options), fn(*dirty, *bad, scale=scale, **options)
        np.testing.assert_array_equal(got, want)
        assert not np.where(real, 0, np.array(got)).any()


@given(calls())
def law_longformer_gradients_are_central_differences(call):
    """h = 1e-5 on data of size 1: error h^2 f''' + eps f / h, both under 1e-8 of the terms' size."""
    q, k, v, options = call
    gain = max(np.abs(q).max(), np.abs(k).max(), np.abs(v).max())
    q, k, v = q / gain, k / gain, v / gain
    rng = np.random.default_rng(1)
    do, *d = rng.standard_normal((4, *q.shape))
    grads = sliding_window_attention_bwd(do, q, k, v, **options)
    for at, g in enumerate(grads):
        moved = lambda h, at=at: [x + h * d[at] * (n == at) for n, x in enumerate((q, k, v))]
        f = lambda h, m=moved: np.sum(do * sliding_window_attention(*m(h), **options))
        slope = (f(1e-5) - f(-1e-5)) / 2e-5
        size = 1 + np.abs(do).sum() * max(1.0, np.abs(d[at]).max()) ** 3
        np.testing.assert_allclose(np.sum(g * d[at]), slope, rtol=0, atol=1e-8 * size)


@given(calls())
def law_longformer_a_value_out_of_sight_has_no_gradient(call):
    """d o_i / d v_j is exactly 0 unless the mask shows j to i."""
    q, k, v, options = call
    is_global, real = masks(q, options)
    o = {n: options[n] for n in ("window", "dilation", "causal") if n in options}
    for i in range(q.shape[-2]):
        do = np.zeros_like(q)
        do[:, :, i] = 1
        dv = sliding_window_attention_bwd(do, q, k, v, **options)[2]
        for b in (0, 1):
            g = is_global[b] if "global_mask" in options else None
            seen = longformer_mask(q.shape[-2], global_mask=g, **o)[i] & real[b] & real[b, i]
            assert not dv[b][:, ~seen].any()
            assert (dv[b][:, seen].sum(axis=(1, 2)) > 0).all() or not seen.any()


@given(seeds, st.integers(1, 12), st.booleans())
def law_longformer_a_wide_window_is_full_attention(seed, L, causal):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 2, L, 4))
    got = sliding_window_attention(q, k, v, window=2 * L, causal=causal)
    want = attention_dense(q, k, v, causal=causal)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * rounding(q, k, v, 0.5))


@given(seeds, st.integers(2, 12))
def law_longformer_mask_is_symmetric_and_counts(seed, L):
    g = np.random.default_rng(seed).random((3, L)) < 0.3
    mask = longformer_mask(L, window=4, dilation=2, global_mask=g)
    np.testing.assert_array_equal(mask, np.swapaxes(mask, -1, -2))
    for b in range(3):
        for i in range(L):
            assert all(mask[b, i, j] == sees(i, j, 4, 2, False, g[b]) for j in range(L))
    for window in range(2, L, 2):
        half = window // 2  # every row sees window + 1 keys, less what the two ends cut
        assert longformer_mask(L, window=window).sum() == L * (window + 1) - half * (half + 1)


def law_longformer_pairs_of_the_paper_size():
    """4,096 tokens, window 512: 2,035,456 visible pairs, 8.24 times fewer than all."""
    pairs = int(longformer_mask(4096, window=512).sum())
    assert pairs == 2035456
    assert round(4096**2 / pairs, 2) == 8.24


@given(seeds, st.integers(1, 6))
def law_longformer_away_from_the_ends_a_shift_shifts(seed, shift):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 30, 4))
    o = sliding_window_attention(q, k, v, window=4)
    moved = sliding_window_attention(*(np.roll(x, shift, axis=-2) for x in (q, k, v)), window=4)
    inner = slice(shift + 2, 28)
    np.testing.assert_allclose(
        moved[:, inner], np.roll(o, shift, axis=-2)[:, inner], rtol=0, atol=2 * rounding(q, k, v, 0.5)
    )


def layer(seed, C=6, heads=2, B=2, L=11):
    rng = np.random.default_rng(seed)
    maps = lambda: QKVParams(*(rng.standard_normal(s) / 2 for s in ((C, C), C) * 3))
    token_mask = np.arange(L) < rng.integers(L // 2, L + 1, (B, 1))
    return (
        rng.standard_normal((B, L, C)),
        LongformerParams(maps(), maps()),
        rng.random((B, L)) < 0.3,
        token_mask,
    )


@given(seeds)
def law_longformer_layer_equals_the_definition(seed):
    x, params, g, real = layer(seed)
    got = longformer_attention(x, params, num_heads=2, window=4, global_mask=g, token_mask=real)
    head = lambda w, b, n: (x @ w + b)[:, :, 3 * n : 3 * n + 3]
    three = lambda p, n: [head(w, b, n) for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))]
    for n in (0, 1):
        local, wide = three(params.local, n), three(params.wide, n)
        for b in (0, 1):
            want = definition(
                [t[b] for t in local], [t[b] for t in wide], 4, 1, False, g[b] & real[b], real[b], 3**-0.5
            )
            atol = max(rounding(*t, 3**-0.5) for t in (local, wide)) * 8  # and the maps before: 6 terms each
            np.testing.assert_allclose(got[b, :, 3 * n : 3 * n + 3], want, rtol=0, atol=atol)


@given(seeds)
def law_longformer_all_global_is_full_attention_by_the_wide_maps(seed):
    x, params, _, real = layer(seed)
    got = longformer_attention(
        x, params, num_heads=2, window=2, global_mask=np.ones_like(real), token_mask=real
    )
    p = params.wide
    q, k, v = (split_heads(x @ w + b, 2) for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v)))
    o = attention_dense(q, k, v, mask=real[:, None, None, :]) * real[:, None, :, None]
    want = np.swapaxes(o, 1, 2).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * rounding(q, k, v, 3**-0.5))


@given(seeds)
def law_longformer_layer_gradients_are_central_differences(seed):
    x, params, g, real = layer(seed, L=7)
    options = {"num_heads": 2, "window": 2, "global_mask": g, "token_mask": real}
    rng = np.random.default_rng(seed)
    do = rng.standard_normal(x.shape)
    dx, dparams = longformer_attention_bwd(do, x, params, **options)
    run = lambda x, p: np.sum(do * longformer_attention(x, p, **options))
    flat = [x, *params.local, *params.wide]
    build = lambda f: (f[0], LongformerParams(QKVParams(*f[1:7]), QKVParams(*f[7:])))
    for at, grad in enumerate([dx, *dparams.local, *dparams.wide]):
        d = rng.standard_normal(grad.shape)
        d /= np.linalg.norm(d)
        moved = lambda h, at=at, d=d: run(*build([y + h * d if n == at else y for n, y in enumerate(flat)]))
        slope, change = slope_of(moved)
        # what doubling the step changes is the truncation, three times over; eps |f| / h is 1e-9 here
        np.testing.assert_allclose(np.sum(grad * d), slope, rtol=0, atol=change + 1e-8)
    for part in (dx[~real], *(() if (g & real).any() else dparams.wide)):
        assert not part.any()


def law_longformer_receptive_field_is_the_reach_of_gradients():
    """Stacked windows: from one row of the last layer back to the first, by the backward pass."""
    rng = np.random.default_rng(0)
    L, plan = 41, ((4, 1), (2, 3), (6, 1))
    tensors = [rng.standard_normal((3, 1, L, 2)) for _ in plan]
    d = np.zeros((1, L, 2))
    d[:, L // 2] = 1
    for (window, dilation), (q, k, v) in zip(plan[::-1], tensors, strict=True):
        d = sliding_window_attention_bwd(d, q, k, v, window=window, dilation=dilation)[2]
    support = np.flatnonzero(np.abs(d).sum(axis=(0, 2)))
    assert support[-1] - support[0] + 1 == receptive_field(*zip(*plan, strict=True)) == 17
    gaps = sliding_window_attention_bwd(
        np.ones((1, L, 2)) * (np.arange(L) == 20)[:, None], q, k, v, window=4, dilation=3
    )
    assert set(np.flatnonzero(gaps[2].sum(axis=(0, 2)))) == {14, 17, 20, 23, 26}


@given(seeds, st.integers(1, 5), st.integers(0, 12), st.integers(0, 2))
def law_longformer_extended_positions_repeat(seed, old, more, reserved):
    table = np.random.default_rng(seed).standard_normal((reserved + old, 3))
    new = extend_positions(table, new_len=old + more, num_reserved=reserved)
    assert new.shape == (reserved + old + more, 3)
    np.testing.assert_array_equal(new[: reserved + old], table)
    for t in range(more):
        np.testing.assert_array_equal(new[reserved + t], new[reserved + t + old])


@given(seeds, st.sampled_from((0, 2)))
def law_longformer_extended_model_is_the_old_one_on_short_texts(seed, reserved):
    rng = np.random.default_rng(seed)
    bert = init_bert(rng, vocab=9, context=reserved + 6, dim=6, depth=2, types=1, pooler=False, std=0.4)
    old = LongformerConfig(2, num_reserved=reserved)
    model, config = extend_to_longformer(bert, old, new_len=20, window=12)
    assert config == LongformerConfig(2, window=12, num_reserved=reserved)
    ids, real = rng.integers(0, 9, (2, 6)), np.arange(6) < np.array([[6], [4]])
    got = longformer_encoder(
        model, ids, config=config, token_mask=real, global_mask=np.arange(6) < np.full((2, 1), 1)
    )
    short = bert._replace(position=bert.position[reserved:])
    want = bert_encode(ids, short, num_heads=2, token_mask=real, eps=config.eps)
    # two blocks of width 6 behind layer norms: values of size 1, well under a thousand roundings each
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e4 * EPS)
    long = rng.integers(0, 9, (1, 20))
    assert np.isfinite(longformer_encoder(model, long, config=config)).all()
    padded = np.r_[ids[0], 7, 7][None]
    row = longformer_encoder(model, padded, config=config, token_mask=np.arange(8)[None] < 6)
    alone = longformer_encoder(model, ids[:1], config=config)
    np.testing.assert_allclose(row[:, :6], alone, rtol=0, atol=1e4 * EPS)


def law_longformer_every_block_may_have_its_own_window():
    """Equal windows are one window; with (2, 4) a token reaches 1 + 2 to each side."""
    rng = np.random.default_rng(0)
    bert = init_bert(rng, vocab=9, context=11, dim=6, depth=2, types=1, pooler=False, std=0.4)
    model, config = extend_to_longformer(bert, LongformerConfig(2), new_len=9, window=2)
    ids = rng.integers(1, 9, (1, 9))
    run = lambda ids, window: longformer_encoder(model, ids, config=replace(config, window=window))
    np.testing.assert_array_equal(run(ids, (2, 2)), run(ids, 2))
    for j in range(9):
        other = ids.copy()
        other[0, j] = 0
        moved = (run(other, (2, 4)) != run(ids, (2, 4))).any(axis=-1)[0]
        assert moved[max(0, j - 3) : j + 4].all()
        assert not moved[: max(0, j - 3)].any()
        assert not moved[j + 4 :].any()


@given(st.integers(1, 20), st.sampled_from((2, 4)), st.integers(0, 3))
def law_longformer_cost_is_what_is_counted(n, window, num_global):
    rng, num_global = np.random.default_rng(0), min(num_global, n)
    cost = longformer_cost(n, window, num_global, 6, num_heads=2)
    tally = Tally()
    x, *maps = count(tally, rng.standard_normal((1, n, 6)), *(rng.standard_normal((6, 6)) for _ in range(6)))
    params = LongformerParams(*(QKVParams(a, None, b, None, c, None) for a, b, c in (maps[:3], maps[3:])))
    g = np.arange(n)[None] < num_global
    longformer_attention(x, params, num_heads=2, window=window, global_mask=g)
    assert tally.macs == cost["macs"]
    assert cost["bytes"] == 4 * cost["score_elements"]
    twice, four = (longformer_cost(m * n, window, num_global, 6, num_heads=2) for m in (2, 4))
    assert all(four[key] == 2 * twice[key] for key in cost)  # linear in n


def law_longformer_chunks_multiply_twice_the_band():
    """Scores: 2 w keys a query against w + 1. Values: blocks of half a window see 3/2 w."""
    n, w, D = 256, 8, 4
    macs = {}
    for method in ("band", "chunks", "dense"):
        tally = Tally()
        x = count(tally, np.ones((1, n, D)))
        sliding_window_attention(x, x, x, window=w, method=method)
        macs[method] = tally.macs
    assert macs["band"] == 2 * n * (w + 1) * D
    assert macs["chunks"] == (n // (w // 2) - 1) * w * w * D + n * 3 * w // 2 * D
    assert macs["dense"] == 4 * n * n * D  # local and global rows each take all pairs


@given(seeds)
def law_longformer_masked_word_loss_is_the_mean_of_those_asked(seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((2, 5, 7)), rng.integers(0, 7, (2, 5))
    labels[rng.random((2, 5)) < 0.5] = -100
    want = [
        math.log(sum(map(math.exp, logits[i]))) - logits[i][labels[i]]
        for i in np.ndindex(2, 5)
        if labels[i] >= 0
    ]
    np.testing.assert_allclose(mlm_loss(logits, labels), np.mean(want) if want else 0, rtol=32 * EPS)
    word, x = rng.standard_normal((7, 4)), rng.standard_normal((2, 5, 4))
    head = MLMHead(np.eye(4), np.zeros(4), np.ones(4), np.zeros(4), np.arange(7.0))
    h = x * np.vectorize(lambda t: (1 + math.erf(t / math.sqrt(2))) / 2)(x)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(mlm_logits(head, x, word), h @ word.T + np.arange(7), rtol=0, atol=1e-12)
    start, end = span_logits(LinearHead(np.eye(4)[:, :2], np.array([0, 1.0])), x)
    np.testing.assert_array_equal((start, end - 1), (x[..., 0], x[..., 1] + 1 - 1))


def law_longformer_metrics_by_hand():
    got = span_metrics(np.array([[2, 4], [0, 0], [5, 3]]), np.array([[2, 4], [0, 3], [5, 5]]))
    assert got == {"exact_match": 1 / 3, "f1": (1 + 2 / 5 + 0) / 3}
    gold = [["B-drug", "I-drug", "O", "B-dose"], ["O", "B-drug"]]
    assert entity_f1(gold, gold) == 1
    assert entity_f1([["B-drug", "O", "O", "B-dose"], ["O", "B-drug"]], gold) == 4 / 6
    # an I- without its B- is no entity; another kind ends the one before
    assert entity_f1([["O", "I-drug", "O", "B-dose"], ["O", "B-dose"]], gold) == 2 / 5
    assert entity_f1([["O"]], [["O"]]) == 1
