"""The exercises of the chapter on local learning: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:worst]
import numpy as np


def worst(costs, k):
    """The smallest possible largest sum, when the blocks' costs, in order, are cut into
    k modules. As it stands every module gets as many blocks.
    """
    return max(sum(part) for part in np.array_split(costs, k))
    # --8<-- [end:worst]


# --8<-- [start:solve_worst]
def solve_worst(costs, k):
    best = {(0, 0): 0}  # (blocks, modules) -> the least largest sum
    for end in range(1, len(costs) + 1):
        for m in range(1, min(k, end) + 1):
            cuts = range(m - 1, end)
            best[end, m] = min(max(best[c, m - 1], sum(costs[c:end])) for c in cuts if (c, m - 1) in best)
    return best[len(costs), k]
    # --8<-- [end:solve_worst]


def check_worst(worst):
    """The library's balanced cut."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.training.local_learning import split_blocks

    @given(st.lists(st.integers(1, 9), min_size=3, max_size=7), st.integers(1, 3))
    def no_cut_is_better(costs, k):
        ends = split_blocks(costs, k)
        want = max(sum(costs[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True))
        got = worst(list(costs), k)
        assert got == want, f"{costs} in {k} modules: the largest can be {want}, not {got}"

    no_cut_is_better()


# --8<-- [start:weight]
def weight(k, modules, first, last):
    """The weight of a loss in module k = 0 .. modules - 2: a line from first to last;
    first, if there is but one such module. As it stands the line ends one late.
    """
    return first + (last - first) * k / (modules - 1)
    # --8<-- [end:weight]


# --8<-- [start:solve_weight]
def solve_weight(k, modules, first, last):
    return first + (last - first) * k / max(modules - 2, 1)
    # --8<-- [end:solve_weight]


def check_weight(weight):
    """The ends are met exactly."""
    from ref.training.local_learning import lambda_schedule

    for modules in (2, 3, 6):
        for k in range(modules - 1):
            got, want = weight(k, modules, 1.0, 0.1), lambda_schedule(k, modules, first=1.0, last=0.1)
            assert abs(got - want) < 1e-12, (
                f"module {k} of {modules}: the weight is {want:.3f}, not {got:.3f}"
            )


# --8<-- [start:contrast]
def contrast(s, labels):
    """The loss (3) from similarities s [B, B], already divided by the temperature. As it
    stands a sample is compared with itself as well.
    """
    import numpy as np

    total = 0.0
    for i in range(len(s)):
        log_p = s[i] - np.log(np.exp(s[i]).sum())
        mates = [j for j in range(len(s)) if labels[j] == labels[i] and j != i]
        if mates:
            total -= log_p[mates].mean()
    return total / len(s)
    # --8<-- [end:contrast]


# --8<-- [start:solve_contrast]
def solve_contrast(s, labels):
    total = 0.0
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]
        log_p = s[i] - np.log(np.exp(s[i, others]).sum())
        mates = [j for j in others if labels[j] == labels[i]]
        if mates:
            total -= log_p[mates].mean()
    return total / len(s)
    # --8<-- [end:solve_contrast]


def check_contrast(contrast):
    """The library's loss; samples without a mate count as 0."""
    from ref.training.local_learning import supervised_contrastive

    rng = np.random.default_rng(0)
    for labels in ([0, 0, 1, 1, 1], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4]):
        z = rng.standard_normal((5, 3))
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        want = supervised_contrastive(z, np.array(labels), temperature=0.5)
        got = contrast(z @ z.T / 0.5, labels)
        assert abs(got - want) < 1e-12, f"labels {labels}: the loss is {want:.4f}, not {got:.4f}"
