"""Polynomial features: a linear map of them is a polynomial, their inner product a polynomial kernel."""

from itertools import combinations_with_replacement
from math import comb, factorial

import numpy as np

from ref.checks import at_least_one, one_of
from ref.dims import dims, float64

MODES = ("monomial", "elementwise", "identity")


def poly_features(x, *, degree=2, mode="monomial", coefs=None):
    """phi(x) [..., D] of x [..., d]: a linear map of phi is a polynomial of x.

    mode: "monomial", all monomials up to the degree, D = C(d + degree, degree), so weighted that
        phi(x).phi(y) = sum_i a_i (x.y)^i; "elementwise" x + x^2 + .. + x^degree; "identity".
      coefs: a_0 .. a_degree >= 0 of the monomials; None is 1 / i!, the series of exp.
    Raises: ValueError naming the argument at fault.
    """
    coefs = _check_features(x, degree, mode, coefs)
    x = float64(x)
    if mode == "identity":
        return x
    if mode == "elementwise":
        return sum(x**i for i in range(1, degree + 1))
    parts = []
    for index, weight in _monomials(x.shape[-1], degree, coefs):
        parts.append(weight * np.prod(x[..., index], axis=-1))
    return np.concatenate(parts, axis=-1)


def poly_features_vjp(x, dphi, *, degree=2, mode="monomial", coefs=None):
    """dx [..., d] of `poly_features` for the cotangent dphi [..., D]."""
    coefs = _check_features(x, degree, mode, coefs)
    x, dphi = float64(x, dphi)
    if mode == "identity":
        return dphi
    if mode == "elementwise":
        return dphi * sum(i * x ** (i - 1) for i in range(1, degree + 1))
    dx, start = np.zeros_like(x), 0
    for index, weight in _monomials(x.shape[-1], degree, coefs):
        n, i = index.shape
        d = weight * dphi[..., start : start + n]
        for r in range(i):  # the r-th factor of every monomial
            others = np.prod(np.delete(x[..., index], r, axis=-1), axis=-1)
            dx += (d * others) @ (index[:, r, None] == np.arange(x.shape[-1]))
        start += n
    return dx


def feature_count(dk, degree):
    """D = C(dk + degree, degree): monomials of dk variables up to the degree, the constant included."""
    return comb(dk + degree, degree)


def _monomials(d, degree, coefs):
    """By degree i: (factors of every monomial [n, i], weights sqrt(a_i i! / (m_1! m_2! ..)) [n])."""
    for i in range(degree + 1):
        chosen = list(combinations_with_replacement(range(d), i))
        index = np.array(chosen, int).reshape(len(chosen), i)
        powers = (index[:, :, None] == np.arange(d)).sum(axis=1)
        ways = factorial(i) / np.prod(np.array([factorial(m) for m in range(i + 1)])[powers], axis=-1)
        yield index, np.sqrt(coefs[i] * ways)


def _check_features(x, degree, mode, coefs):
    """Check a call, return the coefficients."""
    dims(x=(x, "... d"))
    one_of("mode", mode, MODES)
    at_least_one(degree=degree)
    if coefs is None:
        return np.array([1 / factorial(i) for i in range(degree + 1)])
    if mode != "monomial":
        raise ValueError(f'coefs weigh the degrees of mode "monomial", got mode {mode!r}')
    coefs = float64(coefs)
    dims(coefs=(coefs, f"{degree + 1}"))
    if not (coefs >= 0).all():
        raise ValueError("coefs must not be negative: features have their square roots")
    return coefs
