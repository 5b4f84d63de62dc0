"""Train a small GPT on all devices of all hosts: batches over "data", sequences over "context".

On one host: `python -m tests.docs.hosts`. On n hosts, start it on each of them (i = 0 .. n - 1):
`python -m tests.docs.hosts --coordinator HOST0:1234 --processes n --process i`. Every host reads only its own
part of a batch; keys and values go round the devices of a sequence; gradients are summed over all.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from accel.attention.sharded import ring_attention, zigzag
from accel.blocks.norms import layer_norm
from accel.models import gpt
from ref.data import text

CUT = P("data", "context")  # [batch, tokens]


# --8<-- [start:mesh]
def mesh_of(devices, context):
    """The devices as a grid: `context` neighbours share a sequence, the rest are other rows of the batch.

    `jax.devices()` lists a host's devices one after the other, so a sequence stays on one host as long as
    `context` divides its devices: keys travel over the fast links, gradients once a step over the slow ones.
    """
    grid = np.array(devices).reshape(-1, context)
    return jax.sharding.Mesh(grid, ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    # --8<-- [end:mesh]


# --8<-- [start:data]
def batch(mesh, step, rows, length):
    """(ids, next ids, positions) of a step, int32 [rows, length], in zigzag order and in parts on the mesh.

    A host is asked for its own parts alone. A row depends on its number and the step, not on who reads it.
    """
    data = np.frombuffer(text().encode("ascii", "replace"), np.uint8).astype(np.int32)
    parts = mesh.shape["context"]
    order = np.asarray(zigzag(jnp.arange(length, dtype=jnp.int32)[:, None], parts))[:, 0]

    def part(offset, index):
        at = order[index[1]]
        draw = lambda row: np.random.default_rng((step, row)).integers(len(data) - length)
        starts = [draw(row) for row in range(rows)[index[0]]]
        return np.stack([data[s + at + offset] for s in starts])

    sharding = NamedSharding(mesh, CUT)
    place = lambda read: jax.make_array_from_callback((rows, length), sharding, read)
    position = lambda index: np.broadcast_to(order, (rows, length))[index]
    return place(partial(part, 0)), place(partial(part, 1)), place(position)
    # --8<-- [end:data]


# --8<-- [start:loss]
def loss_over(mesh, heads):
    """loss(params, ids, next ids, positions): mean nats a byte, one number, the same everywhere."""
    attend = partial(ring_attention, axis_name="context", layout="zigzag", impl="auto")

    def local(params, ids, following, positions):
        x = params.wte[ids] + params.wpe[positions]
        ring = lambda q, k, v, *, mask=None, causal: attend(q, k, v, causal=causal)
        x = gpt.gpt_blocks(x, params, num_heads=heads, attention=ring)
        logits = layer_norm(x, params.lnf_scale, params.lnf_bias) @ params.wte.T
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], axis=-1)
        return jax.lax.pmean(-picked.mean(), ("data", "context"))  # parts are of equal size

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), CUT, CUT, CUT), out_specs=P())
    # --8<-- [end:loss]


# --8<-- [start:train]
def train(mesh, *, steps=20, rows=8, length=64, dim=32, depth=2, heads=4, rate=0.3):
    """(parameters, losses) of plain gradient descent; both are the same on every host."""
    drawn = gpt.init_gpt(np.random.default_rng(0), vocab=256, context=length, dim=dim, depth=depth)
    everywhere = NamedSharding(mesh, P())
    # every host drew the same numbers; of larger ones each would make its own parts in a callback
    put = lambda x: jax.make_array_from_callback(
        x.shape, everywhere, lambda at: np.asarray(x, np.float32)[at]
    )
    params = gpt.stack_blocks(jax.tree.map(put, drawn))
    loss = loss_over(mesh, heads)

    @partial(jax.jit, donate_argnums=0)
    def step(params, *data):
        value, grads = jax.value_and_grad(loss)(params, *data)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

    losses = []
    for n in range(steps):
        params, value = step(params, *batch(mesh, n, rows, length))
        losses.append(float(value))  # every host holds it
    return params, losses
    # --8<-- [end:train]


# --8<-- [start:main]
def main():
    """Join the other hosts, train, save on the first of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--context", type=int, help="devices that share a sequence (default: a host's)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", metavar="FILE.npz")
    options = parser.parse_args()
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    mesh = mesh_of(jax.devices(), options.context or jax.local_device_count())
    params, losses = train(mesh, steps=options.steps)
    print(f"process {jax.process_index()} of {jax.process_count()}, mesh {dict(mesh.shape)}", flush=True)
    print("losses " + " ".join(f"{x:.6f}" for x in losses), flush=True)
    if options.save and jax.process_index() == 0:
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        np.savez(options.save, **dict(zip(names, map(np.asarray, jax.tree.leaves(params)), strict=True)))


if __name__ == "__main__":
    main()
    # --8<-- [end:main]
