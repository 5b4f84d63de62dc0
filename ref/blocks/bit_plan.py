"""How many bits each layer gets: what it costs to take them away, and a budget a group.

Source: Zhao et al. 2025 (arXiv 2406.02540), metric-decoupled mixed precision. The released search is a
relaxed heuristic; the greedy rule and the exhaustive one are ours.
"""

from itertools import product
from typing import NamedTuple

import numpy as np


class LayerSensitivity(NamedTuple):
    """One row of the table: how much its group's metric suffers when this layer alone has so many bits."""

    group: str
    layer: str
    size: int
    degradation: dict


def sensitivity(model_fn, params, groups, metrics, *, bits):
    """A LayerSensitivity for every layer: it alone is quantised, and judged by the metric of its own group.

    model_fn(plan) -> output, with plan {layer: bits}, {} for the exact network; params {layer: weight};
    groups {group: layers}; metrics {group: function(output, exact output) -> degradation}; bits: candidates.
    Judging all by one error would hide that groups spoil different things (metric decoupling).
    """
    exact = model_fn({})
    rows = []
    for group, layers in groups.items():
        if group not in metrics:
            raise ValueError(f"metrics must hold one for group {group!r}")
        for layer in layers:
            scores = {b: float(metrics[group](model_fn({layer: b}), exact)) for b in bits}
            rows.append(LayerSensitivity(group, layer, int(np.size(params[layer])), scores))
    return tuple(rows)


def allocate_bits(table, *, budget_bits, candidates=(4, 6, 8), exact=False):
    """{layer: bits}, on average at most budget_bits a weight in every group.

    All start at the fewest bits. Greedy: the step up that saves most degradation a bit of memory, again and
    again, until the best one does not fit; so a larger budget never takes bits away. exact: the least sum of
    degradations, by trying every assignment of a group (small ones only).
    Raises: ValueError for a budget below the fewest bits, or a table without a candidate.
    """
    candidates, plan = tuple(sorted(candidates)), {}
    if (
        not table
        or budget_bits < candidates[0]
        or any(b not in r.degradation for r in table for b in candidates)
    ):
        need = f"budget_bits must be at least {candidates[0]}, and table hold {candidates} for every layer"
        raise ValueError(f"{need}, got {budget_bits=} and {len(table)} rows")
    for group in dict.fromkeys(r.group for r in table):
        rows = [r for r in table if r.group == group]
        room = budget_bits * sum(r.size for r in rows) * (1 + 1e-12)
        chosen = _best(rows, room, candidates) if exact else _greedy(rows, room, candidates)
        plan |= {r.layer: b for r, b in zip(rows, chosen, strict=True)}
    return plan


def _greedy(rows, room, candidates):
    level = [0] * len(rows)
    used = sum(r.size * candidates[0] for r in rows)
    while True:
        gains = []
        for i, (r, l) in enumerate(zip(rows, level, strict=True)):
            if l + 1 < len(candidates):
                extra = r.size * (candidates[l + 1] - candidates[l])
                saved = r.degradation[candidates[l]] - r.degradation[candidates[l + 1]]
                gains.append((saved / extra, -i, extra))
        best = max(gains, default=(0, 0, 0))
        if best[0] <= 0 or used + best[2] > room:
            return [candidates[l] for l in level]
        level[-best[1]] += 1
        used += best[2]


def _best(rows, room, candidates):
    fits = (c for c in product(candidates, repeat=len(rows))
            if sum(r.size * b for r, b in zip(rows, c, strict=True)) <= room)  # fmt: skip
    return min(fits, key=lambda c: sum(r.degradation[b] for r, b in zip(rows, c, strict=True)))
