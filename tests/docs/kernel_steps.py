"""From a NumPy definition to a Pallas kernel in four steps: shown in docs/start/kernels.md, equal by test."""

import numpy as np

MARGIN, ALPHA = 0.5, 1.0


# --8<-- [start:dense]
def pull(s):
    """How much a token of similarity s counts: s - margin above the margin, an exponential tail below."""
    u = s - MARGIN
    return np.where(u > 0, u, ALPHA * (np.exp(u) - 1))


def unit(x):
    """Rows of length 1."""
    return x / np.sqrt(np.sum(x * x, axis=1, keepdims=True))


def energy_dense(x):
    """x [T, D] -> [T]: the mean over all tokens of `pull`. Writes a T x T array."""
    s = unit(x) @ unit(x).T
    return pull(s).mean(axis=1)
    # --8<-- [end:dense]


# --8<-- [start:programs]
def energy_by_programs(x, block):
    """The same, a tile of rows at a time. The tiles do not know of each other: they may run in parallel."""
    T = len(x)
    energy = np.empty(T)
    for i in range(T // block):  # the grid: one program a tile; block divides T for now
        mine = slice(i * block, (i + 1) * block)
        energy[mine] = pull(unit(x[mine]) @ unit(x).T).mean(axis=1)
    return energy
    # --8<-- [end:programs]


# --8<-- [start:tiles]
def energy_by_tiles(x, block):
    """The same; each program walks the other tokens tile by tile and holds no more than block x block."""
    T = len(x)
    energy = np.empty(T)
    for i in range(T // block):
        rows = unit(x[i * block : (i + 1) * block])
        total = np.zeros(block)  # the accumulator stays on the chip
        for j in range(T // block):
            columns = unit(x[j * block : (j + 1) * block])
            total = total + pull(rows @ columns.T).sum(axis=1)
        energy[i * block : (i + 1) * block] = total / T
    return energy
    # --8<-- [end:tiles]


# --8<-- [start:ragged]
def energy_ragged(x, block):
    """The same for any T: pad with rows of zeros, and let the padding never vote."""
    T = len(x)
    x = np.pad(x, ((0, -T % block), (0, 0)))  # now block divides the length
    length = np.sqrt(np.sum(x * x, axis=1, keepdims=True))
    length = np.where(length == 0, 1.0, length)  # 0 / 0 is no number
    x = x / length
    energy = np.empty(len(x))
    for i in range(len(x) // block):
        total = np.zeros(block)
        for j in range(len(x) // block):
            at = j * block + np.arange(block)  # which tokens these columns are
            s = x[i * block : (i + 1) * block] @ x[at].T
            total = total + np.where(at < T, pull(s), 0.0).sum(axis=1)
        energy[i * block : (i + 1) * block] = total / T
    return energy[:T]
    # --8<-- [end:ragged]


# --8<-- [start:unmasked]
def error_without_mask(x, block):
    """How far the energies are off if the padding votes: (found, predicted)."""
    T = len(x)
    padded = -T % block
    extra = padded * pull(np.array(0.0)) / T  # a row of zeros has the similarity 0 with everyone
    s = unit(x) @ np.pad(unit(x), ((0, padded), (0, 0))).T
    return pull(s).sum(axis=1) / T - energy_dense(x), extra
    # --8<-- [end:unmasked]


# --8<-- [start:wasted]
def wasted(T, block):
    """(programs, steps of each, share of the products that padding wastes)."""
    n = -(-T // block)
    return n, n, 1 - (T / (n * block)) ** 2
    # --8<-- [end:wasted]


# --8<-- [start:running]
def row_softmax_by_tiles(s, block):
    """softmax of each row of s [L, S], reading the row twice and holding one tile at a time."""
    L, S = s.shape
    m, l = np.full((L, 1), -np.inf), np.zeros((L, 1))
    for j in range(0, S, block):
        tile = s[:, j : j + block]
        m_new = np.maximum(m, tile.max(axis=1, keepdims=True))
        l = l * np.exp(m - m_new) + np.exp(tile - m_new).sum(axis=1, keepdims=True)
        m = m_new
    return np.concatenate([np.exp(s[:, j : j + block] - m) / l for j in range(0, S, block)], axis=1)
    # --8<-- [end:running]


# --8<-- [start:makespan]
def makespan(costs, workers):
    """When the last worker ends, if each job in turn goes to the worker that is free first."""
    free = [0] * workers
    for c in costs:
        free[free.index(min(free))] += c
    return max(free)
    # --8<-- [end:makespan]
