"""Stored results of experiments: docs/data/<name>.json with device, date, versions and a hash of the code.

A name is a slug, or a slug and a device where one script measures on several (hw_gpu, hw_gpu_h200).
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "data"


def store(name, results, files):
    """Write `results` (JSON values) to docs/data/<name>.json, stamped; returns the path.

    files: the code whose change makes the results stale, as paths from the root of the checkout.
    """
    record = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device(),
        "versions": versions(),
        "files": sorted(map(str, files)),
        "sha256": digest(files),
        "results": results,
    }
    DATA.mkdir(parents=True, exist_ok=True)
    path = DATA / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def load(name):
    """The stored record of `name`; FileNotFoundError if the experiment was never run."""
    return json.loads((DATA / f"{name}.json").read_text())


def is_fresh(name):
    """Whether the code that the stored results ran is the code of this checkout."""
    record = load(name)
    return all((ROOT / f).exists() for f in record["files"]) and digest(record["files"]) == record["sha256"]


def digest(files):
    """SHA-256 of the files' text without white space and comment lines, which change nothing."""
    h = hashlib.sha256()
    for f in sorted(map(str, files)):
        lines = (ROOT / f).read_text().splitlines()
        code = "".join("".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
        h.update(f"{f}\n{code}\n".encode())
    return h.hexdigest()


def device():
    """What the results were measured on, in words: processor and cores, and the GPU if JAX sees one."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{names[0] if names else platform.processor() or platform.machine()}, {usable} cores"
    if "jax" in sys.modules:
        import jax

        gpus = [d for d in jax.devices() if d.platform == "gpu"]
        text = f"{len(gpus)} x {gpus[0].device_kind}; host {text}" if gpus else text
    return text


def versions():
    """Python and the packages whose version can change a result."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "jax", "jaxlib"):
        found[package] = importlib.metadata.version(package)
    return found


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
