"""The shared evolution search: genes, elitism, constraints, fronts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.evolution import (
    SearchSpace,
    canonical,
    crossover,
    crowding_distance,
    evolve,
    mutate,
    pareto_front,
    random_gene,
    random_search,
)

seeds = st.integers(0, 2**32 - 1)
SPACE = SearchSpace(((32, 48), (1, 2, 3), *(((64, 128),) * 3), *(((1, 2, 4),) * 3)), depth_index=1)
SMALL = {"population": 12, "parents": 4, "mutants": 4, "crossovers": 4, "iterations": 5}


@given(seeds)
def test_evolution_canonical_genes_ignore_absent_layers(seed):
    rng = np.random.default_rng(seed)
    gene = random_gene(rng, SPACE)
    same = canonical(gene, SPACE)
    assert canonical(same, SPACE) == same
    depth = gene[1]
    other = list(gene)
    for i in (*range(2 + depth, 5), *range(5 + depth, 8)):
        other[i] = SPACE.choices[i][-1]
    assert canonical(other, SPACE) == same
    assert same[: 2 + depth] == gene[: 2 + depth]
    flat = SearchSpace(SPACE.choices)
    assert canonical(gene, flat) == gene


@given(seeds, st.floats(0, 1))
def test_evolution_children_come_from_choices_and_parents(seed, prob):
    rng = np.random.default_rng(seed)
    a, b = random_gene(rng, SPACE), random_gene(rng, SPACE)
    child = crossover(rng, a, b)
    assert all(c in (x, y) for c, x, y in zip(child, a, b, strict=True))
    assert all(g in c for g, c in zip(mutate(rng, a, SPACE, prob=prob), SPACE.choices, strict=True))
    assert mutate(rng, a, SPACE, prob=0) == a


@given(seeds)
def test_evolution_is_elitist_feasible_and_repeatable(seed):
    table = np.random.default_rng(seed).random((8, 200))
    asked = []

    def fitness(gene):
        asked.append(gene)
        return sum(table[i, g] for i, g in enumerate(gene))

    feasible = lambda gene: sum(gene) <= 400
    best, history = evolve(np.random.default_rng(seed), SPACE, fitness, feasible, **SMALL)
    assert len(history) == 6
    tops = [h.losses[0] for h in history]
    assert (np.diff(tops) <= 0).all()
    for h in history:
        assert len(h.genes) == 12
        assert all(feasible(g) for g in h.genes)
        assert (np.diff(h.losses) >= 0).all()
    assert best == history[-1].genes[0]
    assert len({canonical(g, SPACE) for g in asked}) == len(asked)  # equal networks are asked once
    again, _ = evolve(np.random.default_rng(seed), SPACE, fitness, feasible, **SMALL)
    assert again == best


def test_evolution_beats_random_search_on_separable_costs():
    """6^8 = 1.7 million genes, 10 seeds: lower on average at equal evaluations, the optimum mostly found."""
    space = SearchSpace(((0, 1, 2, 3, 4, 5),) * 8)
    found, ours, theirs = 0, [], []
    for seed in range(10):
        table = np.random.default_rng(seed).random((8, 6))
        cost = lambda gene, table=table: float(sum(table[i, g] for i, g in enumerate(gene)))
        best, _ = evolve(np.random.default_rng(seed), space, cost)
        _, losses = random_search(np.random.default_rng(seed), space, cost, evaluations=125 + 30 * 100)
        ours.append(cost(best))
        theirs.append(losses.min())
        found += cost(best) <= table.min(axis=1).sum() + 1e-12
    assert np.mean(ours) < np.mean(theirs)
    assert found > 5


@given(seeds, st.integers(1, 20))
def test_evolution_front_is_what_nothing_dominates(seed, n):
    points = np.random.default_rng(seed).integers(0, 5, (n, 2)).astype(float)
    front = pareto_front(points)
    beats = lambda a, b: (a <= b).all() and (a < b).any()
    want = [i for i in range(n) if not any(beats(points[j], points[i]) for j in range(n))]
    assert front.tolist() == want
    twice = pareto_front(np.concatenate([points, points]))
    assert {tuple(p) for p in np.concatenate([points, points])[twice]} == {tuple(p) for p in points[front]}
    ends = crowding_distance(points)
    assert (ends >= 0).all()
    assert np.isinf(ends[[points[:, 0].argmin()]]).all() or n > 1


def test_evolution_of_two_objectives_gives_a_front():
    space = SearchSpace(((0, 1, 2, 3),) * 4)
    losses = lambda g: (float(sum(g)), float(sum(3 - x for x in g)))  # every gene is on the front
    best, history = evolve(np.random.default_rng(0), space, losses, **SMALL)
    assert history[-1].losses.shape == (12, 2)
    assert len(best) == 12
    one_best = lambda g: (float(sum(g)), float(sum(g)))
    best, _ = evolve(np.random.default_rng(0), space, one_best, **{**SMALL, "iterations": 30})
    assert set(best) == {(0, 0, 0, 0)}


def test_evolution_rejects_bad_input():
    rng, zero = np.random.default_rng(0), lambda g: 0.0
    for call, message in (
        (lambda: SearchSpace(((1, 2), ())), "at least one choice"),
        (lambda: SearchSpace(()), "at least one position"),
        (lambda: SearchSpace(((3,), (2,), (3,)), depth_index=0), "no multiple of 3 layers"),
        (lambda: SearchSpace(((1,),), depth_index=1), r"depth_index must be in 0\.\.0"),
        (lambda: mutate(rng, (32, 1), SPACE), "gene must have 8 entries"),
        (lambda: canonical((33, 1, 64, 64, 64, 1, 1, 1), SPACE), r"gene\[0\] = 33"),
        (lambda: crossover(rng, (1,), (1, 2)), "parents must be of one space"),
        (lambda: evolve(rng, SPACE, zero, population=10), "parents . mutants . crossovers"),
        (lambda: evolve(rng, SPACE, zero, lambda g: False, **SMALL, max_redraws=5), "in 5 redraws"),
        (lambda: random_search(rng, SPACE, zero, lambda g: False, evaluations=1, max_redraws=2), "2 redraws"),
        (lambda: pareto_front(np.ones(3)), "points must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
