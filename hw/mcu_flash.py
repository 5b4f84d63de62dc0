"""What a program keeps in flash: constants as its units read them when it runs, after everything was folded.

A table that is made from small weights before the program starts counts as large as it is, weights that no
unit reads do not count, and those of a loop's trips count once each.
"""

from math import ceil, prod

from hw.program import is_float, walk

_TABLE = {1: 256, 2: 1026}  # bytes of a function, by bytes of an activation
_CHANNEL = {1: 12, 2: 16}  # of a bias of 32 or 64 bits, a multiplier, a shift


def stored(program, units, weight_bits=8) -> dict:
    """{(tensor, or None; what it is): bytes} of weights, tables and multipliers."""
    found, t, width = {}, units.tensors, units.act_bytes
    first = _first_of_its_kind(program, units)

    def add(i, what, size, times=1):
        i = first.get(i, i)
        found[i, what] = max(found.get((i, what), 0), size * times)

    def unit_of(op, own, times):
        unit = units.of[op.id]
        trips = lambda i: times if i in own else 1
        out = unit.out if unit.out >= 0 else (op.outputs[0] if op.outputs else -1)
        held = [i for i in units.reads(unit) if i in units.static]
        if unit.kind == "lut":
            add(None, f"table {op.id}", _TABLE[width])
            return
        if unit.kind == "softmax":
            if width == 2:
                add(None, "tables of softmax", 2 * _TABLE[width])
            return
        if unit.kind == "layer_norm":
            each = max((trips(i) for i in held), default=1)
            add(None, f"gains {op.id}", 6 * t[out].shape[-1], each)
            return
        weights = [i for i in unit.op.inputs[:2] if i in units.static]
        if (unit.kind == "product" or unit.op.kind == "conv") and weights:
            for i in weights:
                add(i, "weights", ceil(t[i].size * weight_bits / 8), trips(i))
                add(None, f"channels {op.id}", _CHANNEL[width] * _channels(unit, t[i]), trips(i))
            return
        for i in held:
            if t[i].size > 1:
                size = t[i].size * width if is_float(t[i].dtype) else t[i].nbytes
                add(i, "values", size, trips(i))

    def block(b, own, times):
        own = set(own)
        for op in b.ops:
            if op.trips == 0:
                continue
            if op.blocks:
                inside(op, own, times)
            elif op.outputs and all(o in units.static for o in op.outputs):
                if any(i in own for i in op.inputs):
                    own.update(op.outputs)
            elif op.id in units.of and units.of[op.id].kind not in ("free", "view"):
                unit_of(op, own, times)

    def inside(op, own, times):
        d = op.dims
        if op.kind != "loop":
            for b in op.blocks:
                block(b, own | {y for x, y in zip(op.inputs[1:], b.inputs, strict=True) if x in own}, times)
            return
        rest = op.inputs[d.cond_consts :]
        for i in rest[d.consts : d.consts + d.carries]:
            if i in units.static and t[i].size > 1 and i not in units.uniform:
                add(i, "values", t[i].size * width if is_float(t[i].dtype) else t[i].nbytes)
        fixed = {y for x, y in zip(rest[: d.consts], d.body.inputs, strict=False) if x in own}
        stacked = set(d.body.inputs[d.consts + d.carries :]) & units.static
        if d.cond is not None:
            block(d.cond, own, times)
        block(d.body, own | fixed | stacked, times * (d.trips or 1))

    block(program.body, set(), 1)
    return found


def _first_of_its_kind(program, units):
    """{folded tensor: the first that the same ops make of the same weights}: equal ones are kept once."""
    first, seen = {}, {}
    for op in walk(program.body):
        if op.blocks or not all(o in units.static for o in op.outputs):
            continue
        made = op.prim, repr(sorted(op.attrs.items())), tuple(first.get(i, i) for i in op.inputs)
        for n, o in enumerate(op.outputs):
            first[o] = seen.setdefault((*made, n), o)
    return first


def _channels(unit, w):
    """Output channels of a weight, of all matrices of a batch."""
    op = unit.op
    if op.kind == "conv":
        return op.dims.out_channels
    (lc, rc), _ = op.attrs["dimension_numbers"]
    summed = lc if w.id == op.inputs[0] else rc
    return w.size // max(prod(w.shape[d] for d in summed), 1)


def folded_from(program, i) -> int:
    """Entries of the weights and constants that a folded tensor is made of; 0 for a weight itself."""
    made = {o: op for op in program.body.ops for o in op.outputs}
    if i not in made:
        return 0
    seen, todo, total = set(), [i], 0
    while todo:
        j = todo.pop()
        if j in seen:
            continue
        seen.add(j)
        if j in made:
            todo += made[j].inputs
        elif is_float(program.tensors[j].dtype):
            total += program.tensors[j].size
    return total
