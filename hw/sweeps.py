"""One call for many estimates: every combination of values of a target's fields, as a table and a figure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import isfinite, log10
from pathlib import Path

from hw.device_file import unit, with_fields
from hw.errors import DoesNotFit, UnknownTripCount, UnsupportedPrimitive
from hw.figures import DASHES, WIDTH, _head, _line, _open, _text, colours, sheet
from hw.front import Table, estimate
from hw.program import Program
from hw.report import CostReport, _si
from hw.target import Target

Y = {"seconds": "s", "joules": "J", "bytes": "B", "peak_memory": "B"}
MOST = 10_000  # estimates of one call


@dataclass(frozen=True)
class Sweep:
    """The estimates of a sweep. fields: the names that vary; rows: a dict a combination, its values and what
    it costs, or why not; reports: the report of each row, None where there is none.
    """

    target: str
    fields: tuple[str, ...]
    rows: tuple[dict, ...]
    reports: tuple[CostReport | None, ...]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def table(self) -> Table:
        """The rows; `print` shows them with units."""
        costs = ("seconds", "at_least", "at_most", "joules", "bytes", "peak_memory", "bound_by", "why_not")
        why = any(r["why_not"] for r in self.rows)
        return Table(list(self.rows), (*self.fields, *costs[: None if why else -1]))

    def __str__(self):
        return str(self.table())

    def best(self, by: str = "seconds") -> dict:
        """The row with least "seconds", "joules", "bytes" or "peak_memory". Raises: ValueError if none."""
        _check_y(by)
        good = [r for r in self.rows if not r["why_not"]]
        if not good:
            raise ValueError(f"no combination can be priced: {self.rows[0]['why_not']}")
        return min(good, key=lambda r: r[by])

    def to_json(self) -> str:
        """The rows as JSON text."""
        return json.dumps(list(self.rows), allow_nan=False)

    def svg(self, y: str = "seconds") -> str:
        """`y` against the first field as an SVG element, a line for each combination of the others."""
        _check_y(y)
        return _figure(self, y)

    def plot(self, path, y: str = "seconds") -> None:
        """Write `svg` to a .svg file that has its own light, dark and print colours."""
        path = Path(path)
        if path.suffix != ".svg":
            raise ValueError(f"path must end in .svg, got {path.name!r}")
        path.write_text(sheet([self.svg(y)], f"{y} of {self.target}"), encoding="utf-8")


def _check_y(y):
    if y not in Y:
        raise ValueError(f"y must be one of {', '.join(Y)}, got {y!r}")


def sweep_fields(program, target: Target, **values) -> Sweep:
    """Estimate `program` on `target` with every combination of the fields' values, the last varying fastest.

    Args: program: a Program, or {label: Program}, whose labels (a context length) become the first field,
        "program". values: field=[...], or **{"asic.ghz": [...]} for a field inside a field.
    Returns: a `Sweep`: rows, table(), best(), svg(), plot(path), to_json(). A combination that does not fit
      or cannot be priced is a row that says why.
    Raises: ValueError for a field that the target lacks, a value it does not allow, or no values.
    """
    axes = dict(values)
    for name, given in axes.items():
        if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
            raise ValueError(f"{name} must be a list of values, got {given!r}")
        axes[name] = list(given)
        if not axes[name]:
            raise ValueError(f"{name} has no values")
    programs = dict(program) if isinstance(program, Mapping) else {None: program}
    if not axes and len(programs) < 2:
        raise ValueError("name a field to vary: sweep_fields(program, target, hbm_gbps=[2000, 4000])")
    for p in programs.values():
        if not isinstance(p, Program):
            raise ValueError(f"program must be a Program or a dict of them, got {type(p).__name__}")
    total = len(programs)
    for given in axes.values():
        total *= len(given)
    if total > MOST:
        raise ValueError(f"a sweep has at most {MOST:,} combinations, got {total:,}")
    combinations = [dict(zip(axes, c, strict=True)) for c in product(*axes.values())]
    targets = [with_fields(target, c) for c in combinations]  # a wrong value ends the sweep before it starts
    rows, reports = [], []
    for label, p in programs.items():
        for chosen, device in zip(combinations, targets, strict=True):
            row = ({} if label is None else {"program": label}) | {k: _shown(v) for k, v in chosen.items()}
            try:
                r = estimate(p, device)
            except (UnsupportedPrimitive, DoesNotFit, UnknownTripCount) as why:
                rows.append(row | {"why_not": f"{type(why).__name__}: {why}"})
                reports.append(None)
                continue
            rows.append(row | _costs(r))
            reports.append(r)
    names = tuple(axes) if None in programs else ("program", *axes)
    return Sweep(target.name, names, tuple(rows), tuple(reports))


def _shown(value):
    return value if isinstance(value, bool | int | float | str) else str(value)


def _costs(r):
    return {
        "seconds": r.seconds, "at_least": r.seconds_range[0], "at_most": r.seconds_range[1],
        "joules": r.energy_j, "bytes": sum(r.bytes_by_level.values()), "peak_memory": r.peak_memory,
        "bound_by": r.bound_by, "why_not": "",
    }  # fmt: skip


def _figure(found, y):
    good = [r for r in found.rows if not r["why_not"] and isfinite(r[y]) and r[y] > 0]
    name, *others = found.fields
    title = f"{found.target}: {y.replace('_', ' ')} against {_worded(name)}"
    left, right, top, low = 70, WIDTH - 16, 34, 270
    xs = list(dict.fromkeys(r[name] for r in found.rows))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in xs)
    place = _scale(sorted(xs) if numbers else xs, left + 14, right - 14, numbers)
    lines = {}
    for r in good:
        lines.setdefault(", ".join(f"{_worded(k)} {r[k]}" for k in others), []).append(r)
    failed = sum(bool(r["why_not"]) for r in found.rows)
    below = len(lines) * bool(others)
    out = [_open(318 + 18 * (below + bool(failed)), title), _head(title)]
    out.append(_line(left, low, right, low) + _line(left, top, left, low))
    if good:
        values = [r[y] for r in good]
        a, b = min(values), max(values)
        logs = b > 8 * a
        lo, hi = (log10(a), log10(b)) if logs else (0.0, b)
        span = (hi - lo) or 1.0
        py = lambda v: low - 12 - ((log10(v) if logs else v) - lo) / span * (low - top - 24)
        for n in range(5):
            v = lo + n / 4 * span
            v = 10**v if logs else v
            out.append(_line(left - 5, py(v), left, py(v)) + _text(left - 8, py(v) + 4, _si(v, Y[y]), "end"))
        colour = colours(lines)
        for n, (label, rows) in enumerate(lines.items()):
            rows = sorted(rows, key=lambda r: place[r[name]])
            points = " ".join(f"{place[r[name]]:.1f},{py(r[y]):.1f}" for r in rows)
            look = f'stroke="{colour[label]}" stroke-width="2" stroke-dasharray="{DASHES[n % 4]}"'
            out.append(f'<polyline points="{points}" fill="none" {look}/>')
            out += [
                f'<circle cx="{place[r[name]]:.1f}" cy="{py(r[y]):.1f}" r="4" fill="{colour[label]}">'
                f"<title>{_si(r[y], Y[y])}, bound by {r['bound_by']}</title></circle>"
                for r in rows
            ]
            if others:
                row = 330 + 18 * n
                out.append(f'<line x1="0" y1="{row - 4}" x2="30" y2="{row - 4}" {look}/>')
                out.append(_text(36, row, label))
    step = max(1, -(-len(xs) // 8))
    for v in list(place)[::step]:
        out.append(_line(place[v], low, place[v], low + 5))
        out.append(_text(place[v], low + 20, f"{v:g}" if numbers else str(v), "middle"))
    out.append(_text((left + right) / 2, low + 38, _worded(name), "middle"))
    if failed:
        out.append(_text(0, 330 + 18 * below, f"{failed} of {len(found)} cannot run: no dot"))
    return "".join([*out, "</svg>"])


def _worded(name):
    return f"{name} ({u})" if (u := unit(name)) else name


def _scale(xs, left, right, numbers):
    """{value: x}: logarithmic where positive values spread over more than eightfold, else linear; words and
    flags evenly.
    """
    if len(xs) == 1:
        return {xs[0]: (left + right) / 2}
    if not numbers:
        return {v: left + n / (len(xs) - 1) * (right - left) for n, v in enumerate(xs)}
    f = log10 if xs[0] > 0 and xs[-1] > 8 * xs[0] else float
    return {v: left + (f(v) - f(xs[0])) / (f(xs[-1]) - f(xs[0])) * (right - left) for v in xs}
