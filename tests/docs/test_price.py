"""The page "Price your own": what it shows is what hw says, and what is wrong is one clear line."""

import re
import subprocess
import sys
import zipfile
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import hw
from hw.targets import KINDS, preset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import bundle  # noqa: E402
import panel  # noqa: E402
import price  # noqa: E402

sys.path.pop(0)
PRODUCT = price.PRESETS["a matrix product"]


def words(html):
    """What a page shows of HTML."""
    return unescape(re.sub("<[^>]*>", "", html))


@pytest.mark.parametrize("name", price.PRESETS)
def test_price_presets_are_priced_as_hw_prices_them(name):
    text = price.PRESETS[name]
    program = price.read(text)
    for kind in ("gpu", "pim", "fpga"):
        report = hw.estimate(program, preset(kind))
        shown = price.priced(text, KINDS[kind], "")
        assert report.table() in words(shown)
        assert report.svg("roofline") in shown
    four = price.priced(text, price.ALL, "")
    assert re.findall("<dt>(.*?)</dt>", four) == [KINDS[k] for k in panel.TARGETS]


def test_price_presets_compute_what_they_say():
    rng = np.random.default_rng(0)
    names = {"np": np}
    exec(price.PRESETS["attention"].replace("16, 1024, 64", "2, 8, 64"), names)
    q, k, v = (rng.standard_normal((2, 8, 64)) for _ in range(3))
    s = np.einsum("hld,hsd->hls", q, k) / 8
    want = np.einsum("hls,hsd->hld", np.exp(s) / np.exp(s).sum(-1, keepdims=True), v)
    # sums of at most 64 products of numbers near 1
    np.testing.assert_allclose(names["program"](q, k, v), want, rtol=0, atol=64 * 2.3e-16 * 10)
    exec(price.PRESETS["a decoder step"], names)
    shapes = names["shapes"]
    args = [0.02 * rng.standard_normal(shape) for shape in shapes.values()]
    y, keys, values = names["program"](*args)
    assert (y.shape, keys.shape, values.shape) == ((1, 1024), (16, 513, 64), (16, 513, 64))
    assert np.isfinite(y).all()


def test_price_takes_the_json_of_any_program():
    program = hw.trace(lambda x, w: x @ w, ("float32", (8, 16)), ("float32", (16, 4)), weights=("w",))
    shown = words(price.priced(f"\n {program.to_json()}", "zcu102", ""))
    assert hw.estimate(program, hw.zcu102()).table() in shown


def test_price_fields_change_the_device():
    p = price.read(PRODUCT)
    for fields, target in (
        ("hbm_gbps = 9600", hw.h200(hbm_gbps=9600.0, name="your_device")),
        ('base = "gddr6_aim"\nchannels = 8\n[asic]\nghz = 0.5', None),
    ):
        got = price.target("h200", fields)
        if target is not None:
            assert got == target
        assert hw.estimate(p, got).table() in words(price.priced(PRODUCT, "h200", fields))
    assert got.channels == 8
    assert got.asic.ghz == 0.5
    assert price.target("a100", "  \n") == hw.a100()
    assert price.target("h200", hw.target_toml(hw.a100())) == hw.a100()


# name: (text, device, fields, what is said)
edit = lambda old, new: PRODUCT.replace(old, new)
WRONG = {
    "unknown field": (
        PRODUCT,
        "h200",
        "hbm_tbps = 4.8",
        r"ValueError: Gpu has no field 'hbm_tbps'; did you mean",
    ),
    "no toml": (PRODUCT, "h200", "hbm_gbps = ", r"TOMLDecodeError: Invalid value"),
    "out of range": (PRODUCT, "h200", "hbm_gbps = -1", r"ValueError: hbm_gbps must be positive, got -1"),
    "no device": (PRODUCT, "h300", "", r"LookupError: no target 'h300'; did you mean h200"),
    "fields of all": (PRODUCT, price.ALL, "mhz = 1", r"ValueError: choose one device to change its fields"),
    "no room": (
        PRODUCT,
        "stm32f746",
        "",
        r"DoesNotFit: stm32f746: .* needs [\d,]+ B and has .* B, [\d,]+ B short",
    ),
    "shapes": (
        edit("x @ w", "x @ x"),
        "h200",
        "",
        r"line 2: ValueError: .* do not multiply: 4096 against 64",
    ),
    "name": (edit("x @ w", "x @ y"), "h200", "", r"line 2: NameError: name 'y' is not defined"),
    "syntax": (edit("x @ w", "x @ "), "h200", "", r"line 2: SyntaxError: invalid syntax"),
    "no rule": (
        edit("x @ w", "np.linalg.inv(x)"),
        "h200",
        "",
        r"line 2: UnsupportedPrimitive: primitive 'inv'",
    ),
    "arguments": (edit('"w": (', '"v": ('), "h200", "", r"ValueError: shapes names x, v; program takes x, w"),
    "dtype": (edit("bfloat16", "int7"), "h200", "", r"ValueError: x must be of float64, .* got int7"),
    "weights": (edit('["w"]', '["v"]'), "h200", "", r"ValueError: weights names 'v'"),
    "nothing": ("", "h200", "", r"ValueError: the text must define a function `program` and `shapes`"),
    "another json": ("{}", "h200", "", r"ValueError: not an op program"),
    "no json": ("{", "h200", "", r"ValueError: not JSON"),
    "markup": ('raise ValueError("<script>&")', "h200", "", r"line 1: ValueError: <script>&$"),
}


@pytest.mark.parametrize("name", WRONG)
def test_price_says_what_is_wrong_in_one_line(name):
    *asked, says = WRONG[name]
    shown = price.priced(*asked)
    assert re.fullmatch(r'<p class="price-refused">[^<>\n]+</p>', shown)
    assert re.match(says, words(shown)), words(shown)


def test_price_page_is_labelled_and_runs_from_the_archive_without_jax(tmp_path, monkeypatch):
    html = price.form()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert sorted(re.findall(r'<label for="([^"]+)"', html)) == sorted(ids)
    assert not re.search(r"\sstyle=|<script|\son\w+=", html)
    monkeypatch.setattr(bundle, "HOME", tmp_path)
    bundle.main()
    with zipfile.ZipFile(tmp_path / "library.zip") as box:
        box.extractall(tmp_path / "box")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.modules.update(dict.fromkeys(('jax', 'ml_dtypes')))\n"
        "import json, price\n"
        "for name, text in price.PRESETS.items():\n"
        "    print(price.answer(json.dumps({'own': text, 'device': 'gddr6_aim', 'fields': ''})), end='')"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "box")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "".join(price.priced(text, "gddr6_aim", "") for text in price.PRESETS.values())
