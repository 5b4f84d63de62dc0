"""Prints a few chapters of a built book and fails on what a reader of the paper would miss.

Usage: python tests/browser/paper.py SITE_FOLDER (CHROMIUM names the browser, else one on PATH is taken)
"""

import re
import sys
import tempfile
import time
from pathlib import Path

from hw.commands.book_pdf import document, page_numbers, page_objects, print_book

PAGES = ("start/attention", "attention/flash", "memory/rum")

# Of the document as it is printed: what is left of the screen's forms, and what lies outside of the page.
LEFT = """(() => {
  const main = document.querySelector("main"), edge = main.getBoundingClientRect().right + 1;
  const all = (selector) => [...main.querySelectorAll(selector)];
  const outside = (x) => !x.closest("svg, .katex-mathml") && x.getBoundingClientRect().right > edge;
  const brief = (x) => `${x.localName}.${x.className}: ${x.textContent.slice(0, 60)}`;
  return {
    forms: all("details, .tabbed-set, .live-bar, .headerlink, script, form").map(brief),
    hidden: all(".print-panel, .admonition, figure, pre").filter((x) => !x.offsetHeight).map(brief),
    wide: all("*").filter(outside).map(brief).slice(0, 5),
    tabs: all(".print-tab").map((x) => x.textContent),
    text: main.textContent,
  };
})()"""


def main(site):
    """Every check, then one line with what it took."""
    since = time.monotonic()
    with document(site, PAGES) as (browser, told):
        assert [c["path"] for c in told["chapters"]] == list(PAGES), told
        assert told["equations"] > 50, told["equations"]
        assert not told["wrong"], told["wrong"]
        left = browser.value(LEFT)
        assert not left["forms"], left["forms"]
        assert not left["hidden"], f"not shown: {left['hidden']}"
        assert not left["wide"], f"wider than the page: {left['wide']}"
        html = "".join((site / page / "index.html").read_text() for page in PAGES)
        assert left["tabs"] == re.findall(r'<label for="__tabbed_\w+">([^<]*)</label>', html)
        assert len(left["tabs"]) >= 9, left["tabs"]
        flat = lambda text: "".join(text.split())
        for path in ("ref/attention/flash.py", "accel/attention/flash.py", "accel/memory/rum.py"):
            assert flat(Path(path).read_text()) in flat(left["text"]), f"{path} is not printed whole"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "book.pdf"
        result = print_book(site, file, only=PAGES)
        data = file.read_bytes()
    at = [result["chapters"][page] for page in PAGES]
    assert at == sorted(set(at)), at
    assert at[0] > 2, at  # behind a title, the contents and a part's title
    assert result["pages"] == len(page_objects(data)) > at[-1], result
    links = page_numbers(data)
    assert links["attention.flash"] == at[1], links
    assert data.count(b"/Outlines") >= 1
    assert b"/URI (https://arxiv.org/abs/2205.14135)" in data
    print(f"paper: {result['pages']} pages of {len(PAGES)} chapters in {time.monotonic() - since:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
