"""`Gpu`: the roofline of a device with matrix units behind wide memory, with tiles, waves, L2 and launches.

One kernel takes its launch plus the longest of: products on the matrix units, other arithmetic on the vector
units, transcendentals on the special function units, bytes through L2, bytes through main memory. What passes
between the ops of a fusion group never leaves the chip. Numbers of devices: `hw.parts`.
"""

from dataclasses import dataclass, field, replace
from math import ceil, prod, sqrt

from hw.count import Counts
from hw.errors import DoesNotFit, UnsupportedPrimitive
from hw.liveness import _peak as peak_within
from hw.parts import ENERGY, GPUS, OP_PJ
from hw.program import CollectiveDims, ConvDims, ElementwiseDims, Kernel, MatmulDims, itemsize, walk
from hw.report import OpCost
from hw.roofline import (  # noqa: F401
    DecodeEstimate,
    IoCount,
    Waves,
    attention_io,
    decode_estimate,
    decode_tokens_per_s,
    gemm_waves,
    roofline_points,
)
from hw.target import Context, Placement, Target, largest

THIN = 8  # rows (or columns) up to which a product may run on the vector units
RADIX_PASSES = 4  # passes over the data of a sort of 32-bit keys, eight bits each
DIV_OPS = 8  # vector instructions of a float32 division: a reciprocal, refined; from memory


@dataclass(frozen=True, kw_only=True)
class Gpu(Target):
    """A GPU, TPU or phone accelerator; every field is an option, `replace(h200(), hbm_gbps=6000)` is a
    device.

    peak_tflops: dense matrix rate by element type. vector_tflops, sfu_tops: float32 vector operations and
    transcendentals, 1e12 a second. cores: SMs or TensorCores, each running ctas_per_core tiles at a time.
    tile: (m, n, k) of the matrix kernel; cluster: tiles that share one fetch of an operand; mxu: side of the
    systolic array (TPU), to which m, n and k round up instead. l2_mb, l2_gbps: 0 where none is modelled.
    compute_eff, hbm_eff, launch_us: what kernels reach; ideal=True sets them to 1, 1 and 0. usable: share of
    the memory that one program may have; runtime_gb: what the software takes of it. link_gbps: one direction
    of the links to other devices, for collectives.
    """

    name: str = "gpu"
    peak_tflops: dict = field(default_factory=dict)
    vector_tflops: float
    sfu_tops: float
    hbm_gbps: float
    hbm_gb: float
    cores: int
    sram_kb: float
    watts: float
    idle_watts: float = 0.0
    l2_mb: float = 0.0
    l2_gbps: float = 0.0
    ctas_per_core: int = 1
    ideal: bool = False
    launch_us: float = 2.0
    compute_eff: float = 0.75
    hbm_eff: float = 0.85
    tile: tuple[int, int, int] = (128, 128, 32)
    cluster: int = 1
    mxu: int | None = None
    usable: float = 1.0
    runtime_gb: float = 0.0
    link_gbps: float = 0.0
    hbm_pj_per_byte: float = ENERGY.numbers["hbm_pj_per_byte"]
    l2_pj_per_byte: float = ENERGY.numbers["l2_pj_per_byte"]

    def __post_init__(self):
        for name in (
            "vector_tflops",
            "sfu_tops",
            "hbm_gbps",
            "hbm_gb",
            "cores",
            "sram_kb",
            "watts",
            "ctas_per_core",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("idle_watts", "l2_mb", "l2_gbps", "launch_us", "runtime_gb", "link_gbps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("compute_eff", "hbm_eff", "usable"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")

    # Rates that kernels reach, in units of one a second.

    @property
    def hbm_rate(self):
        """Bytes a second of main memory."""
        return self.hbm_gbps * 1e9 * (1 if self.ideal else self.hbm_eff)

    memory_rate = hbm_rate

    @property
    def l2_rate(self):
        """Bytes a second between the cores and L2; main memory's where no L2 is modelled."""
        return (self.l2_gbps or self.hbm_gbps) * 1e9

    @property
    def vector_rate(self):
        """float32 operations a second of the vector units, a multiply-accumulate counted two."""
        return self.vector_tflops * 1e12 * self._eff

    @property
    def launch_s(self):
        """Seconds to start a kernel."""
        return 0.0 if self.ideal else self.launch_us * 1e-6

    @property
    def clock_hz(self):
        """Cycles are nanoseconds: no one clock governs the device."""
        return 1e9

    @property
    def capacity(self):
        """Bytes that a program may use."""
        return {"hbm": int((self.hbm_gb * self.usable - self.runtime_gb) * 1e9)}

    @property
    def _eff(self):
        return 1.0 if self.ideal else self.compute_eff

    def ridge(self, dtype="bfloat16"):
        """Operations a byte at which products stop being limited by main memory, by the data sheet."""
        return self.peak_tflops[dtype] * 1e3 / self.hbm_gbps

    def check_memory(self, needed):
        """Raises: DoesNotFit if `needed` bytes are more than a program may use."""
        available = self.capacity["hbm"]
        if needed > available:
            raise DoesNotFit(self.name, "hbm", ceil(needed), available, suggestions=("fewer bits a weight",))

    def place(self, program):
        """Everything in main memory, but what a fused kernel keeps on the chip: the insides of groups and, of
        attention, scores and probabilities. Raises: DoesNotFit.
        """
        if not self.fuse:
            return super().place(program)
        ctx = Context(program)
        units = [*ctx.by_op.values(), *ctx.attention.values()]
        ends = {id(u): set(u.outputs) for u in units}
        inside = lambda unit_of: {
            o
            for op in walk(program.body)
            if (u := unit_of.get(op.id))
            for o in op.outputs
            if o not in ends[id(u)]
        }
        peak = peak_within(program, program.body.ops, frozenset(inside(ctx.by_op) | inside(ctx.attention)))
        available = self.capacity["hbm"]
        if peak > available:
            raise DoesNotFit(
                self.name, "hbm", peak, available, largest(program), ("fewer bits a value", "a smaller batch")
            )
        return Placement({"hbm": (peak, available)}, peak)

    # Prices. Seconds by resource for one execution of an op.

    def cost(self, op, ctx):
        """Price of one execution of `op`; Raises: UnsupportedPrimitive for a type without a rate."""
        c = ctx.counts(op)
        dims = op.dims
        if isinstance(dims, CollectiveDims):
            return self._collective(op, ctx)
        busy, l2, extra = {}, 0.0, 0.0
        if isinstance(dims, Kernel):
            hbm, l2 = self._kernel_bytes(dims, c)
            if c.macs:
                dtype = next((o.dtype for o in dims.operands if o.memory != "prefetch"), "float32")
                waves = 1 if self.mxu else ceil(dims.steps / self._slots) * self._slots / dims.steps
                busy["tensor"] = self._matrix_s(c.macs, dtype, op, ctx) * (1 if self.ideal else waves)
        else:
            if isinstance(dims, MatmulDims):
                unit, seconds, l2, extra = self._matmul(dims, ctx.dtype(op), op, ctx)
                busy[unit] = seconds
            elif isinstance(dims, ConvDims):
                k = dims.in_channels // dims.groups * prod(dims.kernel)
                n = dims.out_channels // dims.groups
                as_product = MatmulDims(dims.groups, dims.batch * prod(dims.out_spatial), n, k)
                unit, seconds, l2, extra = self._matmul(as_product, ctx.dtype(op), op, ctx)
                busy[unit] = seconds * dims.macs / max(as_product.macs, 1)
            if op.prim == "sort" and not self.ideal:
                extra = (RADIX_PASSES - 1) * (ctx.reads(op) + ctx.writes(op))
            hbm = self._moved(op, ctx) + extra * (op.id not in ctx.attention)
        vector = c.flops - 2 * c.macs + c.index_ops
        if isinstance(dims, ElementwiseDims) and dims.cls == "div" and op.id not in ctx.attention:
            vector *= DIV_OPS  # a fused attention scales by a factor, and divides its output only
        busy["vector"] = busy.get("vector", 0.0) + vector / self.vector_rate
        busy["sfu"] = c.transcendentals / (self.sfu_tops * 1e12)
        busy["hbm"] = hbm / self.hbm_rate
        levels = {"hbm": hbm}
        if self.l2_gbps:
            levels["l2"] = max(l2, hbm)  # what comes from memory comes through L2
            busy["l2"] = levels["l2"] / self.l2_rate
        busy = {r: s for r, s in busy.items() if s > 0}
        if not busy:
            return OpCost()
        return self._finish(op, ctx, c, busy, levels)

    def _finish(self, op, ctx, c, busy, levels):
        """Energy of the op, and the board's power as one more limit."""
        dtype = ctx.dtype(op)
        tf32 = dtype == "float32" and self.peak_tflops.get(dtype, 0) > self.vector_tflops
        matrix_pj = OP_PJ["tf32" if tf32 else _energy_class(dtype)]
        joules = 1e-12 * (
            2 * c.macs * matrix_pj
            + (c.flops - 2 * c.macs + c.transcendentals * 4 + c.index_ops) * OP_PJ["float32"]
            + levels.get("hbm", 0) * self.hbm_pj_per_byte
            + levels.get("l2", 0) * self.l2_pj_per_byte
        )
        power_s = joules / (self.watts - self.idle_watts)
        warnings = ()
        if not self.ideal and power_s > max(busy.values()):
            busy["power"] = power_s
            warnings = (f"{self.name}: held back by its {self.watts:g} W",)
        unit = ctx.attention.get(op.id)  # one kernel, however many fusion groups it spans
        leader = unit.ops[0] if unit else ctx.group(op).ops[0].id
        launch = 0.0 if unit and leader not in {o.id for o in ctx.group(op).ops} else self.launch_s
        awake = max(busy.values()) + launch * (op.id == leader)
        return OpCost(
            busy_s=busy,
            overhead_s=launch,
            energy_j=joules + self.idle_watts * awake,
            bytes_by_level=levels,
            macs=c.macs,
            flops=c.flops,
            basis="roofline, data sheet",
            warnings=warnings,
        )

    @property
    def _slots(self):
        return self.cores * self.ctas_per_core

    def _matrix_s(self, macs, dtype, op, ctx):
        """Seconds of products at the rate of the element type, all matrix units busy."""
        rate = self.peak_tflops.get(dtype)
        if rate is None and dtype in ("int32", "uint32", "int16", "bool", "uint8"):
            rate = self.vector_tflops  # no matrix unit takes them: products on the vector units
        if rate is None:
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} has no rate for {dtype} products; it has {', '.join(self.peak_tflops)}",
            )  # fmt: skip
        return 2 * macs / (rate * 1e12 * self._eff)

    def _matmul(self, d, dtype, op, ctx):
        """(unit, its seconds, bytes through L2, bytes of main memory beyond one pass) of b products."""
        if not d.macs:
            return "tensor", 0.0, 0.0, 0.0
        size = ctx.inputs(op)[0].nbytes / max(ctx.inputs(op)[0].size, 1)
        full = self._matrix_s(d.macs, dtype, op, ctx)
        if self.ideal:
            return "tensor", full, 0.0, 0.0
        choices = []  # (unit, seconds, bytes through L2, tile)
        if (
            min(d.m, d.n) <= THIN
        ):  # a few rows leave the matrix units empty: the vector units take them as they are
            choices.append(
                ("vector", 2 * d.macs / self.vector_rate, d.b * d.k * (d.m + d.n) * size, (d.m, d.n))
            )
        if self.mxu:  # rows come in eights, the array is mxu x mxu; operands stay in its vector memory
            padding = _up(d.m, 8) * _up(d.n, self.mxu) * _up(d.k, self.mxu) / (d.m * d.n * d.k)
            choices.append(("tensor", full * padding, 0.0, (d.m, d.n)))
        else:
            for tile_m, tile_n in ((self.tile[0], self.tile[1]), (64, 64)):
                tiles = d.b * ceil(d.m / tile_m) * ceil(d.n / tile_n)
                padding = _up(d.m, tile_m) * _up(d.n, tile_n) / (d.m * d.n)
                waves = ceil(tiles / self._slots) * self._slots / tiles
                short, long = sorted((min(tile_m, d.m), min(tile_n, d.n)))
                through_l2 = tiles * d.k * (short + long / self.cluster) * size
                if op.id in ctx.attention:  # only K and V come from outside, once a tile of queries
                    through_l2 = d.b * ceil(d.m / tile_m) * d.k * d.n * size / self.cluster
                choices.append(("tensor", full * padding * waves, through_l2, (tile_m, tile_n)))
        unit, seconds, l2, tile = min(choices, key=lambda c: max(c[1], c[2] / self.l2_rate))
        # One wave covers a square of output; an operand that L2 cannot hold is read again for each such
        # square.
        side = 1 if self.mxu else max(1, int(sqrt(self._slots)))
        fits = lambda elements: elements * size <= self.l2_mb * 1e6 / 2
        again = lambda elements, rounds: 0 if fits(elements) else elements * size * (rounds - 1)
        extra = again(d.m * d.k, ceil(d.n / (tile[1] * side))) + again(
            d.k * d.n, ceil(d.m / (tile[0] * side))
        )
        return unit, seconds, l2, d.b * extra

    def _moved(self, op, ctx):
        """Bytes across the border of the op's fusion group, or of the attention that it is part of: there the
        scores and probabilities stay on the chip, and K and V of a head are fetched once, later from L2.
        """
        unit = ctx.attention.get(op.id)
        if unit is None:
            return ctx.reads(op) + ctx.writes(op)
        group = ctx.group(op)
        within = lambda ids, ends: sum(t.nbytes for t in ids if t.id not in ends)
        inner_in = within([t for t in ctx.inputs(op) if t.id in group.inputs], unit.inputs)
        inner_out = within([t for t in ctx.outputs(op) if t.id in group.outputs], unit.outputs)
        return max(ctx.reads(op) - inner_in, 0) + max(ctx.writes(op) - inner_out, 0)

    def _kernel_bytes(self, kernel, c: Counts):
        """(bytes of main memory, bytes through L2) of a Pallas kernel's whole grid.

        A TPU fetches a block again whenever its index changes. On a GPU the programs of one wave share what
        they fetch through L2, so main memory sees an operand once a wave of programs that want it.
        """
        asked = c.input_bytes + c.output_bytes
        if self.mxu or not self.l2_gbps or self.ideal:
            return asked, 0.0
        once = sum(prod(o.array) * itemsize(o.dtype) for o in kernel.operands if o.memory != "prefetch")
        once = min(once, asked)
        rounds = ceil(asked / once / self._slots) if once else 1
        return min(asked, once * rounds), asked

    def _collective(self, op, ctx):
        """A ring: each of n devices sends 2 (n - 1) / n of its bytes."""
        if not self.link_gbps:
            raise UnsupportedPrimitive(
                op.prim,
                ctx.shape(op),
                op.scope,
                op.source,
                f"set link_gbps of {self.name} to price collectives",
            )
        n = op.dims.devices
        moved = 2 * (n - 1) / n * sum(t.nbytes for t in ctx.inputs(op))
        return OpCost(
            busy_s={"link": moved / (self.link_gbps * 1e9)},
            overhead_s=self.launch_s,
            bytes_by_level={"link": moved},
            basis="ring, data sheet",
        )


def _up(n, to):
    return -(-n // to) * to


def _energy_class(dtype):
    return dtype if dtype in OP_PJ else "int8" if "int8" in dtype or dtype == "bool" else "float32"


def _preset(name, fields):
    if name not in GPUS:
        raise ValueError(f"no Gpu preset {name!r}; there are {', '.join(GPUS)}")
    return replace(Gpu(name=name, **GPUS[name].numbers), **fields)


def t4(**fields) -> Gpu:
    """NVIDIA T4."""
    return _preset("t4", fields)


def v100(**fields) -> Gpu:
    """NVIDIA V100 SXM2."""
    return _preset("v100", fields)


def a100(gb: int = 80, **fields) -> Gpu:
    """NVIDIA A100 SXM4 with 40 or 80 GB, whose memories differ in speed too."""
    return _preset(f"a100_{gb}", fields)


def h100(**fields) -> Gpu:
    """NVIDIA H100 SXM5."""
    return _preset("h100", fields)


def h200(**fields) -> Gpu:
    """NVIDIA H200 SXM."""
    return _preset("h200", fields)


def tpu_v5e(**fields) -> Gpu:
    """Google TPU v5e, one chip."""
    return _preset("tpu_v5e", fields)


def tpu_v5p(**fields) -> Gpu:
    """Google TPU v5p, one chip."""
    return _preset("tpu_v5p", fields)


def tpu_v6e(**fields) -> Gpu:
    """Google TPU v6e, one chip."""
    return _preset("tpu_v6e", fields)


def orin(**fields) -> Gpu:
    """NVIDIA Jetson AGX Orin 64 GB."""
    return _preset("orin", fields)


def orin_nano(**fields) -> Gpu:
    """NVIDIA Jetson Orin Nano 8 GB."""
    return _preset("orin_nano", fields)


def iphone14pro(**fields) -> Gpu:
    """Apple iPhone 14 Pro, its GPU."""
    return _preset("iphone14pro", fields)


def galaxy_s23(**fields) -> Gpu:
    """Samsung Galaxy S23, its GPU."""
    return _preset("galaxy_s23", fields)


def pixel_6a(**fields) -> Gpu:
    """Google Pixel 6a, its GPU."""
    return _preset("pixel_6a", fields)


PRESETS = {
    f.__name__: f
    for f in (
        t4, v100, a100, h100, h200, tpu_v5e, tpu_v5p, tpu_v6e, orin, orin_nano,
        iphone14pro, galaxy_s23, pixel_6a,
    )
}  # fmt: skip
