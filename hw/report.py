"""What an estimate says: `OpCost` for one op, `CostReport` for a program, as table, JSON, SVG and
timeline.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from html import escape
from math import isfinite
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

    seconds_range: (lower, upper). A roofline lets the resources of a kernel overlap and the kernels follow
    one another; if everything overlapped, the busiest resource would be all (lower), and if nothing did, all
    would add up (upper). Other targets bound what they do not know themselves. utilisation: share of
    `seconds` that each resource is busy. bound_by: the resource (or "overhead") that takes most of the time.
    basis: what the numbers rest on.
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
    program: object = field(default=None, repr=False, compare=False)  # what was priced, for the figures
    device: object = field(default=None, repr=False, compare=False)  # the target, for the figures

    def table(self, *, by: str = "op", top: int = 12) -> str:
        """The report as text: totals, then the dearest ops (by="op"), kinds or scopes."""
        lo, hi = self.seconds_range
        head = [
            f"{self.target}: {_si(self.seconds, 's')}, {self.cycles:,.0f} cycles, "
            f"{_si(self.energy_j, 'J')}, bound by {self.bound_by}",
            *([f"  from {_si(lo, 's')} to {_si(hi, 's')}: how far work overlaps is unknown"] * (lo < hi)),
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

    def compare(self, *others: "CostReport") -> str:
        """This report beside others, with units, each value with its ratio to ours."""
        reports = (self, *others)
        levels = dict.fromkeys(k for r in reports for k in r.bytes_by_level)
        pairs = [
            ("time", "s", [r.seconds for r in reports]),
            ("at least", "s", [r.seconds_range[0] for r in reports]),
            ("at most", "s", [r.seconds_range[1] for r in reports]),
            ("energy", "J", [r.energy_j for r in reports]),
            ("products", "MAC", [r.macs for r in reports]),
            ("peak memory", "B", [r.peak_memory for r in reports]),
            *((f"{k} traffic", "B", [r.bytes_by_level.get(k, 0) for r in reports]) for k in levels),
        ]
        word = lambda x, unit: _si(x, unit) if x else "-"
        ratio = lambda x, mine: f" ({x / mine:.3g}x)" if mine and x else ""
        rows = [("", *(r.target for r in reports))]
        for name, unit, values in pairs:
            first = values[0]
            rows.append((name, *(word(x, unit) + ratio(x, first) * (n > 0) for n, x in enumerate(values))))
        rows.append(("bound by", *(r.bound_by for r in reports)))
        width = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in rows)

    def to_dict(self) -> dict:
        """The report as plain values, units beside them; the program and the device stay out."""
        kept = (f.name for f in dataclasses.fields(self) if f.name not in ("program", "device", "by_op"))
        values = {name: _plain(getattr(self, name)) for name in kept}
        return values | {"by_op": [dataclasses.asdict(c) for c in self.by_op], "units": dict(UNITS)}

    def to_json(self) -> str:
        """The report as JSON text (RFC 8259: what is not finite is null)."""
        return json.dumps(_finite(self.to_dict()), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "CostReport":
        """The report that `to_json` wrote, without program and device: it has no figures of memory and banks.

        Raises: ValueError for other text.
        """
        try:
            raw = json.loads(text)
            raw.pop("units")
            ops = tuple(OpCost(**c | {"warnings": tuple(c["warnings"])}) for c in raw.pop("by_op"))
            tuples = {k: tuple(raw.pop(k)) for k in ("seconds_range", "basis", "warnings")}
            regions = {k: tuple(v) for k, v in raw.pop("regions").items()}
            quality = {k: float("inf") if v is None else v for k, v in raw.pop("quality").items()}
            return CostReport(**raw, **tuples, by_op=ops, regions=regions, quality=quality)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as why:
            raise ValueError(f"not a cost report: {why}") from None

    def svg(self, kind: str = "ops") -> str:
        """One figure as an SVG element for a page: "roofline", "ops", "memory" or, on a Pim, "banks".

        It takes the text colour of the page. Raises: ValueError if the report has no data for it.
        """
        from hw.figures import figure

        return figure(self, kind)

    def plot(self, path, kind: str = "all") -> None:
        """Write a figure, or all that the report has data for, to a file with its own light, dark and print
        colours.

        `path` ends in .svg for the figures, .html for a page with the table under them. Raises: ValueError.
        """
        from hw.figures import SCHEMES, figures, sheet

        path = Path(path)
        if path.suffix not in (".html", ".svg"):
            raise ValueError(f"path must end in .html or .svg, got {path.name!r}")
        parts = figures(self) if kind == "all" else [self.svg(kind)]
        title = f"Cost of a program on {self.target}"
        if path.suffix == ".svg":
            path.write_text(sheet(parts, title), encoding="utf-8")
            return
        path.write_text(
            "<!doctype html><html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width'>"
            f"<title>{escape(title)}</title><style>body{{font:15px sans-serif;max-width:40em;margin:2em auto;"
            f"padding:0 1em}}svg{{width:100%;height:auto;margin:1em 0}}pre{{overflow-x:auto;font-size:12px}}"
            f"{SCHEMES.format(x='body')}</style><body><h1>{escape(title)}</h1>{''.join(parts)}"
            f"<pre tabindex='0'>{escape(self.table(top=40))}</pre>",
            encoding="utf-8",
        )

    def to_trace(self) -> dict:
        """The timeline as Chrome trace events (chrome://tracing, ui.perfetto.dev), times in microseconds.

        Ops one after another with all their trips, a track for each resource, the bytes alive as a counter,
        and on a Pim the commands of one channel.
        """
        from hw.chrome import trace_events

        return trace_events(self)

    def perfetto(self, path) -> None:
        """Write `to_trace` as a JSON file."""
        Path(path).write_text(json.dumps(self.to_trace()), encoding="utf-8")


UNITS = {
    "cycles": "cycles", "seconds": "s", "seconds_range": "s", "energy_j": "J", "bytes_by_level": "B",
    "macs": "multiply-accumulates", "flops": "operations, a multiply-accumulate counted two",
    "peak_memory": "B", "utilisation": "share of the seconds", "regions": "B needed, B available",
}  # fmt: skip


def _plain(x):
    if isinstance(x, tuple | list):
        return [_plain(v) for v in x]
    return {k: _plain(v) for k, v in x.items()} if isinstance(x, dict) else x


def _finite(x):
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    return None if isinstance(x, float) and not isfinite(x) else x


def summarise(
    target, costs, *, peak_memory, regions, clock_hz, warnings=(), quality=None, program=None, device=None
) -> CostReport:
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
    if costs and all(is_roofline(c) for c in costs if c.seconds):
        low = min(low, max((s for r, s in busy.items() if r != "power"), default=low))
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
        program=program,
        device=device,
    )


def is_roofline(cost: OpCost) -> bool:
    """Does the price take the resources of a kernel to work side by side, without knowing how far they do."""
    return cost.basis.startswith("roofline")


def _si(x, unit):
    """A number with an SI prefix, three digits; seconds have no prefix above one."""
    if x == 0 or not isfinite(x):
        return f"{x:g} {unit}"
    for factor, prefix in _PREFIXES[5 * (unit == "s") :]:
        if abs(x) >= factor:
            return f"{x / factor:.3g} {prefix}{unit}"
    return f"{x / 1e-15:.3g} f{unit}"


_PREFIXES = (
    (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), 
    (1e-9, "n"), (1e-12, "p"),
)  # fmt: skip
