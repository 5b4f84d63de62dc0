"""LoGAH: a network that reads another network's graph and writes all of its weights, as low-rank products.

Source: Zhou et al. 2024 (arXiv 2405.16287) and the code released with it; graphs, shapes, tiling and
normalisation are those of GHN-2 and GHN-3 (Knyazev et al. 2021, 2023), which it builds on. The graphs here
are built from sizes, not traced, and only transformers are. The decoder holds one more r x r layer that its
forward pass never uses: it is counted and left out.
"""

import numpy as np

from ref.blocks.fitting import (
    group_size,
    normalize_params,
    normalize_params_backward,
    tile_params,
    tile_params_backward,
)
from ref.blocks.mlp import linear, linear_vjp, relu
from ref.blocks.optim import adam, adam_init, clip_by_norm, cosine_decay, tree_map
from ref.dims import dims, float64
from ref.example import Example
from ref.models.ghn import (
    VARIANTS,
    GHNConfig,
    GHNParams,
    LowRankParams,
    ShapeParams,
    VectorParams,
    count_parameters,
    full_decoder_count,
    init_ghn,
)
from ref.models.graphormer import (
    GraphormerParams,
    edge_bias,
    edge_bias_backward,
    graphormer,
    graphormer_backward,
    virtual_edges,
)
from ref.models.networks import (
    OPS,
    Graph,
    TargetConfig,
    as_gpt,
    as_vit,
    shape_indices,
    shape_vocabulary,
    target_loss,
    transformer_graph,
)

__all__ = [
    "VARIANTS", "GHNConfig", "GHNParams", "Graph", "GraphormerParams", "LowRankParams", "ShapeParams",
    "TargetConfig", "VectorParams", "as_gpt", "as_vit", "count_parameters", "edge_bias",
    "edge_bias_backward", "example", "full_decoder_count", "graphormer", "graphormer_backward",
    "group_size", "init_ghn", "low_rank_decode", "low_rank_decode_backward", "normalize_params",
    "normalize_params_backward", "predict_parameters", "predict_parameters_backward", "shape_features",
    "shape_features_backward", "shape_indices", "shape_vocabulary", "target_loss", "tile_params",
    "tile_params_backward", "train_ghn", "transformer_graph", "virtual_edges",
]  # fmt: skip


def shape_features(x, index, params: ShapeParams):
    """x [N, d] + [channel[c_out], channel[c_in], spatial[k_h], spatial[k_w]], each d/4 wide; index [N, 4]."""
    n = dims(
        x=(x, "N d"), index=(index, "N 4"), channel=(params.channel, "n q"), spatial=(params.spatial, "m q")
    )
    if n["d"] != 4 * n["q"]:
        raise ValueError(f"x has width d={n['d']}, but params has tables of d/4={n['q']}")
    c, s = params
    return float64(x) + np.concatenate(
        [c[index[:, 0]], c[index[:, 1]], s[index[:, 2]], s[index[:, 3]]], axis=1
    )


def shape_features_backward(x, index, params: ShapeParams, dy):
    """(dx, ShapeParams of gradients) of `shape_features` for dy [N, d]."""
    grads = ShapeParams(*(np.zeros_like(float64(t)) for t in params))
    for part, table, i in zip(np.split(float64(dy), 4, axis=1), (0, 0, 1, 1), range(4), strict=True):
        np.add.at(grads[table], index[:, i], part)
    return float64(dy), grads


def low_rank_decode(z, params: LowRankParams, *, shape, rank):
    """W = A B, of rank at most r: node vectors z [b, d] -> [b, *shape].

    The network's [2r, K] is read again, row by row in memory, as [2K, r]: A its first K rows, B^T the others.
    shape (c,), (c_out, c_in) or (c_out, c_in, k_h, k_w): row (o, i) of A meets column (c, j) of B.
    Raises: ValueError if rank is not that of params, or c_out k_h or c_in k_w exceeds K.
    """
    A, B, sizes = _factors(z, params, shape, rank)[-3:]
    o, i, h, w = sizes
    W = (A @ B.swapaxes(1, 2)).reshape(-1, o, h, i, w).swapaxes(2, 3)
    return W.reshape(-1, *shape)


def low_rank_decode_backward(z, params: LowRankParams, dw, *, shape, rank):
    """(dz, LowRankParams of gradients) of `low_rank_decode` for dw [b, *shape]."""
    p, (h1, h2, u, v, A, B, (o, i, h, w)) = params, _factors(z, params, shape, rank)
    d = float64(dw).reshape(-1, o, i, h, w).swapaxes(2, 3).reshape(-1, o * h, i * w)
    dv = np.zeros((len(A), 2 * p.w_k.shape[1], rank))
    dv[:, : o * h] = d @ B
    dv[:, p.w_k.shape[1] : p.w_k.shape[1] + i * w] = d.swapaxes(1, 2) @ A
    dr, dw_k, db_k = linear_vjp(relu(u), p.w_k, dv.reshape(v.shape))
    du = (dr * (u > 0)).reshape(len(A), -1)
    d, dw3, db3 = linear_vjp(h2, p.w3, du)
    d, dw2, db2 = linear_vjp(h1, p.w2, d * (h2 > 0))
    dz, dw1, db1 = linear_vjp(float64(z), p.w1, d * (h1 > 0))
    return dz, LowRankParams(dw1, db1, dw2, db2, dw3, db3, dw_k, db_k)


def predict_parameters(graph: Graph, params: GHNParams, config: GHNConfig):
    """{name: array} for every parameter of the graph, in the layout [out, in] of its shapes.

    Tensors larger than the decoder's K rows are tiled, as is a bias of more classes than the hypernetwork's.
    Embeddings and positions are not scaled (norm "std" scales all).
    Raises: ValueError for an unknown operation, and as the functions it calls.
    """
    z = _encode(graph, params, config)[-1]
    depth, found = int(np.sum(graph.op == OPS.index("msa"))), {}
    for node, name, row, shape in _slots(graph):
        raw = _raw(z[node], params, config, name, row, shape)
        found[name] = _scale(graph.op[node], name, row, shape, config, depth, normalize_params, raw)
    return found


def predict_parameters_backward(graph: Graph, params: GHNParams, config: GHNConfig, dparams):
    """GHNParams of gradients of `predict_parameters` for {name: cotangent}; a missing name counts as 0."""
    x, index, features, z = _encode(graph, params, config)
    depth, dz = int(np.sum(graph.op == OPS.index("msa"))), np.zeros_like(z)
    decoder, vectors = (
        tree_map(lambda t: np.zeros_like(float64(t)), t) for t in (params.decoder, params.vectors)
    )
    for node, name, row, shape in _slots(graph):
        if name not in dparams:
            continue
        raw = _raw(z[node], params, config, name, row, shape)
        back = lambda w, d=dparams[name], **o: normalize_params_backward(w, d, **o)
        draw = _scale(graph.op[node], name, row, shape, config, depth, back, raw, dparams[name])
        dz[node] += _raw_backward(z[node], params, config, name, row, shape, draw, decoder, vectors)
    mask = np.ones((1, len(z)), bool)
    dx, encoder = graphormer_backward(features[None], graph.edges[None], mask, params.encoder, dz[None],
                                      num_heads=config.heads)  # fmt: skip
    dx, tables = shape_features_backward(x, index, params.shape, dx[0])
    op = np.zeros_like(float64(params.op))
    np.add.at(op, graph.op, dx)
    return GHNParams(op, tables, encoder, decoder, vectors)


def train_ghn(params: GHNParams, pool, data, *, steps, seed, config: GHNConfig, meta_batch=4, batch=32,
              lr=3e-4, warmup=0, weight_decay=1e-2, clip=5.0, penalty=3e-5):  # fmt: skip
    """(params, history [steps]): AdamW on the mean loss of meta_batch filled networks of the pool a step.

    pool: TargetConfigs. data: (images, labels) for ViTs, or ids [n, T + 1] for GPTs. The rate rises over
    `warmup` steps and falls as half a cosine; gradients are clipped at norm `clip`; penalty times the sum of
    every tensor's Frobenius norm is added to each loss (history holds the loss alone).
    """
    if steps < 1 or meta_batch < 1 or batch < 1 or not pool:
        raise ValueError(
            f"need steps, meta_batch and batch >= 1 and a pool, got {steps=}, {meta_batch=}, {batch=}"
        )
    rows = len(data[1]) if isinstance(data, tuple) else len(data)
    if rows < 1:
        raise ValueError("data must hold at least one example")
    rng, state, history = np.random.default_rng(seed), adam_init(params), []
    graphs = [transformer_graph(c) for c in pool]
    for step in range(steps):
        pick, at = rng.integers(0, len(pool), meta_batch), rng.integers(0, rows, batch)
        part = tuple(x[at] for x in data) if isinstance(data, tuple) else data[at]
        losses, total = [], tree_map(lambda x: np.zeros_like(float64(x)), params)
        for n in pick:
            weights = predict_parameters(graphs[n], params, config)
            loss, grads = target_loss(weights, pool[n], part, 0.02 * rng.standard_normal(pool[n].dim))
            for name, w in weights.items():
                grads[name] = grads[name] + penalty * w / max(np.linalg.norm(w), 1e-12)
            g = predict_parameters_backward(graphs[n], params, config, grads)
            total = tree_map(lambda a, b: a + b / meta_batch, total, g)
            losses.append(loss)
        early = step < warmup
        share = (step + 1) / (warmup + 1) if early else cosine_decay(step - warmup, steps=steps - warmup)
        params, state = adam(
            params, clip_by_norm(total, clip), state, lr=lr * share, weight_decay=weight_decay
        )
        history.append(np.mean(losses))
    return params, np.array(history)


def _factors(z, p, shape, rank):
    """h1, h2, u [b, 2r, r], v [b, 2r, K], A [b, c_out k_h, r], B^T [b, c_in k_w, r], 4-D shape."""
    n = dims(z=(z, "b d"), w1=(p.w1, "d h"), w_k=(p.w_k, "r K"))
    if rank != n["r"] or p.w3.shape[1] != 2 * rank**2:
        raise ValueError(f"rank must be that of params, {n['r']}, got {rank}")
    if len(shape) not in (1, 2, 4) or min(shape) < 1:
        raise ValueError(f"shape must be (c,), (c_out, c_in) or (c_out, c_in, k_h, k_w), got {tuple(shape)}")
    o, i, h, w = sizes = (*shape, 1, 1, 1)[:4]
    if max(o * h, i * w) > n["K"]:
        raise ValueError(
            f"shape {tuple(shape)} needs {max(o * h, i * w)} rows of a factor, more than K={n['K']}"
        )
    h1 = relu(linear(z, p.w1, p.b1))
    h2 = relu(linear(h1, p.w2, p.b2))
    u = linear(h2, p.w3, p.b3).reshape(-1, 2 * rank, rank)
    v = linear(relu(u), p.w_k, p.b_k)
    rows = v.reshape(-1, 2 * n["K"], rank)  # a view of the same memory, not a transpose
    return h1, h2, u, v, rows[:, : o * h], rows[:, n["K"] : n["K"] + i * w], sizes


def _slots(graph):
    """(node, name, row, shape) of every tensor; row None: a matrix, 0: a norm's scale, 1: a bias."""
    for node, (names, shape) in enumerate(zip(graph.names, graph.shapes, strict=True)):
        for i, name in enumerate(names):
            yield node, name, (i if len(names) == 2 else 1) if len(shape) == 1 else None, shape


def _encode(graph, params, config):
    """(x, index, features, z): operations, rows of shapes, both added, what the encoder makes of them."""
    if graph.op.size and not (0 <= graph.op.min() and graph.op.max() < len(params.op)):
        raise ValueError(f"graph.op must be operations 0..{len(params.op) - 1}")
    options = {"num_classes": config.num_classes, "max_spatial": config.max_spatial, "llm": config.llm}
    index, x = shape_indices(graph.shapes, **options), float64(params.op)[graph.op]
    features, mask = shape_features(x, index, params.shape), np.ones((1, len(x)), bool)
    z = graphormer(features[None], graph.edges[None], mask, params.encoder, num_heads=config.heads)[0]
    return x, index, features, z


def _decoded(shape, K):
    """The shape that is decoded for a tensor: positions as a matrix, nothing beyond K; a vector twice."""
    if len(shape) == 1:
        return (2 * min(shape[0], K // 2),)
    o, i, *k = shape[1:] if len(shape) == 3 else shape
    h, w = k or (1, 1)
    return (min(o, K // h), min(i, K // w), *k)


def _raw(z, params, config, name, row, shape):
    """One node's tensor [*shape] before normalisation."""
    if row is None or params.vectors is None:
        small = _decoded(shape, config.K)
        w = low_rank_decode(z[None], params.decoder, shape=small, rank=config.rank)[0]
        w = w if row is None else w.reshape(2, -1)[row]
        return tile_params(w, shape=shape[-2:] if len(shape) == 3 else shape).reshape(shape)
    p, (_, halves) = params.vectors, _vector(z, params.vectors)
    if name == "b_head":
        return tile_params(linear(relu(halves[1]), p.w_class, p.b_class), shape=shape)
    return tile_params(halves[row], shape=shape)


def _raw_backward(z, params, config, name, row, shape, draw, decoder, vectors):
    """dz [d] of `_raw`; the decoders' gradients are added to the trees handed in."""
    if row is None or params.vectors is None:
        small, target = _decoded(shape, config.K), shape[-2:] if len(shape) == 3 else shape
        half = small if row is None else (small[0] // 2,)
        d = tile_params_backward(np.empty(half), draw.reshape(target), shape=target)
        if row is not None:
            d = np.stack([d if i == row else 0 * d for i in range(2)]).reshape(small)
        dz, grads = low_rank_decode_backward(z[None], params.decoder, d[None], shape=small, rank=config.rank)
        for total, g in zip(decoder, grads, strict=True):
            total += g
        return dz[0]
    p, (hidden, halves), d = params.vectors, _vector(z, params.vectors), np.zeros((2, len(z) // 2))
    if name == "b_head":
        dclass = tile_params_backward(p.b_class, draw, shape=shape)
        dhalf, dw, db = linear_vjp(relu(halves[1:]), p.w_class, dclass[None])
        d[1] = dhalf[0] * (halves[1] > 0)
        vectors.w_class[...] += dw
        vectors.b_class[...] += db
    else:
        d[row] = tile_params_backward(halves[row], draw, shape=shape)
    dh, dw2, db2 = linear_vjp(hidden, p.w2, d.reshape(1, -1))
    dz, dw1, db1 = linear_vjp(z[None], p.w1, dh * (hidden > 0))
    for total, g in zip(vectors, (dw1, db1, dw2, db2), strict=False):
        total += g
    return dz[0]


def _vector(z, p):
    hidden = relu(linear(z[None], p.w1, p.b1))
    return hidden, linear(hidden, p.w2, p.b2).reshape(2, -1)


def _scale(op, name, row, shape, config, depth, apply, raw, unscaled=None):
    """Normalise a raw tensor, or with a backward `apply` its cotangent; `unscaled`: what stays as it is."""
    if op == OPS.index("pos_enc") and config.norm != "std":
        return raw if unscaled is None else unscaled
    residual = depth if name.endswith(("w_o", "w_fc2")) else None
    return apply(raw, kind="weight" if row in (None, 0) else "bias", norm=config.norm, layers=residual)


def example(seed=0):
    """A tiny hypernetwork reads the graph of a ViT for 8 x 8 digits and writes it; its parts one by one."""
    rng = np.random.default_rng(seed)
    config = GHNConfig(rank=3, dim=8, layers=2, heads=2, num_classes=10, K=64)
    params, target = init_ghn(rng, config), TargetConfig("vit", 8, 1, 2)
    graph = transformer_graph(target)
    x, index, features, z = _encode(graph, params, config)
    edges, mask = graph.edges[None], np.ones((1, len(z)), bool)
    return [
        Example("shape_features", (x, index, params.shape), {}, (0, 2)),
        Example("edge_bias", (edges, params.encoder), {}, (1,)),
        Example("graphormer", (features[None], edges, mask, params.encoder), {"num_heads": 2}, (0, 3)),
        Example("low_rank_decode", (z[:2], params.decoder), {"shape": (6, 5, 2, 2), "rank": 3}, (0, 1)),
        Example("tile_params", (rng.standard_normal((4, 5, 3, 3)),), {"shape": (6, 7, 2, 2)}, (0,)),
        Example("normalize_params", (rng.standard_normal((6, 5)),), {}, (0,)),
        Example("predict_parameters", (graph, params, config), {}, (1,)),
    ]
