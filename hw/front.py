"""The front door: price a program on a target, run it in the target's arithmetic, compare targets."""

import json
from dataclasses import dataclass, fields, replace

import numpy as np

from hw.count import kernel_work
from hw.errors import DoesNotFit, UnknownTripCount, UnsupportedPrimitive
from hw.interpret import run_program
from hw.program import Program
from hw.report import CostReport, OpCost, _si, is_roofline, summarise
from hw.target import Context, Target
from hw.traffic import kernel_bytes


def estimate(program: Program, target: Target) -> CostReport:
    """Price every op of `program` on `target`: seconds, energy, bytes by level, peak memory, what bounds it.

    Time grows with the ops of the program, never with its trip counts. Of the branches of a cond the dearest
    is charged.
    Raises: UnsupportedPrimitive for an op without a rule, DoesNotFit, UnknownTripCount for a while loop.
    """
    return _report(program, target, {}, {})


def execute(program: Program, args, target: Target):
    """(outputs, CostReport): run the program in the target's arithmetic, and price what really ran.

    Loops and branches are charged as they went. `quality` of the report compares with the same run in the
    formats of the program: worst_abs, worst_rel (of the largest entry) and snr_db, over the float outputs.
    Raises: what `estimate` raises, but UnknownTripCount; ValueError if the arguments do not fit the program.
    """
    if hasattr(target, "prepared"):  # arithmetic that depends on the program and on values
        target = target.prepared(program, args)
    outputs, seen = run_program(program, args, policy=target.formats)
    quality = {}
    if target.formats is not None:
        exact, _ = run_program(program, args)
        quality = difference(outputs, exact) | {f"events {k}": v for k, v in seen.events.items()}
    return outputs, _report(seen.measured(program), target, seen.taken, quality)


def difference(got, want) -> dict[str, float]:
    """worst_abs, worst_rel, snr_db of the float arrays of two results, where both are finite."""
    pairs = zip(_tuple(got), _tuple(want), strict=True)
    pairs = [(np.asarray(g, np.float64), np.asarray(w, np.float64)) for g, w in pairs if _is_float(w)]
    finite = [np.isfinite(g) & np.isfinite(w) for g, w in pairs]
    error = np.concatenate([(g - w)[f] for (g, w), f in zip(pairs, finite, strict=True)] or [np.zeros(0)])
    signal = np.concatenate([w[f] for (_, w), f in zip(pairs, finite, strict=True)] or [np.zeros(0)])
    worst, top = np.abs(error).max(initial=0.0), np.abs(signal).max(initial=0.0)
    noise = float(error @ error)
    snr = 10 * np.log10(float(signal @ signal) / noise) if noise and signal.any() else float("inf")
    return {"worst_abs": float(worst), "worst_rel": float(worst / top) if top else 0.0, "snr_db": float(snr)}


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def _is_float(x):
    return np.asarray(x).dtype.kind == "f" or str(np.asarray(x).dtype).startswith(("bfloat", "float"))


def compare_targets(program: Program, targets) -> "Table":
    """A table of the program on each target: seconds, energy, peak memory, what bounds it, or why not."""
    rows = []
    for target in targets:
        try:
            r = estimate(program, target)
        except (UnsupportedPrimitive, DoesNotFit, UnknownTripCount) as why:
            rows.append({"target": target.name, "why_not": f"{type(why).__name__}: {why}"})
        else:
            rows.append(
                {
                    "target": r.target,
                    "seconds": r.seconds,
                    "joules": r.energy_j,
                    "bytes": sum(r.bytes_by_level.values()),
                    "peak_memory": r.peak_memory,
                    "bound_by": r.bound_by,
                    "why_not": "",
                }
            )
    return Table(rows, ("target", "seconds", "joules", "bytes", "peak_memory", "bound_by", "why_not"))


def pareto(fn, *args, targets, formats=(None,), parallelism=(None,), memory=(None,), quality=None) -> "Table":
    """Quality against seconds, joules and bytes over number formats, parallelism and memory.

    Args: fn, args: a JAX function and its arguments, values included. targets: targets to start from.
      formats: policies or formats that fn is executed in (None: as written). parallelism: {field: value} of
        the target to set, for example {"cores": 4}; None leaves it. memory: likewise, {"hbm_gb": 8}. A field
        that a target does not have is a ValueError.
      quality: function (outputs, exact outputs) -> float, larger is better; snr_db if None.
    Returns: a table with a row for each combination that fits, `best` marking those that no other beats in
      quality, seconds, joules and bytes alike; combinations that fail say why.
    """
    from hw.formats import as_policy
    from hw.trace import trace

    program = trace(fn, *args)
    exact, seen = run_program(program, args)
    measured = seen.measured(program)
    rows = []
    for chosen in formats:
        policy = as_policy(chosen)
        outputs = exact if policy is None else run_program(program, args, policy=policy)[0]
        score = quality(outputs, exact) if quality else difference(outputs, exact)["snr_db"]
        bits = program_in(measured, policy)
        for target in targets:
            for lanes in parallelism:
                for budget in memory:
                    row = {"target": target.name, "format": policy.name if policy else "as written"}
                    row |= {**(lanes or {}), **(budget or {})}
                    try:
                        r = _report(bits, _with(target, lanes, budget), seen.taken, {})
                    except (UnsupportedPrimitive, DoesNotFit) as why:
                        rows.append(row | {"why_not": f"{type(why).__name__}: {why}"})
                        continue
                    moved = sum(r.bytes_by_level.values())
                    rows.append(
                        row
                        | {"quality": float(score), "seconds": r.seconds, "joules": r.energy_j}
                        | {"bytes": moved, "peak_memory": r.peak_memory, "why_not": ""}
                    )
    good = [r for r in rows if not r["why_not"]]
    for r in rows:
        r["best"] = not r["why_not"] and not any(_beats(o, r) for o in good)
    names = dict.fromkeys(k for r in rows for k in r)
    first = ("target", "format")
    last = ("quality", "seconds", "joules", "bytes", "peak_memory", "best", "why_not")
    return Table(rows, (*first, *(n for n in names if n not in (*first, *last)), *last))


def _with(target, *options):
    given = {k: v for o in options if o for k, v in o.items()}
    known = {f.name for f in fields(target)}
    for name in given:
        if name not in known:
            raise ValueError(f"{type(target).__name__} has no field {name!r}")
    return replace(target, **given) if given else target


def _beats(a, b):
    """Is a at least as good as b everywhere and better somewhere."""
    gains = [a["quality"] - b["quality"], *(b[k] - a[k] for k in ("seconds", "joules", "bytes"))]
    gains = [0.0 if g != g else g for g in gains]  # inf - inf: both are exact
    return min(gains) >= 0 and max(gains) > 0


def program_in(program: Program, policy) -> Program:
    """The program with the dtypes, and so the bytes, of the formats that a policy stores tensors in."""
    if policy is None:
        return program
    tensors = {i: replace(t, dtype=policy.dtype(t)) for i, t in program.tensors.items()}
    return replace(program, tensors=tensors)


@dataclass(frozen=True)
class Table:
    """Rows as dicts, and as text: `print(table)`."""

    rows: list[dict]
    columns: tuple[str, ...]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        cells = [[n.replace("_", " ") for n in self.columns]]
        cells += [[_cell(n, r.get(n)) for n in self.columns] for r in self.rows]
        width = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, width, strict=True)).rstrip() for row in cells)
        return "\n".join(lines)

    def to_json(self) -> str:
        """The rows as JSON text; what is not finite is null."""
        plain = lambda v: None if isinstance(v, float) and not np.isfinite(v) else v
        return json.dumps([{k: plain(v) for k, v in r.items()} for r in self.rows])


def _cell(name, value):
    if value is None or value == "":
        return "-"
    if name in ("seconds", "at_least", "at_most", "joules"):
        return _si(value, "J" if name == "joules" else "s")
    if isinstance(value, bool):
        return "yes" if value else "" if name == "best" else "no"
    if name in ("bytes", "peak_memory"):
        return f"{value:,.0f} B"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report(program, target, taken, quality):
    placement = target.place(program)
    ctx = Context(program, fuse=target.fuse)
    notes = list(placement.warnings)
    costs = _price(program.body, target, ctx, 1, taken, notes)
    return summarise(
        target.name,
        costs,
        peak_memory=placement.peak,
        regions=placement.regions,
        clock_hz=target.clock_hz,
        warnings=notes,
        quality=quality,
        program=program,
        device=target,
    )


def _price(block, target, ctx, trips, taken, notes):
    """Costs of a block's ops for all trips; `taken` holds what an execution saw of loops and branches."""
    costs, done = [], set()
    for op in block.ops:
        if op.kind == "loop":
            n = taken[op.id][0] / taken[op.id][1] if op.id in taken else op.dims.trips
            if n is None:
                raise UnknownTripCount(op.dims.name or op.scope)
            for i, inner in enumerate(op.blocks):
                extra = trips if op.dims.cond is not None and i == 0 else 0  # the last test of a while
                costs += _price(inner, target, ctx, trips * n + extra, taken, notes)
        elif op.kind == "branch":
            priced = [_price(b, target, ctx, trips, taken, notes) for b in op.blocks]
            if op.id in taken:
                shares = taken[op.id]
                for part, share in zip(priced, shares, strict=True):
                    if share:
                        costs += [_times(c, share / sum(shares)) for c in part]
            else:
                totals = [sum(c.seconds for c in part) for part in priced]
                worst = max(range(len(totals)), key=totals.__getitem__)
                notes.append(f"{op.label}: the dearest of {len(totals)} branches is charged (number {worst})")
                costs += priced[worst]
        elif op.kind == "shard":
            costs += _price(op.dims.body, target, ctx, trips, taken, notes)
            notes.append(f"{op.label}: one of {op.dims.devices} equal devices is priced")
        else:
            if op.kind == "kernel" and op.dims.claimed:
                notes.append(_claim(op))
            group = ctx.group(op)
            if group.id not in done:
                done.add(group.id)
                costs += _group(group, target, ctx, trips)
    return costs


def _claim(op):
    """What the author of a kernel says of it, beside what is counted."""
    found, said = kernel_work(op.dims), op.dims.claimed
    moved = sum(kernel_bytes(op.dims))
    return (
        f"{op.label}: its cost_estimate says {said['flops']:,} flops, {said['transcendentals']:,} "
        f"transcendentals and {said['bytes_accessed']:,} B; counted are {found.flops:,}, "
        f"{found.transcendentals:,} and {moved:,} B"
    )


def _group(group, target, ctx, trips):
    """The ops of a fusion group run as one: busy seconds add up by resource, the overhead is paid once."""
    parts = [_checked(target, op, ctx) for op in group.ops]
    busy = {}
    for c in parts:
        for r, s in c.busy_s.items():
            busy[r] = busy.get(r, 0.0) + s
    overhead = max((c.overhead_s for c in parts), default=0.0)
    bound = max(busy, key=busy.get) if busy else "overhead"
    longest = busy.get(bound, 0.0)
    if overhead > longest:
        bound = "overhead"
    wide = 1.0  # what the group takes if its resources follow one another instead
    if longest and all(is_roofline(c) for c in parts if c.busy_s):
        wide = (overhead + sum(s for r, s in busy.items() if r != "power")) / (overhead + longest)
    weight = [c.longest_s for c in parts]
    total = sum(weight)
    out = []
    for op, c, w in zip(group.ops, parts, weight, strict=True):
        share = w / total if total else 1 / len(parts)
        out.append(
            replace(
                _times(c, trips),
                op=op.id,
                prim=op.prim,
                kind=op.kind,
                scope=op.scope,
                trips=trips,
                group=group.id,
                seconds=(overhead + longest) * share * trips,
                high=max(c.high, wide),
                bound_by=bound,
            )
        )
    return out


def _checked(target, op, ctx):
    cost = target.cost(op, ctx)
    if not isinstance(cost, OpCost):
        raise UnsupportedPrimitive(
            op.prim, ctx.shape(op), op.scope, op.source, f"{target.name} has no rule for it"
        )
    return cost


def _times(c, n):
    """A cost n times over."""
    whole = lambda v: int(v) if v == int(v) else v
    return replace(
        c,
        busy_s={k: v * n for k, v in c.busy_s.items()},
        overhead_s=c.overhead_s * n,
        energy_j=c.energy_j * n,
        bytes_by_level={k: v * n for k, v in c.bytes_by_level.items()},
        macs=whole(c.macs * n),
        flops=whole(c.flops * n),
        seconds=c.seconds * n,
        trips=whole(c.trips * n) if c.op >= 0 else c.trips,
    )
