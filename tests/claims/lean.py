"""Decode attention timed: `python -m tests.claims.lean` on a CPU, --gpu on one GPU; stored in docs/data.

Bytes are those of keys and values that may be seen; the bandwidth is that of a sum over the same arrays, in
the same process.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from accel.attention.lean import flash_decoding_attention, lean_attention
from accel.race import race
from tests.claims.record import store

FILES = ("accel/attention/lean.py", "accel/race.py", "tests/claims/lean.py")
GPU_FILES = (*FILES, "accel/kernels/lean_triton.py")
# name: (query heads, key heads, head size, lengths); the ragged batch is drawn log-uniform from 1k to 128k
SHAPES = {
    "1 x 524,288": (32, 8, 128, (524288,)),
    "1 x 65,536": (32, 8, 128, (65536,)),
    "8 x 8,192": (32, 8, 128, (8192,) * 8),
    "1 x 131,072, 56 heads of 64": (56, 56, 64, (131072,)),
    "16 ragged": (32, 8, 128, tuple(int(n) for n in np.exp(np.random.default_rng(0).uniform(
        np.log(1024), np.log(131072), 16)))),
}  # fmt: skip
SMALL = {"1 x 4,096": (9, 3, 64, (4096,)), "4 ragged": (9, 3, 64, (4096, 900, 2000, 128))}


def row(name, shape, dtype, entries, *, budget):
    """{name, bytes, bandwidth, seconds by entry} of one shape; entries(q, k, v, lengths) -> {name: thunk}."""
    H, Hkv, D, lengths = shape
    key, S = jax.random.key(0), max(lengths)
    draw = jax.jit(lambda k, s: jax.random.normal(k, s, dtype), static_argnums=1)
    q, k, v = (
        draw(x, s)
        for x, s in zip(
            jax.random.split(key, 3), ((len(lengths), H, D), *((len(lengths), Hkv, S, D),) * 2), strict=True
        )
    )
    read = jax.jit(lambda k, v: k.sum(dtype=jnp.float32) + v.sum(dtype=jnp.float32))
    named = {"read": lambda: read(k, v), **entries(q, k, v, np.array(lengths, np.int32))}
    times = {r.name: r.seconds or r.why_not for r in race(named, budget=budget)}
    nbytes = 2 * sum(lengths) * Hkv * D * jnp.dtype(dtype).itemsize
    rate = (k.nbytes + v.nbytes) / times.pop("read")
    out = {"name": name, "bytes": nbytes, "bandwidth": rate, "seconds": times}
    shares = {n: f"{nbytes / s / rate:.2f}" if isinstance(s, float) else s for n, s in times.items()}
    print(f"{name}: {rate / 1e9:.0f} GB/s; share of it {shares}", flush=True)
    return out


def ours(q, k, v, lengths, **options):
    """Entries of lean and of the fixed split."""
    call = lambda f, **o: jax.jit(lambda q, k, v: f(q, k, v, lengths=lengths, **options, **o))
    lean, split = call(lean_attention, impl="xla"), call(flash_decoding_attention)
    return {"xla": lambda: lean(q, k, v), "fixed split": lambda: split(q, k, v)}


def on_gpu(q, k, v, lengths):
    """Entries on a GPU: the kernel with several tiles and grids, XLA, and cuDNN through jax.nn."""
    cores = 132  # multiprocessors of a Hopper GPU
    found = ours(q, k, v, lengths, num_workers=cores)
    for block, per_core in ((64, 2), (64, 4), (128, 1), (128, 2)):
        options = {"block_n": block, "num_workers": cores * per_core, "impl": "triton", "grid": "all"}
        f = jax.jit(lambda q, k, v, o=options: lean_attention(q, k, v, lengths=lengths, **o))
        found[f"triton {block} x {per_core}"] = lambda f=f: f(q, k, v)
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    cudnn = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(
        q[:, None], k, v, key_value_seq_lengths=jnp.asarray(lengths), implementation="cudnn"))  # fmt: skip
    k_t, v_t = swap(k), swap(v)
    found["cudnn"] = lambda: cudnn(q, k_t, v_t)
    return found


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="race the kernel with its peers on one GPU")
    if parser.parse_args().gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        rows = [row(n, s, jnp.bfloat16, on_gpu, budget=0.3) for n, s in SHAPES.items()]
        print(store("lean_gpu", {"rows": rows}, GPU_FILES))
        return
    rows = [row(n, s, jnp.float32, ours, budget=0.3) for n, s in SMALL.items()]
    print(store("lean", {"rows": rows}, FILES))


if __name__ == "__main__":
    main()
