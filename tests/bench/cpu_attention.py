"""Attention on a CPU against `jax.nn` and PyTorch: `python -m tests.bench.cpu_attention`.

Values first, then times, every entry in turns in one process, then the extra memory of the compiled
programs. PyTorch is a peer here if it is installed, and nowhere else. Times are medians; on a shared machine
only ratios of one run mean something.
"""

import argparse
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

import accel
from accel.race import race

# ((B, T, N, H), causal)
SHAPES = (((1, 2048, 8, 64), False), ((1, 2048, 8, 64), True), ((1, 8192, 4, 64), True))
SIZES = (4096, 8192, 16384, 32768, 65536)
EPS = 2.0**-23


def operands(shape):
    """q, k, v [B, T, N, H], float32."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]


def entries(shape, causal, backward):
    """{name: thunk} of one race, outputs in [B, T, N, H] but PyTorch's, in its own [B, N, T, H]."""
    arrays = operands(shape)
    x = [jnp.asarray(a) for a in arrays]

    def jitted(attend):
        forward = lambda q, k, v: attend(q, k, v, is_causal=causal)
        loss = lambda q, k, v: jnp.sum(forward(q, k, v) * q)
        f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)) if backward else forward)
        return lambda: f(*x)

    found = {"accel": jitted(accel.dot_product_attention), "jax.nn": jitted(jax.nn.dot_product_attention)}
    if importlib.util.find_spec("torch"):
        import torch

        y = [torch.tensor(a).transpose(1, 2).contiguous().requires_grad_(backward) for a in arrays]
        attend = torch.nn.functional.scaled_dot_product_attention

        def sdpa():
            o = attend(*y, is_causal=causal)
            return torch.autograd.grad((o * y[0]).sum(), y) if backward else o

        found["torch"] = sdpa
    return found


def check(shape, causal):
    """Largest difference from `jax.nn`, values and gradients; AssertionError beyond rounding.

    Scores of 64 terms near 64 / 8, S keys: 64 roundings for values; gradients sum up to T rows of them.
    """
    worst = 0.0
    for backward in (False, True):
        found = entries(shape, causal, backward)
        got, want = (jax.tree.leaves(found[n]())[backward:] for n in ("accel", "jax.nn"))
        for g, w in zip(got, want, strict=True):
            error, size = float(jnp.abs(g - w).max()), max(1.0, float(jnp.abs(w).max()))
            assert error <= 256 * EPS * size, (shape, causal, backward, error, size)
            worst = max(worst, error / size)
    return worst


def speed(shapes=SHAPES, *, budget=4.0, progress=lambda text: None):
    """[{shape, causal, backward, seconds: {name: median}, best: {name: least}}]."""
    rows = []
    for (shape, causal), backward in ((s, b) for s in shapes for b in (False, True)):
        progress(f"{list(shape)}{' causal' if causal else ''}{', forward and backward' if backward else ''}")
        results = race(entries(shape, causal, backward), budget=budget)
        rows.append(
            {
                "shape": list(shape),
                "causal": causal,
                "backward": backward,
                "seconds": {r.name: r.seconds for r in results},
                "best": {r.name: r.best for r in results},
            }
        )
    return rows


def memory(sizes=SIZES, *, heads=4, width=64):
    """[{tokens, forward, backward}]: bytes beside operands and results, causal, as compiled; none is run."""
    f = lambda q, k, v: accel.dot_product_attention(q, k, v, is_causal=True)
    g = jax.grad(lambda q, k, v: f(q, k, v).sum(), (0, 1, 2))
    rows = []
    for n in sizes:
        x = jax.ShapeDtypeStruct((1, n, heads, width), jnp.float32)
        extra = lambda fn, x=x: jax.jit(fn).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        rows.append({"tokens": n, "forward": extra(f), "backward": extra(g)})
    return rows


def main():
    """Check, race and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each entry of a race")
    budget = parser.parse_args().seconds
    for shape, causal in SHAPES[:2]:
        print(f"{list(shape)}{' causal' if causal else ''}: within {check(shape, causal):.1e} of jax.nn")
    for r in speed(budget=budget):
        what = f"{r['shape']} {'causal' if r['causal'] else 'full'} {'fwd+bwd' if r['backward'] else 'fwd'}"
        ours = r["seconds"]["accel"]
        peers = "  ".join(f"{n} {s * 1e3:.1f} ms ({s / ours:.2f}x)" for n, s in r["seconds"].items())
        print(f"{what:36}{peers}", flush=True)
    for r in memory():
        forward, backward = r["forward"] / 1e6, r["backward"] / 1e6
        print(
            f"{r['tokens']:6} tokens: {forward:.1f} MB beside the operands forward, {backward:.1f} backward"
        )


if __name__ == "__main__":
    main()
