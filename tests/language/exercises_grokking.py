"""The exercises of the chapter on grokking: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:inside]
def inside(fact, ood):
    """All questions (h, r1, r2, t) that may be trained on: t = fact[fact[h, r1], r2]
    for facts {(head, relation): tail}, where neither fact is in the set ood. As it
    stands the second fact may be.
    """
    found = []
    for (h, r1), bridge in fact.items():
        for (b, r2), t in fact.items():
            if b == bridge and (h, r1) not in ood:
                found.append((h, r1, r2, t))
    return found
    # --8<-- [end:inside]


# --8<-- [start:solve_inside]
def solve_inside(fact, ood):
    known = {pair: t for pair, t in fact.items() if pair not in ood}
    return [
        (h, r1, r2, t) for (h, r1), bridge in known.items() for (b, r2), t in known.items() if b == bridge
    ]
    # --8<-- [end:solve_inside]


def check_inside(inside):
    """The library's world with nothing trained on: all of these questions are then in its test."""
    import numpy as np

    from ref.language.grokking import composition_data

    for seed in range(4):
        data = composition_data(
            np.random.default_rng(seed), entities=5, relations=3, out_degree=2, ood_fraction=0.3, ratio=0,
            holdout=1,
        )  # fmt: skip
        facts, name = data.facts.tolist(), lambda *ids, v=data.vocab: " ".join(v[i] for i in ids)
        fact = {(h, r): t for h, r, t in facts}
        ood = {(h, r) for (h, r, _), outside in zip(facts, data.ood, strict=True) if outside}
        want = {tuple(row[:4].tolist()) for row in data.tests["test_id"].ids}
        got = set(inside(dict(fact), set(ood)))
        for row in sorted(got ^ want):
            h, r1, r2, _ = row
            where = "is asked" if row in got else "is missing"
            hops = f"{name(h, r1, fact[h, r1])} and {name(fact[h, r1], r2, fact[fact[h, r1], r2])}"
            marked = [" (OOD)" if pair in ood else "" for pair in ((h, r1), (fact[h, r1], r2))]
            raise AssertionError(f"{name(*row)} {where}; its facts{marked[0]}{marked[1]} are {hops}")


# --8<-- [start:rank]
import numpy as np


def rank(logits, target):
    """The rank of a token in logits [V]: how many tokens are larger, or equal with
    a lower id; 0 is first. As it stands equal ones are all taken to come before.
    """
    return int((logits >= logits[target]).sum()) - 1
    # --8<-- [end:rank]


# --8<-- [start:solve_rank]
def solve_rank(logits, target):
    own = logits[target]
    return int((logits > own).sum() + (logits[:target] == own).sum())
    # --8<-- [end:solve_rank]


def check_rank(rank):
    """The library's rank."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.grokking import token_rank

    @given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.data())
    def the_definition(logits, data):
        target = data.draw(st.integers(0, len(logits) - 1))
        logits = np.array(logits, float)
        got, want = rank(logits, target), int(token_rank(logits, np.array(target)))
        assert got == want, f"token {target} of {logits}: rank {want}, not {got}"

    the_definition()


# --8<-- [start:derive]
def derive(known, a, b):
    """What a is against b, "more", "equal" or "less", or None if it does not follow from
    known, a set of pairs (x, y) with x >= y. Both ways is equal, one way is more
    or less. As it stands only what is told outright is found.
    """
    up, down = (a, b) in known, (b, a) in known
    return "equal" if up and down else "more" if up else "less" if down else None
    # --8<-- [end:derive]


# --8<-- [start:solve_derive]
def solve_derive(known, a, b):
    def reaches(x, y):
        seen, waiting = {x}, [x]
        while waiting:
            at = waiting.pop()
            further = {v for u, v in known if u == at} - seen
            seen |= further
            waiting += further
        return y in seen

    up, down = reaches(a, b), reaches(b, a)
    return "equal" if up and down else "more" if up else "less" if down else None
    # --8<-- [end:solve_derive]


def check_derive(derive):
    """The library's closure."""
    import numpy as np
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.tasks.knowledge import follows

    entity = st.integers(0, 4)

    @given(st.sets(st.tuples(entity, entity), max_size=6), entity, entity)
    def the_closure(known, a, b):
        told = np.zeros((5, 5), bool)
        for x, y in known:
            told[x, y] = True
        graph = follows(told)
        want = {(1, 1): "equal", (1, 0): "more", (0, 1): "less"}.get((int(graph[a, b]), int(graph[b, a])))
        got = derive(set(known), a, b)
        assert got == want, f"known {sorted(known)}, {a} against {b}: {want}, not {got}"

    the_closure()
