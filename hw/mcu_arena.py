"""One arena for all activations of a program: which steps run row by row, what overwrites what, and where.

Four switches of the target, each of which only ever adds choices:
  integrate: neighbouring steps run together, a row (a token) at a time, so that what passes between them is
    one row long. As few steps as reach the least peak do: rows cost more instructions than blocks.
  decompose_patch: an image that is cut into patches is read from the camera one row of patches at a time.
  overwrite: a result takes the place of an operand of its size that nothing reads afterwards.
  reorder: the order of ops with the lower peak, if it is lower.
The placement is `ref.blocks.arena`'s; the steps and buffers are `hw.mcu_flow`'s.
"""

from dataclasses import dataclass, field, replace

from hw.liveness import reorder_for_memory
from hw.mcu_flow import Flow, by_rows, leading
from hw.mcu_units import ELEMENTWISE, Units
from hw.program import Program
from ref.blocks.arena import Plan, best_plan, plan_arena

SWITCHES = ("integrate", "decompose_patch", "overwrite", "reorder")
LONGEST = 16  # steps that may run together
MOST_OPS = 160  # of a program whose order is tried to be bettered
_IN_PLACE = ELEMENTWISE | {"lut", "softmax", "layer_norm", "dynamic_update_slice"}


@dataclass(frozen=True)
class Segment:
    """Steps first..last run together in `rows` pieces. inner: {tensor: its place in the scratch}; taken:
    {result: operand whose place it takes}; streamed: the input that arrives piece by piece; scratch: bytes.
    """

    first: int
    last: int
    rows: int = 1
    inner: dict = field(default_factory=dict)
    taken: dict = field(default_factory=dict)
    streamed: int | None = None
    scratch: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything lies. buffer: tensor of a buffer to its id in `arena`; names for people.

    total: bytes of the arena; bound: the most bytes alive at once under this order and these segments.
    """

    program: Program
    flow: Flow
    segments: tuple[Segment, ...]
    arena: Plan
    owner: dict
    reordered: bool = False

    @property
    def total(self) -> int:
        """Bytes of the arena."""
        return self.arena.total

    @property
    def bound(self) -> int:
        """The most bytes alive at one time; no placement can take less."""
        return self.arena.lower_bound

    def where(self, tensor):
        """(region, offset) of the buffer that holds a tensor; region "" if there is one only."""
        i = self.owner[self.flow.buffer(tensor)]
        return self.arena.region.get(i, ""), self.arena.offsets[i]

    @property
    def names(self) -> dict:
        """{id of a buffer: what it holds}."""
        t = self.flow.tensors
        return self._named(lambda b: t[b].name or f"{_maker(self, b)} {list(t[b].shape)}")

    def _named(self, label):
        out = {}
        for b, i in self.owner.items():
            out.setdefault(i, []).append(label(b))
        named = {i: ", then ".join(dict.fromkeys(v)) for i, v in out.items()}
        return named | {b[0]: "scratch" for b in self.arena.buffers if str(b[0]).startswith("scratch")}

    def live(self, time=None):
        """(peak op, [(name, shape, bytes)] largest first) of a time, by default the fullest."""
        bytes_at = lambda s: sum(n for _, n, a, b in self.arena.buffers if a <= s <= b)
        if time is None:
            time = max(range(len(self.segments) + 1), key=bytes_at)
        t = self.flow.tensors
        names = self._named(lambda b: t[b].name or _maker(self, b))
        shape = {i: t[i].shape for i in self.owner.values()}
        found = [(names[i], shape.get(i, ()), n) for i, n, a, b in self.arena.buffers if a <= time <= b]
        if time < len(self.segments):
            step = self.flow.steps[self.segments[time].last]
            label = step.op.label if step.unit is None else f"{step.op.scope or 'top level'}/{step.unit.kind}"
        else:
            label = "the results"
        return label, sorted(found, key=lambda x: -x[2])

    def plot(self, **options) -> str:
        """An SVG of the arena over time."""
        return self.arena.plot(names=self.names, **options)


def _maker(plan, b):
    op = next((s for s in plan.flow.steps if b in s.writes), None)
    return "value" if op is None else (op.unit.kind if op.unit else op.op.prim)


def plan_memory(program: Program, target, units: Units | None = None) -> MemoryPlan:
    """The smallest plan that the switches of the target allow: never worse than greedy by size without them.

    Raises: MemoryError if the regions have room for none of the plans.
    """
    given = {s: getattr(target, s) for s in SWITCHES}
    width = target.activation_bits // 8
    units = units or Units(program, _rejected(target), target.name, act_bytes=width)
    regions = None
    if len(target.regions) > 1:
        regions = [(r.name, room) for r, room in zip(target.regions, target.rooms, strict=True)]
    made, failed = [], []

    def attempt(program, units, switches):
        """The plan of these choices, or None where the memories have no room for it."""
        try:
            return _plan(program, units, target, switches, regions)
        except MemoryError as e:
            failed.append(e)

    made.append(attempt(program, units, given))
    if made[0] is None or made[0].total > made[0].bound:  # fewer choices may still be placed in less
        made.append(attempt(program, units, {**given, "integrate": False}))
        made.append(attempt(program, units, dict.fromkeys(SWITCHES, False)))
    best = min((p for p in made if p is not None), key=lambda p: p.total, default=None)
    if given["reorder"] and 2 < len(program.body.ops) <= MOST_OPS:
        order = reorder_for_memory(program)
        by_id = {op.id: op for op in program.body.ops}
        if list(order) != list(by_id):
            again = replace(program, body=replace(program.body, ops=tuple(by_id[i] for i in order)))
            other = attempt(again, Units(again, units.rejected, target.name, act_bytes=width), given)
            if other is not None and (best is None or other.total < best.total):
                best = replace(other, reordered=True)
    if best is None:
        raise failed[0]
    return best


def _rejected(target):
    return target.plan.rejected if target.plan is not None else frozenset()


def _plan(program, units, target, given, regions):
    flow = Flow(units)
    chooser = _Chooser(flow, target, given)
    segments = chooser.segments()
    time = {s: n for n, g in enumerate(segments) for s in range(g.first, g.last + 1)}
    time |= {-1: 0, len(flow.steps): len(segments)}
    owner, gone = {}, {g.streamed for g in segments} | {i for g in segments for i in g.inner}
    taken = {r: o for g in segments for r, o in g.taken.items()}
    spans = {}
    for b in flow.first:
        if b in gone:
            continue
        root = b
        while root in taken:
            root = flow.buffer(taken[root])
        owner[b] = root
        first, last = time[flow.first[b]], time[flow.last[b]]
        size, f, n = spans.get(root, (0, first, last))
        spans[root] = max(size, flow.size(b)), min(f, first), max(n, last)
    buffers = [(i, *span) for i, span in spans.items()]
    buffers += [(f"scratch {n}", g.scratch, n, n) for n, g in enumerate(segments) if g.scratch]
    if target.strategy == "greedy_by_size":
        found = best_plan(buffers, align=target.align, regions=regions)
    else:
        found = plan_arena(buffers, strategy=target.strategy, align=target.align, regions=regions)
    return MemoryPlan(program, flow, tuple(segments), found, owner)


class _Chooser:
    """Which steps run together: the least peak first, then the fewest steps that run by rows."""

    def __init__(self, flow, target, given):
        self.flow, self.target, self.given = flow, target, given
        self.n = len(flow.steps)
        align = target.align
        self.aligned = lambda n: -(-n // align) * align
        self.size = {b: self.aligned(flow.size(b)) for b in flow.first}
        self.readers = {}
        for n, s in enumerate(flow.steps):
            for i in s.reads:
                self.readers.setdefault(flow.buffer(i), []).append(n)
        self.forced = self._streams() if given["decompose_patch"] else {}
        gone = {g.streamed for g in self.forced.values()}
        self.born = [0] * (self.n + 1)
        self.at = [[] for _ in range(self.n + 1)]
        change = [0] * (self.n + 2)
        for b, first in flow.first.items():
            if b in gone:
                continue
            begin = max(first, 0)
            change[begin] += self.size[b]
            change[min(flow.last[b], self.n) + 1] -= self.size[b]
            self.born[begin] += self.size[b]
            if first >= 0:
                self.at[first].append(b)
        self.base, now = [], 0
        for n in range(self.n + 1):
            now += change[n]
            self.base.append(now)

    def segments(self):
        """The partition of all steps."""
        runs, start = [], 0
        for n in range(1, self.n + 1):
            steps = self.flow.steps
            if (
                n == self.n
                or steps[n].run != steps[start].run
                or steps[n].unit is None
                or steps[start].unit is None
            ):
                runs.append((start, n - 1))
                start = n
        tables, floor = [], self.base[self.n] if self.n < len(self.base) else 0
        for a, b in runs:
            table = self._table(a, b)
            tables.append(table)
            floor = max(floor, _least(table, a, b))
        out = []
        for (a, b), table in zip(runs, tables, strict=True):
            out += _fewest(table, a, b, floor)
        return out

    def _table(self, a, b):
        """{last step: [(bytes alive, Segment)]} of every choice inside a run."""
        found = {}
        add = lambda g: found.setdefault(g.last, []).append((self._cost(g), g))
        covered = {n for g in self.forced.values() for n in range(g.first, g.last + 1)}
        for first in range(a, b + 1):
            if first in self.forced:
                add(self.forced[first])
                continue
            if first in covered:
                continue
            add(self._single(first))
            if self.given["integrate"] and self.flow.steps[first].unit is not None:
                for g in self._longer(first, b, covered):
                    add(g)
        return found

    def _cost(self, g):
        """Bytes alive while a segment runs."""
        alive = self.base[g.first] + sum(self.born[g.first + 1 : g.last + 1])
        saved = sum(self.size[i] for i in g.inner if i in self.size and i != g.streamed)
        saved += sum(self.size[self.flow.buffer(r)] for r in g.taken)
        return alive - saved + self.aligned(g.scratch)

    def _single(self, n):
        step = self.flow.steps[n]
        if step.unit is None:
            return Segment(n, n, scratch=self.flow.copies.get(n, 0))
        plain = Segment(n, n, scratch=self._scratch(step.unit, 1))
        if not self.given["overwrite"] and not (self.given["integrate"] and step.unit.kind in _IN_PLACE):
            return plain
        choices = [plain]
        kind = step.unit.kind
        if kind in _IN_PLACE:
            taken = self._takes(n, n, {n: dict.fromkeys(step.reads, "row")}, ())
            if kind == "dynamic_update_slice":
                taken = {r: o for r, o in taken.items() if o == step.op.inputs[0]}
            choices.append(replace(plain, taken=taken))
        elif self.given["overwrite"] and step.writes:
            for rows in leading(self.flow.tensors[step.writes[0]].shape):
                kinds = by_rows(self.flow.units, step.unit, rows)
                if kinds is None:
                    continue
                made = self._segment(n, n, rows, {n: kinds})
                if made is not None and made.taken:
                    choices.append(made)
                    break
        return min(choices, key=self._cost)

    def _longer(self, first, end, covered):
        """Segments from `first` on that run by rows, for the most rows that all their steps allow."""
        steps, kinds, found = self.flow.steps, {}, []
        writes = steps[first].writes
        rows = leading(self.flow.tensors[writes[0]].shape) if len(writes) == 1 else []
        if not rows:
            return found
        for last in range(first, min(first + LONGEST, end + 1)):
            if last in covered or last in self.forced or steps[last].unit is None:
                break
            rows = [r for r in rows if self._also(kinds, last, r)]
            if not rows:
                break
            if last > first:
                made = self._segment(
                    first, last, rows[0], {n: kinds[n, rows[0]] for n in range(first, last + 1)}
                )
                if made is not None:
                    found.append(made)
        return found

    def _also(self, kinds, n, rows):
        found = by_rows(self.flow.units, self.flow.steps[n].unit, rows)
        kinds[n, rows] = found
        return found is not None

    def _segment(self, first, last, rows, kinds, streamed=None):
        """The segment of these steps, or None where a step would need all of what another makes."""
        flow = self.flow
        made = {flow.buffer(o): n for n in range(first, last + 1) for o in flow.steps[n].writes}
        for n in range(first, last + 1):
            for i, kind in kinds[n].items():
                b = flow.buffer(i)
                if kind == "full" and (b in made or b == streamed):
                    return None
                if kind == "row" and flow.size(b) != flow.size(i):
                    return None
        if any(flow.size(b) % rows for b in made):
            return None
        inner = [b for b, n in made.items() if flow.last[b] <= last and len(self.readers.get(b, ())) > 0]
        taken = self._takes(first, last, kinds, inner)
        uses = {b: [made[b], *(m for m in self.readers.get(b, ()) if m <= last)] for b in inner}
        spans = [(b, flow.size(b) // rows, min(u), max(u)) for b, u in uses.items()]
        for r in taken:  # a product writes its row aside before it takes the operand's place
            n = made[flow.buffer(r)]
            step = flow.steps[n]
            if step.unit.kind not in _IN_PLACE and flow.buffer(taken[r]) in map(flow.buffer, step.reads):
                spans.append((("row", r), flow.size(r) // rows, n, n))
        if streamed is not None:
            ends = max(m for m in self.readers[streamed])
            spans.append((streamed, flow.size(streamed) // rows, first, ends))
        rowed = plan_arena(spans, align=4)
        extra = max(self._scratch(flow.steps[n].unit, rows) for n in range(first, last + 1))
        inner = {b: rowed.offsets[b] for b, *_ in spans}
        return Segment(first, last, rows, inner, taken, streamed, rowed.total + extra)

    def _takes(self, first, last, kinds, inner):
        """{result: operand whose bytes it takes over}: of its size, read by rows, dead, and read in time."""
        flow, taken, used = self.flow, {}, set()
        if not (self.given["overwrite"] or (self.given["integrate"] and first == last)):
            return taken
        for n in range(first, last + 1):
            for o in flow.steps[n].writes:
                if o in inner or flow.buffer(o) != o:
                    continue
                for i in dict.fromkeys(i for m in range(first, last + 1) for i in flow.steps[m].reads):
                    b = flow.buffer(i)
                    if b in used or flow.size(b) != flow.size(o) or flow.size(i) != flow.size(b):
                        continue
                    if flow.first[b] >= first or flow.last[b] > last or b in inner:
                        continue
                    reading = [
                        (m, j)
                        for m in range(first, last + 1)
                        for j in flow.steps[m].reads
                        if flow.buffer(j) == b
                    ]
                    whole = any(kinds[m].get(j) != "row" for m, j in reading)
                    if not whole and max(reading)[0] <= n:
                        taken[o] = i
                        used.add(b)
                        break
        return taken

    def _scratch(self, unit, rows):
        """Bytes beside operands and results: patches of a convolution, sums of weights of CMSIS-NN. The
        project's own kernels need none.
        """
        op = unit.op
        if self.target.profile == "emitted":
            return 0
        if op.kind == "conv" and hasattr(op.dims, "kernel"):
            taps = op.dims.in_channels // op.dims.groups
            for k in op.dims.kernel:
                taps *= k
            return 4 * taps
        if (
            unit.kind == "product"
            and self.target.activation_bits == 8
            and op.inputs[1] in self.flow.units.static
        ):
            return 4 * op.dims.n
        return 0

    def _streams(self):
        """{first step: Segment} of inputs that are only cut into patches."""
        flow, found = self.flow, {}
        for b in flow.units.program.body.inputs:
            readers = self.readers.get(b, ()) if b in flow.first else ()
            if len(readers) != 1 or flow.last[b] > readers[0]:
                continue
            n = readers[0]
            step = flow.steps[n]
            if step.unit.op.prim not in ("conv_general_dilated", "transpose") or step.unit.kind in ("lut",):
                continue
            made = None
            for rows in leading(flow.tensors[step.writes[0]].shape):
                kinds, best = {}, None
                for last in range(n, min(n + LONGEST, self.n)):
                    other = flow.steps[last]
                    if other.unit is None or other.run != step.run or not self._also(kinds, last, rows):
                        break
                    g = self._segment(n, last, rows, {m: kinds[m, rows] for m in range(n, last + 1)}, b)
                    product = other.unit.kind in ("product", "conv_general_dilated")
                    if g is not None and product:
                        best = g
                        break
                if best is not None:
                    made = best
                    break
            if made is not None and not any(
                a <= made.last and made.first <= g.last for a, g in found.items()
            ):
                found[n] = made
        return found


def _least(table, a, b):
    """The least maximum over partitions of a..b; table: {last: [(bytes, Segment)]}."""
    best = {a - 1: 0}
    for last in range(a, b + 1):
        options = [max(best[g.first - 1], cost) for cost, g in table.get(last, ()) if g.first - 1 in best]
        if options:
            best[last] = min(options)
    return best[b]


def _fewest(table, a, b, limit):
    """Segments of the partition within `limit` that runs the fewest steps together."""
    best = {a - 1: (0, 0, None)}
    for last in range(a, b + 1):
        options = [
            (best[g.first - 1][0] + (last - g.first) + (g.rows > 1), best[g.first - 1][1] + cost, g)
            for cost, g in table.get(last, ())
            if cost <= limit and g.first - 1 in best
        ]
        if options:
            best[last] = min(options, key=lambda o: o[:2])
    out, last = [], b
    while last >= a:
        g = best[last][2]
        out.append(g)
        last = g.first - 1
    return out[::-1]
