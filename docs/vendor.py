"""Fetch what the book runs and shows offline into docs/assets/vendor, once, from npm and PyPI, by checksum.

`python docs/vendor.py`: KaTeX for equations; Pyodide with NumPy for the live cells, Hypothesis for "Break
it"; CodeMirror for editing. Ends by packing the library beside them (docs/bundle.py). Without it the book
still builds: equations stay readable TeX and cells stay text without a Run button.

What was fetched is kept under its checksum in $TRIPTYCH_CACHE (~/.cache/triptych unless set), so that a run
that was cut off goes on where it ended and the next checkout fetches nothing.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import bundle

HOME = Path(__file__).parent / "assets" / "vendor"
CACHE = Path(os.environ.get("TRIPTYCH_CACHE") or Path.home() / ".cache" / "triptych") / "book"
TRIES = 3

# npm: name, version, SHA-256 of the archive.
KATEX = ("katex", "0.16.22", "e9e0d167db3175481cbadaff38e8d90b130f6a3ddb451a47e43c577fd511f365")
PYODIDE = ("pyodide", "314.0.2", "6af15395a400b56dd961fcb043b40199fe462479c56cd70441e882ceddc803d8")
ESBUILD = ("esbuild-wasm", "0.28.2", "61594de12ce998652be2aa0ab72dda54bfa49407fb37ee3464468a2aac306baa")
EDITOR = (
    (
        "@codemirror/autocomplete",
        "6.20.4",
        "40b9657b137284426bcd829cdee7dc78a748337de997a12b10b5c725f67aa0d0",
    ),
    ("@codemirror/commands", "6.11.1", "f477f46d8c00278e1b387baebd53bd6556fd5f3c7401ebe2a05543600fcbff0f"),
    ("@codemirror/lang-python", "6.2.1", "022a075ece066c3015dce4fbddd4d8b6f597679e756d50e697ec16cd3e5b59ca"),
    ("@codemirror/language", "6.13.1", "e711ec28da046f6c163e777c5466d8ac805ee9ef5f51c511e8729c6789be7f83"),
    ("@codemirror/state", "6.7.6", "91d75acc955ceeaf86af9396c11cda7694fe6222aac8427fa033d89eff5ac839"),
    ("@codemirror/streamparser", "6.0.0", "b4888c5ab40350e7a1747d765948a8fa45cfd127c479dd4cdef8097046efe14a"),
    ("@codemirror/view", "6.43.15", "f0d5921406f841d211fa0887aabf10626c47676bfc63a4abed2a4d207e27c5ac"),
    ("@lezer/common", "1.5.5", "ed93cee36403124f51eae638b8a032d6694914c19704de7610db7f2a9441c963"),
    ("@lezer/highlight", "1.2.5", "e349eec1ff4382439c1e6286ae937e0203a8349c5192e2e133863391775ac7ff"),
    ("@lezer/lr", "1.4.12", "64382ee7f144221e4c655f2034393c6be9cecaf5ea2ec1c1edeb99424defb272"),
    ("@lezer/python", "1.1.19", "0e00a32717366099c01b38a19ceb73315cd1dd9b335d98b49fea50ab7c5c2a98"),
    (
        "@marijn/find-cluster-break",
        "1.0.4",
        "5d12b770b64d46632c84fcd18e1d4c09f195ed0f5dbc71f94a41f0af333eaeae",
    ),
    ("crelt", "1.0.7", "3542299c0278fdc26aceb2b13d31bffbcb89d7367706bbc457130e3fd103c03e"),
    ("style-mod", "4.1.5", "c4a44844213a141da55c51a2f81d701acdb9944465328b4a2a6b9626c6d9fc39"),
    ("w3c-keyname", "2.2.8", "05d21484026d1f2dd842c843181e391e66d60f1d5dff292d562c3f40302dab36"),
)

# PyPI: requirement, options of pip, SHA-256 of the archive. NumPy has no wheel for the browser on the index;
# the one that Pyodide builds lies, bit for bit, in a large package of which nothing else is taken.
WASM = (
    "--platform=pyemscripten_2026_0_wasm32",
    "--implementation=cp",
    "--python-version=3.14",
    "--abi=cp314",
)
HYPOTHESIS = (
    ("hypothesis==6.170.15", WASM, "1138c03edf4c4401afb28e50255644b4ab4e1ad52864456cd4e84458ba8c671a"),
    ("sortedcontainers==2.4.0", WASM, "a163dcaede0f1c021485e957a39245190e74249897e2ae4b2aa38595db237ee0"),
)
WHEELS = {  # their names, which Pyodide reads
    "hypothesis==6.170.15": "hypothesis-6.170.15-cp314-cp314-pyemscripten_2026_0_wasm32.whl",
    "sortedcontainers==2.4.0": "sortedcontainers-2.4.0-py2.py3-none-any.whl",
}
NUMPY_FROM = (
    "open-webui==0.12.4",
    ("--python-version=3.11",),
    "02e9caba96234db3fa17a92e56163b3f7f2b8ca8227fa886b85c178d696483f6",
)
NUMPY = "numpy-2.4.3-cp314-cp314-pyemscripten_2026_0_wasm32.whl"
NUMPY_SHA256 = "0cad9c1b91f0082e4f959bc0e0bf5835a2efbba6ab3b1e9d1fe6e7e564cca98e"
CORE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")

# In a document style-mod writes a <style> element, which the pages' content-security policy forbids; in a
# shadow root it adopts a style sheet, which needs no leave. The editor always takes the second way.
INLINE = "if (!root.head && root.adoptedStyleSheets && win.CSSStyleSheet)"
ADOPTED = "if (root.adoptedStyleSheets && win.CSSStyleSheet)"

# What the pages use of CodeMirror; the theme colours the classes that classHighlighter gives.
ENTRY = """
import { EditorView, drawSelection, highlightActiveLine, keymap, lineNumbers } from "@codemirror/view";
import { EditorState } from "@codemirror/state";
import { defaultKeymap, history, historyKeymap } from "@codemirror/commands";
import { bracketMatching, indentOnInput, indentUnit, syntaxHighlighting } from "@codemirror/language";
import { python } from "@codemirror/lang-python";
import { classHighlighter } from "@lezer/highlight";

export function edit(parent, text, label, { onChange, onRun }) {
  const extensions = [
    lineNumbers(), history(), drawSelection(), indentOnInput(), bracketMatching(), highlightActiveLine(),
    indentUnit.of("    "), python(), syntaxHighlighting(classHighlighter),
    keymap.of([{ key: "Mod-Enter", run: () => (onRun(), true) }, ...defaultKeymap, ...historyKeymap]),
    EditorView.contentAttributes.of({ "aria-label": label }),
    EditorView.updateListener.of((u) => u.docChanged && onChange(u.state.doc.toString())),
  ];
  return new EditorView({ parent, state: EditorState.create({ doc: text, extensions }) });
}
"""


class Failed(Exception):
    """A download that did not come, or is not what was recorded; the text is the one line that is shown."""


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check(path, expected, name):
    if (found := sha256(path)) != expected:
        raise Failed(f"{name}: sha256 is {found}, expected {expected}; nothing of it was kept")
    return path


def call(command, what, **options):
    """Run a program; Failed with the last thing that it said if it ends in error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", **options)
    except OSError as e:
        raise Failed(f"{what}: cannot start {command[0]}: {e}") from e
    if done.returncode:
        said = [x for x in (done.stderr or done.stdout).splitlines() if x.strip() and "[notice]" not in x]
        raise Failed(f"{what}: {said[-1].strip() if said else f'exit status {done.returncode}'}")


def kept(digest, name, get):
    """The file with this checksum: from the cache, or what `get(folder)` fetches there, tried three times."""
    place = CACHE / digest
    if place.is_file():
        if sha256(place) == digest:
            say(f"{name}: in the cache")
            return place
        place.unlink()  # damaged since
    CACHE.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, TRIES + 1):
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            try:
                say(name)
                check(found := get(Path(folder)), digest, name)
                return found.replace(place)
            except Failed as e:
                if attempt == TRIES:
                    raise
                say(f"{e}; once more")
                time.sleep(attempt)


def only(folder, pattern):
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise Failed(f"{len(found)} files {pattern} came, not one")
    return found[0]


def npm(name, version, digest):
    """The archive of an npm package."""

    def get(folder):
        call(["npm", "pack", "--silent", f"{name}@{version}", f"--pack-destination={folder}"], name)
        return only(folder, "*.tgz")

    return kept(digest, f"npm {name} {version}", get)


def wheel(requirement, options, digest, folder):
    """Fetch the wheel of a requirement into a folder, and say how far it is."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", f"--dest={folder}", *options, requirement]
    ended = threading.Event()
    watch = threading.Thread(target=progress, args=(folder, ended))
    watch.start()
    try:
        call(command, requirement, env=os.environ | {"TMPDIR": str(folder)})
    finally:
        ended.set()
        watch.join()
    return check(only(folder, "*.whl"), digest, requirement)


def progress(folder, ended, step=20e6):
    """A line for every 20 MB that have come."""
    shown = step
    while not ended.wait(0.2):
        sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else [0]
        if (size := max(sizes, default=0)) >= shown:
            say(f"  {size / 1e6:.0f} MB")
            shown = size - size % step + step


def pip(requirement, options, digest):
    """The wheel of a requirement."""
    return kept(digest, f"PyPI {requirement}", lambda folder: wheel(requirement, options, digest, folder))


def numpy():
    """The wheel that Pyodide's lock file names, taken out of the package that holds it."""

    def get(folder):
        say("  106 MB come, 2.9 MB are kept")
        with zipfile.ZipFile(wheel(*NUMPY_FROM, folder)) as box:
            (folder / NUMPY).write_bytes(box.read(f"open_webui/frontend/pyodide/{NUMPY}"))
        return folder / NUMPY

    return kept(NUMPY_SHA256, f"{NUMPY.split('-cp')[0]}, from PyPI {NUMPY_FROM[0]}", get)


def unpack(archive, target, wanted):
    """Take the files of an npm archive for which `wanted(path)` gives a new path."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = member.name.removeprefix("package/")
            if member.isfile() and (to := wanted(path)):
                if ".." in Path(to).parts or Path(to).is_absolute():
                    raise Failed(f"{archive.name} holds the unsafe path {to}")
                (target / to).parent.mkdir(parents=True, exist_ok=True)
                (target / to).write_bytes(tar.extractfile(member).read())


def say(text):
    print(f"  {text}", flush=True)


def katex(work, target):
    keep = ("dist/katex.min.js", "dist/katex.min.css", "dist/fonts/")

    def wanted(path):
        if path == "LICENSE":
            return path
        if path.startswith(keep) and (path.endswith(".woff2") or "/fonts/" not in path):
            return path.removeprefix("dist/")

    unpack(npm(*KATEX), target, wanted)


def pyodide(work, target):
    unpack(npm(*PYODIDE), target, lambda path: path in CORE and path)
    for requirement, options, digest in HYPOTHESIS:
        shutil.copy(pip(requirement, options, digest), target / WHEELS[requirement])
    shutil.copy(numpy(), target / NUMPY)
    lock = json.loads((target / "pyodide-lock.json").read_text())["packages"]["numpy"]
    if (lock["file_name"], lock["sha256"]) != (NUMPY, NUMPY_SHA256):
        raise Failed(f"Pyodide's lock file names {lock['file_name']} with another checksum than {NUMPY}")


def codemirror(work, target):
    unpack(npm(*ESBUILD), work / "esbuild", lambda path: path)
    licences = []
    for name, version, digest in EDITOR:
        place = work / "node_modules" / name
        unpack(npm(name, version, digest), place, lambda path: path)
        licences.append(f"{name} {version}\n\n{(place / 'LICENSE').read_text().strip()}\n")
    style = work / "node_modules" / "style-mod" / "src" / "style-mod.js"
    text = style.read_text()
    if text.count(INLINE) != 1:
        raise Failed(f"style-mod no longer holds {INLINE!r}")
    style.write_text(text.replace(INLINE, ADOPTED))
    (work / "entry.mjs").write_text(ENTRY)
    call(
        ["node", str(work / "esbuild" / "bin" / "esbuild"), str(work / "entry.mjs"), "--bundle", "--minify",
         "--format=esm", "--legal-comments=none", f"--outfile={target / 'codemirror.mjs'}"],
        "esbuild",
    )  # fmt: skip
    (target / "LICENSE").write_text("\n\n".join(licences))


PARTS = {
    "katex": (katex, [KATEX]),
    "pyodide": (pyodide, [PYODIDE, HYPOTHESIS, NUMPY_FROM, NUMPY_SHA256, CORE]),
    "codemirror": (codemirror, [ESBUILD, EDITOR, ENTRY, ADOPTED]),
}


def shipped():
    """(name, version, licence, what for) of everything in the folder that is not the project's own."""
    pinned = lambda requirement: requirement[0].split("==")
    hypothesis, containers = (pinned(x) for x in HYPOTHESIS)
    return [
        (*KATEX[:2], "MIT; its fonts SIL OFL 1.1", "sets the equations"),
        (*PYODIDE[:2], "MPL-2.0; CPython in it PSF-2.0", "Python for the browser"),
        (
            "NumPy",
            NUMPY.split("-")[1],
            "BSD-3-Clause, and those of its parts in the wheel",
            "arrays of the live cells",
        ),
        (*hypothesis, "MPL-2.0", "looks for counterexamples"),
        (*containers, "Apache-2.0", "needed by Hypothesis"),
        *((*part[:2], "MIT", "editor of the live cells") for part in EDITOR),
    ]


def sums(folder):
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def main():
    """Fetch every part that is not there, whole and in the version pinned here, then pack the library."""
    manifest = HOME / "manifest.json"
    try:
        have = json.loads(manifest.read_text())
    except (OSError, ValueError):
        have = {}
    HOME.mkdir(parents=True, exist_ok=True)
    for name, (make, pins) in PARTS.items():
        pin = hashlib.sha256(json.dumps(pins).encode()).hexdigest()
        if have.get(name) == {"pin": pin, "files": sums(HOME / name)}:
            print(f"{name}: there already")
            continue
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            work, new = Path(folder) / "work", Path(folder) / "new"
            work.mkdir()
            new.mkdir()
            make(work, new)
            shutil.rmtree(HOME / name, ignore_errors=True)
            new.rename(HOME / name)
        size = sum(p.stat().st_size for p in (HOME / name).rglob("*") if p.is_file())
        print(f"  kept {size / 1e6:.1f} MB")
        have[name] = {"pin": pin, "files": sums(HOME / name)}
        manifest.write_text(json.dumps(have, indent=1))
    bundle.main()


if __name__ == "__main__":
    try:
        main()
    except Failed as e:
        sys.exit(f"docs/vendor.py: {e}")
    except KeyboardInterrupt:
        sys.exit("docs/vendor.py: stopped; what came is kept")
