"""PNG pictures read into arrays: 8 bits a channel, no interlacing, no palette.

Source: the PNG specification (third edition), sections 5, 9 and 10.
"""

import struct
import zlib

import numpy as np

CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # colour type -> channels
MOST_PIXELS = 1 << 28


def read_png(raw):
    """Pixels [H, W, channels] uint8 of the bytes of a PNG file.

    Raises: ValueError for bytes that are no whole PNG; NotImplementedError for palettes, other depths and
      interlaced files.
    """
    if raw[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("raw must start with the signature of PNG")
    header, body, at, ended = None, [], 8, False
    while not ended:
        if at + 12 > len(raw):
            raise ValueError("the PNG is cut off")
        length, kind = struct.unpack(">I4s", raw[at : at + 8])
        data, check = raw[at + 8 : at + 8 + length], raw[at + 8 + length : at + 12 + length]
        if len(check) < 4 or zlib.crc32(kind + data) != int.from_bytes(check, "big"):
            raise ValueError(f"the PNG is cut off or damaged in its chunk {kind!r}")
        if kind == b"IHDR" and length == 13:
            header = struct.unpack(">IIBBBBB", data)
        body += [data] if kind == b"IDAT" else []
        ended, at = kind == b"IEND", at + 12 + length
    if header is None:
        raise ValueError("the PNG has no header")
    width, height, depth, colour, _, _, interlace = header
    if depth != 8 or colour not in CHANNELS or interlace:
        raise NotImplementedError(f"a PNG of {depth} bits, colour type {colour}, interlacing {interlace}")
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"a PNG of {width} x {height} pixels")
    c = CHANNELS[colour]
    size = height * (1 + width * c)
    unzip = zlib.decompressobj()
    try:
        filtered = unzip.decompress(b"".join(body), size + 1)
    except zlib.error as e:
        raise ValueError(f"the PNG's pixels cannot be unpacked: {e}") from None
    if len(filtered) != size:
        raise ValueError(f"the PNG's pixels are {len(filtered)} bytes, not {size}")
    rows = np.frombuffer(filtered, np.uint8).reshape(height, 1 + width * c)
    return unfilter(rows[:, 1:].reshape(height, width, c), rows[:, 0])


def unfilter(x, filters):
    """Undo the filter of every row: x [H, W, c] uint8, filters [H] in 0..4 -> pixels [H, W, c] uint8.

    A pixel is its difference plus a guess from its left, upper and upper left neighbour (0: nothing, 1: left,
    2: up, 3: their mean, 4: the neighbour nearest to left + up - corner). All pixels of an antidiagonal have
    their neighbours on the two before, so they are done at once.
    Raises: ValueError for another filter.
    """
    H, W, c = x.shape
    if filters.max(initial=0) > 4:
        raise ValueError(f"a PNG row has the unknown filter {filters.max()}")
    framed = np.zeros((H + 1, W + 1, c), np.int16)  # a row and a column of zeros before the first
    framed[1:, 1:] = x
    flat = framed.reshape(-1, c)
    filters = filters[:, None]
    for d in range(H + W - 1):
        top, bottom = max(0, d - W + 1), min(H, d + 1)
        first, last = (top + 1) * (W + 1) + d - top + 1, bottom * (W + 1) + d - bottom + 2
        here = slice(first, last + 1, W)  # one row down and one pixel left is W pixels on
        back = lambda n, first=first, last=last: flat[first - n : last - n + 1 : W]
        left, up, corner, f = back(1), back(W + 1), back(W + 2), filters[top:bottom]
        guess = left + up - corner
        to_left, to_up, to_corner = np.abs(guess - left), np.abs(guess - up), np.abs(guess - corner)
        nearest = np.where(to_up <= to_corner, up, corner)
        nearest = np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
        add = np.where(f == 4, nearest, np.where(f == 3, (left + up) >> 1, np.where(f == 2, up, left)))
        flat[here] = (flat[here] + np.where(f == 0, 0, add)) & 255
    return framed[1:, 1:].astype(np.uint8)
