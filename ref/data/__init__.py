"""Real input that travels with the package: activations of a language model, handwritten digits, a play.

Origin and licences: ref/data/ORIGIN.md. Everything is read through `importlib.resources`, so it works from a
wheel, a zip and the reader's browser.
"""

from importlib.resources import files

import numpy as np

from ref.models.tensor_files import load_npz


def attention_inputs():
    """q [9, 96, 64], k and v [3, 96, 64], float64: heads of SmolLM2-135M on Hamlet's monologue.

    Queries and keys of block 10 after rotary embedding; three query heads share a key head.
    """
    a = _arrays("attention.npz")
    return tuple(a[name].astype(np.float64) for name in "qkv")


def hidden_states(layer="middle"):
    """Residual stream [96, 576], float64, of the same text: after block 0 ("early") or block 10 ("middle").

    Raises: ValueError for another layer.
    """
    if layer not in ("early", "middle"):
        raise ValueError(f'layer must be "early" or "middle", got {layer!r}')
    return _arrays("hidden.npz")[layer].astype(np.float64)


def token_ids():
    """The 96 token ids of that text, int32 (SmolLM2's vocabulary of 49,152)."""
    return _arrays("attention.npz")["ids"]


def digits():
    """(images [400, 8, 8] uint8 in 0..16, labels [400] uint8): handwritten digits."""
    a = _arrays("digits.npz")
    return a["images"], a["labels"]


def text():
    """About 48,000 characters of Shakespeare's Hamlet, ASCII punctuation, speakers in capitals."""
    return files(__name__).joinpath("text.txt").read_text(encoding="utf-8")


def _arrays(name):
    return load_npz(files(__name__).joinpath(name).read_bytes())
