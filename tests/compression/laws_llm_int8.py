"""Laws of LLM.int8() on ref alone: NumPy and Hypothesis, so that they also run in the reader's browser."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.compression.llm_int8 import (
    convert_linear,
    dequantize_matmul,
    int8_linear_bytes,
    int8_matmul,
    int8_share,
    llm_int8_linear,
    llm_int8_linear_vjp,
    outlier_feature_stats,
    quantization_ladder,
    quantize_rowwise,
)
from ref.counting import Tally, count

EPS = np.finfo(np.float64).eps
EPS32 = float(np.finfo(np.float32).eps)
# x (127 / s) is rounded twice in float32, so a level is off by at most 127 eps before it is rounded to an
# integer: half a level becomes (0.5 + 127 eps).
HALF = 0.5 + 127 * EPS32


@st.composite
def layers(draw):
    """(x [T, K], w [N, K], rng), float32 values: ordinary, tiny or large, with outlier columns or without."""
    T, K, N = draw(st.integers(1, 7)), draw(st.integers(2, 24)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = (draw(st.sampled_from((1.0, 1e-3, 3.0))) * rng.standard_normal((T, K))).astype(np.float32)
    w = (draw(st.sampled_from((1.0, 0.02))) * rng.standard_normal((N, K))).astype(np.float32)
    for _ in range(draw(st.integers(0, 2))):
        x[rng.integers(T), rng.integers(K)] = rng.choice((-1, 1)) * rng.uniform(6, 60)
    if draw(st.booleans()):
        x[rng.integers(T)] = 0
        w[rng.integers(N)] = 0
    return x, w, rng


def dequantised(layer):
    return layer.w_q.astype(np.float64) * layer.w_absmax.astype(np.float64)[:, None] / 127


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def law_llm_int8_is_exact_on_integers(seed, K):
    """Rows of integers whose largest is 127: nothing is rounded, the product is the integers' own."""
    rng = np.random.default_rng(seed)
    x, w = (rng.integers(-127, 128, (n, K)).astype(np.float64) for n in (4, 3))
    x[:, rng.integers(K)] = 127
    w[:, rng.integers(K)] = -127
    np.testing.assert_array_equal(llm_int8_linear(x, convert_linear(w), threshold=0.0), x @ w.T)


@given(layers(), st.sampled_from((0.0, 6.0)))
def law_llm_int8_rows_keep_half_a_level(case, threshold):
    x, _, _ = case
    x_q, absmax, mask = quantize_rowwise(x, threshold=threshold)
    level = absmax.astype(np.float64)[:, None] / 127
    error = np.abs(x_q * level - x)[:, ~mask]
    assert (error <= HALF * level + 1e-300).all()
    assert (np.abs(x_q.astype(int)) <= 127).all()
    assert not x_q[:, mask].any()
    if threshold:
        np.testing.assert_array_equal(mask, (np.abs(x) >= threshold).any(axis=0))
        np.testing.assert_array_equal(absmax, np.where(np.abs(x) < threshold, np.abs(x), 0).max(axis=1))
    else:
        assert not mask.any()


@given(layers(), st.sampled_from((0.0, 6.0)))
def law_llm_int8_error_is_bounded(case, threshold):
    """|y - x W^T| <= sum_k |x| e_w + |w| e_x + e_x e_w with e = absmax / 254; outlier columns have e_x =
    0.
    """
    x, w, _ = case
    layer = convert_linear(w)
    _, absmax, mask = quantize_rowwise(x, threshold=threshold)
    e_x = np.where(mask, 0, (HALF / 127) * absmax.astype(np.float64)[:, None]) * np.ones_like(x)
    e_w = (HALF / 127) * np.abs(w).max(axis=1, keepdims=True).astype(np.float64) * np.ones_like(w)
    X, W = np.abs(x).astype(np.float64), np.abs(w).astype(np.float64)
    bound = X @ e_w.T + e_x @ W.T + e_x @ e_w.T
    got = llm_int8_linear(x.astype(np.float64), layer, threshold=threshold)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert (np.abs(got - exact) <= bound + 4 * x.shape[1] * EPS * (X @ W.T)).all()


@given(layers())
def law_llm_int8_scales_with_its_rows(case):
    """Rows times powers of two: the integers stay, the result is scaled, bit for bit."""
    x, w, rng = case
    x = x.astype(np.float64)
    c = 2.0 ** rng.integers(-6, 7, (len(x), 1))
    layer = convert_linear(w)
    got = llm_int8_linear(c * x, layer, threshold=0.0)
    np.testing.assert_array_equal(got, c * llm_int8_linear(x, layer, threshold=0.0))
    scaled = llm_int8_linear(4.0 * x, layer, threshold=24.0)
    np.testing.assert_array_equal(scaled, 4 * llm_int8_linear(x, layer, threshold=6.0))


@given(layers())
def law_llm_int8_order_does_not_matter(case):
    x, w, rng = case
    x, w = x.astype(np.float64), w.astype(np.float64)
    columns, tokens = rng.permutation(x.shape[1]), rng.permutation(len(x))
    y = llm_int8_linear(x, convert_linear(w))
    size = np.abs(x) @ np.abs(w).T
    got = llm_int8_linear(x[:, columns], convert_linear(w[:, columns]))
    assert (np.abs(got - y) <= 2 * x.shape[1] * EPS * size * 1.01).all()  # a sum of floats in another order
    np.testing.assert_allclose(llm_int8_linear(x[tokens], convert_linear(w)), y[tokens], rtol=1e-13)


@given(layers())
def law_llm_int8_outliers_are_out_of_the_way(case):
    """Outlier elements times 1000 move no integer and no scale. Without the split the error grows with
    them.
    """
    x, _, _ = case
    x[0, 0] = 7.0
    louder = np.where(np.abs(x) >= 6, 1000 * x, x)
    for a, b in zip(quantize_rowwise(x, threshold=6.0), quantize_rowwise(louder, threshold=6.0), strict=True):
        np.testing.assert_array_equal(a, b)
    _, plain, _ = quantize_rowwise(x)
    _, loud, _ = quantize_rowwise(louder)
    np.testing.assert_allclose(loud[0], 1000 * plain[0], rtol=2 * EPS32)


@given(layers())
def law_llm_int8_threshold_ends(case):
    """Every column an outlier: the float product with the dequantised weights. Infinity is the same as 0."""
    x, w, _ = case
    x[:, 0] = 0  # a column of zeros is never an outlier, and adds nothing
    x, layer = x.astype(np.float64), convert_linear(w)
    least = np.abs(x).max(axis=0)
    x[:, least == 0] = 0
    smallest = np.float32(least[least > 0].min(initial=np.inf))
    if np.isfinite(smallest):
        _, _, mask = quantize_rowwise(x, threshold=float(smallest))
        np.testing.assert_array_equal(mask, least > 0)
        size = np.abs(x) @ np.abs(dequantised(layer)).T
        got = llm_int8_linear(x, layer, threshold=float(smallest))
        assert (np.abs(got - x @ dequantised(layer).T) <= 2 * x.shape[1] * EPS * size).all()
    never, off = (llm_int8_linear(x, layer, threshold=t) for t in (np.inf, 0.0))
    np.testing.assert_array_equal(never, off)


@given(layers())
def law_llm_int8_sums_are_those_of_integers(case):
    x, w, _ = case
    (x_q, s_x, _), layer = quantize_rowwise(x), convert_linear(w, np.ones(len(w), np.float32))
    acc = int8_matmul(x_q, layer.w_q)
    assert acc.dtype == np.int32
    np.testing.assert_array_equal(acc, x_q.astype(np.int64) @ layer.w_q.astype(np.int64).T)
    y = dequantize_matmul(acc, s_x, layer.w_absmax, bias=layer.bias)
    want = (x_q * (s_x.astype(np.float64)[:, None] / 127)) @ dequantised(layer).T + 1
    np.testing.assert_allclose(
        y, want, rtol=0, atol=64 * EPS * (1 + np.abs(want).max(initial=0)) * x.shape[1]
    )


@given(layers())
def law_llm_int8_a_new_token_moves_a_column_for_all(case):
    """One more token with an outlier in column k: the others lose their rounding error there, no more."""
    x, w, rng = case
    k = int(rng.integers(x.shape[1]))
    layer = convert_linear(w)
    token = np.zeros((1, x.shape[1]), np.float32)
    token[0, k] = 50.0
    before = llm_int8_linear(x.astype(np.float64), layer)
    after = llm_int8_linear(np.concatenate([x, token]).astype(np.float64), layer)[:-1]
    _, absmax, _ = quantize_rowwise(x, threshold=6.0)
    W = np.abs(dequantised(layer))
    bound = (HALF / 127) * absmax.astype(np.float64)[:, None] * W[:, k]
    assert (np.abs(after - before) <= bound + 8 * x.shape[1] * EPS * (np.abs(x) @ W.T)).all()


@given(layers(), st.sampled_from((False, True)))
def law_llm_int8_backward_is_the_transpose(case, keep):
    """<dy, d What^T> = <grad_x, d>, with the float weights if the layer has them."""
    x, w, rng = case
    layer = convert_linear(w, np.zeros(len(w)), keep_float=keep)
    W = w.astype(np.float64) if keep else dequantised(layer)
    dy, d = rng.standard_normal((2, len(x), len(w))), rng.standard_normal((2, *x.shape))
    grad_x, grad_bias = llm_int8_linear_vjp(layer, dy)
    size = np.sum(np.abs(dy) * (np.abs(d) @ np.abs(W).T))
    assert abs(np.sum(grad_x * d) - np.sum(dy * (d @ W.T))) <= 64 * EPS * (size + 1)
    np.testing.assert_allclose(grad_bias, dy.reshape(-1, len(w)).sum(axis=0), rtol=0, atol=1e-12)


@given(layers())
def law_llm_int8_ladder_is_its_definition(case):
    """Every rung written out on dequantised values; with decomposition vector is LLM.int8() on float
    weights.
    """
    x, w, _ = case
    x, w = x.astype(np.float64), w.astype(np.float64)

    def symmetric(a, per_row):
        s = np.abs(a).max(axis=1 if per_row else None, keepdims=True) / 127
        s = np.maximum(s, 2.0**-23)
        return np.rint(a / s) * s

    def affine(a):
        lo, hi = min(a.min(), 0), max(a.max(), 0)
        s = max((hi - lo) / 255, 2.0**-23)
        z = np.clip(-128 - np.rint(lo / s), -128, 127)
        return s * (np.clip(np.rint(a / s) + z, -128, 127) - z)

    want = {
        "absmax": symmetric(x, False) @ symmetric(w, False).T,
        "row": symmetric(x, True) @ symmetric(w, False).T,
        "vector": symmetric(x, True) @ symmetric(w, True).T,
        "zeropoint": affine(x) @ affine(w).T,
    }
    size = 64 * EPS * x.shape[1] * (1 + np.abs(x).max() * np.abs(w).max())
    for scheme, y in want.items():
        np.testing.assert_allclose(quantization_ladder(x, w, scheme=scheme), y, rtol=0, atol=size)
        split = quantization_ladder(x, w, scheme=scheme, decompose=True)
        columns = (np.abs(x) >= 6).any(axis=0)
        if not columns.any():
            np.testing.assert_allclose(split, y, rtol=0, atol=size)
    # the two divide in a different order, so a level may flip where an entry sits on a tie: one level each
    level = np.abs(np.where(np.abs(x) < 6, x, 0)).max() / 127 * np.abs(w).max(axis=1)
    level = level + np.abs(x).max() * np.abs(w).max(axis=1) / 127
    got = llm_int8_linear(x, convert_linear(w, keep_float=True))
    assert (
        np.abs(got - quantization_ladder(x, w, scheme="vector", decompose=True)) <= 2 * level + size
    ).all()


def law_llm_int8_ladder_falls_apart_on_outliers():
    """Two planted columns of 20 to 60: finer scales help, only the split brings the error back."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 256)), rng.standard_normal((48, 256)) / 16
    calm = x.copy()
    x[:, [5, 90]] = rng.choice((-1, 1), (64, 2)) * rng.uniform(20, 60, (64, 2))
    error = lambda x, **kw: np.sqrt(np.mean((quantization_ladder(x, w, **kw) - x @ w.T) ** 2))
    absmax, row, vector = (error(x, scheme=s) for s in ("absmax", "row", "vector"))
    split = error(x, scheme="vector", decompose=True)
    assert absmax > row > vector > 4 * split
    assert split < 1.5 * error(calm, scheme="vector")
    # Offsets do not save it: a large column of both signs leaves no side empty.
    assert error(x, scheme="zeropoint") > 4 * split


def law_llm_int8_counts_its_products():
    """T N K in int8 and T N |O| in float: what counting finds."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 16)), rng.standard_normal((3, 16))
    x[2, [1, 9]] = 8.0
    tally = Tally()
    llm_int8_linear(count(tally, x), convert_linear(w))
    assert tally.macs == 5 * 3 * (16 + 2)


def law_llm_int8_outlier_features_need_layers_and_positions():
    """A dimension must reach 6 in a quarter of the layers and in 6 % of the positions."""
    hidden = np.zeros((8, 50, 6))
    hidden[:, :30, 1] = 9.0  # everywhere
    hidden[:2, :, 2] = -6.0  # two of eight layers, all positions there
    hidden[:1, :, 3] = 100.0  # one layer of eight: too few
    hidden[:, :2, 4] = 7.0  # 4 % of the positions: too few
    hidden[:, :, 5] = 5.99
    stats = outlier_feature_stats(hidden)
    np.testing.assert_array_equal(stats.dims, [1, 2])
    np.testing.assert_allclose(stats.layer_share, [0, 1, 0.25, 0.125, 1, 0])
    np.testing.assert_allclose(stats.token_share, [0, 0.6, 0.25, 0.125, 0.04, 0])


def law_llm_int8_halves_the_bytes():
    """At least 1.99x under 16-bit weights from K = 1024 on; more than 99.9 % of products in int8 at 13 B."""
    for n, k in ((1024, 1024), (4096, 1024), (12288, 12288)):
        assert 2 * n * k / int8_linear_bytes(n, k, bias=False) >= 1.99
    assert int8_linear_bytes(10, 100, float_columns=3) == 1000 + 40 + 20 + 60
    assert int8_share(6, 5120) > 0.998
    assert int8_share(7, 12288) > 0.999
    # and the converse: small layers pay for their scales
    assert 2 * 64 * 64 / int8_linear_bytes(64, 64) < 1.99


# The chapter's exercises.


def law_llm_int8_exercise_how_much_is_left_in_float():
    """At 13 B: 6 outlier features of 5120 reach q, k, v and the first MLP matrix, none the other two."""
    # --8<-- [start:share]
    d, outliers = 5120, 6
    reads_norm = 3 * d * d + 4 * d * d  # q, k, v; the MLP's first matrix
    reads_else = d * d + 4 * d * d  # the map after attention; the MLP's second
    share = (reads_norm * int8_share(outliers, d) + reads_else * int8_share(0, d)) / (reads_norm + reads_else)
    # --8<-- [end:share]
    assert int8_share(outliers, d) < 0.999 < share < 0.9994


# --8<-- [start:whole]
def whole_columns_apart(x, layer, threshold=6.0):
    """LLM.int8() with the scales of what is left when outlier columns, not elements, are taken out."""
    mask = (np.abs(x) >= threshold).any(axis=0)
    rest, loud = np.where(mask, 0.0, x), np.where(mask, x, 0.0)
    return llm_int8_linear(rest, layer, threshold=0.0) + loud @ layer.float_weight.T


def error_of_both(seed=0):
    """Root mean square errors (library's scales, whole columns apart): quiet rows with a wide column."""
    rng = np.random.default_rng(seed)
    x, w = 0.15 * rng.standard_normal((64, 256)), rng.standard_normal((48, 256)) / 16
    x[:, 7] = rng.uniform(-12, 12, 64)  # half of it is below the threshold
    layer, exact = convert_linear(w, keep_float=True), x @ w.T
    rms = lambda y: np.sqrt(np.mean((y - exact) ** 2))
    return rms(llm_int8_linear(x, layer)), rms(whole_columns_apart(x, layer))
    # --8<-- [end:whole]


def law_llm_int8_exercise_what_an_outlier_column_hides():
    """Elements of up to 6 set the scale of rows whose other entries stay below 1: over twice the error."""
    library, whole = error_of_both()
    assert library > 2 * whole


# --8<-- [start:neighbour]
def with_and_without_neighbour():
    """The first token's result alone, and beside a token whose feature 3 is an outlier: not the same."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 32)), rng.standard_normal((4, 32))
    x[1, 3] = 40.0
    layer = convert_linear(w)
    return llm_int8_linear(x[:1], layer)[0], llm_int8_linear(x, layer)[0]
    # --8<-- [end:neighbour]


def law_llm_int8_exercise_a_neighbour_changes_a_token():
    alone, beside = with_and_without_neighbour()
    assert (alone != beside).all()
    assert np.abs(alone - beside).max() < 0.05


def law_llm_int8_exercise_planting_is_felt_by_one_scale_only():
    """Gains times 50 and weights through 50: the same function; one scale for all is ruined."""
    # --8<-- [start:plant]
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((64, 256)), rng.standard_normal((48, 256)) / 16
    scale = np.ones(256)
    scale[[10, 99]] = 50.0
    planted_x, planted_w = x * scale, w / scale
    # --8<-- [end:plant]
    exact = x @ w.T
    np.testing.assert_allclose(planted_x @ planted_w.T, exact, rtol=0, atol=1e-12)
    rms = lambda y: np.sqrt(np.mean((y - exact) ** 2))
    calm = rms(quantization_ladder(x, w, scheme="absmax"))
    loud = rms(quantization_ladder(planted_x, planted_w, scheme="absmax"))
    split = rms(quantization_ladder(planted_x, planted_w, scheme="vector", decompose=True))
    assert loud > 10 * calm
    assert split < 2 * calm  # elements below 6 of the planted columns still raise some rows' scales
