"""What `hw` says of a chapter's op programs, as a panel with sliders: `panel(slug)` writes it into a page.

The first result is computed when the book is built, so that the page reads without JavaScript and on paper.
In the browser docs/bundle.py has packed this file with the library: `answer` prices what the reader chose
with the same code, in the worker of the live cells. docs/programs.py traces and stores the programs.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from math import ceil, floor, log10
from pathlib import Path

import hw
from hw.device_file import with_fields
from hw.errors import DoesNotFit, UnknownTripCount, UnsupportedPrimitive
from hw.figures import COLOURS
from hw.fixed_plan import FormatPlan
from hw.formats import Fixed
from hw.mcu import Region
from hw.program import Program
from hw.report import _si as si
from hw.roofs import roofs
from hw.targets import KINDS, preset

HOME = Path(__file__).resolve().parent / "assets" / "programs"
TARGETS = ("gpu", "pim", "fpga", "mcu")
REFUSALS = (UnsupportedPrimitive, DoesNotFit, UnknownTripCount)


@dataclass(frozen=True)
class Dial:
    """A slider over a field of a target.

    value: what the field is given for a number of the slider; start: the number that stands for what the
    preset has, where that is none of them.
    """

    field: str
    what: str
    unit: str
    numbers: tuple
    value: Callable = lambda x: x
    start: float | None = None


DIALS = {
    "gpu": (
        Dial("hbm_gbps", "bandwidth of main memory", "GB/s", (1200.0, 2400.0, 4800.0, 9600.0, 19200.0)),
        Dial("l2_mb", "SRAM: L2 cache", "MB", (12.5, 25.0, 50.0, 100.0, 200.0)),
        Dial("launch_us", "time to start a kernel", "µs", (0.0, 0.5, 2.0, 5.0)),
    ),
    "pim": (
        Dial("channels", "channels: bandwidth", "", (4, 8, 16, 32)),
        Dial("tick_ps", "tick of the DRAM's clock", "ps", (1000, 500, 250)),
        Dial("asic.ghz", "clock of the processor", "GHz", (0.25, 0.5, 1.0, 2.0)),
    ),
    "fpga": (
        Dial("mhz", "clock", "MHz", (100.0, 200.0, 300.0, 400.0)),
        Dial("dram_gbps", "bandwidth of DRAM", "GB/s", (4.25, 8.5, 17.0, 34.0, 68.0)),
        Dial("bram36", "SRAM: memory blocks of 36 kbit", "", (228, 456, 912, 1824)),
        Dial("formats", "number format: bits of a weight", "", (8, 16, 24, 32),
             lambda bits: FormatPlan(weights=Fixed(bits, 2)), 16),
    ),
    "mcu": (
        Dial("mhz", "clock", "MHz", (54.0, 108.0, 216.0, 432.0)),
        Dial("regions", "SRAM", "KB", (128, 320, 512, 1024, 4096),
             lambda kb: (Region("sram", kb, 4.0),)),
        Dial("flash_kb", "memory for weights, external beyond 2,048", "KB", (512, 1024, 2048, 16384)),
    ),
}  # fmt: skip


# Programs


@lru_cache(maxsize=2)
def stored(slug) -> dict:
    """What docs/programs.py stored; the file as it is, or as a host that unpacked it on its way sent it."""
    data = (HOME / f"{slug}.gz").read_bytes()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


@lru_cache(maxsize=8)
def program(slug, index) -> Program:
    """The index-th op program of a slug, the last axis varying fastest."""
    for group in stored(slug)["groups"]:
        if index in group["of"]:
            entry = group["of"].index(index)
            tree = _filled(group["program"], [values[entry] for values in group["lists"]])
            return Program.from_json(json.dumps(tree))
    raise LookupError(f"{slug} has no program {index}")


def _filled(x, values):
    if isinstance(x, dict):
        return values[x["#"]] if "#" in x else {k: _filled(v, values) for k, v in x.items()}
    return [_filled(v, values) for v in x] if isinstance(x, list) else x


def chosen(slug, sizes) -> Program:
    """The program for {axis: position among its values}; what is not said is as the panel starts."""
    index = 0
    for name, values in stored(slug)["axes"].items():
        index = index * len(values) + sizes.get(name, values.index(stored(slug)["first"][name]))
    return program(slug, index)


def target(kind, dials, devices=None):
    """The target of a kind with {field: position of its slider} applied."""
    name = (devices or {}).get(kind, KINDS[kind])
    known = {d.field: d for d in DIALS[kind]}
    return with_fields(preset(name), {f: known[f].value(known[f].numbers[n]) for f, n in dials.items()})


# What the reader sees


def answer(text) -> str:
    """HTML of the result for JSON text {slug, sizes: {axis: n}, dials: {kind: {field: n}}, look: kind}."""
    asked = json.loads(text)
    slug, dials = asked["slug"], asked["dials"]
    p = chosen(slug, asked["sizes"])
    devices = stored(slug)["devices"]
    return result(p, {kind: target(kind, dials.get(kind, {}), devices) for kind in TARGETS}, asked["look"])


def result(p, targets, look) -> str:
    """A program on targets {kind: target}: charts, one line each, and the figures of the one looked at."""
    found = {}
    for kind, t in targets.items():
        try:
            found[kind] = hw.estimate(p, t)
        except REFUSALS as why:
            found[kind] = why
    names = {kind: targets[kind].name for kind in found}
    charts = [
        chart("latency", "s", names, {k: r.seconds for k, r in found.items() if k in _good(found)}),
        chart("energy", "J", names, {k: r.energy_j for k, r in found.items() if k in _good(found)}),
        chart("peak memory", "B", names, {k: r.peak_memory for k, r in found.items() if k in _good(found)}),
    ]
    charts.append(rooflines(names, {k: r for k, r in found.items() if k in _good(found)}))
    lines = "".join(f"<dt>{escape(names[k])}</dt>{_line(r)}" for k, r in found.items())
    return (
        f'<div class="price-charts">{"".join(charts)}</div><dl class="price-lines">{lines}</dl>'
        f'<div class="price-closer">{closer(found[look])}</div>'
    )


def _good(found):
    return {k for k, r in found.items() if not isinstance(r, Exception)}


def _line(r):
    if isinstance(r, Exception):
        return f'<dd class="price-refused">{escape(refusal(r))}</dd>'
    low, high = r.seconds_range
    overlap = f" (from {si(low, 's')} to {si(high, 's')})" if low < high else ""
    return (
        f"<dd>{si(r.seconds, 's')}{overlap}, {si(r.energy_j, 'J')}, {r.peak_memory:,} B at most alive; "
        f"bound by {escape(r.bound_by)}</dd>"
    )


def refusal(why) -> str:
    """The documented error in one line; what falls short first."""
    return f"{type(why).__name__}: {why}"


def closer(r) -> str:
    """Roofline, time by operation and memory over time of a report, or why there are none."""
    if isinstance(r, Exception):
        return f"<p>No figures: {escape(refusal(r))}</p>"
    figures = []
    for kind in ("roofline", "ops", "memory"):
        try:
            figures.append(f"<figure>{r.svg(kind)}</figure>")
        except ValueError as why:
            figures.append(f"<p>{escape(str(why))}</p>")
    return "".join(figures)


def chart(what, unit, names, values) -> str:
    """Bars on a logarithmic scale, one a target; those that refuse have none."""
    width, row = 300, 34
    positive = [v for v in values.values() if v > 0]
    high = log10(max(positive, default=1.0))
    low = min(log10(min(positive, default=1.0)), high - 2)  # what is nearly equal looks so
    said = ", ".join(f"{n} {si(values[k], unit) if k in values else 'refuses'}" for k, n in names.items())
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {26 + row * len(names)}" '
        'role="img" font-family="sans-serif" font-size="13" fill="currentColor" '
        f'aria-label="{escape(f"{what}: {said}")}">'
        f'<text x="0" y="14" font-weight="bold">{what}, on a logarithmic scale</text>'
    ]
    for n, (kind, name) in enumerate(names.items()):
        y = 38 + row * n
        words = si(values[kind], unit) if kind in values else "refuses"
        out.append(f'<text x="0" y="{y}">{escape(name)}</text>')
        out.append(f'<text x="{width}" y="{y}" text-anchor="end">{words}</text>')
        if values.get(kind, 0) > 0:  # the least bar is a tenth of the largest
            share = (log10(values[kind]) - low) / (high - low)
            size = f'width="{width * (0.1 + 0.9 * share):.1f}" height="8"'
            out.append(f'<rect x="0" y="{y + 5}" {size} fill="{COLOURS[n]}"/>')
    return "".join([*out, "</svg>"])


def whole(report) -> tuple | None:
    """(operations a byte, operations a second, roof of arithmetic, bandwidth) of a whole program.

    The memory is the one that takes longest. None where nothing is computed or moved.
    """
    found = roofs(report)
    moved = {k: b for k, b in report.bytes_by_level.items() if b and found.memory.get(k)}
    if not (moved and report.flops and report.seconds and found.compute):
        return None
    level = max(moved, key=lambda k: moved[k] / found.memory[k])
    speed = report.flops / report.seconds
    return report.flops / moved[level], speed, max(found.compute.values()), found.memory[level]


def rooflines(names, reports) -> str:
    """The whole program as a dot under the roof of each target, both axes logarithmic."""
    width, left, right, top, low = 300, 48, 280, 30, 142
    dots = {k: dot for k, r in reports.items() if (dot := whole(r))}
    xs = [x for i, _, peak, rate in dots.values() for x in (i, peak / rate)] or [1.0]
    ys = [y for _, speed, peak, _ in dots.values() for y in (speed, peak)] or [1.0]
    x0, x1 = floor(log10(min(xs)) - 0.5), ceil(log10(max(xs)) + 0.5)
    y0, y1 = floor(log10(min(ys)) - 0.5), ceil(log10(max(ys)) + 0.2)
    px = lambda v: left + (log10(v) - x0) / (x1 - x0) * (right - left)
    py = lambda v: low - (log10(v) - y0) / (y1 - y0) * (low - top)
    said = ", ".join(f"{names[k]} {si(s, 'op/s')} at {i:.3g} op/B" for k, (i, s, *_) in dots.items())
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 178" role="img" '
        f'font-family="sans-serif" font-size="13" fill="currentColor" aria-label="roofline: {escape(said)}">'
        '<text x="0" y="14" font-weight="bold">operations a second, by operations a byte</text>'
        f'<path d="M{left} {top}V{low}H{right}" fill="none" stroke="currentColor"/>'
    ]
    for e in range(x0, x1 + 1, max(1, (x1 - x0) // 3)):
        out.append(f'<text x="{px(10.0**e):.1f}" y="{low + 16}" text-anchor="middle">{10.0**e:g}</text>')
    for e in range(y0, y1 + 1, max(1, (y1 - y0) // 3)):
        words = si(10.0**e, "").strip()
        out.append(f'<text x="{left - 4}" y="{py(10.0**e) + 4:.1f}" text-anchor="end">{words}</text>')
    for n, (kind, name) in enumerate(names.items()):
        if kind not in dots:
            continue
        intensity, speed, peak, rate = dots[kind]
        start = max(10.0**x0, 10.0**y0 / rate)
        roof = [(start, min(rate * start, peak)), (max(peak / rate, start), peak), (10.0**x1, peak)]
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in roof)
        out.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[n]}" stroke-width="2"/>')
        out.append(
            f'<circle cx="{px(intensity):.1f}" cy="{py(speed):.1f}" r="5" fill="{COLOURS[n]}" '
            f'stroke="currentColor"><title>{escape(name)}</title></circle>'
        )
    return "".join([*out, "</svg>"])


# The panel as the page has it


def panel(slug) -> str:
    """The panel of a chapter as HTML: controls, hidden until there is a runtime, and the first result."""
    record = stored(slug)
    devices = record["devices"]
    sizes = "".join(_axis(slug, name, record) for name in record["axes"])
    look = "".join(
        f'<label><input type="radio" name="look" value="{k}"{" checked" * (k == TARGETS[0])}> '
        f"{escape(devices.get(k, KINDS[k]))} ({k})</label>"
        for k in TARGETS
    )
    dials = "".join(
        f'<fieldset data-of="{k}"{" hidden" * (k != TARGETS[0])}>'
        f"<legend>{escape(devices.get(k, KINDS[k]))}</legend>"
        f"{''.join(_dial(slug, k, d, target(k, {}, devices)) for d in DIALS[k])}</fieldset>"
        for k in TARGETS
    )
    at = ", ".join(f"{name} {_word(value)}" for name, value in record["first"].items())
    first = json.dumps({"slug": slug, "sizes": {}, "dials": {}, "look": TARGETS[0]})
    return (
        f'<section class="price" data-price="{slug}" aria-label="What it costs, by sliders">'
        f"<p>{escape(record['what'])} Traced from <code>accel</code>; prices are estimates.</p>"
        f'<form class="price-controls" hidden><fieldset><legend>Sizes</legend>{sizes}</fieldset>'
        f'<fieldset class="price-look"><legend>Change and look closer at</legend>{look}</fieldset>{dials}'
        '<p class="price-bar"><button type="reset" class="live-button">Reset</button> '
        '<span class="live-status" role="status">A slider that moves starts Python in this page.</span></p>'
        "</form>"
        f'<p class="price-at" aria-live="polite">Shown for {escape(at)}, on devices as they are sold.</p>'
        f'<div class="price-result">{answer(first)}</div></section>'
    )


def _word(value):
    return value if isinstance(value, str) else f"{value:,g}"


def _axis(slug, name, record):
    values, first = record["axes"][name], record["first"][name]
    label = f"price-{slug}-{name}"
    what = "number format" if name == "format" else name
    if isinstance(values[0], str):
        options = "".join(
            f'<option value="{n}"{" selected" * (v == first)}>{escape(v)}</option>'
            for n, v in enumerate(values)
        )
        return (
            f'<div><label for="{label}">{what}</label>'
            f'<select id="{label}" data-size="{name}">{options}</select></div>'
        )
    return _slider(label, what, [_word(v) for v in values], values.index(first), f'data-size="{name}"')


def _dial(slug, kind, dial, device):
    holder = device
    for part in dial.field.split("."):
        holder = getattr(holder, part)
    at = [dial.value(n) for n in dial.numbers]
    first = at.index(holder) if dial.start is None else dial.numbers.index(dial.start)
    words = [f"{_word(n)} {dial.unit}".strip() for n in dial.numbers]
    label = f"price-{slug}-{kind}-{dial.field.replace('.', '-')}"
    return _slider(label, dial.what, words, first, f'data-field="{dial.field}" title="{dial.field}"')


def _slider(label, what, words, first, data):
    return (
        f'<div><label for="{label}">{what}</label> <output for="{label}">{words[first]}</output>'
        f'<input type="range" id="{label}" {data} min="0" max="{len(words) - 1}" step="1" value="{first}" '
        f'aria-valuetext="{words[first]}" data-words="{escape("|".join(words))}"></div>'
    )
