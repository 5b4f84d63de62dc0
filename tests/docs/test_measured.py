"""docs/measured.py and docs/pipeline.py: what pages show of records, and a block's cycles played through."""

import json
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from tests.claims import flash_counters
from tests.claims.flash_memory_gpu import fits
from tests.claims.record import ROOT


@pytest.fixture
def pages(monkeypatch):
    """The modules of docs."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import measured
    import pipeline

    return measured, pipeline


def record(**results):
    return {
        "device": "2 x NVIDIA H200; host some CPU, 16 cores", "date": "2026-11-26",
        "versions": {"jax": "0.11.2"}, "results": results,
    }  # fmt: skip


def test_measured_loads_what_there_is_and_says_what_is_missing(pages, tmp_path):
    measured, _ = pages
    assert measured.load("absent", tmp_path) is None
    assert "`python -m it`" in measured.missing("python -m it")
    (tmp_path / "there.json").write_text(json.dumps(record()))
    assert measured.where(measured.load("there", tmp_path)) == "2 x NVIDIA H200, 2026-11-26, jax 0.11.2"


def test_measured_experiments_are_those_that_there_are(pages, tmp_path):
    """Every command is a script that stores a record of that name, for a chapter that exists."""
    measured, _ = pages
    for name, _, command, chapter in measured.EXPERIMENTS:
        script, *rest = command.split()
        text = (ROOT / "tests" / "claims" / f"{script}.py").read_text()
        assert name in text or ("flash_{args.experiment}_gpu" in text and name == f"flash_{rest[0]}_gpu")
        assert all(f'"{word}"' in text for word in rest if word.startswith("--"))
        assert (ROOT / "docs" / f"{chapter}.md").exists()
    (tmp_path / "lean_gpu.json").write_text(json.dumps(record()))
    lines = list(measured.experiments(tmp_path))
    assert sum("not yet" in line for line in lines) == len(measured.EXPERIMENTS) - 1
    assert any("2026-11-26, 2 x NVIDIA H200 |" in line for line in lines)


def test_measured_counters_are_read_with_their_units(pages):
    """ncu's raw page: thousands with commas, units by column; kernels in the order of the calls."""
    measured, _ = pages
    metrics = list(flash_counters.METRICS.values())
    unit = {metrics[0]: "ms", metrics[1]: "Ghz"}
    quoted = lambda cells: ",".join(f'"{c}"' for c in cells)
    lines = ["==PROF== something", quoted(["ID", "Kernel Name", *metrics])]
    lines.append(quoted(["", "", *(unit.get(m, "%") for m in metrics)]))
    kernels = [f"{k}_mosaic_gpu_kernel" for k in flash_counters.KERNELS]
    lines += [quoted([i, k, "1,234.5", "1.69", *["50"] * (len(metrics) - 2)]) for i, k in enumerate(kernels)]
    names = [("128", "full", k) for k in flash_counters.KERNELS]
    found = flash_counters.read("\n".join(lines), names)
    own = found["128"]["full"]["flash_dkv"]
    assert own == {n: 0.5 for n in flash_counters.METRICS} | {"microseconds": 1234500.0, "gigahertz": 1.69}
    with pytest.raises(RuntimeError, match="saw 3 kernels, and 2 ran"):
        flash_counters.read("\n".join(lines), names[:2])
    with pytest.raises(RuntimeError, match="saw flash_forward_mosaic_gpu_kernel where flash_dq ran"):
        flash_counters.read("\n".join(lines), names[::-1])
    *tables, clock = measured.counters(record(widths=found))
    for table, units in ((tables[:4], [5]), (tables[4:], [3, 3])):
        head, line, row, blank = table
        assert head.count("|") == line.count("|") == row.count("|")
        assert row == "| 128 | full | " + " | ".join("1,234,500" + " | 0.50" * n for n in units) + " |"
        assert blank == ""
    assert "1.69, 1.69, 1.69 (d = 128)" in clock


def test_measured_table_of_attention_has_both_passes_in_a_row(pages):
    """TFLOP/s of ours and times of the others over ours; what did not run is left empty."""
    measured, _ = pages
    rows = [
        {"tokens": n, "width": 64, "causal": False, "backward": b, "flops": 1e12,
         "seconds": {"hopper": 2e-3, "cudnn": 3e-3, "triton": None} | ({"dense": 9e-3} if n < 4096 else {})}
        for n in (512, 8192) for b in (False, True)
    ]  # fmt: skip
    lines = list(measured.attention_table(record(op=rows)))
    assert lines[2] == "| 64 | 512 | full | 500 | 1.50 |  | 500 | 1.50 |  |"
    assert lines[3].startswith("| 64 | 8,192 |")
    assert "4.5 to 4.5" in lines[-1]


def test_measured_table_of_masks_counts_what_is_visible(pages):
    measured, _ = pages
    rows = [
        {"case": case, "width": 64, "tokens": 4096, "causal": False, "backward": b, "flops": flops,
         "useful": 0.75, "seconds": {"hopper": 1e-3} | ({"cudnn": 2e-3} if case == "plain" else {})}
        for case, flops in (("plain", 5e11), ("packed", 4e11), ("learnt bias", 3e11)) for b in (False, True)
    ]  # fmt: skip
    for backward in (False, True):
        lines = list(measured.masks_table(record(masks=rows), backward))
        assert lines[2] == "| 64 | 4,096 | full | all visible | 500 | 1.00 | 0.75 | 2.00 |"
        assert lines[3] == "| 64 | 4,096 | full | texts side by side | 400 | 0.80 | 0.75 |  |"
        assert lines[4] == "| 64 | 4,096 | full | the same, with its gradient | 300 | 0.60 | 0.75 |  |"
        assert len(lines) == 5


def test_measured_growth_is_drawn_with_its_fits(pages):
    measured, _ = pages
    grown = [
        {"tokens": 2**e, "seconds": 1e-5 + 3e-13 * 4**e, "peak_bytes": None, "operands": 10 * 2**e,
         "temporary_bytes": 5 * 2**e, "tflops": 500.0}
        for e in (14, 15, 16)
    ]  # fmt: skip
    decoded = [{"keys": 2**e, "seconds": 1e-5 + 1e-10 * 2**e, "gbps": 4000.0} for e in (13, 14, 15)]
    found = {"heads": 2, "width": 128, "growth": grown, "decoding": decoded, "fits": fits(grown, decoded)}
    figures = [ET.fromstring(str(f)) for f in measured.growth(record(**found))]
    assert len(figures) == 3
    words = figures[2].find("figcaption").text
    assert "peak memory = 0.01573 n GB, within 0.0%" in words  # 15 bytes a token, 2^20 tokens
    assert "forward and backward = 0.01 + 329.9 n² ms" in words


def test_measured_speed_up_of_a_ring(pages):
    measured, _ = pages
    rows = [
        {"tokens": n, "backward": b, "one": 2.0, "all": 1.25} for n in (16384, 32768) for b in (False, True)
    ]
    figure = measured.speed_up(record(devices=2, scaling=rows))
    assert "of 2 devices" in str(figure)
    assert figure.py(2) < figure.py(1.6) < figure.py(1)
    assert ET.fromstring(str(figure)).tag == "figure"


def test_measured_losses_of_a_task_start_and_end_where_training_did(pages):
    measured, _ = pages
    task = {"options": {"steps": 100}, "models": {"a": {"losses": [[1.0, 0.5, 0.0], [1.0, 0.7, 0.2]]}}}
    figure = measured.learning(record(copying=task), "copying", {"a": "A"}, floor=0.6)
    assert "2 seeds" in str(figure)
    assert "remembers nothing" in str(figure)
    points = ET.fromstring(str(figure)).find(".//polyline").get("points").split()
    assert points[0].startswith(f"{figure.px(0):.1f},{figure.py(1.0):.1f}")
    assert points[-1].startswith(f"{figure.px(100):.1f},{figure.py(0.1):.1f}")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("width", "groups"), [(128, 2), (64, 2), (64, 3)])
def test_pipeline_units_do_one_thing_at_a_time(pages, width, groups, overlap):
    """Nothing runs before what it needs; the time from tile to tile is no less than any unit's work."""
    _, pipeline = pages
    spans, tile = pipeline.play(width, groups=groups, overlap=overlap, tiles=8)
    c, when = pipeline.counts(width), {(s.who, s.what, s.tile): s for s in spans}
    for names in ("SO", "KV"):
        unit = sorted((s.start, s.end) for s in spans if s.what in names)
        assert all(a[1] <= b[0] for a, b in pairwise(unit))
    for g in range(groups):
        for t in range(8):
            s, p, o = (when[g, w, t] for w in "SPO")
            assert when["load", "K", t].end <= s.start
            assert when["load", "V", t].end <= o.start
            assert s.end <= p.start <= p.end <= o.start
    assert tile >= groups * max(c["S"] + c["O"], c["E"]) - 1e-6
    assert 0 < pipeline.busy(spans, 3 * tile, 6 * tile) <= 1 + 1e-9


def test_pipeline_reaches_the_floor_once_products_overlap(pages):
    """Two groups at width 128 never leave the tensor cores idle, three at 64 never the exponential units."""
    _, pipeline = pages
    tile = lambda width, groups, overlap: pipeline.play(width, groups=groups, overlap=overlap, tiles=12)[1]
    assert tile(128, 2, True) == 2048 < tile(128, 2, False)
    assert tile(64, 3, True) == 3 * 512 < tile(64, 3, False)


def test_pipeline_is_drawn_to_scale(pages):
    _, pipeline = pages
    spans, tile = pipeline.play(128, groups=2, overlap=True)
    figure = pipeline.drawn("title", "caption", [("one", 2, spans, 4 * tile, 6 * tile)])
    page = ET.fromstring(str(figure))
    words = [t.text for t in page.iter("text")]
    assert {"loads", "group 1", "group 2", "tensor cores", "1,024", "S6"} <= set(words)
    scale = (400 - 80 - 10) / (2 * tile)
    assert f"{512 * scale:.1f}" in {r.get("width") for r in page.iter("rect")}


@pytest.mark.parametrize(("before", "after"), [(256, 256), (64, 0), (1023, 0), (100, 300)])
def test_pipeline_tiles_of_a_window_are_the_kernels(pages, before, after):
    """The tiles that accel visits, and of them those that need a mask: all others are visible whole."""
    from accel.kernels.flash_hopper import Band

    _, pipeline = pages
    band = Band(1 << 16, -before, after, 128)
    for first in (4096, 4096 + 64, 4096 + 128):
        tiles, cut = pipeline.window_tiles(before, after, first)
        begin, end = map(int, band.ends(first, 64))
        see = band.sight(first, begin, end)
        assert tiles == list(range(begin, end))
        assert len(cut) <= int(see.hidden) + int(see.n) - int(see.clear)
        for j in set(tiles) - set(cut):
            assert j * 128 >= first + 63 - before
            assert j * 128 + 127 <= first + after
    assert pipeline.window_share(256, 256) == 513 / 640
    figure = ET.fromstring(str(pipeline.window_drawn(before, after, "t", "c")))
    assert len(figure.findall(".//polygon")) == 2


TIMELINE = {
    "groups": 1, "keys": 128, "bare": 2000.0, "length": 4000, "cycles": {"a tile": 3000.0},
    "spans": [[0, "softmax", -10, 300], [0, "wait", 400, 500], [0, "issue", 500, 520], [0, "issue", 530, 700],
              [0, "scores", 800, 900], [0, "softmax", 900, 1900], [1, "load", 0, 30], [1, "wait", 40, 2000]],
}  # fmt: skip


def test_pipeline_reads_what_a_block_noted(pages):
    """S from the first issue to the scores; what was begun earlier and what only waits are kept too."""
    _, pipeline = pages
    spans = [tuple(s) for s in pipeline.noted(TIMELINE)]
    assert spans == [
        (0, "P", 0, -10, 300), (0, "W", 0, 400, 500), (0, "S", 1, 500, 900), (0, "P", 1, 900, 1900),
        ("load", "W", 0, 40, 2000),
    ]  # fmt: skip


def test_measured_parts_of_a_kernel(pages):
    """Times with something left out, of the whole; products of the backward kernels in TFLOP/s."""
    measured, _ = pages
    ways = {"as it is": 2e-3, "without exponentials": 1e-3}
    kernels = {"flash_forward": 1e-3, "flash_dkv_kernel": 2e-3, "flash_dq_kernel": 1e-3, "fusion": 5e-6}
    r = record(
        shape=[1, 1000, 10], forward={"100": ways | {"cuDNN": 3e-3}, "50": ways}, backward={"100": kernels},
        product={"n": 1000, "seconds": 1e-5}, timeline={"100": TIMELINE},
    )  # fmt: skip
    lines = list(measured.left_out(r))
    assert lines[2] == "| as it is | 2,000 | 1.00 | 2,000 | 1.00 |"
    assert lines[4] == "| cuDNN | 3,000 | 1.50 |  |  |"
    assert "at 4 TFLOP/s (d = 100) and 2 TFLOP/s (d = 50)" in lines[-1]  # 4 x 10 x 1000^2 x 100 in a ms
    assert "at 200." in lines[-1]
    lines = list(measured.backward_kernels(r))
    assert lines[3] == "| `flash_dkv` | 4 | 2,000 | 4 |"
    assert lines[5] == "| the rest: $D_i$, padding | | 5 |  |"
    figure = str(measured.clocked(r))
    assert "2,000 cycles a tile" in figure
    assert "1.50 times as long" in figure


def test_races_of_all_techniques_in_one_figure(monkeypatch, tmp_path):
    """A dot a race; ours slower is left of 1. What has no race is named."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import races

    entry = lambda name, seconds: {
        "name": name, "seconds": seconds, "roof": 0.5, "bound_by": "memory", "tflops": 1.0, "gbps": 1234.0
    }  # fmt: skip
    race = lambda theirs: {
        "title": "a race", "flops": 0,
        "entries": [entry("accel (auto)", 1.0), entry("them", theirs), entry("a product alone", 0.1)],
    }  # fmt: skip
    run = {"slug": "lean", "device": "a GPU", "races": [race(0.8), race(1.5)], "versions": {"jax": "1"},
           "ceilings": {"basis": "data sheet"}}  # fmt: skip
    assert races.against(tmp_path) == races.folded(tmp_path) == ""
    stored = {"date": "2026-11-26", "results": {"forward": run}}
    (tmp_path / "bench_lean_gpu.json").write_text(json.dumps(stored))
    figure = ET.fromstring(str(races.against(tmp_path)))
    assert len(figure.findall(".//circle")) == 2
    assert "1 of 2 races" in figure.find("figcaption").text
    folded = ET.fromstring(races.folded(tmp_path))
    assert folded.find("summary").text == "lean: 2 races on a GPU, 2026-11-26"
    assert len(folded.findall("figure")) == 2
    *_, first, second, _ = races.summary("lean", tmp_path).split("\n")
    assert first == "| a race | 1000 | 1,234 GB/s | 50% | them | 0.80 |"
    assert second.endswith("| them | 1.50 |")
    assert "lean" not in races.not_run(tmp_path)
    assert "flash" in races.not_run(tmp_path)
    sys.modules.pop("races", None)
