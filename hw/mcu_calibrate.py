"""Int8 ranges of a program: what float runs have seen, as one affine grid a class of tensors.

Ranges are kept by the running ranges of `quantization`; fills of masks (-1e30, -inf) are no range but a place
beyond it; a softmax or a norm that is not what its shape promises (another epsilon, a mask after the
exponential) is found out by its values and runs as the ops that it is made of.
"""

from dataclasses import dataclass

import numpy as np

from hw.interpret import FloatPolicy, run_program
from hw.mcu_units import Units
from hw.program import Program, is_float
from ref.blocks.quantize import EPS, affine_params, init_range, symmetric_params, update_range

FILL = 1e8  # what is larger stands for infinity: the fill of a mask
MASK_MARGIN = 8.0  # a fill lies so far beyond the range: e^-8 of a probability is below half a code
SOFTMAX = (1 / 256, -128)  # scale and zero point of probabilities
SOFTMAX16 = (2.0**-15, 0)  # and with 16 bits


@dataclass(frozen=True)
class QuantPlan:
    """Scales of a program: {tensor: (scale, zero point)}, one for all tensors that only pass values on.

    rejected: ops at which a softmax or norm is not what its shape promises, by the values seen. bits of the
    weights: 8 or 4, symmetric, one scale an output channel; of activations: 8, or 16 with zero points of 0.
    key: of the program it was made for.
    """

    scales: dict
    rejected: frozenset = frozenset()
    weight_bits: int = 8
    observer: str = "minmax"
    key: tuple = ()
    activation_bits: int = 8

    def __post_init__(self):
        if self.weight_bits not in (4, 8):
            raise ValueError(f"weight_bits must be 4 or 8, got {self.weight_bits}")
        if self.activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, got {self.activation_bits}")
        for i, (scale, zero) in self.scales.items():
            if not (np.isfinite(scale) and scale > 0):
                raise ValueError(f"scale of tensor {i} must be positive and finite, got {scale}")
            if self.activation_bits == 16 and zero:
                raise ValueError(f"zero point of tensor {i} must be 0 with 16 bits, got {zero}")
            if not -128 <= zero <= 127:
                raise ValueError(f"zero point of tensor {i} must be in -128..127, got {zero}")

    def check(self, program):
        """Raise ValueError unless the plan is of this program."""
        if self.key != program_key(program):
            raise ValueError(f"plan was calibrated for another program than {program.name}")


def program_key(program: Program) -> tuple:
    """What tells two programs apart: name, tensors, shapes of the inputs."""
    shapes = tuple(program.tensors[i].shape for i in program.body.inputs)
    return program.name, len(program.tensors), shapes


def calibrate(program: Program, batches, *, observer="minmax", weight_bits=8, activation_bits=8) -> QuantPlan:
    """The plan whose ranges cover what float runs on `batches` have seen.

    Args: batches: sequence of the arguments of a run. observer: of `quantization`: "minmax", the union of the
        batches' ranges, or "ema", their moving average. weight_bits: 8 or 4. activation_bits: 8 or 16.
    Raises: ValueError for no batch, an unknown observer, or arguments that are not finite.
    """
    units = Units(program)
    if observer not in ("minmax", "ema"):
        raise ValueError(f'observer must be "minmax" or "ema", got {observer!r}')
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits}")
    watch = _Watch(units, observer)
    for args in batches:
        run_program(program, args, policy=watch)
        watch.next_batch()
    if not watch.batches:
        raise ValueError("batches must hold the arguments of at least one run")
    rejected = frozenset(watch.rejected)
    units = Units(program, rejected)
    scales = _scales(units, watch, activation_bits)
    return QuantPlan(scales, rejected, weight_bits, observer, program_key(program), activation_bits)


def grid_of(lo, hi, bits) -> tuple[float, int]:
    """(scale, zero point) that cover a range: affine with 8 bits, symmetric with 16."""
    if bits == 16:
        return float(symmetric_params(max(abs(lo), abs(hi)), bits=16, eps=EPS / 256)), 0
    scale, zero = affine_params(lo, hi, bits=8, signed=True)
    return float(scale), int(zero)


def _scales(units, watch, bits):
    """One affine grid a class of tensors; probabilities keep theirs."""
    ranges, filled, members = {}, {}, {}
    for t in units.tensors.values():
        if units.dynamic(t.id):
            r = units.root(t.id)
            members.setdefault(r, []).append(t.id)
            if t.id in watch.states:
                lo, hi = (float(v) for v in watch.states[t.id][:2])
                a, b = ranges.get(r, (lo, hi))
                ranges[r] = min(a, lo), max(b, hi)
            low, high = watch.fills.get(t.id, (False, False))
            a, b = filled.get(r, (False, False))
            filled[r] = a or low, b or high
    softmax = {units.root(u.out) for u in units.of.values() if u.kind == "softmax"}
    scales = {}
    for r, ids in members.items():
        if r not in ranges and not any(filled.get(r, ())):
            continue
        lo, hi = ranges.get(r, (0.0, 0.0))
        lo, hi = lo - MASK_MARGIN * filled[r][0], hi + MASK_MARGIN * filled[r][1]
        if r in softmax and lo >= 0 and hi <= 1.01:
            found = SOFTMAX if bits == 8 else SOFTMAX16
        else:
            found = grid_of(lo, hi, bits)
        scales.update(dict.fromkeys(ids, found))
    return scales


class _Watch(FloatPolicy):
    """Float arithmetic that keeps ranges, fills of masks, and patterns that are not what they look like."""

    def __init__(self, units, observer):
        self.units, self.observer = units, observer
        self.states, self.now, self.fills = {}, {}, {}
        self.rejected, self.env, self.batches = set(), {}, 0

    def enter(self, tensor, value, trace=None):
        if tensor.role == "input" and is_float(tensor.dtype):
            if np.isnan(np.asarray(value, np.float64)).any():
                raise ValueError(f"{tensor.name or 'an input'} holds NaN: a range needs numbers")
        self.note(tensor, value)
        return value

    def compute(self, op, args, ins, outs, trace):
        self.env.update(zip(op.inputs, args, strict=True))
        results = super().compute(op, args, ins, outs, trace)
        for t, r in zip(outs, results, strict=True):
            self.note(t, r)
        unit = self.units.of.get(op.id)
        if unit is not None and unit.kind in ("softmax", "layer_norm"):
            want = _definition(unit, self.env)
            got = np.asarray(results[0], np.float64)
            narrow = outs[0].dtype in ("bfloat16", "float16")
            room = (0.02 if narrow else 2e-3) * max(np.abs(want).max(initial=0.0), 1e-6)
            if not (np.abs(got - want) <= room).all():
                self.rejected.add(op.id)
        return results

    def note(self, tensor, value):
        if not is_float(tensor.dtype) or not self.units.dynamic(tensor.id):
            return
        value = np.asarray(value).astype(np.float64)
        low, high = self.fills.get(tensor.id, (False, False))
        low, high = low or bool((value <= -FILL).any()), high or bool((value >= FILL).any())
        if low or high:
            self.fills[tensor.id] = low, high
        value = value[np.abs(value) < FILL]  # NaN is left out as well
        if value.size:
            lo, hi = self.now.get(tensor.id, (np.inf, -np.inf))
            self.now[tensor.id] = min(lo, value.min()), max(hi, value.max())

    def next_batch(self):
        for i, seen in self.now.items():
            state = self.states.get(i) or init_range()
            self.states[i] = update_range(state, np.array(seen), kind=self.observer)
        self.now, self.batches = {}, self.batches + 1


def _definition(unit, env):
    """What a softmax or a norm should give for the values that it reads."""
    x = np.asarray(env[unit.source], np.float64)
    with np.errstate(all="ignore"):
        if unit.kind == "softmax":
            e = np.exp(x - x.max(-1, keepdims=True, initial=-np.inf))
            return e / e.sum(-1, keepdims=True)
        d = x - x.mean(-1, keepdims=True) if unit.center else x
        y = d / np.sqrt((d * d).mean(-1, keepdims=True))
        gamma, beta = row(env, unit.gamma, x.shape[-1], 1.0), row(env, unit.beta, x.shape[-1], 0.0)
        return y * gamma + beta


def row(env, i, n, default):
    """A static vector that an op applies to every row."""
    if i is None:
        return np.full(n, default)
    v = np.asarray(env[i], np.float64)
    return np.full(n, v.reshape(-1)[0]) if v.size == 1 else v.reshape(-1, v.shape[-1])[0]
