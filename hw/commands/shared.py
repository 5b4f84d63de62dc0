"""What the commands share: refusals, the terminal, JSON, tables, targets by name."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

import ref

ROOT = Path(ref.__file__).resolve().parent.parent


class Refusal(Exception):
    """A mistake that the reader can mend; its text is the one line that is shown."""


def console():
    """Colour and width by the terminal; without one no colour (NO_COLOR too) and 80 columns."""
    wide = Console().width if sys.stdout.isatty() else 80
    return Console(width=max(60, min(wide, 100)), highlight=False, soft_wrap=False)


def progress():
    """Bars on standard error, so that output can be piped; silent where nobody watches."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def emit(options, value, show):
    """The value as JSON, or `show` on a console."""
    if options.json:
        print(json.dumps(value, indent=1, default=_jsonable))
    else:
        show(console())


def _jsonable(x):
    return x.tolist() if hasattr(x, "tolist") else str(x)


def head(out, text):
    """A panel's heading."""
    out.print()
    out.print(Text(text, style="cyan"))


def columns(*names, lines=False):
    """An empty table: the first column to the left, numbers to the right."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_lines=lines, header_style="dim")
    for i, name in enumerate(names):
        table.add_column(name, overflow="fold", justify="left" if i == 0 or lines else "right")
    return table


def shapes(shapes):
    """Shapes in words, four at most."""
    text = " ".join("x".join(map(str, s)) or "()" for s in shapes[:4])
    return text + (f" +{len(shapes) - 4}" if len(shapes) > 4 else "")


def code_lines(module):
    """Lines of code, without blank lines and comments."""
    lines = (x.strip() for x in inspect.getsource(module).splitlines())
    return sum(bool(x) and not x.startswith("#") for x in lines)


def leaves(tree):
    """The arrays and numbers of a tree of dicts, tuples and dataclasses."""
    if isinstance(tree, dict):
        return [x for v in tree.values() for x in leaves(v)]
    if isinstance(tree, tuple | list):
        return [x for v in tree for x in leaves(v)]
    if hasattr(tree, "__dataclass_fields__"):
        return [x for f in tree.__dataclass_fields__ for x in leaves(getattr(tree, f))]
    return [] if tree is None else [tree]


def floats(tree, change):
    """The tree with `change` applied to its float arrays."""
    import jax

    return jax.tree.map(lambda x: change(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x, tree)


def jax_device():
    """The device that JAX computes on."""
    import jax

    d = jax.devices()[0]
    return "the CPU" if d.platform == "cpu" else d.device_kind


def si(x, unit):
    """A number with an SI prefix, three digits."""
    from hw.report import _si

    return _si(x, unit)


def has_accel(t):
    """Is the technique written in accel."""
    return importlib.util.find_spec(f"accel.{t.part}.{t.slug}") is not None


def named_targets(names, **fields):
    """{name: target}, looked up before any work is done."""
    from hw.targets import preset

    return {name: preset(name, **fields) for name in names}


def assignment(text):
    """ "causal=True" -> ("causal", True); what is not a literal is text."""
    import ast

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Refusal(f"{text!r} must look like NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
