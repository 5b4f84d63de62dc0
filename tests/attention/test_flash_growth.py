"""The script that measures attention over its length on a GPU, small and on the CPU: logic, not figures."""

import numpy as np
import pytest

from tests.claims import flash_memory_gpu, record


@pytest.mark.parametrize("power", [1, 2])
def test_flash_growth_fit_finds_the_law_and_tells_what_does_not_follow_it(power):
    n = np.array([2.0**e for e in range(10, 16)])
    exact = 3e-6 + 2e-9 * n**power
    found = flash_memory_gpu.fit(n, exact, power)
    np.testing.assert_allclose([found["a"], found["b"]], [3e-6, 2e-9], rtol=1e-6)
    assert found["worst"] < 1e-9
    bent = exact * np.array([1, 1, 1, 1, 1, 1.1])
    assert 0.02 < flash_memory_gpu.fit(n, bent, power)["worst"] < 0.1
    steep = flash_memory_gpu.fit(n, 1e-9 * n ** (power + 0.5), power)
    assert steep["a"] == 0  # never a negative start
    assert steep["worst"] > 0.5
    np.testing.assert_allclose(flash_memory_gpu.exponent(n, n**power), power)


def test_flash_growth_measures_every_size():
    """On a CPU the allocator keeps no count, and the compiler's bytes stand in for it."""
    grown = flash_memory_gpu.growth((32, 64), heads=1, width=8, budget=0)
    decoded = flash_memory_gpu.decoding((64, 128), heads=2, kv_heads=1, width=8, budget=0)
    assert [r["tokens"] for r in grown] == [32, 64]
    assert [r["keys"] for r in decoded] == [64, 128]
    assert all(r["seconds"] > 0 for r in (*grown, *decoded))
    assert grown[1]["operands"] == 2 * grown[0]["operands"] == 2 * 7 * 32 * 8 * 2
    found = flash_memory_gpu.fits(grown, decoded)
    assert set(found) == {"bytes over N", "seconds over N^2", "decode seconds over N"}
    assert all(len(f["residuals"]) == 2 and f["worst"] >= 0 for f in found.values())


def test_flash_growth_stored_is_linear():
    """What a GPU measured, if it did: `python -m tests.claims.flash_memory_gpu` again if stale."""
    path = record.DATA / "flash_memory_gpu.json"
    assert not path.exists() or record.is_fresh("flash_memory_gpu")
    for name in flash_memory_gpu.FILES:
        assert (record.ROOT / name).exists()
    if path.exists():
        for r in record.load("flash_memory_gpu")["results"]["growth"]:
            # What the compiler counts is 4 + 3 arrays and, a token and head, two numbers of the softmax.
            compiled = r["operands"] + r["temporary_bytes"]
            assert abs(compiled / r["tokens"] / 3600 - 1) < 0.01
            # The peak is that of one call: nothing but the program's own arrays was alive.
            assert compiled <= r["peak_bytes"]
        assert record.load("flash_memory_gpu")["results"]["fits"]["bytes over N"]["worst"] < 0.1
