"""The exercises of the chapter on verbatim memory: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:spoken]
import numpy as np


def spoken(surprisal, word_codes):
    """The surprisal of every word, in order: of pieces [T] whose codes are the
    number of their word, or -1 for a mark, which is no word (equation 1). As it
    stands the pieces of a word are averaged, and the marks are a word.
    """
    return np.array([surprisal[word_codes == w].mean() for w in np.unique(word_codes)])
    # --8<-- [end:spoken]


# --8<-- [start:solve_spoken]
def solve_spoken(surprisal, word_codes):
    words = [w for w in np.unique(word_codes) if w > 0]
    return np.array([surprisal[word_codes == w].sum() for w in words])  # -log of a product of chances
    # --8<-- [end:solve_spoken]


def check_spoken(spoken):
    """The library's merging."""
    from ref.language.verbatim_memory import merge_subwords

    rng = np.random.default_rng(0)
    for codes in ([1, 2], [1, 1, 2], [1, -1, 2, 2, -1], [1, -1, 1, 2, 3, 3, 3, -1]):
        codes, s = np.array(codes), rng.integers(1, 9, len(codes)).astype(float)
        total, _, word = merge_subwords(s, 0 * codes, codes)
        got, want = spoken(s, codes), total[word > 0]
        assert len(got) == len(want), f"codes {codes} are {len(want)} words, not {len(got)}"
        assert np.array_equal(got, want), f"pieces {s} of words {codes}: {want}, not {np.round(got, 2)}"


# --8<-- [start:repeated]
import numpy as np


def repeated(first, second):
    """The repeat surprisal of a cell in percent: surprisals [texts, nouns] of both
    lists, their first nouns left out, the median over the texts (equation 2). As
    it stands it is the ratio of medians, of all nouns.
    """
    return 100 * np.median(second) / np.median(first)
    # --8<-- [end:repeated]


# --8<-- [start:solve_repeated]
def solve_repeated(first, second):
    x1, x2 = first[:, 1:].mean(axis=1), second[:, 1:].mean(axis=1)
    return np.median(100 * x2 / x1)
    # --8<-- [end:solve_repeated]


def check_repeated(repeated):
    """The library's ratio and median."""
    from ref.language.verbatim_memory import median_ci, repeat_surprisal

    rng = np.random.default_rng(0)
    for texts, nouns in ((1, 2), (4, 3), (5, 5)):
        first, second = 1 + rng.exponential(size=(2, texts, nouns))
        want = median_ci(repeat_surprisal(first, second)[0], resamples=1)[0]
        got = repeated(first, second)
        # means of five numbers and a quotient, of size 100
        assert abs(got - want) < 1e-10, f"{texts} texts, lists of {nouns}: {want:.2f} %, not {got:.2f} %"


# --8<-- [start:partners]
import numpy as np


def partners(pools):
    """For every list i, of pool pools[i], the place of another list to be its second:
    of another pool, and every list once. All pools have equally many lists, and
    there are two pools or more. As it stands the order is reversed.
    """
    return np.arange(len(pools))[::-1]
    # --8<-- [end:partners]


# --8<-- [start:solve_partners]
def solve_partners(pools):
    order = np.argsort(pools, kind="stable")  # pool by pool
    size = np.sum(pools == pools[0])
    out = np.empty(len(pools), int)
    out[order] = np.roll(order, size)  # the lists of the pool before
    return out
    # --8<-- [end:solve_partners]


def check_partners(partners):
    """What a pairing must be."""
    rng = np.random.default_rng(0)
    for groups, size in ((3, 1), (2, 3), (4, 2), (3, 4)):
        pools = rng.permutation(np.repeat(np.arange(groups), size))
        got = np.asarray(partners(pools.copy()))
        assert sorted(got.tolist()) == list(range(len(pools))), f"pools {pools}: {got} is not every list once"
        same = np.flatnonzero(pools[got] == pools)
        assert not same.size, f"pools {pools}: list {same[:1]} is followed by one of its own pool"
