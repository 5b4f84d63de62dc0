"""The exercise of the chapter on reports: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:bounds]
def bounds(kernels):
    """(least, most) seconds of kernels [(seconds to start, {resource: seconds})],
    whatever overlaps. The least it takes is the longest of each kernel, one after
    another; the most, the same with the starts.
    """
    least = sum(max(busy.values()) for _, busy in kernels)
    return least, least + sum(start for start, _ in kernels)
    # --8<-- [end:bounds]


# --8<-- [start:solve_bounds]
def solve_bounds(kernels):
    resources = {r for _, busy in kernels for r in busy}
    least = max(sum(busy.get(r, 0) for _, busy in kernels) for r in resources)
    return least, sum(start + sum(busy.values()) for start, busy in kernels)
    # --8<-- [end:solve_bounds]


def check_bounds(bounds):
    """The range of the library's reports, for products large and thin on an H200."""
    from hw.front import estimate
    from hw.gpu import h200
    from hw.program import Block, MatmulDims, Op, Program, Tensor

    for sizes in (
        [(512, 512, 512)],
        [(1, 4096, 4096), (4096, 4096, 4096)],
        [(64, 8192, 1024), (4096, 64, 4096), (1, 1024, 1024)],
    ):
        tensors, ops = {}, []
        for i, (m, n, k) in enumerate(sizes):
            for j, (shape, role) in enumerate((((m, k), "input"), ((k, n), "weight"), ((m, n), "output"))):
                made = {"producer": i} if role == "output" else {"consumers": (i,)}
                tensors[3 * i + j] = Tensor(3 * i + j, shape, "bfloat16", role, **made)
            ops.append(
                Op(i, "matmul", "dot_general", (3 * i, 3 * i + 1), (3 * i + 2,), MatmulDims(1, m, n, k))
            )
        block = Block(
            tuple(i for i in tensors if i % 3 < 2), tuple(ops), tuple(i for i in tensors if i % 3 == 2)
        )
        report = estimate(Program("products", tensors, block), h200())
        want = report.seconds_range
        got = bounds([(c.overhead_s, dict(c.busy_s)) for c in report.by_op])
        for side, a, b in zip(("least", "most"), want, got, strict=True):
            assert abs(a - b) < 1e-9 * a, (
                f"products {sizes}: at the {side} {a * 1e6:.2f} µs, not {b * 1e6:.2f}"
            )
