"""What LLM.int8() does around its int8 product, in Pallas for GPUs (Triton): rows to int8, outliers apart.

Three kernels for many rows. `quantize_rows`: a program owns a row, walks it twice, the second time from its
cache, and marks the columns that hold an outlier; whoever writes a mark writes a one, so the order does not
matter. `gather`: every program finds the first R marked columns for itself, and fetches them for its rows of
x or of the weights. `overrule`: the whole product once more, where more than R columns are marked; where not,
its programs end at once, which costs less than to ask the host. For a few rows one kernel, `quantize_few`: a
program reads the whole of the rows and of the columns of its part, and none has to wait for another.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from accel.blocks.kernel import pallas_call
from ref.compression.llm_int8 import LEVELS, SMALLEST

__all__ = ["gather", "overrule", "quantize_few", "quantize_rows"]

ROUND = 1.5 * 2.0**23  # a sum with it is rounded to an integer, ties to even
CHUNK = 4096  # columns at a time
SPAN = 4096  # elements of whole rows at a time, in `quantize_few`
HELD = 8  # times that go without a loop
SPREAD = 96  # programs of it that are enough
UNITS = 4  # of columns that share a flag of `quantize_few`
TALL = 128  # rows that a program of `gather` fetches
PROGRAMS = 528  # of `overrule`: four for every core of an H100
ROWS = (((1,), (1,)), ((), ()))


def _shape(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _rows_kernel(x_ref, _, q_ref, absmax_ref, marks_ref, *, threshold, K, chunk):
    """x_ref [K] -> q_ref [K'] int8, absmax_ref [1]; marks_ref [K] int32 of all rows."""
    steps = -(-q_ref.shape[0] // chunk)

    def piece(j):
        at = j * chunk + jnp.arange(chunk)
        x = plgpu.load(x_ref.at[pl.ds(j * chunk, chunk)], mask=at < K, other=0).astype(jnp.float32)
        return at, x, jnp.abs(x) >= threshold

    def largest(j, most):
        at, x, outlier = piece(j)
        ones = jnp.ones(chunk, jnp.int32)
        plgpu.store(marks_ref.at[pl.ds(j * chunk, chunk)], ones, mask=outlier & (at < K))
        # sizes are ordered like their bits, and NaN is above them all
        return jnp.maximum(most, _bits(jnp.where(outlier, 0, jnp.abs(x)), jnp.int32).max())

    absmax = _bits(lax.fori_loop(0, steps, largest, 0), jnp.float32)
    absmax_ref[0] = absmax

    def narrow(j, _):
        at, x, outlier = piece(j)
        q = _narrow(jnp.where(outlier, 0, x), absmax)
        plgpu.store(q_ref.at[pl.ds(j * chunk, chunk)], q, mask=at < q_ref.shape[0])
        return _

    lax.fori_loop(0, steps, narrow, 0)


def _bits(x, dtype):
    return lax.bitcast_convert_type(x, dtype)


def _over(n, d):
    """n / d in float32 as IEEE rounds it, for d of half precision; the compiler's may be two units off."""
    f = n / d
    high = _bits(_bits(f, jnp.int32) & ~0xFFF, jnp.float32)  # 12 bits, whose product with d is exact
    return f + ((n - high * d) - (f - high) * d) / d


@partial(jax.jit, static_argnames=("threshold", "unit", "interpret"))
def quantize_rows(x, *, threshold, unit=1, interpret=False):
    """(x_q int8 [T, K'], absmax float32 [T], marks int32 [K]): as `quantize_rowwise`, but that in a marked
    column what is no outlier stays in x_q.

    Args: x [T, K]; K' is the next multiple of unit: columns of zeros.
      threshold: elements of that size and above are outliers, 0 in x_q and absmax; inf: none are.
    """
    T, K = x.shape
    broad = K + -K % unit
    return pallas_call(
        partial(_rows_kernel, threshold=threshold, K=K, chunk=min(CHUNK, pl.next_power_of_2(broad))),
        out_shape=(
            _shape(T, broad, dtype=jnp.int8),
            _shape(T, dtype=jnp.float32),
            _shape(K, dtype=jnp.int32),
        ),
        grid=(T,),
        in_specs=[pl.BlockSpec((None, K), lambda i: (i, 0)), pl.BlockSpec((K,), lambda i: (0,))],
        out_specs=(
            pl.BlockSpec((None, broad), lambda i: (i, 0)),
            pl.BlockSpec((1,), lambda i: (i,)),
            pl.BlockSpec((K,), lambda i: (0,)),
        ),
        input_output_aliases={1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="llm_int8_rows",
    )(x, jnp.zeros(K, jnp.int32))


def _few_kernel(x_ref, q_ref, absmax_ref, *marked_refs, threshold, rows, chunk, unit):
    """Some rows by a chunk of columns a program; q_ref [T', K'] int8, absmax_ref [T'], or with x_o, flags."""
    (T, K), broad = x_ref.shape, q_ref.shape[1]
    i, c = pl.program_id(0), pl.program_id(1)
    row, column = (i * rows + jnp.arange(rows))[:, None], (c * chunk + jnp.arange(chunk))[None, :]
    size = lambda x: jnp.abs(x.astype(jnp.float32))
    span, tall = min(pl.next_power_of_2(K), SPAN // rows), min(pl.next_power_of_2(T), 16)

    def piece(row, column):
        return plgpu.load(x_ref.at[row, column], mask=(row < T) & (column < K), other=0)

    def across(j):
        return piece(row, (j * span + jnp.arange(span))[None, :])

    def bits(x):
        """Ordered like the sizes, NaN above them all; 0 for outliers."""
        return _bits(jnp.where(size(x) >= threshold, 0, size(x)), jnp.int32)

    # what is read comes first, then what waits for it
    steps = -(-K // span)
    held = [across(j) for j in range(min(steps, HELD))]
    x = piece(row, column)
    below = ((first + jnp.arange(tall))[:, None] for first in (range(0, T, tall) if marked_refs else ()))
    columns = [piece(rows_of, column) for rows_of in below]
    most = reduce(jnp.maximum, map(bits, held))
    if steps > HELD:
        most = lax.fori_loop(HELD, steps, lambda j, most: jnp.maximum(most, bits(across(j))), most)
    nought = size(x) >= threshold
    if marked_refs:
        outliers = [size(of_all) >= threshold for of_all in columns]
        marks = jnp.where(reduce(jnp.logical_or, outliers), 1, 0).max(axis=0)
        nought = (marks > 0)[None, :]
    absmax = _bits(most.max(axis=1), jnp.float32)

    @pl.when(c == 0)
    def _():
        plgpu.store(absmax_ref.at[row[:, 0]], absmax, mask=row[:, 0] < T)

    q = _narrow(jnp.where(nought, 0, x.astype(jnp.float32)), absmax[:, None])
    plgpu.store(q_ref.at[row, column], q, mask=(row < T) & (column < broad))
    if marked_refs:
        x_o_ref, flags_ref = marked_refs

        @pl.when(i == 0)
        def _():
            words = chunk // unit // UNITS
            bit = (marks << lax.rem(lax.div(jnp.arange(chunk), unit), UNITS)).reshape(words, UNITS, unit)
            at = c * words + jnp.arange(words)
            plgpu.store(flags_ref.at[at], bit.max(axis=2).sum(axis=1), mask=at < flags_ref.shape[0])

        @pl.when(marks.max() > 0)
        def _():
            seen = (row < T) & (column < broad)
            plgpu.store(x_o_ref.at[row, column], jnp.where(nought, x, 0), mask=seen)


def _narrow(x, absmax):
    """rint(127 x / absmax) int8, ties to even; 0 where absmax is nearly 0."""
    some = absmax >= SMALLEST
    factor = jnp.where(some, _over(LEVELS, jnp.where(some, absmax, 1.0)), 0.0)
    # the bound changes nothing, but that the product is rounded before the sum
    return _bits(jnp.maximum(x * factor, -LEVELS) + ROUND, jnp.int32).astype(jnp.int8)  # its last byte


@partial(jax.jit, static_argnames=("threshold", "unit", "interpret", "cut"))
def quantize_few(x, *, threshold, unit, interpret=False, cut=None):
    """(x_q int8 [T', K'], absmax float32 [T'], marked) of a few rows x [T, K] at once, as `quantize_rowwise`.

    Args: threshold: elements of that size and above are outliers; inf: none are. unit: a power of two; K' is
      the next multiple of it, columns of zeros; T' the next multiple of 16, rows of anything.
      cut: rows, columns (a multiple of UNITS * unit) and warps of a program; None is what suits the call.
    Returns: marked: (x_o [T', K'], flags int32 [K' / unit / UNITS]), or None without a threshold: x with
      zeros where a column has no outlier, and for UNITS units of columns a flag, whose bit u is 1 where unit
      u has some; x_o holds anything where they have none.
    """
    T, K = x.shape
    tall, broad = T + -T % 16, K + -K % unit
    rows, chunk, warps = cut or _cut(T, K, UNITS * unit)
    shapes = [_shape(tall, broad, dtype=jnp.int8), _shape(tall, dtype=jnp.float32)]
    if threshold < float("inf"):
        flags = -(-broad // (UNITS * unit))
        shapes += [_shape(tall, broad, dtype=x.dtype), _shape(flags, dtype=jnp.int32)]
    spec = lambda a: pl.BlockSpec(a.shape, lambda i, c: (0,) * a.ndim)
    x_q, absmax, *marked = pallas_call(
        partial(_few_kernel, threshold=threshold, rows=rows, chunk=chunk, unit=unit),
        out_shape=tuple(shapes),
        grid=(-(-T // rows), -(-broad // chunk)),
        in_specs=[spec(x)],
        out_specs=tuple(spec(a) for a in shapes),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="llm_int8_rows_of_few",
    )(x)
    return x_q, absmax, tuple(marked) or None


def _cut(T, K, least):
    """Rows, columns and warps of a program of `quantize_few`: what was fastest on an H200.

    A program reads whole rows and whole columns for its part; so parts are as wide as keeps enough programs.
    """
    rows = pl.next_power_of_2(-(-T // 16))
    programs = lambda columns: -(-T // rows) * -(-K // columns)
    wide = [columns for columns in (4 * least, 2 * least) if programs(columns) >= SPREAD]
    columns = wide[0] if wide else least
    return rows, columns, 8 if columns * T <= 32768 else 16


def _gather_kernel(marks_ref, x_ref, w_ref, _, x_q_ref, x_o_ref, w_o_ref, more_ref, *, R, chunk):
    """The first R marked columns of x_ref [T, K] and w_ref [N, K], a block of rows of either a program."""
    (T, K), N, wide = x_ref.shape, w_ref.shape[0], x_o_ref.shape[1]
    place = jnp.arange(wide)

    def find(j, carry):
        """(at, so far): the places that chunk j fills, and the marks up to its end."""
        at, before = carry
        column = j * chunk + jnp.arange(chunk)
        mark = plgpu.load(marks_ref.at[pl.ds(j * chunk, chunk)], mask=column < K, other=0)
        new = mark.sum()

        def fill(nth, carry):
            at, left = carry
            first = left.min()
            return jnp.where(place == before + nth, first, at), jnp.where(left <= first, K, left)

        end = jnp.minimum(new, jnp.maximum(wide - before, 0))
        at, _ = lax.fori_loop(0, end, fill, (at, jnp.where(mark > 0, column, K)))
        return at, before + new

    at, marked = lax.fori_loop(0, -(-K // chunk), find, (jnp.full(wide, K, jnp.int32), 0))
    more = marked > R
    some = (marked > 0) & jnp.logical_not(more)
    listed = some & (at < K)[None, :]
    column = jnp.where(at < K, at, at.min())[None, :]  # the first one again and again behind the last
    i, strips = pl.program_id(0), -(-N // TALL)

    @pl.when(i == 0)
    def _():
        more_ref[0] = jnp.where(more, 1, 0)

    @pl.when(i < strips)
    def _():
        row = (i * TALL + jnp.arange(TALL))[:, None]
        got = plgpu.load(w_ref.at[row, column], mask=listed & (row < N), other=0)
        plgpu.store(w_o_ref.at[row, place[None, :]], got.astype(w_o_ref.dtype), mask=row < N)

    @pl.when(i >= strips)
    def _():
        row = ((i - strips) * TALL + jnp.arange(TALL))[:, None]
        got = plgpu.load(x_ref.at[row, column], mask=listed & (row < T), other=0)
        plgpu.store(x_o_ref.at[row, place[None, :]], got, mask=row < T)
        plgpu.store(x_q_ref.at[row, column], jnp.zeros((TALL, wide), jnp.int8), mask=some & (row < T))


@partial(jax.jit, static_argnames=("R", "interpret"))
def gather(x, w_q, x_q, marks, *, R, interpret=False):
    """(x_q, x_o [T, R'], w_o [N, R'], more int32 [1]): the first R marked columns of x [T, K] and w_q [N, K]
    in x's dtype, zeros after them, and x_q with zeros in them; R' is the next power of two, at least 16.
    Where more columns are marked (more = 1), no column is listed.
    """
    (T, K), N = x.shape, len(w_q)
    wide = max(16, pl.next_power_of_2(R))
    spec = lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * a.ndim)
    outputs = x_q, _shape(T, wide, dtype=x.dtype), _shape(N, wide, dtype=x.dtype), _shape(1, dtype=jnp.int32)
    return pallas_call(
        partial(_gather_kernel, R=R, chunk=min(4 * CHUNK, pl.next_power_of_2(K))),
        out_shape=tuple(_shape(*a.shape, dtype=a.dtype) for a in outputs),
        grid=(-(-N // TALL) + -(-T // TALL),),
        in_specs=[spec(a) for a in (marks, x, w_q, x_q)],
        out_specs=tuple(spec(a) for a in outputs),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=16, num_stages=1),
        interpret=interpret,
        name="llm_int8_gather",
    )(marks, x, w_q, x_q)


def _overrule_kernel(
    more_ref, marks_ref, x_ref, x_q_ref, w_ref, x_absmax_ref, w_absmax_ref, *rest, sizes, programs
):
    *bias_ref, _, y_ref = rest
    t, n, k = sizes
    (T, K), N = x_ref.shape, w_ref.shape[0]
    down, across = -(-T // t), -(-N // n)
    first = pl.program_id(0)

    def tile(i, _):
        item = first + i * programs
        row = (lax.rem(item, down) * t + jnp.arange(t))[:, None]
        neuron = (lax.div(item, down) * n + jnp.arange(n))[:, None]

        def step(j, sums):
            whole, real = sums
            at = j * k + jnp.arange(k)
            column, there = at[None, :], (at < K)[None, :]
            mark = plgpu.load(marks_ref.at[at], mask=at < K, other=0)[None, :] > 0
            seen = there & (row < T)
            x = plgpu.load(x_ref.at[row, column], mask=seen & mark, other=0)
            x_q = plgpu.load(x_q_ref.at[row, column], mask=seen & jnp.logical_not(mark), other=0)
            w = plgpu.load(w_ref.at[neuron, column], mask=there & (neuron < N), other=0)
            dot = lambda a, b, dtype: lax.dot_general(a, b, ROWS, preferred_element_type=dtype)
            return whole + dot(x_q, w, jnp.int32), real + dot(x, w.astype(x.dtype), jnp.float32)

        zeros = jnp.zeros((t, n), jnp.int32), jnp.zeros((t, n), jnp.float32)
        whole, real = lax.fori_loop(0, -(-K // k), step, zeros)
        along = neuron[:, 0]
        load = lambda ref, at, size: plgpu.load(ref.at[at], mask=at < size, other=0)
        y = whole.astype(jnp.float32) * (load(x_absmax_ref, row[:, 0], T) / LEVELS)[:, None] + real
        y = y * (load(w_absmax_ref, along, N) / LEVELS)[None, :]
        for ref in bias_ref:
            y = y + load(ref, along, N)[None, :]
        seen = (row < T) & (along < N)[None, :]
        plgpu.store(y_ref.at[row, along[None, :]], y.astype(y_ref.dtype), mask=seen)
        return _

    @pl.when(more_ref[0] > 0)
    def _():
        lax.fori_loop(0, lax.div(down * across - first + programs - 1, programs), tile, 0)


@partial(jax.jit, static_argnames=("sizes", "interpret"))
def overrule(y, more, marks, x, x_q, x_absmax, w_q, w_absmax, bias, *, sizes=(64, 64, 64), interpret=False):
    """y [T, N], unless more [1] is 1: then LLM.int8() of x [T, K] with all marked columns in float.

    sizes: rows, columns and terms of a tile, powers of two of at least 32.
    """
    T, N = len(x), len(w_q)
    rows = (x_absmax, w_absmax) if bias is None else (x_absmax, w_absmax, bias)
    inputs = more, marks, x, x_q, w_q, *(a.astype(jnp.float32) for a in rows), y
    spec = lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * a.ndim)
    programs = min(PROGRAMS, -(-T // sizes[0]) * -(-N // sizes[1]))
    return pallas_call(
        partial(_overrule_kernel, sizes=sizes, programs=programs),
        out_shape=_shape(*y.shape, dtype=y.dtype),
        grid=(programs,),
        in_specs=[spec(a) for a in inputs],
        out_specs=spec(y),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="llm_int8_overrule",
    )(*inputs)
