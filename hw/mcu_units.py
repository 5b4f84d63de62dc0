"""What an int8 library would run as one call: the units of a program on a microcontroller.

Values known before the program runs (weights, constants, and what follows from them alone) are folded at
compile time. A chain of elementwise ops that depends on one tensor is a table of 256 bytes; softmax and layer
norm, found by their shape in the data flow, are one kernel each; a product takes the bias behind it into its
int32 sum. Everything else is a unit of its own. Float values share one scale where a program only moves them.
"""

from dataclasses import dataclass, field

from hw.errors import UnsupportedPrimitive
from hw.fusion import VIEWS
from hw.mcu_patterns import Matcher, Unit
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
PRODUCTS = {"dot_general": "product", "conv_general_dilated": "conv_general_dilated"}  # kinds of units


@dataclass
class Units:
    """The units of all blocks of a program, by op id; static tensors; scale classes of the others."""

    program: Program
    rejected: frozenset = frozenset()  # ops at which a pattern is not what it looks like
    target: str = "a microcontroller"
    act_bytes: int = 1  # of a float in the arena
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
        self.view = Matcher(self, made, users, kept)
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
        biased, turned, ordered = {}, {}, {}
        for op in block.ops:
            if op.prim == "dot_general" and op.id not in self.of and (hit := self.view.turned(op)):
                inside.add(hit[0])
                turned[op.id] = hit[1]
            if op.prim in PRODUCTS and op.id not in self.of and (hit := self.view.bias(op)):
                biased[op.id] = hit
            elif op.prim == "dot_general" and op.id not in self.of and (hit := self.view.ordered(op)):
                ordered[op.id] = hit
                inside.discard(hit.id)
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
            elif op.prim in VIEWS | IDENTITY or self._only_axes(op):
                self.of[op.id] = Unit("view", op, op.outputs[0] if op.outputs else -1)
            elif op.prim in PRODUCTS:
                kind, add = PRODUCTS[op.prim], biased.get(op.id)
                op = turned.get(op.id, op)
                if op.id in ordered:
                    move = ordered[op.id]
                    self.of[op.id] = Unit("free", op)
                    perm = tuple(move.attrs["permutation"])
                    self.of[move.id] = Unit(kind, op, move.outputs[0], perm=perm)
                elif add:
                    bias = next(i for i in add.inputs if i != op.outputs[0])
                    self.of[op.id] = Unit("free", op)
                    self.of[add.id] = Unit(kind, op, add.outputs[0], bias=bias)
                else:
                    self.of[op.id] = Unit(kind, op, op.outputs[0])
            else:
                self.of[op.id] = Unit(op.prim, op, op.outputs[0] if op.outputs else -1)

    def _only_axes(self, op):
        """Does a broadcast only put in axes of size 1: the same bytes in the same order."""
        if op.prim != "broadcast_in_dim" or not op.inputs:
            return False
        along = op.attrs["broadcast_dimensions"]
        return (
            list(along) == sorted(along)
            and self.tensors[op.inputs[0]].size == self.tensors[op.outputs[0]].size
        )

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
        return (unit.out,) if unit.bias is not None or unit.perm else unit.op.outputs
