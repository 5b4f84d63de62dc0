"""The selective scan and its convolution: two other forms of the recurrence, gradients, bad inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.mlp import silu, softplus
from ref.blocks.scan import causal_conv, causal_conv_vjp, selective_scan, selective_scan_vjp
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
OPTIONS = ("full", "bare", "raw")


def scan_case(seed, T, option="full", lead=(2,), E=3, N=4):
    """(args, kwargs): with skip, gate, bias and state; without any; with step sizes given as they are."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    u, delta, a = draw((*lead, T, E)), draw((*lead, T, E)), -np.exp(draw((E, N)))
    b, c, z = draw((*lead, T, N)), draw((*lead, T, N)), draw((*lead, T, E))
    if option == "full":
        return [u, delta, a, b, c, draw(E), z], {"delta_bias": draw(E), "state0": draw((*lead, E, N))}
    delta = np.abs(delta) + 0.1 if option == "raw" else delta
    return [u, delta, a, b, c, None, None], {"delta_softplus": option != "raw"}


def by_pairs(decay, added):
    """All states of h = decay h + added by recursive doubling: pairs (p, q) compose to (p' p, p' q + q')."""
    p, q, reach = decay.copy(), added.copy(), 1
    while reach < p.shape[-3]:
        late, early = np.s_[..., reach:, :, :], np.s_[..., :-reach, :, :]
        p_new, q_new = p.copy(), q.copy()
        p_new[late], q_new[late] = p[late] * p[early], p[late] * q[early] + q[late]
        p, q, reach = p_new, q_new, 2 * reach
    return q


@given(seeds, st.integers(1, 9), st.sampled_from(OPTIONS))
def test_scan_equals_the_associative_form(seed, T, option):
    (u, delta, a, b, c, d, z), options = scan_case(seed, T, option)
    raw = delta + options.get("delta_bias", 0.0)
    step = raw if option == "raw" else softplus(raw)
    decay = np.exp(step[..., None] * a)
    added = (step * u)[..., None] * b[..., None, :]
    if "state0" in options:
        added[..., 0, :, :] += decay[..., 0, :, :] * options["state0"]
    h = by_pairs(decay, added)
    want = np.sum(h * c[..., None, :], axis=-1) + (0 if d is None else d * u)
    want = want if z is None else want * silu(z)
    y, last = selective_scan(u, delta, a, b, c, d, z, **options, return_state=True)
    # T decays and sums in another order, N products in the readout; entries are of size |want|
    atol = 16 * (T + 4) * EPS * (1 + np.abs(h).max() * (1 + np.abs(c).max()) * (1 + np.abs(want).max()))
    np.testing.assert_allclose(y, want, rtol=0, atol=atol)
    np.testing.assert_allclose(last, h[..., -1, :, :], rtol=0, atol=atol)


@given(seeds, st.integers(0, 6))
def test_scan_split_with_the_state_is_the_same(seed, cut):
    args, options = scan_case(seed, 6)
    y, last = selective_scan(*args, **options, return_state=True)
    sides, state = [], options.pop("state0")
    for part in (np.s_[..., :cut, :], np.s_[..., cut:, :]):
        u, delta, a, b, c, d, z = args
        piece, state = selective_scan(u[part], delta[part], a, b[part], c[part], d, z[part], **options,
                                      state0=state, return_state=True)  # fmt: skip
        sides.append(piece)
    np.testing.assert_array_equal(np.concatenate(sides, axis=-2), y)
    np.testing.assert_array_equal(state, last)


def test_scan_limits_freeze_sum_and_forget():
    (u, _, a, b, c, _, _), _ = scan_case(0, 5)
    state0 = np.random.default_rng(1).standard_normal((2, 3, 4))
    frozen = selective_scan(u, 0 * u, a, b, c, delta_softplus=False, state0=state0, return_state=True)[1]
    np.testing.assert_array_equal(frozen, state0)
    step, ones = np.abs(u), np.ones((2, 5, 1))  # N = 1 and A = 0: a running sum
    y = selective_scan(u, step, np.zeros((3, 1)), ones, ones, delta_softplus=False)
    np.testing.assert_allclose(y, np.cumsum(step * u, axis=-2), rtol=0, atol=8 * EPS * np.abs(u).sum())
    y = selective_scan(u, step, np.full((3, 4), -1e300), b, c, delta_softplus=False)  # no memory
    np.testing.assert_allclose(y, step * u * np.sum(b * c, axis=-1)[..., None], rtol=1e-13, atol=1e-15)
    empty = selective_scan(u[:, :0], u[:, :0], a, b[:, :0], c[:, :0], state0=state0, return_state=True)
    assert empty[0].shape == (2, 0, 3)
    np.testing.assert_array_equal(empty[1], state0)
    assert selective_scan(u[:0], u[:0], a, b[:0], c[:0]).shape == (0, 5, 3)


@given(seeds, st.sampled_from(OPTIONS), st.sampled_from((1, 2, 32)))
def test_scan_gradients_are_central_differences(seed, option, chunk):
    args, options = scan_case(seed, 5, option)
    rng = np.random.default_rng(seed)
    names = ("u", "delta", "a", "b", "c", "d", "z")
    given_ = {n: x for n, x in zip(names, args, strict=True) if x is not None}
    given_ |= {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    flags = {n: x for n, x in options.items() if not isinstance(x, np.ndarray)}
    dy, dstate = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 3, 4))
    directions = {n: rng.standard_normal(x.shape) for n, x in given_.items()}

    def loss(name, move):
        y, last = selective_scan(**{**given_, name: given_[name] + move * directions[name]}, **flags,
                                 return_state=True)  # fmt: skip
        return np.sum(dy * y) + np.sum(dstate * last)

    extra = {n: given_[n] for n in ("delta_bias", "state0") if n in given_}
    got = selective_scan_vjp(*args, dy, **extra, **flags, dstate=dstate, chunk=chunk)
    for name in given_:
        h = 1e-5 if option != "raw" else 1e-6  # step sizes there must stay positive
        slope, change = slope_of(lambda s, name=name: loss(name, s), h)
        size = np.abs(getattr(got, name)).max(initial=1)
        # the difference's own error: truncation, seen by doubling h, and cancellation eps / h
        bound = change + 64 * EPS / h * (size + abs(loss(name, 0)))
        np.testing.assert_allclose(np.sum(getattr(got, name) * directions[name]), slope, rtol=0, atol=bound)
    assert all((getattr(got, n) is None) == (n not in given_) for n in ("d", "z", "delta_bias"))


@given(seeds, st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_scan_convolution_is_its_sum_and_goes_on_from_a_tail(seed, K, cut, bias):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((2, 6, 3)), rng.standard_normal((K, 3))
    b = rng.standard_normal(3) if bias else None
    y = causal_conv(x, w, b)
    for t in range(6):
        want = sum((w[k] * x[:, t - K + 1 + k] for k in range(K) if t - K + 1 + k >= 0), np.zeros((2, 3)))
        np.testing.assert_allclose(y[:, t], want if b is None else want + b, rtol=0, atol=64 * EPS)
    tail = np.concatenate([np.zeros((2, K - 1, 3)), x[:, :cut]], axis=1)[:, cut:]
    np.testing.assert_allclose(causal_conv(x[:, cut:], w, b, tail=tail), y[:, cut:], rtol=0, atol=64 * EPS)
    dy, dirs = rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 6, 3))
    dw_dir, front = rng.standard_normal((K, 3)), rng.standard_normal((2, 2, K - 1, 3))
    dx, dw, db, dtail = causal_conv_vjp(x, w, dy, tail=front[0])
    # the sum is linear in each argument: differences of 1 are exact but for rounding
    f = lambda x=x, w=w, tail=front[0]: np.sum(dy * causal_conv(x, w, np.zeros(3), tail=tail))
    atol = 1024 * EPS * (1 + np.abs(w).max()) * 100
    np.testing.assert_allclose(np.sum(dx * dirs), f(x=x + dirs) - f(), rtol=0, atol=atol)
    np.testing.assert_allclose(np.sum(dw * dw_dir), f(w=w + dw_dir) - f(), rtol=0, atol=atol)
    np.testing.assert_allclose(np.sum(dtail * front[1]), f(tail=front.sum(0)) - f(), rtol=0, atol=atol)
    np.testing.assert_allclose(db, dy.sum(axis=(0, 1)), rtol=0, atol=64 * EPS * np.abs(dy).sum())


U, A, B = np.ones((2, 5, 3)), -np.ones((3, 4)), np.ones((2, 5, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selective_scan(U, U[:, :4], A, B, B), r"delta.shape\[1\] = 4"),
        (lambda: selective_scan(U, U, A.T, B, B), r"a.shape\[0\] = 4"),
        (lambda: selective_scan(U, U, A, B[..., :3], B), r"b.shape\[2\] = 3"),
        (lambda: selective_scan(U, U, A, B, B, np.ones(4)), r"d.shape\[0\] = 4"),
        (lambda: selective_scan(U, U, A, B, B, z=U[:1]), "z.shape"),
        (lambda: selective_scan(U, U, A, B, B, state0=A), "state0.shape"),
        (lambda: selective_scan(U, -U, A, B, B, delta_softplus=False), "delta must not be negative"),
        (lambda: selective_scan(U, U, A[:, :0], B[..., :0], B[..., :0]), "state of N >= 1"),
        (lambda: selective_scan_vjp(U, U, A, B, B, None, None, U, chunk=0), "chunk must be at least 1"),
        (lambda: selective_scan_vjp(U, U, A, B, B, None, None, U[:1]), "dy.shape"),
        (lambda: causal_conv(U, np.ones((4, 2))), r"w.shape\[1\] = 2"),
        (lambda: causal_conv(U, np.ones((0, 3))), "at least one tap"),
        (lambda: causal_conv(U, np.ones((4, 3)), tail=U[:, :2]), r"tail.shape\[1\] = 2, but must be 3"),
    ],
    ids=[
        "delta",
        "a",
        "b",
        "d",
        "z",
        "state",
        "negative",
        "no_state",
        "chunk",
        "dy",
        "taps",
        "no_tap",
        "tail",
    ],
)
def test_scan_rejects_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
