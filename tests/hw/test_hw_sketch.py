"""`sketch`: programs of NumPy functions without JAX, held to `trace` of the same and to NumPy's values."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
from hw.targets import KINDS, preset


def softmax(xp, x):
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def attention(xp, q, k, v):
    seen = np.tril(np.ones((q.shape[-2], k.shape[-2]), bool))
    s = xp.where(seen, q @ xp.swapaxes(k, -1, -2) * 0.125, np.float32(-1e30))
    return softmax(xp, s) @ v


def mlp(xp, x, w1, b1, w2):
    h = x @ w1 + b1
    return 0.5 * h * (1 + xp.tanh(0.8 * (h + 0.04 * h**3))) @ w2, xp.sqrt(xp.abs(h))


def norm(xp, x, g):
    d = x - x.mean(-1, keepdims=True)
    return d / xp.sqrt((d**2).mean(-1, keepdims=True) + 1e-5) * g


def moves(xp, x, y):
    both = xp.concatenate([x, y], -1)[1:3, :5]
    return xp.expand_dims(both.reshape(5, -1), 1) * both[-1, :2] - xp.minimum(both.T[:, None, :], 0.0)


FUNCTIONS = {
    "product": (lambda xp, x, w: x @ w, (16, 32), (32, 8)),
    "row": (lambda xp, x, w: x @ w, (32,), (32, 8)),
    "column": (lambda xp, x, w: x @ w, (16, 32), (32,)),
    "batched": (lambda xp, x, w: x @ w, (3, 16, 32), (3, 32, 8)),
    "tokens": (lambda xp, x, w: x @ w, (3, 16, 32), (32, 8)),
    "softmax": (softmax, (16, 32)),
    "attention": (attention, (4, 16, 8), (4, 16, 8), (4, 16, 8)),
    "mlp": (mlp, (16, 32), (32, 64), (64,), (64, 32)),
    "norm": (norm, (16, 32), (32,)),
    "moves": (moves, (4, 8), (4, 3)),
}


def both(name, dtype="float32", weights=()):
    """(sketch, trace) of a function."""
    fn, *shapes = FUNCTIONS[name]
    specs = [(dtype, s) for s in shapes]
    ours = hw.sketch(lambda *a: fn(np, *a), *specs, weights=weights)
    with jax.numpy_rank_promotion("allow"):  # as NumPy does
        return ours, hw.trace(lambda *a: fn(jnp, *a), *specs, weights=weights)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hw_sketch_has_the_ops_and_the_price_of_the_trace(name):
    ours, theirs = both(name, weights=(1,) if len(FUNCTIONS[name]) > 2 else ())
    ops = lambda p: [(op.prim, op.kind, op.dims) for op in p.ops]
    assert ops(ours) == ops(theirs)
    for kind in KINDS:
        a, b = (hw.estimate(p, preset(kind)) for p in (ours, theirs))
        for field in ("seconds", "energy_j", "bytes_by_level", "macs", "flops", "peak_memory", "bound_by"):
            got, want = getattr(a, field), getattr(b, field)
            if field in (
                "seconds",
                "energy_j",
            ):  # sums in the order of the tensors' numbers
                want = pytest.approx(want, rel=1e-14)
            assert got == want, f"{field} on {kind}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hw_sketch_runs_to_the_values_of_numpy(name):
    fn, *shapes = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    args = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    program = hw.sketch(lambda *a: fn(np, *a), *args)
    got, _ = hw.run_program(program, args)
    want = fn(np, *args)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for g, w in zip(got, want, strict=True):
        # sums of up to 64 products of normal numbers, in float32 on both sides, in another order
        np.testing.assert_allclose(g, w, rtol=0, atol=64 * 2e-7 * max(np.abs(w).max(), 1))
    assert hw.Program.from_json(program.to_json()) == program


def test_hw_sketch_in_16_bits_keeps_its_constants_without_ml_dtypes():
    program = hw.sketch(lambda x: (x + 1e-5) * -3.0 / 1.01, ("bfloat16", (8,)))
    stored = [t.array for t in program.tensors.values() if t.role == "const"]
    assert [x.tobytes() for x in stored] == [
        np.asarray(v, jnp.bfloat16).tobytes() for v in (1e-5, -3.0, 1.01)
    ]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('jax', 'ml_dtypes')))\n"
        "import hw\n"
        "p = hw.sketch(lambda x: (x + 1e-5) / 3, ('bfloat16', (8,)))\n"
        "print(hw.estimate(p, hw.h200()).flops)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "16\n", done.stderr


X = ("float32", (4, 8))


@pytest.mark.parametrize(
    ("fn", "args", "error", "says"),
    [
        (lambda x: np.linalg.norm(x), (X,), hw.UnsupportedPrimitive, "'norm'.*sketch knows .*hw.trace"),
        (lambda x: np.arctan(x), (X,), hw.UnsupportedPrimitive, "'arctan'"),
        (lambda x: np.add(x, x, where=True), (X,), hw.UnsupportedPrimitive, "add with options"),
        (lambda x: x if x.sum() > 0 else -x, (X,), hw.UnsupportedPrimitive, "'greater'"),
        (lambda x: float(x[0, 0]) * x, (X,), hw.NotTraceable, "needs the values of array"),
        (lambda x: np.where(x, x, 0.0), (X,), hw.UnsupportedPrimitive, "condition that is no constant"),
        (lambda x: x @ x, (X,), ValueError, r"\[4, 8\].*do not multiply: 8 against 4"),
        (lambda x, y: x @ y, (("float32", (2, 4, 8)), ("float32", (3, 8, 4))), ValueError, "leading axes"),
        (lambda x, y: x + y, (X, ("float32", (3, 8))), ValueError, r"\[4, 8\] and \[3, 8\] do not fit"),
        (lambda x, y: x + y, (X, ("float16", (4, 8))), ValueError, "one dtype, got float32 and float16"),
        (lambda x: x.reshape(5, -1), (X,), ValueError, "cannot be reshaped"),
        (lambda x: x.transpose(0, 0), (X,), ValueError, "cannot be put in the order"),
        (lambda x: x.sum(2), (X,), ValueError, "axis 2 is none of the 2"),
        (lambda x: x[::2], (X,), IndexError, "takes slices, positions and None"),
        (lambda x: x[4], (X,), IndexError, "on axis 0"),
        (lambda x, y: np.concatenate([x, y]), (X, ("float32", (4, 7))), ValueError, "do not join"),
        (lambda x: x + "a", (X,), TypeError, "constant must be of numbers"),
        (lambda x: 1.0, (X,), TypeError, "must return an array.*got float"),
        (lambda x: x, (("int32", (4,)),), ValueError, "x must be of float64.*got int32"),
        (lambda x: x, (("float32", (0,)),), ValueError, "axes of at least 1"),
        (lambda x: x, (4,), ValueError, "x must be an array or"),
    ],
)  # fmt: skip
def test_hw_sketch_refuses_in_a_line(fn, args, error, says):
    with pytest.raises(error, match=says) as caught:
        hw.sketch(fn, *args)
    assert "\n" not in str(caught.value)


def test_hw_sketch_knows_weights_by_name_and_position():
    for weights in (("w",), (1,)):
        program = hw.sketch(lambda x, w: x @ w, X, ("float32", (8, 2)), weights=weights)
        assert program.bytes("weight") == 64
        assert program.input_names == ("x", "w")
    with pytest.raises(ValueError, match="weights names 'v', but the arguments are x, w"):
        hw.sketch(lambda x, w: x @ w, X, ("float32", (8, 2)), weights=("v",))


def test_hw_sketch_drops_what_reaches_no_result():
    program = hw.sketch(lambda x: (np.exp(x), x * 2.0)[1], X)
    assert [op.prim for op in program.ops] == ["mul"]
