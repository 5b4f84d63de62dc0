"""Laws of EfficientViT on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.conv import BN, ConvBN, conv_bn
from ref.blocks.optim import tree_leaves, tree_map
from ref.counting import Tally, count
from ref.models.pyramid import random_params
from ref.vision.efficientvit import (
    VARIANTS,
    CGAParams,
    EfficientViTConfig,
    attention_bias_index,
    cascaded_group_attention,
    cascaded_group_attention_backward,
    efficientvit_block,
    efficientvit_config,
    efficientvit_cost,
    efficientvit_forward,
    fold_efficientvit,
    group_attention_maps,
    independent_group_attention,
    init_efficientvit,
    num_parameters,
    transformer_block_cost,
    window_attention,
)
from tests.slopes import slope_of
from tests.vision.pyramid import Shapes

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
KERNELS = (5, 3, 3)
OPTIONS = {"key_dim": 4, "kernels": KERNELS}
SMALL = EfficientViTConfig((16, 24, 24), (1, 1, 2), (2, 2, 3), KERNELS, (4, 4, 4), (3, 7, 7), 10)


def attention(rng, heads, width, side, trained=True):
    """x [2, *side, heads width] and the parameters of one attention over such maps."""
    N, C = int(np.prod(side)), heads * width
    conv = lambda *shape: ConvBN(rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), None)
    one = lambda n: BN(np.ones(n), np.zeros(n), np.zeros(n), np.ones(n))
    params = CGAParams(
        tuple(conv(8 + width, width, 1, 1)._replace(bn=one(8 + width)) for _ in range(heads)),
        tuple(conv(4, 1, k, k)._replace(bn=one(4)) for k in KERNELS[:heads]),
        conv(C, C, 1, 1)._replace(bn=one(C)),
        np.zeros((heads, N)),
    )
    return rng.standard_normal((2, *side, C)), random_params(rng, params) if trained else params


def identity_projection(params):
    """Output = relu(concatenated heads): what every head made is seen."""
    C = len(params.proj.w)
    unit = BN(np.ones(C), np.zeros(C), np.zeros(C), np.full(C, 1 - 1e-5))
    return params._replace(proj=ConvBN(np.eye(C)[:, :, None, None], unit))


def by_pixels(x, p):
    """One image [H, W, C], a head at a time, a pixel pair at a time: equations 2 and 3 as they stand."""
    H, W, C = x.shape
    h = len(p.qkv)
    norm = lambda y, bn: (y - bn.mean) / np.sqrt(bn.var + 1e-5) * bn.gamma + bn.beta
    pixels = [(r, c) for r in range(H) for c in range(W)]
    outs, last = [], np.zeros((H, W, C // h))
    for i in range(h):
        f = x[..., i * C // h : (i + 1) * C // h] + last
        z = norm(np.einsum("rcj,oj->rco", f, p.qkv[i].w[:, :, 0, 0]), p.qkv[i].bn)
        w, half = p.dw[i].w[:, 0], KERNELS[i] // 2
        q = np.zeros((H, W, 4))
        for r, c in pixels:
            for a, b in pixels:
                if max(abs(a - r), abs(b - c)) <= half:
                    q[r, c] += z[a, b, :4] * w[:, a - r + half, b - c + half]
        q = norm(q, p.dw[i].bn)
        last = np.zeros((H, W, C // h))
        for r, c in pixels:
            e = [
                np.exp(q[r, c] @ z[a, b, 4:8] / 2 + p.bias[i][abs(a - r) * W + abs(b - c)]) for a, b in pixels
            ]
            last[r, c] = sum(n * z[a, b, 8:] for n, (a, b) in zip(e, pixels, strict=True)) / sum(e)
        outs.append(last)
    joined = np.maximum(np.concatenate(outs, axis=-1), 0)
    return norm(np.einsum("rcj,oj->rco", joined, p.proj.w[:, :, 0, 0]), p.proj.bn)


@given(seeds, st.sampled_from(((1, 4), (2, 3), (3, 2))), st.sampled_from(((3, 3), (2, 3), (1, 1))))
def law_efficientvit_attention_is_its_definition(seed, sizes, side):
    x, params = attention(np.random.default_rng(seed), *sizes, side)
    want = np.stack([by_pixels(image, params) for image in x])
    got = cascaded_group_attention(x, params, **OPTIONS)
    # three chained heads of sums over at most 9 pixels and 25 taps, weights of order one
    np.testing.assert_allclose(got, want, rtol=0, atol=4096 * EPS * (1 + np.abs(want).max()))
    assert cascaded_group_attention(x[:0], params, **OPTIONS).shape == (0, *x.shape[1:])


@given(seeds)
def law_efficientvit_cascade_is_causal(seed):
    rng = np.random.default_rng(seed)
    x, params = attention(rng, 3, 4, (3, 3))
    params = identity_projection(params)
    y, maps = (f(x, params, **OPTIONS) for f in (cascaded_group_attention, group_attention_maps))
    alone = independent_group_attention(x, params, **OPTIONS)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=0, atol=16 * EPS)
    for j in range(3):
        moved = x.copy()
        moved[..., 4 * j : 4 * j + 4] += rng.standard_normal(moved[..., :4].shape)
        new, new_maps = (
            f(moved, params, **OPTIONS) for f in (cascaded_group_attention, group_attention_maps)
        )
        np.testing.assert_array_equal(new[..., : 4 * j], y[..., : 4 * j])
        np.testing.assert_array_equal(new_maps[:, :j], maps[:, :j])
        assert all((new_maps[:, i] != maps[:, i]).any() for i in range(j, 3))
        others = np.delete(np.arange(12), np.s_[4 * j : 4 * j + 4])
        new = independent_group_attention(moved, params, **OPTIONS)
        np.testing.assert_array_equal(new[..., others], alone[..., others])


@given(seeds)
def law_efficientvit_silent_heads_end_the_cascade(seed):
    """If head i - 1 puts out nothing, head i sees its own slice, as without the cascade."""
    x, params = attention(np.random.default_rng(seed), 2, 4, (3, 3))
    first = params.qkv[0]
    w, zero = first.w.copy(), lambda v: np.concatenate([v[:8], np.zeros(4)])
    w[8:] = 0
    silent = ConvBN(w, first.bn._replace(beta=zero(first.bn.beta), mean=zero(first.bn.mean)))
    params = params._replace(qkv=(silent, params.qkv[1]))
    np.testing.assert_array_equal(
        cascaded_group_attention(x, params, **OPTIONS), independent_group_attention(x, params, **OPTIONS)
    )


@given(seeds)
def law_efficientvit_one_head_is_plain_attention(seed):
    x, params = attention(np.random.default_rng(seed), 1, 6, (3, 4), trained=False)
    z = conv_bn(x, params.qkv[0])
    q = conv_bn(z[..., :4], params.dw[0], padding=2, groups=4).reshape(2, 12, 4)
    k, v = z[..., 4:8].reshape(2, 12, 4), z[..., 8:].reshape(2, 12, 6)
    e = np.exp(np.einsum("bnk,bmk->bnm", q, k) / 2)
    o = np.einsum("bnm,bmc->bnc", e / e.sum(axis=-1, keepdims=True), v)
    want = conv_bn(np.maximum(o, 0).reshape(x.shape), params.proj)
    np.testing.assert_allclose(cascaded_group_attention(x, params, **OPTIONS), want, rtol=0, atol=1e-12)


@given(seeds)
def law_efficientvit_backward_is_the_slope(seed):
    """Along a random direction of x, then of each part of the parameters; statistics are not trained."""
    rng = np.random.default_rng(seed)
    x, params = attention(rng, 3, 2, (2, 3))
    dy = rng.standard_normal(x.shape)
    dx, dparams = cascaded_group_attention_backward(dy, x, params, **OPTIONS)
    assert [g.shape for g in tree_leaves(dparams)] == [p.shape for p in tree_leaves(params)]
    draw = lambda tree: tree_map(lambda a: rng.standard_normal(a.shape), tree)
    still = lambda p: p._replace(bn=p.bn._replace(mean=0 * p.bn.mean, var=0 * p.bn.var))
    zero = tree_map(np.zeros_like, params)
    directions = [
        (draw(x), zero),
        (0 * x, zero._replace(qkv=tuple(map(still, draw(params.qkv))))),
        (0 * x, zero._replace(dw=tuple(map(still, draw(params.dw))))),
        (0 * x, zero._replace(proj=still(draw(params.proj)))),
        (0 * x, zero._replace(bias=draw(params.bias))),
    ]
    for d, dp in directions:

        def value(h, d=d, dp=dp):
            moved = tree_map(lambda a, b: a + h * b, params, dp)
            return np.sum(dy * cascaded_group_attention(x + h * d, moved, **OPTIONS))

        slope, change = slope_of(value, 1e-6)
        got = np.sum(dx * d) + sum(map(np.vdot, tree_leaves(dparams), tree_leaves(dp)))
        # truncation, seen by doubling the step, and cancellation: 72 terms, each good to 256 eps, over h
        error = 2 * change + 256 * EPS / 1e-6 * np.abs(dy).sum()
        np.testing.assert_allclose(got, slope, rtol=0, atol=error)


@given(st.integers(1, 5), st.integers(1, 5), seeds)
def law_efficientvit_bias_index_is_first_seen_first(height, width, seed):
    index, offsets = attention_bias_index(height, width)
    points = [(r, c) for r in range(height) for c in range(width)]
    seen = {}
    want = [[seen.setdefault((abs(a - r), abs(b - c)), len(seen)) for a, b in points] for r, c in points]
    np.testing.assert_array_equal(index, want)
    assert offsets == len(seen) == height * width
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index, index.T)
    assert not np.diag(index).any()
    grid = np.arange(height * width).reshape(height, width)
    for flip in (grid[::-1], grid[:, ::-1]):
        np.testing.assert_array_equal(index[np.ix_(flip.ravel(), flip.ravel())], index)


@given(seeds, st.sampled_from((2, 4, 5, 6)))
def law_efficientvit_windows_are_tiles(seed, R):
    """Windows of 3: small maps whole (of side R <= 3), larger ones tile by tile, with zeros to the right."""
    rng = np.random.default_rng(seed)
    side = min(R, 3)
    _, params = attention(rng, 2, 3, (side, side))
    x = rng.standard_normal((2, R, R, 6))
    got = window_attention(x, params, window=3, **OPTIONS)
    full = -(-R // side) * side
    padded = np.zeros((2, full, full, 6))
    padded[:, :R, :R] = x
    want = np.zeros_like(padded)
    for r in range(0, full, side):
        for c in range(0, full, side):
            tile = np.s_[:, r : r + side, c : c + side]
            want[tile] = cascaded_group_attention(padded[tile], params, **OPTIONS)
    np.testing.assert_allclose(got, want[:, :R, :R], rtol=0, atol=64 * EPS * (1 + np.abs(want).max()))


def law_efficientvit_fresh_block_is_the_identity():
    rng = np.random.default_rng(0)
    block = init_efficientvit(rng, SMALL, image=64).stages[0].blocks[0]
    x = rng.standard_normal((1, 4, 4, 16))
    np.testing.assert_array_equal(efficientvit_block(x, block, window=3, **OPTIONS), x)


def law_efficientvit_folds_and_counts():
    """A whole network: folded as unfolded, multiplications as the closed form, maps at strides 16, 32, 64."""
    rng = np.random.default_rng(1)
    net = random_params(rng, init_efficientvit(rng, SMALL, image=72))
    net = net._replace(head_dist=net.head._replace(w=rng.standard_normal(net.head.w.shape)))
    img = rng.standard_normal((2, 72, 72, 3))
    logits, maps = efficientvit_forward(img, net, SMALL), efficientvit_forward(img, net, SMALL, features=True)
    assert [m.shape for m in maps] == [(2, 5, 5, 16), (2, 3, 3, 24), (2, 2, 2, 24)]
    folded = fold_efficientvit(net)
    np.testing.assert_allclose(efficientvit_forward(img, folded, SMALL), logits, rtol=0, atol=1e-10)
    heads = [
        efficientvit_forward(img, net._replace(head=head, head_dist=None), SMALL)
        for head in (net.head, net.head_dist)
    ]
    np.testing.assert_allclose(logits, sum(heads) / 2, rtol=0, atol=64 * EPS * np.abs(logits).max())
    tally = Tally()
    efficientvit_forward(count(tally, img), net._replace(head_dist=None), SMALL)
    assert tally.macs == sum(row.macs for row in efficientvit_cost(SMALL, batch=2, image=72))


def law_efficientvit_variants_have_the_published_sizes():
    """Parameters of the released models exactly; multiply-adds of the released table to its rounding."""
    parameters = (2_349_436, 2_980_560, 4_187_554, 6_900_722, 8_804_228, 12_473_772)
    published = (79, 167, 201, 263, 299, 522)  # millions
    for name, size, macs in zip(VARIANTS, parameters, published, strict=True):
        cfg = efficientvit_config(name)
        assert num_parameters(init_efficientvit(Shapes, cfg)) == size
        rows = efficientvit_cost(cfg, batch=1)
        assert round(sum(row.macs for row in rows) / 1e6) == macs
        twice = efficientvit_cost(cfg, batch=2)
        assert [r.macs for r in twice] == [2 * r.macs for r in rows]
        assert [r.elementwise for r in twice] == [2 * r.elementwise for r in rows]


def law_efficientvit_moves_fewer_bytes_outside_of_products():
    """Against the twelve blocks of DeiT-T: less traffic, a smaller share of it without multiplications."""

    def traffic(rows, light=("relu", "gelu", "add", "add1", "add2", "cascade", "concat_relu")):
        """Bytes: all, of operations that multiply nothing, of those that no product can absorb."""
        moved = lambda test: sum(r.bytes_read + r.bytes_written for r in rows if test(r))
        heavy = lambda r: not r.macs and r.op.rpartition(".")[-1] not in light
        return moved(lambda r: True), moved(lambda r: not r.macs), moved(heavy)

    deit, without, stuck = traffic(12 * transformer_block_cost(192, 3, 197, batch=64))
    for name in VARIANTS:
        rows = [r for r in efficientvit_cost(efficientvit_config(name), batch=64) if ".block" in r.op]
        total, light, rest = traffic(rows)
        assert total < deit / 4
        assert light / total < without / deit
        assert rest / total < stuck / deit / 3


@given(seeds)
def law_efficientvit_survives_extreme_logits_and_keeps_nan_to_its_image(seed):
    x, params = attention(np.random.default_rng(seed), 2, 4, (3, 3))
    assert np.isfinite(cascaded_group_attention(1e100 * x, params, **OPTIONS)).all()
    want = cascaded_group_attention(x, params, **OPTIONS)
    x[0, 1, 1, 0] = np.nan
    got = cascaded_group_attention(x, params, **OPTIONS)
    np.testing.assert_array_equal(got[1], want[1])
    assert np.isnan(got[0]).any()
