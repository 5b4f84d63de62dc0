"""The GGUF reader: what is written comes back, and no file, however broken, does more than raise."""

import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.formats import dequantize, quantize
from ref.models.gguf import load_gguf
from tests.models.gguf_bytes import gguf_bytes, string, value

RNG = np.random.default_rng(0)
METADATA = {
    "general.name": "a small one",
    "general.count": 7,
    "general.flag": True,
    "general.size": 0.5,
    "list.numbers": [1, 2, 3],
    "list.words": ["one", "two", "Ωmega"],
    "list.lists": [[1, 2], [3]],
    "list.empty": [],
}
TENSORS = {
    "a.weight": (RNG.standard_normal((3, 64)), "Q4_1"),
    "b.weight": (RNG.standard_normal((2, 2, 32)), "Q8_0"),
    "c.weight": (RNG.standard_normal(5), "F32"),
    "d.weight": (RNG.standard_normal((4, 6)), "F16"),
}
GOOD = gguf_bytes(METADATA, TENSORS)


@pytest.fixture
def stored(tmp_path):
    def store(content):
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return path

    return store


@pytest.mark.parametrize("version", [2, 3])
def test_gguf_reads_back_what_was_written(stored, version):
    file = load_gguf(stored(gguf_bytes(METADATA, TENSORS, version=version)))
    assert file.metadata == METADATA
    assert list(file.tensors) == list(TENSORS)
    for name, (array, kind) in TENSORS.items():
        t = file.tensors[name]
        assert (t.shape, t.kind) == (array.shape, kind)
        np.testing.assert_array_equal(t.raw, quantize(array, kind=kind))
        assert dequantize(t.raw, kind=kind).shape == array.shape
        assert not t.raw.flags.writeable  # a view of the mapped file


def test_gguf_alignment_comes_from_the_file(stored):
    content = gguf_bytes({"general.alignment": 64}, TENSORS, alignment=64)
    np.testing.assert_array_equal(
        load_gguf(stored(content)).tensors["a.weight"].raw, quantize(TENSORS["a.weight"][0], kind="Q4_1")
    )


def changed(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def pairs(*content):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(content)) + b"".join(content)


def one_tensor(axes, kind=0, offset=0):
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string("t") + struct.pack("<I", len(axes))
    return head + struct.pack(f"<{len(axes)}Q", *axes) + struct.pack("<IQ", kind, offset) + bytes(256)


BROKEN = {
    "empty": (b"", "too few"),
    "other": (b"PK\3\4" + bytes(40), "starts with"),
    "old": (gguf_bytes({}, {}, version=1) + bytes(16), "version 1"),
    "new": (gguf_bytes({}, {}, version=4) + bytes(16), "version 4"),
    "swapped": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "key-value pairs cannot fit"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "tensors cannot fit"),
    "key": (pairs(struct.pack("<Q", 2**50) + bytes(64)), "bytes cannot fit"),
    "utf8": (pairs(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64)), "not UTF-8"),
    "type": (pairs(string("k") + struct.pack("<I", 13) + bytes(16)), "unknown value type 13"),
    "items": (pairs(string("k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(16)), "items of 'k' cannot fit"),
    "words": (pairs(string("k") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(16)), "items of 'k' cannot fit"),
    "nested": (pairs(string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "deeper than"),
    "twice": (pairs(string("k") + value(1), string("k") + value(2)), "comes twice"),
    "same name": (changed(string("b.weight"), string("a.weight")), "'a.weight' comes twice"),
    "alignment": (pairs(string("general.alignment") + value(12)), "multiple of 8, got 12"),
    "alignment text": (pairs(string("general.alignment") + value("32")), "multiple of 8, got '32'"),
    "no axes": (one_tensor(()), "0 axes"),
    "axes": (one_tensor((1,) * 9), "9 axes"),
    "no length": (one_tensor((4, 0)), "axis of length 0"),
    "kind": (one_tensor((32,), kind=16), "unknown kind IQ2_XXS"),
    "kind number": (one_tensor((32,), kind=99), "unknown kind number 99"),
    "row": (one_tensor((33,), kind=3), "33 weights, not a multiple of Q4_1's 32"),
    "offset": (one_tensor((4,), offset=5), "not a multiple of the alignment"),
    "far": (one_tensor((4,), offset=2**62), "cut off"),
    "huge": (one_tensor((2**62, 2**62, 2**62, 2**62)), "cut off"),
}


@pytest.mark.parametrize("name", BROKEN, ids=lambda n: n.replace(" ", "_"))
def test_gguf_rejects_a_broken_file(stored, name):
    content, words = BROKEN[name]
    with pytest.raises(ValueError, match=words):
        load_gguf(stored(content))


def test_gguf_rejects_every_truncation(stored):
    """Cut anywhere, the file is refused: the last tensor ends where the file does, but for the padding."""
    end = len(GOOD) - (-4 * 6 * 2 % 32)
    for n in [*range(0, end, 3), end - 1]:
        with pytest.raises(ValueError, match=r"cut off|too few|cannot fit"):
            load_gguf(stored(GOOD[:n]))


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_gguf_survives_corrupted_bytes(tmp_path_factory, seed, n):
    """Random bytes anywhere: it loads or raises ValueError, and what loads can be decoded."""
    rng = np.random.default_rng(seed)
    content = bytearray(GOOD)
    for at in rng.integers(0, len(content) // rng.choice([1, 2]), n):  # the head is the interesting half
        content[at] = rng.choice([0, 1, 255, rng.integers(256)])
    path = tmp_path_factory.mktemp("gguf") / "file"
    path.write_bytes(content)
    try:
        file = load_gguf(path)
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in file.tensors.values():
            assert dequantize(t.raw, kind=t.kind).shape == t.shape


def test_gguf_names_what_is_missing(stored):
    file = load_gguf(stored(GOOD))
    with pytest.raises(ValueError, match="no tensor 'x'"):
        file.tensor("x")
    with pytest.raises(ValueError, match="has no 'x'"):
        file.value("x")
    with pytest.raises(OSError, match="No such file"):
        load_gguf("no/such/file.gguf")


@pytest.mark.model
def test_gguf_agrees_with_the_library_on_the_whole_model():
    """Every tensor of the trained file, bytes and values, as the gguf package reads them."""
    import gguf

    from ref.language.smollm2 import find_smollm2

    ours, theirs = load_gguf(find_smollm2()), gguf.GGUFReader(find_smollm2())
    assert len(ours.tensors) == len(theirs.tensors) == 272
    assert len(ours.metadata) == 33
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert mine.shape == tuple(int(n) for n in t.shape[::-1])
        assert mine.kind == t.tensor_type.name
        rows = slice(0, 64)
        np.testing.assert_array_equal(
            dequantize(mine.raw[rows] if mine.raw.ndim > 1 else mine.raw, kind=mine.kind),
            gguf.quants.dequantize(t.data[rows] if t.data.ndim > 1 else t.data, t.tensor_type),
        )
