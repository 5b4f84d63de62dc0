"""Graphormer: a transformer over the nodes of a graph, with the distances between them as attention biases.

Source: Ying et al. 2021 (arXiv 2106.05234), in the form of GHN-3 (Knyazev et al. 2023) and LoGAH's released
code: one bias for all layers, from the distance there and back.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.mlp import linear, linear_vjp, mlp_vjp, relu
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.transformer import BlockParams, qkv, qkv_vjp, transformer_block
from ref.checks import check_num_heads
from ref.dims import dims, float64

MASKED = -(2.0**15)  # not -inf: a node that is padding attends to all alike
MAX_DISTANCE = 254


class GraphormerParams(NamedTuple):
    """Tables [rows, d], maps, blocks; an index beyond a table reads its last row.

    Tables of degrees, of the distance from node 0 and of edges (row = distance + 2); the map from a pair of
    edge rows to a bias a head, w_edge1 [2d, d], w_edge2 [d, H]; blocks without biases of q, k and v; a final
    norm or None.
    """

    in_degree: np.ndarray | None = None
    out_degree: np.ndarray | None = None
    input_distance: np.ndarray | None = None
    edge_table: np.ndarray | None = None
    w_edge1: np.ndarray | None = None
    b_edge1: np.ndarray | None = None
    w_edge2: np.ndarray | None = None
    b_edge2: np.ndarray | None = None
    blocks: tuple[BlockParams, ...] = ()
    ln_scale: np.ndarray | None = None
    ln_bias: np.ndarray | None = None


def virtual_edges(adj, *, cutoff=50):
    """Lengths of shortest paths up to cutoff, int [N, N]: 1 for an edge, 0 where no path is that short.

    adj [N, N]: 1 for an edge from row to column. Raises: ValueError for a cycle, or a cutoff outside 1..254.
    """
    n = dims(adj=(adj, "N N"))["N"]
    if not 1 <= cutoff <= MAX_DISTANCE:
        raise ValueError(f"cutoff must be in 1..{MAX_DISTANCE}, got {cutoff}")
    edges = np.asarray(adj) == 1
    left = np.ones(n, bool)
    while (first := left & ~edges[left].any(axis=0)).any():  # without the nodes that nothing left leads to
        left &= ~first
    if left.any():
        raise ValueError("adj has a cycle: a graph of operations must not return to a node")
    found, front = edges.astype(np.int64), edges
    for length in range(2, cutoff + 1):
        front = (front.astype(float) @ edges > 0) & (found == 0)
        found[front] = length
    return found


def edge_bias(edges, params: GraphormerParams):
    """relu([t(E), t(E^T)] W1 + b1) W2 + b2: distances [B, N, N] int -> biases [B, H, N, N].

    Raises: ValueError for a distance outside 0..254.
    """
    *_, h = _edge_hidden(edges, params)
    return np.moveaxis(linear(h, params.w_edge2, params.b_edge2), -1, 1)


def edge_bias_backward(edges, params: GraphormerParams, dbias):
    """GraphormerParams of gradients of `edge_bias` for dbias [B, H, N, N]; None for what it does not read."""
    rows, e, h = _edge_hidden(edges, params)
    dh, dw2, db2 = linear_vjp(h, params.w_edge2, np.moveaxis(float64(dbias), 1, -1))
    de, dw1, db1 = linear_vjp(e, params.w_edge1, dh * (h > 0))
    dtable = np.zeros_like(float64(params.edge_table))
    np.add.at(dtable, rows, de.reshape(*rows.shape, dtable.shape[1]))
    return GraphormerParams(edge_table=dtable, w_edge1=dw1, b_edge1=db1, w_edge2=dw2, b_edge2=db2)


def graphormer(x, edges, node_mask, params: GraphormerParams, *, num_heads, eps=1e-5):
    """Nodes [B, N, d] that have read the graph: degrees and distance from node 0 added, then pre-norm blocks.

    edges int [B, N, N] from `virtual_edges`; node_mask bool [B, N], True = node. A pair with padding has the
    logit -2^15 in place of its own.
    Raises: ValueError if num_heads does not divide d, and as `edge_bias`.
    """
    hidden, *_ = _forward(x, edges, node_mask, params, num_heads, eps)
    y = hidden[-1]
    return y if params.ln_scale is None else layer_norm(y, params.ln_scale, params.ln_bias, eps=eps)


def graphormer_backward(x, edges, node_mask, params: GraphormerParams, dy, *, num_heads, eps=1e-5):
    """(dx, GraphormerParams of gradients) of `graphormer` for dy [B, N, d]."""
    hidden, bias, pairs = _forward(x, edges, node_mask, params, num_heads, eps)
    dx, norm = float64(dy), {}
    if params.ln_scale is not None:
        dx, dscale, dshift = layer_norm_vjp(hidden[-1], params.ln_scale, dx, eps=eps)
        norm = {"ln_scale": dscale, "ln_bias": dshift}
    dbias, blocks = np.zeros_like(bias), []
    for h, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dx, dlogits, grads = _block_vjp(h, p, bias, pairs, dx, num_heads, eps)
        dbias += dlogits
        blocks.append(grads)
    dx = dx * np.asarray(node_mask)[..., None]
    tables = {
        name: _table_grad(getattr(params, name), at, dx) for name, at in _positions(edges, params).items()
    }
    grads = edge_bias_backward(edges, params, dbias)
    return dx, grads._replace(**tables, **norm, blocks=tuple(blocks[::-1]))


def _edge_hidden(edges, params):
    dims(edges=(edges, "B N N"))
    edges, table = np.asarray(edges), float64(params.edge_table)
    if edges.size and (edges.min() < 0 or edges.max() > MAX_DISTANCE):
        raise ValueError(f"edges must be distances in 0..{MAX_DISTANCE}, got {edges.min()}..{edges.max()}")
    rows = np.minimum(np.stack([edges, edges.swapaxes(1, 2)], axis=-1) + 2, len(table) - 1)
    e = table[rows].reshape(*edges.shape, 2 * table.shape[1])
    return rows, e, relu(linear(e, params.w_edge1, params.b_edge1))


def _positions(edges, params):
    """Rows of the three tables of nodes, [B, N] each; degrees count real edges."""
    real = np.asarray(edges) == 1
    at = {"in_degree": real.sum(axis=1), "out_degree": real.sum(axis=2), "input_distance": edges[:, 0]}
    return {name: np.minimum(i, len(getattr(params, name)) - 1) for name, i in at.items()}


def _forward(x, edges, node_mask, params, num_heads, eps):
    """([nodes before each block, and after the last], bias [B, H, N, N], pairs [B, 1, N, N])."""
    n = dims(x=(x, "B N d"), edges=(edges, "B N N"), node_mask=(node_mask, "B N"))
    check_num_heads(n["d"], num_heads)
    mask, edges = np.asarray(node_mask, bool), np.asarray(edges)
    bias, pairs = edge_bias(edges, params), (mask[:, :, None] & mask[:, None, :])[:, None]
    rows = (getattr(params, name)[at] for name, at in _positions(edges, params).items())
    x = sum(rows, start=float64(x))
    hidden = [x * mask[..., None]]
    attend = lambda q, k, v, mask=None, causal=False: _weights(q, k, bias, pairs) @ v
    for p in params.blocks:
        hidden.append(transformer_block(hidden[-1], p, num_heads=num_heads, eps=eps, attention=attend))
    return hidden, bias, pairs


def _weights(q, k, bias, pairs):
    return softmax(np.where(pairs, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias, MASKED))


def _block_vjp(x, p, bias, pairs, dy, num_heads, eps):
    """(dx, cotangent of the bias, BlockParams of gradients) of one block."""
    h1 = layer_norm(x, p.ln1_scale, p.ln1_bias, eps=eps)
    q, k, v = qkv(h1, p, num_heads=num_heads)
    w = _weights(q, k, bias, pairs)
    o = join_heads(w @ v)
    x1 = x + linear(o, p.w_o, p.b_o)
    h2 = layer_norm(x1, p.ln2_scale, p.ln2_bias, eps=eps)
    d, dw_fc1, db_fc1, dw_fc2, db_fc2 = mlp_vjp(h2, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, dy)
    d, s2, b2 = layer_norm_vjp(x1, p.ln2_scale, d, eps=eps)
    dx1 = dy + d
    do, dw_o, db_o = linear_vjp(o, p.w_o, dx1, bias=p.b_o is not None)
    do = split_heads(do, num_heads)
    dlogits = softmax_vjp(w, do @ v.swapaxes(-1, -2)) * pairs
    ds = dlogits / np.sqrt(q.shape[-1])
    d, maps = qkv_vjp(h1, p, (ds @ k, ds.swapaxes(-1, -2) @ q, w.swapaxes(-1, -2) @ do))
    d, s1, b1 = layer_norm_vjp(x, p.ln1_scale, d, eps=eps)
    return dx1 + d, dlogits, BlockParams(
        ln1_scale=s1, ln1_bias=b1, **maps._asdict(), w_o=dw_o, b_o=db_o, ln2_scale=s2, ln2_bias=b2,
        w_fc1=dw_fc1, b_fc1=db_fc1, w_fc2=dw_fc2, b_fc2=db_fc2,
    )  # fmt: skip


def _table_grad(table, at, dx):
    grad = np.zeros_like(float64(table))
    np.add.at(grad, at, dx)
    return grad
