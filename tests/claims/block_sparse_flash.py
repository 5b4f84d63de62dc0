"""Time against density: `python -m tests.claims.block_sparse_flash` on a CPU, --gpu on one GPU.

On the CPU (about a minute): forward and forward + backward over the share of visited tiles, a straight line
through the times, the density below which the lists beat dense tiles, standard against tiled against
butterfly attention. With --gpu the same with the compiled kernels, and cuDNN beside them. Masks are drawn
with a fixed seed; the diagonal is not added, so that the density is exact.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from accel.attention.block_sparse_flash import block_sparse_attention
from accel.attention.flash import attention_dense, flash_attention
from accel.race import race
from ref.attention.block_sparse_flash import butterfly_block_mask, density, random_block_mask
from tests.claims.record import store

FILES = (
    "ref/attention/block_sparse_flash.py",
    "accel/attention/block_sparse_flash.py",
    "accel/blocks/tiled_attention.py",
    "tests/claims/block_sparse_flash.py",
)
GPU_FILES = (
    *FILES,
    "accel/kernels/block_sparse_flash_triton.py",
    "accel/kernels/flash_triton.py",
)
SHARES = (1.0, 0.5, 0.25, 0.125, 1 / 16)


def timed(entries, budget):
    """{name: seconds, or why it did not run}."""
    found = {r.name: r.seconds or r.why_not for r in race(entries, budget=budget)}
    print({n: f"{s * 1e3:.2f} ms" if isinstance(s, float) else s for n, s in found.items()}, flush=True)
    return found


def both_passes(f, q, k, v):
    """{forward, both}: thunks of f and of its gradient."""
    forward, grad = jax.jit(f), jax.jit(jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), (0, 1, 2)))
    return {"forward": lambda: forward(q, k, v), "both": lambda: grad(q, k, v)}


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


def against_density(N, block, *, heads, dtype, impl, budget):
    """Times over the density of random masks, beside flash without a mask."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, heads, N, 64)), dtype) for _ in range(3))
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
    seconds = timed(entries, budget)
    out = {"tokens": N, "block": block, "heads": heads, "shares": SHARES}
    for n in ("forward", "both"):
        times = [seconds[f"{s} {n}"] for s in SHARES]
        a, b, r2 = line(SHARES, times)
        flash = seconds[f"flash {n}"]
        out[n] = {"seconds": times, "flash": flash, "a": a, "b": b, "r2": r2}
        out[n]["crossing"] = crossing(SHARES, times, flash)
    return out


def against_standard(sizes, *, heads, dtype, impl, budget, block=128, peers=None):
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
        seconds = timed({n: both_passes(f, q, k, v)["both"] for n, f in forms.items()}, budget)
        rows.append({"tokens": N, "density": density(tiles), "seconds": seconds})
    return rows


def cudnn(q, k, v):
    """`jax.nn.dot_product_attention` by cuDNN, [B, H, L, D]."""
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    return swap(jax.nn.dot_product_attention(*map(swap, (q, k, v)), implementation="cudnn"))


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="the compiled kernels, on one GPU")
    if parser.parse_args().gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        options = {"dtype": jnp.bfloat16, "impl": "triton", "budget": 0.2}
        results = {
            "density": [against_density(N, 128, heads=16, **options) for N in (4096, 16384)],
            "standard": against_standard(
                (1024, 2048, 4096, 8192), heads=16, peers={"cudnn": cudnn}, **options
            ),
        }
        print(store("block_sparse_flash_gpu", results, GPU_FILES))
        return
    options = {"dtype": jnp.float32, "impl": "xla"}
    results = {
        "density": [against_density(4096, b, heads=2, budget=0.6, **options) for b in (64, 128)],
        "standard": against_standard((1024, 2048, 4096), heads=2, budget=0.6, **options),
    }
    print(store("block_sparse_flash", results, FILES))


if __name__ == "__main__":
    main()
