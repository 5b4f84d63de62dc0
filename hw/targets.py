"""Targets by name: the presets of every target module, the reader's own computer, and devices from a TOML
file.
"""

import difflib
import importlib
import importlib.util
import tomllib
from dataclasses import fields, replace
from pathlib import Path

from hw.cpu import Cpu
from hw.target import Target

MODULES = ("gpu", "cpu", "pim", "fpga", "mcu")


def presets() -> dict:
    """{name: function that returns the target}, of all target modules that are installed."""
    found = {"this_cpu": Cpu.from_cpuinfo}
    for module in MODULES:
        if importlib.util.find_spec(f"hw.{module}"):
            found |= importlib.import_module(f"hw.{module}").PRESETS
    return found


def preset(name: str, **options) -> Target:
    """The target of a preset ("h200"), or of a TOML file ("board.toml": `base = "h200"` and fields to
    change).

    options: fields of the target. Raises: LookupError that suggests the nearest preset; ValueError for a
    field
    that the target does not have.
    """
    known = presets()
    if name.endswith(".toml"):
        text = tomllib.loads(Path(name).read_text())
        if "base" not in text:
            raise ValueError(f'{name} must name a preset to start from: base = "h200"')
        base = preset(text.pop("base"))
        options = {"name": Path(name).stem, **text, **options}
    elif name in known:
        base = known[name]()
    else:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise LookupError(f"no target {name!r}; {hint}")
    allowed = {f.name for f in fields(base)}
    for option in options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{type(base).__name__} has no field {option!r}{hint}")
    tuples = {k: _tuples(v) for k, v in options.items()}
    return replace(base, **tuples) if tuples else base


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
