"""Closed forms of a PIM machine: ticks of products without a timeline, of kernels, of batches.

Each term follows from a rule of `hw.pim_schedule.Channel`; tests hold both equal to the tick.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

from hw.pim_schedule import PROGRAM_COLUMNS, REGISTERS, check_shape, matvec_timeline, tile_columns


@dataclass(frozen=True)
class KernelCycles:
    """Cycles of a kernel in memory, and of moving its operands over the pins without computing."""

    pim: int
    stream: int


def matvec_cycles(m, k, target) -> int:
    """Ticks of y = W x with m outputs and k inputs, by formula; refresh is left out.

    wave_outer, every term from the rules of `Channel`: t_start and the first mode change; then a broadcast
    and a mode change, tRP and ACT->MAC at each new row, the columns, and between tiles a mode change or,
    after the last tile of a wave, the drain and its turn-around.
    """
    m, k = check_shape(m, k)
    if target.open_columns != target.row_columns:
        raise ValueError("row_interleave has no closed form here: use matvec_timeline")
    form = {"wave_outer": _wave_outer_cycles, "tile_outer": _tile_outer_cycles, "register": _register_cycles}
    return form[target.order](m, k, target)


def _gaps(t):
    """Ticks from the start of a last column command to: MACs or rows after a broadcast, a broadcast after
    MACs, a drain after MACs.
    """
    change = t.t_issue + t.t_mode if t.t_mode else 0
    step = t.mac_span(1)
    return change or t.t_burst, max(change, step), max(change, step, t.t_drain)


def _wave_outer_cycles(m, k, t):
    waves, tiles = -(-m // t.outputs), tile_columns(k, t)
    to_row, to_broadcast, to_drain = _gaps(t)
    full, rest, count = t.tile_columns, tiles[-1], len(tiles)
    head = t.t_start + t.t_mode + (tiles[0] - 1) * t.t_burst + to_row
    macs = lambda c: t.mac_span(c) - t.mac_span(1)  # first to last
    turn = max(t.t_turn, t.t_burst)
    steps = []  # (how often, columns before, columns after, is there a drain between)
    if count > 1:
        steps += [(waves * (count - 2), full, full, False), (waves, full, rest, False)]
    steps += [(waves - 1, rest, tiles[0], True)]
    tail = macs(rest) + to_drain + t.t_end
    if not t.pack_rows:
        total = head + t.t_act_mac + tail
        for n, c, after, drained in steps:
            last = t.t_act_mac + macs(c)
            column = last + to_drain if drained else last
            ready = column + (turn if drained else to_broadcast) + (after - 1) * t.t_burst + to_row
            total += n * (max(ready, t.t_ras, column + t.t_rtp) + t.t_rp)
        return total
    total, wave = head + t.t_act_mac + tail, sum(tiles)
    reopen = t.t_rp + t.t_act_mac
    aligned = -(-waves // (t.row_columns // gcd(wave, t.row_columns)))  # waves that start with a row
    rows = -(-waves * wave // t.row_columns)
    across = rows - aligned * count  # rows that open in the middle of a run
    total += across * (max(t.t_rtp, t.mac_span(1)) + reopen - t.mac_span(1))
    for n, c, after, drained in steps:
        at = turn if drained else to_broadcast
        ready = at + (after - 1) * t.t_burst + to_row  # after the last column command
        total += n * (macs(c) + (to_drain if drained else 0) + ready)
        opens = n * aligned // waves if not drained else aligned - 1
        total += opens * (reopen + max(0, t.t_rtp - ready))
    return total


def _tile_outer_cycles(m, k, t):
    runs, tiles = -(-m // t.outputs), tile_columns(k, t)
    to_row, _, to_drain = _gaps(t)
    change = t.t_issue + t.t_mode if t.t_mode else 0
    step, width = t.mac_span(1), t.row_columns
    shut = max(t.t_rtp, t.t_burst)  # a drain to the precharge
    swap = max(t.t_rp, change) + t.t_act_mac  # a precharge after a drain to the next MAC
    drained = to_drain + (change or t.t_burst) - step  # what a drain in an open row adds
    turn = max(t.t_turn - shut - t.t_rp, 0)

    def compute(c):
        """First activate of a tile to the tick after its last precharge."""
        if not t.pack_rows:
            one = max(t.t_act_mac + t.mac_span(c) - step + to_drain + shut, t.t_ras)
            return runs * one + (runs - 1) * (swap - t.t_act_mac) + t.t_rp
        rows = -(-runs * c // width)
        z, e = runs * c - width * (rows - 1), runs - width * (rows - 1) // c
        met = (rows - 1) // (c // gcd(c, width))  # rows that end where a run ends
        inside = runs - met - 1  # drains that MACs of the same row follow
        last = t.t_act_mac + (z - 1) * step + (e - 1) * drained + to_drain + shut
        total = t.t_act_mac + (runs * c - 1) * step + inside * drained + to_drain + shut + t.t_rp
        total += met * (to_drain + shut + swap - step)
        total += (rows - 1 - met) * (max(t.t_rtp, step) + t.t_rp + t.t_act_mac - step)
        return total + max(0, t.t_ras - last)

    if t.double_buffer_gb:
        total = t.t_start + tiles[0] * t.t_burst + compute(tiles[-1])
        pairs = list(pairwise(tiles))  # a tile computes while the next one is loaded
        return total + sum(pairs.count(p) * max(compute(p[0]), p[1] * t.t_burst) for p in set(pairs))
    load = lambda c: (c - 1) * t.t_burst + to_row
    total = t.t_start + t.t_mode + load(tiles[0])
    for n, c in ((len(tiles) - 1, t.tile_columns), (1, tiles[-1])):
        total += n * compute(c) if n else 0
    if len(tiles) > 1:
        total += (len(tiles) - 2) * (turn + load(t.tile_columns)) + turn + load(tiles[-1])
    return total


def _register_cycles(m, k, t):
    waves, inputs = -(-m // t.outputs), -(-k // t.lanes)
    write = lambda n: max(
        t.t_act_write + (n - 1) * t.t_ccd + t.t_cwl + t.t_burst + t.t_wr, t.t_ras, t.t_act_write + n * t.t_ccd
    )
    macs = lambda n: max(t.t_act_mac + (n - 1) * t.t_ccd + max(t.t_rtp, t.t_ccd), t.t_ras)
    reads = max(t.t_act_read + (t.units * REGISTERS - 1) * t.t_burst + max(t.t_rtp, t.t_burst), t.t_ras)
    groups, rest = divmod(inputs, REGISTERS)
    sizes = [REGISTERS] * groups + ([rest] if rest else [])
    pairs = groups * (write(REGISTERS) + macs(REGISTERS**2) + 2 * t.t_rp)
    pairs += write(rest) + macs(rest * REGISTERS) + 2 * t.t_rp if rest else 0
    change = max(t.t_rp, t.t_issue + t.t_mode)  # a mode change runs beside a precharge
    wave = write(PROGRAM_COLUMNS) + t.t_rp + pairs - t.t_rp + change + reads
    return t.t_start + t.t_mode + waves * wave + (waves - 1) * change + t.t_rp * bool(sizes)


# Kernels.


def kernel_cycles(op, n_out, n_in, target) -> KernelCycles:
    """Cycles of op on the machine, and of streaming its operands over the pins.

    Args: op: "gemv" (n_out rows of n_in inputs), or "add", "mul", "relu" on n_out = n_in elements.
    stream = t_burst a 32-byte column and channel, over 1 - tRFC / tREFI. An elementwise kernel reads its
    operands and writes its result, a stream of columns each: eight at a time from registers on HBM-PIM, with
    a row change between streams; four results at a time on a machine without registers, which uses one bank
    of each group for each stream.
    """
    n_out, n_in = check_shape(n_out, n_in)
    if op not in ("gemv", "add", "mul", "relu"):
        raise ValueError(f'op must be "gemv", "add", "mul" or "relu", got {op!r}')
    t = target
    if op != "gemv" and n_out != n_in:
        raise ValueError(f"n_out and n_in must be equal for {op!r}, got {n_out} and {n_in}")
    streams = {"gemv": n_in, "add": 3, "mul": 3, "relu": 2}[op]
    moved = -(-n_out * streams * 2 // (t.channels * t.column_bytes))
    share = 1 - t.t_rfc / t.t_refi if t.refresh else 1
    stream = round(moved * t.t_burst / share)
    if op == "gemv":
        return KernelCycles(matvec_timeline(n_out, n_in, t).cycles, stream)
    results = -(-n_out // (t.channels * t.lanes))  # columns of the result in a channel
    change = t.t_rtp + t.t_rp + t.t_act_read
    if t.order == "register":
        groups = -(-results // (t.units * REGISTERS))
        program = t.t_act_write + (PROGRAM_COLUMNS - 1) * t.t_ccd + t.t_cwl + t.t_burst + t.t_wr + t.t_rp
        work = 2 * t.t_mode + program + groups * (streams * REGISTERS * t.t_ccd + (streams - 1) * change)
    else:
        steps = -(-results // 4)
        rows = -(-steps // t.row_columns)
        work = t.t_start + 2 * t.t_mode + rows * change + steps * streams * t.t_ccd
    return KernelCycles(with_refresh(work, t), stream)


def with_refresh(work, target) -> int:
    """Ticks of `work` ticks with the refreshes that fall due meanwhile."""
    total, due = work, target.refresh_due
    while target.refresh and due <= total:
        total, due = total + target.t_rfc, due + target.t_refi
    return total


def batch_cycles(m, k, target, batch) -> int:
    """Ticks of `batch` vectors, by replay of up to three of them: each further one adds the same."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    t = lambda b: matvec_timeline(m, k, target, batch=b).cycles
    if batch <= 3:
        return t(batch)
    return t(3) + (batch - 3) * (t(3) - t(2))


def crossover_batch(m, k, target) -> float:
    """Vectors from which on it is faster to send the weights over the pins once and compute outside.

    The host is taken to keep up with the pins; stream time over the time of one more vector in the banks.
    """
    still = replace(target, refresh=False)
    stream = kernel_cycles("gemv", m, k, still).stream
    more = [batch_cycles(m, k, still, b) for b in (2, 3)]
    return stream / min(more[1] - more[0], matvec_timeline(m, k, still).cycles)


def weights_columns(m, k, target) -> int:
    """Columns of a bank that y = W x with m outputs and k inputs reads."""
    m, k = check_shape(m, k)
    waves = -(-m // target.outputs)
    if target.order == "register":
        return waves * -(-k // target.lanes) * REGISTERS
    return waves * sum(tile_columns(k, target))


def weights_rows(m, k, target) -> int:
    """Rows of a bank that the weights of m outputs and k inputs take."""
    columns = weights_columns(m, k, target)
    if target.order == "register":
        return -(-columns // (target.row_columns * target.banks // target.units))
    waves, tiles, width = -(-m // target.outputs), tile_columns(k, target), target.open_columns
    if not target.pack_rows:
        return waves * sum(-(-c // width) for c in tiles)
    if target.order == "wave_outer":
        return -(-columns // width)
    return sum(-(-waves * c // width) for c in tiles)
