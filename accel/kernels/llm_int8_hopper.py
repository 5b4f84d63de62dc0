"""The int8 product of LLM.int8() in Pallas for Hopper GPUs (Mosaic GPU), scales and outlier columns fused.

One warpgroup of a block only loads (TMA, a ring of tiles); the others multiply, 64 rows each (wgmma, int32
sums in registers). Two neighbouring blocks share a tile of weights, loaded once for both (multicast). In the
end the sums become float32, times the first scale, plus the product of the outlier columns (wgmma in x's
dtype: int8 weights are exact in it), times the scale of the weights, plus bias; they leave in x's dtype.
Few tokens have a kernel of their own, in llm_int8_few_hopper.py.
"""

import inspect
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels.flash_hopper import ROWS, cores_of, transposed, up
from ref.compression.llm_int8 import LEVELS

__all__ = ["DEEP", "int8_product"]

DEEP = 128  # terms at a time: what a row of swizzled shared memory holds
OUT = 32  # columns of the result that leave at a time
MEMORY = 224 * 1024  # bytes of shared memory for tiles


@dataclass(frozen=True)
class Tiles:
    """`high` rows and `wide` columns a block, `stages` of DEEP terms in the ring, `pair` neighbours share."""

    high: int
    wide: int
    stages: int
    pair: int = 1

    @property
    def groups(self):
        return self.high // ROWS

    def reach(self, T, N):
        """How far the tiles read what belongs to the tokens and to the neurons."""
        return up(T, self.high * self.pair), up(N, self.wide)

    @staticmethod
    def fit(T, N, R, cores):
        """What was fastest on an H200, with R outlier columns."""
        high, pair = 2 * ROWS, 2 if T > 2 * ROWS else 1
        wide = next(w for w in (256, 128, 64) if w == 64 or -(-T // high) * -(-N // w) >= cores)
        rest = MEMORY - (high + wide) * up(R, 16) * 2 - high * 2 * OUT * 2
        return Tiles(high, wide, min(10, rest // ((high + wide) * DEEP)), pair)


@partial(jax.jit, static_argnames=("dtype", "tiles", "cores"))
def int8_product(x_q, x_absmax, w_q, w_absmax, bias=None, strip=None, *, dtype, tiles=None, cores=None):
    """(x_q w_q^T x_absmax / 127 + x_o w_o^T) w_absmax / 127 + bias, [T, N] in dtype.

    Args: x_q [T, K'] int8, K' a multiple of DEEP; w_q [N, K] int8, K <= K'; x_absmax [T], w_absmax, bias [N];
        strip: (x_o [T, R], w_o [N, R]) in dtype, R a multiple of 16, or None; dtype: bfloat16 or float16.
      tiles, cores: None is what suits the call and the device.
    """
    T, N = len(x_q), len(w_q)
    cores = cores or cores_of()
    tiles = tiles or Tiles.fit(T, N, 0 if strip is None else strip[0].shape[1], cores)
    x_q, w_q = (pad_to(a, x_q.shape[1]) for a in (x_q, w_q))
    strip = None if strip is None else tuple(pad_to(a, a.shape[1]) for a in strip)
    rows, columns = tiles.reach(T, N)
    long = lambda a, n: jnp.pad(a.astype(jnp.float32), (0, n - len(a)))
    scales = long(x_absmax, rows), long(w_absmax, columns)
    bias = None if bias is None else long(bias, columns)
    return _run(tiles, cores, dtype, (x_q, w_q), scales, bias, strip)[:T, :N]


def pad_to(a, columns):
    """a with so many columns, and rows in eights, as TMA takes them."""
    more = -len(a) % 8, columns - a.shape[1]
    return jnp.pad(a, [(0, n) for n in more]) if any(more) else a


@dataclass(frozen=True)
class _Plan:
    """Which block takes which tile: the rows first, so that what is beside them stays in the cache."""

    tiles: Tiles
    down: int  # tiles of rows, of all the blocks of a pair
    across: int
    deep: int  # steps along K
    pairs: int

    def each(self, body):
        """body(loaded, first row, first column) -> loaded for the tiles of a block; the steps of them all."""
        pair, count = lax.axis_index("block"), self.down * self.across
        own = lax.axis_index("half") if self.tiles.pair > 1 else jnp.int32(0)

        def turn(i, loaded):
            item = pair + i * self.pairs
            m = lax.rem(item, jnp.int32(self.down)) * self.tiles.pair + own
            n = lax.div(item, jnp.int32(self.down))
            go = lambda loaded: body(loaded, m * self.tiles.high, n * self.tiles.wide)
            return lax.cond(item < count, go, lambda loaded: loaded, loaded)

        return lax.fori_loop(jnp.int32(0), jnp.int32(-(-count // self.pairs)), turn, jnp.int32(0))


def room(*shape, dtype):
    """Shared memory for tiles [..., rows, columns], in the order that TMA writes and wgmma reads."""
    wide = shape[-1] * jnp.dtype(dtype).itemsize
    span = next(s for s in (128, 64, 32, 16) if wide % s == 0)
    swizzle = (plgpu.SwizzleTransform(span),) if span > 16 else ()
    tiling = plgpu.TilingTransform((8, span // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, *swizzle))


def _run(tiles, cores, dtype, sides, scales, bias, strips):
    rows, columns = len(sides[0]), len(sides[1])
    down, across = -(-rows // (tiles.high * tiles.pair)), -(-columns // tiles.wide)
    pairs = min(cores // tiles.pair, down * across)
    plan = _Plan(tiles, down, across, sides[0].shape[1] // DEEP, pairs)
    ring = lambda high: room(tiles.stages, high, DEEP, dtype=jnp.int8)
    free = (
        plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=tiles.groups)
        if tiles.pair == 1
        else plgpu.ClusterBarrier(
            collective_axes=("half",), num_barriers=tiles.stages, num_arrivals=tiles.groups
        )
    )
    width = 0 if strips is None else strips[0].shape[1]
    operands = {"left": sides[0], "right": sides[1], "x_absmax": scales[0], "w_absmax": scales[1]}
    if bias is not None:
        operands["bias"] = bias
    if strips is not None:
        operands |= {"left_strip": strips[0], "right_strip": strips[1]}
    scratch = {
        "left_room": ring(tiles.high),
        "right_room": ring(tiles.wide),
        "out_room": room(tiles.groups, 2, ROWS, OUT, dtype=dtype),
        "full": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=2),
        "free": free,
    }
    if strips is not None:
        scratch |= {
            "left_edge": room(tiles.high, width, dtype=dtype),
            "right_edge": room(tiles.wide, width, dtype=dtype),
            "edge_full": plgpu.Barrier(num_arrivals=2),
            "edge_free": plgpu.Barrier(num_arrivals=tiles.groups),
        }
    names = list(operands), list(scratch)

    def kernel(*refs):
        given, y, rest = refs[: len(operands)], refs[len(operands)], refs[len(operands) + 1 :]
        _kernel(plan, y, dict(zip(names[0], given, strict=True)) | dict(zip(names[1], rest, strict=True)))

    cluster = {"cluster": (tiles.pair,), "cluster_names": ("half",)} if tiles.pair > 1 else {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, up(columns, OUT)), dtype),
        scratch_types=tuple(scratch.values()),
        grid=(pairs,),
        grid_names=("block",),
        num_threads=tiles.groups + 1,
        thread_name="group",
        kernel_name="llm_int8_product",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **cluster,
    )(*operands.values())


def _kernel(plan, y, refs):
    group, groups = lax.axis_index("group"), plan.tiles.groups

    @pl.when(group < groups)
    def _():
        plgpu.set_max_registers({1: 240, 2: 232}[groups], action="increase")
        _multiply(plan, group, y, refs)

    @pl.when(group == groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _load(plan, refs)


def _load(plan, refs):
    tiles, stages = plan.tiles, jnp.int32(plan.tiles.stages)
    shared = {"collective_axes": "half"} if tiles.pair > 1 else {}

    def tile(loaded, row, column):
        if "left_edge" in refs:
            pl.when(loaded > 0)(lambda: plgpu.barrier_wait(refs["edge_free"]))
            at = pl.ds(row, tiles.high)
            plgpu.copy_gmem_to_smem(refs["left_strip"].at[at], refs["left_edge"], refs["edge_full"])
            at = pl.ds(column, tiles.wide)
            plgpu.copy_gmem_to_smem(refs["right_strip"].at[at], refs["right_edge"], refs["edge_full"])

        @pl.loop(jnp.int32(0), jnp.int32(plan.deep))
        def _(j):
            slot = lax.rem(loaded + j, stages)
            pl.when(loaded + j >= stages)(lambda: plgpu.barrier_wait(refs["free"].at[slot]))
            full, k = refs["full"].at[slot], pl.ds(j * DEEP, DEEP)
            left = refs["left"].at[pl.ds(row, tiles.high), k]
            plgpu.copy_gmem_to_smem(left, refs["left_room"].at[slot], full)
            right = refs["right"].at[pl.ds(column, tiles.wide), k]
            plgpu.copy_gmem_to_smem(right, refs["right_room"].at[slot], full, **shared)

        return loaded + plan.deep

    loaded = plan.each(tile)

    @pl.loop(jnp.maximum(loaded - stages, 0), loaded)
    def _(at):  # the neighbour sets slots of this block free as well: it must not end before that
        plgpu.barrier_wait(refs["free"].at[lax.rem(at, stages)])


def _multiply(plan, group, y, refs):
    tiles, stages = plan.tiles, jnp.int32(plan.tiles.stages)
    whole = plgpu.Layout.WGMMA
    by_row, by_column = whole.reduce(1), whole.reduce(0)
    mine = pl.ds(group * ROWS, ROWS)

    def tile(loaded, row, column):
        def product(acc):
            @pl.loop(jnp.int32(0), jnp.int32(plan.deep))
            def _(j):
                slot = lax.rem(loaded + j, stages)
                plgpu.barrier_wait(refs["full"].at[slot])
                left, right = refs["left_room"].at[slot, mine], refs["right_room"].at[slot]
                plgpu.wgmma(acc, left, transposed(right))
                plgpu.wgmma_wait(1)
                pl.when(j > 0)(lambda: plgpu.barrier_arrive(refs["free"].at[lax.rem(loaded + j - 1, stages)]))

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs["free"].at[lax.rem(loaded + plan.deep - 1, stages)])
            return acc[...]

        sums = pl.run_scoped(product, plgpu.ACC((ROWS, tiles.wide), jnp.int32))
        rows, columns = pl.ds(row + group * ROWS, ROWS), pl.ds(column, tiles.wide)
        down = lambda name: _spread(refs[name].at[rows], by_row, 0, (ROWS, tiles.wide))
        across = lambda name: _spread(refs[name].at[columns], by_column, 1, (ROWS, tiles.wide))
        out = sums.astype(jnp.float32) * (down("x_absmax") / LEVELS)
        if "left_edge" in refs:
            plgpu.barrier_wait(refs["edge_full"])
            more = lambda acc: plgpu.wgmma(acc, refs["left_edge"].at[mine], transposed(refs["right_edge"]))
            out = pl.run_state(more)(plgpu.ACC.init(out))
            plgpu.barrier_arrive(refs["edge_free"])
        out = out * (across("w_absmax") / LEVELS)
        if "bias" in refs:
            out = out + across("bias")
        out = out.astype(y.dtype)
        for i, at in enumerate(range(0, tiles.wide, OUT)):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            slot = refs["out_room"].at[group, i % 2]
            slot[...] = out[:, at : at + OUT]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, y.at[rows, pl.ds(column + at, OUT)])
        return loaded + plan.deep

    plan.each(tile)
    plgpu.wait_smem_to_gmem(0)


def _spread(ref, layout, axis, shape):
    return lax.broadcast_in_dim(load_as(ref, layout), shape, [axis])


def load_as(ref, layout):
    """All of ref in registers of that layout."""
    index = inspect.signature(plgpu.load).parameters.get("idx")  # JAX 0.10 asks for one
    index = ((),) if index is not None and index.default is index.empty else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)
