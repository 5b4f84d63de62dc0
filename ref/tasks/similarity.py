"""Texts with human judgements of their likeness: 50 short documents, and 353 pairs of words.

Sources: Lee, Pincombe and Welsh 2005 (documents); Finkelstein et al. 2002 (WordSimilarity-353). Files:
`triptych fetch lee` and `triptych fetch wordsim`.
"""

from pathlib import Path

import numpy as np


def load_lee(folder):
    """(documents: list of 50 str, human [50, 50] in 0..1, the upper triangle rated)."""
    folder = Path(folder)
    documents = (folder / "lee.cor").read_text(encoding="latin-1").strip("\n").split("\n")
    human = np.loadtxt(folder / "similarities0-1.txt")
    if len(documents) != 50 or human.shape != (50, 50):
        raise ValueError(f"{folder} holds {len(documents)} documents and ratings {list(human.shape)}")
    return documents, human


def load_wordsim(path):
    """(pairs: list of (word, word), human [n]: mean rating in 0..10)."""
    rows = [line.split("\t") for line in Path(path).read_text().splitlines() if line[:1] not in ("#", "")]
    if not rows or any(len(r) != 3 for r in rows):
        raise ValueError(f"{path} is no table of word, word and rating")
    return [(a, b) for a, b, _ in rows], np.array([float(r) for _, _, r in rows])
