"""Laws of the microcontroller's int8 arithmetic and counts: NumPy and Hypothesis, no pytest."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hw.interpret import run_program
from hw.kernel_counts import CORES, DIMS, instructions
from hw.mcu import calibrate, stm32f746
from hw.mcu_calibrate import FILL
from hw.program import Block, ElementwiseDims, MatmulDims, MoveDims, Op, Program, Tensor
from ref.blocks import int8_ops as ops
from ref.blocks import int16_ops as wide
from ref.blocks.arena import overlaps
from ref.blocks.attention_tiles import attention_tile_bytes, tiled_attention
from ref.blocks.integer import quantize_multiplier, requantize
from ref.blocks.vit_int8 import Product8, Softmax8

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


def codes(rng, *shape):
    return rng.integers(-128, 128, shape)


def exact(acc, multiplier, shift):
    """acc multiplier 2^(shift - 31) with its two roundings, in rational arithmetic."""
    shifted = int(acc) << max(shift, 0)
    high = Fraction(shifted * int(multiplier), 2**31)
    rounded = (abs(high) + Fraction(1, 2)).__floor__() if high < 0 else (high + Fraction(1, 2)).__floor__()
    rounded = -rounded if high < 0 else rounded
    if high < 0 and abs(high) + Fraction(1, 2) == abs(rounded):  # a negative half goes up
        rounded += 1
    last = Fraction(rounded, 2 ** max(-shift, 0))
    size = (abs(last) + Fraction(1, 2)).__floor__()  # halves away from zero
    return size if last >= 0 else -size


@given(seeds, st.integers(1, 6), sizes, st.integers(1, 6))
def law_hw_mcu_products_are_the_definition_in_rationals(seed, m, k, n):
    rng = np.random.default_rng(seed)
    x, w, b = codes(rng, m, k), np.clip(codes(rng, n, k), -127, 127), rng.integers(-5000, 5000, n)
    real = 2.0 ** rng.uniform(-12, -3, n)
    multiplier, shift = quantize_multiplier(real)
    zero, out = int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
    got = ops.matmul_s8(x, w, b, multiplier, shift, input_offset=-zero, output_offset=out)
    for i in range(m):
        for j in range(n):
            acc = sum((int(x[i, c]) - zero) * int(w[j, c]) for c in range(k)) + int(b[j])
            want = min(max(exact(acc, multiplier[j], int(shift[j])) + out, -128), 127)
            assert got[i, j] == want
    one = ops.fully_connected_s8(
        x, w, b, input_offset=-zero, output_offset=out, multiplier=int(multiplier[0]), shift=int(shift[0])
    )
    np.testing.assert_array_equal(one[:, 0], got[:, 0])


@given(seeds, st.integers(1, 5), st.integers(1, 60), st.floats(0.005, 0.4))
def law_hw_mcu_softmax_is_the_rounded_softmax_within_one(seed, rows, cols, scale):
    """The exponential and the reciprocal are good to 2^-20, so a code is off by one at most at a half."""
    x = codes(np.random.default_rng(seed), rows, cols)
    multiplier, shift, least = ops.softmax_params_s8(input_scale=scale)
    got = ops.softmax_s8(x, multiplier=multiplier, shift=shift, diff_min=least).astype(int)
    e = np.exp(scale * (x - x.max(1, keepdims=True)))
    want = np.clip(np.rint(256 * e / e.sum(1, keepdims=True)) - 128, -128, 127)
    assert np.abs(got - want).max() <= 1
    for row, code in zip(x, got, strict=True):  # monotone: a larger logit never gets less
        assert (np.diff(code[np.argsort(row, kind="stable")]) >= 0).all()


@given(seeds, st.integers(1, 5), st.integers(2, 70))
def law_hw_mcu_layernorm_is_within_two_codes(seed, rows, cols):
    """n has 10 fraction bits and a root good to 2^-8 of a code: two codes with the output's rounding."""
    rng = np.random.default_rng(seed)
    x = codes(rng, rows, cols)
    gamma, beta = rng.uniform(-2, 2, cols), rng.uniform(-2, 2, cols)
    q, offset, multiplier, shift = ops.norm_params_s8(gamma, beta, 0.05)
    got = ops.layernorm_s8(x, q, offset, input_offset=5, multiplier=multiplier, shift=shift, output_offset=3)
    std = x.std(1, keepdims=True)
    n = (x - x.mean(1, keepdims=True)) / np.where(std == 0, 1, std)
    want = np.clip((gamma * n + beta) / 0.05 + 3, -128, 127)
    assert np.abs(got - want).max() <= 2


@given(seeds, st.integers(1, 50), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def law_hw_mcu_sums_and_differences_are_within_one_code(seed, n, s1, s2):
    rng = np.random.default_rng(seed)
    a, b, z1, z2 = codes(rng, n), codes(rng, n), int(rng.integers(-99, 99)), int(rng.integers(-99, 99))
    for sign in (1, -1):
        real = s1 * (a - z1) + sign * s2 * (b - z2)
        out = max(np.abs(real).max(), 1e-3) / 127
        m1, e1, m2, e2, mo, eo = ops.add_params_s8(s1, sign * s2, out)
        got = ops.add_s8(a, b, input1_offset=-z1, input1_multiplier=m1, input1_shift=e1, input2_offset=-z2,
                         input2_multiplier=m2, input2_shift=e2, output_offset=0, output_multiplier=mo,
                         output_shift=eo)  # fmt: skip
        assert np.abs(got - real / out).max() <= 0.51  # half a code, and 2^-10 of one from each input


@given(seeds, st.integers(3, 9), st.integers(3, 9), st.integers(1, 3), st.sampled_from(("SAME", "VALID")))
def law_hw_mcu_convolutions_equal_loops(seed, height, width, stride, padding):
    rng = np.random.default_rng(seed)
    x, w, d = codes(rng, height, width, 2), codes(rng, 3, 3, 2, 2), codes(rng, 3, 2, 2)
    kw = {"stride": stride, "padding": padding, "input_offset": 7, "output_offset": -3}
    m, e = quantize_multiplier(0.002)
    full = ops.conv_s8(x, w, np.zeros(3, int), int(m), int(e), **kw)
    deep = ops.depthwise_conv_s8(x, d, None, int(m), int(e), **kw)
    alone = np.stack([d * (np.arange(2) == c) for c in range(2)])  # every channel its own filter
    np.testing.assert_array_equal(deep, ops.conv_s8(x, alone, None, int(m), int(e), **kw))
    count = lambda n, k: -(-n // stride) if padding == "SAME" else (n - k) // stride + 1
    assert full.shape == (count(height, 3), count(width, 2), 3)
    for i in range(full.shape[0]):
        for j in range(full.shape[1]):
            acc = np.zeros(3, int)
            for a in range(3):
                for b in range(2):
                    top = max((full.shape[0] - 1) * stride + 3 - height, 0) // 2 if padding == "SAME" else 0
                    left = max((full.shape[1] - 1) * stride + 2 - width, 0) // 2 if padding == "SAME" else 0
                    y, z = i * stride + a - top, j * stride + b - left
                    if 0 <= y < height and 0 <= z < width:
                        acc += w[:, a, b] @ (x[y, z] + 7)
            assert (full[i, j] == np.clip(requantize(acc, int(m), int(e)) - 3, -128, 127)).all()


@given(seeds)
def law_hw_mcu_a_layer_keeps_30_db(seed):
    """Gaussian data, 64 and more products a sum, a scale for every output channel."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(64, 300))
    x, w = rng.standard_normal((16, k)), rng.standard_normal((12, k)) / np.sqrt(k)
    want = x @ w.T
    affine = lambda a: ((a.max() - a.min()) / 255, int(np.rint(-a.min() / ((a.max() - a.min()) / 255))) - 128)
    (sx, zx), (sy, zy), sw = affine(x), affine(want), np.abs(w).max(1) / 127
    q = np.clip(np.rint(x / sx) + zx, -128, 127).astype(int)
    m, e = quantize_multiplier(sx * sw / sy)
    got = ops.matmul_s8(
        q, np.rint(w / sw[:, None]).astype(int), None, m, e, input_offset=-zx, output_offset=zy
    )
    error = sy * (got.astype(float) - zy) - want
    assert 10 * np.log10((want**2).sum() / (error**2).sum()) >= 30
    zero = ops.matmul_s8(np.full((1, k), zx), np.ones((1, k), int), None, int(m[0]), int(e[0]),
                         input_offset=-zx, output_offset=zy)  # fmt: skip
    assert zero[0, 0] == zy  # zero maps to zero


def exact_wide(acc, multiplier, shift):
    """acc times the multiplier in 16 bits, 2^(shift - 15), to nearest with ties up, in rationals."""
    short = min((Fraction(int(multiplier), 2**16) + Fraction(1, 2)).__floor__(), 2**15 - 1)
    return (int(acc) * short * Fraction(2) ** (int(shift) - 15) + Fraction(1, 2)).__floor__()


def wide_codes(rng, *shape):
    """int16 codes, a quarter of them at the ends."""
    ends = rng.choice([-(2**15), 2**15 - 1], shape)
    return np.where(rng.random(shape) < 0.25, ends, rng.integers(-(2**15), 2**15, shape))


def clamped(y):
    return min(max(y, -(2**15)), 2**15 - 1)


@given(seeds, st.integers(1, 6), sizes, st.integers(1, 6))
def law_hw_mcu_products_of_int16_are_the_definition_in_rationals(seed, m, k, n):
    """Weights of one scale a channel, biases beyond int32, results beyond both ends of int16."""
    rng = np.random.default_rng(seed)
    x, w, b = wide_codes(rng, m, k), codes(rng, n, k), rng.integers(-(2**34), 2**34, n)
    multiplier, shift = quantize_multiplier(2.0 ** rng.uniform(-22, -8, n))
    got = wide.matmul_s16(x, w, b, multiplier, shift)
    assert got.dtype == np.int16
    for i in range(m):
        for j in range(n):
            acc = sum(int(x[i, c]) * int(w[j, c]) for c in range(k)) + int(b[j])
            assert got[i, j] == clamped(exact_wide(acc, multiplier[j], shift[j]))
    one = wide.fully_connected_s16(x, w, b, multiplier=int(multiplier[0]), shift=int(shift[0]))
    np.testing.assert_array_equal(one[:, 0], got[:, 0])
    y = wide_codes(rng, 2, n, k)
    both = wide.batch_matmul_s16(np.stack([x, x]), y, multiplier=int(multiplier[0]), shift=-20)
    for h in range(2):
        for i in range(m):
            for j in range(n):
                acc = sum(int(x[i, c]) * int(y[h, j, c]) for c in range(k))
                assert both[h, i, j] == clamped(exact_wide(acc, multiplier[0], -20))


@given(seeds, st.integers(-31, 7), st.integers(1, 50))
def law_hw_mcu_wide_sums_lose_half_a_code_and_one_part_in_2_15(seed, shift, n):
    """A multiplier of 16 bits is within 1/2 of at least 2^14, or 1 of 2^15 at the top: 2^-15 of it."""
    rng = np.random.default_rng(seed)
    multiplier = rng.integers(2**30, 2**31, n)
    multiplier[0] = 2**31 - 1
    most = min(2.0**46, 2.0 ** (29 - shift))  # twice the result fits int32
    acc = np.rint(rng.uniform(-1, 1, n) * most).astype(np.int64)
    got = wide.requantize_s64(acc, multiplier, shift)
    real = acc * (multiplier / 2.0**31) * 2.0**shift
    assert (np.abs(got - real) <= 0.5 + 2.0**-15 * np.abs(real) * (1 + 2.0**-20)).all()
    assert [int(v) for v in got] == [exact_wide(a, m, shift) for a, m in zip(acc, multiplier, strict=True)]


@given(seeds, st.integers(1, 50), st.floats(1e-4, 1.0), st.floats(1e-4, 1.0))
def law_hw_mcu_sums_and_products_of_int16_are_the_definition_in_rationals(seed, n, s1, s2):
    rng = np.random.default_rng(seed)
    a, b = wide_codes(rng, n), wide_codes(rng, n)
    for sign in (1, -1):
        m1, e1, m2, e2, mo, eo = ops.add_params_s8(s1, sign * s2, max(s1, s2), left_shift=15)
        got = wide.add_s16(a, b, input1_multiplier=m1, input1_shift=e1, input2_multiplier=m2, input2_shift=e2,
                           output_multiplier=mo, output_shift=eo)  # fmt: skip
        for x, y, z in zip(a, b, got, strict=True):
            total = exact(int(x) << 15, m1, e1) + exact(int(y) << 15, m2, e2)
            assert z == clamped(exact(total, mo, eo))
    m, e = (int(v) for v in quantize_multiplier(s1 / 2**14))
    for x, y, z in zip(a, b, wide.mul_s16(a, b, m, e), strict=True):
        assert z == clamped(exact(int(x) * int(y), m, e))


@given(seeds)
def law_hw_mcu_a_layer_with_int16_activations_keeps_80_db(seed):
    """Exact weights: what is lost is the rounding of inputs and outputs, and 2^-15 by the multiplier.

    A range of 5 deviations in 2^15 steps is 87 dB above each rounding, the multiplier 90 dB: 83 dB together.
    """
    rng = np.random.default_rng(seed)
    k = int(rng.integers(64, 300))
    x, w = rng.standard_normal((16, k)), codes(rng, 12, k)
    want = x @ w.T
    sx, sy = (np.abs(a).max() / (2**15 - 1) for a in (x, want))
    m, e = quantize_multiplier(sx / sy)
    got = wide.matmul_s16(np.rint(x / sx).astype(int), w, None, int(m), int(e))
    error = sy * got - want
    assert 10 * np.log10((want**2).sum() / (error**2).sum()) >= 80


@given(seeds, st.integers(1, 50), st.floats(-12, 0))
def law_hw_mcu_quotients_of_int16_are_the_definition_in_rationals(seed, n, log):
    """16 fraction bits to nearest; what leaves 31 bits, and a division by 0, is their end; 0 / 0 is 0."""
    rng = np.random.default_rng(seed)
    a, b = wide_codes(rng, n), wide_codes(rng, n) // rng.choice([1, 2**8, 2**15], n)
    m, e = (int(v) for v in quantize_multiplier(2.0**log * 0.999))
    for x, y, z in zip(a, b, wide.divide_s16(a, b, m, e), strict=True):
        size = (
            (Fraction(abs(int(x)) * 2**16, abs(int(y))) + Fraction(1, 2)).__floor__()
            if y
            else 2**31 * bool(x)
        )
        sign = 1 if (x < 0) == (y < 0) else -1
        assert z == clamped(exact(sign * min(size, 2**31 - 1), m, e))


@given(seeds, st.integers(1, 5), st.integers(1, 60), st.floats(1e-5, 1e-3))
def law_hw_mcu_softmax_of_int16_is_the_softmax_within_its_tables(seed, rows, cols, scale):
    """An exponential is off by 3.5 codes of 2^-15: a chord 0.8, half a step of a difference 1.2, roundings 1,
    and what lies below e^-10 stays there, 1.5 codes; each of them is in the sum of all.
    """
    x = wide_codes(np.random.default_rng(seed), rows, cols)
    m, e = wide.softmax_params_s16(input_scale=scale)
    got = wide.softmax_s16(x, multiplier=m, shift=e).astype(int)
    p = np.exp(scale * (x - x.max(1, keepdims=True)))
    p /= p.sum(1, keepdims=True)
    assert (np.abs(got - 2**15 * p) <= 2 + 3.5 * (1 + cols * p)).all()
    for row, code in zip(x, got, strict=True):
        assert (np.diff(code[np.argsort(row, kind="stable")]) >= 0).all()


@given(seeds, st.floats(1e-5, 2e-3), st.integers(1, 300))
def law_hw_mcu_tables_of_int16_are_lines_between_513_points(seed, scale, n):
    """A chord of a function of curvature c over h leaves c h^2 / 8 of it; roundings of points and results."""
    x = wide_codes(np.random.default_rng(seed), n)
    table = wide.make_lut_s16(np.tanh, -(2**15) * scale, 2**15 * scale)
    got = wide.lut_s16(x, table)
    chord = 0.77 * (128 * scale) ** 2 / 8 * 2**15
    assert (np.abs(got - np.clip(2**15 * np.tanh(scale * x), -(2**15), 2**15 - 1)) <= chord + 2).all()
    np.testing.assert_array_equal(wide.lut_s16(x // 128 * 128, table), table[x // 128 + 256])


@given(seeds, st.integers(1, 5), st.integers(2, 70), st.booleans())
def law_hw_mcu_layernorm_of_int16_is_off_by_its_roundings(seed, rows, cols, center):
    """n by half of 2^-14 and 1 / root of itself, gamma by half of 2^-15, beta and sum by halves of 2^-14."""
    rng = np.random.default_rng(seed)
    x = wide_codes(rng, rows, cols)
    gamma, beta, out = rng.uniform(-2, 2, cols), rng.uniform(-2, 2, cols), 1e-3
    q, offset, m, e = wide.norm_params_s16(gamma, beta, out)
    got = wide.layernorm_s16(x, q, offset, multiplier=m, shift=e, center=center)
    d = x - x.mean(1, keepdims=True) if center else x.astype(float)
    std = np.sqrt((d * d).mean(1, keepdims=True))
    n = np.where(std > 0, d / np.maximum(std, 1e-9), 0)
    g, root = np.abs(gamma).max(), np.maximum(cols * std * 16, 1)
    off = np.abs(gamma) * (2.0**-15 + np.abs(n) / root) + g * (2.0**-15 * np.abs(n) + 2.0**-14)
    want = np.clip((n * gamma + beta) / out, -(2**15), 2**15 - 1)
    assert (np.abs(got - want) <= off / out + 1.5).all()


@given(seeds, st.integers(1, 12), st.integers(1, 6))
def law_hw_mcu_tiles_of_queries_fill_their_closed_form(seed, seq, head_dim):
    """Any x: the same codes as row by row; every byte of the formula is used, and one less does not do."""
    rng = np.random.default_rng(seed)
    q, k, v = (codes(rng, seq, head_dim).astype(np.int8) for _ in range(3))
    scores = Product8(*(int(p) for p in quantize_multiplier(0.01)), 3, -2)
    values = Product8(*(int(p) for p in quantize_multiplier(1 / 256)), 128, 0)
    how = {"scores": scores, "softmax": Softmax8(0.1, "s8"), "values": values}
    rows = [values(how["softmax"](scores(q[i : i + 1], k)), v.T)[0] for i in range(seq)]
    for x in range(1, seq + 1):
        out, arena = tiled_attention(q, k, v, queries=x, **how)
        np.testing.assert_array_equal(out, rows)
        expected = (2 * head_dim + seq) * x + 2 * head_dim * seq
        assert expected == attention_tile_bytes(head_dim, seq, x)
        assert expected == arena.most == arena.high == arena.size
        message = ""
        try:
            tiled_attention(q, k, v, queries=x, size=expected - 1, **how)
        except MemoryError as why:
            message = str(why)
        assert "lacks 1 for" in message


@given(st.sampled_from(sorted(DIMS)), st.lists(st.integers(2, 60), min_size=5, max_size=5), st.integers(0, 4))
def law_hw_mcu_instructions_grow_with_every_size(kernel, sizes, axis):
    """Along whole steps of the loops (an odd row or a tail of K may cost more than the next even one)."""
    names = DIMS[kernel]
    dims = {n: 16 * s for n, s in zip(names, sizes, strict=False)}
    more = dims | {names[axis % len(names)]: dims[names[axis % len(names)]] + 48}
    for core in CORES:
        for profile in ("cmsis_nn", "emitted", "tinyengine", "tflm_ref"):
            assert instructions(kernel, more, core, profile=profile) > instructions(
                kernel, dims, core, profile=profile
            )
    if kernel in ("fully_connected_s8", "matmul_s8"):
        assert instructions(kernel, dims, "cortex_m3") > instructions(kernel, dims, "cortex_m7")


def random_program(rng, steps):
    """A graph of products with weights, tables, sums, products and transposes on [n, n] values; all unused
    values are results.
    """
    n = int(rng.integers(2, 7))
    tensors, made, program_ops = {0: Tensor(0, (n, n), "float32", "input", "x")}, [0], []

    def new(role="activation", data=None):
        i = len(tensors)
        tensors[i] = Tensor(i, (n, n), "float32", role, data=data)
        return i

    for _ in range(steps):
        kind = rng.choice(["tanh", "add", "sub", "mul", "dot_general", "transpose", "weight"])
        a, b = (int(v) for v in rng.choice(made[-4:], 2))
        attrs, dims = {}, ElementwiseDims(n * n, 1, "add")
        inputs = (a, b)
        if kind == "tanh":
            inputs, dims = (a,), ElementwiseDims(n * n, 1, "transcendental")
        elif kind == "transpose":
            inputs, attrs, dims = (a,), {"permutation": (1, 0)}, MoveDims(n * n, n * n)
        elif kind in ("dot_general", "weight"):
            if kind == "weight" or a == b:
                b = new("const", (rng.standard_normal((n, n)) / n).astype(np.float32).tobytes())
            inputs, attrs = (a, b), {"dimension_numbers": (((1,), (0,)), ((), ()))}
            dims, kind = MatmulDims(1, n, n, n), "dot_general"
        out = new()
        family = {"dot_general": "matmul", "transpose": "move"}.get(str(kind), "elementwise")
        program_ops.append(Op(len(program_ops), family, str(kind), inputs, (out,), dims, attrs=attrs))
        made.append(out)
    read = {i for op in program_ops for i in op.inputs}
    outs = tuple(i for i in made[1:] if i not in read)
    names = tuple(f"[{i}]" for i in range(len(outs))) if len(outs) > 1 else ("result",)
    return Program("graph", tensors, Block((0,), tuple(program_ops), outs), ("x",), names, ("x",))


@settings(max_examples=40)
@given(seeds, st.integers(1, 14), st.tuples(*[st.booleans()] * 4))
def law_hw_mcu_plans_run_in_their_arena(seed, steps, on):
    """Any graph, any switches: sound, never above greedy by size without them, and no dead byte is read."""
    rng = np.random.default_rng(seed)
    program = random_program(rng, steps)
    switches = dict(zip(("integrate", "decompose_patch", "overwrite", "reorder"), on, strict=True))
    args = (rng.standard_normal(program.tensors[0].shape).astype(np.float32),)
    plain = stm32f746(**dict.fromkeys(switches, False)).memory(program)
    target = stm32f746(**switches).prepared(program, args)
    plan = target.memory(program)
    assert not overlaps(plan.arena)
    assert plan.bound <= plan.total <= plain.total
    want, _ = run_program(program, args, policy=target.formats)
    got, ran = target.run_arena(program, args)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert -(-max(ran.touched.values()) // 16) * 16 == plan.total


@given(seeds, st.integers(1, 6))
def law_hw_mcu_codes_cover_what_calibration_saw(seed, steps):
    """Every value of a run is within half a step of its code, and 0 is a code."""
    rng = np.random.default_rng(seed)
    program = random_program(rng, steps)
    args = (rng.standard_normal(program.tensors[0].shape).astype(np.float32),)
    plan = calibrate(program, [args])
    _, seen = run_program(program, args, per_op=True)
    for record in seen.records:
        for o, x in zip(record.op.outputs, record.outputs, strict=True):
            scale, zero = plan.scales[o]
            x = np.asarray(x, np.float64)
            x = x[np.abs(x) < FILL]  # what is larger is a mask's fill
            code = np.clip(np.rint(x / scale) + zero, -128, 127)
            assert np.abs(x - scale * (code - zero)).max(initial=0.0) <= 0.5 * scale * (1 + 1e-6)
            assert -128 <= zero <= 127
