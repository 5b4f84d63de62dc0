"""MemoryFormer: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_memoryformer
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_memoryformer))


@golden("memoryformer")
def test_memoryformer_golden_ref(case):
    run(case, ref.memoryformer)


M = ref.memoryformer
RNG = np.random.default_rng(0)
X, T = np.ones((2, 6)), np.ones((3, 4, 5))
NET = M.init_memoryformer(RNG, vocab=7, dim=8, depth=1, tau=2)
BLOCK, H = NET.blocks[0], np.ones((1, 3, 8))
OTHER = BLOCK._replace(k=M.init_memory_layer(RNG, 8, 8, tau=4))
BAD = {
    "tau": (
        lambda: M.hash_chunks(X, tau=4),
        r"tau must be in 1\.\.20 and divide the width of x, got tau=4 for 6",
    ),
    "tau_zero": (lambda: M.hash_chunks(X, tau=0), "got tau=0"),
    "tau_large": (lambda: M.hash_chunks(np.ones(21), tau=21), "got tau=21"),
    "score": (lambda: M.hash_chunks(X, tau=2, score="l1"), "score must be one of l1_prob, prob"),
    "temperature": (lambda: M.hash_chunks(X, tau=2, temperature=0.0), "temperature must be positive"),
    "nan": (lambda: M.hash_chunks(X * np.nan, tau=2), "x must be finite"),
    "infinite": (lambda: M.memory_layer(X * np.inf, T), "x must be finite"),
    "rows": (lambda: M.memory_layer(X, np.ones((3, 6, 5))), r"2\^tau rows, 1 <= tau <= 20, got 6"),
    "one_row": (lambda: M.memory_layer(X, np.ones((3, 1, 5))), "got 1"),
    "tables": (lambda: M.memory_layer(X, np.ones((2, 4, 5))), r"read 4 features, but x has 6"),
    "tables_axes": (lambda: M.memory_layer(X, np.ones((4, 5))), "tables must have shape"),
    "grad": (lambda: M.memory_layer_vjp(X, T, np.ones((2, 4))), r"axis h is 4"),
    "grad_batch": (lambda: M.memory_layer_vjp(X, T, np.ones((3, 5))), "grad_out"),
    "codes": (lambda: M.look_up(np.zeros((2, 2), np.int32), np.ones((2, 2)), T), r"tables\.shape\[0\] = 3"),
    "init": (lambda: M.init_memory_layer(RNG, 6, 3, tau=4), "tau must be in 1..20 and divide d_in"),
    "heads": (lambda: M.memoryformer_block(H, BLOCK, num_heads=3), "num_heads must divide the width 8"),
    "shared": (lambda: M.memoryformer_block(H, OTHER, num_heads=2), "q, k and v must have one shape"),
    "fraction": (
        lambda: M.memoryformer_block(H, BLOCK, num_heads=2, rope_fraction=1.5),
        r"rope_fraction must be in \[0, 1\]",
    ),
    "token": (lambda: M.memoryformer_lm(np.array([7]), NET, num_heads=2), r"tokens must be in 0\.\.6"),
    "token_float": (lambda: M.memoryformer_lm(np.array([1.0]), NET, num_heads=2), "tokens must be integers"),
    "expansion": (
        lambda: M.init_memoryformer(RNG, vocab=7, dim=8, depth=1, tau=2, expansion="none"),
        "expansion must be one of wider_hash, extra_table",
    ),
    "weight": (lambda: M.expected_linear_table(np.ones((3, 7)), tau=2), "divide the width 7, got 2"),
    "cost": (lambda: M.memory_complexity(6, 3, tau=4), "tau must divide d_in"),
}

test_memoryformer_rejects_bad_input = rejects(BAD)
