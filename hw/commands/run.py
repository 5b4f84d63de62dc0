"""`triptych run SLUG`: the three panels of a technique on its example, and the paper's claims."""

import inspect
import json
import re
import time
from dataclasses import is_dataclass

import numpy as np
from rich.text import Text

import ref
from hw.commands.shared import (
    ROOT,
    code_lines,
    columns,
    emit,
    floats,
    has_accel,
    head,
    jax_device,
    leaves,
    named_targets,
    progress,
    shapes,
    si,
)
from hw.targets import presets
from ref.catalog import technique

DEFAULT_TARGETS = ("h200", "a100", "xeon_6154", "this_cpu", "gddr6_aim", "zcu102", "stm32f746")
MOST_WARNINGS = 3  # of a target, in print
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ULPS = 64  # ulps granted to accel on top of 64 times what one ulp in the inputs moves ref
EPS = float(np.finfo(np.float32).eps)


def run(options):
    """Show the panels, or give them as JSON."""
    t = technique(options.slug)
    targets = named_targets(options.target or [n for n in DEFAULT_TARGETS if n in presets()])
    with progress() as bar:
        task = bar.add_task(f"{t.slug}: example", total=None)
        say = lambda text: bar.update(task, description=f"{t.slug}: {text}")
        module = getattr(ref, t.slug)
        examples = module.example(options.seed)
        panels = [_ref_panel(module, e, say) for e in examples]
        result = {
            "slug": t.slug, "title": t.title, "paper": t.paper, "year": t.year, "arxiv": t.arxiv,
            "idea": t.idea, "accel": None, "hw": None, "claims": _claims(t),
            "ref": {
                "file": f"ref/{t.part}/{t.slug}.py", "lines": code_lines(module),
                "calls": [p[0] for p in panels],
            },
        }  # fmt: skip
        if has_accel(t):
            calls = [_accel_panel(t, e, *p, say) for e, p in zip(examples, panels, strict=True)]
            result["accel"] = {"file": f"accel/{t.part}/{t.slug}.py", "device": jax_device(), "calls": calls}
            result["hw"] = _hw_panel(t, examples, targets, say)
    emit(options, result, lambda out: _show_run(out, result))


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
    arrays = [x for x in leaves(e.args) if isinstance(x, np.ndarray)]
    call = {
        "fn": e.fn,
        "shapes": [list(x.shape) for x in arrays],
        "in_bytes": sum(x.nbytes for x in arrays),
        "out_bytes": sum(x.nbytes for x in leaves(out) if isinstance(x, np.ndarray)),
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
    rounded = floats(e.args, lambda x: x.astype(np.float32).astype(np.float64))
    want = getattr(again, e.fn)(*rounded, **e.kwargs)
    rng = np.random.default_rng(1)
    nudge = lambda x: x * (1 + EPS * rng.choice((-1.0, 1.0), x.shape))
    moved = [getattr(again, e.fn)(*floats(rounded, nudge), **e.kwargs) for _ in range(2)]
    got = fn(*args, **e.kwargs)
    row |= _error(got, want, moved) | {"speedup": call["seconds"] / timed.seconds}
    return row


def _error(got, want, moved):
    """Of the output nearest to its bound: largest error, and the bound, 64 times what one ulp in the inputs

    moves ref plus 64 ulps of the largest entry. Integers and flags must be equal.
    """
    worst = {"error": 0.0, "bound": 0.0, "within": True}
    others = [leaves(m) for m in moved]
    for n, (g, w) in enumerate(zip(leaves(got), leaves(want), strict=True)):
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
            program = hw.trace(
                lambda *args, fn=fn, e=e: fn(*args, **e.kwargs),
                *on_device(e.args),
                weights=weights(fn, e.args),
            )
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


def weights(fn, args):
    """Positions of the arguments that are weights, there before the call: trees named as parameters are."""
    names = [p.name for p in inspect.signature(fn).parameters.values() if p.kind in _POSITIONAL]
    is_tree = lambda x: isinstance(x, tuple | list | dict) or is_dataclass(x)
    named = lambda n: n in ("params", "weights", "layer") or n.endswith("_params")
    return tuple(i for i, (n, x) in enumerate(zip(names, args, strict=False)) if named(n) and is_tree(x))


def _row(report):
    return {
        "device": report.target,
        "seconds": report.seconds,
        "seconds_range": list(report.seconds_range),
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
        found["rows"] = claims_table(chapter.read_text())
    if data.exists():
        record = json.loads(data.read_text())
        found["stored"] = {k: record.get(k) for k in ("date", "device", "versions", "results")}
    return found


def claims_table(markdown):
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
    head(out, f"ref: the definition, {r['ref']['file']}, {r['ref']['lines']} lines")
    table = columns("call", "arguments", "bytes in", "time")
    for c in r["ref"]["calls"]:
        table.add_row(c["fn"], shapes(c["shapes"]), f"{c['in_bytes']:,}", si(c["seconds"], "s"))
    out.print(table)
    if not r["accel"]:
        head(out, "accel and hw: not written yet for this technique")
    else:
        head(out, f"accel: made fast, {r['accel']['file']}, float32 on {r['accel']['device']}")
        table = columns("call", "error", "bound", "", "time", "speed-up")
        for c in r["accel"]["calls"]:
            if c["why_not"]:
                table.add_row(c["fn"], c["why_not"], "", "", "", "")
            else:
                verdict = "within" if c["within"] else "BEYOND"
                table.add_row(
                    c["fn"], f"{c['error']:.1e}", f"{c['bound']:.1e}", verdict,
                    si(c["seconds"], "s"), f"{c['speedup']:.1f}x",
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
        head(out, f"hw: what {panel['fn']} costs, {panel['macs']:,} MACs (models, not measurements)")
        table = columns("target", "time", "at least", "at most", "energy", "bound by", "memory")
        for c in panel["targets"]:
            if c["seconds"] is not None:
                cells = (
                    *(si(s, "s") for s in (c["seconds"], *c["seconds_range"])),
                    si(c["energy_j"], "J"),
                    c["bound_by"],
                    si(c["peak_bytes"], "B"),
                )
                table.add_row(c["target"], *cells)
        out.print(table)
        for c in panel["targets"]:
            if c["seconds"] is None:
                out.print(Text(f"{c['target']}: {c['why_not']}"))
                continue
            for words in c["warnings"][:MOST_WARNINGS]:
                out.print(Text(f"{c['target']}: {words}", style="dim"))
            if (more := len(c["warnings"]) - MOST_WARNINGS) > 0:
                out.print(Text(f"{c['target']}: {more} more warnings, with --json", style="dim"))
    else:
        head(out, "hw: none of the calls can be priced")
    for fn, why in panel["refused"].items():
        out.print(Text(f"{fn} cannot be priced: {why}"))


def _show_claims(out, claims):
    head(out, "the paper's claims")
    if stored := claims["stored"]:
        out.print(Text(f"measured {stored['date']} on {stored['device']}:"))
        for line in _flat(stored["results"]):
            out.print(Text(f"  {line}"))
    if claims["rows"]:
        table = columns("claim", "the paper reports", "here", "status", lines=True)
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
