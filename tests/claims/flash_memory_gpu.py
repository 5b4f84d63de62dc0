"""Memory and time of attention over its length, on one GPU: `python -m tests.claims.flash_memory_gpu`.

Forward and backward, causal, two heads of 128 in bfloat16, from 16,384 to 1,048,576 tokens: the peak that the
device's allocator saw, and the time of a call; then decoding, one query of 32 heads on 8 key heads, over as
many keys. Fits: bytes = a + b N, time = a + b N^2, decode time = a + b N, each with its residuals. About a
minute; writes docs/data/flash_memory_gpu.json.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.attention.flash import flash_attention
from accel.attention.lean import lean_attention
from hw.commands.bench_clock import rounds, wait
from tests.claims.record import store

FILES = (
    "accel/attention/flash.py",
    "accel/attention/lean.py",
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_triton.py",
    "accel/kernels/lean_hopper.py",
    "accel/kernels/lean_triton.py",
    "tests/claims/flash_memory_gpu.py",
)
SIZES = tuple(2**e for e in range(14, 21))
KEYS = tuple(2**e for e in range(13, 21))


def fit(sizes, values, power):
    """{a, b, residuals, worst} of values = a + b sizes^power, a at least 0, by least relative squares.

    residuals: (fit - value) / value at each size; worst: the largest, without its sign. Relative squares, for
    otherwise the longest call alone would decide.
    """
    n, v = np.asarray(sizes, float) ** power, np.asarray(values, float)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / v, n / v], axis=1), np.ones(len(v)), rcond=None)
    if a < 0:
        a, b = 0.0, (n / v).sum() / np.square(n / v).sum()
    off = (a + b * n) / v - 1
    return {"a": float(a), "b": float(b), "residuals": off.tolist(), "worst": float(np.abs(off).max())}


def exponent(sizes, values):
    """The slope of log value against log size from each size to the next."""
    return (np.diff(np.log(values)) / np.diff(np.log(sizes))).tolist()


def drawn(shapes, dtype=jnp.bfloat16):
    """Random arrays of these shapes."""
    draw = jax.jit(lambda key, s: jax.random.normal(key, s, dtype), static_argnums=1)
    return [
        draw(key, s) for key, s in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes, strict=True)
    ]


def seconds(call, *args, budget=0.5):
    """Median seconds of a call, in loops of which the last result is awaited."""
    run = lambda: call(*args)
    wait(run())
    return rounds({"call": run}, wait=wait, seconds=budget, count=5)["call"].seconds


def peak_bytes():
    """What the allocator held at most since the process began, None where it keeps no count (on a CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def growth(sizes=SIZES, *, heads=2, width=128, budget=0.5):
    """[{tokens, seconds, peak_bytes, operands, temporary_bytes}] of forward and backward, shortest first.

    The allocator's peak never falls, so sizes go up, and it is read after one call of each, before any loop:
    in a loop the results of several calls are alive. operands: bytes of q, k, v, do and of dq, dk, dv; what
    the call adds to these are o, the row statistics, and what its kernels write beside.
    """
    both = jax.jit(lambda q, k, v, do: jax.vjp(partial(flash_attention, causal=True), q, k, v)[1](do))
    rows, calls = [], []
    draw = lambda n: drawn([(1, heads, n, width)] * 4)
    for n in sorted(sizes):
        args = draw(n)
        call = both.lower(*args).compile()
        wait(call(*args))
        extra, operands = call.memory_analysis().temp_size_in_bytes, 7 * args[0].nbytes
        del args
        row = {"tokens": n, "peak_bytes": peak_bytes(), "temporary_bytes": extra, "operands": operands}
        rows, calls = [*rows, row], [*calls, call]
    for row, call in zip(rows, calls, strict=True):
        n, args = row["tokens"], draw(row["tokens"])
        took = seconds(call, *args, budget=budget)
        row |= {"seconds": took, "tflops": 0.5 * 3.5 * 4 * heads * n * n * width / took / 1e12}
        print(row, flush=True)
        del args
    return rows


def decoding(sizes=KEYS, *, heads=32, kv_heads=8, width=128, budget=0.2):
    """[{keys, seconds, gbps}] of one query a head."""
    rows = []
    call = jax.jit(lambda q, k, v: lean_attention(q, k, v))
    for n in sorted(sizes):
        args = drawn([(1, heads, width), *[(1, kv_heads, n, width)] * 2])
        took = seconds(call, *args, budget=budget)
        rows.append({"keys": n, "seconds": took, "gbps": 2 * args[1].nbytes / took / 1e9})
        print(rows[-1], flush=True)
        del args
    return rows


def fits(grown, decoded):
    """The fits of both tables; bytes are the allocator's, the compiler's where it keeps no count."""
    n, keys = [r["tokens"] for r in grown], [r["keys"] for r in decoded]
    peaks = [r["peak_bytes"] or r["operands"] + r["temporary_bytes"] for r in grown]
    times, steps = [r["seconds"] for r in grown], [r["seconds"] for r in decoded]
    return {
        "bytes over N": fit(n, peaks, 1) | {"exponents": exponent(n, peaks)},
        "seconds over N^2": fit(n, times, 2) | {"exponents": exponent(n, times)},
        "decode seconds over N": fit(keys, steps, 1) | {"exponents": exponent(keys, steps)},
    }


def main():
    """Measure, fit and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU")
    grown = growth()
    decoded = decoding()
    found = {"heads": 2, "width": 128, "growth": grown, "decoding": decoded, "fits": fits(grown, decoded)}
    for name, f in found["fits"].items():
        print(f"{name}: {f['a']:.3g} + {f['b']:.3g} x, within {f['worst']:.1%}; exponents {f['exponents']}")
    print(store("flash_memory_gpu", found, FILES))


if __name__ == "__main__":
    main()
