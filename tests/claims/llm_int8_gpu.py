"""LLM.int8() against bfloat16 on one GPU: `python -m tests.claims.llm_int8_gpu`, two minutes.

Writes docs/data/llm_int8_gpu.json. Two times for every entry: of its kernels on the device, and of a call in
a loop that does not wait for results, where the host may be what is slow. Weights take turns, so that none
stays in the cache.
"""

import argparse
import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.compression import llm_int8
from ref.compression.llm_int8 import llm_int8_linear
from tests.claims.device_time import kernel_seconds
from tests.claims.record import store

FILES = (
    "accel/compression/llm_int8.py",
    "accel/kernels/llm_int8_few_hopper.py",
    "accel/kernels/llm_int8_hopper.py",
    "accel/kernels/llm_int8_outliers_triton.py",
    "tests/claims/device_time.py",
    "tests/claims/llm_int8_gpu.py",
)
SIZES = ((4096, 16384), (12288, 12288))  # K, N
TOKENS = (1, 16, 512, 4096)
OUTLIERS = 4  # columns: 0.1 % of 4,096
SPREAD = 3e8  # bytes of weights that take turns


def product(x, w):
    """x w^T in x's dtype."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def drawn(T, K, N, seed):
    """(x, layer, the weights in bfloat16); x with OUTLIERS columns twenty times as large."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((N, K), np.float32) / K**0.5)
    most = jnp.abs(w).max(axis=1)
    layer = llm_int8.Int8Linear(jnp.rint(w * (127 / most)[:, None]).astype(jnp.int8), most, None, None)
    x = jnp.clip(jnp.asarray(rng.standard_normal((T, K), np.float32)), -5, 5)
    at = jnp.asarray(rng.choice(K, OUTLIERS, replace=False))
    return x.at[:, at].multiply(20).astype(jnp.bfloat16), layer, w.astype(jnp.bfloat16)


def looped(call, repeats):
    """Seconds of a call, the median of five loops that wait at their end alone."""
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        took.append((time.perf_counter() - start) / repeats)
    return float(np.median(took))


def race(sizes=SIZES, tokens=TOKENS, *, repeats=20):
    """[{K, N, T, device: {entry: seconds}, loop: {entry: seconds}, kernels: {kernel: seconds}}]."""
    linear = lambda impl: jax.jit(partial(llm_int8.llm_int8_linear, max_outliers=16, impl=impl))
    forms = {
        "bfloat16": (jax.jit(product), lambda x, layer, w, x_q: (x, w)),
        "int8 product alone, XLA": (jax.jit(llm_int8.int8_matmul), lambda x, layer, w, x_q: (x_q, layer.w_q)),
    }
    for impl in ("xla", "hopper"):
        forms[impl] = linear(impl), lambda x, layer, w, x_q: (x, layer)
    rows = []
    for K, N in sizes:
        for T in tokens:
            sets = []
            for seed in range(max(2, int(SPREAD / (K * N)))):
                x, layer, w = drawn(T, K, N, seed)
                sets.append((x, layer, w, llm_int8.quantize_rowwise(x)[0]))
            row = {"K": K, "N": N, "T": T, "device": {}, "loop": {}, "kernels": {}}
            for name, (fn, pick) in forms.items():
                turns = itertools.cycle([pick(*s) for s in sets])
                call = lambda fn=fn, turns=turns: fn(*next(turns))
                kernels = kernel_seconds(call, repeats=repeats)
                row["device"][name], row["loop"][name] = sum(kernels.values()), looped(call, repeats)
                if name == "hopper":
                    row["kernels"] = kernels
            rows.append(row)
            print(K, N, T, {n: round(s * 1e6, 1) for n, s in row["device"].items()}, flush=True)
    return rows


def worst_error(T=100, K=640, N=300):
    """Largest error of impl="hopper" against ref in float64, in bfloat16's eps of the largest result."""
    x, layer, _ = drawn(T, K, N, seed=None)
    got = np.asarray(llm_int8.llm_int8_linear(x, layer, max_outliers=16, impl="hopper"), np.float64)
    want = llm_int8_linear(np.asarray(x, np.float64), jax.tree.map(np.asarray, layer))
    return float(np.abs(got - want).max() / np.abs(want).max() / 2**-8)


def main():
    """Measure and store."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("JAX sees no GPU")
    print(store("llm_int8_gpu", {"error": worst_error(), "race": race()}, FILES))


if __name__ == "__main__":
    main()
