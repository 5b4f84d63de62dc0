"""The exercises of the chapter on SpecPC: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:scores]
import numpy as np


def scores(A, start):
    """Importance of every token [S] from A [layers, heads, w, S]: the largest
    attention over layers from start on, heads and queries, w >= 2. As it stands
    the oldest query counts as much as the last.
    """
    return A[start:].max(axis=(0, 1, 2))
    # --8<-- [end:scores]


# --8<-- [start:solve_scores]
def solve_scores(A, start):
    weight = np.linspace(0, 1, A.shape[2])[:, None]  # the oldest query weighs nothing
    return (weight * A[start:]).max(axis=(0, 1, 2))
    # --8<-- [end:solve_scores]


def check_scores(scores):
    """The library's importance."""
    from ref.compression.spec_pc import token_importance

    A = np.random.default_rng(0).random((3, 2, 5, 9))
    for start in (0, 2):
        want = token_importance(A, start_layer=start)
        got = np.asarray(scores(A, start))
        assert got.shape == want.shape, f"the result has shape {got.shape}, not {want.shape}"
        worst = int(np.abs(got - want).argmax())
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"{start = }: token {worst} scores {want[worst]:.3f}, not {got[worst]:.3f}"
        )


# --8<-- [start:choose]
def choose(best, S, capacity, window, neighbors):
    """The capacity tokens to keep, ascending, from the indices best in falling order
    of score: first the last window tokens, then each of the best with neighbors
    tokens around it (an odd number), nearest first, the left one before the right.
    As it stands the best come alone.
    """
    order = list(range(S - window, S)) + [int(i) for i in best]
    return sorted(dict.fromkeys(order[:capacity]))
    # --8<-- [end:choose]


# --8<-- [start:solve_choose]
def solve_choose(best, S, capacity, window, neighbors):
    order = list(range(S - window, S))
    for i in best:
        order.append(int(i))
        for far in range(1, neighbors // 2 + 1):
            order += [int(i) - far, int(i) + far]
    order = [i for i in dict.fromkeys(order) if 0 <= i < S]  # no repeats, nothing outside
    return sorted(order[:capacity])
    # --8<-- [end:solve_choose]


def check_choose(choose):
    """The library's selection without pooling."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.compression.spec_pc import select_prompt_tokens

    @given(st.permutations(range(12)), st.integers(4, 10), st.sampled_from((1, 3, 5)))
    def the_list_is_followed(ranks, capacity, neighbors):
        importance = np.array(ranks, float)
        best = np.argsort(-importance)
        options = {"capacity": capacity, "window": 3, "neighbors": neighbors}
        want = select_prompt_tokens(importance, pool=None, **options).tolist()
        got = [int(i) for i in choose(best, 12, capacity, 3, neighbors)]
        assert got == want, (
            f"best first {best.tolist()}, {capacity = }, {neighbors = }: keep {want}, not {got}"
        )

    the_list_is_followed()


# --8<-- [start:pays_from]
def pays_from(capacity, draft, target):
    """The least whole prompt length S at which draft * S + target * capacity is less
    than target * S: costs a token of two models, draft < target.
    """
    return capacity + 1
    # --8<-- [end:pays_from]


# --8<-- [start:solve_pays_from]
def solve_pays_from(capacity, draft, target):
    return target * capacity // (target - draft) + 1
    # --8<-- [end:solve_pays_from]


def check_pays_from(pays_from):
    """It pays at that length, and not at one token less; costs are whole numbers."""
    for capacity, draft, target in ((2048, 1, 8), (100, 3, 4), (7, 2, 9)):
        S = pays_from(capacity, draft, target)
        pays = lambda n, c=capacity, d=draft, t=target: d * n + t * c < t * n
        assert pays(S), f"{capacity = }, costs {draft} and {target}: at {S} tokens nothing is saved yet"
        assert not pays(S - 1), f"{capacity = }, costs {draft} and {target}: {S - 1} tokens would do"
