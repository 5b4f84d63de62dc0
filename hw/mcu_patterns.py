"""Kernels of an int8 library in a block's data flow: softmax, norms, products with a bias or a transpose.

A pattern is a set of ops that nothing but its result leaves; what only guards, moves or casts is passed.
"""

from dataclasses import dataclass, replace

from hw.fusion import VIEWS
from hw.program import Op

MOST = 4096  # channels of a layer norm in integers
PASS = VIEWS | frozenset("broadcast_in_dim convert_element_type select_n max copy".split())


@dataclass(frozen=True)
class Unit:
    """kind: "free" (nothing runs), "view", "lut", "softmax", "layer_norm", "product", or the primitive's own.

    op: whose operands and results are its own; a product with a bias runs at the addition behind it.
    source: the float tensor that a table or a pattern reads. chain: ops of a table, in order. bias: the
    static tensor that a product adds. gamma, beta: of a layer norm, or None; center: False for an RMS norm.
    perm: of the axes of a product's result, where it is written as a transpose behind it would have it.
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
    perm: tuple[int, ...] = ()


class Matcher:
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

    def turned(self, op):
        """(transpose behind the right operand, the product that reads it as it lies) or None."""
        maker = self.made.get(op.inputs[1])
        if maker is None or maker.prim != "transpose" or maker.id in self.units.of:
            return None
        if len(self.users[op.inputs[1]]) > 1 or op.inputs[1] in self.kept or op.inputs[0] == op.inputs[1]:
            return None
        (lc, rc), (lb, rb) = op.attrs["dimension_numbers"]
        perm = maker.attrs["permutation"]
        if len(perm) != len(rc) + len(rb) + 1 or [perm[i] for i in rb] != list(range(len(rb))):
            return None
        numbers = ((lc, tuple(perm[i] for i in rc)), (lb, tuple(perm[i] for i in rb)))
        inputs = (op.inputs[0], maker.inputs[0])
        return maker.id, replace(op, inputs=inputs, attrs=op.attrs | {"dimension_numbers": numbers})

    def ordered(self, op):
        """The transpose behind a product with weights of their own for every matrix of a batch, if it brings
        the result into the order of the other operand's axes: then each of its rows makes a row. Or None.
        """
        out, users = op.outputs[0], self.users.get(op.outputs[0], ())
        if (
            out in self.kept
            or len(users) != 1
            or users[0].prim != "transpose"
            or users[0].id in self.units.of
        ):
            return None
        (lc, rc), (lb, rb) = op.attrs["dimension_numbers"]
        left, right = (i in self.units.static for i in op.inputs[:2])
        if left == right or not lb:
            return None
        ranks = [len(self.tensors[i].shape) for i in op.inputs[:2]]
        free = [[d for d in range(n) if d not in (*b, *c)] for n, b, c in zip(ranks, (lb, rb), (lc, rc),
                                                                             strict=True)]  # fmt: skip
        # where each axis of the operand that is no weight stands in the result, the weights' own behind them
        own, batch, summed = (free[1], rb, rc) if left else (free[0], lb, lc)
        first = len(lb) + (len(free[0]) if left else 0)
        at = dict(zip((*batch, *own), (*range(len(lb)), *range(first, first + len(own))), strict=True))
        rest = [n for n in range(len(lb) + len(free[0]) + len(free[1])) if n not in at.values()]
        last = list(range(max(ranks[left] - len(summed), 0), ranks[left]))
        if sorted(summed) != last:
            return None
        return (
            users[0] if list(users[0].attrs["permutation"]) == [*(at[d] for d in sorted(at)), *rest] else None
        )

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
        if op.prim == "conv_general_dilated":
            return users[0] if op.attrs["out_spec"][1] == rank - 1 else None
        (_, rc), (_, rb) = op.attrs["dimension_numbers"]
        return users[0] if rank == len(rc) + 1 and not rb else None
