"""Emitted networks (hw_mcu): the C equals the executor bit for bit, in the bytes of the plan."""

import ctypes
import shutil
import subprocess
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
from hw.mcu_emit import emit_c
from tests.claims import hw_mcu_emit as claims
from tests.claims import record

CC = shutil.which("cc") or shutil.which("gcc")


def made(name, seed=4, **fields):
    """(program, arguments, target) of a network on other sizes than the stored ones."""
    fn, make = claims.NETWORKS[name]
    args = make(
        np.random.default_rng(seed), **({"n": 37, "hidden": 22} if name == "mlp" else {"side": 12, "E": 18})
    )
    program = hw.trace(fn, *args, weights=("w",))
    return program, args, hw.stm32f746(plan=hw.calibrate(program, [args]), profile="emitted", **fields)


def expected(program, args, target):
    """(codes of the input, codes of the result) by the executor."""
    policy = target.prepared(program, args).formats
    out, _ = hw.run_program(program, args, policy=policy)
    return policy.codes(program.body.inputs[0], args[0]), policy.codes(program.body.outputs[0], out).ravel()


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
    assert len(results["networks"]) == 12
    for r in results["networks"]:
        assert r["equal"], r
        assert r["ram"] == r["plan"], r
        assert abs(r["estimate"] / r["instructions"] - 1) <= 0.1, r
    digit = results["digits"]
    assert digit["equal"]
    assert digit["ram"] == digit["plan"]
    assert digit["int8"] > digit["float"] - 0.01


def test_hw_mcu_emit_refuses_what_it_has_no_c_for():
    program, args, target = made("mlp")
    with pytest.raises(ValueError, match="needs a target with a plan"):
        emit_c(program, replace(target, plan=None))
    with pytest.raises(ValueError, match="is a weight without values"):
        emit_c(program, target)
    with pytest.raises(ValueError, match="one region"):
        emit_c(program, replace(target, regions=(("a", 64), ("b", 64))), args)
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    for fn, words in (
        (lambda x: jax.lax.scan(lambda c, r: (c + r, r), x[0], x)[0], "no loops or branches"),
        (lambda x: jnp.maximum(x, x[::-1]), "no C for 'max'"),
        (lambda x: jnp.argmax(x, -1), "int8 values only"),
        (lambda x: jnp.einsum("ki,kj->ij", x, x), "as rows"),
    ):
        p = hw.trace(fn, x)
        with pytest.raises(hw.UnsupportedPrimitive, match=words):
            emit_c(p, hw.stm32f746(plan=hw.calibrate(p, [(x,)])))


@pytest.mark.tools
@pytest.mark.parametrize("switches", [{}, claims.OFF], ids=["hw_mcu-saved", "hw_mcu-plain"])
@pytest.mark.parametrize("name", list(claims.NETWORKS))
def test_hw_mcu_emit_runs_on_this_computer(name, switches, tmp_path):
    program, args, target = made(name, **switches)
    files = emit_c(program, target, args)
    for f, text in files.items():
        (tmp_path / f).write_text(text)
    units = [str(tmp_path / f) for f in ("net.c", "kernels.c")]
    flags = ["-O2", "-fwrapv", "-Wall", "-Werror", "-Wno-unused-function", "-shared", "-fPIC"]
    subprocess.run([CC, *flags, *units, "-o", str(tmp_path / "net.so")], check=True)
    defined = dict(line.split()[1:] for line in files["net.h"].splitlines() if line.startswith("#define"))
    library = ctypes.CDLL(str(tmp_path / "net.so"))
    arena = np.frombuffer((ctypes.c_int8 * int(defined["ARENA_BYTES"])).in_dll(library, "arena"), np.int8)
    arena[:] = 0x55
    codes, want = expected(program, args, target)
    codes = codes.astype(np.int8).ravel()
    if "IN_0" in defined:
        at = int(defined["IN_0"])
        arena[at : at + codes.size] = codes
    library.net(codes.ctypes.data_as(ctypes.c_void_p))
    at = int(defined["OUT_0"])
    np.testing.assert_array_equal(arena[at : at + want.size], want)


@pytest.mark.tools
@pytest.mark.parametrize(("name", "core"), [("mlp", "cortex_m3"), ("vit", "cortex_m7"), ("vit", "cortex_m4")])
def test_hw_mcu_emit_runs_in_the_emulator(name, core):
    """Codes equal, RAM of the linked program equal to the plan, instructions within 10 % of the estimate."""
    program, args, target = made(name)
    target = replace(target, core=core, cpi=1.0)
    codes, want = expected(program, args, target)
    count, got, ram = claims.run_c(emit_c(program, target, args), codes, want.size, core)
    np.testing.assert_array_equal(got, want)
    assert ram == target.memory(program).total
    estimate = hw.execute(program, args, target)[1].cycles
    assert abs(estimate / count - 1) <= 0.1
