"""Time against density: `python -m tests.claims.block_sparse_flash` on a CPU, --gpu on one GPU.

On the CPU (about a minute): forward and forward + backward over the share of visited tiles, a straight line
through the times, what a visited tile takes beside one of a full mask, the density below which the lists
beat dense tiles, standard against tiled against butterfly attention. With --gpu the same in time on the GPU
itself, whoever starts its kernels, with those for Hopper, heads of 64 and of 128, cuDNN beside them; and a
sliding window of 256 keys to both sides, beside PyTorch's flex_attention where PyTorch is installed. Masks
are drawn with a fixed seed; the diagonal is not added, so that the density is exact. With --gpu --paths, in
its place, an encoder learns whether two marked ends of 32 x 32 pictures belong to the same curve (1,024
tokens), with dense, tiled and butterfly attention, three seeds each.
"""

import argparse
import importlib.util
import time
from contextlib import suppress
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.attention.block_sparse_flash import block_sparse_attention
from accel.attention.drop_in import dot_product_attention
from accel.attention.flash import attention_dense, flash_attention
from accel.models import gpt
from accel.race import race
from hw.commands.bench_problem import in_threads
from ref.attention.block_sparse_flash import butterfly_block_mask, density, random_block_mask
from ref.tasks.paths import path_finder
from tests.claims.device_time import kernel_seconds
from tests.claims.flash import adamw, class_loss, start
from tests.claims.record import store

FILES = (
    "ref/attention/block_sparse_flash.py",
    "accel/attention/block_sparse_flash.py",
    "accel/blocks/tiled_attention.py",
    "tests/claims/block_sparse_flash.py",
)
GPU_FILES = (
    *FILES,
    "tests/claims/device_time.py",
    "accel/attention/drop_in.py",
    "accel/kernels/block_sparse_flash_hopper.py",
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_hopper_lists.py",
)
PATH_FILES = (*GPU_FILES, "ref/tasks/paths.py", "accel/models/gpt.py", "tests/claims/flash.py")
SHARES = (1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 20)


def raced(entries):
    """{name: seconds of a call that is awaited, or why it did not run}."""
    return {r.name: r.seconds or r.why_not for r in race(entries, budget=0.6)}


def on_device(entries):
    """The same of all kernels of a call, on a GPU itself: the mean of 20 calls."""
    found = {}
    for name, call in entries.items():
        try:
            found[name] = sum(kernel_seconds(call, repeats=20).values())
        except (NotImplementedError, ValueError, RuntimeError, TypeError) as e:
            found[name] = str(e).strip().split("\n")[0] or type(e).__name__
    return found


def timed(entries, clock):
    """clock(entries), {name: seconds, or why it did not run}; all are compiled first, in threads."""

    def once(call):
        with suppress(Exception):  # the clock says why
            jax.block_until_ready(call())

    in_threads(once, entries.values())
    found = clock(entries)
    print({n: f"{s * 1e3:.2f} ms" if isinstance(s, float) else s for n, s in found.items()}, flush=True)
    return found


def both_passes(f, q, k, v):
    """{forward, both}: thunks of f and of its gradient for a cotangent, here the numbers of q."""
    forward, grad = jax.jit(f), jax.jit(lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do))
    return {"forward": lambda: forward(q, k, v), "both": lambda: grad(q, k, v, q)}


def line(shares, seconds):
    """(a, b, R^2) of the least squares line seconds = a + b share."""
    b, a = np.polyfit(shares, seconds, 1)
    rest = np.asarray(seconds) - (a + b * np.asarray(shares))
    return float(a), float(b), float(1 - rest.var() / np.var(seconds))


def crossing(shares, seconds, dense):
    """The largest share at which the line through the two nearest times is below `dense`; None if none is."""
    s, t = np.asarray(shares)[::-1], np.asarray(seconds)[::-1]
    if t[-1] <= dense:
        return 1.0
    below = np.flatnonzero(t <= dense)
    if not len(below):
        return None
    i = below[-1]
    return float(s[i] + (dense - t[i]) * (s[i + 1] - s[i]) / (t[i + 1] - t[i]))


def against_density(N, block, *, heads, dtype, impl, clock, width=64):
    """Times over the density of random masks, beside flash without a mask."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, heads, N, width)), dtype) for _ in range(3))
    nb = N // block
    uniforms = rng.random((nb, nb))
    entries = {}
    for share in SHARES:
        tiles = random_block_mask(uniforms, share)
        f = lambda q, k, v, tiles=tiles: block_sparse_attention(
            q, k, v, tiles, block_q=block, block_k=block, impl=impl
        )
        entries |= {f"{share} {n}": t for n, t in both_passes(f, q, k, v).items()}
    dense = both_passes(lambda q, k, v: flash_attention(q, k, v, impl=impl), q, k, v)
    entries |= {f"flash {n}": t for n, t in dense.items()}
    seconds = timed(entries, clock)
    out = {"tokens": N, "block": block, "heads": heads, "width": width, "shares": SHARES}
    for n in ("forward", "both"):
        times = [seconds[f"{s} {n}"] for s in SHARES]
        a, b, r2 = line(SHARES, times)
        flash = seconds[f"flash {n}"]
        out[n] = {"seconds": times, "flash": flash, "a": a, "b": b, "r2": r2}
        out[n]["crossing"] = crossing(SHARES, times, flash)
    return out


def against_standard(sizes, *, heads, dtype, impl, clock, block=128, peers=None):
    """Forward + backward of standard, tiled and butterfly attention over the number of tokens."""
    rows = []
    for N in sizes:
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.standard_normal((1, heads, N, 64)), dtype) for _ in range(3))
        tiles = butterfly_block_mask(N // block, num_global=1)
        forms = {
            "standard": attention_dense,
            "flash": lambda q, k, v: flash_attention(q, k, v, impl=impl),
            "butterfly": lambda q, k, v, tiles=tiles: block_sparse_attention(
                q, k, v, tiles, block_q=block, block_k=block, impl=impl
            ),
            **(peers or {}),
        }
        seconds = timed({n: both_passes(f, q, k, v)["both"] for n, f in forms.items()}, clock)
        rows.append({"tokens": N, "density": density(tiles), "seconds": seconds})
    return rows


def cudnn(q, k, v):
    """`jax.nn.dot_product_attention` by cuDNN, [B, H, L, D]."""
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    return swap(jax.nn.dot_product_attention(*map(swap, (q, k, v)), implementation="cudnn"))


def window(*, tokens=32768, heads=16, width=128, reach=256, repeats=20):
    """Seconds of a query's `reach` keys to both sides, forward, in loops that wait at their end alone."""
    rng = np.random.default_rng(0)
    shape = 1, tokens, heads, width
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(3))
    entries = {}
    for impl in ("hopper", "triton"):
        attend = partial(dot_product_attention, implementation=impl, local_window_size=reach)
        entries[impl] = partial(jax.jit(attend), q, k, v), jax.block_until_ready
    if importlib.util.find_spec("torch"):
        entries["flex_attention"] = flex(shape, reach)
    took = {name: [] for name in entries}
    for _ in range(6):
        for name, (call, wait) in entries.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = call()
            wait(result)
            took[name].append((time.perf_counter() - start) / repeats)
    at = np.arange(tokens)
    pairs = int((np.minimum(at + reach, tokens - 1) - np.maximum(at - reach, 0) + 1).sum())
    seconds = {name: float(np.median(t[1:])) for name, t in took.items()}
    return {"tokens": tokens, "heads": heads, "width": width, "reach": reach, "seconds": seconds,
            "flops": 4 * heads * width * pairs}  # fmt: skip


def flex(shape, reach):
    """(call, wait) of PyTorch's flex_attention with the same window."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, tokens, heads, width = shape
    near = lambda b, h, i, j: (i - j).abs() <= reach
    blocks = create_block_mask(near, None, None, tokens, tokens, device="cuda")
    q, k, v = (torch.randn(B, heads, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    call = partial(torch.compile(flex_attention), q, k, v, block_mask=blocks)
    return call, lambda _: torch.cuda.synchronize()


def paths(*, seeds=3, steps=800, batch=64, held=2048, side=32, width=128, depth=4, heads=4, block=64):
    """{rows: [{form, seed, seconds a step, accuracy}], chance} on pictures that were never trained on."""
    tiles = butterfly_block_mask(side * side // block, num_global=1)
    sparse = lambda q, k, v, *, mask=None, causal=False: block_sparse_attention(
        q, k, v, tiles, block_q=block, block_k=block, causal=causal, mask=mask
    )
    forms = {"dense": attention_dense, "flash": flash_attention, "butterfly": sparse}
    ids, labels = path_finder(0, held + 20000 * (steps > 100) + 64, side=side)
    rows = []
    for name, seed in ((n, s) for n in forms for s in range(seeds)):
        drawn = gpt.init_gpt(
            np.random.default_rng(seed), vocab=3, context=side * side, dim=width, depth=depth
        )
        params, state = start(drawn)
        loss = partial(class_loss, heads=heads, attention=forms[name], dtype=jnp.bfloat16)

        @jax.jit
        def step(params, state, ids, labels, loss=loss):
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, ids, labels)
            return (*adamw(params, grads, state, lr=5e-4), value)

        rng, took = np.random.default_rng(seed), []
        for _ in range(steps):
            pick = rng.integers(held, len(ids), batch)
            begin = time.perf_counter()
            params, state, _ = jax.block_until_ready(step(params, state, ids[pick], labels[pick]))
            took.append(time.perf_counter() - begin)
        score = jax.jit(lambda p, i, y, loss=loss: loss(p, i, y)[1])
        chunks = [slice(i, i + batch) for i in range(0, held, batch)]
        accuracy = float(np.mean([score(params, ids[c], labels[c]) for c in chunks]))
        rows.append({"form": name, "seed": seed, "seconds": float(np.median(took)), "accuracy": accuracy})
        print(rows[-1], flush=True)
    chance = float(max(labels[:held].mean(), 1 - labels[:held].mean()))
    return {"rows": rows, "chance": chance, "density": density(tiles), "steps": steps, "batch": batch}


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="the compiled kernels, on one GPU")
    parser.add_argument("--paths", action="store_true", help="with --gpu: train on pictures of curves")
    args = parser.parse_args()
    if args.paths and not args.gpu:
        parser.error("--paths needs --gpu")
    if args.gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        if args.paths:
            print(store("block_sparse_flash_paths_gpu", paths(), PATH_FILES))
            return
        options = {"dtype": jnp.bfloat16, "impl": "hopper", "clock": on_device}
        results = {
            "clock": "device",
            "window": window(),
            "density": [against_density(16384, 128, heads=16, width=d, **options) for d in (64, 128)],
            "standard": against_standard((2048, 8192), heads=16, peers={"cudnn": cudnn}, **options),
        }
        print(store("block_sparse_flash_gpu", results, GPU_FILES))
        return
    options = {"dtype": jnp.float32, "impl": "xla", "clock": raced}
    results = {
        "density": [against_density(4096, b, heads=2, **options) for b in (64, 128)],
        "standard": against_standard((1024, 2048, 4096), heads=2, **options),
    }
    print(store("block_sparse_flash", results, FILES))


if __name__ == "__main__":
    main()
