"""`Pim`: DRAM with a multiplier at every bank, priced by its commands and run in its number formats.

A product whose one operand lies in the banks costs what its commands take (`hw.pim_schedule`): broadcasts,
activates, columns, drains, refreshes. Everything else is done beside the memory by `asic`, over the pins.
Weights, constants and what `trace(..., weights=...)` names lie in the banks; another operand must be written
there first, at the speed of the pins. Numbers of devices: `hw.parts`.
"""

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from math import ceil, prod

from hw.errors import UnsupportedPrimitive
from hw.parts import ASICS, PIM_ENERGY, PIMS
from hw.pim_check import Violation, check_commands  # noqa: F401
from hw.pim_formats import policy
from hw.pim_place import place_tensors
from hw.pim_schedule import (  # noqa: F401
    REGISTERS,
    Command,
    KernelCycles,
    Timeline,
    batch_cycles,
    crossover_batch,
    kernel_cycles,
    matvec_cycles,
    matvec_timeline,
    replay,
    schedule_matvec,
    weights_columns,
    weights_rows,
)
from hw.program import CollectiveDims, ConvDims, ElementwiseDims, Kernel, MatmulDims, is_float
from hw.report import OpCost
from hw.target import Placement, Target

VALUE_BYTES = 2  # a bfloat16 or float16 number
TRANSCENDENTAL_OPS = 14  # range reduction, a polynomial of order 6, scaling: half adds, half multiplies
DIV_OPS = 8  # a seed and three Newton steps
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
class Pim(Target):
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

    # Prices

    def cost(self, op, ctx):
        """Price of one execution of `op`. Raises: UnsupportedPrimitive."""
        d = op.dims
        if isinstance(d, CollectiveDims):
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source, f"{self.name} is one machine: no collectives"
            )
        if isinstance(d, ConvDims):
            k, n = d.in_channels // d.groups * prod(d.kernel), d.out_channels // d.groups
            d = MatmulDims(d.groups, n, d.batch * prod(d.out_spatial), k)  # the kernels are the left operand
            return self._product(op, ctx, d, ctx.inputs(op)[::-1])
        if isinstance(d, MatmulDims):
            return self._product(op, ctx, d, ctx.inputs(op)[:2])
        if op.kind == "gather" and self._resident(op.inputs[0], ctx) and self.placement != "host":
            return self._gather(op, ctx)
        if op.prim in ("add", "mul") and op.kind == "elementwise" and self._both_resident(op, ctx):
            return self._elementwise(op, ctx)
        return self._outside(op, ctx)

    def _resident(self, i, ctx):
        """Does a tensor lie in the banks: a weight, a constant, a view, slice or update of one."""
        key = ("resident", i)
        if key not in ctx.memo:
            ctx.memo[key] = _lies_in_banks(ctx, i)
        return ctx.memo[key]

    def _both_resident(self, op, ctx):
        a, b = ctx.inputs(op)
        return a.shape == b.shape and all(self._resident(t.id, ctx) for t in (a, b))

    def _product(self, op, ctx, d, operands):
        """b products [m, k] x [k, n]: in the banks with either operand there, or outside; the fastest."""
        c = ctx.counts(op)
        if not c.macs:
            return self._outside(op, ctx)
        dtype = operands[0].dtype
        if dtype in ("float64", "complex64", "complex128"):
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} computes in {self.fmt}: no unit for {dtype}",
            )  # fmt: skip
        ways = []
        if is_float(dtype) and self.placement != "host":
            for tensor, m, batch in ((operands[1], d.n, d.m), (operands[0], d.m, d.n)):
                written = 0 if self._resident(tensor.id, ctx) else d.b * m * d.k * VALUE_BYTES
                ways.append(self._in_banks(d.b, m, d.k, batch, written, c))
        if self.asic is not None:
            ways.append(self._outside(op, ctx, product=d, operands=operands))
        if not ways:
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} has no unit for {dtype} products in its banks and no asic beside them",
            )  # fmt: skip
        if self.placement == "single_channel":
            return ways[0]
        return min(ways, key=lambda w: sum(w.busy_s.values()))

    def _in_banks(self, b, m, k, batch, written, c):
        """b times `batch` vectors of k inputs against m outputs each, after `written` bytes of weights."""
        whole = self if self.placement != "single_channel" else _one_channel(self)
        choices = [(b, whole)]
        if b > 1 and whole.channels > 1:  # a channel a product: one vector is broadcast in each
            choices.append((ceil(b / whole.channels), _one_channel(self)))
        rounds, used = min(choices, key=lambda r: r[0] * _batch_cycles(m, k, r[1], batch))
        t = matvec_timeline(m, k, used)
        ticks = rounds * _batch_cycles(m, k, used, batch)
        busy_channels = used.channels * (b / rounds if used.channels < whole.channels else 1)
        vectors = rounds * batch * busy_channels  # of one channel
        internal = vectors * t.mac * self.units * self.column_bytes
        pins = vectors * (t.broadcast + t.drain) * self.column_bytes + written
        write_s = written / self.pin_rate
        seconds, e = ticks * self.tick_s, self.energy
        opened = t.activate * (1 if batch > 1 and self.batch_reuse and self.order != "register" else batch)
        share = t.active_cycles / t.cycles
        power = share * e.open_mw + (1 - share) * e.closed_mw
        joules = 1e-12 * (
            opened * rounds * busy_channels * self.banks * e.act_pj
            + internal / self.column_bytes * e.mac_pj
            + pins * 8 * e.pin_pj_per_bit
            + written / self.column_bytes * e.write_pj
            + ticks / self.t_refi * self.refresh * self.channels * e.refresh_pj
        ) + 1e-3 * self.channels * (
            power * seconds + e.open_mw * write_s + e.controller_mw * (seconds + write_s)
        )
        busy = {"banks": seconds + write_s}  # one after the other
        return OpCost(
            busy_s=busy,
            energy_j=joules,
            bytes_by_level={"banks": internal, "pins": pins},
            macs=c.macs,
            flops=c.flops,
            basis="commands of one channel, replayed",
        )

    def _outside(self, op, ctx, product=None, operands=()):
        """The op on the vector unit beside the banks, its bytes over the pins or in the scratchpad."""
        c, a = ctx.counts(op), self.asic
        work = c.flops + c.transcendentals + c.index_ops
        if product is not None:
            moved = sum(t.size for t in operands) * VALUE_BYTES + ctx.writes(op) * _narrow(ctx.outputs(op))
        else:
            moved = ctx.reads(op) * _narrow(ctx.inputs(op)) + ctx.writes(op) * _narrow(ctx.outputs(op))
        if not work and not moved:
            return OpCost()
        if a is None:
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} has nothing beside its banks: give it asic=Asic(...)",
            )  # fmt: skip
        from_banks = sum(t.size for t in operands if self._resident(t.id, ctx)) * VALUE_BYTES
        near = 0
        if a.sram_kb and moved - from_banks <= a.sram_kb * 1024:
            near, moved = moved - from_banks, from_banks
        adds, muls = self._operations(op, c)
        arithmetic = (ceil(adds / a.adders) + ceil((muls + c.macs) / a.multipliers)) / (a.ghz * 1e9)
        pins_s = moved / self.pin_rate / (1 - self.t_rfc / self.t_refi if self.refresh else 1)
        busy = {r: s for r, s in (("asic", arithmetic), ("pins", pins_s)) if s > 0}
        e, seconds = self.energy, max(busy.values(), default=0.0)
        power = e.open_mw if moved else e.closed_mw
        joules = (
            1e-12 * moved * (8 * e.pin_pj_per_bit + e.read_pj / self.column_bytes)
            + a.watts * arithmetic
            + 1e-3 * self.channels * (power + e.controller_mw) * seconds
        )
        return OpCost(
            busy_s=busy,
            energy_j=joules,
            bytes_by_level={k: v for k, v in (("pins", moved), ("sram", near)) if v},
            macs=c.macs,
            flops=c.flops,
            high=sum(busy.values()) / seconds if seconds else 1.0,
            basis="lanes and pins, side by side",
        )

    def _operations(self, op, c):
        """(additions, multiplications) of an op that is no product."""
        plain = c.flops - 2 * c.macs
        adds, muls = plain + c.index_ops, c.transcendentals * (TRANSCENDENTAL_OPS // 2)
        if isinstance(op.dims, Kernel):
            return adds + muls, muls
        if isinstance(op.dims, ElementwiseDims):
            if op.dims.cls == "div":
                adds, muls = adds * DIV_OPS // 2, muls + plain * DIV_OPS // 2
            elif op.prim in ("mul", "square", "integer_pow"):
                adds, muls = adds - plain, muls + plain
        return adds + c.transcendentals * (TRANSCENDENTAL_OPS // 2), muls

    def _gather(self, op, ctx):
        """Rows of a table in the banks: an activate and its columns for every index, over the pins."""
        index = ctx.inputs(op)[1]
        written = op.dims.written
        rows = max(1, index.size // max(index.shape[-1] if index.shape else 1, 1))
        columns = rows * max(1, ceil(written / rows * VALUE_BYTES / self.column_bytes)) if written else 0
        in_row = max(1, ceil(columns / rows)) if rows else 0
        once = max(self.t_act_read + (in_row - 1) * self.t_burst + self.t_rtp, self.t_ras) + self.t_rp
        # Activates of different banks overlap; a bank works one row at a time, the pins one column.
        ticks = max(
            ceil(rows / (self.channels * self.banks)) * once, ceil(columns / self.channels) * self.t_burst
        )
        seconds, e = (ticks + self.t_cl) * self.tick_s, self.energy
        moved = columns * self.column_bytes
        joules = (
            1e-12 * (rows * e.act_pj + columns * e.read_pj + moved * 8 * e.pin_pj_per_bit)
            + 1e-3 * self.channels * (e.open_mw + e.controller_mw) * seconds
        )
        c = ctx.counts(op)
        return OpCost(
            busy_s={"pins": seconds}, energy_j=joules, bytes_by_level={"pins": moved}, macs=0, flops=c.flops,
            basis="row activates and columns",
        )  # fmt: skip

    def _elementwise(self, op, ctx):
        """Both operands in the banks: three column streams there, or outside; the faster."""
        c, n = ctx.counts(op), ctx.outputs(op)[0].size
        seconds = kernel_cycles(op.prim, n, n, self).pim * self.tick_s if n else 0.0
        if self.asic is not None:
            outside = self._outside(op, ctx)
            if outside.longest_s < seconds:
                return outside
        columns, e = 3 * ceil(n / self.lanes), self.energy
        joules = 1e-12 * columns * e.mac_pj + 1e-3 * self.channels * (e.open_mw + e.controller_mw) * seconds
        return OpCost(
            busy_s={"banks": seconds}, energy_j=joules, bytes_by_level={"banks": columns * self.column_bytes},
            flops=c.flops, basis="column streams",
        )  # fmt: skip


def _narrow(tensors):
    """Bytes in the banks' format over bytes as the program stores them; integers keep theirs."""
    own = sum(t.nbytes for t in tensors)
    narrow = sum(min(t.size * VALUE_BYTES, t.nbytes) if is_float(t.dtype) else t.nbytes for t in tensors)
    return narrow / own if own else 1.0


@lru_cache(maxsize=4096)
def _batch_cycles(m, k, target, batch):
    """Ticks of a batch, rows reused or not, whichever is sooner."""
    apart = batch * matvec_timeline(m, k, target).cycles
    if batch == 1 or not target.batch_reuse:
        return apart
    return min(apart, batch_cycles(m, k, target, batch))


@lru_cache(maxsize=64)
def _one_channel(target):
    return replace(target, channels=1)


PASSED = frozenset(
    "reshape squeeze expand_dims transpose broadcast_in_dim convert_element_type slice dynamic_slice copy "
    "dynamic_update_slice optimization_barrier stop_gradient device_put rev concatenate".split()
)


def _lies_in_banks(ctx, i):
    """Walk up from a tensor through views and updates of stored data, and out of loop bodies."""
    tensors, made, outer = ctx.program.tensors, ctx.memo.get("made"), ctx.memo.get("outer")
    if made is None:
        made, outer = _origins(ctx.program)
        ctx.memo["made"], ctx.memo["outer"] = made, outer
    seen = set()
    while i not in seen:
        seen.add(i)
        if tensors[i].role in ("weight", "const"):
            return tensors[i].size > 1
        if i in outer:
            i = outer[i]
        elif i in made and made[i].prim in PASSED and made[i].inputs:
            i = made[i].inputs[0]
        else:
            return False
    return False


def _origins(program):
    """({tensor: op that makes it}, {input of a loop's or branch's body: what is handed in})."""
    from hw.program import Loop, walk

    made, outer = {}, {}
    for op in walk(program.body):
        made.update(dict.fromkeys(op.outputs, op))
        if isinstance(op.dims, Loop):
            handed = op.inputs[op.dims.cond_consts :]
            outer.update(zip(op.dims.body.inputs, handed, strict=False))
        elif op.kind == "branch":
            for block in op.blocks:
                outer.update(zip(block.inputs, op.inputs[1:], strict=False))
    return made, outer


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
