"""LLM.int8(): laws on ref, golden vectors in ref and accel, kernels, gradients, bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import ref
from accel.blocks import backend
from accel.compression import llm_int8 as module
from ref.catalog import technique
from tests.claims import llm_int8 as claims
from tests.claims.record import is_fresh, load
from tests.compression import laws_llm_int8
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests
from tests.lower import lowered

globals().update(law_tests(laws_llm_int8))

EPS32 = float(np.finfo(np.float32).eps)


def products(x, w):
    """T N K."""
    return x.size * len(w)


def outputs(x, w):
    """Bytes of [T, N] in 32 bits."""
    return 4 * x.size // x.shape[-1] * len(w)


def linear_in_ref(x, layer, *, threshold, **_):
    """ref multiplies the columns that hold an outlier, and no others, a second time."""
    columns = (np.abs(x).reshape(-1, x.shape[-1]) >= threshold).any(axis=0).sum()
    return products(x, layer.w_q) + x.size // x.shape[-1] * len(layer.w_q) * columns


HW = {
    "quantize_rowwise": Cost(
        macs=lambda x, **_: 0,
        bytes=lambda x, **_: size(x) + x.size + 4 * x.size // x.shape[-1] + x.shape[-1],
    ),
    "int8_matmul": Cost(
        macs=products,
        bytes=lambda x_q, w_q: x_q.size + w_q.size + outputs(x_q, w_q),
        bound={"t4": "tensor", "raspberry_pi5": "arithmetic"},  # 2048 tokens share every weight
        large=(("int8", (2048, 4096)), ("int8", (4096, 4096))),
        ref="the counting array is float64, and these are int8",
    ),
    "dequantize_matmul": Cost(
        macs=lambda acc, x_absmax, w_absmax: 0,
        bytes=lambda acc, x_absmax, w_absmax: size(acc, x_absmax, w_absmax) + 4 * acc.size,
    ),
    "llm_int8_linear": Cost(
        # the int8 product, and the float one: over all columns, masked, which is also the dearer branch
        macs=lambda x, layer, **_: 2 * products(x, layer.w_q),
        bytes=lambda x, layer, **_: size(x, *jax.tree.leaves(layer)) + outputs(x, layer.w_q),
        bound={
            "h200": "hbm",
            "orin": "hbm",
            "raspberry_pi5": "dram",
        },  # one token: weights are read for it alone
        large=(
            ("float32", (1, 4096)),
            ref.llm_int8.Int8Linear(("int8", (4096, 4096)), ("float32", (4096,))),
        ),
        options={"threshold": 0.0},
        ref=linear_in_ref,
    ),
    "llm_int8_linear_vjp": Cost(
        macs=lambda layer, grad_y: grad_y.size * layer.w_q.shape[1],
        bytes=lambda layer, grad_y: (
            size(*jax.tree.leaves(layer), grad_y)
            + 4 * grad_y.size // len(layer.w_q) * layer.w_q.shape[1]
            + 4 * len(layer.w_q)
        ),
    ),
    "quantization_ladder": Cost(
        macs=lambda x, w, *, scheme, decompose: (1 + decompose) * products(x, w),
        bytes=lambda x, w, **_: size(x, w) + outputs(x, w),
    ),
}


@golden("llm_int8")
def test_llm_int8_golden_ref(case):
    run(case, ref.llm_int8)


@pytest.mark.parametrize("x64", [False, True], ids=["llm_int8_float32", "llm_int8_float64"])
@golden("llm_int8", only=technique("llm_int8").core)
def test_llm_int8_golden_accel(case, x64):
    run_accel(case, accel.llm_int8, x64=x64)


def problem(seed=0, T=20, K=96, N=24, columns=(3, 50, 77)):
    """x with outliers in `columns`, a layer with bias; T, N no multiple of a tile."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, K)).astype(np.float32)
    for k in columns:
        x[rng.integers(T), k] = 25.0
    w = (rng.standard_normal((N, K)) / 8).astype(np.float32)
    return x, w, rng.standard_normal(N).astype(np.float32), rng


def rounding(x, layer):
    """Scales, their product, the bias and the outliers' sums: 8 + K roundings of the largest term."""
    K = x.shape[-1]
    largest = np.abs(x).max() * layer.w_absmax.max()
    return EPS32 * ((8 + K) * largest + np.abs(x).max() * np.abs(layer.w_absmax).max() * K)


@pytest.mark.parametrize("impl", ["xla", "triton", "tpu"], ids=lambda i: f"llm_int8_{i}")
@pytest.mark.parametrize(
    "most", [None, 8, 2], ids=["llm_int8_masked", "llm_int8_gathered", "llm_int8_too_few"]
)
def test_llm_int8_accel_matches_ref(impl, most):
    """Masked, gathered, and gathered with more outlier columns than asked for: the same product."""
    x, w, b, _ = problem()
    layer = ref.llm_int8.convert_linear(w, b, keep_float=most == 8)
    options = {} if impl == "xla" else {"impl": impl, "interpret": True}
    got = accel.llm_int8.llm_int8_linear(x, layer, max_outliers=most, **options)
    assert got.dtype == jnp.float32
    want = ref.llm_int8.llm_int8_linear(x, layer)
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(x, layer))


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"llm_int8_{i}")
def test_llm_int8_kernel_takes_tiles_and_leading_axes(impl):
    x, w, _, _ = problem(T=66, K=300, N=130, columns=())
    layer = ref.llm_int8.convert_linear(w)
    tiles = {"triton": (32, 16, 64), "tpu": (32, 128, 128)}[impl]
    sizes = dict(zip(("block_t", "block_n", "block_k"), tiles, strict=True))
    call = lambda **kw: accel.llm_int8.llm_int8_linear(x.reshape(2, 33, 300), layer, threshold=0.0, **kw)
    got = call(impl=impl, interpret=True, **sizes)
    assert got.shape == (2, 33, 130)
    np.testing.assert_allclose(got, call(), rtol=0, atol=8 * EPS32 * np.abs(call()).max())


def hopper_matches_ref(T, most):
    """The kernels around the product, in the interpreter: three outlier columns and a row of zeros."""
    x, w, b, _ = problem(T=T, K=300, N=130, columns=(0, 70, 299))
    x = jnp.asarray(x, jnp.bfloat16).at[2].set(0)
    layer = ref.llm_int8.convert_linear(w, b)
    got = module._hopper(x, jax.tree.map(jnp.asarray, layer), 6.0, most, interpret=True)
    x = np.asarray(x, np.float64)
    want = ref.llm_int8.llm_int8_linear(x, layer)
    size = np.abs(want) * 2.0**-8 + rounding(x, layer)  # the result is rounded to bfloat16
    assert (np.abs(np.asarray(got, np.float64) - want) <= size).all()


@pytest.mark.parametrize("most", [None, 2], ids=lambda n: f"llm_int8_{n}_columns")
def test_llm_int8_around_the_product_for_hopper(most, monkeypatch):
    """Outlier columns gathered, or more than were asked for."""
    from accel.kernels import llm_int8_hopper

    def product(x_q, x_absmax, w_q, w_absmax, bias=None, strip=None, *, dtype):
        wide = lambda a: a.astype(jnp.float32)
        y = wide(x_q[:, : w_q.shape[1]]) @ wide(w_q).T * x_absmax[:, None] / 127
        y = (y + wide(strip[0]) @ wide(strip[1]).T) * w_absmax[None] / 127
        return (y + bias[None]).astype(dtype)

    monkeypatch.setattr(llm_int8_hopper, "int8_product", product)
    hopper_matches_ref(70, most)


def test_llm_int8_before_the_product_of_a_few_for_hopper(monkeypatch):
    """What the product may not read is NaN here: other units of x_o, and rows that are not there."""
    from accel.kernels import llm_int8_few_hopper

    def product(x_q, x_absmax, w_q, w_absmax, bias=None, marked=None, *, T, dtype):
        K, wide = w_q.shape[1], lambda a: a.astype(jnp.float32)
        x_o, flags = marked
        assert x_q.shape == x_o.shape == (16, 384)
        x_o = jnp.where(flagged(flags, 128, 384), wide(x_o), 0)[:T, :K]
        y = wide(x_q[:T, :K]) @ wide(w_q).T * x_absmax[:T, None] / 127
        return ((y + x_o @ wide(w_q).T) * w_absmax[None] / 127 + bias[None]).astype(dtype)

    monkeypatch.setattr(llm_int8_few_hopper, "few_product", product)
    hopper_matches_ref(5, None)


def flagged(flags, unit, K):
    """Which of K columns the flags of `quantize_few` allow to be read."""
    from accel.kernels.llm_int8_outliers_triton import UNITS

    return np.repeat((np.asarray(flags)[:, None] >> np.arange(UNITS) & 1) > 0, unit)[:K]


def tied(T, K):
    """bfloat16 [T, K] of whole and half steps of 127ths: every second value sits on a tie."""
    x = np.random.default_rng(1).integers(-254, 255, (T, K)) / 2
    x[:, 0] = 127
    return jnp.asarray(x, jnp.bfloat16)


def few_rows(name, T, K):
    """(x, threshold) of one of the cases of FEW_ROWS."""
    if name == "ties":
        return tied(T, K), 200.0
    columns = {"none": (), "some": (0, 70, K - 1), "most": range(0, K, 3)}[name]
    return jnp.asarray(problem(T=T, K=K, columns=columns)[0], jnp.bfloat16), 6.0


FEW_ROWS = (("none", 1, 128), ("most", 5, 300), ("ties", 3, 300), ("some", 40, 1100))


def rows_of_few_match(x, threshold, **options):
    """Integers, scales, flags and columns of `quantize_few` are those of ref, bit for bit."""
    from accel.kernels.llm_int8_outliers_triton import quantize_few

    (T, K), f32 = x.shape, lambda a: np.asarray(a, np.float32)
    unit = 128
    x_q, absmax, (x_o, flags) = quantize_few(x, threshold=threshold, unit=unit, **options)
    assert x_q.shape == x_o.shape == (T + -T % 16, K + -K % 128)
    want, most, mask = ref.llm_int8.quantize_rowwise(f32(x), threshold=threshold)
    np.testing.assert_array_equal(x_q[:T, :K], want)
    assert not np.asarray(x_q)[:T, K:].any()
    np.testing.assert_array_equal(absmax[:T], most)
    read = flagged(flags, unit, K)
    np.testing.assert_array_equal(
        read, np.repeat(np.pad(mask, (0, -K % unit)).reshape(-1, unit).any(1), unit)[:K]
    )
    np.testing.assert_array_equal(f32(x_o)[:T, :K][:, read], np.where(mask, f32(x), 0)[:, read])
    none, _, apart = quantize_few(x, threshold=float("inf"), unit=unit, **options)
    assert apart is None
    np.testing.assert_array_equal(none[:T, :K], ref.llm_int8.quantize_rowwise(f32(x))[0])


@pytest.mark.parametrize(("name", "T", "K"), FEW_ROWS, ids=[f"llm_int8_{n}_of_{T}" for n, T, _ in FEW_ROWS])
def test_llm_int8_rows_of_few_for_hopper(name, T, K):
    rows_of_few_match(*few_rows(name, T, K), interpret=True)


@pytest.mark.parametrize("few", [False, True], ids=["llm_int8_many", "llm_int8_few"])
def test_llm_int8_rows_with_nan_stay_nan_on_hopper(few):
    from accel.kernels import llm_int8_outliers_triton as kernels

    x = jnp.asarray(problem(T=3, K=40, N=8, columns=(3,))[0], jnp.float16).at[1, 5].set(jnp.nan)
    rows = kernels.quantize_few if few else kernels.quantize_rows
    q, absmax, marks = rows(x, threshold=6.0, unit=128, interpret=True)
    q, absmax = q[:3], absmax[:3]
    assert q.shape == (3, 128)
    assert not q[:, 40:].any()
    np.testing.assert_array_equal(np.isnan(absmax), [False, True, False])
    want, most, mask = accel.llm_int8.quantize_rowwise(x[::2], threshold=6.0)
    np.testing.assert_array_equal(absmax[::2], most)
    np.testing.assert_array_equal(q[::2, :40] if few else np.where(marks, 0, q[::2, :40]), want)
    np.testing.assert_array_equal(marks[1] > 0 if few else marks > 0, [True] if few else mask)


ON_HOPPER = {  # dtype, float_weight kept, and what "auto" takes on a Hopper GPU
    "half_precision": (jnp.bfloat16, False, "hopper"),
    "float32": (jnp.float32, False, "xla"),
    "float_weights": (jnp.float16, True, "xla"),
}


@pytest.mark.parametrize("name", ON_HOPPER, ids=lambda n: f"llm_int8_{n}")
def test_llm_int8_auto_takes_what_can_run_on_hopper(name, monkeypatch):
    """The choice alone: no GPU is there."""
    dtype, keep, impl = ON_HOPPER[name]
    x, w, b, _ = problem(T=4, K=40, N=8, columns=())
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(module, "hopper_obstacle", lambda *_: None)
    taken = []
    monkeypatch.setattr(module, "_linear", lambda *a: taken.append(a[4]))
    layer = ref.llm_int8.convert_linear(w, b, keep_float=keep)
    accel.llm_int8.llm_int8_linear(jnp.asarray(x, dtype), layer)
    assert taken == [impl]


def test_llm_int8_for_hopper_refuses_more_than_it_can_count(monkeypatch):
    """The kernels compute offsets in 32 bits; arrays of no memory stand for large ones."""
    monkeypatch.setattr(module, "hopper_obstacle", lambda *_: None)
    large = lambda dtype, *shape: np.broadcast_to(np.zeros((), dtype), shape)
    scale = large(np.float32, 2**17)
    for T, K, fits in ((1, 2**13, True), (1, 2**14, False), (2**14, 64, False)):
        layer = ref.llm_int8.Int8Linear(large(np.int8, 2**17, K), scale, None, None)
        why = module._no_hopper(large(np.float16, T, K), layer, False, (None,) * 3)
        assert (why is None) == fits


def test_llm_int8_of_few_for_hopper_loads_in_time():
    """A ring shorter than the tiles that share a flag would wait for itself; parts are whole flags."""
    from accel.kernels.llm_int8_few_hopper import FEW, Tiles
    from accel.kernels.llm_int8_outliers_triton import UNITS, _cut

    for T in (1, 16, 17, 33, FEW):
        for N in (8, 130, 12288, 16384, 50257):
            for marked in (False, True):
                tiles = Tiles.fit(T, N, 132, marked)
                assert tiles.stages >= UNITS
                assert 64 <= tiles.high <= 128
                assert tiles.high % 8 == 0
        for K in (128, 4096, 12288):
            rows, columns, _ = _cut(T, K, UNITS * 128)
            assert columns % (UNITS * 128) == 0
            assert rows * 16 >= T


def test_llm_int8_kernels_lower_for_hopper():
    """Many tokens and few, sizes on and off the tiles, with and without outliers."""
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    for T, K, N, threshold in ((200, 520, 300, 6.0), (3, 128, 12288, 0.0), (20, 136, 300, 6.0)):
        layer = ref.llm_int8.Int8Linear(
            shape(jnp.int8, N, K), shape(jnp.float32, N), shape(jnp.float32, N), None
        )
        call = lambda x, layer, threshold=threshold: module._hopper(x, layer, threshold, 20)
        lowered(call, (shape(jnp.bfloat16, T, K), layer), "hopper")


def test_llm_int8_kernel_lowers_for_tpu():
    from accel.kernels.llm_int8_tpu import int8_product

    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    i8, f32 = jnp.int8, jnp.float32
    for T, R in ((20, 7), (1, None)):
        args = shape(i8, T, 576), shape(i8, 24, 576), shape(f32, T), shape(f32, 24), shape(f32, 24)
        strip = None if R is None else (shape(f32, T, R), shape(f32, 24, R))
        lowered(int8_product, (*args, strip), "tpu")


def test_llm_int8_accel_integers_are_those_of_ref_in_every_dtype():
    x, _, _, _ = problem()
    for dtype in (jnp.float32, jnp.bfloat16):
        y = jnp.asarray(x, dtype)
        got = accel.llm_int8.quantize_rowwise(y, threshold=6.0)
        for g, w in zip(got, ref.llm_int8.quantize_rowwise(np.asarray(y), threshold=6.0), strict=True):
            np.testing.assert_array_equal(g, w)
        linear = lambda y: accel.llm_int8.llm_int8_linear(y, ref.llm_int8.convert_linear(x[:3]))
        assert jax.eval_shape(linear, y).dtype == dtype


def test_llm_int8_ladder_accel_matches_ref():
    x, w, _, _ = problem()
    rungs = [(s, split) for s in ("absmax", "zeropoint", "row", "vector") for split in (False, True)]
    each = lambda m: [m.llm_int8.quantization_ladder(x, w, scheme=s, decompose=d) for s, d in rungs]
    for got, want in zip(jax.jit(lambda: each(accel))(), each(ref), strict=True):
        # integers agree (no entry sits on a tie), then a few roundings of terms of this size
        np.testing.assert_allclose(got, want, rtol=0, atol=128 * EPS32 * np.abs(x).max() * np.abs(w).max())


@pytest.mark.parametrize("keep", [False, True], ids=["llm_int8_only", "llm_int8_with_float"])
def test_llm_int8_gradient_is_passed_straight_through(keep):
    """jax.grad equals ref's backward; float weights get grad_y^T x, integers and scales nothing."""
    x, w, b, rng = problem(T=6)
    layer = ref.llm_int8.convert_linear(w, b, keep_float=keep)
    dy = rng.standard_normal((6, 24)).astype(np.float32)
    loss = lambda x, layer: jnp.sum(dy * accel.llm_int8.llm_int8_linear(x, layer, max_outliers=4))
    grad_x, grads = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, layer)
    want_x, want_b = ref.llm_int8.llm_int8_linear_vjp(layer, dy)
    np.testing.assert_allclose(grad_x, want_x, rtol=0, atol=48 * EPS32 * np.abs(want_x).max())
    np.testing.assert_allclose(grads.bias, want_b, rtol=0, atol=12 * EPS32 * np.abs(dy).sum(axis=0).max())
    assert not np.asarray(grads.w_absmax).any()
    if keep:
        want = dy.T.astype(np.float64) @ x
        np.testing.assert_allclose(grads.float_weight, want, rtol=0, atol=12 * EPS32 * np.abs(want).max())


def test_llm_int8_gathers_fewer_products_than_it_masks():
    """What `max_outliers` is for: the compiled float work falls from T N K to T N R, int8 work stays."""
    x, w, b, _ = problem()
    layer = ref.llm_int8.convert_linear(w, b)

    def products(most):
        call = lambda x: accel.llm_int8.llm_int8_linear(x, layer, max_outliers=most)
        dots = [e for e in _equations(jax.make_jaxpr(call)(x)) if e.primitive.name == "dot_general"]
        return sorted((e.outvars[0].aval.dtype.name, e.invars[0].aval.shape[1]) for e in dots)

    assert products(None) == [("float32", 96), ("int32", 96)]
    assert products(8) == [("float32", 8), ("float32", 96), ("int32", 96)]  # one of the float two is run


def _equations(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for sub in jax.tree.leaves(
            list(e.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                yield from _equations(sub if hasattr(sub, "eqns") else sub.jaxpr)


X, W = np.ones((4, 6), np.float32), np.ones((3, 6), np.float32)
LAYER = ref.llm_int8.convert_linear(W)
BAD = {
    "K": ("llm_int8_linear", (X[:, 1:], LAYER), {}, "axis K is 5 in x"),
    "nan": ("llm_int8_linear", (X * np.nan, LAYER), {}, "x must be finite"),
    "infinity": ("quantize_rowwise", (X * np.inf,), {}, "x must be finite"),
    "threshold": ("quantize_rowwise", (X,), {"threshold": -1.0}, "threshold must be at least 0"),
    "empty": ("quantize_rowwise", (X[:0],), {}, "x must not be empty"),
    "weight dtype": ("llm_int8_linear", (X, LAYER._replace(w_q=W)), {}, "w_q must be int8"),
    "integer dtype": ("int8_matmul", (X, LAYER.w_q), {}, "x_q must be int8"),
    "long sums": ("int8_matmul", (np.zeros((1, 133145), np.int8),) * 2, {}, "at most 133144 are safe"),
    "long rows": (
        "llm_int8_linear",
        (
            np.ones((1, 133145), np.float32),
            ref.llm_int8.Int8Linear(np.zeros((1, 133145), np.int8), np.ones(1)),
        ),
        {},
        "at most 133144 are safe",
    ),
    "scales": ("dequantize_matmul", (np.zeros((4, 3), np.int32), np.ones(5), np.ones(3)), {}, "x_absmax"),
    "bias": ("llm_int8_linear", (X, LAYER._replace(bias=np.ones(2))), {}, "bias.shape"),
    "most": ("llm_int8_linear", (X, LAYER), {"max_outliers": 0}, "max_outliers must be None or at least 1"),
    "scheme": ("quantization_ladder", (X, W), {"scheme": "group"}, "scheme must be one of"),
    "ladder K": ("quantization_ladder", (X[:, 1:], W), {"scheme": "row"}, "axis K is 5 in x"),
    "convert": ("convert_linear", (W * np.nan,), {}, "w must be finite"),
    "convert bias": ("convert_linear", (W, np.ones(4)), {}, "axis N is 3 in w"),
    "grad": ("llm_int8_linear_vjp", (LAYER, np.ones((4, 2), np.float32)), {}, "axis N is 2 in grad_y"),
    "share": ("int8_share", (7, 6), {}, r"outliers must be in 0\.\.k"),
}


@pytest.mark.parametrize("layer", [ref, accel], ids=["llm_int8_ref", "llm_int8_accel"])
@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_llm_int8_rejects_bad_input(name, layer):
    fn, args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        getattr(layer.llm_int8, fn)(*args, **options)


def test_llm_int8_impl_asked_by_name_runs_or_says_why_not():
    for impl, error, message in (
        ("cuda", ValueError, "impl must be"),
        ("hopper", NotImplementedError, "takes bfloat16 or float16, not float32"),
        ("tpu", NotImplementedError, "needs a TPU"),
        ("triton", NotImplementedError, "needs a GPU"),
    ):
        if impl == "triton" and jax.default_backend() == "gpu":
            continue
        with pytest.raises(error, match=message):
            accel.llm_int8.llm_int8_linear(X, LAYER, impl=impl)
    with pytest.raises(ValueError, match="tile sizes are for"):
        accel.llm_int8.llm_int8_linear(X, LAYER, block_t=16)
    with pytest.raises(ValueError, match="block_k must be a power of two"):
        accel.llm_int8.llm_int8_linear(X, LAYER, impl="triton", interpret=True, block_k=48)


# The experiment behind the chapter.


def test_llm_int8_claims_script_on_drawn_layers():
    """One seed: every one-format product falls at the first outlier, LLM.int8() does not; bytes halve."""
    calm, loud = claims.drawn(seeds=1, counts=(0, 2), T=32, K=256, N=16)
    for name in claims.SCHEMES:
        assert loud[name] > 4 * calm[name], name
    assert loud[claims.MAIN] < 1.5 * calm[claims.MAIN]
    assert loud[claims.MAIN] < loud[claims.ONLY] < loud["vector-wise"]
    small, large = claims.halves()
    assert small["ratio"] < 1.6
    assert large["ratio"] > 1.99


def test_llm_int8_claims_script_on_a_tiny_network():
    """A network of ref multiplied by rungs: planting leaves float alone, one scale for all feels it most."""
    weights, tokenizer = ref.smollm2.tiny_smollm2()
    louder = {n: 10 * getattr(weights.blocks, n) for n in claims.MATRICES}  # drawn small: logits are flat
    weights = weights._replace(blocks=weights.blocks._replace(**louder))
    ids = tokenizer.encode("Little by little the model reads what was written.")[:16]
    forward = lambda w: ref.smollm2.forward(w, ids)[0]
    planted = claims.plant_llama(weights, count=2)
    want = forward(weights)
    np.testing.assert_allclose(forward(planted), want, rtol=0, atol=1e-10 * np.abs(want).max())
    kl = {}
    for name, network in (("calm", weights), ("planted", planted)):
        runs, shares = claims.llama_runs(network, forward)
        kl[name] = {row["name"]: row["kl"] for row in claims.ladder(ids, runs)}
    assert 0 < shares[claims.MAIN].floats < shares[claims.MAIN].all
    assert kl["planted"]["absmax"] > 4 * kl["calm"]["absmax"]
    assert kl["planted"][claims.MAIN] < kl["planted"]["vector-wise"] < kl["planted"]["absmax"]


def test_llm_int8_claims_script_plants_in_an_encoder():
    """Scaling values up and the map behind them down changes nothing; blocks of rungs nearly nothing."""
    from ref.models.bert import bert_encode, init_bert

    params = init_bert(np.random.default_rng(0), vocab=20, context=8, dim=24, depth=1, std=0.3)
    run = lambda p: bert_encode(np.arange(6), p, num_heads=3)
    want = run(params)
    np.testing.assert_allclose(run(claims.plant_bert(params, count=2)), want, rtol=0, atol=1e-10)
    got = run(claims.bert_rung(params, claims.MAIN, 6.0))
    assert 0 < np.abs(got - want).max() < 0.1


def test_llm_int8_stored_results_are_fresh_and_ordered():
    """What the chapter quotes was measured with this code, and says what the chapter says."""
    assert is_fresh("llm_int8")
    results = load("llm_int8")["results"]
    calm, planted = ({r["name"]: r for r in results["language"][k]} for k in ("as it is", "planted"))
    order = ["absmax", "row-wise", "vector-wise", claims.MAIN]
    for rows in (calm, planted):
        kl = [rows[n]["kl"] for n in order]
        assert kl == sorted(kl, reverse=True)
    assert calm[claims.MAIN]["perplexity"] < 1.03 * calm["float"]["perplexity"]
    assert planted["absmax"]["perplexity"] > 10 * planted["float"]["perplexity"]
    np.testing.assert_allclose(planted["float"]["perplexity"], calm["float"]["perplexity"], rtol=1e-6)
    added = planted[claims.MAIN]["kl"] - calm[claims.MAIN]["kl"]
    assert planted[claims.MAIN]["kl"] - planted[claims.WHOLE]["kl"] > 0.8 * added  # what the chapter explains
    kl = [calm[f"{claims.MAIN} at {t:g}"]["kl"] for t in (1, 2, 4, 6, 10)]
    assert kl == sorted(kl)
    shares = [calm[f"{claims.MAIN} at {t:g}"]["float_share"] for t in claims.THRESHOLDS]
    assert shares == sorted(shares, reverse=True)
    words = {r["name"]: r for r in results["sentences"]["as it is"]}
    assert abs(words[claims.MAIN]["pearson"] - words["float"]["pearson"]) < 0.005
    assert words[claims.MAIN]["cosine"] > 0.999 > words["absmax"]["cosine"]


HOPPER = {  # T, K, N, outlier columns, how many are asked for
    "many": (300, 520, 1000, 5, None),
    "one": (1, 256, 64, 0, None),
    "few": (16, 512, 1000, 4, None),
    "one_column": (2, 128, 128, 1, 1),
    "most_of_the_few": (64, 1024, 12288, 3, 8),
    "few_with_many_columns": (17, 1100, 520, 600, 2),
    "few_in_turns": (8, 256, 40000, 2, 8),
    "no_pair": (100, 640, 700, 20, None),
    "too_many": (130, 256, 300, 3, 2),
    "one_of_two": (70, 300, 66, 2, 1),
}


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: f"llm_int8_{d.__name__}")
@pytest.mark.parametrize("name", HOPPER, ids=lambda n: f"llm_int8_{n}")
def test_llm_int8_for_hopper_matches_ref_on_a_gpu(name, dtype):
    """Within the rounding of the result; the same bits again; the gradients of the layer."""
    T, K, N, outliers, most = HOPPER[name]
    x, w, b, _ = problem(T=T, K=K, N=N, columns=range(3, 3 + outliers))
    x, layer = jnp.asarray(x, dtype), ref.llm_int8.convert_linear(w, b)
    call = jax.jit(lambda x: accel.llm_int8.llm_int8_linear(x, layer, max_outliers=most, impl="hopper"))
    got = call(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, call(x))
    x = np.asarray(x, np.float64)
    want = ref.llm_int8.llm_int8_linear(x, layer)
    size = np.abs(want) * float(jnp.finfo(dtype).eps) + rounding(x, layer)
    worst = (np.abs(np.asarray(got, np.float64) - want) / size).max()
    assert worst <= 1
    assert (
        "mosaic_gpu" in jax.jit(accel.llm_int8.llm_int8_linear).lower(jnp.asarray(x, dtype), layer).as_text()
    )


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize(("name", "T", "K"), FEW_ROWS, ids=[f"llm_int8_{n}_of_{T}" for n, T, _ in FEW_ROWS])
def test_llm_int8_rows_of_few_on_a_gpu(name, T, K):
    rows_of_few_match(*few_rows(name, T, K))


@pytest.mark.gpu
@pytest.mark.hopper
def test_llm_int8_of_few_keeps_nan_to_its_row_on_a_gpu():
    x, w, b, _ = problem(T=3, K=300, N=72)
    layer = ref.llm_int8.convert_linear(w, b)
    call = lambda x: accel.llm_int8.llm_int8_linear(x, layer, impl="hopper")
    x = jnp.asarray(x, jnp.bfloat16)
    got, want = jax.jit(call)(x.at[1, 5].set(jnp.nan)), call(x)
    assert np.isnan(np.asarray(got[1], np.float32)).all()
    np.testing.assert_array_equal(got[::2], want[::2])


@pytest.mark.gpu
def test_llm_int8_kernel_runs_on_the_gpu():
    """The Triton kernel compiled, on shapes off its tiles, against ref."""
    for T, K, N in ((1, 577, 130), (70, 300, 66)):
        x, w, b, _ = problem(T=T, K=K, N=N)
        layer = ref.llm_int8.convert_linear(w, b)
        got = accel.llm_int8.llm_int8_linear(x, layer, max_outliers=8, impl="triton")
        want = ref.llm_int8.llm_int8_linear(x, layer)
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(x, layer))
