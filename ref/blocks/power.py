"""Energy of a run from samples of current and voltage, and where such samples may come from.

Source: the MELT benchmark 2024 (arXiv 2403.12844) and its released scripts, whose rule for the integral this
is: the value at a sample counts for the time since the sample before it. Not the trapezoid.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from ref.dims import dims, float64

MWH = 3.6  # joules in a milliwatt hour


class PowerSource(Protocol):
    """Something that knows what a span of time has cost."""

    name: str

    def sample(self, t):
        """Called at every border of a phase, with the clock's time in seconds."""

    def energy(self, start, end):
        """(mWh, mAh) between two times that were borders; None for what is not known."""


def energy(timestamps, current_ma, voltage_v):
    """(mWh, mAh): sum_k I_k V_k (t_k - t_{k-1}) / 3600 and sum_k I_k (t_k - t_{k-1}) / 3600.

    Args: timestamps [n] in s, never falling; current_ma, voltage_v [n], NaN where missing. A missing voltage
      is the next one that is there; a sample that still misses something is dropped. The first counts for no
      time.
    Raises: ValueError for time that runs backwards, or if no sample is left.
    """
    dims(timestamps=(timestamps, "n"), current_ma=(current_ma, "n"), voltage_v=(voltage_v, "n"))
    t, current, voltage = float64(timestamps, current_ma, voltage_v)
    voltage = voltage.copy()
    for k in reversed(range(len(t) - 1)):
        if np.isnan(voltage[k]):
            voltage[k] = voltage[k + 1]
    kept = ~(np.isnan(t) | np.isnan(current) | np.isnan(voltage))
    t, current, voltage = t[kept], current[kept], voltage[kept]
    if not len(t):
        raise ValueError("timestamps, current_ma and voltage_v hold no complete sample: an empty window")
    since = np.diff(t, prepend=t[0])
    if (since < 0).any():
        raise ValueError(f"timestamps must not fall, got {t[np.argmin(since)]} after a later one")
    return float(np.sum(current * voltage * since) / 3600), float(np.sum(current * since) / 3600)


class ReplayedPower:
    """Samples that were recorded elsewhere, such as by a power meter: absolute times, mA, V."""

    name = "recorded samples"

    def __init__(self, timestamps, current_ma, voltage_v):
        """Three arrays [n], NaN where something is missing."""
        self.samples = float64(timestamps, current_ma, voltage_v)

    @classmethod
    def from_csv(cls, path):
        """Columns timestamp, current_ma, voltage_v under a line that names them; an empty cell is missing."""
        rows = np.genfromtxt(path, delimiter=",", names=True, dtype=np.float64)
        missing = {"timestamp", "current_ma", "voltage_v"} - set(rows.dtype.names or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
        return cls(*(np.atleast_1d(rows[name]) for name in ("timestamp", "current_ma", "voltage_v")))

    def sample(self, t):
        """The samples are there already."""

    def energy(self, start, end):
        """(mWh, mAh) of the samples in the open interval, (None, None) where nothing was sampled."""
        t, current, voltage = self.samples
        inside = (start < t) & (t < end)
        return energy(t[inside], current[inside], voltage[inside]) if inside.any() else (None, None)


class RaplPower:
    """The energy counters of x86 processors, read from a Linux file system; they wrap around."""

    name = "RAPL"

    def __init__(self, folder="/sys/class/powercap"):
        """Raises: OSError if there is no counter, or none that may be read."""
        self.domains = sorted(p for p in Path(folder).glob("*rapl:*") if p.name.count(":") == 1)
        if not self.domains:
            raise FileNotFoundError(f"no energy counter under {folder}")
        number = lambda name: [int((d / name).read_text()) for d in self.domains]
        self._read, self.ranges = lambda: number("energy_uj"), number("max_energy_range_uj")
        self.last, self.total = self._read(), 0
        self.times, self.joules = [], []

    def sample(self, t):
        """Read the counters now. A full turn between two samples would go unseen."""
        now = self._read()
        gains = zip(now, self.last, self.ranges, strict=True)
        self.total += sum((new - old) % (most + 1) for new, old, most in gains)
        self.last = now
        self.times.append(t)
        self.joules.append(self.total / 1e6)

    def energy(self, start, end):
        """(mWh, None): the counters know no current."""
        at = np.interp([start, end], self.times, self.joules)
        return float(at[1] - at[0]) / MWH, None


class ModelledPower:
    """A constant power in W, such as a cost model's estimate: a model, never a measurement."""

    def __init__(self, watts, *, name="model"):
        """watts: all through the run."""
        self.watts, self.name = watts, name

    def sample(self, t):
        """A model needs no samples."""

    def energy(self, start, end):
        """(mWh, None)."""
        return self.watts * (end - start) / MWH, None


def find_power(folder="/sys/class/powercap"):
    """RaplPower if this machine has counters that may be read, else None: not measured."""
    try:
        return RaplPower(folder)
    except OSError:
        return None
