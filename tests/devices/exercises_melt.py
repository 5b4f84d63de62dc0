"""The exercises of the chapter on MELT: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:joules]
import numpy as np


def joules(t, current, voltage):
    """The energy in J of samples at the times t [n] in s, of current [n] in A and
    voltage [n] in V, where a voltage that is missing (NaN) is the next one that is
    there; the last is never missing (equation 3). As it stands nothing is filled
    in, and the trapezoid rule is used.
    """
    watts = current * voltage
    return float(np.sum((watts[1:] + watts[:-1]) / 2 * np.diff(t)))
    # --8<-- [end:joules]


# --8<-- [start:solve_joules]
def solve_joules(t, current, voltage):
    voltage = voltage.copy()
    for k in reversed(range(len(t) - 1)):  # from the end: the next one is whole by then
        if np.isnan(voltage[k]):
            voltage[k] = voltage[k + 1]
    return float(np.sum(current[1:] * voltage[1:] * np.diff(t)))  # the first sample counts for no time
    # --8<-- [end:solve_joules]


def check_joules(joules):
    """The library's rule."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.devices.melt import energy

    rows = st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from((3.0, 4.0, float("nan"))))

    @given(st.lists(rows, min_size=1, max_size=5), st.sampled_from((3.0, 4.0)))
    def the_rule(rows, last):
        wait, current, voltage = np.array(rows, float).T
        t, voltage[-1] = np.cumsum(wait), last
        got, want = joules(t, current, voltage.copy()), 3.6 * energy(t, 1000 * current, voltage)[0]
        # sums of five products below 36, in other units and back
        assert abs(got - want) < 1e-11, f"t = {t}, I = {current}, V = {voltage}: {want:g} J, not {got:g}"

    the_rule()


# --8<-- [start:four_bits]
import numpy as np


def four_bits(x):
    """(d, codes) of a block x [32] in Q4_0: codes 0 to 15 with x nearly (code - 8) d
    (equation 6). As it stands the codes reach 7 steps either way, and code 0 is
    never used.
    """
    d = np.abs(x).max() / 7
    return d, np.clip(np.trunc(x / d + 8.5), 0, 15)
    # --8<-- [end:four_bits]


# --8<-- [start:solve_four_bits]
def solve_four_bits(x):
    d = x[np.argmax(np.abs(x))] / -8  # signed: the largest number gets code 0, whichever its sign
    if d == 0:
        return d, np.full(32, 8)
    return d, np.clip(np.trunc(x / d + 8.5), 0, 15)
    # --8<-- [end:solve_four_bits]


def check_four_bits(four_bits):
    """The bytes of the library."""
    from ref.devices.melt import quantize

    rng = np.random.default_rng(0)
    for n in range(20):
        x = rng.standard_normal(32).astype(np.float32)
        x *= 0 if n == 19 else np.sign(x[np.argmax(np.abs(x))]) * (-1) ** n  # both signs, and nothing at all
        raw = quantize(x, kind="Q4_0")
        want_d, want = raw[:2].view(np.float16)[0], np.concatenate([raw[2:] & 15, raw[2:] >> 4])
        with np.errstate(invalid="ignore", divide="ignore"):
            d, codes = four_bits(x)
        largest = x[np.argmax(np.abs(x))]
        assert np.float16(d) == want_d, (
            f"the largest number is {largest:.3f}: d is {want_d:.4f}, not {float(d):.4f}"
        )
        assert np.array_equal(codes, want), f"codes begin with {want[:6]}, not {np.asarray(codes)[:6]}"


# --8<-- [start:at_rest]
def at_rest(watts, r, ambient, limit, gamma):
    """The frequency, of 1, at which a device stays that draws watts * frequency,
    with thermal resistance r to the air (equation 8 with dT/dt = 0; no floor). As
    it stands the device slows down, but is taken to heat up as if it did not.
    """
    hot = ambient + watts * r
    return 1 - gamma * max(0.0, hot - limit)
    # --8<-- [end:at_rest]


# --8<-- [start:solve_at_rest]
def solve_at_rest(watts, r, ambient, limit, gamma):
    if ambient + watts * r <= limit:
        return 1.0
    return (1 + gamma * (limit - ambient)) / (1 + gamma * watts * r)  # T - ambient = watts r f
    # --8<-- [end:solve_at_rest]


def check_at_rest(at_rest):
    """The end of a long run of the library's device."""
    from ref.devices.melt import ThermalDevice, sustained

    for watts, r, limit in ((1.0, 6.0, 45.0), (4.0, 6.0, 42.0), (6.0, 6.0, 42.0), (5.0, 8.0, 40.0)):
        device = ThermalDevice(r_k_per_w=r, c_j_per_k=2.0, limit_c=limit, floor=0.05)
        want = sustained(device, lambda f, watts=watts: watts * f, 400).frequency[-1]
        got = at_rest(watts, r, device.ambient_c, limit, device.gamma_per_k)
        # 400 s are at least 25 times R C: what is left of the start is below 36 K exp(-25) per kelvin
        assert abs(got - want) < 1e-8, f"{watts} W, {r} K/W, limit {limit}: {want:.4f}, not {got:.4f}"
