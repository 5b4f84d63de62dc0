"""The affine quantiser and the running ranges: goldens, laws, accel against ref, gradients, bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.blocks import quantize as accel_block
from ref.blocks import quantize as block
from tests.golden_runner import golden, run, run_accel

EPS = np.finfo(np.float64).eps
EPS32 = float(np.finfo(np.float32).eps)
NAMES = {
    "affine_params", "symmetric_params", "quantize", "dequantize", "fake_quantize", "fake_quantize_vjp",
    "lsq_quantize", "lsq_quantize_vjp", "update_range",
}  # fmt: skip


@golden("quantization", only=NAMES)
def test_quantization_golden_block_ref(case):
    run(case, block)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@golden("quantization", only=NAMES)
def test_quantization_golden_block_accel(case, x64):
    run_accel(case, accel_block, x64=x64)


@st.composite
def tensors(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(((7,), (3, 5), (2, 4, 3))))
    x = draw(st.sampled_from((1e-3, 1.0, 40.0))) * rng.standard_normal(shape) + draw(
        st.sampled_from((0, 3, -9))
    )
    axis = draw(st.sampled_from((None, *range(-len(shape), len(shape)))))
    return x, axis, draw(st.sampled_from((2, 4, 8, 12))), draw(st.booleans())


@given(tensors())
def test_quantize_block_affine_keeps_half_a_step(case):
    """|x - x^| <= scale / 2 inside the range, 0 is exact, order is kept, and quantising again changes
    nothing.
    """
    x, axis, bits, signed = case
    state = block.update_range(block.init_range(() if axis is None else (x.shape[axis],)), x, axis=axis)
    scale, zero = block.affine_params(state.lo, state.hi, bits=bits, signed=signed)
    qmin, qmax = block.grid(bits, signed=signed)
    q = block.quantize(x, scale, zero, qmin=qmin, qmax=qmax, axis=axis)
    x_hat = block.dequantize(q, scale, zero, axis=axis)
    step = block.along(np.asarray(scale), x, axis)
    # rounding the zero point moves the ends by at most half a step, so that at the ends the error may be a
    # whole one
    ends = (q == qmin) | (q == qmax)
    assert (np.abs(x - x_hat) <= step * np.where(ends, 1, 0.5) * (1 + 8 * EPS) + 8 * EPS * np.abs(x)).all()
    zeros = block.quantize(0 * x, scale, zero, qmin=qmin, qmax=qmax, axis=axis)
    np.testing.assert_array_equal(zeros, np.broadcast_to(block.along(np.asarray(zero), x, axis), x.shape))
    np.testing.assert_array_equal(block.quantize(x_hat, scale, zero, qmin=qmin, qmax=qmax, axis=axis), q)
    if axis is None:
        assert (np.diff(q.ravel()[np.argsort(x, axis=None)].astype(int)) >= 0).all()
    np.testing.assert_array_equal(block.fake_quantize(x, scale, zero, qmin=qmin, qmax=qmax, axis=axis), x_hat)


@given(tensors())
def test_quantize_block_symmetric_conventions(case):
    x, _, bits, _ = case
    absmax = np.abs(x).max()
    for convention, divisor in (("narrow", 2 ** (bits - 1) - 1), ("full", 2 ** (bits - 1)),
                                ("torch", (2**bits - 1) / 2)):  # fmt: skip
        got = block.symmetric_params(absmax, bits=bits, convention=convention)
        np.testing.assert_allclose(got, max(absmax / divisor, 2**-23), rtol=4 * EPS)
    assert block.symmetric_params(1.0, bits=bits, signed=False) == 1 / (2**bits - 1)
    assert block.symmetric_params(0.0) == 2.0**-23


def test_quantize_block_integers_take_the_least_room():
    for (qmin, qmax), dtype in (((-128, 127), np.int8), ((0, 255), np.uint8), ((-1, 255), np.int16),
                                ((0, 65535), np.uint16), ((-(2**23), 2**23), np.int32)):  # fmt: skip
        for module in (block, accel_block):
            q = module.quantize(np.array([1.4]), 1.0, 0, qmin=qmin, qmax=qmax)
            assert q.dtype == dtype
            assert q[0] == 1


def test_quantize_block_ranges_run():
    """The first batch as it is; then the mean of old and new, or the union; percentiles drop the tails."""
    first, second = np.arange(12.0).reshape(3, 4), np.full((3, 4), 20.0)
    for module in (block, accel_block):
        one = module.update_range(module.init_range(), first)
        assert (one.lo, one.hi, one.step) == (0, 11, 1)
        two = module.update_range(one, second, momentum=0.75)
        assert (two.lo, two.hi, two.step) == (5.0, 13.25, 2)
        union = module.update_range(one, second, kind="minmax")
        assert (union.lo, union.hi) == (0, 20)
        rows = module.update_range(module.init_range((3,)), first, axis=0)
        np.testing.assert_array_equal(rows.lo, [0, 4, 8])
        columns = module.update_range(module.init_range((4,)), first, axis=-1)
        np.testing.assert_array_equal(columns.hi, [8, 9, 10, 11])
        inner = module.update_range(module.init_range(), np.arange(101.0), percentile=90)
        np.testing.assert_allclose([inner.lo, inner.hi], [10, 90], rtol=4 * EPS32)


def test_quantize_block_accel_matches_ref_and_keeps_the_dtype():
    """Under jit, vmap and bfloat16; scales are powers of two, so that no quotient is rounded."""
    x = (np.random.default_rng(0).standard_normal((2, 6, 8)) * 20).astype(jnp.bfloat16)
    scale, zero = np.float32([0.25, 0.5, 1, 2, 4, 0.125]), np.arange(6, dtype=np.int32) - 3
    options = {"qmin": -32, "qmax": 31, "axis": 0}
    fn = jax.jit(jax.vmap(lambda x: accel_block.fake_quantize(x, scale, zero, **options)))
    got = fn(jnp.asarray(x))
    assert got.dtype == jnp.bfloat16
    want = np.stack([block.fake_quantize(row.astype(np.float64), scale, zero, **options) for row in x])
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)  # 6 bits fit bfloat16's 8
    q = accel_block.quantize(jnp.asarray(x[0]), scale, zero, **options)
    np.testing.assert_array_equal(q, block.quantize(x[0].astype(np.float64), scale, zero, **options))
    np.testing.assert_allclose(accel_block.dequantize(q, scale, zero, axis=0), want[0], rtol=0)


def test_quantize_block_learned_step_has_its_gradient():
    """Where no rounding changes, the step's gradient is that of scale clip(k, ...) + (v's share)."""
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((5, 4)) * 4, rng.standard_normal((5, 4))
    gx, gs = block.lsq_quantize_vjp(x, 0.5, g, qmin=-4, qmax=3, grad_factor=1.0)
    r = np.rint(x / 0.5)
    inside = (r >= -4) & (r <= 3)
    assert 0 < inside.sum() < x.size
    np.testing.assert_array_equal(gx, np.where(inside, g, 0))
    want = sum(float(gi * ((ri - xi / 0.5) if ok else np.clip(ri, -4, 3)))
               for gi, ri, xi, ok in zip(g.flat, r.flat, x.flat, inside.flat, strict=True))  # fmt: skip
    np.testing.assert_allclose(gs, want, rtol=0, atol=64 * EPS * np.abs(g).sum() * 4)
    loss = lambda x, s: jnp.sum(accel_block.lsq_quantize(x, s, qmin=-4, qmax=3) * np.float32(g))
    ax, as_ = jax.grad(loss, argnums=(0, 1))(jnp.float32(x), jnp.float32(0.5))
    np.testing.assert_allclose(ax, gx, rtol=4 * EPS32)
    np.testing.assert_allclose(as_, gs / np.sqrt(20 * 3), rtol=0, atol=64 * EPS32 * np.abs(g).sum() * 4)


X = np.ones((2, 3))
ON = {"qmin": 0, "qmax": 255}
STATE = block.init_range()
BAD = {
    "bits": ("grid", (1,), {"signed": True}, "bits must be at least 2"),
    "upside down": ("affine_params", (1.0, 0.5), {}, "must not be below lo"),
    "infinite range": ("affine_params", (0.0, np.inf), {}, "must be finite"),
    "absmax": ("symmetric_params", (-1.0,), {}, "absmax must not be below 0"),
    "convention": ("symmetric_params", (1.0,), {"convention": "even"}, "convention must be one of"),
    "empty": ("quantize", (np.ones((0, 3)), 1.0, 0), ON, "x must not be empty"),
    "nan": ("quantize", (np.array([np.nan]), 1.0, 0), ON, "x must be finite"),
    "grid": ("quantize", (X, 1.0, 0), {"qmin": 3, "qmax": 3}, "qmin must be below qmax"),
    "too wide": ("quantize", (X, 1.0, 0), {"qmin": 0, "qmax": 2**40}, "does not fit 32 bits"),
    "scale": ("quantize", (X, 0.0, 0), ON, "scale must be positive"),
    "scale shape": ("quantize", (X, np.ones(2), 0), {**ON, "axis": 1}, "scale must have shape"),
    "axis": ("fake_quantize", (X, 1.0, 0), {**ON, "axis": 2}, "axis must be in -2..1"),
    "step": ("lsq_quantize", (X, -1.0), ON, "scale must be positive"),
    "kind": ("update_range", (STATE, X), {"kind": "mean"}, "kind must be one of"),
    "momentum": ("update_range", (STATE, X), {"momentum": 1.5}, r"momentum must be in \[0, 1\]"),
    "percentile": ("update_range", (STATE, X), {"percentile": 20}, "percentile must be in"),
    "state": ("update_range", (STATE, X), {"axis": 0}, r"state.lo must have shape \[2\]"),
    "no batch": ("update_range", (STATE, X[:0]), {}, "x must not be empty"),
}  # fmt: skip


@pytest.mark.parametrize("module", [block, accel_block], ids=["ref", "accel"])
@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_quantize_block_rejects(name, module):
    fn, args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        getattr(module, fn)(*args, **options)
