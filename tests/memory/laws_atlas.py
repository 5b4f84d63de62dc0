"""Laws of ATLAS on ref alone: NumPy and Hypothesis."""

from itertools import product
from math import comb, erf, exp, factorial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.memory.atlas import (
    DeepMemory,
    atlas_layer,
    atlas_layer_vjp,
    atlas_state_bytes,
    deep_memory_scan,
    deep_memory_update,
    dla,
    dot_memory,
    feature_count,
    init_atlas,
    newton_schulz,
    newton_schulz_macs,
    newton_schulz_vjp,
    omega_scan,
    omega_scan_vjp,
    poly_features,
    poly_features_vjp,
    titans_memory,
)
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
COEFS = (3.4445, -4.775, 2.0315)
seeds = st.integers(0, 2**32 - 1)
flags = st.booleans()
gates = ("eta", "alpha", "theta", "gamma")


def case(seed, T=7, D=4, dv=3, window=3):
    """(args, gates, states, tail): keys of length 1 and steps small enough that errors do not grow."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k, v = rng.standard_normal((2, T, D)), rng.standard_normal((2, T, D)), rng.standard_normal((2, T, dv))
    named = {
        "eta": rng.uniform(0, 0.3, (2, T)), "alpha": rng.uniform(0.8, 1, (2, T)),
        "theta": rng.uniform(0, 0.9, (2, T)), "gamma": rng.uniform(0, 1, (2, T)),
    }  # fmt: skip
    states = {"memory0": rng.standard_normal((2, dv, D)), "momentum0": rng.standard_normal((2, dv, D))}
    past = window - 1
    tail = (
        unit(rng.standard_normal((2, past, D))),
        rng.standard_normal((2, past, dv)),
        rng.uniform(0, 1, (2, past)),
    )
    return [q, unit(k), v], named, states, tail


def poly5(x):
    a, b, c = COEFS
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    return x


def by_svd(g):
    """Newton-Schulz through the singular values."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    return u @ np.diag(poly5(s / max(np.sqrt((s**2).sum()), 1e-7))) @ vt


def token_loop(q, k, v, g, window, chunk, muon, inner, after, states, tail):
    """The recurrence of one head, token by token."""
    past = 0
    gamma = np.ones(len(k)) if g["gamma"] is None else g["gamma"]
    if tail is not None:
        past, k, v = len(tail[0]), np.concatenate([tail[0], k]), np.concatenate([tail[1], v])
        gamma = np.concatenate([tail[2], gamma])
    M, S, y = states["memory0"], states["momentum0"], []
    for t in range(len(q)):
        if t % chunk == 0:
            frozen = M
        grad = np.zeros_like(M)
        for i in range(max(0, past + t - window + 1), past + t + 1):
            grad += gamma[i] * np.outer(frozen @ k[i] - v[i], k[i])
        before = M
        S = (g["theta"][t] if g["theta"] is not None else 0) * S + (-g["eta"][t] if inner else 1) * grad
        step = by_svd(S) if muon else S
        M = g["alpha"][t] * M + (step if inner else -g["eta"][t] * step)
        y.append((M if after else before) @ q[t])
    return np.array(y), M, S


def tol(x):
    """Sums of fewer than 16 terms over 7 steps; a quintic step of slope 3.4445^5 = 485 in between."""
    return 7 * 16 * 485 * EPS * (1 + np.abs(x).max(initial=0))


@given(
    seeds, st.integers(1, 9), st.sampled_from((1, 3, 7)), st.tuples(flags, flags, flags, flags, flags, flags)
)
def law_atlas_scan_is_the_token_loop(seed, window, chunk, options):
    muon, inner, after, with_theta, with_gamma, with_tail = options
    args, named, states, tail = case(seed, window=window)
    named["theta"] = named["theta"] if with_theta else None
    named["gamma"] = named["gamma"] if with_gamma else None
    tail = tail if with_tail else None
    y, memory, momentum = omega_scan(
        *args, **named, **states, tail0=tail, window=window, chunk=chunk, muon=muon, return_state=True,
        momentum_lr="inner" if inner else "outer", read="after" if after else "before",
    )  # fmt: skip
    for b in range(2):
        want = token_loop(
            *(x[b] for x in args), {n: None if g is None else g[b] for n, g in named.items()}, window, chunk,
            muon, inner, after, {n: s[b] for n, s in states.items()},
            None if tail is None else [x[b] for x in tail],
        )  # fmt: skip
        # a step of Muon turns the error of the momentum into one larger by 485 every time
        slack = 50 if muon else 1
        for got, x in zip((y[b], memory[b], momentum[b]), want, strict=True):
            np.testing.assert_allclose(got, x, rtol=0, atol=slack * tol(x))


@given(seeds, st.sampled_from((1, 2, 5)), flags)
def law_atlas_carried_state_continues(seed, chunk, muon):
    """Cut at a chunk's border, the scan goes on from memory, momentum and the tokens of the window."""
    args, named, _, tail = case(seed, T=9, window=4)
    cut = 2 * chunk if 2 * chunk < 9 else chunk
    options = {"window": 4, "chunk": chunk, "muon": muon, "return_state": True}
    whole = omega_scan(*args, **named, tail0=tail, **options)
    part = lambda x, s: x[:, s]
    first, second = slice(0, cut), slice(cut, None)
    y1, M, S = omega_scan(*(part(x, first) for x in args), **{n: part(g, first) for n, g in named.items()},
                          tail0=tail, **options)  # fmt: skip
    seen = [
        np.concatenate([old, new[:, :cut]], axis=1)[:, -3:]
        for old, new in zip(tail, (*args[1:], named["gamma"]), strict=True)
    ]
    y2, M, S = omega_scan(*(part(x, second) for x in args), **{n: part(g, second) for n, g in named.items()},
                          tail0=seen, memory0=M, momentum0=S, **options)  # fmt: skip
    for got, want in zip((np.concatenate([y1, y2], axis=1), M, S), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=50 * tol(want))


@given(seeds, st.integers(1, 8))
def law_atlas_step_descends_the_windowed_loss(seed, window):
    """A step without momentum is eta times the slope of the loss, and never raises it below 2 / lambda."""
    (q, k, v), named, states, _ = case(seed)
    memory, one = states["memory0"], np.ones((2, 7))
    run = lambda eta: omega_scan(q, k, v, eta=eta, alpha=one, gamma=named["gamma"], window=window,
                                 memory0=memory, return_state=True)[1]  # fmt: skip
    rows = slice(max(0, 7 - window), 7)

    def loss(M):
        e = M @ np.swapaxes(k[:, rows], 1, 2) - np.swapaxes(v[:, rows], 1, 2)
        return 0.5 * np.sum(named["gamma"][:, None, rows] * e**2)

    last = np.zeros((2, 7))
    last[:, -1] = 0.3
    step = (memory - run(last)) / 0.3
    h = 1e-5
    for at in product(range(2), range(3), range(4)):
        up, down = memory.copy(), memory.copy()
        up[at], down[at] = up[at] + h, down[at] - h
        slope = (loss(up) - loss(down)) / (2 * h)  # exact for a quadratic, but for rounding: eps loss / h
        np.testing.assert_allclose(step[at], slope, rtol=0, atol=16 * EPS * (1 + loss(memory)) / h)
    g = named["gamma"][:, rows, None]
    gram = np.swapaxes(g * k[:, rows], 1, 2) @ k[:, rows]
    top = np.linalg.eigvalsh(gram).max(axis=-1)
    assert np.linalg.eigvalsh(gram).min() >= -16 * EPS * top.max()
    last[:, -1] = np.minimum(1, 1.99 / np.maximum(top, 1e-9))
    assert loss(run(last)) <= loss(memory) * (1 + 1e-12)


@given(seeds)
def law_atlas_frozen_chunk_is_full_batch_descent_only_at_its_last_step(seed):
    (q, k, v), named, states, _ = case(seed)
    M0 = states["memory0"]
    each = np.einsum("bi,biv,bid->bivd", named["gamma"], k @ np.swapaxes(M0, 1, 2) - v, k)
    run = lambda eta: omega_scan(q, k, v, eta=eta, alpha=np.ones((2, 7)), gamma=named["gamma"], window=9,
                                 chunk=7, memory0=M0, return_state=True)[1]  # fmt: skip
    last = np.zeros((2, 7))
    last[:, -1] = 0.1
    np.testing.assert_allclose(run(last), M0 - 0.1 * each.sum(axis=1), rtol=0, atol=tol(each))
    # with a constant step the early tokens count once for every later step
    counts = np.arange(7, 0, -1)[:, None, None]
    want = M0 - 0.1 * (counts * each).sum(axis=1)
    np.testing.assert_allclose(run(np.full((2, 7), 0.1)), want, rtol=0, atol=7 * tol(each))


@given(seeds, st.sampled_from((1, 4)), st.tuples(flags, flags, flags, flags, flags))
def law_atlas_scan_gradients_are_those_of_central_differences(seed, chunk, options):
    muon, inner, after, with_theta, with_gamma = options
    args, named, states, tail = case(seed, T=6)
    named["theta"] = named["theta"] if with_theta else None
    named["gamma"] = named["gamma"] if with_gamma else None
    arrays = dict(zip(("phi_q", "phi_k", "v"), args, strict=True)) | named | states
    inputs = {n: x for n, x in arrays.items() if x is not None}
    modes = {"window": 3, "chunk": chunk, "muon": muon, "tail0": tail, "read": "after" if after else "before",
             "momentum_lr": "inner" if inner else "outer"}  # fmt: skip
    rng = np.random.default_rng(seed)
    w = [rng.standard_normal(s) for s in ((2, 6, 3), (2, 3, 4), (2, 3, 4))]
    fixed = {n: np.clip(x, 0.01, 0.99) if n in gates else x for n, x in inputs.items()}
    rest = dict(fixed)
    first = [rest.pop(n) for n in ("phi_q", "phi_k", "v")]
    grads = omega_scan_vjp(*first, w[0], dmemory=w[1], dmomentum=w[2], **rest, **modes)
    assert (grads.theta is None, grads.gamma is None) == (not with_theta, not with_gamma)
    way = {n: rng.standard_normal(x.shape) for n, x in fixed.items()}

    def moved(h):
        at = {n: x + h * way[n] for n, x in fixed.items()}
        outs = omega_scan(**at, **modes, return_state=True)
        return sum(np.sum(o * c) for o, c in zip(outs, w, strict=True))

    h = 1e-6
    slope, change = slope_of(moved, h)
    got = sum(np.sum(getattr(grads, n) * way[n]) for n in fixed)
    size = sum(np.abs(getattr(grads, n) * way[n]).sum() for n in fixed)
    # what doubling h changes bounds the quotient's truncation; eps |f| / h its rounding, times Muon's slope
    atol = 2 * change + 485 * EPS * (1 + size) / h
    np.testing.assert_allclose(got, slope, rtol=0, atol=atol)


@given(seeds, st.sampled_from(((5, 8), (6, 3), (1, 4), (4, 4))))
def law_atlas_newton_schulz_maps_singular_values(seed, shape):
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((2, *shape))
    x = newton_schulz(g)
    for i in range(2):
        np.testing.assert_allclose(x[i], by_svd(g[i]), rtol=0, atol=1e4 * EPS)  # slope 485, sums of 8
    flip = lambda z: np.swapaxes(z, -1, -2)
    np.testing.assert_allclose(newton_schulz(flip(g)), flip(x), rtol=0, atol=1e4 * EPS)
    np.testing.assert_allclose(newton_schulz(1e3 * g), x, rtol=0, atol=1e4 * EPS)
    np.testing.assert_array_equal(newton_schulz(0 * g), 0 * g)
    q, p = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in shape)
    np.testing.assert_allclose(newton_schulz(q @ g @ p), q @ x @ p, rtol=0, atol=1e4 * EPS)
    s, out = np.linalg.svd(g, compute_uv=False), np.linalg.svd(x, compute_uv=False)
    share = np.sort(s / np.sqrt((s**2).sum(axis=-1, keepdims=True)), axis=-1)
    if (share >= 1.5e-3).all():
        assert ((out > 0.679) & (out < 1.21)).all()
    dx, way, h = rng.standard_normal(g.shape), rng.standard_normal(g.shape), 1e-6
    at = lambda h: np.sum(newton_schulz(g + h * way) * dx)
    slope, change = slope_of(at, h)
    got = np.sum(newton_schulz_vjp(g, dx) * way)
    np.testing.assert_allclose(got, slope, rtol=0, atol=2 * change + 1e5 * EPS / h)


def law_atlas_newton_schulz_has_a_floor():
    """From 1.5e-3 of the norm on, all land in [0.68, 1.21]; one of 64 a hundred times smaller does not."""
    s = np.linspace(1.5e-3, 1, 5000)
    assert 0.679 < poly5(s).min()
    assert poly5(s).max() < 1.21
    values = np.r_[np.ones(63), 0.01]
    least = np.linalg.svd(newton_schulz(np.diag(values)), compute_uv=False).min()
    assert 0.57 < least < 0.59
    assert newton_schulz_macs(64, 64) == newton_schulz_macs(64, 64, steps=1) * 5 == 5 * 3 * 64**3
    assert newton_schulz_macs(2, 7) == newton_schulz_macs(7, 2) == 5 * (2 * 4 * 7 + 8)


@given(seeds, st.integers(1, 4), st.integers(1, 4), flags)
def law_atlas_features_are_the_kernel(seed, d, degree, learned):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 5, d))
    coefs = rng.random(degree + 1) if learned else None
    a = coefs if learned else [1 / factorial(i) for i in range(degree + 1)]
    phi = [poly_features(z, degree=degree, coefs=coefs) for z in (x, y)]
    assert phi[0].shape == (5, comb(d + degree, degree)) == (5, feature_count(d, degree))
    want = sum(a[i] * np.sum(x * y, axis=-1) ** i for i in range(degree + 1))
    size = sum(a[i] * np.sum(np.abs(x * y), axis=-1) ** i for i in range(degree + 1))
    np.testing.assert_allclose((phi[0] * phi[1]).sum(axis=-1), want, rtol=0, atol=256 * EPS * size.max())
    for mode in ("monomial", "elementwise", "identity"):
        options = {"degree": degree, "mode": mode}
        out = poly_features(x, **options)
        w, way, h = rng.standard_normal(out.shape), rng.standard_normal(x.shape), 1e-5
        at = lambda h, w=w, way=way, o=options: np.sum(poly_features(x + h * way, **o) * w)
        slope, change = slope_of(at, h)
        got = np.sum(poly_features_vjp(x, w, **options) * way)
        size = 1 + np.abs(out * w).sum()
        np.testing.assert_allclose(got, slope, rtol=0, atol=2 * change + 64 * EPS * size / h)
    np.testing.assert_array_equal(poly_features(x, mode="identity"), x)
    powers = [x[..., 0] ** i for i in range(1, degree + 1)]
    np.testing.assert_allclose(
        poly_features(x, degree=degree, mode="elementwise")[..., 0], sum(powers), rtol=0,
        atol=16 * EPS * np.abs(powers).sum(axis=0).max(),
    )  # fmt: skip


@given(seeds, st.sampled_from((1, 2, 3)))
def law_atlas_capacity_is_the_number_of_features(seed, degree):
    """n keys are independent up to D; of keys of length 1 only up to C(d+p-1, p) + C(d+p-2, p-1)."""
    rng, d = np.random.default_rng(seed), 3
    D, capped = feature_count(d, degree), comb(d + degree - 1, degree) + comb(d + degree - 2, degree - 1)
    x = rng.standard_normal((D + 6, d))
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for n in (2, D - 1, D, D + 6):
        assert np.linalg.matrix_rank(poly_features(x[:n], degree=degree), tol=1e-9) == min(n, D)
        assert np.linalg.matrix_rank(poly_features(unit[:n], degree=degree), tol=1e-9) == min(n, capped)
    values = rng.standard_normal((D + 6, 2))
    for n, fits in ((D, True), (D + 6, False)):
        phi = poly_features(x[:n], degree=degree)
        best = np.linalg.lstsq(phi, values[:n], rcond=None)[0]
        error = np.abs(phi @ best - values[:n]).max()
        # solved to eps times the condition number of phi
        assert (error <= 1e3 * EPS * np.linalg.cond(phi) * np.abs(values).max()) == fits


@given(seeds)
def law_atlas_features_tend_to_the_exponential(seed):
    x, y = np.random.default_rng(seed).standard_normal((2, 3))
    z = abs(x @ y)
    for degree in (2, 6, 12):
        got = poly_features(x, degree=degree) @ poly_features(y, degree=degree)
        tail = z ** (degree + 1) / factorial(degree + 1) * exp(z)
        rounding = 1e3 * EPS * exp(np.linalg.norm(x) * np.linalg.norm(y))
        assert abs(got - exp(x @ y)) <= tail + rounding


@given(seeds)
def law_atlas_special_cases_reduce(seed):
    (q, k, v), named, states, _ = case(seed)
    eta, alpha, theta = (named[n] for n in ("eta", "alpha", "theta"))
    y = titans_memory(q, k, v, eta=eta, alpha=alpha, theta=theta, memory0=states["memory0"])
    seen = np.tril(np.ones((7, 7)))
    linear = np.einsum("bti,biv->btv", seen * np.einsum("btd,bid->bti", q, k), v)
    np.testing.assert_allclose(dla(q, k, v), linear, rtol=0, atol=tol(linear))
    kernel = np.exp(np.einsum("btd,bid->bti", q, k))
    numerators = np.einsum("bti,biv->btv", seen * kernel, v)
    got = dot_memory(q, k, v, window=1, loss="dot")
    np.testing.assert_allclose(got, numerators, rtol=0, atol=tol(numerators))
    for b in range(2):
        M, S = states["memory0"][b], 0.0
        for t in range(7):  # Titans: forget rate 1 - alpha, one token, the step inside
            S = theta[b, t] * S - eta[b, t] * np.outer(M @ k[b, t] - v[b, t], k[b, t])
            M = M - (1 - alpha[b, t]) * M + S
            np.testing.assert_allclose(y[b, t], M @ q[b, t], rtol=0, atol=tol(M))


@given(seeds, st.sampled_from((1, 3, 7)))
def law_atlas_kernel_memory_is_the_scan_on_its_series(seed, window):
    """`dot_memory` against the scan on Taylor features of degree 12, whose tail for |x.y| <= 1 is e / 13!."""
    (q, k, v), named, _, _ = case(seed, D=2)
    q = q / np.maximum(1, np.linalg.norm(q, axis=-1, keepdims=True))
    eta = named["eta"] / 4  # |phi|^2 = e
    got = dot_memory(q, k, v, window=window, eta=eta)
    phi = [poly_features(x, degree=12) for x in (q, k)]
    want = omega_scan(*phi, v, eta=eta, alpha=np.ones((2, 7)), window=window)
    tail = exp(1) / factorial(13)
    np.testing.assert_allclose(got, want, rtol=0, atol=49 * tail * (1 + np.abs(v).max()) ** 2 + tol(want))
    one = dot_memory(k, k, v, window=1)
    # stored exactly
    np.testing.assert_allclose(one, v, rtol=0, atol=64 * 7 * EPS * np.abs(v).max() * exp(1) * 7)


def deep_case(seed, T=6, dk=3, dv=2, hidden=4):
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    W = DeepMemory(draw((2, dk, hidden)), draw((2, hidden, dv)))
    return rng, [draw((2, T, dk)), draw((2, T, dv)), W], draw((2, T, dk)), 0.1 * rng.random((2, T))


def gelu(z):
    return 0.5 * z * (1 + np.vectorize(erf)(z / np.sqrt(2)))


def deep_loss(W, k, v, weight, loss):
    z = k @ W.w_in
    e = gelu(z) @ W.w_out - v
    each = 0.5 * (e**2).sum(axis=-1) if loss == "l2" else (e**2).mean(axis=-1)
    return np.sum(weight * each)


@given(seeds, st.sampled_from(("l2", "mse")), st.sampled_from((1, 3)), st.integers(1, 4), flags)
def law_atlas_deep_memory_follows_the_slope_of_its_loss(seed, loss, chunk, window, muon):
    rng, (k, v, W), q, lr = deep_case(seed)
    n = 6 // chunk
    rates = {
        "lr": lr,
        "decay": rng.random((2, n)),
        "momentum": rng.random((2, n)),
        "chunk": chunk,
        "muon": muon,
    }
    y, weights = deep_memory_scan(q, k, v, W, **rates, loss=loss, window=window)
    S = [np.zeros_like(w) for w in W]
    for j in range(n):
        weight = np.zeros((2, 6))
        for t in range(j * chunk, (j + 1) * chunk):
            for i in range(max(0, t - window + 1), t + 1):
                weight[:, i] += lr[:, t]
        new = []
        for m in range(2):
            grad, h = np.zeros_like(W[m]), 1e-5
            for at in np.ndindex(grad.shape):
                up, down = ([w.copy() for w in W] for _ in range(2))
                up[m][at] += h
                down[m][at] -= h
                grad[at] = (deep_loss(DeepMemory(*up), k, v, weight, loss)
                            - deep_loss(DeepMemory(*down), k, v, weight, loss)) / (2 * h)  # fmt: skip
            S[m] = rates["momentum"][:, j, None, None] * S[m] - grad
            step = np.stack([by_svd(s) for s in S[m]]) if muon else S[m]
            new.append((1 - rates["decay"][:, j, None, None]) * W[m] + step)
        # a difference quotient is good to h^2 and eps / h; Muon passes on 485 times that over the norm of S
        slack = 1e-8 * (1 + max(np.abs(w).max() for w in new)) ** 2
        for m in range(2):
            norm = np.sqrt((S[m] ** 2).sum(axis=(1, 2))).min()
            atol = slack * (1 + 485 / norm if muon else 1)
            np.testing.assert_allclose(weights[m][:, j], new[m], rtol=0, atol=atol)
        W = DeepMemory(weights.w_in[:, j], weights.w_out[:, j])  # errors do not add up
        S = list(S)
        rows = slice(j * chunk, (j + 1) * chunk)
        z = q[:, rows] @ W.w_in
        want = gelu(z) @ W.w_out
        np.testing.assert_allclose(y[:, rows], want, rtol=0, atol=tol(want))


@given(seeds)
def law_atlas_deep_memory_read_before_sees_no_later_token(seed):
    rng, (k, v, W), q, lr = deep_case(seed)
    rates = {"decay": rng.random((2, 2)), "momentum": rng.random((2, 2)), "chunk": 3}
    before, weights = deep_memory_scan(q, k, v, W, lr=lr, **rates, read="before")
    k2 = k.copy()
    k2[:, 3:] += 1.0
    again, _ = deep_memory_scan(q, k2, v, W, lr=lr, **rates, read="before")
    np.testing.assert_array_equal(before, again)  # the second chunk's tokens are read by no query of it
    plain, momenta = deep_memory_update(k, v, W, lr=lr, **rates)
    np.testing.assert_array_equal(plain.w_in, weights.w_in)
    first, _ = deep_memory_update(k[:, :3], v[:, :3], W, lr=lr[:, :3], decay=rates["decay"][:, :1],
                                  momentum=rates["momentum"][:, :1], chunk=3)  # fmt: skip
    went_on, _ = deep_memory_update(
        k[:, 3:], v[:, 3:], DeepMemory(*(w[:, 0] for w in first)), lr=lr[:, 3:], decay=rates["decay"][:, 1:],
        momentum=rates["momentum"][:, 1:], chunk=3, momentum0=DeepMemory(*(s[:, 0] for s in momenta)),
    )  # fmt: skip
    np.testing.assert_array_equal(went_on.w_out[:, 0], plain.w_out[:, 1])


@given(seeds, flags)
def law_atlas_layer_carries_a_state_of_fixed_size(seed, muon):
    rng = np.random.default_rng(seed)
    params, x = init_atlas(rng, 8, heads=2), rng.standard_normal((2, 12, 8))
    options = {"heads": 2, "window": 3, "chunk": 4, "muon": muon}
    whole, state = atlas_layer(x, params, **options)
    first, between = atlas_layer(x[:, :8], params, **options)
    second, after = atlas_layer(x[:, 8:], params, state=between, **options)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=0, atol=1e3 * tol(whole))
    leaves = lambda s: [*s[:5], *s.conv]
    for got, want, early in zip(leaves(after), leaves(state), leaves(between), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e3 * tol(want))
        assert early.shape == want.shape
    size = atlas_state_bytes(4, 4, degree=2, window=3, dtype_bytes=8)
    assert sum(a.nbytes for a in leaves(state)) == 2 * 2 * size
    x2 = x.copy()
    x2[:, 7:] += 1
    np.testing.assert_array_equal(atlas_layer(x2, params, **options)[0][:, :4], whole[:, :4])
    np.testing.assert_allclose(
        atlas_layer(x2, params, **options)[0][:, :7], whole[:, :7], rtol=0, atol=tol(whole)
    )
    assert atlas_layer(x[:0], params, **options)[0].shape == (0, 12, 8)


@given(seeds, flags)
def law_atlas_layer_gradients_are_those_of_central_differences(seed, carried):
    rng = np.random.default_rng(seed)
    params, x, w = init_atlas(rng, 4, heads=2), rng.standard_normal((2, 7, 4)), rng.standard_normal((2, 7, 4))
    options = {"heads": 2, "window": 3, "chunk": 3, "muon": bool(seed % 2)}
    state = atlas_layer(rng.standard_normal((2, 6, 4)), params, **options)[1] if carried else None
    grads = atlas_layer_vjp(x, params, w, state=state, **options)
    way = tuple(rng.standard_normal(z.shape) for z in (x, *params))

    def at(h):
        moved = [z + h * d for z, d in zip((x, *params), way, strict=True)]
        return np.sum(w * atlas_layer(moved[0], type(params)(*moved[1:]), state=state, **options)[0])

    h = 1e-6
    slope, change = slope_of(at, h)
    got = sum(np.sum(a * b) for a, b in zip((grads[0], *grads[1]), way, strict=True))
    # doubling h bounds truncation; eps |f| / h is rounding, which Muon and the norm of a small read magnify
    atol = 2 * change + 485 * EPS * (1 + np.abs(w).sum()) / h
    np.testing.assert_allclose(got, slope, rtol=0, atol=atol)


def law_atlas_layer_learns_from_its_gradients():
    """Fit a target sequence: 20 steps of descent through the training inside halve the loss."""
    rng = np.random.default_rng(0)
    params, x, target = (
        init_atlas(rng, 8, heads=2),
        rng.standard_normal((2, 12, 8)),
        rng.standard_normal((2, 12, 8)),
    )
    losses = []
    for _ in range(20):
        y, _ = atlas_layer(x, params, heads=2, window=4, chunk=4)
        losses.append(np.mean((y - target) ** 2))
        grads = atlas_layer_vjp(x, params, 2 * (y - target) / y.size, heads=2, window=4, chunk=4)[1]
        params = type(params)(*(p - 1.0 * g for p, g in zip(params, grads, strict=True)))
    assert losses[-1] < losses[0] / 2, losses


def law_atlas_long_text_keeps_the_state_small():
    """2^14 tokens through one head: the state keeps the bytes it had, and all numbers are finite."""
    params = init_atlas(0, 4, heads=1)
    x = np.random.default_rng(0).standard_normal((1, 2**14, 4))
    state = None
    sizes = set()
    for part in np.split(x, 4, axis=1):
        y, state = atlas_layer(part, params, heads=1, window=4, state=state)
        sizes.add(sum(a.nbytes for a in [*state[:5], *state.conv]))
        assert np.isfinite(y).all()
    assert sizes == {atlas_state_bytes(4, 4, degree=2, window=4, dtype_bytes=8)}


def law_atlas_muon_bounds_the_memory_where_plain_steps_of_a_chunk_run_away():
    """Steps of norm at most 1.21 keep |M| <= 1.21 eta / (1 - alpha); 64 plain steps at once overshoot."""
    (q, k, v), _, _, _ = case(0, T=512)
    gates = {
        "eta": np.full((2, 512), 0.02),
        "alpha": np.full((2, 512), 0.98),
        "theta": np.full((2, 512), 0.9),
    }
    last = lambda **o: omega_scan(q, k, v, **gates, window=8, return_state=True, **o)[1]
    top = lambda M: np.linalg.svd(M, compute_uv=False).max()
    assert top(last(chunk=64, muon=True)) <= 1.21 * 0.02 / 0.02
    assert top(last(chunk=64)) > 1e6
    assert top(last(chunk=1)) < 10


def law_atlas_wider_windows_hold_more_of_correlated_keys():
    """The last 16 pairs, recalled after one pass of correlated keys: the error falls with the window."""
    rng = np.random.default_rng(0)
    T, D = 128, 32
    k = rng.standard_normal((8, T, D))
    for t in range(1, T):
        k[:, t] = 0.9 * k[:, t - 1] + np.sqrt(1 - 0.81) * k[:, t]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, one = rng.standard_normal((8, T, 4)), np.ones((8, T))
    errors = []
    for window in (1, 4, 16):
        M = omega_scan(k, k, v, eta=0.9 / window * one, alpha=one, window=window, return_state=True)[1]
        e = M @ np.swapaxes(k, 1, 2) - np.swapaxes(v, 1, 2)
        errors.append(np.sqrt(np.mean(e[..., -16:] ** 2)))
    assert errors[0] > errors[1] > errors[2], errors
