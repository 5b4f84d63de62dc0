"""The third panel agrees with the others on every example of every technique that has an accel file.

It traces without an unknown primitive, survives JSON, is priced by presets of every family of targets, and
runs to ref's values within the bound of test_layers; its multiply-accumulates are counted three ways, and
each of its ops computes what JAX's own primitive computes from the same operands.
"""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

import accel
import hw
import ref
from hw.cpu import PRESETS as CPUS
from hw.gpu import PRESETS as GPUS
from hw.mcu import PRESETS as MCUS
from hw.pim import PRESETS as PIMS
from hw.trace import trace_equations
from ref.catalog import BY_SLUG, CATALOG
from ref.counting import Tally, count
from tests.hw.per_op import differences
from tests.hw_record import bound_call, lowered_macs, record
from tests.test_layers import EPS, cases, close, reference

ROOT = Path(__file__).parent.parent
FAMILIES = ("t4", "h200", "tpu_v5e", "orin", "iphone14pro", "xeon_6154", "apple_m2", "raspberry_pi5")
FAMILIES += ("gddr6_aim", "stm32h743")
TARGETS = {n: {**GPUS, **CPUS, **PIMS, **MCUS}[n]() for n in FAMILIES}
HAS_ACCEL = [t.slug for t in CATALOG if (ROOT / "accel" / t.part / f"{t.slug}.py").exists()]


@cache
def traced(slug, i):
    """(example, arguments with arrays, program, equations) of accel in float32."""
    e = getattr(ref, slug).example()[i]
    call, dynamic = accel_call(slug, e)
    program, equations = trace_equations(call, *dynamic)
    return e, dynamic, program, equations


def accel_call(slug, e):
    """(accel's function of the arguments that hold arrays, these in JAX's default types)."""
    args = jax.tree.map(lambda x: np.asarray(jax.device_put(x)) if hasattr(x, "dtype") else x, e.args)
    return bound_call(getattr(getattr(accel, slug), e.fn), args, e.kwargs)


def costs(slug, e):
    """The HW entry of an example's function."""
    entries = record(BY_SLUG[slug])
    assert e.fn in entries, f"HW of {slug} lacks {e.fn}, which example() calls"
    return entries[e.fn]


@cases
def test_layers_hw_traces_and_runs_like_ref(slug, i):
    """No unknown primitive, an equal copy through JSON, and ref's values within test_layers' bound."""
    _, dynamic, program, _ = traced(slug, i)
    e, _, want, nudged = reference(slug, i, "float32")
    again = hw.Program.from_json(program.to_json())
    assert again == program
    outputs, _ = hw.run_program(again, dynamic)
    close(outputs, want, nudged, EPS["float32"], f"{slug}.{e.fn}")


@cases
def test_layers_hw_prices_on_every_target(slug, i):
    """Seconds, joules and bytes on a preset of every family, unless it says what it lacks."""
    e, _, program, _ = traced(slug, i)
    try:
        counts = hw.count(program)
    except hw.UnknownTripCount:
        program = replace_trips(program, traced(slug, i)[1])
        counts = hw.count(program)
    for name, target in TARGETS.items():
        try:
            r = hw.estimate(program, target)
        except hw.UnsupportedPrimitive as why:
            lacking = str(why)
            assert name in lacking, f"{slug}.{e.fn} on {name}: {lacking}"
            continue
        except hw.DoesNotFit as why:
            missing, hints = why.shortfall, why.suggestions
            assert missing > 0, f"{slug}.{e.fn} on {name}"
            assert hints, f"{slug}.{e.fn} on {name}"
            continue
        assert r.macs <= counts.macs, f"{slug}.{e.fn} on {name}"
        if program.ops:
            assert r.seconds > 0
            assert r.energy_j > 0
        # every buffer of an arena may be rounded up to 16 bytes
        room = sum(t.nbytes + 16 for t in program.tensors.values())
        assert 0 <= r.peak_memory <= room, f"{slug}.{e.fn} on {name}"


def replace_trips(program, dynamic):
    """The program with the trip counts that one run had."""
    _, seen = hw.run_program(program, dynamic)
    return seen.measured(program)


@cases
def test_layers_hw_counts_three_ways(slug, i):
    """Closed form = op program = counting ndarray through ref = products in what XLA is given."""
    e, dynamic, program, _ = traced(slug, i)
    expected = costs(slug, e)
    try:
        counts = hw.count(program)
    except hw.UnknownTripCount:
        program = replace_trips(program, dynamic)
        counts = hw.count(program)
    label = f"{slug}.{e.fn}"
    assert counts.macs == expected.macs(*e.args, **e.kwargs), f"{label}: MACs"
    moved = counts.input_bytes + counts.output_bytes
    assert moved == expected.bytes(*e.args, **e.kwargs), f"{label}: compulsory bytes"
    through_ref(slug, e, expected, label)
    structured = {"loop", "branch", "kernel", "conv"}
    if not structured & {op.kind for op in hw.program.walk(program.body)}:
        call, dynamic = accel_call(slug, e)
        assert lowered_macs(jax.jit(call).lower(*dynamic).as_text()) == counts.macs, f"{label}: XLA"


def through_ref(slug, e, expected, label):
    tally = Tally()
    wrap = lambda x: count(tally, x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
    run = lambda: getattr(getattr(ref, slug), e.fn)(*jax.tree.map(wrap, e.args), **e.kwargs)
    want = expected.macs if expected.ref is None else expected.ref
    if isinstance(want, str):
        try:
            run()
        except (NotImplementedError, TypeError, ValueError, AttributeError, StopIteration):
            return
        assert tally.macs != expected.macs(*e.args, **e.kwargs), f"{label}: ref counts the same after all"
        return
    run()
    assert tally.macs == want(*e.args, **e.kwargs), f"{label}: MACs through ref"


@pytest.mark.parametrize("slug", HAS_ACCEL)
def test_layers_hw_states_what_bounds_it(slug):
    """The bounds of the HW record, at the size of the example or at the realistic one it gives."""
    module = getattr(ref, slug)
    examples = {e.fn: (i, e) for i, e in reversed(list(enumerate(module.example())))}
    stated = 0
    for fn, expected in record(BY_SLUG[slug]).items():
        if not expected.bound:
            continue
        if expected.large is None:
            program = traced(slug, examples[fn][0])[2]
        else:
            options = expected.options
            call = lambda *a, fn=fn, options=options: getattr(getattr(accel, slug), fn)(*a, **options)
            program = hw.trace(call, *expected.large)
        for name, what in expected.bound.items():
            assert hw.estimate(program, TARGETS[name]).bound_by == what, f"{slug}.{fn} on {name}"
            stated += 1
    assert stated, f"HW of {slug} must state what bounds it on at least one target"


@pytest.mark.parametrize("slug", HAS_ACCEL)
def test_layers_hw_ops_equal_jax(slug):
    """Every op of every example against JAX's own primitive on the same operands."""
    recorded = []
    for i in range(len(getattr(ref, slug).example())):
        _, dynamic, program, equations = traced(slug, i)
        _, seen = hw.run_program(program, dynamic, per_op=True)
        recorded += [(r, equations[r.op.id]) for r in first_of_each(seen.records)]
    assert not differences(recorded)


def first_of_each(records):
    """The first execution of every op: later trips of a loop run the same code."""
    seen = set()
    return [r for r in records if not (r.op.id in seen or seen.add(r.op.id))]
