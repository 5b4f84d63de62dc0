"""Mesa: laws on ref, golden vectors in ref and accel, residuals and gradients of accel, bad inputs."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import ref
from ref.blocks.transformer import BlockParams, init_block
from ref.catalog import BY_SLUG
from tests.claims import mesa as claims
from tests.claims.record import is_fresh, load
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests
from tests.lower import lowered
from tests.training import laws_mesa

globals().update(law_tests(laws_mesa))

EPS32 = float(np.finfo(np.float32).eps)
CORE = BY_SLUG["mesa"].core if "mesa" in BY_SLUG else ()


def drawn(dtype=np.float32):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 5, 12)).astype(dtype)
    cast = lambda t: jax.tree.map(lambda a: np.asarray(a, dtype), t)
    return x, cast(init_block(rng, 12, 24, std=0.3)), rng


def total(*trees):
    """Bytes of all arrays of the trees, floats in float32."""
    return size(*jax.tree.leaves(trees))


def state_bytes(groups):
    """A running range: two ends a group, and the step."""
    return 8 * groups + 4


def kept_bytes(x, groups):
    """A stored activation: a byte an element, range and minimum a group."""
    return x.size + 8 * groups


def moved(x, out, *, groups):
    """What a layer with one stored input moves, beside its own arguments: output, stored copy, new state."""
    return 4 * out + kept_bytes(x, groups) + 2 * state_bytes(groups)


def block_macs(x, p):
    """(maps, attention products): multiply-accumulates of a block's forward pass."""
    (B, L, C), F = x.shape, p.w_fc1.shape[1]
    return B * L * (4 * C * C + 2 * C * F), 2 * B * L * L * C


def block_kept_bytes(x, p, heads):
    """Eleven stored tensors, and mean and deviation of the two norms."""
    (B, L, C), F = x.shape, p.w_fc1.shape[1]
    return B * L * (8 * C + 2 * F) + B * heads * L * L + 11 * 8 * heads + 2 * 2 * 4 * B * L


def specs(B, L, C, heads):
    """(x, params, states) of a block as (dtype, shape)."""
    f = lambda *shape: ("float32", shape)
    maps = [f(C, C), f(C)] * 4
    p = BlockParams(f(C), f(C), *maps, f(C), f(C), f(C, 4 * C), f(4 * C), f(4 * C, C), f(C))
    one = ref.mesa.RangeState(f(heads), f(heads), ("int32", ()))
    return f(B, L, C), p, ref.mesa.BlockStates(*[one] * 11)


nothing = lambda *args, **options: 0
HW = {
    "pack_groups": Cost(macs=nothing, bytes=lambda x, *, groups: 2 * size(x)),
    "update_range": Cost(macs=nothing, bytes=lambda s, x, **_: size(x) + 2 * state_bytes(len(x))),
    "quantize_groups": Cost(macs=nothing, bytes=lambda x, a, b: size(x, a, b) + x.size),
    "dequantize_groups": Cost(macs=nothing, bytes=lambda q, a, b: total(q, a, b) + 4 * q.size),
    "mesa_linear": Cost(
        macs=lambda x, w, b, s, *, groups: x.size * w.shape[1],
        bytes=lambda x, w, b, s, *, groups: (
            size(x, w, b, w) + moved(x, x.size // x.shape[-1] * w.shape[1], groups=groups)
        ),
    ),
    "mesa_linear_backward": Cost(
        macs=lambda g, saved: 2 * saved.x.q.size * g.shape[-1],
        bytes=lambda g, saved: total(g, saved) + 4 * (saved.x.q.size + saved.w.size + g.shape[-1]),
    ),
    "mesa_matmul": Cost(
        macs=lambda a, b, s, t, *, groups: a.size * b.shape[-1],
        bytes=lambda a, b, s, t, *, groups: (
            size(a, b)
            + 4 * a.size // a.shape[-1] * b.shape[-1]
            + kept_bytes(a, groups)
            + kept_bytes(b, groups)
            + 4 * state_bytes(groups)
        ),
    ),
    "mesa_matmul_backward": Cost(
        macs=lambda g, saved: g.size * 2 * saved.a.q.shape[-1],
        bytes=lambda g, saved: total(g, saved) + 4 * (saved.a.q.size + saved.b.q.size),
    ),
    "mesa_softmax": Cost(
        macs=nothing, bytes=lambda x, s, *, groups, group_axis: size(x) + moved(x, x.size, groups=groups)
    ),
    "mesa_softmax_backward": Cost(macs=nothing, bytes=lambda g, saved, **_: total(g, saved, g)),
    "mesa_gelu": Cost(macs=nothing, bytes=lambda x, s, *, groups: size(x) + moved(x, x.size, groups=groups)),
    "mesa_gelu_backward": Cost(macs=nothing, bytes=lambda g, saved: total(g, saved, g)),
    "mesa_layer_norm": Cost(
        macs=nothing,
        bytes=lambda x, w, b, s, *, groups: (
            size(x, w, b, w) + moved(x, x.size, groups=groups) + 2 * 4 * x.size // x.shape[-1]
        ),
    ),
    "mesa_layer_norm_backward": Cost(
        macs=nothing,
        bytes=lambda g, saved: total(g, saved, g, saved.weight, saved.weight),
        bound={"h200": "hbm", "xeon_6154": "dram"},
        large=(
            ("float32", (128, 197, 384)),
            ref.mesa.SavedNorm(
                ref.mesa.Saved(("uint8", (128, 197, 384)), ("float32", (6,)), ("float32", (6,))),
                *[("float32", (128, 197, 1))] * 2,
                ("float32", (384,)),
            ),
        ),
    ),
    "mesa_block": Cost(
        macs=lambda x, p, s, *, num_heads: sum(block_macs(x, p)),
        bytes=lambda x, p, s, *, num_heads: (
            total(x, p, s, x, p, s, p.ln1_scale, p.ln2_scale) + block_kept_bytes(x, p, num_heads)
        ),  # the live parameters go out again, for the backward pass
        bound={"h200": "l2", "xeon_6154": "arithmetic"},  # a tensor of width 384 fits the L2 cache
        large=specs(16, 197, 384, 6),
        options={"num_heads": 6},
    ),
    "mesa_block_backward": Cost(
        macs=lambda g, saved, *, num_heads: (
            2 * sum(block_macs(g, saved.params)) if num_heads else 0
        ),  # two products for each of the forward pass
        bytes=lambda g, saved, *, num_heads: total(g, saved, g, saved.params),
    ),
}


@golden("mesa")
def test_mesa_golden_ref(case):
    run(case, ref.mesa)


@pytest.mark.parametrize("x64", [False, True], ids=["mesa_float32", "mesa_float64"])
@golden("mesa", only=CORE)
def test_mesa_golden_accel(case, x64):
    run_accel(case, accel.mesa, x64=x64)


def test_mesa_accel_keeps_nothing_but_what_ref_saves():
    """The residuals of `jax.vjp` of a block: integers, ranges, statistics, and the live parameters."""
    x, p, _ = drawn()
    policy = ref.mesa.MesaPolicy(update="after")
    states = accel.mesa.init_states(3, policy=policy)

    def block(x, p):
        y, kept, states_ = accel.mesa.mesa_block(x, p, states, num_heads=3, policy=policy)
        return y, (kept, states_)

    y, vjp, (kept, _) = jax.vjp(block, x, p, has_aux=True)
    residuals = jax.tree.leaves(vjp)
    weights = [a.shape for a in p]
    rest = [r for r in residuals if r.shape not in weights]
    for r in rest:
        integers, row = r.dtype == np.uint8, r.shape in ((3,), (2, 5, 1), ())
        assert integers or row, (r.dtype, r.shape)
    held = sum(r.size * r.dtype.itemsize for r in rest)
    config = ref.mesa.MesaConfig(dim=12, depth=1, num_heads=3, tokens=5, hidden=24)
    promised = sum(ref.mesa.activation_bytes(config, batch=2, policy="mesa").values())
    assert held <= promised  # equal, or less where the compiler keeps one of two equal arrays
    assert held >= promised - 11 * 8 * 3
    # and nothing but those integers decides the gradient
    got = vjp(jnp.ones_like(y))
    want = accel.mesa.mesa_block_backward(jnp.ones_like(y), kept, num_heads=3, policy=policy)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=64 * EPS32 * max(1, np.abs(w).max()))


def test_mesa_accel_gradients_are_refs():
    """Every layer and a block under jit and grad, with noise and 16 levels: only a float32 bound between."""
    x, p, rng = drawn()
    options = {"groups": 3, "levels": 16}
    noise = rng.random(x.shape).astype(np.float32)
    heads, s = x.reshape(2, 3, 5, 4), ref.mesa.init_range((3,))
    keys = np.swapaxes(heads, -1, -2)
    pair = (noise.reshape(heads.shape), noise.reshape(keys.shape))
    state = jax.tree.map(lambda a: jnp.asarray(a, a.dtype if a.dtype == np.int32 else jnp.float32), s)
    calls = {
        "linear": (lambda m, s: m.mesa_linear(x, p.w_q, p.b_q, s, uniform=noise, **options), (0, 1, 2), -1),
        "matmul": (lambda m, s: m.mesa_matmul(heads, keys, s, s, uniform=pair, **options), (0, 1), -3),
        "softmax": (
            lambda m, s: m.mesa_softmax(heads, s, group_axis=-3, uniform=pair[0], **options),
            (0,),
            -3,
        ),
        "gelu": (lambda m, s: m.mesa_gelu(x, s, uniform=noise, **options), (0,), -1),
        "layer_norm": (
            lambda m, s: m.mesa_layer_norm(x, p.ln1_scale, p.ln1_bias, s, uniform=noise, **options),
            (0, 1, 2),
            -1,
        ),
    }
    primal = {
        "linear": (x, p.w_q, p.b_q), "matmul": (heads, keys), "softmax": (heads,), "gelu": (x,),
        "layer_norm": (x, p.ln1_scale, p.ln1_bias),
    }  # fmt: skip
    extra = {"linear": noise, "matmul": pair, "softmax": pair[0], "gelu": noise, "layer_norm": noise}
    for name, (call, _, axis) in calls.items():
        y, kept, *_ = call(ref.mesa, s)
        dy = np.asarray(rng.standard_normal(y.shape), np.float32)
        back = getattr(ref.mesa, f"mesa_{name}_backward")(dy, kept, group_axis=axis, levels=16)
        want = back if isinstance(back, tuple) else (back,)
        fn, rest = getattr(accel.mesa, f"mesa_{name}"), [state] * (2 if name == "matmul" else 1)
        opt = {**options, "group_axis": axis, "uniform": extra[name]}
        loss = lambda *a, fn=fn, rest=rest, opt=opt, dy=dy: jnp.sum(fn(*a, *rest, **opt)[0] * dy)
        got = jax.jit(jax.grad(loss, argnums=tuple(range(len(primal[name])))))(*primal[name])
        for g, w in zip(got, want, strict=True):  # sums of at most 12 products of order 10
            np.testing.assert_allclose(g, w, rtol=0, atol=64 * EPS32 * max(1, np.abs(w).max()), err_msg=name)


def test_mesa_layers_hold_for_one_token_and_huge_entries():
    """One token, one channel a group, entries of 1e30 and a constant tensor: finite in both layers."""
    for m in (ref.mesa, accel.mesa):
        for x in (np.full((1, 3), 2.5, np.float32), np.float32(1e30) * drawn()[0][0, :1, :3]):
            y, saved, state = m.mesa_linear(
                x, np.eye(3, dtype=np.float32), None, m.init_range((3,)), groups=3
            )
            np.testing.assert_array_equal(y, x)
            assert (np.asarray(saved.x.q) == 0).all()  # one entry a group is its own minimum
            back = m.mesa_linear_backward(np.ones_like(x), saved)
            np.testing.assert_allclose(back[1], np.tile(x.T, 3), rtol=2 * EPS32)
            assert np.isfinite(np.asarray(state.hi)).all()


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"mesa_{i}")
def test_mesa_kernels_match_xla(impl):
    """33 rows of 24 channels, odd on every tile: equal integers, floats within sums of 33 terms."""
    rng = np.random.default_rng(5)
    x, g, noise = (
        f((3, 11, 24)).astype(np.float32) for f in (rng.standard_normal, rng.standard_normal, rng.random)
    )
    weight, state = rng.standard_normal(24).astype(np.float32), ref.mesa.init_range((3,))
    kernel = {"impl": impl, "interpret": True}
    y, saved, moved = accel.mesa.mesa_gelu(x, state, groups=3, uniform=noise, **kernel)
    want = accel.mesa.mesa_gelu(x, state, groups=3, uniform=noise)
    np.testing.assert_allclose(y, want[0], rtol=0, atol=4 * EPS32 * np.abs(x).max())
    for a, b in zip(jax.tree.leaves((saved, moved)), jax.tree.leaves(want[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
    _, kept, _ = ref.mesa.mesa_layer_norm(x, weight, weight, state, groups=3)
    want = ref.mesa.mesa_layer_norm_backward(g, kept)
    for a, b in zip(accel.mesa.mesa_layer_norm_backward(g, kept, **kernel), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * EPS32 * np.abs(b).max())


@pytest.mark.parametrize(
    ("name", "platform"), [("tpu", "tpu"), ("triton", "cuda")], ids=["mesa_tpu", "mesa_triton"]
)
def test_mesa_kernels_lower(name, platform):
    """To Mosaic for a TPU, and to Triton for a GPU, without either."""
    kernels = importlib.import_module(f"accel.kernels.mesa_{name}")

    f = lambda *s: jax.ShapeDtypeStruct(s, np.float32)
    C = 384
    for T in (788, 32):
        gelu = lambda x, a, b, u: kernels.gelu_quantize(x, a, b, u, levels=256, dtype=np.dtype(np.uint8))
        norm = (f(T, C), jax.ShapeDtypeStruct((T, C), np.uint8), f(C), f(C), f(T, 1), f(T, 1), f(C))
        for fn, args in ((gelu, (f(T, C), f(C), f(C), f(T, C))), (kernels.norm_backward, norm)):
            lowered(fn, args, platform)


def test_mesa_kernels_asked_for_in_vain_say_why():
    x, _, _ = drawn()
    s = ref.mesa.init_range((1,))
    for options, message in (
        ({"impl": "hopper"}, "does not exist"),
        ({"impl": "triton", "group_axis": -3, "interpret": True}, "groups channels"),
        ({"impl": "tpu", "levels": 4096, "interpret": True}, "at most 256 levels"),
        ({"impl": "tpu"}, "needs a TPU"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            accel.mesa.mesa_gelu(x[None] if x.ndim < 3 else x, s, groups=1, **options)
    with pytest.raises(ValueError, match="impl must be"):
        accel.mesa.mesa_gelu(x, s, groups=1, impl="cuda")


@pytest.mark.gpu
def test_mesa_gpu_kernels_match_xla():
    """The Triton kernels as compiled: widths of the DeiTs and one that is no multiple of a chunk."""
    rng = np.random.default_rng(5)
    for C in (24, 192, 384):
        x, g = rng.standard_normal((2, 5, 197, C)).astype(np.float32)
        weight, state = rng.standard_normal(C).astype(np.float32), ref.mesa.init_range((3,))
        y, saved, _ = accel.mesa.mesa_gelu(x, state, groups=3, impl="triton")
        want = accel.mesa.mesa_gelu(x, state, groups=3)
        np.testing.assert_allclose(y, want[0], rtol=0, atol=4 * EPS32 * np.abs(x).max())
        # a product and a sum fused into one rounding may turn a tie
        assert np.abs(np.asarray(saved.q, int) - np.asarray(want[1].q, int)).max() <= 1
        _, kept, _ = ref.mesa.mesa_layer_norm(x, weight, weight, state, groups=3)
        want = ref.mesa.mesa_layer_norm_backward(g, kept)
        for a, b in zip(accel.mesa.mesa_layer_norm_backward(g, kept, impl="triton"), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=C * EPS32 * np.abs(b).max())


X, P3 = np.ones((2, 4, 12)), init_block(np.random.default_rng(0), 12, 24)
S, Q = ref.mesa.init_range((3,)), np.zeros((2, 4, 12), np.uint8)
ONE = np.ones(3)
BAD = {
    "channels": (lambda m: m.pack_groups(X, groups=5), "groups must divide axis -1 of size 12, got 5"),
    "heads": (lambda m: m.pack_groups(X, groups=3, group_axis=-3), "groups must divide axis -3 of size 2"),
    "axis": (lambda m: m.pack_groups(X, groups=2, group_axis=-2), "group_axis must be -1"),
    "rank": (lambda m: m.pack_groups(X[0], groups=2, group_axis=-3), "needs 3 axes"),
    "no groups": (lambda m: m.pack_groups(X, groups=0), "groups must divide"),
    "levels low": (lambda m: m.quantize_groups(X, ONE, ONE, levels=1), r"levels must be in 2\.\.65536"),
    "levels high": (lambda m: m.mesa_gelu(X, S, groups=3, levels=65537), r"levels must be in 2\.\.65536"),
    "noise shape": (lambda m: m.quantize_groups(X, ONE, ONE, uniform=X[0]), "uniform must have the shape"),
    "noise one": (lambda m: m.quantize_groups(X, ONE, ONE, uniform=X), r"uniform must lie in \[0, 1\)"),
    "noise nan": (lambda m: m.mesa_gelu(X, S, groups=3, uniform=X * np.nan), r"uniform must lie in"),
    "nan": (lambda m: m.mesa_gelu(X * np.nan, S, groups=3), "x must be finite"),
    "infinity": (lambda m: m.quantize_groups(X / 0.0, ONE, ONE), "x must be finite"),
    "empty": (lambda m: m.mesa_gelu(X[:0], S, groups=3), "x must not be empty"),
    "beta": (lambda m: m.quantize_groups(X, ONE, ONE[:2]), r"beta.shape\[0\] = 2, but axis G is 3"),
    "state": (lambda m: m.mesa_gelu(X, S, groups=2), r"state.lo must have shape \[2\]"),
    "weight": (lambda m: m.mesa_linear(X, X[0], None, S, groups=3), r"w.shape\[0\] = 4, but axis C is 12"),
    "norm": (lambda m: m.mesa_layer_norm(X, ONE, ONE, S, groups=3), r"weight.shape\[0\] = 3"),
    "inner": (lambda m: m.mesa_matmul(X, X, S, S, groups=1), r"b.shape\[1\] = 4, but axis D is 12"),
    "update": (lambda m: m.mesa_gelu(X, S, groups=3, update="never"), 'update must be "before" or "after"'),
    "momentum": (lambda m: m.mesa_gelu(X, S, groups=3, momentum=2), "momentum must be in"),
    "policy": (lambda m: m.MesaPolicy(layers=("conv",)), "layers must be among"),
    "policy update": (lambda m: m.MesaPolicy(update="x"), "update must be"),
    "block heads": (lambda m: m.mesa_block(X, P3, m.init_states(5), num_heads=5), "num_heads must divide"),
    "block nan": (lambda m: m.mesa_block(X * np.nan, P3, m.init_states(3), num_heads=3), "x must be finite"),
    "block groups": (
        lambda m: m.mesa_block(X, P3, m.init_states(3), num_heads=3, policy=m.MesaPolicy(groups=2)),
        "groups must divide the heads 3, got 2",
    ),
    "config": (lambda m: m.MesaConfig(dim=10, depth=1, num_heads=3, tokens=4), "dim a multiple of num_heads"),
    "bytes": (lambda m: m.activation_bytes(m.MesaConfig(3, 1, 3, 4), batch=0), "batch must be at least 1"),
    "kept": (lambda m: m.activation_bytes(m.MesaConfig(3, 1, 3, 4), batch=1, policy="x"), "policy must be"),
    "budget": (
        lambda m: m.largest_batch(m.MesaConfig(3, 1, 3, 4), budget_bytes=9, policy="exact"),
        "budget_bytes = 9 does not hold batch = 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda n: f"mesa_{n.replace(' ', '_')}")
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_mesa_rejects_bad_input(name):
    call, message = BAD[name]
    for m in (ref.mesa, accel.mesa):
        with pytest.raises(ValueError, match=message):
            call(m)


def test_mesa_claims_train_one_cheap_seed():
    """One cheap seed of the experiment learns, and the stored results are those of this code."""
    found = claims.prepared(ref.mesa.MesaPolicy(), seeds=1, dim=8, batch=50, epochs=6, stochastic=False)()
    assert found["loss"][0] < 2.2  # a uniform guess costs log 10 = 2.30
    assert is_fresh("mesa")
    results = load("mesa")["results"]
    rounded = lambda rows: [{k: v for k, v in r.items() if k not in ("published", "top1")} for r in rows]
    assert rounded(results["inventory"]) == rounded(claims.inventory())
    for row in results["memory"]:
        whole = next(r for r in results["memory"] if (r["dim"], r["policy"]) == (row["dim"], "exact"))
        if row["policy"] == "mesa":
            assert row["compiled"] < whole["compiled"] / 2
    plans = results["reinvest"]
    assert all(r["counted"] <= plans["budget"] for r in plans["rows"])
