"""Pointwise functions and the two feed-forward layers of transformers."""

import math

import numpy as np

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


def softplus(x):
    """log(1 + exp(x)), elementwise, without overflow."""
    x = float64(x)
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def mlp(x, w_fc1, b_fc1, w_fc2, b_fc2, *, activation=gelu):
    """activation(x w_fc1 + b_fc1) w_fc2 + b_fc2. x [..., C], w_fc1 [C, F], w_fc2 [F, C]."""
    return activation(float64(x) @ w_fc1 + b_fc1) @ w_fc2 + b_fc2


def swiglu(x, w_gate, w_up, w_down):
    """(silu(x w_gate) * (x w_up)) w_down (Shazeer 2020). x [..., C], w_gate, w_up [C, F], w_down [F, C]."""
    x = float64(x)
    return (silu(x @ w_gate) * (x @ w_up)) @ w_down
