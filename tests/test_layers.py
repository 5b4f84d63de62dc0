"""The layers agree on every example of every technique: values, jit and vmap, gradients, bfloat16.

One bound serves all. A backward stable algorithm gives the exact answer for inputs off by a few ulps; how
far that
moves the output is measured by perturbing ref's float64 inputs by one ulp of the format. accel may be off by
K times
that, plus K ulps of the largest output.
"""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import ref
from ref.catalog import CATALOG

ROOT = Path(__file__).parent.parent
K = 64  # ulps granted: a sum of 64 to 4096 terms in pairwise or blocked order stays well within it
EPS = {"float32": float(jnp.finfo(jnp.float32).eps), "bfloat16": float(jnp.finfo(jnp.bfloat16).eps)}
TWO = jax.make_mesh(
    (2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2]
)


def examples():
    for t in CATALOG:
        if (ROOT / "accel" / t.part / f"{t.slug}.py").exists():
            for i, e in enumerate(getattr(ref, t.slug).example()):
                yield pytest.param(t.slug, i, id=f"{t.slug}-{i}-{e.fn}")


cases = pytest.mark.parametrize(("slug", "i"), list(examples()))


def is_float(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def cast(tree, dtype):
    """Float arrays rounded to dtype; what it gives is float64 for ref and dtype for accel, the same
    numbers. NumPy rounds, and `device_put` moves: neither compiles a program for each shape.
    """
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)) if is_float(x) else x, tree)
    exact = jax.tree.map(lambda x: x.astype(np.float64) if is_float(x) else x, rounded)
    device = jax.tree.map(lambda x: jax.device_put(x) if hasattr(x, "dtype") else x, rounded)
    return exact, device


def nudge(tree, eps, rng):
    """Every float one ulp up or down."""
    sign = lambda x: x * (1 + eps * rng.choice((-1.0, 1.0), np.shape(x)))
    return jax.tree.map(lambda x: sign(x) if is_float(x) else x, tree)


def leaves(out):
    return jax.tree.leaves(out)


def close(got, want, nudged, eps, label):
    """accel's output against ref's, within the measured conditioning; integers and flags equal."""
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want), label
    for n, (g, w) in enumerate(zip(got, want, strict=True)):
        g, w = np.asarray(g), np.asarray(w)
        assert g.shape == w.shape, f"{label}: output {n} has shape {g.shape}, expected {w.shape}"
        if w.dtype.kind != "f":
            if eps == EPS["float32"]:
                np.testing.assert_array_equal(g, w, err_msg=label)
            continue
        g = g.astype(np.float64)
        finite = np.isfinite(w)
        np.testing.assert_array_equal(g[~finite], w[~finite], err_msg=label)
        moved = max((np.abs(leaves(x)[n][finite] - w[finite]).max(initial=0) for x in nudged), default=0.0)
        atol = K * (moved + eps * np.abs(w[finite]).max(initial=0))
        np.testing.assert_allclose(g[finite], w[finite], rtol=0, atol=atol, err_msg=label)


def call(module, e, args):
    return getattr(module, e.fn)(*args, **e.kwargs)


def reference(slug, i, dtype, seed=0):
    """(example, accel args, ref result, ref results for nudged inputs)."""
    e = getattr(ref, slug).example(seed)[i]
    exact, device = cast(e.args, dtype)
    rng = np.random.default_rng(1)
    nudged = [call(getattr(ref, slug), e, nudge(exact, EPS[dtype], rng)) for _ in range(2)]
    return e, device, call(getattr(ref, slug), e, exact), nudged


@cases
def test_layers_agree_under_jit_vmap_and_shard_map(slug, i):
    """One compiled call on a batch of two seeds' examples, on each of two devices: all must equal ref."""
    first, second = reference(slug, i, "float32"), reference(slug, i, "float32", seed=1)
    shapes = [jax.tree.map(np.shape, r[1]) for r in (first, second)]
    pair = (first, second) if shapes[0] == shapes[1] else (first, first)
    e = first[0]
    mapped = [any(hasattr(x, "dtype") for x in jax.tree.leaves(a)) for a in e.args]
    stacked = [
        jax.tree.map(lambda x, y: np.stack([x, y, x, y]), a, b)
        for a, b, m in zip(pair[0][1], pair[1][1], mapped, strict=True)
        if m
    ]
    fn = partial(getattr(getattr(accel, slug), e.fn), **e.kwargs)

    def one(*arrays):
        arrays = iter(arrays)
        return fn(*(next(arrays) if m else a for a, m in zip(e.args, mapped, strict=True)))

    parts = jax.sharding.PartitionSpec("batch")
    checked = e.fn != "moe_gate_backward" or jax.__version_info__ < (0, 12)  # its erf fails JAX's own check
    sharded = jax.shard_map(jax.vmap(one), mesh=TWO, in_specs=parts, out_specs=parts, check_vma=checked)
    compiled = jax.jit(sharded).lower(*stacked).compile()
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", compiled.as_text())
    got = jax.device_get(compiled(*stacked))
    for n in range(4):
        _, _, want, nudged = pair[n % 2]
        label = f"{slug}.{e.fn} of seed {n % 2}"
        close(jax.tree.map(lambda x, n=n: x[n], got), want, nudged, EPS["float32"], label)


@cases
def test_layers_agree_in_bfloat16(slug, i):
    """Inputs rounded to bfloat16: the output keeps float32's accuracy until its own last rounding."""
    e, args, want, nudged = reference(slug, i, "bfloat16")
    got = call(getattr(accel, slug), e, args)
    close(got, want, nudged, EPS["bfloat16"], f"{slug}.{e.fn}")


@cases
def test_layers_agree_on_gradients(slug, i):
    """<gradient, direction> in accel against the central difference of ref, whose own error Richardson
    measures.
    """
    e = getattr(ref, slug).example()[i]
    if not e.diff_args:
        # Nothing to differentiate: the example says so, and that its outputs are what they are under jit is
        # tested.
        assert e.diff_args == ()
        return
    exact, device = cast(e.args, "float32")
    rng = np.random.default_rng(2)
    scale = lambda x: np.abs(x).max(initial=0) or 1.0
    direction = jax.tree.map(
        lambda x: scale(x) * rng.standard_normal(x.shape) if is_float(x) else x,
        [exact[n] for n in e.diff_args],
    )
    out = call(getattr(ref, slug), e, exact)
    weights = [rng.standard_normal(np.shape(o)) if is_float(o) else None for o in leaves(out)]

    def scalar(result, xp):
        total = 0.0
        for o, w in zip(leaves(result), weights, strict=True):
            if w is not None:
                total = total + xp.sum(xp.where(xp.isfinite(o), o, 0 * w.astype(o.dtype)) * w.astype(o.dtype))
        return total

    def moved(h):
        args = list(exact)
        for n, d in zip(e.diff_args, direction, strict=True):
            args[n] = jax.tree.map(lambda x, d: x + h * d if is_float(x) else x, args[n], d)
        return scalar(call(getattr(ref, slug), e, args), np)

    h = 1e-5
    slope, coarse = ((moved(s) - moved(-s)) / (2 * s) for s in (h, 2 * h))

    def loss(*diff):
        args = list(device)
        for n, x in zip(e.diff_args, diff, strict=True):
            args[n] = x
        return scalar(call(getattr(accel, slug), e, args), jnp)

    at = tuple(range(len(e.diff_args)))
    grads = jax.jit(jax.grad(loss, argnums=at, allow_int=True))(*[device[n] for n in e.diff_args])
    got, size = 0.0, 0.0
    for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True):
        if is_float(g):
            got += np.sum(np.asarray(g, np.float64) * d)
            size += np.sum(np.abs(np.asarray(g, np.float64) * d))
    # float32 gradients: K ulps of the terms added up; the difference quotient: its change under doubling h
    np.testing.assert_allclose(
        got, slope, rtol=0, atol=K * EPS["float32"] * size + 2 * abs(slope - coarse) + 1e-9
    )
