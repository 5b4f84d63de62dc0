"""The project's C kernels (hw_mcu), compiled for this computer, equal the reference bit for bit."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from hw.mcu_c import KERNELS
from hw.mcu_c16 import KERNELS_S16, source
from ref.blocks import int8_ops as ops
from ref.blocks import int16_ops as wide
from ref.blocks.integer import quantize_multiplier, requantize

CC = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    d = tmp_path_factory.mktemp("c")
    (d / "k.c").write_text(source([*KERNELS, *KERNELS_S16]))
    subprocess.run(
        [CC, "-O2", "-fwrapv", "-Wall", "-Werror", "-Wno-unused-function", "-shared", "-fPIC", str(d / "k.c"),
         "-o", str(d / "k.so")], check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(d / "k.so"))


def call(fn, *args):
    """Arrays as pointers (kept alive by the caller), integers as int32."""
    fn(*(a.ctypes.data_as(ctypes.c_void_p) if hasattr(a, "ctypes") else ctypes.c_int32(int(a)) for a in args))


@pytest.mark.parametrize("seed", range(6))
def test_hw_mcu_c_kernels_equal_the_reference(library, seed):
    rng = np.random.default_rng(seed)
    m, k, n = (int(v) for v in rng.integers(1, 40, 3))
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((m, k), (n, k)))
    b = rng.integers(-3000, 3000, n).astype(np.int32)
    mul, sh = quantize_multiplier(2.0 ** rng.uniform(-11, -4, n))
    y = np.empty((m, n), np.int8)
    call(library.t_matmul_s8, x, w, b, mul, sh, y, m, k, n, 9, -4, -128, 127)
    np.testing.assert_array_equal(y, ops.matmul_s8(x, w, b, mul, sh, input_offset=9, output_offset=-4))
    call(library.t_product_s8, x, w, y, m, k, n, -9, 5, mul[0], sh[0], 2)
    acc = (x.astype(int) + 9) @ (w.astype(int) - 5).T
    want = np.clip(requantize(acc, int(mul[0]), int(sh[0])) + 2, -128, 127)
    np.testing.assert_array_equal(y, want)

    a, c, z = x.ravel(), rng.integers(-128, 128, m * k).astype(np.int8), np.empty(m * k, np.int8)
    m1, e1, m2, e2, mo, eo = ops.add_params_s8(0.03, -0.05, 0.06)
    call(library.t_add_s8, a, 1, c, 1, z, a.size, 3, m1, e1, -20, m2, e2, 20, 1, mo, eo, -128, 127)
    want = ops.add_s8(a, c, input1_offset=3, input1_multiplier=m1, input1_shift=e1, input2_offset=-20,
                      input2_multiplier=m2, input2_shift=e2, output_offset=1, output_multiplier=mo,
                      output_shift=eo)  # fmt: skip
    np.testing.assert_array_equal(z, want)
    call(library.t_mul_s8, a, 1, c, 1, z, a.size, 3, -20, mul[0], sh[0], 1)
    want = ops.mul_s8(a, c, int(mul[0]), int(sh[0]), input1_offset=3, input2_offset=-20, output_offset=1)
    np.testing.assert_array_equal(z, want)
    call(library.t_divide_s8, a, 1, c, 1, z, a.size, -3, 20, mul[0], -11, 1)
    want = ops.divide_s8(a, c, int(mul[0]), -11, input1_offset=3, input2_offset=-20, output_offset=1)
    np.testing.assert_array_equal(z, want)
    call(library.t_rescale_s8, a, z, a.size, 3, mul[0], -1, 1)
    np.testing.assert_array_equal(z, ops.rescale_s8(a, int(mul[0]), -1, input_offset=3, output_offset=1))
    table = ops.make_lut_s8(np.tanh, 0.05, 3, 1 / 128, 0)
    call(library.t_lut_s8, a, table, z, a.size)
    np.testing.assert_array_equal(z, ops.lut_s8(a, table))

    rows = np.empty((m, k), np.int8)
    multiplier, shift, least = ops.softmax_params_s8(input_scale=float(rng.uniform(0.01, 0.3)))
    call(library.t_softmax_s8, x, rows, m, k, multiplier, shift, least)
    np.testing.assert_array_equal(rows, ops.softmax_s8(x, multiplier=multiplier, shift=shift, diff_min=least))
    g, o, nm, ns = ops.norm_params_s8(rng.uniform(-2, 2, k), rng.uniform(-2, 2, k), 0.04)
    for center in (True, False):
        call(library.t_layernorm_s8, x, g, o, rows, m, k, 5, nm, ns, 3, center)
        want = ops.layernorm_s8(
            x, g, o, input_offset=5, multiplier=nm, shift=ns, output_offset=3, center=center
        )
        np.testing.assert_array_equal(rows, want)

    sums = np.empty(m, np.int8)
    call(library.t_reduce_sum_s8, x, sums, m, k, 4, mul[0], sh[0], 1)
    want = np.clip(requantize((x.astype(int) + 4).sum(1), int(mul[0]), int(sh[0])) + 1, -128, 127)
    np.testing.assert_array_equal(sums, want)
    for flip, best in ((0, x.max(1)), (-1, x.min(1))):
        call(library.t_reduce_max_s8, x, sums, m, k, flip)
        np.testing.assert_array_equal(sums, best)
    size, step = np.array([1, 1, k, m], np.int32), np.array([0, 0, 1, k], np.int32)
    turned = np.empty((k, m), np.int8)
    call(library.t_move_s8, x, turned, size, step, 0)
    np.testing.assert_array_equal(turned, x.T)


@pytest.mark.parametrize("seed", range(4))
def test_hw_mcu_c_convolutions_equal_the_reference(library, seed):
    """Padded at any edge, strided, dense and depthwise; the general kernel gives what the plain one does."""
    rng = np.random.default_rng(seed)
    (H, W, C, N), e, stride = rng.integers(3, 9, 4), int(rng.integers(1, 4)), int(rng.integers(1, 3))
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((H, W, C), (N, e, e, C)))
    b = rng.integers(-3000, 3000, N).astype(np.int32)
    mul, sh = quantize_multiplier(2.0 ** rng.uniform(-11, -4, N))
    rest = {"stride": stride, "input_offset": 9, "output_offset": -4}
    want = ops.conv_s8(x, w, b, mul, sh, **rest)
    Ho, Wo = want.shape[:2]
    before = [max((o - 1) * stride + e - n, 0) // 2 for o, n in ((Ho, H), (Wo, W))]
    d = [H, W, C, Ho, Wo, N, e, e, stride, stride, *before]
    any_way = [1, 1, N, W * C, C, 1, Wo * N, N, 1]  # dilations, channels a group, steps of x and of y
    y = np.empty(want.shape, np.int8)
    for kernel, numbers in ((library.t_conv_s8, d), (library.t_group_conv_s8, d + any_way)):
        call(kernel, x, w, b, mul, sh, y, np.array(numbers, np.int32), 9, -4)
        np.testing.assert_array_equal(y, want)
    own = rng.integers(-128, 128, (e, e, C)).astype(np.int8)
    mul, sh = quantize_multiplier(2.0 ** rng.uniform(-9, -4, C))
    want = ops.depthwise_conv_s8(x, own, None, mul, sh, **rest)
    turned = np.ascontiguousarray(own.transpose(2, 0, 1))
    numbers = [*d[:2], 1, Ho, Wo, C, *d[6:], 1, 1, 1, W * C, C, 1, Wo * C, C, 1]
    y, numbers = np.empty(want.shape, np.int8), np.array(numbers, np.int32)
    no_bias = np.zeros(C, np.int32)
    call(library.t_group_conv_s8, x, turned, no_bias, mul, sh, y, numbers, 9, -4)
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("seed", range(4))
def test_hw_mcu_c_kernels_of_int16_equal_the_reference(library, seed):
    rng = np.random.default_rng(seed)
    m, k, n = (int(v) for v in rng.integers(1, 40, 3))
    draw = lambda *s: rng.integers(-(2**15), 2**15, s).astype(np.int16)
    x, w, b = draw(m, k), rng.integers(-128, 128, (n, k)).astype(np.int8), rng.integers(-(2**33), 2**33, n)
    mul, sh = quantize_multiplier(2.0 ** rng.uniform(-20, -10, n))
    short, y = wide.reduce_multiplier(mul), np.empty((m, n), np.int16)
    call(library.t_matmul_s16, x, w, b.astype(np.int64), short, sh, y, m, k, n, 0, 0, -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(y, wide.matmul_s16(x, w, b, mul, sh))
    v = draw(n, k)
    call(library.t_product_s16, x, v, y, m, k, n, 0, 0, short[0], -20, 0)
    np.testing.assert_array_equal(y, wide.batch_matmul_s16(x, v, multiplier=int(mul[0]), shift=-20))

    a, c, z = (
        x.ravel(),
        draw(m * k) // rng.choice([1, 2**12], m * k).astype(np.int16),
        np.empty(m * k, np.int16),
    )
    one = int(mul[0]), -3
    for kernel, fn in ((library.t_mul_s16, wide.mul_s16), (library.t_divide_s16, wide.divide_s16)):
        call(kernel, a, 1, c, 1, z, a.size, 0, 0, *one, 0)
        np.testing.assert_array_equal(z, fn(a, c, *one))
    params = ops.add_params_s8(0.03, -0.05, 0.06, left_shift=15)
    call(library.t_add_s16, a, 1, c, 1, z, a.size, 0, *params[:2], 0, *params[2:4], 15, 0, *params[4:],
         -(2**15), 2**15 - 1)  # fmt: skip
    named = dict(zip(("input1_multiplier", "input1_shift", "input2_multiplier", "input2_shift",
                      "output_multiplier", "output_shift"), params, strict=True))  # fmt: skip
    np.testing.assert_array_equal(z, wide.add_s16(a, c, **named))
    table = wide.make_lut_s16(np.tanh, -3.0, 3.0)
    call(library.t_lut_s16, a, table, z, a.size)
    np.testing.assert_array_equal(z, wide.lut_s16(a, table))

    rows = np.empty((m, k), np.int16)
    multiplier, shift = wide.softmax_params_s16(input_scale=float(rng.uniform(1e-5, 1e-3)))
    tables = wide.softmax_tables_s16()
    call(library.t_softmax_s16, x, rows, m, k, multiplier, shift, *tables)
    np.testing.assert_array_equal(rows, wide.softmax_s16(x, multiplier=multiplier, shift=shift))
    g, o, nm, ns = wide.norm_params_s16(rng.uniform(-2, 2, k), rng.uniform(-2, 2, k), 1e-3)
    for center in (True, False):
        call(library.t_layernorm_s16, x, g, o, rows, m, k, 0, nm, ns, 0, center)
        np.testing.assert_array_equal(
            rows, wide.layernorm_s16(x, g, o, multiplier=nm, shift=ns, center=center)
        )
