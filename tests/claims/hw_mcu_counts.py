"""Instructions that int8 kernels retire, counted in an emulator: CMSIS-NN's, and the project's own C.

    python -m tests.claims.hw_mcu_counts <checkout of ARM-software/CMSIS-NN>

Needs arm-none-eabi-gcc and qemu-system-arm (Debian: gcc-arm-none-eabi, qemu-system-arm). Writes
docs/data/hw_mcu_counts.json: counts on `calibration` shapes, to which the constants of `hw.kernel_counts` are
fitted, and on `validation` shapes drawn apart from them, which only judge. Prints the constants for
hw/mcu_parts.py.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from hw import kernel_counts, mcu_c16
from hw.mcu_c import KERNELS
from tests.claims import record

CORES = {"cortex_m7": "mps2-an500", "cortex_m4": "mps2-an386", "cortex_m3": "mps2-an385"}
FILES = ("tests/claims/hw_mcu_counts.py", "hw/mcu_c.py", "hw/mcu_c16.py")
TICKS = 1.6  # of the 25 MHz timer for an instruction of 64 ns
LINK = """MEMORY { ROM (rx): ORIGIN = 0, LENGTH = 4M  RAM (rwx): ORIGIN = 0x20000000, LENGTH = 4M }
SECTIONS { .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > ROM
 .ARM.exidx : { *(.ARM.exidx*) } > ROM
 .data : { *(.data*) } > RAM
 .bss : { *(.bss*) *(COMMON) } > RAM }"""
START = r"""
void main_(void);
void Reset_Handler(void) { main_(); for (;;) ; }
__attribute__((section(".vectors"), used)) void *vectors[64] = {(void *)0x20400000, (void *)Reset_Handler};
static void host(int op, const void *p) {
  register int r0 __asm("r0") = op; register const void *r1 __asm("r1") = p;
  __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}
static void say(uint32_t v) {
  char t[12], *p = t + 11; *p = 0; *--p = '\n';
  do { *--p = (char)('0' + v % 10); v /= 10; } while (v);
  host(4, p);
}
__attribute__((optimize("no-tree-loop-distribute-patterns"))) /* or it would call itself */
void *memset(void *p, int c, unsigned n) { char *q = p; while (n--) *q++ = (char)c; return p; }
void *memcpy(void *d, const void *s, unsigned n) {
  char *a = d; const char *q = s; while (n--) *a++ = *q++; return d; }
#define TIMER ((volatile uint32_t *)0xE000E010)
"""
MAIN = r"""
static int8_t x[1 << 17], w[1 << 17], y[1 << 17], table[256];
static uint8_t mask[4096];
static int16_t x16[1 << 17], w16[1 << 17], y16[1 << 17], table16[513];
static int64_t b64[4096];
static int16_t g[4096];
static int32_t b[4096], mul[4096], sh[4096];
static const struct { int kind, m, k, n; } cases[] = {%s};
void main_(void) {
  TIMER[1] = 0xFFFFFF; TIMER[0] = 5;
  uint32_t seed = 1;
  for (int i = 0; i < 1 << 17; i++) { seed = seed * 1664525u + 1013904223u; x[i] = (int8_t)(seed >> 24);
    w[i] = (int8_t)(seed >> 16); x16[i] = (int16_t)(seed >> 16); w16[i] = (int16_t)(seed >> 12); }
  for (int i = 0; i < 513; i++) table16[i] = (int16_t)(60 * i);
  for (int i = 0; i < 4096; i++) { b[i] = i * 7 - 300; mul[i] = 1500000000; sh[i] = -8; g[i] = 20000; }
  for (int i = 0; i < 256; i++) table[i] = (int8_t)i;
  for (int i = 0; i < 4096; i++) mask[i] = (uint8_t)x[i] >> 7;
  for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
    int m = cases[i].m, k = cases[i].k, n = cases[i].n;
    prepare(m, k, n);
    TIMER[2] = 0;
    uint32_t t0 = TIMER[2], t1;
    switch (cases[i].kind) { %s }
    t1 = TIMER[2];
    say((t0 - t1) & 0xFFFFFF);
  }
  host(0x18, (void *)0x20026);
}
"""
# What a call of CMSIS-NN takes besides arrays, filled before the clock is read.
RECORDS = """static int32_t sums[4096];
static cmsis_nn_context ctx = {sums, 16384};
static cmsis_nn_fc_params fc = {3, 0, 1, {-128, 127}};
static cmsis_nn_per_tensor_quant_params quant = {1500000000, -8};
static cmsis_nn_dims id, fd, bd, od;
static void prepare(int m, int k, int n) {
  cmsis_nn_dims i = {m, 1, 1, k}, f = {k, 1, 1, n}, b = {1, 1, 1, n}, o = {m, 1, 1, n};
  id = i; fd = f; bd = b; od = o;
}
"""
# kernel: the call that runs it on m, k, n.
CMSIS = {
    "fully_connected_s8": "arm_fully_connected_s8(&ctx, &fc, &quant, &id, x, &fd, w, &bd, b, &od, y);",
    "matmul_s8": "arm_nn_mat_mult_nt_t_s8(x, w, b, y, mul, sh, m, n, k, 3, 1, -128, 127, n, k);",
    "add_s8": "arm_elementwise_add_s8(x, w, 3, 1192956462, -1, -20, 1073741824, 0, 20, y, 1, 1243582195,"
    " -19, -128, 127, n);",
    "softmax_s8": "arm_softmax_s8(x, m, n, 1717986918, 23, k, y);",
}
# Convolutions and windows of an m x m map, k channels in and n out: their geometry by m.
GEOMETRY = """static int32_t conv[21], window[13];
static void prepare(int m, int k, int n) {
  int e = 1 + m % 3 * 2, s = 1 + m % 2, p = e / 2, o = (m + 2 * p - e) / s + 1;
  int32_t c[21] = {m, m, k, o, o, n, e, e, s, s, p, p, 1, 1, n, m * k, k, 1, o * n, n, 1};
  int32_t v[13] = {m, m, n, o, o, e, e, s, s, p, p, 1, 1};
  for (int i = 0; i < 21; i++) conv[i] = c[i];
  for (int i = 0; i < 13; i++) window[i] = v[i];
}
"""
OWN = {
    "matmul_s8": "t_matmul_s8(x, w, b, mul, sh, y, m, k, n, 3, 1, -128, 127);",
    "product_s8": "t_product_s8(x, w, y, m, k, n, 3, -4, 1500000000, -8, 1);",
    "add_s8": "t_add_s8(x, 1, w, 1, y, n, 3, 1192956462, -1, -20, 1073741824, 0, 20, 1, 1243582195, -19,"
    " -128, 127);",
    "mul_s8": "t_mul_s8(x, 1, w, 1, y, n, 3, -20, 1500000000, -8, 1);",
    "rescale_s8": "t_rescale_s8(x, y, n, 3, 1500000000, -2, 1);",
    "lut_s8": "t_lut_s8(x, table, y, n);",
    "divide_s8": "t_divide_s8(x, 1, w, 1, y, n, 3, -20, 1500000000, -8, 1);",
    "reduce_sum_s8": "t_reduce_sum_s8(x, y, m, n, 3, 1500000000, -8, 1);",
    "reduce_max_s8": "t_reduce_max_s8(x, y, m, n, 0);",
    "copy_s8": "t_copy_s8(x, y, n);",
    "move_s8": "{ int32_t size[4] = {1, 1, m, n}, step[4] = {0, 0, 1, m}; t_move_s8(x, y, size, step, 0); }",
    "softmax_s8": "t_softmax_s8(x, y, m, n, 1717986918, 23, k);",
    "layernorm_s8": "t_layernorm_s8(x, g, b, y, m, n, 3, 1500000000, -8, 1, 1);",
    "matmul_any_s8": "{ int32_t step[4] = {1, m, 1, m};"
    " t_matmul_any_s8(x, w, b, mul, sh, y, m, k, n, step, 3, 1); }",
    "product_any_s8": "{ int32_t step[6] = {k, 1, 1, n, n, 1};"
    " t_product_any_s8(x, w, y, m, k, n, step, 3, -4, 1500000000, -8, 1); }",
    "conv_s8": "t_conv_s8(x, w, b, mul, sh, y, conv, 3, 1);",
    "group_conv_s8": "conv[2] = 1 + k % 4; conv[15] = 16 * m; conv[16] = 16;"
    " t_group_conv_s8(x, w, b, mul, sh, y, conv, 3, 1);",
    "window_max_s8": "t_window_max_s8(x, y, window, 0);",
    "window_sum_s8": "t_window_sum_s8(x, y, window, 3, 1500000000, -8, 1);",
    "sum_down_s8": "t_sum_down_s8(x, y, m, n, 3, 1500000000, -8, 1);",
    "extreme_s8": "t_extreme_s8(x, 1, w, 1, y, n, 3, 1500000000, -1, -20, 1073741824, 0, 1, 0);",
    "select_s8": "t_select_s8(mask, 1, x, 1, w, 1, y, n, 3, 1500000000, -1, -20, 1073741824, 0, 1);",
    "fill_s8": "t_fill_s8(y, n, 7);",
    "place_s8": "{ int32_t size[4] = {1, 1, m, n}, step[4] = {0, 0, 2 * n, 1};"
    " t_place_s8(x, y, size, step, 5); }",
    "take_s8": "t_take_s8(x, y, at, m, n);",
}
WEIGHTED = ("matmul_s8", "matmul_any_s8", "conv_s8", "group_conv_s8")


def wide(name):
    """The call of a kernel of int16 from that of int8: the same numbers, wider arrays."""
    plain = {"x": "x16", "w": "w16", "y": "y16", "table": "table16"}
    weighted = {"x": "x16", "y": "y16", "b": "b64", "-128": "-32768", "127": "32767"}
    swap = weighted if name in WEIGHTED else plain
    text = re.sub(r"(?<![\w.])-?\w+\b", lambda m: swap.get(m[0], m[0]), OWN[name])
    return text.replace("23, k)", "-2, table16, table16)").replace("_s8(", "_s16(")


OWN |= {n.replace("_s8", "_s16"): wide(n) for n in OWN if n != "copy_s8"}
SOURCES = (
    "FullyConnectedFunctions/arm_fully_connected_s8.c", "FullyConnectedFunctions/arm_vector_sum_s8.c",
    "NNSupportFunctions/arm_nn_vec_mat_mult_t_s8.c", "NNSupportFunctions/arm_nn_mat_mult_nt_t_s8.c",
    "BasicMathFunctions/arm_elementwise_add_s8.c", "SoftmaxFunctions/arm_softmax_s8.c",
    "SoftmaxFunctions/arm_nn_softmax_common_s8.c", "NNSupportFunctions/arm_nn_softmax_common_s8.c",
)  # fmt: skip


def shapes(seed, count=100):
    """[(kernel, m, k, n)], small and odd, the same for every library."""
    r = random.Random(seed)
    either = lambda small, large: r.choice((r.randint(1, small), r.randint(1, large)))
    rows = []
    for _ in range(count):
        rows.append(("fully_connected_s8", r.choice((1, 1, 2, 3)), either(64, 300), either(12, 80)))
        for kernel in ("matmul_s8", "product_s8"):
            rows.append((kernel, either(8, 40), either(40, 130), either(8, 40)))
    for _ in range(count // 3):
        for kernel in ("add_s8", "mul_s8", "rescale_s8", "lut_s8", "divide_s8", "copy_s8"):
            rows.append((kernel, 1, 1, either(12, 500)))
        for kernel in ("reduce_sum_s8", "reduce_max_s8", "move_s8", "layernorm_s8"):
            rows.append((kernel, either(4, 20), 1, 1 + either(16, 128)))
        rows.append(("softmax_s8", either(4, 12), r.choice((-256, -100, -40)), either(16, 100)))
    for _ in range(count // 3):
        for kernel in ("matmul_any_s8", "product_any_s8"):
            rows.append((kernel, either(8, 40), either(40, 130), either(8, 40)))
        for kernel in ("conv_s8", "group_conv_s8", "window_max_s8", "window_sum_s8"):
            rows.append((kernel, r.randint(3, 14), r.randint(1, 12), r.randint(1, 16)))
        for kernel in ("extreme_s8", "select_s8", "fill_s8"):
            rows.append((kernel, 1, 1, either(12, 500)))
        for kernel in ("sum_down_s8", "place_s8", "take_s8"):
            rows.append((kernel, either(4, 20), 1, 1 + either(16, 128)))
    narrow, seen = [row for row in rows if row[0] not in ("copy_s8", "fully_connected_s8")], {}
    for kernel, m, k, n in narrow:  # of every kernel of int16 as many as fit its constants
        seen[kernel] = seen.get(kernel, 0) + 1
        if seen[kernel] <= count // (3 if "conv" in kernel else 5):
            rows.append((kernel.replace("_s8", "_s16"), m, abs(k), n))
    return rows


def sizes(kernel, m, k, n):
    """The sizes of a case in the order of `kernel_counts.DIMS`."""
    if kernel == "softmax_s8":
        return [m, n, within(m, k, n)]
    edge, stride = 1 + m % 3 * 2, 1 + m % 2
    out = (m + 2 * (edge // 2) - edge) // stride + 1
    meet = sum(0 <= i * stride - edge // 2 + r < m for i in range(out) for r in range(edge))
    dims = {"m": m, "k": k, "n": n, "rows": m, "cols": n}
    if "conv" in kernel:
        dims = {"m": out**2, "n": n, "rows": meet * out, "taps": meet**2, "k": k}
        dims["k"] = 1 + k % 4 if kernel.startswith("group") else k
    elif kernel.startswith("window"):
        dims = {"n": out**2 * n, "rows": meet * out * n, "taps": meet**2 * n}
    return [dims[d] for d in kernel_counts.DIMS[kernel]]


def filling(count):
    """The first int8 values that the counted program fills its inputs with."""
    seed, values = 1, []
    for _ in range(count):
        seed = (seed * 1664525 + 1013904223) % 2**32
        values.append((seed >> 24) - 256 * (seed >> 31))
    return values


def within(m, diff_min, n):
    """Entries of m rows of n within diff_min of their row's maximum."""
    x = filling(m * n)
    rows = [x[i * n : (i + 1) * n] for i in range(m)]
    return sum(v - max(row) >= diff_min for row in rows for v in row)


def count(core, library, rows, checkout=None):
    """[[kernel, *sizes, instructions]] of a library on a core; `sizes` says which."""
    calls = CMSIS if library == "cmsis_nn" else OWN
    kinds = list(calls)
    rows = [r for r in rows if r[0] in calls]
    text = ",".join(f"{{{kinds.index(k)},{m},{d},{n}}}" for k, m, d, n in rows)
    switch = "".join(f"case {i}: {calls[k]} break;\n" for i, k in enumerate(kinds))
    main = START + MAIN % (text, switch)
    flags = ["-mcpu=" + core.replace("_", "-"), "-mthumb", "-Ofast", "-nostartfiles"]
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d / "link.ld").write_text(LINK)
        units = []
        if library == "cmsis_nn":
            main = '#include "arm_nnfunctions.h"\n#include "arm_nnsupportfunctions.h"\n' + RECORDS + main
            flags.append(f"-I{checkout}/Include")
            units = [p for s in SOURCES if (p := Path(checkout) / "Source" / s).exists()]
        else:
            (d / "kernels.c").write_text(mcu_c16.source([*KERNELS, *mcu_c16.KERNELS_S16]))
            units = [d / "kernels.c"]
            protos = "".join(t[t.index("void t_") : t.index(") {", t.index("void t_"))] + ");\n"
                             for t in (*KERNELS.values(), *mcu_c16.KERNELS_S16.values()))  # fmt: skip
            at = "static int32_t at[64];\n"
            main = "#include <stdint.h>\n" + at + GEOMETRY + protos + main
        (d / "main.c").write_text(main)
        build = [
            "arm-none-eabi-gcc",
            *flags,
            f"-T{d}/link.ld",
            d / "main.c",
            *units,
            "-lgcc",
            "-o",
            d / "a.elf",
        ]
        subprocess.run([str(a) for a in build], check=True)
        run = ["qemu-system-arm", "-M", CORES[core], "-icount", "shift=6", "-nographic", "-monitor", "none"]
        run += ["-serial", "none", "-semihosting", "-kernel", str(d / "a.elf")]
        said = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False)
    found = [int(v) for v in (said.stdout + said.stderr).split()]
    if len(found) != len(rows):
        raise RuntimeError(f"{core}: {len(found)} counts for {len(rows)} cases")
    return [[row[0], *sizes(*row), round(v / TICKS)] for row, v in zip(rows, found, strict=True)]


def main(checkout):
    """Count everything and store it."""
    sets = {"calibration": shapes(1)}
    sets["validation"] = [r for r in shapes(2, 40) if r not in set(sets["calibration"])]
    results = {
        part: {
            lib: {core: count(core, lib, rows, checkout) for core in CORES} for lib in ("cmsis_nn", "emitted")
        }
        for part, rows in sets.items()
    }
    constants = kernel_counts.fit(results["calibration"], cross_check())
    for cores in (c for part in results.values() for c in part.values()):
        cores.update({core: [" ".join(map(str, row)) for row in rows] for core, rows in cores.items()})
    first = lambda *c: subprocess.run(c, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    results["tools"] = [first("arm-none-eabi-gcc", "--version"), first("qemu-system-arm", "--version")]
    print(record.store("hw_mcu_counts", results, FILES))
    for name, values in constants.items():
        print(
            textwrap.fill(
                f'"{name}": {tuple(values)},', 108, initial_indent=" " * 8, subsequent_indent=" " * 12
            )
        )


def stored(part):
    """The stored counts of "calibration" or "validation", as `count` gives them."""
    row = lambda text: [text.split()[0], *map(int, text.split()[1:])]
    libraries = record.load("hw_mcu_counts")["results"][part].items()
    return {lib: {core: [row(t) for t in rows] for core, rows in cores.items()} for lib, cores in libraries}


def cross_check():
    """The stored counts of CMSIS-NN that the project did not make."""
    return json.loads((record.ROOT / "tests/golden/hw_mcu_instructions.json").read_text())["cases"]


if __name__ == "__main__":
    main(sys.argv[1])
