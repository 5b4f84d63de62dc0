"""The arena planner (hw_mcu): sound plans, never below the bound, the optimum on small cases."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.arena import STRATEGIES, best_plan, overlaps, plan_arena

spans = st.tuples(st.integers(0, 3000), st.integers(0, 9), st.integers(0, 5))
some = lambda most: st.lists(spans, min_size=0, max_size=most).map(
    lambda rows: [(n, size, first, first + life) for n, (size, first, life) in enumerate(rows)]
)


def brute(buffers, align):
    """The smallest total over all orders of first fit, written apart from the planner: byte maps."""
    best = None
    for order in itertools.permutations(buffers):
        used, top = set(), 0
        for _, size, first, last in order:
            blocks, at = -(-size // align), 0
            while any((at + k, t) in used for k in range(blocks) for t in range(first, last + 1)):
                at += 1
            used |= {(at + k, t) for k in range(blocks) for t in range(first, last + 1)}
            top = max(top, at + blocks if blocks else 0)
        best = top if best is None else min(best, top)
    return (best or 0) * align


@given(some(14), st.sampled_from((1, 16)))
def test_hw_mcu_arena_plans_are_sound(buffers, align):
    """No overlap in space and time; bound <= total <= sum of aligned sizes; the best is no worse than any."""
    aligned = sum(-(-b[1] // align) * align for b in buffers)
    totals = []
    for strategy in STRATEGIES[:3]:
        plan = plan_arena(buffers, strategy=strategy, align=align)
        assert not overlaps(plan)
        assert all(at % align == 0 for at in plan.offsets.values())
        assert plan.lower_bound <= plan.total <= aligned
        totals.append(plan.total)
    best = best_plan(buffers, align=align)
    assert not overlaps(best)
    assert best.total <= min(totals)
    if len(buffers) <= 7:
        exact = plan_arena(buffers, strategy="exact", align=align)
        assert not overlaps(exact)
        assert exact.lower_bound <= exact.total <= min(totals)


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 4), st.integers(0, 2)), max_size=5))
def test_hw_mcu_arena_exact_is_the_optimum_of_all_orders(rows):
    buffers = [(n, size, first, first + life) for n, (size, first, life) in enumerate(rows)]
    assert plan_arena(buffers, strategy="exact", align=16).total == brute(buffers, 16)


@given(some(10), st.integers(0, 3000))
def test_hw_mcu_arena_regions_hold_their_limits(buffers, fast):
    plan = plan_arena(buffers, regions=(("dtcm", fast), ("sram", 10**6)))
    assert not overlaps(plan)
    assert plan.totals["dtcm"] <= fast
    assert set(plan.region) == {b[0] for b in buffers}
    picture = plan.plot()
    assert picture.count("<rect") == sum(b[1] > 0 for b in buffers)


def test_hw_mcu_arena_known_case_and_bad_input():
    """A chain of three: the first and the last may share bytes; greedy by size is optimal here."""
    chain = [("a", 100, 0, 1), ("b", 50, 1, 2), ("c", 100, 2, 3)]
    plan = plan_arena(chain)
    assert (plan.total, plan.lower_bound) == (112 + 64, 112 + 64)
    assert plan.offsets["a"] == plan.offsets["c"] == 0
    for bad, words in (
        (lambda: plan_arena(chain, strategy="magic"), "strategy must be one of"),
        (lambda: plan_arena(chain, align=0), "align"),
        (lambda: plan_arena([("a", -1, 0, 1)]), "bytes >= 0"),
        (lambda: plan_arena([("a", 1, 2, 1)]), "first <= last"),
        (lambda: plan_arena([*chain, chain[0]]), "different ids"),
        (lambda: plan_arena([(n, 1, 0, 0) for n in range(13)], strategy="exact"), "up to 12"),
        (lambda: plan_arena(chain, regions=()), "regions must be"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    with pytest.raises(MemoryError, match="'a' of 100 B fits in none of dtcm"):
        plan_arena(chain, regions=(("dtcm", 64),))
    with pytest.raises(MemoryError, match="no assignment of 3 buffers to dtcm, axi fits"):
        plan_arena([(n, 64, 0, 0) for n in range(3)], regions=(("dtcm", 64), ("axi", 96)))
    with pytest.raises(MemoryError, match="no assignment of 13 buffers to dtcm, axi that was tried fits"):
        plan_arena([(n, 64, 0, 0) for n in range(13)], regions=(("dtcm", 64), ("axi", 96)))
    with pytest.raises(ValueError, match="exact plans a single region"):
        plan_arena(chain, strategy="exact", regions=(("dtcm", 640),))


def sound_in(plan, limits):
    """No overlap, every buffer in one region, totals as the offsets say and within the limits."""
    assert not overlaps(plan)
    tops = dict.fromkeys(limits, 0)
    for i, size, _, _ in plan.buffers:
        name = plan.region[i]
        tops[name] = max(tops[name], plan.offsets[i] + size)
    assert all(top <= plan.totals[name] <= limits[name] for name, top in tops.items())
    return plan


@pytest.mark.parametrize(
    ("sizes", "limits", "want"),
    [
        ({"a": 64, "b": 128}, {"dtcm": 128, "axi": 64}, {"a": "axi", "b": "dtcm"}),
        (
            {"a": 100_000, "b": 150_000, "c": 400_000},
            {"w": 104 * 1024, "x": 512 * 1024, "y": 288 * 1024, "z": 64 * 1024},
            {"a": "w", "b": "y", "c": "x"},
        ),
        # neither small first nor large first (96 into 112) leaves room for the last: the search does
        ({"a": 96, "b": 64, "c": 48, "d": 48}, {"u": 112, "v": 144}, {"a": "v", "b": "u"}),
    ],
)
def test_hw_mcu_arena_regions_take_the_swap_that_fits(sizes, limits, want):
    buffers = [(i, size, 0, 0) for i, size in sizes.items()]
    for strategy in STRATEGIES[:3]:
        plan = sound_in(plan_arena(buffers, strategy=strategy, regions=limits.items()), limits)
        assert {i: plan.region[i] for i in want} == want
        assert plan == plan_arena(buffers, strategy=strategy, regions=limits.items())


def test_hw_mcu_arena_best_of_the_strategies_that_fit():
    buffers = [(0, 16, 1, 4), (1, 16, 0, 1), (2, 80, 1, 2), (3, 80, 1, 2), (4, 80, 2, 4), (5, 128, 1, 3),
               (6, 128, 3, 3)]  # fmt: skip
    limits = {"a": 416, "b": 16}
    plan = sound_in(best_plan(buffers, regions=limits.items()), limits)
    assert plan.lower_bound <= plan.total


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 2)), max_size=5),
    st.lists(st.integers(0, 16), min_size=2, max_size=3),
)
def test_hw_mcu_arena_regions_fit_whenever_an_assignment_does(rows, rooms):
    """Against all assignments, each region packed by all orders."""
    buffers = [(n, 16 * size, first, first + life) for n, (size, first, life) in enumerate(rows)]
    limits = {f"r{n}": 16 * room for n, room in enumerate(rooms)}
    tops = {}

    def fits(name, picked):
        if picked not in tops:
            tops[picked] = brute([buffers[i] for i in picked], 16)
        return tops[picked] <= limits[name]

    choices = itertools.product(limits, repeat=len(buffers))
    split = lambda c: {name: tuple(n for n, x in enumerate(c) if x == name) for name in limits}
    possible = any(all(fits(name, picked) for name, picked in split(c).items()) for c in choices)
    for planner in (best_plan, plan_arena):
        if possible:
            sound_in(planner(buffers, regions=limits.items()), limits)
        else:
            with pytest.raises(MemoryError, match="fits"):
                planner(buffers, regions=limits.items())
