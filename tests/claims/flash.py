"""What tiles save: `python -m tests.claims.flash [experiment]`, on this CPU.

Traffic (counted against formulas), memory (compiled programs), speed (against `jax.nn` and, if it
is installed, PyTorch), prices (what `hw` estimates), losses (dense and tiled training step by step). All of
them, about four minutes on two cores, write docs/data/flash.json.
What needs a GPU is in tests/claims/flash_gpu.py.
"""

import argparse
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.attention.flash import attention_dense, flash_attention
from accel.blocks.norms import layer_norm
from accel.blocks.softmax import logsumexp
from accel.models import gpt
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
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return params, (jnp.zeros((), jnp.float32), zeros(), zeros())


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


EXPERIMENTS = {
    "traffic": traffic,
    "memory": memory,
    "speed": cpu_attention.speed,
    "prices": prices,
    "losses": losses,
}


def main():
    """Measure and store, or print one experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS, help="print this one, store nothing")
    only = parser.parse_args().experiment
    if only:
        print(EXPERIMENTS[only]())
    else:
        store("flash", {name: run() for name, run in EXPERIMENTS.items()}, FILES)


if __name__ == "__main__":
    main()
