"""Mesa on handwritten digits: `python -m tests.claims.mesa`, about two minutes on two cores.

Bytes counted against the published tables, memory of compiled programs, accuracy by bits, groups and
rounding, and the saved memory spent on a larger batch or a wider network; writes docs/data/mesa.json. With
--gpu more seeds at once, longer training, and seconds a step: docs/data/mesa_gpu.json.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.mlp import linear
from accel.blocks.norms import layer_norm
from accel.blocks.optim import adam, adam_init
from accel.blocks.transformer import transformer_block
from accel.training import mesa
from hw.commands.bench_problem import in_threads
from ref.blocks.transformer import init_block
from ref.data import digits
from tests.claims.record import store

FILES = [
    "accel/blocks/optim.py", "accel/blocks/quantize.py", "accel/blocks/stored.py", "accel/training/mesa.py",
    "ref/blocks/stored.py", "ref/models/vit_memory.py", "ref/training/mesa.py", "tests/claims/mesa.py",
]  # fmt: skip
PUBLISHED = {  # README of the repository: MB at batch 128, 224 pixels; top-1 in percent; exact, then Mesa
    "DeiT-Ti": (192, 3, (4171, 1858), (71.9, 72.1)),
    "DeiT-S": (384, 6, (8459, 3840), (79.8, 80.0)),
    "DeiT-B": (768, 12, (17691, 8616), (81.8, 81.8)),
}
DEPTH, HEADS, TOKENS, TEST = 3, 4, 16, 100
# Programs that XLA tunes on a GPU at once disturb one another; those of this network are too small for that.
UNTUNED = {"xla_gpu_autotune_level": 0}


def inventory():
    """MB of activations counted for each DeiT at batch 128, beside what the repository measured."""
    rows = []
    for name, (dim, heads, memory, top1) in PUBLISHED.items():
        config = mesa.MesaConfig(dim=dim, depth=12, num_heads=heads, tokens=197)
        count = lambda policy, c=config, **o: sum(
            mesa.activation_bytes(c, batch=128, policy=policy, **o).values()
        )
        rows.append({
            "name": name, "published": memory, "top1": top1, "exact": count("exact") / 2**20,
            "mesa": count("mesa") / 2**20, "checkpoint": count("checkpoint") / 2**20,
            "exact_fp16": count("exact", itemsize=2) / 2**20,
        })  # fmt: skip
    return rows


def init(seed, dim):
    """Parameters of a small vision transformer on 2 x 2 patches; blocks stacked along a first axis."""
    rng = np.random.default_rng(seed)
    blocks = [init_block(rng, dim, 2 * dim, std=dim**-0.5) for _ in range(DEPTH)]
    params = {
        "w_patch": rng.standard_normal((4, dim)) / 2,
        "pos": 0.1 * rng.standard_normal((TOKENS, dim)),
        "blocks": jax.tree.map(lambda *a: np.stack(a), *blocks),
        "scale": np.ones(dim), "bias": np.zeros(dim),
        "w_head": rng.standard_normal((dim, 10)) * dim**-0.5, "b_head": np.zeros(10),
    }  # fmt: skip
    return jax.tree.map(lambda a: np.asarray(a, np.float32), params)


def patches(images):
    """[N, 8, 8] in 0..16 -> [N, 16, 4] in 0..1."""
    n = len(images)
    return (images / 16.0).reshape(n, 4, 2, 4, 2).swapaxes(2, 3).reshape(n, 16, 4).astype(np.float32)


def logits(params, states, x, key, policy, stochastic):
    """(logits, states): policy None trains exactly, "checkpoint" recomputes the blocks, else Mesa."""
    h = linear(x, params["w_patch"]) + params["pos"][None]

    def exact(h, block):
        return transformer_block(h, block, num_heads=HEADS), None

    def stored(h, given):
        block, state, key = given
        noise = mesa.draw_noise(key, h.shape, block, num_heads=HEADS) if stochastic else None
        h, _, state = mesa.mesa_block(h, block, state, num_heads=HEADS, policy=policy, uniform=noise)
        return h, state

    if isinstance(policy, mesa.MesaPolicy):
        keys = jax.random.split(key, DEPTH)
        h, states = jax.lax.scan(stored, h, (params["blocks"], states, keys))
    else:
        body = jax.checkpoint(exact, prevent_cse=False) if policy == "checkpoint" else exact
        h, _ = jax.lax.scan(body, h, params["blocks"])
    h = layer_norm(h.mean(axis=1), params["scale"], params["bias"])
    return linear(h, params["w_head"], params["b_head"]), states


def loss(params, states, x, labels, key, policy, stochastic):
    """(mean cross entropy, states)."""
    z, states = logits(params, states, x, key, policy, stochastic)
    picked = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)
    return -picked.mean(), states


def fresh_states(policy):
    """States of all blocks, stacked."""
    policy = policy if isinstance(policy, mesa.MesaPolicy) else mesa.MesaPolicy()
    one = mesa.init_states(HEADS, policy=policy)
    return jax.tree.map(
        lambda a: np.stack([np.asarray(a, np.float32 if a.dtype.kind == "f" else a.dtype)] * DEPTH), one
    )


@partial(jax.jit, static_argnames=("policy", "stochastic", "batch", "epochs", "lr"))
def fit(params, states, x, labels, key, *, policy, stochastic, batch, epochs, lr):
    """(params, losses): Adam, every epoch in a new order, the learning rate falling to 0."""
    n = len(x) // batch
    steps = n * epochs

    def step(carry, i):
        params, states, moments = carry
        order = jax.random.permutation(jax.random.fold_in(key, i // n), len(x))
        at = jax.lax.dynamic_slice(order, ((i % n) * batch,), (batch,))
        noise = jax.random.fold_in(key, steps + i)
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, states), grads = grad(params, states, x[at], labels[at], noise, policy, stochastic)
        rate = lr * (1 - i.astype(jnp.float32) / steps)
        params, moments = adam(params, grads, moments, lr=rate)
        return (params, states, moments), value

    (params, _, _), losses = jax.lax.scan(step, (params, states, adam_init(params)), jnp.arange(steps))
    return params, losses


@jax.jit
@jax.vmap
def predict(params, x):
    """The digits of images [N, 16, 4], from one seed's parameters; seeds along a first axis."""
    return logits(params, None, x, None, None, False)[0].argmax(axis=-1)


def prepared(policy, *, seeds, dim=32, batch=25, epochs=15, lr=3e-3, stochastic=True):
    """A thunk of {"accuracy", "loss" of each seed, "seconds"}, compiled: seeds trained side by side, each on
    its own split.
    """
    images, labels = digits()
    x, labels = patches(images), labels.astype(np.int32)
    orders = [np.random.default_rng(1000 + s).permutation(len(x)) for s in range(seeds)]
    train = np.stack([o[TEST:] for o in orders])
    test = np.stack([o[:TEST] for o in orders])
    params = jax.tree.map(lambda *a: np.stack(a), *[init(s, dim) for s in range(seeds)])
    states = jax.tree.map(lambda a: np.stack([a] * seeds), fresh_states(policy))
    keys = jnp.stack([jax.random.key(s) for s in range(seeds)])
    call = partial(fit, policy=policy, stochastic=stochastic, batch=batch, epochs=epochs, lr=lr)
    args = params, states, x[train], labels[train], keys
    compiled = jax.jit(jax.vmap(call)).lower(*args).compile(UNTUNED)

    def run():
        start = time.perf_counter()
        params, losses = jax.block_until_ready(compiled(*args))
        seconds = time.perf_counter() - start
        right = np.asarray(predict(params, x[test])) == labels[test]
        return {
            "accuracy": right.mean(axis=1).tolist(),
            "loss": np.asarray(losses)[:, -(len(x) - TEST) // batch :].mean(axis=1).tolist(),
            "seconds": seconds,
        }

    return run


def trained(plans):
    """[row | what `prepared(**options)` gives] of (row, options): compiled in threads, run in turn."""
    runs = in_threads(lambda plan: prepared(**plan[1]), plans)
    rows = []
    for (row, _), run in zip(plans, runs, strict=True):
        rows.append(row | run())
        print(rows[-1], flush=True)
    return rows


def compiled_bytes(policy, *, dim, batch):
    """Peak temporary bytes of one compiled gradient, arguments and results apart."""
    x = jax.ShapeDtypeStruct((batch, TOKENS, 4), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    call = lambda p, s, x, y: jax.grad(loss, has_aux=True)(p, s, x, y, jax.random.key(0), policy, False)
    lowered = jax.jit(call).lower(init(0, dim), fresh_states(policy), x, labels)
    return int(lowered.compile(UNTUNED).memory_analysis().temp_size_in_bytes)


def memory():
    """Compiled peak of exact, Mesa and checkpointed gradients, beside the bytes counted for them."""
    forms = (("exact", None), ("mesa", mesa.MesaPolicy()), ("checkpoint", "checkpoint"))
    cases = [(dim, batch, *form) for dim, batch in ((32, 100), (64, 400)) for form in forms]

    def row(case):
        dim, batch, name, policy = case
        config = mesa.MesaConfig(dim=dim, depth=DEPTH, num_heads=HEADS, tokens=TOKENS, hidden=2 * dim)
        counted = sum(mesa.activation_bytes(config, batch=batch, policy=name).values())
        compiled = compiled_bytes(policy, dim=dim, batch=batch)
        return {"dim": dim, "batch": batch, "policy": name, "counted": counted, "compiled": compiled}

    rows = in_threads(row, cases)
    print(*rows, sep="\n", flush=True)
    return rows


def accuracy(seeds, epochs):
    """Exact, then bits x groups x rounding."""
    same = {"seeds": seeds, "epochs": epochs}
    plans = [({"policy": "exact"}, {"policy": None, **same})]
    for bits in (8, 4, 2):
        for groups in (None, 1):
            for stochastic in (True, False):
                row = {
                    "policy": "mesa", "bits": bits, "groups": "head" if groups is None else "layer",
                    "rounding": "stochastic" if stochastic else "nearest",
                }  # fmt: skip
                policy = mesa.MesaPolicy(levels=2**bits, groups=groups)
                plans.append((row, {"policy": policy, "stochastic": stochastic, **same}))
    late = {"policy": "mesa", "bits": 8, "groups": "head", "rounding": "stochastic", "update": "after"}
    plans.append((late, {"policy": mesa.MesaPolicy(update="after"), **same}))
    return trained(plans)


def reinvest(seeds, epochs, dim=32, batch=25):
    """The activation bytes of exact training at `dim` and `batch`, spent otherwise; equal epochs."""
    config = mesa.MesaConfig(dim=dim, depth=DEPTH, num_heads=HEADS, tokens=TOKENS, hidden=2 * dim)
    budget = sum(mesa.activation_bytes(config, batch=batch).values())
    most = lambda policy: mesa.largest_batch(config, budget_bytes=budget, policy=policy)
    wide = mesa.largest_width(config, budget_bytes=budget, batch=batch, policy="mesa")
    plans = (
        ("exact base", None, "exact", dim, batch),
        ("mesa base", mesa.MesaPolicy(), "mesa", dim, batch),
        ("mesa, larger batch", mesa.MesaPolicy(), "mesa", dim, most("mesa")),
        ("mesa, wider", mesa.MesaPolicy(), "mesa", wide, batch),
        ("checkpoint, larger batch", "checkpoint", "checkpoint", dim, most("checkpoint")),
    )

    def plan(case):
        name, policy, kind, d, b = case
        used = mesa.MesaConfig(dim=d, depth=DEPTH, num_heads=HEADS, tokens=TOKENS, hidden=2 * d)
        counted = sum(mesa.activation_bytes(used, batch=b, policy=kind).values())
        row = {"name": name, "dim": d, "batch": b, "counted": counted}
        row["compiled"] = compiled_bytes(policy, dim=d, batch=b)
        options = {"policy": policy, "seeds": seeds, "epochs": epochs, "dim": d, "batch": b}
        return row, options | {"lr": 3e-3 * b / batch}

    return {"budget": budget, "rows": trained(in_threads(plan, plans))}


def race(repeats=20):
    """Seconds and compiled peak of a gradient step of 12 blocks of DeiT-S at batch 64, by what is kept."""
    from ref.blocks.transformer import BlockParams

    rng = np.random.default_rng(0)
    one = init_block(rng, 384, 1536)
    stacked = BlockParams(*[jnp.asarray(np.stack([a] * 12), jnp.float32) for a in one])
    x = jnp.asarray(rng.standard_normal((64, 197, 384)), jnp.float32)
    rows = []
    for name, update in (
        ("exact", None),
        ("mesa", "before"),
        ("mesa, one pass", "after"),
        ("checkpoint", None),
    ):
        policy = mesa.MesaPolicy(update=update or "before")
        state = mesa.init_states(6, policy=policy)
        states = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 12), state)

        def body(h, given, name=name, policy=policy):
            block, state = given
            if name.startswith("mesa"):
                h, _, state = mesa.mesa_block(h, block, state, num_heads=6, policy=policy)
                return h, state
            return transformer_block(h, block, num_heads=6), state

        if name == "checkpoint":
            body = jax.checkpoint(body, prevent_cse=False)

        def value(p, s, x, body=body):
            h, s = jax.lax.scan(body, x, (p, s))
            return jnp.square(h).mean(), s

        step = jax.jit(jax.grad(value, has_aux=True)).lower(stacked, states, x).compile()
        jax.block_until_ready(step(stacked, states, x))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(step(stacked, states, x))
            times.append(time.perf_counter() - start)
        peak = int(step.memory_analysis().temp_size_in_bytes)
        rows.append({"policy": name, "seconds": float(np.median(times)), "compiled": peak})
        print(rows[-1], flush=True)
    return rows


def kernels(repeats=50):
    """Seconds of the fused steps at DeiT-S's sizes, batch 64: XLA and the Triton kernels, float32."""
    rng = np.random.default_rng(0)
    rows = []
    for step, C in (("gelu and store", 1536), ("layer norm backward", 384)):
        x, g = (jnp.asarray(rng.standard_normal((64 * 197, C)), jnp.float32) for _ in range(2))
        one = jnp.ones(C)
        _, _, state = mesa.mesa_gelu(x, mesa.init_range((6,)), groups=6)
        _, kept, _ = mesa.mesa_layer_norm(x, one, one, state, groups=6)
        for impl in ("xla", "triton"):
            if step == "gelu and store":
                fn = jax.jit(lambda x, s, i=impl: mesa.mesa_gelu(x, s, groups=6, update="after", impl=i))
                args = (x, state)
            else:
                fn = jax.jit(lambda g, k, i=impl: mesa.mesa_layer_norm_backward(g, k, impl=i))
                args = (g, kept)
            jax.block_until_ready(fn(*args))
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(fn(*args))
                times.append(time.perf_counter() - start)
            rows.append({"step": step, "impl": impl, "seconds": float(np.median(times))})
            print(rows[-1], flush=True)
    return rows


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="more seeds, longer training, seconds a step")
    gpu = parser.parse_args().gpu
    if gpu and jax.default_backend() != "gpu":
        parser.error("--gpu: JAX sees no GPU")
    seeds, epochs = (16, 60) if gpu else (3, 15)
    results = {"inventory": inventory(), "memory": memory(), "epochs": epochs, "seeds": seeds}
    results["accuracy"] = accuracy(seeds, epochs)
    results["reinvest"] = reinvest(seeds, epochs)
    if gpu:
        results["race"], results["kernels"] = race(), kernels()
    print(store("mesa_gpu" if gpu else "mesa", results, FILES + ["accel/kernels/mesa_triton.py"] * gpu))


if __name__ == "__main__":
    main()
