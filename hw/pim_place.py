"""Where a program's bytes lie in the banks of a PIM machine, and by how many they do not fit."""

from dataclasses import replace
from math import ceil, prod

from hw.errors import DoesNotFit
from hw.liveness import liveness, peak_bytes
from hw.pim_cycles import weights_rows
from hw.program import ConvDims, MatmulDims, is_float, walk
from hw.target import Placement

VALUE_BYTES = 2  # a bfloat16 or float16 number


def stored(t):
    """Bytes of a tensor in the banks: two a float, wider floats rounded; integers keep theirs."""
    return min(t.size * VALUE_BYTES, t.nbytes) if is_float(t.dtype) else t.nbytes


def bank_bytes(program, target) -> dict[int, int]:
    """{tensor: bytes in the fullest bank} of weights and constants: whole rows for those that a product
    multiplies with, even shares of the rest.
    """
    laid = {}
    for op in walk(program.body):
        d = op.dims
        if isinstance(d, MatmulDims) and op.kind == "matmul":
            sides = ((op.inputs[1], d.n), (op.inputs[0], d.m))
            k, b = d.k, d.b * d.groups
        elif isinstance(d, ConvDims):
            sides = ((op.inputs[1], d.out_channels // d.groups),)
            k, b = d.in_channels // d.groups * prod(d.kernel), d.groups
        else:
            continue
        for i, m in sides:
            t = program.tensors[i]
            if t.role in ("weight", "const") and is_float(t.dtype) and m and k and t.size > 1:
                laid[i] = max(laid.get(i, 0), b * weights_rows(m, k, target) * target.row_bytes)
    banks = target.channels * target.banks
    for t in program.tensors.values():
        if t.role in ("weight", "const") and t.id not in laid and t.size > 1:
            laid[t.id] = ceil(stored(t) / banks)
    return laid


def place_tensors(program, target) -> Placement:
    """Bytes of the fullest bank: weights as they are laid out, and an even share of what else is alive.

    Raises: DoesNotFit naming the largest tensors, the exact shortfall of the bank, and what would help.
    """
    used = replace(target, channels=1) if target.placement == "single_channel" else target
    laid, banks, room = bank_bytes(program, used), used.channels * used.banks, used.capacity["bank"]
    held = sum(t.nbytes for t in program.tensors.values() if t.role in ("weight", "const"))
    rest = max(peak_bytes(program) - held, 0)
    floats = [t for t, _, _ in liveness(program) if t.role not in ("weight", "const")]
    own = sum(t.nbytes for t in floats)
    share = sum(stored(t) for t in floats) / own if own else 1.0
    live = ceil(rest * share / banks)
    needed = sum(laid.values()) + live
    total = sum(stored(program.tensors[i]) for i in laid) + ceil(rest * share)
    if needed > room:
        words = _remedies(program, laid, rest * share, target, needed, room)
        for t in (program.tensors[i] for i in laid if used is not target):
            if (whole := stored(t)) > room * banks:
                largest = [(t.name or t.role, t.shape, whole)]
                raise DoesNotFit(target.name, "channel", whole, room * banks, largest, words)
        raise DoesNotFit(target.name, "bank", needed, room, _largest(program, laid, banks), words)
    return Placement({"bank": (needed, room)}, total)


def _largest(program, laid, banks, top=8):
    sizes = [(program.tensors[i], n) for i, n in laid.items()]
    sizes += [(t, ceil(stored(t) / banks)) for t, _, _ in liveness(program) if t.id not in laid]
    sizes.sort(key=lambda x: -x[1])
    return [(t.name or f"{t.role} {t.id}", t.shape, n) for t, n in sizes[:top]]


def _remedies(program, laid, live, target, needed, room):
    """What would make it fit: all channels, so many channels, so many machines, a smaller batch if weights
    are not it.
    """
    words, auto = [], 'placement="auto"' if target.placement == "single_channel" else ""
    n = target.channels if auto else 2 * target.channels
    while n <= 4096 * target.channels:
        more = replace(target, channels=n, placement="auto")
        banks = n * target.banks
        if sum(bank_bytes(program, more).values()) + ceil(live / banks) <= room:
            words.append(", ".join(x for x in (auto, f"channels={n}" * (n > target.channels)) if x))
            break
        n *= 2
    words.append(f"{ceil(needed / room)} machines, a share of the layers each")
    if sum(laid.values()) <= room:
        words.append("a smaller batch or a shorter context")
    if target.reserved_bytes and needed <= room + target.reserved_bytes:
        words.append("reserved_bytes=0")
    return tuple(words)
