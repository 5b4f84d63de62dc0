"""Instructions that int8 kernels retire on Cortex-M cores: linear forms of their loops, constants fitted.

A form lists how often each part of a kernel's loops runs for given sizes (`//` and `%` are the loops' own);
one constant a part. The constants are `hw.mcu_parts.MCU_COUNTS`, made by `fit` from counts of an instruction-
exact emulator: the stored cross-check file and the calibration shapes of `tests/claims/hw_mcu_counts.py`.
Instructions are not cycles: `hw.mcu` multiplies them by cycles an instruction.
"""

import numpy as np

from hw.mcu_parts import MCU_COUNTS

DSP = ("cortex_m7", "cortex_m4")  # two 16-bit products an instruction
CORES = (*DSP, "cortex_m3")
PROFILES = ("cmsis_nn", "tinyengine", "tflm_ref", "emitted")
DIMS = {
    **dict.fromkeys(
        ("fully_connected_s8", "matmul_s8", "product_s8", "matmul_any_s8", "product_any_s8"), ("m", "k", "n")
    ),
    # places and channels of the result; rows and taps of the kernel on the map, over all places; channels in
    **dict.fromkeys(("conv_s8", "group_conv_s8"), ("m", "n", "rows", "taps", "k")),
    **dict.fromkeys(("window_max_s8", "window_sum_s8"), ("n", "rows", "taps")),  # over all results
    **dict.fromkeys(
        ("softmax_s8", "layernorm_s8", "reduce_sum_s8", "reduce_max_s8", "sum_down_s8", "move_s8", "place_s8",
         "take_s8"), ("rows", "cols")
    ),
    **dict.fromkeys(
        ("add_s8", "mul_s8", "rescale_s8", "lut_s8", "divide_s8", "copy_s8", "extreme_s8", "select_s8",
         "fill_s8"), ("n",)
    ),
}  # fmt: skip
# With int16 activations: the same kernels, copies by bytes and a fully connected layer as a product apart.
DIMS |= {k.replace("_s8", "_s16"): v for k, v in DIMS.items() if k not in ("copy_s8", "fully_connected_s8")}
# Cycles a multiply-accumulate where a library is known by its published latencies alone.
PER_MAC = {"tinyengine": 2.0, "tflm_ref": 46.0}
_PRODUCTS = ("fully_connected_s8", "matmul_s8", "product_s8", "matmul_any_s8", "product_any_s8")


def instructions(kernel, dims, core, *, inputs=None, profile="cmsis_nn") -> int:
    """Retired instructions of one call of an int8 kernel.

    Args: kernel: a name of `DIMS`. dims: {"m", "k", "n"} of a product [m, k] x [n, k], {"rows", "cols"}, or
        {"n"}. core: "cortex_m7", "cortex_m4" or "cortex_m3".
      inputs: {"x", "diff_min"} (and more) of softmax_s8, whose count depends on how many entries come within
        diff_min of their row's maximum; without it all do, the worst case.
      profile: "cmsis_nn" (kernels that it lacks are the project's own C), "emitted" (all the project's C),
        "tinyengine" and "tflm_ref" (products at 2 and 46 a multiply-accumulate, the rest as "cmsis_nn").
    Raises: ValueError naming the argument.
    """
    if kernel not in DIMS:
        raise ValueError(f"kernel must be one of {', '.join(DIMS)}, got {kernel!r}")
    if core not in CORES:
        raise ValueError(f"core must be one of {', '.join(CORES)}, got {core!r}")
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    if set(dims) != set(DIMS[kernel]):
        raise ValueError(f"dims of {kernel} must be {', '.join(DIMS[kernel])}, got {', '.join(dims)}")
    sizes = [int(dims[d]) for d in DIMS[kernel]]
    if min(sizes) < 0:
        raise ValueError(f"dims must not be negative, got {dims}")
    if profile in PER_MAC and kernel.replace("_s16", "_s8") in _PRODUCTS:
        return round(PER_MAC[profile] * sizes[0] * sizes[1] * sizes[2])
    if kernel == "softmax_s8":
        sizes.append(_near(inputs, sizes))
    library = "emitted" if profile == "emitted" else "cmsis_nn"
    name = _name(library, kernel)
    constants = MCU_COUNTS.numbers[f"{name[0]}/{core}/{name[1]}"]
    return max(round(float(np.dot(form(*name, core, sizes), constants))), 0)


def _near(inputs, sizes):
    """Entries that a softmax works on."""
    if inputs is None:
        return sizes[0] * sizes[1]
    x = np.asarray(inputs["x"], np.int64)
    if x.shape != (sizes[0], sizes[1]):
        raise ValueError(f"inputs['x'] has shape {list(x.shape)}, but dims say {sizes}")
    return int((x - x.max(axis=1, keepdims=True) >= inputs["diff_min"]).sum())


def _name(library, kernel):
    """(library, kernel) whose constants count: CMSIS-NN where it has the kernel, else the project's own C."""
    if kernel.endswith("_s16"):  # the project's own C, whatever the profile
        return "emitted", kernel
    if library == "emitted":
        return library, "matmul_s8" if kernel == "fully_connected_s8" else kernel
    if kernel in (
        "product_s8",
        "product_any_s8",
        "matmul_any_s8",
    ):  # CMSIS-NN multiplies two activations by the same routine, offsets first
        return library, "matmul_s8"
    return (library, kernel) if kernel in LIBRARY else ("emitted", kernel)


LIBRARY = ("fully_connected_s8", "matmul_s8", "add_s8", "softmax_s8")


def form(library, kernel, core, sizes):
    """How often each part of the kernel's loops runs."""
    if kernel == "softmax_s16":  # tables: whatever the data
        return [1, sizes[0], sizes[0] * sizes[1]]
    if kernel in ("fill_s16", "take_s16"):  # by bytes
        sizes = [*sizes[:-1], 2 * sizes[-1]]
    kernel = kernel.replace("_s16", "_s8")
    if kernel in _PRODUCTS:
        m, k, n = sizes
        if library == "emitted":
            return [1, m, m * n, m * n * k]
        dsp = core in DSP
        if kernel == "fully_connected_s8":
            inner = (1, k >= 4, k // 4, k % 4 > 0, k % 4) if dsp else (1, k)
            wide = 2 if dsp else 3
            many, odd = n // wide, n % wide
            paired, single = [m * many * v for v in inner], [m * odd * v for v in inner]
            return [1, m, m * (many > 0), *paired, m * (odd > 0), *single]
        inner = (1, k // 16, k % 16 // 4 > 0, k % 16 // 4, k % 4 > 0, k % 4) if dsp else (1, k)
        pairs, odd = n // 2, n % 2
        tail = (1, k // 16, k % 16 // 4, k % 4) if dsp else (1, k)
        both = [pairs * (m // 2) * v for v in inner] + [pairs * (m % 2) * v for v in tail]
        return [1, pairs > 0, pairs, pairs * (m > 1), pairs * k, *both, odd, odd * k, odd * m, odd * m * k]
    if kernel in ("conv_s8", "group_conv_s8"):
        m, n, rows, taps, k = sizes
        places = [taps * n] if kernel == "group_conv_s8" else []
        return [1, m, m * n, rows * n, *places, taps * n * k]
    if kernel in ("window_max_s8", "window_sum_s8"):
        return [1, *sizes]
    if kernel == "softmax_s8":
        rows, cols, near = sizes
        return [1, rows, rows * cols, near]
    if kernel == "layernorm_s8":  # the root and the long divisions take more steps the wider the row
        rows, cols = sizes
        return [1, rows, rows * cols, rows * min(cols, 16)]
    if kernel == "take_s8":
        rows, cols = sizes
        return [1, rows, *(rows * v for v in (cols > 3, cols // 16, cols % 16 // 4, cols % 4))]
    if len(sizes) == 2:
        rows, cols = sizes
        return [1, rows, rows * cols]
    n = sizes[0]
    if kernel in ("copy_s8", "fill_s8"):  # a library copy: few bytes singly, more by words
        return [1, n > 3, n // 16, n % 16 // 4, n % 4]
    if library == "cmsis_nn" and core in DSP:
        return [1, n // 4, n % 4 > 0, n % 4]
    return [1, n]


def fit(calibration, golden=()):
    """{"library/core/kernel": constants} that make relative errors least in squares.

    calibration: {library: {core: [[kernel, *sizes, instructions]]}}, sizes in the order of `DIMS`, those of a
    softmax with its near entries; golden: cases of the cross-check file.
    """
    rows = {}
    for library, cores in calibration.items():
        for core, cases in cores.items():
            for kernel, *sizes, count in cases:
                rows.setdefault((library, core, kernel), []).append((sizes, count))
    for case in golden:
        a = case["args"]
        kernel, dims = a["kernel"], a["dims"]
        sizes = [dims[d] for d in DIMS[kernel]]
        if kernel == "softmax_s8":
            sizes.append(_near(case["kwargs"].get("inputs", a.get("inputs")), sizes))
        rows.setdefault(("cmsis_nn", a["core"], kernel), []).append((sizes, case["outs"]["instructions"]))
    found = {}
    for (library, core, kernel), cases in sorted(rows.items()):
        parts = np.array([form(library, kernel, core, sizes) for sizes, _ in cases], float)
        counts = np.array([count for _, count in cases], float)
        best = np.linalg.lstsq(parts / counts[:, None], np.ones(len(counts)), rcond=None)[0]
        found[f"{library}/{core}/{kernel}"] = [round(float(c), 2) for c in best]
    return found


def worst_error(constants, calibration):
    """{"library/core/kernel": largest relative error} of constants on counted shapes."""
    worst = {}
    for library, cores in calibration.items():
        for core, cases in cores.items():
            for kernel, *sizes, count in cases:
                key = f"{library}/{core}/{kernel}"
                error = abs(np.dot(form(library, kernel, core, sizes), constants[key]) / count - 1)
                worst[key] = max(worst.get(key, 0.0), float(error))
    return worst
