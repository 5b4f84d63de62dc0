"""A chapter as a Jupyter notebook: its prose and equations, its cells, the files of ref and its exercises.

docs/hooks.py makes one beside every chapter at each build, from the chapter's own Markdown, so that the two
cannot differ. A notebook runs where triptych is installed; its first cells are START and SETUP.
"""

import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("start", "hw")  # beside the catalogue's parts

START = """# {title}

A chapter of *triptych*, as a notebook: the same text, equations and code. It runs where triptych is
installed; in a checkout of it, once:

```
pip install -e ".[test]" jupyterlab
```

Run the next cell first, then any. A cell that begins with `%%module` is a file of the library: edit and run
it, and all cells use your text from then on. Exercises are stubs; the cell under each is its test, and fails
until you have solved it.
"""

SETUP = '''
"""Finds triptych, and gives the cells below two magics: %%module and %%shown."""

try:
    import ref
except ImportError as e:
    told = 'triptych is not here: `pip install -e ".[test]"` in its checkout, then restart the kernel'
    raise ImportError(told) from e

import contextlib
import importlib.abc
import importlib.util
import io
import linecache
import os
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, Path(ref.__file__).parents[1]]
if root := next((p for p in places if (p / "mkdocs.yml").exists() and (p / "ref").is_dir()), None):
    os.chdir(root)
    sys.path[:0] = [str(root), str(root / "docs")]
else:
    print("Tables of stored results and the tests of exercises need a checkout: start Jupyter there.")


class Edited(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the modules that cells hold from the cells' text."""

    texts = {}

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.texts else None

    def get_source(self, name):
        return self.texts[name]

    def exec_module(self, module):
        text, file = self.texts[module.__name__], f"{module.__name__.replace('.', '/')}.py"
        module.__file__ = str(Path(ref.__file__).parents[1] / file)
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        exec(compile(text, file, "exec"), module.__dict__)


def module(line, cell):
    """%%module ref.attention.flash: from now on that module is the cell's text."""
    name = line.strip()
    file = Path(ref.__file__).parents[1] / f"{name.replace('.', '/')}.py"
    old = Edited.texts.get(name, file.read_text() if file.exists() else "")
    if cell.strip() == old.strip():
        return print(f"{name} is as it was")
    Edited.texts[name] = cell
    for other in [m for m in sys.modules if m.split(".")[0] in ("ref", "accel", "hw", "tests")]:
        del sys.modules[other]
    importlib.import_module(name)
    print(f"{name} is the text of this cell; cells that you run again use it")


def shown(line, cell):
    """%%shown html: what the cell prints is shown as HTML or as Markdown."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(cell, "<cell>", "exec"), get_ipython().user_ns)
    from IPython.display import HTML, Markdown, display

    display((HTML if line.strip() == "html" else Markdown)(out.getvalue()))


if not any(isinstance(f, Edited) for f in sys.meta_path):
    sys.meta_path.insert(0, Edited())
for magic in (module, shown):
    get_ipython().register_magic_function(magic, "cell")
'''.strip()

_FENCE = re.compile(r"( *)```(.*)")
_SNIPPET = re.compile(r'^--8<-- "([^":]+)(?::(\w+))?"$', re.MULTILINE)
_FOLDED = re.compile(r'(?:\?\?\?\+?|!!!) \w+(?: "(.*)")?$')
_TAB = re.compile(r'=== "(.*)"$')
_ITEM = re.compile(r"(\d+)\. +(.*)")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?:)[^()\s]+\)(?:\{[^}]*\})?")
PAGE_ONLY = ("from panel import", "from price import")  # sliders and forms, which live in the page


def snippet(path, section=None):
    """What `--8<-- "path:section"` includes."""
    lines = (ROOT / path).read_text().splitlines()
    if section:
        at = next(i for i, x in enumerate(lines) if re.search(rf"--8<-- \[start:{section}\]", x))
        end = next(i for i, x in enumerate(lines) if re.search(rf"--8<-- \[end:{section}\]", x))
        lines = lines[at + 1 : end]
    return textwrap.dedent("\n".join(x for x in lines if "--8<-- [" not in x)).strip("\n")


def cells(text):
    """[(kind, text)] of Markdown: "markdown", "code", or "test" for the check of an exercise."""
    out, lines = [], text.splitlines()

    def say(*words):
        if not (out and out[-1][0] == "markdown"):
            out.append(["markdown", ""])
        out[-1][1] += "\n".join(words) + "\n"

    def block(i):
        """The lines from i on that are indented, and where they end."""
        end = i
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
            end += 1
        while end > i and not lines[end - 1].strip():
            end -= 1
        return textwrap.dedent("\n".join(lines[i:end])), end

    i = 0
    while i < len(lines):
        line = lines[i]
        if fence := _FENCE.match(line):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].rstrip() == f"{fence[1]}```")
            body = textwrap.dedent("\n".join(lines[i + 1 : end]))
            for kind, words in fenced(fence[2], body):
                say(*words.splitlines()) if kind == "markdown" else out.append([kind, words])
            i = end + 1
        elif found := _FOLDED.match(line) or _TAB.match(line):
            inner, i = block(i + 1)
            inner = cells(inner)
            if line.startswith("==="):
                say("", f"### {found[1]}", "")
                out += inner
            elif all(kind == "markdown" for kind, _ in inner):
                body = "\n".join(words for _, words in inner).strip()
                say("", f"<details><summary>{found[1] or 'Note'}</summary>", "", body, "", "</details>", "")
            else:
                say("", f"**{found[1] or 'Note'}.**", "")
                out += inner
        elif item := _ITEM.match(line):
            first = i + 1
            while first < len(lines) and lines[first].strip() and not _ITEM.match(lines[first]):
                if _FENCE.match(lines[first]) or _FOLDED.match(lines[first].strip()):
                    break
                first += 1
            words = " ".join(x.strip() for x in [item[2], *lines[i + 1 : first]])
            inner, i = block(first)
            if re.search(r"^(```|\?\?\?)", inner, re.MULTILINE):
                say("", f"**{item[1]}.** {words}", "")
                out += cells(inner)
            else:
                say(
                    f"{item[1]}. {words}",
                    *(["", textwrap.indent(inner, "    "), ""] if inner.strip() else []),
                )
        else:
            say(line)
            i += 1
    return merged(out)


def merged(found):
    """Neighbouring Markdown is one cell, but a heading of the second level begins one."""
    out = []
    for kind, text in found:
        pieces = re.split(r"^(?=## )", text, flags=re.MULTILINE) if kind == "markdown" else [text]
        for n, piece in enumerate(pieces):
            if kind == "markdown" and not n and out and out[-1][0] == "markdown":
                out[-1][1] += "\n" + piece
            else:
                out.append([kind, piece])
    return [[kind, text] for kind, text in out if text.strip()]


def fenced(head, body):
    """The cells of one fence."""
    include = _SNIPPET.fullmatch(body.strip())
    path, section = include.groups() if include else (None, None)
    if 'exec="on"' in head:
        if any(words in body for words in PAGE_ONLY):
            return
        body = f"{body}\n" if "source=" in head or 'result="text"' in head else (
            f"%%shown {'html' if 'html=' in head else 'markdown'}\n{body}\n"
        )  # fmt: skip
        yield "code", body
    elif path and path.startswith("ref/") and not section:
        yield "code", f"%%module {path[:-3].replace('/', '.')}\n{snippet(path)}\n"
    elif path and "/exercises_" in path and not section.startswith("solve_"):
        module = path[:-3].replace("/", ".")
        yield "code", f"{snippet(path, section)}\n"
        yield "test", f"from {module} import check_{section}\n\ncheck_{section}({section})\n"
    else:
        body = _SNIPPET.sub(lambda m: snippet(*m.groups()), body)
        yield "markdown", f"```{head}\n{body}\n```"


def is_chapter(uri, text):
    """Whether a page has code of its own to run."""
    from ref.catalog import PARTS

    folder = uri.split("/")[0]
    return folder in (*PARTS, *FOLDERS) and bool(re.search(r'source="block"|--8<-- "ref/', text))


def notebook(text):
    """The notebook of a chapter's Markdown, as JSON's values (nbformat 4.5)."""
    title, _, rest = text.partition("\n")
    found = [["markdown", START.replace("{title}", title.removeprefix("# ").strip())], ["code", SETUP]]
    found += cells(rest)
    out = []
    for n, (kind, words) in enumerate(found, 1):
        cell = {"cell_type": "markdown" if kind == "markdown" else "code", "id": f"cell-{n}", "metadata": {}}
        if kind == "markdown":
            words = re.sub(r" *\{ *[#.:][^}]*\}$", "", _LINK.sub(r"\1", words), flags=re.MULTILINE)
            words = re.sub(r"\n{3,}", "\n\n", words)
        else:
            cell |= {"execution_count": None, "outputs": []}
        if kind == "test":
            cell["metadata"] = {"tags": ["raises-exception"]}
        if n == 2 or words.startswith("%%shown"):
            cell["metadata"] = {"jupyter": {"source_hidden": True}}
        out.append(cell | {"source": words.strip("\n").splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": out,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def notebook_json(text):
    """The file's text."""
    return json.dumps(notebook(text), indent=1, ensure_ascii=False) + "\n"
