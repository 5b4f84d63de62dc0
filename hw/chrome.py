"""A report as Chrome trace events (chrome://tracing, ui.perfetto.dev): ops and resources in time, bytes
alive, and on a Pim the commands of one channel.

Source: the Trace Event Format (JSON object form): "M" names processes and threads, "X" is a slice with `ts`
and `dur` in microseconds, "C" a counter.
"""

from hw.figures import _timeline
from hw.pim_spans import TRACKS, product_spans

OPS, BANKS = 1, 2  # processes
_FIRST_BANK_THREAD = 1000


def trace_events(report) -> dict:
    """The trace as plain values: ops one after another in the order they are priced, all trips of an op in
    one slice; a track for every resource that they keep busy.
    """
    events = [_named("process_name", OPS, 0, f"program on {report.target}")]
    tracks = dict.fromkeys(["ops", *(r for c in report.by_op for r in c.busy_s)])
    numbers = {track: tid for tid, track in enumerate(tracks)}
    events += [_named("thread_name", OPS, tid, track) for track, tid in numbers.items()]
    alive, now = _alive(report), 0.0
    for c in report.by_op:
        ts = now * 1e6
        if c.op in alive:
            events.append(_event("C", OPS, 0, "bytes alive", ts) | {"args": {"bytes": alive[c.op]}})
        info = {"scope": c.scope, "trips": c.trips, "macs": c.macs, "flops": c.flops, "energy_j": c.energy_j}
        info |= {"bound_by": c.bound_by, "group": c.group} | {
            f"{k}_bytes": v for k, v in c.bytes_by_level.items()
        }
        for track, seconds in (("ops", c.seconds), *((r, min(s, c.seconds)) for r, s in c.busy_s.items())):
            if seconds > 0:
                slice_ = _event("X", OPS, numbers[track], c.prim or "op", ts)
                events.append(slice_ | {"dur": seconds * 1e6, "cat": c.kind or "op", "args": info})
        now += c.seconds
    return {
        "traceEvents": events + _commands(report),
        "displayTimeUnit": "ns",
        "otherData": {"target": report.target, "seconds": report.seconds, "bound_by": report.bound_by},
    }


def _alive(report):
    """{op: bytes alive while it runs}; none for a target with a plan of its own, whose steps are not ops."""
    if report.program is None or not report.program.body.ops or hasattr(report.device, "memory"):
        return {}
    return {m.op.id: m.nbytes for m in _timeline(report)[0]}


def _commands(report):
    """The commands of one channel for one vector of the dearest product in the banks."""
    found = product_spans(report)
    if found is None:
        return []
    label, m, k, spans, _ = found
    tids = {t: _FIRST_BANK_THREAD + n for n, t in enumerate(TRACKS)}
    events = [_named("process_name", BANKS, 0, f"one channel, one vector of {label}: {m} x {k}")]
    events += [_named("thread_name", BANKS, tid, track) for track, tid in tids.items()]
    us = report.device.tick_s * 1e6
    for s in sorted(spans, key=lambda s: s.start):
        slice_ = _event("X", BANKS, tids[s.track], s.name, s.start * us)
        events.append(
            slice_ | {"dur": s.ticks * us, "cat": s.track, "args": {"tick": s.start, "ticks": s.ticks}}
        )
    return events


def _event(ph, pid, tid, name, ts):
    return {"ph": ph, "pid": pid, "tid": tid, "name": name, "ts": ts}


def _named(what, pid, tid, name):
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}
