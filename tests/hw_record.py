"""`Cost`: what a technique expects of the hardware, written beside its tests and checked by the generic ones.

A test module holds `HW = {name of a core function: Cost(...)}`; tests/test_layers_hw.py compares it with the
op program, with the counting ndarray through ref and with XLA.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Cost:
    """Closed forms in an example's own arguments (NumPy, as ref gets them), called as macs(*args, **kwargs).

    macs: multiply-accumulates of accel's function, its padding and tiles included. bytes: what must move in
    float32 whatever the machine: every argument once and every result once. bound: {target: what limits it
    there} of `estimate`, at the size of the example or of `large`, (dtype, shape) specs or arrays, called
    with `options`. ref: None if ref multiplies as often; its own closed form; or the reason why it cannot be
    counted, as text.
    """

    macs: Callable
    bytes: Callable
    bound: dict = field(default_factory=dict)
    large: tuple | None = None
    options: dict = field(default_factory=dict)
    ref: Callable | str | None = None


def record(technique) -> dict:
    """The HW record of a technique's test module; AssertionError if there is none."""
    module = importlib.import_module(f"tests.{technique.part}.test_{technique.slug}")
    assert hasattr(module, "HW"), f"{module.__name__} must state HW = {{function: Cost(...)}}"
    return module.HW


def bound_call(fn, args, kwargs):
    """(function of the arguments that hold arrays, those arguments): the others are options."""
    import jax

    has = [any(hasattr(x, "dtype") for x in jax.tree.leaves(a)) for a in args]
    dynamic = [a for a, h in zip(args, has, strict=True) if h]

    def call(*given):
        given = iter(given)
        return fn(*(next(given) if h else a for a, h in zip(args, has, strict=True)), **kwargs)

    return call, dynamic


def size(*arrays, width=4) -> int:
    """Bytes of arrays whose floats and integers have `width` bytes; flags 1, int8 1."""
    narrow = lambda x: np.asarray(x).dtype.itemsize == 1
    return sum(np.size(x) * (1 if narrow(x) else width) for x in arrays)


_DOT = re.compile(
    r"stablehlo\.dot_general .*?contracting_dims = \[([\d, ]*)\] x .*?"
    r": \(tensor<([^>]*)>, tensor<[^>]*>\) -> tensor<([^>]*)>"
)
_CALL = re.compile(r"(?:func\.call|call) @([\w.$-]+)\(")
_FUNC = re.compile(r"func\.func \w* ?@([\w.$-]+)\(")


def lowered_macs(text: str) -> int:
    """Multiply-accumulates of the products in a StableHLO module, calls followed. Loops are not allowed."""
    bodies, name = {}, None
    for line in text.splitlines():
        if found := _FUNC.search(line):
            name = found[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    sizes = lambda t: [int(n) for n in t.split("x")[:-1]]

    def macs(name):
        total = 0
        for line in bodies[name]:
            if found := _DOT.search(line):
                axes, left, out = found.groups()
                contracted = [sizes(left)[int(a)] for a in axes.split(",") if a.strip()]
                total += int(np.prod([*contracted, *sizes(out)], dtype=np.int64))
            elif "stablehlo.convolution" in line:
                raise NotImplementedError("convolutions are compared with direct loops instead")
            elif found := _CALL.search(line):
                total += macs(found[1])
        return total

    return macs("main")
