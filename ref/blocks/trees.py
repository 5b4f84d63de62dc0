"""Rooted trees over scored edges, as arrays of parents: the root's parent is -1.

Source: Chu and Liu 1965, Edmonds 1967 (the arborescence of largest total score).
"""

import numpy as np


def spanning_tree(score, root, *, method="edmonds"):
    """Parents [N] of a tree from `root` with a large sum of score[child, parent].

    Args: score [N, N], finite; the diagonal is not read. root: index.
      method: "edmonds", the largest sum there is; "greedy", every child's best parent, where each cycle is
        then cut at the child that loses least by a parent outside of it.
    Raises: ValueError for fewer than 2 nodes, a score that is not finite, a root out of range or a method
      unknown.
    """
    score = np.array(score, np.float64)
    N = len(score)
    if score.shape != (N, N) or N < 2:
        raise ValueError(f"score must be [N, N] with at least 2 nodes, got {list(score.shape)}")
    if not np.isfinite(score).all():
        raise ValueError("score must be finite")
    if not 0 <= root < N:
        raise ValueError(f"root must be in 0..{N - 1}, got {root}")
    if method not in ("edmonds", "greedy"):
        raise ValueError(f'method must be "edmonds" or "greedy", got {method!r}')
    np.fill_diagonal(score, -np.inf)
    return (_edmonds if method == "edmonds" else _greedy)(score, root)


def node_depths(parents):
    """Edges between every node and the root: [N]. Raises: ValueError unless parents form one rooted tree."""
    parents = np.asarray(parents)
    N = len(parents)
    if (parents == -1).sum() != 1 or parents.min(initial=-1) < -1 or parents.max(initial=-1) >= N:
        raise ValueError(f"parents must be indices in 0..{N - 1} with one -1, the root, got {parents}")
    depths, at = np.zeros(N, int), parents.copy()
    for _ in range(N):
        depths += at >= 0
        at = np.where(at >= 0, parents[at], -1)
    if (at >= 0).any():
        raise ValueError(f"parents must lead to the root, but hold a cycle: {parents}")
    return depths


def tree_depth(parents):
    """Edges on the longest way from the root."""
    return int(node_depths(parents).max())


def subtree_sizes(parents):
    """How many nodes hang on every node, itself included: [N]."""
    return _sizes(np.asarray(parents), node_depths(parents))


def cut_tree(parents, n_parts):
    """Part of every node, 0 the root's: [N]. The tree falls into n_parts by cutting one edge after another.

    Each cut is the most even one there is: it makes the smaller of its two sides as large as possible; of
    equals the one above the lowest node. Raises: ValueError for n_parts outside 1..N.
    """
    N = len(parents)
    if not 1 <= n_parts <= N:
        raise ValueError(f"n_parts must be in 1..{N}, got {n_parts}")
    forest, labels, depths = np.array(parents), np.zeros(N, int), node_depths(parents)
    for part in range(1, n_parts):
        sizes = _sizes(forest, depths)
        whole = np.bincount(labels)[labels]
        smaller = np.where(forest >= 0, np.minimum(sizes, whole - sizes), -1)
        top = int(smaller.argmax())
        forest[top] = -1
        for node in np.argsort(depths, kind="stable"):  # the root of a part first
            labels[node] = (
                part if node == top else labels[forest[node]] if forest[node] >= 0 else labels[node]
            )
    return labels


def _sizes(parents, depths):
    sizes = np.ones(len(parents), int)
    for node in np.argsort(-depths, kind="stable"):  # leaves first
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    return sizes


def _edmonds(score, root):
    """Best parents; a cycle is made one node, the rest solved, and the cycle opened where the rest enters."""
    parents = score.argmax(axis=1)
    parents[root] = -1
    cycle = _cycle(parents)
    if cycle is None:
        return parents
    others = np.setdiff1d(np.arange(len(score)), cycle)
    loss = score[np.ix_(cycle, others)] - score[cycle, parents[cycle]][:, None]
    inner = np.full((len(others) + 1,) * 2, -np.inf)  # the cycle is the last node
    inner[:-1, :-1] = score[np.ix_(others, others)]
    inner[-1, :-1] = loss.max(axis=0)
    inner[:-1, -1] = score[np.ix_(others, cycle)].max(axis=1)
    found = _edmonds(inner, int(np.flatnonzero(others == root)[0]))
    for child, parent in zip(others, found[:-1], strict=True):
        into_cycle = parent == len(others)
        parents[child] = cycle[score[child, cycle].argmax()] if into_cycle else others[parent]
    parents[root] = -1
    parents[cycle[loss[:, found[-1]].argmax()]] = others[found[-1]]
    return parents


def _greedy(score, root):
    parents = score.argmax(axis=1)
    parents[root] = -1
    while (cycle := _cycle(parents)) is not None:
        rooted = _rooted(parents)
        best = score[np.ix_(cycle, rooted)]
        at = (best.max(axis=1) - score[cycle, parents[cycle]]).argmax()
        parents[cycle[at]] = rooted[best[at].argmax()]
    return parents


def _cycle(parents):
    """The nodes of one cycle, ascending, or None."""
    for start in range(len(parents)):
        node, seen = start, set()
        while node >= 0 and node not in seen:
            seen.add(node)
            node = int(parents[node])
        if node >= 0:
            cycle, at = [node], int(parents[node])
            while at != node:
                cycle.append(at)
                at = int(parents[at])
            return np.sort(cycle)
    return None


def _rooted(parents):
    """The nodes from which the parents lead to the root."""
    at = np.arange(len(parents))
    for _ in range(len(parents)):
        at = np.where(at >= 0, parents[at], -1)
    return np.flatnonzero(at < 0)
