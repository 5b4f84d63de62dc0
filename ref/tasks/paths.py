"""Generated pictures of dashed curves with the question whether two marked ends belong to the same curve.

Source: a re-creation in the manner of Linsley et al. 2018 (Pathfinder), as Long Range Arena flattens it to a
sequence of pixels; drawn here, no picture is theirs.
"""

import numpy as np

EMPTY, DASH, MARK = 0, 1, 2  # pixel values


def path_finder(key, batch, *, side=32, length=18, num_curves=3):
    """(tokens int32 [batch, side * side] of 0..2, labels int32 [batch]): 1 if both marks end one curve.

    num_curves dashed curves of `length` pixels that keep a distance of two pixels; half of the pictures mark
    both ends of the first curve, the others one end of the first and one of the second.
    Args: key: a NumPy Generator or a seed. Raises: ValueError for a batch < 1, num_curves < 2, length < 6, or
      a side in which that many curves find no room.
    """
    if batch < 1 or num_curves < 2 or length < 6:
        raise ValueError(
            f"need batch >= 1, num_curves >= 2 and length >= 6, got {batch=}, {num_curves=}, {length=}"
        )
    rng = np.random.default_rng(key)
    labels = rng.integers(0, 2, batch, dtype=np.int32)
    pictures = np.stack([_picture(rng, label, side, length, num_curves) for label in labels])
    return pictures.reshape(batch, side * side), labels


def _picture(rng, label, side, length, num_curves):
    for _ in range(50):
        picture, taken, curves = np.zeros((side, side), np.int32), np.zeros((side, side), bool), []
        for _ in range(200):
            curve = _curve(rng, side, length)
            if curve is None or taken[tuple(curve.T)].any():
                continue
            for y, x in curve:  # a margin of two pixels, so that no curve touches another
                taken[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = True
            curves.append(curve)
            if len(curves) == num_curves:
                break
        if len(curves) == num_curves:
            break
    else:
        raise ValueError(f"{num_curves} curves of {length} pixels find no room in side={side}")
    for curve in curves:
        dashes = curve[np.arange(len(curve)) % 3 != 2]
        picture[tuple(dashes.T)] = DASH
    ends = [(0, 0), (0, -1)] if label else [(0, -int(rng.integers(2))), (1, -int(rng.integers(2)))]
    for which, end in ends:
        y, x = curves[which][end]
        picture[y, x] = MARK
    return picture


def _curve(rng, side, length):
    """Pixels [length, 2] of a walk that keeps its direction roughly; None if it leaves or meets itself."""
    at, angle = rng.uniform(1, side - 1, 2), rng.uniform(0, 2 * np.pi)
    pixels = [tuple(at.astype(int))]
    while len(pixels) < length:
        angle += 0.25 * rng.standard_normal()
        at = at + np.array((np.sin(angle), np.cos(angle)))
        if not (0 <= at.min() and at.max() < side):
            return None
        pixel = tuple(at.astype(int))
        if pixel in pixels[:-1]:
            return None
        if pixel != pixels[-1]:
            pixels.append(pixel)
    return np.array(pixels)
