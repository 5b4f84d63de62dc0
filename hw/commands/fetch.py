"""`triptych fetch`: models and data, downloaded once, with their checksums."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.text import Text

from hw.commands.shared import columns, emit


def fetch_source(options):
    """Download, or list what there is."""
    from ref.fetch import SOURCES, cached, fetch

    if options.name is None:
        rows = [
            {"name": n, "about": x.about, "licence": x.licence, "bytes": x.size,
             "here": cached(n, verify=False) is not None}
            for n, x in SOURCES.items()
        ]  # fmt: skip

        def show(out):
            table = columns("name", "MB", "here", "what")
            table.columns[3].justify = "left"
            for r in rows:
                table.add_row(r["name"], f"{r['bytes'] / 1e6:.0f}", "yes" if r["here"] else "", r["about"])
            out.print(table)

        emit(options, rows, show)
        return
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(24), DownloadColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(options.name, total=None)
        path = fetch(options.name, progress=lambda done, total: bar.update(task, completed=done, total=total))
    emit(
        options,
        {"name": options.name, "path": str(path)},
        lambda out: out.print(Text(f"{options.name}: {path}")),
    )
