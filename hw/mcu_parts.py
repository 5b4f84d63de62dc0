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
        "emitted/cortex_m3/add_s8": (112.28, 109.17),
        "emitted/cortex_m3/conv_s8": (80.38, 75.55, 67.31, 10.18, 6.0),
        "emitted/cortex_m3/copy_s8": (20.67, 11.79, 16.0, 2.93, 3.71),
        "emitted/cortex_m3/divide_s8": (53.81, 57.29),
        "emitted/cortex_m3/extreme_s8": (77.75, 84.03),
        "emitted/cortex_m3/fill_s8": (23.93, 11.24, 12.04, 2.53, 2.71),
        "emitted/cortex_m3/group_conv_s8": (296.02, 20.99, 79.9, 22.76, 24.19, 6.0),
        "emitted/cortex_m3/layernorm_s8": (127.44, 628.33, 143.19, 6.24),
        "emitted/cortex_m3/lut_s8": (18.0, 6.0),
        "emitted/cortex_m3/matmul_any_s8": (56.73, 10.53, 71.71, 6.99),
        "emitted/cortex_m3/matmul_s8": (55.69, 20.67, 63.53, 5.99),
        "emitted/cortex_m3/move_s8": (46.37, 14.05, 8.0),
        "emitted/cortex_m3/mul_s8": (54.78, 42.65),
        "emitted/cortex_m3/place_s8": (49.01, 13.99, 8.0),
        "emitted/cortex_m3/product_any_s8": (61.31, 7.92, 59.56, 10.0),
        "emitted/cortex_m3/product_s8": (56.43, 15.35, 44.4, 7.0),
        "emitted/cortex_m3/reduce_max_s8": (22.0, 10.0, 7.0),
        "emitted/cortex_m3/reduce_sum_s8": (38.28, 38.13, 4.99),
        "emitted/cortex_m3/rescale_s8": (33.44, 35.51),
        "emitted/cortex_m3/select_s8": (78.44, 46.28),
        "emitted/cortex_m3/softmax_s8": (48.61, 233.45, 19.0, 339.88),
        "emitted/cortex_m3/sum_down_s8": (40.62, 43.73, 6.99),
        "emitted/cortex_m3/take_s8": (30.09, 9.41, 10.94, 15.72, 3.64, 3.8),
        "emitted/cortex_m3/window_max_s8": (406.48, 28.55, 10.71, 19.73),
        "emitted/cortex_m3/window_sum_s8": (120.65, 53.9, 28.09, 14.09),
        "emitted/cortex_m4/add_s8": (109.28, 109.18),
        "emitted/cortex_m4/conv_s8": (78.52, 76.52, 67.31, 10.18, 6.0),
        "emitted/cortex_m4/copy_s8": (20.67, 11.79, 16.0, 2.93, 3.71),
        "emitted/cortex_m4/divide_s8": (54.33, 58.31),
        "emitted/cortex_m4/extreme_s8": (75.75, 84.03),
        "emitted/cortex_m4/fill_s8": (23.93, 11.24, 12.04, 2.53, 2.71),
        "emitted/cortex_m4/group_conv_s8": (304.25, 21.4, 79.87, 22.79, 24.18, 6.0),
        "emitted/cortex_m4/layernorm_s8": (124.45, 630.35, 143.19, 6.24),
        "emitted/cortex_m4/lut_s8": (18.0, 6.0),
        "emitted/cortex_m4/matmul_any_s8": (57.51, 12.57, 70.7, 6.99),
        "emitted/cortex_m4/matmul_s8": (55.69, 20.67, 63.53, 5.99),
        "emitted/cortex_m4/move_s8": (46.37, 14.05, 8.0),
        "emitted/cortex_m4/mul_s8": (55.48, 42.67),
        "emitted/cortex_m4/place_s8": (49.01, 13.99, 8.0),
        "emitted/cortex_m4/product_any_s8": (61.31, 7.92, 59.56, 10.0),
        "emitted/cortex_m4/product_s8": (56.43, 15.35, 44.4, 7.0),
        "emitted/cortex_m4/reduce_max_s8": (21.69, 11.01, 7.0),
        "emitted/cortex_m4/reduce_sum_s8": (38.28, 38.13, 4.99),
        "emitted/cortex_m4/rescale_s8": (33.44, 35.51),
        "emitted/cortex_m4/select_s8": (79.33, 46.27),
        "emitted/cortex_m4/softmax_s8": (49.28, 232.56, 20.02, 337.93),
        "emitted/cortex_m4/sum_down_s8": (39.61, 43.74, 6.99),
        "emitted/cortex_m4/take_s8": (30.09, 9.41, 10.94, 15.72, 3.64, 3.8),
        "emitted/cortex_m4/window_max_s8": (463.56, 29.13, 13.86, 20.12),
        "emitted/cortex_m4/window_sum_s8": (112.95, 54.4, 30.47, 15.17),
        "emitted/cortex_m7/add_s8": (109.28, 107.18),
        "emitted/cortex_m7/conv_s8": (78.4, 74.57, 68.33, 10.16, 6.0),
        "emitted/cortex_m7/copy_s8": (21.3, 12.27, 16.01, 2.95, 3.59),
        "emitted/cortex_m7/divide_s8": (54.81, 57.29),
        "emitted/cortex_m7/extreme_s8": (77.75, 86.03),
        "emitted/cortex_m7/fill_s8": (24.91, 11.57, 12.04, 2.28, 2.72),
        "emitted/cortex_m7/group_conv_s8": (306.31, 21.33, 80.87, 22.78, 24.19, 6.0),
        "emitted/cortex_m7/layernorm_s8": (126.35, 632.41, 143.19, 6.23),
        "emitted/cortex_m7/lut_s8": (18.67, 6.0),
        "emitted/cortex_m7/matmul_any_s8": (60.72, 12.54, 71.71, 6.99),
        "emitted/cortex_m7/matmul_s8": (58.69, 20.65, 63.53, 5.99),
        "emitted/cortex_m7/move_s8": (48.0, 14.0, 8.0),
        "emitted/cortex_m7/mul_s8": (56.8, 43.66),
        "emitted/cortex_m7/place_s8": (50.0, 14.0, 8.0),
        "emitted/cortex_m7/product_any_s8": (58.52, 4.81, 60.61, 10.0),
        "emitted/cortex_m7/product_s8": (58.15, 15.62, 47.33, 7.0),
        "emitted/cortex_m7/reduce_max_s8": (23.67, 9.03, 7.0),
        "emitted/cortex_m7/reduce_sum_s8": (42.96, 41.9, 4.98),
        "emitted/cortex_m7/rescale_s8": (34.42, 35.51),
        "emitted/cortex_m7/select_s8": (79.24, 46.27),
        "emitted/cortex_m7/softmax_s8": (50.14, 236.64, 20.02, 340.93),
        "emitted/cortex_m7/sum_down_s8": (39.08, 46.94, 6.98),
        "emitted/cortex_m7/take_s8": (31.03, 9.62, 10.74, 15.72, 3.65, 3.79),
        "emitted/cortex_m7/window_max_s8": (439.75, 29.15, 13.66, 20.16),
        "emitted/cortex_m7/window_sum_s8": (113.85, 55.48, 30.41, 15.18),
    },
)  # fmt: skip
