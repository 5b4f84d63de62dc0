"""How long pricing takes: `python -m tests.claims.hw_report` (20 s). Shapes alone, no weights.

Writes docs/data/hw_report.json: processor seconds of `estimate` for one decode step of SmolLM2-135M, with its
30 layers as one loop and written out as ops; against the number of ops; against the trips of a loop.
"""

import gc
import time
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp

import hw
from accel.models.llama import decode_step
from hw.targets import preset
from ref.language.smollm2 import SmolLM2Config
from tests.claims.hw_pim import shapes
from tests.claims.record import store

FILES = ("hw/count.py", "hw/fusion.py", "tests/claims/hw_report.py")
TARGETS = ("h200", "xeon_6154", "gddr6_aim", "pim_gpt", "zcu102")
DEPTHS = (1, 4, 15, 30, 60)
TRIPS = (1, 30, 1_000, 1_000_000)
CONTEXT = 512


def written_out(body, init, xs, length=None):
    """`jax.lax.scan` as a Python loop, so that every layer is ops of its own."""
    count, carry, rows = jax.tree.leaves(xs)[0].shape[0], init, []
    for i in range(count):
        carry, row = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        rows.append(row)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


def decode(depth, *, loop):
    """The op program of a decode step of `depth` layers."""
    config = replace(SmolLM2Config(), depth=depth)
    token, at = (jax.ShapeDtypeStruct((), jnp.int32) for _ in range(2))
    cache = jax.ShapeDtypeStruct((depth, 2, config.kv_heads, CONTEXT, config.head_dim), jnp.bfloat16)
    step = lambda weights, id, cache, position: decode_step(weights, id, cache, position)
    call = (step, shapes(config), token, cache, at)
    jax.clear_caches()  # what was traced in the other form
    if loop:
        return hw.trace(*call, weights=("weights", "cache"))
    with mock.patch("jax.lax.scan", written_out):
        found = hw.trace(*call, weights=("weights", "cache"))
    jax.clear_caches()
    return found


def looped(trips):
    """A loop of one small layer that runs `trips` times."""
    body = lambda _, x: x + jax.nn.silu(x @ jnp.full((64, 64), 0.5))
    return hw.trace(lambda x: jax.lax.fori_loop(0, trips, body, x), ("float32", (8, 64)))


def seconds(program, target, repeats=3):
    """Processor seconds of one estimate, the least of a few, each of a program that was never priced."""
    best = float("inf")
    for _ in range(repeats):
        fresh = replace(program)
        gc.collect()
        start = time.process_time()
        hw.estimate(fresh, target)
        best = min(best, time.process_time() - start)
    return best


def main():
    """Time everything and store it."""
    targets = {name: preset(name) for name in TARGETS}
    decodes = {"one loop": decode(30, loop=True), "30 layers written out": decode(30, loop=False)}
    steps = {
        what: {"ops": len(p.ops), "seconds": {n: seconds(p, t) for n, t in targets.items()}}
        for what, p in decodes.items()
    }
    growth = []
    for depth in DEPTHS:
        p = decodes["30 layers written out"] if depth == 30 else decode(depth, loop=False)
        growth.append({"layers": depth, "ops": len(p.ops), "seconds": seconds(p, targets["h200"])})
    trips = [{"trips": n, "seconds": seconds(looped(n), targets["h200"], repeats=9)} for n in TRIPS]
    print(store("hw_report", {"decode": steps, "growth": growth, "trips": trips}, FILES))


if __name__ == "__main__":
    main()
