"""Notebooks of the chapters: valid and whole, and their cells run, without Jupyter here."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ref.catalog import CATALOG

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import notebook  # noqa: E402

CHAPTERS = {
    uri: text
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if notebook.is_chapter(uri := path.relative_to(ROOT / "docs").as_posix(), text := path.read_text())
}

# Runs the code cells of a notebook with what they use of IPython, and prints what each said, as JSON; then
# the cells named in a second list again, with their texts replaced.
SHELL = """
import ast, contextlib, io, json, sys, types
sys.path[:0] = [""]  # as Jupyter does
shell = types.SimpleNamespace(magics={}, user_ns={"__name__": "__main__"})
shell.register_magic_function = lambda fn, kind: shell.magics.setdefault(fn.__name__, fn)
shell.user_ns["get_ipython"] = lambda: shell
sys.modules["IPython"] = types.ModuleType("IPython")
display = sys.modules["IPython.display"] = types.ModuleType("IPython.display")
display.HTML, display.Markdown, display.display = (lambda x: "html:" + x), (lambda x: "markdown:" + x), print

def run(source):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            if source.startswith("%%"):
                head, _, body = source.partition("\\n")
                name, _, line = head[2:].partition(" ")
                shell.magics[name](line, body)
            else:
                exec(compile(source, "<cell>", "exec"), shell.user_ns)
    except Exception as e:
        return out.getvalue(), f"{type(e).__name__}: {e}"
    return out.getvalue(), None

book, again = json.load(sys.stdin)
told = [run("".join(c["source"])) for c in book["cells"] if c["cell_type"] == "code"]
print(json.dumps([told, [run(text) for text in again]]))
"""


def run(nb, *again):
    """([(printed, error)] of the code cells, the same of the texts in `again`)."""
    done = subprocess.run(
        [sys.executable, "-c", SHELL],
        input=json.dumps([nb, again]),
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",  # the first cell finds the checkout above
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # as installed
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def source(cell):
    return "".join(cell["source"])


def code_of(nb):
    return [c for c in nb["cells"] if c["cell_type"] == "code"]


def test_notebook_of_every_technique_exists():
    assert {f"{t.part}/{t.slug}.md" for t in CATALOG} <= set(CHAPTERS)
    assert {"hw/gpu.md", "start/attention.md", "start/numerics.md"} <= set(CHAPTERS)
    assert "start/licences.md" not in CHAPTERS


@pytest.mark.parametrize("uri", CHAPTERS)
def test_notebook_holds_the_chapter_in_form(uri):
    """The rules of nbformat 4.5, and nothing of the site generator's own marks is left."""
    text = CHAPTERS[uri]
    nb = json.loads(notebook.notebook_json(text))
    assert set(nb) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in nb["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert isinstance(cell["source"], list)
        assert all(isinstance(line, str) and line for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert set(cell) == keys | {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
            ast.parse(re.sub(r"^%%\w+ .*\n", "", source(cell)))
        else:
            assert cell["cell_type"] == "markdown"
            assert set(cell) == keys
            prose = re.sub(r"^```.*?^```", "", source(cell), flags=re.MULTILINE | re.DOTALL)
            assert "--8<--" not in source(cell)
            assert not re.search(
                r"^ *(===|\?\?\?|!!!) |\]\((?!https?:)", re.sub(r"`[^`]*`|\$[^$]*\$", "", prose), re.MULTILINE
            )
            assert source(cell).count("<details>") == source(cell).count("</details>")
    assert source(nb["cells"][0]).startswith("# " + text.split("\n")[0].removeprefix("# "))
    assert "pip install" in source(nb["cells"][0])
    whole = "\n".join(map(source, nb["cells"]))
    assert whole.count("$$") == len(re.findall(r"\$\$", text)), "an equation is missing"
    for heading in re.findall(
        r"^## (.*?)(?: \{.*)?$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    ):
        assert f"## {heading}" in whole
    shown = [c for c in code_of(nb) if not source(c).startswith("%%shown")]
    assert sum(source(c).startswith("%%module ref.") for c in shown) == len(
        set(re.findall(r'--8<-- "ref/[\w/]+\.py"', text))
    )


@pytest.mark.parametrize("uri", ["attention/flash.md", "memory/rum.md", "start/kernels.md", "hw/pim.md"])
def test_notebook_cells_run(uri):
    """All but the tests of exercises, which fail on the stubs; cells print what the page shows."""
    nb = notebook.notebook(CHAPTERS[uri])
    told, _ = run(nb)
    assert len(told) == len(code_of(nb)) > 3
    tests = 0
    for cell, (printed, error) in zip(code_of(nb), told, strict=True):
        if cell["metadata"].get("tags") == ["raises-exception"]:
            tests += 1
            assert error is not None, source(cell)
            assert error.startswith(("AssertionError", "NotImplementedError")), error
        else:
            assert error is None, f"{source(cell)[:400]}\n{error}"
            if source(cell).startswith("%%shown"):
                assert printed.startswith(("html:", "markdown:"))
            elif source(cell).startswith("%%module"):
                assert printed.endswith("is as it was\n")
    assert tests == len(re.findall(r'--8<-- "tests/\w+/exercises_\w+\.py:(?!solve_)', CHAPTERS[uri]))


def test_notebook_edits_of_a_file_are_what_runs_and_solutions_pass():
    nb = notebook.notebook(CHAPTERS["attention/flash.md"])
    (file,) = [source(c) for c in code_of(nb) if source(c).startswith("%%module")]
    edited = file.replace("    return min(block_k, d), block_k\n", "    return 7, 8\n")
    assert edited != file
    call = "from ref.attention.flash import block_sizes\nprint(block_sizes(4096, 64))"
    solution = notebook.snippet("tests/attention/exercises_flash.py", "solve_merge").replace("solve_", "")
    check = "from tests.attention.exercises_flash import check_merge\ncheck_merge(merge)"
    nb["cells"] = nb["cells"][:2]  # the setup alone
    told = run(nb, file, call, edited, call, file, call, "import numpy as np\n" + solution, check)[1]
    assert [error for _, error in told] == [None] * 8
    assert [printed for printed, _ in told[1:6:2]] == ["(16, 16)\n", "(7, 8)\n", "(16, 16)\n"]


def test_notebook_says_what_is_missing():
    """Where the package is not installed the first cell names the command."""
    code = f"import sys\nsys.modules['ref'] = None\nexec({notebook.SETUP!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: triptych is not here: `pip install" in done.stderr
