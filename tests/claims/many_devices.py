"""Attention over several devices, also of several hosts: `python -m tests.claims.many_devices`.

On one host it takes all devices that JAX sees. On several, start it on each of n hosts (i = 0 .. n - 1) with
`--coordinator HOST:PORT --processes n --process i`, HOST being that of process 0. It checks causal
attention in a ring against the definition in float64. --gpu, on one host: also races one device against all,
from 32,768 to 131,072 tokens, and runs a forward pass over 1,048,576; writes docs/data/many_devices_gpu.json
after every part, two minutes in all.
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from accel.attention.flash import flash_attention
from accel.attention.sharded import decode_attention, ring_attention, unzigzag, zigzag
from ref.attention.flash import attention_dense
from ref.attention.lean import lean_attention as exact_decode
from tests.claims.record import store

FILES = (
    "accel/attention/flash.py",
    "accel/attention/lean.py",
    "accel/attention/sharded.py",
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_triton.py",
    "accel/kernels/lean_hopper.py",
    "tests/claims/many_devices.py",
)
PARTS = P(None, None, "context")


def mesh_of(devices):
    """A mesh of one axis, "context"."""
    return jax.sharding.Mesh(np.array(devices), ("context",), axis_types=(AxisType.Auto,))


def place(mesh, x, spec=PARTS):
    """x, which every process holds, as one array over the mesh."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda at: x[at])


def over(mesh, fn, in_specs, out_specs):
    """fn compiled for the mesh."""
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def ring(mesh, *, backward=False, impl="auto"):
    """Causal attention of q, k, v in zigzag order, or the sum of (dq, dk, dv) for a cotangent."""
    attend = partial(ring_attention, axis_name="context", causal=True, layout="zigzag", impl=impl)

    def both(q, k, v, do):
        o, pull = jax.vjp(attend, q, k, v)
        return (o, *pull(do))

    if backward:
        return over(mesh, both, (PARTS,) * 4, (PARTS,) * 4)
    return over(mesh, attend, (PARTS,) * 3, PARTS)


def errors(mesh, tokens, *, heads=4, kv_heads=2, width=32, dtype=jnp.float32):
    """{what: largest error against the definition, of this process's rows}; random inputs."""
    rng, n = np.random.default_rng(0), mesh.size
    draw = lambda h: np.asarray(jnp.asarray(rng.standard_normal((1, h, tokens, width), np.float32), dtype))
    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    want = attention_dense(*wide, causal=True)
    placed = [place(mesh, np.asarray(zigzag(x, n))) for x in (q, k, v)]
    found = {"causal, zigzag": _worst(ring(mesh)(*placed), np.asarray(zigzag(want, n)))}
    lengths = np.array([tokens // 3], np.int32)
    decode = over(
        mesh, lambda q, k, v, s: decode_attention(q, k, v, axis_name="context", lengths=s),
        (P(), PARTS, PARTS, P()), P(),
    )  # fmt: skip
    got = decode(place(mesh, q[:, :, 0], P()), place(mesh, k), place(mesh, v), place(mesh, lengths, P()))
    found["decode"] = _worst(got, exact_decode(wide[0][:, :, 0], *wide[1:], lengths=lengths))
    back = np.asarray(unzigzag(zigzag(q, n), n))
    assert np.array_equal(back, q)
    return found


def _worst(got, want):
    return max(
        float(np.abs(np.asarray(s.data, np.float64) - want[s.index]).max()) for s in got.addressable_shards
    )


def seconds(fn, *args, budget=1.0):
    """Median seconds of a call, its results awaited."""
    jax.block_until_ready(fn(*args))
    took = []
    while not took or sum(took) < budget:
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        took.append(time.perf_counter() - start)
    return float(np.median(took))


def drawn(mesh, shape, count):
    """`count` random bfloat16 arrays of `shape`, each part drawn on its own device."""
    draw = jax.jit(
        jax.shard_map(
            lambda seed: jax.random.normal(
                jax.random.fold_in(jax.random.key(seed[0]), jax.lax.axis_index("context")),
                (*shape[:2], shape[2] // mesh.size, shape[3]), jnp.bfloat16,
            ),
            mesh=mesh, in_specs=P(), out_specs=PARTS,
        )
    )  # fmt: skip
    return [draw(jnp.array([i], jnp.uint32)) for i in range(count)]


def scaling(lengths, *, backward, heads=16, width=128, budget=1.0):
    """Rows {tokens, backward, one, all, flash}: seconds on one device, on all, and plain flash on one."""
    for tokens in lengths:
        shape = 1, heads, tokens, width
        row = {"tokens": tokens, "heads": heads, "width": width, "backward": backward}
        for name, devices in (("one", jax.devices()[:1]), ("all", jax.devices())):
            mesh = mesh_of(devices)
            args = drawn(mesh, shape, 4 if backward else 3)
            row[name] = seconds(ring(mesh, backward=backward), *args, budget=budget)
            if name == "one" and not backward:
                plain = jax.jit(partial(flash_attention, causal=True))
                row["flash"] = seconds(plain, *args, budget=budget)
        print(row, flush=True)
        yield row


def race(mesh, found):
    """`found` again and again, with one part more: scaling forward, a million tokens, scaling backward."""
    found["errors in bfloat16"] = errors(mesh, 4096, heads=16, kv_heads=4, width=128, dtype=jnp.bfloat16)
    found["scaling"] = []
    for row in scaling((131072, 65536, 32768), backward=False):
        found["scaling"].append(row)
        yield found
    args = drawn(mesh, (1, 8, 1 << 20, 128), 3)
    found["million"] = {"tokens": 1 << 20, "heads": 8, "seconds": seconds(ring(mesh), *args, budget=0)}
    yield found
    del args
    for row in scaling((65536, 131072), backward=True):
        found["scaling"].append(row)
        yield found


def main():
    """Check, race, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--tokens", type=int, default=256, help="length of the check")
    parser.add_argument("--gpu", action="store_true", help="race on GPUs and store")
    options = parser.parse_args()
    if options.gpu and options.coordinator:
        parser.error("--gpu races the devices of one host")
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    mesh = mesh_of(jax.devices())
    found = {"devices": mesh.size, "processes": jax.process_count(), "errors": errors(mesh, options.tokens)}
    for part in race(mesh, found) if options.gpu else ():
        store("many_devices_gpu", part, FILES)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
