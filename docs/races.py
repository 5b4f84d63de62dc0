"""The stored races of `triptych bench` in a page: `summary(slug)` a table, `races(slug)` figures, `folded()`
and `against()` those of all techniques; nothing where none was run.
"""

import json
from html import escape
from math import log2
from pathlib import Path

from opening import Figure

from hw.commands.bench import PROBLEMS, by_arithmetic
from hw.commands.bench_figure import panel

DATA = Path(__file__).resolve().parent / "data"
OURS = "accel (auto)"
LESS = ("alone", "no outliers", "nothing rounded")  # names of entries that leave a part of the work out


def _record(slug, folder):
    path = Path(folder) / f"bench_{slug}_gpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def _where(record, run):
    versions = ", ".join(f"{n} {v}" for n, v in run["versions"].items() if n != "jaxlib")
    return f"{run['device']}, {record['date']}, {versions}"


def summary(slug, folder=DATA):
    """Markdown: a row a race with our time, its share of the roof and the best of the others, or "". One that
    leaves a part of the work out, as its name then says, counts only where no other does all of it.
    """
    if (record := _record(slug, folder)) is None:
        return ""
    lines = []
    for run in record["results"].values():
        for race in run["races"]:
            ours, best = _fastest(race)
            if not ours:
                continue
            best = best or _fastest(race, less=())[1]
            tflops, gbps = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ours["tflops"], ours["gbps"]))
            speed = f"{tflops} TFLOP/s" if by_arithmetic(race) else f"{gbps} GB/s"
            them = f"{best['name']} | {best['seconds'] / ours['seconds']:.2f}" if best else " | "
            lines.append(
                f"| {race['title']} | {ours['seconds'] * 1e3:.4g} | {speed} | {ours['roof']:.0%} | {them} |"
            )
    head = "| problem | ours, ms | | of the roof | best of the others | its time / ours |"
    said = f"`triptych bench {slug}`, stored: medians on {_where(record, run)}."
    return "\n".join([said, "", head, "|---|--:|--:|--:|---|--:|", *lines, ""]) if lines else ""


def races(slug, folder=DATA):
    """HTML: a figure a race, with what it was measured on, or ""."""
    if (record := _record(slug, folder)) is None:
        return ""
    return "".join(_figure(race, run, record) for run in record["results"].values() for race in run["races"])


def _figure(race, run, record):
    absent = sum(not e["seconds"] for e in race["entries"])
    words = f"{run['slug']}, {race['title']}: medians on {_where(record, run)}. "
    words += f"100 %: {run['ceilings']['basis']}."
    words += f" {absent} more could not run there." if absent else ""
    drawn = panel(race, f"{run['slug']} on {run['device']}")
    return f"<figure>{drawn}<figcaption>{escape(words)}</figcaption></figure>"


def not_run(folder=DATA):
    """The techniques of which no race is stored."""
    return [slug for slug in PROBLEMS if _record(slug, folder) is None]


def folded(folder=DATA):
    """HTML: the figures of all races, folded by technique."""
    parts = []
    for slug in PROBLEMS:
        if record := _record(slug, folder):
            runs = list(record["results"].values())
            count = sum(len(run["races"]) for run in runs)
            head = f"{slug}: {count} race{'s' if count > 1 else ''} on {runs[0]['device']}, {record['date']}"
            parts.append(f"<details><summary>{escape(head)}</summary>{races(slug, folder)}</details>")
    return "".join(parts)


def against(folder=DATA):
    """A Figure: for every stored race the time of the best of the others over ours, by technique; or ""."""
    found = {}
    for slug in PROBLEMS:
        if record := _record(slug, folder):
            for run in record["results"].values():
                for race in run["races"]:
                    if ratio := _ratio(race):
                        found.setdefault(slug, []).append(ratio)
    if not found:
        return ""
    every = [r for ratios in found.values() for r in ratios]
    low, high, left, width = min(0.5, *every), max(2.0, *every), 150, 460
    x = lambda r: left + (log2(r) - log2(low)) / (log2(high) - log2(low)) * (width - left - 20)
    caption = (
        f"Time of the fastest of the others over ours, one dot a race, on a logarithmic axis: right of the "
        f"line at 1 ours is faster. {sum(r >= 1 for r in every)} of {len(every)} races. Others that leave "
        f"a part of the work out (the product alone, nothing rounded) do not count here."
    )
    bottom = 28 * len(found) + 8
    fig = Figure(width, bottom + 26, "Every stored race, ours against the best of the others", caption)
    for tick in (0.25, 0.5, 0.75, 1, 1.5, *(2.0**e for e in range(1, 8))):
        if low <= tick <= high:
            fig.line(x(tick), 4, x(tick), bottom, stroke_opacity=None if tick == 1 else 0.3)
            fig.text(x(tick), bottom + 18, f"{tick:g}", "middle", font_size=12)
    for n, (slug, ratios) in enumerate(found.items()):
        fig.text(left - 12, 28 * n + 23, slug, "end", font_size=13)
        for ratio in ratios:
            fig.dot(x(ratio), 28 * n + 19, 4.5, stroke="none", fill_opacity=0.55)
    return fig


def _ratio(race):
    """Time of the fastest of the others over ours, or None."""
    ours, best = _fastest(race)
    return best["seconds"] / ours["seconds"] if ours and best else None


def _fastest(race, less=LESS):
    """(our entry, the fastest of the others, but for names that hold one of `less`), None for what did not
    run.
    """
    ran = {e["name"]: e for e in race["entries"] if e["seconds"]}
    others = [e for n, e in ran.items() if not n.startswith("accel") and not any(x in n for x in less)]
    return ran.get(OURS), min(others, key=lambda e: e["seconds"], default=None)
