"""Memory over time: what is alive while each op runs, by the rules of `hw.liveness`, loop bodies included."""

from dataclasses import dataclass

from hw.liveness import _held, _State, inside_groups
from hw.program import Op, Program, walk
from hw.target import Context


@dataclass(frozen=True)
class Moment:
    """Bytes alive while an op runs, and the buffers that make them: (tensor that owns it, bytes), largest
    first. What the caller keeps (inputs, weights, constants) is in `nbytes` and not among the buffers.
    """

    op: Op
    nbytes: int
    buffers: tuple[tuple[int, int], ...]


def usage(program: Program, *, inner=frozenset()) -> list[Moment]:
    """A moment for every op in the order of execution, a loop's body once; the largest is `peak_bytes`.

    inner: tensors that take no memory, because they never leave the chip.
    """
    seen: list[Moment] = []
    state = _Watch(program, program.body, frozenset(inner), base=_held(program), seen=seen)
    for op in program.body.ops:
        state.run(op)
    return seen


def on_chip(program: Program, *, attention=False) -> frozenset[int]:
    """Tensors that stay inside fusion groups, and with `attention` inside attention patterns too."""
    found = inside_groups(program)
    if not attention:
        return found
    unit = Context(program).attention
    inside = ((op, unit[op.id]) for op in walk(program.body) if op.id in unit)
    return found | {o for op, p in inside for o in op.outputs if o not in p.outputs}


class _Watch(_State):
    """A state that notes what is alive at each op, after its results are born and before its operands die."""

    def __init__(self, program, block, inner=frozenset(), lent=(), *, base=0, around=(), seen=None):
        super().__init__(program, block, inner, lent)
        self.base, self.around, self.seen = base, around, seen

    def _arena(self, op):
        self.seen.append(Moment(op, self.base + self.now, self._alive()))
        return super()._arena(op)

    def _alive(self):
        owner = {}
        for i, buffer in self.buffer.items():
            if buffer[0]:
                owner.setdefault(id(buffer), (i, buffer[0]))
        return tuple(sorted([*owner.values(), *self.around], key=lambda x: -x[1]))

    def _within(self, block, lent):
        return _Watch(
            self.program, block, self.inner, lent,
            base=self.base + self.now, around=self._alive(), seen=self.seen,
        )  # fmt: skip
