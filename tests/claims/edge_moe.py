"""Edge-MoE's network on our FPGA, CPU and GPU targets side by side: `python -m tests.claims.edge_moe`.

Estimates, no measurements: the paper's ratios of energy rest on how much of its time the other side wastes at
batch 1, so that share is a range, from compiled code to a framework that takes 30 microseconds an op. Writes
docs/data/edge_moe.json; ten seconds, no GPU. With --gpu it races the ways to run the experts on one GPU
instead, and writes docs/data/edge_moe_gpu.json; the network trained on two tasks is
tests/claims/edge_moe_trained.py.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.blocks.mlp import gelu
from accel.devices.edge_moe import M3ViTConfig, edge_moe_cycles, init_m3vit, m3vit_forward, moe_ffn, moe_gate
from tests.claims.record import store

FILES = (
    "accel/devices/edge_moe.py",
    "accel/blocks/gate.py",
    "hw/fpga.py",
    "hw/loops.py",
    "hw/fabric.py",
    "hw/boards.py",
    "hw/gpu.py",
    "hw/cpu.py",
    "hw/parts.py",
    "tests/claims/edge_moe.py",
)
GPU_FILES = ("accel/devices/edge_moe.py", "accel/kernels/edge_moe_triton.py", "tests/claims/edge_moe.py")
EVEN = [17] * 2 + [16] * 14
BLOCK_T = 16  # rows of an expert that run together: products and loads of the FPGA balance
CFG = M3ViTConfig()


def program(cfg=CFG):
    """The forward pass of one image for one task, its parameters told as weights."""
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, np.float32), init_m3vit(np.random.default_rng(0), cfg)
    )
    image = jax.ShapeDtypeStruct((cfg.height, cfg.width, 3), np.float32)
    forward = lambda img, params: m3vit_forward(img, params, task=0, cfg=cfg, block_t=BLOCK_T)
    return hw.trace(forward, image, shapes, weights=("params",))


def targets():
    """{label: target}: the FPGA, and others compiled and with an eager framework's overhead on every op."""
    return {
        "ZCU102": hw.zcu102(),
        "ZCU102, nothing overlapped": hw.zcu102(overlap=False),
        "V100": hw.v100(),
        "V100, 30 µs an op": hw.v100(launch_us=30.0, fuse=False),
        "Xeon 6154": hw.xeon_6154(),
        "Xeon 6154, 30 µs an op": hw.xeon_6154(op_overhead_us=30.0, fuse=False),
    }


def measure(cfg=CFG):
    """Rows of the table, and the FPGA's loops in closed form."""
    p, rows = program(cfg), []
    for name, target in targets().items():
        r = hw.estimate(p, target)
        rows.append({"target": name, "seconds": r.seconds, "joules": r.energy_j, "bound_by": r.bound_by})
    lengths = EVEN if cfg == CFG else None
    loops = sum(edge_moe_cycles(cfg, lengths).values()) if lengths else None
    return {"rows": rows, "macs": hw.count(p).macs, "loop_cycles": loops}


# On a GPU: the expert layer, tokens N of width D, E experts of width F, k a token.

RACES = (
    {"name": "Edge-MoE", "N": 129, "D": 192, "F": 384, "E": 16, "k": 2, "dtype": "float32"},
    {"name": "Edge-MoE", "N": 129, "D": 192, "F": 384, "E": 16, "k": 2, "dtype": "bfloat16"},
    {"name": "Edge-MoE, 32 images", "N": 4128, "D": 192, "F": 384, "E": 16, "k": 2, "dtype": "bfloat16"},
    {"name": "ViT-Base, 8 images", "N": 1576, "D": 768, "F": 3072, "E": 16, "k": 2, "dtype": "bfloat16"},
    {"name": "decoder, 16 tokens", "N": 16, "D": 1024, "F": 4096, "E": 32, "k": 2, "dtype": "bfloat16"},
    {"name": "decoder, 4,096 tokens", "N": 4096, "D": 1024, "F": 4096, "E": 32, "k": 2, "dtype": "bfloat16"},
)
TILES = (16, 32, 64, 128)
ROOM = 2**32  # bytes that gathered weights may take


@partial(jax.jit, static_argnames="precision")
def dense_experts(x, indices, scores, w1, b1, w2, b2, precision=None):
    """Every expert on every token, weighed by its score or 0: two products and no queue."""
    E = len(w1)
    hidden = gelu(jnp.einsum("nd,efd->enf", x, w1, precision=precision) + b1[:, None])
    out = jnp.einsum("enf,edf->end", hidden, w2, precision=precision) + b2[:, None]
    weight = (jax.nn.one_hot(indices, E, dtype=scores.dtype) * scores[..., None]).sum(1)
    return jnp.einsum("ne,end->nd", weight.astype(x.dtype), out, precision=precision)


@partial(jax.jit, static_argnames="precision")
def ragged_experts(x, indices, scores, w1, b1, w2, b2, precision=None):
    """Tokens sorted by expert, two ragged products of XLA's, tokens put back."""
    N, k = indices.shape
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=len(w1)).astype(jnp.int32)
    product = lambda a, w, b: (
        jax.lax.ragged_dot(a, w.swapaxes(1, 2), sizes, precision=precision) + b[flat[order]]
    )
    out = product(gelu(product(x[order // k], w1, b1)), w2, b2)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=order.dtype))
    return (out[back].reshape(N, k, -1) * scores[..., None]).sum(1)


def contestants(shape, tiles=TILES):
    """{name: function of (x, indices, scores, w1, b1, w2, b2)}; float32 multiplies in full everywhere."""
    size = np.dtype(jnp.dtype(shape["dtype"])).itemsize
    full = "highest" if size == 4 else None
    runs = {
        "all experts, dense": partial(dense_experts, precision=full),
        "ragged_dot": partial(ragged_experts, precision=full),
    }
    if shape["N"] * shape["k"] * 2 * shape["D"] * shape["F"] * size <= ROOM:
        runs["weights gathered"] = partial(moe_ffn, order="token")
    runs["loop over tiles"] = partial(moe_ffn, impl="xla")
    return runs | {f"Triton, tiles of {t}": partial(moe_ffn, impl="triton", block_t=t) for t in tiles}


def layer(shape, seed=0):
    """(x, indices, scores, w1, b1, w2, b2): routes of a drawn gate, uneven as such gates are."""
    keys = jax.random.split(jax.random.key(seed), 5)
    N, D, F, E = (shape[a] for a in "NDFE")
    draw = lambda i, *s: jax.random.normal(keys[i], s, jnp.float32)
    x = draw(0, N, D)
    g = moe_gate(x, draw(1, E, D) / D**0.5, top_k=shape["k"])
    w = draw(2, E, F, D) / D**0.5, draw(3, E, F) / 9, draw(4, E, D, F) / F**0.5, jnp.zeros((E, D))
    cast = lambda a: a.astype(shape["dtype"])
    return cast(x), g.indices, cast(g.scores), *map(cast, w)


def race(shapes=RACES, *, tiles=TILES, repeats=20):
    """Seconds of the layer, and of its value and all gradients, each way; how far results are from dense."""

    def seconds(fn, *args):
        jax.block_until_ready(fn(*args))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(repeats):
                y = fn(*args)
            jax.block_until_ready(y)
            best = min(best, (time.perf_counter() - start) / repeats)
        return best

    rows = []
    for shape in shapes:
        args = layer(shape)
        weights = sum(a.size * a.dtype.itemsize for a in args[3:])
        row = {**shape, "weight_bytes": weights, "ways": []}
        want = None
        with jax.default_matmul_precision("highest" if shape["dtype"] == "float32" else "default"):
            for name, run in contestants(shape, tiles).items():
                forward = jax.jit(run)
                y = np.asarray(forward(*args), np.float64)
                want = y if want is None else want
                loss = lambda x, s, w, run=run, i=args[1]: run(x, i, s, *w).astype(jnp.float32).sum()
                both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
                way = {
                    "name": name,
                    "forward": seconds(forward, *args),
                    "both": seconds(both, args[0], args[2], args[3:]),
                    "apart": float(np.abs(y - want).max() / np.abs(want).max()),
                }
                row["ways"].append(way)
                us = lambda s: f"{s * 1e6:,.0f} us"
                print(
                    shape["name"],
                    shape["dtype"],
                    name,
                    us(way["forward"]),
                    us(way["both"]),
                    way["apart"],
                    flush=True,
                )
        rows.append(row)
    return rows


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="race the ways to run the experts on one GPU")
    if parser.parse_args().gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        print(store("edge_moe_gpu", {"race": race()}, GPU_FILES))
        return
    print(store("edge_moe", measure(), FILES))


if __name__ == "__main__":
    main()
