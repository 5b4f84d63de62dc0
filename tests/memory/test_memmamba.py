"""MemMamba: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.memory import laws_memmamba

globals().update(law_tests(laws_memmamba))


@golden("memmamba")
def test_memmamba_golden_ref(case):
    run(case, ref.memmamba)


@graded("memmamba", only=("selective_scan", "mamba_block"))
def test_memmamba_golden_gradients_ref(case):
    run_backward(case, ref.memmamba, **({"chunk": 4} if case.meta["fn"] == "selective_scan" else {}))


M = ref.memmamba
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 4))
MODEL = M.init_memmamba(0, vocab=5, width=4, layers=3, state=2, summary=3, every=2)
BLOCK, NOTES, CROSS = MODEL.blocks[0], MODEL.blocks[0].notes, MODEL.blocks[2].cross
POOL = M.note_pool(X, NOTES, capacity=2)[1]
U, A, B = np.ones((2, 5, 3)), -np.ones((3, 4)), np.ones((2, 5, 4))
CACHE = M.init_memmamba_cache(MODEL, lead=(2,))
NONE = np.ones((4, 0))
TOKENS = np.zeros((2, 5), int)
BAD = {
    "scan_negative": (lambda: M.selective_scan(U, -U, A, B, B, delta_softplus=False), "must not be negative"),
    "width": (lambda: M.note_scores(X[..., :3], NOTES), r"w1.shape\[0\] = 4, but axis C is 3"),
    "summary": (
        lambda: M.note_pool(X, NOTES._replace(w_k=np.ones((2, 3)))),
        r"w_k.shape\[0\] = 2, but must be 3",
    ),
    "no_summary": (
        lambda: M.note_pool(X, M.NoteParams(*NOTES[:4], NONE, NONE, NONE[:0], NONE.T)),
        "Ds=0",
    ),
    "capacity": (lambda: M.note_pool(X, NOTES, capacity=0), "capacity=0"),
    "chunk": (lambda: M.note_pool(X, NOTES, chunk=0), "chunk=0"),
    "policy": (lambda: M.note_pool(X, NOTES, policy="lru"), "policy must be one of fifo, priority"),
    "pool": (lambda: M.note_pool(X, NOTES, capacity=3, pool0=POOL), r"summaries.shape\[1\] = 2"),
    "batch": (lambda: M.note_pool(X[:1], NOTES, capacity=2, pool0=POOL), "summaries.shape"),
    "sources": (lambda: M.cross_layer_attention(X, [POOL], CROSS), r"w_source.shape\[0\] = 2, but must be 1"),
    "source_pools": (
        lambda: M.cross_layer_attention(X, [POOL, POOL._replace(summaries=np.ones((2, 2, 2)))], CROSS),
        r"pools_1.shape\[2\] = 2",
    ),
    "missing": (lambda: M.memmamba_block(X, BLOCK, [], layer=1), "a pool of each of the layers below"),
    "every": (lambda: M.memmamba_block(X, BLOCK, [], layer=0, every=0), "every=0"),
    "cross": (
        lambda: M.memmamba_block(X, BLOCK, [POOL] * 2, layer=2, every=2),
        "params.cross must not be None in layer 2",
    ),
    "tokens": (lambda: M.memmamba_lm(TOKENS + 5, MODEL, every=2), r"tokens must be in 0\.\.4"),
    "float_tokens": (lambda: M.memmamba_lm(TOKENS + 0.5, MODEL, every=2), "got float64"),
    "dlogits": (lambda: M.memmamba_lm_vjp(TOKENS, MODEL, X, every=2), r"dlogits.shape\[2\] = 4"),
    "step": (lambda: M.memmamba_step(TOKENS[:, 0] + 5, CACHE, MODEL), r"tokens must be in 0\.\.4"),
    "step_batch": (lambda: M.memmamba_step(TOKENS[:1, 0], CACHE, MODEL), "summaries.shape"),
    "step_policy": (lambda: M.memmamba_step(TOKENS[:, 0], CACHE, MODEL, policy="lru"), "policy must be"),
    "lag": (lambda: M.influence(U, A, -1), "lag must not be negative"),
    "lags": (lambda: M.memory_information(0.1, A[0], B[0, 0], lags=[-1]), "lags must be a list of integers"),
    "growing": (lambda: M.memory_information(0.1, -A[0], B[0, 0], lags=[1]), "need delta > 0, a < 0"),
    "noise": (lambda: M.memory_capacity(0.1, A[0], B[0, 0], noise=-1.0), "noise >= 0"),
    "alike": (lambda: M.memory_capacity(0.1, A[0], B[0, 0]), "noise=0.0 is too small"),
    "one_sequence": (lambda: M.token_memory_fidelity(X[:1], X[:1], lags=[0]), "B >= 2 sequences"),
    "far_lag": (lambda: M.token_memory_fidelity(X, X, lags=[5]), "lags in 0..T-1"),
    "ridge": (lambda: M.token_memory_fidelity(X, X, lags=[0], ridge=0), "ridge must be positive"),
    "gap": (lambda: M.layer_memory_fidelity(X, gap=2), r"gap must be in 1\.\.1"),
    "sizes": (lambda: M.init_memmamba(0, vocab=5, width=0, layers=1), "must be at least 1"),
}  # fmt: skip

test_memmamba_rejects_bad_input = rejects(BAD)
