"""triptych's third panel: what a JAX function costs on real machines, and what they would compute.

    program = hw.trace(fn, *args)            # any JAX function, traced once
    report = hw.estimate(program, hw.h200())  # seconds, joules, bytes by level, peak memory, what bounds it
    outputs, report = hw.execute(program, args, target)

Only `trace` imports JAX, and only when it is first used: a program that was saved as JSON, or that `sketch`
made of a NumPy function, is priced, counted and run with NumPy alone.
"""

import importlib
import importlib.util
import sys
import types

_HOME = {
    "trace": "hw.trace",
    "sketch": "hw.sketch",
    "from_onnx": "hw.onnx",
    **dict.fromkeys(("Program", "Op", "Tensor", "Loop", "Block"), "hw.program"),
    **dict.fromkeys(("MatmulDims", "ConvDims", "ElementwiseDims", "ReduceDims", "MoveDims"), "hw.program"),
    **dict.fromkeys(("count", "Counts"), "hw.count"),
    **dict.fromkeys(("grid_traffic", "GridOperand", "Traffic"), "hw.traffic"),
    **dict.fromkeys(("peak_bytes", "reorder_for_memory", "liveness"), "hw.liveness"),
    "patterns": "hw.fusion",
    **dict.fromkeys(("run_program", "Trace"), "hw.interpret"),
    **dict.fromkeys(
        ("FloatPolicy", "FormatPolicy", "Float", "BF16", "FP16", "Fixed", "Int8Affine"), "hw.formats"
    ),
    **dict.fromkeys(("estimate", "execute", "compare_targets", "pareto"), "hw.front"),
    **dict.fromkeys(("CostReport", "OpCost"), "hw.report"),
    **dict.fromkeys(("sweep_fields", "Sweep"), "hw.sweeps"),
    **dict.fromkeys(("load_target", "target_toml"), "hw.device_file"),
    **dict.fromkeys(
        ("DoesNotFit", "UnsupportedPrimitive", "UnknownTripCount", "NonConsecutiveRevisit"), "hw.errors"
    ),
    **dict.fromkeys(
        "simulate_token simulate_generation sweep map_vmm map_kv check_capacity PimReport GptShape GPTS "
        "gpt2_small gpt2_medium gpt2_large gpt2_xl gpt3_small gpt3_medium gpt3_large gpt3_xl".split(),
        "hw.pim_decode",
    ),
    **dict.fromkeys(("NotTraceable", "DynamicShape", "SideEffect"), "hw.errors"),
}


# Modules of targets: their classes, presets and closed forms are exported as they are.
_TARGETS = ("gpu", "cpu", "pim", "fpga", "mcu", "targets")


def _target_modules():
    return [importlib.import_module(f"hw.{m}") for m in _TARGETS if importlib.util.find_spec(f"hw.{m}")]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"hw.{name}"):
        return importlib.import_module(f"hw.{name}")  # a submodule before it is bound here
    else:
        if name.startswith("_"):
            raise AttributeError(f"module 'hw' has no attribute {name!r}")
        found = [m for m in _target_modules() if hasattr(m, name)]
        if not found:
            raise AttributeError(f"module 'hw' has no attribute {name!r}")
        value = getattr(found[0], name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME, *(n for m in _target_modules() for n in vars(m) if n[0] != "_")})


class _Package(types.ModuleType):
    """Importing a submodule binds it here; `hw.trace` and `hw.count` stay the functions of those names."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
