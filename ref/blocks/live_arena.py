"""An arena that knows of every byte whose it is and whether it was written: a plan that runs on it is proved.

A program is a list of `Phase`s; each names all buffers alive in it. Buffers that a phase no longer names are
dead: their bytes are filled with POISON, as are those that `drop` gives up earlier. Reading what is not
written, touching a neighbour's byte or taking one that is in use raises.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ref.blocks.arena import best_plan

POISON = 0x55


class ArenaError(RuntimeError):
    """A plan or a program that touches bytes that are not its own."""


class Phase(NamedTuple):
    """One operator: op, its kind; buffers {name: (rows, bytes a row)}; run(arena) does the work."""

    op: str
    buffers: dict
    run: Callable


class LiveArena:
    """Bytes for the buffers of a plan; `most` were alive at one time, `high` is one past the last touched."""

    def __init__(self, plan, size=None):
        """All bytes start dead. size: None = the plan's total."""
        self.plan = plan
        self.size = plan.total if size is None else size
        self.memory = np.full(self.size, POISON, np.int8)
        self.owner = np.full(self.size, -1)
        self.written = np.zeros(self.size, bool)
        self.places, self.ids = {}, {}
        self.most = self.high = 0

    def take(self, name, shape):
        """Give the buffer its bytes. Raises: MemoryError beyond the end, ArenaError where one is in use."""
        start, size = self.plan.offsets[name], shape[0] * shape[1]
        if start + size > self.size:
            raise MemoryError(
                f"an arena of {self.size:,} bytes lacks {start + size - self.size:,} for {name!r}, {size:,} "
                f"bytes at {start:,}: the plan needs {self.plan.total:,}"
            )
        at = np.arange(start, start + size)
        if (self.owner[at] >= 0).any():
            raise ArenaError(f"{name!r} would overlap a living buffer")
        self.ids[name] = len(self.ids)
        self.owner[at], self.written[at] = self.ids[name], False
        self.places[name] = at.reshape(shape)
        self.most = max(self.most, int((self.owner >= 0).sum()))

    def release(self, name):
        """The buffer's life ends: its bytes are poisoned and free."""
        at = self.places.pop(name)
        self.memory[at], self.owner[at], self.written[at] = POISON, -1, False

    def get(self, name, key=slice(None)):
        """A copy of written bytes, int8. Raises: ArenaError for one that is dead or was never written."""
        at = self._own(name, key)
        if not self.written[at].all():
            raise ArenaError(f"{name!r} is read where nothing living was written")
        return self.memory[at].copy()

    def put(self, name, key, values):
        """Write int8 values over the buffer's bytes at key."""
        at = self._own(name, key)
        values = np.asarray(values)
        if values.dtype != np.int8 or values.shape != at.shape:
            raise ArenaError(f"{name!r} takes int8 {list(at.shape)}, got {values.dtype} {list(values.shape)}")
        self.memory[at], self.written[at] = values, True
        self.high = max(self.high, int(at.max(initial=-1)) + 1)

    def drop(self, *names, key=slice(None)):
        """The bytes at key of living buffers are not needed any more: poison until written again."""
        for name in names:
            at = self._own(name, key)
            self.memory[at], self.written[at] = POISON, False

    def _own(self, name, key):
        if name not in self.places:
            raise ArenaError(f"{name!r} is not alive")
        at = self.places[name][key]
        if not (self.owner[at] == self.ids[name]).all():
            raise ArenaError(f"{name!r} has lost bytes to another buffer")
        return at


def lifetimes(phases):
    """(name, bytes, first, last) of every buffer by the phases that name it; ValueError for a gap."""
    found = {}
    for i, phase in enumerate(phases):
        for name, shape in phase.buffers.items():
            known, first, last = found.get(name, (shape, i, i - 1))
            if last != i - 1 or known != shape:
                raise ValueError(f"buffer {name!r} must keep its shape, from its first phase to its last")
            found[name] = (shape, first, i)
    return [(name, a * b, first, last) for name, ((a, b), first, last) in found.items()]


def live_bytes(phases):
    """{op: the most bytes alive in a phase of that kind}."""
    out = {}
    for p in phases:
        out[p.op] = max(out.get(p.op, 0), sum(a * b for a, b in p.buffers.values()))
    return out


def run_phases(phases, *, size=None) -> LiveArena:
    """Plan the buffers byte for byte, then run every phase in an arena of `size` bytes (None: the plan's)."""
    arena = LiveArena(best_plan(lifetimes(phases), align=1), size)
    alive = set()
    for phase in phases:
        for name in sorted(alive - phase.buffers.keys()):
            arena.release(name)
        for name in sorted(phase.buffers.keys() - alive):
            arena.take(name, phase.buffers[name])
        alive = set(phase.buffers)
        phase.run(arena)
    return arena
