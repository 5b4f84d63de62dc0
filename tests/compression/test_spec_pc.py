"""SpecPC: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.language.smollm2 import SmolLM2Config, tiny_smollm2
from tests.compression import laws_spec_pc
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_spec_pc))


@golden("spec_pc")
def test_spec_pc_golden_ref(case):
    run(case, ref.spec_pc)


P = ref.spec_pc
A, I = np.ones((3, 2, 4, 9)), np.ones(9)
MODEL, TOKENS, SIZES = tiny_smollm2()[0], np.arange(9), SmolLM2Config()
BAD = {
    "layer": (lambda: P.token_importance(A, start_layer=3), r"start_layer must be in 0\.\.2"),
    "reduction": (lambda: P.token_importance(A, start_layer=0, reduction="sum"), "reduction must be"),
    "decode": (lambda: P.token_importance(A, np.ones((1, 3, 2, 8)), start_layer=0), "at least S=9 columns"),
    "decode_heads": (lambda: P.token_importance(A, np.ones((1, 3, 1, 9)), start_layer=0), "must be 2"),
    "window": (lambda: P.select_prompt_tokens(I, capacity=9, window=10), r"window must be in 0\.\.9"),
    "capacity": (lambda: P.select_prompt_tokens(I, capacity=3, window=4), "capacity must hold the window"),
    "no_capacity": (lambda: P.select_prompt_tokens(I, capacity=0, window=0), "capacity must hold"),
    "kernel": (
        lambda: P.select_prompt_tokens(I, capacity=4, window=2, kernel=0),
        "kernel must be at least 1",
    ),
    "neighbors": (lambda: P.select_prompt_tokens(I, capacity=4, window=2, neighbors=-1), "not be negative"),
    "negative": (lambda: P.select_prompt_tokens(-I, capacity=4, window=2), "finite and not negative"),
    "nan": (lambda: P.select_prompt_tokens(I * np.nan, capacity=4, window=2), "finite and not negative"),
    "keep": (
        lambda: P.select_prompt_tokens(I, capacity=4, window=2, always_keep=np.array([9])),
        "always_keep must be indices",
    ),
    "keep_many": (
        lambda: P.select_prompt_tokens(I, capacity=4, window=2, always_keep=np.arange(3)),
        "3 tokens of always_keep",
    ),
    "lookahead": (
        lambda: P.spec_pc_compress(MODEL, TOKENS, P.SpecPCConfig(lookahead=0)),
        "lookahead must be at least 1",
    ),
    "layers": (
        lambda: P.spec_pc_compress(MODEL, TOKENS, P.SpecPCConfig(capacity=5, window=2)),
        r"start_layer must be in 0\.\.1",
    ),
    "never": (lambda: P.break_even_length(100, draft=SIZES, target=SIZES), "saves nothing up to"),
}

test_spec_pc_rejects_bad_input = rejects(BAD)
