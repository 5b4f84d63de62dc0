"""Lifetimes, peak memory, and an order of ops that lowers it.

Convention: the caller keeps inputs, weights and constants (nothing is donated) and takes the outputs at the
end. A view shares its operand's buffer. An elementwise op or a dynamic_update_slice may write into an operand
of the same byte size that dies there. A loop adds an arena of its own: what its body makes, with the new
carries beside the old ones unless they may take their place.
"""

from hw.fusion import VIEWS
from hw.program import Block, Op, Program, Tensor

_IN_PLACE = ("elementwise",)
_UPDATES = ("dynamic_update_slice", "scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max")


def liveness(program: Program, *, order=None) -> list[tuple[Tensor, int, int]]:
    """(tensor, birth, last use) of every tensor of the top level, in steps of the order of execution.

    Inputs, weights and constants are born at -1; a tensor the function returns, and all that the caller
    keeps, live to the number of ops.
    """
    ops = _ordered(program, order)
    end = len(ops)
    birth = {o: n for n, op in enumerate(ops) for o in op.outputs}
    last = {}
    for n, op in enumerate(ops):
        for i in op.inputs:
            last[i] = n
    ids = dict.fromkeys([*program.body.inputs, *(i for op in ops for i in (*op.inputs, *op.outputs))])
    ids.update(dict.fromkeys(program.body.outputs))
    kept = set(program.body.outputs)
    return [
        (
            program.tensors[i],
            birth.get(i, -1),
            end if i in kept or i not in birth else last.get(i, birth[i]),
        )
        for i in ids
    ]


def peak_bytes(program: Program, *, order=None) -> int:
    """Largest number of bytes alive at once. order: a permutation of the top level's op ids."""
    return _peak(program, _ordered(program, order))


def _peak(program, ops, inner=frozenset()):
    held = _held(program)
    state = _State(program, program.body, inner)
    return held + max([state.now, *(state.run(op) for op in ops)])


def fused_peak_bytes(program: Program) -> int:
    """The same when what passes inside a fusion group takes no memory."""
    return _peak(program, program.body.ops, inside_groups(program))


def inside_groups(program: Program) -> frozenset[int]:
    """Tensors that pass inside fusion groups, loop bodies included."""
    from hw.fusion import groups

    inner = set()

    def visit(block):
        for g in groups(program, block):
            inner.update(o for op in g.ops for o in op.outputs if o not in g.outputs)
        for op in block.ops:
            if op.kind != "kernel":
                for b in op.blocks:
                    visit(b)

    visit(program.body)
    return frozenset(inner)


def _held(program):
    """Bytes that the caller keeps throughout."""
    return sum(program.bytes(role) for role in ("input", "weight", "const"))


class _State:
    """Live buffers of a block while its ops run one after another."""

    def __init__(self, program, block: Block, inner=frozenset(), lent=()):
        self.program, self.block, self.inner = program, block, inner
        self.left = {}  # uses still to come
        for op in block.ops:
            for i in dict.fromkeys(op.inputs):
                self.left[i] = self.left.get(i, 0) + 1
        for o in block.outputs:
            self.left[o] = self.left.get(o, 0) + 1
        self.buffer = {}  # tensor: its buffer, a list [bytes, tensors that use it]
        self.now = 0
        for i in lent:  # buffers that the loop owns already, free to be taken over
            self.buffer[i] = [0, 1, program.tensors[i].nbytes]

    def run(self, op: Op):
        """Bytes alive while the op runs; afterwards its dead operands are gone."""
        t = self.program.tensors
        for o in op.outputs:
            size = 0 if o in self.inner else t[o].nbytes
            old = self._takes(op, o, size)
            if old is not None:
                old[1] += 1
                self.buffer[o] = old
            else:
                self.buffer[o] = [size, 1, size]
                self.now += size
        peak = self.now + self._arena(op)
        for i in dict.fromkeys(op.inputs):
            self.left[i] -= 1
            if not self.left[i]:
                self._drop(i)
        for o in op.outputs:
            if not self.left.get(o):
                self._drop(o)
        return peak

    def _drop(self, i):
        buffer = self.buffer.pop(i, None)
        if buffer is not None:
            buffer[1] -= 1
            if buffer[1] == 0:
                self.now -= buffer[0]

    def _takes(self, op, o, size):
        """The buffer that output o may share: its operand's if it is a view, a dying one of its size."""
        if op.prim in VIEWS and op.inputs:
            if op.inputs[0] in self.buffer:
                return self.buffer[op.inputs[0]]
            if o not in self.block.outputs:  # a view of what the caller holds
                return [0, 0, size]
        if op.kind in _IN_PLACE or op.prim in _UPDATES:
            candidates = op.inputs if op.kind in _IN_PLACE else op.inputs[:1]
            for i in dict.fromkeys(candidates):
                b = self.buffer.get(i)
                if b is not None and b[1] == 1 and self.left[i] == 1 and b[2] == size:
                    return b
        return None

    def _arena(self, op):
        """Bytes that a structured op needs beyond its operands and results."""
        if op.kind == "kernel":
            return 0
        worst = 0
        for inner in op.blocks:
            lent = ()
            if op.kind == "loop" and inner is op.dims.body:
                first = op.dims.consts
                lent = inner.inputs[first : first + op.dims.carries]
            state = self._within(inner, lent)
            worst = max([worst, state.now, *(state.run(x) for x in inner.ops)])
        return worst

    def _within(self, block, lent):
        """The state at the start of a body, with the buffers that the loop lends it."""
        return _State(self.program, block, self.inner, lent)


def reorder_for_memory(program: Program) -> tuple[int, ...]:
    """Op ids of the top level in an order of low peak memory: exact for up to 12 ops, else the better of

    the traced order and a greedy one (least live bytes next).
    """
    ops = program.body.ops
    if len(ops) <= 12:
        return _exact(program, ops)
    greedy = _greedy(program, ops)
    traced = tuple(op.id for op in ops)
    return min((traced, greedy), key=lambda o: peak_bytes(program, order=o))


def _deps(ops):
    made = {o: op.id for op in ops for o in op.outputs}
    return {op.id: {made[i] for i in op.inputs if i in made} for op in ops}


def _greedy(program, ops):
    deps, done, order = _deps(ops), set(), []
    left = {}
    for op in ops:
        for i in dict.fromkeys(op.inputs):
            left[i] = left.get(i, 0) + 1
    kept, made = set(program.body.outputs), {o for op in ops for o in op.outputs}
    size = lambda i: program.tensors[i].nbytes
    waiting = list(ops)
    while waiting:
        ready = [op for op in waiting if deps[op.id] <= done]

        def growth(op):
            born = sum(map(size, op.outputs))
            dies = (i for i in dict.fromkeys(op.inputs) if left[i] == 1 and i in made and i not in kept)
            return born - sum(map(size, dies))

        op = min(ready, key=growth)
        waiting.remove(op)
        done.add(op.id)
        order.append(op.id)
        for i in dict.fromkeys(op.inputs):
            left[i] -= 1
    return tuple(order)


def _exact(program, ops):
    """Depth-first search over orders, cut where the peak so far is no better than the best found."""
    deps = _deps(ops)
    by_id = {op.id: op for op in ops}
    best = [peak_bytes(program), tuple(op.id for op in ops)]
    seen = {}

    def search(order, done):
        if len(order) == len(ops):
            best[:] = [_peak(program, [by_id[i] for i in order]), tuple(order)]
            return
        for op in ops:
            if op.id in done or not deps[op.id] <= done:
                continue
            after = [*order, op.id]
            peak = _peak(program, [by_id[i] for i in after])
            key = done | {op.id}
            if peak < best[0] and peak < seen.get(key, 1 << 62):
                seen[key] = peak
                search(after, key)

    search([], frozenset())
    return best[1]


def _ordered(program, order):
    ops = program.body.ops
    if order is None:
        return ops
    by_id = {op.id: op for op in ops}
    if sorted(order) != sorted(by_id):
        raise ValueError(f"order must be a permutation of the {len(ops)} op ids of the top level")
    deps, done = _deps(ops), set()
    for i in order:
        if not deps[i] <= done:
            raise ValueError(f"order runs op {i} before op {min(deps[i] - done)}, whose result it uses")
        done.add(i)
    return tuple(by_id[i] for i in order)
