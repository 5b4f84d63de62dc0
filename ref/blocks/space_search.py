"""One-shot search under a memory limit: first which space of networks, then which network of it.

Source: Liang et al. 2023 (MCUFormer, arXiv 2310.16898) and its released code; the evolution of subnets is
AutoFormer's (Chen et al. 2021). A space is a point (rank ratio rho, patch size p); a subnet is its width and,
for every layer, heads and MLP ratio.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.dims import dims, float64

RHO, PATCH = (0.4, 0.95), (16, 32)  # the ranges searched
UNIT = np.array([0.05, 4.0])  # the grid: a step in rho and in p
ERROR_SLOPE, SRAM_SLOPE = np.array([10.0, 20.0]), np.array([0.2, 2.0])  # slopes worth one step
DIRECTIONS = ("descend", "as_released")


@dataclass(frozen=True)
class SubnetConfig:
    """A network of the space: width, then heads and MLP ratio of every layer."""

    embed_dim: int
    heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]

    def __post_init__(self):
        """One entry of each a layer, at least one layer."""
        if len(self.heads) != len(self.mlp_ratios) or not self.heads:
            raise ValueError(
                f"heads and mlp_ratios must have one entry a layer, at least one, got {len(self.heads)} and "
                f"{len(self.mlp_ratios)}"
            )


@dataclass(frozen=True)
class SubnetSpace:
    """What every gene may be; the defaults are the paper's."""

    depths: tuple[int, ...] = (12, 13, 14)
    embed_dims: tuple[int, ...] = (168, 192, 216)
    heads: tuple[int, ...] = (3, 4)
    mlp_ratios: tuple[float, ...] = (3.5, 4.0)

    def __post_init__(self):
        """No gene without a choice."""
        for name, choices in vars(self).items():
            if not choices:
                raise ValueError(f"{name} must hold at least one choice")

    def draw(self, rng) -> SubnetConfig:
        """Every gene uniformly."""
        depth = _pick(rng, self.depths)
        ratios, heads = ([_pick(rng, c) for _ in range(depth)] for c in (self.mlp_ratios, self.heads))
        return SubnetConfig(_pick(rng, self.embed_dims), tuple(heads), tuple(ratios))


class EvolutionStep(NamedTuple):
    """Slopes of error and illegality by (rho, p), the steps they ask for, the step after clamping; [2]."""

    w_error: np.ndarray
    w_sram: np.ndarray
    step_error: np.ndarray
    step_sram: np.ndarray
    step: np.ndarray


def nearest_points(points, rho, patch, *, k=5):
    """The k rows of points [n, 4] nearest to (rho, patch), nearest first, in coordinates scaled to [0, 1].

    Rows: rho, patch, accuracy in per cent, legal ratio. Ties go to the earlier row.
    """
    points = float64(points)
    if not 1 <= k <= dims(points=(points, "n 4"))["n"]:
        raise ValueError(f"k must be in 1..{len(points)}, the rows of points, got {k}")
    span = np.array([RHO[1] - RHO[0], PATCH[1] - PATCH[0]])
    far = (((points[:, :2] - (rho, patch)) / span) ** 2).sum(axis=1)
    return points[np.argsort(far, kind="stable")[:k]]


def evolution_step(points, *, rho, patch, direction="descend") -> EvolutionStep:
    """Where to move a space: planes through error 100 - accuracy and illegality 1 - legal, by least squares.

    A slope moves a coordinate by floor(slope / unit) grid steps. direction: "descend" goes against the
    slopes, as the rule it descends from does; "as_released" along them, as the released code.
    Args: points [n, 4], n >= 3: rho, patch, accuracy in per cent, legal ratio; all are used.
    Raises: ValueError for fewer points, values that are not finite, or another direction.
    """
    points = float64(points)
    if dims(points=(points, "n 4"))["n"] < 3 or not np.isfinite(points).all():
        raise ValueError(f"points must be finite and at least three to fit a plane, got {len(points)}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    plane = np.column_stack([np.ones(len(points)), points[:, :2]])
    bad = np.column_stack([100 - points[:, 2], 1 - points[:, 3]])
    w_error, w_sram = np.linalg.lstsq(plane, bad, rcond=None)[0][1:].T
    step_error = np.floor(w_error / ERROR_SLOPE) * UNIT
    step_sram = np.floor(w_sram / SRAM_SLOPE) * UNIT
    sign = -1.0 if direction == "descend" else 1.0
    old = np.array([rho, patch], np.float64)
    new = np.clip(old + sign * (step_error + step_sram), (RHO[0], PATCH[0]), (RHO[1], PATCH[1]))
    return EvolutionStep(w_error, w_sram, step_error, step_sram, new - old)


def evolve_space(evaluate, *, steps=7, seed, direction="descend"):
    """History [n, 4] of the spaces tried: five random points of the grid, then step after step from the last.

    evaluate(rho, patch) -> (accuracy in per cent, legal ratio), asked once a point. Ends early where a step
    leads to a point that is already known.
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    rng = np.random.default_rng(seed)
    grid = [(round(r, 2), int(p)) for r in np.arange(RHO[0], RHO[1] + 0.01, UNIT[0])
            for p in np.arange(PATCH[0], PATCH[1] + 1, UNIT[1])]  # fmt: skip
    history = []

    def visit(rho, patch):
        accuracy, legal = evaluate(rho, patch)
        if not (0 <= accuracy <= 100 and 0 <= legal <= 1):
            raise ValueError(
                f"evaluate must give per cent and a ratio, got {accuracy}, {legal} at {rho}, {patch}"
            )
        history.append((rho, patch, float(accuracy), float(legal)))

    for i in rng.choice(len(grid), 5, replace=False):
        visit(*grid[i])
    for _ in range(steps):
        rho, patch = history[-1][:2]
        move = evolution_step(
            nearest_points(history, rho, patch), rho=rho, patch=patch, direction=direction
        ).step
        new = round(float(rho + move[0]), 2), round(patch + move[1])
        if new in {h[:2] for h in history}:
            break
        visit(*new)
    return np.array(history)


def search_subnet(
    evaluate, is_legal, space: SubnetSpace, *, population=50, parents=10, mutants=25, crossovers=25,
    generations=20, seed, layer_prob=0.2, net_prob=0.4, tries=10,
):  # fmt: skip
    """(best, history): the legal subnet with the highest accuracy found, and for each generation the
    (subnet, accuracy) pairs it added. No subnet is evaluated twice, none that is not legal.

    evaluate(subnet) -> accuracy, higher is better. Mutants of the best `parents` change width and depth with
    net_prob, a layer's genes with layer_prob; crossovers take each gene from one of two parents of equal
    depth; random subnets fill the rest. A group gives up after `tries` times its size.
    Raises: ValueError if no drawn subnet is legal, or for sizes below one.
    """
    if min(population, parents, tries) < 1 or min(mutants, crossovers, generations) < 0:
        raise ValueError(
            f"population, parents and tries must be at least 1, the rest not negative, got {population}, "
            f"{parents}, {tries}, {mutants}, {crossovers}, {generations}"
        )
    if mutants + crossovers > population:
        raise ValueError(
            f"population must hold {mutants} mutants and {crossovers} crossovers, got {population}"
        )
    rng, known, history = np.random.default_rng(seed), {}, []

    def grow(group, make, size, attempts):
        for _ in range(attempts):
            if len(group) >= size:
                break
            subnet = make()
            if subnet is not None and subnet not in known and is_legal(subnet):
                known[subnet] = float(evaluate(subnet))
                group.append((subnet, known[subnet]))

    def top():
        return sorted(known, key=known.get, reverse=True)[:parents]

    for n in range(generations + 1):
        group = []
        if n:
            alive = top()
            grow(
                group,
                lambda a=alive: _mutant(rng, _pick(rng, a), space, layer_prob, net_prob),
                mutants,
                tries * mutants,
            )
            full = len(group) + crossovers
            grow(group, lambda a=alive: _crossover(rng, a), full, tries * crossovers)
        grow(group, lambda: space.draw(rng), population, tries * population)
        if not known:
            raise ValueError(f"no subnet of {tries * population} drawn is legal: relax is_legal or the space")
        history.append(group)
    return top()[0], history


def _pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def _mutant(rng, parent, space, layer_prob, net_prob):
    heads, ratios, width = list(parent.heads), list(parent.mlp_ratios), parent.embed_dim
    if rng.random() < net_prob:
        depth = _pick(rng, space.depths)
        more = range(depth - len(heads))
        heads = heads[:depth] + [_pick(rng, space.heads) for _ in more]
        ratios = ratios[:depth] + [_pick(rng, space.mlp_ratios) for _ in more]
    heads = [_pick(rng, space.heads) if rng.random() < layer_prob else h for h in heads]
    ratios = [_pick(rng, space.mlp_ratios) if rng.random() < layer_prob else r for r in ratios]
    if rng.random() < net_prob:
        width = _pick(rng, space.embed_dims)
    return SubnetConfig(width, tuple(heads), tuple(ratios))


def _crossover(rng, alive):
    """None if 50 draws find no two parents of one depth."""
    either = lambda x, y: x if rng.random() < 0.5 else y
    layers = lambda x, y: tuple(either(*pair) for pair in zip(x, y, strict=True))
    for _ in range(50):
        a, b = _pick(rng, alive), _pick(rng, alive)
        if len(a.heads) == len(b.heads):
            width, heads = either(a.embed_dim, b.embed_dim), layers(a.heads, b.heads)
            return SubnetConfig(width, heads, layers(a.mlp_ratios, b.mlp_ratios))
    return None
