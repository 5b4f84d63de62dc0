"""Block-sparse FlashAttention in Pallas for GPUs (Triton): every program walks the list of its visible tiles.

Lists hold whole tiles first, then those that the causal diagonal or the end of the keys cuts, so that only
the latter are masked. Masks for large blocks are refined to tiles that fit the registers. Scores, statistics
and sums are float32; exponentials are to base 2. One sweep over key tiles gives dk and dv, summed over the
query heads of a group, one over query tiles dq: no atomics.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call
from accel.blocks.softmax import shift
from accel.blocks.tiles import LEAST, attention_tiles
from ref.attention.block_sparse_flash import tiles_in_sight

LOG2E = 1.4426950408889634
STATIC = ("scale", "hi", "block_q", "block_k", "interpret")


def _dot(a, b):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # float32 is not TF32 here
    return lax.dot(a, b, precision=precise, preferred_element_type=jnp.float32)


def _along(index, block, axis):
    return index * block + lax.broadcasted_iota(jnp.int32, (block, 1) if axis == 0 else (1, block), axis)


def _walk(step, carry, clean_ref, num_ref, idx_ref, *at):
    """step(tile, carry, masked) for the listed tiles of `at`: the whole ones, then those that are cut."""
    clean, num = clean_ref[at], num_ref[at]
    body = lambda masked: lambda t, c: step(idx_ref[(*at, t)], c, masked)
    return lax.fori_loop(clean, num, body(True), lax.fori_loop(0, clean, body(False), carry))


def _masked(s, i, j, shape, *, hi, L, S):
    """(scores, -inf where invisible; keys [k, 1] that some query sees; queries [q, 1] that see a key)."""
    block_q, block_k = shape
    col, row = _along(j, block_k, 1), _along(i, block_q, 0)
    seen = jnp.broadcast_to(col < S, s.shape)
    if hi is None:
        return jnp.where(seen, s, -jnp.inf), None, None
    last = jnp.minimum((i + 1) * block_q, L) - 1
    keys = _along(j, block_k, 0) - last <= hi
    queries = j * block_k - row <= hi
    return jnp.where(seen & (col - row <= hi), s, -jnp.inf), keys, queries


def _only(some, *arrays):
    """The arrays, rows of `some` that are False set to 0: 0 * NaN would be NaN."""
    if some is None:
        return arrays
    return tuple(jnp.where(some, x, jnp.zeros((), x.dtype)) for x in arrays)


def _forward_kernel(
    clean_ref, num_ref, idx_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, scale, hi, tile_k, L, S
):
    """clean_ref, num_ref [1 or H, Tr], idx_ref [1 or H, Tr, Tc]; q_ref [tile_q, D], k_ref [S', D], v_ref
    [S', Dv] -> o_ref [tile_q, Dv], lse_ref [tile_q].
    """
    i, h = pl.program_id(0), pl.program_id(1)
    h = h if idx_ref.shape[0] > 1 else 0
    q = q_ref[...]
    tile_q = q.shape[0]

    def step(j, carry, masked):
        m, l, acc = carry
        at = pl.ds(j * tile_k, tile_k)
        s = _dot(q, k_ref[at, :].T) * (scale * LOG2E)
        v = v_ref[at, :]
        if masked:
            s, keys, _ = _masked(s, i, j, (tile_q, tile_k), hi=hi, L=L, S=S)
            (v,) = _only(keys, v)
        m_new = jnp.maximum(m, jnp.max(s, axis=1))
        top = shift(m_new)
        p, fix = jnp.exp2(s - top[:, None]), jnp.exp2(m - top)
        return m_new, fix * l + jnp.sum(p, axis=1), fix[:, None] * acc + _dot(p.astype(v.dtype), v)

    init = (
        jnp.full((tile_q,), -jnp.inf, jnp.float32),
        jnp.zeros((tile_q,), jnp.float32),
        jnp.zeros(o_ref.shape, jnp.float32),
    )
    m, l, acc = _walk(step, init, clean_ref, num_ref, idx_ref, h, i)
    some = l > 0
    l = jnp.where(some, l, 1.0)
    o_ref[...] = (acc / l[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(some, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


def _dq_kernel(
    clean_ref, num_ref, idx_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *, scale, hi,
    tile_k, L, S,
):  # fmt: skip
    """As the forward kernel; do_ref [tile_q, Dv], lse_ref, delta_ref [tile_q] -> dq_ref [tile_q, D]."""
    i, h = pl.program_id(0), pl.program_id(1)
    h = h if idx_ref.shape[0] > 1 else 0
    q, do = q_ref[...], do_ref[...]
    lse, delta = lse_ref[...] * LOG2E, delta_ref[...]

    def step(j, acc, masked):
        at = pl.ds(j * tile_k, tile_k)
        k, v = k_ref[at, :], v_ref[at, :]
        s = _dot(q, k.T) * (scale * LOG2E) - lse[:, None]
        if masked:
            s, keys, _ = _masked(s, i, j, (q.shape[0], tile_k), hi=hi, L=L, S=S)
            k, v = _only(keys, k, v)
        ds = jnp.exp2(s) * (_dot(do, v.T) - delta[:, None])
        ds = jnp.where(jnp.isneginf(s), 0.0, ds) if masked else ds
        return acc + _dot(ds.astype(k.dtype), k)

    acc = _walk(step, jnp.zeros(dq_ref.shape, jnp.float32), clean_ref, num_ref, idx_ref, h, i)
    dq_ref[...] = (acc * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    clean_ref, num_ref, idx_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, scale,
    hi, tile_q, group, L, S,
):  # fmt: skip
    """Lists by column, [1 or H, Tc, Tr]; q_ref [H, L', D], do_ref [H, L', Dv], lse_ref, delta_ref [H, L'],
    k_ref [tile_k, D], v_ref [tile_k, Dv] -> dk_ref, dv_ref likewise. Rows of padding have lse = inf.
    """
    j, kv_head = pl.program_id(0), pl.program_id(1)
    k, v = k_ref[...], v_ref[...]

    def head(g, carry):
        h = kv_head * group + g

        def step(i, carry, masked):
            dk, dv = carry
            at = pl.ds(i * tile_q, tile_q)
            q, do = q_ref[h, at, :], do_ref[h, at, :]
            s = _dot(q, k.T) * (scale * LOG2E) - (lse_ref[h, at] * LOG2E)[:, None]
            delta, vj = delta_ref[h, at][:, None], v
            if masked:
                s, keys, queries = _masked(s, i, j, (tile_q, k.shape[0]), hi=hi, L=L, S=S)
                (vj,), (q, do, delta) = _only(keys, v), _only(queries, q, do, delta)
            p = jnp.exp2(s)
            ds = p * (_dot(do, vj.T) - delta)
            return dk + _dot(ds.astype(q.dtype).T, q), dv + _dot(p.astype(do.dtype).T, do)

        listed = h if idx_ref.shape[0] > 1 else 0
        return _walk(step, carry, clean_ref, num_ref, idx_ref, listed, j)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, group, head, zeros)
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _tile_sizes(block_q, block_k, q, v, *, backward=False):
    """The largest powers of two that divide the blocks, at most 128 (backward 64), and fit."""
    sizes = []
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        sizes.append(min(block & -block, 64 if backward else 128))
        if sizes[-1] < LEAST:
            raise ValueError(f"{name} must be a multiple of {LEAST}, got {block}")
    return attention_tiles(*sizes, q.shape[-1], v.shape[-1], q.dtype, backward=backward)


def _lists(visited, L, S, hi, block_q, block_k, tile_q, tile_k):
    """(clean, num, idx) by row and by column of tiles tile_q x tile_k, refined from the mask's blocks."""
    rows, cols = -(-L // tile_q), -(-S // tile_k)
    visited = jnp.repeat(jnp.repeat(visited, block_q // tile_q, 1), block_k // tile_k, 2)[:, :rows, :cols]
    reach, whole = (jnp.asarray(x)[None] for x in tiles_in_sight(tile_q, tile_k, L, S, hi is not None))
    visited = visited & reach
    whole = visited & whole

    def listed(visited, whole):
        tile = lax.broadcasted_iota(jnp.int32, visited.shape, 2)
        rank = jnp.where(whole, 0, jnp.where(visited, 1, 2)) * visited.shape[2]
        num = lambda x: x.sum(axis=-1, dtype=jnp.int32)
        return num(whole), num(visited), lax.rem(lax.sort(rank + tile), jnp.int32(visited.shape[2]))

    flip = lambda x: x.swapaxes(1, 2)
    return listed(visited, whole), listed(flip(visited), flip(whole))


def _pad(x, *by, value=0):
    """x with its last axes made longer."""
    by = (0,) * (x.ndim - len(by)) + by
    return jnp.pad(x, [(0, n) for n in by], constant_values=value) if any(by) else x


def _call(kernel, grid, inputs, outputs, *, width, interpret, name, **options):
    """The kernel on (array, block shape, index map) inputs -> outputs, given likewise by shape and dtype."""
    return pallas_call(
        partial(kernel, **options),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, *_ in outputs],
        grid=grid,
        in_specs=[pl.BlockSpec(*spec) for _, *spec in inputs],
        out_specs=[pl.BlockSpec(*spec) for _, *spec in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=interpret,
        name=name,
    )(*[x for x, *_ in inputs])


def _whole(x):
    return x, x.shape, lambda *at: (0,) * x.ndim


def _by_row(tile_q, group):
    """Specs of a grid (Tr, H, N): (rows of a query head, all rows of its key head)."""
    rows = lambda x: (x, (None, None, tile_q, *x.shape[3:]), lambda i, h, n: (n, h, i, *(0,) * (x.ndim - 3)))
    keys = lambda x: (x, (None, None, *x.shape[2:]), lambda i, h, n: (n, lax.div(h, group), 0, 0))
    return rows, keys


@partial(jax.jit, static_argnames=STATIC)
def forward(q, k, v, visited, *, scale, hi, block_q, block_k, interpret=False):
    """(o [N, H, L, Dv] in q's dtype, lse [N, H, L] float32).

    Args: q [N, H, L, D], k [N, Hkv, S, D], v [N, Hkv, S, Dv], bfloat16, float16 or float32; visited bool
      [1 or H, Tr, Tc]; hi: key j may be seen by query i if j - i <= hi, or None. Blocks: multiples of 16.
    """
    tile_q, tile_k = _tile_sizes(block_q, block_k, q, v)
    (N, H, L, D), (S, Dv) = q.shape, v.shape[2:]
    up = lambda n: max(16, pl.next_power_of_2(n)) - n
    lists, _ = _lists(visited, L, S, hi, block_q, block_k, tile_q, tile_k)
    q, k, v = _pad(q, -L % tile_q, up(D)), _pad(k, -S % tile_k, up(D)), _pad(v, -S % tile_k, up(Dv))
    rows, keys = _by_row(tile_q, H // k.shape[1])
    shapes = (q.dtype, (*q.shape[:3], v.shape[3])), (jnp.float32, q.shape[:3])
    o, lse = _call(
        _forward_kernel,
        (q.shape[2] // tile_q, H, N),
        [*map(_whole, lists), rows(q), keys(k), keys(v)],
        [rows(jax.ShapeDtypeStruct(shape, dtype)) for dtype, shape in shapes],
        width=q.shape[3], interpret=interpret, name="block_sparse_forward",
        scale=scale, hi=hi, tile_k=tile_k, L=L, S=S,
    )  # fmt: skip
    return o[:, :, :L, :Dv], lse[:, :, :L]


@partial(jax.jit, static_argnames=STATIC)
def backward(do, q, k, v, lse, delta, visited, *, scale, hi, block_q, block_k, interpret=False):
    """(dq, dk, dv) in the dtypes and shapes of q, k, v; lse = inf: no probability.

    Args: do [N, H, L, Dv], lse and delta [N, H, L] float32, delta = rowsum(do * o) less the cotangent of lse;
      the rest as `forward`. Tiles are at most 64 x 64: two sums and five operands share the registers.
    """
    tile_q, tile_k = _tile_sizes(block_q, block_k, q, v, backward=True)
    (N, H, L, D), (S, Dv), group = q.shape, v.shape[2:], q.shape[1] // k.shape[1]
    up = lambda n: max(16, pl.next_power_of_2(n)) - n
    by_row, by_col = _lists(visited, L, S, hi, block_q, block_k, tile_q, tile_k)
    q, do = _pad(q, -L % tile_q, up(D)), _pad(do, -L % tile_q, up(Dv))
    k, v = _pad(k, -S % tile_k, up(D)), _pad(v, -S % tile_k, up(Dv))
    lse, delta = _pad(lse, -L % tile_q, value=jnp.inf), _pad(delta, -L % tile_q)
    common = {"width": q.shape[3], "interpret": interpret, "scale": scale, "hi": hi, "L": L, "S": S}
    rows, keys = _by_row(tile_q, group)
    (dq,) = _call(
        _dq_kernel,
        (q.shape[2] // tile_q, H, N),
        [*map(_whole, by_row), rows(q), keys(k), keys(v), rows(do), rows(lse), rows(delta)],
        [rows(q)],
        name="block_sparse_dq", tile_k=tile_k, **common,
    )  # fmt: skip
    heads = lambda x: (x, (None, *x.shape[1:]), lambda j, m, n: (n, *(0,) * (x.ndim - 1)))
    column = lambda x: (x, (None, None, tile_k, x.shape[3]), lambda j, m, n: (n, m, j, 0))
    dk, dv = _call(
        _dkv_kernel,
        (k.shape[2] // tile_k, k.shape[1], N),
        [*map(_whole, by_col), heads(q), column(k), column(v), heads(do), heads(lse), heads(delta)],
        [column(k), column(v)],
        name="block_sparse_dkv", tile_q=tile_q, group=group, **common,
    )  # fmt: skip
    return dq[:, :, :L, :D], dk[:, :, :S, :D], dv[:, :, :S, :Dv]
