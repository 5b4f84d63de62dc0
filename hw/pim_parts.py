"""The numbers of DRAM-PIM machines, each with its source, as in `hw.parts`."""

from hw.parts import Part

_AIM = "open GDDR6-AiM simulator (arkhadem/aim_simulator, MIT): its timing preset"
_HBM_PIM = "Samsung HBM2-PIM simulator's cycles; ISCA 2021 and IEEE Micro 2022 for the machine"
_PIM_GPT = "PIM-GPT (arXiv 2310.09385), from memory"
_FIT = "ours: what the totals of that simulator leave for issue and turn-around"
# Ticks of `tick_ps`; the meaning of each field stands at `hw.pim.Pim`.
PIMS = {
    "gddr6_aim": Part(
        "SK hynix GDDR6-AiM", _AIM,
        {
            "channels": 16, "banks": 16, "units": 16, "lanes": 16, "row_bytes": 2048, "column_bytes": 32,
            "rows": 16384, "tick_ps": 500, "t_act_mac": 56, "t_act_read": 36, "t_act_write": 25, "t_rp": 32,
            "t_ras": 54, "t_ccd": 2, "t_burst": 2, "t_rtp": 12, "t_cl": 50, "t_cwl": 6, "t_wr": 33,
            "t_mode": 32, "t_drain": 33, "t_rfc": 210, "t_refi": 3333, "t_start": 3, "t_issue": 1,
            "t_turn": 8, "t_end": 6, "order": "wave_outer", "pack_rows": False, "fmt": "bf16_tree",
        },
        {
            "t_start": _FIT, "t_issue": _FIT, "t_turn": _FIT, "t_end": _FIT,
            "rows": "4 Gb a channel: 8 Gb chips of two channels (ISSCC 2022)",
            "t_act_write": "the simulator's activate to elementwise command",
        },
    ),
    "hbm2_pim": Part(
        "Samsung HBM2-PIM (Aquabolt-XL), 4 stacks", _HBM_PIM,
        {
            "channels": 64, "banks": 16, "units": 8, "lanes": 16, "row_bytes": 1024, "column_bytes": 32,
            "rows": 8192, "tick_ps": 1000, "t_act_mac": 14, "t_act_read": 14, "t_act_write": 10, "t_rp": 14,
            "t_ras": 33, "t_ccd": 4, "t_burst": 2, "t_rtp": 5, "t_cl": 20, "t_cwl": 8, "t_wr": 16,
            "t_mode": 200, "t_drain": 4, "t_rfc": 350, "t_refi": 3900, "t_ref_first": 2600,
            "order": "register", "pack_rows": True, "fmt": "fp16_lane",
        },
        {
            "rows": "4 Gb of each PIM die, four dies a stack, from memory",
            "t_mode": "four special-row writes (activate, write, recover, precharge: 50 each) to the mode",
            "t_ref_first": "ours: its kernels of 2,042 cycles meet no refresh, those of 3,349 one",
        },
    ),
    "hbm3_attacc": Part(
        "AttAcc, HBM3, bank level, one stack", "AttAcc (ASPLOS 2024) and its open simulator",
        {
            "channels": 32, "banks": 16, "units": 16, "lanes": 16, "row_bytes": 1024, "column_bytes": 32,
            "rows": 32768, "tick_ps": 764, "t_act_mac": 17, "t_act_read": 17, "t_act_write": 17, "t_rp": 17,
            "t_ras": 41, "t_ccd": 2, "t_burst": 2, "t_rtp": 8, "t_cl": 17, "t_cwl": 5, "t_wr": 20,
            "t_mode": 0, "t_drain": 2, "t_rfc": 240, "t_refi": 4680, "order": "wave_outer",
            "pack_rows": False, "fmt": "fp16_lane",
        },
        {
            "tick_ps": "1.3 GHz, such that two ticks a column give the stack's 670 GB/s",
            "t_ccd": "16 banks at the rate of the pins: the 16x of the paper",
            "fmt": "our assumption: 16 float16 lanes, no tree described",
            "rows": "16 GB a stack", "t_act_write": "our assumption: as the read",
            "t_drain": "our assumption",
        },
    ),
    "pim_gpt": Part(
        "PIM-GPT, 8 channels of GDDR6 and an ASIC", _PIM_GPT,
        {
            "channels": 8, "banks": 16, "units": 16, "lanes": 16, "row_bytes": 2048, "column_bytes": 32,
            "rows": 16384, "tick_ps": 1000, "t_act_mac": 12, "t_act_read": 12, "t_act_write": 12, "t_rp": 12,
            "t_ras": 27, "t_ccd": 1, "t_burst": 1, "t_rtp": 6, "t_cl": 25, "t_cwl": 0, "t_wr": 12,
            "t_mode": 0, "t_drain": 1, "t_end": 1, "t_rfc": 455, "t_refi": 6825, "order": "tile_outer",
            "pack_rows": True, "fmt": "bf16_tree",
        },
        dict.fromkeys(("t_ras", "t_rtp", "t_cl"), "our choice, from GDDR6-AiM's at 0.5 ns")
        | {"t_cwl": "our choice: part of t_wr"},
    ),
}  # fmt: skip

# Picojoules by event and milliwatts of background, by machine: fields of `hw.pim.EnergyTable`.
PIM_ENERGY = {
    "gddr6_aim": Part(
        "GDDR6-AiM's energy",
        "open CENT power model (Yufeng98/CENT): mW a channel times the time of the command",
        {
            "act_pj": 66.3 * 44.5, "mac_pj": 3 * 438.2 * 1.0 / 16, "read_pj": 438.2, "write_pj": 553.2,
            "pin_pj_per_bit": 5.5, "refresh_pj": 231.25 * 105.0, "open_mw": 263.8, "closed_mw": 183.2,
            "controller_mw": (267.7 + 381.0) / 2,
        },
        {"refresh_pj": "1.25 V (IDD5B - IDD2N) tRFC with PIM-GPT's currents, from memory"},
    ),
    "hbm2_pim": Part(
        "HBM-PIM's energy", "open AttAcc simulator: cell, path and unit in pJ a bit and an operation",
        {
            "act_pj": 1000.0, "mac_pj": 256 * 0.55 + 32 * 0.32, "read_pj": 256 * 1.56, "write_pj": 256 * 1.56,
            "pin_pj_per_bit": 2.03, "refresh_pj": 80000.0, "open_mw": 60.0, "closed_mw": 45.0,
            "controller_mw": 0.0,
        },
        {n: "our assumption" for n in ("act_pj", "refresh_pj", "open_mw", "closed_mw", "controller_mw")},
    ),
    "pim_gpt": Part(
        "PIM-GPT's energy", "currents and unit power of PIM-GPT, from memory: VDD I t at 1.25 V",
        {
            "act_pj": 66.3 * 39.0, "mac_pj": (3 * 485.0 + 149.29) / 16, "read_pj": 485.0,
            "write_pj": 1.25 * (470 - 142), "pin_pj_per_bit": 5.5, "refresh_pj": 231.25 * 455.0,
            "open_mw": 1.25 * 142, "closed_mw": 1.25 * 92, "controller_mw": 0.0,
        },
        {
            "act_pj": "66.3 mW a bank over tRC, the open AiM power model: the currents give a negative value",
            "mac_pj": "three external reads an all-bank column, as the open AiM power model, plus the units",
            "pin_pj_per_bit": "open CENT power model",
        },
    ),
}  # fmt: skip
PIM_ENERGY["hbm3_attacc"] = PIM_ENERGY["hbm2_pim"]
# What computes beside the banks: lanes, clock, scratchpad, power.
ASICS = {
    "pim_gpt": Part(
        "PIM-GPT's ASIC, 28 nm", _PIM_GPT,
        {"name": "asic", "adders": 256, "multipliers": 128, "ghz": 1.0, "sram_kb": 128, "watts": 0.30459},
    ),
    "host": Part(
        "a host beside the memory", "our assumption: a processor that keeps up with the pins",
        {"name": "host", "adders": 16384, "multipliers": 16384, "ghz": 1.0, "sram_kb": 0, "watts": 60.0},
    ),
}  # fmt: skip
