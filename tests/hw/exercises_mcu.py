"""The exercises of the chapter on microcontrollers: a stub, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:rescale]
def rescale(acc, m, e):
    """acc m 2^(e - 31) as an integer, for e <= 0: integers in, an integer out. It
    rounds the exact quotient once, halves up.
    """
    places = 31 - e
    return (acc * m + (1 << (places - 1))) >> places
    # --8<-- [end:rescale]


# --8<-- [start:solve_rescale]
def solve_rescale(acc, m, e):
    high = (acc * m + (1 << 30)) >> 31  # the upper half of twice the product, to nearest
    if e == 0:
        return high
    half = 1 << (-e - 1)
    size = (abs(high) + half) >> -e  # halves away from zero: round the size, keep the sign
    return size if high >= 0 else -size
    # --8<-- [end:solve_rescale]


def check_rescale(rescale):
    """The library's, which equals CMSIS-NN's bit for bit."""
    from hypothesis import example, given
    from hypothesis import strategies as st

    from ref.blocks.integer import requantize

    @example(acc=1, m=5 << 28, e=-1)  # 0.3125: twice rounded it is 1
    @example(acc=-3, m=1 << 30, e=-1)
    @given(acc=st.integers(-(2**20), 2**20), m=st.integers(2**30, 2**31 - 1), e=st.integers(-12, 0))
    def twice(acc, m, e):
        want, got = int(requantize(acc, m, e)), rescale(acc, m, e)
        exact = acc * m * 2.0 ** (e - 31)
        assert got == want, f"{acc} times {m} 2^({e} - 31) is {exact:.4f}: the kernel gives {want}, not {got}"

    twice()


# --8<-- [start:place]
def place(buffers):
    """{name: offset} of buffers (name, bytes, first step, last step) in one arena;
    both steps included. It puts one behind the other.
    """
    offsets, top = {}, 0
    for name, size, _, _ in buffers:
        offsets[name], top = top, top + size
    return offsets
    # --8<-- [end:place]


# --8<-- [start:solve_place]
def solve_place(buffers):
    placed = []  # (offset, size, first, last)
    offsets = {}
    for name, size, first, last in sorted(buffers, key=lambda b: -b[1]):  # large ones first
        beside = sorted(p for p in placed if p[2] <= last and first <= p[3])
        at = 0
        for offset, other, _, _ in beside:
            if offset - at >= size:
                break  # the gap below it is wide enough
            at = max(at, offset + other)
        offsets[name] = at
        placed.append((at, size, first, last))
    return offsets
    # --8<-- [end:solve_place]


def check_place(place):
    """No two buffers share a byte at one step, and no more bytes than by size, largest first."""
    from ref.blocks.arena import Plan, overlaps, plan_arena

    cases = {
        "of the example by hand": [("a", 100, 0, 1), ("b", 50, 1, 2), ("c", 100, 2, 3)],
        "of a residual": [("x", 60, 0, 4), ("h", 60, 1, 2), ("wide", 240, 2, 3), ("y", 60, 3, 4)],
        "with a gap below": [("a", 40, 0, 1), ("b", 30, 0, 5), ("c", 40, 2, 5), ("d", 20, 3, 4)],
        "of a chain": [(i, 30 + 7 * (i % 4), i, i + 1) for i in range(9)],
    }
    for name, buffers in cases.items():
        offsets = dict(place(list(buffers)))
        assert set(offsets) == {b[0] for b in buffers}, f"the buffers {name}: not every one has an offset"
        top = max(offsets[i] + size for i, size, _, _ in buffers)
        shared = overlaps(Plan(offsets, top, 0, tuple(buffers)))
        assert not shared, f"the buffers {name}: {shared[0][0]} and {shared[0][1]} share a byte at one step"
        assert min(offsets.values()) >= 0, f"the buffers {name}: no offset is below 0"
        most = plan_arena(buffers, align=1).total
        assert top <= most, f"the buffers {name}: {most} bytes are enough, yours take {top}"
