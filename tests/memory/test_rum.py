"""RUM: laws on ref, golden vectors, bad inputs; accel's recovered memory, its gradients; costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import ref
from accel.blocks import backend
from tests.claims import record
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests
from tests.lower import lowered
from tests.memory import laws_rum

globals().update(law_tests(laws_rum))


@golden("rum")
def test_rum_golden_ref(case):
    run(case, ref.rum)


@golden("rum")
def test_rum_golden_gradients_ref(case):
    """The stored gradients, by ref's own backward passes."""
    fn, args = case.meta["fn"], {n: case[k] for n, k in case.meta["args"].items() if isinstance(k, str)}
    if not case.meta.get("grads"):
        assert fn == "rotation_matrix"
        return
    cotangent = case[case.meta["cotangents"][0]]
    if fn == "rotate":
        got = dict(
            zip("abv", ref.rum.rotate_vjp(*args.values(), cotangent, **case.meta["kwargs"]), strict=True)
        )
    else:
        params = ref.rum.RumParams(**{n: case[k] for n, k in case.meta["args"]["params"].items()})
        options = {n: v for n, v in case.meta["kwargs"].items() if n != "return_assoc"}
        dx, dparams = ref.rum.rum_vjp(args["x"], params, cotangent, **options)
        got = {"x": dx, **{f"params.{n}": g for n, g in dparams._asdict().items()}}
    for name, key in case.meta["grads"].items():
        rtol, atol = case.meta["tol"][key]
        np.testing.assert_allclose(got[name], case[key], rtol=rtol, atol=atol, err_msg=key)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@golden("rum")
def test_rum_golden_accel(case, x64):
    run_accel(case, accel.rum, x64=x64)


def single(tree):
    """The arrays in float32, by NumPy: JAX would compile a conversion for each shape."""
    return jax.tree.map(np.float32, tree)


def test_rum_accel_keeps_no_memory_but_the_last():
    """What reverse mode stores with lambda_ = 1, in numbers: O(N^2 + T N), not T N^2; values as in ref."""
    params, rng = single(ref.rum.init_rum(0, 3, 16)), np.random.default_rng(1)
    x, d = single([rng.standard_normal((20, n)) for n in (3, 16)])
    pull = jax.vjp(lambda x, p: accel.rum.rum(x, p, lambda_=1)[0], x, params)[1]
    saved = jax.tree.leaves(pull)
    most = max(np.size(leaf) for leaf in saved)
    assert most <= max(16 * 16, 20 * 16, 19 * 16)
    assert sum(np.size(leaf) for leaf in saved) < 20 * 16 * 16 / 2
    want = ref.rum.rum_vjp(np.float64(x), jax.tree.map(np.float64, params), np.float64(d), lambda_=1)
    for g, w in zip(jax.tree.leaves(pull(d)), jax.tree.leaves(want), strict=True):
        # 20 steps forth and back in float32, gradients of size |w|
        np.testing.assert_allclose(g, w, rtol=0, atol=20 * 64 * 2.0**-23 * np.abs(w).max())


def test_rum_accel_gradient_is_finite_on_degenerate_planes():
    """Parallel, antiparallel and zero vectors: 0 to the plane, the turned cotangent to v, as in ref."""
    u = np.array([0.6, -0.8, 0.0], np.float32)
    a = np.stack([u, u, u, 0 * u, 0 * u])
    b = np.stack([2 * u, -3 * u, 0 * u, u, 0 * u])
    v, g = RNG.standard_normal((2, 5, 3)).astype(np.float32)
    got, want = accel.rum.rotate_vjp(a, b, v, g), ref.rum.rotate_vjp(a, b, v, g)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=16 * 2.0**-23)
    assert not np.asarray(got[0]).any()
    assert not np.asarray(got[1]).any()


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"rum_{i}")
def test_rum_kernel_matches_ref_in_values_and_gradients(impl):
    """Two sequences over the end of a run, off the tile; the first inputs are 0, so planes are degenerate."""
    options = {"lambda_": 1, "eta": 0.7, "activation": "tanh", "update_gate": impl == "tpu"}
    params, rng = ref.rum.init_rum(0, 3, 5), np.random.default_rng(1)
    x, d = rng.standard_normal((2, 66, 3)), rng.standard_normal((2, 66, 5))
    x[:, 0] = 0
    want = ref.rum.rum(x, params, **options, return_assoc=True)
    dx, dparams = ref.rum.rum_vjp(x, params, d, **options)
    kernel = {"impl": impl, "interpret": True}
    got, pull = jax.vjp(
        lambda x, p: accel.rum.rum(x, p, **options, **kernel, return_assoc=True),
        single(x), single(params),
    )  # fmt: skip
    found = pull((single(d), *single([np.zeros((2, 5)), np.zeros((2, 5, 5))])))
    # 66 steps of some 16 roundings each, forth and back
    for g, w in zip(jax.tree.leaves((got, found)), jax.tree.leaves((want, (dx, dparams))), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=66 * 16 * 2.0**-23 * max(1, np.abs(w).max()))


def test_rum_kernels_lower_for_their_devices():
    from accel.kernels import rum_tpu, rum_triton
    from accel.kernels.rum_step import Step

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    rows, N = shape(2, 70, 100), 100
    operands = (rows, rows, rows, shape(2, N), shape(2, N, N), shape(N, N), shape(N, N))
    step = Step(1.0, jax.nn.relu, True, 1e-12, 1e-7)
    for module, platform in ((rum_tpu, "tpu"), (rum_triton, "cuda")):
        lowered(lambda *a, m=module: m.scan(*a, step=step), operands, platform)


def test_rum_impl_asked_for_by_name_says_why_not():
    x, params, wide = single((np.zeros((4, 3)), ref.rum.init_rum(0, 3, 4), ref.rum.init_rum(0, 3, 129)))
    for impl, params_, options, says in (
        ("triton", params, {}, "lambda_=1 alone"),
        ("hopper", params, {"lambda_": 1}, "does not exist"),
        ("triton", wide, {"lambda_": 1}, "up to N=128 on the chip, got N=129"),
        ("tpu", params, {"lambda_": 1}, "needs a TPU"),
    ):
        with pytest.raises(NotImplementedError, match=says):
            accel.rum.rum(x, params_, impl=impl, **options)
    with pytest.raises(ValueError, match="impl must be"):
        accel.rum.rum(x, params, impl="cuda")


def test_rum_auto_takes_the_kernel_on_a_gpu_that_can(monkeypatch):
    """The choice alone: no GPU is there. Arrays that were put on a CPU stay with XLA."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    kernel = lambda N, dtype=np.float32, **options: (
        "pallas_call"
        in str(
            jax.make_jaxpr(partial(accel.rum.rum, **options))(
                np.ones((2, 4, 3), dtype), jax.tree.map(dtype, ref.rum.init_rum(0, 3, N))
            )
        )
    )
    assert kernel(8, lambda_=1)
    assert kernel(128, lambda_=1)
    assert not kernel(129, lambda_=1)
    assert not kernel(8)
    assert not kernel(8, lambda_=1, impl="xla")
    assert not kernel(8, np.float16, lambda_=1)
    x, params = jax.device_put(single((np.ones((2, 4, 3)), ref.rum.init_rum(0, 3, 8))), jax.devices("cpu")[0])
    found, want = (accel.rum.rum(x, params, lambda_=1, impl=i) for i in ("auto", "xla"))
    for g, w in zip(found, want, strict=True):
        np.testing.assert_array_equal(g, w)
    vjp = partial(accel.rum.rum_vjp, cotangent=np.ones((2, 4, 8), np.float32), lambda_=1)
    put = jax.make_jaxpr(lambda: vjp(x, params))  # the arrays themselves, which tell where they are
    assert "pallas_call" not in str(put())
    assert "pallas_call" in str(jax.make_jaxpr(vjp)(x, params))


@pytest.mark.gpu
def test_rum_kernel_runs_on_the_gpu():
    params, x = ref.rum.init_rum(0, 8, 64), np.random.default_rng(0).standard_normal((4, 200, 8))
    got = accel.rum.rum(jnp.float32(x), jax.tree.map(jnp.float32, params), lambda_=1, eta=1.0, impl="triton")
    want = ref.rum.rum(x, params, lambda_=1, eta=1.0)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=200 * 16 * 2.0**-23 * max(1, np.abs(w).max()))


def test_rum_tiny_instances_learn():
    """Copying with a delay of 5 and recall of 6: the loss falls; no accuracy is asked for."""
    from tests.claims.rum import train

    for task, options in (("copying", {"delay": 5}), ("recall", {"length": 6})):
        found = train(
            "rum lambda=1", task, hidden=16, steps=20, batch=64, seeds=1, lr=1e-2, tested=0, **options
        )
        assert np.mean(found["losses"][0][-5:]) < np.mean(found["losses"][0][:5])


def test_rum_stored_results_are_fresh():
    """`python -m tests.claims.rum` again if not (--gpu on a GPU)."""
    assert record.is_fresh("rum")
    for name in ("rum", "rum_gpu"):
        if (record.DATA / f"{name}.json").exists():
            assert record.is_fresh(name), name


RNG = np.random.default_rng(0)
A, B, V = RNG.standard_normal((3, 2, 4))
PARAMS = ref.rum.init_rum(0, 3, 4)
X, H = RNG.standard_normal((2, 5, 3)), RNG.standard_normal((2, 4))
EYE = np.zeros((2, 1, 1)) + np.eye(4)
BAD = {
    "vectors": ("rotate", (A, B[:, :3], V), {}, "axis N is 4 in a"),
    "leading": ("rotate", (A, B[:1], V), {}, r"b.shape\[:1\] = \(1,\)"),
    "one number": ("rotation_matrix", (A[:, :1], B[:, :1]), {}, "needs N >= 2"),
    "eps": ("rotate", (A, B, V), {"eps": 0.0}, "eps must be positive"),
    "lambda": ("rum", (X, PARAMS), {"lambda_": 2}, "lambda_ must be 0 or 1, got 2"),
    "lambda half": ("rum_cell", (X[:, 0], H, None, PARAMS), {"lambda_": 0.5}, "lambda_ must be 0 or 1"),
    "lambda cost": ("rum_flops", (3, 4), {"lambda_": -1}, "lambda_ must be 0 or 1"),
    "eta": ("rum", (X, PARAMS), {"eta": 0.0}, "eta must be None or positive"),
    "activation": ("rum", (X, PARAMS), {"activation": "gelu"}, "activation must be one of relu, tanh"),
    "steps": ("rum", (X[:, :0], PARAMS), {}, "at least one step"),
    "input": ("rum", (X[..., :2], PARAMS), {}, "axis Nx is 2 in x"),
    "state": ("rum", (X, PARAMS), {"h0": H[:, :3]}, "axis N is 3 in h"),
    "weights": (
        "rum",
        (X, PARAMS._replace(W_r=PARAMS.W_r[1:])),
        {},
        r"W_r must be \[Nx \+ N, N\] = \[7, 4\]",
    ),
    "no gate": ("rum", (X, PARAMS._replace(W_u=None)), {}, "W_u must be"),
    "bias": ("rum", (X, PARAMS._replace(b_e=np.ones(3))), {}, "axis N is 4"),
    "memory missing": ("rum_cell", (X[:, 0], H, None, PARAMS), {"lambda_": 1}, "assoc must be"),
    "memory idle": ("rum_cell", (X[:, 0], H, EYE, PARAMS), {}, "assoc must be None"),
    "memory shape": ("rum", (X, PARAMS), {"lambda_": 1, "assoc0": EYE[:, :3]}, "axis N is 4 in h"),
    "memory width": ("rum", (X, PARAMS), {"lambda_": 1, "assoc0": EYE[..., :3]}, "axis M is 4 in h"),
    "cotangent": ("rum_vjp", (X, PARAMS, np.ones((2, 4, 4))), {}, "axis T is 5 in hidden"),
    "sizes": ("init_rum", (0, 3, 1), {}, "hidden_size >= 2"),
}


@pytest.mark.parametrize("layer", [ref], ids=["rum_ref"])
@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_rum_rejects_bad_input(name, layer):
    fn, args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        getattr(layer.rum, fn)(*args, **options)


def maps(params):
    """MACs of the three maps of a step, and of target and embedding alone."""
    both = params.W_r.size + params.W_e.size
    return both + params.W_u.size, both


def of_rum(x, params, *, lambda_=0, **_):
    N = params.W_e.shape[1]
    return x.size // x.shape[-1] * (maps(params)[0] + 3 * N * N * lambda_)


def of_rum_vjp(x, params, cotangent, **options):
    """Forward; back, the plane again, the cell and its two gradients: 11 N^2 with the memory turned back."""
    (every, both), N = maps(params), params.W_e.shape[1]
    return of_rum(x, params, **options) + x.size // x.shape[-1] * (3 * every + both + 11 * N * N)


def of_rum_vjp_in_ref(x, params, cotangent, **options):
    every, N = maps(params)[0], params.W_e.shape[1]
    return of_rum(x, params, **options) + x.size // x.shape[-1] * (3 * every + 12 * N * N)


def states(x, params, **options):
    """Bytes of hidden and the last state, and of the last memory where it is returned."""
    N, rows = params.W_e.shape[1], x.size // x.shape[-1]
    last = rows // x.shape[-2]
    return 4 * (rows * N + last * N + (last * N * N if options.get("return_assoc") else 0))


HW = {
    "rotate": Cost(
        macs=lambda a, b, v: 0,
        bytes=lambda a, b, v: size(a, b, v, v),
        bound={"h200": "hbm"},  # about 20 operations a number that is read
        large=(("float32", (65536, 256)),) * 3,
    ),
    "rotation_matrix": Cost(
        macs=lambda a, b: 2 * a.size * a.shape[-1],
        bytes=lambda a, b: size(a, b) + 4 * a.size * a.shape[-1],
    ),
    "rum_cell": Cost(
        macs=lambda x, h, assoc, params, **_: len(h) * (maps(params)[0] + 3 * h.shape[1] ** 2),
        bytes=lambda x, h, assoc, params, **_: size(x, h, assoc, *params, h, assoc),
    ),
    "rum": Cost(macs=of_rum, bytes=lambda x, params, **o: size(x, *params) + states(x, params, **o)),
    "rum_vjp": Cost(
        macs=of_rum_vjp,
        bytes=lambda x, params, cotangent, **_: size(x, *params, cotangent, x, *params),
        ref=of_rum_vjp_in_ref,
    ),
}
