"""LSTM and GRU over a sequence, with their backward passes: the rivals every new recurrent cell must beat.

Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; Cho et al. 2014 (GRU, the
reset gate before the product, one bias a gate). Weights [in, out], the rows of x before those of h.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear, linear_vjp, sigmoid
from ref.dims import dims, float64


class LSTMParams(NamedTuple):
    """w [Nx+N, 4N], b [4N]: input, forget, candidate and output, in this order."""

    w: np.ndarray
    b: np.ndarray


class GRUParams(NamedTuple):
    """w_rz [Nx+N, 2N], b_rz [2N]: reset and update gate; w_n [Nx+N, N], b_n [N]: the candidate."""

    w_rz: np.ndarray
    b_rz: np.ndarray
    w_n: np.ndarray
    b_n: np.ndarray


def lstm_cell(x, h, c, params: LSTMParams):
    """(h', c'): c' = f c + i g, h' = o tanh(c'). x [..., Nx], h and c [..., N]."""
    check_rnn(x, h, params.w, params.b, 4)
    i, f, g, o = _lstm_gates(*float64(x, h), params)
    c = f * float64(c) + i * g
    return o * np.tanh(c), c


def lstm(x, params: LSTMParams, *, h0=None, c0=None):
    """All steps over x [..., T, Nx] -> (hidden [..., T, N], (h, c) after the last); h0, c0 are 0 if None."""
    hidden, cells = _lstm_states(x, params, h0, c0)
    return hidden, (hidden[..., -1, :], cells[..., -1, :])


def lstm_vjp(x, params: LSTMParams, cotangent, *, h0=None, c0=None):
    """(dx, dparams) for the cotangent [..., T, N] of hidden, by back-propagation through time."""
    hidden, cells = _lstm_states(x, params, h0, c0)
    x, before = _inputs(x, hidden, h0)
    cells_before = np.concatenate([_initial(x, c0, hidden)[..., None, :], cells[..., :-1, :]], axis=-2)
    dz = np.zeros((*hidden.shape[:-1], params.w.shape[-1]))
    w_h, dh, dc = params.w[x.shape[-1] :], 0.0, 0.0
    for t in reversed(range(x.shape[-2])):
        i, f, g, o = _lstm_gates(x[..., t, :], before[..., t, :], params)
        squashed = np.tanh(cells[..., t, :])
        dh = dh + cotangent[..., t, :]
        dc = dc + dh * o * (1 - squashed**2)
        parts = dc * g * i * (1 - i), dc * cells_before[..., t, :] * f * (1 - f), dc * i * (1 - g**2)
        dz[..., t, :] = np.concatenate([*parts, dh * squashed * o * (1 - o)], axis=-1)
        dc, dh = dc * f, dz[..., t, :] @ w_h.T
    return dz @ params.w[: x.shape[-1]].T, LSTMParams(*_weights_vjp(x, before, dz))


def gru_cell(x, h, params: GRUParams):
    """h' = z h + (1 - z) tanh([x, r h] w_n + b_n). x [..., Nx], h [..., N]."""
    check_rnn(x, h, params.w_rz, params.b_rz, 2)
    check_rnn(x, h, params.w_n, params.b_n, 1)
    x, h = float64(x, h)
    _, z, n = _gru_gates(x, h, params)
    return z * h + (1 - z) * n


def gru(x, params: GRUParams, *, h0=None):
    """All steps over x [..., T, Nx] -> (hidden [..., T, N], h after the last); h0 is 0 if None."""
    x, h = _start(x, params.w_n, h0)
    hidden = np.empty_like(x, shape=(*x.shape[:-1], h.shape[-1]))
    for t in range(x.shape[-2]):
        h = gru_cell(x[..., t, :], h, params)
        hidden[..., t, :] = h
    return hidden, h


def gru_vjp(x, params: GRUParams, cotangent, *, h0=None):
    """(dx, dparams) for the cotangent [..., T, N] of hidden, by back-propagation through time."""
    hidden, _ = gru(x, params, h0=h0)
    x, before = _inputs(x, hidden, h0)
    n_x = x.shape[-1]
    d_rz = np.zeros((*hidden.shape[:-1], 2 * hidden.shape[-1]))
    d_n, reset = np.zeros_like(hidden), np.zeros_like(hidden)
    dh = 0.0
    for t in reversed(range(x.shape[-2])):
        h = before[..., t, :]
        r, z, n = _gru_gates(x[..., t, :], h, params)
        dh = dh + cotangent[..., t, :]
        reset[..., t, :] = r * h
        d_n[..., t, :] = dh * (1 - z) * (1 - n**2)
        d_reset = d_n[..., t, :] @ params.w_n[n_x:].T
        d_rz[..., t, :] = np.concatenate([d_reset * h * r * (1 - r), dh * (h - n) * z * (1 - z)], axis=-1)
        dh = dh * z + d_reset * r + d_rz[..., t, :] @ params.w_rz[n_x:].T
    dx = d_n @ params.w_n[:n_x].T + d_rz @ params.w_rz[:n_x].T
    return dx, GRUParams(*_weights_vjp(x, before, d_rz), *_weights_vjp(x, reset, d_n))


def gru_reset_after_cell(x, h, w_ih, w_hh, b_ih, b_hh):
    """h' = (1 - z) n + z h, n = tanh(x w_n + b_n + r (h u_n + c_n)): the reset gate behind the product.

    Args: x [..., Nx], h [..., N]; w_ih [Nx, 3N], w_hh [N, 3N], b_ih, b_hh [3N], columns r, z, n. This is the
      cell of cuDNN and PyTorch, two biases a gate.
    """
    check_rnn(x, h, np.concatenate([w_ih, w_hh]), b_ih, 3)
    _, z, n, _ = _reset_after_gates(float64(x), float64(h), w_ih, w_hh, b_ih, b_hh)
    return (1 - z) * n + z * h


def gru_reset_after_cell_vjp(x, h, w_ih, w_hh, b_ih, b_hh, dh):
    """(dx, dh before the step, dw_ih, dw_hh, db_ih, db_hh) for the cotangent dh [..., N] of h'."""
    x, h = float64(x, h)
    r, z, n, from_h = _reset_after_gates(x, h, w_ih, w_hh, b_ih, b_hh)
    d_n = dh * (1 - z) * (1 - n**2)
    d_z = dh * (h - n) * z * (1 - z)
    d_r = d_n * from_h * r * (1 - r)
    to_x, to_h = (np.concatenate([d_r, d_z, d], axis=-1) for d in (d_n, d_n * r))
    dx, dw_ih, db_ih = linear_vjp(x, w_ih, to_x)
    before, dw_hh, db_hh = linear_vjp(h, w_hh, to_h)
    return dx, before + dh * z, dw_ih, dw_hh, db_ih, db_hh


def init_lstm(key, input_size, hidden_size, *, forget_bias=1.0):
    """LSTMParams: uniform in +-1/sqrt(N), biases 0 but the forget gate's. key: NumPy Generator or seed."""
    rng, n = np.random.default_rng(key), hidden_size
    b = np.zeros(4 * n)
    b[n : 2 * n] = forget_bias
    return LSTMParams(_uniform(rng, input_size + n, 4 * n, n), b)


def init_gru(key, input_size, hidden_size):
    """GRUParams: uniform in +-1/sqrt(N), biases 0. key: NumPy Generator or seed."""
    rng, n = np.random.default_rng(key), hidden_size
    rows = input_size + n
    return GRUParams(_uniform(rng, rows, 2 * n, n), np.zeros(2 * n), _uniform(rng, rows, n, n), np.zeros(n))


def lstm_params(input_size, hidden_size):
    """Numbers in `LSTMParams`: 4 (Nx + N) N + 4 N."""
    return 4 * (input_size + hidden_size + 1) * hidden_size


def gru_params(input_size, hidden_size):
    """Numbers in `GRUParams`: 3 (Nx + N) N + 3 N."""
    return 3 * (input_size + hidden_size + 1) * hidden_size


def check_rnn(x, h, w, b, gates):
    """Raises: ValueError if x [..., Nx], h [..., N], w [Nx + N, gates N] and b [gates N] do not fit."""
    n = dims(x=(x, "... Nx"), h=(h, "... N"))
    dims(w=(w, f"{n['Nx'] + n['N']} {gates * n['N']}"), b=(b, f"{gates * n['N']}"))


def _lstm_states(x, params, h0, c0):
    x, h = _start(x, params.w, h0, 4)
    c = _initial(x, c0, h[..., None, :])
    hidden = np.empty_like(x, shape=(*x.shape[:-1], h.shape[-1]))
    cells = np.empty_like(hidden)
    for t in range(x.shape[-2]):
        h, c = lstm_cell(x[..., t, :], h, c, params)
        hidden[..., t, :], cells[..., t, :] = h, c
    return hidden, cells


def _lstm_gates(x, h, params):
    i, f, g, o = np.split(np.concatenate([x, h], axis=-1) @ params.w + params.b, 4, axis=-1)
    return sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)


def _gru_gates(x, h, params):
    rz = sigmoid(np.concatenate([x, h], axis=-1) @ params.w_rz + params.b_rz)
    r, z = np.split(rz, 2, axis=-1)
    return r, z, np.tanh(np.concatenate([x, r * h], axis=-1) @ params.w_n + params.b_n)


def _reset_after_gates(x, h, w_ih, w_hh, b_ih, b_hh):
    """r, z, n, and what n's state part is before the reset gate."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (
        np.split(y, 3, axis=-1) for y in (linear(x, w_ih, b_ih), linear(h, w_hh, b_hh))
    )
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    return r, z, np.tanh(x_n + r * h_n), h_n


def _start(x, w, h0, gates=1):
    """x in float64 and the first state."""
    if dims(x=(x, "... T Nx"))["T"] < 1:
        raise ValueError("x must have at least one step, got T=0")
    x = float64(x)
    return x, _initial(x, h0, np.empty((1, w.shape[-1] // gates)))


def _initial(x, state, like):
    return np.zeros((*x.shape[:-2], like.shape[-1])) if state is None else float64(state)


def _inputs(x, hidden, h0):
    """x in float64, and the state before each step [..., T, N]."""
    x = float64(x)
    return x, np.concatenate([_initial(x, h0, hidden)[..., None, :], hidden[..., :-1, :]], axis=-2)


def _weights_vjp(x, h, dz):
    """(dw, db) of [x, h] w + b, summed over all leading axes."""
    rows = np.concatenate([x, h], axis=-1).reshape(-1, x.shape[-1] + h.shape[-1])
    dz = dz.reshape(-1, dz.shape[-1])
    return rows.T @ dz, dz.sum(axis=0)


def _uniform(rng, rows, columns, n):
    return rng.uniform(-1, 1, (rows, columns)) / np.sqrt(n)
