"""Convolutions in ref: the definition by loops, folding, gradients against central differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks import conv
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
H = 1e-5


def by_loops(x, w, b, stride, padding, groups, dilation):
    """Every output one by one."""
    B, hh, ww, _ = x.shape
    O, per, kh, kw = w.shape
    oh = (hh + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    ow = (ww + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((B, oh, ow, O)) + b
    for n, r, c, o in np.ndindex(B, oh, ow, O):
        first = o // (O // groups) * per
        for i, j, k in np.ndindex(kh, kw, per):
            row, col = stride * r + dilation * i - padding, stride * c + dilation * j - padding
            if 0 <= row < hh and 0 <= col < ww:
                y[n, r, c, o] += x[n, row, col, first + k] * w[o, k, i, j]
    return y


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from((1, 2)))
    C, O = 2 * groups, draw(st.sampled_from((2, 4)))
    kh, kw = draw(st.sampled_from(((1, 1), (3, 3), (2, 3))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options = {"stride": draw(st.sampled_from((1, 2))), "padding": draw(st.sampled_from((0, 1, 2)))}
    options |= {"groups": groups, "dilation": draw(st.sampled_from((1, 2)))}
    x = rng.standard_normal((2, draw(st.sampled_from((5, 6))), 7, C))
    return x, rng.standard_normal((O, C // groups, kh, kw)), rng.standard_normal(O), options, rng


@given(convolutions())
def test_conv_block_is_its_definition_and_has_its_gradients(case):
    x, w, b, options, rng = case
    y = conv.conv2d(x, w, b, **options)
    want = by_loops(x, w, b, **options)
    np.testing.assert_allclose(y, want, rtol=0, atol=64 * EPS * (1 + np.abs(want).max()))
    # linear in each argument: <dy, conv(d)> = <vjp(dy), d> up to rounding
    dy = rng.standard_normal(y.shape)
    dx, dw, db = conv.conv2d_vjp(x, w, dy, **options)
    ex, ew = rng.standard_normal(x.shape), rng.standard_normal(w.shape)
    size = 64 * EPS * y.size * np.abs(dy).max() * (1 + np.abs(want).max()) * 10
    np.testing.assert_allclose(np.sum(dx * ex), np.sum(dy * conv.conv2d(ex, w, **options)), rtol=0, atol=size)
    np.testing.assert_allclose(np.sum(dw * ew), np.sum(dy * conv.conv2d(x, ew, **options)), rtol=0, atol=size)
    np.testing.assert_allclose(db, dy.sum(axis=(0, 1, 2)), rtol=0, atol=size)


def _bn(rng, C):
    return conv.BN(
        rng.standard_normal(C), rng.standard_normal(C), rng.standard_normal(C), rng.uniform(0.5, 2, C)
    )


def test_conv_block_batch_norm_folds_and_differentiates():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 5, 4))
    p = conv.ConvBN(rng.standard_normal((6, 4, 3, 3)), _bn(rng, 6))
    y = conv.conv_bn(x, p, padding=1)
    w, b = conv.fold_conv_bn(p)
    np.testing.assert_allclose(conv.conv2d(x, w, b, padding=1), y, rtol=0, atol=256 * EPS * np.abs(y).max())
    trained, moved = conv.conv_bn(x, p, padding=1, train=True)
    flat = trained.reshape(-1, 6)
    np.testing.assert_allclose(flat.mean(0), p.bn.beta, atol=1e-12)
    # eps = 1e-5 beside a variance near 30
    np.testing.assert_allclose(flat.std(0), np.abs(p.bn.gamma), rtol=1e-5)
    raw = conv.conv2d(x, p.w, padding=1).reshape(-1, 6)
    np.testing.assert_allclose(moved.mean, 0.9 * p.bn.mean + 0.1 * raw.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moved.var, 0.9 * p.bn.var + 0.1 * raw.var(0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("train", [False, True])
def test_conv_block_batch_norm_has_its_gradients(train):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 5, 5, 4))
    p = conv.ConvBN(rng.standard_normal((6, 4, 3, 3)), _bn(rng, 6))
    dy = rng.standard_normal((2, 5, 5, 6))

    def value(x, w, gamma, beta):
        moved = conv.ConvBN(w, p.bn._replace(gamma=gamma, beta=beta))
        y = conv.conv_bn(x, moved, padding=1, train=train)
        return np.sum(dy * (y[0] if train else y))

    at = (x, p.w, p.bn.gamma, p.bn.beta)
    dx, dp = conv.conv_bn_vjp(x, p, dy, padding=1, train=train)
    for i, g in enumerate((dx, dp.w, dp.bn.gamma, dp.bn.beta)):
        d = rng.standard_normal(g.shape)
        move = lambda h, i=i, d=d: value(*[a + h * d if n == i else a for n, a in enumerate(at)])
        slope, change = slope_of(move, H)
        # truncation, seen by doubling the step, and cancellation
        error = 2 * change + 1e-7 * np.abs(d).sum()
        np.testing.assert_allclose(np.sum(g * d), slope, rtol=0, atol=error)


def test_conv_block_squeeze_excite_and_patch_merging():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 5, 4, 3))
    w1, b1, w2, b2 = (
        rng.standard_normal((2, 3, 1, 1)),
        rng.standard_normal(2),
        rng.standard_normal((3, 2, 1, 1)),
        rng.standard_normal(3),
    )
    pooled = x.mean(axis=(1, 2))
    hidden = np.maximum(pooled @ w1[:, :, 0, 0].T + b1, 0)
    want = x / (1 + np.exp(-(hidden @ w2[:, :, 0, 0].T + b2)))
    np.testing.assert_allclose(
        conv.squeeze_excite(x, w1, b1, w2, b2), want, rtol=0, atol=64 * EPS * np.abs(want).max()
    )
    cb = lambda *shape: conv.ConvBN(rng.standard_normal(shape), _bn(rng, shape[0]))
    p = conv.PatchMergingParams(
        cb(8, 3, 1, 1),
        cb(8, 1, 3, 3),
        rng.standard_normal((2, 8, 1, 1)),
        np.zeros(2),
        rng.standard_normal((8, 2, 1, 1)),
        np.zeros(8),
        cb(5, 8, 1, 1),
    )
    assert conv.patch_merging(x, p).shape == (1, 3, 2, 5)


def test_conv_block_folded_tree_computes_and_differentiates_alike():
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((1, 4, 4, 3)), rng.standard_normal((1, 4, 4, 3))
    tree = conv.FFNParams(conv.init_conv_bn(rng, 3, 6), conv.init_conv_bn(rng, 6, 3, gamma=0.5))
    tree = tree._replace(pw1=tree.pw1._replace(bn=_bn(rng, 6)))
    folded = conv.fold_all(tree)
    assert isinstance(folded.pw1, conv.Conv)
    want = conv.conv_ffn(x, tree)
    np.testing.assert_allclose(conv.conv_ffn(x, folded), want, rtol=0, atol=256 * EPS * np.abs(want).max())
    dx, _ = conv.conv_bn_vjp(x, tree.pw2._replace(w=tree.pw2.w[:, :3]), dy)
    dx_folded, grads = conv.conv_bn_vjp(x, conv.fold_conv_bn(tree.pw2._replace(w=tree.pw2.w[:, :3])), dy)
    np.testing.assert_allclose(dx_folded, dx, rtol=0, atol=256 * EPS * np.abs(dx).max())
    np.testing.assert_allclose(grads.b, dy.sum(axis=(0, 1, 2)), rtol=0, atol=64 * EPS * np.abs(dy).sum())
    with pytest.raises(ValueError, match="p is folded"):
        conv.conv_bn(x, folded.pw1, train=True)


def test_conv_block_rejects_what_does_not_fit():
    x = np.zeros((1, 4, 4, 3))
    with pytest.raises(ValueError, match="does not fit x with 3 channels"):
        conv.conv2d(x, np.zeros((4, 2, 3, 3)))
    with pytest.raises(ValueError, match="does not fit a padded map"):
        conv.conv2d(x, np.zeros((4, 3, 5, 5)))
