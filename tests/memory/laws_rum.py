"""Laws of the rotational unit of memory on ref alone: NumPy and Hypothesis, which run in the browser too."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.counting import Tally, count
from ref.memory.rum import (
    ACTIVATIONS,
    RumParams,
    init_rum,
    rotate,
    rotate_vjp,
    rotation_matrix,
    rum,
    rum_cell,
    rum_flops,
    rum_params,
    rum_vjp,
)
from ref.models.rnn import init_lstm, lstm, lstm_params

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def definition(a, b):
    """exp(theta (w u^T - u w^T)) by its power series: u and w orthonormal, theta the angle from a to b."""
    u = a / math.sqrt(math.fsum(a * a))
    q = b - math.fsum(u * b) * u
    q -= math.fsum(u * q) * u
    w = q / math.sqrt(math.fsum(q * q))
    theta = math.atan2(math.fsum(w * b), math.fsum(u * b))
    generator = theta * (np.outer(w, u) - np.outer(u, w))
    term, total = np.eye(len(a)), np.eye(len(a))
    for k in range(1, 40):
        term = term @ generator / k
        total = total + term
    return total


def apart(a, b):
    """1 / sin of the angle between a and b: how much rounding the plane's second vector amplifies."""
    cos = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.max(1 / np.sqrt(np.maximum(1 - cos**2, 1e-12)))


@st.composite
def pairs(draw, lead=()):
    """a, b, v [*lead, N] of very different lengths, ordinary angles or nearly parallel."""
    N, rng = draw(st.integers(2, 9)), np.random.default_rng(draw(seeds))
    a, b, v = rng.standard_normal((3, *lead, N))
    gap = draw(st.sampled_from((None, 1e-2, -1e-2)))
    if gap is not None:
        b = math.copysign(1, gap) * a + abs(gap) * b
    return draw(st.sampled_from((1.0, 1e-4, 1e4))) * a, b, v


@given(pairs())
def law_rum_rotation_equals_the_definition(x):
    a, b, v = x
    want, N = definition(a, b), len(a)
    tol = 64 * N * EPS * apart(a, b)  # sums of N terms, 40 terms of the series, w amplified
    np.testing.assert_allclose(rotation_matrix(a, b), want, rtol=0, atol=tol)
    np.testing.assert_allclose(rotate(a, b, v), want @ v, rtol=0, atol=tol * np.abs(v).sum())


@given(pairs(lead=(3,)), seeds)
def law_rum_rotation_is_one(x, seed):
    """Orthogonal, determinant 1, takes a's direction to b's, inverse R(b, a), blind to positive scales."""
    a, b, v = x
    R, N = rotation_matrix(a, b), a.shape[-1]
    tol = 64 * N * EPS * apart(a, b)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(R @ np.swapaxes(R, -1, -2), np.broadcast_to(np.eye(N), R.shape), atol=tol)
    np.testing.assert_allclose(np.linalg.det(R), 1, atol=N * tol)
    np.testing.assert_allclose(np.linalg.norm(rotate(a, b, v), axis=-1), np.linalg.norm(v, axis=-1), rtol=tol)
    np.testing.assert_allclose(rotate(a, b, unit(a)), unit(b), atol=tol)
    np.testing.assert_allclose(rotation_matrix(b, a), np.swapaxes(R, -1, -2), atol=tol)
    np.testing.assert_allclose(rotation_matrix(3 * a, 0.2 * b), R, atol=tol)
    np.testing.assert_allclose(
        np.trace(R, axis1=-2, axis2=-1), N - 2 + 2 * np.sum(unit(a) * unit(b), -1), atol=N * tol
    )
    basis, _ = np.linalg.qr(np.stack([a, b], axis=-1))
    outside = v - np.squeeze(basis @ (np.swapaxes(basis, -1, -2) @ v[..., None]), -1)
    np.testing.assert_allclose(rotate(a, b, outside), outside, atol=tol * max(1.0, np.abs(v).sum()))


@given(st.floats(-3.1, 3.1), st.floats(-3.1, 3.1), st.floats(0.1, 10.0))
def law_rum_in_two_dimensions_turns_by_the_signed_angle(alpha, beta, length):
    ray = lambda angle: np.array([math.cos(angle), math.sin(angle)])
    theta = math.remainder(beta - alpha, 2 * math.pi)
    if abs(math.sin(theta)) < 1e-5:  # nearly one line: the degenerate law's business
        return
    tol = 32 * EPS / abs(math.sin(theta))
    np.testing.assert_allclose(rotate(length * ray(alpha), ray(beta), ray(0.3)), ray(0.3 + theta), atol=tol)


@given(seeds, st.integers(2, 8))
def law_rum_rotation_of_degenerate_planes(seed, N):
    """Zero or parallel vectors turn nothing, opposite ones turn by pi, and every gradient is finite."""
    a, v, g = np.random.default_rng(seed).standard_normal((3, N))
    for p, q in ((a, a), (a, 2.5 * a), (0 * a, a), (a, 0 * a), (0 * a, 0 * a), (a, a * (1 + 1e-9))):
        np.testing.assert_allclose(rotate(p, q, v), v, atol=8 * EPS * np.abs(v).max())
        da, db, dv = rotate_vjp(p, q, v, g)
        np.testing.assert_array_equal([da, db], np.zeros((2, N)))
        np.testing.assert_allclose(dv, g, atol=8 * EPS * np.abs(g).max())
    R = rotation_matrix(a, -2 * a)
    np.testing.assert_allclose(R @ R.T, np.eye(N), atol=32 * N * EPS)
    np.testing.assert_allclose(R @ a, -a, atol=32 * N * EPS * np.abs(a).max())
    np.testing.assert_allclose([np.linalg.det(R), np.trace(R)], [1, N - 4], atol=64 * N * EPS)
    assert np.isfinite(rotate_vjp(a, -a, v, g)).all()


@st.composite
def networks(draw):
    """(x, params, options) of one sequence: lambda, eta, activation and gate drawn."""
    rng = np.random.default_rng(draw(seeds))
    T, n_x, n = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    params = RumParams(*(p + 0.3 * rng.standard_normal(p.shape) for p in init_rum(rng, n_x, n)))
    options = {
        "lambda_": draw(st.sampled_from((0, 1))),
        "eta": draw(st.sampled_from((None, 0.7))),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "update_gate": draw(st.booleans()),
        "h0": rng.standard_normal((2, n)),
    }
    if options["lambda_"] and draw(st.booleans()):
        options["assoc0"] = rng.standard_normal((2, n, n))
    return rng.standard_normal((2, T, n_x)), params, options


def by_matrices(x, p, *, h0, assoc0=None, lambda_, eta, activation, update_gate):
    """The network with every rotation as a matrix, a sequence and a step at a time."""
    act = {
        "relu": lambda x: np.where(x > 0, x, 0.0),
        "tanh": lambda x: 1 - 2 / (1 + np.exp(2 * x)),
        "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
        "softsign": lambda x: np.sign(x) * (1 - 1 / (1 + np.abs(x))),
    }[activation]
    hidden, last = [], []
    for i in range(len(x)):
        h, A, rows = h0[i], np.eye(h0.shape[-1]) if assoc0 is None else assoc0[i], []
        for x_t in x[i]:
            xh = np.array([*x_t, *h])
            e = p.W_e.T @ x_t + p.b_e
            R = definition(e, p.W_r.T @ xh + p.b_r)
            A = A @ R
            c = act(e + (A if lambda_ else R) @ h)
            g = 1 / (1 + np.exp(-(p.W_u.T @ xh + p.b_u))) if update_gate else 0.0
            h = g * h + (1 - g) * c
            h = h if eta is None or not h.any() else h * (eta / math.sqrt(math.fsum(h * h)))
            rows.append(h)
        hidden.append(rows)
        last.append(A)
    return np.array(hidden), np.array(last)


@given(networks())
def law_rum_equals_the_definition(case):
    x, params, options = case
    hidden, h, A = rum(x, params, **options, return_assoc=True)
    want, want_A = by_matrices(x, params, **options)
    # a plane's rounding may be amplified by the angle, then by every later step: 1e-9 is 10^6 roundings
    np.testing.assert_allclose(hidden, want, rtol=0, atol=1e-9 * max(1.0, np.abs(want).max()))
    np.testing.assert_array_equal(h, hidden[:, -1])
    if options["lambda_"]:
        np.testing.assert_allclose(A, want_A, rtol=0, atol=1e-9 * max(1.0, np.abs(want_A).max()))
    else:
        assert A is None


@given(networks(), st.integers(1, 5))
def law_rum_may_be_split_anywhere(case, at):
    """Carrying (h, A) over a cut changes not one bit."""
    x, params, options = case
    options = {"assoc0": None, **options}
    at = min(at, x.shape[-2])
    whole = rum(x, params, **options, return_assoc=True)
    h, A = options.pop("h0"), options.pop("assoc0")
    parts = []
    for part in (x[:, :at], x[:, at:]):
        if part.shape[-2]:
            hidden, h, A = rum(part, params, h0=h, assoc0=A, **options, return_assoc=True)
            parts.append(hidden)
    np.testing.assert_array_equal(np.concatenate(parts, axis=-2), whole[0])
    np.testing.assert_array_equal(h, whole[1])
    assert options["lambda_"] == 0 or np.array_equal(A, whole[2])


def slopes(f, x, rng, h=1e-6):
    """(direction, slope, its error): central differences with steps h and 2 h."""
    d = rng.standard_normal(x.shape)
    slope, coarse = ((f(x + s * d) - f(x - s * d)) / (2 * s) for s in (h, 2 * h))
    return d, slope, 2 * abs(slope - coarse)


@given(networks(), seeds)
def law_rum_gradient_is_the_slope(case, seed):
    """Back-propagation, its memories recovered by turning back, against central differences."""
    x, params, options = case
    rng = np.random.default_rng(seed)
    options["activation"] = "tanh" if options["activation"] == "relu" else options["activation"]  # no kinks
    cotangent = rng.standard_normal(rum(x, params, **options)[0].shape)
    dx, dparams = rum_vjp(x, params, cotangent, **options)
    loss = lambda x, params: np.sum(cotangent * rum(x, params, **options)[0])
    fields = [n for n in params._fields if options["update_gate"] or n not in ("W_u", "b_u")]
    grads = [dx, *(getattr(dparams, n) for n in fields)]
    probes = [lambda y: loss(y, params)]
    probes += [lambda y, n=n: loss(x, params._replace(**{n: y})) for n in fields]
    for value, f, g in zip([x, *(getattr(params, n) for n in fields)], probes, grads, strict=True):
        d, slope, error = slopes(f, value, rng)
        # cancellation: eps |loss| / h, with |loss| up to the sum of |cotangent|, and a curvature of its own
        np.testing.assert_allclose(
            np.sum(g * d), slope, rtol=1e-5, atol=error + 1e-9 * np.abs(cotangent).sum() + 1e-6
        )
    if not options["update_gate"]:
        assert not dparams.W_u.any()
        assert not dparams.b_u.any()


def law_rum_gradient_passes_relu_and_is_finite_on_a_line():
    """W_e = 0 and b_e = t b_r put the embedding and the target on one line, t = 1, -1 or 0, at every step."""
    rng = np.random.default_rng(0)
    p = init_rum(rng, 3, 4)
    x, h0, weights = (
        rng.standard_normal((2, 5, 3)),
        rng.standard_normal((2, 4)),
        rng.standard_normal((2, 5, 4)),
    )
    for lambda_ in (0, 1):
        loss = lambda x, lambda_=lambda_: np.sum(weights * rum(x, p, h0=h0, lambda_=lambda_)[0])
        dx, _ = rum_vjp(x, p, weights, h0=h0, lambda_=lambda_)
        d, slope, error = slopes(loss, x, rng)
        np.testing.assert_allclose(np.sum(dx * d), slope, rtol=1e-5, atol=error + 1e-8)
        for t in (1.0, -1.0, 0.0):
            line = p._replace(W_e=0 * p.W_e, W_r=0 * p.W_r, b_e=t * p.b_r)
            dx, dp = rum_vjp(x, line, weights, h0=h0, lambda_=lambda_, eta=1.0)
            assert all(np.isfinite(g).all() for g in (dx, *dp))


@given(seeds)
def law_rum_memory_is_the_product_in_time_order(seed):
    """A_T = R_1 R_2 ... R_T, the oldest leftmost, and orthogonal after 1000 steps."""
    rng = np.random.default_rng(seed)
    params = init_rum(rng, 3, 4)
    x = rng.standard_normal((3, 3))
    hidden, _, A = rum(x, params, lambda_=1, return_assoc=True)
    want, h = np.eye(4), np.zeros(4)
    for x_t, after in zip(x, hidden, strict=True):
        target = np.concatenate([x_t, h]) @ params.W_r + params.b_r
        want, h = want @ rotation_matrix(x_t @ params.W_e + params.b_e, target), after
    np.testing.assert_allclose(A, want, atol=1e-12)


def law_rum_memory_stays_orthogonal():
    """1000 steps: each adds at most some N roundings to A A^T - I."""
    params = init_rum(0, 3, 8)
    x = np.random.default_rng(1).standard_normal((1000, 3))
    A = rum(x, params, lambda_=1, eta=1.0, return_assoc=True)[2]
    assert np.abs(A @ A.T - np.eye(8)).max() < 1000 * 16 * EPS


@given(networks())
def law_rum_states_have_length_eta(case):
    x, params, options = case
    hidden, _ = rum(x, params, **{**options, "eta": 1.7})
    lengths = np.linalg.norm(hidden, axis=-1)
    np.testing.assert_allclose(lengths[lengths > 0], 1.7, rtol=16 * EPS)


@given(seeds, st.sampled_from((0, 1)))
def law_rum_gate_closes_and_opens(seed, lambda_):
    """Bias +50 keeps h_0, bias -50 is the cell without a gate: sigmoid(50) is 1 within 2e-22."""
    rng = np.random.default_rng(seed)
    p = init_rum(rng, 3, 5)
    p = p._replace(W_u=0 * p.W_u)
    x, h0 = rng.standard_normal((4, 3)), rng.standard_normal(5)
    run = lambda p, **kw: rum(x, p, h0=h0, lambda_=lambda_, **kw)[0]
    np.testing.assert_allclose(run(p._replace(b_u=p.b_u * 50)), np.tile(h0, (4, 1)), rtol=1e-14, atol=1e-20)
    open_ = run(p._replace(b_u=p.b_u * -50))
    np.testing.assert_allclose(open_, run(p, update_gate=False), rtol=1e-12, atol=1e-18)


@given(seeds)
def law_rum_turns_with_fixed_targets_preserve_the_gradient(seed):
    """The Jacobian of 30 rotations is orthogonal; that of 30 steps of an LSTM is not."""
    rng = np.random.default_rng(seed)
    N, T = 5, 30
    g = start = rng.standard_normal(N)
    for a, b in rng.standard_normal((T, 2, N)):
        g = rotate_vjp(a, b, np.zeros(N), g)[2]
    np.testing.assert_allclose(np.linalg.norm(g), np.linalg.norm(start), rtol=T * 64 * N * EPS)
    params, x, h = init_lstm(rng, 2, N), rng.standard_normal((T, 2)), 1e-3 * start
    moved = lstm(x, params, h0=h)[0][-1] - lstm(x, params, h0=-h)[0][-1]
    assert np.linalg.norm(moved) < 0.5 * np.linalg.norm(2 * h)


def law_rum_real_cell_does_not_preserve_the_gradient():
    """The second exercise: h turns towards itself, so that a change of h moves the target too."""
    eye, zero = np.eye(2), np.zeros(2)
    p = RumParams(np.vstack([0 * eye, eye]), zero, None, None, 0 * eye, np.array([1.0, 0.0]))
    # e = (1, 0), r = h: R turns h by its own angle, doubling it: z = |h| (cos 2 phi, sin 2 phi)
    step = lambda h: rum_cell(zero, h, None, p, activation="tanh", update_gate=False)[0]
    h, d = np.array([math.cos(0.4), math.sin(0.4)]), 1e-6 * np.array([-math.sin(0.4), math.cos(0.4)])
    unsquashed = lambda h: np.arctanh(step(h)) - p.b_e
    stretched = np.linalg.norm(unsquashed(h + d) - unsquashed(h - d)) / np.linalg.norm(2 * d)
    np.testing.assert_allclose(stretched, 2.0, atol=1e-6)


@given(st.integers(1, 7), st.integers(2, 9))
def law_rum_counts(n_x, n):
    """Parameters by counting arrays; multiply-accumulates by an array that counts its products."""
    params = init_rum(0, n_x, n)
    assert sum(p.size for p in params) == rum_params(n_x, n) == 2 * (n_x + n) * n + n_x * n + 3 * n
    assert sum(p.size for p in params if p is not params.W_u and p is not params.b_u) == rum_params(
        n_x, n, update_gate=False
    )
    assert sum(p.size for p in init_lstm(0, n_x, n)) == lstm_params(n_x, n) == 4 * (n_x + n) * n + 4 * n
    for lambda_ in (0, 1):
        tally = Tally()
        x = count(tally, np.random.default_rng(0).standard_normal((3, n_x)))
        rum(x, params, lambda_=lambda_)
        products = 2 * (n_x + n) * n + n_x * n + lambda_ * 3 * n * n
        assert tally.macs == 3 * products
        outer = 4 * n * n * lambda_
        assert rum_flops(n_x, n, lambda_=lambda_) == 2 * products + outer + 21 * n + 8 * n * (1 - lambda_)


def law_rum_exercises_have_the_solutions_of_the_chapter():
    """What the folded solutions print."""
    e, h, d, across = np.array([1.0, 0]), np.array([0.6, 0.8]), 1e-6, np.array([-0.8, 0.6])
    turn = lambda h: rotate(e, h, h)
    slope = np.linalg.norm(turn(h + d * across) - turn(h - d * across)) / (2 * d)
    assert abs(slope - 2) < 1e-6  # rounding eps / d, truncation d^2
    np.testing.assert_allclose(rotate(np.array([1.0, 0]), np.array([0, 2.0]), np.array([3.0, 4])), [-4, 3])
    assert rum_params(10, 100) == 23_300
