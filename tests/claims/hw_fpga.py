"""The emitted hardware in open tools: iverilog runs it, yosys counts what it takes; beside the models.

`python -m tests.claims.hw_fpga` writes docs/data/hw_fpga.json (half a minute; needs iverilog and yosys).
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from hw.fabric import resources
from hw.fixed_plan import FormatPlan
from hw.formats import Fixed
from hw.fpga import zcu102
from hw.systolic import systolic_cycles
from hw.verilog import emit_systolic_verilog, hex_lines
from tests.claims.record import store

FILES = ("hw/verilog.py", "hw/systolic.py", "hw/fabric.py", "hw/boards.py", "tests/claims/hw_fpga.py")
PRODUCTS = (
    (5, 7, 3, 2, 3),
    (16, 16, 64, 4, 4),
    (64, 10, 64, 8, 4),
    (33, 17, 25, 8, 8),
)  # m, n, k, rows, cols
ARRAYS = ((4, 4, 8), (8, 8, 8), (4, 4, 16))  # rows, cols, bits; the cell's tables were set on 2 x 2


def array(rows, cols, bits=8, **fields):
    """A ZCU102 whose array has operands of so many bits, integers."""
    form = Fixed(bits, bits)
    plan = FormatPlan(activations=form, weights=form)
    return zcu102(backend="systolic", rows=rows, cols=cols, formats=plan, **fields)


def simulate(a, b, target):
    """(a b, cycles) of the emitted array in iverilog."""
    (m, k), n = a.shape, b.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "s.v").write_text(emit_systolic_verilog(target, m, n, k))
        (at / "a.hex").write_text(hex_lines(a.ravel(), target.act_bits))
        (at / "b.hex").write_text(hex_lines(b.ravel(), target.weight_bits))
        subprocess.run(["iverilog", "-g2005", "-o", "s", "s.v"], cwd=at, check=True, capture_output=True)
        run = subprocess.run(
            ["vvp", "-n", "s"], cwd=at, check=True, capture_output=True, text=True, timeout=60
        )
    _, cycles, *values = run.stdout.split()
    return np.array(values, np.int64).reshape(m, n), int(cycles)


def synthesise(text, top):
    """{cell: count} of a module after yosys mapped it to UltraScale+."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "s.v").write_text(text)
        script = f"read_verilog s.v; synth_xilinx -family xcup -top {top} -flatten; tee -q -o stat.txt stat"
        subprocess.run(["yosys", "-q", "-p", script], cwd=at, check=True, capture_output=True, timeout=300)
        found = re.findall(r"^\s+([A-Z]\w+)\s+(\d+)$", (at / "stat.txt").read_text(), re.MULTILINE)
    return {name: int(n) for name, n in found}


def summary(cells):
    """{"dsp", "lut", "ff"} of a table of cells."""
    kinds = {"dsp": r"DSP48", "lut": r"LUT\d", "ff": r"FD[RSCP]E"}
    return {k: sum(n for c, n in cells.items() if re.match(p, c)) for k, p in kinds.items()}


def measure():
    """Rows of both tables."""
    rng = np.random.default_rng(0)
    runs, taken = [], []
    for m, n, k, rows, cols in PRODUCTS:
        a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
        got, cycles = simulate(a, b, array(rows, cols))
        want = systolic_cycles(m, n, k, rows=rows, cols=cols).cycles
        runs.append({"m": m, "n": n, "k": k, "rows": rows, "cols": cols, "equal": bool((got == a @ b).all()),
                     "cycles_run": cycles, "cycles_model": want})  # fmt: skip
    for rows, cols, bits in ARRAYS:
        t = array(rows, cols, bits)
        model = resources(t).by_unit["array"]
        found = summary(synthesise(emit_systolic_verilog(t, rows, cols, 64), "systolic_array"))
        taken.append({"rows": rows, "cols": cols, "bits": bits, "yosys": found,
                      "model": {"dsp": model.dsp, "lut": model.lut, "ff": model.ff}})  # fmt: skip
    version = subprocess.run(["yosys", "-V"], capture_output=True, text=True).stdout.split(" (")[0]
    return {"runs": runs, "resources": taken, "yosys": version}


if __name__ == "__main__":
    if not (shutil.which("iverilog") and shutil.which("yosys")):
        raise SystemExit("needs iverilog and yosys: apt-get install iverilog yosys")
    print(store("hw_fpga", measure(), FILES))
