"""Commands of a PIM channel as spans of time, for the Gantt chart and the trace."""

from dataclasses import dataclass
from itertools import islice

from hw.pim_schedule import Channel, Command, _orders
from hw.program import MatmulDims, walk

# Which track a command belongs to; every bank and every channel runs the same at the same time.
TRACKS = ("mode", "pins", "row open", "columns", "refresh")
_TRACK = dict.fromkeys(("WR_GB", "DRAIN", "WR", "RD"), "pins") | {"MAC": "columns", "REF": "refresh"}
_WORDS = {
    "WR_GB": "broadcast", "DRAIN": "results", "WR": "write", "RD": "read", "MAC": "multiply",
    "REF": "refresh",
}  # fmt: skip
_MODES = {"MODE_IO": "to pins", "MODE_MAC": "to banks"}


@dataclass(frozen=True)
class Span:
    """What a track does from tick `start` for `ticks` ticks."""

    track: str
    name: str
    start: int
    ticks: int


def spans(commands, target, *, channel: int = 0) -> list[Span]:
    """Spans of one channel's commands, as `schedule_matvec` gives them: rows open from ACT to PRE, column
    bursts, refreshes, changes of mode.
    """
    found, opened = [], None
    end = 0
    for c in (c for c in commands if c.channel == channel):
        if c.op == "ACT":
            opened = c
        elif c.op == "PRE" and opened is not None:
            found.append(Span("row open", f"row {opened.row}", opened.ticks, c.ticks - opened.ticks))
            opened = None
        elif c.op.startswith("MODE"):
            found.append(Span("mode", _MODES[c.op], c.ticks, target.t_mode))
        elif c.op in _TRACK:
            found.append(Span(_TRACK[c.op], _WORDS[c.op], c.ticks, _ticks(c, target)))
        if found:
            end = max(end, found[-1].start + found[-1].ticks)
    if opened is not None:  # a row may stay open at the end
        found.append(Span("row open", f"row {opened.row}", opened.ticks, max(end - opened.ticks, 0)))
    return found


def _ticks(c: Command, target):
    if c.op == "MAC":
        return target.mac_span(c.columns)
    if c.op == "REF":
        return target.t_rfc
    return c.columns * (target.t_ccd if c.op == "WR" else target.t_burst)


def dearest_product(report):
    """(label, m outputs, k inputs) of the product that keeps the banks longest; None without one."""
    if report.program is None or not hasattr(report.device, "bank_rate"):
        return None
    ops = {op.id: op for op in walk(report.program.body)}
    held = [c for c in report.by_op if c.busy_s.get("banks") and isinstance(ops[c.op].dims, MatmulDims)]
    if not held:
        return None
    best = max(held, key=lambda c: c.seconds)
    d = ops[best.op].dims
    tensors = [report.program.tensors[i] for i in ops[best.op].inputs[:2]]
    left = tensors[0].role in ("weight", "const") and tensors[1].role not in ("weight", "const")
    return best.label, (d.m if left else d.n), d.k


def product_spans(report, *, most: int = 20_000):
    """(label, m, k, spans of one vector through it, all?) of that product; None without one.

    most: commands to follow; a schedule repeats itself.
    """
    found = dearest_product(report)
    if found is None:
        return None
    label, m, k = found
    channel, commands, orders = Channel(report.device), [], _orders(m, k, report.device)
    for c in islice(orders, most):  # one channel: the others do the same
        commands += channel.issue(c)
    return label, m, k, spans(commands, report.device), next(orders, None) is None
