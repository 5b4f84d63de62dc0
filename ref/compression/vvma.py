"""VVMA: every k x k tile of a weight matrix is one shared matrix M with its columns scaled.

Source: Khoury et al. 2020 (arXiv 2010.08412), the tiling W_ij = M diag(v_ij); the paper gives no numbered
equation we could check, so the backward pass, the projection and the cycle count are derived here. Weights
act as W x, W [n_out, n_in]. Embeddings and output softmax stay dense.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.mlp import relu, sigmoid
from ref.checks import at_least_one, check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example

ORDERS = ("fused", "per_tile")


class VvmaParams(NamedTuple):
    """One linear map: m [k, k], v [I, J, k], bias [n_out] or None (then n_out = I k)."""

    m: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None = None


class VvmaLSTMParams(NamedTuple):
    """One m [k, k] for all gates; v_x [4, I, Jx, k], v_h [4, I, Jh, k], bias [4, N]: i, f, candidate, o."""

    m: np.ndarray
    v_x: np.ndarray
    v_h: np.ndarray
    bias: np.ndarray


class VvmaMLPParams(NamedTuple):
    """One m [k, k] for both layers; v_1 [I, J, k], bias_1 [F], v_2 [J, I, k], bias_2 [n_out]."""

    m: np.ndarray
    v_1: np.ndarray
    bias_1: np.ndarray
    v_2: np.ndarray
    bias_2: np.ndarray


class VvmaAttentionParams(NamedTuple):
    """One m [k, k] for four maps of width D; v [4, I, I, k] and bias [4, D]: q, k, v and output."""

    m: np.ndarray
    v: np.ndarray
    bias: np.ndarray


def vvma_linear(x, m, v, bias=None, *, out_features=None, order="fused"):
    """y_i = M sum_j v_ij * x_j (+ bias), with x_j and y_i the tiles of k entries of x and y.

    Args: x [..., n_in], m [k, k], v [I, J, k] with (J - 1) k < n_in <= J k, bias [n_out] or None.
      out_features: n_out in ((I - 1) k, I k]; None is I k.
      order: "fused" takes M out of the sum over j, I products with M; "per_tile" makes I J of them, which is
        what a machine without a vector accumulator does. Same result.
    Returns: [..., n_out] float64.
    Raises: ValueError naming the argument at fault.
    """
    n_out = check_vvma(m, v, x.shape[-1], out_features)
    if bias is not None:
        dims(bias=(bias, str(n_out)))
    one_of("order", order, ORDERS)
    m, v = float64(m, v)
    scaled = v * _tiles(x, v)[..., None, :, :]  # [..., I, J, k]
    y = scaled.sum(axis=-2) @ m.T if order == "fused" else (scaled @ m.T).sum(axis=-2)
    y = y.reshape(*x.shape[:-1], v.shape[0] * m.shape[0])[..., :n_out]
    return y if bias is None else y + bias


def vvma_linear_vjp(x, m, v, grad_out):
    """(grad_x, grad_m, grad_v, grad_bias) of `vvma_linear` for the cotangent grad_out [..., n_out].

    With u_i = sum_j v_ij * x_j and du_i = M^T g_i: dM = sum g_i u_i^T, dv_ij = sum du_i * x_j over tokens,
    dx_j = sum_i v_ij * du_i. Padding is zero, so v where it meets padded inputs has no gradient.
    """
    n_in, n_out = x.shape[-1], check_vvma(m, v, x.shape[-1], grad_out.shape[-1])
    dims(x=(x, "... n_in"), grad_out=(grad_out, "... n_out"))
    (m, v), k = float64(m, v), m.shape[0]
    tiles = _tiles(x, v).reshape(-1, 1, v.shape[1], k)  # [T, 1, J, k]
    g = _pad(grad_out, v.shape[0] * k).reshape(-1, v.shape[0], k)  # [T, I, k]
    u, du = (v * tiles).sum(axis=2), g @ m
    grad_m = g.reshape(-1, k).T @ u.reshape(-1, k)
    grad_v = (du[:, :, None] * tiles).sum(axis=0)
    grad_x = (v * du[:, :, None]).sum(axis=1).reshape(*x.shape[:-1], v.shape[1] * k)[..., :n_in]
    return grad_x, grad_m, grad_v, float64(grad_out).reshape(-1, n_out).sum(axis=0)


def vvma_dense(m, v, *, in_features=None, out_features=None):
    """W [n_out, n_in] whose tile (i, j) is M diag(v_ij), cropped; None means the whole J k and I k."""
    n_in = v.shape[1] * v.shape[2] if in_features is None else in_features
    n_out = check_vvma(m, v, n_in, out_features)
    m, v = float64(m, v)
    w = m * v[:, :, None, :]
    return w.swapaxes(1, 2).reshape(v.shape[0] * m.shape[0], -1)[:n_out, :n_in]


def vvma_lstm_cell(x, state, params: VvmaLSTMParams):
    """(h', (h', c')) of an LSTM cell whose eight matrices share one M; M meets each gate once.

    Args: x [..., Nx], state (h, c) [..., N]. c' = f c + i g, h' = o tanh(c').
    """
    h, c = float64(*state)
    n = dims(x=(x, "... Nx"), h=(h, "... N"), c=(c, "... N"), bias=(params.bias, "4 N"))["N"]
    for v, size in ((params.v_x, x.shape[-1]), (params.v_h, n)):
        check_vvma(params.m, v[0], size, n)
    k = params.m.shape[0]
    both = np.concatenate([_pad(x, params.v_x.shape[2] * k), _pad(h, params.v_h.shape[2] * k)], axis=-1)
    v = np.concatenate([params.v_x, params.v_h], axis=2)
    gates = [vvma_linear(both, params.m, v[g], params.bias[g], out_features=n) for g in range(4)]
    i, f, o = (sigmoid(gates[g]) for g in (0, 1, 3))
    c = f * c + i * np.tanh(gates[2])
    h = o * np.tanh(c)
    return h, (h, c)


def vvma_mlp(x, params: VvmaMLPParams):
    """W_2 relu(W_1 x + bias_1) + bias_2 for x [..., n_in], both maps of one M."""
    p = params
    hidden = relu(vvma_linear(x, p.m, p.v_1, p.bias_1, out_features=p.bias_1.shape[0]))
    return vvma_linear(hidden, p.m, p.v_2, p.bias_2, out_features=p.bias_2.shape[0])


def vvma_attention(x, params: VvmaAttentionParams, *, num_heads, mask=None):
    """Multi-head self-attention of x [..., L, D] whose four maps share one M; mask bool, True = visible."""
    D = dims(x=(x, "... L D"), bias=(params.bias, "4 D"))["D"]
    check_num_heads(D, num_heads)
    maps = [
        lambda y, v=v, b=b: vvma_linear(y, params.m, v, b, out_features=D)
        for v, b in zip(params.v, params.bias, strict=True)
    ]
    q, k, v = (split_heads(f(x), num_heads) for f in maps[:3])
    return maps[3](join_heads(attention_dense(q, k, v, mask=mask)))


def init_vvma(rng, n_in, n_out, *, k=32):
    """VvmaParams with v ~ N(0, 1), M ~ N(0, 1 / n_in): entries of W have variance 1 / n_in; zero bias.

    Our choice: the paper's initialisation was not found.
    """
    at_least_one(k=k)
    v = rng.standard_normal((-(-n_out // k), -(-n_in // k), k))
    return VvmaParams(rng.standard_normal((k, k)) / np.sqrt(n_in), v, np.zeros(n_out))


def project_to_vvma(w, *, k):
    """(m, v, residual): the m [k, k], v [I, J, k] nearest to w [n_out, n_in] in the Frobenius norm.

    Columns decouple: column c of all I J tiles, side by side, is a k x I J matrix, and its best rank-one
    approximation gives M[:, c] (unit norm) and v[..., c]. residual: the squared distance that is left, the
    sum of the squares of the other singular values.
    """
    at_least_one(k=k)
    dims(w=(w, "n_out n_in"))
    w = _pad(_pad(w, -(-w.shape[1] // k) * k).T, -(-w.shape[0] // k) * k).T
    tiles = w.reshape(w.shape[0] // k, k, -1, k)  # [I, row, J, column]
    columns = tiles.transpose(3, 1, 0, 2).reshape(k, k, -1)  # [column, row, I J]
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    v = (s[:, 0, None] * vt[:, 0]).T.reshape(tiles.shape[0], tiles.shape[2], k)
    return u[:, :, 0].T, v, float((s[:, 1:] ** 2).sum())


@dataclass(frozen=True)
class VvmaCost:
    """Cycles of a weight-stationary k x k array, parameters, multiply-accumulates: dense and VVMA."""

    cycles_dense: int
    cycles_vvma: int
    params_dense: int
    params: int
    macs_dense: int
    macs: int


def vvma_cost(n_in, n_out, *, k, batch=1, load_cycles=None, lanes=None, overlap=True):
    """VvmaCost of a map on `batch` vectors: loads count, which is the whole point.

    A tile takes load_cycles (None: k) to load and `batch` cycles to stream; the pipeline fills once, 2k - 1.
    Dense: I J tiles, each max(load, stream) with double buffering (overlap) or their sum without. VVMA: one
    load, I passes through M, and I J k vector products on `lanes` (None: k) lanes a vector, beside or after
    the passes.
    Raises: ValueError unless all sizes are at least 1.
    """
    load, lanes = k if load_cycles is None else load_cycles, k if lanes is None else lanes
    at_least_one(k=k, n_in=n_in, n_out=n_out, batch=batch, lanes=lanes)
    if load < 0:
        raise ValueError(f"load_cycles must not be negative, got {load}")
    i, j, fill = -(-n_out // k), -(-n_in // k), 2 * k - 1
    passes, vector = i * batch, i * j * batch * -(-k // lanes)
    return VvmaCost(
        cycles_dense=i * j * (max(load, batch) if overlap else load + batch) + fill,
        cycles_vvma=load + fill + (max(passes, vector) if overlap else passes + vector),
        params_dense=n_in * n_out,
        params=i * j * k + k * k,
        macs_dense=batch * n_in * n_out,
        macs=batch * (i * j * k + i * k * k),
    )


def check_vvma(m, v, in_features, out_features):
    """Check the tiling and return n_out. Raises: ValueError naming the argument at fault."""
    n = dims(m=(m, "k k"), v=(v, "I J k"))
    at_least_one(k=n["k"])
    out_features = n["I"] * n["k"] if out_features is None else out_features
    for name, features, tiles in (
        ("in_features", in_features, n["J"]),
        ("out_features", out_features, n["I"]),
    ):
        if not (tiles - 1) * n["k"] < features <= tiles * n["k"]:
            raise ValueError(
                f"{name} must be in {(tiles - 1) * n['k'] + 1}..{tiles * n['k']} for {tiles} tiles of "
                f"k={n['k']}, got {features}"
            )
    return out_features


def _pad(x, size):
    """x with zeros behind its last axis, up to `size`."""
    return np.concatenate([float64(x), np.zeros((*x.shape[:-1], size - x.shape[-1]))], axis=-1)


def _tiles(x, v):
    """x [..., n_in] as its tiles [..., J, k]."""
    return _pad(x, v.shape[1] * v.shape[2]).reshape(*x.shape[:-1], *v.shape[1:])


def example(seed=0):
    """Hidden states of SmolLM2 through maps of width 24 in tiles of 8."""
    from ref.data import hidden_states

    rng, k, width = np.random.default_rng(seed), 8, 24
    x = hidden_states()[1:6, :22]
    p = init_vvma(rng, 22, 20, k=k)
    v = lambda *shape: rng.standard_normal((*shape, k))
    bias = lambda *shape: 0.1 * rng.standard_normal(shape)
    lstm = VvmaLSTMParams(p.m, v(4, 2, 3), v(4, 2, 2), bias(4, 13))
    state = (bias(5, 13), bias(5, 13))
    attention = VvmaAttentionParams(p.m / 5, v(4, 3, 3), bias(4, width))
    return [
        Example("vvma_linear", (x, p.m, p.v, bias(20)), {"out_features": 20}, (0, 1, 2, 3)),
        Example("vvma_linear_vjp", (x, p.m, p.v, bias(5, 20)), {}, (0, 1, 2, 3)),
        Example("vvma_dense", (p.m, p.v), {"in_features": 22, "out_features": 20}, (0, 1)),
        Example("vvma_lstm_cell", (0.1 * x, state, lstm), {}, (0, 1, 2)),
        Example("vvma_mlp", (x, VvmaMLPParams(p.m, v(4, 3), bias(30), v(3, 4), bias(20))), {}, (0, 1)),
        Example("vvma_attention", (0.1 * bias(5, width), attention), {"num_heads": 3}, (0, 1)),
    ]
