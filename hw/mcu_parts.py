"""Microcontrollers: cores, memories and clocks of the parts, and what kernels retire on their cores.

Clocks, wait states and caches are data sheets' from memory; memory budgets are those of the MCUFormer and
TinyEngine experiments. The constants of the kernels come from `tests/claims/hw_mcu_counts.py`, never by hand.
"""

from hw.parts import Part

_SHEET = "data sheet, from memory"
_NOTES = {
    "joules_per_cycle": "our assumption: power at full clock over the clock, about 0.33 W for the F746",
    "flash_bytes_s": "our assumption: sequential reads through the accelerator or cache",
    "flash_joules_per_byte": "our assumption",
    "cpi": "1.0: dual issue and stalls roughly cancel in published latencies; 1.15 and 1.2 are ours",
    "regions": "the budget that the MCUFormer and TinyEngine experiments state for the part",
    "flash_kb": "as the experiments state",
}


def _board(title, **numbers):
    return Part(title, _SHEET, numbers, {k: v for k, v in _NOTES.items() if k in numbers})


# regions: (name, KB of 1024 bytes, bytes a cycle); 4 bytes a cycle never stall the core.
MCUS = {
    "stm32f427": _board(
        "STM32F427", core="cortex_m4", mhz=180.0, regions=(("sram", 256, 4.0),), flash_kb=1024, wait_states=5,
        caches_kb=(1, 0), cpi=1.15, joules_per_cycle=1.4e-9, flash_bytes_s=200e6,
        flash_joules_per_byte=0.2e-9,
    ),
    "stm32f746": _board(
        "STM32F746", core="cortex_m7", mhz=216.0, regions=(("sram", 320, 4.0),), flash_kb=1024, wait_states=7,
        caches_kb=(4, 4), cpi=1.0, joules_per_cycle=1.5e-9, flash_bytes_s=200e6,
        flash_joules_per_byte=0.2e-9,
    ),
    "stm32h743": _board(
        "STM32H743", core="cortex_m7", mhz=480.0, regions=(("axi", 512, 4.0),), flash_kb=2048, wait_states=4,
        caches_kb=(16, 16), cpi=1.0, joules_per_cycle=1.0e-9, flash_bytes_s=400e6,
        flash_joules_per_byte=0.2e-9,
    ),
    "mps2_an385": _board(
        "Cortex-M3 class (the MPS2 board AN385)", core="cortex_m3", mhz=100.0, regions=(("sram", 256, 4.0),),
        flash_kb=1024, wait_states=3, caches_kb=(0, 0), cpi=1.2, joules_per_cycle=1.4e-9, flash_bytes_s=100e6,
        flash_joules_per_byte=0.2e-9,
    ),
    "esp32c3": _board(
        "ESP32-C3", core="rv32imc", mhz=160.0, regions=(("sram", 384, 4.0),), flash_kb=4096, wait_states=0,
        caches_kb=(16, 0), cpi=1.2, joules_per_cycle=0.5e-9, flash_bytes_s=40e6, flash_joules_per_byte=0.4e-9,
    ),
}  # fmt: skip
# All memories of parts whose default budget is a single one, fastest first, for `replace(.., regions=..)`.
ALL_REGIONS = {
    "stm32h743": (("dtcm", 128, 4.0), ("axi", 512, 4.0), ("d2", 288, 2.0), ("d3", 64, 2.0)),
    "stm32f746_disco": (("sram", 320, 4.0), ("sdram", 8192, 0.5)),
}
# Cores with a single precision floating-point unit; the H743's is double.
FPU = ("cortex_m4", "cortex_m7")
SCALAR = Part(
    "Instructions of plain loops: integers, moves of bytes, floats",
    "our assumption, from the shape of the loops that a compiler makes",
    {
        "integer_op": 6, "random_word": 110, "sort_compare": 12, "float_op": 14, "float_function": 120,
        "soft_float_op": 70, "soft_float_function": 1500, "to_float_and_back": 40,
    },
    {
        "random_word": "operations of threefry for one word, as `hw.primitives` counts them, halved",
        "soft_float_op": "a call of the compiler's library on a core without the unit, from memory",
        "to_float_and_back": "codes to floats and back, by a multiplication, a rounding and a clamp",
    },
)  # fmt: skip
# A core without counts of its own borrows those of its nearest kin, and its reports say so.
BORROWED = {"rv32imc": "cortex_m3"}

MCU_COUNTS = Part(
    "Retired instructions of int8 kernels: constants of the forms of hw.kernel_counts",
    "CMSIS-NN 99f736a6 and hw.mcu_c, gcc 12.2 -Ofast, counted in qemu 7.2 by tests/claims/hw_mcu_counts.py",
    {
        "cmsis_nn/cortex_m3/add_s8": (95.16, 83.87),
        "cmsis_nn/cortex_m3/fully_connected_s8": (35.76, 60.29, 54.04, 109.87, 10.0, 13.53, 48.31, 6.01),
        "cmsis_nn/cortex_m3/matmul_s8": (46.64, 47.51, 38.87, 21.0, 6.0, 146.48, 10.0, 85.1, 6.99, 20.41,
            -0.01, 50.0, 6.0),
        "cmsis_nn/cortex_m3/softmax_s8": (38.8, 97.26, 27.9, 493.04),
        "cmsis_nn/cortex_m4/add_s8": (101.25, 323.54, -17.25, 83.38),
        "cmsis_nn/cortex_m4/fully_connected_s8": (40.21, 45.11, 58.48, 87.27, 9.87, 15.1, 6.96, 7.34, 23.15,
            23.15, 23.15, 9.43, 8.7, 13.71),
        "cmsis_nn/cortex_m4/matmul_s8": (64.38, 48.53, 55.72, 23.81, 5.82, 151.81, 91.52, 18.86, 22.37,
            0.02, 14.63, 103.9, 60.56, 19.15, 11.59, -5.91, 0.25, 50.36, 5.98),
        "cmsis_nn/cortex_m4/softmax_s8": (36.35, 95.15, 27.65, 495.78),
        "cmsis_nn/cortex_m7/add_s8": (100.78, 326.35, -13.4, 82.68),
        "cmsis_nn/cortex_m7/fully_connected_s8": (41.15, 46.42, 60.84, 87.16, 10.07, 15.09, 6.92, 7.38,
            21.88, 21.88, 21.88, 9.45, 12.11, 13.83),
        "cmsis_nn/cortex_m7/matmul_s8": (68.93, 36.62, 56.61, 21.83, 5.87, 155.59, 90.95, 17.13, 22.25,
            -0.99, 14.77, 100.02, 59.56, 20.4, 11.84, -9.49, 0.29, 50.04, 5.99),
        "cmsis_nn/cortex_m7/softmax_s8": (38.43, 109.58, 27.53, 505.44),
        "emitted/cortex_m3/add_s8": (98.5, 107.76),
        "emitted/cortex_m3/copy_s8": (18.51, 12.18, 15.99, 3.0, 4.04),
        "emitted/cortex_m3/divide_s8": (38.23, 54.3),
        "emitted/cortex_m3/layernorm_s8": (121.68, 627.34, 143.19, 6.25),
        "emitted/cortex_m3/lut_s8": (15.68, 6.0),
        "emitted/cortex_m3/matmul_s8": (51.67, 20.67, 63.52, 5.99),
        "emitted/cortex_m3/move_s8": (45.81, 13.97, 8.0),
        "emitted/cortex_m3/mul_s8": (41.23, 40.68),
        "emitted/cortex_m3/product_s8": (53.35, 15.37, 44.4, 7.0),
        "emitted/cortex_m3/reduce_max_s8": (14.48, 9.0, 6.0),
        "emitted/cortex_m3/reduce_sum_s8": (33.44, 38.22, 4.99),
        "emitted/cortex_m3/rescale_s8": (31.41, 35.51),
        "emitted/cortex_m3/softmax_s8": (44.51, 233.52, 18.99, 339.88),
        "emitted/cortex_m4/add_s8": (100.16, 108.17),
        "emitted/cortex_m4/copy_s8": (18.56, 11.85, 16.03, 2.81, 3.47),
        "emitted/cortex_m4/divide_s8": (39.79, 54.28),
        "emitted/cortex_m4/layernorm_s8": (121.42, 627.32, 143.19, 6.23),
        "emitted/cortex_m4/lut_s8": (16.35, 6.01),
        "emitted/cortex_m4/matmul_s8": (51.67, 20.67, 63.52, 5.99),
        "emitted/cortex_m4/move_s8": (45.81, 13.97, 8.0),
        "emitted/cortex_m4/mul_s8": (42.61, 40.66),
        "emitted/cortex_m4/product_s8": (53.35, 15.37, 44.4, 7.0),
        "emitted/cortex_m4/reduce_max_s8": (16.75, 9.98, 6.0),
        "emitted/cortex_m4/reduce_sum_s8": (36.07, 38.1, 4.99),
        "emitted/cortex_m4/rescale_s8": (30.4, 35.51),
        "emitted/cortex_m4/softmax_s8": (47.08, 232.55, 20.02, 337.93),
        "emitted/cortex_m7/add_s8": (95.51, 107.78),
        "emitted/cortex_m7/copy_s8": (18.51, 12.18, 15.99, 3.0, 4.04),
        "emitted/cortex_m7/divide_s8": (39.78, 54.29),
        "emitted/cortex_m7/layernorm_s8": (118.62, 627.35, 143.19, 6.22),
        "emitted/cortex_m7/lut_s8": (15.68, 6.0),
        "emitted/cortex_m7/matmul_s8": (53.67, 20.65, 63.53, 5.99),
        "emitted/cortex_m7/move_s8": (45.81, 13.97, 8.0),
        "emitted/cortex_m7/mul_s8": (42.61, 40.66),
        "emitted/cortex_m7/product_s8": (53.47, 15.55, 47.34, 7.0),
        "emitted/cortex_m7/reduce_max_s8": (14.5, 8.03, 6.0),
        "emitted/cortex_m7/reduce_sum_s8": (38.01, 41.9, 4.98),
        "emitted/cortex_m7/rescale_s8": (31.53, 35.53),
        "emitted/cortex_m7/softmax_s8": (44.82, 236.47, 20.03, 340.94),
    },
)  # fmt: skip
