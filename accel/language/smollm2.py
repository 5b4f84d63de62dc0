"""SmolLM2-135M in JAX: the network of accel/models/llama.py, the loader and tokenizer of ref."""

import jax.numpy as jnp

from accel.blocks.formats import dequantize
from accel.models.llama import (
    candidate_logits,
    decode_step,
    forward,
    generate,
    init_cache,
    prefill,
    to_device,
)
from ref.language import smollm2 as ref_smollm2
from ref.language.smollm2 import (
    GGUFFile,
    GGUFTensor,
    LlamaBlock,
    LlamaConfig,
    LlamaWeights,
    SmolLM2Config,
    Tokenizer,
    chat,
    decode,
    encode,
    find_smollm2,
    half_split,
    init_llama,
    llama_costs,
    load_gguf,
    sample,
    tiny_smollm2,
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
    "to_device",
]


def load_smollm2(path=None, *, dtype="float32", keep_quantized=False) -> LlamaWeights:
    """The weights on JAX's device, matrices in dtype: "float32", "bfloat16", or "float64" under x64.

    Norms and rotary angles stay at least float32. The rest as ref: path, keep_quantized.
    """
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(f'dtype must be "float32", "bfloat16" or "float64", got {dtype!r}')
    return to_device(ref_smollm2.load_smollm2(path, keep_quantized=keep_quantized), jnp.dtype(dtype))
