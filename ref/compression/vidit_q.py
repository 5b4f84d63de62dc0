"""ViDiT-Q: 8 and 4 bit diffusion transformers, a scale a token, balanced channels, bits where they matter.

Source: Zhao et al. 2025 (arXiv 2406.02540) and both generations of the code released with it (2024: scales a
channel by range of time steps and mixed precision; 2025: one mask and a rotation). Functions compute in the
dtype of their input, at least float32: the number format is the subject. Where we differ from the code:
tokens of different inputs never share a scale (pool_batch=True does as the code), a step below eps is raised
by itself, and a rotated weight is quantised once; `released_rotated_linear` is the released layer.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ref.blocks.bit_plan import LayerSensitivity, allocate_bits, sensitivity
from ref.blocks.quantize import init_range, update_range
from ref.blocks.rotation import block_for, hadamard_matrix, hadamard_transform, rotation_for
from ref.checks import check_share, one_of
from ref.dims import dims
from ref.example import Example
from ref.models.dit import (
    DiTBlockParams,
    DiTConfig,
    DiTParams,
    ddim_sample,
    dit_block,
    dit_forward,
    dit_macs,
    init_dit,
    quantizable,
)
from ref.models.dit_plan import published_plan, quantizable_names, vidit_q_bytes

__all__ = [
    "CalibState", "DiTBlockParams", "DiTConfig", "DiTParams", "LayerSensitivity", "QDiT", "QParams",
    "allocate_bits", "apply_params", "block_for", "calibrate", "calibrate_act_max",
    "calibrate_act_params", "channel_mask", "channel_scale", "codes", "ddim_sample", "dit_block",
    "dit_forward", "dit_macs", "dynamic_channel_scale", "example", "fake_quant", "hadamard_matrix",
    "hadamard_transform", "init_dit", "int_matmul", "published_plan", "qdit_project", "quant_params",
    "quantizable", "quantizable_names", "quantize_dit", "quantized_linear", "released_rotated_linear",
    "rotation_for", "sensitivity", "timestep_range", "update_act_max", "vidit_q_bytes",
]  # fmt: skip
GRANULARITIES = ("tensor", "token", "channel")
STEPS = 1000  # time steps run from 0 to 1000


class QParams(NamedTuple):
    """x ~ (q - zero) delta for q in qmin..qmax; delta and zero keep the reduced axes with length 1."""

    delta: np.ndarray
    zero: np.ndarray
    qmin: int
    qmax: int


class CalibState(NamedTuple):
    """What calibration saw: act_max, a {layer: [C]} for each range of steps; the exponent of the scales."""

    ranges: tuple
    act_max: tuple[dict, ...]
    alpha: float


class QDiT(NamedTuple):
    """A quantised network: parameters, plans, and {layer: (dequantised w [out, in], scale)} a range."""

    params: DiTParams
    ranges: tuple
    plans: tuple[dict, ...]
    weights: tuple[dict, ...]


def quant_params(x, *, bits, granularity="tensor", symmetric=False, pool_batch=False, eps=1e-6) -> QParams:
    """The grid of each group: delta = (hi - lo) / (2^bits - 1), zero = rint(-lo / delta), 0 within [lo, hi].

    granularity "tensor"; "token": x [B, N, C], each (batch, token), or each token over the batch with
    pool_batch; "channel": x [out, in], each row. symmetric: delta = max |x| / (2^(bits-1) - 1), zero 0, grid
    -2^(bits-1) .. 2^(bits-1) - 1. A delta below eps becomes eps.
    Raises: ValueError for bits outside 2..16, an unknown granularity, x not finite, a group without numbers.
    """
    x, axes = _check_quant(x, bits, granularity, pool_batch)
    lo, hi = np.minimum(x.min(axis=axes, keepdims=True), 0), np.maximum(x.max(axis=axes, keepdims=True), 0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        delta = np.maximum(np.maximum(-lo, hi) / x.dtype.type(top), x.dtype.type(eps))
        return QParams(delta, np.zeros_like(delta), -top - 1, top)
    delta = np.maximum((hi - lo) / x.dtype.type(2**bits - 1), x.dtype.type(eps))
    return QParams(delta, np.rint(-lo / delta), 0, 2**bits - 1)


def fake_quant(x, *, bits, granularity="tensor", symmetric=False, pool_batch=False, eps=1e-6):
    """x on its own grid: (clip(rint(x / delta) + zero) - zero) delta, in the shape and dtype of x."""
    params = quant_params(
        x, bits=bits, granularity=granularity, symmetric=symmetric, pool_batch=pool_batch, eps=eps
    )
    return apply_params(x, params)


def apply_params(x, params: QParams):
    """x on a given grid: what static quantisation does."""
    return (codes(x, params) - params.zero) * params.delta


def codes(x, params: QParams):
    """clip(rint(x / delta) + zero, qmin, qmax), in the dtype of x."""
    return np.clip(np.rint(x / params.delta) + params.zero, params.qmin, params.qmax)


def int_matmul(qx, px: QParams, qw, pw: QParams, *, bias=None):
    """x w^T of quantised matrices with integer sums: qx [..., C], qw [out, C] -> [..., out] float32.

    dx dw (sum qx qw - zx sum qw - zw sum qx + C zx zw) + bias, the bracket in int32.
    Raises: ValueError if the codes' ranges could overflow int32 at this C.
    """
    n = dims(qx=(qx, "... C"), qw=(qw, "out C"))
    worst = n["C"] * (px.qmax - px.qmin) * (pw.qmax - pw.qmin)
    if worst >= 2**31:
        raise ValueError(f"C={n['C']} products of these codes may reach {worst}, beyond int32")
    zx, zw = np.asarray(px.zero, np.int64), np.asarray(pw.zero, np.int64).reshape(-1)
    qx, qw = np.asarray(qx, np.int64), np.asarray(qw, np.int64)
    total = qx @ qw.T - zx * qw.sum(axis=1) - zw * qx.sum(axis=-1, keepdims=True) + n["C"] * zx * zw
    y = total.astype(np.int32) * (px.delta * pw.delta.reshape(-1))
    return (y if bias is None else y + bias).astype(np.float32)


def update_act_max(act_max, x, *, momentum=0.95):
    """momentum act_max + (1 - momentum) mean over B of max over N of |x|, [C]: x [B, N, C].

    act_max None: the first batch alone.
    """
    n = dims(x=(x, "B N C"))
    if not 0 <= momentum <= 1 or min(n["B"], n["N"]) < 1:
        raise ValueError(f"need momentum in [0, 1] and a token in x, got {momentum} and x {list(x.shape)}")
    new = np.abs(x).max(axis=1).mean(axis=0)
    return new if act_max is None else momentum * act_max + (1 - momentum) * new


def calibrate_act_max(batches, *, momentum=0.95, eps=1e-5):
    """`update_act_max` over batches [n, B, N, C] in order, all of one range of steps; zeros become eps."""
    act_max = None
    for x in batches:
        act_max = update_act_max(act_max, x, momentum=momentum)
    if act_max is None:
        raise ValueError("batches must hold at least one batch")
    return np.where(act_max == 0, act_max.dtype.type(eps), act_max)


def calibrate_act_params(batches, *, bits, momentum=0.95) -> QParams:
    """One static grid for all tokens: running minimum and maximum over batches [n, B, N, C]."""
    if len(batches) < 1:
        raise ValueError("batches must hold at least one batch")
    state = init_range()
    for x in batches:
        state = update_range(state, x, momentum=momentum)
    edges = np.array([[[state.lo, state.hi]]], np.asarray(batches).dtype)
    return quant_params(edges, bits=bits)


def channel_scale(act_max, weight, *, alpha):
    """s = act_max^alpha / max_out |W|^(1 - alpha), [C]: x / s and W s have the product of x and W.

    act_max [C] > 0, weight [out, C]. Raises: ValueError for alpha outside [0, 1], or a dead channel.
    """
    wmax = _check_balance(act_max, weight, alpha)
    return act_max**alpha / wmax ** (1 - alpha)


def dynamic_channel_scale(x, weight, *, alpha):
    """`channel_scale` with the mean over B of (max over N of |x|)^alpha, x at hand, for act_max^alpha."""
    n = dims(x=(x, "B N C"))
    if min(n["B"], n["N"]) < 1:
        raise ValueError(f"x must hold a token, got {list(x.shape)}")
    top = np.maximum(np.abs(x).max(axis=1), x.dtype.type(1e-5))
    return (top**alpha).mean(axis=0) / _check_balance(top[0], weight, alpha) ** (1 - alpha)


def channel_mask(act_max, weight, *, alpha):
    """max_out |W|^alpha / act_max^(1 - alpha), [C]: the 2025 code's balance, x mask and W / mask.

    It is 1 / channel_scale with alpha and 1 - alpha exchanged.
    """
    wmax = _check_balance(act_max, weight, alpha)
    return wmax**alpha / act_max ** (1 - alpha)


def quantized_linear(x, w, b, *, w_bits=8, a_bits=8, scale=None, mask=None, signs=None,
                     act_params: QParams | None = None):  # fmt: skip
    """x w^T + b with both on their grids: x [B, N, C] a grid a token, w [out, C] a grid a row -> [B, N, out].

    scale [C]: x / scale, w scale; or mask [C]: x mask, w / mask. signs [C]: then both are rotated (full width
    if it has a Hadamard matrix, else the largest block that divides it). act_params: a static grid for x.
    Raises: ValueError for scale and mask together, or not positive, and as `quant_params`.
    """
    given = {"b": (b, "out"), "scale": (scale, "C"), "mask": (mask, "C"), "signs": (signs, "C")}
    dims(x=(x, "B N C"), w=(w, "out C"), **{k: v for k, v in given.items() if v[0] is not None})
    x, w_hat = _balanced(x, scale, mask, signs), _quantized_weight(w, w_bits, scale, mask, signs)
    params = quant_params(x, bits=a_bits, granularity="token") if act_params is None else act_params
    y = apply_params(x, params) @ w_hat.T
    return y if b is None else y + b


def released_rotated_linear(x, w, b, act_max, signs, *, w_bits, a_bits, alpha):
    """(y, dequantised weight [out, C]) of the released layer: float32, w quantised before and after rotation.

    Only the product with Q = diag(signs) H / sqrt(C) is in float64. After the first rounding the rotated
    weight lies on ties of the second, so another precision gives other codes.
    """
    f32 = lambda t: np.asarray(t, np.float32)
    x, w, mask = f32(x), f32(w), f32(channel_mask(f32(act_max), f32(w), alpha=alpha))
    C = dims(x=(x, "B N C"), w=(w, "out C"), signs=(signs, "C"))["C"]
    if b is not None:
        dims(w=(w, "out C"), b=(b, "out"))
    Q = np.asarray(signs, np.float64)[:, None] * hadamard_matrix(C) / np.sqrt(C)
    rotate = lambda t: f32(t.astype(np.float64) @ Q)
    once = fake_quant(w / mask, bits=w_bits, granularity="channel")
    w_q = fake_quant(rotate(once), bits=w_bits, granularity="channel")
    y = fake_quant(rotate(x * mask), bits=a_bits, granularity="token") @ w_q.T
    return (y if b is None else y + f32(b)), w_q


def timestep_range(t, ranges):
    """The index of the range (first, last), both included, that holds step t (499.5 lies in that of 499).

    Raises: ValueError unless the ranges cover 0..1000 without gap or overlap, or for another t.
    """
    ends = sorted(tuple(r) for r in ranges)
    joined = all(b == a + 1 for (_, a), (b, _) in pairwise(ends))
    if not ends or ends[0][0] != 0 or ends[-1][1] != STEPS or not joined or any(a > b for a, b in ends):
        raise ValueError(f"ranges must cover 0..{STEPS} one after the other, got {ranges}")
    if not 0 <= t <= STEPS:
        raise ValueError(f"t must be in 0..{STEPS}, got {t}")
    return next(i for i, (a, b) in enumerate(ranges) if a <= t < b + 1)


def calibrate(model_fn, samples, *, ranges, alpha) -> CalibState:
    """Largest activations of every layer and range, by running the network.

    model_fn(sample, project) runs it on one sample with project(name, x, w, b) for its linear maps; samples:
    (t, sample) pairs. Raises: ValueError for a range without a sample, and as `timestep_range`.
    """
    seen = tuple({} for _ in ranges)
    for t, sample in samples:
        found = seen[timestep_range(t, ranges)]

        def watch(name, x, w, b, found=found):
            found[name] = update_act_max(found.get(name), x)
            return x @ w + b

        model_fn(sample, watch)
    if not all(seen):
        raise ValueError(f"samples must hold a step of every range of {ranges}")
    floor = lambda a: np.where(a == 0, 1e-5, a)
    return CalibState(tuple(ranges), tuple({n: floor(a) for n, a in found.items()} for found in seen), alpha)


def quantize_dit(params: DiTParams, calib: CalibState | None, plan, *, ranges=((0, STEPS),)) -> QDiT:
    """Every planned layer on its grid, a set of weights for each range of steps.

    plan: {layer: (w_bits, a_bits)}, the same in all ranges, or a sequence of them; a layer that is missing
    stays as it is. calib None: no balancing of channels (ranges then says which there are).
    Raises: ValueError for a layer that the network does not have.
    """
    ranges = ranges if calib is None else calib.ranges
    plans = tuple(plan for _ in ranges) if isinstance(plan, dict) else tuple(plan)
    maps, weights = quantizable(params), []
    unknown = sorted({n for p in plans for n in p} - set(maps))
    if len(plans) != len(ranges) or unknown:
        need = f"plan must hold one dictionary for each of {len(ranges)} ranges, of the network's layers"
        raise ValueError(f"{need}, got {len(plans)} with unknown layers {unknown}")
    for i, each in enumerate(plans):
        made = {}
        for name, (w_bits, _) in each.items():
            w = np.asarray(maps[name]).T
            s = None if calib is None else channel_scale(calib.act_max[i][name], w, alpha=calib.alpha)
            made[name] = _quantized_weight(w, w_bits, s, None, None), s
        weights.append(made)
    return QDiT(params, tuple(ranges), plans, tuple(weights))


def qdit_project(qdit: QDiT, t, *, act_params=None):
    """project(name, x, w, b) for `dit_forward` at step t: planned layers quantised, the others exact.

    act_params: {layer: QParams} of static grids, or None for a grid a token.
    """
    i = timestep_range(t, qdit.ranges)

    def project(name, x, w, b):
        if name not in qdit.plans[i]:
            return x @ w + b
        w_hat, s = qdit.weights[i][name]
        x = _balanced(x, s, None, None)
        static = None if act_params is None else act_params[name]
        grid = static or quant_params(x, bits=qdit.plans[i][name][1], granularity="token")
        return apply_params(x, grid) @ w_hat.T + b

    return project


def _balanced(x, scale, mask, signs):
    """Activations after channel scale or mask, and rotation."""
    if scale is not None and mask is not None:
        raise ValueError("give scale or mask, not both: each balances the channels")
    if any(t is not None and not (np.asarray(t) > 0).all() for t in (scale, mask)):
        raise ValueError("scale and mask must be positive")
    if scale is not None:
        x = x / scale
    if mask is not None:
        x = x * mask
    return x if signs is None else hadamard_transform(x, signs=signs, block=block_for(x.shape[-1]))


def _quantized_weight(w, bits, scale, mask, signs):
    """The dequantised weight [out, C] that goes with `_balanced` activations."""
    w = w if scale is None else w * scale
    w = w if mask is None else w / mask
    w = w if signs is None else hadamard_transform(w, signs=signs, block=block_for(w.shape[-1]))
    return fake_quant(w, bits=bits, granularity="channel")


def _check_quant(x, bits, granularity, pool_batch):
    """(x in float32 or better, the axes that a group reduces over)."""
    x = np.asanyarray(x)
    x = x.astype(np.result_type(x, np.float32), copy=False)
    if not (2 <= bits <= 16 and bits == int(bits)):
        raise ValueError(f"bits must be in 2..16, got {bits}")
    one_of("granularity", granularity, GRANULARITIES)
    axes = tuple(range(x.ndim))
    if granularity == "token":
        dims(x=(x, "B N C"))
        axes = (0, 2) if pool_batch else (2,)
    if granularity == "channel":
        dims(x=(x, "out in"))
        axes = (1,)
    if not np.isfinite(x).all() or any(x.shape[a] == 0 for a in axes):
        raise ValueError(f"x must be finite and its groups not empty, got shape {list(x.shape)}")
    return x, axes


def _check_balance(act_max, weight, alpha):
    """Largest |W| of every channel [C]."""
    dims(act_max=(act_max, "C"), weight=(weight, "out C"))
    check_share("alpha", alpha)
    if not (np.asarray(act_max) > 0).all():
        raise ValueError("act_max must be positive")
    wmax = np.abs(weight).max(axis=0)
    if not (wmax > 0).all():
        raise ValueError(f"weight has a column of zeros or NaN: channel {int(np.argmin(wmax))}")
    return wmax


def example(seed=0):
    """Tokens of a language model with its outlier channels, a layer on them, and one block of a small DiT."""
    from ref.data import hidden_states

    rng, f32 = np.random.default_rng(seed), np.float32
    x = hidden_states()[None, 8 * seed : 8 * seed + 8, :64].astype(f32)
    w, b = (rng.standard_normal((12, 64)) / 8).astype(f32), rng.standard_normal(12).astype(f32)
    act_max = calibrate_act_max(x[None])
    px, pw = quant_params(x, bits=8, granularity="token"), quant_params(w, bits=8, granularity="channel")
    cfg = DiTConfig(dim=16, depth=1)
    block = init_dit(rng, cfg, std=0.2, zero=False).blocks[0]
    tokens, c = rng.standard_normal((2, 4, 16)), rng.standard_normal((2, 16))
    return [
        Example("quant_params", (x,), {"bits": 8, "granularity": "token"}, ()),
        Example("fake_quant", (w,), {"bits": 4, "granularity": "channel"}, ()),
        Example("int_matmul", (codes(x, px).astype(np.int32), px, codes(w, pw).astype(np.int32), pw), {}, ()),
        Example("update_act_max", (act_max, x), {}, (0, 1)),
        Example("calibrate_act_max", (np.stack([x, 2 * x]),), {}, (0,)),
        Example("channel_scale", (act_max, w), {"alpha": 0.3}, (0, 1)),
        Example("channel_mask", (act_max, w), {"alpha": 0.5}, (0, 1)),
        Example("hadamard_transform", (x,), {"signs": rotation_for(64, seed)[1].astype(f32)}, (0,)),
        Example("quantized_linear", (x, w, b), {"w_bits": 4}, ()),
        Example("dit_block", (tokens, c, block, cfg), {}, (0, 1, 2)),
    ]
