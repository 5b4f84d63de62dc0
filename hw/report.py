"""What an estimate says: `OpCost` for one op, `CostReport` for a program, as table, JSON, SVG and
timeline.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from hw.errors import DoesNotFit

__all__ = ["CostReport", "DoesNotFit", "OpCost"]


@dataclass(frozen=True)
class OpCost:
    """The price of one op on a target, for one execution as a target returns it, for all in a report.

    busy_s: seconds by resource, e.g. {"tensor": .., "vector": .., "hbm": ..}. Resources work side by side: an
    op takes `overhead_s` plus the longest of them, and the ops of one fusion group share both. A target whose
    resources do not overlap names one resource. low, high: factors that bound the seconds (1, 1: no range).
    """

    busy_s: dict[str, float] = field(default_factory=dict)
    overhead_s: float = 0.0
    energy_j: float = 0.0
    bytes_by_level: dict[str, float] = field(default_factory=dict)
    macs: int = 0
    flops: int = 0
    low: float = 1.0
    high: float = 1.0
    basis: str = "model"
    warnings: tuple[str, ...] = ()
    # Filled by estimate: who it is, how often, and its share of its group's time.
    op: int = -1
    prim: str = ""
    kind: str = ""
    scope: str = ""
    trips: int = 1
    group: int = -1
    seconds: float = 0.0
    bound_by: str = ""

    @property
    def longest_s(self) -> float:
        """Seconds of the busiest resource."""
        return max(self.busy_s.values(), default=0.0)

    @property
    def label(self) -> str:
        """Scope and primitive."""
        return f"{self.scope}/{self.prim}" if self.scope else self.prim


@dataclass(frozen=True)
class CostReport:
    """Price of a program on a target: totals over all trips, and the ops they come from.

    utilisation: share of `seconds` that each resource is busy. bound_by: the resource (or "overhead") that
    takes most of the time. basis: what the numbers rest on.
    """

    target: str
    cycles: float
    seconds: float
    seconds_range: tuple[float, float]
    energy_j: float
    bytes_by_level: dict[str, float]
    macs: int
    flops: int
    peak_memory: int
    utilisation: dict[str, float]
    bound_by: str
    by_op: tuple[OpCost, ...]
    basis: tuple[str, ...]
    warnings: tuple[str, ...]
    regions: dict[str, tuple[int, int]] = field(default_factory=dict)  # region: (needed, available) bytes
    quality: dict[str, float] = field(default_factory=dict)  # execute: difference from float32

    def table(self, *, by: str = "op", top: int = 12) -> str:
        """The report as text: totals, then the dearest ops (by="op"), kinds or scopes."""
        lo, hi = self.seconds_range
        span = "" if lo == hi else f" ({_si(lo, 's')} to {_si(hi, 's')})"
        head = [
            f"{self.target}: {_si(self.seconds, 's')}{span}, {self.cycles:,.0f} cycles, "
            f"{_si(self.energy_j, 'J')}, bound by {self.bound_by}",
            f"  {self.macs:,} MACs, {self.flops:,} flops, peak memory {self.peak_memory:,} B",
            "  " + ", ".join(f"{k} {v:,.0f} B" for k, v in self.bytes_by_level.items()),
        ]
        rows = [("share", "seconds", "trips", "MACs", "bound by", by)]
        for key, seconds, trips, macs, bound in self._rows(by)[:top]:
            share = seconds / self.seconds if self.seconds else 0.0
            rows.append((f"{share:.1%}", _si(seconds, "s"), f"{trips:,}", f"{macs:,}", bound, key))
        width = [max(len(r[i]) for r in rows) for i in range(5)]
        body = ["  " + "  ".join([*(c.rjust(w) for c, w in zip(r, width, strict=False)), r[5]]) for r in rows]
        return "\n".join([*head, *body, *(f"  note: {w}" for w in self.warnings)])

    def _rows(self, by):
        if by not in ("op", "kind", "scope"):
            raise ValueError(f'by must be "op", "kind" or "scope", got {by!r}')
        if by == "op":
            rows = [(c.label, c.seconds, c.trips, c.macs, c.bound_by) for c in self.by_op]
        else:
            sums = {}
            for c in self.by_op:
                s = sums.setdefault(getattr(c, by) or "top level", [0.0, 0, 0, {}])
                s[0], s[1], s[2] = s[0] + c.seconds, s[1] + c.trips, s[2] + c.macs
                s[3][c.bound_by] = s[3].get(c.bound_by, 0.0) + c.seconds
            rows = [(k, s, t, m, max(b, key=b.get)) for k, (s, t, m, b) in sums.items()]
        return sorted(rows, key=lambda r: -r[1])

    def compare(self, other: "CostReport") -> str:
        """This report beside another one, with the ratio of theirs to ours."""
        rows = [("", self.target, other.target, "ratio")]
        levels = dict.fromkeys([*self.bytes_by_level, *other.bytes_by_level])
        pairs = [
            ("seconds", self.seconds, other.seconds),
            ("energy_j", self.energy_j, other.energy_j),
            ("macs", self.macs, other.macs),
            ("peak_memory", self.peak_memory, other.peak_memory),
            *((f"{k} bytes", self.bytes_by_level.get(k, 0), other.bytes_by_level.get(k, 0)) for k in levels),
        ]
        for name, a, b in pairs:
            rows.append((name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3g}" if a else "-"))
        rows.append(("bound by", self.bound_by, other.bound_by, ""))
        width = [max(len(r[i]) for r in rows) for i in range(4)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in rows)

    def to_dict(self) -> dict:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict())

    def plot(self, path) -> None:
        """Write a page of four static figures: roofline dots, time by op, time by scope, bytes by level.

        `path` ends in .html for the page or .svg for the picture alone.
        """
        path = Path(path)
        if path.suffix not in (".html", ".svg"):
            raise ValueError(f"path must end in .html or .svg, got {path.name!r}")
        svg = _svg(self)
        if path.suffix == ".html":
            svg = (
                f"<!doctype html><meta charset='utf-8'><title>{escape(self.target)}</title>"
                f"<style>body{{font:14px sans-serif;max-width:60em;margin:2em auto}}</style>"
                f"{svg}<pre>{escape(self.table(top=40))}</pre>"
            )
        path.write_text(svg)

    def perfetto(self, path) -> None:
        """Write a Chrome trace (chrome://tracing, ui.perfetto.dev): ops one after another, loops as one
        slice.

        One track for the ops, one for each resource that they keep busy; times in microseconds.
        """
        events, now = [], 0.0
        tracks = dict.fromkeys(["ops", *(r for c in self.by_op for r in c.busy_s)])
        for tid, track in enumerate(tracks):
            events.append({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": track}})
        numbers = {track: tid for tid, track in enumerate(tracks)}
        for c in self.by_op:
            info = {"trips": c.trips, "macs": c.macs, "bound_by": c.bound_by, "group": c.group}
            info |= {f"{k}_bytes": v for k, v in c.bytes_by_level.items()}
            slices = [("ops", c.seconds), *((r, min(s, c.seconds)) for r, s in c.busy_s.items() if s > 0)]
            for track, seconds in slices:
                events.append(
                    {
                        "ph": "X",
                        "pid": 1,
                        "tid": numbers[track],
                        "name": c.prim,
                        "cat": c.kind,
                        "ts": now * 1e6,
                        "dur": seconds * 1e6,
                        "args": info | {"scope": c.scope},
                    }
                )
            now += c.seconds
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


def summarise(target, costs, *, peak_memory, regions, clock_hz, warnings=(), quality=None) -> CostReport:
    """A report from the costs of ops, each for all its trips with its `seconds` set."""
    seconds = sum(c.seconds for c in costs)
    busy, levels, bound = {}, {}, {}
    for c in costs:
        for r, s in c.busy_s.items():
            busy[r] = busy.get(r, 0.0) + s
        for k, b in c.bytes_by_level.items():
            levels[k] = levels.get(k, 0) + b
        bound[c.bound_by] = bound.get(c.bound_by, 0.0) + c.seconds
    low, high = (sum(c.seconds * getattr(c, side) for c in costs) for side in ("low", "high"))
    return CostReport(
        target=target,
        cycles=seconds * clock_hz,
        seconds=seconds,
        seconds_range=(low, high),
        energy_j=sum(c.energy_j for c in costs),
        bytes_by_level=levels,
        macs=sum(c.macs for c in costs),
        flops=sum(c.flops for c in costs),
        peak_memory=peak_memory,
        utilisation={r: min(s / seconds, 1.0) if seconds else 0.0 for r, s in busy.items()},
        bound_by=max(bound, key=bound.get) if bound else "nothing",
        by_op=tuple(costs),
        basis=tuple(dict.fromkeys(c.basis for c in costs)),
        warnings=tuple(dict.fromkeys([*warnings, *(w for c in costs for w in c.warnings)])),
        regions=dict(regions),
        quality=quality or {},
    )


def _si(x, unit):
    """A number with an SI prefix, three digits."""
    if x == 0:
        return f"0 {unit}"
    for factor, prefix in ((1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p")):
        if abs(x) >= factor:
            return f"{x / factor:.3g} {prefix}{unit}"
    return f"{x / 1e-15:.3g} f{unit}"


_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


def _svg(report):
    """Four panels, 900 x 640: dots of intensity against speed, and three bar charts."""
    kinds = dict.fromkeys(c.kind for c in report.by_op)
    colour = {k: _COLOURS[i % len(_COLOURS)] for i, k in enumerate(kinds)}
    ops = [(c.label, c.seconds, colour[c.kind]) for c in sorted(report.by_op, key=lambda c: -c.seconds)[:10]]
    scopes = [(k, s, "#4269d0") for k, s, *_ in report._rows("scope")[:10]]
    levels = [(k, v, "#6cc5b0") for k, v in sorted(report.bytes_by_level.items(), key=lambda kv: -kv[1])]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 640" font-family="sans-serif" '
        f'font-size="11" role="img" aria-label="Cost of a program on {escape(report.target)}: intensity '
        'against speed, and time by op, by scope, bytes by level">',
        '<rect width="900" height="640" fill="#fff"/>',
        _dots(report, colour, 10, 10),
        _bars("seconds by op", ops, 460, 10, "s"),
        _bars("seconds by scope", scopes, 10, 330, "s"),
        _bars("bytes by level", levels, 460, 330, "B"),
        "</svg>",
    ]
    return "".join(parts)


def _bars(title, rows, x, y, unit):
    top = max((v for _, v, _ in rows), default=0) or 1
    out = [f'<text x="{x}" y="{y + 14}" font-weight="bold">{title}</text>']
    for i, (name, value, fill) in enumerate(rows):
        at = y + 24 + 26 * i
        label = f"{name[-44:]}: {_si(value, unit) if unit == 's' else f'{value:,.0f} {unit}'}"
        out.append(f'<rect x="{x}" y="{at + 13}" width="{420 * value / top:.1f}" height="8" fill="{fill}"/>')
        out.append(f'<text x="{x}" y="{at + 10}">{escape(label)}</text>')
    return "".join(out)


def _dots(report, colour, x, y):
    """flops per byte of the outermost level against flops per second, both logarithmic."""
    from math import log10

    points = []
    for c in report.by_op:
        moved = max(c.bytes_by_level.values(), default=0)
        if c.flops and moved and c.seconds:
            points.append((log10(c.flops / moved), log10(c.flops / c.seconds), c))
    out = [f'<text x="{x}" y="{y + 14}" font-weight="bold">flop/s against flop/byte (log)</text>']
    if not points:
        return out[0]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    spread = lambda v: (min(v), max(max(v) - min(v), 1e-9))
    (x0, dx), (y0, dy) = spread(xs), spread(ys)
    out.append(f'<rect x="{x}" y="{y + 24}" width="430" height="260" fill="none" stroke="#999"/>')
    for px, py, c in points:
        cx, cy = x + 15 + 400 * (px - x0) / dx, y + 269 - 230 * (py - y0) / dy
        tip = f"{c.label}: {10**px:.3g} flop/B, {10**py:.3g} flop/s"
        out.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{colour[c.kind]}" fill-opacity="0.7">'
            f"<title>{escape(tip)}</title></circle>"
        )
    foot = f"{10**x0:.3g} to {10 ** (x0 + dx):.3g} flop/B, {10**y0:.3g} to {10 ** (y0 + dy):.3g} flop/s"
    out.append(f'<text x="{x}" y="{y + 300}">{foot}</text>')
    return "".join(out)
