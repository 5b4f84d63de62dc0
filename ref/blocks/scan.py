"""The selective scan, a linear recurrence whose step sizes and maps depend on the input, and its convolution.

Source: Gu and Dao 2023 (Mamba, arXiv 2312.00752), Algorithm 2 with the released code's discretisation: the
exponential for A, a plain Euler step for B. Time comes before channels everywhere.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import sigmoid, silu, silu_grad, softplus
from ref.checks import at_least_one
from ref.dims import dims, float64


class ScanGrads(NamedTuple):
    """Gradients of `selective_scan` by argument; None where the argument was None."""

    u: np.ndarray
    delta: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray | None
    z: np.ndarray | None
    delta_bias: np.ndarray | None
    state0: np.ndarray


def selective_scan(u, delta, a, b, c, d=None, z=None, *, delta_bias=None, delta_softplus=True, state0=None,
                   return_state=False):  # fmt: skip
    """h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t, y_t = (C_t . h_t + D u_t) silu(z_t), by channel.

    Args: u, delta, z [..., T, E]; a [E, N], negative where the state is to decay; b, c [..., T, N];
        d, delta_bias [E]; state0 [..., E, N], zero if None. Without d there is no skip, without z no gate.
      delta_softplus: Delta = softplus(delta + delta_bias); else their sum, which must not be negative.
    Returns: y [..., T, E] float64, and with return_state (y, h_T [..., E, N]). T may be 0.
    Raises: ValueError naming the argument at fault.
    """
    lead = check_scan(u, delta, a, b, c, d, z, delta_bias, delta_softplus, state0)
    u, a, b, c = float64(u, a, b, c)
    _, step = _steps(delta, delta_bias, delta_softplus)
    h = np.zeros((*lead, *a.shape)) if state0 is None else float64(state0)
    y = np.zeros_like(u)
    for t in range(u.shape[-2]):
        h = _advance(h, u, step, a, b, t)
        y[..., t, :] = (h @ c[..., t, :, None])[..., 0]
    if d is not None:
        y = y + float64(d) * u
    if z is not None:
        y = y * silu(z)
    return (y, h) if return_state else y


def selective_scan_vjp(u, delta, a, b, c, d, z, dy, *, delta_bias=None, delta_softplus=True, state0=None,
                       dstate=None, chunk=32):  # fmt: skip
    """ScanGrads of `selective_scan` for the cotangents dy [..., T, E] and dstate [..., E, N] (None: 0).

    The adjoint g_t = C_t dy_t + exp(Delta_{t+1} A) g_{t+1} runs backwards. One state in `chunk` steps is kept
    from the forward pass; those between are computed again.
    """
    lead = check_scan(u, delta, a, b, c, d, z, delta_bias, delta_softplus, state0)
    at_least_one(chunk=chunk)
    dims(u=(u, "... T E"), dy=(dy, "... T E"))
    if dstate is not None:
        dims(u=(u, "... T E"), a=(a, "E N"), dstate=(dstate, "... E N"))
    u, a, b, c, dy = float64(u, a, b, c, dy)
    raw, step = _steps(delta, delta_bias, delta_softplus)
    T, h = u.shape[-2], np.zeros((*lead, *a.shape)) if state0 is None else float64(state0)
    kept, readout = [], np.zeros_like(u)
    for t in range(T):
        if t % chunk == 0:
            kept.append(h)
        h = _advance(h, u, step, a, b, t)
        readout[..., t, :] = (h @ c[..., t, :, None])[..., 0]
    dz = None
    if z is not None:
        open_ = readout if d is None else readout + float64(d) * u
        dz, dy = dy * open_ * silu_grad(z), dy * silu(z)
    du = np.zeros_like(u) if d is None else dy * float64(d)
    da, db, dc, dstep = np.zeros_like(a), np.zeros_like(b), np.zeros_like(c), np.zeros_like(u)
    g = np.zeros_like(h) if dstate is None else float64(dstate)
    for start in reversed(range(0, T, chunk)):
        states = [kept[start // chunk]]
        for t in range(start, min(start + chunk, T)):
            states.append(_advance(states[-1], u, step, a, b, t))
        for t in reversed(range(start, min(start + chunk, T))):
            before, after = states[t - start], states[t - start + 1]
            g = g + dy[..., t, :, None] * c[..., t, None, :]
            dc[..., t, :] = (dy[..., t, None, :] @ after)[..., 0, :]
            dinput = (g @ b[..., t, :, None])[..., 0]  # of Delta_t u_t
            db[..., t, :] = ((step[..., t, :] * u[..., t, :])[..., None, :] @ g)[..., 0, :]
            decay = np.exp(step[..., t, :, None] * a)
            dexponent = g * before * decay
            da += (dexponent * step[..., t, :, None]).reshape(-1, *a.shape).sum(axis=0)
            dstep[..., t, :] = (dexponent * a).sum(axis=-1) + dinput * u[..., t, :]
            du[..., t, :] += dinput * step[..., t, :]
            g = g * decay
    ddelta = dstep * sigmoid(raw) if delta_softplus else dstep
    rows = lambda x: x.reshape(-1, u.shape[-1]).sum(axis=0)
    dd, dbias = None if d is None else rows(dy * u), None if delta_bias is None else rows(ddelta)
    return ScanGrads(du, ddelta, da, db, dc, dd, dz, dbias, g)


def causal_conv(x, w, b=None, *, tail=None):
    """y_t = sum_k w_k x_{t-K+1+k} + b in every channel: x [..., T, E], w [K, E] with the newest tap last.

    tail: the K - 1 inputs [..., K-1, E] that came before x, oldest first; zeros if None.
    Raises: ValueError naming the argument at fault.
    """
    x, T = _with_tail(x, w, b, tail), x.shape[-2]
    y = sum(w[k] * x[..., k : k + T, :] for k in range(len(w)))
    return y if b is None else y + b


def causal_conv_vjp(x, w, dy, *, tail=None):
    """(dx, dw, db, dtail) of `causal_conv` for dy [..., T, E]."""
    padded, (T, E) = _with_tail(x, w, None, tail), x.shape[-2:]
    dpadded, dw = np.zeros_like(padded), np.zeros(w.shape)
    for k in range(len(w)):
        dpadded[..., k : k + T, :] += w[k] * dy
        dw[k] = (padded[..., k : k + T, :] * dy).reshape(-1, E).sum(axis=0)
    K = len(w) - 1
    return dpadded[..., K:, :], dw, dy.reshape(-1, E).sum(axis=0), dpadded[..., :K, :]


def check_scan(u, delta, a, b, c, d=None, z=None, delta_bias=None, delta_softplus=True, state0=None):
    """Raise ValueError for a bad call of the scan; return its leading axes."""
    n = dims(
        u=(u, "... T E"), delta=(delta, "... T E"), a=(a, "E N"), b=(b, "... T N"), c=(c, "... T N"),
        **({"d": (d, "E")} if d is not None else {}),
        **({"z": (z, "... T E")} if z is not None else {}),
        **({"delta_bias": (delta_bias, "E")} if delta_bias is not None else {}),
        **({"state0": (state0, "... E N")} if state0 is not None else {}),
    )  # fmt: skip
    if n["N"] < 1:
        raise ValueError("a must be [E, N] with a state of N >= 1, got N=0")
    if not delta_softplus and isinstance(delta, np.ndarray):  # traced values cannot be looked at
        least = np.min(delta if delta_bias is None else delta + delta_bias, initial=0.0)
        if least < 0:
            raise ValueError(f"delta must not be negative without softplus, got {least}")
    return n["..."]


def _steps(delta, delta_bias, delta_softplus):
    """(delta + delta_bias, Delta)."""
    raw = float64(delta) if delta_bias is None else float64(delta) + float64(delta_bias)
    return raw, softplus(raw) if delta_softplus else raw


def _advance(h, u, step, a, b, t):
    added = (step[..., t, :] * u[..., t, :])[..., None] * b[..., t, None, :]
    return np.exp(step[..., t, :, None] * a) * h + added


def _with_tail(x, w, b, tail):
    """x behind its tail, [..., K-1+T, E]."""
    n = dims(x=(x, "... T E"), w=(w, "K E"), **({"b": (b, "E")} if b is not None else {}))
    if n["K"] < 1:
        raise ValueError("w must have at least one tap, got K=0")
    x = float64(x)
    if tail is None:
        tail = np.zeros_like(x, shape=(*n["..."], n["K"] - 1, n["E"]))
    dims(x=(x, "... T E"), tail=(tail, f"... {n['K'] - 1} E"))
    return np.concatenate([float64(tail), x], axis=-2)
