"""Reader of GGUF files, versions 2 and 3: named values, then tensors, mapped into memory and never copied.

A file is a magic number, a version, two counts, the key-value pairs, one record a tensor (name, sizes, kind,
offset), and the data, aligned. Everything is little endian. The file is not trusted: every length is checked
against the bytes that are left before anything is read or made, and whatever is wrong is a ValueError that
says what and where.
"""

import struct
from dataclasses import dataclass
from math import prod

import numpy as np

from ref.blocks.formats import BLOCKS

# The numbers that files give the kinds; those without a decoder are here so that an error can name them.
_KINDS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

# Value types: number -> format of one item; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 8
_DEEPEST = 4  # arrays of arrays; none is known to go beyond one


@dataclass(frozen=True)
class GGUFTensor:
    """shape: as NumPy has it, rows first. kind: number format. raw: uint8 [*shape[:-1], bytes a row]."""

    shape: tuple[int, ...]
    kind: str
    raw: np.ndarray


@dataclass(frozen=True)
class GGUFFile:
    """metadata: key -> number, bool, str or list. tensors: name -> GGUFTensor, views of the mapped file."""

    metadata: dict
    tensors: dict[str, GGUFTensor]

    def tensor(self, name):
        """The tensor of that name. Raises: ValueError that says which file lacks it."""
        if name not in self.tensors:
            raise ValueError(f"the file holds no tensor {name!r}; it has {len(self.tensors)} others")
        return self.tensors[name]

    def value(self, key):
        """The metadata under `key`. Raises: ValueError if there is none."""
        if key not in self.metadata:
            raise ValueError(f"the file's metadata has no {key!r}")
        return self.metadata[key]


def load_gguf(path) -> GGUFFile:
    """Metadata and tensors of a GGUF file, version 2 or 3, little endian; the data stays in the file.

    Raises: OSError if it cannot be opened; ValueError, saying what and at which byte, if it is not GGUF, is
    cut off or corrupt, or holds a kind of tensor without a decoder.
    """
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        if size < 24:
            raise ValueError(f"{path} is not a GGUF file: {size} bytes are too few")
        data = np.memmap(f, np.uint8, "r").view(np.ndarray)  # a plain view keeps the map alive
    cursor = _Cursor(data, str(path))
    if (magic := cursor.take(4)) != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big endian" if swapped in (1, 2, 3) else f"version {version}"
        raise ValueError(f"{path} is GGUF, {what}; versions 2 and 3, little endian, can be read")
    n_tensors, n_pairs = cursor.number("Q"), cursor.number("Q")
    cursor.room(n_pairs, 13, "key-value pairs")  # 8 for the key's length, 4 for the type, 1 for the value
    metadata = {}
    for _ in range(n_pairs):
        key = cursor.string("a key")
        if key in metadata:
            raise cursor.error(f"the key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.number("I"), key)
    cursor.room(n_tensors, 32, "tensors")  # 8 name, 4 axes, 8 for one size, 4 kind, 8 offset
    records = [cursor.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment % 8:
        raise cursor.error(f"general.alignment must be a positive multiple of 8, got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in records:
        if name in tensors:
            raise cursor.error(f"the tensor {name!r} comes twice")
        tensors[name] = _tensor(data, path, start, name, shape, kind, offset, alignment)
    return GGUFFile(metadata, tensors)


def _tensor(data, path, start, name, shape, kind, offset, alignment):
    weights, size = BLOCKS[kind]
    if shape[-1] % weights:
        raise ValueError(
            f"{path}: rows of {name!r} have {shape[-1]} weights, not a multiple of {kind}'s {weights}"
        )
    if offset % alignment:
        raise ValueError(f"{path}: {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
    raw_shape = (*shape[:-1], shape[-1] // weights * size)
    begin, nbytes = start + offset, prod(raw_shape)
    if begin + nbytes > len(data):
        raise ValueError(
            f"{path} is cut off: {name!r} ends at byte {begin + nbytes}, but the file has {len(data)}"
        )
    return GGUFTensor(shape, kind, data[begin : begin + nbytes].reshape(raw_shape))


class _Cursor:
    """A place in the file; every read is checked against what is left."""

    def __init__(self, data, path):
        self.data, self.path, self.at = memoryview(data), path, 0

    def error(self, what):
        return ValueError(f"{self.path} is corrupt near byte {self.at}: {what}")

    def room(self, count, least, what):
        """Raise unless `count` items of at least `least` bytes can still come."""
        left = len(self.data) - self.at
        if count * least > left:
            raise self.error(f"{count} {what} cannot fit the {left} bytes that are left (is it cut off?)")

    def take(self, n):
        self.room(n, 1, "bytes")
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def number(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, what):
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.error(f"{what} is not UTF-8: {e.reason}") from None

    def value(self, kind, key, depth=0):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind != _ARRAY:
            raise self.error(f"{key!r} has the unknown value type {kind}")
        if depth == _DEEPEST:
            raise self.error(f"{key!r} nests arrays deeper than {_DEEPEST}")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            code = _SCALARS[item]
            self.room(count, struct.calcsize("<" + code), f"items of {key!r}")
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        self.room(count, 8 if item == _STRING else 12, f"items of {key!r}")
        return [self.value(item, key, depth + 1) for _ in range(count)]

    def tensor(self):
        """(name, shape with rows first, kind, offset) of one record."""
        name, axes = self.string("a tensor's name"), self.number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise self.error(f"{name!r} has {axes} axes; 1 to {_MOST_AXES} are possible")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]  # the file lists the fastest axis first
        number, offset = self.number("I"), self.number("Q")
        kind = _KINDS.get(number, f"number {number}")
        if kind not in BLOCKS:
            raise ValueError(
                f"{self.path}: {name!r} is of the unknown kind {kind}; there are {', '.join(BLOCKS)}"
            )
        if 0 in shape:
            raise self.error(f"{name!r} has an axis of length 0")
        return name, shape, kind, offset
