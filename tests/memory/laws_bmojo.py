"""Laws of B'MOJO on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.losses import cross_entropy
from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.memory.bmojo import (
    archive_add,
    archive_lookup,
    bmojo_attention,
    bmojo_attention_vjp,
    bmojo_cache_bytes,
    bmojo_fading_attention,
    bmojo_fading_attention_vjp,
    bmojo_keys,
    bmojo_layer,
    bmojo_layer_vjp,
    bmojo_step,
    eidetic_members,
    evicted_tokens,
    init_bmojo,
    init_bmojo_cache,
    innovation_loss,
    innovation_scores,
    mqar_task,
)
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
selects = st.sampled_from((("topk", None), ("threshold", 0.9), ("threshold", -np.inf)))
# T, window, H, Hkv: shorter than the window, equal, twice, no multiple, one token, a window of one
SHAPES = ((3, 5, 2, 2), (4, 4, 2, 1), (8, 4, 2, 2), (11, 3, 4, 2), (1, 1, 1, 1), (6, 1, 2, 1))


@st.composite
def paths(draw, shapes=SHAPES):
    """((q, k, v, q_fading, k_fading, v_fading), window), with ordinary, saturated or nearly flat scores."""
    T, w, H, Hkv = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(seeds))
    gain = draw(st.sampled_from((1.0, 30.0, 1e-3)))
    return [gain * rng.standard_normal((2, h, T, 4)) for h in (H, Hkv, Hkv) * 2], w


def by_hand(q, k, v, sees, q_f=None, k_f=None, v_f=None, fades=lambda i, j: False, extra=None):
    """One softmax, one query at a time: over keys j with sees(b, i, j), and fading ones with fades(i, j)."""
    o = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, h, i in np.ndindex(q.shape[:-1]):
        g = h // (q.shape[1] // k.shape[1])
        near = [j for j in range(k.shape[2]) if sees(b, i, j)]
        far = [j for j in range(k.shape[2]) if fades(i, j)]
        logits, values = [k[b, g, near] @ q[b, h, i]], [v[b, g, near]]
        if far:
            logits.append(k_f[b, g, far] @ q_f[b, h, i])
            values.append(v_f[b, g, far])
        if extra is not None:
            kept = extra[2][i]
            logits.append(extra[0][b, g, kept] @ q[b, h, i])
            values.append(extra[1][b, g, kept])
        logits = np.concatenate(logits) / np.sqrt(q.shape[-1])
        p = np.exp(logits - logits.max())
        o[b, h, i] = p @ np.concatenate(values) / p.sum()
    return o


def rounding(*arrays):
    """Scores are off by some eps D |q||k|, which exp passes on to weights of |v|; 32 for the sums."""
    size = max(np.abs(a).max(initial=0) for a in arrays)
    return 32 * EPS * (1 + 4 * size**2) * (1 + size)


def band(w):
    return lambda b, i, j: i - w < j <= i


def behind(w):
    return lambda i, j: i - 2 * w < j <= i - w


@given(paths())
def law_bmojo_two_paths_are_one_softmax(case):
    (q, k, v, q_f, k_f, v_f), w = case
    o, lse = bmojo_fading_attention(q, k, v, q_f, k_f, v_f, window=w, return_lse=True)
    want = by_hand(q, k, v, band(w), q_f, k_f, v_f, behind(w))
    np.testing.assert_allclose(o, want, rtol=0, atol=rounding(q, k, v, q_f, k_f, v_f))
    assert lse.shape == o.shape[:-1]
    ones = bmojo_fading_attention(q, k, np.ones_like(v), q_f, k_f, np.ones_like(v), window=w)
    np.testing.assert_allclose(ones, 1, rtol=64 * EPS)  # the weights of a row sum to 1
    u = np.random.default_rng(0).standard_normal(4)  # the same vector on every key: a constant a query
    moved = bmojo_fading_attention(q, k + u, v, q, k_f + u, v_f, window=w)
    kept = bmojo_fading_attention(q, k, v, q, k_f, v_f, window=w)
    np.testing.assert_allclose(moved, kept, rtol=0, atol=2 * rounding(q, k + u, v, k_f + u, v_f))
    swapped = bmojo_fading_attention(*(a[:, ::-1] for a in (q, k, v, q_f, k_f, v_f)), window=w)
    np.testing.assert_allclose(swapped[:, ::-1], o, rtol=0, atol=rounding(q, k, v, q_f, k_f, v_f))


@given(paths())
def law_bmojo_limits_are_exact(case):
    """y = x and tied maps: a window of 2w. T <= w: full causal attention, whatever the fading path holds."""
    (q, k, v, q_f, k_f, v_f), w = case
    atol = rounding(q, k, v, k_f, v_f)
    np.testing.assert_allclose(
        bmojo_fading_attention(q, k, v, q, k, v, window=w), by_hand(q, k, v, band(2 * w)), rtol=0, atol=atol
    )
    full = by_hand(q, k, v, lambda b, i, j: j <= i)
    T = q.shape[2]
    np.testing.assert_allclose(
        bmojo_fading_attention(q, k, v, q_f, k_f, v_f, window=T), full, rtol=0, atol=atol
    )
    members = eidetic_members(np.zeros((2, T)), window=w, capacity=T, select="threshold", threshold=-np.inf)
    stored = bmojo_attention(q, k, v, None, None, members, window=w)  # a store of everything, no fading
    np.testing.assert_allclose(stored, full, rtol=0, atol=atol)
    none = np.zeros((2, T, 0), int)
    for empty in (None, none):
        got = bmojo_attention(q, k, v, k_f, v_f, empty, window=w, q_fading=q_f)
        np.testing.assert_array_equal(got, bmojo_fading_attention(q, k, v, q_f, k_f, v_f, window=w))


@given(paths(SHAPES[1:4]), st.integers(1, 3))
def law_bmojo_store_and_extra_keys_join_the_softmax(case, K):
    (q, k, v, q_f, k_f, v_f), w = case
    T, rng = q.shape[2], np.random.default_rng(K)
    members = eidetic_members(rng.standard_normal((2, T)), window=w, capacity=K)
    held = lambda b, i, j: band(w)(b, i, j) or j in members[b, i]
    want = by_hand(q, k, v, held, q_f, k_f, v_f, behind(w))
    options = {"window": w, "q_fading": q_f}
    got = bmojo_attention(q, k, v, k_f, v_f, members, **options)
    atol = rounding(q, k, v, q_f, k_f, v_f)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    extra_k, extra_v, mask = 2 * k[:, :, :3], 2 * v[:, :, :3], rng.random((T, min(T, 3))) < 0.5
    more = bmojo_attention(
        q, k, v, k_f, v_f, members, **options, extra_k=extra_k, extra_v=extra_v, extra_mask=mask
    )
    want = by_hand(q, k, v, held, q_f, k_f, v_f, behind(w), (extra_k, extra_v, mask))
    np.testing.assert_allclose(more, want, rtol=0, atol=4 * atol)
    off = bmojo_attention(q, k, v, k_f, v_f, members, **options, extra_k=extra_k, extra_v=extra_v,
                          extra_mask=np.zeros_like(mask))  # fmt: skip
    np.testing.assert_array_equal(off, got)


@given(paths(SHAPES[2:4]))
def law_bmojo_strided_fading_takes_every_nth(case):
    (q, k, v, q_f, k_f, v_f), w = case
    got = bmojo_attention(
        q, k, v, k_f, v_f, None, window=w, q_fading=q_f, fading="strided", stride=2, count=2
    )
    want = by_hand(q, k, v, band(w), q_f, k_f, v_f, lambda i, j: j in (i - w, i - w - 2))
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(q, k, v, q_f, k_f, v_f))
    dense = bmojo_attention(q, k, v, k_f, v_f, None, window=w, q_fading=q_f, fading="strided", count=w)
    np.testing.assert_array_equal(dense, bmojo_fading_attention(q, k, v, q_f, k_f, v_f, window=w))


def law_bmojo_attention_takes_extremes():
    """Logits of 1e4 in either path stay finite, rows without fading keys included; no rows, no batch."""
    rng = np.random.default_rng(0)
    q, k, v, q_f, k_f, v_f = rng.standard_normal((6, 1, 2, 9, 4))
    for big in ((1e4, 1), (1, 1e4), (1e4, 1e4)):
        assert np.isfinite(bmojo_fading_attention(big[0] * q, k, v, big[1] * q_f, k_f, v_f, window=2)).all()
    none = [a[:, :, :0] for a in (q, k, v, q_f, k_f, v_f)]
    assert bmojo_fading_attention(*none, window=2).shape == (1, 2, 0, 4)
    assert bmojo_fading_attention(*(a[:0] for a in (q, k, v, q_f, k_f, v_f)), window=2).shape == (0, 2, 9, 4)


@given(seeds, st.sampled_from(SHAPES), st.booleans())
def law_bmojo_attention_gradients_are_central_differences(seed, shape, tied):
    T, w, H, Hkv = shape
    rng = np.random.default_rng(seed)
    draw = lambda h, n=T: rng.standard_normal((2, h, n, 4))
    args = {"q": draw(H), "k": draw(Hkv), "v": draw(Hkv), "k_fading": draw(Hkv), "v_fading": draw(Hkv)}
    if not tied:
        args["q_fading"] = draw(H)
    args |= {"extra_k": draw(Hkv, 2), "extra_v": draw(Hkv, 2)}
    rest = {"members": eidetic_members(rng.random((2, T)), window=w, capacity=2), "window": w,
            "extra_mask": rng.random((T, 2)) < 0.7}  # fmt: skip
    do = draw(H)
    grads = bmojo_attention_vjp(**args, **rest, do=do)
    assert set(grads) == set(args)
    for name, x in args.items():
        d = rng.standard_normal(x.shape)
        f = lambda h, name=name, x=x, d=d: np.sum(do * bmojo_attention(**{**args, name: x + h * d}, **rest))
        slope, error = slope_of(f)
        bound = error + 64 * EPS / 1e-5 * (1 + np.abs(do).sum())  # cancellation eps / h
        np.testing.assert_allclose(np.sum(grads[name] * d), slope, rtol=0, atol=bound)
    six = [args[n] for n in ("q", "k", "v")] + [
        args.get("q_fading", args["q"]),
        args["k_fading"],
        args["v_fading"],
    ]
    apart = bmojo_fading_attention_vjp(*six, do, window=w)
    joined = bmojo_attention_vjp(*six[:3], *six[4:], None, do, window=w)
    if tied:  # a query in both paths gets both parts
        np.testing.assert_allclose(
            apart[0] + apart[3], joined["q"], rtol=0, atol=64 * EPS * np.abs(do).max() * 16
        )


@given(seeds)
def law_bmojo_innovation_is_what_the_past_did_not_say(seed):
    rng = np.random.default_rng(seed)
    x, y, w = rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 6, 3)), rng.standard_normal((3, 3))
    scores = innovation_scores(x, y, w)
    for b, t in np.ndindex(2, 6):
        e = x[b, t] - (y[b, t - 1] @ w if t else 0)
        np.testing.assert_allclose(scores[b, t], e @ e / (x[b, t] @ x[b, t] + 1e-6), rtol=1e-12)
    later = y.copy()
    later[:, 3] += 1  # y_3 holds token 3 itself: it must not tell of it
    np.testing.assert_array_equal(innovation_scores(x, later, w)[:, :4], scores[:, :4])
    foreseen = x.copy()
    foreseen[:, 1:] = y[:, :-1] @ w
    assert innovation_scores(foreseen, y, w)[:, 1:].max() < 1e-25
    dy, dw = rng.standard_normal(y.shape), rng.standard_normal(w.shape)
    _, gy, gw = innovation_loss(x, y, w)
    slope, error = slope_of(lambda h: innovation_loss(x, y + h * dy, w + h * dw)[0])
    np.testing.assert_allclose(
        np.sum(gy * dy) + np.sum(gw * dw), slope, rtol=0, atol=error + 1e-8 * (1 + abs(slope))
    )


@given(seeds, st.integers(1, 4), st.integers(0, 3), selects, st.booleans())
def law_bmojo_members_are_the_best_that_left_the_window(seed, w, K, select, ties):
    rng, (select, threshold) = np.random.default_rng(seed), select
    n = rng.integers(0, 3, (2, 9)).astype(float) if ties else rng.standard_normal((2, 9))
    members = eidetic_members(n, window=w, capacity=K, select=select, threshold=threshold)
    assert members.shape == (2, 9, K)
    for b, i in np.ndindex(2, 9):
        candidates = range(max(i - w + 1, 0))
        if select == "topk":
            best = sorted(candidates, key=lambda j: (n[b, j], j))[::-1][:K]  # of equals the later stays
        else:
            best = [j for j in candidates if n[b, j] > threshold][::-1][:K]
        want = sorted(best)
        np.testing.assert_array_equal(members[b, i], want + [-1] * (K - len(want)))
    gone = evicted_tokens(members, window=w)
    for b in range(2):
        held = [j for j in members[b, -1] if j >= 0]
        left = [j for j in gone[b] if j >= 0]
        assert sorted(held + left) == list(range(max(9 - w, 0)))  # each is held, or has left once


def law_bmojo_members_never_hold_a_nan():
    n = np.array([np.nan, 1.0, np.nan, 2.0, 0.0])
    np.testing.assert_array_equal(eidetic_members(n, window=1, capacity=2)[-1], [1, 3])
    got = eidetic_members(n, window=1, capacity=2, select="threshold", threshold=-np.inf)
    np.testing.assert_array_equal(got[-1], [1, 3])
    assert eidetic_members(n[:0], window=1, capacity=2).shape == (0, 2)


def layer(seed, tied=True, norms=False):
    """(x, params) with maps and a predictor that matter."""
    rng = np.random.default_rng(seed)
    p = init_bmojo(rng, 8, heads=4, kv_heads=2, state=3, tied=tied)
    gains = {"q_norm": 1 + 0.1 * rng.standard_normal(2), "k_norm": 1 + 0.1 * rng.standard_normal(2)}
    p = p._replace(w_pred=rng.standard_normal((8, 8)), **(gains if norms else {}))
    return 2 * rng.standard_normal((2, 9, 8)), p


@given(seeds, selects, st.booleans(), st.sampled_from((None, 100.0)), st.sampled_from((0, 3)))
def law_bmojo_steps_are_the_layer(seed, select, tied, rope_base, K):
    x, p = layer(seed, tied, norms=rope_base is not None)
    options = {
        "window": 2,
        "capacity": K,
        "select": select[0],
        "threshold": select[1],
        "rope_base": rope_base,
    }
    want = bmojo_layer(x, p, tied=tied, **options)
    cache, rows = init_bmojo_cache(p, capacity=K, lead=(2,)), []
    for t in range(9):
        row, cache = bmojo_step(x[:, t], cache, p, **options)
        rows.append(row)
    # sums of 8 terms in another order, through logits of size 10 at most
    atol = 4096 * EPS * (1 + np.abs(want).max())
    np.testing.assert_allclose(np.stack(rows, axis=1), want, rtol=0, atol=atol)
    numbers = sum(
        a.size for a in (cache.k, cache.v, cache.k_fading, cache.v_fading, cache.k_store, cache.v_store)
    )
    sizes = {"window": 2, "capacity": K, "kv_heads": 2, "head_dim": 2, "dtype_bytes": 1}
    assert numbers == 2 * bmojo_cache_bytes(**sizes, pending=True)  # two sequences


@given(seeds, selects)
def law_bmojo_layer_is_causal(seed, select):
    """Also in what it stores: a later token changes no earlier output, to the bit."""
    x, p = layer(seed)
    options = {"window": 2, "capacity": 2, "select": select[0], "threshold": select[1]}
    later = x.copy()
    later[:, 5] += 1
    a, b = (bmojo_layer(v, p, **options) for v in (x, later))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (a[:, 5] != b[:, 5]).any()


@given(seeds)
def law_bmojo_layer_with_any_mixer_and_grouped_heads(seed):
    """The identity as a mixer: a window of 2w. Grouped keys equal keys repeated by hand."""
    x, p = layer(seed)
    y = bmojo_layer(x, p, window=2, mixer=lambda x: x)
    heads = lambda w: x[:, None] @ w
    want = by_hand(heads(p.w_q), heads(p.w_k), heads(p.w_v), band(4))
    want = np.einsum("bhtd,hdc->btc", want, p.w_o)
    np.testing.assert_allclose(
        y, want, rtol=0, atol=1024 * EPS * (1 + np.abs(want).max()) * (1 + np.abs(x).max())
    )
    wide = p._replace(w_k=np.repeat(p.w_k, 2, axis=0), w_v=np.repeat(p.w_v, 2, axis=0))
    options = {"window": 2, "capacity": 2}
    np.testing.assert_allclose(
        bmojo_layer(x, wide, **options), bmojo_layer(x, p, **options), rtol=0,
        atol=1024 * EPS * (1 + np.abs(want).max()),
    )  # fmt: skip
    assert bmojo_layer(x[:, :0], p, **options).shape == (2, 0, 8)
    assert bmojo_layer(x[:0], p, **options).shape == (0, 9, 8)


@given(seeds, st.booleans(), st.sampled_from((None, 100.0)))
def law_bmojo_layer_gradients_are_central_differences(seed, tied, rope_base):
    """With the choice of tokens held still by a threshold that all pass; the predictor learns by its loss."""
    x, p = layer(seed, tied, norms=rope_base is not None)
    rng = np.random.default_rng(seed)
    options = {"window": 2, "capacity": 2, "select": "threshold", "threshold": -1.0, "tied": tied,
               "rope_base": rope_base}  # fmt: skip
    dy, d_x = rng.standard_normal(x.shape), rng.standard_normal(x.shape)
    d_p = tree_map(lambda w: rng.standard_normal(w.shape), p)
    moved = lambda h: (x + h * d_x, tree_map(lambda w, d: w + h * d, p, d_p))
    slope, error = slope_of(lambda h: np.sum(dy * bmojo_layer(*moved(h), **options)))
    dx, grads = bmojo_layer_vjp(x, p, dy, **options)
    got = np.sum(dx * d_x) + sum(tree_leaves(tree_map(lambda g, d: np.sum(g * d), grads, d_p)))
    bound = error + 1024 * EPS / 1e-5 * (1 + np.abs(dy).sum() * (1 + np.abs(x).max()))
    np.testing.assert_allclose(got, slope, rtol=0, atol=bound)
    assert not grads.w_pred.any()
    assert bmojo_layer_vjp(x, p, dy, **options, predict=0.1)[1].w_pred.any()


def law_bmojo_lookup_of_all_is_full_attention():
    """lag 1 and n_r = all: the store keeps nothing, the archive everything that left the window."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((4, 7, 3)), rng.standard_normal((2, 7, 3)), rng.standard_normal((2, 7, 3))
    members = eidetic_members(np.zeros(7), window=2, capacity=0)
    gone, archive, rows = evicted_tokens(members, window=2), None, []
    for t in range(7):
        if gone[t] >= 0:
            archive = archive_add(archive, gone[t], k[:, gone[t]], v[:, gone[t]])
        found = (None, None, None) if archive is None else archive_lookup(archive, q[:, t - 1], n_r=7)
        at = slice(max(t - 1, 0), t + 1)  # the window: two tokens
        o = bmojo_attention(q[:, at], k[:, at], v[:, at], None, None, None, window=2, extra_k=found[0],
                            extra_v=found[1], extra_mask=found[2])  # fmt: skip
        rows.append(o[:, -1])
    want = by_hand(q[None], k[None], v[None], lambda b, i, j: j <= i)[0]
    np.testing.assert_allclose(np.stack(rows, axis=1), want, rtol=0, atol=1e-12)
    few_k, _, mask = archive_lookup(archive, q[:, 6], n_r=2)
    assert few_k.shape == (2, 2, 3)
    assert mask.all()
    for g in range(2):
        suits = (q[2 * g : 2 * g + 2, 6] @ archive.k[g].T).max(axis=0)
        np.testing.assert_array_equal(few_k[g], archive.k[g][np.argsort(-suits)[:2]])


@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 6))
def law_bmojo_keys_are_counted(t, w, K):
    members = eidetic_members(np.zeros(t + 1), window=w, capacity=K)
    fading = [j for j in range(t + 1) if behind(w)(t, j)]
    assert bmojo_keys(t, window=w, capacity=K) == min(t + 1, w) + len(fading) + (members[t] >= 0).sum()
    late = bmojo_keys(10**6, window=w, capacity=K)
    assert late == 2 * w + K
    sizes = {"window": w, "capacity": K, "kv_heads": 3, "head_dim": 5}
    assert bmojo_cache_bytes(**sizes) == 2 * 2 * late * 3 * 5


def law_bmojo_tiny_layer_learns_to_recall():
    """Thirty steps on pairs to recall, with the predictor beside: the loss falls; nothing more is asked."""
    vocab, width, options = 12, 8, {"window": 3, "capacity": 3}
    rng = np.random.default_rng(0)
    params = {
        "layer": init_bmojo(0, width, heads=2, kv_heads=2, state=3),
        "embed": 0.5 * rng.standard_normal((vocab, width)),
        "head": rng.standard_normal((width, vocab)) / 3,
    }
    state, losses = adam_init(params), []
    for step in range(30):
        tokens, targets, weight = mqar_task(step, 16, 12, 3, vocab)
        x = params["embed"][tokens]
        h = x + bmojo_layer(x, params["layer"], **options)
        labels = np.where(weight > 0, targets, -1)
        loss, dlogits = cross_entropy(h @ params["head"], labels, ignore=-1)
        dh = dlogits @ params["head"].T
        dx, dlayer = bmojo_layer_vjp(x, params["layer"], dh, **options, predict=0.1)
        dembed = np.zeros_like(params["embed"])
        np.add.at(dembed, tokens, dh + dx)
        dhead = h.reshape(-1, width).T @ dlogits.reshape(-1, vocab)
        grads = {"layer": dlayer, "embed": dembed, "head": dhead}
        params, state = adam(params, grads, state, lr=0.02)
        losses.append(loss)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
