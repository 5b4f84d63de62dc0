"""What LLM.int8() does around its int8 product, in Pallas for GPUs (Triton): rows to int8, outliers apart.

Three kernels. `quantize_rows`: a program owns a row, walks it twice, the second time from its cache, and
marks the columns that hold an outlier; whoever writes a mark writes a one, so the order does not matter.
`gather`: every program finds the first R marked columns for itself, and fetches them for its rows of x or of
the weights. `overrule`: the whole product once more, where more than R columns are marked; where not, its
programs end at once, which costs less than to ask the host.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ref.compression.llm_int8 import LEVELS, SMALLEST

__all__ = ["gather", "overrule", "quantize_rows"]

ROUND = 1.5 * 2.0**23  # a sum with it is rounded to an integer, ties to even
CHUNK = 4096  # columns at a time
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
    some = absmax >= SMALLEST
    factor = jnp.where(some, _over(LEVELS, jnp.where(some, absmax, 1.0)), 0.0)

    def narrow(j, _):
        at, x, outlier = piece(j)
        # the bound changes nothing, but that the product is rounded before the sum
        v = jnp.maximum(jnp.where(outlier, 0, x) * factor, -LEVELS)
        q = _bits(v + ROUND, jnp.int32).astype(jnp.int8)  # the last byte of the sum
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
    return pl.pallas_call(
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


def _gather_kernel(marks_ref, x_ref, w_ref, _, x_q_ref, x_o_ref, w_o_ref, more_ref, *, R, chunk):
    """The first R marked columns of x_ref [T, K] and w_ref [N, K], a block of rows of either a program."""
    (T, K), N, wide = x_ref.shape, w_ref.shape[0], x_o_ref.shape[1]
    place = jnp.arange(wide)

    def find(j, carry):
        """(at, so far): the places that chunk j fills, and the marks up to its end."""
        at, before = carry
        column = j * chunk + jnp.arange(chunk)
        mark = plgpu.load(marks_ref.at[pl.ds(j * chunk, chunk)], mask=column < K, other=0)

        def fill(at):
            nth = jnp.where(mark > 0, jnp.cumsum(mark) + (before - 1), -1)
            return at - jnp.where(nth[None, :] == place[:, None], K - column[None, :], 0).sum(axis=1)

        new = mark.sum()
        return lax.cond(new > 0, fill, lambda at: at, at), before + new

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
    return pl.pallas_call(
        partial(_gather_kernel, R=R, chunk=min(CHUNK * 16 // wide, pl.next_power_of_2(K))),
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
    return pl.pallas_call(
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
