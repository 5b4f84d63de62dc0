"""Time and ceilings for `triptych bench`: entries in alternate rounds of asynchronous calls, and what the
device itself can do.

A call on a GPU returns before the work is done, so a round is a loop of calls whose last result is awaited:
starting a call then costs nothing that the device waits for. On a CPU each call is awaited, since two would
share its cores. Rounds of all entries take turns, so that a clock that drifts hits all alike.
"""

import statistics
import time
from dataclasses import dataclass
from math import ceil

MOST_IN_FLIGHT = 200  # calls of a loop: their results may all be alive


@dataclass(frozen=True)
class Time:
    """Median seconds of a call over the rounds, half the distance between the quartiles, the best round."""

    seconds: float
    spread: float
    best: float
    calls: int


def rounds(calls, *, wait, seconds=0.3, count=7, say=lambda name: None):
    """{name: Time} of {name: thunk} that all ran before. wait(result) returns when it is there.

    seconds: spent on each entry in all, over `count` rounds; at least one call a round, and three rounds of
    an entry whose single call takes longer.
    """
    blocking = _on_cpu()
    loops, turns, took = {}, {}, {name: [] for name in calls}
    for name, call in calls.items():
        say(name)
        once = min(_loop(call, 1, wait, blocking) for _ in range(2))
        loops[name] = max(1, min(MOST_IN_FLIGHT, ceil(seconds / count / once)))
        turns[name] = count if once <= seconds else min(count, 3)
    for turn in range(count):
        for name, call in calls.items():
            if turn < turns[name]:
                took[name].append(_loop(call, loops[name], wait, blocking))
    found = {}
    for name, t in took.items():
        low, _, high = statistics.quantiles(t, n=4) if len(t) > 1 else (t[0],) * 3
        found[name] = Time(statistics.median(t), (high - low) / 2, min(t), loops[name] * len(t))
    return found


def _loop(call, n, wait, blocking):
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(n):
        out = call()
        if blocking:
            wait(out)
    wait(out)
    return (time.perf_counter() - start) / n


def wait(out):
    """Return when a result of JAX or PyTorch is there."""
    import sys

    import jax

    torch = sys.modules.get("torch")
    leaves = [x for x in jax.tree.leaves(out) if x is not None]
    if torch is not None and any(isinstance(x, torch.Tensor) for x in leaves):
        if any(x.is_cuda for x in leaves):
            torch.cuda.synchronize()
        return
    jax.block_until_ready(out)


def _on_cpu():
    import jax

    return jax.default_backend() == "cpu"


@dataclass(frozen=True)
class Ceilings:
    """What the device gives at most: operations a second by element type, bytes a second; and who says so."""

    rates: dict[str, float]
    bandwidth: float
    basis: str

    def fraction(self, flops, nbytes, dtype, seconds):
        """(share of the roof, what binds there): the least time that flops and bytes need over the time."""
        parts = {"memory": nbytes / self.bandwidth}
        if self.rates.get(dtype):
            parts["arithmetic"] = flops / self.rates[dtype]
        bound = max(parts, key=parts.get)
        return parts[bound] / seconds, bound


def listed(device_kind):
    """The `Ceilings` of a device whose data sheet hw.parts holds, or None.

    device_kind: as JAX names it ("NVIDIA H100 80GB HBM3").
    """
    from hw.parts import GPUS

    words = device_kind.replace("-", " ").split()
    for part in GPUS.values():
        model = part.title.split()[1] if " " in part.title else part.title
        sizes = [w for w in words if w.endswith("GB") and w[:-2].isdigit()]
        if model in words and (not sizes or abs(int(sizes[0][:-2]) - part.numbers["hbm_gb"]) < 8):
            rates = {d: x * 1e12 for d, x in part.numbers["peak_tflops"].items()}
            return Ceilings(rates, part.numbers["hbm_gbps"] * 1e9, f"data sheet of {part.title}")
    return None


def measured(dtypes, *, seconds=0.3, small=False):
    """`Ceilings` by a copy, a sum and square products in this process; int8 with both operands K-major."""
    import jax
    import jax.numpy as jnp

    cpu = _on_cpu()
    size = 2**16 if small else 2**25 if cpu else 2**28
    side = 64 if small else 1024 if cpu else 8192
    x = jnp.ones(size, jnp.float32)
    copy, total = jax.jit(lambda x: x * 1.5), jax.jit(jnp.sum)
    calls = {"copy": lambda: copy(x), "read": lambda: total(x)}
    for d in dtypes:
        a = jnp.ones((side, side), getattr(jnp, d))
        acc = jnp.int32 if d == "int8" else None
        product = jax.jit(
            lambda a, acc=acc: jax.lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=acc)
        )
        calls[d] = lambda a=a, product=product: product(a)
    for call in calls.values():
        wait(call())
    found = rounds(calls, wait=wait, seconds=seconds)
    bandwidth = max(2 * x.nbytes / found["copy"].best, x.nbytes / found["read"].best)
    rates = {d: 2 * side**3 / found[d].best for d in dtypes}
    return Ceilings(rates, bandwidth, f"measured here: copy and sum of {x.nbytes:,} B, products of {side}³")
