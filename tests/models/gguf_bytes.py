"""A writer of small GGUF files for tests: the layout written out, sharing no line with the reader."""

import struct

import numpy as np

from ref.blocks.formats import quantize

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "BF16": 30}


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(x):
    """Type number and bytes of a metadata value."""
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, str):
        return struct.pack("<I", 8) + string(x)
    items = [value(i) for i in x]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """The bytes of a file with these values, and tensors {name: (float array, kind)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    data = b""
    for name, (array, kind) in tensors.items():
        raw = quantize(np.asarray(array, np.float32), kind=kind).tobytes()
        head += string(name) + struct.pack("<I", array.ndim)
        head += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        head += struct.pack("<IQ", NUMBERS[kind], len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def llama_file(rng, *, dim=64, depth=2, heads=4, kv_heads=2, hidden=96, vocab=40, context=32, kind="Q4_1"):
    """(metadata, tensors) of a small network of the llama family, head size 16, the embedding in Q8_0."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": depth,
        "llama.context_length": context,
        "llama.embedding_length": dim,
        "llama.feed_forward_length": hidden,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": 16,
    }
    w = lambda rows, cols: (rng.standard_normal((rows, cols)) / np.sqrt(cols), kind)
    tensors = {"token_embd.weight": (rng.standard_normal((vocab, dim)), "Q8_0")}
    for i in range(depth):
        tensors |= {
            f"blk.{i}.attn_norm.weight": (1 + rng.random(dim), "F32"),
            f"blk.{i}.attn_q.weight": w(16 * heads, dim),
            f"blk.{i}.attn_k.weight": w(16 * kv_heads, dim),
            f"blk.{i}.attn_v.weight": w(16 * kv_heads, dim),
            f"blk.{i}.attn_output.weight": w(dim, 16 * heads),
            f"blk.{i}.ffn_norm.weight": (1 + rng.random(dim), "F32"),
            f"blk.{i}.ffn_gate.weight": w(hidden, dim),
            f"blk.{i}.ffn_up.weight": w(hidden, dim),
            f"blk.{i}.ffn_down.weight": w(dim, hidden),
        }
    return metadata, tensors | {"output_norm.weight": (1 + rng.random(dim), "F32")}
