"""MELT: laws on ref, golden vectors, power counters, files of a run, bad inputs."""

import json
from dataclasses import replace

import numpy as np
import pytest

import ref
from tests.devices import laws_melt
from tests.devices.laws_melt import GREEDY, PHONE, TINY, WEIGHTS, Clock, FakeBackend
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_melt))


@golden("melt")
def test_melt_golden_ref(case):
    run(case, ref.melt)


def counter(folder, microjoules):
    domain = folder / "intel-rapl:0"
    (domain / "intel-rapl:0:0").mkdir(parents=True, exist_ok=True)  # a part of the package: not counted twice
    (domain / "energy_uj").write_text(f"{microjoules}\n")
    (domain / "max_energy_range_uj").write_text("999999\n")


def test_melt_counters_wrap_around(tmp_path):
    assert ref.melt.find_power(tmp_path) is None
    counter(tmp_path, 900_000)
    power = ref.melt.find_power(tmp_path)
    assert power.name == "RAPL"
    for t, value in ((10.0, 900_000), (11.0, 100_000), (12.0, 400_000)):  # 0.2 J over the end, then 0.3 J
        counter(tmp_path, value)
        power.sample(t)
    np.testing.assert_allclose(power.energy(10.0, 11.0)[0], 0.2 / 3.6, rtol=1e-9)
    mwh, mah = power.energy(10.0, 12.0)
    np.testing.assert_allclose(mwh, 0.5 / 3.6, rtol=1e-9)
    assert mah is None


def test_melt_recorded_power_is_read_from_a_table(tmp_path):
    path = tmp_path / "power.csv"
    path.write_text("timestamp,current_ma,voltage_v\n0,100,4\n10,200,\n20,300,3\n30,300,3\n")
    power = ref.melt.ReplayedPower.from_csv(path)
    mwh, mah = power.energy(-1, 30)  # an open interval: the last sample is outside
    np.testing.assert_allclose([mwh, mah], [(200 * 3 + 300 * 3) * 10 / 3600, 500 * 10 / 3600], rtol=1e-12)
    assert power.energy(21, 29) == (None, None)
    path.write_text("time,current_ma\n0,1\n")
    with pytest.raises(ValueError, match="lacks the columns timestamp, voltage_v"):
        ref.melt.ReplayedPower.from_csv(path)


def test_melt_run_writes_its_configuration_first(tmp_path):
    where = {"device": "desk", "framework": "numpy", "run": 0}
    path = ref.melt.open_run(tmp_path, GREEDY, **where)
    assert path == tmp_path / "desk" / "numpy" / "fake" / "F32" / "0"
    assert json.loads((path / "config.json").read_text())["sampling"]["temperature"] == 0
    clock = Clock()
    ref.melt.write_events(path, ref.melt.run_benchmark(FakeBackend(clock), [[[5]]], GREEDY, clock=clock))
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["load", "load", "prompt", "prompt"]
    assert events[2]["start"] == 103.0
    assert events[2]["tokens"] == [6, 7, 8, 9]
    with pytest.raises(FileExistsError):
        ref.melt.open_run(tmp_path, GREEDY, **where)


M = ref.melt
T, ONES = np.arange(3.0), np.ones(3)
RAW = M.quantize(np.ones((2, 32), np.float32), kind="Q8_0")
IDS = np.zeros(5, int)
bench = lambda conversations=([[1]],), **changes: M.run_benchmark(
    FakeBackend(Clock()), conversations, replace(GREEDY, **changes), clock=Clock()
)
roof = lambda device=PHONE, **changes: M.roofline(
    TINY, device, "Q4_0", **{"context": 0, "n_in": 4, "n_out": 1, **changes}
)
HOT = M.ThermalDevice(r_k_per_w=6.0, c_j_per_k=20.0)
BAD = {
    "unsorted": (lambda: M.energy(T[::-1], ONES, ONES), "timestamps must not fall"),
    "nothing": (lambda: M.energy(T, ONES * np.nan, ONES), "an empty window"),
    "no_samples": (lambda: M.energy(T[:0], ONES[:0], ONES[:0]), "an empty window"),
    "lengths": (lambda: M.energy(T, ONES[:2], ONES), r"current_ma.shape\[0\] = 2"),
    "kind": (lambda: M.quantized_matvec(RAW, np.ones(32), kind="Q9"), "unknown kind 'Q9'"),
    "encode": (lambda: M.quantize(np.ones(256), kind="Q4_K"), "cannot quantise to 'Q4_K'"),
    "blocks": (lambda: M.quantize(np.ones(33), kind="Q8_0"), "not a multiple of Q8_0's block of 32"),
    "bytes": (
        lambda: M.quantized_matvec(RAW[:, :33], np.ones(32), kind="Q8_0"),
        "bytes a multiple of Q8_0's",
    ),
    "product": (
        lambda: M.quantized_matvec(RAW, np.ones(31), kind="Q8_0"),
        r"x.shape\[0\] = 31, but must be 32",
    ),
    "rows": (lambda: M.quantized_matvec(RAW[None], np.ones(32), kind="Q8_0"), "raw must have shape"),
    "network": (lambda: M.quantize_model(WEIGHTS, kind="Q2_K"), "cannot quantise to 'Q2_K'"),
    "repetitions": (lambda: bench(repetitions=0), "repetitions must be at least 1, got 0"),
    "context": (lambda: bench(context=0), "context must be at least 1"),
    "long": (
        lambda: bench([[list(range(9))]], context=8),
        "a prompt has 9 tokens, but the context holds 1..8",
    ),
    "empty": (lambda: bench([[[]]]), "a prompt has 0 tokens"),
    "silent": (lambda: bench([]), "conversations must hold at least one"),
    "mute": (lambda: bench([[]]), "conversations must hold at least one"),
    "window": (lambda: M.perplexity(WEIGHTS, IDS, window=1), r"window must be in 2\.\.64"),
    "short": (lambda: M.perplexity(WEIGHTS, IDS[:1], window=8), "at least two tokens"),
    "items": (lambda: M.multiple_choice_accuracy(WEIGHTS, []), "at least one question"),
    "answer": (lambda: M.multiple_choice_accuracy(WEIGHTS, [(IDS, [[1]], 1)]), "index of the right one"),
    "tokens": (lambda: roof(context=62), "at most 64 in all"),
    "steps": (lambda: roof(n_out=-1), "n_out must not be negative"),
    "bandwidth": (
        lambda: roof(replace(PHONE, bytes_per_s=0.0)),
        "bytes_per_s and flops_per_s must be positive",
    ),
    "size": (lambda: M.model_bytes(TINY, "Q4_K"), "not a multiple of Q4_K's block of 256"),
    "seconds": (lambda: M.sustained(HOT, lambda f: 1.0, 0), "need seconds > 0"),
    "step": (lambda: M.sustained(replace(HOT, step_s=200.0), lambda f: 1.0, 9), "step_s <= R C"),
    "times": (lambda: M.steadiness(T[::-1], ONES), "must not fall"),
}

test_melt_rejects_bad_input = rejects(BAD)
