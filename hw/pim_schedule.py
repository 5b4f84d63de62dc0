"""Commands of a processing-in-memory channel on a timeline: schedules, their replay, their closed forms.

All channels of a machine run the same commands in lockstep, so one channel's list is the whole machine's. A
channel is a state machine (row closed or open, mode, last column command) that issues each command at the
first tick that its rules allow. `hw.pim_cycles` says the same without a timeline; `hw.pim_check` judges a
list without knowing the scheduler.

    wave_outer  for each wave of outputs, for each tile of inputs {broadcast, columns}, then one drain
    tile_outer  for each tile of inputs one broadcast, then all runs of all outputs, a drain after each run
    register    (HBM-PIM) for each wave, for each 128 inputs {register loads, columns}, then the registers

Ticks are the target's; nothing here knows seconds.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

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
    """What one channel did: ticks, commands by kind (column commands as columns), time by row state."""

    cycles: int
    mac: int = 0
    activate: int = 0
    broadcast: int = 0
    drain: int = 0
    precharge: int = 0
    refresh: int = 0
    active_cycles: int = 0
    precharged_cycles: int = 0


def check_shape(m, k):
    """(m, k) as integers of at least 1. Raises: ValueError naming the one that is not."""
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
    m, k = check_shape(m, k)
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
    m, k = check_shape(m, k)
    channel = Channel(target)
    for c in _orders(m, k, target, batch):
        channel.issue(c)
    return _timeline(channel)
