"""How our Pallas kernels for Triton and TPUs are called."""

import jax
from jax.experimental import pallas as pl

from accel.blocks.shapes import alike


def pallas_call(kernel, *, out_shape, **options):
    """`pl.pallas_call`, whose results differ between the devices of a mesh where any argument does.

    Inside `jax.shard_map` JAX wants to be told; elsewhere this changes nothing. Gradients of what all devices
    hold are summed by whoever made it `alike` the rest, before a gradient rule of his own.
    """

    def call(*args):
        args = alike(args, args)
        varying = jax.typeof(jax.tree.leaves(args)[0]).manual_axis_type
        result = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
        return pl.pallas_call(kernel, out_shape=jax.tree.map(result, out_shape), **options)(*args)

    return call
