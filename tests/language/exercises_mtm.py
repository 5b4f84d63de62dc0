"""The exercises of the chapter on MTM: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:scores]
import numpy as np


def scores(q, s, memory):
    """The score [n] of every sentence s [n, d] for the claim q [d] and patterns
    memory [K, d] (equation 3). As it stands the patterns do not count, and the
    distance is not scaled.
    """
    return -np.linalg.norm(s - q, axis=1)
    # --8<-- [end:scores]


# --8<-- [start:solve_scores]
def solve_scores(q, s, memory):
    scale = lambda d: 1 - (d - d.min()) / (d.max() - d.min() + 1e-8)
    u = s - q
    to_pattern = np.linalg.norm(u[:, None] - memory, axis=2).min(axis=1)  # the residual, not the sentence
    return 0.6 * scale(np.linalg.norm(u, axis=1)) + 0.4 * scale(to_pattern)
    # --8<-- [end:solve_scores]


def check_scores(scores):
    """The library's scores, in the article's order."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.mtm import select_key_sentences

    point = st.tuples(st.integers(-3, 3), st.integers(-3, 3))

    @given(point, st.lists(point, min_size=1, max_size=4), st.lists(point, min_size=1, max_size=2))
    def the_definition(q, s, memory):
        q, s, memory = (np.array(x, float) for x in (q, s, memory))
        key, want = select_key_sentences(q, s, memory), np.zeros(len(s))
        want[key.order] = key.score
        got = scores(q, s, memory)
        # distances below 20; a range of distances that is not 0 is above 0.01
        assert np.allclose(got, want, rtol=0, atol=1e-9), (
            f"q = {q}, s = {s.tolist()}, memory = {memory.tolist()}: {want.round(3)}, not {np.round(got, 3)}"
        )

    the_definition()


# --8<-- [start:bigrams]
def bigrams(hypothesis, reference):
    """(precision, recall) of ROUGE-2, over the different pairs of neighbours in two
    lists of words; 0 for a text without a pair (equation 1). As it stands pairs
    that occur twice count twice.
    """
    pairs = lambda words: [(words[i], words[i + 1]) for i in range(len(words) - 1)]
    own, other = pairs(hypothesis), pairs(reference)
    same = sum(p in other for p in own)
    return same / max(len(own), 1), same / max(len(other), 1)
    # --8<-- [end:bigrams]


# --8<-- [start:solve_bigrams]
def solve_bigrams(hypothesis, reference):
    pairs = lambda words: {(words[i], words[i + 1]) for i in range(len(words) - 1)}
    own, other = pairs(hypothesis), pairs(reference)
    same = len(own & other)
    return same / max(len(own), 1), same / max(len(other), 1)
    # --8<-- [end:solve_bigrams]


def check_bigrams(bigrams):
    """The library's ROUGE-2."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.mtm import rouge2

    words = st.lists(st.sampled_from("ab"), max_size=6)

    @given(words, words)
    def the_counts(hypothesis, reference):
        want = tuple(rouge2([hypothesis], reference)[0].tolist())
        got = tuple(bigrams(hypothesis, reference))
        assert got == want, f"{''.join(hypothesis)!r} against {''.join(reference)!r}: {want}, not {got}"

    the_counts()


# --8<-- [start:learn]
import numpy as np


def learn(pattern, u, w, right):
    """The pattern [d] after an epoch: residuals u [n, d] of the sentences it chose,
    weights w [n], whether the prediction was right [n] (equation 8). As it stands
    it goes to the mean of the right ones.
    """
    return w[right] @ u[right] / w[right].sum()
    # --8<-- [end:learn]


# --8<-- [start:solve_learn]
def solve_learn(pattern, u, w, right):
    g = np.where(right, w, -w) @ (u - pattern)  # of g only the direction counts
    length = np.linalg.norm(g)
    return pattern if length == 0 else pattern + 0.3 * np.linalg.norm(pattern) * g / length
    # --8<-- [end:solve_learn]


def check_learn(learn):
    """The library's memory of one pattern."""
    from ref.language.mtm import update_memory

    rng = np.random.default_rng(0)
    for n in range(12):
        pattern, u, w = rng.standard_normal(3), rng.standard_normal((4, 3)), rng.random(4) / 2
        right = (rng.random(4) < 0.5) | (n == 0)
        w = w * (n != 11)  # nobody was sure of anything: the pattern stays
        right[0] = True
        want = update_memory(pattern[None], u, np.zeros(4, int), w, right)[0]
        with np.errstate(invalid="ignore"):
            got = learn(pattern.copy(), u, w, right)
        # sums of four products below 5, then divided by a length that is above 0.01 here
        assert np.allclose(got, want, rtol=0, atol=1e-10), (
            f"w = {w.round(2)}, right = {right}: {want.round(3)}, not {np.round(got, 3)}"
        )
