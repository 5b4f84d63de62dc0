"""Emoji as a data set: 1,906 small colour pictures in nine main groups and 98 subgroups.

Source: the Noto drawings in the package emoji-datasource-google (`triptych fetch emoji`). One picture a base
symbol, so that the skin tones of one symbol cannot stand on both sides of a split.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ref.blocks.png import read_png

TILE, CELL = 64, 66  # pixels of a picture, and of its cell in the sheet: a border of one all around


class Emoji(NamedTuple):
    """images [n, 64, 64, 3] uint8 on white; group [n], subgroup [n] ints; their names."""

    images: np.ndarray
    group: np.ndarray
    subgroup: np.ndarray
    groups: tuple[str, ...]
    subgroups: tuple[str, ...]


def load_emoji(folder) -> Emoji:
    """All base symbols but the five building blocks of skin tones, in the order of the index."""
    folder = Path(folder)
    index = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    index = [e for e in index if e["category"] != "Component"]
    sheet = read_png((folder / "sheets-clean" / f"{TILE}.png").read_bytes())
    tiles = [
        sheet[CELL * e["sheet_y"] + 1 :, CELL * e["sheet_x"] + 1 :][:TILE, :TILE].astype(np.float32)
        for e in index
    ]
    rgba = np.stack(tiles)
    alpha = rgba[..., 3:] / 255
    images = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    groups = tuple(sorted({e["category"] for e in index}))
    subgroups = tuple(sorted({e["subcategory"] for e in index}))
    at = lambda names, key: np.array([names.index(e[key]) for e in index])
    return Emoji(images, at(groups, "category"), at(subgroups, "subcategory"), groups, subgroups)
