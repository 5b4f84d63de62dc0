"""`Fpga`: pipelined loops over on-chip buffers and a few wide ports, in fixed point; two designs.

"stream" is Edge-MoE's kind of machine: one linear unit that all dense layers share, queries that stay while
keys stream past, lanes for the rest. "systolic" is an array of multipliers with its memories. A fusion group
is one dataflow region: its loops run side by side at an initiation interval of 1, so it takes as long as the
longest of them and the depths of all; loads of weights overlap the compute of the layer before. Numbers of
parts: `hw.boards`; closed forms: `ref.blocks.stream`, `hw.systolic`; resources: `hw.fabric`.
"""

from dataclasses import dataclass, replace
from math import ceil

from hw.boards import BOARDS, DEPTH, MEMORY, POWER
from hw.errors import DoesNotFit, UnsupportedPrimitive
from hw.fabric import Resources, check_fit, resources  # noqa: F401
from hw.fixed_plan import EDGE_MOE, FormatPlan
from hw.formats import Fixed
from hw.fpga_search import initiation_intervals, search  # noqa: F401
from hw.front import program_in
from hw.fusion import touched, written
from hw.liveness import _peak as peak_within
from hw.loops import SCATTERS, Part, burst, dense, other
from hw.program import CollectiveDims, ConvDims, Kernel, Loop, MatmulDims, Tensor, is_float, walk
from hw.report import OpCost
from hw.stream import simulate_attention, simulate_experts, simulate_pipeline  # noqa: F401
from hw.systolic import DATAFLOWS, SystolicCount, simulate_systolic, systolic_cycles  # noqa: F401
from hw.target import Context, Placement, Target, largest
from hw.verilog import emit_systolic_verilog  # noqa: F401
from hw.verilog_attention import emit_attention_verilog  # noqa: F401
from hw.verilog_linear import emit_linear_verilog  # noqa: F401
from ref.blocks.fixed import fixed_cast, fixed_matmul  # noqa: F401
from ref.blocks.stream import (  # noqa: F401
    StageCycles,
    attention_cycles,
    attention_steps,
    linear_cycles,
    moe_cycles,
    pipeline_cycles,
)

BACKENDS = ("stream", "systolic")
_SIZES = {
    "stream": ("linear_in", "linear_out", "attn_parallel", "weight_kb", "tile_kb"),
    "systolic": ("rows", "cols", "sram_kb", "tile_kb"),
}


@dataclass(frozen=True, kw_only=True)
class Fpga(Target):
    """A design on an FPGA; every field is an option.

    Part: dsp, bram36, uram, lut, ff, dsp_ports (bits of a multiplier's operands), shell_fraction (what the
    platform takes), dram_gbps, dram_gb. Clock: mhz. Ports: axi_ports of axi_bits for each of weights, inputs
    and results. Design: backend, and for "stream" linear_in x linear_out products a cycle, attn_parallel
    resident queries, weight_kb of each of the two weight buffers; for "systolic" rows, cols, dataflow, drain,
    sram_kb of each operand's memory (there are two of each). tile_kb: each of the two buffers for tiles of
    activations. overlap=False: loads, loops and stores follow one another. resident_weights: the weights stay
    on the chip. formats: the arithmetic (a Fixed stands for all tensors). Power: static_w, milliwatts of a
    multiplier and a memory block and microwatts of a look-up table at 300 MHz, dram_pj_per_bit.
    """

    name: str = "fpga"
    dsp: int
    bram36: int
    lut: int
    ff: int
    uram: int = 0
    dsp_ports: tuple[int, int] = (27, 18)
    shell_fraction: float = 0.0
    mhz: float = 200.0
    axi_bits: int = 256
    axi_ports: int = 1
    dram_gbps: float
    dram_gb: float
    backend: str = "stream"
    linear_in: int = 16
    linear_out: int = 16
    attn_parallel: int = 4
    weight_kb: int = 288
    rows: int = 16
    cols: int = 16
    dataflow: str = "os"
    drain: bool = False
    sram_kb: int = 64
    tile_kb: int = 128
    overlap: bool = True
    resident_weights: bool = False
    formats: FormatPlan = EDGE_MOE
    static_w: float
    dram_pj_per_bit: float
    dsp_mw: float = POWER.numbers["dsp_mw"]
    bram36_mw: float = POWER.numbers["bram36_mw"]
    uram_mw: float = POWER.numbers["uram_mw"]
    lut_uw: float = POWER.numbers["lut_uw"]

    def __post_init__(self):
        if isinstance(self.formats, Fixed):
            object.__setattr__(self, "formats", FormatPlan(activations=self.formats, weights=self.formats))
        if not isinstance(self.formats, FormatPlan):
            raise ValueError(f"formats must be a FormatPlan or Fixed, got {type(self.formats).__name__}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.dataflow not in DATAFLOWS:
            raise ValueError(f"dataflow must be one of {', '.join(DATAFLOWS)}, got {self.dataflow!r}")
        for name in (
            "dsp", "bram36", "lut", "ff", "mhz", "axi_bits", "axi_ports", "dram_gbps", "dram_gb", "linear_in",
            "linear_out", "attn_parallel", "weight_kb", "rows", "cols", "sram_kb", "tile_kb",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("uram", "static_w", "dram_pj_per_bit", "dsp_mw", "bram36_mw", "uram_mw", "lut_uw"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.shell_fraction < 1:
            raise ValueError(f"shell_fraction must be in [0, 1), got {self.shell_fraction}")
        if self.axi_bits < max(self.act_bits, self.weight_bits):
            raise ValueError(f"axi_bits must hold a number of {self.act_bits} bits, got {self.axi_bits}")

    # What the fields amount to.

    @property
    def clock_hz(self):
        """Ticks a second."""
        return self.mhz * 1e6

    @property
    def act_bits(self) -> int:
        """Bits of an activation."""
        return _bits(self.formats.activations, "activation")

    @property
    def weight_bits(self) -> int:
        """Bits of a weight matrix's number."""
        w = self.formats.weights
        return self.act_bits if w is None else _bits(w, "weight")

    @property
    def lanes(self) -> int:
        """Activations that a port hands over each cycle, and that the elementwise lanes take."""
        return self.axi_bits // self.act_bits

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the fields that set how much of the part the design takes."""
        return _SIZES[self.backend]

    @property
    def peak_macs(self) -> int:
        """Multiply-accumulates a cycle of the unit that dense layers run on."""
        return self.linear_in * self.linear_out if self.backend == "stream" else self.rows * self.cols

    @property
    def power_w(self) -> float:
        """Watts of a busy design, memory left out."""
        r, at = resources(self), self.mhz / 300
        mw = r.dsp * self.dsp_mw + r.bram36 * self.bram36_mw + r.uram * self.uram_mw
        return self.static_w + at * (mw * 1e-3 + r.lut * self.lut_uw * 1e-6)

    @property
    def capacity(self):
        """Bytes of main memory."""
        return {"dram": int(self.dram_gb * 1e9)}

    def place(self, program):
        """Check that the design fits the part and the program's arrays, in their formats, the memory.

        Raises: DoesNotFit naming the resource, what it would take to fit, and the exact shortfall.
        """
        used = check_fit(self)
        stored = program_in(program, self.formats)
        inner = frozenset()
        if self.fuse:
            found = Context(program).by_op.values()
            inner = frozenset(o for g in found for op in g.ops for o in op.outputs if o not in g.outputs)
        peak = peak_within(stored, program.body.ops, inner)
        room = self.capacity["dram"]
        if peak > room:
            hints = ("fewer bits a value", "a smaller batch", "a board with more memory")
            raise DoesNotFit(self.name, "dram", peak, room, largest(stored), hints)
        size = lambda bram, uram: bram * 4608 + uram * 36864
        regions = {"dram": (peak, room)}
        chip = size(used.bram36, used.uram), size(*_blocks(self))
        if self.resident_weights:
            held = sum(t.nbytes for t in stored.tensors.values() if _is_stored(t, program))
            need = chip[0] + held
            if need > chip[1]:
                bits = self.weight_bits * (chip[1] - chip[0]) // max(held, 1)
                hints = [f"weights of {bits} bits"] * (bits > 0) + ["resident_weights=False", "a larger part"]
                raise DoesNotFit(self.name, "on-chip memory", need, chip[1], largest(stored), hints)
            chip = need, chip[1]
        return Placement(regions | {"on-chip memory": chip}, peak)

    # Prices. A group's ops are priced together; each gets its part.

    def cost(self, op, ctx):
        """Price of one execution of `op`, as a part of its dataflow region. Raises: UnsupportedPrimitive."""
        if isinstance(op.dims, CollectiveDims):
            why = f"{self.name} is one device: no collectives"
            raise UnsupportedPrimitive(op.prim, ctx.shape(op), op.scope, op.source, why)
        group = ctx.group(op)
        key = ("fpga", group.id)
        if key not in ctx.memo:
            ctx.memo[key] = self._region(group, ctx)
        return ctx.memo[key][op.id]

    def _region(self, group, ctx):
        """{op: cost} of a fusion group."""
        if ("fpga", "stored") not in ctx.memo:
            stored = program_in(ctx.program, self.formats)
            weights = _weights(stored, ctx.program)
            alike = {i: replace(stored.tensors[i], dtype=d) for i, d in weights.items()}
            ctx.memo["fpga", "weights"] = weights
            ctx.memo["fpga", "stored"] = replace(stored, tensors={**stored.tensors, **alike})
            ctx.memo["fpga", "kept"] = _kept_weights(ctx.memo["fpga", "stored"], self.weight_kb * 1024)
        parts = {op.id: self._op(op, group, ctx) for op in group.ops}
        lanes = [p.cycles.get("lanes", 0) for p in parts.values()]
        side_by_side = max(lanes) / sum(lanes) if self.overlap and sum(lanes) else 1.0
        busy, depth = {}, sum(p.depth for p in parts.values())
        moved = any(p.beats or p.dram for p in parts.values())
        depth += MEMORY.numbers["latency"] if moved else 0
        for i, p in parts.items():
            cycles = {k: c * (side_by_side if k == "lanes" else 1) for k, c in p.cycles.items()}
            for stream, beats in p.beats.items():
                cycles[stream] = cycles.get(stream, 0) + beats / self.axi_ports
            seconds = {k: c / self.clock_hz for k, c in cycles.items() if c > 0}
            if p.dram:
                seconds["dram"] = p.dram / (self.dram_gbps * 1e9)
            busy[i] = seconds
        if not self.overlap:  # the memory is what its ports wait for
            busy = {i: {"serial": _serial(b)} if b else {} for i, b in busy.items()}
        total = {}
        for b in busy.values():
            for k, s in b.items():
                total[k] = total.get(k, 0.0) + s
        overhead = depth / self.clock_hz
        longest = max(total.values(), default=0.0)
        share = {i: max(b.values(), default=0.0) for i, b in busy.items()}
        whole = sum(share.values())
        high = (overhead + sum(map(_serial, busy.values()))) / (overhead + longest) if longest else 1.0
        watts, out, first = self._watts(ctx), {}, group.ops[0].id
        for i, p in parts.items():
            part = share[i] / whole if whole else 1 / len(parts)
            out[i] = OpCost(
                busy_s=busy[i],
                overhead_s=overhead if i == first else 0.0,
                energy_j=watts * (overhead + longest) * part + p.dram * 8 * self.dram_pj_per_bit * 1e-12,
                bytes_by_level={k: v for k, v in (("dram", p.dram), ("sram", p.sram)) if v},
                macs=p.macs,
                flops=p.flops,
                high=max(high, 1.0),
                basis="loop schedule, fixed point; resources by our table",
                warnings=p.warnings,
            )
        return out

    def _watts(self, ctx):
        if ("fpga", "watts") not in ctx.memo:
            ctx.memo["fpga", "watts"] = self.power_w
        return ctx.memo["fpga", "watts"]

    def _op(self, op, group, ctx):
        """What one op keeps busy and moves."""
        c, d, stored = ctx.counts(op), op.dims, ctx.memo["fpga", "stored"]
        tensor, weights = stored.tensors, ctx.memo["fpga", "weights"]
        if op.outputs and op.outputs[0] in weights and op.prim != "gather":
            return Part()  # an address: whoever multiplies by it loads it
        used = [o for o in group.ops if o.outputs[:1] and o.outputs[0] not in weights]
        outside = [
            i
            for i in dict.fromkeys(op.inputs)
            if (i in group.inputs or i in weights)
            and next((o.id for o in used if i in o.inputs), None) == op.id
        ]
        left = [o for o in op.outputs if o in group.outputs]
        p = Part(macs=c.macs, flops=c.flops)
        beats = {"weights": 0, "read": 0, "write": 0}
        if isinstance(d, Kernel):
            p.cycles = {"products": c.macs / self.peak_macs}
            p.cycles["lanes"] = (c.flops - 2 * c.macs + c.index_ops + c.transcendentals) / self.lanes
            p.depth, read, write = DEPTH.numbers["transcendental"], ctx.reads(op), ctx.writes(op)
            beats["read"], beats["write"] = self._beats(read), self._beats(write)
        else:
            if isinstance(d, MatmulDims | ConvDims):
                again = dense(self, op, p, stored, weights)
            else:
                other(self, op, p, stored)
                again = {}
            for i in outside:
                port = "weights" if i in weights else "read"
                once = self._rows(tensor[i], touched(stored, op, i), bool(again))
                if port == "weights" and (self.resident_weights or op.attrs.get("folded")):
                    continue
                kept = (op.trips or 1) if i in ctx.memo["fpga", "kept"] else 1
                beats[port] += once * again.get(i, 1) / kept
            for o in left:
                beats["write"] += self._rows(tensor[o], written(stored, op, o), bool(again)) * again.get(o, 1)
            if op.prim in ("gather", *SCATTERS) and sum(beats.values()):
                bursts = ceil(d.written / burst(op, tensor))
                p.cycles["bursts"] = bursts * MEMORY.numbers["latency"] / MEMORY.numbers["outstanding"]
        p.beats = {k: n for k, n in beats.items() if n}
        p.dram = sum(beats.values()) * self.axi_bits / 8
        p.cycles = {k: n for k, n in p.cycles.items() if n > 0}
        return p

    def _beats(self, nbytes):
        return ceil(nbytes * 8 / self.axi_bits)

    def _rows(self, t, nbytes, by_row):
        """Beats of an array: of a product's operand every row starts a new one."""
        if by_row and t.shape and t.nbytes == nbytes and t.size:
            rows = t.size // t.shape[-1]
            return rows * self._beats(nbytes / rows)
        return self._beats(nbytes)


def _serial(busy):
    """Seconds of what an op does, one after another; the memory only where it is slower than the ports."""
    ports = sum(busy.get(k, 0.0) for k in ("weights", "read", "write"))
    units = sum(s for k, s in busy.items() if k not in ("weights", "read", "write", "dram"))
    return units + max(ports, busy.get("dram", 0.0))


def _weights(program, original) -> dict[int, str]:
    """{tensor: its dtype} of weights, constants, and what is cut or turned out of them, stored alike."""
    found = {i: t.dtype for i, t in program.tensors.items() if t.role in ("weight", "const")}
    ends = {o for op in walk(program.body) for b in op.blocks for o in b.outputs} | set(program.body.outputs)
    for op in walk(program.body):
        if op.kind in ("move", "gather") and op.inputs and op.inputs[0] in found:
            places = (original.tensors[i] for i in op.inputs[1:])
            if all(t.id in found or not is_float(t.dtype) for t in places):
                found.update((o, found[op.inputs[0]]) for o in op.outputs if o not in ends)
    return found


def _bits(choose, role):
    f = choose if isinstance(choose, Fixed) else choose(Tensor(0, (2, 2), "float32", role))
    return f.bits


def _is_stored(t, program):
    """Is a tensor a weight that the caller holds (a folded view of one is the same bytes)."""
    return t.role == "const" or (t.role == "weight" and t.id in program.body.inputs)


def _blocks(target):
    usable = 1 - target.shell_fraction
    return int(target.bram36 * usable), int(target.uram * usable)


def _kept_weights(program, room):
    """Weights that a loop uses in every trip and that together fit the buffer: loaded once a loop."""
    found = set()
    for op in walk(program.body):
        if isinstance(op.dims, Loop):
            inputs = op.dims.body.inputs[: op.dims.consts]
            held = [i for i in inputs if program.tensors[i].role in ("weight", "const")]
            if sum(program.tensors[i].nbytes for i in held) <= room:
                found.update(held)
    return found


def _preset(name, fields):
    if name not in BOARDS:
        raise ValueError(f"no Fpga preset {name!r}; there are {', '.join(BOARDS)}")
    return Fpga(**{"name": name, **BOARDS[name].numbers, **fields})


def zcu102(**fields) -> Fpga:
    """AMD ZCU102 with Edge-MoE's design at its 300 MHz."""
    return _preset("zcu102", {"mhz": 300.0, **fields})


def u250(**fields) -> Fpga:
    """AMD Alveo U250, a unit of 32 x 32 products and 16 resident queries."""
    return _preset("u250", {"linear_in": 32, "linear_out": 32, "attn_parallel": 16, "axi_ports": 4, **fields})


def u280(**fields) -> Fpga:
    """AMD Alveo U280, a unit of 32 x 32 products and 16 resident queries on its HBM."""
    return _preset("u280", {"linear_in": 32, "linear_out": 32, "attn_parallel": 16, "axi_ports": 8, **fields})


def pynq_z2(**fields) -> Fpga:
    """PYNQ-Z2 at 100 MHz: ports of 64 bits, 16 bit activations, a unit of 8 x 8 products, one query."""
    small = {
        "mhz": 100.0, "axi_bits": 64, "linear_in": 8, "linear_out": 8, "attn_parallel": 1, "weight_kb": 64,
        "tile_kb": 32, "rows": 8, "cols": 8, "sram_kb": 16,
        "formats": FormatPlan(activations=Fixed(16, 6), weights=Fixed(8, 1)),
    }  # fmt: skip
    return _preset("pynq_z2", {**small, **fields})


PRESETS = {f.__name__: f for f in (zcu102, u250, u280, pynq_z2)}
