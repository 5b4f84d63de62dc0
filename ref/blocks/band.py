"""A band of the attention matrix from products of overlapping chunks: the index trick of Longformer's code.

Source: Beltagy et al. 2020 (arXiv 2004.05150), appendix A.
"""

import numpy as np


def chunk_scores(q, k, half):
    """q_i k_j for |i - j| <= half, [..., L, 2 half + 1], from products of chunks of 2 half tokens.

    Chunks start every `half` tokens. One more row of zeros and a reshape put diagonal t of a [2h, 2h] product
    into column t, and diagonal t - 2h - 1 of the next row after it.
    """
    L, w = q.shape[-2], 2 * half
    pad = [(0, 0)] * (q.ndim - 2) + [(0, max(-L % w, w - L)), (0, 0)]
    q, k = np.pad(q, pad), np.pad(k, pad)
    at = np.arange(0, q.shape[-2] - half, half)[:, None] + np.arange(w)  # [n, 2h]
    s = q[..., at, :] @ np.swapaxes(k[..., at, :], -1, -2)
    lead, n = s.shape[:-3], len(at)
    s = np.concatenate([s, np.zeros((*lead, n, 1, w))], axis=-2).reshape(*lead, n, w, w + 1)
    band = np.zeros((*lead, n + 1, half, w + 1))
    band[..., :-1, :, half:] = s[..., :, :half, : half + 1]  # the query itself and the keys after it
    band[..., -1, :, half:] = s[..., -1, half:, : half + 1]
    band[..., 1:, :, :half] = s[..., :, half - 1 : -1, half + 1 :]  # the keys before it
    band[..., 0, 1:, 1:half] = s[..., 0, : half - 1, half + 2 :]
    return band.reshape(*lead, (n + 1) * half, w + 1)[..., :L, :]


def chunk_values(p, v, half):
    """sum_j p[i, j - i + half] v_j from products of [half, 3 half] probabilities with 3 half values."""
    L, lead = p.shape[-2], p.shape[:-2]
    n = -(-L // half)
    rows = n * half
    p = np.pad(p, [(0, 0)] * len(lead) + [(0, rows - L), (0, half)])
    p = p.reshape(*lead, n, half * (3 * half + 1))[..., : half * 3 * half]
    p = p.reshape(*lead, n, half, 3 * half)  # row i is shifted right by i
    v = np.pad(v, [(0, 0)] * len(lead) + [(half, rows - L + half), (0, 0)])
    at = np.arange(0, rows, half)[:, None] + np.arange(3 * half)
    return (p @ v[..., at, :]).reshape(*lead, rows, v.shape[-1])[..., :L, :]
