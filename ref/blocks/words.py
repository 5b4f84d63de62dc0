r"""Texts as words: tokens, counts, ids by a word list, and cutting to a length.

A token is a match of \w+(?:['’\-]\w+)*|[^\w\s], a word if it begins with \w; keys are casefolded.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ref.checks import one_of

TOKEN = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")
MODES = ("head", "head_tail")
PAD, CLS, SEP, UNKNOWN = range(4)  # ids of `word_encoder`


class Encoder(NamedTuple):
    """encode: text -> ids without special tokens; vocab: how many ids; unknown: the id of what it lacks."""

    encode: Callable
    vocab: int
    unknown: int | None = None


def split_tokens(text):
    """Words and single marks of the text, in order, as they are spelled."""
    return TOKEN.findall(text)


def is_word(token):
    """Whether a token begins with a letter, a digit or an underscore."""
    return re.match(r"\w", token) is not None


def word_counts(texts):
    """Counter of casefolded words: of the training split alone, or the test leaks into what is cut by it."""
    return Counter(t.casefold() for text in texts for t in split_tokens(text) if is_word(t))


def truncate(ids, *, length, mode="head", cls_id, sep_id):
    """[CLS, ids cut to length - 2, SEP], int64.

    mode: "head" keeps the first ids, "head_tail" fills 3/4 of the room, rounded down, from the front and the
    rest from the end.
    Raises: ValueError for a length under 3 or another mode.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3, CLS and SEP and a piece, got {length}")
    one_of("mode", mode, MODES)
    ids, room = list(ids), length - 2
    if len(ids) > room:
        front = room if mode == "head" else 3 * room // 4
        ids = ids[:front] + ids[len(ids) - (room - front) :]
    return np.array([cls_id, *ids, sep_id], np.int64)


def word_encoder(counts, *, size):
    """Encoder of the `size` commonest words and marks, ties by name; 0..3 are PAD, CLS, SEP and unknown."""
    ranked = sorted(counts, key=lambda w: (-counts[w], w))[:size]
    ids = {w: n + 4 for n, w in enumerate(ranked)}
    encode = lambda text: [ids.get(t.casefold(), UNKNOWN) for t in split_tokens(text)]
    return Encoder(encode, len(ids) + 4, UNKNOWN)
