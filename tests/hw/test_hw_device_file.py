"""A reader's own device as TOML, and sweeps over a target's fields."""

import json
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import replace

import jax.numpy as jnp
import pytest

import hw
from hw.device_file import KINDS, kinds, load_target, target_toml, unit, with_fields
from hw.sweeps import MOST, Y
from hw.targets import KINDS as FIRST
from hw.targets import preset, presets

NAMES = [n for n in presets() if n != "this_cpu"]


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Files


@pytest.mark.parametrize("name", NAMES)
def test_hw_device_file_every_preset_is_a_file(name, write):
    """What `target_toml` writes stands alone and is read back as the same target."""
    target = presets()[name]()
    path = write(target_toml(target), "other.toml")
    assert tomllib.loads(path.read_text())["kind"] in KINDS
    assert load_target(path) == target
    assert load_target(write(f'base = "{name}"\n')) == replace(target, name="mine")


def test_hw_device_file_starts_from_a_preset_or_another_file(write):
    first = write('base = "pim_gpt"\nchannels = 32\n[asic]\nghz = 2.0\n', "first.toml")
    assert load_target(first).asic == replace(hw.pim_gpt().asic, ghz=2.0)
    second = write('base = "first.toml"\nrefresh = false\nrow_interleave = 8\n')
    got = load_target(second)
    assert (got.channels, got.refresh, got.row_interleave, got.name) == (32, False, 8, "mine")
    assert load_target(second, channels=8, **{"asic.ghz": 0.5}).asic.ghz == 0.5
    assert preset(str(second), channels=8).channels == 8
    write('base = "first.toml"\nasic = "none"\nrow_interleave = 4\n', "second.toml")
    bare = load_target(write('base = "second.toml"\nrow_interleave = "none"\n'))
    assert (bare.asic, bare.row_interleave) == (None, None)


def test_hw_device_file_tables_add_to_those_of_the_base(write):
    rates = hw.h200().peak_tflops
    got = load_target(write('base = "h200"\nhbm_gbps = 4000\n[peak_tflops]\nbfloat16 = 500\n'))
    assert got.peak_tflops == rates | {"bfloat16": 500}
    assert isinstance(got.hbm_gbps, float)
    board = load_target(write(
        'base = "zcu102"\n[formats]\nactivations = { width = 16, integer = 6 }\n'
        'weights = { width = 8, integer = 1, overflow = "SAT" }\nper_product_cast = false\n'
    ))  # fmt: skip
    assert board.formats.activations == hw.Fixed(16, 6)
    assert board.formats.weights == hw.Fixed(8, 1, overflow="SAT")
    assert not board.formats.per_product_cast


def test_hw_device_file_stands_alone(write):
    own = write(
        'kind = "gpu"\nvector_tflops = 10\nsfu_tops = 2.5\nhbm_gbps = 500\nhbm_gb = 16\ncores = 40\n'
        "sram_kb = 100\nwatts = 150\n[peak_tflops]\nfloat32 = 20\nbfloat16 = 80\n",
        "garage.toml",
    )
    target = load_target(own)
    assert (type(target), target.name) == (hw.Gpu, "garage")
    r = hw.estimate(hw.trace(jnp.dot, ("float32", (64, 64)), ("float32", (64, 64))), target)
    assert r.target == "garage"
    assert r.seconds > 0


WRONG = [
    ("x", "is not TOML: "),
    ("", 'say either base = "h200"'),
    ('base = "h200"\nkind = "gpu"', 'say either base = "h200"'),
    ("base = 3", "base must be the name of a preset"),
    ('base = "h20"', "no target 'h20'; did you mean h200"),
    ('base = "mine.toml"', "starts from itself"),
    ('kind = "tpu"', "kind must be one of gpu, cpu, pim, fpga"),
    ('kind = "gpu"\nhbm_gbps = 3', r"needs vector_tflops \(1e12 operations a second\), .*watts \(W\)"),
    ('base = "h200"\nhbm_tbps = 3', r"Gpu has no field 'hbm_tbps'; did you mean hbm_gbps \(GB/s\)"),
    ('base = "h200"\nhbm_gbps = "fast"', r"hbm_gbps \(GB/s\) must be a finite number, got 'fast'"),
    ('base = "h200"\nhbm_gbps = nan', "must be a finite number, got nan"),
    ('base = "h200"\nhbm_gbps = true', "must be a finite number, got True"),
    ('base = "h200"\nhbm_gbps = -1', "hbm_gbps must be positive, got -1"),
    ('base = "h200"\ncores = 1.5', "cores must be a whole number, got 1.5"),
    ('base = "h200"\nideal = 1', "ideal must be true or false, got 1"),
    ('base = "h200"\nname = 1', "name must be text, got 1"),
    ('base = "h200"\ntile = [1, 2]', "tile must be a list of 3"),
    ('base = "h200"\ntile = 3', "tile must be a list, got 3"),
    ('base = "h200"\npeak_tflops = 3', "peak_tflops .* must be a table of numbers, got 3"),
    ('base = "h200"\n[peak_tflops]\nfp16 = 3', "fp16 is no element type; did you mean float16"),
    ('base = "h200"\n[peak_tflops]\nint8 = 0', "peak_tflops.int8 must be positive, got 0"),
    ('base = "xeon_6154"\ncaches_kb = [1, 2]', "caches_kb must be a list of 3: L1 a core"),
    ('base = "xeon_6154"\nclusters = [[1, 2]]', "clusters must be lists of 4: cores, GHz"),
    ('base = "xeon_6154"\nclusters = [["a", 1, 2, 3]]', "must be a finite number, got 'a'"),
    ('base = "pim_gpt"\nt_rp = 3.5', r"t_rp \(ticks\) must be a whole number, got 3.5"),
    ('base = "pim_gpt"\n[asic]\nmhz = 1', r"Asic has no field 'asic.mhz'; did you mean ghz \(GHz\)"),
    ('base = "pim_gpt"\nasic = 3', "asic must be a table with name, adders"),
    ('kind = "pim"\n[asic]\nghz = 1', "asic needs name, adders"),
    ('base = "zcu102"\nformats = 8', "formats must be a table with activations"),
    ('base = "zcu102"\n[formats]\nactivations = { width = 0 }', "width"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WRONG, ids=range(len(WRONG)))
def test_hw_device_file_errors_name_the_key(write, text, words):
    path = write(text)
    with pytest.raises(ValueError, match=words) as why:
        load_target(path)
    assert str(why.value).startswith(str(path))
    assert "\n" not in str(why.value) or "TOML" in str(why.value)


def test_hw_device_file_missing_or_in_conflict(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_target(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match="say one of them"):
        with_fields(hw.pim_gpt(), {"asic": None, "asic.ghz": 1.0})
    with pytest.raises(ValueError, match="none of gpu, cpu, pim, fpga, mcu"):
        target_toml(hw.target.Target())


def test_hw_device_file_units_are_read_off_names():
    for name, words in (
        ("hbm_gbps", "GB/s"), ("hbm_gb", "GB"), ("sram_kb", "KB"), ("launch_us", "µs"), ("mhz", "MHz"),
        ("asic.ghz", "GHz"), ("tick_ps", "ps"), ("t_rp", "ticks"), ("watts", "W"), ("dsp_mw", "mW"),
        ("hbm_pj_per_byte", "pJ a byte"), ("peak_tflops", "1e12 operations a second"), ("cores", ""),
        ("static_w", "W"), ("flash_bytes_s", "bytes a second"),
    ):  # fmt: skip
        assert unit(name) == words, name


def test_hw_device_file_kinds_are_presets_too():
    """A kind is the name of its first device; what is not installed is not offered."""
    for kind, cls in kinds().items():
        assert preset(kind) == presets()[FIRST[kind]]()
        assert isinstance(preset(kind), cls)
    with pytest.raises(LookupError, match="no target 'npu'"):
        preset("npu")


# Sweeps


def product(m, k=256, n=256):
    return hw.trace(jnp.dot, ("float32", (m, k)), ("float32", (k, n)))


def test_hw_sweep_prices_every_combination():
    p = product(64)
    found = hw.sweep_fields(p, hw.h200(), hbm_gbps=[100, 1000], launch_us=[0.0, 2.0, 4.0])
    assert found.fields == ("hbm_gbps", "launch_us")
    assert len(found) == 6
    assert [(r["hbm_gbps"], r["launch_us"]) for r in found][:3] == [(100, 0.0), (100, 2.0), (100, 4.0)]
    for row, r in zip(found, found.reports, strict=True):
        alone = hw.estimate(p, hw.h200(hbm_gbps=float(row["hbm_gbps"]), launch_us=row["launch_us"]))
        assert alone == r
        assert row["seconds"] == alone.seconds
        assert row["at_least"] <= row["seconds"] <= row["at_most"]
    assert found.best()["hbm_gbps"] == 1000
    assert found.best("joules")["joules"] == min(r["joules"] for r in found)
    assert json.loads(found.to_json()) == list(found.rows)
    assert "µs" in str(found)
    assert " B" in str(found)


def test_hw_sweep_over_programs_and_fields_inside_fields(tmp_path):
    programs = {m: product(m) for m in (1, 8, 64)}
    found = hw.sweep_fields(programs, hw.pim_gpt(), **{"asic.ghz": [0.5, 2.0]})
    assert found.fields == ("program", "asic.ghz")
    assert [r["program"] for r in found] == [1, 1, 8, 8, 64, 64]
    assert len(hw.sweep_fields(programs, hw.h200())) == 3
    found.plot(tmp_path / "sweep.svg")
    for y in Y:
        root = ET.fromstring(found.svg(y))
        assert sum(e.tag.endswith("circle") for e in root.iter()) == 6
        assert sum(e.tag.endswith("polyline") for e in root.iter()) == 2
        height = float(root.attrib["viewBox"].split()[3])
        assert all(float(e.attrib["y"]) <= height for e in root.iter() if "y" in e.attrib)


def test_hw_sweep_rows_say_why_not():
    found = hw.sweep_fields(product(64), hw.h200(), hbm_gb=[1e-6, 1.0])
    assert found.rows[0]["why_not"].startswith("DoesNotFit: h200: hbm needs")
    assert found.reports[0] is None
    assert found.best()["hbm_gb"] == 1.0
    assert "1 of 2 cannot run" in found.svg()
    none = hw.sweep_fields(product(64), hw.h200(), hbm_gb=[1e-6])
    with pytest.raises(ValueError, match="no combination can be priced: DoesNotFit"):
        none.best()
    ET.fromstring(none.svg())
    words = hw.sweep_fields(product(64), hw.gddr6_aim(), placement=["auto", "host"], refresh=[True, False])
    assert ET.fromstring(words.svg()) is not None
    assert {r["placement"] for r in words} == {"auto", "host"}


def test_hw_sweep_bad_input():
    p, h200 = product(8), hw.h200()
    for call, words in (
        (lambda: hw.sweep_fields(p, h200), "name a field to vary"),
        (lambda: hw.sweep_fields(p, h200, hbm_gbps=[]), "hbm_gbps has no values"),
        (lambda: hw.sweep_fields(p, h200, hbm_gbps=3.0), "hbm_gbps must be a list of values, got 3.0"),
        (lambda: hw.sweep_fields(p, h200, placement="auto"), "placement must be a list of values"),
        (lambda: hw.sweep_fields(p, h200, hbm=[1.0]), "Gpu has no field 'hbm'"),
        (lambda: hw.sweep_fields(p, h200, hbm_gbps=[1.0, -1.0]), "hbm_gbps must be positive"),
        (lambda: hw.sweep_fields("p", h200, hbm_gbps=[1.0]), "program must be a Program"),
        (lambda: hw.sweep_fields(p, h200, hbm_gbps=[1.0] * (MOST + 1)), "at most 10,000 combinations"),
        (lambda: hw.sweep_fields(p, h200, cores=[1]).svg("cost"), "y must be one of seconds, joules"),
        (lambda: hw.sweep_fields(p, h200, cores=[1]).plot("x.png"), r"must end in \.svg"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
