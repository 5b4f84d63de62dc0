"""Transformers as graphs of operations, and filled with weights that come by name.

Source: the graphs and shape indices of GHN-2 and GHN-3 (Knyazev et al. 2021, 2023; ppuda, MIT). These graphs
are built from sizes, not traced.
"""

from dataclasses import dataclass

import numpy as np

from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import linear_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import BlockParams
from ref.models import gpt, vit
from ref.models.graphormer import virtual_edges

OPS = ("max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input", "bias",
       "bn", "ln", "pos_enc", "glob_avg")  # fmt: skip


@dataclass(frozen=True)
class TargetConfig:
    """Sizes of a network to be filled; "vit" reads image_size .. num_classes, "gpt" vocab and context."""

    kind: str
    dim: int
    depth: int
    num_heads: int
    image_size: int = 8
    patch: int = 4
    channels: int = 1
    num_classes: int = 10
    vocab: int = 64
    context: int = 32


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as nodes in forward order.

    op int [N]; shapes, None for a node without parameters; edges [N, N] with virtual ones; the names of each
    node's parameters.
    """

    op: np.ndarray
    shapes: tuple
    edges: np.ndarray
    names: tuple


def shape_vocabulary(*, num_classes=10, max_spatial=16, llm=False):
    """(channels, spatial): the sizes that have a row of their own, ascending int arrays.

    The odd sizes below max_spatial, those below 12 in any case, as released.
    """
    channels = {1, 3, num_classes, *range(8, 57, 8), *range(64, 4081, 16), *range(4096, 8193, 32)}
    if llm:
        channels |= {32000, 50257, 128256}
    return np.array(sorted(channels)), np.array(sorted({*range(1, max(12, max_spatial), 2), 14, 16}))


def shape_indices(shapes, *, num_classes=10, max_spatial=16, llm=False):
    """int [n, 4]: rows for c_out, c_in, k_h, k_w of each shape, the nearest size there is (the first of two).

    4 to 7 channels read the row of 8, and 2 pixels that of 3; None reads the last row of each table.
    Raises: ValueError for a shape without 1 to 4 axes.
    """
    channels, spatial = shape_vocabulary(num_classes=num_classes, max_spatial=max_spatial, llm=llm)
    rows = []
    for shape in shapes:
        if shape is None:
            rows.append([len(channels), len(channels), len(spatial), len(spatial)])
            continue
        o, i, h, w = _four(tuple(shape))
        c = [np.abs(channels - (8 if 4 <= n <= 7 else n)).argmin() for n in (o, i)]
        rows.append([*c, *(np.abs(spatial - (3 if n == 2 else n)).argmin() for n in (h, w))])
    return np.array(rows, np.int64).reshape(-1, 4)


def transformer_graph(config: TargetConfig, *, cutoff=50) -> Graph:
    """The graph of a ViT or a GPT-2 (its head untied), nodes in forward order.

    Edges: a chain, the residual ones, and input to positions in GPT-2. Activations have no node, and a norm's
    scale and bias share one. Raises: ValueError for another kind, or sizes that do not fit.
    """
    c, d, nodes, extra = config, config.dim, [("input", None, ())], []
    if min(d, c.num_heads) < 1 or c.depth < 0 or d % c.num_heads:
        raise ValueError(
            f"num_heads must divide dim, depth be 0 or more, got {c.num_heads}, dim={d}, {c.depth}"
        )
    if c.kind == "vit":
        if c.patch < 1 or c.image_size % c.patch:
            raise ValueError(f"patch must divide image_size={c.image_size}, got {c.patch}")
        tokens = 1 + (c.image_size // c.patch) ** 2
        nodes += [("conv", (d, c.channels, c.patch, c.patch), ("w_patch",)), ("bias", (d,), ("b_patch",)),
                  ("pos_enc", (1, tokens, d), ("pos_embed",))]  # fmt: skip
    elif c.kind == "gpt":
        nodes += [
            ("pos_enc", (c.vocab, d), ("wte",)),
            ("pos_enc", (c.context, d), ("wpe",)),
            ("sum", None, ()),
        ]
        extra.append((0, 2))
    else:
        raise ValueError(f'kind must be "vit" or "gpt", got {c.kind!r}')
    for b in range(c.depth):
        first = len(nodes) - 1  # what the block reads
        at = lambda name, b=b: f"blocks.{b}.{name}"
        norm = lambda n, at=at: ("ln", (d,), (at(f"ln{n}_scale"), at(f"ln{n}_bias")))
        layer = lambda name, o, i, at=at: [
            ("conv", (o, i), (at(f"w_{name}"),)),
            ("bias", (o,), (at(f"b_{name}"),)),
        ]
        nodes += [norm(1), *layer("qkv", 3 * d, d), ("msa", None, ()), *layer("o", d, d), ("sum", None, ()),
                  norm(2), *layer("fc1", 4 * d, d), *layer("fc2", d, 4 * d), ("sum", None, ())]  # fmt: skip
        extra += [(first, first + 7), (first + 7, first + 13)]
    nodes.append(("ln", (d,), ("norm_scale", "norm_bias")))
    head = c.num_classes if c.kind == "vit" else c.vocab
    nodes.append(("conv", (head, d), ("w_head",)))
    if c.kind == "vit":
        nodes.append(("bias", (head,), ("b_head",)))
    adj = np.eye(len(nodes), k=1, dtype=np.int64)
    for start, end in extra:
        adj[start, end] = 1
    op, shapes, names = zip(*nodes, strict=True)
    return Graph(np.array([OPS.index(o) for o in op]), shapes, virtual_edges(adj, cutoff=cutoff), names)


def as_vit(weights, config: TargetConfig, cls_token) -> vit.ViTParams:
    """Predicted weights as the house's ViT; the class token [d] is not predicted."""
    return vit.ViTParams(
        weights["w_patch"].transpose(2, 3, 1, 0), weights["b_patch"], cls_token, weights["pos_embed"][0],
        tuple(_block(weights, b) for b in range(config.depth)), weights["norm_scale"], weights["norm_bias"],
        weights["w_head"].T, weights["b_head"],
    )  # fmt: skip


def as_gpt(weights, config: TargetConfig) -> gpt.GPTParams:
    """Predicted weights as the house's GPT-2, all but the untied head weights["w_head"] [V, d]."""
    blocks = tuple(_block(weights, b) for b in range(config.depth))
    return gpt.GPTParams(weights["wte"], weights["wpe"], blocks, weights["norm_scale"], weights["norm_bias"])


def target_loss(weights, config: TargetConfig, batch, cls_token=None):
    """(mean cross-entropy, {name: gradient}) of a filled network on a batch.

    batch: (images [B, H, W, C], labels [B]) for a ViT, ids [B, T + 1] for a GPT-2.
    """
    if config.kind == "vit":
        net = as_vit(weights, config, cls_token)
        loss, d = cross_entropy(vit.vit_forward(batch[0], net, num_heads=config.num_heads), batch[1])
        _, g = vit.vit_forward_vjp(batch[0], net, d, num_heads=config.num_heads)
        grads = {n: getattr(g, n) for n in ("b_patch", "norm_scale", "norm_bias", "b_head")}
        grads |= {
            "w_patch": g.w_patch.transpose(3, 2, 0, 1),
            "pos_embed": g.pos_embed[None],
            "w_head": g.w_head.T,
        }
    else:
        net, ids = as_gpt(weights, config), batch[:, :-1]
        hidden = gpt.gpt_blocks(gpt.gpt_embed(ids, net), net, num_heads=config.num_heads)
        y = layer_norm(hidden[-1], net.lnf_scale, net.lnf_bias)
        loss, d = cross_entropy(y @ weights["w_head"].T, batch[:, 1:])
        dy, dhead, _ = linear_vjp(y, weights["w_head"].T, d, bias=False)
        dx, dscale, dbias = layer_norm_vjp(hidden[-1], net.lnf_scale, dy)
        dx, blocks = gpt.gpt_blocks_vjp(hidden, net, dx, num_heads=config.num_heads)
        g = gpt.GPTParams(*gpt.gpt_embed_vjp(ids, net, dx), blocks, dscale, dbias)
        grads = {"wte": g.wte, "wpe": g.wpe, "norm_scale": dscale, "norm_bias": dbias, "w_head": dhead.T}
    for b, block in enumerate(g.blocks):
        grads |= {f"blocks.{b}.{name}": x for name, x in _unblock(block).items()}
    return loss, grads


def _four(shape):
    """A shape as (c_out, c_in, k_h, k_w); positions [1, n, c] as c channels on a square."""
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"shapes must have 1 to 4 axes, got {list(shape)}")
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        side = int(np.sqrt(shape[1]))
        return 1, shape[2], side, side
    return (*shape, 1, 1, 1)[:4]


def _block(weights, b):
    """The b-th block in the house form: matrices [in, out], q, k and v apart."""
    at = lambda name: weights[f"blocks.{b}.{name}"]
    w, v = at("w_qkv").T, at("b_qkv")
    d = len(w)
    maps = {
        f"{kind}_{x}": m[..., i * d : (i + 1) * d]
        for kind, m in (("w", w), ("b", v))
        for i, x in enumerate("qkv")
    }
    plain = {n: at(n) for n in ("ln1_scale", "ln1_bias", "b_o", "ln2_scale", "ln2_bias", "b_fc1", "b_fc2")}
    return BlockParams(**maps, **plain, **{n: at(n).T for n in ("w_o", "w_fc1", "w_fc2")})


def _unblock(g):
    """Gradients of a BlockParams by predicted name: the transpose of `_block`."""
    same = {
        n: getattr(g, n) for n in ("ln1_scale", "ln1_bias", "b_o", "ln2_scale", "ln2_bias", "b_fc1", "b_fc2")
    }
    turned = {n: getattr(g, n).T for n in ("w_o", "w_fc1", "w_fc2")}
    return {**same, **turned, "w_qkv": np.concatenate([g.w_q, g.w_k, g.w_v], axis=1).T,
            "b_qkv": np.concatenate([g.b_q, g.b_k, g.b_v])}  # fmt: skip
