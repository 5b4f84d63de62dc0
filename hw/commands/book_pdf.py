"""The book on paper: the built site, put into one document by its own script and printed by Chromium.

The site's `assets/print/book.html` gathers the chapters. Chromium is driven over the two pipes that it offers
(`--remote-debugging-pipe`; messages are JSON, each ended by a zero byte), so nothing has to be installed.
"""

import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlencode

from hw.commands.book import server

BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge".split()
FLAGS = (
    "--headless --remote-debugging-pipe --disable-gpu --no-first-run --no-default-browser-check "
    "--disable-background-networking --disable-component-update --disable-sync --disable-extensions "
    "--disable-dev-shm-usage --force-color-profile=srgb"
)
STYLE = "width: 100%; font: 7pt sans-serif; text-align: center"
FOOTER = f'<div style="{STYLE}"><span class="pageNumber"></span></div>'
LIMIT_S = 1800  # for the whole book; a busy machine takes a few minutes


def find_chromium(named: str | None = None) -> str:
    """The path of a Chromium or Chrome: the one named, $CHROMIUM, or the first found on PATH.

    Raises: OSError that says what was looked for.
    """
    if wanted := named or os.environ.get("CHROMIUM"):
        if found := shutil.which(wanted):
            return found
        raise OSError(f"there is no browser {wanted!r}; --chromium names the program of a Chromium or Chrome")
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise OSError(f"printing needs Chromium: none of {', '.join(BROWSERS)} is on PATH; --chromium names one")


def print_book(
    site: Path, file: Path, *, only: Iterable[str] = (), chromium: str | None = None, say=lambda text: None
) -> dict:
    """Print the built book in `site` to `file` as PDF.

    Args: only: pages as they stand in addresses ("attention/flash"), all but the API reference if none.
      chromium: the browser's program, see `find_chromium`. say: called with what is done next.
    Returns: {"pages": how many, "chapters": {page of the book: page of the PDF}, "equations": how many}.
    Raises: OSError if the site lacks the document, a page is unknown, there is no folder for the file, or the
      browser fails.
    """
    if not file.parent.is_dir():
        raise OSError(f"there is no folder {file.parent} to print to")
    with document(site, only, chromium, say) as (browser, told):
        if told["wrong"]:
            raise OSError(f"equations cannot be set: {told['wrong'][:3]}")
        say(f"printing {len(told['chapters'])} pages of the book")
        numbers = page_numbers(browser.pdf(draft=True))
        browser.value(f"triptychBook.number({json.dumps(numbers)})")
        say("printing them again, with the numbers of pages")
        data = browser.pdf()
    if (again := page_numbers(data)) != numbers:
        raise OSError("the numbers of pages moved between the two prints")
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(data)
    part.replace(file)
    chapters = {c["path"] or "index": again.get(c["id"]) for c in told["chapters"]}
    return {"pages": len(page_objects(data)), "chapters": chapters, "equations": told["equations"]}


@contextlib.contextmanager
def document(site: Path, only: Iterable[str] = (), chromium: str | None = None, say=lambda text: None):
    """A browser that shows the whole document, and what the document's script tells of it.

    Args, Raises: as `print_book`.
    """
    program = find_chromium(chromium)
    if not (site / "assets" / "print" / "book.html").is_file():
        raise OSError(f"{site} holds no book that can be printed; `triptych book --build` makes it")
    with server(site, 0) as serving, _Chromium(program) as browser:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        try:
            say("gathering the chapters")
            query = f"?{urlencode({'only': ','.join(only)})}" if only else ""
            host, port = serving.server_address[:2]
            browser.open(f"http://{host}:{port}/assets/print/book.html{query}")
            told = browser.value("triptychBook.ready.then((told) => told, (e) => ({failed: e.message}))")
            if "failed" in told:
                raise OSError(told["failed"])
            yield browser, told
        finally:
            serving.shutdown()


def page_objects(data: bytes) -> list[int]:
    """The object numbers of a PDF's pages, in their order. Chromium writes objects in plain sight."""
    objects = dict(_OBJECT.findall(data))
    root = next(n for n, body in objects.items() if _ROOT.search(body))

    def leaves(number):
        body = objects[number]
        if b"/Type /Pages" not in body:
            return [int(number)]
        kids = re.search(rb"/Kids \[(.*?)\]", body, re.DOTALL)[1]
        return [leaf for kid in re.findall(rb"(\d+) 0 R", kids) for leaf in leaves(kid)]

    return leaves(root)


_OBJECT = re.compile(rb"(?:^|\n)(\d+) 0 obj\n(.*?)\nendobj", re.DOTALL)
_ROOT = re.compile(rb"/Type /Pages(?!.*/Parent)", re.DOTALL)


def page_numbers(data: bytes) -> dict[str, int]:
    """{name of a link's target: number of its page, from 1} of a PDF that Chromium wrote."""
    at = {number: i for i, number in enumerate(page_objects(data), 1)}
    found = {}
    for name, number in re.findall(
        rb"/(?!Dest )([^\s/\[\]<>()]+) \[(\d+) 0 R /XYZ", data
    ):  # Dest: the outline's
        text = re.sub(rb"#([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), name).decode()
        found[text] = at[int(number)]
    return found


def _kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


class _Chromium:
    """A browser of its own profile with one page, for as long as the `with` block runs."""

    def __init__(self, program):
        self.program, self.session, self.count, self.rest, self.events = program, None, 0, b"", []
        self.until = time.monotonic() + LIMIT_S

    def __enter__(self):
        with contextlib.ExitStack() as opened:
            self.start(opened)
            self.closing = opened.pop_all()
        return self

    def __exit__(self, *error):
        self.closing.close()

    def start(self, opened):
        """Start the browser and open a page; what has to be undone goes on the stack."""
        profile = opened.enter_context(
            tempfile.TemporaryDirectory(prefix="triptych-chromium-", ignore_cleanup_errors=True)
        )
        (their_read, self.write), (self.read, their_write) = os.pipe(), os.pipe()
        opened.callback(os.close, self.write)
        opened.callback(os.close, self.read)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # The browser reads 3 and writes 4; the copies lie higher, so that neither is overwritten.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (their_read, their_write)]
        command = [self.program, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses root otherwise
        moves = [(null, 0), (null, 1), (null, 2), (theirs[0], 3), (theirs[1], 4)]
        try:
            process = os.posix_spawn(
                self.program, command, os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, a, b) for a, b in moves], setpgroup=0,
            )  # fmt: skip
        finally:
            for fd in (*theirs, null, their_read, their_write):
                os.close(fd)
        opened.callback(os.waitpid, process, 0)
        opened.callback(_kill, process)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")

    def ask(self, method, **params):
        """The result of one command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self.write, data) :]
        except BrokenPipeError:
            raise OSError(f"{self.program} ended by itself") from None
        while (answer := self.hear()).get("id") != self.count:
            self.events.append(answer.get("method"))
        if "error" in answer:
            raise OSError(f"{self.program} refuses {method}: {answer['error'].get('message')}")
        return answer["result"]

    def hear(self):
        """The next message."""
        while b"\0" not in self.rest:
            left = self.until - time.monotonic()
            if left <= 0 or not select.select([self.read], [], [], left)[0]:
                raise OSError(f"{self.program} did not answer within {LIMIT_S} s")
            if not (data := os.read(self.read, 1 << 20)):
                raise OSError(f"{self.program} ended by itself; does it start in a terminal?")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        """Go to a page and wait until it is loaded."""
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events:
            self.events.append(self.hear().get("method"))

    def value(self, expression):
        """The value of an expression in the page, waited for if it is a promise."""
        told = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise OSError(f"the page failed: {told['exceptionDetails']['exception'].get('description')}")
        return told["result"].get("value")

    def pdf(self, draft=False):
        """The page as PDF; a draft has the same pages, without an outline and the tags for screen readers."""
        told = self.ask(
            "Page.printToPDF", printBackground=True, preferCSSPageSize=True, displayHeaderFooter=True,
            headerTemplate="<span></span>", footerTemplate=FOOTER, generateDocumentOutline=not draft,
            generateTaggedPDF=not draft, transferMode="ReturnAsStream",
        )  # fmt: skip
        parts = []
        while True:
            piece = self.ask("IO.read", handle=told["stream"], size=1 << 20)
            data = piece["data"]
            parts.append(base64.b64decode(data) if piece.get("base64Encoded") else data.encode("latin-1"))
            if piece["eof"]:
                self.ask("IO.close", handle=told["stream"])
                return b"".join(parts)
