"""FlashAttention in Pallas for TPUs: the forward pass, and a backward pass in two sweeps.

The grid walks the tiles that are summed over innermost; statistics and sums stay in vector memory, in
float32, until the last of them. A tile that no query can see is not computed, and its index is held back at
the edge of what is visible, so that it is not fetched either. One sweep over key tiles gives dk and dv,
summed over the query heads of a group, one over query tiles dq.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call
from accel.blocks.softmax import shift
from accel.blocks.tiled_attention import above, below, span

LANES = 128
STATIC = ("scale", "lo", "hi", "block_q", "block_k", "interpret")


def _dot(a, b, contract):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precise, preferred_element_type=jnp.float32)


ROWS = ((1,), (1,))  # a b^T
PLAIN = ((1,), (0,))  # a b


def _key_tiles(i, S, lo, hi, block_q, block_k):
    """(first, last + 1): the key tiles that query tile i may see for static reasons."""
    start, stop = span(i * block_q, (i + 1) * block_q - 1, S, lo, hi)
    return below(start, block_k), above(stop, block_k)


def _query_tiles(j, L, lo, hi, block_q, block_k):
    """(first, last + 1): the query tiles that may see key tile j."""
    return _key_tiles(j, L, None if hi is None else -hi, None if lo is None else -lo, block_k, block_q)


def _hold(x, first, stop):
    """The index x, held within first..stop - 1 where there is such a tile."""
    return jnp.clip(x, first, jnp.maximum(stop - 1, first))


def _scores(i, j, q, k, end_ref, mask_ref, *, scale, lo, hi, S):
    """Scaled scores [block_q, block_k] of a tile, -inf where invisible."""
    s = _dot(q, k, ROWS) * scale
    row = i * q.shape[0] + lax.broadcasted_iota(jnp.int32, s.shape, 0)
    col = j * k.shape[0] + lax.broadcasted_iota(jnp.int32, s.shape, 1)
    seen = col < S
    if hi is not None:
        seen = seen & (col - row <= hi)
    if lo is not None:
        seen = seen & (col - row >= lo)
    if end_ref is not None:
        seen = seen & (col < end_ref[...])
    if mask_ref is not None:
        seen = seen & (mask_ref[...].astype(jnp.int32) != 0)
    return jnp.where(seen, s, -jnp.inf)


def _split(refs, has_end, has_mask):
    """(end_ref or None, mask_ref or None, the rest)."""
    refs = list(refs)
    end = refs.pop(0) if has_end else None
    return end, refs.pop(0) if has_mask else None, refs


def _forward_kernel(q_ref, k_ref, v_ref, *rest, has, scale, lo, hi, S):
    """q_ref [block_q, D], k_ref [block_k, D], v_ref [block_k, Dv], end_ref [block_q, 1], mask_ref [block_q or
    1, block_k] -> o_ref [block_q, Dv], lse_ref [block_q, 1]; m_ref, l_ref [block_q, 1] and acc_ref
    [block_q, Dv] hold the state.
    """
    end_ref, mask_ref, (o_ref, lse_ref, m_ref, l_ref, acc_ref) = _split(rest, *has)
    i, j = pl.program_id(2), pl.program_id(3)
    (block_q, _), block_k = q_ref.shape, k_ref.shape[0]

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    first, stop = _key_tiles(i, S, lo, hi, block_q, block_k)

    @pl.when((j >= first) & (j < stop))
    def _():
        v = v_ref[...]
        s = _scores(i, j, q_ref[...], k_ref[...], end_ref, mask_ref, scale=scale, lo=lo, hi=hi, S=S)
        m = jnp.maximum(m_ref[...], jnp.max(s, axis=1, keepdims=True))
        top = shift(m)
        p, fix = jnp.exp(s - top), jnp.exp(m_ref[...] - top)
        l_ref[...] = fix * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        acc_ref[...] = fix * acc_ref[...] + _dot(p.astype(v.dtype), v, PLAIN)
        m_ref[...] = m

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        l = l_ref[...]
        some = l > 0
        l = jnp.where(some, l, 1.0)
        o_ref[...] = (acc_ref[...] / l).astype(o_ref.dtype)
        lse_ref[...] = jnp.where(some, m_ref[...] + jnp.log(l), -jnp.inf)


def _dq_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest, has, scale, lo, hi, S):
    """As the forward kernel, with do_ref [block_q, Dv], lse_ref, delta_ref [block_q, 1] -> dq_ref
    [block_q, D]; acc_ref likewise.
    """
    end_ref, mask_ref, (dq_ref, acc_ref) = _split(rest, *has)
    i, j = pl.program_id(2), pl.program_id(3)
    (block_q, _), block_k = q_ref.shape, k_ref.shape[0]

    @pl.when(j == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    first, stop = _key_tiles(i, S, lo, hi, block_q, block_k)

    @pl.when((j >= first) & (j < stop))
    def _():
        k = k_ref[...]
        s = _scores(i, j, q_ref[...], k, end_ref, mask_ref, scale=scale, lo=lo, hi=hi, S=S)
        ds = jnp.exp(s - lse_ref[...]) * (_dot(do_ref[...], v_ref[...], ROWS) - delta_ref[...])
        acc_ref[...] += _dot(ds.astype(k.dtype), k, PLAIN)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = (acc_ref[...] * scale).astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest, has, scale, lo, hi, L, S):
    """The same tiles on a grid (B, key tiles, G, query tiles) -> dk_ref [block_k, D], dv_ref [block_k, Dv];
    dk_acc, dv_acc likewise. Rows of padding have lse = inf, hence no probability.
    """
    end_ref, mask_ref, (dk_ref, dv_ref, dk_acc, dv_acc) = _split(rest, *has)
    j, g, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    (block_q, _), block_k = q_ref.shape, k_ref.shape[0]

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    first, stop = _query_tiles(j, L, lo, hi, block_q, block_k)

    @pl.when((i >= first) & (i < stop))
    def _():
        q, do = q_ref[...], do_ref[...]
        s = _scores(i, j, q, k_ref[...], end_ref, mask_ref, scale=scale, lo=lo, hi=hi, S=S)
        p = jnp.exp(s - lse_ref[...])
        ds = p * (_dot(do, v_ref[...], ROWS) - delta_ref[...])
        dk_acc[...] += _dot(ds.T.astype(q.dtype), q, PLAIN)
        dv_acc[...] += _dot(p.T.astype(do.dtype), do, PLAIN)

    @pl.when((g == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _tiles(q, k, v, block_q, block_k):
    """Tile sizes no longer than the call, and what to pad: (block_q, block_k, {axis: by})."""
    for name, size, unit in (("block_q", block_q, 16), ("block_k", block_k, LANES)):
        if size < unit or size % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, got {size}")
    up = lambda n, unit: n + -n % unit
    (L, D), (S, Dv) = q.shape[-2:], v.shape[-2:]
    block_q, block_k = min(block_q, up(L, 16)), min(block_k, up(S, LANES))
    return block_q, block_k, {"L": -L % block_q, "S": -S % block_k, "D": -D % LANES, "Dv": -Dv % LANES}


def _pad(x, *by, value=0):
    """x with its last axes made longer."""
    by = (0,) * (x.ndim - len(by)) + by
    return jnp.pad(x, [(0, n) for n in by], constant_values=value) if any(by) else x


def _padded(pads, q, k, v, end, mask):
    """The inputs that all kernels share, padded: a row of padding sees nothing. Rows get a last axis of 1."""
    q, k, v = _pad(q, pads["L"], pads["D"]), _pad(k, pads["S"], pads["D"]), _pad(v, pads["S"], pads["Dv"])
    end = None if end is None else _pad(end, pads["L"])[..., None]
    if mask is not None:
        mask = _pad(mask, pads["L"] if mask.shape[2] > 1 else 0, pads["S"])
    return q, k, v, end, mask


def _maybe(spec, x):
    return None if x is None else spec(x)


def _run(kernel, grid, inputs, outputs, scratch, *, has, summed, interpret, name, **options):
    """The kernel on (array, block shape, index map) inputs, None left out -> outputs; `summed` grid axes, the
    last ones, are taken in order.
    """
    inputs = [x for x in inputs if x is not None]
    order = ("parallel",) * (len(grid) - summed) + ("arbitrary",) * summed
    return pallas_call(
        partial(kernel, has=has, **options),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for (dtype, shape), *_ in outputs],
        grid=grid,
        in_specs=[pl.BlockSpec(*spec) for _, *spec in inputs],
        out_specs=[pl.BlockSpec(*spec) for _, *spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=interpret,
        name=name,
    )(*[x for x, *_ in inputs])


def _specs(at, block_q, block_k):
    """(rows, keys, mask): functions that give an array its block and index; at: grid ids -> (b, g, i, j)."""

    def rows(x):
        return x, (None, None, block_q, x.shape[3]), lambda *ids: (*at(*ids)[:3], 0)

    def keys(x):
        return x, (None, block_k, x.shape[2]), lambda *ids: (at(*ids)[0], at(*ids)[3], 0)

    def masked(x):
        wide = [n > 1 for n in x.shape[:3]]
        index = lambda *ids: (
            *(a if w else 0 for a, w in zip(at(*ids)[:3], wide, strict=True)),
            at(*ids)[3],
        )
        return x, (None, None, block_q if wide[2] else 1, block_k), index

    return rows, keys, masked


@partial(jax.jit, static_argnames=STATIC)
def forward(
    q, k, v, end=None, mask=None, *, scale, lo=None, hi=None, block_q=128, block_k=128, interpret=False
):
    """(o [B, G, L, Dv] in q's dtype, lse [B, G, L] float32) for G query heads on each of B key heads.

    Args: q [B, G, L, D], k [B, S, D], v [B, S, Dv], bfloat16, float16 or float32; end int32 [B, G, L]: a row
      sees keys below it; mask int8 [B or 1, G or 1, L or 1, S], not 0 = visible; lo <= j - i <= hi, if given.
      block_q a multiple of 16, block_k of 128.
    """
    block_q, block_k, pads = _tiles(q, k, v, block_q, block_k)
    (L, S, Dv), has = (q.shape[2], *v.shape[1:]), (end is not None, mask is not None)
    q, k, v, end, mask = _padded(pads, q, k, v, end, mask)
    B, G, tall, _ = q.shape
    rows, keys, masked = _specs(_walk_keys(S, lo, hi, block_q, block_k), block_q, block_k)
    out = lambda dtype, *shape: ((dtype, shape), *rows(jax.ShapeDtypeStruct(shape, dtype))[1:])
    o, lse = _run(
        _forward_kernel,
        (B, G, tall // block_q, k.shape[1] // block_k),
        [rows(q), keys(k), keys(v), _maybe(rows, end), _maybe(masked, mask)],
        [out(q.dtype, B, G, tall, v.shape[2]), out(jnp.float32, B, G, tall, 1)],
        [(block_q, 1), (block_q, 1), (block_q, v.shape[2])],
        has=has, summed=1, interpret=interpret, name="flash_forward", scale=scale, lo=lo, hi=hi, S=S,
    )  # fmt: skip
    return o[:, :, :L, :Dv], lse[:, :, :L, 0]


def _walk_keys(S, lo, hi, block_q, block_k):
    """Grid ids (b, g, query tile, key tile) -> the tiles to fetch."""
    return lambda b, g, i, j: (b, g, i, _hold(j, *_key_tiles(i, S, lo, hi, block_q, block_k)))


@partial(jax.jit, static_argnames=STATIC)
def backward(
    do, q, k, v, lse, delta, end=None, mask=None, *, scale, lo=None, hi=None, block_q=128, block_k=128,
    interpret=False,
):  # fmt: skip
    """(dq, dk, dv) in the dtypes and shapes of q, k, v, dk and dv summed over G; lse = inf: no probability.

    Args: do [B, G, L, Dv], lse and delta [B, G, L] float32, delta = rowsum(do * o) less the cotangent of lse;
      the rest as `forward`.
    """
    block_q, block_k, pads = _tiles(q, k, v, block_q, block_k)
    (L, D), (S, Dv) = q.shape[2:], v.shape[1:]
    has = end is not None, mask is not None
    q, k, v, end, mask = _padded(pads, q, k, v, end, mask)
    do = _pad(do, pads["L"], pads["Dv"])
    lse = _pad(lse, pads["L"], value=jnp.inf)[..., None]
    delta = _pad(delta, pads["L"])[..., None]
    B, G, tall, wide = q.shape
    grid = tall // block_q, k.shape[1] // block_k
    common = {"has": has, "interpret": interpret, "scale": scale, "lo": lo, "hi": hi, "S": S}

    def inputs(rows, keys, masked):
        found = [rows(q), keys(k), keys(v), rows(do), rows(lse), rows(delta)]
        return [*found, _maybe(rows, end), _maybe(masked, mask)]

    specs = _specs(_walk_keys(S, lo, hi, block_q, block_k), block_q, block_k)
    out = ((q.dtype, q.shape), *specs[0](q)[1:])
    scratch = [(block_q, wide)]
    dq = _run(_dq_kernel, (B, G, *grid), inputs(*specs), [out], scratch, summed=1, name="flash_dq", **common)[
        0
    ]

    walk = lambda b, j, g, i: (b, g, _hold(i, *_query_tiles(j, L, lo, hi, block_q, block_k)), j)
    specs = _specs(walk, block_q, block_k)
    outs = [((x.dtype, x.shape), *specs[1](x)[1:]) for x in (k, v)]
    scratch = [(block_k, wide), (block_k, v.shape[2])]
    dk, dv = _run(
        _dkv_kernel, (B, grid[1], G, grid[0]), inputs(*specs), outs, scratch, summed=2, name="flash_dkv", L=L,
        **common,
    )  # fmt: skip
    return dq[:, :, :L, :D], dk[:, :S, :D], dv[:, :S, :Dv]
