"""EfficientViT: heads that each read their own slice of the channels, in a cascade; one attention a sandwich.

Source: Liu et al. 2023 (arXiv 2305.07027), equations 1 to 3, and the code released with it, which
decides where the paper is short: the position bias, the windows, ReLU before the projection. Maps are
[B, H, W, C]; batch norm uses its stored statistics. Stem, downsampling and head: ref/models/pyramid.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.conv import (
    BN,
    Conv,
    ConvBN,
    FFNParams,
    PatchMergingParams,
    conv_bn,
    conv_bn_vjp,
    fold_conv_bn,
    init_conv_bn,
    patch_merging,
    squeeze_excite,
)
from ref.blocks.maps import from_windows, map_rows, to_windows
from ref.blocks.mlp import relu
from ref.blocks.softmax import softmax, softmax_vjp
from ref.checks import check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.pyramid import (
    DownParams,
    HeadParams,
    fold_pyramid,
    init_depthwise,
    init_down,
    init_ffn,
    init_head,
    init_stem,
    num_parameters,
    pyramid_forward,
    random_params,
    residual_depthwise,
    residual_ffn,
    stage_sides,
)
from ref.models.pyramid_cost import (
    OpCost,
    conv_cost,
    elementwise_cost,
    pyramid_cost,
    residual_cost,
    transformer_block_cost,
)

__all__ = [
    "BN", "CGAParams", "Conv", "ConvBN", "DownParams", "EfficientViTBlockParams", "EfficientViTConfig",
    "EfficientViTParams", "FFNParams", "HeadParams", "OpCost", "PatchMergingParams", "StageParams",
    "attention_bias_index", "cascaded_group_attention", "cascaded_group_attention_backward", "conv_bn",
    "efficientvit_block", "efficientvit_config", "efficientvit_cost", "efficientvit_forward", "example",
    "fold_conv_bn", "fold_efficientvit", "group_attention_maps", "independent_group_attention",
    "init_efficientvit", "num_parameters", "patch_merging", "squeeze_excite", "transformer_block_cost",
    "window_attention",
]  # fmt: skip

# name: dims, depths, heads, kernels of the queries' depthwise convolutions (the released code)
VARIANTS = {
    "m0": ((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "m1": ((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "m2": ((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "m3": ((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "m4": ((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "m5": ((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}


class CGAParams(NamedTuple):
    """h heads: qkv[i] 1x1 from C/h to 2 k + C/h, dw[i] on k channels; proj C to C; bias [h, offsets]."""

    qkv: tuple[ConvBN, ...]
    dw: tuple[ConvBN, ...]
    proj: ConvBN
    bias: np.ndarray


class EfficientViTBlockParams(NamedTuple):
    """The sandwich: depthwise and FFN, attention, depthwise and FFN."""

    dw0: ConvBN
    ffn0: FFNParams
    mixer: CGAParams
    dw1: ConvBN
    ffn1: FFNParams


class StageParams(NamedTuple):
    """What leads into a stage (None in the first), and its blocks."""

    down: DownParams | None
    blocks: tuple[EfficientViTBlockParams, ...]


class EfficientViTParams(NamedTuple):
    """Four convolutions, three stages, a head; head_dist: the one trained by distillation, or None."""

    stem: tuple[ConvBN, ...]
    stages: tuple[StageParams, ...]
    head: HeadParams
    head_dist: HeadParams | None = None


@dataclass(frozen=True)
class EfficientViTConfig:
    """Three stages: widths, blocks, heads; kernels: odd, one a head, the same in all stages."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    kernels: tuple[int, ...]
    key_dims: tuple[int, ...] = (16, 16, 16)
    windows: tuple[int, ...] = (7, 7, 7)
    num_classes: int = 1000

    def __post_init__(self):
        """Raises: ValueError naming the field at fault."""
        for name in ("dims", "depths", "heads", "key_dims", "windows"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must hold three positive numbers, got {getattr(self, name)}")
        for C, h in zip(self.dims, self.heads, strict=True):
            _check_heads(C, h, self.kernels)


def attention_bias_index(height, width=None):
    """(index int32 [N, N], offsets): which bias two pixels of a height x width map share, N = height width.

    The id of (|dy|, |dx|) is |dy| width + |dx|: the order in which they are first met, row by row.
    Raises: ValueError for a side below 1.
    """
    width = height if width is None else width
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} x {width}")
    row, col = np.divmod(np.arange(height * width), width)
    index = np.abs(row[:, None] - row) * width + np.abs(col[:, None] - col)
    return index.astype(np.int32), height * width


def cascaded_group_attention(x, params: CGAParams, *, key_dim, kernels):
    """Every head attends within its slice of the channels plus the last head's output (eq. 2 and 3).

    Args: x [B, H, W, C]; C must be a multiple of the heads h; the bias must be made for H x W.
      key_dim: channels k of queries and keys. kernels: of the depthwise convolution on each head's queries;
      the first h are used.
    Returns: [B, H, W, C]. Raises: ValueError naming what does not fit.
    """
    heads = _run_heads(x, params, key_dim, kernels, cascade=True)
    return conv_bn(relu(np.concatenate([head.o for head in heads], axis=-1)), params.proj)


def independent_group_attention(x, params: CGAParams, *, key_dim, kernels):
    """The same without the cascade: every head sees its own slice only. The baseline of the ablation."""
    heads = _run_heads(x, params, key_dim, kernels, cascade=False)
    return conv_bn(relu(np.concatenate([head.o for head in heads], axis=-1)), params.proj)


def group_attention_maps(x, params: CGAParams, *, key_dim, kernels, cascade=True):
    """The attention [B, h, N, N] of every head, rows summing to 1."""
    return np.stack([head.p for head in _run_heads(x, params, key_dim, kernels, cascade)], axis=1)


def cascaded_group_attention_backward(dy, x, params: CGAParams, *, key_dim, kernels):
    """(dx, dparams) for dy [B, H, W, C]; gradients of running statistics are zero.

    A head's output is used twice, by the projection and by the next head, so the heads are walked from the
    last to the first, carrying what comes back through the input of the one after.
    """
    dims(dy=(dy, "B H W C"), x=(x, "B H W C"))
    heads = _run_heads(x, params, key_dim, kernels, cascade=True)
    joined = np.concatenate([head.o for head in heads], axis=-1)
    d, dproj = conv_bn_vjp(relu(joined), params.proj, float64(dy))
    d, carry, dx = np.split(d * (joined > 0), len(heads), axis=-1), 0.0, []
    dqkv, ddw, dbias = [], [], np.zeros_like(params.bias, dtype=np.float64)
    index, _ = attention_bias_index(*x.shape[1:3])
    for i in reversed(range(len(heads))):
        head, do = heads[i], map_rows(d[i] + carry)
        dlogits = softmax_vjp(head.p, do @ head.v.mT)
        np.add.at(dbias[i], index, dlogits.sum(axis=0))
        dk, dv = dlogits.mT @ head.q * key_dim**-0.5, head.p.mT @ do
        dq = (dlogits @ head.k * key_dim**-0.5).reshape(*x.shape[:3], key_dim)
        dq, g = conv_bn_vjp(head.z[..., :key_dim], params.dw[i], dq, padding=kernels[i] // 2, groups=key_dim)
        ddw.insert(0, g)
        dz = np.concatenate([map_rows(dq), dk, dv], axis=-1).reshape(head.z.shape)
        carry, g = conv_bn_vjp(head.f, params.qkv[i], dz)
        dqkv.insert(0, g)
        dx.insert(0, carry)
    return np.concatenate(dx, axis=-1), CGAParams(tuple(dqkv), tuple(ddw), dproj, dbias)


def window_attention(x, params: CGAParams, *, key_dim, kernels, window=7):
    """Cascaded attention on the whole map [B, R, R, C] if R <= window, else on each window x window tile.

    Tiles that stick out are filled with zeros on the right and below, and these take part in the softmax, as
    in the released code. Raises: ValueError for a map that is not square.
    """
    n = dims(x=(x, "B H W C"))
    R, options = n["H"], {"key_dim": key_dim, "kernels": kernels}
    if n["W"] != R or window < 1:
        raise ValueError(f"x must be a square map and window at least 1, got {R} x {n['W']}, {window=}")
    if R <= window:
        return cascaded_group_attention(x, params, **options)
    side = -(-R // window) * window
    x = to_windows(np.pad(float64(x), ((0, 0), (0, side - R), (0, side - R), (0, 0))), window)
    y = cascaded_group_attention(x.reshape(-1, window, window, n["C"]), params, **options)
    return from_windows(y.reshape(x.shape), side, side)[:, :R, :R]


def efficientvit_block(x, params: EfficientViTBlockParams, *, key_dim, kernels, window=7):
    """The sandwich (eq. 1), every layer residual: [B, R, R, C] -> [B, R, R, C]."""
    x = residual_ffn(residual_depthwise(float64(x), params.dw0), params.ffn0)
    x = x + window_attention(x, params.mixer, key_dim=key_dim, kernels=kernels, window=window)
    return residual_ffn(residual_depthwise(x, params.dw1), params.ffn1)


def efficientvit_forward(img, params: EfficientViTParams, cfg: EfficientViTConfig, *, features=False):
    """Logits [B, K] of img [B, H, H, 3], or with features the three maps, at strides 16, 32 and 64.

    Raises: ValueError for an image smaller than 16 pixels, not square, or of another size than the biases.
    """
    block = lambda x, p, i: efficientvit_block(
        x, p, key_dim=cfg.key_dims[i], kernels=cfg.kernels, window=cfg.windows[i]
    )
    return pyramid_forward(img, params, block, features=features)


def fold_efficientvit(params):
    """The same network with batch norm folded away: for inference, fewer operations."""
    return fold_pyramid(params)


def efficientvit_config(name):
    """EfficientViTConfig of "m0" .. "m5". Raises: ValueError for another name."""
    one_of("name", name, VARIANTS)
    return EfficientViTConfig(*VARIANTS[name])


def init_efficientvit(rng, cfg: EfficientViTConfig, *, image=224):
    """EfficientViTParams for square images of `image` pixels; residual layers start as the identity."""
    stages = []
    for i, (side, C) in enumerate(zip(stage_sides(image), cfg.dims, strict=True)):
        down = init_down(rng, cfg.dims[i - 1], C) if i else None
        blocks = tuple(_init_block(rng, cfg, i, C, min(side, cfg.windows[i])) for _ in range(cfg.depths[i]))
        stages.append(StageParams(down, blocks))
    head = init_head(rng, cfg.dims[-1], cfg.num_classes)
    return EfficientViTParams(init_stem(rng, cfg.dims[0]), tuple(stages), head)


def efficientvit_cost(cfg: EfficientViTConfig, *, batch, image=224, itemsize=4):
    """[OpCost] of the folded network, operation by operation, each reading and writing memory once.

    Slices of channels and flattened maps are views and cost nothing; windows and concatenation are copies.
    """

    def block(name, i, shape):
        outer = lambda layer: residual_cost(f"{name}.{layer}", shape, itemsize)
        mixer = _mixer_cost(f"{name}.mixer", cfg, i, shape, itemsize)
        return outer("dw0") + outer("ffn0") + mixer + outer("dw1") + outer("ffn1")

    return pyramid_cost(cfg, block, batch=batch, image=image, itemsize=itemsize)


class _Head(NamedTuple):
    """One head: input f and projection z as maps; q, k, v, attention p in rows; output o as a map."""

    f: np.ndarray
    z: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    p: np.ndarray
    o: np.ndarray


def _run_heads(x, params, key_dim, kernels, cascade):
    n = dims(x=(x, "B H W C"), bias=(params.bias, "h offsets"))
    h = len(params.qkv)
    _check_heads(n["C"], h, kernels)
    index, offsets = attention_bias_index(n["H"], n["W"])
    if params.bias.shape != (h, offsets):
        raise ValueError(
            f"bias must be [{h}, {offsets}] for a map of {n['H']} x {n['W']}, got {list(params.bias.shape)}"
        )
    width = n["C"] // h
    heads, chunks = [], [float64(x)[..., i * width : (i + 1) * width] for i in range(h)]
    for i, chunk in enumerate(chunks):
        dims(qkv=(params.qkv[i].w, f"{2 * key_dim + width} {width} 1 1"))
        dims(dw=(params.dw[i].w, f"{key_dim} 1 {kernels[i]} {kernels[i]}"))
        f = heads[-1].o + chunk if cascade and i else chunk
        z = conv_bn(f, params.qkv[i])
        q = conv_bn(z[..., :key_dim], params.dw[i], padding=kernels[i] // 2, groups=key_dim)
        q, k, v = map_rows(q), map_rows(z[..., key_dim : 2 * key_dim]), map_rows(z[..., 2 * key_dim :])
        p = softmax(q @ k.mT * key_dim**-0.5 + params.bias[i][index])
        heads.append(_Head(f, z, q, k, v, p, (p @ v).reshape(f.shape)))
    return heads


def _check_heads(C, h, kernels):
    check_num_heads(C, h, name="heads")
    if len(kernels) < h or any(k % 2 == 0 for k in kernels):
        raise ValueError(f"kernels must be odd, one for each of {h} heads, got {tuple(kernels)}")


def _init_block(rng, cfg, i, C, side):
    h, k = cfg.heads[i], cfg.key_dims[i]
    mixer = CGAParams(
        qkv=tuple(init_conv_bn(rng, C // h, 2 * k + C // h) for _ in range(h)),
        dw=tuple(init_conv_bn(rng, k, k, kernel, groups=k) for kernel in cfg.kernels[:h]),
        proj=init_conv_bn(rng, C, C, gamma=0.0),
        bias=np.zeros((h, side**2)),
    )
    dw0, ffn0, dw1, ffn1 = (f(rng, C) for f in (init_depthwise, init_ffn) * 2)
    return EfficientViTBlockParams(dw0, ffn0, mixer, dw1, ffn1)


def _mixer_cost(name, cfg, i, shape, itemsize):
    B, R, _, C = shape
    h, k, window = cfg.heads[i], cfg.key_dims[i], min(R, cfg.windows[i])
    tiles, N, width = B * (-(-R // window)) ** 2, window**2, C // h
    conv = lambda op, *a, **o: conv_cost(f"{name}.{op}", *a, **o, itemsize=itemsize)
    point = lambda op, numbers, reads=1: elementwise_cost(
        f"{name}.{op}", numbers, reads=reads, itemsize=itemsize
    )
    product = lambda op, n, read, out: OpCost(
        f"{name}.{op}", tiles * N * N * n, itemsize * tiles * read, itemsize * tiles * out, 0
    )
    copies = (
        [] if R <= cfg.windows[i] else [point("windows", tiles * N * C), point("unwindow", tiles * N * C)]
    )
    rows = []
    for j in range(h):
        rows += [] if j == 0 else [point(f"{j}.cascade", tiles * N * width, 2)]
        rows += [
            conv(f"{j}.qkv", (tiles, window, window, width), 2 * k + width),
            conv(f"{j}.dw", (tiles, window, window, k), k, kernel=cfg.kernels[j], groups=k),
            product(f"{j}.scores", k, 2 * N * k, N * N), point(f"{j}.softmax", tiles * N * N),
            product(f"{j}.values", width, N * N + N * width, N * width),
        ]  # fmt: skip
    rows += [point("concat_relu", tiles * N * C), conv("proj", (tiles, window, window, C), C)]
    return rows + copies + [point("add", B * R * R * C, 2)]


def example(seed=0):
    """Two handwritten digits at 32 pixels through a small network; its first map through one attention."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][seed : seed + 2] / 16
    img = np.repeat(np.kron(images, np.ones((4, 4)))[..., None], 3, axis=-1)
    cfg = EfficientViTConfig((16, 24, 24), (1, 1, 1), (2, 2, 3), (5, 3, 3), (4, 4, 4), num_classes=10)
    net = random_params(rng, init_efficientvit(rng, cfg, image=32))
    x = rng.standard_normal((2, 4, 4, 24))
    block = random_params(rng, _init_block(rng, cfg, 2, 24, 4))
    tile = random_params(rng, _init_block(rng, cfg, 2, 24, 3)).mixer
    options, down = {"key_dim": 4, "kernels": (5, 3, 3)}, net.stages[1].down.merge
    se = down.se_w1, down.se_b1, down.se_w2, down.se_b2
    return [
        Example("conv_bn", (img, net.stem[0]), {"stride": 2, "padding": 1}, (0, 1)),
        Example("cascaded_group_attention", (x, block.mixer), options, (0, 1)),
        Example("independent_group_attention", (x, block.mixer), options, (0, 1)),
        Example("group_attention_maps", (x, block.mixer), options, (0, 1)),
        Example("cascaded_group_attention_backward", (x[::-1], x, block.mixer), options),
        Example("window_attention", (x, tile), {**options, "window": 3}, (0, 1)),
        Example("squeeze_excite", (rng.standard_normal((2, 2, 2, 64)), *se), {}, (0, 1, 2, 3, 4)),
        Example("patch_merging", (rng.standard_normal((2, 3, 3, 16)), down), {}, (0, 1)),
        Example("efficientvit_block", (x, block), options, (0, 1)),
        Example("efficientvit_forward", (img, net, cfg), {}, (0, 1)),
    ]
