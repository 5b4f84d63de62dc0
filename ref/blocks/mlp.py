"""Pointwise functions and the two feed-forward layers of transformers."""

import math

import numpy as np

from ref.checks import one_of
from ref.dims import float64

_erf = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has no erf; the C library's is correct to an ulp


def erf(x):
    """The error function, elementwise, float64."""
    return _erf(x) if np.size(x) else np.zeros(np.shape(x))


def gelu(x, *, approximate=False):
    """x Phi(x); with approximate the tanh form 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    x = float64(x)
    if approximate:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def gelu_grad(x, *, approximate=False):
    """d gelu / dx, elementwise: Phi(x) + x phi(x) in the exact form."""
    x = float64(x)
    if approximate:
        c = np.sqrt(2 / np.pi)
        t = np.tanh(c * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def sigmoid(x):
    """1 / (1 + exp(-x)), elementwise, without overflow."""
    x = float64(x)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def silu(x):
    """x sigmoid(x), elementwise."""
    return float64(x) * sigmoid(x)


def silu_grad(x):
    """d silu / dx = sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def quick_gelu(x):
    """x sigmoid(1.702 x): a cheap form of gelu, elementwise."""
    return float64(x) * sigmoid(1.702 * float64(x))


def quick_gelu_grad(x):
    """d quick_gelu / dx = s (1 + 1.702 x (1 - s)), s = sigmoid(1.702 x)."""
    x = 1.702 * float64(x)
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def softplus(x):
    """log(1 + exp(x)), elementwise, without overflow."""
    x = float64(x)
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def relu(x):
    """max(x, 0), elementwise."""
    return np.maximum(float64(x), 0)


# name -> (function, derivative)
ACTIVATIONS = {
    "gelu": (gelu, gelu_grad),
    "gelu_tanh": (lambda x: gelu(x, approximate=True), lambda x: gelu_grad(x, approximate=True)),
    "quick_gelu": (quick_gelu, quick_gelu_grad),
    "relu": (relu, lambda x: (float64(x) > 0).astype(np.float64)),
    "silu": (silu, silu_grad),
}


def activation_pair(name):
    """(function, derivative) of an activation. Raises: ValueError listing the names."""
    one_of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def linear(x, w, b=None):
    """x w + b: x [..., C], w [C, F], b [F] or None."""
    y = float64(x) @ w
    return y if b is None else y + b


def linear_vjp(x, w, dy, *, bias=True):
    """(dx, dw, db) of `linear` for dy [..., F]; db is None without a bias."""
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ np.swapaxes(w, -1, -2), rows.T @ drows, drows.sum(axis=0) if bias else None


def mlp(x, w_fc1, b_fc1, w_fc2, b_fc2, *, activation="gelu"):
    """activation(x w_fc1 + b_fc1) w_fc2 + b_fc2. x [..., C], w_fc1 [C, F], w_fc2 [F, C]."""
    f, _ = activation_pair(activation)
    return linear(f(linear(x, w_fc1, b_fc1)), w_fc2, b_fc2)


def mlp_vjp(x, w_fc1, b_fc1, w_fc2, b_fc2, dy, *, activation="gelu"):
    """(dx, dw_fc1, db_fc1, dw_fc2, db_fc2) of `mlp`, the hidden layer recomputed."""
    f, df = activation_pair(activation)
    h = linear(x, w_fc1, b_fc1)
    da, dw_fc2, db_fc2 = linear_vjp(f(h), w_fc2, dy, bias=b_fc2 is not None)
    dx, dw_fc1, db_fc1 = linear_vjp(float64(x), w_fc1, da * df(h), bias=b_fc1 is not None)
    return dx, dw_fc1, db_fc1, dw_fc2, db_fc2


def swiglu(x, w_gate, w_up, w_down):
    """(silu(x w_gate) * (x w_up)) w_down (Shazeer 2020). x [..., C], w_gate, w_up [C, F], w_down [F, C]."""
    x = float64(x)
    return (silu(x @ w_gate) * (x @ w_up)) @ w_down


def swiglu_vjp(x, w_gate, w_up, w_down, dy):
    """(dx, dw_gate, dw_up, dw_down) of `swiglu` for dy [..., C]."""
    x = float64(x)
    gate, up = x @ w_gate, x @ w_up
    dh, dw_down, _ = linear_vjp(silu(gate) * up, w_down, dy, bias=False)
    dx_gate, dw_gate, _ = linear_vjp(x, w_gate, dh * up * silu_grad(gate), bias=False)
    dx_up, dw_up, _ = linear_vjp(x, w_up, dh * silu(gate), bias=False)
    return dx_gate + dx_up, dw_gate, dw_up, dw_down
