"""The emitted hardware in open tools: iverilog runs it, yosys counts what it takes; beside the models.

`python -m tests.claims.hw_fpga` writes docs/data/hw_fpga.json (a minute; needs iverilog and yosys).
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from hw.fabric import multipliers, resources
from hw.fixed_plan import FormatPlan
from hw.formats import Fixed
from hw.fpga import zcu102
from hw.systolic import systolic_cycles
from hw.verilog import emit_systolic_verilog, hex_lines
from hw.verilog_attention import block_lines, emit_attention_verilog
from hw.verilog_linear import emit_linear_verilog, linear_files
from ref.blocks.fixed_ops import (
    BIAS,
    FM,
    WEIGHT,
    gelu_fixed,
    linear_fixed,
    reordered_attention_fixed,
)
from ref.blocks.stream import attention_cycles, attention_steps, linear_cycles
from tests.claims.record import store

FILES = (
    "hw/verilog.py",
    "hw/verilog_attention.py",
    "hw/verilog_linear.py",
    "hw/systolic.py",
    "hw/fabric.py",
    "hw/boards.py",
    "ref/blocks/stream.py",
    "ref/blocks/fixed_ops.py",
    "tests/claims/hw_fpga.py",
)
PRODUCTS = (
    (5, 7, 3, 2, 3),
    (16, 16, 64, 4, 4),
    (64, 10, 64, 8, 4),
    (33, 17, 25, 8, 8),
)  # m, n, k, rows, cols
ATTENTIONS = ((9, 16, 4), (13, 16, 3), (33, 64, 4))  # tokens, head size, lanes
LAYERS = ((5, 8, 8, 4, 4, ""), (3, 10, 7, 4, 2, "gelu"), (6, 9, 5, 2, 4, "gelu, queue, score"))
# What was set on a 2 x 2 array, a 2 x 2 unit and a head of 8 is compared on others.
ARRAYS = ((4, 4, 8), (8, 8, 8), (4, 4, 16))  # rows, cols, bits


def array(rows, cols, bits=8, **fields):
    """A ZCU102 whose array has operands of so many bits, integers."""
    form = Fixed(bits, bits)
    plan = FormatPlan(activations=form, weights=form)
    return zcu102(backend="systolic", rows=rows, cols=cols, formats=plan, **fields)


def bench(text, files):
    """What the testbench of a Verilog text prints in iverilog, as integers."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        for name, content in {"s.v": text, **files}.items():
            (at / name).write_text(content)
        subprocess.run(["iverilog", "-g2005", "-o", "s", "s.v"], cwd=at, check=True, capture_output=True)
        run = subprocess.run(
            ["vvp", "-n", "s"], cwd=at, check=True, capture_output=True, text=True, timeout=60
        )
    return [int(word) for word in run.stdout.split() if word != "cycles"]


def simulate(a, b, target):
    """(a b, cycles) of the emitted array in iverilog."""
    (m, k), n = a.shape, b.shape[1]
    files = {
        "a.hex": hex_lines(a.ravel(), target.act_bits),
        "b.hex": hex_lines(b.ravel(), target.weight_bits),
    }
    cycles, *values = bench(emit_systolic_verilog(target, m, n, k), files)
    return np.array(values).reshape(m, n), cycles


def simulate_attention(q, k, v, target):
    """(out [n, d], max [n], reciprocal [n], cycles, key loads, query loads) of the emitted attention."""
    n, d = q.shape
    files = {f"{name}.hex": block_lines(x) for name, x in (("q", q), ("k", k), ("v", v))}
    cycles, keys, queries, *rest = bench(emit_attention_verilog(target, n, d), files)
    rows = np.array(rest[: 2 * n]).reshape(n, 2)
    return np.array(rest[2 * n :]).reshape(n, d), rows[:, 0], rows[:, 1], cycles, keys, queries


def simulate_linear(x, w, b, target, *, gelu=False, queue=None, scores=None):
    """(result [N, M], cycles) of the emitted linear unit."""
    rows = None if queue is None else len(queue)
    text = emit_linear_verilog(target, *x.shape, len(w), rows=rows, gelu=gelu, scored=scores is not None)
    cycles, *values = bench(text, linear_files(target, x, w, b, queue=queue, scores=scores))
    return np.array(values).reshape(len(x), -1)[:, : len(w)], cycles


def layer(rng, tokens, n_in, n_out, flags):
    """(x, w, b, options of `simulate_linear`, the result in ref) of random numbers."""
    x, b = FM.quantise(2 * rng.standard_normal((tokens, n_in))), BIAS.quantise(rng.standard_normal(n_out))
    w = WEIGHT.quantise(rng.standard_normal((n_out, n_in)) / 2)
    want = linear_fixed(x, w, b)
    if "gelu" in flags:
        want = gelu_fixed(want)
    options = {"gelu": "gelu" in flags}
    if "queue" in flags:
        queue, scores = np.array([4, 0, 3]), FM.quantise(rng.random(3))
        picked = FM.fit(want[queue] * scores[:, None] >> 22)
        want = np.zeros_like(want)
        want[queue] = picked
        options |= {"queue": queue, "scores": scores}
    return x, w, b, options, want


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
    """{"dsp", "lut", "ff", "memory"} of a table of cells; memory: block and distributed RAM primitives."""
    kinds = {"dsp": r"DSP48", "lut": r"LUT\d", "ff": r"FD[RSCP]E", "memory": r"RAM"}
    return {k: sum(n for c, n in cells.items() if re.match(p, c)) for k, p in kinds.items()}


def models():
    """{name: (Verilog, top, the model's unit)} of what is synthesised."""
    found = {}
    for rows, cols, bits in ARRAYS:
        t = array(rows, cols, bits)
        text = emit_systolic_verilog(t, rows, cols, 64)
        found[f"array {rows} x {cols}, int{bits}"] = text, "systolic_array", resources(t).by_unit["array"]
    t = zcu102(linear_in=4, linear_out=4, attn_parallel=1)
    units = resources(t).by_unit
    tail = multipliers(4, 32, 32, t.dsp_ports) + multipliers(4, 22, 18, t.dsp_ports)  # score and GELU
    text = emit_linear_verilog(t, 8, 8, 8)
    found["linear unit 4 x 4, with GELU and score"] = text, "linear_unit", units["linear unit"] + tail
    lane = 0.5 * units["attention, two products"] + multipliers(1, 32, 32, t.dsp_ports)
    text = emit_attention_verilog(t, 129, 64)
    found["score lane, head size 64"] = text, "score_lane", lane
    found["value lane, head size 64"] = text, "value_lane", lane
    return found


def measure():
    """Rows of both tables."""
    rng = np.random.default_rng(0)
    runs, taken = [], []
    row = lambda what, equal, run, model: runs.append(
        {"what": what, "equal": bool(equal), "cycles_run": run, "cycles_model": model}
    )
    for m, n, k, rows, cols in PRODUCTS:
        a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
        got, cycles = simulate(a, b, array(rows, cols))
        want = systolic_cycles(m, n, k, rows=rows, cols=cols).cycles
        row(f"array {rows} x {cols}: {m} x {n} x {k}", (got == a @ b).all(), cycles, want)
    for n, d, lanes in ATTENTIONS:
        q, k, v = (FM.quantise(x) for x in rng.standard_normal((3, n, d)))
        out, m, recip, cycles, keys, queries = simulate_attention(q, k, v, zcu102(attn_parallel=lanes))
        want = reordered_attention_fixed(q[None], k[None], v[None], scale=d**-0.5, lanes=lanes)
        equal = all((x == y[0]).all() for x, y in zip((out, m, recip), want, strict=True))
        equal = equal and (keys, queries) == (attention_steps(n, n, parallel=lanes), n)
        row(
            f"attention: {n} tokens of {d}, {lanes} lanes",
            equal,
            cycles,
            2 * attention_cycles(n, d, parallel=lanes),
        )
    for tokens, n_in, n_out, i, o, flags in LAYERS:
        x, w, b, options, want = layer(rng, tokens, n_in, n_out, flags)
        got, cycles = simulate_linear(x, w, b, zcu102(linear_in=i, linear_out=o), **options)
        rows = len(options.get("queue", x))
        model = linear_cycles(rows, n_in, n_out, linear_in=i, linear_out=o).compute
        name = f"linear unit {i} x {o}: {rows} tokens, {n_in} to {n_out}" + (f" ({flags})" if flags else "")
        row(name, (got == want).all(), cycles, model)
    for name, (text, top, model) in models().items():
        numbers = {k: getattr(model, k) for k in ("dsp", "lut", "ff")}
        taken.append({"what": name, "yosys": summary(synthesise(text, top)), "model": numbers})
    version = subprocess.run(["yosys", "-V"], capture_output=True, text=True).stdout.split(" (")[0]
    return {"runs": runs, "resources": taken, "yosys": version}


if __name__ == "__main__":
    if not (shutil.which("iverilog") and shutil.which("yosys")):
        raise SystemExit("needs iverilog and yosys: apt-get install iverilog yosys")
    print(store("hw_fpga", measure(), FILES))
