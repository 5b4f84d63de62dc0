"""The op program: a function as plain records, with explicit loops, known sizes and tensor lifetimes.

A `Program` holds tensors by id and one `Block` of ops in execution order. Loops, branches and kernels are ops
whose `dims` record holds their bodies as blocks; a block is closed: it uses its inputs, what it computes, and
constants. Everything is a frozen dataclass of numbers, strings and tuples and survives JSON, so that pricing
and running need neither JAX nor the function.
"""

import base64
import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

# Bytes of an element where NumPy alone does not know the type. Sub-byte types are stored packed.
_ITEM_BYTES = {
    "bfloat16": 2,
    "key<fry>": 8,  # a threefry key: two 32-bit words
    "int4": 0.5,
    "uint4": 0.5,
    "int2": 0.25,
    "uint2": 0.25,
    "float4_e2m1fn": 0.5,
}


def itemsize(dtype: str) -> float:
    """Bytes of one element of a dtype by name, fractional below 8 bits."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    if dtype.startswith("float8"):
        return 1
    return np.dtype(dtype).itemsize


def is_float(dtype: str) -> bool:
    """Is it a floating-point format, by name."""
    return dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True)
class Tensor:
    """A value: role is input, weight, const (its bytes in `data`), activation or output."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    role: str = "activation"
    name: str = ""
    producer: int | None = None  # id of the op that makes it
    consumers: tuple[int, ...] = ()
    data: bytes | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up."""
        return int(-(-self.size * itemsize(self.dtype) // 1))

    @property
    def array(self) -> np.ndarray:
        """The value of a constant. Raises: ValueError for a tensor that is not one."""
        if self.data is None:
            raise ValueError(f"tensor {self.id} ({self.role}) has no stored value")
        return np.frombuffer(self.data, numpy_dtype(self.dtype)).reshape(self.shape)


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype that carries a dtype name; bfloat16 and kin need ml_dtypes, which comes with JAX."""
    if dtype == "key<fry>":
        return np.dtype(np.uint64)
    try:
        return np.dtype(dtype)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype))


@dataclass(frozen=True)
class MatmulDims:
    """b products [m, k] x [k, n]; a ragged product has `groups` weight matrices and macs m k n."""

    b: int
    m: int
    n: int
    k: int
    groups: int = 1
    tiles: tuple[int, ...] | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.b * self.m * self.n * self.k


@dataclass(frozen=True)
class ConvDims:
    """A convolution; `macs` leaves out the taps that fall on padding."""

    batch: int
    in_channels: int
    out_channels: int
    in_spatial: tuple[int, ...]
    out_spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    macs: int


@dataclass(frozen=True)
class ElementwiseDims:
    """n outputs, each by `ops` operations of class add, div, transcendental or index (integers)."""

    n: int
    ops: int
    cls: str


@dataclass(frozen=True)
class ReduceDims:
    """rows results (or rows of results), each over `length` elements, by `ops` operations in all."""

    rows: int
    length: int
    ops: int
    cls: str


@dataclass(frozen=True)
class MoveDims:
    """Elements that a movement really touches: taken from its first operand, and written; `ops` adds."""

    read: int
    written: int
    ops: int = 0
    cls: str = "add"


@dataclass(frozen=True)
class CollectiveDims:
    """`elements` of every device meet over `devices` devices."""

    elements: int
    devices: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """One primitive; `trips` counts its executions, enclosing loops included (None: not known)."""

    id: int
    kind: str
    prim: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dims: object = None
    scope: str = ""
    trips: int | None = 1
    recompute: bool = False
    attrs: dict = field(default_factory=dict)
    source: str = ""

    @property
    def label(self) -> str:
        """Scope and primitive, for people."""
        return f"{self.scope}/{self.prim}" if self.scope else self.prim

    @property
    def blocks(self) -> tuple:
        """The bodies of a structured op."""
        return getattr(self.dims, "blocks", ())


@dataclass(frozen=True)
class Block:
    """Ops in execution order; closed but for constants."""

    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """`body` maps (consts, carries, xs slices) to (carries, ys slices), `trips` times (None: not known).

    A while loop has a `cond` block over (cond_consts, carries); its inputs are (cond_consts, consts,
    carries).
    """

    body: Block
    trips: int | None
    consts: int
    carries: int
    xs: int = 0
    reverse: bool = False
    cond: Block | None = None
    cond_consts: int = 0
    name: str = ""

    @property
    def blocks(self) -> tuple:
        """Condition (if any) and body."""
        return (self.body,) if self.cond is None else (self.cond, self.body)


@dataclass(frozen=True)
class Branch:
    """One of several blocks, chosen by the first input."""

    branches: tuple[Block, ...]

    @property
    def blocks(self) -> tuple:
        """The branches."""
        return self.branches


@dataclass(frozen=True)
class KernelOperand:
    """An operand of a kernel: its block (a number per array axis), index map, where it lives, what it moves.

    `squeezed` axes are absent from the block that the body sees; on `element` axes the index counts elements.
    memory: "block" (pipelined), "any" (the body moves it itself) or "prefetch" (scalars, whole).
    fetches, moved: blocks and bytes over the whole grid; None if the index map needs prefetched values.
    """

    array: tuple[int, ...]
    dtype: str
    block: tuple[int, ...]
    squeezed: tuple[int, ...]
    index_map: Block | None
    output: bool
    memory: str = "block"
    element: tuple[int, ...] = ()
    fetches: int | None = None
    moved: int | None = None


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: `body` runs once at each grid step on blocks of the operands and on scratch.

    `trips` of the ops of the body count their executions over the whole grid.
    """

    name: str
    grid: tuple[int, ...]
    operands: tuple[KernelOperand, ...]
    body: Block
    prefetch: int = 0
    aliases: tuple[tuple[int, int], ...] = ()  # (input, output)
    scratch: tuple[tuple[tuple[int, ...], str], ...] = ()
    claimed: dict | None = None  # the author's own cost_estimate

    @property
    def steps(self) -> int:
        """Grid steps."""
        return prod(self.grid)

    @property
    def footprint(self) -> int:
        """On-chip bytes: two of every block (one works, one is in flight) and the scratch."""
        blocks = sum(prod(o.block) * itemsize(o.dtype) for o in self.operands if o.memory == "block")
        return int(2 * blocks + sum(prod(s) * itemsize(d) for s, d in self.scratch))

    @property
    def blocks(self) -> tuple:
        """The body."""
        return (self.body,)


@dataclass(frozen=True)
class Shard:
    """A body that runs on every device of a mesh, on parts of the inputs; specs name mesh axes per axis."""

    body: Block
    mesh: tuple[tuple[str, int], ...]
    in_specs: tuple
    out_specs: tuple

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return prod(n for _, n in self.mesh)

    @property
    def blocks(self) -> tuple:
        """The body."""
        return (self.body,)


@dataclass(frozen=True)
class Program:
    """A traced function. input_names, output_names: the leaves of its `arguments` and results, as paths."""

    name: str
    tensors: dict[int, Tensor]
    body: Block
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """All leaf ops in order, loop bodies and branches included, each with its trips."""
        return tuple(op for op in walk(self.body) if not op.blocks or op.kind == "kernel")

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops, outer before inner."""
        return tuple(op.dims for op in walk(self.body) if op.kind == "loop")

    @cached_property
    def scopes(self) -> tuple[str, ...]:
        """Scope paths in order of first use."""
        return tuple(dict.fromkeys(op.scope for op in walk(self.body)))

    def tensor(self, i: int) -> Tensor:
        """The tensor with id i."""
        return self.tensors[i]

    def bytes(self, role: str) -> int:
        """Bytes of the inputs, weights, constants or outputs, the outputs as the function returns them."""
        if role == "output":
            return sum(self.tensors[i].nbytes for i in self.body.outputs)
        if role == "const":
            return sum(t.nbytes for t in self.tensors.values() if t.role == "const")
        return sum(t.nbytes for i in self.body.inputs if (t := self.tensors[i]).role == role)

    def to_json(self) -> str:
        """The program as JSON text."""
        return json.dumps({"format": "triptych-op-program", "version": 1, "program": _encode(self)})

    @staticmethod
    def from_json(text: str) -> "Program":
        """The program that `to_json` wrote. Raises: ValueError for other text."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"not JSON: {e}") from None
        if not isinstance(raw, dict) or raw.get("format") != "triptych-op-program" or raw.get("version") != 1:
            raise ValueError("not an op program: needs format triptych-op-program, version 1")
        return _decode(raw["program"])

    def to_dot(self) -> str:
        """The data flow in Graphviz' language, loops and kernels as clusters."""
        lines = ["digraph program {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
        for i in self.body.inputs:
            t = self.tensors[i]
            lines.append(f'  t{i} [shape=ellipse, label="{t.name or t.role} {list(t.shape)} {t.dtype}"];')
        self._dot(self.body, lines, "  ")
        for i in self.body.outputs:
            lines.append(f'  out{i} [shape=ellipse, label="result {list(self.tensors[i].shape)}"];')
            lines.append(f"  {self._source(i)} -> out{i};")
        return "\n".join([*lines, "}"])

    def _source(self, i):
        made = self.tensors[i].producer
        return f"t{i}" if made is None else f"op{made}"

    def _dot(self, block, lines, indent):
        for op in block.ops:
            trips = f" x{op.trips}" if op.trips != 1 else ""
            shape = list(self.tensors[op.outputs[0]].shape) if op.outputs else ""
            lines.append(f'{indent}op{op.id} [label="{op.prim} {shape}{trips}"];')
            for i in dict.fromkeys(op.inputs):
                if self.tensors[i].role != "const":
                    lines.append(f"{indent}{self._source(i)} -> op{op.id};")
            for n, inner in enumerate(op.blocks):
                lines.append(f'{indent}subgraph cluster_{op.id}_{n} {{ label="{op.prim}";')
                for i in inner.inputs:
                    t = self.tensors[i]
                    lines.append(f'{indent}  t{i} [shape=ellipse, label="{list(t.shape)} {t.dtype}"];')
                self._dot(inner, lines, indent + "  ")
                lines.append(f"{indent}}}")


def walk(block: Block):
    """Every op of a block and of the blocks inside, kernel bodies left closed."""
    for op in block.ops:
        yield op
        if op.kind != "kernel":
            for inner in op.blocks:
                yield from walk(inner)


_RECORDS = {
    c.__name__: c
    for c in (
        Tensor,
        MatmulDims,
        ConvDims,
        ElementwiseDims,
        ReduceDims,
        MoveDims,
        CollectiveDims,
        Op,
        Block,
        Loop,
        Branch,
        KernelOperand,
        Kernel,
        Shard,
        Program,
    )
}


def _encode(x):
    if dataclasses.is_dataclass(x):
        out = {"": type(x).__name__}
        for f in dataclasses.fields(x):
            value = getattr(x, f.name)
            if f.default is dataclasses.MISSING or value != f.default:
                out[f.name] = _encode(value)
        return out
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x):
            return {k: _encode(v) for k, v in x.items()}
        return {"": "dict", "items": [[k, _encode(v)] for k, v in x.items()]}
    if isinstance(x, tuple):
        return [_encode(v) for v in x]
    if isinstance(x, bytes):
        return {"": "bytes", "base64": base64.b64encode(x).decode()}
    if isinstance(x, float) and not np.isfinite(x):
        return {"": "float", "text": repr(x)}
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError(f"an op program holds plain values only, got {type(x).__name__}: {x!r}")


def _decode(x):
    if isinstance(x, list):
        return tuple(_decode(v) for v in x)
    if not isinstance(x, dict):
        return x
    kind = x.get("")
    if kind is None:
        return {k: _decode(v) for k, v in x.items()}
    if kind == "dict":
        return {k: _decode(v) for k, v in x["items"]}
    if kind == "bytes":
        return base64.b64decode(x["base64"])
    if kind == "float":
        return float(x["text"])
    if kind not in _RECORDS:
        raise ValueError(f"unknown record {kind!r} in an op program")
    return _RECORDS[kind](**{k: _decode(v) for k, v in x.items() if k})
