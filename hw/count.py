"""Counting: what a program computes and moves, whatever the machine.

A matrix product of b [m, k] x [k, n] is b m n k MACs and twice as many flops; an elementwise op is its output
size times its weight; a reduction its input size less its output size; transcendentals and integer (index)
operations are classes of their own; movement is no flop. Loops multiply, they are never unrolled.
"""

from dataclasses import dataclass, fields

from hw.errors import UnknownTripCount
from hw.fusion import groups, touched, written
from hw.program import Op, Program
from hw.traffic import kernel_bytes


@dataclass(frozen=True)
class Counts:
    """Operations and bytes. unfused_bytes: every op reads its operands and writes its results in full;

    fused_bytes: only what crosses the borders of fusion groups, and of gathers and updates what they touch.
    Collectives move their bytes over the links, counted on all devices.
    """

    macs: int = 0
    flops: int = 0
    transcendentals: int = 0
    index_ops: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    weight_bytes: int = 0
    unfused_bytes: int = 0
    fused_bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, n) -> "Counts":
        return Counts(*(_whole(a * n) for a in self.values()))

    __rmul__ = __mul__

    def values(self) -> tuple:
        """The numbers in the order of the fields."""
        return tuple(getattr(self, f.name) for f in fields(self))


def _whole(x):
    return int(x) if x == int(x) else x


def count(program: Program, *, by: str = "total", cond: str = "max"):
    """Counts of the whole program, or of each kind, scope or op.

    Args: by: "total" gives one Counts; "kind", "scope" (the path of names of jit and named_scope) and "op"
        (number and primitive) a dict. Branches appear there by the rule of `cond`: under "max" those of the
        branch with most work.
      cond: of the branches of a cond take "max", the largest of each number, or "mean", their average.
    Raises: UnknownTripCount for a while loop without one.
    """
    if by not in ("total", "kind", "scope", "op"):
        raise ValueError(f'by must be "total", "kind", "scope" or "op", got {by!r}')
    if cond not in ("max", "mean"):
        raise ValueError(f'cond must be "max" or "mean", got {cond!r}')
    if by == "total":
        sizes = {r: program.bytes(r) for r in ("input", "output", "weight", "const")}
        ends = Counts(
            input_bytes=sizes["input"],
            output_bytes=sizes["output"],
            weight_bytes=sizes["weight"] + sizes["const"],
        )
        return _block(program, program.body, cond) + ends
    found = {}
    key = {
        "kind": lambda op: op.kind,
        "scope": lambda op: op.scope,
        "op": lambda op: f"{op.id} {op.prim}",
    }[by]
    for op, c in _leaves(program, program.body, cond, 1):
        found[key(op)] = found.get(key(op), Counts()) + c
    return found


def _block(program, block, cond):
    total = Counts()
    for op in block.ops:
        total += _op(program, op, cond)
    for g in groups(program, block):
        total += Counts(fused_bytes=g.read_bytes + g.write_bytes)
    return total


def _op(program, op, cond):
    """One execution of an op, structured ones included; fused bytes of leaves are left to the groups."""
    if op.kind == "loop":
        n = _trips(op)
        total = _block(program, op.dims.body, cond) * n
        if op.dims.cond is not None:
            total += _block(program, op.dims.cond, cond) * (n + 1)
        return total
    if op.kind == "branch":
        return _combine([_block(program, b, cond) for b in op.blocks], cond)
    if op.kind == "shard":
        return _block(program, op.dims.body, cond) * op.dims.devices
    return op_counts(program, op, cond=cond, fused=False)


def _leaves(program, block, cond, trips):
    """(op, counts of all its trips) of leaf ops, groups' bytes on the op that moves them."""
    for g in groups(program, block):
        for op in g.ops:
            moved = Counts(fused_bytes=g.reads.get(op.id, 0) + g.writes.get(op.id, 0))
            yield op, (op_counts(program, op, cond=cond, fused=False) + moved) * trips
    for op in block.ops:
        if op.kind == "loop":
            if op.dims.cond is not None:
                yield from _leaves(program, op.dims.cond, cond, trips * (_trips(op) + 1))
            yield from _leaves(program, op.dims.body, cond, trips * _trips(op))
        elif op.kind == "shard":
            yield from _leaves(program, op.dims.body, cond, trips * op.dims.devices)
        elif op.kind == "branch":
            if cond == "mean":
                for b in op.blocks:
                    yield from _leaves(program, b, cond, trips / len(op.blocks))
            else:
                work = lambda b: (c := _block(program, b, cond)).flops + c.transcendentals + c.index_ops
                yield from _leaves(program, max(op.blocks, key=work), cond, trips)


def _trips(op):
    if op.dims.trips is None:
        raise UnknownTripCount(op.dims.name or op.scope)
    return op.dims.trips


def _combine(parts, cond):
    columns = zip(*(p.values() for p in parts), strict=True)
    if cond == "max":
        return Counts(*map(max, columns))
    return Counts(*(_whole(sum(c) / len(parts)) for c in columns))


def op_counts(program: Program, op: Op, *, cond: str = "max", fused: bool = True) -> Counts:
    """Counts of one execution of a leaf op; a kernel runs its whole grid. fused: with bytes on its own."""
    if op.kind == "kernel":
        read, write = kernel_bytes(op.dims)
        moved = Counts(unfused_bytes=read + write)
        if fused:
            moved += Counts(input_bytes=read, output_bytes=write, fused_bytes=read + write)
        return kernel_work(op.dims, cond) + moved
    t = program.tensors
    moved = Counts(
        unfused_bytes=_full_bytes(t, op),
        fused_bytes=sum(touched(program, op, i) for i in dict.fromkeys(op.inputs))
        + sum(written(program, op, o) for o in op.outputs)
        if fused
        else 0,
    )
    return work(op) + moved


def _full_bytes(t, op):
    """Each operand read once and each result written once; immediates and folded weight moves are free."""
    if op.attrs.get("folded"):
        return 0
    if op.attrs.get("in_place"):  # the update is read, and written into its operand
        rest = sum(t[i].nbytes for i in dict.fromkeys(op.inputs[1:]))
        return rest + -(-t[op.outputs[0]].nbytes * op.dims.written // max(t[op.outputs[0]].size, 1))
    read = sum(t[i].nbytes for i in dict.fromkeys(op.inputs) if not (t[i].role == "const" and t[i].size == 1))
    return read + sum(t[o].nbytes for o in op.outputs)


def work(op: Op) -> Counts:
    """Operations of one execution, by the dims record alone."""
    d = op.dims
    if op.kind in ("matmul", "conv"):
        return Counts(macs=d.macs, flops=2 * d.macs)
    ops = {
        "elementwise": lambda: d.n * d.ops,
        "collective": lambda: d.elements if op.prim.startswith(("psum", "pmax", "pmin", "reduce")) else 0,
    }.get(op.kind, lambda: getattr(d, "ops", 0))()
    cls = getattr(d, "cls", "add")
    if cls == "transcendental":
        return Counts(transcendentals=ops)
    return Counts(index_ops=ops) if cls == "index" else Counts(flops=ops)


def kernel_work(kernel, cond: str = "max") -> Counts:
    """Operations of a kernel over its whole grid: `trips` of its body's ops hold their executions."""

    def visit(block):
        total = Counts()
        for op in block.ops:
            if op.kind == "loop" and op.dims.trips is None:
                raise UnknownTripCount(op.dims.name)
            if op.kind == "branch" and not op.attrs.get("resolved"):
                total += _combine([visit(b) for b in op.blocks], cond)
            elif op.blocks:
                for b in op.blocks:
                    total += visit(b)
            else:
                if op.trips is None:
                    raise UnknownTripCount(op.scope or kernel.name)
                total += work(op) * op.trips
        return total

    return visit(kernel.body)
