"""`Cpu`: a roofline with four slopes, one for each level of the memory hierarchy that the working set fits.

An op takes its overhead plus the longer of its arithmetic and its bytes at the bandwidth of the smallest
level that holds all it touches. Small ops stay on one thread, where starting the others would cost more.
Numbers of devices: `hw.parts`.
"""

import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path

import numpy as np

from hw.errors import DoesNotFit, UnsupportedPrimitive
from hw.parts import CACHE_BYTES_PER_CYCLE, CPUS
from hw.program import CollectiveDims, ElementwiseDims
from hw.report import OpCost
from hw.target import Target

# Vector instructions an exponential or its kin takes. Hand-written vector libraries need 4 to 8 (from
# memory);
# the code that XLA makes for a CPU measures at 15 to 25 (docs/data/hw_gpu.json).
TRANSCENDENTAL_OPS = 16
DIV_OPS = 5  # vector instructions' worth of a division, from memory
SORT_CYCLES = 4  # cycles a comparison and its move in a sort, which no vector unit helps; our assumption
STRIDED_CYCLES = 2  # cycles an element of a transpose, whose reads or writes miss the vector unit; our choice
FORK_JOIN_S = 5e-6  # seconds to hand an op to the other threads and wait for them; our choice
BLAS_EFF = 0.9  # share of its peak that a matrix product reaches on a core, from memory
THREAD_EFF = 0.9  # share of the threads' time that is work; our choice


@dataclass(frozen=True, kw_only=True)
class Cpu(Target):
    """A processor; every field is an option.

    clusters: ((cores, GHz with all busy, fp32 operations a cycle a core, int8 operations a cycle a core),
    ...),
    fastest first. caches_kb: (L1 data a core, L2 a core or in all if l2_shared, last level in all, 0 for
    none).
    matrix_per_cycle: operations a cycle a core of a matrix unit (AMX) by element type, at matrix_ghz.
    threads: None for every core. op_overhead_us: (what a framework adds to each op: 0 compiled, 10 to 50
    eager). compute_eff, dram_eff: what kernels reach; ideal=True sets them to 1 and all overheads to 0.
    """

    name: str = "cpu"
    clusters: tuple
    caches_kb: tuple
    dram_gbps: float
    dram_gb: float
    watts: float
    idle_watts: float = 0.0
    threads: int | None = None
    ideal: bool = False
    op_overhead_us: float = 0.0
    compute_eff: float = 0.7
    dram_eff: float = 0.8
    l2_shared: bool = False
    matrix_per_cycle: dict = field(default_factory=dict)
    matrix_ghz: float = 0.0
    usable: float = 1.0
    runtime_gb: float = 0.0

    def __post_init__(self):
        if not self.clusters or any(min(c) <= 0 for c in self.clusters):
            raise ValueError(f"clusters must hold positive numbers, got {self.clusters}")
        if self.threads is not None and not 1 <= self.threads <= self.cores:
            raise ValueError(
                f"threads must be in 1..{self.cores}, the cores of {self.name}, got {self.threads}"
            )
        for name in ("dram_gbps", "dram_gb", "watts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("op_overhead_us", "idle_watts", "runtime_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def cores(self):
        """Cores of all clusters."""
        return sum(c[0] for c in self.clusters)

    @property
    def clock_hz(self):
        """Clock of the fastest cluster."""
        return self.clusters[0][1] * 1e9

    @property
    def capacity(self):
        """Bytes that a program may use."""
        return {"dram": int((self.dram_gb * self.usable - self.runtime_gb) * 1e9)}

    def check_memory(self, needed):
        """Raises: DoesNotFit if `needed` bytes are more than a program may use."""
        available = self.capacity["dram"]
        if needed > available:
            raise DoesNotFit(self.name, "dram", ceil(needed), available, suggestions=("fewer bits a weight",))

    def ops_rate(self, dtype="float32", threads=None):
        """Multiply-accumulate operations a second (two each) of `threads` threads on the fastest cores."""
        threads = threads or self.threads or self.cores
        column = 3 if dtype in ("int8", "uint8") else 2
        if matrix := self.matrix_per_cycle.get(dtype):
            return threads * self.matrix_ghz * 1e9 * matrix
        rate, left = 0.0, threads
        for cluster in self.clusters:
            used = min(left, cluster[0])
            rate, left = rate + used * cluster[1] * 1e9 * cluster[column], left - used
        return rate / 2 if dtype in ("float64", "int64", "uint64") else rate

    @property
    def vector_rate(self):
        """float32 operations a second that kernels reach on all threads, a multiply-accumulate counted
        two.
        """
        return self._reached(self.threads or self.cores)

    @property
    def memory_rate(self):
        """Bytes a second of main memory."""
        return self.dram_gbps * 1e9 * (1 if self.ideal else self.dram_eff)

    def level_of(self, working_set, threads=None):
        """Smallest level that holds the bytes when `threads` share them: "l1", "l2", "l3" or "dram"."""
        threads = threads or self.threads or self.cores
        l1, l2, l3 = (kb * 1024 for kb in self.caches_kb)
        for level, room in (
            ("l1", l1 * threads),
            ("l2", l2 * (1 if self.l2_shared else threads)),
            ("l3", l3),
        ):
            if working_set <= room:
                return level
        return "dram"

    def level_rate(self, level, threads=None):
        """Bytes a second of a level; never below the next one's."""
        if level == "dram":
            return self.memory_rate
        cycles = (
            sum(c[0] * c[1] for c in self.clusters)
            / self.cores
            * 1e9
            * (threads or self.threads or self.cores)
        )
        below = {"l1": "l2", "l2": "l3", "l3": "dram"}[level]
        own = cycles * CACHE_BYTES_PER_CYCLE.numbers[level]
        return max(own, self.level_rate(below, threads))

    def _reached(self, threads, dtype="float32"):
        eff = 1.0 if self.ideal else self.compute_eff * (THREAD_EFF if threads > 1 else 1.0)
        return self.ops_rate(dtype, threads) * eff

    def cost(self, op, ctx):
        """Price of one execution of `op`: on one thread or on all, whichever is sooner."""
        if isinstance(op.dims, CollectiveDims):
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source, f"{self.name} is one device: no collectives"
            )
        group = ctx.group(op)
        threads, parts = self._group(group, ctx)
        busy, overhead, levels, c = parts[op.id]
        if not busy:
            return OpCost()
        awake = max(busy.values()) + (overhead if group.ops[0].id == op.id else 0.0)
        power = self.idle_watts + (self.watts - self.idle_watts) * threads / self.cores
        return OpCost(
            busy_s=busy,
            overhead_s=overhead,
            energy_j=power * awake,
            bytes_by_level=levels,
            macs=c.macs,
            flops=c.flops,
            basis="roofline, data sheet",
        )

    def _group(self, group, ctx):
        """(threads, {op: (busy seconds, overhead, bytes by level, counts)}) of a fusion group: all its ops
        run on
        one thread or on all of them, whichever is sooner.
        """
        key = (self.name, group.id)
        if key not in ctx.memo:
            tries = []
            for threads in sorted({1, self.threads or self.cores}):
                parts = {op.id: self._on(threads, op, group, ctx) for op in group.ops}
                total = {}
                for busy, *_ in parts.values():
                    for r, s in busy.items():
                        total[r] = total.get(r, 0.0) + s
                seconds = max(total.values(), default=0.0) + max(p[1] for p in parts.values())
                tries.append((seconds, threads, parts))
            ctx.memo[key] = min(tries, key=lambda t: t[0])[1:]
        return ctx.memo[key]

    def _on(self, threads, op, group, ctx):
        """(busy seconds, overhead, bytes by level, counts) of one op on that many threads."""
        c, dtype = ctx.counts(op), ctx.dtype(op)
        level, written = self.level_of(ctx.working_set(group), threads), ctx.writes(op)
        moved = {
            level: ctx.reads(op) + written * (2 if level == "dram" else 1)
        }  # a line is read, then written
        if op.kind == "reduce" and not ctx.reads(op) and not self.ideal:
            passed = ctx.inputs(op)[0].nbytes  # compilers for a CPU make a pass of each reduction of a group
            near = self.level_of(passed, threads)
            moved[near] = moved.get(near, 0) + passed
        moved = {at: n for at, n in moved.items() if n}
        lanes = self._reached(threads) / 2  # instructions: one a multiply-accumulate, and one an addition
        ops = c.flops - 2 * c.macs + c.index_ops
        if isinstance(op.dims, ElementwiseDims) and op.dims.cls == "div":
            ops *= DIV_OPS
        if op.prim == "sort":
            arithmetic = ops * SORT_CYCLES / (self.clock_hz * threads)
        else:
            arithmetic = (ops + c.transcendentals * TRANSCENDENTAL_OPS) / lanes
        arithmetic += 2 * c.macs / self._reached(threads, dtype)
        if op.prim == "transpose" and moved and not self.ideal:
            arithmetic += op.dims.written * STRIDED_CYCLES / (self.clock_hz * threads)
        busy = {at: n / self.level_rate(at, threads) for at, n in moved.items()}
        busy["arithmetic"] = arithmetic
        busy = {r: s for r, s in busy.items() if s > 0}
        overhead = 0.0 if self.ideal else self.op_overhead_us * 1e-6 + (FORK_JOIN_S if threads > 1 else 0.0)
        return busy, overhead if busy else 0.0, moved, c

    @staticmethod
    def from_cpuinfo(**fields) -> "Cpu":
        """The computer that this runs on: cores and caches as it tells them, bandwidth by a triad of one
        second,
        and the clock as told, or higher if a short run of matrix products shows it. Power is unknown and
        taken
        as 10 W a core.
        """
        return _this_cpu(fields)


def _this_cpu(fields):
    if sys.platform == "darwin":
        read = lambda key: int(
            subprocess.run(["sysctl", "-n", key], capture_output=True, text=True).stdout or 0
        )
        cores, ghz = read("hw.physicalcpu") or 1, (read("hw.cpufrequency_max") or 3_200_000_000) / 1e9
        caches = (read("hw.l1dcachesize") // 1024 or 64, read("hw.l2cachesize") // 1024 or 4096, 0)
        name, flags, shared = platform.machine(), set(), True
        memory = read("hw.memsize") or 8 << 30
    else:
        info = _text("/proc/cpuinfo")
        found = lambda key: re.findall(rf"^{key}\s*:\s*(.+)$", info, re.MULTILINE)
        name = (found("model name") or [platform.processor() or platform.machine()])[0]
        ghz = max((float(x) for x in found("cpu MHz")), default=2500.0) / 1e3
        flags = set((found("flags") or found("Features") or [""])[0].split())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        caches, shared = _linux_caches(cores), False
        memory = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
        )
    fp32 = 64 if "avx512f" in flags else 32 if "avx2" in flags or sys.platform == "darwin" else 16
    int8 = 256 if "avx512_vnni" in flags else 128 if "avx_vnni" in flags else 2 * fp32
    shown = measure_products(cores) / (cores * fp32 * 1e9 * THREAD_EFF * BLAS_EFF)
    found = {
        "name": f"this computer ({name})",
        "clusters": ((cores, max(ghz, shown), fp32, int8),),
        "caches_kb": caches,
        "l2_shared": shared,
        "compute_eff": BLAS_EFF,  # clock and bandwidth are measurements, not a data sheet's
        "dram_eff": 1.0,
        "dram_gb": memory / 1e9,
        "watts": 10.0 * cores,
        "idle_watts": 3.0 * cores,
        **fields,
    }
    return Cpu(**({} if "dram_gbps" in fields else {"dram_gbps": measure_triad(cores)}), **found)


def _linux_caches(cores):
    """(L1 data a core, L2 a core, L3 in all) in KB, from sysfs; 32, 512 and 0 where it is silent."""
    size = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, kb = (_text(index / f).strip() for f in ("level", "type", "size"))
        if kind != "Instruction" and kb:
            size[level] = int(re.sub(r"\D", "", kb)) * (1024 if kb.endswith("M") else 1)
    return size.get("1", 32), size.get("2", 512), size.get("3", 0)


def _text(path):
    path = Path(path)
    return path.read_text() if path.exists() else ""


def measure_products(threads, seconds=0.2, side=512):
    """Operations a second of float32 matrix products, one on each thread, best of what fits `seconds`."""
    a = [np.ones((side, side), np.float32) for _ in range(threads)]
    best, stop = inf, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < stop or best is inf:
            start = time.perf_counter()
            list(pool.map(lambda x: x @ x, a))
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 * threads / best


def measure_triad(threads, seconds=1.0, elements=1 << 23):
    """GB/s of a = b + c over float64 arrays far larger than a cache, best of as many passes as fit
    `seconds`.
    """
    b, c = (np.ones(elements) for _ in range(2))
    a = np.empty_like(b)
    cuts = np.array_split(np.arange(elements), threads)
    spans = [slice(int(x[0]), int(x[-1]) + 1) for x in cuts if len(x)]
    best, stop = inf, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < stop or best is inf:
            start = time.perf_counter()
            list(pool.map(lambda s: np.add(b[s], c[s], out=a[s]), spans))
            best = min(best, time.perf_counter() - start)
    return 4 * a.nbytes / best / 1e9  # two arrays read; the third is read into the cache, then written


def _preset(name, fields):
    if name not in CPUS:
        raise ValueError(f"no Cpu preset {name!r}; there are {', '.join(CPUS)}")
    return replace(Cpu(name=name, **CPUS[name].numbers), **fields)


def xeon_6154(**fields) -> Cpu:
    """Intel Xeon Gold 6154, the baseline of PIM-GPT."""
    return _preset("xeon_6154", fields)


def xeon_8480(**fields) -> Cpu:
    """Intel Xeon Platinum 8480 with AMX."""
    return _preset("xeon_8480", fields)


def epyc_7763(**fields) -> Cpu:
    """AMD EPYC 7763."""
    return _preset("epyc_7763", fields)


def epyc_9654(**fields) -> Cpu:
    """AMD EPYC 9654."""
    return _preset("epyc_9654", fields)


def ryzen_7950x(**fields) -> Cpu:
    """AMD Ryzen 9 7950X."""
    return _preset("ryzen_7950x", fields)


def core_i9_13900k(**fields) -> Cpu:
    """Intel Core i9-13900K."""
    return _preset("core_i9_13900k", fields)


def apple_m2(**fields) -> Cpu:
    """Apple M2."""
    return _preset("apple_m2", fields)


def iphone14pro_cpu(**fields) -> Cpu:
    """Apple iPhone 14 Pro, its CPU."""
    return _preset("iphone14pro_cpu", fields)


def galaxy_s23_cpu(**fields) -> Cpu:
    """Samsung Galaxy S23, its CPU."""
    return _preset("galaxy_s23_cpu", fields)


def pixel_6a_cpu(**fields) -> Cpu:
    """Google Pixel 6a, its CPU."""
    return _preset("pixel_6a_cpu", fields)


def raspberry_pi5(**fields) -> Cpu:
    """Raspberry Pi 5."""
    return _preset("raspberry_pi5", fields)


PRESETS = {
    f.__name__: f
    for f in (
        xeon_6154, xeon_8480, epyc_7763, epyc_9654, ryzen_7950x, core_i9_13900k,
        apple_m2, iphone14pro_cpu, galaxy_s23_cpu, pixel_6a_cpu, raspberry_pi5,
    )
}  # fmt: skip
