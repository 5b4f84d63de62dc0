"""The claims ledger and the bibliography: both read the chapters, so that they cannot say anything else."""

import contextlib
import io
import json
import os
import re
import warnings
from functools import cache
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_FENCE = re.compile(r'^```python exec="on"[^\n]*\n(.*?)^```', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")

# Kinds of status, the first whose pattern is found.
KINDS = {
    "not reproduced": r"not reproduced|not reached|not in general",
    "out of reach": r"^out of reach|^private",
    "reproduced": r"reproduced|agree",
    "proved or counted": r"proved|derived|asserted|counted|counts|tested",
    "modelled": r"model|cycles|ordering",
    "measured": r"measured|stand-in|within the noise|mixed|consistent",
}


def chapters():
    """(page, title, text) of every technique's chapter and of the hardware chapters, in the book's order."""
    from ref.catalog import CATALOG

    pages = [f"{t.part}/{t.slug}.md" for t in CATALOG] + [f"hw/{p}.md" for p in "ir gpu pim fpga mcu".split()]
    for page in pages:
        if (DOCS / page).exists():
            text = (DOCS / page).read_text()
            yield page, text.split("\n", 1)[0].removeprefix("# "), text


def section(text, heading):
    """What stands under a heading of the second level, or None."""
    found = re.search(rf"^## {heading}[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else None


@cache
def claims(text):
    """Rows [claim, reported, here, status] of a chapter's claims, as Markdown; code that prints them is run.

    They are the first table of four columns under "Claims".
    """
    body = section(text, "Claims") or ""
    for code in (None, *_FENCE.findall(body)):
        lines = (_FENCE.sub("", body) if code is None else _output(code)).splitlines()
        cells = [
            [c.strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]] if x[:1] == "|" else None for x in lines
        ]
        starts = [i for i, c in enumerate(cells) if c and len(c) == 4 and set("".join(c)) <= set("-: ")]
        if starts:
            return list(takewhile(bool, cells[starts[0] + 1 :]))
    return []


def _output(code):
    """What a fence prints. The code is the book's own, and runs as the build runs it."""
    out, here = io.StringIO(), os.getcwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # short pages leave closing files to Python
            exec(code, {"__name__": "__main__"})
    finally:
        os.chdir(here)
    return out.getvalue()


def kind(status):
    """The class of a status in words: a key of KINDS, or "open"."""
    return next((k for k, pattern in KINDS.items() if re.search(pattern, status.lower())), "open")


def undecided(text):
    """The points under "What is left open" that speak of a paper's claims."""
    body = section(text, "What is left open") or ""
    points = [" ".join(p.split()) for p in re.split(r"^- ", body, flags=re.MULTILINE)[1:]]
    words = r"claim|abstract|out of reach|experiment|figure|accurac|perplex|measure"
    return [p for p in points if re.search(words, p, re.IGNORECASE)]


def address(page):
    """The address of docs/<page> from a page of docs/start: what links that code prints must be."""
    path, mark, anchor = page.partition("#")
    return f"../../{path.removesuffix('.md').removesuffix('index')}/{mark}{anchor}"


def moved(markdown, page):
    """The Markdown of docs/<page> with its links made to work from docs/start/."""
    folder = page.split("/")[0]
    return _LINK.sub(lambda m: f"]({address(os.path.normpath(f'{folder}/{m[1]}'))})", markdown)


def records():
    """The stored results of docs/data: (name, date, device, JAX version)."""
    for path in sorted((DOCS / "data").glob("*.json")):
        r = json.loads(path.read_text())
        yield r["name"], r["date"], r["device"], r.get("versions", {}).get("jax", "")


def citation(text):
    """The italic line under a chapter's title, without its stars, or None."""
    found = re.search(r"\A# [^\n]*\n\n\*(.+?)\*\n\n", text, re.DOTALL)
    return " ".join(found[1].split()) if found else None
