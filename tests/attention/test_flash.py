"""FlashAttention: laws on ref, golden vectors in ref and accel, bad inputs."""

import numpy as np
import pytest

import ref
from tests.attention import laws_flash
from tests.golden_runner import golden, run
from tests.laws import law_tests

globals().update(law_tests(laws_flash))


@golden("flash")
def test_flash_golden_ref(case):
    run(case, ref.flash)


def _qkv(L=4, S=5, D=3, Dv=2, H=None, Hkv=None):
    rng = np.random.default_rng(0)
    head = lambda n: () if n is None else (n,)
    return [rng.standard_normal(s) for s in ((*head(H), L, D), (*head(Hkv), S, D), (*head(Hkv), S, Dv))]


BAD = {
    "head size": ([*_qkv()[:1], np.zeros((5, 4)), np.zeros((5, 2))], {}, "axis D is 3 in q"),
    "keys": ([*_qkv()[:2], np.zeros((6, 2))], {}, "axis S is 5 in k"),
    "heads": (_qkv(H=3, Hkv=2), {}, "multiple of the Hkv=2"),
    "block": (_qkv(), {"block_q": 0}, "block_q and block_k must be at least 1"),
    "mask dtype": (_qkv(), {"mask": np.ones((4, 5))}, "mask must be boolean"),
    "mask shape": (_qkv(), {"mask": np.ones((3, 5), bool)}, "does not broadcast to"),
    "dropout_p": (_qkv(), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
    "dropout_mask": (_qkv(), {"dropout_p": 0.1}, "needs dropout_mask"),
    "length": (_qkv(), {"key_lengths": np.array(6)}, r"key_lengths must be in 0\.\.5"),
    "length dtype": (_qkv(), {"key_lengths": np.array(2.0)}, "key_lengths must be integers"),
}


@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_flash_ref_rejects_bad_input(name):
    args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ref.flash.flash_attention(*args, **options)


def test_flash_ref_rejects_unknown_order_and_small_sram():
    with pytest.raises(ValueError, match="order must be"):
        ref.flash.flash_attention(*_qkv(), order="sideways")
    with pytest.raises(ValueError, match="at least 4 d"):
        ref.flash.block_sizes(15, 4)
    with pytest.raises(ValueError, match="algorithm must be"):
        ref.flash.hbm_accesses(4, 4, 4, algorithm="fast")
