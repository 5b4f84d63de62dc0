"""The microcontroller target over every example, and one transformer block: `python -m tests.claims.hw_mcu`.

Writes docs/data/hw_mcu.json: each example of the techniques in int8, and with int16 activations, against
float, and again inside its poisoned arena; the op program of a vision transformer block (weights as shapes),
which the chapter plans and prices at build. Nothing is measured on a board.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import hw
import ref
from hw.front import difference
from hw.mcu_arena import SWITCHES
from ref.blocks.arena import overlaps
from tests.claims.record import store

FILES = (
    "hw/mcu_arena.py",
    "hw/mcu_calibrate.py",
    "hw/mcu_flow.py",
    "hw/mcu_int16.py",
    "hw/mcu_int8.py",
    "hw/mcu_run.py",
    "hw/mcu_patterns.py",
    "hw/mcu_units.py",
    "tests/claims/hw_mcu.py",
)
SIDE, PATCH, WIDTH, HEADS = 240, 16, 192, 3


def run_example(name, program, args, target) -> dict:
    """Int8 against float, and the same inside an arena of exactly the planned bytes, dead ones poisoned."""
    row = {"name": name, "refused": "", "same": False}
    try:
        ready = target.prepared(program, args)
        ready.place(program)
    except (hw.UnsupportedPrimitive, hw.DoesNotFit) as why:
        return row | {"refused": f"{type(why).__name__}: {why}"}
    want, seen = hw.run_program(program, args, policy=ready.formats)
    exact, _ = hw.run_program(program, args)
    plan = ready.memory(program)
    got, run = ready.run_arena(program, args)
    pair = lambda v: v if isinstance(v, tuple) else (v,)
    same = all(np.array_equal(a, b) for a, b in zip(pair(got), pair(want), strict=True))
    full = -(-max(run.touched.values(), default=0) // 16) * 16
    snr = difference(want, exact)["snr_db"]
    plain = replace(target, **dict.fromkeys(SWITCHES, False)).memory(program)
    return row | {
        "same": bool(same and full == plan.total and not overlaps(plan.arena)),
        "snr_db": None if not np.isfinite(snr) else round(snr, 1),
        "float_results": seen.events.get("float results", 0),
        "arena": plan.total,
        "bound": plan.bound,
        "plain": plain.total,
    }


def block(img, w):
    """Patches, positions, attention, MLP, a head: one block of a small vision transformer."""
    n, E = SIDE // PATCH, WIDTH
    row = lambda v: v[None]

    def norm(x, g, b):
        m = x.mean(-1, keepdims=True)
        return (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-5) * row(g) + row(b)

    x = img.reshape(n, PATCH, n, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, -1) @ w["patch"]
    x = x + row(w["b_patch"]) + w["pos"]
    y = norm(x, w["g1"], w["b1"])
    q, k, v = ((y @ w[c] + row(w["b" + c])).reshape(n * n, HEADS, E // HEADS).swapaxes(0, 1) for c in "qkv")
    p = jax.nn.softmax(jnp.einsum("hid,hjd->hij", q, k) * (E // HEADS) ** -0.5)
    x = x + (p @ v).swapaxes(0, 1).reshape(n * n, E) @ w["o"] + row(w["bo"])
    f = jax.nn.gelu(norm(x, w["g2"], w["b2"]) @ w["up"] + row(w["bu"]), approximate=False)
    x = x + f @ w["down"] + row(w["bd"])
    return x.mean(0) @ w["head"]


def shapes():
    """Image and weights of `block` as shapes."""
    E, n = WIDTH, (SIDE // PATCH) ** 2
    f = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    w = {"patch": f(3 * PATCH**2, E), "b_patch": f(E), "pos": f(n, E), "up": f(E, 4 * E), "bu": f(4 * E)}
    w |= {"down": f(4 * E, E), "bd": f(E), "head": f(E, 1000)} | {c: f(E, E) for c in "qkvo"}
    w |= {"b" + c: f(E) for c in "qkvo"} | {c: f(E) for c in ("g1", "b1", "g2", "b2")}
    return f(SIDE, SIDE, 3), w


def cifar(img, w):
    """The network of CMSIS-NN's CIFAR-10 example: three convolutions of 5 x 5, pooled, and a dense layer."""
    x = img[None]
    for c in "abc":
        x = jax.lax.conv_general_dilated(
            x, w[c], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )  # fmt: skip
        x = jax.nn.relu(x + w["b" + c][None, None, None])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return x.reshape(1, -1) @ w["out"]


def cifar_shapes():
    """Image and weights of `cifar` as shapes."""
    f = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    w = {"a": f(5, 5, 3, 32), "b": f(5, 5, 32, 32), "c": f(5, 5, 32, 64), "out": f(1024, 10)}
    return f(32, 32, 3), w | {"ba": f(32), "bb": f(32), "bc": f(64)}


def main():
    """Run everything and store it."""
    from tests import conftest  # noqa: F401  before JAX starts: the CPU as the devices that the tests share
    from tests.test_layers_hw import HAS_ACCEL, traced

    targets = {bits: hw.stm32h743(activation_bits=bits) for bits in (8, 16)}
    rows = {8: [], 16: []}
    for slug in HAS_ACCEL:
        for i in range(len(getattr(ref, slug).example())):
            e, args, program, _ = traced(slug, i)
            for bits, target in targets.items():
                rows[bits].append(run_example(f"{slug}.{e.fn}", program, args, target))
                print(bits, rows[bits][-1])
    program = json.loads(hw.trace(block, *shapes(), weights=("w",)).to_json())
    small = json.loads(hw.trace(cifar, *cifar_shapes(), weights=("w",)).to_json())
    print(store("hw_mcu", {"examples": rows[8], "wide": rows[16], "block": program, "cifar": small}, FILES))


if __name__ == "__main__":
    main()
