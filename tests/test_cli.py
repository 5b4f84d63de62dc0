"""The command line, in process: what it prints, in 80 columns, as JSON, and how it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hw.cli import main
from hw.commands.price import spec
from hw.commands.run import claims_table
from ref.catalog import CATALOG

ROOT = Path(__file__).parent.parent
TARGETS = ["--target", "h200", "--target", "xeon_6154"]
MINE = """
import jax.numpy as jnp

SIZE = 3

def product(a, b, *, twice=False):
    out = a @ b
    return out + out if twice else out

def sorted_svd(a):
    return jnp.linalg.svd(a)
"""


def call(capsys, *argv):
    """(exit code, standard output, standard error)."""
    code = main(list(argv))
    return code, *capsys.readouterr()


def refused(capsys, *argv):
    """The one line of a refusal."""
    code, out, err = call(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("triptych: ")
    assert err.count("\n") == 1
    return err


def plain(text):
    """No colour, at most 80 columns."""
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    return text


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A directory with the reader's own module, as the current one."""
    (tmp_path / "my_model.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_cli_lists_the_catalogue(capsys):
    for argv in ((), ("list",)):
        code, out, _ = call(capsys, *argv)
        assert code == 0
        assert all(re.search(rf"^{t.slug} ", plain(out), re.MULTILINE) for t in CATALOG)
    for argv in (("--json",), ("list", "--json"), ("--json", "list")):
        rows = json.loads(call(capsys, *argv)[1])
        assert [r["slug"] for r in rows] == [t.slug for t in CATALOG]


def test_cli_lists_targets(capsys):
    names = {r["name"] for r in json.loads(call(capsys, "targets", "--json")[1])}
    assert {"h200", "a100", "xeon_6154", "this_cpu"} <= names
    assert "raspberry_pi5" in plain(call(capsys, "targets")[1])


@pytest.fixture
def hasty(monkeypatch):
    """Races of as few calls as they allow: what is printed is looked at, not the times."""
    from accel import race

    few = lambda *entries, _race=race.race, **options: _race(*entries, **options | {"budget": 0})
    monkeypatch.setattr(race, "race", few)


@pytest.mark.parametrize("slug", ["flash"])
def test_cli_run_shows_three_panels(capsys, hasty, slug):
    code, out, err = call(capsys, "run", slug, "--json", *TARGETS)
    assert (code, err) == (0, "")
    r = json.loads(out)
    assert all(c["seconds"] > 0 and c["in_bytes"] > 0 for c in r["ref"]["calls"])
    assert all(c["within"] and c["error"] <= c["bound"] for c in r["accel"]["calls"])
    assert [t["target"] for t in r["hw"]["targets"]] == ["h200", "xeon_6154"]
    assert all(t["seconds"] > 0 and t["energy_j"] > 0 and t["bound_by"] for t in r["hw"]["targets"])
    for t in r["hw"]["targets"]:
        assert t["seconds_range"][0] <= t["seconds"] <= t["seconds_range"][1]
    assert r["hw"]["macs"] > 0
    assert r["claims"]["rows"]
    code, out, err = call(capsys, "run", slug, *TARGETS)
    assert (code, err) == (0, "")
    for word in ("ref:", "accel:", "hw:", "the paper's claims", "xeon_6154", "within", "40.3 GB"):
        assert word in plain(out), word


def test_cli_run_prints_the_panel_of_costs_that_the_readme_shows(capsys, hasty):
    """The same columns and targets, and the same words below the table; numbers of this CPU may differ."""
    panel = lambda text: text.split("hw: what ")[1].split("\n\n")[0].splitlines()
    shown = panel((ROOT / "README.md").read_text().split("<!-- run -->")[1])
    printed = panel(call(capsys, "run", "flash")[1])
    last = 1 + max(n for n, line in enumerate(printed) if re.match(r"\w+  ", line))
    assert shown[1].split() == printed[1].split()
    assert [x.split()[0] for x in shown[2:last]] == [x.split()[0] for x in printed[2:last]]
    assert " ".join(shown[last:]).split() == " ".join(printed[last:]).split()
    assert shown[0] == printed[0]


def test_cli_run_prices_parameters_as_weights(capsys, hasty):
    """The network's parameters lie in flash, its input in SRAM; the first warnings are printed."""
    from hw.commands.run import MOST_WARNINGS, weights

    argv = ("run", "mcuformer", "--target", "stm32f746")
    code, out, err = call(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    panel = json.loads(out)["hw"]
    (row,) = panel["targets"]
    assert panel["fn"] == "mcuformer_forward"
    assert row["bytes_by_level"]["flash"] > 0
    assert row["warnings"]
    assert not any("no argument was traced as a weight" in w for w in row["warnings"])
    text = " ".join(plain(call(capsys, *argv)[1]).split())
    for words in row["warnings"][:MOST_WARNINGS]:
        assert " ".join(f"stm32f746: {words}".split()) in text
    tree = ((1, 2), {"a": 1})
    for fn, args, want in (
        (lambda x, params: x, (1, tree), (1,)),
        (lambda lm_params, weights, layer, x: x, (*[tree] * 3, 1), (0, 1, 2)),
        (
            lambda weights, grads, state: 0,
            (np.ones(2), tree, tree),
            (),
        ),  # an array, and trees of other things
        (lambda *params: 0, (tree,), ()),
    ):
        assert weights(fn, args) == want


@pytest.mark.parametrize("slug", ["flash"])
def test_cli_bench_races_implementations_and_peers(capsys, slug):
    argv = ("bench", slug, "--example", "--seconds", "0.001")
    code, out, _ = call(capsys, *argv, "--json")
    assert code == 0
    r = json.loads(out)
    first = {x["name"]: x for x in r["races"][0]["entries"]}
    assert first["ref (NumPy, float64)"]["seconds"] > 0
    assert first["accel (xla)"]["seconds"] > 0
    assert all(x["seconds"] or x["why_not"] for race in r["races"] for x in race["entries"])
    if r["device"] == "the CPU":
        assert first["accel (hopper)"]["why_not"]
    assert "of the best" in plain(call(capsys, *argv)[1])


def test_cli_prices_the_readers_own_function(capsys, mine):
    argv = ["price", "my_model:product", "--shape", "64x128:float32", "--shape", "128x32", *TARGETS]
    reports = json.loads(call(capsys, *argv, "--json")[1])
    assert [r["macs"] for r in reports] == [64 * 128 * 32] * 2
    assert reports[0]["flops"] == 2 * 64 * 128 * 32
    twice = json.loads(call(capsys, *argv, "--static", "twice=True", "--json")[1])
    assert twice[0]["flops"] == reports[0]["flops"] + 64 * 32
    slow = json.loads(call(capsys, *argv[:-4], "--set", "hbm_gbps=1.0", "--json")[1])
    assert slow[0]["seconds"] > reports[0]["seconds"]
    assert slow[0]["bound_by"] == "hbm"
    assert "dot_general" in plain(call(capsys, *argv)[1])
    (mine / "board.toml").write_text('base = "h200"\nhbm_gbps = 1.0\ntile = [64, 64, 32]\n')
    board = json.loads(call(capsys, *argv[:-4], "--target", "board.toml", "--json")[1])
    assert board[0]["target"] == "board"
    assert board[0]["bound_by"] == "hbm"


def test_cli_prices_on_kinds_and_says_what_does_not_fit(capsys, mine):
    """A kind is a target's name; a target that cannot take the program is a line, unless all are such."""
    argv = ["price", "my_model:product", "--shape", "1x64x128:f32", "--shape", "128x32:f32"]
    kinds = [x for k in ("gpu", "cpu", "pim", "fpga", "mcu") for x in ("--target", k)]
    reports = json.loads(call(capsys, *argv, *kinds, "--json")[1])
    assert [r["target"] for r in reports] == ["h200", "xeon_6154", "gddr6_aim", "zcu102", "stm32f746"]
    assert all(r["units"]["seconds"] == "s" for r in reports)
    out = call(capsys, *argv, *kinds, "--compare")[1]
    assert "at least" in out
    assert "pins traffic" in out
    (mine / "tiny.toml").write_text('base = "h200"\nhbm_gb = 1e-6\n')
    code, out, _ = call(capsys, *argv, "--target", "gpu", "--target", "tiny.toml")
    assert code == 0
    assert "tiny: tiny: hbm needs" in out
    assert "1,000 B" in refused(capsys, *argv, "--target", "tiny.toml")
    (mine / "bad.toml").write_text('base = "h200"\nhbm_gbs = 1\n')
    assert "bad.toml: Gpu has no field 'hbm_gbs'" in refused(capsys, *argv, "--target", "bad.toml")


def test_cli_sweeps(capsys, mine):
    argv = ["price", "my_model:product", "--shape", "64x128", "--shape", "128x32", "--target", "gpu"]
    axes = ["--sweep", "hbm_gbps=100,1000", "--sweep", "launch_us=0.0,5.0"]
    rows = json.loads(call(capsys, *argv, *axes, "--json")[1])
    assert [(r["hbm_gbps"], r["launch_us"]) for r in rows] == [
        (100, 0.0),
        (100, 5.0),
        (1000, 0.0),
        (1000, 5.0),
    ]
    code, out, _ = call(capsys, *argv, *axes, "--plot", "sweep.svg")
    assert code == 0
    assert "fastest: hbm_gbps=1000, launch_us=0.0" in out
    assert (mine / "sweep.svg").read_text().startswith("<svg")
    for more, words in (
        (["--sweep", "hbm_gbps"], "must look like FIELD=VALUE,VALUE"),
        (["--sweep", "hbm=1,2"], "no field 'hbm'"),
        ([*axes, "--target", "cpu"], "--sweep takes one --target"),
        ([*axes, "--trace", "x.json"], "--sweep takes one --target"),
    ):
        assert words in refused(capsys, *argv, *more)


def test_cli_prices_a_named_model(capsys):
    """SmolLM2 by shapes: its phases apart or together, without its weights."""
    argv = ["price", "smollm2", "--context", "16", "--target", "pim", "--target", "gpu", "--json"]
    reports = json.loads(call(capsys, *argv)[1])
    assert [r["target"] for r in reports] == [
        f"{t}, {phase}" for phase in ("prefill of 16", "decode after 16") for t in ("gddr6_aim", "h200")
    ]
    block = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    attention = 2 * 9 * 64 * 16
    assert reports[2]["macs"] == 30 * (block + attention) + 576 * 49152
    one = json.loads(call(capsys, "price", "smollm2:decode", *argv[2:])[1])
    assert one == [r | {"target": r["target"].split(",")[0]} for r in reports[2:]]
    for more, words in (
        (["smollm2:decod"], "did you mean 'decode'?"),
        (["smollm2", "--context", "0"], "--context must be in 1.."),
        (["smollm2", "--dtype", "i8"], "--dtype must be f32, bf16 or f16"),
    ):
        assert words in refused(capsys, "price", *more)


def test_cli_writes_a_target_to_start_from(capsys, mine):
    code, out, _ = call(capsys, "targets", "hbm2_pim")
    assert code == 0
    (mine / "own.toml").write_text(out.replace('"hbm2_pim"', '"own"', 1))
    argv = ["price", "my_model:product", "--shape", "64x128", "--shape", "128x32", "--json"]
    own, first = (json.loads(call(capsys, *argv, "--target", t)[1])[0] for t in ("own.toml", "hbm2_pim"))
    assert own == first | {"target": "own"}
    assert json.loads(call(capsys, "targets", "pim", "--json")[1])["name"] == "gddr6_aim"


def test_cli_writes_figures_and_timelines(capsys, mine):
    argv = ["price", "my_model:product", "--shape", "64x128", "--shape", "128x32"]
    assert call(capsys, *argv, "--plot", "cost.svg", "--perfetto", "cost.json")[0] == 0
    assert (mine / "cost.svg").read_text().startswith("<svg")
    assert json.loads((mine / "cost.json").read_text())["traceEvents"]
    assert call(capsys, *argv, "--plot", "dots.svg", "--figure", "roofline")[0] == 0
    assert "operations a byte" in (mine / "dots.svg").read_text()
    assert "no product in the banks" in refused(capsys, *argv, "--plot", "dots.svg", "--figure", "banks")


def test_cli_refusals_are_one_clear_line(capsys, mine):
    for argv, words in (
        (["run", "flsh"], "did you mean flash?"),
        (["rnu", "flash"], "did you mean 'run'?"),
        (["flash"], "did you mean `triptych run flash`?"),
        (["run"], "required: slug"),
        (["run", "flash", "--target", "h20"], "did you mean"),
        (["bench", "zzzz"], "no technique 'zzzz'"),
        (["bench", "flash", "--seconds", "0"], "--seconds must be positive"),
        (["price", "my_model"], "MODULE:FUNCTION"),
        (["price", "no_such:f"], "cannot import 'no_such'"),
        (["price", "my_model:prodct"], "did you mean 'product'?"),
        (["price", "my_model:SIZE"], "not a function"),
        (["price", "my_model:product", "--shape", "3y4"], "must look like 1x128x64:float32"),
        (["price", "my_model:product", "--shape", "3x4:f33"], "no element type 'f33'; there are f16, bf16"),
        (["price", "my_model:product", "--shape", "3x4"], "did not take these 1 arguments"),
        (["price", "my_model:product", "--shape", "3x4", "--shape", "5x6"], "my_model:product"),
        (["price", "my_model:sorted_svd", "--shape", "3x4"], "svd"),
        (["price", "my_model:product", "--shape", "3x4", "--shape", "4x5", "--target", "h201"], "h200"),
        (["price", "my_model:product", "--shape", "3x4", "--shape", "4x5", "--set", "hbm=1"], "no field"),
        (["price", "nothing.json"], "nothing.json"),
        (["fetch", "smollm3"], "did you mean 'smollm2'?"),
    ):
        assert words in refused(capsys, *argv), argv


def test_cli_shapes():
    assert spec("1x128x64:bfloat16") == ("bfloat16", (1, 128, 64))
    assert spec("1x128x576:f32") == ("float32", (1, 128, 576))
    assert spec("3:i8") == ("int8", (3,))
    assert spec("7") == ("float32", (7,))
    assert spec(":int32") == ("int32", ())


def test_cli_reads_the_claims_table_of_a_chapter():
    text = "# T\n\n## Claims\n\n| a | b |\n|---|---|\n| **one** | $2$ |\n\n## Next\n\n| x |\n|---|\n| y |\n"
    assert claims_table(text) == [["one", "2"]]
    assert claims_table("# no claims") == []


def test_cli_runs_as_a_module():
    run = lambda *argv: subprocess.run(
        [sys.executable, "-m", "hw", *argv], cwd=ROOT, capture_output=True, text=True
    )
    done = run("--help")
    assert done.returncode == 0
    assert "COMMAND" in done.stdout
    assert run("nonsense").returncode == 2


def test_cli_fetches(capsys, monkeypatch, tmp_path):
    """The list says what is here; a download's path is printed, and its progress never is."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    assert "SmolLM2" in plain(call(capsys, "fetch")[1])
    rows = {r["name"]: r for r in json.loads(call(capsys, "fetch", "--json")[1])}
    assert rows["smollm2"]["bytes"] > 9e7
    assert not rows["smollm2"]["here"]

    def arrives(name, *, progress):
        progress(5, 10)
        return tmp_path / name

    monkeypatch.setattr("ref.fetch.fetch", arrives)
    code, out, err = call(capsys, "fetch", "smollm2", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"name": "smollm2", "path": str(tmp_path / "smollm2")}


def test_cli_new_writes_files_that_work(capsys, monkeypatch, tmp_path):
    """Templates compile, their example runs in both layers, and a second call overwrites nothing."""
    monkeypatch.setattr("hw.commands.new.ROOT", tmp_path)
    assert "no checkout" in refused(capsys, "new", "fresh_idea", "--part", "memory")
    (tmp_path / "tests").mkdir()
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "catalog.py").write_text("")
    r = json.loads(call(capsys, "new", "fresh_idea", "--part", "memory", "--title", "Fresh", "--json")[1])
    assert len(r["files"]) == 5
    spaces = {}
    for name in r["files"]:
        if name.endswith(".py") and not name.startswith("tests/"):
            spaces[name] = {}
            exec((tmp_path / name).read_text(), spaces[name])
    definition, fast = spaces["ref/memory/fresh_idea.py"], spaces["accel/memory/fresh_idea.py"]
    (e,) = definition["example"]()
    assert (definition[e.fn](*e.args) == e.args[0]).all()
    assert fast[e.fn](e.args[0].astype("float32")).shape == e.args[0].shape
    for slug, words in (
        ("fresh_idea", "exists already"),
        ("flash", "in the catalogue"),
        ("No", "lower-case"),
    ):
        assert words in refused(capsys, "new", slug, "--part", "memory")
    assert "no --part 'cooking'; there are attention" in refused(capsys, "new", "other", "--part", "cooking")


def test_cli_claims_without_a_checkout_say_where_to_look(capsys, monkeypatch, tmp_path):
    """The wheel has no docs: one line instead of a table."""
    monkeypatch.setattr("hw.commands.run.ROOT", tmp_path)
    _, out, _ = call(capsys, "run", "flash", *TARGETS)
    assert "docs/attention/flash.md" in plain(out)
    assert "40.3 GB" not in out
