"""Planned networks as C on a Cortex-M in an emulator: `python -m tests.claims.hw_mcu_emit`.

Needs arm-none-eabi-gcc and qemu-system-arm (Debian: gcc-arm-none-eabi, qemu-system-arm). Each network is
calibrated, planned, emitted, compiled and run; docs/data/hw_mcu_emit.json holds whether the results equal the
executor's bit for bit, the bytes of RAM of the linked program beside the plan's, and the retired instructions
beside the estimate under profile="emitted", whose constants come from other shapes (hw_mcu_counts).
"""

import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.devices.mcuformer import SubnetConfig, init_mcuformer, mcuformer_forward
from hw.mcu_arena import SWITCHES
from hw.mcu_emit import emit_c
from ref.data import digits
from tests.claims.hw_mcu_counts import CORES, LINK, START, TICKS
from tests.claims.record import store

FILES = (
    "hw/kernel_counts.py",
    "hw/mcu.py",
    "hw/mcu_arena.py",
    "hw/mcu_c.py",
    "hw/mcu_c16.py",
    "hw/mcu_calibrate.py",
    "hw/mcu_emit.py",
    "hw/mcu_emit_moves.py",
    "hw/mcu_emit_units.py",
    "hw/mcu_flash.py",
    "hw/mcu_flow.py",
    "hw/mcu_int16.py",
    "hw/mcu_int8.py",
    "hw/mcu_layout.py",
    "hw/mcu_own.py",
    "hw/mcu_parts.py",
    "hw/mcu_patterns.py",
    "hw/mcu_price.py",
    "hw/mcu_run.py",
    "hw/mcu_units.py",
    "accel/devices/mcuformer.py",
    "ref/blocks/int16_ops.py",
    "ref/blocks/int8_ops.py",
    "tests/claims/hw_mcu_emit.py",
)
PARTS = {"cortex_m7": "stm32f746", "cortex_m4": "stm32f427", "cortex_m3": "mps2_an385"}
OFF = dict.fromkeys(SWITCHES, False)
MAIN = """
static const int8_t given[] = {%s};
void main_(void) {
%s  TIMER[1] = 0xFFFFFF; TIMER[0] = 5; TIMER[2] = 0;
  uint32_t t0 = TIMER[2];
  net(given);
  uint32_t t1 = TIMER[2];
  say((t0 - t1) & 0xFFFFFF);
  for (int i = 0; i < %d; i++) say((uint8_t)arena[OUT_0 + i]);
  host(0x18, (void *)0x20026);
}
"""


def mlp(x, w):
    """Two dense layers and a softmax, on one row."""
    h = jax.nn.gelu(x @ w["a"] + w["ba"][None], approximate=False)
    return jax.nn.softmax(h @ w["b"] + w["bb"][None])


def mlp_args(rng, n=64, hidden=51, classes=10):
    """An input like an 8 x 8 digit, and weights."""
    g = lambda *s: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32)
    w = {"a": g(n, hidden), "ba": g(hidden), "b": 3 * g(hidden, classes), "bb": g(classes)}
    return rng.uniform(0, 1, (1, n)).astype(np.float32), w


def norm(x, g, b):
    """Layer norm with gain and bias."""
    m = x.mean(-1, keepdims=True)
    return (x - m) * jax.lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-6) * g[None] + b[None]


def vit(img, w, *, p=4, heads=2):
    """Patches, one transformer block, mean over tokens, a head."""
    n, E = img.shape[0] // p, w["b"].shape[0]
    x = img.reshape(n, p, n, p, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, p * p * 3) @ w["patch"]
    x = x + w["b"][None] + w["pos"]
    y = norm(x, w["g"], w["b"])
    q, k, v = ((y @ w[c]).reshape(n * n, heads, E // heads).transpose(1, 0, 2) for c in "qkv")
    s = jax.nn.softmax(jnp.einsum("hid,hjd->hij", q, k) * 0.4)
    x = x + (s @ v).transpose(1, 0, 2).reshape(n * n, E) @ w["o"] + w["b"][None]
    x = x + jax.nn.gelu(norm(x, w["g"], w["b"]) @ w["up"] + w["bu"][None], approximate=False) @ w["down"]
    return x.mean(0) @ w["head"]


def vit_args(rng, side=20, E=24):
    """An image and weights."""
    g = lambda *s: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32)
    n = (side // 4) ** 2
    w = {"patch": g(48, E), "b": g(E), "pos": 3 * g(n, E), "g": 1 + g(E) / 8, "o": g(E, E), "up": g(E, 3 * E)}
    w |= {"bu": g(3 * E), "down": g(3 * E, E), "head": g(E, 10)} | {c: g(E, E) for c in "qkv"}
    return rng.random((side, side, 3)).astype(np.float32), w


def cnn(img, w):
    """A convolution, a depthwise and a pointwise one, pooling between them, mean over the map, a head."""
    conv = lambda x, w, stride=1, groups=1: jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    row = lambda v: v[None, None, None]
    x = jax.nn.relu(conv(img[None], w["a"]) + row(w["ba"]))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    y = jax.nn.relu(conv(x, w["b"], groups=x.shape[-1]) + row(w["bb"]))
    x = jnp.maximum(conv(y, w["c"]), x)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return x.mean((1, 2)) @ w["head"]


def cnn_args(rng, side=18, C=12):
    """An image and weights."""
    g = lambda *s: (rng.standard_normal(s) / np.sqrt(np.prod(s[:-1]))).astype(np.float32)
    w = {"a": g(3, 3, 3, C), "ba": g(C), "b": 2 * g(3, 3, 1, C), "bb": g(C), "c": g(1, 1, C, C)}
    return rng.random((side, side, 3)).astype(np.float32), w | {"head": g(C, 10)}


def layers(x, w):
    """Residual layers with RMS norms, their weights stacked, as one loop; then a recurrent one over rows."""

    def layer(x, p):
        y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["g"][None]
        return x + jax.nn.silu(y @ p["up"]) @ p["down"], None

    x = jax.lax.scan(layer, x, {k: w[k] for k in ("g", "up", "down")})[0]
    return jax.lax.scan(lambda h, t: (jnp.tanh(h @ w["h"] + t), h), jnp.zeros(x.shape[1]), x)[0] @ w["head"]


def layers_args(rng, n=9, E=20, depth=3):
    """Rows and weights."""
    g = lambda *s: (rng.standard_normal(s) / np.sqrt(s[-2])).astype(np.float32)
    w = {"g": 1 + g(depth, E) / 8, "up": g(depth, E, 2 * E), "down": g(depth, 2 * E, E), "h": g(E, E) / 2}
    return rng.standard_normal((n, E)).astype(np.float32), w | {"head": g(E, 7)}


NET = {"patch": 8, "rank_ratio": 0.75, "max_distance": 3, "head_dim": 8}


def mcuformer(img, w, *, relative_position=True):
    """MCUFormer whole: patches, low-rank layers, relative positions, a mean over the patches, a head."""
    depth, E = len(w.blocks), w.w_patch.shape[0]
    subnet = SubnetConfig(E, (2,) * depth, (1.5,) * depth)
    return mcuformer_forward(img, w, subnet=subnet, relative_position=relative_position, **NET)


def mcuformer_args(rng, side=40, E=20, depth=2):
    """An image of 5 x 5 patches, framed by zeros if its side is not 40, and weights."""
    shape = {"image_size": side, "embed_dim": E, "depth": depth, "heads": 2, "mlp_ratio": 1.5}
    w = init_mcuformer(rng, **shape, num_classes=10, std=0.3, **NET)
    return rng.random((side, side, 3)).astype(np.float32), jax.tree.map(lambda a: a.astype(np.float32), w)


def trained(epochs=300, hidden=32, seed=0):
    """(weights of `mlp` trained on the handwritten digits, images, labels held out): NumPy, a few seconds."""
    images, labels = digits()
    x, rng = np.asarray(images, np.float64).reshape(len(labels), -1), np.random.default_rng(seed)
    x = x / x.max()
    order = rng.permutation(len(x))
    train, test = order[:300], order[300:]
    w = [
        rng.standard_normal((64, hidden)) / 8,
        np.zeros(hidden),
        rng.standard_normal((hidden, 10)) / 6,
        np.zeros(10),
    ]
    velocity = [np.zeros_like(v) for v in w]
    goal = np.eye(10)[labels[train]]
    for _ in range(epochs):
        h = x[train] @ w[0] + w[1]
        a = np.maximum(h, 0)
        z = a @ w[2] + w[3]
        e = np.exp(z - z.max(1, keepdims=True))
        d = (e / e.sum(1, keepdims=True) - goal) / len(train)
        back = (d @ w[2].T) * (h > 0)
        for v, m, g in zip(w, velocity, (x[train].T @ back, back.sum(0), a.T @ d, d.sum(0)), strict=True):
            m *= 0.9
            m -= g
            v += 0.5 * m
    w = dict(zip(("a", "ba", "b", "bb"), (v.astype(np.float32) for v in w), strict=True))
    return w, x[train].astype(np.float32), x[test].astype(np.float32), labels[test]


def classify(x, w):
    """A dense layer, ReLU, a dense layer."""
    return jax.nn.relu(x @ w["a"] + w["ba"][None]) @ w["b"] + w["bb"][None]


def digit_classifier(images=4) -> dict:
    """Accuracy of the trained network in float and in int8, and a few images on the emulated Cortex-M7."""
    w, train, test, labels = trained()
    program = hw.trace(classify, test, w, weights=("w",))
    some = [(train[n : n + len(test)], w) for n in range(0, len(train), len(test))]
    target = hw.stm32f746(plan=hw.calibrate(program, some), profile="emitted")
    int8, report = hw.execute(program, (test, w), target)
    exact, _ = hw.run_program(program, (test, w))
    right = lambda y: float((np.argmax(y, 1) == labels).mean())
    one = hw.trace(classify, test[:1], w, weights=("w",))
    plan = hw.calibrate(one, [(row[None], w) for row in train[:300]])
    small = hw.stm32f746(plan=plan, profile="emitted")
    files, equal, counts = emit_c(one, small, (test[:1], w)), True, []
    for row in test[:images]:
        ready = small.prepared(one, (row[None], w))
        want, _ = hw.run_program(one, (row[None], w), policy=ready.formats)
        given = ready.formats.codes(one.body.inputs[0], row)
        count, got, ram = run_c(files, given, 10, "cortex_m7")
        equal &= bool(np.array_equal(got, ready.formats.codes(one.body.outputs[0], want).ravel()))
        counts.append(count)
    return {
        "float": right(exact), "int8": right(int8), "images": len(test), "snr_db": report.quality["snr_db"],
        "equal": equal, "instructions": counts[0], "ram": ram, "plan": small.memory(one).total,
        "flash": small.flash_bytes(one), "estimate": round(hw.estimate(one, small).cycles),
    }  # fmt: skip


NETWORKS = {
    "mlp": (mlp, mlp_args),
    "vit": (vit, vit_args),
    "cnn": (cnn, cnn_args),
    "layers": (layers, layers_args),
    "mcuformer": (mcuformer, mcuformer_args),
    "mcuformer_absolute": (partial(mcuformer, relative_position=False), partial(mcuformer_args, side=38)),
}


def run_c(files, given, n, core) -> tuple[int, np.ndarray, int]:
    """(instructions, bytes of the first result as int8, bytes of RAM) of an emitted network in the emulator.

    given: codes of the input as bytes; n: how many bytes the result has.
    """
    codes = np.asarray(given, np.int8).ravel()
    inside = "IN_0" in files["net.h"]
    copy = f"  for (int i = 0; i < {codes.size}; i++) arena[IN_0 + i] = given[i];\n" if inside else ""
    main = '#include "net.h"\n' + START + MAIN % (",".join(map(str, codes)), copy, n)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for name, text in {**files, "main.c": main, "link.ld": LINK}.items():
            (d / name).write_text(text)
        flags = [
            "-mcpu=" + core.replace("_", "-"),
            "-mthumb",
            "-Ofast",
            "-fwrapv",
            "-nostartfiles",
            f"-T{d}/link.ld",
        ]
        units = [str(d / f) for f in ("main.c", "net.c", "kernels.c")]
        subprocess.run(["arm-none-eabi-gcc", *flags, *units, "-lgcc", "-o", str(d / "a.elf")], check=True)
        size = subprocess.run(
            ["arm-none-eabi-size", str(d / "a.elf")], capture_output=True, text=True, check=True
        )
        data, bss = (int(v) for v in size.stdout.splitlines()[1].split()[1:3])
        run = ["qemu-system-arm", "-M", CORES[core], "-icount", "shift=6", "-nographic", "-monitor", "none"]
        run += ["-serial", "none", "-semihosting", "-kernel", str(d / "a.elf")]
        said = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False)
    found = [int(v) for v in (said.stdout + said.stderr).split()]
    if len(found) != n + 1:
        raise RuntimeError(f"{core}: {len(found)} numbers where {n + 1} were due: {said.stderr[:200]}")
    return round(found[0] / TICKS), np.array(found[1:], np.uint8).view(np.int8), data + bss


def as_bytes(policy, i, x):
    """The codes of a tensor as the arena has them."""
    return policy.codes(i, x).astype(policy.name).ravel().view(np.int8)


def run_network(name, core, switches, bits=8, seed=0) -> dict:
    """One network on one core: equal codes, RAM and instructions beside the plan and the estimate."""
    fn, make = NETWORKS[name]
    args = make(np.random.default_rng(seed))
    program = hw.trace(fn, *args, weights=("w",))
    plan = hw.calibrate(program, [args], activation_bits=bits)
    target = getattr(hw, PARTS[core])(plan=plan, profile="emitted", activation_bits=bits, **switches)
    ready = target.prepared(program, args)
    want, _ = hw.run_program(program, args, policy=ready.formats)
    out, first = program.body.outputs[0], program.body.inputs[0]
    codes, given = as_bytes(ready.formats, out, want), as_bytes(ready.formats, first, args[0])
    count, got, ram = run_c(emit_c(program, target, args), given, codes.size, core)
    report = hw.execute(program, args, replace(target, cpi=1.0))[1]
    return {
        "network": name, "bits": bits, "core": core, "switches": "all" if not switches else "none",
        "equal": bool(np.array_equal(got, codes)), "ram": ram, "plan": ready.memory(program).total,
        "instructions": count, "estimate": round(report.cycles),
    }  # fmt: skip


def main():
    """Every network on three cores, with all ways to save memory and with none; with int16 saving on two."""
    cases = [(8, core, switches) for core in PARTS for switches in ({}, OFF)]
    cases += [(16, core, {}) for core in ("cortex_m7", "cortex_m3")]
    rows = []
    for name in NETWORKS:
        for bits, core, switches in cases:
            rows.append(run_network(name, core, switches, bits))
            print(rows[-1], rows[-1]["estimate"] / rows[-1]["instructions"])
    digit = digit_classifier()
    print(digit)
    print(store("hw_mcu_emit", {"networks": rows, "digits": digit}, FILES))


if __name__ == "__main__":
    main()
