"""all-MiniLM-L6-v2, a sentence encoder of six BERT blocks, in float32 and as other people's int8 of it.

Source: Wang et al. 2020 (arXiv 2002.10957) for the network, Reimers and Gurevych 2019 for the use. Files:
`triptych fetch minilm` and `triptych fetch minilm_int8`.
"""

import numpy as np

from ref.blocks.transformer import BlockParams
from ref.models.bert import BertParams, bert_encode
from ref.models.tensor_files import load_onnx, load_safetensors

NUM_HEADS, EPS, LONGEST = 12, 1e-12, 256


def load_minilm(path) -> BertParams:
    """The encoder from model.safetensors, float32, without its unused pooler."""
    arrays = load_safetensors(path)
    return _bert(arrays, lambda name: arrays[f"{name}.weight"].T, lambda name: arrays[name])


def load_minilm_int8(path) -> BertParams:
    """The encoder from model.onnx, whose matrices and embeddings are int8 with a scale a column or row."""
    arrays = load_onnx(path)
    inner = lambda name: arrays[f"inner.{name}"]
    return _bert(arrays, lambda name: arrays[f"inner.{name}.bias/weight"], inner)


def sentence_vector(ids, params: BertParams, *, encode=bert_encode):
    """The mean of the token states, of length 1: ids [T] -> [d].

    encode: what replaces `bert_encode`, with the same arguments.
    """
    x = encode(np.asarray(ids), params, num_heads=NUM_HEADS, eps=EPS).mean(axis=-2)
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))


def load_tokenizer(path):
    """text -> ids, lower case WordPiece with [CLS] and [SEP], at most 256. Needs the package tokenizers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    return lambda text: np.array(tokenizer.encode(text).ids)


def _bert(arrays, matrix, vector):
    depth = sum(name.endswith("attention.self.query.bias") for name in arrays)
    if not depth:
        raise ValueError(f"{arrays.path} holds no block of the encoder")

    def block(prefix):
        maps = {
            "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
            "o": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense",
        }  # fmt: skip
        norms = {"ln1": "attention.output.LayerNorm", "ln2": "output.LayerNorm"}
        fields = {f"w_{k}": np.ascontiguousarray(matrix(f"{prefix}.{n}")) for k, n in maps.items()}
        fields |= {f"b_{k}": vector(f"{prefix}.{n}.bias") for k, n in maps.items()}
        fields |= {f"{k}_scale": vector(f"{prefix}.{n}.weight") for k, n in norms.items()}
        fields |= {f"{k}_bias": vector(f"{prefix}.{n}.bias") for k, n in norms.items()}
        return BlockParams(**fields)

    return BertParams(
        word=vector("embeddings.word_embeddings.weight"),
        position=vector("embeddings.position_embeddings.weight"),
        token_type=vector("embeddings.token_type_embeddings.weight"),
        ln_scale=vector("embeddings.LayerNorm.weight"),
        ln_bias=vector("embeddings.LayerNorm.bias"),
        blocks=tuple(block(f"encoder.layer.{i}") for i in range(depth)),
    )
