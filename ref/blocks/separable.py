"""The separable MLP of small convolutional networks, and the activations that go with it.

Source: Sandler et al. 2018 (arXiv 1801.04381) for the inverted residual, Howard et al. 2019 (MobileNetV3,
arXiv 1905.02244), sections 5.2 and 5.3, for hard swish and the hard gate.
Maps are [B, H, W, C], weights OIHW.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.conv import ConvBN, conv_bn, conv_bn_vjp, init_conv_bn, squeeze_excite
from ref.blocks.mlp import linear, linear_vjp, relu
from ref.dims import dims, float64

REDUCTION = 4  # of the squeeze-and-excite


class SeparableParams(NamedTuple):
    """expand 1x1 d -> r d, depthwise, project 1x1 r d -> d; se weights [out, in, 1, 1], or None without."""

    expand: ConvBN
    depthwise: ConvBN
    project: ConvBN
    se_w1: np.ndarray | None = None
    se_b1: np.ndarray | None = None
    se_w2: np.ndarray | None = None
    se_b2: np.ndarray | None = None


def hard_sigmoid(x):
    """clip(x + 3, 0, 6) / 6, elementwise."""
    return np.clip(float64(x) + 3, 0, 6) / 6


def hard_sigmoid_grad(x):
    """1/6 where -3 < x < 3, else 0."""
    return (np.abs(float64(x)) < 3) / 6


def hard_swish(x):
    """x clip(x + 3, 0, 6) / 6, elementwise."""
    return float64(x) * hard_sigmoid(x)


def hard_swish_grad(x):
    """d hard_swish / dx: 0 below -3, (2 x + 3) / 6 between, 1 above 3."""
    return hard_sigmoid(x) + float64(x) * hard_sigmoid_grad(x)


def separable_mlp(x, params: SeparableParams, *, squeeze=False):
    """x + project(act(depthwise(act(expand(x))))), act = hard swish: [B, H, W, d] -> the same.

    squeeze: scale the hidden channels by a gate made of their means (squeeze-and-excite) before projecting.
    Raises: ValueError for squeeze without its weights, or a kernel that is not odd and depthwise.
    """
    *_, s = _hidden(x, params, squeeze)
    return x + conv_bn(s, params.project)


def separable_mlp_vjp(x, params: SeparableParams, dy, *, squeeze=False):
    """(dx, dparams) of `separable_mlp`; gradients of running statistics are zero."""
    p, dy = params, float64(dy)
    e, h, g, a, s = _hidden(x, params, squeeze)
    ds, dproject = conv_bn_vjp(s, p.project, dy)
    da, dse = _squeeze_vjp(a, p, ds) if squeeze else (ds, (None if w is None else 0 * w for w in p[3:]))
    dh, ddepthwise = conv_bn_vjp(h, p.depthwise, da * hard_swish_grad(g), **_options(p))
    dx, dexpand = conv_bn_vjp(float64(x), p.expand, dh * hard_swish_grad(e))
    return dy + dx, SeparableParams(dexpand, ddepthwise, dproject, *dse)


def init_separable_mlp(rng, dim, *, ratio=4, kernel=3, squeeze=False):
    """SeparableParams with hidden width ratio * dim, drawn by a NumPy Generator."""
    wide = ratio * dim
    convs = (
        init_conv_bn(rng, dim, wide),
        init_conv_bn(rng, wide, wide, kernel, groups=wide),
        init_conv_bn(rng, wide, dim),
    )
    if not squeeze:
        return SeparableParams(*convs)
    R = squeeze_width(wide)
    w = lambda out, fan: rng.uniform(-1, 1, (out, fan, 1, 1)) / np.sqrt(fan)
    return SeparableParams(*convs, w(R, wide), np.zeros(R), w(wide, R), np.zeros(wide))


def squeeze_width(channels):
    """Hidden width of the squeeze-and-excite: channels / 4, at least 1."""
    return max(1, channels // REDUCTION)


def _hidden(x, p, squeeze):
    """(before and after the first activation, before and after the second, after the gate)."""
    dims(x=(x, "B H W d"))
    k = p.depthwise.w.shape[-1]
    if p.depthwise.w.shape[1:] != (1, k, k) or k % 2 == 0:
        raise ValueError(f"depthwise must be [C, 1, k, k] with odd k, got {list(p.depthwise.w.shape)}")
    if squeeze and p.se_w1 is None:
        raise ValueError("squeeze needs params.se_w1 .. se_b2, which are None")
    e = conv_bn(x, p.expand)
    h = hard_swish(e)
    g = conv_bn(h, p.depthwise, **_options(p))
    a = hard_swish(g)
    return e, h, g, a, squeeze_excite(a, *p[3:], gate=hard_sigmoid) if squeeze else a


def _options(p):
    return {"padding": p.depthwise.w.shape[-1] // 2, "groups": len(p.depthwise.w)}


def _squeeze_vjp(a, p, ds):
    """Through a * gate(mean(a)): the product rule, then back through the gate's two linear maps."""
    w1, w2 = p.se_w1[:, :, 0, 0].T, p.se_w2[:, :, 0, 0].T
    pooled = a.mean(axis=(1, 2))
    u = linear(pooled, w1, p.se_b1)
    z = linear(relu(u), w2, p.se_b2)
    dz = (ds * a).sum(axis=(1, 2)) * hard_sigmoid_grad(z)
    du, dw2, db2 = linear_vjp(relu(u), w2, dz)
    dpooled, dw1, db1 = linear_vjp(pooled, w1, du * (u > 0))
    da = ds * hard_sigmoid(z)[:, None, None] + dpooled[:, None, None] / (a.shape[1] * a.shape[2])
    return da, (dw1.T[:, :, None, None], db1, dw2.T[:, :, None, None], db2)
