"""The figure of a race: a bar an entry, as long as its share of the roof."""

from hw.commands.shared import si
from hw.figures import COLOURS, WIDTH, _cut, _head, _line, _open, _text, sheet


def race_figure(value) -> str:
    """An SVG file of what `race_problems` returns: a panel a race, entries by speed, with the roof at the
    right edge. Ours in the first colour of the book, others in the second.
    """
    words = f"{value['slug']} on {value['device']}"
    return sheet([panel(r, words) for r in value["races"]], words)


def panel(race, words) -> str:
    """One race as an SVG element."""
    ran = sorted((e for e in race["entries"] if e["seconds"]), key=lambda e: e["seconds"])
    left, right, top = 190, WIDTH - 104, 66
    height = top + 22 * max(len(ran), 1) + 34
    out = [
        _open(height, f"{words}: {race['title']}; share of the roof of {len(ran)} entries"),
        _head(words),
        _text(0, 34, _cut(race["title"], 76)),
    ]
    if not ran:
        return "".join([*out, _text(0, top, "nothing ran"), "</svg>"])
    longest = max(1.0, *(e["roof"] for e in ran))  # a data sheet can be passed where caches help
    x = lambda share: left + share / longest * (right - left)
    low = top + 22 * len(ran)
    for tick in (0, 0.25, 0.5, 0.75, 1) if longest < 1.5 else (0, 1):
        out.append(_line(x(tick), top - 8, x(tick), low, stroke_opacity="0.35", stroke_dasharray="2 4"))
        out.append(_text(x(tick), top - 14, f"{tick:.0%}", "middle", font_size=12))
    for n, e in enumerate(ran):
        y, mine = top + 22 * n, e["name"].startswith("accel")
        out.append(_text(left - 8, y + 12, _cut(e["name"], 27), "end", font_size=12))
        width = max(x(e["roof"]) - left, 1)
        fill = f'fill="{COLOURS[0 if mine else 1]}" fill-opacity="{0.9 if mine else 0.6}"'
        out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="16" {fill}/>')
        out.append(_text(left + width + 6, y + 12, f"{si(e['seconds'], 's')}, {e['roof']:.0%}", font_size=12))
    out.append(_text(left, low + 20, "share of what the device could do", font_size=12))
    return "".join([*out, "</svg>"])
