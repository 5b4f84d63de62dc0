"""The sizes of vision transformers without their weights, for what is counted from shapes alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """One block: tokens of width dim, heads, tokens in a window of attention, width of the MLP.

    merges: patches are merged two by two before it.
    """

    tokens: int
    dim: int
    heads: int
    window: int
    hidden: int
    merges: bool = False


@dataclass(frozen=True)
class NetShape:
    """Pixels a side, and the blocks, first to last."""

    image_size: int
    blocks: tuple[BlockShape, ...]


def vit_shape(*, image_size, patch, dim, depth, heads, hidden=None):
    """NetShape of a vision transformer without class token."""
    tokens = (image_size // patch) ** 2
    return NetShape(image_size, (BlockShape(tokens, dim, heads, tokens, hidden or 4 * dim),) * depth)


def swin_tiny(*, image_size=224):
    """NetShape of Swin-Tiny: blocks 2, 2, 6, 2 of width 96, 192, 384, 768, windows of 7 x 7."""
    blocks = []
    for stage, depth in enumerate((2, 2, 6, 2)):
        tokens, dim = (image_size // (4 * 2**stage)) ** 2, 96 * 2**stage
        for i in range(depth):
            blocks.append(BlockShape(tokens, dim, 3 * 2**stage, 49, 4 * dim, merges=stage > 0 and i == 0))
    return NetShape(image_size, tuple(blocks))
