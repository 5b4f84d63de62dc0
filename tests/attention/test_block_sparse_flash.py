"""Block-sparse FlashAttention: laws on ref, golden vectors, bad inputs; accel and its kernels; costs."""

import numpy as np
import pytest

import ref
from tests.attention import laws_block_sparse_flash
from tests.golden_runner import golden, run
from tests.laws import law_tests

globals().update(law_tests(laws_block_sparse_flash))


@golden("block_sparse_flash")
def test_block_sparse_flash_golden_ref(case):
    run(case, ref.block_sparse_flash)


R = ref.block_sparse_flash
Q, K, ONES = np.ones((4, 10, 8)), np.ones((2, 12, 8)), np.ones((3, 3), bool)
SIZES = {"block_q": 4, "block_k": 4}
EXPAND = {**SIZES, "num_queries": 10, "num_keys": 12}
CALLS = {
    "tiles": ((Q, K, K, ONES[:2]), {}, r"block_mask must end in \[3, 3\] tiles"),
    "dtype": ((Q, K, K, ONES.astype(float)), {}, "block_mask must be boolean"),
    "list": ((Q, K, K, [[True]]), {}, "block_mask must be boolean"),
    "block_q": ((Q, K, K, ONES), {"block_q": 0}, "block_q and block_k must be at least 1"),
    "block_k": ((Q, K, K, ONES), {"block_k": -1}, "block_q and block_k must be at least 1"),
    "mask_heads": ((Q, K, K, np.ones((3, 3, 3), bool)), {}, r"block_mask.shape\[0\] = 3, but q has H=4"),
    "mask_batch": ((Q, K, K, np.ones((1, 4, 3, 3), bool)), {}, r"must be \[Tr, Tc\] or \[H, Tr, Tc\]"),
    "no_head": ((Q[0], K[0], K[0], np.ones((1, 3, 3), bool)), {}, r"must be \[Tr, Tc\]"),
    "heads": ((Q[:3], K, K, ONES), {}, "not a multiple of the Hkv=2"),
    "width": ((Q[..., :7], K, K, ONES), {}, "axis D is 7"),
    "values": ((Q, K, K[:, :11], ONES), {}, "axis S is 12"),
    "mask": ((Q, K, K, ONES), {"mask": np.ones((10, 12))}, "mask must be boolean"),
    "mask_shape": ((Q, K, K, ONES), {"mask": np.ones((9, 12), bool)}, "does not broadcast"),
}
BUILDERS = {
    "num_global": (lambda: R.butterfly_block_mask(4, num_global=5), r"num_global must be in 0\.\.4"),
    "max_stride": (lambda: R.butterfly_block_mask(4, max_stride=0), "max_stride must be at least 1"),
    "num_blocks": (lambda: R.butterfly_block_mask(0), "num_blocks must be at least 1"),
    "width": (lambda: R.local_block_mask(4, 0), "width must be at least 1"),
    "stride": (lambda: R.strided_block_mask(4, 0), "stride must be at least 1"),
    "causal": (lambda: R.causal_block_mask(0, 3), "num_q_blocks must be at least 1"),
    "density": (lambda: R.random_block_mask(np.ones((2, 2)), 1.1), r"density must be in \[0, 1\]"),
    "nan_density": (lambda: R.random_block_mask(np.ones((2, 2)), np.nan), r"density must be in \[0, 1\]"),
    "uniforms": (lambda: R.random_block_mask(np.ones(4), 0.5), "uniforms must have shape"),
    "keep": (lambda: R.block_mask_from_scores(np.ones((2, 3)), 4), r"keep must be in 1\.\.3"),
    "expand": (lambda: R.expand_block_mask(ONES[:2], **EXPAND), "block_mask must end in"),
    "layout": (lambda: R.to_block_layout(ONES.astype(int), **EXPAND), "block_mask must be boolean"),
    "share": (lambda: R.density(np.ones(3, bool)), "block_mask must be boolean"),
    "traffic": (lambda: R.hbm_accesses_block_sparse(ONES, 10, 12, 0, **SIZES), "must be at least 1"),
    "traffic_mask": (lambda: R.hbm_accesses_block_sparse(ONES, 10, 13, 4, **SIZES), "must end in"),
}


@pytest.mark.parametrize("name", CALLS, ids=lambda n: f"block_sparse_flash_{n}")
def test_block_sparse_flash_rejects_bad_calls(name):
    args, options, message = CALLS[name]
    options = {**SIZES, **options}
    with pytest.raises(ValueError, match=message):
        R.block_sparse_attention(*args, **options)
    q, k, v, block_mask = args
    do, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.zeros(q.shape[:-1])
    with pytest.raises(ValueError, match=message):
        R.block_sparse_attention_bwd(do, q, k, v, do, lse, block_mask, **options)


@pytest.mark.parametrize("name", BUILDERS, ids=lambda n: f"block_sparse_flash_{n}")
def test_block_sparse_flash_rejects_bad_masks(name):
    call, message = BUILDERS[name]
    with pytest.raises(ValueError, match=message):
        call()
