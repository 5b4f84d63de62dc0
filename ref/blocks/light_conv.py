"""Lightweight convolution: a short kernel of softmax weights, shared by a head of channels.

Source: Wu et al. 2019 (arXiv 1901.10430), equations 3 to 5.
"""

import numpy as np

from ref.blocks.softmax import softmax, softmax_vjp
from ref.dims import dims, float64


def light_conv(u, kernel, *, causal=False):
    """z[t, ch] = sum_j softmax(w)[head(ch), j] u[t + j - k // 2, ch], zeros outside; causal: t + j - (k - 1).

    Args: u [..., L, C]; kernel [c, k], c heads of C / c neighbouring channels, or [..., L, c, k]: one for
      every token (the dynamic form). k is odd unless causal.
    Returns: [..., L, C]. Raises: ValueError for an even kernel, or heads that do not divide C.
    """
    windows, w = _windows(u, kernel, causal)
    return (windows[..., None, :] @ w[..., None])[..., 0, 0]


def light_conv_vjp(u, kernel, dz, *, causal=False):
    """(du, dkernel) of `light_conv` for dz [..., L, C]."""
    dims(u=(u, "... L C"), dz=(dz, "... L C"))
    windows, w = _windows(u, kernel, causal)
    k, L, left = kernel.shape[-1], u.shape[-2], _left(kernel.shape[-1], causal)
    dwindows, dz = float64(dz)[..., None] * w, float64(dz)
    padded = np.zeros((*u.shape[:-2], L + k - 1, u.shape[-1]))
    for j in range(k):
        padded[..., j : j + L, :] += dwindows[..., j]
    dw = dz[..., None] * windows  # [..., L, C, k]
    dw = dw.reshape(*dw.shape[:-2], kernel.shape[-2], -1, k).sum(axis=-2)  # channels of a head share it
    if kernel.ndim == 2:
        dw = dw.reshape(-1, *kernel.shape).sum(axis=0)
    return padded[..., left : left + L, :], softmax_vjp(softmax(kernel), dw)


def _windows(u, kernel, causal):
    """What every token sees of every channel [..., L, C, k], and the weights [C, k] or [..., L, C, k]."""
    n = dims(u=(u, "... L C"))
    if kernel.ndim == 2:
        n |= dims(kernel=(kernel, "c k"))
    else:
        n |= dims(u=(u, "... L C"), kernel=(kernel, "... L c k"))
    if n["c"] < 1 or n["C"] % n["c"]:
        raise ValueError(f"heads of the kernel must divide the channels, got {n['c']} for {n['C']}")
    if n["k"] < 1 or (n["k"] % 2 == 0 and not causal):
        raise ValueError(f"kernel must be odd unless causal, got {n['k']} taps")
    left, L = _left(n["k"], causal), n["L"]
    pad = [(0, 0)] * len(n["..."]) + [(left, n["k"] - 1 - left), (0, 0)]
    u = np.pad(float64(u), pad)
    windows = np.stack([u[..., j : j + L, :] for j in range(n["k"])], axis=-1)
    return windows, np.repeat(softmax(kernel), n["C"] // n["c"], axis=-2)


def _left(k, causal):
    return k - 1 if causal else k // 2
