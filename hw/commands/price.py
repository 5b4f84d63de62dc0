"""`triptych price`: what the reader's own function costs on a target."""

import difflib
import importlib
import os
import sys
from pathlib import Path

from rich.text import Text

from hw.commands.shared import Refusal, assignment, emit, named_targets, progress


def price(options):
    """Trace, price on every target, show."""
    import hw

    targets = named_targets(options.target or ["h200"], **dict(assignment(x) for x in options.set))
    with progress() as bar:
        bar.add_task("tracing", total=None)
        program = _program(options)
        reports = [hw.estimate(program, target) for target in targets.values()]
    for path, write in ((options.plot, "plot"), (options.perfetto, "perfetto")):
        if path:
            getattr(reports[0], write)(path)

    def show(out):
        for r in reports:
            out.print(Text(r.table(by=options.by)), soft_wrap=not sys.stdout.isatty())

    emit(options, [r.to_dict() for r in reports], show)


def _program(options):
    """The op program of MODULE:FUNCTION with the given shapes, or the one in a .json or .onnx file."""
    import hw

    if options.function.endswith(".json"):
        from hw.program import Program

        return Program.from_json(Path(options.function).read_text())
    if options.function.endswith(".onnx"):
        return hw.from_onnx(options.function, sizes=dict(assignment(x) for x in options.size))[0]
    module, colon, name = options.function.partition(":")
    if not (module and colon and name):
        raise Refusal(f"say what to price as MODULE:FUNCTION, got {options.function!r}")
    sys.path.insert(0, os.getcwd())
    try:
        fn = importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise Refusal(f"cannot import {module!r} from {os.getcwd()}: {e}") from None
    for part in name.split("."):
        if not hasattr(fn, part):
            near = difflib.get_close_matches(part, dir(fn), n=1)
            raise Refusal(f"{module} has no {part!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        fn = getattr(fn, part)
    if not callable(fn):
        raise Refusal(f"{options.function} is a {type(fn).__name__}, not a function")
    static = dict(assignment(x) for x in options.static)
    specs = [spec(text) for text in options.shape]
    weights = tuple(w for w in options.weights.split(",") if w)
    try:
        return hw.trace(fn, *specs, weights=weights, static=static or None)
    except TypeError as e:
        raise Refusal(
            f"{options.function} did not take these {len(specs)} arguments: {str(e).splitlines()[0]}"
        ) from None


def spec(text):
    """ "1x128x64:float32" -> ("float32", (1, 128, 64))."""
    shape, _, dtype = text.partition(":")
    try:
        sizes = tuple(int(n) for n in shape.split("x")) if shape else ()
    except ValueError:
        raise Refusal(f"--shape {text!r} must look like 1x128x64:float32") from None
    if any(n < 0 for n in sizes):
        raise Refusal(f"--shape {text!r} has a negative size")
    return dtype or "float32", sizes
