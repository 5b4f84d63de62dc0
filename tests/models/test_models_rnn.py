"""LSTM and GRU: the definitions a step at a time, gradients against slopes, accel against ref."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accel.models import rnn as fast
from ref.models import rnn
from tests.slopes import slope_of

H = 1e-5


def setup(make):
    rng = np.random.default_rng(0)
    params = make(rng, 3, 4)
    return (
        rng.standard_normal((2, 5, 3)),
        type(params)(*(p + 0.2 * rng.standard_normal(p.shape) for p in params)),
        rng,
    )


def test_models_lstm_equals_the_definition():
    x, p, _ = setup(rnn.init_lstm)
    hidden, (h, c) = rnn.lstm(x, p)
    logistic = lambda x: 1 / (1 + np.exp(-x))
    state, cell = np.zeros((2, 4)), np.zeros((2, 4))
    for t in range(5):
        z = x[:, t] @ p.w[:3] + state @ p.w[3:] + p.b
        cell = logistic(z[:, 4:8]) * cell + logistic(z[:, :4]) * np.tanh(z[:, 8:12])
        state = logistic(z[:, 12:]) * np.tanh(cell)
        np.testing.assert_allclose(hidden[:, t], state, rtol=1e-12)
    np.testing.assert_allclose(c, cell, rtol=1e-12)
    np.testing.assert_array_equal(h, hidden[:, -1])


def test_models_gru_equals_the_definition():
    x, p, _ = setup(rnn.init_gru)
    hidden, h = rnn.gru(x, p)
    state = np.zeros((2, 4))
    for t in range(5):
        gates = 1 / (1 + np.exp(-(x[:, t] @ p.w_rz[:3] + state @ p.w_rz[3:] + p.b_rz)))
        r, z = gates[:, :4], gates[:, 4:]
        n = np.tanh(x[:, t] @ p.w_n[:3] + (r * state) @ p.w_n[3:] + p.b_n)
        state = z * state + (1 - z) * n
        np.testing.assert_allclose(hidden[:, t], state, rtol=1e-12)
    np.testing.assert_array_equal(h, hidden[:, -1])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_models_rnn_gradients_are_central_differences(name):
    forward, backward = getattr(rnn, name), getattr(rnn, f"{name}_vjp")
    x, p, rng = setup(getattr(rnn, f"init_{name}"))
    states = {"h0": rng.standard_normal((2, 4))}
    if name == "lstm":
        states["c0"] = rng.standard_normal((2, 4))
    cotangent = rng.standard_normal((2, 5, 4))
    dx, dp = backward(x, p, cotangent, **states)
    loss = lambda x, p: np.sum(cotangent * forward(x, p, **states)[0])
    probes = [(x, dx, lambda y: loss(y, p))]
    probes += [
        (v, g, lambda y, f=f: loss(x, p._replace(**{f: y}))) for f, v, g in zip(p._fields, p, dp, strict=True)
    ]
    for value, grad, f in probes:
        d = rng.standard_normal(value.shape)
        slope, change = slope_of(lambda h, f=f, value=value, d=d: f(value + h * d), H)
        np.testing.assert_allclose(np.sum(grad * d), slope, rtol=0, atol=2 * change + 1e-8)


def test_models_rnn_reject_bad_shapes_and_count_their_parameters():
    x, p, _ = setup(rnn.init_lstm)
    with pytest.raises(ValueError, match=r"w\.shape\[0\] = 7, but must be 6"):
        rnn.lstm(x[..., :2], p)
    with pytest.raises(ValueError, match=r"w\.shape\[1\]"):
        rnn.gru(x, rnn.init_gru(0, 3, 4)._replace(w_rz=p.w))
    with pytest.raises(ValueError, match="at least one step"):
        rnn.gru(x[:, :0], rnn.init_gru(0, 3, 4))
    assert rnn.lstm_params(3, 4) == sum(v.size for v in p)
    assert rnn.gru_params(3, 4) == sum(v.size for v in rnn.init_gru(0, 3, 4))


def test_models_rnn_accel_matches_ref():
    """Values and gradients of both in float32, with and without a first state."""
    rng = np.random.default_rng(3)
    x, h, c, g = (rng.standard_normal(s) for s in ((2, 5, 3), (2, 4), (2, 4), (2, 5, 4)))
    narrow = lambda tree: jax.tree.map(jnp.float32, tree)
    for name, init, states in (("lstm", rnn.init_lstm, {"h0": h, "c0": c}), ("gru", rnn.init_gru, {"h0": h})):
        params = init(0, 3, 4)
        for given in ({}, states):
            for fn, args in ((name, (x, params)), (f"{name}_vjp", (x, params, g))):
                want = getattr(rnn, fn)(*args, **given)
                got = getattr(fast, fn)(*narrow(args), **narrow(given))
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                    # five steps of products of seven terms, slopes below 1
                    np.testing.assert_allclose(a, b, rtol=0, atol=256 * 2.0**-23 * max(1, np.abs(b).max()))
    with pytest.raises(ValueError, match="at least one step"):
        fast.gru(jnp.zeros((2, 0, 3)), narrow(rnn.init_gru(0, 3, 4)))
