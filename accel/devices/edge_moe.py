"""Edge-MoE in JAX: gate, experts, attention, GELU by table; see ref/devices/edge_moe.py for the definitions.

Experts run one after another: tokens are sorted by expert, each expert's run is cut into tiles of block_t,
and a loop over tiles fetches one expert's weights at a time. The number of tiles is known beforehand. Kernels
take the same tiles in two grouped products, their own backward pass included.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.attention import attention_dense
from accel.blocks.backend import choose_impl
from accel.blocks.gate import GateOut, moe_gate, moe_gate_backward
from accel.blocks.mlp import gelu, linear, mlp
from accel.blocks.norms import layer_norm
from accel.blocks.shapes import alike
from accel.blocks.softmax import online_softmax, wide
from accel.blocks.transformer import self_attention
from accel.models.vit import embed_patches
from ref.blocks.fixed_ops import GELU_END, check_lanes
from ref.blocks.gate import check_choice
from ref.blocks.mlp import gelu as exact_gelu
from ref.blocks.quantize import known
from ref.devices.edge_moe import (
    ATTN_BIAS,
    BIAS,
    FM,
    FM_EPS,
    PATCH_WEIGHT,
    PIXEL,
    WEIGHT,
    LoadTrace,
    M3ViTConfig,
    M3ViTParams,
    MoEParams,
    build_expert_queues,
    check_image,
    check_order,
    check_queue,
    edge_moe_cycles,
    example,
    gelu_fixed,
    gelu_table,
    init_m3vit,
    layer_norm_fixed,
    linear_fixed,
    load_trace,
    m3vit_formats,
    m3vit_forward_fixed,
    m3vit_macs,
    m3vit_to_fixed,
    moe_fixed,
    moe_traffic,
    reordered_attention_fixed,
)
from ref.dims import dims

__all__ = [
    "ATTN_BIAS", "BIAS", "FM", "FM_EPS", "PATCH_WEIGHT", "PIXEL", "WEIGHT", "GateOut", "LoadTrace",
    "M3ViTConfig", "M3ViTParams", "MoEParams", "build_expert_queues", "edge_moe_cycles", "example",
    "gelu_delta", "gelu_fixed", "gelu_table", "init_m3vit", "layer_norm_fixed", "linear_fixed", "load_trace",
    "m3vit_formats", "m3vit_forward", "m3vit_forward_fixed", "m3vit_macs", "m3vit_to_fixed", "moe_ffn",
    "moe_fixed", "moe_gate", "moe_gate_backward", "moe_traffic",
    "online_softmax", "reordered_attention", "reordered_attention_fixed", "unified_linear",
]  # fmt: skip

BLOCK_T = 32  # tokens of an expert that run together
UNIT = 16  # rows of the smallest tile of a kernel for GPUs
WIDE = 2**20  # from here on XLA's loop multiplies float32 faster, to fewer bits: measured, docs/notes/gpu.md


def reordered_attention(q, k, v, *, scale, lanes=4):
    """softmax(scale q k^T) v, query n taking its keys from n mod lanes on and around: one loop over keys."""
    n = dims(q=(q, "H N d"), k=(k, "H N d"), v=(v, "H N d"))
    check_lanes(n["N"], lanes)
    return _attention(q, k, v, scale=float(scale), lanes=lanes)


@partial(jax.jit, static_argnames=("scale", "lanes"))
def _attention(q, k, v, *, scale, lanes):
    n = dims(q=(q, "H N d"))
    place = np.arange(n["N"])
    turn = ((place[:, None] % lanes + place) % n["N"]).astype(np.int32)  # the j-th key that query n meets
    back = ((place - place[:, None] % lanes) % n["N"]).astype(np.int32)
    logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide(q.dtype)) * scale
    shape = (n["H"], n["N"], n["N"])
    moved = jnp.take_along_axis(logits, jnp.broadcast_to(turn, shape), axis=-1)
    p, _, _ = online_softmax(moved)
    p = jnp.take_along_axis(p, jnp.broadcast_to(back, shape), axis=-1)
    return jnp.matmul(p, v.astype(p.dtype)).astype(q.dtype)


def gelu_delta(x, *, step=1 / 32):
    """ReLU(x) - delta(|x|), delta linear between multiples of `step` and 0 from 5.5 on."""
    if not 0 < step <= GELU_END:
        raise ValueError(f"step must be in (0, {GELU_END}], got {step}")
    return _gelu_delta(x, step=float(step))


@partial(jax.jit, static_argnames="step")
def _gelu_delta(x, *, step):
    at = step * np.arange(int(np.floor(GELU_END / step + 1e-9)) + 1)
    dtype = wide(x.dtype)
    table = jnp.asarray(at - exact_gelu(at), dtype)
    y = x.astype(dtype)
    size = jnp.abs(y) / step
    i = jnp.clip(jnp.floor(size), 0, len(at) - 2)
    low, high = (table[(i + o).astype(jnp.int32)] for o in (0.0, 1.0))
    delta = low + (size - i) * (high - low)
    return (jnp.maximum(y, 0) - jnp.where(size >= len(at) - 1, jnp.zeros((), dtype), delta)).astype(x.dtype)


def unified_linear(x, w, b, *, gelu=False, queue=None, scores=None, accumulate_into=None):
    """x w^T + b by four flags; see ref. The queue's values are checked only where they are known."""
    n = dims(x=(x, "N K"), w=(w, "M K"), b=(b, "M"))
    rows = np.arange(n["N"], dtype=np.int32) if queue is None else queue
    check_queue(rows, n["N"])
    if scores is not None:
        dims(queue=(rows, "n"), scores=(scores, "n"))
    if accumulate_into is not None:
        dims(x=(x, "N K"), w=(w, "M K"), accumulate_into=(accumulate_into, "N M"))
    return _unit(x, w, b, rows, scores, accumulate_into, gelu=bool(gelu), gather=queue is not None)


@partial(jax.jit, static_argnames=("gelu", "gather"))
def _unit(x, w, b, rows, scores, into, *, gelu, gather):
    real = rows >= 0
    at = jnp.where(real, rows, 0)
    y = linear(x[at] if gather else x, w.T, b)
    y = jax.nn.gelu(y, approximate=False) if gelu else y
    y = y if scores is None else y * scores.astype(y.dtype)[:, None]
    y = jnp.where(real[:, None], y, jnp.zeros((), y.dtype)) if gather else y
    return y if into is None else into.at[at].add(y.astype(into.dtype))


def moe_ffn(
    x, indices, scores, w1, b1, w2, b2, *, order="expert", impl="auto", interpret=False, block_t=BLOCK_T,
    block_n=None, block_k=None,
):  # fmt: skip
    """sum over the experts e of a token of score (w2_e gelu(w1_e x + b1_e) + b2_e): [N, D].

    order "expert" loads an expert's weights once for each tile of block_t of its tokens, in at most
      ceil(N k / block_t) + E - 1 tiles; "token" gathers the weights of every choice.
    impl: "xla" loops over the tiles; "triton" and "tpu" run them side by side, block_n columns and block_k
      terms at a time; "auto" is "triton" on a GPU, unless x is float32 and F x D at least WIDE, else "xla".
      Kernels sum in float32 and multiply float32 in full.
    """
    n = dims(x=(x, "N D"), indices=(indices, "N k"), scores=(scores, "N k"), w1=(w1, "E F D"),
             b1=(b1, "E F"), w2=(w2, "E D F"), b2=(b2, "E D"))  # fmt: skip
    check_order(order)
    if block_t < 1:
        raise ValueError(f"block_t must be positive, got {block_t}")
    arrays = x, indices, scores, w1, b1, w2, b2
    impl = _choose(impl, interpret, order, arrays, x.dtype, block_t, n["F"] * n["D"], n["E"])
    if impl == "xla" and (block_n or block_k):
        raise ValueError(f'block_n and block_k are for impl="triton" and "tpu", got {block_n} and {block_k}')
    if known(indices):
        check_choice(np.asarray(indices), n["E"])
    if not n["N"]:
        return x
    if impl == "xla":
        return _ffn(*arrays, order=order, block_t=block_t)
    tiles = _Tiling(impl, interpret, block_t, block_n, block_k)
    return _ffn_kernel(*alike(arrays, arrays), tiling=tiles)


def _choose(impl, interpret, order, arrays, dtype, block_t, matrix, experts):
    """The implementation of the experts. Kernels need the queues, and numbers of at most 32 bits."""
    why, weights = None, experts * matrix
    pays = (
        (jnp.dtype(dtype).itemsize < 4 or matrix < WIDE) and block_t >= UNIT and not block_t & (block_t - 1)
    )
    if order != "expert":
        why = f'runs experts one after another: use order="expert", not {order!r}'
    elif jnp.dtype(dtype).itemsize > 4 or not jnp.issubdtype(dtype, jnp.floating):
        why = f'sums in float32: x is {jnp.dtype(dtype)}; use impl="xla"'
    elif weights >= 2**31:
        why = f'counts a layer\'s weights in 32 bits, and these are {weights:,}; use impl="xla"'
    missing = 'does not exist: queues are shorter than its tiles of 64 rows; use "triton"'
    return choose_impl(
        impl,
        arrays=arrays,
        interpret=interpret,
        auto=("triton",) if pays else (),
        obstacles={"hopper": missing, "triton": why, "tpu": why},
    )


@partial(jax.jit, static_argnames=("order", "block_t"))
def _ffn(x, indices, scores, w1, b1, w2, b2, *, order, block_t):
    acc = wide(x.dtype)
    if order == "token":
        w = [a[indices] for a in (w1, b1, w2, b2)]
        hidden = gelu(jnp.einsum("nd,nkfd->nkf", x, w[0]) + w[1])
        out = jnp.einsum("nkf,nkdf->nkd", hidden, w[2]) + w[3]
        return (out.astype(acc) * scores.astype(acc)[..., None]).sum(1).astype(x.dtype)
    t = _tiles(indices, len(w1), block_t)
    token = t.choice // indices.shape[1]
    weight = jnp.where(t.real, scores.astype(acc).reshape(-1)[t.choice], jnp.zeros((), acc))

    def run(_, tile):
        rows, e = tile
        take = lambda a: jax.lax.dynamic_index_in_dim(a, e, keepdims=False)
        return None, mlp(x[rows], take(w1).T, take(b1), take(w2).T, take(b2))

    _, out = jax.lax.scan(run, None, (token, t.expert))
    out = out.astype(acc) * weight[..., None]
    return jnp.zeros(x.shape, acc).at[token.reshape(-1)].add(out.reshape(-1, x.shape[1])).astype(x.dtype)


class _Tiling(NamedTuple):
    """How a grouped product runs: all static."""

    impl: str
    interpret: bool
    block_t: int
    block_n: int | None
    block_k: int | None


@partial(jax.jit, static_argnames="tiling")
def _ffn_kernel(x, indices, scores, w1, b1, w2, b2, *, tiling):
    (N, k), acc = indices.shape, wide(x.dtype)
    t = _tiles(indices, len(w1), tiling.block_t)
    choice, real = t.choice.reshape(-1), t.real.reshape(-1)
    place = jnp.arange(len(choice), dtype=jnp.int32)
    row = jnp.zeros(N * k + 1, jnp.int32).at[jnp.where(real, choice, N * k)].set(place)[:-1]  # of a choice
    where = (t.expert, t.real.sum(1, dtype=jnp.int32), t.first, t.end)
    hidden = gelu(_grouped(x[choice // k], w1, b1, where, tiling))
    out = _grouped(hidden, w2, b2, where, tiling)[row].reshape(N, k, -1)
    return (out.astype(acc) * scores.astype(acc)[..., None]).sum(1).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(x, w, b, where, tiling):
    """x_t w_e^T + b_e by tile: [R, N] of x [R, K], w [E, N, K], b [E, N]; where: expert, rows, first, end."""
    expert, real, _, _ = where
    kernels, options = _kernels(tiling)
    return kernels.grouped_linear(x, w, b, expert, real, **options)


def _grouped_fwd(x, w, b, where, tiling):
    return _grouped(x, w, b, where, tiling), (x, w, b, where)


def _grouped_bwd(tiling, saved, dy):
    """Rows that pad a tile have no part in the result: their dy is 0."""
    x, w, b, (expert, real, first, end) = saved
    kernels, options = _kernels(tiling)
    dx = kernels.grouped_linear(dy, w, None, expert, real, turned=True, **options)
    dw = kernels.grouped_outer(dy, x, expert, first, end, **options)
    sums = dy.astype(jnp.float32).reshape(len(expert), tiling.block_t, -1).sum(1)
    db = jnp.zeros(b.shape, jnp.float32).at[expert].add(sums)
    return dx, dw.astype(w.dtype), db.astype(b.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _kernels(tiling):
    """(the module of the kernels, their options)."""
    if tiling.impl == "triton":
        from accel.kernels import edge_moe_triton as kernels
    else:
        from accel.kernels import edge_moe_tpu as kernels
    sizes = {"block_t": tiling.block_t, "block_n": tiling.block_n, "block_k": tiling.block_k}
    return kernels, {n: s for n, s in sizes.items() if s is not None} | {"interpret": tiling.interpret}


def m3vit_forward(
    img, params: M3ViTParams, *, task, cfg: M3ViTConfig, impl="auto", interpret=False, block_t=BLOCK_T
):
    """Tokens [N, dim] of an image [H, W, 3] for a task, which is a choice of gates and of nothing else.

    impl and block_t: of the experts, see `moe_ffn`.
    """
    check_image(img, task, cfg)
    experts = {
        "impl": _choose(
            impl,
            interpret,
            "expert",
            (img, params),
            img.dtype,
            block_t,
            cfg.dim * cfg.expert_hidden,
            cfg.num_experts,
        ),
        "interpret": interpret,
        "block_t": block_t,
    }
    return _network(img, params, task=task, cfg=cfg, **experts)


@partial(jax.jit, static_argnames=("task", "cfg", "impl", "interpret", "block_t"))
def _network(img, params, *, task, cfg, impl, interpret, block_t):
    x = embed_patches(img, params.vit)
    for p, experts in zip(params.vit.blocks, params.moe, strict=True):
        h = layer_norm(x, p.ln1_scale, p.ln1_bias, eps=cfg.eps)
        x = x + self_attention(h, p, num_heads=cfg.num_heads, attention=attention_dense)
        h = layer_norm(x, p.ln2_scale, p.ln2_bias, eps=cfg.eps)
        if experts is None:
            x = x + mlp(h, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
        else:
            g = moe_gate(h, experts.w_gate[task], top_k=cfg.top_k)
            run = partial(moe_ffn, impl=impl, interpret=interpret, block_t=block_t)
            x = x + run(h, g.indices, g.scores, *experts[1:])
    return x


class _Tiles(NamedTuple):
    """Choices by expert: choice [T, block_t] of the N k, real [T, block_t] False where it pads a tile; expert
    [T] of a tile; first, end [E]: an expert's tiles.
    """

    choice: jax.Array
    real: jax.Array
    expert: jax.Array
    first: jax.Array
    end: jax.Array


def _tiles(indices, E, block_t):
    """Tiles of block_t choices, every one of a single expert."""
    N, k = indices.shape
    flat = indices.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # choices by expert, tokens in order
    every = jnp.arange(E, dtype=jnp.int32)
    total = lambda flags, axis: flags.sum(axis, dtype=jnp.int32)
    counts = total(flat[:, None] == every[None], 0)
    tiles = (counts + (block_t - 1)) // block_t
    running = partial(jnp.cumsum, dtype=jnp.int32)
    ends, start = running(tiles), running(counts) - counts
    t = jnp.arange(-(-N * k // block_t) + E - 1, dtype=jnp.int32)
    expert = jnp.minimum(total(t[:, None] >= ends[None], 1), E - 1)
    inside = (t - (ends - tiles)[expert])[:, None] * block_t + jnp.arange(block_t, dtype=jnp.int32)[None]
    real = inside < counts[expert][:, None]
    choice = order[jnp.where(real, start[expert][:, None] + inside, 0)]
    return _Tiles(choice, real, expert, ends - tiles, ends)
