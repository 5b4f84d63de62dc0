"""Facts to reason over: two-hop composition in a knowledge graph, and comparison of entities by attributes.

Source: Wang, Yue, Su and Sun 2024 (arXiv 2405.15071), sections 3 and 4 and their appendices. Every symbol is
one token. A row of ids is a prompt, its answer and END; labels hold IGNORE where nothing is scored. A fact is
OOD if no inferred fact of the training set uses it.
"""

from typing import NamedTuple

import numpy as np

IGNORE = -100
SPECIAL = ("<pad>", "</a>", "<q>", "<mask>")  # the last tokens of every vocabulary
SLICE = 3000  # the most questions of a test slice


class Questions(NamedTuple):
    """ids [n, T] int32, padded on the right; labels [n, T] int32, IGNORE on prompt and padding."""

    ids: np.ndarray
    labels: np.ndarray


class GrokData(NamedTuple):
    """train: Questions; tests: {slice: Questions}; vocab: names by id; facts [n, 3]: atomic facts as tokens.

    ood [n] bool says which facts are OOD. graph: bool [attributes, E, E], True where value i >= value j
    follows from what is trained on (complex comparison only).
    """

    train: Questions
    tests: dict
    vocab: tuple[str, ...]
    facts: np.ndarray
    ood: np.ndarray
    graph: np.ndarray | None = None


def composition_data(
    rng, *, entities, relations, out_degree=20, ood_fraction=0.05, ratio, holdout=0.005
) -> GrokData:
    """Facts `h r | t` and inferred facts `h r1 r2 | t` over every path h -r1-> b -r2-> t.

    Each head has out_degree distinct relations, each to any entity; ood_fraction of the facts are OOD. Of the
    paths whose two facts are ID a share of holdout is "test_id", of the rest round(ratio |ID facts|) are
    trained on, beside all facts; paths of two OOD facts are "test_ood", mixed ones are dropped.
    Raises: ValueError for out_degree > relations, a fraction outside [0, 1], or too large a ratio.
    """
    if not 1 <= out_degree <= relations:
        raise ValueError(f"out_degree must be in 1..relations={relations}, got {out_degree}")
    _check_fractions(ood_fraction=ood_fraction, holdout=holdout)
    E, D = entities, out_degree
    vocab = (*(f"e{i}" for i in range(E)), *(f"r{i}" for i in range(relations)), *SPECIAL)
    rel = E + rng.permuted(np.tile(np.arange(relations), (E, 1)), axis=1)[:, :D]
    tail, ood = rng.integers(0, E, (E, D)), _pick(rng, E * D, ood_fraction).reshape(E, D)
    facts = np.stack([np.repeat(np.arange(E), D), rel.ravel(), tail.ravel()], axis=1)
    h, i, j = np.indices((E, D, D)).reshape(3, -1)
    bridge = tail[h, i]
    paths = np.stack([h, rel[h, i], rel[bridge, j], tail[bridge, j]], axis=1)
    outside = ood[h, i].astype(int) + ood[bridge, j]
    inside = rng.permutation(paths[outside == 0])
    held = rng.random(len(inside)) < holdout
    trained = _take(inside[~held], ratio, (~ood).sum())
    ask = lambda rows, length=5: _questions(rows[:, :-1], rows[:, -1], length, len(vocab))
    tests = {
        "id_atomic": facts[~ood.ravel()],
        "ood_atomic": facts[ood.ravel()],
        "train_inferred": trained,
        "test_id": inside[held],
        "test_ood": paths[outside == 2],
    }
    return GrokData(
        train=_join(ask(facts), ask(trained)),
        tests={name: ask(rng.permutation(rows)[:SLICE]) for name, rows in tests.items()},
        vocab=vocab,
        facts=facts,
        ood=ood.ravel(),
    )


def comparison_data(
    rng, *, entities, attributes, values=20, ood_fraction=0.1, ratio, holdout=0.1
) -> GrokData:
    """Facts `e attr | value` and questions `attr <q> e1 <mask> e2 | label`, three labels an attribute.

    attr_0 is v1 < v2, attr_1 equal, attr_2 v1 > v2. For each attribute ood_fraction of the entities are OOD.
    Pairs of ID entities: a share of holdout is "test_id", of the rest round(ratio |ID facts|) questions are
    trained on, beside all facts; pairs of OOD entities are "test_ood", mixed ones are dropped. Both orders of
    a pair go to the same place. Raises: ValueError for a fraction outside [0, 1], or too large a ratio.
    """
    _check_fractions(ood_fraction=ood_fraction, holdout=holdout)
    w = _world(rng, entities, attributes, values, ood_fraction)
    inside = rng.permutation(w.pairs[w.outside == 0])
    held = rng.random(len(inside)) < holdout
    trained = _take(_both_orders(inside[~held]), ratio, (~w.ood).sum())
    tests = {
        "id_atomic": w.facts(~w.ood),
        "ood_atomic": w.facts(w.ood),
        "train_inferred": w.ask(trained[:SLICE]),
        "test_id": w.ask(_both_orders(inside[held])[:SLICE]),
        "test_ood": w.ask(_both_orders(rng.permutation(w.pairs[w.outside == 2]))[:SLICE]),
    }
    train = _join(w.facts(np.ones_like(w.ood)), w.ask(trained))
    return GrokData(train, _cut(rng, tests), w.vocab, *w.table())


def complex_comparison_data(
    rng, *, entities, attributes, values=20, ood_fraction=0.1, share=0.03, per_label=50
) -> GrokData:
    """The same world with a search: OOD entities' values are not told, and pairs of them are the questions.

    Trained on: the facts of ID entities, and a share of the pairs with at least one ID entity. a >= b follows
    if a path of known comparisons and known values leads from a to b; both ways is equal, one way is greater,
    since some step of it cannot be turned round. Tests: "test_ood" holds per_label questions of each label
    that follow, but not from the trained pairs alone.
    Raises: ValueError for a fraction outside [0, 1], or if there are too few such questions.
    """
    _check_fractions(ood_fraction=ood_fraction, share=share)
    w = _world(rng, entities, attributes, values, ood_fraction)
    mixed = w.pairs[w.outside < 2]
    trained = _both_orders(rng.permutation(mixed)[: round(share * len(mixed))])
    at_least = w.value[:, :, None] >= w.value[:, None, :]  # [attributes, E, E]
    told = np.zeros(at_least.shape, bool)
    told[tuple(trained.T)] = True
    known = ~w.ood[:, :, None] & ~w.ood[:, None, :]
    graph, alone = follows(at_least & (told | known)), follows(at_least & told)
    rows = rng.permutation(_both_orders(w.pairs[w.outside == 2]))
    a, i, j = rows.T
    hard = (graph[a, i, j] | graph[a, j, i]) & ~alone[a, i, j] & ~alone[a, j, i]
    sign = graph[a, i, j].astype(int) - graph[a, j, i]
    few = min(np.sum(hard & (sign == s)) for s in (-1, 0, 1))
    if few < per_label:
        raise ValueError(f"per_label={per_label} questions of each label asked, but there are {few} of one")
    asked = np.concatenate([rows[hard & (sign == s)][:per_label] for s in (-1, 0, 1)])
    tests = {"id_atomic": w.facts(~w.ood), "train_inferred": w.ask(trained[:SLICE]), "test_ood": w.ask(asked)}
    train = _join(w.facts(~w.ood), w.ask(trained))
    return GrokData(train, _cut(rng, tests), w.vocab, *w.table(), graph)


def follows(edges):
    """The closure of a relation >=: bool [..., E, E] -> True where a path leads from i to j, or i = j."""
    reach = np.asarray(edges) | np.eye(np.shape(edges)[-1], dtype=bool)
    while True:
        f = reach.astype(np.float32)
        further = f @ f > 0
        if (further == reach).all():
            return reach
        reach = further


def corrupt_composition(rng, data, ids, *, position):
    """Prompts [n, 3] `h r1 r2` with the token at `position` (0, 1, 2) changed so that the answer changes.

    Raises: ValueError for another position, or a prompt that no token changes.
    """
    if position not in (0, 1, 2):
        raise ValueError(f"position must be 0 (head), 1 or 2 (relations), got {position}")
    tail = {(h, r): t for h, r, t in data.facts.tolist()}
    answer = lambda h, r1, r2: tail.get((tail.get((h, r1)), r2))
    choices = np.unique(data.facts[:, min(position, 1)]).tolist()

    def others(row):
        swapped = lambda c: (*row[:position], c, *row[position + 1 :])
        return [c for c in choices if answer(*swapped(c)) != answer(*row)]

    return _swap(rng, np.asarray(ids)[:, :3], position, others)


def corrupt_comparison(rng, data, ids, *, position):
    """Prompts [n, 5] with the attribute (0), e1 (2) or e2 (4) changed so that the answer changes.

    An entity gives way to one with the other's value, or with a value 1 off it if the two were equal: the
    least change that turns the label. Raises: ValueError for another position, or a prompt that no token
    changes.
    """
    if position not in (0, 2, 4):
        raise ValueError(f"position must be 0 (attribute), 2 or 4 (entities), got {position}")
    value = {(e, a): v for e, a, v in data.facts.tolist()}
    entities, attributes = (np.unique(data.facts[:, n]).tolist() for n in (0, 1))

    def others(row):
        a, _, e1, _, e2 = row
        if position == 0:  # labels are an attribute's own
            return [c for c in attributes if c != a]
        stays = value[(e2 if position == 2 else e1), a]
        gap = int(value[e1, a] == value[e2, a])
        return [e for e in entities if abs(value[e, a] - stays) == gap and e not in (e1, e2)]

    return _swap(rng, np.asarray(ids)[:, :5], position, others)


class _World(NamedTuple):
    """value and ood [attributes, E]; pairs [n, 3] (attribute, i < j), and how many of i, j are OOD [n]."""

    value: np.ndarray
    ood: np.ndarray
    pairs: np.ndarray
    outside: np.ndarray
    vocab: tuple[str, ...]
    first: dict  # the first token of every kind

    def table(self):
        """(facts [n, 3] as tokens: entity, attribute, value; which are OOD [n])."""
        a, e = np.indices(self.value.shape).reshape(2, -1)
        rows = np.stack([e, self.first["a"] + a, self.first["v"] + self.value.ravel()], axis=1)
        return rows, self.ood.ravel()

    def facts(self, which):
        """Questions for the facts chosen by a mask [attributes, E]."""
        rows = self.table()[0][which.ravel()]
        return _questions(rows[:, :2], rows[:, 2], 7, len(self.vocab))

    def ask(self, rows):
        """Questions for rows (attribute, e1, e2)."""
        a, i, j = rows.T
        label = self.first["l"] + 3 * a + 1 + np.sign(self.value[a, i] - self.value[a, j])
        q, mask = (np.full(len(rows), len(self.vocab) - n) for n in (2, 1))
        return _questions(np.stack([self.first["a"] + a, q, i, mask, j], axis=1), label, 7, len(self.vocab))


def _world(rng, entities, attributes, values, ood_fraction):
    names = {
        "e": [f"e{i}" for i in range(entities)],
        "a": [f"attr{i}" for i in range(attributes)],
        "v": [f"v{i}" for i in range(values)],
        "l": [f"attr{i}_{n}" for i in range(attributes) for n in range(3)],
    }
    starts = np.cumsum([0, *map(len, names.values())])[:-1]
    value = rng.integers(0, values, (attributes, entities))
    ood = np.stack([_pick(rng, entities, ood_fraction) for _ in range(attributes)])
    i, j = np.triu_indices(entities, 1)
    a = np.repeat(np.arange(attributes), len(i))
    pairs = np.stack([a, np.tile(i, attributes), np.tile(j, attributes)], axis=1)
    outside = ood[a, pairs[:, 1]].astype(int) + ood[a, pairs[:, 2]]
    vocab = (*(n for kind in names.values() for n in kind), *SPECIAL)
    return _World(value, ood, pairs, outside, vocab, dict(zip(names, starts.tolist(), strict=True)))


def _both_orders(pairs):
    """Rows (a, i, j) each followed by (a, j, i)."""
    return np.stack([pairs, pairs[:, [0, 2, 1]]], axis=1).reshape(-1, 3)


def _pick(rng, n, share):
    """bool [n], round(share n) of them True."""
    return rng.permutation(n) < round(share * n)


def _take(pool, ratio, facts):
    """The first round(ratio facts) rows of the pool."""
    count = round(ratio * facts)
    if not 0 <= count <= len(pool):
        raise ValueError(f"ratio={ratio} asks for {count} inferred facts, but the pool holds {len(pool)}")
    return pool[:count]


def _questions(prompts, answers, length, vocab):
    """Questions of prompts [n, p] and answers [n]; END and padding are fixed places in the vocabulary."""
    n, p = prompts.shape
    ids, labels = np.full((n, length), vocab - 4, np.int32), np.full((n, length), IGNORE, np.int32)
    ids[:, :p], ids[:, p], ids[:, p + 1] = prompts, answers, vocab - 3
    labels[:, p : p + 2] = ids[:, p : p + 2]
    return Questions(ids, labels)


def _join(a, b):
    return Questions(*(np.concatenate(x) for x in zip(a, b, strict=True)))


def _cut(rng, tests):
    """Slices of at most SLICE rows; facts are drawn, pairs already were."""
    kept = {name: rng.permutation(len(q.ids))[:SLICE] for name, q in tests.items()}
    return {name: Questions(q.ids[kept[name]], q.labels[kept[name]]) for name, q in tests.items()}


def _swap(rng, prompts, position, others):
    out = prompts.copy()
    for n, row in enumerate(prompts.tolist()):
        if not (choices := others(row)):
            raise ValueError(f"ids[{n}] = {row}: no token at position {position} changes the answer")
        out[n, position] = rng.choice(choices)
    return out


def _check_fractions(**fractions):
    for name, x in fractions.items():
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {x}")
