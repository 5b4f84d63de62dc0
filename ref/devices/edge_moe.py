"""Edge-MoE: a vision transformer with experts by task, arranged so that a small accelerator never waits.

Source: Sarkar et al. 2023 (Edge-MoE, arXiv 2305.18691) and its HLS code; the network is M3ViT (Fan et al.
2022, arXiv 2210.14793). Five pieces: attention with one key a step whatever the parallelism, softmax in one
pass, GELU as ReLU less a small even table, one linear unit for all layers, and tokens queued by expert so
that each expert's weights are loaded once. The gate: ref/blocks/gate.py; in fixed point:
ref/blocks/fixed_ops.py; cycles: ref/blocks/stream.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.fixed import Fixed, fixed_matmul
from ref.blocks.fixed_ops import (
    ATTN_BIAS,
    BIAS,
    FM,
    FM_EPS,
    GELU_END,
    PATCH_WEIGHT,
    PIXEL,
    WEIGHT,
    MoEParams,
    check_lanes,
    gelu_fixed,
    gelu_table,
    layer_norm_fixed,
    linear_fixed,
    moe_fixed,
    reordered_attention_fixed,
)
from ref.blocks.gate import GateOut, build_expert_queues, check_choice, moe_gate, moe_gate_backward
from ref.blocks.mlp import gelu, linear, mlp
from ref.blocks.norms import layer_norm
from ref.blocks.optim import tree_map
from ref.blocks.quantize import known
from ref.blocks.softmax import online_softmax
from ref.blocks.stream import attention_cycles, linear_cycles, moe_cycles
from ref.blocks.transformer import init_block, self_attention
from ref.dims import dims, float64
from ref.example import Example
from ref.models.vit import ViTParams, embed_patches, init_vit, patchify

__all__ = [
    "ATTN_BIAS", "BIAS", "FM", "FM_EPS", "PATCH_WEIGHT", "PIXEL", "WEIGHT", "GateOut", "LoadTrace",
    "M3ViTConfig", "M3ViTParams", "MoEParams", "build_expert_queues", "edge_moe_cycles", "example",
    "gelu_delta", "gelu_fixed", "gelu_table", "init_m3vit", "layer_norm_fixed", "linear_fixed", "load_trace",
    "m3vit_formats", "m3vit_forward", "m3vit_forward_fixed", "m3vit_macs", "m3vit_to_fixed", "moe_ffn",
    "moe_fixed", "moe_gate", "moe_gate_backward", "moe_traffic",
    "online_softmax", "reordered_attention", "reordered_attention_fixed", "unified_linear",
]  # fmt: skip

ORDERS = ("expert", "token")


@dataclass(frozen=True)
class M3ViTConfig:
    """The network of Edge-MoE; every second layer, from the second on, has experts instead of an MLP."""

    height: int = 128
    width: int = 256
    patch: int = 16
    dim: int = 192
    depth: int = 12
    num_heads: int = 3
    hidden: int = 768
    num_experts: int = 16
    top_k: int = 2
    expert_hidden: int = 384
    tasks: int = 2
    eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return 1 + (self.height // self.patch) * (self.width // self.patch)


class M3ViTParams(NamedTuple):
    """vit: patches, positions (the class token's embedding is in the first) and blocks; moe: for each layer
    the gates of all tasks and the experts, or None where the block's own MLP runs.
    """

    vit: ViTParams
    moe: tuple[MoEParams | None, ...]


class LoadTrace(NamedTuple):
    """Keys and queries loaded at every step, int [steps]."""

    keys: np.ndarray
    queries: np.ndarray


def reordered_attention(q, k, v, *, scale, lanes=4):
    """softmax(scale q k^T) v, query n taking its keys from n mod lanes on and around: [H, N, d] -> [H, N, d].

    Query n sits in lane n mod lanes and enters a step after its neighbour, so that one key a step serves all
    lanes; each lane keeps its own maximum and sum. Raises: ValueError unless 1 <= lanes < N.
    """
    n = dims(q=(q, "H N d"), k=(k, "H N d"), v=(v, "H N d"))
    check_lanes(n["N"], lanes)
    q, k, v = float64(q, k, v)
    out = np.zeros_like(q)
    for lane in range(lanes):
        p, _, _ = online_softmax(scale * q[:, lane::lanes] @ k.swapaxes(-1, -2), start=lane)
        out[:, lane::lanes] = p @ v
    return out


def gelu_delta(x, *, step=1 / 32):
    """ReLU(x) - delta(|x|), delta linear between multiples of `step` and 0 from 5.5 on; any shape.

    Raises: ValueError unless 0 < step <= 5.5.
    """
    if not 0 < step <= GELU_END:
        raise ValueError(f"step must be in (0, {GELU_END}], got {step}")
    x = float64(x)
    at = step * np.arange(int(np.floor(GELU_END / step + 1e-9)) + 1)
    size = np.abs(x)
    delta = np.interp(size, at, at - gelu(at))
    return np.maximum(x, 0) - np.where(size >= at[-1], 0.0, delta)


def unified_linear(x, w, b, *, gelu=False, queue=None, scores=None, accumulate_into=None):
    """One unit for every dense layer: x [N, K], w [M, K], b [M] -> x w^T + b [N, M], by four flags.

    gelu: on the result. queue [n] int: a row of the result for each of these tokens, zeros for -1, which no
    token has. scores [n] (or [N]): a factor a row. accumulate_into [N, M]: its copy with the rows added at
    their tokens. Raises: ValueError naming the argument.
    """
    n = dims(x=(x, "N K"), w=(w, "M K"), b=(b, "M"))
    rows = np.arange(n["N"]) if queue is None else np.asarray(queue)
    check_queue(rows, n["N"])
    y = linear(float64(x)[rows], float64(w).T, float64(b))
    if gelu:
        y = _gelu(y)
    if scores is not None:
        dims(queue=(rows, "n"), scores=(scores, "n"))
        y = y * float64(scores)[:, None]
    y = np.where(rows[:, None] < 0, 0.0, y)
    if accumulate_into is None:
        return y
    dims(x=(x, "N K"), w=(w, "M K"), accumulate_into=(accumulate_into, "N M"))
    total = float64(accumulate_into).copy()
    np.add.at(total, rows[rows >= 0], y[rows >= 0])
    return total


def moe_ffn(x, indices, scores, w1, b1, w2, b2, *, order="expert"):
    """sum over the experts e of a token of score (w2_e gelu(w1_e x + b1_e) + b2_e): [N, D].

    Args: x [N, D]; indices [N, k] int, scores [N, k]; w1 [E, F, D], b1 [E, F], w2 [E, D, F], b2 [E, D].
      order: "expert" runs each expert once over its queue; "token" runs each token through its experts.
    Raises: ValueError naming the argument.
    """
    n = dims(x=(x, "N D"), indices=(indices, "N k"), scores=(scores, "N k"), w1=(w1, "E F D"),
             b1=(b1, "E F"), w2=(w2, "E D F"), b2=(b2, "E D"))  # fmt: skip
    check_order(order)
    x, scores, w1, b1, w2, b2 = float64(x, scores, w1, b1, w2, b2)
    check_choice(np.asarray(indices), n["E"])
    y = np.zeros_like(x)
    if order == "token":
        for i, (chosen, weight) in enumerate(zip(np.asarray(indices), scores, strict=True)):
            for e, s in zip(chosen, weight, strict=True):
                y[i] += s * mlp(x[i], w1[e].T, b1[e], w2[e].T, b2[e])
        return y
    queue, held, lengths, active = build_expert_queues(indices, scores, num_experts=n["E"])
    for e in active:
        tokens, factor = queue[e, : lengths[e]], held[e, : lengths[e]]
        hidden = np.zeros((n["N"], n["F"]))  # stored at the token's own place
        hidden[tokens] = unified_linear(x, w1[e], b1[e], gelu=True, queue=tokens)
        y = unified_linear(hidden, w2[e], b2[e], queue=tokens, scores=factor, accumulate_into=y)
    return y


def m3vit_forward(img, params: M3ViTParams, *, task, cfg: M3ViTConfig):
    """Tokens [N, dim] of an image [H, W, 3] for a task, which is a choice of gates and of nothing else.

    x += attention(norm(x)), then x += MLP or experts of norm(x), layer by layer; no norm at the end.
    Raises: ValueError naming the argument.
    """
    check_image(img, task, cfg)
    x = embed_patches(float64(img), params.vit)
    for p, experts in zip(params.vit.blocks, params.moe, strict=True):
        h = layer_norm(x, p.ln1_scale, p.ln1_bias, eps=cfg.eps)
        x = x + self_attention(h, p, num_heads=cfg.num_heads)
        h = layer_norm(x, p.ln2_scale, p.ln2_bias, eps=cfg.eps)
        if experts is None:
            x = x + mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
        else:
            g = moe_gate(h, experts.w_gate[task], top_k=cfg.top_k)
            x = x + moe_ffn(h, g.indices, g.scores, *experts[1:])
    return x


def m3vit_forward_fixed(img, params: M3ViTParams, *, task, cfg: M3ViTConfig, lanes=4):
    """(tokens [N, dim], lengths [layers with experts, E]) as the hardware computes them, in integers.

    Args: img [H, W, 3] uint8, in steps of 2^-8; params: integers of the formats of `m3vit_formats`.
    Returns: tokens in steps of 2^-22; how many tokens each expert had.
    Raises: ValueError naming the argument.
    """
    check_image(img, task, cfg)
    if np.asarray(img).dtype != np.uint8:
        raise ValueError(f"img must be uint8, got {np.asarray(img).dtype}")
    if cfg.dim % 16:
        raise ValueError(f"cfg.dim must be a multiple of 16, the linear unit's blocks, got {cfg.dim}")
    vit, lengths = params.vit, []
    first = 0 if vit.cls_token is None else vit.cls_token
    w_patch = vit.w_patch.reshape(-1, cfg.dim).T
    x = fixed_matmul(patchify(img, cfg.patch), w_patch, fx=PIXEL, fw=PATCH_WEIGHT, facc=FM,
                     bias_raw=vit.b_patch << 11)  # fmt: skip
    x = FM.fit(np.concatenate([np.zeros((1, cfg.dim), np.int64) + first, x]) + vit.pos_embed)
    for p, experts in zip(vit.blocks, params.moe, strict=True):
        h = layer_norm_fixed(x, p.ln1_scale, p.ln1_bias, eps=cfg.eps)
        maps = ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v))
        q, k, v = (split_heads(linear_fixed(h, w.T, b << 2), cfg.num_heads) for w, b in maps)  # 2^-9 to 2^-11
        heads, _, _ = reordered_attention_fixed(q, k, v, scale=q.shape[-1] ** -0.5, lanes=lanes)
        x = FM.fit(x + linear_fixed(join_heads(heads), p.w_o.T, p.b_o << 2))
        h = layer_norm_fixed(x, p.ln2_scale, p.ln2_bias, eps=cfg.eps)
        if experts is None:
            y = linear_fixed(gelu_fixed(linear_fixed(h, p.w_fc1.T, p.b_fc1)), p.w_fc2.T, p.b_fc2)
        else:
            y, _, _, each = moe_fixed(h, experts._replace(w_gate=experts.w_gate[task]), top_k=cfg.top_k)
            lengths.append(each)
        x = FM.fit(x + y)
    return x, np.reshape(lengths, (len(lengths), cfg.num_experts))


def m3vit_formats(params: M3ViTParams) -> M3ViTParams:
    """The format that stores each array: weights <16, 2>, of patches <16, 0>; biases and norms <16, 5>,
    attention's biases <16, 7>; embeddings as feature maps, <32, 10>.
    """
    special = {"w_patch": PATCH_WEIGHT, "cls_token": FM, "pos_embed": FM}
    special |= dict.fromkeys(("b_q", "b_k", "b_v", "b_o"), ATTN_BIAS)

    def of(tree, name):
        if tree is None:
            return None
        if hasattr(tree, "_fields"):
            return type(tree)(*(of(getattr(tree, n), n) for n in tree._fields))
        if isinstance(tree, tuple):
            return tuple(of(t, name) for t in tree)
        return special.get(name, WEIGHT if name.startswith("w") else BIAS)

    return of(params, None)


def m3vit_to_fixed(params: M3ViTParams) -> M3ViTParams:
    """The integers that store real parameters, floored. Raises: OverflowError for one out of range."""
    strict = lambda f: Fixed(**{**vars(f), "overflow": "CHECK"})
    return tree_map(lambda f, a: strict(f).quantise(a), m3vit_formats(params), params)


def init_m3vit(rng, cfg: M3ViTConfig, *, std=0.02) -> M3ViTParams:
    """Parameters drawn by a NumPy Generator: normal weights, zero biases, unit norms."""
    w = lambda *shape: std * rng.standard_normal(shape)
    E, F, D = cfg.num_experts, cfg.expert_hidden, cfg.dim
    vit = init_vit(rng, image_size=cfg.patch, patch=cfg.patch, dim=D, depth=0, class_token=True, std=std)
    blocks = tuple(init_block(rng, D, cfg.hidden, std=std) for _ in range(cfg.depth))
    vit = vit._replace(cls_token=np.zeros(D), pos_embed=w(cfg.tokens, D), blocks=blocks)
    experts = lambda: MoEParams(
        w(cfg.tasks, E, D), w(E, F, D), np.zeros((E, F)), w(E, D, F), np.zeros((E, D))
    )
    return M3ViTParams(vit, tuple(experts() if i % 2 else None for i in range(cfg.depth)))


def load_trace(n, lanes, *, order="reordered") -> LoadTrace:
    """Keys and queries that attention over n tokens loads at every step.

    "reordered": lane j takes its query at step j of a block, and the last lanes finish in a few steps more;
    "naive": all queries of a block at its first step. Raises: ValueError unless 1 <= lanes < n.
    """
    check_lanes(n, lanes)
    if order not in ("reordered", "naive"):
        raise ValueError(f'order must be "reordered" or "naive", got {order!r}')
    blocks, late = divmod(n + lanes - 1, lanes)
    steps = n * blocks + (late if order == "reordered" else 0)
    step = np.arange(steps) % n
    query = np.arange(steps) // n * lanes + step
    if order == "reordered":
        queries = (step < lanes) & (query < n)
    else:
        queries = np.where(step == 0, np.minimum(lanes, n - query), 0)
    return LoadTrace(np.ones(steps, int), queries.astype(int))


def moe_traffic(indices, cfg: M3ViTConfig, *, order) -> int:
    """Bytes of expert weights (16 bits each) that one layer loads for the choices [N, k].

    "expert": every expert that has a token, once. "token": whenever the next choice is another expert.
    """
    check_order(order)
    dims(indices=(indices, "N k"))
    check_choice(np.asarray(indices), cfg.num_experts)
    chosen = np.asarray(indices).ravel()
    loads = len(np.unique(chosen)) if order == "expert" else int((np.diff(chosen, prepend=-1) != 0).sum())
    return loads * 2 * cfg.dim * cfg.expert_hidden * 2


def edge_moe_cycles(cfg: M3ViTConfig, lengths) -> dict[str, int]:
    """Cycles of the patch embedding and of every layer: projections, attention, and MLP or experts.

    lengths [E]: tokens of each expert, the same in every layer with experts. Norms, gate and softmax run
    beside these loops and are left out.
    """
    n, d = cfg.tokens, cfg.dim
    if len(lengths) != cfg.num_experts or sum(lengths) != n * cfg.top_k:
        raise ValueError(
            f"lengths must be {cfg.num_experts} numbers of tokens that add up to {n * cfg.top_k}"
        )
    attention = 4 * linear_cycles(n, d, d).overlapped + 2 * attention_cycles(n, d)
    dense = linear_cycles(n, d, cfg.hidden).overlapped + linear_cycles(n, cfg.hidden, d).overlapped
    experts = moe_cycles(lengths, d, cfg.expert_hidden)
    layers = {f"layer {i}": attention + (experts if i % 2 else dense) for i in range(cfg.depth)}
    return {"patches": linear_cycles(n - 1, 3 * cfg.patch**2, d).overlapped} | layers


def m3vit_macs(cfg: M3ViTConfig, *, experts=None) -> dict[str, int]:
    """Multiply-accumulates of one image by part; experts: how many a token runs (None: top_k)."""
    n, d, half = cfg.tokens, cfg.dim, cfg.depth // 2
    run = cfg.top_k if experts is None else experts
    return {
        "patches": (n - 1) * 3 * cfg.patch**2 * d,
        "projections": cfg.depth * 4 * n * d * d,
        "attention": cfg.depth * 2 * n * n * d,
        "mlp": (cfg.depth - half) * 2 * n * d * cfg.hidden,
        "experts": half * 2 * n * d * cfg.expert_hidden * run,
        "gates": half * n * d * cfg.num_experts,
    }


def check_image(img, task, cfg):
    """Raise ValueError unless img is [height, width, 3] and the task one of the configuration's."""
    if not 0 <= task < cfg.tasks:
        raise ValueError(f"task must be in 0..{cfg.tasks - 1}, got {task}")
    dims(img=(img, f"{cfg.height} {cfg.width} 3"))


def check_queue(rows, n):
    """Raise ValueError unless rows are integers [n], and, where their values are known, in -1..n - 1."""
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"queue must be integers [n], got {rows.dtype} {list(rows.shape)}")
    if known(rows) and rows.size and not -1 <= rows.min() <= rows.max() < n:
        raise ValueError(f"queue must be in -1..{n - 1}, got {rows.min()} to {rows.max()}")


def check_order(order):
    """Raise ValueError unless order is "expert" or "token"."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


_gelu = gelu  # `unified_linear` has a flag of that name


def example(seed=0):
    """Calls of the core functions: 17 tokens of width 16, 6 experts, two a token; a small network."""
    rng = np.random.default_rng(seed)
    N, D, F, E = 17, 16, 24, 6
    x, w_gate = rng.standard_normal((N, D)), rng.standard_normal((E, D)) / 2
    w1, w2 = rng.standard_normal((E, F, D)) / 4, rng.standard_normal((E, D, F)) / 5
    b1, b2 = rng.standard_normal((E, F)) / 9, rng.standard_normal((E, D)) / 9
    q, k, v = rng.standard_normal((3, 2, N, 8))
    gate = moe_gate(x, w_gate)
    training = {"train": True, "noise": np.random.default_rng(7).standard_normal((N, E))}
    cfg = M3ViTConfig(height=8, width=12, patch=4, dim=16, depth=2, num_heads=2, hidden=32, num_experts=4,
                      expert_hidden=16)  # fmt: skip
    network = init_m3vit(rng, cfg, std=0.3)
    dscores = rng.standard_normal((N, 2))
    return [
        Example("moe_gate", (x, w_gate)),
        Example("moe_gate_backward", (dscores, 0.5, x, w_gate), training),
        Example("moe_ffn", (x, gate.indices, gate.scores, w1, b1, w2, b2), {}, (0, 2, 3, 4, 5, 6)),
        Example("reordered_attention", (q, k, v), {"scale": 0.35}, (0, 1, 2)),
        Example("gelu_delta", (3 * x,)),
        Example("unified_linear", (x, w1[0], b1[0]), {"gelu": True}, (0, 1, 2)),
        Example("m3vit_forward", (rng.random((8, 12, 3)), network), {"task": 1, "cfg": cfg}),
    ]
