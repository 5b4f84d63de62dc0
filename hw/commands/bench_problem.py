"""What `triptych bench` races: a problem with fresh inputs, entries that solve it, how wrong each may be."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np

from hw.commands.bench_clock import rounds, wait

TUNING = Lock()


@dataclass(frozen=True)
class Call:
    """One way to solve a problem, made ready.

    run: the timed call. check: a call on the inputs of the check, if these are others. error: the relative
    error of the check's result against float64. off: its distance from what this entry is to compute, if that
    is something else (int8 layers round); bound: how far off is allowed. compile: what the first call does
    before it runs; in threads, beside others.
    """

    run: Callable
    error: Callable
    bound: float
    check: Callable | None = None
    off: Callable | None = None
    compile: Callable | None = None


@dataclass(frozen=True)
class Problem:
    """A call of given shapes. flops: useful operations, a multiply-accumulate counted two; nbytes: arguments
    and results moved once; dtype: of the arithmetic that the roof is of. entries: {name: function that
    makes a `Call` or raises why it cannot}; the first is the one that ratios refer to. exact: readies what
    results are compared with, beside the compilation.
    """

    title: str
    flops: float
    nbytes: float
    dtype: str
    entries: dict[str, Callable]
    exact: Callable = lambda: None


def contest(problem, ceilings, *, seconds=0.3, count=7, only=(), say=lambda name: None):
    """{title, flops, .., entries: [{name, seconds, .., error, why_not}]}: values first, then times in turns.

    An entry that cannot run, or whose result is off by more than its bound, has no time and says why.
    only: words; entries that hold none of them are left out.
    """
    rows, calls, ready = {}, {}, {}
    for name, make in problem.entries.items():
        if only and not any(word in name for word in only):
            continue
        say(f"{name}: inputs")
        rows[name] = {"name": name, "seconds": None, "error": None, "bound": None, "why_not": ""}
        try:
            calls[name] = make()
        except Exception as e:  # other people's code may raise anything
            rows[name]["why_not"] = _reason(e)
    say("compilation")
    _beside([problem.exact, *(call.compile for call in calls.values() if call.compile)])
    for name, call in calls.items():
        say(f"{name}: values")
        row = rows[name]
        try:
            out = (call.check or call.run)()
            wait(out)
            error = float(call.error(out))
            off = error if call.off is None else float(call.off(out))
            row["error"], row["bound"] = error if np.isfinite(error) else None, call.bound
            del out
            if not off <= call.bound:
                raise ArithmeticError(f"its result is off by {off:.1e}, and {call.bound:.1e} is allowed")
            if call.check is not None:
                wait(call.run())
            ready[name] = call.run
        except Exception as e:
            row["why_not"] = _reason(e)
    rows = list(rows.values())
    times = rounds(ready, wait=wait, seconds=seconds, count=count, say=lambda n: say(f"{n}: time"))
    first = next((times[r["name"]].seconds for r in rows if r["name"] in times), None)
    for row in rows:
        if (t := times.get(row["name"])) is None:
            continue
        share, binds = ceilings.fraction(problem.flops, problem.nbytes, problem.dtype, t.seconds)
        row |= {
            "seconds": t.seconds, "spread": t.spread, "best": t.best, "calls": t.calls,
            "tflops": problem.flops / t.seconds / 1e12, "gbps": problem.nbytes / t.seconds / 1e9,
            "ratio": t.seconds / first, "roof": share, "bound_by": binds,
        }  # fmt: skip
    return {
        "title": problem.title, "flops": problem.flops, "nbytes": problem.nbytes, "dtype": problem.dtype,
        "entries": rows,
    }  # fmt: skip


def _reason(e):
    """What an exception says, in one line."""
    said = str(e.args[0] if isinstance(e, KeyError) and e.args else e)
    return " ".join(said.split("\n")[0].split())[:160] or type(e).__name__


def _beside(jobs):
    """Do the jobs in threads; what fails does so again, with its reason, when it is called."""

    def one(job):
        with suppress(Exception):
            job()

    in_threads(one, jobs)


def in_threads(fn, items):
    """[fn(item)] in as many threads as there are cores: NumPy and compilers leave Python to others."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(fn, items))


def apart(got, want):
    """Relative distance of trees of arrays: the largest |got - want| / |want|, Euclidean, over the arrays."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        g, w = wide(g), wide(w)
        if g.shape != w.shape:
            raise ArithmeticError(f"its result has shape {list(g.shape)}, not {list(w.shape)}")
        size = np.linalg.norm(w)
        off = float(np.linalg.norm(g - w) / (size or 1))
        if np.isnan(off):
            return off
        worst = max(worst, off)
    return worst


def wide(x):
    """x in float64, bfloat16 by way of float32: NumPy converts that at once, and would else keep Python from
    other threads.
    """
    x = np.asarray(x)
    return np.asarray(x.astype(np.float32) if x.dtype.name == "bfloat16" else x, np.float64)


def tolerance(dtype):
    """The relative error (Euclidean) that is allowed of sums of products in `dtype`.

    Half precision rounds what is multiplied again (probabilities, gradients of scores) and the results: a
    rounding is 0.2 eps in the mean square, ten independent ones 0.65; three times that is allowed. Products
    of float32 numbers may be taken with ten bits of fraction (TF32), which is the default on a GPU. The sums,
    also those of the half formats, are float32, whose error over thousands of terms stays below 64 roundings.
    """
    import jax
    import jax.numpy as jnp

    eps = float(jnp.finfo(getattr(jnp, dtype)).eps)
    single = dtype == "float32" and jax.default_backend() != "cpu"
    return 2 * (2.0**-10 if single else eps) + 64 * 2.0**-24


def drawn(seed, dtype, *shapes):
    """A JAX array of each shape: normal numbers rounded to dtype, drawn where they stay."""
    import jax
    import jax.numpy as jnp

    def draw(key):
        keys = jax.random.split(key, len(shapes))
        normal = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
        return [x.astype(getattr(jnp, dtype)) for x in normal]

    return jax.jit(draw)(jax.random.key(seed))


def entry(fn, *args, name=None, error, bound, check=None, off=None):
    """A `Call` of jit-compiled fn on JAX arrays; check: its arguments in the check, if others."""
    import jax

    call = jax.jit(fn)
    checked = None if check is None else lambda: call(*check)
    return Call(lambda: call(*args), error, bound, checked, off, lambda: compiled(call, *args))


def compiled(call, *args):
    """A jit-compiled function for its arguments; its later calls with the like find what is made here."""
    lowered = call.lower(*args)
    # XLA tries ways to do its products on the device, one program at a time; kernels need the host alone
    with TUNING if "dot_general" in lowered.as_text() else nullcontext():
        return lowered.compile()


@cache
def torch_device():
    """(torch, its device): the GPU if JAX computes on one, else the CPU. Raises: why it cannot."""
    import jax

    torch = package("torch", "PyTorch")
    if jax.default_backend() == "cpu":
        return torch, "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU")
    return torch, "cuda"


def to_torch(x, *, order=None, grad=False):
    """An array as a tensor on PyTorch's device, its axes in `order`, contiguous. One of JAX's on the same
    device shares its memory, unless `order` moves it.
    """
    import jax
    import jax.numpy as jnp

    torch, device = torch_device()
    t = torch.from_dlpack(jax.block_until_ready(jnp.asarray(x)))
    t = t if order is None else t.permute(*order)
    return t.to(device).contiguous().requires_grad_(grad)


def from_torch(t):
    """A tensor as float32 on the host."""
    return t.detach().float().cpu().numpy()


def package(module, title):
    """The imported module. Raises: ImportError, "TITLE is not installed"."""
    import importlib
    import importlib.util

    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a parent of a dotted name is missing
        found = None
    if found is None:
        raise ImportError(f"{title} is not installed")
    return importlib.import_module(module)


def needs_gpu():
    """Raises: RuntimeError if PyTorch's device is no GPU."""
    if torch_device()[1] != "cuda":
        raise RuntimeError("needs a CUDA GPU")
