"""Figures of a report as SVG text: roofline dots, bars by op, memory over time, the Gantt chart of the banks.

Lines and words take the colour of the page around them (`currentColor`); the fills have a contrast of at
least 3 against white and against dark pages, and every bar says in words what its colour says. `sheet` puts
figures on a page of their own, with colours for light and dark screens and for paper.
"""

from html import escape
from math import ceil, floor, log10

from hw.pim_spans import TRACKS, product_spans
from hw.program import walk
from hw.report import _si as si
from hw.roofs import dots, roofs
from hw.usage import on_chip, usage

WIDTH = 560
COLOURS = ("#3d7edb", "#c2691a", "#2f8f5b", "#9a63d6", "#d6504a", "#1f8a93", "#c2529b", "#8a8420")
KINDS = ("roofline", "ops", "memory", "banks")
DASHES = ("", "7 4", "2 4", "9 3 2 3")
_MOST_STEPS = 4000  # steps of memory drawn; longer programs are thinned, their peak kept


def figure(report, kind: str) -> str:
    """The SVG element of one figure. Raises: ValueError for a kind that is unknown or that has no data."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of all, {', '.join(KINDS)}, got {kind!r}")
    svg = {"roofline": roofline, "ops": bars, "memory": memory, "banks": banks}[kind](report)
    if svg is None:
        why = {
            "roofline": "no op that computes and moves bytes",
            "ops": "no op that takes time",
            "memory": "no program with ops, which a report read from JSON lacks",
            "banks": "no product in the banks of a Pim",
        }
        raise ValueError(f"the report of {report.target} has {why[kind]}: no figure {kind!r}")
    return svg


def figures(report) -> list[str]:
    """All figures that the report has data for."""
    return [svg for make in (roofline, bars, memory, banks) if (svg := make(report)) is not None]


def sheet(svgs, title: str) -> str:
    """One SVG file with the figures one above the other, on its own light or dark ground; white on paper."""
    height, inner = 0, []
    for svg in svgs:
        tall = int(svg.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
        inner.append(
            svg.replace("<svg ", f'<svg x="12" y="{height + 12}" width="{WIDTH}" height="{tall}" ', 1)
        )
        height += tall + 16
    w, h = WIDTH + 24, height + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" class="sheet">'
        f"<title>{escape(title)}</title><style>{SCHEMES.format(x='svg.sheet')}</style>"
        f'<rect class="ground" width="{w}" height="{h}"/>{"".join(inner)}</svg>'
    )


SCHEMES = (
    "{x}{{color:#1d2128;background:#fff}}.ground{{fill:#fff}}"
    "@media (prefers-color-scheme:dark){{{x}{{color:#e4e7ee;background:#1c1f26}}.ground{{fill:#1c1f26}}}}"
    "@media print{{{x}{{color:#000;background:#fff}}.ground{{fill:#fff}}}}"
)


def _open(height, label):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="currentColor" aria-label="{escape(label)}">'
    )


def _text(x, y, words, anchor="start", **more):
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
    at = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>'
    return f"{at}{escape(words)}</text>"


def _cut(words, most):
    return words if len(words) <= most else "…" + words[1 - most :]


def _head(words):
    return _text(0, 15, words, font_weight="bold")


def _line(x1, y1, x2, y2, **more):
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
    at = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {at} stroke="currentColor"{extra}/>'


def colours(names) -> dict[str, str]:
    """A colour for each name, the first names first."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def roofline(report) -> str | None:
    """Dots of ops under the roof of the target: operations a byte against operations a second."""
    found = roofs(report)
    points = dots(report, found)
    if not points:
        return None
    left, right, top, low = 62, WIDTH - 20, 34, 300
    ridges = [c / m for c in found.compute.values() for m in found.memory.values()]
    xs = [p.intensity for p in points] + [min(max(ridges, default=1.0), 1e6)]
    x0, x1 = floor(log10(min(xs)) - 0.2), ceil(log10(max(xs)) + 0.2)
    ys = [p.speed for p in points] + list(found.compute.values())
    y1 = ceil(log10(max(ys)) + 0.1)
    y0 = max(floor(log10(min(ys)) - 0.1), y1 - 9)
    px = lambda v: left + (log10(v) - x0) / (x1 - x0) * (right - left)
    py = lambda v: low - (max(log10(v), y0) - y0) / (y1 - y0) * (low - top)
    listed = points[:5]
    height = 370 + 18 * len(listed)
    out = [
        _open(height, f"Roofline of {report.target}: {len(points)} dots of operations a byte and a second"),
        _head(f"{report.target}: operations a second against operations a byte"),
    ]
    for e in range(x0, x1 + 1, max(1, (x1 - x0) // 6)):
        out.append(_line(px(10**e), low, px(10**e), low + 5))
        out.append(_text(px(10**e), low + 20, f"{10.0**e:g}", "middle"))
    for e in range(y0, y1 + 1, max(1, (y1 - y0) // 5)):
        out.append(_line(left - 5, py(10**e), left, py(10**e)))
        out.append(_text(left - 8, py(10**e) + 4, si(10.0**e, "").strip(), "end"))
    out.append(_line(left, low, right, low) + _line(left, top, left, low))
    out.append(_text((left + right) / 2, low + 38, "operations a byte", "middle"))
    best = max(found.compute.values(), default=10.0**y1)
    for n, (level, rate) in enumerate(sorted(found.memory.items(), key=lambda x: -x[1])):
        a, b = max(10.0**x0, 10.0**y0 / rate), min(best / rate, 10.0**x1)
        dash = {"stroke_width": 1.5, "stroke_dasharray": DASHES[n % 4]}
        if b > a:
            out.append(_line(px(a), py(a * rate), px(b), py(b * rate), **dash))
        row = top + 6 + 17 * n  # above the roof nothing is drawn
        out.append(_line(left + 8, row, left + 36, row, **dash))
        out.append(_text(left + 42, row + 4, f"{level} {si(rate, 'B/s')}", font_size=12))
    slope, last = max(found.memory.values(), default=0.0), 0.0
    for unit, rate in sorted(found.compute.items(), key=lambda u: -u[1]):
        start = max(rate / slope if slope else 10.0**x0, 10.0**x0)
        if start >= 10.0**x1:
            continue
        out.append(_line(px(start), py(rate), right, py(rate), stroke_width=1.5))
        last = max(py(rate) - 5, last + 14) if last else py(rate) - 5
        out.append(_text(right, last, f"{unit} {si(rate, 'op/s')}", "end", font_size=12))
    colour, placed = colours(p.bound for p in points), []
    for n, p in reversed(list(enumerate(points))):
        x, y, r = px(p.intensity), py(p.speed), 4 + 9 * p.share**0.5
        tip = f"{', '.join(p.names[:4])}: {p.intensity:.3g} op/B, {si(p.speed, 'op/s')}, {p.share:.1%}"
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{colour[p.bound]}" fill-opacity="0.75" '
            f'stroke="currentColor" stroke-width="0.8"><title>{escape(tip)} of the time</title></circle>'
        )
        if n < len(listed):
            near = next((q for q in placed if abs(q[0] - x) < 26 and abs(q[1] - y) < 13), None)
            if near is None:
                placed.append([x, y, r, [n + 1]])
            else:
                near[2], near[3] = max(near[2], x + r - near[0]), [n + 1, *near[3]]
    for x, y, r, numbers in placed:
        out.append(_text(x + r + 2, y + 4, " ".join(map(str, numbers)), font_weight="bold"))
    for n, p in enumerate(listed):
        more = f" and {len(p.names) - 1} more" if len(p.names) > 1 else ""
        words = f"{n + 1}  {_cut(p.names[0], 34)}{more}: {p.share:.0%} of the time, bound by {p.bound}"
        out.append(f'<rect x="0" y="{351 + 18 * n}" width="9" height="9" fill="{colour[p.bound]}"/>')
        out.append(_text(14, 360 + 18 * n, words))
    words = f"roofs: {found.basis}; the area of a dot grows with its share of the time"
    out.append(_text(0, 360 + 18 * len(listed), words, font_size=12))
    return "".join([*out, "</svg>"])


def bars(report, *, by: str = "op", top: int = 12) -> str | None:
    """Bars of the dearest ops (kinds, scopes), each with its seconds, share and what it waits for."""
    rows = [r for r in report._rows(by) if r[1] > 0]
    if by == "op" and report.program is not None:  # with the shape of its result
        rows = [r for c, r in _with_shapes(report) if c.seconds > 0]
    if not rows:
        return None
    shown, rest = rows[:top], rows[top:]
    if rest:
        shown = [*shown, (f"{len(rest)} more", sum(r[1] for r in rest), 0, 0, "")]
    longest = max(r[1] for r in shown)
    colour = colours([r[4] for r in shown if r[4]])
    out = [
        _open(30 + 30 * len(shown), f"Time by {by} on {report.target}, dearest first"),
        _head(f"{report.target}: {si(report.seconds, 's')} by {by}"),
    ]
    for n, (name, seconds, trips, _, bound) in enumerate(shown):
        y = 42 + 30 * n
        times = f" ×{trips:,}" if trips > 1 else ""
        waits = f", {bound}" if bound else ""
        out.append(_text(0, y, f"{_cut(name, 44)}{times}"))
        out.append(_text(WIDTH, y, f"{si(seconds, 's')}, {seconds / report.seconds:.1%}{waits}", "end"))
        fill = f'fill="{colour[bound]}"' if bound else 'fill="currentColor" fill-opacity="0.45"'
        width = max(WIDTH * seconds / longest, 1)
        out.append(f'<rect x="0" y="{y + 5}" width="{width:.1f}" height="8" {fill}/>')
    return "".join([*out, "</svg>"])


def _with_shapes(report):
    first = {op.id: op.outputs[0] for op in walk(report.program.body) if op.outputs}
    shape = lambda c: f" {list(report.program.tensors[first[c.op]].shape)}" if c.op in first else ""
    order = sorted(report.by_op, key=lambda c: -c.seconds)
    return [(c, (c.label + shape(c), c.seconds, c.trips, c.macs, c.bound_by)) for c in order]


def memory(report) -> str | None:
    """Bytes alive over the time of the program, its largest buffers as bands, a loop's body once; the planned
    arena of a target that plans one.
    """
    if report.program is None or not report.program.body.ops:
        return None
    if hasattr(report.device, "memory"):
        plan = report.device.memory(report.program)
        return arena(plan.arena, plan.names, f"{report.target}: the arena, {plan.total:,} B")
    moments, left_out = _timeline(report)
    seconds = {}
    for c in report.by_op:
        seconds[c.op] = seconds.get(c.op, 0.0) + c.seconds
    widths = [0.0 if m.op.blocks and m.op.kind != "kernel" else seconds.get(m.op.id, 0.0) for m in moments]
    whole = sum(widths)
    if not whole:
        widths = [1.0] * len(moments)
        whole = float(len(moments))
    peak = max(moments, key=lambda m: m.nbytes)
    held = peak.nbytes - sum(b for _, b in peak.buffers)
    tensors = report.program.tensors
    largest = [i for i, b in peak.buffers[:5] if b >= 0.02 * max(peak.nbytes - held, 1)]
    left, right, top, low = 0, WIDTH, 34, 250
    most = max(peak.nbytes - held, 1)
    floor_h = 22 if held else 0  # what the caller keeps: a strip of its own, not to scale
    y = lambda b: low - floor_h - b / most * (low - floor_h - top)
    xs = [left]
    for w in widths:
        xs.append(xs[-1] + w / whole * (right - left))
    step = ceil(len(moments) / _MOST_STEPS)
    keep = [n for n, m in enumerate(moments) if n % step == 0 or m is peak]
    colour = {i: COLOURS[n % len(COLOURS)] for n, i in enumerate(largest)}
    bands = {i: [] for i in largest}
    outline = []
    for n in keep:
        m, base = moments[n], 0
        sizes = dict(m.buffers)
        a, b = xs[n], xs[min(n + step, len(xs) - 1)]
        for i in largest:
            if i in sizes:
                bands[i].append((a, b, base, base + sizes[i]))
                base += sizes[i]
        outline += [(a, m.nbytes - held), (b, m.nbytes - held)]
    at = next(n for n, m in enumerate(moments) if m is peak)
    lines = 3 + len(largest)
    out = [
        _open(low + 18 + 18 * lines, f"Memory of the program over time: at most {peak.nbytes:,} bytes"),
        _head(f"bytes alive over time: at most {peak.nbytes:,} B"),
    ]
    points = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in outline)
    out.append(
        f'<polygon points="{left},{y(0):.1f} {points} {right},{y(0):.1f}" fill="currentColor" '
        'fill-opacity="0.16" stroke="currentColor" stroke-width="1"/>'
    )
    for n, i in enumerate(largest):
        joined = _joined(bands[i])
        for a, b, lo, hi in joined:
            box = f'width="{max(b - a, 0.8):.1f}" height="{y(lo) - y(hi):.1f}"'
            out.append(
                f'<rect x="{a:.1f}" y="{y(hi):.1f}" {box} '
                f'fill="{colour[i]}" fill-opacity="0.8" stroke="currentColor" stroke-width="0.5">'
                f"<title>{escape(_name(tensors[i]))}</title></rect>"
            )
        if joined:
            a, b, lo, hi = max(joined, key=lambda r: r[1] - r[0])
            out.append(_number(n + 1, (a + b) / 2, y(hi), b - a, y(lo) - y(hi)))
    if held:
        out.append(
            f'<rect x="{left}" y="{low - floor_h + 3}" width="{right - left}" height="{floor_h - 3}" '
            'fill="currentColor" fill-opacity="0.16" stroke="currentColor" stroke-width="0.6"/>'
        )
        words = f"arguments, weights, constants: {held:,} B throughout (not to scale)"
        out.append(_text(right / 2, low - 6, words, "middle", font_size=12))
    out.append(_line(xs[at], top - 6, xs[at], low - floor_h, stroke_dasharray="2 3"))
    out.append(_text(left, low + 16, "0 s"))
    out.append(_text(right, low + 16, si(report.seconds, "s"), "end"))
    where = f"peak at {_cut(peak.op.label, 40)}"
    out.append(_text(0, low + 36, f"{where}: {peak.nbytes - held:,} B beyond what the caller keeps"))
    for n, i in enumerate(largest):
        t = tensors[i]
        row = low + 54 + 18 * n
        size = dict(peak.buffers)[i]
        out.append(f'<rect x="0" y="{row - 9}" width="9" height="9" fill="{colour[i]}"/>')
        words = f"{n + 1}  {_cut(_name(t), 40)} {list(t.shape)} {t.dtype}: {size:,} B"
        out.append(_text(14, row, words))
    out.append(_text(0, low + 54 + 18 * len(largest), left_out, font_size=12))
    return "".join([*out, "</svg>"])


_PALE = '"currentColor" fill-opacity="0.2"'


def arena(plan, names, title: str) -> str | None:
    """A planned arena: steps to the right, addresses upward, a rectangle a buffer, a panel a region."""
    buffers = [b for b in plan.buffers if b[1]]
    if not buffers:
        return None
    regions = plan.totals or {"": plan.total}
    largest = sorted(buffers, key=lambda b: -b[1])[:7]
    colour = {b[0]: COLOURS[n] for n, b in enumerate(largest)}
    rank = {b[0]: n + 1 for n, b in enumerate(largest)}
    steps = max(b[3] for b in buffers) + 1
    tall = 200 if len(regions) == 1 else 130
    x = lambda step: 1 + step / steps * (WIDTH - 2)
    out, top = [], 28
    for name, total in regions.items():
        if name:
            out.append(_text(0, top + 10, f"{name}: {total:,} B"))
            top += 16
        y = lambda address, top=top, total=total: top + tall - address / max(total, 1) * tall
        for i, size, first, last in buffers:
            if plan.region.get(i, "") != name:
                continue
            at = plan.offsets[i]
            shade = (
                f'"{colour[i]}" fill-opacity="0.8"' if i in colour else '"currentColor" fill-opacity="0.2"'
            )
            out.append(
                f'<rect x="{x(first):.1f}" y="{y(at + size):.1f}" width="{x(last + 1) - x(first):.1f}" '
                f'height="{y(at) - y(at + size):.1f}" fill={shade} stroke="currentColor" stroke-width="0.6">'
                f"<title>{escape(names.get(i, str(i)))}: {size:,} B at {at:,}, steps {first} to {last}"
                "</title></rect>"
            )
            if i in colour:
                middle, wide = (x(first) + x(last + 1)) / 2, x(last + 1) - x(first)
                out.append(_number(rank[i], middle, y(at + size), wide, y(at) - y(at + size)))
        out.append(_line(0, top + tall, WIDTH, top + tall))
        top += tall + 8
    out.append(_text(0, top + 10, "step 0") + _text(WIDTH, top + 10, f"step {steps - 1}", "end"))
    top += 30
    for n, (i, size, first, last) in enumerate(largest):
        row = top + 18 * n
        out.append(f'<rect x="0" y="{row - 9}" width="9" height="9" fill="{colour[i]}"/>')
        words = f"{n + 1}  {_cut(names.get(i, str(i)), 44)}: {size:,} B, steps {first} to {last}"
        out.append(_text(14, row, words))
    foot = f"{plan.lower_bound:,} B are alive at once; addresses upward"
    out.append(_text(0, top + 18 * len(largest), foot, font_size=12))
    label = f"Arena over {steps} steps, one rectangle a buffer: {title}"
    return "".join([_open(top + 18 * len(largest) + 8, label), _head(title), *out, "</svg>"])


def _number(n, middle, top, width, height):
    """The number of a band, if there is room for it: colours are not told apart on grey paper."""
    if width < 9 or height < 9:
        return ""
    size = min(12, height)
    return _text(middle, top + height / 2 + 0.36 * size, str(n), "middle", font_size=f"{size:.0f}")


def _timeline(report):
    """(moments whose peak is the report's, where one of our ways to count gives it, and words on that)."""
    program, peak = report.program, report.peak_memory
    fused = "what fused ops keep on the chip is left out"
    ways = (
        (lambda: frozenset(), "every op's results take memory; a loop's body is drawn once"),
        (lambda: on_chip(program), f"{fused}; a loop's body is drawn once"),
        (lambda: on_chip(program, attention=True), f"{fused}; a loop's body is drawn once"),
    )
    for inner, words in ways:
        moments = usage(program, inner=inner())
        if max(m.nbytes for m in moments) == peak:
            return moments, words
    return usage(program), f"in the program's own formats; {report.target} stores it in {peak:,} B"


def _joined(rects):
    """Neighbours of equal height as one rectangle."""
    out = []
    for a, b, lo, hi in rects:
        if out and out[-1][2:] == (lo, hi) and abs(out[-1][1] - a) < 0.06:
            out[-1] = (out[-1][0], b, lo, hi)
        else:
            out.append((a, b, lo, hi))
    return out


def _name(t):
    return t.name or f"{t.role} {t.id}"


def banks(report, *, most: int = 48) -> str | None:
    """Gantt chart of what a channel does for one vector of the dearest product, its first commands."""
    found = product_spans(report, most=4 * most)
    if found is None:
        return None
    label, m, k, all_spans, whole = found
    return gantt(
        all_spans, report.device, most=most, whole=whole,
        title=f"{report.target}: {_cut(label, 30)}, {m:,} outputs of {k:,} inputs",
    )  # fmt: skip


def gantt(spans, target, *, title: str = "commands of one channel", most: int = 48, whole=True) -> str:
    """Spans (of `hw.pim_spans.spans`) as a Gantt chart, the first `most` of them; all channels do alike."""
    ordered = sorted(spans, key=lambda s: s.start)
    shown = ordered[:most]
    end = max((s.start + s.ticks for s in shown), default=1) or 1
    cut = len(shown) < len(ordered) or not whole
    left, right = 76, WIDTH
    x = lambda t: left + t / end * (right - left)
    tracks = [t for t in TRACKS if any(s.track == t for s in shown)]
    colour = colours(dict.fromkeys(s.name if not s.name.startswith("row ") else "row" for s in shown))
    shade = {}  # the second kind of a track is paler, so that grey paper tells them apart
    for track in tracks:
        names = dict.fromkeys("row" if track == "row open" else s.name for s in shown if s.track == track)
        shade |= {name: 0.9 if n % 2 == 0 else 0.3 for n, name in enumerate(names)}
    height = 62 + 34 * len(tracks) + 20
    out = [_open(height, f"Gantt chart: {title}"), _head(title)]
    for n, track in enumerate(tracks):
        y = 32 + 34 * n
        out.append(_text(0, y + 17, track))
        out.append(_line(left, y + 27, right, y + 27, stroke_opacity="0.35"))
        for s in (s for s in shown if s.track == track):
            a, w = x(s.start), max((s.ticks) / end * (right - left), 0.8)
            name = "row" if s.name.startswith("row ") else s.name
            tip = f"{s.name}: from {si(s.start * target.tick_s, 's')}, {si(s.ticks * target.tick_s, 's')}"
            out.append(
                f'<rect x="{a:.1f}" y="{y}" width="{w:.1f}" height="24" fill="{colour[name]}" '
                f'fill-opacity="{shade[name]}" stroke="currentColor" stroke-width="0.5">'
                f"<title>{escape(tip)}</title></rect>"
            )
    y = 32 + 34 * len(tracks) + 8
    out.append(_text(left, y, "0 s") + _text(right, y, si(end * target.tick_s, "s"), "end"))
    words = "all channels and banks in lockstep" + ("; only the first commands are shown" if cut else "")
    out.append(_text((left + right) / 2, y, words, "middle", font_size=12))
    at = 0
    for name, fill in colour.items():
        word = {"row": "a row is open"}.get(name, name)
        box = f'fill="{fill}" fill-opacity="{shade[name]}" stroke="currentColor" stroke-width="0.5"'
        out.append(f'<rect x="{at}" y="{y + 15}" width="9" height="9" {box}/>')
        out.append(_text(at + 13, y + 24, word))
        at += 28 + 7 * len(word)
    return "".join([*out, "</svg>"])
