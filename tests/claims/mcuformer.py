"""MCUFormer end to end on digits: the space, the subnet, then int8: `python -m tests.claims.mcuformer`.

The published space is scaled down: digits doubled to 16 x 16 pixels stand for 240 x 240, patches are a
quarter of the paper's, width 32 is for 256, heads are of 8. Supernets train in JAX, slices made by masks, so
that one compiled step serves every subnet; a test holds them to the slices. Then a network of the published
size, its weights drawn, runs in an arena of exactly the planned bytes. Needs scikit-learn; minutes on a CPU.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.mlp import gelu
from accel.blocks.optim import adam, adam_init, clip_by_norm
from ref.data import digits
from ref.devices.mcuformer import (
    MCUFormerParams,
    SubnetConfig,
    SubnetSpace,
    distances,
    evolve_space,
    framed,
    init_mcuformer,
    mcuformer_forward,
    mcuformer_int8,
    peak_memory,
    quantize_model,
    search_subnet,
    slice_qkv_rows,
    token_count,
)
from ref.models.vit import patchify
from tests.claims.record import store

FILES = (
    "ref/devices/mcuformer.py",
    "ref/blocks/space_search.py",
    "ref/blocks/vit_int8.py",
    "ref/blocks/vit_schedules.py",
    "ref/blocks/live_arena.py",
    "tests/claims/mcuformer.py",
)
SPACE = SubnetSpace((2, 3, 4), (16, 20, 24, 28, 32), (1, 2), (1.0, 1.5, 2.0))
SUPER = {"embed_dim": 32, "depth": 4, "heads": 2, "mlp_ratio": 2.0, "num_classes": 10, "channels": 1,
         "max_distance": 3, "head_dim": 8}  # fmt: skip
SIDE = 16
CHUNK = 50  # steps whose data and subnets are drawn at once
OPTIONS = {"max_distance": SUPER["max_distance"], "head_dim": SUPER["head_dim"]}


def data(*, full=True):
    """(train, validation, test), each (uint8 [n, 16, 16, 1], labels): 1,797 digits, or the 400 bundled."""
    if full:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
    else:
        images, labels = digits()
    order = np.random.default_rng(0).permutation(len(images))
    x = np.minimum(np.kron(images[order], np.ones((1, 2, 2))) * 16, 255).astype(np.uint8)[..., None]
    y, n = labels[order].astype(np.int32), len(images)
    cuts = n * 5 // 9, n * 7 // 9
    return tuple(zip(np.split(x, cuts), np.split(y, cuts), strict=True))


def need(subnet, patch, rho, schedule="integrated", weights="sram"):
    """Peak bytes of a subnet on the doubled digits, its largest factor staged in SRAM as in the paper."""
    return peak_memory(
        subnet, img=SIDE, patch=patch, rank_ratio=rho, schedule=schedule, weights=weights, channels=1,
        super_dim=SUPER["embed_dim"], head_dim=SUPER["head_dim"], allow_any=True,
    ).bytes  # fmt: skip


# Training: slices by masks


def genes_of(subnet, rho):
    """The sizes of a subnet as arrays; layers that it lacks have `on` 0."""
    layers = SUPER["depth"]
    pad = lambda values: np.array([*values, *[1] * (layers - len(values))], np.int32)
    hidden = [int(subnet.embed_dim * r) for r in subnet.mlp_ratios]
    ranks = [int(min(subnet.embed_dim, f) * rho) for f in hidden]
    return {"E": np.int32(subnet.embed_dim), "on": (np.arange(layers) < len(subnet.heads)).astype(np.float32),
            "heads": pad(subnet.heads), "F": pad(hidden), "M": pad(ranks)}  # fmt: skip


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def masked_forward(img, p: MCUFormerParams, genes, *, patch, rho):
    """`mcuformer_forward` of the subnet that genes describe, all sizes those of the supernet."""
    d, width, most = SUPER["head_dim"], SUPER["embed_dim"], SUPER["max_distance"]
    first = lambda n, size: (jnp.arange(size) < n).astype(jnp.float32)
    E = first(genes["E"], width)

    def norm(x, w, b):
        mean = (x * E).sum(-1, keepdims=True) / genes["E"]
        var = (jnp.square(x - mean) * E).sum(-1, keepdims=True) / genes["E"]
        return ((x - mean) * jax.lax.rsqrt(var + 1e-5) * w + b) * E

    x = (
        patchify(framed(img, patch, jnp.pad), patch) @ p.w_patch.transpose(2, 3, 1, 0).reshape(-1, width)
        + p.b_patch
    )
    x = jnp.concatenate([jnp.broadcast_to(p.cls_token, (len(x), 1, width)), x], axis=1) + p.pos_embed
    x, N = x * E, p.pos_embed.shape[0]
    dy, dx = distances(N, most)
    R = int(width * rho)
    for i, b in enumerate(p.blocks):
        A_most = b.qkv.w3.shape[0] // 3
        A = genes["heads"][i] * d
        y = norm(x, b.ln1_w, b.ln1_b) @ slice_rows(b.qkv.w1, R).T @ slice_rows(b.qkv.w2, R).T
        bias = lambda j, b=b, A=A, A_most=A_most: b.qkv.b[jnp.arange(A_most) + j * A]
        q, k, v = (y @ b.qkv.w3[j::3].T + bias(j) for j in range(3))
        q, k, v = (t.reshape(len(x), N, -1, d).swapaxes(1, 2) for t in (q, k, v))
        r_k, r_v = (t.v[dy] + t.h[dx] for t in (b.rel_k, b.rel_v))
        logits = (q @ k.swapaxes(-1, -2) + jnp.einsum("bhid,ijd->bhij", q, r_k)) / np.sqrt(d)
        w = jax.nn.softmax(logits)
        o = w @ v + jnp.einsum("bhij,ijd->bhid", w, r_v)
        o = o.swapaxes(1, 2).reshape(len(x), N, -1) * first(A, A_most)
        on = genes["on"][i] * E
        x = x + on * (o @ b.proj.w1.T @ b.proj.w2.T @ b.proj.w3.T + b.proj.b)
        M, F = first(genes["M"][i], b.fc1.w1.shape[0]), first(genes["F"][i], b.fc1.b.shape[0])
        y = ((norm(x, b.ln2_w, b.ln2_b) @ b.fc1.w1.T * M) @ b.fc1.w2.T * M) @ b.fc1.w3.T + b.fc1.b
        y = ((gelu(y) * F @ b.fc2.w1.T * M) @ b.fc2.w2.T * M) @ b.fc2.w3.T + b.fc2.b
        x = x + on * y
    return norm(x, p.norm_w, p.norm_b)[:, 1:].mean(axis=1) @ p.w_head.T + p.b_head


def slice_rows(w, rank):
    """The interleaved rows of a factor of fixed rank, as a constant permutation."""
    order = slice_qkv_rows(np.arange(rank)[:, None], rank, 1)[:, 0]
    return w[order]


def train_supernet(train, patch, rho, *, steps, seed, lr=3e-3, batch=32):
    """Parameters after `steps` steps (a multiple of CHUNK) of AdamW, each on a subnet drawn uniformly."""
    x, y = train[0].astype(np.float32) / 255, train[1]
    rng = np.random.default_rng(seed)
    p = init_mcuformer(rng, image_size=SIDE, patch=patch, rank_ratio=rho, std=0.12, **SUPER)
    p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)

    def loss(p, img, labels, genes):
        z = jax.nn.log_softmax(masked_forward(img, p, genes, patch=patch, rho=rho))
        smooth = 0.9 * z[jnp.arange(len(z)), labels] + 0.1 * z.mean(axis=-1)
        return -smooth.mean()

    @jax.jit
    def chunk(p, state, images, labels, genes, rates):
        def step(carry, now):
            p, state = carry
            img, y, g, rate = now
            grads = clip_by_norm(jax.grad(loss)(p, img, y, g), 1.0)
            return adam(p, grads, state, lr=rate, weight_decay=0.01), None

        return jax.lax.scan(step, (p, state), (images, labels, genes, rates))[0]

    n = np.arange(steps)
    rates = (lr * np.minimum(1.0, (n + 1) / 50) * 0.5 * (1 + np.cos(np.pi * n / steps))).astype(np.float32)
    state = adam_init(p)
    for start in range(0, steps, CHUNK):
        at = rng.integers(0, len(x), (CHUNK, batch))
        genes = jax.tree.map(lambda *g: np.stack(g), *(genes_of(SPACE.draw(rng), rho) for _ in range(CHUNK)))
        p, state = chunk(p, state, x[at], y[at], genes, rates[start : start + CHUNK])
    return jax.tree.map(lambda a: np.asarray(a, np.float64), p)


# The experiments


def judge(p, split, patch, rho):
    """A function of a subnet: per cent of the split that it gets right, one compiled program for all."""
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    run = jax.jit(lambda genes: masked_forward(x, single, genes, patch=patch, rho=rho).argmax(axis=1))
    x = jnp.asarray(split[0], jnp.float32) / 255
    return lambda subnet: 100 * float((np.asarray(run(genes_of(subnet, rho))) == split[1]).mean())


def space_search(splits, limit, *, steps, train_steps, seed, samples=50):
    """[n, 4] spaces in the paper's coordinates: rho, patch, mean of best and mean accuracy, legal ratio."""

    def evaluate(rho, patch):
        p = train_supernet(splits[0], patch // 4, rho, steps=train_steps, seed=seed)
        worth, rng = judge(p, splits[1], patch // 4, rho), np.random.default_rng(seed)
        found = [worth(SPACE.draw(rng)) for _ in range(samples)]
        return (max(found) + np.mean(found)) / 2, legal_share(patch // 4, rho, limit, seed)

    return evolve_space(evaluate, steps=steps, seed=seed)


def legal_share(patch, rho, limit, seed=0, n=500):
    """Share of n uniform subnets that fit the limit."""
    rng = np.random.default_rng(seed)
    return float(np.mean([need(SPACE.draw(rng), patch, rho) <= limit for _ in range(n)]))


def subnet_search(worth, patch, rho, limit, *, seed, population=16, generations=5):
    """(the best subnet, curves of evolution and of as many random draws): highest accuracy so far."""
    legal = lambda s: need(s, patch, rho) <= limit
    half = population // 2
    best, history = search_subnet(worth, legal, SPACE, population=population, parents=5, mutants=half,
                                  crossovers=half, generations=generations, seed=seed)  # fmt: skip
    asked = [accuracy for group in history for _, accuracy in group]
    rng, known = np.random.default_rng(1000 + seed), {}
    while len(known) < len(asked):
        s = SPACE.draw(rng)
        if s not in known and legal(s):
            known[s] = worth(s)
    so_far = lambda values: np.maximum.accumulate(list(values)).tolist()
    return best, {"seed": seed, "evolved": so_far(asked), "random": so_far(known.values())}


def int8_loss(p, subnet, splits, patch, rho, *, most=None):
    """Accuracy in float and in int8 of both forms on the test split; schedules compared on three images."""
    options = {"subnet": subnet, "patch": patch, "rank_ratio": rho, **OPTIONS}
    x, y = (a[:most] for a in splits[2])
    z = mcuformer_forward(x / 255.0, p, **options)
    out = {"images": len(x), "float": 100 * float((z.argmax(1) == y).mean())}
    for forms in ("s8", "exponential"):
        q = quantize_model(p, splits[0][0][:200], forms=forms, **options)
        runs = [mcuformer_int8(image, q, schedule="naive")[0] for image in x]
        got = np.array(runs) * q.logit_scale
        cosine = (got * z).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(z, axis=1)
        out[forms] = {"accuracy": 100 * float((got.argmax(1) == y).mean()), "cosine": float(cosine.mean())}
        peaks = {}
        for schedule in ("integrated", "head_by_head", "naive"):
            for image, want in zip(x[:3], runs, strict=False):
                logits, trace = mcuformer_int8(image, q, schedule=schedule)
                assert (logits == want).all()
            peaks[schedule] = [trace.peak, trace.plan.total]
        out["peaks"], out["weights"] = peaks, q.nonvolatile_bytes()
    return out


def published_size(*, depth=12, schedules=("integrated", "naive")):
    """A network of the published space at 240 x 240, weights drawn, in an arena of the planned bytes."""
    rng = np.random.default_rng(0)
    subnet = SubnetConfig(192, (3,) * depth, (4.0,) * depth)
    options = {"subnet": subnet, "patch": 16, "rank_ratio": 0.9}
    p = init_mcuformer(rng, image_size=240, patch=16, depth=depth, rank_ratio=0.9, num_classes=10, std=0.05)
    image = np.kron(digits()[0][:1], np.ones((1, 30, 30)))[..., None] * np.array([15, 12, 9])
    image = image.astype(np.uint8)
    q = quantize_model(p, image, **options)
    want = mcuformer_forward(image / 255.0, p, **options)[0]
    rows, logits = [], []
    for schedule in schedules:
        z, trace = mcuformer_int8(image[0], q, schedule=schedule)
        logits.append(z)
        closed = peak_memory(subnet, img=240, patch=16, rank_ratio=0.9, schedule=schedule).bytes
        rows.append({"schedule": schedule, "arena": trace.plan.total, "alive": trace.peak,
                     "touched": trace.high, "closed_form": closed})  # fmt: skip
    assert all((z == logits[0]).all() for z in logits)
    got = logits[0] * q.logit_scale
    cosine = float(got @ want / np.linalg.norm(got) / np.linalg.norm(want))
    return {"depth": depth, "tokens": token_count(240, 16), "rows": rows, "cosine": cosine,
            "weights": q.nonvolatile_bytes()}  # fmt: skip


def inner_search(splits, patch, rho, limit, *, steps, seeds, search):
    """(supernet, the best subnet of all seeds, results) in the space (rho, patch)."""
    p = train_supernet(splits[0], patch, rho, steps=steps, seed=1)
    worth, tested = (judge(p, splits[i], patch, rho) for i in (1, 2))
    runs, best = [], []
    for seed in seeds:
        found, run = subnet_search(worth, patch, rho, limit, seed=seed, **search)
        best.append((worth(found), found))
        runs.append(run | {"test": tested(found), "bytes": need(found, patch, rho), "subnet": vars(found)})
    largest = SubnetConfig(32, (2,) * 4, (2.0,) * 4)
    return p, max(best, key=lambda pair: pair[0])[1], {
        "rho": rho, "patch": patch, "legal": legal_share(patch, rho, limit), "runs": runs,
        "largest": {"bytes": need(largest, patch, rho), "test": tested(largest)},
    }  # fmt: skip


def measure(
    *, full=True, train_steps=300, final_steps=1500, steps=4, seeds=(0, 1, 2), limit=2048, search=None
):
    """Space, supernet, subnet, int8; and the inner search again where one network in five fits."""
    splits, start = data(full=full), time.perf_counter()
    history = space_search(splits, limit, steps=steps, train_steps=train_steps, seed=0)
    fits = history[history[:, 3] >= min(0.1, history[:, 3].max())]
    rho, patch = fits[fits[:, 2].argmax(), :2]
    rho, patch = float(rho), int(patch) // 4
    options = {"steps": final_steps, "seeds": seeds, "search": search or {}}
    p, chosen, found = inner_search(splits, patch, rho, limit, **options)
    return {
        "limit": limit, "sizes": [len(s[1]) for s in splits], "space": history.tolist(), **found,
        "int8": int8_loss(p, chosen, splits, patch, rho), "seconds": round(time.perf_counter() - start),
        "narrow": inner_search(splits, 4, 0.6, limit, **options)[2],
    }  # fmt: skip


if __name__ == "__main__":
    results = measure()
    print(results)
    print(store("mcuformer", results | {"published": published_size()}, FILES))
