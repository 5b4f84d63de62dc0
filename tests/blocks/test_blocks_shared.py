"""The shared blocks: ref against the definition, accel against ref, gradients against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.blocks import attention as a_attention
from accel.blocks import masks as a_masks
from accel.blocks import mlp as a_mlp
from accel.blocks import norms as a_norms
from accel.blocks import rope as a_rope
from accel.blocks import softmax as a_softmax
from accel.blocks import transformer as a_transformer
from ref.blocks import attention, masks, mlp, norms, rope, softmax, transformer
from ref.dims import dims

EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps
seeds = st.integers(0, 2**32 - 1)


def close32(got, want, terms):
    """float32 against float64: each of `terms` additions or functions may round once, relative to the
    largest.
    """
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=0, atol=terms * EPS32 * (1 + np.abs(want).max())
    )


def central(f, x, d, h=1e-5):
    return (f(x + h * d) - f(x - h * d)) / (2 * h)


def test_dims_binds_axes_and_leading_axes():
    x, y = np.zeros((2, 3, 4)), np.zeros((2, 3, 5))
    assert dims(x=(x, "... L D"), y=(y, "... L E")) == {"...": (2,), "L": 3, "D": 4, "E": 5}
    assert dims(x=(x, "... 4"))["..."] == (2, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("L D", r"y must have shape \[L, D\], got \[2, 3, 5\]"),
        ("... E L", r"y.shape\[2\] = 5, but axis L is 3 in x"),
        ("... L 4", r"y.shape\[2\] = 5, but must be 4"),
    ],
)
def test_dims_names_the_argument_at_fault(spec, message):
    with pytest.raises(ValueError, match=message):
        dims(x=(np.zeros((2, 3, 4)), "... L D"), y=(np.zeros((2, 3, 5)), spec))


@given(seeds, st.sampled_from((1.0, 1e4)))
def test_softmax_block_is_its_definition(seed, gain):
    s = gain * np.random.default_rng(seed).standard_normal((3, 6))
    s[0] = -np.inf
    s[1, 2:] = -np.inf
    p = softmax.softmax(s)
    assert not p[0].any()
    e = np.exp(s[1:] - s[1:].max(-1, keepdims=True))
    np.testing.assert_allclose(p[1:], e / e.sum(-1, keepdims=True), rtol=8 * EPS)
    assert np.isneginf(softmax.logsumexp(s)[0])
    close32(a_softmax.softmax(jnp.asarray(s, jnp.float32)), softmax.softmax(s.astype(np.float32)), 8)
    close32(
        a_softmax.logsumexp(jnp.asarray(s[1:], jnp.float32)), softmax.logsumexp(s[1:].astype(np.float32)), 8
    )


@given(seeds)
def test_softmax_block_vjp_is_a_central_difference(seed):
    rng = np.random.default_rng(seed)
    s, dp, d = rng.standard_normal((3, 2, 5))
    got = np.sum(softmax.softmax_vjp(softmax.softmax(s), dp) * d)
    # h = 1e-5: truncation h^2 |f'''| / 6 is about 1e-10, cancellation eps / h about 2e-11, for data of size
    # 1 to 4
    np.testing.assert_allclose(
        got, central(lambda x: np.sum(dp * softmax.softmax(x)), s, d), rtol=0, atol=2e-8
    )


@pytest.mark.parametrize("L", [1, 3, 6])
def test_masks_block_agrees_with_its_definition(L):
    S = 5
    for i in range(L):
        for j in range(S):
            assert masks.causal_mask(L, S)[i, j] == (j <= i + S - L)
            assert masks.window_mask(L, S, left=1, right=0)[i, j] == (-1 <= j - i - (S - L) <= 0)
    np.testing.assert_array_equal(a_masks.causal_mask(L, S), masks.causal_mask(L, S))
    window = {"left": 2, "right": 1}
    np.testing.assert_array_equal(a_masks.window_mask(L, S, **window), masks.window_mask(L, S, **window))
    lengths = np.array([0, 3])
    np.testing.assert_array_equal(a_masks.length_mask(lengths, S), masks.length_mask(lengths, S))
    np.testing.assert_array_equal(masks.length_mask(lengths, S)[1, 0], np.arange(S) < 3)


@given(seeds)
def test_norms_block_values_and_gradients(seed):
    rng = np.random.default_rng(seed)
    x, dy, dx = rng.standard_normal((3, 4, 6))
    w, b, dw = rng.standard_normal((3, 6))
    y = norms.layer_norm(x, w, b)
    for i in range(4):
        want = (x[i] - x[i].mean()) / np.sqrt(x[i].var() + 1e-5) * w + b
        np.testing.assert_allclose(y[i], want, rtol=0, atol=64 * EPS * (1 + np.abs(want).max()))
    gx, gw, gb = norms.layer_norm_vjp(x, w, dy)
    f = lambda x, w, b: np.sum(dy * norms.layer_norm(x, w, b))
    # rows may have a small spread: third derivatives grow like its inverse cube
    slack = 1e-8 * (1 + 1 / x.std(-1).min() ** 3)
    np.testing.assert_allclose(np.sum(gx * dx), central(lambda x: f(x, w, b), x, dx), rtol=0, atol=slack)
    np.testing.assert_allclose(np.sum(gw * dw), central(lambda w: f(x, w, b), w, dw), rtol=0, atol=slack)
    np.testing.assert_allclose(np.sum(gb * dw), central(lambda b: f(x, w, b), b, dw), rtol=0, atol=slack)
    r = norms.rms_norm(x, w)
    np.testing.assert_allclose(r, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w, rtol=16 * EPS)
    gx, gw = norms.rms_norm_vjp(x, w, dy)
    f = lambda x, w: np.sum(dy * norms.rms_norm(x, w))
    slack = 1e-8 * (1 + 1 / np.sqrt((x * x).mean(-1)).min() ** 3)
    np.testing.assert_allclose(np.sum(gx * dx), central(lambda x: f(x, w), x, dx), rtol=0, atol=slack)
    np.testing.assert_allclose(np.sum(gw * dw), central(lambda w: f(x, w), w, dw), rtol=0, atol=slack)
    to32 = lambda *a: [jnp.asarray(t, jnp.float32) for t in a]
    spread = 1 / x.std(-1).min()  # the division by a small spread enlarges the rounding of x - mean
    close32(a_norms.layer_norm(*to32(x, w, b)), y, 32 * (1 + spread))
    close32(a_norms.rms_norm(*to32(x, w)), r, 32)


@given(seeds, st.sampled_from(("adjacent", "halves")))
def test_rope_block_turns_pairs_and_keeps_relative_positions(seed, pairs):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, 6))
    at = lambda x, t: rope.rope(x, rope.rope_angles(np.array([t]), 6), pairs=pairs)
    np.testing.assert_allclose(np.linalg.norm(at(q, 7)), np.linalg.norm(q), rtol=16 * EPS)
    np.testing.assert_allclose(
        (at(q, 9) @ at(k, 4).T),
        (at(q, 5) @ at(k, 0).T),
        rtol=0,
        atol=256 * EPS * np.linalg.norm(q) * np.linalg.norm(k),
    )
    x = rng.standard_normal((2, 4, 6))
    angles = rope.rope_angles(np.arange(4), 6)
    got = a_rope.rope(jnp.asarray(x, jnp.float32), a_rope.rope_angles(jnp.arange(4), 6), pairs=pairs)
    close32(got, rope.rope(x, angles, pairs=pairs), 16)
    # the two layouts differ by a permutation of the channels
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], -1)
    y = rope.rope(halves, angles, pairs="halves")
    np.testing.assert_array_equal(np.stack(np.split(y, 2, -1), -1).reshape(x.shape), rope.rope(x, angles))


def test_rope_block_rejects_odd_heads_and_unknown_layouts():
    with pytest.raises(ValueError, match="head_dim must be even"):
        rope.rope_angles(np.arange(2), 5)
    with pytest.raises(ValueError, match="pairs must be"):
        rope.rope(np.zeros((1, 4)), np.zeros((1, 2)), pairs="quarters")


@pytest.mark.parametrize("approximate", [False, True])
def test_mlp_block_gelu_and_silu_with_gradients(approximate):
    x = np.linspace(-6, 6, 101)
    f = lambda x: mlp.gelu(x, approximate=approximate)
    np.testing.assert_allclose(
        f(x),
        np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=approximate)),
        rtol=0,
        atol=8 * EPS32 * 6,
    )
    np.testing.assert_allclose(
        mlp.gelu_grad(x, approximate=approximate), central(f, x, 1.0), rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(mlp.silu_grad(x), central(mlp.silu, x, 1.0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        mlp.softplus(np.array([-800.0, 0.0, 800.0])), [0, np.log(2), 800.0], rtol=4 * EPS
    )
    np.testing.assert_allclose(mlp.sigmoid(np.array([-800.0, 0.0, 800.0])), [0, 0.5, 1])


def test_mlp_block_swiglu_agrees():
    rng = np.random.default_rng(0)
    x, g, u, d = (rng.standard_normal(s) for s in ((3, 4), (4, 5), (4, 5), (5, 4)))
    want = np.stack([((r @ g) / (1 + np.exp(-(r @ g))) * (r @ u)) @ d for r in x])
    np.testing.assert_allclose(mlp.swiglu(x, g, u, d), want, rtol=0, atol=64 * EPS * np.abs(want).max())
    close32(a_mlp.swiglu(*[jnp.asarray(t, jnp.float32) for t in (x, g, u, d)]), want, 64)


def test_attention_block_dense_agrees_with_grouped_heads_masks_lengths_and_dropout():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6)))
    to32 = lambda *a: [jnp.asarray(t, jnp.float32) for t in a]
    for options in (
        {},
        {"causal": True, "key_lengths": np.array([[4], [7]])},
        {"mask": rng.random((4, 5, 7)) < 0.6, "scale": 0.3},
        {"dropout_p": 0.25, "dropout_mask": rng.random((2, 4, 5, 7)) < 0.75, "causal": True},
    ):
        want = attention.attention_dense(q, k, v, return_lse=True, **options)
        got = a_attention.attention_dense(*to32(q, k, v), return_lse=True, **options)
        for a, b in zip(got, want, strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(np.isfinite(a), finite)
            close32(np.asarray(a)[finite], b[finite], 32)


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([1, 9], "k must be in 0..3, got 1..9"),
        ([1.5, 2.0], "k must be integers"),
        (True, "k must be integers"),
        ([1, 2, 3], "k of shape .3. does not broadcast"),
    ],
)
def test_attention_block_lengths_that_are_wrong_say_so(lengths, says):
    attention.check_lengths("k", [0, 3], (2,), 3)
    attention.check_lengths("k", 3, (2,), 3)
    with pytest.raises(ValueError, match=says):
        attention.check_lengths("k", lengths, (2,), 3)


@pytest.mark.parametrize("layer", [attention, a_attention], ids=["ref", "accel"])
@pytest.mark.parametrize(("D", "Dv"), [(0, 4), (4, 0)])
def test_attention_block_needs_heads_of_some_width(layer, D, Dv):
    q, k, v = (np.zeros((2, 3, n), np.float32) for n in (D, D, Dv))
    with pytest.raises(ValueError, match=f"at least 1 wide, got q and k with D={D}, v with Dv={Dv}"):
        layer.attention_dense(q, k, v)


@pytest.mark.parametrize(("norm", "activation"), [("pre", "gelu"), ("post", "relu")])
def test_transformer_block_agrees_with_its_definition_and_gradients(norm, activation):
    rng = np.random.default_rng(0)
    params = transformer.init_block(rng, 8, 16, std=0.3)._replace(b_q=None, b_o=rng.standard_normal(8))
    x, dy, dx = rng.standard_normal((3, 2, 5, 8))
    options = {"num_heads": 2, "causal": True, "norm": norm, "activation": activation}
    run = lambda x, p: transformer.transformer_block(x, p, **options)
    y = run(x, params)

    # the definition, head by head and token by token
    ln = lambda t, g, b: (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-5) * g + b
    h = ln(x, params.ln1_scale, params.ln1_bias) if norm == "pre" else x
    q, k, v = h @ params.w_q, h @ params.w_k + params.b_k, h @ params.w_v + params.b_v
    a = np.zeros_like(x)
    for b, i, n in np.ndindex(2, 5, 2):
        c = slice(4 * n, 4 * n + 4)
        e = np.exp(q[b, i, c] @ k[b, : i + 1, c].T / 2)
        a[b, i, c] = e / e.sum() @ v[b, : i + 1, c]
    mid = x + a @ params.w_o + params.b_o
    if norm == "post":
        mid = ln(mid, params.ln1_scale, params.ln1_bias)
    f = mlp.gelu if activation == "gelu" else lambda t: np.maximum(t, 0)
    g = ln(mid, params.ln2_scale, params.ln2_bias) if norm == "pre" else mid
    want = mid + f(g @ params.w_fc1 + params.b_fc1) @ params.w_fc2 + params.b_fc2
    if norm == "post":
        want = ln(want, params.ln2_scale, params.ln2_bias)
    np.testing.assert_allclose(y, want, rtol=0, atol=512 * EPS * np.abs(want).max())

    # hand-written gradients: central differences with h = 1e-5; a ReLU bends nowhere within h here (seed
    # checked)
    gx, gp = transformer.transformer_block_vjp(x, params, dy, **options)
    slope = central(lambda x: np.sum(dy * run(x, params)), x, dx)
    np.testing.assert_allclose(np.sum(gx * dx), slope, rtol=0, atol=1e-6 * np.abs(dx).sum())
    for name in params._fields:
        w = getattr(params, name)
        if w is None:
            assert getattr(gp, name) is None
            continue
        d = rng.standard_normal(w.shape)
        slope = central(lambda w, name=name: np.sum(dy * run(x, params._replace(**{name: w}))), w, d)
        np.testing.assert_allclose(np.sum(getattr(gp, name) * d), slope, rtol=0, atol=1e-6 * np.abs(d).sum())

    to32 = lambda t: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), t)
    close32(a_transformer.transformer_block(to32(x), to32(params), **options), want, 128)


def test_transformer_block_rejects_unknown_names():
    params, x = transformer.init_block(np.random.default_rng(0), 4, 8), np.zeros((2, 4))
    with pytest.raises(ValueError, match="norm must be"):
        transformer.transformer_block(x, params, num_heads=2, norm="sandwich")
    with pytest.raises(ValueError, match="activation must be one of gelu"):
        transformer.transformer_block(x, params, num_heads=2, activation="swoosh")
