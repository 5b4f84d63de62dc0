"""triptych's first panel: every technique in plain NumPy, the definition that the other layers agree with.

`ref.flash` is `ref.attention.flash`: a technique is found by its slug through the catalogue, and imported
when used.
"""

import importlib
import importlib.util
from pathlib import Path

from ref.catalog import BY_SLUG

_HERE = Path(__file__).resolve().parent


def require_own(name: str) -> None:
    """Raise ImportError if `import name` would find another distribution's package instead of triptych's."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"triptych's package {name!r} is not installed beside {_HERE}")
    found = Path(spec.origin or next(iter(spec.submodule_search_locations))).resolve()
    if _HERE.parent / name not in (found, *found.parents):
        raise ImportError(
            f"`import {name}` finds {found}, which belongs to another distribution; triptych's own is "
            f"{_HERE.parent / name}. Uninstall the other one, or use a fresh virtual environment."
        )


def __getattr__(name: str):
    if name in BY_SLUG:
        return importlib.import_module(f"ref.{BY_SLUG[name].part}.{name}")
    raise AttributeError(f"module 'ref' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *BY_SLUG])
