"""FlashAttention in Pallas for GPUs (Triton): the forward pass, and a backward pass in two sweeps.

Scores, statistics and sums are float32 in registers. Exponentials are taken to base 2 with the scale folded
in; tiles that no query can see are not visited, and only tiles on an edge of what is visible are masked. One
sweep over key tiles gives dk and dv, summed over the query heads of a group, one over query tiles dq: no
atomics, so that the same call gives the same bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call
from accel.blocks.softmax import shift
from accel.blocks.tiled_attention import above, below, span
from accel.blocks.tiles import attention_tiles

LOG2E = 1.4426950408889634
STATIC = ("scale", "lo", "hi", "block_q", "block_k", "interpret")


def _dot(a, b):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # float32 is not TF32 here
    return lax.dot(a, b, precision=precise, preferred_element_type=jnp.float32)


def _visit(step, carry, first, clean, last):
    """step(j, carry, masked) for tiles first..last; those in `clean`, (start, stop) or None, need no mask."""
    masked, plain = (lambda j, c, m=m: step(j, c, m) for m in (True, False))
    if clean is None:
        return lax.fori_loop(first, last, masked, carry)
    a = jnp.clip(clean[0], first, last)
    b = jnp.clip(clean[1], a, last)
    for start, stop, body in ((first, a, masked), (a, b, plain), (b, last, masked)):
        carry = lax.fori_loop(start, stop, body, carry)
    return carry


def _keys(i, end_ref, mask_ref, *, S, lo, hi, block_q, block_k):
    """(first tile, clean tiles, last tile) of the keys that query tile i sees."""
    top, bottom = i * block_q, (i + 1) * block_q - 1
    start, stop = span(top, bottom, S, lo, hi)
    inner, outer = span(bottom, top, S, lo, hi)
    if end_ref is not None:
        stop = jnp.minimum(stop, jnp.max(end_ref[...]))
        outer = jnp.minimum(outer, jnp.min(end_ref[...]))
    clean = None if mask_ref is not None else (above(inner, block_k), below(outer, block_k))
    return below(start, block_k), clean, above(stop, block_k)


def _seen(rows, cols, end, mask, *, lo, hi, S=None):
    """Which keys `cols` [1, k] the queries `rows` [q, 1] see: bool [q, k]. S: number of keys, or None."""
    seen = jnp.broadcast_to(True if S is None else cols < S, (rows.shape[0], cols.shape[1]))
    if hi is not None:
        seen = seen & (cols - rows <= hi)
    if lo is not None:
        seen = seen & (cols - rows >= lo)
    if end is not None:
        seen = seen & (cols < end[:, None])
    return seen if mask is None else seen & (mask != 0)


def _rows(i, block):
    return i * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)


def _cols(j, block):
    return j * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)


def _split(refs, has_end, has_mask):
    """(end_ref or None, mask_ref or None, the rest)."""
    refs = list(refs)
    end = refs.pop(0) if has_end else None
    return end, refs.pop(0) if has_mask else None, refs


def _forward_kernel(q_ref, k_ref, v_ref, *rest, has, scale, lo, hi, block_q, block_k, S):
    """q_ref [block_q, D], k_ref [S', D], v_ref [S', Dv], end_ref [block_q], mask_ref [block_q or 1, S'] ->
    o_ref [block_q, Dv], lse_ref [block_q].
    """
    end_ref, mask_ref, (o_ref, lse_ref) = _split(rest, *has)
    i = pl.num_programs(0) - 1 - pl.program_id(0)  # causal: the longest rows first
    rows, q = _rows(i, block_q), q_ref[...]
    end = None if end_ref is None else end_ref[...]

    def step(j, carry, masked):
        m, l, acc = carry
        at = pl.ds(j * block_k, block_k)
        s = _dot(q, k_ref[at, :].T) * (scale * LOG2E)
        if masked:
            mask = None if mask_ref is None else mask_ref[:, at]
            s = jnp.where(_seen(rows, _cols(j, block_k), end, mask, lo=lo, hi=hi, S=S), s, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(s, axis=1))
        top = shift(m_new)
        p, fix = jnp.exp2(s - top[:, None]), jnp.exp2(m - top)
        v = v_ref[at, :]
        return m_new, fix * l + jnp.sum(p, axis=1), fix[:, None] * acc + _dot(p.astype(v.dtype), v)

    init = (
        jnp.full((block_q,), -jnp.inf, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
        jnp.zeros(o_ref.shape, jnp.float32),
    )
    tiles = _keys(i, end_ref, mask_ref, S=S, lo=lo, hi=hi, block_q=block_q, block_k=block_k)
    m, l, acc = _visit(step, init, *tiles)
    some = l > 0
    l = jnp.where(some, l, 1.0)
    o_ref[...] = (acc / l[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(some, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


def _dq_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest, has, scale, lo, hi, block_q, block_k, S
):
    """As the forward kernel; do_ref [block_q, Dv], lse_ref, delta_ref [block_q] -> dq_ref [block_q, D]."""
    end_ref, mask_ref, (dq_ref,) = _split(rest, *has)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows, q, do = _rows(i, block_q), q_ref[...], do_ref[...]
    lse, delta = lse_ref[...] * LOG2E, delta_ref[...]
    end = None if end_ref is None else end_ref[...]

    def step(j, acc, masked):
        at = pl.ds(j * block_k, block_k)
        k = k_ref[at, :]
        s = _dot(q, k.T) * (scale * LOG2E) - lse[:, None]
        if masked:
            mask = None if mask_ref is None else mask_ref[:, at]
            s = jnp.where(_seen(rows, _cols(j, block_k), end, mask, lo=lo, hi=hi, S=S), s, -jnp.inf)
        ds = jnp.exp2(s) * (_dot(do, v_ref[at, :].T) - delta[:, None])
        return acc + _dot(ds.astype(k.dtype), k)

    tiles = _keys(i, end_ref, mask_ref, S=S, lo=lo, hi=hi, block_q=block_q, block_k=block_k)
    acc = _visit(step, jnp.zeros(dq_ref.shape, jnp.float32), *tiles)
    dq_ref[...] = (acc * scale).astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest, has, scale, lo, hi, block_q, block_k):
    """q_ref [G, L', D], do_ref [G, L', Dv], lse_ref, delta_ref, end_ref [G, L'], mask_ref [G or 1, L' or 1,
    block_k], k_ref [block_k, D], v_ref [block_k, Dv] -> dk_ref, dv_ref likewise. Rows of padding have
    lse = inf, hence no probability.
    """
    end_ref, mask_ref, (dk_ref, dv_ref) = _split(rest, *has)
    j, (G, L) = pl.program_id(0), q_ref.shape[:2]
    cols, k, v = _cols(j, block_k), k_ref[...], v_ref[...]
    lo_q, hi_q = None if hi is None else -hi, None if lo is None else -lo
    left, right = j * block_k, (j + 1) * block_k - 1
    start, stop = span(left, right, L, lo_q, hi_q)
    inner, outer = span(right, left, L, lo_q, hi_q)
    clean = (above(inner, block_q), below(outer, block_q)) if has == (False, False) else None

    def head(g, carry):
        def step(i, carry, masked):
            dk, dv = carry
            at = pl.ds(i * block_q, block_q)
            q, do = q_ref[g, at, :], do_ref[g, at, :]
            s = _dot(q, k.T) * (scale * LOG2E) - (lse_ref[g, at] * LOG2E)[:, None]
            if masked:
                end = None if end_ref is None else end_ref[g, at]
                mask = None if mask_ref is None else _mask_rows(mask_ref, g, at)
                s = jnp.where(_seen(_rows(i, block_q), cols, end, mask, lo=lo, hi=hi), s, -jnp.inf)
            p = jnp.exp2(s)
            ds = p * (_dot(do, v.T) - delta_ref[g, at][:, None])
            return dk + _dot(ds.astype(q.dtype).T, q), dv + _dot(p.astype(do.dtype).T, do)

        return _visit(step, carry, below(start, block_q), clean, above(stop, block_q))

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, G, head, zeros)
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _mask_rows(mask_ref, g, at):
    """A tile of the mask, [block_q or 1, block_k]."""
    g = g if mask_ref.shape[0] > 1 else 0
    return mask_ref[g, at, :] if mask_ref.shape[1] > 1 else mask_ref[g, :, :]


def _tiles(q, k, v, block_q, block_k, *, backward=False):
    """Tile sizes no longer than the call, which fit, and what to pad: (block_q, block_k, {axis: by})."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two, at least 16, got {size}")
    up = lambda n: max(16, pl.next_power_of_2(n))
    (L, D), (S, Dv) = q.shape[-2:], v.shape[-2:]
    sizes = min(block_q, up(L)), min(block_k, up(S))
    block_q, block_k = attention_tiles(*sizes, D, Dv, q.dtype, backward=backward)
    return block_q, block_k, {"L": -L % block_q, "S": -S % block_k, "D": up(D) - D, "Dv": up(Dv) - Dv}


def _pad(x, *by, value=0):
    """x with its last axes made longer."""
    by = (0,) * (x.ndim - len(by)) + by
    return jnp.pad(x, [(0, n) for n in by], constant_values=value) if any(by) else x


def _padded(pads, q, k, v, end, mask):
    """The inputs that all kernels share, padded: a row of padding sees nothing."""
    q, k, v = _pad(q, pads["L"], pads["D"]), _pad(k, pads["S"], pads["D"]), _pad(v, pads["S"], pads["Dv"])
    end = None if end is None else _pad(end, pads["L"])
    if mask is not None:
        mask = _pad(mask, pads["L"] if mask.shape[2] > 1 else 0, pads["S"])
    return q, k, v, end, mask


def _run(kernel, grid, inputs, outputs, *, has, warps, interpret, name, **options):
    """The kernel on (array, block shape, index map) inputs, None left out, -> outputs."""
    inputs = [x for x in inputs if x is not None]
    return pallas_call(
        partial(kernel, has=has, **options),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for (dtype, shape), *_ in outputs],
        grid=grid,
        in_specs=[pl.BlockSpec(*spec) for _, *spec in inputs],
        out_specs=[pl.BlockSpec(*spec) for _, *spec in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*[x for x, *_ in inputs])


def _by_query(T, block_q, q, k, v, end, mask):
    """Inputs of a grid (T query tiles, G, B), the last tile first."""
    row = lambda i, g, b: (b, g, T - 1 - i)
    whole = lambda i, g, b: (b, 0, 0)
    tile = lambda x: (x, (None, None, block_q, *x.shape[3:]), lambda *at: (*row(*at), *(0,) * (x.ndim - 3)))
    if mask is not None:
        wide = [n > 1 for n in mask.shape[:3]]
        at = lambda *ids: (*(x if w else 0 for x, w in zip(row(*ids), wide, strict=True)), 0)
        mask = mask, (None, None, block_q if wide[2] else 1, mask.shape[3]), at
    keys = [(x, (None, *x.shape[1:]), whole) for x in (k, v)]
    return tile, [tile(q), *keys], [None if end is None else tile(end), mask]


@partial(jax.jit, static_argnames=STATIC)
def forward(
    q, k, v, end=None, mask=None, *, scale, lo=None, hi=None, block_q=128, block_k=128, interpret=False
):
    """(o [B, G, L, Dv] in q's dtype, lse [B, G, L] float32) for G query heads on each of B key heads.

    Args: q [B, G, L, D], k [B, S, D], v [B, S, Dv], bfloat16, float16 or float32; end int32 [B, G, L]: a row
      sees keys below it; mask int8 [B or 1, G or 1, L or 1, S], not 0 = visible; lo <= j - i <= hi, if given.
      Tiles are powers of two, at least 16.
    """
    block_q, block_k, pads = _tiles(q, k, v, block_q, block_k)
    (L, S, Dv), has = (q.shape[2], *v.shape[1:]), (end is not None, mask is not None)
    q, k, v, end, mask = _padded(pads, q, k, v, end, mask)
    T = q.shape[2] // block_q
    tile, inputs, extra = _by_query(T, block_q, q, k, v, end, mask)
    out = lambda dtype, *shape: ((dtype, shape), *tile(jax.ShapeDtypeStruct(shape, dtype))[1:])
    o, lse = _run(
        _forward_kernel,
        (T, q.shape[1], q.shape[0]),
        inputs + extra,
        [out(q.dtype, *q.shape[:3], v.shape[2]), out(jnp.float32, *q.shape[:3])],
        has=has, warps=4 if q.shape[3] <= 64 else 8, interpret=interpret, name="flash_forward",
        scale=scale, lo=lo, hi=hi, block_q=block_q, block_k=block_k, S=S,
    )  # fmt: skip
    return o[:, :, :L, :Dv], lse[:, :, :L]


@partial(jax.jit, static_argnames=STATIC)
def backward(
    do, q, k, v, lse, delta, end=None, mask=None, *, scale, lo=None, hi=None, block_q=128, block_k=128,
    interpret=False,
):  # fmt: skip
    """(dq, dk, dv) in the dtypes and shapes of q, k, v, dk and dv summed over G; lse = inf: no probability.

    Args: do [B, G, L, Dv], lse and delta [B, G, L] float32, delta = rowsum(do * o) less the cotangent of lse;
      the rest as `forward`. Tiles are cut to 64 x 64: two sums and five operands share the registers.
    """
    block_q, block_k, pads = _tiles(q, k, v, min(block_q, 64), min(block_k, 64), backward=True)
    (L, D), (S, Dv) = q.shape[2:], v.shape[1:]
    has = end is not None, mask is not None
    q, k, v, end, mask = _padded(pads, q, k, v, end, mask)
    do = _pad(do, pads["L"], pads["Dv"])
    lse, delta = _pad(lse, pads["L"], value=jnp.inf), _pad(delta, pads["L"])
    B, G, tall, wide = q.shape
    warps = 4 if wide <= 64 else 8
    common = {
        "has": has, "interpret": interpret, "warps": warps, "scale": scale, "lo": lo, "hi": hi,
        "block_q": block_q, "block_k": block_k,
    }  # fmt: skip
    T = tall // block_q
    tile, inputs, extra = _by_query(T, block_q, q, k, v, end, mask)
    rows = [tile(x) for x in (do, lse, delta)]
    dq_out = ((q.dtype, q.shape), *tile(q)[1:])
    (dq,) = _run(_dq_kernel, (T, G, B), inputs + rows + extra, [dq_out], S=S, name="flash_dq", **common)

    whole = lambda x: (x, (None, *x.shape[1:]), lambda j, b: (b, *(0,) * (x.ndim - 1)))
    column = lambda x: (x, (None, block_k, x.shape[2]), lambda j, b: (b, j, 0))
    if mask is not None:
        each = mask.shape[0] > 1
        mask = mask, (None, *mask.shape[1:3], block_k), lambda j, b: (b if each else 0, 0, 0, j)
    inputs = [whole(q), column(k), column(v), whole(do), whole(lse), whole(delta)]
    inputs += [None if end is None else whole(end), mask]
    outputs = [((x.dtype, x.shape), *column(x)[1:]) for x in (k, v)]
    dk, dv = _run(_dkv_kernel, (k.shape[1] // block_k, B), inputs, outputs, name="flash_dkv", **common)
    return dq[:, :, :L, :D], dk[:, :S, :D], dv[:, :S, :Dv]
