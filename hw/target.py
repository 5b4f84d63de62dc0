"""What a target must say of itself; private to `hw`. A target is one frozen dataclass, every option a field.

    @dataclass(frozen=True)
    class Gpu(Target):
        name: str = "h200"
        ...
        def cost(self, op, ctx) -> OpCost: ...

`estimate` walks the program, multiplies by trips, lets the ops of a fusion group overlap, checks the fit.
"""

from dataclasses import dataclass, field
from functools import cached_property

from hw.count import Counts, op_counts
from hw.errors import DoesNotFit, UnsupportedPrimitive
from hw.fusion import Group, Pattern, groups, patterns, touched, written
from hw.liveness import liveness, peak_bytes
from hw.program import Block, Loop, Op, Program, Tensor, walk
from hw.report import OpCost


@dataclass(frozen=True)
class Placement:
    """Where a program's bytes live: {region: (needed, available)}, and what to tell the reader."""

    regions: dict[str, tuple[int, int]]
    peak: int
    warnings: tuple[str, ...] = ()
    offsets: dict[int, tuple[str, int]] = field(default_factory=dict)  # tensor: (region, offset)


@dataclass(frozen=True)
class Target:
    """Defaults of the protocol; a target overrides `cost`, `capacity`, `clock_hz` and, if it must, the
    rest.
    """

    name: str = "target"
    fuse: bool = True  # ops of a fusion group keep what passes between them on the chip

    def cost(self, op: Op, ctx: "Context") -> OpCost:
        """Price of one execution of a leaf op. Raises: UnsupportedPrimitive for a kind without a rule."""
        raise UnsupportedPrimitive(op.prim, ctx.shape(op), op.scope, op.source, f"{self.name} has no rule")

    @property
    def capacity(self) -> dict[str, int]:
        """Bytes of each memory region; the default `place` puts everything in the first."""
        return {}

    @property
    def clock_hz(self) -> float:
        """Ticks a second, by which seconds become cycles."""
        return 1.0

    @property
    def formats(self):
        """The policy that `execute` computes with; None is float32 as JAX does it."""
        return None

    def place(self, program: Program) -> Placement:
        """Weights, constants and live values in the first region. Raises: DoesNotFit."""
        peak = peak_bytes(program)
        for region, available in self.capacity.items():
            if peak > available:
                raise DoesNotFit(self.name, region, peak, available, largest(program))
            return Placement({region: (peak, int(available))}, peak)
        return Placement({}, peak)


def largest(program: Program, top: int = 8) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, bytes) of the largest tensors."""
    found = sorted((t for t, _, _ in liveness(program)), key=lambda t: -t.nbytes)[:top]
    return [(t.name or f"{t.role} {t.id}", t.shape, t.nbytes) for t in found]


@dataclass(frozen=True)
class Context:
    """What a target may ask about an op: its tensors, its fusion group, its operation counts and bytes."""

    program: Program
    fuse: bool = True
    memo: dict = field(default_factory=dict, compare=False)  # what a target keeps from op to op

    @cached_property
    def by_op(self) -> dict[int, Group]:
        """The fusion group of every op; each op its own when the target does not fuse."""
        return _once(self.program, ("groups", self.fuse), lambda: self._groups())

    def _groups(self):
        found = {}
        for block in _blocks(self.program.body):
            for g in groups(self.program, block, fuse=self.fuse):
                found.update(dict.fromkeys((op.id for op in g.ops), g))
        return found

    @cached_property
    def attention(self) -> dict[int, Pattern]:
        """The attention pattern of every op that is in one; none when the target does not fuse."""
        return _once(self.program, "attention", lambda: self._attention()) if self.fuse else {}

    def _attention(self):
        found = {}
        for block in _blocks(self.program.body):
            for p in patterns(self.program, block):
                if p.name == "attention":
                    found.update(dict.fromkeys(p.ops, p))
        return found

    def inputs(self, op: Op) -> list[Tensor]:
        """Its operands."""
        return [self.program.tensors[i] for i in op.inputs]

    def outputs(self, op: Op) -> list[Tensor]:
        """Its results."""
        return [self.program.tensors[i] for i in op.outputs]

    def shape(self, op: Op) -> tuple[int, ...]:
        """Shape of its first result."""
        return self.program.tensors[op.outputs[0]].shape if op.outputs else ()

    def dtype(self, op: Op) -> str:
        """dtype of its first operand (of the result if it has none): the type it computes in."""
        return (self.inputs(op) or self.outputs(op))[0].dtype

    def counts(self, op: Op) -> Counts:
        """Operations and bytes of one execution (a kernel: all its grid steps)."""
        return op_counts(self.program, op)

    def group(self, op: Op) -> Group:
        """Its fusion group: ops, inputs, outputs, root, pattern."""
        return self.by_op[op.id]

    def reads(self, op: Op) -> int:
        """Bytes that one execution takes from outside its fusion group, each tensor charged once a group."""
        return self.group(op).reads.get(op.id, 0)

    def writes(self, op: Op) -> int:
        """Bytes that one execution leaves for ops outside its fusion group."""
        return self.group(op).writes.get(op.id, 0)

    @cached_property
    def spans(self) -> dict[int, int]:
        """Bytes of the whole array behind every slice that a loop hands its body or takes from it."""
        found, tensors = {}, self.program.tensors
        for op in walk(self.program.body):  # outer loops before inner
            if isinstance(op.dims, Loop):
                d = op.dims
                fixed = d.consts + d.carries
                stacked = zip(d.body.inputs[fixed:], op.inputs[d.cond_consts + fixed :], strict=True)
                gathered = zip(d.body.outputs[d.carries :], op.outputs[d.carries :], strict=True)
                for inner, outer in (*stacked, *gathered):
                    found[inner] = found.get(outer, tensors[outer].nbytes)
        return found

    def working_set(self, group: Group) -> int:
        """Bytes that all executions of a group visit: a slice that moves on visits the whole array."""
        key = ("working set", group.id)
        if key not in self.memo:
            self.memo[key] = self._visited(group)
        return self.memo[key]

    def _visited(self, group):
        if group.ops[0].kind == "kernel":
            return group.read_bytes + group.write_bytes
        visited, program = {}, self.program
        for op in group.ops:
            moved = [(i, touched(program, op, i)) for i in op.inputs if i in group.inputs]
            moved += [(o, written(program, op, o)) for o in op.outputs if o in group.outputs]
            for t, n in moved:
                whole = max(self.spans.get(t, 0), program.tensors[t].nbytes)
                visited.setdefault(t, min(whole, n * (op.trips or 1)))
        return sum(visited.values())

    def is_resident(self, tensor: Tensor) -> bool:
        """Is it a weight or a constant, there before the program starts."""
        return tensor.role in ("weight", "const")


def _blocks(block: Block):
    """A block and those inside it, kernel bodies left closed."""
    yield block
    for op in block.ops:
        if op.kind != "kernel":
            for inner in op.blocks:
                yield from _blocks(inner)


def _once(program, key, find):
    """What `find` gives, found once a program: targets share it. It lives and dies with the program."""
    memo = program.__dict__.setdefault("_found", {})
    if key not in memo:
        memo[key] = find()
    return memo[key]
