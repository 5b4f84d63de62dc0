"""What an int8 library would run as one call: the units of a program on a microcontroller.

Values known before the program runs (weights, constants, and what follows from them alone) are folded at
compile time. A chain of elementwise ops that depends on one tensor is a table of 256 bytes; softmax and layer
norm, found by their shape in the data flow, are one kernel each; a product takes the bias behind it into its
int32 sum. Everything else is a unit of its own. Float values share one scale where a program only moves them.
"""

from dataclasses import dataclass, field

from hw.errors import UnsupportedPrimitive
from hw.fusion import VIEWS
from hw.primitives import DIVISION, IDENTITY, INDEX_ONLY, ONE_OP, RANDOM, TRANSCENDENTAL
from hw.program import Block, Op, Program, is_float, walk

ELEMENTWISE = ONE_OP | DIVISION | TRANSCENDENTAL | {"integer_pow", "one_minus_square"}
# One float operand, its values unchanged: the result shares its scale.
SAME = IDENTITY | frozenset(
    "reshape squeeze expand_dims broadcast_in_dim tile transpose rev slice dynamic_slice gather copy split "
    "unstack reduce_max reduce_min cummax cummin reduce_window_max reduce_window_min reduce_precision".split()
)
# The first operand's place is taken over or extended: its scale is the result's.
INTO = frozenset("dynamic_update_slice scatter scatter-add scatter-min scatter-max pad".split())
MOST = 4096  # channels of a layer norm in integers
PASS = VIEWS | frozenset("broadcast_in_dim convert_element_type select_n max copy".split())


@dataclass(frozen=True)
class Unit:
    """kind: "free" (nothing runs), "view", "lut", "softmax", "layer_norm", "product", or the primitive's own.

    op: whose operands and results are its own; a product with a bias runs at the addition behind it.
    source: the float tensor that a table or a pattern reads. chain: ops of a table, in order. bias: the
    static tensor that a product adds. gamma, beta: of a layer norm, or None; center: False for an RMS norm.
    out: the tensor it makes.
    """

    kind: str
    op: Op
    out: int = -1
    source: int = -1
    chain: tuple[Op, ...] = ()
    bias: int | None = None
    gamma: int | None = None
    beta: int | None = None
    center: bool = True


@dataclass
class Units:
    """The units of all blocks of a program, by op id; static tensors; scale classes of the others."""

    program: Program
    rejected: frozenset = frozenset()  # ops at which a pattern is not what it looks like
    target: str = "a microcontroller"
    of: dict = field(default_factory=dict)
    static: set = field(default_factory=set)
    uniform: set = field(default_factory=set)
    parent: dict = field(default_factory=dict)

    def __post_init__(self):
        self.tensors = self.program.tensors
        for op in walk(self.program.body):
            if op.kind in ("kernel", "collective", "shard"):
                self.unit(op)
        for t in self.tensors.values():
            if t.role in ("weight", "const"):
                self.static.add(t.id)
                if t.size == 1:
                    self.uniform.add(t.id)
        self._block(self.program.body)

    # Scale classes

    def root(self, i):
        """The representative of a tensor's scale class."""
        while self.parent.get(i, i) != i:
            i = self.parent[i]
        return i

    def join(self, a, b):
        """Give two float tensors one scale."""
        if is_float(self.tensors[a].dtype) and is_float(self.tensors[b].dtype):
            self.parent[self.root(a)] = self.root(b)

    def dynamic(self, i):
        """Is it a float tensor that is only known when the program runs."""
        return is_float(self.tensors[i].dtype) and i not in self.static

    # Blocks

    def _block(self, block: Block):
        users, kept = {}, set(block.outputs)
        for op in block.ops:
            for i in dict.fromkeys(op.inputs):
                users.setdefault(i, []).append(op)
        made = {o: op for op in block.ops for o in op.outputs}
        self.view = _Flow(self, made, users, kept)
        pointwise = {}  # float or bool tensor: (its one source, ops from it)
        for op in block.ops:
            if op.kind in ("kernel", "shard", "collective"):
                continue
            if op.blocks:
                self._structured(op)
                continue
            if all(i in self.static for i in op.inputs) and op.prim not in RANDOM | INDEX_ONLY:
                self.static.update(op.outputs)
                if op.prim in ELEMENTWISE | SAME and all(i in self.uniform for i in op.inputs):
                    self.uniform.update(op.outputs)
                self.of[op.id] = Unit("free", op)
                continue
            self._classes(op)
            if hit := self._pointwise(op, pointwise):
                pointwise[op.outputs[0]] = hit
        patterns = self._patterns(block)
        self._assign(block, users, kept, pointwise, patterns)

    def _structured(self, op):
        """Values pass in and out of bodies under one scale; static operands are known inside as well."""
        d = op.dims
        pairs = []
        if op.kind == "loop":
            if d.cond is None:
                pairs = list(zip(op.inputs, d.body.inputs, strict=True))
                fixed = range(d.consts, d.consts + d.carries)
            else:
                rest = op.inputs[d.cond_consts :]
                pairs = list(zip(rest, d.body.inputs, strict=True))
                fixed = range(d.consts, d.consts + d.carries)
                seen = (*op.inputs[: d.cond_consts], *rest[d.consts :])
                pairs += list(zip(seen, d.cond.inputs, strict=True))
            carried = {d.body.inputs[k] for k in fixed}
            if d.cond is not None:
                carried |= set(d.cond.inputs[d.cond_consts :])
            for k, o in enumerate(d.body.outputs[: d.carries]):
                pairs += [(o, d.body.inputs[d.consts + k]), (o, op.outputs[k])]
            pairs += list(zip(d.body.outputs[d.carries :], op.outputs[d.carries :], strict=True))
        else:
            carried = set()
            for b in op.dims.branches:
                pairs += list(zip(op.inputs[1:], b.inputs, strict=True))
                pairs += list(zip(b.outputs, op.outputs, strict=True))
        inner = {i for b in op.blocks for i in b.inputs} - carried
        for a, b in pairs:
            if b in inner and a in self.static:
                self.static.add(b)
                if a in self.uniform and self.tensors[b].size == 1:
                    self.uniform.add(b)
            self.join(a, b)
        view = self.view
        for b in op.blocks:
            self._block(b)
        self.view = view

    def _classes(self, op):
        ins = [i for i in op.inputs if self.dynamic(i)]
        if op.prim == "convert_element_type" or op.prim in SAME:
            for o in op.outputs:
                for i in ins[:1]:
                    self.join(i, o)
        elif op.prim in INTO and ins and op.inputs[0] == ins[0]:
            self.join(ins[0], op.outputs[0])
        elif op.prim in ("sort", "top_k"):
            for i, o in zip(op.inputs, op.outputs, strict=False):
                self.join(i, o)

    def _pointwise(self, op, found):
        """(source, ops) if the result is a function of one float tensor, element by element."""
        if op.prim not in ELEMENTWISE:
            return None
        sources, ops = {}, {}
        for i in op.inputs:
            if i in self.uniform:
                continue
            if i in found:
                sources[found[i][0]] = None
                ops.update({o.id: o for o in found[i][1]})
            elif self.dynamic(i):
                sources[i] = None
            else:
                return None
        if len(sources) != 1:
            return None
        source = next(iter(sources))
        if self.tensors[source].shape != self.tensors[op.outputs[0]].shape:
            return None
        out = self.tensors[op.outputs[0]].dtype
        if not (is_float(out) or out == "bool" or op.prim == "convert_element_type"):
            return None
        ops[op.id] = op
        return source, tuple(ops[k] for k in sorted(ops))

    def _patterns(self, block):
        """{id of the last op: (Unit, ids inside)} of softmaxes and norms."""
        found = {}
        for op in block.ops:
            if op.id in self.of or op.id in self.rejected:
                continue
            for match in (self.view.softmax, self.view.norm):
                hit = match(op)
                if hit and hit[0].op.id not in self.rejected:
                    found[hit[0].op.id] = hit
        return found

    def _assign(self, block, users, kept, pointwise, patterns):
        inside = {i for _, ids in patterns.values() for i in ids}
        tables = {t for t, (_, ops) in pointwise.items()}
        biased = {}
        for op in block.ops:
            if op.prim == "dot_general" and op.id not in self.of and (hit := self.view.bias(op)):
                biased[op.id] = hit
        for op in block.ops:
            if op.id in self.of or op.blocks or op.kind in ("kernel", "shard", "collective"):
                continue
            if op.id in patterns:
                self.of[op.id] = patterns[op.id][0]
            elif op.id in inside:
                self.of[op.id] = Unit("free", op)
            elif op.outputs and op.outputs[0] in tables:
                o = op.outputs[0]
                source, ops = pointwise[o]
                follows = lambda u, s=source: (
                    u.id not in inside and u.outputs and pointwise.get(u.outputs[0], (None,))[0] == s
                )
                needed = o in kept or not all(follows(u) for u in users.get(o, ()))
                if needed and op.prim == "convert_element_type" and self.root(o) == self.root(source):
                    self.of[op.id] = Unit("view", op, o, source)
                else:
                    self.of[op.id] = Unit("lut", op, o, source, ops) if needed else Unit("free", op)
            elif op.prim in VIEWS | IDENTITY:
                self.of[op.id] = Unit("view", op, op.outputs[0] if op.outputs else -1)
            elif op.prim == "dot_general":
                add = biased.get(op.id)
                if add:
                    bias = next(i for i in add.inputs if i != op.outputs[0])
                    self.of[op.id] = Unit("free", op)
                    self.of[add.id] = Unit("product", op, add.outputs[0], bias=bias)
                else:
                    self.of[op.id] = Unit("product", op, op.outputs[0])
            else:
                self.of[op.id] = Unit(op.prim, op, op.outputs[0] if op.outputs else -1)

    def unit(self, op: Op) -> Unit:
        """The unit that runs at an op. Raises: UnsupportedPrimitive for kernels and collectives."""
        if op.id not in self.of:
            shape = self.tensors[op.outputs[0]].shape if op.outputs else ()
            why = f"{self.target} is one core: it has no rule for it"
            if op.kind == "kernel":
                why = f'{self.target} runs no Pallas kernel: trace with impl="xla"'
            raise UnsupportedPrimitive(op.prim, shape, op.scope, op.source, why)
        return self.of[op.id]

    def reads(self, unit: Unit) -> tuple[int, ...]:
        """Tensors that a unit reads when the program runs, static ones included."""
        if unit.kind == "free":
            return ()
        if unit.kind in ("lut", "softmax", "layer_norm"):
            extra = tuple(i for i in (unit.gamma, unit.beta) if i is not None)
            return (unit.source, *extra)
        return (*unit.op.inputs, unit.bias) if unit.bias is not None else unit.op.inputs

    def writes(self, unit: Unit) -> tuple[int, ...]:
        """Tensors that it makes."""
        if unit.kind == "free":
            return ()
        return (unit.out,) if unit.bias is not None else unit.op.outputs


class _Flow:
    """Walking the data flow of one block, to find patterns."""

    def __init__(self, units, made, users, kept):
        self.units, self.made, self.users, self.kept = units, made, users, kept
        self.tensors = units.tensors

    def up(self, i, prims, through=PASS):
        """(op, ops passed) of the nearest op above i with a primitive in prims, or (None, ())."""
        passed = []
        for _ in range(12):
            op = self.made.get(i)
            if op is None or op.id in self.units.of:
                return None, ()
            passed.append(op)
            if op.prim in prims:
                return op, tuple(passed)
            if op.prim not in through:
                return None, ()
            data = [j for j in op.inputs if self.units.dynamic(j)]
            if op.prim in ("select_n", "max") and len(data) > 1:
                return None, ()
            if not data:
                return None, ()
            i = data[0]
        return None, ()

    def closed(self, ops, out, allowed=()):
        """Ids of ops, with the guards that only they use, if nothing but `out` leaves them; else None."""
        ids = {op.id for op in ops}
        while True:
            guards = {
                self.made[i].id
                for op in self.made.values()
                if op.id in ids
                for i in op.inputs
                if i in self.made and i not in allowed and i not in self.kept
                and self.made[i].id not in ids and self.made[i].id not in self.units.of
                and all(u.id in ids for u in self.users.get(i, ()))
            }  # fmt: skip
            if not guards:
                break
            ids |= guards
        inside = [op for op in self.made.values() if op.id in ids]
        for op in inside:
            for o in op.outputs:
                leaves = o in self.kept or any(u.id not in ids for u in self.users.get(o, ()))
                if leaves and o != out:
                    return None
        return ids

    def _last_axis(self, op, full):
        return op.attrs.get("axes") == (len(self.tensors[full].shape) - 1,)

    def softmax(self, op):
        """exp(x - max x) / sum exp(x - max x) over the last axis, guards of empty rows allowed."""
        if op.prim != "div" or len(op.inputs) != 2:
            return None
        exp, a = self.up(op.inputs[0], ("exp",))
        total, b = self.up(op.inputs[1], ("reduce_sum",))
        if exp is None or total is None or self.up(total.inputs[0], ("exp",))[0] is not exp:
            return None
        sub, c = self.up(exp.inputs[0], ("sub",), VIEWS)
        if sub is None:
            return None
        top, d = self.up(sub.inputs[1], ("reduce_max",))
        x = sub.inputs[0]
        if top is None or self._through(top.inputs[0]) != self._through(x) or not self.units.dynamic(x):
            return None
        if not (self._last_axis(total, x) and self._last_axis(top, x)):
            return None
        out = op.outputs[0]
        if self.tensors[out].shape != self.tensors[x].shape:
            return None
        ids = self.closed((op, *a, *b, *c, *d), out, allowed=(x, self._through(x)))
        return (Unit("softmax", op, out, x), ids) if ids else None

    def _through(self, i):
        """The tensor behind changes of type and gradients' stops."""
        while (op := self.made.get(i)) is not None and op.prim in ("convert_element_type", "stop_gradient"):
            i = op.inputs[0]
        return i

    def norm(self, op):
        """(x - mean) / sqrt(var + eps) gamma + beta over the last axis, or without the mean."""
        if op.prim not in ("rsqrt", "sqrt"):
            return None
        through = VIEWS | {"broadcast_in_dim", "convert_element_type", "add", "div", "mul"}
        total, a = self.up(op.inputs[0], ("reduce_sum",), through)
        if total is None:
            return None
        square, b = self.up(total.inputs[0], ("square", "integer_pow", "mul"), VIEWS)
        if square is None or (square.prim == "mul" and len(set(square.inputs)) > 1):
            return None
        if square.prim == "integer_pow" and square.attrs.get("y") != 2:
            return None
        deviation, center, c = square.inputs[0], False, ()
        x = deviation
        sub = self.made.get(deviation)
        if sub is not None and sub.prim == "sub":
            mean, c = self.up(sub.inputs[1], ("reduce_sum",), through)
            if mean is not None and mean.inputs[0] == sub.inputs[0] and self._last_axis(mean, sub.inputs[0]):
                x, center, c = sub.inputs[0], True, (sub, *c)
        if not (self.units.dynamic(x) and self._last_axis(total, x) and self.tensors[x].shape[-1] <= MOST):
            return None

        def same(j):  # the deviation itself, or a second one of the same x
            again = self.made.get(j)
            if j == deviation or not center or again is None or again.prim != "sub" or again.inputs[0] != x:
                return j == deviation, ()
            mean, way = self.up(again.inputs[1], ("reduce_sum",), through)
            return mean is not None and mean.inputs[0] == x and self._last_axis(mean, x), (again, *way)

        end, d = self._down(op.outputs[0], same, "mul" if op.prim == "rsqrt" else "div")
        if end is None:
            return None
        ops, gamma, beta = [op, *a, *b, *c, *d], None, None
        for prim, slot in (("mul", "gamma"), ("add", "beta")):
            only = self.users.get(end.outputs[0], ())
            if len(only) == 1 and only[0].prim == prim and end.outputs[0] not in self.kept:
                other = [i for i in only[0].inputs if i != end.outputs[0]]
                if len(other) == 1 and self._row(other[0], x):
                    end = only[0]
                    ops.append(end)
                    gamma, beta = (other[0], beta) if slot == "gamma" else (gamma, other[0])
        ids = self.closed(ops, end.outputs[0], allowed=(x,))
        if not ids or end.id in self.units.of:
            return None
        return Unit("layer_norm", end, end.outputs[0], x, gamma=gamma, beta=beta, center=center), ids

    def _down(self, i, same, last):
        """The product (quotient) of the deviation with the root, and the ops down to it."""
        passed = []
        for _ in range(6):
            users = self.users.get(i, ())
            if len(users) != 1:
                return None, ()
            op = users[0]
            passed.append(op)
            if op.prim == last:
                for j in op.inputs[: 1 if last == "div" else 2]:
                    found, way = same(j)
                    if found and j != i:
                        return op, (*passed, *way)
            if op.prim not in VIEWS | {"broadcast_in_dim", "convert_element_type"}:
                return None, ()
            i = op.outputs[0]
        return None, ()

    def _row(self, i, x):
        """Is it static and the same for every row, as far as its making tells."""
        if i not in self.units.static:
            return False
        while (op := self.made.get(i)) is not None and op.prim in (
            "broadcast_in_dim",
            "reshape",
            "convert_element_type",
        ):
            if op.prim == "broadcast_in_dim":
                n = len(self.tensors[op.outputs[0]].shape)
                shape = self.tensors[op.inputs[0]].shape
                along = op.attrs["broadcast_dimensions"]
                return all(s == 1 or d == n - 1 for s, d in zip(shape, along, strict=True))
            i = op.inputs[0]
        return len(self.tensors[i].shape) <= 1 or self.tensors[i].size == self.tensors[i].shape[-1]

    def bias(self, op):
        """The addition of a static row behind a product with a static operand, or None."""
        out = op.outputs[0]
        users = self.users.get(out, ())
        if out in self.kept or len(users) != 1 or users[0].prim != "add":
            return None
        if op.inputs[1] not in self.units.static:
            return None
        other = [i for i in users[0].inputs if i != out]
        if len(other) != 1 or other[0] in self.units.uniform or not self._row(other[0], out):
            return None
        rank = len(self.tensors[op.inputs[1]].shape)
        (_, rc), (_, rb) = op.attrs["dimension_numbers"]
        return users[0] if rank == len(rc) + 1 and not rb else None
