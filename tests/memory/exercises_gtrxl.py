"""The exercises of the chapter on GTrXL: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:gate]
import numpy as np


def gate(x, y, p):
    """The GRU gate of a stream x and a sub-module's output y, both [D]; p has the
    maps w_r, u_r, w_z, u_z, w_g, u_g [D, D] (used as y @ w, x @ u) and the bias b
    [D]. As it stands a large bias opens it.
    """
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    r = sigmoid(y @ p.w_r + x @ p.u_r)
    z = sigmoid(y @ p.w_z + x @ p.u_z + p.b)
    return (1 - z) * x + z * np.tanh(y @ p.w_g + (r * x) @ p.u_g)
    # --8<-- [end:gate]


# --8<-- [start:solve_gate]
def solve_gate(x, y, p):
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    r = sigmoid(y @ p.w_r + x @ p.u_r)
    z = sigmoid(y @ p.w_z + x @ p.u_z - p.b)
    return (1 - z) * x + z * np.tanh(y @ p.w_g + (r * x) @ p.u_g)
    # --8<-- [end:solve_gate]


def check_gate(gate):
    """The library's gate, and x itself where the bias is large."""
    from ref.memory.gtrxl import gate as want_of
    from ref.memory.gtrxl import init_gate

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4))
    for bias in (0.0, 2.0, 30.0):
        p = init_gate(1, 4, kind="gru", bias=bias)
        got, want = gate(x, y, p), want_of(x, y, p, kind="gru")
        # sums of eight products of size 1, then bounded functions
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"bias {bias:g}: x = {x.round(2)} becomes {np.round(want, 2)}, not {np.round(got, 2)}"
        )


# --8<-- [start:shift]
import numpy as np


def shift(scores):
    """Scores by distance [T, M + T], column c for distance M + T - 1 - c, as
    scores by key [T, M + T]: row i, column j shall be that of distance M + i - j,
    as far as it is not negative. Pad a column of zeros, reshape, drop a row. As
    it stands the wrong side is padded.
    """
    T, S = scores.shape
    padded = np.concatenate([scores, np.zeros((T, 1))], axis=1)
    return padded.reshape(S + 1, T)[1:].reshape(T, S)
    # --8<-- [end:shift]


# --8<-- [start:solve_shift]
def solve_shift(scores):
    T, S = scores.shape
    padded = np.concatenate([np.zeros((T, 1)), scores], axis=1)
    return padded.reshape(S + 1, T)[1:].reshape(T, S)
    # --8<-- [end:solve_shift]


def check_shift(shift):
    """Numbers that tell their distance come to stand under their keys."""
    for T, M in ((1, 2), (3, 0), (3, 4), (4, 1)):
        distance = np.tile(np.arange(M + T - 1.0, -1, -1), (T, 1))
        out = shift(distance)
        for i in range(T):
            for j in range(M + i + 1):
                assert out[i, j] == M + i - j, (
                    f"T = {T}, M = {M}: query {i} and key {j} are {M + i - j} apart, not {out[i, j]:g}"
                )


# --8<-- [start:psi]
import numpy as np


def psi(advantages, eta):
    """V-MPO's weights of n steps: softmax of advantages / eta over the better
    half, ceil(n / 2) of them; 0 for the rest. As it stands all steps count.
    """
    p = np.exp((advantages - advantages.max()) / eta)
    return p / p.sum()
    # --8<-- [end:psi]


# --8<-- [start:solve_psi]
def solve_psi(advantages, eta):
    best = np.argsort(-advantages, kind="stable")[: -(-len(advantages) // 2)]
    p = np.zeros(len(advantages))
    p[best] = np.exp((advantages[best] - advantages.max()) / eta)
    return p / p.sum()
    # --8<-- [end:solve_psi]


def check_psi(psi):
    """The weights in the library's loss; of equal advantages the first."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.memory.gtrxl import vmpo_loss

    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=6), st.sampled_from((0.5, 1.0, 9.0)))
    def as_in_the_loss(advantages, eta):
        A = np.array(advantages, float)
        n, logits = len(A), np.zeros((1, len(A), 2))
        want = vmpo_loss(logits, logits, np.zeros((1, n)), np.zeros((1, n), int), A[None], eta, 1.0)[1].psi[0]
        got = psi(A, eta)
        # six exponentials and their sum, a few roundings each
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"advantages {advantages}, {eta = }: the weights are {np.round(want, 3)}, not {np.round(got, 3)}"
        )

    as_in_the_loss()
