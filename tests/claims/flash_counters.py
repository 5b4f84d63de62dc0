"""What the hardware counts while attention for Hopper runs: `python -m tests.claims.flash_counters`.

On one Hopper GPU with NVIDIA's Nsight Compute (`ncu`) and leave to read counters, in two minutes, bfloat16,
16 heads. Writes docs/data/flash_counters_gpu.json: for each kernel of a forward and backward pass how long
its tensor cores, its exponential units, its other pipes and its memories are busy, as shares of the time.
"""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.claims.flash_inside import drawn
from tests.claims.record import ROOT, store

FILES = (
    "accel/kernels/flash_hopper.py",
    "accel/kernels/flash_hopper_backward.py",
    "accel/kernels/flash_hopper_lists.py",
    "tests/claims/flash_counters.py",
)
METRICS = {  # what the record calls it: what ncu calls it
    "microseconds": "gpu__time_duration.sum",
    "gigahertz": "gpc__cycles_elapsed.avg.per_second",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "device memory": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
UNITS = {"us": 1.0, "ms": 1e3, "ns": 1e-3, "Ghz": 1.0, "Mhz": 1e-3, "GHz": 1.0, "MHz": 1e-3, "%": 0.01}
WIDTHS = (128, 64)
KERNELS = ("flash_forward", "flash_dkv", "flash_dq")
CASES = ("full", "causal", "a bias", "a window of 256 to both sides", "seven texts packed")


def packed(N, texts=7):
    """(start, end) [4, 1, N] of texts cut by lot."""
    edges = np.r_[0, np.sort(np.random.default_rng(0).integers(1, N, texts - 1)), N]
    ends = np.stack([np.repeat(x, np.diff(edges)) for x in (edges[:-1], edges[1:])]).astype(np.int32)
    return {
        n: jnp.asarray(np.broadcast_to(x, (4, 1, N))) for n, x in zip(("start", "end"), ends, strict=True)
    }


def cases(width):
    """{name: (shape, options, arrays)} of the calls."""
    shape = (4, 4096, 16, width)
    (bias,) = drawn((1, 16, 4096, 4096), 1)
    calls = (
        (shape, {}, {}),
        (shape, {"hi": 0}, {}),
        (shape, {}, {"bias": bias}),
        ((1, 32768, 16, width), {"lo": -256, "hi": 256}, {}),
        (shape, {"itself": True}, packed(4096)),
    )
    return dict(zip(CASES, calls, strict=True))


def play():
    """Every call once, which is what ncu looks at."""
    from accel.kernels.flash_hopper import attend, attend_backward

    for width in WIDTHS:
        for shape, options, told in cases(width).values():
            do, q, k, v = drawn(shape, 4)
            options |= {"scale": width**-0.5, "rows_first": True}
            _, lse = attend(q, k, v, **told, **options)
            grads = attend_backward(do, q, k, v, lse, jnp.zeros_like(lse), **told, **options)
            jax.block_until_ready(grads)
    os._exit(0)  # JAX may crash as it ends under ncu


def counted(ncu):
    """What `read` finds of all calls."""
    names = [(str(w), case, kernel) for w in WIDTHS for case in CASES for kernel in KERNELS]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "counters"
        look = [ncu, "--clock-control", "none", "--cache-control", "none", "-k", f"regex:{'|'.join(KERNELS)}"]
        look += ["--metrics", ",".join(METRICS.values()), "-o", str(report)]
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        module = [sys.executable, "-m", "tests.claims.flash_counters", "--play"]
        subprocess.run([*look, *module], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        page = [ncu, "--import", f"{report}.ncu-rep", "--page", "raw", "--csv"]
        text = subprocess.run(page, check=True, capture_output=True, text=True).stdout
    return read(text, names)


def read(text, names):
    """{width: {case: {kernel: {metric: value}}}} of ncu's page of raw values, for kernels of these names:
    microseconds, gigahertz, and shares of the time.
    """
    units, *rows = csv.DictReader(io.StringIO(text[text.index('"ID"') :]))
    if len(rows) != len(names):
        raise RuntimeError(f"ncu saw {len(rows)} kernels, and {len(names)} ran")
    found = {}
    for (width, case, kernel), row in zip(names, rows, strict=True):
        if not row["Kernel Name"].startswith(kernel):
            raise RuntimeError(f"ncu saw {row['Kernel Name']} where {kernel} ran")
        value = lambda m, row=row: float(row[m].replace(",", "")) * UNITS[units[m]]
        own = {n: value(m) for n, m in METRICS.items()}
        found.setdefault(width, {}).setdefault(case, {})[kernel] = own
    return found


def main():
    """Count and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--play", action="store_true", help="only make the calls, for ncu to look at")
    if parser.parse_args().play:
        return play()
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu, of NVIDIA Nsight Compute, is not on the path")
    results = {"widths": counted(ncu)}
    print(store("flash_counters_gpu", results, FILES))


if __name__ == "__main__":
    main()
