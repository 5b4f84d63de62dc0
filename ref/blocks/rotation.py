"""Hadamard matrices and the rotations made of them: every output is a signed mean of all inputs.

Source: Sylvester 1867 for powers of two, Paley 1933 for the odd part of other orders.
"""

import numpy as np

from ref.checks import at_least_one
from ref.dims import dims

# order -> (construction, prime q): I makes q + 1 for q = 3 mod 4, II makes 2 (q + 1) for q = 1 mod 4
PALEY = {12: (1, 11), 20: (1, 19), 28: (2, 13), 36: (2, 17)}


def hadamard_matrix(n):
    """H [n, n] of +-1 with H H^T = n I, for n = 2^k, 12 2^k, 20 2^k, 28 2^k or 36 2^k.

    Raises: ValueError for another order (many of them exist; these are the ones built here).
    """
    base = next((m for m in (1, *PALEY) if n % m == 0 and _is_power_of_two(n // m)), None)
    if n < 1 or base is None:
        raise ValueError(f"hadamard_matrix needs n = 2^k, 12 2^k, 20 2^k, 28 2^k or 36 2^k, got {n}")
    h = np.ones((1, 1)) if base == 1 else _paley(*PALEY[base])
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def rotation_for(dim, seed):
    """(block, signs [dim]): the largest block that divides dim and has a Hadamard matrix, and drawn signs.

    A width of 1152 = 36 32 is one block; 70 = 35 2 has blocks of 2.
    """
    at_least_one(dim=dim)
    return block_for(dim), np.random.default_rng(seed).choice((-1.0, 1.0), dim)


def block_for(dim):
    """The largest order of `hadamard_matrix` that divides dim."""
    two = dim & -dim
    return max(m * two // 4 for m in (4, *(m for m in PALEY if two >= 4)) if dim % (m * two // 4) == 0)


def hadamard_transform(x, *, signs=None, block=None):
    """(x * signs) H / sqrt(block), each run of `block` channels by itself: x [..., C], in its own dtype.

    signs [C] of +-1 (None: ones); block None is all of C. It is orthogonal: lengths stay.
    Raises: ValueError if block does not divide C, or has no Hadamard matrix here.
    """
    C = dims(x=(x, "... C"))["C"]
    block = C if block is None else block
    if block < 1 or C % block:
        raise ValueError(f"block must divide the {C} channels of x, got {block}")
    if signs is not None:
        dims(x=(x, "... C"), signs=(signs, "C"))
        x = x * np.asarray(signs, x.dtype)
    h = (hadamard_matrix(block) / np.sqrt(block)).astype(x.dtype)
    return (x.reshape(*x.shape[:-1], C // block, block) @ h).reshape(x.shape)


def _is_power_of_two(n):
    return n >= 1 and n & (n - 1) == 0


def _paley(kind, q):
    squares = {i * i % q for i in range(1, q)}
    chi = lambda a: 0 if a % q == 0 else 1 if a % q in squares else -1
    jacobsthal = np.array([[chi(i - j) for j in range(q)] for i in range(q)], float)
    if kind == 1:
        s = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), jacobsthal]])
        return s + np.eye(q + 1)
    c = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), jacobsthal]])
    one, two = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(c, one) + np.kron(np.eye(q + 1), two)
