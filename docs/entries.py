"""Entries of the API reference as mkdocstrings shows them: an extension of Griffe, which only reads."""

import re
import sys
from pathlib import Path

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent))
import api
from docstrings import markdown

WIDTH = 88
KINDS = griffe.ParameterKind
STARS = {KINDS.var_positional: "*", KINDS.var_keyword: "**"}


def signature(obj):
    """`name(q, k, *, causal=False) -> float` on lines of at most WIDTH characters."""
    parameters = list(obj.parameters) if obj.is_function else fields(obj)
    if obj.is_function and obj.parent.is_class and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    words, before = [], None
    for p in parameters:
        if before is KINDS.positional_only and p.kind is not before:
            words.append("/")
        if p.kind is KINDS.keyword_only and before not in (p.kind, KINDS.var_positional):
            words.append("*")
        word = STARS.get(p.kind, "") + p.name + (f": {p.annotation}" if p.annotation is not None else "")
        if p.default is not None and p.kind not in STARS:
            word += (" = " if p.annotation is not None else "=") + str(p.default)
        words.append(word)
        before = p.kind
    end = f") -> {obj.returns}" if obj.is_function and obj.returns is not None else ")"
    if len(line := f"{obj.name}({', '.join(words)}{end}") <= WIDTH:
        return line
    rows = [""]
    for word in words:
        if rows[-1] and len(rows[-1]) + len(word) + 6 > WIDTH:
            rows.append("")
        rows[-1] += (" " if rows[-1] else "") + word + ","
    return f"{obj.name}(\n" + "\n".join(f"    {row}" for row in rows) + f"\n{end}"


def fields(cls):
    """What a class is made from: its __init__, or the fields of a dataclass or NamedTuple."""
    if "__init__" in cls.members and cls.members["__init__"].is_function:
        return list(cls.members["__init__"].parameters)[1:]
    record = next((str(d.value) for d in cls.decorators if "dataclass" in str(d.value)), None)
    if record is None and not any(str(base).endswith("NamedTuple") for base in cls.bases):
        return []
    kind = KINDS.keyword_only if "kw_only" in (record or "") else KINDS.positional_or_keyword
    rows = [m for m in cls.members.values() if m.is_attribute and m.annotation is not None]
    return [griffe.Parameter(m.name, annotation=m.annotation, kind=kind, default=m.value) for m in rows]


class HouseDocstrings(griffe.Extension):
    """Every docstring of a package, rewritten once when it has been loaded."""

    def __init__(self):
        self.documented = api.documented()

    def on_package(self, *, pkg, **kwargs):
        """Signatures become the first lines of what they describe."""
        self._walk(pkg)

    def _walk(self, obj):
        for member in obj.members.values():
            if member.is_alias or member.name.startswith("_"):
                continue
            if member.is_module or member.is_class or member.is_function:
                self._write(member)
            if member.is_module or member.is_class:
                self._walk(member)

    def _write(self, obj):
        if obj.docstring is None:
            return
        known = [p.name for p in obj.parameters] if obj.is_function else [] if obj.is_module else obj.members
        link = lambda name: self._entry(obj, name)
        text = markdown(obj.docstring.value, link, known, "Arguments" if obj.is_function else "Fields")
        if not obj.is_module and (obj.is_function or fields(obj)):
            text = f"```python\n{signature(obj)}\n```\n\n{text}"
        obj.docstring.value = text

    def _entry(self, obj, name):
        """The entry that a name in backticks means, seen from an object; None if it has none."""
        scope = obj if obj.is_module or obj.is_class else obj.parent
        while scope is not None:
            if name in scope.members and re.fullmatch(r"\w+", name):
                found = scope.members[name]
                path = found.target_path if found.is_alias else found.path
                return path if path in self.documented and path != obj.path else None
            scope = scope.parent
        return name if name in self.documented and name != obj.path else None
