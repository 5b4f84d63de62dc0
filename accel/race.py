"""Timing on equal terms: every entry warmed up, then timed in turns, so that a drifting clock hits all
alike.
"""

import inspect
import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

IMPLS = ("xla", "hopper", "triton", "tpu")


@dataclass(frozen=True)
class Result:
    """One entry of a race: median, spread and best in seconds, or why it could not run."""

    name: str
    seconds: float | None = None
    spread: float = 0.0
    best: float = 0.0
    why_not: str = ""


def on_device(tree, dtype=jnp.float32):
    """The tree with floating arrays in `dtype` and integers in 32 bits, on JAX's default device."""

    def convert(x):
        if not isinstance(x, np.ndarray | np.generic):
            return x
        kind = {"f": dtype, "i": jnp.int32, "u": jnp.uint32}.get(x.dtype.kind)
        narrow = x.dtype.itemsize < 4 and x.dtype.kind in "iu"
        return jnp.asarray(x) if kind is None or narrow else jnp.asarray(x, kind)

    return jax.tree.map(convert, tree)


def race(entries, *, budget=1.0, least=3, progress=lambda name: None):
    """[Result] of `entries`, {name: thunk}, each called until `budget` seconds are spent on it in all.

    A call counts until its arrays are ready. The first call of each (compilation) is not timed; an entry that
    raises there is reported with the reason. progress: called with the name before each warm-up.
    """
    took, failed = {}, {}
    for name, thunk in entries.items():
        progress(name)
        try:
            jax.block_until_ready(thunk())
            took[name] = []
        except (NotImplementedError, ValueError, RuntimeError, TypeError) as e:
            failed[name] = str(e).strip().split("\n")[0] or type(e).__name__
    while pending := [n for n, t in took.items() if len(t) < least or (sum(t) < budget and len(t) < 1000)]:
        for name in pending:
            start = time.perf_counter()
            jax.block_until_ready(entries[name]())
            took[name].append(time.perf_counter() - start)
    done = {n: Result(n, statistics.median(t), _spread(t), min(t)) for n, t in took.items()}
    return [done.get(n) or Result(n, why_not=failed[n]) for n in entries]


def implementations(fn):
    """The `impl` names that an accel function takes, "auto" left out; () if it takes none."""
    return IMPLS if "impl" in inspect.signature(fn).parameters else ()


def peers(slug, example, args):
    """{name: thunk} of other people's implementations of the same call, as far as JAX itself carries one."""
    if example.fn not in ("flash_attention", "attention_dense"):
        return {}
    q, k, v = args[:3]
    rest = {n: x for n, x in example.kwargs.items() if n in ("causal", "scale")}
    if q.ndim not in (3, 4) or {"mask", "key_lengths", "dropout_mask"} & set(example.kwargs):
        return {}
    swap = lambda x: jnp.moveaxis(x if x.ndim == 4 else x[None], 1, 2)  # [B, H, N, D] to JAX's [B, N, H, D]
    attend = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=rest.get("causal", False), scale=rest.get("scale")
        )
    )
    x = [swap(a) for a in (q, k, v)]
    return {"jax.nn.dot_product_attention": lambda: attend(*x)}


def _spread(times):
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return (high - low) / 2
