"""The exercises of the chapter on DependencyViT: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:send]
import numpy as np


def send(scores, message):
    """Who sends how much to whom, [N receivers, N senders], from scores [N senders, N
    receivers] of one head and messages [N]: each sender divides its message among all
    receivers. As it stands each receiver divides what it takes among all senders.
    """
    p = np.exp(scores - scores.max(axis=0))
    return (p / p.sum(axis=0)).T * message
    # --8<-- [end:send]


# --8<-- [start:solve_send]
def solve_send(scores, message):
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).T * message
    # --8<-- [end:solve_send]


def check_send(send):
    """The library's mask; its columns sum to the messages."""
    from ref.vision.dependencyvit import reversed_attention

    rng = np.random.default_rng(0)
    for n in (2, 5):
        q, k = rng.standard_normal((2, 1, 1, n, 3))
        message = rng.uniform(0.1, 1, n)
        _, want = reversed_attention(q, k, k, message=message[None], return_mask=True)
        got = np.asarray(send((q @ np.swapaxes(k, -1, -2))[0, 0] / np.sqrt(3), message))
        assert got.shape == (n, n), f"the mask has shape {got.shape}, not {(n, n)}"
        sums = got.sum(axis=0)
        assert np.allclose(sums, message, rtol=0, atol=1e-12), (
            f"the senders' messages are {message.round(3)}, but {sums.round(3)} is sent"
        )
        assert np.allclose(got, want[0], rtol=0, atol=1e-12), "what each receiver gets is wrong"


# --8<-- [start:start_at]
def start_at(layers, share):
    """The bias b of every controller, so that after so many layers a token still sends
    this share: sigmoid(b)^layers = share. As it stands controllers start at a half.
    """
    return 0.0
    # --8<-- [end:start_at]


# --8<-- [start:solve_start_at]
def solve_start_at(layers, share):
    import math

    m = share ** (1 / layers)  # what one layer leaves
    return math.log(m / (1 - m))
    # --8<-- [end:solve_start_at]


def check_start_at(start_at):
    """The product over the layers."""
    for layers, share in ((12, 0.8), (12, 0.5), (24, 0.9)):
        left = (1 / (1 + np.exp(-start_at(layers, share)))) ** layers
        assert abs(left - share) < 1e-9, (
            f"after {layers} layers {left:.2g} is left of the message, not {share}"
        )


# --8<-- [start:depth]
def depth(parents):
    """The longest way from a token to the root, in steps; parents holds each token's
    parent, -1 for the root. As it stands the root's children are counted only.
    """
    return 1 if len(parents) > 1 else 0
    # --8<-- [end:depth]


# --8<-- [start:solve_depth]
def solve_depth(parents):
    longest = 0
    for token in range(len(parents)):
        steps = 0
        while parents[token] >= 0:
            token, steps = parents[token], steps + 1
        longest = max(longest, steps)
    return longest
    # --8<-- [end:solve_depth]


def check_depth(depth):
    """The library's depth of drawn trees."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.vision.dependencyvit import tree_depth

    @given(st.lists(st.integers(0, 99), max_size=7))
    def every_way_ends_at_the_root(draws):
        # token i + 1 hangs on one of the tokens before it
        parents = [-1] + [d % (i + 1) for i, d in enumerate(draws)]
        got, want = depth(list(parents)), tree_depth(np.array(parents))
        assert got == want, f"parents {parents}: the depth is {want}, not {got}"

    every_way_ends_at_the_root()
