"""Matrix iterations made of products alone.

Source: Ben-Israel and Cohen 1966 (Newton's iteration for the inverse, also named after Schulz 1933); Jordan
et al. 2024 (Muon) for the quintic that makes a matrix nearly orthogonal.
"""

import numpy as np

from ref.dims import dims, float64

MUON_COEFS = (3.4445, -4.775, 2.0315)


def newton_iterates(P, V, *, iters):
    """V_0 .. V_iters of V <- 2 V - V P V, which tends to P^-1 quadratically: I - P V is squared each step.

    Args: P [..., m, m]; V [..., m, m], the start: it converges if every eigenvalue of I - P V is inside the
      unit circle.
    """
    found = [float64(V)]
    for _ in range(iters):
        V = found[-1]
        found.append(2 * V - V @ (P @ V))
    return found


def inverse_vjp(V, g):
    """-V^T g V^T: the gradient for P of a function of V = P^-1, from its cotangent g. All [..., m, m]."""
    Vt = np.swapaxes(float64(V), -1, -2)
    return -(Vt @ g @ Vt)


def newton_schulz(g, *, steps=5, eps=1e-7, coefs=MUON_COEFS):
    """U diag(p(p(..p(s / ||g||_F)))) V^T of g = U diag(s) V^T, with p(x) = a x + b x^3 + c x^5.

    Five steps bring every s / ||g||_F >= 1.5e-3 into [0.68, 1.21]: nearly orthogonal, not a limit.
    Args: g [..., m, n], any of them. eps: floor of the Frobenius norm, so that a zero matrix gives zero.
      coefs: (a, b, c). Returns: [..., m, n]. Raises: ValueError for steps < 0 or eps <= 0.
    """
    _check_newton_schulz(g, steps, eps)
    x, _ = _unit(_wide(float64(g)), eps)
    for _ in range(steps):
        x = _quintic(x, coefs)[0]
    return _wide(x, like=g)


def newton_schulz_vjp(g, dx, *, steps=5, eps=1e-7, coefs=MUON_COEFS):
    """dg [..., m, n] of `newton_schulz` for the cotangent dx [..., m, n]; the iterates are computed again."""
    _check_newton_schulz(g, steps, eps)
    dims(g=(g, "... m n"), dx=(dx, "... m n"))
    a, b, c = coefs
    start, norm = _unit(_wide(float64(g)), eps)
    found = [start]
    for _ in range(steps):
        found.append(_quintic(found[-1], coefs)[0])
    d = _wide(float64(dx))
    for x in reversed(found[:-1]):
        _, A, B = _quintic(x, coefs)
        dB = d @ np.swapaxes(x, -1, -2)
        dA = b * dB + c * (dB @ A + A @ dB)
        d = a * d + B @ d + (dA + np.swapaxes(dA, -1, -2)) @ x
    along = np.sum(start * d, axis=(-2, -1), keepdims=True) * start
    return _wide(np.where(norm > eps, d - along, d) / np.maximum(norm, eps), like=g)


def newton_schulz_macs(m, n, *, steps=5):
    """Multiply-accumulates of one m x n matrix: steps (2 s^2 l + s^3), s its shorter, l its longer side."""
    short, long = sorted((m, n))
    return steps * (2 * short**2 * long + short**3)


def _quintic(x, coefs):
    """(a x + B x, A, B) with A = x x^T, B = b A + c A^2."""
    a, b, c = coefs
    A = x @ np.swapaxes(x, -1, -2)
    B = b * A + c * (A @ A)
    return a * x + B @ x, A, B


def _unit(x, eps):
    """(x / max(norm, eps), norm), the Frobenius norm [..., 1, 1]."""
    norm = np.sqrt(np.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / np.maximum(norm, eps), norm


def _wide(x, like=None):
    """x with its longer side last; with `like`, x as that array stands."""
    shape = x.shape if like is None else like.shape
    return np.swapaxes(x, -1, -2) if shape[-2] > shape[-1] else x


def _check_newton_schulz(g, steps, eps):
    dims(g=(g, "... m n"))
    if steps < 0 or not eps > 0:
        raise ValueError(f"need steps >= 0 and eps > 0, got {steps=}, {eps=}")
