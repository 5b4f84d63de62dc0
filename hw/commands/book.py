"""`triptych book`: build the book of a checkout, print it, or serve it on this machine."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.text import Text

from hw.commands.shared import ROOT, emit


def book(options):
    """Build in options.site, print what stands there, or else serve it until the reader ends it."""
    site = Path(options.site or ROOT / "site").resolve()
    say = lambda text: print(f"the book: {text}", file=sys.stderr, flush=True)
    if options.build:
        build(ROOT, site, say)
        if not options.pdf:
            emit(options, {"site": str(site)}, lambda out: out.print(Text(f"built in {site}")))
            return
    if options.pdf:
        from hw.commands.book_pdf import print_book

        file = Path(options.pdf).resolve()
        told = print_book(site, file, only=options.page, chromium=options.chromium, say=say)
        told = {"file": str(file), **told}
        emit(options, told, lambda out: out.print(Text(f"{told['pages']} pages in {file}")))
        return
    with server(site, options.port) as serving:
        url = "http://{}:{}/".format(*serving.server_address[:2])
        emit(options, {"url": url, "site": str(site)}, lambda out: out.print(f"{url}  (Ctrl+C ends)"))
        sys.stdout.flush()
        try:
            serving.serve_forever()
        except KeyboardInterrupt:  # the usual way to end it
            pass


def build(root: Path, site: Path, say=print) -> Path:
    """Fetch what runs in the page, where that is possible, and build the book in `site`; returns `site`.

    Raises: OSError if root is no checkout, MkDocs is not installed or the build fails.
    """
    if not (root / "mkdocs.yml").is_file():
        raise OSError(f"the book is built in a checkout of triptych, and {root} has no mkdocs.yml")
    if importlib.util.find_spec("mkdocs") is None:
        raise OSError("building the book needs MkDocs: pip install -e '.[docs]' in the checkout")
    say("what runs in the page; the first time 115 MB come")
    vendor = [sys.executable, root / "docs" / "vendor.py"]
    done = subprocess.run(vendor, cwd=root, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"triptych: the book is built without live cells: {said}", file=sys.stderr)
    say("pages, about a minute")
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", site]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    if (done := subprocess.run(mkdocs, cwd=root, capture_output=True, text=True, env=quiet)).returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"mkdocs build ended with {done.returncode}: {said}")
    return site


class _Pages(SimpleHTTPRequestHandler):
    """Files of one folder, with the types that modules and WebAssembly need, and no log."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".json": "application/json",
        ".whl": "application/octet-stream",
    }
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """A file; the site map with this server's address, where the pages look for their neighbours."""
        if self.path.split("?")[0] != "/sitemap.xml":
            return super().do_GET()
        file = Path(self.directory) / "sitemap.xml"
        if not file.is_file():
            return self.send_error(404)
        host = self.headers.get("Host") or "{}:{}".format(*self.server.server_address[:2])
        body = re.sub(r"<loc>https?://[^/<]+", f"<loc>http://{host}", file.read_text()).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing: the terminal is for the reader."""


def server(site: Path, port: int) -> ThreadingHTTPServer:
    """A server of the built book on this machine alone; port 0 takes a free one.

    Raises: OSError if the book is not built or the port is taken.
    """
    if not (site / "index.html").is_file():
        raise OSError(f"no built book in {site}; `triptych book --build` makes it")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Pages, directory=str(site)))
    except OSError as e:
        raise OSError(f"port {port} cannot be used ({e.strerror}); choose another with --port") from e
