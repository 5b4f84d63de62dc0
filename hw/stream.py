"""The stream accelerator event by event: what closed forms leave to the schedule."""

from dataclasses import dataclass

from ref.blocks.stream import linear_cycles


def simulate_pipeline(cycles, *, buffers=2):
    """(finish cycle, starts) of pieces that pass stages in order: cycles [items][stages].

    Between neighbouring stages stand `buffers` slots (2: ping-pong). A stage takes the next piece when it is
    there, the stage is free, and the slot that its result needs has been emptied: a slot is taken when the
    piece starts before it and freed when the next stage is through with it.
    Raises: ValueError for fewer than one buffer or rows of different length.
    """
    if buffers < 1 or len({len(row) for row in cycles}) > 1:
        raise ValueError(f"need buffers >= 1 and rows of one length, got {buffers=}")
    start, end = [], []
    for i, row in enumerate(cycles):
        start.append([0] * len(row))
        end.append([0] * len(row))
        for s, n in enumerate(row):
            at = end[i][s - 1] if s else 0
            if i:
                at = max(at, end[i - 1][s])
            if s + 1 < len(row) and i >= buffers:
                at = max(at, end[i - buffers][s + 1])
            start[i][s], end[i][s] = at, at + n
    return (end[-1][-1] if end and end[-1] else 0), start


def simulate_experts(lengths, n_in, hidden, *, buffers=2, **unit):
    """Cycles of the experts in order, loading the next layer's weights while this one computes.

    Never below `moe_cycles`; above it by the first load, and by what a short queue makes the loads wait.
    """
    rows = []
    for tokens in lengths:
        for a, b in ((n_in, hidden), (hidden, n_in)):
            if tokens:
                c = linear_cycles(int(tokens), a, b, **unit)
                rows.append((c.weights, c.compute))
    return simulate_pipeline(rows, buffers=buffers)[0]


@dataclass(frozen=True)
class AttentionTrace:
    """Every step of the reordered attention: the key and the query it loads (-1: none), and the pairs it
    forms.
    """

    keys: tuple[int, ...]
    queries: tuple[int, ...]
    pairs: tuple[tuple[tuple[int, int, int], ...], ...]  # (lane, query, key) of each step

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.keys)


def simulate_attention(n, *, parallel=4) -> AttentionTrace:
    """The controller as a state machine: a step counter, a query a lane, one key a step.

    Lane j takes a query at step j of a block and forms pairs with the n keys that come by from then on.
    Raises: ValueError unless 1 <= parallel <= n.
    """
    if not 1 <= parallel <= n:
        raise ValueError(f"parallel must be in 1..{n}, the tokens, got {parallel}")
    lane = [None] * parallel  # (query, pairs still to form)
    keys, queries, pairs = [], [], []
    block = step = 0
    while True:
        loaded = -1
        if step < parallel and (query := block * parallel + step) < n:
            lane[step], loaded = (query, n), query
        formed = []
        for j, held in enumerate(lane):
            if held is not None:
                query, left = held
                formed.append((j, query, step))
                lane[j] = (query, left - 1) if left > 1 else None
        if not formed:
            break
        keys.append(step)
        queries.append(loaded)
        pairs.append(tuple(formed))
        step += 1
        if step == n:
            block, step = block + 1, 0
    return AttentionTrace(tuple(keys), tuple(queries), tuple(pairs))
