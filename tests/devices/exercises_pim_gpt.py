"""The exercises of the chapter on PIM-GPT: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:reciprocal]
def reciprocal(m):
    """1 / m for m in [1/2, 1), by additions and at most seven multiplications. As
    it stands it takes three Newton steps from 1, six multiplications.
    """
    y = 1.0
    for _ in range(3):
        y = y * (2.0 - m * y)
    return y
    # --8<-- [end:reciprocal]


# --8<-- [start:solve_reciprocal]
def solve_reciprocal(m):
    y = 48 / 17 - 32 / 17 * m
    for _ in range(3):
        y = y * (2.0 - m * y)
    return y
    # --8<-- [end:solve_reciprocal]


class Wire:
    """A number that the chip can add and multiply, and no more; it counts multiplications."""

    products = 0

    def __init__(self, value):
        self.value = float(getattr(value, "value", value))

    def __add__(self, other):
        return Wire(self.value + Wire(other).value)

    def __neg__(self):
        return Wire(-self.value)

    def __sub__(self, other):
        return self + -Wire(other)

    def __rsub__(self, other):
        return Wire(other) - self

    def __mul__(self, other):
        Wire.products += 1
        return Wire(self.value * Wire(other).value)

    def __truediv__(self, other):
        raise AssertionError("the chip has no divider: add and multiply")

    def __pow__(self, other):
        raise AssertionError("the chip has no powers: add and multiply")

    __radd__, __rmul__, __rtruediv__, __rpow__ = __add__, __mul__, __truediv__, __pow__


def check_reciprocal(reciprocal):
    """Right to 24 bits on all of [1/2, 1), within the products that are allowed."""
    for i in range(512):
        m = 0.5 + i / 1024
        Wire.products = 0
        y = reciprocal(Wire(m))
        assert isinstance(y, Wire), "the result must be computed from m"
        assert Wire.products <= 7, f"{Wire.products} multiplications, seven are allowed"
        error = abs(m * y.value - 1)
        assert error < 2**-24, f"1 / {m} comes out as {y.value:.9f}, off by {error:.1e} of it"


# --8<-- [start:ticks]
def ticks(M, K):
    """Ticks of a product with M outputs and K inputs on PIM-GPT: 8 channels of 16
    banks, 16 lanes, 64 columns a row, tiles of 1,024 inputs, t_RCD = t_RP = 12,
    t_RAS = 27, t_RTP = 6, t_CCD = t_B = 1. It counts the columns of the fullest
    bank, as if multiplying were all there is to do.
    """
    return -(-M // 128) * -(-K // 16)
    # --8<-- [end:ticks]


# --8<-- [start:solve_ticks]
def solve_ticks(M, K):
    r, total = -(-M // 128), 0
    for start in range(0, K, 1024):
        c = -(-min(1024, K - start) // 16)
        rows = -(-r * c // 64)
        z = r * c - 64 * (rows - 1)  # columns and ends of runs in the last row
        e = r - 64 * (rows - 1) // c
        waits = max(0, 27 - (12 + z + e + 6 - 1))
        total += c + rows * (12 + 12 + 6 - 1) + r * c + r + waits
    return total
    # --8<-- [end:solve_ticks]


def check_ticks(ticks):
    """The closed form of the library, which the simulator's time equals to the tick."""
    from ref.devices.pim_gpt import vmm_ticks

    for M, K in ((129, 17), (128, 16), (128, 1024), (2304, 768), (768, 3072), (1600, 1600), (200, 1025)):
        want, got = vmm_ticks(M, K), ticks(M, K)
        parts = ", ".join(f"{name} {value:,}" for name, value in zip(want._fields[:5], want, strict=False))
        assert got == want.total, (
            f"{M} outputs of {K} inputs take {want.total:,} ticks ({parts}), not {got:,}"
        )
