"""Convolutions and what goes with them, on maps with channels last: [B, H, W, C]; weights OIHW.

The building blocks of EfficientViT (Liu et al. 2023) and SHViT (Yun and Ro 2024): convolution with batch
norm, its
folding, squeeze-and-excite (Hu et al. 2018), the patch merging that halves the map.
"""

import math
from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear, relu, sigmoid
from ref.dims import dims, float64


class BN(NamedTuple):
    """Batch norm of C channels: gamma, beta, running mean and var, all [C]."""

    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class ConvBN(NamedTuple):
    """A convolution without bias, w [out, in / groups, kh, kw], and the batch norm behind it."""

    w: np.ndarray
    bn: BN


class Conv(NamedTuple):
    """A plain convolution, w [out, in / groups, kh, kw] and b [out]: what a `ConvBN` folds into."""

    w: np.ndarray
    b: np.ndarray


class FFNParams(NamedTuple):
    """Two 1x1 convolutions with a ReLU between them."""

    pw1: ConvBN
    pw2: ConvBN


class PatchMergingParams(NamedTuple):
    """1x1 up, 3x3 depthwise with stride 2, squeeze-and-excite, 1x1 down; se weights are [out, in, 1, 1]."""

    conv1: ConvBN
    conv2: ConvBN
    se_w1: np.ndarray
    se_b1: np.ndarray
    se_w2: np.ndarray
    se_b2: np.ndarray
    conv3: ConvBN


def im2col(x, kernel, *, stride=1, padding=0, dilation=1):
    """The patch under every output position: x [B, H, W, C] -> [B, H', W', kh, kw, C].

    kernel: (kh, kw). stride, padding, dilation: one number for both axes.
    H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1. Raises: ValueError if the kernel does not fit.
    """
    dims(x=(x, "B H W C"))
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    spans = [dilation * (k - 1) + 1 for k in kernel]
    out = [(n - s) // stride + 1 for n, s in zip(x.shape[1:3], spans, strict=True)]
    if min(out) < 1:
        raise ValueError(
            f"kernel of {spans[0]} x {spans[1]} does not fit a padded map of {x.shape[1]} x {x.shape[2]}"
        )
    rows, cols = (
        stride * np.arange(n)[:, None] + dilation * np.arange(k) for n, k in zip(out, kernel, strict=True)
    )
    return x[:, rows[:, None, :, None], cols[None, :, None, :]]


def conv2d(x, w, b=None, *, stride=1, padding=0, groups=1, dilation=1):
    """Convolution (correlation): x [B, H, W, C], w [O, C / groups, kh, kw], b [O] -> [B, H', W', O].

    Raises: ValueError if channels and groups disagree.
    """
    O, per, kh, kw = _check_conv(x, w, groups)
    cols = im2col(float64(x), (kh, kw), stride=stride, padding=padding, dilation=dilation)
    n = cols.shape[:3]
    cols = np.moveaxis(cols.reshape(*n, kh * kw, groups, per), -2, 0)  # [G, B, H', W', kh kw, C/G]
    y = cols.reshape(groups, math.prod(n), kh * kw * per) @ _kernel_matrix(w, groups)  # [G, B H' W', O/G]
    y = np.moveaxis(y, 0, 1).reshape(*n, O)
    return y if b is None else y + b


def conv2d_vjp(x, w, dy, *, stride=1, padding=0, groups=1, dilation=1):
    """(dx, dw, db) of `conv2d` for dy [B, H', W', O]."""
    O, per, kh, kw = _check_conv(x, w, groups)
    cols = im2col(float64(x), (kh, kw), stride=stride, padding=padding, dilation=dilation)
    n = cols.shape[:3]
    cols = np.moveaxis(cols.reshape(*n, kh * kw, groups, per), -2, 0)
    cols = cols.reshape(groups, math.prod(n), kh * kw * per)
    dyg = np.moveaxis(dy.reshape(math.prod(n), groups, O // groups), 1, 0)  # [G, B H' W', O/G]
    dw = np.swapaxes(cols, 1, 2) @ dyg  # [G, kh kw C/G, O/G]
    dw = dw.reshape(groups, kh, kw, per, O // groups).transpose(0, 4, 3, 1, 2).reshape(w.shape)
    dcols = dyg @ np.swapaxes(_kernel_matrix(w, groups), 1, 2)
    dcols = np.moveaxis(dcols.reshape(groups, *n, kh, kw, per), 0, -2).reshape(*n, kh, kw, groups * per)
    H, W = x.shape[1:3]
    dpad = np.zeros((x.shape[0], H + 2 * padding, W + 2 * padding, x.shape[3]))
    for i in range(kh):
        for j in range(kw):
            rows = slice(dilation * i, dilation * i + stride * (n[1] - 1) + 1, stride)
            columns = slice(dilation * j, dilation * j + stride * (n[2] - 1) + 1, stride)
            dpad[:, rows, columns] += dcols[:, :, :, i, j]
    return dpad[:, padding : padding + H, padding : padding + W], dw, dy.reshape(-1, O).sum(axis=0)


def deform_conv2d(x, offsets, w, b=None, *, stride=1, padding=0):
    """A convolution whose taps are moved: x [B, H, W, C], w [O, C, kh, kw], b [O] -> [B, H', W', O].

    offsets [B, H', W', kh kw, 2]: by how many pixels (down, right) each tap of each output is moved. Samples
    between pixels are bilinear, zero outside the map. Source: Dai et al. 2017, equations 2 to 4.
    """
    O, _, kh, kw = _check_conv(x, w, 1)
    H, W = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw), strict=True))
    dims(x=(x, "B H W C"), offsets=(offsets, f"B {H} {W} {kh * kw} 2"))
    tap = np.indices((kh, kw)).reshape(2, -1).T
    at = stride * np.indices((H, W)).transpose(1, 2, 0)[:, :, None, :] - padding + tap  # [H', W', taps, 2]
    cols = bilinear_sample(x, at + float64(offsets))  # [B, H', W', taps, C]
    w = float64(w).transpose(2, 3, 1, 0).reshape(-1, O)
    y = cols.reshape(*cols.shape[:3], len(w)) @ w
    return y if b is None else y + b


def bilinear_sample(x, at):
    """Values of the maps x [B, H, W, C] at the points at [B, ..., 2], (row, column): [B, ..., C].

    A point's four pixels count by their nearness; those outside the map are zero.
    """
    n = dims(x=(x, "B H W C"))
    x, low = np.pad(float64(x), ((0, 0), (1, 1), (1, 1), (0, 0))), np.floor(at)
    batch = np.arange(n["B"]).reshape(-1, *[1] * (at.ndim - 2))
    last = np.array([n["H"] + 1, n["W"] + 1])
    total = 0.0
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        near = np.prod(1 - np.abs(at - low - corner), axis=-1)
        row, column = np.moveaxis(np.clip(low + corner + 1, 0, last).astype(int), -1, 0)
        total = total + near[..., None] * x[batch, row, column]
    return total


def batch_norm(x, bn, *, train=False, eps=1e-5, momentum=0.1):
    """(x - mean) / sqrt(var + eps) gamma + beta over the last axis.

    train: use the batch's mean and (biased) variance, and return (y, BN with running statistics moved by
    `momentum` towards the batch's mean and unbiased variance).
    """
    x, bn = float64(x), BN(*float64(*bn))
    if not train:
        return (x - bn.mean) / np.sqrt(bn.var + eps) * bn.gamma + bn.beta
    rows = x.reshape(-1, x.shape[-1])
    mean, var = rows.mean(axis=0), rows.var(axis=0)
    unbiased = var * len(rows) / max(len(rows) - 1, 1)
    moved = bn._replace(
        mean=(1 - momentum) * bn.mean + momentum * mean, var=(1 - momentum) * bn.var + momentum * unbiased
    )
    return (x - mean) / np.sqrt(var + eps) * bn.gamma + bn.beta, moved


def batch_norm_vjp(x, bn, dy, *, train=False, eps=1e-5):
    """(dx, dgamma, dbeta) of `batch_norm`; in training the batch statistics take part in the gradient."""
    (x, dy), bn = float64(x, dy), BN(*float64(*bn))
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    mean, var = (rows.mean(axis=0), rows.var(axis=0)) if train else (bn.mean, bn.var)
    rstd = 1 / np.sqrt(var + eps)
    xh = (rows - mean) * rstd
    g = drows * bn.gamma
    dx = rstd * (g - g.mean(axis=0) - xh * (g * xh).mean(axis=0)) if train else rstd * g
    return dx.reshape(x.shape), (drows * xh).sum(axis=0), drows.sum(axis=0)


def conv_bn(x, p: ConvBN, *, stride=1, padding=0, groups=1, train=False, eps=1e-5):
    """Convolution, then batch norm; in training -> (y, new BN). p: ConvBN, or the Conv it folds into.

    Raises: ValueError for training a folded convolution, which has no statistics.
    """
    if isinstance(p, Conv):
        if train:
            raise ValueError("p is folded: it has no batch norm left to train")
        return conv2d(x, p.w, p.b, stride=stride, padding=padding, groups=groups)
    y = conv2d(x, p.w, stride=stride, padding=padding, groups=groups)
    return batch_norm(y, p.bn, train=train, eps=eps)


def conv_bn_vjp(x, p, dy, *, stride=1, padding=0, groups=1, train=False, eps=1e-5):
    """(dx, ConvBN of gradients, zero for the running statistics) of `conv_bn`."""
    options = {"stride": stride, "padding": padding, "groups": groups}
    if isinstance(p, Conv):
        dx, *grads = conv2d_vjp(x, p.w, dy, **options)
        return dx, Conv(*grads)
    d, dgamma, dbeta = batch_norm_vjp(conv2d(x, p.w, **options), p.bn, dy, train=train, eps=eps)
    dx, dw, _ = conv2d_vjp(x, p.w, d, **options)
    zero = np.zeros_like(dgamma)
    return dx, ConvBN(dw, BN(dgamma, dbeta, zero, zero))


def fold_conv_bn(p: ConvBN, *, eps=1e-5):
    """Conv(w, b), the one convolution that equals `conv_bn` at inference: w gamma / sqrt(var + eps)."""
    bn = BN(*float64(*p.bn))
    gain = bn.gamma / np.sqrt(bn.var + eps)
    return Conv(p.w * gain[:, None, None, None], bn.beta - bn.mean * gain)


def fold_all(params, *, eps=1e-5):
    """The same tree of parameters with every ConvBN in it folded into a Conv."""
    if isinstance(params, ConvBN):
        return fold_conv_bn(params, eps=eps)
    if not isinstance(params, tuple | list):
        return params
    folded = [fold_all(p, eps=eps) for p in params]
    return type(params)(*folded) if hasattr(params, "_fields") else type(params)(folded)


def init_bn(channels, *, gamma=1.0):
    """BN before training: scale gamma, shift 0, mean 0, variance 1."""
    zero, one = np.zeros(channels), np.ones(channels)
    return BN(gamma * one, zero, zero, one)


def init_conv_bn(rng, c_in, c_out, kernel=1, *, groups=1, gamma=1.0):
    """ConvBN with weights uniform in +-1 / sqrt(fan in), drawn by a NumPy Generator."""
    shape = (c_out, c_in // groups, kernel, kernel)
    return ConvBN(rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:])), init_bn(c_out, gamma=gamma))


def conv_ffn(x, p):
    """pw2(relu(pw1(x))): the feed-forward layer of 1x1 convolutions."""
    return conv_bn(relu(conv_bn(x, p.pw1)), p.pw2)


def squeeze_excite(x, w1, b1, w2, b2, *, gate=sigmoid):
    """x times gate(W2 relu(W1 mean(x))): x [B, H, W, C], w1 [R, C, 1, 1], w2 [C, R, 1, 1]."""
    dims(x=(x, "B H W C"), w1=(w1, "R C 1 1"), b1=(b1, "R"), w2=(w2, "C R 1 1"), b2=(b2, "C"))
    pooled = float64(x).mean(axis=(1, 2))
    weights = gate(linear(relu(linear(pooled, w1[:, :, 0, 0].T, b1)), w2[:, :, 0, 0].T, b2))
    return x * weights[:, None, None, :]


def patch_merging(x, params: PatchMergingParams):
    """Expand, halve depthwise, squeeze-and-excite, project: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C']."""
    p = params
    y = relu(conv_bn(x, p.conv1))
    y = relu(conv_bn(y, p.conv2, stride=2, padding=1, groups=y.shape[-1]))
    return conv_bn(squeeze_excite(y, p.se_w1, p.se_b1, p.se_w2, p.se_b2), p.conv3)


def _check_conv(x, w, groups):
    C = dims(x=(x, "B H W C"), w=(w, "O I kh kw"))["C"]
    O, per, kh, kw = w.shape
    if groups < 1 or C != per * groups or O % groups:
        raise ValueError(f"w of shape {list(w.shape)} with groups={groups} does not fit x with {C} channels")
    return O, per, kh, kw


def _kernel_matrix(w, groups):
    """w [O, C/G, kh, kw] -> [G, kh kw C/G, O/G], rows in the order of `im2col`."""
    O, per, kh, kw = w.shape
    return (
        w.reshape(groups, O // groups, per, kh, kw)
        .transpose(0, 3, 4, 2, 1)
        .reshape(groups, kh * kw * per, -1)
    )
