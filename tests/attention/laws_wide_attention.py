"""Laws of wide attention and its ten kinds on ref alone: NumPy and Hypothesis."""

import math
from statistics import median

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.attention.bigbird import bigbird_rand_blocks
from ref.attention.wide_attention import (
    Machine,
    WideConfig,
    activation_numbers,
    aspect_ratios,
    attend,
    attention_mask,
    count_flops,
    count_params,
    encoder,
    init_encoder,
    latency_model,
    listops,
    multi_head_attention,
    multi_head_attention_bwd,
)
from ref.blocks.linear_attention import linear_attention_vjp, orthogonal_features, performer_attention
from ref.blocks.mixed_attention import linformer_attention, linformer_attention_vjp, sinkhorn
from ref.blocks.positions import sinusoidal_positions
from ref.blocks.transformer import AttentionParams
from ref.counting import Tally, count
from ref.tasks.listops import WORDS
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
T, H, D, DIM = 12, 3, 4, 5


def setting(kind, seed):
    """(extras, options) of a kind for T tokens, H heads of D."""
    rng = np.random.default_rng(seed)
    options = {
        "local": {"block": 4, "neighbors": 1},
        "sparse": {"block": 3, "stride": 4, "keep_from": 3, "causal": bool(seed % 2)},
        "longformer": {"window": 4, "global_tokens": (0, 7)},
        "bigbird": {"block": 2},
        "performer": {"kernel": ("softmax", "relu")[seed % 2]},
        "sinkhorn": {"block": 3, "iterations": 5},
    }.get(kind, {})
    extras = {
        "bigbird": lambda: {"rand_blocks": bigbird_rand_blocks(rng.random((H, 4, 6)), num_rand=1)},
        "linformer": lambda: dict(zip(("e_k", "e_v"), rng.standard_normal((2, T, 5)) / 3, strict=True)),
        "performer": lambda: {"proj": orthogonal_features(rng, 7, D)},
        "synthesizer": lambda: {"r1": rng.standard_normal((H, T, 2)), "r2": rng.standard_normal((H, 2, T))},
    }.get(kind, dict)()
    return extras, options


KINDS = ("dense", "local", "sparse", "longformer", "bigbird", "linformer", "linear", "performer", "sinkhorn")
kinds = st.sampled_from((*KINDS, "synthesizer"))


def pairs_seen(kind, h, options, extras):
    """[[bool]]: the rule of a kind, pair by pair."""

    def sees(i, j):
        o = options
        if kind == "local":
            return abs(i // o["block"] - j // o["block"]) <= o["neighbors"]
        if kind == "sparse":
            late, early = max(i, j), min(i, j)
            if o["causal"] and j > i:
                return False
            rest = early % o["stride"]
            return late // o["block"] == early // o["block"] or rest == 0 or rest >= o["keep_from"]
        if kind == "longformer":
            return abs(i - j) <= o["window"] // 2 or i in o["global_tokens"] or j in o["global_tokens"]
        a, b, last = i // o["block"], j // o["block"], T // o["block"] - 1
        random = 0 < a < last and b in extras["rand_blocks"][h, a - 1]
        return a in (0, last) or b in (0, last) or abs(a - b) <= 1 or random

    return [[kind == "dense" or sees(i, j) for j in range(T)] for i in range(T)]


def softmax_rows(s, seen):
    p = np.zeros_like(s)
    for i in range(len(s)):
        keys = [j for j in range(s.shape[1]) if seen[i][j]]
        e = {j: math.exp(s[i, j] - max(s[i, k] for k in keys)) for j in keys}
        for j in keys:
            p[i, j] = e[j] / math.fsum(e.values())
    return p


def weights(kind, q, k, h, real, extras, options):
    """[T, T] weights of one head by the definition; sinkhorn and linformer go through mixtures."""
    s = q @ k.T / math.sqrt(D)
    all_real = [[real[j] for j in range(T)] for _ in range(T)]
    if kind == "linear":
        f = lambda x: np.where(x > 0, x + 1, np.exp(x))
        s = f(q) @ f(k).T * real
        return s / s.sum(axis=1, keepdims=True)
    if kind == "performer":
        w = extras["proj"]
        if options["kernel"] == "relu":
            fq, fk = (np.maximum(x @ w.T * D**-0.25, 0) + 1e-3 for x in (q, k))
        else:
            up = lambda x: x @ w.T * D**-0.25
            down = lambda x: (x**2).sum(axis=1, keepdims=True) / (2 * math.sqrt(D))
            fq = np.exp(up(q) - down(q) - up(q).max(axis=1, keepdims=True)) + 1e-4
            fk = np.exp(up(k) - down(k) - up(k)[real].max()) + 1e-4
        s = fq @ fk.T * real
        return s / s.sum(axis=1, keepdims=True)
    if kind == "synthesizer":
        return softmax_rows(extras["r1"][h] @ extras["r2"][h], all_real)
    if kind == "linformer":
        mixtures = q @ (extras["e_k"].T @ (k * real[:, None])).T / math.sqrt(D)
        return softmax_rows(mixtures, [[True] * 5] * T) @ (extras["e_v"] * real[:, None]).T
    if kind == "sinkhorn":
        b, nb = options["block"], T // options["block"]
        blocks = [slice(n * b, n * b + b) for n in range(nb)]
        used = np.array([real[s].any() for s in blocks])
        mean = lambda x, n: (x * real[:, None])[blocks[n]].sum(axis=0) / max(real[blocks[n]].sum(), 1)
        m = np.exp([[mean(q, i) @ mean(k, j) / math.sqrt(D) for j in range(nb)] for i in range(nb)])
        m = m * used * used[:, None]
        for axis in (1, 0) * options["iterations"]:
            m = m / np.where(m.any(axis=axis, keepdims=True), m.sum(axis=axis, keepdims=True), 1)
        out = np.zeros((T, T))
        for n in range(nb):
            mixed = sum(m[n, j] * (k * real[:, None])[blocks[j]] for j in range(nb))
            keys = np.concatenate([k[blocks[n]], mixed])
            seen = [*real[blocks[n]], *[any(real[t::b]) for t in range(b)]]
            p = softmax_rows(q[blocks[n]] @ keys.T / math.sqrt(D), [seen] * b)
            out[blocks[n], blocks[n]] += p[:, :b]
            for j in range(nb):
                out[blocks[n], blocks[j]] += m[n, j] * p[:, b:]
        return out * real
    seen = pairs_seen(kind, h, options, extras)
    return softmax_rows(s, [[seen[i][j] and real[j] for j in range(T)] for i in range(T)])


@given(seeds, kinds, st.booleans())
def law_wide_attention_every_kind_is_its_definition(seed, kind, padded):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 2, H, T, D))
    extras, options = setting(kind, seed)
    # from the ends of the text, so that every query of the fixed patterns still sees a key
    real = np.arange(T) < (np.array([[T - 4], [T - 1]]) if padded else T) * np.ones((2, 1))
    if kind == "sparse":
        real[:, 0] = True
    mask = real if padded else None
    got = attend(q, k, v, kind=kind, mask=mask, extras=extras, options=options)
    for b, h in np.ndindex(2, H):
        if kind in ("local", "sparse", "longformer", "bigbird"):
            seen = np.array(pairs_seen(kind, h, options, extras)) & real[b]
            if not seen.any(axis=1).all():
                assert not got[b, h, ~seen.any(axis=1)].any()  # a query that sees nothing gives 0
                continue
        want = weights(kind, q[b, h], k[b, h], h, real[b], extras, options) @ v[b, h]
        # scores and weights of size 1 to 10, at most 24 terms each, five rounds of sinkhorn
        np.testing.assert_allclose(got[b, h], want, rtol=0, atol=2e3 * EPS * np.abs(v).max(), err_msg=kind)


@given(kinds)
def law_wide_attention_an_empty_batch_gives_an_empty_result(kind):
    extras, options = setting(kind, 0)
    q, mask = np.zeros((0, H, T, D)), np.ones((0, T), bool)
    assert attend(q, q, q, kind=kind, mask=mask, extras=extras, options=options).shape == q.shape


def layer(seed, bias=True):
    rng = np.random.default_rng(seed)
    shapes = ((DIM, H * D), (DIM, H * D), (DIM, H * D), (H * D, DIM))
    params = AttentionParams(
        *(rng.standard_normal(s) / 2 for s in shapes), rng.standard_normal(DIM) if bias else None
    )
    return rng.standard_normal((2, T, DIM)), params


@given(seeds, kinds)
def law_wide_attention_padding_has_no_influence(seed, kind):
    """Whatever padded tokens hold, NaN too, no bit changes; batch entries are independent."""
    x, params = layer(seed)
    extras, options = setting(kind, seed)
    real = np.arange(T) < np.array([[T - 2], [T - 5]])
    run = lambda x, real: multi_head_attention(
        x, params, heads=H, head_dim=D, kind=kind, mask=real, extras=extras, options=options
    )
    want = run(x, real)
    np.testing.assert_array_equal(run(np.where(real[..., None], x, np.nan), real), want)
    np.testing.assert_allclose(run(x[1:], real[1:]), want[1:], rtol=0, atol=64 * EPS * np.abs(want).max())


@given(seeds, st.sampled_from(KINDS[:7]), st.booleans())
def law_wide_attention_gradients_are_central_differences(seed, kind, bias):
    x, params = layer(seed, bias)
    extras, options = setting(kind, seed)
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < np.array([[T], [T - 3]])
    run = lambda x, p: multi_head_attention(
        x, p, heads=H, head_dim=D, kind=kind, mask=mask, extras=extras, options=options
    )
    do = rng.standard_normal(x.shape)
    dx, dparams = multi_head_attention_bwd(
        do, x, params, heads=H, head_dim=D, kind=kind, mask=mask, extras=extras, options=options
    )
    assert (dparams.b_o is None) == (not bias)
    assert not dx[~mask].any()
    flat = [x, *params]
    for at, grad in enumerate([dx, *dparams]):
        if grad is None:
            continue
        d = rng.standard_normal(grad.shape)
        d /= np.linalg.norm(d)
        moved = lambda h, at=at, d=d: [y + h * d if n == at else y for n, y in enumerate(flat)]
        f = lambda h, m=moved: np.sum(do * run(m(h)[0], AttentionParams(*m(h)[1:])))
        slope, change = slope_of(f)
        # truncation is a third of what doubling the step changes; eps |f| / h stays under 1e-8
        np.testing.assert_allclose(np.sum(grad * d), slope, rtol=0, atol=change + 1e-8)


@given(seeds)
def law_wide_attention_block_gradients_are_central_differences(seed):
    """The kinds' own backward passes, with a mask, and linformer's for its projections."""
    rng = np.random.default_rng(seed)
    q, k, v, do = rng.standard_normal((4, 2, H, T, D))
    e = rng.standard_normal((2, T, 5)) / 3
    mask = (np.arange(T) < np.array([[T], [T - 3]]))[:, None]
    for fn, vjp, args in (
        (lambda *a: attend(*a, kind="linear", mask=mask[:, 0]), linear_attention_vjp, [q, k, v]),
        (lambda *a: linformer_attention(*a, mask=mask), linformer_attention_vjp, [q, k, v, *e]),
    ):
        for at, grad in enumerate(vjp(*args, do, mask=mask)):
            d = rng.standard_normal(grad.shape)
            d /= np.linalg.norm(d)
            moved = lambda h, at=at, d=d, args=args: [x + h * d if n == at else x for n, x in enumerate(args)]
            f = lambda h, fn=fn, moved=moved: np.sum(do * fn(*moved(h)))
            slope, change = slope_of(f)
            np.testing.assert_allclose(np.sum(grad * d), slope, rtol=0, atol=change + 1e-8)


@given(seeds)
def law_wide_attention_a_layer_is_the_sum_of_its_heads(seed):
    """Without head h the output is less by exactly that head alone: what makes a wide layer readable."""
    x, params = layer(seed)
    y = multi_head_attention(x, params, heads=H, head_dim=D)
    head = lambda h: AttentionParams(
        *(w[:, h * D : h * D + D] for w in params[:3]), params.w_o[h * D : h * D + D]
    )
    alone = [multi_head_attention(x, head(h), heads=1, head_dim=D) for h in range(H)]
    atol = 256 * EPS * np.abs(y).max()
    np.testing.assert_allclose(y, sum(alone) + params.b_o, rtol=0, atol=atol)
    cut = params._replace(w_o=np.where(np.arange(H * D)[:, None] // D == 1, 0, params.w_o))
    np.testing.assert_allclose(
        multi_head_attention(x, cut, heads=H, head_dim=D), y - alone[1], rtol=0, atol=atol
    )
    order = np.array([2, 0, 1])
    turn = lambda w, axis: np.concatenate([np.split(w, H, axis=axis)[h] for h in order], axis=axis)
    moved = AttentionParams(*(turn(w, 1) for w in params[:3]), turn(params.w_o, 0), params.b_o)
    np.testing.assert_allclose(multi_head_attention(x, moved, heads=H, head_dim=D), y, rtol=0, atol=atol)


@given(seeds)
def law_wide_attention_weights_are_returned(seed):
    x, params = layer(seed)
    for kind in ("dense", "local", "bigbird"):
        extras, options = setting(kind, seed)
        y, p = multi_head_attention(
            x, params, heads=H, head_dim=D, kind=kind, extras=extras, options=options, return_weights=True
        )
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=0, atol=16 * EPS)
        v = (x @ params.w_v).reshape(2, T, H, D).swapaxes(1, 2)
        o = (p @ v).swapaxes(1, 2).reshape(2, T, H * D) @ params.w_o + params.b_o
        np.testing.assert_allclose(o, y, rtol=0, atol=256 * EPS * np.abs(y).max())


@given(seeds)
def law_wide_attention_full_patterns_are_dense(seed):
    q, k, v = np.random.default_rng(seed).standard_normal((3, 2, H, T, D))
    want, eye = attend(q, k, v), np.eye(T)
    for kind, options, extras in (
        ("local", {"block": T}, {}),
        ("local", {"block": 5, "neighbors": 2}, {}),
        ("longformer", {"window": 2 * T}, {}),
        ("longformer", {"window": 2, "global_tokens": tuple(range(T))}, {}),
        ("bigbird", {"block": 3}, {}),  # four blocks: ends and window are all
        ("sparse", {"block": T, "stride": 5, "keep_from": 5}, {}),
        ("linformer", {}, {"e_k": eye, "e_v": eye}),
    ):
        got = attend(q, k, v, kind=kind, options=options, extras=extras)
        np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS * np.abs(v).max(), err_msg=str(options))
    mask = attention_mask("sparse", T, block=3, stride=4, keep_from=3)
    np.testing.assert_array_equal(mask, mask.T)


@given(seeds)
def law_wide_attention_synthesizer_ignores_queries_and_keys(seed):
    q, k, v, a, b = np.random.default_rng(seed).standard_normal((5, 2, H, T, D))
    extras, _ = setting("synthesizer", seed)
    np.testing.assert_array_equal(
        attend(q, k, v, kind="synthesizer", extras=extras), attend(a, b, v, kind="synthesizer", extras=extras)
    )


@given(seeds, st.integers(1, 6))
def law_wide_attention_sinkhorn_ends_doubly_stochastic(seed, n):
    m = sinkhorn(np.random.default_rng(seed).standard_normal((2, n, n)), iterations=20)
    for axis in (-1, -2):  # columns are last in a round, rows follow at the rate of the method
        np.testing.assert_allclose(m.sum(axis=axis), 1, rtol=0, atol=1e-3)


def law_wide_attention_performer_error_falls_with_the_root_of_features():
    """Mean error over 20 fixed draws at 16 to 1,024 features: slope near -1/2 on logarithmic axes."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 24, 4)) / 4  # the features' tails are heavier for longer vectors
    want = attend(q[None], k[None], v[None])[0]
    sizes, errors = (16, 64, 256, 1024), []
    for m in sizes:
        runs = [performer_attention(q, k, v, orthogonal_features(rng, m, 4), eps=0.0) for _ in range(20)]
        errors.append(np.sqrt(np.mean([(r - want) ** 2 for r in runs])))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.15  # an error is known to about 15 % from 20 draws, the slope to 0.05


def law_wide_attention_orthogonal_features_are_orthogonal_and_unbiased():
    """Groups of dim are orthogonal; every entry has mean 0 and variance 1, within 5 errors of 3,000 draws."""
    rng = np.random.default_rng(0)
    w = orthogonal_features(rng, 5, 3)
    np.testing.assert_allclose(w[:3] @ w[:3].T, np.diag((w[:3] ** 2).sum(axis=1)), rtol=0, atol=64 * EPS)
    draws = np.array([orthogonal_features(rng, 3, 3) for _ in range(3000)])
    assert np.abs(draws.mean(axis=0)).max() < 5 / math.sqrt(3000)
    assert np.abs((draws**2).mean(axis=0) - 1).max() < 5 * math.sqrt(2 / 3000)


@given(seeds, kinds, st.booleans())
def law_wide_attention_encoder_of_every_kind(seed, kind, pair):
    """Logits of every kind; padding changes nothing; numbers of parameters are what the tree holds."""
    rng = np.random.default_rng(seed)
    _, options = setting(kind, seed)
    more = {
        "linformer": {"rank": 3},
        "performer": {"features": 5},
        "bigbird": {"num_rand": 1},
        "synthesizer": {"rank": 2},
    }
    config = WideConfig(
        2, H, 6, D, 7, vocab=11, max_length=13, num_classes=3, kind=kind, pair=pair,
        options={**options, **more.get(kind, {})},
    )  # fmt: skip
    params = init_encoder(rng, config)
    lead = (2, 2) if pair else (2,)
    tokens = rng.integers(1, 11, (*lead, 9))
    got = encoder(params, tokens, config=config)
    assert got.shape == (2, 3)
    assert np.isfinite(got).all()
    longer = np.concatenate([tokens, np.zeros((*lead, 4), int)], axis=-1)
    # two blocks and a head of width 7 behind layer norms: some thousand roundings of numbers of size 1 to 10
    np.testing.assert_allclose(encoder(params, longer, config=config), got, rtol=0, atol=1e5 * EPS)
    learned = lambda e: {n: x for n, x in e.items() if n not in ("proj", "rand_blocks")}
    arrays = [x for n, x in params._asdict().items() if n not in ("blocks", "extras")]
    arrays += [x for p in params.blocks for x in p if x is not None]
    arrays += [x for e in params.extras for x in learned(e).values()]
    assert sum(x.size for x in arrays) == count_params(config, weights_only=False)
    weights_ = [p for b in params.blocks for p in (b.w_q, b.w_k, b.w_v, b.w_o, b.w_fc1, b.w_fc2)]
    assert sum(x.size for x in weights_) == count_params(config)


@given(st.integers(1, 24), st.integers(1, 3), st.integers(1, 3))
def law_wide_attention_sweep_keeps_attention_and_sheds_the_rest(total, dim, ratio):
    dim, found = 8 * dim, aspect_ratios(total)
    assert [layers * heads for layers, heads in found] == [total] * len(found)
    config = lambda layers, heads: WideConfig(layers, heads, dim, 4, ratio * dim)
    attention = [count_params(config(*r)) - r[0] * 2 * dim * ratio * dim for r in found]
    assert set(attention) == {4 * dim * total * 4}
    for fn in (
        count_params,
        lambda c: count_params(c, weights_only=False),
        lambda c: count_flops(c, 50),
        lambda c: activation_numbers(c, 50),
        lambda c: latency_model(c, 50, Machine(1e9, 1e9, 1e-6)),
    ):
        sizes = [fn(config(*r)) for r in found]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) == len(sizes)


def law_wide_attention_half_the_size_of_the_text_configuration():
    """Four layers of four heads against one of sixteen: 3.146 M weights become 1.573 M, exactly half."""
    deep, wide = (WideConfig(layers, heads, 256, 64, 1024) for layers, heads in ((4, 4), (1, 16)))
    assert (count_params(deep), count_params(wide)) == (3145728, 1572864)
    six, one = (WideConfig(layers, heads, 64, 16, 256) for layers, heads in ((6, 4), (1, 24)))
    assert round(count_params(one) / count_params(six), 2) == 0.44


@given(
    st.sampled_from(("dense", "linear", "linformer", "performer", "sinkhorn", "synthesizer")),
    st.integers(2, 9),
)
def law_wide_attention_flops_are_what_is_counted(kind, length):
    """The encoder on counted weights: every product of maps and heads, less those of the head on top."""
    options = {"linformer": {"rank": 3}, "performer": {"features": 5}, "synthesizer": {"rank": 2}}
    options["sinkhorn"] = {"block": 2, "iterations": 3}
    config = WideConfig(1, 2, 6, 4, 7, vocab=5, max_length=length, kind=kind, options=options.get(kind))
    tally = Tally()
    params = init_encoder(np.random.default_rng(0), config)
    block = params.blocks[0]._replace(
        **{
            n: count(tally, getattr(params.blocks[0], n))
            for n in ("w_q", "w_k", "w_v", "w_o", "w_fc1", "w_fc2")
        }
    )
    extras = {n: count(tally, x) for n, x in params.extras[0].items()}
    encoder(params._replace(blocks=(block,), extras=(extras,)), np.ones((1, length), int), config=config)
    on_top = 6 * 7 + 7 * 2  # the class token's row stays counted
    assert 2 * (tally.macs - on_top) == count_flops(config, length)


def law_wide_attention_flops_of_patterns_count_the_pairs_seen():
    common = {"vocab": 5, "max_length": 31}
    dense = count_flops(WideConfig(1, 2, 6, 4, 7, **common), 31)
    local = WideConfig(1, 2, 6, 4, 7, kind="local", options={"block": 8}, **common)
    assert dense - count_flops(local, 31) == 2 * 2 * 2 * 4 * (32**2 - 4 * 8**2)
    drawn = WideConfig(1, 2, 6, 4, 7, kind="bigbird", options={"block": 4, "num_rand": 2}, **common)
    assert dense - count_flops(drawn, 31) == 2 * 2 * 2 * 4 * 16 * (64 - (2 * 8 + 6 * 7 - 2))


def law_wide_attention_latency_is_the_slower_of_compute_and_weights():
    config = WideConfig(3, 2, 8, 4, 16)
    weights_, T = (4 * 8 * 8, 2 * 8 * 16), 11
    macs = 4 * T * 8 * 8 + 2 * 2 * T * T * 4, 2 * T * 8 * 16
    slow_memory = latency_model(config, 10, Machine(1e30, 2.0, 0.5))
    np.testing.assert_allclose(slow_memory, 3 * (4 * sum(weights_) / 2 + 1), rtol=1e-12)
    slow_units = latency_model(config, 10, Machine(4.0, 1e30, 0.25))
    np.testing.assert_allclose(slow_units, 3 * (2 * sum(macs) / 4 + 0.5), rtol=1e-12)


def law_wide_attention_positions_are_interleaved():
    table = sinusoidal_positions(4, 5)
    for t in range(4):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 5)
            np.testing.assert_allclose(table[t, 2 * i], math.sin(angle), rtol=0, atol=4 * EPS)
            if 2 * i + 1 < 5:
                np.testing.assert_allclose(table[t, 2 * i + 1], math.cos(angle), rtol=0, atol=4 * EPS)


def value(words):
    """The value of an expression, by a stack."""
    stack = []
    for word in words:
        if word != "]":
            stack.append(int(word) if word.isdigit() else word)
            continue
        args = []
        while isinstance(stack[-1], int):
            args.append(stack.pop())
        name = stack.pop()
        assert len(args) >= 2
        stack.append(
            {"[MIN": min, "[MAX": max, "[MED": lambda a: int(median(a)), "[SM": lambda a: sum(a) % 10}[name](
                args
            )
        )
    assert len(stack) == 1
    return stack[0]


@given(seeds, st.integers(2, 4), st.sampled_from((1, 4, 8)))
def law_wide_attention_listops_are_right(seed, depth, least):
    tokens, label = listops(
        np.random.default_rng(seed), 5, max_length=30, max_depth=depth, max_args=8, min_length=least
    )
    assert tokens.shape == (5, 30)
    for row, answer in zip(tokens, label, strict=True):
        n = int(np.count_nonzero(row))
        assert n >= least
        assert not row[n:].any()
        assert value([WORDS[t] for t in row[:n]]) == answer
        level = np.cumsum(np.isin(row[:n], range(11, 15)).astype(int) - (row[:n] == 15))
        assert level.max() <= depth - 1
