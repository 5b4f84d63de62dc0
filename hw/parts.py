"""The parts catalogue: every device number that a target uses, with where it comes from.

A `Part` is a data sheet in short: numbers with units in their names, one source for all of them, and a note
for each number whose source differs. "From memory" says that nobody looked the number up; treat it as good to
ten per cent. Dense rates only: a vendor's sparse figure is twice the dense one. 1 GB/s = 1e9 bytes a second,
1 multiply-accumulate = 2 operations.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One device: its name, its numbers, the source of all of them, and notes on single ones."""

    title: str
    source: str
    numbers: dict
    notes: dict[str, str] = field(default_factory=dict)

    def rows(self):
        """[(field, value, source)] of every number, for a table."""
        return [(name, value, self.notes.get(name, self.source)) for name, value in self.numbers.items()]


_OPEN_TABLES = "vendor data sheet, dense; agrees with the tables of two open performance tools"
_MEMORY = "vendor data sheet, from memory"
_L2 = "bytes a clock from microbenchmarks of others, from memory"
_IDLE = "our assumption: 15 % of the board's power"
# On-chip energies and the HBM path are those of an open near-memory simulator's GPU model (AttAcc).
ENERGY = Part(
    "Energy of a GPU",
    "open AttAcc model's GPU table: whole HBM path, L2, L1 and register file",
    {"hbm_pj_per_byte": 28.7, "l2_pj_per_byte": 2.4, "l1_pj_per_byte": 1.28, "register_pj_per_byte": 0.0675},
)
# One floating-point operation, by width: float16 between the 0.32 and 0.5 of the same table; the others scale
# with the square of the significand, from memory.
OP_PJ = {"int8": 0.2, "float16": 0.4, "bfloat16": 0.4, "tf32": 0.8, "float32": 1.2, "float64": 4.0}


def _gpu(title, source, *, notes=None, **numbers):
    idle = {"idle_watts": round(0.15 * numbers["watts"], 1)} if numbers.get("watts") else {}
    told = {"l2_gbps": _L2, "idle_watts": _IDLE, **(notes or {})}
    numbers = {**idle, **numbers}
    return Part(title, source, numbers, {k: v for k, v in told.items() if k in numbers})


_HOPPER = {
    "tile": "the tile of the fastest open kernels for this chip, from memory",
    "cluster": "two tiles share a fetch by multicast in those kernels, from memory",
}
# `peak_tflops` by element type; "float32" is what a default-precision product gets: TF32 on the tensor cores
# from A100 on, the vector units before. `sfu_tops`: exponentials a second, 16 a core a clock on NVIDIA.
GPUS = {
    "t4": _gpu(
        "NVIDIA T4", _MEMORY,
        peak_tflops={"float16": 65.0, "float32": 8.1, "int8": 130.0, "float64": 0.25},
        vector_tflops=8.1, sfu_tops=1.02, hbm_gbps=320.0, hbm_gb=16.0, l2_mb=4.0, l2_gbps=1270.0,
        cores=40, sram_kb=64, watts=70.0,
    ),
    "v100": _gpu(
        "NVIDIA V100 SXM2 32 GB", _OPEN_TABLES,
        peak_tflops={"float16": 125.0, "float32": 15.7, "int8": 62.0, "float64": 7.8},
        vector_tflops=15.7, sfu_tops=1.96, hbm_gbps=900.0, hbm_gb=32.0, l2_mb=6.0, l2_gbps=2155.0,
        cores=80, sram_kb=96, watts=300.0,
        notes={"peak_tflops": "data sheet; int8 runs on the vector units (dp4a), not on tensor cores"},
    ),
    "a100_40": _gpu(
        "NVIDIA A100 SXM4 40 GB", _OPEN_TABLES,
        peak_tflops={"bfloat16": 312.0, "float16": 312.0, "float32": 156.0, "int8": 624.0, "float64": 19.5},
        vector_tflops=19.5, sfu_tops=2.4, hbm_gbps=1555.0, hbm_gb=40.0, l2_mb=40.0, l2_gbps=7200.0,
        cores=108, sram_kb=164, watts=400.0,
    ),
    "a100_80": _gpu(
        "NVIDIA A100 SXM4 80 GB", _OPEN_TABLES,
        peak_tflops={"bfloat16": 312.0, "float16": 312.0, "float32": 156.0, "int8": 624.0, "float64": 19.5},
        vector_tflops=19.5, sfu_tops=2.4, hbm_gbps=2039.0, hbm_gb=80.0, l2_mb=40.0, l2_gbps=7200.0,
        cores=108, sram_kb=164, watts=400.0,
    ),
    "h100": _gpu(
        "NVIDIA H100 SXM5 80 GB", _OPEN_TABLES,
        peak_tflops={"bfloat16": 989.4, "float16": 989.4, "float32": 494.7, "int8": 1979.0, "float64": 67.0},
        vector_tflops=67.0, sfu_tops=3.9, hbm_gbps=3352.0, hbm_gb=80.0, l2_mb=50.0, l2_gbps=5500.0,
        cores=132, sram_kb=228, watts=700.0, tile=(128, 256, 64), cluster=2,
        notes=_HOPPER,
    ),
    "h200": _gpu(
        "NVIDIA H200 SXM 141 GB", _OPEN_TABLES,
        peak_tflops={"bfloat16": 989.4, "float16": 989.4, "float32": 494.7, "int8": 1979.0, "float64": 67.0},
        vector_tflops=67.0, sfu_tops=3.9, hbm_gbps=4800.0, hbm_gb=141.0, l2_mb=50.0, l2_gbps=5500.0,
        cores=132, sram_kb=228, watts=700.0, tile=(128, 256, 64), cluster=2,
        notes=_HOPPER,
    ),
    "tpu_v5e": _gpu(
        "Google TPU v5e", _MEMORY,
        peak_tflops={"bfloat16": 197.0, "float32": 49.0, "int8": 394.0},
        vector_tflops=3.1, sfu_tops=0.77, hbm_gbps=819.0, hbm_gb=16.0, l2_mb=128.0, l2_gbps=18000.0,
        cores=1, sram_kb=131072, watts=200.0, mxu=128, launch_us=0.5,
    ),
    "tpu_v5p": _gpu(
        "Google TPU v5p", _MEMORY,
        peak_tflops={"bfloat16": 459.0, "float32": 115.0, "int8": 918.0},
        vector_tflops=7.2, sfu_tops=1.8, hbm_gbps=2765.0, hbm_gb=95.0, l2_mb=128.0, l2_gbps=40000.0,
        cores=2, sram_kb=65536, watts=450.0, mxu=128, launch_us=0.5,
    ),
    "tpu_v6e": _gpu(
        "Google TPU v6e", _MEMORY,
        peak_tflops={"bfloat16": 918.0, "float32": 230.0, "int8": 1836.0},
        vector_tflops=7.2, sfu_tops=1.8, hbm_gbps=1640.0, hbm_gb=32.0, l2_mb=128.0, l2_gbps=36000.0,
        cores=1, sram_kb=131072, watts=500.0, mxu=256, launch_us=0.5,
        notes={"watts": "our assumption, room for dense products: the vendor prints none"},
    ),
    "orin": _gpu(
        "NVIDIA Jetson AGX Orin 64 GB", _MEMORY,
        peak_tflops={"bfloat16": 43.0, "float16": 43.0, "float32": 21.0, "int8": 138.0},
        vector_tflops=5.3, sfu_tops=0.33, hbm_gbps=204.8, hbm_gb=64.0, l2_mb=4.0, l2_gbps=660.0,
        cores=16, sram_kb=128, watts=60.0,
    ),
    "orin_nano": _gpu(
        "NVIDIA Jetson Orin Nano 8 GB", _MEMORY,
        peak_tflops={"bfloat16": 10.0, "float16": 10.0, "float32": 5.0, "int8": 20.0},
        vector_tflops=1.28, sfu_tops=0.08, hbm_gbps=68.0, hbm_gb=8.0, l2_mb=2.0, l2_gbps=160.0,
        cores=8, sram_kb=128, watts=15.0, runtime_gb=0.5,
    ),
    "iphone14pro": _gpu(
        "Apple iPhone 14 Pro, GPU and neural engine of the A16", _MEMORY,
        peak_tflops={"float16": 2.0, "bfloat16": 2.0, "float32": 2.0, "int8": 17.0},
        vector_tflops=2.0, sfu_tops=0.25, hbm_gbps=51.2, hbm_gb=6.0, cores=5, sram_kb=32, watts=5.0,
        usable=0.5, runtime_gb=0.5, launch_us=20.0,
        notes={"usable": "an iOS app gets about half, from memory", "launch_us": "our assumption"},
    ),
    "galaxy_s23": _gpu(
        "Samsung Galaxy S23, Adreno 740", _MEMORY,
        peak_tflops={"float16": 3.5, "bfloat16": 1.75, "float32": 1.75, "int8": 3.5},
        vector_tflops=1.75, sfu_tops=0.22, hbm_gbps=67.0, hbm_gb=8.0, cores=6, sram_kb=32, watts=5.0,
        usable=0.75, runtime_gb=0.5, launch_us=20.0,
        notes={"usable": "our assumption", "launch_us": "our assumption", "cores": "our assumption"},
    ),
    "pixel_6a": _gpu(
        "Google Pixel 6a, Mali-G78", _MEMORY,
        peak_tflops={"float16": 1.6, "bfloat16": 0.8, "float32": 0.8, "int8": 1.6},
        vector_tflops=0.8, sfu_tops=0.1, hbm_gbps=51.2, hbm_gb=6.0, cores=20, sram_kb=32, watts=5.0,
        usable=0.75, runtime_gb=0.5, launch_us=20.0,
        notes={"usable": "our assumption", "launch_us": "our assumption"},
    ),
}  # fmt: skip


_CPU = "data sheet and descriptions of the microarchitecture, from memory"
# Sustained bytes a cycle of one core: halves of the load widths of the wide (AVX-512) and narrow machines.
CACHE_BYTES_PER_CYCLE = Part(
    "Cache bandwidth a core",
    "descriptions of the microarchitectures, from memory: L1 64-128, L2 32-64, L3 about 10 bytes a cycle",
    {"l1": 64.0, "l2": 32.0, "l3": 10.0},
)


def _cpu(title, clusters, caches_kb, dram_gbps, dram_gb, watts, *, notes=None, **more):
    numbers = {
        "clusters": clusters, "caches_kb": caches_kb, "dram_gbps": dram_gbps, "dram_gb": dram_gb,
        "watts": watts, "idle_watts": round(0.3 * watts, 1), **more,
    }  # fmt: skip
    told = {
        "idle_watts": "our assumption: 30 % of the package's power",
        "dram_gb": "our assumption: a usual size",
        **(notes or {}),
    }
    return Part(title, _CPU, numbers, told)


# clusters: (cores, GHz with all cores busy, fp32 operations a cycle a core, int8 operations a cycle a core).
# caches_kb: L1 data a core, L2 a core (in all where l2_shared), last level in all.
CPUS = {
    "xeon_6154": _cpu(
        "Intel Xeon Gold 6154 (Skylake-SP)", ((18, 2.7, 64, 128),), (32, 1024, 25344), 128.0, 192.0, 200.0
    ),
    "xeon_8480": _cpu(
        "Intel Xeon Platinum 8480 (Sapphire Rapids)",
        ((56, 2.6, 64, 256),), (48, 2048, 107520), 307.0, 512.0, 350.0,
        matrix_per_cycle={"bfloat16": 2048, "int8": 4096}, matrix_ghz=2.0,
    ),
    "epyc_7763": _cpu("AMD EPYC 7763 (Zen 3)", ((64, 2.45, 32, 64),), (32, 512, 262144), 205.0, 512.0, 280.0),
    "epyc_9654": _cpu(
        "AMD EPYC 9654 (Zen 4)", ((96, 2.4, 32, 256),), (32, 1024, 393216), 461.0, 768.0, 360.0
    ),
    "ryzen_7950x": _cpu("AMD Ryzen 9 7950X", ((16, 4.5, 32, 256),), (32, 1024, 65536), 83.0, 64.0, 170.0),
    "core_i9_13900k": _cpu(
        "Intel Core i9-13900K",
        ((8, 5.0, 32, 128), (16, 4.0, 16, 64)), (48, 2048, 36864), 90.0, 64.0, 253.0,
    ),
    "apple_m2": _cpu(
        "Apple M2", ((4, 3.4, 32, 128), (4, 2.4, 16, 64)), (128, 4096, 8192), 100.0, 16.0, 20.0,
        l2_shared=True,
    ),
    "iphone14pro_cpu": _cpu(
        "Apple A16, CPU", ((2, 3.46, 32, 128), (4, 2.0, 16, 64)), (128, 8192, 24576), 51.0, 6.0, 5.0,
        l2_shared=True, usable=0.5, runtime_gb=0.5,
        notes={"usable": "an iOS app gets about half of the memory, from memory"},
    ),
    "galaxy_s23_cpu": _cpu(
        "Snapdragon 8 Gen 2, CPU",
        ((1, 3.2, 32, 128), (4, 2.8, 16, 64), (3, 2.0, 8, 32)), (64, 1024, 8192), 67.0, 8.0, 5.0,
        usable=0.75, runtime_gb=0.5, notes={"usable": "our assumption"},
    ),
    "pixel_6a_cpu": _cpu(
        "Google Tensor, CPU",
        ((2, 2.8, 32, 128), (2, 2.25, 16, 64), (4, 1.8, 8, 32)), (64, 1024, 4096), 51.0, 6.0, 5.0,
        usable=0.75, runtime_gb=0.5, notes={"usable": "our assumption"},
    ),
    "raspberry_pi5": _cpu("Raspberry Pi 5", ((4, 2.4, 16, 64),), (64, 512, 2048), 17.0, 8.0, 12.0),
}  # fmt: skip
