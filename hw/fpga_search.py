"""Designs of a part compared: sizes that fit, and what a recurrence costs."""

from dataclasses import replace
from itertools import product

from hw.fabric import check_fit, fits, resources
from hw.front import Table, _price, estimate
from hw.program import Loop, walk
from hw.systolic import DATAFLOWS
from hw.target import Context


def initiation_intervals(program, target) -> dict[str, float]:
    """{label of a loop with carried values: cycles between the starts of two trips}.

    A trip needs what the last one made, so it starts when that one has ended: the latency of the body.
    """
    ctx, found = Context(program, fuse=target.fuse), {}
    for op in walk(program.body):
        if isinstance(op.dims, Loop) and op.dims.carries:
            costs = _price(op.dims.body, target, ctx, 1, {}, [])
            found[op.dims.name or op.label] = sum(c.seconds for c in costs) * target.clock_hz
    return found


def search(program, target):
    """(best target, table): sizes by powers of two that fit the part, for the least seconds of the program.

    stream: linear_in and linear_out of 4 to 64 and attn_parallel of 1 to 16; a design that another one
    exceeds in every size is left out, it is faster by its shallower adder tree at most. systolic: rows and
    cols of 4 to 128 and all dataflows, all tried, since a larger array takes longer to fill.
    Raises: DoesNotFit if none fits.
    """
    powers = lambda lo, hi: [1 << i for i in range(lo, hi + 1)]
    if target.backend == "stream":
        names, axes = ("linear_in", "linear_out", "attn_parallel"), (powers(2, 6), powers(2, 6), powers(0, 4))
    else:
        names, axes = ("rows", "cols"), (powers(2, 7), powers(2, 7))
    sized = [dict(zip(names, values, strict=True)) for values in product(*axes)]
    good = [s for s in sized if fits(replace(target, **s))]
    if not good:
        check_fit(replace(target, **sized[0]))
    below = lambda a, b: a != b and all(a[n] <= b[n] for n in names)
    if target.backend == "stream":
        good = [s for s in good if not any(below(s, o) for o in good)]
    else:
        good = [s | {"dataflow": f} for s in good for f in DATAFLOWS]
    rows, tried = [], []
    for s in good:
        t = replace(target, **s)
        r, u = estimate(program, t), resources(t)
        tried.append(t)
        rows.append(s | {"dsp": u.dsp, "bram36": u.bram36, "seconds": r.seconds, "joules": r.energy_j})
    best = min(range(len(rows)), key=lambda i: rows[i]["seconds"])
    for i, row in enumerate(rows):
        row["best"] = i == best
    return tried[best], Table(rows, tuple(rows[0]))
