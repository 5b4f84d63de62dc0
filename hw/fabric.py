"""What an FPGA design takes of its part: multipliers, memory blocks, look-up tables, flip-flops by unit."""

from dataclasses import dataclass, fields, replace
from math import ceil

from hw.boards import CONTROL, FUNCTION, JOIN_LUT, PORT, bram18, lutram, product_dsp, uram
from hw.errors import DoesNotFit

URAM_WORDS = 2048  # deeper buffers go to the large blocks where the part has them
GELU_TABLE = (177, 22)  # words and bits of Edge-MoE's table
GELU_PRODUCT = (22, 18)  # bits of the place between two entries and of their difference
SORT_DEPTH = 64  # registers of the insertion network that sorts and picks the largest


@dataclass(frozen=True)
class Unit:
    """Resources of one part of a design."""

    dsp: int = 0
    bram36: int = 0
    uram: int = 0
    lut: int = 0
    ff: int = 0

    def __add__(self, other):
        return Unit(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Unit)))

    def __mul__(self, n):
        return Unit(*(ceil(getattr(self, f.name) * n) for f in fields(Unit)))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Resources(Unit):
    """Resources of a design, and of each of its units."""

    by_unit: dict = None

    def table(self) -> str:
        """A line a unit and the sum, as text."""
        rows = [("unit", *(f.name for f in fields(Unit)))]
        for name, u in [*self.by_unit.items(), ("total", self)]:
            rows.append((name, *(f"{getattr(u, f.name):,}" for f in fields(Unit))))
        width = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        line = lambda r: "  ".join([r[0].ljust(width[0]), *map(str.rjust, r[1:], width[1:])])
        return "\n".join(map(line, rows))


FUNCTION_UNIT = Unit(dsp=FUNCTION.numbers["dsp"], lut=FUNCTION.numbers["lut"], ff=FUNCTION.numbers["ff"])


def multipliers(n, a, b, ports) -> Unit:
    """n multipliers of a x b bits; the pieces of a wide product are added in look-up tables."""
    blocks = product_dsp(a, b, ports)
    return Unit(dsp=ceil(n * blocks), lut=ceil(n * max(blocks - 1, 0) * JOIN_LUT))


def adder_tree(inputs, width) -> Unit:
    """A pipelined tree that adds `inputs` numbers of `width` bits, and the accumulator behind it."""
    return Unit(lut=width * inputs, ff=2 * width * inputs)


def buffer(words, width, *, partitions=1, copies=1, has_uram=False) -> Unit:
    """`copies` (2: ping-pong) of a memory in partitions of `words` by `width` bits."""
    words = max(1, words)
    if has_uram and words >= URAM_WORDS:
        return Unit(uram=partitions * copies * uram(words, width))
    halves = partitions * copies * bram18(words, width)
    return Unit(bram36=ceil(halves / 2), lut=partitions * copies * lutram(words, width))


def resources(target) -> Resources:
    """Resources of the design that an `Fpga` target describes."""
    act, weight, ports = target.act_bits, target.weight_bits, target.dsp_ports
    store = lambda kb, width, **kw: buffer(
        ceil(kb * 8192 / (width * kw.get("partitions", 1))), width, has_uram=target.uram > 0, **kw
    )
    lane = adder_tree(1, act) + multipliers(1, act, act, ports)
    units = {
        "elementwise lanes": target.lanes * (lane + FUNCTION_UNIT),
        "sorting network": Unit(lut=SORT_DEPTH * 2 * act, ff=SORT_DEPTH * 2 * act),
        "ports": 3 * target.axi_ports * (Unit(lut=PORT.numbers["lut"], ff=PORT.numbers["ff"])
                                         + buffer(512, target.axi_bits)),
        "tile buffers": store(target.tile_kb, target.axi_bits, copies=2),
        "control": Unit(lut=CONTROL.numbers["lut"], ff=CONTROL.numbers["ff"]),
    }  # fmt: skip
    if target.backend == "systolic":
        cells = target.rows * target.cols
        acc = act + weight + 8
        # two tables a bit of the sum: what yosys takes for a 2 x 2 array; registers pass operands on
        cell = Unit(lut=2 * acc, ff=act + weight + acc)
        units["array"] = cells * cell + multipliers(cells, act, weight, ports)
        bank = lambda n, bits: store(target.sram_kb, bits, partitions=n, copies=2)
        units["array memories"] = bank(target.rows, act) + bank(target.cols, weight) + bank(target.cols, act)
    else:
        i, o, p = target.linear_in, target.linear_out, target.attn_parallel
        b = target.lanes
        units["linear unit"] = multipliers(i * o, act, weight, ports) + o * adder_tree(i, act)
        units["weight buffers"] = store(target.weight_kb, weight * i, partitions=o, copies=2)
        product = multipliers(p * b, act, act, ports) + p * adder_tree(b, act)
        units["attention, two products"] = 2 * product
        units["softmax"] = p * (FUNCTION_UNIT + multipliers(2, act, act, ports)) + FUNCTION_UNIT
        bend = multipliers(1, *GELU_PRODUCT, ports) + adder_tree(2, act)
        units["GELU"] = b * bend + ceil(b / 2) * buffer(*GELU_TABLE)
        units["layer norm"] = b * multipliers(3, act, act, ports) + 2 * adder_tree(b, act) + FUNCTION_UNIT
    total = sum(units.values(), Unit())
    return Resources(**{f.name: getattr(total, f.name) for f in fields(Unit)}, by_unit=units)


def available(target) -> dict[str, int]:
    """What the part has of each resource for a design, the shell taken off."""
    return {f.name: int(getattr(target, f.name) * (1 - target.shell_fraction)) for f in fields(Unit)}


def check_fit(target) -> Resources:
    """The resources of a design that fits. Raises: DoesNotFit naming the scarcest, and what would fit."""
    r, limit = resources(target), available(target)
    over = {k: getattr(r, k) / max(limit[k], 1) for k in limit if getattr(r, k) > limit[k]}
    if over:
        worst = max(over, key=over.get)
        units = sorted(r.by_unit.items(), key=lambda u: -getattr(u[1], worst))
        named = [(name, (), getattr(u, worst)) for name, u in units if getattr(u, worst)]
        raise DoesNotFit(
            target.name, worst, getattr(r, worst), limit[worst], named, remedies(target), unit=""
        )
    return r


def fits(target) -> bool:
    """Does the design fit its part."""
    r, limit = resources(target), available(target)
    return all(getattr(r, k) <= limit[k] for k in limit)


def remedies(target) -> list[str]:
    """For each field of parallelism or buffer size, the largest value that fits, the others kept."""
    found = []
    for name in target.sizes:
        smaller = range(getattr(target, name) - 1, 0, -1)
        if size := next((n for n in smaller if fits(replace(target, **{name: n}))), None):
            found.append(f"{name}={size}")
    return found or [f"a larger part: no single one of {', '.join(target.sizes)} is enough"]
