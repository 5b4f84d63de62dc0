"""Products as the units beside DRAM banks compute them, in JAX; see ref/blocks/lanes.py.

A tile is one product of bfloat16 numbers in float32, so that it runs on matrix units and is priced in the
banks. The order of a tile's float32 additions is the device's, not the tree's: where a sum lies within a few
float32 ulps of the middle of two bfloat16 numbers, the rounding may differ. Executed on a `Pim` target, the
same program adds in the tree's order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ref.blocks.lanes import check_units
from ref.dims import dims


def round_bf16(x):
    """The nearest bfloat16 number, ties to even, as float32."""
    return lax.reduce_precision(x.astype(jnp.float32), 8, 7)


def dot_bf16_tree(x, w, *, lanes=16, acc="f32"):
    """x w in one accumulator, rounded to bfloat16 once or, acc="bf16", after every `lanes` inputs."""
    return vmm_bf16(x, w, lanes=lanes, tile=max(w.shape[0], 1), acc=acc)


def vmm_bf16(x, w, *, lanes=16, tile=1024, acc="f32"):
    """x w cut into tiles of `tile` inputs: each read in bfloat16 and added in bfloat16.

    x [..., K], w [K, M], rounded to bfloat16 first. Returns: float32 [..., M], bfloat16 numbers.
    """
    n = dims(w=(w, "K M"))
    check_units(x, n["K"], lanes, tile, acc)
    return _vmm(x, w, lanes=lanes, tile=tile, acc=acc)


@partial(jax.jit, static_argnames=("lanes", "tile", "acc"))
def _vmm(x, w, *, lanes, tile, acc):
    x, w = round_bf16(x), round_bf16(w)
    total = None
    for i in range(0, w.shape[0], tile):
        part = _tile(x[..., i : i + tile], w[i : i + tile], lanes, acc)
        total = part if total is None else round_bf16(total + part)
    return total


def _tile(x, w, lanes, acc):
    if acc == "f32":
        return round_bf16(jnp.matmul(x, w))
    short = -w.shape[0] % lanes
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]).reshape(*x.shape[:-1], -1, lanes)
    w = jnp.pad(w, ((0, short), (0, 0))).reshape(-1, lanes, w.shape[1])
    columns = jnp.einsum("...cl,clm->c...m", x, w)
    return lax.scan(lambda s, c: (round_bf16(s + c), None), jnp.zeros_like(columns[0]), columns)[0]
