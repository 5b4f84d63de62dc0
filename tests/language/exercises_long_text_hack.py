"""The exercises of the chapter on thinning long texts: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:thinner]
def thinner(tokens, stop):
    """The list of tokens without words of the set stop, which is lower case, and
    without words that came before, however they are spelled. Marks, tokens that
    begin with no letter, digit or underscore, all stay. As it stands repeated marks
    go, and capital letters make another word.
    """
    return [t for t in dict.fromkeys(tokens) if t not in stop]
    # --8<-- [end:thinner]


# --8<-- [start:solve_thinner]
def solve_thinner(tokens, stop):
    kept, seen = [], set()
    for token in tokens:
        key, mark = token.casefold(), not (token[0].isalnum() or token[0] == "_")
        if mark or (key not in stop and key not in seen):
            kept.append(token)
            seen.add(key)
    return kept
    # --8<-- [end:solve_thinner]


def check_thinner(thinner):
    """The library's hacks."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.long_text_hack import thin

    token = st.sampled_from(("the", "The", "cat", "Cat", "sat", ",", "."))

    @given(st.lists(token, max_size=6))
    def the_rules(tokens):
        want = thin(" ".join(tokens), stopwords={"the"}, drop_recurring=True).split()
        got = thinner(list(tokens), {"the"})
        assert list(got) == want, f"{' '.join(tokens)!r} becomes {' '.join(want)!r}, not {' '.join(got)!r}"

    the_rules()


# --8<-- [start:reach]
import numpy as np


def reach(word, kept, room):
    """The coverage of a thinned text, a piece a token (equation 3): word [n] True
    where a token is a word, kept [n] True where it stays, room for so many. As it
    stands it is the share of words that stay.
    """
    return (word & kept).sum() / max(word.sum(), 1)
    # --8<-- [end:reach]


# --8<-- [start:solve_reach]
def solve_reach(word, kept, room):
    stays = np.flatnonzero(kept)
    if len(stays) <= room or not word.any():
        return 1.0  # nothing is cut
    return word[: stays[room - 1] + 1].sum() / word.sum()
    # --8<-- [end:solve_reach]


def check_reach(reach):
    """The library's coverage of a text of different words and commas."""
    from ref.language.long_text_hack import coverage, split_tokens

    rng = np.random.default_rng(0)
    for n in (1, 4, 8, 12, 12, 12):
        word, kept, room = rng.random(n) < 0.7, rng.random(n) < 0.6, int(rng.integers(1, 6))
        kept |= ~word  # marks stay: which of several commas it is could not be told
        tokens = [f"w{i}" if w else "," for i, w in enumerate(word)]
        thinned = " ".join(t for t, k in zip(tokens, kept, strict=True) if k)
        want = coverage(" ".join(tokens), thinned, split_tokens, room + 2)["coverage"]
        got = reach(word.copy(), kept.copy(), room)
        # quotients of the same counts
        assert abs(got - want) < 1e-14, (
            f"word {word.astype(int)}, kept {kept.astype(int)}, room {room}: {want:.3g}, not {got:.3g}"
        )


# --8<-- [start:rungs]
def rungs(scores, start):
    """The rungs of one ladder in the order in which they are tried: the start, then
    up while the score rises; down in the same way, if up never moved. None is tried
    twice. As it stands it never looks down.
    """
    tried, best = [start], start
    while best + 1 < len(scores):
        tried.append(best + 1)
        if scores[best + 1] <= scores[best]:
            break
        best += 1
    return tried
    # --8<-- [end:rungs]


# --8<-- [start:solve_rungs]
def solve_rungs(scores, start):
    tried = [start]
    for step in (1, -1):
        best = start
        while 0 <= best + step < len(scores):
            tried.append(best + step)
            if scores[best + step] <= scores[best]:
                break
            best += step
        if best != start:
            break  # up was right: nothing is asked of the other side
    return tried
    # --8<-- [end:solve_rungs]


def check_rungs(rungs):
    """The trials of the library's search, one round."""
    import numpy as np
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.long_text_hack import dynamic_hpo

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.data())
    def the_climb(scores, data):
        start = data.draw(st.integers(0, len(scores) - 1))
        options = {"ladders": {"x": range(len(scores))}, "start": {"x": start}, "order": ("x",), "rounds": 1}
        want = dynamic_hpo(np.array(scores, float), **options)[2][:, 0].astype(int).tolist()
        got = list(rungs(list(scores), start))
        assert got == want, f"scores {scores} from rung {start}: {want}, not {got}"

    the_climb()
