"""Edge-MoE's network on our FPGA, CPU and GPU targets side by side: `python -m tests.claims.edge_moe`.

Estimates, no measurements: the paper's ratios of energy rest on how much of its time the other side wastes at
batch 1, so that share is a range, from compiled code to a framework that takes 30 microseconds an op. Writes
docs/data/edge_moe.json; ten seconds, no GPU.
"""

import jax
import numpy as np

import hw
from accel.devices.edge_moe import M3ViTConfig, edge_moe_cycles, init_m3vit, m3vit_forward
from tests.claims.record import store

FILES = (
    "accel/devices/edge_moe.py",
    "accel/blocks/gate.py",
    "hw/fpga.py",
    "hw/loops.py",
    "hw/fabric.py",
    "hw/boards.py",
    "hw/gpu.py",
    "hw/cpu.py",
    "hw/parts.py",
    "tests/claims/edge_moe.py",
)
EVEN = [17] * 2 + [16] * 14


BLOCK_T = 16  # rows of an expert that run together: products and loads of the FPGA balance
CFG = M3ViTConfig()


def program(cfg=CFG):
    """The forward pass of one image for one task, its parameters told as weights."""
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, np.float32), init_m3vit(np.random.default_rng(0), cfg)
    )
    image = jax.ShapeDtypeStruct((cfg.height, cfg.width, 3), np.float32)
    forward = lambda img, params: m3vit_forward(img, params, task=0, cfg=cfg, block_t=BLOCK_T)
    return hw.trace(forward, image, shapes, weights=("params",))


def targets():
    """{label: target}: the FPGA, and others compiled and with an eager framework's overhead on every op."""
    return {
        "ZCU102": hw.zcu102(),
        "ZCU102, nothing overlapped": hw.zcu102(overlap=False),
        "V100": hw.v100(),
        "V100, 30 µs an op": hw.v100(launch_us=30.0, fuse=False),
        "Xeon 6154": hw.xeon_6154(),
        "Xeon 6154, 30 µs an op": hw.xeon_6154(op_overhead_us=30.0, fuse=False),
    }


def measure(cfg=CFG):
    """Rows of the table, and the FPGA's loops in closed form."""
    p, rows = program(cfg), []
    for name, target in targets().items():
        r = hw.estimate(p, target)
        rows.append({"target": name, "seconds": r.seconds, "joules": r.energy_j, "bound_by": r.bound_by})
    lengths = EVEN if cfg == CFG else None
    loops = sum(edge_moe_cycles(cfg, lengths).values()) if lengths else None
    return {"rows": rows, "macs": hw.count(p).macs, "loop_cycles": loops}


if __name__ == "__main__":
    print(store("edge_moe", measure(), FILES))
