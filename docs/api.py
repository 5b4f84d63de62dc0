"""Pages of the API reference: which modules stand on which page, and what each page holds.

Everything follows from the catalogue, from the files of `ref`, `accel` and `hw`, and from their `__all__`
(a file without one shows what it defines without an underscore, and its core functions). Sources are parsed,
never imported, but for the examples: those are `ref`'s, and run in NumPy. docs/hooks.py makes the pages at
every build.
"""

import ast
import functools
import importlib
import inspect
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import live  # noqa: E402

from ref.catalog import BY_SLUG, CATALOG, PARTS  # noqa: E402

SHARED = {
    "blocks": "Blocks that several techniques use",
    "models": "Models, built from the blocks",
    "tasks": "Tasks and data",
    "kernels": "Kernels in Pallas, which the functions above choose by `impl`",
    "common": "What every file uses",
}
HARDWARE = {  # pages of hw: what the names of their modules begin with; "core" is what `hw` itself exports
    "core": ("The op program and its price", ()),
    "gpu": ("GPUs, TPUs and CPUs", ("gpu", "cpu", "roof")),
    "pim": ("Processing in DRAM", ("pim",)),
    "fpga": ("FPGAs", ("fpga", "fabric", "fixed_plan", "stream", "systolic", "verilog", "usage")),
    "mcu": ("Microcontrollers", ("mcu", "kernel_counts")),
    "tools": ("What the targets share", ()),
}
CHAPTERS = {"core": "ir", "gpu": "gpu", "pim": "pim", "fpga": "fpga", "mcu": "mcu"}
APART = ("hw.cli", "hw.__main__", "hw.scaffold", "hw.commands")  # the command line


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def tree(module):
    return ast.parse(path_of(module).read_text())


@functools.cache
def outline(module):
    """The top of a file: ({name: (kind, has a docstring)}, {imported name: (module, name)}, `__all__`)."""
    own, imported, listed = {}, {}, None
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            own[node.name] = kind, ast.get_docstring(node) is not None
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported |= {a.asname or a.name: (node.module, a.name) for a in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            listed = ast.literal_eval(node.value)
    return own, imported, listed


@functools.cache
def names(module):
    """({what the file defines: kind}, {what it imports: (module, name)}), of its public names."""
    own, imported, public = outline(module)
    if public is None:
        technique = BY_SLUG.get(module.rsplit(".", 1)[-1])
        core = [n for n in technique.core if n in imported] if technique else []
        public = [n for n in own if not n.startswith("_")] + core
    shown = {n: kind for n, (kind, told) in own.items() if told and n in public}
    return shown, {n: imported[n] for n in public if n in imported}


def home(module, name):
    """The path of what a module exports under a name: where it is defined, if that has an entry."""
    while path_of(module).is_file():
        if name in names(module)[0]:
            return f"{module}.{name}"
        _, imported, _ = outline(module)
        if name not in imported:
            return None
        module, name = imported[name]
    return None


def modules(folder):
    """The modules of a folder, those of the catalogue first and in its order."""
    order = {t.slug: i for i, t in enumerate(CATALOG)}
    found = [p.stem for p in (ROOT / folder).glob("*.py") if p.stem not in ("__init__", "__main__")]
    found.sort(key=lambda stem: (order.get(stem, len(order)), stem))
    found = [f"{folder.replace('/', '.')}.{stem}" for stem in found]
    return [m for m in found if m not in APART and names(m)[0] | names(m)[1]]


@functools.cache
def pages():
    """{"ref/attention": (title, its modules)}: every page, in the order of the navigation."""
    found = {}
    for layer in ("ref", "accel"):
        for part in (*PARTS, *SHARED):
            folder = layer if part == "common" else f"{layer}/{part}"
            if here := modules(folder):
                found[f"{layer}/{part}"] = (f"{layer}: {SHARED.get(part, part)}", here)
    exported = exported_modules()
    hw = {page: [] for page in HARDWARE}
    for module in modules("hw"):
        stem = module.split(".")[1]
        fits = [p for p, (_, heads) in HARDWARE.items() if stem.startswith(heads or ("-",))]
        hw[fits[0] if fits else "core" if module in exported else "tools"].append(module)
    for page, here in hw.items():
        here.sort(key=lambda module, page=page: module != f"hw.{page}")  # the target's own file first
    return found | {f"hw/{page}": (f"hw: {HARDWARE[page][0]}", here) for page, here in hw.items()}


def exported_modules():
    """The modules whose names `hw` exports, read from its `_HOME`."""
    return {
        n.value
        for n in ast.walk(tree("hw.__init__"))
        if isinstance(n, ast.Constant) and str(n.value)[:3] == "hw."
    }


@functools.cache
def documented():
    """{path: page} of everything that has an entry."""
    found = {}
    for page, (_, here) in pages().items():
        for module in here:
            found[module] = page
            found |= {f"{module}.{name}": page for name in names(module)[0]}
    return found


def entry(path, text=None):
    """A link to an entry, by its path; resolved by autorefs, on whichever page it stands."""
    return f"[`{text or path.rsplit('.', 1)[-1]}`][{path}]"


def text_of(page):
    """The Markdown of a page."""
    title, here = pages()[page]
    layer = page.split("/")[0]
    out = [f"# {title}\n", intro(page)]
    for module in here:
        stem = module.rsplit(".", 1)[-1]
        technique = BY_SLUG.get(stem) if page.split("/")[1] in PARTS else None
        head = technique.title if technique else f"`{module}`"
        out.append(f"\n## {head} {{ #{module} }}\n")
        if technique:
            out.append(beside(technique, layer) + "\n")
        own, borrowed = names(module)
        out.append(f"::: {module}\n    options:\n      members: [{', '.join(own)}]\n")
        if also := [entry(found, n) for n, (m, name) in borrowed.items() if (found := home(m, name))]:
            out.append(f"Also here, written elsewhere: {', '.join(also)}.\n")
        if technique and layer == "ref":
            out.append(examples(technique))
    return "\n".join(out)


def intro(page):
    """The page's first line."""
    layer, name = page.split("/")
    how = "How to read an entry: [API reference](../index.md)."
    if layer != "hw" or name not in CHAPTERS:
        return how
    return f"The chapter: [{HARDWARE[name][0]}](../../hw/{CHAPTERS[name]}.md). {how}"


def beside(technique, layer):
    """Links from a technique's section to its chapter and to the same section of the other layer."""
    t = technique
    out = [f"Chapter: [{t.title}](../../{t.part}/{t.slug}.md)"]
    for other in ("ref", "accel"):
        if other != layer and path_of(f"{other}.{t.part}.{t.slug}").is_file():
            out.append(f"the same names in [{other}](../{other}/{t.part}.md#{other}.{t.part}.{t.slug})")
    return ", ".join(out) + "."


def leaves(x):
    """The arrays and numbers of a result, in order."""
    if isinstance(x, tuple | list):
        return [y for part in x for y in leaves(part)]
    if isinstance(x, dict):
        return [y for part in x.values() for y in leaves(part)]
    if hasattr(x, "__dataclass_fields__"):
        return [y for name in x.__dataclass_fields__ for y in leaves(getattr(x, name))]
    return [x]


def calls(technique):
    """The first example of each core function: (number, Example)."""
    seen = {}
    for i, e in enumerate(importlib.import_module(f"ref.{technique.part}.{technique.slug}").example()):
        seen.setdefault(e.fn, (i, e))
    return list(seen.values())


def example_lines(technique):
    """The examples as a session of Python: a call of each core function, and the shape of its result."""
    import numpy as np

    slug = technique.slug
    module = importlib.import_module(f"ref.{technique.part}.{slug}")
    lines = ["import ref", f"examples = ref.{slug}.example()"]
    out = [f">>> {line}" for line in lines]
    for i, e in calls(technique):
        fn = functools.reduce(getattr, e.fn.split("."), module)
        result = fn(*e.args, **e.kwargs)
        given = dict(zip(inspect.signature(fn).parameters, e.args, strict=False)) | e.kwargs
        told = ", ".join(f"{k} {live.describe(v)}" for k, v in given.items())
        out.append("\n" + textwrap.fill(told, 88, initial_indent=">>> # ", subsequent_indent=">>> # "))
        out.append(f">>> call = examples[{i}]")
        out.append(f">>> out = ref.{slug}.{e.fn}(*call.args, **call.kwargs)")
        if isinstance(result, np.ndarray) and result.dtype != object:
            show, value = "out.dtype, out.shape", f"{(result.dtype, result.shape)!r}"
        elif isinstance(result, tuple) and all(isinstance(x, np.ndarray) for x in result):
            show, value = "[x.shape for x in out]", f"{[x.shape for x in result]!r}"
        elif isinstance(result, int | float | str | bool):
            show, value = "out", repr(result)
        else:
            show, value = "type(out).__name__", repr(type(result).__name__)
        out += [f">>> {show}", value]
    return "\n".join(out)


def examples(technique):
    """The section's example, shown as it runs."""
    return f"\nCalls on the technique's own examples:\n\n```pycon\n{example_lines(technique)}\n```\n"


def index():
    """The reference's first page."""
    out = [INDEX.replace("{session}", SESSION), "| technique | chapter | ref | accel |\n|---|---|---|---|"]
    for t in CATALOG:
        cell = lambda layer, t=t: (
            f"[`{layer}.{t.slug}`]({layer}/{t.part}.md#{layer}.{t.part}.{t.slug})"
            if path_of(f"{layer}.{t.part}.{t.slug}").is_file()
            else ""
        )
        out.append(f"| {t.title} | [{t.part}](../{t.part}/{t.slug}.md) | {cell('ref')} | {cell('accel')} |")
    return "\n".join(out) + "\n"


INDEX = """# API reference

Every public function and class of the three layers, from the sources' own docstrings. A technique has the
same names in `ref` and `accel`; `hw` prices any JAX function, these or yours.

**How to read an entry.** The first block is the call: what stands after `*` is given by name. The first line
says what comes out, as a formula or a plain phrase. Shapes stand in brackets: `q [..., H, L, D]` is an array
`q` whose last axes are heads, queries and head size; `...` are any leading axes, and a letter means the same
length wherever it stands ([Notation and shapes](../start/notation.md)). An array of another shape is a
`ValueError` that names the argument. `accel` adds `impl` and `interpret` to what `ref` takes:
[How to read a kernel](../start/kernels.md) tells what they do.

**Examples.** Each technique's section in `ref` ends with its examples as a session of Python. They are what
`ref.flash.example()` returns, likewise for every slug: the input of `triptych run flash`, and the input on
which tests compare `accel` with `ref`. `accel` takes the same call with JAX arrays, and `hw` traces it. A
test runs every session, this one too, as it stands:

```pycon
{session}
```

"""

SESSION = """>>> import jax.numpy as jnp
>>> import accel, hw, ref
>>> call = ref.flash.example()[0]
>>> ref.dims.dims(q=(call.args[0], "H L D"), k=(call.args[1], "Hkv S D"))
{'H': 9, 'L': 48, 'D': 64, 'Hkv': 3, 'S': 48}
>>> exact, lse = ref.flash.flash_attention(*call.args, **call.kwargs)

>>> q, k, v = (jnp.asarray(x, jnp.float32) for x in call.args)
>>> o, lse = accel.flash.flash_attention(q, k, v, **call.kwargs)
>>> o.shape, str(o.dtype), bool(abs(o - exact).max() < 1e-5)
((9, 48, 64), 'float32', True)

>>> program = hw.trace(lambda q, k, v: accel.flash.flash_attention(q, k, v, causal=True), q, k, v)
>>> hw.count(program).macs == 9 * 48 * 48 * (64 + 64)
True
>>> report = hw.estimate(program, hw.h200())
>>> report.bound_by, report.peak_memory >= o.nbytes
('overhead', True)"""


def of_chapter(uri):
    """A chapter's list of its entries, as Markdown; "" for a page that has none."""
    part, _, stem = uri.removesuffix(".md").rpartition("/")
    lines = []
    if part in PARTS and stem in BY_SLUG:
        for module in (f"{layer}.{part}.{stem}" for layer in ("ref", "accel")):
            if path_of(module).is_file():
                own, borrowed = names(module)
                found = {n: f"{module}.{n}" for n in own} | {n: home(*at) for n, at in borrowed.items()}
                shown = ", ".join(entry(path, n) for n, path in found.items() if path and n != "example")
                lines.append(f"- [{module.split('.')[0]}][{module}]: {shown}")
    elif part == "hw":
        for page in (p for p, chapter in CHAPTERS.items() if chapter == stem):
            for module in pages()[f"hw/{page}"][1]:
                shown = ", ".join(entry(f"{module}.{n}") for n in names(module)[0])
                lines.append(f"- [{module}][{module}]: {shown}")
    return "## API { #api data-search-exclude }\n\n" + "\n".join(lines) if lines else ""


def nav():
    """Lines of the navigation, for docs/generate.py: an entry a page."""
    layers = {}
    for page in pages():
        layers.setdefault(page.split("/")[0], []).append(page)
    out = ["      - API:", "          - api/index.md"]
    for layer, here in layers.items():
        out.append(f"          - {layer}:")
        out += [f"              - {p.split('/')[1]}: api/{p}.md" for p in here]
    return out
