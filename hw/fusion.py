"""Fusion groups and named patterns: which ops a compiler or a designer would run as one.

One greedy pass, free of patterns: an elementwise, broadcasting, moving or reducing op joins the group of the
producer of its largest operand; a group holds at most one matrix product, which takes an elementwise tail but
no reduction (a row of its result spans tiles). A producer that only unpacks a matrix operand (dequantising,
masking in place, transposing) joins the product. A value used outside its group is written to memory.
"""

from dataclasses import dataclass, field, replace

from hw.program import Block, Op, Program
from hw.traffic import kernel_bytes

# Movements that a fused loop does by indexing.
INDEXING = frozenset(
    "reshape squeeze expand_dims broadcast_in_dim transpose rev slice pad concatenate iota tile stack split "
    "bitcast_convert_type copy copy_p optimization_barrier device_put dynamic_slice reduce_precision "
    "stop_gradient name pvary".split()
)
# Movements that change no order of bytes: the result can share its operand's buffer.
VIEWS = frozenset(
    "reshape squeeze expand_dims optimization_barrier device_put random_wrap random_unwrap pvary "
    "stop_gradient name".split()
)
_PRODUCTS = ("matmul", "conv")


@dataclass(frozen=True)
class Group:
    """Ops that run as one. reads, writes: bytes across the group's border, charged to the op that moves
    them.
    """

    id: int
    ops: tuple[Op, ...]
    root: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    pattern: str = ""

    @property
    def read_bytes(self) -> int:
        """Bytes taken from memory by one execution."""
        return sum(self.reads.values())

    @property
    def write_bytes(self) -> int:
        """Bytes written to memory by one execution."""
        return sum(self.writes.values())


@dataclass(frozen=True)
class Pattern:
    """Ops that together are a named function: softmax, layer_norm, rms_norm, gelu, silu, attention."""

    name: str
    ops: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def groups(program: Program, block: Block, *, fuse: bool = True) -> list[Group]:
    """The fusion groups of a block, in the order of their last ops; structured ops are left out."""
    ops = [op for op in block.ops if not op.blocks or op.kind == "kernel"]
    members = _merge(program, block, ops) if fuse else [[op] for op in ops]
    users = _users(block)
    made = {o: op.id for op in block.ops for o in op.outputs}
    kept = set(block.outputs)
    found = []
    for part in members:
        inside = {op.id for op in part}
        reads, writes, inputs, outputs = {}, {}, [], []
        for op in part:
            for i in dict.fromkeys(op.inputs):
                if made.get(i) not in inside and i not in inputs:
                    inputs.append(i)
                    reads[op.id] = reads.get(op.id, 0) + touched(program, op, i)
            for o in op.outputs:
                if o in kept or any(u not in inside for u in users.get(o, ())) or not users.get(o):
                    outputs.append(o)
                    writes[op.id] = writes.get(op.id, 0) + written(program, op, o)
        root = next((op for op in part if op.kind in _PRODUCTS), None)
        root = root or next((op for op in part if op.kind == "reduce"), part[-1])
        if part[0].kind == "kernel":
            read, write = kernel_bytes(part[0].dims)
            reads, writes = {part[0].id: read}, {part[0].id: write}
        found.append(Group(part[0].id, tuple(part), root.id, tuple(inputs), tuple(outputs), reads, writes))
    return _name(program, block, found)


def touched(program: Program, op: Op, i: int) -> int:
    """Bytes of operand i that an op really reads: the rows a gather takes, the part a slice keeps."""
    t = program.tensors[i]
    if t.role == "const" and t.size == 1:
        return 0  # an immediate
    if op.attrs.get("folded"):
        return 0
    if (
        op.kind in ("move", "gather", "scatter")
        and op.inputs
        and i == op.inputs[0]
        and hasattr(op.dims, "read")
    ):
        return min(t.nbytes, _bytes_of(t, op.dims.read))
    if op.prim == "ragged_dot_general" and i == op.inputs[1] and op.dims.groups > op.dims.m:
        return t.nbytes * op.dims.m // op.dims.groups  # no more groups than rows can occur
    return t.nbytes


def written(program: Program, op: Op, o: int) -> int:
    """Bytes of result o that an op really writes: an update in place writes the update."""
    t = program.tensors[o]
    if op.attrs.get("folded"):
        return 0
    if op.kind in ("move", "gather", "scatter") and len(op.outputs) == 1 and hasattr(op.dims, "written"):
        return min(t.nbytes, _bytes_of(t, op.dims.written))
    return t.nbytes


def _bytes_of(t, elements):
    return -(-t.nbytes * elements // t.size) if t.size else 0


def _users(block):
    users = {}
    for op in block.ops:
        for i in dict.fromkeys(op.inputs):
            users.setdefault(i, []).append(op.id)
    return users


def _merge(program, block, ops):
    """Greedy producer-consumer merging; groups stay convex (no path leaves a group and comes back)."""
    position = {op.id: n for n, op in enumerate(block.ops)}
    made = {o: op for op in block.ops for o in op.outputs}
    users = _users(block)
    group = {op.id: op.id for op in block.ops}  # op -> group
    parts = {op.id: [op] for op in block.ops}
    size = lambda i: program.tensors[i].nbytes

    def preds(g):
        return {group[made[i].id] for op in parts[g] for i in op.inputs if i in made} - {g}

    def reaches(g, start):
        """Does any group of `start` depend on g by a path through other groups?"""
        first = min(position[op.id] for op in parts[g])
        stack, seen = [s for s in start if s != g], set()
        while stack:
            h = stack.pop()
            if h in seen or max(position[op.id] for op in parts[h]) < first:
                continue
            seen.add(h)
            before = preds(h)
            if g in before:
                return True
            stack += before
        return False

    def join(a, b):
        """Put group b into group a unless that would make a cycle."""
        if a == b or reaches(a, preds(b)) or reaches(b, preds(a)):
            return False
        parts[a] = sorted(parts[a] + parts[b], key=lambda op: position[op.id])
        for op in parts.pop(b):
            group[op.id] = a
        return True

    kind = lambda op: "index" if op.kind == "move" and op.prim in INDEXING else op.kind
    fusible = ("elementwise", "index", "reduce")
    has = lambda g, kinds: any(op.kind in kinds for op in parts[g])
    for op in ops:
        if kind(op) in fusible:
            makers = [i for i in dict.fromkeys(op.inputs) if i in made]
            for i in sorted(makers, key=size, reverse=True):
                a, b = group[made[i].id], group[op.id]
                if a == b or kind(made[i]) not in (*fusible, *_PRODUCTS):
                    continue
                products = has(a, _PRODUCTS) + has(b, _PRODUCTS)
                reduces = has(a, ("reduce",)) or has(b, ("reduce",))
                if products > 1 or (products and reduces):
                    continue
                join(a, b)
        elif op.kind in _PRODUCTS:
            for i in dict.fromkeys(op.inputs):
                maker = made.get(i)
                if maker is None or users[i] != [op.id] or i in block.outputs:
                    continue
                g = group[maker.id]
                if has(g, (*_PRODUCTS, "reduce")) or not all(kind(x) in fusible for x in parts[g]):
                    continue
                inside = {x.id for x in parts[g]}
                outer = {j for x in parts[g] for j in x.inputs if j not in made or made[j].id not in inside}
                if all(
                    u in inside or u == op.id for x in parts[g] for o in x.outputs for u in users.get(o, ())
                ):
                    if sum(map(size, outer)) <= size(i):
                        join(group[op.id], g)
    last = lambda g: max(position[op.id] for op in parts[g])
    return [parts[g] for g in sorted((g for g in parts if not _structured(parts[g])), key=last)]


def _structured(part):
    return part[0].blocks and part[0].kind != "kernel"


def _name(program, block, found):
    named = {}
    for p in patterns(program, block):
        for i in p.ops:
            named.setdefault(i, p.name)
    out = []
    for g in found:
        names = [named[op.id] for op in g.ops if op.id in named]
        out.append(replace(g, pattern=max(set(names), key=names.count)) if names else g)
    return out


def patterns(program: Program, block: Block | None = None) -> list[Pattern]:
    """Named patterns of a block: attention is found first and contains its softmax."""
    block = block or program.body
    made = {o: op for op in block.ops for o in op.outputs}
    users = {}
    for op in block.ops:
        for i in dict.fromkeys(op.inputs):
            users.setdefault(i, []).append(op)
    view = _View(made, users, program)
    found = []
    for op in block.ops:
        for match in (_softmax, _norm, _gelu, _silu):
            if hit := match(op, view):
                found.append(hit)
    found = [_grow(*f, block, view) for f in found]
    softmaxes = [p for p in found if p.name == "softmax"]
    attention = [a for p in softmaxes if (a := _attention(p, block, view))]
    inner = {i for a in attention for i in a.ops}
    return attention + [p for p in found if not set(p.ops) & inner]


class _View:
    """Walking up and down a block past ops that only move, scale or guard values."""

    PASS = INDEXING | {"convert_element_type", "stop_gradient", "select_n", "max", "copy"}

    def __init__(self, made, users, program):
        self.made, self.users, self.program = made, users, program

    def up(self, i, prims, through=PASS, depth=12):
        """The nearest op above tensor i whose primitive is in prims, passing `through`, with the path."""
        op = self.made.get(i)
        if op is None or not depth:
            return None, []
        if op.prim in prims:
            return op, [op]
        if op.prim not in through:
            return None, [op]
        data = [j for j in op.inputs if self.program.tensors[j].dtype != "bool" and j in self.made]
        for j in sorted(data, key=lambda j: -self.program.tensors[j].size):
            found, path = self.up(j, prims, through, depth - 1)
            if found is not None:
                return found, [op, *path]
        return None, [op]

    def down(self, i, prims, through=PASS):
        """All ops below tensor i with a primitive in prims, passing `through`, each with the path to it."""
        found, stack = [], [(i, ())]
        while stack:
            at, path = stack.pop()
            for op in self.users.get(at, ()):
                if op.prim in prims:
                    found.append((op, (*path, op)))
                elif op.prim in through and len(path) < 8:
                    stack += [(o, (*path, op)) for o in op.outputs]
        return found


def _softmax(op, view):
    """exp(x - max) over its sum: anchored at the division."""
    if op.prim not in ("div", "mul"):
        return None
    for num, den in (op.inputs, op.inputs[::-1]):
        top, a = view.up(num, ("exp", "exp2"))
        total, b = view.up(den, ("reduce_sum",))
        if not (top and total):
            continue
        again, c = view.up(total.inputs[0], ("exp", "exp2"))
        if again is not top:
            continue
        sub, d = view.up(top.inputs[0], ("sub",), view.PASS | {"mul"})
        ops = [op, *a, *b, *c, *d]
        if sub:
            _, e = view.up(sub.inputs[1], ("reduce_max",))
            ops += e
        return "softmax", ops
    return None


def _norm(op, view):
    """x times rsqrt(mean square + eps), or over its square root; layer norm if a mean was subtracted."""
    if op.prim not in ("rsqrt", "sqrt"):
        return None
    root, path = view.up(op.inputs[0], ("reduce_sum",), view.PASS | {"add", "div", "mul"})
    if root is None:
        return None
    square, more = view.up(root.inputs[0], ("square", "integer_pow", "mul"))
    if square is None:
        return None
    ops = [op, *path, *more]
    below = view.down(op.outputs[0], ("mul", "div"))
    ops += [x for _, p in below[:1] for x in p]
    mean, extra = view.up(square.inputs[0], ("sub",))
    if mean is not None:
        total, to = view.up(mean.inputs[1], ("reduce_sum",), view.PASS | {"div", "mul"})
        if total is not None:
            return "layer_norm", [*ops, *extra, *to]
    return "rms_norm", ops


def _gelu(op, view):
    """x Phi(x), by erf, erfc or the tanh form."""
    if op.prim in ("erf", "erfc"):
        below = view.down(op.outputs[0], ("mul",), view.PASS | {"add"})
        return ("gelu", [op, *below[0][1]]) if below else None
    if op.prim == "tanh":
        cube, path = view.up(op.inputs[0], ("integer_pow",), view.PASS | {"mul", "add"})
        if cube is not None and cube.attrs.get("y") == 3:
            below = view.down(op.outputs[0], ("mul",), view.PASS | {"add"})
            return "gelu", [op, *path, *(below[0][1] if below else ())]
    return None


def _silu(op, view):
    """x times the logistic function of x."""
    if op.prim != "logistic":
        return None
    for other, path in view.down(op.outputs[0], ("mul",)):
        if op.inputs[0] in other.inputs:
            return "silu", [op, *path]
    return None


def _attention(softmax, block, view):
    """dot - scale - mask - softmax - dot around a softmax."""
    ids = set(softmax.ops)
    tops = [op for op in block.ops if op.id in ids and op.prim == "reduce_max"]
    ends = [op for op in block.ops if op.id in ids and op.prim in ("div", "mul")]
    if not tops or not ends:
        return None
    between = view.PASS | {"mul", "div", "add", "tanh"}
    first, up = view.up(tops[0].inputs[0], ("dot_general",), between)
    below = view.down(ends[-1].outputs[0], ("dot_general",), between)
    if first is None or not below:
        return None
    return _grow("attention", [*up, *(op for op in block.ops if op.id in ids), *below[0][1]], block, view)


def _grow(name, ops, block, view):
    """The pattern with its ops in order, and with what crosses its border."""
    ids = {op.id for op in ops}
    inside = [op for op in block.ops if op.id in ids]
    made = {o for op in inside for o in op.outputs}
    inputs = dict.fromkeys(i for op in inside for i in op.inputs if i not in made)
    outside = lambda o: o in block.outputs or any(u.id not in ids for u in view.users.get(o, ()))
    outputs = tuple(o for op in inside for o in op.outputs if outside(o))
    return Pattern(name, tuple(op.id for op in inside), tuple(inputs), outputs)
