"""A reader's own device as a TOML file: `load_target("my.toml")`; `target_toml` writes one of a preset.

base = "stm32f746"        # a preset or another file, whose fields these change; or, standing alone,
kind = "gpu"              # gpu, cpu, pim, fpga or mcu, with every field that has no default
hbm_gbps = 4000.0         # keys are the fields of the target, their units in their names
[asic]                    # fields that hold fields are tables
ghz = 1.0
"""

import difflib
import importlib
import importlib.util
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from math import isfinite
from pathlib import Path

from hw.formats import Fixed, Format
from hw.program import itemsize
from hw.target import Target

KINDS = {"gpu": "Gpu", "cpu": "Cpu", "pim": "Pim", "fpga": "Fpga", "mcu": "Mcu"}
# Endings of field names and what they are counted in, longest first.
UNITS = {
    "pj_per_byte": "pJ a byte", "pj_per_bit": "pJ a bit", "bytes_s": "bytes a second",
    "joules_per_cycle": "J a cycle", "joules_per_byte": "J a byte", "tflops": "1e12 operations a second",
    "per_cycle": "operations a cycle", "watts": "W", "bytes": "bytes", "gbps": "GB/s", "bits": "bits",
    "tops": "1e12 operations a second", "mhz": "MHz", "ghz": "GHz", "gb": "GB", "mb": "MB", "kb": "KB",
    "us": "µs", "ps": "ps", "mw": "mW", "uw": "µW", "pj": "pJ", "eff": "share of 1", "w": "W",
}  # fmt: skip


def load_target(path, **options) -> Target:
    """The target that a TOML file describes; `options` change its fields further ("asic.ghz" reaches in).

    Raises: OSError if the file cannot be read; ValueError naming the file, the key and what is allowed for a
    key that the target does not have, a value of another type or out of range, a field that is missing.
    """
    return _load(Path(path), options, ())


def _load(path, options, above):
    if path.resolve() in above:
        raise ValueError(f"{path} starts from itself: base must lead to a preset")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as why:
        raise ValueError(f"{path} is not TOML: {why}") from None
    try:
        base = values.pop("base", None)
        kind = values.pop("kind", None)
        if (base is None) == (kind is None):
            raise ValueError(
                'say either base = "h200" (a preset or a .toml file to start from) or kind = '
                + " or ".join(f'"{k}"' for k in kinds())
            )
        values.setdefault("name", path.stem)
        if kind is not None:
            return with_fields(_alone(kind, values), options)
        if not isinstance(base, str):
            raise ValueError(f"base must be the name of a preset or of a .toml file, got {base!r}")
        if base.endswith(".toml"):
            start = _load(path.parent / base, {}, (*above, path.resolve()))
        else:
            from hw.targets import preset

            start = preset(base)
        return with_fields(with_fields(start, values), options)
    except LookupError as why:
        raise ValueError(f"{path}: {why}") from None
    except ValueError as why:
        words = str(why)
        raise ValueError(words if words.startswith(str(path)) else f"{path}: {words}") from None


def kinds() -> dict[str, type]:
    """{kind: class} of the targets that are installed."""
    there = {k: c for k, c in KINDS.items() if importlib.util.find_spec(f"hw.{k}")}
    return {k: getattr(importlib.import_module(f"hw.{k}"), c) for k, c in there.items()}


def _alone(kind, values):
    known = kinds()
    if kind not in known:
        raise ValueError(f"kind must be one of {', '.join(known)}, got {kind!r}")
    cls = known[kind]
    given = {k: _convert(cls, k, v, MISSING) for k, v in values.items()}
    lacking = [f.name for f in fields(cls) if f.init and f.name not in given and not _has_default(f)]
    if lacking:
        raise ValueError(
            f"a {cls.__name__} that stands alone needs {', '.join(map(_described, lacking))} too; "
            'base = "a preset" would give them'
        )
    return _made(lambda: cls(**given))


def with_fields(target: Target, options: Mapping) -> Target:
    """The target with fields changed; a dotted name reaches into a field that holds fields.

    Raises: ValueError naming the field and what is allowed.
    """
    if not options:
        return target
    nested: dict = {}
    for name, value in options.items():
        head, dot, rest = name.partition(".")
        if not dot:
            nested[head] = value
        elif isinstance(old := nested.setdefault(head, {}), Mapping):
            nested[head] = {**old, rest: value}
        else:
            raise ValueError(f"{head} is set as a whole and {name} in part: say one of them")
    return _changed(target, nested)


def _changed(record, values, prefix=""):
    cls = type(record)
    given = {k: _convert(cls, k, v, getattr(record, k, MISSING), prefix) for k, v in values.items()}
    return _made(lambda: replace(record, **given))


def _made(make):
    try:
        return make()
    except TypeError as why:  # a comparison that the target's own check could not make
        raise ValueError(str(why)) from None


def _convert(cls, key, value, old, prefix=""):
    """The value for a field, in its type. Raises: ValueError."""
    name = prefix + key
    allowed = {f.name for f in fields(cls) if f.init}
    if key not in allowed:
        near = difflib.get_close_matches(key, allowed, n=3, cutoff=0.5)
        near += [a for a in sorted(allowed) if a.split("_")[0] == key.split("_")[0] and a not in near]
        hint = f"; did you mean {' or '.join(map(_described, near[:3]))}?" if near else ""
        listed = ", ".join(f.name for f in fields(cls) if f.init)
        raise ValueError(f"{cls.__name__} has no field {name!r}{hint} (its fields: {listed})")
    made = _typed(name, value, typing.get_type_hints(cls)[key], old)
    if shape := _SHAPES.get((cls.__name__, key)):
        _check_shape(name, made, shape)
    return made


# Lists whose length the type does not tell: (a list of lists?, what each holds).
_SHAPES = {
    ("Cpu", "clusters"): (True, ("cores", "GHz", "float32 operations a cycle", "int8 operations a cycle")),
    ("Cpu", "caches_kb"): (False, ("L1 a core", "L2", "L3 in all")),
    ("Mcu", "caches_kb"): (False, ("instructions", "data")),
}


def _check_shape(name, value, shape):
    many, entries = shape
    for row in value if many else (value,):
        if not isinstance(row, tuple) or len(row) != len(entries):
            what = "lists of" if many else "a list of"
            raise ValueError(f"{name} must be {what} {len(entries)}: {', '.join(entries)}; got {row!r}")
        for entry, number in zip(entries, row, strict=True):
            _number(f"{name} ({entry})", number)


def _typed(name, value, kind, old):
    optional = typing.get_origin(kind) in (types.UnionType, typing.Union)
    if optional:
        options = [a for a in typing.get_args(kind) if a is not type(None)]
        if value == "none" or value is None:
            return None
        kind = next((o for o in options if is_dataclass(o)), options[0])
    if isinstance(kind, type) and issubclass(kind, Format):
        kind = Fixed
    if isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool | dict | tuple):
        if not isinstance(value, float) or isfinite(value):
            return value
    if is_dataclass(kind):
        return _record(name, value, kind, old)
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    origin = typing.get_origin(kind) or kind
    if origin is bool and isinstance(value, bool):
        return value
    if origin in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        return value if origin is int else float(value)
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(name, value, typing.get_args(kind))
    if origin is dict and isinstance(value, dict):
        for k, v in value.items():  # tables of rates by element type
            _element_type(name, k)
            if _number(f"{name}.{k}", v) <= 0:
                raise ValueError(f"{name}.{k} must be positive, got {v!r}")
        return {**old, **value} if isinstance(old, dict) else dict(value)
    what = wanted.get(origin) or {tuple: "a list", dict: "a table of numbers"}.get(origin)
    if what is None:
        raise ValueError(f"{name} cannot be set in a file")
    raise ValueError(f"{_described(name)} must be {what}, got {value!r}")


def _record(name, value, kind, old):
    if isinstance(value, list | tuple) and not isinstance(value, dict):
        names = [f.name for f in fields(kind) if f.init]
        if len(value) > len(names):
            raise ValueError(f"{name} holds {', '.join(names)}, got {len(value)} values")
        value = dict(zip(names, value, strict=False))
    if not isinstance(value, Mapping):
        names = ", ".join(f.name for f in fields(kind) if f.init)
        raise ValueError(f"{name} must be a table with {names}, got {value!r}")
    if is_dataclass(old) and isinstance(old, kind):
        return _changed(old, value, f"{name}.")
    given = {k: _convert(kind, k, v, MISSING, f"{name}.") for k, v in value.items()}
    lacking = [f.name for f in fields(kind) if f.init and f.name not in given and not _has_default(f)]
    if lacking:
        raise ValueError(f"{name} needs {', '.join(map(_described, lacking))} too")
    return _made(lambda: kind(**given))


def _tuple(name, value, args):
    if args and args[-1] is not Ellipsis and len(args) != len(value):
        raise ValueError(f"{_described(name)} must be a list of {len(args)}, got {list(value)!r}")
    if args and args[-1] is not Ellipsis:
        pairs = enumerate(zip(value, args, strict=True))
        return tuple(_typed(f"{name}[{n}]", v, a, MISSING) for n, (v, a) in pairs)
    return tuple(_entry(f"{name}[{n}]", v) for n, v in enumerate(value))


def _entry(name, value):
    if isinstance(value, list | tuple):
        return tuple(_entry(f"{name}[{n}]", v) for n, v in enumerate(value))
    if isinstance(value, str) or is_dataclass(value):
        return value
    return _number(name, value)


def _element_type(name, key):
    try:
        itemsize(key)
    except TypeError:
        known = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4", "float64")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}.{key} is no element type{hint} (some: {', '.join(known)})") from None


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value


def _has_default(f):
    return f.default is not MISSING or f.default_factory is not MISSING


def unit(name: str) -> str:
    """What a field is counted in, read off its name; "" if it does not say."""
    last = name.rsplit(".", 1)[-1].split("[")[0]
    if last.startswith("t_") and last != "t_":
        return "ticks"
    return next((words for end, words in UNITS.items() if last == end or last.endswith("_" + end)), "")


def _described(name):
    return f"{name} ({words})" if (words := unit(name)) else name


# Writing


def target_toml(target: Target) -> str:
    """The target as the text of a file that `load_target` reads back, units as comments.

    Raises: ValueError for a field that a file cannot hold, unless it has its default.
    """
    kind = next((k for k, c in kinds().items() if type(target) is c), None)
    if kind is None:
        raise ValueError(f"a {type(target).__name__} is none of {', '.join(KINDS)}")
    lines, tables = [f'kind = "{kind}"'], []
    for f in fields(target):
        value = getattr(target, f.name)
        if is_dataclass(value) and not _is_default(f, value):
            tables += ["", f"[{f.name}]", *_lines(value)]
        elif isinstance(value, dict) and value:
            tables += ["", f"[{f.name}]", *(f"{_key(k)} = {_value(f.name, v)}" for k, v in value.items())]
        elif f.init and not (_is_default(f, value) and not _plain(value)):
            lines.append(_line(f, value))
    return "\n".join([*lines, *tables]) + "\n"


def _lines(record):
    return [
        _line(f, getattr(record, f.name))
        for f in fields(record)
        if f.init and not _is_default(f, getattr(record, f.name))
    ]


def _line(f, value):
    text = f"{f.name} = {_value(f.name, value)}"
    words = unit(f.name)
    return f"{text}  # {words}" if words and not isinstance(value, bool) else text


def _is_default(f, value):
    if f.default is not MISSING:
        return value is f.default or value == f.default
    return f.default_factory is not MISSING and value == f.default_factory()


def _plain(value):
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str)


def _key(key):
    return key if key.replace("_", "").isalnum() else _quoted(key)


def _quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(name, value):
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(f'{name}.{k}', v)}" for k, v in value.items()) + " }"
    if isinstance(value, tuple | list):
        flat = (tuple(getattr(v, f.name) for f in fields(v)) if is_dataclass(v) else v for v in value)
        return "[" + ", ".join(_value(name, v) for v in flat) + "]"
    raise ValueError(f"{name} = {value!r} cannot be written to a file")
