"""Charts of the chapters, drawn by `Figure` in the text's own colour and small enough for a phone."""

from math import ceil, floor, log10

from opening import Figure

DASHES = (None, "7 4", "2 4", "9 3 2 3", "1 6")


def lines(title, caption, series, *, x, y, log="", ticks=None, yticks=None, width=460, height=290, dots=True):
    """A Figure of curves, told apart by their dashes and named in a list below.

    Args: series {name: [(x, y), ...]}; x, y: what the axes show; log: "", "x", "y" or "xy"; ticks, yticks:
      places of the marks, {place: label} for labels of their own.
    """
    fx, fy = (log10 if axis in log else float for axis in "xy")
    points = [p for curve in series.values() for p in curve]
    xs, ys = [fx(p[0]) for p in points], [fy(p[1]) for p in points]
    ticks, yticks = (_ticks(v, t, axis in log) for v, t, axis in ((xs, ticks, "x"), (ys, yticks, "y")))
    x0, x1 = _span([*xs, *(fx(t) for t in ticks)])
    y0, y1 = _span([*ys, *(fy(t) for t in yticks)])
    left, right, top, bottom = 58, 24, 12, 44
    rows = ceil(len(series) / 2) if len(series) > 1 else 0
    px = lambda v: left + (fx(v) - x0) / (x1 - x0) * (width - left - right)
    py = lambda v: height - bottom - (fy(v) - y0) / (y1 - y0) * (height - bottom - top)
    fig = Figure(width, height + 22 * rows, title, caption)
    fig.px, fig.py = px, py  # for marks of the caller's own
    fig.line(left, height - bottom, width - right, height - bottom).line(left, top, left, height - bottom)
    for at, label in ticks.items():
        fig.line(px(at), height - bottom, px(at), height - bottom + 4)
        fig.text(px(at), height - bottom + 18, label, "middle", font_size=12)
    for at, label in yticks.items():
        fig.line(left - 4, py(at), left, py(at))
        fig.text(left - 7, py(at) + 4, label, "end", font_size=12)
    fig.text((left + width - right) / 2, height - 8, x, "middle", font_size=13)
    middle = (height - bottom + top) / 2
    fig.text(13, middle, y, "middle", font_size=13, transform=f"rotate(-90 13 {middle:.0f})")
    for i, (name, curve) in enumerate(series.items()):
        dash = DASHES[i % len(DASHES)]
        fig.path([(px(a), py(b)) for a, b in curve], stroke_dasharray=dash)
        if dots:
            for a, b in curve:
                fig.dot(px(a), py(b), 3, stroke="none")
        if rows:
            column, row = i % 2, i // 2
            fig.line(left - 40 + column * (width // 2 - 10), height + 14 + 22 * row,
                     left - 6 + column * (width // 2 - 10), height + 14 + 22 * row,
                     stroke_dasharray=dash, stroke_width=2)  # fmt: skip
            fig.text(left + column * (width // 2 - 10), height + 18 + 22 * row, name, font_size=13)
    return fig


def bars(title, caption, rows, *, unit="", width=460, label=150, show="{:,.0f}"):
    """A Figure of horizontal bars: rows [(name, value), ...], each value written at the end of its bar."""
    high = max(v for _, v in rows)
    fig = Figure(width, 30 * len(rows) + 8, title, caption)
    for i, (name, value) in enumerate(rows):
        long = value / high * (width - label - 90)
        fig.text(label - 8, 30 * i + 22, name, "end", font_size=13)
        fig.box(label, 30 * i + 8, max(float(long), 1.0), 20, 0.55, stroke="none")
        fig.text(label + long + 6, 30 * i + 22, show.format(value) + unit, font_size=13)
    return fig


def grid(fig, values, x, y, cell, *, low=None, high=None, gap=1):
    """Squares of a matrix on a Figure, dark where the value is high; its corner is at (x, y)."""
    flat = [v for row in values for v in row]
    low, high = min(flat) if low is None else low, max(flat) if high is None else high
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            shade = 0.06 + 0.86 * min(max((float(v) - low) / ((high - low) or 1), 0), 1)
            fig.box(x + j * cell, y + i * cell, cell - gap, cell - gap, round(shade, 2), stroke="none")
    return fig


def heat(fig, values, x, y, cell, *, low=0.0, high=1.0, levels=8):
    """As `grid` for many cells: each shade is one path of runs along rows; the lowest of them is empty."""
    runs = {}
    for i, row in enumerate(values):
        step = [int(min(max((float(v) - low) / (high - low), 0), 1) * levels + 0.5) for v in row]
        start = 0
        for j in range(1, len(step) + 1):
            if j == len(step) or step[j] != step[start]:
                w = cell * (j - start)
                at = f"M{x + cell * start:.5g} {y + cell * i:.5g}h{w:.4g}v{cell:.4g}h-{w:.4g}z"
                runs.setdefault(step[start], []).append(at)
                start = j
    for level, parts in sorted(runs.items()):
        if level:
            style = {
                "fill": "currentColor",
                "fill_opacity": round(0.92 * level / levels, 2),
                "stroke": "none",
            }
            fig._add("path", {"d": "".join(parts), **style})
    return fig


def _span(values):
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _ticks(values, ticks, logarithmic):
    if isinstance(ticks, dict):
        return ticks
    if ticks is None and logarithmic:
        inner = range(ceil(min(values) - 1e-9), floor(max(values) + 1e-9) + 1)
        outer = range(floor(min(values)), ceil(max(values)) + 1)
        ticks = [10.0**e for e in (inner if len(inner) > 1 else outer)]
    elif ticks is None:
        step = 10.0 ** floor(log10((max(values) - min(values)) or 1))
        spread = (max(values) - min(values)) / step
        step *= 0.5 if spread < 3 else 1 if spread < 6 else 2
        ticks = [i * step for i in range(floor(min(values) / step), ceil(max(values) / step) + 1)]
    return {t: f"{t:,.10g}" for t in ticks}
