"""Targets by name: the presets of every target module, the reader's own computer, and devices from a TOML
file.
"""

import difflib
import importlib
import importlib.util

from hw.cpu import Cpu
from hw.device_file import load_target, with_fields
from hw.target import Target

MODULES = ("gpu", "cpu", "pim", "fpga", "mcu")


def presets() -> dict:
    """{name: function that returns the target}, of all target modules that are installed."""
    found = {"this_cpu": Cpu.from_cpuinfo}
    for module in MODULES:
        if importlib.util.find_spec(f"hw.{module}"):
            found |= importlib.import_module(f"hw.{module}").PRESETS
    return found


# The kinds by name: one device of each, the first that a reader would think of.
KINDS = {"gpu": "h200", "cpu": "xeon_6154", "pim": "gddr6_aim", "fpga": "zcu102", "mcu": "stm32f746"}


def preset(name: str, **options) -> Target:
    """The target of a preset ("h200"), of a kind ("mcu": its best known device), or of a TOML file.

    options: fields of the target ("asic.ghz" reaches into one that holds fields). Raises: LookupError that
    suggests the nearest preset; ValueError for a field that the target does not have or a value out of range.
    """
    known = presets()
    if name.endswith(".toml"):
        return load_target(name, **options)
    found = KINDS.get(name, name)
    if found not in known:
        near = difflib.get_close_matches(name, [*known, *KINDS], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise LookupError(f"no target {name!r}; {hint}")
    return with_fields(known[found](), options)
