"""The command line: list the techniques, show the three panels of one, race it, price your own, fetch
models, read the book.
"""

import argparse
import difflib
import os
import re
import sys

import ref

for _package in ("ref", "accel", "hw"):  # a foreign package of our name is named before anything else
    ref.require_own(_package)

from hw.commands.bench import bench  # noqa: E402
from hw.commands.book import book  # noqa: E402
from hw.commands.fetch import fetch_source  # noqa: E402
from hw.commands.listing import list_targets, list_techniques  # noqa: E402
from hw.commands.new import new  # noqa: E402
from hw.commands.price import price  # noqa: E402
from hw.commands.run import run  # noqa: E402
from hw.commands.shared import Refusal  # noqa: E402
from hw.figures import KINDS  # noqa: E402
from ref.catalog import BY_SLUG, PARTS  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after one line on standard error."""
    try:
        options = _parser().parse_args(argv)
        options.json = getattr(options, "json", False)
        options.run(options)
        sys.stdout.flush()
        return 0
    except SystemExit as e:  # argparse: --help and --version end with 0, a mistake with 2
        return e.code or 0
    except BrokenPipeError:  # `triptych | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("stopped")
    except (Refusal, LookupError, ValueError, NotImplementedError, MemoryError, ImportError, OSError) as e:
        if os.environ.get("TRIPTYCH_TRACEBACK"):
            raise
        return _fail(str(e.args[0] if isinstance(e, KeyError) and e.args else e) or type(e).__name__)


def _fail(message):
    line = " ".join(str(message).split())
    print(f"triptych: {line}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake and the nearest command for a misspelt one."""

    def error(self, message):
        if found := re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            what, word = "command" if found[1] == "COMMAND" else found[1], found[2]
            choices = [c.strip(" '") for c in found[3].split(",")]
            if what == "command" and word in BY_SLUG:
                message = f"no command {word!r}; did you mean `triptych run {word}`?"
            elif near := difflib.get_close_matches(word, choices, n=1):
                message = f"no {what} {word!r}; did you mean {near[0]!r}?"
            else:
                message = f"no {what} {word!r}; there are {', '.join(choices)}"
        sys.exit(_fail(message))


def _parser():
    common = argparse.ArgumentParser(add_help=False)
    # SUPPRESS: the flag may stand before or after the command, and the second default must not undo the
    # first.
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text"
    )
    parser = _Parser(prog="triptych", description=__doc__, parents=[common])
    parser.set_defaults(run=list_techniques)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name, does, help):
        p = commands.add_parser(name, help=help, description=help, parents=[common])
        p.set_defaults(run=does)
        return p

    command("list", list_techniques, "the techniques, by part of the book")
    p = command("run", run, "the three panels of a technique on its example: ref, accel, hw, and its claims")
    p.add_argument("slug")
    p.add_argument("--target", action="append", metavar="NAME", help="hw target, repeatable (default: a few)")
    p.add_argument("--seed", type=int, default=0, help="of the example (default 0)")
    p = command("bench", bench, "race the implementations of a technique and other people's, values first")
    p.add_argument("slug")
    p.add_argument(
        "--shape", action="append", default=[], metavar="4x4096x16x128", help="of the problem, repeatable"
    )
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option: causal=True")
    p.add_argument("--backward", action="store_true", help="forward and backward pass")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on a CPU float32"
    )
    p.add_argument("--only", action="append", default=[], metavar="WORD", help="race entries that hold it")
    p.add_argument("--seconds", type=float, default=0.3, help="spent on each entry (default 0.3)")
    p.add_argument("--rounds", type=int, default=7, help="in which entries take turns (default 7)")
    p.add_argument("--seed", type=int, help="of the inputs (default: drawn)")
    p.add_argument(
        "--ceilings", choices=("auto", "parts", "measured"), default="auto",
        help="roofs by hw's data sheet, or by a copy and a product here (default: the first that there is)",
    )  # fmt: skip
    p.add_argument("--plot", metavar="FILE.svg", help="write a figure of the races")
    p.add_argument("--example", action="store_true", help="race on the technique's example instead")
    p = command("price", price, "price your own JAX function on a target")
    p.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="imported from here; a program as .json, a model as .onnx; smollm2, smollm2:prefill, :decode",
    )
    p.add_argument(
        "--shape", action="append", default=[], metavar="1x128x64:f32",
        help="one argument's shape and type, repeatable; f32 if no type is given, ':i32' is a scalar",
    )  # fmt: skip
    p.add_argument("--static", action="append", default=[], metavar="NAME=VALUE", help="a keyword argument")
    p.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="AXIS=LENGTH",
        help="a length that a .onnx file leaves open",
    )
    p.add_argument("--weights", default="", metavar="NAMES", help="arguments that are weights, by name: w,b")
    p.add_argument(
        "--target", action="append", metavar="NAME", help="preset, kind (gpu, pim, ..) or .toml; repeatable"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a target's field"
    )
    p.add_argument("--context", type=int, default=512, help="tokens of a named model's phase (default 512)")
    p.add_argument("--dtype", default="bf16", help="of a named model (default bf16)")
    p.add_argument("--by", choices=("op", "kind", "scope"), default="op", help="rows of the table")
    p.add_argument("--compare", action="store_true", help="add a table of the targets side by side")
    p.add_argument(
        "--sweep", action="append", default=[], metavar="FIELD=A,B,..",
        help="price every value of a target's field; repeat it for every combination",
    )  # fmt: skip
    p.add_argument("--plot", metavar="FILE", help="write the first report's figures as .html or .svg")
    p.add_argument("--figure", choices=("all", *KINDS), default="all", help="which figure --plot writes")
    p.add_argument("--trace", "--perfetto", metavar="FILE", help="write a timeline for ui.perfetto.dev")
    p = command("targets", list_targets, "the devices that can be priced; of one, its fields as TOML")
    p.add_argument("name", nargs="?", help="preset or .toml: print what `price --target my.toml` reads")
    p = command(
        "fetch", fetch_source, "download a model or data set once, with its checksum; alone, list them"
    )
    p.add_argument("name", nargs="?")
    p = command("book", book, "serve the built book on this machine; --build makes it, --pdf prints it")
    p.add_argument("--build", action="store_true", help="build it, and end")
    p.add_argument("--pdf", metavar="FILE", help="print the built book to FILE through Chromium, and end")
    p.add_argument(
        "--page", action="append", default=[], metavar="PART/SLUG",
        help="print only this page of the book, repeatable (default: all but the API reference)",
    )  # fmt: skip
    p.add_argument("--chromium", metavar="PROGRAM", help="that prints (default: $CHROMIUM, or one on PATH)")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    p.add_argument("--site", metavar="FOLDER", help="of the built book (default: site, in the checkout)")
    p = command("new", new, "write the five files of a new technique into this checkout, from templates")
    p.add_argument("slug")
    p.add_argument("--part", required=True, choices=PARTS)
    p.add_argument("--title", help="of the technique (default: the slug)")
    return parser
