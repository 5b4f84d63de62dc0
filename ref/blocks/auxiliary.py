"""What trains a module by a loss of its own: image and feature decoders, a classifier, contrast of classes.

Source: Wang et al. 2021 (InfoPro, ICLR; blackfeather-wang/InfoPro-Pytorch), its decoder and its "1c2f"
classifier; Khosla et al. 2020 (arXiv 2004.11362, equation 2). Maps are [B, H, W, C], convolution weights
[out, in, 3, 3]; batch norms use the statistics of the batch, as in training: what is described here is
dropped afterwards.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.conv import BN, batch_norm, batch_norm_vjp, conv2d, conv2d_vjp
from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import gelu, gelu_grad, linear, linear_vjp, relu, sigmoid
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.softmax import logsumexp
from ref.blocks.transformer import BlockParams, init_block, transformer_block, transformer_block_vjp
from ref.checks import at_least_one, one_of
from ref.dims import dims, float64

KINDS = ("mlp", "conv", "transformer")
EPS = 1e-6  # of layer norms, as in the house's vision transformer
LOG_FLOOR = -100.0  # a certain and wrong pixel costs 100 nats, not infinity


class ImageDecoderParams(NamedTuple):
    """w1 [M, C, 3, 3], b1 [M]; norm bn_scale, bn_bias [M]; w2 [3, M, 3, 3], b2 [3]. InfoPro has M = 12."""

    w1: np.ndarray
    b1: np.ndarray
    bn_scale: np.ndarray
    bn_bias: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


class AuxParams(NamedTuple):
    """w_conv [M, C, 3, 3]; bn_scale, bn_bias [M]; w1 [h, M], b1; w2 [K, h], b2. InfoPro has M = 2 C."""

    w_conv: np.ndarray
    bn_scale: np.ndarray
    bn_bias: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


class FeatureDecoderParams(NamedTuple):
    """From C to P channels over a hidden M; unused fields are None.

    "mlp": scale, bias [C] (layer norm), w_1 [C, M], b_1, w_2 [M, P], b_2. "conv": w_1 [M, C, 3, 3], b_1,
    scale, bias [M] (batch norm), w_2 [P, M, 3, 3], b_2. "transformer": block, w_2 [C, P], b_2. w_up [C', 4
    C], b_up come first where the module merged patches two by two: they are taken apart again.
    """

    w_2: np.ndarray
    b_2: np.ndarray
    w_1: np.ndarray | None = None
    b_1: np.ndarray | None = None
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    block: BlockParams | None = None
    w_up: np.ndarray | None = None
    b_up: np.ndarray | None = None


def upsample_bilinear(x, *, size):
    """x [B, H, W, C] -> [B, size, size, C], linear between pixels, with corners on corners.

    Row i of the result stands at i (H - 1) / (size - 1) of the old ones. Raises: ValueError for size < 1.
    """
    n = dims(x=(x, "B H W C"))
    if min(n["H"], n["W"]) < 1:
        raise ValueError(f"x must hold a pixel, got {list(x.shape)}")
    rows, columns = _aligned(n["H"], size), _aligned(n["W"], size)
    return np.einsum("yh,bhwc,xw->byxc", rows, float64(x), columns, optimize=True)


def upsample_bilinear_vjp(x, dy):
    """dx [B, H, W, C] of `upsample_bilinear` for dy [B, size, size, C]."""
    n = dims(x=(x, "B H W C"), dy=(dy, "B S S C"))
    rows, columns = _aligned(n["H"], n["S"]), _aligned(n["W"], n["S"])
    return np.einsum("yh,byxc,xw->bhwc", rows, float64(dy), columns, optimize=True)


def image_decoder(h_grid, params: ImageDecoderParams, *, image_size):
    """sigmoid(conv(relu(bn(conv(upsample(h)))))): h_grid [B, H, W, C] -> an image [B, S, S, 3] in (0, 1)."""
    p, (_, _, y) = params, _decode(h_grid, params, image_size)
    return sigmoid(conv2d(relu(y), p.w2, p.b2, padding=1))


def image_decoder_vjp(h_grid, params: ImageDecoderParams, dout, *, image_size):
    """(dh_grid, ImageDecoderParams of gradients) of `image_decoder` for dout [B, S, S, 3]."""
    p, (up, z, y) = params, _decode(h_grid, params, image_size)
    out = sigmoid(conv2d(relu(y), p.w2, p.b2, padding=1))
    dy, dw2, db2 = conv2d_vjp(relu(y), p.w2, dout * out * (1 - out), padding=1)
    dz, dscale, dbias = batch_norm_vjp(z, _bn(p.bn_scale, p.bn_bias), dy * (y > 0), train=True)
    dup, dw1, db1 = conv2d_vjp(up, p.w1, dz, padding=1)
    return upsample_bilinear_vjp(h_grid, dup), ImageDecoderParams(dw1, db1, dscale, dbias, dw2, db2)


def bce_reconstruction(prediction, target):
    """Mean over all entries of -t log p - (1 - t) log(1 - p), logarithms no lower than -100.

    Args: prediction, target of one shape, in [0, 1]. Raises: ValueError for values outside, or none.
    """
    p, t = _check_bce(prediction, target)
    with np.errstate(divide="ignore"):
        each = t * np.maximum(np.log(p), LOG_FLOOR) + (1 - t) * np.maximum(np.log1p(-p), LOG_FLOOR)
    return -each.mean()


def bce_reconstruction_vjp(prediction, target):
    """d loss / d prediction = (p - t) / max(p (1 - p), 1e-12) / size."""
    p, t = _check_bce(prediction, target)
    return (p - t) / np.maximum(p * (1 - p), 1e-12) / p.size


def supervised_contrastive(features, labels, *, temperature=0.07):
    """Mean over samples i of -(1 / |P(i)|) sum_{j in P(i)} log p_ij, P(i) the others of its class.

    p_ij = exp(s_ij) / sum_{a != i} exp(s_ia), s = z z^T / temperature, z the features [B, D] scaled to length
    1. A sample alone in its class counts as 0. Raises: ValueError for temperature <= 0 or B < 1.
    """
    return _contrast(features, labels, temperature)[0]


def supervised_contrastive_vjp(features, labels, *, temperature=0.07):
    """d loss / d features [B, D]."""
    _, z, length, p, positive, count = _contrast(features, labels, temperature)
    share = positive / np.maximum(count, 1)[:, None]
    ds = (p * (count > 0)[:, None] - share) / len(z) / temperature
    dz = (ds + ds.T) @ z
    return (dz - z * np.sum(dz * z, axis=1, keepdims=True)) / length


def aux_classifier(h_grid, params: AuxParams):
    """Logits [B, K] of h_grid [B, H, W, C]: convolution of stride 2, norm, ReLU, mean, two linear maps."""
    return _classify(h_grid, params)[-1]


def aux_classifier_vjp(h_grid, params: AuxParams, dlogits):
    """(dh_grid, AuxParams of gradients) of `aux_classifier` for dlogits [B, K]."""
    p = params
    z, y, pooled, hidden, _ = _classify(h_grid, p)
    dh, dw2, db2 = linear_vjp(relu(hidden), p.w2.T, float64(dlogits))
    dpooled, dw1, db1 = linear_vjp(pooled, p.w1.T, dh * (hidden > 0))
    dy = np.broadcast_to(dpooled[:, None, None] / (y.shape[1] * y.shape[2]), y.shape) * (y > 0)
    dz, dscale, dbias = batch_norm_vjp(z, _bn(p.bn_scale, p.bn_bias), dy, train=True)
    dx, dw_conv, _ = conv2d_vjp(h_grid, p.w_conv, dz, stride=2, padding=1)
    return dx, AuxParams(dw_conv, dscale, dbias, dw1.T, db1, dw2.T, db2)


def aux_classifier_loss(h_grid, labels, params: AuxParams):
    """Mean cross-entropy, in nats, of `aux_classifier` for labels int [B]."""
    return cross_entropy(aux_classifier(h_grid, params), labels)[0]


def feature_decoder(h, params: FeatureDecoderParams, *, kind="mlp"):
    """What the module was given, guessed from what it made: h [B, N, C] -> [B, N, P].

    kind: "mlp", every token by itself; "conv", two 3x3 convolutions on the square grid of tokens, with the
    batch's norm between them; "transformer", a block of one head and a linear map. Raises: ValueError naming
    the argument.
    """
    return _decode_features(h, params, kind)[0]


def feature_decoder_vjp(h, params: FeatureDecoderParams, dy, *, kind="mlp"):
    """(dh, FeatureDecoderParams of gradients) of `feature_decoder` for dy [B, N, P]."""
    _, (z, mid, hidden) = _decode_features(h, params, kind)
    p, dy, g = params, float64(dy), {}
    if kind == "mlp":
        d, g["w_2"], g["b_2"] = linear_vjp(gelu(hidden), p.w_2, dy)
        d, g["w_1"], g["b_1"] = linear_vjp(mid, p.w_1, d * gelu_grad(hidden))
        d, g["scale"], g["bias"] = layer_norm_vjp(z, p.scale, d, eps=EPS)
    elif kind == "conv":
        d, g["w_2"], g["b_2"] = conv2d_vjp(relu(hidden), p.w_2, as_grid(dy), padding=1)
        d, g["scale"], g["bias"] = batch_norm_vjp(mid, _bn(p.scale, p.bias), d * (hidden > 0), train=True)
        d, g["w_1"], g["b_1"] = conv2d_vjp(as_grid(z), p.w_1, d, padding=1)
        d = d.reshape(z.shape)
    else:
        d, g["w_2"], g["b_2"] = linear_vjp(mid, p.w_2, dy)
        d, g["block"] = transformer_block_vjp(z, p.block, d, num_heads=1, eps=EPS)
    if p.w_up is None:
        return d, FeatureDecoderParams(**g)
    side, (B, N, _) = 2 * int(np.sqrt(h.shape[1])), h.shape
    d = d.reshape(B, side // 2, 2, side // 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(B, N, -1)
    d, g["w_up"], g["b_up"] = linear_vjp(float64(h), p.w_up, d)
    return d, FeatureDecoderParams(**g)


def mse_reconstruction(prediction, target):
    """Mean squared difference over all entries of two arrays of one shape, at least one."""
    _check_pair(prediction, target)
    return np.mean((float64(prediction) - float64(target)) ** 2)


def mse_reconstruction_vjp(prediction, target):
    """d loss / d prediction = 2 (p - t) / size."""
    _check_pair(prediction, target)
    return 2 * (float64(prediction) - float64(target)) / prediction.size


def decoder_kind(params: FeatureDecoderParams):
    """The kind of `feature_decoder` that these parameters are for."""
    if params.block is not None:
        return "transformer"
    return "conv" if params.w_1.ndim == 4 else "mlp"


def init_feature_decoder(rng, channels, previous, *, kind="mlp", hidden=None, merged=False):
    """FeatureDecoderParams from C to P channels, hidden M = C unless given; merged: un-merges first."""
    one_of("kind", kind, KINDS)
    M = hidden or channels
    up = affine(rng, channels, 4 * previous) if merged else (None, None)
    C = previous if merged else channels
    if kind == "mlp":
        (w_1, b_1), (w_2, b_2) = affine(rng, C, M), affine(rng, M, previous)
        return FeatureDecoderParams(w_2, b_2, w_1, b_1, np.ones(C), np.zeros(C), None, *up)
    if kind == "conv":
        conv = lambda a, b: rng.uniform(-1, 1, (b, a, 3, 3)) / np.sqrt(9 * a)
        w_1, w_2 = conv(C, M), conv(M, previous)
        return FeatureDecoderParams(
            w_2, np.zeros(previous), w_1, np.zeros(M), np.ones(M), np.zeros(M), None, *up
        )
    w_2, b_2 = affine(rng, C, previous)
    return FeatureDecoderParams(w_2, b_2, block=init_block(rng, C, M), w_up=up[0], b_up=up[1])


def init_image_decoder(rng, channels, *, hidden=12):
    """ImageDecoderParams: weights uniform in +-1 / sqrt(fan in), biases 0, unit norm."""
    w1, w2 = _uniform(rng, hidden, channels, 3, 3), _uniform(rng, 3, hidden, 3, 3)
    return ImageDecoderParams(w1, np.zeros(hidden), np.ones(hidden), np.zeros(hidden), w2, np.zeros(3))


def init_aux(rng, channels, classes, *, hidden=128):
    """AuxParams with 2 C channels: weights uniform in +-1 / sqrt(fan in), biases 0, unit norm."""
    M = 2 * channels
    w1, w2 = _uniform(rng, hidden, M), _uniform(rng, classes, hidden)
    return AuxParams(
        _uniform(rng, M, channels, 3, 3), np.ones(M), np.zeros(M), w1, np.zeros(hidden), w2, np.zeros(classes)
    )


def as_grid(x):
    """Tokens [B, N, C] as a square map [B, S, S, C]. Raises: ValueError if N is not a square."""
    side = _side(x.shape[1])
    return x.reshape(len(x), side, side, x.shape[-1])


def _uniform(rng, *shape):
    return rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:]))


def _aligned(n, size):
    """[size, n]: how much every old pixel of a line counts for the new ones."""
    at_least_one(size=size)
    at = np.arange(size) * (n - 1) / max(size - 1, 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))


def _bn(scale, bias):
    """The batch norm of a decoder or classifier; in training its running statistics are not read."""
    return BN(scale, bias, np.zeros_like(scale), np.ones_like(scale))


def _decode(h_grid, p, image_size):
    """(upsampled map, first convolution, its batch norm)."""
    dims(h_grid=(h_grid, "B H W C"), w1=(p.w1, "M C 3 3"), b1=(p.b1, "M"), bn_scale=(p.bn_scale, "M"),
         bn_bias=(p.bn_bias, "M"), w2=(p.w2, "O M 3 3"), b2=(p.b2, "O"))  # fmt: skip
    _check_batch("h_grid", h_grid)
    up = upsample_bilinear(h_grid, size=image_size)
    z = conv2d(up, p.w1, p.b1, padding=1)
    return up, z, batch_norm(z, _bn(p.bn_scale, p.bn_bias), train=True)[0]


def _classify(h_grid, p):
    """(convolution, its batch norm, mean, hidden layer before ReLU, logits)."""
    dims(h_grid=(h_grid, "B H W C"), w_conv=(p.w_conv, "M C 3 3"), bn_scale=(p.bn_scale, "M"),
         bn_bias=(p.bn_bias, "M"), w1=(p.w1, "h M"), b1=(p.b1, "h"), w2=(p.w2, "K h"),
         b2=(p.b2, "K"))  # fmt: skip
    _check_batch("h_grid", h_grid)
    z = conv2d(h_grid, p.w_conv, stride=2, padding=1)
    y = batch_norm(z, _bn(p.bn_scale, p.bn_bias), train=True)[0]
    pooled = relu(y).mean(axis=(1, 2))
    hidden = linear(pooled, p.w1.T, p.b1)
    return z, y, pooled, hidden, linear(relu(hidden), p.w2.T, p.b2)


def _contrast(features, labels, temperature):
    """(loss, unit features, their lengths, p without the diagonal, positives, how many)."""
    n = dims(features=(features, "B D"), labels=(labels, "B"))
    if not temperature > 0 or n["B"] < 1:
        raise ValueError(f"need temperature > 0 and at least one sample, got {temperature=} and {n['B']}")
    features, labels = float64(features), np.asarray(labels)
    length = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    z = features / length
    self_ = np.eye(len(z), dtype=bool)
    s = np.where(self_, -np.inf, z @ z.T / temperature)
    lse = logsumexp(s)[:, None]
    positive = (labels[:, None] == labels) & ~self_
    count = positive.sum(axis=1)
    log_p = np.where(positive, s - np.where(np.isneginf(lse), 0.0, lse), 0.0)
    loss = np.mean(-log_p.sum(axis=1) / np.maximum(count, 1))
    return loss, z, length, np.exp(s - np.where(np.isneginf(lse), 0.0, lse)), positive, count


def _check_pair(prediction, target):
    if prediction.shape != target.shape:
        raise ValueError(
            f"target must have prediction's shape {list(prediction.shape)}, got {list(target.shape)}"
        )
    if not prediction.size:
        raise ValueError(f"prediction must not be empty, got {list(prediction.shape)}")


def _check_batch(name, x):
    """A norm that takes its statistics from the batch needs one."""
    if not len(x):
        raise ValueError(f"{name} must hold at least one example, got {list(x.shape)}")


def _check_bce(prediction, target):
    _check_pair(prediction, target)
    for name, x in (("prediction", prediction), ("target", target)):
        if not ((np.asarray(x) >= 0) & (np.asarray(x) <= 1)).all():  # also NaN
            raise ValueError(f"{name} must be in [0, 1]: images are not standardised here")
    return float64(prediction, target)


def _decode_features(h, p, kind):
    """(guess, (input behind un-merging, norm or convolution, hidden layer before its activation))."""
    one_of("kind", kind, KINDS)
    n = dims(h=(h, "B N C"))
    z = float64(h)
    if p.w_up is not None:
        side = _side(n["N"])
        z = linear(z, p.w_up, p.b_up).reshape(n["B"], side, side, 2, 2, -1)
        z = z.transpose(0, 1, 3, 2, 4, 5).reshape(n["B"], 4 * n["N"], -1)
    if kind != decoder_kind(p):
        raise ValueError(f"params are those of a {decoder_kind(p)!r} decoder, got {kind=}")
    if kind == "mlp":
        mid = layer_norm(z, p.scale, p.bias, eps=EPS)
        hidden = linear(mid, p.w_1, p.b_1)
        return linear(gelu(hidden), p.w_2, p.b_2), (z, mid, hidden)
    if kind == "conv":
        _check_batch("h", h)
        mid = conv2d(as_grid(z), p.w_1, p.b_1, padding=1)
        hidden = batch_norm(mid, _bn(p.scale, p.bias), train=True)[0]
        out = conv2d(relu(hidden), p.w_2, p.b_2, padding=1)
        return out.reshape(*z.shape[:2], -1), (z, mid, hidden)
    mid = transformer_block(z, p.block, num_heads=1, eps=EPS)
    return linear(mid, p.w_2, p.b_2), (z, mid, None)


def _side(N):
    side = int(np.sqrt(N) + 0.5)
    if side**2 != N:
        raise ValueError(f"h must hold a square grid of tokens, got N={N}")
    return side


def affine(rng, a, b):
    """(w [a, b] uniform in +-1 / sqrt(a), b = 0)."""
    return rng.uniform(-1, 1, (a, b)) / np.sqrt(a), np.zeros(b)
