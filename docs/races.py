"""The stored races of `triptych bench` as figures in a page: `races(slug)`; nothing where none was run."""

import json
from html import escape
from pathlib import Path

from hw.commands.bench_figure import panel

DATA = Path(__file__).resolve().parent / "data"


def races(slug, folder=DATA):
    """HTML of the races that tests/claims/bench.py stored for a technique, or ""."""
    path = Path(folder) / f"bench_{slug}_gpu.json"
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    return "".join(figure(race, run, record) for run in record["results"].values() for race in run["races"])


def figure(race, run, record):
    """A race with a caption that says where, when, against which roof, and who could not run."""
    absent = [e["name"] for e in race["entries"] if not e["seconds"]]
    versions = ", ".join(f"{n} {v}" for n, v in run["versions"].items() if n != "jaxlib")
    words = (
        f"{run['slug']}, {race['title']}: medians on {run['device']}, {record['date']}, {versions}. "
        f"100 %: {run['ceilings']['basis']}."
    )
    if absent:
        words += f" Did not run there: {', '.join(absent)}."
    drawn = panel(race, f"{run['slug']} on {run['device']}")
    return f"<figure>{drawn}<figcaption>{escape(words)}</figcaption></figure>"
