"""What tools count, what is covered, and how far estimates are off: `python -m tests.claims.hw_ir`, or --gpu.

Writes docs/data/hw_ir.json (hw_ir_h200.json on a GPU): the loop-correct counting table; for every function
that an example() calls, what traces and which presets price it; and seconds estimated beside measured, at the
realistic size that its HW record gives, else at the example's.
"""

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

import accel
import hw
import ref
from hw.targets import presets
from ref.catalog import CATALOG
from tests.claims.hw_gpu import measured
from tests.claims.record import ROOT, store
from tests.hw_record import bound_call, record

FILES = (
    "hw/trace.py",
    "hw/passes.py",
    "hw/primitives.py",
    "hw/count.py",
    "hw/fusion.py",
    "hw/cpu.py",
    "hw/gpu.py",
    "tests/claims/hw_ir.py",
)


def _body(x, w):
    return jnp.tanh(x @ w)


def _pallas(x, w):
    def kernel(x_ref, w_ref, o_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            o_ref[...] = jnp.zeros_like(o_ref)

        o_ref[...] += x_ref[...] @ w_ref[...]

    return pl.pallas_call(
        kernel, grid=(4, 4, 4), out_shape=jax.ShapeDtypeStruct((64, 64), x.dtype), interpret=True,
        in_specs=[
            pl.BlockSpec((16, 16), lambda i, j, k: (i, k)),
            pl.BlockSpec((16, 16), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((16, 16), lambda i, j, k: (i, j)),
    )(x, w)  # fmt: skip


LOOPS = {  # name: (function of x, w [64, 64] float32, its true flops in products)
    "ten steps written out": (lambda x, w: _ten(x, w), 5_242_880),
    "scan, 10 steps": (lambda x, w: lax.scan(lambda c, _: (_body(c, w), None), x, None, 10)[0], 5_242_880),
    "while, 10 steps": (
        lambda x, w: lax.while_loop(lambda c: c[1] < 10, lambda c: (_body(c[0], w), c[1] + 1), (x, 0))[0],
        5_242_880,
    ),
    "cond, a product or nothing": (
        lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x),
        524_288,
    ),
    "pallas_call, 4 x 4 x 4 tiles": (_pallas, 524_288),
}


def _ten(x, w):
    for _ in range(10):
        x = _body(x, w)
    return x


def counting():
    """Rows {case, true, xla, jax_roofline, ours}: flops; text where a tool has no number.

    jax.experimental.roofline needs absl-py, which JAX does not install.
    """
    from jax.experimental import roofline

    spec = jax.ShapeDtypeStruct((64, 64), "float32")
    rows = []
    for case, (fn, true) in LOOPS.items():
        xla = jax.jit(fn).lower(spec, spec).compile().cost_analysis()["flops"]
        try:
            theirs = int(roofline.roofline(fn)(spec, spec)[1].flops)
        except Exception as e:  # the tool's own failure is the figure
            theirs = type(e).__name__
        ours = hw.count(hw.trace(fn, spec, spec))
        rows.append({"case": case, "true": true, "xla": int(xla), "jax_roofline": theirs, "ours": ours.flops})
    return rows


def functions():
    """(slug, example, call, arrays) of the first example of every function that accel has."""
    for t in CATALOG:
        if not (ROOT / "accel" / t.part / f"{t.slug}.py").exists():
            continue
        seen = set()
        for e in getattr(ref, t.slug).example():
            if e.fn not in seen:
                seen.add(e.fn)
                args = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "dtype") else x, e.args)
                yield t, e, *bound_call(getattr(getattr(accel, t.slug), e.fn), args, e.kwargs)


def coverage():
    """Rows {slug, fn, ops, macs, targets priced, refused: {why: targets}}; `error` if it does not trace."""
    targets = {n: f() for n, f in presets().items() if n != "this_cpu"}
    rows = []
    for t, e, call, args in functions():
        row = {"slug": t.slug, "fn": e.fn}
        try:
            program = hw.trace(call, *args)
            try:
                macs = hw.count(program).macs
            except hw.UnknownTripCount:
                program = hw.run_program(program, args)[1].measured(program)
                macs = hw.count(program).macs
        except (NotImplementedError, ValueError) as why:
            rows.append(row | {"error": f"{type(why).__name__}: {why}"})
            continue
        refused, priced = {}, 0
        for name, target in targets.items():
            try:
                hw.estimate(program, target)
                priced += 1
            except (hw.UnsupportedPrimitive, hw.DoesNotFit) as why:
                refused.setdefault(type(why).__name__, []).append(name)
        rows.append(row | {"ops": len(program.ops), "macs": macs, "priced": priced, "refused": refused})
    return rows


def _array(rng, spec):
    dtype, shape = spec
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        return jnp.zeros(shape, dtype)
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def _is_spec(x):
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) and isinstance(x[1], tuple)


def estimates(target, *, calls=1, budget=0.3):
    """Rows {slug, fn, size, class, estimated_s, measured_s, error}; class: the kind that takes longest."""
    rng = np.random.default_rng(0)
    empty = measured(lambda x: x, [jnp.zeros(())], calls=calls, budget=budget)
    rows = []
    for t, e, call, args in functions():
        try:
            expected = record(t).get(e.fn)
        except AssertionError:
            expected = None
        size = "example"
        if expected is not None and expected.large is not None:
            size = "realistic"
            args = [jax.tree.map(partial(_array, rng), a, is_leaf=_is_spec) for a in expected.large]
            call = partial(getattr(getattr(accel, t.slug), e.fn), **expected.options)
        try:
            program = hw.trace(call, *args)
            report = hw.estimate(program, target)
        except (NotImplementedError, ValueError, MemoryError):
            continue
        by_kind = {}
        for c in report.by_op:
            by_kind[c.kind] = by_kind.get(c.kind, 0) + c.seconds
        seconds = measured(call, args, calls=calls, budget=budget)
        estimated = report.seconds + empty
        row = {"slug": t.slug, "fn": e.fn, "size": size, "bound_by": report.bound_by}
        row["class"] = max(by_kind, key=by_kind.get, default="none")
        rows.append(row | {"estimated_s": estimated, "measured_s": seconds, "error": estimated / seconds - 1})
        print(f"{t.slug}.{e.fn} ({size}): {estimated * 1e6:.1f} us, measured {seconds * 1e6:.1f} us")
    return rows, empty


def summary(rows):
    """Median and worst absolute error, of all and by class of op and size."""

    def of(part):
        errors = [abs(r["error"]) for r in part]
        return {"median": statistics.median(errors), "worst": max(errors), "rows": len(errors)}

    classes = dict.fromkeys(r["class"] for r in rows)
    sizes = dict.fromkeys(r["size"] for r in rows)
    return {
        **of(rows),
        "by_class": {c: of([r for r in rows if r["class"] == c]) for c in classes},
        "by_size": {s: of([r for r in rows if r["size"] == s]) for s in sizes},
    }


def main():
    """Count, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, against the h200 preset")
    options = parser.parse_args()
    target = hw.h200() if options.gpu else hw.Cpu.from_cpuinfo()
    rows, empty = estimates(target, calls=20 if options.gpu else 1)
    result = {"target": target.name, "call_s": empty, "summary": summary(rows), "rows": rows}
    result["load"] = round(os.getloadavg()[0], 1)  # processes that wanted a core beside this one
    if not options.gpu:
        result |= {"loops": counting(), "coverage": coverage()}
        for r in result["loops"]:
            print(r)
    print({k: v for k, v in result["summary"].items() if k != "by_class"})
    path: Path = store("hw_ir_h200" if options.gpu else "hw_ir", result, FILES)
    print(path)


if __name__ == "__main__":
    main()
