"""`triptych bench`: what is exact, who may take part, and how it is told. Nothing here looks at a clock."""

import json
import sys
import types
import xml.etree.ElementTree as ET
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hw.cli import main
from hw.commands import bench as command
from hw.commands import bench_attention
from hw.commands.bench_attention import Attention, options_of
from hw.commands.bench_clock import Ceilings, listed, measured, rounds
from hw.commands.bench_figure import race_figure
from hw.commands.bench_problem import Call, Problem, apart, contest, drawn, package, tolerance, wide
from ref.attention.lean import lean_attention
from tests.claims import bench as claims
from tests.claims import record

ROOF = Ceilings({"float32": 1e12}, 1e11, "by decree")
QUICK = {"seconds": 1e-4, "count": 1}
# (shape, options, gradients too) of each problem, as small as its checks allow
TINY = {
    "flash": ((1, 40, 4, 16), {"causal": True, "kv_heads": 2}, True),
    "block_sparse_flash": ((1, 64, 2, 16), {"mask": "butterfly", "block": 16}, True),
    "lean": ((2, 64, 4, 16), {"kv_heads": 2, "lengths": "ragged"}, False),
    "llm_int8": ((8, 64, 16), {"outliers": 0.05}, False),
    "rum": ((2, 5, 8), {"inputs": 3}, True),
    "pitome": ((2, 9, 8), {}, False),
    "mesa": ((6, 16), {"groups": 2}, True),
}


def call(capsys, *argv):
    """(exit code, standard output, standard error)."""
    return main(list(argv)), *capsys.readouterr()


@pytest.mark.parametrize("slug", list(TINY))
def test_bench_checks_values_and_tells_every_entry(slug, capsys, tmp_path):
    """Entries that ran are within their bounds; the others say why in one line."""
    shape, options, backward = TINY[slug]
    sets = [f"--set={n}={x}" for n, x in options.items()]
    plot = tmp_path / "race.svg"
    argv = ("bench", slug, "--shape", "x".join(map(str, shape)), *sets, "--seconds", "1e-4", "--rounds", "1")
    more = ("--backward",) if backward else ()
    code, out, err = call(capsys, *argv, *more, "--json", "--seed", "3", "--plot", str(plot))
    assert (code, err) == (0, "")
    r = json.loads(out)
    assert (r["slug"], r["seed"], r["backward"]) == (slug, 3, backward)
    (race,) = r["races"]
    ran = {e["name"]: e for e in race["entries"] if e["seconds"]}
    assert {"accel (auto)", "accel (xla)"} <= set(ran)
    assert any(not name.startswith("accel") for name in ran) or slug == "pitome"
    assert ran["accel (auto)"]["ratio"] == 1
    for e in race["entries"]:
        assert bool(e["seconds"]) != bool(e["why_not"])
        assert "\n" not in e["why_not"]
        if e["seconds"]:
            assert e["bound_by"] in ("memory", "arithmetic")
            assert e["error"] < 0.5
    root = ET.fromstring(plot.read_text())
    assert len(root.findall(".//{*}svg//{*}rect")) == len(ran)


def test_bench_prints_a_table_in_80_columns(capsys):
    argv = ("bench", "flash", "--shape", "1x40x4x16", "--seconds", "1e-4", "--rounds", "1", "--only", "xla")
    code, out, _ = call(capsys, *argv)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "TFLOP/s" in out or "GB/s" in out
    assert "accel (auto)" not in out
    assert "jax.nn xla" in out


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "window": 5}, {"kv_heads": 1, "window": 3}],
    ids=["full", "band", "group"],
)
def test_flash_bench_rows_that_are_checked_are_exact(options, backward):
    """The definition in float64, all of it, passes the check of random rows; a changed number does not."""
    a = Attention((2, 24, 2, 8), "float32", backward=backward, seed=1, **options)
    x = {n: jnp.asarray(v, jnp.float64) for n, v in a.arrays.items()} if jax.config.x64_enabled else a.arrays
    q, k, v = (np.asarray(x[n], np.float64) for n in "qkv")
    group = q.shape[2] // k.shape[2]
    seen = a.visible(np.arange(24))

    def definition(q, k, v, xp):
        k, v = (xp.repeat(y, group, axis=2) for y in (k, v))
        s = xp.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
        s = xp.where(xp.asarray(seen)[None, None], s, -xp.inf)
        p = xp.exp(s - s.max(axis=-1, keepdims=True))
        return xp.einsum("bhij,bjhd->bihd", p / p.sum(axis=-1, keepdims=True), v)

    if backward:
        on = [jnp.asarray(y, jnp.float32) for y in (q, k, v)]
        do = jnp.asarray(a.arrays["checked do"])
        out = jax.jit(lambda *y: jax.vjp(lambda *z: definition(*z, jnp), *y)[1](do))(*on)
        bound = tolerance("float32")
    else:
        out, bound = definition(q, k, v, np), 1e-14  # float64 on both sides
    assert a.error(out) < bound
    wrong = [np.array(y) for y in (out if backward else (out,))]
    b, h = a.heads[0]
    wrong[-1][b, a.rows[1], h * (1 if backward else group)] += 1.0
    assert a.error(tuple(wrong)) > 1e-3
    wrong[-1][a.heads[-1][0], a.rows[1]] = np.nan  # wherever it is, it is not lost among the heads
    assert np.isnan(a.error(tuple(wrong)))
    assert a.pairs == seen.sum()


def test_bench_draws_what_the_seed_says():
    """The same numbers again for a seed, others for each array and the next seed; exact in float64."""
    shapes = (8, 4), (8, 4)
    x, y = drawn(3, "bfloat16", *shapes)
    again, other = drawn(3, "bfloat16", *shapes)[0], drawn(4, "bfloat16", *shapes)[0]
    assert (x == again).all()
    assert x.dtype == jnp.bfloat16
    assert not (x == y).all()
    assert not (x == other).all()
    np.testing.assert_array_equal(wide(x), np.asarray(x, np.float64))
    np.testing.assert_array_equal(wide(np.float64([np.pi, np.nan])), [np.pi, np.nan])


def test_bench_leaves_out_what_is_wrong_and_what_breaks():
    """A wrong result has no time; whatever another's code raises is told in one line."""
    right, wrong = jnp.ones(3), jnp.asarray([1.0, 2.0, jnp.nan])
    error = lambda out: apart([out], [np.ones(3)])

    def broken():
        raise KeyError("first line\nsecond line")

    entries = {
        "right": lambda: Call(lambda: right, error, 1e-6),
        "wrong": lambda: Call(lambda: wrong, error, 1e-6),
        "broken": broken,
        "rounded": lambda: Call(lambda: right * 2, error, 1e-6, off=lambda out: 0.0),
    }
    found = contest(Problem("p", 6.0, 12.0, "float32", entries), ROOF, **QUICK)
    by = {e["name"]: e for e in found["entries"]}
    assert by["right"]["seconds"]
    assert by["rounded"]["seconds"]
    assert by["rounded"]["error"] == 1
    assert by["wrong"]["seconds"] is None
    assert "off by nan" in by["wrong"]["why_not"]
    assert "second line" not in by["broken"]["why_not"]
    assert "first line" in by["broken"]["why_not"]
    only = contest(Problem("p", 6.0, 12.0, "float32", entries), ROOF, only=("ight",), **QUICK)
    assert [e["name"] for e in only["entries"]] == ["right"]


def test_bench_calls_the_checks_inputs_once_and_then_the_timed_ones():
    asked = []
    say = lambda what: asked.append(what) or jnp.ones(())
    one = Call(lambda: say("timed"), lambda out: 0.0, 1.0, check=lambda: say("check"))
    contest(Problem("p", 1.0, 1.0, "float32", {"one": lambda: one}), ROOF, **QUICK)
    assert asked[0] == "check"
    assert set(asked[1:]) == {"timed"}


def test_bench_finds_others_at_run_time(monkeypatch):
    """A package that appears takes part; one that raises says what."""
    fake = types.ModuleType("tokamax")
    fake.__spec__ = types.SimpleNamespace(name="tokamax")

    def attend(q, k, v, *, is_causal, implementation):
        if implementation == "triton":
            raise NotImplementedError("no such card")
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)

    fake.dot_product_attention = attend
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    case = [((1, 16, 2, 8), {"causal": True})]
    found = command.race_problems("flash", case, seed=0, only=("tokamax", "flash-attn 2"), **QUICK)
    by = {e["name"]: e for e in found["races"][0]["entries"]}
    assert by["tokamax mosaic"]["seconds"]
    assert by["tokamax triton"]["why_not"] == "no such card"
    assert by["flash-attn 2"]["why_not"] == "flash-attn 2 is not installed"
    with pytest.raises(ImportError, match="Nothing is not installed"):
        package("nothing.at.all", "Nothing")


@pytest.mark.parametrize("lengths", [None, (5, 12)], ids=["whole", "ragged"])
@pytest.mark.parametrize("masked", [False, True], ids=["calls", "mask"])
def test_lean_bench_peer_steps_are_the_definition(masked, lengths, monkeypatch):
    """PyTorch's attention, JAX's in its place: a call a request or a mask, one step and two in a row."""

    def attend(q, k, v, *, attn_mask, enable_gqa):
        assert enable_gqa
        swap = lambda x: jnp.swapaxes(x, 1, 2)
        return swap(jax.nn.dot_product_attention(*map(swap, (q, k, v)), mask=attn_mask))

    fake = types.SimpleNamespace(
        arange=lambda n, device: jnp.arange(n),
        tensor=lambda x, device: jnp.asarray(x),
        cat=jnp.concatenate,
        no_grad=nullcontext,
        nn=types.SimpleNamespace(functional=types.SimpleNamespace(scaled_dot_product_attention=attend)),
    )
    monkeypatch.setattr(bench_attention, "torch_device", lambda: (fake, "cpu"))
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s, np.float32))
    q, k, v = draw(2, 4, 8), draw(2, 2, 12, 8), draw(2, 2, 12, 8)
    decode = bench_attention.torch_decoding(k, v, lengths, backend="default", masked=masked and bool(lengths))
    wide = [np.asarray(x, np.float64) for x in (k, v)]
    known = None if lengths is None else np.array(lengths)
    want = lean_attention(np.asarray(q, np.float64), *wide, lengths=known)
    assert apart([decode(q[:, :, None])[:, :, 0]], [want]) < tolerance("float32")
    want = lean_attention(want, *wide, lengths=known)
    assert apart([decode(q[:, :, None], 2)[:, :, 0]], [want]) < 2 * tolerance("float32")


def test_bench_rounds_take_turns():
    order = []
    calls = {n: lambda n=n: order.append(n) or jnp.ones(()) for n in "ab"}
    found = rounds(calls, wait=lambda out: out, seconds=1e-9, count=4)
    assert order[-6:] == list("ababab")  # three rounds, since a call takes longer than all that is allowed
    assert all(t.calls == 3 and t.best <= t.seconds for t in found.values())


def test_bench_knows_ceilings_of_devices_and_measures_the_rest():
    for kind, gigabytes in (("NVIDIA H200", 4.8e12), ("NVIDIA H100 80GB HBM3", 3.352e12)):
        found = listed(kind)
        assert found.bandwidth == gigabytes
        assert found.rates["bfloat16"] == 989.4e12
    assert listed("NVIDIA A100-SXM4-40GB").bandwidth == 1555e9
    assert listed("NVIDIA A100-SXM4-80GB").bandwidth == 2039e9
    assert listed("cpu") is None
    here = measured(["float32"], seconds=1e-4, small=True)
    assert here.bandwidth > 0
    assert here.rates["float32"] > 0
    assert ROOF.fraction(1e9, 1e9, "float32", 0.02) == (0.5, "memory")
    assert ROOF.fraction(1e12, 1e9, "float32", 2.0) == (0.5, "arithmetic")
    assert ROOF.fraction(1e15, 1e9, "int4", 0.02)[1] == "memory"  # no roof is known for it


def test_bench_refusals_are_one_clear_line(capsys):
    for argv, words in (
        (["flash", "--shape", "4x"], "must look like 4x4096x16x128"),
        (["flash", "--shape", "4x4"], "--shape of flash must be BxNxHxD"),
        (["flash", "--shape", "1x8x4x8", "--set", "kv_heads=3"], "kv_heads must divide the 4 heads, got 3"),
        (["flash", "--shape", "1x8x4x8", "--set", "causl=True"], "there are causal, kv_heads, window"),
        (["flash", "--set", "causal=True"], "--set needs a --shape"),
        (["flash", "--rounds", "0"], "--rounds must be at least 1"),
        (["flash", "--plot", "a.png"], "--plot writes an .svg"),
        (["flash", "--ceilings", "parts"], "use --ceilings measured"),
        (["flash", "--example", "--backward"], "--backward: for flash"),
        (["lean", "--shape", "2x8x4x8", "--set", "lengths=9,1"], "lengths must be 2 numbers from 1 to 8"),
        (["lean", "--backward"], "without --backward"),
        (["block_sparse_flash", "--shape", "1x8x4x8", "--set", "mask=dots"], "mask must be"),
        (["llm_int8", "--shape", "8x8"], "--shape of llm_int8 must be MxKxN"),
    ):
        code, out, err = call(capsys, "bench", *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), argv
        assert words in err, argv


def test_bench_problems_have_defaults_for_every_device():
    """Every default names only options that exist, and every option of `--set` has a default."""
    for slug, make in command.PROBLEMS.items():
        known = options_of(make)
        for cases in (command.SMALL, command.LARGE):
            assert cases[slug]
            assert all(set(options) <= set(known) for _, options in cases[slug])
    assert set(claims.FILES) == set(command.PROBLEMS)


def test_bench_figure_says_so_when_nothing_ran():
    race = {"title": "t", "flops": 1.0, "nbytes": 1.0, "dtype": "float32", "entries": []}
    assert "nothing ran" in race_figure({"slug": "s", "device": "d", "races": [race]})


def test_bench_stored_results_are_fresh():
    """`python -m tests.claims.bench SLUG` on a GPU again if not."""
    for path in record.DATA.glob("bench_*.json"):
        assert record.is_fresh(path.stem), path.stem
    for slug, files in claims.FILES.items():
        assert all((record.ROOT / f).exists() for f in files), slug


def test_bench_passes_of_a_fresh_record_are_kept(tmp_path, monkeypatch):
    """One pass stored after the other stands beside it; a stale record is replaced."""
    for module in (record, claims):
        monkeypatch.setattr(module, "DATA", tmp_path)
    claims.keep("flash", {"forward + backward": "both"})
    claims.keep("flash", {"forward": "one"})
    assert record.load("bench_flash_gpu")["results"] == {"forward": "one", "forward + backward": "both"}
    path = tmp_path / "bench_flash_gpu.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    claims.keep("flash", {"forward": "new"})
    assert record.load("bench_flash_gpu")["results"] == {"forward": "new"}


def test_bench_stored_races_become_figures_of_a_page(tmp_path, monkeypatch):
    """What `tests.claims.bench` stores is what docs/races.py draws; where nothing is stored, nothing."""
    monkeypatch.syspath_prepend(str(record.ROOT / "docs"))
    from races import races, summary

    case = [((1, 16, 2, 8), {})]
    run = command.race_problems("flash", case, seed=0, only=("auto", "xla", "cudnn", "tokamax"), **QUICK)
    stored = {"date": "2026-11-26", "results": {"forward": run}}
    (tmp_path / "bench_flash_gpu.json").write_text(json.dumps(stored, allow_nan=False))
    page = ET.fromstring(races("flash", tmp_path))
    caption = page.find("figcaption").text
    assert "[1, 16, 2, 8] float32, full, forward" in caption
    assert "more could not run there" in caption
    assert "accel (xla)" in "".join(page.itertext())
    assert races("lean", tmp_path) == summary("lean", tmp_path) == ""
    row = summary("flash", tmp_path).splitlines()[-1]
    assert "[1, 16, 2, 8] float32, full, forward" in row
    assert "| jax.nn xla |" in row
