"""Laws of VVMA on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.compression.vvma import (
    VvmaAttentionParams,
    VvmaLSTMParams,
    VvmaMLPParams,
    init_vvma,
    project_to_vvma,
    vvma_attention,
    vvma_cost,
    vvma_dense,
    vvma_linear,
    vvma_linear_vjp,
    vvma_lstm_cell,
    vvma_mlp,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from(((1, 1, 1), (7, 5, 3), (8, 8, 4), (3, 9, 4), (6, 2, 8), (5, 4, 1)))  # n_in, n_out, k


def draw(seed, n_in, n_out, k, tokens=3):
    """x, m, v, bias, grad_out."""
    rng = np.random.default_rng(seed)
    i, j = -(-n_out // k), -(-n_in // k)
    shapes = ((tokens, n_in), (k, k), (i, j, k), (n_out,), (tokens, n_out))
    return [rng.standard_normal(s) for s in shapes]


def dense(m, v, n_in, n_out):
    """The definition, entry by entry: W[r, c] = M[r mod k, c mod k] v[r // k, c // k, c mod k]."""
    k = len(m)
    w = np.empty((n_out, n_in))
    for r in range(n_out):
        for c in range(n_in):
            w[r, c] = m[r % k, c % k] * v[r // k, c // k, c % k]
    return w


@given(seeds, sizes)
def law_vvma_equals_the_dense_matrix(seed, size):
    n_in, n_out, k = size
    x, m, v, bias, _ = draw(seed, n_in, n_out, k)
    w = dense(m, v, n_in, n_out)
    np.testing.assert_array_equal(vvma_dense(m, v, in_features=n_in, out_features=n_out), w)
    # sums of n_in products, taken in another order
    atol = 4 * (n_in + k) * EPS * (np.abs(x) @ np.abs(w).T).max()
    for order in ("fused", "per_tile"):
        y = vvma_linear(x, m, v, bias, out_features=n_out, order=order)
        np.testing.assert_allclose(y, x @ w.T + bias, rtol=0, atol=atol + EPS * np.abs(bias).max())
    assert vvma_linear(x[:0], m, v, out_features=n_out).shape == (0, n_out)


@given(seeds, sizes)
def law_vvma_gradients_are_those_of_the_dense_matrix(seed, size):
    """grad_m = sum_ij dW_ij diag(v_ij), grad_v[i, j, c] = <dW_ij[:, c], M[:, c]>, with dW = g^T x."""
    n_in, n_out, k = size
    x, m, v, _, g = draw(seed, n_in, n_out, k)
    grad_x, grad_m, grad_v, grad_bias = vvma_linear_vjp(x, m, v, g)
    dw = g.T @ x
    want_m, want_v = np.zeros_like(m), np.zeros_like(v)
    for r in range(n_out):
        for c in range(n_in):
            want_m[r % k, c % k] += dw[r, c] * v[r // k, c // k, c % k]
            want_v[r // k, c // k, c % k] += dw[r, c] * m[r % k, c % k]
    bound = 64 * EPS * n_in * n_out * max(1, np.abs(dw).max()) * max(1, np.abs(v).max(), np.abs(m).max())
    np.testing.assert_allclose(grad_x, g @ dense(m, v, n_in, n_out), rtol=0, atol=bound)
    np.testing.assert_allclose(grad_m, want_m, rtol=0, atol=bound)
    np.testing.assert_allclose(grad_v, want_v, rtol=0, atol=bound)
    np.testing.assert_allclose(grad_bias, g.sum(axis=0), rtol=0, atol=8 * EPS * np.abs(g).sum())
    assert not grad_v[:, -1, n_in - (v.shape[1] - 1) * k :].any()  # v over padded inputs


@given(seeds)
def law_vvma_gradients_equal_central_differences(seed):
    x, m, v, bias, g = draw(seed, 7, 5, 3)
    rng = np.random.default_rng(seed + 1)
    loss = lambda x, m, v, bias: (g * vvma_linear(x, m, v, bias, out_features=5)).sum()
    for n, grad in enumerate(vvma_linear_vjp(x, m, v, g)):
        args, d = [x, m, v, bias], rng.standard_normal(grad.shape)
        moved = [loss(*[a + s * d if i == n else a for i, a in enumerate(args)]) for s in (1.0, -1.0)]
        # each argument enters linearly, so the difference quotient is exact but for rounding
        np.testing.assert_allclose((moved[0] - moved[1]) / 2, (grad * d).sum(), rtol=1e-11, atol=1e-11)


@given(seeds)
def law_vvma_gauge_and_permutation_of_features_change_nothing(seed):
    x, m, v, _, _ = draw(seed, 8, 8, 4)
    rng = np.random.default_rng(seed)
    y, s, p = vvma_linear(x, m, v), 2.0 ** rng.integers(-3, 4, 4), rng.permutation(4)
    np.testing.assert_array_equal(vvma_linear(x, m * s, v / s), y)  # powers of two: exact
    shuffled = x.reshape(3, 2, 4)[..., p].reshape(3, 8)
    atol = 32 * EPS * (np.abs(x) @ np.abs(vvma_dense(m, v)).T).max()
    np.testing.assert_allclose(vvma_linear(shuffled, m[:, p], v[..., p]), y, rtol=0, atol=atol)


@given(seeds)
def law_vvma_small_k_and_large_k_represent_every_matrix(seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 5))
    np.testing.assert_array_equal(vvma_dense(np.ones((1, 1)), w[:, :, None]), w)
    m, v = rng.standard_normal((6, 6)), rng.standard_normal((1, 1, 6))
    # M[:n_out, :n_in] diag(v)
    np.testing.assert_array_equal(vvma_dense(m, v, in_features=5, out_features=4), m[:4, :5] * v[0, 0, :5])
    for k in (1, 5, 6):
        m, v, residual = project_to_vvma(w, k=k)
        assert residual < 1e-25  # squares of singular values that are rounding
        np.testing.assert_allclose(vvma_dense(m, v, in_features=5, out_features=4), w, rtol=0, atol=1e-14)


@given(seeds, st.sampled_from((2, 3, 4)))
def law_vvma_projection_is_the_nearest_member(seed, k):
    """Its distance is the residual; what is in the family comes back; no other member drawn is nearer."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((7, 9))
    m, v, residual = project_to_vvma(w, k=k)
    padded = np.pad(w, [(0, -n % k) for n in w.shape])
    distance = ((vvma_dense(m, v) - padded) ** 2).sum()
    np.testing.assert_allclose(distance, residual, rtol=1e-12, atol=1e-25)
    np.testing.assert_allclose(np.linalg.norm(m, axis=0), 1, rtol=1e-14)
    other = ((vvma_dense(m + 1e-3 * rng.standard_normal(m.shape), v) - padded) ** 2).sum()
    assert other >= residual - 1e-12
    assert project_to_vvma(vvma_dense(m, v), k=k)[2] < 1e-24
    best = 0.0  # the trailing singular values, column by column
    for c in range(k):
        stack = np.stack([t[:, c] for r in np.split(padded, len(padded) // k) for t in
                          np.split(r, padded.shape[1] // k, axis=1)], axis=1)  # fmt: skip
        best += (np.linalg.svd(stack, compute_uv=False)[1:] ** 2).sum()
    np.testing.assert_allclose(residual, best, rtol=1e-12, atol=1e-25)


def law_vvma_families_are_not_nested():
    """A 4 x 4 matrix that k = 4 and k = 1 represent and k = 2 does not."""
    w = np.diag([1.0, 1, 0, 0]) + np.diag([1.0, 1, 1], k=1)
    assert project_to_vvma(w, k=1)[2] < 1e-25
    assert project_to_vvma(w, k=4)[2] < 1e-25
    assert project_to_vvma(w, k=2)[2] > 0.1


@given(seeds)
def law_vvma_cells_are_the_ordinary_ones_on_dense_matrices(seed):
    rng = np.random.default_rng(seed)
    n = lambda *shape: rng.standard_normal(shape)
    x, h, c, m = n(2, 7), n(2, 5), n(2, 5), 0.5 * n(3, 3)
    p = VvmaLSTMParams(m, n(4, 2, 3, 3), n(4, 2, 2, 3), n(4, 5))
    gates = [x @ dense(m, p.v_x[g], 7, 5).T + h @ dense(m, p.v_h[g], 5, 5).T + p.bias[g] for g in range(4)]
    s = lambda z: 1 / (1 + np.exp(-z))
    want_c = s(gates[1]) * c + s(gates[0]) * np.tanh(gates[2])
    want_h = s(gates[3]) * np.tanh(want_c)
    got_h, state = vvma_lstm_cell(x, (h, c), p)
    # pre-activations of some tens carry an error of a few dozen ulps; the slopes are at most 1
    for got, want in ((got_h, want_h), (state[0], want_h), (state[1], want_c)):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * max(1, np.abs(c).max()))
    q = VvmaMLPParams(m, n(3, 3, 3), n(8), n(2, 3, 3), n(5))
    hidden = np.maximum(x @ dense(m, q.v_1, 7, 8).T + q.bias_1, 0)
    want = hidden @ dense(m, q.v_2, 8, 5).T + q.bias_2
    np.testing.assert_allclose(vvma_mlp(x, q), want, rtol=0, atol=1e-12 * max(1, np.abs(want).max()))
    a = VvmaAttentionParams(m, n(4, 2, 2, 3), n(4, 6))
    y, mask = n(4, 6), np.tri(4, dtype=bool)
    maps = [lambda t, g=g: t @ dense(m, a.v[g], 6, 6).T + a.bias[g] for g in range(4)]
    heads = attention_dense(*(split_heads(f(y), 2) for f in maps[:3]), mask=mask)
    want = maps[3](join_heads(heads))
    got = vvma_attention(y, a, num_heads=2, mask=mask)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * max(1, np.abs(want).max()))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 40), st.booleans())
def law_vvma_cost_counts_loads_and_is_never_above_dense_at_batch_one(n_in, n_out, k, batch, overlap):
    one = vvma_cost(n_in, n_out, k=k, overlap=overlap)
    i, j = -(-n_out // k), -(-n_in // k)
    if k >= 2 and i * j >= 2:
        assert one.cycles_vvma <= one.cycles_dense
    cost = vvma_cost(n_in, n_out, k=k, batch=batch, overlap=overlap)
    assert cost.params == i * j * k + k * k == sum(a.size for a in _params(n_in, n_out, k)[:2])
    assert cost.params_dense == n_in * n_out
    assert cost.macs == batch * (i * j * k + i * k**2)
    wider = vvma_cost(n_in + k, n_out, k=k, batch=batch, overlap=overlap)
    assert wider.cycles_dense > cost.cycles_dense
    assert wider.cycles_vvma >= cost.cycles_vvma


def _params(n_in, n_out, k):
    return init_vvma(np.random.default_rng(0), n_in, n_out, k=k)


def law_vvma_cost_cycles_by_hand():
    """Two by three tiles of 4: loads 24, fill 7; one load, 6 vector products."""
    assert vvma_cost(12, 8, k=4).cycles_dense == 6 * 4 + 7
    assert vvma_cost(12, 8, k=4).cycles_vvma == 4 + 7 + 6
    assert vvma_cost(12, 8, k=4, overlap=False).cycles_dense == 6 * (4 + 1) + 7
    assert vvma_cost(12, 8, k=4, overlap=False).cycles_vvma == 4 + 7 + 2 + 6
    # far above k vectors the dense array has paid for its loads, and VVMA's vector unit is the bottleneck
    assert vvma_cost(1024, 1024, k=32, batch=1).cycles_dense > 20 * vvma_cost(1024, 1024, k=32).cycles_vvma
    big = vvma_cost(1024, 1024, k=32, batch=4096)
    assert abs(big.cycles_dense / big.cycles_vvma - 1) < 1e-3


@given(seeds)
def law_vvma_init_has_the_variance_of_a_dense_layer(seed):
    p = init_vvma(np.random.default_rng(seed), 256, 256, k=64)
    w = vvma_dense(p.m, p.v)
    # entries share M and v: an effective sample of about k^2 M-entries, each of relative spread sqrt(8)
    assert abs(w.var() * 256 - 1) < 6 * np.sqrt(8) / 64
