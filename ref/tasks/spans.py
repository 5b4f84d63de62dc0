"""How well spans and tags are found: exact match and F1 of answers, F1 of entities.

Source: Rajpurkar et al. 2016 (SQuAD) for answers, here by token positions; Tjong Kim Sang and De Meulder 2003
(CoNLL) for entities, in the strict reading of BIO tags.
"""

import numpy as np

from ref.dims import dims


def span_metrics(predicted, gold):
    """{"exact_match", "f1"}: means over questions, each in 0..1.

    Args: predicted, gold: int [n, 2], first and last token of every answer, both included. F1 of a question
      is 2 common / (predicted + gold) in tokens; a predicted span that ends before it starts is empty.
    Raises: ValueError for no question, or a gold span that ends before it starts.
    """
    if dims(predicted=(predicted, "n 2"), gold=(gold, "n 2"))["n"] < 1:
        raise ValueError("predicted and gold must hold at least one span")
    p, g = np.asarray(predicted), np.asarray(gold)
    if (g[:, 1] < g[:, 0]).any():
        raise ValueError("gold must not end before it starts")
    size = lambda first, last: np.maximum(last - first + 1, 0)
    common = size(np.maximum(p[:, 0], g[:, 0]), np.minimum(p[:, 1], g[:, 1]))
    f1 = 2 * common / (size(*p.T) + size(*g.T))
    return {"exact_match": float((p == g).all(axis=1).mean()), "f1": float(f1.mean())}


def entities(tags):
    """{(kind, first, last)} of one row of BIO tags.

    "B-x" begins an entity of kind x and "I-x" goes on with it; an "I-x" that follows no x is part of none.
    """
    found, begun = set(), None
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        if mark not in ("B", "I", "O") or (mark == "O") != (not kind):
            raise ValueError(f'tags must be "O", "B-kind" or "I-kind", got {tag!r}')
        if begun and (mark != "I" or kind != begun[0]):
            found.add((*begun, i - 1))
            begun = None
        if mark == "B":
            begun = kind, i
    return found


def entity_f1(predicted_tags, gold_tags):
    """2 right / (predicted + gold) over the entities of all rows; 1 if neither side has any.

    Args: lists of rows of BIO tags. Right is an entity of the same kind with the same first and last token.
    Raises: ValueError for rows that do not pair, or a tag that is not BIO.
    """
    if [len(r) for r in predicted_tags] != [len(r) for r in gold_tags]:
        raise ValueError("predicted_tags and gold_tags must have rows of the same lengths")
    pairs = [(entities(p), entities(g)) for p, g in zip(predicted_tags, gold_tags, strict=True)]
    right, total = sum(len(p & g) for p, g in pairs), sum(len(p) + len(g) for p, g in pairs)
    return 2 * right / total if total else 1.0
