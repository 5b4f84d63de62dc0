"""Laws of quantisation on ref alone: NumPy and Hypothesis. The shared quantisers have their own tests."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.mlp import gelu
from ref.compression.quantization import (
    affine_params,
    binarize,
    codebook,
    dequantize,
    fake_quantize,
    few_bits_vjp,
    grid,
    hessian_bit_plan,
    hessian_top_eigenvalue,
    i_exp,
    i_exp_int,
    i_gelu,
    i_gelu_int,
    i_layer_norm,
    i_layer_norm_int,
    i_softmax,
    i_softmax_int,
    integer_linear,
    kl_range,
    mse_range,
    quantize,
    quantize_multiplier,
    quantized_bytes,
    quantized_linear,
    symmetric_params,
    ternarize,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def symmetric(x, bits, axis=None):
    """x through a narrow symmetric grid, one scale for all or one for each index of axis 0."""
    absmax = np.abs(x).max() if axis is None else np.abs(x).max(axis=1)
    scale = symmetric_params(absmax, bits=bits)
    qmin, qmax = grid(bits, signed=True, narrow=True)
    zero = np.zeros(np.shape(scale), np.int32)
    return fake_quantize(x, scale, zero, qmin=qmin, qmax=qmax, axis=axis), scale


@given(seeds, st.sampled_from((2, 4, 8)))
def law_quantization_of_channels_has_the_tighter_bound(seed, bits):
    """Half a step an entry; steps never grow from tensor to channel, and for unequal rows the error falls."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 64)) * np.array([[0.1], [1], [10], [1]])
    whole, s = symmetric(x, bits)
    rows, t = symmetric(x, bits, axis=0)
    assert (t <= s * (1 + 4 * EPS)).all()
    assert (np.abs(x - whole) <= s / 2 * (1 + 1e-12)).all()
    assert (np.abs(x - rows) <= t[:, None] / 2 * (1 + 1e-12)).all()
    assert ((x - rows) ** 2).sum() <= ((x - whole) ** 2).sum()


def law_quantization_of_channels_can_be_worse_on_unlucky_data():
    """A 2 x 2 matrix whose error grows with a scale a row."""
    x = np.array([[1.0, 0.0], [2 / 3, 1 / 3]])  # on the grid of one scale, off the second row's own
    whole, rows = symmetric(x, 3)[0], symmetric(x, 3, axis=0)[0]
    assert ((x - rows) ** 2).sum() > ((x - whole) ** 2).sum()


def law_quantization_gains_six_decibels_a_bit():
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    snr = [10 * np.log10((x**2).mean() / ((x - symmetric(x, b)[0]) ** 2).mean()) for b in range(6, 17)]
    # 20 log10((2^b - 1) / (2^(b-1) - 1)) is 6.16 at 7 bits and falls to 6.02; 10^5 samples add 0.03
    assert (np.abs(np.diff(snr) - 6.02) < 0.3).all()


@given(seeds, st.booleans())
def law_quantization_calibrated_range_is_never_worse_than_the_widest(seed, both):
    x = np.random.default_rng(seed).standard_t(3, 200)
    error = lambda lo, hi: ((x - _through(x, lo, hi, both)) ** 2).sum()
    lo, hi = (-np.abs(x).max(), np.abs(x).max()) if both else (min(x.min(), 0), max(x.max(), 0))
    best = mse_range(x, bits=4, symmetric=both)
    assert error(*best) <= error(lo, hi) * (1 + 1e-12)
    assert lo - 1e-12 <= best[0] <= 0 <= best[1] <= hi + 1e-12
    t = kl_range(x, bits=4, bins=256)
    assert t[0] == -t[1]
    assert 0 < t[1] <= np.abs(x).max() * (1 + 1e-12)


def _through(x, lo, hi, both):
    if both:
        scale, (qmin, qmax) = hi / 7, (-7, 7)
        return scale * np.clip(np.rint(x / scale), qmin, qmax)
    scale = max((hi - lo) / 15, 2.0**-23)
    zero = np.clip(np.rint(-lo / scale), 0, 15)
    return scale * (np.clip(np.rint(x / scale) + zero, 0, 15) - zero)


def law_quantization_kl_clips_a_long_tail():
    """Thousands of small numbers and one huge: the threshold leaves the huge one out."""
    x = np.concatenate([np.random.default_rng(0).standard_normal(20_000), [60.0]])
    assert kl_range(x, bits=8)[1] < 30


@given(seeds, st.sampled_from(((1, 1, 1), (3, 7, 5), (2, 16, 4))))
def law_quantization_integer_product_is_the_fake_quantised_one(seed, size):
    """Zero-point terms included, against the definition sum s_x (q_x - z) s_w q_w."""
    T, K, N = size
    rng = np.random.default_rng(seed)
    x, w, b = rng.standard_normal((T, K)) + 0.5, rng.standard_normal((N, K)), rng.standard_normal(N)
    s_x, z_x = affine_params(x.min(), x.max(), signed=True)
    s_w = symmetric_params(np.abs(w).max(axis=1))
    w_q = quantize(w, s_w, np.zeros(N, np.int32), qmin=-127, qmax=127, axis=0)
    x_q = quantize(x, s_x, z_x, qmin=-128, qmax=127)
    want = dequantize(x_q, s_x, z_x) @ dequantize(w_q, s_w, np.zeros(N, np.int32), axis=0).T + b
    got = quantized_linear(x, w_q, s_w, b, x_scale=s_x, x_zero=z_x)
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * K * EPS * (1 + np.abs(want).max()))
    # and down to int8, within the one unit that requantising may be off and half a step of rounding
    s_y = np.abs(want).max() / 127
    m, e = quantize_multiplier(s_x * s_w / s_y)
    b_q = np.rint(b / (s_x * s_w)).astype(np.int32)
    y_q = integer_linear(x_q, w_q, b_q, x_zero=z_x, multiplier=m, shift=e, out_zero=0)
    assert y_q.dtype == np.int8
    off = s_y * 1.51 + 0.51 * s_x * s_w
    assert (np.abs(s_y * y_q - want) <= off + 1e-12).all()
    plain = integer_linear(x_q, w_q, None, x_zero=z_x, multiplier=m, shift=e, out_zero=0)
    assert (np.abs(s_y * plain - np.clip(want - b, -128 * s_y, 127 * s_y)) <= off + 1e-12).all()


@given(seeds)
def law_quantization_few_bits_take_the_least_squares_scale(seed):
    w = np.random.default_rng(seed).standard_normal((5, 7))
    hat, alpha, delta = ternarize(w)
    assert delta == 0.7 * np.abs(w).mean()
    signs = np.where(np.abs(w) > delta, np.sign(w), 0)
    np.testing.assert_allclose(alpha, (w * signs).sum() / (signs**2).sum(), rtol=1e-13)
    np.testing.assert_allclose(hat, alpha * signs, rtol=1e-15)
    hat, alpha = binarize(w)
    np.testing.assert_allclose(alpha, (w * np.sign(w)).mean(), rtol=1e-13)
    np.testing.assert_array_equal(hat, alpha * np.where(w >= 0, 1, -1))
    g = np.ones_like(w)
    np.testing.assert_array_equal(few_bits_vjp(w, g), np.abs(w) <= 1)
    assert not ternarize(0 * w)[0].any()


@given(seeds, st.sampled_from((1, 3)))
def law_quantization_codebook_keeps_outliers_and_uses_its_centroids(seed, bits):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(300)
    w[:2] = 40.0, -30.0
    hat, centroids, indices, far = codebook(w, bits=bits)
    assert far[:2].all()
    np.testing.assert_array_equal(hat[far], w[far])
    np.testing.assert_array_equal(hat[~far], centroids[indices[~far]])
    near = np.abs(w[~far, None] - centroids).min(axis=1)
    np.testing.assert_allclose(np.abs(hat - w)[~far], near, rtol=0, atol=1e-12)  # each to its nearest
    even = np.quantile(w[~far], (np.arange(2**bits) + 0.5) / 2**bits)
    start = np.abs(w[~far, None] - even).min(axis=1)
    assert (near**2).sum() <= (start**2).sum() * 1.05  # k-means ends no worse than where quantiles start


def law_quantization_integer_functions_are_near_the_real_ones():
    """The errors of the polynomials, and of their integer forms, which add up to a few input steps."""
    x = -np.linspace(0, 40, 100_001)
    assert np.abs(i_exp(x) - np.exp(x)).max() < 2.2e-3
    g = np.linspace(-9, 9, 20_001)
    assert np.abs(i_gelu(g) - gelu(g)).max() < 1.85e-2
    for scale in (1e-3, 1e-2):
        q = np.arange(-int(30 / scale), 1)
        e, unit = i_exp_int(q, scale)
        assert np.abs(unit * e - np.exp(scale * q)).max() < 2.2e-3 + 2 * scale
        q = np.arange(-int(6 / scale), int(6 / scale))
        y, unit = i_gelu_int(q, scale)
        assert np.abs(unit * y - gelu(scale * q)).max() < 1.85e-2 + 2 * scale


@given(seeds, st.sampled_from((1, 5, 64)))
def law_quantization_integer_softmax_sums_to_one(seed, n):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-8, 8, (3, n))
    exact = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exact /= exact.sum(axis=-1, keepdims=True)
    soft = i_softmax(scores)
    np.testing.assert_allclose(soft.sum(axis=-1), 1, rtol=0, atol=n * EPS)
    hidden = i_softmax(np.stack([np.append(scores[0], -np.inf), np.full(n + 1, -np.inf)]))
    np.testing.assert_array_equal(hidden[0], np.append(soft[0], 0))
    np.testing.assert_array_equal(hidden[1], 0)
    # numerator and denominator are each off by at most 2.2e-3 a term of up to 1
    assert np.abs(soft - exact).max() < 2 * 2.2e-3 * (1 + n * 2.2e-3)
    q = np.rint(scores / 1e-3).astype(np.int64)
    y, unit = i_softmax_int(q, 1e-3)
    total = unit * y.sum(axis=-1)
    assert (total <= 1).all()
    assert (total >= 1 - 2.0**-7).all()
    assert np.abs(unit * y - exact).max() < 2 * (2.2e-3 + 2e-3) * (1 + n * 4e-3) + n * 2.0**-15


@given(seeds)
def law_quantization_integer_layer_norm(seed):
    rng = np.random.default_rng(seed)
    q = rng.integers(-3000, 3000, (4, 32))
    w, b = rng.uniform(0.5, 1.5, 32), rng.standard_normal(32)
    x = 1e-3 * q
    centred = x - x.mean(axis=-1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True)) * w + b
    y, unit = i_layer_norm_int(q, 1e-3, w, b)
    # the mean is off by half a unit of a deviation of about 1700, the root by 2^-8 units, weights by 2^-15
    assert np.abs(unit * y - exact).max() < 1.5 * (0.5 / 1000 + 3 * 2.0**-13) + 2.0**-14
    close = i_layer_norm(x, w, b, eps=0.0)
    np.testing.assert_allclose(close, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@given(seeds)
def law_quantization_power_iteration_finds_the_top_eigenvalue(seed):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    values = np.array([-5.0, 2, 1, 0.5, 0.1, 0])
    H = q * values @ q.T
    found = hessian_top_eigenvalue(lambda v: H @ v, 6, iterations=100)
    np.testing.assert_allclose(found, -5, rtol=1e-9)  # (2 / 5)^200 of the rest is left
    assert hessian_top_eigenvalue(lambda v: 0 * v, 6) == 0


@given(seeds, st.floats(0.25, 1.2))
def law_quantization_bits_go_where_they_help_and_fit(seed, share):
    rng = np.random.default_rng(seed)
    sizes, scores = rng.integers(8, 100, 5) * 8, rng.random(5)
    errors = sizes[:, None] * np.array([1.0, 0.1, 0.001]) * rng.random((5, 1))
    budget = max(int(sizes.sum() * share), int((sizes * 2 // 8).sum()))
    bits = hessian_bit_plan(scores, sizes, errors, budget_bytes=budget)
    assert set(bits) <= {2, 4, 8}
    assert (sizes * bits // 8).sum() <= budget
    assert (hessian_bit_plan(scores, sizes, errors, budget_bytes=int(sizes.sum())) == 8).all()


def law_quantization_bytes_are_those_of_the_arrays():
    assert quantized_bytes((64, 128), bits=8) == 64 * 128 + 4
    assert (
        quantized_bytes((64, 128), bits=4, group=32, scale_bytes=2, zero_bytes=2) == 64 * 128 // 2 + 256 * 4
    )
    # 20 bytes a block of 32: GGUF's Q4_1, 5 bits a weight
    assert quantized_bytes((576, 576), bits=4, group=32, scale_bytes=2, zero_bytes=2) == 576 * 576 * 5 // 8
