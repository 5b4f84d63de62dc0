"""Token merging in a trained vision transformer and sentence encoder: `python -m tests.claims.pitome`.

Needs `triptych fetch` of dinov2, emoji, minilm and lee. About five minutes on two cores, with 40 pictures a
group at 112 pixels; writes docs/data/pitome.json. With --gpu all 1,906 pictures at 224 pixels and every
ratio, and images a second: docs/data/pitome_gpu.json.
"""

import argparse
import time
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.attention import join_heads as device_join
from accel.blocks.merging import best, descending, identity_plan, plan_of, products, take_rows, unit_rows
from accel.blocks.mlp import linear as device_linear
from accel.blocks.mlp import mlp as device_mlp
from accel.blocks.norms import layer_norm as device_norm
from accel.blocks.transformer import qkv
from accel.models.vit import embed_patches, head
from accel.vision import pitome
from ref.blocks.attention import join_heads
from ref.blocks.mlp import linear, mlp
from ref.blocks.norms import layer_norm
from ref.blocks.transformer import qkv as ref_qkv
from ref.metrics import pearson, recall_at
from ref.models.bert import bert_embed
from ref.vision.pitome import (
    MergeConfig,
    MergePlan,
    bipartite_soft_matching,
    margin_schedule,
    merge_flops,
    pitome_matching,
    pitome_text_matching,
    pitome_token_schedule,
    proportional_attention,
    random_plan,
    removed_tokens,
    spectral_distance,
)
from ref.vision.pitome import merge_tokens as ref_merge_tokens
from tests.claims.record import store

FILES = (
    "ref/vision/pitome.py",
    "ref/blocks/merging.py",
    "accel/vision/pitome.py",
    "accel/blocks/merging.py",
    "ref/models/dinov2.py",
    "ref/models/minilm.py",
    "ref/blocks/resize.py",
    "ref/tasks/emoji.py",
    "ref/metrics.py",
    "tests/claims/pitome.py",
)
PUBLISHED = {  # network: (depth, tokens, width, {ratio: 10^9 multiply-accumulates by the released code})
    "ViT-T/16": (12, 197, 192, {1.0: "1.225", 0.9: "0.712", 0.95: "0.926"}),
    "ViT-S/16": (12, 197, 384, {1.0: "4.541", 0.9: "2.698"}),
    "ViT-L/16": (24, 197, 1024, {1.0: "61.40", 0.925: "29.84", 0.95: "37.15"}),
    "ViT-H/14": (32, 257, 1280, {1.0: "167.1", 0.95: "86.19", 0.925: "65.40"}),
}
HEADS, DIM = 6, 384
RIDGE = 10.0  # of the probe, on standardised features
SPLITS = 3


# What is measured of features.


def fit_probe(x, labels, classes):
    """A linear classifier by ridge regression onto one-hot labels: (mean, scale, weights)."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    z = np.column_stack([np.ones(len(x)), (x - mean) / scale])
    penalty = RIDGE * np.eye(z.shape[1])
    penalty[0, 0] = 0
    return mean, scale, np.linalg.solve(z.T @ z + penalty, z.T @ np.eye(classes)[labels])


def accuracy(probe, x, labels):
    """Share of the rows whose label the probe names."""
    mean, scale, w = probe
    z = np.column_stack([np.ones(len(x)), (x - mean) / scale])
    return float(((z @ w).argmax(axis=1) == labels).mean())


def judged(features, base, group, subgroup):
    """Probe accuracy, refitted on these features and as fitted on `base`; recall; cosine with `base`."""
    refit, fixed = [], []
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(group))
        train, test = order[: len(order) * 7 // 10], order[len(order) * 7 // 10 :]
        classes = int(group.max()) + 1
        refit.append(accuracy(fit_probe(features[train], group[train], classes), features[test], group[test]))
        fixed.append(accuracy(fit_probe(base[train], group[train], classes), features[test], group[test]))
    norm = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    return {
        "refitted": float(np.mean(refit)),
        "refitted_splits": refit,
        "fixed": float(np.mean(fixed)),
        "recall_1": recall_at(features, subgroup, 1),
        "recall_5": recall_at(features, subgroup, 5),
        "cosine": float((norm(features) * norm(base)).sum(axis=-1).mean()),
    }


# The vision transformer.


def counts(tokens, depth, ratio):
    """Tokens that every layer of PiToMe removes at this ratio, of `tokens` patches; so do the others."""
    left = [tokens, *pitome_token_schedule(tokens + 1, depth, ratio=ratio)]
    return [a - b for a, b in pairwise(left)]


def methods(tokens, depth, ratios):
    """(name, ratio, plan, proportional) of all methods; plan(metric, layer, rng) -> MergePlan, or None."""
    margins, half = margin_schedule(depth, m0=0.9), depth // 2

    def energy(ratio, margin=None, bsm=()):
        return lambda metric, layer, rng: pitome.pitome_matching(
            metric, ratio=ratio, margin=margin or margins[layer], class_token=True, bsm=layer in bsm
        )

    def similar(ratio):
        removed = counts(tokens, depth, ratio)
        return lambda metric, layer, rng: pitome.bipartite_soft_matching(
            metric, r=removed[layer], class_token=True
        )

    def drawn(ratio):
        removed = counts(tokens, depth, ratio)
        return lambda metric, layer, rng: random_plan(rng, metric.shape[1], removed[layer], batch=len(metric))

    yield "none", 1.0, None, True
    for ratio in ratios:
        yield "pitome", ratio, energy(ratio), True
        yield "tome", ratio, similar(ratio), True
        yield "random", ratio, drawn(ratio), True
    least = min(ratios)
    yield "all tokens dealt, first half", least, energy(least, bsm=range(half)), True
    yield "all tokens dealt, second half", least, energy(least, bsm=range(half, depth)), True
    yield "all tokens dealt, everywhere", least, energy(least, bsm=range(depth)), True
    yield "margin fixed at 0.9", least, energy(least, margin=0.9), True
    yield "margin fixed at 0.45", least, energy(least, margin=0.45), True
    shuffled = lambda metric, layer, rng: shuffled_plan(metric, least, margins[layer], rng)
    yield "a and b at random", least, shuffled, True
    yield "attention not proportional", least, energy(least), False


def forward(images, params, plan, *, proportional=True, num_heads=HEADS, eps=1e-6, seed=0):
    """Features, or logits, of a network that merges as `plan` says, placed as in `merged_block`.

    Attention and MLP are compiled once for a number of tokens, whichever the method.
    """
    x, rng = embed_patches(images, params), np.random.default_rng(seed)
    size = jnp.ones(x.shape[:2], x.dtype)
    for layer, p in enumerate(params.blocks):
        x, metric = attend(x, size, p, proportional, num_heads, eps)
        if plan is not None:
            x, size = pitome.merge_tokens(x, *plan(metric, layer, rng), size=size)
        x = feed(x, p, eps)
    return head(x[:, 0], params, eps=eps)


@partial(jax.jit, static_argnums=(3, 4, 5))
def attend(x, size, p, proportional, num_heads, eps):
    """(x + attention, the keys averaged over heads)."""
    q, k, v = qkv(device_norm(x, p.ln1_scale, p.ln1_bias, eps=eps), p, num_heads=num_heads)
    o = pitome.proportional_attention(q, k, v, size if proportional else jnp.ones_like(size))
    return x + device_linear(device_join(o), p.w_o, p.b_o), k.mean(axis=-3)


@partial(jax.jit, static_argnums=2)
def feed(x, p, eps):
    """x + MLP."""
    h = device_norm(x, p.ln2_scale, p.ln2_bias, eps=eps)
    return x + device_mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)


def shuffled_plan(metric, ratio, margin, rng):
    """PiToMe's 2r tokens, dealt into a and b at random and not by energy."""
    N = metric.shape[-2]
    r = removed_tokens(N - 1, ratio)
    if r == 0:
        return identity_plan(metric)
    patches = metric[..., 1:, :]
    order = np.array(descending(pitome.energy_score(patches, margin=margin)))
    order[..., : 2 * r] = rng.permuted(order[..., : 2 * r], axis=-1)
    a, b, kept = order[..., :r], order[..., r : 2 * r], order[..., 2 * r :]
    unit = unit_rows(patches)
    target = best(products(take_rows(unit, a), take_rows(unit, b)))
    return MergePlan(plan_of(N, kept, b, a, target, True), N - r)


def layer_keys(images, params):
    """Keys of every layer of the network that does not merge: a list of [B, N, d]."""
    found = []

    def look(metric, layer, rng):
        found.append(np.asarray(metric, np.float64))
        return identity_plan(metric)

    forward(images, params, look)
    return found


def graph(x):
    """Similarities of tokens [N, d], none negative."""
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.maximum(unit @ unit.T, 0)


def spectra(keys, ratios):
    """Spectral distance by method and ratio, over images and layers, each layer's own tokens merged once."""
    rows, depth = [], len(keys)
    margins = margin_schedule(depth, m0=0.9)
    for ratio in ratios:
        found = {"pitome": [], "tome": [], "random": []}
        for layer, metric in enumerate(keys):
            rng = np.random.default_rng(layer)
            for x in metric[:, 1:]:  # without the class token
                r = removed_tokens(len(x), ratio)
                w = graph(x)
                plans = {
                    "pitome": pitome_matching(x[None], ratio=ratio, margin=margins[layer]),
                    "tome": bipartite_soft_matching(x[None], r=r),
                    "random": random_plan(rng, len(x), r, class_token=False),
                }
                for name, plan in plans.items():
                    found[name].append(spectral_distance(w, plan.group[0]))
        rows += [{"method": n, "ratio": ratio, "distance": float(np.mean(d))} for n, d in found.items()]
    return rows


def vision(per_group, side, ratios, batch, spectral_images):
    """Every method on emoji: accuracy, recall, cosine with no merging, multiply-accumulates, and spectra."""
    from ref.blocks.resize import resize_bilinear
    from ref.fetch import fetch
    from ref.models.dinov2 import load_dinov2, normalize_images
    from ref.tasks.emoji import load_emoji

    emoji = load_emoji(fetch("emoji"))
    params = jax.tree.map(jnp.asarray, load_dinov2(fetch("dinov2"), image_size=side))
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(np.flatnonzero(emoji.group == g))[:per_group] for g in range(9)]
    chosen = np.sort(np.concatenate(chosen))
    images = emoji.images[chosen]
    group, subgroup = emoji.group[chosen], emoji.subgroup[chosen]
    ready = lambda x: normalize_images(resize_bilinear(x / 255, side)).astype(np.float32)
    rows, base, tokens = [], None, (side // 14) ** 2
    for name, ratio, plan, proportional in methods(tokens, len(params.blocks), ratios):
        start = time.perf_counter()
        parts = range(0, len(images), batch)
        run = lambda i, p=plan, q=proportional: forward(
            ready(images[i : i + batch]), params, p, proportional=q, seed=i
        )
        features = np.concatenate([np.asarray(run(i)) for i in parts])
        features = features.astype(np.float64)
        base = features if base is None else base
        row = {
            "method": name,
            "ratio": ratio,
            "macs": merge_flops(len(params.blocks), tokens + 1, DIM, ratio=ratio),
            **judged(features, base, group, subgroup),
        }
        rows.append(row)
        took = time.perf_counter() - start
        print(f"{name:28}{ratio:7} fixed {row['fixed']:.3f} refitted {row['refitted']:.3f} recall "
              f"{row['recall_1']:.3f} cosine {row['cosine']:.4f} {took:.0f} s", flush=True)  # fmt: skip
    keys = layer_keys(ready(images[:: len(images) // spectral_images][:spectral_images]), params)
    return {
        "images": len(images),
        "pixels": side,
        "patches": tokens,
        "rows": rows,
        "spectra": spectra(keys, ratios),
    }


# The sentence encoder.


def merged_bert(ids, params, *, num_heads, method, ratio, eps, rng):
    """(sum of the text's states, tokens left): merging between attention and MLP in post-norm blocks."""
    x, size = bert_embed(ids, params, eps=eps), None
    margins = margin_schedule(len(params.blocks), m0=0.9)
    for p, margin in zip(params.blocks, margins, strict=True):
        q, k, v = ref_qkv(x, p, num_heads=num_heads)
        size = np.ones(len(x)) if size is None else size
        o = linear(join_heads(proportional_attention(q, k, v, size)), p.w_o, p.b_o)
        x = layer_norm(x + o, p.ln1_scale, p.ln1_bias, eps=eps)
        metric, removed = k.mean(axis=-3), removed_tokens(len(x) - 1, ratio)
        if method == "pitome":
            plan = pitome_text_matching(metric, ratio=ratio, margin=margin, class_token=True)
        elif method == "tome":
            plan = bipartite_soft_matching(metric, r=removed, class_token=True)
        else:
            drawn = random_plan(rng, len(x), removed)
            plan = MergePlan(drawn.group[0], drawn.n_out)
        x, size = ref_merge_tokens(x, *plan, size=size)
        h = mlp(x, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
        x = layer_norm(x + h, p.ln2_scale, p.ln2_bias, eps=eps)
    return (x * size[:, None]).sum(axis=0), len(x)


def text(ratios=(1.0, 0.95, 0.9, 0.8, 0.7)):
    """Pearson with people on 50 documents by method and ratio, and the share of tokens left at the end."""
    from ref.fetch import fetch
    from ref.models.minilm import EPS, NUM_HEADS, load_minilm, load_tokenizer
    from ref.tasks.similarity import load_lee

    tokenizer = load_tokenizer(fetch("minilm") / "tokenizer.json")
    params = load_minilm(fetch("minilm") / "model.safetensors")
    documents, human = load_lee(fetch("lee"))
    docs, at, rows = [tokenizer(d) for d in documents], np.triu_indices(50, 1), []
    for ratio in ratios:
        for method in ("pitome", "tome", "random") if ratio < 1 else ("pitome",):
            rng, vectors, left = np.random.default_rng(0), [], 0
            for d in docs:
                v, n = merged_bert(
                    d, params, num_heads=NUM_HEADS, method=method, ratio=ratio, eps=EPS, rng=rng
                )
                vectors.append(v / np.linalg.norm(v))
                left += n
            v = np.stack(vectors)
            row = {
                "method": method if ratio < 1 else "none",
                "ratio": ratio,
                "tokens_left": left / sum(map(len, docs)),
                "pearson": pearson((v @ v.T)[at], human[at]),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


# Counting.


def flops():
    """[{network, ratio, macs, published}]: this project's count beside the published one."""
    return [
        {"network": name, "ratio": ratio, "macs": merge_flops(depth, n, dim, ratio=ratio), "published": said}
        for name, (depth, n, dim, ratios) in PUBLISHED.items()
        for ratio, said in ratios.items()
    ]


def llava(ratios=(1.0, 0.975, 0.95, 0.925), *, words=64):
    """Multiply-accumulates of LLaVA-1.5-7B's prefill by its published sizes, merging in its ViT-L/14.

    Pictures of 336 pixels. The language model's 32 blocks of width 4096 (MLP 11008, three matrices) see the
    patches left and `words` tokens of text.
    """
    rows = []
    for ratio in ratios:
        left = pitome_token_schedule(577, 24, ratio=ratio)[-1]
        n = left + words
        language = 32 * (n * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * n * n * 4096)
        rows.append(
            {
                "ratio": ratio,
                "patches_left": left,
                "vision": merge_flops(24, 577, 1024, ratio=ratio),
                "language": language,
            }
        )
    return rows


def planted(trials=100):
    """Spectral distances on planted clusters by r: tokens in random order, where ToMe may pair anything."""
    from tests.vision.laws_pitome import scene

    rows = []
    for r in (2, 4, 6, 8, 10, 12):
        rng, found = np.random.default_rng(r), []
        for _ in range(trials):
            x, labels = scene(rng)
            n = len(labels)
            plans = (
                pitome_matching(x, ratio=1 - (r + 0.5) / n, margin=0.6),
                bipartite_soft_matching(x, r=r),
                random_plan(rng, n, r, class_token=False),
            )
            found.append([spectral_distance(graph(x[0]), p.group[0]) for p in plans])
        d = np.array(found)
        mean = dict(zip(("pitome", "tome", "random"), d.mean(axis=0).tolist(), strict=True))
        rows.append({"r": r, "below_tome": float((d[:, 0] <= d[:, 1]).mean()), **mean})
    return rows


def throughput(side=224, batch=256, ratio=0.9):
    """Images a second in bfloat16, by method, at equal tokens."""
    from ref.fetch import fetch
    from ref.models.dinov2 import load_dinov2

    half = lambda x: jnp.asarray(x, jnp.bfloat16)
    params = jax.tree.map(half, load_dinov2(fetch("dinov2"), image_size=side))
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 3), jnp.bfloat16)
    removed = counts((side // 14) ** 2, len(params.blocks), ratio)
    run = partial(pitome.vit_forward_merged, images, params, MergeConfig(num_heads=HEADS))
    calls = {
        "none": lambda: run(method="none"),
        "tome": lambda: run(method="tome", r=removed),
        "pitome, xla": lambda: run(ratio=ratio),
        "pitome, triton": lambda: run(ratio=ratio, impl="triton"),
    }
    rows = {}
    for name, call in calls.items():
        call().block_until_ready()
        took = []
        for _ in range(10):
            start = time.perf_counter()
            call().block_until_ready()
            took.append(time.perf_counter() - start)
        rows[name] = batch / float(np.median(took))
        print(name, round(rows[name]), "images/s", flush=True)
    return {"ratio": ratio, "batch": batch, "pixels": side, "images_a_second": rows}


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="the whole data set at full size, on one GPU")
    if parser.parse_args().gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        with jax.default_matmul_precision("highest"):
            seen = vision(10**6, 224, (0.9, 0.925, 0.95, 0.975), 953, 12)
        print(store("pitome_gpu", {"vision": seen, "throughput": throughput()}, FILES))
        return
    results = {"flops": flops(), "llava": llava(), "planted": planted(), "text": text()}
    results["vision"] = vision(40, 112, (0.9, 0.95), 40, 8)
    print(store("pitome", results, FILES))


if __name__ == "__main__":
    main()
