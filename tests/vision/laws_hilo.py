"""Laws of HiLo on ref alone: NumPy and Hypothesis."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.conv import conv2d
from ref.blocks.optim import tree_leaves
from ref.counting import Tally, count
from ref.vision.hilo import (
    LITv2Config,
    avg_pool_tokens,
    deformable_token_merge,
    dw_mlp,
    frequency_energy,
    hifi_attention,
    hilo_attention,
    hilo_attention_backward,
    hilo_flops,
    init_hilo,
    init_litv2,
    litv2_block,
    litv2_config,
    litv2_forward,
    litv2_macs,
    lofi_attention,
    split_heads_hilo,
)
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
alphas = st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0))


def layer(seed, C=8, heads=4, window=2, alpha=0.5, bias=True):
    """Parameters whose biases are not zero."""
    rng = np.random.default_rng(seed)
    p = init_hilo(rng, C, num_heads=heads, window=window, alpha=alpha, qkv_bias=bias, std=0.4)
    return p._replace(
        **{n: rng.standard_normal(b.shape) for n, b in p._asdict().items() if n[0] == "b" and b is not None}
    )


def image(seed, H=4, W=6, C=8, B=2):
    return np.random.default_rng(seed).standard_normal((B, H, W, C))


def attend(q, keys, values):
    """One query: softmax(q k / sqrt(d)) v, term by term."""
    logits = np.array([q @ k for k in keys]) / math.sqrt(len(q))
    e = np.exp(logits - logits.max())
    return sum(w * v for w, v in zip(e / e.sum(), values, strict=True))


def by_definition(x, p, heads, s, alpha):
    """One image, pixel by pixel; windows at the far edges may hold fewer pixels."""
    H, W, C = x.shape
    d, none = C // heads, 0.0
    lo = heads if s == 1 else int(heads * alpha)
    hi = heads - lo
    bias = lambda b: none if b is None else b
    windows = {}
    for i in range(H):
        for j in range(W):
            windows.setdefault((i // s, j // s), []).append((i, j))
    y = np.zeros_like(x)
    for (i, j), token in ((at, x[at]) for at in np.ndindex(H, W)):
        if hi:
            inside = [x[at] @ p.w_qkv + bias(p.b_qkv) for at in windows[i // s, j // s]]
            own = token @ p.w_qkv + bias(p.b_qkv)
            part = lambda z, n, h: z[n * hi * d + h * d :][:d]
            o = [
                attend(part(own, 0, h), [part(z, 1, h) for z in inside], [part(z, 2, h) for z in inside])
                for h in range(hi)
            ]
            y[i, j, : hi * d] = np.concatenate(o) @ p.w_hproj + p.b_hproj
        if lo:
            means = [np.mean([x[at] for at in pixels], axis=0) for pixels in windows.values()]
            kv = [m @ p.w_kv + bias(p.b_kv) for m in means]
            own = token @ p.w_q + bias(p.b_q)
            part = lambda z, n, h: z[n * lo * d + h * d :][:d]
            o = [
                attend(part(own, 0, h), [part(z, 0, h) for z in kv], [part(z, 1, h) for z in kv])
                for h in range(lo)
            ]
            y[i, j, hi * d :] = np.concatenate(o) @ p.w_lproj + p.b_lproj
    return y


@given(seeds, alphas, st.sampled_from(((4, 4, 2), (3, 6, 3), (2, 3, 1), (5, 3, 2))), st.booleans())
def law_hilo_is_its_definition(seed, alpha, shape, bias):
    """Padding included: sides that the window does not divide have smaller windows at the edge."""
    H, W, s = shape
    x, p = image(seed, H, W), layer(seed, window=s, alpha=alpha, bias=bias)
    pad = bool(H % s or W % s)
    got = hilo_attention(x, p, num_heads=4, window=s, alpha=alpha, pad=pad)
    want = np.stack([by_definition(one, p, 4, s, alpha) for one in x])
    # sums of 8 and 16 terms, a softmax over at most 9
    np.testing.assert_allclose(got, want, rtol=0, atol=2**9 * EPS * (1 + np.abs(want).max()))
    if not pad:
        forced = hilo_attention(x, p, num_heads=4, window=s, alpha=alpha, pad=True)
        np.testing.assert_array_equal(forced, got)


@given(seeds, alphas)
def law_hilo_window_of_one_is_ordinary_attention(seed, alpha):
    x, p = image(seed, 3, 5), layer(seed, window=1)
    got = hilo_attention(x, p, num_heads=4, window=1, alpha=alpha)
    want = lofi_attention(x, *p[:6], num_heads=4, window=1)
    np.testing.assert_array_equal(got, want)
    q, kv = (x.reshape(2, 15, 8) @ w + b for w, b in ((p.w_q, p.b_q), (p.w_kv, p.b_kv)))
    o = np.zeros((2, 15, 8))
    for h in range(4):
        at, v_at = slice(2 * h, 2 * h + 2), slice(8 + 2 * h, 10 + 2 * h)
        e = np.exp(np.einsum("bid,bjd->bij", q[..., at], kv[..., at]) / math.sqrt(2))
        o[..., at] = np.einsum("bij,bjd->bid", e / e.sum(axis=-1, keepdims=True), kv[..., v_at])
    np.testing.assert_allclose(got.reshape(2, 15, 8), o @ p.w_lproj + p.b_lproj, rtol=0, atol=1e-10)


@given(seeds)
def law_hilo_hifi_stays_in_its_window_and_lofi_sees_means(seed):
    rng = np.random.default_rng(seed)
    x = image(seed)
    p = layer(seed, alpha=0.0)
    changed = x.copy()
    changed[:, 2, 3] += rng.standard_normal(8)
    moved = hilo_attention(changed, p, num_heads=4, alpha=0.0) != hilo_attention(x, p, num_heads=4, alpha=0.0)
    inside = np.zeros((4, 6), bool)
    inside[2:4, 2:4] = True
    assert not moved[:, ~inside].any()
    assert moved[:, inside].any()
    p = layer(seed, alpha=1.0)
    y = hilo_attention(x, p, num_heads=4, alpha=1.0)
    shuffled = x.copy()
    shuffled[:, 2:4, 2:4] = x[:, 2:4, 2:4].reshape(2, 4, 8)[:, rng.permutation(4)].reshape(2, 2, 2, 8)
    z = hilo_attention(shuffled, p, num_heads=4, alpha=1.0)
    np.testing.assert_allclose(z[:, ~inside], y[:, ~inside], rtol=0, atol=1e-10)


@given(seeds)
def law_hilo_one_window_over_the_whole_image(seed):
    x, p = image(seed, 4, 4), layer(seed, window=4)
    y = hilo_attention(x, p, num_heads=4, window=4, alpha=0.5)
    v = x.mean(axis=(1, 2)) @ p.w_kv[:, 4:] + p.b_kv[4:]
    want = v @ p.w_lproj + p.b_lproj
    np.testing.assert_allclose(
        y[..., 4:], np.broadcast_to(want[:, None, None], (2, 4, 4, 4)), rtol=0, atol=1e-12
    )
    alone = hifi_attention(x, *p[6:], num_heads=2, window=1)  # windows of one token: each attends to itself
    own = (x @ p.w_qkv + p.b_qkv)[..., 8:] @ p.w_hproj + p.b_hproj
    np.testing.assert_allclose(alone, own, rtol=0, atol=1e-12)
    order = np.random.default_rng(seed).permutation(16)  # Hi-Fi does not know where a token is
    moved = hilo_attention(x.reshape(2, 16, 8)[:, order].reshape(x.shape), p, num_heads=4, window=4)
    np.testing.assert_allclose(
        moved[..., :4].reshape(2, 16, 4), y[..., :4].reshape(2, 16, 4)[:, order], rtol=0, atol=1e-12
    )


@given(seeds, alphas)
def law_hilo_symmetries(seed, alpha):
    """A constant image stays constant; turning the image by whole windows turns the result."""
    p, x = layer(seed, alpha=alpha), image(seed)
    options = {"num_heads": 4, "alpha": alpha}
    flat = hilo_attention(np.broadcast_to(x[:, :1, :1], x.shape), p, **options)
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:, :1, :1], flat.shape), rtol=0, atol=1e-12)
    rolled = hilo_attention(np.roll(x, (2, 4), axis=(1, 2)), p, **options)
    want = np.roll(hilo_attention(x, p, **options), (2, 4), axis=(1, 2))
    np.testing.assert_allclose(rolled, want, rtol=0, atol=1e-12)


@given(seeds, alphas)
def law_hilo_heads_average_their_values(seed, alpha):
    """Before the last map, a head's output lies between the least and the largest of its values."""
    x, p = image(seed), layer(seed, alpha=alpha)
    hi, lo = split_heads_hilo(4, alpha)
    eye = {"w_hproj": np.eye(2 * hi), "b_hproj": np.zeros(2 * hi)} if hi else {}
    eye |= {"w_lproj": np.eye(2 * lo), "b_lproj": np.zeros(2 * lo)} if lo else {}
    y = hilo_attention(x, p._replace(**eye), num_heads=4, alpha=alpha)
    for b in range(2):
        if hi:
            v = (x[b] @ p.w_qkv + p.b_qkv)[..., 4 * hi :]
            assert (y[b, :2, :2, : 2 * hi] <= v[:2, :2].max(axis=(0, 1)) + 1e-12).all()
            assert (y[b, :2, :2, : 2 * hi] >= v[:2, :2].min(axis=(0, 1)) - 1e-12).all()
        if lo:
            v = (avg_pool_tokens(x, 2)[b] @ p.w_kv + p.b_kv)[..., 2 * lo :]
            assert (y[b, ..., 2 * hi :] <= v.max(axis=(0, 1)) + 1e-12).all()
            assert (y[b, ..., 2 * hi :] >= v.min(axis=(0, 1)) - 1e-12).all()


@given(seeds, alphas, st.sampled_from(((4, 4, 2), (3, 5, 2), (2, 2, 1))), st.booleans())
def law_hilo_gradient(seed, alpha, shape, bias):
    """Every parameter and x, with padding or without, against central differences."""
    H, W, s = shape
    rng = np.random.default_rng(seed)
    x, p = image(seed, H, W), layer(seed, window=s, alpha=alpha, bias=bias)
    dy, options = rng.standard_normal(x.shape), {"num_heads": 4, "window": s, "alpha": alpha, "pad": True}
    dx, dp = hilo_attention_backward(dy, x, p, **options)
    f = lambda x, p: np.sum(dy * hilo_attention(x, p, **options))

    def agrees(gradient, f, at):
        direction = rng.standard_normal(at.shape)
        slope, change = slope_of(lambda h: f(at + h * direction), 1e-5)
        size = np.abs(dy).sum() + np.abs(gradient * direction).sum()
        # rounding of f over the step; the step's own error is quartered when it is halved
        atol = 2 * change + 256 * EPS * size / 1e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=0, atol=atol)

    agrees(dx, lambda z: f(z, p), x)
    for name, at in p._asdict().items():
        if at is None:
            assert getattr(dp, name) is None
        else:
            agrees(getattr(dp, name), lambda z, name=name: f(x, p._replace(**{name: z})), at)


def law_hilo_flops_are_counted():
    """The released count is that of the products in ref, padding included."""
    assert hilo_flops(14, 14, 384, num_heads=12, window=2, alpha=0.5).macs == 83_467_776
    for H, W, s, alpha in ((4, 6, 2, 0.5), (5, 3, 2, 0.9), (6, 6, 3, 0.0), (3, 4, 1, 0.3), (4, 4, 2, 1.0)):
        tally, p = Tally(), layer(0, window=s, alpha=alpha)
        hilo_attention(count(tally, image(0, H, W, B=1)), p, num_heads=4, window=s, alpha=alpha, pad=True)
        cost = hilo_flops(H, W, 8, num_heads=4, window=s, alpha=alpha)
        assert tally.macs == cost.macs == cost.hifi + cost.lofi
        numbers = sum(x.size for x in tree_leaves(p)) + 2 * H * W * 8
        assert cost.bytes == 4 * numbers


def law_hilo_heads_are_cut_towards_zero():
    assert split_heads_hilo(12, 0.9) == (2, 10)
    assert split_heads_hilo(100, 0.29) == (72, 28)  # 0.29 * 100 is just below 29
    assert split_heads_hilo(3, 0.3) == (3, 0)
    assert split_heads_hilo(4, 1) == (0, 4)


@given(seeds)
def law_hilo_merging_without_offsets_is_a_convolution(seed):
    rng = np.random.default_rng(seed)
    x, w, b = image(seed), rng.standard_normal((5, 8, 2, 2)), rng.standard_normal(5)
    zero = np.zeros((2, 2, 3, 4, 2))
    plain = conv2d(x, w, b, stride=2)
    atol = 2**8 * EPS * (1 + np.abs(plain).max())
    np.testing.assert_allclose(deformable_token_merge(x, zero, w, b), plain, rtol=0, atol=atol)
    # whole steps look at another pixel; beyond the edge there is nothing
    down = np.concatenate([x[:, 1:], 0 * x[:, :1]], axis=1)
    got = deformable_token_merge(x, zero + np.array([1.0, 0.0]), w, b)
    np.testing.assert_allclose(got, conv2d(down, w, b, stride=2), rtol=0, atol=atol)
    away = deformable_token_merge(x, zero - 99.0, w, b)
    np.testing.assert_array_equal(away, np.broadcast_to(b, away.shape))


@given(seeds)
def law_hilo_samples_are_bilinear(seed):
    """Between pixels of a map that is a plane, the plane's value; elsewhere the four pixels by hand."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((4, 6)).astype(float)
    plane = (2 * rows - 3 * columns + 1)[None, ..., None]
    offsets = rng.uniform(0, 1, (1, 2, 3, 4, 2))
    one = np.zeros((1, 1, 2, 2))
    one[0, 0, 1, 0] = 1.0  # only the tap below counts
    got = deformable_token_merge(plane, offsets, one, np.zeros(1))[0, 0, :, 0]  # beyond row 3 is the edge
    down, right = offsets[0, 0, :, 2].T
    want = 2 * (1 + down) - 3 * (np.array([0, 2, 4]) + right) + 1
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS * np.abs(want).max())
    x = rng.standard_normal((1, 2, 2, 1))
    a, c = rng.uniform(0, 1, 2)
    at = np.broadcast_to((a - 1, c), (1, 1, 1, 4, 2)) * np.array([0, 0, 1, 0])[:, None]
    got = deformable_token_merge(x, at, one, np.zeros(1))[0, 0, 0, 0]
    z = x[0, :, :, 0]
    want = (1 - a) * ((1 - c) * z[0, 0] + c * z[0, 1]) + a * ((1 - c) * z[1, 0] + c * z[1, 1])
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS)


@given(seeds)
def law_hilo_energy_is_all_there(seed):
    x = np.random.default_rng(seed).standard_normal((3, 6, 5, 2))
    energy = frequency_energy(x)
    np.testing.assert_allclose(energy.sum(), (x**2).mean(), rtol=1e-12)
    assert energy.shape == (5,)  # up to hypot(3, 2) cycles
    at = np.arange(8) / 8
    wave = np.cos(2 * np.pi * 3 * at)[:, None, None] * np.ones((8, 8, 1))
    np.testing.assert_allclose(frequency_energy(wave), 0.5 * np.eye(7)[3], rtol=0, atol=1e-15)
    np.testing.assert_allclose(frequency_energy(2 + 0 * wave)[0], 4, rtol=1e-15)


def law_hilo_network():
    """Shapes, independence of the images in a batch, and a block without attention."""
    rng = np.random.default_rng(0)
    cfg = LITv2Config(4, (1, 1, 1, 1), (1, 1, 4, 2), alpha=0.5, mlp_ratio=2, classes=3)
    net, img = init_litv2(rng, cfg, std=0.3), rng.standard_normal((2, 64, 32, 3))
    logits = litv2_forward(img, net, cfg)
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(litv2_forward(img[1:], net, cfg)[0], logits[1], rtol=0, atol=1e-12)
    shapes = [x.shape[1:] for x in litv2_forward(img, net, cfg, features=True)]
    assert shapes == [(16, 8, 4), (8, 4, 8), (4, 2, 16), (2, 1, 32)]
    block, x = net.blocks[0][0], rng.standard_normal((1, 4, 4, 4))
    assert block.attn is None
    y = litv2_block(x, block, num_heads=1, window=0, alpha=0.5)
    h = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, x + dw_mlp(h, block.mlp), rtol=0, atol=1e-12)
    tally = Tally()
    litv2_forward(count(tally, img[:1, :32]), net, cfg)
    assert tally.macs == litv2_macs(cfg, image_size=32)


def law_hilo_published_sizes():
    """Parameters and multiply-accumulates within 2 % of the released table, over models and over alpha."""

    class Shape(tuple):
        __rmul__ = lambda self, _: np.broadcast_to(0.0, self)  # takes no memory

    shapes = SimpleNamespace(standard_normal=Shape)
    for name, millions, giga in (("s", 28, 3.7), ("m", 49, 7.5), ("b", 87, 13.2)):
        cfg = litv2_config(name)
        n = sum(np.size(x) for x in tree_leaves(init_litv2(shapes, cfg)))
        assert abs(n / 1e6 / millions - 1) < 0.02
        assert abs(litv2_macs(cfg) / 1e9 / giga - 1) < 0.02
    published = {0: 3.97, 0.2: 3.88, 0.4: 3.82, 0.5: 3.77, 0.7: 3.74, 0.9: 3.73, 1.0: 3.70}
    for alpha, giga in published.items():
        assert abs(litv2_macs(replace(litv2_config("s"), alpha=alpha)) / 1e9 / giga - 1) < 0.02
