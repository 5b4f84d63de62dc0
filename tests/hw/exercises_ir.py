"""The exercises of the chapter on the op program: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:macs]
def macs(block):
    """Multiply-accumulates of a block of ops. A product has op.kind "matmul" and
    op.dims.b, .m, .n, .k; a loop "loop" and op.dims.trips, .body and .cond, a block
    or None; a branch "branch" and op.dims.branches, of which the largest counts. As
    it stands each body counts once.
    """
    total = 0
    for op in block.ops:
        if op.kind == "matmul":
            total += op.dims.b * op.dims.m * op.dims.n * op.dims.k
        elif op.kind in ("loop", "branch"):
            total += sum(macs(b) for b in op.dims.blocks)
    return total
    # --8<-- [end:macs]


# --8<-- [start:solve_macs]
def solve_macs(block):
    def of(block):
        total = 0
        for op in block.ops:
            if op.kind == "matmul":
                total += op.dims.b * op.dims.m * op.dims.n * op.dims.k
            elif op.kind == "loop":
                total += op.dims.trips * of(op.dims.body)
                if op.dims.cond is not None:
                    total += (op.dims.trips + 1) * of(op.dims.cond)
            elif op.kind == "branch":
                total += max(of(b) for b in op.dims.branches)
        return total

    return of(block)
    # --8<-- [end:solve_macs]


def check_macs(macs):
    """`hw.count` on loops in loops, conditions and branches."""
    import hw
    from hw.program import Block, Branch, Loop, MatmulDims, Op, Program

    number = iter(range(1000))
    block = lambda *ops: Block((), ops, ())
    op = lambda kind, dims: Op(next(number), kind, kind, (), (), dims)
    product = lambda *sizes: op("matmul", MatmulDims(*sizes))
    loop = lambda trips, body, cond=None: op("loop", Loop(body, trips, 0, 0, cond=cond))
    once = block(product(1, 4, 5, 6))
    cases = {
        "two products": block(product(1, 2, 3, 4), product(2, 3, 3, 3)),
        "a loop of ten trips": block(loop(10, once)),
        "a loop in a loop": block(loop(3, block(loop(4, once), product(1, 2, 2, 2)))),
        "a loop without a trip": block(loop(0, once)),
        "a loop whose condition multiplies": block(loop(5, once, cond=block(product(1, 1, 1, 7)))),
        "a branch": block(op("branch", Branch((once, block(product(1, 9, 9, 9)))))),
    }
    for name, body in cases.items():
        want, got = hw.count(Program(name, {}, body)).macs, macs(body)
        assert got == want, f"{name}: {want:,} multiply-accumulates, not {got:,}"


# --8<-- [start:fetches]
def fetches(grid, axes):
    """Blocks fetched over a grid, last axis fastest, by an index map that copies
    the grid axes in `axes`. It counts every block that there is, once.
    """
    total = 1
    for axis in axes:
        total *= grid[axis]
    return total
    # --8<-- [end:fetches]


# --8<-- [start:solve_fetches]
def solve_fetches(grid, axes):
    moving = [axis for axis in axes if grid[axis] > 1]
    total = 1
    for axis in range(max(moving, default=-1) + 1):
        total *= grid[axis]
    return total
    # --8<-- [end:solve_fetches]


def check_fetches(fetches):
    """The grid walked step by step."""
    from hypothesis import given
    from hypothesis import strategies as st

    import hw

    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
    def walked(grid, data):
        axes = data.draw(st.sets(st.integers(0, len(grid) - 1)).map(sorted), label="axes")
        operand = hw.GridOperand(lambda *s: tuple(s[a] for a in axes), (1,) * len(axes), (9,) * len(axes), 4)
        (want,) = hw.grid_traffic(grid, [operand]).fetches
        got = fetches(tuple(grid), tuple(axes))
        assert got == want, f"grid {tuple(grid)}, map of axes {tuple(axes)}: {want} fetches, not {got}"

    walked()
