"""Runs in the reader's browser, in the worker of a live cell: a cell, a file's example, laws, an exercise.

docs/bundle.py packs it with the library. Every function prints what the page shows; the names of files are
those of the repository, and frames of this file and of Hypothesis are left out of tracebacks.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import linecache
import re
import sys
import time
import traceback
from pathlib import Path

HOME = Path(__file__).resolve().parent
LIMIT = 200_000  # characters of output that a run may show
CELL = "<cell>"
_original = {}  # path of an edited file -> its own text

sys.dont_write_bytecode = True  # two edits in one second would look alike to the cache


class Stream:
    """Standard output and error: text goes to the page in pieces, at most twenty a second."""

    def __init__(self, post):
        self.post, self.waiting, self.sent, self.last = post, [], 0, 0.0

    def write(self, text):
        room = LIMIT - self.sent
        self.sent += len(text)
        if room > 0:
            cut = "\n(what follows is not shown)\n" if len(text) > room else ""
            self.waiting.append(text[:room] + cut)
        if time.monotonic() - self.last > 0.05:
            self.flush()
        return len(text)

    def flush(self):
        if self.waiting:
            self.post("".join(self.waiting))
        self.waiting, self.last = [], time.monotonic()


def run(kind, what, edits, post):
    """Run `what` on the reader's edits.

    Args: kind: "cell" (what: its text), "file" (the path of a file of ref), "laws" (their module) or
      "exercise" (JSON: module of its check, its name, the reader's text). edits: {path: text}. post: called
      with pieces of output.
    Returns: True if nothing was raised, no law broke and the exercise is solved.
    """
    stream = Stream(post)
    old = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = stream
    try:
        apply(edits)
        kinds = {"cell": run_cell, "file": run_file, "laws": run_laws, "exercise": run_exercise}
        return kinds[kind](what) is not False
    except BaseException as e:
        print(explain(e), end="")
        return False
    finally:
        stream.flush()
        sys.stdout, sys.stderr = old


def apply(edits):
    """Make the library hold these edits and no others; what was imported is forgotten if a file changes."""
    want = {path: edits.get(path, _original.get(path)) for path in {*_original, *edits}}
    changed = False
    for path, text in want.items():
        file = HOME / path
        now = file.read_text()
        _original.setdefault(path, now)
        if now != text:
            file.write_text(text)
            changed = True
    if changed:
        for name in [m for m in sys.modules if m.split(".")[0] in ("ref", "hw", "tests", "panel", "price")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        linecache.clearcache()


def run_cell(code):
    """Run a cell in names of its own; the value of a last line that is an expression is shown."""
    linecache.cache[CELL] = (len(code), None, code.splitlines(keepends=True), CELL)
    tree = ast.parse(code, CELL)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    names = {"__name__": "__main__"}
    exec(compile(tree, CELL, "exec"), names)
    if (
        last is not None
        and (value := eval(compile(ast.Expression(last.value), CELL, "eval"), names)) is not None
    ):
        print(value if isinstance(value, str) and value.startswith("<svg") else repr(value))
    return names


def run_file(path):
    """Import a file and run its example: what goes in, what comes out, how long it took."""
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if not hasattr(module, "example"):
        print(f"{path} is imported; it has no example of its own. The cells of this page use it.")
        return
    for example in module.example():
        fn = module
        for part in example.fn.split("."):
            fn = getattr(fn, part)
        names = list(inspect.signature(fn).parameters)
        given = dict(zip(names, example.args, strict=False)) | example.kwargs
        print(f"{example.fn}(" + ", ".join(f"{k}={describe(v)}" for k, v in given.items()) + ")")
        start = time.perf_counter()
        out = fn(*example.args, **example.kwargs)
        print(f"    = {describe(out, values=True)}    {(time.perf_counter() - start) * 1e3:.1f} ms")


def describe(x, values=False):
    """Arrays by shape, and with `values` by their range; trees by what they hold."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        shape = f"{x.dtype}[{', '.join(map(str, x.shape))}]" if x.shape else f"{x:.6g}"
        if not (values and x.size and x.shape and x.dtype.kind in "fiu"):
            return shape
        return f"{shape} from {x.min():.4g} to {x.max():.4g}"
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return f"{type(x).__name__}(...)"
    if isinstance(x, tuple | list):
        inner = ", ".join(describe(v, values) for v in x[:4]) + (", ..." if len(x) > 4 else "")
        name = type(x).__name__ if hasattr(x, "_fields") else ""
        return f"{name}[{inner}]" if isinstance(x, list) else f"{name}({inner})"
    if isinstance(x, float):
        return f"{x:.6g}"
    text = repr(x)
    return text if len(text) < 60 else text[:56] + " ..."


def run_exercise(what):
    """Run the reader's text, then the exercise's check on what it defines; returns False until it is
    solved.
    """
    module, name, text = json.loads(what)
    hypothesis_profile(max_examples=25)
    check = getattr(importlib.import_module(module), f"check_{name}")
    names = run_cell(text)
    if name not in names:
        print(f"Not yet: the code defines no {name}.")
        return False
    try:
        check(names[name])
    except (AssertionError, NotImplementedError) as e:
        said = str(e).split("\nassert ")[0] or inspect.getdoc(check) or "the test does not hold"
        print(f"Not yet: {said}")
        print_notes(e)
        return False
    print("Solved.")
    return True


def hypothesis_profile(max_examples):
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "book", max_examples=max_examples, deadline=None, derandomize=True, database=None,
        report_multiple_bugs=False, print_blob=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    settings.load_profile("book")


def print_notes(e):
    """What Hypothesis noted of the smallest input that fails."""
    for note in getattr(e, "__notes__", []):
        if "reproduce" not in note:
            print(re.sub(r"^(Falsifying example|Failing test case):", "Smallest counterexample:", note))
    e.__notes__ = []


def run_laws(name, max_examples=25):
    """Run the laws of a chapter in their order, each on drawn inputs, up to the first that breaks.

    Returns: False if one broke; the counterexample printed is the smallest that Hypothesis found.
    """
    hypothesis_profile(max_examples)
    module = importlib.import_module(name)
    laws = [(n, f) for n, f in vars(module).items() if n.startswith("law_")]
    begin = time.perf_counter()
    for i, (law, check) in enumerate(laws):
        title = law.removeprefix("law_").replace("_", " ")
        start = time.perf_counter()
        try:
            check()
        except Exception as e:
            print(f"BROKEN  {title}\n")
            print_notes(e)
            print(f"\n{explain(e)}\n{i} of {len(laws)} laws held before this one.")
            return False
        print(f"holds   {title}    {time.perf_counter() - start:.1f} s")
    spent = time.perf_counter() - begin
    print(f"\nAll {len(laws)} laws hold, on up to {max_examples} inputs each, in {spent:.0f} s.")
    return True


def explain(e):
    """The traceback as the reader knows it: frames of cells and of the library's files alone."""
    shown = part = traceback.TracebackException.from_exception(e, compact=True)
    while part is not None:
        ours = [f for f in part.stack if f.filename == CELL or f.filename.startswith(f"{HOME}/")]
        part.stack = traceback.StackSummary.from_list([f for f in ours if f.filename != __file__])
        part = part.__cause__ or part.__context__
    return "".join(shown.format()).replace(f"{HOME}/", "")
