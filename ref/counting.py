"""An ndarray that counts: multiply-accumulates, and elements that move between main memory and the chip.

`count(tally, x)` puts x into main memory. Indexing such an array loads a tile (reads), assigning to a slice
of it stores one (writes), `np.zeros_like` and its kin allocate beside it and write; whatever is computed
lives on the chip and moves for free. Run any function of ref on counted arrays to measure what its closed
form claims.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Tally:
    """Running counts of elements and multiply-accumulates, and the largest array made on the chip."""

    reads: int = 0
    writes: int = 0
    macs: int = 0
    largest: int = 0

    @property
    def total(self):
        """Elements moved either way."""
        return self.reads + self.writes


class Counted(np.ndarray):
    """An array in main memory (`off_chip`) or on the chip, tied to a `Tally`."""

    def __array_finalize__(self, parent):
        self.tally = getattr(parent, "tally", None)
        self.off_chip = getattr(parent, "off_chip", False)

    def __getitem__(self, index):
        out = super().__getitem__(index)
        if self.off_chip and isinstance(out, np.ndarray):
            self.tally.reads += out.size
            out.off_chip = False
        return out

    def __setitem__(self, index, value):
        plain = self.view(np.ndarray)  # ndarray's own assignment would fetch the target through __getitem__
        if self.off_chip:
            self.tally.writes += plain[index].size
        plain[index] = value

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        tally = next(x.tally for x in (*inputs, *(out or ())) if isinstance(x, Counted))
        if ufunc is np.matmul and method == "__call__":
            tally.macs += result.size * plain[0].shape[-1]
        for x in inputs:
            if isinstance(x, Counted) and x.off_chip:  # a whole array used at once is read whole
                tally.reads += x.size
        if not isinstance(result, np.ndarray | np.generic):
            return result
        return _on_chip(tally, result) if out is None else out[0]

    def __array_function__(self, func, types, args, kwargs):
        if func in (np.empty_like, np.zeros_like, np.ones_like, np.full_like):
            made = func(args[0].view(np.ndarray), *args[1:], **kwargs)
            if not args[0].off_chip:
                return _on_chip(self.tally, made)
            self.tally.writes += made.size * (func is not np.empty_like)
            return _off_chip(self.tally, made)
        if func in (np.einsum, np.dot, np.tensordot, np.inner, np.vdot):
            raise NotImplementedError(f"counting arrays know matmul (@) only, not np.{func.__name__}")
        out = super().__array_function__(func, types, args, kwargs)
        if isinstance(out, Counted) or not isinstance(out, np.ndarray):
            return out  # a view stays where its array is
        for x in args:
            if isinstance(x, Counted) and x.off_chip:
                self.tally.reads += x.size
        return _on_chip(self.tally, out)


def count(tally, *arrays):
    """The arrays as counted arrays in main memory, float64."""
    out = tuple(_off_chip(tally, np.array(x, np.float64)) for x in arrays)
    return out[0] if len(out) == 1 else out


def _off_chip(tally, x):
    x = x.view(Counted)
    x.tally, x.off_chip = tally, True
    return x


def _on_chip(tally, x):
    x = np.asarray(x).view(Counted)
    x.tally, x.off_chip = tally, False
    tally.largest = max(tally.largest, x.size)
    return x
