"""The page "Price your own": a reader's op program, in NumPy or JSON, on a device of the reader's choice.

`form()` writes it into the page with the price of its first preset; in the browser `answer` prices what the
reader wrote, in the worker of the live cells.
"""

import inspect
import json
import tomllib
import traceback
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from panel import TARGETS, closer, refusal, result

import hw
from hw.device_file import load_target
from hw.program import Program
from hw.targets import KINDS, preset, presets

OWN = "<program>"
ALL = "all four kinds"
PRESETS = {
    "a matrix product": """\
def program(x, w):
    return x @ w

shapes = {"x": (64, 4096), "w": (4096, 4096)}
weights = ["w"]          # there before the program runs
dtype = "bfloat16"
""",
    "softmax": """\
def program(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)

shapes = {"x": (1024, 1024)}
dtype = "float32"
""",
    "attention": """\
def program(q, k, v):
    s = q @ np.swapaxes(k, -1, -2) / 8.0
    p = np.exp(s - np.max(s, axis=-1, keepdims=True))
    return p / np.sum(p, axis=-1, keepdims=True) @ v

shapes = {name: (16, 1024, 64) for name in "qkv"}  # heads, length, width
dtype = "bfloat16"
""",
    "an MLP": """\
def gelu(x):
    return 0.5 * x * (1 + np.tanh(0.7979 * (x + 0.044715 * x**3)))

def program(x, w_up, w_down):
    return gelu(x @ w_up) @ w_down

shapes = {"x": (197, 384), "w_up": (384, 1536), "w_down": (1536, 384)}
weights = ["w_up", "w_down"]
dtype = "float32"
""",
    "a decoder step": """\
def norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)

def program(x, keys, values, w_q, w_k, w_v, w_o, w_up, w_down):
    h = norm(x)
    q, k, v = ((h @ w).reshape(16, 1, 64) for w in (w_q, w_k, w_v))
    keys, values = np.concatenate([keys, k], 1), np.concatenate([values, v], 1)
    s = q @ np.swapaxes(keys, -1, -2) / 8.0
    p = np.exp(s - np.max(s, axis=-1, keepdims=True))
    a = p / np.sum(p, axis=-1, keepdims=True) @ values
    x = x + a.reshape(1, 1024) @ w_o
    h = norm(x) @ w_up
    return x + h / (1 + np.exp(-h)) @ w_down, keys, values

shapes = {"x": (1, 1024), "keys": (16, 512, 64), "values": (16, 512, 64)}
shapes |= {f"w_{name}": (1024, 1024) for name in "qkvo"}
shapes |= {"w_up": (1024, 4096), "w_down": (4096, 1024)}
weights = [name for name in shapes if name != "x"]
dtype = "bfloat16"
""",
}


def read(text) -> Program:
    """The program of a reader's text: JSON that `Program.to_json` wrote, or NumPy code for `hw.sketch`.

    The code defines a function `program`, `shapes` {argument: shape}, and if it likes `weights` (names) and
    `dtype`. Raises: ValueError for a text that defines something else; what the code raises.
    """
    if text.lstrip().startswith("{"):
        return Program.from_json(text)
    names = {"np": np, "__name__": "program"}
    exec(compile(text, OWN, "exec"), names)
    fn, shapes = names.get("program"), names.get("shapes")
    if not callable(fn) or not isinstance(shapes, dict):
        raise ValueError("the text must define a function `program` and `shapes`, a dict of its arguments")
    takes = list(inspect.signature(fn).parameters)
    if set(takes) != set(shapes):
        raise ValueError(f"shapes names {', '.join(map(str, shapes))}; program takes {', '.join(takes)}")
    dtype = names.get("dtype", "float32")
    return hw.sketch(fn, *((dtype, shapes[name]) for name in takes), weights=tuple(names.get("weights", ())))


def target(device, fields):
    """The target of a preset with fields changed by the lines of a TOML file, or of such a file alone."""
    if not fields.strip():
        return preset(device)
    told = tomllib.loads(fields)
    text = fields if {"base", "kind"} & told.keys() else f'base = "{device}"\n{fields}'
    with TemporaryDirectory() as folder:
        path = Path(folder) / "your_device.toml"
        path.write_text(text)
        try:
            return load_target(path)
        except ValueError as why:
            raise ValueError(str(why).replace(f"{path}: ", "")) from None


def answer(text) -> str:
    """HTML for JSON text {own: program, device: preset, fields: TOML}."""
    asked = json.loads(text)
    return priced(asked["own"], asked["device"], asked["fields"])


def priced(text, device, fields) -> str:
    """HTML of what a reader's program costs on a device, or one line that says what is wrong."""
    try:
        p = read(text)
        if device == ALL:
            if fields.strip():
                raise ValueError("choose one device to change its fields")
            return result(p, {kind: preset(kind) for kind in TARGETS}, TARGETS[0])
        r = hw.estimate(p, target(device, fields))
    except Exception as why:
        return f'<p class="price-refused">{escape(_one_line(why))}</p>'
    table = _kept(escape(r.table()))
    return f'<pre class="price-table" tabindex="0">{table}</pre><div class="price-closer">{closer(r)}</div>'


def _one_line(why):
    """An exception with the line of the reader's text that it comes from."""
    at = [f.lineno for f in traceback.extract_tb(why.__traceback__) if f.filename == OWN]
    if isinstance(why, SyntaxError) and why.filename == OWN:
        at, why = [why.lineno], SyntaxError(why.msg)
    words = " ".join(refusal(why).split())
    return f"line {at[-1]}: {words}" if at else words


def form() -> str:
    """The page's form and what it says of its first preset."""
    first, device = next(iter(PRESETS)), KINDS["gpu"]
    texts = "".join(f'<option value="{_kept(escape(t))}">{n}</option>' for n, t in PRESETS.items())
    groups = {}
    for name, make in presets().items():
        if name != "this_cpu":
            groups.setdefault(type(make()).__name__, []).append(name)
    devices = "".join(
        f'<optgroup label="{kind}">'
        + "".join(f"<option{' selected' * (n == device)}>{n}</option>" for n in names)
        + "</optgroup>"
        for kind, names in groups.items()
    )
    text = escape(PRESETS[first])
    p = read(PRESETS[first])
    inputs = [p.tensors[i] for i in p.body.inputs]
    takes = " and ".join(f"{t.name} {list(t.shape)} in {t.dtype}" for t in inputs)
    lines, plain = text.count("\n") + 8, 'spellcheck="false" autocomplete="off"'
    return (
        '<section class="price" data-price aria-label="Price your own"><form class="price-controls" hidden>'
        '<div><label for="own-preset">start from</label>'
        f'<select id="own-preset" name="preset">{texts}</select></div>'
        '<div><label for="own-text">the program: NumPy code, or the JSON of an op program</label>'
        f'<textarea id="own-text" name="own" rows="{lines}" {plain}>{_kept(text)}</textarea></div>'
        '<div><label for="own-device">device</label><select id="own-device" name="device">'
        f"<option>{ALL}</option>{devices}</select></div>"
        '<div><label for="own-fields">its fields, as lines of TOML, or a whole device file</label>'
        f'<textarea id="own-fields" name="fields" rows="3" {plain}></textarea></div>'
        '<p class="price-bar"><button type="submit" class="live-button">Price</button> '
        '<button type="button" name="stop" class="live-button" hidden>Stop</button> '
        '<button type="reset" class="live-button">Reset</button> '
        '<span class="live-status" role="status">Price starts Python in this page.</span></p></form>'
        f'<p class="price-at" aria-live="polite">Shown for {first}, {takes}, on {device}.</p>'
        f'<div class="price-result">{priced(PRESETS[first], device, "")}</div></section>'
    )


def _kept(text):
    """Text of a page's element whose line ends Markdown must not see."""
    return text.replace("\n", "&#10;")
