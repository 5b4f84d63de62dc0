"""The exercises of the chapter on DRAM that multiplies: a stub, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:commands]
def commands(rows, columns):
    """[(op, row, columns, tick)] that reads so many columns of each of the rows 0,
    1, ... of one bank, as early as PIM-GPT allows: t_RCD = 12 (activate to the
    first column), t_CCD = 1 (column to column), t_RTP = 6 (last column to
    precharge), t_RAS = 27 (activate to precharge), t_RP = 12 (precharge to
    activate). It closes each row right behind its last column.
    """
    out, tick = [], 0
    for row in range(rows):
        out.append(("ACT", row, 0, tick))
        out.append(("MAC", row, columns, tick + 12))
        out.append(("PRE", row, 0, tick + 12 + columns))
        tick += 12 + columns + 12
    return out
    # --8<-- [end:commands]


# --8<-- [start:solve_commands]
def solve_commands(rows, columns):
    out, tick = [], 0
    for row in range(rows):
        last = tick + 12 + columns - 1  # the tick at which the last column starts
        close = max(tick + 27, last + 6)
        out.append(("ACT", row, 0, tick))
        out.append(("MAC", row, columns, tick + 12))
        out.append(("PRE", row, 0, close))
        tick = close + 12
    return out
    # --8<-- [end:solve_commands]


def check_commands(commands):
    """The checker of the library finds nothing, and no list could end earlier."""
    from hw.pim import pim_gpt
    from hw.pim_check import check_commands as judge
    from hw.pim_schedule import Command

    t = pim_gpt(channels=1, refresh=False)
    for rows, columns in ((1, 64), (2, 4), (3, 9), (3, 10), (4, 11), (2, 64)):
        listed = [Command(op, 0, row, n, tick) for op, row, n, tick in commands(rows, columns)]
        what = f"{rows} rows of {columns} columns"
        broken = judge(listed, t)
        assert not broken, (
            f"{what}: {broken[0].rule} needs {broken[0].needed} ticks, "
            f"command {broken[0].index} leaves {broken[0].found}"
        )
        read = [c.row for c in listed if c.op == "MAC" for _ in range(c.columns)]
        assert sorted(read) == sorted(list(range(rows)) * columns), f"{what}: not every column is read once"
        row = max(t.t_ras, t.t_act_mac + (columns - 1) * t.t_ccd + t.t_rtp)
        last = max(c.ticks for c in listed)
        end = rows * row + (rows - 1) * t.t_rp
        assert listed[-1].op == "PRE", f"{what}: the last row stays open"
        assert last == end, f"{what}: the last row can close at {end}, yours closes at {last}"


# --8<-- [start:aim_ticks]
def aim_ticks(M, K, channels):
    """Ticks of a product with M outputs and K inputs on GDDR6-AiM. It divides the
    products by what all the multipliers can do: a column of 16 inputs in 2 ticks
    at each of the 16 banks of a channel.
    """
    return 2 * M * K / (16 * 16 * channels)
    # --8<-- [end:aim_ticks]


# --8<-- [start:solve_aim_ticks]
def solve_aim_ticks(M, K, channels):
    waves = -(-M // (16 * channels))
    tiles = -(-K // 1024)
    columns = sum(-(-min(1024, K - i) // 16) for i in range(0, K, 1024))
    return 1 + waves * (158 + 4 * columns) + 150 * waves * (tiles - 1)
    # --8<-- [end:solve_aim_ticks]


def check_aim_ticks(aim_ticks):
    """The command list, played tick by tick, which equals the open simulator's totals."""
    from hw.pim import gddr6_aim, matvec_timeline

    for M, K, channels in ((512, 1024, 32), (513, 1024, 32), (512, 1025, 32), (100, 17, 2), (576, 1536, 16)):
        want = matvec_timeline(M, K, gddr6_aim(channels=channels, refresh=False)).cycles
        got = aim_ticks(M, K, channels)
        assert got == want, f"{M} outputs of {K} inputs on {channels} channels: {want:,} ticks, not {got:,g}"
