"""Texts that show a list of nouns, and after a delay the same list, a permuted one, or another.

Source: Armeni, Honey and Linzen 2022 (arXiv 2210.13569) and the code released with it.
"""

from typing import NamedTuple

import numpy as np

from ref.checks import one_of
from ref.dims import dims
from ref.tasks.nouns import PREFIX, PROMPT

CONDITIONS = ("repeat", "permute", "novel")
PAIRINGS = ("official", "distinct")


class Stimulus(NamedTuple):
    """text, and what it is made of: list1 and list2 are nouns, prompt holds the intervening text too."""

    text: str
    prefix: str
    list1: tuple[str, ...]
    prompt: str
    list2: tuple[str, ...]
    pool: int
    shift: int

    @property
    def segments(self):
        """(prefix, first list, prompt, second list) as written; joined they are the text."""
        listed = lambda nouns: f" {', '.join(nouns)}."
        return self.prefix, listed(self.list1), f" {self.prompt}", listed(self.list2)


def build_stimuli(
    pools, *, condition, list_length, delay, prefix=PREFIX, prompt=PROMPT, seed=12345, pairing="official"
):
    """A list of Stimulus: every pool of m nouns in its m circular shifts, each noun in each place once.

    Args: pools: lists of nouns. condition: "repeat"; "permute", the same nouns in another order; "novel", the
        list of another pool.
      list_length: the first so many of the shifted pool. delay: the intervening text.
      seed, pairing: of `novel_pairing`.
    Raises: ValueError for an unknown condition, a length outside 1..m (from 2 on to permute), a noun that
      occurs twice, or in two pools where lists must be novel.
    """
    _check_build(pools, condition, list_length)
    lists = [
        (p, s, tuple(np.roll(pool, s)[:list_length].tolist()))
        for p, pool in enumerate(pools)
        for s in range(len(pool))
    ]
    other = (
        novel_pairing([p for p, _, _ in lists], seed=seed, method=pairing) if condition == "novel" else None
    )
    out, between = [], f"{delay} {prompt}".strip()
    for j, (p, shift, nouns) in enumerate(lists):
        second = nouns
        if condition == "permute":
            second = _permuted(nouns, j)
        elif condition == "novel":
            second = lists[other[j]][2]
        made = Stimulus("", prefix, nouns, between, second, p, shift)
        out.append(made._replace(text="".join(made.segments)))
    return out


def novel_pairing(groups, *, seed=12345, method="official"):
    """For each of n sequences the place of one in another group: groups int [n] -> int [n].

    method: "official" draws for each group, in order of appearance, from the places of other groups that no
    earlier group drew, in ascending order and with replacement within a draw; "distinct" gives every place to
    one sequence.
    Raises: ValueError for another method, or where no place of another group is left.
    """
    groups = np.asarray(groups)
    n, places = dims(groups=(groups, "n"))["n"], np.arange(len(groups))
    one_of("method", method, PAIRINGS)
    out, free = np.zeros(n, int), np.ones(n, bool)
    if method == "distinct":
        rng = np.random.default_rng(seed)
        ids, size = np.unique(groups, return_counts=True)
        if n and 2 * size.max() > n:
            raise ValueError(f"groups must each hold at most half of the {n} sequences, got {size.max()}")
        # sorted by group, a shift by the largest group leads out of every group
        order = np.concatenate(
            [rng.permutation(places[groups == g]) for g in rng.permutation(ids)] or [places]
        )
        out[order] = np.roll(order, -size.max(initial=0))
        return out
    rng = np.random.RandomState(seed)  # the released stimuli are drawn by it
    for g in dict.fromkeys(groups.tolist()):
        left = places[(groups != g) & free]
        if not left.size:
            raise ValueError(f"groups leave no sequence of another group for group {g}")
        out[groups == g] = rng.choice(left, size=(groups == g).sum())
        free[out[groups == g]] = False
    return out


def _permuted(nouns, j):
    """The nouns in another order, by the released code's seeds."""
    draw = lambda seed: tuple(np.random.RandomState(seed).permutation(nouns).tolist())
    order, again = draw((543 + j) * 5), 123
    while order == nouns:
        order, again = draw(again), again + 10
    return order


def _check_build(pools, condition, list_length):
    one_of("condition", condition, CONDITIONS)
    shortest, least = min(map(len, pools), default=0), 2 if condition == "permute" else 1
    if not least <= list_length <= shortest:
        raise ValueError(f"list_length must be in {least}..{shortest} to {condition}, got {list_length}")
    for p, pool in enumerate(pools):
        if len(set(pool)) < len(pool):
            raise ValueError(f"pools[{p}] holds a noun twice")
    if condition == "novel" and len({n for pool in pools for n in pool}) < sum(map(len, pools)):
        raise ValueError("pools must be disjoint, or a novel list may hold a noun of the first")
