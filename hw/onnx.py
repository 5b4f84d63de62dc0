"""ONNX files as op programs: a model that was never JAX is priced, planned and run like any other.

    program, weights = hw.from_onnx("model.onnx", sizes={"batch": 1})
    hw.estimate(program, hw.h200())
    hw.run_program(program, (*inputs, weights))

A node becomes the primitives that JAX would use for it (`hw/onnx_nodes.py`); what depends on shapes and
constants alone, the bookkeeping of exporters, is computed on the way and leaves no op. Needs the package
onnx.
"""

import re
from pathlib import Path

import numpy as np

from hw.errors import DynamicShape, UnsupportedPrimitive
from hw.numerics import compute
from hw.onnx_nodes import NODES
from hw.passes import finish, prune, resolve
from hw.primitives import rule
from hw.program import Block, Op, Program, Tensor

FOLDED = 4096  # elements up to which integers are constants, and what follows from constants is computed
FEW = 16  # elements up to which any array is a constant: scales, limits


def from_onnx(path, *, sizes=None) -> tuple[Program, dict[str, np.ndarray]]:
    """(program, weights by name) of an ONNX file; its arguments are the graph's inputs, then `weights`.

    Args: path: the file, or the bytes of one. sizes: {name of an axis whose length the file leaves open: its
      length}; `ValueError` tells the names.
    Raises: ValueError for what onnx cannot read, for a length that is missing or unknown to the file;
      UnsupportedPrimitive, with the node's name, for an operator without a rule here; DynamicShape where a
      shape depends on data. ImportError if onnx is not installed.
    """
    graph, opset, title = _load(path)
    g = _Graph(opset)
    arrays = _arrays(graph)
    open_axes = _open_axes([i for i in graph.input if i.name not in arrays])
    sizes = dict(sizes or {})
    for name in sizes:
        if name not in open_axes:
            raise ValueError(f"sizes names {name!r}, but the open axes are {', '.join(open_axes) or 'none'}")
    if missing := [a for a in open_axes if a not in sizes]:
        raise ValueError(f"sizes needs the length of {', '.join(map(repr, missing))}")
    for i in graph.input:
        if i.name not in arrays:
            kind = i.type.tensor_type
            shape = tuple(d.dim_value or sizes[d.dim_param] for d in kind.shape.dim)
            g.values[i.name] = g.tensor(shape, _dtype(kind.elem_type), "input", i.name)
    inputs = [g.values[i.name] for i in graph.input if i.name not in arrays]
    weights = {}
    for name, array in arrays.items():
        if array.size <= (FEW if array.dtype.kind == "f" else FOLDED):
            g.values[name] = g.constant(array)
        else:
            g.values[name] = g.tensor(array.shape, str(array.dtype), "weight", name)
            inputs.append(g.values[name])
            weights[name] = array
    for node in graph.node:
        g.run(node)
    block = prune(Block(tuple(inputs), tuple(g.ops), tuple(g.values[o.name] for o in graph.output)))
    block = resolve(g.tensors, block, {}, 1)
    arguments = [re.sub(r"\W", "_", g.tensors[i].name) for i in inputs[: len(inputs) - len(weights)]]
    names = (*arguments, *(f"weights['{name}']" for name in weights))
    out_names = ("result",) if len(graph.output) == 1 else tuple(f"result.{o.name}" for o in graph.output)
    return Program(title, finish(g.tensors, block), block, names, out_names, (*arguments, "weights")), weights


class _Graph:
    """Tensors, ops and the values of names so far; what is known is computed and not appended."""

    def __init__(self, opset):
        self.opset, self.tensors, self.ops, self.values, self.known = opset, {}, [], {}, {}
        self.scope, self.node = "", ""

    def tensor(self, shape, dtype, role="activation", name="", data=None):
        """A new tensor's id."""
        i = len(self.tensors)
        self.tensors[i] = Tensor(i, tuple(int(n) for n in shape), str(dtype), role, name, data=data)
        return i

    def constant(self, array):
        """The id of a known array."""
        array = np.asarray(array)
        data = np.ascontiguousarray(array).tobytes()
        i = self.tensor(array.shape, array.dtype, "const", data=data)
        self.known[i] = array
        return i

    def shape(self, i):
        """Shape of a tensor."""
        return self.tensors[i].shape

    def dtype(self, i):
        """dtype of a tensor, by name."""
        return self.tensors[i].dtype

    def value(self, i, what):
        """The known array of a tensor. Raises: DynamicShape, naming what needs it."""
        if i not in self.known:
            raise DynamicShape(f"{self.node}: {what} depends on data")
        return self.known[i]

    def refuse(self, why):
        """The error of a node that has no rule."""
        return UnsupportedPrimitive(self.node, (), self.scope, "", why)

    def emit(self, prim, args, shape, dtype=None, /, **attrs):
        """The id of the result of one primitive; computed at once if all operands are known."""
        out = self.tensor(shape, dtype or self.dtype(args[0]))
        ins = [(self.shape(a), self.dtype(a)) for a in args]
        kind, dims = rule(prim, ins, [(self.shape(out), self.dtype(out))], attrs)
        op = Op(len(self.ops), kind, prim, tuple(args), (out,), dims, self.scope, 1, False, attrs, self.node)
        if all(a in self.known for a in args) and self.tensors[out].size <= FOLDED:
            return self.constant(compute(op, [self.known[a] for a in args], [self.tensors[out]])[0])
        self.ops.append(op)
        return out

    def run(self, node):
        """Append what a node does."""
        parts = node.name.strip("/").split("/")
        self.scope, self.node = "/".join(parts[:-1]), f"{node.op_type} {node.name}".strip()
        made = NODES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if made is None:
            raise self.refuse(f"no rule for the operator {node.domain or 'ai.onnx'}:{node.op_type}")
        args = [self.values[n] if n else None for n in node.input]
        outs = made(self, args, _attributes(node))
        outs = outs if isinstance(outs, list) else [outs]
        self.values.update(zip(node.output, outs, strict=False))


def _load(path):
    from onnx import load_from_string

    label = "the bytes" if isinstance(path, bytes) else path
    try:
        raw = path if isinstance(path, bytes) else Path(path).read_bytes()
        model = load_from_string(raw)
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    except OSError:
        raise
    except Exception as e:  # protobuf has its own errors: all mean that it is no such file
        raise ValueError(f"{label}: no readable ONNX model: {e}") from None
    if not model.graph.node:
        raise ValueError(f"{label}: a model without nodes")
    return model.graph, opset, model.graph.name or "onnx"


def _arrays(graph):
    """{name: array} of the weights."""
    from onnx import TensorProto
    from onnx.numpy_helper import to_array

    for i in graph.initializer:
        if i.data_location == TensorProto.EXTERNAL:
            raise ValueError(f"the weights {i.name!r} lie in another file")
    return {i.name: to_array(i) for i in graph.initializer}


def _open_axes(inputs):
    """Names of the axes whose length is not in the file, in order."""
    dims = [d for i in inputs for d in i.type.tensor_type.shape.dim]
    return list(dict.fromkeys(d.dim_param for d in dims if not d.dim_value and d.dim_param))


def _dtype(elem_type):
    from onnx.helper import tensor_dtype_to_np_dtype

    return str(np.dtype(tensor_dtype_to_np_dtype(elem_type)))


def _attributes(node):
    from onnx.helper import get_attribute_value

    plain = lambda x: x.decode() if isinstance(x, bytes) else x
    return {a.name: plain(get_attribute_value(a)) for a in node.attribute}
