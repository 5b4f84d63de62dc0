"""Planning an arena: offsets for buffers with known lifetimes, so that what lives together never overlaps.

Source: the greedy planners of TensorFlow Lite Micro (by size) and TensorFlow Lite (by breadth: Pisarchyk and
Lee 2020, arXiv 2001.03288); the exact search is branch and bound over packings pushed down to their offsets.
"""

from dataclasses import dataclass, field
from html import escape

from ref.checks import at_least_one, one_of

STRATEGIES = ("greedy_by_size", "greedy_by_breadth", "best_fit", "exact")
MOST_EXACT = 12
MOST_STEPS = 20_000  # of the search over regions


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
        for them, since an access to them moves the largest share; within a region as `strategy` says. Where
        that does not fit, the largest choose first, each the region that it leaves least room in, or else the
        largest that has room; then, for up to 12 buffers, a search over assignments, which packs a region
        exactly if it must. Buffers then move to faster regions that have room, the smallest first.
    Raises: ValueError naming the argument; MemoryError for a buffer that no region has room for, or if no
      assignment was found; then no other fits either, unless the message says that the search was cut short.
    """
    buffers = tuple((i, int(size), int(first), int(last)) for i, size, first, last in buffers)
    _check(buffers, strategy, align)
    spans = _aligned(buffers, align)
    bound = _lower_bound(spans)
    if regions is not None:
        if strategy == "exact":
            raise ValueError("exact plans a single region")
        return _in_regions(buffers, (strategy,), align, list(regions), bound)
    offsets = _place(spans, strategy)
    return Plan(offsets, _top(spans, offsets), bound, buffers)


def best_plan(buffers, *, align=16, regions=None) -> Plan:
    """The smallest plan of all greedy strategies, and of the exact search where it is short enough.

    With regions, of all strategies that fit. Raises: as `plan_arena`, where none does.
    """
    buffers = tuple((i, int(size), int(first), int(last)) for i, size, first, last in buffers)
    if regions is not None:
        _check(buffers, STRATEGIES[0], align)
        bound = _lower_bound(_aligned(buffers, align))
        return _in_regions(buffers, STRATEGIES[:3], align, list(regions), bound)
    found = [plan_arena(buffers, strategy=s, align=align) for s in STRATEGIES[:3]]
    best = min(found, key=lambda p: p.total)
    if best.total > best.lower_bound and len(best.buffers) <= MOST_EXACT:
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


def _aligned(buffers, align):
    return [(i, -(-size // align) * align, first, last) for i, size, first, last in buffers]


def _top(spans, offsets):
    return max((offsets[i] + size for i, size, _, _ in spans), default=0)


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


def _exact(spans, limit=None, budget=None):
    """Every packing pushed down is reached by placing buffers in the order of their offsets.

    limit: any packing up to it will do, None if there is none. budget: [steps left], for all calls together.
    """
    first_guess = _place(spans, "greedy_by_size")
    best, enough = [_top(spans, first_guess), first_guess], _lower_bound(spans)
    if limit is not None:
        enough = limit
        if best[0] > limit:
            best = [limit + 1, None]
    budget = [float("inf")] if budget is None else budget
    spans = sorted(spans, key=lambda s: -s[1])

    def search(left, placed, offsets, floor, height):
        budget[0] -= 1
        if best[0] <= enough or height >= best[0] or budget[0] < 0:
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


def _in_regions(buffers, strategies, align, regions, bound):
    """The smallest plan of the first of three ways that fits: small first, large first, any."""
    limits = dict(regions)
    if len(limits) != len(regions) or not regions:
        raise ValueError("regions must be (name, bytes) with different names")
    spans = _aligned(buffers, align)
    most = max(limits.values())
    span = {s[0]: s for s in spans}
    hot = sorted(buffers, key=lambda b: (b[1], b[2] - b[3], str(b[0])))
    for i, size, *_ in hot:
        if span[i][1] > most:
            raise MemoryError(f"buffer {i!r} of {size:,} B fits in none of {', '.join(limits)}")
    hot = [span[b[0]] for b in hot]
    large = sorted(spans, key=lambda s: (-s[1], s[2] - s[3], str(s[0])))
    made = [found for s in strategies if (found := _first_fit(hot, limits, s))]
    if not made:
        made = [found for s in strategies if (found := _best_fit(large, limits, s))]
        roomy = dict(sorted(limits.items(), key=lambda r: -r[1]))
        made = made or [found for s in strategies if (found := _first_fit(large, roomy, s))]
        budget = [MOST_STEPS]
        if not made and len(spans) <= MOST_EXACT and bound <= sum(limits.values()):
            made = [found] if (found := _search(large, limits, strategies, budget)) else []
        if not made:
            words = "" if len(spans) <= MOST_EXACT and budget[0] >= 0 else " that was tried"
            raise MemoryError(f"no assignment of {len(spans)} buffers to {', '.join(limits)}{words} fits")
        made = [_faster(hot, limits, found, strategies[0]) for found in made]
    plans = []
    for found in made:
        offsets = {i: at for _, placed in found.values() for i, at in placed.items()}
        region = {i: name for name, (_, placed) in found.items() for i in placed}
        totals = {name: _top(*found[name]) for name in limits}
        plans.append(Plan(offsets, sum(totals.values()), bound, buffers, region, totals))
    return min(plans, key=lambda p: p.total)


def _with(found, name, span, limit, strategy):
    """(spans, offsets) of a region with one more, or None if they do not fit."""
    spans = [*found[name][0], span]
    offsets = _place(spans, strategy, limit)
    return (spans, offsets) if len(offsets) == len(spans) else None


def _first_fit(spans, limits, strategy):
    """{region: (spans, offsets)}: in the order given, each into the fastest region that has room."""
    found = {name: ([], {}) for name in limits}
    for b in spans:
        for name, limit in limits.items():
            if trial := _with(found, name, b, limit, strategy):
                found[name] = trial
                break
        else:
            return None
    return found


def _best_fit(spans, limits, strategy):
    """As `_first_fit`, each into the region that is left with the least room."""
    found = {name: ([], {}) for name in limits}
    for b in spans:
        trials = {name: _with(found, name, b, limit, strategy) for name, limit in limits.items()}
        room = {name: limits[name] - _top(*t) for name, t in trials.items() if t}
        if not room:
            return None
        name = min(room, key=room.get)  # the fastest of equals
        found[name] = trials[name]
    return found


def _search(spans, limits, strategies, budget):
    """Any assignment that fits, depth first; an assignment of equal spans is looked at once."""
    packed, dead = {}, set()

    def pack(name, spans):
        key = name, tuple(i for i, *_ in spans)
        if key not in packed:
            limit = limits[name]
            trials = [] if _lower_bound(spans) > limit else [_place(spans, s, limit) for s in strategies]
            fitting = [t for t in trials if len(t) == len(spans)]
            exact = [_exact(spans, limit, budget)] if trials and not fitting else []
            packed[key] = next((t for t in (*fitting, *exact) if t is not None), None)
        return packed[key]

    def search(n, found):
        budget[0] -= 1
        state = n, tuple(tuple(sorted(s[1:] for s in found[name][0])) for name in limits)
        if budget[0] < 0 or state in dead:
            return None
        if n == len(spans):
            return found
        for name in limits:
            trial = [*found[name][0], spans[n]]
            offsets = pack(name, trial)
            if offsets is not None and (done := search(n + 1, {**found, name: (trial, offsets)})):
                return done
        dead.add(state)
        return None

    return search(0, {name: ([], {}) for name in limits})


def _faster(spans, limits, found, strategy):
    """Each span in turn in the fastest region that still has room for it."""
    found, names = dict(found), list(limits)
    for b in spans:
        now = next(n for n, name in enumerate(names) if b[0] in found[name][1])
        for name in names[:now]:
            if trial := _with(found, name, b, limits[name], strategy):
                spans_left, offsets = found[names[now]]
                found[name] = trial
                found[names[now]] = (
                    [s for s in spans_left if s != b],
                    {i: at for i, at in offsets.items() if i != b[0]},
                )
                break
    return found
