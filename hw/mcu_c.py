"""The int8 operators of `ref.blocks.int8_ops` as C for a bare core: what a planned network is emitted with.

Plain C99, no library but <stdint.h>, one function per operator, int32 sums, 64-bit products. Their retired
instructions are counted in an emulator by `tests/claims/hw_mcu_counts.py`; their results equal the reference
bit for bit.
"""

RUNTIME = r"""
#include <stdint.h>
#define T_ONE_LOOP(p) __asm__("" : "+r"(p)) /* hides steps: no copies of a loop for steps of 1 */
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
      const int8_t *p = x + m * K;
      const int8_t *q = w + n * K;
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
      const int8_t *p = x + m * K;
      const int8_t *q = w + n * K;
      int32_t acc = 0;
      for (int32_t k = 0; k < K; k++) acc += (p[k] - xz) * (q[k] - wz);
      y[m * N + n] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
    }
}
""",
    "add_s8": r"""
void t_add_s8(const int8_t *a, int32_t da, const int8_t *b, int32_t db, int8_t *y, int32_t n, int32_t oa,
              int32_t ma, int32_t sa, int32_t ob, int32_t mb, int32_t sb, int32_t left, int32_t out,
              int32_t mo, int32_t so, int32_t lo, int32_t hi) {
  for (int32_t i = 0; i < n; i++, a += da, b += db) {
    int32_t t = t_requantize((*a + oa) * (1 << left), ma, sa);
    t += t_requantize((*b + ob) * (1 << left), mb, sb);
    y[i] = t_clamp(t_requantize(t, mo, so) + out, lo, hi);
  }
}
""",
    "mul_s8": r"""
void t_mul_s8(const int8_t *a, int32_t da, const int8_t *b, int32_t db, int8_t *y, int32_t n, int32_t oa,
              int32_t ob, int32_t mul, int32_t sh, int32_t out) {
  for (int32_t i = 0; i < n; i++, a += da, b += db)
    y[i] = t_clamp(t_requantize((*a + oa) * (*b + ob), mul, sh) + out, -128, 127);
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
void t_divide_s8(const int8_t *a, int32_t da, const int8_t *b, int32_t db, int8_t *y, int32_t n, int32_t za,
                 int32_t zb, int32_t mul, int32_t sh, int32_t out) {
  for (int32_t i = 0; i < n; i++, a += da, b += db) {
    int32_t p = (*a - za) * 65536, q = *b - zb, s = (p < 0) == (q < 0) ? 1 : -1, r;
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
void t_reduce_max_s8(const int8_t *x, int8_t *y, int32_t rows, int32_t cols, int32_t flip) {
  /* flip -1: the least, since ~x turns the order of codes around */
  for (int32_t r = 0; r < rows; r++) {
    int32_t best = -128;
    for (int32_t c = 0; c < cols; c++, x++) best = (*x ^ flip) > best ? (*x ^ flip) : best;
    y[r] = (int8_t)(best ^ flip);
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
    "product_any_s8": r"""
void t_product_any_s8(const int8_t *x, const int8_t *w, int8_t *y, int32_t M, int32_t K, int32_t N,
                      const int32_t *step, int32_t xz, int32_t wz, int32_t mul, int32_t sh, int32_t out) {
  /* as t_product_s8 however operands lie; step: of x along m, k, of w along n, k, of y along m, n */
  for (int32_t m = 0; m < M; m++)
    for (int32_t n = 0; n < N; n++) {
      const int8_t *p = x + m * step[0];
      const int8_t *q = w + n * step[2];
      int32_t acc = 0;
      int32_t a = step[1], b = step[3];
      for (int32_t k = 0; k < K; k++, p += a, q += b) {
        T_ONE_LOOP(p);
        T_ONE_LOOP(q);
        acc += (*p - xz) * (*q - wz);
      }
      y[m * step[4] + n * step[5]] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
    }
}
""",
    "matmul_any_s8": r"""
void t_matmul_any_s8(const int8_t *x, const int8_t *w, const int32_t *b, const int32_t *mul,
                     const int32_t *sh, int8_t *y, int32_t M, int32_t K, int32_t N, const int32_t *step,
                     int32_t in, int32_t out) {
  /* as t_matmul_s8 however operands lie; step: of x along m, k, of y along m, n */
  for (int32_t m = 0; m < M; m++)
    for (int32_t n = 0; n < N; n++) {
      const int8_t *p = x + m * step[0];
      const int8_t *q = w + n * K;
      int32_t acc = b ? b[n] : 0;
      int32_t a = step[1];
      for (int32_t k = 0; k < K; k++, p += a) {
        T_ONE_LOOP(p);
        acc += (*p + in) * q[k];
      }
      y[m * step[2] + n * step[3]] = t_clamp(t_requantize(acc, mul[n], sh[n]) + out, -128, 127);
    }
}
""",
    "conv_s8": r"""
void t_conv_s8(const int8_t *x, const int8_t *w, const int32_t *b, const int32_t *mul, const int32_t *sh,
               int8_t *y, const int32_t *d, int32_t in, int32_t out) {
  /* x [H, W, C], w [N, kh, kw, C]; d: H, W, C, rows and columns of y, N, kh, kw, strides, padding before */
  int32_t H = d[0], W = d[1], C = d[2], N = d[5], kh = d[6], kw = d[7];
  for (int32_t i = 0; i < d[3]; i++)
    for (int32_t j = 0; j < d[4]; j++) {
      int32_t top = i * d[8] - d[10], left = j * d[9] - d[11];
      int32_t a = top < 0 ? -top : 0, e = top + kh > H ? H - top : kh;
      int32_t c = left < 0 ? -left : 0, n = ((left + kw > W ? W - left : kw) - c) * C;
      for (int32_t o = 0; o < N; o++) {
        int32_t acc = b ? b[o] : 0;
        for (int32_t r = a; r < e; r++) {
          const int8_t *p = x + ((top + r) * W + left + c) * C;
          const int8_t *q = w + ((o * kh + r) * kw + c) * C;
          for (int32_t k = 0; k < n; k++) acc += (p[k] + in) * q[k];
        }
        *y++ = t_clamp(t_requantize(acc, mul[o], sh[o]) + out, -128, 127);
      }
    }
}
""",
    "group_conv_s8": r"""
void t_group_conv_s8(const int8_t *x, const int8_t *w, const int32_t *b, const int32_t *mul,
                     const int32_t *sh, int8_t *y, const int32_t *d, int32_t in, int32_t out) {
  /* w [N, kh, kw, C] with C channels of a group; d as above, then dilations, channels of y a group, steps of
     x along rows, columns, channels, and of y along rows, columns, channels */
  for (int32_t i = 0; i < d[3]; i++)
    for (int32_t j = 0; j < d[4]; j++) {
      int32_t top = i * d[8] - d[10], left = j * d[9] - d[11];
      const int8_t *q = w;
      for (int32_t o = 0; o < d[5]; o++) {
        const int8_t *g = x + o / d[14] * d[2] * d[17];
        int32_t acc = b ? b[o] : 0;
        for (int32_t r = 0; r < d[6]; r++) {
          int32_t u = top + r * d[12];
          if (u < 0 || u >= d[0]) { q += d[7] * d[2]; continue; }
          for (int32_t s = 0; s < d[7]; s++) {
            int32_t v = left + s * d[13];
            if (v < 0 || v >= d[1]) { q += d[2]; continue; }
            const int8_t *p = g + u * d[15] + v * d[16];
            for (int32_t k = 0; k < d[2]; k++, p += d[17]) acc += (*p + in) * *q++;
          }
        }
        y[i * d[18] + j * d[19] + o * d[20]] =
            t_clamp(t_requantize(acc, mul[o], sh[o]) + out, -128, 127);
      }
    }
}
""",
    "window_max_s8": r"""
void t_window_max_s8(const int8_t *x, int8_t *y, const int32_t *d, int32_t flip) {
  /* x [A, B, C]; d: A, B, C, rows and columns of y, window, strides, padding before, dilations */
  for (int32_t i = 0; i < d[3]; i++)
    for (int32_t j = 0; j < d[4]; j++)
      for (int32_t c = 0; c < d[2]; c++) {
        int32_t best = -128;
        for (int32_t r = 0, u = i * d[7] - d[9]; r < d[5]; r++, u += d[11]) {
          if (u < 0 || u >= d[0]) continue;
          for (int32_t s = 0, v = j * d[8] - d[10]; s < d[6]; s++, v += d[12]) {
            if (v < 0 || v >= d[1]) continue;
            int32_t z = x[(u * d[1] + v) * d[2] + c] ^ flip;
            best = z > best ? z : best;
          }
        }
        *y++ = (int8_t)(best ^ flip);
      }
}
""",
    "window_sum_s8": r"""
void t_window_sum_s8(const int8_t *x, int8_t *y, const int32_t *d, int32_t in, int32_t mul, int32_t sh,
                     int32_t out) {
  for (int32_t i = 0; i < d[3]; i++)
    for (int32_t j = 0; j < d[4]; j++)
      for (int32_t c = 0; c < d[2]; c++) {
        int32_t acc = 0;
        for (int32_t r = 0, u = i * d[7] - d[9]; r < d[5]; r++, u += d[11]) {
          if (u < 0 || u >= d[0]) continue;
          for (int32_t s = 0, v = j * d[8] - d[10]; s < d[6]; s++, v += d[12])
            if (v >= 0 && v < d[1]) acc += x[(u * d[1] + v) * d[2] + c] + in;
        }
        *y++ = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
      }
}
""",
    "sum_down_s8": r"""
void t_sum_down_s8(const int8_t *x, int8_t *y, int32_t rows, int32_t cols, int32_t in, int32_t mul,
                   int32_t sh, int32_t out) {
  /* sums of the `rows` columns, each over cols entries */
  for (int32_t i = 0; i < rows; i++) {
    int32_t acc = 0;
    for (int32_t r = 0; r < cols; r++) acc += x[r * rows + i] + in;
    y[i] = t_clamp(t_requantize(acc, mul, sh) + out, -128, 127);
  }
}
""",
    "extreme_s8": r"""
void t_extreme_s8(const int8_t *a, int32_t da, const int8_t *b, int32_t db, int8_t *y, int32_t n, int32_t oa,
                  int32_t ma, int32_t sa, int32_t ob, int32_t mb, int32_t sb, int32_t out, int32_t flip) {
  for (int32_t i = 0; i < n; i++, a += da, b += db) {
    int32_t p = t_clamp(t_requantize(*a + oa, ma, sa) + out, -128, 127) ^ flip;
    int32_t q = t_clamp(t_requantize(*b + ob, mb, sb) + out, -128, 127) ^ flip;
    y[i] = (int8_t)((p > q ? p : q) ^ flip);
  }
}
""",
    "select_s8": r"""
void t_select_s8(const uint8_t *m, int32_t dm, const int8_t *a, int32_t da, const int8_t *b, int32_t db,
                 int8_t *y, int32_t n, int32_t oa, int32_t ma, int32_t sa, int32_t ob, int32_t mb, int32_t sb,
                 int32_t out) {
  /* b where m, else a, on the scale of y */
  for (int32_t i = 0; i < n; i++, m += dm, a += da, b += db) {
    int32_t v = *m ? t_requantize(*b + ob, mb, sb) : t_requantize(*a + oa, ma, sa);
    y[i] = t_clamp(v + out, -128, 127);
  }
}
""",
    "fill_s8": r"""
void t_fill_s8(int8_t *y, int32_t n, int32_t v) {
  for (int32_t i = 0; i < n; i++) y[i] = (int8_t)v;
}
""",
    "place_s8": r"""
void t_place_s8(const int8_t *x, int8_t *y, const int32_t *size, const int32_t *step, int32_t base) {
  /* x in order into a view of four axes of y */
  for (int32_t a = 0; a < size[0]; a++)
    for (int32_t b = 0; b < size[1]; b++)
      for (int32_t c = 0; c < size[2]; c++) {
        int8_t *p = y + base + a * step[0] + b * step[1] + c * step[2];
        for (int32_t d = 0; d < size[3]; d++, p += step[3]) *p = *x++;
      }
}
""",
    "take_s8": r"""
void t_take_s8(const int8_t *x, int8_t *y, const int32_t *at, int32_t rows, int32_t cols) {
  /* pieces of cols codes, from where `at` says */
  for (int32_t r = 0; r < rows; r++) {
    const int8_t *p = x + at[r];
    for (int32_t c = 0; c < cols; c++) *y++ = *p++;
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
                    int32_t cols, int32_t in, int32_t mul, int32_t sh, int32_t out, int32_t center) {
  /* center 0: without the mean, an RMS norm */
  for (int32_t r = 0; r < rows; r++, x += cols, y += cols) {
    int32_t s = 0, q = 0;
    for (int32_t c = 0; c < cols; c++) { int32_t v = x[c] + in; s += v; q += v * v; }
    s *= center;
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
