"""Laws of SCOUT on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.attention.scout import (
    ScoutConfig,
    cache_bytes,
    checkpoint_attention,
    checkpoint_attention_bwd,
    init_scout,
    mamba_mixer,
    num_parameters,
    scout_block,
    scout_block_vjp,
    scout_flops,
    scout_logits,
    scout_logits_vjp,
    scout_prefill,
    scout_step,
    sliding_window_mixer,
    visible_pairs,
)
from ref.blocks.losses import cross_entropy
from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.counting import Tally, count
from ref.data import text
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
mixers = st.sampled_from(("swa", "mamba"))
# L, H, Hkv, segment: a multiple of the segment, none, shorter than one, one, grouped keys
SHAPES = ((12, 2, 2, 4), (11, 4, 2, 3), (3, 2, 1, 5), (1, 1, 1, 1), (7, 2, 2, 1))
TINY = ScoutConfig(8, 2, 1, 6, segment=3, window=4, state_size=3, dt_rank=1, vocab_size=7, num_layers=2)


@st.composite
def qkv(draw):
    """(q, k, v, segment), with ordinary, saturated or nearly flat scores."""
    L, H, Hkv, s = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(seeds))
    gain = draw(st.sampled_from((1.0, 30.0, 1e-3)))
    q, k, v = (gain * rng.standard_normal((2, h, L, 4)) for h in (H, Hkv, Hkv))
    return q, k, v, s


def by_hand(q, k, v, allowed):
    """Softmax attention, one query at a time, over the keys that `allowed(t, j)` names."""
    o = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, h, t in np.ndindex(q.shape[:-1]):
        g = h // (q.shape[1] // k.shape[1])
        seen = [j for j in range(k.shape[2]) if allowed(t, j)]
        logits = k[b, g, seen] @ q[b, h, t] / np.sqrt(q.shape[-1])
        p = np.exp(logits - logits.max())
        o[b, h, t] = p @ v[b, g, seen] / p.sum()
    return o


def rounding(q, k, v):
    """Scores are off by some eps D |q||k|, which exp passes on to weights of |v|; 16 for both sums."""
    return 16 * EPS * (1 + q.shape[-1] * np.abs(q).max() * np.abs(k).max()) * np.abs(v).max()


@given(qkv())
def law_scout_attention_is_dense_attention_to_checkpoints_and_itself(case):
    q, k, v, s = case
    want = by_hand(q, k, v, lambda t, j: j == t or (j < t and j % s == s - 1))
    np.testing.assert_allclose(checkpoint_attention(q, k, v, segment=s), want, rtol=0, atol=rounding(q, k, v))


@given(qkv())
def law_scout_attention_has_its_limits(case):
    """s = 1 is full causal attention; a segment longer than the text leaves every token its own value."""
    q, k, v, _ = case
    want = by_hand(q, k, v, lambda t, j: j <= t)
    np.testing.assert_allclose(checkpoint_attention(q, k, v, segment=1), want, rtol=0, atol=rounding(q, k, v))
    L, own = q.shape[2], np.repeat(v, q.shape[1] // k.shape[1], axis=1)
    np.testing.assert_array_equal(checkpoint_attention(q, k, v, segment=L + 1), own)
    # the last token of the first segment is a checkpoint, which nobody may see before it
    np.testing.assert_array_equal(checkpoint_attention(q, k, v, segment=L), own)


def law_scout_attention_takes_extremes():
    """Logits of 1e4 stay finite; a NaN that is not visible does not count; no rows, no batch."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 9, 4))
    assert np.isfinite(checkpoint_attention(1e4 * q, k, v, segment=2)).all()
    bad = v.copy()
    bad[..., 4, :] = np.nan  # no checkpoint: only token 4 sees it
    seen = np.isnan(checkpoint_attention(q, k, bad, segment=3)).all(axis=(0, 1, 3))
    np.testing.assert_array_equal(seen, np.arange(9) == 4)
    assert checkpoint_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], segment=3).shape == (1, 2, 0, 4)
    assert checkpoint_attention(q[:0], k[:0], v[:0], segment=3).shape == (0, 2, 9, 4)
    np.testing.assert_array_equal(checkpoint_attention(q[0, 0], k[0, 0], v[0, 0], segment=3),
                                  checkpoint_attention(q, k, v, segment=3)[0, 0])  # fmt: skip


@given(seeds, st.sampled_from(SHAPES), st.sampled_from((None, 0.3)))
def law_scout_attention_gradients_are_central_differences(seed, shape, scale):
    L, H, Hkv, s = shape
    rng = np.random.default_rng(seed)
    args = [rng.standard_normal((2, h, L, 4)) for h in (H, Hkv, Hkv)]
    do, options = rng.standard_normal((2, H, L, 4)), {"segment": s, "scale": scale}
    grads = checkpoint_attention_bwd(do, *args, **options)
    for i, grad in enumerate(grads):
        d = rng.standard_normal(args[i].shape)
        moved = lambda h, i=i, d=d: [a + h * d if n == i else a for n, a in enumerate(args)]
        slope, error = slope_of(lambda h, m=moved: np.sum(do * checkpoint_attention(*m(h), **options)))
        bound = error + 64 * EPS / 1e-5 * (1 + np.abs(do).sum())  # cancellation eps / h
        np.testing.assert_allclose(np.sum(grad * d), slope, rtol=0, atol=bound)


@given(seeds, st.sampled_from((1, 3, 20)), st.integers(0, 6))
def law_scout_window_sees_its_last_keys_at_their_positions(seed, window, t):
    """The row of token t is that of the window's tokens alone: rotary positions count differences only."""
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((7, 8)), init_scout(rng, TINY).blocks[0].mixer
    p = tree_map(lambda w: 20 * w, p)
    options = {"num_heads": 2, "num_kv_heads": 1, "window": window}
    y = sliding_window_mixer(x, p, **options)
    start = max(t - window + 1, 0)
    alone = sliding_window_mixer(x[start : t + 1], p, **options)
    # angles of up to 7 are turned by: a few eps; products of 8 terms three times in a row
    np.testing.assert_allclose(
        alone[-1], y[t], rtol=0, atol=512 * EPS * (1 + np.abs(y).max()) * np.abs(x).max()
    )


def tiny(seed, mixer, config=TINY, gain=8.0):
    """(ids, params, x) of a model whose maps are large enough for attention to matter."""
    rng = np.random.default_rng(seed)
    params = init_scout(rng, config, mixer=mixer)
    swell = lambda p: p if isinstance(p, np.ndarray) and p.ndim == 1 else gain * p
    blocks = tuple(
        b._replace(attn=tree_map(swell, b.attn), mlp1=tree_map(swell, b.mlp1),
                   mixer=tree_map(swell, b.mixer) if mixer == "swa" else b.mixer)
        for b in params.blocks
    )  # fmt: skip
    params = params._replace(blocks=blocks, embedding=50 * params.embedding)
    return rng.integers(0, config.vocab_size, (2, 8)), params, rng.standard_normal((2, 8, config.dim))


def turned(x, t, base):
    """One head's vector at position t: channels i and i + D/2 turn together."""
    half = len(x) // 2
    angle = t * base ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def rotary_by_hand(x, p, c, allowed):
    """Grouped rotary attention of one sequence [L, C]."""
    L, D = len(x), c.dim // c.num_heads
    cut = lambda w, heads: (x @ w).reshape(L, heads, D).swapaxes(0, 1)
    turn = lambda z: np.array([[turned(row, t, c.rope_base) for t, row in enumerate(head)] for head in z])
    q, k, v = cut(p.w_q, c.num_heads), cut(p.w_k, c.num_kv_heads), cut(p.w_v, c.num_kv_heads)
    o = by_hand(turn(q)[None], turn(k)[None], v[None], allowed)[0]
    return o.swapaxes(0, 1).reshape(L, c.dim) @ p.w_o


def mamba_by_hand(x, p, c):
    """The selective scan of one sequence [L, C], token by token."""
    E, N, K = c.expand * c.dim, c.state_size, c.conv_size
    silu = lambda z: z / (1 + np.exp(-z))
    wide, gate = np.split(x @ p.w_in, 2, axis=1)
    h, rows = np.zeros((E, N)), []
    for t in range(len(x)):
        u = silu(p.conv_b + sum(p.conv_w[K - 1 - n] * wide[t - n] for n in range(min(K, t + 1))))
        dt, b, read = np.split(u @ p.w_x, [c.dt_rank, c.dt_rank + N])
        step = np.log1p(np.exp(dt @ p.w_dt + p.b_dt))[:, None]
        h = np.exp(-step * np.exp(p.a_log)) * h + step * b * u[:, None]
        rows.append((h @ read + p.d * u) * silu(gate[t]))
    return np.array(rows) @ p.w_out


@settings(max_examples=6)
@given(seeds, mixers, st.integers(1, 5), st.integers(1, 5))
def law_scout_block_is_its_definition(seed, mixer, segment, window):
    """Four sub-layers written out, two query heads a key head.

    Some twenty products of up to 48 terms in a row, exp in between: a few thousand roundings of the output.
    """
    c = ScoutConfig(16, 4, 2, 5, segment, window, 3, 2, 2, 3, rope_base=50.0)
    rng = np.random.default_rng(seed)
    p = tree_map(lambda w: w + 0.3 * rng.standard_normal(w.shape), init_scout(rng, c, mixer=mixer).blocks[0])
    x = rng.standard_normal((2, 7, 16))
    norm = lambda z, gain: z / np.sqrt((z * z).mean(axis=-1, keepdims=True) + c.eps) * gain
    feed = lambda z, m: ((z @ m.w_gate) / (1 + np.exp(-(z @ m.w_gate))) * (z @ m.w_up)) @ m.w_down
    got = scout_block(x, p, config=c, mixer=mixer)
    for y, z in zip(got, x, strict=True):
        h = norm(z, p.norm1)
        if mixer == "mamba":
            z = z + mamba_by_hand(h, p.mixer, c)
        else:
            z = z + rotary_by_hand(h, p.mixer, c, lambda t, j: t - window < j <= t)
        z = z + feed(norm(z, p.norm2), p.mlp1)
        last = lambda t, j: j == t or (j < t and j % segment == segment - 1)
        z = z + rotary_by_hand(norm(z, p.norm3), p.attn, c, last)
        z = z + feed(norm(z, p.norm4), p.mlp2)
        np.testing.assert_allclose(y, z, rtol=0, atol=4096 * EPS * (1 + np.abs(z).max()))


@given(seeds, mixers)
def law_scout_block_is_causal(seed, mixer):
    _, params, x = tiny(seed, mixer)
    later = x.copy()
    later[:, 5:] += 1
    a, b = (scout_block(v, params.blocks[0], config=TINY, mixer=mixer) for v in (x, later))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])


def law_scout_block_carries_a_segment_through_its_checkpoint():
    """Token 1 is no checkpoint and two segments away from token 8. Attention alone does not see it; behind a
    mixer it does, through checkpoint 2; a window of one shuts the way.
    """
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 9, 4))
    do = np.zeros((1, 1, 9, 4))
    do[:, :, 8] = 1.0
    for grad in checkpoint_attention_bwd(do, q, k, v, segment=3):
        assert not grad[..., 1, :].any()
    for mixer, window in (("swa", 4), ("mamba", 4), ("swa", 1)):
        config = ScoutConfig(8, 2, 1, 6, segment=3, window=window, state_size=3, dt_rank=1)
        block = init_scout(1, config, mixer=mixer).blocks[0]
        shut = block._replace(attn=block.attn._replace(w_o=0 * block.attn.w_o))
        x, dy = rng.standard_normal((9, 8)), np.zeros((9, 8))
        dy[8] = 1.0
        both, alone = (scout_block_vjp(x, b, dy, config=config, mixer=mixer)[0][1] for b in (block, shut))
        assert (both != alone).any() == (window > 1)  # what attention adds to the mixer's own reach
        assert alone.any() == (mixer == "mamba")


@given(seeds, mixers)
def law_scout_block_gradients_are_central_differences(seed, mixer):
    ids, params, _ = tiny(seed, mixer)
    rng = np.random.default_rng(seed)
    for head in (None, rng.standard_normal((8, 7))):
        p = params._replace(head=head)
        logits = scout_logits(p, ids, config=TINY, mixer=mixer)
        dlogits, d = rng.standard_normal(logits.shape), tree_map(lambda w: rng.standard_normal(w.shape), p)
        moved = lambda h, p=p, d=d: tree_map(lambda w, e: w + h * e, p, d)
        loss = lambda h, m=moved, dl=dlogits: np.sum(dl * scout_logits(m(h), ids, config=TINY, mixer=mixer))
        slope, error = slope_of(loss)
        grads = scout_logits_vjp(p, ids, dlogits, config=TINY, mixer=mixer)
        got = sum(tree_leaves(tree_map(lambda g, e: np.sum(g * e), grads, d)))
        bound = error + 256 * EPS / 1e-5 * (np.abs(dlogits) * (1 + np.abs(logits))).sum()
        np.testing.assert_allclose(got, slope, rtol=0, atol=bound)


@given(seeds, mixers, st.integers(1, 7))
def law_scout_steps_after_a_prompt_are_the_whole(seed, mixer, prompt):
    """Prefill and steps equal one pass, and the cache holds floor(t / s) checkpoints."""
    ids, params, _ = tiny(seed, mixer)
    options = {"config": TINY, "mixer": mixer}
    want = scout_logits(params, ids, **options)
    got, cache = scout_prefill(params, ids[:, :prompt], **options)
    # another order of sums: products of 8 terms, two layers of four sub-layers
    atol = 4096 * EPS * (1 + np.abs(want).max())
    np.testing.assert_allclose(got, want[:, :prompt], rtol=0, atol=atol)
    for t in range(prompt, 8):
        logits, cache = scout_step(params, ids[:, t], cache, **options)
        np.testing.assert_allclose(logits, want[:, t], rtol=0, atol=atol)
        assert cache.steps == t + 1
        assert all(keys.shape == (2, 1, (t + 1) // 3, 4) for keys in (*cache.keys, *cache.values))
    sizes = [x.size for x in tree_leaves((cache.mixers, cache.keys, cache.values))]
    assert sum(sizes) == 2 * cache_bytes(TINY, 8, mixer=mixer, bytes_per_element=1)  # two sequences


def law_scout_starts_from_an_empty_prompt():
    ids, params, _ = tiny(0, "mamba")
    options = {"config": TINY, "mixer": "mamba"}
    logits, cache = scout_prefill(params, ids[:, :0], **options)
    assert logits.shape == (2, 0, 7)
    first, _ = scout_step(params, ids[:, 0], cache, **options)
    np.testing.assert_allclose(first, scout_logits(params, ids, **options)[:, 0], rtol=0, atol=1e-12)
    y, state = mamba_mixer(np.ones((0, 5, 8)), params.blocks[0].mixer)
    assert y.shape == (0, 5, 8)
    assert state.state.shape == (0, 16, 3)


def law_scout_counts_are_those_of_the_release():
    small, large = ScoutConfig(1024, 16, 16, 2816), ScoutConfig(2048, 32, 32, 5632, tied=False)
    sized = lambda c, n: ScoutConfig(**{**vars(c), "num_layers": n})
    assert num_parameters(sized(small, 17)) == 469_570_560
    assert num_parameters(sized(large, 14)) == 1_569_835_008
    assert num_parameters(sized(small, 14), mixer="mamba") == 430_765_056
    assert num_parameters(sized(large, 13), mixer="mamba") == 1_592_678_400
    for mixer in ("swa", "mamba"):
        for tied in (True, False):
            config = ScoutConfig(**{**vars(TINY), "tied": tied})
            leaves = tree_leaves(init_scout(0, config, mixer=mixer))
            assert sum(x.size for x in leaves) == num_parameters(config, mixer=mixer)


@given(st.integers(0, 60), st.integers(1, 12))
def law_scout_pairs_are_counted(n, s):
    t, j = np.arange(n)[:, None], np.arange(n)
    assert visible_pairs(n) == (j <= t).sum()
    assert visible_pairs(n, window=s) == ((j <= t) & (j > t - s)).sum()
    assert visible_pairs(n, segment=s) == ((j == t) | ((j < t) & (j % s == s - 1))).sum()


def law_scout_pairs_have_the_published_order():
    """Ten times fewer with s = 10; sub-quadratic only if s grows: with s = sqrt(N) pairs grow like N^1.5."""
    assert visible_pairs(4096, segment=10) == 840_910
    assert visible_pairs(32768, segment=10) == 53_703_476
    ratio = lambda n, s: visible_pairs(4 * n, segment=s(4 * n)) / visible_pairs(n, segment=s(n))
    assert abs(ratio(2**14, lambda n: 10) - 16) < 0.1
    assert abs(ratio(2**14, lambda n: int(n**0.5)) - 8) < 0.1


@given(mixers, st.integers(1, 40))
def law_scout_cache_is_a_segment_th_and_the_mixer(mixer, n):
    full, scout, mix = (cache_bytes(TINY, 3 * n, kind=k, mixer=mixer) for k in ("full", "scout", mixer))
    assert scout == full // 3 + mix
    # 2 bytes, 2 layers, k and v, 4 wide
    assert cache_bytes(TINY, 3 * n, kind="full") == 2 * 2 * 2 * 4 * 3 * n


def law_scout_flops_are_counted():
    """Products counted through ref: what is not visible is computed and masked there, and taken off here."""
    ids, params, _ = tiny(0, "swa")
    tally, n, c = Tally(), 8, TINY
    head = count(tally, params.embedding)
    scout_logits(params._replace(embedding=head), ids[0], config=c)
    masked = lambda pairs: 2 * c.dim * (pairs - visible_pairs(n, window=c.window))
    own = 2 * c.dim * n  # the own key and value are no matrix product
    rows = 2 * c.dim * (n * (n // 3) - (visible_pairs(n, segment=3) - n))
    assert 2 * (tally.macs - c.num_layers * (masked(n * n) + rows - own)) == scout_flops(c, n)
    full, ours = (scout_flops(c, 4096, kind=k) for k in ("full", "scout"))
    assert ours < full


def law_scout_tiny_model_learns():
    """Twelve steps on lines of a play: the loss falls; nothing more is asked."""
    letters = np.array([ord(ch) % 32 for ch in text()[:4000]])
    config = ScoutConfig(8, 2, 2, 12, segment=4, window=4, vocab_size=32)
    params, rng = init_scout(0, config), np.random.default_rng(0)
    state, losses = adam_init(params), []
    for _ in range(12):
        rows = letters[rng.integers(0, 3900, 8)[:, None] + np.arange(17)]
        loss, dlogits = cross_entropy(scout_logits(params, rows[:, :-1], config=config), rows[:, 1:])
        grads = scout_logits_vjp(params, rows[:, :-1], dlogits, config=config)
        params, state = adam(params, grads, state, lr=0.02)
        losses.append(loss)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
