"""A network cut into modules that train apart: where to cut, what waits for a backward pass, how long."""

from typing import NamedTuple

import numpy as np

from ref.checks import one_of
from ref.models.shapes import NetShape

METHODS = ("feature", "infopro", "greedy", "e2e")


def split_blocks(costs, k, *, balanced=True):
    """Ends of k runs of blocks, the last len(costs): (3, 6) cuts six blocks in the middle.

    balanced: the largest sum of costs [n] in a run is the least possible; else equal numbers of blocks, the
    longer runs first. Raises: ValueError unless 1 <= k <= n, or for a cost that is negative or not finite.
    """
    costs = [float(c) for c in costs]
    n = len(costs)
    if not all(0 <= c < np.inf for c in costs):
        raise ValueError(f"costs must be finite and not negative, got {costs}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the number of blocks, got {k}")
    if not balanced:
        return tuple(int(e) for e in np.cumsum([n // k + (i < n % k) for i in range(k)]))
    total = np.concatenate([[0.0], np.cumsum(costs)])
    best = [[np.inf] * (n + 1) for _ in range(k + 1)]  # [runs][blocks]: the least largest sum
    cut = [[0] * (n + 1) for _ in range(k + 1)]
    best[0][0] = 0.0
    for runs in range(1, k + 1):
        for end in range(runs, n + 1):
            for start in range(runs - 1, end):
                worst = max(best[runs - 1][start], total[end] - total[start])
                if worst < best[runs][end]:
                    best[runs][end], cut[runs][end] = worst, start
    ends = [n]
    for runs in range(k, 1, -1):
        ends.insert(0, cut[runs][ends[0]])
    return tuple(ends)


class ModuleBytes(NamedTuple):
    """Bytes that wait for a module's backward pass: of its own blocks, of its decoder, of its head."""

    blocks: int
    decoder: int
    head: int


def activation_memory(config: NetShape, *, boundaries, method, batch, itemsize=4):
    """(ModuleBytes of every module, in order), one alone for "e2e"; what must fit at a time is the largest.

    A block keeps its input, both norms' outputs, q, k, v, the weights of attention, their result, the sum
    between (8 N C + H N W) and the hidden layer before and after GELU (2 N F); merging patches, its norm's
    input and output. Decoders: "feature", an MLP with M = C; "infopro", an image decoder of twelve channels
    at full size.
    """
    one_of("method", method, METHODS)
    ends = (len(config.blocks),) if method == "e2e" else tuple(boundaries)
    check_ends(ends, len(config.blocks))
    out, start = [], 0
    for k, end in enumerate(ends):
        own, top = config.blocks[start:end], config.blocks[end - 1]
        numbers = sum(8 * b.tokens * b.dim + b.heads * b.tokens * b.window + 2 * b.tokens * b.hidden
                      + (2 * b.tokens * 2 * b.dim if b.merges else 0) for b in own)  # fmt: skip
        before = config.blocks[start - 1] if start else own[0]
        decoder = 0
        if k < len(ends) - 1 and method == "infopro":
            # the upsampled map; twelve channels convolved, normed and behind ReLU; the image
            decoder = config.image_size**2 * (top.dim + 3 * 12 + 3)
        elif k < len(ends) - 1 and method == "feature":
            decoder = 3 * top.tokens * top.dim + before.tokens * before.dim  # norm, hidden twice, guess
        head = 0 if method == "e2e" else top.dim + 2 * 128
        out.append(ModuleBytes(*(itemsize * batch * x for x in (numbers, decoder, head))))
        start = end
    return tuple(out)


def pipeline_times(costs, boundaries):
    """(sum of all costs, largest of a module): time a batch end to end, and with a device for every module.

    Each is at work on an earlier batch than the module before it; nothing waits for a backward pass.
    """
    check_ends(tuple(boundaries), len(costs))
    starts = (0, *boundaries[:-1])
    modules = [sum(costs[a:b]) for a, b in zip(starts, boundaries, strict=True)]
    return sum(costs), max(modules)


def check_ends(ends, n):
    """Raise ValueError unless the ends increase to the number of blocks."""
    if not ends or ends[-1] != n or any(b <= a for a, b in zip((0, *ends[:-1]), ends, strict=True)):
        raise ValueError(f"boundaries must increase and end with the number of blocks {n}, got {list(ends)}")
