"""`triptych list` and `triptych targets`."""

import inspect

from rich.table import Table
from rich.text import Text

from hw.commands.shared import emit, has_accel
from ref.catalog import CATALOG, PARTS


def list_techniques(options):
    """The catalogue by part."""
    rows = [
        {
            "slug": t.slug, "part": t.part, "title": t.title, "year": t.year, "arxiv": t.arxiv,
            "idea": t.idea, "accel": has_accel(t),
        }
        for t in CATALOG
    ]  # fmt: skip

    def show(out):
        for part in PARTS:
            if mine := [t for t in CATALOG if t.part == part]:
                table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
                table.add_column(no_wrap=True, style="bold", width=max(len(t.slug) for t in CATALOG))
                table.add_column(width=4)
                table.add_column(ratio=1)
                for t in mine:
                    table.add_row(t.slug, str(t.year), t.idea)
                out.print(Text(part.upper(), style="cyan"))
                out.print(table)
        out.print("`triptych run SLUG` shows one in three panels.")

    emit(options, rows, show)


def list_targets(options):
    """The presets, or one target's fields as TOML."""
    from hw.device_file import target_toml
    from hw.targets import preset, presets

    if options.name:
        target = preset(options.name)
        value = {"name": target.name, "toml": target_toml(target)}
        emit(options, value, lambda out: print(value["toml"], end=""))
        return
    rows = []
    for name, make in presets().items():
        about = (
            "this computer, measured" if name == "this_cpu" else (inspect.getdoc(make) or "").split("\n")[0]
        )
        rows.append({"name": name, "about": about, "module": make.__module__})

    def show(out):
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        for r in rows:
            table.add_row(r["name"], r["about"])
        out.print(table)

    emit(options, rows, show)
