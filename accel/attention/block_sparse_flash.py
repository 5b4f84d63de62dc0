"""Block-sparse FlashAttention in JAX: only visible tiles are read. Definition:
ref/attention/block_sparse_flash.py.

impl="xla" walks a list of the visible tiles, first those that no element cuts, then the others with their
element mask: with a mask known at trace time (NumPy, or a JAX array outside jit) the work is proportional to
their number, with static shapes; under a traced mask the list holds all tiles and the invisible ones are
skipped by a branch. "hopper", "triton" and "tpu" are Pallas kernels that walk the same tiles row by row; they
know no element mask and no float64, "hopper" half precision alone. Differentiable in reverse mode (and
forward over reverse on "xla"). Statistics and sums are float32 (float64 for float64 input).
"""

import importlib
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from accel.blocks.backend import choose_impl, hopper_obstacle
from accel.blocks.shapes import alike, lift
from accel.blocks.softmax import SoftmaxState, finalize, shift, wide
from accel.blocks.tiled_attention import SMALL
from accel.blocks.tiles import too_wide
from ref.attention.block_sparse_flash import (
    BlockLayout,
    block_mask_from_scores,
    butterfly_block_mask,
    causal_block_mask,
    check_block_sparse,
    density,
    example,
    expand_block_mask,
    from_block_layout,
    hbm_accesses_block_sparse,
    local_block_mask,
    random_block_mask,
    strided_block_mask,
    tiles_in_sight,
    to_block_layout,
)
from ref.dims import dims

__all__ = [
    "BlockLayout",
    "block_mask_from_scores",
    "block_sparse_attention",
    "block_sparse_attention_bwd",
    "butterfly_block_mask",
    "causal_block_mask",
    "density",
    "example",
    "expand_block_mask",
    "from_block_layout",
    "hbm_accesses_block_sparse",
    "local_block_mask",
    "random_block_mask",
    "strided_block_mask",
    "to_block_layout",
]


def block_sparse_attention(
    q,
    k,
    v,
    block_mask,
    *,
    block_q,
    block_k,
    causal=False,
    mask=None,
    scale=None,
    return_lse=False,
    impl="auto",
    interpret=False,
):
    """softmax(scale q k^T over the keys of visible tiles) v; as ref, o in q's dtype, lse float32 (float64).

    impl: "auto" is a kernel on a GPU or TPU that can run the call, else "xla".
    Raises: ValueError naming the argument; NotImplementedError for an impl that cannot run, saying why.
    """
    check_block_sparse(q, k, v, block_mask, block_q=block_q, block_k=block_k, mask=mask)
    q, k, v = map(jnp.asarray, (q, k, v))
    plan, tiles = _prepare(q, k, v, block_mask, mask, block_q, block_k, causal, scale, impl, interpret)
    o, lse = _forward(plan, q, k, v, mask, tiles)
    return (o, lse) if return_lse else o


def block_sparse_attention_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    block_mask,
    *,
    block_q,
    block_k,
    causal=False,
    mask=None,
    scale=None,
    impl="auto",
    interpret=False,
):
    """(dq, dk, dv) for the cotangent do of o, from o and lse, on visible tiles alone; in q's, k's, v's
    dtypes.
    """
    check_block_sparse(q, k, v, block_mask, block_q=block_q, block_k=block_k, mask=mask)
    rows = "... H L" if q.ndim > 2 else "L"
    like_v = (v, "... Hkv S Dv" if q.ndim > 2 else "S Dv")
    dims(q=(q, rows + " D"), v=like_v, do=(do, rows + " Dv"), o=(o, rows + " Dv"), lse=(lse, rows))
    do, q, k, v, o, lse = map(jnp.asarray, (do, q, k, v, o, lse))
    plan, tiles = _prepare(q, k, v, block_mask, mask, block_q, block_k, causal, scale, impl, interpret)
    return _backward(plan, do, q, k, v, o, lse, mask, tiles)


@dataclass(frozen=True)
class Plan:
    """What is static in a call. Key j may be seen by query i only if j - i <= hi (None: no such bound)."""

    scale: float
    hi: int | None
    block_q: int
    block_k: int
    per_head: bool  # a mask for every query head
    impl: str
    interpret: bool


class Tiles(NamedTuple):
    """Which tiles are visited, bool [H or 1, Tr, Tc], and their lists, which name the tiles of every head.

    clean, cut: uint32 [n, 4], (query head, key head, first query, first key) of tiles without and with an
    element mask; unsigned, since an index that may be negative costs three operations more on every axis.
    valid: bool [n], which of `cut` are visited, or None for all. by_row, by_col: int32 [n, 4], the entries of
    the TPU's kernels, or None. orders: those of the kernels for Hopper, of a known mask.
    """

    visited: jax.Array
    clean: jax.Array
    cut: jax.Array
    valid: jax.Array | None
    by_row: jax.Array | None = None
    by_col: jax.Array | None = None
    orders: tuple[jax.Array | None, ...] = ()


def _prepare(q, k, v, block_mask, mask, block_q, block_k, causal, scale, impl, interpret):
    """(Plan, Tiles) of a checked call."""
    obstacle = None
    if mask is not None:
        obstacle = 'has no element mask; use impl="xla"'
    elif q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        obstacle = f"has no {q.dtype}"
    impl = choose_impl(
        impl,
        arrays=(q, k, v),
        interpret=interpret,
        auto=("hopper", "triton", "tpu"),
        obstacles={
            "hopper": obstacle or _no_hopper(q, k, v, block_q, block_k, interpret),
            "triton": obstacle or _off_tile(block_q=(block_q, 16), block_k=(block_k, 16)) or too_wide(q, v),
            "tpu": obstacle or _off_tile(block_q=(block_q, 16), block_k=(block_k, 128)),
        },
    )
    L, S = q.shape[-2], k.shape[-2]
    plan = Plan(
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        S - L if causal else None,
        block_q,
        block_k,
        block_mask.ndim == 3,
        impl,
        bool(interpret),
    )
    three = (1,) * (3 - block_mask.ndim) + block_mask.shape
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    heads = (q.shape[-3] if q.ndim > 2 else 1) // (1 if plan.per_head else kv_heads)
    kv_heads = kv_heads if plan.per_head else 1
    reach, whole = (x[None] for x in tiles_in_sight(block_q, block_k, L, S, causal))

    def listed(visited):
        at = np.argwhere(np.broadcast_to(visited, (heads, *visited.shape[1:])))
        return (at[:, [0, 0, 1, 2]] * (1, 1, block_q, block_k) // (1, heads // kv_heads, 1, 1)).astype(
            np.uint32
        )

    if isinstance(block_mask, jax.core.Tracer):
        visited = jnp.broadcast_to(block_mask.reshape(three) & jnp.asarray(reach), (heads, *three[1:]))
        every = listed(reach)
        place = every[:, [0, 2, 3]] // np.array((1, block_q, block_k), np.uint32)
        tiles = Tiles(visited, every[:0], every, visited[tuple(place.T)])
    else:
        visited = np.asarray(block_mask).reshape(three) & reach
        # A small call keeps one list: a second loop costs more to compile than its masks to evaluate.
        split = mask is None and heads * L * S >= SMALL
        clean = visited & whole if split else np.zeros_like(visited)
        tiles = Tiles(visited, listed(clean), listed(visited & ~clean), None)
    if impl == "tpu":
        tiles = tiles._replace(**entries(visited, whole, heads, kv_heads))
    if impl == "hopper":
        from accel.kernels.block_sparse_flash_hopper import orders

        batches = q.size // max(1, heads * L * q.shape[-1])
        sizes = batches, heads, kv_heads, (L, S)
        tiles = tiles._replace(orders=orders(visited, *sizes, plan.hi, block_q, block_k))
    return plan, tiles


def entries(visited, whole, heads, kv_heads):
    """The tiles in the order of the TPU's grids: {by_row: (query head, row, column, flags), by_col: (key
    head, column, query head of the group and row, flags)}. A row without tiles has one idle entry.
    """
    xp = np if isinstance(visited, np.ndarray) else jnp
    rows, cols = visited.shape[1:]

    def listed(visited, whole):
        known = isinstance(visited, np.ndarray)
        need = visited.copy() if known else np.ones(visited.shape, bool)
        if known:
            need[..., 0] |= ~visited.any(axis=-1)
        at = np.argwhere(need).astype(np.int32)
        first = np.r_[True, (np.diff(at[:, :2], axis=0) != 0).any(axis=1)][: len(at)]
        last = np.r_[first[1:], True][: len(at)]
        always = (2 * whole[tuple(at.T)] + 1).astype(np.int32)  # what an entry is if its tile is visited
        flags = xp.where(visited[tuple(at.T)], always, np.int32(0)) + (4 * first + 8 * last).astype(np.int32)
        return xp.concatenate([at, flags[:, None]], axis=1)

    def columns(x):
        return x.reshape(kv_heads, -1, rows, cols).transpose(0, 3, 1, 2).reshape(kv_heads, cols, -1)

    visited, whole = (m.broadcast_to(x, (heads, rows, cols)) for m, x in ((xp, visited), (np, whole)))
    return {"by_row": listed(visited, whole), "by_col": listed(columns(visited), columns(whole))}


def _no_hopper(q, k, v, block_q, block_k, interpret):
    """Why the kernels for Hopper cannot run the call, or None."""
    if interpret:
        return 'has no interpreter; use impl="triton"'
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        return f'takes bfloat16 or float16, not {q.dtype}, {k.dtype} and {v.dtype}; use impl="triton"'
    if max(q.shape[-1], v.shape[-1]) > 128:
        return 'takes heads of up to 128; use impl="triton"'
    return _off_tile(block_q=(block_q, 64), block_k=(block_k, 64)) or hopper_obstacle((q, k, v))


def _off_tile(**blocks):
    for name, (size, unit) in blocks.items():
        if size % unit:
            return f"needs {name} to be a multiple of {unit}, got {size}"
    return None


@partial(jax.jit, static_argnums=0)
def _forward(plan, q, k, v, mask, tiles):
    heads, mask = _grouped(plan, q, k, mask, q, k, v)
    o, lse = _attend(plan, *alike(heads, heads, mask, tiles), mask, tiles)
    return o.astype(q.dtype).reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


@partial(jax.jit, static_argnums=0)
def _backward(plan, do, q, k, v, o, lse, mask, tiles):
    (do_, q_, k_, v_, o_), mask = _grouped(plan, q, k, mask, do, q, k, v, o)
    grads = _pull(plan, do_, q_, k_, v_, o_, lse.reshape(q_.shape[:-1]), mask, tiles)
    return tuple(g.astype(x.dtype).reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))


def _grouped(plan, q, k, mask, *arrays):
    """([N, heads, rows, width] of every array, mask [N or 1, heads or 1, L, S] or None).

    N counts what the lists of tiles do not: the batch, and with a shared mask the key heads as well.
    """
    lead, (L, S) = q.shape[:-2], (q.shape[-2], k.shape[-2])
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    N = int(np.prod(lead[:-1])) * (1 if plan.per_head else kv_heads)
    count = lambda x: (x.shape[-3] if x.ndim > 2 else 1) // (1 if plan.per_head else kv_heads)
    heads = tuple(x.reshape(N, count(x), *x.shape[-2:]) for x in arrays)
    if mask is not None:
        mask = lift(jnp.asarray(mask), max(q.ndim, 3))
        some = any(n > 1 for n in mask.shape[:-2])
        mask = jnp.broadcast_to(mask, (*(lead if some else mask.shape[:-2]), L, S))
        mask = mask.reshape(N if some else 1, -1, L, S)
    return heads, mask


def _run_tiles(plan, q, k, v, mask, tiles):
    """q [N, heads, L, D], k [N, key heads, S, D] -> (o [N, heads, L, Dv], lse [N, heads, L])."""
    if q.size == 0 or k.size == 0:
        dtype = wide(q.dtype)
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype), jnp.full(q.shape[:-1], -jnp.inf, dtype)
    if plan.impl == "xla":
        return _walk(plan, _visit_forward, (q, k, v), mask, tiles, k)
    lists = (tiles.by_row,) if plan.impl == "tpu" else (tiles.visited, *tiles.orders[:1])
    return _once("forward", plan, (q, k, v), lists)


_attend = jax.custom_vjp(_run_tiles, nondiff_argnums=(0,))


def _attend_fwd(plan, q, k, v, mask, tiles):
    o, lse = _run_tiles(plan, q, k, v, mask, tiles)
    return (o, lse), (q, k, v, o, lse, mask, tiles)


def _attend_rev(plan, saved, cotangents):
    q, k, v, o, lse, mask, tiles = saved
    do, dlse = cotangents
    grads = _pull(plan, do, q, k, v, o, lse, mask, tiles, dlse)
    return (*(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None)


_attend.defvjp(_attend_fwd, _attend_rev)


def _pull(plan, do, q, k, v, o, lse, mask, tiles, dlse=None):
    """(dq, dk, dv) on the grouped layout."""
    dtype = wide(q.dtype)
    if q.size == 0 or k.size == 0:
        return tuple(jnp.zeros(x.shape, dtype) for x in (q, k, v))
    delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1)  # D_i of equation 4
    if dlse is not None:
        delta = delta - jnp.where(jnp.isneginf(lse), 0, dlse)
    lse = lse.astype(dtype)
    if plan.impl == "xla":
        return _walk(plan, _visit_backward, (q, k, v, do, shift(lse), delta), mask, tiles, k)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a row that saw nothing: exp(s - lse) = 0
    lists = (tiles.by_row, tiles.by_col) if plan.impl == "tpu" else (tiles.visited, *tiles.orders)
    return _once("backward", plan, (do.astype(q.dtype), q, k, v, lse, delta), lists)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _once(name, plan, arrays, lists):
    """The kernel of that name, which says what is missing when asked for a derivative of its own."""
    module = importlib.import_module(f"accel.kernels.block_sparse_flash_{plan.impl}")
    options = {n: getattr(plan, n) for n in ("scale", "hi", "block_q", "block_k", "interpret")}
    return alike(tuple(getattr(module, name)(*arrays, *lists, **options)), arrays, lists)


@_once.defjvp
def _no_derivative(name, plan, primals, tangents):
    raise NotImplementedError(
        f'impl="{plan.impl}" is differentiable once, in reverse mode; use impl="xla" for second derivatives'
    )


def _walk(plan, visit, arrays, mask, tiles, k):
    """visit(plan, arrays, mask, tiles) for the N leading entries: all at once, but on a CPU one after the
    other, so that a tile stays in its cache, unless small.
    """
    dtype, (L, S) = wide(arrays[0].dtype), (arrays[0].shape[2], k.shape[2])
    up, right = -L % plan.block_q, -S % plan.block_k
    by = [right if n in (1, 2) else up for n in range(len(arrays))]  # k and v; the others go by query
    pad = lambda x, n: jnp.pad(x, [(0, 0), (0, 0), (0, n), (0, 0)][: x.ndim]) if n else x
    arrays = [pad(x.astype(dtype), n) for x, n in zip(arrays, by, strict=True)]
    if mask is not None and (up or right):
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, up), (0, right)])
    each = lambda arrays, mask: visit(plan, arrays, mask, tiles, L, S)
    if jax.default_backend() != "cpu" or len(arrays[0]) == 1 or arrays[0].shape[1] * L * S < SMALL:
        return each(arrays, mask)
    own = mask is not None and len(mask) > 1

    def one(x):
        arrays, mine = x
        outs = each([y[None] for y in arrays], mine[None] if own else mask)
        return tuple(y[0] for y in outs)

    return lax.map(one, (arrays, mask if own else None))


def _run(step, state, tiles):
    """The state after step(state, entry of a list, cut) on every listed tile."""
    for table, cut in ((tiles.clean, False), (tiles.cut, True)):
        if len(table) == 0:
            continue

        def one(state, at, cut=cut):
            entry, valid = at
            do = lambda state: step(state, entry, cut)
            return (do(state) if valid is None else lax.cond(valid, do, lambda s: s, state)), None

        state = lax.scan(one, state, (table, tiles.valid))[0]
    return state


def _tile(x, head, at, block):
    """Rows `at`.. of one head of x [N, heads, rows, ...]: [N, block, ...]."""
    sizes = (x.shape[0], 1, block, *x.shape[3:])
    return lax.dynamic_slice(x, _corner(x, head, at), sizes)[:, 0]


def _put(x, value, head, at):
    return lax.dynamic_update_slice(x, value[:, None], _corner(x, head, at))


def _corner(x, head, row):
    return np.uint32(0), head, row, *(np.uint32(0),) * (x.ndim - 3)


def _seen(plan, mask, head, i, j, S):
    """Which keys of a tile its queries see: bool [N or 1, block_q, block_k]."""
    shape = 1, plan.block_q, plan.block_k
    row = i.astype(jnp.int32) + lax.broadcasted_iota(jnp.int32, shape, 1)
    col = j.astype(jnp.int32) + lax.broadcasted_iota(jnp.int32, shape, 2)
    seen = col < S
    if plan.hi is not None:
        seen = seen & (col - row <= plan.hi)
    if mask is not None:
        at = np.uint32(0), head if mask.shape[1] > 1 else np.uint32(0), i, j
        seen = seen & lax.dynamic_slice(mask, at, (mask.shape[0], *shape))[:, 0]
    return seen


def _where_any(seen, axis, *arrays):
    """The arrays with rows that see (axis 2), or keys that are seen (axis 1) by, nothing here set to 0."""
    some = seen.any(axis=axis)[..., None]
    return tuple(jnp.where(some, x, 0) for x in arrays)


def _dot(a, b, *, flip_a=False, flip_b=False):
    """[N, I, J] x [N, J, K], operands flipped first; a single product goes without its leading axis, with
    which a CPU would copy what is flipped.
    """
    if len(a) == 1:
        a, b = a[0].T if flip_a else a[0], b[0].T if flip_b else b[0]
        return (a @ b)[None]
    flip = lambda x: x.swapaxes(1, 2)
    return (flip(a) if flip_a else a) @ (flip(b) if flip_b else b)


def _visit_forward(plan, arrays, mask, tiles, L, S):
    q, k, v = arrays
    block_q, block_k = plan.block_q, plan.block_k

    def step(state, at, cut):
        h, g, i, j = at
        vj = _tile(v, g, j, block_k)
        s = plan.scale * _dot(_tile(q, h, i, block_q), _tile(k, g, j, block_k), flip_b=True)
        if cut:
            seen = _seen(plan, mask, h, i, j, S)
            s, (vj,) = jnp.where(seen, s, -jnp.inf), _where_any(seen, 1, vj)
        old = SoftmaxState(*(_tile(x, h, i, block_q) for x in state))
        m = jnp.maximum(old.m, s.max(axis=-1))
        top = shift(m)
        p, fix = jnp.exp(s - top[..., None]), jnp.exp(old.m - top)
        new = SoftmaxState(m, fix * old.l + p.sum(axis=-1), fix[..., None] * old.acc + _dot(p, vj))
        return SoftmaxState(*(_put(x, y, h, i) for x, y in zip(state, new, strict=True)))

    rows = q.shape[:3]
    empty = SoftmaxState(
        jnp.full(rows, -jnp.inf, q.dtype), jnp.zeros(rows, q.dtype), jnp.zeros((*rows, v.shape[3]), q.dtype)
    )
    o, lse = finalize(_run(step, alike(empty, arrays, mask, tiles), tiles))
    return o[:, :, :L], lse[:, :, :L]


def _visit_backward(plan, arrays, mask, tiles, L, S):
    q, k, v, do, lse, delta = arrays
    block_q, block_k = plan.block_q, plan.block_k

    def step(grads, at, cut):
        h, g, i, j = at
        qi, doi = _tile(q, h, i, block_q), _tile(do, h, i, block_q)
        kj, vj = _tile(k, g, j, block_k), _tile(v, g, j, block_k)
        s = plan.scale * _dot(qi, kj, flip_b=True) - _tile(lse, h, i, block_q)[..., None]
        if cut:
            seen = _seen(plan, mask, h, i, j, S)
            s = jnp.where(seen, s, -jnp.inf)
            (kj, vj), (qi, doi) = _where_any(seen, 1, kj, vj), _where_any(seen, 2, qi, doi)
        p = jnp.exp(s)
        ds = plan.scale * p * (_dot(doi, vj, flip_b=True) - _tile(delta, h, i, block_q)[..., None])
        ds = jnp.where(seen, ds, 0) if cut else ds
        dq, dk, dv = grads
        add = lambda x, y, head, at: _put(x, _tile(x, head, at, y.shape[1]) + y, head, at)
        return (
            add(dq, _dot(ds, kj), h, i),
            add(dk, _dot(ds, qi, flip_a=True), g, j),
            add(dv, _dot(p, doi, flip_a=True), g, j),
        )

    zeros = tuple(jnp.zeros_like(x) for x in (q, k, v))
    dq, dk, dv = _run(step, alike(zeros, arrays, mask, tiles), tiles)
    return dq[:, :, :L], dk[:, :, :S], dv[:, :, :S]
