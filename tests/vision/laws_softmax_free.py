"""Laws of SOFT on ref alone: NumPy and Hypothesis."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.linalg import newton_iterates
from ref.blocks.optim import tree_leaves
from ref.blocks.resize import resize_bilinear
from ref.counting import Tally, count
from ref.models.soft import VARIANTS, SoftConfig, SoftParams, init_soft
from ref.vision.softmax_free import (
    exact_gaussian_attention,
    gaussian_kernel,
    newton_inverse,
    newton_inverse_vjp,
    newton_residuals,
    sample_bottleneck,
    soft_attention,
    soft_attention_vjp,
    soft_cost,
    soft_forward,
    soft_layer,
    soft_layer_backward,
)
from tests.slopes import agrees

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def tokens(seed, N=12, d=4, m=5, gain=1.0):
    """q [2, N, d], q_tilde [2, m, d], v [2, N, 3]."""
    rng = np.random.default_rng(seed)
    q, q_tilde = gain * rng.standard_normal((2, N, d)), gain * rng.standard_normal((2, m, d))
    return q, q_tilde, rng.standard_normal((2, N, 3))


def layer(seed, C=8, heads=2, r=2, c=3):
    rng = np.random.default_rng(seed)
    d, w = C // heads, lambda *shape: rng.standard_normal(shape) / math.sqrt(shape[-1])
    return SoftParams(
        w(C, C), w(C), w(C, C), w(C), w(d, d, r, r), 1 + 0.3 * w(d), w(d), w(heads, 1, c, c), w(C, C), w(C)
    )


def by_definition(x, p, height, width, heads, r, c, inverse):
    """One image, one head and one landmark after another, the inverse by `inverse`."""
    N, C = x.shape
    d = C // heads
    q_all, v_all, y = x @ p.w_q + p.b_q, x @ p.w_v + p.b_v, np.zeros((N, C))
    for h in range(heads):
        q, v = q_all[:, h * d : (h + 1) * d] / d**0.25, v_all[:, h * d : (h + 1) * d]
        landmarks = []
        for i in range(height // r):
            for j in range(width // r):
                z = np.zeros(d)
                for a in range(r):
                    for b in range(r):
                        z += p.w_landmark[:, :, a, b] @ q[(i * r + a) * width + j * r + b]
                z = (z - z.mean()) / np.sqrt(z.var() + 1e-5) * p.ln_w + p.ln_b
                landmarks.append([t * 0.5 * math.erfc(-t / math.sqrt(2)) for t in z])
        t = np.array(landmarks)
        kernel = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(axis=-1) / 2)
        K = kernel(q, t)
        out = K @ inverse(kernel(t, t)) @ K.T @ v
        for n in range(N):
            for i in range(c):
                for j in range(c):
                    row, col = n // width + i - c // 2, n % width + j - c // 2
                    if 0 <= row < height and 0 <= col < width:
                        out[n] += p.w_local[h, 0, i, j] * v[row * width + col]
        y[:, h * d : (h + 1) * d] = out
    return y @ p.w_out + p.b_out


@given(seeds, st.sampled_from(((4, 4, 2, 3), (5, 3, 2, 1), (3, 4, 3, 5))), st.booleans())
def law_softmax_free_layer_is_its_definition(seed, shape, normalize):
    height, width, r, c = shape
    x = np.random.default_rng(seed).standard_normal((2, height * width, 8))
    p = layer(seed, r=r, c=c)
    options = {"normalize": normalize, "ridge": 0.3, "iters": 40}

    def inverse(A):
        V = np.linalg.inv(A + 0.3 * np.eye(len(A)))
        s = 1 / np.sqrt(A.sum(axis=1))
        return np.diag(s) @ V @ np.diag(s) if normalize else V

    got = soft_layer(x, p, height=height, width=width, num_heads=2, ratio=r, conv_size=c, **options)
    want = np.stack([by_definition(image, p, height, width, 2, r, c, inverse) for image in x])
    # 40 steps square the residual of a matrix of condition below m / 0.3 down to rounding
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * (1 + np.abs(want).max()))


@given(seeds, st.integers(2, 7), st.sampled_from((0.01, 0.1, 1.0)), st.integers(1, 20))
def law_softmax_free_iteration_has_a_closed_form(seed, m, ridge, iters):
    """V_T = P^-1 (I - (I - alpha P^2)^(2^T)), near singular or not."""
    q = 0.3 * np.random.default_rng(seed).standard_normal((m, 2))
    A = gaussian_kernel(q, q)
    p, U = np.linalg.eigh(A + ridge * np.eye(m))
    r = A.sum(axis=1).max()
    alpha = 1.8 / r**2 if 1.8 * (r + ridge) ** 2 < 2 * r**2 else 1.95 / (r + ridge) ** 2
    want = (U * (1 - (1 - alpha * p**2) ** 2.0**iters) / p) @ U.T
    got = newton_inverse(A, iters=iters, ridge=ridge)
    # rounding of P, seen through P^-1 on both sides
    np.testing.assert_allclose(got, want, rtol=0, atol=2**8 * m * EPS * p.max() / p.min() ** 2)


@given(seeds, st.booleans())
def law_softmax_free_residual_is_squared(seed, halving):
    _, q, _ = tokens(seed, m=6)
    A = gaussian_kernel(q, q)[0]
    P = A + 0.01 * np.eye(6)
    start = newton_inverse(A, iters=1, init="halving" if halving else "row_sum")
    norms = [np.linalg.norm(np.eye(6) - P @ V, 2) for V in newton_iterates(P, start, iters=12)]
    for before, after in pairwise(norms):
        assert after <= before**2 + 1e-12 * np.linalg.norm(P, 2) / np.linalg.eigvalsh(P)[0]
    steps = newton_residuals(A, iters=12, init="halving" if halving else "row_sum")
    largest = lambda V: np.abs(np.eye(6) - P @ V).sum(axis=0).max()
    np.testing.assert_allclose(steps[1], largest(start), rtol=1e-9)
    assert steps.shape == (13,)


def law_softmax_free_twenty_steps_invert_what_is_well_conditioned():
    rng = np.random.default_rng(0)
    U, _ = np.linalg.qr(rng.standard_normal((49, 49)))
    A = (U * np.geomspace(1, 0.03, 49)) @ U.T
    P = A + 0.01 * np.eye(49)
    assert np.abs(A).sum(axis=1).max() / np.linalg.eigvalsh(P)[0] <= 250
    want = np.linalg.inv(P)
    assert np.abs(newton_inverse(A) - want).max() <= 1e-9 * np.abs(want).max()
    # 49 landmarks nearly alike: the row sum is 49, the small eigenvalues are 0.01, and are left out
    q = 1e-3 * rng.standard_normal((49, 8))
    alike = gaussian_kernel(q, q)
    got = newton_inverse(alike)
    assert np.linalg.norm(got, 2) < 0.15 / 0.01
    assert newton_residuals(alike)[-1] > 0.8


def law_softmax_free_twins_need_a_ridge():
    """Two landmarks coincide: without a ridge there is no inverse, and no step brings one nearer."""
    _, q, _ = tokens(1, m=4, gain=2.0)
    q[:, 1] = q[:, 0]
    A = gaussian_kernel(q, q)
    assert (newton_residuals(A, ridge=0.0)[-1] > 0.9).all()
    assert (newton_residuals(A, ridge=0.0, normalize=True)[-1] > 0.9).all()
    assert (newton_residuals(A, iters=25)[-1] < 1e-6).all()


def law_softmax_free_one_outlier_slows_the_batch():
    _, q, _ = tokens(2, m=16, gain=3.0)
    q[1] *= 0.01  # all alike: row sums of 16
    A = gaussian_kernel(q, q)
    alone, together = (newton_residuals(A, iters=8, normalize=True, batch_alpha=b) for b in (False, True))
    assert alone[-1, 0] < 1e-6 < together[-1, 0]
    # one matrix is its own batch
    np.testing.assert_array_equal(newton_inverse(A[:1], batch_alpha=True), newton_inverse(A[:1]))


@given(seeds, st.sampled_from((0.1, 1.0, 30.0)))
def law_softmax_free_gram_matrix(seed, gain):
    q, t, _ = tokens(seed, gain=gain)
    A, K = gaussian_kernel(q, q), gaussian_kernel(q, t)
    np.testing.assert_array_equal(A, np.swapaxes(A, -1, -2))
    np.testing.assert_array_equal(np.diagonal(A, axis1=-2, axis2=-1), 1.0)
    assert (A >= 0).all()
    assert (K <= 1).all()
    assert np.linalg.eigvalsh(A).min() >= -1e-10
    direct = np.exp(-((q[:, :, None] - t[:, None]) ** 2).sum(axis=-1))
    # the expansion of the square is off by some eps of the squares, which exp turns into a factor
    np.testing.assert_allclose(
        gaussian_kernel(q, t, scale=2.0), direct, rtol=0, atol=128 * EPS * (1 + gain**2)
    )


@given(seeds)
def law_softmax_free_all_tokens_as_anchors_are_exact(seed):
    """Ratio 1, no ridge, tokens well apart: K K^-1 K v = K v."""
    noise, _, v = tokens(seed, gain=0.1)
    rows, columns = np.divmod(np.arange(12), 3)
    q = noise + 2.5 * np.stack([rows, columns, 0 * rows, 0 * rows], axis=-1)
    same = sample_bottleneck(q, None, None, None, height=4, width=3, ratio=1)
    np.testing.assert_array_equal(same, q)
    A = gaussian_kernel(q, q)
    assert np.linalg.eigvalsh(A).min() > 0.1  # 20 steps are plenty
    y = soft_attention(q, same, v, ridge=0.0)
    np.testing.assert_allclose(y, exact_gaussian_attention(q, v), rtol=0, atol=1e-8)
    s = A.sum(axis=-1, keepdims=True) ** -0.5
    both = s * (A @ (s * v))
    np.testing.assert_allclose(exact_gaussian_attention(q, v, normalize=True), both, rtol=1e-12, atol=1e-12)


@given(seeds, st.booleans())
def law_softmax_free_symmetries_of_attention(seed, normalize):
    q, t, v = tokens(seed)
    rng = np.random.default_rng(seed)
    options = {"normalize": normalize, "ridge": 0.05}
    y = soft_attention(q, t, v, **options)
    moved = soft_attention(q + 2.0, t + 2.0, v, **options)
    # rounding of the kernel, through an inverse of at most 1 / 0.05 in norm
    np.testing.assert_allclose(moved, y, rtol=0, atol=1e-10)
    order = rng.permutation(12)
    shuffled = soft_attention(q[:, order], t, v[:, order], **options)
    np.testing.assert_allclose(shuffled, y[:, order], rtol=0, atol=1e-10)
    w = rng.standard_normal(v.shape)
    sum_ = soft_attention(q, t, 2 * v - 3 * w, **options)
    np.testing.assert_allclose(sum_, 2 * y - 3 * soft_attention(q, t, w, **options), rtol=0, atol=1e-10)
    map_ = soft_attention(q, t, np.broadcast_to(np.eye(12), (2, 12, 12)), **options)  # left to right
    np.testing.assert_allclose(map_ @ v, y, rtol=0, atol=1e-9)


@given(seeds)
def law_softmax_free_exact_normalised_form_has_norm_one(seed):
    q, _, _ = tokens(seed)
    map_ = exact_gaussian_attention(q, np.broadcast_to(np.eye(12), (2, 12, 12)), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(map_, 2, axis=(-2, -1)), 1.0, rtol=0, atol=1e-8)


def law_softmax_free_normalised_form_bears_other_resolutions():
    """A smooth map of tokens at twice the side: the norm of SOFT grows, that of SOFT++ hardly."""
    norms = {}
    for side in (8, 16):
        at = (np.arange(side) + 0.5) / side * np.pi
        a, b = np.meshgrid(at, at, indexing="ij")
        q = 1.5 * np.stack([np.sin(a), np.cos(b), np.sin(a + b), np.cos(a - b)], axis=-1)
        t = q.reshape(side // 2, 2, side // 2, 2, 4).mean(axis=(1, 3)).reshape(-1, 4)
        q = q.reshape(-1, 4)
        for normalize in (False, True):
            map_ = soft_attention(q, t, np.eye(side**2), normalize=normalize)
            norms[side, normalize] = np.linalg.norm(map_, 2)
    assert norms[16, False] > 2.5 * norms[8, False]
    assert norms[16, True] < 1.5 * norms[8, True]


@given(seeds, st.booleans())
def law_softmax_free_attention_gradient(seed, normalize):
    rng = np.random.default_rng(seed)
    q, t, v = tokens(seed)
    dy = rng.standard_normal((2, 12, 3))
    options = {"normalize": normalize, "ridge": 0.3, "iters": 30}
    f = lambda q, t, v: np.sum(dy * soft_attention(q, t, v, **options))
    dq, dt, dv = soft_attention_vjp(q, t, v, dy, **options)
    agrees(dq, lambda z: f(z, t, v), q, rng)
    agrees(dt, lambda z: f(q, z, v), t, rng)
    agrees(dv, lambda z: f(q, t, z), v, rng)


@given(seeds)
def law_softmax_free_closed_form_is_the_gradient_through_all_steps(seed):
    """Differences of the 20 steps against -V^T g V^T; after three steps they are not the same."""
    rng = np.random.default_rng(seed)
    _, t, _ = tokens(seed)
    A, g = gaussian_kernel(t, t), rng.standard_normal((2, 5, 5))
    direction = rng.standard_normal(A.shape)
    direction = direction + np.swapaxes(direction, -1, -2)
    dA = newton_inverse_vjp(newton_inverse(A, ridge=0.3), g)
    agrees(dA, lambda A: np.sum(g * newton_inverse(A, ridge=0.3)), A, direction=direction)
    far = np.sum(newton_inverse_vjp(newton_inverse(A, ridge=0.3, iters=3), g) * direction)
    short = lambda A: np.sum(g * newton_inverse(A, ridge=0.3, iters=3))
    step = (short(A + 1e-5 * direction) - short(A - 1e-5 * direction)) / 2e-5
    assert abs(far - step) > 1e-6 * abs(step)


@given(seeds, st.sampled_from(((4, 4, 2), (5, 3, 2), (3, 2, 1))), st.booleans())
def law_softmax_free_layer_gradient(seed, shape, normalize):
    """Every parameter and x: q counts as query, as key, and in the landmarks."""
    height, width, r = shape
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((2, height * width, 8)), layer(seed, r=r)
    dout = rng.standard_normal(x.shape)
    options = {"height": height, "width": width, "num_heads": 2, "ratio": r, "conv_size": 3}
    options |= {"normalize": normalize, "ridge": 0.3, "iters": 30}
    dx, dp = soft_layer_backward(dout, x, p, **options)
    f = lambda x, p: np.sum(dout * soft_layer(x, p, **options))
    agrees(dx, lambda z: f(z, p), x, rng)
    unread = {"w_landmark", "ln_w", "ln_b"} if r == 1 else set()
    for name, g in dp._asdict().items():
        if name in unread:
            assert g is None
            continue
        at = getattr(p, name)
        agrees(g, lambda z, name=name: f(x, p._replace(**{name: z})), at, rng)


def law_softmax_free_costs_are_counted():
    """Multiply-accumulates of ref; linear in the tokens at a fixed number of landmarks."""
    for n, m, d, heads, iters in ((12, 5, 4, 2, 20), (30, 6, 8, 1, 3)):
        rng, tally = np.random.default_rng(0), Tally()
        q, t, v = (count(tally, rng.standard_normal((heads, rows, d))) for rows in (n, m, n))
        soft_attention(q, t, v, iters=iters)
        cost = soft_cost(n, m, d, heads=heads, iters=iters)
        assert tally.macs == cost.macs
        assert cost.exps == heads * (n * m + m * m)
    per_token = {
        soft_cost(n + 1, 49, 32, heads=2).macs - soft_cost(n, 49, 32, heads=2).macs for n in (196, 784)
    }
    assert per_token == {2 * 3 * 49 * 32}
    newton, all_ = 2 * 20 * 49**3, soft_cost(196, 49, 32, heads=1).macs
    assert newton > all_ / 2  # in the deep stages the inverse is most of the work


def law_softmax_free_network():
    cfg = SoftConfig((8, 8, 16, 8), (1, 1, 1, 1), 4, (4, 2, 1), (3, 3, 1), 4, image_size=32, classes=5)
    rng = np.random.default_rng(0)
    net, img = init_soft(rng, cfg), rng.standard_normal((2, 32, 32, 3))
    logits = soft_forward(img, net, cfg)
    assert logits.shape == (2, 5)
    np.testing.assert_allclose(soft_forward(img[1:], net, cfg)[0], logits[1], rtol=0, atol=1e-12)
    wide = rng.standard_normal((1, 40, 72, 3))  # positions are resized; sides are rounded up
    shapes = [x.shape for x in soft_forward(wide, net, cfg, features=True)]
    assert shapes == [(1, 10, 18, 8), (1, 5, 9, 8), (1, 3, 5, 16), (1, 2, 3, 8)]


def law_softmax_free_positions_follow_the_map():
    """Each axis is resized by itself, and a square map as before."""
    table = np.random.default_rng(0).standard_normal((1, 4, 4, 3))
    tall, wide = (resize_bilinear(table, size) for size in ((6, 4), (4, 9)))
    np.testing.assert_allclose(resize_bilinear(tall, (6, 9)), resize_bilinear(wide, (6, 9)), atol=8 * EPS)
    np.testing.assert_array_equal(resize_bilinear(table, (6, 6)), resize_bilinear(table, 6))
    np.testing.assert_array_equal(resize_bilinear(table, 4), table)


def law_softmax_free_variants_have_their_published_size():
    """Within 3 % of README's table but for "small", whose released sizes make 38.9 M where it says 24 M."""

    class Shape(tuple):
        __rmul__ = lambda self, _: np.broadcast_to(0.0, self)  # takes no memory

    shapes = SimpleNamespace(standard_normal=Shape)
    count_of = lambda cfg: sum(np.size(x) for x in tree_leaves(init_soft(shapes, cfg)))
    millions = {name: count_of(cfg) / 1e6 for name, cfg in VARIANTS.items()}
    for name, published in (("tiny", 13), ("medium", 45), ("large", 64), ("huge", 87)):
        assert abs(millions[name] / published - 1) < 0.03
    assert abs(millions["small"] - 38.86) < 0.01
