"""`Mcu`: int8 networks on one small core: kernel calls by their instructions, activations in one arena.

A program runs as the units of `hw.mcu_units`: library kernels, tables, plain loops. A unit takes the longer
of its cycles and of the time in which its weights stream from flash. Activations are int8 in SRAM, by the
plan of `hw.mcu_arena`; weights are int8 in flash. `execute` computes in that arithmetic (`hw.mcu_int8`).
Numbers of parts: `hw.mcu_parts`; instructions: `hw.kernel_counts`; there is no board behind them.
"""

from dataclasses import dataclass, field, replace
from math import ceil

from hw.errors import DoesNotFit, UnsupportedPrimitive
from hw.kernel_counts import CORES, PROFILES, instructions  # noqa: F401
from hw.mcu_arena import SWITCHES, MemoryPlan, plan_memory
from hw.mcu_calibrate import QuantPlan, calibrate
from hw.mcu_emit import emit_c  # noqa: F401
from hw.mcu_flash import folded_from, stored
from hw.mcu_int8 import Int8Policy
from hw.mcu_int16 import Int16Policy
from hw.mcu_parts import ALL_REGIONS, BORROWED, MCUS
from hw.mcu_price import work
from hw.mcu_run import run_arena as _run_arena
from hw.mcu_units import Units
from hw.program import CollectiveDims, is_float
from hw.report import OpCost
from hw.target import Placement, Target
from ref.blocks.arena import STRATEGIES

KB = 1024
FULL_SPEED = 4.0  # bytes a cycle that never stall the core


@dataclass(frozen=True)
class Region:
    """A memory: its KB of 1,024 bytes, and the bytes that the core moves a cycle (4: no stall)."""

    name: str
    kb: float
    speed: float = FULL_SPEED


@dataclass(frozen=True)
class EnergyTable:
    """Joules of a cycle at full clock, and of a byte from flash."""

    joules_per_cycle: float
    flash_joules_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Mcu(Target):
    """A microcontroller; every field is an option.

    core: "cortex_m7", "cortex_m4", "cortex_m3", or "rv32imc", which borrows the counts of the M3. mhz; cpi:
    cycles an instruction. regions: memories in order of speed, a Region or (name, kb, bytes a cycle) each;
    reserve_kb of the first are the stack's and the runtime's. flash_kb, flash_bytes_s, wait_states, caches_kb
    (instructions, data): of the flash; the wait states are in its rate.
    profile: whose kernels: "cmsis_nn", "tinyengine", "tflm_ref", "emitted" (the project's own C).
    integrate, decompose_patch, overwrite, reorder: how memory is saved (`hw.mcu_arena`); strategy, align: how
    it is laid out: "greedy_by_size" (and whichever other is smaller), or one of the planner's others by name.
    activation_bits: 8, or 16 with int64 sums; every profile then counts by the project's own C.
    plan: the ranges, from `calibrate` with the same activation_bits; None: `execute` calibrates on its own
    arguments, and says so.
    """

    name: str = "mcu"
    fuse: bool = False  # units are what runs as one
    core: str
    mhz: float
    regions: tuple
    flash_kb: float
    wait_states: int = 0
    caches_kb: tuple = (0, 0)
    cpi: float = 1.0
    flash_bytes_s: float = 200e6
    profile: str = "cmsis_nn"
    integrate: bool = True
    decompose_patch: bool = True
    overwrite: bool = True
    reorder: bool = True
    strategy: str = "greedy_by_size"
    align: int = 16
    reserve_kb: float = 24
    activation_bits: int = 8
    plan: QuantPlan | None = None
    energy: EnergyTable = field(default_factory=lambda: EnergyTable(1.5e-9, 0.2e-9))
    basis: str = ""

    def __post_init__(self):
        if self.core not in (*CORES, *BORROWED):
            raise ValueError(f"core must be one of {', '.join((*CORES, *BORROWED))}, got {self.core!r}")
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        made = tuple(r if isinstance(r, Region) else Region(*r) for r in self.regions)
        object.__setattr__(self, "regions", made)
        if isinstance(self.energy, dict):
            object.__setattr__(self, "energy", EnergyTable(**self.energy))
        if not made or len({r.name for r in made}) != len(made):
            raise ValueError("regions must be memories with different names")
        if any(r.kb <= 0 or r.speed <= 0 for r in made):
            raise ValueError(f"regions must have positive kb and speed, got {made}")
        for name in ("mhz", "flash_kb", "cpi", "flash_bytes_s", "align"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.reserve_kb < made[0].kb:
            raise ValueError(f"reserve_kb must be in 0..{made[0].kb:g} KB, got {self.reserve_kb}")
        if self.activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, got {self.activation_bits}")
        if self.plan is not None and not isinstance(self.plan, QuantPlan):
            raise ValueError(f"plan must be a QuantPlan of calibrate, got {type(self.plan).__name__}")
        if self.plan is not None and self.plan.activation_bits != self.activation_bits:
            bits = self.plan.activation_bits
            raise ValueError(f"plan has activation_bits={bits}, the target {self.activation_bits}")

    # What the fields amount to

    @property
    def clock_hz(self):
        """Cycles a second."""
        return self.mhz * 1e6

    @property
    def rooms(self) -> list[int]:
        """Bytes for the arena in each region: the runtime's reserve is taken from the first."""
        return [
            int(r.kb * KB) - (int(self.reserve_kb * KB) if n == 0 else 0) for n, r in enumerate(self.regions)
        ]

    @property
    def capacity(self):
        """Bytes for activations by region, and of the flash."""
        return {
            **{r.name: n for r, n in zip(self.regions, self.rooms, strict=True)},
            "flash": int(self.flash_kb * KB),
        }

    @property
    def weight_bits(self) -> int:
        """Bits of a weight in flash."""
        return 8 if self.plan is None else self.plan.weight_bits

    # Arithmetic

    def prepared(self, program, args) -> "Mcu":
        """The target with the arithmetic of a run: its plan, or one calibrated on these arguments."""
        plan = self.plan or calibrate(program, [args], activation_bits=self.activation_bits)
        ready = replace(self, plan=plan)
        object.__setattr__(ready, "_policy", policy_of(program, plan))
        object.__setattr__(ready, "_own_ranges", self.plan is None)
        return ready

    @property
    def formats(self):
        """The policy of a run; None before `prepared`."""
        return getattr(self, "_policy", None)

    # Memory

    def memory(self, program) -> MemoryPlan:
        """The plan of the arena, whether it fits or not."""
        last = _LAST.get("plan")
        if last is None or last[0] is not program or last[1] != self:
            last = _LAST["plan"] = (program, self, plan_memory(program, self))
        return last[2]

    def run_arena(self, program, args, *, sizes=None):
        """(outputs, ArenaRun): the planned program inside its arena, dead bytes poisoned (`hw.mcu_run`)."""
        ready = self if self.formats is not None else self.prepared(program, args)
        return _run_arena(ready.memory(program), args, ready.formats, sizes=sizes)

    def place(self, program) -> Placement:
        """Activations in the arena, weights in flash.

        Raises: DoesNotFit with the bytes that the arena needs, what is alive at the peak, and what would make
        it fit. Of several regions the largest is named: with the bytes that it would need, the others as they
        are, for the planner to find a place for everything (to a multiple of align, by bisection).
        """
        try:
            plan = self.memory(program)
        except MemoryError as e:
            if isinstance(e, DoesNotFit):
                raise
            self._refuse(program, None)
        names = [r.name for r in self.regions]
        used = plan.arena.totals or {names[0]: plan.total}
        for name, room in zip(names, self.rooms, strict=True):
            if used.get(name, 0) > room:
                self._refuse(program, plan)
        flash, room = self.flash_bytes(program), self.capacity["flash"]
        if flash > room:
            kept = stored(program, self._units(program), self.weight_bits)
            found = sorted(kept.items(), key=lambda item: -item[1])
            held = [_named(program, i, what, n) for (i, what), n in found]
            raise DoesNotFit(self.name, "flash", flash, room, held, self._flash_hints(program, room))
        regions = {n: (used.get(n, 0), room) for n, room in zip(names, self.rooms, strict=True)}
        return Placement(regions | {"flash": (flash, room)}, plan.total, self._notes(program, plan))

    def _notes(self, program, plan):
        by_rows = sum(g.rows > 1 for g in plan.segments)
        together = sum(g.last - g.first + 1 for g in plan.segments if g.rows > 1)
        notes = [
            f"arena {plan.total:,} B, {plan.bound:,} B alive at most ({plan.live()[0]}); {together} of "
            f"{len(plan.flow.steps)} steps run by rows in {by_rows} groups, "
            f"{sum(len(g.taken) for g in plan.segments)} results overwrite an operand"
            + (", ops reordered" if plan.reordered else "")
        ]
        streamed = [plan.flow.tensors[g.streamed].name for g in plan.segments if g.streamed is not None]
        if streamed:
            notes.append(f"{', '.join(streamed)} is read from the camera a row of patches at a time")
        if getattr(self, "_own_ranges", False):
            notes.append("plan=None: int8 ranges are those of this run's own arguments")
        if self.core in BORROWED:
            notes.append(f"{self.core}: instruction counts of {BORROWED[self.core]}, none of its own")
        if not any(t.role == "weight" for t in program.tensors.values()) and len(program.body.inputs) > 1:
            notes.append("no argument was traced as a weight: all of them lie in SRAM")
        return tuple(notes)

    def _refuse(self, program, plan):
        """Raise DoesNotFit for the arena."""
        whole = replace(self, regions=(Region("sram", sum(r.kb for r in self.regions)),))
        one = plan if len(self.regions) == 1 else plan_memory(program, whole)
        n = max(range(len(self.rooms)), key=self.rooms.__getitem__)
        names = [r.name for r in self.regions]
        needed = one.total if len(names) == 1 else self._least(program, n, one.total)
        peak, live = one.live()
        beside = ", ".join(names[:n] + names[n + 1 :])
        place = f"{names[n]}{f' beside {beside}' if beside else ''} (peak at {peak})"
        raise DoesNotFit(self.name, place, needed, self.rooms[n], live, self._arena_hints(program, one.total))

    def _planned(self, program):
        """(whether there is a plan that fits, its bytes; of several regions that do not fit None)."""
        try:
            plan = plan_memory(program, self)
        except MemoryError:
            return False, None
        return len(self.regions) > 1 or plan.total <= self.rooms[0], plan.total

    def _least(self, program, n, enough):
        """By bisection, bytes of region n, all others as they are, with which there is a plan: a multiple of
        align, and there is none with `align` bytes less.
        """

        def fits(room):
            kb = (room + (int(self.reserve_kb * KB) if n == 0 else 0)) / KB
            regions = (*self.regions[:n], replace(self.regions[n], kb=kb), *self.regions[n + 1 :])
            return replace(self, regions=regions)._planned(program)[0]

        low, high = self.rooms[n] // self.align, max(enough, self.rooms[n]) // self.align + 1
        while not fits(high * self.align):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle * self.align) else (middle, high)
        return high * self.align

    def _arena_hints(self, program, total):
        """Switches, placements and parts that would make it fit, each tried. total: in one memory."""
        hints, room, still = [], sum(self.rooms), []
        off = [s for s in SWITCHES if not getattr(self, s)]
        tries = [(s,) for s in off] + ([tuple(off)] if len(off) > 1 else [])
        for switches in tries:
            fits, needs = replace(self, **dict.fromkeys(switches, True))._planned(program)
            still += [needs] if needs else []
            words = " and ".join(f"{s}=True" for s in switches)
            if fits:
                hints.append(f"{words} ({needs:,} B, {room - needs:,} B to spare)")
        if still and not hints:
            hints.append(f"{', '.join(f'{s}=True' for s in off)} (still {min(still):,} B)")
        need = ceil(total / KB + self.reserve_kb)
        larger = [n for n, p in MCUS.items() if sum(r[1] for r in p.numbers["regions"]) >= need]
        larger += [
            f"{n} with all its memories"
            for n, r in ALL_REGIONS.items()
            if not larger
            and r[0][1] > self.reserve_kb
            and sum(region[1] for region in r) >= need
            and replace(self, regions=r)._planned(program)[0]
        ]
        kb = f"a part with {need:,} KB" + (" in one memory" if len(self.regions) > 1 else "")
        hints.append(f"{kb}: {larger[0]}" if larger else f"{kb}, or a smaller input")
        inputs = [program.tensors[i] for i in program.body.inputs if program.tensors[i].role == "input"]
        big = max(inputs, key=lambda t: t.size, default=None)
        if big is not None and len(inputs) > 1 and big.size > max(self.rooms) // 2:
            hints.append(f"{big.name} traced as a weight, if it is one")
        return tuple(hints)

    def _flash_hints(self, program, room):
        hints = []
        if self.weight_bits > 4:
            small = self.flash_bytes(program, 4)
            if small <= room:
                hints.append(f"calibrate(weight_bits=4) ({small:,} B)")
        kept = stored(program, self._units(program), self.weight_bits)
        grown = {i: (n, folded_from(program, i)) for (i, _), n in kept.items() if i is not None}
        grown = [(n, few) for n, few in grown.values() if 0 < 4 * few < n]
        if grown:
            less = sum(n - few for n, few in grown)
            hints.append(
                f"{len(grown)} tables, folded from few weights, made as they are read ({less:,} B less)"
            )
        need = ceil(self.flash_bytes(program) / KB)
        larger = [n for n, p in MCUS.items() if p.numbers["flash_kb"] >= need]
        return (*hints, f"a part with {need:,} KB of flash" + (f": {larger[0]}" if larger else ""))

    def flash_bytes(self, program, bits=None) -> int:
        """Weights and constants as integers, a bias, a multiplier and a shift a channel, tables: what units
        read when the program runs (`hw.mcu_flash`).
        """
        return sum(stored(program, self._units(program), bits or self.weight_bits).values())

    def _units(self, program) -> Units:
        rejected = self.plan.rejected if self.plan is not None else frozenset()
        return Units(program, rejected, self.name, act_bytes=self.activation_bits // 8)

    # Prices

    def cost(self, op, ctx) -> OpCost:
        """Price of one execution of `op`. Raises: UnsupportedPrimitive for kernels and collectives."""
        if isinstance(op.dims, CollectiveDims) or op.kind == "kernel":
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source, f"{self.name} is one core"
            )
        if "mcu units" not in ctx.memo:
            ctx.memo["mcu units"] = self._units(ctx.program)
            plan = self.memory(ctx.program)
            ctx.memo["mcu plan"] = plan
            ctx.memo["mcu rows"] = _rows(plan)
            # A product that waits for its bias, or for its transpose, is charged as the product.
            found = ctx.memo["mcu units"].of.items()
            ctx.memo["mcu behind"] = {u.op.id: i for i, u in found if u.bias is not None or u.perm}
        units, at = ctx.memo["mcu units"], ctx.memo["mcu behind"].get(op.id, op.id)
        unit, by_rows = units.of.get(at) or units.unit(op), ctx.memo["mcu rows"].get(at, {})
        if (unit.bias is not None or unit.perm) and at == op.id:
            return OpCost(flops=ctx.counts(op).flops, basis=self._basis)
        if unit.kind == "free" and all(o in units.static for o in op.outputs):
            return OpCost(basis=self._basis)
        straight = getattr(self.formats, "straight", {}).get(op.id, True)
        w = work(unit, units, self.core, self.weight_bits, own=self.profile == "emitted", straight=straight,
                 **by_rows)  # fmt: skip
        done, total = self.formats.near.get(op.id, (1, 1)) if self.formats is not None else (1, 1)
        cycles = w.cycles(self.core, self.profile, self.cpi, done / total if total else 1.0)
        moved = _moved(unit, units)
        stall = self._stall(unit, units, ctx.memo["mcu plan"]) if len(self.regions) > 1 else 0.0
        busy = {"core": (cycles + stall) / self.clock_hz, "flash": w.flash / self.flash_bytes_s}
        busy = {k: s for k, s in busy.items() if s > 0}
        seconds = max(busy.values(), default=0.0)
        warnings = (w.note,) if w.note else ()
        if w.soft:
            warnings += (
                f"{op.label} has no int{self.activation_bits} form: {w.soft:,} results in float, "
                + self._float_words,
            )
        return OpCost(
            busy_s=busy,
            energy_j=seconds * self.clock_hz * self.energy.joules_per_cycle
            + w.flash * self.energy.flash_joules_per_byte,
            bytes_by_level={k: v for k, v in (("sram", moved), ("flash", w.flash)) if v},
            macs=w.macs,
            flops=w.flops,
            high=sum(busy.values()) / seconds if seconds else 1.0,
            basis=self._basis,
            warnings=warnings,
        )

    @property
    def _float_words(self):
        return "by its unit" if self.core in ("cortex_m4", "cortex_m7") else "in software"

    @property
    def _basis(self):
        return (
            self.basis
            or f"instructions of {self.profile} kernels times {self.cpi:g} cycles; parts from memory"
        )

    def _stall(self, unit, units, plan):
        """Cycles lost to memories slower than the core."""
        speed = {r.name: r.speed for r in self.regions}
        total = 0.0
        for i in (*units.reads(unit), *units.writes(unit)):
            b = plan.flow.buffer(i)
            if plan.flow.held(i) and b in plan.owner:
                s = speed[plan.where(i)[0]]
                total += plan.flow.size(i) * max(1 / s - 1 / FULL_SPEED, 0.0)
        return total


_LAST = {}  # the last memory plan: place and cost ask for the same one


def _rows(plan):
    """{op: how its unit runs} of the units that run by rows."""
    found = {}
    for g in plan.segments:
        for n in range(g.first, g.last + 1):
            step = plan.flow.steps[n]
            if g.rows > 1 and step.unit is not None:
                aside = any(("row", o) in g.inner for o in step.writes)
                read = map(plan.flow.buffer, step.reads)
                held = plan.flow.size(g.streamed) if g.streamed is not None and g.streamed in read else 0
                found[step.op.id] = {"rows": g.rows, "aside": aside, "streamed": held}
    return found


def _moved(unit, units):
    """Bytes of SRAM that a unit reads and writes."""
    if unit.kind in ("free", "view"):
        return 0
    size = lambda t: t.size * units.act_bytes if is_float(t.dtype) else t.nbytes
    ids = (*(i for i in units.reads(unit) if i not in units.static), *units.writes(unit))
    return sum(size(units.tensors[i]) for i in dict.fromkeys(ids))


def _named(program, i, what, size):
    """(name, shape, bytes) of what lies in flash."""
    if i is None:
        return what, (), size
    t = program.tensors[i]
    return t.name or (f"folded {what}" if folded_from(program, i) else t.role), t.shape, size


def policy_of(program, plan) -> Int8Policy:
    """The arithmetic of a plan."""
    return (Int16Policy if plan.activation_bits == 16 else Int8Policy)(program, plan)


def _preset(name, given):
    numbers = dict(MCUS[name].numbers)
    energy = EnergyTable(numbers.pop("joules_per_cycle"), numbers.pop("flash_joules_per_byte"))
    return Mcu(**{"name": name, **numbers, "energy": energy, **given})


def stm32f427(**fields) -> Mcu:
    """STM32F427: Cortex-M4 at 180 MHz, 256 KB, 1 MB of flash."""
    return _preset("stm32f427", fields)


def stm32f746(**fields) -> Mcu:
    """STM32F746: Cortex-M7 at 216 MHz, 320 KB, 1 MB of flash."""
    return _preset("stm32f746", fields)


def stm32h743(**fields) -> Mcu:
    """STM32H743: Cortex-M7 at 480 MHz, 512 KB, 2 MB of flash."""
    return _preset("stm32h743", fields)


def esp32c3(**fields) -> Mcu:
    """ESP32-C3: a RISC-V core at 160 MHz without vectors or floats, 384 KB, 4 MB of serial flash."""
    return _preset("esp32c3", fields)


def mps2_an385(**fields) -> Mcu:
    """A Cortex-M3 at 100 MHz with 256 KB: the board that emulators have."""
    return _preset("mps2_an385", fields)


PRESETS = {f.__name__: f for f in (stm32f427, stm32f746, stm32h743, esp32c3, mps2_an385)}
