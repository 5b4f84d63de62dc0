"""Pack what live cells import into docs/assets/vendor/library.zip, with a list of the files beside it.

`python docs/bundle.py`, before every build of the book that should run code; docs/vendor.py ends with it.
The list tells a page which of its code blocks is which file or exercise, by a fingerprint of the text: a
block that differs from the packed file gets no Run button, so what runs is what is shown.
"""

import json
import re
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "docs" / "assets" / "vendor"


def library():
    """The files of the archive: ref with its data, hw's core, laws, exercises, what they import of tests."""
    skip = ("hw/cli.py", "hw/__main__.py", "hw/scaffold.py", "hw/commands/")
    files = [p for p in (ROOT / "ref").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files += (ROOT / "hw").rglob("*.py")
    files += (ROOT / "tests").rglob("__init__.py")
    waiting = [p for name in ("laws_*.py", "exercises_*.py") for p in (ROOT / "tests").rglob(name)]
    waiting += [ROOT / "tests" / "docs" / f"{name}.py" for name in ("kernel_steps", "mutants", "solutions")]
    while waiting:
        files.append(path := waiting.pop())
        for part, name in re.findall(r"^from (tests(?:\.\w+)*) import (\w+)", path.read_text(), re.MULTILINE):
            for found in (
                ROOT / f"{part.replace('.', '/')}.py",
                ROOT / part.replace(".", "/") / f"{name}.py",
            ):
                if found.is_file() and found not in files:
                    waiting.append(found)
    paths = sorted({p.relative_to(ROOT).as_posix() for p in files})
    return [p for p in paths if not p.startswith(skip)]


def fingerprint(text):
    """32-bit FNV-1a of the text in UTF-8, without blanks at its ends; the same as in assets/js/live.js."""
    h = 0x811C9DC5
    for byte in text.strip().encode():
        h = (h ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{h:08x}"


def exercises(text):
    """{name: stub} of a file of exercises: its sections of that name, which the chapter includes."""
    return dict(re.findall(r"# --8<-- \[start:(\w+)\]\n(.*?)# --8<-- \[end:\1\]", text, re.DOTALL))


def main():
    """Write both files; the archive is the same bytes for the same files."""
    HOME.mkdir(parents=True, exist_ok=True)
    blocks, stubs, laws = {}, {}, {}
    with zipfile.ZipFile(HOME / "library.zip", "w", zipfile.ZIP_DEFLATED) as box:
        for path in [*library(), *(f"docs/{name}.py" for name in ("live", "panel", "price"))]:
            data = (ROOT / path).read_bytes()
            info = zipfile.ZipInfo(path.removeprefix("docs/"), (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            box.writestr(info, data)
            name = path.rsplit("/", 1)[-1]
            if path.startswith("ref/") and path.endswith(".py") and data.strip():
                blocks[fingerprint(data.decode())] = path
            elif name.startswith("exercises_"):
                module = path[:-3].replace("/", ".")
                for stub, text in exercises(data.decode()).items():
                    if not stub.startswith("solve_"):
                        stubs[fingerprint(text)] = module, stub
            elif name.startswith("laws_"):
                part = path.split("/")[1]
                laws[f"{part}/{name[5:-3]}"] = path[:-3].replace("/", ".")
    # Without the runtime no wheel is listed, and pages show no Run button.
    runtime = (HOME / "pyodide").glob("*.whl")
    wheels = sorted(p.name for p in runtime if not p.name.startswith("numpy"))
    index = {"files": blocks, "exercises": stubs, "laws": laws, "wheels": wheels}
    (HOME / "library.json").write_text(json.dumps(index))
    size = (HOME / "library.zip").stat().st_size
    print(
        f"library: {len(blocks)} files of ref, {len(laws)} laws, {len(stubs)} exercises, {size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
