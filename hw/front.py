"""The front door: price a program on a target, run it in the target's arithmetic, compare targets."""

from dataclasses import replace

from hw.errors import UnknownTripCount, UnsupportedPrimitive
from hw.program import Program
from hw.report import CostReport, OpCost, summarise
from hw.target import Context, Target


def estimate(program: Program, target: Target) -> CostReport:
    """Price every op of `program` on `target`: seconds, energy, bytes by level, peak memory, what bounds it.

    Time grows with the ops of the program, never with its trip counts. Of the branches of a cond the dearest
    is charged.
    Raises: UnsupportedPrimitive for an op without a rule, DoesNotFit, UnknownTripCount for a while loop.
    """
    return _report(program, target, {}, {})


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
            group = ctx.group(op)
            if group.id not in done:
                done.add(group.id)
                costs += _group(group, target, ctx, trips)
    return costs


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
