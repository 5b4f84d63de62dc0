"""Planning an arena: offsets for buffers with known lifetimes, so that what lives together never overlaps.

Source: the greedy planners of TensorFlow Lite Micro (by size) and TensorFlow Lite (by breadth: Pisarchyk and
Lee 2020, arXiv 2001.03288); the exact search is branch and bound over packings pushed down to their offsets.
"""

from dataclasses import dataclass, field
from html import escape

from ref.checks import at_least_one, one_of

STRATEGIES = ("greedy_by_size", "greedy_by_breadth", "best_fit", "exact")
MOST_EXACT = 12


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes by buffer id, the bytes that the arena needs, and no plan's total can be below
    lower_bound (the most bytes alive at one time).

    region: with several regions, the one of each buffer; totals: bytes needed of each region.
    """

    offsets: dict
    total: int
    lower_bound: int
    buffers: tuple = ()
    region: dict = field(default_factory=dict)
    totals: dict = field(default_factory=dict)

    def plot(self, *, names=None, width=760, height=300) -> str:
        """An SVG of the arena: time to the right, bytes upward, a rectangle a buffer. names: {id: label}."""
        end = max((last for _, _, _, last in self.buffers), default=0) + 1
        regions = list(self.totals) or [""]
        panel = (height - 30) / len(regions)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'width="{width}" '
            'font-family="sans-serif" font-size="11" fill="currentColor" '
            f'aria-label="Arena of {self.total:,} bytes over {end} steps: one rectangle a buffer">'
        ]
        for r, name in enumerate(regions):
            total = self.totals.get(name, self.total) or 1
            base = 14 + panel * (r + 1)
            parts.append(f'<text x="2" y="{base - panel + 10:.0f}">{escape(name)} {total:,} B</text>')
            x, y = (width - 20) / end, (panel - 18) / total
            for n, (i, size, first, last) in enumerate(self.buffers):
                if self.region.get(i, "") != name or not size:
                    continue
                label = (names or {}).get(i, str(i))
                left, top = 10 + x * first, base - y * (self.offsets[i] + size)
                w, h = x * (last - first + 1), y * size
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{h:.1f}" '
                    f'fill="{_COLOURS[n % len(_COLOURS)]}" fill-opacity="0.55" stroke="currentColor" '
                    f'stroke-width="0.6"><title>{escape(label)}: {size:,} B at {self.offsets[i]:,}, '
                    f"steps {first} to {last}</title></rect>"
                )
                fitting = label[: int((w - 4) / 6)]  # about 6 units a letter
                if h >= 12 and len(fitting) >= min(len(label), 5):
                    parts.append(
                        f'<text x="{left + 3:.1f}" y="{top + h / 2 + 4:.1f}">{escape(fitting)}</text>'
                    )
        parts.append(f'<text x="10" y="{height - 4}">step of the program, 0 to {end - 1}</text></svg>')
        return "".join(parts)


_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


def plan_arena(buffers, *, strategy="greedy_by_size", align=16, regions=None) -> Plan:
    """Offsets, multiples of `align`, at which buffers alive at the same time do not overlap.

    Args: buffers: (id, bytes, first, last): alive from step first to step last, both included.
      strategy: "greedy_by_size" places large buffers first (then long-lived ones), each as low as it can;
        "greedy_by_breadth" goes by the steps with most bytes alive; "best_fit" takes the tightest gap;
        "exact" finds the smallest arena of up to 12 buffers.
      regions: (name, bytes) in order of speed: the smallest buffers take the fastest region that has room
        for them, since an access to them moves the largest share; within a region as `strategy` says.
    Raises: ValueError naming the argument; MemoryError for a buffer that no region has room for.
    """
    buffers = tuple((i, int(size), int(first), int(last)) for i, size, first, last in buffers)
    _check(buffers, strategy, align)
    sizes = {i: -(-size // align) * align for i, size, _, _ in buffers}
    bound = _lower_bound([(i, sizes[i], first, last) for i, _, first, last in buffers])
    if regions is not None:
        return _in_regions(buffers, strategy, align, list(regions), bound)
    spans = [(i, sizes[i], first, last) for i, _, first, last in buffers]
    offsets = _place(spans, strategy)
    total = max((offsets[i] + sizes[i] for i in offsets), default=0)
    return Plan(offsets, total, bound, buffers)


def best_plan(buffers, *, align=16, regions=None) -> Plan:
    """The smallest plan of all greedy strategies, and of the exact search where it is short enough."""
    found = [plan_arena(buffers, strategy=s, align=align, regions=regions) for s in STRATEGIES[:3]]
    best = min(found, key=lambda p: p.total)
    if best.total > best.lower_bound and len(best.buffers) <= MOST_EXACT and regions is None:
        return plan_arena(buffers, strategy="exact", align=align)
    return best


def overlaps(plan: Plan) -> list:
    """Pairs of ids that share a byte and a step: empty for a sound plan. Independent of the planner."""
    wrong = []
    for n, (i, size, first, last) in enumerate(plan.buffers):
        for j, other, begin, end in plan.buffers[n + 1 :]:
            same = plan.region.get(i) == plan.region.get(j)
            together = first <= end and begin <= last
            a, b = plan.offsets[i], plan.offsets[j]
            if same and together and a < b + other and b < a + size:
                wrong.append((i, j))
    return wrong


def _check(buffers, strategy, align):
    one_of("strategy", strategy, STRATEGIES)
    at_least_one(align=align)
    if len({b[0] for b in buffers}) != len(buffers):
        raise ValueError("buffers must have different ids")
    for i, size, first, last in buffers:
        if size < 0 or first > last:
            raise ValueError(
                f"buffer {i!r} must have bytes >= 0 and first <= last, got {size}, {first}, {last}"
            )
    if strategy == "exact" and len(buffers) > MOST_EXACT:
        raise ValueError(f"exact takes up to {MOST_EXACT} buffers, got {len(buffers)}")


def _lower_bound(spans):
    """The most bytes alive at one step; only steps at which a buffer is born can be it."""
    change = {}
    for _, size, first, last in spans:
        change[first] = change.get(first, 0) + size
        change[last + 1] = change.get(last + 1, 0) - size
    now = most = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most


def _place(spans, strategy, limit=None):
    """{id: offset}; with a limit, buffers that would end above it are left out."""
    if strategy == "exact":
        return _exact(spans)
    placed, offsets = [], {}
    for i, size, first, last in _order(spans, strategy):
        gaps = _gaps(placed, first, last)
        fitting = [(room, at) for at, room in gaps if room >= size]
        at = min(fitting)[1] if strategy == "best_fit" else fitting[0][1]
        if limit is not None and at + size > limit:
            continue
        offsets[i] = at
        placed.append((at, size, first, last))
    return offsets


def _order(spans, strategy):
    by_size = sorted(spans, key=lambda s: (-s[1], s[2] - s[3], str(s[0])))
    if strategy != "greedy_by_breadth":
        return by_size
    steps = sorted({s[2] for s in spans})
    alive = {t: [s for s in by_size if s[2] <= t <= s[3]] for t in steps}
    order = {}
    for t in sorted(steps, key=lambda t: (-sum(s[1] for s in alive[t]), t)):
        order.update(dict.fromkeys(alive[t]))
    return list(order)


def _gaps(placed, first, last):
    """(offset, room) of free ranges beside the buffers alive in first..last; the last one has no end."""
    gaps, at = [], 0
    for start, size, begin, end in sorted(placed):
        if first <= end and begin <= last and size:
            if start > at:
                gaps.append((at, start - at))
            at = max(at, start + size)
    return [*gaps, (at, float("inf"))]


def _exact(spans):
    """Every packing pushed down is reached by placing buffers in the order of their offsets."""
    first_guess = _place(spans, "greedy_by_size")
    top = lambda offsets: max((offsets[i] + size for i, size, _, _ in spans), default=0)
    best, bound = [top(first_guess), first_guess], _lower_bound(spans)
    spans = sorted(spans, key=lambda s: -s[1])

    def search(left, placed, offsets, floor, height):
        if best[0] == bound or height >= best[0]:
            return
        if not left:
            best[:] = [height, dict(offsets)]
            return
        tried = set()
        for n, (i, size, first, last) in enumerate(left):
            if (size, first, last) in tried:  # equal buffers are interchangeable
                continue
            tried.add((size, first, last))
            at = next(a for a, room in _gaps(placed, first, last) if room >= size)
            if at < floor:
                continue
            offsets[i] = at
            search(left[:n] + left[n + 1 :], [*placed, (at, size, first, last)], offsets, at,
                   max(height, at + size))  # fmt: skip
            del offsets[i]

    search(spans, [], {}, 0, 0)
    return best[1]


def _in_regions(buffers, strategy, align, regions, bound):
    """Smallest buffers first into the fastest region that still has room for them all."""
    if strategy == "exact":
        raise ValueError("exact plans a single region")
    aligned = lambda size: -(-size // align) * align
    chosen = {name: [] for name, _ in regions}
    if len(chosen) != len(regions) or not regions:
        raise ValueError("regions must be (name, bytes) with different names")
    offsets, region = {}, {}
    for b in sorted(buffers, key=lambda b: (b[1], b[2] - b[3], str(b[0]))):
        for name, limit in regions:
            trial = [(i, aligned(s), first, last) for i, s, first, last in [*chosen[name], b]]
            found = _place(trial, strategy, limit)
            if len(found) == len(trial):
                chosen[name].append(b)
                region[b[0]] = name
                offsets.update(found)
                break
        else:
            raise MemoryError(f"buffer {b[0]!r} of {b[1]:,} B fits in none of {', '.join(chosen)}")
    totals = {
        name: max((offsets[i] + aligned(s) for i, s, _, _ in chosen[name]), default=0) for name, _ in regions
    }
    return Plan(offsets, sum(totals.values()), bound, buffers, region, totals)
