"""What the opening pages of the book compute and draw; their fences import it from here.

Everything follows from the catalogue, from the sources of `ref` and from the chapters, so that the pages
cannot lag behind them.
"""

import ast
import re
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SPEC = re.compile(r'\(\s*[\w.\[\]]+,\s*f?"((?:\.\.\. )?[A-Za-z0-9_ ]+)"\s*\)')


# Axis letters of the shape strings, one meaning each outside the chapters that say otherwise.
LETTERS = {
    "B": "batch: independent examples",
    "H": "heads of the queries",
    "Hkv": "heads of keys and values; $H$ is a multiple of it",
    "L": "queries, or tokens of a sequence",
    "S": "keys and values",
    "D": "head size, or width of a layer",
    "Dv": "head size of the values",
    "C": "chunk of tokens; channels of a map",
    "N": "state size of a recurrence; tokens of an image",
    "T": "steps in time",
    "V": "vocabulary",
    "F": "hidden width of an MLP",
    "E": "experts; width of an embedding",
    "M": "landmarks, slots or kept tokens",
    "K": "inner axis of a product",
    "...": "any leading axes, equal in all arrays that have them",
}


class Figure:
    """A drawing in the text's own colour, so that it serves a light and a dark page: print(Figure(..))."""

    def __init__(self, width, height, title, caption, size=14):
        self.head = width, height, title, caption, size
        self.parts = []

    def line(self, x1, y1, x2, y2, **style):
        return self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, **style})

    def path(self, points, **style):
        style = {"stroke_width": 2, **style}
        return self._add("polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), **style})

    def box(self, x, y, width, height, shade=0.0, **style):
        style = {"fill": "currentColor" if shade else "none", "fill_opacity": shade or None, **style}
        return self._add("rect", {"x": x, "y": y, "width": width, "height": height, **style})

    def dot(self, x, y, r=4, **style):
        return self._add("circle", {"cx": x, "cy": y, "r": r, "fill": "currentColor", **style})

    def text(self, x, y, words, anchor="start", **style):
        style = {"fill": "currentColor", "stroke": "none", "text_anchor": anchor, **style}
        return self._add("text", {"x": x, "y": y, **style}, escape(str(words)))

    def cells(self, x, y, values, size, gap=1, **style):
        """A square for each value of a matrix that is not 0, as dark as the value, which is in 0..1."""
        style = {"stroke": "none", **style}
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value:
                    at = x + size * j, y + size * i
                    self.box(*at, size - gap, size - gap, shade=round(float(value), 2), **style)
        return self

    def _add(self, tag, attributes, inside=""):
        show = lambda v: f"{v:.1f}".removesuffix(".0") if isinstance(v, float) and abs(v) >= 1 else v
        pairs = " ".join(f'{k.replace("_", "-")}="{show(v)}"' for k, v in attributes.items() if v is not None)
        self.parts.append(f"<{tag} {pairs}>{inside}</{tag}>")
        return self

    def __str__(self):
        width, height, title, caption, size = self.head
        name = "fig-" + re.sub(r"\W+", "-", title.lower())[:40].strip("-")
        return (
            f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}" fill="none" '
            f'stroke="currentColor" font-size="{size}" width="{width}">'
            f'<title id="{name}">{escape(title)}</title>{"".join(self.parts)}</svg>'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def axis_letters(folder="ref"):
    """{axis letter: number of files that bind it in a shape string}, read from the sources."""
    found = Counter()
    for path in (ROOT / folder).rglob("*.py"):
        found.update({axis for spec in _SPEC.findall(path.read_text()) for axis in spec.split()})
    return found


def source(path, name, doc=True):
    """The source of a function in a file, as a Markdown code block; doc=False leaves its docstring out."""
    text = (ROOT / path).read_text()
    node = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = text.splitlines()[: node.end_lineno]
    if not doc and ast.get_docstring(node):
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    return "```python\n" + "\n".join(lines[first - 1 :]) + "\n```"


def kernels():
    """(file, backend, lines, first sentence of its docstring) of every kernel, read from the sources."""
    for path in sorted((ROOT / "accel" / "kernels").glob("*_*.py")):
        backend = next((b for b in ("triton", "tpu", "hopper") if f"_{b}" in path.stem), None)
        if backend:
            text = path.read_text()
            words = " ".join(ast.get_docstring(ast.parse(text)).split("\n\n")[0].split())
            yield path.name, backend, len(text.splitlines()), words.split(": ", 1)[-1].rstrip(".")


def law_counts():
    """{part: (techniques, laws, golden cases)} as they stand in tests/."""
    import numpy as np

    from ref.catalog import CATALOG, PARTS

    laws = lambda t: (ROOT / "tests" / t.part / f"laws_{t.slug}.py").read_text().count("\ndef law_")

    def stored(t):
        path = ROOT / "tests" / "golden" / f"{t.slug}.npz"
        if not path.exists():
            return 0
        with np.load(path, allow_pickle=False) as z:
            return sum(name.endswith("/meta") for name in z.files)

    table = {}
    for part in PARTS:
        here = [t for t in CATALOG if t.part == part]
        table[part] = len(here), sum(map(laws, here)), sum(map(stored, here))
    return table


def agreement(slug, i=0):
    """(function, largest error, bound) of accel's op program in float32 against ref, on the i-th example.

    The program is run op by op in NumPy: nothing is compiled. The bound is that of tests/test_layers.py.
    """
    from functools import partial

    import numpy as np

    import accel
    import hw
    import ref

    is_float = lambda x: isinstance(x, np.ndarray) and x.dtype.kind == "f"
    leaves = lambda x: [y for part in x for y in leaves(part)] if isinstance(x, tuple | list) else [x]
    eps, rng = float(np.finfo(np.float32).eps), np.random.default_rng(1)
    e = getattr(ref, slug).example()[i]
    args = [x.astype(np.float32) if is_float(x) else x for x in e.args]
    exact = [x.astype(np.float64) if is_float(x) else x for x in args]
    nudge = lambda x: x * (1 + eps * rng.choice((-1.0, 1.0), x.shape)) if is_float(x) else x
    definition = partial(getattr(getattr(ref, slug), e.fn), **e.kwargs)
    want = [np.asarray(x) for x in leaves(definition(*exact))]
    moved = [leaves(definition(*map(nudge, exact))) for _ in range(2)]
    program = hw.trace(partial(getattr(getattr(accel, slug), e.fn), **e.kwargs), *args)
    got = leaves(hw.run_program(program, tuple(args))[0])
    worst = 0.0, 1.0
    for n, w in enumerate(want):
        if w.dtype.kind == "f":
            finite = np.isfinite(w)
            shift = max(np.abs(m[n][finite] - w[finite]).max(initial=0) for m in moved)
            bound = 64 * (shift + eps * np.abs(w[finite]).max(initial=0))
            error = np.abs(np.asarray(got[n], np.float64)[finite] - w[finite]).max(initial=0)
            worst = max(worst, (float(error), float(bound)), key=lambda x: x[0] / x[1])
    return e.fn, *worst


START = {
    "notation": "Notation and shapes",
    "attention": "Attention from scratch",
    "numerics": "Numbers that are nearly right",
    "kernels": "How to read a kernel",
    "costs": "How to read a cost model",
    "agreement": "How the layers are proved to agree",
}
# Two ways through the book; each holds what its chapters build on.
PATHS = {
    "Make it fast": (
        "For those who write kernels or serve models. From the softmax that may come in pieces to machines "
        "whose memory does the multiplying.",
        "notation attention numerics kernels agreement flash block_sparse_flash lean landmark pitome costs "
        "quantization smollm2 melt pim_gpt",
    ),
    "Make it small": (
        "For those who fit a network into a device. From number formats over what can be left out to chips "
        "that hold a few hundred kilobytes.",
        "notation attention numerics quantization llm_int8 quantizable pruning nas distillation lightweight "
        "shvit efficientvit costs flash edge_moe mcuformer",
    ),
}


def title_and_url(name):
    """(title, address from docs/start/<page>) of a slug or an opening chapter; None for what is planned.

    Links that code prints are not rewritten by the site generator: they are addresses, not files.
    """
    from ref.catalog import BY_SLUG

    if name in START:
        return START[name], f"../{name}/"
    return (BY_SLUG[name].title, f"../../{BY_SLUG[name].part}/{name}/") if name in BY_SLUG else None


def reading_order():
    """(name, depth) of all chapters in the tree of first prerequisites, parents first."""
    from ref.catalog import READ_FIRST

    here = [n for n in READ_FIRST if title_and_url(n)]
    below = {n: [m for m in here if READ_FIRST[m][:1] == (n,)] for n in here}
    size = lambda n: 1 + sum(map(size, below[n]))

    def walk(name, depth):
        yield name, depth
        for child in sorted(below[name], key=size):
            yield from walk(child, depth + 1)

    for root in here:
        if not READ_FIRST[root]:
            yield from walk(root, 0)


def prerequisite_graph():
    """The tree of first prerequisites as a drawing, further ones named behind a title."""
    from ref.catalog import READ_FIRST

    rows, step, indent = list(reading_order()), 25, 19
    fig = Figure(
        440,
        step * len(rows) + 12,
        "What to read before what",
        "Each chapter hangs on the one to read before it. What else it builds on stands behind a plus.",
    )
    at = {}
    for i, (name, depth) in enumerate(rows):
        x, y = 8 + indent * depth, 20 + step * i
        at[name] = x, y
        if depth:
            px, py = at[READ_FIRST[name][0]]
            fig.path([(px + 4, py + 8), (px + 4, y - 4), (x, y - 4)], stroke_width=1)
        more = [title_and_url(n)[0] for n in READ_FIRST[name][1:]]
        words = escape(title_and_url(name)[0])
        words += "".join(f'<tspan font-size="11"> + {escape(m)}</tspan>' for m in more)
        bold = ' font-weight="bold"' if name in START else ""
        fig.parts.append(f'<text x="{x + 4}" y="{y}" fill="currentColor" stroke="none"{bold}>{words}</text>')
    return fig


def prerequisite_list():
    """The same tree as lines of a nested Markdown list, with links."""
    from ref.catalog import READ_FIRST

    for name, depth in reading_order():
        title, url = title_and_url(name)
        more = "".join(f" + {title_and_url(n)[0]}" for n in READ_FIRST[name][1:])
        yield f"{' ' * 4 * depth}- [{title}]({url}){more}"


def path_rows(names):
    """Markdown lines of a reading path: number, link, what it is about."""
    from ref.catalog import BY_SLUG

    about = {
        "notation": "The letters and conventions of all pages.",
        "attention": "A soft dictionary, its gradient and its cost.",
        "numerics": "Roundings, sums, softmax, and tolerances with reasons.",
        "kernels": "Grids, tiles and references, from a loop to Pallas.",
        "costs": "Rooflines, DRAM, FPGAs, microcontrollers; what to ask of a number.",
        "agreement": "Laws, golden vectors, gradients, counts.",
    }
    for n in names.split():
        if found := title_and_url(n):
            title, url = found
            yield f"1. [{title}]({url}): {about[n] if n in about else BY_SLUG[n].idea}"
