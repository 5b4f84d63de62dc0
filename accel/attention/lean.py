"""Lean Attention in JAX: decode attention in equal runs of key tiles; ref/attention/lean.py defines it.

Two phases: the states of all segments of the schedule, then the merge of every output's. The heads of a group
are rows of one output, so a key is read once. The kernels: "hopper" and "triton", one launch of persistent
workers and a small one that merges; "tpu", a program a segment. `lean_attention` on "hopper" has tiles of its
own and a worker a core, whatever block_n and num_workers say. impl="xla" walks the line of tiles on a CPU,
where a tile stays in cache and no padding is read; elsewhere, and for few keys, it is one masked softmax,
which XLA splits as it likes.

Lengths as NumPy or a list are known: the schedule is made beforehand, and on the CPU there is one program for
each number of tiles. Lengths as JAX arrays may be traced: one program for all, and the grid is all workers.
Statistics and sums are float32 (float64 for float64 input). Derivatives, forward and backward, are those of
one masked softmax, whatever ran forward.
"""

import importlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.backend import choose_impl, hopper_obstacle
from accel.blocks.shapes import alike
from accel.blocks.softmax import SoftmaxState, finalize, merge, shift, softmax_state, wide
from ref.attention.lean import (
    Schedule,
    check_decode,
    check_schedule,
    decode_makespan,
    example,
    grid_size,
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

IN_CACHE = 2**23  # bytes of keys and values up to which a CPU is as fast with one softmax as with a walk
WIDEST, LARGEST = 256, 16384  # head size, and rows times head size, of a GPU kernel's output
HOPPER_KEYS = 64  # the least tile of the kernel for Hopper
SMALL = 2**26  # bytes of keys and values up to which XLA is as fast as Triton on an H200


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
    impl = _implementation(q, k, v, block_n, impl, interpret, own_tiles=True)
    scale = n["D"] ** -0.5 if scale is None else float(scale)
    lengths, known = _lengths(lengths, n)
    if impl == "xla" and not _walks(k, v):
        o, lse = _attend(_dense, q, k, v, lengths, scale=scale)
    elif impl == "hopper":
        cores = _hopper().cores_of()
        own = _hopper().own_block(n["B"] * n["Hkv"] * n["S"], cores)
        workers = _workers(lengths, known, n["Hkv"], own, cores, grid)
        plan = _hopper().Runs(n["B"], n["Hkv"], workers, _full(lengths, known, n["S"]))
        o, lse = _attend(_in_hopper, q, k, v, lengths, plan=plan, block_n=own, scale=scale)
    else:
        tiles = -(-lengths // block_n)
        workers = _workers(lengths, known, n["Hkv"], block_n, num_workers, grid)
        table = (_line if known else _traced_line)(tiles, n["Hkv"], workers)
        most = -(-n["B"] * n["Hkv"] * -(-n["S"] // block_n) // workers)
        run = _by_walk if impl == "xla" else _by_kernel
        o, lse = run(q, k, v, lengths, table, known, block_n, scale, most, impl, interpret)
    return (o, lse) if return_lse else o


def flash_decoding_attention(
    q,
    k,
    v,
    *,
    lengths=None,
    block_n=256,
    num_splits=None,
    num_workers=108,
    scale=None,
    return_lse=False,
    impl="auto",
    interpret=False,
):
    """The same by a fixed split of every output's tiles into num_splits parts, whose states are merged."""
    n = check_decode(q, k, v, lengths)
    check_schedule(num_heads=n["Hkv"], block_n=block_n, num_workers=num_workers)
    impl = _implementation(q, k, v, block_n, impl, interpret)
    scale = n["D"] ** -0.5 if scale is None else float(scale)
    lengths, known = _lengths(lengths, n)
    tiles = -(-lengths // block_n)
    most = int(tiles.max()) if known else -(-n["S"] // block_n)
    if num_splits is None:
        num_splits = num_splits_heuristic(n["B"] * n["Hkv"], num_workers, most)
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    part = -(-most // num_splits)
    if impl == "xla" and not _walks(k, v):
        o, lse = _attend(_split, q, k, v, lengths, scale=scale, part=part * block_n, parts=num_splits)
    elif impl == "hopper":
        plan = _hopper().Parts(n["B"], n["Hkv"], num_splits, _full(lengths, known, n["S"]))
        o, lse = _attend(_in_hopper, q, k, v, lengths, plan=plan, block_n=block_n, scale=scale)
    else:
        table = _parts(tiles, n["Hkv"], num_splits, xp=np if known else jnp)
        run = _by_walk if impl == "xla" else _by_kernel
        o, lse = run(q, k, v, lengths, table, known, block_n, scale, part, impl, interpret)
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


class Table(NamedTuple):
    """Segments [n], int32, in the order of the line: output (on the line), tiles lo..hi inside it.

    Worker g has segments run[g]..run[g + 1], output o segments first[o]..first[o + 1]; some may be empty.
    """

    run: jax.Array
    first: jax.Array
    output: jax.Array
    lo: jax.Array
    hi: jax.Array


def _line(tiles, heads, workers, *, xp=np):
    """The `Table` of equal runs for tiles [B], in NumPy, or in JAX for lengths that may be traced.

    The line is cut where a worker or an output starts; where two cuts coincide a segment is empty.
    """
    # Few places: comparing them all is one pass, where a search is a loop of small ones.
    find = np.searchsorted if xp is np else partial(jnp.searchsorted, method="compare_all")
    ends = xp.cumsum(xp.tile(tiles, heads), dtype=np.int32)
    starts = ends - xp.tile(tiles, heads)
    total = ends[-1:]
    most = -(-total // workers)
    high = total - (most - 1) * workers
    g = xp.arange(workers, dtype=np.int32)
    begin = xp.where(g <= high, g * most, high * most + (g - high) * (most - 1))
    cuts = xp.sort(xp.concatenate([begin, starts]))
    output = xp.minimum(find(ends, cuts, side="right"), len(ends) - 1).astype(np.int32)
    at_end = xp.full(1, len(cuts), np.int32)
    place = lambda where, what: find(where, what, side="left").astype(np.int32)
    return Table(
        xp.concatenate([place(cuts, begin), at_end]),
        xp.concatenate([place(output, xp.arange(len(ends), dtype=np.int32)), at_end]),
        output,
        (cuts - starts[output]).astype(np.int32),
        (xp.concatenate([cuts[1:], total]) - starts[output]).astype(np.int32),
    )


_traced_line = jax.jit(partial(_line, xp=jnp), static_argnums=(1, 2))


def _parts(tiles, heads, splits, *, xp=np):
    """The `Table` of a fixed split: every output's tiles in `splits` parts of ceil(t / splits)."""
    size = -(-tiles // splits)
    bound = xp.minimum(xp.arange(splits + 1, dtype=np.int32)[None] * size[:, None], tiles[:, None])
    bound = xp.tile(bound, (heads, 1)).astype(np.int32)
    outputs = heads * len(tiles)
    every = lambda n, step: xp.arange(n, dtype=np.int32) * step
    return Table(
        every(outputs * splits + 1, 1),
        every(outputs + 1, splits),
        every(outputs * splits, 1) // splits,
        bound[:, :-1].ravel(),
        bound[:, 1:].ravel(),
    )


def _workers(lengths, known, heads, block_n, num_workers, grid):
    """Workers of the launch: as many as the grid says where lengths are known, else all."""
    if not known:
        return num_workers
    tiles = int((-(-lengths // block_n)).sum())
    return grid_size(heads * tiles, tiles, num_workers, grid)


def _full(lengths, known, S):
    """S if it is known that all keys may be seen, else None."""
    return S if known and (lengths == S).all() else None


def _implementation(q, k, v, block_n, impl, interpret, own_tiles=False):
    """own_tiles: whether block_n is not for the kernel for Hopper."""
    return choose_impl(
        impl,
        arrays=(q, k, v),
        interpret=interpret,
        auto=("hopper", "triton", "tpu") if _size(k, v) > SMALL else ("hopper", "tpu"),
        obstacles={
            "hopper": _no_hopper(q, k, v, HOPPER_KEYS if own_tiles else block_n, interpret),
            "triton": _gpu_obstacle(q, k, v, block_n) or _obstacle(q, block_n, 16),
            "tpu": _obstacle(q, block_n, 8),
        },
    )


def _no_hopper(q, k, v, block_n, interpret):
    """Why the kernel for Hopper cannot take a call, or None."""
    dtypes = {jnp.result_type(x) for x in (q, k, v)}
    rows = q.size // (k.shape[0] * k.shape[1] * k.shape[3])
    sizes = k.shape[3], v.shape[3]
    if interpret:
        return 'has no interpreter; use impl="triton"'
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f'takes bfloat16 or float16, not {", ".join(sorted(map(str, dtypes)))}; use impl="triton"'
    if not set(sizes) <= {64, 128, 256}:
        return f'takes D and Dv of 64, 128 or 256, not {sizes[0]} and {sizes[1]}; use impl="triton"'
    if rows > 64:
        return f'takes up to 64 rows a key head, not {rows}; use impl="triton"'
    if k.shape[2] % 8:
        return f'takes a cache of a multiple of 8 keys, not {k.shape[2]}; use impl="triton"'
    if block_n % HOPPER_KEYS:
        return f"needs block_n to be a multiple of {HOPPER_KEYS}, got {block_n}"
    return hopper_obstacle((q, k, v))


def _hopper():
    from accel.kernels import lean_hopper

    return lean_hopper


def _obstacle(q, block_n, least):
    """Why a kernel cannot run, or None."""
    if jnp.result_type(q) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"has no {jnp.result_type(q)}"
    return f"needs block_n to be a multiple of {least}, got {block_n}" if block_n % least else None


def _gpu_obstacle(q, k, v, block_n):
    """The same for a GPU, which wants powers of two and a state that fits the registers."""
    if block_n & (block_n - 1):
        return f"needs block_n to be a power of two, at least 16, got {block_n}"
    up = lambda n: max(16, 1 << (n - 1).bit_length())
    rows = q.size // (k.shape[0] * k.shape[1] * k.shape[3])
    if max(up(k.shape[3]), up(v.shape[3])) > WIDEST or up(rows) * up(v.shape[3]) > LARGEST:
        return f"has no room for {rows} rows of D={k.shape[3]}, Dv={v.shape[3]} in registers"
    return None


def _walks(k, v):
    """Whether the XLA form is a walk of tiles."""
    return jax.default_backend() == "cpu" and _size(k, v) > IN_CACHE


def _size(k, v):
    """Bytes of keys and values."""
    return (k.size + v.size) * jnp.result_type(k).itemsize


def _lengths(lengths, n):
    """(lengths int32 [B], whether they are known): NumPy if so, else a JAX array."""
    lengths = n["S"] if lengths is None else lengths
    near = jax.default_backend() == "cpu" and not isinstance(lengths, jax.core.Tracer)
    if near or not isinstance(lengths, jax.Array):  # reading a device's array back would wait for the device
        return np.broadcast_to(np.asarray(lengths, np.int32), (n["B"],)), True
    return jnp.broadcast_to(lengths.astype(jnp.int32), (n["B"],)), False


def _rows(q, k):
    """Query heads of a group as rows of their key head: [B, Hkv, R, D]."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])


def _restore(state, q):
    """(o, lse) in the shape of q from states [B, Hkv, R]."""
    o, lse = finalize(state)
    return o.reshape(*q.shape[:-1], -1).astype(q.dtype), lse.reshape(q.shape[:-1])


def _scores(q, k, lengths, scale):
    """Scaled scores [B, Hkv, R, S] of the rows, -inf for keys from the length on."""
    s = jnp.matmul(_rows(q, k), jnp.swapaxes(k, -1, -2), preferred_element_type=wide(q.dtype))
    keys = jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, None, :]
    return jnp.where(keys < lengths[:, None, None, None], s * jnp.asarray(scale, s.dtype), -jnp.inf)


@partial(jax.jit, static_argnames="scale")
def _dense(q, k, v, lengths, *, scale):
    return _restore(softmax_state(_scores(q, k, lengths, scale), v), q)


@partial(jax.jit, static_argnames=("scale", "part", "parts"))
def _split(q, k, v, lengths, *, scale, part, parts):
    """All parts of `part` keys at once, an axis behind the heads; then their merge."""
    more = max(0, part * parts - k.shape[2])
    cut = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))).reshape(
        *x.shape[:2], -1, part, x.shape[-1]
    )
    s = _scores(q, jnp.pad(k, ((0, 0), (0, 0), (0, more), (0, 0))), lengths, scale)
    s = jnp.swapaxes(s.reshape(*s.shape[:-1], -1, part), 2, 3)  # [B, Hkv, parts, R, part]
    m, l, acc = softmax_state(s, cut(v))
    top = m.max(axis=2)
    fix = jnp.exp(m - shift(top)[:, :, None])
    return _restore(SoftmaxState(top, (fix * l).sum(axis=2), (fix[..., None] * acc).sum(axis=2)), q)


def _attend(forward, q, k, v, lengths, *tables, **static):
    """forward(q, k, v, lengths, *tables, **static); derivatives of a dense form that reads no padding.

    Forward, scores of padding are set to -inf after the product; backward, 0 * NaN would come back from it.
    """
    scale = static["scale"]
    lengths, *tables = jax.tree.map(jnp.asarray, (lengths, *tables))

    def dense(q, k, v):
        seen = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :] < lengths[:, None]
        zero = lambda x: jnp.where(seen[:, None, :, None], x, jnp.zeros((), x.dtype))
        return _dense(q, zero(k), zero(v), lengths, scale=scale)

    @jax.custom_jvp
    def run(q, k, v):
        return forward(q, k, v, lengths, *tables, **static)

    @run.defjvp
    def _(primals, tangents):
        return run(*primals), jax.jvp(dense, primals, tangents)[1]

    return run(*map(jnp.asarray, (q, k, v)))


def _flat(q, k, v, lengths, table):
    """(place of each segment's output in memory, its keys, q, k, v with outputs in front)."""
    heads = k.shape[1]
    h, b = table.output // len(lengths), table.output % len(lengths)  # line: head by head; memory: by item
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return b * heads + h, lengths[b], flat(_rows(q, k)), flat(k), flat(v)


def _gather(state, at, q, k):
    """(o, lse) from the states of segments: the merge, a reduction over each output's."""
    m, l, acc = state
    B, heads = k.shape[:2]
    top = jax.ops.segment_max(m, at, B * heads)
    fix = jnp.exp(m - shift(top)[at])
    total = jax.ops.segment_sum(fix * l, at, B * heads)
    summed = jax.ops.segment_sum(fix[..., None] * acc, at, B * heads)
    whole = SoftmaxState(top, total, summed)
    return _restore(jax.tree.map(lambda x: x.reshape(B, heads, *x.shape[1:]), whole), q)


def _by_kernel(q, k, v, lengths, table, known, block_n, scale, most, impl, interpret):
    static = {"scale": scale, "block_n": block_n, "impl": impl, "interpret": interpret, "most": most}
    return _attend(_in_kernel, q, k, v, lengths, table, **static)


@partial(jax.jit, static_argnames=("plan", "scale", "block_n"))
def _in_hopper(q, k, v, lengths, *, plan, scale, block_n):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    arrays = flat(_rows(q, k)), flat(k), flat(v)
    o, lse = _hopper().attend(lengths, *arrays, plan=plan, scale=scale, block_n=block_n)
    return alike((o.reshape(*q.shape[:-1], v.shape[3]), lse.reshape(q.shape[:-1])), q, k, v, lengths)


def _by_walk(q, k, v, lengths, table, known, block_n, scale, *_):
    """`_walk` with its order of tiles, made beforehand if the lengths are known."""
    total = int((table.hi - table.lo).sum()) if known else None
    most = k.shape[0] * k.shape[1] * -(-k.shape[2] // block_n)
    order = _order(table, total) if known else _traced_order(table, most)
    return _attend(_walk, q, k, v, lengths, table, order, block_n=block_n, scale=scale, total=total)


def _order(table, tiles, *, xp=np):
    """(segment, tile inside its output) of each tile along the line, int32 [tiles]; none beyond the last."""
    ends = xp.cumsum(table.hi - table.lo, dtype=np.int32)
    i = xp.arange(tiles, dtype=np.int32)
    segment = xp.minimum(xp.searchsorted(ends, i, side="right"), len(ends) - 1).astype(np.int32)
    return segment, (i - (ends - table.hi)[segment]).astype(np.int32)


_traced_order = jax.jit(partial(_order, xp=jnp), static_argnums=1)


@partial(jax.jit, static_argnames=("scale", "block_n", "total"))
def _walk(q, k, v, lengths, table, order, *, scale, block_n, total):
    """The line tile by tile, each added to its segment's state; then the states, to their outputs'."""
    B, heads, S, _ = k.shape
    h, b = table.output // B, table.output % B  # on the line head by head; in memory item by item
    rows = _rows(q, k)
    R, Dv = rows.shape[2], v.shape[3]
    block, kind, zero = min(block_n, S), wide(q.dtype), np.int32(0)
    take = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    state_of = lambda states, i: jax.tree.map(lambda x: take(x, i), states)
    put = lambda states, x, i: jax.tree.map(
        lambda y, x: jax.lax.dynamic_update_index_in_dim(y, x, i, 0), states, x
    )

    def add(i, states):
        g, first = take(order[0], i), take(order[1], i) * block_n
        place = take(b, g), take(h, g)
        start = jnp.minimum(first, S - block)  # the last tile of a cache off the tile starts earlier
        pick = lambda x, at, n: jax.lax.dynamic_slice(x, (*place, at, zero), (1, 1, n, x.shape[-1]))[0, 0]
        col = start + jnp.arange(block, dtype=jnp.int32)
        seen = (col >= first) & (col < take(lengths, place[0]))
        s = jnp.matmul(pick(rows, zero, R), pick(k, start, block).T, preferred_element_type=kind)
        s = jnp.where(seen[None], s * jnp.asarray(scale, kind), -jnp.inf)
        value = jnp.where(seen[:, None], pick(v, start, block), jnp.zeros((), v.dtype))
        return put(states, merge(state_of(states, g), _tile_state(s, value)), g)

    def fold(g, whole):
        o = take(b, g) * heads + take(h, g)
        return put(whole, merge(state_of(whole, o), state_of(states, g)), o)

    none = lambda n: SoftmaxState(
        jnp.full((n, R), -jnp.inf, kind), jnp.zeros((n, R), kind), jnp.zeros((n, R, Dv), kind)
    )
    tiles = jnp.sum(table.hi - table.lo) if total is None else total
    like = q, k, v, lengths, table
    states = jax.lax.fori_loop(0, tiles, add, alike(none(len(h)), *like))
    whole = jax.lax.fori_loop(0, len(h), fold, alike(none(B * heads), *like))
    return _restore(jax.tree.map(lambda x: x.reshape(B, heads, *x.shape[1:]), whole), q)


def _tile_state(s, v):
    """`softmax_state` of a tile whose values are zero where no key may be seen."""
    m = s.max(axis=-1)
    p = jnp.exp(s - shift(m)[..., None])
    return SoftmaxState(m, p.sum(axis=-1), jnp.matmul(p.astype(v.dtype), v, preferred_element_type=s.dtype))


@partial(jax.jit, static_argnames=("scale", "block_n", "most", "impl", "interpret"))
def _in_kernel(q, k, v, lengths, table, *, scale, block_n, most, impl, interpret):
    """The schedule in a kernel, then the merge: in a second one on a GPU, in XLA on a TPU.

    most: tiles of a segment at most.
    """
    at, end, *arrays = _flat(q, k, v, lengths, table)
    options = {"scale": scale, "block_n": block_n, "interpret": interpret}
    module = importlib.import_module(f"accel.kernels.lean_{impl}")
    if impl == "triton":
        parts = module.partial_states(table.run, at, table.lo, table.hi, end, *arrays, **options)
        place = at[table.first[:-1]]
        o, lse = module.merged(table.first, place, *parts, dtype=q.dtype, interpret=interpret)
        R, Dv = arrays[0].shape[1], v.shape[3]
        return o[:, :R, :Dv].reshape(*q.shape[:-1], Dv), lse[:, :R].reshape(q.shape[:-1])
    parts = module.partial_states(at, table.lo, table.hi, end, *arrays, most=most, **options)
    return _gather(parts, at, q, k)
