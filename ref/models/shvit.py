"""SHViT's network: sizes, parameters, how they start, and what it costs.

Source: Yun and Ro 2024 (arXiv 2401.16456) and the code released with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.conv import ConvBN, FFNParams, init_conv_bn
from ref.checks import one_of
from ref.models.pyramid import (
    DownParams,
    HeadParams,
    init_depthwise,
    init_down,
    init_ffn,
    init_head,
    init_stem,
)
from ref.models.pyramid_cost import OpCost, conv_cost, elementwise_cost, pyramid_cost, residual_cost

# name: dims, channels of the attention, depths (as in the released code); s4 reads 256 pixels
VARIANTS = {
    "s1": ((128, 224, 320), (32, 48, 68), (2, 4, 5)),
    "s2": ((128, 308, 448), (32, 66, 96), (2, 4, 5)),
    "s3": ((192, 352, 448), (48, 75, 96), (3, 5, 5)),
    "s4": ((224, 336, 448), (48, 72, 96), (4, 7, 6)),
}


KINDS = ("i", "s")  # without and with attention


class SHSAParams(NamedTuple):
    """Group norm ln_w, ln_b [P]; qkv 1x1 from P to 2 qk + P channels; proj 1x1 from C to C."""

    ln_w: np.ndarray
    ln_b: np.ndarray
    qkv: ConvBN
    proj: ConvBN


class SHViTBlockParams(NamedTuple):
    """Depthwise convolution, attention (None in kind "i"), feed-forward layer."""

    dw: ConvBN
    mixer: SHSAParams | None
    ffn: FFNParams


class StageParams(NamedTuple):
    """What leads into a stage (None in the first), and its blocks."""

    down: DownParams | None
    blocks: tuple[SHViTBlockParams, ...]


class SHViTParams(NamedTuple):
    """Four convolutions, three stages, a head; head_dist: the one trained by distillation, or None."""

    stem: tuple[ConvBN, ...]
    stages: tuple[StageParams, ...]
    head: HeadParams
    head_dist: HeadParams | None = None


@dataclass(frozen=True)
class SHViTConfig:
    """Three stages: widths, channels P that attend, blocks, kinds of block, query and key channels."""

    dims: tuple[int, ...]
    pdims: tuple[int, ...]
    depths: tuple[int, ...]
    kinds: tuple[str, ...] = ("i", "s", "s")
    qk_dims: tuple[int, ...] = (16, 16, 16)
    num_classes: int = 1000

    def __post_init__(self):
        """Raises: ValueError naming the field at fault."""
        for name in ("dims", "pdims", "depths", "qk_dims"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must hold three positive numbers, got {getattr(self, name)}")
        if len(self.kinds) != 3 or not set(self.kinds) <= set(KINDS):
            raise ValueError(f'kinds must hold three of "i" and "s", got {self.kinds}')
        for C, P in zip(self.dims, self.pdims, strict=True):
            check_pdim(P, C)


def shvit_config(name):
    """SHViTConfig of "s1" .. "s4". Raises: ValueError for another name."""
    one_of("name", name, VARIANTS)
    return SHViTConfig(*VARIANTS[name])


def init_shvit(rng, cfg: SHViTConfig):
    """SHViTParams for images of any size; residual layers start as the identity."""
    stages = []
    for i, C in enumerate(cfg.dims):
        down = init_down(rng, cfg.dims[i - 1], C) if i else None
        blocks = (
            _init_block(rng, cfg.kinds[i], C, cfg.pdims[i], cfg.qk_dims[i]) for _ in range(cfg.depths[i])
        )
        stages.append(StageParams(down, tuple(blocks)))
    head = init_head(rng, cfg.dims[-1], cfg.num_classes)
    return SHViTParams(init_stem(rng, cfg.dims[0]), tuple(stages), head)


def shvit_cost(cfg: SHViTConfig, *, batch, image=224, itemsize=4):
    """[OpCost] of the folded network on square images, each operation reading and writing memory once.

    The residual depthwise convolutions hold their identity, so that nothing is added behind them.
    """

    def block(name, i, shape):
        absorbed = residual_cost(f"{name}.dw", shape, itemsize)[:1]
        mixer = _mixer_cost(f"{name}.mixer", cfg, i, shape, itemsize) if cfg.kinds[i] == "s" else []
        return absorbed + mixer + residual_cost(f"{name}.ffn", shape, itemsize)

    rows = pyramid_cost(cfg, block, batch=batch, image=image, itemsize=itemsize)
    return [r for r in rows if not r.op.endswith(("dw0.add", "dw1.add"))]


def stem_cost(patch, stages, *, image=224, width=64, itemsize=4):
    """(bytes, ...) of one map in every stage: patches of `patch` pixels, sides halved from stage to stage.

    At equal width, so that only the number of pixels is compared.
    """
    if patch < 1 or stages < 1:
        raise ValueError(f"patch and stages must be at least 1, got {patch} and {stages}")
    return tuple(itemsize * width * (-(-image // (patch * 2**i))) ** 2 for i in range(stages))


def check_pdim(P, C, full=False):
    """Raise ValueError unless P of the C channels may attend: fewer than all, or all with full."""
    if not isinstance(P, int | np.integer) or not 1 <= P <= C - (not full):
        limit = "" if full else ", or all of them with full"
        raise ValueError(f"pdim must be in 1..{C - (not full)} for {C} channels{limit}, got {P}")


def _init_block(rng, kind, C, P, qk):
    mixer = None
    if kind == "s":
        qkv, proj = init_conv_bn(rng, P, 2 * qk + P), init_conv_bn(rng, C, C, gamma=0.0)
        mixer = SHSAParams(np.ones(P), np.zeros(P), qkv, proj)
    return SHViTBlockParams(init_depthwise(rng, C), mixer, init_ffn(rng, C))


def _mixer_cost(name, cfg, i, shape, itemsize):
    B, side, _, C = shape
    P, qk, N = cfg.pdims[i], cfg.qk_dims[i], side**2
    conv = lambda op, *a, **o: conv_cost(f"{name}.{op}", *a, **o, itemsize=itemsize)
    point = lambda op, *a, **o: elementwise_cost(f"{name}.{op}", *a, **o, itemsize=itemsize)
    product = lambda op, n, read, out: OpCost(
        f"{name}.{op}", B * N * N * n, itemsize * B * read, itemsize * B * out, 0
    )
    return [
        point("norm", B * N * P, reads=2),  # once for the statistics, once to apply them
        conv("qkv", (B, side, side, P), 2 * qk + P),
        product("scores", qk, 2 * N * qk, N * N), point("softmax", B * N * N),
        product("values", P, N * N + N * P, N * P),
        point("concat_relu", B * N * C), conv("proj", shape, C), point("add", B * N * C, reads=2),
    ]  # fmt: skip
