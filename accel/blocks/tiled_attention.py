"""Exact attention by tiles in plain JAX: the loop behind `accel.flash` and `accel.dot_product_attention`.

Query tiles outside, key tiles inside, a running softmax between them: extra memory grows with L + S and not
with L S. Keys that no query of a tile can see for static reasons (causal order, a window) are not visited.

Differentiation is by a rule for the tangent alone, computed by the same tiles from the saved lse: forward
mode runs it, reverse mode is its transpose (which recomputes the probabilities, as Algorithm 4 of Dao et
al. 2022, and meets each tile once), and since it is plain JAX, higher derivatives follow.
"""

from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from accel.blocks.shapes import alike, lift
from accel.blocks.softmax import SoftmaxState, finalize, merge, shift, wide

BANDS = 8  # runs of query tiles, each with its own static range of keys: 1/16 of a causal square is wasted
SMALL = 1 << 16  # scores of one key head below which heads and tiles are batched, not taken in turn


@dataclass(frozen=True)
class Plan:
    """What is static in a call. Key j may be seen by query i only if lo <= j - i <= hi (None: no bound)."""

    scale: float
    lo: int | None
    hi: int | None
    block_q: int
    block_k: int
    dropout_p: float


class Sight(NamedTuple):
    """What is not: axes [..., Hkv, G, L, S], any of them 1; None where all is seen."""

    mask: jax.Array | None  # bool, True = visible
    row_end: jax.Array | None  # int32, without S: keys from there on are invisible to the row
    keep: jax.Array | None  # bool, what dropout keeps


def tiled_attention(
    q,
    k,
    v,
    *,
    scale,
    bias=None,
    mask=None,
    row_end=None,
    keep=None,
    dropout_p=0.0,
    lo=None,
    hi=None,
    block_q=None,
    block_k=None,
    kernel=None,
):
    """softmax(scale q k^T + bias over the visible keys) v -> (o [..., H, L, Dv], lse [..., H, L]).

    Args: q [..., H, L, D], k [..., Hkv, S, D], v [..., Hkv, S, Dv]; H a multiple of Hkv.
      bias: float, broadcastable to [..., H, L, S] with as many axes; mask, keep: bool, likewise.
      row_end: int32, broadcastable to [..., H, L] with as many axes: a row sees keys below it.
      lo, hi: static bounds, lo <= j - i <= hi.
      block_q, block_k: queries and keys a tile; None: what fits a core's cache, 256 rows of 2048 keys.
      kernel: a function of (plan, q, k, v, sight) in the grouped layout to run in place of `attend`; it knows
        neither bias nor dropout.
    Returns: float32, or float64 for float64 input (a kernel's o: as it gives it). A row that sees no key:
      o = 0, lse = -inf, no gradient. Keys and queries that nothing sees, or that see nothing, may hold NaN or
      infinities.
    """
    lead, heads, dtype = q.shape[:-3], q.shape[-3], wide(q.dtype)
    if q.size == 0 or k.shape[-2] == 0:
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype), jnp.full(q.shape[:-1], -jnp.inf, dtype)
    L, S = q.shape[-2], k.shape[-2]
    group = partial(_group, kv_heads=k.shape[-3])
    q, bias, mask, keep = (group(x, axis=-3) for x in (q, bias, mask, keep))
    row_end = group(row_end, axis=-2)
    plan = _plan(q, scale, lo, hi, block_q, block_k, dropout_p)
    keys, rows = _used(mask, row_end, L, S, lo, hi)
    (q,), (k, v) = _zero_unless(rows, q), _zero_unless(keys, k, v)
    if kernel is None:
        bias = None if bias is None else bias.astype(dtype)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        o, lse = attend(plan, q, k, v, bias, Sight(mask, row_end, keep))
    else:
        o, lse = kernel(plan, q, k, v, Sight(mask, row_end, None))
    (o,) = _zero_unless(rows, o)  # a cotangent that is not finite must not come back through padding either
    return o.reshape(*lead, heads, *o.shape[-2:]), lse.reshape(*lead, heads, L)


def tiled_attention_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    *,
    scale,
    mask=None,
    row_end=None,
    keep=None,
    dropout_p=0.0,
    lo=None,
    hi=None,
    block_q=None,
    block_k=None,
    kernel=None,
):
    """(dq, dk, dv) from a given o and lse, in float32 (float64; a kernel's as it gives them).

    kernel: a function of (plan, do, q, k, v, o, lse, sight) to run in place of the tangent's transpose.
    """
    shape, dtype = q.shape, wide(q.dtype)
    if q.size == 0 or k.size == 0:
        return tuple(jnp.zeros(x.shape, dtype) for x in (q, k, v))
    L, S = q.shape[-2], k.shape[-2]
    group = partial(_group, kv_heads=k.shape[-3])
    q, do, o, mask, keep = (group(x, axis=-3) for x in (q, do, o, mask, keep))
    lse, row_end = group(lse, axis=-2), group(row_end, axis=-2)
    plan = _plan(q, scale, lo, hi, block_q, block_k, dropout_p)
    keys, rows = _used(mask, row_end, L, S, lo, hi)
    (q, do, o), (k, v) = _zero_unless(rows, q, do, o), _zero_unless(keys, k, v)
    if kernel is not None:
        dq, dk, dv = kernel(plan, do, q, k, v, o, lse, Sight(mask, row_end, None))
        return dq.reshape(shape), dk, dv
    q, do, o, lse, k, v = (x.astype(dtype) for x in (q, do, o, lse, k, v))
    sight = Sight(mask, row_end, keep)
    along = lambda dq, dk, dv: _tangent(plan, (q, k, v, None, sight), (o, lse), (dq, dk, dv, None))[0]
    dq, dk, dv = jax.linear_transpose(along, q, k, v)(do)
    return dq.reshape(shape), dk, dv


def span(first, last, n, lo, hi):
    """(start, stop): the keys of n that some query of first..last may see, lo <= j - i <= hi.

    span(last, first, ...) are those that all of them may see; with (-hi, -lo), the queries that see a key.
    """
    start = 0 if lo is None else jnp.clip(first + lo, 0, n)
    stop = n if hi is None else jnp.clip(last + hi + 1, 0, n)
    return start, stop


def below(n, block):
    """Tiles that end at or before n >= 0: n // block, without the signs that `//` takes care of."""
    return n // block if isinstance(n, int) else lax.div(n, jnp.asarray(block, n.dtype))


def above(n, block):
    """Tiles that begin before n >= 0: n / block rounded up."""
    return below(n + block - 1, block)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(plan, q, k, v, bias, sight):
    """q [..., Hkv, G, L, D], k [..., Hkv, S, D] -> (o [..., Hkv, G, L, Dv], lse [..., Hkv, G, L])."""

    def head(q, bias, sight, k, v):
        tile = lambda at, band, rows, k, v: _tile(plan, at, band, *rows, k, v)
        return _by_tiles(plan, tile, -jnp.inf, (q, bias, sight), (k, v))

    return _by_heads(head, q.shape, k.shape[-2], (q, bias, sight, k, v))


@attend.defjvp
def _attend_jvp(plan, primals, tangents):
    out = attend(plan, *primals)
    return out, _tangent(plan, primals, out, tangents[:4])


def _tangent(plan, primals, out, tangents):
    """Tangents of (o, lse), linear in those of (q, k, v, bias); tiles recompute P = exp(s - lse)."""
    q, k, v, bias, sight = primals
    dq, dk, dv, dbias = tangents
    # Keys last: transposed, the products give [D, S], which a CPU does three times as fast as [S, D].
    dk, dv = (x.swapaxes(-1, -2) for x in (dk, dv))

    def head(q, bias, sight, o, lse, dq, dbias, k, v, dk, dv):
        tile = lambda at, band, rows, *keys: _tile_tangent(plan, at, band, *rows, *keys)
        return _by_tiles(plan, tile, 0.0, (q, bias, sight, o, lse, dq, dbias), (k, v), (dk, dv))

    return _by_heads(head, q.shape, k.shape[-2], (q, bias, sight, *out, dq, dbias, k, v, dk, dv))


def _tile(plan, at, band, q, bias, sight, k, v):
    """The forward pass of one query tile: q [G, block_q, D] -> (o, lse). at: index of its first query."""

    def chunk(start, size, fresh):
        s, seen = _scores(plan, q, _cut(k, start, size, 0), bias, sight, at, band, start, size, fresh)
        s = s if seen is None else jnp.where(seen, s, -jnp.inf)
        m = s.max(axis=-1)
        p = jnp.exp(s - shift(m)[..., None])
        kept = _dropped(plan, p, sight.keep, band + start, size)
        return SoftmaxState(m, p.sum(axis=-1), _product(kept, _cut(v, start, size, 0)))

    rows = q.shape[:2]
    empty = SoftmaxState(
        jnp.full(rows, -jnp.inf, q.dtype), jnp.zeros(rows, q.dtype), jnp.zeros((*rows, v.shape[1]), q.dtype)
    )
    return finalize(_by_chunks(plan, chunk, merge, alike(empty, q, bias, sight, k, v), k.shape[0]))


def _tile_tangent(plan, at, band, q, bias, sight, o, lse, dq, dbias, k, v, dk, dv):
    """dS = scale (dq k^T + q dk^T) + dbias: do = (P dS) v + P dv - rowsum(P dS) o, dlse = rowsum(P dS)."""

    @partial(jax.checkpoint, prevent_cse=False, static_argnums=(1,))
    def chunk(start, size, fresh):
        kj, vj = _cut(k, start, size, 0), _cut(v, start, size, 0)
        dkj, dvj = _cut(dk, start, size, 1), _cut(dv, start, size, 1)  # [D, size], [Dv, size]
        s, seen = _scores(plan, q, kj, bias, sight, at, band, start, size, fresh)
        s = s - shift(lse)[..., None]
        p = jnp.exp(s if seen is None else jnp.where(seen, s, -jnp.inf))
        ds = plan.scale * (_product(dq, kj.T) + _product(q, dkj))
        if dbias is not None:
            ds = ds + _cut(dbias, band + start, size, 2)
        pds = p * ds
        drop = lambda x: _dropped(plan, x, sight.keep, band + start, size)
        return pds.sum(axis=-1), _product(drop(pds), vj) + _product(drop(p), dvj.T)

    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    zero = jnp.zeros(q.shape[:2], q.dtype), jnp.zeros((*q.shape[:2], v.shape[1]), q.dtype)
    zero = alike(zero, q, bias, sight, o, lse, dq, dbias, k, v, dk, dv)
    r, acc = _by_chunks(plan, chunk, add, zero, k.shape[0])
    return acc - r[..., None] * o, r


def _scores(plan, q, k, bias, sight, at, band, start, size, fresh):
    """Scores of queries from `at` and keys from band + start, and which of them are seen (None: all)."""
    first = band + start
    s = plan.scale * _product(q, k.T)
    if bias is not None:
        s = s + _cut(bias, first, size, 2)
    i = at + lax.broadcasted_iota(jnp.int32, (1, q.shape[1], 1), 1)
    j = first + lax.broadcasted_iota(jnp.int32, (1, 1, size), 2)
    seen = [] if fresh is None else [j >= band + fresh]
    if plan.hi is not None:
        seen.append(j - i <= plan.hi)
    if plan.lo is not None:
        seen.append(j - i >= plan.lo)
    if sight.row_end is not None:
        seen.append(j < sight.row_end[..., None])
    if sight.mask is not None:
        seen.append(_cut(sight.mask, first, size, 2))
    return s, reduce(and_, seen) if seen else None


def _product(a, b):
    """[G, I, J] x [J, K] -> [G, I, K], as one matrix product."""
    return lax.dot(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])


def _dropped(plan, p, keep, first, size):
    if keep is None:
        return p
    return jnp.where(_cut(keep, first, size, 2), p / (1 - plan.dropout_p), 0)


def _cut(x, start, size, axis):
    """x[start : start + size] along an axis, or x itself where that axis is broadcast."""
    if x.shape[axis] == 1:
        return x
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    return lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _by_chunks(plan, chunk, combine, none, width):
    """chunk(start, size, fresh) over the keys 0..width, at most block_k at a time, combined from the left.

    Pieces are equal; where they do not divide the width the last one overlaps its neighbour, and only keys
    from `fresh` on count (None: all).
    """
    n = -(-width // plan.block_k)
    size = -(-width // n)
    if n == 1:
        return chunk(0, size, None)
    fresh = size * jnp.arange(n, dtype=jnp.int32)

    def step(total, at):
        part = chunk(at, size, None) if n * size == width else chunk(jnp.minimum(at, width - size), size, at)
        return combine(total, part), None

    return lax.scan(step, none, fresh)[0]


def _by_tiles(plan, tile, fill, rows, keys, flipped=()):
    """Run tile(at, band, rows, *keys, *flipped) over the query tiles of one key head; band: its first key.

    rows: tree of arrays [G or 1, L or 1, ...], the first of them q; keys: arrays [S, ...]; flipped: [..., S].
    A run of tiles with the same range of keys is one scan; tiles with no keys give 0 and `fill`. Returns the
    two outputs with the tiles joined: [G, L, Dv] and [G, L].
    """
    (G, L, _), S, dtype = rows[0].shape, keys[0].shape[0], rows[0].dtype
    size = min(L, plan.block_q)
    count = -(-L // size)
    leaves, tree = jax.tree.flatten(rows)
    tiled = [x.shape[1] == L for x in leaves]
    split = [_split(x, count, size) if t else x for x, t in zip(leaves, tiled, strict=True)]
    small = G * L * S < SMALL

    def cut(start, width):
        return [_cut(y, start, width, 0) for y in keys] + [_cut(y, start, width, 1) for y in flipped]

    def run(first, last, start, width):
        def one(x):
            at, mine = x
            pieces = iter(mine)
            whole = tree.unflatten([next(pieces) if t else y for y, t in zip(split, tiled, strict=True)])
            if start is not None:
                return tile(at, start, whole, *cut(start, width))
            band = jnp.clip(at + plan.lo, 0, S - width)  # a window: the keys around the tile
            return tile(at, band, whole, *cut(band, width))

        mine = [y[first:last] for y, t in zip(split, tiled, strict=True) if t]
        at = size * jnp.arange(first, last, dtype=jnp.int32)
        if last - first == 1:
            return jax.tree.map(lambda y: y[None], one((at[0], [y[0] for y in mine])))
        return jax.vmap(one)((at, mine)) if small else lax.map(one, (at, mine))

    outs = []
    bands = 1 if small else min(count, BANDS)
    for first, last, start, width in _ranges(plan, L, S, size, count, bands):
        if width > 0:
            outs.append(run(first, last, start, width))
        else:
            nothing = (last - first, G, size)
            outs.append((jnp.zeros((*nothing, keys[1].shape[1]), dtype), jnp.full(nothing, fill, dtype)))
    joined = [jnp.concatenate(x) if len(outs) > 1 else x[0] for x in zip(*outs, strict=True)]
    return tuple(jnp.moveaxis(x, 0, 1).reshape(G, count * size, *x.shape[3:])[:, :L] for x in joined)


def _split(x, count, size):
    """[G, L, ...] -> [count, G, size, ...]: the rows in tiles, the last one padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _ranges(plan, L, S, size, count, bands):
    """[(first tile, last tile, first key, keys)]; the first key None: a window that moves with the tile."""
    lo, hi = plan.lo, plan.hi
    if lo is not None and hi is not None and 0 < (width := size + hi - lo) < S:
        return [(0, count, None, width)]
    bands = 1 if lo is None and hi is None else bands
    edges = [count * b // bands for b in range(bands + 1)]
    found = []
    for first, last in pairwise(edges):
        start = 0 if lo is None else min(max(first * size + lo, 0), S)
        end = S if hi is None else min(max(min(last * size, L) + hi, 0), S)
        found.append((first, last, start, max(end - start, 0)))
    return found


def _by_heads(fn, shape, S, operands):
    """Map fn over the leading axes of q's shape [..., Hkv, G, L, D]; an operand with 1 there is shared.

    On a CPU large heads are taken one after the other, so that a tile stays in cache; else all at once.
    """
    axes, (G, L, _) = shape[:-3], shape[-3:]
    in_turn = jax.default_backend() == "cpu" and G * L * S >= SMALL

    def over(axes, operands):
        if not axes:
            return fn(*operands)
        leaves, tree = jax.tree.flatten(operands)
        one = lambda leaves: over(axes[1:], tree.unflatten(leaves))
        if axes[0] == 1:
            return jax.tree.map(lambda y: y[None], one([lax.squeeze(x, (0,)) for x in leaves]))
        shared = [x.shape[0] == 1 for x in leaves]
        leaves = [lax.squeeze(x, (0,)) if s else x for x, s in zip(leaves, shared, strict=True)]
        if not in_turn:
            return jax.vmap(one, in_axes=([None if s else 0 for s in shared],))(leaves)

        def turn(mapped):
            mapped = iter(mapped)
            return one([x if s else next(mapped) for x, s in zip(leaves, shared, strict=True)])

        return lax.map(turn, [x for x, s in zip(leaves, shared, strict=True) if not s])

    return over(axes, operands)


def _group(x, kv_heads, axis):
    """Split the heads axis of [..., H or 1, L, D] into [..., Hkv or 1, G or 1, L, D]."""
    if x is None:
        return None
    axis += x.ndim
    heads = (kv_heads, -1) if x.shape[axis] > 1 else (1, 1)
    return x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])


def _used(mask, row_end, L, S, lo=None, hi=None):
    """(keys [..., Hkv, S], rows [..., Hkv, G, L]): which are seen, and see, at all; (None, None): all are.

    mask [..., Hkv or 1, G or 1, L or 1, S or 1]; row_end the same without S. Without a mask, a key below some
    row's end counts as seen even if the static bounds hide it from the rows that reach so far.
    """
    i, j = np.arange(L, dtype=np.int32), np.arange(S, dtype=np.int32)
    first = np.zeros_like(i) if lo is None else np.maximum(i + np.int32(lo), 0)
    last = np.full_like(i, S - 1) if hi is None else np.minimum(i + np.int32(hi), S - 1)
    low = np.zeros_like(j) if hi is None else np.maximum(j - np.int32(hi), 0)
    high = np.full_like(j, L - 1) if lo is None else np.minimum(j - np.int32(lo), L - 1)
    rows, keys = jnp.asarray(first <= last), jnp.asarray(low <= high)
    if mask is None and row_end is None:
        return (None, None) if (first <= last).all() and (low <= high).all() else (keys, rows)
    if mask is None:
        end = row_end.max(axis=(-2, -1))[..., None]
        keys = lift(keys, end.ndim) & (lift(jnp.asarray(j), end.ndim) < end)
        return keys, lift(rows, row_end.ndim) & (lift(jnp.asarray(first), row_end.ndim) < row_end)
    seen = mask
    if lo is not None or hi is not None:
        seen = seen & lift(jnp.asarray((j >= first[:, None]) & (j <= last[:, None])), mask.ndim)
    if row_end is not None:
        seen = seen & (lift(jnp.asarray(j), mask.ndim) < row_end[..., None])
    return seen.any(axis=(-3, -2)), seen.any(axis=-1)


def _zero_unless(keep, *arrays):
    """The arrays [..., n, D] with rows where keep [..., n] is False set to 0; keep None keeps all."""
    if keep is None:
        return arrays
    return tuple(jnp.where(lift(keep[..., None], x.ndim), x, 0) for x in arrays)


def _plan(q, scale, lo, hi, block_q, block_k, dropout_p):
    block_q = max(8, 256 // q.shape[-3]) if block_q is None else block_q
    return Plan(float(scale), lo, hi, block_q, 2048 if block_k is None else block_k, float(dropout_p))
