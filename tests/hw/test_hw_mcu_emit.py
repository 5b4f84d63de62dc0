"""Emitted networks (hw_mcu): the C equals the executor bit for bit, in the bytes of the plan."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
from hw.mcu_emit import emit_c, stored_bytes
from tests.claims import hw_mcu_emit as claims
from tests.claims import record

CC = shutil.which("cc") or shutil.which("gcc")


SIZES = {
    "mlp": {"n": 37, "hidden": 22}, "vit": {"side": 12, "E": 18}, "cnn": {"side": 11, "C": 7},
    "layers": {"n": 5, "E": 12}, "mcuformer": {"E": 12, "depth": 1}, "mcuformer_absolute": {"E": 14},
}  # fmt: skip


def called(value):
    """The name of a case; a technique's own would count towards the time of its tests."""
    return value.replace("mcuformer", "whole") if isinstance(value, str) else None


@cache
def traced(name, bits=8, seed=4):
    """(program, arguments, plan) of a network on other sizes than the stored ones."""
    fn, make = claims.NETWORKS[name]
    args = make(np.random.default_rng(seed), **SIZES[name])
    program = hw.trace(fn, *args, weights=("w",))
    return program, args, hw.calibrate(program, [args], activation_bits=bits)


def made(name, bits=8, **fields):
    """(program, arguments, target) of such a network."""
    program, args, plan = traced(name, bits)
    return program, args, hw.stm32f746(plan=plan, profile="emitted", activation_bits=bits, **fields)


def expected(program, args, target):
    """(bytes of the input, bytes of the result) by the executor."""
    policy = target.prepared(program, args).formats
    out, _ = hw.run_program(program, args, policy=policy)
    given = claims.as_bytes(policy, program.body.inputs[0], args[0])
    return given, claims.as_bytes(policy, program.body.outputs[0], out)


def test_hw_mcu_emit_writes_constants_calls_and_one_arena():
    program, args, target = made("vit")
    files = emit_c(program, target, args)
    assert set(files) == {"net.h", "net.c", "kernels.c"}
    total = target.memory(program).total
    assert f"#define ARENA_BYTES {total}\n" in files["net.h"]
    assert files["net.c"].count("t_softmax_s8(") == 2  # declared and called
    assert "camera + r *" in files["net.c"]
    assert "IN_0" not in files["net.h"]
    assert "IN_0" in emit_c(program, replace(target, decompose_patch=False), args)["net.h"]
    assert emit_c(program, target, args) == files
    held = {k: jnp.asarray(v) for k, v in args[1].items()}
    closed = hw.trace(lambda img: claims.vit(img, held), args[0])
    assert (
        "t_layernorm_s8(" in emit_c(closed, replace(target, plan=hw.calibrate(closed, [args[:1]])))["net.c"]
    )


def test_hw_mcu_emit_stored_results_hold():
    """Every network on every core: equal, RAM as planned, instructions within 10 % of the estimate."""
    assert record.is_fresh("hw_mcu_emit")
    results = record.load("hw_mcu_emit")["results"]
    assert len(results["networks"]) == (2 * len(claims.PARTS) + 2) * len(claims.NETWORKS)
    for r in results["networks"]:
        assert r["equal"], r
        assert r["ram"] == r["plan"], r
        assert abs(r["estimate"] / r["instructions"] - 1) <= 0.1, r
    digit = results["digits"]
    assert digit["equal"]
    assert digit["ram"] == digit["plan"]
    assert digit["int8"] > digit["float"] - 0.01


def test_hw_mcu_emit_stored_real_networks_hold():
    """Digits of MNIST lose no point, our codes of the forecaster are its authors', and both run as C."""
    assert record.is_fresh("hw_mcu_real")
    r = record.load("hw_mcu_real")["results"]
    for case in (*r["mnist"]["cases"], *r["forecaster"]["cases"]):
        assert case["equal"], case
        assert case["ram"] == case["plan"]
        assert abs(case["estimate"] / case["instructions"] - 1) <= 0.1
    assert all(case["accuracy"] > r["mnist"]["float"] - 0.01 for case in r["mnist"]["cases"])
    own, (narrow, wide) = r["forecaster"]["own"], r["forecaster"]["cases"]
    assert own["same"] == own["codes"]
    assert own["scale_error"] < 2.0**-23  # theirs are stored in float32
    assert wide["snr_db"] > narrow["snr_db"] + 10
    assert narrow["needs"] <= narrow["room"]


def test_hw_mcu_emit_refuses_what_it_has_no_c_for():
    program, args, target = made("mlp")
    with pytest.raises(ValueError, match="needs a target with a plan"):
        emit_c(program, replace(target, plan=None))
    with pytest.raises(ValueError, match="is a weight without values"):
        emit_c(program, target)
    with pytest.raises(ValueError, match="one region"):
        emit_c(program, replace(target, regions=(("a", 64), ("b", 64))), args)
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    conv = lambda x: jax.lax.conv_general_dilated(x[None, None], x[None, None], (1, 1), "SAME")
    deep = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1, 1), "SAME")
    apart = lambda x: jnp.einsum("iaj,iaj->a", x.reshape(3, 2, 2), x.reshape(3, 2, 2))
    for fn, words in (
        (lambda x: jnp.cumsum(x, 0), "no C for 'cumsum'"),
        (lambda x: jnp.argmax(x, -1), "not int32"),
        (lambda x: jnp.sort(x, 0), "no C for 'sort'"),
        (conv, "convolves with weights"),
        (lambda x: deep(x.reshape(1, 1, 3, 2, 2), np.ones((1, 1, 2, 2, 2), np.float32)), "one or two axes"),
        (
            lambda x: jax.lax.conv_transpose(x[None], np.ones((2, 4, 3), np.float32), (2,), "SAME"),
            "transposed",
        ),
        (apart, "sums along axes that lie next to each other"),
        (lambda x: x.reshape(3, 2, 2).sum((0, 2)), "neighbouring axes"),
    ):
        p = hw.trace(fn, x)
        with pytest.raises(hw.UnsupportedPrimitive, match=words):
            emit_c(p, hw.stm32f746(plan=hw.calibrate(p, [(x,)])))


def on_this_computer(program, args, target, d):
    """[(codes by the compiled network, codes by the executor)] of every result."""
    files = emit_c(program, target, args)
    for f, text in files.items():
        (d / f).write_text(text)
    units = [str(d / f) for f in ("net.c", "kernels.c")]
    flags = ["-O1", "-fwrapv", "-Wall", "-Werror", "-Wno-unused-function", "-shared", "-fPIC"]
    subprocess.run([CC, *flags, *units, "-o", str(d / "net.so")], check=True)
    defined = dict(line.split()[1:] for line in files["net.h"].splitlines() if line.startswith("#define"))
    library = ctypes.CDLL(str(d / "net.so"))
    arena = np.frombuffer((ctypes.c_int8 * int(defined["ARENA_BYTES"])).in_dll(library, "arena"), np.int8)
    arena[:] = 0x55
    policy, camera = target.prepared(program, args).formats, np.zeros(1, np.int8)
    want, _ = hw.run_program(program, args, policy=policy)
    for n, (i, x) in enumerate(zip(program.body.inputs, jax.tree.leaves(args), strict=True)):
        if f"IN_{n}" in defined:
            codes = claims.as_bytes(policy, i, x)
            arena[int(defined[f"IN_{n}"]) :][: codes.size] = codes
        elif program.tensors[i].role == "input":
            camera = claims.as_bytes(policy, i, x)
    library.net(camera.ctypes.data_as(ctypes.c_void_p))
    pairs = []
    want = want if isinstance(want, tuple) else (want,)
    for n, (o, x) in enumerate(zip(program.body.outputs, want, strict=True)):
        codes = claims.as_bytes(policy, o, x)
        pairs.append((arena[int(defined[f"OUT_{n}"]) :][: codes.size].copy(), codes))
    return pairs


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", list(claims.NETWORKS), ids=called)
def test_hw_mcu_constants_of_the_c_are_counted(name, bits):
    """Every array of the text has its place; a bias that is not there, and equal arrays once, are less."""
    program, args, target = made(name, bits)
    least = stored_bytes(emit_c(program, target, args))
    assert least <= target.flash_bytes(program) <= 1.45 * least


@pytest.mark.tools
@pytest.mark.parametrize("switches", [{}, claims.OFF, {"bits": 16}],
                         ids=["hw_mcu-saved", "hw_mcu-plain", "hw_mcu-16"])  # fmt: skip
@pytest.mark.parametrize("name", list(claims.NETWORKS), ids=called)
def test_hw_mcu_emit_runs_on_this_computer(name, switches, tmp_path):
    for got, want in on_this_computer(*made(name, **switches), tmp_path):
        np.testing.assert_array_equal(got, want)


def conv(x, w, stride=1, pad="SAME", dilation=1, groups=1, dims=("NHWC", "HWIO", "NHWC")):
    n = w.ndim - 2
    return jax.lax.conv_general_dilated(x, w, (stride,) * n, pad, rhs_dilation=(dilation,) * n,
                                        feature_group_count=groups, dimension_numbers=dims)  # fmt: skip


def convolutions(x, w):
    """Dense, strided, dilated, depthwise with one and two channels each, grouped, channels first, a row."""
    return (
        conv(x, w["dense"]) + w["b"][None, None, None], conv(x, w["dense"], 2, "VALID"),
        conv(x, w["dense"], dilation=2), conv(x, w["own"], groups=6), conv(x, w["two"], 2, groups=6),
        conv(x, w["three"], groups=3),
        conv(x, w["first"], dims=("NCHW", "OIHW", "NCHW")),
        conv(x[:, 0], w["row"], pad=[(4, 0)], dilation=2, dims=("NWC", "WIO", "NWC")),
    )  # fmt: skip


def pools(x):
    """Windows of extremes and sums, overlapping, padded, along one axis; reductions of neighbouring axes."""
    at = lambda start, fn, window, stride, pad: jax.lax.reduce_window(
        x, start, fn, (1, *window, 1), (1, *stride, 1), pad
    )
    return (
        at(-jnp.inf, jax.lax.max, (3, 3), (2, 2), "SAME"), at(jnp.inf, jax.lax.min, (2, 3), (1, 2), "SAME"),
        at(0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4, at(0.0, jax.lax.add, (1, 3), (1, 2), "SAME"),
        x.mean((1, 2)), x.max((1, 2)), x.min(0), x.sum(-1), x.min(-1),
    )  # fmt: skip


def pairs(a, b, c):
    """Operations of two tensors, of one shape or broadcast; choices by flags known before and found out."""
    fill = jnp.where(jnp.tri(5, 6, dtype=bool), a[0], -1e30)
    return (
        jnp.maximum(a, b), jnp.minimum(a, b[:1]), a + c, a * c, a - b[:, :1], a / (2 + jnp.abs(c)),
        jnp.where(a > 0.2, a, b), jax.nn.softmax(fill),
    )  # fmt: skip


def products(x, y, w):
    """Weights on either side, of a batch, summed along any axis; two activations however they lie."""
    return (
        jnp.einsum("oi,bij->boj", w["left"], x), x @ w["batch"], jnp.einsum("bij,ik->bjk", x, w["tall"]),
        jnp.einsum("bij,ijk->bik", x, w["rows"]), jnp.einsum("bij,bik->bjk", x, y),
        jnp.einsum("bij,bkj->bik", x, x),
        jnp.einsum("bij,ckj->bcik", x, x), x[0].T @ y[0],
    )  # fmt: skip


def moves(x):
    """Padding outside and between, gathers by known places, reversals, rolls, joins."""
    return (
        jnp.pad(jnp.tanh(x), ((1, 2), (0, 3), (0, 0))), jax.lax.pad(x, np.float32(0.5), ((1, 2, 1),) * 3),
        x[np.array([2, 0, 0, 1])], jnp.roll(x, 2, 1), x[::-1, ::2], jnp.concatenate([x, 2 * x, x[:1]]),
    )  # fmt: skip


def loops(x, w):
    """Carries that swap, rows read, results stacked, both ways; slices found later; nested; a branch."""
    rnn = lambda h, t: (jnp.tanh(h @ w["h"] + t), h)
    at = lambda i: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
    put = lambda i, s: jax.lax.dynamic_update_slice(s, x[:1] * 0.5 + s[:1], (i, 0))
    inner = lambda h, t: (jax.lax.fori_loop(0, 3, lambda i, v: jnp.tanh(v + t), h), h * 2)
    return (
        jax.lax.scan(rnn, jnp.zeros(6), x), jax.lax.scan(rnn, jnp.full(6, 0.3), x, reverse=True),
        jax.lax.fori_loop(0, 5, lambda i, s: (s[1], s[0] * 0.5 + s[1]), (x, x[::-1])),
        jax.lax.fori_loop(0, 4, lambda i, s: s + at(i), jnp.zeros(6)), jax.lax.fori_loop(0, 4, put, x),
        jax.lax.while_loop(lambda s: s[1] < 5, lambda s: (jnp.tanh(s[0] @ w["h"]), s[1] + 1), (x, 0))[0],
        jax.lax.scan(inner, x[0], x), jax.lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v @ v.T @ v, x),
    )  # fmt: skip


def relative(q, w):
    """Scores with vectors that each pair of places has of its own, and values with others: as they come, and
    where heads stand in two axes; and a matrix for every pair of two leading axes.
    """
    near = lambda q, k: jnp.einsum("...id,ijd->...ij", q, k)
    s = jax.nn.softmax(near(q, w["k"]))
    return (
        near(q[None] * 0.5, w["k"]),
        jnp.einsum("...ij,ijd->...id", s, w["v"]),
        jnp.einsum("abd,abjd->abj", q, w["pairs"]),
    )


def drawn(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def small_programs():
    """{name: (function, arguments)} of everything that has C, on odd sizes."""
    conv = dict(zip(("dense", "b", "own", "two", "three", "first", "row"),
                    drawn((3, 2, 6, 5), (5,), (3, 3, 1, 6), (3, 3, 1, 12), (3, 3, 2, 9), (5, 9, 3, 3),
                          (3, 6, 7)), strict=True))  # fmt: skip
    held = dict(
        zip(("left", "batch", "tall", "rows"), drawn((7, 4), (3, 5, 6), (4, 6), (4, 5, 6)), strict=True)
    )
    x = drawn((2, 9, 8, 6), (3, 4, 5), (3, 4, 6), (4, 5, 6), (4, 5, 6), (1, 5, 1), (4, 6), (6, 6))
    return {
        "convolutions": (convolutions, (x[0], conv)), "pools": (pools, (x[0],)),
        "products": (products, (x[1], x[2], held)), "pairs": (pairs, (x[3], 2 * x[4], x[5])),
        "relative": (relative, (x[1], dict(zip(("k", "v", "pairs"), drawn((4, 6, 5), (4, 6, 7), (3, 4, 6, 5)),
                                               strict=True)))),
        "moves": (moves, (x[1],)), "loops": (loops, (x[6], {"h": x[7] / 2})),
    }  # fmt: skip


@pytest.mark.tools
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", list(small_programs()))
def test_hw_mcu_emit_has_c_for(name, bits, tmp_path):
    """With int16 activations the flags of a comparison are float's work, and refused."""
    fn, args = small_programs()[name]
    weights = ("w",) if isinstance(args[-1], dict) else ()
    program = hw.trace(fn, *args, weights=weights)
    plan = hw.calibrate(program, [args], activation_bits=bits)
    target = hw.stm32f746(plan=plan, profile="emitted", activation_bits=bits)
    if bits == 16 and name in ("pairs", "loops"):
        with pytest.raises(hw.UnsupportedPrimitive, match="straight lines come close enough"):
            emit_c(program, target, args)
        return
    for n, (got, want) in enumerate(on_this_computer(program, args, target, tmp_path)):
        np.testing.assert_array_equal(got, want, err_msg=f"result {n}")


@pytest.mark.tools
@pytest.mark.parametrize(("name", "core", "bits"), [
    ("mlp", "cortex_m3", 8), ("vit", "cortex_m7", 8), ("vit", "cortex_m4", 16), ("cnn", "cortex_m7", 8),
    ("layers", "cortex_m3", 8), ("mcuformer", "cortex_m7", 8), ("mcuformer_absolute", "cortex_m4", 16),
], ids=called)  # fmt: skip
def test_hw_mcu_emit_runs_in_the_emulator(name, core, bits):
    """Codes equal, RAM of the linked program equal to the plan, instructions within 10 % of the estimate."""
    program, args, target = made(name, bits)
    target = replace(target, core=core, cpi=1.0)
    codes, want = expected(program, args, target)
    count, got, ram = claims.run_c(emit_c(program, target, args), codes, want.size, core)
    np.testing.assert_array_equal(got, want)
    assert ram == target.memory(program).total
    estimate = hw.execute(program, args, target)[1].cycles
    assert abs(estimate / count - 1) <= 0.1
