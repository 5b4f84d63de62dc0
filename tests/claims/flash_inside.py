"""What bounds attention for Hopper, by taking the kernels apart: `python -m tests.claims.flash_inside`.

On one Hopper GPU, in a minute, bfloat16, full attention, 16 heads, 4 texts of 4,096 tokens. Writes
docs/data/flash_inside_gpu.json: device times by the profiler of the forward kernel as it is, with its
switches set otherwise, and with one kind of work left out; of each kernel of a backward pass; and when what
happens in a block, in cycles of its core's clock, from the profiler of Mosaic GPU.
"""

import argparse
import dataclasses
import tempfile
from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.attention.flash import flash_attention
from accel.kernels import flash_hopper
from accel.kernels.flash_hopper import ROWS, Tiles
from tests.claims.device_time import kernel_seconds
from tests.claims.record import store

FILES = (
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_hopper_lists.py",
    "tests/claims/device_time.py",
    "tests/claims/flash_inside.py",
)
WIDTHS = (128, 64)
SPANS = 512  # room for what a warpgroup notes


class _Instead:
    """A module with some of its names replaced."""

    def __init__(self, module, **names):
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextmanager
def replaced(**modules):
    """The forward kernel with names of jnp, lax or plgpu replaced: replaced(jnp={"exp2": f})."""
    real = {"jnp": jnp, "lax": lax, "plgpu": plgpu}
    with mock.patch.multiple(flash_hopper, **{m: _Instead(real[m], **n) for m, n in modules.items()}):
        yield


def drawn(shape, count, seed=0):
    """Random bfloat16 arrays."""
    return [jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(jax.random.key(seed), count)]


def forward(width, tiles=None):
    """A fresh jit of the forward kernel: q, k, v [B, N, H, D] -> o."""
    options = {"scale": width**-0.5, "rows_first": True, "tiles": tiles}
    return jax.jit(lambda *qkv: flash_hopper.attend.__wrapped__(*qkv, **options)[0])


def no_exponentials():
    """Left out: exp2 hands its argument on."""
    return replaced(jnp={"exp2": lambda x: x})


def no_values():
    """Left out: the product with the values, the only one whose left operand is in registers."""
    product = lambda acc, a, b: None if isinstance(a, jax.Array) else plgpu.wgmma(acc, a, b)
    return replaced(plgpu={"wgmma": product})


def no_loads():
    """Left out: copies from device memory; what was in shared memory is multiplied."""
    return replaced(
        plgpu={"copy_gmem_to_smem": lambda source, target, barrier, **_: plgpu.barrier_arrive(barrier)}
    )


def apart(width, *, shape=(4, 4096, 16), repeats=10):
    """{what: seconds on the device} of forward passes: as they are, switched, with work left out."""
    qkv = drawn((*shape, width), 3)
    fit = Tiles.fit(width, width, shape[1], False)
    fit = fit if width <= 64 else fit.shared()  # as `attend` chooses
    change = partial(dataclasses.replace, fit)
    ways = {
        "as it is": (fit, None),
        "scores, softmax, values in a row": (change(overlap=False), None),
        "in a row, with two groups": (change(overlap=False, groups=2), None),
        "with two groups": (change(groups=2), None),
        "groups issue in turn": (change(turns=True), None),
        "groups issue when they like": (change(turns=False), None),
        "each block loads for itself": (change(share=1, turns=True), None),
        "without exponentials": (fit, no_exponentials),
        "without the values' product": (fit, no_values),
        "in a row, without exponentials": (change(overlap=False), no_exponentials),
        "without loads": (fit, no_loads),
    }
    found = {}
    for name, (tiles, without) in ways.items():
        if tiles in [t for n, (t, w) in ways.items() if n in found and w is without]:
            continue
        try:
            call = forward(width, tiles)
            if without:
                with without():
                    call = call.lower(*qkv).compile()
            found[name] = sum(kernel_seconds(lambda call=call: call(*qkv), repeats=repeats).values())
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            print(name, str(error)[:300], flush=True)
        print(width, name, f"{found.get(name, 0) * 1e6:.1f} us", flush=True)
    cudnn = jax.jit(partial(jax.nn.dot_product_attention, implementation="cudnn"))
    found["cuDNN"] = sum(kernel_seconds(lambda: cudnn(*qkv), repeats=repeats).values())
    return found


def backward(width, *, shape=(4, 16, 4096), repeats=10):
    """{kernel: seconds on the device} of forward and backward together, q, k, v [B, H, N, D]."""
    x = drawn((*shape, width), 4)
    attend = partial(flash_attention, impl="hopper")
    both = jax.jit(lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do))
    return kernel_seconds(lambda: both(*x), repeats=repeats)


def timeline(width, *, overlap=True, keys=4096, heads=4, cores=None, shown=3):
    """When what happens in a block: one tile of queries a core, the kernel as it is or products in a row.

    spans: [group, what, from, to] in cycles of the core's clock while `shown` tiles of keys pass, of one
    block; the last group is the one that loads. cycles: medians over all blocks, of a group from tile to tile
    and in each thing. Notes take time themselves; bare: from tile to tile where issues alone are noted.
    """
    tiles = dataclasses.replace(Tiles.fit(width, width, keys, False), late=True, overlap=overlap)
    cores = cores or flash_hopper.cores_of()
    q = drawn((1, cores // heads * tiles.groups * ROWS, heads, width), 1)
    qkv = (*q, *drawn((1, keys, heads, width), 2, seed=1))
    notes, few = (_noted(width, tiles, qkv, only) for only in (None, ("issue",)))
    computing = lambda notes: [g for block in notes for g in block[: tiles.groups]]
    steps = lambda notes, name, n=1: [
        s for g in computing(notes)
        for s in np.diff([a for what, a, _ in g if what == name][n // 2 :: n])[2:-2].tolist()
    ]  # fmt: skip
    seen = sorted({what for g in computing(notes) for what, *_ in g})
    wide = lambda name: [b - a for g in computing(notes) for what, a, b in g if what == name]
    cycles = {"a tile": steps(notes, "exponentials")} | {name: wide(name) for name in seen}
    block = notes[len(notes) // 2]
    first = [a for what, a, _ in block[0] if what == "exponentials"]
    begin, end = first[len(first) // 2], first[len(first) // 2 + shown]
    return {
        "groups": tiles.groups,
        "keys": tiles.keys,
        "bare": float(np.median(steps(few, "issue", 2))),
        "cycles": {name: float(np.median(x)) for name, x in cycles.items()},
        "length": end - begin,
        "spans": [
            [g, what, a - begin, b - begin]
            for g, found in enumerate(block)
            for what, a, b in found
            if b > begin and a < end
        ],
    }


def _noted(width, tiles, qkv, only):
    """[[[(what, from, to)] of a group] of a block] of one call."""
    raw = []
    keep = lambda self, buffer, f, grid, block: raw.append((np.asarray(buffer), dict(self.interned_names)))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(profiler.ProfilerSpec, "dump", keep):
        with noting(folder, only):
            call = forward(width, tiles).lower(*qkv).compile()
        jax.block_until_ready(call(*qkv))
        jax.effects_barrier()
    ((buffer, names),) = raw
    names = {v: k for k, v in names.items()}
    blocks = buffer.reshape(-1, tiles.groups + 1, 4 * SPANS)
    return [[_spans(trace, names) for trace in block] for block in blocks]


@contextmanager
def noting(folder, only=None):
    """The kernel takes notes of its waits, its issues, what it waits for in registers, and its softmax."""
    named = lambda name, f: partial(_scoped, name, f) if only is None or name in only else f
    open_scope = []

    def barrier(x):
        if only is None and isinstance(x, tuple):  # the softmax is done
            x = lax.optimization_barrier(x)
            open_scope.pop().__exit__(None, None, None)
            return x
        if only is None:
            open_scope.append(jax.named_scope("softmax"))
            open_scope[-1].__enter__()
        return lax.optimization_barrier(x)

    names = {
        "barrier_wait": named("wait", plgpu.barrier_wait),
        "wgmma": named("issue", plgpu.wgmma),
        "wgmma_accumulator_load": named("scores", plgpu.wgmma_accumulator_load),
        "copy_gmem_to_smem": named("load", plgpu.copy_gmem_to_smem),
        "CompilerParams": partial(plgpu.CompilerParams, profile_space=SPANS, profile_dir=folder),
    }
    exponentials = named("exponentials", jnp.exp2)
    exp2 = lambda x: exponentials(x) if x.ndim == 2 else jnp.exp2(x)
    with replaced(plgpu=names, lax={"optimization_barrier": barrier}, jnp={"exp2": exp2}):
        yield


def _scoped(name, f, *args, **kwargs):
    with jax.named_scope(name):
        return f(*args, **kwargs)


def _spans(trace, names):
    """[(what, from, to)] of a warpgroup's notes; the clock has 32 bits."""
    used, notes = int(trace[2]), trace[3:]
    begun, found = [], []
    for tag, clock in zip(notes[:used:2].tolist(), notes[1:used:2].tolist(), strict=True):
        if tag >> 31:
            name, start = begun.pop()
            found.append((name, start, clock))
        else:
            begun.append((names[tag], clock))
    return sorted(found, key=lambda s: s[1])


def product(n=8192, repeats=10):
    """Seconds of XLA's product of two n x n matrices, for what products can reach on this card."""
    a, b = drawn((n, n), 2)
    call = jax.jit(jnp.matmul)
    return sum(kernel_seconds(lambda: call(a, b), repeats=repeats).values())


def measure(widths=WIDTHS):
    """All of it."""
    found = {"shape": [4, 4096, 16], "forward": {}, "backward": {}, "timeline": {}, "in a row": {}}
    for w in widths:
        found["timeline"][str(w)] = timeline(w)
        found["in a row"][str(w)] = timeline(w, overlap=False)
        found["forward"][str(w)] = apart(w)
        found["backward"][str(w)] = backward(w)
        print(w, found["timeline"][str(w)]["cycles"], found["backward"][str(w)], flush=True)
    return found | {"product": {"n": 8192, "seconds": product()}}


def main():
    """Measure and store."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("JAX sees no GPU")
    print(store("flash_inside_gpu", measure(), FILES))


if __name__ == "__main__":
    main()
