"""The steps of a program on one core and the buffers between them: what a memory plan starts from.

A step is a unit of `hw.mcu_units` that runs, or the entry or exit of a loop or a branch. A buffer holds one
tensor, or several that are the same bytes: a view and what it looks at, a loop's carried value in every trip.
Weights, constants and what is folded from them lie in flash and have no buffer.
"""

from dataclasses import dataclass, field
from math import prod

from hw.mcu_units import ELEMENTWISE, Unit, Units
from hw.program import Block, Op, is_float, itemsize


@dataclass(frozen=True)
class Step:
    """unit None: a loop or branch is entered ("enter") or left ("leave"); run: which row of leaf steps."""

    op: Op
    unit: Unit | None = None
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    mark: str = ""
    run: int = -1


@dataclass
class Flow:
    """Steps in order; `alias` of tensors whose bytes are another's; first and last step of every buffer."""

    units: Units
    steps: list = field(default_factory=list)
    alias: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    at: dict = field(default_factory=dict)  # (op id, "enter" or number of the body): step
    copies: dict = field(default_factory=dict)  # step: bytes that a swap of carried values needs

    def __post_init__(self):
        self.tensors, self.runs = self.units.tensors, 0
        body = self.units.program.body
        for i in body.inputs:
            if self.held(i):
                self.first[i] = self.last[i] = -1
        self._block(body)
        for o in body.outputs:
            if self.held(o):
                self.last[self.buffer(o)] = len(self.steps)
        for b in self.first:
            if self.last[b] < self.first[b]:
                self.last[b] = self.first[b]

    def held(self, i) -> bool:
        """Does a tensor lie in the arena."""
        return i not in self.units.static

    def buffer(self, i) -> int:
        """The tensor whose bytes hold tensor i."""
        while i in self.alias:
            i = self.alias[i]
        return i

    def size(self, i) -> int:
        """Bytes of a tensor in the arena: one or two a float, everything else as it is."""
        t = self.tensors[i]
        if is_float(t.dtype):
            return t.size * self.units.act_bytes
        return int(-(-t.size * itemsize(t.dtype) // 1))

    def _use(self, i, step):
        if self.held(i):
            b = self.buffer(i)
            self.first.setdefault(b, step)
            self.last[b] = max(self.last.get(b, step), step)

    def _step(self, **given):
        self.steps.append(Step(**given))
        return len(self.steps) - 1

    def _block(self, block: Block):
        self.runs += 1
        run = self.runs
        for op in block.ops:
            if op.blocks:
                self._structured(op)
                self.runs += 1
                run = self.runs
                continue
            unit = self.units.unit(op)
            if unit.kind == "free":
                continue
            if unit.kind == "view":
                source = unit.source if unit.source >= 0 else op.inputs[0]
                if op.outputs and self.held(op.outputs[0]):
                    self.alias[op.outputs[0]] = source
                continue
            reads = tuple(dict.fromkeys(i for i in self.units.reads(unit) if self.held(i)))
            writes = tuple(o for o in self.units.writes(unit) if self.held(o))
            n = self._step(op=op, unit=unit, reads=reads, writes=writes, run=run)
            for i in (*reads, *writes):
                self._use(i, n)

    def _structured(self, op):
        d, t0 = op.dims, self._step(op=op, mark="enter")
        self.at[op.id, "enter"] = t0
        outer = [i for i in op.inputs if self.held(i)]
        for o in op.outputs:
            self._use(o, t0)
        for i in outer:
            self._use(i, t0)
        if op.kind == "loop":
            rest = op.inputs[d.cond_consts :]
            pairs = list(zip(rest[: d.consts], d.body.inputs, strict=False))
            carried = list(zip(op.outputs, d.body.inputs[d.consts :], strict=False))[: d.carries]
            stacked = list(
                zip(rest[d.consts + d.carries :], d.body.inputs[d.consts + d.carries :], strict=True)
            )
            if d.cond is not None:
                pairs += list(zip(op.inputs[: d.cond_consts], d.cond.inputs, strict=False))
                carried += list(zip(op.outputs, d.cond.inputs[d.cond_consts :], strict=True))
            for a, b in (*pairs, *carried, *stacked):
                if self.held(b):
                    self.alias[b] = a
            ends = list(zip(d.body.outputs, op.outputs, strict=True))
        else:
            for b in op.blocks:
                self.alias.update(
                    (y, x) for x, y in zip(op.inputs[1:], b.inputs, strict=True) if self.held(y)
                )
            ends = []
        for n, b in enumerate(op.blocks):
            self._block(b)
            t1 = self._step(op=op, mark="leave")
            self.at[op.id, n] = t1
            if op.kind == "branch":
                ends = zip(b.outputs, op.outputs, strict=True)
            for x in b.outputs if op.kind != "branch" else ():
                self._use(x, t1)
            own = {o for o in op.outputs}
            for x, o in ends if op.kind == "branch" or b is d.body else ():
                self._use(x, t1)
                self._use(o, t1)
                if self.held(x) and self.buffer(x) in own and self.buffer(x) != self.buffer(o):
                    self.copies[t1] = self.copies.get(t1, 0) + self.size(x)
        for i in (*outer, *op.outputs):
            self._use(i, t1)


def piece(shape, rows):
    """The shape of one of `rows` equal pieces along the leading axes, or None."""
    out, left = [], rows
    for n in shape:
        if left == 1:
            out.append(n)
        elif n and left % n == 0:
            out.append(1)
            left //= n
        elif n and n % left == 0:
            out.append(n // left)
            left = 1
        else:
            return None
    return tuple(out) if left == 1 else None


def leading(shape):
    """Numbers of rows that a tensor divides into along its leading axes, most first."""
    found = {prod(shape[: n + 1]) for n in range(len(shape))}
    return sorted((r for r in found if r > 1), reverse=True)


def by_rows(units: Units, unit: Unit, rows: int):
    """{operand in the arena: "row" | "full"} if piece i of the result needs only piece i of the "row"
    operands, `rows` pieces each; None if it needs more.
    """
    t, op = units.tensors, unit.op
    outs = units.writes(unit)
    if len(outs) != 1 or piece(t[outs[0]].shape, rows) is None:
        return None
    out = t[outs[0]]
    if unit.kind == "lut":
        return {unit.source: "row"}
    if unit.kind in ("softmax", "layer_norm"):
        whole = out.size // max(out.shape[-1], 1)
        return (
            {unit.source: "row"}
            if whole % rows == 0 and _keeps(out.shape, rows, len(out.shape) - 1)
            else None
        )
    if unit.kind == "product":
        return _ordered_rows(units, unit, out, rows) if unit.perm else _product_rows(units, op, out, rows)
    if op.prim == "conv_general_dilated":
        return _patch_rows(units, op, out, rows)
    first = t[op.inputs[0]] if op.inputs else None
    if op.prim == "transpose":
        perm = op.attrs["permutation"]
        fixed = next((n for n, p in enumerate(perm) if n != p), len(perm))
        return {op.inputs[0]: "row"} if _keeps(out.shape, rows, fixed) else None
    if op.prim == "slice":
        whole = next((d for d, n in enumerate(first.shape) if n != out.shape[d]), len(first.shape))
        return {op.inputs[0]: "row"} if _keeps(out.shape, rows, whole) else None
    if op.prim in ("reduce_sum", "reduce_max", "reduce_min"):
        least = min(op.attrs["axes"], default=0)
        ok = _keeps(first.shape, rows, least) and piece(first.shape, rows) is not None
        return {op.inputs[0]: "row"} if ok else None
    if op.prim in ELEMENTWISE:
        found = {}
        for i in op.inputs:
            if i not in units.static:
                if t[i].size == 1 and out.size > 1:
                    found[i] = "full"
                elif t[i].shape == out.shape:
                    found[i] = "row"
                else:
                    return None
            elif t[i].size not in (1, out.size):
                return None
        return found
    return None


def piece_shapes(units: Units, unit: Unit, rows: int) -> dict:
    """{operand or result: its shape in one of `rows` pieces}, of a product's whole right operand that of the
    matrix of the batch that a piece is in.
    """
    t = units.tensors
    ids = dict.fromkeys((*units.reads(unit), *units.writes(unit)))
    if rows == 1:
        return {i: t[i].shape for i in ids}
    kinds, found = by_rows(units, unit, rows), {}
    for i in ids:
        if i in units.static:
            found[i] = t[i].shape
            if unit.perm:
                cut = matrix_of_row(units, unit, rows)
                found[i] = tuple(1 if d in cut else n for d, n in enumerate(t[i].shape))
        elif kinds.get(i, "row") == "row":
            found[i] = piece(t[i].shape, rows)
        else:
            found[i] = t[i].shape
            if unit.kind == "product" and i == unit.op.inputs[1]:
                batch = len(unit.op.attrs["dimension_numbers"][1][0])
                found[i] = (*[1] * batch, *t[i].shape[batch:])
    return found


def _keeps(shape, rows, axes):
    """Do `rows` pieces cut only the first `axes` axes."""
    return (
        rows <= prod(shape[:axes])
        and prod(shape[:axes]) % rows == 0
        and piece(shape[:axes], rows) is not None
    )


def _product_rows(units, op, out, rows):
    (lc, _), (lb, rb) = op.attrs["dimension_numbers"]
    a, b = op.inputs[:2]
    rank, batch = len(units.tensors[a].shape), len(lb)
    free = [i for i in range(rank) if i not in (*lb, *lc)]
    if a in units.static or [*lb, *free, *lc] != list(range(rank)) or list(rb) != list(range(batch)):
        return None
    if not _keeps(out.shape, rows, batch + len(free)) or piece(units.tensors[a].shape, rows) is None:
        return None
    many = prod(out.shape[:batch])
    if rows <= many:
        kind = "row" if batch and many % rows == 0 else "full"
        if kind == "full" and batch:
            return None
    else:
        if many and rows % many:
            return None
        kind = "full"
    found = {a: "row"}
    if b not in units.static:
        if a == b:
            return None
        found[b] = kind
    elif batch:
        return None  # a weight for every batch: its rows are not cut here
    return found


def _sides(units, unit):
    """(operand in the arena, its axes of the batch and of the sum, the weights, their axes of the batch)."""
    (lc, rc), (lb, rb) = unit.op.attrs["dimension_numbers"]
    a, b = unit.op.inputs[:2]
    return (b, rb, rc, a, lb) if a in units.static else (a, lb, lc, b, rb)


def _ordered_rows(units, unit, out, rows):
    """A product whose result has the axes of its operand in their order: row by row, each with its matrix."""
    x, batch, summed, *_ = _sides(units, unit)
    shape = units.tensors[x].shape
    own = len(shape) - len(summed)
    if not (_keeps(out.shape, rows, own) and _keeps(shape, rows, own)):
        return None
    cut = piece(shape, rows)
    return {x: "row"} if all(cut[d] in (1, shape[d]) for d in batch) else None


def matrix_of_row(units: Units, unit: Unit, rows: int) -> dict:
    """{axis of weights: (d, s)} of a product whose rows have a matrix each: that of row r is r // d % s."""
    x, batch, _, _, theirs = _sides(units, unit)
    shape, found = units.tensors[x].shape, {}
    cut = piece(shape, rows)
    for d, e in zip(batch, theirs, strict=True):
        if cut[d] == 1 < shape[d]:
            behind = prod(n // m for n, m in zip(shape[d + 1 :], cut[d + 1 :], strict=True))
            found[e] = behind, shape[d]
    return found


def _patch_rows(units, op, out, rows):
    """A convolution whose patches do not overlap, batch and rows of the image leading."""
    x, w = op.inputs
    a = op.attrs
    if w not in units.static or x in units.static or a["batch_group_count"] != 1:
        return None
    lhs, o, shape = a["lhs_spec"], a["out_spec"], units.tensors[x].shape
    if tuple(lhs[i] for i in (0, 2)) != (0, 1) or tuple(o[i] for i in (0, 2)) != (0, 1):
        return None
    kernel = units.tensors[w].shape[a["rhs_spec"][2]]
    straight = a["window_strides"][0] == kernel and tuple(a["padding"][0]) == (0, 0)
    if not straight or a["rhs_dilation"][0] != 1 or a["lhs_dilation"][0] != 1:
        return None
    if shape[1] != out.shape[1] * kernel or not _keeps(out.shape, rows, 2):
        return None
    return {x: "row"} if piece(shape, rows) is not None else None
