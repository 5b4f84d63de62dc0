"""The roof over a report's dots: operations a second of the units, bytes a second of the memories."""

from dataclasses import dataclass

from hw.program import ConvDims, MatmulDims, walk


@dataclass(frozen=True)
class Roofs:
    """compute: {unit: operations a second}; memory: {level: bytes a second}; basis: where they come from."""

    compute: dict[str, float]
    memory: dict[str, float]
    basis: str


@dataclass(frozen=True)
class Dot:
    """A fusion group under the roof: operations a byte of the level that keeps it longest, and a second.

    names: of all that share the dot; share: of the report's time; bound: what takes most of theirs.
    """

    intensity: float
    speed: float
    level: str
    share: float
    names: tuple[str, ...]
    bound: str


def roofs(report) -> Roofs:
    """Data sheet peaks of a `Gpu`, `Cpu` or `Pim`; of another target what its fastest ops reached."""
    t = report.device
    found = None
    if hasattr(t, "peak_tflops"):
        found = _gpu(t, _dtypes(report.program))
    elif hasattr(t, "level_rate"):
        levels = [x for x in ("l1", "l2", "l3", "dram") if x in report.bytes_by_level] or ["dram"]
        memory = {x: t.level_rate(x) / (1 if t.ideal or x != "dram" else t.dram_eff) for x in levels}
        rate = {d: t.ops_rate(d) for d in _dtypes(report.program) or ("float32",)}
        found = Roofs(rate, memory, "data sheet")
    elif hasattr(t, "bank_rate"):
        compute = {"banks": t.peak_flops}
        if t.asic is not None:
            compute["asic"] = max(t.asic.adders, 2 * t.asic.multipliers) * t.asic.ghz * 1e9
        found = Roofs(compute, {"banks": t.bank_rate, "pins": t.pin_rate}, "data sheet")
    if found is not None:
        memory = {k: v for k, v in found.memory.items() if k in report.bytes_by_level}
        return Roofs(found.compute, memory, found.basis)
    return _reached(report)


def _gpu(t, dtypes):
    compute = {d: t.peak_tflops[d] * 1e12 for d in dtypes if d in t.peak_tflops}
    compute["vector"] = t.vector_tflops * 1e12
    return Roofs(compute, {"hbm": t.hbm_gbps * 1e9, "l2": t.l2_rate}, "data sheet")


def _dtypes(program):
    """Element types of the program's products, in kernels too."""
    if program is None:
        return ()
    ops = (op for op in _opened(program.body) if isinstance(op.dims, MatmulDims | ConvDims) and op.inputs)
    return tuple(dict.fromkeys(program.tensors[op.inputs[0]].dtype for op in ops))


def _opened(block):
    """Every op of a block, those of kernels too."""
    for op in walk(block):
        yield op
        if op.kind == "kernel":
            yield from _opened(op.dims.body)


def _reached(report):
    """The best rate of any fusion group: a roof from below."""
    seconds, flops, moved = {}, {}, {}
    for c in report.by_op:
        seconds[c.group] = seconds.get(c.group, 0.0) + c.seconds
        flops[c.group] = flops.get(c.group, 0) + c.flops
        for k, b in c.bytes_by_level.items():
            moved[k, c.group] = moved.get((k, c.group), 0.0) + b
    best = max((f / seconds[g] for g, f in flops.items() if seconds[g]), default=0.0)
    memory = {}
    for (k, g), b in moved.items():
        if b and seconds[g]:
            memory[k] = max(memory.get(k, 0.0), b / seconds[g])
    return Roofs({"fastest op": best} if best else {}, memory, "the fastest op of this program")


def dots(report, found: Roofs | None = None) -> list[Dot]:
    """The fusion groups that compute, move bytes and take time; equal ones (of several layers) are one dot.

    An op of a group has no time of its own: a group takes as long as its busiest resource. A dot has the name
    of the group's dearest op.
    """
    found = roofs(report) if found is None else found
    parts = {}
    for c in report.by_op:
        parts.setdefault(c.group, []).append(c)
    merged = {}
    for group in parts.values():
        flops, seconds = sum(c.flops for c in group), sum(c.seconds for c in group)
        moved = {}
        for c in group:
            for k, b in c.bytes_by_level.items():
                if b and k in found.memory:
                    moved[k] = moved.get(k, 0.0) + b
        if not (flops and moved and seconds):
            continue
        level = max(moved, key=lambda k: moved[k] / found.memory[k])
        at, share = (flops / moved[level], flops / seconds), seconds / report.seconds
        first = max(group, key=lambda c: (c.flops, c.seconds))
        key = (f"{at[0]:.3g}", f"{at[1]:.3g}", level, first.bound_by)
        old = merged.get(key)
        if old is None:
            merged[key] = Dot(*at, level, share, (first.label,), first.bound_by)
        else:
            names = old.names if first.label in old.names else (*old.names, first.label)
            merged[key] = Dot(old.intensity, old.speed, level, old.share + share, names, old.bound)
    return sorted(merged.values(), key=lambda d: -d.share)
