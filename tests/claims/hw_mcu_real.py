"""Real networks on the microcontroller target: `python -m tests.claims.hw_mcu_real` (a minute on two cores).

Needs `triptych fetch` of mnist and forecaster, arm-none-eabi-gcc and qemu-system-arm. Writes
docs/data/hw_mcu_real.json: a small convolutional network trained on 4,000 digits of MNIST, its accuracy on
1,000 others in float, int8 and with int16 activations, and images of it on an emulated Cortex-M7; the trained
weights of the forecaster beside its authors' own int8 codes, and its core, a ladder of dilated causal
convolutions with one block's weights, on a drawn series.
"""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.blocks.optim import adam, adam_init
from hw.mcu_emit import emit_c
from ref.blocks.quantize import symmetric_params
from ref.fetch import fetch
from ref.models.tensor_files import load_safetensors
from tests.claims.hw_mcu_emit import FILES as EMITTED
from tests.claims.hw_mcu_emit import as_bytes, run_c
from tests.claims.record import store

FILES = (*(f for f in EMITTED if f.startswith(("hw/", "ref/"))), "tests/claims/hw_mcu_real.py")
NHWC = ("NHWC", "HWIO", "NHWC")


def digits():
    """((train images [4000, 28, 28, 1], labels), the same of 1,000 others), pixels in 0..1."""
    with gzip.open(fetch("mnist"), "rt") as f:
        table = np.loadtxt(f, delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    x, y = table[order, :-1].reshape(-1, 28, 28, 1) / 255, table[order, -1].astype(int)
    return (x[:4000].astype(np.float32), y[:4000]), (x[4000:].astype(np.float32), y[4000:])


def classify(x, w):
    """Two convolutions, each with ReLU, a window of maxima, a dense layer: x [n, 28, 28, 1] -> [n, 10]."""
    conv = lambda x, w, stride: jax.lax.conv_general_dilated(
        x, w, (stride,) * 2, "SAME", dimension_numbers=NHWC
    )
    row = lambda v: v[None, None, None]
    x = jax.nn.relu(conv(x, w["a"], 2) + row(w["ba"]))
    x = jax.nn.relu(conv(x, w["b"], 1) + row(w["bb"]))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(x), -1) @ w["head"] + w["bias"][None]


def trained(train, *, epochs=6, batch=50, seed=0):
    """Weights of `classify` after some epochs of Adam."""
    rng = np.random.default_rng(seed)
    g = lambda *s: jnp.asarray(rng.standard_normal(s) * np.sqrt(2 / np.prod(s[:-1])), jnp.float32)
    w = {"a": g(5, 5, 1, 6), "ba": jnp.zeros(6), "b": g(3, 3, 6, 12), "bb": jnp.zeros(12), "head": g(588, 10),
         "bias": jnp.zeros(10)}  # fmt: skip
    loss = lambda w, x, y: -jax.nn.log_softmax(classify(x, w))[jnp.arange(len(y)), y].mean()
    step = jax.jit(lambda w, state, x, y: adam(w, jax.grad(loss)(w, x, y), state, lr=2e-3))
    state = adam_init(w)
    for _ in range(epochs):
        for at in rng.permutation(len(train[0])).reshape(-1, batch):
            w, state = step(w, state, train[0][at], train[1][at])
    return jax.tree.map(np.asarray, w)


def mnist(images=3) -> dict:
    """Accuracy in float and in both widths, and a few images in the emulator."""
    train, (x, y) = digits()
    w = trained(train)
    right = lambda z: float((np.argmax(z, 1) == y).mean())
    many, one = (hw.trace(classify, x[:n], w, weights=("w",)) for n in (len(x), 1))
    out = {"images": len(x), "float": right(hw.run_program(many, (x, w))[0]), "cases": []}
    for bits in (8, 16):
        plan = hw.calibrate(one, [(v[None], w) for v in train[0][:200]], activation_bits=bits)
        target = hw.stm32f746(plan=plan, profile="emitted", activation_bits=bits)
        policy = target.prepared(one, (x[:1], w)).formats
        got = np.array([hw.run_program(one, (v[None], w), policy=policy)[0][0] for v in x])
        files, equal, counts = emit_c(one, target, (x[:1], w)), True, []
        for v, want in zip(x[:images], got, strict=False):
            given, codes = (as_bytes(policy, i, a) for i, a in
                            ((one.body.inputs[0], v), (one.body.outputs[0], want)))  # fmt: skip
            count, said, ram = run_c(files, given, codes.size, "cortex_m7")
            equal &= bool(np.array_equal(said, codes))
            counts.append(count)
        r = hw.estimate(one, target)
        out["cases"].append({"bits": bits, "accuracy": right(got), "equal": equal, "instructions": counts[0],
                             "estimate": round(r.cycles), "ram": ram, "plan": target.memory(one).total,
                             "flash": target.flash_bytes(one), "ms": 1e3 * r.seconds})  # fmt: skip
    return out


# The forecaster


def own_int8(folder) -> dict:
    """Our symmetric scales and codes of every weight that its authors quantised, beside theirs."""
    float_, int8 = (load_safetensors(folder / f"model{s}.safetensors") for s in ("", ".int8"))
    scales, same, total = [], 0, 0
    for name, codes in int8.items():
        if not name.endswith(".qweight"):
            continue
        w = float_[name.removesuffix(".qweight")].astype(np.float64)
        theirs = int8[name.replace(".qweight", ".scale")].astype(np.float64)
        rows = w.reshape(theirs.size, -1)
        ours = symmetric_params(np.abs(rows).max(1), bits=8)
        scales.append(np.abs(ours / theirs.ravel() - 1).max())
        mine = np.clip(np.rint(rows / ours[:, None]), -127, 127)
        same += int((mine == codes.reshape(rows.shape)).sum())
        total += rows.size
    return {"tensors": len(scales), "codes": total, "same": same, "scale_error": float(max(scales))}


def core(x, p, *, stages):
    """Features [L, 7] through the projection and `stages` of one block, dilations 1, 2, 4, ...: [L, 64].

    A stage: gains of its scale; a causal depthwise convolution of three taps and a pointwise one, added and
    normed; a gated MLP, added and normed. Norms are RMS norms.
    """
    norm = lambda x, g: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * g[None]
    b = lambda name: p[f"core.block.{name}"]
    x = x @ p["core.in_proj.weight"].T + p["core.in_proj.bias"][None]
    for n in range(stages):
        d = 2**n
        angle = n / 2.0 ** np.arange(4) * np.pi
        f = np.concatenate([np.sin(angle), np.cos(angle)]).astype(np.float32)
        gain, offset = jnp.split(p["core.scale.to_gb.weight"] @ f + p["core.scale.to_gb.bias"], 2)
        x = x * (1 + gain)[None] + offset[None]
        y = jax.lax.conv_general_dilated(
            x[None], b("dw_weight").transpose(2, 1, 0), (1,), [(2 * d, 0)], rhs_dilation=(d,),
            feature_group_count=x.shape[-1], dimension_numbers=("NWC", "WIO", "NWC"),
        )[0] + b("dw_bias")[None]  # fmt: skip
        x = norm(x + y @ b("pw.weight").T + b("pw.bias")[None], b("norm1.weight"))
        up = x @ b("ffn.up.weight").T + b("ffn.up.bias")[None]
        gated = jax.nn.silu(up[:, :96]) * up[:, 96:]
        x = norm(x + gated @ b("ffn.down.weight").T + b("ffn.down.bias")[None], b("norm2.weight"))
    return norm(x, p["core.norm.weight"])


def series(length, seed=0):
    """A drawn series, two periods, a trend and noise, with its features: value, coverage, five of recency."""
    rng, t = np.random.default_rng(seed), np.arange(length)
    v = np.sin(t / 3.8) + 0.5 * np.sin(t / 27.6) + t / length + 0.1 * rng.standard_normal(length)
    v = (v - np.median(v)) / np.std(v)
    near = [np.exp(-(length - 1 - t) / 2.0**k) for k in (2, 4, 6, 8, 10)]
    return np.stack([v, np.ones(length), *near], 1).astype(np.float32)


def forecaster(length=512, stages=10, small=(12, 2), context=2048) -> dict:
    """The core in both widths against float, priced; a short one emulated; its whole context planned."""
    folder = Path(fetch("forecaster"))
    p = {k: v for k, v in load_safetensors(folder / "model.safetensors").items() if k.startswith("core.")}
    run = lambda n: lambda x, p: core(x, p, stages=n)
    out = {"own": own_int8(folder), "length": length, "stages": stages, "cases": []}
    for bits in (8, 16):
        x = series(length)
        program = hw.trace(run(stages), x, p, weights=("p",))
        target = hw.stm32f746(profile="emitted", activation_bits=bits)
        report = hw.execute(program, (x, p), target)[1]
        full = hw.trace(run(stages), series(context), p, weights=("p",))
        x = series(small[0])
        short = hw.trace(run(small[1]), x, p, weights=("p",))
        ready = target.prepared(short, (x, p))
        want, _ = hw.run_program(short, (x, p), policy=ready.formats)
        given, codes = (as_bytes(ready.formats, i, a) for i, a in
                        ((short.body.inputs[0], x), (short.body.outputs[0], want)))  # fmt: skip
        count, got, ram = run_c(emit_c(short, ready, (x, p)), given, codes.size, "cortex_m7")
        cycles = hw.execute(short, (x, p), target)[1].cycles
        out["cases"].append({
            "bits": bits, "context": context, "needs": target.memory(full).total, "room": target.rooms[0],
            "snr_db": report.quality["snr_db"], "arena": report.peak_memory,
            "flash": target.flash_bytes(program), "ms": 1e3 * report.seconds,
            "equal": bool(np.array_equal(got, codes)), "ram": ram, "plan": ready.memory(short).total,
            "instructions": count, "estimate": round(cycles),
        })  # fmt: skip
    return out


if __name__ == "__main__":
    results = {"mnist": mnist(), "forecaster": forecaster()}
    print(results)
    print(store("hw_mcu_real", results, FILES))
