"""Maps resized by bilinear interpolation, as a product with a matrix along each axis."""

import numpy as np


def resize_bilinear(images, size):
    """Images [..., H, W, C] -> [..., size, size, C] float64; pixel centres at (i + 1/2) H / size - 1/2.

    size: pixels a side, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = _bilinear(images.shape[-3], height), _bilinear(images.shape[-2], width)
    return np.einsum("yh,...hwc,xw->...yxc", rows, images, columns, optimize=True)


def _bilinear(n, size):
    """[size, n]: how much every old pixel of a line counts for the new ones."""
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), max(n - 2, 0))
    w = np.zeros((size, n))
    w[np.arange(size), low] = 1 - (at - low)
    w[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
    return w
