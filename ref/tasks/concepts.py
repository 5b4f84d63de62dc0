"""Small pictures of two coloured shapes: concepts are their attributes, the label is the set of these."""

import numpy as np

from ref.checks import at_least_one, one_of

SHAPES, COLOURS = ("disc", "square", "triangle"), ("red", "green", "blue")
CONCEPTS = SHAPES + COLOURS
PAIRS = ((0, 1), (0, 2), (1, 2))  # a class is a pair of shapes and a pair of colours: no attribute tells it
SIDE, CELL = 16, 8  # pixels of a picture, and of the quarter that an object lies in


def shapes_concepts(key, n_images):
    """Pictures with two objects in two of four quarters, what they are like, and where.

    Args: key: a NumPy Generator or a seed.
    Returns: dict of image [n, 16, 16, 3] float64 in 0..1, on noisy grey; label [n] int32 in 0..8, 3 times the
      pair of shapes plus the pair of colours; concepts [n, 6] bool, which of three shapes and three colours
      are there; masks [n, 16, 16, 6] bool, where.
    Raises: ValueError for n_images < 1.
    """
    at_least_one(n_images=n_images)
    rng = np.random.default_rng(key)
    labels = rng.integers(0, len(PAIRS) ** 2, n_images, dtype=np.int32)
    image = 0.2 + 0.05 * rng.standard_normal((n_images, SIDE, SIDE, 3))
    masks = np.zeros((n_images, SIDE, SIDE, len(CONCEPTS)), bool)
    for n, label in enumerate(labels):
        shapes, colours = PAIRS[label // 3], rng.permutation(PAIRS[label % 3])
        quarters = rng.permutation(4)[:2]
        for shape, colour, quarter in zip(shapes, colours, quarters, strict=True):
            centre = CELL * np.array(divmod(int(quarter), 2)) + rng.uniform(3.0, CELL - 4.0, 2)
            where = shape_mask(SHAPES[shape], centre, rng.uniform(2.5, 3.2))
            image[n, where] = 0.1 + 0.8 * np.eye(3)[colour]
            masks[n, where, shape] = masks[n, where, 3 + colour] = True
    return {
        "image": np.clip(image, 0, 1),
        "label": labels,
        "concepts": masks.any(axis=(1, 2)),
        "masks": masks,
    }


def shape_mask(shape, centre, radius, *, side=SIDE):
    """Pixels [side, side] bool of a "disc", "square" or "triangle" (point up) around centre (row, column)."""
    one_of("shape", shape, SHAPES)
    down, right = (axis - c for axis, c in zip(np.indices((side, side)), centre, strict=True))
    if shape == "disc":
        return down**2 + right**2 <= radius**2
    if shape == "square":
        return np.maximum(np.abs(down), np.abs(right)) <= 0.8 * radius
    return (down <= 0.8 * radius) & (2 * np.abs(right) <= down + radius)


def patch_targets(masks, patch):
    """Share of every patch's pixels that show a concept: [n, H, W, C] -> [n, P, C]; NaN where none does."""
    n, H, W, C = masks.shape
    if H % patch or W % patch:
        raise ValueError(f"patch must divide the sides {H} x {W} of masks, got {patch}")
    share = masks.reshape(n, H // patch, patch, W // patch, patch, C).mean(axis=(2, 4)).reshape(n, -1, C)
    return np.where(share.any(axis=-1, keepdims=True), share, np.nan)
