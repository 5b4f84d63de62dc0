"""The book's machinery: what is packed for the page, how the page's Python runs it, how it is served."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from hw.cli import main
from hw.commands.book import build, server
from hw.commands.book_pdf import find_chromium, page_numbers, page_objects
from ref.catalog import CATALOG

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import bundle  # noqa: E402
import vendor  # noqa: E402

sys.path.pop(0)

# What the worker does, in a process of its own with nothing but the archive on its path.
PAGE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import live
out = []
for kind, what, edits in json.loads(sys.argv[2]):
    said = []
    ok = live.run(kind, what, edits, said.append)
    out.append([ok, "".join(said)])
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """run(*calls) -> [(ok, text)], on the unpacked archive."""
    home = tmp_path_factory.mktemp("library")
    bundle.HOME = home / "vendor"
    bundle.main()
    with zipfile.ZipFile(home / "vendor" / "library.zip") as box:
        box.extractall(home / "box")

    def run(*calls):
        command = [sys.executable, "-I", "-c", PAGE, str(home / "box"), json.dumps(calls)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run.box = home / "box"
    run.list = json.loads((home / "vendor" / "library.json").read_text())
    return run


def test_book_library_holds_every_technique_and_its_laws(page):
    files = set(page.list["files"].values())
    for t in CATALOG:
        assert f"ref/{t.part}/{t.slug}.py" in files
        assert page.list["laws"][f"{t.part}/{t.slug}"] == f"tests.{t.part}.laws_{t.slug}"
    assert page.list["wheels"] == []  # no runtime there: pages show no Run button


def test_book_library_is_all_that_laws_and_exercises_import(page):
    """In the page there is NumPy and Hypothesis and no JAX."""
    modules = sorted({*page.list["laws"].values(), *(m for m, _ in page.list["exercises"].values())})
    code = "import sys, importlib; sys.path.insert(0, sys.argv[1]); sys.modules['jax'] = None\n"
    code += "for name in sys.argv[2:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(page.box), *modules], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_book_fingerprint_is_fnv1a_of_the_stripped_text():
    assert bundle.fingerprint("\na\n") == "e40c292c"  # the published value for "a"
    assert bundle.fingerprint("") == "811c9dc5"


def test_book_cells_print_and_show_their_last_value(page):
    ((ok, text),) = page(("cell", "import numpy as np\nprint('x')\nnp.arange(3) * 2", {}))
    assert ok
    assert text == "x\narray([0, 2, 4])\n"


def test_book_tracebacks_name_the_readers_lines(page):
    cell = "from ref.dims import dims\nimport numpy as np\ndims(q=(np.ones(3), 'L D'))"
    failed, syntax, long = page(
        ("cell", cell, {}), ("cell", "x = 1\nif x\n", {}), ("cell", "print('a' * 300_000)", {})
    )
    assert failed[0] is False
    assert 'File "<cell>", line 3, in <module>\n    dims(q=' in failed[1]
    assert 'File "ref/dims.py", line ' in failed[1]
    assert "live.py" not in failed[1]
    assert failed[1].endswith("ValueError: q must have shape [L, D], got [3]\n")
    assert 'File "<cell>", line 2' in syntax[1]
    assert long[0]
    assert long[1].endswith("(what follows is not shown)\n")
    assert len(long[1]) < 200_100


def test_book_edits_are_what_runs_and_end_with_the_run(page):
    path = "ref/attention/flash.py"
    own = (ROOT / path).read_text()
    call = "from ref.attention.flash import block_sizes\nprint(block_sizes(4096, 64))"
    edited = own.replace("    return min(block_k, d), block_k\n", "    return 7, 8\n")
    assert edited != own
    got = page(("cell", call, {}), ("cell", call, {path: edited}), ("cell", call, {}), ("file", path, {}))
    assert [x[1] for x in got[:3]] == ["(16, 16)\n", "(7, 8)\n", "(16, 16)\n"]
    assert got[3][0]
    assert "flash_attention(q=float64[9, 48, 64]" in got[3][1]


def test_book_laws_hold_and_break_with_a_counterexample(page):
    path, laws = "ref/attention/flash.py", "tests.attention.laws_flash"
    wrong = (ROOT / path).read_text().replace("opt.scale * qi @", "qi @")
    holds, breaks = page(("laws", laws, {}), ("laws", laws, {path: wrong}))
    assert holds[0]
    assert "laws hold" in holds[1]
    assert breaks[0] is False
    assert "BROKEN" in breaks[1]
    assert "Smallest counterexample: law_flash" in breaks[1]
    assert breaks[1].endswith("laws held before this one.\n")


def test_book_refuses_a_download_that_is_not_the_recorded_one(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(vendor.Failed, match=r"sha256 is 2d7116.*expected 00.*nothing of it was kept"):
        vendor.check(tmp_path / "x", "00", "x 1")
    with pytest.raises(vendor.Failed, match="cannot start"):
        vendor.call([str(tmp_path / "nothing")], "x")


def test_book_fetches_again_what_came_broken_or_was_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vendor, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(vendor.time, "sleep", lambda seconds: None)
    digest, coming = hashlib.sha256(b"whole").hexdigest(), []

    def get(folder):
        (folder / "x").write_bytes(coming.pop(0))
        return folder / "x"

    coming += [b"who", b"whole"]
    place = vendor.kept(digest, "x 1", get)
    assert place.read_bytes() == b"whole"
    assert "expected" in capsys.readouterr().out
    assert vendor.kept(digest, "x 1", get) == place  # nothing is fetched: nothing comes any more
    place.write_bytes(b"damaged")
    coming += [b"whole"]
    assert vendor.kept(digest, "x 1", get).read_bytes() == b"whole"
    place.unlink()
    coming += [b"a", b"b", b"c"]
    with pytest.raises(vendor.Failed, match="x 1: sha256 is"):
        vendor.kept(digest, "x 1", get)
    assert not list((tmp_path / "cache").iterdir())


def test_book_parts_are_made_once_and_mended(tmp_path, monkeypatch):
    made = []

    def make(work, target):
        made.append(work.is_dir())
        (target / "x.js").write_text("1")

    def fail(work, target):
        (target / "y.js").write_text("half")
        raise vendor.Failed("no network")

    monkeypatch.setattr(vendor, "HOME", tmp_path / "vendor")
    monkeypatch.setattr(vendor.bundle, "main", lambda: None)
    monkeypatch.setattr(vendor, "PARTS", {"a": (make, ["1"]), "b": (fail, ["1"])})
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "manifest.json").write_text("an older form")
    for _ in range(2):
        with pytest.raises(vendor.Failed, match="no network"):
            vendor.main()
    assert made == [True]  # what came before the failure stays, and of b nothing
    assert {p.name for p in (tmp_path / "vendor").iterdir()} == {"a", "manifest.json"}
    monkeypatch.setattr(vendor, "PARTS", {"a": (make, ["1"])})
    (tmp_path / "vendor" / "a" / "x.js").write_text("changed")
    vendor.main()
    assert (tmp_path / "vendor" / "a" / "x.js").read_text() == "1"
    monkeypatch.setattr(vendor, "PARTS", {"a": (make, ["2"])})
    vendor.main()
    vendor.main()
    assert len(made) == 3


def test_book_lists_the_licence_of_all_that_it_ships():
    rows = vendor.shipped()
    assert {"katex", "pyodide", "NumPy", "hypothesis", "sortedcontainers"} < {name for name, *_ in rows}
    assert all(len(row) == 4 and all(row) for row in rows)


def test_book_is_served_with_its_types_and_its_own_address(tmp_path):
    (tmp_path / "index.html").write_text("<p>hello")
    (tmp_path / "worker.mjs").write_text("1")
    (tmp_path / "sitemap.xml").write_text("<loc>https://triptych.invalid/a/</loc>")
    with server(tmp_path, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{serving.server_address[1]}"
        get = lambda path: urllib.request.urlopen(url + path, timeout=10)
        try:
            with get("/") as page, get("/worker.mjs") as module, get("/sitemap.xml") as places:
                assert page.read() == b"<p>hello"
                assert module.headers["Content-Type"] == "text/javascript"
                assert places.read().decode() == f"<loc>{url}/a/</loc>"
            with pytest.raises(urllib.error.HTTPError, match="404") as missing:
                get("/../secret")
            missing.value.close()
        finally:
            serving.shutdown()
            thread.join()


def test_book_that_is_not_there_is_refused_in_a_line(tmp_path, capsys):
    assert main(["book", "--site", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"triptych: no built book in {tmp_path}; `triptych book --build` makes it\n"
    )
    with pytest.raises(OSError, match="checkout of triptych"):
        build(tmp_path, tmp_path)
    (tmp_path / "index.html").write_text("x")
    with server(tmp_path, 0) as busy, pytest.raises(OSError, match="choose another with --port"):
        server(tmp_path, busy.server_address[1])


def test_book_finds_a_browser_or_says_what_it_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"printing needs Chromium: none of chromium, .* --chromium names one"):
        find_chromium()
    program = tmp_path / "google-chrome"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    assert find_chromium() == str(program)
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    with pytest.raises(OSError, match="no browser 'no-such-browser'"):
        find_chromium()
    assert find_chromium(str(program)) == str(program)
    call = ["book", "--site", str(tmp_path), "--pdf", str(tmp_path / "x.pdf"), "--chromium", str(program)]
    assert main(call) == 2
    assert "holds no book that can be printed" in capsys.readouterr().err
    (tmp_path / "index.html").write_text("x")
    (tmp_path / "assets" / "print").mkdir(parents=True)
    (tmp_path / "assets" / "print" / "book.html").write_text("x")
    assert main(call) == 2
    assert f"{program} ended by itself" in capsys.readouterr().err
    assert main([*call[:4], str(tmp_path / "no" / "x.pdf"), *call[5:]]) == 2
    assert f"there is no folder {tmp_path / 'no'} to print to" in capsys.readouterr().err
    assert not (tmp_path / "x.pdf").exists()


def test_book_reads_the_pages_of_links_from_a_pdf():
    """In the form that Chromium writes: a tree of pages, names of targets in a dictionary."""
    objects = (
        b"<</Type /Page\n/Parent 4 0 R>>",
        b"<</Type /Page\n/Parent 4 0 R>>",
        b"<</Type /Page\n/Parent 5 0 R>>",
        b"<</Type /Pages\n/Count 2\n/Kids [2 0 R 1 0 R]\n/Parent 5 0 R>>",
        b"<</Type /Pages\n/Count 3\n/Kids [4 0 R 3 0 R]>>",
        b"<</a#2eb--x [3 0 R /XYZ 48 770 0]\n/c [2 0 R /XYZ 0 0 0]>>",
        b"<</Title (a)\n/Dest [1 0 R /XYZ 0 0 0]>>",  # an entry of the outline
    )
    data = b"%PDF-1.4\n" + b"".join(b"%d 0 obj\n%s\nendobj\n" % pair for pair in enumerate(objects, 1))
    assert page_objects(data) == [2, 1, 3]
    assert page_numbers(data) == {"a.b--x": 3, "c": 1}


def test_book_pages_and_figures_have_no_style_attributes():
    """The pages' content-security policy stops them (docs/theme/main.html); SVG has fill, stroke, width."""
    sources = [
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/*.py"),
        *ROOT.glob("hw/**/*.py"),
        *ROOT.glob("ref/**/*.py"),
    ]
    told = re.compile(r"""\sstyle=["'{][a-z-]+:""")
    found = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in sources
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if told.search(line)
    ]
    assert not found, f"style attributes at {found}"


def test_book_cells_import_only_what_is_packed():
    """What a shown cell imports of tests is in the archive, or its Run button would end in an error."""
    packed, asked = set(bundle.library()), set()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for cell in re.findall(r'```python exec="on" source[^\n]*\n(.*?)```', page.read_text(), re.DOTALL):
            asked |= set(re.findall(r"^\s*from (tests(?:\.\w+)*) import (\w+)", cell, re.MULTILINE))
    assert asked
    for module, name in asked:
        at = module.replace(".", "/")
        assert {f"{at}.py", f"{at}/{name}.py"} & packed, f"{module} {name}"
