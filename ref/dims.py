"""The shape binder: one line checks every argument of a function and names its axes.

Works on NumPy arrays and JAX tracers alike: it reads nothing but `.shape`.
"""

import numpy as np


def dims(**arrays):
    """dims(q=(q, "... L D"), k=(k, "... S D")) -> {"...": (2,), "L": 7, "D": 4, "S": 9}.

    Each argument is (array, spec). A spec lists the axes by name, an integer fixes a size, a leading `...`
    stands for any number of axes, equal in every array that has it.
    Returns: the size of every named axis, and under "..." the tuple of leading axes.
    Raises: ValueError that names the array, the axis, and what it disagrees with.
    """
    size, owner = {}, {}

    def bind(axis, n, name, where):
        if axis.isdecimal():
            if n != int(axis):
                raise ValueError(f"{name}{where} = {n}, but must be {axis}")
        elif size.setdefault(axis, n) != n:
            raise ValueError(f"{name}{where} = {n}, but axis {axis} is {size[axis]} in {owner[axis]}")
        owner.setdefault(axis, name)

    for name, (x, spec) in arrays.items():
        axes, shape = spec.split(), tuple(x.shape)
        lead = len(shape) - len(axes) + 1 if axes[:1] == ["..."] else 0
        if lead < 0 or (axes[:1] != ["..."] and len(shape) != len(axes)):
            raise ValueError(f"{name} must have shape [{', '.join(axes)}], got {list(shape)}")
        if axes[:1] == ["..."]:
            bind("...", shape[:lead], name, f".shape[:{lead}]")
            axes = axes[1:]
        for i, axis in enumerate(axes, start=lead):
            bind(axis, shape[i], name, f".shape[{i}]")
    return size


def float64(*arrays):
    """The arrays in float64; subclasses of ndarray stay, so that counting arrays go through ref."""
    out = tuple(np.asanyarray(x, np.float64) for x in arrays)
    return out[0] if len(out) == 1 else out
