"""Fetch what the book shows offline (KaTeX) into docs/assets/vendor, once, with checksums.

`python docs/vendor.py`. Without it the book still builds; equations then stay readable TeX.
"""

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

HOME = Path(__file__).parent / "assets" / "vendor"
KATEX = ("katex", "0.16.22", "e9e0d167db3175481cbadaff38e8d90b130f6a3ddb451a47e43c577fd511f365")
KEEP = ("katex.min.js", "katex.min.css", "fonts/")


def main():
    """Fetch KaTeX unless the folder already holds the version pinned here."""
    manifest = HOME / "manifest.json"
    name, version, sha256 = KATEX
    if manifest.exists() and json.loads(manifest.read_text()).get(name) == version:
        print(f"{name} {version} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", folder],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(folder).glob("*.tgz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise SystemExit(f"{name} {version}: sha256 is {found}, expected {sha256}")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                path = member.name.removeprefix("package/dist/")
                wanted = path.startswith(KEEP) and (not path.startswith("fonts/") or path.endswith(".woff2"))
                if member.isfile() and member.name.startswith("package/dist/") and wanted:
                    target = HOME / "katex" / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
    manifest.write_text(json.dumps({name: version}))
    print(f"fetched {name} {version}")


if __name__ == "__main__":
    main()
