"""Estimate against measurement: `python -m tests.claims.hw_gpu` on this CPU, with --gpu on an H200.

Writes docs/data/hw_gpu.json or docs/data/hw_gpu_h200.json: one row a kernel, the error of each op class, and
the median over all. The call itself (an empty jitted function) is measured and added to the estimate.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.race import race
from tests.claims.record import store

FILES = ("hw/gpu.py", "hw/cpu.py", "hw/parts.py", "tests/claims/hw_gpu.py")


def softmax(x):
    """Rows of probabilities."""
    return jax.nn.softmax(x, axis=-1)


def layer_norm(x):
    """Rows of mean 0 and variance 1."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)


def mlp(x, a, b):
    """Two products with a GELU between them."""
    return jax.nn.gelu(x @ a) @ b


def attention(q, k, v):
    """The definition, which XLA runs as products around a softmax."""
    return softmax((q @ k.swapaxes(-1, -2)) / q.shape[-1] ** 0.5) @ v


def kernels(n, dtype):
    """[(class, name, function, shapes)]; n scales the sizes, 1 for two cores of a CPU."""
    f = dtype
    side = 512 * n
    big = 7 << 20 if n == 1 else 1 << 30  # beyond 32 MB the C library hands out fresh pages at every call
    rows = (4096 * n, 1024)
    return [
        ("product", "square", lambda a, b: a @ b, [(f, (side, side))] * 2),
        ("product", "tall", lambda a, b: a @ b, [(f, (4 * side, 256)), (f, (256, side))]),
        ("product", "batch", lambda a, b: a @ b, [(f, (16, side // 2, 64)), (f, (16, 64, side // 2))]),
        ("matrix-vector", "one row", lambda a, b: a @ b, [(f, (1, 2048 * n)), (f, (2048 * n, 2048 * n))]),
        ("elementwise", "a x + y", lambda x, y: 2 * x + y, [(f, (big,))] * 2),
        ("elementwise", "chain of eight", lambda x: _chain(x), [(f, (big,))]),
        ("transcendental", "exp", jnp.exp, [(f, (big,))]),
        ("transcendental", "tanh", jnp.tanh, [(f, (big,))]),
        ("reduction", "sum of rows", lambda x: x.sum(-1), [(f, rows)]),
        ("reduction", "sum of columns", lambda x: x.sum(0), [(f, rows)]),
        ("normalisation", "softmax", softmax, [(f, rows)]),
        ("normalisation", "layer norm", layer_norm, [(f, rows)]),
        ("movement", "transpose", lambda x: x.T + 0, [(f, (2048 * n, 1024 * n))]),
        ("movement", "gather rows", lambda x, i: x[i], [(f, (8192 * n, 256)), ("int32", (8192 * n,))]),
        ("block", "MLP", mlp, [(f, (side, 384)), (f, (384, 1536)), (f, (1536, 384))]),
        ("block", "attention", attention, [(f, (4 * n, side, 64))] * 3),
    ]


def _chain(x):
    for i in range(8):
        x = x * (1 + 1e-3 * i) + 0.5
    return x


def measured(fn, args, *, calls, budget):
    """Seconds of one call of the jitted function, `calls` of them in flight: the best, for the CPU is
    shared.
    """
    run = jax.jit(fn)
    result = race({"it": lambda: [run(*args) for _ in range(calls)][-1]}, budget=budget, least=5)[0]
    return result.best / calls


def compare(target, *, n=1, dtype="float32", calls=1, budget=0.5, only=None):
    """Rows of (class, name, estimated, measured, error) for the kernels, and what an empty call takes."""
    rng = np.random.default_rng(0)
    empty = measured(lambda x: x, [jnp.zeros(())], calls=calls, budget=budget / 5)
    rows = []
    for cls, name, fn, specs in kernels(n, dtype):
        if only and name not in only:
            continue
        args = [_random(rng, d, s) for d, s in specs]
        estimated = hw.estimate(hw.trace(fn, *specs), target).seconds + empty
        seconds = measured(fn, args, calls=calls, budget=budget)
        rows.append(
            {
                "class": cls, "name": name, "shapes": [list(s) for _, s in specs],
                "estimated_s": estimated, "measured_s": seconds, "error": estimated / seconds - 1,
            }
        )  # fmt: skip
    return rows, empty


def _random(rng, dtype, shape):
    if dtype == "int32":
        return jnp.asarray(rng.integers(0, shape[0], shape), jnp.int32)
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def summary(rows):
    """Median absolute error over all rows, and the median signed error of each class."""
    classes = dict.fromkeys(r["class"] for r in rows)
    median = lambda values: statistics.median(values)
    return {
        "median_abs_error": median([abs(r["error"]) for r in rows]),
        "worst_abs_error": max(abs(r["error"]) for r in rows),
        "by_class": {c: median([r["error"] for r in rows if r["class"] == c]) for c in classes},
    }


# Quoted from the tables of LLM-Viewer: what its ideal roofline says, and what TensorRT-LLM reaches on an
# A100.
# (run, batch, tokens in, tokens out, unit, LLM-Viewer, TensorRT-LLM)
PUBLISHED = (
    ("batch 256, 128 in, 128 out", 256, 128, 128, "tok/s", 8934.0, 5353.0),
    ("batch 32, 128 in, 2048 out", 32, 128, 2048, "tok/s", 2797.0, 1518.0),
    ("prefill of 128", 1, 128, 0, "ms", 7.0, 16.1),
    ("prefill of 2048", 1, 2048, 0, "ms", 100.9, 120.5),
)
LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 32, 4096, 32, 11008, 32000  # LLaMA-7B


def llama_layer(x, k, v, w_qkv, w_o, w_gate, w_up, w_down):
    """One layer of LLaMA on x [B, L, WIDTH] with the cache k, v [B, HEADS, S, D], whose end takes its keys
    and values.
    """
    normed = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    heads = (normed @ w_qkv).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
    q, k_new, v_new = (heads[:, :, i].swapaxes(1, 2) for i in range(3))
    last = (0, 0, k.shape[2] - k_new.shape[2], 0)
    k, v = jax.lax.dynamic_update_slice(k, k_new, last), jax.lax.dynamic_update_slice(v, v_new, last)
    o = attention(q, k, v).swapaxes(1, 2).reshape(x.shape)
    x = x + o @ w_o
    normed = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x + (jax.nn.silu(normed @ w_gate) * (normed @ w_up)) @ w_down


def llama_step(target, batch, tokens, cached):
    """Seconds of one pass of `tokens` new tokens a request over a cache of `cached`: layers, then the
    head.
    """
    f = "float16"
    weights = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    cache = (f, (batch, HEADS, cached + tokens, WIDTH // HEADS))
    layer = hw.trace(llama_layer, (f, (batch, tokens, WIDTH)), cache, cache, *((f, w) for w in weights))
    head = hw.trace(lambda x, w: x @ w, (f, (batch, WIDTH)), (f, (WIDTH, VOCABULARY)))
    return LAYERS * hw.estimate(layer, target).seconds + hw.estimate(head, target).seconds


def published():
    """LLaMA-7B on an A100 beside the quoted figures: our ideal roofline and our default."""
    rows = []
    for run, batch, tokens, out, unit, viewer, measured_there in PUBLISHED:
        ours = {}
        for name, target in (("ideal", hw.a100(ideal=True)), ("ours", hw.a100())):
            seconds = llama_step(target, batch, tokens, 0)
            if out:  # a step is linear in the cache: take it at the middle
                seconds += out * llama_step(target, batch, 1, tokens + out // 2)
            ours[name] = batch * out / seconds if out else seconds * 1e3
        error = ours["ours"] / measured_there - 1
        rows.append(
            {
                "run": run,
                "unit": unit,
                "llm_viewer": viewer,
                "tensorrt_llm": measured_there,
                **ours,
                "error": error,
            }
        )
    return rows


def main():
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, against the h200 preset")
    options = parser.parse_args()
    if options.gpu:
        target, name = hw.h200(), "hw_gpu_h200"
        rows, empty = compare(target, n=16, dtype="bfloat16", calls=20, budget=2.0)
    else:
        target, name = hw.Cpu.from_cpuinfo(), "hw_gpu"
        rows, empty = compare(target)
    for r in rows:
        print(
            f"{r['class']:15} {r['name']:16} estimated {r['estimated_s'] * 1e6:10.1f} us, "
            f"measured {r['measured_s'] * 1e6:10.1f} us, error {r['error']:+.0%}"
        )
    result = {"target": target.name, "call_s": empty, **summary(rows), "rows": rows}
    if not options.gpu:
        result["llama_7b"] = published()
    print(f"median error {result['median_abs_error']:.0%}, worst {result['worst_abs_error']:.0%}")
    print(store(name, result, FILES))


if __name__ == "__main__":
    main()
