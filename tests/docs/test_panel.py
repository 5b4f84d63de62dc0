"""The panels of prices: stored op programs are what JAX traces, the page shows what hw estimates."""

import json
import random
import re
import subprocess
import sys
import zipfile
from html import escape, unescape
from itertools import pairwise
from pathlib import Path

import jax
import pytest

import hw
from hw.program import Program
from hw.report import _si
from hw.targets import KINDS, preset
from ref.catalog import BY_SLUG

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import bundle  # noqa: E402
import panel  # noqa: E402
import programs  # noqa: E402

sys.path.pop(0)
PARTS = sorted({BY_SLUG[slug].part for slug in programs.GRIDS})


def of_part(part):
    return [slug for slug in programs.GRIDS if BY_SLUG[slug].part == part]


def first(slug):
    """The program that the panel of a slug starts with, as stored."""
    return panel.chosen(slug, {})


def estimated(program, device):
    """The report, or the documented error in a line."""
    try:
        return hw.estimate(program, device)
    except (hw.DoesNotFit, hw.UnsupportedPrimitive) as why:
        return f"{type(why).__name__}: {why}"


@pytest.mark.parametrize("part", PARTS)
def test_panel_programs_are_what_jax_traces(part):
    """Every program of every grid, under the JAX of the file; under another work and data are the same."""
    for slug in of_part(part):
        stored, advice = panel.stored(slug), f"{slug} has changed: run `python docs/programs.py {slug}`"
        if stored["jax"] == jax.__version__:
            assert json.loads(json.dumps(programs.record(slug))) == stored, advice
            continue
        grid = programs.GRIDS[slug]
        last = grid.choices()[-1]
        ours, theirs = panel.program(slug, len(grid.choices()) - 1), grid.trace(**last)
        for role in ("input", "weight", "output"):
            assert ours.bytes(role) == theirs.bytes(role), advice
        assert hw.count(ours).macs == hw.count(theirs).macs, advice


def test_panel_programs_of_one_form_are_stored_once():
    f = lambda *shape: ("float32", shape)
    product = [programs.bare(hw.trace(lambda x, w: x @ w, f(n, 4), f(4, 3))) for n in (1, 2, 5)]
    other = programs.bare(hw.trace(lambda x: x + x, f(3)))
    groups = programs.pack([product[0], other, *product[1:]])
    assert [g["of"] for g in groups] == [[0, 2, 3], [1]]
    for entry, p in enumerate(product):
        tree = panel._filled(groups[0]["program"], [values[entry] for values in groups[0]["lists"]])
        assert Program.from_json(json.dumps(tree)) == p
    assert groups[1]["lists"] == []


def test_panel_says_what_hw_estimates():
    """For drawn choices and sliders of every grid each line is the report's or the documented refusal."""
    rng = random.Random(0)
    refused = 0
    for slug, grid in programs.GRIDS.items():
        sizes = {name: rng.randrange(len(values)) for name, values in grid.axes.items()}
        program = panel.chosen(slug, sizes)
        if panel.stored(slug)["jax"] == jax.__version__:
            program = programs.bare(grid.trace(**{name: grid.axes[name][n] for name, n in sizes.items()}))
        dials = {
            k: {d.field: rng.randrange(len(d.numbers))} for k in KINDS for d in panel.DIALS.get(k, ())[:1]
        }
        html = panel.answer(json.dumps({"slug": slug, "sizes": sizes, "dials": dials, "look": "pim"}))
        lines = dict(re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", html))
        for kind in panel.TARGETS:
            dial = panel.DIALS[kind][0]
            name = grid.devices.get(kind, KINDS[kind])
            device = preset(name, **{dial.field: dial.numbers[dials[kind][dial.field]]})
            r = estimated(program, device)
            if isinstance(r, str):
                assert unescape(lines[name]) == r
                refused += 1
                continue
            assert lines[name].startswith(_si(r.seconds, "s"))
            rest = f", {_si(r.energy_j, 'J')}, {r.peak_memory:,} B at most alive; bound by {r.bound_by}"
            assert lines[name].endswith(rest)
            if kind == "pim":
                for figure in ("roofline", "ops", "memory"):
                    assert r.svg(figure) in html
    assert refused


def test_panel_reports_are_those_of_the_fresh_program():
    """To the last bit and op by op, where nothing of the text could hide a difference."""
    for slug in ("llm_int8", "edge_moe"):
        grid = programs.GRIDS[slug]
        if panel.stored(slug)["jax"] == jax.__version__:
            for kind in ("gpu", "pim", "fpga"):
                fresh = hw.estimate(grid.trace(**grid.first), preset(kind))
                assert hw.estimate(first(slug), preset(kind)) == fresh


def test_panel_dots_lie_under_the_roofs_of_the_data_sheets():
    for slug in programs.GRIDS:
        for kind in ("gpu", "pim"):
            dot = panel.whole(hw.estimate(first(slug), preset(kind)))
            assert dot is not None
            intensity, speed, peak, rate = dot
            assert speed <= min(peak, rate * intensity) * (1 + 1e-9), f"{slug} on {kind}"
    nothing = programs.bare(hw.trace(lambda x: x.T, ("float32", (8, 4))))
    assert panel.whole(hw.estimate(nothing, preset("gpu"))) is None  # no operation, and still a panel
    assert "<svg" in panel.result(nothing, {"gpu": preset("gpu")}, "gpu")


def test_panel_refuses_with_the_shortfall_and_without_figures():
    p, targets = first("smollm2"), {"mcu": preset("mcu")}
    html = panel.result(p, targets, "mcu")
    assert re.search(r"DoesNotFit: stm32f746: sram .* needs [\d,]+ B and has [\d,]+ B, [\d,]+ B short", html)
    assert html.count("refuses</text>") == 3  # of latency, energy, memory; and no roof
    assert html.count("<polyline") == 0
    assert "<p>No figures: DoesNotFit" in html


@pytest.mark.parametrize("kind", panel.TARGETS)
def test_panel_sliders_start_at_the_preset_and_move_its_fields(kind):
    p = programs.bare(
        hw.trace(lambda w, x: x @ w, ("float32", (64, 64)), ("float32", (32, 64)), weights=("w",))
    )
    for devices in ({}, {"pim": "pim_gpt"}):
        for dial in panel.DIALS[kind]:
            at = [panel.target(kind, {dial.field: n}, devices) for n in range(len(dial.numbers))]
            same = at.count(panel.target(kind, {}, devices))
            assert same == (dial.start is None), f"{dial.field} of {kind}"
            assert len(set(map(repr, at))) == len(at)
            reports = [estimated(p, t) for t in at]
            seconds = [r.seconds for r in reports if not isinstance(r, str)]
            assert len(seconds) >= 2
            if dial.field.endswith(("gbps", "ghz", "mhz", "channels")):  # more is never slower
                assert all(a >= b * (1 - 1e-12) for a, b in pairwise(seconds))


@pytest.mark.parametrize("part", PARTS)
def test_panel_html_is_labelled_escaped_and_without_styles(part):
    for slug in of_part(part):
        html = panel.panel(slug)
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))
        assert sorted(re.findall(r'<label for="([^"]+)"', html)) == sorted(ids)
        assert not re.search(r"\sstyle=|<script|\son\w+=", html)
        assert "\n" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)
        assert '<form class="price-controls" hidden>' in html  # nothing to press where nothing can run
        for name, value in programs.GRIDS[slug].first.items():
            assert f"{name} {escape(panel._word(value))}" in html
        chapter = (ROOT / "docs" / part / f"{slug}.md").read_text()
        assert f'print(panel("{slug}"))' in chapter


def test_panel_runs_from_the_archive_without_jax(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "HOME", tmp_path)
    bundle.main()
    with zipfile.ZipFile(tmp_path / "library.zip") as box:
        box.extractall(tmp_path / "box")
    home = tmp_path / "box" / "assets" / "programs"
    home.mkdir(parents=True)
    (home / "rum.gz").write_bytes((panel.HOME / "rum.gz").read_bytes())
    asked = json.dumps({"slug": "rum", "sizes": {"width": 0}, "dials": {"mcu": {"mhz": 0}}, "look": "mcu"})
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.modules.update(dict.fromkeys(('jax', 'ml_dtypes')))\n"
        "import panel; print(panel.answer(sys.argv[2]), end='')"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "box"), asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == panel.answer(asked)
