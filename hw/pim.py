"""`Pim`: DRAM with a multiplier at every bank, priced by its commands and run in its number formats.

A product whose one operand lies in the banks costs what its commands take (`hw.pim_schedule`): broadcasts,
activates, columns, drains, refreshes. Everything else is done beside the memory by `asic`, over the pins.
Weights, constants and what `trace(..., weights=...)` names lie in the banks; another operand must be written
there first, at the speed of the pins. Numbers of devices: `hw.pim_parts`.
"""

from dataclasses import dataclass, field, fields, replace

from hw.pim_check import Violation, check_commands  # noqa: F401
from hw.pim_cost import Prices
from hw.pim_cycles import (  # noqa: F401
    KernelCycles,
    batch_cycles,
    crossover_batch,
    kernel_cycles,
    matvec_cycles,
    weights_columns,
    weights_rows,
)
from hw.pim_formats import policy
from hw.pim_parts import ASICS, PIM_ENERGY, PIMS
from hw.pim_place import VALUE_BYTES, place_tensors
from hw.pim_schedule import (  # noqa: F401
    REGISTERS,
    Command,
    Timeline,
    matvec_timeline,
    replay,
    schedule_matvec,
)
from hw.target import Placement, Target
from ref.blocks.dram import DramTiming

ORDERS = ("wave_outer", "tile_outer", "register")


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules of an activate and an in-bank column (a bank each), an external read or write (a column),
    a bit over the pins, a refresh (a channel); milliwatts of a channel with rows open and closed, and of its
    controller.
    """

    act_pj: float
    mac_pj: float
    read_pj: float
    write_pj: float
    pin_pj_per_bit: float
    refresh_pj: float
    open_mw: float
    closed_mw: float
    controller_mw: float = 0.0


@dataclass(frozen=True)
class Asic:
    """What computes beside the banks: adders and multipliers of a vector unit, its clock, its scratchpad
    (0: every value crosses the pins) and its power while it works.
    """

    name: str
    adders: int
    multipliers: int
    ghz: float
    sram_kb: float
    watts: float


@dataclass(frozen=True, kw_only=True)
class Pim(Prices, Target):
    """A DRAM-PIM machine; every field is an option, `replace(gddr6_aim(), channels=32)` is a machine.

    units: multipliers a channel, one for each banks / units banks. rows: of a bank, `reserved_bytes` of it
    are not for data. Ticks of tick_ps picoseconds: t_act_mac, t_act_read, t_act_write (ACT to column), t_rp,
    t_ras, t_ccd (a column in the banks), t_burst (a column over the pins), t_rtp, t_cl, t_cwl, t_wr, t_mode
    (change between broadcasting and multiplying), t_drain (last column to result), t_turn (result to next
    broadcast), t_start, t_issue, t_end (first command, column to mode change, result to end), t_rfc, t_refi,
    t_ref_first (first refresh; None: t_refi).
    order, pack_rows: see `hw.pim_schedule`. double_buffer_gb: the next slice is broadcast beside the columns.
    batch_reuse: further vectors use the open row. placement: "auto" takes the faster of banks and host for
    each product, "single_channel" keeps every tensor in one channel, "host" computes nothing in the banks.
    row_interleave: columns used of each activated row (None: all). power_limited: columns 16/9 slower, what
    AttAcc's power budget leaves. activation: "table" looks up tanh, logistic and erf in the banks.
    fmt: "bf16_tree" or "fp16_lane"; acc: of the tree's accumulator.
    """

    name: str = "pim"
    channels: int
    banks: int
    units: int
    lanes: int
    row_bytes: int
    column_bytes: int
    rows: int
    tick_ps: float
    t_act_mac: int
    t_act_read: int
    t_act_write: int
    t_rp: int
    t_ras: int
    t_ccd: int
    t_burst: int
    t_rtp: int
    t_cl: int
    t_cwl: int
    t_wr: int
    t_mode: int
    t_drain: int
    t_rfc: int
    t_refi: int
    t_start: int = 0
    t_issue: int = 0
    t_turn: int = 0
    t_end: int = 0
    t_ref_first: int | None = None
    refresh: bool = True
    order: str = "wave_outer"
    pack_rows: bool = False
    double_buffer_gb: bool = False
    batch_reuse: bool = True
    placement: str = "auto"
    row_interleave: int | None = None
    power_limited: bool = False
    fmt: str = "bf16_tree"
    acc: str = "f32"
    activation: str = "host"
    asic: Asic | None = None
    allow_mismatch: bool = False
    reserved_bytes: int = 0
    energy: EnergyTable = field(default_factory=lambda: EnergyTable(**PIM_ENERGY["gddr6_aim"].numbers))

    def __post_init__(self):
        for n in fields(self):
            value = getattr(self, n.name)
            if n.name.startswith("t_") and n.name != "tick_ps" and value is not None:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ValueError(f"{n.name} must be an integer number of ticks, got {value!r}")
                if value < 0:
                    raise ValueError(f"{n.name} must not be negative, got {value}")
        for name in (
            "channels", "banks", "units", "lanes", "row_bytes", "column_bytes", "rows", "tick_ps",
            "t_act_mac", "t_act_read", "t_act_write", "t_rp", "t_ras", "t_ccd", "t_burst", "t_rtp", "t_drain",
            "t_rfc", "t_refi",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, allowed in (
            ("order", ORDERS), ("placement", ("auto", "single_channel", "host")),
            ("fmt", ("bf16_tree", "fp16_lane")), ("acc", ("f32", "bf16")), ("activation", ("host", "table")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.banks % self.units:
            raise ValueError(f"units must divide the {self.banks} banks, got {self.units}")
        if self.row_bytes % self.column_bytes:
            raise ValueError(f"column_bytes must divide row_bytes {self.row_bytes}, got {self.column_bytes}")
        if self.lanes * VALUE_BYTES != self.column_bytes and not self.allow_mismatch:
            raise ValueError(
                f"lanes must be {self.column_bytes // VALUE_BYTES}, the values in a column of "
                f"{self.column_bytes} bytes, got {self.lanes}; allow_mismatch=True permits it"
            )
        if self.fmt == "bf16_tree" and self.lanes & (self.lanes - 1):
            raise ValueError(f"lanes must be a power of two for a tree, got {self.lanes}")
        if self.t_ras < self.t_act_read:
            raise ValueError(f"t_ras must be at least t_act_read = {self.t_act_read}, got {self.t_ras}")
        if self.t_ras > self.t_act_mac + (self.row_columns - 1) * self.t_ccd + self.t_rtp:
            raise ValueError(f"t_ras must not exceed the time of a full row, got {self.t_ras}")
        if self.t_refi <= self.t_rfc:
            raise ValueError(f"t_refi must exceed t_rfc = {self.t_rfc}, got {self.t_refi}")
        if self.row_interleave is not None and not 1 <= self.row_interleave <= self.row_columns:
            raise ValueError(f"row_interleave must be in 1..{self.row_columns}, got {self.row_interleave}")
        if self.double_buffer_gb and (self.t_mode or self.order != "tile_outer"):
            raise ValueError('double_buffer_gb needs order="tile_outer" and t_mode=0: one mode at a time')
        if self.power_limited and self.pack_rows:
            raise ValueError("power_limited needs pack_rows=False")
        if not 0 <= self.reserved_bytes < self.rows * self.row_bytes:
            raise ValueError(
                f"reserved_bytes must be in 0..{self.rows * self.row_bytes - 1}, got {self.reserved_bytes}"
            )

    # Sizes and rates

    @property
    def row_columns(self):
        """Columns of a row."""
        return self.row_bytes // self.column_bytes

    @property
    def open_columns(self):
        """Columns used of an activated row."""
        return self.row_interleave or self.row_columns

    tile_columns = row_columns  # of the buffer that a broadcast fills: a row's worth

    @property
    def tile(self):
        """Inputs that the buffer holds."""
        return self.tile_columns * self.lanes

    @property
    def outputs(self):
        """Outputs of one wave: one a unit, or one a register where the units have registers."""
        return self.channels * self.units * (REGISTERS if self.order == "register" else 1)

    @property
    def refresh_due(self):
        """Tick of the first refresh."""
        return self.t_refi if self.t_ref_first is None else self.t_ref_first

    def mac_span(self, columns):
        """Ticks of a burst of column operations in the banks."""
        if self.power_limited:
            return -(-columns * self.t_ccd * 16 // 9)
        return columns * self.t_ccd

    @property
    def tick_s(self):
        """Seconds of a tick."""
        return self.tick_ps * 1e-12

    @property
    def timing(self):
        """The sizes and times of the closed forms of `ref.blocks.dram`."""
        write = self.t_cwl + self.t_burst - self.t_ccd + self.t_wr  # last write column to precharge
        return DramTiming(
            self.channels, self.banks, self.lanes, self.row_columns, self.tile, self.t_act_mac, self.t_rp,
            self.t_ras, self.t_ccd, self.t_rtp, write, self.t_burst,
        )  # fmt: skip

    @property
    def pin_rate(self):
        """Bytes a second over the pins of all channels."""
        return self.channels * self.column_bytes / (self.t_burst * self.tick_s)

    @property
    def bank_rate(self):
        """Bytes a second that all units read from their banks."""
        return self.channels * self.units * self.column_bytes / (self.mac_span(9) / 9 * self.tick_s)

    @property
    def peak_flops(self):
        """Operations a second of all lanes, a multiply-accumulate counted two."""
        return 2 * self.bank_rate / VALUE_BYTES

    @property
    def clock_hz(self):
        """Ticks a second."""
        return 1 / self.tick_s

    @property
    def capacity(self):
        """Bytes for data in one bank."""
        return {"bank": self.rows * self.row_bytes - self.reserved_bytes}

    @property
    def formats(self):
        """The arithmetic of the units."""
        return policy(self)

    def place(self, program) -> Placement:
        """Weights as the schedule lays them out, everything else spread evenly. Raises: DoesNotFit."""
        return place_tensors(program, self)


def _preset(name, given, asic):
    energy = EnergyTable(**PIM_ENERGY[name].numbers)
    made = Pim(name=name, energy=energy, asic=Asic(**ASICS[asic].numbers), **PIMS[name].numbers)
    return replace(made, **given) if given else made


def gddr6_aim(channels: int = 16, **fields) -> Pim:
    """SK hynix GDDR6-AiM, two channels a chip."""
    return _preset("gddr6_aim", {"channels": channels, **fields}, "host")


def hbm2_pim(**fields) -> Pim:
    """Samsung HBM2-PIM, 64 pseudo-channels of four stacks."""
    return _preset("hbm2_pim", fields, "host")


def hbm3_attacc(**fields) -> Pim:
    """AttAcc's HBM3 with units at the banks, one stack."""
    return _preset("hbm3_attacc", fields, "host")


def pim_gpt(**fields) -> Pim:
    """PIM-GPT, eight channels of GDDR6 and an ASIC."""
    return _preset("pim_gpt", fields, "pim_gpt")


PRESETS = {f.__name__: f for f in (gddr6_aim, hbm2_pim, hbm3_attacc, pim_gpt)}
