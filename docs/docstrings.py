"""Docstrings of the house's form as Markdown.

The form: a first line that says what comes out, then text and the sections Args, Returns, Raises, Source,
each on one line or with lines indented under it. Shapes stand in brackets, `names` in backticks. What is
plain text there stays plain text in the page: nothing in a docstring is taken for markup, but backticks.
"""

import inspect
import re
import textwrap

HEADS = {
    "Args": "Arguments",
    "Returns": "Returns",
    "Raises": "Raises",
    "Source": "Source",
    "Sources": "Sources",
}
_HEAD = re.compile(rf"({'|'.join(HEADS)}): +")
_INLINE = re.compile(rf"(?<=[.;)\]]) +(?=(?:{'|'.join(HEADS)}): )")  # "Returns: [N]. Raises: ValueError ..."
_ENTRY = re.compile(r"(\w+(?:, \*{0,2}\w+)*): ")
_SHAPE = r"\[(?:\.\.\.|[^\W_][\w'+*/ -]*(?:\([^()]*\))?)?(?:, ?[\w'+*/ ().-]+)*\]"
_TOLD = re.compile(  # what is set as code: `this`, x [L, D], [L, D], the names of errors
    rf"`(?P<tick>[^`\n]+)`|(?:\b(?P<array>[A-Za-z_]\w*) )?(?P<shape>{_SHAPE})"
    r"|(?P<error>\b[A-Z][a-z]+[A-Z]?\w*Error\b)"
)
_MARKUP = re.compile(r"[\\`*_{}\[\]#|~^$&<>]")
_COMMENTED = re.compile(r"\S {2,}# ")  # a line of code with its comment, indented or not
WORDS = {"a", "as", "at", "by", "if", "in", "is", "it", "no", "of", "on", "or", "to"}


def escape(text):
    """Plain text as Markdown that shows it; by entities, for a backslash and a bracket begin an equation."""
    return _MARKUP.sub(lambda m: f"&#{ord(m[0])};", text)


def code(text, link=None):
    fence = "``" if "`" in text else "`"
    out = f"{fence}{text}{fence}"
    return f"[{out}][{link}]" if link else out


def prose(text, link=lambda name: None, arrays=()):
    """One paragraph as Markdown: names, shapes and errors as code, the rest escaped; known names are links.

    arrays: names that stand with the shape that follows them, beside short ones and those with an underscore.
    """
    out, at = [], 0
    for m in _TOLD.finditer(text):
        told, before = m[0], text[at : m.start()]
        if (name := m["array"]) and not (
            name in arrays or "_" in name or (len(name) < 3 and name not in WORDS)
        ):
            before, told = f"{before}{name} ", m["shape"]
        out += [escape(before), code(m["tick"], link(m["tick"])) if m["tick"] else code(told)]
        at = m.end()
    out.append(escape(text[at:]))
    # What would begin a list, a quotation or a definition at the start of a line.
    return re.sub(r"^([-+:=]|\d+(?=[.)]))", lambda m: f"&#{ord(m[1][0])};{m[1][1:]}", "".join(out))


def blocks(text):
    """[(kind, text)]: "text", "code", or a section's name with the list of its entries."""
    found, section = [], None
    lines = inspect.cleandoc(text).splitlines()
    for i, line in enumerate(lines):
        indent, words = len(line) - len(line.lstrip()), line.strip()
        blank = not i or not lines[i - 1].strip()
        if not words:
            if found and found[-1][0] == "code":
                found[-1][1].append("")
            continue
        goes_on = bool(found) and found[-1][0] == "code"
        if (indent >= 4 and (blank or goes_on)) or _COMMENTED.search(line) or (goes_on and not blank):
            if not goes_on:
                found.append(("code", []))
            found[-1][1].append(line)
            section = None
            continue
        for n, piece in enumerate(_INLINE.split(words)):
            if head := _HEAD.match(piece + " "):
                section = head[1]
                found.append((section, [piece[head.end() :].strip()] if piece[head.end() :].strip() else []))
            elif section and n == 0 and not blank and (indent or not ended(found[-1][1])):
                if (indent and indent <= 2 and _ENTRY.match(piece)) or not found[-1][1]:
                    found[-1][1].append(piece)
                else:
                    found[-1][1][-1] += after(found[-1][1][-1]) + piece
            elif section and n:
                found[-1][1][-1] += after(found[-1][1][-1]) + piece
            else:
                section = None
                if blank or not found or found[-1][0] != "text":
                    found.append(("text", [piece]))
                else:
                    found[-1][1][-1] += after(found[-1][1][-1]) + piece
    return found


def after(text):
    """What stands between a line and the next: nothing where a word is cut at its hyphen."""
    return "" if re.search(r"[a-z]-$", text) else " "


def ended(entries):
    return bool(entries) and entries[-1].endswith((".", ":"))


def entries(text, known):
    """[(names, text)] of "names: text. names: text" where the names are known, "" before the first."""
    found = [["", ""]]
    for piece in re.split(r"(?<=[.)]) (?=\w+(?:, \w+)*: )", text):
        named = _ENTRY.match(piece)
        if named and set(named[1].split(", ")) <= set(known):
            found.append([named[1], piece[named.end() :]])
        else:
            found[-1][1] += (" " if found[-1][1] else "") + piece
    return [e for e in found if e[1]]


def markdown(text, link=lambda name: None, known=(), of="Arguments"):
    """A docstring as Markdown.

    link: from a name in backticks to the entry that it means, or None. known: names of the arguments or
    fields; a paragraph that explains them without "Args:" becomes a list under `of`.
    """
    out, last = [], None

    def listed(head, rows):
        nonlocal last
        for names, told in rows:
            named = ", ".join(code(n) for n in names.split(", ")) + ": " if names else ""
            out.append(("" if last == head else f"{head}\n") + f":   {named}{prose(told, link, known)}")
            last = head

    for kind, parts in blocks(text):
        if kind in ("code", "text"):
            last = last if kind == "text" and entries(parts[0], known)[0][0] else None
        if kind == "code":
            out.append("```python\n" + textwrap.dedent("\n".join(parts)).strip("\n") + "\n```")
        elif kind == "text":
            rows = entries(parts[0], known)
            if not rows[0][0]:
                out.append(prose(rows.pop(0)[1], link, known))
            listed(of, rows)
        else:
            rows = []
            for part in parts:
                named = _ENTRY.match(part) if kind == "Args" else None
                names = set(named[1].split(", ")) if named else set()
                rows += entries(part, {*known, *names}) if kind == "Args" else [["", part]]
            listed(HEADS[kind], rows)
    return "\n\n".join(out)
