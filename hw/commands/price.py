"""`triptych price`: what the reader's own function costs on a target."""

import difflib
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from hw.commands.shared import Refusal, assignment, emit, named_targets, progress, si
from hw.program import itemsize

DTYPES = {
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "i8": "int8", "i16": "int16",
    "i32": "int32", "i64": "int64", "u8": "uint8", "u32": "uint32", "b1": "bool",
}  # fmt: skip


def price(options):
    """Trace, price on every target (or on every combination of a sweep), show."""
    import hw

    fields = dict(assignment(x) for x in options.set)
    targets = named_targets(options.target or ["h200"], **fields)
    axes = dict(_values(x) for x in options.sweep)
    if axes and (len(targets) > 1 or options.trace or options.figure != "all"):
        raise Refusal("--sweep takes one --target, and neither --trace nor --figure")
    with progress() as bar:
        bar.add_task("tracing", total=None)
        programs = _programs(options)
        if axes:
            (target,) = targets.values()
            labelled = programs if len(programs) > 1 else next(iter(programs.values()))
            _show_sweep(options, hw.sweep_fields(labelled, target, **axes))
            return
        results = [_estimate(p, t, name) for p, name in _named(programs) for t in targets.values()]
    reports = [r for r in results if isinstance(r, hw.CostReport)]
    if not reports:
        raise Refusal("; ".join(dict.fromkeys(why["why_not"] for why in results)))
    if options.plot:
        reports[0].plot(options.plot, options.figure)
    if options.trace:
        reports[0].perfetto(options.trace)

    def show(out):
        for r in results:
            text = (
                r.table(by=options.by) if isinstance(r, hw.CostReport) else f"{r['target']}: {r['why_not']}"
            )
            out.print(Text(text), soft_wrap=not sys.stdout.isatty())
        if options.compare and len(reports) > 1:
            out.print(Text("\n" + reports[0].compare(*reports[1:])), soft_wrap=True)

    emit(options, [r if isinstance(r, dict) else r.to_dict() for r in results], show)


def _named(programs):
    """(program, what to add to the target's name) of each."""
    return [(p, f", {label}" if len(programs) > 1 else "") for label, p in programs.items()]


def _estimate(program, target, name):
    """The report, or {target, why_not}."""
    import hw

    try:
        found = hw.estimate(program, target)
    except (NotImplementedError, MemoryError, hw.UnknownTripCount) as why:
        return {"target": target.name + name, "why_not": str(why)}
    return replace(found, target=target.name + name)


def _show_sweep(options, found):
    if options.plot:
        found.plot(options.plot)

    def show(out):
        out.print(Text(str(found.table())), soft_wrap=True)
        best = found.best()
        words = ", ".join(f"{k}={best[k]}" for k in found.fields)
        out.print(Text(f"fastest: {words}, {si(best['seconds'], 's')}"))

    emit(options, list(found.rows), show)


def _values(text):
    """ "hbm_gbps=1000,2000" -> ("hbm_gbps", [1000, 2000])."""
    name, equals, listed = text.partition("=")
    if not equals or not name or not listed:
        raise Refusal(f"--sweep {text!r} must look like FIELD=VALUE,VALUE,...")
    return name, [assignment(f"{name}={v.strip()}")[1] for v in listed.split(",")]


def _programs(options):
    """{label: op program} of a model's phases, or of the one function."""
    from hw.commands.models import MODELS, model_programs

    name, _, phase = options.function.partition(":")
    if name in MODELS:
        return model_programs(name, phase, options.context, DTYPES.get(options.dtype, options.dtype))
    return {options.function: _program(options)}


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
    dtype = DTYPES.get(dtype, dtype) or "float32"
    try:
        itemsize(dtype)
    except TypeError:
        raise Refusal(
            f"--shape {text!r} has no element type {dtype!r}; there are {', '.join(DTYPES)} and NumPy's names"
        ) from None
    return dtype, sizes
