"""What JAX keeps apart is joined in words: `lift` for ranks, `alike` for what differs between devices."""

import jax
from jax import lax


def lift(x, ndim):
    """x with axes of size 1 in front, so that it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def alike(fresh, *like):
    """`fresh`, a tree of arrays, counted as different on each device of a mesh where an array of `like` is.

    Inside `jax.shard_map` a loop must start with what it will carry, and the gradient of a weight that all
    devices hold must be summed over them; elsewhere this changes nothing.
    """
    axes = lambda x: jax.typeof(x).manual_axis_type.varying
    wanted = frozenset().union(*map(axes, jax.tree.leaves(like)))

    def vary(x):
        missing = tuple(wanted - axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, fresh)
