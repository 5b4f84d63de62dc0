"""How much of the past a recurrent state still holds: influence, information, and what can be read back.

Source: the decay of a state-space model is that of Gu and Dao 2023; fidelities in the manner of MemMamba 2025
(arXiv 2510.03279), whose formulas are not public: these are ours. The information is that of a linear state
driven by white Gaussian noise.
"""

import numpy as np

from ref.dims import dims, float64


def influence(delta, a, lag):
    """[..., T, E, N]: exp(A (Delta_{t-lag+1} + ... + Delta_t)), what is left of a change lag steps ago.

    Args: delta [..., T, E], step sizes >= 0 (after softplus); a [E, N]; lag >= 0. Rows t < lag, where there
      was no such token, are 0.
    """
    dims(delta=(delta, "... T E"), a=(a, "E N"))
    if lag < 0:
        raise ValueError(f"lag must not be negative, got {lag}")
    delta, a = float64(delta), float64(a)
    factor = np.zeros((*delta.shape, a.shape[1]))
    for t in range(lag, delta.shape[-2]):
        factor[..., t, :, :] = np.exp(delta[..., t - lag + 1 : t + 1, :].sum(axis=-2)[..., None] * a)
    return factor


def half_life(delta, a):
    """[..., E, N]: ln 2 / (|A| mean Delta), the steps after which half of an influence is left."""
    dims(delta=(delta, "... T E"), a=(a, "E N"))
    with np.errstate(divide="ignore"):  # a state that does not decay keeps its half for ever
        return np.log(2) / (np.abs(float64(a)) * float64(delta).mean(axis=-2)[..., None])


def memory_information(delta, a, b, *, lags, noise=0.0):
    """(rho2, nats) of each lag: how much h_t, seen with noise, tells of the input `lag` steps ago.

    One channel with constant step size and inputs of unit variance: h_t = sum_k c_k x_{t-k} with
    c_k = abar^k bbar, abar = exp(delta a), bbar = delta b. rho2 = c_k^T (Sigma + noise I)^-1 c_k is the share
    of x_{t-k} that the best linear reader recovers, nats = -ln(1 - rho2) / 2 the information in it.
    Args: delta > 0; a [N] < 0, b [N]; lags: ints >= 0; noise: variance of the observation noise.
    Returns: two arrays [len(lags)]. Raises: ValueError naming the argument, also where Sigma cannot be
      inverted without noise.
    """
    sigma, abar, bbar = _covariance(delta, a, b, noise)
    lags = np.asarray(lags)
    if lags.ndim != 1 or lags.dtype.kind not in "iu" or (lags.size and lags.min() < 0):
        raise ValueError(f"lags must be a list of integers >= 0, got {lags}")
    c = abar ** lags[:, None] * bbar  # [lags, N]
    rho2 = np.clip(np.sum(c * _solve(sigma, noise, c.T).T, axis=-1), 0.0, 1.0)
    with np.errstate(divide="ignore"):  # an input that is known exactly
        return rho2, -0.5 * np.log1p(-rho2)


def memory_capacity(delta, a, b, *, noise=0.0):
    """trace(Sigma (Sigma + noise I)^-1) <= N: the sum of rho2 over all lags, see `memory_information`."""
    sigma, _, _ = _covariance(delta, a, b, noise)
    return float(np.trace(_solve(sigma, noise, sigma)))


def token_memory_fidelity(states, tokens, *, lags, ridge=1e-3):
    """[len(lags)]: mean cosine of x_t and R h_{t+lag}, R a ridge regression fitted on other sequences.

    Args: states [B, T, N], tokens [B, T, C]: the first half of the B >= 2 sequences fits, the rest is read.
    """
    n = dims(states=(states, "B T N"), tokens=(tokens, "B T C"))
    _check_ridge(ridge)
    if n["B"] < 2 or not all(0 <= lag < n["T"] for lag in lags):
        raise ValueError(f"need B >= 2 sequences and lags in 0..T-1, got B={n['B']}, T={n['T']}, lags {lags}")
    states, tokens, half = float64(states), float64(tokens), n["B"] // 2
    found = []
    for lag in lags:
        h, x = states[:, lag:], tokens[:, : n["T"] - lag]
        read = h[half:] @ _ridge(h[:half], x[:half], ridge)
        lengths = np.linalg.norm(read, axis=-1) * np.linalg.norm(x[half:], axis=-1)
        dots = np.sum(read * x[half:], axis=-1)
        found.append(np.mean(dots / np.where(lengths > 0, lengths, 1.0)))
    return np.array(found)


def layer_memory_fidelity(states, *, gap=1, ridge=1e-3):
    """1 - mean |h_l - Phi h_{l+gap}|^2 / mean |h_l - mean h_l|^2, clipped to [0, 1], mean over layers l.

    Args: states [layers, rows, C]: what each layer holds of the same tokens. Phi: ridge regression on them.
    """
    layers = dims(states=(states, "layers rows C"))["layers"]
    _check_ridge(ridge)
    if not 1 <= gap < layers:
        raise ValueError(f"gap must be in 1..{layers - 1}, got {gap}")
    states, found = float64(states), []
    for low, high in zip(states[:-gap], states[gap:], strict=True):
        missed = np.sum((low - high @ _ridge(high, low, ridge)) ** 2)
        spread = np.sum((low - low.mean(axis=0)) ** 2)
        found.append(1.0 if missed == 0 else np.clip(1 - missed / spread, 0, 1) if spread else 0.0)
    return float(np.mean(found))


def _ridge(h, x, ridge):
    """R [N, C] that minimises |h R - x|^2 + ridge |R|^2 over all rows."""
    h, x = h.reshape(-1, h.shape[-1]), x.reshape(-1, x.shape[-1])
    return np.linalg.solve(h.T @ h + ridge * np.eye(h.shape[1]), h.T @ x)


def _covariance(delta, a, b, noise):
    """(Sigma, abar, bbar): Sigma_ij = bbar_i bbar_j / (1 - abar_i abar_j)."""
    dims(a=(a, "N"), b=(b, "N"))
    a, b = float64(a), float64(b)
    if not (delta > 0 and (a < 0).all() and noise >= 0):
        raise ValueError(
            f"need delta > 0, a < 0 and noise >= 0, got {delta=}, a in {a.min()}..{a.max()}, {noise=}"
        )
    abar, bbar = np.exp(delta * a), delta * b
    # 1 - exp(x) by expm1: slow decays would lose their digits
    return np.outer(bbar, bbar) / -np.expm1(delta * (a[:, None] + a)), abar, bbar


def _solve(sigma, noise, right):
    try:
        factor = np.linalg.cholesky(sigma + noise * np.eye(len(sigma)))
    except np.linalg.LinAlgError as e:
        raise ValueError(f"noise={noise} is too small: these decays cannot be told apart in float64") from e
    return np.linalg.solve(factor.T, np.linalg.solve(factor, right))


def _check_ridge(ridge):
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
