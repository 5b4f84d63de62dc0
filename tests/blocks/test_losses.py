"""Cross-entropy, of logits and of a linear head by chunks: the definition, what is not scored, gradients, and
accel against ref; macro-F1 by hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from accel.blocks import losses as accel
from ref.blocks.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_vjp,
    macro_f1,
    negative_log_likelihood,
)

RNG = np.random.default_rng(0)
Z, Y = 3 * RNG.standard_normal((2, 4, 5)), RNG.integers(0, 5, (2, 4))
EPS = np.finfo(np.float64).eps


def test_losses_likelihood_is_the_definition_and_bears_huge_logits():
    got = negative_log_likelihood(Z, Y)
    for i in np.ndindex(2, 4):
        want = -np.log(np.exp(Z[i][Y[i]]) / np.exp(Z[i]).sum())
        np.testing.assert_allclose(got[i], want, rtol=0, atol=32 * EPS * np.abs(Z).max())
    assert negative_log_likelihood(np.array([1e300, 0.0]), np.array(0)) == 0
    assert negative_log_likelihood(np.array([1e300, 0.0]), np.array(1)) == 1e300
    assert negative_log_likelihood(np.zeros((0, 5)), np.zeros(0, int)).shape == (0,)


def test_losses_cross_entropy_is_the_mean_over_what_is_scored():
    labels = Y.copy()
    labels[0, :3] = -100
    loss, grad = cross_entropy(Z, labels, ignore=-100)
    np.testing.assert_allclose(loss, negative_log_likelihood(Z, Y)[labels >= 0].mean(), rtol=4 * EPS)
    assert not grad[0, :3].any()
    d, h = RNG.standard_normal(Z.shape), 1e-5
    slope = (
        cross_entropy(Z + h * d, labels, ignore=-100)[0] - cross_entropy(Z - h * d, labels, ignore=-100)[0]
    )
    # third derivatives of the loss are at most 1: the quotient is off by h^2 |d|^3, and by eps / h
    np.testing.assert_allclose((grad * d).sum(), slope / (2 * h), rtol=0, atol=1e-9)
    wild = Z.copy()
    wild[0, :3] = np.nan
    np.testing.assert_array_equal(cross_entropy(wild, labels, ignore=-100)[1], grad)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full_like(Y, 5), r"labels must be in 0\.\.4"),
        (Y + 0.0, "labels must be integers"),
        (np.full_like(Y, -100), "at least one that is scored"),
        (Y[:1], r"labels\.shape"),
    ],
    ids=["range", "float", "none", "shape"],
)
def test_losses_reject_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(Z, labels, ignore=-100)


def head(seed=0, rows=(7,), d=5, V=11):
    """x [*rows, d], w [V, d], labels [*rows], two of seven of them -100."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, V, rows)
    labels[..., [1, 4]] = -100
    return rng.standard_normal((*rows, d)), rng.standard_normal((V, d)), labels


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
def test_losses_linear_head_is_cross_entropy_of_its_logits(chunk):
    x, w, labels = head(rows=(2, 7))
    loss, dlogits = cross_entropy(x @ w.T, labels, ignore=-100)
    told = {"ignore": -100, "chunk": chunk}
    # sums of ten terms near 3, 11 classes and 10 rows in another order
    near = partial(np.testing.assert_allclose, rtol=0, atol=64 * EPS)
    near(linear_cross_entropy(x, w, labels, **told), loss)
    dx, dw = linear_cross_entropy_vjp(x, w, labels, -2.0, **told)
    near(dx, -2 * dlogits @ w)
    near(dw, -2 * np.einsum("ijv,ijd->vd", dlogits, x))
    x[labels < 0] = np.nan
    np.testing.assert_array_equal(linear_cross_entropy_vjp(x, w, labels, -2.0, **told)[1], dw)
    assert not dx[labels < 0].any()


def rounding(x, w, labels, dtype):
    """Bounds on the errors of (loss, dx, dw) for inputs exact in dtype; labels below 0 are not scored.

    Logits are d products off, their exponentials' sum V terms; a probability follows with twice the logits'
    error, is rounded to dtype (or to its smallest step), and is multiplied by w, over classes whose gradients
    g add up to at most 2 a row, or by x, over rows: |g| and p together are at most 2 |g| and 1 for the label.
    """
    x, w = (np.asarray(a, np.float64).reshape(-1, np.shape(a)[-1]) for a in (x, w))
    x, labels = x[np.ravel(labels) >= 0], np.ravel(labels)[np.ravel(labels) >= 0]
    wide = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    own, step = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal)
    (n, d), V, X, W = x.shape, len(w), np.abs(x).max(), np.abs(w).max()
    logits = wide * d * X * W * d
    p = 2 * logits + (V + 8) * wide
    g = np.abs(cross_entropy(x @ w.T, labels)[1]).sum(axis=0)[:, None]
    share = np.bincount(labels, minlength=V)[:, None] / n
    dx = W * (2 * (p + 2 * own) + V * step) / n
    dw = X * ((p + 2 * own + n * wide) * (2 * g + share) + step)
    return p + 8 * logits, dx, dw  # sums of the loss round at the size of the logits


def close(got, want, atol):
    """Equal within atol, which may be an array."""
    assert (np.abs(np.asarray(got, np.float64) - want) <= atol).all()


@pytest.mark.parametrize(
    ("dtype", "chunk", "V"),
    [(d, c, 11) for d in ("float32", "bfloat16", "float16", "float64") for c in (3, 100)]
    + [("bfloat16", 4, 1100)],
)
def test_losses_linear_head_in_accel_matches_ref(dtype, chunk, V):
    """Values and gradients, chunks that do not divide the rows, and a cotangent that is not 1; 1,100 classes
    are padded.
    """
    with jax.enable_x64(dtype == "float64"):
        x, w, labels = head(V=V)
        x, w = (jnp.asarray(a, dtype) for a in (x, w))
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        run = jax.jit(partial(accel.linear_cross_entropy, ignore=-100, chunk=chunk))
        value, pull = jax.vjp(lambda x, w: run(x, w, jnp.asarray(labels, jnp.int32)), x, w)
        dx, dw = pull(jnp.asarray(-2, wide))
        assert (value.dtype, dx.dtype, dw.dtype) == (wide, x.dtype, w.dtype)
        alone = run(x, w, jnp.asarray(labels, jnp.int32))  # without gradients
        x, w = (np.asarray(a, np.float64) for a in (x, w))
    told = {"ignore": -100, "chunk": chunk}
    wants = linear_cross_entropy(x, w, labels, **told), *linear_cross_entropy_vjp(x, w, labels, -2.0, **told)
    room = rounding(x, w, labels, dtype)
    for got, want, atol in zip((value, dx, dw), wants, (room[0], 2 * room[1], 2 * room[2]), strict=True):
        close(got, want, atol)
    close(alone, wants[0], room[0])
    assert not np.asarray(dx, np.float64)[labels < 0].any()


@pytest.mark.gpu
def test_losses_linear_head_of_gpt2_on_a_gpu_matches_ref():
    """50,257 words, which are padded, and chunks of 234 rows, in bfloat16."""
    x, w, labels = head(rows=(100, 7), d=64, V=50257)
    x, w = (jnp.asarray(a / 4, jnp.bfloat16) for a in (x, w))
    told = {"ignore": -100, "chunk": 256}
    loss = lambda x, w: accel.linear_cross_entropy(x, w, jnp.asarray(labels, jnp.int32), **told)
    value, (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    wants = linear_cross_entropy(x, w, labels, **told), *linear_cross_entropy_vjp(x, w, labels, **told)
    for got, want, atol in zip((value, dx, dw), wants, rounding(x, w, labels, "bfloat16"), strict=True):
        close(got, want, atol)


def test_losses_linear_head_in_accel_answers_what_ref_refuses_with_nan():
    """A label without a row: NaN in the loss, in its own dx and in dw, while the others' dx stay. Nothing
    scored: NaN. What is not scored may hold anything. One program for all of these: labels are values.
    """
    x, w, labels = head()
    x, w = (jnp.asarray(a, jnp.float32) for a in (x, w))
    call = jax.jit(jax.value_and_grad(partial(accel.linear_cross_entropy, ignore=-100, chunk=3), (0, 1)))
    good, grads = call(x, w, jnp.asarray(labels))
    for wrong in (-1, 11, 2**31 - 1):
        value, (dx, dw) = call(x, w, jnp.asarray(labels).at[3].set(wrong))
        assert np.isnan(value)
        assert np.isnan(dx[3]).all()
        assert np.isnan(dw).any()
        np.testing.assert_array_equal(np.delete(dx, 3, 0), np.delete(grads[0], 3, 0))
    value, found = call(x, w, jnp.full(7, -100))
    assert all(np.isnan(a).all() for a in (value, *found))
    value, found = call(x.at[np.array([1, 4])].set(jnp.nan), w, jnp.asarray(labels))
    for a, b in zip((value, *found), (good, *grads), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(call(x.at[0].set(jnp.nan), w, jnp.asarray(labels))[0])


def test_losses_linear_head_in_accel_bears_huge_logits_and_any_integers():
    """One row: logits 3e38 apart are a loss of that size, and a gradient of one class against another."""
    x, w = jnp.asarray([1.5e19, 0], jnp.float32), jnp.asarray([[1e19, 0], [-1e19, 0]], jnp.float32)
    call = jax.jit(jax.value_and_grad(accel.linear_cross_entropy, (0, 1)))
    assert call(x, w, np.int8(0))[0] == 0
    value, (dx, dw) = call(x, w, np.int8(1))
    assert value == x[0] * (w[0, 0] - w[1, 0])
    np.testing.assert_array_equal(dx, w[0] - w[1])
    np.testing.assert_array_equal(dw, jnp.stack([x, -x]))
    x, w, labels = head()
    x, w = (jnp.asarray(a, jnp.float32) for a in (x, w))
    want = linear_cross_entropy(x, w, np.maximum(labels, 0))
    for dtype, ignore in ((np.uint8, -100), (np.uint32, -100), (np.int8, 300)):  # such a label cannot occur
        call = jax.jit(partial(accel.linear_cross_entropy, ignore=ignore))
        got = call(x, w, np.maximum(labels, 0).astype(dtype))
        close(got, want, rounding(x, w, np.maximum(labels, 0), "float32")[0])


def test_losses_linear_head_in_accel_under_vmap_and_twice_differentiated():
    """Against the plain form, and no array of all logits: 64 rows of 128 classes take less than those."""

    def plain(x, w, labels):
        z = x @ w.T
        own = jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(z, axis=-1) - own)

    chunked = partial(accel.linear_cross_entropy, chunk=3)
    x, w, labels = head(rows=(2, 7))
    x, w = (jnp.asarray(a, jnp.float32) for a in (x, w))
    labels = jnp.asarray(np.maximum(labels, 0), jnp.int32)
    curve = lambda f: jax.vmap(lambda x, y: jax.grad(lambda x: (jax.grad(f, 1)(x, w, y) ** 2).sum())(x))
    got, want = (jax.jit(curve(f))(x, labels) for f in (chunked, plain))
    # second derivatives: sums of products near 1 of 11 classes, 7 rows and 5 columns, squared
    np.testing.assert_allclose(got, want, rtol=0, atol=4096 * np.finfo(np.float32).eps * np.abs(want).max())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: chunked(x, w, labels), (x,), (x,))
    x, w = jnp.zeros((64, 4)), jnp.zeros((128, 4))
    grad = jax.jit(jax.grad(partial(accel.linear_cross_entropy, chunk=8), (0, 1)))
    used = grad.lower(x, w, jnp.zeros(64, jnp.int32)).compile().memory_analysis()
    assert used.temp_size_in_bytes < 64 * 128 * 4


def test_losses_linear_head_in_accel_over_devices_sums_the_gradient_of_its_weights():
    """Rows in parts on two devices: the mean of their losses and gradients is that of the whole."""
    x, w, labels = head(rows=(8,))
    x, w = (jnp.asarray(a, jnp.float32) for a in (x, w))
    labels = jnp.asarray(np.maximum(labels, 0), jnp.int32)
    loss = partial(accel.linear_cross_entropy, chunk=3)
    mesh = jax.make_mesh((2,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    each = lambda x, w, y: jax.lax.pmean(loss(x, w, y), "parts")
    both = jax.shard_map(each, mesh=mesh, in_specs=(P("parts"), P(), P("parts")), out_specs=P())
    got = jax.jit(jax.value_and_grad(both, (0, 1)))(x, w, labels)
    wants = linear_cross_entropy(x, w, labels), *linear_cross_entropy_vjp(x, w, labels)
    for a, want, atol in zip((got[0], *got[1]), wants, rounding(x, w, labels, "float32"), strict=True):
        close(a, want, atol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((7, 4))}, r"w\.shape\[1\] = 5"),
        ({"labels": np.zeros(6, int)}, r"labels\.shape"),
        ({"labels": np.zeros(7)}, "labels must be integers"),
        ({"x": np.zeros((0, 5)), "labels": np.zeros(0, int)}, "at least one that is scored"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
    ids=["width", "rows", "float", "none", "chunk"],
)
@pytest.mark.parametrize("layer", [linear_cross_entropy, accel.linear_cross_entropy], ids=["ref", "accel"])
def test_losses_linear_head_rejects(layer, change, message):
    x, w, _ = head()
    given = {"x": x, "labels": np.zeros(7, int), "chunk": 3, **change}
    with pytest.raises(ValueError, match=message):
        layer(given["x"], w, given["labels"], chunk=given["chunk"])


def test_losses_linear_head_in_accel_rejects_integers_as_numbers():
    with pytest.raises(ValueError, match="x must be floating, got int32"):
        accel.linear_cross_entropy(jnp.zeros((7, 5), jnp.int32), jnp.zeros((11, 5)), jnp.zeros(7, jnp.int32))


def test_losses_macro_f1_by_hand():
    y, p = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    # hits 1, 1, 0 of 2 + 2, 1 + 2 and 1 + 1; a fourth class never occurs
    np.testing.assert_allclose(macro_f1(y, p, num_classes=4), (2 / 4 + 2 / 3 + 0 + 0) / 4, rtol=1e-15)
    assert macro_f1(y, y, num_classes=3) == 1


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        (np.zeros(0, int), np.zeros(0, int), "at least one class"),
        (np.array([0, 2]), np.array([0, 1]), r"y must be in 0\.\.1"),
        (np.array([0, 1]), np.array([0.0, 1]), "p must be integers"),
    ],
    ids=["empty", "range", "float"],
)
def test_losses_reject_bad_classes(y, p, message):
    with pytest.raises(ValueError, match=message):
        macro_f1(y, p, num_classes=2)
