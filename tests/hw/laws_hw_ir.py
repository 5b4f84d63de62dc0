"""Laws of the op program that need no JAX: grid traffic, number formats, memory plans, counts of records."""

import itertools
from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hw.count import count
from hw.formats import BF16, FP16, Fixed, Float, FormatPolicy, Int8Affine
from hw.interpret import run_program
from hw.liveness import liveness, peak_bytes, reorder_for_memory
from hw.program import Block, ElementwiseDims, MatmulDims, Op, Program, Tensor
from hw.traffic import GridOperand, closed_form, grid_traffic, projection

seeds = st.integers(0, 2**32 - 1)


@st.composite
def projections(draw):
    """(grid, map as grid axes or constants, block, array): the map copies grid axes, in any order."""
    grid = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    axes = draw(st.lists(st.integers(-1, len(grid) - 1), min_size=1, max_size=3))
    block = tuple(draw(st.integers(1, 5)) for _ in axes)
    extent = [grid[a] if a >= 0 else 1 for a in axes]
    array = tuple(max(1, n * b - draw(st.integers(0, b - 1))) for n, b in zip(extent, block, strict=True))
    return grid, tuple(axes), block, array


@given(projections())
def law_hw_ir_grid_walk_equals_the_closed_form(case):
    """Fetches = extents up to the innermost axis that the map depends on; bytes clipped at the edges."""
    grid, axes, block, array = case
    at = lambda *s: tuple(s[a] if a >= 0 else 0 for a in axes)
    walked = grid_traffic(grid, [GridOperand(at, block, array, 4)])
    found = projection(grid, at, len(block))
    fetches, elements = closed_form(grid, found, block, array)
    assert (walked.fetches, walked.bytes) == ([fetches], [4 * elements])
    used = [a for a in axes if a >= 0 and grid[a] > 1]
    assert fetches == (prod(grid[: max(used) + 1]) if used else 1)
    before, moved = None, 0  # the definition, step by step
    for s in itertools.product(*(range(n) for n in grid)):
        if at(*s) != before:
            before = at(*s)
            moved += prod(min(b, n - i * b) for i, b, n in zip(before, block, array, strict=True))
    assert moved == elements


@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.integers(1, 16)] * 3))
def law_hw_ir_blocked_products_move_at_least_their_operands(sizes, blocks):
    (m, n, k), (bm, bn, bk) = sizes, blocks
    grid = tuple(-(-s // b) for s, b in zip((m, n, k), (bm, bn, bk), strict=True))
    operands = [
        GridOperand(lambda i, j, l: (i, l), (bm, bk), (m, k), 4),
        GridOperand(lambda i, j, l: (l, j), (bk, bn), (k, n), 4),
        GridOperand(lambda i, j, l: (i, j), (bm, bn), (m, n), 4, output=True),
    ]
    t = grid_traffic(grid, operands)
    assert all(b >= 4 * s for b, s in zip(t.bytes, (m * k, k * n, m * n), strict=True))
    assert t.bytes[2] == 4 * m * n


def law_hw_ir_traffic_of_the_card():
    """x [64, 64] in (32, 16), w [64, 24] in (16, 8), o in (32, 8), grid (2, 3, 4)."""
    operands = [
        GridOperand(lambda i, j, l: (i, l), (32, 16), (64, 64), 4),
        GridOperand(lambda i, j, l: (l, j), (16, 8), (64, 24), 4),
        GridOperand(lambda i, j, l: (i, j), (32, 8), (64, 24), 4, output=True),
    ]
    t = grid_traffic((2, 3, 4), operands)
    assert t.fetches == [24, 24, 6]
    assert sum(t.bytes) == 24 * 2048 + 24 * 512 + 6 * 1024 == 67_584
    operand = GridOperand(lambda i, j, l: (i, j), (1, 1), (10**4, 10**4), 1)
    huge = grid_traffic((10**4, 10**4, 10**4), [operand])
    assert huge.fetches == [10**8]  # in closed form: nobody walks 10^12 steps


FORMATS = (
    Float(), BF16, FP16, Fixed(16, 4), Fixed(12, 3, "RND", "SAT"), Fixed(8, 2, "RND_CONV", "SAT"),
    Int8Affine(0.05, 3), Int8Affine(0.5, 0, 4),
)  # fmt: skip


@given(seeds, st.sampled_from(FORMATS))
def law_hw_ir_rounding_is_a_projection_within_a_step(seed, f):
    """Rounding twice is rounding once; in range the error is half a step, a whole one if bits are cut off."""
    x = np.random.default_rng(seed).uniform(-1.5, 1.5, 50)
    y = f.round(x)
    np.testing.assert_array_equal(f.round(y), y)
    np.testing.assert_array_equal(f.dequantise(f.quantise(y)), y)
    if isinstance(f, Float):
        room = np.abs(x) * 2.0 ** -{"float32": 24, "bfloat16": 8, "float16": 11}[f.dtype] + 2.0**-25
    else:
        room = f.step * (1 if getattr(f, "quant", "") == "TRN" else 0.5) + 1e-12
        inside = (x >= f.dequantise(f.least)) & (x <= f.dequantise(f.most))
        x, y = x[inside], y[inside]
    assert np.all(np.abs(x - y) <= room)


@given(seeds)
def law_hw_ir_dots_of_integer_formats_are_exact(seed):
    """Codes multiplied and added as Python integers, rounded once into the result's format."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-2, 2, (3, 7)), rng.uniform(-2, 2, (7, 2))
    for f, g, out in (
        (Fixed(16, 4), Fixed(12, 3), Fixed(18, 6)),
        (Fixed(32, 10), Fixed(30, 4), Fixed(32, 10)),
        (Int8Affine(0.02, -4), Int8Affine(0.03, 0), Int8Affine(0.1, 7)),
    ):
        x, w = f.quantise(a), g.quantise(b)
        exact = np.zeros((3, 2), object)
        for i, j, k in itertools.product(range(3), range(2), range(7)):
            exact[i, j] += (int(x[i, k]) - getattr(f, "zero_point", 0)) * (
                int(w[k, j]) - getattr(g, "zero_point", 0)
            )
        if isinstance(f, Fixed):
            frac = (f.width - f.integer) + (g.width - g.integer)
            drop = frac - (out.width - out.integer)
            want = exact >> drop if drop >= 0 else exact << -drop  # TRN floors
            want = (want + (1 << out.width - 1)) % (1 << out.width) - (1 << out.width - 1)
        else:
            real = exact.astype(float) * (f.scale * g.scale)
            want = np.clip(np.rint(real / out.scale) + out.zero_point, -128, 127)
        np.testing.assert_array_equal(f.dot(x, w, g, out), want.astype(np.int64))
        np.testing.assert_array_equal(f.add(x, x, f, out), out.quantise(2 * f.dequantise(x)))
        np.testing.assert_array_equal(f.mul(x, x, f, out), out.quantise(f.dequantise(x) ** 2))


def law_hw_ir_tables_are_their_functions():
    """A function by a table of all codes is the function, code by code."""
    for f in (Int8Affine(0.04, 5), Fixed(10, 3)):
        out = Int8Affine(1 / 256, -128)
        codes = np.arange(f.least, f.most + 1)
        by_table = f.unary(np.tanh, codes, out, table=f.table(np.tanh, out))
        np.testing.assert_array_equal(by_table, f.unary(np.tanh, codes, out))


# Programs made of records alone


@st.composite
def graphs(draw, most=7):
    """A program of sums of two earlier values of various sizes; the last one is returned."""
    n_in, n_ops = draw(st.integers(1, 3)), draw(st.integers(1, most))
    tensors = {i: Tensor(i, (draw(st.integers(1, 64)),), "float32", "input") for i in range(n_in)}
    ops = []
    for n in range(n_ops):
        args = tuple(draw(st.integers(0, n_in + n - 1)) for _ in range(2))
        out = n_in + n
        role = "output" if n == n_ops - 1 else "activation"
        tensors[out] = Tensor(out, (draw(st.integers(1, 64)),), "float32", role, producer=n)
        ops.append(Op(n, "matmul", "dot_general", args, (out,), MatmulDims(1, 1, 1, 1)))
    used = {i for op in ops for i in op.inputs} | {n_in + n_ops - 1}
    ops = [op for op in ops if op.outputs[0] in used]
    body = Block(tuple(range(n_in)), tuple(ops), (n_in + n_ops - 1,))
    return Program("graph", tensors, body, tuple(f"x{i}" for i in range(n_in)), ("result",))


def simulated_peak(program, order):
    """Live bytes by the definition: what the caller holds, and each value from its birth to its last use."""
    ops = {op.id: op for op in program.body.ops}
    size = lambda i: program.tensors[i].nbytes
    peak = 0
    for n, now in enumerate(order):
        later = {i for o in order[n:] for i in ops[o].inputs} | set(program.body.outputs)
        born = {o for m in order[: n + 1] for o in ops[m].outputs}
        live = (born & later) | set(ops[now].outputs) | set(program.body.inputs)
        peak = max(peak, sum(map(size, live)))
    return max(peak, sum(map(size, program.body.inputs)))


@given(graphs())
def law_hw_ir_peak_memory_is_the_live_bytes(program):
    order = [op.id for op in program.body.ops]
    peak = peak_bytes(program)
    assert peak == simulated_peak(program, order)
    size = lambda i: program.tensors[i].nbytes
    for op in program.body.ops:
        assert peak >= sum(map(size, {*op.inputs, *op.outputs}))
    assert peak <= sum(t.nbytes for t in program.tensors.values())
    for t, born, last in liveness(program):
        assert born <= last
        assert (born == -1) == (t.role == "input")


@given(graphs(most=5))
def law_hw_ir_reordering_finds_the_best_order(program):
    """Up to 12 ops: as good as the best of all permutations that respect what depends on what."""
    ops = program.body.ops
    made = {o: op.id for op in ops for o in op.outputs}
    valid = [
        p
        for p in itertools.permutations([op.id for op in ops])
        if all(p.index(made[i]) < p.index(op.id) for op in ops for i in op.inputs if i in made)
    ]
    best = min(simulated_peak(program, p) for p in valid)
    assert peak_bytes(program, order=reorder_for_memory(program)) == best


def law_hw_ir_programs_run_without_their_function():
    """Two records and a constant: counted, run in float and in eight bits, copied through JSON."""
    tensors = {
        0: Tensor(0, (2, 3), "float32", "input"),
        1: Tensor(1, (3, 4), "float32", "const", data=np.ones((3, 4), np.float32).tobytes()),
        2: Tensor(2, (2, 4), "float32", producer=0),
        3: Tensor(3, (2, 4), "float32", "output", producer=1),
    }
    dot = Op(0, "matmul", "dot_general", (0, 1), (2,), MatmulDims(1, 2, 4, 3),
             attrs={"dimension_numbers": (((1,), (0,)), ((), ()))})  # fmt: skip
    tanh = Op(1, "elementwise", "tanh", (2,), (3,), ElementwiseDims(8, 1, "transcendental"))
    program = Program("f", tensors, Block((0,), (dot, tanh), (3,)), ("x",), ("result",), ("x",))
    program = Program.from_json(program.to_json())
    c = count(program)
    assert (c.macs, c.flops, c.transcendentals, c.input_bytes, c.output_bytes) == (24, 48, 8, 24, 32)
    x = np.array([[0.1, 0.2, -0.4], [0.3, 0.0, 0.25]], np.float32)
    out, _ = run_program(program, (x,))
    want = np.tanh(np.broadcast_to(x.sum(1, keepdims=True), (2, 4)))
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-7)
    low, seen = run_program(program, (x,), policy=FormatPolicy(Fixed(12, 2, "RND", "SAT")))
    assert np.abs(low - want).max() <= 2.0**-11 * (1 + 3 + 1)  # result, three inputs, the product
    assert seen.events == {}
