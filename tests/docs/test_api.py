"""The API reference: every public name has an entry, docstrings become right Markdown, its sessions run."""

import ast
import doctest
import html
import importlib
import re
import sys
from pathlib import Path

import pytest

import ref
from ref.catalog import CATALOG

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import api  # noqa: E402
import docstrings  # noqa: E402


def plain(markdown):
    """What a reader sees of Markdown made from a docstring."""
    text = re.sub(r"\[(`+[^`]+`+)\]\[[^\]]+\]", r"\1", markdown)
    text = re.sub(r"^(?::   |```.*$)", "", text, flags=re.MULTILINE)
    return html.unescape(text.replace("`", ""))


def test_api_pages_hold_every_module_once():
    """Whatever stands in the three packages, but the command line and files without public names."""
    shown = [module for _, modules in api.pages().values() for module in modules]
    assert len(shown) == len(set(shown))
    for layer in ("ref", "accel", "hw"):
        for path in (ROOT / layer).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name in ("__init__.py", "__main__.py") or module.startswith(api.APART):
                continue
            own, borrowed = api.names(module)
            assert (module in shown) == bool(own or borrowed), module


@pytest.mark.parametrize("t", CATALOG, ids=lambda t: t.slug)
def test_api_has_every_public_name_of_a_technique(t):
    """Each name of `__all__` with a docstring is an entry, its own or that of the file it comes from."""
    module = f"ref.{t.part}.{t.slug}"
    loaded = importlib.import_module(module)
    entries = api.documented()
    names = getattr(loaded, "__all__", [])
    assert all(fn.split(".")[0] in names for fn in t.core) or not names
    for name in names or (fn.split(".")[0] for fn in t.core):
        value = getattr(loaded, name)
        if callable(value) and getattr(value, "__module__", "").startswith("ref."):
            at = f"{value.__module__}.{value.__qualname__}"
            assert at in entries, name
            assert api.home(module, name) == at
    text = api.of_chapter(f"{t.part}/{t.slug}.md")
    assert all(f"[`{fn}`][" in text for fn in t.core if "." not in fn)


def test_api_links_lead_to_entries():
    entries = api.documented()
    pages = [api.text_of(page) for page in api.pages() if not page.startswith("ref/")]
    chapters = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    for text in [*pages, *map(api.of_chapter, chapters)]:
        for target in re.findall(r"`\]\[([\w.]+)\]", text):
            assert target in entries, target


@pytest.mark.parametrize("t", CATALOG, ids=lambda t: t.slug)
def test_api_session_of_a_technique_runs(t):
    """As a reader would type it: what it says that comes out comes out."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    session = api.example_lines(t)
    test = parser.get_doctest(session + "\n", {}, t.slug, None, 0)
    said = []
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
    assert runner.tries >= 1 + 3 * len(api.calls(t))
    assert {e.fn for e in getattr(ref, t.slug).example()} == set(
        re.findall(rf"out = ref\.{t.slug}\.([\w.]+)\(", session)
    )


def test_api_session_of_the_first_page_runs():
    runner = doctest.DocTestRunner(verbose=False)
    said = []
    runner.run(doctest.DocTestParser().get_doctest(api.SESSION + "\n", {}, "index", None, 0), out=said.append)
    assert not runner.failures, "".join(said)


def test_api_docstring_of_every_entry_is_shown_whole():
    """Markdown of a docstring says its words, all of them and in their order."""

    words = lambda text: re.sub(
        r"\b(?:Args|Arguments|Fields)\b:?|(?<=Returns|.Raises|.Source):|\s|`|:", "", text
    )
    for module in (m for _, modules in api.pages().values() for m in modules):
        for node in ast.walk(api.tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (
                doc := ast.get_docstring(node)
            ):
                known = [a.arg for a in ast.walk(node) if isinstance(a, ast.arg)]
                shown = plain(docstrings.markdown(doc, known=known))
                assert words(shown) == words(doc), f"{module} {getattr(node, 'name', '')}"


def test_api_docstring_sections_shapes_and_links():
    text = """softmax(q k^T) v of [..., L, D] arrays; see `merge`.

    Args: q [..., L, D], k [S, D]: what *x_i holds; scale: a factor. mask: bool,
        True = *seen*.
      order: "q_outer" or
        "k_outer".
    Returns: o [L, Dv]. Raises: ValueError naming the argument
    at fault.
    Not a section: text.

        code(1)  # one
    """
    got = docstrings.markdown(text, {"merge": "ref.x.merge"}.get, ("q", "k", "mask", "order", "scale"))
    assert got.split("\n\n") == [
        "softmax(q k&#94;T) v of `[..., L, D]` arrays; see [`merge`][ref.x.merge].",
        "Arguments\n:   `q [..., L, D]`, `k [S, D]`: what &#42;x&#95;i holds; scale: a factor.",
        ":   `mask`: bool, True = &#42;seen&#42;.",
        ':   `order`: "q&#95;outer" or "k&#95;outer".',
        "Returns\n:   `o [L, Dv]`.",
        "Raises\n:   `ValueError` naming the argument at fault.",
        "Not a section: text.",
        "```python\ncode(1)  # one\n```",
    ]
