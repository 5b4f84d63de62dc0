"""MCUFormer's network in JAX; see ref/devices/mcuformer.py for the definitions.

A subnet is static: each has its own compiled program on slices of the shared supernet. The int8 engine and
the search are plain NumPy and re-exported.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.mlp import gelu, linear
from accel.blocks.norms import layer_norm
from accel.blocks.shapes import lift
from accel.blocks.softmax import softmax, wide
from ref.devices.mcuformer import (
    EvolutionStep,
    LowRank,
    MCUFormerBlock,
    MCUFormerParams,
    MemoryReport,
    QModel,
    RelPos,
    SubnetConfig,
    SubnetSpace,
    Trace,
    check_forward,
    check_slice,
    check_tables,
    distances,
    evolution_step,
    evolve_space,
    example,
    extract_subnet,
    fold_factors,
    framed,
    init_mcuformer,
    mcuformer_int8,
    nearest_points,
    peak_memory,
    plan_int8,
    quantize_model,
    released_predicate,
    search_subnet,
    svd_init,
)
from ref.dims import dims
from ref.models.vit import patchify

__all__ = [
    "EvolutionStep", "LowRank", "MCUFormerBlock", "MCUFormerParams", "MemoryReport", "QModel", "RelPos",
    "SubnetConfig", "SubnetSpace", "Trace", "evolution_step", "evolve_space", "example", "extract_subnet",
    "fold_factors", "init_mcuformer", "low_rank_linear", "mcuformer_forward", "mcuformer_int8",
    "nearest_points", "peak_memory", "plan_int8", "quantize_model", "relative_position_embedding",
    "released_predicate", "search_subnet", "slice_qkv_rows", "svd_init",
]  # fmt: skip


def low_rank_linear(x, w1, w2, w3, b):
    """w3 (w2 (w1 x)) + b: x [..., in], w1 [R, in], w2 [R, R] or None, w3 [out, R], b [out] or None."""
    optional = {name: (a, spec) for name, a, spec in (("w2", w2, "R R"), ("b", b, "out")) if a is not None}
    dims(x=(x, "... in"), w1=(w1, "R in"), w3=(w3, "out R"), **optional)
    return _chain(x, LowRank(w1, w2, w3, b))


def slice_qkv_rows(w, out_dim, in_dim):
    """w [out, in] -> [out_dim, in_dim]: rows 0, 3, 6, ..., then 1, 4, ..., then 2, 5, ... of the first."""
    check_slice(w, out_dim, in_dim)
    part = lambda i: jax.lax.slice(w, (i, 0), (out_dim, in_dim), (3, 1))
    return jnp.concatenate([part(i) for i in range(min(3, out_dim))])


def relative_position_embedding(table_v, table_h, n_tokens, *, max_distance=14):
    """r [N, N, d]: table_v[dy + m + 1] + table_h[dx + m + 1]; row 0 for the class token."""
    check_tables(table_v, table_h, max_distance)
    dy, dx = distances(n_tokens, max_distance)
    return table_v[dy] + table_h[dx]


def mcuformer_forward(
    img, params: MCUFormerParams, *, subnet: SubnetConfig, patch, rank_ratio, pooling="patch_mean",
    relative_position=True, max_distance=14, head_dim=64, eps=1e-5,
):  # fmt: skip
    """Logits [..., K] of images [..., S, S, C] by the subnet's slice of the supernet, in img's dtype."""
    check_forward(img, params, subnet, patch, rank_ratio, pooling, max_distance, head_dim)
    return _forward(
        img, params, subnet=subnet, patch=patch, rank_ratio=float(rank_ratio), pooling=pooling,
        max_distance=max_distance if relative_position else 0, head_dim=head_dim, eps=float(eps),
    )  # fmt: skip


def _chain(x, f):
    return linear(_low(x, f), f.w3.T, f.b)


def _low(x, f):
    """All factors but the last."""
    for w in (f.w1, f.w2):
        x = x if w is None else linear(x, w.T)
    return x


@partial(
    jax.jit,
    static_argnames=("subnet", "patch", "rank_ratio", "pooling", "max_distance", "head_dim", "eps"),
)
def _forward(img, params, *, subnet, patch, rank_ratio, pooling, max_distance, head_dim, eps):
    p = extract_subnet(params, subnet, rank_ratio=rank_ratio, head_dim=head_dim, rows=slice_qkv_rows)
    E = subnet.embed_dim
    x = patchify(framed(img, patch, jnp.pad), patch)
    x = linear(x, p.w_patch.transpose(2, 3, 1, 0).reshape(-1, E), p.b_patch)
    first = jnp.broadcast_to(lift(p.cls_token.astype(x.dtype), x.ndim), (*x.shape[:-2], 1, E))
    x = jnp.concatenate([first, x], axis=-2)
    x = x + lift(p.pos_embed.astype(x.dtype), x.ndim)
    for b, h in zip(p.blocks, subnet.heads, strict=True):
        y = layer_norm(x, b.ln1_w, b.ln1_b, eps=eps)
        x = x + _chain(_attention(y, b, h, head_dim, max_distance), b.proj)
        y = gelu(_chain(layer_norm(x, b.ln2_w, b.ln2_b, eps=eps), b.fc1))
        x = x + _chain(y, b.fc2)
    x = layer_norm(x, p.norm_w, p.norm_b, eps=eps)
    pooled = x[..., 0, :] if pooling == "class_token" else x[..., 1:, :].mean(axis=-2)
    return linear(pooled, p.w_head.T, p.b_head)


def _attention(y, b, heads, d, max_distance):
    """Normalised y [..., N, E] -> [..., N, A]; logits and weights in at least float32."""
    A, N, acc = heads * d, y.shape[-2], wide(y.dtype)
    low = _low(y, b.qkv)
    split = lambda a: a.reshape(*a.shape[:-1], heads, d).swapaxes(-3, -2).astype(acc)
    part = lambda j: slice(j * A, (j + 1) * A)  # of q, k and v, which need not exist side by side
    q, k, v = (split(linear(low, b.qkv.w3[part(j)].T, b.qkv.b[part(j)])) for j in range(3))
    scale = float(1 / np.sqrt(d))
    logits = jnp.matmul(q, k.swapaxes(-1, -2)) * scale
    if max_distance:
        r_k, r_v = (
            relative_position_embedding(t.v, t.h, N, max_distance=max_distance).astype(acc)
            for t in (b.rel_k, b.rel_v)
        )
        logits = logits + jnp.einsum("...id,ijd->...ij", q, r_k) * scale
    p = softmax(logits)
    out = jnp.matmul(p, v)
    if max_distance:
        out = out + jnp.einsum("...ij,ijd->...id", p, r_v)
    return out.swapaxes(-3, -2).reshape(*y.shape[:-1], A).astype(y.dtype)
