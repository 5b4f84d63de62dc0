"""A systolic array of rows x cols multipliers: cycles and words in closed form, and the array cycle by cycle.

A product a [m, k] b [k, n] is cut into folds of the array's size. What stays in the cells names the
dataflow: outputs (os), weights (ws) or inputs (is). Source: the fold arithmetic of SCALE-Sim 3.0.0 (MIT),
whose printed cycles are the index of the last one; ours count them, so they are one more.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np

DATAFLOWS = ("os", "ws", "is")


@dataclass(frozen=True)
class SystolicCount:
    """cycles; utilisation: products over cells times cycles; mapping_efficiency: the share of the cells that
    a fold uses, averaged over folds; a_reads, b_reads, out_writes: words of the on-chip memories.
    """

    cycles: int
    utilisation: float
    mapping_efficiency: float
    a_reads: int
    b_reads: int
    out_writes: int
    folds: int = 1


def systolic_cycles(m, n, k, *, rows, cols, dataflow="os", drain=False) -> SystolicCount:
    """Cycles and words of an [m, k] by [k, n] product.

    Args: drain: outputs that stayed in the array (os) are shifted out before the next fold starts.
    Raises: ValueError naming a size below 1 or an unknown dataflow.
    """
    _check(m, n, k, rows, cols, dataflow)
    across = {"os": (m, n), "ws": (k, n), "is": (k, m)}[dataflow]  # what the rows and columns hold
    streamed = {"os": k, "ws": m, "is": n}[dataflow]
    down, right = ceil(across[0] / rows), ceil(across[1] / cols)
    folds = down * right
    if dataflow == "os":
        per_fold = rows + cols + streamed - 2 + (rows if drain else 0)
    else:
        per_fold = 2 * rows + cols + streamed - 2
    cycles = folds * per_fold
    reads = {
        "os": (m * k * ceil(n / cols), n * k * ceil(m / rows), m * n),
        "ws": (m * k * ceil(n / cols), n * k, m * n * ceil(k / rows)),
        "is": (m * k, n * k * ceil(m / cols), m * n * ceil(k / rows)),
    }[dataflow]
    used = across[0] * across[1] / (down * rows * right * cols)
    return SystolicCount(cycles, m * n * k / (rows * cols * cycles), used, *reads, folds)


def dram_words(m, n, k, *, rows, cols, dataflow="os", sram_words=None) -> tuple[int, int, int]:
    """Words of a, b and the result that cross the chip's border, folds taken in the better of both orders.

    An operand that fits into its memory of sram_words (None: no limit) comes once. With outputs that stay, so
    does one whose panel of the outer loop's fold fits; the other comes again for every fold unless it fits.
    Partial sums of ws and is leave and return for every fold of k but the first where they do not fit.
    """
    _check(m, n, k, rows, cols, dataflow)
    count = systolic_cycles(m, n, k, rows=rows, cols=cols, dataflow=dataflow)
    fits = lambda words: sram_words is None or words <= sram_words
    a = 1 if fits(m * k) else count.a_reads // (m * k)
    b = 1 if fits(n * k) else count.b_reads // (n * k)
    panel_a, panel_b = fits(min(rows, m) * k), fits(k * min(cols, n))  # os: a panel is all of k
    if dataflow == "os" and (panel_a or panel_b):
        orders = [(1, b)] * panel_a + [(a, 1)] * panel_b
        a, b = min(orders, key=lambda x: x[0] * m + x[1] * n)
    out = m * n
    if dataflow != "os" and not fits(m * n):
        out *= 2 * ceil(k / rows) - 1
    return a * m * k, b * n * k, out


def simulate_systolic(a, b, *, rows, cols, dataflow="os"):
    """(a b, cycles, a reads, b reads): every register of the array at every cycle.

    a [m, k], b [k, n] integers. Operands enter skewed at the left and top edge and move one cell a cycle.
    """
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    (m, k), n = a.shape, b.shape[1]
    _check(m, n, k, rows, cols, dataflow)
    out, cycles, reads = np.zeros((m, n), np.int64), 0, [0, 0]
    cut = lambda total, size: [range(i, min(i + size, total)) for i in range(0, total, size)]
    if dataflow == "os":
        for i in cut(m, rows):
            for j in cut(n, cols):
                tile, t = _outputs_stay(a[i], b[:, j], rows, cols)
                out[np.ix_(i, j)] = tile[: len(i), : len(j)]
                cycles, reads = cycles + t, [reads[0] + len(i) * k, reads[1] + len(j) * k]
        return out, cycles, *reads
    held, moving = (b, a) if dataflow == "ws" else (a.T, b.T)  # [k, x] stays, [y, k] streams
    result = np.zeros((len(moving), held.shape[1]), np.int64)
    counts = [0, 0]
    for i in cut(k, rows):
        for j in cut(held.shape[1], cols):
            tile, t = _operand_stays(held[np.ix_(i, j)], moving[:, i], rows, cols)
            result[:, j] += tile[:, : len(j)]
            cycles += t
            counts = [counts[0] + len(i) * len(j), counts[1] + len(i) * len(moving)]
    reads = counts if dataflow == "is" else counts[::-1]
    return (result if dataflow == "ws" else result.T), cycles, *reads


def _outputs_stay(a, b, rows, cols):
    k = a.shape[1]
    left, top, acc = (np.zeros((rows, cols), np.int64) for _ in range(3))
    busy = np.zeros((rows, cols), bool)  # which cells hold a pair of this fold
    i, j, t = np.arange(len(a)), np.arange(b.shape[1]), 0
    while t == 0 or busy.any() or t < rows + cols - 2:
        left[:, 1:], top[1:], busy[:, 1:] = left[:, :-1].copy(), top[:-1].copy(), busy[:, :-1].copy()
        left[:, 0], top[0] = 0, 0
        busy[:, 0] = (t >= np.arange(rows)) & (t - np.arange(rows) < k)
        at, to = t - i, t - j
        left[i, 0] = np.where((at >= 0) & (at < k), a[i, np.clip(at, 0, k - 1)], 0)
        top[0, j] = np.where((to >= 0) & (to < k), b[np.clip(to, 0, k - 1), j], 0)
        if not busy.any():
            break
        acc += left * top
        t += 1
    return acc, t


def _operand_stays(held, moving, rows, cols):
    cells = np.zeros((rows, cols), np.int64)
    t = 0
    for _ in range(rows):  # loaded a row a cycle, shifted down
        cells[1:] = cells[:-1].copy()
        source = rows - 1 - t
        cells[0] = 0
        if source < len(held):
            cells[0, : held.shape[1]] = held[source]
        t += 1
    y = len(moving)
    x, partial = (np.zeros((rows, cols), np.int64) for _ in range(2))
    out, left, step = np.zeros((y, cols), np.int64), y * cols, 0
    i = np.arange(moving.shape[1])
    while left:
        x[:, 1:] = x[:, :-1].copy()
        x[:, 0] = 0
        at = step - i
        x[i, 0] = np.where((at >= 0) & (at < y), moving[np.clip(at, 0, y - 1), i], 0)
        partial[1:] = partial[:-1].copy()
        partial[0] = 0
        partial += x * cells
        done = step - (rows - 1) - np.arange(cols)  # the row of `moving` that leaves each column now
        ready = (done >= 0) & (done < y)
        out[done[ready], np.arange(cols)[ready]] = partial[-1, ready]
        left -= int(ready.sum())
        step += 1
    return out, t + step


def _check(m, n, k, rows, cols, dataflow):
    for name, size in (("m", m), ("n", n), ("k", k), ("rows", rows), ("cols", cols)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if dataflow not in DATAFLOWS:
        raise ValueError(f"dataflow must be one of {', '.join(DATAFLOWS)}, got {dataflow!r}")
