"""Laws of the DRAM-PIM model: schedules against closed forms and constraints, units against their formats."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hw import pim
from hw.formats import BF16
from hw.pim_formats import table_lookup
from hw.pim_schedule import schedule_matvec, tile_columns
from ref.blocks.formats import round_bf16
from ref.blocks.lanes import dot_bf16_tree, mac_fp16, vmm_bf16

quiet = {"refresh": False}
ORDERED = [
    make(order=order, pack_rows=pack, **options, **quiet)
    for make, options in ((pim.gddr6_aim, {"channels": 2}), (pim.pim_gpt, {"channels": 1}), (pim.pim_gpt, {}))
    for order in ("wave_outer", "tile_outer")
    for pack in (False, True)
]
MACHINES = [
    *ORDERED,
    pim.pim_gpt(double_buffer_gb=True, **quiet),
    pim.hbm2_pim(**quiet),
    pim.hbm2_pim(channels=1, **quiet),
    pim.hbm3_attacc(**quiet),
    pim.hbm3_attacc(power_limited=True, **quiet),
]
EDGES = (1, 2, 15, 16, 17, 64, 127, 128, 129, 768, 1008, 1023, 1024, 1025, 1040, 1600, 2048, 3072, 3073)
sizes = st.one_of(st.sampled_from(EDGES), st.integers(1, 4000))
machines = st.sampled_from(MACHINES)


@given(machines, sizes, sizes)
def law_hw_pim_replay_equals_the_closed_form(t, m, k):
    """To the tick, in both orders, packed or not, with registers, with two buffers, with less power."""
    assert pim.matvec_timeline(m, k, t).cycles == pim.matvec_cycles(m, k, t)


def law_hw_pim_check_values_of_the_packed_order():
    """(m, k): ticks, counted by hand from the rules of PIM-GPT's machine."""
    counted = {(1, 1): 40, (128, 1024): 158, (2304, 768): 1336, (768, 3072): 1884, (129, 17): 41}
    t = pim.pim_gpt(**quiet)
    assert {mk: pim.matvec_cycles(*mk, t) for mk in counted} == counted


@given(machines, st.booleans(), st.integers(1, 700), st.integers(1, 2100))
def law_hw_pim_schedules_break_no_constraint(t, refresh, m, k):
    t = replace(t, channels=1, refresh=refresh)
    commands = schedule_matvec(m, k, t)
    assert not pim.check_commands(commands, t)
    assert pim.replay(commands, t) == pim.matvec_timeline(m, k, t)


def law_hw_pim_batches_and_long_runs_break_no_constraint():
    """Rows kept open for further vectors, and hundreds of refreshes."""
    for t in (pim.gddr6_aim(channels=1), pim.pim_gpt(channels=1), pim.hbm2_pim(channels=1)):
        for m, k, batch in ((40, 1300, 5), (3000, 5000, 1)):
            assert not pim.check_commands(schedule_matvec(m, k, t, batch=batch), t)


PLANTED = {  # rule: (kind of command to move, ticks to move it by, machine)
    "ACT-MAC": ("MAC", -1, "gddr6_aim"),
    "ACT-PRE": ("PRE", -40, "pim_gpt"),
    "PRE-ACT": ("ACT", -1, "pim_gpt"),
    "MAC-DRAIN": ("DRAIN", -1, "gddr6_aim"),
    "DRAIN-WR_GB": ("WR_GB", -1, "gddr6_aim"),
    "MODE-column": ("WR_GB", -30, "gddr6_aim"),
    "column-PRE": ("PRE", -3, "pim_gpt"),
    "column-column": ("DRAIN", -1, "pim_gpt"),
    "ACT-WR": ("WR", -1, "hbm2_pim"),
    "WR-PRE": ("PRE", -20, "hbm2_pim"),
}


def law_hw_pim_planted_violations_are_found():
    """Each command moved to an earlier tick breaks the rule that held it back."""
    for rule, (kind, by, name) in PLANTED.items():
        t = pim.PRESETS[name](channels=1, refresh=False)
        commands = schedule_matvec(700, 1500, t)
        found = set()
        for i, c in enumerate(commands):
            if c.op == kind:
                moved = [*commands[:i], replace(c, ticks=c.ticks + by), *commands[i + 1 :]]
                found |= {v.rule for v in pim.check_commands(moved, t)}
        assert rule in found, (rule, found)
    t = pim.gddr6_aim(channels=1)
    commands = schedule_matvec(3000, 5000, t)
    lost = [c for c in commands if c.op != "REF"]
    assert {v.rule for v in pim.check_commands(lost, t)} == {"refresh spacing"}
    early = [replace(c, ticks=c.ticks - 300) if c.op == "REF" else c for c in commands]
    assert {"order", "PRE-REF", "REF of an open bank"} & {v.rule for v in pim.check_commands(early, t)}
    no_row = [c for c in commands if c.op != "ACT"]
    assert "MAC without an open row" in {v.rule for v in pim.check_commands(no_row, t)}
    twice = [x for c in commands for x in ([c, c] if c.op == "ACT" else [c])]
    assert "ACT of an open bank" in {v.rule for v in pim.check_commands(twice, t)}
    no_mode = [c for c in commands if c.op != "MODE_MAC"]
    assert "mode mac" in {v.rule for v in pim.check_commands(no_mode, t)}


def law_hw_pim_a_row_has_so_many_columns():
    """64 and no more, in one command or in two, unless another vector is broadcast and passes over it."""
    t = pim.gddr6_aim(channels=1, **quiet)
    for reuse in (True, False):
        machine = replace(t, batch_reuse=reuse)
        for columns, again, fits in (
            ((64,), False, True), ((65,), False, False), ((500,), False, False), ((32, 32), False, True),
            ((40, 40), False, False), ((64, 64), True, reuse), ((64, 65), True, False),
        ):  # fmt: skip
            kinds = [("MODE_MAC", 0), ("ACT", 0)]
            for i, n in enumerate(columns):
                kinds += [("MODE_IO", 0), ("WR_GB", 64), ("MODE_MAC", 0)] if again and i else []
                kinds.append(("MAC", n))
            listed = [
                pim.Command(op, row=0 if op in ("ACT", "MAC", "PRE") else -1, columns=n, ticks=5000 * i)
                for i, (op, n) in enumerate([*kinds, ("PRE", 0)])
            ]
            rules = {v.rule for v in pim.check_commands(listed, machine)}
            assert rules == (set() if fits else {"columns of a row"}), (reuse, columns, again)


@given(machines, sizes, sizes)
def law_hw_pim_bytes_time_and_utilisation(t, m, k):
    """Every weight is read once and padding besides; no channel beats its units or its pins."""
    line = pim.matvec_timeline(m, k, t)
    read = line.mac * t.channels * t.units * t.lanes
    assert line.mac == pim.weights_columns(m, k, t)
    assert read >= m * k
    if t.order != "register":
        assert (read == m * k) == (k % t.lanes == 0 and m % (t.channels * t.banks) == 0)
        assert line.broadcast == sum(tile_columns(k, t)) * (
            -(-m // t.outputs) if t.order == "wave_outer" else 1
        )
    assert line.cycles >= t.mac_span(line.mac) - t.t_ccd * 16 // 9 * line.activate * t.power_limited
    assert t.double_buffer_gb or line.cycles >= (line.broadcast + line.drain) * t.t_burst
    assert line.active_cycles + line.precharged_cycles == line.cycles
    assert line.precharge in (line.activate, line.activate - 1)


@given(st.sampled_from(ORDERED), st.integers(1, 9), sizes)
def law_hw_pim_twice_the_channels_halve_the_columns(t, n, k):
    """Exactly when the outputs divide evenly over them."""
    m = 2 * t.channels * t.banks * n
    more = replace(t, channels=2 * t.channels)
    assert 2 * pim.matvec_timeline(m, k, more).mac == pim.matvec_timeline(m, k, t).mac
    assert pim.matvec_cycles(m, k, more) <= pim.matvec_cycles(m, k, t)


@given(st.sampled_from(ORDERED), sizes, sizes)
def law_hw_pim_time_grows_with_the_work_and_with_every_timing(t, m, k):
    base = pim.matvec_cycles(m, k, t)
    assert base <= pim.matvec_cycles(m + 1, k, t)
    if not t.pack_rows or (t.order == "tile_outer" and not t.t_mode):  # the next law says why
        assert base <= pim.matvec_cycles(m, k + 1, t)
    for name in ("t_act_mac", "t_rp", "t_rtp", "t_ccd", "t_burst", "t_drain"):
        assert base <= pim.matvec_cycles(m, k, replace(t, **{name: getattr(t, name) + 1})), name


def law_hw_pim_packed_rows_may_gain_from_a_longer_input():
    """63 columns a run cross a row end in the middle of one, 64 never do: there a mode change or a broadcast
    hides the precharge.
    """
    for order, cycles in (("wave_outer", (831, 829)), ("tile_outer", (737, 713))):
        t = pim.gddr6_aim(channels=2, order=order, pack_rows=True, **quiet)
        assert tuple(pim.matvec_cycles(64, k, t) for k in (1008, 1009)) == cycles


def law_hw_pim_refresh_tends_to_its_share():
    """Overhead over the time without it: tRFC / (tREFI - tRFC), up to one refresh and one row."""
    for name in pim.PRESETS:
        t = pim.PRESETS[name](channels=1)
        slow, fast = (pim.matvec_timeline(2000, 4000, x).cycles for x in (t, replace(t, refresh=False)))
        share = t.t_rfc / (t.t_refi - t.t_rfc)
        assert abs((slow - fast) / fast - share) <= 2 * t.t_rfc / fast
    assert pim.matvec_timeline(1, 16, pim.gddr6_aim()).refresh == 0


@given(st.integers(1, 4096), st.sampled_from((16, 100, 128, 129, 1024)))
def law_hw_pim_hbm_is_flat_below_its_registers(m, k):
    """One tile holds 4096 outputs: fewer cost the same, one more costs as much again."""
    cycles = lambda n: pim.kernel_cycles("gemv", n, k, pim.hbm2_pim(refresh=False)).pim
    assert cycles(m) == cycles(4096) == cycles(1)
    assert cycles(4097) > cycles(4096)


def law_hw_pim_columns_of_a_row_pay_for_its_activate():
    """n columns an activate cost (tRC + (n - 1) tCCD) / n each: 32 against 1 is 8.9 at tRC / tCCD = 12."""
    tRC, ccd = 48, 4
    machine = pim.pim_gpt(
        t_act_mac=14, t_rp=14, t_ras=tRC - 14, t_rtp=20, t_ccd=ccd, t_drain=ccd, channels=1, pack_rows=False,
        order="wave_outer", **quiet,
    )  # fmt: skip
    cost = {}
    for n in (1, 2, 8, 32):
        t = replace(machine, row_interleave=n)
        line = [pim.matvec_timeline(16 * w, 512, t) for w in (1, 5)]
        rows = line[1].activate - line[0].activate
        assert rows == 4 * 32 // n
        cost[n] = (line[1].active_cycles + line[1].precharged_cycles - line[0].cycles) / (4 * 32)
    derived = {n: (tRC + (n - 1) * ccd) / n for n in cost}
    for n in (1, 2):  # broadcast and drain of a wave add a little to every column
        assert derived[n] <= cost[n] <= derived[n] + 3
    assert derived[1] / derived[32] == 32 * tRC / (tRC + 31 * ccd)
    assert 8.9 < derived[1] / derived[32] < 9


# Number formats

finite = st.floats(-1e3, 1e3, width=32)


def fold(x, w):
    """The same order of float32 sums, written out for one output."""
    acc = np.float32(0)
    for at in range(0, len(x), 16):
        p = [np.float32(a) * np.float32(b) for a, b in zip(x[at : at + 16], w[at : at + 16], strict=True)]
        p += [np.float32(0)] * (16 - len(p))
        while len(p) > 1:
            p = [a + b for a, b in zip(p[::2], p[1::2], strict=True)]
        acc = acc + p[0]
    return acc


@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from((1.0, 1e-3, 1e4)))
def law_hw_pim_tree_is_the_tree(k, seed, gain):
    """Bit for bit the written-out fold, rounded once; zeros behind the last input change nothing."""
    rng = np.random.default_rng(seed)
    x, w = (round_bf16(gain * rng.standard_normal(s).astype(np.float32)) for s in ((k,), (k, 2)))
    got = dot_bf16_tree(x, w)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [round_bf16(fold(x, w[:, j])) for j in range(2)])
    padded = np.concatenate([x, np.zeros(-k % 16, np.float32)])
    np.testing.assert_array_equal(got, dot_bf16_tree(padded, np.pad(w, ((0, -k % 16), (0, 0)))))
    # Products are exact, k - 1 additions and one rounding to 8 bits follow.
    exact, size = x.astype(np.float64) @ w, np.abs(x).astype(np.float64) @ np.abs(w)
    assert (np.abs(got - exact) <= k * 2.0**-23 * size + 2.0**-8 * np.abs(exact) + 2.0**-133).all()
    np.testing.assert_array_equal(vmm_bf16(x, w, tile=1024), got)


def law_hw_pim_tree_depends_on_the_order_of_inputs():
    x = np.array([2.0**24, 1, 1, -(2.0**24)] + [0] * 12, np.float32)
    one = np.ones((16, 1), np.float32)
    assert dot_bf16_tree(x, one)[0] == 1  # (2^24 + 1) + (1 - 2^24): the first one is lost
    assert dot_bf16_tree(x[[0, 3, 1, 2, *range(4, 16)]], one)[0] == 2


def law_hw_pim_tiles_add_in_bfloat16():
    """Drained partial sums 256 and 1: 257 has nine bits, the sum of the tiles rounds to 256."""
    x, w = np.ones(272, np.float32), np.ones((272, 1), np.float32)
    w[256:, 0] = 1 / 16
    assert dot_bf16_tree(x, w, acc="bf16")[0] == 256
    assert vmm_bf16(x, w, tile=256)[0] == 256
    w[256:, 0] = 2 / 16
    assert vmm_bf16(x, w, tile=256)[0] == dot_bf16_tree(x, w)[0] == 258


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def law_hw_pim_lanes_of_float16(k, seed):
    """Lane j gathers every sixteenth product, each product and each sum rounded to float16."""
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(s).astype(np.float16) for s in ((k,), (k, 1)))
    held = [np.float16(0)] * 16
    for i in range(k):
        held[i % 16] = np.float16(held[i % 16] + np.float16(x[i] * w[i, 0]))
    total = np.float32(held[0])
    for h in held[1:]:
        total = total + np.float32(h)
    assert mac_fp16(x, w)[0] == total
    # A product and a sum each round to 11 bits: per lane k / 16 + 1 steps on at most the sum of sizes.
    size = float(np.abs(x.astype(np.float64)) @ np.abs(w[:, 0].astype(np.float64)))
    assert abs(total - float(x.astype(np.float64) @ w[:, 0])) <= (k / 16 + 3) * 2.0**-11 * size + k * 2.0**-25
    assert np.isinf(mac_fp16(np.full(2, 60000.0), np.full((2, 1), 2.0))[0])


def law_hw_pim_activation_table_is_close():
    """1024 entries over [-8, 8): the chord of tanh is within step^2 / 8 max|f''|, bfloat16 within 2^-9."""
    x = np.linspace(-12, 12, 4001)
    got = table_lookup(np.tanh, x)
    chord = (16 / 1024) ** 2 / 8 * 0.77
    assert np.abs(got - np.tanh(x)).max() <= chord + 2.0**-8  # an entry and the result round
    np.testing.assert_array_equal(got, BF16.quantise(got))
    assert np.isnan(table_lookup(np.tanh, np.array([np.nan]))).all()
    assert table_lookup(np.tanh, np.array([np.inf]))[0] == 1
