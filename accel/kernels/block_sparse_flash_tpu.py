"""Block-sparse FlashAttention in Pallas for TPUs: one grid step a visible tile, its place prefetched.

The tiles stand in one list, by row for the forward pass and dq, by column for dk and dv; the list goes to the
scalar memory before the kernel starts, and the index maps read it there. Flags say where a row's sums begin
and end. Rows of unequal length cost nothing (a grid of rows times the longest row would), and a row without
a visible tile has one entry that computes nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from accel.blocks.kernel import pallas_call
from accel.blocks.softmax import shift

LANES = 128
VALID, WHOLE, FIRST, LAST = 1, 2, 4, 8  # flags of an entry
STATIC = ("scale", "hi", "block_q", "block_k", "interpret")
ROWS = ((1,), (1,))  # a b^T
PLAIN = ((1,), (0,))  # a b


def _dot(a, b, contract):
    precise = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precise, preferred_element_type=jnp.float32)


def _seen(i, j, block_q, block_k, *, hi, L, S):
    """(visible [q, k], keys [k, 1] that some query of the tile sees, queries [q, 1] that see some)."""
    iota = lambda shape, axis: lax.broadcasted_iota(jnp.int32, shape, axis)
    row, col = (i * block_q + iota((block_q, block_k), 0), j * block_k + iota((block_q, block_k), 1))
    queries, keys = i * block_q + iota((block_q, 1), 0), j * block_k + iota((block_k, 1), 0)
    if hi is None:
        return col < S, keys < S, queries < L
    last = jnp.minimum((i + 1) * block_q, L) - 1
    return (col < S) & (col - row <= hi), (keys < S) & (keys - last <= hi), j * block_k - queries <= hi


def _only(some, x):
    return jnp.where(some, x, jnp.zeros((), x.dtype))  # 0 * NaN would be NaN


def _flag(flags, which):
    return jnp.bitwise_and(flags, which) != 0


def _forward_kernel(
    h_ref, i_ref, j_ref, flags_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, m_ref, l_ref, acc_ref, *, scale, hi,
    L, S,
):  # fmt: skip
    """q_ref [block_q, D], k_ref [block_k, D], v_ref [block_k, Dv] -> o_ref [block_q, Dv], lse_ref
    [block_q, 1]; m_ref, l_ref [block_q, 1] and acc_ref [block_q, Dv] hold the state.
    """
    t = pl.program_id(1)
    flags = flags_ref[t]

    @pl.when(_flag(flags, FIRST))
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(s, v):
        m = jnp.maximum(m_ref[...], jnp.max(s, axis=1, keepdims=True))
        top = shift(m)
        p, fix = jnp.exp(s - top), jnp.exp(m_ref[...] - top)
        l_ref[...] = fix * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        acc_ref[...] = fix * acc_ref[...] + _dot(p.astype(v.dtype), v, PLAIN)
        m_ref[...] = m

    @pl.when(_flag(flags, WHOLE))
    def _():
        add(_dot(q_ref[...], k_ref[...], ROWS) * scale, v_ref[...])

    @pl.when(_flag(flags, VALID) & ~_flag(flags, WHOLE))
    def _():
        s = _dot(q_ref[...], k_ref[...], ROWS) * scale
        seen, keys, _ = _seen(i_ref[t], j_ref[t], *s.shape, hi=hi, L=L, S=S)
        add(jnp.where(seen, s, -jnp.inf), _only(keys, v_ref[...]))

    @pl.when(_flag(flags, LAST))
    def _():
        l = l_ref[...]
        some = l > 0
        l = jnp.where(some, l, 1.0)
        o_ref[...] = (acc_ref[...] / l).astype(o_ref.dtype)
        lse_ref[...] = jnp.where(some, m_ref[...] + jnp.log(l), -jnp.inf)


def _dq_kernel(
    h_ref, i_ref, j_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, acc_ref, *,
    scale, hi, L, S,
):  # fmt: skip
    """As the forward kernel, with do_ref [block_q, Dv], lse_ref, delta_ref [block_q, 1] -> dq_ref."""
    t = pl.program_id(1)
    flags = flags_ref[t]

    @pl.when(_flag(flags, FIRST))
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(_flag(flags, VALID))
    def _():
        s = _dot(q_ref[...], k_ref[...], ROWS) * scale
        seen, keys, _ = _seen(i_ref[t], j_ref[t], *s.shape, hi=hi, L=L, S=S)
        k, v = _only(keys, k_ref[...]), _only(keys, v_ref[...])
        p = jnp.exp(jnp.where(seen, s - lse_ref[...], -jnp.inf))
        ds = jnp.where(seen, p * (_dot(do_ref[...], v, ROWS) - delta_ref[...]), 0.0)
        acc_ref[...] += _dot(ds.astype(k.dtype), k, PLAIN)

    @pl.when(_flag(flags, LAST))
    def _():
        dq_ref[...] = (acc_ref[...] * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    m_ref, j_ref, r_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, dk_acc,
    dv_acc, *, scale, hi, L, S, rows,
):  # fmt: skip
    """The list by column: r = (query head of the group) * rows + (row of tiles); sums dk_acc, dv_acc."""
    t = pl.program_id(1)
    flags = flags_ref[t]

    @pl.when(_flag(flags, FIRST))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(_flag(flags, VALID))
    def _():
        s = _dot(q_ref[...], k_ref[...], ROWS) * scale
        seen, keys, queries = _seen(lax.rem(r_ref[t], rows), j_ref[t], *s.shape, hi=hi, L=L, S=S)
        q, do, v = _only(queries, q_ref[...]), _only(queries, do_ref[...]), _only(keys, v_ref[...])
        p = jnp.exp(jnp.where(seen, s - lse_ref[...], -jnp.inf))
        ds = p * (_dot(do, v, ROWS) - _only(queries, delta_ref[...]))
        dk_acc[...] += _dot(ds.T.astype(q.dtype), q, PLAIN)
        dv_acc[...] += _dot(p.T.astype(do.dtype), do, PLAIN)

    @pl.when(_flag(flags, LAST))
    def _():
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _pad(x, *by, value=0):
    """x with its last axes made longer."""
    by = (0,) * (x.ndim - len(by)) + by
    return jnp.pad(x, [(0, n) for n in by], constant_values=value) if any(by) else x


def _call(kernel, table, inputs, outputs, scratch, *, N, interpret, name, **options):
    """The kernel on (array, block shape, index map) inputs, a grid step an entry of the table."""
    return pallas_call(
        partial(kernel, **options),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, *_ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(N, table.shape[0]),
            in_specs=[pl.BlockSpec(*spec) for _, *spec in inputs],
            out_specs=[pl.BlockSpec(*spec) for _, *spec in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(*table.T, *[x for x, *_ in inputs])


def _by_row(block_q, block_k, group):
    """Specs of (a tile of queries, a tile of the keys of its key head) for the list by row."""
    rows = lambda x: (x, (None, None, block_q, x.shape[3]), lambda n, t, h, i, j, f: (n, h[t], i[t], 0))
    at = lambda n, t, h, i, j, f: (n, lax.div(h[t], group), j[t], 0)
    return rows, lambda x: (x, (None, None, block_k, x.shape[3]), at)


@partial(jax.jit, static_argnames=STATIC)
def forward(q, k, v, by_row, *, scale, hi, block_q, block_k, interpret=False):
    """(o [N, H, L, Dv] in q's dtype, lse [N, H, L] float32).

    Args: q [N, H, L, D], k [N, Hkv, S, D], v [N, Hkv, S, Dv], bfloat16, float16 or float32; by_row int32
      [n, 4]: query head, row and column of tiles, flags; hi: key j may be seen if j - i <= hi, or None.
      block_q a multiple of 16, block_k of 128.
    """
    (N, H, L, _), (S, Dv) = q.shape, v.shape[2:]
    q, k, v = _pad(q, -L % block_q, 0), _pad(k, -S % block_k, 0), _pad(v, -S % block_k, 0)
    q, k, v = (_pad(x, -x.shape[3] % LANES) for x in (q, k, v))
    rows, keys = _by_row(block_q, block_k, H // k.shape[1])
    out = lambda dtype, width: rows(jax.ShapeDtypeStruct((*q.shape[:3], width), dtype))
    o, lse = _call(
        _forward_kernel,
        by_row,
        [rows(q), keys(k), keys(v)],
        [out(q.dtype, v.shape[3]), out(jnp.float32, 1)],
        [(block_q, 1), (block_q, 1), (block_q, v.shape[3])],
        N=N, interpret=interpret, name="block_sparse_forward", scale=scale, hi=hi, L=L, S=S,
    )  # fmt: skip
    return o[:, :, :L, :Dv], lse[:, :, :L, 0]


@partial(jax.jit, static_argnames=STATIC)
def backward(do, q, k, v, lse, delta, by_row, by_col, *, scale, hi, block_q, block_k, interpret=False):
    """(dq, dk, dv) in the dtypes and shapes of q, k, v; lse = inf: no probability.

    Args: do [N, H, L, Dv], lse and delta [N, H, L] float32, delta = rowsum(do * o) less the cotangent of lse;
      by_col int32 [n, 4]: key head, column, (query head of its group) * Tr + row, flags; else as `forward`.
    """
    (N, _, L, D), (S, Dv), group = q.shape, v.shape[2:], q.shape[1] // k.shape[1]
    q, do = _pad(q, -L % block_q, -D % LANES), _pad(do, -L % block_q, -Dv % LANES)
    k, v = _pad(k, -S % block_k, -D % LANES), _pad(v, -S % block_k, -Dv % LANES)
    lse, delta = (_pad(lse, -L % block_q, value=jnp.inf)[..., None], _pad(delta, -L % block_q)[..., None])
    common = {"N": N, "interpret": interpret, "scale": scale, "hi": hi, "L": L, "S": S}
    rows, keys = _by_row(block_q, block_k, group)
    (dq,) = _call(
        _dq_kernel,
        by_row,
        [rows(q), keys(k), keys(v), rows(do), rows(lse), rows(delta)],
        [rows(q)],
        [(block_q, q.shape[3])],
        name="block_sparse_dq", **common,
    )  # fmt: skip
    tall = q.shape[2] // block_q
    head = lambda m, r: m * group + lax.div(r, tall)
    at = lambda n, t, m, j, r, f: (n, head(m[t], r[t]), lax.rem(r[t], tall), 0)
    row = lambda x: (x, (None, None, block_q, x.shape[3]), at)
    column = lambda x: (x, (None, None, block_k, x.shape[3]), lambda n, t, m, j, r, f: (n, m[t], j[t], 0))
    dk, dv = _call(
        _dkv_kernel,
        by_col,
        [row(q), column(k), column(v), row(do), row(lse), row(delta)],
        [column(k), column(v)],
        [(block_k, k.shape[3]), (block_k, v.shape[3])],
        name="block_sparse_dkv", rows=tall, **common,
    )  # fmt: skip
    return dq[:, :, :L, :D], dk[:, :, :S, :D], dv[:, :, :S, :Dv]
