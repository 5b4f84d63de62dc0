"""Decoding with a GPT on PIM-GPT's machine, event by event: a token's time, energy and bytes.

All channels do the same, or less: the fullest one is replayed, command by command
(`hw.pim_schedule.Channel`). The chip beside the banks is busy until its last result; what needs a whole
vector (softmax, norms) waits for the last drain, what does not (biases, sums of tiles, GELU, residuals) takes
results as they come. `ref.blocks.dram` says the banks' part in closed form.
"""

import heapq
import json
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil

from hw.errors import DoesNotFit
from hw.pim_layout import (  # noqa: F401
    VALUE_BYTES,
    KvMapping,
    Mapping,
    check_capacity,
    check_machine,
    map_kv,
    map_vmm,
    score_commands,
    token_commands,
    value_commands,
    write_k_commands,
    write_v_commands,
)
from hw.pim_schedule import Channel, _orders, tile_columns
from ref.blocks.asic import asic_cycles
from ref.blocks.dram import (  # noqa: F401
    GPTS,
    GptShape,
    gpt2_large,
    gpt2_medium,
    gpt2_small,
    gpt2_xl,
    gpt3_large,
    gpt3_medium,
    gpt3_small,
    gpt3_xl,
)

BANKS = {"qkv", "score", "value", "proj", "fc1", "fc2", "write_k", "write_v"}  # of a layer, in the banks
HEAD = "head"  # after the last layer, in the banks, where the shape has a vocabulary


# Times.


@dataclass(frozen=True)
class Profile:
    """An operation without refreshes: ticks, when rows open (decided, done), ticks with a row open, ticks to
    the first result, commands by kind.
    """

    ticks: int
    decided: tuple
    opened: tuple
    active: int
    first_drain: int
    counts: dict


def profile(commands, target) -> Profile:
    """Run commands on a channel that has nothing else to do and is not refreshed."""
    channel = Channel(replace(target, refresh=False))
    decided, opened, first = [], [], None
    for c in commands:
        if c.op == "ACT":
            decided.append(max(channel.free, channel.pre_done))
        at = channel.issue(c)[-1].ticks
        if c.op == "ACT":
            opened.append(at)
        if c.op == "DRAIN" and first is None:
            first = at
    return Profile(
        channel.end, tuple(decided), tuple(opened), channel.active, first or channel.end, channel.counts
    )


class Banks:
    """The banks in time: an operation starts when it may, refreshes fall where a row is about to open.

    Operations that repeat are looked up: a refresh moves all that follows it by what it delays the row. (With
    double_buffer_gb a broadcast may hide behind a refresh; then this is an upper bound.)
    """

    def __init__(self, target):
        self.t, self.due, self.refreshes = target, target.refresh_due, 0

    def run(self, p: Profile, start):
        """The tick at which the operation is done."""
        t, i, shift = self.t, 0, start
        while t.refresh and (i := bisect_left(p.decided, self.due - shift, i)) < len(p.decided):
            free = shift + p.decided[i]
            while free >= self.due:
                free, self.due, self.refreshes = free + t.t_rfc, self.due + t.t_refi, self.refreshes + 1
            shift += max(0, free - shift - p.opened[i])
        return shift + p.ticks


class ReplayedBanks(Banks):
    """The same by every command of every operation: slow, and the judge of `Banks`."""

    def __init__(self, target, commands):
        super().__init__(target)
        self.channel, self.commands = Channel(target), commands

    def run(self, p, start):
        """The tick at which the operation is done."""
        self.channel.free = max(self.channel.free, start)
        for c in self.commands[id(p)]:
            self.channel.issue(c)
        self.refreshes = self.channel.counts.get("REF", 0)
        return self.channel.end


@dataclass(frozen=True)
class PimReport:
    """What tokens took. ticks, ns, energy_j; by_op: ticks that each operation adds to the end, by_part: the
    same ticks as broadcast, rows, columns, drains, writes, refresh and the chip; energy: joules by part.

    row_hits, row_misses: columns read or written in an open row, rows opened, of the fullest channel.
    pin_bytes: of all channels. bank_util: useful multiplications over those the units could do. timeline:
    (operation, layer, resource, start, end) of the last token. token_ticks: of each token.
    """

    target: str
    ticks: int
    ns: float
    energy_j: float
    by_op: dict
    by_part: dict
    energy: dict
    row_hits: int
    row_misses: int
    pin_bytes: int
    bank_util: float
    asic_busy: int
    timeline: list = field(default_factory=list, repr=False)
    token_ticks: tuple = ()

    @property
    def hit_rate(self):
        """Share of columns that found their row open."""
        return self.row_hits / (self.row_hits + self.row_misses)

    @property
    def asic_share(self):
        """Share of the time in which the banks wait for the chip."""
        return self.by_part["asic"] / self.ticks

    def table(self):
        """By operation, in Markdown."""
        lines = ["| operation | ticks | share |", "|---|--:|--:|"]
        lines += [f"| {k} | {v:,} | {v / self.ticks:.1%} |" for k, v in self.by_op.items()]
        return "\n".join([*lines, f"| all | {self.ticks:,} | {self.ns / 1e3:,.1f} µs |"])

    def perfetto(self):
        """The last token as Chrome's trace JSON, times in microseconds."""
        rows, us = {"banks": 1, "asic": 2}, self.ns / self.ticks / 1e3
        return json.dumps([
            {"name": op, "cat": f"layer {layer}", "ph": "X", "ts": start * us, "dur": (end - start) * us,
             "pid": 1, "tid": rows[where]}
            for op, layer, where, start, end in self.timeline
        ])  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """An operation of a layer: after which others, in the banks (a profile) or on the chip (cycles in all,
    and of the last results to come; 0 if it needs the whole vector).
    """

    name: str
    after: tuple
    profile: Profile | None = None
    cycles: int = 0
    tail: int = 0


@lru_cache(maxsize=64)
def _fixed(shape, target):
    """Profiles that are the same at every position."""
    of = (shape.heads, shape.head_dim, target)
    found = {name: profile(_orders(m, k, target), target) for name, (m, k) in shape.products.items()}
    if shape.vocab:
        found[HEAD] = profile(_orders(shape.vocab, shape.d_model, target), target)
    found["write_k"] = profile(write_k_commands(*of), target)
    found["write_v"] = profile(write_v_commands(*of), target)
    return found


@lru_cache(maxsize=4096)
def _score(tokens, shape, target):
    n = tokens * target.channels * target.banks
    return profile(score_commands(n, shape.heads, shape.head_dim, target), target)


@lru_cache(maxsize=4096)
def _value(columns, shape, target):
    return profile(value_commands(columns * target.lanes, shape.heads, shape.head_dim, target), target)


def _profiles(shape, n, target):
    """{operation: profile} at the n-th token; n matters by its columns, and by its tokens a bank."""
    own = dict(_fixed(shape, target))
    own["score"] = _score(-(-n // (target.channels * target.banks)), shape, target)
    own["value"] = _value(-(-n // target.lanes), shape, target)
    return own


def _layer(shape, n, own, target):
    """The tasks of a layer, and those of the logits after the last one. A bias and every sum of tiles is one
    addition; scores are scaled as they come.
    """
    d, h, a = shape.d_model, shape.heads, target.asic
    drained = target.channels * target.banks
    tiles = {name: len(tile_columns(k, target)) for name, (_, k) in shape.products.items()}

    def on_chip(name, after, *work):
        """work: (kind, numbers in a vector, vectors); after: with "whole", it waits for the last result."""
        ticks = lambda cap: ceil(
            sum(
                asic_cycles(k, min(n, cap), rows=rows, adders=a.adders, multipliers=a.multipliers)
                for k, n, rows in work
            )
            / (a.ghz * target.tick_ps / 1000)
        )
        return _Task(name, after, None, ticks(10**9), ticks(drained))

    whole = lambda name, after, *work: replace(on_chip(name, after, *work), tail=0)
    bank = lambda name, *after: _Task(name, after, own[name])
    sums = lambda name, size: ("add", size * tiles[name], 1)  # one bias, and all tiles but the first
    parts = -(-n // target.tile) - 1
    logits = [
        whole("norm", (), ("layernorm", d, 1)),
        bank(HEAD, "norm"),
        on_chip("head sums", (HEAD,), ("add", shape.vocab * (len(tile_columns(d, target)) - 1), 1)),
    ] if shape.vocab else []  # fmt: skip
    layer = [
        whole("ln1", (), ("layernorm", d, 1)),
        bank("qkv", "ln1"),
        on_chip("qkv sums", ("qkv",), sums("qkv", 3 * d)),
        bank("write_k", "qkv sums"),
        bank("write_v", "write_k"),
        bank("score", "write_v"),
        on_chip("scale", ("score",), ("mul", h * n, 1)),
        whole("softmax", ("scale",), ("softmax", n, h)),
        bank("value", "softmax"),
        on_chip("value sums", ("value",), ("add", d * parts, 1)),
        bank("proj", "value sums"),
        on_chip("residual 1", ("proj",), sums("proj", d), ("add", d, 1)),
        whole("ln2", ("residual 1",), ("layernorm", d, 1)),
        bank("fc1", "ln2"),
        on_chip("gelu", ("fc1",), sums("fc1", 4 * d), ("gelu", 4 * d, 1)),
        bank("fc2", "gelu"),
        on_chip("residual 2", ("fc2",), sums("fc2", d), ("add", d, 1)),
    ]
    return layer, logits


def _links(tasks):
    """(for each task those that it waits for, for each task those that wait for it)."""
    names = {task.name: i for i, task in enumerate(tasks)}
    waiting = [[names[a] for a in task.after] for task in tasks]
    return waiting, [[j for j, w in enumerate(waiting) if i in w] for i in range(len(tasks))]


class _Run:
    """Time and sums over tokens."""

    def __init__(self, shape, target, banks=None):
        self.shape, self.t = shape, target
        self.banks = banks or Banks(target)
        self.now, self.asic_busy = 0, 0
        self.by_op, self.count, self.times = Counter(), Counter(), []

    def token(self, n, own=None):
        """Advance by the n-th token: events in the order of their times; returns its timeline."""
        own = own or _profiles(self.shape, n, self.t)
        layers, (of_layer, of_head) = self.shape.layers, _layer(self.shape, n, own, self.t)
        graphs = [(tasks, *_links(tasks)) for tasks in (of_layer, of_head)]
        start, line, total = self.now, [], len(of_layer)
        free = {"banks": self.now, "asic": self.now}
        first, missing = {}, {}
        events = [(self.now, 0, 0)]  # (time, channel: all do the same, task)
        while events:
            at, _, number = heapq.heappop(events)
            layer, i = divmod(number, total)
            tasks, waiting, followers = graphs[layer == layers]
            task = tasks[i]
            if task.profile is not None:
                begin = max(at, free["banks"])
                end = free["banks"] = self.banks.run(task.profile, begin)
                first[number] = begin + task.profile.first_drain
                line.append((task.name, layer, "banks", begin, end))
            else:
                comes = first.get(number - 1, at) if task.tail else at
                begin = max(comes, free["asic"])
                end = free["asic"] = max(at + task.tail, begin + task.cycles)
                self.asic_busy += task.cycles
                line.append((task.name, layer, "asic", begin, end))
            self.by_op[task.name] += max(0, end - self.now)
            self.now = max(self.now, end)
            after = [number - i + j for j in followers[i]]
            if i == len(tasks) - 1 and layer + 1 < layers + bool(of_head):
                after.append((layer + 1) * total)
            for j in after:
                missing[j] = missing.get(j, len(waiting[j % total]) or 1) - 1
                if not missing[j]:
                    heapq.heappush(events, (end, 0, j))
        self._tally(own, n)
        self.times.append(self.now - start)
        return line

    def _tally(self, own, n):
        """Commands of the fullest channel, and events in all banks, of a token's layers and logits.

        The fullest channel holds ceil(heads / channels) heads; a key goes into one bank of one channel.
        """
        t, shape = self.t, self.shape
        heads = shape.heads / -(-shape.heads // t.channels)
        for name, p in own.items():
            used = {"value": heads, "write_v": heads, "write_k": 1}.get(name, t.channels)
            c = p.counts
            rows, mac, write = (c.get(k, 0) for k in ("ACT", "MAC", "WR"))
            broadcast, drain = c.get("WR_GB", 0), c.get("DRAIN", 0)
            one = dict(
                ticks=p.ticks, rows=rows, mac=mac, write=write, broadcast=broadcast, drain=drain,
                acts=rows * used * (1 if name == "write_k" else t.banks), macs=mac * used * t.units,
                writes=write * used, pins=(broadcast + drain + write) * used * t.column_bytes,
                open=p.active * used,
            )  # fmt: skip
            times = 1 if name == HEAD else shape.layers
            self.count.update({k: v * times for k, v in one.items()})
        self.count["useful"] += shape.weights + shape.head_weights + 2 * n * shape.d_model * shape.layers

    def report(self, line=()):
        """The sums as a `PimReport`."""
        t, n, in_banks = self.t, self.count, BANKS | {HEAD}
        by_part = {
            "broadcast": n["broadcast"] * t.t_burst, "columns": n["mac"] * t.t_ccd,
            "drains": n["drain"] * t.t_burst, "writes": n["write"] * t.t_ccd, "rows": 0, "refresh": 0,
            "asic": sum(v for k, v in self.by_op.items() if k not in in_banks),
        }  # fmt: skip
        still, busy = n["ticks"], sum(v for k, v in self.by_op.items() if k in in_banks)
        by_part["refresh"] = busy - still
        by_part["rows"] = still - sum(by_part[k] for k in ("broadcast", "columns", "drains", "writes"))
        e, seconds = t.energy, self.now * t.tick_s
        open_s = n["open"] * t.tick_s / t.channels  # of the average channel
        energy = {
            "activate": n["acts"] * e.act_pj * 1e-12,
            "multiply": n["macs"] * e.mac_pj * 1e-12,
            "write": n["writes"] * e.write_pj * 1e-12,
            "pins": n["pins"] * 8 * e.pin_pj_per_bit * 1e-12,
            "refresh": self.banks.refreshes * t.channels * e.refresh_pj * 1e-12,
            "background": t.channels * (e.open_mw * open_s + e.closed_mw * (seconds - open_s)) * 1e-3
            + t.channels * e.controller_mw * 1e-3 * seconds,
            "asic": t.asic.watts * self.asic_busy * t.tick_s,
        }
        possible = t.channels * t.units * t.lanes * self.now / t.t_ccd
        return PimReport(
            t.name, self.now, self.now * t.tick_ps / 1e3, sum(energy.values()), dict(self.by_op), by_part,
            energy, n["mac"] + n["write"] - n["rows"], n["rows"], round(n["pins"]), n["useful"] / possible,
            self.asic_busy, list(line), tuple(self.times),
        )  # fmt: skip


def simulate_token(shape: GptShape, position, target) -> PimReport:
    """One decode step at a position, 0 <= position < shape.context, which is reserved; with the last norm and
    the logits where shape.vocab is given. No look-up of the embedding.

    Raises: DoesNotFit if weights and reservation exceed the banks, or a layer's vectors or the logits the
    chip's scratchpad; ValueError for a position beyond the reservation, or a machine of another kind.
    """
    if not 0 <= position < shape.context:
        raise ValueError(f"position must be in 0..{shape.context - 1}, the reservation, got {position}")
    _check(shape, target)
    run = _Run(shape, target)
    line = run.token(position + 1)
    return run.report(line)


def simulate_generation(shape: GptShape, n_prompt, n_new, target) -> PimReport:
    """n_prompt tokens of a prompt, one by one as all others, and n_new after them; the timeline is the
    last's.
    """
    for name, n in (("n_prompt", n_prompt), ("n_new", n_new)):
        if n < 0:
            raise ValueError(f"{name} must not be negative, got {n}")
    n = n_prompt + n_new
    if not 1 <= n <= shape.context:
        raise ValueError(f"n_prompt + n_new must be in 1..{shape.context}, the reservation, got {n}")
    _check(shape, target)
    run = _Run(shape, target)
    for n in range(1, n_prompt + n_new + 1):
        line = run.token(n)
    return run.report(line)


def sweep(shape: GptShape, field, values, target, *, position=511) -> list[dict]:
    """A token's ticks, microseconds, millijoules and shares for values of a field of the machine.

    field: a field of `Pim`, or of its chip as "asic.ghz". A width in lanes takes columns as wide with it,
    through the pins too.
    """
    found = []
    for value in values:
        if field.startswith("asic."):
            machine = replace(target, asic=replace(target.asic, **{field[5:]: value}))
        elif field == "lanes":
            machine = replace(target, lanes=value, column_bytes=value * VALUE_BYTES)
        else:
            machine = replace(target, **{field: value})
        r = simulate_token(shape, position, machine)
        found.append({
            field: value, "ticks": r.ticks, "us": r.ns / 1e3, "mj": r.energy_j * 1e3, "hit_rate": r.hit_rate,
            "asic_share": r.asic_share,
        })  # fmt: skip
    return found


def value_layouts(n, d_model, heads, target) -> dict:
    """{layout: (ticks, columns in an open row, rows opened)} of a layer's P V with values a row a feature, or
    a row a token.
    """
    shape, found = GptShape(1, d_model, heads), {}
    for layout in ("feature", "token"):
        p = profile(value_commands(n, shape.heads, shape.head_dim, target, layout=layout), target)
        found[layout] = p.ticks, p.counts["MAC"] - p.counts["ACT"], p.counts["ACT"]
    return found


def _check(shape, target):
    check_machine(target)
    check_capacity(shape, shape.context, target)
    d, room = shape.d_model, int(target.asic.sram_kb * 1024)
    # the residual, and the widest step: queries, scores and probabilities, the hidden vector twice, or logits
    needed = VALUE_BYTES * (d + max(d + 2 * shape.heads * shape.context, 8 * d, shape.vocab or 0))
    if needed > room:
        raise DoesNotFit(target.name, "sram", needed, room, [], (f"asic.sram_kb={ceil(needed / 1024)}",))
