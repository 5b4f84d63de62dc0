"""Values of a program on a PIM machine: products in the units' order of sums, everything else outside.

A value is a bfloat16 (float16) number carried in float64. A product or a convolution is computed column by
column as the banks do it (`ref.blocks.lanes`); any other op exactly on its operands and rounded once.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from hw import numerics
from hw.formats import BF16, FP16, FormatPolicy
from hw.program import is_float
from ref.blocks.lanes import dot_bf16_tree, mac_fp16, vmm_bf16

TABLE = 1024  # entries of an activation table in DRAM rows
TABLE_RANGE = (-8.0, 8.0)  # our choice: the device's is not published
TABULATED = {"tanh", "logistic", "erf"}  # what is flat beyond the range, up to 2^-10


@dataclass(frozen=True)
class PimPolicy(FormatPolicy):
    """The arithmetic of a `Pim`: fmt "bf16_tree" or "fp16_lane", tiles of the buffer where sums are drained
    between them, and functions from tables where the machine does so.
    """

    fmt: str = "bf16_tree"
    lanes: int = 16
    tile: int | None = None  # inputs to a drained partial sum; None: the register lives through all tiles
    acc: str = "f32"
    tables: bool = False

    def compute(self, op, args, ins, outs, trace):
        """As `FormatPolicy`, but convolutions as products of patches and tabulated functions from a table."""
        if op.prim == "conv_general_dilated" and is_float(outs[0].dtype):
            if op.attrs["batch_group_count"] == 1:
                exact = self._conv(op, args, outs)
                return [self.format(outs[0]).round(exact, trace)]
        if self.tables and op.prim in TABULATED and is_float(outs[0].dtype):
            fn = lambda x: numerics.compute(op, [x], [_Wide64(x.shape)])[0]
            return [table_lookup(fn, args[0])]
        return super().compute(op, args, ins, outs, trace)

    def multiply(self, x, w):
        """x [M, K] w [K, N] as the units compute it, float64."""
        if not x.size or not w.size:
            return np.zeros((x.shape[0], w.shape[1]))
        if self.fmt == "fp16_lane":
            got = mac_fp16(x, w, lanes=self.lanes)
        elif self.tile is None:
            got = dot_bf16_tree(x, w, lanes=self.lanes, acc=self.acc)
        else:
            got = vmm_bf16(x, w, lanes=self.lanes, tile=self.tile, acc=self.acc)
        return got.astype(np.float64)

    def _dot(self, args, ins, outs, op):
        if not is_float(outs[0].dtype) or not all(is_float(t.dtype) for t in ins[:2]):
            return None
        a, b = (np.asarray(x, np.float64) for x in numerics.dot_operands(op, args))
        rows = [self.multiply(x, w) for x, w in zip(a, b, strict=True)]
        out = np.stack(rows) if rows else np.zeros((0, a.shape[1], b.shape[2]))
        return [out.reshape(outs[0].shape)]

    def _conv(self, op, args, outs):
        a = op.attrs
        x = np.asarray(args[0], np.float64).transpose(a["lhs_spec"])
        w = np.asarray(args[1], np.float64).transpose(a["rhs_spec"])
        places = [outs[0].shape[i] for i in a["out_spec"][2:]]
        for d in range(x.ndim - 2):
            x = numerics._dilate(x, d + 2, a["lhs_dilation"][d], a["padding"][d])
        n, groups = x.shape[0], a["feature_group_count"]
        taps = []
        for tap in product(*(range(k) for k in w.shape[2:])):
            cut = [slice(None), slice(None)]
            for d, t in enumerate(tap):
                start, stride = t * a["rhs_dilation"][d], a["window_strides"][d]
                cut.append(slice(start, start + (places[d] - 1) * stride + 1 if places[d] else start, stride))
            taps.append(x[tuple(cut)].reshape(n, groups, x.shape[1] // groups, -1))
        patches = np.stack(taps, axis=3).reshape(n, groups, -1, taps[0].shape[-1])  # [N, G, C taps, places]
        kernels = w.reshape(groups, w.shape[0] // groups, patches.shape[2])
        out = np.zeros((n, groups, kernels.shape[1], patches.shape[3]))
        for i, g in np.ndindex(n, groups):
            out[i, g] = self.multiply(kernels[g], patches[i, g])
        return out.reshape(n, w.shape[0], *places).transpose(np.argsort(a["out_spec"]))


@dataclass(frozen=True)
class _Wide64:
    shape: tuple
    dtype: str = "float64"


def policy(target) -> PimPolicy:
    """The arithmetic that `execute` uses on a `Pim`."""
    half = target.fmt == "fp16_lane"
    return PimPolicy(
        activations=FP16 if half else BF16,
        name=f"{target.fmt}, {target.lanes} lanes",
        fmt=target.fmt,
        lanes=target.lanes,
        tile=target.tile if target.order == "tile_outer" and not half else None,
        acc=target.acc,
        tables=target.activation == "table",
    )


def table_lookup(fn, x, *, entries=TABLE, span=TABLE_RANGE):
    """fn(x) from a table of bfloat16 entries over span, by linear interpolation, in bfloat16.

    Beyond the span the end's value is taken; NaN stays NaN.
    """
    lo, hi = span
    if entries < 2 or not lo < hi:
        raise ValueError(f"a table needs at least 2 entries and lo < hi, got {entries=}, {span=}")
    step = (hi - lo) / entries
    held = BF16.quantise(fn(lo + step * np.arange(entries + 1)))
    at = np.clip((np.asarray(x, np.float64) - lo) / step, 0, entries)
    nan = np.isnan(at)
    i = np.minimum(np.where(nan, 0, at).astype(np.int64), entries - 1)
    value = held[i] + (at - i) * (held[i + 1] - held[i])
    return BF16.quantise(np.where(nan, np.nan, value))
