"""FPGA parts: what each device holds, what arithmetic takes of it, and what it burns, with sources."""

from math import ceil

from hw.parts import Part

_VENDOR = "AMD product tables, from memory"
_NOTES = {
    "shell_fraction": "our assumption; shells of data centre cards take 10 to 15 % (from memory)",
    "dram_gb": "board's user guide, from memory",
    "dram_pj_per_bit": "our assumption: DDR4 20, DDR3 25, HBM2 5.5 pJ a bit",
    "static_w": "our assumption, processor system included",
}


def _board(title, **numbers):
    return Part(title, _VENDOR, numbers, {k: v for k, v in _NOTES.items() if k in numbers})


# dsp_ports: bits of the two operands of one multiplier block. bram36: blocks of 36 kbit. uram: of 288 kbit.
BOARDS = {
    "zcu102": _board(
        "ZCU102 (XCZU9EG-2)", dsp=2520, bram36=912, uram=0, lut=274_080, ff=548_160, dsp_ports=(27, 18),
        shell_fraction=0.0, dram_gbps=17.0, dram_gb=4.0, dram_pj_per_bit=20.0, static_w=3.5,
    ),
    "u250": _board(
        "Alveo U250 (XCU250)", dsp=12_288, bram36=2688, uram=1280, lut=1_728_000, ff=3_456_000,
        dsp_ports=(27, 18), shell_fraction=0.12, dram_gbps=77.0, dram_gb=64.0, dram_pj_per_bit=20.0,
        static_w=25.0,
    ),
    "u280": _board(
        "Alveo U280 (XCU280)", dsp=9024, bram36=2016, uram=960, lut=1_304_000, ff=2_607_000,
        dsp_ports=(27, 18), shell_fraction=0.12, dram_gbps=460.0, dram_gb=8.0, dram_pj_per_bit=5.5,
        static_w=25.0,
    ),
    "pynq_z2": _board(
        "PYNQ-Z2 (XC7Z020)", dsp=220, bram36=140, uram=0, lut=53_200, ff=106_400, dsp_ports=(25, 18),
        shell_fraction=0.0, dram_gbps=4.2, dram_gb=0.5, dram_pj_per_bit=25.0, static_w=1.5,
    ),
}  # fmt: skip

# (depth, width) of an 18 kbit half of a block.
BRAM18_SHAPES = ((16384, 1), (8192, 2), (4096, 4), (2048, 9), (1024, 18), (512, 36))
URAM_SHAPE = (4096, 72)
JOIN_LUT = (
    60  # look-up tables that add one more piece to a product: between 44 and 83 in yosys, see the claims
)
LUTRAM_BITS = 1024  # smaller buffers are made of look-up tables, 64 bits each

# What a unit takes and how deep its pipeline is.
FUNCTION = Part(
    "exp, reciprocal or reciprocal square root of <32, 10>",
    "our table, between the figures of vendor libraries (6-10 DSP, 1-2k LUT, depth 15-25, from memory)",
    {"dsp": 8, "lut": 1500, "ff": 2000, "depth": 20},
)
PORT = Part(
    "A port to memory with its FIFOs", "our assumption", {"dsp": 0, "lut": 1500, "ff": 2500, "depth": 64}
)
CONTROL = Part("Control and registers of a design", "our assumption", {"lut": 8000, "ff": 10_000})
DEPTH = Part(
    "Pipeline depth of an operation, cycles",
    "our table: an adder, a multiplier, a function, a comparison",
    {"add": 2, "mul": 4, "div": 20, "transcendental": 20, "index": 1},
)
MEMORY = Part(
    "Access to memory over AXI",
    "our assumption: cycles of latency, bursts in flight",
    {"latency": 64, "outstanding": 8},
)
# Dynamic power at 300 MHz; it scales with the clock. The look-up tables stand for all general logic, its
# registers, wires and clock tree, and their figure is set so that the stream design's default on a ZCU102
# burns about the 14 W that we recall (not verified) for Edge-MoE there.
POWER = Part(
    "Dynamic power of a busy block at 300 MHz",
    "our defaults; the look-up tables' figure calibrated, see the comment",
    {"dsp_mw": 1.2, "bram36_mw": 1.8, "uram_mw": 3.6, "lut_uw": 105.0},
)


def product_dsp(a, b, ports=(27, 18)) -> float:
    """Multiplier blocks of a signed a x b bit product: two of 8 x 8 share one, wider ones are cut in pieces.

    A piece below the top one carries no sign and has a bit less of each port.
    """
    if min(a, b) < 1:
        raise ValueError(f"operands must have at least one bit, got {a} x {b}")
    if max(a, b) <= 8:
        return 0.5
    pieces = lambda bits, port: 1 + ceil(max(bits - port, 0) / (port - 1))
    return float(pieces(max(a, b), max(ports)) * pieces(min(a, b), min(ports)))


def bram18(words, width) -> int:
    """Halves of 18 kbit of a buffer of `words` of `width` bits, in the best shape; 0 for one of LUTs."""
    if words * width <= LUTRAM_BITS:
        return 0
    return min(ceil(words / d) * ceil(width / w) for d, w in BRAM18_SHAPES)


def uram(words, width) -> int:
    """Blocks of 288 kbit of such a buffer."""
    return ceil(words / URAM_SHAPE[0]) * ceil(width / URAM_SHAPE[1])


def lutram(words, width) -> int:
    """Look-up tables of a buffer that is made of them; 0 for a larger one."""
    return 0 if words * width > LUTRAM_BITS else ceil(words / 64) * width
