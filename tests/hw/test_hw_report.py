"""Reports: bounds, roofs, memory over time, figures as SVG, timelines as Chrome trace events, JSON."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hw
from hw.figures import COLOURS, KINDS, WIDTH, figures, gantt
from hw.liveness import peak_bytes
from hw.pim_spans import TRACKS, product_spans, spans
from hw.report import UNITS, OpCost, summarise
from hw.roofs import dots, roofs
from hw.targets import presets
from hw.usage import on_chip, usage
from tests.claims import hw_report as claims
from tests.claims import record

TARGETS = (
    "h200",
    "t4",
    "tpu_v5e",
    "xeon_6154",
    "raspberry_pi5",
    "gddr6_aim",
    "hbm2_pim",
    "pim_gpt",
    "zcu102",
    "stm32h743",
)


def attention(q, k, v):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 8.0, axis=-1) @ v


def layers(x, w):
    return jax.lax.scan(lambda x, w: (x + jax.nn.silu(x @ w) @ w.T, x.sum()), x, w)


def chain(x):
    return jnp.exp(x).sum() + x.max()


def branches(x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x + 1, x)


@cache
def program(name):
    f32 = lambda *shape: ("float32", shape)
    return {
        "attention": lambda: hw.trace(attention, *(f32(4, 256, 64),) * 3),
        "layers": lambda: hw.trace(layers, f32(1, 512), f32(3, 512, 512), weights=("w",)),
        "chain": lambda: hw.trace(chain, f32(1000)),
        "branches": lambda: hw.trace(branches, f32(32, 32)),
        "one view": lambda: hw.trace(lambda x: x.reshape(6), f32(2, 3)),
        "nothing": lambda: hw.trace(lambda x: x, f32(3)),
    }[name]()


PROGRAMS = ("attention", "layers", "chain", "branches", "one view", "nothing")
both = pytest.mark.parametrize(("name", "what"), [(t, p) for t in TARGETS for p in PROGRAMS])


@cache
def report(name, what):
    return hw.estimate(program(what), presets()[name]())


# Bounds


@both
def test_hw_report_bounds_hold_the_estimate(name, what):
    """lower <= seconds <= upper; of a roofline the busiest resource alone, and all of them in a row."""
    r = report(name, what)
    low, high = r.seconds_range
    assert 0 <= low <= r.seconds * (1 + 1e-12)
    assert r.seconds <= high * (1 + 1e-12)
    busy = {}
    for c in r.by_op:
        for resource, s in c.busy_s.items():
            busy[resource] = busy.get(resource, 0.0) + s
    if r.basis == ("roofline, data sheet",):
        busy.pop("power", None)
        assert low == pytest.approx(max(busy.values()))
        assert high >= sum(busy.values()) * (1 - 1e-9)
        assert high <= (sum(busy.values()) + sum(c.overhead_s for c in r.by_op)) * (1 + 1e-9)
        text = r.table()
        assert ("how far work overlaps is unknown" in text) == (low < high)


def test_hw_report_one_resource_has_no_range():
    cost = OpCost(busy_s={"core": 2.0}, seconds=2.0, bound_by="core", basis="instructions")
    r = summarise("core", [cost], peak_memory=0, regions={}, clock_hz=1.0)
    assert r.seconds_range == (2.0, 2.0)
    assert "from" not in r.table()


def test_hw_report_exercises():
    """The numbers in the folded solutions of the chapter."""

    @dataclass(frozen=True)
    class Two(hw.target.Target):
        def cost(self, op, ctx):
            first = op.prim == "sin"
            busy = {"matrix": 3e-6, "memory": 4e-6} if first else {"matrix": 1e-6, "memory": 1e-6}
            return OpCost(busy_s=busy, overhead_s=2e-6, basis="roofline, by hand")

    r = hw.estimate(hw.trace(lambda x: jnp.cos(jnp.sin(x)), ("float32", (4,))), Two(fuse=False))
    assert (r.seconds, *r.seconds_range) == pytest.approx((9e-6, 5e-6, 13e-6))
    product = hw.trace(jnp.dot, ("bfloat16", (64, 4096)), ("bfloat16", (4096, 4096)), weights=("b",))
    ideal = hw.h200(ideal=True, l2_gbps=0)
    found = hw.sweep_fields(product, ideal, hbm_gbps=[15_800, 16_000, 40_000])
    assert [r["bound_by"] for r in found] == ["hbm", "tensor", "tensor"]
    assert found.rows[1]["seconds"] == found.rows[2]["seconds"] == pytest.approx(2.17e-6, rel=0.01)
    step = claims.decode(30, loop=True)
    slow, fast = hw.sweep_fields(step, hw.gddr6_aim(), t_mode=[32, 0])
    gain = 1 - fast["seconds"] / slow["seconds"]
    pins = hw.estimate(step, hw.gddr6_aim()).utilisation["pins"]
    # Per cent: of the step that JAX 0.12 traces, which has other ops, and of JAX 0.10's.
    assert (round(100 * gain), round(100 * pins)) in ((6, 52), (7, 46))


# Roofs


@both
def test_hw_report_dots_lie_under_the_roof(name, what):
    """No op beats the units or the memory that it waits for; shares of the time add up to at most one."""
    r = report(name, what)
    found = roofs(r)
    for d in dots(r, found):
        best = max(found.compute.values())
        assert d.speed <= min(best, d.intensity * found.memory[d.level]) * (1 + 1e-9), d
    assert sum(d.share for d in dots(r, found)) <= 1 + 1e-9


def test_hw_report_roofs_are_the_data_sheets():
    found = roofs(report("h200", "attention"))
    target = hw.h200()
    assert found.memory == {"hbm": target.hbm_gbps * 1e9, "l2": target.l2_gbps * 1e9}
    assert found.compute["float32"] == target.peak_tflops["float32"] * 1e12
    assert roofs(report("zcu102", "attention")).basis == "the fastest op of this program"


# Memory over time


@pytest.mark.parametrize("what", PROGRAMS)
def test_hw_report_memory_over_time_peaks_at_peak_bytes(what):
    """The same bytes as `peak_bytes`, moment by moment the sum of buffers and of what the caller keeps."""
    p = program(what)
    moments = usage(p)
    held = sum(p.bytes(role) for role in ("input", "weight", "const"))
    assert max((m.nbytes for m in moments), default=held) == peak_bytes(p)
    for m in moments:
        assert m.nbytes == held + sum(size for _, size in m.buffers)
        assert m.nbytes <= sum(t.nbytes for t in p.tensors.values())
    fused = [m.nbytes for m in usage(p, inner=on_chip(p, attention=True))]
    assert max(fused, default=held) == hw.estimate(p, hw.h200()).peak_memory


# Figures


@both
def test_hw_report_figures_are_valid_and_stay_inside(name, what, tmp_path):
    """Well-formed, described, in the page's own text colour, with every shape inside its frame."""
    r = report(name, what)
    for svg in figures(r):
        root = ET.fromstring(svg)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for e in root.iter():
            for key, most in (("x", width), ("y", height), ("cx", width), ("cy", height), ("x2", width)):
                if key in e.attrib:
                    assert -0.5 <= float(e.attrib[key]) <= most + 0.5, (e.tag, e.attrib)
            if e.tag.endswith("rect"):
                assert float(e.attrib["width"]) >= 0
                assert float(e.attrib["x"]) + float(e.attrib["width"]) <= width + 1
            for key in ("fill", "stroke"):
                assert e.attrib.get(key, "none") in ("none", "currentColor", *COLOURS)
        assert "nan" not in svg
        assert "<style" not in svg  # a style inside a page would colour the page
    if what in ("attention", "layers"):
        assert len(figures(r)) == (3 if product_spans(r) is None else 4)
    for file in ("all.svg", "all.html"):
        r.plot(tmp_path / file)
    sheet = (tmp_path / "all.svg").read_text()
    ET.fromstring(sheet)
    assert "prefers-color-scheme:dark" in sheet
    assert "@media print" in sheet


def test_hw_report_colours_read_on_white_and_on_dark():
    """WCAG's contrast of graphics, 3 to 1, against a white and the book's dark page."""

    def luminance(colour):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("#ffffff", "#1c1f26", "#1e2129"):
        for colour in COLOURS:
            a, b = sorted((luminance(ground), luminance(colour)))
            assert (b + 0.05) / (a + 0.05) >= 3, (ground, colour)


def test_hw_report_bars_say_what_the_table_says():
    r = report("gddr6_aim", "layers")
    svg = r.svg("ops")
    dearest = max(r.by_op, key=lambda c: c.seconds)
    assert f"{dearest.seconds / r.seconds:.1%}, {dearest.bound_by}" in svg
    widths = [float(x) for x in re.findall(r'<rect x="0" y="\d+" width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(WIDTH, abs=0.1)
    assert widths == sorted(widths, reverse=True)


def test_hw_report_refuses_figures_without_data(tmp_path):
    r = report("h200", "layers")
    with pytest.raises(ValueError, match=f"one of all, {', '.join(KINDS)}"):
        r.svg("pie")
    with pytest.raises(ValueError, match="no product in the banks of a Pim"):
        r.plot(tmp_path / "x.svg", "banks")
    with pytest.raises(ValueError, match=r"must end in \.html or \.svg"):
        r.plot(tmp_path / "x.png")
    empty = report("h200", "nothing")
    for kind in ("roofline", "ops", "memory"):
        with pytest.raises(ValueError, match="no figure"):
            empty.svg(kind)
    again = hw.CostReport.from_json(r.to_json())
    with pytest.raises(ValueError, match="a report read from JSON lacks"):
        again.svg("memory")
    assert again.svg("ops")


# The banks


@pytest.mark.parametrize("name", ["gddr6_aim", "hbm2_pim", "hbm3_attacc", "pim_gpt"])
@pytest.mark.parametrize(("m", "k"), [(100, 300), (3000, 1500)])
def test_hw_report_spans_are_the_commands(name, m, k):
    """As many columns, rows and refreshes as the timeline counts; a track does one thing at a time; columns
    lie in open rows and end with the timeline."""
    target = presets()[name]()
    line = hw.matvec_timeline(m, k, target)
    found = spans(hw.schedule_matvec(m, k, target), target)
    of = lambda track: sorted((s for s in found if s.track == track), key=lambda s: s.start)
    assert len(of("row open")) == line.activate
    assert len(of("refresh")) == line.refresh
    late = max(target.t_end, target.t_burst)  # a result's last beat, where the timeline ends at its first
    assert abs(sum(s.ticks for s in of("row open")) - line.active_cycles) <= late
    for track in TRACKS:
        if not target.double_buffer_gb:
            for a, b in zip(of(track), of(track)[1:], strict=False):
                assert a.start + a.ticks <= b.start, (track, a, b)
    rows = of("row open")
    for s in of("columns"):
        assert any(r.start <= s.start and s.start + s.ticks <= r.start + r.ticks + 1 for r in rows)
    assert max(s.start + s.ticks for s in found) <= line.cycles + late
    ET.fromstring(gantt(found, target))


def test_hw_report_gantt_shows_the_dearest_product():
    r = report("gddr6_aim", "layers")
    label, m, k, found, whole = product_spans(r)
    assert (m, k, whole) == (512, 512, True)
    assert "dot_general" in label
    assert "512 outputs of 512 inputs" in r.svg("banks")
    assert not product_spans(r, most=5)[-1]
    assert len(found) > 10
    assert "only the first commands" in gantt(found, r.device, most=5)


# Timelines


def check_trace(trace):
    """What the Trace Event Format asks of the events that we use; slices of a track follow one another."""
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named, ends = set(), {}
    for e in trace["traceEvents"]:
        assert isinstance(e["pid"], int)
        assert isinstance(e["tid"], int)
        assert isinstance(e["name"], str)
        assert e["name"]
        if e["ph"] == "M":
            assert e["name"] in ("process_name", "thread_name")
            assert isinstance(e["args"]["name"], str)
            named.add((e["pid"], e["tid"] if e["name"] == "thread_name" else None))
            continue
        assert np.isfinite(e["ts"])
        assert e["ts"] >= 0
        if e["ph"] == "C":
            assert all(isinstance(v, int | float) for v in e["args"].values())
            continue
        assert e["ph"] == "X"
        assert e["dur"] > 0
        track = e["pid"], e["tid"]
        assert track in named
        assert (e["pid"], None) in named
        assert e["ts"] >= ends.get(track, 0.0) - 1e-6 * max(1.0, e["ts"])
        ends[track] = e["ts"] + e["dur"]


@both
def test_hw_report_traces_are_valid(name, what):
    r = report(name, what)
    trace = r.to_trace()
    check_trace(json.loads(json.dumps(trace, allow_nan=False)))
    ops = [e for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == (1, 0)]
    np.testing.assert_allclose(sum(e["dur"] for e in ops), r.seconds * 1e6)
    assert sum(e["args"]["macs"] for e in ops) == sum(c.macs for c in r.by_op if c.seconds)
    alive = [e["args"]["bytes"] for e in trace["traceEvents"] if e["ph"] == "C"]
    if r.peak_memory == peak_bytes(program(what)) and alive:
        assert max(alive) == r.peak_memory
    banks = [e for e in trace["traceEvents"] if e["pid"] == 2 and e["ph"] == "X"]
    assert bool(banks) == (product_spans(r) is not None)


def test_hw_report_perfetto_writes_the_trace(tmp_path):
    r = report("pim_gpt", "layers")
    r.perfetto(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == json.loads(json.dumps(r.to_trace()))


# Text and JSON


@both
def test_hw_report_json_round_trip(name, what):
    """Strict JSON with units, from which the same report is read."""
    r = report(name, what)
    text = r.to_json()
    raw = json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert raw["units"] == UNITS
    assert "program" not in raw
    again = hw.CostReport.from_json(text)
    assert again == r
    assert again.table() == r.table()


def test_hw_report_json_of_an_execution_and_of_other_text():
    x = np.ones((32, 32), np.float32)
    _, r = hw.execute(program("branches"), (x,), hw.zcu102())
    assert hw.CostReport.from_json(r.to_json()) == r
    exact = replace(r, quality={"snr_db": float("inf")})
    assert hw.CostReport.from_json(exact.to_json()) == exact
    for text in ("[]", "{}", "nonsense", '{"units": {}, "by_op": [{"x": 1}]}'):
        with pytest.raises(ValueError, match="not a cost report"):
            hw.CostReport.from_json(text)


def test_hw_report_compares_any_number():
    a, b, c = (report(name, "layers") for name in ("h200", "gddr6_aim", "zcu102"))
    text = a.compare(b, c)
    lines = text.splitlines()
    assert lines[0].split() == ["h200", "gddr6_aim", "zcu102"]
    time = next(x for x in lines if x.startswith("time"))
    assert f"({b.seconds / a.seconds:.3g}x)" in time
    for words in ("at least", "at most", "energy", "J", "peak memory", "pins traffic", "bound by"):
        assert words in text
    assert a.compare(b).count("x)") == text.count("x)") - c_ratios(a, c)


def c_ratios(a, c):
    """Ratios in the third column: of what both have."""
    rows = ("seconds", "energy_j", "macs", "peak_memory")
    both = sum(bool(getattr(a, n) and getattr(c, n)) for n in rows) + 2
    return both + sum(bool(a.bytes_by_level.get(k) and v) for k, v in c.bytes_by_level.items())


# Speed


def calls(program, target):
    """Python calls of one estimate of a program that was never priced: work, without a clock."""
    count, fresh = 0, replace(program)

    def note(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        hw.estimate(fresh, target)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", ["h200", "xeon_6154", "gddr6_aim", "zcu102"])
def test_hw_report_pricing_follows_ops_not_trips(name):
    """As many calls for a loop of 10 trips as of a million; twice the layers, twice the calls more."""
    target = presets()[name]()
    body = lambda _, x: x @ x + x
    fori = lambda n: hw.trace(lambda x: jax.lax.fori_loop(0, n, body, x), ("float32", (8, 8)))
    hw.estimate(fori(3), target)  # schedules of a shape are kept
    assert calls(fori(10), target) == calls(fori(1_000_000), target)

    def network(n):
        def run(x, w):
            for _ in range(n):
                x = x + jax.nn.silu(x @ w) @ w
            return x

        return calls(hw.trace(run, ("float32", (4, 64)), ("float32", (64, 64)), weights=("w",)), target)

    few, some, many = (network(n) for n in (8, 16, 32))
    assert many - some <= 2.2 * (some - few)


def test_hw_report_targets_share_what_a_program_holds():
    """Fusion groups are found once a program, whoever prices it first, and change no price."""
    p = replace(program("layers"))
    first = hw.estimate(p, hw.h200())
    assert hw.estimate(p, hw.zcu102()) == hw.estimate(replace(p), hw.zcu102())
    assert hw.estimate(p, hw.h200()) == first == hw.estimate(replace(p), hw.h200())
    assert hw.Program.from_json(p.to_json()) == p


def test_hw_report_stored_speed():
    """One decode step of SmolLM2, thirty layers: under two seconds in either form, whatever the trips."""
    assert record.is_fresh("hw_report")
    r = record.load("hw_report")["results"]
    for form in r["decode"].values():
        assert set(form["seconds"]) == set(claims.TARGETS)
        assert max(form["seconds"].values()) < 2
    assert r["decode"]["30 layers written out"]["ops"] > 20 * r["decode"]["one loop"]["ops"]
    assert [g["layers"] for g in r["growth"]] == list(claims.DEPTHS)
    assert [t["trips"] for t in r["trips"]] == list(claims.TRIPS)
    small = claims.decode(1, loop=True)
    assert claims.seconds(small, hw.h200(), repeats=1) > 0
    assert len(claims.looped(3).ops) == len(claims.looped(30).ops)
