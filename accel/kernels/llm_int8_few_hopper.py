"""LLM.int8() of a few tokens in Pallas for Hopper GPUs (Mosaic GPU): one kernel that reads the weights once.

The weights are the rows of the product, and every block gets equally many; the time is that of reading them.
One warpgroup of a block only loads (TMA, a ring of tiles); the others multiply, 64 rows each (wgmma, int32
sums in registers). Where a tile of 128 columns holds marked ones, its weights, which are in shared memory
anyway, are multiplied a second time in x's dtype (int8 is exact in it) by those columns of x, zeros beside
them: no column is searched, listed or gathered, and any number of them may be marked. In the end the sums
become float32, times the first scale, plus the second product, times the scale of the weights, plus bias.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from accel.kernels.flash_hopper import ROWS, cores_of, transposed, up
from accel.kernels.llm_int8_hopper import DEEP, MEMORY, load_as, pad_to, room
from accel.kernels.llm_int8_outliers_triton import UNITS
from ref.compression.llm_int8 import LEVELS

__all__ = ["FEW", "few_product"]

FEW = 64  # tokens up to which this is faster than tiles of tokens
STAGES = 12  # of the ring, at most


@dataclass(frozen=True)
class Tiles:
    """`high` weights' rows a block, `wide` tokens, `stages` of DEEP terms in a ring, `rooms` in x_o's.

    The ring must hold UNITS: x_o's part of so many tiles is loaded after all of theirs.
    """

    high: int
    wide: int
    stages: int
    rooms: int = 0

    @property
    def groups(self):
        return -(-self.high // ROWS)

    @staticmethod
    def fit(T, N, cores, marked):
        """As many rows for every block, and as deep a ring as there is room for."""
        turns = -(-N // (cores * 2 * ROWS))
        high, wide = min(2 * ROWS, max(ROWS, up(-(-N // (cores * turns)), 8))), up(T, 16)
        groups, rooms = -(-high // ROWS), 0 if not marked else 4 if wide <= 32 else 2
        rest = MEMORY - wide * 2 * (groups * ROWS + rooms * DEEP) - high * 8
        return Tiles(high, wide, min(STAGES, rest // ((high + wide) * DEEP)), rooms)


@partial(jax.jit, static_argnames=("T", "dtype", "tiles", "cores"))
def few_product(x_q, x_absmax, w_q, w_absmax, bias=None, marked=None, *, T, dtype, tiles=None, cores=None):
    """(x_q w_q^T x_absmax / 127 + x_o w_q^T) w_absmax / 127 + bias, [T, N] in dtype, T up to FEW.

    Args: x_q [T', K'] int8, T' = T up to 16s, K' a multiple of DEEP; w_q [N, K] int8, K <= K'; x_absmax [T'],
        w_absmax, bias [N]; marked: (x_o [T', K'] in dtype, flags [K' / DEEP / UNITS] int32) of
        `quantize_few`, or None; where a bit is 0, its DEEP columns of x_o are not read. Rows from T on may
        hold anything.
      dtype: bfloat16 or float16. tiles, cores: None is what suits the call and the device.
    """
    N = len(w_q)
    cores = cores or cores_of()
    tiles = tiles or Tiles.fit(T, N, cores, marked is not None)
    w_q = pad_to(w_q, x_q.shape[1])
    more = len(w_q) - N
    long = lambda a: jnp.pad(a.astype(jnp.float32), (0, more)) if more else a.astype(jnp.float32)
    operands = {"x": x_q, "w": w_q, "x_absmax": x_absmax.astype(jnp.float32), "w_absmax": long(w_absmax)}
    if bias is not None:
        operands["bias"] = long(bias)
    if marked is not None:
        operands |= dict(zip(("x_o", "flags"), marked, strict=True))
    y = _run(tiles, cores, dtype, T, operands)
    return y[:, :N] if more else y


def _run(tiles, cores, dtype, T, operands):
    N, count = len(operands["w"]), -(-len(operands["w"]) // tiles.high)
    blocks, deep = min(cores, count), operands["x"].shape[1] // DEEP
    flat = lambda *shape, dtype: plgpu.SMEM(shape, dtype)
    scratch = {
        "w_room": room(tiles.stages, tiles.high, DEEP, dtype=jnp.int8),
        "x_room": room(tiles.stages, tiles.wide, DEEP, dtype=jnp.int8),
        "y_room": plgpu.SMEM(
            (tiles.groups, tiles.wide, ROWS), dtype, transforms=(plgpu.SwizzleTransform(128),)
        ),
        "full": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=2),
        "free": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=tiles.groups),
        "w_scale": flat(up(tiles.high, 32), dtype=jnp.float32),
        "edge_full": plgpu.Barrier(num_arrivals=1 + ("bias" in operands)),
        "edge_free": plgpu.Barrier(num_arrivals=tiles.groups),
    }
    if "bias" in operands:
        scratch["w_bias"] = flat(up(tiles.high, 32), dtype=jnp.float32)
    if "x_o" in operands:
        scratch["x_o_room"] = room(tiles.rooms, tiles.wide, DEEP, dtype=dtype)
        scratch["x_o_full"] = plgpu.Barrier(num_barriers=tiles.rooms, num_arrivals=1)
        scratch["x_o_free"] = plgpu.Barrier(num_barriers=tiles.rooms, num_arrivals=tiles.groups)
    names = [*operands, "y", *scratch]

    def each(body):
        """body((loaded, again), first row) -> both, for the tiles of a block: steps so far, in both rings."""
        block = lax.axis_index("block")

        def turn(i, so_far):
            item = block + i * blocks
            go = lambda so_far: body(so_far, item * tiles.high)
            return lax.cond(item < count, go, lambda so_far: so_far, so_far)

        lax.fori_loop(jnp.int32(0), jnp.int32(-(-count // blocks)), turn, (jnp.int32(0), jnp.int32(0)))

    def kernel(*refs):
        refs = dict(zip(names, refs, strict=True))
        group = lax.axis_index("group")

        @pl.when(group < tiles.groups)
        def _():
            plgpu.set_max_registers({1: 240, 2: 232}[tiles.groups], action="increase")
            _multiply(tiles, deep, each, group, refs)

        @pl.when(group == tiles.groups)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _load(tiles, deep, each, refs)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, N), dtype),
        scratch_types=tuple(scratch.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tiles.groups + 1,
        thread_name="group",
        kernel_name="llm_int8_product_of_few",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands.values())


def _load(tiles, deep, each, refs):
    stages, nothing = jnp.int32(tiles.stages), lax.axis_index("block") * 0  # a start that may overhang

    def tile(so_far, row):
        loaded, again = so_far

        def load(j):
            slot = lax.rem(loaded + j, stages)
            pl.when(loaded + j >= stages)(lambda: plgpu.barrier_wait(refs["free"].at[slot]))
            full, k = refs["full"].at[slot], pl.ds(j * DEEP, DEEP)
            plgpu.copy_gmem_to_smem(refs["w"].at[pl.ds(row, tiles.high), k], refs["w_room"].at[slot], full)
            x = refs["x"].at[pl.ds(nothing, tiles.wide), k]
            plgpu.copy_gmem_to_smem(x, refs["x_room"].at[slot], full)

            @pl.when(j == min(tiles.stages, deep - 1))  # by then the groups are done with the tile before
            def _():
                pl.when(loaded > 0)(lambda: plgpu.barrier_wait(refs["edge_free"]))
                at = pl.ds(row, up(tiles.high, 32))
                plgpu.copy_gmem_to_smem(refs["w_absmax"].at[at], refs["w_scale"], refs["edge_full"])
                if "bias" in refs:
                    plgpu.copy_gmem_to_smem(refs["bias"].at[at], refs["w_bias"], refs["edge_full"])

        def load_again(j, again):
            slot = lax.rem(again, jnp.int32(tiles.rooms))
            pl.when(again >= tiles.rooms)(lambda: plgpu.barrier_wait(refs["x_o_free"].at[slot]))
            x_o = refs["x_o"].at[pl.ds(nothing, tiles.wide), pl.ds(j * DEEP, DEEP)]
            plgpu.copy_gmem_to_smem(x_o, refs["x_o_room"].at[slot], refs["x_o_full"].at[slot])
            return again + 1

        if "x_o" not in refs:
            pl.loop(jnp.int32(0), jnp.int32(deep))(load)
            return loaded + deep, again
        flags = refs["flags"]
        words = flags.shape[0]

        def some(i, carry):
            again, flag = carry
            after = flags[jnp.minimum(i + 1, words - 1)]
            start, end = i * UNITS, jnp.minimum((i + 1) * UNITS, deep)
            pl.loop(start, end)(load)  # first, so that they do not wait for the flag

            def more(j, again):
                return lax.cond(_bit(flag, j) > 0, partial(load_again, j), lambda again: again, again)

            return lax.fori_loop(start, end, more, again), after

        again, _ = lax.fori_loop(jnp.int32(0), jnp.int32(words), some, (again, flags[0]))
        return loaded + deep, again

    each(tile)


def _bit(flag, j):
    return lax.shift_right_logical(flag, lax.rem(j, jnp.int32(UNITS))) & 1


def _multiply(tiles, deep, each, group, refs):
    stages, nothing = jnp.int32(tiles.stages), lax.axis_index("block") * 0
    whole = plgpu.Layout.WGMMA
    shape = ROWS, tiles.wide
    # of 128 rows two groups have 64 each; of fewer the second begins earlier, and repeats some of the first's
    base = group * (tiles.high - ROWS)
    mine = pl.ds(base, ROWS)
    by_x = load_as(refs["x_absmax"], whole.reduce(0)) / LEVELS
    marked = "x_o" in refs

    def tile(so_far, row):
        loaded, again = so_far

        def product(acc):
            def step(j, carry):
                real, flag, again = carry
                slot = lax.rem(loaded + j, stages)
                left = refs["w_room"].at[slot, mine]
                plgpu.barrier_wait(refs["full"].at[slot])
                plgpu.wgmma(acc, left, transposed(refs["x_room"].at[slot]))
                plgpu.wgmma_wait(0)
                if marked:

                    def more(real, again):
                        at = lax.rem(again, jnp.int32(tiles.rooms))
                        w = load_as(left, plgpu.Layout.WGMMA_UPCAST_2X).astype(refs["x_o"].dtype)
                        w = plgpu.layout_cast(w, whole)
                        plgpu.barrier_wait(refs["x_o_full"].at[at])
                        x_o = transposed(refs["x_o_room"].at[at])
                        real = pl.run_state(lambda s: plgpu.wgmma(s, w, x_o))(plgpu.ACC.init(real))
                        plgpu.barrier_arrive(refs["x_o_free"].at[at])
                        return real, again + 1

                    seen = _bit(flag, j) > 0
                    real, again = lax.cond(seen, more, lambda *same: same, real, again)
                    flag = refs["flags"][lax.div(jnp.minimum(j + 1, deep - 1), jnp.int32(UNITS))]
                plgpu.barrier_arrive(refs["free"].at[slot])
                return real, flag, again

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), whole) if marked else jnp.float32(0)
            first = refs["flags"][0] if marked else jnp.int32(0)
            real, _, end = lax.fori_loop(jnp.int32(0), jnp.int32(deep), step, (zeros, first, again))
            return acc[...], real, end

        sums, real, again = pl.run_scoped(product, plgpu.ACC(shape, jnp.int32))
        out = sums.astype(jnp.float32) * lax.broadcast_in_dim(by_x, shape, [1])
        if marked:
            out = out + real
        plgpu.barrier_wait(refs["edge_full"])
        down = lambda ref: lax.broadcast_in_dim(load_as(ref.at[mine], whole.reduce(1)), shape, [0])
        out = out * (down(refs["w_scale"]) / LEVELS)
        if "bias" in refs:
            out = out + down(refs["w_bias"])
        plgpu.barrier_arrive(refs["edge_free"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        leaving = refs["y_room"].at[group]
        transposed(leaving)[...] = plgpu.layout_cast(
            out.astype(refs["y"].dtype), plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(leaving, refs["y"].at[pl.ds(nothing, tiles.wide), pl.ds(row + base, ROWS)])
        return loaded + deep, again

    each(tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
