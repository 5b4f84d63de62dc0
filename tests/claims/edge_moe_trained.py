"""Edge-MoE's network trained on two tasks, then in fixed point: `python -m tests.claims.edge_moe_trained`.

Emoji (`triptych fetch emoji`) on plain backgrounds of a drawn colour: which of nine groups a picture is of,
and which of its pixels are the picture's. Experts with a gate a task against one dense network for both, of
as many multiply-accumulates a token. The trained weights are floored to the hardware's formats; ref's
integers run the test pictures, the Fpga target a few of them. About two minutes a seed on two quiet cores;
--seed N measures one and adds it to what this code has stored. Writes docs/data/edge_moe_trained.json.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hw
from accel.blocks.mlp import linear, mlp
from accel.blocks.norms import layer_norm
from accel.blocks.optim import adam, adam_init, clip_by_norm
from accel.blocks.transformer import self_attention
from accel.devices.edge_moe import m3vit_forward as accel_forward
from accel.devices.edge_moe import moe_ffn, moe_gate
from accel.models.vit import embed_patches
from ref.blocks.fixed_ops import BIAS, FM, WEIGHT, layer_norm_fixed, linear_fixed
from ref.blocks.optim import tree_map
from ref.blocks.png import read_png
from ref.data import digits
from ref.devices.edge_moe import (
    M3ViTConfig,
    edge_moe_cycles,
    init_m3vit,
    m3vit_formats,
    m3vit_forward_fixed,
    m3vit_macs,
    m3vit_to_fixed,
    moe_traffic,
)
from ref.tasks.emoji import CELL, TILE
from tests.claims.record import DATA, is_fresh, load, store

NAME = "edge_moe_trained"
FILES = (
    "accel/devices/edge_moe.py",
    "accel/blocks/gate.py",
    "ref/devices/edge_moe.py",
    "ref/blocks/fixed_ops.py",
    "ref/blocks/gate.py",
    "tests/claims/edge_moe_trained.py",
)
CFG = M3ViTConfig(height=64, width=64, patch=8, dim=32, depth=4, num_heads=2, hidden=128, expert_hidden=64)
GROUP, MAP = 0, 1  # the tasks
TASKS = ("group", "map")
NETWORKS = ("experts", "dense")
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 600, 32, 3e-3
AUX, MAP_WEIGHT, DECAY = 0.01, 2.0, 0.02  # of the losses; the gate's is the paper's
FIXED, ON_FPGA = 100, 3  # test pictures that run in integers, and on the target
SHOWN = 3  # the one whose routes are stored


class Pictures(NamedTuple):
    """rgba [n, H, W, 4] uint8, the alpha channel telling what is picture; group [n], of so many groups."""

    rgba: np.ndarray
    group: np.ndarray
    groups: int


class Head(NamedTuple):
    """norm(x) w + b of one task: scale, bias [D], w [D, K], b [K]."""

    scale: np.ndarray
    bias: np.ndarray
    w: np.ndarray
    b: np.ndarray


# Data


def emoji():
    """(training, test) pictures: four fifths of 1,906 base symbols, and the rest."""
    from ref.fetch import fetch

    folder = Path(fetch("emoji"))
    index = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    index = [e for e in index if e["category"] != "Component"]
    sheet = read_png((folder / "sheets-clean" / f"{TILE}.png").read_bytes())
    corner = lambda e: sheet[CELL * e["sheet_y"] + 1 :, CELL * e["sheet_x"] + 1 :]
    groups = sorted({e["category"] for e in index})
    group = np.array([groups.index(e["category"]) for e in index])
    return split(Pictures(np.stack([corner(e)[:TILE, :TILE] for e in index]), group, len(groups)))


def handwritten():
    """(training, test) of 400 digits, their ink the alpha channel of a black picture."""
    images, labels = digits()
    rgba = np.zeros((*images.shape, 4), np.uint8)
    rgba[..., 3] = np.minimum(images.astype(int) * 16, 255)
    return split(Pictures(rgba, labels.astype(int), 10))


def split(p):
    """(four fifths, one fifth) of pictures in an order drawn once for all seeds."""
    order = np.random.default_rng(0).permutation(len(p.group))
    cut = len(order) * 4 // 5
    return tuple(Pictures(p.rgba[at], p.group[at], p.groups) for at in (order[:cut], order[cut:]))


def shown(rgba, colour):
    """uint8 [n, H, W, 3]: the pictures on backgrounds of these colours [n, 3]."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + colour[:, None, None] * (1 - alpha)).astype(np.uint8)


def tested(pictures):
    """uint8 [n, H, W, 3]: the test pictures on backgrounds drawn once for all."""
    return shown(pictures.rgba, np.random.default_rng(1).integers(32, 256, (len(pictures.rgba), 3)))


def truth(rgba, patch):
    """bool [n, patches, patch^2]: which pixels are more than half the picture's, patch by patch."""
    solid = rgba[..., 3] > 127
    n, H, W = solid.shape
    tiles = solid.reshape(n, H // patch, patch, W // patch, patch).swapaxes(2, 3)
    return tiles.reshape(n, -1, patch * patch)


# The network, by batches


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def tokens(images, params, cfg, task, noise=None):
    """(tokens [n, N, dim], auxiliary loss, choices [layers with experts, n, N, k]) of images [n, H, W, 3].

    `m3vit_forward` for a batch; noise [layers with experts, n N, E] in training.
    """
    x, aux, chosen = embed_patches(images, params.vit), 0.0, []
    for p, experts in zip(params.vit.blocks, params.moe, strict=True):
        h = layer_norm(x, p.ln1_scale, p.ln1_bias, eps=cfg.eps)
        x = x + self_attention(h, p, num_heads=cfg.num_heads)
        h = layer_norm(x, p.ln2_scale, p.ln2_bias, eps=cfg.eps)
        if experts is None:
            x = x + mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
            continue
        rows = h.reshape(-1, cfg.dim)
        training = {} if noise is None else {"noise": noise[len(chosen)], "train": True}
        g = moe_gate(rows, experts.w_gate[task], top_k=cfg.top_k, **training)
        x = x + moe_ffn(rows, g.indices, g.scores, *experts[1:], block_t=32).reshape(h.shape)
        aux = aux + g.aux_loss
        chosen.append(g.indices.reshape(*h.shape[:2], -1))
    return x, aux, chosen


def read(x, head, task, eps):
    """What a head says: logits [n, groups] of the class token, or [n, patches, pixels] of the others."""
    x = x[:, 0] if task == GROUP else x[:, 1:]
    return linear(layer_norm(x, head.scale, head.bias, eps=eps), head.w, head.b)


@partial(jax.jit, static_argnames=("cfg", "task"))
def predict(images, network, *, cfg, task):
    """(logits, choices) of uint8 images."""
    params, heads = network
    x, _, chosen = tokens(images.astype(jnp.float32) / 256, params, cfg, task)
    return read(x, heads[task], task, cfg.eps), chosen


def begin(rng, cfg, groups, *, experts=True, std=0.1):
    """(parameters, heads) drawn; without experts every layer has its own MLP, and both tasks share it all."""
    params, D = init_m3vit(rng, cfg, std=std), cfg.dim
    if not experts:
        params = params._replace(moe=(None,) * cfg.depth)
    sizes = (groups, cfg.patch**2)
    heads = tuple(
        Head(np.ones(D), np.zeros(D), std * rng.standard_normal((D, k)), np.zeros(k)) for k in sizes
    )
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, heads))


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def loss(network, images, group, solid, noise, cfg):
    """Cross entropy of the groups, smoothed, and of the pixels, and 0.01 of the gates' own loss."""
    params, heads = network
    dense = all(e is None for e in params.moe)
    first = tokens(images, params, cfg, GROUP, noise[GROUP])
    second = first if dense else tokens(images, params, cfg, MAP, noise[MAP])
    z = jax.nn.log_softmax(read(first[0], heads[GROUP], GROUP, cfg.eps))
    named = -(0.9 * z[jnp.arange(len(group)), group] + 0.1 * z.mean(-1)).mean()
    m = read(second[0], heads[MAP], MAP, cfg.eps)
    drawn = (jax.nn.softplus(m) - m * solid).mean()
    return named + MAP_WEIGHT * drawn + AUX * (first[1] + second[1])


@partial(jax.jit, static_argnames="cfg")
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def step(network, state, images, group, solid, key, rate, *, cfg):
    """One step of AdamW; uint8 images."""
    rows = images.shape[0] * cfg.tokens
    noise = jax.random.normal(key, (cfg.tasks, cfg.depth // 2, rows, cfg.num_experts))
    x = images.astype(jnp.float32) / 256
    value, grads = jax.value_and_grad(loss)(network, x, group, solid.astype(jnp.float32), noise, cfg)
    return *adam(network, clip_by_norm(grads, 1.0), state, lr=rate, weight_decay=DECAY), value


def train(pictures, cfg, *, seed, steps, experts=True, **options):
    """(network, loss of every step)."""
    network = begin(np.random.default_rng(seed), cfg, pictures.groups, experts=experts)
    carry, losses = (network, adam_init(network)), []
    for i in range(steps):
        carry, value = advance(carry, i, pictures, cfg, seed=seed, steps=steps, **options)
        losses.append(value)
    return carry[0], [float(v) for v in losses]


def advance(carry, i, pictures, cfg, *, seed, steps, batch=BATCH, shift=4):
    """((network, state), loss) after step i: pictures mirrored and shifted, on backgrounds drawn for them."""
    rng = np.random.default_rng((seed, i))
    at = rng.integers(0, len(pictures.group), batch)
    rgba, mirrored = pictures.rgba[at].copy(), rng.random(batch) < 0.5
    if shift:
        rgba[mirrored] = rgba[mirrored, :, ::-1]
        rgba = np.roll(rgba, rng.integers(-shift, shift + 1, 2), (1, 2))
    images = shown(rgba, rng.integers(32, 256, (batch, 3)))
    rate = RATE * min(1.0, (i + 1) / 100) * 0.5 * (1 + np.cos(np.pi * i / steps))
    key = jax.random.fold_in(jax.random.key(seed), i)
    arrays = images, pictures.group[at], truth(rgba, cfg.patch), key, np.float32(rate)
    network, state, value = step(*carry, *arrays, cfg=cfg)
    return (network, state), value


# What a network is worth


def scores(task, outputs, pictures, patch):
    """Per cent: of groups named right; mean over pictures of the maps' intersection over union."""
    if task == GROUP:
        return 100 * float((outputs.argmax(1) == pictures.group).mean())
    found, solid = outputs > 0, truth(pictures.rgba, patch)
    both, either = (found & solid).sum((1, 2)), (found | solid).sum((1, 2))
    return 100 * float((both / np.maximum(either, 1)).mean())


def in_float(network, images, cfg, *, batch=64):
    """([outputs of a task], [choices [layers, n, N, k] of a task]) of uint8 images."""
    outputs, choices = [], []
    for task in range(cfg.tasks):
        parts = [
            predict(images[i : i + batch], network, cfg=cfg, task=task) for i in range(0, len(images), batch)
        ]
        outputs.append(np.concatenate([np.asarray(p[0], np.float64) for p in parts]))
        found = [np.concatenate(layer) for layer in zip(*(p[1] for p in parts), strict=True)]
        choices.append(np.array(found))
    return outputs, choices


def integers(network):
    """The parameters and heads as the hardware stores them."""
    params, heads = tree_map(lambda a: np.asarray(a, np.float64), network)
    strict = [replace(f, overflow="CHECK") for f in (BIAS, BIAS, WEIGHT, BIAS)]
    stored = tuple(Head(*(f.quantise(a) for f, a in zip(strict, h, strict=True))) for h in heads)
    return m3vit_to_fixed(params), stored


def in_fixed(stored, images, cfg):
    """([outputs of a task], lengths [tasks, n, layers, E], tokens [tasks, n, N, D]) by ref's integers."""
    params, heads = stored
    outputs, lengths, last = [], [], []
    for task, h in enumerate(heads):
        runs = [m3vit_forward_fixed(image, params, task=task, cfg=cfg) for image in images]
        kept = [x[:1] if task == GROUP else x[1:] for x, _ in runs]
        y = [linear_fixed(layer_norm_fixed(x, h.scale, h.bias, eps=cfg.eps), h.w.T, h.b) for x in kept]
        outputs.append(FM.value(np.concatenate(y) if task == GROUP else np.stack(y)))
        lengths.append(np.stack([each for _, each in runs]))
        last.append(np.stack([x for x, _ in runs]))
    return outputs, np.array(lengths), np.array(last)


def overlap(first, second):
    """Share of choices that two uses of the experts [..., E] have in common, layer by layer: [...]."""
    share = lambda use: use / use.sum(-1, keepdims=True)
    return np.minimum(share(first), share(second)).sum(-1)


def routes(choices, lengths, cfg):
    """How the tasks use the experts, and what the queues save on these choices."""
    use = lengths.sum(1)  # [tasks, layers, E]
    halves = [lengths[:, i::2].sum(1) for i in range(2)]
    every = np.array(choices)  # [tasks, layers, n, N, k]
    shared = (every[GROUP][..., None] == every[MAP][..., None, :]).any(-1).mean((1, 2, 3))
    one = every[:, :, :50].reshape(-1, cfg.tokens, cfg.top_k)  # a layer of a picture each
    loads = {o: float(np.mean([moe_traffic(c, cfg, order=o) for c in one])) for o in ("expert", "token")}
    flat = lengths.reshape(-1, cfg.num_experts)
    cycles = [sum(edge_moe_cycles(cfg, each.tolist()).values()) for each in flat]
    even = np.full(cfg.num_experts, cfg.tokens * cfg.top_k // cfg.num_experts)
    even[: cfg.tokens * cfg.top_k % cfg.num_experts] += 1
    return {
        "use": use.tolist(),
        "overlap": overlap(use[GROUP], use[MAP]).tolist(),
        "same_task": overlap(*halves).mean(0).tolist(),  # of two halves of the pictures, as a yardstick
        "same_token": shared.tolist(),  # of the experts of a token in one task, the share it has in the other
        "active": (lengths > 0).sum(-1).mean((1, 2)).tolist(),
        "bytes": loads,
        "cycles": float(np.mean(cycles)),
        "cycles_even": sum(edge_moe_cycles(cfg, even.tolist()).values()),
    }


def sample(image, choices, cfg):
    """One picture: its patches' mean colours, and of each task, layer and patch the expert of most weight."""
    p = cfg.patch
    mean = image.reshape(cfg.height // p, p, cfg.width // p, p, 3).mean((1, 3)).reshape(-1, 3)
    colours = ["#" + "".join(f"{round(v):02x}" for v in row) for row in mean]
    return {"colours": colours, "first": [c[:, 1:, 0].tolist() for c in choices]}


# On the FPGA


def on_fpga(stored, images, last, cfg):
    """The same pictures as a traced program on the Fpga target, in its arithmetic: against ref's tokens.

    Weights are those of the formats, carried in 32 bits so that every one is exact on the target, too.
    """
    params = stored[0]
    real = tree_map(lambda f, a: f.value(a).astype(np.float32), m3vit_formats(params), params)
    image = images[0].astype(np.float32) / 256
    rows = []
    for task in range(cfg.tasks):
        forward = lambda img, params, t=task: accel_forward(img, params, task=t, cfg=cfg, block_t=16)
        program = hw.trace(forward, image, real, weights=("params",))
        wide = hw.zcu102(formats=hw.FormatPlan(weights=hw.Fixed(32, 10)))
        runs = [hw.execute(program, (x.astype(np.float32) / 256, real), wide)[0] for x in images]
        price = hw.estimate(program, hw.zcu102())
        apart = np.abs(np.array(runs) - FM.value(last[task][: len(images)]))
        rows.append({"task": TASKS[task], "largest": float(apart.max()), "mean": float(apart.mean()),
                     "seconds": price.seconds, "joules": price.energy_j})  # fmt: skip
    return rows


# The experiment


def measure(seed, splits, cfg=CFG, *, steps=STEPS, fpga=ON_FPGA):
    """One seed: both networks trained, and `judged`."""
    both = {n: train(splits[0], cfg, seed=seed, steps=steps, experts=n == "experts") for n in NETWORKS}
    return judged(seed, both, splits[1], cfg, fpga=fpga)


def judged(seed, trained, test, cfg=CFG, *, most=FIXED, fpga=ON_FPGA):
    """Accuracies in float and in integers, use of the experts, the target.

    trained: {name: (network, losses)}. most: pictures that run in integers.
    """
    images, run = tested(test), {"seed": seed, "float": {}, "loss": {}}
    for name, (network, losses) in trained.items():
        outputs, choices = in_float(network, images, cfg)
        worth = [scores(t, outputs[t], test, cfg.patch) for t in (GROUP, MAP)]
        run["float"][name] = dict(zip(TASKS, worth, strict=True))
        run["loss"][name] = np.array(losses)[: len(losses) // 20 * 20].reshape(20, -1).mean(1).tolist()
        if name == "experts":
            kept = network, outputs, choices
    network, outputs, choices = kept
    stored = integers(network)
    fixed, lengths, last = in_fixed(stored, images[:most], cfg)
    few = Pictures(test.rgba[:most], test.group[:most], test.groups)
    outputs = [o[:most] for o in outputs]
    worth = lambda o: {n: scores(t, o[t], few, cfg.patch) for t, n in enumerate(TASKS)}
    run["few"] = {
        "pictures": len(few.group),
        "float": worth(outputs),
        "fixed": worth(fixed),
        "same_group": 100 * float((outputs[GROUP].argmax(1) == fixed[GROUP].argmax(1)).mean()),
        "same_pixels": 100 * float(((outputs[MAP] > 0) == (fixed[MAP] > 0)).mean()),
        "apart": [float(np.median(np.abs(a - b))) for a, b in zip(outputs, fixed, strict=True)],
    }
    run["routes"] = routes(choices, lengths, cfg)
    run["sample"] = sample(images[SHOWN], [c[:, SHOWN] for c in choices], cfg)
    if fpga:
        run["fpga"] = {"pictures": fpga, "rows": on_fpga(stored, images[:fpga], last, cfg)}
    print(seed, run["float"], run["few"], run["routes"]["overlap"], flush=True)
    return run


def about(cfg, splits, steps):
    """What was trained on what."""
    macs = m3vit_macs(cfg)
    dense = macs | {"mlp": 2 * macs["mlp"], "experts": 0, "gates": 0}
    largest = max(np.bincount(splits[1].group)) / len(splits[1].group)
    always = scores(MAP, np.ones(truth(splits[1].rgba, cfg.patch).shape), splits[1], cfg.patch)
    return {
        "sizes": [len(s.group) for s in splits],
        "steps": steps,
        "batch": BATCH,
        "cfg": {k: v for k, v in vars(cfg).items()},
        "macs": {"experts": sum(macs.values()), "dense": sum(dense.values())},
        "guess": {"group": 100 * float(largest), "map": always},  # the commonest group; every pixel
    }


def main():
    """Measure and store, a seed or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seed", type=int, choices=SEEDS, help="one seed, added to those stored by this code"
    )
    seed = parser.parse_args().seed
    splits = emoji()
    fresh = (DATA / f"{NAME}.json").exists() and is_fresh(NAME)
    runs = {r["seed"]: r for r in load(NAME)["results"]["runs"]} if fresh and seed is not None else {}
    for s in SEEDS if seed is None else (seed,):
        runs[s] = measure(s, splits, fpga=ON_FPGA if s == 0 else 0)
    print(store(NAME, about(CFG, splits, STEPS) | {"runs": [runs[s] for s in sorted(runs)]}, FILES))


if __name__ == "__main__":
    main()
