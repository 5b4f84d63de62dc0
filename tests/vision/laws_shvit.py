"""Laws of SHViT on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.conv import BN, conv_bn
from ref.blocks.optim import tree_leaves, tree_map
from ref.counting import Tally, count
from ref.models.pyramid import random_params, residual_depthwise
from ref.vision.shvit import (
    VARIANTS,
    SHViTConfig,
    fold_residual_depthwise,
    fold_shvit,
    group_norm_1,
    group_norm_1_vjp,
    head_redundancy,
    init_shvit,
    num_parameters,
    shvit_block,
    shvit_config,
    shvit_cost,
    shvit_forward,
    single_head_attention,
    single_head_attention_backward,
    stem_cost,
)
from tests.slopes import slope_of
from tests.vision.pyramid import Shapes

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
OPTIONS = {"pdim": 5, "qk_dim": 3}
SMALL = SHViTConfig((16, 24, 24), (4, 5, 7), (2, 1, 1), qk_dims=(4, 3, 3), num_classes=10)


def attention(rng, side, C=12, P=5):
    """x [2, *side, C] and the parameters of one attention with 3 query channels, as after training."""
    cfg = SHViTConfig((16, C, 24), (4, min(P, C - 1), 7), (1, 1, 1), qk_dims=(3, 3, 3))
    mixer = random_params(rng, init_shvit(rng, cfg)).stages[1].blocks[0].mixer
    return rng.standard_normal((2, *side, C)), mixer


def by_pixels(x, p, P, qk):
    """One image [H, W, C], sums over pixels written out."""
    H, W, C = x.shape
    norm = lambda y, bn: (y - bn.mean) / np.sqrt(bn.var + 1e-5) * bn.gamma + bn.beta
    seen = x[..., :P].reshape(-1, P)
    h = (seen - seen.mean()) / np.sqrt(seen.var() + 1e-5) * p.ln_w + p.ln_b
    z = norm(np.einsum("nj,oj->no", h, p.qkv.w[:, :, 0, 0]), p.qkv.bn)
    o = np.zeros((H * W, P))
    for n in range(H * W):
        e = np.exp([z[n, :qk] @ z[m, qk : 2 * qk] / np.sqrt(qk) for m in range(H * W)])
        o[n] = e @ z[:, 2 * qk :] / e.sum()
    joined = np.maximum(np.concatenate([o, x[..., P:].reshape(-1, C - P)], axis=1), 0)
    return norm(joined @ p.proj.w[:, :, 0, 0].T, p.proj.bn).reshape(H, W, C)


@given(seeds, st.sampled_from(((1, 1), (3, 4), (2, 2))))
def law_shvit_attention_is_its_definition(seed, side):
    x, params = attention(np.random.default_rng(seed), side)
    want = np.stack([by_pixels(image, params, 5, 3) for image in x])
    got = single_head_attention(x, params, **OPTIONS)
    # group norm multiplies rounding by at most 1 / sqrt(eps); sums over 12 pixels and 12 channels
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert single_head_attention(x[:0], params, **OPTIONS).shape == (0, *x.shape[1:])
    dx, _ = single_head_attention_backward(x[:0], x[:0], params, **OPTIONS)
    assert dx.shape == (0, *x.shape[1:])


@given(seeds)
def law_shvit_other_channels_pass_by_the_attention(seed):
    """With a projection that keeps both parts apart, the attending channels never see the others."""
    rng = np.random.default_rng(seed)
    x, params = attention(rng, (3, 3))
    w = params.proj.w.copy()
    w[:5, 5:], w[5:, :5] = 0, 0
    bn = params.qkv.bn
    bn = bn._replace(beta=bn.beta + 20 * (np.arange(11) >= 6))  # large values, so that no ReLU hides a pixel
    params = params._replace(proj=params.proj._replace(w=w), qkv=params.qkv._replace(bn=bn))
    y = single_head_attention(x, params, **OPTIONS)
    moved = x.copy()
    moved[..., 5:] += rng.standard_normal(moved[..., 5:].shape)
    new = single_head_attention(moved, params, **OPTIONS)
    # what is multiplied by 0 is added exactly; BLAS may order the rest of a row differently, not its values
    np.testing.assert_allclose(new[..., :5], y[..., :5], rtol=0, atol=32 * EPS * np.abs(y).max())
    assert (new[..., 5:] != y[..., 5:]).any()
    # one pixel of the rest moves that pixel only; one attending channel moves every pixel
    one = x.copy()
    one[0, 0, 0, 7] += 1 + abs(one[0, 0, 0, 7])
    changed = np.abs(single_head_attention(one, params, **OPTIONS) - y).max(axis=-1) > 1e-9
    assert changed.sum() == 1
    one = x.copy()
    one[0, 0, 0, 2] += 1
    changed = (single_head_attention(one, params, **OPTIONS) != y).any(axis=-1)
    assert changed[0].all()
    assert not changed[1].any()


@given(seeds)
def law_shvit_permutations_commute(seed):
    """Pixels in any order (there is no position); the passing channels in any order, the projection alike."""
    rng = np.random.default_rng(seed)
    x, params = attention(rng, (3, 4))
    y = single_head_attention(x, params, **OPTIONS)
    order = rng.permutation(12)
    shuffled = x.reshape(2, 12, 12)[:, order].reshape(x.shape)
    got = single_head_attention(shuffled, params, **OPTIONS)
    np.testing.assert_allclose(got.reshape(2, 12, 12), y.reshape(2, 12, 12)[:, order], rtol=0, atol=1e-10)
    order = np.concatenate([np.arange(5), 5 + rng.permutation(7)])
    proj = params.proj._replace(w=params.proj.w[:, order])
    got = single_head_attention(x[..., order], params._replace(proj=proj), **OPTIONS)
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-10)


@given(seeds)
def law_shvit_all_channels_are_plain_attention(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 2, 3, 6))
    _, params = attention(rng, (2, 3), C=7, P=6)
    _, wide = attention(rng, (2, 3), C=6)
    params = params._replace(proj=wide.proj)
    z = conv_bn(group_norm_1(x, params.ln_w, params.ln_b), params.qkv).reshape(2, 6, 12)
    e = np.exp(np.einsum("bnd,bmd->bnm", z[..., :3], z[..., 3:6]) / np.sqrt(3))
    o = np.einsum("bnm,bmc->bnc", e / e.sum(axis=-1, keepdims=True), z[..., 6:]).reshape(x.shape)
    got = single_head_attention(x, params, pdim=6, qk_dim=3, full=True)
    np.testing.assert_allclose(got, conv_bn(np.maximum(o, 0), params.proj), rtol=0, atol=1e-10)


@given(seeds, st.sampled_from((1.0, 1e3)))
def law_shvit_group_norm_sees_a_sample_as_one(seed, gain):
    rng = np.random.default_rng(seed)
    x = gain * rng.standard_normal((2, 3, 4, 5)) + 3 * gain
    one, zero = np.ones(5), np.zeros(5)
    y = group_norm_1(x, one, zero, eps=1e-12)
    np.testing.assert_allclose(y.mean(axis=(1, 2, 3)), 0, rtol=0, atol=1e-12)
    np.testing.assert_allclose((y**2).mean(axis=(1, 2, 3)), 1, rtol=0, atol=1e-10)
    scaled = group_norm_1(np.array([2.0, 0.5])[:, None, None, None] * x + 7, one, zero, eps=1e-12)
    np.testing.assert_allclose(scaled, y, rtol=0, atol=1e-10)
    flat = group_norm_1(np.full((1, 2, 2, 5), 4.0), one, zero)
    np.testing.assert_array_equal(flat, 0)  # a constant sample: eps keeps it finite


@given(seeds)
def law_shvit_backward_is_the_slope(seed):
    """Along a random direction of x, then of each part of the parameters; statistics are not trained."""
    rng = np.random.default_rng(seed)
    x, params = attention(rng, (2, 3))
    dy = rng.standard_normal(x.shape)
    dx, dparams = single_head_attention_backward(dy, x, params, **OPTIONS)
    assert [g.shape for g in tree_leaves(dparams)] == [p.shape for p in tree_leaves(params)]
    draw = lambda tree: tree_map(lambda a: rng.standard_normal(a.shape), tree)
    still = lambda p: p._replace(bn=p.bn._replace(mean=0 * p.bn.mean, var=0 * p.bn.var))
    zero = tree_map(np.zeros_like, params)
    norm = zero._replace(ln_w=draw(params.ln_w), ln_b=draw(params.ln_b))
    maps = [zero._replace(**{n: still(draw(getattr(params, n)))}) for n in ("qkv", "proj")]
    for d, dp in [(draw(x), zero), (0 * x, norm), *((0 * x, m) for m in maps)]:

        def value(h, d=d, dp=dp):
            moved = tree_map(lambda a, b: a + h * b, params, dp)
            return np.sum(dy * single_head_attention(x + h * d, moved, **OPTIONS))

        slope, change = slope_of(value, 1e-6)
        got = np.sum(dx * d) + sum(map(np.vdot, tree_leaves(dparams), tree_leaves(dp)))
        # truncation, seen by doubling the step, and cancellation: 144 terms, each good to 256 eps, over h
        error = 2 * change + 256 * EPS / 1e-6 * np.abs(dy).sum()
        np.testing.assert_allclose(got, slope, rtol=0, atol=error)
    gamma = rng.uniform(0.5, 1.5, 12)
    dx, dgamma, dbeta = group_norm_1_vjp(x, gamma, dy)
    d, e = rng.standard_normal(x.shape), rng.standard_normal(12)
    value = lambda h: np.sum(dy * group_norm_1(x + h * d, gamma + h * e, h * e))
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.sum(dx * d) + (dgamma + dbeta) @ e, slope, rtol=0, atol=1e-6)


@given(seeds, st.sampled_from((1, 3, 5)))
def law_shvit_residual_depthwise_becomes_one_convolution(seed, kernel):
    rng = np.random.default_rng(seed)
    p = random_params(rng, init_shvit(rng, SMALL)).stages[0].blocks[0].dw
    p = p._replace(w=rng.standard_normal((16, 1, kernel, kernel)))
    x = rng.standard_normal((2, 4, 5, 16))
    folded = residual_depthwise(x, fold_residual_depthwise(p))
    np.testing.assert_allclose(folded, residual_depthwise(x, p), rtol=0, atol=1e-10)


def law_shvit_fresh_block_is_the_identity():
    rng = np.random.default_rng(0)
    first, second = (stage.blocks[0] for stage in init_shvit(rng, SMALL).stages[:2])
    x = rng.standard_normal((1, 3, 5, 24))
    np.testing.assert_array_equal(shvit_block(x, second, kind="s", **OPTIONS), x)
    np.testing.assert_array_equal(shvit_block(x[..., :16], first, kind="i"), x[..., :16])


def law_shvit_folds_counts_and_takes_any_size():
    """A whole network: folded as unfolded, multiplications as the closed form, odd sides rounded up."""
    rng = np.random.default_rng(1)
    net = random_params(rng, init_shvit(rng, SMALL))
    img = rng.standard_normal((2, 50, 81, 3))
    maps = shvit_forward(img, net, SMALL, features=True)
    assert [m.shape for m in maps] == [(2, 4, 6, 16), (2, 2, 3, 24), (2, 1, 2, 24)]
    logits, folded = shvit_forward(img, net, SMALL), fold_shvit(net)
    np.testing.assert_allclose(shvit_forward(img, folded, SMALL), logits, rtol=0, atol=1e-10)
    assert not any(isinstance(leaf, BN) for block in folded.stages[1].blocks for leaf in block.ffn)
    assert [a is b for a, b in zip(tree_leaves(fold_shvit(folded)), tree_leaves(folded), strict=True)]
    two = net._replace(head_dist=net.head._replace(b=net.head.b + 2))
    np.testing.assert_allclose(shvit_forward(img, two, SMALL), logits + 1, rtol=0, atol=1e-12)
    tally = Tally()
    shvit_forward(count(tally, rng.standard_normal((2, 72, 72, 3))), net, SMALL)
    assert tally.macs == sum(row.macs for row in shvit_cost(SMALL, batch=2, image=72))


def law_shvit_variants_have_the_published_sizes():
    """Parameters of the released models exactly, multiply-adds within 0.1 %, their table within 0.2 %."""
    parameters = (6_330_808, 11_483_072, 14_245_273, 16_588_484)
    published = (241, 366, 601, 986)  # millions, as the released table rounds them
    released = (240.6 + 0.72, 364.5 + 0.93, 599.3 + 1.24, 983.5 + 2.70)  # counted in the released models
    for name, size, macs, exact in zip(VARIANTS, parameters, published, released, strict=True):
        cfg = shvit_config(name)
        assert num_parameters(init_shvit(Shapes, cfg)) == size
        rows = shvit_cost(cfg, batch=1, image=256 if name == "s4" else 224)
        np.testing.assert_allclose(sum(row.macs for row in rows) / 1e6, macs, rtol=0.002)
        np.testing.assert_allclose(sum(row.macs for row in rows) / 1e6, exact, rtol=0.001)


def law_shvit_large_patches_shrink_the_first_map_sixteenfold():
    small, large = stem_cost(4, 4), stem_cost(16, 3)
    assert small[0] == 16 * large[0] == 4 * 64 * 56**2
    assert small[2:] == large[:2]
    assert sum(large) < sum(small) / 15


@given(seeds)
def law_shvit_head_redundancy_is_the_mean_cosine(seed):
    rng = np.random.default_rng(seed)
    maps = rng.dirichlet(np.ones(5), (2, 3, 5))
    want = []
    for b in range(2):
        for i in range(3):
            for j in range(i):
                a, c = maps[b, i].ravel(), maps[b, j].ravel()
                want.append(a @ c / np.sqrt((a @ a) * (c @ c)))
    eye = np.eye(4)
    alike, apart = np.stack([eye] * 3)[None], np.stack([eye, eye[::-1]])[None]
    got = head_redundancy([maps, alike, apart])
    np.testing.assert_allclose(got, [np.mean(want), 1, 0], rtol=0, atol=32 * EPS)


@given(seeds)
def law_shvit_survives_huge_inputs_and_keeps_nan_to_its_image(seed):
    x, params = attention(np.random.default_rng(seed), (2, 3))
    assert np.isfinite(single_head_attention(1e100 * x, params, **OPTIONS)).all()
    want = single_head_attention(x, params, **OPTIONS)
    x[0, 1, 1, 0] = np.nan
    got = single_head_attention(x, params, **OPTIONS)
    np.testing.assert_array_equal(got[1], want[1])
    assert np.isnan(got[0]).all()
