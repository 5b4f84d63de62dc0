"""SpecKV: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_spec_kv
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_spec_kv))


@golden("spec_kv")
def test_spec_kv_golden_ref(case):
    run(case, ref.spec_kv)


S = ref.spec_kv
Q, K = np.ones((4, 10, 6)), np.ones((2, 10, 6))
BAD = {
    "kernel": (lambda: S.kv_importance(Q, K, window=3, kernel=4), "kernel must be odd"),
    "window": (lambda: S.kv_importance(Q, K, window=10), r"window must be in 1\.\.9"),
    "reduction": (lambda: S.kv_importance(Q, K, window=3, reduction="sum"), "reduction must be"),
    "pool": (lambda: S.kv_importance(Q, K, window=3, pool="min"), "pool must be"),
    "heads": (lambda: S.kv_importance(Q[:3], K, window=3), "not a multiple of the Hkv=2"),
    "capacity": (lambda: S.compress_kv(Q, K, K, window=3, capacity=3), "capacity must exceed the window"),
    "values": (lambda: S.compress_kv(Q, K, K[:, :9], window=3, capacity=5), "axis L"),
    "ahead": (lambda: S.spec_kv_select(Q, K, K, prompt_len=8, lookahead=3), "must fit the 10 tokens"),
    "no_prompt": (lambda: S.spec_kv_select(Q, K, K, prompt_len=0, lookahead=3), "prompt_len >= 1"),
    "narrow": (
        lambda: S.spec_kv_select(Q, K, K, prompt_len=8, lookahead=1, window=5, capacity=5),
        "capacity must exceed the window",
    ),
    "sinks": (lambda: S.streaming_select(K, K, sinks=5, capacity=4), "0 <= sinks <= capacity"),
    "h2o": (lambda: S.h2o_select(Q, K, K, window=4, capacity=4), "capacity must exceed the window"),
    "columns": (
        lambda: S.vertical_band_mask(np.array([10]), length=10, band=2),
        r"indices must be in 0\.\.9",
    ),
    "band": (lambda: S.vertical_band_mask(np.array([1]), length=10, band=0), "band must be at least 1"),
}


def test_spec_kv_empty_batch_keeps_its_shapes():
    q, k = np.ones((0, 4, 10, 6)), np.ones((0, 2, 10, 6))
    assert S.kv_importance(q, k, window=3).shape == (0, 2, 7)
    options = {"window": 3, "capacity": 5}
    cut = S.spec_kv_select(q, k, k, prompt_len=8, lookahead=2, **options)
    for cache in (cut, S.snap_kv_select(q, k, k, **options), S.h2o_select(q, k, k, **options)):
        assert cache.k.shape == (0, 2, 5, 6)
        assert S.attend_kept(q[:, :, :1], cache).shape == (0, 4, 1, 6)


test_spec_kv_rejects_bad_input = rejects(BAD)
