"""Running an op program in NumPy: loops, branches and kernels for real, every op in a policy's arithmetic.

    outputs, seen = run_program(program, args)                 # float32 and kin, as JAX computes them
    outputs, seen = run_program(program, args, policy=policy)  # in the number formats of a target

What an execution learns, trip counts, branches taken, blocks that kernels moved, is in the `Trace`; a report
of `execute` is priced with it.
"""

import re
import sys
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from hw import numerics
from hw.errors import UnsupportedPrimitive
from hw.program import Block, Kernel, Op, Program, is_float, itemsize, numpy_dtype
from hw.traffic import moved_blocks


@dataclass(frozen=True)
class Record:
    """One execution of a leaf op: its operands and results as they were."""

    op: Op
    inputs: tuple
    outputs: tuple


@dataclass
class Trace:
    """What an execution saw.

    runs: {op id: executions}. trips: {id of a loop: (iterations, runs)}. branches: {id of a branch: times
    each was taken}. moved: {id of a kernel: [(blocks, bytes) of each operand over all its runs]}. records:
    every leaf op's operands and results, in order, if asked for. events: {what: how often}, such as values
    that saturated.
    """

    runs: dict[int, int] = field(default_factory=dict)
    trips: dict[int, tuple[int, int]] = field(default_factory=dict)
    branches: dict[int, list[int]] = field(default_factory=dict)
    moved: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)

    @property
    def taken(self) -> dict:
        """Trips and branches in one table, as prices want them."""
        return {**self.trips, **self.branches}

    def measured(self, program: Program) -> Program:
        """The program with the real trips of loops, and the real work and traffic of kernels."""
        return replace(program, body=self._block(program.body))

    def _block(self, block):
        ops = []
        for op in block.ops:
            if op.kind == "kernel":
                op = self._kernel(op)
            elif op.blocks:
                op = self._trips(replace(op, dims=_with_blocks(op.dims, [self._block(b) for b in op.blocks])))
            ops.append(op)
        return replace(block, ops=tuple(ops))

    def _trips(self, op):
        if op.kind != "loop" or op.id not in self.trips:
            return op
        return replace(op, dims=replace(op.dims, trips=_share(*self.trips[op.id])))

    def _kernel(self, op):
        runs = self.runs.get(op.id, 0)
        if not runs:
            return op
        share = lambda n: _share(n, runs)
        moved = zip(op.dims.operands, self.moved[op.id], strict=True)
        operands = tuple(
            replace(o, fetches=share(f), moved=share(b)) if o.memory == "block" else o for o, (f, b) in moved
        )

        def counted(block):
            ops = []
            for x in block.ops:
                dims = _with_blocks(x.dims, [counted(b) for b in x.blocks]) if x.blocks else x.dims
                attrs = x.attrs | {"resolved": True} if x.kind == "branch" else x.attrs
                x = replace(x, trips=share(self.runs.get(x.id, 0)), dims=dims, attrs=attrs)
                ops.append(replace(x, dims=replace(dims, trips=0)) if _never(x) else self._trips(x))
            return replace(block, ops=tuple(ops))

        return replace(op, dims=replace(op.dims, operands=operands, body=counted(op.dims.body)))


def _never(op):
    return op.kind == "loop" and op.trips == 0


def _share(n, runs):
    return n // runs if n % runs == 0 else n / runs


def _with_blocks(dims, blocks):
    """A structured record with other bodies, in the order of its `blocks`."""
    if hasattr(dims, "branches"):
        return replace(dims, branches=tuple(blocks))
    if getattr(dims, "cond", None) is not None:
        return replace(dims, cond=blocks[0], body=blocks[1])
    return replace(dims, body=blocks[0])


class FloatPolicy:
    """Every op in the arithmetic of its dtypes, as JAX computes it."""

    name = "as written"

    def dtype(self, tensor) -> str:
        """The dtype that stores a tensor."""
        return tensor.dtype

    def carrier(self, dtype: str) -> np.dtype:
        """The NumPy type that carries values of a dtype."""
        return numpy_dtype(dtype)

    def enter(self, tensor, value, trace=None):
        """The value that an input or a constant has on the machine."""
        return value

    def compute(self, op, args, ins, outs, trace):
        """Results of a leaf op; ins, outs: the records of its operands and results."""
        return numerics.compute(op, args, outs)


def run_program(program: Program, args, *, policy=None, per_op: bool = False):
    """(outputs, Trace) of a program for the arguments it was traced with, of the same shapes and dtypes.

    Args: args: the arguments of the function, trees as then. policy: the arithmetic (FloatPolicy() if None).
      per_op: keep every op's operands and results in `Trace.records`; it takes the memory of them all.
    Returns: outputs: one array, or the tuple of the result's leaves in the order of `program.output_names`.
    Raises: ValueError if the arguments do not fit; UnsupportedPrimitive for what is priced but cannot be run.
    """
    values = _arguments(program, args)
    run = _Run(program.tensors, policy or FloatPolicy(), per_op)
    pairs = zip(program.body.inputs, values, strict=True)
    values = [run.policy.enter(program.tensors[i], v, run.trace) for i, v in pairs]
    outputs = run.block(program.body, values)
    single = program.output_names == ("result",)
    return outputs[0] if single else tuple(outputs), run.trace


def evaluate(op: Op, args, tensors):
    """Results of a leaf op; scalars may be vectors of them."""
    return numerics.compute(op, args, [tensors[o] for o in op.outputs])


def call_block(tensors, block: Block, args):
    """Results of a block of scalars; an argument with an axis more than its tensor holds one entry a call."""
    args = [np.asarray(a) for a in args]
    many = [a.ndim > len(tensors[i].shape) for i, a in zip(block.inputs, args, strict=True)]
    run = _Run(tensors, FloatPolicy(), False)
    if not any(many) or all(op.kind == "elementwise" for op in block.ops):
        return run.block(block, args)
    n = max(len(a) for a, m in zip(args, many, strict=True) if m)
    rows = [run.block(block, [a[s] if m else a for a, m in zip(args, many, strict=True)]) for s in range(n)]
    return [np.array(column) for column in zip(*rows, strict=True)]


class _Run:
    """One execution: values by tensor id, block by block; references of kernels are arrays that change."""

    def __init__(self, tensors, policy, per_op):
        self.tensors, self.policy, self.per_op = tensors, policy, per_op
        self.trace = Trace()
        self.constants, self.last = {}, {}
        self.step = self.grid = None  # of the kernel that runs

    def constant(self, i):
        if i not in self.constants:
            t = self.tensors[i]
            self.constants[i] = self.policy.enter(t, t.array, self.trace)
        return self.constants[i]

    def block(self, block: Block, args):
        env = dict(zip(block.inputs, args, strict=True))
        read = lambda i: env[i] if i in env else self.constant(i)
        last = self._last_uses(block)
        for n, op in enumerate(block.ops):
            outs = self.op(op, [read(i) for i in op.inputs])
            env.update(zip(op.outputs, outs, strict=True))
            for i in last[n]:
                env.pop(i, None)
        return [read(i) for i in block.outputs]

    def _last_uses(self, block):
        """For every op the tensors that are not needed after it."""
        if id(block) not in self.last:
            last, kept = {}, set(block.outputs)
            for n, op in enumerate(block.ops):
                last.update(dict.fromkeys((*op.inputs, *op.outputs), n))
            found = [[] for _ in block.ops]
            for i, n in last.items():
                if i not in kept:
                    found[n].append(i)
            self.last[id(block)] = found, block  # the block is kept, so that its id stays its own
        return self.last[id(block)][0]

    def op(self, op: Op, args):
        self.trace.runs[op.id] = self.trace.runs.get(op.id, 0) + 1
        if op.kind in _STRUCTURED:
            return getattr(self, _STRUCTURED[op.kind])(op, args)
        if op.prim in _REFERENCE:
            return getattr(self, op.prim)(op, args)
        if op.prim == "program_id":
            return [np.int32(self.step[op.attrs["axis"]])]
        if op.prim == "num_programs":
            return [np.int32(self.grid[op.attrs["axis"]])]
        outs = [self.tensors[o] for o in op.outputs]
        try:
            ins = [self.tensors[i] for i in op.inputs]
            results = self.policy.compute(op, args, ins, outs, self.trace)
        except NotImplementedError as e:
            shape = outs[0].shape if outs else ()
            raise UnsupportedPrimitive(op.prim, shape, op.scope, op.source, str(e)) from e
        if self.per_op:
            self.trace.records.append(Record(op, tuple(args), tuple(results)))
        return results

    def loop(self, op, args):
        d = op.dims
        cond_consts, rest = args[: d.cond_consts], args[d.cond_consts :]
        consts, carry = rest[: d.consts], list(rest[d.consts : d.consts + d.carries])
        n = 0
        if d.cond is not None:
            while bool(np.asarray(self.block(d.cond, [*cond_consts, *carry])[0])):
                carry = self.block(d.body, [*consts, *carry])
                n += 1
            ys = []
        else:
            xs = rest[d.consts + d.carries :]
            n = d.trips
            rows = []
            for s in reversed(range(n)) if d.reverse else range(n):
                out = self.block(d.body, [*consts, *carry, *(x[s] for x in xs)])
                carry = out[: d.carries]
                rows.append(out[d.carries :])
            rows = rows[::-1] if d.reverse else rows
            ys = [self._stack([r[k] for r in rows], o) for k, o in enumerate(op.outputs[d.carries :])]
        done, runs = self.trace.trips.get(op.id, (0, 0))
        self.trace.trips[op.id] = done + n, runs + 1
        return [*carry, *ys]

    def _stack(self, rows, o):
        if rows:
            return np.stack([np.asarray(r) for r in rows])
        t = self.tensors[o]
        return np.zeros(t.shape, self.policy.carrier(t.dtype))

    def branch(self, op, args):
        n = len(op.dims.branches)
        chosen = int(np.clip(int(np.asarray(args[0])), 0, n - 1))
        self.trace.branches.setdefault(op.id, [0] * n)[chosen] += 1
        return self.block(op.dims.branches[chosen], args[1:])

    def shard(self, op, args):
        raise UnsupportedPrimitive(
            "shard_map", self.tensors[op.outputs[0]].shape, op.scope, op.source, "it is priced, not run"
        )

    # Kernels

    def kernel(self, op, args):
        """Walk the grid. Blocks are views of the arrays, so that a block entered again keeps its content.

        What no step has written, scratch, and what a block holds beyond the edge of its array, is NaN
        (integers: 0), as in Pallas' interpret mode.
        """
        k: Kernel = op.dims
        inputs = [np.asarray(a) for a in args]
        outputs = [self._blank(self.tensors[o].shape, self.tensors[o].dtype) for o in op.outputs]
        for i, o in k.aliases:
            outputs[o] = inputs[i].astype(outputs[o].dtype)
        arrays = [*inputs, *outputs]
        scratch = [self._blank(s, d) for s, d in k.scratch]
        prefetch = arrays[: k.prefetch]
        places = [[] for _ in k.operands]
        before = self.step, self.grid
        self.grid = k.grid
        for self.step in product(*(range(n) for n in k.grid)):
            refs, back = [], []
            for n, (o, x) in enumerate(zip(k.operands, arrays, strict=True)):
                if o.memory != "block":
                    refs.append(x)
                    continue
                at = self._index(o, prefetch)
                places[n].append(at)
                ref, edge = _window(x, at, o, self._blank)
                refs.append(ref)
                if edge and o.output:
                    back.append((x, *edge))
            self.block(k.body, [*refs, *scratch])
            for x, inside, ref, part in back:
                x[inside] = ref[part]
        self.step, self.grid = before
        self._moved(op, places)
        return outputs

    def _blank(self, shape, dtype):
        x = np.zeros(shape, self.policy.carrier(dtype))
        if is_float(dtype):
            x[...] = np.nan
        return x

    def _index(self, o, prefetch):
        steps = [np.int32(s) for s in self.step]
        extra = prefetch[: len(o.index_map.inputs) - len(steps)]
        runs = self.trace.runs
        self.trace.runs = {}  # where a block lies is no work of the body
        per_op, self.per_op = self.per_op, False
        at = tuple(int(i) for i in self.block(o.index_map, [*steps, *extra]))
        self.trace.runs, self.per_op = runs, per_op
        return at

    def _moved(self, op, places):
        k = op.dims
        aliased = {b for _, b in k.aliases}
        first = len(k.operands) - len(op.outputs)
        total = self.trace.moved.setdefault(op.id, [(0, 0)] * len(k.operands))
        for n, (o, at) in enumerate(zip(k.operands, places, strict=True)):
            if o.memory == "block":
                at = np.array(at, np.int64).reshape(len(at), len(o.block))
                f, e = moved_blocks(at, o.block, o.array, o.output, n - first in aliased, n, o.element)
                total[n] = total[n][0] + f, total[n][1] + int(-(-e * itemsize(o.dtype) // 1))

    # References of a kernel body: (operands, attrs) with an index a part an axis

    def get(self, op, args):
        return [np.array(args[0][self._at(args[0], op.attrs["index"], args)])]

    def swap(self, op, args):
        ref, at = args[0], self._at(args[0], op.attrs["index"], args)
        old = np.array(ref[at])
        ref[at] = np.asarray(args[1]).reshape(old.shape)
        return [old] if op.outputs else []

    def addupdate(self, op, args):
        ref, at = args[0], self._at(args[0], op.attrs["index"], args)
        ref[at] = (np.asarray(ref[at]) + np.asarray(args[1])).astype(ref.dtype)
        return []

    def masked_load(self, op, args):
        a = op.attrs
        if a.get("mask") is None:
            return self.get(op, args)
        ref, mask = args[0], np.asarray(args[a["mask"]], bool)
        other = args[a["other"]] if a.get("other") is not None else np.zeros((), ref.dtype)
        at = self._at(ref, a["index"], args)
        return [np.where(mask, ref[at], np.asarray(other).astype(ref.dtype))]

    def masked_swap(self, op, args):
        a = op.attrs
        ref, value = args[0], np.asarray(args[a["value"]])
        at = self._at(ref, a["index"], args)
        old = np.array(ref[at])
        mask = np.asarray(args[a["mask"]], bool) if a.get("mask") is not None else np.ones(old.shape, bool)
        ref[at] = np.where(mask, value, old)
        return [old] if op.outputs else []

    def dma_start(self, op, args):
        a = op.attrs
        source, target = args[a["source"]], args[a["target"]]
        target[self._at(target, a["target_index"], args)] = source[self._at(source, a["source_index"], args)]
        return []

    def dma_wait(self, op, args):
        return []

    semaphore_signal = semaphore_wait = dma_wait

    def semaphore_read(self, op, args):
        return [np.int32(0)]

    def _at(self, ref, index, args):
        """NumPy's index for a reference; starts are clamped as a dynamic slice clamps them."""
        if index is None:
            return ...
        value = lambda v: np.asarray(args[v[1]]) if isinstance(v, tuple) else v
        parts = []
        for axis, part in enumerate(index):
            if part[0] == "at":
                i = value(part[1])
                i = np.clip(i, 0, ref.shape[axis] - 1)
                parts.append(i if np.ndim(i) else int(i))
            else:
                _, start, size, stride = part
                room = max(ref.shape[axis] - ((size - 1) * stride + 1), 0)
                start = int(np.clip(int(value(start)), 0, room))
                parts.append(slice(start, start + (size - 1) * stride + 1 if size else start, stride))
        return tuple(parts)


_STRUCTURED = {"loop": "loop", "branch": "branch", "shard": "shard", "kernel": "kernel"}
_REFERENCE = frozenset(
    "get swap addupdate masked_load masked_swap dma_start dma_wait semaphore_signal semaphore_wait "
    "semaphore_read".split()
)


def _window(x, at, o, blank):
    """(block as the body sees it, None) or, over an edge, (padded copy, (inside, copy, its part))."""
    inside, part, whole = [], [], True
    for d, (i, b, n) in enumerate(zip(at, o.block, o.array, strict=True)):
        start = i * (1 if d in o.element else b)
        lo, hi = max(start, 0), min(start + b, n)
        whole &= lo == start and hi == start + b
        inside.append(slice(lo, max(hi, lo)))
        part.append(slice(lo - start, max(hi, lo) - start))
    inside, part = tuple(inside), tuple(part)
    drop = tuple(0 if d in o.squeezed else slice(None) for d in range(len(o.block)))
    if whole:
        return x[inside][drop], None
    copy = blank(o.block, o.dtype)
    copy[part] = x[inside]
    return copy[drop], (inside, copy, part)


# Arguments


def _arguments(program, args):
    args = tuple(args)
    if len(args) != len(program.arguments):
        names = ", ".join(program.arguments) or "none"
        raise ValueError(f"args holds {len(args)} values, but the arguments of {program.name} are {names}")
    place = {name: n for n, name in enumerate(program.arguments)}
    values = []
    for i, name in zip(program.body.inputs, program.input_names, strict=True):
        t, root = program.tensors[i], re.match(r"\w+", name)[0]
        value = _array(_follow(args[place[root]], name[len(root) :], name))
        if value.shape != t.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but was traced with {list(t.shape)}")
        values.append(value if t.dtype == "key<fry>" else numerics.cast(value, t.dtype))
    return values


_STEP = re.compile(r"\.(\w+)|\[(-?\d+)\]|\['([^']*)'\]|\[<flat index (\d+)>\]")


def _follow(x, path, name):
    """The leaf of a tree at a path such as .blocks[0].w_q or ['w']."""
    while path:
        step = _STEP.match(path)
        if step is None:
            raise ValueError(f"cannot find {name} in the arguments: the path {path!r} is of an unknown kind")
        field_, index, key, flat = step.groups()
        try:
            if field_ is not None:
                x = getattr(x, field_)
            elif key is not None:
                x = x[key]
            elif index is not None:
                x = x[int(index)]
            else:
                x = list(x)[int(flat)]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise ValueError(f"args has no {name}, which the program was traced with") from None
        path = path[step.end() :]
    return x


def _array(x):
    if str(getattr(x, "dtype", "")).startswith("key<"):  # a typed key exists only where JAX is loaded
        words = np.asarray(sys.modules["jax"].random.key_data(x)).astype(np.uint64)
        return (words[..., 0] << np.uint64(32)) | words[..., 1]
    return np.asarray(x)
