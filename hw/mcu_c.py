"""The int8 operators of `ref.blocks.int8_ops` as C for a bare core: what a planned network is emitted with.

Plain C99, no library but <stdint.h>, one function per operator, int32 sums, 64-bit products. Their retired
instructions are counted in an emulator by `tests/claims/hw_mcu_counts.py`; their results equal the reference
bit for bit.
"""

RUNTIME = r"""
#include <stdint.h>
static int32_t t_high(int32_t a, int32_t b) { /* saturating doubling high multiply, to nearest */
  int64_t p = (int64_t)a * b;
  if (a == b && a == INT32_MIN) return INT32_MAX;
  return (int32_t)((p + (p >= 0 ? 1 << 30 : 1 - (1 << 30))) / 2147483648LL);
}
static int32_t t_shift(int32_t x, int32_t n) { /* rounding right shift, halves away from zero */
  int32_t mask = (int32_t)((1u << n) - 1), rest = x & mask;
  return (x >> n) + (rest > (mask >> 1) + (x < 0));
}
static int32_t t_requantize(int32_t a, int32_t m, int32_t s) {
  int32_t left = s > 0 ? s : 0, right = s > 0 ? 0 : -s;
  return t_shift(t_high((int32_t)((uint32_t)a << left), m), right);
}
static int8_t t_clamp(int32_t y, int32_t lo, int32_t hi) { return (int8_t)(y < lo ? lo : y > hi ? hi : y); }
static int32_t t_lshift(int32_t x, int32_t n) {
  int64_t y = (int64_t)x << n;
  return y > INT32_MAX ? INT32_MAX : y < INT32_MIN ? INT32_MIN : (int32_t)y;
}
"""

KERNELS = {
    "matmul_s8": r"""
void t_matmul_s8(const int8_t *x, const int8_t *w, const int32_t *b, const int32_t *mul, const int32_t *sh,
                 int8_t *y, int32_t M, int32_t K, int32_t N, int32_t in, int32_t out, int32_t lo,
                 int32_t hi) {
  for (int32_t m = 0; m < M; m++)
    for (int32_t n = 0; n < N; n++) {
      const int8_t *p = x + m * K, *q = w + n * K;
      int32_t acc = b ? b[n] : 0;
      for (int32_t k = 0; k < K; k++) acc += (p[k] + in) * q[k];
      y[m * N + n] = t_clamp(t_requantize(acc, mul[n], sh[n]) + out, lo, hi);
    }
}
""",
    "product_s8": r"""
void t_product_s8(const int8_t *x, const int8_t *w, int8_t *y, int32_t M, int32_t K, int32_t N, int32_t xz,
                  int32_t wz, int32_t mul, int32_t sh, int32_t out) {
  for (int32_t m = 0; m < M; m++)
    for (int32_t n = 0; n < N; n++) {
      const int8_t *p = x + m * K, *q = w + n * K;
      int32_t acc = 0;
      for (int32_t k = 0; k < K; k++) acc += (p[k] - xz) * (q[k] - wz);
      y[m * N + n] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
    }
}
""",
    "add_s8": r"""
void t_add_s8(const int8_t *a, const int8_t *b, int8_t *y, int32_t n, int32_t oa, int32_t ma, int32_t sa,
              int32_t ob, int32_t mb, int32_t sb, int32_t left, int32_t out, int32_t mo, int32_t so,
              int32_t lo, int32_t hi) {
  for (int32_t i = 0; i < n; i++) {
    int32_t t = t_requantize((a[i] + oa) * (1 << left), ma, sa);
    t += t_requantize((b[i] + ob) * (1 << left), mb, sb);
    y[i] = t_clamp(t_requantize(t, mo, so) + out, lo, hi);
  }
}
""",
    "mul_s8": r"""
void t_mul_s8(const int8_t *a, const int8_t *b, int8_t *y, int32_t n, int32_t oa, int32_t ob, int32_t mul,
              int32_t sh, int32_t out) {
  for (int32_t i = 0; i < n; i++)
    y[i] = t_clamp(t_requantize((a[i] + oa) * (b[i] + ob), mul, sh) + out, -128, 127);
}
""",
    "rescale_s8": r"""
void t_rescale_s8(const int8_t *a, int8_t *y, int32_t n, int32_t in, int32_t mul, int32_t sh, int32_t out) {
  for (int32_t i = 0; i < n; i++) y[i] = t_clamp(t_requantize(a[i] + in, mul, sh) + out, -128, 127);
}
""",
    "lut_s8": r"""
void t_lut_s8(const int8_t *a, const int8_t *table, int8_t *y, int32_t n) {
  for (int32_t i = 0; i < n; i++) y[i] = table[a[i] + 128];
}
""",
    "divide_s8": r"""
void t_divide_s8(const int8_t *a, const int8_t *b, int8_t *y, int32_t n, int32_t za, int32_t zb, int32_t mul,
                 int32_t sh, int32_t out) {
  for (int32_t i = 0; i < n; i++) {
    int32_t p = (a[i] - za) * 65536, q = b[i] - zb, s = (p < 0) == (q < 0) ? 1 : -1, r;
    uint32_t u = p < 0 ? -p : p, v = q < 0 ? -q : q;
    r = v ? (int32_t)((u + v / 2) / v) : u ? 1 << 26 : 0;
    y[i] = t_clamp(t_requantize(s * r, mul, sh) + out, -128, 127);
  }
}
""",
    "reduce_sum_s8": r"""
void t_reduce_sum_s8(const int8_t *x, int8_t *y, int32_t rows, int32_t cols, int32_t in, int32_t mul,
                     int32_t sh, int32_t out) {
  for (int32_t r = 0; r < rows; r++) {
    int32_t acc = 0;
    for (int32_t c = 0; c < cols; c++) acc += *x++ + in;
    y[r] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
  }
}
""",
    "reduce_max_s8": r"""
void t_reduce_max_s8(const int8_t *x, int8_t *y, int32_t rows, int32_t cols) {
  for (int32_t r = 0; r < rows; r++) {
    int32_t best = -128;
    for (int32_t c = 0; c < cols; c++, x++) best = *x > best ? *x : best;
    y[r] = (int8_t)best;
  }
}
""",
    "copy_s8": r"""
void t_copy_s8(const int8_t *x, int8_t *y, int32_t n) {
  for (int32_t i = 0; i < n; i++) y[i] = x[i];
}
""",
    "move_s8": r"""
void t_move_s8(const int8_t *x, int8_t *y, const int32_t *size, const int32_t *step, int32_t base) {
  /* a view of four axes, written in order: transposes, slices, broadcasts */
  for (int32_t a = 0; a < size[0]; a++)
    for (int32_t b = 0; b < size[1]; b++)
      for (int32_t c = 0; c < size[2]; c++) {
        const int8_t *p = x + base + a * step[0] + b * step[1] + c * step[2];
        for (int32_t d = 0; d < size[3]; d++, p += step[3]) *y++ = *p;
      }
}
""",
    "softmax_s8": r"""
static int32_t t_exp(int32_t a) {
  static const int32_t f[7] = {1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242};
  int32_t quarter = (a & 16777215) - 16777216, rest = quarter - a;
  int32_t x = quarter * 32 + 268435456, x2 = t_high(x, x), x4 = t_shift(t_high(x2, x2), 2);
  int32_t y = 1895147668 + t_high(1895147668, x + t_shift(t_high(x4 + t_high(x2, x), 715827883) + x2, 1));
  for (int32_t i = 0; i < 7; i++)
    if (rest & (1 << (24 + i))) y = t_high(y, f[i]);
  return a ? y : INT32_MAX;
}
void t_softmax_s8(const int8_t *x, int8_t *y, int32_t rows, int32_t cols, int32_t mul, int32_t sh,
                  int32_t least) {
  for (int32_t r = 0; r < rows; r++, x += cols, y += cols) {
    int32_t top = x[0], sum = 0, room = 0;
    for (int32_t c = 1; c < cols; c++) top = x[c] > top ? x[c] : top;
    for (int32_t c = 0; c < cols; c++)
      if (x[c] - top >= least) sum += t_shift(t_exp(t_high((x[c] - top) * (1 << sh), mul)), 12);
    while (!((uint32_t)sum << room & 0x80000000u)) room++;
    int32_t a = (int32_t)(((uint32_t)sum << room) - 0x80000000u);
    int64_t t = (int64_t)a + INT32_MAX;
    int32_t half = (int32_t)((t + (t >= 0 ? 1 : -1)) / 2), z = 1515870810 + t_high(half, -1010580540);
    for (int32_t i = 0; i < 3; i++) z += t_lshift(t_high(z, (1 << 29) - t_high(half, z)), 2);
    z = t_lshift(z, 1);
    for (int32_t c = 0; c < cols; c++) {
      int32_t d = x[c] - top, v = -128;
      if (d >= least) v = t_shift(t_high(z, t_exp(t_high(d * (1 << sh), mul))), 35 - room) - 128;
      y[c] = t_clamp(v, -128, 127);
    }
  }
}
""",
    "layernorm_s8": r"""
static uint32_t t_sqrt(uint64_t n) {
  if (!n) return 0;
  uint64_t x = n, bits = 0;
  while (x) { x >>= 1; bits++; }
  x = 1ull << ((bits + 1) / 2);
  for (;;) { uint64_t z = (x + n / x) >> 1; if (z >= x) return (uint32_t)x; x = z; }
}
void t_layernorm_s8(const int8_t *x, const int16_t *g, const int32_t *b, int8_t *y, int32_t rows,
                    int32_t cols, int32_t in, int32_t mul, int32_t sh, int32_t out) {
  for (int32_t r = 0; r < rows; r++, x += cols, y += cols) {
    int32_t s = 0, q = 0;
    for (int32_t c = 0; c < cols; c++) { int32_t v = x[c] + in; s += v; q += v * v; }
    uint32_t root = t_sqrt((uint64_t)((int64_t)cols * q - (int64_t)s * s) << 16);
    if (!root) root = 1;
    for (int32_t c = 0; c < cols; c++) {
      int64_t p = ((int64_t)cols * (x[c] + in) - s) * 262144;
      uint64_t u = p < 0 ? -p : p;
      int64_t n = (int64_t)((u + root / 2) / root), a = (p < 0 ? -n : n) * g[c];
      int64_t mask = 32767, rest = a & mask;
      int32_t v = (int32_t)((a >> 15) + (rest > (mask >> 1) + (a < 0))) + b[c];
      y[c] = t_clamp(t_requantize(v, mul, sh) + out, -128, 127);
    }
  }
}
""",
}


def source(names) -> str:
    """The runtime and the named kernels as one C text."""
    return RUNTIME + "".join(KERNELS[n] for n in KERNELS if n in set(names))
