"""Kernels of C with int16 activations, most of them made from those of int8 in `hw.mcu_c`; the text of both.

Results equal `ref.blocks.int16_ops` bit for bit. Offsets stand in the calls as in int8 and are 0.
"""

from hw.mcu_c import KERNELS, RUNTIME

# Kernels of int16 that are those of int8 on wider codes: sums of single codes fit 32 bits.
_WIDER = (
    "add mul rescale reduce_sum reduce_max sum_down window_max window_sum extreme select fill move place take"
)
# And those whose sums need 64: the weights stay int8, two activations are both int16.
_SUMS = "matmul matmul_any conv group_conv product product_any"

RUNTIME_S16 = r"""
static int32_t t_requantize_s64(int64_t a, int32_t m, int32_t s) { /* m of 16 bits: to nearest, ties up */
  return ((int32_t)((a * m) >> (14 - s)) + 1) >> 1;
}
static int16_t t_clamp16(int32_t y, int32_t lo, int32_t hi) {
  return (int16_t)(y < lo ? lo : y > hi ? hi : y);
}
static int32_t t_line(int32_t x, const int16_t *table) { /* between the two nearest of 513 points */
  const int16_t *p = table + 256 + (x >> 7);
  return *p + (((p[1] - *p) * (x & 127) + 64) >> 7);
}
"""
_OWN_S16 = {
    "lut_s16": r"""
void t_lut_s16(const int16_t *a, const int16_t *table, int16_t *y, int32_t n) {
  for (int32_t i = 0; i < n; i++) y[i] = t_clamp16(t_line(a[i], table), -32768, 32767);
}
""",
    "divide_s16": r"""
void t_divide_s16(const int16_t *a, int32_t da, const int16_t *b, int32_t db, int16_t *y, int32_t n,
                  int32_t za, int32_t zb, int32_t mul, int32_t sh, int32_t out) {
  for (int32_t i = 0; i < n; i++, a += da, b += db) {
    int32_t p = *a - za, q = *b - zb, s = (p < 0) == (q < 0) ? 1 : -1;
    uint32_t u = (uint32_t)(p < 0 ? -p : p) << 16, v = q < 0 ? -q : q, r;
    r = v ? (u + v / 2) / v : u ? INT32_MAX : 0;
    r = r > INT32_MAX ? INT32_MAX : r;
    y[i] = t_clamp16(t_requantize(s * (int32_t)r, mul, sh) + out, -32768, 32767);
  }
}
""",
    "softmax_s16": r"""
void t_softmax_s16(const int16_t *x, int16_t *y, int32_t rows, int32_t cols, int32_t mul, int32_t sh,
                   const int16_t *exp, const int16_t *inverse) {
  for (int32_t r = 0; r < rows; r++, x += cols, y += cols) {
    int32_t top = x[0], sum = 0, room = 0;
    for (int32_t c = 1; c < cols; c++) top = x[c] > top ? x[c] : top;
    for (int32_t c = 0; c < cols; c++) {
      int32_t d = t_requantize(x[c] - top, mul, sh) + 32767;
      y[c] = (int16_t)t_line(d < -32768 ? -32768 : d, exp);
      sum += y[c];
    }
    while (!((uint32_t)sum << room & 0x80000000u)) room++;
    int32_t part = (int32_t)((((uint32_t)sum << (room - 1)) + 8192u) >> 14) - 98304;
    int32_t scale = t_line(part > 32767 ? 32767 : part, inverse);
    for (int32_t c = 0; c < cols; c++) y[c] = t_clamp16(((y[c] * scale >> (30 - room)) + 1) >> 1, 0, 32767);
  }
}
""",
    "layernorm_s16": r"""
void t_layernorm_s16(const int16_t *x, const int16_t *g, const int32_t *b, int16_t *y, int32_t rows,
                     int32_t cols, int32_t in, int32_t mul, int32_t sh, int32_t out, int32_t center) {
  for (int32_t r = 0; r < rows; r++, x += cols, y += cols) {
    int64_t s = 0, q = 0;
    for (int32_t c = 0; c < cols; c++) { int32_t v = x[c] + in; s += v; q += (int64_t)v * v; }
    s *= center;
    uint32_t root = t_sqrt((uint64_t)(cols * q - s * s) << 8);
    if (!root) root = 1;
    for (int32_t c = 0; c < cols; c++) {
      int64_t p = ((int64_t)cols * (x[c] + in) - s) * 262144;
      uint64_t u = p < 0 ? -p : p;
      int64_t n = (int64_t)((u + root / 2) / root), a = (p < 0 ? -n : n) * g[c];
      int64_t mask = 32767, rest = a & mask;
      int32_t v = (int32_t)((a >> 15) + (rest > (mask >> 1) + (a < 0))) + b[c];
      y[c] = t_clamp16(t_requantize(v, mul, sh) + out, -32768, 32767);
    }
  }
}
""",
}


def _wider(name):
    """The kernel of int16 that does what one of int8 does."""
    text = KERNELS[f"{name}_s8"].replace("_s8", "_s16")
    if name in _SUMS.split():
        weights = name in ("matmul", "matmul_any", "conv", "group_conv")
        for mark in ("*x", "*y", "*p", "*g", *(() if weights else ("*w", "*q"))):
            text = text.replace(f"int8_t {mark}", f"int16_t {mark}")
        text = text.replace("const int32_t *b", "const int64_t *b").replace("int32_t acc", "int64_t acc")
        text = text.replace("t_requantize(acc", "t_requantize_s64(acc")
    else:
        text = text.replace("int8_t", "int16_t").replace("const uint16_t *m", "const uint8_t *m")
        text = text.replace("best = -128", "best = -32768")
    return text.replace("t_clamp(", "t_clamp16(").replace("-128, 127", "-32768, 32767")


_ROOT = KERNELS["layernorm_s8"][: KERNELS["layernorm_s8"].index("void t_layernorm_s8")]
KERNELS_S16 = {f"{n}_s16": _wider(n) for n in (*_SUMS.split(), *_WIDER.split())} | _OWN_S16


def source(names) -> str:
    """The runtime and the named kernels as one C text."""
    names = set(names)
    text = RUNTIME + "".join(KERNELS[n] for n in KERNELS if n in names)
    if any(n.endswith("_s16") for n in names):
        text += RUNTIME_S16
        if "layernorm_s16" in names and "layernorm_s8" not in names:
            text += _ROOT
        text += "".join(KERNELS_S16[n] for n in KERNELS_S16 if n in names)
    return text
