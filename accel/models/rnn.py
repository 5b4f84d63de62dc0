"""LSTM and GRU over a sequence in JAX; ref/models/rnn.py defines them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from accel.blocks.shapes import alike, lift
from ref.dims import dims
from ref.models.rnn import GRUParams, LSTMParams, check_rnn, gru_params, init_gru, init_lstm, lstm_params

__all__ = [
    "GRUParams",
    "LSTMParams",
    "gru",
    "gru_cell",
    "gru_params",
    "gru_vjp",
    "init_gru",
    "init_lstm",
    "lstm",
    "lstm_cell",
    "lstm_params",
    "lstm_vjp",
]


@jax.jit
def lstm_cell(x, h, c, params: LSTMParams):
    """(h', c'): c' = f c + i g, h' = o tanh(c'). x [..., Nx], h and c [..., N]."""
    check_rnn(x, h, params.w, params.b, 4)
    i, f, g, o = jnp.split(_affine(x, h, params.w, params.b), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


@jax.jit
def lstm(x, params: LSTMParams, *, h0=None, c0=None):
    """All steps over x [..., T, Nx] -> (hidden [..., T, N], (h, c) after the last)."""
    h, c = (alike(_initial(x, s, params.w.shape[-1] // 4), x, h0, c0, params) for s in (h0, c0))

    def step(state, x):
        state = lstm_cell(x, *state, params)
        return state, state[0]

    state, hidden = lax.scan(step, (h, c), jnp.moveaxis(x, -2, 0))
    return jnp.moveaxis(hidden, 0, -2), state


@jax.jit
def lstm_vjp(x, params: LSTMParams, cotangent, *, h0=None, c0=None):
    """(dx, dparams) for the cotangent [..., T, N] of hidden."""
    return jax.vjp(lambda x, p: lstm(x, p, h0=h0, c0=c0)[0], x, params)[1](cotangent)


@jax.jit
def gru_cell(x, h, params: GRUParams):
    """h' = z h + (1 - z) tanh([x, r h] w_n + b_n). x [..., Nx], h [..., N]."""
    check_rnn(x, h, params.w_rz, params.b_rz, 2)
    check_rnn(x, h, params.w_n, params.b_n, 1)
    r, z = jnp.split(jax.nn.sigmoid(_affine(x, h, params.w_rz, params.b_rz)), 2, axis=-1)
    return z * h + (1 - z) * jnp.tanh(_affine(x, r * h, params.w_n, params.b_n))


@jax.jit
def gru(x, params: GRUParams, *, h0=None):
    """All steps over x [..., T, Nx] -> (hidden [..., T, N], h after the last)."""

    def step(h, x):
        h = gru_cell(x, h, params)
        return h, h

    start = alike(_initial(x, h0, params.w_n.shape[-1]), x, params)
    h, hidden = lax.scan(step, start, jnp.moveaxis(x, -2, 0))
    return jnp.moveaxis(hidden, 0, -2), h


@jax.jit
def gru_vjp(x, params: GRUParams, cotangent, *, h0=None):
    """(dx, dparams) for the cotangent [..., T, N] of hidden."""
    return jax.vjp(partial(_gru_hidden, h0), x, params)[1](cotangent)


def _gru_hidden(h0, x, params):
    return gru(x, params, h0=h0)[0]


def _affine(x, h, w, b):
    y = jnp.concatenate([x, h], axis=-1) @ w
    return y + lift(b, y.ndim)


def _initial(x, state, N):
    if dims(x=(x, "... T Nx"))["T"] < 1:
        raise ValueError("x must have at least one step, got T=0")
    return jnp.zeros((*x.shape[:-2], N), jnp.result_type(x)) if state is None else state
