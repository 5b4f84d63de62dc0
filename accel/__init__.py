"""triptych's second panel: the same functions, made for a device in jit-compiled JAX and Pallas.

`accel.flash` is `accel.attention.flash`: found by slug through the catalogue and imported when first used, so
that `import accel` costs next to nothing. `accel.dot_product_attention` is a drop-in for JAX's own.
"""

import importlib
import importlib.util
from pathlib import Path

import ref

# A foreign package called `ref` would break everything below with puzzling errors: say so at once.
if Path(ref.__file__).resolve().parent.parent != Path(__file__).resolve().parent.parent:
    raise ImportError(
        f"`import ref` finds {ref.__file__}, which belongs to another distribution; triptych's own lies "
        f"beside {Path(__file__).resolve().parent}. Uninstall the other, or use a fresh virtual environment."
    )

from ref.catalog import BY_SLUG

_HERE = Path(__file__).resolve().parent


def _slugs():
    """The techniques that have an accel file."""
    return [t.slug for t in BY_SLUG.values() if (_HERE / t.part / f"{t.slug}.py").exists()]


def __getattr__(name: str):
    if name in BY_SLUG:
        return importlib.import_module(f"accel.{BY_SLUG[name].part}.{name}")
    if name == "dot_product_attention":
        return importlib.import_module("accel.attention.drop_in").dot_product_attention
    raise AttributeError(f"module 'accel' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_slugs(), "dot_product_attention"])
