"""Lean Attention: decode attention as stream-K, every worker an equal run of key tiles, whatever the head.

Source: Sanovar et al. 2024 (arXiv 2405.10480); the grid rule and the fields of the schedule as in the public
Triton kernel of ROCm/aiter; the split heuristic as in Dao-AILab/flash-attention. Partial results are
`SoftmaxState`s, which merge in any order. Inference only: no backward pass.
"""

import heapq
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import check_lengths, check_width
from ref.blocks.softmax import SoftmaxState, finalize, merge, softmax_state
from ref.dims import dims, float64
from ref.example import Example

__all__ = [
    "Schedule", "SoftmaxState", "combine_partials", "decode_makespan", "example", "finalize",
    "flash_decoding_attention", "lean_attention", "merge", "num_splits_heuristic", "stream_k_schedule",
]  # fmt: skip

METHODS = ("fa2", "flash_decoding", "lean")
GRIDS = ("paper", "all")
PER_HEAD = 32  # the paper's grid: about so many programs a head when tiles are few


class Schedule(NamedTuple):
    """Who does which tiles. G = num_programs workers; first, count [G]: their runs on the line of tiles.

    tiles_per_head: tiles of one KV head over the batch. max_tiles, high_load: workers 0..high_load - 1 take
    max_tiles, the others one less. max_splits: most workers an output can have. even: all runs are equal.
    segments [n, 6]: worker, output, tile_lo, tile_hi (inside the output), is_host, is_finishing; ordered by
    worker, then along the line. An output is head * B + batch item.
    """

    tiles_per_head: int
    num_programs: int
    max_tiles: int
    high_load: int
    max_splits: int
    even: bool
    first: np.ndarray
    count: np.ndarray
    segments: np.ndarray


def stream_k_schedule(lengths, num_heads, *, block_n, num_workers, grid="paper"):
    """The `Schedule` of tiles of block_n keys: lengths int [B], num_heads KV heads (section 4 of the paper).

    All tiles stand on one line, head by head, batch item by batch item. With more tiles than workers every
    worker works; with fewer, grid "paper" takes about two tiles a worker, so that the reduction is worth it,
    and "all" one each.
    Raises: ValueError for a length below 1, num_heads, block_n or num_workers below 1, or another grid.
    """
    check_schedule(num_heads=num_heads, block_n=block_n, num_workers=num_workers, grid=grid)
    tiles = _tiles(lengths, num_heads, block_n, num_workers)
    per_head = int(tiles.sum())
    T = num_heads * per_head
    G = grid_size(T, per_head, num_workers, grid)
    most = -(-T // G)
    high = T - (most - 1) * G
    count = np.where(np.arange(G) < high, most, most - 1)
    first = np.cumsum(count) - count
    ends = np.cumsum(np.tile(tiles, num_heads))  # of the outputs, on the line
    segments = []
    for g in range(G):
        at, stop = int(first[g]), int(first[g] + count[g])
        while at < stop:
            output = int(np.searchsorted(ends, at, side="right"))
            start, end = int(ends[output] - tiles[output % len(tiles)]), int(ends[output])
            to = min(end, stop)
            segments.append((g, output, at - start, to - start, at == start, stop >= end))
            at = to
    splits = 2 + (per_head - 2) // (most - 1) if most > 1 and per_head > 1 else per_head
    return Schedule(per_head, G, most, high, splits, T % G == 0, first, count, np.array(segments))


def grid_size(tiles, tiles_per_head, num_workers, grid):
    """Workers with work: all, or when tiles are few about two tiles each ("paper"), or one ("all")."""
    if tiles > num_workers:
        return num_workers
    return min((tiles + 1) // 2, -(-PER_HEAD * tiles // tiles_per_head)) if grid == "paper" else tiles


def lean_attention(
    q, k, v, *, lengths=None, block_n=256, num_workers=108, scale=None, grid="paper", return_lse=False
):
    """softmax(scale q k^T) v for decoding, computed in the segments of `stream_k_schedule` and merged.

    Args: q [B, H, D], or [B, H, L, D] with L rows that all see the same keys; k, v [B, Hkv, S, D(v)], H a
        multiple of Hkv: the query heads of a group are rows of one output, so K and V are read once.
      lengths: int [B], 1 <= n <= S: keys from there on are invisible (None: S). scale: None is 1 / sqrt(D).
      block_n, num_workers, grid: the schedule; they change the rounding, never the result.
    Returns: o like q (Dv behind) float64; with return_lse (o, lse [B, H(, L)]), natural log.
    Raises: ValueError naming the argument at fault.
    """
    rows, k, v, lengths, restore = _prepare(q, k, v, lengths, scale)
    B, heads = k.shape[:2]
    plan = stream_k_schedule(lengths, heads, block_n=block_n, num_workers=num_workers, grid=grid)
    states = {}
    for _, output, lo, hi, _, _ in plan.segments:
        h, b = divmod(int(output), B)
        part = _run(rows[b, h], k[b, h], v[b, h], lengths[b], lo, hi, block_n)
        states[h, b] = merge(states[h, b], part) if (h, b) in states else part
    return restore(states, return_lse)


def flash_decoding_attention(
    q, k, v, *, lengths=None, block_n=256, num_splits=None, num_workers=108, scale=None, return_lse=False
):
    """The same by a fixed split: every output in num_splits parts of ceil(t / num_splits) of its t tiles.

    num_splits: None asks `num_splits_heuristic`. A part beyond the last tile is empty: `merge`'s identity.
    """
    rows, k, v, lengths, restore = _prepare(q, k, v, lengths, scale)
    B, heads = k.shape[:2]
    tiles = _tiles(lengths, heads, block_n, num_workers)
    S = num_splits_heuristic(B * heads, num_workers, int(tiles.max())) if num_splits is None else num_splits
    if S < 1:
        raise ValueError(f"num_splits must be at least 1, got {S}")
    states = {}
    for h in range(heads):
        for b in range(B):
            size = -(-int(tiles[b]) // S)
            parts = [
                _run(
                    rows[b, h], k[b, h], v[b, h], lengths[b], i * size, min((i + 1) * size, tiles[b]), block_n
                )
                for i in range(S)
            ]
            states[h, b] = parts[0]
            for part in parts[1:]:
                states[h, b] = merge(states[h, b], part)
    return restore(states, return_lse)


def combine_partials(o, lse, *, axis=0):
    """(o, lse) of the union of normalised partial results: o [..., n, ..., Dv], lse [..., n, ...], n at axis.

    lse = log sum e^lse_i, o = sum e^(lse_i - lse) o_i; a part that saw no key (lse = -inf) does not count.
    Raises: ValueError if axis is none of lse's.
    """
    dims(o=(o, "... Dv"), lse=(lse, "..."))
    if not -lse.ndim <= axis < lse.ndim:
        raise ValueError(f"axis must be in {-lse.ndim}..{lse.ndim - 1}, got {axis}")
    o, lse = float64(o), float64(lse)
    m = lse.max(axis=axis, keepdims=True)
    p = np.exp(lse - np.where(np.isneginf(m), 0.0, m))
    acc = np.where(p[..., None] > 0, p[..., None] * np.where(p[..., None] > 0, o, 0.0), 0.0)
    axis = axis % lse.ndim
    return finalize(SoftmaxState(np.squeeze(m, axis), p.sum(axis=axis), acc.sum(axis=axis)))


def num_splits_heuristic(num_outputs, num_workers, num_tiles, max_splits=128):
    """The parts of FlashDecoding: the fewest within 85 % of the best wave efficiency.

    1 if the outputs fill 80 % of the workers. A wave's efficiency is x / ceil(x) with x = outputs * S / W; an
    S that leaves as many tiles a part as S - 1 does not come into question.
    """
    for name, n in (("num_outputs", num_outputs), ("num_workers", num_workers), ("num_tiles", num_tiles),
                    ("max_splits", max_splits)):  # fmt: skip
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
    if num_outputs >= 0.8 * num_workers:
        return 1
    waves = lambda S: num_outputs * S / num_workers
    parts = lambda S: -(-num_tiles // S)
    choices = [
        S for S in range(1, min(max_splits, num_workers, num_tiles) + 1) if S == 1 or parts(S) != parts(S - 1)
    ]
    efficiency = {S: waves(S) / np.ceil(waves(S)) for S in choices}
    best = max(efficiency.values())
    return next(S for S in choices if efficiency[S] >= 0.85 * best)


def decode_makespan(
    lengths, num_heads, *, block_n, num_workers, method="lean", grid="all", num_splits=None, merge_cost=0.0,
    launch_cost=0.0,
):  # fmt: skip
    """{makespan, occupancy, waves, num_splits, partial_states} of one decode step, in tiles.

    method: "fa2", a worker an output, each job to whoever is free first; "flash_decoding", the same
      with num_splits (None: the heuristic) equal parts an output and a second launch; "lean", equal runs.
    merge_cost: tiles for merging a partial state, paid by the output with most; launch_cost: of each launch.
    occupancy: tiles over workers * makespan. waves: rounds of the workers. partial_states: states written.
    """
    tiles = _tiles(lengths, num_heads, block_n, num_workers)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    outputs, T = num_heads * len(tiles), num_heads * int(tiles.sum())
    if method == "lean":
        plan = stream_k_schedule(lengths, num_heads, block_n=block_n, num_workers=num_workers, grid=grid)
        partial = int((plan.segments[:, 4] == 0).sum())
        merged = int(np.bincount(plan.segments[:, 1]).max()) - 1
        cost = plan.max_tiles + merge_cost * merged + launch_cost
        return _summary(cost, T, num_workers, 1, plan.max_splits, partial)
    S = 1
    if method == "flash_decoding":
        S = num_splits_heuristic(outputs, num_workers, int(tiles.max())) if num_splits is None else num_splits
        if S < 1:
            raise ValueError(f"num_splits must be at least 1, got {S}")
    jobs = np.repeat(np.tile(-(-tiles // S), num_heads), S)
    cost = _list_schedule(jobs, num_workers) + launch_cost + (S > 1) * (launch_cost + merge_cost * S)
    return _summary(cost, T, num_workers, -(-outputs * S // num_workers), S, outputs * S if S > 1 else 0)


def _summary(makespan, tiles, workers, waves, splits, partial):
    return {
        "makespan": makespan,
        "occupancy": tiles / (workers * makespan),
        "waves": waves,
        "num_splits": splits,
        "partial_states": partial,
    }


def _list_schedule(jobs, workers):
    """When the last of the jobs ends, each given in order to the worker that is free first."""
    if (jobs == jobs[0]).all():
        return int(-(-len(jobs) // workers) * jobs[0])
    free = [0] * min(workers, len(jobs))
    for job in jobs:
        heapq.heapreplace(free, free[0] + int(job))
    return max(free)


def _run(rows, k, v, length, lo, hi, block_n):
    """The state of rows [R, D] over tiles lo..hi of one output, tile by tile."""
    state = SoftmaxState(np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros((len(rows), v.shape[-1])))
    for tile in range(lo, hi):
        at = slice(tile * block_n, min((tile + 1) * block_n, length))  # the last tile ends at the length
        state = merge(state, softmax_state(rows @ k[at].T, v[at]))
    return state


def check_schedule(*, num_heads, block_n, num_workers, grid="all"):
    """Raise ValueError for a bad schedule."""
    for name, n in (("num_heads", num_heads), ("block_n", block_n), ("num_workers", num_workers)):
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
    if grid not in GRIDS:
        raise ValueError(f'grid must be "paper" or "all", got {grid!r}')


def check_decode(q, k, v, lengths):
    """Raise ValueError for a bad decode call; return the axes. Reads shapes, and lengths where known."""
    n = dims(q=(q, "B H D" if len(q.shape) == 3 else "B H L D"), k=(k, "B Hkv S D"), v=(v, "B Hkv S Dv"))
    check_width(n["D"], n["Dv"])
    if n["Hkv"] == 0 or n["H"] % n["Hkv"]:
        raise ValueError(f"q has H={n['H']} heads, not a multiple of the Hkv={n['Hkv']} heads of k and v")
    if n["B"] < 1 or n["S"] < 1:
        raise ValueError(f"k must hold at least one request and one key, got B={n['B']}, S={n['S']}")
    if lengths is not None:
        lengths = np.asarray(lengths) if isinstance(lengths, list | tuple) else lengths
        check_lengths("lengths", lengths, (n["B"],), n["S"], least=1)
    return n


def _tiles(lengths, num_heads, block_n, num_workers):
    """Tiles of each batch item, int [B], after checking."""
    check_schedule(num_heads=num_heads, block_n=block_n, num_workers=num_workers)
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not lengths.size or lengths.min() < 1:
        raise ValueError(f"lengths must be integers [B], each at least 1, got {lengths}")
    return -(-lengths.astype(np.int64) // block_n)


def _prepare(q, k, v, lengths, scale):
    """Scaled rows [B, Hkv, R, D], keys, values, lengths, and what puts the states back in q's shape."""
    n = check_decode(q, k, v, lengths)
    lengths = np.broadcast_to(n["S"] if lengths is None else np.asarray(lengths), (n["B"],))
    q, k, v = float64(q, k, v)
    rows = (1 / np.sqrt(n["D"]) if scale is None else scale) * q.reshape(n["B"], n["Hkv"], -1, n["D"])

    def restore(states, return_lse):
        done = [[finalize(states[h, b]) for h in range(n["Hkv"])] for b in range(n["B"])]
        o = np.array([[x[0] for x in row] for row in done]).reshape(*q.shape[:-1], n["Dv"])
        lse = np.array([[x[1] for x in row] for row in done]).reshape(q.shape[:-1])
        return (o, lse) if return_lse else o

    return rows, k, v, lengths, restore


def example(seed=0):
    """Two requests of 90 and 41 keys of SmolLM2's block 10, nine query heads on three key heads."""
    from ref.data import attention_inputs

    q, k, v = attention_inputs()
    rng = np.random.default_rng(seed)
    both = lambda x: np.stack([x, x[::-1]])
    q = both(q[:, -1]) + 0.1 * rng.standard_normal((2, 9, 64))
    lengths = np.array([90, 41], np.int32)
    options = {"block_n": 16, "num_workers": 7}
    states = [softmax_state(rng.standard_normal((3, 8)), rng.standard_normal((8, 5))) for _ in range(2)]
    o, lse = (np.stack(x) for x in zip(*map(finalize, states), strict=True))
    return [
        Example("lean_attention", (q, both(k), both(v)), {"lengths": lengths, **options}, (0, 1, 2)),
        Example(
            "flash_decoding_attention", (q, both(k), both(v)), {"lengths": lengths, **options}, (0, 1, 2)
        ),
        Example("combine_partials", (o, lse), {}, (0, 1)),
        Example("merge", tuple(states), {}, (0, 1)),
        Example("finalize", (states[0],), {}, (0,)),
    ]
