"""HBM traffic of a tiled kernel, exactly: which blocks a pipelined grid fetches and writes back.

The grid is walked in row-major order, last axis fastest. A block is fetched when its index differs from the
one of the step before; an output block is written back when its index changes and at the end. Blocks are
clipped at the edges of the array.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from hw.errors import NonConsecutiveRevisit, UnsupportedPrimitive
from hw.program import Kernel, itemsize, walk

WALK_LIMIT = 10**6  # grid steps beyond which a projection is counted in closed form


@dataclass(frozen=True)
class GridOperand:
    """An array [array] in blocks [block]; index_map(*grid indices) is the block's index, a tuple."""

    index_map: Callable
    block: tuple[int, ...]
    array: tuple[int, ...]
    itemsize: float
    output: bool = False
    aliased: bool = False  # an output that shares an input's memory may be revisited: it is fetched again


@dataclass(frozen=True)
class Traffic:
    """Blocks moved and their bytes, one entry an operand."""

    fetches: list[int]
    bytes: list[int]


def grid_traffic(grid, operands) -> Traffic:
    """Blocks and bytes that each operand moves over a grid: inputs fetched, outputs written back.

    Raises: ValueError for a grid or block below 1 or an index map of the wrong length; NonConsecutiveRevisit
    for an output block that is left and comes back (its first content would be lost) without being aliased.
    """
    grid = tuple(int(n) for n in grid)
    if any(n < 0 for n in grid):
        raise ValueError(f"grid must hold sizes of at least 0, got {grid}")
    fetches, moved = [], []
    for n, operand in enumerate(operands):
        block, array = tuple(operand.block), tuple(operand.array)
        if len(block) != len(array) or any(b < 1 for b in block):
            raise ValueError(f"operand {n}: block {block} must give a size of at least 1 an axis of {array}")
        f, b = _closed(grid, operand) if prod(grid) > WALK_LIMIT else (None, None)
        if f is None:
            f, b = _walk(grid, operand, n)
        fetches.append(f)
        moved.append(int(-(-b * operand.itemsize // 1)))
    return Traffic(fetches, moved)


def block_indices(grid, operand) -> np.ndarray:
    """[steps, axes]: the block index at every step, by one call on index vectors where the map allows it."""
    steps = np.indices(grid).reshape(len(grid), -1) if grid else np.zeros((0, 1), np.int64)
    n = steps.shape[1]
    try:
        at = _as_tuple(operand.index_map(*steps))
        at = np.stack([np.broadcast_to(np.asarray(a, np.int64), n) for a in at], axis=1) if at else None
        probe = sorted({0, n // 3, n // 2, n - 1}) if n else []
        for p in probe:  # a map that branches in Python may accept arrays and mean something else
            one = _as_tuple(operand.index_map(*(int(s) for s in steps[:, p])))
            if at is None or tuple(int(i) for i in one) != tuple(at[p]):
                raise TypeError
    except (TypeError, ValueError, IndexError, AttributeError):
        rows = [_as_tuple(operand.index_map(*(int(i) for i in s))) for s in steps.T]
        at = np.array(rows, np.int64).reshape(n, -1)
    if at is None:
        at = np.zeros((n, 0), np.int64)
    if at.shape[1] != len(operand.block):
        raise ValueError(f"index_map gives {at.shape[1]} numbers for a block of {len(operand.block)} axes")
    return at


def _as_tuple(x):
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _clipped(index, block, array, element=()):
    """Elements of the blocks at `index` [..., axes] that lie inside the array."""
    out = np.ones(index.shape[:-1], np.int64)
    for d, (b, a) in enumerate(zip(block, array, strict=True)):
        start = index[..., d] * (1 if d in element else b)
        out = out * np.clip(np.minimum(start + b, a) - np.maximum(start, 0), 0, b)
    return out


def _walk(grid, operand, number=0):
    at = block_indices(grid, operand)
    return moved_blocks(at, operand.block, operand.array, operand.output, operand.aliased, number)


def moved_blocks(at, block, array, output=False, aliased=False, number=0, element=()):
    """(blocks moved, elements) for the block index at every step; elements are clipped at the edges."""
    if not len(at):
        return 0, 0
    change = np.ones(len(at), bool)
    change[1:] = (at[1:] != at[:-1]).any(axis=1)
    visits = at[change]
    if output and not aliased:
        distinct, count = np.unique(visits, axis=0, return_counts=True)
        if len(distinct) != len(visits):
            block_at = tuple(int(i) for i in distinct[count > 1][0])
            raise NonConsecutiveRevisit(
                f"output {number}: block {block_at} is written, left and written again; make the grid "
                "axis that revisits it the last one, or alias the output to an input"
            )
    return len(visits), int(_clipped(visits, block, array, element).sum())


def _closed(grid, operand):
    """Fetches and elements of a projection in closed form, or (None, None) if the map is not one."""
    proj = projection(grid, operand.index_map, len(operand.block))
    if proj is None:
        return None, None
    return closed_form(grid, proj, operand.block, operand.array, operand.output and not operand.aliased)


def projection(grid, index_map, axes):
    """For each block axis the grid axis that the map copies, or -k - 1 for the constant k; None otherwise.

    Found by probing: the origin, the far end of each axis, and random steps must agree with the form.
    """
    rng = np.random.default_rng(0)
    call = lambda s: tuple(int(i) for i in _as_tuple(index_map(*(int(i) for i in s))))
    origin = call([0] * len(grid))
    if len(origin) != axes:
        raise ValueError(f"index_map gives {len(origin)} numbers for a block of {axes} axes")
    proj = [-k - 1 for k in origin]
    for g, n in enumerate(grid):
        if n > 1:
            far = call([n - 1 if h == g else 0 for h in range(len(grid))])
            for d in range(axes):
                if far[d] != origin[d]:
                    if proj[d] >= 0 or origin[d] != 0 or far[d] != n - 1:
                        return None
                    proj[d] = g
    for s in rng.integers(0, np.maximum(grid, 1), size=(64, len(grid))):
        if call(s) != tuple(s[p] if p >= 0 else -p - 1 for p in proj):
            return None
    return tuple(proj)


def closed_form(grid, proj, block, array, output=False):
    """Blocks and elements moved: all grid extents up to the innermost axis that the map depends on.

    Each visit of a block moves its clipped size, so along an axis the sizes sum to what lies inside the
    array.
    """
    used = {p for p in proj if p >= 0 and grid[p] > 1}
    inner = max(used, default=-1)
    outer = range(inner + 1)
    if output and any(g not in used and grid[g] > 1 for g in outer):
        raise NonConsecutiveRevisit("an output block is left and written again along an outer grid axis")
    fetches = prod(grid[g] for g in outer)
    if 0 in grid:
        return 0, 0
    # Group the array axes by the grid axis they follow: the clipped sizes of one visit multiply.
    elements = prod(grid[g] for g in outer if g not in used)
    by_axis = {}
    for d, p in enumerate(proj):
        by_axis.setdefault(p if p in used else None, []).append(d)
    for p, axes in by_axis.items():
        index = np.arange(grid[p]) if p is not None else np.zeros(1, np.int64)
        sizes = np.ones(len(index), np.int64)
        for d in axes:
            k = index if p is not None else np.array([0 if proj[d] >= 0 else -proj[d] - 1])
            sizes = sizes * np.clip(array[d] - k * block[d], 0, block[d])
        elements *= int(sizes.sum())
    return fetches, elements


def kernel_bytes(kernel: Kernel) -> tuple[int, int]:
    """(read, written) bytes of main memory of one call of a traced kernel.

    Raises: UnsupportedPrimitive if an index map depends on prefetched scalars.
    """
    read = write = 0
    for o in kernel.operands:
        if o.memory == "any":
            continue  # the body moves it by its own copies
        if o.memory == "prefetch":
            read += int(-(-prod(o.array) * itemsize(o.dtype) // 1))  # whole, before the first step
            continue
        if o.moved is None:
            raise UnsupportedPrimitive(
                "pallas_call",
                kernel.grid,
                kernel.name,
                why="an index map of prefetched scalars needs execute",
            )
        read, write = (read, write + o.moved) if o.output else (read + o.moved, write)
    for op in walk(kernel.body):
        read += op.attrs.get("hbm_read", 0) * (op.trips or 0)
        write += op.attrs.get("hbm_write", 0) * (op.trips or 0)
    return read, write
