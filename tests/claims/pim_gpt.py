"""Eight GPTs on PIM-GPT, T4 and Xeon, all of them models of ours: `python -m tests.claims.pim_gpt`.

Estimates, no measurements. A decode step at context 512, the middle of the paper's 1,024 tokens: on PIM-GPT
by its simulator, and one traced program side by side on `pim_gpt()`, `t4()` and `xeon_6154()`, each from
ideal (nothing but bytes and operations) over compiled to eager (a framework's overhead on every operator: a
norm, a softmax, a product with its bias). Writes docs/data/pim_gpt.json; half a minute, no GPU.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.blocks.mlp import linear, mlp
from accel.blocks.norms import layer_norm
from accel.blocks.transformer import BlockParams
from hw import pim
from hw.pim_decode import GPTS
from tests.claims.record import store

FILES = (
    "hw/pim_decode.py",
    "hw/pim_layout.py",
    "hw/pim.py",
    "hw/pim_schedule.py",
    "hw/pim_cost.py",
    "hw/pim_parts.py",
    "hw/gpu.py",
    "hw/cpu.py",
    "hw/parts.py",
    "ref/blocks/dram.py",
    "ref/blocks/asic.py",
    "tests/claims/pim_gpt.py",
)
POSITION = 511
EAGER_US = 30.0  # of a framework on every operator, an assumption
SWEEPS = {
    "asic.ghz": (1.0, 0.5, 0.2, 0.1),
    "t_burst": (1, 2, 4, 8),
    "lanes": (16, 32, 64),
    "channels": (8, 16, 32),
}


def step(params, x, cache, position):
    """One decode step of all layers, without embedding and head: x [D], cache (k, v), each [L, H, S, d]."""

    def layer(x, given):
        p, k, v = given
        heads, _, d = k.shape
        h = layer_norm(x, p.ln1_scale, p.ln1_bias)
        q, new_k, new_v = (
            linear(h, w, b).reshape(heads, 1, d) for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
        )
        at = (np.int32(0), position, np.int32(0))
        k, v = (jax.lax.dynamic_update_slice(a, new, at) for a, new in ((k, new_k), (v, new_v)))
        scores = jnp.matmul(q, k.swapaxes(-1, -2)) * np.float16(d**-0.5)
        values = jnp.matmul(jax.nn.softmax(scores), v)  # every token of the cache is there: no mask
        x = x + linear(values.reshape(heads * d), p.w_o, p.b_o)
        h = layer_norm(x, p.ln2_scale, p.ln2_bias)
        return x + mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, activation="gelu_tanh"), (k, v)

    return jax.lax.scan(layer, x, (params, *cache))


def program(shape, n):
    """The traced step in 16-bit numbers, the n-th token of a text; weights and cache are told as resident."""
    f = lambda *s: jax.ShapeDtypeStruct(s, jnp.float16)
    L, D, H, d = shape.layers, shape.d_model, shape.heads, shape.head_dim
    sizes = {"w_fc1": (D, 4 * D), "b_fc1": (4 * D,), "w_fc2": (4 * D, D)}
    square = {name: (D, D) for name in ("w_q", "w_k", "w_v", "w_o")}
    params = BlockParams(**{name: f(L, *(sizes | square).get(name, (D,))) for name in BlockParams._fields})
    cache = (f(L, H, n, d), f(L, H, n, d))
    position = jax.ShapeDtypeStruct((), jnp.int32)
    return hw.trace(step, params, f(D), cache, position, weights=("params", "cache"))


def targets():
    """{label: target} that share the program."""
    return {
        "pim_gpt_program": pim.pim_gpt(),
        "t4_ideal": hw.t4(ideal=True),
        "t4_compiled": hw.t4(),
        "t4_eager": hw.t4(launch_us=EAGER_US),
        "xeon_6154_ideal": hw.xeon_6154(ideal=True),
        "xeon_6154_compiled": hw.xeon_6154(),
        "xeon_6154_eager": hw.xeon_6154(op_overhead_us=EAGER_US),
    }


def model(shape, position=POSITION):
    """{machine: microseconds and millijoules a token} of a model; PIM-GPT's row has its parts too."""
    r = hw.simulate_token(shape, position, pim.pim_gpt())
    rows = {
        "pim_gpt": {
            "us": r.ns / 1e3, "mj": r.energy_j * 1e3, "ticks": r.ticks, "hit_rate": r.hit_rate,
            "asic_share": r.asic_share, "pin_bytes": r.pin_bytes, "by_part": r.by_part,
            "energy_mj": {k: v * 1e3 for k, v in r.energy.items()},
        }
    }  # fmt: skip
    p = program(shape, position + 1)
    launches = [hw.estimate(p, hw.t4(launch_us=us)).seconds * 1e6 for us in (0.0, 1.0)]
    rows["operators"] = round(launches[1] - launches[0])
    for name, target in targets().items():
        e = hw.estimate(p, target)
        rows[name] = {"us": e.seconds * 1e6, "mj": e.energy_j * 1e3, "bound_by": e.bound_by}
    return rows


def measure():
    """All models, the sweeps of two, and how long a thousand tokens of the largest take to simulate."""
    machine = pim.pim_gpt()
    start = time.process_time()
    run = hw.simulate_generation(GPTS["gpt2_xl"](), 1, 1023, machine)
    seconds = time.process_time() - start
    ran = {"tokens": len(run.token_ticks), "ms": run.ns / 1e6, "j": run.energy_j, "simulated_s": seconds}
    return {
        "position": POSITION,
        "eager_us": EAGER_US,
        "models": {name: model(make()) for name, make in GPTS.items()},
        "sweeps": {
            name: {field: hw.sweep(GPTS[name](), field, values, machine) for field, values in SWEEPS.items()}
            for name in ("gpt2_small", "gpt2_xl")
        },
        "generation": ran,
    }


if __name__ == "__main__":
    print(store("pim_gpt", measure(), FILES))
