"""Search over discrete choices: genes, mutation and crossover, evolution under a constraint, Pareto fronts.

Source: Wang et al. 2020 (HAT) for the loop and its numbers; Deb et al. 2002 (NSGA-II) for several objectives.
A gene is a flat tuple, one entry a position, each out of that position's choices.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SearchSpace:
    """choices: what each position may hold. depth_index: the position of the number of layers, or None.

    With it, the positions behind hold groups of one entry a layer, as many as the largest depth; entries of
    layers that a gene does not have are carried and ignored.
    Raises: ValueError for a position without choices, or a tail that is no multiple of the largest depth.
    """

    choices: tuple[tuple[int, ...], ...]
    depth_index: int | None = None

    def __post_init__(self):
        """Check the space once."""
        if not self.choices or not all(self.choices):
            raise ValueError("choices must hold at least one position, and each at least one choice")
        if self.depth_index is not None:
            if not 0 <= self.depth_index < len(self.choices):
                raise ValueError(f"depth_index must be in 0..{len(self.choices) - 1}, got {self.depth_index}")
            tail, deepest = len(self.choices) - self.depth_index - 1, max(self.choices[self.depth_index])
            if deepest < 1 or tail % deepest:
                raise ValueError(f"{tail} positions behind the depth are no multiple of {deepest} layers")


@dataclass(frozen=True)
class Generation:
    """Members of a population and their losses, best first; losses [n], or [n, objectives]."""

    genes: tuple[tuple[int, ...], ...]
    losses: np.ndarray


def check_gene(gene, space):
    """Raise ValueError unless the gene lies in the space."""
    if len(gene) != len(space.choices):
        raise ValueError(f"gene must have {len(space.choices)} entries, got {len(gene)}")
    for i, (g, allowed) in enumerate(zip(gene, space.choices, strict=True)):
        if g not in allowed:
            raise ValueError(f"gene[{i}] = {g} is not in {allowed}")


def random_gene(rng, space):
    """Every position drawn uniformly by a NumPy Generator."""
    return tuple(c[rng.integers(len(c))] for c in space.choices)


def mutate(rng, gene, space, *, prob=0.3):
    """Each position drawn again with probability `prob`, uniformly from its choices."""
    check_gene(gene, space)
    again = rng.random(len(gene)) < prob
    return tuple(
        c[rng.integers(len(c))] if new else g for g, c, new in zip(gene, space.choices, again, strict=True)
    )


def crossover(rng, a, b):
    """Each position from one of the two parents, with equal chances."""
    if len(a) != len(b):
        raise ValueError(f"parents must be of one space, got {len(a)} and {len(b)} entries")
    first = rng.random(len(a)) < 0.5
    return tuple(x if one else y for x, y, one in zip(a, b, first, strict=True))


def canonical(gene, space):
    """The gene with entries of absent layers set to their first choice: equal networks, equal genes."""
    check_gene(gene, space)
    if space.depth_index is None:
        return tuple(gene)
    start, deepest = space.depth_index + 1, max(space.choices[space.depth_index])
    absent = lambda i: i >= start and (i - start) % deepest >= gene[space.depth_index]
    return tuple(space.choices[i][0] if absent(i) else g for i, g in enumerate(gene))


def evolve(rng, space, fitness, constraint=None, *, population=125, parents=25, mutants=50,
           crossovers=50, iterations=30, prob=0.3, max_redraws=1000):  # fmt: skip
    """(best, history): the best `parents` live on, the rest are their mutants and crossovers.

    Args: fitness(gene) -> loss, lower is better, asked once for each canonical gene; a tuple of losses asks
        for the Pareto front (NSGA-II: by front, then by crowding), and best is the list of genes on it.
      constraint(gene) -> bool: whether a gene may live; others are drawn again, max_redraws times.
    Returns: history, iterations + 1 `Generation`s, the drawn one first.
    Raises: ValueError if population is not parents + mutants + crossovers, or no feasible gene is found.
    """
    if population != parents + mutants + crossovers or parents < 1 or (crossovers and parents < 2):
        raise ValueError(
            f"population must be parents + mutants + crossovers with at least one parent (two to cross), got "
            f"{population}, {parents}, {mutants}, {crossovers}"
        )
    known = {}

    def draw(make):
        for _ in range(max_redraws + 1):
            gene = make()
            if constraint is None or constraint(gene):
                return gene
        raise ValueError(f"no gene met the constraint in {max_redraws} redraws")

    def ranked(genes):
        for g in genes:
            if (key := canonical(g, space)) not in known:
                known[key] = fitness(g)
        losses = np.array([known[canonical(g, space)] for g in genes], np.float64)
        order = _order(losses)
        return Generation(tuple(genes[i] for i in order), losses[order])

    history = [ranked([draw(lambda: random_gene(rng, space)) for _ in range(population)])]
    for _ in range(iterations):
        alive = list(history[-1].genes[:parents])
        one = lambda alive=alive: mutate(rng, alive[rng.integers(parents)], space, prob=prob)
        two = lambda alive=alive: crossover(rng, *(alive[i] for i in rng.choice(parents, 2, replace=False)))
        children = [draw(one) for _ in range(mutants)] + [draw(two) for _ in range(crossovers)]
        history.append(ranked(alive + children))
    last = history[-1]
    if last.losses.ndim == 1:
        return last.genes[0], history
    return [last.genes[i] for i in pareto_front(last.losses)], history


def random_search(rng, space, fitness, constraint=None, *, evaluations, max_redraws=1000):
    """(best, losses [evaluations]): feasible genes drawn at random, the rival of every search."""
    best, losses = None, []
    for _ in range(evaluations):
        for _ in range(max_redraws + 1):
            gene = random_gene(rng, space)
            if constraint is None or constraint(gene):
                break
        else:
            raise ValueError(f"no gene met the constraint in {max_redraws} redraws")
        losses.append(fitness(gene))
        if losses[-1] <= min(losses):
            best = gene
    return best, np.array(losses)


def pareto_front(points):
    """Rising indices of the points [n, objectives] that none dominates (no coordinate worse, one better)."""
    points = np.asarray(points, np.float64)
    if points.ndim != 2:
        raise ValueError(f"points must have shape [n, objectives], got {list(points.shape)}")
    no_worse = (points[:, None] <= points).all(axis=-1)
    better = (points[:, None] < points).any(axis=-1)
    return np.flatnonzero(~(no_worse & better).any(axis=0))


def crowding_distance(points):
    """[n]: how far apart a point's neighbours are, added over objectives relative to their range.

    The ends of each objective are infinitely far.
    """
    points = np.asarray(points, np.float64)
    out = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        out[order[[0, -1]]] = np.inf
        span = column[order[-1]] - column[order[0]]
        if span > 0:
            out[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return out


def _order(losses):
    """Indices from best to worst: by loss, or by Pareto front and then by crowding, the lonely first."""
    if losses.ndim == 1:
        return np.argsort(losses, kind="stable")
    left, out = np.arange(len(losses)), []
    while len(left):
        front = left[pareto_front(losses[left])]
        out.append(front[np.argsort(-crowding_distance(losses[front]), kind="stable")])
        left = np.setdiff1d(left, front)
    return np.concatenate(out)
