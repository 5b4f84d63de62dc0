"""Does a list of PIM commands keep every timing constraint? It knows the rules, not the scheduler."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """A broken rule: which, on which channel, at which command of the list, ticks needed and found."""

    rule: str
    channel: int
    index: int
    needed: int = 0
    found: int = 0


POSTPONED = 8  # refreshes that may wait, as the DRAM standards allow


def check_commands(commands, target) -> list[Violation]:
    """Every constraint that a list of timed commands breaks, on each channel by itself.

    Spacing: ACT-MAC, ACT-RD, ACT-WR, column to column, MAC-DRAIN, DRAIN-WR_GB, column-PRE (reads, writes),
    ACT-PRE, PRE-ACT, PRE-REF, REF-ACT, mode changes. State: columns only in an open row and in the mode that
    they need, no more columns than a row has (for each broadcast, where `batch_reuse` lets further vectors
    pass over an open row), one ACT before each PRE, banks closed at a REF, and no more than 8 refreshes owing
    at any time.
    """
    found, by_channel = [], {}
    for i, c in enumerate(commands):
        by_channel.setdefault(c.channel, []).append((i, c))
    for channel, listed in by_channel.items():
        found += _Judge(channel, target).run(listed)
    return sorted(found, key=lambda v: v.index)


class _Judge:
    """What one channel has done, as dates of events; None for what has not happened."""

    def __init__(self, channel, target):
        self.channel, self.t, self.found = channel, target, []
        self.when = {}  # event: tick
        self.row = None
        self.mode = None if target.t_mode else "any"
        self.columns = 0
        self.refreshes = 0
        self.index = 0

    def run(self, listed):
        last = 0
        for self.index, c in listed:
            if c.ticks < last:
                self.report("order", last, c.ticks)
            last = c.ticks
            rule = getattr(self, f"{c.op.lower()}", None)
            if rule is None:
                self.report(f"unknown command {c.op}", 0, 0)
                continue
            if self.t.refresh and c.op not in ("REF", "PRE", "SWAP"):
                owed = (c.ticks - self.t.refresh_due) // self.t.t_refi + 1 - self.refreshes
                if owed > POSTPONED:
                    self.report("refresh spacing", POSTPONED, owed)
            rule(c)
        return self.found

    def report(self, rule, needed, found):
        self.found.append(Violation(rule, self.channel, self.index, int(needed), int(found)))

    def after(self, rule, event, gap, c):
        """The command comes at least `gap` ticks after the event, if that happened."""
        at = self.when.get(event)
        if at is not None and c.ticks - at < gap:
            self.report(rule, gap, c.ticks - at)

    def need(self, condition, rule):
        if not condition:
            self.report(rule, 0, 0)

    def in_mode(self, mode):
        if self.mode not in (mode, "any"):
            self.report(f"mode {mode}", 0, 0)

    # Commands

    def mode_io(self, c):
        self.after("column-MODE", "column", self.t.t_issue, c)
        self.after("MODE-MODE", "mode", self.t.t_mode, c)
        self.when["mode"], self.mode = c.ticks, "io"

    def mode_mac(self, c):
        self.mode_io(c)
        self.mode = "mac"

    def column(self, c, step, span=None):
        """A burst of column commands: spacing before it, and when its last one starts and leaves."""
        self.after("MODE-column", "mode", self.t.t_mode, c)
        if (free := self.when.get("columns free")) is not None and c.ticks < free:
            self.report("column-column", free, c.ticks)
        span = c.columns * step if span is None else span
        self.when["column"] = c.ticks + span - step
        self.when["columns free"] = c.ticks + span

    def in_row(self, c, wait):
        self.need(self.row is not None, f"{c.op} without an open row")
        if c.row >= 0 and self.row is not None and c.row != self.row:
            self.report(f"{c.op} of another row", self.row, c.row)
        self.after(f"ACT-{c.op}", "act", wait, c)

    def wr_gb(self, c):
        self.in_mode("io")
        self.after("DRAIN-WR_GB", "drain", self.t.t_turn, c)
        if self.t.batch_reuse:  # another vector may pass over the row
            self.columns = 0
        if self.t.double_buffer_gb:
            self.after("WR_GB-WR_GB", "loaded", 0, c)
            self.when["loaded"] = c.ticks + c.columns * self.t.t_burst
        else:
            self.column(c, self.t.t_burst)

    def swap(self, c):
        self.after("WR_GB-SWAP", "loaded", 0, c)

    def mac(self, c):
        t = self.t
        if t.order != "register":
            self.in_mode("mac")
        self.in_row(c, t.t_act_mac)
        self.column(c, t.mac_span(1), t.mac_span(c.columns))
        self.when["mac"] = self.when["read"] = self.when["column"]
        self.columns += c.columns
        width = t.row_columns * (t.banks // t.units)
        if self.columns > width:
            self.report("columns of a row", width, self.columns)

    def drain(self, c):
        self.in_mode("io")
        self.after("MAC-DRAIN", "mac", self.t.t_drain, c)
        self.column(c, self.t.t_burst)
        self.when["drain"] = self.when["read"] = c.ticks

    def rd(self, c):
        self.in_row(c, self.t.t_act_read)
        self.column(c, self.t.t_burst)
        self.when["read"] = self.when["column"]

    def wr(self, c):
        self.in_row(c, self.t.t_act_write)
        self.column(c, self.t.t_ccd)
        self.when["write"] = self.when["column"]

    def act(self, c):
        self.need(self.row is None, "ACT of an open bank")
        self.after("PRE-ACT", "pre", self.t.t_rp, c)
        self.after("REF-ACT", "ref", self.t.t_rfc, c)
        self.after("MODE-ACT", "mode", self.t.t_mode, c)
        self.when["act"], self.row, self.columns = c.ticks, c.row, 0

    def pre(self, c):
        t = self.t
        self.need(self.row is not None, "PRE of a closed bank")
        self.after("ACT-PRE", "act", t.t_ras, c)
        self.after("column-PRE", "read", t.t_rtp, c)
        self.after("WR-PRE", "write", t.t_cwl + t.t_burst + t.t_wr, c)
        self.when["pre"], self.row = c.ticks, None

    def ref(self, c):
        self.need(self.row is None, "REF of an open bank")
        self.after("PRE-REF", "pre", self.t.t_rp, c)
        self.after("REF-REF", "ref", self.t.t_rfc, c)
        self.when["ref"] = c.ticks
        self.refreshes += 1
