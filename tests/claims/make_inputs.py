"""Make the embedded inputs of ref/data again: `python -m tests.claims.make_inputs`, --check to compare only.

Needs `triptych fetch smollm2`, `triptych fetch plays` and scikit-learn. The files come out byte for byte, as
long as zlib compresses alike; the arrays in them come out the same in any case.
"""

import argparse
import io
import re
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

from ref.blocks.attention import split_heads
from ref.blocks.norms import rms_norm
from ref.blocks.rope import rope
from ref.fetch import fetch
from ref.language.smollm2 import encode, forward, load_smollm2
from ref.models.llama import LlamaBlock

BLOCK, TOKENS, DIGITS, CHARACTERS = 10, 96, 400, 48_000


def play():
    """Hamlet from the monologue on, without Markdown: speakers in capitals, no headings, no blank lines."""
    text = (fetch("plays") / "tragedies" / "hamlet.md").read_text(encoding="utf-8")
    text = text[text.index("To be, or not to be") :]
    lines = [re.sub(r"[*_>\\]", "", line).strip() for line in text.splitlines() if not line.startswith("#")]
    text = "\n".join(line for line in lines if line)
    return text[: text.rindex("\n", 0, CHARACTERS) + 1]


def activations(text):
    """Queries, keys and values of block 10 on the text's first 96 tokens, and two states of the residual."""
    weights = load_smollm2()
    ids = encode(text[:2000])[:TOKENS]
    _, cache, hidden = forward(weights, ids, return_hidden=True)
    b = LlamaBlock(*(w[BLOCK] for w in weights.blocks))
    h = rms_norm(hidden[BLOCK], b.attn_norm, eps=weights.eps)
    q = rope(split_heads(h @ b.w_q, b.w_q.shape[-1] // cache.shape[-1]), weights.angles[:TOKENS])
    k, v = cache[BLOCK]
    half = lambda x: x.astype(np.float16)
    return (
        {"ids": ids.astype(np.int32), "q": half(q), "k": half(k), "v": half(v)},
        {"early": half(hidden[1]), "middle": half(hidden[BLOCK + 1])},
    )


def digits():
    """400 of scikit-learn's digits, drawn with seed 0, in their order there."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.target))[:DIGITS])
    return {
        "images": data.images[chosen].astype(np.uint8),
        "labels": data.target[chosen].astype(np.uint8),
    }


def made():
    """{file: bytes} of everything in ref/data that is made."""
    text = play()
    attention, hidden = activations(text)
    arrays = {"attention.npz": attention, "hidden.npz": hidden, "digits.npz": digits()}
    return {**{name: _npz(a) for name, a in arrays.items()}, "text.txt": text.encode()}


def _npz(arrays):
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def main():
    """Write the files, or with --check say which differ from those of the checkout."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    check = parser.parse_args().check
    folder, different = Path(str(files("ref.data"))), []
    for name, content in made().items():
        if (folder / name).exists() and (folder / name).read_bytes() == content:
            continue
        different.append(name)
        if not check:
            (folder / name).write_bytes(content)
    print("all files are as made" if not different else f"different: {', '.join(different)}")
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
