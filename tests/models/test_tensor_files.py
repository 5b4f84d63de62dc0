"""Readers of named arrays: what is written comes back, and no file, however broken, does more than raise."""

import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.png import read_png
from ref.models.dinov2 import load_dinov2
from ref.models.minilm import load_minilm
from ref.models.tensor_files import load_npz, load_onnx, load_safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.standard_normal((3, 4)).astype(np.float32),
    "b": RNG.integers(-9, 9, (2, 3, 2)).astype(np.int8),
    "c": np.float64(2.5).reshape(()),
    "empty": np.zeros((0, 3), np.float16),
}
NAMES = {"float32": "F32", "int8": "I8", "float64": "F64", "float16": "F16"}


def safetensors(arrays, **more):
    """The layout written out, sharing no line with the reader."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in arrays.items():
        end = len(data) + x.nbytes
        entry = {"dtype": NAMES[x.dtype.name], "shape": list(x.shape), "data_offsets": [len(data), end]}
        header[name], data = entry | more.get(name, {}), data + x.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def npz(arrays, save=np.savez_compressed):
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def onnx_file():
    """Two products, one with a bias, one with an int8 matrix behind a cast and a scale."""
    from onnx import TensorProto, helper, numpy_helper

    w, b = ARRAYS["a.weight"].T, np.arange(3, dtype=np.float32)
    q, scale = np.array([[1, -2], [3, 4], [127, 0]], np.int8), np.array([[0.5, 2]], np.float32)
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/enc/q/MatMul"),
            node("Add", ["enc.q.bias", "y"], ["z"]),
            node("Cast", ["w_q"], ["w_f"], to=TensorProto.FLOAT),
            node("Mul", ["w_f", "w_scale"], ["w"]),
            node("MatMul", ["z", "w"], ["out"], name="/enc/k/MatMul"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(v, n)
            for n, v in {"onnx::MatMul_7": w, "enc.q.bias": b, "w_q": q, "w_scale": scale}.items()
        ],
    )
    return helper.make_model(graph).SerializeToString(), w, q * scale


def png(pixels, filters, *, colour=6, depth=8):
    """A PNG whose rows are filtered as told, pixel by pixel."""
    H, W, c = pixels.shape
    x = np.zeros((H + 1, W + 1, c), int)
    x[1:, 1:] = pixels

    def guess(f, i, j, k):
        left, up, corner = x[i, j - 1, k], x[i - 1, j, k], x[i - 1, j - 1, k]
        near = min(
            (abs(up - corner), 0, left), (abs(left - corner), 1, up), (abs(left + up - 2 * corner), 2, corner)
        )
        return (0, left, up, (left + up) // 2, near[2])[f]

    places = [(j, k) for j in range(1, W + 1) for k in range(c)]
    rows = b"".join(
        bytes([f, *((x[i, j, k] - guess(f, i, j, k)) % 256 for j, k in places)])
        for i, f in enumerate(filters, start=1)
    )
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PIXELS = RNG.integers(0, 256, (6, 5, 4)).astype(np.uint8)
GOOD = {
    "safetensors": safetensors(ARRAYS),
    "npz": npz(ARRAYS),
    "stored": npz(ARRAYS, np.savez),
    "png": png(PIXELS, (0, 1, 2, 3, 4, 4)),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(kind, bytes): what the reader of that kind makes of a file with these bytes."""
    path = tmp_path_factory.mktemp("files") / "file"
    readers = {
        "safetensors": lambda: load_safetensors(path),
        "npz": lambda: load_npz(path),
        "stored": lambda: load_npz(path.read_bytes()),
        "png": lambda: {"": read_png(path.read_bytes())},
        "onnx": lambda: load_onnx(path),
    }

    def call(kind, content):
        path.unlink(missing_ok=True)  # a mapped file may still be open
        path.write_bytes(content)
        return readers[kind]()

    return call


@pytest.mark.parametrize("kind", ["safetensors", "npz", "stored"])
def test_tensor_files_read_back_what_was_written(load, kind):
    found = load(kind, GOOD[kind])
    assert list(found) == list(ARRAYS)
    for name, x in ARRAYS.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    with pytest.raises(ValueError, match="holds no array 'd'"):
        found["d"]


def test_tensor_files_widen_bfloat16_and_keep_column_order(load):
    half = np.array([1.0, -2.5, 3e38], np.float32)
    entry = {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}
    text = json.dumps({"h": entry}).encode()
    raw = (half.view(np.uint32) >> 16).astype("<u2").tobytes()
    found = load("safetensors", struct.pack("<Q", len(text)) + text + raw)
    np.testing.assert_array_equal(found["h"], (half.view(np.uint32) >> 16 << 16).view(np.float32))
    x = np.asfortranarray(ARRAYS["a.weight"])
    np.testing.assert_array_equal(load("npz", npz({"x": x}))["x"], x)


def test_tensor_files_png_undoes_every_filter():
    np.testing.assert_array_equal(read_png(GOOD["png"]), PIXELS)
    np.testing.assert_array_equal(read_png(png(PIXELS[:1, :, :1], (2,), colour=0)), PIXELS[:1, :, :1])
    with pytest.raises(ValueError, match="unknown filter 5"):
        read_png(_refiltered())
    with pytest.raises(NotImplementedError, match="16 bits"):
        read_png(png(PIXELS, (0,) * 6, depth=16))


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def zipped(name, content, **kw):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, content, **kw)
    return out.getvalue()


def npy(header, body=b""):
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BOMB = zipped("a.npy", bytes(1 << 20)).replace(struct.pack("<I", 1 << 20), b"\xff\xff\xff\x7f")
HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }\n"
BROKEN = {
    "short": ("safetensors", b"abc", "too few"),
    "long header": ("safetensors", struct.pack("<Q", 2**62) + bytes(8), "cannot fit"),
    "no json": ("safetensors", with_header(b"{nope"), "not JSON"),
    "deep json": ("safetensors", with_header(b"[" * 100_000), "not JSON"),
    "a list": ("safetensors", with_header([1]), "not a table"),
    "twice": ("safetensors", with_header(b'{"a": 1, "a": 2}'), "comes twice"),
    "no entry": ("safetensors", with_header({"t": 3}), "needs dtype"),
    "negative": ("safetensors", with_header({"t": F32 | {"shape": [-2]}}, bytes(8)), "whole numbers"),
    "true": ("safetensors", with_header({"t": F32 | {"shape": [True]}}, bytes(8)), "whole numbers"),
    "three ends": ("safetensors", with_header({"t": F32 | {"data_offsets": [0, 4, 8]}}, bytes(8)), "needs"),
    "dtype": ("safetensors", with_header({"t": F32 | {"dtype": "F8"}}, bytes(8)), "unknown dtype"),
    "outside": ("safetensors", with_header({"t": F32}, bytes(7)), "cut off"),
    "shape": ("safetensors", with_header({"t": F32 | {"shape": [2**40]}}, bytes(8)), "has 8 bytes"),
    "left over": ("safetensors", with_header({"t": F32}, bytes(12)), "end at byte 8 of 12"),
    "axes": ("safetensors", with_header({"t": F32 | {"shape": [2] + [1] * 40}}, bytes(8)), "41 axes"),
    "no zip": ("npz", b"nothing", "no readable npz"),
    "no array": ("npz", zipped("a.npy", b"text"), "no array file"),
    "pickle": ("npz", npz({"a": np.array([{}], object)}), "Python objects"),
    "huge": ("npz", zipped("a.npy", npy(HUGE)), "has 0 bytes"),
    "code": ("npz", zipped("a.npy", npy("__import__('os')\n")), "no array file"),
    "bomb": ("npz", BOMB, "more than it can hold"),
    "no png": ("png", b"GIF89a", "signature"),
    "no picture": ("png", GOOD["png"][:8] + GOOD["png"][-12:], "no header"),
}  # fmt: skip


def _refiltered():
    """A picture whose first row names a filter that there is not."""
    raw = GOOD["png"]
    at = raw.index(b"IDAT")
    length = struct.unpack(">I", raw[at - 4 : at])[0]
    rows = bytearray(zlib.decompress(raw[at + 4 : at + 4 + length]))
    rows[0] = 5
    data = zlib.compress(bytes(rows))
    check = struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return raw[: at - 4] + struct.pack(">I", len(data)) + b"IDAT" + data + check + raw[at + 8 + length :]


@pytest.mark.parametrize("name", BROKEN, ids=lambda n: n.replace(" ", "_"))
def test_tensor_files_reject_a_broken_file(load, name):
    kind, content, words = BROKEN[name]
    with pytest.raises(ValueError, match=words):
        load(kind, content)


@pytest.mark.parametrize("kind", GOOD)
def test_tensor_files_reject_every_truncation(load, kind):
    for n in range(0, len(GOOD[kind]) - 1, 7):
        with pytest.raises(ValueError, match=r"\w"):
            load(kind, GOOD[kind][:n])


@pytest.mark.parametrize("kind", GOOD)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_tensor_files_survive_corrupted_bytes(load, kind, seed, n):
    """Random bytes anywhere: the arrays are read, or ValueError is raised."""
    _corrupt(load, kind, GOOD[kind], seed, n)


def _corrupt(load, kind, good, seed, n):
    rng = np.random.default_rng(seed)
    content = bytearray(good)
    for at in rng.integers(0, len(content) // rng.choice([1, 2]), n):
        content[at] = rng.choice([0, 1, 255, rng.integers(256)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = load(kind, bytes(content))
        except ValueError:
            return
        assert all(isinstance(x, np.ndarray) for x in found.values())


def test_tensor_files_of_another_network_are_named(tmp_path):
    (tmp_path / "other").write_bytes(GOOD["safetensors"])
    with pytest.raises(ValueError, match="no block of the encoder"):
        load_minilm(tmp_path / "other")
    with pytest.raises(OSError, match="No such file"):
        load_safetensors(tmp_path / "nothing")


@pytest.mark.model
def test_tensor_files_onnx(load, tmp_path):
    """Matrices by module and by bias, int8 multiplied out; cut anywhere or scrambled it raises or loads."""
    good, w, scaled = onnx_file()
    found = load("onnx", good)
    for name in ("enc.q", "enc.q.bias/weight", "onnx::MatMul_7"):
        np.testing.assert_array_equal(found[name], w)
    np.testing.assert_array_equal(found["enc.k"], scaled)
    for n in range(0, len(good), 5):
        try:  # a message cut between two fields is a shorter message
            load("onnx", good[:n])
        except ValueError:
            continue
    for seed in range(200):
        _corrupt(load, "onnx", good, seed, 1 + seed % 8)
    (tmp_path / "other").write_bytes(good)
    with pytest.raises(ValueError, match="need blocks"):
        load_dinov2(tmp_path / "other")
    import onnx

    model = onnx.load(io.BytesIO(good))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../elsewhere")
    with pytest.raises(ValueError, match="in other files"):
        load("onnx", model.SerializeToString())
