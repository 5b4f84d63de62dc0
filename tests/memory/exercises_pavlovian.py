"""The exercises of the chapter on conditioning: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:learn]
import numpy as np


def learn(S, k, v, beta):
    """The memory S [dk, dv] after the pair (k, v) by the rule of Rescorla and
    Wagner, at rate beta. As it stands it is Hebb's.
    """
    return S + beta * np.outer(k, v)
    # --8<-- [end:learn]


# --8<-- [start:solve_learn]
def solve_learn(S, k, v, beta):
    surprise = v - S.T @ k
    return S + beta * np.outer(k, surprise)
    # --8<-- [end:solve_learn]


def check_learn(learn):
    """Pair by pair, the library's delta rule."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.memory.pavlovian import condition

    @given(st.integers(0, 99), st.integers(1, 4), st.sampled_from((0.3, 1.0)))
    def as_the_library_learns(seed, pairs, beta):
        k, v = np.random.default_rng(seed).standard_normal((2, pairs, 3))
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        S = np.zeros((3, 3))
        for key, value in zip(k, v, strict=True):
            S = learn(S, key, value, beta)
        rates = np.full(pairs, beta)
        want = condition(k, k, v, rule="delta", beta=rates, return_state=True)[1]
        # four steps of products of size 1 to 4
        assert np.allclose(S, want, rtol=0, atol=1e-12), (
            f"{pairs} pairs at rate {beta}: row 0 of the memory is {want[0].round(3)}, not {S[0].round(3)}"
        )

    as_the_library_learns()


# --8<-- [start:written]
import numpy as np


def written(K, V, beta):
    """What the delta rule writes in one chunk into an empty memory: U [T, dv],
    so that the memory is K^T U; K [T, dk], V [T, dv], beta [T]. Equation (4). As
    it stands a pair also corrects itself.
    """
    B = np.diag(beta)
    return np.linalg.solve(np.eye(len(K)) + B @ np.tril(K @ K.T), B @ V)
    # --8<-- [end:written]


# --8<-- [start:solve_written]
def solve_written(K, V, beta):
    B = np.diag(beta)
    return np.linalg.solve(np.eye(len(K)) + B @ np.tril(K @ K.T, -1), B @ V)
    # --8<-- [end:solve_written]


def check_written(written):
    """The memory of the library after the same pairs, one by one."""
    from ref.memory.pavlovian import condition

    for seed, T in ((0, 1), (1, 3), (2, 6)):
        rng = np.random.default_rng(seed)
        K, V, beta = rng.standard_normal((T, 4)), rng.standard_normal((T, 2)), rng.random(T)
        K /= np.linalg.norm(K, axis=1, keepdims=True)
        want = condition(K, K, V, rule="delta", beta=beta, chunk=1, return_state=True)[1]
        got = K.T @ written(K, V, beta)
        # a triangular system of six rows with entries below 1
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"{T} pairs: row 0 of the memory is {want[0].round(3)}, not {got[0].round(3)}"
        )


# --8<-- [start:all_right]
def all_right(p, depth, width, heads):
    """Chance that a stack makes no mistake: `width` retrievals in each of `depth`
    layers, each done by `heads` heads of which one success is enough; a head
    fails with chance p. As it stands every head must succeed.
    """
    return (1 - p) ** (depth * width * heads)
    # --8<-- [end:all_right]


# --8<-- [start:solve_all_right]
def solve_all_right(p, depth, width, heads):
    all_fail = p**heads
    return (1 - all_fail) ** (depth * width)
    # --8<-- [end:solve_all_right]


def check_all_right(all_right):
    """The library's closed form, which counted failures confirm."""
    from ref.memory.pavlovian import reliability

    for p, depth, width, heads in ((0.1, 1, 1, 1), (0.1, 4, 4, 2), (0.5, 2, 1, 3), (0.02, 12, 16, 2)):
        want = reliability(p, depth=depth, width=width, heads=heads)
        got = all_right(p, depth, width, heads)
        assert abs(got - want) < 1e-12, (
            f"p = {p}, depth {depth}, width {width}, {heads} heads: {want:.4f}, not {got:.4f}"
        )
