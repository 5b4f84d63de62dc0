"""The microcontroller target: stored vectors and counts, laws, bad inputs."""

import json

import numpy as np
import pytest

from hw import kernel_counts
from hw.kernel_counts import instructions
from hw.mcu_parts import MCU_COUNTS
from ref.blocks import int8_ops as ops
from tests.claims import hw_mcu_counts, record
from tests.golden_runner import folder, golden, run
from tests.hw import laws_hw_mcu
from tests.laws import law_tests

globals().update(law_tests(laws_hw_mcu))


@golden("hw_mcu_int8")
def test_hw_mcu_golden_int8(case):
    run(case, ops)


def counted():
    for case in json.loads((folder() / "hw_mcu_instructions.json").read_text())["cases"]:
        a = case["args"]
        sizes = "x".join(str(v) for v in a["dims"].values())
        yield pytest.param(case, id=f"hw_mcu-{a['kernel']}-{a['core']}-{sizes}")


@pytest.mark.parametrize("case", list(counted()))
def test_hw_mcu_golden_instructions(case):
    assert case["fn"] == "instructions"
    got = instructions(**case["args"], **case["kwargs"])
    rtol, atol = case["tol"]["instructions"]
    np.testing.assert_allclose(got, case["outs"]["instructions"], rtol=rtol, atol=atol)


def test_hw_mcu_constants_are_the_fit_of_the_counts():
    """And shapes that the fit has not seen are within 10 %, as are those of the cross-check."""
    assert record.is_fresh("hw_mcu_counts")
    found = kernel_counts.fit(hw_mcu_counts.stored("calibration"), hw_mcu_counts.cross_check())
    stored = MCU_COUNTS.numbers
    assert set(found) == set(stored)
    for name, constants in found.items():
        np.testing.assert_allclose(constants, stored[name], atol=0.02, err_msg=name)
    calibrated = {
        tuple(r[:4]) for lib in hw_mcu_counts.stored("calibration").values() for r in lib["cortex_m7"]
    }
    unseen = hw_mcu_counts.stored("validation")
    fresh = [r for lib in unseen.values() for r in lib["cortex_m7"] if tuple(r[:4]) not in calibrated]
    assert len(fresh) > 150
    worst = kernel_counts.worst_error(stored, unseen)
    assert max(worst.values()) <= 0.1, max(worst.items(), key=lambda kv: kv[1])


def test_hw_mcu_bad_input_of_operators_is_named():
    x, w, b = np.zeros((2, 3), int), np.zeros((4, 3), int), np.zeros(4, int)
    kw = {"input_offset": 0, "output_offset": 0}
    for bad, words in (
        (lambda: ops.matmul_s8(x, w[:, :2], b, 2**30, 0, **kw), "axis K"),
        (lambda: ops.matmul_s8(x + 200, w, b, 2**30, 0, **kw), "x must hold 8-bit"),
        (lambda: ops.matmul_s8(x * 1.0, w, b, 2**30, 0, **kw), "x must hold 8-bit"),
        (lambda: ops.matmul_s8(x, w, b + 2**31 - 1, 2**30, 0, **kw), "beyond int32"),
        (lambda: ops.matmul_s8(np.zeros((1, 70_000), int), np.zeros((1, 70_000), int), None, 1, 0, **kw),
         "K=70000"),
        (lambda: ops.matmul_s8(x, w, b, 2**31, 0, **kw), "multiplier must hold 32-bit"),
        (lambda: ops.matmul_s8(x, w, b, 2**30, 0, act_min=5, act_max=4, **kw), "act_min"),
        (lambda: ops.matmul_s8(x, w, b, 2**30, 0, input_offset=400, output_offset=0), "input_offset"),
        (lambda: ops.softmax_params_s8(input_scale=0.0), "input_scale"),
        (lambda: ops.softmax_params_s8(input_scale=float("nan")), "input_scale"),
        (lambda: ops.softmax_s8(np.zeros((2, 0), int), multiplier=1, shift=0, diff_min=-9), "one column"),
        (lambda: ops.lut_s8(x, np.zeros(255, np.int8)), "table must be int8"),
        (lambda: ops.make_lut_s8(np.tanh, 0.0, 0, 1.0, 0), "in_scale"),
        (lambda: ops.conv_s8(np.zeros((2, 2, 1), int), np.zeros((1, 3, 3, 1), int), None, 1, 0,
                             padding="VALID", **kw), "does not fit"),
        (lambda: ops.conv_s8(np.zeros((2, 2, 1), int), np.zeros((1, 3, 3, 1), int), None, 1, 0,
                             padding="FULL", **kw), "padding must be"),
        (lambda: instructions("conv", {"n": 1}, "cortex_m7"), "kernel must be one of"),
        (lambda: instructions("add_s8", {"n": 1}, "cortex_a53"), "core must be one of"),
        (lambda: instructions("add_s8", {"m": 1}, "cortex_m7"), "dims of add_s8 must be n"),
        (lambda: instructions("add_s8", {"n": 1}, "cortex_m7", profile="fast"), "profile must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            bad()


def test_hw_mcu_exercises_of_the_chapter():
    dims = {"m": 1, "k": 64, "n": 64}
    m3, m7 = (instructions("fully_connected_s8", dims, core) for core in ("cortex_m3", "cortex_m7"))
    assert 0.3 < (m3 - m7) / m3 < 0.36
    far = {"x": [[127, -128]], "diff_min": -10}
    wide = {"x": [[127, 126]], "diff_min": -10}
    cost = lambda inputs: instructions("softmax_s8", {"rows": 1, "cols": 2}, "cortex_m7", inputs=inputs)
    assert cost(far) < cost(wide) == instructions("softmax_s8", {"rows": 1, "cols": 2}, "cortex_m7")
