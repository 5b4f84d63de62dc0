"""EfficientViT's network: sizes, parameters, how they start, and what it costs.

Source: Liu et al. 2023 (arXiv 2305.07027) and the code released with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.conv import ConvBN, FFNParams, init_conv_bn
from ref.checks import check_num_heads, one_of
from ref.models.pyramid import (
    DownParams,
    HeadParams,
    init_depthwise,
    init_down,
    init_ffn,
    init_head,
    init_stem,
    stage_sides,
)
from ref.models.pyramid_cost import OpCost, conv_cost, elementwise_cost, pyramid_cost, residual_cost

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
            check_kernels(C, h, self.kernels)


def efficientvit_config(name):
    """EfficientViTConfig of "m0" .. "m5". Raises: ValueError for another name."""
    one_of("name", name, VARIANTS)
    return EfficientViTConfig(*VARIANTS[name])


def init_efficientvit(rng, cfg: EfficientViTConfig, *, image=224):
    """EfficientViTParams for square images of `image` pixels; residual layers start as the identity."""
    stages = []
    for i, (side, C) in enumerate(zip(stage_sides(image), cfg.dims, strict=True)):
        down = init_down(rng, cfg.dims[i - 1], C) if i else None
        blocks = tuple(init_block(rng, cfg, i, C, min(side, cfg.windows[i])) for _ in range(cfg.depths[i]))
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


def check_kernels(C, h, kernels):
    """Raise ValueError unless h heads divide C channels, with an odd kernel for each."""
    check_num_heads(C, h, name="heads")
    if len(kernels) < h or any(k % 2 == 0 for k in kernels):
        raise ValueError(f"kernels must be odd, one for each of {h} heads, got {tuple(kernels)}")


def init_block(rng, cfg, i, C, side):
    """One block of stage i, of width C, whose attention sees maps of `side` pixels."""
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
