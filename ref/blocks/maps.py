"""Maps [B, H, W, C] as rows of tokens, and cut into square windows."""

import math


def map_rows(x):
    """[B, H, W, C] -> [B, H W, C]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


def to_windows(x, window):
    """[B, H, W, C] -> [B, M, window^2, C], windows row by row; window divides H and W."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // window, window, W // window, window, C).swapaxes(2, 3)
    return x.reshape(B, (H // window) * (W // window), window**2, C)


def from_windows(y, height, width):
    """The inverse of `to_windows`, to the sides of the map: y [B, M, window^2, C'] -> [B, H, W, C']."""
    B, _, area, C = y.shape
    window = math.isqrt(area)
    y = y.reshape(B, height // window, width // window, window, window, C).swapaxes(2, 3)
    return y.reshape(B, height, width, C)
