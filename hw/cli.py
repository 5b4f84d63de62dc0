"""The command line: list the techniques, show the three panels of one, race it, price your own, fetch
models.
"""

import argparse
import difflib
import importlib
import inspect
import json
import os
import re
import sys
import time
from pathlib import Path

import ref

for _package in ("ref", "accel", "hw"):  # a foreign package of our name is named before anything else
    ref.require_own(_package)

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from ref.catalog import BY_SLUG, CATALOG, PARTS, technique  # noqa: E402

ROOT = Path(ref.__file__).resolve().parent.parent
DEFAULT_TARGETS = ("h200", "a100", "xeon_6154", "this_cpu", "zcu102")
ULPS = 64  # ulps granted to accel on top of 64 times what one ulp in the inputs moves ref
EPS = float(np.finfo(np.float32).eps)


class Refusal(Exception):
    """A mistake that the reader can mend; its text is the one line that is shown."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after one line on standard error."""
    try:
        options = _parser().parse_args(argv)
        options.json = getattr(options, "json", False)
        options.run(options)
        sys.stdout.flush()
        return 0
    except SystemExit as e:  # argparse: --help and --version end with 0, a mistake with 2
        return e.code or 0
    except BrokenPipeError:  # `triptych | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("stopped")
    except (Refusal, LookupError, ValueError, NotImplementedError, MemoryError, ImportError, OSError) as e:
        if os.environ.get("TRIPTYCH_TRACEBACK"):
            raise
        return _fail(str(e.args[0] if isinstance(e, KeyError) and e.args else e) or type(e).__name__)


def _fail(message):
    line = " ".join(str(message).split())
    print(f"triptych: {line}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake and the nearest command for a misspelt one."""

    def error(self, message):
        if found := re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            what, word = "command" if found[1] == "COMMAND" else found[1], found[2]
            choices = [c.strip(" '") for c in found[3].split(",")]
            if what == "command" and word in BY_SLUG:
                message = f"no command {word!r}; did you mean `triptych run {word}`?"
            elif near := difflib.get_close_matches(word, choices, n=1):
                message = f"no {what} {word!r}; did you mean {near[0]!r}?"
            else:
                message = f"no {what} {word!r}; there are {', '.join(choices)}"
        sys.exit(_fail(message))


def _parser():
    common = argparse.ArgumentParser(add_help=False)
    # SUPPRESS: the flag may stand before or after the command, and the second default must not undo the
    # first.
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text"
    )
    parser = _Parser(prog="triptych", description=__doc__, parents=[common])
    parser.set_defaults(run=_list)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name, run, help):
        p = commands.add_parser(name, help=help, description=help, parents=[common])
        p.set_defaults(run=run)
        return p

    command("list", _list, "the techniques, by part of the book")
    p = command("run", _run, "the three panels of a technique on its example: ref, accel, hw, and its claims")
    p.add_argument("slug")
    p.add_argument("--target", action="append", metavar="NAME", help="hw target, repeatable (default: a few)")
    p.add_argument("--seed", type=int, default=0, help="of the example (default 0)")
    p = command("bench", _bench, "race the implementations of a technique and its peers on its example")
    p.add_argument("slug")
    p.add_argument("--seconds", type=float, default=0.3, help="spent on each entry (default 0.3)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p = command("price", _price, "price your own JAX function on a target")
    p.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="imported from here, an op program as .json, a model as .onnx",
    )
    p.add_argument(
        "--shape", action="append", default=[], metavar="1x128x64:float32",
        help="one argument's shape and type, repeatable; float32 if no type is given, ':float32' is a scalar",
    )  # fmt: skip
    p.add_argument("--static", action="append", default=[], metavar="NAME=VALUE", help="a keyword argument")
    p.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="AXIS=LENGTH",
        help="a length that a .onnx file leaves open",
    )
    p.add_argument("--weights", default="", metavar="NAMES", help="arguments that are weights, by name: w,b")
    p.add_argument(
        "--target", action="append", metavar="NAME", help="preset or .toml, repeatable (default h200)"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a target's field"
    )
    p.add_argument("--by", choices=("op", "kind", "scope"), default="op", help="rows of the table")
    p.add_argument("--plot", metavar="FILE", help="write figures as .html or .svg")
    p.add_argument("--perfetto", metavar="FILE", help="write a timeline for ui.perfetto.dev")
    command("targets", _targets, "the devices that can be priced")
    p = command("fetch", _fetch, "download a model or data set once, with its checksum; alone, list them")
    p.add_argument("name", nargs="?")
    p = command("new", _new, "write the five files of a new technique into this checkout, from templates")
    p.add_argument("slug")
    p.add_argument("--part", required=True, choices=PARTS)
    p.add_argument("--title", help="of the technique (default: the slug)")
    return parser


def _console():
    """Colour and width by the terminal; without one no colour (NO_COLOR too) and 80 columns."""
    wide = Console().width if sys.stdout.isatty() else 80
    return Console(width=max(60, min(wide, 100)), highlight=False, soft_wrap=False)


def _progress():
    """Bars on standard error, so that output can be piped; silent where nobody watches."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def _emit(options, value, show):
    if options.json:
        print(json.dumps(value, indent=1, default=_jsonable))
    else:
        show(_console())


def _jsonable(x):
    return x.tolist() if hasattr(x, "tolist") else str(x)


# list, targets


def _list(options):
    rows = [
        {
            "slug": t.slug, "part": t.part, "title": t.title, "year": t.year, "arxiv": t.arxiv,
            "idea": t.idea, "accel": _has_accel(t),
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

    _emit(options, rows, show)


def _targets(options):
    from hw.targets import presets

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

    _emit(options, rows, show)


def _has_accel(t):
    return importlib.util.find_spec(f"accel.{t.part}.{t.slug}") is not None


# run


def _run(options):
    t = technique(options.slug)
    targets = _presets(options.target or DEFAULT_TARGETS)
    with _progress() as bar:
        task = bar.add_task(f"{t.slug}: example", total=None)
        say = lambda text: bar.update(task, description=f"{t.slug}: {text}")
        module = getattr(ref, t.slug)
        examples = module.example(options.seed)
        panels = [_ref_panel(module, e, say) for e in examples]
        result = {
            "slug": t.slug, "title": t.title, "paper": t.paper, "year": t.year, "arxiv": t.arxiv,
            "idea": t.idea, "accel": None, "hw": None, "claims": _claims(t),
            "ref": {
                "file": f"ref/{t.part}/{t.slug}.py", "lines": _lines(module), "calls": [p[0] for p in panels],
            },
        }  # fmt: skip
        if _has_accel(t):
            calls = [_accel_panel(t, e, *p, say) for e, p in zip(examples, panels, strict=True)]
            result["accel"] = {"file": f"accel/{t.part}/{t.slug}.py", "device": _jax_device(), "calls": calls}
            result["hw"] = _hw_panel(t, examples, targets, say)
    _emit(options, result, lambda out: _show_run(out, result))


def _ref_panel(module, e, say):
    """({what the call is, seconds, bytes}, output)."""
    say(f"ref.{e.fn}")
    fn = getattr(module, e.fn)
    start = time.perf_counter()
    out = fn(*e.args, **e.kwargs)
    seconds = [time.perf_counter() - start]
    while len(seconds) < 5 and sum(seconds) < 0.2:
        start = time.perf_counter()
        fn(*e.args, **e.kwargs)
        seconds.append(time.perf_counter() - start)
    arrays = [x for x in _leaves(e.args) if isinstance(x, np.ndarray)]
    call = {
        "fn": e.fn,
        "shapes": [list(x.shape) for x in arrays],
        "in_bytes": sum(x.nbytes for x in arrays),
        "out_bytes": sum(x.nbytes for x in _leaves(out) if isinstance(x, np.ndarray)),
        "seconds": min(seconds),
    }
    return call, out


def _accel_panel(t, e, call, want, say):
    """Largest error of accel in float32 against its bound, and its speed beside ref's."""
    import accel
    from accel.race import on_device, race

    say(f"accel.{e.fn} (compiling)")
    fn = getattr(getattr(accel, t.slug), e.fn)
    args = on_device(e.args)
    timed = race({"accel": lambda: fn(*args, **e.kwargs)}, budget=0.1)[0]
    row = {
        "fn": e.fn,
        "error": None,
        "bound": None,
        "within": None,
        "seconds": timed.seconds,
        "why_not": timed.why_not,
    }
    if timed.seconds is None:
        return row
    say(f"ref.{e.fn} with its inputs nudged")
    again = getattr(ref, t.slug)
    rounded = _floats(e.args, lambda x: x.astype(np.float32).astype(np.float64))
    want = getattr(again, e.fn)(*rounded, **e.kwargs)
    rng = np.random.default_rng(1)
    nudge = lambda x: x * (1 + EPS * rng.choice((-1.0, 1.0), x.shape))
    moved = [getattr(again, e.fn)(*_floats(rounded, nudge), **e.kwargs) for _ in range(2)]
    got = fn(*args, **e.kwargs)
    row |= _error(got, want, moved) | {"speedup": call["seconds"] / timed.seconds}
    return row


def _error(got, want, moved):
    """Of the output nearest to its bound: largest error, and the bound, 64 times what one ulp in the inputs

    moves ref plus 64 ulps of the largest entry. Integers and flags must be equal.
    """
    worst = {"error": 0.0, "bound": 0.0, "within": True}
    others = [_leaves(m) for m in moved]
    for n, (g, w) in enumerate(zip(_leaves(got), _leaves(want), strict=True)):
        g, w = np.asarray(g), np.asarray(w)
        if w.dtype.kind != "f":
            worst["within"] &= bool(np.array_equal(g, w))
            continue
        finite = np.isfinite(w)
        g, w = g.astype(np.float64)[finite], w[finite]
        step = max(np.abs(np.asarray(o[n])[finite] - w).max(initial=0.0) for o in others)
        error, bound = np.abs(g - w).max(initial=0.0), ULPS * (step + EPS * np.abs(w).max(initial=0.0))
        worst["within"] &= bool(error <= bound)
        if not worst["bound"] or error * worst["bound"] > worst["error"] * bound:
            worst |= {"error": float(error), "bound": float(bound)}
    return worst


def _presets(names, **fields):
    """{name: target}, looked up before any work is done."""
    from hw.targets import preset

    return {name: preset(name, **fields) for name in names}


def _hw_panel(t, examples, targets, say):
    """Estimate of the heaviest of the examples' calls on each target; a refusal is a row that says why."""
    import accel
    import hw
    from accel.race import on_device

    traced, refused = [], {}
    for e in examples:
        say(f"tracing {e.fn}")
        fn = getattr(getattr(accel, t.slug), e.fn)
        try:
            program = hw.trace(lambda *args, fn=fn, e=e: fn(*args, **e.kwargs), *on_device(e.args))
            counts = hw.count(program)
        except (NotImplementedError, hw.UnknownTripCount) as why:
            refused[e.fn] = str(why)
        else:
            traced.append((counts.flops + counts.transcendentals + counts.index_ops, counts, e.fn, program))
    if not traced:
        return {"fn": None, "macs": 0, "ops": 0, "refused": refused, "targets": []}
    _, counts, name, program = max(traced, key=lambda x: x[0])
    rows = []
    for target_name, target in targets.items():
        say(f"pricing on {target_name}")
        try:
            rows.append({"target": target_name} | _row(hw.estimate(program, target)))
        except (NotImplementedError, MemoryError) as why:
            rows.append({"target": target_name, "seconds": None, "why_not": str(why)})
    return {"fn": name, "macs": counts.macs, "ops": len(program.ops), "refused": refused, "targets": rows}


def _row(report):
    return {
        "device": report.target,
        "seconds": report.seconds,
        "energy_j": report.energy_j,
        "bound_by": report.bound_by,
        "peak_bytes": report.peak_memory,
        "bytes_by_level": report.bytes_by_level,
        "warnings": list(report.warnings),
    }


def _claims(t):
    """The paper's claims beside what was found here: stored results if this is a checkout, the chapter's
    table.
    """
    found = {"chapter": f"docs/{t.part}/{t.slug}.md", "rows": [], "stored": None}
    chapter, data = ROOT / found["chapter"], ROOT / "docs" / "data" / f"{t.slug}.json"
    if chapter.exists():
        found["rows"] = _claims_table(chapter.read_text())
    if data.exists():
        record = json.loads(data.read_text())
        found["stored"] = {k: record.get(k) for k in ("date", "device", "versions", "results")}
    return found


def _claims_table(markdown):
    """Rows [claim, paper, here, status] of the first table under the heading "Claims"."""
    section = re.split(r"^## +Claims\b.*$", markdown, maxsplit=1, flags=re.MULTILINE)
    if len(section) < 2:
        return []
    lines = [x.strip() for x in re.split(r"^## ", section[1], maxsplit=1, flags=re.MULTILINE)[0].splitlines()]
    cells = [
        [re.sub(r"[*`$]|\\[a-z]+", "", c).strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]]
        for x in lines if x.startswith("|")
    ]  # fmt: skip
    return cells[2:] if cells and all(len(c) == len(cells[0]) for c in cells) else []


def _show_run(out, r):
    arxiv = f", arXiv {r['arxiv']}" if r["arxiv"] else ""
    out.print(Text(f"{r['title']} ({r['year']}{arxiv})", style="bold"))
    out.print(Text(r["idea"]))
    _head(out, f"ref: the definition, {r['ref']['file']}, {r['ref']['lines']} lines")
    table = _table("call", "arguments", "bytes in", "time")
    for c in r["ref"]["calls"]:
        table.add_row(c["fn"], _shapes(c["shapes"]), f"{c['in_bytes']:,}", _si(c["seconds"], "s"))
    out.print(table)
    if not r["accel"]:
        _head(out, "accel and hw: not written yet for this technique")
    else:
        _head(out, f"accel: made fast, {r['accel']['file']}, float32 on {r['accel']['device']}")
        table = _table("call", "error", "bound", "", "time", "speed-up")
        for c in r["accel"]["calls"]:
            if c["why_not"]:
                table.add_row(c["fn"], c["why_not"], "", "", "", "")
            else:
                verdict = "within" if c["within"] else "BEYOND"
                table.add_row(
                    c["fn"], f"{c['error']:.1e}", f"{c['bound']:.1e}", verdict,
                    _si(c["seconds"], "s"), f"{c['speedup']:.1f}x",
                )  # fmt: skip
        out.print(table)
        out.print(
            Text(
                "bound: 64 x (what one ulp in the inputs moves ref + one ulp of the largest entry)",
                style="dim",
            )
        )
        _show_hw(out, r["hw"])
    _show_claims(out, r["claims"])


def _show_hw(out, panel):
    if panel["fn"]:
        _head(out, f"hw: what {panel['fn']} costs, {panel['macs']:,} MACs (models, not measurements)")
        table = _table("target", "time", "energy", "bound by", "peak memory")
        for c in panel["targets"]:
            if c["seconds"] is not None:
                cells = (
                    _si(c["seconds"], "s"),
                    _si(c["energy_j"], "J"),
                    c["bound_by"],
                    f"{c['peak_bytes']:,} B",
                )
                table.add_row(c["target"], *cells)
        out.print(table)
        for c in panel["targets"]:
            if c["seconds"] is None:
                out.print(Text(f"{c['target']}: {c['why_not']}"))
    else:
        _head(out, "hw: none of the calls can be priced")
    for fn, why in panel["refused"].items():
        out.print(Text(f"{fn} cannot be priced: {why}"))


def _show_claims(out, claims):
    _head(out, "the paper's claims")
    if stored := claims["stored"]:
        out.print(Text(f"measured {stored['date']} on {stored['device']}:"))
        for line in _flat(stored["results"]):
            out.print(Text(f"  {line}"))
    if claims["rows"]:
        table = _table("claim", "the paper reports", "here", "status", lines=True)
        for row in claims["rows"]:
            table.add_row(*row[:4])
        out.print(table)
    if not stored and not claims["rows"]:
        out.print(
            Text(f"not in this installation: see {claims['chapter']} in the source distribution or the book")
        )


def _flat(value, prefix="", depth=2):
    """Lines `name: value` of the scalars near the top of a stored result."""
    if isinstance(value, dict) and depth:
        for k, v in value.items():
            yield from _flat(v, f"{prefix}{k} ", depth - 1)
    elif isinstance(value, str | bool | int):
        yield f"{prefix.strip()}: {value}"
    elif isinstance(value, float):
        yield f"{prefix.strip()}: {value:.4g}"


# bench


def _bench(options):
    import jax.numpy as jnp

    import accel
    from accel.race import implementations, on_device, peers, race

    if options.seconds <= 0:
        raise Refusal(f"--seconds must be positive, got {options.seconds:g}")
    t = technique(options.slug)
    if not _has_accel(t):
        raise Refusal(f"accel.{t.slug} is not written yet: nothing to race")
    races = []
    with _progress() as bar:
        task = bar.add_task(t.slug, total=None)
        for e in getattr(ref, t.slug).example():
            reference, fast = getattr(getattr(ref, t.slug), e.fn), getattr(getattr(accel, t.slug), e.fn)
            args = on_device(e.args, getattr(jnp, options.dtype))
            entries = {"accel (auto)": lambda fast=fast, args=args, e=e: fast(*args, **e.kwargs)}
            for impl in implementations(fast):
                entries[f"accel ({impl})"] = lambda fast=fast, args=args, e=e, impl=impl: fast(
                    *args, **{**e.kwargs, "impl": impl}
                )
            entries |= peers(t.slug, e, args)
            entries["ref (NumPy, float64)"] = lambda reference=reference, e=e: reference(*e.args, **e.kwargs)
            say = lambda name, e=e: bar.update(task, description=f"{t.slug}.{e.fn}: {name}")
            results = race(entries, budget=options.seconds, progress=say)
            races.append(
                {"fn": e.fn, "shapes": [list(np.shape(x)) for x in _leaves(args)], "entries": results}
            )
    value = {
        "slug": t.slug, "device": _jax_device(), "dtype": options.dtype,
        "races": [
            {**r, "entries": [{"name": x.name, "seconds": x.seconds, "spread": x.spread, "why_not": x.why_not}
                              for x in r["entries"]]} for r in races
        ],
    }  # fmt: skip

    def show(out):
        out.print(Text(f"{t.title} on {value['device']}, {options.dtype}", style="bold"))
        for r in races:
            _head(out, f"{r['fn']} {_shapes(r['shapes'])}")
            best = min((x.seconds for x in r["entries"] if x.seconds), default=0.0)
            table = _table("entry", "median", "spread", "of the best")
            ran = [x for x in r["entries"] if x.seconds]
            for x in sorted(ran, key=lambda x: x.seconds):
                spread = f"±{_si(x.spread, 's')}"
                table.add_row(x.name, _si(x.seconds, "s"), spread, f"{x.seconds / best:.2f}x")
            out.print(table)
            for x in r["entries"]:
                if not x.seconds:
                    out.print(Text(f"{x.name} did not run: {x.why_not}", style="dim"))

    _emit(options, value, show)


# price


def _price(options):
    import hw

    targets = _presets(options.target or ["h200"], **dict(_assignment(x) for x in options.set))
    with _progress() as bar:
        bar.add_task("tracing", total=None)
        program = _program(options)
        reports = [hw.estimate(program, target) for target in targets.values()]
    for path, write in ((options.plot, "plot"), (options.perfetto, "perfetto")):
        if path:
            getattr(reports[0], write)(path)

    def show(out):
        for r in reports:
            out.print(Text(r.table(by=options.by)), soft_wrap=not sys.stdout.isatty())

    _emit(options, [r.to_dict() for r in reports], show)


def _program(options):
    """The op program of MODULE:FUNCTION with the given shapes, or the one in a .json or .onnx file."""
    import hw

    if options.function.endswith(".json"):
        from hw.program import Program

        return Program.from_json(Path(options.function).read_text())
    if options.function.endswith(".onnx"):
        return hw.from_onnx(options.function, sizes=dict(_assignment(x) for x in options.size))[0]
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
    static = dict(_assignment(x) for x in options.static)
    specs = [_spec(text) for text in options.shape]
    weights = tuple(w for w in options.weights.split(",") if w)
    try:
        return hw.trace(fn, *specs, weights=weights, static=static or None)
    except TypeError as e:
        raise Refusal(
            f"{options.function} did not take these {len(specs)} arguments: {str(e).splitlines()[0]}"
        ) from None


def _spec(text):
    """ "1x128x64:float32" -> ("float32", (1, 128, 64))."""
    shape, _, dtype = text.partition(":")
    try:
        sizes = tuple(int(n) for n in shape.split("x")) if shape else ()
    except ValueError:
        raise Refusal(f"--shape {text!r} must look like 1x128x64:float32") from None
    if any(n < 0 for n in sizes):
        raise Refusal(f"--shape {text!r} has a negative size")
    return dtype or "float32", sizes


def _assignment(text):
    """ "causal=True" -> ("causal", True); what is not a literal is text."""
    import ast

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Refusal(f"{text!r} must look like NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# fetch


def _fetch(options):
    from ref.fetch import SOURCES, cached, fetch

    if options.name is None:
        rows = [
            {"name": n, "about": x.about, "licence": x.licence, "bytes": x.size,
             "here": cached(n, verify=False) is not None}
            for n, x in SOURCES.items()
        ]  # fmt: skip

        def show(out):
            table = _table("name", "MB", "here", "what")
            table.columns[3].justify = "left"
            for r in rows:
                table.add_row(r["name"], f"{r['bytes'] / 1e6:.0f}", "yes" if r["here"] else "", r["about"])
            out.print(table)

        _emit(options, rows, show)
        return
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(24), DownloadColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(options.name, total=None)
        path = fetch(options.name, progress=lambda done, total: bar.update(task, completed=done, total=total))
    _emit(
        options,
        {"name": options.name, "path": str(path)},
        lambda out: out.print(Text(f"{options.name}: {path}")),
    )


# new


def _new(options):
    from hw.scaffold import scaffold

    paths, record = scaffold(options.slug, options.part, options.title or options.slug, ROOT)
    names = [p.relative_to(ROOT).as_posix() for p in paths]

    def show(out):
        for name in names:
            out.print(Text(f"wrote {name}"))
        out.print(Text("put this into ref/catalog.py, then fill the files from top to bottom:"))
        out.print(Text(record))

    _emit(options, {"files": names, "record": record}, show)


# shared


def _head(out, text):
    out.print()
    out.print(Text(text, style="cyan"))


def _table(*columns, lines=False):
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_lines=lines, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, overflow="fold", justify="left" if i == 0 or lines else "right")
    return table


def _shapes(shapes):
    text = " ".join("x".join(map(str, s)) or "()" for s in shapes[:4])
    return text + (f" +{len(shapes) - 4}" if len(shapes) > 4 else "")


def _lines(module):
    """Lines of code, without blank lines and comments."""
    lines = (x.strip() for x in inspect.getsource(module).splitlines())
    return sum(bool(x) and not x.startswith("#") for x in lines)


def _leaves(tree):
    if isinstance(tree, dict):
        return [x for v in tree.values() for x in _leaves(v)]
    if isinstance(tree, tuple | list):
        return [x for v in tree for x in _leaves(v)]
    if hasattr(tree, "__dataclass_fields__"):
        return [x for f in tree.__dataclass_fields__ for x in _leaves(getattr(tree, f))]
    return [] if tree is None else [tree]


def _floats(tree, change):
    """The tree with `change` applied to its float arrays."""
    import jax

    return jax.tree.map(lambda x: change(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x, tree)


def _jax_device():
    import jax

    d = jax.devices()[0]
    return "the CPU" if d.platform == "cpu" else d.device_kind


def _si(x, unit):
    """A number with an SI prefix, three digits."""
    from hw.report import _si as si

    return si(x, unit)
