"""MCUFormer of the published size on the microcontroller target: `python -m tests.claims.mcuformer_mcu`.

Writes docs/data/mcuformer_mcu.json: arena, flash, seconds and joules of 12 layers at 240 x 240 on two parts,
with and without relative positions and reductions; and one layer with relative positions, weights drawn, run
in int8 and again in its poisoned arena of exactly the planned bytes. Half a minute on a CPU.
"""

import jax
import numpy as np

import hw
from accel.devices.mcuformer import mcuformer_forward
from hw.front import difference
from ref.devices.mcuformer import SubnetConfig, init_mcuformer
from tests.claims.record import store

FILES = (
    "accel/devices/mcuformer.py",
    "hw/kernel_counts.py",
    "hw/mcu.py",
    "hw/mcu_arena.py",
    "hw/mcu_calibrate.py",
    "hw/mcu_flash.py",
    "hw/mcu_flow.py",
    "hw/mcu_int16.py",
    "hw/mcu_int8.py",
    "hw/mcu_parts.py",
    "hw/mcu_patterns.py",
    "hw/mcu_price.py",
    "hw/mcu_run.py",
    "hw/mcu_units.py",
    "ref/devices/mcuformer.py",
    "tests/claims/mcuformer_mcu.py",
)
OUTSIDE = 2**20  # KB of flash beside the part, so that flash never decides


def traced(depth, *, relative_position):
    """The op program of a network of the published size, one image, its parameters told as weights."""
    subnet = SubnetConfig(192, (3,) * depth, (4.0,) * depth)
    p = init_mcuformer(np.random.default_rng(0), image_size=240, patch=16, depth=depth, rank_ratio=0.9,
                       num_classes=10)  # fmt: skip
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float32), p)
    run = lambda img, params: mcuformer_forward(img, params, subnet=subnet, patch=16, rank_ratio=0.9,
                                                relative_position=relative_position)  # fmt: skip
    return hw.trace(run, jax.ShapeDtypeStruct((240, 240, 3), np.float32), spec, weights=("params",))


def priced(*, depth=12, bits=8):
    """What the target plans: bytes of the arena and of flash, seconds and joules where the arena fits.

    Weights beyond the part's own flash are taken to lie in an external one at the same rate.
    """
    rows = []
    for relative in (False, True):
        program = traced(depth, relative_position=relative)
        for part in ("stm32f746", "stm32h743"):
            for reductions in (False, True):
                switches = dict.fromkeys(("integrate", "decompose_patch", "overwrite"), reductions)
                target = getattr(hw, part)(flash_kb=OUTSIDE, activation_bits=bits, **switches)
                needed, room = target.memory(program).total, target.rooms[0]
                row = {"part": part, "relative": relative, "reductions": reductions, "bytes": needed}
                row |= {"flash": target.flash_bytes(program)}
                if needed > room:
                    row |= {"short": needed - room}
                else:
                    r = hw.estimate(program, target)
                    row |= {"seconds": r.seconds, "joules": r.energy_j}
                rows.append(row)
    return rows


def refused(*, depth=12):
    """What the part says of its own flash, of the network with relative positions: bytes, remedies."""
    try:
        hw.estimate(traced(depth, relative_position=True), hw.stm32f746())
    except hw.DoesNotFit as why:
        return {"needed": int(why.needed), "short": int(why.shortfall), "remedies": list(why.suggestions)}
    return None


def executed(*, image=240, patch=16, seed=0):
    """One layer with relative positions in int8, and again in the arena, dead bytes poisoned."""
    rng = np.random.default_rng(seed)
    subnet = SubnetConfig(192, (3,), (4.0,))
    p = init_mcuformer(rng, image_size=image, patch=patch, depth=1, rank_ratio=0.9, num_classes=10, std=0.05)
    p = jax.tree.map(lambda a: a.astype(np.float32), p)
    run = lambda img, params: mcuformer_forward(img, params, subnet=subnet, patch=patch, rank_ratio=0.9)
    args = rng.random((image, image, 3)).astype(np.float32), p
    program = hw.trace(run, *args, weights=("params",))
    target = hw.stm32f746(flash_kb=OUTSIDE).prepared(program, args)
    want, _ = hw.run_program(program, args, policy=target.formats)
    exact, _ = hw.run_program(program, args)
    got, seen = target.run_arena(program, args)
    plan = target.memory(program)
    rows = max(g.rows for g in plan.segments)
    return {"same": bool(np.array_equal(got, want)), "arena": plan.total, "room": target.rooms[0],
            "touched": max(seen.touched.values()), "snr_db": round(difference(want, exact)["snr_db"], 1),
            "queries": rows}  # fmt: skip


if __name__ == "__main__":
    results = {"priced": priced(), "refused": refused(), "executed": executed()}
    print(results)
    print(store("mcuformer_mcu", results, FILES))
