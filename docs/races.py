"""The stored races of `triptych bench` in a page: `summary(slug)` a table, `races(slug)` figures; nothing
where none was run.
"""

import json
from html import escape
from pathlib import Path

from hw.commands.bench import by_arithmetic
from hw.commands.bench_figure import panel

DATA = Path(__file__).resolve().parent / "data"
OURS = "accel (auto)"


def _record(slug, folder):
    path = Path(folder) / f"bench_{slug}_gpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def _where(record, run):
    versions = ", ".join(f"{n} {v}" for n, v in run["versions"].items() if n != "jaxlib")
    return f"{run['device']}, {record['date']}, {versions}"


def summary(slug, folder=DATA):
    """Markdown: a row a race with our time, its share of the roof and the best of the others, or ""."""
    if (record := _record(slug, folder)) is None:
        return ""
    lines = []
    for run in record["results"].values():
        for race in run["races"]:
            ran = {e["name"]: e for e in race["entries"] if e["seconds"]}
            others = [e for n, e in ran.items() if not n.startswith("accel")]
            if OURS not in ran:
                continue
            ours, best = ran[OURS], min(others, key=lambda e: e["seconds"], default=None)
            speed = f"{ours['tflops']:.3g} TFLOP/s" if by_arithmetic(race) else f"{ours['gbps']:,.0f} GB/s"
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
