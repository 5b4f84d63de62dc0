"""Commands of a processing-in-memory channel on a timeline: schedules, their replay, their closed forms.

All channels of a machine run the same commands in lockstep, so one channel's list is the whole machine's. A
channel is a state machine (row closed or open, mode, last column command) that issues each command at the
first tick that its rules allow. `matvec_cycles` says the same without a timeline, `hw.pim_check` judges a
list without knowing the scheduler.

    wave_outer  for each wave of outputs, for each tile of inputs {broadcast, columns}, then one drain
    tile_outer  for each tile of inputs one broadcast, then all runs of all outputs, a drain after each run
    register    (HBM-PIM) for each wave, for each 128 inputs {register loads, columns}, then the registers

Ticks are the target's; nothing here knows seconds.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from math import gcd

IO, MAC = "io", "mac"  # modes: pins to buffer and registers, or banks to multipliers
PROGRAM_COLUMNS = 4  # 32-byte writes that load HBM-PIM's command buffer of 32 words
REGISTERS = 8  # vector registers of each of the two files of an HBM-PIM unit


@dataclass(frozen=True)
class Command:
    """One command of a channel: `columns` column accesses from tick `ticks` on (0 for row and mode commands).

    op: MODE_IO, MODE_MAC, WR_GB (broadcast), SWAP (halves of the buffer), ACT, MAC, DRAIN (result read), PRE,
    REF, WR, RD.
    """

    op: str
    channel: int = 0
    row: int = -1
    columns: int = 0
    ticks: int = 0


@dataclass(frozen=True)
class Timeline:
    """What one channel did: ticks, commands by kind (column commands counted in columns), time by row state.

    per_bank: columns that each bank worked on, where asked for.
    """

    cycles: int
    mac: int = 0
    activate: int = 0
    broadcast: int = 0
    drain: int = 0
    precharge: int = 0
    refresh: int = 0
    active_cycles: int = 0
    precharged_cycles: int = 0
    per_bank: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KernelCycles:
    """Cycles of a kernel in memory, and of moving its operands over the pins without computing."""

    pim: int
    stream: int


def _shape(m, k):
    for name, n in (("m", m), ("k", k)):
        if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    return int(m), int(k)


def tile_columns(k, target) -> list[int]:
    """Columns of each tile of k inputs: full buffers, then the rest; a part of a column is a whole one."""
    full, rest = divmod(k, target.tile)
    return [target.tile_columns] * full + ([-(-rest // target.lanes)] if rest else [])


# Order of commands, without times.


def _orders(m, k, target, batch=1):
    if target.order == "wave_outer":
        return _wave_outer(m, k, target, batch)
    if target.order == "tile_outer":
        return _tile_outer(m, k, target, batch)
    return _register(m, k, target, batch)


class _Rows:
    """Where the columns lie: back to back, or a new row for every run."""

    def __init__(self, target):
        self.target, self.row, self.used = target, -1, 0

    def take(self, columns):
        """Row commands and MACs of a run of columns, opening rows as they are needed."""
        if not self.target.pack_rows:
            self.used = self.target.open_columns
        while columns:
            if self.row < 0 or self.used == self.target.open_columns:
                yield from self.close()
                self.row, self.used = self.row + 1, 0
                yield Command("ACT", row=self.row)
                self.open = True
            n = min(columns, self.target.open_columns - self.used)
            yield Command("MAC", row=self.row, columns=n)
            self.used, columns = self.used + n, columns - n

    def fill(self):
        """The next run starts a new row."""
        self.used = self.target.open_columns

    open = False

    def close(self):
        """Precharge what is open."""
        if self.open:
            yield Command("PRE", row=self.row)
        self.open = False


class _Modes:
    """Mode changes, only where the machine has them and only when the mode differs."""

    def __init__(self, target):
        self.has, self.now = target.t_mode > 0, None

    def to(self, mode):
        """The command that enters a mode, if it takes one."""
        if self.has and self.now != mode:
            yield Command("MODE_IO" if mode == IO else "MODE_MAC")
        self.now = mode


def _wave_outer(m, k, target, batch):
    waves, tiles = -(-m // target.outputs), tile_columns(k, target)
    rows, modes = _Rows(target), _Modes(target)
    reuse = batch > 1 and target.batch_reuse
    for _ in range(1 if reuse else batch):
        for _ in range(waves):
            for t, c in enumerate(tiles):
                for b in range(batch if reuse else 1):
                    yield from modes.to(IO)
                    yield Command("WR_GB", columns=c)
                    yield from modes.to(MAC)
                    if b == 0:
                        yield from rows.take(c)
                    else:  # the weights are in the row buffer still
                        yield Command("MAC", row=rows.row, columns=c)
                    if reuse or t == len(tiles) - 1:  # one result register: another vector needs a drain
                        yield from modes.to(IO)
                        yield Command("DRAIN", columns=1)


def _tile_outer(m, k, target, batch):
    runs, tiles = -(-m // target.outputs), tile_columns(k, target)
    rows, modes = _Rows(target), _Modes(target)
    steps = [c for _ in range(batch) for c in tiles]
    ahead = target.double_buffer_gb
    for t, c in enumerate(steps):
        if not ahead or t == 0:
            yield from modes.to(IO)
            yield Command("WR_GB", columns=c)
        if ahead:
            yield Command("SWAP")
            if t + 1 < len(steps):
                yield Command("WR_GB", columns=steps[t + 1])
        rows.fill()
        for r in range(runs):
            yield from modes.to(MAC)
            yield from rows.take(c)
            yield from modes.to(IO)
            yield Command("DRAIN", row=rows.row, columns=1)
            if r == runs - 1 or rows.used == target.open_columns or not target.pack_rows:
                yield from rows.close()


def _register(m, k, target, batch):
    """HBM-PIM: eight outputs a unit in its registers, 128 inputs at a time in the other eight."""
    waves, row = -(-m // target.outputs), 0
    inputs = -(-k // target.lanes)  # registers' worth
    for _ in range(waves * batch):
        yield Command("MODE_MAC")
        yield from _access("WR", row, PROGRAM_COLUMNS)
        for first in range(0, inputs, REGISTERS):
            n = min(REGISTERS, inputs - first)
            yield from _access("WR", row, n)
            yield from _access("MAC", row + 1, n * REGISTERS)
            row += 1
        yield Command("MODE_IO")
        yield from _access("RD", row, target.units * REGISTERS)


def _access(op, row, columns):
    yield Command("ACT", row=row)
    yield Command(op, row=row, columns=columns)
    yield Command("PRE", row=row)


# Times.


class Channel:
    """The state machine: `issue` gives a command its tick, the first that every rule allows.

    free: end of the last row or mode command. last, next: start of the last column command, and the first
    tick that its data leaves free. guard: first tick of a precharge after it.
    """

    def __init__(self, target):
        self.t = target
        self.free, self.last, self.next, self.guard = target.t_start, -1, 0, 0
        self.act = self.pre = -1
        self.opened = False
        self.mac_last = self.drain_last = -1
        self.ref_end, self.due = 0, target.refresh_due
        self.loaded = 0  # end of a broadcast that runs beside the MACs
        self.end = self.active = 0
        self.counts = {}

    def issue(self, c: Command) -> list[Command]:
        """The command at its tick, after the refreshes that fall before it."""
        out = []
        while c.op == "ACT" and self.t.refresh and max(self.free, self.pre_done) >= self.due:
            at = max(self.free, self.pre_done, self.ref_end)
            out.append(replace(c, op="REF", row=-1, ticks=at))
            self.ref_end = self.free = at + self.t.t_rfc
            self.due += self.t.t_refi
            self._count("REF", 1)
        at = getattr(self, f"_{c.op.lower()}")(c)
        self._count(c.op, c.columns or 1)
        out.append(replace(c, ticks=at))
        return out

    def _count(self, op, n):
        self.counts[op] = self.counts.get(op, 0) + n

    @property
    def pre_done(self):
        """First tick at which a closed bank may open."""
        return self.pre + self.t.t_rp if self.pre >= 0 else 0

    def _mode_io(self, c):
        at = max(self.free, self.last + self.t.t_issue if self.last >= 0 else 0)
        self.free = self.end = at + self.t.t_mode
        return at

    _mode_mac = _mode_io

    def _wr_gb(self, c):
        t = self.t
        at = max(self.free, self.next)
        if self.drain_last >= 0:
            at = max(at, self.drain_last + t.t_turn)
        if not self.opened:
            at = max(at, self.pre_done)
        if t.double_buffer_gb:  # the other half of the buffer fills while this one is used
            self.loaded = at + c.columns * t.t_burst
        else:
            self._columns(at, c.columns, t.t_burst)
        return at

    def _swap(self, c):
        """The halves of the buffer change places, once the closed banks and the new slice are ready."""
        self.free = max(self.free, self.pre_done, self.loaded)
        return self.free

    def _act(self, c):
        at = max(self.free, self.next, self.pre_done, self.ref_end)
        self.act, self.opened = at, True
        self.free = at
        return at

    def _mac(self, c):
        at = max(self.free, self.next, self.act + self.t.t_act_mac)
        span = self.t.mac_span(c.columns)
        self.last = self.mac_last = at + span - self.t.mac_span(1)
        self.next, self.guard = at + span, self.last + self.t.t_rtp
        self.end = max(self.end, self.next)
        return at

    def _drain(self, c):
        at = max(self.free, self.next, self.mac_last + self.t.t_drain)
        self._columns(at, c.columns, self.t.t_burst)
        self.drain_last, self.guard = at, max(self.guard, at + self.t.t_rtp)
        self.end = at + self.t.t_end
        return at

    def _rd(self, c):
        at = max(self.free, self.next, self.act + self.t.t_act_read)
        self._columns(at, c.columns, self.t.t_burst)
        self.guard = self.last + self.t.t_rtp
        return at

    def _wr(self, c):
        t = self.t
        at = max(self.free, self.next, self.act + t.t_act_write)
        self._columns(at, c.columns, t.t_ccd)
        self.guard = self.last + t.t_cwl + t.t_burst + t.t_wr
        return at

    def _pre(self, c):
        at = max(self.free, self.next, self.guard, self.act + self.t.t_ras)
        self.pre, self.opened = at, False
        self.active += at - self.act
        self.free, self.end = at + self.t.t_issue, at + self.t.t_rp
        return at

    def _columns(self, at, columns, step):
        self.last, self.next = at + (columns - 1) * step, at + columns * step
        self.end = max(self.end, self.next)


def _timed(orders, target):
    """(commands with ticks, the channel after them)."""
    channel, out = Channel(target), []
    for c in orders:
        out += channel.issue(c)
    return out, channel


def _timeline(channel):
    n, cycles = channel.counts, channel.end
    active = channel.active + (cycles - channel.act if channel.opened else 0)
    return Timeline(
        cycles,
        n.get("MAC", 0),
        n.get("ACT", 0),
        n.get("WR_GB", 0) + n.get("WR", 0),
        n.get("DRAIN", 0) + n.get("RD", 0),
        n.get("PRE", 0),
        n.get("REF", 0),
        active,
        cycles - active,
    )


def schedule_matvec(m, k, target, *, batch=1) -> list[Command]:
    """Commands of y = W x with m outputs and k inputs in the banks, on every channel, each at its tick.

    batch: vectors in turn, with the weights kept in the row buffer where `batch_reuse`.
    """
    m, k = _shape(m, k)
    one = _timed(_orders(m, k, target, batch), target)[0]
    return [replace(c, channel=ch) for c in one for ch in range(target.channels)]


def replay(commands, target) -> Timeline:
    """Run the commands of every channel through its state machine, in order; their ticks are found anew.

    Refreshes are put where they fall due, not taken from the list. Channels are independent but for the end.
    """
    by_channel = {}
    for c in commands:
        if c.op != "REF":
            by_channel.setdefault(c.channel, []).append(c)
    if not by_channel:
        return Timeline(0)
    lines = [_timeline(_timed(cs, target)[1]) for cs in by_channel.values()]
    return max(lines, key=lambda t: t.cycles)


@lru_cache(maxsize=4096)
def matvec_timeline(m, k, target, *, batch=1) -> Timeline:
    """`replay(schedule_matvec(m, k, target), target)` of one channel, without the lists."""
    m, k = _shape(m, k)
    channel = Channel(target)
    for c in _orders(m, k, target, batch):
        channel.issue(c)
    return _timeline(channel)


# Closed forms, refresh off.


def matvec_cycles(m, k, target) -> int:
    """Ticks of y = W x with m outputs and k inputs, by formula; refresh is left out.

    wave_outer, every term from the rules of `Channel`: t_start and the first mode change; then a broadcast
    and a mode change, tRP and ACT->MAC at each new row, the columns, and between tiles a mode change or,
    after the last tile of a wave, the drain and its turn-around.
    """
    m, k = _shape(m, k)
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
    n_out, n_in = _shape(n_out, n_in)
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
    m, k = _shape(m, k)
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


def merged(lists):
    """Commands of several lists in the order of their ticks."""
    return sorted(chain(*lists), key=lambda c: (c.ticks, c.channel))
