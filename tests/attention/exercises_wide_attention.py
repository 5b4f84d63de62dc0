"""The exercises of the chapter on wide attention: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:weights]
def weights(layers, heads, dim, head_dim, mlp_dim):
    """Numbers in the maps of attention and of the MLPs, without biases. As it
    stands every map of attention is square.
    """
    return layers * (4 * dim * dim + 2 * dim * mlp_dim)
    # --8<-- [end:weights]


# --8<-- [start:solve_weights]
def solve_weights(layers, heads, dim, head_dim, mlp_dim):
    return layers * (4 * dim * heads * head_dim + 2 * dim * mlp_dim)
    # --8<-- [end:solve_weights]


def check_weights(weights):
    """The numbers in the library's parameters."""
    from ref.attention.wide_attention import WideConfig, count_params

    for sizes in ((4, 4, 256, 64, 1024), (1, 16, 256, 64, 1024), (2, 3, 8, 5, 7)):
        want, got = count_params(WideConfig(*sizes)), weights(*sizes)
        assert got == want, f"layers, heads, widths {sizes}: {want:,} weights, not {got:,}"


# --8<-- [start:share]
import numpy as np


def share(o, w_o, n, heads):
    """What head n adds to the layer's output: o [T, heads * D] holds the heads'
    outputs side by side, w_o [heads * D, d] maps them back. As it stands every
    head-th channel is taken for a head.
    """
    return o[:, n::heads] @ w_o[n::heads]
    # --8<-- [end:share]


# --8<-- [start:solve_share]
def solve_share(o, w_o, n, heads):
    D = o.shape[1] // heads
    own = slice(n * D, (n + 1) * D)
    return o[:, own] @ w_o[own]
    # --8<-- [end:solve_share]


def check_share(share):
    """A layer whose other heads are silent gives exactly that share."""
    from ref.attention.wide_attention import attend, multi_head_attention
    from ref.blocks.attention import join_heads, split_heads
    from ref.blocks.transformer import AttentionParams

    rng = np.random.default_rng(0)
    for heads, D in ((1, 3), (2, 2), (3, 4)):
        x, w = rng.standard_normal((5, 4)), rng.standard_normal((3, 4, heads * D))
        w_o = rng.standard_normal((heads * D, 4))
        o = join_heads(attend(*(split_heads(x @ m, heads) for m in w)))
        for n in range(heads):
            alone = w_o * (np.arange(heads * D) // D == n)[:, None]
            want = multi_head_attention(x, AttentionParams(*w, alone), heads=heads, head_dim=D)
            got = share(o, w_o, n, heads)
            # a dozen products of size 1 to 10, a few roundings each
            assert np.allclose(got, want, rtol=0, atol=1e-11), (
                f"head {n} of {heads} adds {want[0].round(2)} to the first token, not {got[0].round(2)}"
            )


# --8<-- [start:linear]
def linear(fq, fk, v):
    """Attention from features fq, fk [T, m] and values v [T, D], normalised by
    row: weights fq fk^T over their sums. Right as it stands, but it multiplies
    T * T * (m + D) numbers, and 2 * T * m * D + T * m would do.
    """
    weights = fq @ fk.T
    return weights @ v / weights.sum(axis=1, keepdims=True)
    # --8<-- [end:linear]


# --8<-- [start:solve_linear]
def solve_linear(fq, fk, v):
    return fq @ (fk.T @ v) / (fq @ fk.sum(axis=0)[:, None])
    # --8<-- [end:solve_linear]


def check_linear(linear):
    """The same numbers, from few products."""
    from ref.counting import Tally, count

    rng = np.random.default_rng(0)
    fq, fk, v = rng.random((64, 3)), rng.random((64, 3)), rng.standard_normal((64, 2))
    want = (fq @ fk.T) @ v / (fq @ fk.T).sum(axis=1, keepdims=True)
    tally = Tally()
    got = np.asarray(linear(*count(tally, fq, fk, v)))
    # sums of 64 numbers below 3, a rounding each
    assert np.allclose(got, want, rtol=0, atol=1e-12), f"row 0 is {got[0]}, not {want[0]}"
    limit = 2 * 64 * 3 * 2 + 64 * 3
    assert tally.macs <= limit, f"{tally.macs:,} multiply-accumulates; {limit} are enough"
