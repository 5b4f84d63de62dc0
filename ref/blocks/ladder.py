"""A small, resumable search over ladders of hyper-parameter values, one parameter at a time.

Ours, for the "gradual, resumable" search without a library of arXiv 2403.12563, whose text was not at hand
beyond its abstract. Each parameter has an ordered ladder of values; a rung is a place on it.
"""

import json
from pathlib import Path

import numpy as np


class BudgetSpent(Exception):
    """No further trial is allowed in this invocation."""


def dynamic_hpo(objective, *, ladders, start, order, rounds=2, min_gain=0.0, journal=None, budget=None):
    """(best {name: rung}, score, trials float [n, len(order) + 1]): climb the ladders while the score rises.

    For up to `rounds` rounds, for each name in `order`: upwards, while the next rung beats the best by more
    than min_gain, move there; if upwards never moved, the same downwards. Stop when a whole round moved
    nothing. No configuration is tried twice.
    Args: objective: a function of {name: value}, larger is better; or an array of recorded scores, indexed by
        the rungs in `order`.
      ladders: {name: values}. start: {name: rung} of every ladder; names that are not in order stay there.
      journal: a file that gets a line of JSON a trial as it ends; what stands in it is not tried again, so
        that a search which was stopped goes on with the very same sequence.
      budget: the most new trials of this call.
    Returns: trials: rungs in `order` and score of the new trials, in order; a score of NaN counts, and is
    written, as -inf.
    Raises: ValueError for an empty ladder, a rung outside its ladder, a name that has no ladder, or a foreign
    journal.
    """
    _check(ladders, start, order, rounds, min_gain, budget)
    table = objective if callable(objective) else _table(objective, ladders, order)
    known, trials = _read(journal, order, ladders), []

    def score(rungs):
        key = tuple(rungs[name] for name in order)
        if key not in known:
            if budget is not None and len(trials) >= budget:
                raise BudgetSpent
            values = {name: ladders[name][rung] for name, rung in rungs.items()}
            result = float(table(values) if callable(table) else table[key])
            known[key] = -np.inf if np.isnan(result) else result
            trials.append((*key, known[key]))
            if journal is not None:
                with Path(journal).open("a") as f:
                    f.write(
                        json.dumps({"rungs": dict(zip(order, key, strict=True)), "score": known[key]}) + "\n"
                    )
        return known[key]

    best, top = dict(start), -np.inf

    def climb(name, step):
        """Whether a rung in this direction was better."""
        nonlocal best, top
        moved = False
        while 0 <= (rung := best[name] + step) < len(ladders[name]):
            found = score({**best, name: rung})
            if not found > top + min_gain:
                break
            best, top, moved = {**best, name: rung}, found, True
        return moved

    try:
        top = score(best)
        for _ in range(rounds):
            if not any([climb(name, 1) or climb(name, -1) for name in order]):
                break
    except BudgetSpent:
        pass
    return best, top, np.array(trials, float).reshape(-1, len(order) + 1)


def _table(objective, ladders, order):
    scores = np.asarray(objective, float)
    if scores.shape != (shape := tuple(len(ladders[name]) for name in order)):
        raise ValueError(f"objective must have one score a configuration, shape {shape}, got {scores.shape}")
    return scores


def _read(journal, order, ladders):
    """{rungs in order: score} of the trials in the journal."""
    known = {}
    if journal is None or not Path(journal).exists():
        return known
    text = Path(journal).read_text()
    if not text.endswith("\n"):  # the line that was being written when it was stopped
        Path(journal).write_text(text[: text.rfind("\n") + 1])
    for row in map(json.loads, Path(journal).read_text().splitlines()):
        if set(row["rungs"]) != set(order) or any(r >= len(ladders[n]) for n, r in row["rungs"].items()):
            raise ValueError(
                f"journal is of another search: it holds {row['rungs']}, order is {tuple(order)}"
            )
        known[tuple(row["rungs"][name] for name in order)] = row["score"]
    return known


def _check(ladders, start, order, rounds, min_gain, budget):
    for name, values in ladders.items():
        if not len(values):
            raise ValueError(f"ladders[{name!r}] is empty")
        if name not in start or not 0 <= start[name] < len(values):
            raise ValueError(
                f"start must be a rung in 0..{len(values) - 1} of {name!r}, got {start.get(name)}"
            )
    for where, names in (("order", order), ("start", start)):
        if unknown := [name for name in names if name not in ladders]:
            raise ValueError(f"{where} names {unknown[0]!r}, but there are ladders for {', '.join(ladders)}")
    if not order or rounds < 1 or not min_gain >= 0 or (budget is not None and budget < 0):
        raise ValueError(
            "order must name a ladder, rounds be at least 1, min_gain and budget not negative, got "
            f"{tuple(order)}, {rounds}, {min_gain} and {budget}"
        )
