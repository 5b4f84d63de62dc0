"""Attention over several devices: the ring, and the cache in parts, against the definition."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import accel
from accel.attention.lean import IN_CACHE
from accel.attention.sharded import decode_attention, ring_attention, unzigzag, zigzag
from ref.attention import flash, lean
from ref.memory.rum import init_rum

ROOT = Path(__file__).resolve().parents[2]
PARTS = P(None, None, "context")
WAYS = {"full": (False, "contiguous"), "causal": (True, "contiguous"), "zigzag": (True, "zigzag")}
# A logit is a sum of D = 8 products of normal numbers, an output an average: both far below 16; each is
# rounded some 2 D + L = 64 times in float32, 2^-24 relative.
ATOL = 16 * 64 * 2.0**-24


def mesh(parts):
    """A mesh of so many of the host's eight simulated devices."""
    devices = jax.devices("cpu")[:parts]
    return jax.make_mesh((parts,), ("context",), axis_types=(AxisType.Auto,), devices=devices)


def inputs(parts, *, seed=0, each=6, heads=4, kv_heads=2, width=8, dtype=np.float32):
    """q, k, v and a cotangent over parts x each positions."""
    rng = np.random.default_rng(seed)
    draw = lambda h: rng.standard_normal((1, h, parts * each, width)).astype(np.float32)
    return [jnp.asarray(draw(h), dtype) for h in (heads, kv_heads, kv_heads, heads)]


def ring(parts, way, *, impl="xla", interpret=False):
    """Global arrays in their natural order -> the same, through the ring."""
    causal, layout = WAYS[way]
    fn = jax.shard_map(
        partial(
            ring_attention, axis_name="context", causal=causal, layout=layout, impl=impl, interpret=interpret
        ),
        mesh=mesh(parts), in_specs=PARTS, out_specs=PARTS, check_vma=not interpret,
    )  # fmt: skip
    if layout == "contiguous":
        return fn
    return lambda *x: unzigzag(fn(*(zigzag(a, parts) for a in x)), parts)


def both(fn):
    """(o, dq, dk, dv) of (q, k, v, do), compiled."""

    def run(q, k, v, do):
        o, pull = jax.vjp(fn, q, k, v)
        return (o, *pull(do))

    return jax.jit(run)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [1, 4])
def test_ring_equals_one_device(parts, way):
    args = inputs(parts)
    wide = [np.asarray(x, np.float64) for x in args]
    causal = WAYS[way][0]
    o, lse = flash.flash_attention(*wide[:3], causal=causal, return_lse=True)
    want = o, *flash.flash_attention_bwd(wide[3], *wide[:3], o, lse, causal=causal)
    for got, exact in zip(both(ring(parts, way))(*args), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=0, atol=ATOL)


def test_ring_in_bfloat16_rounds_once_a_step():
    args = inputs(4, dtype=jnp.bfloat16)
    wide = [np.asarray(x, np.float64) for x in args[:3]]
    got = jax.jit(ring(4, "zigzag"))(*args[:3])
    assert got.dtype == jnp.bfloat16
    exact = flash.attention_dense(*wide, causal=True)
    # P v with P in bfloat16, each step's average, and the result: three roundings of numbers below max |v|.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), exact, rtol=0, atol=3 * 2.0**-8 * np.abs(wide[2]).max()
    )


def test_ring_runs_the_kernel():
    args = inputs(2, each=16)
    want = both(ring(2, "zigzag"))(*args)
    got = both(ring(2, "zigzag", impl="triton", interpret=True))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * ATOL)  # both are off by up to ATOL


def test_ring_sends_parts_and_gathers_nothing():
    args = inputs(4)
    text = jax.jit(both(ring(4, "causal"))).lower(*args).compile().as_text()
    assert "collective-permute" in text
    assert not re.search(r"all-gather|all-to-all|all-reduce|reduce-scatter", text)


@pytest.mark.parametrize("way", WAYS)
def test_ring_sends_beside_the_products(way):
    """In a step only sums take what that step was sent: the keys it multiplies came before."""
    body = both(ring(4, way))
    loops = [eqn for eqn in equations(jax.make_jaxpr(body)(*inputs(4)).jaxpr) if eqn.primitive.name == "scan"]
    found = 0
    for loop in loops:
        steps = loop.params["jaxpr"].jaxpr.eqns
        sent = {v for eqn in steps if eqn.primitive.name == "ppermute" for v in eqn.outvars}
        takers = [eqn for eqn in steps if sent & {v for v in eqn.invars if not hasattr(v, "val")}]
        assert {eqn.primitive.name for eqn in takers} <= {"add"}
        found += len(sent)
    assert found == 6  # k and v in the forward pass; k, v, dk and dv in the backward pass


def equations(jaxpr):
    """Every equation of a program, those of programs inside it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_zigzag_pairs_the_ends():
    x = jnp.arange(12)[:, None]
    assert zigzag(x, 3)[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert unzigzag(zigzag(x, 3), 3)[:, 0].tolist() == list(range(12))


BAD = {
    "layout": ({"layout": "striped"}, "layout"),
    "zigzag without a mask": ({"layout": "zigzag"}, "causal"),
    "odd part": ({"layout": "zigzag", "causal": True, "each": 3}, "L=3"),
}


@pytest.mark.parametrize("name", BAD)
def test_ring_rejects(name):
    options, message = BAD[name]
    q, k, v, _ = inputs(2, each=options.pop("each", 4))
    fn = partial(ring_attention, axis_name="context", **options)
    with pytest.raises(ValueError, match=message):
        jax.shard_map(fn, mesh=mesh(2), in_specs=PARTS, out_specs=PARTS)(q, k, v)


def test_ring_rejects_causal_with_other_keys_and_uneven_zigzags():
    q, k, v, _ = inputs(2)
    fn = partial(ring_attention, axis_name="context", causal=True)
    with pytest.raises(ValueError, match="S=2"):
        jax.shard_map(fn, mesh=mesh(2), in_specs=PARTS, out_specs=PARTS)(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        zigzag(q, 4)
    with pytest.raises(ValueError, match="parts"):
        zigzag(q, 0)


def test_cache_in_parts_equals_one_device():
    q, k, v, _ = inputs(4, each=6)
    q, k, v = (jnp.concatenate([x, -x, 2 * x]) for x in (q[:, :, 0], k, v))
    lengths = jnp.array([24, 7, 1], jnp.int32)  # all, a part and a bit, one key: some parts see none
    whole = P(), PARTS, PARTS
    fn = lambda q, k, v, s=None: decode_attention(q, k, v, axis_name="context", lengths=s)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    # The last batch has twice the queries and keys: logits, and what rounding moves, are four times larger.
    run = jax.jit(jax.shard_map(fn, mesh=mesh(4), in_specs=(*whole, P()), out_specs=P()))
    np.testing.assert_allclose(
        run(q, k, v, lengths), lean.lean_attention(*wide, lengths=lengths), rtol=0, atol=4 * ATOL
    )
    everything = jax.jit(jax.shard_map(fn, mesh=mesh(4), in_specs=whole, out_specs=P()))
    np.testing.assert_allclose(everything(q, k, v), lean.lean_attention(*wide), rtol=0, atol=4 * ATOL)
    text = run.lower(q, k, v, lengths).compile().as_text()
    assert not re.search(r"all-gather|all-to-all", text)


def test_cache_in_parts_by_a_kernel():
    """A device whose part lies behind the length calls the kernel all the same, and says nothing."""
    q, k, v, _ = inputs(2, each=6)
    q, k, v = (jnp.concatenate([x, -x]) for x in (q[:, :, 0], k, v))
    lengths = jnp.array([7, 2], jnp.int32)
    fn = partial(decode_attention, axis_name="context", impl="triton", interpret=True)
    spread = lambda q, k, v, s: fn(q, k, v, lengths=s)
    parts = P(), PARTS, PARTS, P()
    run = jax.jit(jax.shard_map(spread, mesh=mesh(2), in_specs=parts, out_specs=P(), check_vma=False))
    want = lean.lean_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), lengths=lengths)
    np.testing.assert_allclose(run(q, k, v, lengths), want, rtol=0, atol=ATOL)


def test_cache_in_parts_that_is_walked():
    """More than fits a cache: the walk over tiles starts with states that differ between devices."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(1, 2, 64), draw(1, 1, 36_000, 64), draw(1, 1, 36_000, 64)
    assert k.nbytes + v.nbytes > 2 * IN_CACHE
    fn = partial(decode_attention, axis_name="context")
    run = jax.jit(jax.shard_map(fn, mesh=mesh(2), in_specs=(P(), PARTS, PARTS), out_specs=P()))
    want = lean.lean_attention(*(np.asarray(x, np.float64) for x in (q, k, v)))
    # A logit has 64 terms, not 8, scaled by 1/8: some three times the magnitude of `ATOL`'s.
    np.testing.assert_allclose(run(q, k, v), want, rtol=0, atol=4 * ATOL)


def test_weights_on_every_device_get_the_gradient_of_all_batches():
    """Data parallel training of what has a backward pass of its own: weights replicated, batches in parts."""
    params = jax.tree.map(jnp.float32, init_rum(0, 3, 4))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 3)), jnp.float32)
    loss = lambda p, x: accel.rum.rum(x, p, lambda_=1)[0].sum()
    spread = jax.shard_map(jax.grad(loss), mesh=mesh(2), in_specs=(P(), P("context")), out_specs=P())
    want, got = jax.jit(jax.grad(loss))(params, x), jax.jit(spread)(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Two sums of the same 4 x 5 terms, each below some 10, in another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * 20 * 2.0**-24)


def test_ring_and_cache_on_two_processes():
    """Two processes of one device each, joined over the loopback: the script that runs on many hosts."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "tests.claims.many_devices", "--tokens", "32",
        "--coordinator", f"127.0.0.1:{port}", "--processes", "2",
    ]  # fmt: skip
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [*command, "--process", str(i)], cwd=ROOT, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for run in runs:
        out, err = run.communicate(timeout=100)
        assert run.returncode == 0, err[-2000:]
        found = json.loads(out.splitlines()[-1])
        assert (found["devices"], found["processes"]) == (2, 2)
        assert max(found["errors"].values()) < 4 * ATOL, found  # width 32
