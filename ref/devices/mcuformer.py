"""MCUFormer: a vision transformer searched and scheduled for the few hundred kilobytes of a microcontroller.

Source: Liang et al. 2023 (arXiv 2310.16898) and its released search code, built on AutoFormer (Chen et al.
2021). Every dense layer is three low-rank factors, and a subnet is the leading slice of each. The inference
engine was never released: its int8 operators and schedules here are ours (ref/blocks/vit_int8.py and
vit_schedules.py, run inside the checked memory of live_arena.py). The search: ref/blocks/space_search.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import gelu, linear
from ref.blocks.norms import layer_norm
from ref.blocks.quantize import init_range, update_range
from ref.blocks.softmax import softmax
from ref.blocks.space_search import (
    EvolutionStep,
    SubnetConfig,
    SubnetSpace,
    evolution_step,
    evolve_space,
    nearest_points,
    search_subnet,
)
from ref.blocks.vit_int8 import FORMS, QModel, build_int8, frame
from ref.blocks.vit_schedules import Trace, plan_int8, run_int8
from ref.dims import dims, float64
from ref.example import Example
from ref.models.vit import patchify

__all__ = [
    "EvolutionStep", "LowRank", "MCUFormerBlock", "MCUFormerParams", "MemoryReport", "QModel", "RelPos",
    "SubnetConfig", "SubnetSpace", "Trace", "evolution_step", "evolve_space", "example", "extract_subnet",
    "fold_factors", "init_mcuformer", "low_rank_linear", "mcuformer_forward", "mcuformer_int8",
    "nearest_points", "peak_memory", "plan_int8", "quantize_model", "relative_position_embedding",
    "released_predicate", "search_subnet", "slice_qkv_rows", "svd_init",
]  # fmt: skip

PATCHES = (16, 20, 24, 28, 32)
POOLINGS = ("patch_mean", "class_token")
SCHEDULES = ("integrated", "naive", "head_by_head", "paper", "released")


class LowRank(NamedTuple):
    """y = w3 (w2 (w1 x)) + b: w1 [R, in], w2 [R, R] (None once folded into w1), w3 [out, R], b [out]."""

    w1: np.ndarray
    w2: np.ndarray | None
    w3: np.ndarray
    b: np.ndarray


class RelPos(NamedTuple):
    """Embeddings of vertical and horizontal distances, [2 m + 2, d] each; row 0 is the class token's."""

    v: np.ndarray
    h: np.ndarray


class MCUFormerBlock(NamedTuple):
    """One layer of the supernet, pre-norm; rows of the qkv factors are interleaved, q, k, v, q, k, v, ..."""

    ln1_w: np.ndarray
    ln1_b: np.ndarray
    qkv: LowRank
    proj: LowRank
    rel_k: RelPos
    rel_v: RelPos
    ln2_w: np.ndarray
    ln2_b: np.ndarray
    fc1: LowRank
    fc2: LowRank


class MCUFormerParams(NamedTuple):
    """The supernet: w_patch [E, C, p, p], b_patch, cls_token [E], pos_embed [N, E], blocks, w_head [K, E]."""

    w_patch: np.ndarray
    b_patch: np.ndarray
    cls_token: np.ndarray
    pos_embed: np.ndarray
    blocks: tuple[MCUFormerBlock, ...]
    norm_w: np.ndarray
    norm_b: np.ndarray
    w_head: np.ndarray
    b_head: np.ndarray


@dataclass(frozen=True)
class MemoryReport:
    """Peak bytes, the operator they fall on, and the bytes alive at every kind of operator."""

    bytes: int
    op: str
    table: dict


def low_rank_linear(x, w1, w2, w3, b):
    """w3 (w2 (w1 x)) + b: x [..., in], w1 [R, in], w2 [R, R] or None, w3 [out, R], b [out] or None."""
    optional = {name: (a, spec) for name, a, spec in (("w2", w2, "R R"), ("b", b, "out")) if a is not None}
    dims(x=(x, "... in"), w1=(w1, "R in"), w3=(w3, "out R"), **optional)
    return _chain(float64(x), LowRank(w1, w2, w3, b), "", lambda name, v: v)


def slice_qkv_rows(w, out_dim, in_dim):
    """w [out, in] -> [out_dim, in_dim]: rows 0, 3, 6, ..., then 1, 4, ..., then 2, 5, ... of the first."""
    check_slice(w, out_dim, in_dim)
    return np.concatenate([w[i:out_dim:3, :in_dim] for i in range(3)])


def relative_position_embedding(table_v, table_h, n_tokens, *, max_distance=14):
    """r [N, N, d]: table_v[dy + m + 1] + table_h[dx + m + 1], distances clipped to +-m; row 0 of both for the
    class token, which is token 0. The grid has int(sqrt(N - 1)) tokens a side.
    """
    check_tables(table_v, table_h, max_distance)
    dy, dx = distances(n_tokens, max_distance)
    return float64(table_v)[dy] + float64(table_h)[dx]


def mcuformer_forward(
    img, params: MCUFormerParams, *, subnet: SubnetConfig, patch, rank_ratio, pooling="patch_mean",
    relative_position=True, max_distance=14, head_dim=64, eps=1e-5,
):  # fmt: skip
    """Logits [..., K] of images [..., S, S, C] by the subnet's slice of the supernet.

    Images are framed by zeros for whole patches (`frame`). Attention: softmax of (q k^T + q r_k) / sqrt(d)
    on v, plus the same weights on r_v. pooling: "patch_mean" (as trained) or "class_token", after the norm.
    Raises: ValueError naming the argument.
    """
    check_forward(img, params, subnet, patch, rank_ratio, pooling, max_distance, head_dim)
    small = extract_subnet(params, subnet, rank_ratio=rank_ratio, head_dim=head_dim)
    return _network(img, small, subnet.heads, patch, pooling, max_distance if relative_position else 0, eps)


def extract_subnet(params, subnet, *, rank_ratio, head_dim=64, rows=slice_qkv_rows):
    """The subnet's own small parameters: leading rows and columns; q, k and v one below another.

    The rank of attention comes from the supernet's width, that of the MLP from the subnet's.
    """
    check_subnet(params, subnet, rank_ratio, head_dim)
    E, R = subnet.embed_dim, int(params.w_patch.shape[0] * rank_ratio)

    def front(f, out, rank, width):
        w2 = None if f.w2 is None else f.w2[:rank, :rank]
        return LowRank(f.w1[:rank, :width], w2, f.w3[:out, :rank], f.b[:out])

    def block(p, heads, ratio):
        A, F = heads * head_dim, int(E * ratio)
        M = int(min(E, F) * rank_ratio)
        qkv = LowRank(rows(p.qkv.w1, R, E), None if p.qkv.w2 is None else rows(p.qkv.w2, R, R),
                      rows(p.qkv.w3, 3 * A, R), p.qkv.b[: 3 * A])  # fmt: skip
        return p._replace(
            ln1_w=p.ln1_w[:E], ln1_b=p.ln1_b[:E], qkv=qkv, proj=front(p.proj, E, R, A),
            ln2_w=p.ln2_w[:E], ln2_b=p.ln2_b[:E], fc1=front(p.fc1, F, M, E), fc2=front(p.fc2, E, M, F),
        )  # fmt: skip

    layers = zip(params.blocks, subnet.heads, subnet.mlp_ratios, strict=False)
    return MCUFormerParams(
        params.w_patch[:E], params.b_patch[:E], params.cls_token[:E], params.pos_embed[:, :E],
        tuple(block(*layer) for layer in layers), params.norm_w[:E], params.norm_b[:E],
        params.w_head[:, :E], params.b_head,
    )  # fmt: skip


def svd_init(w, rank):
    """(w1 [R, in], w2 [R, R], w3 [out, R]) = (V^T, diag(s), U): the product nearest to w [out, in].

    Factors of a rank beyond min(out, in) end in zeros. Raises: ValueError for a rank below 1.
    """
    dims(w=(w, "out in"))
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    u, s, vt = np.linalg.svd(float64(w), full_matrices=False)
    kept = min(rank, len(s))
    w1, w2, w3 = np.zeros((rank, w.shape[1])), np.zeros((rank, rank)), np.zeros((w.shape[0], rank))
    w1[:kept], w3[:, :kept], w2[range(kept), range(kept)] = vt[:kept], u[:, :kept], s[:kept]
    return w1, w2, w3


def fold_factors(factors: LowRank) -> LowRank:
    """The same map in two products, w3 (w2 w1): nothing stands between the factors. Ours, for deployment."""
    return factors if factors.w2 is None else factors._replace(w1=float64(factors.w2) @ factors.w1, w2=None)


def init_mcuformer(
    rng, *, image_size, patch, embed_dim=256, depth=14, heads=4, mlp_ratio=4.0, rank_ratio, num_classes,
    channels=3, max_distance=14, head_dim=64, std=0.02,
) -> MCUFormerParams:  # fmt: skip
    """A supernet of normal weights (a product of factors has `std` too), zero biases and unit norms."""
    E, A, F = embed_dim, heads * head_dim, int(embed_dim * mlp_ratio)
    w = lambda *shape: std * rng.standard_normal(shape)

    def low_rank(out, width, cap):
        rank = int(cap * rank_ratio)
        unit = lambda n, m: rng.standard_normal((n, m)) / np.sqrt(rank)
        return LowRank(
            std * rng.standard_normal((rank, width)), unit(rank, rank), unit(out, rank), np.zeros(out)
        )

    table = lambda: RelPos(w(2 * max_distance + 2, head_dim), w(2 * max_distance + 2, head_dim))
    block = lambda: MCUFormerBlock(
        np.ones(E), np.zeros(E), low_rank(3 * A, E, E), low_rank(E, A, E), table(), table(),
        np.ones(E), np.zeros(E), low_rank(F, E, min(E, F)), low_rank(E, F, min(E, F)),
    )  # fmt: skip
    return MCUFormerParams(
        w(E, channels, patch, patch), np.zeros(E), w(E), w(token_count(image_size, patch), E),
        tuple(block() for _ in range(depth)), np.ones(E), np.zeros(E), w(num_classes, E),
        np.zeros(num_classes),
    )  # fmt: skip


def quantize_model(
    params, calib, *, subnet, patch, rank_ratio, pooling="patch_mean", relative_position=True,
    max_distance=14, head_dim=64, eps=1e-5, forms="s8",
) -> QModel:  # fmt: skip
    """The subnet in int8: weights by output channel, activations by the ranges that `calib` gives them.

    Args: calib uint8 [B, S, S, C]; pixels enter the network as code / 255.
      forms: "s8" softmax and GELU of CMSIS-NN and an erf table; "exponential" both from I-BERT's integer exp.
    Raises: ValueError for an empty or non-uint8 calib, and as `mcuformer_forward`.
    """
    calib = np.asarray(calib)
    if calib.dtype != np.uint8 or calib.ndim != 4 or not calib.size:
        raise ValueError(f"calib must be uint8 [B, S, S, C], B >= 1, got {calib.dtype} {list(calib.shape)}")
    if forms not in FORMS:
        raise ValueError(f"forms must be one of {', '.join(FORMS)}, got {forms!r}")
    check_forward(calib, params, subnet, patch, rank_ratio, pooling, max_distance, head_dim)
    small = extract_subnet(params, subnet, rank_ratio=rank_ratio, head_dim=head_dim)
    if any(f.w2 is None for b in small.blocks for f in (b.qkv, b.proj, b.fc1, b.fc2)):
        raise ValueError("params must hold three factors a layer: the schedules know no folded ones")
    ranges = {}

    def see(name, v):
        ranges[name] = update_range(ranges.get(name, init_range()), v, kind="minmax")
        return v

    most = max_distance if relative_position else 0
    _network(calib / 255.0, small, subnet.heads, patch, pooling, most, eps, see)
    shape = {
        "image": calib.shape[1],
        "channels": calib.shape[3],
        "patch": patch,
        "heads": subnet.heads,
        "head_dim": head_dim,
        "pooling": pooling,
        "max_distance": most,
        "forms": forms,
    }
    return build_int8(small, {n: (float(r.lo), float(r.hi)) for n, r in ranges.items()}, shape)


def mcuformer_int8(img_u8, qmodel: QModel, *, schedule="integrated", arena_bytes=None):
    """(logits int32 [K], trace) of one image [S, S, C], computed inside one arena of bytes.

    schedule: "integrated" (fused per token, patch rows one by one, results over their inputs), "head_by_head"
    (that, with keys and values of a single head), "naive" (every operator out of place). Same logits.
    Raises: ValueError naming the argument; MemoryError if arena_bytes is below what the plan needs.
    """
    img = np.asarray(img_u8)
    dims(img_u8=(img, f"{qmodel.image} {qmodel.image} {qmodel.channels}"))
    if img.dtype != np.uint8:
        raise ValueError(f"img_u8 must be uint8, got {img.dtype}")
    if schedule not in SCHEDULES[:3]:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES[:3])}, got {schedule!r}")
    return run_int8(img, qmodel, schedule, arena_bytes)


def peak_memory(
    subnet, *, img, patch, rank_ratio, schedule="integrated", weights="xip", super_dim=256, head_dim=64,
    channels=3, allow_any=False,
) -> MemoryReport:  # fmt: skip
    """Bytes alive at every operator of an int8 subnet on images of img x img pixels, and their peak.

    Args: schedule: as `mcuformer_int8`, or two rules of thumb, "paper" (the largest factor plus the largest
      input or output of one) and "released" (the search code's formula, for what it is).
      weights: "xip" reads them where they are stored; "sram" adds an operator's largest factor. The two rules
      hold weights in SRAM whatever it says. allow_any: patches other than 16, 20, 24, 28, 32.
    Raises: ValueError naming the argument.
    """
    check_memory(img, patch, rank_ratio, schedule, weights, allow_any)
    E, S, C, R = subnet.embed_dim, img, channels, int(super_dim * rank_ratio)
    N = token_count(img, patch)
    if schedule == "released":
        ratio = max(subnet.mlp_ratios)
        total = E * (((S / patch) ** 2 + 1) * (1 + ratio) + E * ratio * rank_ratio)
        return MemoryReport(int(np.ceil(total)), "released", {"released": int(np.ceil(total))})
    first = {"naive": C * S * S}.get(schedule, C * patch * S)
    rows = [("patch", first + N * E, C * patch**2 * E)]
    rows.append(("pool", N * E + E, 0) if schedule == "naive" else ("head", N * E + 5 * E, 0))
    paper = []
    for h, ratio in zip(subnet.heads, subnet.mlp_ratios, strict=True):
        A, F = h * head_dim, int(E * ratio)
        M = int(min(E, F) * rank_ratio)
        attention, mlp = max(E * R, R * R, 3 * A * R), max(E * M, M * M, F * M)
        project = max(A * R, R * R, R * E)
        paper.append((max(attention, project, mlp), N * max(E, R, 3 * A, M, F)))
        if schedule == "naive":
            rows += [
                ("ln", 2 * N * E, 0), ("qkv1", 2 * N * E + N * R, E * R), ("qkv2", N * E + 2 * N * R, R * R),
                ("qkv3", N * E + N * R + 3 * N * A, 3 * A * R), ("scores", N * E + 3 * N * A + h * N * N, 0),
                ("softmax", N * E + N * A + 2 * h * N * N, 0), ("pv", N * E + 2 * N * A + h * N * N, 0),
                ("proj1", N * E + N * A + N * R, A * R), ("proj2", N * E + 2 * N * R, R * R),
                ("proj3", 2 * N * E + N * R, R * E), ("add", 3 * N * E, 0),
                ("fc11", 2 * N * E + N * M, E * M), ("fc12", N * E + 2 * N * M, M * M),
                ("fc13", N * E + N * M + N * F, F * M), ("gelu", N * E + 2 * N * F, 0),
                ("fc21", N * E + N * F + N * M, F * M), ("fc22", N * E + 2 * N * M, M * M),
                ("fc23", 2 * N * E + N * M, M * E),
            ]  # fmt: skip
            continue
        if schedule == "head_by_head":
            d = head_dim
            rows.append(("attention", N * E + N * A + 2 * d * N + d + 5 * N + E + 2 * R, attention))
        else:
            rows += [("qkv", N * E + 3 * N * A + E + 2 * R, attention),
                     ("attention", N * E + 3 * N * A + 5 * N, 0)]  # fmt: skip
        rows += [("proj", N * E + N * A + 2 * R + E, project), ("ffn", N * E + 2 * E + 4 * M + F, mlp)]
    if schedule == "paper":
        rows = [("paper", max(w for w, _ in paper) + max(a for _, a in paper), 0)]
    table = {}
    for op, live, factor in rows:
        table[op] = max(table.get(op, 0), live + (factor if weights == "sram" else 0))
    op = max(table, key=table.get)
    return MemoryReport(table[op], op, table)


def released_predicate(img, patch, rho, embed_dim, mlp_ratio, *, limit_bytes=327680):
    """Whether E ((S / p)^2 + 1) (1 + ratio) + E^2 ratio rho <= limit_bytes: arrays of one length -> bool.

    mlp_ratio: the largest of the net. S / p is not floored, as in the released code.
    """
    arrays = float64(img, patch, rho, embed_dim, mlp_ratio)
    names = ("img", "patch", "rho", "embed_dim", "mlp_ratio")
    dims(**{name: (a, "n") for name, a in zip(names, arrays, strict=True)})
    if limit_bytes <= 0:
        raise ValueError(f"limit_bytes must be positive, got {limit_bytes}")
    S, p, rho, E, ratio = arrays
    return E * (((S / p) ** 2 + 1) * (1 + ratio) + E * ratio * rho) <= limit_bytes


def token_count(image, patch):
    """Patches of the framed image and the class token."""
    return frame(image, patch)[1] ** 2 + 1


def framed(img, patch, pad):
    """Images [..., S, S, C] with zeros around them, or cut, so that patches tile them; pad: np or jnp."""
    before, n = frame(img.shape[-2], patch)
    after = n * patch - before - img.shape[-2]
    if before or after > 0:
        img = pad(img, [(0, 0)] * (img.ndim - 3) + [(before, max(after, 0))] * 2 + [(0, 0)])
    return img[..., : n * patch, : n * patch, :] if after < 0 else img


def distances(n_tokens, max_distance):
    """Rows of the tables for every pair of tokens, vertical and horizontal: int [N, N] each."""
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    side = max(int(np.sqrt(n_tokens - 1)), 1)
    at = np.arange(n_tokens - 1)
    out = []
    for place in (at // side, at % side):
        d = np.clip(place[None] - place[:, None], -max_distance, max_distance) + max_distance + 1
        out.append(np.pad(d, ((1, 0), (1, 0))).astype(np.int32))
    return out


def _chain(x, f, name, tap):
    """The factors one after another, what lies between them shown to tap."""
    for i, w in enumerate((f.w1, f.w2), 1):
        x = x if w is None else tap(f"{name}{i}", linear(x, np.swapaxes(w, 0, 1)))
    return linear(x, np.swapaxes(f.w3, 0, 1), f.b)


def _network(img, p, heads, patch, pooling, max_distance, eps, tap=lambda name, v: v):
    """Logits; tap(name, value) sees every activation. max_distance 0 leaves out relative positions."""
    E = p.cls_token.shape[0]
    x = patchify(framed(float64(img), patch, np.pad), patch)
    x = tap("patches", linear(x, p.w_patch.transpose(2, 3, 1, 0).reshape(-1, E), p.b_patch))
    first = np.broadcast_to(p.cls_token, (*x.shape[:-2], 1, E))
    tap("positions", p.pos_embed)
    x = tap("tokens", np.concatenate([first, x], axis=-2) + p.pos_embed)
    N = x.shape[-2]
    for i, (b, h) in enumerate(zip(p.blocks, heads, strict=True)):
        see = lambda name, v, i=i: tap(f"{i}.{name}", v)
        y = _chain(see("norm1", layer_norm(x, b.ln1_w, b.ln1_b, eps=eps)), b.qkv, "qkv", see)
        A = y.shape[-1] // 3
        d = A // h
        split = lambda a, h=h, d=d: a.reshape(*a.shape[:-1], h, d).swapaxes(-3, -2)
        q, k, v = (split(see(n, y[..., j * A : (j + 1) * A])) for j, n in enumerate("qkv"))
        logits = see("scores", q @ k.swapaxes(-1, -2) / np.sqrt(d))
        if max_distance:
            r_k, r_v = (
                relative_position_embedding(*t, N, max_distance=max_distance) for t in (b.rel_k, b.rel_v)
            )
            near = (q[..., None, :] @ r_k.swapaxes(-1, -2))[..., 0, :] / np.sqrt(d)
            logits = see("logits", logits + see("near", near))
        weights = softmax(logits)
        out = see("values", weights @ v)
        if max_distance:
            out = see("out", out + see("offsets", (weights[..., None, :] @ r_v)[..., 0, :]))
        out = out.swapaxes(-3, -2).reshape(y[..., :A].shape)
        x = see("x1", x + see("proj3", _chain(out, b.proj, "proj", see)))
        y = _chain(see("norm2", layer_norm(x, b.ln2_w, b.ln2_b, eps=eps)), b.fc1, "fc1.", see)
        y = see("gelu", gelu(see("hidden", y)))
        x = see("x2", x + see("fc2.3", _chain(y, b.fc2, "fc2.", see)))
    x = tap("norm", layer_norm(x, p.norm_w, p.norm_b, eps=eps))
    x = tap("pooled", x[..., 0, :] if pooling == "class_token" else x[..., 1:, :].mean(axis=-2))
    return linear(x, np.swapaxes(p.w_head, 0, 1), p.b_head)


def check_slice(w, out_dim, in_dim):
    """Raise ValueError unless w [out, in] holds out_dim rows and in_dim columns, at least one of each."""
    n = dims(w=(w, "out in"))
    for name, value, most in (("out_dim", out_dim, n["out"]), ("in_dim", in_dim, n["in"])):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be in 1..{most} for w of {list(w.shape)}, got {value}")


def check_tables(table_v, table_h, max_distance):
    """Raise ValueError unless both tables are [2 max_distance + 2, d]."""
    if max_distance < 1:
        raise ValueError(f"max_distance must be at least 1, got {max_distance}")
    rows = 2 * max_distance + 2
    dims(table_v=(table_v, f"{rows} d"), table_h=(table_h, f"{rows} d"))


def check_subnet(params, subnet, rank_ratio, head_dim):
    """Raise ValueError unless the subnet is a slice of the supernet."""
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {rank_ratio}")
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    width, E = params.w_patch.shape[0], subnet.embed_dim
    if not 1 <= E <= width:
        raise ValueError(f"subnet.embed_dim must be in 1..{width}, got {E}")
    if len(subnet.heads) > len(params.blocks):
        raise ValueError(f"subnet has {len(subnet.heads)} layers, but params only {len(params.blocks)}")
    rank = int(width * rank_ratio)
    for i, (p, h, ratio) in enumerate(zip(params.blocks, subnet.heads, subnet.mlp_ratios, strict=False)):
        F = int(E * ratio)
        low = int(min(E, F) * rank_ratio)
        for name, value, most in (
            ("heads * head_dim", h * head_dim, p.qkv.w3.shape[0] // 3),
            ("embed_dim * mlp_ratio", F, p.fc1.w3.shape[0]),
            ("rank of attention", rank, p.qkv.w1.shape[0]),
            ("rank of the MLP", low, p.fc1.w1.shape[0]),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"layer {i} of subnet: {name} must be in 1..{most}, got {value}")


def check_forward(img, params, subnet, patch, rank_ratio, pooling, max_distance, head_dim):
    """Raise ValueError naming the argument at fault."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    n = dims(img=(img, "... S S C"), w_patch=(params.w_patch, f"E C {patch} {patch}"))
    if not 1 <= patch <= n["S"]:
        raise ValueError(f"patch must be in 1..{n['S']}, the side of img, got {patch}")
    dims(w_patch=(params.w_patch, "E C p p"), pos_embed=(params.pos_embed, f"{token_count(n['S'], patch)} E"))
    for b in params.blocks[: len(subnet.heads)]:
        for t in (b.rel_k, b.rel_v):
            check_tables(*t, max_distance)
            dims(table_v=(t.v, f"rows {head_dim}"))
    check_subnet(params, subnet, rank_ratio, head_dim)


def check_memory(img, patch, rank_ratio, schedule, weights, allow_any):
    """Raise ValueError naming the argument at fault."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if weights not in ("xip", "sram"):
        raise ValueError(f'weights must be "xip" or "sram", got {weights!r}')
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {rank_ratio}")
    if patch not in PATCHES and not allow_any:
        raise ValueError(f"patch must be one of {PATCHES} unless allow_any, got {patch}")
    if not 1 <= patch <= img:
        raise ValueError(f"patch must be in 1..{img}, the side of img, got {patch}")


def example(seed=0):
    """A supernet of width 12 on two images of 10 x 10 pixels (padded to 12), and a smaller subnet of it."""
    rng = np.random.default_rng(seed)
    params = init_mcuformer(rng, image_size=10, patch=4, embed_dim=12, depth=1, heads=2, mlp_ratio=2.0,
                            rank_ratio=0.75, num_classes=3, max_distance=2, head_dim=4, std=0.3)  # fmt: skip
    subnet = SubnetConfig(10, (2,), (1.5,))
    options = {"subnet": subnet, "patch": 4, "rank_ratio": 0.75, "max_distance": 2, "head_dim": 4}
    f, t = params.blocks[0].fc1, params.blocks[0].rel_k
    img = rng.random((2, 10, 10, 3))
    return [
        Example("low_rank_linear", (rng.standard_normal((5, 12)), *f[:3], rng.standard_normal(24)), {},
                (0, 1, 2, 3, 4)),
        Example("slice_qkv_rows", (params.blocks[0].qkv.w3,), {"out_dim": 12, "in_dim": 8}, (0,)),
        Example("relative_position_embedding", (t.v, t.h), {"n_tokens": 10, "max_distance": 2}, (0, 1)),
        Example("mcuformer_forward", (img, params), options, (0, 1)),
    ]  # fmt: skip
