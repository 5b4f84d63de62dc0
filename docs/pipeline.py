"""A block of flash's kernel for Hopper, played through by its cycle counts: `play`; `drawn` draws it.

Units of a core, one each: its port to L2, its tensor cores, its exponential units. A unit does one thing
after the other. Groups issue products in turn, as the kernel does.
"""

from typing import NamedTuple

from opening import Figure

ROWS = 64  # queries a group
MACS, EXPONENTIALS, LANES = 4096 // 2, 16, 128  # what a core of an H100 does in a cycle, in bfloat16


class Span(NamedTuple):
    """What a group, or "load", does with a tile of keys, in cycles."""

    who: object
    what: str  # K, V: loads; S: scores; P: softmax; O: values
    tile: int
    start: float
    end: float


def counts(width, keys=128):
    """{what: cycles} of 64 queries on a tile of keys: the two products, the exponentials, and what cannot
    hide between these: the maximum before and the rescaling after.
    """
    product, pairs = ROWS * keys * width / MACS, ROWS * keys
    around = {"max": pairs / LANES, "fix": ROWS * width / LANES}
    return {"S": product, "O": product, "E": pairs / EXPONENTIALS, **around}


def play(width, *, groups, overlap, keys=128, stages=2, port=64, tiles=12, softmax=None):
    """(spans, cycles from tile to tile once it runs evenly).

    Args: overlap: a group issues the scores of the next tile and the values of this one together; else one
      after the other. port: bytes a cycle from L2. softmax: cycles of a group's, None as counted.
    """
    c, load = counts(width, keys), 2 * keys * width / port
    around = c["max"] + c["fix"] if softmax is None else softmax - c["E"]
    spans, end = [], {}  # end[who, what, tile]
    port_free = tensor_free = units_free = issued = 0.0
    ready = [0.0] * groups
    for n in range((tiles + 1 if overlap else 2 * tiles) * groups):
        g, k = n % groups, n // groups
        work = [("S", k), ("O", k - 1)] if overlap else [("SO"[k % 2], k // 2)]
        for what, tile in ((w, t) for w, t in work if 0 <= t < tiles):
            source = {"S": "K", "O": "V"}[what]
            if (key := ("load", source, tile)) not in end:  # the slot is free once all groups are done
                free = [end[h, what, tile - stages] for h in range(groups)] if tile >= stages else [0.0]
                start = max(port_free, *free)
                end[key] = port_free = start + load
                spans.append(Span(*key, start, port_free))
            start = max(ready[g], issued, tensor_free, end[key])
            end[g, what, tile] = tensor_free = start + c[what]
            issued = max(issued, start if what == work[0][0] else 0.0)
            spans.append(Span(g, what, tile, start, tensor_free))
        done = max(end.get((g, *w), 0.0) for w in work)
        if work[0][0] == "S" and work[0][1] < tiles:
            first = end[g, "S", work[0][1]]
            begin = max(first + around / 2, units_free)
            units_free = begin + c["E"]
            done = max(done, units_free + around / 2)
            spans.append(Span(g, "P", work[0][1], first, units_free + around / 2))
        ready[g] = done
    starts = [s.start for s in spans if s[:2] == (0, "S")]
    half = tiles // 2
    return spans, (starts[-2] - starts[-2 - half]) / half


SHADES = {"K": 0.0, "V": 0.16, "S": 0.0, "O": 0.16, "P": 0.5, "W": 0.0}


def noted(timeline):
    """Spans of what a block noted (tests/claims/flash_inside.py): S from its issue to its scores, P and W, a
    wait. The tiles are numbered from 1.
    """
    groups, spans = timeline["groups"], []
    for who in range(groups + 1):
        mine = [s for s in timeline["spans"] if s[0] == who]
        name, issued, tile = (who if who < groups else "load"), None, 0
        for _, what, start, end in mine:
            if what == "issue" and issued is None:
                issued = start
            elif what == "scores":
                tile += 1
                spans.append(Span(name, "S", tile, start if issued is None else issued, end))
                issued = None
            elif what in ("softmax", "wait"):
                spans.append(Span(name, {"softmax": "P", "wait": "W"}[what], tile, start, end))
    return spans


def busy(spans, begin, end):
    """The share of the cycles from `begin` to `end` in which the tensor cores multiply."""
    parts = [min(s.end, end) - max(s.start, begin) for s in spans if s.what in "SO"]
    return sum(max(p, 0.0) for p in parts) / (end - begin)


def drawn(title, caption, panels, *, width=400, left=80):
    """A Figure: a panel for each (heading, groups, spans, first cycle, last cycle), all at one scale."""
    scale = (width - left - 10) / max(end - begin for *_, begin, end in panels)
    fig, top = Figure(width, 0, title, caption, size=12), 0
    for heading, groups, spans, begin, end in panels:
        fig.text(0, top + 14, heading, font_size=13)
        y = _rows(fig, top + 24, left, groups, spans, begin, end, scale)
        fig.line(left, y + 18, left + (end - begin) * scale, y + 18, stroke_width=0.8)
        for tick in range(0, int(end - begin) + 1, 1024):
            fig.line(left + tick * scale, y + 18, left + tick * scale, y + 22, stroke_width=0.8)
            fig.text(left + tick * scale, y + 34, f"{tick:,}", "middle", font_size=11)
        top = y + 48
    fig.head = width, top - 8, *fig.head[2:]
    return fig


def _rows(fig, y, left, groups, spans, begin, end, scale):
    """The lanes of a panel from y down; where the last one begins."""

    def lane(y, kept, label=None, high=16, shade=None):
        if label:
            fig.text(left - 6, y + 12, label, "end")
        for s in filter(kept, spans):
            a, b = max(s.start, begin), min(s.end, end)
            if (wide := (b - a) * scale) > 0.4:
                at = left + (a - begin) * scale
                style = {"stroke": "none"} if shade else {"stroke_width": 0.8}
                if s.what == "W":
                    fig.line(at, y + high / 2, at + wide, y + high / 2, stroke_dasharray="1 3")
                    continue
                fig.box(at, y, wide, high, shade or SHADES[s.what], **style)
                name = f"{'V' if s.what == 'O' else s.what}{s.tile}"
                if s.what in "KVSO" and not shade and wide > 7.5 * len(name):
                    fig.text(at + wide / 2, y + 12, name, "middle", font_size=11)

    lane(y, lambda s: s.who == "load", "loads")
    for g in range(groups):
        y += 26 if g == 0 else 40
        lane(y, lambda s, g=g: s.who == g and s.what in "SOW", f"group {g + 1}")
        lane(y + 18, lambda s, g=g: s.who == g and s.what == "P")
    if any(s.what == "O" for s in spans):
        lane(y + 44, lambda s: s.what in "SO", "tensor cores", 12, 0.8)
        y += 24
    return y + 20


def window_tiles(before, after, first, keys=128):
    """(tiles, cut) of the keys that queries first .. first + 63 see, `before` and `after` their own: the
    tiles that a group visits, and those of them that it has to mask.
    """
    seen = range((first - before) // keys, -(-(first + ROWS + after) // keys))
    whole = [j for j in seen if first + ROWS - 1 - before <= j * keys and (j + 1) * keys - 1 <= first + after]
    return list(seen), [j for j in seen if j not in whole]


def window_share(before, after, keys=128):
    """What share of the keys that a group visits a query sees."""
    return (before + 1 + after) / (keys * len(window_tiles(before, after, 1 << 20, keys)[0]))


def window_drawn(before, after, title, caption, *, first=512, keys=128, width=400):
    """A Figure: the keys that two groups of 64 queries see, and the tiles that each of them visits."""
    left, rows = 62, 56
    every = [j for g in (0, 1) for j in window_tiles(before, after, first + ROWS * g, keys)[0]]
    low, high = min(every) * keys, (max(every) + 1) * keys
    x = lambda key: left + (key - low) / (high - low) * (width - left - 8)
    fig = Figure(width, 2 * (rows + 12) + 26, title, caption, size=12)
    for g in (0, 1):
        top, start = 4 + g * (rows + 12), first + ROWS * g
        tiles, cut = window_tiles(before, after, start, keys)
        fig.text(left - 6, top + rows / 2 + 4, f"group {g + 1}", "end")
        for j in tiles:
            fig.box(x(j * keys), top, x(keys) - x(0), rows, 0.16 if j in cut else 0, stroke_width=0.8)
        corners = [(start - before, top), (start + after, top), (start + after + ROWS - 1, top + rows),
                   (start - before + ROWS - 1, top + rows)]  # fmt: skip
        points = " ".join(f"{x(key):.1f},{y}" for key, y in corners)
        style = {"fill": "currentColor", "fill_opacity": 0.35, "stroke": "none"}
        fig._add("polygon", {"points": points, **style})
    bottom = 2 * (rows + 12) + 16
    for key in range(low, high + 1, 2 * keys):
        fig.text(x(key), bottom + 4, f"{key - first:+,}" if key != first else "0", "middle", font_size=11)
    return fig
