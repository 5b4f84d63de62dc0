"""Attention by feature maps: phi(q) (phi(k)^T v), linear in the number of tokens.

Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 4 to 7; Choromanski et al. 2021 (arXiv
2009.14794), Performer, with the stabilised features of public implementations. q, k, v [..., L, D]; both
ways, not causal.
"""

import numpy as np

from ref.blocks.padding import zero_padding
from ref.dims import dims, float64

KERNELS = {"softmax": 1e-4, "relu": 1e-3}  # name -> what is added to every feature


def elu_plus_one(x):
    """x + 1 for x > 0, else exp(x): a positive feature map, elementwise."""
    x = float64(x)
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def kernel_attention(fq, fk, v):
    """fq (fk^T v) / fq (fk^T 1): features fq [..., L, m], fk [..., S, m], v [..., S, Dv] -> [..., L, Dv].

    Rows whose denominator is 0, because no key has a feature, are 0.
    """
    dims(fq=(fq, "... L m"), fk=(fk, "... S m"), v=(v, "... S Dv"))
    fk_t = np.swapaxes(fk, -1, -2)
    total = fq @ fk_t.sum(axis=-1)[..., None]
    return fq @ (fk_t @ v) / np.where(total == 0, 1.0, total)


def kernel_attention_vjp(fq, fk, v, do):
    """(dfq, dfk, dv) of `kernel_attention`, for do [..., L, Dv]."""
    fk_t = np.swapaxes(fk, -1, -2)
    mass, state = fk_t.sum(axis=-1)[..., None], fk_t @ v  # [..., m, 1], [..., m, Dv]
    total = fq @ mass
    total = np.where(total == 0, 1.0, total)
    o = fq @ state / total
    dnum, dtotal = do / total, -(do * o).sum(axis=-1, keepdims=True) / total
    dstate, dmass = np.swapaxes(fq, -1, -2) @ dnum, np.swapaxes(fq, -1, -2) @ dtotal
    dfq = dnum @ np.swapaxes(state, -1, -2) + dtotal * np.swapaxes(mass, -1, -2)
    return dfq, v @ np.swapaxes(dstate, -1, -2) + np.swapaxes(dmass, -1, -2), fk @ dstate


def linear_attention(q, k, v, *, mask=None):
    """`kernel_attention` with phi = elu + 1, scores not scaled. mask: bool [..., S], True = real keys."""
    return kernel_attention(elu_plus_one(q), *_linear_keys(k, v, mask))


def linear_attention_vjp(q, k, v, do, *, mask=None):
    """(dq, dk, dv) of `linear_attention`."""
    fk, v = _linear_keys(k, v, mask)
    dfq, dfk, dv = kernel_attention_vjp(elu_plus_one(q), fk, v, float64(do))
    slope = lambda x: np.exp(np.minimum(float64(x), 0))  # 1 for x > 0
    return dfq * slope(q), *zero_padding(mask, dfk * slope(k), dv)


def performer_features(x, proj, *, kernel="softmax", eps=None, axis=-1, mask=None):
    """phi(x) [..., L, m] with phi(q) phi(k)^T near exp(q k^T / sqrt(D)), x = q or k [..., L, D].

    Args: proj [m, D]: directions w, see `orthogonal_features`. kernel: "softmax" is
      (exp(w x - |x|^2 / 2 - top) + eps) / sqrt(m), x scaled by D^-1/4; "relu" is relu(w x) + eps, another
      kernel. eps: None is 1e-4 for softmax, 1e-3 for relu.
      axis: top is the largest w x along it: -1 a row, (-2, -1) a head. mask: bool [..., L], rows that count.
    """
    n = dims(x=(x, "... L D"), proj=(proj, "m D"))
    if kernel not in KERNELS:
        raise ValueError(f'kernel must be "softmax" or "relu", got {kernel!r}')
    eps = KERNELS[kernel] if eps is None else eps
    x = float64(x) * n["D"] ** -0.25
    along = x @ float64(proj).T
    if kernel == "relu":
        return np.maximum(along, 0) + eps
    counted = along if mask is None else np.where(np.asarray(mask)[..., None], along, -np.inf)
    top = counted.max(axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0.0, top)
    return (np.exp(along - (x * x).sum(axis=-1, keepdims=True) / 2 - top) + eps) / np.sqrt(n["m"])


def performer_attention(q, k, v, proj, *, kernel="softmax", eps=None, mask=None):
    """`kernel_attention` with random features; for keys the largest exponent is that of the head.

    Args: q [..., L, D], k, v [..., S, D]; proj [m, D]; mask bool [..., S], True = real keys.
    """
    dims(q=(q, "... L D"), k=(k, "... S D"), v=(v, "... S Dv"), proj=(proj, "m D"))
    k, v = zero_padding(mask, k, v)
    fk = performer_features(k, proj, kernel=kernel, eps=eps, axis=(-2, -1), mask=mask)
    return kernel_attention(performer_features(q, proj, kernel=kernel, eps=eps), *zero_padding(mask, fk, v))


def orthogonal_features(rng, m, dim):
    """proj [m, dim]: orthogonal directions in groups of dim, as long as normal vectors are."""
    groups = []
    for _ in range(-(-m // dim)):
        Q, R = np.linalg.qr(rng.standard_normal((dim, dim)))
        # without the signs Q is not uniform, and the features are biased
        groups.append(Q * np.sign(np.diag(R)))
    return np.concatenate(groups)[:m] * np.linalg.norm(rng.standard_normal((m, dim)), axis=-1)[:, None]


def _linear_keys(k, v, mask):
    """(features of the keys, values), 0 for padding."""
    k, v = zero_padding(mask, k, v)
    return *zero_padding(mask, elu_plus_one(k)), v
