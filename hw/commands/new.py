"""`triptych new`: the five files of a new technique."""

from rich.text import Text

from hw.commands.shared import ROOT, emit


def new(options):
    """Write the files into this checkout."""
    from hw.scaffold import scaffold

    paths, record = scaffold(options.slug, options.part, options.title or options.slug, ROOT)
    names = [p.relative_to(ROOT).as_posix() for p in paths]

    def show(out):
        for name in names:
            out.print(Text(f"wrote {name}"))
        out.print(Text("put this into ref/catalog.py, then fill the files from top to bottom:"))
        out.print(Text(record))

    emit(options, {"files": names, "record": record}, show)
