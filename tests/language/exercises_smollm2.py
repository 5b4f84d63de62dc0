"""The exercises of the chapter on SmolLM2: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:tokens_a_second]
def tokens_a_second(bandwidth, context):
    """Tokens a second that a memory of this bandwidth allows after `context`
    tokens: 96,576,768 bytes of weights are read each step, and 46,080 bytes of
    keys and values for every earlier token; the new token's are written. As it
    stands only weights are moved.
    """
    return bandwidth / 96_576_768
    # --8<-- [end:tokens_a_second]


# --8<-- [start:solve_tokens_a_second]
def solve_tokens_a_second(bandwidth, context):
    return bandwidth / (96_576_768 + 46_080 * (context + 1))
    # --8<-- [end:solve_tokens_a_second]


def check_tokens_a_second(tokens_a_second):
    """The library's bytes of a step, whose embedding row of 612 bytes nobody needs to count."""
    from ref.language.smollm2 import SmolLM2Config, llama_costs

    for context in (0, 1000, 8191):
        costs = llama_costs(SmolLM2Config(), context=context, n_in=1, kind="Q4_1", head_kind="Q8_0")
        want, got = 50e9 / costs["bytes"], tokens_a_second(50e9, context)
        assert abs(got / want - 1) < 1e-5, f"at {context = } it is {want:.1f} tokens a second, not {got:.1f}"


# --8<-- [start:rotate]
import numpy as np


def rotate(x, position, base=100_000.0):
    """Rotary embedding of one head x [D] at a position, in pairs (i, i + D/2):
    pair i turns by position / base^(2i/D). As it stands neighbours are paired,
    as in another layout of the weights.
    """
    D = len(x)
    angle = position * base ** (-2 * np.arange(D // 2) / D)
    a, b = x[0::2], x[1::2]
    out = np.empty(D)
    out[0::2], out[1::2] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out
    # --8<-- [end:rotate]


# --8<-- [start:solve_rotate]
def solve_rotate(x, position, base=100_000.0):
    D = len(x)
    angle = position * base ** (-2 * np.arange(D // 2) / D)
    a, b = x[: D // 2], x[D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])
    # --8<-- [end:solve_rotate]


def check_rotate(rotate):
    """Products of a rotated query and key depend on their distance alone, and pairs are halves."""
    x, y = np.random.default_rng(0).standard_normal((2, 8))
    near = lambda a, b: np.abs(np.asarray(a) - b).max() < 1e-12
    assert near(rotate(x, 0), x), "at position 0 nothing turns"
    assert near(rotate(x, 7) @ rotate(y, 5), rotate(x, 2) @ y), "products depend on more than the distance"
    one = np.zeros(8)
    one[0] = 1.0
    want = np.zeros(8)
    want[[0, 4]] = np.cos(1.0), np.sin(1.0)
    assert near(rotate(one, 1), want), (
        f"feature 0 of 8 turns towards feature 4: {want.round(2)}, not {rotate(one, 1).round(2)}"
    )
