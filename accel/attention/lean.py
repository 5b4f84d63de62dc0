"""Lean Attention in JAX: decode attention in equal runs of key tiles; ref/attention/lean.py defines it.

impl="xla" is one masked softmax over the cache, grouped heads as rows, which XLA splits as it likes: the
schedule changes no result. The kernels run the schedule: "triton" in one launch of persistent workers, "tpu"
with a program a segment; a reduction over the segments of each output follows. Lengths may be traced: then
the grid is all workers. Statistics and sums are float32 (float64 for float64 input). Derivatives are those of
one masked softmax, whatever ran forward.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.backend import choose_impl
from accel.blocks.softmax import SoftmaxState, finalize, merge, shift, softmax_state, wide
from ref.attention.lean import (
    Schedule,
    check_decode,
    check_schedule,
    decode_makespan,
    example,
    num_splits_heuristic,
    stream_k_schedule,
)
from ref.dims import dims

__all__ = [
    "Schedule",
    "SoftmaxState",
    "combine_partials",
    "decode_makespan",
    "example",
    "finalize",
    "flash_decoding_attention",
    "lean_attention",
    "merge",
    "num_splits_heuristic",
    "stream_k_schedule",
]


def lean_attention(
    q,
    k,
    v,
    *,
    lengths=None,
    block_n=256,
    num_workers=108,
    scale=None,
    grid="paper",
    return_lse=False,
    impl="auto",
    interpret=False,
):
    """softmax(scale q k^T) v for decoding; as ref, o in q's dtype, lse float32 (float64).

    impl: "auto" is a kernel on a GPU or TPU that can run the call, else "xla".
    Raises: ValueError naming the argument; NotImplementedError for an impl that cannot run, saying why.
    """
    n = check_decode(q, k, v, lengths)
    check_schedule(num_heads=n["Hkv"], block_n=block_n, num_workers=num_workers, grid=grid)
    impl = choose_impl(
        impl,
        interpret=interpret,
        auto=("triton", "tpu"),
        obstacles={
            "hopper": 'is not there yet; use "triton"',
            "triton": _obstacle(q, block_n, 16, power=True),
            "tpu": _obstacle(q, block_n, 8),
        },
    )
    scale = n["D"] ** -0.5 if scale is None else float(scale)
    known = lengths is None or isinstance(lengths, np.ndarray | list | tuple)
    lengths = np.full(n["B"], n["S"]) if lengths is None else lengths
    if impl == "xla":
        o, lse = _attend(_dense, q, k, v, jnp.asarray(lengths), scale=scale)
    else:
        workers = num_workers
        if known:
            given = np.broadcast_to(np.asarray(lengths), (n["B"],))
            plan = stream_k_schedule(given, n["Hkv"], block_n=block_n, num_workers=num_workers, grid=grid)
            workers = plan.num_programs
        static = {
            "scale": scale,
            "block_n": block_n,
            "workers": workers,
            "impl": impl,
            "interpret": interpret,
        }
        o, lse = _attend(_by_segments, q, k, v, jnp.asarray(lengths), **static)
    return (o, lse) if return_lse else o


def flash_decoding_attention(
    q, k, v, *, lengths=None, block_n=256, num_splits=None, num_workers=108, scale=None, return_lse=False
):
    """The same by a fixed split of the cache into num_splits parts, whose states are merged."""
    n = check_decode(q, k, v, lengths)
    check_schedule(num_heads=n["Hkv"], block_n=block_n, num_workers=num_workers)
    tiles = -(-n["S"] // block_n)
    if num_splits is None:
        num_splits = num_splits_heuristic(n["B"] * n["Hkv"], num_workers, tiles)
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    lengths = np.full(n["B"], n["S"]) if lengths is None else lengths
    scale = n["D"] ** -0.5 if scale is None else float(scale)
    part = -(-tiles // num_splits) * block_n
    o, lse = _attend(_split, q, k, v, jnp.asarray(lengths), scale=scale, part=part)
    return (o, lse) if return_lse else o


@partial(jax.jit, static_argnames="axis")
def combine_partials(o, lse, *, axis=0):
    """(o, lse) of the union of normalised partial results along `axis` of lse; see ref."""
    dims(o=(o, "... Dv"), lse=(lse, "..."))
    if not -lse.ndim <= axis < lse.ndim:
        raise ValueError(f"axis must be in {-lse.ndim}..{lse.ndim - 1}, got {axis}")
    axis = axis % lse.ndim
    p_dtype = wide(lse.dtype)
    lse = lse.astype(p_dtype)
    m = lse.max(axis=axis)
    p = jnp.exp(lse - jnp.expand_dims(shift(m), axis))
    seen = (p > 0)[..., None]
    parts = p[..., None] * jnp.where(seen, o.astype(p_dtype), jnp.zeros((), p_dtype))
    return finalize(SoftmaxState(m, p.sum(axis=axis), parts.sum(axis=axis)))


def _obstacle(q, block_n, least, power=False):
    """Why a kernel cannot run, or None."""
    if jnp.result_type(q) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"has no {jnp.result_type(q)}"
    if block_n % least or (power and block_n & (block_n - 1)):
        what = f"a power of two, at least {least}" if power else f"a multiple of {least}"
        return f"needs block_n to be {what}, got {block_n}"
    return None


def _rows(q, k):
    """Query heads of a group as rows of their key head: [B, Hkv, R, D]."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])


def _scores(q, k, lengths, scale):
    """Scaled scores [B, Hkv, R, S] of the rows, -inf for keys from the length on."""
    s = jnp.matmul(_rows(q, k), jnp.swapaxes(k, -1, -2), preferred_element_type=wide(q.dtype))
    keys = jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, None, :]
    seen = keys < _lengths(lengths, q)[:, None, None, None]
    return jnp.where(seen, s * jnp.asarray(scale, s.dtype), -jnp.inf)


def _lengths(lengths, q):
    return jnp.broadcast_to(lengths.astype(jnp.int32), (q.shape[0],))


def _restore(state, q):
    """(o, lse) in the shape of q from states [B, Hkv, R]."""
    o, lse = finalize(state)
    return o.reshape(*q.shape[:-1], -1).astype(q.dtype), lse.reshape(q.shape[:-1])


@partial(jax.jit, static_argnames="scale")
def _dense(q, k, v, lengths, *, scale):
    return _restore(softmax_state(_scores(q, k, lengths, scale), v), q)


@partial(jax.jit, static_argnames=("scale", "part"))
def _split(q, k, v, lengths, *, scale, part):
    more = -k.shape[2] % part
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x
    s = _scores(q, pad(k), lengths, scale)
    parts = [
        softmax_state(s[..., i : i + part], pad(v)[:, :, i : i + part]) for i in range(0, s.shape[-1], part)
    ]
    state = parts[0]
    for other in parts[1:]:
        state = merge(state, other)
    return _restore(state, q)


def _attend(forward, q, k, v, lengths, **static):
    """forward(q, k, v, lengths, **static), with the derivative of a dense form that reads no padding.

    Forward, scores of padding are set to -inf after the product; backward, 0 * NaN would come back from it.
    """
    scale = static["scale"]

    def dense(q, k, v):
        seen = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :] < _lengths(lengths, q)[:, None]
        zero = lambda x: jnp.where(seen[:, None, :, None], x, jnp.zeros((), x.dtype))
        return _dense(q, zero(k), zero(v), lengths, scale=scale)

    @jax.custom_jvp
    def run(q, k, v):
        return forward(q, k, v, lengths, **static)

    @run.defjvp
    def _(primals, tangents):
        return run(*primals), jax.jvp(dense, primals, tangents)[1]

    return run(*map(jnp.asarray, (q, k, v)))


@partial(jax.jit, static_argnames=("scale", "block_n", "workers", "impl", "interpret"))
def _by_segments(q, k, v, lengths, *, scale, block_n, workers, impl, interpret):
    """The schedule in a kernel, then the reduction of every output's segments."""
    heads = k.shape[1]
    lengths = _lengths(lengths, q)
    run, output, lo, hi = _line(lengths, heads, block_n, workers)
    # On the line outputs go head by head; in memory, batch item by batch item.
    h, b = output // len(lengths), output % len(lengths)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    at = (b * heads + h).astype(jnp.int32)
    arrays = flat(_rows(q, k)), flat(k), flat(v)
    options = {"scale": scale, "block_n": block_n, "interpret": interpret}
    module = importlib.import_module(f"accel.kernels.lean_{impl}")
    if impl == "triton":
        m, l, acc = module.partial_states(run, at, lo, hi, lengths[b], *arrays, **options)
    else:
        most = -(-len(lengths) * heads * -(-k.shape[2] // block_n) // workers)
        m, l, acc = module.partial_states(at, lo, hi, lengths[b], *arrays, most=most, **options)
    outputs = len(lengths) * heads
    top = jax.ops.segment_max(m, at, outputs)
    fix = jnp.exp(m - shift(top)[at])
    total = jax.ops.segment_sum(fix * l, at, outputs)
    summed = jax.ops.segment_sum(fix[..., None] * acc, at, outputs)
    state = SoftmaxState(top, total, summed)
    return _restore(jax.tree.map(lambda x: x.reshape(len(lengths), heads, *x.shape[1:]), state), q)


def _line(lengths, heads, block_n, workers):
    """The schedule as arrays, for lengths that may be traced: run [G + 1], output, lo, hi [G + O], int32.

    The line is cut where a worker or an output starts. Worker g has segments run[g]..run[g + 1]; where two
    cuts coincide one of them is empty.
    """
    tiles = -(-lengths // block_n)
    ends = jnp.cumsum(jnp.tile(tiles, heads), dtype=jnp.int32)
    starts = ends - jnp.tile(tiles, heads)
    total = ends[-1]
    most = -(-total // workers)
    high = total - (most - 1) * workers
    g = jnp.arange(workers + 1, dtype=jnp.int32)
    first = jnp.where(g <= high, g * most, high * most + (g - high) * (most - 1))
    cuts = jnp.sort(jnp.concatenate([first[:-1], starts]))
    stops = jnp.concatenate([cuts[1:], total[None]])
    output = jnp.minimum(jnp.searchsorted(ends, cuts, side="right"), len(ends) - 1).astype(jnp.int32)
    run = jnp.searchsorted(cuts, first, side="left").astype(jnp.int32).at[-1].set(len(cuts))
    return run, output, cuts - starts[output], stops - starts[output]
